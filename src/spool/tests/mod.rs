//! What the model cannot reach: commits that fail or are shared, limits of reading, captured requests.

mod faults;
mod files;
mod following;
mod inspect;
mod model;
mod recovery;
mod settling;

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tempfile::TempDir;
use uuid::Uuid;

use super::*;
use crate::event::{Fingerprint, Source, SubjectKey, TraceContext};

fn settings(path: &Path, max_bytes: u64) -> Settings {
    Settings { path: path.to_owned(), max_bytes, durability: Durability::Disk, body_bytes_max: 1 << 18 }
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
        source: Source::Webhook,
        authentic: true,
        trace: None,
        fingerprint: Fingerprint::of(&body),
        subject: None,
        body,
    }
}

/// Waits until the writer has come to this.
async fn eventually(holds: impl Fn() -> bool) {
    for _ in 0..1000 {
        if holds() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("still not after 20 s");
}

struct Opened {
    spool: Spool,
    end: WriterEnd,
    metrics: Arc<Metrics>,
}

impl Opened {
    fn open(path: &Path, max_bytes: u64, window: Duration) -> Self {
        Self::with(path, max_bytes, window, None)
    }

    fn with(path: &Path, max_bytes: u64, window: Duration, subjects: Option<&subjects::Settings>) -> Self {
        let metrics = Arc::new(Metrics::new());
        let (settings, counts) = (settings(path, max_bytes), Arc::clone(&metrics));
        let (spool, end) = Spool::open(&settings, &deduped(window), subjects, counts).unwrap();
        Self { spool, end, metrics }
    }

    async fn close(self) {
        drop(self.spool);
        self.end.await.unwrap();
    }
}

#[tokio::test]
async fn everything_about_an_event_comes_back_as_it_went_in() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("new/folder/spool.db");
    let mut event = event(*b"\xff\0\"{");
    event.authentic = false;
    event.subject = Some(SubjectKey(-7));
    event.trace = Some(TraceContext { traceparent: "00-a-b-01".to_owned(), tracestate: Some("k=v".to_owned()) });
    let opened = Opened::open(&path, 1 << 20, WINDOW);
    opened.spool.append(event.clone(), None).await.unwrap();
    opened.close().await;
    let opened = Opened::open(&path, 1 << 20, WINDOW);
    let batch = opened.spool.pending_after(0, 10).await.unwrap();
    let events = vec![Stored { seq: 1, event }];
    assert_eq!(batch, PendingBatch { events, waiting: vec![], last: 1, more: false, removed: 0 });
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
    assert!(
        !opened.spool.append(event("a"), until(320)).await.unwrap().duplicate,
        "signed at another time, so sent again"
    );
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
async fn events_behind_a_parked_one_of_their_subject_wait_until_it_is_gone() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("spool.db");
    let opened = Opened::open(&path, 1 << 20, WINDOW);
    let (spool, mut ids) = (&opened.spool, Vec::new());
    for (n, subject) in [Some(1), Some(1), Some(2), None, Some(1)].into_iter().enumerate() {
        let event = Event { subject: subject.map(SubjectKey), ..event(n.to_string()) };
        ids.push(spool.append(event, None).await.unwrap().id);
    }
    let park = async |seq| {
        spool.settle(vec![Settlement::Parked { seq, reason: "no queue".to_owned() }]).await;
        spool.flush().await;
    };
    let read = async |after, limit| {
        let batch = spool.pending_after(after, limit).await.unwrap();
        let seqs: Vec<_> = batch.events.iter().map(|stored| stored.seq).collect();
        (seqs, batch.waiting, batch.last, batch.more, batch.removed)
    };
    assert_eq!(read(0, 10).await, (vec![1, 2, 3, 4, 5], vec![], 5, false, 0));
    park(1).await;
    assert_eq!(read(0, 10).await, (vec![3, 4], vec![2, 5], 5, false, 0));
    assert_eq!(read(0, 2).await, (vec![3], vec![2], 3, true, 0), "a waiting event counts for the limit");
    assert_eq!(read(4, 10).await, (vec![], vec![5], 5, false, 0), "the next read goes on behind the last one");
    let behind = async |seq| spool.undelivered(vec![seq]).await.unwrap()[0].waits_behind;
    assert_eq!((behind(2).await, behind(3).await, behind(4).await), (Some(ids[0]), None, None));
    let mut inspector = Inspector::open_for_change(&path).unwrap();
    assert_eq!(inspector.find(ids[4]).unwrap().unwrap().waits_behind, Some(ids[0]));
    // Delivered: the next one goes. Parked and removed: the one behind it goes.
    spool.settle(vec![Settlement::Confirmed(1)]).await;
    spool.flush().await;
    assert_eq!(read(0, 10).await, (vec![2, 3, 4, 5], vec![], 5, false, 0));
    park(2).await;
    assert_eq!((read(2, 10).await, spool.removed().await.unwrap()), ((vec![3, 4], vec![5], 5, false, 0), 0));
    assert!(inspector.remove(ids[1]).unwrap());
    assert_eq!((read(2, 10).await, spool.removed().await.unwrap()), ((vec![3, 4, 5], vec![], 5, false, 1), 1));
    let mut behind = Vec::new();
    inspector.each(false, 10, |entry| behind.push(entry.waits_behind)).unwrap();
    assert_eq!(behind, [None; 3]);
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
    // The same body again: the failed commit left nothing in the dedupe window.
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

#[test]
fn debug_shows_no_body() {
    let stored = Stored { seq: 1, event: event(r#"{"eventType":"a","payload":{"userToken":"hunter2"}}"#) };
    let batch = Batch { events: vec![stored.clone()], more: false };
    let entry = Entry { stored, parked_reason: None, tried_ms: None, waits_behind: None };
    for shown in [format!("{batch:?}"), format!("{entry:?}")] {
        let bytes = format!("{:?}", b"hunter2");
        assert!(!shown.contains("hunter2") && !shown.contains(bytes.trim_matches(['[', ']'])), "{shown}");
    }
}

#[tokio::test]
async fn confirmed_events_are_not_read_again_while_the_disk_takes_no_settlement() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("spool.db");
    let opened = Opened::open(&path, 1 << 30, WINDOW);
    for number in 0..10 {
        opened.spool.append(event(number.to_string()), None).await.unwrap();
    }
    opened.spool.settle(vec![Settlement::Parked { seq: 10, reason: "no queue".to_owned() }]).await;
    opened.spool.flush().await;
    let meddler = rusqlite::Connection::open(&path).unwrap();
    meddler.execute_batch("CREATE TRIGGER keep BEFORE DELETE ON event BEGIN SELECT RAISE(ABORT, 'no'); END").unwrap();
    for _ in 0..3 {
        opened.spool.settle([1, 2, 3, 7, 10].map(Settlement::Confirmed).to_vec()).await;
        opened.spool.flush().await;
    }
    assert_eq!(opened.spool.status().ledger().pending, 9, "nothing is noted");
    let seqs = |events: &[Stored]| events.iter().map(|stored| stored.seq).collect::<Vec<_>>();
    assert_eq!(seqs(&opened.spool.pending_after(0, 10).await.unwrap().events), [4, 5, 6, 8, 9]);
    let cut = opened.spool.pending_after(0, 4).await.unwrap();
    assert_eq!((cut.more, seqs(&cut.events)), (true, vec![4, 5, 6, 8]));
    assert_eq!(opened.spool.parked_due(i64::MAX, 0, 10).await.unwrap().events, []);
    let undelivered = opened.spool.undelivered((1..=10).collect()).await.unwrap();
    assert_eq!(undelivered.iter().map(|event| event.seq).collect::<Vec<_>>(), [4, 5, 6, 8, 9]);
    meddler.execute_batch("DROP TRIGGER keep").unwrap();
    opened.spool.flush().await;
    let ledger = opened.spool.status().ledger();
    assert_eq!((ledger.confirmed, ledger.pending, ledger.parked), (5, 5, 0));
    opened.close().await;
}

fn length(path: &Path) -> u64 {
    std::fs::metadata(path).map_or(0, |metadata| metadata.len())
}

#[tokio::test]
async fn the_file_gets_smaller_when_a_backlog_is_delivered() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("spool.db");
    let opened = Opened::open(&path, 1 << 30, WINDOW);
    for number in 0..40u8 {
        opened.spool.append(event(vec![number; 1024 * 1024]), None).await.unwrap();
    }
    opened.spool.settle((1..=40).map(Settlement::Confirmed).collect()).await;
    opened.spool.flush().await;
    for _ in 0..1000 {
        if length(&path) < 10 << 20 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(length(&path) < 10 << 20, "{}", length(&path));
    assert_eq!(opened.spool.pending_after(0, 10).await.unwrap().events, []);
    opened.close().await;
}

#[tokio::test]
async fn a_large_log_is_given_back_at_the_start() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("spool.db");
    let opened = Opened::open(&path, 1 << 30, WINDOW);
    let reader = rusqlite::Connection::open(&path).unwrap();
    reader.execute_batch("BEGIN; SELECT count(*) FROM event").unwrap();
    for number in 0..40u8 {
        opened.spool.append(event(vec![number; 1024 * 1024]), None).await.unwrap();
    }
    assert!(opened.spool.status().log_bytes() > 40 << 20);
    opened.close().await;
    drop(reader);
    let opened = Opened::open(&path, 1 << 30, WINDOW);
    assert!(opened.spool.status().log_bytes() < 1 << 20 && opened.spool.status().writable());
    assert_eq!(opened.spool.status().ledger().pending, 40);
    opened.close().await;
}

/// The totals are right in the middle of changes, and no read takes long.
#[tokio::test]
async fn a_spool_is_verified_while_it_is_used() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("spool.db");
    let opened = Opened::open(&path, 1 << 30, WINDOW);
    for number in 0..1200 {
        opened.spool.append(event(number.to_string()), None).await.unwrap();
    }
    let verified = tokio::task::spawn_blocking(move || {
        let verify = |_| Inspector::open(&path).unwrap().verify().unwrap();
        (0..20).map(verify).collect::<Vec<_>>()
    });
    let mut number = 1200;
    while !verified.is_finished() {
        opened.spool.append(event(number.to_string()), None).await.unwrap();
        number += 1;
        opened.spool.settle(vec![Settlement::Confirmed(number / 2)]).await;
    }
    for verdict in verified.await.unwrap() {
        assert_eq!((verdict.problems, verdict.is_structure_checked), (vec![], false));
    }
    opened.close().await;
}
