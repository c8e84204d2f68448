//! The one thread that writes: it commits all waiting commands with one fsync, and then answers them.
//!
//! If a commit fails, nothing of it remains: its webhooks are answered 503 and will not appear later, and its
//! settlements are kept for the next commit. What a failure means, and when events are accepted again, is decided in
//! `condition`; when the write-ahead log is copied into the file, in `log_keeper`.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use tokio::runtime::Handle;
use tokio::sync::mpsc::error::TryRecvError;
use tokio::sync::{Notify, mpsc, oneshot};
use tracing::{error, info, warn};

use super::condition::{Action, Condition, Finding, Restart};
use super::dedupe::{self, Now, Purged, Window};
use super::delivered::{Delivered, Runs};
use super::error::{AppendError, Fault, Result, StoreError};
use super::ledger::Ledger;
use super::log_keeper::{BATCH_BYTES_MAX, Bounds, LogKeeper, LogStep, SETTLE_BYTES, settle_bytes};
use super::reader::Reader;
use super::reserve::Reserve;
use super::space;
use super::status::{SpoolStatus, log};
use super::store::Store;
use super::subjects::{self, Follower, Judged, Note};
use super::types::{Receipt, Settlement, cost};
use super::vacuum::{Vacuum, VacuumStep};
use crate::event::{Event, Source};
use crate::log_limiter::LogLimiter;
use crate::metrics::Metrics;
use crate::subject::{Progress, Verdict};
use crate::text::span;

/// Maximum number of commands in one transaction: enough to share the fsync, few enough that the first does not wait
/// long.
const BATCH_MAX: usize = 1024;

/// How long a stop waits for processes that read the file. The relay waits a second for its writer.
const CLOSE_PATIENCE: Duration = Duration::from_millis(800);

/// How often to try the disk while it takes no writes, and the log while another process reads it, even if no webhook
/// arrives.
const PROBE_EVERY: Duration = Duration::from_secs(1);

/// How long to wait for processes that read the log when it has to begin again: longer than our own short commands
/// take.
const PATIENCE: Duration = Duration::from_millis(250);

/// In how many more transactions the writer settles what did not fit into a batch's own, before it takes the next
/// batch: more than a batch adds, so that a large set shrinks under full load as well.
const MORE_SLICES: usize = 4;

/// Runs of delivered events that one transaction deletes at most: each counts for at least two pages of the log.
const RUNS_MAX: usize = 256;

/// Pages to give back in one transaction and in one attempt while the disk is full.
const FULL_SLICE: u64 = 512;
const FULL_SLICES: u32 = 4;

pub(super) enum Command {
    Append(Append),
    Settle(Vec<Settlement>),
    Note(Note),
    /// There are hints, after there were none.
    Hints,
    /// A request to be answered after the next commit.
    Flush(oneshot::Sender<()>),
}

pub(super) struct Append {
    pub event: Event,
    pub replayable_until_ms: Option<i64>,
    /// What the event tells, if subjects are followed.
    pub progress: Option<Progress>,
    pub reply: Reply,
}

impl Command {
    /// What the command counts for in a transaction: the length of the body, and what a subject takes of the log.
    fn bytes(&self) -> u64 {
        match self {
            Self::Append(Append { event, progress, .. }) => {
                event.body.len() as u64 + if progress.is_some() { subjects::LOG_BYTES } else { 0 }
            }
            Self::Settle(_) | Self::Note(_) | Self::Hints | Self::Flush(_) => 0,
        }
    }
}

type Reply = oneshot::Sender<Result<Receipt, AppendError>>;

/// What the writer shares with the rest of the spool.
pub(super) struct Shared {
    pub status: Arc<SpoolStatus>,
    pub delivered: Arc<Delivered>,
    pub reader: Reader,
    pub committed: Arc<Notify>,
    pub metrics: Arc<Metrics>,
}

pub(super) struct Writer {
    store: Store,
    reserve: Reserve,
    max_bytes: u64,
    window: Window,
    follower: Follower,
    /// Parked and tried events that are not committed yet, one settlement each.
    unsettled: BTreeMap<u64, Settlement>,
    keeper: LogKeeper,
    vacuum: Vacuum,
    shared: Shared,
    log_limiter: LogLimiter,
    /// Whether the last transaction waited in vain for another process's lock.
    is_locked: bool,
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
    /// Whether an event did not fit, although it would fit into an empty spool.
    has_refused: bool,
    /// The answer to each append in turn, to be sent once the transaction is committed.
    answers: Vec<Result<Receipt, AppendError>>,
    settled: Settled,
}

