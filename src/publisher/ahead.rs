//! Reading ahead: pending events, in order, from the spool into memory; bounded by number and by bytes.

use std::collections::VecDeque;

use tokio::task::JoinHandle;

use crate::spool::{Batch, ReadError, Spool, Stored};

/// Bodies in memory at most, read ahead and in flight. One event is always allowed, however large.
const BODY_BYTES_MAX: usize = 16 * 1024 * 1024;

/// The way through the spool, from the oldest pending event on.
pub(super) struct Ahead {
    spool: Spool,
    /// How many events are read at a time.
    batch: usize,
    events: VecDeque<Stored>,
    /// Of the bodies that were read and are not yet done with.
    bytes: usize,
    /// The last event read.
    cursor: u64,
    reading: Option<JoinHandle<Result<Batch, ReadError>>>,
    exhausted: bool,
    /// Something was committed while this was reading.
    more_came: bool,
}

impl Ahead {
    pub fn new(spool: Spool, batch: usize) -> Self {
        let events = VecDeque::new();
        Self { spool, batch, events, bytes: 0, cursor: 0, reading: None, exhausted: false, more_came: false }
    }

    pub fn next_seq(&self) -> Option<u64> {
        self.events.front().map(|stored| stored.seq)
    }

    pub fn pop(&mut self) -> Option<Stored> {
        self.events.pop_front()
    }

    /// A body of this length is no longer in memory.
    pub fn done_with(&mut self, bytes: usize) {
        self.bytes -= bytes;
    }

    /// Begins to read on, if there is need, room, and something to read.
    pub fn read_on(&mut self) {
        let hungry = self.events.len() <= self.batch / 2 && self.bytes < BODY_BYTES_MAX;
        if hungry && !self.exhausted && self.reading.is_none() {
            let (spool, cursor, batch) = (self.spool.clone(), self.cursor, self.batch);
            self.reading = Some(tokio::spawn(async move { spool.pending_after(cursor, batch).await }));
        }
    }

    pub fn is_reading(&self) -> bool {
        self.reading.is_some()
    }

    /// Takes in what has been read. To be called only while [`Self::is_reading`]; may be dropped at any time.
    pub async fn take_in(&mut self) -> Result<(), ReadError> {
        let Some(reading) = &mut self.reading else { return Ok(()) };
        let batch = match reading.await {
            Ok(batch) => batch,
            Err(ended) => match ended.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                // The runtime is being shut down, and we with it.
                Err(_) => std::future::pending().await,
            },
        };
        self.reading = None;
        let Batch { events, more } = batch?;
        let more_came = std::mem::take(&mut self.more_came);
        self.exhausted = !more && !more_came;
        self.cursor = events.last().map_or(self.cursor, |last| last.seq);
        self.bytes += events.iter().map(|stored| stored.event.body.len()).sum::<usize>();
        self.events.extend(events);
        Ok(())
    }

    /// Whether everything up to now has been read, so that only a commit can bring more.
    pub fn is_exhausted(&self) -> bool {
        self.exhausted
    }

    /// There may be more.
    pub fn look_again(&mut self) {
        self.exhausted = false;
        // A reading that is under way may have begun before.
        self.more_came = self.reading.is_some();
    }

    /// Whether there is nothing left and nothing under way.
    pub fn is_over(&self) -> bool {
        self.exhausted && self.reading.is_none() && self.events.is_empty()
    }
}
