//! What the broker replies, and the names that AMQP can carry.

use lapin::ErrorKind;
use lapin::protocol::AMQPErrorKind;
use lapin::types::ShortString;
use thiserror::Error;

/// Maximum length that AMQP allows for the name of an exchange or queue and for a routing key.
pub(crate) const SHORT_STRING_BYTES_MAX: usize = 255;

/// A name that AMQP cannot carry. An empty one in its place would be the default exchange, so this is an error.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("the name {0:?} is longer than {SHORT_STRING_BYTES_MAX} bytes")]
pub struct NameTooLong(pub String);

/// Converts a name or a routing key to AMQP's type for them.
pub(crate) fn short_string(text: &str) -> Result<ShortString, NameTooLong> {
    ShortString::try_new(text).map_err(|_| NameTooLong(text.to_owned()))
}

/// The AMQP reply code of an error that the broker sent, such as 406; `None` if the error is not the broker's.
pub(crate) fn reply_code(error: &lapin::Error) -> Option<u16> {
    match error.kind() {
        ErrorKind::ProtocolError(error) => Some(error.get_id()),
        _ => None,
    }
}

/// Whether the broker closed a channel with this error, and not the connection.
pub(crate) fn concerns_a_channel(error: &lapin::Error) -> bool {
    matches!(error.kind(), ErrorKind::ProtocolError(error) if matches!(error.kind(), AMQPErrorKind::Soft(_)))
}

/// The broker's own text, without lapin's wrapping.
pub(crate) fn reply_text(error: &lapin::Error) -> String {
    match error.kind() {
        ErrorKind::ProtocolError(error) => error.get_message().to_string(),
        _ => error.to_string(),
    }
}

/// Whether the broker refuses something because there are too many of it already: queues of a virtual host,
/// connections or channels of a user, a virtual host or a node.
pub(crate) fn is_limit(reply: &str) -> bool {
    reply.contains("limit") && reply.contains("reached")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_recognised_by_their_text() {
        for limit in [
            "PRECONDITION_FAILED - cannot declare queue 'q': queue limit in vhost '/' (10) is reached",
            "NOT_ALLOWED - access to vhost '/' refused for user 'u': connection limit (1) is reached",
            "NOT_ALLOWED - connection refused for user 'u': user connection limit (1) is reached",
            "NOT_ALLOWED - number of channels opened for user 'u' has reached the maximum allowed user limit of (1)",
        ] {
            assert!(is_limit(limit), "{limit}");
        }
        assert!(!is_limit("NOT_ALLOWED - vhost v not found"));
        assert!(!is_limit("PRECONDITION_FAILED - inequivalent arg 'x-delivery-limit' for queue 'q'"));
    }

    #[test]
    fn a_name_that_is_too_long_is_an_error_and_not_the_default_exchange() {
        assert_eq!(short_string(&"a".repeat(255)).unwrap().as_str().len(), 255);
        assert_eq!(short_string(&"a".repeat(256)), Err(NameTooLong("a".repeat(256))));
    }
}
