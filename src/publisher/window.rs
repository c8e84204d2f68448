//! The events in flight, and what becomes of them. Pure: knows neither lapin nor a clock.
//!
//! Two rules keep promise 3, "leaves only when delivered":
//!
//! 1. A confirmed event is settled only when no return of it can follow. The broker sends a return before the event's
//!    own confirm, but lapin attaches the return to whichever confirm completes next. So when an event's confirm
//!    completes, either its return was attached to an earlier confirm, or this confirm carries some return. Completions
//!    reach the session in the order in which they happen. A marker is queued behind each batch of confirmed events:
//!    when the marker comes out, all earlier completions have been seen, and with them any return of the batch.
//! 2. After a return nothing is published or settled until every publish in flight has its outcome. By then lapin has
//!    handed out every return.
//!
//! One rule keeps promise 6, the order of a subject's events: an event is delivered or parked only here, and
//! [`super::backlog::Backlog`] lets the next event of its subject go only after that.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use uuid::Uuid;

use crate::event::SubjectKey;
use crate::spool::{Settlement, Stored};

/// Why an event was published.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lane {
    /// It is pending.
    Pending,
    /// It is parked and was due for a retry. Parked events are published with no pending one in flight, because they
    /// may close the channel.
    Parked,
}

/// An event without an outcome. `T` is what the session keeps with it.
#[derive(Debug)]
pub(super) struct Flight<T> {
    pub stored: Stored,
    pub lane: Lane,
    pub published_at: Instant,
    pub span: T,
}

/// An event that the broker confirmed. The broker may have returned it as well.
#[derive(Debug)]
pub(super) struct Confirmed<T> {
    pub seq: u64,
    pub id: Uuid,
    pub subject: Option<SubjectKey>,
    pub lane: Lane,
    /// Time from acceptance to the confirm.
    pub lag: Duration,
    pub span: T,
}

/// What the broker said about a publish.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Acked,
    Nacked,
}

/// Events whose fate is final.
#[derive(Debug)]
pub(super) struct Settled<T> {
    /// A queue has them.
    pub delivered: Vec<Confirmed<T>>,
    /// No queue takes them, for this reason.
    pub returned: Vec<(Confirmed<T>, String)>,
    /// Ids of returned messages of which no confirm came: they are published again.
    pub unconfirmed_returns: Vec<Uuid>,
}

impl<T> Default for Settled<T> {
    fn default() -> Self {
        Self { delivered: Vec::new(), returned: Vec::new(), unconfirmed_returns: Vec::new() }
    }
}

impl<T> Settled<T> {
    pub(super) fn is_empty(&self) -> bool {
        self.delivered.is_empty() && self.returned.is_empty() && self.unconfirmed_returns.is_empty()
    }

    /// What the spool has to record.
    pub(super) fn settlements(&self) -> Vec<Settlement> {
        let delivered = self.delivered.iter().map(|event| Settlement::Confirmed(event.seq));
        let parked =
            |(event, reason): &(Confirmed<T>, String)| Settlement::Parked { seq: event.seq, reason: reason.clone() };
        delivered.chain(self.returned.iter().map(parked)).collect()
    }
}

/// The publishes of one channel.
#[derive(Debug)]
pub(super) struct Window<T> {
    /// Publishes without an outcome, by sequence number.
    flights: BTreeMap<u64, Flight<T>>,
    /// Events confirmed since the last marker.
    confirmed: Vec<Confirmed<T>>,
    /// Markers that have not come out yet.
    markers: usize,
    /// Confirmed events past their marker, held back because of a return.
    held: Vec<Confirmed<T>>,
    /// Returned messages and the broker's reason, until the events are parked.
    returned: HashMap<Uuid, String>,
    /// Parked events that are being retried.
    retrying: usize,
    /// The broker nacked a pending event: nothing is published until the session ends.
    nacked: bool,
}

impl<T> Default for Window<T> {
    fn default() -> Self {
        Self {
            flights: BTreeMap::new(),
            confirmed: Vec::new(),
            markers: 0,
            held: Vec::new(),
            returned: HashMap::new(),
            retrying: 0,
            nacked: false,
        }
    }
}

impl<T> Window<T> {
    /// How many publishes have no outcome.
    pub(super) fn in_flight(&self) -> usize {
        self.flights.len()
    }

    /// Whether every publish has its outcome and is settled.
    pub(super) fn is_empty(&self) -> bool {
        self.is_complete() && self.held.is_empty()
    }

    /// Whether every publish has its outcome and every marker is out.
    fn is_complete(&self) -> bool {
        self.flights.is_empty() && self.markers == 0 && self.confirmed.is_empty()
    }

