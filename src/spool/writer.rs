//! The one thread that writes: it commits all waiting commands with one fsync, and then answers them.
//!
//! If a commit fails, nothing of it remains: its webhooks are answered 503 and will not appear later, and its
//! settlements are kept for the next commit.

use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use rusqlite::ffi::SQLITE_CONSTRAINT_PRIMARYKEY;
use rusqlite::{ErrorCode, Result};
use tokio::runtime::Handle;
use tokio::sync::{Notify, mpsc, oneshot};
use tracing::{error, info, warn};

use super::dedupe::{self, Now, Purged, Window};
use super::error::{AppendError, is_damage, may_lack_space};
use super::ledger::Ledger;
use super::status::SpoolStatus;
use super::store::Store;
use super::types::{Receipt, Settlement, cost};
use crate::event::Event;
use crate::log_limiter::LogLimiter;
use crate::metrics::Metrics;

/// Maximum number of commands in one transaction: enough to share the fsync, few enough that the first does not wait
/// long.
const BATCH_MAX: usize = 1024;
/// Maximum bytes of bodies in one transaction: a checkpoint of the log has to fit into the reserve.
const BATCH_BYTES_MAX: usize = 2 * 1024 * 1024;

/// How long a stop waits for processes that read the file. The relay waits a second for its writer.
const CLOSE_PATIENCE: Duration = Duration::from_millis(800);

/// How often to try the disk while it takes no writes, even if no webhook arrives.
const PROBE_EVERY: Duration = Duration::from_secs(1);

pub(super) enum Command {
    Append(Append),
    Settle(Vec<Settlement>),
    /// A request to be answered after the next commit.
    Flush(oneshot::Sender<()>),
}

pub(super) struct Append {
    pub event: Event,
    pub replayable_until_ms: Option<i64>,
    pub reply: Reply,
}

impl Command {
    /// The length of the body.
    fn bytes(&self) -> usize {
        match self {
            Self::Append(append) => append.event.body.len(),
            Self::Settle(_) | Self::Flush(_) => 0,
        }
    }
}

type Reply = oneshot::Sender<Result<Receipt, AppendError>>;

pub(super) struct Writer {
    store: Store,
    max_bytes: u64,
    window: Window,
    /// Settlements that are not committed yet.
    settlements: Vec<Settlement>,
    /// Why the last commits failed. `None` again when [`Self::resume`] has succeeded.
    failure: Option<CommitFailure>,
    /// The files were deleted or unmounted: their events can still be delivered, but no event can be accepted.
    gone: bool,
    /// The file is damaged, so that trying again cannot help.
    damaged: bool,
    status: Arc<SpoolStatus>,
    committed: Arc<Notify>,
    metrics: Arc<Metrics>,
    log_limiter: LogLimiter,
}

/// Why a commit failed, the worst last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum CommitFailure {
    /// Another process holds the lock: nothing was written.
    Locked,
    DiskFull,
    /// Any part of it may have reached the disk.
    Unknown,
}

impl CommitFailure {
    fn of(cause: &rusqlite::Error) -> Self {
        match cause.sqlite_error_code() {
            Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => Self::Locked,
            Some(ErrorCode::DiskFull) => Self::DiskFull,
            _ => Self::Unknown,
        }
    }
}

/// Why the writer ended.
pub(super) enum Exit {
    /// Every sender of commands is gone.
    Closed,
    /// The files are gone, and all their events are delivered.
    FilesGone,
    /// The file is damaged.
    Damaged,
}

/// What a transaction did.
#[derive(Default)]
struct Transaction {
    ledger: Ledger,
    appended: u64,
    /// The answer to each append in turn, to be sent once the transaction is committed.
    answers: Vec<Result<Receipt, AppendError>>,
}

impl Writer {
    pub(super) fn new(
        store: Store,
        max_bytes: u64,
        dedupe: &dedupe::Settings,
        status: Arc<SpoolStatus>,
        committed: Arc<Notify>,
        metrics: Arc<Metrics>,
    ) -> Result<Self> {
        let mut window = Window::new(dedupe);
        if window.is_on() {
            let seen = store.seen(dedupe.entries_max)?;
            window.load(&seen.entries, seen.last, Now::read());
        }
        Ok(Self {
            store,
            max_bytes,
            window,
            settlements: Vec::new(),
            failure: None,
            gone: false,
            damaged: false,
            status,
            committed,
            metrics,
            log_limiter: LogLimiter::default(),
        })
    }

    /// Runs until every sender of commands is gone, the files are gone and their events delivered, or the file is
    /// damaged.
    pub(super) fn run(&mut self, mut commands: mpsc::Receiver<Command>, runtime: &Handle) -> Exit {
        while !self.damaged {
            let first = if self.status.writable() {
                commands.blocking_recv()
            } else {
                match runtime.block_on(async { tokio::time::timeout(PROBE_EVERY, commands.recv()).await }) {
                    Ok(first) => first,
                    Err(_) => {
                        self.busy(Self::may_append);
                        continue;
                    }
                }
            };
            let Some(first) = first else { return Exit::Closed };
            let (mut bytes, mut batch) = (first.bytes(), vec![first]);
            while batch.len() < BATCH_MAX
                && bytes < BATCH_BYTES_MAX
                && let Ok(next) = commands.try_recv()
            {
                bytes += next.bytes();
                batch.push(next);
            }
            self.busy(|writer| writer.process(batch));
            if self.gone && self.status.ledger().pending == 0 {
                return Exit::FilesGone;
            }
        }
        Exit::Damaged
    }

