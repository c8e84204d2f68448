//! The SQLite file: its lock, its mode, its schema, and the statements that change it.

use std::fs::{self, File, OpenOptions, Permissions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::{Connection, OptionalExtension, Result};
use uuid::Uuid;

use super::dedupe::Seen;
use super::{EVENT_OVERHEAD_BYTES, Ledger, OpenError};
use crate::config::Durability;
use crate::event::{Event, Fingerprint};

/// "PRLY", so that `file` and other programs can tell what this is.
const APPLICATION_ID: i64 = 0x5052_4c59;
/// The version of the schema below; raised with each change that an older relay could not read.
const FORMAT: i64 = 1;

/// How long to wait for another process that has the file open, such as `sqlite3` in an operator's hands.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

const SCHEMA: &str = "
    CREATE TABLE event (
        seq           INTEGER PRIMARY KEY, -- the order of acceptance
        id            BLOB    NOT NULL,    -- UUIDv7: the message_id
        accepted_ms   INTEGER NOT NULL,    -- since 1970
        authentic     INTEGER NOT NULL,    -- 1: a signature vouches for it
        traceparent   TEXT,
        tracestate    TEXT,
        body          BLOB    NOT NULL,    -- as received
        parked_reason TEXT,                -- NULL: pending
        tried_ms      INTEGER              -- of a parked event: the last try
    ) STRICT;
    CREATE INDEX parked ON event (tried_ms) WHERE parked_reason IS NOT NULL;
    CREATE TABLE seen (                    -- the dedupe window, in the order of acceptance
        seq           INTEGER PRIMARY KEY,
        fingerprint   BLOB    NOT NULL,    -- SHA-256 of the body
        id            BLOB    NOT NULL,
        accepted_ms   INTEGER NOT NULL
    ) STRICT;
    CREATE TABLE ledger (                  -- accepted = confirmed + pending + parked + removed
        id            INTEGER PRIMARY KEY CHECK (id = 1),
        accepted      INTEGER NOT NULL,
        confirmed     INTEGER NOT NULL,
        pending       INTEGER NOT NULL,
        parked        INTEGER NOT NULL,
        removed       INTEGER NOT NULL,
        duplicates    INTEGER NOT NULL,
        bytes         INTEGER NOT NULL
    ) STRICT;
    INSERT INTO ledger VALUES (1, 0, 0, 0, 0, 0, 0, 0);
";

/// The open file, for the writer alone.
pub(super) struct Store {
    connection: Connection,
    durability: Durability,
    /// Whether commits are synced at the moment; setting it anew for each transaction would cost time.
    synced: bool,
    /// Held for as long as the store lives.
    _lock: File,
}

impl Store {
    pub fn open(path: &Path, durability: Durability) -> Result<Self, OpenError> {
        let io = |source| OpenError::Io { path: path.to_owned(), source };
        create_folder(path).map_err(io)?;
        let lock = lock(path)?;
        create_private(path).map_err(io)?;

        let sqlite = |source| OpenError::Sqlite { path: path.to_owned(), source };
        let connection = Connection::open(path).map_err(sqlite)?;
        connection.busy_timeout(BUSY_TIMEOUT).map_err(sqlite)?;
        let pragma = |name: &str| connection.query_row(&format!("PRAGMA {name}"), [], |row| row.get::<_, i64>(0));
        let empty = pragma("schema_version").map_err(sqlite)? == 0;
        if !empty && pragma("application_id").map_err(sqlite)? != APPLICATION_ID {
            return Err(OpenError::Foreign { path: path.to_owned() });
        }
        let found = pragma("user_version").map_err(sqlite)?;
        if found > FORMAT {
            return Err(OpenError::Newer { path: path.to_owned(), found, known: FORMAT });
        }
        // fullfsync: without it, macOS does not wait for the disk. No effect elsewhere.
        connection.execute_batch("PRAGMA fullfsync = ON; PRAGMA checkpoint_fullfsync = ON;").map_err(sqlite)?;
        // SQLite answers with the mode that it is in, which stays another one on a file system that cannot share memory.
        let mode: String = connection.query_row("PRAGMA journal_mode = WAL", [], |row| row.get(0)).map_err(sqlite)?;
        if mode != "wal" {
            return Err(OpenError::NoWal { path: path.to_owned() });
        }
        let mut store = Self { connection, durability, synced: false, _lock: lock };
        store.set_synced(true).map_err(sqlite)?;
        if empty {
            store.create().map_err(sqlite)?;
        }
        Ok(store)
    }

    fn create(&mut self) -> Result<()> {
        self.connection.execute_batch(&format!(
            "BEGIN IMMEDIATE; {SCHEMA} PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {FORMAT}; COMMIT;"
        ))
    }

    pub fn ledger(&self) -> Result<Ledger> {
        Ledger::read(&self.connection)
    }

    /// `durable`: whether this transaction has to survive a power loss once it is committed. A deletion need not: if
    /// it is lost, the event is published again under the same id.
    pub fn begin(&mut self, durable: bool) -> Result<()> {
        self.set_synced(durable)?;
        self.run("BEGIN IMMEDIATE")
    }

    pub fn commit(&self) -> Result<()> {
        self.run("COMMIT")
    }

    pub fn rollback(&self) -> Result<()> {
        if self.connection.is_autocommit() { Ok(()) } else { self.run("ROLLBACK") }
    }

    /// Copies the write-ahead log into the file, syncs the file, and empties the log.
    pub fn start_log_anew(&mut self) -> Result<()> {
        self.set_synced(true)?;
        let busy: bool = self.connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| row.get(0))?;
        if busy { Err(rusqlite::Error::ExecuteReturnedResults) } else { Ok(()) }
    }

    pub fn write_ledger(&self, ledger: &Ledger) -> Result<()> {
        ledger.write(&self.connection)
    }

    pub fn insert(&self, seq: u64, event: &Event) -> Result<()> {
        let (traceparent, tracestate) = match &event.trace {
            Some(trace) => (Some(trace.traceparent.as_str()), trace.tracestate.as_deref()),
            None => (None, None),
        };
        let mut statement = self.connection.prepare_cached(
            "INSERT INTO event (seq, id, accepted_ms, authentic, traceparent, tracestate, body)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
        )?;
        statement.execute((
            seq,
            event.id.as_bytes(),
            event.accepted_ms,
            event.authentic,
            traceparent,
            tracestate,
            event.body.as_ref(),
        ))?;
        Ok(())
    }

    /// Takes the event out. Returns what it counted for and whether it was parked; `None` if it is not there.
    pub fn delete(&self, seq: u64) -> Result<Option<(u64, bool)>> {
        let mut statement = self
            .connection
            .prepare_cached("DELETE FROM event WHERE seq = ?1 RETURNING length(body), parked_reason IS NOT NULL")?;
        let row = statement.query_row([seq], |row| Ok((row.get::<_, u64>(0)?, row.get(1)?))).optional()?;
        Ok(row.map(|(body, parked)| (body + EVENT_OVERHEAD_BYTES, parked)))
    }

    /// Returns whether the event was pending until now.
    pub fn park(&self, seq: u64, reason: &str, now_ms: i64) -> Result<bool> {
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

    /// Notes a try of a parked event.
    pub fn tried(&self, seq: u64, now_ms: i64) -> Result<()> {
        let mut statement = self
            .connection
            .prepare_cached("UPDATE event SET tried_ms = ?2 WHERE seq = ?1 AND parked_reason IS NOT NULL")?;
        statement.execute((seq, now_ms)).map(|_| ())
    }

    pub fn remember(&self, seq: u64, fingerprint: &Fingerprint, id: Uuid, accepted_ms: i64) -> Result<()> {
        let mut statement = self.connection.prepare_cached("INSERT INTO seen VALUES (?1, ?2, ?3, ?4)")?;
        statement.execute((seq, fingerprint.0, id.as_bytes(), accepted_ms))?;
        Ok(())
    }

    /// Forgets the dedupe window up to `seq`, itself included.
    pub fn forget(&self, seq: u64) -> Result<()> {
        let mut statement = self.connection.prepare_cached("DELETE FROM seen WHERE seq <= ?1")?;
        statement.execute([seq])?;
        Ok(())
    }

    /// The newest `limit` entries of the dedupe window, the oldest first.
    pub fn seen(&self, limit: usize) -> Result<Vec<Seen>> {
        let mut statement =
            self.connection.prepare("SELECT seq, fingerprint, id, accepted_ms FROM seen ORDER BY seq DESC LIMIT ?1")?;
        let rows = statement.query_map([limit as i64], |row| {
            Ok(Seen {
                seq: row.get(0)?,
                fingerprint: Fingerprint(row.get(1)?),
                id: Uuid::from_bytes(row.get(2)?),
                accepted_ms: row.get(3)?,
            })
        })?;
        let mut seen = rows.collect::<Result<Vec<_>>>()?;
        seen.reverse();
        Ok(seen)
    }

    fn run(&self, sql: &str) -> Result<()> {
        self.connection.prepare_cached(sql)?.execute([]).map(|_| ())
    }

    fn set_synced(&mut self, durable: bool) -> Result<()> {
        let synced = durable && self.durability == Durability::Disk;
        if synced != self.synced {
            // In WAL mode FULL syncs each commit; NORMAL syncs only before a checkpoint, so that a power loss may
            // take back the last commits but not damage the file (https://www.sqlite.org/pragma.html#pragma_synchronous).
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

fn create_folder(path: &Path) -> io::Result<()> {
    let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) else { return Ok(()) };
    let new: Vec<&Path> = folder.ancestors().take_while(|folder| !folder.exists()).collect();
    fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    // The entries of the new folders have to survive a power loss, too.
    new.into_iter().try_for_each(sync_folder)
}

/// Syncs the folder that holds `path`.
fn sync_folder(path: &Path) -> io::Result<()> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(parent)?.sync_all()
}

/// The file holds people's data and the relay's only copy of it: it is the owner's alone. SQLite gives its
/// companions (-wal, -shm) the mode of the file.
fn create_private(path: &Path) -> io::Result<()> {
    match OpenOptions::new().write(true).create_new(true).mode(0o600).open(path) {
        Ok(file) => {
            file.sync_all()?;
            sync_folder(path)
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            fs::set_permissions(path, Permissions::from_mode(0o600))
        }
        Err(error) => Err(error),
    }
}

/// Where the lock of a spool is: beside it, because SQLite loses its own locks when a process opens and closes the
/// file a second time (<https://www.sqlite.org/howtocorrupt.html>, section 2.2).
pub(super) fn lock_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".lock");
    PathBuf::from(name)
}

fn lock(path: &Path) -> Result<File, OpenError> {
    let lock_path = lock_path(path);
    let io = |source| OpenError::Io { path: lock_path.clone(), source };
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&lock_path)
        .map_err(io)?;
    match try_lock(&file) {
        Ok(()) => {
            // Only a help for people: the lock itself is what counts.
            let written =
                file.set_len(0).and_then(|()| file.rewind()).and_then(|()| write!(file, "{}", std::process::id()));
            written.map_err(io)?;
            Ok(file)
        }
        Err(TryLockError::WouldBlock) => {
            let mut pid = String::new();
            let _ = file.read_to_string(&mut pid);
            Err(OpenError::Locked {
                path: path.to_owned(),
                pid: if pid.is_empty() { "unknown".to_owned() } else { pid },
            })
        }
        Err(TryLockError::Error(source)) => Err(io(source)),
    }
}

/// Tries for a moment: `check` holds the lock for an instant when it asks whether somebody has it.
fn try_lock(file: &File) -> Result<(), TryLockError> {
    for _ in 0..10 {
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => std::thread::sleep(Duration::from_millis(20)),
            outcome => return outcome,
        }
    }
    file.try_lock()
}
