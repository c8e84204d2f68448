//! The SQLite file: its schema, its modes, and the statements that change it.

use std::ops::RangeInclusive;
use std::path::Path;
use std::time::Duration;

use rusqlite::{Connection, ErrorCode, OptionalExtension, Result};
use uuid::Uuid;

use super::dedupe::{self, EntryBytes};
use super::error::OpenError;
use super::files::{self, APPLICATION_ID, FileIdentity, Reserve};
use super::ledger::{Deleted, Ledger, wrong_totals};
use super::log_mark::{self, LogMark};
use super::settings::Durability;
use super::types::EVENT_OVERHEAD_BYTES;
use crate::event::{Event, Fingerprint};

/// The version of the schema below, raised with each change of it.
const FORMAT: i64 = 4;

/// How long to wait for another process that has locked the file, such as an operator's `sqlite3`.
pub(super) const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

const SCHEMA: &str = "
    CREATE TABLE event (
        seq           INTEGER PRIMARY KEY, -- the order of acceptance
        id            BLOB    NOT NULL,    -- UUIDv7: the message_id
        accepted_ms   INTEGER NOT NULL,    -- since 1970
        authentic     INTEGER NOT NULL,    -- 1: its signature was verified
        traceparent   TEXT,
        tracestate    TEXT,
        fingerprint   BLOB    NOT NULL,    -- SHA-256 of the body
        body          BLOB    NOT NULL,    -- as received
        parked_reason TEXT,                -- NULL: pending
        tried_ms      INTEGER              -- of a parked event: the last try
    ) STRICT;
    CREATE INDEX parked ON event (tried_ms) WHERE parked_reason IS NOT NULL;
    CREATE TABLE seen (                    -- the dedupe window, in the order of acceptance: a row for each transaction
        last          INTEGER PRIMARY KEY, -- the number of the last entry in it
        entries       BLOB    NOT NULL     -- 56 bytes each: see EntryBytes
    ) STRICT;
    CREATE TABLE ledger (                  -- accepted = confirmed + pending + parked + removed
        id            INTEGER PRIMARY KEY CHECK (id = 1),
        accepted      INTEGER NOT NULL,
        confirmed     INTEGER NOT NULL,
        pending       INTEGER NOT NULL,
        parked        INTEGER NOT NULL,
        removed       INTEGER NOT NULL,
        duplicates    INTEGER NOT NULL,
        bytes         INTEGER NOT NULL,
        touches       INTEGER NOT NULL,    -- counts transactions whose only purpose was to write something
        lost          INTEGER NOT NULL     -- of the removed ones: unreadable after damage of the file
    ) STRICT;
    INSERT INTO ledger VALUES (1, 0, 0, 0, 0, 0, 0, 0, 0, 0);
";

/// The highest number that an event or an entry can have.
pub(super) const NUMBER_MAX: u64 = 1 << 48;

/// The dedupe window as it is on disk.
pub(super) struct SeenEntries {
    /// The entries, the oldest first.
    pub entries: Vec<EntryBytes>,
    /// The number of the last entry; 0 if there is none.
    pub last: u64,
}

/// The open file, for the writer alone.
pub(super) struct Store {
    connection: Connection,
    durability: Durability,
    /// Whether commits are synced at the moment. Setting it for each transaction would cost time.
    synced: bool,
    files: FileIdentity,
    reserve: Reserve,
}

impl Store {
    /// Opens the file, and makes it a spool if it is empty. The caller holds the lock.
    pub(super) fn open(path: &Path, durability: Durability) -> Result<Self, OpenError> {
        let sqlite = |source| OpenError::Sqlite { path: path.to_owned(), source };
        files::create_private(path).map_err(|source| OpenError::Io { path: path.to_owned(), source })?;
        let connection = Connection::open(path).map_err(sqlite)?;
        connection.busy_timeout(BUSY_TIMEOUT).map_err(sqlite)?;
        let first_read = pragma(&connection, "schema_version").map_err(|source| match source.sqlite_error_code() {
            Some(ErrorCode::CannotOpen) => OpenError::Companions { path: path.to_owned(), source },
            _ => sqlite(source),
        });
        let empty = first_read? == 0;
        if !empty {
            check_format(&connection, path)?;
        }
        // fullfsync: without it, macOS does not wait for the disk. No effect elsewhere.
        connection
            .execute_batch("PRAGMA synchronous = FULL; PRAGMA fullfsync = ON; PRAGMA checkpoint_fullfsync = ON;")
            .map_err(sqlite)?;
        // SQLite returns the mode in force, which is another one on a file system without shared memory.
        let mode: String = connection.query_row("PRAGMA journal_mode = WAL", [], |row| row.get(0)).map_err(sqlite)?;
        if mode != "wal" {
            return Err(OpenError::NoWal { path: path.to_owned() });
        }
        if empty {
            create(&connection).map_err(sqlite)?;
        }
        // The first read opens the log.
        Ledger::read(&connection).map_err(sqlite)?;
        let files = FileIdentity::of(path).map_err(|source| OpenError::Io { path: path.to_owned(), source })?;
        let mut store = Self { connection, durability, synced: true, files, reserve: Reserve::of(path) };
        store.set_synced(true).map_err(sqlite)?;
        Ok(store)
    }

