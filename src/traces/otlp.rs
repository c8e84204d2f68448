//! Spans of OpenTelemetry's SDK, exported in batches by a task of the relay. The queue is bounded: spans that a slow
//! collector cannot take are dropped and logged. Deliveries never wait for the collector.

use std::collections::HashMap;
use std::num::NonZeroU64;
use std::time::{Duration, Instant};

use hyper_rustls::HttpsConnectorBuilder;
use jiff::Timestamp;
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

use super::settings::{Settings, TracesError};
use crate::event::{Event, TraceContext};
use crate::log_limiter::LogLimiter;
use crate::tls::ClientFiles;

/// Maximum number of spans that wait for the collector. Each takes about 1 KiB.
const QUEUE_MAX: usize = 4096;
const BATCH_MAX: usize = 512;
/// How long a batch that is not full waits for more spans.
const BATCH_WAIT: Duration = Duration::from_secs(1);
const EXPORT_TIMEOUT: Duration = Duration::from_secs(10);

/// The path that the specification of OTLP over HTTP gives.
const PATH: &str = "/v1/traces";

/// Starts spans and exports them; does nothing without `traces.endpoint`.
pub struct Traces(Option<Pipeline>);

/// The way of a span from the tracer through the queue to the exporter.
struct Pipeline {
    tracer: SdkTracer,
    exporter: SpanExporter,
    queue: mpsc::Sender<Item>,
    /// The queue of finished spans, locked by [`Traces::export`] while it runs.
    items: AsyncMutex<mpsc::Receiver<Item>>,
    log_limiter: LogLimiter,
}

enum Item {
    Span(Box<SpanData>),
    /// A request to be answered once all spans queued before it are exported.
    Flush(oneshot::Sender<()>),
}

/// The span of a verified webhook, until its answer.
pub struct WebhookSpan {
    sent: Option<TraceContext>,
    // Boxed: a span is large, and most relays have none.
    span: Option<Box<Span>>,
}

/// The span of a publish, until its outcome.
pub struct PublishSpan(Option<Box<Span>>);

/// Queues finished spans for the exporter.
#[derive(Debug)]
struct Enqueue {
    queue: mpsc::Sender<Item>,
    log_limiter: LogLimiter,
}

impl SpanProcessor for Enqueue {
    fn on_start(&self, _: &mut Span, _: &Context) {}

    fn on_end(&self, span: SpanData) {
        if span.span_context.is_sampled()
            && self.queue.try_send(Item::Span(Box::new(span))).is_err()
            && let Some(unreported) = self.log_limiter.due("dropped", Instant::now())
        {
            let dropped = unreported.map_or(0, NonZeroU64::get) + 1;
            warn!(dropped, "dropped spans: the collector at traces.endpoint is too slow");
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
    /// Prepares the exporter. Connects only when spans are exported.
    pub fn new(settings: &Settings) -> Result<Self, TracesError> {
        let Some(endpoint) = &settings.endpoint else { return Ok(Self(None)) };
        let secure = endpoint.scheme_str() == Some("https");
        let tls = if secure { ClientFiles::default().load() } else { crate::tls::client_without_authorities() };
        let connector =
            HttpsConnectorBuilder::new().with_tls_config((*tls?).clone()).https_or_http().enable_http1().build();
        let exporter = SpanExporter::builder()
            .with_http()
            .with_http_client(HyperClient::new(connector, EXPORT_TIMEOUT, None))
            .with_protocol(Protocol::HttpBinary)
            .with_endpoint(format!("{}{PATH}", endpoint.to_string().trim_end_matches('/')))
            .with_timeout(EXPORT_TIMEOUT)
            .build();
        let mut exporter = exporter.map_err(|error| TracesError::Exporter(error.to_string()))?;
        let attributes = [KeyValue::new("service.version", env!("CARGO_PKG_VERSION"))];
        let resource = Resource::builder().with_service_name("prism-relay").with_attributes(attributes).build();
        exporter.set_resource(&resource);
        let (queue, items) = mpsc::channel(QUEUE_MAX);
        let processor = Enqueue { queue: queue.clone(), log_limiter: LogLimiter::default() };
        // A sender's trace is exported if the sender sampled it.
        let sampler = Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(settings.sample_ratio)));
        let provider = SdkTracerProvider::builder()
            .with_span_processor(processor)
            .with_sampler(sampler)
            .with_resource(resource)
            .build();
        let tracer = provider.tracer("prism-relay");
        Ok(Self(Some(Pipeline {
            tracer,
            exporter,
            queue,
            items: AsyncMutex::new(items),
            log_limiter: LogLimiter::default(),
        })))
    }

