//! What the last commit left behind, readable at any time without waiting for the disk.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tracing::{error, info};

use super::condition::{Action, Condition, DiskState, Finding, STALL};
use super::error::StoreError;
use super::ledger::Ledger;
use super::store::BUSY_TIMEOUT;
use super::types::EVENT_OVERHEAD_BYTES;

// A commit that waits for another process's lock is not a stalled disk.
const _: () = assert!(STALL.as_millis() > BUSY_TIMEOUT.as_millis());

/// The totals, and the condition of the disk. The writer sets it, everything else reads it.
#[derive(Debug)]
pub struct SpoolStatus {
    ledger: Mutex<Ledger>,
    disk: Mutex<DiskState>,
    /// Bytes of the write-ahead log's file.
    log_bytes: AtomicU64,
    /// Size that the log exceeds only while another process reads the file.
    log_bound: u64,
    /// An event did not fit, and nothing has left the spool since.
    has_refused: AtomicBool,
    /// Another process has held up the log for long.
    is_log_held: AtomicBool,
    max_bytes: u64,
    lost: u64,
}

impl SpoolStatus {
    pub(super) fn new(ledger: Ledger, lost: u64, log_bound: u64, max_bytes: u64) -> Self {
        Self {
            ledger: Mutex::new(ledger),
            disk: Mutex::default(),
            log_bytes: AtomicU64::new(0),
            log_bound,
            has_refused: AtomicBool::new(false),
            is_log_held: AtomicBool::new(false),
            max_bytes,
            lost,
        }
    }

    /// The ledger after the last commit.
    pub fn ledger(&self) -> Ledger {
        *self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Accepted events that could not be read after the file was damaged. [`Ledger::removed`] includes them.
    pub fn lost(&self) -> u64 {
        self.lost
    }

    /// The condition of the disk.
    pub fn condition(&self) -> Condition {
        self.disk().at(Instant::now())
    }

    /// Whether the disk takes events, as far as is known.
    pub fn writable(&self) -> bool {
        self.condition() == Condition::Healthy
    }

    /// Whether settlements can be written. That may be possible on a disk that takes no events.
    pub fn takes_settlements(&self) -> bool {
        self.disk().settles(Instant::now())
    }

    /// Whether a write has neither succeeded nor failed for 8 s.
    pub fn is_stalled(&self) -> bool {
        matches!(self.condition(), Condition::Stalled { .. })
    }

    /// Size of the write-ahead log's file.
    pub fn log_bytes(&self) -> u64 {
        self.log_bytes.load(Ordering::Relaxed)
    }

    /// Bytes that count against `spool.max_bytes`: the events, and the write-ahead log beyond its normal size.
    pub fn used_bytes(&self) -> u64 {
        self.ledger().bytes.saturating_add(self.log_excess())
    }

    /// Whether the next event, however small, would exceed `spool.max_bytes`, or one has and nothing has left the spool
    /// since.
    pub fn is_full(&self) -> bool {
        self.has_refused.load(Ordering::Relaxed)
            || self.used_bytes().saturating_add(EVENT_OVERHEAD_BYTES) > self.max_bytes
    }

    /// What is wrong with the file or its disk, and what to do; `None` if nothing is.
    pub fn reason(&self) -> Option<&'static str> {
        self.condition().reason().or_else(|| {
            if self.log_excess() > 0 && self.is_full() {
                Some(
                    "another process reads the spool file (a backup, sqlite3), so the write-ahead log cannot shrink \
                     and counts against spool.max_bytes; stop that process",
                )
            } else if self.is_log_held.load(Ordering::Relaxed) {
                Some(
                    "another process reads the spool file (a backup, sqlite3), so the write-ahead log grows; stop that \
                     process",
                )
            } else {
                None
            }
        })
    }

    /// Logs once if the disk has stopped answering. To be called every few seconds.
    pub fn tick(&self) {
        for action in self.find(Finding::Tick) {
            log(action, None);
        }
    }

    pub(super) fn log_excess(&self) -> u64 {
        self.log_bytes().saturating_sub(self.log_bound)
    }

    /// The condition, but for a stall of what the caller is doing itself.
    pub(super) fn last_condition(&self) -> Condition {
        self.disk().last()
    }

    /// Records what the writer found out. Returns what to do about it.
    pub(super) fn find(&self, finding: Finding) -> Vec<Action> {
        let mut disk = self.disk();
        let (after, actions) = disk.transition(finding, Instant::now());
        *disk = after;
        actions
    }

    /// Records what a commit left. `has_refused`: an event did not fit, although it would fit into an empty spool.
    pub(super) fn on_commit(&self, ledger: &Ledger, log_bytes: u64, has_refused: bool) {
        let before = self.used_bytes();
        *self.ledger.lock().unwrap_or_else(PoisonError::into_inner) = *ledger;
        self.log_bytes.store(log_bytes, Ordering::Relaxed);
        self.on_used(before);
        if has_refused {
            self.has_refused.store(true, Ordering::Relaxed);
        }
    }

    pub(super) fn set_log_bytes(&self, bytes: u64) {
        let before = self.used_bytes();
        self.log_bytes.store(bytes, Ordering::Relaxed);
        self.on_used(before);
    }

    fn on_used(&self, before: u64) {
        if self.used_bytes() < before {
            self.has_refused.store(false, Ordering::Relaxed);
        }
    }

    /// Returns what it was before.
    pub(super) fn set_log_held(&self, is_held: bool) -> bool {
        self.is_log_held.swap(is_held, Ordering::Relaxed)
    }

    fn disk(&self) -> MutexGuard<'_, DiskState> {
        self.disk.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Writes the log line of an action, if it has one.
pub(super) fn log(action: Action, cause: Option<&StoreError>) {
    let error = cause.map(tracing::field::display);
    match action {
        Action::FreeReserve => {}
        Action::LogAccepting => info!("the spool can be written again: accepting webhooks"),
        Action::LogAnswers => info!("the spool's disk answers again"),
        Action::LogRefusing(Condition::Stalled { .. }) => {
            error!("the spool's disk does not answer; answering webhooks 503 until it does");
        }
        Action::LogRefusing(Condition::Gone) => error!(
            "spool files were deleted or unmounted: answering 503, delivering what is still readable, then exiting"
        ),
        Action::LogRefusing(condition) => {
            let reason = condition.reason();
            error!(error, reason, "the spool cannot be written: answering webhooks 503 until it can");
        }
    }
}
