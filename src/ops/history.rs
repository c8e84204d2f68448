//! The points of the console's charts, one every five seconds, and what the last hour says about the future. Pure;
//! takes `now`.

use std::cmp::Ordering;
use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use serde::Serialize;

use super::answers::{Outlook, Window};
use crate::publisher::Lags;

/// The time between two points.
pub(super) const INTERVAL: Duration = Duration::from_secs(5);
/// An hour, which is the longest window of the answers.
const POINTS_MAX: usize = 720;
/// Fifteen minutes, which the charts show.
const CHART_POINTS: usize = 180;
/// A forecast for longer than this would be a guess.
const FORECAST_MAX: Duration = Duration::from_secs(30 * 86_400);
/// Fewer points make no forecast.
const FORECAST_POINTS_MIN: usize = 4;

/// The latest points, and the counters at the last one.
#[derive(Default)]
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
    /// Connections refused because of their protocol.
    pub other_protocol: u64,
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
    /// Bytes that count against the maximum of the spool.
    #[serde(skip)]
    bytes: u64,
    #[serde(skip)]
    increase: Increase,
}

/// What the spool holds.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Held {
    /// Pending events.
    pub depth: u64,
    /// Bytes that count against the maximum: the events, and a log that has grown.
    pub bytes: u64,
}

/// How much the counters of webhooks grew over some time.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Increase {
    pub accepted: u64,
    pub confirmed: u64,
    pub other_protocol: u64,
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
        Increase {
            accepted: self.accepted.saturating_sub(before.accepted),
            confirmed: self.confirmed.saturating_sub(before.confirmed),
            other_protocol: self.other_protocol.saturating_sub(before.other_protocol),
            refused_by_code,
        }
    }
}

impl History {
    /// Adds a point; the first call only stores the counters. `at` labels the point, `now` measures the time between
    /// points, because the wall clock may jump.
    pub(super) fn add(
        &mut self,
        counters: Counters,
        held: Held,
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
            confirmed: rate(increase.confirmed),
            depth: held.depth,
            bytes: held.bytes,
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

    /// The points of the charts, oldest first.
    pub(super) fn points(&self) -> Vec<Point> {
        let skipped = self.points.len().saturating_sub(CHART_POINTS);
        self.points.iter().skip(skipped).cloned().collect()
    }

    /// When the spool will be full or empty at the rate at which it grows or shrinks: the rate since it began to, so
    /// that the slowest growth shows. `max_bytes`: the size of the spool.
    pub(super) fn outlook(&self, max_bytes: u64) -> Outlook {
        let bytes: Vec<u64> = self.points.iter().map(|point| point.bytes).collect();
        let (Some(start), Some(last), Some(now)) = (turning_point(&bytes), bytes.len().checked_sub(1), bytes.last())
        else {
            return Outlook::Unclear;
        };
        let in_time = |left: u64| {
            let rate = now.abs_diff(bytes[start]) as f64 / ((last - start) as u64 * INTERVAL.as_secs()) as f64;
            Duration::try_from_secs_f64(left as f64 / rate).ok().filter(|time| *time < FORECAST_MAX)
        };
        let (full, empty) = (max_bytes.saturating_sub(*now), *now);
        match now.cmp(&bytes[start]) {
            _ if last - start < FORECAST_POINTS_MIN => Outlook::Unclear,
            Ordering::Greater => in_time(full).map_or(Outlook::Unclear, Outlook::FullIn),
            Ordering::Less => in_time(empty).map_or(Outlook::Unclear, Outlook::EmptyIn),
            Ordering::Equal => Outlook::Unclear,
        }
    }

    /// The webhooks of about the last `span`, up to `counters`, which are read now.
    pub(super) fn window(&self, span: Duration, counters: &Counters) -> Window {
        let Increase { accepted, refused_by_code, other_protocol, .. } = self.recent_increase(span, counters);
        Window { accepted, refused: refused_by_code, other_protocol }
    }

    /// The increase within about the last `span`, up to `counters`, which are read now.
    pub(super) fn recent_increase(&self, span: Duration, counters: &Counters) -> Increase {
        let points = (span.as_secs() / INTERVAL.as_secs()) as usize;
        let newest = self.before.as_ref().map(|(_, before)| counters.since(before)).unwrap_or_default();
        let recent = self.points.iter().rev().take(points).map(|point| &point.increase);
        recent.fold(newest, |mut sum, increase| {
            sum.accepted += increase.accepted;
            sum.confirmed += increase.confirmed;
            sum.other_protocol += increase.other_protocol;
            for (code, count) in &increase.refused_by_code {
                *sum.refused_by_code.entry(code).or_default() += count;
            }
            sum
        })
    }
}

/// The position from which on the values have risen or fallen up to the last one. A movement of a few points is taken
/// as a part of the one before it.
fn turning_point(values: &[u64]) -> Option<usize> {
    let last = values.len().checked_sub(1)?;
    let mut from = 0;
    loop {
        let there = || (from..=last).map(|at| (values[at], at));
        // The latest of equals, because a value that stays for a while says nothing about the rate.
        let (_, highest) = there().max()?;
        let (_, lowest) = there().min_by_key(|(value, at)| (*value, last - at))?;
        let (earlier, later) = (highest.min(lowest), highest.max(lowest));
        if later == last || last - later < FORECAST_POINTS_MIN {
            return Some(earlier);
        }
        from = later;
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
            other_protocol: 3 * count,
            confirmed: count / 2,
        };
        let mut add = |count, depth, second: i64| {
            let now = start + Duration::from_secs(second as u64);
            history.add(counters(count), Held { depth, bytes: 0 }, &Lags::default(), at(second), now)
        };
        assert_eq!(add(100, 0, 0), None);
        let point = add(150, 7, 5).unwrap();
        assert_eq!((point.accepted, point.refused, point.confirmed, point.depth), (10.0, 20.0, 5.0, 7));
        assert_eq!(add(200, 0, 10).unwrap().accepted, 10.0);
        assert_eq!(add(0, 0, 15).unwrap().accepted, 0.0, "a counter that fell gives no rate");
        let recent = history.recent_increase(Duration::from_secs(15), &counters(3));
        let refused_by_code = [("invalid-signature", 103)].into();
        assert_eq!(recent, Increase { accepted: 103, confirmed: 51, other_protocol: 309, refused_by_code });
        assert_eq!(history.recent_increase(Duration::from_secs(5), &counters(3)).accepted, 3);
        for second in 4..1000 {
            let now = start + Duration::from_secs(second * 5);
            history.add(counters(0), Held::default(), &Lags::default(), at(0), now);
        }
        assert_eq!((history.points.len(), history.points().len()), (POINTS_MAX, CHART_POINTS));
    }

