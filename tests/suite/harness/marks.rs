//! What must never be shown (promise 10): the suite's secret, its passwords and its user tokens are recognisable texts,
//! and everything that a relay or a command of the suite prints is searched for them.

use super::setup::SECRET;

/// The password of `guest` on every node of the suite.
pub const PASSWORD: &str = "marked-pass-6d1f";
/// The `userToken` in the vendor's samples and in the suite's own events.
pub const USER_TOKEN: &str = "partner-user-42";
/// The key of [`super::PrismApi`].
pub const API_KEY: &str = "marked-api-key-51f0";
/// Every health value that [`super::PrismApi`] knows.
pub const HEALTH: f64 = 73.184_620_9;
/// [`HEALTH`], as JSON has it.
const HEALTH_TEXT: &str = "73.1846209";
/// The start of each `userToken` that `prism-relay send` makes up.
const SAMPLE_USER: &str = "sample-user-";

/// # Panics
/// If `text` contains any of the marks, as text or as the list of bytes that Rust's `Debug` prints.
pub fn assert_discreet(place: &str, text: &str) {
    if let Some((mark, line)) = indiscretion(text) {
        panic!("{mark} in {place}: {line}");
    }
}

/// A mark that the text contains, and the line that contains it.
pub fn indiscretion(text: &str) -> Option<(&'static str, &str)> {
    [SECRET, PASSWORD, USER_TOKEN, SAMPLE_USER, API_KEY, HEALTH_TEXT].into_iter().find_map(|mark| {
        let bytes = format!("{:?}", mark.as_bytes());
        let bytes = bytes.trim_matches(['[', ']']);
        let line = text.lines().find(|line| line.contains(mark) || line.contains(bytes))?;
        Some((mark, line))
    })
}
