//! The spool against a model, with reopening among the operations; and the failures that a model cannot reach.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use proptest::prelude::*;
use tempfile::TempDir;
use tokio::runtime::Runtime;
use uuid::Uuid;

use super::*;
use crate::event::{Fingerprint, TraceContext};

fn settings(path: &Path, max_bytes: u64) -> Settings {
    Settings { path: path.to_owned(), max_bytes, durability: Durability::Disk }
}

fn deduped(window: Duration) -> dedupe::Settings {
    dedupe::Settings { window, entries_max: 1000 }
}

const WINDOW: Duration = Duration::from_secs(3600);

fn event(body: impl Into<Vec<u8>>) -> Event {
    let body = Bytes::from(body.into());
    Event {
        id: Uuid::now_v7(),
        accepted_ms: jiff::Timestamp::now().as_millisecond(),
        authentic: true,
        trace: None,
        fingerprint: Fingerprint::of(&body),
        body,
    }
}

struct Opened {
    spool: Spool,
    end: WriterEnd,
}

impl Opened {
    fn open(path: &Path, max_bytes: u64, window: Duration) -> Self {
        let metrics = Arc::new(Metrics::new());
        let (spool, end) = Spool::open(&settings(path, max_bytes), &deduped(window), metrics).unwrap();
        Self { spool, end }
    }

    async fn close(self) {
        drop(self.spool);
        self.end.await.unwrap();
    }
}

#[derive(Clone, Debug)]
enum Operation {
    /// The body's number and its length; the same number is the same body.
    Append(u8, u16),
    /// Which of the pending events, counted from the oldest.
    Confirm(usize),
    Park(usize),
    ConfirmParked(usize),
    ConfirmUnknown,
    Reopen,
}

fn operation() -> impl Strategy<Value = Operation> {
    prop_oneof![
        6 => (0..40u8, 0..2000u16).prop_map(|(number, length)| Operation::Append(number, length)),
        3 => (0..10usize).prop_map(Operation::Confirm),
        1 => (0..10usize).prop_map(Operation::Park),
        1 => (0..10usize).prop_map(Operation::ConfirmParked),
        1 => Just(Operation::ConfirmUnknown),
        1 => Just(Operation::Reopen),
    ]
}

/// What the spool should hold.
#[derive(Default)]
struct Model {
    pending: BTreeMap<u64, Event>,
    parked: BTreeMap<u64, Event>,
    seen: HashMap<Bytes, (u64, Uuid)>,
    ledger: Ledger,
}

impl Model {
    fn append(&mut self, event: &Event, max_bytes: u64) -> Result<Receipt, AppendError> {
        if let Some(&(seq, id)) = self.seen.get(&event.body) {
            self.ledger.duplicates += 1;
            return Ok(Receipt { seq, id, duplicate: true });
        }
        let cost = event.body.len() as u64 + EVENT_OVERHEAD_BYTES;
        if self.ledger.bytes + cost > max_bytes {
            return Err(AppendError::Full);
        }
        self.ledger.accepted += 1;
        self.ledger.pending += 1;
        self.ledger.bytes += cost;
        let seq = self.ledger.accepted;
        self.seen.insert(event.body.clone(), (seq, event.id));
        self.pending.insert(seq, event.clone());
        Ok(Receipt { seq, id: event.id, duplicate: false })
    }

    fn confirm(&mut self, seq: u64) {
        let event = if let Some(event) = self.pending.remove(&seq) {
            self.ledger.pending -= 1;
            event
        } else {
            self.ledger.parked -= 1;
            self.parked.remove(&seq).unwrap()
        };
        self.ledger.confirmed += 1;
        self.ledger.bytes -= event.body.len() as u64 + EVENT_OVERHEAD_BYTES;
    }

    fn park(&mut self, seq: u64) {
        let event = self.pending.remove(&seq).unwrap();
        self.parked.insert(seq, event);
        self.ledger.pending -= 1;
        self.ledger.parked += 1;
    }
}

