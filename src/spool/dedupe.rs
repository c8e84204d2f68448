//! The dedupe window: which bodies were accepted lately, and under which id. In memory, bounded, pure; takes `now`.
//!
//! It is longer than its length where a signature is: a signed request that somebody has captured is recognised for as
//! long as its signature would be accepted.
//!
//! Ages are measured with the monotonic clock, so a jump of the wall clock neither stretches nor cuts the window.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use uuid::Uuid;

use crate::event::Fingerprint;

/// How many signatures of one body are kept in mind: far more than Prism's retries.
const SIGNATURES_MAX: usize = 16;

/// A signature is checked before it waits for its turn here, and clocks are set by a little now and then: it is kept in
/// mind for a minute longer than it is good.
const MARGIN_MS: i64 = 60_000;

/// Twice the largest `signature.tolerance`. Were the clock set back by years, an entry would stay as long.
const REPLAYABLE_MAX: Duration = Duration::from_secs(2 * 24 * 3600);

/// An entry as it is on disk.
pub(super) struct Seen {
    pub seq: u64,
    pub fingerprint: Fingerprint,
    pub id: Uuid,
    /// Wall clock, in milliseconds since 1970.
    pub accepted_ms: i64,
    pub signatures: Signatures,
}

/// The signed requests that have carried a body: until when each of them could be replayed, in milliseconds since 1970.
/// That is its time of signing plus a constant, so it also tells one from the other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Signatures(Vec<i64>);

pub(super) struct Window {
    length: Duration,
    entries_max: usize,
    by_fingerprint: HashMap<Fingerprint, Entry>,
    /// In the order of acceptance, the oldest first.
    order: VecDeque<Remembered>,
    /// What the transaction under way has replaced, in its order; `None`: there was nothing.
    replaced: Vec<(Fingerprint, Option<Entry>)>,
}

/// The latest acceptance of a body.
#[derive(Clone)]
struct Entry {
    seq: u64,
    id: Uuid,
    accepted_at: Instant,
    signatures: Signatures,
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
    /// Sent again under a new signature, which is to be kept in mind.
    pub signed_anew: bool,
}

/// Both clocks at the same instant: the wall clock in milliseconds since 1970, and the monotonic one.
#[derive(Clone, Copy)]
pub(super) struct Now {
    pub wall_ms: i64,
    pub monotonic: Instant,
}

impl Now {
    pub fn read() -> Self {
        Self { wall_ms: Timestamp::now().as_millisecond(), monotonic: Instant::now() }
    }
}

impl Signatures {
    pub fn of(replayable_until_ms: Option<i64>) -> Self {
        Self(replayable_until_ms.into_iter().collect())
    }

    /// Eight bytes each, big-endian.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.0.iter().flat_map(|until| until.to_be_bytes()).collect()
    }

    pub fn from_bytes(bytes: &[u8]) -> Self {
        Self(bytes.chunks_exact(8).map(|until| i64::from_be_bytes(until.try_into().expect("eight bytes"))).collect())
    }

    /// Takes in the signatures that are still good, the newest ones if there are too many.
    fn merge(&mut self, others: &[i64], now_ms: i64) {
        self.0.extend_from_slice(others);
        self.0.retain(|until| until.saturating_add(MARGIN_MS) >= now_ms);
        self.0.sort_unstable();
        self.0.dedup();
        let surplus = self.0.len().saturating_sub(SIGNATURES_MAX);
        self.0.drain(..surplus);
    }

    fn last(&self) -> Option<i64> {
        self.0.last().copied()
    }
}

impl Window {
    pub fn new(length: Duration, entries_max: usize) -> Self {
        Self { length, entries_max, by_fingerprint: HashMap::new(), order: VecDeque::new(), replaced: Vec::new() }
    }

    /// Whether there is a window at all.
    pub fn is_on(&self) -> bool {
        !self.length.is_zero()
    }

    /// Takes over what a former process has seen. An entry from the future counts as seen just now.
    pub fn load(&mut self, seen: Vec<Seen>, now: Now) {
        for entry in seen {
            let age = Duration::from_millis(u64::try_from(now.wall_ms - entry.accepted_ms).unwrap_or(0));
            if let Some(accepted_at) = now.monotonic.checked_sub(age) {
                self.remember(entry.seq, entry.fingerprint, entry.id, accepted_at, entry.signatures, now);
            }
        }
        // Not merely emptied: it has grown as large as the window.
        self.replaced = Vec::new();
    }

    /// What was taken in is on disk.
    pub fn commit(&mut self) {
        self.replaced.clear();
    }

