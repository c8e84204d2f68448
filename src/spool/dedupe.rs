//! The dedupe window: which bodies and which signed requests were accepted recently, and under which id. In memory,
//! bounded, pure; takes `now`.
//!
//! A body is remembered for the length of the window. Signed requests are remembered until their signature expires,
//! even after the window has passed, because a captured request can be replayed until then.
//!
//! Ages are measured with the monotonic clock, so a jump of the wall clock neither stretches nor cuts the window.

use std::collections::{HashMap, VecDeque};
use std::num::NonZeroI64;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use uuid::Uuid;

use super::types::Receipt;
use crate::event::{Event, Fingerprint};

/// The settings of the dedupe window.
#[derive(Clone, Debug)]
pub struct Settings {
    /// How long an accepted body is remembered; zero: not at all.
    pub window: Duration,
    /// Maximum number of requests to remember; the newest win.
    pub entries_max: usize,
}

/// How much longer than its signature is valid a request is remembered: a signature is checked before the request waits
/// for its commit, and clocks are corrected by a little now and then.
const MARGIN_MS: i64 = 60_000;

/// Maximum time for which a signature keeps an entry: twice the largest `signature.tolerance`. Without a limit, a clock
/// set back by years would keep entries for years.
const REPLAYABLE_MS_MAX: i64 = 2 * 24 * 3_600_000;

/// Maximum number of entries to allocate room for at the start, and how many more a commit may add before the oldest
/// are dropped.
const ROOM_MAX: usize = 200_000;
const ROOM_BEYOND: usize = 2048;

/// An entry as it is on disk, big-endian: the number of the first acceptance (8 bytes), the key of the body (16), the
/// id (16), when it was accepted (8) and when the signature expires (8), both in milliseconds since 1970; 0: unsigned.
pub(super) type EntryBytes = [u8; 56];

/// Half of a body's SHA-256: enough to distinguish bodies, in half the memory.
type BodyKey = [u8; 16];

/// Entries in the order of acceptance, and where the latest one of each body and of each signed request is. A re-send
/// under another signature is an entry of its own, with the number and id of the first acceptance.
///
/// 100,000 entries take 11 MB: 64 bytes for each, and two maps of 131,072 places of 17 bytes.
pub(super) struct Window {
    length_ms: i64,
    entries_max: usize,
    /// The instant from which the times of entries count, in milliseconds.
    origin: Instant,
    /// The entries, numbered one by one, the oldest first.
    entries: VecDeque<Entry>,
    /// The number of the oldest entry.
    first: u64,
    bodies: HashMap<u64, u64>,
    requests: HashMap<u64, u64>,
    /// The entries of the transaction in progress.
    uncommitted: Vec<EntryBytes>,
}

struct Entry {
    seq: u64,
    body: BodyKey,
    id: Uuid,
    accepted_at: i64,
    replayable_until_ms: Option<NonZeroI64>,
    /// When the entry can be dropped.
    expires_at: i64,
}

/// What [`Window::purge`] dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Purged {
    /// The number of the last entry dropped.
    pub last: u64,
    /// Whether an entry was dropped that had not expired.
    pub early: bool,
}

/// Both clocks at the same instant: the wall clock in milliseconds since 1970, and the monotonic one.
#[derive(Clone, Copy)]
pub(super) struct Now {
    pub wall_ms: i64,
    pub monotonic: Instant,
}

impl Now {
    pub(super) fn read() -> Self {
        Self { wall_ms: Timestamp::now().as_millisecond(), monotonic: Instant::now() }
    }
}

impl Entry {
    fn body_key(&self) -> u64 {
        u64::from_be_bytes(piece(&self.body, 0))
    }

    /// Identifies the signed request: the time of signing plus a constant, mixed with the hash of the body.
    fn request_key(&self) -> Option<u64> {
        self.replayable_until_ms.map(|until| self.body_key() ^ until.get().cast_unsigned())
    }

