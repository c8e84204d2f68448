//! What must never be seen (promise 10): the suite's secret, its passwords and its user tokens are marked, and whatever
//! any relay or command of the suite says is searched for the marks.

use super::setup::SECRET;

/// Of `guest`, on every node of the suite.
pub const PASSWORD: &str = "marked-pass-6d1f";
/// The `userToken` in the vendor's samples and in the suite's own events.
pub const USER_TOKEN: &str = "partner-user-42";
/// The one that `prism-relay send` makes up.
const SAMPLE_USER: &str = "sample-user-";

/// # Panics
/// If any of the marks is in `text`, as it is, or byte by byte as Rust's `Debug` prints bytes.
pub fn assert_discreet(place: &str, text: &str) {
    if let Some((mark, line)) = indiscretion(text) {
        panic!("{mark} in {place}: {line}");
    }
}

/// A mark that is in the text, with its line.
pub fn indiscretion(text: &str) -> Option<(&'static str, &str)> {
    // A body that is printed as text has quotes around the token, or backslashes.
    [SECRET, PASSWORD, USER_TOKEN, SAMPLE_USER].into_iter().find_map(|mark| {
        let bytes = format!("{:?}", mark.as_bytes());
        let bytes = bytes.trim_matches(['[', ']']);
        let line = text.lines().find(|line| line.contains(mark) || line.contains(bytes))?;
        Some((mark, line))
    })
}