fn nth(events: &BTreeMap<u64, Event>, n: usize) -> Option<u64> {
    events.keys().nth(n).copied()
}

async fn check(spool: &Spool, model: &Model) {
    spool.flush().await;
    let ledger = spool.status().ledger();
    assert_eq!(ledger, model.ledger);
    assert!(ledger.balances(), "{ledger:?}");
    let expect = |events: &BTreeMap<u64, Event>| -> Vec<Stored> {
        events.iter().map(|(seq, event)| Stored { seq: *seq, event: event.clone() }).collect()
    };
    assert_eq!(spool.pending_after(0, 10_000).await.unwrap().events, expect(&model.pending));
    let mut parked = spool.parked_due(i64::MAX, 0, 10_000).await.unwrap().events;
    parked.sort_by_key(|stored| stored.seq);
    assert_eq!(parked, expect(&model.parked));
    let oldest = model.pending.values().next().map(|event| event.accepted_ms);
    assert_eq!(spool.oldest_pending_ms().await.unwrap(), oldest);
}

async fn replay(operations: Vec<Operation>) {
    const MAX_BYTES: u64 = 16 * 1024;
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("spool.db");
    let mut model = Model::default();
    let mut opened = Opened::open(&path, MAX_BYTES, WINDOW);
    for operation in operations {
        let spool = &opened.spool;
        match operation {
            Operation::Append(number, length) => {
                let event = event(vec![number; usize::from(length) + 1]);
                assert_eq!(spool.append(event.clone(), None).await, model.append(&event, MAX_BYTES));
            }
            Operation::Confirm(n) => {
                if let Some(seq) = nth(&model.pending, n) {
                    model.confirm(seq);
                    spool.settle(vec![Settlement::Confirmed(seq)]).await;
                }
            }
            Operation::Park(n) => {
                if let Some(seq) = nth(&model.pending, n) {
                    model.park(seq);
                    spool.settle(vec![Settlement::Parked { seq, reason: "test".to_owned() }]).await;
                }
            }
            Operation::ConfirmParked(n) => {
                if let Some(seq) = nth(&model.parked, n) {
                    model.confirm(seq);
                    spool.settle(vec![Settlement::Tried(seq), Settlement::Confirmed(seq)]).await;
                }
            }
            Operation::ConfirmUnknown => spool.settle(vec![Settlement::Confirmed(1 << 40)]).await,
            Operation::Reopen => {
                opened.close().await;
                opened = Opened::open(&path, MAX_BYTES, WINDOW);
            }
        }
    }
    check(&opened.spool, &model).await;
    opened.close().await;
    let opened = Opened::open(&path, MAX_BYTES, WINDOW);
    check(&opened.spool, &model).await;
    opened.close().await;
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn behaves_like_the_model(operations in proptest::collection::vec(operation(), 1..60)) {
        Runtime::new().unwrap().block_on(replay(operations));
    }
}

#[tokio::test]
async fn everything_about_an_event_comes_back_as_it_went_in() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("new/folder/spool.db");
    let mut event = event(*b"\xff\0\"{");
    event.authentic = false;
    event.trace = Some(TraceContext { traceparent: "00-a-b-01".to_owned(), tracestate: Some("k=v".to_owned()) });
    let opened = Opened::open(&path, 1 << 20, WINDOW);
    opened.spool.append(event.clone(), None).await.unwrap();
    opened.close().await;
    let opened = Opened::open(&path, 1 << 20, WINDOW);
    let batch = opened.spool.pending_after(0, 10).await.unwrap();
    assert_eq!(batch, Batch { events: vec![Stored { seq: 1, event }], more: false });
    opened.close().await;
}

