//! How many events may be in flight, and which event is to blame for a closed channel. Pure; outlives a session.
//!
//! After a nack the queues with room would get every event of the window twice, and after a closed channel every event
//! in flight is published again. So the window restarts at one event and grows with each confirm.

use std::time::{Duration, Instant};

use super::message::routing_key;
use super::refusals::{Blame, Refusals};
use super::window::{Ended, Flight, Lane};
use crate::event::Envelope;

/// An event that closed the channel this often, each time alone in flight, is the culprit if the broker's reply names
/// none. Twice, because a channel may also close for another reason.
const STRIKES: u32 = 2;

#[derive(Debug)]
pub(super) struct Pacing {
    /// How many events may be in flight; limits the configured window.
    limit: usize,
    suspect: Option<Suspect>,
    /// What the broker refused recently.
    pub refusals: Refusals,
    /// A round of retries of parked events has begun and not ended.
    retrying: bool,
    /// When the last round of retries of parked events ended.
    parked_tried_at: Option<Instant>,
}

/// The event that was alone in flight when the channel was closed.
#[derive(Clone, Copy, Debug)]
struct Suspect {
    seq: u64,
    strikes: u32,
}

/// An event that was in flight when the broker closed the channel over a message.
#[derive(Clone, Debug)]
pub(super) struct Accused {
    pub seq: u64,
    pub key: String,
    pub bytes: usize,
    /// Whether it was parked before: then one strike is enough.
    pub parked: bool,
}

impl<T> From<&Flight<T>> for Accused {
    fn from(Flight { stored, lane, .. }: &Flight<T>) -> Self {
        let body = &stored.event.body;
        let key = routing_key(Envelope::parse(body).ok().as_ref()).to_owned();
        Self { seq: stored.seq, key, bytes: body.len(), parked: *lane == Lane::Parked }
    }
}

impl Default for Pacing {
    fn default() -> Self {
        Self { limit: usize::MAX, suspect: None, refusals: Refusals::default(), retrying: false, parked_tried_at: None }
    }
}

impl Pacing {
    /// How many events may be in flight, given the configured `window`.
    pub(super) fn window(&self, window: usize) -> usize {
        window.min(self.limit)
    }

    /// The broker closed the channel over one of these events. Returns the culprits, if they are known.
    ///
    /// The reply names the key or the limit of the size, which concerns all events that have it. Otherwise the smaller
    /// window finds the culprit.
    pub(super) fn on_refusal(&mut self, reply: &str, accused: &[Accused], keep: Duration, now: Instant) -> Vec<u64> {
        self.limit = 1;
        let blame = Blame::parse(reply);
        let culprits: Vec<_> =
            accused.iter().filter(|event| blame.concerns(&event.key, event.bytes)).map(|event| event.seq).collect();
        if !culprits.is_empty() {
            self.refusals.remember(&blame, reply, keep, now);
            return culprits;
        }
        let &[Accused { seq, parked, .. }] = accused else { return Vec::new() };
        let strikes = match self.suspect {
            Some(suspect) if suspect.seq == seq => suspect.strikes + 1,
            _ => 1,
        };
        if strikes < STRIKES && !parked {
            self.suspect = Some(Suspect { seq, strikes });
            return Vec::new();
        }
        self.suspect = None;
        vec![seq]
    }

    /// A publish has an outcome. A nack of a pending event narrows the window until the session ends; a confirm widens
    /// it.
    pub(super) fn on_outcome<T>(&mut self, ended: &Ended<T>) {
        if ended.after_nack {
            self.limit = 1;
        } else if ended.nacked.is_none() {
            self.limit = self.limit.saturating_add(1);
        }
    }

