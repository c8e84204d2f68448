//! The relay's metrics: each is registered here, once, with its help text.
//!
//! Metrics are registered at the start, so counting builds no label and looks nothing up in the recorder. Nothing is
//! global: two relays in one process count apart.

use std::collections::HashSet;
use std::sync::{OnceLock, PoisonError, RwLock};
use std::time::Duration;

use jiff::Timestamp;
use metrics::{Counter, Gauge, Histogram, Key, KeyName, Label, Level, Metadata, Recorder, Unit};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder};

/// Buckets for answers and commits, in seconds.
const FAST_SECONDS: [f64; 16] =
    [0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];
/// Buckets for deliveries, in seconds; they take hours when the broker is away.
const LAG_SECONDS: [f64; 16] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0, 120.0, 600.0, 3600.0, 21600.0];
const COMMIT_EVENTS: [f64; 11] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0];

/// The Prometheus text format.
pub const TEXT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";
/// The OpenMetrics text format.
pub const OPEN_METRICS_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

const METADATA: Metadata<'static> = Metadata::new(module_path!(), Level::INFO, None);

const WEBHOOKS: &str = "prism_relay_webhooks_total";
const WEBHOOKS_HELP: &str = "Requests to the public listener, by outcome and, if they were refused, by reason.";
const VERIFIED: &str = "prism_relay_signature_verified_total";
const VERIFIED_HELP: &str = "Valid signatures, by the position of their secret in the list; 1 is the first.";
const REFUSED: &str = "prism_relay_connections_refused_total";
const REFUSED_HELP: &str = "Connections that the relay refused or closed, by reason: tls-handshake, malformed (not \
                            HTTP/1), proxy-protocol, tls-on-plain-port, timeout (no request in time), source-limit, \
                            evicted (closed to make room, before it had sent an event).";

/// All metrics, grouped by the part of the relay that they measure.
pub struct Metrics {
    recorder: PrometheusRecorder,
    /// 1 while a webhook would be answered 200.
    pub ready: Gauge,
    /// Answers to webhooks.
    pub webhooks: Webhooks,
    events: Events,
    /// The spool.
    pub spool: SpoolMetrics,
    /// Publishes to the broker.
    pub publish: Publishes,
    /// The connection to the broker.
    pub broker: BrokerMetrics,
    /// Connections to the public listener.
    pub connections: Connections,
    /// Reloads of secrets and certificates.
    pub reloads: Reloads,
    /// Log lines that were dropped because standard error was not read.
    pub log_lines_dropped: Counter,
    /// What events have and the schemas do not describe.
    pub unexpected: Unexpected,
    /// Scans and predictions that are compared with Prism's API.
    pub reconcile: ReconcileMetrics,
    /// Valid signatures, by the position of their secret in the list.
    verified: RwLock<Vec<Counter>>,
}

/// Event types, fields, states and JSON types that the schemas do not describe, by kind.
pub struct Unexpected([Counter; 4]);

impl Unexpected {
    fn new(recorder: &PrometheusRecorder) -> Self {
        let help = "What events have and the schemas do not describe: an event type, a field, a state, or a field of \
                    another JSON type or missing. Under a flood, not every event is looked at.";
        Self(
            ["event_type", "field", "state", "type"]
                .map(|kind| counter(recorder, "prism_relay_unexpected_total", help, &[("kind", kind)])),
        )
    }

    /// The counter of a kind, by its position in the alphabet.
    pub fn of(&self, kind: usize) -> &Counter {
        &self.0[kind]
    }
}

/// Scans and predictions that are compared with Prism's API. All 0 while `reconcile.api_key` is not set.
pub struct ReconcileMetrics {
    /// Subjects that began and did not end.
    pub open: Gauge,
    /// Open subjects that began longer ago than `reconcile.after`.
    pub overdue: Gauge,
    /// Open subjects that were forgotten because there were more than `reconcile.subjects_max`.
    pub evicted: Counter,
    /// 1 while the API refuses the key.
    pub stopped: Gauge,
    outcomes: [Counter; RECONCILED.len()],
    /// Events that an operator's question brought. They are in the outcomes as well.
    pub by_operator: Counter,
}

/// What came of comparing a subject with the API, as the label of the counter.
pub const RECONCILED: [&str; 7] = ["in_step", "repaired", "late", "unknown", "pending", "failed", "refused"];

