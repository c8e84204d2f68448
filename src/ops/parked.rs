//! Why an event is parked, in words, and what to do. Pure.

/// Why an event is parked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Explained {
    pub reason: String,
    /// Commands are in backticks.
    pub remedy: &'static str,
}

/// Explains what the publisher noted about an event with this routing key.
pub(super) fn explain(noted: &str, key: &str) -> Explained {
    let (reason, remedy) = match noted.split_once(": ") {
        Some(("returned", reply)) if reply.contains("NO_ROUTE") => (
            format!("no queue is bound for {key}"),
            "Bind one with the commands that `prism-relay topology diff` prints, then retry.",
        ),
        Some(("refused", reply)) if reply.contains("access to topic") => (
            format!("the relay's user may not publish {key} ({reply})"),
            "Give the permission with the command that `prism-relay check` prints, then retry.",
        ),
        Some(("refused", reply)) if reply.contains("message size") => {
            (format!("it is too large for RabbitMQ ({reply})"), "Raise max_message_size in rabbitmq.conf, then retry.")
        }
        Some(("refused", reply)) => (
            format!("RabbitMQ refuses it ({reply})"),
            "Fix what RabbitMQ names; `prism-relay check` helps. Then retry.",
        ),
        Some(("damaged", _)) => (
            "its body changed on the disk".to_owned(),
            "The disk may be failing: check it. Ask Prism's API for this scan, then remove the event.",
        ),
        _ => (noted.to_owned(), "Fix what the reason names, then retry."),
    };
    Explained { reason, remedy }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_publisher_notes_is_explained() {
        for (noted, reason, command) in [
            ("returned: 312 NO_ROUTE", "no queue is bound for scan.a", "prism-relay topology diff"),
            (
                "refused: ACCESS_REFUSED - write access to topic 'scan.a' in exchange 'e' refused",
                "the relay's user may not publish scan.a (ACCESS_REFUSED - write access to topic 'scan.a' in exchange \
                 'e' refused)",
                "prism-relay check",
            ),
            (
                "refused: PRECONDITION_FAILED - message size 3000 is larger than max size 2000",
                "it is too large for RabbitMQ (PRECONDITION_FAILED - message size 3000 is larger than max size 2000)",
                "max_message_size",
            ),
            ("refused: odd", "RabbitMQ refuses it (odd)", "prism-relay check"),
            ("damaged: the body does not match its fingerprint", "its body changed on the disk", "Prism's API"),
            ("what an older version noted", "what an older version noted", "the reason names"),
        ] {
            let explained = explain(noted, "scan.a");
            assert_eq!(explained.reason, reason);
            assert!(explained.remedy.contains(command), "{explained:?}");
        }
    }
}
