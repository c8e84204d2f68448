//! Which events are parked, and what the spool and the log get of them. Pure.

use std::time::Instant;

use uuid::Uuid;

use super::parking_log::Cause;
use super::refusals::Refusals;
use super::window::{Flight, Lane, Settled};
use crate::event::Event;
use crate::spool::{Settlement, Stored};

/// Why an event is not published.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Reason {
    pub cause: Cause,
    pub text: String,
}

impl Reason {
    /// The reason not to publish an event, if there is one: it is damaged, or the broker would refuse it.
    pub(super) fn against(event: &Event, key: &str, refusals: &Refusals, now: Instant) -> Option<Self> {
        if !event.is_intact() {
            // Workers must not get a body that Prism did not sign.
            let text = "damaged: the body does not match its fingerprint".to_owned();
            return Some(Self { cause: Cause::Damaged, text });
        }
        refusals.reason(key, event.body.len(), now).map(Self::refused)
    }

    fn refused(reply: &str) -> Self {
        Self { cause: Cause::Refused, text: format!("refused: {reply}") }
    }
}

/// What is recorded and logged of events that were parked, or tried, together.
#[derive(Debug, Default)]
pub(super) struct Parking {
    /// For the spool.
    pub settlements: Vec<Settlement>,
    /// Newly parked events, for the log: one group for each cause.
    pub groups: Vec<Group>,
}

/// Events parked for one cause.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Group {
    pub cause: Cause,
    pub count: u64,
    pub example: Uuid,
    pub reason: String,
}

impl Parking {
    /// Events that were delivered or returned.
    pub(super) fn settled<T>(settled: &Settled<T>) -> Self {
        let mut parking = Self { settlements: settled.settlements(), groups: Vec::new() };
        for (event, reason) in settled.returned.iter().filter(|(event, _)| event.lane == Lane::Pending) {
            parking.add(Cause::Returned, event.id, reason);
        }
        parking
    }

    /// The events among `flights` over which the broker closed the channel with this reply.
    pub(super) fn refused<T>(flights: &[Flight<T>], culprits: &[u64], reply: &str) -> Self {
        let mut parking = Self::default();
        for Flight { stored, lane, .. } in flights.iter().filter(|flight| culprits.contains(&flight.stored.seq)) {
            let Reason { cause, text } = Reason::refused(reply);
            if *lane == Lane::Pending {
                parking.add(cause, stored.event.id, &text);
            }
            parking.settlements.push(Settlement::Parked { seq: stored.seq, reason: text });
        }
        parking
    }

    /// Publishes that the broker did not confirm in time. Nothing else is published during a retry of parked events, so
    /// the next one must not follow at once.
    pub(super) fn unconfirmed<T>(flights: &[Flight<T>]) -> Self {
        let retried = flights.iter().filter(|flight| flight.lane == Lane::Parked);
        let settlements = retried.map(|flight| Settlement::Tried(flight.stored.seq)).collect();
        Self { settlements, groups: Vec::new() }
    }

    /// An event that is not published. One that is parked already keeps the reason that the broker gave.
    pub(super) fn untried(&mut self, stored: &Stored, lane: Lane, Reason { cause, text }: Reason) {
        let seq = stored.seq;
        match lane {
            Lane::Pending => {
                self.add(cause, stored.event.id, &text);
                self.settlements.push(Settlement::Parked { seq, reason: text });
            }
            Lane::Parked => self.settlements.push(Settlement::Tried(seq)),
        }
    }

    fn add(&mut self, cause: Cause, example: Uuid, reason: &str) {
        match self.groups.iter_mut().find(|group| group.cause == cause) {
            Some(group) => group.count += 1,
            None => self.groups.push(Group { cause, count: 1, example, reason: reason.to_owned() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::publisher::refusals::Blame;
    use crate::publisher::tests::stored_with;
    use crate::publisher::window::Confirmed;

    fn flight(seq: u64, lane: Lane) -> Flight<()> {
        Flight { stored: stored_with(seq, None, "{}"), lane, published_at: Instant::now(), span: () }
    }

    fn id(seq: u64) -> Uuid {
        stored_with(seq, None, "{}").event.id
    }

    fn parked(seq: u64, reason: &str) -> Settlement {
        Settlement::Parked { seq, reason: reason.to_owned() }
    }

    fn group(cause: Cause, count: u64, example: u64, reason: &str) -> Group {
        Group { cause, count, example: id(example), reason: reason.to_owned() }
    }

    #[test]
    fn an_event_is_not_published_if_it_is_damaged_or_would_be_refused() {
        let (mut refusals, now) = (Refusals::default(), Instant::now());
        refusals.remember(&Blame::Key("a".to_owned()), "no a", Duration::from_secs(1), now);
        let mut event = stored_with(1, None, "{}").event;
        let cause = |event: &Event, key| Reason::against(event, key, &refusals, now);
        assert_eq!(cause(&event, "b"), None);
        let refused = Reason { cause: Cause::Refused, text: "refused: no a".to_owned() };
        assert_eq!(cause(&event, "a"), Some(refused));
        event.body = "[]".into();
        for key in ["a", "b"] {
            assert_eq!(cause(&event, key).map(|reason| reason.cause), Some(Cause::Damaged));
        }
    }

    #[test]
    fn what_is_not_published_is_parked_with_its_reason_unless_it_is_parked_already() {
        let mut parking = Parking::default();
        for (seq, lane, cause) in [
            (1, Lane::Pending, Cause::Refused),
            (2, Lane::Parked, Cause::Damaged),
            (3, Lane::Pending, Cause::Damaged),
            (4, Lane::Pending, Cause::Refused),
        ] {
            parking.untried(&stored_with(seq, None, "{}"), lane, Reason { cause, text: format!("{seq}") });
        }
        assert_eq!(parking.settlements, [parked(1, "1"), Settlement::Tried(2), parked(3, "3"), parked(4, "4")]);
        assert_eq!(parking.groups, [group(Cause::Refused, 2, 1, "1"), group(Cause::Damaged, 1, 3, "3")]);
    }

    #[test]
    fn of_the_events_in_flight_only_the_culprits_are_parked_and_only_newly_parked_ones_are_logged() {
        let flights = [flight(1, Lane::Pending), flight(2, Lane::Pending), flight(3, Lane::Parked)];
        let parking = Parking::refused(&flights, &[2, 3], "why");
        assert_eq!(parking.settlements, [parked(2, "refused: why"), parked(3, "refused: why")]);
        assert_eq!(parking.groups, [group(Cause::Refused, 1, 2, "refused: why")]);
    }

    #[test]
    fn a_parked_event_that_is_not_confirmed_waits_for_its_next_retry() {
        let parking = Parking::unconfirmed(&[flight(1, Lane::Pending), flight(2, Lane::Parked)]);
        assert_eq!((parking.settlements, parking.groups.len()), (vec![Settlement::Tried(2)], 0));
    }

    #[test]
    fn returned_events_are_logged_unless_they_were_parked_before() {
        let event = |seq, lane| Confirmed { seq, id: id(seq), subject: None, lane, lag: Duration::ZERO, span: () };
        let settled = Settled {
            delivered: vec![event(1, Lane::Pending)],
            returned: vec![(event(2, Lane::Parked), "no".to_owned()), (event(3, Lane::Pending), "no".to_owned())],
            ..Settled::default()
        };
        let parking = Parking::settled(&settled);
        assert_eq!(parking.settlements, [Settlement::Confirmed(1), parked(2, "no"), parked(3, "no")]);
        assert_eq!(parking.groups, [group(Cause::Returned, 1, 3, "no")]);
    }
}
