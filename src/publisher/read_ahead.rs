//! Pending events read from the spool into memory ahead of their publish, in order; bounded in number and in bytes.

use std::collections::VecDeque;

use tokio::task::JoinHandle;

use crate::spool::{Batch, ReadError, Spool, Stored};

/// Maximum bytes of bodies in memory, read ahead and in flight. One event is always allowed, however large.
const BODY_BYTES_MAX: usize = 16 * 1024 * 1024;

/// A cursor that moves through the spool from the oldest pending event.
pub(super) struct ReadAhead {
    spool: Spool,
    /// How many events are read at a time.
    batch: usize,
    events: VecDeque<Stored>,
    /// Size of the bodies read and not yet released.
    bytes: usize,
    /// The last event read.
    cursor: u64,
    reading: Option<JoinHandle<Result<Batch, ReadError>>>,
    exhausted: bool,
    /// Events may have been committed after the current read began.
    committed_while_reading: bool,
}

impl ReadAhead {
    pub(super) fn new(spool: Spool, batch: usize) -> Self {
        Self {
            spool,
            batch,
            events: VecDeque::new(),
            bytes: 0,
            cursor: 0,
            reading: None,
            exhausted: false,
            committed_while_reading: false,
        }
    }

    pub(super) fn next_seq(&self) -> Option<u64> {
        self.events.front().map(|stored| stored.seq)
    }

    pub(super) fn pop(&mut self) -> Option<Stored> {
        self.events.pop_front()
    }

    /// Gives back the memory of a body.
    pub(super) fn release(&mut self, bytes: usize) {
        self.bytes -= bytes;
    }

    /// Starts the next read if there is room for it and the spool may hold more.
    pub(super) fn read_on(&mut self) {
        let has_room = self.events.len() <= self.batch / 2 && self.bytes < BODY_BYTES_MAX;
        if has_room && !self.exhausted && self.reading.is_none() {
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
        let Batch { events, more } = batch?;
        let committed = std::mem::take(&mut self.committed_while_reading);
        self.exhausted = !more && !committed;
        self.cursor = events.last().map_or(self.cursor, |last| last.seq);
        self.bytes += events.iter().map(|stored| stored.event.body.len()).sum::<usize>();
        self.events.extend(events);
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
        self.exhausted && self.reading.is_none() && self.events.is_empty()
    }
}
