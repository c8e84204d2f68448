//! Reading, on a connection of its own, so that the publisher never waits for the writer: WAL mode lets both run at
//! once.

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use rusqlite::{Connection, OpenFlags, OptionalExtension, Row};
use uuid::Uuid;

use super::delivered::Runs;
use super::error::{ReadError, Result};
use super::ledger::Ledger;
use super::subjects;
use super::types::{Batch, PendingBatch, Stored, Undelivered};
use crate::event::{Envelope, Event, Fingerprint, SubjectKey, TraceContext};

/// Maximum bytes of bodies read at a time, so that large ones do not fill the memory. At least one event is read.
const READ_BYTES: usize = 4 * 1024 * 1024;

/// The columns that [`stored`] reads, in its order.
pub(super) const COLUMNS: &str = "seq, id, accepted_ms, authentic, traceparent, tracestate, fingerprint, body, \
                                  subject, source";

/// As [`COLUMNS`], of a spool of the format before.
pub(super) const COLUMNS_BEFORE: &str =
    "seq, id, accepted_ms, authentic, traceparent, tracestate, fingerprint, body, subject, 0";

/// The id of the parked event that an event waits behind; NULL if there is none.
pub(super) const WAITS_BEHIND: &str = "(SELECT id FROM event AS parked INDEXED BY parked_subject
     WHERE parked.parked_reason IS NOT NULL AND parked.subject = event.subject AND parked.seq < event.seq
     ORDER BY parked.seq LIMIT 1)";

#[derive(Clone)]
pub(super) struct Reader {
    /// `None` once it is closed.
    connection: Arc<Mutex<Option<Connection>>>,
}

impl Reader {
    pub(super) fn open(path: &Path) -> Result<Self> {
        let connection = open_read_only(path)?;
        // SQLite opens the file at the first query. From then on it stays readable, even if its folder is deleted.
        oldest_pending_ms(&connection, &Runs::default())?;
        Ok(Self { connection: Arc::new(Mutex::new(Some(connection))) })
    }

    /// Holds up reads, so that the write-ahead log can begin again. Waits for the read in progress.
    pub(super) fn pause(&self) -> MutexGuard<'_, Option<Connection>> {
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `query` on a thread that may block.
    pub(super) async fn run<T, F>(&self, query: F) -> Result<T, ReadError>
    where
        T: Send + 'static,
        F: FnOnce(&Connection) -> Result<T> + Send + 'static,
    {
        let connection = Arc::clone(&self.connection);
        let answer = tokio::task::spawn_blocking(move || {
            // A query that panicked changed nothing that the next one depends on.
            connection.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(query)
        });
        match answer.await {
            Ok(Some(result)) => Ok(result?),
            // The caller of this future has a `Spool`, and the reader is closed when none is left.
            Ok(None) => std::future::pending().await,
            Err(ended) => match ended.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                // The runtime is shutting down and drops this future as well.
                Err(_) => std::future::pending().await,
            },
        }
    }
}

