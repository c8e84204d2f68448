//! The operators' listener: health, metrics, status. It stays up until the very end, so that a drain can be watched.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use jiff::Timestamp;
use serde::Serialize;
use tokio_util::sync::CancellationToken;
use tracing::error;

use crate::config;
use crate::ingress::{blocker, readiness};
use crate::metrics::Metrics;
use crate::publisher::{BrokerState, Status};
use crate::server::{Admission, BindError, Limits, Server};
use crate::spool::{ReadError, Spool};
use crate::telemetry::chain;
use crate::tls;

/// Operators and their scrapers are few, and patient.
const LIMITS: Limits = Limits {
    connections_max: 256,
    connections_per_source_max: 256,
    unlimited_sources: Vec::new(),
    header_timeout: Duration::from_secs(10),
    silence_timeout: Duration::from_secs(120),
    headers_max: 64,
    header_bytes_max: 16 * 1024,
    streams_max: 64,
};

/// The Prometheus text format, version 0.0.4.
const METRICS_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// The operators' listener, bound but not yet serving.
pub struct Ops {
    server: Server,
    desk: Desk,
}

/// What there is to tell about.
#[derive(Clone)]
pub struct Parts {
    pub spool: Spool,
    pub broker: Arc<Status>,
    /// Connections to the public listener.
    pub connections: Arc<Admission>,
    /// Of the public listener.
    pub tls: Option<Arc<tls::Server>>,
    pub metrics: Arc<Metrics>,
}

#[derive(Clone)]
struct Desk {
    parts: Parts,
    draining: CancellationToken,
    started: (Instant, Timestamp),
}

/// What `/api/status` tells.
#[derive(Serialize)]
struct Report {
    version: &'static str,
    started_at: Timestamp,
    uptime_seconds: u64,
    /// Whether a webhook would be answered 200.
    ready: bool,
    /// Whether the relay is on its way out.
    draining: bool,
    spool: SpoolReport,
    broker: BrokerReport,
}

#[derive(Serialize)]
struct SpoolReport {
    /// `accepted = confirmed + pending + parked + removed`.
    accepted: u64,
    confirmed: u64,
    pending: u64,
    parked: u64,
    removed: u64,
    duplicates: u64,
    bytes: u64,
    max_bytes: u64,
    writable: bool,
    /// Of the oldest pending event.
    oldest_age_seconds: Option<f64>,
}

#[derive(Serialize)]
struct BrokerReport {
    #[serde(flatten)]
    state: BrokerState,
    /// Published and not yet confirmed.
    in_flight: usize,
}

impl Ops {
    /// `draining` is cancelled when the relay begins to stop.
    pub async fn bind(config: &config::Ops, parts: Parts, draining: CancellationToken) -> Result<Self, BindError> {
        let server = Server::bind(config.listen, "ops.listen", LIMITS, None, Arc::clone(&parts.metrics)).await?;
        let started = (Instant::now(), Timestamp::now());
        Ok(Self { server, desk: Desk { parts, draining, started } })
    }

    pub fn address(&self) -> std::io::Result<SocketAddr> {
        self.server.address()
    }

    pub async fn run(self, shutdown: CancellationToken) {
        let desk = self.desk;
        let handler = move |request: Request<Incoming>, _peer| {
            let desk = desk.clone();
            async move { desk.answer(&request).await }
        };
        self.server.run(handler, shutdown).await;
    }
}

impl Desk {
    async fn answer(&self, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            let mut response = text(StatusCode::METHOD_NOT_ALLOWED, "this listener takes GET and HEAD\n");
            response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
            return response;
        }
        let answer = match request.uri().path() {
            "/livez" => Ok(text(StatusCode::OK, "alive\n")),
            "/readyz" => Ok(readiness(&self.parts.spool, &self.draining)),
            "/metrics" => Ok(self.metrics().await),
            "/api/status" => self.status().await,
            _ => Ok(text(StatusCode::NOT_FOUND, "there are /livez, /readyz, /metrics and /api/status\n")),
        };
        answer.unwrap_or_else(|error| {
            error!(error = chain(&error), "cannot report");
            text(StatusCode::INTERNAL_SERVER_ERROR, "cannot read the spool\n")
        })
    }

    async fn metrics(&self) -> Response<Full<Bytes>> {
        let (ledger, broker) = (self.parts.spool.gauges().ledger(), self.parts.broker.snapshot());
        let metrics = &self.parts.metrics;
        metrics.spool.events.set(ledger.pending as f64);
        metrics.spool.bytes.set(ledger.bytes as f64);
        metrics.spool.parked_events.set(ledger.parked as f64);
        // Metrics are needed most when the spool is sick.
        if let Ok(age) = self.oldest_age().await {
            metrics.spool.oldest_age.set(age.unwrap_or(0.0));
        }
        let census = self.parts.connections.census();
        metrics.connections.half_open.set(census.half_open as f64);
        metrics.connections.established.set(census.established as f64);
        if let Some(tls) = &self.parts.tls {
            metrics.certificate_days_left(days_left(tls.identity().expires_at));
        }
        metrics.broker.connected.set(f64::from(u8::from(broker.connected)));
        metrics.broker.blocked.set(f64::from(u8::from(broker.blocked.is_some())));
        response(StatusCode::OK, METRICS_TYPE, metrics.render())
    }

    async fn status(&self) -> Result<Response<Full<Bytes>>, ReadError> {
        let ledger = self.parts.spool.gauges().ledger();
        let (started, started_at) = self.started;
        let report = Report {
            version: env!("CARGO_PKG_VERSION"),
            started_at,
            uptime_seconds: started.elapsed().as_secs(),
            ready: blocker(&self.parts.spool, &self.draining).is_none(),
            draining: self.draining.is_cancelled(),
            spool: SpoolReport {
                accepted: ledger.accepted,
                confirmed: ledger.confirmed,
                pending: ledger.pending,
                parked: ledger.parked,
                removed: ledger.removed,
                duplicates: ledger.duplicates,
                bytes: ledger.bytes,
                max_bytes: self.parts.spool.max_bytes(),
                writable: self.parts.spool.gauges().writable(),
                oldest_age_seconds: self.oldest_age().await?,
            },
            broker: BrokerReport { state: self.parts.broker.snapshot(), in_flight: self.parts.broker.in_flight() },
        };
        // Made of strings and numbers, so serialising cannot fail.
        Ok(response(StatusCode::OK, "application/json", serde_json::to_vec(&report).unwrap_or_default()))
    }

    /// In seconds.
    async fn oldest_age(&self) -> Result<Option<f64>, ReadError> {
        let accepted_ms = self.parts.spool.oldest_pending_ms().await?;
        Ok(accepted_ms.map(|accepted_ms| (Timestamp::now().as_millisecond() - accepted_ms).max(0) as f64 / 1000.0))
    }
}

fn days_left(expires_at: Timestamp) -> f64 {
    expires_at.duration_since(Timestamp::now()).as_secs_f64() / 86_400.0
}

fn text(status: StatusCode, text: &'static str) -> Response<Full<Bytes>> {
    response(status, "text/plain; charset=utf-8", text)
}

fn response(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}
