//! The one thread that writes: it takes whatever waits, commits it with one fsync, and answers.
//!
//! A commit that fails takes everything in it back: the webhooks are answered 503 and will not appear later, and the
//! settlements are kept for the next commit.

use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use rusqlite::ffi::SQLITE_CONSTRAINT_PRIMARYKEY;
use rusqlite::{ErrorCode, Result};
use tokio::runtime::Handle;
use tokio::sync::{Notify, mpsc, oneshot};
use tracing::{error, info, warn};

use super::dedupe::{self, First, Now, Purged, Window};
use super::error::{AppendError, is_damage};
use super::ledger::Ledger;
use super::status::SpoolStatus;
use super::store::Store;
use super::types::{Receipt, Settlement, cost};
use crate::event::Event;
use crate::log_limiter::LogLimiter;
use crate::metrics::Metrics;

/// Commands in one transaction at most: enough to share the fsync, few enough that the first does not wait long.
const BATCH_MAX: usize = 1024;
/// And bodies: the log has to fit into the reserve when it is carried over.
const BATCH_BYTES_MAX: usize = 2 * 1024 * 1024;

/// While the disk does not take writes, how often it is tried without a webhook asking.
const PROBE_EVERY: Duration = Duration::from_secs(1);

pub(super) enum Command {
    Append {
        event: Event,
        replayable_until_ms: Option<i64>,
        reply: Reply,
    },
    Settle(Vec<Settlement>),
    /// Answered after the commit.
    Flush(oneshot::Sender<()>),
}

impl Command {
    /// Of the body.
    fn bytes(&self) -> usize {
        match self {
            Self::Append { event, .. } => event.body.len(),
            Self::Settle(_) | Self::Flush(_) => 0,
        }
    }
}

type Reply = oneshot::Sender<Result<Receipt, AppendError>>;

pub(super) struct Writer {
    store: Store,
    max_bytes: u64,
    window: Window,
    /// What a failed commit still owes to the file.
    settlements: Vec<Settlement>,
    /// Why a commit has failed; the file has not been mended since.
    suspect: Option<Failure>,
    /// The files have been deleted or unmounted under us: what is in them can still be delivered, and that is all.
    gone: bool,
    /// No later try can do better.
    damaged: bool,
    status: Arc<SpoolStatus>,
    committed: Arc<Notify>,
    metrics: Arc<Metrics>,
    log_limiter: LogLimiter,
}

/// Why a commit has failed, the worst last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Failure {
    /// Somebody else writes: nothing has been written.
    Held,
    Full,
    /// Nobody knows what has reached the disk.
    Unknown,
}

impl Failure {
    fn of(cause: &rusqlite::Error) -> Self {
        match cause.sqlite_error_code() {
            Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => Self::Held,
            Some(ErrorCode::DiskFull) => Self::Full,
            _ => Self::Unknown,
        }
    }
}

/// Why a writer has ended.
pub(super) enum End {
    /// There is nothing more to do.
    Closed,
    /// The files are gone, and what was in them is delivered.
    Gone,
    /// The file has turned out to be damaged.
    Damaged,
}

/// What one transaction did, to be told once it is committed.
#[derive(Default)]
struct Outcome {
    ledger: Ledger,
    appended: u64,
    replies: Vec<(Reply, Result<Receipt, AppendError>)>,
}

