//! A damaged spool: what can be read is saved into a new file, which takes the place of the old one when it is whole; the old one
//! is set aside under a name, and all of it is said aloud. Damage is never passed over, and whenever this is interrupted the
//! next start goes on with it.

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, chown};
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
    use rusqlite::Error::{FromSqlConversionFailure, IntegralValueOutOfRange, InvalidColumnType, QueryReturnedNoRows};
    match error {
        FromSqlConversionFailure(..) | IntegralValueOutOfRange(..) | InvalidColumnType(..) | QueryReturnedNoRows => {
            true
        }
        error => matches!(error.sqlite_error_code(), Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase)),
    }
}

/// What a damaged file gives, `None` where it is damaged. That it cannot be read at the moment is another matter.
fn readable<T>(outcome: Result<T>) -> Result<Option<T>> {
    use ErrorCode::{DatabaseCorrupt, NotADatabase, TooBig, Unknown};
    match outcome {
        Ok(value) => Ok(Some(value)),
        Err(error) => match error.sqlite_error_code() {
            // Unknown: SQL makes no sense with this schema. None: a value is not what it should be.
            Some(DatabaseCorrupt | NotADatabase | TooBig | Unknown) | None => Ok(None),
            Some(_) => Err(error),
        },
    }
}

/// The same where much is read: a sector may be lost without the disk being away.
fn readable_part<T>(outcome: Result<T>) -> Result<Option<T>> {
    use rusqlite::ffi::{SQLITE_IOERR_CORRUPTFS, SQLITE_IOERR_READ, SQLITE_IOERR_SHORT_READ};
    let code = outcome.as_ref().err().and_then(rusqlite::Error::sqlite_error).map(|error| error.extended_code);
    match code {
        Some(SQLITE_IOERR_READ | SQLITE_IOERR_SHORT_READ | SQLITE_IOERR_CORRUPTFS) => Ok(None),
        _ => readable(outcome),
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

/// Numbers that are tried one by one behind a damaged place. Each takes a microsecond or two.
const LOOKS_MAX: u64 = 1_000_000;

/// Further ahead than this of what is known to have been accepted, or ever, no number of an event can be.
const AHEAD_MAX: u64 = 1_000_000;
const NUMBER_MAX: u64 = 1 << 48;

/// Copied between two commits, so that the log of the new file stays small beside it.
const COMMIT_BYTES: u64 = 16 * 1024 * 1024;

/// Asks the next start to mend the spool.
pub(super) fn order(path: &Path) {
    match fs::write(beside(path, ORDER), b"") {
        Ok(()) => warn!("the spool is damaged: it will be mended at the next start"),
        Err(error) => warn!(%error, "the spool is damaged, and cannot be marked for mending"),
    }
}

fn is_ordered(path: &Path) -> bool {
    beside(path, ORDER).exists()
}

/// Whether the spool is being mended, or will be at the next start.
pub(super) fn is_due(path: &Path) -> bool {
    [ORDER, SAVING, SAVED].iter().any(|ending| beside(path, ending).exists())
}

/// Opens the file; if it is damaged, saves what can be saved and opens that. A file that no relay has used before is
/// left alone, whatever it is.
pub(super) fn open_or_mend(path: &Path, durability: Durability, lock: &Lock) -> Result<Store, OpenError> {
    let io = |source| OpenError::Io { path: path.to_owned(), source };
    let is_saved = beside(path, SAVED).try_exists().map_err(io)?;
    if is_saved {
        let aside = put_in_place(path).map_err(io)?;
        warn!(
            path = %path.display(),
            aside = %aside.display(),
            "the spool had been mended when the last start ended; the damaged file is kept"
        );
    }
    if !is_saved && lock.crashed() && !beside(path, "-wal").exists() {
        // SQLite makes the log when it opens the file, and removes it only when it closes it.
        if fs::metadata(path).is_ok_and(|metadata| metadata.len() > 0) {
            error!(
                path = %path.display(),
                "the write-ahead log of the spool is gone: what was accepted shortly before the last stop may be missing"
            );
        } else {
            error!(path = %path.display(), "the spool is gone: what waited in it at the last stop is missing");
        }
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
    // Of an earlier start, which was interrupted; and the reserve is for times like this.
    discard(&saving).and_then(|()| remove(&beside(path, RESERVE))).map_err(io)?;
    let saved = save(path, &saving, durability).inspect_err(|_| {
        // Room for whatever comes next; should it fail, the next try begins with it.
        let _ = discard(&saving);
    })?;
    let aside = fs::rename(&saving, beside(path, SAVED))
        .and_then(|()| sync_folder(path))
        .and_then(|()| put_in_place(path))
        .map_err(io)?;
    if !saved.all_known {
        error!("the totals of the spool could not be read: it may have held more events than were found");
    }
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
    /// Whether these are all.
    all_known: bool,
}

/// Copies what can be read into one whole file, of the same owner.
fn save(path: &Path, saving: &Path, durability: Durability) -> Result<Saved, OpenError> {
    let io = |source| OpenError::Io { path: path.to_owned(), source };
    let sqlite = |source| OpenError::Sqlite { path: path.to_owned(), source };
    let mut store = Store::open(saving, durability)?;
    store.reserve().give_up();
    let old = open_damaged(path)?;
    let saved = copy(old.as_ref(), &mut store).map_err(sqlite)?;
    store.start_log_anew().map_err(sqlite)?;
    drop(store);
    if let Ok(old) = fs::metadata(path) {
        // It is another one only where root helps out. Whoever may not change it has no need to.
        let _ = chown(saving, Some(old.uid()), Some(old.gid()));
    }
    // The log is empty now.
    ["-wal", "-shm"].into_iter().try_for_each(|ending| remove(&beside(saving, ending))).map_err(io)?;
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

/// `None` where there is nothing to read.
fn open_damaged(path: &Path) -> Result<Option<Connection>, OpenError> {
    // SQLite would throw the log of an empty file away.
    if !path.try_exists().map_err(|source| OpenError::Io { path: path.to_owned(), source })? || is_emptied(path) {
        return Ok(None);
    }
    let opening = || {
        let connection = open_read_only(path)?;
        // With it SQLite reads what there is of a file that is shorter than it should be. And all is read as of one moment.
        connection.execute_batch("PRAGMA writable_schema = ON; BEGIN")?;
        Ok(connection)
    };
    readable(opening()).map_err(|source| OpenError::Sqlite { path: path.to_owned(), source })
}

/// Copies the readable events.
fn copy(old: Option<&Connection>, store: &mut Store) -> Result<Saved> {
    let known = match old {
        // Once more, because an error of the disk may pass.
        Some(old) => readable_part(Ledger::read(old).or_else(|_| Ledger::read(old)))?,
        None => None,
    };
    let known = known.filter(|known| known.balances() && known.accepted <= NUMBER_MAX);
    let mut found = Found::default();
    store.begin(false)?;
    if let Some(old) = old {
        copy_events(old, store, known.as_ref(), &mut found)?;
    }
    let (oldest, highest) = store.numbers()?;
    let (here, mut ledger) = (found.pending + found.parked, known.unwrap_or_default());
    if known.is_none() {
        // The numbers stand for the totals: none is given twice, and what was before the oldest pending event has probably been
        // delivered. What nobody knows of is at least told of.
        let unknown = u64::from(old.is_none() || found.damage || here == 0);
        ledger.accepted = (highest + unknown).max(here + unknown);
        ledger.confirmed = oldest.saturating_sub(1).min(ledger.accepted - here - unknown);
    }
    let removed_before = ledger.removed;
    ledger.accepted = ledger.accepted.max(highest).max(here);
    ledger.confirmed = ledger.confirmed.min(ledger.accepted - here);
    ledger.removed = ledger.accepted - here - ledger.confirmed;
    (ledger.pending, ledger.parked, ledger.bytes) = (found.pending, found.parked, found.bytes);
    store.write_ledger(&ledger)?;
    // The first format has no such number, and a damaged file may not give it.
    let lost_before = old.map_or(Ok(None), |old| readable_part(lost(old)))?.unwrap_or(0);
    let unreadable = ledger.removed.saturating_sub(removed_before);
    store.set_lost(lost_before + unreadable)?;
    store.commit()?;
    Ok(Saved { events: here, unreadable, all_known: known.is_some() })
}

/// What has been copied.
#[derive(Default)]
struct Found {
    pending: u64,
    parked: u64,
    bytes: u64,
    /// Whether something could not be read.
    damage: bool,
}

/// Copies in the order of acceptance, and goes on behind each damaged place.
fn copy_events(old: &Connection, store: &mut Store, known: Option<&Ledger>, found: &mut Found) -> Result<()> {
    let sql = format!("SELECT {COLUMNS}, parked_reason FROM event WHERE seq >= ?1 ORDER BY seq");
    // Not of a part: without the schema there is nothing.
    let Some(mut statement) = readable(old.prepare(&sql))? else {
        found.damage = true;
        return Ok(());
    };
    let last = "SELECT seq FROM event ORDER BY seq DESC LIMIT 1";
    let last: Option<u64> = readable_part(old.query_row(last, [], |row| row.get(0)))?;
    let most = known.map_or(NUMBER_MAX, |known| known.accepted.saturating_add(AHEAD_MAX)).min(NUMBER_MAX);
    let highest = known.map_or(0, |known| known.accepted).max(last.unwrap_or(NUMBER_MAX)).min(most);
    let (mut next, mut looks, mut committed) = (0, 0, 0);
    while next <= highest {
        let (before, mut ended) = (next, false);
        let mut rows = statement.query([next])?;
        while let Some(row) = readable_part(rows.next())? {
            let Some(row) = row else {
                ended = true;
                break;
            };
            let (Ok(stored), Ok(parked_reason)) = (stored(row), row.get::<_, Option<String>>(8)) else {
                found.damage = true;
                continue;
            };
            if !(1..=most).contains(&stored.seq) {
                found.damage = true;
                continue;
            }
            next = next.max(stored.seq + 1);
            match store.insert(stored.seq, &stored.event) {
                // Two of one number: the damage has made one of them up.
                Err(error) if error.sqlite_error_code() == Some(ErrorCode::ConstraintViolation) => {
                    found.damage = true;
                    continue;
                }
                outcome => outcome?,
            }
            found.bytes += stored.event.body.len() as u64 + EVENT_OVERHEAD_BYTES;
            match parked_reason {
                Some(reason) => {
                    store.park(stored.seq, &reason, 0)?;
                    found.parked += 1;
                }
                None => found.pending += 1,
            }
            if found.bytes - committed >= COMMIT_BYTES {
                committed = found.bytes;
                store.commit()?;
                store.begin(false)?;
            }
        }
        if ended {
            break;
        }
        found.damage = true;
        // First from the same place again, because an error of the disk may pass; then behind it.
        looks = if next == before { looks + 1 } else { 0 };
        if looks >= LOOKS_MAX {
            looks = 0;
            let Some(behind) = behind(old, next, highest.min(last.unwrap_or(highest)))? else { break };
            next = behind;
        } else if looks > 0 {
            next += 1;
        }
    }
    Ok(())
}

/// Where something can be read again after a long damage, if there is anything up to the highest number: one further, two, four, and
/// then from the first such place back to the damage.
fn behind(old: &Connection, damaged: u64, highest: u64) -> Result<Option<u64>> {
    let sql = "SELECT seq FROM event WHERE seq >= ?1 ORDER BY seq LIMIT 1";
    let mut look = old.prepare(sql)?;
    let mut is_there = |number: u64| -> Result<bool> {
        let found: Option<u64> = readable_part(look.query_row([number], |row| row.get(0)))?;
        Ok(found.is_some())
    };
    let mut steps = (0..48).map(|step| damaged + (1 << step)).take_while(|number| *number < highest).chain([highest]);
    let mut there = loop {
        match steps.next() {
            None => return Ok(None),
            Some(number) if is_there(number)? => break number,
            Some(_) => {}
        }
    };
    let mut not_there = damaged;
    while there - not_there > 1 {
        let middle = not_there + (there - not_there) / 2;
        *(if is_there(middle)? { &mut there } else { &mut not_there }) = middle;
    }
    Ok(Some(there))
}
