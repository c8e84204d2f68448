//! Bodies: read within a limit, a deadline and a share of the memory, or discarded.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use hyper::body::{Body, Incoming};
use hyper::header::{EXPECT, HeaderMap};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use super::answer::Refusal;

/// How much of a refused body is still read, so that the sender gets to see the answer instead of a reset.
const DISCARD_BYTES_MAX: usize = 1024 * 1024;

/// What all bodies together may take, in bytes. Whoever finds it used up waits for others to finish.
#[derive(Clone)]
pub struct Memory(Arc<Semaphore>);

/// The part of the [`Memory`] that a body takes; given back when it is dropped.
#[derive(Default)]
pub struct Share(Option<OwnedSemaphorePermit>);

impl Memory {
    pub fn new(bytes: usize) -> Self {
        Self(Arc::new(Semaphore::new(bytes.min(Semaphore::MAX_PERMITS))))
    }
}

impl Share {
    async fn grow(&mut self, memory: &Memory, bytes: usize) {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        // The semaphore is never closed.
        if let Ok(more) = Arc::clone(&memory.0).acquire_many_owned(bytes).await {
            match &mut self.0 {
                Some(share) => share.merge(more),
                None => self.0 = Some(more),
            }
        }
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

    /// The whole body. Most arrive in one piece, which is passed on without copying.
    pub async fn read(&mut self, limit: usize, memory: &Memory) -> Result<(Bytes, Share), Refusal> {
        self.waits = false;
        timeout(self.deadline, read(&mut self.body, limit, memory)).await.map_err(|_| Refusal::TimedOut)?
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

async fn read(body: &mut Incoming, limit: usize, memory: &Memory) -> Result<(Bytes, Share), Refusal> {
    let mut share = Share::default();
    let (mut first, mut whole) = (Bytes::new(), BytesMut::new());
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| Refusal::Unreadable(error.to_string()))?;
        // Trailers carry nothing that counts.
        let Ok(data) = frame.into_data() else { continue };
        if first.len().max(whole.len()) + data.len() > limit {
            return Err(Refusal::TooLarge(limit));
        }
        share.grow(memory, data.len()).await;
        if first.is_empty() && whole.is_empty() {
            first = data;
        } else {
            if whole.is_empty() {
                whole.extend_from_slice(&first);
            }
            whole.extend_from_slice(&data);
        }
    }
    Ok((if whole.is_empty() { first } else { whole.freeze() }, share))
}
