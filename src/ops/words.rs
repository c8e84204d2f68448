//! Numbers and counts as words, for the answers. Pure.

use std::time::Duration;

use crate::text::{grouped, span};

/// `1 webhook`, `1,204 webhooks`.
pub(super) fn count(number: u64, one: &str, many: &str) -> String {
    format!("{} {}", grouped(number), if number == 1 { one } else { many })
}

/// `1 event`, `1,204 events`.
pub(super) fn events(number: u64) -> String {
    count(number, "event", "events")
}

/// `1 event is`, `1,204 events are`.
pub(super) fn events_are(number: u64) -> String {
    count(number, "event is", "events are")
}

/// `12 s ago`, or `just now`, which stands still while events come.
pub(super) fn ago(age: Duration) -> String {
    if age < Duration::from_secs(5) { "just now".to_owned() } else { format!("{} ago", span(age)) }
}

/// A time that changes once a minute at most, for a sentence that people read more than once: `less than a minute`,
/// `12 min`, `2 h 10 min`.
pub(super) fn coarse(time: Duration) -> String {
    match time.as_secs() {
        0..60 => "less than a minute".to_owned(),
        seconds => span(Duration::from_secs(seconds / 60 * 60)),
    }
}

/// A forecast, which is never exact: `9 min`, `2 h`, `3 d`.
pub(super) fn about(time: Duration) -> String {
    match time.as_secs() {
        seconds @ 0..100 => format!("{seconds} s"),
        seconds @ 100..7200 => format!("{} min", seconds / 60),
        seconds @ 7200..172_800 => format!("{} h", seconds / 3600),
        seconds => format!("{} d", seconds / 86_400),
    }
}

/// The used share in per cent, rounded down, because 99.6 % is not full.
pub(super) fn percent(share: f64) -> String {
    if share > 0.0 && share < 0.01 { "less than 1 %".to_owned() } else { format!("{:.0} %", (share * 100.0).floor()) }
}

/// A rate per second: `0.3`, `12`.
pub(super) fn rate(per_second: f64) -> String {
    if per_second >= 9.95 { grouped(per_second.round() as u64) } else { format!("{per_second:.1}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_as_people_write_them() {
        assert_eq!((events_are(1), events_are(1204)), ("1 event is".to_owned(), "1,204 events are".to_owned()));
        assert_eq!([0.0, 0.005, 0.909, 0.996, 1.0].map(percent), ["0 %", "less than 1 %", "90 %", "99 %", "100 %"]);
        let forecasts = [42, 560, 7200, 200_000].map(|seconds| about(Duration::from_secs(seconds)));
        assert_eq!(forecasts, ["42 s", "9 min", "2 h", "2 d"]);
        let times = [59, 60, 3599, 7830, 90_000].map(|seconds| coarse(Duration::from_secs(seconds)));
        assert_eq!(times, ["less than a minute", "1 min", "59 min", "2 h 10 min", "1 d 1 h"]);
        assert_eq!((ago(Duration::ZERO), ago(Duration::from_secs(5))), ("just now".into(), "5 s ago".into()));
    }
}
