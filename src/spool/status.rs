//! What the last commit left behind, readable at any time without waiting for the disk.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::ledger::Ledger;
use super::store::BUSY_TIMEOUT;

/// A disk that has not answered for this long counts as one that cannot be written.
const STALL: Duration = Duration::from_secs(8);

// A commit that waits for another process's lock is not a stalled disk.
const _: () = assert!(STALL.as_millis() > BUSY_TIMEOUT.as_millis());

/// The totals, and whether the disk works. The writer sets it, everything else reads it.
#[derive(Debug)]
pub struct SpoolStatus {
    ledger: Mutex<Ledger>,
    writable: AtomicBool,
    /// The last commit failed, whatever was in it.
    failing: AtomicBool,
    /// When the writer began what it is doing.
    busy_since: Mutex<Option<Instant>>,
    lost: u64,
}

impl SpoolStatus {
    pub(super) fn new(ledger: Ledger, lost: u64) -> Self {
        let (writable, failing) = (AtomicBool::new(true), AtomicBool::new(false));
        Self { ledger: Mutex::new(ledger), writable, failing, busy_since: Mutex::default(), lost }
    }

    /// The ledger after the last commit.
    pub fn ledger(&self) -> Ledger {
        *self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Accepted events that could not be read after the file was damaged. [`Ledger::removed`] includes them.
    pub fn lost(&self) -> u64 {
        self.lost
    }

    /// Whether the disk takes writes, as far as is known.
    pub fn writable(&self) -> bool {
        self.writable.load(Ordering::Relaxed) && !self.is_stalled()
    }

    /// Whether settlements can be written. That may be possible on a disk that is too full for new events.
    pub fn takes_settlements(&self) -> bool {
        !self.failing.load(Ordering::Relaxed) && !self.is_stalled()
    }

    /// Whether a write has neither succeeded nor failed for 8 s.
    pub fn is_stalled(&self) -> bool {
        let since = *self.busy_since.lock().unwrap_or_else(PoisonError::into_inner);
        since.is_some_and(|since| since.elapsed() > STALL)
    }

    pub(super) fn set_ledger(&self, ledger: &Ledger) {
        *self.ledger.lock().unwrap_or_else(PoisonError::into_inner) = *ledger;
    }

    /// Returns what it was before.
    pub(super) fn set_writable(&self, writable: bool) -> bool {
        self.writable.swap(writable, Ordering::Relaxed)
    }

    pub(super) fn set_failing(&self, failing: bool) {
        self.failing.store(failing, Ordering::Relaxed);
    }

    pub(super) fn set_busy(&self, since: Option<Instant>) {
        *self.busy_since.lock().unwrap_or_else(PoisonError::into_inner) = since;
    }
}
