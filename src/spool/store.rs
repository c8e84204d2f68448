//! The SQLite file: its schema, its modes, and the statements that change it.

use std::fs;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rusqlite::{CachedStatement, Connection, OptionalExtension};
use tracing::info;
use uuid::Uuid;

use super::dedupe::{self, EntryBytes};
use super::delivered::Runs;
use super::error::{Fault, OpenError, Result, StoreError};
use super::files::{self, APPLICATION_ID, FileIdentity, sibling};
use super::ledger::{Deleted, Ledger};
use super::log_keeper::LogSize;
use super::log_mark::{self, LogMark};
use super::reader;
use super::settings::Durability;
use super::types::EVENT_OVERHEAD_BYTES;
use super::{hints, subjects};
use crate::event::{Event, Fingerprint};

/// The version of the schema below, raised with each change of it.
const FORMAT: i64 = 5;

/// The version that [`convert`] makes one of [`FORMAT`]: without sources, subjects and hints.
const FORMAT_BEFORE: i64 = 4;

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
        subject       INTEGER,             -- events of a subject leave in order; NULL: free (see SubjectKey)
        body          BLOB    NOT NULL,    -- as received
        parked_reason TEXT,                -- NULL: pending
        tried_ms      INTEGER,             -- of a parked event: the last try
        source        INTEGER NOT NULL DEFAULT 0 -- 0: a webhook; 1: Prism's API, see Event::made
    ) STRICT;
    CREATE INDEX parked ON event (tried_ms) WHERE parked_reason IS NOT NULL;
    CREATE INDEX parked_subject ON event (subject) WHERE parked_reason IS NOT NULL;
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

/// SQLite's page, and what a page takes in the write-ahead log (<https://www.sqlite.org/fileformat2.html>, 4.1).
const PAGE_BYTES: u64 = 4096;
const FRAME_BYTES: u64 = PAGE_BYTES + 24;
const LOG_HEADER_BYTES: u64 = 32;

/// A file this close to the size limit of the process cannot grow.
const LIMIT_MARGIN: u64 = 64 * 1024;

/// The highest number that an event or an entry can have.
pub(super) const NUMBER_MAX: u64 = 1 << 48;

/// The dedupe window as it is on disk.
pub(super) struct SeenEntries {
    /// The entries, the oldest first.
    pub entries: Vec<EntryBytes>,
    /// The number of the last entry; 0 if there is none.
    pub last: u64,
}

/// The pages of the file.
pub(super) struct Pages {
    /// All of them.
    pub total: u64,
    /// Pages without contents, to be used again.
    pub free: u64,
}

/// What a copy of the log into the file did.
struct Copied {
    /// Another process held it up.
    is_busy: bool,
    /// Whether the file has everything.
    is_complete: bool,
    /// Pages in the log.
    in_log: u64,
}

/// The open file, for the writer alone.
pub(super) struct Store {
    connection: Connection,
    path: PathBuf,
    durability: Durability,
    /// Whether commits are synced at the moment. Setting it for each transaction would cost time.
    synced: bool,
    files: FileIdentity,
    /// Pages in the write-ahead log after the last commit. SQLite sets it.
    log_pages: Arc<AtomicU64>,
    /// Bytes of the log's file when it was last looked at.
    log_file: u64,
}