    fn to_bytes(&self, accepted_ms: i64) -> EntryBytes {
        let mut bytes = [0; _];
        bytes[..8].copy_from_slice(&self.seq.to_be_bytes());
        bytes[8..24].copy_from_slice(&self.body);
        bytes[24..40].copy_from_slice(self.id.as_bytes());
        bytes[40..48].copy_from_slice(&accepted_ms.to_be_bytes());
        bytes[48..].copy_from_slice(&self.replayable_until_ms.map_or(0, NonZeroI64::get).to_be_bytes());
        bytes
    }
}

/// The entry of an event whose signature is not known.
pub(super) fn entry_of_event(seq: u64, fingerprint: &Fingerprint, id: Uuid, accepted_ms: i64) -> EntryBytes {
    let body = piece(&fingerprint.0, 0);
    Entry { seq, body, id, accepted_at: 0, replayable_until_ms: None, expires_at: 0 }.to_bytes(accepted_ms)
}

/// The number of the event that an entry is about.
pub(super) fn seq_of(entry: &EntryBytes) -> u64 {
    u64::from_be_bytes(piece(entry, 0))
}

/// When the event of an entry was accepted, in milliseconds since 1970.
pub(super) fn accepted_ms_of(entry: &EntryBytes) -> i64 {
    i64::from_be_bytes(piece(entry, 40))
}

impl Window {
    pub(super) fn new(settings: &Settings) -> Self {
        // Memory counts only once it is used; growing step by step would take half as much again for a while.
        let room = if settings.window.is_zero() { 0 } else { settings.entries_max.min(ROOM_MAX) + ROOM_BEYOND };
        Self {
            length_ms: milliseconds(settings.window),
            entries_max: settings.entries_max,
            origin: Instant::now(),
            entries: VecDeque::with_capacity(room),
            first: 1,
            bodies: HashMap::with_capacity(room),
            requests: HashMap::with_capacity(room),
            uncommitted: Vec::new(),
        }
    }

    pub(super) fn is_on(&self) -> bool {
        self.length_ms > 0
    }

    /// Takes over the entries of an earlier process; `last` is the number of the last one. An entry from the future
    /// counts as accepted just now.
    pub(super) fn load(&mut self, entries: &[EntryBytes], last: u64, now: Now) {
        self.first = last + 1 - entries.len() as u64;
        for bytes in entries {
            let age = i64::max(0, now.wall_ms.saturating_sub(accepted_ms_of(bytes)));
            let entry = Entry {
                seq: seq_of(bytes),
                body: piece(bytes, 8),
                id: Uuid::from_bytes(piece(bytes, 24)),
                accepted_at: self.at(now.monotonic).saturating_sub(age),
                replayable_until_ms: NonZeroI64::new(i64::from_be_bytes(piece(bytes, 48))),
                expires_at: 0,
            };
            self.push(entry, now);
        }
    }

    /// The receipt of the first acceptance, if this is a re-send: the body was accepted within the window, or the very
    /// same signed request was accepted before. The latter was captured: Prism signs what it sends later with a later
    /// time. Remembers the signature of a re-send.
    pub(super) fn recognise(&mut self, event: &Event, replayable_until_ms: Option<i64>, now: Now) -> Option<Receipt> {
        let mut entry = self.entry(0, event, replayable_until_ms, now);
        let known = |map: &HashMap<u64, u64>, key| {
            let index = usize::try_from(map.get(&key)? - self.first).ok()?;
            self.entries.get(index).filter(|known| known.body == entry.body)
        };
        let replayed = entry.request_key().and_then(|key| known(&self.requests, key));
        let recent = |known: &&Entry| entry.accepted_at.saturating_sub(known.accepted_at) <= self.length_ms;
        let first = replayed.or_else(|| known(&self.bodies, entry.body_key()).filter(recent))?;
        let receipt = Receipt { seq: first.seq, id: first.id, duplicate: true };
        let is_signed_again = replayed.is_none() && entry.replayable_until_ms.is_some();
        (entry.seq, entry.id, entry.accepted_at) = (first.seq, first.id, first.accepted_at);
        if is_signed_again {
            self.add(entry, now);
        }
        Some(receipt)
    }

