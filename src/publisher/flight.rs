//! One publish, from the call of lapin to its outcome.

use std::future::{Future, poll_fn, ready};
use std::pin::Pin;
use std::task::Poll;

use lapin::Channel;
use lapin::options::BasicPublishOptions;

use super::error::PublisherError;
use super::message::Message;
use super::outcome::Answer;
use super::window::Confirmed;
use crate::traces::PublishSpan;

/// What the queue of publish futures yields.
pub(super) enum Completion {
    Published {
        seq: u64,
        answer: Result<Answer, PublisherError>,
    },
    /// Every completion queued before this marker has been yielded.
    Marker(Vec<Confirmed<PublishSpan>>),
}

pub(super) type PublishFuture = Pin<Box<dyn Future<Output = Completion> + Send>>;

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
        Completion::Published { seq, answer: Answer::read(confirmation) }
    });
    match poll_fn(|context| Poll::Ready(publishing.as_mut().poll(context))).await {
        Poll::Pending => publishing,
        Poll::Ready(completion) => Box::pin(ready(completion)),
    }
}
