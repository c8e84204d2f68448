//! Inspects a spool, also while a relay uses it: lists and verifies its events, removes and retries them.

use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rusqlite::{Connection, OpenFlags, OptionalExtension, Row, Transaction, TransactionBehavior};
use uuid::Uuid;

use super::delivered::Runs;
use super::error::{ChangeError, OpenError, ReadError, Result};
use super::files::{self, Lock};
use super::ledger::Ledger;
use super::mounts::check_mount;
use super::reader::{self, COLUMNS, WAITS_BEHIND, open_read_only, stored};
use super::recovery;
use super::store::{self, unusable};
use super::types::Stored;
use super::verify::{self, Verdict};

/// Finds the few parked events. Without the index SQLite would read the whole file.
const PARKED: &str = "INDEXED BY parked WHERE parked_reason IS NOT NULL";

const PARKED_WITH_ID: &str = "SELECT seq FROM event INDEXED BY parked WHERE parked_reason IS NOT NULL AND id = ?1";

/// How many parked events are changed in one transaction, so that webhooks do not wait for all of them.
const CHANGED_AT_ONCE: usize = 100;

/// How long the relay has the file between two such transactions.
const SHORTEST_TURN: Duration = Duration::from_millis(5);
const LONGEST_TURN: Duration = Duration::from_millis(150);

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

/// An open spool that a relay may be writing to. Each read is short, because the write-ahead log grows as long as one
/// takes.
pub struct Inspector {
    connection: Connection,
    is_in_use: bool,
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
    /// The parked event of the same subject that this one waits behind, if there is one.
    pub waits_behind: Option<Uuid>,
}