impl Store {
    /// Opens the file, and makes it a spool if it is empty. The caller holds the lock.
    pub(super) fn open(path: &Path, durability: Durability) -> Result<Self, OpenError> {
        let io = |source| OpenError::Io { path: path.to_owned(), source };
        files::create_private(path).map_err(io)?;
        let log_pages = Arc::new(AtomicU64::new(0));
        let connection = connect(path, &log_pages)?;
        let files = FileIdentity::of(path).map_err(io)?;
        let path = path.to_owned();
        let mut store = Self { connection, path, durability, synced: true, files, log_pages, log_file: 0 };
        store.log_file = length(&sibling(&store.path, "-wal"));
        store.set_synced(true).map_err(|source| unusable(&store.path, source))?;
        Ok(store)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The connection, for the tables of other files.
    pub(super) fn connection(&self) -> &Connection {
        &self.connection
    }

    /// Whether the paths still lead to the open files.
    pub(super) fn is_in_place(&self) -> bool {
        self.files.is_unchanged()
    }

    /// Reads the totals. Fails if they do not add up, because later totals are computed from them.
    pub(super) fn ledger(&self) -> Result<Ledger> {
        let ledger = Ledger::read(&self.connection)?;
        if ledger.balances() { Ok(ledger) } else { Err(StoreError::WrongTotals) }
    }

    /// Reads the totals. Fails as well if an event has a higher number than the last accepted one.
    pub(super) fn ledger_of_events(&self) -> Result<Ledger> {
        let ledger = self.ledger()?;
        if ledger.accepted >= self.highest()? { Ok(ledger) } else { Err(StoreError::WrongTotals) }
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
        // Does not wait for processes that read the file.
        self.checkpoint("PASSIVE")?;
        self.mark(LogMark::Within)
    }

    /// Waits at most this long for another process that has locked the file, from now on.
    pub(super) fn limit_patience(&self, patience: Duration) -> Result<()> {
        Ok(self.connection.busy_timeout(patience)?)
    }

    /// Copies the whole log into the file, truncates it, and marks the file as complete. Fails if another process
    /// reads the file for longer than `patience`.
    pub(super) fn end_session(&mut self, patience: Duration) -> Result<()> {
        self.connection.busy_timeout(patience)?;
        self.mark(LogMark::Complete)?;
        self.truncate_log(patience)
    }

    fn mark(&mut self, mark: LogMark) -> Result<()> {
        self.begin(false)?;
        let marked = mark.write(&self.connection).and_then(|()| self.commit());
        marked.or_else(|error| self.rollback().and(Err(error)))
    }

    /// Copies into the file what no reader of the write-ahead log holds back, and syncs both. Returns whether that was
    /// all: then the next transaction writes from the beginning of the log. `marked`: a lost log can be noticed from
    /// then on; it takes two pages of the log.
    pub(super) fn copy_log(&mut self, marked: bool) -> Result<bool> {
        // The log has to be copied even if the disk has no room for the mark. Then a lost log is not noticed.
        let is_marked = marked && self.mark(LogMark::Before).is_ok();
        let copied = self.checkpoint("PASSIVE")?;
        if is_marked {
            self.mark(LogMark::Within)?;
        }
        Ok(copied.is_complete)
    }

    /// Copies the whole write-ahead log into the file, syncs both, truncates the log, and begins it again.
    pub(super) fn restart_log(&mut self, patience: Duration) -> Result<()> {
        self.truncate_log(patience)?;
        match self.begin_session() {
            // As in `copy_log`.
            Err(cause) if self.fault(&cause) == Fault::NoRoom => Ok(()),
            begun => begun,
        }
    }

    /// As [`Self::restart_log`], for a log that is not used any more. Waits at most `patience` for processes that read
    /// it.
    pub(super) fn truncate_log(&mut self, patience: Duration) -> Result<()> {
        self.connection.busy_timeout(patience)?;
        let copied = self.checkpoint("TRUNCATE");
        self.connection.busy_timeout(BUSY_TIMEOUT)?;
        if copied?.is_busy { Err(StoreError::LogInUse) } else { Ok(()) }
    }

    fn checkpoint(&mut self, mode: &str) -> Result<Copied> {
        self.set_synced(true)?;
        let copied = self.connection.query_row(&format!("PRAGMA wal_checkpoint({mode})"), [], |row| {
            let (is_busy, in_log, copied): (bool, i64, i64) = (row.get(0)?, row.get(1)?, row.get(2)?);
            // Both are -1 if another process is copying the log.
            Ok(Copied { is_busy, is_complete: !is_busy && in_log == copied, in_log: in_log.unsigned_abs() })
        });
        self.log_file = length(&sibling(&self.path, "-wal"));
        let copied = copied?;
        if self.log_file == 0 || copied.in_log == 0 {
            self.log_pages.store(0, Ordering::Relaxed);
        }
        Ok(copied)
    }

    /// The size of the write-ahead log, without asking the disk.
    pub(super) fn log_size(&self) -> LogSize {
        let pages = self.log_pages.load(Ordering::Relaxed);
        let used = if pages == 0 { 0 } else { LOG_HEADER_BYTES + pages * FRAME_BYTES };
        LogSize { used, file: self.log_file.max(used) }
    }

    /// By how much a copy of the log would make the file grow.
    pub(super) fn growth(&self) -> Result<u64> {
        Ok((self.pages()?.total * PAGE_BYTES).saturating_sub(length(&self.path)))
    }

    pub(super) fn pages(&self) -> Result<Pages> {
        let page = |name| pragma(&self.connection, name).map(i64::unsigned_abs);
        Ok(Pages { total: page("page_count")?, free: page("freelist_count")? })
    }

    /// Moves contents from the end of the file into free pages, so that the next copy of the log makes the file this
    /// many pages shorter.
    pub(super) fn vacuum(&mut self, pages: u64) -> Result<()> {
        self.set_synced(false)?;
        let mut statement = self.connection.prepare(&format!("PRAGMA incremental_vacuum({pages})"))?;
        let mut rows = statement.query([])?;
        while rows.next()?.is_some() {}
        Ok(())
    }

    /// What a failure says about the disk. SQLite reports a file size limit (`ulimit -f`) as a disk error.
    pub(super) fn fault(&self, error: &StoreError) -> Fault {
        if error.is_failed_write() && self.is_at_size_limit() { Fault::NoRoom } else { error.fault() }
    }

    fn is_at_size_limit(&self) -> bool {
        let limit = rlimit::Resource::FSIZE.get_soft().unwrap_or(rlimit::INFINITY);
        let largest = length(&self.path).max(length(&sibling(&self.path, "-wal")));
        limit != rlimit::INFINITY && largest.saturating_add(LIMIT_MARGIN) >= limit
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
        self.connection.execute("UPDATE ledger SET lost = ?1", [lost])?;
        Ok(())
    }

    pub(super) fn write_ledger(&self, ledger: &Ledger) -> Result<()> {
        ledger.write(&self.connection)
    }

    /// Makes the transaction write something: SQLite writes nothing if no value changes.
    pub(super) fn touch(&self) -> Result<()> {
        self.run("UPDATE ledger SET touches = touches + 1")
    }

    /// The statement that inserts events, for all of a transaction.
    pub(super) fn insertion(&self) -> Result<Insertion<'_>> {
        Ok(Insertion(self.connection.prepare_cached(
            "INSERT INTO event
                 (seq, id, accepted_ms, authentic, traceparent, tracestate, fingerprint, body, subject, source)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)",
        )?))
    }

    /// Deletes the events from `first` to `last`, both included, or fewer, so that they count for at most `bytes`, but
    /// at least the first. Returns the number up to which they are deleted.
    pub(super) fn delete_some(&self, first: u64, last: u64, bytes: u64) -> Result<(Deleted, u64)> {
        let mut last = last.min(first.saturating_add(bytes / EVENT_OVERHEAD_BYTES));
        loop {
            let counted = count(&self.connection, first, last)?;
            if counted.bytes <= bytes || first == last {
                delete_counted(&self.connection, first, last)?;
                return Ok((counted, last));
            }
            last = first + (last - first) / 2;
        }
    }

    /// The bytes that an event counts for; 0 if it is not in the spool.
    pub(super) fn cost(&self, seq: u64) -> Result<u64> {
        Ok(count(&self.connection, seq, seq)?.bytes)
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
        statement.execute((seq, now_ms))?;
        Ok(())
    }

    /// Appends entries to the dedupe window; `last` is the number of the last one.
    pub(super) fn remember(&self, last: u64, entries: &[EntryBytes]) -> Result<()> {
        if entries.is_empty() {
            return Ok(());
        }
        let mut statement = self.connection.prepare_cached("INSERT INTO seen (last, entries) VALUES (?1, ?2)")?;
        statement.execute((last, entries.as_flattened()))?;
        Ok(())
    }

    /// Deletes the entries of the dedupe window up to number `last`. Rows with a later entry stay as they are.
    pub(super) fn forget(&self, last: u64) -> Result<()> {
        let mut statement = self.connection.prepare_cached("DELETE FROM seen WHERE last <= ?1")?;
        statement.execute([last])?;
        Ok(())
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
            let (chunks, rest) = row.get_ref(1)?.as_blob().map_err(rusqlite::Error::from)?.as_chunks();
            if !rest.is_empty() {
                return Err(StoreError::WrongTotals);
            }
            entries.extend(chunks.iter().rev());
        }
        if last < entries.len() as u64 || last > NUMBER_MAX {
            return Err(StoreError::WrongTotals);
        }
        entries.reverse();
        Ok(SeenEntries { entries, last })
    }

    /// Entries of the dedupe window for the newest `limit` webhooks.
    pub(super) fn entries_of_events(&self, limit: usize) -> Result<Vec<EntryBytes>> {
        let sql = "SELECT seq, fingerprint, id, accepted_ms FROM event WHERE source = 0 ORDER BY seq DESC LIMIT ?1";
        let mut statement = self.connection.prepare(sql)?;
        let entries = statement.query_map([limit as i64], |row| {
            let (fingerprint, id) = (Fingerprint(row.get(1)?), Uuid::from_bytes(row.get(2)?));
            Ok(dedupe::entry_of_event(row.get(0)?, &fingerprint, id, row.get(3)?))
        })?;
        Ok(entries.collect::<rusqlite::Result<_>>()?)
    }

    /// The id of the event with this number.
    pub(super) fn id(&self, seq: u64) -> Result<Option<Uuid>> {
        let mut statement = self.connection.prepare_cached("SELECT id FROM event WHERE seq = ?1")?;
        Ok(statement.query_row([seq], |row| Ok(Uuid::from_bytes(row.get(0)?))).optional()?)
    }

    /// The range from the lowest to the highest number of the events.
    pub(super) fn range(&self) -> Result<Option<RangeInclusive<u64>>> {
        let range = self.connection.query_row("SELECT min(seq), max(seq) FROM event", [], |row| {
            let ends = row.get::<_, Option<u64>>(0)?.zip(row.get(1)?);
            Ok(ends.map(|(first, last)| first..=last))
        });
        Ok(range?)
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

    /// Whether no pending event is outside of these.
    pub(super) fn is_all_pending_in(&self, done: &Runs) -> Result<bool> {
        Ok(reader::oldest_pending_ms(&self.connection, done)?.is_none())
    }

    /// The number of the oldest pending event; 0 if there is none.
    pub(super) fn oldest_pending(&self) -> Result<u64> {
        let sql = "SELECT coalesce((SELECT seq FROM event WHERE parked_reason IS NULL ORDER BY seq LIMIT 1), 0)";
        Ok(self.connection.query_row(sql, [], |row| row.get(0))?)
    }

    /// The highest number of the events; 0 if there is none.
    pub(super) fn highest(&self) -> Result<u64> {
        Ok(self.connection.query_row("SELECT coalesce(max(seq), 0) FROM event", [], |row| row.get(0))?)
    }

    fn run(&self, sql: &str) -> Result<()> {
        self.connection.prepare_cached(sql)?.execute([])?;
        Ok(())
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

/// See [`Store::insertion`].
pub(super) struct Insertion<'a>(CachedStatement<'a>);

impl Insertion<'_> {
    pub(super) fn insert(&mut self, seq: u64, event: &Event) -> Result<()> {
        let (traceparent, tracestate) = match &event.trace {
            Some(trace) => (Some(trace.traceparent.as_str()), trace.tracestate.as_deref()),
            None => (None, None),
        };
        self.0.execute((
            seq,
            event.id.as_bytes(),
            event.accepted_ms,
            event.authentic,
            traceparent,
            tracestate,
            event.fingerprint.0,
            event.body.as_ref(),
            event.subject.map(|subject| subject.0),
            subjects::number(event.source),
        ))?;
        Ok(())
    }
}