#[tokio::test]
async fn many_senders_share_commits_and_one_body_is_taken_once() {
    let folder = TempDir::new().unwrap();
    let opened = Opened::open(&folder.path().join("spool.db"), 1 << 30, WINDOW);
    let senders = (0..200u32).map(|n| {
        let spool = opened.spool.clone();
        tokio::spawn(async move { spool.append(event((n / 2).to_string()), None).await.unwrap() })
    });
    let mut ids: HashMap<Uuid, Vec<bool>> = HashMap::new();
    for sender in senders.collect::<Vec<_>>() {
        let receipt = sender.await.unwrap();
        ids.entry(receipt.id).or_default().push(receipt.duplicate);
    }
    assert_eq!(ids.len(), 100);
    assert!(ids.values().all(|duplicates| duplicates.iter().filter(|duplicate| **duplicate).count() == 1));
    let ledger = opened.spool.status().ledger();
    assert_eq!((ledger.accepted, ledger.duplicates), (100, 100));
    opened.close().await;
}

#[tokio::test]
async fn without_a_window_every_body_counts() {
    let folder = TempDir::new().unwrap();
    let opened = Opened::open(&folder.path().join("spool.db"), 1 << 20, Duration::ZERO);
    for _ in 0..3 {
        assert!(!opened.spool.append(event("a"), None).await.unwrap().duplicate);
    }
    opened.close().await;
}

#[tokio::test]
async fn captured_requests_are_recognised_after_a_restart() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("spool.db");
    let opened = Opened::open(&path, 1 << 20, Duration::from_millis(1));
    let until = |seconds| Some(Timestamp::now().checked_add(jiff::SignedDuration::from_secs(seconds)).unwrap());
    let [first, second] = [until(300), until(310)];
    let mut ids = Vec::new();
    for until in [first, second] {
        let receipt = opened.spool.append(event("a"), until).await.unwrap();
        assert!(!receipt.duplicate, "the window has passed");
        ids.push(receipt.id);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    opened.close().await;
    let opened = Opened::open(&path, 1 << 20, Duration::from_millis(1));
    for (until, id) in [(first, ids[0]), (second, ids[1])] {
        let receipt = opened.spool.append(event("a"), until).await.unwrap();
        assert_eq!((receipt.id, receipt.duplicate), (id, true));
    }
    assert!(!opened.spool.append(event("a"), until(320)).await.unwrap().duplicate, "signed again, so sent again");
    opened.close().await;
}

#[tokio::test]
async fn reading_is_bounded_by_number_and_by_bytes() {
    let folder = TempDir::new().unwrap();
    let opened = Opened::open(&folder.path().join("spool.db"), 1 << 30, WINDOW);
    for n in 0..10u8 {
        opened.spool.append(event(vec![n; 1024 * 1024]), None).await.unwrap();
    }
    let two = opened.spool.pending_after(3, 2).await.unwrap();
    assert_eq!((two.events.iter().map(|stored| stored.seq).collect::<Vec<_>>(), two.more), (vec![4, 5], true));
    let cut = opened.spool.pending_after(0, 100).await.unwrap();
    assert_eq!((cut.events.len(), cut.more), (4, true));
    let rest = opened.spool.pending_after(8, 100).await.unwrap();
    assert_eq!((rest.events.len(), rest.more), (2, false));
    let parked = (1..=10).map(|seq| Settlement::Parked { seq, reason: "no queue".to_owned() });
    opened.spool.settle(parked.collect()).await;
    opened.spool.flush().await;
    let cut = opened.spool.parked_due(i64::MAX, 0, 100).await.unwrap();
    assert_eq!((cut.events.len(), cut.more), (4, true));
    opened.close().await;
}