/// What a transaction settled.
#[derive(Default)]
pub(super) struct Settled {
    pub deleted: Runs,
    /// The parked and tried events.
    noted: Vec<u64>,
}

impl Writer {
    pub(super) fn new(
        store: Store,
        path: &Path,
        bounds: Bounds,
        max_bytes: u64,
        dedupe: &dedupe::Settings,
        follower: Follower,
        shared: Shared,
    ) -> Result<Self> {
        let mut window = Window::new(dedupe);
        if window.is_on() {
            let seen = store.seen(dedupe.entries_max)?;
            window.load(&seen.entries, seen.last, Now::read());
        }
        Ok(Self {
            store,
            reserve: Reserve::of(path, bounds.reserve),
            max_bytes,
            window,
            follower,
            unsettled: BTreeMap::new(),
            keeper: LogKeeper::new(bounds),
            vacuum: Vacuum::default(),
            shared,
            log_limiter: LogLimiter::default(),
            is_locked: false,
        })
    }

    /// Notes whether the session could begin. A disk that takes no writes now may take them later; until then a lost
    /// log would not be noticed.
    pub(super) fn on_begun(&mut self, begun: Result<()>) {
        if let Err(cause) = begun
            && self.leaves_log_unknown(&cause)
        {
            self.failed(&cause);
        }
    }

    /// Finds out whether events can be accepted, before the first one comes: truncates the log that an earlier process
    /// left, and allocates the reserve.
    pub(super) fn start(&mut self) {
        let restart = self.condition().restart().unwrap_or(Restart::IfPossible);
        self.busy(|writer| writer.probe(restart));
    }

    /// Runs until every sender of commands is gone, the files are gone and their events delivered, or the file is
    /// damaged.
    pub(super) fn run(&mut self, mut commands: mpsc::Receiver<Command>, runtime: &Handle) -> Exit {
        while self.condition() != Condition::Damaged {
            if self.condition() == Condition::Gone && self.is_all_delivered() {
                return Exit::FilesGone;
            }
            let first = match commands.try_recv() {
                Ok(first) => first,
                Err(TryRecvError::Disconnected) => return Exit::Closed,
                Err(TryRecvError::Empty) if self.use_pause() => continue,
                Err(TryRecvError::Empty) if self.is_restless() => {
                    match runtime.block_on(async { tokio::time::timeout(PROBE_EVERY, commands.recv()).await }) {
                        Ok(Some(first)) => first,
                        Ok(None) => return Exit::Closed,
                        Err(_) => {
                            self.busy(Self::look_after_disk);
                            continue;
                        }
                    }
                }
                Err(TryRecvError::Empty) => match commands.blocking_recv() {
                    Some(first) => first,
                    None => return Exit::Closed,
                },
            };
            let batch = collect(first, &mut commands);
            self.busy(|writer| writer.process(batch));
        }
        Exit::Damaged
    }

    /// Leaves everything in the file itself: its log is gone afterwards, unless another process has it open.
    pub(super) fn close(mut self) {
        // What is delivered would be published again after the next start.
        let started = Instant::now();
        self.follower.hurry();
        let limited = self.store.limit_patience(CLOSE_PATIENCE);
        while !self.nothing_to_settle() && started.elapsed() < CLOSE_PATIENCE && self.transact(&[], false).is_ok() {}
        if let Err(error) = limited.and_then(|()| self.store.end_session(CLOSE_PATIENCE)) {
            warn!(
                %error,
                "could not copy the write-ahead log of the spool into spool.db: keep both files together. Another \
                 process reads the spool (a backup, sqlite3), or the disk is failing. Accepted events are safe"
            );
        }
    }

    fn condition(&self) -> Condition {
        self.shared.status.last_condition()
    }

    /// Does work during which the disk may stall.
    fn busy<T>(&mut self, work: impl FnOnce(&mut Self) -> T) -> T {
        self.find(Finding::Began, None);
        let done = work(self);
        self.find(Finding::Ended, None);
        done
    }