    /// Whether this body is a repetition: it was accepted within the window, or the very same signed request was accepted
    /// before. The latter has been captured by somebody: Prism signs what it sends later with a later time.
    pub fn find(&self, fingerprint: &Fingerprint, replayable_until_ms: Option<i64>, now: Instant) -> Option<Found> {
        let entry = self.by_fingerprint.get(fingerprint)?;
        let recent = now.saturating_duration_since(entry.accepted_at) <= self.length;
        let known = replayable_until_ms.is_none_or(|until| entry.signatures.0.contains(&until));
        let replayed = known && replayable_until_ms.is_some();
        (recent || replayed).then_some(Found { seq: entry.seq, id: entry.id, signed_anew: !known })
    }

    /// Returns the signatures to be kept in mind.
    pub fn insert(
        &mut self,
        seq: u64,
        fingerprint: Fingerprint,
        id: Uuid,
        replayable_until_ms: Option<i64>,
        now: Now,
    ) -> &Signatures {
        self.remember(seq, fingerprint, id, now.monotonic, Signatures::of(replayable_until_ms), now)
    }

    /// A re-send of a known body came under a new signature, which could be captured as well. Returns the signatures to be
    /// kept in mind.
    pub fn signed_anew(
        &mut self,
        fingerprint: &Fingerprint,
        replayable_until_ms: i64,
        now: Now,
    ) -> Option<&Signatures> {
        let entry = self.by_fingerprint.get_mut(fingerprint)?;
        self.replaced.push((*fingerprint, Some(entry.clone())));
        entry.signatures.merge(&[replayable_until_ms], now.wall_ms);
        let until = until(entry, self.length, now);
        if let Ok(index) = self.order.binary_search_by_key(&entry.seq, |remembered| remembered.seq) {
            self.order[index].until = until;
        }
        Some(&entry.signatures)
    }

