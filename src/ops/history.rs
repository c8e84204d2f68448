//! What the console's charts show, and what the last hour says about the future: a sample every five seconds for the
//! last hour, and a record every thirty seconds for the last day. Pure; takes `now`.

use std::cmp::Ordering;
use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use jiff::Timestamp;

use super::answers::{Outlook, Window};
use super::record::{Marks, Point, RECORD_SECONDS, RECORDS_MAX, Record};
use crate::publisher::Lags;

/// The time between two samples.
pub(super) const INTERVAL: Duration = Duration::from_secs(5);
/// An hour, which is the longest window of the answers.
const SAMPLES_MAX: usize = 720;
/// A forecast for longer than this would be a guess.
const FORECAST_MAX: Duration = Duration::from_secs(30 * 86_400);
/// Fewer points make no forecast.
const FORECAST_POINTS_MIN: usize = 4;

/// The latest samples and records, and the counters at the last sample.
#[derive(Default)]
pub(super) struct History {
    samples: VecDeque<Sample>,
    before: Option<(Instant, Counters)>,
    /// Complete records, the oldest first; at the start those of earlier processes.
    records: VecDeque<Record>,
    /// The record that the next samples belong to.
    open: Option<Record>,
}

/// What one sample says.
struct Sample {
    record: Record,
    /// Bytes that count against the maximum of the spool.
    bytes: u64,
    increase: Increase,
}

/// The time that the charts show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Range {
    Minutes15,
    Hours2,
    Hours24,
}

impl Range {
    /// The range with this name in a query.
    pub(super) fn named(name: &str) -> Option<Self> {
        [Self::Minutes15, Self::Hours2, Self::Hours24].into_iter().find(|range| range.name() == name)
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Minutes15 => "15min",
            Self::Hours2 => "2h",
            Self::Hours24 => "24h",
        }
    }

    pub(super) fn seconds(self) -> i64 {
        match self {
            Self::Minutes15 => 900,
            Self::Hours2 => 7200,
            Self::Hours24 => 86_400,
        }
    }

    /// The time between two points.
    pub(super) fn interval_seconds(self) -> i64 {
        match self {
            Self::Minutes15 => INTERVAL.as_secs() as i64,
            Self::Hours2 => RECORD_SECONDS,
            Self::Hours24 => 300,
        }
    }
}

/// What a sample made.
pub(super) struct Added {
    pub point: Point,
    /// The record that the sample belongs to, up to now.
    pub record: Record,
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
    /// Connections that failed in the TLS handshake, or were not HTTP/1.
    pub failed: u64,
    pub confirmed: u64,
}

/// What waits where at one moment, and what happened since the previous one.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Held {
    /// Pending events.
    pub depth: u64,
    /// Bytes that count against the maximum: the events, and a log that has grown.
    pub bytes: u64,
    /// Messages in the queues of workers; `None`: not known.
    pub queued: Option<u64>,
    /// Dead letters and unrouted events; `None`: not known.
    pub dead: Option<u64>,
    pub marks: Marks,
}

/// How much the counters of webhooks grew over some time.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Increase {
    pub accepted: u64,
    pub confirmed: u64,
    pub other_protocol: u64,
    pub failed: u64,
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
            failed: self.failed.saturating_sub(before.failed),
            refused_by_code,
        }
    }
}

impl History {
    /// Begins with the records of earlier processes, the oldest first. The last one may end within the half minute in
    /// which this process begins.
    pub(super) fn with(mut records: Vec<Record>) -> Self {
        let open = records.pop();
        Self { records: records.into(), open, ..Self::default() }
    }

    /// Whether this process has no sample yet.
    pub(super) fn is_empty(&self) -> bool {
        self.samples.is_empty()
    }

    /// Adds a sample; the first call only stores the counters. `at` labels the sample, `now` measures the time between
    /// samples, because the wall clock may jump.
    pub(super) fn add(
        &mut self,
        counters: Counters,
        held: Held,
        lags: &Lags,
        at: Timestamp,
        now: Instant,
    ) -> Option<Added> {
        let (then, before) = self.before.replace((now, counters.clone()))?;
        let increase = counters.since(&before);
        let record = Record {
            at: at.as_second(),
            milliseconds: now.saturating_duration_since(then).as_millis().try_into().unwrap_or(u64::MAX),
            accepted: increase.accepted,
            refused: counters.refused.saturating_sub(before.refused),
            confirmed: increase.confirmed,
            depth: held.depth,
            lag_p50_ms: lags.quantile(0.5),
            lag_p99_ms: lags.quantile(0.99),
            queued: held.queued,
            dead: held.dead,
            marks: held.marks,
        };
        if self.samples.len() == SAMPLES_MAX {
            self.samples.pop_front();
        }
        let point = record.point();
        let open = self.collect(&record);
        self.samples.push_back(Sample { record, bytes: held.bytes, increase });
        Some(Added { point, record: open })
    }

