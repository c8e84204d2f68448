//! What `/api` tells, as JSON. Made of strings and numbers; never a body, never a `userToken`.

use jiff::Timestamp;
use serde::Serialize;
use std::collections::BTreeMap;
use uuid::Uuid;

use super::summary::{RecentRefusals, Summary};
use crate::event::{Envelope, subject};
use crate::publisher::{BrokerState, ConnectionEvent};
use crate::recent::{Arrival, Counts, Tally};
use crate::spool::{Entry, Ledger};

/// `/api/status`.
#[derive(Serialize)]
pub struct Report {
    pub version: &'static str,
    pub now: Timestamp,
    pub started_at: Timestamp,
    pub uptime_seconds: u64,
    /// Whether a webhook would be answered 200.
    pub ready: bool,
    /// Whether the relay is on its way out.
    pub draining: bool,
    pub summary: Summary,
    /// Webhooks that were meant for us and are being refused.
    pub refusing: Option<RecentRefusals>,
    pub webhooks: WebhookReport,
    pub last: LastReport,
    pub spool: SpoolReport,
    pub broker: BrokerReport,
    /// The newest first.
    pub timeline: Vec<ConnectionEvent>,
    pub types: Vec<TypeReport>,
    /// The signature's secrets by position.
    pub secrets: Vec<SecretReport>,
    /// Of the public listener, if it speaks TLS.
    pub certificate: Option<CertificateReport>,
}

/// Since the start of the process.
#[derive(Serialize)]
pub struct WebhookReport {
    pub accepted: u64,
    pub duplicate: u64,
    /// By `code`.
    pub refused: BTreeMap<&'static str, u64>,
}

#[derive(Serialize)]
pub struct LastReport {
    pub accepted_at: Option<Timestamp>,
    pub confirmed_at: Option<Timestamp>,
    pub refused_at: Option<Timestamp>,
    pub refused_reason: Option<&'static str>,
}

/// Over the life of the spool. `accepted = confirmed + pending + parked + removed`.
#[derive(Serialize)]
pub struct SpoolReport {
    pub accepted: u64,
    pub confirmed: u64,
    pub pending: u64,
    pub parked: u64,
    pub removed: u64,
    /// Of the removed ones, those that could not be read any more after the file was damaged.
    pub lost: u64,
    pub duplicates: u64,
    pub bytes: u64,
    pub max_bytes: u64,
    pub writable: bool,
    /// Of the oldest pending event.
    pub oldest_age_seconds: Option<f64>,
}

#[derive(Serialize)]
pub struct BrokerReport {
    #[serde(flatten)]
    pub state: BrokerState,
    /// Published and not yet confirmed.
    pub in_flight: usize,
}

#[derive(Serialize)]
pub struct TypeReport {
    pub r#type: String,
    pub accepted: u64,
    pub last_seen: Option<Timestamp>,
}

#[derive(Serialize)]
pub struct SecretReport {
    /// 1 is the first in the list.
    pub position: usize,
    pub verified: u64,
    pub last_verified_at: Option<Timestamp>,
}

#[derive(Serialize)]
pub struct CertificateReport {
    pub expires_at: Timestamp,
    /// Whole days; negative if it has expired.
    pub days_left: i64,
}

/// One of `/api/events`.
#[derive(Serialize)]
pub struct EventReport {
    pub id: Uuid,
    pub r#type: Option<String>,
    pub subject: Option<String>,
    pub scan_id: Option<String>,
    pub prediction_id: Option<String>,
    pub state: Option<String>,
    pub accepted_at: Timestamp,
    pub status: EventState,
    /// When it was confirmed, if that is not too long ago to be known.
    pub settled_at: Option<Timestamp>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum EventState {
    Pending,
    Confirmed,
    Parked,
    /// An operator has taken it out.
    Removed,
    /// Not in the spool any more, and it is not remembered how it went.
    Gone,
}

/// `/api/parked`.
#[derive(Serialize)]
pub struct ParkedReport {
    pub total: u64,
    pub parked: Vec<ParkedEvent>,
}

#[derive(Serialize)]
pub struct ParkedEvent {
    pub id: Uuid,
    pub r#type: Option<String>,
    pub subject: Option<String>,
    pub accepted_at: Option<Timestamp>,
    pub reason: String,
    pub tried_at: Option<Timestamp>,
}

impl WebhookReport {
    pub fn new(counts: &Counts) -> Self {
        Self { accepted: counts.accepted, duplicate: counts.duplicates, refused: counts.refused.clone() }
    }
}

impl LastReport {
    pub fn new(counts: &Counts, confirmed_at: Option<Timestamp>) -> Self {
        Self {
            accepted_at: counts.last_accepted,
            confirmed_at,
            refused_at: counts.last_refused.map(|(at, _)| at),
            refused_reason: counts.last_refused.map(|(_, code)| code),
        }
    }
}

impl SpoolReport {
    pub fn new(ledger: &Ledger, lost: u64, max_bytes: u64, writable: bool, oldest_age_seconds: Option<f64>) -> Self {
        let Ledger { accepted, confirmed, pending, parked, removed, duplicates, bytes } = *ledger;
        Self {
            lost,
            accepted,
            confirmed,
            pending,
            parked,
            removed,
            duplicates,
            bytes,
            max_bytes,
            writable,
            oldest_age_seconds,
        }
    }
}

impl TypeReport {
    /// The most frequent ones first.
    pub fn list(counts: &Counts) -> Vec<Self> {
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
    pub fn list(counts: &Counts, secrets: usize) -> Vec<Self> {
        let report = |position: usize| {
            let tally = counts.verified.get(&position).copied().unwrap_or_default();
            Self { position: position + 1, verified: tally.count, last_verified_at: tally.last }
        };
        (0..secrets).map(report).collect()
    }
}

impl EventReport {
    pub fn new(arrival: &Arrival, status: EventState, settled_at: Option<Timestamp>) -> Self {
        let text = |text: &Option<Box<str>>| text.as_deref().map(str::to_owned);
        Self {
            id: arrival.id,
            r#type: text(&arrival.event_type),
            subject: subject(arrival.prediction_id.as_deref(), arrival.scan_id.as_deref()),
            scan_id: text(&arrival.scan_id),
            prediction_id: text(&arrival.prediction_id),
            state: text(&arrival.state),
            accepted_at: arrival.accepted_at,
            status,
            settled_at,
        }
    }
}

/// Whether the text is a part of what an operator may look for.
pub fn matches(arrival: &Arrival, find: &str) -> bool {
    let texts = [&arrival.event_type, &arrival.scan_id, &arrival.prediction_id];
    texts.into_iter().flatten().any(|text| text.contains(find)) || arrival.id.to_string().contains(find)
}

impl ParkedEvent {
    pub fn new(entry: Entry) -> Self {
        let event = entry.stored.event;
        let envelope = Envelope::parse(&event.body).ok();
        Self {
            id: event.id,
            r#type: envelope.as_ref().map(|envelope| envelope.event_type.clone().into_owned()),
            subject: envelope.as_ref().and_then(Envelope::subject),
            accepted_at: Timestamp::from_millisecond(event.accepted_ms).ok(),
            reason: entry.parked_reason.unwrap_or_default(),
            tried_at: entry.tried_ms.and_then(|tried| Timestamp::from_millisecond(tried).ok()),
        }
    }
}
