//! Inspects a spool, also while a relay uses it: lists and verifies its events, removes and retries them.

use std::path::{Path, PathBuf};

use rusqlite::{Connection, OpenFlags, OptionalExtension, Result, Row, TransactionBehavior};
use uuid::Uuid;

use super::error::{ChangeError, OpenError, ReadError};
use super::files::{self, Lock};
use super::ledger::Ledger;
use super::mounts::check_mount;
use super::reader::{self, COLUMNS, open_read_only, stored};
use super::recovery;
use super::store;
use super::types::{Stored, cost};

/// Finds the few parked events. Without the index SQLite would read the whole file.
const PARKED: &str = "INDEXED BY parked WHERE parked_reason IS NOT NULL";

/// Whether there is a spool, and whether a relay has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SpoolState {
    /// There is no file. Holds its folder, or the nearest one above that exists.
    Absent(PathBuf),
    /// The file is being recovered, or will be at the next start.
    Damaged,
    /// There is a spool, and no relay runs on it.
    Idle,
    /// There is a spool, and a relay runs on it.
    InUse,
}

impl SpoolState {
    /// Looks without changing anything.
    pub fn of(path: &Path) -> Self {
        let path = &files::resolve(path).unwrap_or(path.to_owned());
        if recovery::is_due(path) {
            return Self::Damaged;
        }
        if !path.exists() {
            let folder = path.ancestors().skip(1).find(|folder| folder.is_dir()).unwrap_or(Path::new("."));
            return Self::Absent(folder.to_owned());
        }
        if Lock::is_held(path) { Self::InUse } else { Self::Idle }
    }
}

/// An open spool that a relay may be writing to.
pub struct Inspector {
    connection: Connection,
}

/// An event with what the relay knows about its delivery.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The event with its number.
    pub stored: Stored,
    /// Why the broker does not take it; `None` while it is pending.
    pub parked_reason: Option<String>,
    /// The last try of a parked event, in milliseconds since 1970.
    pub tried_ms: Option<i64>,
}

/// What [`Inspector::verify`] found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// The totals in the file.
    pub ledger: Ledger,
    /// What is wrong; empty if nothing is.
    pub problems: Vec<String>,
}