    /// Starts the span of a webhook. `sent` is the sender's context, `started_at` the time that the request began.
    pub fn start_webhook(&self, sent: Option<TraceContext>, started_at: Timestamp) -> WebhookSpan {
        let span = self.0.as_ref().map(|pipeline| {
            let builder = pipeline
                .tracer
                .span_builder("prism webhook")
                .with_kind(SpanKind::Server)
                .with_start_time(std::time::SystemTime::from(started_at));
            let builder = builder.with_attributes([KeyValue::new("http.request.method", "POST")]);
            Box::new(builder.start_with_context(&pipeline.tracer, &extract(sent.as_ref())))
        });
        WebhookSpan { sent, span }
    }

    /// Starts the span of a publish.
    pub fn start_publish(&self, event: &Event, exchange: &str, routing_key: &str) -> PublishSpan {
        let Some(pipeline) = &self.0 else { return PublishSpan(None) };
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
        let builder = pipeline.tracer.span_builder(format!("publish {exchange}")).with_kind(SpanKind::Producer);
        let span =
            builder.with_attributes(attributes).start_with_context(&pipeline.tracer, &extract(event.trace.as_ref()));
        PublishSpan(Some(Box::new(span)))
    }

    /// Exports spans until it is dropped.
    pub async fn export(&self) {
        let Some(pipeline) = &self.0 else { return std::future::pending().await };
        let mut items = pipeline.items.lock().await;
        loop {
            let Some(first) = items.recv().await else { return std::future::pending().await };
            let (mut batch, mut flushes) = (vec![first], Vec::new());
            let more = async {
                while batch.len() < BATCH_MAX && !matches!(batch.last(), Some(Item::Flush(_))) {
                    let Some(next) = items.recv().await else { return };
                    batch.push(next);
                }
            };
            // On a timeout the batch is just smaller.
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
                && let Err(error) = pipeline.exporter.export(spans).await
                && let Some(unreported) = pipeline.log_limiter.due("export", Instant::now())
            {
                warn!(%error, count, unreported, "cannot export spans to traces.endpoint; dropped them");
            }
            for done in flushes {
                let _ = done.send(());
            }
        }
    }

    /// Returns once all spans ended so far are exported, or after `limit`.
    pub async fn flush(&self, limit: Duration) {
        let Some(pipeline) = &self.0 else { return };
        let (done, exported) = oneshot::channel();
        let flush = async {
            if pipeline.queue.send(Item::Flush(done)).await.is_ok() {
                let _ = exported.await;
            }
        };
        let _ = timeout(limit, flush).await;
    }
}

impl WebhookSpan {
    /// The context that the event keeps: this span's, or without a collector the sender's.
    pub fn context(&self) -> Option<TraceContext> {
        self.span.as_deref().and_then(inject).or_else(|| self.sent.clone())
    }

    /// The event is stored, and the answer is 200.
    pub fn accepted(self, id: Uuid, duplicate: bool) {
        if let Some(mut span) = self.span {
            span.set_attribute(KeyValue::new("http.response.status_code", 200));
            span.set_attribute(KeyValue::new("messaging.message.id", id.to_string()));
            span.set_attribute(KeyValue::new("prism.duplicate", duplicate));
            span.end();
        }
    }

    /// The event could not be stored, and the answer is 503.
    pub fn refused(self) {
        if let Some(mut span) = self.span {
            span.set_attribute(KeyValue::new("http.response.status_code", 503));
            span.set_status(Status::error("not stored"));
            span.end();
        }
    }
}

impl PublishSpan {
    /// The context for the message: this span's, or without a collector the one that the event has.
    pub fn context(&self, event: &Event) -> Option<TraceContext> {
        self.0.as_deref().and_then(inject).or_else(|| event.trace.clone())
    }

    /// Ends the span: the broker confirmed the event.
    pub fn confirmed(self) {
        if let Some(mut span) = self.0 {
            span.end();
        }
    }

    /// `error` becomes the attribute `error.type`, so it has few values.
    pub fn failed(self, error: &'static str) {
        if let Some(mut span) = self.0 {
            span.set_attribute(KeyValue::new("error.type", error));
            span.set_status(Status::error(error));
            span.end();
        }
    }
}

/// Reads a context with OpenTelemetry's propagator for the W3C headers.
fn extract(trace: Option<&TraceContext>) -> Context {
    let Some(trace) = trace else { return Context::new() };
    let mut headers = HashMap::from([("traceparent".to_owned(), trace.traceparent.clone())]);
    headers.extend(trace.tracestate.clone().map(|state| ("tracestate".to_owned(), state)));
    TraceContextPropagator::new().extract_with_context(&Context::new(), &headers)
}

/// Writes a span's context as the W3C headers.
fn inject(span: &Span) -> Option<TraceContext> {
    let mut headers = HashMap::new();
    let context = Context::new().with_remote_span_context(span.span_context().clone());
    TraceContextPropagator::new().inject_context(&context, &mut headers);
    let state = headers.remove("tracestate").filter(|state| !state.is_empty());
    TraceContext::from_headers(headers.get("traceparent").map(String::as_bytes), state.as_deref().map(str::as_bytes))
}
