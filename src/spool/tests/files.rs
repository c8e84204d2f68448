//! Which files a relay uses, and which it leaves alone.

use std::sync::Arc;

use tempfile::TempDir;

use super::{Opened, WINDOW, deduped, event, settings};
use crate::metrics::Metrics;
use crate::spool::{OpenError, Spool, SpoolState};

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
async fn files_that_are_not_a_spool_are_left_alone() {
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
