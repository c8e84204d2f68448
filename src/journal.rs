//! What came in lately, for the operators' pages: in memory, of a fixed size, gone with the process. It has no body and no
//! `userToken`, and texts that somebody sent are cut short.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};

use jiff::Timestamp;
use uuid::Uuid;

use crate::event::Envelope;

/// Events that are remembered, with some 300 bytes each.
const LATEST_MAX: usize = 1000;
/// Event types that are counted one by one.
const TYPES_MAX: usize = 50;
/// Longer texts are cut. Prism's ids have 36 characters, its types some 40.
const TEXT_CHARS_MAX: usize = 100;

/// Codes of requests that whoever scans the internet makes: they tell nothing of Prism.
const STRANGERS: [&str; 3] = ["not-found", "method-not-allowed", "source-not-allowed"];

#[derive(Default)]
pub struct Journal(Mutex<Entries>);

/// Everything that the journal holds.
#[derive(Clone, Default)]
pub struct Entries {
    /// The newest last.
    pub latest: VecDeque<Arrival>,
    pub types: BTreeMap<String, Tally>,
    /// Of the types beyond [`TYPES_MAX`].
    pub other_types: Tally,
    /// By the `code` of the answer.
    pub refused: BTreeMap<&'static str, u64>,
    pub last_refused: Option<(Timestamp, &'static str)>,
    /// The last refusal of a request that was meant for us.
    pub last_mistaken: Option<&'static str>,
    pub last_accepted: Option<Timestamp>,
    pub accepted: u64,
    pub duplicates: u64,
    /// Signatures that were right, by the position of the secret.
    pub verified: BTreeMap<usize, Tally>,
}

/// Requests so far.
#[derive(Clone, Copy, Debug)]
pub struct Totals {
    /// Re-sends among them.
    pub accepted: u64,
    pub refused: u64,
    /// Refused, and yet meant for us.
    pub mistaken: u64,
}

/// An accepted event.
#[derive(Clone, Debug)]
pub struct Arrival {
    pub seq: u64,
    pub id: Uuid,
    pub accepted_at: Timestamp,
    /// Nothing of an envelope is known of a signed body that has none.
    pub event_type: Option<Box<str>>,
    pub scan_id: Option<Box<str>>,
    pub prediction_id: Option<Box<str>>,
    pub state: Option<Box<str>>,
}

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

impl Journal {
    pub fn accepted(&self, seq: u64, id: Uuid, envelope: Option<&Envelope<'_>>, now: Timestamp) {
        let text = |text: &str| match text.char_indices().nth(TEXT_CHARS_MAX) {
            Some((end, _)) => Box::from(&text[..end]),
            None => Box::from(text),
        };
        let arrival = Arrival {
            seq,
            id,
            accepted_at: now,
            event_type: envelope.map(|envelope| text(&envelope.event_type)),
            scan_id: envelope.and_then(|envelope| envelope.scan_id.as_deref()).map(text),
            prediction_id: envelope.and_then(|envelope| envelope.prediction_id.as_deref()).map(text),
            state: envelope.and_then(|envelope| envelope.state.as_deref()).map(text),
        };
        let mut entries = self.entries();
        entries.accepted += 1;
        entries.last_accepted = Some(now);
        entries.count_type(arrival.event_type.as_deref().unwrap_or("(no event)"), now);
        if entries.latest.len() == LATEST_MAX {
            entries.latest.pop_front();
        }
        entries.latest.push_back(arrival);
    }

    pub fn duplicate(&self) {
        self.entries().duplicates += 1;
    }

    pub fn refused(&self, code: &'static str, now: Timestamp) {
        let mut entries = self.entries();
        *entries.refused.entry(code).or_default() += 1;
        entries.last_refused = Some((now, code));
        if !STRANGERS.contains(&code) {
            entries.last_mistaken = Some(code);
        }
    }

    /// A signature was right; `position` is that of its secret, from 0.
    pub fn verified(&self, position: usize, now: Timestamp) {
        self.entries().verified.entry(position).or_default().add(now);
    }

    /// The positions have a new meaning.
    pub fn secrets_replaced(&self) {
        self.entries().verified.clear();
    }

    pub fn snapshot(&self) -> Entries {
        self.entries().clone()
    }

    pub fn totals(&self) -> Totals {
        let entries = self.entries();
        let refused = entries.refused.values().sum();
        let strangers: u64 = STRANGERS.iter().filter_map(|code| entries.refused.get(code)).sum();
        Totals { accepted: entries.accepted + entries.duplicates, refused, mistaken: refused - strangers }
    }

    fn entries(&self) -> MutexGuard<'_, Entries> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Entries {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_does_not_grow_and_cuts_what_is_long() {
        let (journal, now) = (Journal::default(), Timestamp::now());
        for number in 0..2 * LATEST_MAX as u64 {
            let envelope =
                Envelope { event_type: format!("t{number}.{}", "ä".repeat(500)).into(), ..Envelope::default() };
            journal.accepted(number, Uuid::nil(), Some(&envelope), now);
        }
        journal.accepted(0, Uuid::nil(), None, now);
        let entries = journal.snapshot();
        assert_eq!((entries.latest.len(), entries.types.len()), (LATEST_MAX, TYPES_MAX));
        assert_eq!(entries.other_types.count, 2 * LATEST_MAX as u64 + 1 - TYPES_MAX as u64);
        assert!(entries.types.keys().all(|name| name.chars().count() <= TEXT_CHARS_MAX));
        assert_eq!(entries.latest.back().unwrap().event_type, None);
    }
}
