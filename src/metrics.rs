//! The numbers that the relay keeps of itself: every metric is registered here, once, with its help text.
//!
//! Handles are kept, so that counting costs an atomic addition and no look-up. Nothing is global: a second relay in
//! the same process counts for itself.

use std::time::Duration;

use metrics::{Counter, Gauge, Histogram, Key, KeyName, Label, Level, Metadata, Recorder, Unit};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder};

/// From a tenth of a millisecond to ten seconds: an answer or a commit outside of it is a fault.
const FAST_SECONDS: [f64; 16] =
    [0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];
/// A delivery may wait for hours if the broker is away.
const LAG_SECONDS: [f64; 16] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0, 120.0, 600.0, 3600.0, 21600.0];
const COMMIT_EVENTS: [f64; 11] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0];

const METADATA: Metadata<'static> = Metadata::new(module_path!(), Level::INFO, None);

const WEBHOOKS: &str = "prism_relay_webhooks_total";
const WEBHOOKS_HELP: &str = "Requests to the webhook path, by outcome and, if they were refused, by reason.";

pub struct Metrics {
    recorder: PrometheusRecorder,
    pub webhooks_accepted: Counter,
    pub webhooks_duplicate: Counter,
    pub ack_duration: Seconds,
    pub spool_commit_duration: Seconds,
    pub spool_commit_events: Histogram,
    pub delivery_lag: Seconds,
    pub spool_events: Gauge,
    pub spool_bytes: Gauge,
    pub spool_oldest_age: Gauge,
    pub spool_parked_events: Gauge,
    pub publish_confirmed: Counter,
    pub publish_nacked: Counter,
    pub publish_returned: Counter,
    pub publish_refused: Counter,
    pub publish_lost: Counter,
    pub broker_connected: Gauge,
    pub broker_blocked: Gauge,
    pub broker_reconnects: Counter,
}

/// A histogram of durations, in seconds as Prometheus wants them.
pub struct Seconds(Histogram);

impl Seconds {
    pub fn record(&self, duration: Duration) {
        self.0.record(duration.as_secs_f64());
    }
}

impl Metrics {
    pub fn new() -> Self {
        let buckets = |builder: PrometheusBuilder, name: &str, buckets: &[f64]| {
            builder.set_buckets_for_metric(Matcher::Full(name.to_owned()), buckets).expect("there are buckets")
        };
        let builder = buckets(PrometheusBuilder::new(), "prism_relay_ack_duration_seconds", &FAST_SECONDS);
        let builder = buckets(builder, "prism_relay_spool_commit_duration_seconds", &FAST_SECONDS);
        let builder = buckets(builder, "prism_relay_spool_commit_events", &COMMIT_EVENTS);
        let recorder = buckets(builder, "prism_relay_delivery_lag_seconds", &LAG_SECONDS).build_recorder();
        let webhooks = |outcome| counter(&recorder, WEBHOOKS, WEBHOOKS_HELP, &[("outcome", outcome), ("reason", "")]);
        let publish = |outcome| {
            let help = "Publishes by outcome: confirmed, nacked, returned (no queue), refused (by the broker, for good), \
                        lost (with the connection; published again).";
            counter(&recorder, "prism_relay_publish_total", help, &[("outcome", outcome)])
        };
        let build = gauge(
            &recorder,
            "prism_relay_build_info",
            "The version that runs; always 1.",
            &[("version", env!("CARGO_PKG_VERSION"))],
        );
        build.set(1.0);
        Self {
            webhooks_accepted: webhooks("accepted"),
            webhooks_duplicate: webhooks("duplicate"),
            ack_duration: seconds(
                &recorder,
                "prism_relay_ack_duration_seconds",
                "From the end of a webhook's head to its 200.",
            ),
            spool_commit_duration: seconds(
                &recorder,
                "prism_relay_spool_commit_duration_seconds",
                "Commits with new events, fsync included.",
            ),
            spool_commit_events: histogram(
                &recorder,
                "prism_relay_spool_commit_events",
                "New events in a commit.",
                Unit::Count,
            ),
            delivery_lag: seconds(
                &recorder,
                "prism_relay_delivery_lag_seconds",
                "From acceptance to the broker's confirm.",
            ),
            spool_events: gauge(
                &recorder,
                "prism_relay_spool_events",
                "Accepted events that wait for their confirm.",
                &[],
            ),
            spool_bytes: gauge(&recorder, "prism_relay_spool_bytes", "What is counted against spool.max_bytes.", &[]),
            spool_oldest_age: gauge(
                &recorder,
                "prism_relay_spool_oldest_age_seconds",
                "Age of the oldest pending event; 0 if there is none.",
                &[],
            ),
            spool_parked_events: gauge(
                &recorder,
                "prism_relay_spool_parked_events",
                "Events that the broker does not take.",
                &[],
            ),
            publish_confirmed: publish("confirmed"),
            publish_nacked: publish("nacked"),
            publish_returned: publish("returned"),
            publish_refused: publish("refused"),
            publish_lost: publish("lost"),
            broker_connected: gauge(
                &recorder,
                "prism_relay_broker_connected",
                "1 while the relay can publish or is only blocked.",
                &[],
            ),
            broker_blocked: gauge(
                &recorder,
                "prism_relay_broker_blocked",
                "1 while the broker blocks publishers (memory or disk alarm).",
                &[],
            ),
            broker_reconnects: counter(
                &recorder,
                "prism_relay_broker_reconnects_total",
                "Connections to the broker after the first.",
                &[],
            ),
            recorder,
        }
    }

    /// Counts a webhook that was not accepted. `reason` is the `code` of the answer.
    pub fn webhook_refused(&self, reason: &'static str) {
        counter(&self.recorder, WEBHOOKS, WEBHOOKS_HELP, &[("outcome", "refused"), ("reason", reason)]).increment(1);
    }

    /// The Prometheus text format.
    pub fn render(&self) -> String {
        self.handle().render()
    }

    /// Frees what histograms have gathered since the last call; to be called every few seconds.
    pub fn upkeep(&self) {
        self.handle().run_upkeep();
    }

    fn handle(&self) -> PrometheusHandle {
        self.recorder.handle()
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
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
