//! Durable, ordered, bounded: what has been accepted and is not yet delivered. Knows neither HTTP nor AMQP.
//!
//! One SQLite file, one writer thread. Whatever waits is committed in one transaction with one fsync, and only then
//! answered; the deletion of what was delivered rides along. An event's `seq` is its number in the order of
//! acceptance, counted over the life of the file.

mod dedupe;
mod files;
mod inspect;
mod ledger;
mod reader;
mod rescue;
mod salvage;
mod store;
mod writer;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use thiserror::Error;
use tokio::sync::{Notify, mpsc, oneshot};
use uuid::Uuid;

use files::Lock;
pub use inspect::{Entry, Inspector, Presence, Verdict, presence};
pub use ledger::Ledger;
use reader::Reader;
use store::Store;
use writer::{Command, End, Writer};

use crate::config;
use crate::event::Event;
use crate::metrics::Metrics;

/// What an event counts for beside its body in `spool.max_bytes`: its row, its share of the dedupe window, and the
/// space that SQLite leaves between rows.
pub const EVENT_OVERHEAD_BYTES: u64 = 256;

/// Appends that wait for the writer at most; further ones wait for a place. With bodies of 256 KiB this is 256 MiB.
const INBOX_CAPACITY: usize = 1024;

/// The spool could not be opened.
#[derive(Debug, Error)]
pub enum OpenError {
    #[error("cannot create or open {path}")]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{path} is in use by another relay (process {pid}); each relay needs a spool.path of its own")]
    Locked { path: PathBuf, pid: String },
    #[error("{path} is damaged: the relay mends it when it starts; try again when it has")]
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

/// The event was not taken, and will not appear later.
#[derive(Debug, Error, Clone, Copy, PartialEq, Eq)]
pub enum AppendError {
    #[error("the spool is full (spool.max_bytes)")]
    Full,
    #[error("the spool cannot be written")]
    Unavailable,
    #[error("the relay is shutting down")]
    Closed,
}

/// The spool could not be read.
#[derive(Debug, Error)]
#[error("cannot read the spool")]
pub struct ReadError(#[from] rusqlite::Error);

impl ReadError {
    /// Whether the file itself is damaged, so that no later try can do better.
    pub fn is_damage(&self) -> bool {
        salvage::is_damage(&self.0)
    }
}

/// The answer to an accepted event: it is on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Receipt {
    /// Its number in the order of acceptance. Of a re-send: that of the first one, as is the id.
    pub seq: u64,
    pub id: Uuid,
    pub duplicate: bool,
}

/// An event as the publisher gets it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// Its number in the order of acceptance.
    pub seq: u64,
    pub event: Event,
}

/// Some of the events that are asked for, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    pub events: Vec<Stored>,
    /// Whether there may be more behind them.
    pub more: bool,
}

/// What became of a published event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Settlement {
    /// The broker has it, in at least one queue: it leaves the spool.
    Confirmed(u64),
    /// The broker does not take it: it stays, is counted apart, and is tried again slowly.
    Parked { seq: u64, reason: String },
    /// A parked event is about to be tried again.
    Tried(u64),
}

/// A disk that has not answered for so long is taken for one that cannot be written. Longer than SQLite waits for somebody else.
const STALL: Duration = Duration::from_secs(8);

/// What the last commit left behind, readable at any time without waiting for the disk.
#[derive(Debug)]
pub struct Gauges {
    ledger: Mutex<Ledger>,
    writable: AtomicBool,
    /// The last commit has failed, whatever was in it.
    failing: AtomicBool,
    /// Since when the writer has been at work on what it works on.
    busy_since: Mutex<Option<Instant>>,
    lost: u64,
}

impl Gauges {
    fn new(ledger: Ledger, lost: u64) -> Self {
        let (writable, failing) = (AtomicBool::new(true), AtomicBool::new(false));
        Self { ledger: Mutex::new(ledger), writable, failing, busy_since: Mutex::default(), lost }
    }