    /// Whether there is something to do although no command comes.
    fn is_restless(&self) -> bool {
        let condition = self.condition();
        condition == Condition::Gone
            || condition.restart().is_some()
            || self.keeper.is_restless(self.store.log_size())
            || self.follower.has_hints()
    }

    /// Whether no pending event is left to deliver, noted or not.
    fn is_all_delivered(&self) -> bool {
        let mut done = self.shared.delivered.runs();
        for settlement in self.unsettled.values() {
            if let Settlement::Parked { seq, .. } = settlement {
                done.insert(*seq, *seq);
            }
        }
        // If it cannot be read, the publisher cannot read it either, but may hold events in memory.
        self.store.is_all_pending_in(&done).unwrap_or(self.shared.status.ledger().pending == 0)
    }

    fn look_after_disk(&mut self) {
        if self.condition() == Condition::Gone && !self.nothing_to_settle() {
            self.commit_and_answer(Vec::new());
        }
        self.look_for_files();
        self.may_append();
        self.keep_log();
    }

    fn look_for_files(&mut self) {
        if self.condition() != Condition::Gone && !self.store.is_in_place() {
            self.find(Finding::FilesGone, None);
        }
    }

    fn process(&mut self, batch: Vec<Command>) {
        let (mut appends, mut flushes) = (Vec::new(), Vec::new());
        for command in batch {
            match command {
                Command::Append(append) => appends.push(append),
                Command::Settle(settlements) => self.keep(settlements),
                Command::Note(note) => self.follower.note(note),
                Command::Hints => {}
                Command::Flush(reply) => flushes.push(reply),
            }
        }
        if !appends.is_empty() {
            self.look_for_files();
        }
        if !self.may_append() {
            refuse(appends.drain(..));
        }
        let is_idle = appends.is_empty() && flushes.is_empty() && self.nothing_to_settle();
        if !is_idle && !self.is_locked_out() && self.has_room_to_settle() {
            self.commit_and_answer(appends);
            self.settle_rest(if flushes.is_empty() { MORE_SLICES } else { usize::MAX });
        } else {
            refuse(appends.drain(..));
        }
        for reply in flushes {
            // The receiver is gone if the caller was cancelled.
            let _ = reply.send(());
        }
        self.keep_log();
    }

    /// Settles what did not fit into the last transaction in more of them, until all is settled or one fails. They are
    /// not synced.
    fn settle_rest(&mut self, slices: usize) {
        for _ in 0..slices {
            if !self.can_settle() {
                break;
            }
            self.find(Finding::Began, None);
            self.commit_and_answer(Vec::new());
            self.keep_log();
        }
    }

    /// Whether the disk was just tried and another process has locked the file: waiting for it again would look like a
    /// stall.
    fn is_locked_out(&self) -> bool {
        self.is_locked && self.condition().restart().is_some()
    }

    /// Whether there is something to settle, and the last transaction did not fail.
    fn can_settle(&self) -> bool {
        !self.nothing_to_settle() && self.shared.status.takes_settlements() && self.has_room_to_settle()
    }

    fn commit_and_answer(&mut self, appends: Vec<Append>) {
        let started = Instant::now();
        match self.commit(&appends) {
            Ok(committed) => {
                if committed.appended > 0 {
                    let metrics = &self.shared.metrics.spool;
                    metrics.commit_duration.record(started.elapsed());
                    metrics.commit_events.record(committed.appended as f64);
                    self.shared.committed.notify_one();
                }
                for (append, answer) in appends.into_iter().zip(committed.answers) {
                    // The receiver is gone if the sender has hung up.
                    let _ = append.reply.send(answer);
                }
            }
            Err(cause) => {
                let fault = self.failed(&cause);
                // Before the answers: a crash must not bring back what the failed commit left in the log, so another
                // transaction overwrites it, synced or not.
                if fault != Fault::Locked {
                    let _ = self.transact(&[], false);
                    self.may_append();
                }
                refuse(appends);
            }
        }
    }

    /// Commits the appends and some settlements. A disk that is full may have room once the write-ahead log is copied
    /// into the file, which has free pages after a backlog: then the same batch is tried once more, before it is
    /// answered.
    fn commit(&mut self, appends: &[Append]) -> Result<Transaction> {
        let durable = !appends.is_empty();
        match self.transact(appends, durable) {
            Err(cause) if self.store.fault(&cause) == Fault::NoRoom => match self.restart_log() {
                Ok(()) => self.transact(appends, durable),
                // Worse than no room: a failed sync is reported only once.
                Err(worse) if self.leaves_log_unknown(&worse) => Err(worse),
                Err(_) => Err(cause),
            },
            outcome => outcome,
        }
    }

