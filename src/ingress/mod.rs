//! HTTP in: a webhook is read, verified, parsed and stored, and only then answered. The answer never depends on
//! RabbitMQ.

mod answer;
mod body;
mod settings;
pub mod source;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::HeaderMap;
use hyper::http::request;
use hyper::{Method, Request, Response};
use jiff::Timestamp;
use metrics::Counter;
use tokio::net::TcpListener;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use answer::{Refusal, accepted};
use body::{Buffered, Inbound, Memory};
pub use settings::{HEALTH_PATH, Settings};

use crate::drift::Drift;
use crate::event::{DOCUMENTED_TYPES, Envelope, Event, Fingerprint, TraceContext};
use crate::health::Health;
use crate::log_limiter::LogLimiter;
use crate::metrics::Metrics;
use crate::problem::Code;
use crate::recent::Recent;
use crate::server::{Admission, Limits, Peer, Server};
use crate::signature::{SIGNATURE_HEADER, TIMESTAMP_HEADER, Verifier};
use crate::spool::{AppendError, Hint, HintTrust, Receipt, Spool};
use crate::subject::Progress;
use crate::tls;
use crate::traces::Traces;

/// How long the disk may take to store an event. Prism's own timeout is not documented; a 503 with `Retry-After` is
/// better for the sender than no answer.
const APPEND_PATIENCE: Duration = Duration::from_secs(10);

/// The parts of the relay that a webhook passes through.
pub struct Parts {
    /// Checks signatures.
    pub verifier: Arc<Verifier>,
    /// Stores events.
    pub spool: Spool,
    /// Remembers recent webhooks, for operators.
    pub recent: Arc<Recent>,
    /// Looks for what Prism does not document.
    pub drift: Arc<Drift>,
    /// Records spans.
    pub traces: Arc<Traces>,
    /// Counts and measures webhooks.
    pub metrics: Arc<Metrics>,
}

/// The public listener, bound but not yet serving.
pub struct Ingress {
    server: Server,
    handler: Arc<WebhookHandler>,
}

impl Ingress {
    /// `draining` is cancelled when the relay begins to stop.
    pub fn new(
        http: Settings,
        listener: TcpListener,
        tls: Option<Arc<tls::Server>>,
        parts: Parts,
        draining: CancellationToken,
    ) -> Self {
        let server = Server::new(listener, "http", limits(&http), tls, &parts.metrics);
        parts.metrics.expect_event_types(&DOCUMENTED_TYPES);
        parts.metrics.expect_secrets(parts.verifier.secrets());
        let memory = Memory::new(http.buffer_bytes_max);
        let health = Health::new(parts.spool.clone(), draining.clone());
        let Parts { verifier, spool, recent, drift, traces, metrics } = parts;
        let refused = Code::ALL.map(|code| metrics.refused_webhooks(code.text()));
        let handler = WebhookHandler {
            http,
            verifier,
            spool,
            health,
            recent,
            drift,
            traces,
            metrics,
            refused,
            memory,
            draining,
            log_limiter: LogLimiter::default(),
            probed: AtomicBool::new(false),
        };
        Self { server, handler: Arc::new(handler) }
    }

    /// The table of connections, for their counts.
    pub fn admission(&self) -> Arc<Admission> {
        self.server.admission()
    }

    /// Where the listener is bound.
    pub fn address(&self) -> std::io::Result<SocketAddr> {
        self.server.address()
    }

    /// Answers one request as the listener does, for callers with connections of their own.
    pub async fn answer(&self, request: Request<Incoming>, peer: SocketAddr) -> Response<Full<Bytes>> {
        self.handler.answer(request, &peer.into()).await
    }

    /// Serves until `draining`, then finishes the requests in progress.
    pub async fn run(self) {
        let Self { server, handler } = self;
        let draining = handler.draining.clone();
        let answer = move |request, peer| {
            let handler = Arc::clone(&handler);
            async move { handler.answer(request, &peer).await }
        };
        server.run(answer, draining).await;
    }
}

fn limits(http: &Settings) -> Limits {
    Limits {
        connections_max: http.connections_max,
        connections_per_source_max: http.connections_per_source_max,
        unlimited_sources: http.trusted_proxies.clone(),
        header_timeout: http.header_timeout,
        idle_timeout: http.idle_timeout,
        write_timeout: http.header_timeout,
        headers_max: http.headers_max,
        header_bytes_max: http.header_bytes_max,
    }
}

