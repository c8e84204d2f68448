//! Durable, ordered, bounded: the events that were accepted and are not yet delivered. Knows neither HTTP nor AMQP.
//!
//! One SQLite file, one writer thread. All waiting events are committed in one transaction with one fsync, and answered
//! after it; deletions of delivered events are part of the next transaction. An event's `seq` is its number in the
//! order of acceptance, counted over the life of the file.

mod condition;
pub mod dedupe;
mod delivered;
mod error;
mod files;
mod hints;
mod inspect;
mod ledger;
mod log_keeper;
mod log_mark;
mod mounts;
mod reader;
mod recovery;
mod reserve;
mod settings;
mod space;
mod status;
mod store;
pub mod subjects;
mod types;
mod vacuum;
mod verify;
mod writer;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use jiff::Timestamp;
use tokio::sync::{Notify, mpsc, oneshot};
use tracing::warn;

pub use condition::Condition;
use delivered::Delivered;
pub use error::{AppendError, ChangeError, FileError, OpenError, ReadError};
use files::Lock;
pub use files::sibling;
use hints::HintBox;
pub use hints::{Hint, HintTrust};
pub use inspect::{Entry, Inspector, SpoolState};
pub use ledger::Ledger;
use log_keeper::Bounds;
pub use mounts::{FileSystem, check_mount};
use reader::Reader;
pub use settings::{Durability, Settings};
pub use space::Shortage;
pub use status::SpoolStatus;
use store::Store;
use subjects::Follower;
pub use subjects::{Note, SubjectCounts};
pub use types::{Batch, EVENT_OVERHEAD_BYTES, MadeReceipt, PendingBatch, Receipt, Settlement, Stored, Undelivered};
pub use verify::Verdict;
use writer::{Append, Command, Exit, Shared, Writer};

use crate::event::{Envelope, Event};
use crate::metrics::Metrics;
use crate::subject::{Progress, State, Subject};

/// Maximum number of appends that wait for the writer; further ones wait until there is room. With bodies of 256 KiB
/// this is 256 MiB.
const INBOX_CAPACITY: usize = 1024;

/// The spool as the other modules use it: cheap to clone.
#[derive(Clone)]
pub struct Spool {
    inbox: mpsc::Sender<Command>,
    reader: Reader,
    delivered: Arc<Delivered>,
    status: Arc<SpoolStatus>,
    committed: Arc<Notify>,
    closed: Arc<AtomicBool>,
    /// Hints that are not written yet; `None` without `[reconcile]`.
    hints: Option<Arc<HintBox>>,
    path: Arc<Path>,
    max_bytes: u64,
}

/// Resolves when the writer has ended: `Ok` after every [`Spool`] is dropped, `Err` if it stopped for another reason.
pub type WriterEnd = oneshot::Receiver<()>;

impl Spool {
    /// Locks and opens the file, and starts the writer. Creates the file and its folder if they are missing.
    ///
    /// `subjects`: what to keep about scans and predictions; `None` without the section `[reconcile]`.
    pub fn open(
        settings: &Settings,
        dedupe: &dedupe::Settings,
        subjects: Option<&subjects::Settings>,
        metrics: Arc<Metrics>,
    ) -> Result<(Self, WriterEnd), OpenError> {
        let path =
            &files::resolve(&settings.path).map_err(|source| OpenError::Io { path: settings.path.clone(), source })?;
        check_mount(path)?;
        let mut lock = Lock::take(path, recovery::COMPLETE).map_err(|error| name_owner(error, path))?;
        warn_of_file_system(path);
        // This reads all that the relay needs of the file, so it may find damage that opening it did not.
        let prepare = |store| prepare(store, path, settings, dedupe, subjects, &metrics);
        let prepared = match prepare(recovery::open(path, settings.durability, &mut lock)?) {
            Err(cause) if cause.is_damage() => {
                prepare(recovery::recover(path, settings.durability, &cause.to_string(), &mut lock)?)
            }
            prepared => prepared,
        };
        let (spool, mut writer, commands) = prepared.map_err(|source| store::unusable(path, source))?;
        writer.start();
        let end = spawn_writer(writer, commands, spool.reader.clone(), lock, path)?;
        Ok((spool, end))
    }

    /// Returns once the event is on disk. Dropping the future does not take the event back.
    ///
    /// `replayable_until`: until when the same signed request would be accepted if it was captured and sent again.
    /// Until then it is recognised as a re-send.
    pub async fn append(&self, event: Event, replayable_until: Option<Timestamp>) -> Result<Receipt, AppendError> {
        let progress = if self.follows_subjects() { progress(&event) } else { None };
        self.hand_over(event, replayable_until, progress).await
    }

    /// As [`Self::append`], for an event that Prism's API told. Its subject has come as far as `progress` says.
    pub async fn append_made(&self, event: Event, progress: Progress) -> Result<MadeReceipt, AppendError> {
        let receipt = self.hand_over(event, None, Some(progress)).await?;
        Ok(if receipt.duplicate { MadeReceipt::Known } else { MadeReceipt::Stored(receipt) })
    }

