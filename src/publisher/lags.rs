//! The time from acceptance to confirm, of the events confirmed since the last reading. Bounded in memory.

use std::time::Duration;

use hdrhistogram::Histogram;

/// The longest lag that is recorded: seven weeks. Longer lags count as this one.
const LAG_MAX_MS: u64 = 1 << 32;
/// A quantile is at most one percent above the true value.
const SIGNIFICANT_DIGITS: u8 = 2;

/// Lags in milliseconds.
pub struct Lags(Histogram<u32>);

impl Default for Lags {
    fn default() -> Self {
        let histogram = Histogram::new_with_max(LAG_MAX_MS, SIGNIFICANT_DIGITS);
        Self(histogram.expect("both constants are within the histogram's limits"))
    }
}

impl Lags {
    pub(super) fn add(&mut self, lag: Duration) {
        self.0.saturating_record(u64::try_from(lag.as_millis()).unwrap_or(u64::MAX));
    }

    /// The lag, in milliseconds, that this share of the events did not exceed; `None` without events.
    pub fn quantile(&self, share: f64) -> Option<u64> {
        (!self.0.is_empty()).then(|| self.0.value_at_quantile(share))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_exact_for_short_lags_and_within_a_percent_for_long_ones() {
        let mut lags = Lags::default();
        assert_eq!(lags.quantile(0.5), None);
        for milliseconds in 1..=10 {
            lags.add(Duration::from_millis(milliseconds));
        }
        assert_eq!((lags.quantile(0.5), lags.quantile(0.99), lags.quantile(0.0)), (Some(5), Some(10), Some(1)));
        lags.add(Duration::from_secs(3600));
        let hour = lags.quantile(1.0).unwrap();
        assert!((3_600_000..=3_636_000).contains(&hour), "{hour} ms");
        lags.add(Duration::MAX);
        assert!(lags.quantile(1.0).unwrap() >= LAG_MAX_MS);
    }
}