#[tokio::test]
async fn a_failed_commit_refuses_its_events_and_they_never_appear() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("spool.db");
    let opened = Opened::open(&path, 1 << 30, WINDOW);
    opened.spool.append(event("before"), None).await.unwrap();
    // A statement in the middle of the transaction fails, as it would on a full disk.
    let meddler = rusqlite::Connection::open(&path).unwrap();
    meddler
        .execute_batch("CREATE TRIGGER no_more BEFORE INSERT ON event BEGIN SELECT RAISE(ABORT, 'no'); END")
        .unwrap();
    let refused = event("during");
    assert_eq!(opened.spool.append(refused.clone(), None).await, Err(AppendError::Unavailable));
    meddler.execute_batch("DROP TRIGGER no_more").unwrap();
    // The same body again: the failed one has left no trace in the dedupe window.
    let receipt = opened.spool.append(event("during"), None).await.unwrap();
    assert!(!receipt.duplicate && receipt.id != refused.id);
    assert!(opened.spool.status().writable());
    let events = opened.spool.pending_after(0, 10).await.unwrap().events;
    assert_eq!(events.len(), 2);
    assert!(events.iter().all(|stored| stored.event.id != refused.id));
    assert_eq!(opened.spool.status().ledger().accepted, 2);
    opened.close().await;
}

#[tokio::test]
async fn settlements_survive_a_failed_commit() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("spool.db");
    let opened = Opened::open(&path, 1 << 30, WINDOW);
    opened.spool.append(event("a"), None).await.unwrap();
    let meddler = rusqlite::Connection::open(&path).unwrap();
    meddler.execute_batch("CREATE TRIGGER keep BEFORE DELETE ON event BEGIN SELECT RAISE(ABORT, 'no'); END").unwrap();
    opened.spool.settle(vec![Settlement::Confirmed(1)]).await;
    opened.spool.flush().await;
    assert_eq!(opened.spool.status().ledger().pending, 1);
    assert!(!opened.spool.status().writable() && !opened.spool.status().takes_settlements());
    meddler.execute_batch("DROP TRIGGER keep").unwrap();
    opened.spool.flush().await;
    assert!(opened.spool.status().takes_settlements());
    assert_eq!(opened.spool.status().ledger().confirmed, 1);
    assert!(opened.spool.status().writable());
    opened.close().await;
}