    /// Whether to look for parked events that are due for a retry. `settles`: the spool can record a delivery; while it
    /// cannot, the same events would be tried without end. `take_request`: whether an operator asks for a retry.
    pub(super) fn is_retry_due(
        &mut self,
        parked: u64,
        settles: bool,
        take_request: impl FnOnce() -> bool,
        interval: Duration,
        now: Instant,
    ) -> bool {
        if parked == 0 || !settles {
            return false;
        }
        let requested = take_request();
        if requested {
            // A new round: everything is really tried.
            self.retrying = false;
        }
        requested || self.parked_tried_at.is_none_or(|at| now.saturating_duration_since(at) >= interval)
    }

    /// Some of the parked events are about to be retried. In each round a refused key or size is tried once more.
    pub(super) fn on_retry(&mut self) {
        if !std::mem::replace(&mut self.retrying, true) {
            self.refusals.forget();
        }
    }

    /// The round of retries of parked events is over.
    pub(super) fn on_parked_tried(&mut self, now: Instant) {
        self.retrying = false;
        self.parked_tried_at = Some(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::INVALID_BODY;
    use crate::publisher::tests::stored_with;

    const KEEP: Duration = Duration::from_secs(60);
    const NONE: [u64; 0] = [];
    const KEY_REFUSED: &str = "write access to topic 'b' in exchange 'e' in vhost '/' refused for user 'u'";

    fn accused(seq: u64, key: &str) -> Accused {
        Accused { seq, key: key.to_owned(), bytes: 100, parked: false }
    }

    fn refuse(pacing: &mut Pacing, reply: &str, accused: &[Accused]) -> Vec<u64> {
        pacing.on_refusal(reply, accused, KEEP, Instant::now())
    }

    fn ended(after_nack: bool) -> Ended<()> {
        Ended { lane: Lane::Pending, released: 0, nacked: None, after_nack }
    }

    fn confirm(pacing: &mut Pacing, after_nack: bool) {
        pacing.on_outcome(&ended(after_nack));
    }

    fn is_due(pacing: &mut Pacing, requested: bool, now: Instant) -> bool {
        pacing.is_retry_due(1, true, || requested, KEEP, now)
    }

    #[test]
    fn a_reply_that_names_the_key_or_the_size_is_proof_at_once() {
        let mut pacing = Pacing::default();
        let all = [accused(5, "a"), accused(7, "b"), accused(9, "b")];
        assert_eq!(refuse(&mut pacing, KEY_REFUSED, &all), [7, 9]);
        assert_eq!(pacing.refusals.reason("b", 1, Instant::now()), Some(KEY_REFUSED));
        let size = "message size 200 is larger than configured max size 150";
        let large = [accused(5, "a"), Accused { bytes: 200, ..accused(6, "a") }];
        assert_eq!(refuse(&mut pacing, size, &large), [6]);
        assert_eq!(pacing.refusals.reason("a", 151, Instant::now()), Some(size));
    }

    #[test]
    fn a_culprit_that_no_reply_names_is_found_by_publishing_fewer_and_fewer() {
        let mut pacing = Pacing::default();
        assert_eq!(pacing.window(1000), 1000);
        let all: Vec<_> = (0..1000).map(|seq| accused(seq, "a")).collect();
        let (mut first, mut rounds) = (0, 0);
        loop {
            rounds += 1;
            assert!(rounds < 20, "too many channels");
            // Everything before the culprit is confirmed, one by one, and the window grows.
            let mut window = pacing.window(1000);
            while first + window <= 700 {
                confirm(&mut pacing, false);
                first += 1;
                window = pacing.window(1000);
            }
            let culprits = refuse(&mut pacing, "why", &all[first..first + window]);
            if !culprits.is_empty() {
                assert_eq!(culprits, [700]);
                break;
            }
            assert_eq!(pacing.window(1000), 1);
        }
        assert_eq!(refuse(&mut pacing, "why", &all[701..702]), NONE, "the next event starts with no strikes");
    }

    #[test]
    fn a_single_refusal_without_a_name_is_no_proof_but_for_a_parked_event() {
        let mut pacing = Pacing::default();
        assert_eq!(refuse(&mut pacing, "why", &[accused(3, "a")]), NONE);
        assert_eq!(refuse(&mut pacing, "why", &[accused(4, "a")]), NONE);
        assert_eq!(refuse(&mut pacing, "why", &[accused(3, "a")]), NONE);
        assert_eq!(refuse(&mut pacing, KEY_REFUSED, &[accused(3, "other")]), [3]);
        assert_eq!(refuse(&mut pacing, "why", &[]), NONE);
        assert_eq!(refuse(&mut pacing, "why", &[Accused { parked: true, ..accused(8, "a") }]), [8]);
    }

    #[test]
    fn after_a_nack_the_window_opens_with_each_confirm_of_the_next_session() {
        let mut pacing = Pacing::default();
        confirm(&mut pacing, false);
        assert_eq!(pacing.window(1000), 1000);
        pacing.on_outcome(&Ended { nacked: Some(()), ..ended(true) });
        confirm(&mut pacing, true);
        assert_eq!(pacing.window(1000), 1);
        pacing.on_outcome(&Ended { lane: Lane::Parked, nacked: Some(()), ..ended(false) });
        assert_eq!(pacing.window(1000), 1, "a parked event");
        confirm(&mut pacing, false);
        confirm(&mut pacing, false);
        assert_eq!((pacing.window(1000), pacing.window(2)), (3, 2));
    }

    #[test]
    fn parked_events_are_retried_at_once_and_then_at_the_interval() {
        let (mut pacing, start) = (Pacing::default(), Instant::now());
        assert!(is_due(&mut pacing, false, start));
        pacing.on_retry();
        pacing.on_parked_tried(start);
        assert!(!is_due(&mut pacing, false, start + KEEP / 2));
        assert!(is_due(&mut pacing, true, start + KEEP / 2), "an operator asks for a retry");
        assert!(is_due(&mut pacing, false, start + KEEP));
    }

    #[test]
    fn a_request_for_a_retry_is_kept_until_there_is_an_event_whose_delivery_can_be_recorded() {
        let (mut pacing, now) = (Pacing::default(), Instant::now());
        for (parked, settles) in [(0, true), (1, false)] {
            assert!(!pacing.is_retry_due(parked, settles, || panic!("the request is lost"), KEEP, now));
        }
    }

    #[test]
    fn an_event_in_flight_is_accused_with_the_key_and_the_size_of_its_message() {
        for (body, lane, expected) in [
            (r#"{"eventType":"scan.ended"}"#, Lane::Pending, ("scan.ended", 26, false)),
            ("no JSON", Lane::Parked, (INVALID_BODY, 7, true)),
        ] {
            let flight = Flight { stored: stored_with(5, None, body), lane, published_at: Instant::now(), span: () };
            let Accused { seq, key, bytes, parked } = Accused::from(&flight);
            assert_eq!((seq, (key.as_str(), bytes, parked)), (5, expected));
        }
    }

    #[test]
    fn each_round_of_retries_tries_a_refused_key_once() {
        let (mut pacing, now) = (Pacing::default(), Instant::now());
        let is_refused = |pacing: &Pacing| pacing.refusals.reason("b", 1, now).is_some();
        refuse(&mut pacing, KEY_REFUSED, &[accused(1, "b")]);
        assert!(is_refused(&pacing));
        pacing.on_retry();
        assert!(!is_refused(&pacing));
        refuse(&mut pacing, KEY_REFUSED, &[accused(1, "b")]);
        pacing.on_retry();
        assert!(is_refused(&pacing), "the next batch of the same round");
        assert!(is_due(&mut pacing, true, now));
        pacing.on_retry();
        assert!(!is_refused(&pacing), "an operator asks for a retry during the round");
        refuse(&mut pacing, KEY_REFUSED, &[accused(1, "b")]);
        pacing.on_parked_tried(now);
        pacing.on_retry();
        assert!(!is_refused(&pacing));
    }
}