    /// Disk space to give up when the disk is full.
    pub(super) fn reserve(&mut self) -> &mut Reserve {
        &mut self.reserve
    }

    /// Whether the paths still lead to the open files.
    pub(super) fn is_in_place(&self) -> bool {
        self.files.is_unchanged()
    }

    /// Reads the totals. Fails if they do not add up, because later totals are computed from them.
    pub(super) fn ledger(&self) -> Result<Ledger> {
        let ledger = Ledger::read(&self.connection)?;
        if ledger.balances() { Ok(ledger) } else { Err(wrong_totals()) }
    }

    /// Reads the totals. Fails as well if an event has a higher number than the last accepted one.
    pub(super) fn ledger_of_events(&self) -> Result<Ledger> {
        let ledger = self.ledger()?;
        if ledger.accepted >= self.highest()? { Ok(ledger) } else { Err(wrong_totals()) }
    }

    /// `durable`: whether this transaction has to survive a power loss once it is committed. A deletion need not: if it
    /// is lost, the event is published again under the same id.
    pub(super) fn begin(&mut self, durable: bool) -> Result<()> {
        self.set_synced(durable)?;
        self.run("BEGIN IMMEDIATE")
    }

    pub(super) fn commit(&self) -> Result<()> {
        self.run("COMMIT")
    }

    pub(super) fn rollback(&self) -> Result<()> {
        if self.connection.is_autocommit() { Ok(()) } else { self.run("ROLLBACK") }
    }

    /// What the file says about its log. Before the log is written, that is what a file without a log says.
    pub(super) fn log_mark(&self) -> Result<LogMark> {
        LogMark::read(&self.connection)
    }