impl ReconcileMetrics {
    fn new(recorder: &PrometheusRecorder) -> Self {
        let gauge = |name, help| gauge(recorder, name, help, &[]);
        let help = "Scans and predictions that were compared with Prism's API: in_step (nothing is missing), repaired \
                    (an event that no webhook brought was made), late (the webhook came first), unknown (to the API), \
                    pending (not ended yet), failed (no usable answer), refused (the key).";
        Self {
            open: gauge("prism_relay_subjects_open", "Scans and predictions that began and did not end."),
            overdue: gauge(
                "prism_relay_subjects_overdue",
                "Scans and predictions that began longer ago than reconcile.after and did not end.",
            ),
            evicted: counter(
                recorder,
                "prism_relay_subjects_evicted_total",
                "Scans and predictions that had not ended and were forgotten, because there were more than \
                 reconcile.subjects_max.",
                &[],
            ),
            stopped: gauge(
                "prism_relay_reconcile_stopped",
                "1 while Prism's API refuses reconcile.api_key, so that nothing is reconciled.",
            ),
            outcomes: RECONCILED
                .map(|outcome| counter(recorder, "prism_relay_reconciled_total", help, &[("outcome", outcome)])),
            by_operator: counter(
                recorder,
                "prism_relay_reconciled_by_operator_total",
                "Events that prism-relay reconcile brought; they count as repaired as well.",
                &[],
            ),
        }
    }

    /// The counter of an outcome, by its position in [`RECONCILED`].
    pub fn outcome(&self, position: usize) -> &Counter {
        &self.outcomes[position]
    }
}

/// Open connections to the public listener.
pub struct Connections {
    /// Connections before their first complete request head.
    pub half_open: Gauge,
    /// Connections after their first complete request head.
    pub established: Gauge,
}

/// Reloads of secrets and certificates.
pub struct Reloads {
    /// The new value is in use.
    pub done: Counter,
    /// The previous value stays in use.
    pub failed: Counter,
}

/// Webhooks that were answered 200.
pub struct Webhooks {
    /// New events.
    pub accepted: Counter,
    /// Re-sends, which are not published again.
    pub duplicate: Counter,
    /// Time from the end of the request head to the 200.
    pub ack_duration: Seconds,
}

/// Contents and commits of the spool.
pub struct SpoolMetrics {
    /// Pending events.
    pub events: Gauge,
    /// Parked events.
    pub parked_events: Gauge,
    /// Accepted events that became unreadable when the file was damaged.
    pub lost_events: Gauge,
    /// Bytes that count against `spool.max_bytes`.
    pub bytes: Gauge,
    /// The setting `spool.max_bytes`.
    pub max_bytes: Gauge,
    /// Size of the write-ahead log.
    pub log_bytes: Gauge,
    /// Age of the oldest pending event, in seconds.
    pub oldest_age: Gauge,
    /// Duration of commits with new events, fsync included.
    pub commit_duration: Seconds,
    /// New events per commit.
    pub commit_events: Histogram,
}

/// Publishes by outcome, and how long deliveries took.
pub struct Publishes {
    /// The broker confirmed the event and routed it to a queue.
    pub confirmed: Counter,
    /// The broker could not take the event, most often because a queue is full.
    pub nacked: Counter,
    /// No queue is bound for the event.
    pub returned: Counter,
    /// The broker refuses the event itself.
    pub refused: Counter,
    /// The connection ended before the outcome was known.
    pub lost: Counter,
    /// Time from acceptance to the confirm.
    pub delivery_lag: Seconds,
}

/// State of the connection to the broker.
pub struct BrokerMetrics {
    /// 1 while there is a connection.
    pub connected: Gauge,
    /// 1 while the broker blocks publishers.
    pub blocked: Gauge,
    /// Connections after the first.
    pub reconnects: Counter,
    /// Exchanges, queues and bindings that are missing.
    pub missing: Gauge,
    /// Exchanges, queues and bindings that were missing and were declared again.
    pub declared_again: Counter,
    /// Queues that cannot take messages.
    pub queues_unavailable: Gauge,
}

/// A histogram of durations, in seconds as is usual in Prometheus.
pub struct Seconds(Histogram);

impl Seconds {
    /// Adds a duration.
    pub fn record(&self, duration: Duration) {
        self.0.record(duration.as_secs_f64());
    }
}

