//! Bodies: read within a limit, a deadline and a share of the memory, or discarded.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use hyper::body::{Body, Incoming};
use hyper::header::{EXPECT, HeaderMap};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

use super::answer::{Code, Refusal};

/// How much of a refused body is still read, so that the sender gets to see the answer instead of a reset.
const DISCARD_BYTES_MAX: usize = 1024 * 1024;

/// How long a body waits for memory before another one, which is slower, has to make room.
const CROWDED_PATIENCE: Duration = Duration::from_millis(20);

/// What all bodies together may take, in bytes. Where it is used up, the body that has been arriving for longest makes
/// room, so that slow ones, which need not be Prism's, hold up nobody.
#[derive(Clone)]
pub struct Memory {
    free: Arc<Semaphore>,
    arriving: Arc<Mutex<Arriving>>,
}

/// The bodies that are not complete yet, the oldest first.
#[derive(Default)]
struct Arriving {
    next_id: u64,
    bodies: BTreeMap<u64, CancellationToken>,
}

/// The part of the [`Memory`] that a body takes; given back when it is dropped.
#[derive(Default)]
pub struct Share(Option<OwnedSemaphorePermit>);

impl Memory {
    pub fn new(bytes: usize) -> Self {
        let free = Arc::new(Semaphore::new(bytes.min(Semaphore::MAX_PERMITS)));
        Self { free, arriving: Arc::default() }
    }

    fn arrive(&self) -> Arrival<'_> {
        let mut arriving = self.arriving();
        let id = arriving.next_id;
        arriving.next_id += 1;
        let displaced = CancellationToken::new();
        arriving.bodies.insert(id, displaced.clone());
        Arrival { memory: self, id, displaced, waited: AtomicBool::new(false) }
    }

    fn arriving(&self) -> MutexGuard<'_, Arriving> {
        self.arriving.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A body on the list of those that are arriving.
struct Arrival<'a> {
    memory: &'a Memory,
    id: u64,
    displaced: CancellationToken,
    /// It had to wait for memory.
    waited: AtomicBool,
}

impl Arrival<'_> {
    /// Takes more memory for the body, if need be that of an older one.
    async fn grow(&self, share: &mut Share, bytes: usize) {
        let bytes = permits(bytes);
        let more = loop {
            let more = Arc::clone(&self.memory.free).acquire_many_owned(bytes);
            match timeout(CROWDED_PATIENCE, more).await {
                // The semaphore is never closed.
                Ok(more) => break more.ok(),
                Err(_) => {
                    self.waited.store(true, Ordering::Relaxed);
                    self.displace_an_older_one();
                }
            }
        };
        match (&mut share.0, more) {
            (Some(share), Some(more)) => share.merge(more),
            (none, more) => *none = more,
        }
    }

    fn displace_an_older_one(&self) {
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

/// A body on its way in.
pub struct Inbound {
    body: Incoming,
    deadline: Duration,
    /// The sender sends only when it is told to, which reading does (RFC 9110, section 10.1.1).
    waits: bool,
}

impl Inbound {
    pub fn new(body: Incoming, headers: &HeaderMap, deadline: Duration) -> Self {
        Self { body, deadline, waits: headers.contains_key(EXPECT) }
    }

    /// The length that the sender has declared, in bytes; 0 if it has not.
    pub fn declared(&self) -> u64 {
        self.body.size_hint().lower()
    }

    /// The whole body. Most arrive in one piece, which is passed on without copying, and at once has its memory.
    pub async fn read(&mut self, limit: usize, memory: &Memory) -> Result<(Bytes, Share), Refusal> {
        self.waits = false;
        let deadline = Instant::now() + self.deadline;
        let first = timeout_at(deadline, next(&mut self.body)).await.map_err(|_| timed_out())??;
        let Some(first) = first else { return Ok((Bytes::new(), Share::default())) };
        if first.len() > limit {
            return Err(Refusal::body_too_large(limit));
        }
        if self.body.is_end_stream()
            && let Ok(taken) = Arc::clone(&memory.free).try_acquire_many_owned(permits(first.len()))
        {
            return Ok((first, Share(Some(taken))));
        }
        let arrival = memory.arrive();
        tokio::select! {
            body = timeout_at(deadline, read_on(&mut self.body, first, limit, &arrival)) => body.unwrap_or_else(|_| {
                // A sender that had to wait for us was not slow.
                Err(if arrival.waited.load(Ordering::Relaxed) { overloaded() } else { timed_out() })
            }),
            () = arrival.displaced.cancelled() => Err(overloaded()),
        }
    }

    /// Reads on for a while, beside the answer. A connection that is closed with unread data in it is reset, and the
    /// sender would see that instead of the answer.
    pub fn discard(mut self) {
        if self.waits || self.body.is_end_stream() {
            return;
        }
        // It ends by itself, and nothing depends on it.
        tokio::spawn(timeout(self.deadline, async move {
            let mut rest = DISCARD_BYTES_MAX;
            while let Some(Ok(frame)) = self.body.frame().await {
                let Some(left) = rest.checked_sub(frame.data_ref().map_or(0, Bytes::len)) else { break };
                rest = left;
            }
        }));
    }
}

/// The next piece. Trailers carry nothing that counts.
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
    arrival: &Arrival<'_>,
) -> Result<(Bytes, Share), Refusal> {
    let mut share = Share::default();
    arrival.grow(&mut share, first.len()).await;
    let mut whole = BytesMut::new();
    while let Some(data) = next(body).await? {
        if first.len().max(whole.len()) + data.len() > limit {
            return Err(Refusal::body_too_large(limit));
        }
        arrival.grow(&mut share, data.len()).await;
        if whole.is_empty() {
            whole.extend_from_slice(&first);
        }
        whole.extend_from_slice(&data);
    }
    Ok((if whole.is_empty() { first } else { whole.freeze() }, share))
}

fn timed_out() -> Refusal {
    Refusal::new(Code::RequestTimeout, "the body did not arrive within http.body_timeout")
}

fn overloaded() -> Refusal {
    Refusal::new(Code::Overloaded, "there is no memory for the body at the moment (http.buffer_bytes_max)")
}

fn permits(bytes: usize) -> u32 {
    u32::try_from(bytes).unwrap_or(u32::MAX)
}
