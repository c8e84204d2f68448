//! The mark in the file by which a lost write-ahead log is noticed, and which relay has the spool.
//!
//! SQLite opens a file whose log is missing without a word: it shows an earlier state. So the relay writes
//! [`LogMark::Before`] just before it copies the log into the file, and [`LogMark::Within`] just after, which is then
//! the first commit in the log. `Before` in a file without a log shows that the log was lost. Another process that
//! copies the whole log into the file and deletes it (`sqlite3`, `spool remove`) copies `Within` as well. If the relay
//! was killed between the two marks, there is no `Within`, and such a copy is taken for a lost log.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use percent_encoding::{NON_ALPHANUMERIC, percent_encode};
use rusqlite::{Connection, OpenFlags};

use super::error::{Result, StoreError};

/// The schema of the mark.
pub(super) const SCHEMA: &str = "
    CREATE TABLE relay (                   -- the relay that has the spool
        id            INTEGER PRIMARY KEY CHECK (id = 1),
        pid           INTEGER,             -- NULL after a clean stop
        log           INTEGER NOT NULL     -- 0: the file has everything; 1: the log has more; 2: this was in the log
    ) STRICT;
    INSERT INTO relay VALUES (1, NULL, 0);
";

/// What the file, read without its log, says about its log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LogMark {
    /// Everything is in the file: after a clean stop.
    Complete,
    /// Later commits are in the log.
    Before,
    /// This is one of the commits that were in the log.
    Within,
}

impl LogMark {
    pub(super) fn read(connection: &Connection) -> Result<Self> {
        let number: i64 = connection.query_row("SELECT log FROM relay WHERE id = 1", [], |row| row.get(0))?;
        let known = [Self::Complete, Self::Before, Self::Within];
        known.into_iter().find(|mark| mark.number() == number).ok_or(StoreError::WrongTotals)
    }

    /// Writes the mark with the number of this process, or without one after a clean stop.
    pub(super) fn write(self, connection: &Connection) -> Result<()> {
        let pid = (self != Self::Complete).then(std::process::id);
        let mut statement = connection.prepare_cached("UPDATE relay SET pid = ?1, log = ?2 WHERE id = 1")?;
        statement.execute((pid, self.number()))?;
        Ok(())
    }

    fn number(self) -> i64 {
        match self {
            Self::Complete => 0,
            Self::Before => 1,
            Self::Within => 2,
        }
    }
}

/// The process that has the spool, if the file names one.
///
/// Reads the file without its log and without locks (<https://www.sqlite.org/uri.html>, `immutable`): by another name
/// the file has another log.
pub(super) fn pid(path: &Path) -> Result<Option<u32>> {
    let path = percent_encode(path.as_os_str().as_bytes(), NON_ALPHANUMERIC);
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_URI;
    let connection = Connection::open_with_flags(format!("file:{path}?immutable=1"), flags)?;
    Ok(connection.query_row("SELECT pid FROM relay WHERE id = 1", [], |row| row.get(0))?)
}
