//! When to log that a backlog does not move, and that it is over. Pure.
//!
//! A backlog does not move while the oldest pending event stays the same, whatever becomes of younger ones. If events
//! wait behind a parked one, the oldest may be one of them: then it moves as well when any event is confirmed.

use std::time::{Duration, Instant};

use super::status::{BrokerState, WatchState};

/// How long the oldest event waits until the first line.
const FIRST_AFTER: Duration = Duration::from_secs(60);
/// How long after a line the next one follows.
const AGAIN_AFTER: Duration = Duration::from_secs(600);

/// What is known about the backlog at an instant.
#[derive(Clone, Copy, Debug)]
pub(super) struct Backlog {
    /// When the oldest pending event was accepted, in milliseconds since 1970; `None` if nothing is pending.
    pub oldest_ms: Option<i64>,
    /// Whether events wait behind a parked one: the oldest may be one of them.
    pub some_wait: bool,
    /// Events ever confirmed.
    pub confirmed: u64,
    /// The wall clock, in milliseconds since 1970.
    pub now_ms: i64,
}

/// A line to log.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Line {
    /// The backlog has not moved for this long.
    Still(Duration),
    /// The backlog of an outage that was logged is delivered.
    Over { lasted: Duration, events: u64, took: Duration },
}

/// Watches the backlog.
#[derive(Debug, Default)]
pub(super) struct Stall {
    /// The oldest pending event, and since when it is the oldest one.
    oldest: Option<(i64, Instant)>,
    logged_at: Option<Instant>,
    /// The confirmed events at the last look.
    confirmed: u64,
    catching_up: Option<CatchingUp>,
}

/// Deliveries go on after an outage that was logged.
#[derive(Clone, Copy, Debug)]
struct CatchingUp {
    lasted: Duration,
    since: Instant,
    since_ms: i64,
    /// The confirmed events at the end of the outage.
    confirmed: u64,
}

impl Stall {
    /// To be called every second or so.
    pub(super) fn look(&mut self, backlog: Backlog, now: Instant) -> Option<Line> {
        let confirmed = std::mem::replace(&mut self.confirmed, backlog.confirmed);
        let waited = |since| now.saturating_duration_since(since);
        if let (Some((oldest, since)), Some(now_oldest)) = (self.oldest, backlog.oldest_ms)
            && oldest == now_oldest
            && !(backlog.some_wait && confirmed != backlog.confirmed)
        {
            let due = match self.logged_at {
                Some(at) => waited(at) >= AGAIN_AFTER,
                None => waited(since) >= FIRST_AFTER,
            };
            if due {
                self.logged_at = Some(now);
                self.catching_up = None;
            }
            return due.then(|| Line::Still(waited(since)));
        }
        if let (Some((_, began)), Some(_)) = (self.oldest, self.logged_at.take()) {
            let (lasted, since_ms) = (waited(began), backlog.now_ms);
            self.catching_up = Some(CatchingUp { lasted, since: now, since_ms, confirmed });
        }
        self.oldest = backlog.oldest_ms.map(|oldest| (oldest, now));
        let over = |catching_up: &CatchingUp| backlog.oldest_ms.is_none_or(|oldest| oldest >= catching_up.since_ms);
        let CatchingUp { lasted, since, confirmed, .. } = self.catching_up.take_if(|catching_up| over(catching_up))?;
        Some(Line::Over { lasted, events: backlog.confirmed.saturating_sub(confirmed), took: waited(since) })
    }
}