    /// Adds a sample to the record that it belongs to, and returns that record.
    fn collect(&mut self, sample: &Record) -> Record {
        let record = match self.open.take() {
            Some(open) if open.slot(RECORD_SECONDS) == sample.slot(RECORD_SECONDS) => open.merged(sample),
            open => {
                self.complete(open);
                sample.clone()
            }
        };
        self.open.insert(record).clone()
    }

    fn complete(&mut self, record: Option<Record>) {
        let Some(record) = record else { return };
        // The clock was set back: what it now calls the future is not known.
        while self.records.back().is_some_and(|last| last.at >= record.at) {
            self.records.pop_back();
        }
        if self.records.len() == RECORDS_MAX {
            self.records.pop_front();
        }
        self.records.push_back(record);
    }

    /// The points of the charts, the oldest first. Before the first sample of this process there are records only.
    pub(super) fn points(&self, range: Range, now: Timestamp) -> Vec<Point> {
        let from = now.as_second() - range.seconds();
        let records = self.records.iter().chain(&self.open).filter(|record| record.at > from);
        match range {
            Range::Minutes15 => {
                let first = self.samples.front().map_or(i64::MAX, |sample| sample.record.at);
                let samples = self.samples.iter().map(|sample| &sample.record).filter(|sample| sample.at > from);
                records.filter(|record| record.at < first).chain(samples).map(Record::point).collect()
            }
            Range::Hours2 => records.map(Record::point).collect(),
            Range::Hours24 => {
                let mut merged: Vec<Record> = Vec::new();
                for record in records {
                    let slot = |record: &Record| record.slot(range.interval_seconds());
                    match merged.last_mut() {
                        Some(last) if slot(last) == slot(record) => *last = last.merged(record),
                        _ => merged.push(record.clone()),
                    }
                }
                merged.iter().map(Record::point).collect()
            }
        }
    }

    /// When the spool will be full or empty at the rate at which it grows or shrinks: the rate since it began to, so
    /// that the slowest growth shows. `max_bytes`: the size of the spool.
    pub(super) fn outlook(&self, max_bytes: u64) -> Outlook {
        let bytes: Vec<u64> = self.samples.iter().map(|sample| sample.bytes).collect();
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
        let Increase { accepted, refused_by_code, other_protocol, failed, .. } = self.recent_increase(span, counters);
        Window { accepted, refused: refused_by_code, other_protocol, failed }
    }

