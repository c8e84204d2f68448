//! Recovery of a damaged spool. All readable events are copied into a new file; when it is complete it takes the place
//! of the damaged one, which is kept under another name. Recovery may be interrupted at any time: the next start
//! continues it.

mod copy;

use std::fs;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, chown};
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::Timestamp;
use rusqlite::Connection;
use tracing::{error, warn};

use self::copy::{Saved, copy, readable};
use super::error::{OpenError, StoreError};
use super::files::{Lock, RESERVE, create_private, sibling, sync_folder, unless_missing};
use super::log_mark::LogMark;
use super::reader::open_read_only;
use super::settings::Durability;
use super::space;
use super::store::{BUSY_TIMEOUT, Store, unusable};

/// Suffix of an empty file that asks the next start to recover the spool. The relay creates it when it finds damage
/// while it runs.
const REQUESTED: &str = ".recover";

/// Suffix of the new file while events are copied. It is useless until it is complete.
const COPYING: &str = ".recovering";

/// Suffix of the new file when it is complete and synced, and about to take the place of the damaged one.
pub(super) const COMPLETE: &str = ".recovered";

/// Suffixes of the files that make up an SQLite database.
const FILES: [&str; 3] = ["", "-wal", "-shm"];

/// How often to read a file that seems damaged, and the pause between two reads.
const ROUNDS: u32 = 5;
const PAUSE: Duration = Duration::from_secs(1);

/// With more unreadable blocks than this, or with half of its blocks unreadable, the disk itself is failing or away,
/// and the file is left in place.
const BAD_BLOCKS_MAX: u64 = 64;
const BLOCK_BYTES: u64 = 4096;

/// Asks the next start to recover the spool.
pub(super) fn request(path: &Path) {
    match create_private(&sibling(path, REQUESTED)) {
        Ok(_) => warn!("the spool is damaged: the next start recovers it"),
        Err(error) => warn!(%error, "the spool is damaged, and its file cannot be marked for recovery"),
    }
}

/// Whether the spool is being recovered, or will be at the next start.
pub(super) fn is_due(path: &Path) -> bool {
    [REQUESTED, COPYING, COMPLETE].iter().any(|suffix| sibling(path, suffix).exists())
}

/// Opens the spool, and recovers it first if it is damaged. A damaged file that no relay has used before is an error:
/// it may be something else.
pub(super) fn open(path: &Path, durability: Durability, lock: &mut Lock) -> Result<Store, OpenError> {
    let io = |source| OpenError::Io { path: path.to_owned(), source };
    if sibling(path, COMPLETE).try_exists().map_err(io)? {
        lock.move_to(path, COMPLETE)?;
        let aside = replace(path).map_err(io)?;
        warn!(
            path = %path.display(),
            aside = %aside.display(),
            "finished the recovery that the last start began; the damaged file is kept"
        );
    } else if lock.is_new() && sibling(path, RESERVE).exists() && !is_emptied(path) {
        error!(
            path = %path.display(),
            "the spool is gone: events that were pending in it are lost, unless it was moved away on purpose"
        );
    }
    let cause = if sibling(path, REQUESTED).exists() {
        "damage was found while the relay ran".to_owned()
    } else if is_emptied(path) {
        "the file is empty, but its write-ahead log is not".to_owned()
    } else {
        let has_log = sibling(path, "-wal").exists();
        match open_store(path, durability) {
            // A schema that makes SQL invalid is damage as well, if a relay has used the file before.
            Err(OpenError::Sqlite { source, .. })
                if lock.is_old() && (source.cause().is_damage() || source.cause().is_wrong_schema()) =>
            {
                source.to_string()
            }
            Ok(mut store) => {
                if !has_log {
                    report_lost_log(path, &mut store);
                }
                return Ok(store);
            }
            Err(error) => return Err(error),
        }
    };
    recover(path, durability, &cause, lock)
}

