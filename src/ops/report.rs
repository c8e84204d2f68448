//! The JSON answers of `/api`. They hold strings and numbers only: never a body, never a `userToken`.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::Serialize;
use uuid::Uuid;

use super::answers::{Answer, Headline, Level};
use super::notify::NotifyReport;
use super::parked::{Explained, explain};
use super::record::Point;
use super::refusals::{cause, step};
use crate::drift::Unexpected;
use crate::event::{Envelope, subject};
use crate::publisher::{BrokerState, ConnectionEvent, WatchState};
use crate::recent::{Arrival, Counts, Tally};
use crate::reconcile::Status;
use crate::spool::{Condition, Entry, Ledger, SpoolStatus};
use crate::subject::{Order, State, Step, Subject, Told};

/// The answer of `/api/status`.
#[derive(Serialize)]
pub(super) struct Report {
    pub version: &'static str,
    /// The name of this machine.
    pub host: String,
    /// The address of the public listener.
    pub listen: String,
    pub now: Timestamp,
    pub started_at: Timestamp,
    pub uptime_seconds: u64,
    /// Whether a valid webhook would be answered 200 now.
    pub ready: bool,
    /// Whether the relay is shutting down.
    pub draining: bool,
    pub headline: Headline,
    pub answers: Vec<Answer>,
    /// Whether more than a few webhooks were refused recently.
    pub refusing: bool,
    /// All refusals since the process started, the most frequent first.
    pub refusals: Vec<RefusalReport>,
    pub webhooks: WebhookReport,
    pub last: LastReport,
    pub spool: SpoolReport,
    pub broker: BrokerReport,
    /// The queues, exchanges and bindings on RabbitMQ.
    pub watch: WatchState,
    /// Changes of the connection to RabbitMQ, newest first.
    pub timeline: Vec<ConnectionEvent>,
    pub types: Vec<TypeReport>,
    /// What events had since the start that the schemas do not describe.
    pub unexpected: Vec<Unexpected>,
    /// The use of each signature secret, in the order of the configuration.
    pub secrets: Vec<SecretReport>,
    /// The public listener's certificate, if it has TLS.
    pub certificate: Option<CertificateReport>,
    /// The filter of the log that is in use.
    pub log_filter: String,
    /// The receiver of the notices, if there is one, and the last notice.
    pub notify: Option<NotifyReport>,
    /// How reconciling with Prism's API goes; nothing without `reconcile.api_key`.
    pub reconcile: Option<Status>,
}

/// Answers of the public listener since the process started.
#[derive(Serialize)]
pub(super) struct WebhookReport {
    pub accepted: u64,
    pub duplicate: u64,
    /// Counts by the `code` of the answer.
    pub refused: BTreeMap<&'static str, u64>,
}

/// Refused requests with one code since the process started.
#[derive(Serialize)]
pub(super) struct RefusalReport {
    pub reason: &'static str,
    pub count: u64,
    /// Completes the sentence "they are refused: ...".
    pub cause: &'static str,
    /// What to do.
    pub remedy: &'static str,
}

/// When each kind of outcome last happened.
#[derive(Serialize)]
pub(super) struct LastReport {
    pub accepted_at: Option<Timestamp>,
    pub confirmed_at: Option<Timestamp>,
    pub refused_at: Option<Timestamp>,
    pub refused_reason: Option<&'static str>,
}

/// Counts since the spool was created: `accepted = confirmed + pending + parked + removed`.
#[derive(Serialize)]
pub(super) struct SpoolReport {
    pub accepted: u64,
    pub confirmed: u64,
    pub pending: u64,
    /// Of the pending ones: they wait behind a parked event of their subject, to keep its order.
    pub waiting: u64,
    pub parked: u64,
    pub removed: u64,
    /// Events lost because the spool file was damaged. `removed` includes them.
    pub lost: u64,
    pub duplicates: u64,
    pub bytes: u64,
    pub max_bytes: u64,
    /// Size of the write-ahead log. Beyond its normal size `bytes` includes it.
    pub log_bytes: u64,
    pub writable: bool,
    /// The condition of the disk in one word.
    pub condition: &'static str,
    /// What is wrong with the spool's file or disk, and what to do.
    pub reason: Option<&'static str>,
    /// Age of the oldest pending event.
    pub oldest_age_seconds: Option<f64>,
}

/// The answer of `/api/history`.
#[derive(Serialize)]
pub(super) struct HistoryReport {
    pub range: &'static str,
    pub seconds: i64,
    /// The time between two points.
    pub interval_seconds: i64,
    /// The oldest first. While the relay did not run there are none.
    pub points: Vec<Point>,
}