    /// The increase within about the last `span`, up to `counters`, which are read now.
    pub(super) fn recent_increase(&self, span: Duration, counters: &Counters) -> Increase {
        let samples = (span.as_secs() / INTERVAL.as_secs()) as usize;
        let newest = self.before.as_ref().map(|(_, before)| counters.since(before)).unwrap_or_default();
        let recent = self.samples.iter().rev().take(samples).map(|sample| &sample.increase);
        recent.fold(newest, |mut sum, increase| {
            sum.accepted += increase.accepted;
            sum.confirmed += increase.confirmed;
            sum.other_protocol += increase.other_protocol;
            sum.failed += increase.failed;
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
            failed: 4 * count,
            confirmed: count / 2,
        };
        let mut add = |count, depth, second: i64| {
            let now = start + Duration::from_secs(second as u64);
            let held = Held { depth, ..Held::default() };
            history.add(counters(count), held, &Lags::default(), at(second), now).map(|added| added.point)
        };
        assert_eq!(add(100, 0, 0), None);
        let point = add(150, 7, 5).unwrap();
        assert_eq!((point.accepted, point.refused, point.confirmed, point.depth), (10.0, 20.0, 5.0, 7));
        assert_eq!(add(200, 0, 10).unwrap().accepted, 10.0);
        assert_eq!(add(0, 0, 15).unwrap().accepted, 0.0, "a counter that fell gives no rate");
        let recent = history.recent_increase(Duration::from_secs(15), &counters(3));
        let refused_by_code = [("invalid-signature", 103)].into();
        assert_eq!(
            recent,
            Increase { accepted: 103, confirmed: 51, other_protocol: 309, failed: 412, refused_by_code }
        );
        assert_eq!(history.recent_increase(Duration::from_secs(5), &counters(3)).accepted, 3);
    }

    /// A history of so many seconds up to `NOW`, with one webhook a second.
    fn history_of(seconds: i64, before: Vec<Record>) -> History {
        let (mut history, start) = (History::with(before), Instant::now());
        for second in (0..=seconds).step_by(5) {
            let counters = Counters { accepted: second as u64, ..Counters::default() };
            let at = Timestamp::from_second(NOW - seconds + second).unwrap();
            let now = start + Duration::from_secs(second as u64);
            let held = Held { depth: second as u64 / 5, ..Held::default() };
            history.add(counters, held, &Lags::default(), at, now);
        }
        history
    }

    const NOW: i64 = 1_764_376_200;

    #[test]
    fn each_range_has_its_points_and_goes_on_after_a_restart() {
        let now = Timestamp::from_second(NOW).unwrap();
        let history = history_of(2 * 86_400, Vec::new());
        assert_eq!((history.samples.len(), history.records.len()), (SAMPLES_MAX, RECORDS_MAX));
        for (range, count) in [(Range::Minutes15, 180), (Range::Hours2, 240), (Range::Hours24, 288)] {
            let points = history.points(range, now);
            assert!(points.len().abs_diff(count) <= 1, "{range:?}: {}", points.len());
            assert!(points.iter().all(|point| point.accepted == 1.0), "{range:?}");
            assert!(points.windows(2).all(|pair| pair[0].at < pair[1].at), "{range:?}");
            assert_eq!(points.last().map(|point| point.at), Some(NOW), "{range:?}");
            assert_eq!(Range::named(range.name()), Some(range));
        }
        assert_eq!(Range::named("1h"), None);

        // Another process begins a minute ago, four minutes after the end of the first one.
        let earlier = history.records.into_iter().map(|record| Record { at: record.at - 300, ..record });
        let history = history_of(60, earlier.collect());
        let points = history.points(Range::Minutes15, now);
        let gap = points.windows(2).map(|pair| pair[1].at - pair[0].at).max();
        assert!((240..300).contains(&gap.unwrap()), "{gap:?}");
        assert!(points.len() > 30 && points[0].at < NOW - 850, "{} from {}", points.len(), points[0].at);
        assert!(history.points(Range::Hours24, now).len() > 280);
    }

    #[test]
    fn a_clock_that_is_set_back_leaves_the_records_in_order() {
        let mut history = history_of(600, Vec::new());
        let start = Instant::now();
        for second in (0..120).step_by(5) {
            let at = Timestamp::from_second(NOW - 300 + second).unwrap();
            let now = start + Duration::from_secs(1000 + second as u64);
            history.add(Counters::default(), Held::default(), &Lags::default(), at, now);
        }
        let times: Vec<i64> = history.records.iter().map(|record| record.at).collect();
        assert!(times.is_sorted() && *times.last().unwrap() < NOW - 180, "{times:?}");
    }

    #[test]
    fn a_process_that_ends_within_a_half_minute_leaves_its_part_to_the_next_one() {
        let last = Record { at: NOW - 12, milliseconds: 10_000, accepted: 100, ..Record::default() };
        let mut history = History::with(vec![last]);
        let start = Instant::now();
        let mut add = |accepted, at| {
            let counters = Counters { accepted, ..Counters::default() };
            let now = start + Duration::from_secs(accepted);
            history.add(counters, Held::default(), &Lags::default(), Timestamp::from_second(at).unwrap(), now)
        };
        assert!(add(0, NOW - 5).is_none());
        let Added { point, record } = add(5, NOW).unwrap();
        assert_eq!((point.accepted, record.accepted, record.milliseconds, record.at), (1.0, 105, 15_000, NOW));
        assert_eq!(add(10, NOW + 5).unwrap().record.accepted, 5, "the next half minute");
    }

    /// The outlook of a spool of 1 MB with these sizes, one every five seconds.
    fn outlook(sizes: impl IntoIterator<Item = u64>) -> Outlook {
        let (mut history, start) = (History::default(), Instant::now());
        for (number, bytes) in (0..).zip([0].into_iter().chain(sizes)) {
            let now = start + number * INTERVAL;
            history.add(
                Counters::default(),
                Held { bytes, ..Held::default() },
                &Lags::default(),
                Timestamp::now(),
                now,
            );
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
