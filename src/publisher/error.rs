//! Why the relay is not delivering, and what that says about the connection.

use std::time::Duration;

use thiserror::Error;

use crate::broker::ConnectError;
use crate::spool::ReadError;
use crate::topology::TopologyError;

/// Why the relay is not delivering.
#[derive(Debug, Error)]
pub enum PublisherError {
    /// No connection could be opened.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The topology could not be declared or checked.
    #[error(transparent)]
    Topology(#[from] TopologyError),
    /// The set-up of the connection took too long.
    #[error("the broker did not open a channel and declare the topology within {0:?}")]
    SetUpTimeout(Duration),
    /// The channel or the connection failed, for a reason that concerns no single message.
    #[error("the connection was lost: {0}")]
    Lost(String),
    /// The broker closed the channel, for a reason that concerns no single message.
    #[error("the broker refuses publishes: {0}")]
    Rejected(String),
    /// A publish got neither an ack nor a nack in time.
    #[error("the broker did not confirm a publish within {0:?}")]
    ConfirmTimeout(Duration),
    /// A queue did not take a message.
    #[error("the broker rejected a publish (nack): a queue is full, or has no leader")]
    Nacked,
    /// The broker closed the channel because of a message that it does not take.
    #[error("the broker refuses a message: {0}")]
    Refused(String),
    /// The spool could not be read, which ends the publisher.
    #[error(transparent)]
    Spool(#[from] ReadError),
}

impl PublisherError {
    /// Whether no broker answers, as opposed to one that refuses something.
    pub(super) fn is_unreachable(&self) -> bool {
        match self {
            Self::Connect(ConnectError::Tcp { .. } | ConnectError::Timeout { .. }) | Self::Lost(_) => true,
            Self::Connect(_)
            | Self::Topology(_)
            | Self::SetUpTimeout(_)
            | Self::ConfirmTimeout(_)
            | Self::Nacked
            | Self::Rejected(_)
            | Self::Refused(_)
            | Self::Spool(_) => false,
        }
    }

    /// The broker refused a message, with this many in flight. The next session tries at once, because this one found
    /// something out, unless the spool cannot record (`settles`) what it found out: the message is refused again.
    pub(super) fn after_refusal(reply: &str, in_flight: usize, settles: bool) -> Self {
        let reply = reply.to_owned();
        if in_flight > 0 && settles { Self::Refused(reply) } else { Self::Rejected(reply) }
    }
}

/// Why deliveries over one connection ended.
pub(super) struct Interruption {
    pub error: PublisherError,
    /// Whether the broker answered a publish, so that the connection is not to blame.
    pub connection_worked: bool,
}

impl From<PublisherError> for Interruption {
    fn from(error: PublisherError) -> Self {
        Self { error, connection_worked: false }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn after_a_refusal_the_next_session_tries_at_once_only_if_something_was_found_out_and_recorded() {
        for (in_flight, settles, at_once) in [(1, true, true), (0, true, false), (1, false, false)] {
            match PublisherError::after_refusal("why", in_flight, settles) {
                PublisherError::Refused(reply) => assert!(at_once && reply == "why"),
                PublisherError::Rejected(reply) => assert!(!at_once && reply == "why"),
                error => panic!("{error}"),
            }
        }
    }
}