    /// Whether a pending event may be published: no event was returned or nacked, and no parked event is retried.
    pub(super) fn is_open(&self) -> bool {
        !self.nacked && self.returned.is_empty() && self.retrying == 0
    }

    /// Whether the broker nacked a pending event. The session ends when the window is empty.
    pub(super) fn is_nacked(&self) -> bool {
        self.nacked
    }

    /// When the publish that waits longest was published.
    pub(super) fn oldest(&self) -> Option<Instant> {
        self.flights.values().map(|flight| flight.published_at).min()
    }

    pub(super) fn published(&mut self, flight: Flight<T>) {
        self.retrying += usize::from(flight.lane == Lane::Parked);
        self.flights.insert(flight.stored.seq, flight);
    }

    /// A return that came with some outcome, not necessarily with its own. Call it before the outcome.
    pub(super) fn returned(&mut self, id: Uuid, reason: String) {
        self.returned.insert(id, reason);
    }

    /// The outcome of a publish. Gives the event back; the caller drops its body.
    pub(super) fn outcome(&mut self, seq: u64, verdict: Verdict, now_ms: i64) -> Option<Ended<T>> {
        let Flight { stored, lane, span, .. } = self.flights.remove(&seq)?;
        let (subject, body_bytes) = (stored.event.subject, stored.event.body.len());
        let span = match verdict {
            Verdict::Acked => {
                // Zero if the clock was set back.
                let lag = Duration::from_millis(u64::try_from(now_ms - stored.event.accepted_ms).unwrap_or(0));
                self.confirmed.push(Confirmed { seq, id: stored.event.id, subject, lane, lag, span });
                None
            }
            Verdict::Nacked => {
                match lane {
                    // The next session starts again from the oldest pending event.
                    Lane::Pending => self.nacked = true,
                    // A parked event just stays parked.
                    Lane::Parked => self.retrying -= 1,
                }
                Some(span)
            }
        };
        Some(Ended { lane, body_bytes, nacked: span })
    }

    /// The events confirmed since the last call, for a marker to be queued behind all completions so far.
    pub(super) fn take_batch(&mut self) -> Option<Vec<Confirmed<T>>> {
        if self.confirmed.is_empty() {
            return None;
        }
        self.markers += 1;
        Some(std::mem::take(&mut self.confirmed))
    }

    /// The marker of this batch came out.
    pub(super) fn marker(&mut self, batch: Vec<Confirmed<T>>) {
        self.markers -= 1;
        self.held.extend(batch);
    }

    /// The events whose fate is final by now.
    pub(super) fn settle(&mut self) -> Settled<T> {
        if self.returned.is_empty() {
            // Rule 1: their markers are out.
            let delivered = std::mem::take(&mut self.held);
            self.count_retried(&delivered);
            return Settled { delivered, ..Settled::default() };
        }
        // Rule 2.
        if self.is_complete() { self.settle_held() } else { Settled::default() }
    }

    /// The channel is gone. `complete`: every publish has an outcome or failed. Returns what can be settled; the next
    /// session publishes the rest again.
    pub(super) fn wind_up(&mut self, complete: bool) -> Settled<T> {
        // While a publish has no outcome, lapin may still hold a return. Twice is better than never.
        if !complete || !(self.returned.is_empty() || self.flights.is_empty()) {
            return Settled::default();
        }
        let mut confirmed = std::mem::take(&mut self.confirmed);
        self.held.append(&mut confirmed);
        self.settle_held()
    }

    /// The events whose publish has no outcome, in the order of acceptance.
    pub(super) fn into_flights(self) -> impl Iterator<Item = Flight<T>> {
        self.flights.into_values()
    }

    fn settle_held(&mut self) -> Settled<T> {
        let held = std::mem::take(&mut self.held);
        self.count_retried(&held);
        let mut settled = Settled::default();
        for event in held {
            match self.returned.remove(&event.id) {
                Some(reason) => settled.returned.push((event, reason)),
                None => settled.delivered.push(event),
            }
        }
        settled.unconfirmed_returns = self.returned.drain().map(|(id, _)| id).collect();
        settled
    }

    fn count_retried(&mut self, settled: &[Confirmed<T>]) {
        if self.retrying > 0 {
            self.retrying -= settled.iter().filter(|event| event.lane == Lane::Parked).count();
        }
    }
}

/// A publish that has an outcome.
#[derive(Debug)]
pub(super) struct Ended<T> {
    pub lane: Lane,
    pub body_bytes: usize,
    /// Present if the broker nacked it.
    pub nacked: Option<T>,
}