/// The connection to RabbitMQ.
#[derive(Serialize)]
pub(super) struct BrokerReport {
    #[serde(flatten)]
    pub state: BrokerState,
    /// The configured addresses, without passwords.
    pub urls: Vec<String>,
    /// Events published and not yet confirmed.
    pub in_flight: usize,
}

/// Accepted events of one type since the process started.
#[derive(Serialize)]
pub(super) struct TypeReport {
    pub r#type: String,
    pub accepted: u64,
    pub last_seen: Option<Timestamp>,
}

/// How often one signature secret verified a webhook.
#[derive(Serialize)]
pub(super) struct SecretReport {
    /// Position in the configuration, from 1.
    pub position: usize,
    pub verified: u64,
    pub last_verified_at: Option<Timestamp>,
}

/// The validity of the public listener's certificate.
#[derive(Serialize)]
pub(super) struct CertificateReport {
    pub expires_at: Timestamp,
    /// Whole days until it expires; negative afterwards.
    pub days_left: i64,
    /// How serious that is.
    pub level: Level,
}

/// One event of `/api/events`.
#[derive(Serialize)]
pub(super) struct EventReport {
    pub id: Uuid,
    pub r#type: Option<String>,
    pub subject: Option<String>,
    pub scan_id: Option<String>,
    pub prediction_id: Option<String>,
    pub state: Option<String>,
    /// `webhook` or `api`.
    pub source: &'static str,
    pub accepted_at: Timestamp,
    pub status: EventState,
    /// When RabbitMQ confirmed the event; only the latest confirms are kept.
    pub settled_at: Option<Timestamp>,
    /// The parked event of the same subject that a pending event waits behind.
    pub waits_behind: Option<Uuid>,
}

/// What became of an accepted event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum EventState {
    Pending,
    Confirmed,
    Parked,
    /// Removed by an operator.
    Removed,
    /// No longer in the spool, and too old for its outcome to be kept.
    Gone,
}

/// The answer of `/api/subject`.
#[derive(Serialize)]
pub(super) struct SubjectsReport {
    /// Whether anything is remembered of scans and predictions.
    pub on: bool,
    pub subjects: Vec<SubjectReport>,
}

/// What is known of one scan or prediction.
#[derive(Serialize)]
pub(super) struct SubjectReport {
    pub subject: String,
    /// Whether it began and did not end.
    pub open: bool,
    /// What is wrong with the order of its steps.
    pub order: Option<&'static str>,
    /// In the order of their times.
    pub steps: Vec<StepReport>,
    /// How often Prism's API was asked for its end, and when it was last.
    pub tries: u32,
    pub asked_at: Option<Timestamp>,
}

/// One step of a scan or a prediction.
#[derive(Serialize)]
pub(super) struct StepReport {
    /// `began`, `succeeded` or `failed`.
    pub step: &'static str,
    pub at: Option<Timestamp>,
    /// `webhook` or `api`.
    pub source: &'static str,
    /// Whether it is certainly Prism's: signed, or told by the API over TLS.
    pub verified: bool,
}

/// The answer of `/api/parked`.
#[derive(Serialize)]
pub(super) struct ParkedReport {
    pub total: u64,
    pub parked: Vec<ParkedEvent>,
}

/// One parked event of `/api/parked`.
#[derive(Serialize)]
pub(super) struct ParkedEvent {
    pub id: Uuid,
    pub r#type: Option<String>,
    pub subject: Option<String>,
    pub accepted_at: Option<Timestamp>,
    pub reason: String,
    /// What to do.
    pub remedy: &'static str,
    pub tried_at: Option<Timestamp>,
}

impl WebhookReport {
    pub(super) fn new(counts: &Counts) -> Self {
        Self { accepted: counts.accepted, duplicate: counts.duplicates, refused: counts.refused.clone() }
    }
}

impl RefusalReport {
    pub(super) fn list(counts: &Counts) -> Vec<Self> {
        let report = |(reason, count): (&&'static str, &u64)| Self {
            reason,
            count: *count,
            cause: cause(reason),
            remedy: step(reason),
        };
        let mut refusals: Vec<_> = counts.refused.iter().map(report).collect();
        refusals.sort_by_key(|refusal| std::cmp::Reverse(refusal.count));
        refusals
    }
}

impl LastReport {
    pub(super) fn new(counts: &Counts, confirmed_at: Option<Timestamp>) -> Self {
        Self {
            accepted_at: counts.last_accepted,
            confirmed_at,
            refused_at: counts.last_refused.map(|(at, _)| at),
            refused_reason: counts.last_refused.map(|(_, code)| code),
        }
    }
}

