//! The last fifteen minutes in numbers, for the charts: a point every five seconds. Pure.

use std::collections::VecDeque;
use std::time::Duration;

use jiff::Timestamp;
use serde::Serialize;

use crate::publisher::Lags;

/// Between two points.
pub const INTERVAL: Duration = Duration::from_secs(5);
const POINTS_MAX: usize = 180;

#[derive(Default)]
pub struct History {
    points: VecDeque<Point>,
    before: Option<(Timestamp, Totals)>,
}

/// Counters since the start of the process, or of the spool's life.
#[derive(Clone, Copy, Debug, Default)]
pub struct Totals {
    /// Webhooks that were answered 200, re-sends among them.
    pub accepted: u64,
    pub refused: u64,
    /// Of the refused ones, those that were meant for us: at the right path, from where they may come.
    pub mistaken: u64,
    pub confirmed: u64,
}

/// Rates are per second, over the time since the point before.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Point {
    /// Seconds since 1970.
    pub at: i64,
    pub accepted: f64,
    pub refused: f64,
    #[serde(skip)]
    pub mistaken: f64,
    pub confirmed: f64,
    /// Pending events.
    pub depth: u64,
    /// Of the events that were confirmed since the point before.
    pub lag_p50_ms: Option<u64>,
    pub lag_p99_ms: Option<u64>,
}

impl History {
    /// Adds a point; the first call only learns where the counters stand.
    pub fn add(&mut self, totals: Totals, depth: u64, lags: &Lags, now: Timestamp) -> Option<Point> {
        let (then, before) = self.before.replace((now, totals))?;
        let seconds = now.duration_since(then).as_secs_f64().max(0.001);
        // Counters may fall when a spool is mended.
        let rate = |now: u64, before: u64| now.saturating_sub(before) as f64 / seconds;
        let point = Point {
            at: now.as_second(),
            accepted: rate(totals.accepted, before.accepted),
            refused: rate(totals.refused, before.refused),
            mistaken: rate(totals.mistaken, before.mistaken),
            confirmed: rate(totals.confirmed, before.confirmed),
            depth,
            lag_p50_ms: lags.quantile(0.5),
            lag_p99_ms: lags.quantile(0.99),
        };
        if self.points.len() == POINTS_MAX {
            self.points.pop_front();
        }
        self.points.push_back(point);
        Some(point)
    }

    /// The oldest first.
    pub fn points(&self) -> Vec<Point> {
        self.points.iter().copied().collect()
    }

    /// Webhooks accepted and mistaken within about the last `span`.
    pub fn lately(&self, span: Duration, now: Timestamp) -> (f64, f64) {
        let since = now.as_second() - i64::try_from(span.as_secs()).unwrap_or(i64::MAX);
        let recent = self.points.iter().rev().take_while(|point| point.at >= since);
        let seconds = INTERVAL.as_secs_f64();
        recent.fold((0.0, 0.0), |(accepted, mistaken), point| {
            (accepted + point.accepted * seconds, mistaken + point.mistaken * seconds)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_are_rates_and_do_not_pile_up() {
        let mut history = History::default();
        let at = |second: i64| Timestamp::from_second(1_000_000 + second).unwrap();
        let totals = |count| Totals { accepted: count, refused: 2 * count, mistaken: count, confirmed: count / 2 };
        assert_eq!(history.add(totals(100), 0, &Lags::default(), at(0)), None);
        let point = history.add(totals(150), 7, &Lags::default(), at(5)).unwrap();
        assert_eq!((point.accepted, point.refused, point.confirmed, point.depth), (10.0, 20.0, 5.0, 7));
        assert_eq!(history.add(totals(0), 0, &Lags::default(), at(10)).unwrap().accepted, 0.0, "a counter that fell");
        assert_eq!(history.lately(Duration::from_secs(60), at(10)), (50.0, 50.0));
        assert_eq!(history.lately(Duration::from_secs(60), at(90)), (0.0, 0.0));
        for second in 3..1000 {
            history.add(totals(0), 0, &Lags::default(), at(second * 5));
        }
        assert_eq!(history.points().len(), POINTS_MAX);
    }
}
