//! A damaged spool: what can be read is saved into a new file, which takes the place of the old one when it is whole; the old one
//! is set aside under a name, and all of it is said aloud. Damage is never passed over, and whenever this is interrupted the
//! next start goes on with it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use rusqlite::{Connection, ErrorCode, Result};
use tracing::{error, warn};

use super::files::{Lock, RESERVE, beside, sync_folder};
use super::reader::{COLUMNS, open_read_only, stored};
use super::store::{Store, lost};
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

/// What a damaged file gives, `None` where it is damaged. One that cannot be read at the moment is another matter.
fn readable<T>(outcome: Result<T>) -> Result<Option<T>> {
    use ErrorCode::{CannotOpen, DatabaseBusy, DatabaseLocked, OperationInterrupted, OutOfMemory, PermissionDenied};
    match outcome {
        Ok(value) => Ok(Some(value)),
        Err(error) => match error.sqlite_error_code() {
            Some(
                CannotOpen | DatabaseBusy | DatabaseLocked | OperationInterrupted | OutOfMemory | PermissionDenied,
            ) => Err(error),
            _ => Ok(None),
        },
    }
}

/// A file beside the spool with this ending asks the next start to mend the spool: the damage was found in the middle.
const ORDER: &str = ".mend";

/// What is being saved. Of no use before it is whole.
const SAVING: &str = ".mending";

/// What has been saved, whole and synced: it is to take the place of the damaged file.
const SAVED: &str = ".mended";

/// SQLite's files of one database.
const FILES: [&str; 3] = ["", "-wal", "-shm"];

