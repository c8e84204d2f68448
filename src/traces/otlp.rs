//! Spans of OpenTelemetry's SDK, exported in batches by a task of our own. Bounded: what a slow collector cannot take is
//! dropped and told of; deliveries never wait for it.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use hyper_rustls::HttpsConnectorBuilder;
use opentelemetry::propagation::TextMapPropagator;
use opentelemetry::trace::{Span as _, SpanKind, Status, TraceContextExt, Tracer, TracerProvider};
use opentelemetry::{Context, KeyValue};
use opentelemetry_http::hyper::HyperClient;
use opentelemetry_otlp::{Protocol, SpanExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{
    Sampler, SdkTracer, SdkTracerProvider, Span, SpanData, SpanExporter as _, SpanProcessor,
};
use tokio::sync::{Mutex as AsyncMutex, mpsc, oneshot};
use tokio::time::timeout;
use tracing::warn;
use uuid::Uuid;

use super::Settings;
use crate::event::{Event, TraceContext};
use crate::log_limiter::LogLimiter;
use crate::tls::ClientFiles;

/// Spans that wait for the collector, with about 1 KiB each.
const QUEUE_MAX: usize = 4096;
const BATCH_MAX: usize = 512;
/// How long a batch waits for company.
const BATCH_WAIT: Duration = Duration::from_secs(1);
const EXPORT_TIMEOUT: Duration = Duration::from_secs(10);

/// OTLP over HTTP: the path is the specification's.
const PATH: &str = "/v1/traces";

pub struct Traces(Option<Telling>);

struct Telling {
    tracer: SdkTracer,
    exporter: SpanExporter,
    queue: mpsc::Sender<Item>,
    /// Taken by [`Traces::export`] for as long as that runs.
    items: AsyncMutex<mpsc::Receiver<Item>>,
    log_limiter: LogLimiter,
}

enum Item {
    Span(Box<SpanData>),
    /// Answered once everything before has been exported.
    Flush(oneshot::Sender<()>),
}

/// A webhook that is believed, until it is answered.
pub struct Webhook {
    sent: Option<TraceContext>,
    // A span is large, and most relays have none.
    span: Option<Box<Span>>,
}

/// A publish, until its outcome is known.
pub struct Publishing(Option<Box<Span>>);

/// Takes finished spans from wherever they end.
#[derive(Debug)]
struct Queue {
    items: mpsc::Sender<Item>,
    dropped: AtomicU64,
    told: Mutex<Option<Instant>>,
}

impl std::fmt::Debug for Item {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Item")
    }
}

impl SpanProcessor for Queue {
    fn on_start(&self, _: &mut Span, _: &Context) {}

    fn on_end(&self, span: SpanData) {
        if span.span_context.is_sampled() && self.items.try_send(Item::Span(Box::new(span))).is_err() {
            let dropped = self.dropped.fetch_add(1, Ordering::Relaxed) + 1;
            let mut told = self.told.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            if told.is_none_or(|at| at.elapsed() > Duration::from_secs(60)) {
                *told = Some(Instant::now());
                warn!(dropped, "the collector of traces is too slow: spans are dropped");
            }
        }
    }

    fn force_flush(&self) -> OTelSdkResult {
        Ok(())
    }

    fn shutdown_with_timeout(&self, _: Duration) -> OTelSdkResult {
        Ok(())
    }
}