/// Why the backlog does not move.
pub(super) fn reason(broker: &BrokerState, watch: &WatchState) -> String {
    let troubled = |queue: &super::status::QueueState| {
        queue.trouble.as_ref().map(|trouble| format!("the queue {} {}", queue.name, trouble.text))
    };
    let troubles: Vec<_> = watch.queues.iter().filter_map(troubled).collect();
    match (&broker.blocked, &broker.error) {
        (Some(reason), _) => format!("the broker blocks publishers: {reason}"),
        (None, _) if !troubles.is_empty() => troubles.join("; "),
        (None, Some(error)) => error.clone(),
        (None, None) => "the broker does not confirm publishes".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::super::status::{QueueState, QueueTrouble};
    use super::*;
    use crate::topology::{QueueRole, TroubleKind};

    /// Looks at these seconds, with the oldest pending event and the confirmed events at each.
    fn lines(looks: &[(u64, Option<i64>, u64)]) -> Vec<(u64, Line)> {
        lines_if(false, looks)
    }

    fn lines_if(some_wait: bool, looks: &[(u64, Option<i64>, u64)]) -> Vec<(u64, Line)> {
        let (mut stall, start) = (Stall::default(), Instant::now());
        let look = |&(second, oldest_s, confirmed): &(u64, Option<i64>, u64)| {
            let oldest_ms = oldest_s.map(|s| s * 1000);
            let backlog = Backlog { oldest_ms, some_wait, confirmed, now_ms: second.cast_signed() * 1000 };
            stall.look(backlog, start + Duration::from_secs(second)).map(|line| (second, line))
        };
        looks.iter().filter_map(look).collect()
    }

    fn still(second: u64, waited: u64) -> (u64, Line) {
        (second, Line::Still(Duration::from_secs(waited)))
    }

    fn over(second: u64, lasted: u64, events: u64, took: u64) -> (u64, Line) {
        let [lasted, took] = [lasted, took].map(Duration::from_secs);
        (second, Line::Over { lasted, events, took })
    }

    #[test]
    fn behind_a_parked_event_the_oldest_one_may_stay_while_the_others_are_delivered() {
        let flowing: Vec<_> = (0..200).map(|second| (second, Some(0), second)).collect();
        assert_eq!(lines_if(true, &flowing), []);
        assert_eq!(lines_if(false, &flowing), [still(60, 60)]);
        let stopped: Vec<_> = (0..200).map(|second| (second, Some(0), second.min(50))).collect();
        assert_eq!(lines_if(true, &stopped), [still(110, 60)]);
    }

    #[test]
    fn a_backlog_that_does_not_move_is_logged_after_a_minute_and_then_every_ten() {
        let looks: Vec<_> = (0..1900).map(|second| (second, Some(0), 0)).collect();
        assert_eq!(lines(&looks), [still(60, 60), still(660, 660), still(1260, 1260), still(1860, 1860)]);
    }

    #[test]
    fn a_backlog_that_moves_is_never_logged() {
        let moving: Vec<_> = (0..1000u64).map(|second| (second, Some(second.cast_signed() / 59), second)).collect();
        assert_eq!(lines(&moving), []);
        let empty: Vec<_> = (0..1000).map(|second| (second, None, 0)).collect();
        assert_eq!(lines(&empty), []);
        // Deliveries of others do not count.
        let one_stuck: Vec<_> = (0..100).map(|second| (second, Some(0), second)).collect();
        assert_eq!(lines(&one_stuck), [still(60, 60)]);
    }

    #[test]
    fn the_end_of_an_outage_is_logged_once_when_its_backlog_is_delivered() {
        for (looks, expected) in [
            // Not logged, so its end is not either.
            (vec![(0, Some(0), 7), (50, Some(0), 7), (51, None, 9)], vec![]),
            // Delivered at once.
            (vec![(0, Some(0), 7), (61, Some(0), 7), (62, None, 107)], vec![still(61, 61), over(62, 62, 100, 0)]),
            // Over when the oldest event is younger than the first delivery, whether or not more come in.
            (
                vec![(0, Some(0), 7), (61, Some(0), 7), (62, Some(3), 10), (63, Some(40), 50), (64, Some(63), 90)],
                vec![still(61, 61), over(64, 62, 83, 2)],
            ),
            // It stops again on the way.
            (
                vec![(0, Some(0), 0), (61, Some(0), 0), (62, Some(3), 5), (122, Some(3), 5), (130, None, 9)],
                vec![still(61, 61), still(122, 60), over(130, 68, 4, 0)],
            ),
        ] {
            assert_eq!(lines(&looks), expected, "{looks:?}");
        }
    }

    #[test]
    fn the_reason_is_the_most_precise_one() {
        let broker = |blocked: Option<&str>, error: Option<&str>| BrokerState {
            connected: error.is_none(),
            blocked: blocked.map(str::to_owned),
            url: None,
            error: error.map(str::to_owned),
            unreachable: false,
            since: Timestamp::UNIX_EPOCH,
            connects: 1,
        };
        let queue = |trouble: Option<&str>| QueueState {
            name: "q".to_owned(),
            role: QueueRole::Work,
            messages: None,
            consumers: None,
            trouble: trouble.map(|text| QueueTrouble {
                kind: TroubleKind::Down,
                text: text.to_owned(),
                remedy: String::new(),
            }),
        };
        for (blocked, error, trouble, expected) in [
            (None, None, None, "the broker does not confirm publishes"),
            (None, Some("cannot reach it"), None, "cannot reach it"),
            (None, Some("nack"), Some("is down"), "the queue q is down"),
            (Some("low on memory"), None, Some("is down"), "the broker blocks publishers: low on memory"),
        ] {
            let watch = WatchState { queues: vec![queue(trouble)], ..WatchState::default() };
            assert_eq!(reason(&broker(blocked, error), &watch), expected);
        }
    }
}
