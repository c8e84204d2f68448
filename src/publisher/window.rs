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

use super::error::PublisherError;
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

/// What the session does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Waits for outcomes, or for the broker to accept publishes again.
    Wait,
    /// Reads pending events again before any of them is published.
    ReadAgain,
    RetryParked,
    Publish,
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
    /// The broker blocks publishers.
    blocked: bool,
    /// The end of the last alarm. Deadlines count from here at the earliest.
    unblocked_at: Option<Instant>,
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
            blocked: false,
            unblocked_at: None,
        }
    }
}

impl<T> Window<T> {
    /// How many publishes have no outcome.
    pub(super) fn in_flight(&self) -> usize {
        self.flights.len()
    }

    /// Whether every publish has its outcome and is settled.
    fn is_empty(&self) -> bool {
        self.is_complete() && self.held.is_empty()
    }

    /// Whether every publish has its outcome and every marker is out.
    fn is_complete(&self) -> bool {
        self.flights.is_empty() && self.markers == 0 && self.confirmed.is_empty()
    }

    /// What may be done now. `stale`: the events in memory may no longer be those of the spool. `retry_due`: parked
    /// events are due for a retry.
    pub(super) fn next(&self, stale: bool, retry_due: bool) -> Next {
        let is_open = !self.blocked && !self.nacked && self.returned.is_empty() && self.retrying == 0;
        match (stale, retry_due) {
            _ if !is_open => Next::Wait,
            (false, false) => Next::Publish,
            // Nothing more is published until the events in flight are settled.
            _ if !self.is_empty() => Next::Wait,
            (true, _) => Next::ReadAgain,
            (false, true) => Next::RetryParked,
        }
    }

    /// How the session ends, if it ends now. `draining`: it ends once nothing is left that could be delivered.
    pub(super) fn end(&self, draining: bool, nothing_pending: bool) -> Option<Result<(), PublisherError>> {
        if draining && (self.blocked || nothing_pending && self.is_empty()) {
            return Some(Ok(()));
        }
        (self.nacked && self.is_empty()).then_some(Err(PublisherError::Nacked))
    }

    /// The broker blocks publishers from `now` on, or accepts publishes.
    pub(super) fn set_blocked(&mut self, blocked: bool, now: Instant) {
        self.blocked = blocked;
        if !blocked {
            self.unblocked_at = Some(now);
        }
    }

    /// Fails if an outcome has taken longer than `limit`. A blocked broker keeps what it has and confirms it after the
    /// alarm: publishing it again over another connection would deliver it twice.
    pub(super) fn check_deadline(&self, limit: Duration, now: Instant) -> Result<(), PublisherError> {
        let oldest = self.flights.values().map(|flight| flight.published_at).min();
        let waits = |since: Instant| now.saturating_duration_since(since) > limit;
        match oldest {
            Some(oldest) if !self.blocked && waits(self.unblocked_at.map_or(oldest, |at| oldest.max(at))) => {
                Err(PublisherError::ConfirmTimeout(limit))
            }
            _ => Ok(()),
        }
    }

    pub(super) fn published(&mut self, flight: Flight<T>) {
        self.retrying += usize::from(flight.lane == Lane::Parked);
        self.flights.insert(flight.stored.seq, flight);
    }

    /// A return that came with some outcome, not necessarily with its own. Call it before the outcome.
    pub(super) fn returned(&mut self, id: Uuid, reason: String) {
        self.returned.insert(id, reason);
    }

