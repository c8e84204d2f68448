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

/// The settings of the dedupe window.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Zero: off.
    pub window: Duration,
    pub entries_max: usize,
}

/// How many signatures of one body are kept in mind: far more than Prism's retries.
const SIGNATURES_MAX: usize = 16;

/// A signature is checked before it waits for its turn here, and clocks are set by a little now and then: it is kept in
/// mind for a minute longer than it is good.
const MARGIN_MS: i64 = 60_000;

/// Twice the largest `signature.tolerance`. Were the clock set back by years, an entry would stay as long.
const REPLAYABLE_MAX: Duration = Duration::from_secs(2 * 24 * 3600);

/// Entries that there is room for from the start, at most, and those that a commit adds before the oldest go.
const ROOM_MAX: usize = 200_000;
const ROOM_BEYOND: usize = 2048;

/// An entry as it is on disk.
pub(super) struct Seen {
    pub seq: u64,
    pub fingerprint: Fingerprint,
    pub id: Uuid,
    /// Wall clock, in milliseconds since 1970.
    pub accepted_ms: i64,
    pub signatures: Signatures,
}

/// The signed requests that have carried a body: until when each of them could be replayed, in milliseconds since 1970, in
/// this order. That is its time of signing plus a constant, so it also tells one from the other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) enum Signatures {
    #[default]
    None,
    /// Nearly always.
    One(i64),
    Many(Box<[i64]>),
}

/// A hundred thousand entries are usual, so each is kept small, and only once.
pub(super) struct Window {
    length: Duration,
    entries_max: usize,
    /// Times are milliseconds since then.
    origin: Instant,
    /// In the order of acceptance, the oldest first.
    entries: VecDeque<Entry>,
    /// The latest acceptance of a body, by the beginning of its fingerprint. Should two bodies share that, only the later one
    /// is recognised.
    latest: HashMap<u64, u64>,
    /// What the transaction under way has changed, in its order.
    changes: Vec<Change>,
}

struct Entry {
    seq: u64,
    fingerprint: Fingerprint,
    id: Uuid,
    accepted_at: i64,
    /// When it is of no use any more.
    until: i64,
    signatures: Signatures,
}

enum Change {
    /// What was the latest acceptance before.
    Latest(u64, Option<u64>),
    Signatures(u64, Signatures),
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
        replayable_until_ms.map_or(Self::None, Self::One)
    }

    /// Eight bytes each, big-endian.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.as_slice().iter().flat_map(|until| until.to_be_bytes()).collect()
    }

    pub fn from_bytes(bytes: &[u8]) -> Self {
        let untils = bytes.chunks_exact(8).map(|until| i64::from_be_bytes(until.try_into().expect("eight bytes")));
        Self::from(untils.collect::<Vec<_>>())
    }

    /// With others that are still good, the newest ones if there are too many.
    fn merged(&self, others: &[i64], now_ms: i64) -> Self {
        let mut all = [self.as_slice(), others].concat();
        all.retain(|until| until.saturating_add(MARGIN_MS) >= now_ms);
        Self::from(all)
    }

    fn as_slice(&self) -> &[i64] {
        match self {
            Self::None => &[],
            Self::One(until) => std::slice::from_ref(until),
            Self::Many(untils) => untils,
        }
    }

    fn last(&self) -> Option<i64> {
        self.as_slice().last().copied()
    }
}

impl From<Vec<i64>> for Signatures {
    fn from(mut untils: Vec<i64>) -> Self {
        untils.sort_unstable();
        untils.dedup();
        untils.drain(..untils.len().saturating_sub(SIGNATURES_MAX));
        match untils[..] {
            [] => Self::None,
            [until] => Self::One(until),
            _ => Self::Many(untils.into()),
        }
    }
}

impl Window {
    pub fn new(length: Duration, entries_max: usize) -> Self {
        // Memory counts only once it is used; growing step by step would take half as much again for a while.
        let room = if length.is_zero() { 0 } else { entries_max.min(ROOM_MAX) + ROOM_BEYOND };
        Self {
            length,
            entries_max,
            origin: Instant::now(),
            entries: VecDeque::with_capacity(room),
            latest: HashMap::with_capacity(room),
            changes: Vec::new(),
        }
    }

    /// Whether there is a window at all.
    pub fn is_on(&self) -> bool {
        !self.length.is_zero()
    }

    /// Takes over what a former process has seen. An entry from the future counts as seen just now.
    pub fn load(&mut self, seen: Vec<Seen>, now: Now) {
        for Seen { seq, fingerprint, id, accepted_ms, signatures } in seen {
            let age = i64::max(0, now.wall_ms.saturating_sub(accepted_ms));
            let accepted_at = self.at(now.monotonic).saturating_sub(age);
            self.remember(Entry { seq, fingerprint, id, accepted_at, until: 0, signatures }, now);
        }
        // Not merely emptied: it has grown as large as the window.
        self.changes = Vec::new();
    }

    /// What was taken in is on disk.
    pub fn commit(&mut self) {
        self.changes.clear();
    }

    /// Whether this body is a repetition: it was accepted within the window, or the very same signed request was accepted
    /// before. The latter has been captured by somebody: Prism signs what it sends later with a later time.
    pub fn find(&self, fingerprint: &Fingerprint, replayable_until_ms: Option<i64>, now: Instant) -> Option<Found> {
        let entry = &self.entries[self.index(fingerprint)?];
        let recent = self.at(now).saturating_sub(entry.accepted_at) <= milliseconds(self.length);
        let known = replayable_until_ms.is_none_or(|until| entry.signatures.as_slice().contains(&until));
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
        let (accepted_at, signatures) = (self.at(now.monotonic), Signatures::of(replayable_until_ms));
        self.remember(Entry { seq, fingerprint, id, accepted_at, until: 0, signatures }, now)
    }