    /// Leaves everything in the file itself: its log is gone afterwards, unless another process has it open.
    pub(super) fn close(mut self) {
        if let Err(error) = self.store.end_session(CLOSE_PATIENCE) {
            warn!(
                %error,
                "could not copy the write-ahead log of the spool into spool.db: keep both files together. Another \
                 process reads the spool (a backup, sqlite3), or the disk is failing. Accepted events are safe"
            );
        }
    }

    /// Does work during which the disk may stall.
    fn busy<T>(&mut self, work: impl FnOnce(&mut Self) -> T) -> T {
        self.status.set_busy(Some(Instant::now()));
        let done = work(self);
        self.status.set_busy(None);
        done
    }

    fn process(&mut self, batch: Vec<Command>) {
        let (mut appends, mut flushes) = (Vec::new(), Vec::new());
        for command in batch {
            match command {
                Command::Append(append) => appends.push(append),
                Command::Settle(settlements) => self.settlements.extend(settlements),
                Command::Flush(reply) => flushes.push(reply),
            }
        }
        if !self.gone && !appends.is_empty() && !self.store.is_in_place() {
            self.gone = true;
            self.status.set_writable(false);
            error!(
                "spool files were deleted or unmounted: answering 503, delivering what is still readable, then exiting"
            );
        }
        if !self.may_append() {
            for append in appends.drain(..) {
                // The receiver is gone if the sender has hung up.
                let _ = append.reply.send(Err(AppendError::Unavailable));
            }
        }
        let started = Instant::now();
        match self.commit(&appends) {
            Ok(committed) => {
                self.succeeded(&committed.ledger);
                if committed.appended > 0 {
                    self.metrics.spool.commit_duration.record(started.elapsed());
                    self.metrics.spool.commit_events.record(committed.appended as f64);
                    self.committed.notify_one();
                }
                for (append, answer) in appends.into_iter().zip(committed.answers) {
                    let _ = append.reply.send(answer);
                }
            }
            Err(cause) => {
                self.failed(&cause);
                // Before the answers: a crash must not bring back what the failed commit left in the log, so another
                // transaction overwrites it, synced or not.
                if self.failure > Some(CommitFailure::Locked) {
                    if let Ok(committed) = self.transact(&[], false) {
                        self.succeeded(&committed.ledger);
                    }
                    self.resume();
                }
                for append in appends {
                    let _ = append.reply.send(Err(AppendError::Unavailable));
                }
            }
        }
        for reply in flushes {
            let _ = reply.send(());
        }
    }

    /// Commits the appends and all settlements. A disk that is full may have room once the write-ahead log is copied
    /// into the file, which has free pages after a backlog: then the same batch is tried once more, before it is
    /// answered.
    fn commit(&mut self, appends: &[Append]) -> Result<Transaction> {
        let durable = !appends.is_empty();
        match self.transact(appends, durable) {
            Err(cause) if CommitFailure::of(&cause) == CommitFailure::DiskFull && self.store.restart_log().is_ok() => {
                self.transact(appends, durable)
            }
            outcome => outcome,
        }
    }

    /// Commits the appends and all settlements, or nothing. `durable`: see [`Store::begin`].
    fn transact(&mut self, appends: &[Append], durable: bool) -> Result<Transaction> {
        let mut transaction = Transaction::default();
        let result = (|| {
            self.store.begin(durable)?;
            transaction.ledger = self.store.ledger()?;
            if let Some(Purged { last, early }) = self.window.purge(Instant::now()) {
                self.store.forget(last)?;
                if early {
                    self.warn_of_short_window();
                }
            }
            // Before the appends, because they make room.
            settle(&self.store, &mut transaction.ledger, &self.settlements)?;
            for Append { event, replayable_until_ms, .. } in appends {
                let answer = self.append(&mut transaction.ledger, event, *replayable_until_ms)?;
                transaction.appended += u64::from(matches!(answer, Ok(Receipt { duplicate: false, .. })));
                transaction.answers.push(answer);
            }
            self.store.remember(self.window.last(), self.window.uncommitted())?;
            self.store.write_ledger(&transaction.ledger)?;
            if self.failure.is_some() {
                self.store.touch()?;
            }
            self.store.commit()
        })();
        match result {
            Ok(()) => {
                self.window.commit();
                Ok(transaction)
            }
            Err(cause) => {
                self.window.roll_back();
                if let Err(error) = self.store.rollback() {
                    error!(%error, "cannot roll back a failed commit");
                }
                Err(cause)
            }
        }
    }

