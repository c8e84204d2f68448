//! Which files a relay uses, and which it leaves alone.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tempfile::TempDir;

use super::{Opened, WINDOW, deduped, event, settings};
use crate::metrics::Metrics;
use crate::spool::files::{resolve, sibling};
use crate::spool::{Inspector, OpenError, Spool, SpoolState};

fn open(path: &Path) -> Result<(), OpenError> {
    Spool::open(&settings(path, 1), &deduped(WINDOW), None, Arc::new(Metrics::new())).map(|_| ())
}

/// The names of the files next to a spool, in order.
fn names(path: &Path) -> Vec<String> {
    let names = fs::read_dir(path.parent().unwrap()).unwrap();
    let mut names: Vec<_> = names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort_unstable();
    names
}

#[tokio::test]
async fn every_file_of_a_spool_is_private() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("data/spool.db");
    let opened = Opened::open(&path, 1 << 20, WINDOW);
    opened.spool.append(event("a"), None).await.unwrap();
    opened.spool.recover_at_next_start();
    let expected = ["spool.db", "spool.db-shm", "spool.db-wal", "spool.db.recover", "spool.db.reserve"];
    assert_eq!(names(&path), expected);
    assert_private(&path);
    opened.close().await;
    // The next one copies the events into a new file, and keeps the old one.
    let opened = Opened::open(&path, 1 << 20, WINDOW);
    assert!(names(&path).iter().any(|name| name.contains("damaged")));
    assert_private(&path);
    opened.close().await;
}

fn assert_private(path: &Path) {
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    for name in names(path) {
        assert_eq!(mode(&path.with_file_name(&name)), 0o600, "{name}");
    }
    assert_eq!(mode(path.parent().unwrap()), 0o700, "the folder");
}

/// Another name of the file leads to the same lock.
#[tokio::test]
async fn a_file_has_one_relay_whatever_its_name() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("spool.db");
    let [hard, soft] = ["elsewhere/hard.db", "elsewhere/soft.db"].map(|name| folder.path().join(name));
    fs::create_dir(folder.path().join("elsewhere")).unwrap();
    for state in [SpoolState::InUse, SpoolState::Idle] {
        let opened = Opened::open(&path, 1 << 20, WINDOW);
        if !hard.exists() {
            fs::hard_link(&path, &hard).unwrap();
            symlink(&path, &soft).unwrap();
        }
        if state == SpoolState::InUse {
            for name in [&path, &hard, &soft] {
                let text = open(name).unwrap_err().to_string();
                assert!(text.contains("in use by another relay") && text.contains(&std::process::id().to_string()));
                assert_eq!(SpoolState::of(name), state, "{}", name.display());
            }
            // The hard link has no log.
            assert!(matches!(Inspector::open(&hard), Err(OpenError::OtherName { .. })));
            assert!(Inspector::open(&path).is_ok() && Inspector::open(&soft).is_ok());
        }
        opened.close().await;
    }
    assert!([path, hard, soft].iter().all(|name| SpoolState::of(name) == SpoolState::Idle));
}

/// The recovered file is another one. It is locked before it gets the name of the spool.
#[tokio::test]
async fn a_recovered_spool_has_one_relay() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("spool.db");
    let opened = Opened::open(&path, 1 << 20, WINDOW);
    opened.spool.append(event("a"), None).await.unwrap();
    opened.spool.recover_at_next_start();
    opened.close().await;
    let recovered = Opened::open(&path, 1 << 20, WINDOW);
    assert_eq!(SpoolState::of(&path), SpoolState::InUse);
    assert!(matches!(open(&path), Err(OpenError::Locked { .. })));
    recovered.close().await;
}

/// SQLite puts the log next to the target of a link, so everything else has to be there as well.
#[tokio::test]
async fn the_files_are_next_to_the_target_of_a_link() {
    for target_exists in [true, false] {
        let folder = TempDir::new().unwrap();
        let (target, link) = (folder.path().join("volume/spool.db"), folder.path().join("etc/spool.db"));
        fs::create_dir(link.parent().unwrap()).unwrap();
        if target_exists {
            Opened::open(&target, 1 << 20, WINDOW).close().await;
        }
        symlink("../volume/spool.db", &link).unwrap();
        let opened = Opened::open(&link, 1 << 20, WINDOW);
        opened.spool.append(event("a"), None).await.unwrap();
        let expected = ["spool.db", "spool.db-shm", "spool.db-wal", "spool.db.reserve"];
        assert_eq!((names(&link), names(&target)), (vec!["spool.db".to_owned()], expected.map(str::to_owned).to_vec()));
        opened.close().await;
        assert_eq!(Inspector::open(&link).unwrap().ledger().unwrap().pending, 1);
    }
}

