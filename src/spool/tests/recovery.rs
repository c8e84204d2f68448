//! Damaged files: every readable event is saved, the others are counted.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tempfile::TempDir;

use super::{Opened, WINDOW, deduped, event, settings};
use crate::metrics::Metrics;
use crate::spool::files::sibling;
use crate::spool::{EVENT_OVERHEAD_BYTES, Inspector, OpenError, Settlement, Spool, SpoolState, recovery};

/// The files of a spool with `count` events after a kill: some events are in the database, some in the log.
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
    for ending in ["", "-wal"] {
        std::fs::copy(sibling(&path, ending), sibling(&after, ending)).unwrap();
    }
    opened.close().await;
    (folder, after)
}

/// The names of damaged files and of unfinished recoveries.
fn remains(path: &Path) -> Vec<String> {
    let names = std::fs::read_dir(path.parent().unwrap()).unwrap();
    let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<_> =
        names.filter(|name| name.starts_with("spool.db.damaged") || name.starts_with("spool.db.recover")).collect();
    names.sort_unstable();
    names
}

fn events_in(path: &Path) -> u64 {
    let connection = rusqlite::Connection::open(path).unwrap();
    connection.query_row("SELECT count(*) FROM event", [], |row| row.get(0)).unwrap()
}

#[tokio::test]
async fn the_copy_of_an_interrupted_recovery_is_not_used() {
    let (_folder, path) = left_by_a_kill(20).await;
    recovery::request(&path);
    for ending in [".recovering", ".recovering-wal"] {
        std::fs::write(sibling(&path, ending), "half of it").unwrap();
    }
    let opened = Opened::open(&path, u64::MAX, WINDOW);
    assert_eq!(opened.spool.status().ledger().pending, 20);
    opened.close().await;
    let remains = remains(&path);
    assert!(remains.iter().all(|name| name.starts_with("spool.db.damaged")), "{remains:?}");
    assert!(remains.iter().any(|name| name.ends_with("-wal")), "{remains:?}");
}

#[tokio::test]
async fn a_recovered_file_is_put_in_place_wherever_that_was_interrupted() {
    for moved in 0..=3 {
        let (folder, path) = left_by_a_kill(20).await;
        recovery::request(&path);
        let (whole, saved) = (folder.path().join("whole"), sibling(&path, ".recovered"));
        std::fs::copy(&path, &whole).unwrap();
        std::fs::copy(sibling(&path, "-wal"), sibling(&whole, "-wal")).unwrap();
        let vacuum = format!("VACUUM INTO '{}'", saved.display());
        rusqlite::Connection::open(&whole).unwrap().execute_batch(&vacuum).unwrap();
        std::fs::write(&path, "damaged").unwrap();
        std::fs::write(sibling(&path, "-shm"), "").unwrap();
        let at = std::fs::metadata(&saved).unwrap().modified().unwrap().try_into().unwrap();
        let aside = recovery::aside(&path, at);
        for ending in &["", "-wal", "-shm"][..moved] {
            std::fs::rename(sibling(&path, ending), sibling(&aside, ending)).unwrap();
        }
        if moved == 3 {
            std::fs::remove_file(sibling(&path, ".recover")).unwrap();
        }
        let opened = Opened::open(&path, u64::MAX, WINDOW);
        assert_eq!(opened.spool.status().ledger().pending, 20, "{moved} moved");
        opened.close().await;
        assert_eq!(std::fs::read(&aside).unwrap(), b"damaged");
        assert_eq!(remains(&path).len(), 3, "{:?}", remains(&path));
    }
}

#[tokio::test]
async fn no_damaged_file_replaces_another() {
    let (_folder, path) = left_by_a_kill(20).await;
    for recoveries in 1..=3 {
        recovery::request(&path);
        let opened = Opened::open(&path, u64::MAX, WINDOW);
        assert_eq!(opened.spool.status().ledger().pending, 20);
        opened.close().await;
        let remains = remains(&path);
        let aside = remains.iter().filter(|name| !name.ends_with("-wal") && !name.ends_with("-shm"));
        let aside: Vec<_> = aside.map(|name| path.with_file_name(name)).collect();
        assert_eq!(aside.len(), recoveries, "{remains:?}");
        assert!(aside.iter().all(|aside| events_in(aside) == 20), "{remains:?}");
    }
}