    /// Takes back everything since the last commit, which was that of `seq`.
    pub fn undo_after(&mut self, seq: u64) {
        while self.order.back().is_some_and(|last| last.seq > seq) {
            self.order.pop_back();
        }
        for (fingerprint, before) in std::mem::take(&mut self.replaced).into_iter().rev() {
            match before {
                Some(entry) => self.by_fingerprint.insert(fingerprint, entry),
                None => self.by_fingerprint.remove(&fingerprint),
            };
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

    fn remember(
        &mut self,
        seq: u64,
        fingerprint: Fingerprint,
        id: Uuid,
        accepted_at: Instant,
        mut signatures: Signatures,
        now: Now,
    ) -> &Signatures {
        // The same body was accepted before, and that request can still be replayed, too.
        let before = self.by_fingerprint.get(&fingerprint);
        if let Some(before) = before {
            signatures.merge(&before.signatures.0, now.wall_ms);
        }
        self.replaced.push((fingerprint, before.cloned()));
        let entry = Entry { seq, id, accepted_at, signatures };
        self.order.push_back(Remembered { seq, fingerprint, until: until(&entry, self.length, now) });
        &self.by_fingerprint.entry(fingerprint).insert_entry(entry).into_mut().signatures
    }

    fn remove(&mut self, seq: u64, fingerprint: &Fingerprint) {
        if self.by_fingerprint.get(fingerprint).is_some_and(|latest| latest.seq == seq) {
            self.by_fingerprint.remove(fingerprint);
        }
    }
}

/// When an entry is of no use any more: its window has passed, and its signatures are too old.
fn until(entry: &Entry, length: Duration, now: Now) -> Instant {
    let last = entry.signatures.last().map(|until| until.saturating_add(MARGIN_MS));
    let replayable_ms = last.map_or(0, |until| until.saturating_sub(now.wall_ms));
    let replayable = Duration::from_millis(u64::try_from(replayable_ms).unwrap_or(0)).min(REPLAYABLE_MAX);
    (entry.accepted_at + length).max(now.monotonic + replayable)
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

    fn at(start: Instant, seconds: u32) -> Now {
        Now { wall_ms: 1_000_000 + i64::from(seconds) * 1000, monotonic: start + seconds * SECOND }
    }

    /// A window that saw `count` unsigned bodies at `start`, numbered from 1.
    fn window(entries_max: usize, count: u8, start: Instant) -> Window {
        let mut window = Window::new(120 * SECOND, entries_max);
        for n in 1..=count {
            window.insert(n.into(), body(n), id(n), None, at(start, 0));
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
        let mut window = window(10, 1, start);
        window.commit();
        window.insert(2, body(2), id(2), None, at(start, 0));
        window.undo_after(1);
        assert_eq!((found(&window, 1, start), found(&window, 2, start)), (Some(id(1)), None));
    }

    #[test]
    fn a_captured_request_is_recognised_for_as_long_as_its_signature_is_good() {
        let start = Instant::now();
        let at = |seconds| at(start, seconds);
        let find = |window: &Window, until, seconds| {
            window.find(&body(1), Some(until), at(seconds).monotonic).map(|found| (found.seq, found.signed_anew))
        };
        let mut window = Window::new(120 * SECOND, 10);
        // By a clock that is ahead: good for ten minutes from now on.
        let first = at(600).wall_ms;
        window.insert(1, body(1), id(1), Some(first), at(0));
        // A re-send within the window has a signature of its own, and could be captured as well.
        let second = at(630).wall_ms;
        assert_eq!(find(&window, second, 30), Some((1, true)));
        let signatures = window.signed_anew(&body(1), second, at(30)).unwrap();
        assert_eq!(Signatures::from_bytes(&signatures.to_bytes()), Signatures(vec![first, second]));
        assert_eq!((find(&window, first, 599), find(&window, second, 629)), (Some((1, false)), Some((1, false))));
        assert_eq!(window.purge(at(689).monotonic), None, "a minute longer than it is good");
        // What is signed at another time was sent anew, also by a clock that was set back.
        let (later, earlier) = (at(700).wall_ms, at(500).wall_ms);
        assert_eq!((find(&window, later, 200), find(&window, earlier, 200)), (None, None));
        window.insert(2, body(1), id(2), Some(later), at(200));
        assert_eq!([first, second, later].map(|until| find(&window, until, 599)), [Some((2, false)); 3]);
        assert_eq!(window.purge(at(761).monotonic), Some((2, false)));
    }

    #[test]
    fn a_failed_commit_gives_back_what_it_had_replaced() {
        let start = Instant::now();
        let at = |seconds| at(start, seconds);
        let find = |window: &Window, until, seconds| {
            window.find(&body(1), Some(until), at(seconds).monotonic).map(|found| (found.id, found.signed_anew))
        };
        let mut window = Window::new(120 * SECOND, 10);
        let [first, second, third] = [300, 430, 500].map(|seconds| at(seconds).wall_ms);
        window.insert(1, body(1), id(1), Some(first), at(0));
        window.commit();
        window.insert(2, body(1), id(2), Some(second), at(130));
        window.signed_anew(&body(1), third, at(131));
        window.undo_after(1);
        assert_eq!([first, second, third].map(|until| find(&window, until, 200)), [Some((id(1), false)), None, None]);
    }

    #[test]
    fn a_body_has_only_so_many_signatures() {
        let start = Instant::now();
        let mut window = Window::new(120 * SECOND, 10);
        window.insert(1, body(1), id(1), Some(at(start, 300).wall_ms), at(start, 0));
        for seconds in 1..100 {
            window.signed_anew(&body(1), at(start, 300 + seconds).wall_ms, at(start, 0));
        }
        let signatures = window.signed_anew(&body(1), at(start, 400).wall_ms, at(start, 0)).unwrap();
        assert_eq!((signatures.0.len(), signatures.last()), (SIGNATURES_MAX, Some(at(start, 400).wall_ms)));
        // Accepted anew again and again, also by a process that has read all of it from the disk.
        let mut reopened = Window::new(120 * SECOND, 100);
        for seq in 1..=30 {
            let until = Some(at(start, 400 + seq).wall_ms);
            let signatures = window.insert(seq.into(), body(1), id(1), until, at(start, 0)).clone();
            assert!(signatures.0.len() <= SIGNATURES_MAX && signatures.last() == until, "the new one is kept");
            let seen = Seen { seq: seq.into(), fingerprint: body(1), id: id(1), accepted_ms: 0, signatures };
            reopened.load(vec![seen], at(start, 0));
        }
        let last = Some(at(start, 430).wall_ms);
        assert!(reopened.find(&body(1), last, at(start, 400).monotonic).is_some_and(|found| !found.signed_anew));
    }

    #[test]
    fn loading_keeps_the_ages_and_survives_a_clock_that_went_back() {
        let monotonic = Instant::now() + Duration::from_secs(1000);
        let seen = |seq, accepted_ms, replayable_until_ms| {
            let (fingerprint, id, signatures) = (body(seq as u8), id(seq as u8), Signatures::of(replayable_until_ms));
            Seen { seq, fingerprint, id, accepted_ms, signatures }
        };
        let mut window = Window::new(120 * SECOND, 10);
        let entries = [seen(1, 0, None), seen(2, 100_000, None), seen(3, 900_000, None), seen(4, 0, Some(500_000))];
        window.load(entries.into(), Now { wall_ms: 200_000, monotonic });
        window.purge(monotonic);
        assert_eq!([1, 2, 3].map(|n| found(&window, n, monotonic).is_some()), [false, true, true]);
        assert_eq!(found(&window, 3, monotonic + 121 * SECOND), None);
        assert!(
            window.find(&body(4), Some(500_000), monotonic + 299 * SECOND).is_some(),
            "replayable, though long ago"
        );
    }
}
