//! What can go wrong with a spool, one type for each operation.

use std::path::PathBuf;

use rusqlite::ErrorCode;
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
    Companions { path: PathBuf, source: rusqlite::Error },
    #[error("a relay uses {path} under another name (a hard link): set spool.path to that name")]
    OtherName { path: PathBuf },
    #[error("{path} is damaged; the relay recovers it when it starts: try again afterwards")]
    Damaged { path: PathBuf },
    #[error("{path} cannot be used as a spool")]
    Sqlite { path: PathBuf, source: rusqlite::Error },
    #[error("{path} is an SQLite file, but not a spool of prism-relay")]
    Foreign { path: PathBuf },
    #[error("{path} is on a file system without shared memory, such as NFS; a spool needs a local disk")]
    NoWal { path: PathBuf },
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
pub struct ReadError(#[from] rusqlite::Error);

impl ReadError {
    /// Whether the file itself is damaged, so that trying again cannot help.
    pub fn is_damage(&self) -> bool {
        is_damage(&self.0)
    }
}

/// The spool could not be changed.
#[derive(Debug, Error)]
#[error("cannot change the spool")]
pub struct ChangeError(#[from] rusqlite::Error);

/// Whether there may be no room. SQLite reports an exhausted quota as a disk error.
pub(super) fn may_lack_space(cause: &rusqlite::Error) -> bool {
    matches!(cause.sqlite_error_code(), Some(ErrorCode::DiskFull | ErrorCode::SystemIoFailure))
}

/// Whether SQLite reports damage of the file, as opposed to a disk that is full or away.
pub(super) fn is_damage(error: &rusqlite::Error) -> bool {
    use rusqlite::Error::{FromSqlConversionFailure, IntegralValueOutOfRange, InvalidColumnType, QueryReturnedNoRows};
    match error {
        FromSqlConversionFailure(..) | IntegralValueOutOfRange(..) | InvalidColumnType(..) | QueryReturnedNoRows => {
            true
        }
        error => matches!(error.sqlite_error_code(), Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase)),
    }
}