impl Inspector {
    /// Opens an existing spool for reading. Not for the spool of this process: see [`Self::of_running`].
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        Self::look_and_open(path, open_read_only)
    }

    /// Opens an existing spool for [`Self::remove`] and [`Self::retry`]. Not for the spool of this process: see
    /// [`Self::of_running_for_change`].
    pub fn open_for_change(path: &Path) -> Result<Self, OpenError> {
        refuse_damaged(path)?;
        Self::look_and_open(path, open_for_change)
    }

    /// Opens the spool that the relay of this process uses, for reading.
    ///
    /// Opens the file through SQLite alone: when a process closes another descriptor of it, it loses SQLite's locks of
    /// the file (<https://www.sqlite.org/howtocorrupt.html>, section 2.2). Another process with an older SQLite then
    /// takes itself for the only one, and deletes the log in use.
    pub fn of_running(path: &Path) -> Result<Self, OpenError> {
        Self::connect(path, true, open_read_only)
    }

    /// As [`Self::of_running`], for [`Self::remove`] and [`Self::retry`].
    pub fn of_running_for_change(path: &Path) -> Result<Self, OpenError> {
        refuse_damaged(path)?;
        Self::connect(path, true, open_for_change)
    }

    /// The look opens a descriptor of the file, so it comes before the connection.
    fn look_and_open(path: &Path, open: impl Fn(&Path) -> Result<Connection>) -> Result<Self, OpenError> {
        let path = &files::resolve(path).map_err(|source| OpenError::Io { path: path.to_owned(), source })?;
        // Such a file has a log elsewhere: reading it would show old events, and changing it would damage it.
        check_mount(path)?;
        let is_in_use = Lock::is_held(path);
        if is_in_use && files::has_another_name(path) && !files::sibling(path, "-wal").exists() {
            return Err(OpenError::OtherName { path: path.clone() });
        }
        Self::connect(path, is_in_use, open)
    }

    fn connect(path: &Path, is_in_use: bool, open: impl Fn(&Path) -> Result<Connection>) -> Result<Self, OpenError> {
        let connection = open(path).map_err(|source| unusable(path, source))?;
        store::check_format(&connection, path)?;
        Ok(Self { connection, is_in_use })
    }

    /// Reads the totals.
    pub fn ledger(&self) -> Result<Ledger, ReadError> {
        Ok(Ledger::read(&self.connection)?)
    }

    /// When the oldest pending event was accepted, in milliseconds since 1970.
    pub fn oldest_pending_ms(&self) -> Result<Option<i64>, ReadError> {
        Ok(reader::oldest_pending_ms(&self.connection, &Runs::default())?)
    }

    /// Calls `each` with the events in the order of acceptance, at most `limit` of them.
    pub fn each(&self, parked_only: bool, limit: u64, each: impl FnMut(Entry)) -> Result<(), ReadError> {
        Ok(list(&self.connection, parked_only, limit, each)?)
    }

    /// The event with this id, if it is still in the spool.
    pub fn find(&self, id: Uuid) -> Result<Option<Entry>, ReadError> {
        Ok(find(&self.connection, id)?)
    }

    /// When the oldest parked event was accepted, in milliseconds since 1970.
    pub fn oldest_parked_ms(&self) -> Result<Option<i64>, ReadError> {
        Ok(oldest_parked_ms(&self.connection)?)
    }

    /// The ids that begin or end with these lower-case hex digits, at most `limit` of them.
    pub fn matching(&self, digits: &str, limit: u32) -> Result<Vec<Uuid>, ReadError> {
        Ok(matching(&self.connection, digits, limit)?)
    }

    /// Checks each body against its fingerprint and the ledger against the events, in short reads. Checks the structure
    /// of the file as well if no relay uses it, because that takes one long read.
    pub fn verify(&mut self) -> Result<Verdict, ReadError> {
        Ok(verify::verify(&mut self.connection, self.is_in_use)?)
    }

    /// The number of the parked event with this id, if there is one.
    pub fn parked(&self, id: Uuid) -> Result<Option<u64>, ReadError> {
        Ok(seq_of(&self.connection, PARKED_WITH_ID, id)?)
    }

    /// Makes the relay retry a parked event in its next round. Returns whether it is parked.
    pub fn retry(&mut self, seq: u64) -> Result<bool, ChangeError> {
        Ok(self.in_turns(&[seq], thread::sleep, retry)? == [1])
    }

    /// Makes the relay retry all parked events in its next round. Returns their number.
    pub fn retry_all(&mut self) -> Result<usize, ChangeError> {
        let parked = all_parked(&self.connection)?;
        Ok(self.in_turns(&parked, thread::sleep, retry)?.into_iter().sum())
    }

    /// Removes all parked events for good if there are as many as somebody has `seen`. Returns their ids, or their
    /// number instead. Those that are parked meanwhile stay.
    pub fn remove_parked(&mut self, seen: u64) -> Result<Result<Vec<Uuid>, u64>, ChangeError> {
        let parked = all_parked(&self.connection)?;
        if parked.len() as u64 != seen {
            return Ok(Err(parked.len() as u64));
        }
        let removed = self.in_turns(&parked, thread::sleep, |transaction, some| remove(transaction, some, true))?;
        Ok(Ok(removed.concat()))
    }

    /// Changes many events, a few at a time. In between a running relay gets its turn: its writer looks for a locked
    /// file again after at most twice the time that it has waited, and at least every 100 ms (SQLite's busy handler).
    pub(super) fn in_turns<T>(
        &mut self,
        seqs: &[u64],
        mut pause: impl FnMut(Duration),
        change: impl Fn(&Transaction<'_>, &[u64]) -> Result<T>,
    ) -> Result<Vec<T>> {
        let (mut changes, mut turn) = (Vec::new(), None);
        for some in seqs.chunks(CHANGED_AT_ONCE) {
            turn.filter(|_| self.is_in_use).into_iter().for_each(&mut pause);
            let transaction = self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            let start = Instant::now();
            changes.push(change(&transaction, some)?);
            transaction.commit()?;
            turn = Some((2 * start.elapsed()).clamp(SHORTEST_TURN, LONGEST_TURN));
        }
        Ok(changes)
    }

    /// Removes an event for good. Returns whether it was there.
    pub fn remove(&mut self, id: Uuid) -> Result<bool, ChangeError> {
        // Searched before the write lock is taken: there is no index by id, and the relay would wait for the search.
        seq_of(&self.connection, "SELECT seq FROM event WHERE id = ?1", id)?
            .map_or(Ok(false), |seq| self.remove_seq(seq))
    }

    /// Removes an event by its number. Returns whether it was there.
    pub fn remove_seq(&mut self, seq: u64) -> Result<bool, ChangeError> {
        Ok(!self
            .in_turns(&[seq], thread::sleep, |transaction, some| remove(transaction, some, false))?
            .concat()
            .is_empty())
    }
}

pub(super) fn open_for_change(path: &Path) -> Result<Connection> {
    let connection = Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_WRITE)?;
    connection.busy_timeout(store::BUSY_TIMEOUT)?;
    // A removal has to survive a power loss, as an acceptance does. The relay copies the log, because it has to see the
    // errors.
    connection.execute_batch("PRAGMA synchronous = FULL; PRAGMA wal_autocheckpoint = 0")?;
    Ok(connection)
}