#[tokio::test]
async fn the_file_is_private_and_has_one_relay() {
    use std::os::unix::fs::PermissionsExt;
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("data/spool.db");
    let opened = Opened::open(&path, 1 << 20, WINDOW);
    opened.spool.append(event("a"), None).await.unwrap();
    for name in ["spool.db", "spool.db-wal", "spool.db-shm", "spool.db.lock"] {
        let mode = std::fs::metadata(path.with_file_name(name)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{name}");
    }
    let second = Spool::open(&settings(&path, 1), &deduped(WINDOW), Arc::new(Metrics::new())).map(|_| ());
    let text = second.unwrap_err().to_string();
    assert!(text.contains("in use by another relay") && text.contains(&std::process::id().to_string()), "{text}");
    assert_eq!(SpoolState::of(&path), SpoolState::InUse);
    opened.close().await;
    assert_eq!(SpoolState::of(&path), SpoolState::Idle);
}

#[tokio::test]
async fn files_that_are_no_spool_are_left_alone() {
    let folder = TempDir::new().unwrap();
    let open = |name: &str| {
        let settings = settings(&folder.path().join(name), 1);
        Spool::open(&settings, &deduped(WINDOW), Arc::new(Metrics::new())).map(|_| ()).unwrap_err()
    };
    std::fs::write(folder.path().join("text"), "x".repeat(10_000)).unwrap();
    assert!(matches!(open("text"), OpenError::Sqlite { .. }));
    let foreign = rusqlite::Connection::open(folder.path().join("foreign")).unwrap();
    foreign.execute_batch("CREATE TABLE t (x)").unwrap();
    assert!(matches!(open("foreign"), OpenError::Foreign { .. }));
    Opened::open(&folder.path().join("other"), 1, WINDOW).close().await;
    let other = rusqlite::Connection::open(folder.path().join("other")).unwrap();
    other.execute_batch("PRAGMA user_version = 99").unwrap();
    assert!(matches!(open("other"), OpenError::Newer { found: 99, .. }));
    other.execute_batch("PRAGMA user_version = 1").unwrap();
    assert!(matches!(open("other"), OpenError::Older { found: 1, .. }));
}

/// The files of a spool with `count` events, as a kill leaves them: some in the file, some in the log.
async fn left_by_a_kill(count: usize) -> (TempDir, PathBuf) {
    let folder = TempDir::new().unwrap();
    let (path, after) = (folder.path().join("alive"), folder.path().join("spool.db"));
    let opened = Opened::open(&path, u64::MAX, WINDOW);
    for number in 0..count {
        if number == count / 2 {
            rusqlite::Connection::open(&path).unwrap().query_row("PRAGMA wal_checkpoint", [], |_| Ok(())).unwrap();
        }
        opened.spool.append(event(number.to_string()), None).await.unwrap();
    }
    for ending in ["", "-wal", ".lock"] {
        std::fs::copy(files::sibling(&path, ending), files::sibling(&after, ending)).unwrap();
    }
    opened.close().await;
    (folder, after)
}

/// The names beside a spool that hold what was damaged, or what is being saved of it.
fn remains(path: &Path) -> Vec<String> {
    let names = std::fs::read_dir(path.parent().unwrap()).unwrap();
    let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<_> =
        names.filter(|name| name.starts_with("spool.db.damaged") || name.starts_with("spool.db.me")).collect();
    names.sort_unstable();
    names
}

fn events_in(path: &Path) -> u64 {
    let connection = rusqlite::Connection::open(path).unwrap();
    connection.query_row("SELECT count(*) FROM event", [], |row| row.get(0)).unwrap()
}

#[tokio::test]
async fn what_an_interrupted_mend_has_saved_is_not_taken_for_the_spool() {
    let (_folder, path) = left_by_a_kill(20).await;
    salvage::order(&path);
    for ending in [".mending", ".mending-wal"] {
        std::fs::write(files::sibling(&path, ending), "half of it").unwrap();
    }
    let opened = Opened::open(&path, u64::MAX, WINDOW);
    assert_eq!(opened.spool.status().ledger().pending, 20);
    opened.close().await;
    let remains = remains(&path);
    assert!(remains.iter().all(|name| name.starts_with("spool.db.damaged")), "{remains:?}");
    assert!(remains.iter().any(|name| name.ends_with("-wal")), "{remains:?}");
}

#[tokio::test]
async fn a_mended_file_takes_its_place_wherever_that_was_interrupted() {
    for moved in 0..=3 {
        let (folder, path) = left_by_a_kill(20).await;
        salvage::order(&path);
        let (whole, saved) = (folder.path().join("whole"), files::sibling(&path, ".mended"));
        std::fs::copy(&path, &whole).unwrap();
        std::fs::copy(files::sibling(&path, "-wal"), files::sibling(&whole, "-wal")).unwrap();
        let vacuum = format!("VACUUM INTO '{}'", saved.display());
        rusqlite::Connection::open(&whole).unwrap().execute_batch(&vacuum).unwrap();
        std::fs::write(&path, "damaged").unwrap();
        std::fs::write(files::sibling(&path, "-shm"), "").unwrap();
        let at = std::fs::metadata(&saved).unwrap().modified().unwrap().try_into().unwrap();
        let aside = salvage::aside(&path, at);
        for ending in &["", "-wal", "-shm"][..moved] {
            std::fs::rename(files::sibling(&path, ending), files::sibling(&aside, ending)).unwrap();
        }
        if moved == 3 {
            std::fs::remove_file(files::sibling(&path, ".mend")).unwrap();
        }
        let opened = Opened::open(&path, u64::MAX, WINDOW);
        assert_eq!(opened.spool.status().ledger().pending, 20, "{moved} moved");
        opened.close().await;
        assert_eq!(std::fs::read(&aside).unwrap(), b"damaged");
        assert_eq!(remains(&path).len(), 3, "{:?}", remains(&path));
    }
}

#[tokio::test]
async fn no_damaged_file_takes_the_place_of_another() {
    let (_folder, path) = left_by_a_kill(20).await;
    for mends in 1..=3 {
        salvage::order(&path);
        let opened = Opened::open(&path, u64::MAX, WINDOW);
        assert_eq!(opened.spool.status().ledger().pending, 20);
        opened.close().await;
        let remains = remains(&path);
        let aside = remains.iter().filter(|name| !name.ends_with("-wal") && !name.ends_with("-shm"));
        let aside: Vec<_> = aside.map(|name| path.with_file_name(name)).collect();
        assert_eq!(aside.len(), mends, "{remains:?}");
        assert!(aside.iter().all(|aside| events_in(aside) == 20), "{remains:?}");
    }
}

#[tokio::test]
async fn damage_that_the_first_look_does_not_find_is_mended() {
    for damage in [
        "UPDATE seen SET entries = x'00' WHERE last = 7",
        "UPDATE ledger SET pending = 7",
        "UPDATE ledger SET accepted = 15, pending = 15",
        "DELETE FROM ledger",
    ] {
        let (_folder, path) = left_by_a_kill(20).await;
        rusqlite::Connection::open(&path).unwrap().execute_batch(damage).unwrap();
        let opened = Opened::open(&path, u64::MAX, WINDOW);
        let ledger = opened.spool.status().ledger();
        assert_eq!((ledger.pending, ledger.removed), (20, 0), "{damage}");
        opened.close().await;
    }
}

#[tokio::test]
async fn totals_that_turn_out_to_be_too_small_are_counted_anew() {
    let (_folder, path) = left_by_a_kill(20).await;
    rusqlite::Connection::open(&path).unwrap().execute_batch("UPDATE ledger SET bytes = 100").unwrap();
    let opened = Opened::open(&path, u64::MAX, WINDOW);
    opened.spool.settle(vec![Settlement::Confirmed(1)]).await;
    assert!(opened.end.await.is_err(), "the writer ends, and with it the relay");
    drop(opened.spool);
    let opened = Opened::open(&path, u64::MAX, WINDOW);
    let ledger = opened.spool.status().ledger();
    assert_eq!((ledger.pending, ledger.bytes), (20, 20 * EVENT_OVERHEAD_BYTES + 30));
    opened.close().await;
}

/// The bytes of a spool, all of it in the file, and where in them the root of the table of events begins.
fn table_of_events(path: &Path) -> (Vec<u8>, usize) {
    let connection = rusqlite::Connection::open(path).unwrap();
    connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())).unwrap();
    let sql = "SELECT rootpage FROM sqlite_schema WHERE name = 'event'";
    let root: usize = connection.query_row(sql, [], |row| row.get(0)).unwrap();
    drop(connection);
    (std::fs::read(path).unwrap(), (root - 1) * 4096)
}