    /// Commits the appends and as many settlements as fit into one transaction, or nothing. `durable`: see
    /// [`Store::begin`].
    fn transact(&mut self, appends: &[Append], durable: bool) -> Result<Transaction> {
        let delivered = self.shared.delivered.first(RUNS_MAX);
        let mut transaction = Transaction::default();
        let result = self.write(&mut transaction, appends, &delivered, durable);
        match result {
            Ok(()) => {
                self.is_locked = false;
                self.window.commit();
                let evicted = self.follower.commit();
                self.report_evicted_subjects(evicted);
                for seq in &transaction.settled.noted {
                    self.unsettled.remove(seq);
                }
                self.shared.delivered.remove(&transaction.settled.deleted);
                self.vacuum.on_bytes(transaction.ledger.bytes);
                let log_bytes = self.store.log_size().file;
                self.shared.status.on_commit(&transaction.ledger, log_bytes, transaction.has_refused);
                self.find(Finding::Committed, None);
                Ok(transaction)
            }
            Err(cause) => {
                self.window.roll_back();
                self.follower.roll_back();
                if let Err(error) = self.store.rollback() {
                    error!(%error, "cannot roll back a failed commit");
                }
                Err(cause)
            }
        }
    }

    fn write(
        &mut self,
        transaction: &mut Transaction,
        appends: &[Append],
        delivered: &Runs,
        durable: bool,
    ) -> Result<()> {
        self.store.begin(durable)?;
        transaction.ledger = self.store.ledger()?;
        let now = Now::read();
        if let Some(Purged { last, early }) = self.window.purge(now.monotonic) {
            self.store.forget(last)?;
            if early {
                self.warn_of_short_window();
            }
        }
        // Before the appends, because they make room.
        transaction.settled = settle(&self.store, &mut transaction.ledger, self.unsettled.values(), delivered)?;
        self.append(transaction, appends, now)?;
        self.follower.write(self.store.connection(), now.wall_ms, now.monotonic)?;
        self.store.remember(self.window.last(), self.window.uncommitted())?;
        self.store.write_ledger(&transaction.ledger)?;
        if self.condition() != Condition::Healthy {
            self.store.touch()?;
        }
        self.store.commit()
    }

    /// Inserts what is new and fits, and notes the answer to each webhook.
    fn append(&mut self, transaction: &mut Transaction, appends: &[Append], now: Now) -> Result<()> {
        let ledger = &mut transaction.ledger;
        // The log beyond its normal size takes the space of events.
        let excess = self.shared.status.log_excess();
        let mut insertion = self.store.insertion()?;
        for Append { event, replayable_until_ms, progress, .. } in appends {
            let (cost, until, seq) = (cost(&event.body), *replayable_until_ms, ledger.accepted + 1);
            let fits = |used: u64| used.saturating_add(cost) <= self.max_bytes;
            // The API's events are recognised by their subject alone: what it tells of a second run has the same body.
            let is_webhook = event.source == Source::Webhook;
            let resent = if is_webhook { self.window.recognise(event, until, now) } else { None };
            let judged = match progress {
                Some(progress) if resent.is_none() => {
                    self.follower.judge(self.store.connection(), progress, event, seq)?
                }
                Some(_) | None => None,
            };
            let answer = match (resent, judged) {
                (Some(first), _) => {
                    ledger.duplicates += 1;
                    Ok(first)
                }
                (None, Some(judged @ Judged { verdict: Verdict::LateCopy(made), .. })) => {
                    self.window.insert_as(made.seq, made.id, event, until, now);
                    self.follower.save(self.store.connection(), &judged)?;
                    ledger.duplicates += 1;
                    Ok(Receipt { seq: made.seq, id: made.id, duplicate: true })
                }
                (None, Some(Judged { verdict: Verdict::Known, .. })) => Ok(Receipt::of_known(event)),
                (None, judged) if fits(ledger.bytes.saturating_add(excess)) => {
                    insertion.insert(seq, event)?;
                    if is_webhook {
                        self.window.insert(seq, event, until, now);
                    }
                    if let Some(judged) = judged {
                        self.follower.save(self.store.connection(), &judged)?;
                    }
                    ledger.accepted = seq;
                    ledger.pending += 1;
                    ledger.bytes += cost;
                    transaction.appended += 1;
                    Ok(Receipt { seq, id: event.id, duplicate: false })
                }
                (None, _) => {
                    transaction.has_refused |= fits(0);
                    if fits(ledger.bytes) {
                        self.warn_of_full_log();
                    }
                    Err(AppendError::Full)
                }
            };
            transaction.answers.push(answer);
        }
        Ok(())
    }

