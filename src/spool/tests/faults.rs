//! What the writer makes of a disk that fails, of files that are deleted, and of other processes.

use std::path::Path;
use std::time::Duration;

use rusqlite::Connection;
use tempfile::TempDir;

use super::{Opened, WINDOW, event, eventually};
use crate::spool::{AppendError, Condition, Settlement};

/// A sync that failed is reported once. What it was about may be lost, so the log has to begin again.
#[tokio::test]
async fn a_failure_at_the_start_is_not_forgotten_because_the_log_is_in_use() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("spool.db");
    let opened = Opened::open(&path, 1 << 30, WINDOW);
    opened.spool.append(event("before"), None).await.unwrap();
    opened.close().await;
    let (meddler, reader) = (Connection::open(&path).unwrap(), Connection::open(&path).unwrap());
    meddler.execute_batch("CREATE TRIGGER no BEFORE UPDATE ON relay BEGIN SELECT RAISE(ABORT, 'no'); END").unwrap();
    reader.execute_batch("BEGIN; SELECT count(*) FROM event").unwrap();
    let opened = Opened::open(&path, 1 << 30, WINDOW);
    assert_eq!(opened.spool.status().condition(), Condition::LogInUse);
    drop(reader);
    meddler.execute_batch("DROP TRIGGER no").unwrap();
    eventually(|| opened.spool.status().writable()).await;
    opened.close().await;
}

const KEEP: &str = "CREATE TRIGGER keep BEFORE DELETE ON event BEGIN SELECT RAISE(ABORT, 'no'); END";

/// Moves the files of a spool away, as if their folder was unmounted.
fn move_away(path: &Path) {
    std::fs::rename(path.parent().unwrap(), path.parent().unwrap().with_extension("away")).unwrap();
}

#[tokio::test]
async fn deleted_files_are_left_once_all_is_delivered_even_if_that_cannot_be_noted() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("data/spool.db");
    let opened = Opened::open(&path, 1 << 30, WINDOW);
    for number in 0..3 {
        opened.spool.append(event(number.to_string()), None).await.unwrap();
    }
    Connection::open(&path).unwrap().execute_batch(KEEP).unwrap();
    opened.spool.settle(vec![Settlement::Confirmed(1)]).await;
    opened.spool.flush().await;
    assert_eq!(opened.spool.status().condition(), Condition::Failing);
    move_away(&path);
    eventually(|| opened.spool.status().condition() == Condition::Gone).await;
    opened.spool.settle(vec![Settlement::Parked { seq: 2, reason: "no queue".to_owned() }]).await;
    opened.spool.flush().await;
    assert_eq!(opened.spool.status().ledger().pending, 3, "nothing is noted");
    let refused = opened.spool.append(event("late"), None).await;
    assert_eq!(refused, Err(AppendError::Unavailable), "the writer has not ended: one event is not delivered");
    opened.spool.settle(vec![Settlement::Confirmed(3)]).await;
    let end = tokio::time::timeout(Duration::from_secs(20), opened.end).await;
    assert!(end.expect("the writer ends, so that the relay exits").is_err());
}

#[tokio::test]
async fn what_was_delivered_is_noted_at_the_end_at_the_latest() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("spool.db");
    let opened = Opened::open(&path, 1 << 30, WINDOW);
    opened.spool.append(event("a"), None).await.unwrap();
    let meddler = Connection::open(&path).unwrap();
    meddler.execute_batch(KEEP).unwrap();
    opened.spool.settle(vec![Settlement::Confirmed(1)]).await;
    opened.spool.flush().await;
    meddler.execute_batch("DROP TRIGGER keep").unwrap();
    drop(meddler);
    opened.close().await;
    let opened = Opened::open(&path, 1 << 30, WINDOW);
    assert_eq!(opened.spool.status().ledger().confirmed, 1);
    opened.close().await;
}

/// The relay waits for the lock once for each batch.
#[tokio::test]
async fn a_locked_file_is_not_a_stalled_disk() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("spool.db");
    let opened = Opened::open(&path, 1 << 30, WINDOW);
    opened.spool.append(event("a"), None).await.unwrap();
    let owner = Connection::open(&path).unwrap();
    owner.execute_batch("BEGIN IMMEDIATE").unwrap();
    assert_eq!(opened.spool.append(event("b"), None).await, Err(AppendError::Unavailable));
    assert_eq!(opened.spool.status().condition(), Condition::Locked);
    opened.spool.settle(vec![Settlement::Confirmed(1)]).await;
    let spool = opened.spool.clone();
    let second = tokio::spawn(async move { spool.append(event("c"), None).await });
    while !second.is_finished() {
        assert!(!opened.spool.status().is_stalled());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(second.await.unwrap(), Err(AppendError::Unavailable));
    owner.execute_batch("ROLLBACK").unwrap();
    eventually(|| opened.spool.status().ledger().confirmed == 1 && opened.spool.status().writable()).await;
    opened.close().await;
}