/// Where a cell of a page begins (<https://www.sqlite.org/fileformat2.html>, 1.6): after a header stands where each one is.
fn cell_in(bytes: &[u8], page: usize, header: usize, cell: usize) -> usize {
    let pointer = page + header + 2 * cell;
    page + usize::from(u16::from_be_bytes([bytes[pointer], bytes[pointer + 1]]))
}

/// Where the number of an event stands in a leaf: after the length of the row, which takes one byte here.
fn number_in(bytes: &[u8], page: usize, cell: usize) -> usize {
    assert_eq!(bytes[page], 13, "a leaf");
    cell_in(bytes, page, 8, cell) + 1
}

/// Where a child of an inner page begins.
fn child_in(bytes: &[u8], page: usize, cell: usize) -> usize {
    assert_eq!(bytes[page], 5, "an inner page");
    let cell = cell_in(bytes, page, 12, cell);
    (u32::from_be_bytes(bytes[cell..cell + 4].try_into().unwrap()) as usize - 1) * 4096
}

#[tokio::test]
async fn of_two_events_of_one_number_both_are_saved() {
    let (_folder, path) = left_by_a_kill(10).await;
    let (mut bytes, page) = table_of_events(&path);
    let eighth = number_in(&bytes, page, 7);
    assert_eq!((bytes[number_in(&bytes, page, 6)], bytes[eighth]), (7, 8));
    bytes[eighth] = 7;
    std::fs::write(&path, bytes).unwrap();
    salvage::order(&path);
    let opened = Opened::open(&path, u64::MAX, WINDOW);
    let ledger = opened.spool.status().ledger();
    assert_eq!((ledger.pending, ledger.removed, opened.spool.status().lost()), (10, 0, 0));
    opened.close().await;
    assert_eq!(Inspector::open(&path).unwrap().verify().unwrap().problems, [""; 0]);
}

