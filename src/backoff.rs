//! The delay before the next try: exponential, with full jitter, so that many relays do not reconnect at the same
//! moment. Pure: the caller passes the random number.

use std::time::Duration;

/// Counts consecutive failures and turns the count into a delay.
#[derive(Debug)]
pub(crate) struct Backoff {
    min: Duration,
    max: Duration,
    failures: u32,
}

impl Backoff {
    pub(crate) fn new(min: Duration, max: Duration) -> Self {
        Self { min, max, failures: 0 }
    }

    /// The delay after one more failure: between `min` and `min * 2^failures`, and at most `max`. `random` is in
    /// `0.0..1.0`.
    pub(crate) fn next(&mut self, random: f64) -> Duration {
        let ceiling = self.min.saturating_mul(1 << self.failures.min(20)).min(self.max);
        self.failures = self.failures.saturating_add(1);
        self.min + ceiling.saturating_sub(self.min).mul_f64(random.clamp(0.0, 1.0))
    }

    /// Forgets the failures after a successful try.
    pub(crate) fn reset(&mut self) {
        self.failures = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIN: Duration = Duration::from_millis(100);
    const MAX: Duration = Duration::from_secs(15);

    #[test]
    fn grows_to_the_maximum_and_starts_over_after_a_reset() {
        let mut backoff = Backoff::new(MIN, MAX);
        let delays: Vec<_> = (0..12).map(|_| backoff.next(1.0)).collect();
        assert_eq!(delays[0], MIN);
        assert_eq!(delays[1], MIN * 2);
        assert!(delays.windows(2).all(|pair| pair[0] <= pair[1]));
        assert_eq!(delays[11], MAX);
        backoff.reset();
        assert_eq!(backoff.next(1.0), MIN);
    }

    #[test]
    fn jitter_stays_between_the_minimum_and_the_ceiling() {
        let mut backoff = Backoff::new(MIN, MAX);
        for failures in 0..100 {
            let delay = backoff.next(f64::from(failures) / 100.0);
            assert!((MIN..=MAX).contains(&delay), "{delay:?}");
        }
    }
}
