//! The latest events and refusals, for the operators' pages: in memory, bounded, lost with the process. No body and no
//! `userToken` is kept, and texts from outside are cut.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};

use jiff::{SignedDuration, Timestamp};
use uuid::Uuid;

use crate::event::{DOCUMENTED_TYPES, Envelope, Fingerprint, Source};

/// Maximum number of events that are kept; each takes about 300 bytes.
const LATEST_MAX: usize = 1000;
/// Maximum number of event types with a count of their own; the rest is counted together.
const TYPES_MAX: usize = 50;
/// Longer texts are cut. Prism's ids have 36 characters, its types about 40.
const TEXT_CHARS_MAX: usize = 100;

/// Codes of requests that Internet scanners make. They say nothing about Prism.
const SCANNER_CODES: [&str; 3] = ["not-found", "method-not-allowed", "source-not-allowed"];

/// What happened recently. Cheap to add to; readers get copies.
pub struct Recent {
    counts: Mutex<Counts>,
    /// The latest events, the oldest first.
    latest: Mutex<VecDeque<Arrival>>,
    /// Events that an operator removed last.
    removed: Mutex<VecDeque<Uuid>>,
    turned_away: Mutex<TurnedAway>,
}

/// Prism tries for the last time 35 s after the first time. An event that was refused and does not come again within
/// this time is lost.
const GIVEN_UP_AFTER: SignedDuration = SignedDuration::from_secs(60);

/// Maximum number of refused events that are recognised when they come again; each takes about 80 bytes. Of more, the
/// oldest ones count as lost.
const TURNED_AWAY_MAX: usize = 10_000;