/// Opens the file. On a full disk the reserve makes room for the index of the log and for the conversion of an older
/// spool: a relay that starts can deliver, and that makes room for the rest.
fn open_store(path: &Path, durability: Durability) -> Result<Store, OpenError> {
    let opened = match Store::open(path, durability) {
        Err(OpenError::Sqlite { source, .. })
            if source.cause().may_lack_space() && fs::remove_file(sibling(path, RESERVE)).is_ok() =>
        {
            warn!(error = %source, "the disk may be full: freed the reserve of the spool to start");
            Store::open(path, durability)
        }
        outcome => outcome,
    };
    opened.map_err(|error| match error {
        OpenError::Sqlite { path, source } if source.cause().may_lack_space() && space::is_full(&path) => {
            OpenError::NoRoom { path, source }
        }
        error => error,
    })
}

/// Reports a lost write-ahead log: the file says that later commits are in the log, and there is no log. Counts one
/// event as lost, so that metrics and alerts show it.
fn report_lost_log(path: &Path, store: &mut Store) {
    // Damage is found by those who read more.
    let (Ok(LogMark::Before), Ok(ledger)) = (store.log_mark(), store.ledger()) else { return };
    // If the disk has no room for the count, the line below is the only report.
    let _ = store.count_one_as_lost();
    error!(
        path = %path.display(),
        last = ledger.accepted,
        "the write-ahead log of the spool is gone: events accepted after the one with the number `last` may be lost, \
         and earlier ones may be delivered again. Keep spool.db and spool.db-wal together: mount their folder, not \
         the file"
    );
}

/// Copies all readable events into a new file, puts it in the place of the damaged one, and opens it. Needs as much
/// disk space as the events take. On an error either the damaged file is unchanged, or the new one is complete and the
/// next start continues.
pub(super) fn recover(path: &Path, durability: Durability, cause: &str, lock: &mut Lock) -> Result<Store, OpenError> {
    let io = |source| OpenError::Io { path: path.to_owned(), source };
    error!(path = %path.display(), cause, "the spool is damaged: copying all readable events into a new file");
    remove(&sibling(path, RESERVE)).map_err(io)?;
    let saved = copy_until_stable(path, durability).inspect_err(|_| {
        // To free the space. If this fails, the next start does it.
        let _ = discard_copy(path);
    })?;
    lock.move_to(path, COPYING)?;
    let aside = fs::rename(sibling(path, COPYING), sibling(path, COMPLETE))
        .and_then(|()| sync_folder(path))
        .and_then(|()| replace(path))
        .map_err(io)?;
    if !saved.totals_known {
        error!("the totals of the spool are unreadable: it may have held more events than were found");
    }
    if !saved.subjects_known {
        warn!(
            "what was known of some scans and predictions is unreadable: with [reconcile], the relay does not ask \
             Prism's API for their ends; prism-relay reconcile does, for those that you name"
        );
    }
    warn!(
        saved = saved.events,
        unreadable = saved.unreadable,
        aside = %aside.display(),
        "the spool was recovered; unreadable events count as removed. The damaged file is kept: \
         `sqlite3 FILE .recover` may read more of it"
    );
    Store::open(path, durability)
}

/// Reads the file until two reads give the same events: SQLite reports a disk error as damage, and a disk error may
/// pass.
fn copy_until_stable(path: &Path, durability: Durability) -> Result<Saved, OpenError> {
    let io = |source| OpenError::Io { path: path.to_owned(), source };
    let mut before = None;
    for _ in 0..ROUNDS {
        discard_copy(path).map_err(io)?;
        let saved = copy_once(path, durability)?;
        if !saved.damage {
            return Ok(saved);
        }
        check_disk(path).map_err(io)?;
        if before == Some(saved.events) {
            return Ok(saved);
        }
        before = Some(saved.events);
        std::thread::sleep(PAUSE);
    }
    Err(io(io::Error::other("repeated reads returned different data; the disk is probably failing")))
}