/// Between two damaged places, too, all is saved that can be found.
#[tokio::test]
async fn everything_that_is_readable_is_saved() {
    let (_folder, path) = left_by_a_kill(2000).await;
    let (mut bytes, _) = table_of_events(&path);
    let pages = bytes.len() / 4096;
    for page in [pages / 5, pages / 2, pages / 2 + 1, pages - pages / 5] {
        bytes[page * 4096..(page + 1) * 4096].fill(0xa5);
    }
    std::fs::write(&path, bytes).unwrap();
    let damaged = rusqlite::Connection::open(&path).unwrap();
    let mut statement = damaged.prepare("SELECT count(body) FROM event WHERE seq = ?1").unwrap();
    let readable = (1..=2000).filter(|seq| statement.query_row([seq], |row| row.get(0)) == Ok(1)).count() as u64;
    assert!((1000..2000).contains(&readable), "{readable}");
    drop(statement);
    drop(damaged);
    salvage::order(&path);
    let opened = Opened::open(&path, u64::MAX, WINDOW);
    let ledger = opened.spool.status().ledger();
    assert_eq!((ledger.pending, opened.spool.status().lost()), (readable, 2000 - readable));
    opened.close().await;
    assert_eq!(Inspector::open(&path).unwrap().verify().unwrap().problems, [""; 0]);
}

/// Of a relay that has delivered millions, and without the totals: nothing says where the numbers begin.
#[tokio::test]
async fn what_is_readable_is_found_however_far_away_its_numbers_are() {
    let (_folder, path) = left_by_a_kill(1000).await;
    let damaged = rusqlite::Connection::open(&path).unwrap();
    damaged
        .execute_batch("UPDATE event SET seq = -seq; UPDATE event SET seq = 5001001 + seq; DELETE FROM ledger")
        .unwrap();
    drop(damaged);
    let (mut bytes, page) = table_of_events(&path);
    let first = child_in(&bytes, page, 0);
    bytes[first..first + 4096].fill(0xa5);
    std::fs::write(&path, bytes).unwrap();
    salvage::order(&path);
    let opened = Opened::open(&path, u64::MAX, WINDOW);
    let pending = opened.spool.status().ledger().pending;
    assert!((900..1000).contains(&pending) && opened.spool.status().lost() > 0, "{pending}");
    opened.close().await;
}

/// A number that the damage has made up hides neither what lies behind it nor the event whose number it is.
#[tokio::test]
async fn a_made_up_number_costs_no_event() {
    let (_folder, path) = left_by_a_kill(300).await;
    let (mut bytes, page) = table_of_events(&path);
    let (first, second) = (child_in(&bytes, page, 0), child_in(&bytes, page, 1));
    let number = number_in(&bytes, first, 5);
    assert_eq!(bytes[number], 6);
    bytes[number] = 127;
    let destroyed = u64::from(u16::from_be_bytes([bytes[second + 3], bytes[second + 4]]));
    bytes[second..second + 4096].fill(0xa5);
    std::fs::write(&path, bytes).unwrap();
    salvage::order(&path);
    let opened = Opened::open(&path, u64::MAX, WINDOW);
    let status = opened.spool.status();
    assert_eq!((status.ledger().pending, status.lost()), (300 - destroyed, destroyed));
    opened.close().await;
}