#[test]
fn a_path_is_a_file_name_and_nothing_else() {
    let here = std::env::current_dir().unwrap();
    for name in ["spool.db", "file:spool.db", ":memory:", "data/file:x.db?mode=memory"] {
        assert_eq!(resolve(Path::new(name)).unwrap(), here.join(name));
    }
    let folder = TempDir::new().unwrap();
    let link = folder.path().join("link");
    symlink("link", &link).unwrap();
    assert!(resolve(&link).unwrap_err().to_string().contains("too many symbolic links"));
}

/// Reads the file alone, as it is after a stop, without any log.
fn pending_in_the_file_alone(path: &Path) -> u64 {
    let copy = sibling(path, "-copy");
    fs::copy(path, &copy).unwrap();
    let pending = Inspector::open(&copy).unwrap().ledger().unwrap().pending;
    for suffix in ["", "-wal", "-shm"] {
        let _ = fs::remove_file(sibling(&copy, suffix));
    }
    pending
}

#[tokio::test]
async fn a_stop_leaves_everything_in_the_file_always() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("spool.db");
    for stops in 1..=8 {
        let opened = Opened::open(&path, 1 << 20, WINDOW);
        opened.spool.append(event(stops.to_string()), None).await.unwrap();
        // A query that goes on when its caller is gone, as at a stop.
        let reader = opened.spool.reader.clone();
        let (begun, begins) = std::sync::mpsc::channel();
        let query = tokio::spawn(async move {
            let slow = move |connection: &rusqlite::Connection| {
                begun.send(()).unwrap();
                // Long, and does not read the file, so that nothing but this query keeps the connection open.
                let sql = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 300000)
                           SELECT count(*) FROM n";
                Ok(connection.query_row(sql, [], |row| row.get::<_, u64>(0))?)
            };
            reader.run(slow).await
        });
        tokio::task::spawn_blocking(move || begins.recv().unwrap()).await.unwrap();
        query.abort();
        opened.close().await;
        assert_eq!(names(&path), ["spool.db", "spool.db.reserve"], "after stop {stops}");
        assert_eq!(pending_in_the_file_alone(&path), stops);
    }
}

/// An idle `sqlite3` keeps the log open, and nothing is in it.
#[tokio::test]
async fn a_stop_leaves_everything_in_the_file_although_another_process_has_it_open() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("spool.db");
    let opened = Opened::open(&path, 1 << 20, WINDOW);
    let idle = rusqlite::Connection::open(&path).unwrap();
    idle.execute_batch("SELECT count(*) FROM event").unwrap();
    opened.spool.append(event("a"), None).await.unwrap();
    opened.close().await;
    assert_eq!(fs::metadata(sibling(&path, "-wal")).unwrap().len(), 0);
    assert_eq!(pending_in_the_file_alone(&path), 1);
    drop(idle);
    assert_eq!(found(&path).await, (1, 0));
}

/// Then the log stays, and the next relay goes on with it.
#[tokio::test]
async fn a_stop_does_not_wait_forever_for_a_process_that_reads() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("spool.db");
    let opened = Opened::open(&path, 1 << 20, WINDOW);
    let reader = rusqlite::Connection::open(&path).unwrap();
    reader.execute_batch("BEGIN; SELECT count(*) FROM event").unwrap();
    opened.spool.append(event("a"), None).await.unwrap();
    opened.close().await;
    assert!(sibling(&path, "-wal").exists());
    let opened = Opened::open(&path, 1 << 20, WINDOW);
    assert_eq!((opened.spool.status().ledger().pending, opened.spool.status().lost()), (1, 0));
    drop(reader);
    opened.close().await;
    assert_eq!(names(&path), ["spool.db", "spool.db.reserve"]);
}

