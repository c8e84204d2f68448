//! What became of a publish, and what an error of the broker means. Pure.

use lapin::message::BasicReturnMessage;
use lapin::{Confirmation, ErrorKind};
use uuid::Uuid;

use super::PublisherError;
use crate::broker::{reply_code, reply_text};

/// The end of one publish.
#[derive(Debug)]
pub(super) enum Outcome {
    /// The broker has it; a queue has it, too, unless a return says otherwise.
    Acked(Option<Return>),
    /// The broker has not taken it.
    Nacked(Option<Return>),
    /// Nobody knows.
    Failed(lapin::Error),
    /// The channel is not in confirm mode: a fault of ours.
    NotConfirmed,
}

/// A message that reached no queue. lapin hands it to whichever confirm comes next, so it is known by its id alone.
#[derive(Debug)]
pub(super) struct Return {
    /// `None`: not one of ours.
    pub id: Option<Uuid>,
    pub reason: String,
}

impl Outcome {
    pub fn of(result: Result<Confirmation, lapin::Error>) -> Self {
        match result {
            Ok(Confirmation::Ack(returned)) => Self::Acked(returned.map(Return::of)),
            Ok(Confirmation::Nack(returned)) => Self::Nacked(returned.map(Return::of)),
            Ok(Confirmation::NotRequested) => Self::NotConfirmed,
            Err(error) => Self::Failed(error),
        }
    }
}

impl Return {
    fn of(message: BasicReturnMessage) -> Self {
        let id = message.properties.message_id().as_ref().and_then(|id| id.as_str().parse().ok());
        Self { id, reason: format!("returned: {} {}", message.reply_code, message.reply_text) }
    }
}

/// Tells a message that the broker will never take from a broker that takes none at the moment.
pub(super) fn classify(error: &lapin::Error) -> PublisherError {
    let text = match error.kind() {
        ErrorKind::ProtocolError(_) => reply_text(error),
        _ => error.to_string(),
    };
    match reply_code(error) {
        // 406: larger than max_message_size, say; 311: too large; 403 for a topic: this key is forbidden to us. Any other
        // 403 concerns the exchange, so it would hit every message and is nothing that this one could be blamed for.
        Some(406 | 311) => PublisherError::Poison(text),
        Some(403) if text.contains("access to topic") => PublisherError::Poison(text),
        _ => PublisherError::Lost(text),
    }
}
