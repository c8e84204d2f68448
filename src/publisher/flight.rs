//! One publish in flight, from the call of lapin to its outcome.

use std::future::{Future, poll_fn, ready};
use std::pin::Pin;
use std::task::Poll;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use lapin::Channel;
use lapin::options::BasicPublishOptions;
use uuid::Uuid;

use super::message::Message;
use super::outcome::PublishOutcome;
use crate::event::Event;
use crate::traces::PublishSpan;

/// What the session remembers of an event in flight. lapin holds the body.
pub(super) struct Flight {
    pub id: Uuid,
    pub body_bytes: usize,
    accepted_ms: i64,
    pub published_at: Instant,
    pub span: PublishSpan,
}

/// An event that the broker confirmed. The broker may have returned it as well.
pub(super) struct Confirmed {
    pub seq: u64,
    pub id: Uuid,
    /// Time from acceptance to the confirm.
    pub lag: Duration,
    pub span: PublishSpan,
}

/// What the queue of publish futures yields.
pub(super) enum Completion {
    Published {
        seq: u64,
        outcome: PublishOutcome,
    },
    /// Every completion queued before this marker has been yielded.
    Marker(Vec<Confirmed>),
}

pub(super) type PublishFuture = Pin<Box<dyn Future<Output = Completion> + Send>>;

impl Flight {
    pub(super) fn new(event: &Event, span: PublishSpan) -> Self {
        let Event { id, accepted_ms, .. } = *event;
        Self { id, body_bytes: event.body.len(), accepted_ms, published_at: Instant::now(), span }
    }

    /// The event of this flight, confirmed now.
    pub(super) fn confirmed(self, seq: u64) -> Confirmed {
        let lag_ms = Timestamp::now().as_millisecond() - self.accepted_ms;
        // Zero if the clock was set back.
        let lag = Duration::from_millis(u64::try_from(lag_ms).unwrap_or(0));
        Confirmed { seq, id: self.id, lag, span: self.span }
    }
}

/// Publishes a message. lapin assigns the delivery tag and queues the frames on the first poll, which happens here, so
/// that events are published in the order of the calls. The returned futures may be polled in any order.
pub(super) async fn publish(channel: Channel, exchange: &str, seq: u64, message: Message) -> PublishFuture {
    let exchange = exchange.into();
    let mut publishing: PublishFuture = Box::pin(async move {
        let Message { routing_key, properties, body } = message;
        let options = BasicPublishOptions { mandatory: true, immediate: false };
        let confirmation = match channel.basic_publish(exchange, routing_key, options, &body, properties).await {
            Ok(confirm) => confirm.await,
            Err(error) => Err(error),
        };
        Completion::Published { seq, outcome: PublishOutcome::new(confirmation) }
    });
    match poll_fn(|context| Poll::Ready(publishing.as_mut().poll(context))).await {
        Poll::Pending => publishing,
        Poll::Ready(completion) => Box::pin(ready(completion)),
    }
}
