//! The points of the console's charts: one every five seconds, for the last fifteen minutes. Pure; takes `now`.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use serde::Serialize;

use crate::publisher::Lags;

/// The time between two points.
pub(super) const INTERVAL: Duration = Duration::from_secs(5);
const POINTS_MAX: usize = 180;

#[derive(Default)]
/// The latest points, and the counters at the last one.
pub(super) struct History {
    points: VecDeque<Point>,
    before: Option<(Instant, Counters)>,
}

/// Counters at one moment. Some count since the process started, some since the spool was created.
#[derive(Clone, Debug, Default)]
pub(super) struct Counters {
    /// Webhooks answered 200, including re-sends.
    pub accepted: u64,
    pub refused: u64,
    /// Refused webhooks by code, without requests that cannot be webhooks (another path, another method).
    pub refused_by_code: BTreeMap<&'static str, u64>,
    pub confirmed: u64,
}

/// One point of each chart. Rates are per second, over the time since the previous point.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Point {
    /// Seconds since 1970.
    pub at: i64,
    pub accepted: f64,
    pub refused: f64,
    pub confirmed: f64,
    /// Pending events.
    pub depth: u64,
    /// Time from acceptance to confirm, for events confirmed since the previous point: the median.
    pub lag_p50_ms: Option<u64>,
    /// Time from acceptance to confirm, for events confirmed since the previous point: 99 of 100 took at most this.
    pub lag_p99_ms: Option<u64>,
    #[serde(skip)]
    increase: Increase,
}

/// How much the counters of webhooks grew over some time.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Increase {
    pub accepted: u64,
    pub refused_by_code: BTreeMap<&'static str, u64>,
}

impl Counters {
    /// The increase since `before`. Counters fall when a damaged spool is repaired: no increase then.
    fn since(&self, before: &Self) -> Increase {
        let refused_by_code = self
            .refused_by_code
            .iter()
            .map(|(code, count)| (*code, count.saturating_sub(before.refused_by_code.get(code).copied().unwrap_or(0))));
        let refused_by_code = refused_by_code.filter(|(_, count)| *count > 0).collect();
        Increase { accepted: self.accepted.saturating_sub(before.accepted), refused_by_code }
    }
}

impl History {
    /// Adds a point; the first call only stores the counters. `at` labels the point, `now` measures the time between
    /// points, because the wall clock may jump.
    pub(super) fn add(
        &mut self,
        counters: Counters,
        depth: u64,
        lags: &Lags,
        at: Timestamp,
        now: Instant,
    ) -> Option<Point> {
        let (then, before) = self.before.replace((now, counters.clone()))?;
        let seconds = now.saturating_duration_since(then).as_secs_f64().max(0.001);
        let increase = counters.since(&before);
        let rate = |count: u64| count as f64 / seconds;
        let point = Point {
            at: at.as_second(),
            accepted: rate(increase.accepted),
            refused: rate(counters.refused.saturating_sub(before.refused)),
            confirmed: rate(counters.confirmed.saturating_sub(before.confirmed)),
            depth,
            lag_p50_ms: lags.quantile(0.5),
            lag_p99_ms: lags.quantile(0.99),
            increase,
        };
        if self.points.len() == POINTS_MAX {
            self.points.pop_front();
        }
        self.points.push_back(point.clone());
        Some(point)
    }

    /// All points, oldest first.
    pub(super) fn points(&self) -> Vec<Point> {
        self.points.iter().cloned().collect()
    }

    /// The increase within about the last `span`, up to `counters`, which are read now.
    pub(super) fn recent_increase(&self, span: Duration, counters: &Counters) -> Increase {
        let points = (span.as_secs() / INTERVAL.as_secs()) as usize;
        let newest = self.before.as_ref().map(|(_, before)| counters.since(before)).unwrap_or_default();
        let recent = self.points.iter().rev().take(points).map(|point| &point.increase);
        recent.fold(newest, |mut sum, increase| {
            sum.accepted += increase.accepted;
            for (code, count) in &increase.refused_by_code {
                *sum.refused_by_code.entry(code).or_default() += count;
            }
            sum
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_hold_rates_and_their_number_is_limited() {
        let (mut history, start) = (History::default(), Instant::now());
        // The wall clock jumps back at second 10; the rates must not change.
        let at = |second: i64| Timestamp::from_second(1_000_000 + if second == 10 { -3600 } else { second }).unwrap();
        let counters = |count: u64| Counters {
            accepted: count,
            refused: 2 * count,
            refused_by_code: [("invalid-signature", count)].into(),
            confirmed: count / 2,
        };
        let mut add = |count, depth, second: i64| {
            let now = start + Duration::from_secs(second as u64);
            history.add(counters(count), depth, &Lags::default(), at(second), now)
        };
        assert_eq!(add(100, 0, 0), None);
        let point = add(150, 7, 5).unwrap();
        assert_eq!((point.accepted, point.refused, point.confirmed, point.depth), (10.0, 20.0, 5.0, 7));
        assert_eq!(add(200, 0, 10).unwrap().accepted, 10.0);
        assert_eq!(add(0, 0, 15).unwrap().accepted, 0.0, "a counter that fell gives no rate");
        let recent = history.recent_increase(Duration::from_secs(15), &counters(3));
        assert_eq!(recent, Increase { accepted: 103, refused_by_code: [("invalid-signature", 103)].into() });
        assert_eq!(history.recent_increase(Duration::from_secs(5), &counters(3)).accepted, 3);
        for second in 4..1000 {
            let now = start + Duration::from_secs(second * 5);
            history.add(counters(0), 0, &Lags::default(), at(0), now);
        }
        assert_eq!(history.points().len(), POINTS_MAX);
    }
}
