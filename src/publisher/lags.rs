//! How long events were under way, counted in buckets whose width grows with the time. Bounded, and cheap to add to.

use std::time::Duration;

/// Up to this many milliseconds each has a bucket of its own.
const EXACT: u64 = 16;
/// Above, each doubling has so many buckets: a quantile is off by 12 % at most.
const PER_DOUBLING: u64 = 8;
/// 2^32 ms are seven weeks.
const DOUBLINGS: u64 = 28;
const BUCKETS: usize = (EXACT + PER_DOUBLING * DOUBLINGS) as usize;

pub struct Lags {
    counts: Box<[u32; BUCKETS]>,
    total: u64,
}

impl Default for Lags {
    fn default() -> Self {
        Self { counts: Box::new([0; BUCKETS]), total: 0 }
    }
}

impl Lags {
    pub(super) fn add(&mut self, lag: Duration) {
        let milliseconds = u64::try_from(lag.as_millis()).unwrap_or(u64::MAX);
        self.counts[bucket(milliseconds)] += 1;
        self.total += 1;
    }

    /// The value, in milliseconds, that this share of the events did not exceed; `None` if there were none.
    pub fn quantile(&self, share: f64) -> Option<u64> {
        let rank = ((self.total as f64 * share).ceil() as u64).max(1);
        let mut seen = 0;
        let found = self.counts.iter().position(|count| {
            seen += u64::from(*count);
            seen >= rank
        })?;
        Some(upper_bound(found))
    }
}

fn bucket(milliseconds: u64) -> usize {
    if milliseconds < EXACT {
        return milliseconds as usize;
    }
    let doubling = u64::from(milliseconds.ilog2() - EXACT.ilog2());
    let within = (milliseconds >> doubling) * PER_DOUBLING / EXACT - PER_DOUBLING;
    ((EXACT + doubling * PER_DOUBLING + within) as usize).min(BUCKETS - 1)
}

/// The largest value that falls into a bucket, in milliseconds.
fn upper_bound(bucket: usize) -> u64 {
    let bucket = bucket as u64;
    if bucket < EXACT {
        return bucket;
    }
    let (doubling, within) = ((bucket - EXACT) / PER_DOUBLING, (bucket - EXACT) % PER_DOUBLING);
    (((EXACT / PER_DOUBLING) * (PER_DOUBLING + within + 1)) << doubling) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_lies_in_its_bucket_and_the_buckets_are_narrow() {
        for milliseconds in (0..5000).chain([1 << 20, (1 << 31) + 12_345]) {
            let upper = upper_bound(bucket(milliseconds));
            assert!(
                upper >= milliseconds && upper as f64 <= milliseconds as f64 * 1.125 + 1.0,
                "{milliseconds} {upper}"
            );
            assert!(
                bucket(milliseconds) == 0 || upper_bound(bucket(milliseconds) - 1) < milliseconds,
                "{milliseconds}"
            );
        }
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn quantiles() {
        let mut lags = Lags::default();
        assert_eq!(lags.quantile(0.5), None);
        for milliseconds in 1..=10 {
            lags.add(Duration::from_millis(milliseconds));
        }
        assert_eq!((lags.quantile(0.5), lags.quantile(0.99), lags.quantile(0.0)), (Some(5), Some(10), Some(1)));
    }
}