    /// Remembers an accepted event.
    pub(super) fn insert(&mut self, seq: u64, event: &Event, replayable_until_ms: Option<i64>, now: Now) {
        self.insert_as(seq, event.id, event, replayable_until_ms, now);
    }

    /// Remembers the body and the signature of an event as those of another one.
    pub(super) fn insert_as(&mut self, seq: u64, id: Uuid, event: &Event, replayable_until_ms: Option<i64>, now: Now) {
        if self.is_on() {
            let entry = Entry { id, ..self.entry(seq, event, replayable_until_ms, now) };
            self.add(entry, now);
        }
    }

    /// The entries of the transaction in progress, for the disk. Empty if there are none.
    pub(super) fn uncommitted(&self) -> &[EntryBytes] {
        &self.uncommitted
    }

    /// The number of the last entry.
    pub(super) fn last(&self) -> u64 {
        self.first + self.entries.len() as u64 - 1
    }

    /// The transaction was committed.
    pub(super) fn commit(&mut self) {
        self.uncommitted.clear();
    }

    /// The transaction failed: forgets its entries. They may have replaced earlier ones in the maps, so all are indexed
    /// again: failures are rare.
    pub(super) fn roll_back(&mut self) {
        if self.uncommitted.is_empty() {
            return;
        }
        self.entries.truncate(self.entries.len() - self.uncommitted.len());
        self.uncommitted.clear();
        self.bodies.clear();
        self.requests.clear();
        for index in 0..self.entries.len() {
            self.index(index);
        }
    }

    /// Drops the expired entries at the front, and the oldest ones if there are too many. Called between transactions.
    pub(super) fn purge(&mut self, now: Instant) -> Option<Purged> {
        let (now, mut purged) = (self.at(now), None);
        while let Some(oldest) = self.entries.front() {
            let is_live = oldest.expires_at > now;
            if is_live && self.entries.len() <= self.entries_max {
                break;
            }
            let last = self.first;
            forget(&mut self.bodies, oldest.body_key(), last);
            if let Some(key) = oldest.request_key() {
                forget(&mut self.requests, key, last);
            }
            self.entries.pop_front();
            self.first += 1;
            purged = Some(Purged { last, early: is_live || purged.is_some_and(|purged: Purged| purged.early) });
        }
        purged
    }

    fn entry(&self, seq: u64, event: &Event, replayable_until_ms: Option<i64>, now: Now) -> Entry {
        Entry {
            seq,
            body: piece(&event.fingerprint.0, 0),
            id: event.id,
            accepted_at: self.at(now.monotonic),
            replayable_until_ms: replayable_until_ms.and_then(NonZeroI64::new),
            expires_at: 0,
        }
    }

    fn add(&mut self, entry: Entry, now: Now) {
        let age = self.at(now.monotonic) - entry.accepted_at;
        self.uncommitted.push(entry.to_bytes(now.wall_ms.saturating_sub(age)));
        self.push(entry, now);
    }

    fn push(&mut self, mut entry: Entry, now: Now) {
        entry.expires_at = entry.accepted_at.saturating_add(self.length_ms);
        if let Some(until) = entry.replayable_until_ms {
            let valid_for = until.get().saturating_add(MARGIN_MS).saturating_sub(now.wall_ms);
            let expires_at = self.at(now.monotonic) + valid_for.clamp(0, REPLAYABLE_MS_MAX);
            entry.expires_at = entry.expires_at.max(expires_at);
        }
        self.entries.push_back(entry);
        self.index(self.entries.len() - 1);
    }

    fn index(&mut self, index: usize) {
        let (entry, number) = (&self.entries[index], self.first + index as u64);
        self.bodies.insert(entry.body_key(), number);
        if let Some(key) = entry.request_key() {
            self.requests.insert(key, number);
        }
    }

    /// In milliseconds since the origin.
    fn at(&self, time: Instant) -> i64 {
        milliseconds(time.saturating_duration_since(self.origin))
    }
}

/// Removes a key, unless a later entry has it.
fn forget(map: &mut HashMap<u64, u64>, key: u64, number: u64) {
    if map.get(&key) == Some(&number) {
        map.remove(&key);
    }
}

