//! Reads pending events from the spool into memory ahead of their publish, in order; bounded in number and in bytes.

use tokio::task::JoinHandle;

use super::backlog::Backlog;
use super::window::Lane;
use crate::event::SubjectKey;
use crate::spool::{PendingBatch, ReadError, Spool};

/// Maximum bytes of bodies in memory, read ahead and in flight. One event is always allowed, however large.
const BODY_BYTES_MAX: usize = 16 * 1024 * 1024;

/// Maximum number of events in memory that are not published, in batches: many events of one subject, which leave one
/// by one, must not hide the other subjects behind them.
const BATCHES_MAX: usize = 10;

/// Maximum number of subjects that are held back because the spool may not have recorded yet that an event of them is
/// parked.
const PARKED_SUBJECTS_MAX: usize = 10_000;

/// A cursor that moves through the spool from the oldest pending event.
pub(super) struct ReadAhead {
    spool: Spool,
    /// How many events are read at a time.
    batch: usize,
    backlog: Backlog,
    /// The last event read.
    cursor: u64,
    reading: Option<JoinHandle<Result<PendingBatch, ReadError>>>,
    exhausted: bool,
    /// Events may have been committed after the current read began.
    committed_while_reading: bool,
    /// How many events had been removed when the events in memory were read.
    removed: Option<u64>,
    validity: Validity,
    /// Events may wait for a parked one whose delivery the spool could not record. They are read when it can.
    recheck: bool,
}

/// Whether the events in memory are still those of the spool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Validity {
    Valid,
    /// Events may have been removed, or may no longer wait.
    Stale,
    /// A parked event was delivered. The events behind it may be read once the spool has recorded that.
    StaleUntilCommit,
}

impl ReadAhead {
    pub(super) fn new(spool: Spool, batch: usize) -> Self {
        Self {
            spool,
            batch,
            backlog: Backlog::default(),
            cursor: 0,
            reading: None,
            exhausted: false,
            committed_while_reading: false,
            removed: None,
            validity: Validity::Valid,
            recheck: false,
        }
    }

    /// The events in memory.
    pub(super) fn backlog(&mut self) -> &mut Backlog {
        &mut self.backlog
    }

    /// How many events wait behind a parked one, as far as is known.
    pub(super) fn left_out(&self) -> u64 {
        self.backlog.left_out_so_far().count
    }

    /// Starts the next read if there is room for it and the spool may hold more.
    pub(super) fn read_on(&mut self) {
        let has_room = self.backlog.ready() <= self.batch / 2
            && self.backlog.len() < self.batch.saturating_mul(BATCHES_MAX)
            && self.backlog.bytes() < BODY_BYTES_MAX;
        if has_room && !self.exhausted && self.reading.is_none() && self.validity == Validity::Valid {
            let status = self.spool.status();
            self.recheck |= status.ledger().parked > 0 && !status.takes_settlements();
            let (spool, cursor, batch) = (self.spool.clone(), self.cursor, self.batch);
            #[expect(clippy::disallowed_methods, reason = "the read must go on while the session does other work")]
            let reading = tokio::spawn(async move { spool.pending_after(cursor, batch).await });
            self.reading = Some(reading);
        }
    }

    pub(super) fn is_reading(&self) -> bool {
        self.reading.is_some()
    }

    /// Waits for the current read and keeps its events. Cancel safe; call it only while [`Self::is_reading`].
    pub(super) async fn finish_read(&mut self) -> Result<(), ReadError> {
        let Some(reading) = &mut self.reading else { return Ok(()) };
        let batch = match reading.await {
            Ok(batch) => batch,
            Err(ended) => match ended.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                // The runtime is shutting down, which drops this future as well.
                Err(_) => std::future::pending().await,
            },
        };
        self.reading = None;
        let PendingBatch { events, waiting, last, more, removed } = batch?;
        if *self.removed.get_or_insert(removed) != removed {
            self.on_removal();
        }
        if self.is_stale() {
            return Ok(());
        }
        let committed = std::mem::take(&mut self.committed_while_reading);
        self.exhausted = !more && !committed;
        self.cursor = last;
        events.into_iter().for_each(|stored| self.backlog.enter(stored));
        waiting.into_iter().for_each(|seq| self.backlog.left_out(seq));
        if self.backlog.parked_subjects() > PARKED_SUBJECTS_MAX {
            self.validity = Validity::StaleUntilCommit;
        }
        Ok(())
    }

    /// Whether all events committed so far have been read.
    pub(super) fn is_exhausted(&self) -> bool {
        self.exhausted
    }

    /// The spool may hold more events than before.
    pub(super) fn on_commit(&mut self) {
        self.exhausted = false;
        self.committed_while_reading = self.reading.is_some();
    }

    /// Whether all events have been read and taken.
    pub(super) fn is_empty(&self) -> bool {
        self.exhausted && self.reading.is_none() && !self.is_stale() && self.backlog.len() == 0
    }

    // -- reading again ------------------------------------------------------------------------------------------------

    /// Looks whether events were removed since the ones in memory were read, and whether the spool records deliveries
    /// again.
    pub(super) async fn check_spool(&mut self) -> Result<(), ReadError> {
        if self.recheck && self.spool.status().takes_settlements() {
            self.recheck = false;
            self.validity = Validity::StaleUntilCommit;
        }
        if let Some(removed) = self.removed
            && !self.is_stale()
            && !self.backlog.knows_of_none()
            && self.spool.removed().await? != removed
        {
            self.on_removal();
        }
        Ok(())
    }

    /// Events were removed, or may have been: the broker took no messages for a while.
    pub(super) fn on_removal(&mut self) {
        self.validity = self.validity.max(Validity::Stale);
    }

    /// An event was delivered: the next one of its subject may go, and events behind a parked one are read.
    pub(super) fn on_delivered(&mut self, lane: Lane, subject: Option<SubjectKey>) {
        match lane {
            Lane::Pending => self.backlog.delivered(subject),
            Lane::Parked if subject.is_some() => self.validity = Validity::StaleUntilCommit,
            Lane::Parked => {}
        }
    }

    /// Whether the events in memory must be read again before any of them is published.
    pub(super) fn is_stale(&self) -> bool {
        self.validity != Validity::Valid
    }

    /// Drops the events in memory, to be read again. Call it while nothing is in flight. While the spool cannot record
    /// what was delivered, the events in memory go on and the rest is read later, unless too many subjects are held
    /// back.
    pub(super) async fn read_again(&mut self) {
        self.spool.flush().await;
        if self.validity == Validity::StaleUntilCommit && !self.spool.status().takes_settlements() {
            if self.backlog.parked_subjects() <= PARKED_SUBJECTS_MAX {
                self.validity = Validity::Valid;
                self.recheck = true;
            }
            return;
        }
        let cursor = self.backlog.oldest().map_or(self.cursor, |oldest| oldest - 1);
        if let Some(reading) = self.reading.take() {
            reading.abort();
        }
        *self = Self { cursor, ..Self::new(self.spool.clone(), self.batch) };
    }
}