impl Reader {
    /// Closes the connection, after the query that runs on it.
    pub(super) fn close(&self) {
        *self.connection.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

pub(super) fn open_read_only(path: &Path) -> Result<Connection> {
    let connection = Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
    connection.busy_timeout(std::time::Duration::from_secs(5))?;
    Ok(connection)
}

/// The pending events after `seq` that are not in `delivered`. Events that wait behind a parked one count for `limit`,
/// so that no call reads the whole file.
pub(super) fn pending_after(connection: &Connection, seq: u64, limit: usize, delivered: &Runs) -> Result<PendingBatch> {
    // One snapshot for the totals and the events.
    let snapshot = connection.unchecked_transaction()?;
    let Ledger { parked, removed, .. } = Ledger::read(&snapshot)?;
    let sql = format!(
        "SELECT {COLUMNS}, CASE WHEN ?3 THEN {WAITS_BEHIND} IS NOT NULL ELSE 0 END FROM event
         WHERE seq > ?1 AND parked_reason IS NULL ORDER BY seq LIMIT ?2"
    );
    let mut statement = snapshot.prepare_cached(&sql)?;
    let mut batch = PendingBatch { events: Vec::new(), waiting: Vec::new(), last: seq, more: false, removed };
    let mut bytes = 0;
    let mut rows = statement.query((seq, limit as i64, parked > 0))?;
    loop {
        batch.more = bytes >= READ_BYTES || batch.events.len() + batch.waiting.len() == limit;
        if batch.more {
            break;
        }
        let Some(row) = rows.next()? else { break };
        batch.last = row.get(0)?;
        if let Some(last) = delivered.end_of(batch.last) {
            // Delivered events come in runs, so the read goes on behind the run instead of reading it.
            batch.last = last;
            drop(rows);
            rows = statement.query((last, limit as i64, parked > 0))?;
        } else if row.get(10)? {
            batch.waiting.push(batch.last);
        } else {
            let stored = stored(row)?;
            bytes += stored.event.body.len();
            batch.events.push(stored);
        }
    }
    drop(rows);
    Ok(batch)
}

/// How many events were removed so far.
pub(super) fn removed(connection: &Connection) -> Result<u64> {
    Ledger::read(connection).map(|ledger| ledger.removed)
}

/// The events after `seq`, pending or parked.
pub(super) fn all_after(connection: &Connection, seq: u64, limit: usize) -> Result<Collected> {
    let sql = format!("SELECT {COLUMNS} FROM event WHERE seq > ?1 ORDER BY seq LIMIT ?2");
    let mut statement = connection.prepare_cached(&sql)?;
    let mut batch = Collected::new(limit);
    let mut rows = statement.query((seq, limit as i64))?;
    while batch.has_room()
        && let Some(row) = rows.next()?
    {
        batch.push(row)?;
    }
    Ok(batch)
}

/// The parked events that are due and not in `delivered`. A try that lies in the future was made before the clock was
/// set back, so it does not count.
pub(super) fn parked_due(
    connection: &Connection,
    now_ms: i64,
    retry_ms: i64,
    limit: usize,
    delivered: &Runs,
) -> Result<Batch> {
    let sql = format!(
        "SELECT {COLUMNS} FROM event WHERE parked_reason IS NOT NULL AND tried_ms NOT BETWEEN ?1 AND ?2
         ORDER BY tried_ms, seq"
    );
    let mut statement = connection.prepare_cached(&sql)?;
    let mut rows = statement.query((now_ms.saturating_sub(retry_ms), now_ms))?;
    let mut batch = Collected::new(limit);
    while batch.has_room()
        && let Some(row) = rows.next()?
    {
        if delivered.end_of(row.get(0)?).is_none() {
            batch.push(row)?;
        }
    }
    Ok(batch.finish())
}

/// Finds out which of these events are still in the spool and not in `delivered`.
pub(super) fn undelivered(connection: &Connection, seqs: &[u64], delivered: &Runs) -> Result<Vec<Undelivered>> {
    let sql = format!("SELECT parked_reason IS NOT NULL, {WAITS_BEHIND} FROM event WHERE seq = ?1");
    let mut statement = connection.prepare_cached(&sql)?;
    let find = |seq: &u64| {
        let undelivered = |row: &Row<'_>| {
            let waits_behind = row.get::<_, Option<[u8; 16]>>(1)?.map(Uuid::from_bytes);
            Ok(Undelivered { seq: *seq, parked: row.get(0)?, waits_behind })
        };
        Ok(statement.query_row([*seq], undelivered).optional()?)
    };
    seqs.iter().filter(|seq| delivered.end_of(**seq).is_none()).map(find).filter_map(Result::transpose).collect()
}

/// When the oldest pending event that is not in `delivered` was accepted.
pub(super) fn oldest_pending_ms(connection: &Connection, delivered: &Runs) -> Result<Option<i64>> {
    let mut statement = connection.prepare_cached(
        "SELECT seq, accepted_ms FROM event WHERE seq > ?1 AND parked_reason IS NULL ORDER BY seq LIMIT 1",
    )?;
    let mut after = 0;
    loop {
        let oldest = statement.query_row([after], |row| Ok((row.get(0)?, row.get(1)?))).optional()?;
        let Some((seq, accepted_ms)) = oldest else { return Ok(None) };
        match delivered.end_of(seq) {
            Some(last) => after = last,
            None => return Ok(Some(accepted_ms)),
        }
    }
}

/// As many events as fit into [`READ_BYTES`].
pub(super) struct Collected {
    events: Vec<Stored>,
    bytes: usize,
    limit: usize,
}

impl Collected {
    fn new(limit: usize) -> Self {
        Self { events: Vec::new(), bytes: 0, limit }
    }

    fn has_room(&self) -> bool {
        self.bytes < READ_BYTES && self.events.len() < self.limit
    }

    fn push(&mut self, row: &Row<'_>) -> Result<()> {
        let stored = stored(row)?;
        self.bytes += stored.event.body.len();
        self.events.push(stored);
        Ok(())
    }

    pub(super) fn finish(self) -> Batch {
        Batch { more: !self.has_room(), events: self.events }
    }
}

pub(super) fn stored(row: &Row<'_>) -> rusqlite::Result<Stored> {
    let mut stored = without_extras(row)?;
    stored.event.trace = trace(row)?;
    stored.event.subject = row.get::<_, Option<i64>>(8)?.map(SubjectKey);
    Ok(stored)
}

/// Reads an event of a damaged file: without its trace if that is unreadable, and with the subject that its body has.
pub(super) fn stored_at_least(row: &Row<'_>) -> rusqlite::Result<Stored> {
    let mut stored = without_extras(row)?;
    stored.event.trace = trace(row).unwrap_or(None);
    stored.event.subject = Envelope::parse(&stored.event.body).ok().and_then(|envelope| envelope.subject_key());
    Ok(stored)
}

fn trace(row: &Row<'_>) -> rusqlite::Result<Option<TraceContext>> {
    Ok(match row.get::<_, Option<String>>(4)? {
        Some(traceparent) => Some(TraceContext { traceparent, tracestate: row.get(5)? }),
        None => None,
    })
}

/// The event of a row without its trace and its subject.
fn without_extras(row: &Row<'_>) -> rusqlite::Result<Stored> {
    let event = Event {
        id: Uuid::from_bytes(row.get(1)?),
        accepted_ms: row.get(2)?,
        source: subjects::source(row.get(9)?),
        authentic: row.get(3)?,
        trace: None,
        fingerprint: Fingerprint(row.get(6)?),
        body: Bytes::from(row.get::<_, Vec<u8>>(7)?),
        subject: None,
    };
    Ok(Stored { seq: row.get(0)?, event })
}