#[tokio::test]
async fn damage_found_after_opening_is_recovered() {
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
async fn totals_that_are_too_small_are_counted_again() {
    let (_folder, path) = left_by_a_kill(20).await;
    rusqlite::Connection::open(&path).unwrap().execute_batch("UPDATE ledger SET bytes = 100").unwrap();
    let opened = Opened::open(&path, u64::MAX, WINDOW);
    opened.spool.settle(vec![Settlement::Confirmed(1)]).await;
    assert!(opened.end.await.is_err(), "the writer ends, so that the relay exits");
    drop(opened.spool);
    let opened = Opened::open(&path, u64::MAX, WINDOW);
    let ledger = opened.spool.status().ledger();
    assert_eq!((ledger.pending, ledger.bytes), (20, 20 * EVENT_OVERHEAD_BYTES + 30));
    opened.close().await;
}

/// The bytes of the database after a checkpoint, and the offset of the root page of the table `event`.
fn table_of_events(path: &Path) -> (Vec<u8>, usize) {
    let connection = rusqlite::Connection::open(path).unwrap();
    connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())).unwrap();
    let sql = "SELECT rootpage FROM sqlite_schema WHERE name = 'event'";
    let root: usize = connection.query_row(sql, [], |row| row.get(0)).unwrap();
    drop(connection);
    (std::fs::read(path).unwrap(), (root - 1) * 4096)
}

/// The offset of a cell of a page: an array of offsets follows the header (<https://www.sqlite.org/fileformat2.html>,
/// 1.6).
fn cell_in(bytes: &[u8], page: usize, header: usize, cell: usize) -> usize {
    let pointer = page + header + 2 * cell;
    page + usize::from(u16::from_be_bytes([bytes[pointer], bytes[pointer + 1]]))
}

/// The offset of an event's number in a leaf: after the length of the row, which takes one byte here.
fn number_in(bytes: &[u8], page: usize, cell: usize) -> usize {
    assert_eq!(bytes[page], 13, "a leaf");
    cell_in(bytes, page, 8, cell) + 1
}

/// The offset of a child of an inner page.
fn child_in(bytes: &[u8], page: usize, cell: usize) -> usize {
    assert_eq!(bytes[page], 5, "an inner page");
    let cell = cell_in(bytes, page, 12, cell);
    (u32::from_be_bytes(bytes[cell..cell + 4].try_into().unwrap()) as usize - 1) * 4096
}

#[tokio::test]
async fn two_events_with_the_same_number_are_both_saved() {
    let (_folder, path) = left_by_a_kill(10).await;
    let (mut bytes, page) = table_of_events(&path);
    let eighth = number_in(&bytes, page, 7);
    assert_eq!((bytes[number_in(&bytes, page, 6)], bytes[eighth]), (7, 8));
    bytes[eighth] = 7;
    std::fs::write(&path, bytes).unwrap();
    recovery::request(&path);
    let opened = Opened::open(&path, u64::MAX, WINDOW);
    let ledger = opened.spool.status().ledger();
    assert_eq!((ledger.pending, ledger.removed, opened.spool.status().lost()), (10, 0, 0));
    opened.close().await;
    assert_eq!(Inspector::open(&path).unwrap().verify().unwrap().problems, [""; 0]);
}

/// Events between two damaged places are saved as well.
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
    recovery::request(&path);
    let opened = Opened::open(&path, u64::MAX, WINDOW);
    let ledger = opened.spool.status().ledger();
    assert_eq!((ledger.pending, opened.spool.status().lost()), (readable, 2000 - readable));
    opened.close().await;
    assert_eq!(Inspector::open(&path).unwrap().verify().unwrap().problems, [""; 0]);
}

/// What the next relay answers when these bodies are sent again: how many are recognised, and how many were saved.
async fn sent_again(path: &Path, bodies: std::ops::Range<u64>) -> (u64, u64) {
    let opened = Opened::open(path, u64::MAX, WINDOW);
    let saved = opened.spool.status().ledger().pending;
    let mut recognised = 0;
    for body in bodies {
        let receipt = opened.spool.append(event(body.to_string()), None).await.unwrap();
        recognised += u64::from(receipt.duplicate);
    }
    opened.close().await;
    (recognised, saved)
}

/// Sent again, an event that was saved or delivered is recognised. One that was lost is taken again.
#[tokio::test]
async fn the_dedupe_window_is_recovered() {
    let (_folder, path) = left_by_a_kill(300).await;
    recovery::request(&path);
    assert_eq!(sent_again(&path, 0..300).await, (300, 300));

    // Half of the events are delivered, and a page of the others is destroyed.
    let (_folder, path) = left_by_a_kill(1000).await;
    let opened = Opened::open(&path, u64::MAX, WINDOW);
    opened.spool.settle((1..=500).map(Settlement::Confirmed).collect()).await;
    opened.close().await;
    let (mut bytes, page) = table_of_events(&path);
    let middle = child_in(&bytes, page, 2);
    bytes[middle..middle + 4096].fill(0xa5);
    std::fs::write(&path, bytes).unwrap();
    recovery::request(&path);
    let (recognised, saved) = sent_again(&path, 0..1000).await;
    assert!((400..500).contains(&saved), "{saved}");
    assert_eq!(recognised, 500 + saved);
}