impl Writer {
    pub fn new(
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
            window.load(seen.entries, seen.last, Now::read());
        }
        Ok(Self {
            store,
            max_bytes,
            window,
            settlements: Vec::new(),
            suspect: None,
            gone: false,
            damaged: false,
            status,
            committed,
            metrics,
            log_limiter: LogLimiter::default(),
        })
    }

    /// Runs until every sender of commands is gone, if nothing ends it before.
    pub fn run(mut self, mut commands: mpsc::Receiver<Command>, runtime: &Handle) -> End {
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
            let Some(first) = first else { return End::Closed };
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
                return End::Gone;
            }
        }
        End::Damaged
    }

    /// Does what the disk may not answer to.
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
                Command::Append { event, replayable_until_ms, reply } => {
                    appends.push((event, replayable_until_ms, reply))
                }
                Command::Settle(settlements) => self.settlements.extend(settlements),
                Command::Flush(reply) => flushes.push(reply),
            }
        }
        if !self.gone && !appends.is_empty() && !self.store.is_in_place() {
            self.gone = true;
            self.status.set_writable(false);
            error!(
                "the files of the spool are gone: webhooks are answered 503 until what is known is delivered, then the relay ends"
            );
        }
        if !self.may_append() {
            for (_, _, reply) in appends.drain(..) {
                // A sender that has hung up does not want to know.
                let _ = reply.send(Err(AppendError::Unavailable));
            }
        }
        let started = Instant::now();
        let durable = !appends.is_empty();
        match self.transact(appends, durable) {
            Ok(outcome) => {
                self.succeeded(&outcome.ledger);
                if outcome.appended > 0 {
                    self.metrics.spool.commit_duration.record(started.elapsed());
                    self.metrics.spool.commit_events.record(outcome.appended as f64);
                    self.committed.notify_one();
                }
                for (reply, result) in outcome.replies {
                    let _ = reply.send(result);
                }
            }
            Err((replies, cause)) => {
                self.failed(&cause);
                // Before the answers: what the failed commit has left in the log must not come back in a crash, so
                // something else is written over it, synced or not.
                if self.suspect > Some(Failure::Held) {
                    if let Ok(outcome) = self.transact(Vec::new(), false) {
                        self.succeeded(&outcome.ledger);
                    }
                    self.mend();
                }
                for reply in replies {
                    let _ = reply.send(Err(AppendError::Unavailable));
                }
            }
        }
        for reply in flushes {
            let _ = reply.send(());
        }
    }

    /// One transaction: all of it, or nothing. `durable`: see [`Store::begin`].
    fn transact(
        &mut self,
        appends: Vec<(Event, Option<i64>, Reply)>,
        durable: bool,
    ) -> Result<Outcome, (Vec<Reply>, rusqlite::Error)> {
        let mut outcome = Outcome::default();
        let mut waiting = appends.into_iter();
        let result = (|| {
            self.store.begin(durable)?;
            outcome.ledger = self.store.ledger()?;
            if let Some(Purged { last, early }) = self.window.purge(Instant::now()) {
                self.store.forget(last)?;
                if early {
                    self.warn_of_short_window();
                }
            }
            // First, because they make room.
            settle(&self.store, &mut outcome.ledger, &self.settlements)?;
            for (event, replayable_until_ms, reply) in waiting.by_ref() {
                outcome.replies.push((reply, Err(AppendError::Unavailable)));
                let answer = self.append(&mut outcome.ledger, &event, replayable_until_ms)?;
                outcome.appended += u64::from(matches!(answer, Ok(Receipt { duplicate: false, .. })));
                outcome.replies.last_mut().expect("just pushed").1 = answer;
            }
            if let Some((last, entries)) = self.window.uncommitted() {
                self.store.remember(last, entries)?;
            }
            self.store.write_ledger(&outcome.ledger)?;
            if self.suspect.is_some() {
                self.store.touch()?;
            }
            self.store.commit()
        })();
        match result {
            Ok(()) => {
                self.window.commit();
                Ok(outcome)
            }
            Err(cause) => {
                self.window.roll_back();
                if let Err(error) = self.store.rollback() {
                    error!(%error, "cannot roll back");
                }
                let replies = outcome.replies.into_iter().map(|(reply, _)| reply);
                Err((replies.chain(waiting.map(|(_, _, reply)| reply)).collect(), cause))
            }
        }
    }

    /// The inner result is the answer to the webhook; the outer one concerns the whole transaction.
    fn append(
        &mut self,
        ledger: &mut Ledger,
        event: &Event,
        replayable_until_ms: Option<i64>,
    ) -> Result<Result<Receipt, AppendError>> {
        let now = Now::read();
        if let Some(First { seq, id }) = self.window.recognise(&event.fingerprint, replayable_until_ms, now) {
            ledger.duplicates += 1;
            return Ok(Ok(Receipt { seq, id, duplicate: true }));
        }
        let cost = cost(&event.body);
        if ledger.bytes + cost > self.max_bytes {
            return Ok(Err(AppendError::Full));
        }
        let seq = ledger.accepted + 1;
        self.store.insert(seq, event)?;
        self.window.insert(seq, &event.fingerprint, event.id, replayable_until_ms, now);
        ledger.accepted = seq;
        ledger.pending += 1;
        ledger.bytes += cost;
        Ok(Ok(Receipt { seq, id: event.id, duplicate: false }))
    }

    fn warn_of_short_window(&self) {
        if let Some(unreported) = self.log_limiter.due("short-window", Instant::now()) {
            warn!(
                unreported,
                "dedupe.entries_max is too small for this traffic: re-sends and captured requests may be published again"
            );
        }
    }

    /// Whether events can be taken: the files are there, the last failure has been mended, and there is space in reserve.
    fn may_append(&mut self) -> bool {
        if self.gone || (self.suspect.is_some() && !self.mend()) {
            return false;
        }
        let held = self.store.reserve().is_held();
        if held != self.status.set_writable(held) {
            match held {
                true => info!("the spool can be written again"),
                false => error!("the disk of the spool is full: webhooks are answered 503 until there is room"),
            }
        }
        held
    }

    /// After an error of the disk nobody knows which pages of the write-ahead log have reached it: Linux forgets a
    /// failed fsync once it has told of it. So the log is carried over into the file and begun anew, and only then are
    /// events taken again. Returns whether that worked.
    fn mend(&mut self) -> bool {
        let anew = match self.suspect {
            Some(Failure::Held) | None => Ok(()),
            // It makes room, where there is some, and nobody reads the file.
            Some(Failure::Full) => self.store.start_log_anew().or_else(|cause| match cause {
                rusqlite::Error::ExecuteReturnedResults => Ok(()),
                cause if Failure::of(&cause) < Failure::Unknown => Ok(()),
                cause => Err(cause),
            }),
            Some(Failure::Unknown) => self.store.start_log_anew(),
        };
        if matches!(anew, Err(rusqlite::Error::ExecuteReturnedResults))
            && let Some(unreported) = self.log_limiter.due("log-is-read", Instant::now())
        {
            warn!(
                unreported,
                "no events are taken until nobody reads the file of the spool (spool verify, a backup, sqlite3)"
            );
        }
        match anew.map_err(|cause| (Vec::new(), cause)).and_then(|()| self.transact(Vec::new(), true)) {
            Ok(outcome) => {
                self.succeeded(&outcome.ledger);
                self.suspect = None;
                true
            }
            Err((_, cause)) => {
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

    /// Says so once, not with each commit.
    fn failed(&mut self, cause: &rusqlite::Error) {
        self.status.set_failing(true);
        self.suspect = self.suspect.max(Some(Failure::of(cause)));
        // That a number has been given already means that the totals lag behind the events.
        let given = cause.sqlite_error().map(|error| error.extended_code) == Some(SQLITE_CONSTRAINT_PRIMARYKEY);
        self.damaged |= is_damage(cause) || given;
        if may_lack_space(cause) && self.store.reserve().give_up() {
            warn!(error = %cause, "the reserve of the spool is given up, so that deliveries can go on");
        }
        if self.status.set_writable(false) {
            error!(error = %cause, "the spool cannot be written: webhooks are answered 503 until it can");
        }
    }
}

/// SQLite tells a quota that is used up as an error of the disk.
fn may_lack_space(cause: &rusqlite::Error) -> bool {
    matches!(cause.sqlite_error_code(), Some(ErrorCode::DiskFull | ErrorCode::SystemIoFailure))
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
    // Events are confirmed in long runs.
    confirmed.sort_unstable();
    for run in confirmed.chunk_by(|before, after| after - before <= 1) {
        let deleted = store.delete(run[0], run[run.len() - 1])?;
        ledger.take_out(&deleted)?;
        ledger.confirmed += deleted.events();
    }
    Ok(())
}