/// Events that were refused and not accepted since.
#[derive(Default)]
struct TurnedAway {
    waiting: HashMap<Fingerprint, (Timestamp, &'static str)>,
    /// The order in which they were refused for the first time; also those that were accepted since.
    order: VecDeque<(Timestamp, Fingerprint)>,
    losses: Losses,
}

/// Refused events and what became of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Losses {
    /// Refused recently: Prism may send them again.
    pub waiting: u64,
    /// When the last one of those was refused, and the code of its refusal.
    pub last_waiting: Option<(Timestamp, &'static str)>,
    /// Refused, and not accepted within a minute.
    pub lost: u64,
    /// When the last event was lost, and the code of its refusal.
    pub last: Option<(Timestamp, &'static str)>,
}

/// Counts since the start of the process.
#[derive(Clone, Default)]
pub struct Counts {
    /// Accepted events, by event type.
    pub types: BTreeMap<String, Tally>,
    /// Accepted events of all types beyond the limit.
    pub other_types: Tally,
    /// Refused requests, by the `code` of the answer.
    pub refused: BTreeMap<&'static str, u64>,
    pub last_refused: Option<(Timestamp, &'static str)>,
    /// When a request was last refused, by the `code` of the answer.
    pub refused_at: BTreeMap<&'static str, Timestamp>,
    pub last_accepted: Option<Timestamp>,
    pub accepted: u64,
    pub duplicates: u64,
    /// Valid signatures, by the position of the secret.
    pub verified: BTreeMap<usize, Tally>,
}

/// An accepted event.
#[derive(Clone, Debug)]
pub struct Arrival {
    pub seq: u64,
    pub id: Uuid,
    pub accepted_at: Timestamp,
    pub source: Source,
    /// The event type; `None`, like the fields below, for a signed body without an envelope.
    pub event_type: Option<Box<str>>,
    pub scan_id: Option<Box<str>>,
    pub prediction_id: Option<Box<str>>,
    pub state: Option<Box<str>>,
}

/// How often something happened, and when it did last.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    pub count: u64,
    pub last: Option<Timestamp>,
}

impl Tally {
    fn add(&mut self, now: Timestamp) {
        self.count += 1;
        self.last = Some(now);
    }
}

impl Default for Recent {
    fn default() -> Self {
        // Documented types have their places, whatever other types come first.
        let types = DOCUMENTED_TYPES.map(|name| (name.to_owned(), Tally::default())).into();
        let counts = Mutex::new(Counts { types, ..Counts::default() });
        Self { counts, latest: Mutex::default(), removed: Mutex::default(), turned_away: Mutex::default() }
    }
}

impl Recent {
    /// Adds an accepted webhook.
    pub fn accepted(&self, seq: u64, id: Uuid, envelope: Option<&Envelope<'_>>, now: Timestamp) {
        let arrival = Arrival::new(seq, id, Source::Webhook, envelope, now);
        {
            let mut counts = locked(&self.counts);
            counts.accepted += 1;
            counts.last_accepted = Some(now);
            counts.count_type(arrival.event_type.as_deref().unwrap_or("(no event)"), now);
        }
        push(&mut locked(&self.latest), arrival);
    }

    /// Adds an event that Prism's API told. It is no webhook, so it does not count as one.
    pub fn made(&self, seq: u64, id: Uuid, envelope: &Envelope<'_>, now: Timestamp) {
        push(&mut locked(&self.latest), Arrival::new(seq, id, Source::Api, Some(envelope), now));
    }

    /// Counts a re-send.
    pub fn duplicate(&self, now: Timestamp) {
        let mut counts = locked(&self.counts);
        counts.duplicates += 1;
        counts.last_accepted = Some(now);
    }

    /// Counts a refused request by the code of its answer.
    pub fn refused(&self, code: &'static str, now: Timestamp) {
        let mut counts = locked(&self.counts);
        *counts.refused.entry(code).or_default() += 1;
        counts.last_refused = Some((now, code));
        counts.refused_at.insert(code, now);
    }

    /// An event that may be Prism's was refused with this code.
    pub fn turned_away(&self, event: Fingerprint, code: &'static str, now: Timestamp) {
        locked(&self.turned_away).add(event, code, now);
    }

    /// An event with this fingerprint was accepted, so an earlier refusal did no harm.
    pub fn taken_after_all(&self, event: &Fingerprint) {
        locked(&self.turned_away).waiting.remove(event);
    }

    /// What became of the refused events.
    pub fn losses(&self, now: Timestamp) -> Losses {
        let mut turned_away = locked(&self.turned_away);
        turned_away.give_up(now);
        let last_waiting = turned_away.waiting.values().max().copied();
        Losses { waiting: turned_away.waiting.len() as u64, last_waiting, ..turned_away.losses }
    }

    /// Counts a valid signature. `position` is that of its secret, from 0.
    pub fn verified(&self, position: usize, now: Timestamp) {
        locked(&self.counts).verified.entry(position).or_default().add(now);
    }

    /// Forgets the counts per secret: the positions have a new meaning.
    pub fn secrets_replaced(&self) {
        locked(&self.counts).verified.clear();
    }

    /// Notes that an operator removed this event from the spool.
    pub fn removed(&self, id: Uuid) {
        push(&mut locked(&self.removed), id);
    }

    /// A copy of all counts.
    pub fn counts(&self) -> Counts {
        locked(&self.counts).clone()
    }

    /// The newest `limit` events that match, newest first.
    pub fn latest(&self, limit: usize, matches: impl Fn(&Arrival) -> bool) -> Vec<Arrival> {
        locked(&self.latest).iter().rev().filter(|arrival| matches(arrival)).take(limit).cloned().collect()
    }

    /// Whether an operator removed this event recently.
    pub fn was_removed(&self, id: Uuid) -> bool {
        locked(&self.removed).contains(&id)
    }
}

impl Arrival {
    fn new(seq: u64, id: Uuid, source: Source, envelope: Option<&Envelope<'_>>, now: Timestamp) -> Self {
        let text = |text: &str| match text.char_indices().nth(TEXT_CHARS_MAX) {
            Some((end, _)) => Box::from(&text[..end]),
            None => Box::from(text),
        };
        Self {
            seq,
            id,
            accepted_at: now,
            source,
            event_type: envelope.map(|envelope| text(&envelope.event_type)),
            scan_id: envelope.and_then(|envelope| envelope.scan_id.as_deref()).map(text),
            prediction_id: envelope.and_then(|envelope| envelope.prediction_id.as_deref()).map(text),
            state: envelope.and_then(|envelope| envelope.state.as_deref()).map(text),
        }
    }
}

impl Counts {
    /// Refusals without those of Internet scanners, by code.
    pub fn mistaken(&self) -> BTreeMap<&'static str, u64> {
        self.refused
            .iter()
            .filter(|(code, _)| !SCANNER_CODES.contains(code))
            .map(|(code, count)| (*code, *count))
            .collect()
    }

    fn count_type(&mut self, event_type: &str, now: Timestamp) {
        if let Some(tally) = self.types.get_mut(event_type) {
            tally.add(now);
        } else if self.types.len() < TYPES_MAX {
            self.types.insert(event_type.to_owned(), Tally { count: 1, last: Some(now) });
        } else {
            self.other_types.add(now);
        }
    }
}

impl TurnedAway {
    fn add(&mut self, event: Fingerprint, code: &'static str, now: Timestamp) {
        // The time counts from the first try.
        let Entry::Vacant(place) = self.waiting.entry(event) else { return };
        place.insert((now, code));
        self.order.push_back((now, event));
        if self.order.len() > TURNED_AWAY_MAX {
            self.lose_oldest();
        }
    }