/// The events of a damaged spool may be being copied right now.
fn refuse_damaged(path: &Path) -> Result<(), OpenError> {
    let resolved = files::resolve(path).unwrap_or(path.to_owned());
    if recovery::is_due(&resolved) { Err(OpenError::Damaged { path: path.to_owned() }) } else { Ok(()) }
}

fn list(connection: &Connection, parked_only: bool, limit: u64, mut each: impl FnMut(Entry)) -> Result<()> {
    let filter = if parked_only { PARKED } else { "" };
    let columns = format!("{COLUMNS}, parked_reason, tried_ms, {WAITS_BEHIND}");
    let sql = format!("SELECT {columns} FROM event {filter} ORDER BY seq LIMIT ?1");
    let mut statement = connection.prepare(&sql)?;
    let mut rows = statement.query([limit])?;
    while let Some(row) = rows.next()? {
        each(entry(row)?);
    }
    Ok(())
}

fn find(connection: &Connection, id: Uuid) -> Result<Option<Entry>> {
    let sql = format!("SELECT {COLUMNS}, parked_reason, tried_ms, {WAITS_BEHIND} FROM event WHERE id = ?1");
    Ok(connection.query_row(&sql, [id.as_bytes()], entry).optional()?)
}

fn oldest_parked_ms(connection: &Connection) -> Result<Option<i64>> {
    let sql = format!("SELECT min(accepted_ms) FROM event {PARKED}");
    Ok(connection.query_row(&sql, [], |row| row.get(0))?)
}

fn matching(connection: &Connection, digits: &str, limit: u32) -> Result<Vec<Uuid>> {
    let sql = "SELECT id FROM event
               WHERE substr(lower(hex(id)), 1, length(?1)) = ?1 OR substr(lower(hex(id)), -length(?1)) = ?1
               ORDER BY seq LIMIT ?2";
    let mut statement = connection.prepare(sql)?;
    let ids = statement.query_map((digits, limit), |row| Ok(Uuid::from_bytes(row.get(0)?)))?;
    Ok(ids.collect::<rusqlite::Result<_>>()?)
}

fn seq_of(connection: &Connection, sql: &str, id: Uuid) -> Result<Option<u64>> {
    Ok(connection.query_row(sql, [id.as_bytes()], |row| row.get(0)).optional()?)
}

/// The numbers of all parked events, in one read.
pub(super) fn all_parked(connection: &Connection) -> Result<Vec<u64>> {
    let mut statement = connection.prepare(&format!("SELECT seq FROM event {PARKED}"))?;
    let mut seqs = statement.query_map([], |row| row.get(0))?.collect::<rusqlite::Result<Vec<_>>>()?;
    seqs.sort_unstable();
    Ok(seqs)
}

/// Makes these events due again, as far as they are parked. Returns their number.
pub(super) fn retry(transaction: &Transaction<'_>, seqs: &[u64]) -> Result<usize> {
    let mut retried = 0;
    for seq in seqs {
        let sql = "UPDATE event SET tried_ms = 0 WHERE seq = ?1 AND parked_reason IS NOT NULL";
        retried += transaction.prepare_cached(sql)?.execute([seq])?;
    }
    Ok(retried)
}

/// Removes these events, or those of them that are parked. Returns their ids.
pub(super) fn remove(transaction: &Transaction<'_>, seqs: &[u64], parked_only: bool) -> Result<Vec<Uuid>> {
    let mut ledger = Ledger::read(transaction)?;
    let mut removed = Vec::new();
    for seq in seqs {
        let sql = "SELECT id FROM event WHERE seq = ?1 AND (parked_reason IS NOT NULL OR NOT ?2)";
        let id = transaction.prepare_cached(sql)?.query_row((seq, parked_only), |row| row.get(0)).optional()?;
        let Some(id) = id else { continue };
        let deleted = store::delete(transaction, *seq, *seq)?;
        ledger.take_out(&deleted)?;
        ledger.removed += deleted.events();
        removed.push(Uuid::from_bytes(id));
    }
    ledger.write(transaction)?;
    Ok(removed)
}

fn entry(row: &Row<'_>) -> rusqlite::Result<Entry> {
    let waits_behind = row.get::<_, Option<[u8; 16]>>(12)?.map(Uuid::from_bytes);
    Ok(Entry { stored: stored(row)?, parked_reason: row.get(10)?, tried_ms: row.get(11)?, waits_behind })
}
