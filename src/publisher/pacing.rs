//! How many events may be in flight, and which event is to blame for a closed channel. Pure; outlives a session.
//!
//! - When the broker closes the channel over one of many messages, events are published one by one until the culprit
//!   is known.
//! - After a nack the queues with room would get every event of the window twice, so the window restarts at one event
//!   and grows with each confirm.

use std::time::{Duration, Instant};

/// An event that closed the channel this often, each time alone in flight, is the culprit. Twice, because a channel may
/// also close for another reason.
const STRIKES: u32 = 2;

#[derive(Debug)]
pub(super) struct Pacing {
    /// How many events may be in flight; limits the configured window after a nack.
    limit: usize,
    /// Events up to this one are published one by one.
    one_by_one_until: u64,
    suspect: Option<Suspect>,
    /// When the last round of retries of parked events ended.
    parked_tried_at: Option<Instant>,
}

/// The event that was alone in flight when the channel was closed.
#[derive(Clone, Copy, Debug)]
struct Suspect {
    seq: u64,
    strikes: u32,
}

/// Which event the broker refused.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// The broker refused one of several events: from now on they are published one by one.
    OneOfMany,
    /// The broker refused the only event in flight, for the first time: it gets another try.
    Suspect,
    /// The event that closed the channel repeatedly.
    Culprit(u64),
}

impl Default for Pacing {
    fn default() -> Self {
        Self { limit: usize::MAX, one_by_one_until: 0, suspect: None, parked_tried_at: None }
    }
}

impl Pacing {
    /// How many events may be in flight once this one is published, given the configured `window`.
    pub(super) fn window(&self, seq: u64, window: usize) -> usize {
        if seq <= self.one_by_one_until { 1 } else { window.min(self.limit) }
    }

    /// The broker closed the channel over one of these events, in ascending order.
    pub(super) fn on_refusal(&mut self, in_flight: &[u64]) -> Refusal {
        let last = in_flight.last().copied().unwrap_or_default();
        self.one_by_one_until = self.one_by_one_until.max(last);
        let &[seq] = in_flight else { return Refusal::OneOfMany };
        let strikes = match self.suspect {
            Some(suspect) if suspect.seq == seq => suspect.strikes + 1,
            _ => 1,
        };
        if strikes < STRIKES {
            self.suspect = Some(Suspect { seq, strikes });
            return Refusal::Suspect;
        }
        self.suspect = None;
        Refusal::Culprit(seq)
    }

    pub(super) fn on_nack(&mut self) {
        self.limit = 1;
    }

    pub(super) fn on_confirm(&mut self) {
        self.limit = self.limit.saturating_add(1);
    }

    pub(super) fn is_parked_retry_due(&self, interval: Duration, now: Instant) -> bool {
        self.parked_tried_at.is_none_or(|at| now.saturating_duration_since(at) >= interval)
    }

    /// The round of retries of parked events is over. A parked event that closes the channel also ends it.
    pub(super) fn on_parked_tried(&mut self, now: Instant) {
        self.parked_tried_at = Some(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_culprit_among_many_is_found_by_publishing_one_by_one() {
        let mut pacing = Pacing::default();
        assert_eq!(pacing.window(5, 1000), 1000);
        assert_eq!(pacing.on_refusal(&[5, 7, 9]), Refusal::OneOfMany);
        assert_eq!((pacing.window(9, 1000), pacing.window(10, 1000)), (1, 1000));
        assert_eq!(pacing.on_refusal(&[7]), Refusal::Suspect);
        assert_eq!(pacing.on_refusal(&[7]), Refusal::Culprit(7));
        assert_eq!(pacing.on_refusal(&[8]), Refusal::Suspect, "the next event starts with no strikes");
        assert_eq!((pacing.window(9, 1000), pacing.window(10, 1000)), (1, 1000));
    }

    #[test]
    fn after_a_nack_the_window_opens_with_each_confirm() {
        let mut pacing = Pacing::default();
        pacing.on_confirm();
        assert_eq!(pacing.window(1, 1000), 1000);
        pacing.on_nack();
        assert_eq!(pacing.window(1, 1000), 1);
        pacing.on_confirm();
        pacing.on_confirm();
        assert_eq!((pacing.window(1, 1000), pacing.window(1, 2)), (3, 2));
    }

    #[test]
    fn a_single_refusal_is_no_proof() {
        let mut pacing = Pacing::default();
        assert_eq!(pacing.on_refusal(&[3]), Refusal::Suspect);
        assert_eq!(pacing.on_refusal(&[4]), Refusal::Suspect);
        assert_eq!(pacing.on_refusal(&[3]), Refusal::Suspect);
        assert_eq!(pacing.on_refusal(&[]), Refusal::OneOfMany);
    }

    #[test]
    fn parked_events_are_retried_at_once_and_then_at_the_interval() {
        let (mut pacing, start, interval) = (Pacing::default(), Instant::now(), Duration::from_secs(60));
        assert!(pacing.is_parked_retry_due(interval, start));
        pacing.on_parked_tried(start);
        assert!(!pacing.is_parked_retry_due(interval, start + interval / 2));
        assert!(pacing.is_parked_retry_due(interval, start + interval));
    }
}
