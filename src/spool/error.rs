//! What can go wrong with a spool, one type for each operation.

use std::path::PathBuf;

use rusqlite::ErrorCode;
use rusqlite::ffi::{SQLITE_CONSTRAINT_PRIMARYKEY, SQLITE_IOERR_WRITE};
use thiserror::Error;

/// The spool could not be opened.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "the text of each error says what it is")]
pub enum OpenError {
    #[error("cannot create or open {path}")]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{path} is in use by another relay{}; each relay needs a spool.path of its own", process(*.pid))]
    Locked { path: PathBuf, pid: Option<u32> },
    #[error(
        "{path} is mounted without its folder, so its write-ahead log would be lost with {folder}: \
         mount the folder, not the file"
    )]
    Mounted { path: PathBuf, folder: PathBuf },
    #[error("cannot create or open the files next to {path}: its folder has to be writable for the relay")]
    Companions { path: PathBuf, source: FileError },
    #[error("a relay uses {path} under another name (a hard link): set spool.path to that name")]
    OtherName { path: PathBuf },
    #[error("{path} is damaged; the relay recovers it when it starts: try again afterwards")]
    Damaged { path: PathBuf },
    #[error("{path} cannot be opened, because its disk is full; its events are kept: free space there and start again")]
    NoRoom { path: PathBuf, source: FileError },
    #[error("{path} cannot be used as a spool")]
    Sqlite { path: PathBuf, source: FileError },
    #[error("{path} is an SQLite file, but not a spool of prism-relay")]
    Foreign { path: PathBuf },
    #[error("{path} is on a file system without shared memory, such as NFS; a spool needs a local disk")]
    NoWal { path: PathBuf },
    #[error(
        "{path} was written by an older prism-relay (format {found}, this one reads {known}): the relay of this \
         version converts it when it starts, with all events"
    )]
    Unconverted { path: PathBuf, found: i64, known: i64 },
    #[error("{path} was written by a newer prism-relay (format {found}, this one reads {known})")]
    Newer { path: PathBuf, found: i64, known: i64 },
    #[error(
        "{path} was written by an older prism-relay (format {found}, this one reads {known}); \
         deliver its events with that one, then move the file away"
    )]
    Older { path: PathBuf, found: i64, known: i64 },
}

impl OpenError {
    /// Whether something outside of the relay has to change before another start can succeed.
    pub fn is_misconfiguration(&self) -> bool {
        matches!(self, Self::Mounted { .. })
    }
}

/// In parentheses, after the relay that it belongs to.
fn process(pid: Option<u32>) -> String {
    pid.map(|pid| format!(" (process {pid})")).unwrap_or_default()
}

/// The event was not accepted, and will not appear later.
#[derive(Debug, Error, Clone, Copy, PartialEq, Eq)]
pub enum AppendError {
    /// The limit is reached. Deliveries go on, and make room.
    #[error("the spool is full (spool.max_bytes)")]
    Full,
    /// The disk does not take writes, or does not answer.
    #[error("the spool cannot be written")]
    Unavailable,
    /// The relay is stopping.
    #[error("the relay is shutting down")]
    Closed,
}

