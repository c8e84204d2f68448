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

/// Why requests with this code are refused, which completes the sentence "webhooks are refused: ...", and what to do.
fn explained(code: &str) -> (&str, &'static str) {
    match code {
        "invalid-signature" => (
            "they are signed with another secret, or a proxy changes them",
            "Compare signature.secrets with the secret in your Prism account; `prism-relay verify` checks one request.",
        ),
        "missing-signature" => (
            "they are not signed",
            "If they are Prism's, your Prism account does not sign: set signature.required to false.",
        ),
        "stale-timestamp" => (
            "their timestamp is too far from this machine's clock",
            "Check this machine's clock (NTP) with `timedatectl`; the limit is signature.tolerance.",
        ),
        "invalid-timestamp" => (
            "their prism-timestamp header is not a time",
            "Look for a proxy that changes headers; otherwise they are not from Prism.",
        ),
        "source-not-allowed" => {
            ("their address is not in http.allowed_sources", "If it is the address of Prism or of your proxy, add it.")
        }
        "body-too-large" => {
            ("they are larger than http.body_bytes_max", "If they are from Prism, raise http.body_bytes_max.")
        }
        "request-timeout" => (
            "their body did not arrive within http.body_timeout",
            "Check the network and the proxy in front of the relay.",
        ),
        "unreadable-body" => (
            "their connections broke before the body was complete",
            "Check the network and the proxy in front of the relay.",
        ),
        "overloaded" => (
            "bodies that arrive slowly use up http.buffer_bytes_max",
            "Set http.allowed_sources, because they may not be Prism's, or raise http.buffer_bytes_max.",
        ),
        "spool-full" => ("the spool was full", "Restore RabbitMQ so that the spool drains, or raise spool.max_bytes."),
        "spool-unavailable" => (
            "the spool could not be written: the disk was full, read-only or failing",
            "Fix the disk; accepting resumes by itself.",
        ),
        "shutting-down" => (
            "the relay was shutting down",
            "Restart quickly, because Prism retries for about 35 s only, or run a second relay.",
        ),
        "not-found" => (
            "they were for another path than http.path",
            "If they are from Prism, correct the URL in your Prism account; otherwise ignore them.",
        ),
        "method-not-allowed" => ("they were no POST, so probably from a browser or a scanner", "Ignore them."),
        "invalid-json" => ("they are not signed, and their body is not JSON", "Ignore them: they are hardly Prism's."),
        "invalid-encoding" => {
            ("they are not signed, and their body is not UTF-8", "Ignore them: they are hardly Prism's.")
        }
        "not-an-envelope" => {
            ("they are not signed, and their body has no eventType", "Ignore them: they are hardly Prism's.")
        }
        other => (other, "See the relay's log for this reason."),
    }
}

/// Completes the sentence "webhooks are refused: ...".
pub(super) fn cause(code: &str) -> &str {
    explained(code).0
}

/// What to do about refusals with this code.
pub(super) fn step(code: &str) -> &'static str {
    explained(code).1
}

/// The entry of the runbook about refusals with this code.
pub(super) fn runbook(code: &str, all: bool) -> &'static str {
    match code {
        "spool-full" | "spool-unavailable" => "PrismRelayNotReady",
        _ if !is_unverified(code) => "refused-webhooks",
        _ if all => "PrismRelayEverySignatureFails",
        _ => "PrismRelaySomeSignaturesFail",
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
    /// That webhooks are refused, and why.
    pub(super) fn state(&self) -> String {
        let cause = cause(self.reason);
        match self.all {
            true => format!("Every webhook is being refused: {cause}."),
            false => format!("Some webhooks are being refused, most of them because {cause}."),
        }
    }

    /// How many, and what becomes of them.
    pub(super) fn figures(&self) -> String {
        let (count, minutes) = (grouped(self.count), self.minutes);
        match self.all {
            true => format!("{count} in the last {minutes} min. Prism gives up on each after 35 s."),
            false => format!("{count} in the last {minutes} min; others are accepted."),
        }
    }

    /// Both.
    pub(super) fn text(&self) -> String {
        format!("{} {}", self.state(), self.figures())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::problem::Code;

    #[test]
    fn every_code_is_explained() {
        for code in Code::ALL.map(Code::text) {
            assert!(!step(code).starts_with("See the relay's log"), "{code}");
        }
    }
}
