//! The dedupe window: which bodies were accepted lately, and under which id. In memory, bounded, pure; takes `now`.
//!
//! It is longer than its length where a signature is: a signed request that somebody has captured is recognised for as
//! long as its signature would be accepted.
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
    /// Until when the signed request could be replayed; `None` if it was not signed. Milliseconds since 1970.
    pub replayable_until_ms: Option<i64>,
}

pub(super) struct Window {
    length: Duration,
    entries_max: usize,
    by_fingerprint: HashMap<Fingerprint, Entry>,
    /// In the order of acceptance, the oldest first.
    order: VecDeque<Remembered>,
}

/// The latest acceptance of a body.
struct Entry {
    seq: u64,
    id: Uuid,
    accepted_at: Instant,
    replayable_until_ms: Option<i64>,
}

#[derive(Clone, Copy)]
struct Remembered {
    seq: u64,
    fingerprint: Fingerprint,
    /// When it is of no use any more.
    until: Instant,
}

/// A body that was accepted before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Found {
    pub seq: u64,
    pub id: Uuid,
    /// The new request can be replayed for longer than those before: to be kept in mind.
    pub extended: bool,
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
            if let Some(accepted_at) = now.checked_sub(age) {
                let until = self.until(accepted_at, entry.replayable_until_ms, now_ms, now);
                self.remember(entry.seq, entry.fingerprint, entry.id, accepted_at, entry.replayable_until_ms, until);
            }
        }
    }

    /// Whether this body is a repetition: it was accepted within the window, or it was signed no later than one that was.
    /// The latter is a request that somebody has captured and sends again; Prism signs what it sends later with a later
    /// time.
    pub fn find(&self, fingerprint: &Fingerprint, replayable_until_ms: Option<i64>, now: Instant) -> Option<Found> {
        let entry = self.by_fingerprint.get(fingerprint)?;
        let recent = now.saturating_duration_since(entry.accepted_at) <= self.length;
        let replayed = replayable_until_ms.is_some_and(|until| entry.replayable_until_ms >= Some(until));
        let extended = replayable_until_ms > entry.replayable_until_ms;
        (recent || replayed).then_some(Found { seq: entry.seq, id: entry.id, extended })
    }

    /// `now_ms` is the wall clock, `now` the monotonic one, of the same instant.
    pub fn insert(
        &mut self,
        seq: u64,
        fingerprint: Fingerprint,
        id: Uuid,
        replayable_until_ms: Option<i64>,
        (now_ms, now): (i64, Instant),
    ) {
        let until = self.until(now, replayable_until_ms, now_ms, now);
        self.remember(seq, fingerprint, id, now, replayable_until_ms, until);
    }

    /// A re-send of a known body came with a later signature, which could be captured as well.
    pub fn extend(
        &mut self,
        fingerprint: Fingerprint,
        replayable_until_ms: Option<i64>,
        (now_ms, now): (i64, Instant),
    ) {
        let Some(entry) = self.by_fingerprint.get_mut(&fingerprint) else { return };
        entry.replayable_until_ms = entry.replayable_until_ms.max(replayable_until_ms);
        let (seq, accepted_at) = (entry.seq, entry.accepted_at);
        let until = self.until(accepted_at, replayable_until_ms, now_ms, now);
        if let Ok(index) = self.order.binary_search_by_key(&seq, |remembered| remembered.seq) {
            self.order[index].until = self.order[index].until.max(until);
        }
    }

    /// Takes back everything after `seq`, whose commit has failed.
    pub fn undo_after(&mut self, seq: u64) {
        while self.order.back().is_some_and(|last| last.seq > seq) {
            let last = self.order.pop_back().expect("there is a last entry");
            self.remove(last.seq, &last.fingerprint);
        }
    }

    /// Drops what is of no use any more, or too much. Returns the last `seq` dropped, and whether an entry had to go that
    /// was still of use.
    pub fn purge(&mut self, now: Instant) -> Option<(u64, bool)> {
        let mut purged = None;
        while let Some(oldest) = self.order.front().copied() {
            let of_use = oldest.until > now;
            if of_use && self.order.len() <= self.entries_max {
                break;
            }
            self.order.pop_front();
            self.remove(oldest.seq, &oldest.fingerprint);
            purged = Some((oldest.seq, of_use || purged.is_some_and(|(_, early)| early)));
        }
        purged
    }

    /// When an entry is of no use any more: its window has passed, and its signature is too old.
    fn until(&self, accepted_at: Instant, replayable_until_ms: Option<i64>, now_ms: i64, now: Instant) -> Instant {
        let replayable_ms = replayable_until_ms.map_or(0, |until| until.saturating_sub(now_ms));
        let replayable = Duration::from_millis(u64::try_from(replayable_ms).unwrap_or(0));
        // The tolerance is a day at most, so nothing overflows.
        (accepted_at + self.length).max(now + replayable)
    }

    fn remember(
        &mut self,
        seq: u64,
        fingerprint: Fingerprint,
        id: Uuid,
        accepted_at: Instant,
        replayable_until_ms: Option<i64>,
        until: Instant,
    ) {
        // The same body was accepted before, and that request can still be replayed, too.
        let before = self.by_fingerprint.get(&fingerprint).and_then(|entry| entry.replayable_until_ms);
        let replayable_until_ms = replayable_until_ms.max(before);
        self.by_fingerprint.insert(fingerprint, Entry { seq, id, accepted_at, replayable_until_ms });
        self.order.push_back(Remembered { seq, fingerprint, until });
    }

    fn remove(&mut self, seq: u64, fingerprint: &Fingerprint) {
        if self.by_fingerprint.get(fingerprint).is_some_and(|latest| latest.seq == seq) {
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

    /// A window that saw `count` unsigned bodies at `start`, numbered from 1.
    fn window(entries_max: usize, count: u8, start: Instant) -> Window {
        let mut window = Window::new(120 * SECOND, entries_max);
        for n in 1..=count {
            window.insert(n.into(), body(n), id(n), None, (0, start));
        }
        window
    }

    fn found(window: &Window, n: u8, now: Instant) -> Option<Uuid> {
        window.find(&body(n), None, now).map(|found| found.id)
    }

    #[test]
    fn finds_the_first_id_until_the_window_has_passed() {
        let start = Instant::now();
        let mut window = window(10, 1, start);
        let end = start + 120 * SECOND;
        assert_eq!(found(&window, 1, end), Some(id(1)));
        assert_eq!(found(&window, 1, end + SECOND), None, "also before it is purged");
        assert_eq!(window.purge(end - SECOND), None);
        assert_eq!(window.purge(end + SECOND), Some((1, false)));
        assert!(window.by_fingerprint.is_empty());
    }

    #[test]
    fn the_newest_entries_win() {
        let start = Instant::now();
        let mut window = window(2, 5, start);
        assert_eq!(window.purge(start), Some((3, true)));
        assert_eq!([3, 4, 5].map(|n| found(&window, n, start).is_some()), [false, true, true]);
    }

    #[test]
    fn a_failed_commit_is_forgotten() {
        let start = Instant::now();
        let mut window = window(10, 2, start);
        window.undo_after(1);
        assert_eq!((found(&window, 1, start), found(&window, 2, start)), (Some(id(1)), None));
    }

    #[test]
    fn a_captured_request_is_recognised_for_as_long_as_its_signature_is_valid() {
        let (start, now_ms) = (Instant::now(), 1_000_000);
        let at = |seconds: u32| start + seconds * SECOND;
        let mut window = Window::new(120 * SECOND, 10);
        // Signed by a clock that is ahead: valid for ten minutes from now on.
        let until = Some(now_ms + 600_000);
        window.insert(1, body(1), id(1), until, (now_ms, start));
        let captured = window.find(&body(1), until, at(599));
        assert_eq!(captured, Some(Found { seq: 1, id: id(1), extended: false }));
        assert_eq!(window.find(&body(1), Some(now_ms + 700_000), at(121)), None, "signed later: sent anew");
        assert_eq!(window.purge(at(599)), None);
        // A re-send within the window had a later signature, and could be captured as well.
        let later = Some(now_ms + 630_000);
        assert!(window.find(&body(1), later, at(30)).unwrap().extended);
        window.extend(body(1), later, (now_ms + 30_000, at(30)));
        assert_eq!(window.purge(at(629)), None);
        assert!(window.find(&body(1), later, at(629)).is_some_and(|found| !found.extended));
        assert_eq!(window.purge(at(630)), Some((1, false)));
    }

    #[test]
    fn loading_keeps_the_ages_and_survives_a_clock_that_went_back() {
        let now = Instant::now() + Duration::from_secs(1000);
        let seen = |seq, accepted_ms, replayable_until_ms| {
            let (fingerprint, id) = (body(seq as u8), id(seq as u8));
            Seen { seq, fingerprint, id, accepted_ms, replayable_until_ms }
        };
        let mut window = Window::new(120 * SECOND, 10);
        let entries = [seen(1, 0, None), seen(2, 100_000, None), seen(3, 900_000, None), seen(4, 0, Some(500_000))];
        window.load(entries.into(), 200_000, now);
        window.purge(now);
        assert_eq!([1, 2, 3].map(|n| found(&window, n, now).is_some()), [false, true, true]);
        assert_eq!(found(&window, 3, now + 121 * SECOND), None);
        assert!(window.find(&body(4), Some(500_000), now + 299 * SECOND).is_some(), "replayable, though long ago");
    }
}