    /// The outcome of a publish.
    pub(super) fn outcome(&mut self, seq: u64, verdict: Verdict, now_ms: i64) -> Option<Ended<T>> {
        let Flight { stored, lane, span, .. } = self.flights.remove(&seq)?;
        let subject = stored.event.subject;
        let released = if lane == Lane::Pending { stored.event.body.len() } else { 0 };
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
        Some(Ended { lane, released, nacked: span, after_nack: self.nacked })
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
    pub(super) fn take_flights(&mut self) -> Vec<Flight<T>> {
        std::mem::take(&mut self.flights).into_values().collect()
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
    /// The memory that it gives back to the backlog, which the body of a parked event never took.
    pub released: usize,
    /// Present if the broker nacked it.
    pub nacked: Option<T>,
    /// The broker nacked a pending event: this one, or one before.
    pub after_nack: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::publisher::tests::stored_with;

    const LIMIT: Duration = Duration::from_secs(30);

    /// A window with one event in flight.
    fn window(lane: Lane, published_at: Instant) -> Window<()> {
        let mut window = Window::default();
        window.published(Flight { stored: stored_with(1, None, "{}"), lane, published_at, span: () });
        window
    }

    fn blocked<T>(mut window: Window<T>, now: Instant) -> Window<T> {
        window.set_blocked(true, now);
        window
    }

    fn ended(mut window: Window<()>, verdict: Verdict) -> Window<()> {
        window.outcome(1, verdict, 0).expect("an event in flight");
        window
    }

    #[test]
    fn pending_events_are_read_again_and_parked_ones_retried_only_with_nothing_in_flight() {
        let now = Instant::now();
        let empty = || Window::<()>::default();
        let pending = || window(Lane::Pending, now);
        let returned = |mut window: Window<()>| {
            window.returned(Uuid::nil(), "no route".to_owned());
            window
        };
        // With nothing else to do; stale; a retry is due; both.
        for (name, window, expected) in [
            ("empty", empty(), [Next::Publish, Next::ReadAgain, Next::RetryParked, Next::ReadAgain]),
            ("a pending event", pending(), [Next::Publish, Next::Wait, Next::Wait, Next::Wait]),
            (
                "an unsettled event",
                ended(pending(), Verdict::Acked),
                [Next::Publish, Next::Wait, Next::Wait, Next::Wait],
            ),
            ("a parked event", window(Lane::Parked, now), [Next::Wait; 4]),
            (
                "a nacked parked event",
                ended(window(Lane::Parked, now), Verdict::Nacked),
                [Next::Publish, Next::ReadAgain, Next::RetryParked, Next::ReadAgain],
            ),
            ("a nacked pending event", ended(pending(), Verdict::Nacked), [Next::Wait; 4]),
            ("a return", returned(pending()), [Next::Wait; 4]),
            ("blocked", blocked(empty(), now), [Next::Wait; 4]),
        ] {
            let next = [(false, false), (true, false), (false, true), (true, true)]
                .map(|(stale, retry_due)| window.next(stale, retry_due));
            assert_eq!(next, expected, "{name}");
        }
    }

    #[test]
    fn a_session_ends_drained_or_after_a_nack_but_not_before_everything_in_flight_has_its_outcome() {
        let now = Instant::now();
        let empty = Window::<()>::default;
        let in_flight = || window(Lane::Pending, now);
        let two = |mut window: Window<()>| {
            window.published(Flight {
                stored: stored_with(2, None, "{}"),
                lane: Lane::Pending,
                published_at: now,
                span: (),
            });
            window
        };
        // Not draining; draining, with events pending; with none.
        for (name, window, expected) in [
            ("empty", empty(), [None, None, Some("drained")]),
            ("in flight", in_flight(), [None; 3]),
            ("blocked", blocked(in_flight(), now), [None, Some("drained"), Some("drained")]),
            ("nacked", ended(in_flight(), Verdict::Nacked), [Some("nacked"), Some("nacked"), Some("drained")]),
            ("nacked, another in flight", ended(two(in_flight()), Verdict::Nacked), [None; 3]),
        ] {
            let end = [(false, true), (true, false), (true, true)].map(|(draining, nothing_pending)| {
                window.end(draining, nothing_pending).map(|end| match end {
                    Ok(()) => "drained",
                    Err(PublisherError::Nacked) => "nacked",
                    Err(error) => panic!("{error}"),
                })
            });
            assert_eq!(end, expected, "{name}");
        }
    }

    #[test]
    fn a_deadline_counts_from_the_publish_or_the_end_of_an_alarm() {
        let start = Instant::now();
        let (tick, mut window) = (Duration::from_millis(1), window(Lane::Pending, start));
        let is_over = |window: &Window<()>, now| match window.check_deadline(LIMIT, now) {
            Ok(()) => false,
            Err(PublisherError::ConfirmTimeout(limit)) => limit == LIMIT,
            Err(error) => panic!("{error}"),
        };
        assert!(!is_over(&Window::default(), start + 2 * LIMIT));
        assert!(!is_over(&window, start + LIMIT) && is_over(&window, start + LIMIT + tick));
        window.set_blocked(true, start + tick);
        assert!(!is_over(&window, start + 2 * LIMIT), "a blocked broker confirms after the alarm");
        window.set_blocked(false, start + 3 * LIMIT);
        assert!(!is_over(&window, start + 4 * LIMIT) && is_over(&window, start + 4 * LIMIT + tick));
        // A publish after the alarm.
        let mut younger = Window::default();
        younger.set_blocked(false, start);
        younger.published(Flight {
            stored: stored_with(2, None, "{}"),
            lane: Lane::Pending,
            published_at: start + LIMIT,
            span: (),
        });
        assert!(!is_over(&younger, start + 2 * LIMIT) && is_over(&younger, start + 2 * LIMIT + tick));
    }

    #[test]
    fn every_outcome_after_the_nack_of_a_pending_event_shows_it() {
        for (first, lane, expected) in [
            (Verdict::Nacked, Lane::Pending, [true, true]),
            (Verdict::Nacked, Lane::Parked, [false, false]),
            (Verdict::Acked, Lane::Pending, [false, false]),
        ] {
            let now = Instant::now();
            let mut window = window(lane, now);
            window.published(Flight { stored: stored_with(2, None, "{}"), lane, published_at: now, span: () });
            let outcomes = [(1, first), (2, Verdict::Acked)];
            let after_nack = outcomes.map(|(seq, verdict)| window.outcome(seq, verdict, 0).unwrap().after_nack);
            assert_eq!(after_nack, expected, "{first:?} {lane:?}");
        }
    }

    #[test]
    fn only_a_pending_event_gives_back_memory() {
        for (lane, released) in [(Lane::Pending, 2), (Lane::Parked, 0)] {
            let ended = window(lane, Instant::now()).outcome(1, Verdict::Acked, 0).expect("an event in flight");
            assert_eq!(ended.released, released);
        }
    }
}