    /// Counts the events that Prism has given up.
    fn give_up(&mut self, now: Timestamp) {
        while self.order.front().is_some_and(|(at, _)| now.duration_since(*at) > GIVEN_UP_AFTER) {
            self.lose_oldest();
        }
    }

    fn lose_oldest(&mut self) {
        let Some((at, event)) = self.order.pop_front() else { return };
        // An event that was accepted, and refused again since, is in the order twice.
        if let Entry::Occupied(place) = self.waiting.entry(event)
            && place.get().0 == at
        {
            let (_, code) = place.remove();
            self.losses.lost += 1;
            self.losses.last = self.losses.last.max(Some((at, code)));
        }
    }
}

fn push<T>(queue: &mut VecDeque<T>, item: T) {
    if queue.len() == LATEST_MAX {
        queue.pop_front();
    }
    queue.push_back(item);
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_event_is_lost_unless_it_is_accepted_within_a_minute() {
        let (recent, start) = (Recent::default(), Timestamp::UNIX_EPOCH);
        let at = |seconds: i64| start + SignedDuration::from_secs(seconds);
        let event = |number: u64| Fingerprint::of(&number.to_be_bytes());
        recent.turned_away(event(1), "spool-full", at(0));
        recent.turned_away(event(2), "spool-full", at(1));
        recent.turned_away(event(2), "spool-full", at(35));
        recent.taken_after_all(&event(1));
        let waiting = Losses { waiting: 1, last_waiting: Some((at(1), "spool-full")), ..Losses::default() };
        assert_eq!(recent.losses(at(40)), waiting);
        let lost = Losses { lost: 1, last: Some((at(1), "spool-full")), ..Losses::default() };
        assert_eq!(recent.losses(at(62)), lost);
        recent.taken_after_all(&event(2));
        assert_eq!(recent.losses(at(63)), lost, "too late");

        for number in 0..TURNED_AWAY_MAX as u64 + 5 {
            recent.turned_away(event(100 + number), "spool-full", at(100));
        }
        let Losses { waiting, lost, .. } = recent.losses(at(101));
        assert_eq!((waiting, lost), (TURNED_AWAY_MAX as u64, 6), "the number is limited");
    }

    #[test]
    fn it_is_bounded_and_cuts_long_texts() {
        let (recent, now) = (Recent::default(), Timestamp::now());
        for number in 0..2 * LATEST_MAX as u64 {
            let envelope =
                Envelope { event_type: format!("t{number}.{}", "ä".repeat(500)).into(), ..Envelope::default() };
            recent.accepted(number, Uuid::nil(), Some(&envelope), now);
        }
        recent.accepted(0, Uuid::nil(), None, now);
        let (counts, latest) = (recent.counts(), recent.latest(usize::MAX, |_| true));
        assert_eq!((latest.len(), counts.types.len()), (LATEST_MAX, TYPES_MAX));
        let others = TYPES_MAX - DOCUMENTED_TYPES.len();
        assert_eq!(counts.other_types.count, (2 * LATEST_MAX + 1 - others) as u64);
        assert!(counts.types.keys().all(|name| name.chars().count() <= TEXT_CHARS_MAX));
        assert_eq!(latest[0].event_type, None);
    }
}
