//! Repeated faults in the log: of each kind one a minute, with the number of those that were passed over, so that an
//! attack or a wrong secret is seen and does not fill the disk. Pure but for a lock; takes `now`.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

const TELL_EVERY: Duration = Duration::from_secs(60);

/// When each kind was last told of, and how often it has come since. Kinds are few: they are constants.
#[derive(Default)]
pub struct LogLimiter(Mutex<HashMap<&'static str, (Instant, u64)>>);

impl LogLimiter {
    /// Whether it is time to tell, and how many were passed over before this one.
    pub fn due(&self, kind: &'static str, now: Instant) -> Option<u64> {
        let mut kinds = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match kinds.get_mut(kind) {
            Some((told, unreported)) if now.saturating_duration_since(*told) < TELL_EVERY => {
                *unreported += 1;
                None
            }
            Some((told, unreported)) => {
                *told = now;
                Some(std::mem::take(unreported))
            }
            None => {
                kinds.insert(kind, (now, 0));
                Some(0)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_notice_a_minute_for_each_kind() {
        let (log_limiter, start) = (LogLimiter::default(), Instant::now());
        assert_eq!(log_limiter.due("a", start), Some(0));
        assert_eq!(log_limiter.due("b", start), Some(0));
        assert_eq!(log_limiter.due("a", start + TELL_EVERY / 2), None);
        assert_eq!(log_limiter.due("a", start + TELL_EVERY), Some(1));
    }
}