    /// Marks the file, in the file itself and not only in its log, as the spool of this process.
    pub(super) fn begin_session(&mut self) -> Result<()> {
        self.mark(LogMark::Before)?;
        self.set_synced(true)?;
        // Does not wait for processes that read the file.
        let copied = self.connection.query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |_| Ok(()));
        copied.and_then(|()| self.mark(LogMark::Within))
    }

    /// Copies the whole log into the file, truncates it, and marks the file as complete. Fails if another process
    /// reads the file for longer than `patience`.
    pub(super) fn end_session(&mut self, patience: Duration) -> Result<()> {
        self.connection.busy_timeout(patience)?;
        self.mark(LogMark::Complete)?;
        self.truncate_log()
    }

    fn mark(&mut self, mark: LogMark) -> Result<()> {
        self.begin(false)?;
        let marked = mark.write(&self.connection).and_then(|()| self.commit());
        marked.or_else(|error| self.rollback().and(Err(error)))
    }

    /// Copies the write-ahead log into the file, syncs the file, and truncates the log. Fails with
    /// `ExecuteReturnedResults` if another process reads the file.
    pub(super) fn restart_log(&mut self) -> Result<()> {
        // Without room on the disk the log has to be copied all the same. Then a lost log is not noticed.
        let _ = self.mark(LogMark::Before);
        let truncated = self.truncate_log();
        let _ = self.mark(LogMark::Within);
        truncated
    }

    /// As [`Self::restart_log`], for a log that is not used any more.
    pub(super) fn truncate_log(&mut self) -> Result<()> {
        self.set_synced(true)?;
        let busy: bool = self.connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| row.get(0))?;
        if busy { Err(rusqlite::Error::ExecuteReturnedResults) } else { Ok(()) }
    }

    /// Gives the free pages of the file back to the disk. Takes as much memory as the file has contents, so it is for
    /// an empty spool.
    pub(super) fn shrink(&mut self) -> Result<()> {
        self.set_synced(true)?;
        self.connection.execute_batch("PRAGMA temp_store = MEMORY; VACUUM")?;
        self.restart_log()
    }

    /// Accepted events that could not be read after the file was damaged; the removed ones include them.
    pub(super) fn lost(&self) -> Result<u64> {
        lost(&self.connection)
    }

    /// Counts an event that no one can name as accepted and lost.
    pub(super) fn count_one_as_lost(&mut self) -> Result<()> {
        self.begin(true)?;
        let sql = "UPDATE ledger SET accepted = accepted + 1, removed = removed + 1, lost = lost + 1";
        let counted = self.run(sql).and_then(|()| self.commit());
        counted.or_else(|error| self.rollback().and(Err(error)))
    }

    pub(super) fn set_lost(&self, lost: u64) -> Result<()> {
        self.connection.execute("UPDATE ledger SET lost = ?1", [lost]).map(|_| ())
    }

    pub(super) fn write_ledger(&self, ledger: &Ledger) -> Result<()> {
        ledger.write(&self.connection)
    }

    /// Makes the transaction write something: SQLite writes nothing if no value changes.
    pub(super) fn touch(&self) -> Result<()> {
        self.run("UPDATE ledger SET touches = touches + 1")
    }

    pub(super) fn insert(&self, seq: u64, event: &Event) -> Result<()> {
        let (traceparent, tracestate) = match &event.trace {
            Some(trace) => (Some(trace.traceparent.as_str()), trace.tracestate.as_deref()),
            None => (None, None),
        };
        let mut statement = self.connection.prepare_cached(
            "INSERT INTO event (seq, id, accepted_ms, authentic, traceparent, tracestate, fingerprint, body)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
        )?;
        statement.execute((
            seq,
            event.id.as_bytes(),
            event.accepted_ms,
            event.authentic,
            traceparent,
            tracestate,
            event.fingerprint.0,
            event.body.as_ref(),
        ))?;
        Ok(())
    }

    /// Deletes the events from `first` to `last`, both included.
    pub(super) fn delete(&self, first: u64, last: u64) -> Result<Deleted> {
        delete(&self.connection, first, last)
    }

    /// Returns whether the event was pending until now.
    pub(super) fn park(&self, seq: u64, reason: &str, now_ms: i64) -> Result<bool> {
        let mut first = self.connection.prepare_cached(
            "UPDATE event SET parked_reason = ?2, tried_ms = ?3 WHERE seq = ?1 AND parked_reason IS NULL",
        )?;
        if first.execute((seq, reason, now_ms))? == 1 {
            return Ok(true);
        }
        let mut again =
            self.connection.prepare_cached("UPDATE event SET parked_reason = ?2, tried_ms = ?3 WHERE seq = ?1")?;
        again.execute((seq, reason, now_ms))?;
        Ok(false)
    }

    /// Records a try of a parked event.
    pub(super) fn tried(&self, seq: u64, now_ms: i64) -> Result<()> {
        let mut statement = self
            .connection
            .prepare_cached("UPDATE event SET tried_ms = ?2 WHERE seq = ?1 AND parked_reason IS NOT NULL")?;
        statement.execute((seq, now_ms)).map(|_| ())
    }

    /// Appends entries to the dedupe window; `last` is the number of the last one.
    pub(super) fn remember(&self, last: u64, entries: &[EntryBytes]) -> Result<()> {
        if entries.is_empty() {
            return Ok(());
        }
        let mut statement = self.connection.prepare_cached("INSERT INTO seen (last, entries) VALUES (?1, ?2)")?;
        statement.execute((last, entries.as_flattened())).map(|_| ())
    }

    /// Deletes the entries of the dedupe window up to number `last`. Rows with a later entry stay as they are.
    pub(super) fn forget(&self, last: u64) -> Result<()> {
        let mut statement = self.connection.prepare_cached("DELETE FROM seen WHERE last <= ?1")?;
        statement.execute([last]).map(|_| ())
    }

    /// Reads at least the newest `limit` entries of the dedupe window, the oldest first.
    pub(super) fn seen(&self, limit: usize) -> Result<SeenEntries> {
        let mut statement = self.connection.prepare("SELECT last, entries FROM seen ORDER BY last DESC")?;
        let (mut entries, mut last) = (Vec::new(), 0);
        let mut rows = statement.query([])?;
        while entries.len() < limit
            && let Some(row) = rows.next()?
        {
            last = u64::max(last, row.get(0)?);
            let (chunks, rest) = row.get_ref(1)?.as_blob()?.as_chunks();
            if !rest.is_empty() {
                return Err(wrong_totals());
            }
            entries.extend(chunks.iter().rev());
        }
        if last < entries.len() as u64 || last > NUMBER_MAX {
            return Err(wrong_totals());
        }
        entries.reverse();
        Ok(SeenEntries { entries, last })
    }

    /// Entries of the dedupe window for the newest `limit` events.
    pub(super) fn entries_of_events(&self, limit: usize) -> Result<Vec<EntryBytes>> {
        let sql = "SELECT seq, fingerprint, id, accepted_ms FROM event ORDER BY seq DESC LIMIT ?1";
        let mut statement = self.connection.prepare(sql)?;
        let entries = statement.query_map([limit as i64], |row| {
            let (fingerprint, id) = (Fingerprint(row.get(1)?), Uuid::from_bytes(row.get(2)?));
            Ok(dedupe::entry_of_event(row.get(0)?, &fingerprint, id, row.get(3)?))
        })?;
        entries.collect()
    }

    /// The id of the event with this number.
    pub(super) fn id(&self, seq: u64) -> Result<Option<Uuid>> {
        let mut statement = self.connection.prepare_cached("SELECT id FROM event WHERE seq = ?1")?;
        statement.query_row([seq], |row| Ok(Uuid::from_bytes(row.get(0)?))).optional()
    }

    /// The range from the lowest to the highest number of the events.
    pub(super) fn range(&self) -> Result<Option<RangeInclusive<u64>>> {
        self.connection.query_row("SELECT min(seq), max(seq) FROM event", [], |row| {
            let ends = row.get::<_, Option<u64>>(0)?.zip(row.get(1)?);
            Ok(ends.map(|(first, last)| first..=last))
        })
    }

    /// The numbers in `range` that no event has.
    pub(super) fn gaps(&self, range: RangeInclusive<u64>) -> Result<Vec<RangeInclusive<u64>>> {
        let (mut next, last) = range.into_inner();
        let mut statement =
            self.connection.prepare("SELECT seq FROM event WHERE seq BETWEEN ?1 AND ?2 ORDER BY seq")?;
        let mut gaps = Vec::new();
        for seq in statement.query_map([next, last], |row| row.get::<_, u64>(0))? {
            let seq = seq?;
            if seq > next {
                gaps.push(next..=seq - 1);
            }
            next = seq + 1;
        }
        if next <= last {
            gaps.push(next..=last);
        }
        Ok(gaps)
    }

    /// The number of the oldest pending event; 0 if there is none.
    pub(super) fn oldest_pending(&self) -> Result<u64> {
        let sql = "SELECT coalesce((SELECT seq FROM event WHERE parked_reason IS NULL ORDER BY seq LIMIT 1), 0)";
        self.connection.query_row(sql, [], |row| row.get(0))
    }

    /// The highest number of the events; 0 if there is none.
    pub(super) fn highest(&self) -> Result<u64> {
        self.connection.query_row("SELECT coalesce(max(seq), 0) FROM event", [], |row| row.get(0))
    }

    fn run(&self, sql: &str) -> Result<()> {
        self.connection.prepare_cached(sql)?.execute([]).map(|_| ())
    }

    fn set_synced(&mut self, durable: bool) -> Result<()> {
        let synced = durable && self.durability == Durability::Disk;
        if synced != self.synced {
            // In WAL mode FULL syncs each commit; NORMAL syncs only before a checkpoint, so that a power loss may take
            // back the last commits but not damage the file (https://www.sqlite.org/pragma.html#pragma_synchronous).
            self.connection.execute_batch(if synced {
                "PRAGMA synchronous = FULL"
            } else {
                "PRAGMA synchronous = NORMAL"
            })?;
            self.synced = synced;
        }
        Ok(())
    }
}

