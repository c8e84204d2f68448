//! What each refusal of a webhook means, and what to do about it. Pure.

use crate::text::grouped;

/// Codes of refusals before the body was read. Prism's webhook may have been among them, but none can be recognised
/// when it comes again.
pub(super) const UNRECOGNISABLE: [&str; 3] = ["overloaded", "request-timeout", "body-too-large"];

/// Codes of webhooks whose signature failed.
const UNVERIFIED: [&str; 4] = ["missing-signature", "invalid-signature", "invalid-timestamp", "stale-timestamp"];

pub(super) fn is_unverified(code: &str) -> bool {
    UNVERIFIED.contains(&code)
}

/// Completes the sentence "webhooks are refused: ...".
pub(super) fn cause(code: &str) -> &str {
    match code {
        "invalid-signature" => "they are signed with another secret, or a proxy changes them",
        "missing-signature" => "they are not signed",
        "stale-timestamp" => "their timestamp is too far from this machine's clock",
        "invalid-timestamp" => "their timestamp cannot be read",
        "body-too-large" => "they are larger than http.body_bytes_max",
        "request-timeout" => "they arrive too slowly",
        "unreadable-body" => "their connections break",
        "overloaded" => "bodies that arrive slowly use up http.buffer_bytes_max",
        "spool-full" => "the spool was full",
        "spool-unavailable" => "the spool could not be written",
        "shutting-down" => "the relay was shutting down",
        other => other,
    }
}

/// What a refusal with this code means, and what to do.
pub(super) fn meaning(code: &str) -> &'static str {
    match code {
        "overloaded" => {
            "Bodies that arrive slowly used up http.buffer_bytes_max; they may not be Prism's. Set \
             http.allowed_sources, or raise the limit."
        }
        "invalid-signature" => {
            "The signature does not match: the secret differs from Prism's, or a proxy changes the body. Compare \
             signature.secrets with your Prism account."
        }
        "missing-signature" => {
            "The request is not signed. Either it is not from Prism, or your Prism account does not sign: then set \
             signature.required to false."
        }
        "invalid-timestamp" => {
            "The prism-timestamp header is not a time. Either a proxy changes headers, or the request is not from \
             Prism."
        }
        "stale-timestamp" => {
            "The timestamp is further from this machine's clock than signature.tolerance allows. Check this \
             machine's clock (NTP) first."
        }
        "source-not-allowed" => {
            "The sender's address is not in http.allowed_sources. If it is Prism or your proxy, add it."
        }
        "spool-full" => {
            "The spool had no room for more events. Restore RabbitMQ so that the spool drains, or raise \
             spool.max_bytes."
        }
        "spool-unavailable" => {
            "The spool could not be written: the disk is full, read-only or failing. Fix the disk; accepting resumes \
             by itself."
        }
        "shutting-down" => {
            "The relay was shutting down. Prism retries for about 35 s: restart quickly, or run a second relay."
        }
        "body-too-large" => "The body is larger than http.body_bytes_max. If it is from Prism, raise the limit.",
        "request-timeout" => {
            "The body did not arrive within http.body_timeout. Check the network and the proxy in front of the relay."
        }
        "unreadable-body" => {
            "The connection broke before the body was complete. Check the network and the proxy in front of the relay."
        }
        "not-found" => {
            "The request was for another path than http.path. If it is from Prism, correct the URL in your Prism \
             account; otherwise ignore it."
        }
        "method-not-allowed" => "The request was not a POST: probably a browser or a scanner. Ignore it.",
        "invalid-json" => "The body is not JSON, and the request is not signed. It is probably not from Prism.",
        "invalid-encoding" => "The body is not UTF-8, and the request is not signed. It is probably not from Prism.",
        "not-an-envelope" => "The body has no eventType, and the request is not signed. It is probably not from Prism.",
        _ => "See the relay's log for this reason.",
    }
}

/// Recent refusals of webhooks, if there are more than a few.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Refusing {
    /// The most frequent `code`.
    pub reason: &'static str,
    pub count: u64,
    /// The length of the time in which they were counted, in minutes.
    pub minutes: u64,
    /// Whether no webhook was accepted in this time.
    pub all: bool,
}

impl Refusing {
    /// One or two sentences.
    pub(super) fn text(&self) -> String {
        let (count, cause, minutes) = (grouped(self.count), cause(self.reason), self.minutes);
        if self.all {
            format!(
                "Every webhook is being refused ({count} in the last {minutes} min): {cause}. Prism gives up on each \
                 after 35 s."
            )
        } else {
            format!(
                "{count} webhooks were refused in the last {minutes} min, most of them because {cause}. Others are \
                 accepted."
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::problem::Code;

    #[test]
    fn every_code_has_a_meaning() {
        for code in Code::ALL.map(Code::text) {
            assert!(!meaning(code).starts_with("See the relay's log"), "{code}");
        }
    }
}
