//! Limits repeated log lines to one per kind and minute, so that an attack or a wrong secret is visible and does not
//! fill the disk. Pure except for a lock; takes `now`.

use std::collections::HashMap;
use std::num::NonZeroU64;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Minimum time between two lines of a kind.
const LINE_EVERY: Duration = Duration::from_secs(60);

/// For each kind: when it was last logged, and how many lines were suppressed since. Kinds are constants, so they are
/// few.
#[derive(Debug, Default)]
pub(crate) struct LogLimiter(Mutex<HashMap<&'static str, (Instant, u64)>>);

impl LogLimiter {
    /// `Some` if a line of this kind may be logged now, with the number of lines suppressed before it. A log line
    /// leaves out the field of a `None`.
    pub(crate) fn due(&self, kind: &'static str, now: Instant) -> Option<Option<NonZeroU64>> {
        let mut kinds = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match kinds.get_mut(kind) {
            Some((logged_at, suppressed)) if now.saturating_duration_since(*logged_at) < LINE_EVERY => {
                *suppressed += 1;
                None
            }
            Some((logged_at, suppressed)) => {
                *logged_at = now;
                Some(NonZeroU64::new(std::mem::take(suppressed)))
            }
            None => {
                kinds.insert(kind, (now, 0));
                Some(None)
            }
        }
    }

    /// Counts lines of a kind. `Some` if a line may be logged now, with the number of all that were not logged yet,
    /// these included. A `count` of 0 asks whether any are left.
    pub(crate) fn add(&self, kind: &'static str, count: u64, now: Instant) -> Option<u64> {
        let mut kinds = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((logged_at, suppressed)) = kinds.get_mut(kind) {
            *suppressed += count;
            if *suppressed == 0 || now.saturating_duration_since(*logged_at) < LINE_EVERY {
                return None;
            }
            *logged_at = now;
            return Some(std::mem::take(suppressed));
        }
        if count > 0 {
            kinds.insert(kind, (now, 0));
        }
        (count > 0).then_some(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_is_logged_once_a_minute() {
        let (limiter, start) = (LogLimiter::default(), Instant::now());
        assert_eq!(limiter.due("a", start), Some(None));
        assert_eq!(limiter.due("b", start), Some(None));
        assert_eq!(limiter.due("a", start + LINE_EVERY / 2), None);
        assert_eq!(limiter.due("a", start + LINE_EVERY), Some(NonZeroU64::new(1)));
    }

    #[test]
    fn a_line_that_counts_events_counts_those_of_the_minute_before() {
        let (limiter, start) = (LogLimiter::default(), Instant::now());
        assert_eq!(limiter.add("a", 0, start), None);
        assert_eq!(limiter.add("a", 3, start), Some(3));
        assert_eq!(limiter.add("a", 100, start + LINE_EVERY / 2), None);
        assert_eq!(limiter.add("b", 1, start + LINE_EVERY / 2), Some(1));
        assert_eq!(limiter.add("a", 0, start + LINE_EVERY), Some(100));
        assert_eq!(limiter.add("a", 0, start + 2 * LINE_EVERY), None, "none is left");
    }
}