pub(super) fn lost(connection: &Connection) -> Result<u64> {
    connection.query_row("SELECT lost FROM ledger", [], |row| row.get(0))
}

fn create(connection: &Connection) -> Result<()> {
    connection.execute_batch(&format!(
        "BEGIN IMMEDIATE; {SCHEMA} {}
         PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {FORMAT}; COMMIT;",
        log_mark::SCHEMA
    ))
}

/// Counts the events first: a DELETE with RETURNING would keep a journal of its own, in memory that it allocates and
/// frees each time.
pub(super) fn delete(connection: &Connection, first: u64, last: u64) -> Result<Deleted> {
    let mut count = connection.prepare_cached(
        "SELECT count(*), count(parked_reason), coalesce(sum(length(body)), 0) FROM event WHERE seq BETWEEN ?1 AND ?2",
    )?;
    let (events, parked, bodies): (u64, u64, u64) =
        count.query_row([first, last], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?;
    connection.prepare_cached("DELETE FROM event WHERE seq BETWEEN ?1 AND ?2")?.execute([first, last])?;
    Ok(Deleted { pending: events - parked, parked, bytes: bodies + events * EVENT_OVERHEAD_BYTES })
}

/// Whether this is a spool, and one that this relay understands.
pub(super) fn check_format(connection: &Connection, path: &Path) -> Result<(), OpenError> {
    let sqlite = |source| OpenError::Sqlite { path: path.to_owned(), source };
    if pragma(connection, "application_id").map_err(sqlite)? != i64::from(APPLICATION_ID) {
        return Err(OpenError::Foreign { path: path.to_owned() });
    }
    match pragma(connection, "user_version").map_err(sqlite)? {
        FORMAT => Ok(()),
        found if found > FORMAT => Err(OpenError::Newer { path: path.to_owned(), found, known: FORMAT }),
        found => Err(OpenError::Older { path: path.to_owned(), found, known: FORMAT }),
    }
}

fn pragma(connection: &Connection, name: &str) -> Result<i64> {
    connection.query_row(&format!("PRAGMA {name}"), [], |row| row.get(0))
}