    async fn hand_over(
        &self,
        event: Event,
        replayable_until: Option<Timestamp>,
        progress: Option<Progress>,
    ) -> Result<Receipt, AppendError> {
        if self.closed.load(Ordering::Relaxed) {
            return Err(AppendError::Closed);
        }
        // Waiting for a stalled disk would only take memory: the answer would be a refusal anyway.
        if self.status.is_stalled() {
            return Err(AppendError::Unavailable);
        }
        let (reply, answer) = oneshot::channel();
        let replayable_until_ms = replayable_until.map(Timestamp::as_millisecond);
        let command = Command::Append(Append { event, replayable_until_ms, progress, reply });
        self.inbox.send(command).await.map_err(|_| AppendError::Closed)?;
        answer.await.map_err(|_| AppendError::Closed)?
    }

    /// Refuses further events. Events handed over before are still committed and answered.
    pub fn close(&self) {
        self.closed.store(true, Ordering::Relaxed);
    }

    /// Marks the file as damaged, so that the next start recovers it.
    pub fn recover_at_next_start(&self) {
        recovery::request(&self.path);
    }

    /// Why an event would be refused right now; `None` if it would be accepted.
    pub fn blocker(&self) -> Option<AppendError> {
        if self.closed.load(Ordering::Relaxed) {
            Some(AppendError::Closed)
        } else if !self.status.writable() {
            Some(AppendError::Unavailable)
        } else if self.status.is_full() {
            Some(AppendError::Full)
        } else {
            None
        }
    }

    /// Records what became of published events, without waiting for the disk. A confirmed event is not read again, even
    /// if the disk takes no writes. If a crash loses it, the event is published again under the same id.
    pub async fn settle(&self, settlements: Vec<Settlement>) {
        let confirmed = settlements.iter().filter_map(|settlement| match settlement {
            Settlement::Confirmed(seq) => Some(*seq),
            Settlement::Parked { .. } | Settlement::Tried(_) => None,
        });
        self.delivered.add(confirmed.collect());
        // The writer ends only after the publisher, or with the process.
        let _ = self.inbox.send(Command::Settle(settlements)).await;
    }

    /// Whether it is kept what is known of scans and predictions.
    pub fn follows_subjects(&self) -> bool {
        self.hints.is_some()
    }

    /// Keeps a hint for later, without waiting. It may be lost with the process for about a second.
    pub fn offer_hint(&self, hint: Hint) {
        if let Some(hints) = &self.hints
            && hints.offer(hint)
        {
            // A writer that has so much to do looks for hints by itself.
            let _ = self.inbox.try_send(Command::Hints);
        }
    }

    /// Writes a note with the next transaction, without waiting for the disk.
    pub async fn note(&self, note: Note) {
        // The writer ends only after every `Spool` is dropped, or with the process.
        let _ = self.inbox.send(Command::Note(note)).await;
    }

    /// Open subjects that began at `began_before_ms` or earlier and are due to be asked for, the longest open first.
    pub async fn overdue(
        &self,
        began_before_ms: i64,
        now_ms: i64,
        limit: usize,
    ) -> Result<Vec<(Subject, State)>, ReadError> {
        self.reader.run(move |connection| subjects::overdue(connection, began_before_ms, now_ms, limit)).await
    }

    /// What is known of a subject.
    pub async fn subject(&self, subject: Subject) -> Result<Option<State>, ReadError> {
        self.reader.run(move |connection| subjects::load(connection, &subject)).await
    }

    /// How many subjects are open, and how many of them began at `began_before_ms` or earlier.
    pub async fn subject_counts(&self, began_before_ms: i64) -> Result<SubjectCounts, ReadError> {
        self.reader.run(move |connection| subjects::counts(connection, began_before_ms)).await
    }

    /// How many steps of subjects Prism's API has told since then.
    pub async fn told_by_api(&self, since_ms: i64) -> Result<u64, ReadError> {
        self.reader.run(move |connection| subjects::told_by_api(connection, since_ms)).await
    }

    /// Hints of this trust that are due to be asked for, the oldest first.
    pub async fn hints(&self, trust: HintTrust, now_ms: i64, limit: usize) -> Result<Vec<Hint>, ReadError> {
        self.reader.run(move |connection| hints::due(connection, trust, now_ms, limit)).await
    }

    /// Returns once everything sent before has been committed, or a commit has failed: settlements that are not
    /// committed then are kept for a later one.
    pub async fn flush(&self) {
        let (reply, answer) = oneshot::channel();
        if self.inbox.send(Command::Flush(reply)).await.is_ok() {
            let _ = answer.await;
        }
    }

    /// The pending events after `seq` that are not confirmed, in the order of acceptance: at most `limit`, and about
    /// 4 MiB of bodies. Events that wait behind a parked event of their subject are left out.
    pub async fn pending_after(&self, seq: u64, limit: usize) -> Result<PendingBatch, ReadError> {
        let delivered = self.delivered.runs();
        self.reader.run(move |connection| reader::pending_after(connection, seq, limit, &delivered)).await
    }

