//! The dedupe window: which bodies were accepted lately, and under which id. In memory, bounded, pure; takes `now`.
//!
//! Ages are measured with the monotonic clock, so a jump of the wall clock neither stretches nor cuts the window.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use uuid::Uuid;

use crate::event::Fingerprint;

/// An entry as it is on disk.
pub(super) struct Seen {
    pub seq: u64,
    pub fingerprint: Fingerprint,
    pub id: Uuid,
    /// Wall clock, in milliseconds since 1970.
    pub accepted_ms: i64,
}

pub(super) struct Window {
    length: Duration,
    entries_max: usize,
    by_fingerprint: HashMap<Fingerprint, (u64, Uuid)>,
    /// In the order of acceptance, the oldest first.
    order: VecDeque<(u64, Fingerprint, Instant)>,
}

impl Window {
    pub fn new(length: Duration, entries_max: usize) -> Self {
        Self { length, entries_max, by_fingerprint: HashMap::new(), order: VecDeque::new() }
    }

    /// Whether there is a window at all.
    pub fn is_on(&self) -> bool {
        !self.length.is_zero()
    }

    /// Takes over what a former process has seen. An entry from the future counts as seen just now.
    pub fn load(&mut self, seen: Vec<Seen>, now_ms: i64, now: Instant) {
        for entry in seen {
            let age = Duration::from_millis(u64::try_from(now_ms - entry.accepted_ms).unwrap_or(0));
            if let Some(at) = now.checked_sub(age) {
                self.insert(entry.seq, entry.fingerprint, entry.id, at);
            }
        }
    }

    /// The id under which this body was accepted within the window.
    pub fn find(&self, fingerprint: &Fingerprint) -> Option<Uuid> {
        self.by_fingerprint.get(fingerprint).map(|(_, id)| *id)
    }

    pub fn insert(&mut self, seq: u64, fingerprint: Fingerprint, id: Uuid, now: Instant) {
        self.by_fingerprint.insert(fingerprint, (seq, id));
        self.order.push_back((seq, fingerprint, now));
    }

    /// Takes back everything after `seq`, whose commit has failed.
    pub fn undo_after(&mut self, seq: u64) {
        while self.order.back().is_some_and(|(last, _, _)| *last > seq) {
            let (last, fingerprint, _) = self.order.pop_back().expect("there is a last entry");
            self.remove(last, &fingerprint);
        }
    }

    /// Drops what is too old or too much. Returns the last `seq` dropped.
    pub fn purge(&mut self, now: Instant) -> Option<u64> {
        let mut purged = None;
        while let Some((seq, fingerprint, at)) = self.order.front().copied() {
            if self.order.len() <= self.entries_max && now.saturating_duration_since(at) <= self.length {
                break;
            }
            self.order.pop_front();
            self.remove(seq, &fingerprint);
            purged = Some(seq);
        }
        purged
    }

    fn remove(&mut self, seq: u64, fingerprint: &Fingerprint) {
        if self.by_fingerprint.get(fingerprint).is_some_and(|(latest, _)| *latest == seq) {
            self.by_fingerprint.remove(fingerprint);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn body(n: u8) -> Fingerprint {
        Fingerprint([n; 32])
    }

    fn id(n: u8) -> Uuid {
        Uuid::from_bytes([n; 16])
    }

    #[test]
    fn finds_the_first_id_until_the_window_has_passed() {
        let start = Instant::now();
        let mut window = Window::new(120 * SECOND, 10);
        window.insert(1, body(1), id(1), start);
        assert_eq!(window.purge(start + 120 * SECOND), None);
        assert_eq!(window.find(&body(1)), Some(id(1)));
        assert_eq!(window.purge(start + 121 * SECOND), Some(1));
        assert_eq!(window.find(&body(1)), None);
    }

    #[test]
    fn the_newest_entries_win() {
        let start = Instant::now();
        let mut window = Window::new(120 * SECOND, 2);
        for n in 1..=5 {
            window.insert(n.into(), body(n), id(n), start);
        }
        assert_eq!(window.purge(start), Some(3));
        assert_eq!([3, 4, 5].map(|n| window.find(&body(n)).is_some()), [false, true, true]);
    }

    #[test]
    fn a_failed_commit_is_forgotten() {
        let start = Instant::now();
        let mut window = Window::new(120 * SECOND, 10);
        window.insert(1, body(1), id(1), start);
        window.insert(2, body(2), id(2), start);
        window.undo_after(1);
        assert_eq!((window.find(&body(1)), window.find(&body(2))), (Some(id(1)), None));
    }

    #[test]
    fn loading_keeps_the_ages_and_survives_a_clock_that_went_back() {
        let now = Instant::now() + Duration::from_secs(1000);
        let seen = |seq, accepted_ms| Seen { seq, fingerprint: body(seq as u8), id: id(seq as u8), accepted_ms };
        let mut window = Window::new(120 * SECOND, 10);
        window.load(vec![seen(1, 0), seen(2, 100_000), seen(3, 900_000)], 200_000, now);
        window.purge(now);
        assert_eq!([1, 2, 3].map(|n| window.find(&body(n)).is_some()), [false, true, true]);
        window.purge(now + 121 * SECOND);
        assert_eq!(window.find(&body(3)), None);
    }
}