fn milliseconds(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

/// The `N` bytes from `from` on.
fn piece<const N: usize>(bytes: &[u8], from: usize) -> [u8; N] {
    *bytes[from..].first_chunk().expect("the callers' offsets lie within the bytes")
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::event::Source;

    const SECOND: Duration = Duration::from_secs(1);

    fn event(body: u8, id: Uuid) -> Event {
        let fingerprint = Fingerprint([body; 32]);
        Event {
            id,
            accepted_ms: 0,
            source: Source::Webhook,
            authentic: true,
            trace: None,
            fingerprint,
            subject: None,
            body: Bytes::new(),
        }
    }

    fn id(n: u8) -> Uuid {
        Uuid::from_bytes([n; 16])
    }

    fn at(start: Instant, seconds: u32) -> Now {
        Now { wall_ms: 1_000_000 + i64::from(seconds) * 1000, monotonic: start + seconds * SECOND }
    }

    fn empty(entries_max: usize) -> Window {
        Window::new(&Settings { window: 120 * SECOND, entries_max })
    }

    /// A window that saw `count` unsigned bodies at `start`, numbered from 1.
    fn window(entries_max: usize, count: u8, start: Instant) -> Window {
        let mut window = empty(entries_max);
        for n in 1..=count {
            window.insert(n.into(), &event(n, id(n)), None, at(start, 0));
        }
        window.commit();
        window
    }

    fn found(window: &mut Window, n: u8, until_ms: Option<i64>, now: Now) -> Option<Uuid> {
        window.recognise(&event(n, id(99)), until_ms, now).map(|receipt| receipt.id)
    }

    #[test]
    fn finds_the_first_id_until_the_window_has_passed() {
        let start = Instant::now();
        let mut window = window(10, 1, start);
        assert_eq!(found(&mut window, 1, None, at(start, 120)), Some(id(1)));
        assert_eq!(found(&mut window, 1, None, at(start, 121)), None, "also before it is purged");
        assert_eq!(window.purge(at(start, 119).monotonic), None);
        assert_eq!(window.purge(at(start, 121).monotonic), Some(Purged { last: 1, early: false }));
        assert!(window.bodies.is_empty() && window.entries.is_empty());
    }

    #[test]
    fn the_newest_entries_win() {
        let start = Instant::now();
        let mut window = window(2, 5, start);
        assert_eq!(window.purge(start), Some(Purged { last: 3, early: true }));
        let kept = [3, 4, 5].map(|n| found(&mut window, n, None, at(start, 0)).is_some());
        assert_eq!(kept, [false, true, true]);
        // Signatures of re-sends count as well.
        for seconds in 0..5 {
            let until = at(start, 300 + seconds).wall_ms;
            assert_eq!(found(&mut window, 5, Some(until), at(start, 0)), Some(id(5)));
        }
        window.commit();
        window.purge(start);
        assert_eq!(window.entries.len(), 2);
        assert_eq!(found(&mut window, 5, Some(at(start, 304).wall_ms), at(start, 200)), Some(id(5)));
    }

    #[test]
    fn a_failed_commit_leaves_nothing_behind() {
        let start = Instant::now();
        let mut window = empty(10);
        let [first, second, third] = [300, 430, 500].map(|seconds| Some(at(start, seconds).wall_ms));
        window.insert(1, &event(1, id(1)), first, at(start, 0));
        window.commit();
        // The body is accepted a second time, sent again, and another one is accepted.
        window.insert(2, &event(1, id(2)), second, at(start, 130));
        assert_eq!(found(&mut window, 1, third, at(start, 131)), Some(id(2)));
        window.insert(3, &event(2, id(3)), None, at(start, 131));
        window.roll_back();
        assert!(window.uncommitted().is_empty());
        assert_eq!(found(&mut window, 2, None, at(start, 131)), None);
        let known = [first, second, third].map(|until| found(&mut window, 1, until, at(start, 200)));
        assert_eq!(known, [Some(id(1)), None, None]);
        assert_eq!(found(&mut window, 1, None, at(start, 100)), Some(id(1)), "the window goes on from the first time");
    }

    #[test]
    fn a_captured_request_is_recognised_for_as_long_as_its_signature_is_valid() {
        let start = Instant::now();
        let at = |seconds| at(start, seconds);
        let mut window = empty(10);
        // Signed by a clock that is ahead: valid for ten minutes from now on.
        let first = Some(at(600).wall_ms);
        window.insert(1, &event(1, id(1)), first, at(0));
        // A re-send within the window has a signature of its own, and could be captured as well.
        let second = Some(at(630).wall_ms);
        assert_eq!(found(&mut window, 1, second, at(30)), Some(id(1)));
        assert_eq!(found(&mut window, 1, first, at(599)), Some(id(1)));
        assert_eq!(found(&mut window, 1, second, at(629)), Some(id(1)));
        assert_eq!(window.purge(at(659).monotonic), None, "a minute longer than it is valid");
        assert_eq!(window.purge(at(661).monotonic), Some(Purged { last: 1, early: false }));
        // Another time of signing means that Prism sent it again, also by a clock that was set back.
        let (later, earlier) = (Some(at(700).wall_ms), Some(at(500).wall_ms));
        assert_eq!([later, earlier].map(|until| found(&mut window, 1, until, at(200))), [None, None]);
        // The body is accepted a second time: the earlier request is still recognised.
        window.insert(2, &event(1, id(2)), later, at(200));
        assert_eq!(found(&mut window, 1, second, at(629)), Some(id(1)));
        assert_eq!(found(&mut window, 1, later, at(699)), Some(id(2)));
        assert_eq!(window.purge(at(689).monotonic), None);
        assert_eq!(window.purge(at(761).monotonic), Some(Purged { last: 3, early: false }));
        assert!(window.bodies.is_empty() && window.requests.is_empty());
    }

    #[test]
    fn entries_come_back_from_the_disk_with_their_ages() {
        let start = Instant::now();
        let mut window = empty(10);
        let until = Some(at(start, 300).wall_ms);
        window.insert(7, &event(1, id(1)), until, at(start, 5));
        let mut saved = window.uncommitted().to_vec();
        window.commit();
        assert_eq!(found(&mut window, 1, Some(at(start, 310).wall_ms), at(start, 15)), Some(id(1)));
        window.insert(8, &event(2, id(2)), None, at(start, 20));
        saved.extend(window.uncommitted());
        assert_eq!((saved.len(), window.last()), (3, 3));
        let mut reopened = empty(10);
        reopened.load(&saved, 3, at(start, 50));
        assert_eq!(found(&mut reopened, 1, None, at(start, 125)), Some(id(1)));
        assert_eq!(found(&mut reopened, 1, None, at(start, 126)), None);
        let replayed = reopened.recognise(&event(1, id(99)), Some(at(start, 310).wall_ms), at(start, 309));
        assert_eq!(replayed, Some(Receipt { seq: 7, id: id(1), duplicate: true }));
        assert_eq!(reopened.purge(at(start, 1000).monotonic), Some(Purged { last: 3, early: false }));
    }

    #[test]
    fn loading_survives_a_clock_that_went_back() {
        let monotonic = Instant::now() + Duration::from_secs(1000);
        let now = |seconds| Now { wall_ms: 200_000, monotonic: monotonic + seconds * SECOND };
        let seen = |n: u8, accepted_ms, until| {
            let replayable_until_ms = NonZeroI64::new(until);
            let entry =
                Entry { seq: n.into(), body: [n; 16], id: id(n), accepted_at: 0, replayable_until_ms, expires_at: 0 };
            entry.to_bytes(accepted_ms)
        };
        let mut window = empty(10);
        window.load(&[seen(1, 0, 0), seen(2, 100_000, 0), seen(3, 900_000, 0), seen(4, 0, 500_000)], 4, now(0));
        window.purge(monotonic);
        assert_eq!([1, 2, 3].map(|n| found(&mut window, n, None, now(0)).is_some()), [false, true, true]);
        assert_eq!(found(&mut window, 3, None, now(121)), None);
        assert!(found(&mut window, 4, Some(500_000), now(299)).is_some(), "replayable, though long ago");
    }
}