/// What was destroyed of the window is made of the events.
#[tokio::test]
async fn saved_events_are_recognised_without_their_entries() {
    for damage in ["DELETE FROM seen", "UPDATE seen SET entries = x'00' WHERE last % 2 = 0", "DROP TABLE seen"] {
        let (_folder, path) = left_by_a_kill(300).await;
        rusqlite::Connection::open(&path).unwrap().execute_batch(damage).unwrap();
        recovery::request(&path);
        assert_eq!(sent_again(&path, 0..300).await, (300, 300), "{damage}");
    }
}

/// After millions of deliveries and without totals, nothing shows where the numbers begin.
#[tokio::test]
async fn readable_events_are_found_however_high_their_numbers_are() {
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
    recovery::request(&path);
    let opened = Opened::open(&path, u64::MAX, WINDOW);
    let pending = opened.spool.status().ledger().pending;
    assert!((900..1000).contains(&pending) && opened.spool.status().lost() > 0, "{pending}");
    opened.close().await;
}

/// A made-up number hides neither the events behind it nor the event that has that number.
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
    recovery::request(&path);
    let opened = Opened::open(&path, u64::MAX, WINDOW);
    let status = opened.spool.status();
    assert_eq!((status.ledger().pending, status.lost()), (300 - destroyed, destroyed));
    opened.close().await;
}

#[tokio::test]
async fn impossible_numbers_are_skipped() {
    for (number, ledger) in [(i64::MAX, true), (0, true), (i64::MAX, false), (0, false)] {
        let (_folder, path) = left_by_a_kill(20).await;
        let damaged = rusqlite::Connection::open(&path).unwrap();
        damaged.execute("UPDATE event SET seq = ?1 WHERE seq = 20", [number]).unwrap();
        if !ledger {
            damaged.execute("UPDATE ledger SET accepted = ?1, removed = ?1", [i64::MAX]).unwrap();
        }
        drop(damaged);
        recovery::request(&path);
        let opened = Opened::open(&path, u64::MAX, WINDOW);
        assert_eq!((opened.spool.status().ledger().pending, opened.spool.status().lost()), (19, 1), "{number}");
        assert!(opened.spool.append(event("one more"), None).await.unwrap().seq < 100);
        opened.close().await;
    }
}

#[tokio::test]
async fn without_totals_delivered_events_do_not_count_as_lost() {
    let (_folder, path) = left_by_a_kill(20).await;
    let opened = Opened::open(&path, u64::MAX, WINDOW);
    opened.spool.settle((1..=10).map(Settlement::Confirmed).collect()).await;
    opened.spool.settle(vec![Settlement::Parked { seq: 11, reason: "no queue".to_owned() }]).await;
    opened.close().await;
    rusqlite::Connection::open(&path).unwrap().execute_batch("DELETE FROM ledger").unwrap();
    recovery::request(&path);
    let opened = Opened::open(&path, u64::MAX, WINDOW);
    let ledger = opened.spool.status().ledger();
    assert_eq!((ledger.accepted, ledger.confirmed, ledger.pending, ledger.parked), (20, 10, 9, 1));
    assert_eq!((ledger.removed, opened.spool.status().lost()), (0, 0));
    opened.close().await;
}

/// A lock of another process must not make the events count as unreadable.
#[tokio::test]
async fn a_damaged_file_that_is_locked_does_not_count_as_empty() {
    let (_folder, path) = left_by_a_kill(20).await;
    recovery::request(&path);
    let owner = rusqlite::Connection::open(&path).unwrap();
    owner.execute_batch("PRAGMA locking_mode = EXCLUSIVE; BEGIN EXCLUSIVE").unwrap();
    let metrics = Arc::new(Metrics::new());
    let refused = Spool::open(&settings(&path, u64::MAX), &deduped(WINDOW), None, metrics).map(|_| ()).unwrap_err();
    assert!(matches!(refused, OpenError::Sqlite { .. }), "{refused}");
    owner.execute_batch("ROLLBACK").unwrap();
    drop(owner);
    assert_eq!(remains(&path), ["spool.db.recover"]);
    // Events that are about to be copied cannot be removed.
    assert_eq!(SpoolState::of(&path), SpoolState::Damaged);
    let refused = Inspector::open_for_change(&path).map(|_| ()).unwrap_err();
    assert!(matches!(refused, OpenError::Damaged { .. }), "{refused}");
    let opened = Opened::open(&path, u64::MAX, WINDOW);
    assert_eq!(opened.spool.status().ledger().pending, 20);
    opened.close().await;
}