impl SpoolReport {
    pub(super) fn new(status: &SpoolStatus, waiting: u64, max_bytes: u64, oldest_age_seconds: Option<f64>) -> Self {
        let Ledger { accepted, confirmed, pending, parked, removed, duplicates, .. } = status.ledger();
        let condition = status.condition();
        Self {
            lost: status.lost(),
            accepted,
            confirmed,
            pending,
            waiting,
            parked,
            removed,
            duplicates,
            bytes: status.used_bytes(),
            max_bytes,
            log_bytes: status.log_bytes(),
            writable: condition == Condition::Healthy,
            condition: condition.name(),
            reason: status.reason(),
            oldest_age_seconds,
        }
    }
}

impl TypeReport {
    /// One report per type, the most frequent first.
    pub(super) fn list(counts: &Counts) -> Vec<Self> {
        let report =
            |name: &str, tally: &Tally| Self { r#type: name.to_owned(), accepted: tally.count, last_seen: tally.last };
        let mut types: Vec<_> =
            counts.types.iter().filter(|(_, tally)| tally.count > 0).map(|(name, tally)| report(name, tally)).collect();
        types.sort_by(|a, b| b.accepted.cmp(&a.accepted).then_with(|| a.r#type.cmp(&b.r#type)));
        if counts.other_types.count > 0 {
            types.push(report("(other)", &counts.other_types));
        }
        types
    }
}

impl SecretReport {
    pub(super) fn list(counts: &Counts, secrets: usize) -> Vec<Self> {
        let report = |position: usize| {
            let tally = counts.verified.get(&position).copied().unwrap_or_default();
            Self { position: position + 1, verified: tally.count, last_verified_at: tally.last }
        };
        (0..secrets).map(report).collect()
    }
}

impl EventReport {
    pub(super) fn new(arrival: &Arrival, status: EventState, settled_at: Option<Timestamp>) -> Self {
        let text = |text: &Option<Box<str>>| text.as_deref().map(str::to_owned);
        Self {
            id: arrival.id,
            r#type: text(&arrival.event_type),
            subject: subject(arrival.prediction_id.as_deref(), arrival.scan_id.as_deref()),
            scan_id: text(&arrival.scan_id),
            prediction_id: text(&arrival.prediction_id),
            state: text(&arrival.state),
            source: arrival.source.text(),
            accepted_at: arrival.accepted_at,
            status,
            settled_at,
            waits_behind: None,
        }
    }
}

impl SubjectReport {
    pub(super) fn new(subject: &Subject, state: &State) -> Self {
        let time = |ms: i64| Timestamp::from_millisecond(ms).ok();
        let step = |step: Step, told: Told| StepReport {
            step: step.text(),
            at: time(told.at_ms),
            source: told.source.text(),
            verified: told.is_trusted,
        };
        let began = state.began.map(|told| step(Step::Began, told));
        let ended = state.ended.map(|ended| step(ended.step, ended.told));
        let mut steps: Vec<_> = began.into_iter().chain(ended).collect();
        steps.sort_by_key(|step| step.at);
        let order = match state.order() {
            Order::Possible => None,
            Order::EndWithoutBeginning => Some("it ended, and nothing said that it began"),
            Order::BeginningAfterEnd => Some("the beginning came after the end"),
        };
        Self {
            subject: subject.to_string(),
            open: state.is_open,
            order,
            steps,
            tries: state.asked.tries,
            asked_at: state.asked.last_ms.and_then(time),
        }
    }
}

/// Whether `find` is part of the event's id, type, scan id or prediction id.
pub(super) fn matches(arrival: &Arrival, find: &str) -> bool {
    let texts = [&arrival.event_type, &arrival.scan_id, &arrival.prediction_id];
    texts.into_iter().flatten().any(|text| text.contains(find)) || arrival.id.to_string().contains(find)
}

impl ParkedEvent {
    pub(super) fn new(entry: Entry) -> Self {
        let event = entry.stored.event;
        let envelope = Envelope::parse(&event.body).ok();
        let key = envelope.as_ref().map_or("this event", Envelope::routing_key);
        let Explained { reason, remedy } = explain(&entry.parked_reason.unwrap_or_default(), key);
        Self {
            id: event.id,
            r#type: envelope.as_ref().map(|envelope| envelope.event_type.clone().into_owned()),
            subject: envelope.as_ref().and_then(Envelope::subject),
            accepted_at: Timestamp::from_millisecond(event.accepted_ms).ok(),
            reason,
            remedy,
            tried_at: entry.tried_ms.and_then(|tried| Timestamp::from_millisecond(tried).ok()),
        }
    }
}
