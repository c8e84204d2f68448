//! HTTP in: one webhook is read, verified, named and stored, and only then answered. Never names the publisher, and
//! never waits for it.

mod answer;
mod body;
mod notices;
mod source;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::HeaderMap;
use hyper::http::request::Parts;
use hyper::{Method, Request, Response};
use jiff::Timestamp;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use answer::{Refusal, accepted};
pub use answer::{blocker, readiness};
use body::{Inbound, Memory};
use notices::Notices;

use crate::config;
use crate::event::{Envelope, Event, TraceContext};
use crate::metrics::Metrics;
use crate::server::{BindError, Limits, Server};
use crate::signature::{Accepted, SIGNATURE_HEADER, TIMESTAMP_HEADER, Verifier};
use crate::spool::{AppendError, Receipt, Spool};

/// Answers like `/readyz`, on the public listener, for load balancers.
pub const HEALTH_PATH: &str = "/healthz";

/// How long a disk may take. Prism's own patience is not documented; a sender that is told to come back is better off
/// than one that hears nothing.
const APPEND_PATIENCE: Duration = Duration::from_secs(10);

/// The public listener, bound but not yet serving.
pub struct Ingress {
    server: Server,
    desk: Desk,
}

impl Ingress {
    /// `draining` is cancelled when the relay begins to stop.
    pub async fn bind(
        http: config::Http,
        verifier: Verifier,
        spool: Spool,
        metrics: Arc<Metrics>,
        draining: CancellationToken,
    ) -> Result<Self, BindError> {
        let limits = Limits {
            connections_max: http.connections_max,
            header_timeout: http.header_timeout,
            // Longer than the deadline of a body, which has an answer of its own.
            silence_timeout: http.header_timeout + http.body_timeout,
        };
        let server = Server::bind(http.listen, "http.listen", limits).await?;
        let memory = Memory::new(http.buffer_bytes_max);
        Ok(Self {
            server,
            desk: Desk { http, verifier, spool, metrics, memory, draining, notices: Notices::default() },
        })
    }

    pub fn address(&self) -> std::io::Result<SocketAddr> {
        self.server.address()
    }

    /// Serves until `draining`, and then finishes the requests under way.
    pub async fn run(self) {
        let desk = Arc::new(self.desk);
        let draining = desk.draining.clone();
        let handler = move |request, peer| {
            let desk = Arc::clone(&desk);
            async move { desk.answer(request, peer).await }
        };
        self.server.run(handler, draining).await;
    }
}

/// Everything that is needed to answer one request.
struct Desk {
    http: config::Http,
    verifier: Verifier,
    spool: Spool,
    metrics: Arc<Metrics>,
    memory: Memory,
    draining: CancellationToken,
    notices: Notices,
}

impl Desk {
    async fn answer(&self, request: Request<Incoming>, peer: SocketAddr) -> Response<Full<Bytes>> {
        let started = Instant::now();
        let (parts, body) = request.into_parts();
        let mut body = Inbound::new(body, &parts.headers, self.http.body_timeout);
        if parts.uri.path() == HEALTH_PATH {
            return match parts.method {
                Method::GET | Method::HEAD => readiness(&self.spool, &self.draining),
                _ => Refusal::MethodNotAllowed("GET, HEAD").response(),
            };
        }
        let refusal = match self.admit(&parts, body.declared(), peer) {
            Ok(()) => match self.receive(&parts.headers, &mut body).await {
                Ok(receipt) => return self.acknowledge(&receipt, started),
                Err(refusal) => refusal,
            },
            Err(refusal) => refusal,
        };
        self.metrics.webhook_refused(refusal.code());
        self.notices.refused(&refusal, peer);
        if !matches!(refusal, Refusal::TimedOut) {
            body.discard();
        }
        refusal.response()
    }

    fn acknowledge(&self, receipt: &Receipt, started: Instant) -> Response<Full<Bytes>> {
        let webhooks = &self.metrics.webhooks;
        let count = if receipt.duplicate { &webhooks.duplicate } else { &webhooks.accepted };
        count.increment(1);
        webhooks.ack_duration.record(started.elapsed());
        accepted(receipt)
    }

    async fn receive(&self, headers: &HeaderMap, body: &mut Inbound) -> Result<Receipt, Refusal> {
        // The share of the memory is held until the answer: until then the body may be in it.
        let (body, _share) = body.read(self.http.body_bytes_max, &self.memory).await?;

        let now = Timestamp::now();
        let (timestamp, signature) = (header(headers, TIMESTAMP_HEADER), header(headers, SIGNATURE_HEADER));
        let verified = self.verifier.verify(timestamp, signature, body, now).map_err(Refusal::Unauthenticated)?;
        must_be_believable(&verified)?;

        let trace = TraceContext::from_headers(header(headers, "traceparent"), header(headers, "tracestate"));
        let event = Event::new(verified, trace, now);
        // An event that is committed later all the same is recognised when the sender comes back.
        let appended = timeout(APPEND_PATIENCE, self.spool.append(event)).await;
        let receipt = appended.unwrap_or(Err(AppendError::Unavailable)).map_err(Refusal::NotStored)?;
        debug!(id = %receipt.id, duplicate = receipt.duplicate, "accepted");
        Ok(receipt)
    }

    /// Everything that can be said without the body.
    fn admit(&self, parts: &Parts, declared: u64, peer: SocketAddr) -> Result<(), Refusal> {
        if parts.uri.path() != self.http.path {
            return Err(Refusal::NotFound);
        }
        if parts.method != Method::POST {
            return Err(Refusal::MethodNotAllowed("POST"));
        }
        // A line that is no text is a hop that nobody can read, not one that is not there.
        let forwarded_for = parts.headers.get_all("x-forwarded-for").iter().map(|line| line.to_str().unwrap_or("?"));
        let forwarded_for: Vec<&str> = forwarded_for.collect();
        let client = source::client(peer.ip(), forwarded_for.into_iter(), &self.http.trusted_proxies);
        if !self.http.allowed_sources.is_empty() && !source::contains(&self.http.allowed_sources, client) {
            return Err(Refusal::SourceNotAllowed);
        }
        if declared > self.http.body_bytes_max as u64 {
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

fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a [u8]> {
    headers.get(name).map(|value| value.as_bytes())
}
