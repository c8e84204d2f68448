//! Reading, on a connection of its own, so that the publisher never waits for the writer: WAL mode lets both run at
//! once.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use rusqlite::{Connection, OpenFlags, OptionalExtension, Result, Row};
use uuid::Uuid;

use super::error::ReadError;
use super::types::{Batch, Stored, Undelivered};
use crate::event::{Event, Fingerprint, TraceContext};

/// Maximum bytes of bodies read at a time, so that large ones do not fill the memory. At least one event is read.
const READ_BYTES: usize = 4 * 1024 * 1024;

/// The columns that [`stored`] reads, in its order.
pub(super) const COLUMNS: &str = "seq, id, accepted_ms, authentic, traceparent, tracestate, fingerprint, body";

#[derive(Clone)]
pub(super) struct Reader {
    /// `None` once it is closed.
    connection: Arc<Mutex<Option<Connection>>>,
}

impl Reader {
    pub(super) fn open(path: &Path) -> Result<Self> {
        let connection = open_read_only(path)?;
        // SQLite opens the file at the first query. From then on it stays readable, even if its folder is deleted.
        oldest_pending_ms(&connection)?;
        Ok(Self { connection: Arc::new(Mutex::new(Some(connection))) })
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

pub(super) fn pending_after(connection: &Connection, seq: u64, limit: usize) -> Result<Batch> {
    let sql = format!("SELECT {COLUMNS} FROM event WHERE seq > ?1 AND parked_reason IS NULL ORDER BY seq LIMIT ?2");
    let mut statement = connection.prepare_cached(&sql)?;
    batch(statement.query((seq, limit as i64))?, limit)
}

/// A try that lies in the future was made before the clock was set back, so it does not count.
pub(super) fn parked_due(connection: &Connection, now_ms: i64, retry_ms: i64, limit: usize) -> Result<Batch> {
    let sql = format!(
        "SELECT {COLUMNS} FROM event WHERE parked_reason IS NOT NULL AND tried_ms NOT BETWEEN ?1 AND ?2
         ORDER BY tried_ms, seq LIMIT ?3"
    );
    let mut statement = connection.prepare_cached(&sql)?;
    batch(statement.query((now_ms.saturating_sub(retry_ms), now_ms, limit as i64))?, limit)
}

/// Finds out which of these events are still in the spool.
pub(super) fn undelivered(connection: &Connection, seqs: &[u64]) -> Result<Vec<Undelivered>> {
    let mut statement = connection.prepare_cached("SELECT parked_reason IS NOT NULL FROM event WHERE seq = ?1")?;
    let find = |seq: &u64| {
        let parked = statement.query_row([*seq], |row| row.get(0)).optional()?;
        Ok(parked.map(|parked| Undelivered { seq: *seq, parked }))
    };
    seqs.iter().map(find).filter_map(Result::transpose).collect()
}

pub(super) fn oldest_pending_ms(connection: &Connection) -> Result<Option<i64>> {
    let mut statement =
        connection.prepare_cached("SELECT accepted_ms FROM event WHERE parked_reason IS NULL ORDER BY seq LIMIT 1")?;
    statement.query_row([], |row| row.get(0)).optional()
}

/// Reads as many of the rows as fit into [`READ_BYTES`].
fn batch(mut rows: rusqlite::Rows<'_>, limit: usize) -> Result<Batch> {
    let (mut events, mut bytes) = (Vec::new(), 0);
    while bytes < READ_BYTES
        && let Some(row) = rows.next()?
    {
        let stored = stored(row)?;
        bytes += stored.event.body.len();
        events.push(stored);
    }
    let more = bytes >= READ_BYTES || events.len() == limit;
    Ok(Batch { events, more })
}

pub(super) fn stored(row: &Row<'_>) -> Result<Stored> {
    with_trace(row, trace(row)?)
}

/// Reads an event of a damaged file: without its trace if that is unreadable.
pub(super) fn stored_at_least(row: &Row<'_>) -> Result<Stored> {
    with_trace(row, trace(row).unwrap_or(None))
}

fn trace(row: &Row<'_>) -> Result<Option<TraceContext>> {
    Ok(match row.get::<_, Option<String>>(4)? {
        Some(traceparent) => Some(TraceContext { traceparent, tracestate: row.get(5)? }),
        None => None,
    })
}

fn with_trace(row: &Row<'_>, trace: Option<TraceContext>) -> Result<Stored> {
    let event = Event {
        id: Uuid::from_bytes(row.get(1)?),
        accepted_ms: row.get(2)?,
        authentic: row.get(3)?,
        trace,
        fingerprint: Fingerprint(row.get(6)?),
        body: Bytes::from(row.get::<_, Vec<u8>>(7)?),
    };
    Ok(Stored { seq: row.get(0)?, event })
}