pub(super) fn lost(connection: &Connection) -> Result<u64> {
    let lost = connection.query_row("SELECT lost FROM ledger", [], |row| row.get(0)).optional()?;
    lost.ok_or(StoreError::WrongTotals)
}

/// Opens the connection of the writer, with a new schema if the file is empty. `log_pages` follows the log from then
/// on.
fn connect(path: &Path, log_pages: &Arc<AtomicU64>) -> Result<Connection, OpenError> {
    let sqlite = |source: rusqlite::Error| unusable(path, source.into());
    let mut connection = Connection::open(path).map_err(sqlite)?;
    connection.busy_timeout(BUSY_TIMEOUT).map_err(sqlite)?;
    let first_read = pragma(&connection, "schema_version").map_err(|source| match source.is_refused() {
        true => OpenError::Companions { path: path.to_owned(), source: source.into() },
        false => unusable(path, source),
    });
    let empty = first_read? == 0;
    let is_older = !empty && is_older(&connection, path)?;
    // auto_vacuum: free pages can be given back to the disk; to be set before anything is written.
    // wal_autocheckpoint: the writer copies the log itself, because SQLite would swallow the errors.
    // fullfsync: without it, macOS does not wait for the disk. No effect elsewhere.
    connection
        .execute_batch(
            "PRAGMA auto_vacuum = INCREMENTAL; PRAGMA wal_autocheckpoint = 0; PRAGMA synchronous = FULL;
             PRAGMA fullfsync = ON; PRAGMA checkpoint_fullfsync = ON;",
        )
        .map_err(sqlite)?;
    // SQLite returns the mode in force, which is another one on a file system without shared memory.
    let mode: String = connection.query_row("PRAGMA journal_mode = WAL", [], |row| row.get(0)).map_err(sqlite)?;
    if mode != "wal" {
        return Err(OpenError::NoWal { path: path.to_owned() });
    }
    if empty {
        create(&connection).map_err(sqlite)?;
    }
    if is_older {
        convert(&connection).map_err(sqlite)?;
        info!(path = %path.display(), "converted the spool of an older prism-relay, which cannot open it any more");
    }
    // The first read opens the log.
    Ledger::read(&connection).map_err(|source| unusable(path, source))?;
    let log_pages = Arc::clone(log_pages);
    let follow = move |_: &mut rusqlite::hooks::Wal, pages: i32| {
        log_pages.store(u64::from(pages.unsigned_abs()), Ordering::Relaxed);
        Ok(())
    };
    connection.wal_hook(Some(follow)).map_err(sqlite)?;
    Ok(connection)
}

