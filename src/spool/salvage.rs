//! A damaged spool: what can be read is saved into a new file, which takes the place of the old one when it is whole; the old one
//! is set aside under a name, and all of it is said aloud. Damage is never passed over, and whenever this is interrupted the
//! next start goes on with it.

use std::fs;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, chown};
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::Timestamp;
use rusqlite::{Connection, ErrorCode, Result};
use tracing::{error, warn};

use super::error::{OpenError, is_damage};
use super::files::{Lock, RESERVE, sibling, sync_folder};
use super::reader::open_read_only;
use super::rescue::{Saved, copy, readable};
use super::settings::Durability;
use super::store::Store;

/// A file beside the spool with this ending asks the next start to mend the spool: the damage was found in the middle.
const ORDER: &str = ".mend";

/// What is being saved. Of no use before it is whole.
const SAVING: &str = ".mending";

/// What has been saved, whole and synced: it is to take the place of the damaged file.
const SAVED: &str = ".mended";

/// SQLite's files of one database.
const FILES: [&str; 3] = ["", "-wal", "-shm"];

/// What seems to be damaged is read at most so often, with so long in between.
const ROUNDS: u32 = 5;
const PAUSE: Duration = Duration::from_secs(1);

/// A disk with more bad places than this in the file, each of so many bytes, or where they are half of it, is away or near its end:
/// nothing is set aside then.
const BAD_MAX: u64 = 64;
const PLACE_BYTES: u64 = 4096;

/// Asks the next start to mend the spool.
pub(super) fn order(path: &Path) {
    match fs::write(sibling(path, ORDER), b"") {
        Ok(()) => warn!("the spool is damaged: it will be mended at the next start"),
        Err(error) => warn!(%error, "the spool is damaged, and cannot be marked for mending"),
    }
}

fn is_ordered(path: &Path) -> bool {
    sibling(path, ORDER).exists()
}

/// Whether the spool is being mended, or will be at the next start.
pub(super) fn is_due(path: &Path) -> bool {
    [ORDER, SAVING, SAVED].iter().any(|ending| sibling(path, ending).exists())
}

/// Opens the file; if it is damaged, saves what can be saved and opens that. A file that no relay has used before is
/// left alone, whatever it is.
pub(super) fn open_or_mend(path: &Path, durability: Durability, lock: &Lock) -> Result<Store, OpenError> {
    let io = |source| OpenError::Io { path: path.to_owned(), source };
    let is_saved = sibling(path, SAVED).try_exists().map_err(io)?;
    if is_saved {
        let aside = put_in_place(path).map_err(io)?;
        warn!(
            path = %path.display(),
            aside = %aside.display(),
            "the spool had been mended when the last start ended; the damaged file is kept"
        );
    }
    if !is_saved && lock.crashed() && !sibling(path, "-wal").exists() {
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
    length(path) == 0 && length(&sibling(path, "-wal")) > 0
}

/// Saves what can be read of the file into a new one, puts that in its place, and opens it. It takes as much space again as
/// there is to save. Where it fails, the old file is as it was, or the new one is whole and the next start goes on.
pub(super) fn mend(path: &Path, durability: Durability, cause: &str) -> Result<Store, OpenError> {
    let io = |source| OpenError::Io { path: path.to_owned(), source };
    error!(path = %path.display(), cause, "the spool is damaged: saving what can be read");
    let saving = sibling(path, SAVING);
    // It is for times like this.
    remove(&sibling(path, RESERVE)).map_err(io)?;
    let saved = save_patiently(path, &saving, durability).inspect_err(|_| {
        // Room for whatever comes next; should it fail, the next try begins with it.
        let _ = discard(&saving);
    })?;
    let aside = fs::rename(&saving, sibling(path, SAVED))
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

/// An error of the disk may pass, and SQLite tells it as damage. So what seems to be damaged is read until it gives the same twice,
/// from a disk that is there.
fn save_patiently(path: &Path, saving: &Path, durability: Durability) -> Result<Saved, OpenError> {
    let io = |source| OpenError::Io { path: path.to_owned(), source };
    let mut before = None;
    for _ in 0..ROUNDS {
        discard(saving).map_err(io)?;
        let saved = save(path, saving, durability)?;
        if !saved.damage {
            return Ok(saved);
        }
        is_there(path).map_err(io)?;
        if before == Some(saved.events) {
            return Ok(saved);
        }
        before = Some(saved.events);
        std::thread::sleep(PAUSE);
    }
    Err(io(io::Error::other("it reads differently each time: is the disk ill?")))
}

/// Reads the whole file past SQLite: an error if it has many bad places.
fn is_there(path: &Path) -> io::Result<()> {
    let Ok(length) = fs::metadata(path).map(|metadata| metadata.len()) else { return Ok(()) };
    let (file, mut bad) = (fs::File::open(path)?, 0);
    let mut place = vec![0; PLACE_BYTES as usize];
    for at in (0..length).step_by(PLACE_BYTES as usize) {
        if let Err(error) = file.read_at(&mut place, at) {
            bad += 1;
            // On the first place hangs everything else.
            if at == 0 || bad > BAD_MAX || bad * 2 > length / PLACE_BYTES {
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
    ["-wal", "-shm"].into_iter().try_for_each(|ending| remove(&sibling(saving, ending))).map_err(io)?;
    Ok(saved)
}

fn discard(saving: &Path) -> io::Result<()> {
    FILES.into_iter().chain([RESERVE]).try_for_each(|ending| remove(&sibling(saving, ending)))
}

/// Sets the damaged file aside and renames the new one, also where that has been begun before. Under which name it was set
/// aside.
fn put_in_place(path: &Path) -> io::Result<PathBuf> {
    let saved = sibling(path, SAVED);
    let aside = aside(path, fs::metadata(&saved)?.modified()?.try_into().unwrap_or(Timestamp::UNIX_EPOCH));
    for ending in FILES {
        if_there(fs::rename(sibling(path, ending), sibling(&aside, ending)))?;
    }
    remove(&sibling(path, ORDER))?;
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
        sibling(path, &format!(".damaged-{}{more}", at.strftime("%Y%m%dT%H%M%SZ")))
    };
    let is_taken =
        |aside: &PathBuf| FILES.iter().any(|end| sibling(path, end).exists() && sibling(aside, end).exists());
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