/// The spool could not be read.
#[derive(Debug, Error)]
#[error("cannot read the spool")]
pub struct ReadError(#[from] StoreError);

impl ReadError {
    /// Whether the file itself is damaged, so that trying again cannot help.
    pub fn is_damage(&self) -> bool {
        self.0.is_damage()
    }
}

/// The spool could not be changed.
#[derive(Debug, Error)]
#[error("cannot change the spool")]
pub struct ChangeError(#[from] StoreError);

/// Why SQLite cannot use the file.
#[derive(Debug, Error)]
#[error(transparent)]
pub struct FileError(#[from] StoreError);

impl FileError {
    pub(super) fn cause(&self) -> &StoreError {
        &self.0
    }
}

/// A failed operation on the file.
#[derive(Debug, Error)]
pub(super) enum StoreError {
    #[error(transparent)]
    Sqlite(#[from] rusqlite::Error),
    #[error("the totals do not add up")]
    WrongTotals,
    #[error("another process reads the file")]
    LogInUse,
}

pub(super) type Result<T, E = StoreError> = std::result::Result<T, E>;

/// What a failed operation says about the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// Another process holds the write lock: nothing was written.
    Locked,
    /// Another process reads the write-ahead log, which therefore cannot begin again.
    LogInUse,
    /// The disk has no room.
    NoRoom,
    /// A read, write or sync failed: any part of what was written may have reached the disk. Perhaps there is no room,
    /// because SQLite reports a quota like this.
    Io,
    /// Something else, after which any part of what was written may be in the log.
    Other,
    /// The file is damaged, so that trying again cannot help.
    Damage,
}

impl StoreError {
    pub(super) fn fault(&self) -> Fault {
        use rusqlite::Error::{FromSqlConversionFailure, IntegralValueOutOfRange, InvalidColumnType};
        let error = match self {
            Self::Sqlite(error) => error,
            Self::WrongTotals => return Fault::Damage,
            Self::LogInUse => return Fault::LogInUse,
        };
        match error {
            // A value of a type that the relay never writes.
            FromSqlConversionFailure(..) | IntegralValueOutOfRange(..) | InvalidColumnType(..) => Fault::Damage,
            error => match error.sqlite_error().map(|error| (error.code, error.extended_code)) {
                Some((ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase, _)) => Fault::Damage,
                // An event has this number already, so the totals are behind the events.
                Some((_, SQLITE_CONSTRAINT_PRIMARYKEY)) => Fault::Damage,
                Some((ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked, _)) => Fault::Locked,
                Some((ErrorCode::DiskFull, _)) => Fault::NoRoom,
                Some((ErrorCode::SystemIoFailure, _)) => Fault::Io,
                _ => Fault::Other,
            },
        }
    }

    /// Whether SQLite reports damage of the file, as opposed to a disk that is full or away.
    pub(super) fn is_damage(&self) -> bool {
        self.fault() == Fault::Damage
    }

    /// Whether a write failed for a reason that SQLite does not report, such as a quota or a file size limit.
    pub(super) fn is_failed_write(&self) -> bool {
        self.extended_code() == Some(SQLITE_IOERR_WRITE)
    }

    /// Whether there may be no room. SQLite reports an exhausted quota as a disk error.
    pub(super) fn may_lack_space(&self) -> bool {
        matches!(self.fault(), Fault::NoRoom | Fault::Io)
    }

    /// Whether SQLite cannot open one of the files.
    pub(super) fn is_refused(&self) -> bool {
        matches!(self, Self::Sqlite(error) if error.sqlite_error_code() == Some(ErrorCode::CannotOpen))
    }

    /// Whether SQLite finds the schema invalid.
    pub(super) fn is_wrong_schema(&self) -> bool {
        matches!(self, Self::Sqlite(error) if error.sqlite_error_code() == Some(ErrorCode::Unknown))
    }

    fn extended_code(&self) -> Option<i32> {
        match self {
            Self::Sqlite(error) => error.sqlite_error().map(|error| error.extended_code),
            Self::WrongTotals | Self::LogInUse => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use rusqlite::ffi::{
        self, SQLITE_BUSY, SQLITE_CORRUPT, SQLITE_FULL, SQLITE_IOERR_FSYNC, SQLITE_NOTADB, SQLITE_READONLY,
    };

    use super::*;

    #[test]
    fn each_failure_says_what_is_wrong_with_the_disk() {
        for (code, expected) in [
            (SQLITE_BUSY, Fault::Locked),
            (SQLITE_FULL, Fault::NoRoom),
            (SQLITE_IOERR_FSYNC, Fault::Io),
            (SQLITE_IOERR_WRITE, Fault::Io),
            (SQLITE_READONLY, Fault::Other),
            (SQLITE_CORRUPT, Fault::Damage),
            (SQLITE_NOTADB, Fault::Damage),
            (SQLITE_CONSTRAINT_PRIMARYKEY, Fault::Damage),
        ] {
            let error = rusqlite::Error::SqliteFailure(ffi::Error::new(code), None);
            assert_eq!(StoreError::from(error).fault(), expected, "{code}");
        }
        assert_eq!(StoreError::WrongTotals.fault(), Fault::Damage);
        assert_eq!(StoreError::LogInUse.fault(), Fault::LogInUse);
        let missing = StoreError::from(rusqlite::Error::QueryReturnedNoRows);
        assert!(!missing.is_damage(), "a row that is not found is no damage");
    }
}