fn create(connection: &Connection) -> rusqlite::Result<()> {
    connection.execute_batch(&format!(
        "BEGIN IMMEDIATE; {SCHEMA} {} {} {}
         PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {FORMAT}; COMMIT;",
        log_mark::SCHEMA,
        subjects::SCHEMA,
        hints::SCHEMA
    ))
}

/// Makes a spool of [`FORMAT_BEFORE`] one of [`FORMAT`], with all its events, in one synced transaction.
///
/// The new column changes the text of the schema alone (<https://www.sqlite.org/lang_altertable.html>, section 8).
/// ALTER TABLE would check every row as well, which takes minutes for a large backlog: a start that is killed
/// for being slow would never end.
fn convert(connection: &Connection) -> rusqlite::Result<()> {
    connection.execute_batch(&format!(
        "BEGIN IMMEDIATE; PRAGMA writable_schema = ON;
         UPDATE sqlite_schema SET sql = replace(sql, ') STRICT', ', source INTEGER NOT NULL DEFAULT 0) STRICT')
             WHERE type = 'table' AND name = 'event';
         {} {} PRAGMA user_version = {FORMAT}; COMMIT; PRAGMA writable_schema = RESET;",
        subjects::SCHEMA,
        hints::SCHEMA
    ))
}

/// The error for a file that SQLite cannot use.
pub(super) fn unusable(path: &Path, source: StoreError) -> OpenError {
    OpenError::Sqlite { path: path.to_owned(), source: source.into() }
}