impl Inspector {
    /// Opens an existing spool for reading.
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        Self::with(path, open_read_only)
    }

    /// Opens an existing spool for [`Self::remove`] and [`Self::retry`].
    pub fn open_for_change(path: &Path) -> Result<Self, OpenError> {
        // The events may be being copied right now.
        if SpoolState::of(path) == SpoolState::Damaged {
            return Err(OpenError::Damaged { path: path.to_owned() });
        }
        Self::with(path, |path| {
            let connection = Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_WRITE)?;
            connection.busy_timeout(store::BUSY_TIMEOUT)?;
            // A removal has to survive a power loss, as an acceptance does. The log belongs to the relay.
            connection.execute_batch("PRAGMA synchronous = FULL; PRAGMA wal_autocheckpoint = 0")?;
            Ok(connection)
        })
    }

    fn with(path: &Path, open: impl Fn(&Path) -> Result<Connection>) -> Result<Self, OpenError> {
        let path = &files::resolve(path).map_err(|source| OpenError::Io { path: path.to_owned(), source })?;
        // Such a file has a log elsewhere: reading it would show old events, and changing it would damage it.
        check_mount(path)?;
        if Lock::is_held(path) && files::has_another_name(path) && !files::sibling(path, "-wal").exists() {
            return Err(OpenError::OtherName { path: path.clone() });
        }
        let sqlite = |source| OpenError::Sqlite { path: path.to_owned(), source };
        let connection = open(path).map_err(sqlite)?;
        store::check_format(&connection, path)?;
        Ok(Self { connection })
    }

    /// Reads the totals.
    pub fn ledger(&self) -> Result<Ledger, ReadError> {
        Ok(Ledger::read(&self.connection)?)
    }

    /// When the oldest pending event was accepted, in milliseconds since 1970.
    pub fn oldest_pending_ms(&self) -> Result<Option<i64>, ReadError> {
        Ok(reader::oldest_pending_ms(&self.connection)?)
    }

    /// Calls `each` with the events in the order of acceptance, at most `limit` of them.
    pub fn each(&self, parked_only: bool, limit: u64, mut each: impl FnMut(Entry)) -> Result<(), ReadError> {
        let filter = if parked_only { PARKED } else { "" };
        let sql = format!("SELECT {COLUMNS}, parked_reason, tried_ms FROM event {filter} ORDER BY seq LIMIT ?1");
        let mut statement = self.connection.prepare(&sql)?;
        let mut rows = statement.query([limit])?;
        while let Some(row) = rows.next()? {
            each(entry(row)?);
        }
        Ok(())
    }

    /// The event with this id, if it is still in the spool.
    pub fn find(&self, id: Uuid) -> Result<Option<Entry>, ReadError> {
        let sql = format!("SELECT {COLUMNS}, parked_reason, tried_ms FROM event WHERE id = ?1");
        Ok(self.connection.query_row(&sql, [id.as_bytes()], entry).optional()?)
    }

    /// When the oldest parked event was accepted, in milliseconds since 1970.
    pub fn oldest_parked_ms(&self) -> Result<Option<i64>, ReadError> {
        let sql = format!("SELECT min(accepted_ms) FROM event {PARKED}");
        Ok(self.connection.query_row(&sql, [], |row| row.get(0))?)
    }

    /// The ids that begin or end with these lower-case hex digits, at most `limit` of them.
    pub fn matching(&self, digits: &str, limit: u32) -> Result<Vec<Uuid>, ReadError> {
        let sql = "SELECT id FROM event
                   WHERE substr(lower(hex(id)), 1, length(?1)) = ?1 OR substr(lower(hex(id)), -length(?1)) = ?1
                   ORDER BY seq LIMIT ?2";
        let mut statement = self.connection.prepare(sql)?;
        let ids = statement.query_map((digits, limit), |row| Ok(Uuid::from_bytes(row.get(0)?)))?;
        Ok(ids.collect::<Result<_>>()?)
    }

    /// Reads everything: checks the structure of the file, each body against its fingerprint, and the ledger against
    /// the events.
    pub fn verify(&mut self) -> Result<Verdict, ReadError> {
        // In one transaction, so that a running relay does not change the totals meanwhile.
        let transaction = self.connection.transaction()?;
        let mut problems = Vec::new();
        let mut statement = transaction.prepare("PRAGMA integrity_check(20)")?;
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            let line: String = row.get(0)?;
            if line != "ok" {
                problems.push(format!("file: {line}"));
            }
        }
        let ledger = Ledger::read(&transaction)?;
        if !ledger.balances() {
            problems.push("ledger: accepted is not confirmed + pending + parked + removed".to_owned());
        }
        let (mut pending, mut parked, mut bytes) = (0, 0, 0);
        let sql = format!("SELECT {COLUMNS}, parked_reason, tried_ms FROM event ORDER BY seq");
        let mut statement = transaction.prepare(&sql)?;
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            let Entry { stored: Stored { seq, event }, parked_reason, .. } = entry(row)?;
            *(if parked_reason.is_some() { &mut parked } else { &mut pending }) += 1;
            bytes += cost(&event.body);
            if !event.is_intact() {
                problems.push(format!("event {} (seq {seq}): the body does not match its fingerprint", event.id));
            }
            if seq > ledger.accepted {
                problems.push(format!("event {} (seq {seq}): beyond the last accepted, {}", event.id, ledger.accepted));
            }
        }
        for (name, counted, noted) in
            [("pending", pending, ledger.pending), ("parked", parked, ledger.parked), ("bytes", bytes, ledger.bytes)]
        {
            if counted != noted {
                problems.push(format!("ledger: {name} is {noted}, but there are {counted}"));
            }
        }
        Ok(Verdict { ledger, problems })
    }

    /// The number of the parked event with this id, if there is one.
    pub fn parked(&self, id: Uuid) -> Result<Option<u64>, ReadError> {
        let sql = format!("SELECT seq FROM event {PARKED} AND id = ?1");
        Ok(self.connection.query_row(&sql, [id.as_bytes()], |row| row.get(0)).optional()?)
    }

    /// Makes the relay retry a parked event in its next round. Returns whether it is parked.
    pub fn retry(&mut self, seq: u64) -> Result<bool, ChangeError> {
        let sql = "UPDATE event SET tried_ms = 0 WHERE seq = ?1 AND parked_reason IS NOT NULL";
        Ok(self.connection.execute(sql, [seq])? > 0)
    }

    /// Makes the relay retry all parked events in its next round. Returns their number.
    pub fn retry_all(&mut self) -> Result<usize, ChangeError> {
        Ok(self.connection.execute("UPDATE event SET tried_ms = 0 WHERE parked_reason IS NOT NULL", [])?)
    }

    /// Removes an event for good. Returns whether it was there.
    pub fn remove(&mut self, id: Uuid) -> Result<bool, ChangeError> {
        // Searched before the write lock is taken: there is no index by id, and the relay would wait for the search.
        let seq: Option<u64> = self
            .connection
            .query_row("SELECT seq FROM event WHERE id = ?1", [id.as_bytes()], |row| row.get(0))
            .optional()?;
        seq.map_or(Ok(false), |seq| self.remove_seq(seq))
    }

    /// Removes an event by its number. Returns whether it was there.
    pub fn remove_seq(&mut self, seq: u64) -> Result<bool, ChangeError> {
        let transaction = self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let deleted = store::delete(&transaction, seq, seq)?;
        let mut ledger = Ledger::read(&transaction)?;
        ledger.take_out(&deleted)?;
        ledger.removed += deleted.events();
        ledger.write(&transaction)?;
        transaction.commit()?;
        Ok(deleted.events() > 0)
    }
}

fn entry(row: &Row<'_>) -> Result<Entry> {
    Ok(Entry { stored: stored(row)?, parked_reason: row.get(8)?, tried_ms: row.get(9)? })
}