    /// The inner result is the answer to the webhook; the outer error fails the whole transaction.
    fn append(
        &mut self,
        ledger: &mut Ledger,
        event: &Event,
        replayable_until_ms: Option<i64>,
    ) -> Result<Result<Receipt, AppendError>> {
        let now = Now::read();
        if let Some(first) = self.window.recognise(event, replayable_until_ms, now) {
            ledger.duplicates += 1;
            return Ok(Ok(first));
        }
        let cost = cost(&event.body);
        if ledger.bytes + cost > self.max_bytes {
            return Ok(Err(AppendError::Full));
        }
        let seq = ledger.accepted + 1;
        self.store.insert(seq, event)?;
        self.window.insert(seq, event, replayable_until_ms, now);
        ledger.accepted = seq;
        ledger.pending += 1;
        ledger.bytes += cost;
        Ok(Ok(Receipt { seq, id: event.id, duplicate: false }))
    }

    fn warn_of_short_window(&self) {
        if let Some(unreported) = self.log_limiter.due("short-window", Instant::now()) {
            warn!(
                unreported,
                "dedupe.entries_max is too small for this traffic: re-sends and captured requests may be published \
                 again; raise it"
            );
        }
    }

    /// Whether events can be accepted: the files are there, commits succeed, and the reserve is allocated.
    fn may_append(&mut self) -> bool {
        if self.gone || (self.failure.is_some() && !self.resume()) {
            return false;
        }
        let ledger = self.status.ledger();
        // After a backlog the file may have all the space in its free pages, and the reserve would never fit again.
        if ledger.pending + ledger.parked == 0 && self.store.reserve().is_due() {
            // If it fails, the disk is as full as before.
            let _ = self.store.shrink();
        }
        let held = self.store.reserve().is_held();
        if held != self.status.set_writable(held) {
            match held {
                true => info!("the spool can be written again: accepting webhooks"),
                false => error!("the spool's disk is full: answering webhooks 503 until there is room"),
            }
        }
        held
    }

    /// Makes sure after a failed commit that the disk works again; events are accepted only after that. Returns whether
    /// it does.
    ///
    /// After a disk error it is unknown which pages of the write-ahead log reached the disk: Linux reports a failed
    /// fsync once and then forgets it. So the log is copied into the file and truncated first.
    fn resume(&mut self) -> bool {
        let restarted = match self.failure {
            Some(CommitFailure::Locked) | None => Ok(()),
            // Restarting the log makes room if there is some, unless another process reads the file.
            Some(CommitFailure::DiskFull) => self.store.restart_log().or_else(|cause| match cause {
                rusqlite::Error::ExecuteReturnedResults => Ok(()),
                cause if CommitFailure::of(&cause) < CommitFailure::Unknown => Ok(()),
                cause => Err(cause),
            }),
            Some(CommitFailure::Unknown) => self.store.restart_log(),
        };
        if matches!(restarted, Err(rusqlite::Error::ExecuteReturnedResults))
            && let Some(unreported) = self.log_limiter.due("log-is-read", Instant::now())
        {
            warn!(
                unreported,
                "cannot accept events while another process reads the spool file (spool verify, a backup, sqlite3); \
                 stop it"
            );
        }
        match restarted.and_then(|()| self.transact(&[], true)) {
            Ok(committed) => {
                self.succeeded(&committed.ledger);
                self.failure = None;
                true
            }
            Err(cause) => {
                self.failed(&cause);
                false
            }
        }
    }

    fn succeeded(&mut self, ledger: &Ledger) {
        self.settlements.clear();
        self.status.set_failing(false);
        self.status.set_ledger(ledger);
    }

    /// Logs the first failure only.
    fn failed(&mut self, cause: &rusqlite::Error) {
        self.status.set_failing(true);
        self.failure = self.failure.max(Some(CommitFailure::of(cause)));
        // A number that an event has already means that the totals are behind the events.
        let is_taken = cause.sqlite_error().map(|error| error.extended_code) == Some(SQLITE_CONSTRAINT_PRIMARYKEY);
        self.damaged |= is_damage(cause) || is_taken;
        if may_lack_space(cause) && self.store.reserve().give_up() {
            warn!(error = %cause, "the reserve of the spool was freed: deliveries go on while the disk is full");
        }
        if self.status.set_writable(false) {
            error!(error = %cause, "the spool cannot be written: answering webhooks 503 until it can");
        }
    }
}

fn settle(store: &Store, ledger: &mut Ledger, settlements: &[Settlement]) -> Result<()> {
    let mut confirmed = Vec::with_capacity(settlements.len());
    for settlement in settlements {
        match settlement {
            Settlement::Confirmed(seq) => confirmed.push(*seq),
            Settlement::Parked { seq, reason } => {
                if store.park(*seq, reason, Timestamp::now().as_millisecond())? {
                    ledger.park()?;
                }
            }
            Settlement::Tried(seq) => store.tried(*seq, Timestamp::now().as_millisecond())?,
        }
    }
    // Events are confirmed in long runs, so runs are deleted.
    confirmed.sort_unstable();
    for run in confirmed.chunk_by(|before, after| after - before <= 1) {
        let deleted = store.delete(run[0], run[run.len() - 1])?;
        ledger.take_out(&deleted)?;
        ledger.confirmed += deleted.events();
    }
    Ok(())
}
