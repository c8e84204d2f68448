//! The outcome of a publish, and the meaning of a broker's error. Pure.

use lapin::message::BasicReturnMessage;
use lapin::{Confirmation, ErrorKind};
use uuid::Uuid;

use super::error::PublisherError;
use super::window::Verdict;
use crate::broker::{concerns_a_channel, reply_code, reply_text};

/// The broker's answer to one publish.
#[derive(Debug)]
pub(super) struct Answer {
    /// An ack: the broker has the message, and so has a queue unless the broker returned it.
    pub verdict: Verdict,
    pub returned: Option<ReturnedMessage>,
}

/// A message that reached no queue. lapin attaches it to whichever confirm completes next, so only its id shows which
/// event it was.
#[derive(Debug)]
pub(super) struct ReturnedMessage {
    /// The event's id; `None` if the message is not the relay's.
    pub id: Option<Uuid>,
    pub reason: String,
}

impl Answer {
    /// An error if the channel failed before the broker answered.
    pub(super) fn read(result: Result<Confirmation, lapin::Error>) -> Result<Self, PublisherError> {
        let (verdict, returned) = match result {
            Ok(Confirmation::Ack(returned)) => (Verdict::Acked, returned),
            Ok(Confirmation::Nack(returned)) => (Verdict::Nacked, returned),
            // A bug.
            Ok(Confirmation::NotRequested) => {
                return Err(PublisherError::Lost("the channel is not in confirm mode".to_owned()));
            }
            Err(error) => return Err(classify(&error)),
        };
        Ok(Self { verdict, returned: returned.map(ReturnedMessage::new) })
    }
}

impl ReturnedMessage {
    fn new(message: BasicReturnMessage) -> Self {
        let id = message.properties.message_id().as_ref().and_then(|id| id.as_str().parse().ok());
        Self { id, reason: format!("returned: {} {}", message.reply_code, message.reply_text) }
    }
}

/// Separates a message that the broker will never take from a connection that failed.
pub(super) fn classify(error: &lapin::Error) -> PublisherError {
    let text = match error.kind() {
        ErrorKind::ProtocolError(_) => reply_text(error),
        _ => error.to_string(),
    };
    match reply_code(error) {
        // 406: for example larger than max_message_size. 311: too large. 403 for a topic: the user may not publish with
        // this routing key. Any other 403 concerns the exchange and would hit every message.
        Some(406 | 311) => PublisherError::Refused(text),
        Some(403) if text.contains("access to topic") => PublisherError::Refused(text),
        _ if concerns_a_channel(error) => PublisherError::Rejected(text),
        _ => PublisherError::Lost(text),
    }
}

#[cfg(test)]
mod tests {
    use lapin::protocol::{AMQPError, AMQPErrorKind, AMQPHardError, AMQPSoftError};

    use super::*;

    fn reply(kind: AMQPErrorKind, text: &str) -> lapin::Error {
        ErrorKind::ProtocolError(AMQPError::new(kind, text.into())).into()
    }

    #[test]
    fn only_a_reply_about_the_message_itself_blames_the_message() {
        const TOO_LARGE: &str = "message size 20 is larger than max size 16";
        const NO_TOPIC: &str = "write access to topic 'a' in exchange 'b' refused";
        const NO_EXCHANGE: &str = "write access to exchange 'b' refused";
        let soft = AMQPErrorKind::Soft;
        let refused = |text: &str| PublisherError::Refused(text.to_owned());
        let rejected = |text: &str| PublisherError::Rejected(text.to_owned());
        let lost = |text: &str| PublisherError::Lost(text.to_owned());
        let closed: lapin::Error = ErrorKind::InvalidConnectionState(lapin::ConnectionState::Closed).into();
        let closed_text = closed.to_string();
        for (error, expected, is_unreachable) in [
            (reply(soft(AMQPSoftError::PRECONDITIONFAILED), TOO_LARGE), refused(TOO_LARGE), false),
            (reply(soft(AMQPSoftError::CONTENTTOOLARGE), "too large"), refused("too large"), false),
            (reply(soft(AMQPSoftError::ACCESSREFUSED), NO_TOPIC), refused(NO_TOPIC), false),
            (reply(soft(AMQPSoftError::ACCESSREFUSED), NO_EXCHANGE), rejected(NO_EXCHANGE), false),
            (reply(soft(AMQPSoftError::NOTFOUND), "no exchange 'b'"), rejected("no exchange 'b'"), false),
            (reply(AMQPErrorKind::Hard(AMQPHardError::CONNECTIONFORCED), "shutdown"), lost("shutdown"), true),
            (closed, lost(&closed_text), true),
        ] {
            let class = classify(&error);
            assert_eq!(format!("{class:?}"), format!("{expected:?}"));
            assert_eq!(class.is_unreachable(), is_unreachable, "{class:?}");
        }
    }

    #[test]
    fn an_answer_is_what_the_broker_confirmed() {
        let verdict = |confirmation| Answer::read(Ok(confirmation)).map(|answer| answer.verdict);
        assert!(matches!(verdict(Confirmation::Ack(None)), Ok(Verdict::Acked)));
        assert!(matches!(verdict(Confirmation::Nack(None)), Ok(Verdict::Nacked)));
        assert!(matches!(verdict(Confirmation::NotRequested), Err(PublisherError::Lost(_))));
        let lost = ErrorKind::InvalidConnectionState(lapin::ConnectionState::Closed).into();
        assert!(matches!(Answer::read(Err(lost)), Err(PublisherError::Lost(_))));
    }
}
