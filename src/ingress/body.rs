//! Bodies: read within a size, a deadline and a share of the memory, or discarded.
//!
//! All bodies together use at most `http.buffer_bytes_max`:
//!
//! 1. A body that arrives in one piece takes its memory at once, if that much is free.
//! 2. Any other body takes memory for each piece before the piece is kept, and waits while there is not enough.
//! 3. A body that has waited for [`CROWDED_PATIENCE`] evicts the oldest body that is still arriving, if that is older
//!    than itself, and waits again. The evicted body is answered 503: slow senders make room for fast ones.
//! 4. A complete body is never evicted. It keeps its memory until the webhook is answered.
//! 5. A body that had to wait and misses its deadline is answered 503 in place of 408: its sender was not slow.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use hyper::body::{Body, Incoming};
use hyper::header::{EXPECT, HeaderMap};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

use super::answer::Refusal;
use crate::problem::Code;

/// How much of a refused body is still read, so that the sender receives the answer instead of a reset.
const DISCARD_BYTES_MAX: usize = 1024 * 1024;

/// How long a body waits for memory before it evicts an older one.
const CROWDED_PATIENCE: Duration = Duration::from_millis(20);

/// The memory for all bodies together, in bytes.
pub(super) struct Memory {
    free: Arc<Semaphore>,
    arriving: Mutex<Arriving>,
}

/// The bodies that are not complete yet, the oldest first.
#[derive(Default)]
struct Arriving {
    next_id: u64,
    bodies: BTreeMap<u64, CancellationToken>,
}

/// A complete body. Dropping it gives its memory back.
pub(super) struct Buffered {
    pub bytes: Bytes,
    pub share: OwnedSemaphorePermit,
}

impl Memory {
    pub(super) fn new(bytes: usize) -> Self {
        let free = Arc::new(Semaphore::new(bytes.min(Semaphore::MAX_PERMITS)));
        Self { free, arriving: Mutex::default() }
    }

    /// Takes memory if that much is free.
    fn try_take(&self, bytes: usize) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.free).try_acquire_many_owned(permits(bytes)).ok()
    }

    fn arrive(&self) -> Arrival<'_> {
        let mut arriving = self.arriving();
        let id = arriving.next_id;
        arriving.next_id += 1;
        let evicted = CancellationToken::new();
        arriving.bodies.insert(id, evicted.clone());
        Arrival { memory: self, id, evicted, has_waited: false }
    }

    fn arriving(&self) -> MutexGuard<'_, Arriving> {
        self.arriving.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A body on the list of those that are arriving. Dropping it takes it off the list.
struct Arrival<'a> {
    memory: &'a Memory,
    id: u64,
    evicted: CancellationToken,
    has_waited: bool,
}

impl Arrival<'_> {
    /// Takes memory for the next piece, if necessary that of an older body.
    async fn take(&mut self, bytes: usize) -> OwnedSemaphorePermit {
        let bytes = permits(bytes);
        loop {
            let taken = Arc::clone(&self.memory.free).acquire_many_owned(bytes);
            match timeout(CROWDED_PATIENCE, taken).await {
                Ok(taken) => return taken.expect("the semaphore is never closed"),
                Err(_) => {
                    self.has_waited = true;
                    self.evict_an_older_one();
                }
            }
        }
    }

    fn evict_an_older_one(&self) {
        let mut arriving = self.memory.arriving();
        if let Some(oldest) = arriving.bodies.first_entry().filter(|oldest| *oldest.key() < self.id) {
            oldest.remove().cancel();
        }
    }
}

impl Drop for Arrival<'_> {
    fn drop(&mut self) {
        self.memory.arriving().bodies.remove(&self.id);
    }
}

/// A body that is still to be read.
pub(super) struct Inbound {
    body: Incoming,
    deadline: Duration,
    /// The sender waits for `100 Continue`, which reading sends (RFC 9110, section 10.1.1).
    awaits_continue: bool,
}

