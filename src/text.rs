//! Small conversions to text: an error with its causes, hex digits, a duration in words, a number in groups, and text
//! that is safe to print.

use std::error::Error;
use std::time::Duration;

/// An error and its causes in one line. A cause whose text the line already contains is left out.
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

/// Replaces control characters, so that text from outside cannot steer a terminal.
pub(crate) fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

/// [`clean`] for text of several lines, such as steps: only its line breaks are kept.
pub(crate) fn clean_lines(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' { '?' } else { c }).collect()
}

/// Lower-case hex digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    let digit = |nibble: u8| char::from(b"0123456789abcdef"[usize::from(nibble)]);
    let mut text = String::with_capacity(2 * bytes.len());
    for byte in bytes {
        text.extend([digit(byte >> 4), digit(byte & 15)]);
    }
    text
}

/// A duration in at most two units: `3 s`, `3 min 50 s`, `2 h 5 min`, `4 d`.
pub(crate) fn span(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let two = |large: u64, large_unit, small: u64, small_unit| match small {
        0 => format!("{large} {large_unit}"),
        small => format!("{large} {large_unit} {small} {small_unit}"),
    };
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => two(seconds / 60, "min", seconds % 60, "s"),
        3600..86_400 => two(seconds / 3600, "h", seconds % 3600 / 60, "min"),
        _ => two(seconds / 86_400, "d", seconds % 86_400 / 3600, "h"),
    }
}

/// [`span`] with fractions of short durations, for logs: `192 ms`, `1.9 s`, `3 min 50 s`.
pub(crate) fn rounded(duration: Duration) -> String {
    match duration.as_millis() {
        milliseconds @ 0..1000 => format!("{milliseconds} ms"),
        milliseconds @ 1000..10_000 => format!("{:.1} s", milliseconds as f64 / 1000.0),
        _ => span(duration),
    }
}

/// A number with its digits in groups of three: `1,758`.
pub(crate) fn grouped(number: u64) -> String {
    match number / 1000 {
        0 => number.to_string(),
        thousands => format!("{},{:03}", grouped(thousands), number % 1000),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_in_logs_have_no_more_digits_than_they_need() {
        for (microseconds, text) in [
            (0, "0 ms"),
            (191_771, "191 ms"),
            (1_549_999, "1.5 s"),
            (9_999_000, "10.0 s"),
            (15_000_000, "15 s"),
            (90_500_000, "1 min 30 s"),
        ] {
            assert_eq!(rounded(Duration::from_micros(microseconds)), text);
        }
    }

    #[test]
    fn long_numbers_are_grouped() {
        for (number, text) in [(0, "0"), (999, "999"), (1758, "1,758"), (1_000_000, "1,000,000"), (12_003, "12,003")] {
            assert_eq!(grouped(number), text);
        }
    }

    #[test]
    fn a_span_has_at_most_two_units() {
        for (seconds, text) in
            [(0, "0 s"), (59, "59 s"), (60, "1 min"), (230, "3 min 50 s"), (7500, "2 h 5 min"), (90_000, "1 d 1 h")]
        {
            assert_eq!(span(Duration::from_secs(seconds)), text);
        }
    }

    #[test]
    fn control_characters_are_replaced() {
        assert_eq!(clean("a\u{1b}[31mb\nc"), "a?[31mb?c");
    }
}