    /// A re-send of a known body came under a new signature, which could be captured as well. Returns the signatures to be
    /// kept in mind.
    pub fn signed_anew(
        &mut self,
        fingerprint: &Fingerprint,
        replayable_until_ms: i64,
        now: Now,
    ) -> Option<&Signatures> {
        let index = self.index(fingerprint)?;
        let signatures = self.entries[index].signatures.merged(&[replayable_until_ms], now.wall_ms);
        let until = self.until(self.entries[index].accepted_at, &signatures, now);
        let entry = &mut self.entries[index];
        entry.until = until;
        let before = std::mem::replace(&mut entry.signatures, signatures);
        self.changes.push(Change::Signatures(entry.seq, before));
        Some(&entry.signatures)
    }

    /// Takes back everything since the last commit, which was that of `seq`.
    pub fn undo_after(&mut self, seq: u64) {
        for change in std::mem::take(&mut self.changes).into_iter().rev() {
            match change {
                Change::Latest(key, Some(before)) => {
                    self.latest.insert(key, before);
                }
                Change::Latest(key, None) => {
                    self.latest.remove(&key);
                }
                Change::Signatures(seq, before) => {
                    if let Ok(index) = self.entries.binary_search_by_key(&seq, |entry| entry.seq) {
                        self.entries[index].signatures = before;
                    }
                }
            }
        }
        while self.entries.back().is_some_and(|last| last.seq > seq) {
            self.entries.pop_back();
        }
    }

    /// Drops what is of no use any more, or too much. Returns the last `seq` dropped, and whether an entry had to go that
    /// was still of use.
    pub fn purge(&mut self, now: Instant) -> Option<(u64, bool)> {
        let now = self.at(now);
        let mut purged = None;
        while let Some(oldest) = self.entries.front() {
            let (seq, of_use) = (oldest.seq, oldest.until > now);
            if of_use && self.entries.len() <= self.entries_max {
                break;
            }
            let key = key(&oldest.fingerprint);
            if self.latest.get(&key) == Some(&seq) {
                self.latest.remove(&key);
            }
            self.entries.pop_front();
            purged = Some((seq, of_use || purged.is_some_and(|(_, early)| early)));
        }
        purged
    }

    /// Of the latest acceptance of this body.
    fn index(&self, fingerprint: &Fingerprint) -> Option<usize> {
        let seq = self.latest.get(&key(fingerprint))?;
        let index = self.entries.binary_search_by_key(seq, |entry| entry.seq).ok()?;
        (self.entries[index].fingerprint == *fingerprint).then_some(index)
    }

    fn remember(&mut self, mut entry: Entry, now: Now) -> &Signatures {
        // The same body was accepted before, and that request can still be replayed, too.
        if let Some(before) = self.index(&entry.fingerprint) {
            entry.signatures = entry.signatures.merged(self.entries[before].signatures.as_slice(), now.wall_ms);
        }
        entry.until = self.until(entry.accepted_at, &entry.signatures, now);
        let key = key(&entry.fingerprint);
        let before = self.latest.insert(key, entry.seq);
        self.changes.push(Change::Latest(key, before));
        self.entries.push_back(entry);
        &self.entries.back().expect("just pushed").signatures
    }

    /// When an entry is of no use any more: its window has passed, and its signatures are too old.
    fn until(&self, accepted_at: i64, signatures: &Signatures, now: Now) -> i64 {
        let last = signatures.last().map_or(i64::MIN, |until| until.saturating_add(MARGIN_MS));
        let replayable = last.saturating_sub(now.wall_ms).clamp(0, milliseconds(REPLAYABLE_MAX));
        i64::max(accepted_at.saturating_add(milliseconds(self.length)), self.at(now.monotonic) + replayable)
    }

    /// In milliseconds since the origin; negative before.
    fn at(&self, time: Instant) -> i64 {
        match time.checked_duration_since(self.origin) {
            Some(after) => milliseconds(after),
            None => -milliseconds(self.origin - time),
        }
    }
}

fn milliseconds(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

/// The beginning of a fingerprint: SHA-256 has no better half.
fn key(fingerprint: &Fingerprint) -> u64 {
    u64::from_be_bytes(*fingerprint.0.first_chunk().expect("a fingerprint has 32 bytes"))
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
        assert!(window.latest.is_empty() && window.entries.is_empty());
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
        assert_eq!(Signatures::from_bytes(&signatures.to_bytes()), Signatures::from(vec![first, second]));
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
        assert_eq!((signatures.as_slice().len(), signatures.last()), (SIGNATURES_MAX, Some(at(start, 400).wall_ms)));
        // Accepted anew again and again, also by a process that has read all of it from the disk.
        let mut reopened = Window::new(120 * SECOND, 100);
        for seq in 1..=30 {
            let until = Some(at(start, 400 + seq).wall_ms);
            let signatures = window.insert(seq.into(), body(1), id(1), until, at(start, 0)).clone();
            assert!(signatures.as_slice().len() <= SIGNATURES_MAX && signatures.last() == until, "the new one is kept");
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