    /// Accepted events that could not be read any more after the file was damaged; among the removed ones.
    pub fn lost(&self) -> u64 {
        self.lost
    }

    fn publish(&self, ledger: &Ledger) {
        *self.ledger.lock().unwrap_or_else(PoisonError::into_inner) = *ledger;
    }

    /// The ledger after the last commit.
    pub fn ledger(&self) -> Ledger {
        *self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the disk takes writes, as far as is known.
    pub fn writable(&self) -> bool {
        self.writable.load(Ordering::Relaxed) && !self.is_stalled()
    }

    /// Whether the disk takes what became of events. It still may when it is too full for new ones.
    pub fn takes_settlements(&self) -> bool {
        !self.failing.load(Ordering::Relaxed) && !self.is_stalled()
    }

    /// Whether the disk neither takes writes nor refuses them.
    pub fn is_stalled(&self) -> bool {
        let since = *self.busy_since.lock().unwrap_or_else(PoisonError::into_inner);
        since.is_some_and(|since| since.elapsed() > STALL)
    }

    fn set_busy(&self, since: Option<Instant>) {
        *self.busy_since.lock().unwrap_or_else(PoisonError::into_inner) = since;
    }
}

/// The face of the spool for everyone: cheap to clone.
#[derive(Clone)]
pub struct Spool {
    inbox: mpsc::Sender<Command>,
    reader: Reader,
    gauges: Arc<Gauges>,
    committed: Arc<Notify>,
    closed: Arc<AtomicBool>,
    path: Arc<Path>,
    max_bytes: u64,
}

/// Resolves when the writer has ended: `Ok` after every [`Spool`] is dropped, `Err` if it died.
pub type WriterEnd = oneshot::Receiver<()>;

impl Spool {
    /// Locks and opens the file, creating it and its folder if need be, and starts the writer.
    pub fn open(
        spool: &config::Spool,
        dedupe: &config::Dedupe,
        metrics: Arc<Metrics>,
    ) -> Result<(Self, WriterEnd), OpenError> {
        let lock = Lock::take(&spool.path)?;
        let sqlite = |source| OpenError::Sqlite { path: spool.path.clone(), source };
        // Only now all of the file that is needed is read.
        let prepare = |store: Store| {
            let gauges = Arc::new(Gauges::new(store.ledger_of_events()?, store.lost()?));
            let reader = Reader::open(&spool.path)?;
            let (committed, metrics) = (Arc::new(Notify::new()), Arc::clone(&metrics));
            let writer =
                Writer::new(store, spool.max_bytes, dedupe, Arc::clone(&gauges), Arc::clone(&committed), metrics)?;
            Ok((gauges, reader, committed, writer))
        };
        let prepared = match prepare(salvage::open_or_mend(&spool.path, spool.durability, &lock)?) {
            Err(cause) if salvage::is_damage(&cause) => {
                prepare(salvage::mend(&spool.path, spool.durability, &cause.to_string())?)
            }
            prepared => prepared,
        };
        let (gauges, reader, committed, writer) = prepared.map_err(sqlite)?;
        let (inbox, commands) = mpsc::channel(INBOX_CAPACITY);
        let (ended, end) = oneshot::channel();
        let path = spool.path.clone();
        let runtime = tokio::runtime::Handle::current();
        std::thread::Builder::new()
            .name("spool-writer".to_owned())
            .spawn(move || match writer.run(commands, &runtime) {
                End::Closed => {
                    lock.release();
                    // Nobody listens any more if the process is on its way out.
                    let _ = ended.send(());
                }
                End::Damaged => salvage::order(&path),
                End::Gone => {}
            })
            .map_err(|source| OpenError::Io { path: spool.path.clone(), source })?;
        let closed = Arc::new(AtomicBool::new(false));
        Ok((
            Self {
                inbox,
                reader,
                gauges,
                committed,
                closed,
                path: Arc::from(spool.path.as_path()),
                max_bytes: spool.max_bytes,
            },
            end,
        ))
    }

