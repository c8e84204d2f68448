//! HTTP in: one webhook is read, verified, named and stored, and only then answered. Never names the publisher, and
//! never waits for it.

mod answer;
mod notices;
mod source;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt, Full};
use hyper::body::{Body, Incoming};
use hyper::header::{EXPECT, HeaderMap};
use hyper::http::request::Parts;
use hyper::{Method, Request, Response};
use jiff::Timestamp;
use tokio_util::sync::CancellationToken;
use tracing::debug;

pub use answer::readiness;
use answer::{Refusal, accepted};
use notices::Notices;

use crate::config;
use crate::event::{Envelope, Event, TraceContext};
use crate::metrics::Metrics;
use crate::server::{BindError, Limits, Server};
use crate::signature::{Accepted, SIGNATURE_HEADER, TIMESTAMP_HEADER, Verifier};
use crate::spool::{Receipt, Spool};

/// Answers like `/readyz`, on the public listener, for load balancers.
pub const HEALTH_PATH: &str = "/healthz";

/// How much of a refused body is still read, so that the sender gets to see the answer instead of a reset.
const DISCARD_BYTES_MAX: usize = 1024 * 1024;

/// The public listener, bound but not yet serving.
pub struct Ingress {
    server: Server,
    desk: Desk,
}

impl Ingress {
    pub async fn bind(
        http: config::Http,
        verifier: Verifier,
        spool: Spool,
        metrics: Arc<Metrics>,
    ) -> Result<Self, BindError> {
        let limits = Limits {
            connections_max: http.connections_max,
            header_timeout: http.header_timeout,
            // Longer than the deadline of a body, which has an answer of its own.
            silence_timeout: http.header_timeout + http.body_timeout,
        };
        let server = Server::bind(http.listen, "http.listen", limits).await?;
        Ok(Self { server, desk: Desk { http, verifier, spool, metrics, notices: Notices::default() } })
    }

    pub fn address(&self) -> std::io::Result<SocketAddr> {
        self.server.address()
    }

    /// Serves until `shutdown` and then finishes the requests under way.
    pub async fn run(self, shutdown: CancellationToken) {
        let desk = Arc::new(self.desk);
        let handler = move |request, peer| {
            let desk = Arc::clone(&desk);
            async move { desk.answer(request, peer).await }
        };
        self.server.run(handler, shutdown).await;
    }
}

/// Everything that is needed to answer one request.
struct Desk {
    http: config::Http,
    verifier: Verifier,
    spool: Spool,
    metrics: Arc<Metrics>,
    notices: Notices,
}

impl Desk {
    async fn answer(&self, request: Request<Incoming>, peer: SocketAddr) -> Response<Full<Bytes>> {
        let started = Instant::now();
        let (parts, mut body) = request.into_parts();
        if parts.uri.path() == HEALTH_PATH {
            return match parts.method {
                Method::GET | Method::HEAD => readiness(self.spool.blocker()),
                _ => Refusal::MethodNotAllowed("GET, HEAD").response(),
            };
        }
        match self.receive(&parts, &mut body, peer).await {
            Ok(receipt) => {
                let count =
                    if receipt.duplicate { &self.metrics.webhooks.duplicate } else { &self.metrics.webhooks.accepted };
                count.increment(1);
                self.metrics.webhooks.ack_duration.record(started.elapsed());
                accepted(&receipt)
            }
            Err(refusal) => {
                self.metrics.webhook_refused(refusal.code());
                self.notices.refused(&refusal, peer);
                discard(&parts, body, self.http.body_timeout);
                refusal.response()
            }
        }
    }

    async fn receive(&self, parts: &Parts, body: &mut Incoming, peer: SocketAddr) -> Result<Receipt, Refusal> {
        self.admit(parts, body, peer)?;
        let limit = self.http.body_bytes_max;
        let body =
            tokio::time::timeout(self.http.body_timeout, read(body, limit)).await.map_err(|_| Refusal::TimedOut)??;

        let now = Timestamp::now();
        let (timestamp, signature) =
            (header(&parts.headers, TIMESTAMP_HEADER), header(&parts.headers, SIGNATURE_HEADER));
        let verified = self.verifier.verify(timestamp, signature, body, now).map_err(Refusal::Unauthenticated)?;
        must_be_believable(&verified)?;

        let trace =
            TraceContext::from_headers(header(&parts.headers, "traceparent"), header(&parts.headers, "tracestate"));
        let event = Event::new(verified, trace, now);
        let receipt = self.spool.append(event).await.map_err(Refusal::NotStored)?;
        debug!(id = %receipt.id, duplicate = receipt.duplicate, "accepted");
        Ok(receipt)
    }

    /// Everything that can be said without the body.
    fn admit(&self, parts: &Parts, body: &Incoming, peer: SocketAddr) -> Result<(), Refusal> {
        if parts.uri.path() != self.http.path {
            return Err(Refusal::NotFound);
        }
        if parts.method != Method::POST {
            return Err(Refusal::MethodNotAllowed("POST"));
        }
        let forwarded_for = parts.headers.get_all("x-forwarded-for").iter().filter_map(|line| line.to_str().ok());
        let forwarded_for: Vec<&str> = forwarded_for.collect();
        let client = source::client(peer.ip(), forwarded_for.into_iter(), &self.http.trusted_proxies);
        if !self.http.allowed_sources.is_empty() && !source::contains(&self.http.allowed_sources, client) {
            return Err(Refusal::SourceNotAllowed);
        }
        if body.size_hint().lower() > self.http.body_bytes_max as u64 {
            return Err(Refusal::TooLarge(self.http.body_bytes_max));
        }
        Ok(())
    }
}

/// A body without a signature has to be an event. A signed one comes from Prism, whatever it is: it is never refused.
fn must_be_believable(body: &Accepted<Bytes>) -> Result<(), Refusal> {
    if body.authentic() {
        return Ok(());
    }
    Envelope::parse(body.body()).map(|_| ()).map_err(Refusal::NotAnEnvelope)
}

/// The whole body. Most arrive in one piece, which is passed on without copying.
async fn read(body: &mut Incoming, limit: usize) -> Result<Bytes, Refusal> {
    let mut first = Bytes::new();
    let mut whole = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| Refusal::Unreadable(error.to_string()))?;
        // Trailers carry nothing that counts.
        let Ok(data) = frame.into_data() else { continue };
        if first.len().max(whole.len()) + data.len() > limit {
            return Err(Refusal::TooLarge(limit));
        }
        if first.is_empty() && whole.is_empty() {
            first = data;
        } else {
            if whole.is_empty() {
                whole.extend_from_slice(&first);
            }
            whole.extend_from_slice(&data);
        }
    }
    Ok(if whole.is_empty() { first } else { whole.freeze() })
}

/// Reads on for a while, beside the answer. A connection that is closed with unread data in it is reset, and the
/// sender would see that instead of the answer. One that waits to be told to send (Expect) is better not asked.
fn discard(parts: &Parts, mut body: Incoming, deadline: Duration) {
    if body.is_end_stream() || parts.headers.contains_key(EXPECT) {
        return;
    }
    // It ends by itself, and nothing depends on it.
    tokio::spawn(tokio::time::timeout(deadline, async move {
        let mut rest = DISCARD_BYTES_MAX;
        while let Some(Ok(frame)) = body.frame().await {
            let Some(left) = rest.checked_sub(frame.data_ref().map_or(0, Bytes::len)) else { break };
            rest = left;
        }
    }));
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a [u8]> {
    headers.get(name).map(|value| value.as_bytes())
}
