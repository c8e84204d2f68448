//! Decides when a notice is due: when the level of the headline, or the answer that it is about, has changed and stayed
//! so for a minute. Pure; takes `now`.

use std::time::{Duration, Instant};

use super::answers::Level;

/// How long a state must stay before a notice reports it.
const STEADY: Duration = Duration::from_secs(60);

/// What the last notice reported, which is also what receivers believe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Told {
    pub level: Level,
    /// The answer that the headline was about. With [`Level::Ok`]: the one that is well again.
    pub answer: Option<String>,
}

/// A notice to send.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Due {
    pub told: Told,
    /// When the state began.
    pub since: Instant,
}

/// What was reported, and what was seen since when.
pub(super) struct Policy {
    told: Told,
    /// Whether the headline is at least a warning.
    warning: Seen<bool>,
    /// Whether the headline is a problem.
    problem: Seen<bool>,
    /// The answer that the headline is about, while it is at least a warning.
    answer: Seen<Option<String>>,
}

/// The latest value, and since when it has been the same.
struct Seen<T> {
    value: T,
    since: Instant,
}

impl Policy {
    /// `told`: what the last notice before the start of this process reported.
    pub(super) fn new(told: Told, now: Instant) -> Self {
        let seen = |value| Seen { value, since: now };
        Self { told, warning: seen(false), problem: seen(false), answer: Seen { value: None, since: now } }
    }

    /// Takes what the headline says now. A note counts as well, as everywhere.
    ///
    /// Each threshold has a minute of its own. So a level that alternates between warning and problem is reported as a
    /// warning, instead of never.
    pub(super) fn see(&mut self, level: Level, answer: Option<&str>, now: Instant) -> Option<Due> {
        let level = if level == Level::Note { Level::Ok } else { level };
        self.warning.see(level >= Level::Warning, now);
        self.problem.see(level >= Level::Problem, now);
        self.answer.see(answer.filter(|_| level > Level::Ok).map(str::to_owned), now);
        let since = match (level, self.told.level) {
            (Level::Ok | Level::Note, Level::Ok | Level::Note) => return None,
            (Level::Ok | Level::Note, _) => self.warning.steady(now)?,
            (Level::Warning, Level::Ok | Level::Note) => self.warning.steady(now)?,
            (Level::Warning, Level::Problem) | (Level::Problem, Level::Ok | Level::Note | Level::Warning) => {
                self.problem.steady(now)?
            }
            (Level::Warning, Level::Warning) | (Level::Problem, Level::Problem) => {
                self.answer.steady(now).filter(|_| self.answer.value != self.told.answer)?
            }
        };
        let answer = if level == Level::Ok { self.told.answer.take() } else { self.answer.value.clone() };
        self.told = Told { level, answer };
        Some(Due { told: self.told.clone(), since })
    }
}

impl<T: PartialEq> Seen<T> {
    fn see(&mut self, value: T, now: Instant) {
        if value != self.value {
            *self = Self { value, since: now };
        }
    }

