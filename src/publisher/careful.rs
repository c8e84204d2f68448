//! Finding the culprit: when the broker closes the channel over one of many messages, events are published one by one
//! until it is known which. And after a nack: what is then published once more, the queues that are not full have already, so
//! it is tried with one event, and with more as they are confirmed. Pure; outlives a session.

use std::time::{Duration, Instant};

/// An event that has closed the channel this often, alone each time, is to blame for it.
const STRIKES: u32 = 2;

#[derive(Debug)]
pub(super) struct Careful {
    /// How many events may be in flight, after a nack.
    limit: usize,
    /// The last event that may be the culprit.
    until: u64,
    /// The event that was alone in flight when the channel was closed, and how often.
    suspect: Option<(u64, u32)>,
    /// When parked events were last tried. One that takes the channel down again ends the round.
    parked_tried_at: Option<Instant>,
}

/// What the end of a channel has taught.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Lesson {
    /// One of several: from now on one by one.
    OneOfMany,
    /// This one, perhaps: once more.
    Suspect,
    /// This one.
    Culprit(u64),
}

impl Default for Careful {
    fn default() -> Self {
        Self { limit: usize::MAX, until: 0, suspect: None, parked_tried_at: None }
    }
}

impl Careful {
    /// How many events may be in flight together with this one.
    pub fn window(&self, seq: u64, window: usize) -> usize {
        if seq <= self.until { 1 } else { window.min(self.limit) }
    }

    /// The broker has refused a message while `alone`, or, if that is `None`, several up to `last` were in flight.
    pub fn refused(&mut self, alone: Option<u64>, last: Option<u64>) -> Lesson {
        let Some(seq) = alone else {
            self.until = last.unwrap_or(self.until);
            return Lesson::OneOfMany;
        };
        let strikes = match self.suspect {
            Some((suspect, strikes)) if suspect == seq => strikes + 1,
            _ => 1,
        };
        self.until = self.until.max(seq);
        if strikes < STRIKES {
            self.suspect = Some((seq, strikes));
            return Lesson::Suspect;
        }
        self.suspect = None;
        Lesson::Culprit(seq)
    }

    /// The broker has rejected an event: a queue is full.
    pub fn nacked(&mut self) {
        self.limit = 1;
    }

    /// It has taken one.
    pub fn confirmed(&mut self) {
        self.limit = self.limit.saturating_add(1);
    }

    /// Whether it is time to try the parked events once more.
    pub fn parked_are_due(&self, retry: Duration) -> bool {
        self.parked_tried_at.is_none_or(|at| at.elapsed() >= retry)
    }

    /// The round of tries is over.
    pub fn parked_were_tried(&mut self, now: Instant) {
        self.parked_tried_at = Some(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_culprit_among_many_is_found_by_going_one_by_one() {
        let mut careful = Careful::default();
        assert_eq!(careful.window(5, 1000), 1000);
        assert_eq!(careful.refused(None, Some(9)), Lesson::OneOfMany);
        assert_eq!((careful.window(9, 1000), careful.window(10, 1000)), (1, 1000));
        assert_eq!(careful.refused(Some(7), Some(7)), Lesson::Suspect);
        assert_eq!(careful.refused(Some(7), Some(7)), Lesson::Culprit(7));
        assert_eq!(careful.refused(Some(8), Some(8)), Lesson::Suspect, "another one starts anew");
    }

    #[test]
    fn after_a_nack_the_window_opens_with_each_confirm() {
        let mut careful = Careful::default();
        careful.confirmed();
        assert_eq!(careful.window(1, 1000), 1000);
        careful.nacked();
        assert_eq!(careful.window(1, 1000), 1);
        careful.confirmed();
        careful.confirmed();
        assert_eq!((careful.window(1, 1000), careful.window(1, 2)), (3, 2));
    }

    #[test]
    fn a_single_refusal_blames_nobody() {
        let mut careful = Careful::default();
        assert_eq!(careful.refused(Some(3), Some(3)), Lesson::Suspect);
        assert_eq!(careful.refused(Some(4), Some(4)), Lesson::Suspect);
        assert_eq!(careful.refused(Some(3), Some(3)), Lesson::Suspect);
    }
}
