//! Reads what a queue or a stream holds now, and finds its end: AMQP does not mark the end of a queue.

use std::pin::Pin;
use std::time::Duration;

use futures_util::{FutureExt, StreamExt};
use lapin::Channel;
use lapin::message::Delivery;
use lapin::options::{BasicCancelOptions, BasicConsumeOptions, BasicQosOptions, QueueDeclareOptions};
use lapin::types::{FieldTable, ShortString};
use tokio::time::{Instant, timeout};

use super::transfer::{TransferError, in_time};

/// Unacknowledged deliveries at most. It is larger than a batch of a transfer, which acknowledges nothing before it is
/// full.
const PREFETCH: u16 = 500;
const CONSUMER_TAG: &str = "prism-relay";

/// An answer that takes less than this comes from the queue itself.
const AT_ONCE: Duration = Duration::from_millis(200);
/// Over a slow line no answer takes less than [`AT_ONCE`]. Otherwise this many take two seconds.
const ATTEMPTS_MAX: u32 = 8;

/// The only consumer of a channel.
pub(super) struct Consumer {
    channel: Channel,
    deliveries: lapin::Consumer,
    /// The cancellation of the consumer, once it was requested; it yields an error if that fails.
    cancellation: Option<Pin<Box<dyn Future<Output = Option<lapin::Error>> + Send>>>,
    /// For an answer of the broker, and for the next delivery before that answer.
    deadline: Duration,
    ended: bool,
}

impl Consumer {
    pub(super) async fn open(
        channel: &Channel,
        queue: &ShortString,
        arguments: FieldTable,
        deadline: Duration,
    ) -> Result<Self, TransferError> {
        let opening = async {
            // A stream delivers nothing to a consumer without a prefetch.
            channel.basic_qos(PREFETCH, BasicQosOptions::default()).await?;
            let options = BasicConsumeOptions::default();
            channel.basic_consume(queue.clone(), CONSUMER_TAG.into(), options, arguments).await
        };
        let deliveries = in_time(deadline, opening).await?;
        Ok(Self { channel: channel.clone(), deliveries, cancellation: None, deadline, ended: false })
    }

    /// The next message. After `quiet` without one it cancels the consumer, and returns `None` after the last delivery.
    /// That is safe on a slow line: the broker confirms the cancellation after all that it has sent.
    pub(super) async fn next(&mut self, quiet: Duration) -> Result<Option<Delivery>, TransferError> {
        if self.cancellation.is_none()
            && let Ok(delivery) = timeout(quiet, self.deliveries.next()).await
        {
            return Ok(Some(delivery.ok_or(TransferError::Lost)??));
        }
        self.rest().await
    }

    /// Cancels the consumer. Unacknowledged messages stay with the channel until it is closed.
    pub(super) async fn end(&mut self) -> Result<(), TransferError> {
        while self.rest().await?.is_some() {}
        Ok(())
    }

    /// What was on its way when the consumer was cancelled; `None` after the last one.
    async fn rest(&mut self) -> Result<Option<Delivery>, TransferError> {
        if self.ended {
            return Ok(None);
        }
        let channel = &self.channel;
        let cancellation = self.cancellation.get_or_insert_with(|| {
            let channel = channel.clone();
            let cancel =
                async move { channel.basic_cancel(CONSUMER_TAG.into(), BasicCancelOptions::default()).await.err() };
            Box::pin(cancel.fuse())
        });
        let next = async {
            loop {
                tokio::select! {
                    biased;
                    delivery = self.deliveries.next() => return delivery.transpose(),
                    // The broker's answer ends the deliveries as well.
                    failed = &mut *cancellation => if let Some(error) = failed { return Err(error) },
                }
            }
        };
        let next = in_time(self.deadline, next).await?;
        self.ended = next.is_none();
        Ok(next)
    }
}

/// How many messages a queue could deliver. RabbitMQ reports no messages and no consumers if the leader of a quorum
/// queue does not answer it within 250 ms (`rabbit_quorum_queue:stat`). So that report counts only if it came quickly,
/// or again and again.
pub(super) async fn count(channel: &Channel, queue: &ShortString) -> Result<u32, lapin::Error> {
    let mut attempts = 0;
    loop {
        let asked = Instant::now();
        let passive = QueueDeclareOptions { passive: true, ..Default::default() };
        let seen = channel.queue_declare(queue.clone(), passive, FieldTable::default()).await?;
        attempts += 1;
        let is_none = seen.message_count() == 0 && seen.consumer_count() == 0;
        if !is_none || asked.elapsed() < AT_ONCE || attempts == ATTEMPTS_MAX {
            return Ok(seen.message_count());
        }
    }
}