    fn warn_of_full_log(&self) {
        if let Some(unreported) = self.log_limiter.due("full-log", Instant::now()) {
            let log_bytes = self.store.log_size().file;
            warn!(
                log_bytes,
                unreported,
                "answering webhooks 503: the write-ahead log of the spool fills spool.max_bytes, because another \
                 process reads the spool file (a backup, sqlite3); stop that process"
            );
        }
    }

    fn report_evicted_subjects(&self, evicted: u64) {
        self.shared.metrics.reconcile.evicted.increment(evicted);
        if evicted > 0
            && let Some(evicted) = self.log_limiter.add("evicted-subjects", evicted, Instant::now())
        {
            warn!(
                evicted,
                "forgot scans and predictions that have not ended, because there are more than \
                 reconcile.subjects_max: the relay does not ask Prism's API for their ends; raise it"
            );
        }
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

    /// Keeps settlements for the next commit, one for each event: repeats take no more room. That an event is parked
    /// says more than that it was tried.
    fn keep(&mut self, settlements: Vec<Settlement>) {
        for settlement in settlements {
            match settlement {
                Settlement::Confirmed(seq) => {
                    self.unsettled.remove(&seq);
                }
                Settlement::Parked { seq, .. } => {
                    self.unsettled.insert(seq, settlement);
                }
                Settlement::Tried(seq) => {
                    self.unsettled.entry(seq).or_insert(settlement);
                }
            }
        }
    }

    fn nothing_to_settle(&self) -> bool {
        self.unsettled.is_empty() && self.shared.delivered.is_empty() && !self.follower.is_due()
    }

    /// Whether events can be accepted. Tries the disk again if it failed or was full.
    fn may_append(&mut self) -> bool {
        match self.condition() {
            Condition::Healthy if !self.keeper.is_held() => true,
            Condition::Healthy => {
                match self.has_room_for_batch() {
                    Ok(true) => {}
                    Ok(false) => self.find(Finding::NoRoom, None),
                    Err(cause) => {
                        self.failed(&cause);
                    }
                }
                self.condition() == Condition::Healthy
            }
            condition => condition.restart().is_some_and(|restart| self.probe(restart)),
        }
    }

    /// Whether the log could be copied into the file after it has grown by this much. Only a reader makes that
    /// uncertain: it lets the log grow until the disk is full, and then there would be no room for the copy when the
    /// reader has gone.
    fn has_room_for_log(&self, more: u64) -> Result<bool> {
        let needed = self.store.growth()?.saturating_add(more);
        Ok(needed <= self.reserve.bytes_held().saturating_add(space::free(self.store.path())))
    }

    /// Whether there is room for a batch, which grows the log and then the file, and for the settlements that are
    /// committed with it.
    fn has_room_for_batch(&self) -> Result<bool> {
        let bounds = self.keeper.bounds();
        self.has_room_for_log(2 * bounds.batch + bounds.settle)
    }

    /// Whether there is room to note what became of events. They are not lost without: see [`Delivered`].
    fn has_room_to_settle(&self) -> bool {
        let is_short = self.keeper.is_held() && self.condition() == Condition::Full;
        // If it cannot be found out, the commit fails and says why.
        !is_short || self.has_room_for_log(self.keeper.bounds().settle).unwrap_or(true)
    }

    /// Makes sure that the disk works; events are accepted only after that. Returns whether it does.
    fn probe(&mut self, restart: Restart) -> bool {
        match self.try_disk(restart) {
            Ok(true) => self.find(Finding::Works, None),
            Ok(false) => self.find(Finding::NoRoom, None),
            Err(cause) => {
                self.failed(&cause);
            }
        }
        self.condition() == Condition::Healthy
    }

    /// Returns whether there is room for the reserve and for a copy of the log.
    fn try_disk(&mut self, restart: Restart) -> Result<bool> {
        match restart {
            Restart::Skip => {}
            Restart::IfPossible => self.restart_log_if_possible()?,
            Restart::Must => self.make_room()?,
        }
        if self.keeper.is_held() && !self.has_room_for_batch()? {
            return Ok(false);
        }
        self.transact(&[], true)?;
        Ok(self.reserve.is_held())
    }

    fn restart_log_if_possible(&mut self) -> Result<()> {
        loop {
            let Err(cause) = self.make_room() else { return Ok(()) };
            match self.store.fault(&cause) {
                // The reserve is for this.
                Fault::NoRoom if self.free_reserve(&cause) => {}
                _ if self.leaves_log_unknown(&cause) => return Err(cause),
                _ => return Ok(()),
            }
        }
    }

    /// Whether it is unknown after this failure what of the log is on the disk.
    fn leaves_log_unknown(&self, cause: &StoreError) -> bool {
        match self.store.fault(cause) {
            Fault::Io | Fault::Other | Fault::Damage => true,
            Fault::LogInUse | Fault::NoRoom | Fault::Locked => false,
        }
    }

    /// Gives free pages back, and begins the log again, which makes room as well: if there is none to give pages back,
    /// that comes first.
    fn make_room(&mut self) -> Result<()> {
        match self.give_back_pages() {
            Err(cause) if self.store.fault(&cause) != Fault::NoRoom => Err(cause),
            Ok(()) | Err(_) => self.restart_log(),
        }
    }

    /// Gives free pages back to a disk that has no room for the reserve. A quarter of the file at a time at most, so
    /// that the writer answers soon.
    fn give_back_pages(&mut self) -> Result<()> {
        if self.reserve.bytes_held() > 0 || self.keeper.is_held() {
            return Ok(());
        }
        for _ in 0..FULL_SLICES {
            if self.store.pages()?.free == 0 {
                break;
            }
            self.store.vacuum(FULL_SLICE)?;
            self.restart_log()?;
        }
        Ok(())
    }

    /// Copies the log into the file and truncates it, while no own read is under way.
    fn restart_log(&mut self) -> Result<()> {
        self.truncate_log(PATIENCE)
    }

    fn truncate_log(&mut self, patience: Duration) -> Result<()> {
        let restarted = {
            let _paused = self.shared.reader.pause();
            self.store.restart_log(patience)
        };
        match &restarted {
            Ok(()) => self.keeper.on_truncated(),
            Err(StoreError::LogInUse) => self.keeper.hold(Instant::now()),
            Err(StoreError::Sqlite(_) | StoreError::WrongTotals) => {}
        }
        self.shared.status.set_log_bytes(self.store.log_size().file);
        restarted
    }

    /// Copies the log into the file when it is due, after the answers: they do not depend on it. A failed copy is a
    /// failed commit.
    fn keep_log(&mut self) {
        if self.condition() != Condition::Healthy {
            return;
        }
        let size = self.store.log_size();
        let done = match self.keeper.due(size, Instant::now()) {
            LogStep::Nothing => return,
            LogStep::Copy => self.store.copy_log(!self.keeper.is_held()).map(|complete| {
                self.keeper.on_copied(size, complete, Instant::now());
                self.shared.status.set_log_bytes(self.store.log_size().file);
            }),
            LogStep::Truncate => match self.truncate_log(Duration::ZERO) {
                // The copy did what was possible.
                Err(StoreError::LogInUse) => Ok(()),
                done => done,
            },
        };
        self.report_held_log();
        if let Err(cause) = done {
            self.failed(&cause);
            self.may_append();
        }
    }

    fn report_held_log(&mut self) {
        let (now, log_bytes) = (Instant::now(), self.store.log_size().file);
        let held = self.keeper.held_for_long(now);
        let was_held = self.shared.status.set_log_held(held.is_some());
        match held {
            Some(held) => {
                if let Some(unreported) = self.log_limiter.due("log-held", now) {
                    let held = span(held);
                    warn!(
                        log_bytes,
                        held,
                        unreported,
                        "the write-ahead log of the spool cannot shrink, because another process reads the spool file \
                         (a backup, sqlite3): webhooks are accepted until the log fills spool.max_bytes or the disk; \
                         stop that process"
                    );
                }
            }
            None if was_held => info!(log_bytes, "the write-ahead log of the spool shrinks again"),
            None => {}
        }
    }

    /// Uses a pause between two commands to settle what is left, and to give free pages back to the disk. Returns
    /// whether it did anything.
    fn use_pause(&mut self) -> bool {
        if self.can_settle() {
            self.busy(|writer| writer.settle_rest(1));
            return true;
        }
        if !self.vacuum.is_due() || self.condition() != Condition::Healthy || self.keeper.is_held() {
            return false;
        }
        let done = self.busy(|writer| {
            let pages = writer.store.pages()?;
            match writer.vacuum.next(&pages) {
                VacuumStep::Free(count) => writer.store.vacuum(count)?,
                // The copy makes the file shorter.
                VacuumStep::Finish => {
                    let size = writer.store.log_size();
                    let complete = writer.store.copy_log(true)?;
                    writer.keeper.on_copied(size, complete, Instant::now());
                }
                VacuumStep::Nothing => {}
            }
            writer.keep_log();
            Ok(())
        });
        if let Err(cause) = done {
            self.failed(&cause);
        }
        true
    }

    /// Returns what the failure says about the disk.
    fn failed(&mut self, cause: &StoreError) -> Fault {
        let fault = self.store.fault(cause);
        self.is_locked = fault == Fault::Locked;
        self.find(Finding::Failed(fault), Some(cause));
        fault
    }

    fn find(&mut self, finding: Finding, cause: Option<&StoreError>) {
        for action in self.shared.status.find(finding) {
            if let (Action::FreeReserve, Some(cause)) = (action, cause) {
                self.free_reserve(cause);
            }
            log(action, cause);
        }
    }

    /// Returns whether there was any.
    fn free_reserve(&mut self, cause: &StoreError) -> bool {
        let is_freed = self.reserve.give_up();
        if is_freed {
            warn!(error = %cause, "the reserve of the spool was freed: deliveries go on while the disk is full");
        }
        is_freed
    }
}

/// Takes the commands that wait.
fn collect(first: Command, commands: &mut mpsc::Receiver<Command>) -> Vec<Command> {
    let (mut bytes, mut batch) = (first.bytes(), vec![first]);
    while batch.len() < BATCH_MAX
        && bytes < BATCH_BYTES_MAX
        && let Ok(next) = commands.try_recv()
    {
        bytes += next.bytes();
        batch.push(next);
    }
    batch
}

fn refuse(appends: impl IntoIterator<Item = Append>) {
    for append in appends {
        // The receiver is gone if the sender has hung up.
        let _ = append.reply.send(Err(AppendError::Unavailable));
    }
}

/// Settles as much as [`SETTLE_BYTES`] of the log take: a disk that is full has no room for more, and the first
/// settlements make some for the next.
pub(super) fn settle<'a>(
    store: &Store,
    ledger: &mut Ledger,
    unsettled: impl Iterator<Item = &'a Settlement>,
    delivered: &Runs,
) -> Result<Settled> {
    let (mut settled, mut log) = (Settled::default(), 0);
    // First, because only deletions make room.
    for (mut first, last) in delivered.iter() {
        while first <= last && log < SETTLE_BYTES {
            let (deleted, end) = store.delete_some(first, last, (SETTLE_BYTES - log) / 2)?;
            ledger.take_out(&deleted)?;
            ledger.confirmed += deleted.events();
            settled.deleted.insert(first, end);
            log += settle_bytes(deleted.bytes);
            first = end + 1;
        }
    }
    for settlement in unsettled {
        if log >= SETTLE_BYTES {
            break;
        }
        let (seq, length) = match settlement {
            Settlement::Parked { seq, reason } => {
                if store.park(*seq, reason, Timestamp::now().as_millisecond())? {
                    ledger.park()?;
                }
                (*seq, reason.len() as u64)
            }
            Settlement::Tried(seq) => {
                store.tried(*seq, Timestamp::now().as_millisecond())?;
                (*seq, 0)
            }
            // Those are in `delivered`.
            Settlement::Confirmed(_) => continue,
        };
        settled.noted.push(seq);
        log += settle_bytes(store.cost(seq)? + length);
    }
    Ok(settled)
}