/// Copies the readable events into a new file of the same owner.
fn copy_once(path: &Path, durability: Durability) -> Result<Saved, OpenError> {
    let io = |source| OpenError::Io { path: path.to_owned(), source };
    let sqlite = |source: StoreError| unusable(path, source);
    let copying = sibling(path, COPYING);
    let mut store = Store::open(&copying, durability)?;
    let old = open_damaged(path)?;
    let saved = copy(old.as_ref(), &mut store).map_err(sqlite)?;
    store.truncate_log(BUSY_TIMEOUT).map_err(sqlite)?;
    drop(store);
    if let Ok(old) = fs::metadata(path) {
        // The owner differs only if root runs this; any other user may not change it and need not.
        let _ = chown(&copying, Some(old.uid()), Some(old.gid()));
    }
    // The log is empty now.
    ["-wal", "-shm"].into_iter().try_for_each(|suffix| remove(&sibling(&copying, suffix))).map_err(io)?;
    Ok(saved)
}

/// Reads the whole file without SQLite. Fails if the disk is failing or away.
fn check_disk(path: &Path) -> io::Result<()> {
    let blocks = length(path).div_ceil(BLOCK_BYTES);
    if blocks == 0 {
        return Ok(());
    }
    let (file, mut bad) = (fs::File::open(path)?, 0);
    let mut block = vec![0; BLOCK_BYTES as usize];
    for number in 0..blocks {
        if let Err(error) = file.read_at(&mut block, number * BLOCK_BYTES) {
            bad += 1;
            // Without the first block SQLite can read nothing else.
            if number == 0 || bad > BAD_BLOCKS_MAX || bad * 2 > blocks {
                return Err(error);
            }
        }
    }
    Ok(())
}

fn discard_copy(path: &Path) -> io::Result<()> {
    let copying = sibling(path, COPYING);
    FILES.into_iter().try_for_each(|suffix| remove(&sibling(&copying, suffix)))
}

/// Renames the damaged file and then the complete one, or continues doing so. Returns the new name of the damaged file.
fn replace(path: &Path) -> io::Result<PathBuf> {
    let complete = sibling(path, COMPLETE);
    let aside = aside(path, fs::metadata(&complete)?.modified()?.try_into().unwrap_or(Timestamp::UNIX_EPOCH));
    for suffix in FILES {
        unless_missing(fs::rename(sibling(path, suffix), sibling(&aside, suffix)))?;
    }
    remove(&sibling(path, REQUESTED))?;
    // The old log must be gone before the new file comes, or SQLite would apply it to the new file.
    sync_folder(path)?;
    fs::rename(complete, path)?;
    sync_folder(path)?;
    Ok(aside)
}

/// A free name for the damaged file, by the time at which its events were copied: an interrupted recovery continues
/// under the same name.
pub(super) fn aside(path: &Path, at: Timestamp) -> PathBuf {
    let name = |count: u32| {
        let more = if count > 1 { format!("-{count}") } else { String::new() };
        sibling(path, &format!(".damaged-{}{more}", at.strftime("%Y%m%dT%H%M%SZ")))
    };
    let is_taken =
        |aside: &PathBuf| FILES.iter().any(|end| sibling(path, end).exists() && sibling(aside, end).exists());
    (1..).map(name).find(|aside| !is_taken(aside)).unwrap_or_else(|| name(0))
}

/// Opens the damaged file; `None` if there is nothing to read.
fn open_damaged(path: &Path) -> Result<Option<Connection>, OpenError> {
    if !path.try_exists().map_err(|source| OpenError::Io { path: path.to_owned(), source })? || is_emptied(path) {
        return Ok(None);
    }
    let opening = || -> Result<Connection, StoreError> {
        let connection = open_read_only(path)?;
        // writable_schema lets SQLite read a file that is shorter than its header says. One transaction reads one
        // snapshot.
        connection.execute_batch("PRAGMA writable_schema = ON; BEGIN")?;
        Ok(connection)
    };
    readable(opening()).map_err(|source| unusable(path, source))
}

/// Whether the database is empty and its log is not. SQLite would take it for a new database and delete the log.
fn is_emptied(path: &Path) -> bool {
    length(path) == 0 && length(&sibling(path, "-wal")) > 0
}

fn length(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |metadata| metadata.len())
}

fn remove(path: &Path) -> io::Result<()> {
    unless_missing(fs::remove_file(path)).map(|_| ())
}