#[tokio::test]
async fn numbers_that_cannot_be_are_passed_over() {
    for (number, ledger) in [(i64::MAX, true), (0, true), (i64::MAX, false), (0, false)] {
        let (_folder, path) = left_by_a_kill(20).await;
        let damaged = rusqlite::Connection::open(&path).unwrap();
        damaged.execute("UPDATE event SET seq = ?1 WHERE seq = 20", [number]).unwrap();
        if !ledger {
            damaged.execute("UPDATE ledger SET accepted = ?1, removed = ?1", [i64::MAX]).unwrap();
        }
        drop(damaged);
        salvage::order(&path);
        let opened = Opened::open(&path, u64::MAX, WINDOW);
        assert_eq!((opened.spool.status().ledger().pending, opened.spool.status().lost()), (19, 1), "{number}");
        assert!(opened.spool.append(event("one more"), None).await.unwrap().seq < 100);
        opened.close().await;
    }
}

#[tokio::test]
async fn without_the_totals_what_was_delivered_is_not_taken_for_lost() {
    let (_folder, path) = left_by_a_kill(20).await;
    let opened = Opened::open(&path, u64::MAX, WINDOW);
    opened.spool.settle((1..=10).map(Settlement::Confirmed).collect()).await;
    opened.spool.settle(vec![Settlement::Parked { seq: 11, reason: "no queue".to_owned() }]).await;
    opened.close().await;
    rusqlite::Connection::open(&path).unwrap().execute_batch("DELETE FROM ledger").unwrap();
    salvage::order(&path);
    let opened = Opened::open(&path, u64::MAX, WINDOW);
    let ledger = opened.spool.status().ledger();
    assert_eq!((ledger.accepted, ledger.confirmed, ledger.pending, ledger.parked), (20, 10, 9, 1));
    assert_eq!((ledger.removed, opened.spool.status().lost()), (0, 0));
    opened.close().await;
}

/// Somebody who has the file for himself must not make its events unreadable.
#[tokio::test]
async fn a_damaged_file_that_is_locked_is_not_taken_for_an_empty_one() {
    let (_folder, path) = left_by_a_kill(20).await;
    salvage::order(&path);
    let owner = rusqlite::Connection::open(&path).unwrap();
    owner.execute_batch("PRAGMA locking_mode = EXCLUSIVE; BEGIN EXCLUSIVE").unwrap();
    let metrics = Arc::new(Metrics::new());
    let refused = Spool::open(&settings(&path, u64::MAX), &deduped(WINDOW), metrics).map(|_| ()).unwrap_err();
    assert!(matches!(refused, OpenError::Sqlite { .. }), "{refused}");
    owner.execute_batch("ROLLBACK").unwrap();
    drop(owner);
    assert_eq!(remains(&path), ["spool.db.mend"]);
    // Nor is anything removed that is about to be copied.
    assert_eq!(SpoolState::of(&path), SpoolState::Damaged);
    let refused = Inspector::open_for_change(&path).map(|_| ()).unwrap_err();
    assert!(matches!(refused, OpenError::Damaged { .. }), "{refused}");
    let opened = Opened::open(&path, u64::MAX, WINDOW);
    assert_eq!(opened.spool.status().ledger().pending, 20);
    opened.close().await;
}

#[test]
fn debug_shows_no_body() {
    let stored = Stored { seq: 1, event: event(r#"{"eventType":"a","payload":{"userToken":"hunter2"}}"#) };
    let batch = Batch { events: vec![stored.clone()], more: false };
    let entry = Entry { stored, parked_reason: None, tried_ms: None };
    for shown in [format!("{batch:?}"), format!("{entry:?}")] {
        let bytes = format!("{:?}", b"hunter2");
        assert!(!shown.contains("hunter2") && !shown.contains(bytes.trim_matches(['[', ']'])), "{shown}");
    }
}
