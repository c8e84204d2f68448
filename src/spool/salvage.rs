//! A damaged spool: what can be read is saved into a new file, the old one is set aside under a name, and all of it is
//! said aloud. Damage is never passed over.

use std::fs;
use std::io;
use std::path::Path;

use rusqlite::{Connection, ErrorCode, Result};
use tracing::{error, warn};

use super::files::{Lock, beside};
use super::reader::{COLUMNS, open_read_only, stored};
use super::store::Store;
use super::{EVENT_OVERHEAD_BYTES, Ledger, OpenError};
use crate::config::Durability;

/// Whether SQLite says that the file is not what it should be, as opposed to a disk that is full or away.
pub(super) fn is_damage(error: &rusqlite::Error) -> bool {
    use rusqlite::Error::{FromSqlConversionFailure, IntegralValueOutOfRange, InvalidColumnType};
    match error {
        FromSqlConversionFailure(..) | IntegralValueOutOfRange(..) | InvalidColumnType(..) => true,
        error => matches!(error.sqlite_error_code(), Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase)),
    }
}

/// A file beside the spool with this ending asks the next start to mend the spool: the damage was found in the middle.
const ORDER: &str = ".mend";

/// Asks the next start to mend the spool.
pub(super) fn order(path: &Path) -> io::Result<()> {
    fs::write(beside(path, ORDER), b"")
}

fn is_ordered(path: &Path) -> bool {
    beside(path, ORDER).exists()
}

/// Opens the file; if it is damaged, saves what can be saved and opens that. A file that no relay has used before is
/// left alone, whatever it is.
pub(super) fn open_or_mend(path: &Path, durability: Durability, lock: &Lock) -> Result<Store, OpenError> {
    if lock.crashed() && has_lost_its_log(path) {
        error!(
            path = %path.display(),
            "the write-ahead log of the spool is gone: what was accepted shortly before the last stop may be missing"
        );
    }
    let cause = if is_ordered(path) {
        "it was found damaged while the relay ran".to_owned()
    } else if is_emptied(path) {
        "it is empty, but its write-ahead log is not".to_owned()
    } else {
        match Store::open(path, durability) {
            Err(OpenError::Sqlite { source, .. }) if lock.is_old() && is_damage(&source) => source.to_string(),
            outcome => return outcome,
        }
    };
    mend(path, durability, &cause)
}

/// SQLite makes the log when it opens the file, and removes it only when it closes it.
fn has_lost_its_log(path: &Path) -> bool {
    let has_content = fs::metadata(path).is_ok_and(|metadata| metadata.len() > 0);
    has_content && !beside(path, "-wal").exists()
}

/// SQLite would take an empty file for a new one, and throw the log away.
fn is_emptied(path: &Path) -> bool {
    let length = |path: &Path| fs::metadata(path).map_or(0, |metadata| metadata.len());
    length(path) == 0 && length(&beside(path, "-wal")) > 0
}

/// Sets the damaged file aside, copies what can be read of it, and opens the copy.
fn mend(path: &Path, durability: Durability, cause: &str) -> Result<Store, OpenError> {
    let io = |source| OpenError::Io { path: path.to_owned(), source };
    let sqlite = |source| OpenError::Sqlite { path: path.to_owned(), source };
    let aside = beside(path, &format!(".damaged-{}", jiff::Timestamp::now().strftime("%Y%m%dT%H%M%SZ")));
    error!(path = %path.display(), aside = %aside.display(), cause, "the spool is damaged: saving what can be read");
    for ending in ["", "-wal", "-shm"] {
        match fs::rename(beside(path, ending), beside(&aside, ending)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(io(error)),
            Ok(()) | Err(_) => {}
        }
    }
    let mut store = Store::open(path, durability)?;
    // SQLite would throw the log of an empty file away.
    let old = if is_emptied(&aside) { None } else { open_damaged(&aside).ok() };
    let saved = copy(old.as_ref(), &mut store).map_err(sqlite)?;
    match fs::remove_file(beside(path, ORDER)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(io(error)),
        Ok(()) | Err(_) => {}
    }
    warn!(
        saved = saved.pending + saved.parked,
        unreadable = saved.removed,
        aside = %aside.display(),
        "the spool has been mended; unreadable events count as removed, and the damaged file is kept"
    );
    Ok(store)
}

fn open_damaged(path: &Path) -> Result<Connection> {
    let connection = open_read_only(path)?;
    // With it SQLite reads what there is of a file that is shorter than it should be.
    connection.execute_batch("PRAGMA writable_schema = ON")?;
    Ok(connection)
}

/// Copies the readable events. Returns the new ledger.
fn copy(old: Option<&Connection>, store: &mut Store) -> Result<Ledger> {
    let known = old.and_then(|old| Ledger::read(old).ok());
    let mut ledger = Ledger::default();
    store.begin(true)?;
    if let Some(old) = old {
        // From the front to the damage, and from the back to the damage.
        let mut last = 0;
        let front = format!("SELECT {COLUMNS}, parked_reason FROM event ORDER BY seq");
        copy_rows(old, &front, store, &mut ledger, |seq| {
            last = seq;
            true
        })?;
        let back = format!("SELECT {COLUMNS}, parked_reason FROM event ORDER BY seq DESC");
        copy_rows(old, &back, store, &mut ledger, |seq| seq > last)?;
    }
    // Without the old totals the highest number stands for them, so that no number is given twice.
    let highest = store.highest_seq()?;
    let known = known.unwrap_or(Ledger { accepted: highest, ..Ledger::default() });
    ledger.accepted = known.accepted.max(highest);
    ledger.duplicates = known.duplicates;
    let here = ledger.pending + ledger.parked;
    ledger.confirmed = known.confirmed.min(ledger.accepted - here);
    ledger.removed = ledger.accepted - here - ledger.confirmed;
    store.write_ledger(&ledger)?;
    // The first format has no such number, and a damaged file may not give it.
    let lost_before = old.and_then(|old| super::store::lost(old).ok()).unwrap_or(0);
    store.set_lost(lost_before + ledger.removed.saturating_sub(known.removed))?;
    store.commit()?;
    Ok(ledger)
}

/// Copies rows until one cannot be read, or `wanted` says no.
fn copy_rows(
    old: &Connection,
    sql: &str,
    store: &Store,
    ledger: &mut Ledger,
    mut wanted: impl FnMut(u64) -> bool,
) -> Result<()> {
    let Ok(mut statement) = old.prepare(sql) else { return Ok(()) };
    let Ok(mut rows) = statement.query([]) else { return Ok(()) };
    while let Ok(Some(row)) = rows.next() {
        let (Ok(stored), Ok(parked_reason)) = (stored(row), row.get::<_, Option<String>>(8)) else { continue };
        if !wanted(stored.seq) {
            break;
        }
        store.insert(stored.seq, &stored.event)?;
        ledger.bytes += stored.event.body.len() as u64 + EVENT_OVERHEAD_BYTES;
        ledger.pending += 1;
        if let Some(reason) = parked_reason {
            store.park(stored.seq, &reason, 0)?;
            ledger.pending -= 1;
            ledger.parked += 1;
        }
    }
    Ok(())
}
