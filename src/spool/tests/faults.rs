//! What the writer makes of a disk that fails, of files that are deleted, and of other processes.

use rusqlite::Connection;
use tempfile::TempDir;

use super::{Opened, WINDOW, event, eventually};
use crate::spool::Condition;

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