/// Answers requests to the public listener.
struct WebhookHandler {
    http: Settings,
    verifier: Arc<Verifier>,
    spool: Spool,
    health: Health,
    recent: Arc<Recent>,
    drift: Arc<Drift>,
    traces: Arc<Traces>,
    metrics: Arc<Metrics>,
    /// Counters of refusals, in the order of [`Code::ALL`].
    refused: [Counter; Code::ALL.len()],
    memory: Memory,
    draining: CancellationToken,
    log_limiter: LogLimiter,
    /// Whether a probe was logged.
    probed: AtomicBool,
}

impl WebhookHandler {
    async fn answer(&self, request: Request<Incoming>, peer: &Peer) -> Response<Full<Bytes>> {
        let started = Instant::now();
        let (parts, body) = request.into_parts();
        let mut body = Inbound::new(body, &parts.headers, self.http.body_timeout);
        if parts.uri.path() == HEALTH_PATH {
            return match parts.method {
                Method::GET | Method::HEAD => self.health.answer(),
                _ => Refusal::method_not_allowed("GET, HEAD").response(),
            };
        }
        let client = self.client(&parts, peer.address);
        let refusal = match self.admit(&parts, body.declared(), client) {
            Ok(()) => match self.receive(&parts.headers, &mut body).await {
                Ok(receipt) => {
                    // The sender of a duplicate may have captured the request.
                    if !receipt.duplicate {
                        peer.trust();
                    }
                    return self.acknowledge(&receipt, started);
                }
                Err(refusal) => refusal,
            },
            Err(refusal) => refusal,
        };
        self.on_refusal(&refusal, &parts.method, client);
        if !matches!(refusal.code, Code::RequestTimeout | Code::Overloaded) {
            body.discard();
        }
        refusal.response()
    }

    /// Counts a refusal and logs it: at debug, and once a minute for each code as a warning. A probe is not a webhook,
    /// so it is logged once.
    fn on_refusal(&self, refusal: &Refusal, method: &Method, client: IpAddr) {
        let (code, detail) = (refusal.code.text(), &*refusal.detail);
        self.refused[refusal.code as usize].increment(1);
        self.recent.refused(code, Timestamp::now());
        if is_probe(refusal.code, method) {
            debug!(%client, code, %method, "probe refused");
            if !self.probed.swap(true, Ordering::Relaxed) {
                info!(
                    %client, code, %method,
                    "a request that is not a webhook was refused; such probes are only counted from now on. Load \
                     balancers can use GET /healthz"
                );
            }
            return;
        }
        debug!(%client, code, detail, "webhook refused");
        if let Some(unreported) = self.log_limiter.due(code, Instant::now()) {
            warn!(
                %client, code, detail, unreported, "webhook refused; more with this code are only counted for a minute"
            );
        }
    }

    fn acknowledge(&self, receipt: &Receipt, started: Instant) -> Response<Full<Bytes>> {
        let webhooks = &self.metrics.webhooks;
        let count = if receipt.duplicate { &webhooks.duplicate } else { &webhooks.accepted };
        count.increment(1);
        webhooks.ack_duration.record(started.elapsed());
        accepted(receipt)
    }

