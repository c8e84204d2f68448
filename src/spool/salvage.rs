//! A damaged spool: what can be read is saved into a new file, which takes the place of the old one when it is whole; the old one
//! is set aside under a name, and all of it is said aloud. Damage is never passed over, and whenever this is interrupted the
//! next start goes on with it.

use std::fs;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, chown};
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::Timestamp;
use rusqlite::{Connection, ErrorCode, Result, Row};
use tracing::{error, warn};

use super::files::{Lock, RESERVE, beside, sync_folder};
use super::reader::{COLUMNS, open_read_only, stored_at_least};
use super::store::{Store, lost};
use super::{EVENT_OVERHEAD_BYTES, Ledger, OpenError, Stored};
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

/// What a damaged file gives, `None` where it is damaged. That it cannot be read at the moment is another matter; whether the disk
/// is there [`is_there`] tells.
fn readable<T>(outcome: Result<T>) -> Result<Option<T>> {
    use ErrorCode::{DatabaseCorrupt, NotADatabase, SystemIoFailure, TooBig, Unknown};
    use rusqlite::ffi::{SQLITE_IOERR_READ, SQLITE_IOERR_SHORT_READ};
    match outcome {
        Ok(value) => Ok(Some(value)),
        Err(error) => match error.sqlite_error().map(|error| (error.code, error.extended_code)) {
            // Unknown: SQL makes no sense with this schema. None: a value is not what it should be.
            Some((DatabaseCorrupt | NotADatabase | TooBig | Unknown, _)) | None => Ok(None),
            // A sector is lost, or the file ends too early.
            Some((SystemIoFailure, SQLITE_IOERR_READ | SQLITE_IOERR_SHORT_READ)) => Ok(None),
            Some(_) => Err(error),
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

/// Looks in vain at single numbers. Each takes a microsecond or two.
const LOOKS_MAX: u64 = 3_000_000;

/// So far from the events that were found others are looked for, where nothing tells how many there were.
const AROUND: u64 = 200_000;

/// Further ahead than this of what is known to have been accepted, or ever, no number of an event can be.
const AHEAD_MAX: u64 = 1_000_000;
const NUMBER_MAX: u64 = 1 << 48;

/// Numbers that are kept in mind, because the damage may have given their events other ones.
const FREE_MAX: usize = 1000;

/// What cannot be read is read again, so often and after so long, as long as that finds more.
const ROUNDS: u32 = 5;
const PAUSE: Duration = Duration::from_secs(1);

/// A disk with more bad places than this, each of so many bytes, is away or near its end: nothing is set aside then.
const BAD_MAX: u32 = 64;
const PLACE_BYTES: u64 = 64 * 1024;

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
            // That SQL makes no sense with the schema is damage, where a relay has used the file before.
            Err(OpenError::Sqlite { source, .. })
                if lock.is_old() && (is_damage(&source) || source.sqlite_error_code() == Some(ErrorCode::Unknown)) =>
            {
                source.to_string()
            }
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
    let saved = save_patiently(path, &saving, durability).inspect_err(|_| {
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
    /// Whether something could not be read.
    damage: bool,
}

/// An error of the disk may pass, and SQLite tells it as damage. So what seems to be damaged is read again.
fn save_patiently(path: &Path, saving: &Path, durability: Durability) -> Result<Saved, OpenError> {
    let io = |source| OpenError::Io { path: path.to_owned(), source };
    let mut saved = save(path, saving, durability)?;
    for _ in 0..ROUNDS {
        if !saved.damage {
            break;
        }
        is_there(path).map_err(io)?;
        std::thread::sleep(PAUSE);
        let before = saved.events;
        discard(saving).map_err(io)?;
        saved = save(path, saving, durability)?;
        if saved.events <= before {
            break;
        }
    }
    Ok(saved)
}

/// Reads the whole file past SQLite: an error if it has many bad places.
fn is_there(path: &Path) -> io::Result<()> {
    let Ok(length) = fs::metadata(path).map(|metadata| metadata.len()) else { return Ok(()) };
    let (file, mut bad) = (fs::File::open(path)?, 0);
    let mut place = vec![0; PLACE_BYTES as usize];
    for at in (0..length).step_by(PLACE_BYTES as usize) {
        if let Err(error) = file.read_at(&mut place, at) {
            bad += 1;
            // The first place has what everything else hangs on.
            if at == 0 || bad > BAD_MAX {
                return Err(error);
            }
        }
    }
    Ok(())
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
        Some(old) => readable(Ledger::read(old).or_else(|_| Ledger::read(old)))?,
        None => None,
    };
    let known = known.filter(|known| known.balances() && known.accepted <= NUMBER_MAX);
    let most = known.map_or(NUMBER_MAX, |known| known.accepted.saturating_add(AHEAD_MAX)).min(NUMBER_MAX);
    let mut found = Found { most, ..Found::default() };
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
    let lost_before = old.map_or(Ok(None), |old| readable(lost(old)))?.unwrap_or(0).min(removed_before);
    let unreadable = ledger.removed.saturating_sub(removed_before);
    store.set_lost(lost_before + unreadable)?;
    store.commit()?;
    let damage = found.damage || known.is_none();
    Ok(Saved { events: here, unreadable, all_known: known.is_some(), damage })
}

/// What has been copied.
#[derive(Default)]
struct Found {
    pending: u64,
    parked: u64,
    bytes: u64,
    /// Whether something could not be read.
    damage: bool,
    /// No number can be higher.
    most: u64,
    committed: u64,
    /// Events whose number another one has: the damage has made one of the two up.
    homeless: Vec<(Stored, Option<String>)>,
}

impl Found {
    /// Copies the event of a row. Returns its number, if it is one.
    fn take(&mut self, row: &Row<'_>, store: &mut Store) -> Result<Option<u64>> {
        let (Ok(stored), parked_reason) = (stored_at_least(row), row.get(8).unwrap_or(None)) else {
            self.damage = true;
            return Ok(None);
        };
        let seq = stored.seq;
        if !(1..=self.most).contains(&seq) {
            self.damage = true;
            return Ok(None);
        }
        match self.keep(&stored, parked_reason.as_deref(), store) {
            Err(error) if error.sqlite_error_code() == Some(ErrorCode::ConstraintViolation) => {
                // It may have been seen before.
                if store.id(seq)? != Some(stored.event.id) {
                    self.homeless.push((stored, parked_reason));
                }
            }
            outcome => outcome?,
        }
        Ok(Some(seq))
    }

    fn keep(&mut self, stored: &Stored, parked_reason: Option<&str>, store: &mut Store) -> Result<()> {
        let Stored { seq, event } = stored;
        store.insert(*seq, event)?;
        self.bytes += event.body.len() as u64 + EVENT_OVERHEAD_BYTES;
        match parked_reason {
            Some(reason) => {
                store.park(*seq, reason, 0)?;
                self.parked += 1;
            }
            None => self.pending += 1,
        }
        if self.bytes - self.committed >= COMMIT_BYTES {
            self.committed = self.bytes;
            store.commit()?;
            store.begin(false)?;
        }
        Ok(())
    }
}

/// Copies from the front to the damage, from the back to the damage, and what can be found in between by its number.
fn copy_events(old: &Connection, store: &mut Store, known: Option<&Ledger>, found: &mut Found) -> Result<()> {
    let columns = format!("SELECT {COLUMNS}, parked_reason FROM event");
    let (front, back) = (format!("{columns} ORDER BY seq"), format!("{columns} ORDER BY seq DESC"));
    if copy_rows(old, &front, 0, store, found)? && !found.damage && found.homeless.is_empty() {
        return Ok(());
    }
    found.damage = true;
    // What the front has given comes again, unless it is the whole of it.
    let (_, reached) = store.numbers()?;
    copy_rows(old, &back, reached, store, found)?;

    // Not of a part: without the schema there is nothing.
    let Some(mut one) = readable(old.prepare(&format!("{columns} WHERE seq = ?1")))? else { return Ok(()) };
    let (first, last) = store.range()?.unwrap_or_else(|| {
        let end = known.map_or(1, |known| known.accepted.max(1));
        (end + 1, end)
    });
    let last = known.map_or(last.saturating_add(AROUND), |known| known.accepted.max(last)).min(found.most);
    let (mut free, mut in_vain) = (Vec::new(), 0);
    let mut gaps = store.gaps(first.saturating_sub(AROUND).max(1), last)?;
    // A long one is more likely none: a number that the damage has made up lies at one of its ends.
    gaps.sort_by_key(|(from, to)| to - from);
    for (from, to) in gaps {
        for seq in from..=to {
            match one.query_one([seq], |row| Ok(found.take(row, store))) {
                Ok(taken) if taken.as_ref().is_ok_and(Option::is_some) => continue,
                Ok(taken) => _ = taken?,
                Err(error) => _ = readable(Err::<(), _>(error))?,
            }
            in_vain += 1;
            if free.len() < FREE_MAX {
                free.push(seq);
            }
            if in_vain >= LOOKS_MAX {
                break;
            }
        }
    }
    let mut free = free.into_iter();
    for (mut stored, parked_reason) in std::mem::take(&mut found.homeless) {
        // One of the numbers that nothing was found under was its own.
        let mut own = free.next();
        while let Some(seq) = own
            && store.id(seq)?.is_some()
        {
            own = free.next();
        }
        stored.seq = own.map_or_else(|| store.numbers().map(|(_, highest)| highest + 1), Ok)?;
        found.keep(&stored, parked_reason.as_deref(), store)?;
    }
    Ok(())
}

/// Copies rows down to a number until one cannot be read. Returns whether that was all.
fn copy_rows(old: &Connection, sql: &str, down_to: u64, store: &mut Store, found: &mut Found) -> Result<bool> {
    let Some(mut statement) = readable(old.prepare(sql))? else { return Ok(false) };
    let mut rows = statement.query([])?;
    while let Some(row) = readable(rows.next())? {
        let Some(row) = row else { return Ok(true) };
        if found.take(row, store)?.is_some_and(|seq| seq <= down_to) {
            break;
        }
    }
    Ok(false)
}