/// Copied between two commits, so that the log of the new file stays small beside it.
const COMMIT_BYTES: u64 = 16 * 1024 * 1024;

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
    let is_saved = beside(path, SAVED).exists();
    if is_saved {
        let aside = put_in_place(path).map_err(|source| OpenError::Io { path: path.to_owned(), source })?;
        warn!(
            path = %path.display(),
            aside = %aside.display(),
            "the spool had been mended when the last start ended; the damaged file is kept"
        );
    }
    if !is_saved && lock.crashed() && has_lost_its_log(path) {
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

/// Saves what can be read of the file into a new one, puts that in its place, and opens it. It takes as much space again as
/// there is to save. Where it fails, the old file is as it was, or the new one is whole and the next start goes on.
pub(super) fn mend(path: &Path, durability: Durability, cause: &str) -> Result<Store, OpenError> {
    let io = |source| OpenError::Io { path: path.to_owned(), source };
    error!(path = %path.display(), cause, "the spool is damaged: saving what can be read");
    let saving = beside(path, SAVING);
    // Of an earlier start, which was interrupted.
    discard(&saving).map_err(io)?;
    let saved = save(path, &saving, durability).inspect_err(|_| {
        // Room for whatever comes next; should it fail, the next try begins with it.
        let _ = discard(&saving);
    })?;
    let aside = fs::rename(&saving, beside(path, SAVED))
        .and_then(|()| sync_folder(path))
        .and_then(|()| put_in_place(path))
        .map_err(io)?;
    warn!(
        saved = saved.events,
        unreadable = saved.unreadable,
        aside = %aside.display(),
        "the spool has been mended; unreadable events count as removed, and the damaged file is kept"
    );
    Store::open(path, durability)
}

/// How many events there were.
struct Saved {
    events: u64,
    unreadable: u64,
}

/// Copies what can be read into one whole file.
fn save(path: &Path, saving: &Path, durability: Durability) -> Result<Saved, OpenError> {
    let sqlite = |source| OpenError::Sqlite { path: saving.to_owned(), source };
    let mut store = Store::open(saving, durability)?;
    // SQLite would throw the log of an empty file away.
    let old = match path.exists() && !is_emptied(path) {
        true => readable(open_damaged(path)).map_err(sqlite)?,
        false => None,
    };
    let saved = copy(old.as_ref(), &mut store).map_err(sqlite)?;
    store.start_log_anew().map_err(sqlite)?;
    drop(store);
    // The log is empty now.
    for ending in ["-wal", "-shm", RESERVE] {
        remove(&beside(saving, ending)).map_err(|source| OpenError::Io { path: saving.to_owned(), source })?;
    }
    Ok(saved)
}

fn discard(saving: &Path) -> io::Result<()> {
    FILES.into_iter().chain([RESERVE]).try_for_each(|ending| remove(&beside(saving, ending)))
}

/// Sets the damaged file aside and renames the new one, also where that has been begun before. Under which name it was set
/// aside.
fn put_in_place(path: &Path) -> io::Result<PathBuf> {
    let saved = beside(path, SAVED);
    let aside = aside(path, fs::metadata(&saved)?.modified()?.try_into().unwrap_or(Timestamp::UNIX_EPOCH));
    for ending in FILES {
        if_there(fs::rename(beside(path, ending), beside(&aside, ending)))?;
    }
    remove(&beside(path, ORDER))?;
    // The old log must not be there when the new file comes: SQLite would take it for the new one's.
    sync_folder(path)?;
    fs::rename(saved, path)?;
    sync_folder(path)?;
    Ok(aside)
}

/// A name for the damaged file, by the time at which its events were saved: the same one when an interrupted start is gone on
/// with, and not one that is taken.
pub(super) fn aside(path: &Path, at: Timestamp) -> PathBuf {
    let name = |count: u32| {
        let more = if count > 1 { format!("-{count}") } else { String::new() };
        beside(path, &format!(".damaged-{}{more}", at.strftime("%Y%m%dT%H%M%SZ")))
    };
    let is_taken = |aside: &PathBuf| FILES.iter().any(|end| beside(path, end).exists() && beside(aside, end).exists());
    (1..).map(name).find(|aside| !is_taken(aside)).unwrap_or_else(|| name(0))
}

fn remove(path: &Path) -> io::Result<()> {
    if_there(fs::remove_file(path))
}

fn if_there(outcome: io::Result<()>) -> io::Result<()> {
    match outcome {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        outcome => outcome,
    }
}

fn open_damaged(path: &Path) -> Result<Connection> {
    let connection = open_read_only(path)?;
    // With it SQLite reads what there is of a file that is shorter than it should be.
    connection.execute_batch("PRAGMA writable_schema = ON")?;
    Ok(connection)
}

/// Copies the readable events.
fn copy(old: Option<&Connection>, store: &mut Store) -> Result<Saved> {
    let known = old.map_or(Ok(None), |old| readable(Ledger::read(old)))?;
    let mut ledger = Ledger::default();
    store.begin(false)?;
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
    // Without the old totals the numbers stand for them: none is given twice, and what was before the oldest pending event has been
    // delivered.
    let (oldest, highest) = store.numbers()?;
    let known = known.unwrap_or(Ledger { accepted: highest, confirmed: oldest.saturating_sub(1), ..Ledger::default() });
    ledger.accepted = known.accepted.max(highest);
    ledger.duplicates = known.duplicates;
    let here = ledger.pending + ledger.parked;
    ledger.confirmed = known.confirmed.min(ledger.accepted - here);
    ledger.removed = ledger.accepted - here - ledger.confirmed;
    store.write_ledger(&ledger)?;
    // The first format has no such number, and a damaged file may not give it.
    let lost_before = old.map_or(Ok(None), |old| readable(lost(old)))?.unwrap_or(0);
    let unreadable = ledger.removed.saturating_sub(known.removed);
    store.set_lost(lost_before + unreadable)?;
    store.commit()?;
    Ok(Saved { events: here, unreadable })
}

/// Copies rows until one cannot be read, or `wanted` says no.
fn copy_rows(
    old: &Connection,
    sql: &str,
    store: &mut Store,
    ledger: &mut Ledger,
    mut wanted: impl FnMut(u64) -> bool,
) -> Result<()> {
    let Some(mut statement) = readable(old.prepare(sql))? else { return Ok(()) };
    let Some(mut rows) = readable(statement.query([]))? else { return Ok(()) };
    let mut committed = ledger.bytes;
    while let Some(Some(row)) = readable(rows.next())? {
        let (Ok(stored), Ok(parked_reason)) = (stored(row), row.get::<_, Option<String>>(8)) else { continue };
        if !wanted(stored.seq) {
            break;
        }
        match store.insert(stored.seq, &stored.event) {
            // Two of one number: the damage has made one of them up.
            Err(error) if error.sqlite_error_code() == Some(ErrorCode::ConstraintViolation) => continue,
            outcome => outcome?,
        }
        ledger.bytes += stored.event.body.len() as u64 + EVENT_OVERHEAD_BYTES;
        ledger.pending += 1;
        if let Some(reason) = parked_reason {
            store.park(stored.seq, &reason, 0)?;
            ledger.pending -= 1;
            ledger.parked += 1;
        }
        if ledger.bytes - committed >= COMMIT_BYTES {
            committed = ledger.bytes;
            store.commit()?;
            store.begin(false)?;
        }
    }
    Ok(())
}