    /// Since when the value has been the same, if it has stayed so for long enough.
    fn steady(&self, now: Instant) -> Option<Instant> {
        (now.saturating_duration_since(self.since) >= STEADY).then_some(self.since)
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::{Strategy, any, prop_assert, prop_assert_eq, proptest};

    use super::*;

    const LEVELS: [Level; 4] = [Level::Ok, Level::Note, Level::Warning, Level::Problem];
    const ANSWERS: [&str; 2] = ["broker", "workers"];

    fn well() -> Told {
        Told { level: Level::Ok, answer: None }
    }

    /// The notices, each with the second in which it is due, of states that begin in these seconds. Looks every 5 s.
    fn notices(states: &[(u64, Level, &'static str)], seconds: u64) -> Vec<(u64, Level, String, u64)> {
        let start = Instant::now();
        let mut policy = Policy::new(well(), start);
        let mut found = Vec::new();
        for second in (0..seconds).step_by(5) {
            let Some((_, level, answer)) = states.iter().rev().find(|(from, ..)| *from <= second) else { continue };
            if let Some(due) = policy.see(*level, Some(answer), start + Duration::from_secs(second)) {
                let since = due.since.duration_since(start).as_secs();
                found.push((second, due.told.level, due.told.answer.unwrap_or_default(), since));
            }
        }
        found
    }

    #[test]
    fn a_problem_that_stays_for_a_minute_is_reported_once_and_so_is_its_end() {
        use Level::{Note, Ok, Problem, Warning};
        let broker = |second, level, since| (second, level, "broker".to_owned(), since);
        let workers = |second, level, since| (second, level, "workers".to_owned(), since);
        let outage = [(0, Ok, "broker"), (10, Problem, "broker"), (300, Note, "lag")];
        assert_eq!(notices(&outage, 1000), [broker(70, Problem, 10), broker(360, Ok, 300)]);
        let blip = [(0, Ok, "broker"), (10, Problem, "broker"), (65, Ok, "broker")];
        assert_eq!(notices(&blip, 1000), [], "over within a minute");
        let growing = [(0, Warning, "broker"), (30, Problem, "broker"), (200, Warning, "lag"), (400, Ok, "lag")];
        let lag = |second, level, since| (second, level, "lag".to_owned(), since);
        let expected = [broker(90, Problem, 30), lag(260, Warning, 200), lag(460, Ok, 400)];
        assert_eq!(notices(&growing, 1000), expected);
        let another =
            [(0, Problem, "broker"), (100, Problem, "workers"), (130, Problem, "broker"), (200, Problem, "workers")];
        assert_eq!(notices(&another, 1000), [broker(60, Problem, 0), workers(260, Problem, 200)]);
        let alternating: Vec<_> =
            (0..20).map(|number| (number * 30, if number % 2 == 0 { Problem } else { Warning }, "broker")).collect();
        assert_eq!(notices(&alternating, 600), [broker(90, Warning, 0)], "never both for a minute, but never well");
    }

    #[test]
    fn after_a_restart_the_end_of_a_problem_is_reported_and_the_problem_is_not_again() {
        let start = Instant::now();
        let told = Told { level: Level::Problem, answer: Some("broker".to_owned()) };
        let at = |second| start + Duration::from_secs(second);
        let mut policy = Policy::new(told.clone(), start);
        assert!((0..300).all(|second| policy.see(Level::Problem, Some("broker"), at(second)).is_none()));
        let ends: Vec<_> = (300..400).filter_map(|second| policy.see(Level::Ok, None, at(second))).collect();
        assert_eq!(ends, [Due { told: Told { level: Level::Ok, ..told }, since: at(300) }]);
    }

    proptest! {
        #[test]
        fn nothing_that_flaps_is_reported_and_everything_that_stays_is(
            steps in vec((1u64..50, 0usize..4, 0usize..2, any::<bool>()), 1..120)
                .prop_map(|steps| steps.into_iter().map(|(seconds, level, answer, stays)| {
                    (if stays { 70 + seconds } else { seconds }, LEVELS[level], ANSWERS[answer])
                }).collect::<Vec<_>>()),
        ) {
            let start = Instant::now();
            let mut policy = Policy::new(well(), start);
            let (mut told, mut seen, mut second) = (well(), Vec::new(), 0);
            for (seconds, level, answer) in steps {
                let folded = if level == Level::Note { Level::Ok } else { level };
                for passed in 0..seconds {
                    second += 1;
                    seen.push(folded);
                    if let Some(due) = policy.see(level, Some(answer), start + Duration::from_secs(second)) {
                        prop_assert!(due.told.level == folded, "the text would not fit");
                        prop_assert!(due.told != told, "reported twice");
                        // A worse level was reached for all of the last minute, and a better one was not left for it.
                        let last_minute = &seen[seen.len().saturating_sub(61)..];
                        prop_assert!(last_minute.len() == 61);
                        if due.told.level > told.level {
                            prop_assert!(last_minute.iter().all(|level| *level >= due.told.level));
                        }
                        if due.told.level == Level::Ok {
                            prop_assert!(last_minute.iter().all(|level| *level == Level::Ok));
                        }
                        told = due.told;
                    }
                    if passed > 61 {
                        prop_assert_eq!(told.level, folded, "a state that stays is reported");
                        prop_assert!(folded == Level::Ok || told.answer.as_deref() == Some(answer));
                    }
                }
            }
        }
    }
}