    /// Parked events that were not tried within the last `retry_ms`, longest waiting first: at most `limit`, and about
    /// 4 MiB of bodies.
    pub async fn parked_due(&self, now_ms: i64, retry_ms: i64, limit: usize) -> Result<Batch, ReadError> {
        let delivered = self.delivered.runs();
        self.reader.run(move |connection| reader::parked_due(connection, now_ms, retry_ms, limit, &delivered)).await
    }

    /// How many events were removed so far, also by another process.
    pub async fn removed(&self) -> Result<u64, ReadError> {
        self.reader.run(reader::removed).await
    }

    /// Finds out which of these events are still in the spool and not confirmed.
    pub async fn undelivered(&self, seqs: Vec<u64>) -> Result<Vec<Undelivered>, ReadError> {
        let delivered = self.delivered.runs();
        self.reader.run(move |connection| reader::undelivered(connection, &seqs, &delivered)).await
    }

    /// The path of the file, for an [`Inspector`].
    pub fn path(&self) -> Arc<Path> {
        Arc::clone(&self.path)
    }

    /// When the oldest pending event was accepted, in milliseconds since 1970.
    pub async fn oldest_pending_ms(&self) -> Result<Option<i64>, ReadError> {
        let delivered = self.delivered.runs();
        self.reader.run(move |connection| reader::oldest_pending_ms(connection, &delivered)).await
    }

    /// Holds up reads, as the writer does while it copies the log.
    #[cfg(test)]
    pub(crate) fn hold_reads(&self) -> impl Drop {
        self.reader.pause()
    }

    /// Wakes after a commit that brought new events.
    pub fn committed(&self) -> &Notify {
        &self.committed
    }

    /// The state after the last commit, without waiting for the disk.
    pub fn status(&self) -> &Arc<SpoolStatus> {
        &self.status
    }

    /// The setting `spool.max_bytes`.
    pub fn max_bytes(&self) -> u64 {
        self.max_bytes
    }
}

/// Everything of an open spool but the thread of the writer.
fn prepare(
    mut store: Store,
    path: &Path,
    settings: &Settings,
    dedupe: &dedupe::Settings,
    subjects: Option<&subjects::Settings>,
    metrics: &Arc<Metrics>,
) -> error::Result<(Spool, Writer, mpsc::Receiver<Command>)> {
    let (bounds, max_bytes) = (Bounds::of(settings.body_bytes_max), settings.max_bytes);
    let status = Arc::new(SpoolStatus::new(store.ledger_of_events()?, store.lost()?, bounds.log, max_bytes));
    let hints = Arc::new(HintBox::default());
    let follower = Follower::new(store.connection(), subjects, Arc::clone(&hints))?;
    let begun = match store.begin_session() {
        Err(cause) if cause.is_damage() => return Err(cause),
        begun => begun,
    };
    let shared = Shared {
        status,
        delivered: Arc::default(),
        reader: Reader::open(path)?,
        committed: Arc::default(),
        metrics: Arc::clone(metrics),
    };
    let (inbox, commands) = mpsc::channel(INBOX_CAPACITY);
    let spool = Spool {
        inbox,
        reader: shared.reader.clone(),
        delivered: Arc::clone(&shared.delivered),
        status: Arc::clone(&shared.status),
        committed: Arc::clone(&shared.committed),
        closed: Arc::default(),
        hints: subjects.map(|_| Arc::clone(&hints)),
        path: Arc::from(path),
        max_bytes,
    };
    let mut writer = Writer::new(store, path, bounds, max_bytes, dedupe, follower, shared)?;
    writer.on_begun(begun);
    Ok((spool, writer, commands))
}

/// How far the subject of a webhook has come.
fn progress(event: &Event) -> Option<Progress> {
    Envelope::parse(&event.body).ok().and_then(|envelope| Progress::of(&envelope))
}

fn spawn_writer(
    mut writer: Writer,
    commands: mpsc::Receiver<Command>,
    reader: Reader,
    lock: Lock,
    path: &Path,
) -> Result<WriterEnd, OpenError> {
    let (ended, end) = oneshot::channel();
    let (runtime, marked) = (tokio::runtime::Handle::current(), path.to_owned());
    let thread = std::thread::Builder::new().name("spool-writer".to_owned());
    let spawned = thread.spawn(move || match writer.run(commands, &runtime) {
        Exit::Closed => {
            // The last connection that is closed has to be one that can write.
            reader.close();
            writer.close();
            drop(lock);
            // The receiver is gone if the process exits.
            let _ = ended.send(());
        }
        Exit::Damaged => recovery::request(&marked),
        Exit::FilesGone => {}
    });
    spawned.map_err(|source| OpenError::Io { path: path.to_owned(), source })?;
    Ok(end)
}

/// Adds the process that has the spool to the error, if the file names one.
fn name_owner(error: OpenError, path: &Path) -> OpenError {
    match error {
        OpenError::Locked { path: locked, .. } => {
            OpenError::Locked { path: locked, pid: log_mark::pid(path).unwrap_or(None) }
        }
        error => error,
    }
}

fn warn_of_file_system(path: &Path) {
    if let Some(warning) = FileSystem::of(path).warning() {
        warn!(path = %path.display(), "{warning}");
    }
}

#[cfg(test)]
mod tests;