    async fn receive(&self, headers: &HeaderMap, body: &mut Inbound) -> Result<Receipt, Refusal> {
        let begun = Timestamp::now();
        // The body's share of the memory is held until the webhook is answered.
        let Buffered { bytes: body, share: _share } = body.read(self.http.body_bytes_max, &self.memory).await?;

        let now = Timestamp::now();
        let (timestamp, signature) = (header(headers, TIMESTAMP_HEADER), header(headers, SIGNATURE_HEADER));
        let verified = self.verifier.verify(timestamp, signature, body.clone(), now).map_err(|rejection| {
            let refusal = Refusal::from(rejection);
            // Internet scanners do not sign.
            if matches!(refusal.code, Code::InvalidSignature | Code::StaleTimestamp) {
                self.recent.turned_away(Fingerprint::of(&body), refusal.code.text(), now);
            }
            if self.spool.follows_subjects() {
                self.hint(Envelope::parse(&body).ok().as_ref(), HintTrust::Unsigned, now);
            }
            refusal
        })?;
        // An unsigned body has to be an event. A signed one comes from Prism: it is accepted with any content.
        let envelope = match Envelope::parse(&body) {
            Ok(envelope) => Some(envelope),
            Err(_) if verified.authentic() => None,
            Err(reason) => return Err(reason.into()),
        };
        let signed = verified.signed();
        if let Some(signed) = signed {
            self.metrics.signature_verified(signed.secret);
            self.recent.verified(signed.secret, now);
        }

        let sent = TraceContext::from_headers(header(headers, "traceparent"), header(headers, "tracestate"));
        let trace = self.traces.start_webhook(sent, begun);
        let event = Event::new(verified, envelope.as_ref().and_then(Envelope::subject_key), trace.context(), now);
        let fingerprint = event.fingerprint;
        // An event that is committed after this deadline is recognised when the sender tries again.
        let appended =
            timeout(APPEND_PATIENCE, self.spool.append(event, signed.map(|signed| signed.valid_until))).await;
        let receipt = match appended.unwrap_or(Err(AppendError::Unavailable)) {
            Ok(receipt) => receipt,
            Err(error) => {
                trace.refused();
                let refusal = Refusal::from(error);
                self.recent.turned_away(fingerprint, refusal.code.text(), now);
                let trust = if signed.is_some() { HintTrust::Signed } else { HintTrust::Unsigned };
                self.hint(envelope.as_ref(), trust, now);
                return Err(refusal);
            }
        };
        self.recent.taken_after_all(&fingerprint);
        debug!(id = %receipt.id, duplicate = receipt.duplicate, "accepted");
        trace.accepted(receipt.id, receipt.duplicate);
        self.record(&receipt, envelope.as_ref(), &body, signed.is_some(), now);
        Ok(receipt)
    }

    /// Keeps the subject of a refused webhook. If Prism gives the webhook up, the relay asks Prism's API for the
    /// subject.
    fn hint(&self, envelope: Option<&Envelope<'_>>, trust: HintTrust, now: Timestamp) {
        if let Some(Progress { subject, step }) = envelope.and_then(Progress::of) {
            self.spool.offer_hint(Hint { subject, step, at_ms: now.as_millisecond(), trust, tries: 0 });
        }
    }

    /// Records an accepted webhook for the metrics and the console.
    fn record(&self, receipt: &Receipt, envelope: Option<&Envelope<'_>>, body: &Bytes, signed: bool, now: Timestamp) {
        if receipt.duplicate {
            return self.recent.duplicate(now);
        }
        self.metrics.event(envelope.map(|envelope| &*envelope.event_type));
        self.drift.offer(body, signed);
        self.recent.accepted(receipt.seq, receipt.id, envelope, now);
    }

    /// The address of the client, behind trusted proxies.
    fn client(&self, parts: &request::Parts, peer: SocketAddr) -> IpAddr {
        // A line that is not text counts as an unreadable hop. Skipping it would trust the hop before it.
        let forwarded_for = parts.headers.get_all("x-forwarded-for").iter().map(|line| line.to_str().unwrap_or("?"));
        let forwarded_for: Vec<&str> = forwarded_for.collect();
        source::client(peer.ip(), forwarded_for.into_iter(), &self.http.trusted_proxies)
    }

    /// Checks everything that can be checked without the body.
    fn admit(&self, parts: &request::Parts, declared: u64, client: IpAddr) -> Result<(), Refusal> {
        if parts.uri.path() != self.http.path {
            return Err(Refusal::new(Code::NotFound, "webhooks are posted to the configured path, http.path"));
        }
        if parts.method != Method::POST {
            return Err(Refusal::method_not_allowed("POST"));
        }
        if !self.http.allowed_sources.is_empty() && !source::contains(&self.http.allowed_sources, client) {
            return Err(Refusal::new(Code::SourceNotAllowed, "the sender's address is not in http.allowed_sources"));
        }
        if declared > self.http.body_bytes_max as u64 {
            return Err(Refusal::body_too_large(self.http.body_bytes_max));
        }
        Ok(())
    }
}

/// Whether a load balancer, a browser or a scanner looked, and no event was lost. Webhooks are posted.
fn is_probe(code: Code, method: &Method) -> bool {
    matches!(code, Code::NotFound | Code::MethodNotAllowed)
        && [Method::GET, Method::HEAD, Method::OPTIONS].contains(method)
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a [u8]> {
    headers.get(name).map(|value| value.as_bytes())
}

#[cfg(test)]
mod tests;