impl Traces {
    /// The error completes the sentence "traces.endpoint ...".
    pub fn new(settings: &Settings) -> Result<Self, String> {
        let Some(endpoint) = &settings.endpoint else { return Ok(Self(None)) };
        let secure = endpoint.scheme_str() == Some("https");
        let tls = if secure { ClientFiles::default().load() } else { crate::tls::client_without_authorities() };
        let tls = tls.map_err(|error| format!("needs TLS, and {error}"))?;
        let connector =
            HttpsConnectorBuilder::new().with_tls_config((*tls).clone()).https_or_http().enable_http1().build();
        let exporter = SpanExporter::builder()
            .with_http()
            .with_http_client(HyperClient::new(connector, EXPORT_TIMEOUT, None))
            .with_protocol(Protocol::HttpBinary)
            .with_endpoint(format!("{}{PATH}", endpoint.to_string().trim_end_matches('/')))
            .with_timeout(EXPORT_TIMEOUT)
            .build();
        let mut exporter = exporter.map_err(|error| format!("cannot be used: {error}"))?;
        let attributes = [KeyValue::new("service.version", env!("CARGO_PKG_VERSION"))];
        let resource = Resource::builder().with_service_name("prism-relay").with_attributes(attributes).build();
        exporter.set_resource(&resource);
        let (queue, items) = mpsc::channel(QUEUE_MAX);
        let processor = Queue { items: queue.clone(), dropped: AtomicU64::new(0), told: Mutex::new(None) };
        // Whether a sender's trace is kept is the sender's choice.
        let sampler = Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(settings.sample_ratio)));
        let provider = SdkTracerProvider::builder()
            .with_span_processor(processor)
            .with_sampler(sampler)
            .with_resource(resource)
            .build();
        let tracer = provider.tracer("prism-relay");
        Ok(Self(Some(Telling {
            tracer,
            exporter,
            queue,
            items: AsyncMutex::new(items),
            log_limiter: LogLimiter::default(),
        })))
    }

    /// `sent`: the sender's own context. `started`: when the request came.
    pub fn webhook(&self, sent: Option<TraceContext>, started: SystemTime) -> Webhook {
        let span = self.0.as_ref().map(|telling| {
            let builder =
                telling.tracer.span_builder("prism webhook").with_kind(SpanKind::Server).with_start_time(started);
            let builder = builder.with_attributes([KeyValue::new("http.request.method", "POST")]);
            Box::new(builder.start_with_context(&telling.tracer, &extract(sent.as_ref())))
        });
        Webhook { sent, span }
    }

    /// Starts the span of a publish.
    pub fn publishing(&self, event: &Event, exchange: &str, routing_key: &str) -> Publishing {
        let Some(telling) = &self.0 else { return Publishing(None) };
        let bytes = i64::try_from(event.body.len()).unwrap_or(i64::MAX);
        let attributes = [
            KeyValue::new("messaging.system", "rabbitmq"),
            KeyValue::new("messaging.operation.name", "publish"),
            KeyValue::new("messaging.operation.type", "send"),
            KeyValue::new("messaging.destination.name", format!("{exchange}:{routing_key}")),
            KeyValue::new("messaging.rabbitmq.destination.routing_key", routing_key.to_owned()),
            KeyValue::new("messaging.message.id", event.id.to_string()),
            KeyValue::new("messaging.message.body.size", bytes),
        ];
        let builder = telling.tracer.span_builder(format!("publish {exchange}")).with_kind(SpanKind::Producer);
        let span =
            builder.with_attributes(attributes).start_with_context(&telling.tracer, &extract(event.trace.as_ref()));
        Publishing(Some(Box::new(span)))
    }

    /// Exports for ever.
    pub async fn export(&self) {
        let Some(telling) = &self.0 else { return std::future::pending().await };
        let mut items = telling.items.lock().await;
        loop {
            let Some(first) = items.recv().await else { return std::future::pending().await };
            let (mut batch, mut flushes) = (vec![first], Vec::new());
            let more = async {
                while batch.len() < BATCH_MAX && !matches!(batch.last(), Some(Item::Flush(_))) {
                    let Some(next) = items.recv().await else { return };
                    batch.push(next);
                }
            };
            // Whatever has come by then is enough.
            let _ = timeout(BATCH_WAIT, more).await;
            let spans: Vec<_> = batch
                .into_iter()
                .filter_map(|item| match item {
                    Item::Span(span) => Some(*span),
                    Item::Flush(done) => {
                        flushes.push(done);
                        None
                    }
                })
                .collect();
            let count = spans.len();
            if count > 0
                && let Err(error) = telling.exporter.export(spans).await
                && let Some(unreported) = telling.log_limiter.due("export", Instant::now())
            {
                warn!(%error, count, unreported, "spans could not be exported to traces.endpoint");
            }
            for done in flushes {
                let _ = done.send(());
            }
        }
    }

    /// Returns once what has ended by now is exported, or after `limit`.
    pub async fn flush(&self, limit: Duration) {
        let Some(telling) = &self.0 else { return };
        let (done, exported) = oneshot::channel();
        let flush = async {
            if telling.queue.send(Item::Flush(done)).await.is_ok() {
                let _ = exported.await;
            }
        };
        let _ = timeout(limit, flush).await;
    }
}

impl Webhook {
    /// What the event carries on.
    pub fn context(&self) -> Option<TraceContext> {
        self.span.as_deref().and_then(inject).or_else(|| self.sent.clone())
    }

    /// The answer was a 200.
    pub fn answered(self, id: Uuid, duplicate: bool) {
        if let Some(mut span) = self.span {
            span.set_attribute(KeyValue::new("http.response.status_code", 200));
            span.set_attribute(KeyValue::new("messaging.message.id", id.to_string()));
            span.set_attribute(KeyValue::new("prism.duplicate", duplicate));
            span.end();
        }
    }
}

impl Webhook {
    /// It could not be stored: the answer is a 503.
    pub fn refused(self) {
        if let Some(mut span) = self.span {
            span.set_attribute(KeyValue::new("http.response.status_code", 503));
            span.set_status(Status::error("not stored"));
            span.end();
        }
    }
}

impl Publishing {
    /// The context for the message: workers continue from this span, or from the sender's without a collector.
    pub fn context(&self, event: &Event) -> Option<TraceContext> {
        self.0.as_deref().and_then(inject).or_else(|| event.trace.clone())
    }

    pub fn confirmed(self) {
        if let Some(mut span) = self.0 {
            span.end();
        }
    }

    /// `error` is one of few words.
    pub fn failed(self, error: &'static str) {
        if let Some(mut span) = self.0 {
            span.set_attribute(KeyValue::new("error.type", error));
            span.set_status(Status::error(error));
            span.end();
        }
    }
}

/// What the W3C's propagator reads and writes.
fn extract(trace: Option<&TraceContext>) -> Context {
    let Some(trace) = trace else { return Context::new() };
    let mut headers = HashMap::from([("traceparent".to_owned(), trace.traceparent.clone())]);
    headers.extend(trace.tracestate.clone().map(|state| ("tracestate".to_owned(), state)));
    TraceContextPropagator::new().extract_with_context(&Context::new(), &headers)
}

fn inject(span: &Span) -> Option<TraceContext> {
    let mut headers = HashMap::new();
    let context = Context::new().with_remote_span_context(span.span_context().clone());
    TraceContextPropagator::new().inject_context(&context, &mut headers);
    let state = headers.remove("tracestate").filter(|state| !state.is_empty());
    TraceContext::from_headers(headers.get("traceparent").map(String::as_bytes), state.as_deref().map(str::as_bytes))
}