/// The files of a running spool with `events` events, as a kill leaves them, under another name.
async fn left_by_a_kill(folder: &Path, events: usize) -> PathBuf {
    let (running, left) = (folder.join("running.db"), folder.join("left.db"));
    let opened = Opened::open(&running, 1 << 20, WINDOW);
    for number in 0..events {
        opened.spool.append(event(number.to_string()), None).await.unwrap();
    }
    for suffix in ["", "-wal"] {
        fs::copy(sibling(&running, suffix), sibling(&left, suffix)).unwrap();
    }
    opened.close().await;
    left
}

/// What the next relay finds: pending events, and events that count as lost.
async fn found(path: &Path) -> (u64, u64) {
    let opened = Opened::open(path, 1 << 20, WINDOW);
    let found = (opened.spool.status().ledger().pending, opened.spool.status().lost());
    assert!(opened.spool.status().ledger().balances());
    opened.close().await;
    assert_eq!(Inspector::open(path).unwrap().verify().unwrap().problems, [""; 0]);
    found
}

#[tokio::test]
async fn a_lost_log_counts_as_a_loss() {
    let folder = TempDir::new().unwrap();
    let path = left_by_a_kill(folder.path(), 3).await;
    fs::remove_file(sibling(&path, "-wal")).unwrap();
    assert_eq!(found(&path).await, (0, 1));
    assert_eq!(found(&path).await, (0, 1), "reported once");
}

#[tokio::test]
async fn a_log_that_another_process_merged_is_not_lost() {
    let folder = TempDir::new().unwrap();
    let path = left_by_a_kill(folder.path(), 3).await;
    // The last process to close the file copies the log into it and deletes the log.
    let mut inspector = Inspector::open_for_change(&path).unwrap();
    assert!(inspector.remove_seq(2).unwrap());
    drop(inspector);
    assert!(!sibling(&path, "-wal").exists());
    assert_eq!(found(&path).await, (2, 0));
    let path = left_by_a_kill(folder.path(), 3).await;
    rusqlite::Connection::open(&path).unwrap().execute_batch("SELECT * FROM ledger").unwrap();
    assert!(!sibling(&path, "-wal").exists());
    assert_eq!(found(&path).await, (3, 0));
}

#[tokio::test]
async fn a_kill_alone_loses_nothing() {
    let folder = TempDir::new().unwrap();
    let path = left_by_a_kill(folder.path(), 3).await;
    assert_eq!(found(&path).await, (3, 0));
    assert_eq!(found(&path).await, (3, 0), "after a stop");
}

/// The log is copied into the file every few MiB. Later commits are only in the log again.
#[tokio::test]
async fn a_log_that_was_copied_can_be_lost_as_well() {
    let folder = TempDir::new().unwrap();
    let (path, left) = (folder.path().join("spool.db"), folder.path().join("left.db"));
    let opened = Opened::open(&path, 1 << 30, WINDOW);
    for number in 0..40u8 {
        opened.spool.append(event(vec![number; 200_000]), None).await.unwrap();
    }
    opened.spool.flush().await;
    fs::copy(&path, &left).unwrap();
    opened.close().await;
    let (pending, lost) = found(&left).await;
    assert!((1..40).contains(&pending) && lost == 1, "{pending} pending, {lost} lost");
}

/// The log restarts when a failed commit is over. Later commits are only in the log again.
#[tokio::test]
async fn a_log_that_was_restarted_can_be_lost_as_well() {
    let folder = TempDir::new().unwrap();
    let (path, left) = (folder.path().join("spool.db"), folder.path().join("left.db"));
    let opened = Opened::open(&path, 1 << 30, WINDOW);
    opened.spool.append(event("before"), None).await.unwrap();
    let meddler = rusqlite::Connection::open(&path).unwrap();
    meddler.execute_batch("CREATE TRIGGER no BEFORE INSERT ON event BEGIN SELECT RAISE(ABORT, 'no'); END").unwrap();
    opened.spool.append(event("during"), None).await.unwrap_err();
    meddler.execute_batch("DROP TRIGGER no").unwrap();
    drop(meddler);
    opened.spool.append(event("after"), None).await.unwrap();
    fs::copy(&path, &left).unwrap();
    opened.close().await;
    assert_eq!(found(&left).await, (1, 1), "the event before is in the file");
}

#[tokio::test]
async fn files_that_are_not_a_spool_are_left_alone() {
    let folder = TempDir::new().unwrap();
    let open = |name: &str| open(&folder.path().join(name)).unwrap_err();
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
