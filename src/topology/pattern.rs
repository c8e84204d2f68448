//! Topic patterns: what they match, and advice on those that match no event of Prism's. Pure.

use crate::event::{DOCUMENTED_TYPES, INVALID_BODY, INVALID_EVENT_TYPE};

/// Maximum number of `#` in a pattern. With each further one RabbitMQ tries more ways to match a key.
const HASHES_MAX: usize = 2;

/// Whether a topic exchange would route this key to a binding with this pattern.
pub(crate) fn matches(pattern: &str, key: &str) -> bool {
    fn words(pattern: &[&str], key: &[&str]) -> bool {
        match (pattern.split_first(), key.split_first()) {
            (None, None) => true,
            (Some((&"#", rest)), _) => words(rest, key) || (!key.is_empty() && words(pattern, &key[1..])),
            (Some((&"*", pattern)), Some((_, key))) => words(pattern, key),
            (Some((wanted, pattern)), Some((word, key))) => wanted == word && words(pattern, key),
            (None, Some(_)) | (Some(_), None) => false,
        }
    }
    words(&pattern.split('.').collect::<Vec<_>>(), &key.split('.').collect::<Vec<_>>())
}

/// Checks that a pattern can be used. The error completes the sentence "the pattern ...".
pub(crate) fn check_pattern(pattern: &str) -> Result<(), String> {
    match pattern.split('.').filter(|word| *word == "#").count() {
        0..=HASHES_MAX => Ok(()),
        count => Err(format!("has {count} words `#`; {HASHES_MAX} are allowed")),
    }
}

/// Advice on a pattern that matches none of Prism's event types. It completes the sentence "the pattern ...".
pub(crate) fn pattern_advice(pattern: &str) -> Option<String> {
    if matches_prism(pattern) {
        return None;
    }
    let lower_case = pattern.to_ascii_lowercase();
    let longer = |pattern: &str| [pattern.to_owned(), pattern.replace('*', "#"), format!("{pattern}.#")];
    let candidates = [longer(pattern), longer(lower_case.trim())].concat();
    let meant = candidates.iter().find(|pattern| check_pattern(pattern).is_ok() && matches_prism(pattern));
    let star = if pattern.split('.').any(|word| word == "*") { " (`*` is one word)" } else { "" };
    let advice = match meant {
        Some(meant) => format!("did you mean {meant}?"),
        None => format!("they are such as {}", DOCUMENTED_TYPES[0]),
    };
    Some(format!("matches none of Prism's event types{star}; {advice}"))
}

/// Whether an event that Prism documents, or one with a key of the relay's own, would match.
fn matches_prism(pattern: &str) -> bool {
    let keys = DOCUMENTED_TYPES.iter().chain([&INVALID_EVENT_TYPE, &INVALID_BODY]);
    keys.into_iter().any(|key| matches(pattern, key))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_as_in_a_topic_exchange() {
        for (pattern, key, expected) in [
            ("#", "scan.processing.started", true),
            ("#", "", true),
            ("scan.#", "scan", true),
            ("scan.#", "scan.processing.started", true),
            ("scan.*", "scan.processing", true),
            ("scan.*", "scan.processing.started", false),
            ("*.processing.*", "scan.processing.started", true),
            ("#.started", "scan.processing.started", true),
            ("scan.#", "body_shape_prediction.processing.started", false),
            ("scan.processing", "scan.processing.started", false),
        ] {
            assert_eq!(matches(pattern, key), expected, "{pattern} {key}");
        }
    }

    #[test]
    fn a_pattern_that_matches_no_event_of_prisms_gets_advice() {
        for pattern in ["#", "scan.#", "*.processing.failed", "#.started", "invalid.*", "scan.*.*", "invalid.body"] {
            assert_eq!(pattern_advice(pattern), None, "{pattern}");
        }
        for (pattern, expected) in [
            ("scan.*", "matches none of Prism's event types (`*` is one word); did you mean scan.#?"),
            ("*", "matches none of Prism's event types (`*` is one word); did you mean #?"),
            ("body_shape_prediction", "matches none of Prism's event types; did you mean body_shape_prediction.#?"),
            ("Scan.#", "matches none of Prism's event types; did you mean scan.#?"),
            ("scan.# ", "matches none of Prism's event types; did you mean scan.#?"),
            ("order.#", "matches none of Prism's event types; they are such as scan.processing.started"),
        ] {
            assert_eq!(pattern_advice(pattern).as_deref(), Some(expected));
        }
    }

    #[test]
    fn more_than_two_hashes_are_a_mistake() {
        assert_eq!(check_pattern("#.processing.#"), Ok(()));
        assert_eq!(check_pattern("a#.b##.c#.#"), Ok(()), "only a word of its own is a wildcard");
        assert_eq!(check_pattern("#.a.#.#"), Err("has 3 words `#`; 2 are allowed".to_owned()));
    }
}