impl Metrics {
    /// Registers every metric that has no label from outside.
    pub fn new() -> Self {
        let buckets: [(&str, &[f64]); 4] = [
            ("prism_relay_ack_duration_seconds", &FAST_SECONDS),
            ("prism_relay_spool_commit_duration_seconds", &FAST_SECONDS),
            ("prism_relay_spool_commit_events", &COMMIT_EVENTS),
            ("prism_relay_delivery_lag_seconds", &LAG_SECONDS),
        ];
        let builder = buckets.into_iter().fold(PrometheusBuilder::new(), |builder, (name, buckets)| {
            // The only error is an empty list of buckets.
            builder
                .set_buckets_for_metric(Matcher::Full(name.to_owned()), buckets)
                .expect("the lists of buckets are not empty")
        });
        let recorder = builder.build_recorder();
        let version = [("version", env!("CARGO_PKG_VERSION"))];
        recorder.describe_counter(KeyName::from_const_str(VERIFIED), Some(Unit::Count), VERIFIED_HELP.into());
        gauge(&recorder, "prism_relay_build_info", "The version that runs; always 1.", &version).set(1.0);
        let started = Timestamp::now().as_duration().as_secs_f64();
        let help = "When the process started, in seconds since 1970.";
        gauge(&recorder, "prism_relay_start_time_seconds", help, &[]).set(started);
        Self {
            ready: gauge(&recorder, "prism_relay_ready", "1 while a webhook would be answered 200.", &[]),
            events: Events::new(&recorder),
            webhooks: Webhooks::new(&recorder),
            spool: SpoolMetrics::new(&recorder),
            publish: Publishes::new(&recorder),
            broker: BrokerMetrics::new(&recorder),
            connections: Connections::new(&recorder),
            reloads: Reloads::new(&recorder),
            log_lines_dropped: counter(
                &recorder,
                "prism_relay_log_lines_dropped_total",
                "Log lines that were dropped because standard error was not read in time.",
                &[],
            ),
            unexpected: Unexpected::new(&recorder),
            reconcile: ReconcileMetrics::new(&recorder),
            verified: Default::default(),
            recorder,
        }
    }

    /// Registers the counter of webhooks that were refused for `reason`, the `code` of the answer. Called at start-up:
    /// a counter that appears with its first count shows no increase.
    pub fn refused_webhooks(&self, reason: &'static str) -> Counter {
        counter(&self.recorder, WEBHOOKS, WEBHOOKS_HELP, &[("outcome", "refused"), ("reason", reason)])
    }

    /// Registers the counter of connections that were refused for `reason`. `listener` is `http` or `ops`.
    pub fn refused_connections(&self, listener: &'static str, reason: &'static str) -> Counter {
        counter(&self.recorder, REFUSED, REFUSED_HELP, &[("listener", listener), ("reason", reason)])
    }

