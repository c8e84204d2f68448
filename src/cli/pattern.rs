//! Topic patterns in arguments.

use crate::topology::{check_pattern, pattern_advice};

/// Reads a topic pattern.
pub(super) fn topic_pattern(text: &str) -> Result<String, String> {
    check_pattern(text).map(|()| text.to_owned())
}

/// Prints a note on standard error if the pattern matches none of Prism's event types.
pub(super) fn note_on_pattern(pattern: &str) {
    if let Some(advice) = pattern_advice(pattern) {
        eprintln!("note: the pattern {pattern:?} {advice}");
    }
}