fn length(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |metadata| metadata.len())
}

/// Counts the events first: a DELETE with RETURNING would keep a journal of its own, in memory that it allocates and
/// frees each time.
pub(super) fn delete(connection: &Connection, first: u64, last: u64) -> Result<Deleted> {
    let counted = count(connection, first, last)?;
    delete_counted(connection, first, last)?;
    Ok(counted)
}

fn delete_counted(connection: &Connection, first: u64, last: u64) -> Result<()> {
    connection.prepare_cached("DELETE FROM event WHERE seq BETWEEN ?1 AND ?2")?.execute([first, last])?;
    Ok(())
}

/// The events from `first` to `last`, as they count if they are deleted.
fn count(connection: &Connection, first: u64, last: u64) -> Result<Deleted> {
    let mut count = connection.prepare_cached(
        "SELECT count(*), count(parked_reason), coalesce(sum(length(body)), 0) FROM event WHERE seq BETWEEN ?1 AND ?2",
    )?;
    let (events, parked, bodies): (u64, u64, u64) =
        count.query_row([first, last], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?;
    Ok(Deleted { pending: events - parked, parked, bytes: bodies + events * EVENT_OVERHEAD_BYTES })
}

/// Whether this is a spool, and one that this relay understands.
pub(super) fn check_format(connection: &Connection, path: &Path) -> Result<(), OpenError> {
    let sqlite = |source| unusable(path, source);
    if pragma(connection, "application_id").map_err(sqlite)? != i64::from(APPLICATION_ID) {
        return Err(OpenError::Foreign { path: path.to_owned() });
    }
    match pragma(connection, "user_version").map_err(sqlite)? {
        FORMAT => Ok(()),
        found @ FORMAT_BEFORE => Err(OpenError::Unconverted { path: path.to_owned(), found, known: FORMAT }),
        found if found > FORMAT => Err(OpenError::Newer { path: path.to_owned(), found, known: FORMAT }),
        found => Err(OpenError::Older { path: path.to_owned(), found, known: FORMAT }),
    }
}

/// Whether this is a spool that has to be converted.
fn is_older(connection: &Connection, path: &Path) -> Result<bool, OpenError> {
    match check_format(connection, path) {
        Ok(()) => Ok(false),
        Err(OpenError::Unconverted { .. }) => Ok(true),
        Err(error) => Err(error),
    }
}

fn pragma(connection: &Connection, name: &str) -> Result<i64> {
    Ok(connection.query_row(&format!("PRAGMA {name}"), [], |row| row.get(0))?)
}