impl Inbound {
    pub(super) fn new(body: Incoming, headers: &HeaderMap, deadline: Duration) -> Self {
        Self { body, deadline, awaits_continue: headers.contains_key(EXPECT) }
    }

    /// The length that the sender has declared, in bytes; 0 if it has declared none.
    pub(super) fn declared(&self) -> u64 {
        self.body.size_hint().lower()
    }

    /// Reads the whole body. A body in one piece, as most are, is passed on without copying.
    pub(super) async fn read(&mut self, limit: usize, memory: &Memory) -> Result<Buffered, Refusal> {
        self.awaits_continue = false;
        let deadline = Instant::now() + self.deadline;
        let first = timeout_at(deadline, next(&mut self.body)).await.map_err(|_| timed_out())??.unwrap_or_default();
        if first.len() > limit {
            return Err(Refusal::body_too_large(limit));
        }
        if self.body.is_end_stream()
            && let Some(share) = memory.try_take(first.len())
        {
            return Ok(Buffered { bytes: first, share });
        }
        let mut arrival = memory.arrive();
        let evicted = arrival.evicted.clone();
        let outcome = tokio::select! {
            outcome = timeout_at(deadline, read_on(&mut self.body, first, limit, &mut arrival)) => outcome,
            () = evicted.cancelled() => return Err(overloaded()),
        };
        match outcome {
            Ok(body) => body,
            Err(_) if arrival.has_waited => Err(overloaded()),
            Err(_) => Err(timed_out()),
        }
    }

    /// Reads and drops the rest while the answer is sent. Closing a connection with unread data in it resets it, and
    /// the sender would see the reset instead of the answer.
    pub(super) fn discard(mut self) {
        if self.awaits_continue || self.body.is_end_stream() {
            return;
        }
        #[expect(clippy::disallowed_methods, reason = "the task ends at its deadline, and nothing depends on it")]
        tokio::spawn(timeout(self.deadline, async move {
            let mut rest = DISCARD_BYTES_MAX;
            while let Some(Ok(frame)) = self.body.frame().await {
                let Some(left) = rest.checked_sub(frame.data_ref().map_or(0, Bytes::len)) else { break };
                rest = left;
            }
        }));
    }
}

/// The next piece. Trailers are ignored.
async fn next(body: &mut Incoming) -> Result<Option<Bytes>, Refusal> {
    while let Some(frame) = body.frame().await {
        let frame = frame
            .map_err(|error| Refusal::new(Code::UnreadableBody, format!("the body could not be read: {error}")))?;
        if let Ok(data) = frame.into_data() {
            return Ok(Some(data));
        }
    }
    Ok(None)
}

async fn read_on(
    body: &mut Incoming,
    first: Bytes,
    limit: usize,
    arrival: &mut Arrival<'_>,
) -> Result<Buffered, Refusal> {
    let mut share = arrival.take(first.len()).await;
    // Pieces are copied: even a piece of one byte would hold a whole buffer of hyper's.
    let mut whole = BytesMut::new();
    while let Some(data) = next(body).await? {
        if first.len().max(whole.len()) + data.len() > limit {
            return Err(Refusal::body_too_large(limit));
        }
        share.merge(arrival.take(data.len()).await);
        if whole.is_empty() {
            whole.extend_from_slice(&first);
        }
        whole.extend_from_slice(&data);
    }
    Ok(Buffered { bytes: if whole.is_empty() { first } else { whole.freeze() }, share })
}

fn timed_out() -> Refusal {
    Refusal::new(Code::RequestTimeout, "the body did not arrive within http.body_timeout")
}

fn overloaded() -> Refusal {
    Refusal::new(Code::Overloaded, "there is no free memory for the body (http.buffer_bytes_max)")
}

fn permits(bytes: usize) -> u32 {
    u32::try_from(bytes).unwrap_or(u32::MAX)
}