    /// Returns once the event is on disk. Dropping the future does not take the event back.
    ///
    /// `replayable_until`: how long the request, captured and sent again, would be believed; until then it is recognised.
    pub async fn append(&self, event: Event, replayable_until: Option<Timestamp>) -> Result<Receipt, AppendError> {
        if self.closed.load(Ordering::Relaxed) {
            return Err(AppendError::Closed);
        }
        // Whatever waited for that disk as well would take memory, and be told no in the end.
        if self.gauges.is_stalled() {
            return Err(AppendError::Unavailable);
        }
        let (reply, answer) = oneshot::channel();
        let replayable_until_ms = replayable_until.map(Timestamp::as_millisecond);
        let command = Command::Append { event, replayable_until_ms, reply };
        self.inbox.send(command).await.map_err(|_| AppendError::Closed)?;
        answer.await.map_err(|_| AppendError::Closed)?
    }

    /// Takes no more events from now on. What has been handed over before is still committed and answered.
    pub fn close(&self) {
        self.closed.store(true, Ordering::Relaxed);
    }

    /// Has the file mended at the next start: it has turned out to be damaged.
    pub fn mend_at_next_start(&self) {
        salvage::order(&self.path);
    }

    /// Why an event would not be taken right now; `None` if it would.
    pub fn blocker(&self) -> Option<AppendError> {
        if self.closed.load(Ordering::Relaxed) {
            Some(AppendError::Closed)
        } else if !self.gauges.writable() {
            Some(AppendError::Unavailable)
        } else if self.gauges.ledger().bytes + EVENT_OVERHEAD_BYTES > self.max_bytes {
            Some(AppendError::Full)
        } else {
            None
        }
    }

    /// Records what became of published events, without waiting for the disk: if it is lost in a crash, the events
    /// are published again under the same ids.
    pub async fn settle(&self, settlements: Vec<Settlement>) {
        // The writer ends only after the publisher, or with the process.
        let _ = self.inbox.send(Command::Settle(settlements)).await;
    }

    /// Returns once everything sent before has been committed.
    pub async fn flush(&self) {
        let (reply, answer) = oneshot::channel();
        if self.inbox.send(Command::Flush(reply)).await.is_ok() {
            let _ = answer.await;
        }
    }

    /// The pending events after `seq`, in the order of acceptance: at most `limit`, and about 4 MiB of bodies.
    pub async fn pending_after(&self, seq: u64, limit: usize) -> Result<Batch, ReadError> {
        self.reader.run(move |connection| reader::pending_after(connection, seq, limit)).await
    }

    /// Parked events that were not tried within the last `retry_ms`, the longest waiting first: at most `limit`, and about 4 MiB of
    /// bodies.
    pub async fn parked_due(&self, now_ms: i64, retry_ms: i64, limit: usize) -> Result<Batch, ReadError> {
        self.reader.run(move |connection| reader::parked_due(connection, now_ms, retry_ms, limit)).await
    }

    /// Of these events, those that are not delivered yet, and whether they are parked.
    pub async fn states(&self, seqs: Vec<u64>) -> Result<Vec<(u64, bool)>, ReadError> {
        self.reader.run(move |connection| reader::states(connection, &seqs)).await
    }

    /// The file, for an [`Inspector`].
    pub fn path(&self) -> Arc<Path> {
        Arc::clone(&self.path)
    }

    /// When the oldest pending event was accepted, in milliseconds since 1970.
    pub async fn oldest_pending_ms(&self) -> Result<Option<i64>, ReadError> {
        self.reader.run(reader::oldest_pending_ms).await
    }

    /// Wakes after a commit that brought new events.
    pub fn committed(&self) -> &Notify {
        &self.committed
    }

    pub fn gauges(&self) -> &Arc<Gauges> {
        &self.gauges
    }

    pub fn max_bytes(&self) -> u64 {
        self.max_bytes
    }
}

#[cfg(test)]
mod tests;