    /// The outlook of a spool of 1 MB with these sizes, one every five seconds.
    fn outlook(sizes: impl IntoIterator<Item = u64>) -> Outlook {
        let (mut history, start) = (History::default(), Instant::now());
        for (number, bytes) in (0..).zip([0].into_iter().chain(sizes)) {
            let now = start + number * INTERVAL;
            history.add(Counters::default(), Held { depth: 0, bytes }, &Lags::default(), Timestamp::now(), now);
        }
        history.outlook(1_000_000)
    }

    #[test]
    fn a_forecast_needs_no_minimum_rate_and_begins_where_the_growth_does() {
        let seconds = |outlook| match outlook {
            Outlook::FullIn(time) | Outlook::EmptyIn(time) => time.as_secs(),
            Outlook::Unclear => 0,
        };
        assert_eq!(outlook([0; 100]), Outlook::Unclear);
        assert_eq!(outlook([0, 900]), Outlook::Unclear, "too few points");
        // After half an hour without a backlog, 100 B a second.
        let growing = outlook([0; 360].into_iter().chain((1..=100).map(|number| number * 500)));
        assert!(matches!(growing, Outlook::FullIn(_)) && seconds(growing) == 9500, "{growing:?}");
        // One event of 700 bytes every two minutes.
        let slow = outlook((0..500).map(|number| number / 24 * 700));
        assert!(matches!(slow, Outlook::FullIn(_)) && (150_000..200_000).contains(&seconds(slow)), "{slow:?}");
        let up = || (1..=100).map(|number| number * 500);
        let down = || (1..=40).map(|number| 50_000 - number * 1000);
        let draining = outlook(up().chain(down()));
        assert!(matches!(draining, Outlook::EmptyIn(_)) && seconds(draining) == 50, "{draining:?}");
        let second_outage = outlook(up().chain(down()).chain([0; 10]).chain((1..=50).map(|number| number * 500)));
        assert!(matches!(second_outage, Outlook::FullIn(_)) && seconds(second_outage) == 9750, "{second_outage:?}");
        let with_a_jolt = outlook(up().chain(down()).chain([10_100]));
        assert!(matches!(with_a_jolt, Outlook::EmptyIn(_)), "{with_a_jolt:?}");
        assert_eq!(outlook([500; 100].into_iter().chain([500; 10])), Outlook::Unclear, "it stays as it is");
    }
}
