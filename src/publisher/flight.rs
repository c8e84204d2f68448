//! One publish on its way: from handing it to lapin to its outcome.

use std::future::{Future, poll_fn, ready};
use std::pin::Pin;
use std::task::Poll;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use lapin::Channel;
use lapin::options::BasicPublishOptions;
use uuid::Uuid;

use super::message::Message;
use super::outcome::Outcome;
use crate::event::Event;
use crate::traces::Publishing;

/// What is remembered of an event while it is in flight; its body is with lapin.
pub(super) struct Flight {
    pub id: Uuid,
    pub bytes: usize,
    accepted_ms: i64,
    pub published_at: Instant,
    pub trace: Publishing,
}

/// An event that the broker has confirmed. It may have been returned, too.
pub(super) struct Confirmed {
    pub seq: u64,
    pub id: Uuid,
    /// From acceptance to the confirm.
    pub lag: Duration,
    pub trace: Publishing,
}

/// What comes out of the queue of futures.
pub(super) enum Completion {
    Published(u64, Outcome),
    /// All completions before this one have been seen.
    Marker(Vec<Confirmed>),
}

pub(super) type OnItsWay = Pin<Box<dyn Future<Output = Completion> + Send>>;

impl Flight {
    pub fn of(event: &Event, trace: Publishing) -> Self {
        let Event { id, accepted_ms, .. } = *event;
        Self { id, bytes: event.body.len(), accepted_ms, published_at: Instant::now(), trace }
    }

    /// From acceptance until now. A clock that was set back makes no negative age.
    pub fn age(&self) -> Duration {
        Duration::from_millis(u64::try_from(Timestamp::now().as_millisecond() - self.accepted_ms).unwrap_or(0))
    }
}

/// Hands the event to lapin. Its delivery tag is drawn and its frames are queued when the future is first polled, so that
/// is done here, in the order of the calls; the rest of the way can be polled in any order.
pub(super) async fn publish(channel: Channel, exchange: &str, seq: u64, message: Message) -> OnItsWay {
    let exchange = exchange.into();
    let mut publishing: OnItsWay = Box::pin(async move {
        let Message { routing_key, properties, body } = message;
        let options = BasicPublishOptions { mandatory: true, immediate: false };
        let sent = channel.basic_publish(exchange, routing_key, options, &body, properties).await;
        let confirmed = match sent {
            Ok(confirm) => confirm.await,
            Err(error) => Err(error),
        };
        Completion::Published(seq, Outcome::of(confirmed))
    });
    match poll_fn(|context| Poll::Ready(publishing.as_mut().poll(context))).await {
        Poll::Pending => publishing,
        Poll::Ready(completion) => Box::pin(ready(completion)),
    }
}