    /// Registers a counter for each event type that is counted by name. Only the first call counts.
    pub fn expect_event_types(&self, types: &[&'static str]) {
        self.events
            .documented
            .get_or_init(|| types.iter().map(|name| (*name, event_counter(&self.recorder, name))).collect());
    }

    /// Registers a counter for each position in the list of secrets. Counters are never taken back.
    pub fn expect_secrets(&self, count: usize) {
        let mut verified = self.verified.write().unwrap_or_else(PoisonError::into_inner);
        for position in verified.len()..count {
            let key = Key::from_parts(VERIFIED, vec![Label::new("secret", (position + 1).to_string())]);
            verified.push(self.recorder.register_counter(&key, &METADATA));
        }
    }

    /// Counts a signature by the secret that made it: its position in the list, from 0.
    pub fn signature_verified(&self, position: usize) {
        if let Some(counter) = self.verified.read().unwrap_or_else(PoisonError::into_inner).get(position) {
            counter.increment(1);
        }
    }

    /// Counts an accepted event by its type; `None` for a signed body without an envelope.
    pub fn event(&self, event_type: Option<&str>) {
        let mut documented = self.events.documented.get().into_iter().flatten();
        let known = event_type.and_then(|name| documented.find(|(documented, _)| *documented == name));
        known.map_or(&self.events.other, |(_, counter)| counter).increment(1);
    }

    /// Sets the gauge of the public listener's certificate. Without TLS the gauge does not exist.
    pub fn certificate_days_left(&self, days: f64) {
        let help = "Days until the certificate of the public listener expires.";
        gauge(&self.recorder, "prism_relay_tls_certificate_days_left", help, &[]).set(days);
    }

    /// Sets the gauges of a queue of the configuration. A count that is not known is NaN, as Prometheus has it.
    pub fn queue(&self, name: &str, messages: Option<u32>, consumers: Option<u32>) {
        for (family, help, count) in [
            (
                "prism_relay_queue_messages",
                "Messages in a queue that are ready for a worker; NaN: not known.",
                messages,
            ),
            ("prism_relay_queue_consumers", "Workers connected to a queue; NaN: not known.", consumers),
        ] {
            self.recorder.describe_gauge(KeyName::from_const_str(family), None, help.into());
            let key = Key::from_parts(family, vec![Label::new("queue", name.to_owned())]);
            self.recorder.register_gauge(&key, &METADATA).set(count.map_or(f64::NAN, f64::from));
        }
    }

    /// All metrics in the Prometheus text format.
    pub fn render(&self) -> String {
        self.handle().render()
    }

    /// Folds the samples of the histograms. Must be called every few seconds, or memory grows.
    pub fn upkeep(&self) {
        self.handle().run_upkeep();
    }

    fn handle(&self) -> PrometheusHandle {
        self.recorder.handle()
    }
}

impl Webhooks {
    fn new(recorder: &PrometheusRecorder) -> Self {
        let count = |outcome| counter(recorder, WEBHOOKS, WEBHOOKS_HELP, &[("outcome", outcome), ("reason", "")]);
        let help = "From the end of the request head to the 200.";
        Self {
            accepted: count("accepted"),
            duplicate: count("duplicate"),
            ack_duration: seconds(recorder, "prism_relay_ack_duration_seconds", help),
        }
    }
}

struct Events {
    /// Accepted events, by documented event type.
    documented: OnceLock<Vec<(&'static str, Counter)>>,
    other: Counter,
}

impl Events {
    fn new(recorder: &PrometheusRecorder) -> Self {
        Self { documented: OnceLock::new(), other: event_counter(recorder, "other") }
    }
}

fn event_counter(recorder: &PrometheusRecorder, name: &'static str) -> Counter {
    let help = "Accepted events by type; other: a type that Prism does not document.";
    counter(recorder, "prism_relay_events_total", help, &[("type", name)])
}

impl SpoolMetrics {
    fn new(recorder: &PrometheusRecorder) -> Self {
        let gauge = |name, help| gauge(recorder, name, help, &[]);
        let duration_help = "Commits with new events, fsync included.";
        Self {
            events: gauge("prism_relay_spool_events", "Pending events: accepted, not yet confirmed by the broker."),
            parked_events: gauge(
                "prism_relay_spool_parked_events",
                "Parked events: the broker does not take them; they are tried again slowly.",
            ),
            lost_events: gauge(
                "prism_relay_spool_lost_events",
                "Accepted events that became unreadable when the file was damaged.",
            ),
            bytes: gauge("prism_relay_spool_bytes", "Bytes that count against spool.max_bytes."),
            max_bytes: gauge(
                "prism_relay_spool_max_bytes",
                "spool.max_bytes: at this limit webhooks are answered 503.",
            ),
            log_bytes: gauge(
                "prism_relay_spool_log_bytes",
                "Size of the spool's write-ahead log. It grows while another process reads the spool file; beyond its \
                 normal size it counts against spool.max_bytes.",
            ),
            oldest_age: gauge(
                "prism_relay_spool_oldest_age_seconds",
                "Age of the oldest pending event; 0 if there is none.",
            ),
            commit_duration: seconds(recorder, "prism_relay_spool_commit_duration_seconds", duration_help),
            commit_events: histogram(
                recorder,
                "prism_relay_spool_commit_events",
                "New events in a commit.",
                Unit::Count,
            ),
        }
    }
}

impl Publishes {
    fn new(recorder: &PrometheusRecorder) -> Self {
        let help = "Publishes by outcome: confirmed, nacked, returned (no queue), refused (by the broker, for good), \
                    lost (with the connection; published again).";
        let count = |outcome| counter(recorder, "prism_relay_publish_total", help, &[("outcome", outcome)]);
        let lag_help = "From acceptance to the broker's confirm.";
        Self {
            confirmed: count("confirmed"),
            nacked: count("nacked"),
            returned: count("returned"),
            refused: count("refused"),
            lost: count("lost"),
            delivery_lag: seconds(recorder, "prism_relay_delivery_lag_seconds", lag_help),
        }
    }
}

impl BrokerMetrics {
    fn new(recorder: &PrometheusRecorder) -> Self {
        let gauge = |name, help| gauge(recorder, name, help, &[]);
        let help = "Connections to the broker after the first.";
        Self {
            connected: gauge("prism_relay_broker_connected", "1 while there is a connection, blocked or not."),
            blocked: gauge(
                "prism_relay_broker_blocked",
                "1 while the broker blocks publishers (memory or disk alarm).",
            ),
            reconnects: counter(recorder, "prism_relay_broker_reconnects_total", help, &[]),
            missing: gauge(
                "prism_relay_topology_missing",
                "Exchanges, queues and bindings that are missing on the broker and were not declared again.",
            ),
            declared_again: counter(
                recorder,
                "prism_relay_topology_declared_again_total",
                "Exchanges, queues and bindings that were missing under a running relay and were declared again.",
                &[],
            ),
            queues_unavailable: gauge(
                "prism_relay_queues_unavailable",
                "Queues that cannot take messages: full, or without a leader or a majority.",
            ),
        }
    }
}

impl Connections {
    fn new(recorder: &PrometheusRecorder) -> Self {
        let help = "Open connections to the public listener: half-open until their first request, then established.";
        let gauge = |state| gauge(recorder, "prism_relay_connections", help, &[("state", state)]);
        Self { half_open: gauge("half-open"), established: gauge("established") }
    }
}

impl Reloads {
    fn new(recorder: &PrometheusRecorder) -> Self {
        let help = "Reloads of secrets and certificates: done, or failed (the previous value stays in use).";
        let count = |outcome| counter(recorder, "prism_relay_reloads_total", help, &[("outcome", outcome)]);
        Self { done: count("done"), failed: count("failed") }
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

/// Whether a scraper's `Accept` header prefers OpenMetrics to the Prometheus text format.
pub fn prefers_open_metrics(accept: &str) -> bool {
    let offers = accept.split(',').map(|offer| offer.split(';').next().unwrap_or_default().trim());
    offers.into_iter().find(|offer| matches!(*offer, "application/openmetrics-text" | "text/plain"))
        == Some("application/openmetrics-text")
}

/// Converts the Prometheus text format to OpenMetrics: counter families lose their `_total`, and `# EOF` ends the text.
pub fn open_metrics(text: &str) -> String {
    let mut converted = String::with_capacity(text.len() + 16);
    let counters: HashSet<&str> =
        text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.strip_suffix(" counter")).collect();
    for line in text.lines().filter(|line| !line.is_empty()) {
        let family = line.strip_prefix("# ").and_then(|rest| rest.split(' ').nth(1));
        match family.filter(|family| counters.contains(family)).and_then(|family| family.strip_suffix("_total")) {
            Some(short) => converted.push_str(&line.replacen(&format!("{short}_total"), short, 1)),
            None => converted.push_str(line),
        }
        converted.push('\n');
    }
    converted.push_str("# EOF\n");
    converted
}

type Labels<'a> = &'a [(&'static str, &'static str)];

fn key(name: &'static str, labels: Labels<'_>) -> Key {
    Key::from_parts(name, labels.iter().map(|(key, value)| Label::new(*key, *value)).collect::<Vec<_>>())
}

fn counter(recorder: &PrometheusRecorder, name: &'static str, help: &'static str, labels: Labels<'_>) -> Counter {
    recorder.describe_counter(KeyName::from_const_str(name), Some(Unit::Count), help.into());
    recorder.register_counter(&key(name, labels), &METADATA)
}

fn gauge(recorder: &PrometheusRecorder, name: &'static str, help: &'static str, labels: Labels<'_>) -> Gauge {
    recorder.describe_gauge(KeyName::from_const_str(name), None, help.into());
    recorder.register_gauge(&key(name, labels), &METADATA)
}

fn histogram(recorder: &PrometheusRecorder, name: &'static str, help: &'static str, unit: Unit) -> Histogram {
    recorder.describe_histogram(KeyName::from_const_str(name), Some(unit), help.into());
    recorder.register_histogram(&key(name, &[]), &METADATA)
}

fn seconds(recorder: &PrometheusRecorder, name: &'static str, help: &'static str) -> Seconds {
    Seconds(histogram(recorder, name, help, Unit::Seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn open_metrics_are_for_scrapers_that_prefer_them() {
        for (accept, expected) in [
            ("application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1", true),
            ("text/plain;version=0.0.4, application/openmetrics-text;q=0.1", false),
            ("*/*", false),
            ("", false),
        ] {
            assert_eq!(prefers_open_metrics(accept), expected, "{accept}");
        }
        let metrics = Metrics::new();
        metrics.refused_webhooks("not-found").increment(1);
        let text = open_metrics(&metrics.render());
        assert!(text.contains("# TYPE prism_relay_webhooks counter\n"), "{text}");
        assert!(text.contains("prism_relay_webhooks_total{outcome=\"refused\",reason=\"not-found\"} 1\n"), "{text}");
        assert!(text.contains("# TYPE prism_relay_ready gauge\n"), "{text}");
        assert!(text.ends_with("\n# EOF\n") && !text.contains("\n\n"), "{text}");
    }
}
