//! Reads the messages that a queue or a stream has now. AMQP does not mark the last one, so this module finds it.

use std::pin::Pin;
use std::time::Duration;

use futures_util::{FutureExt, StreamExt};
use lapin::Channel;
use lapin::message::Delivery;
use lapin::options::{BasicCancelOptions, BasicConsumeOptions, BasicQosOptions};
use lapin::types::{FieldTable, ShortString};
use tokio::time::timeout;

use super::pace;
use super::transfer::{TransferError, in_time};
use crate::broker::counts;

/// Maximum unacknowledged deliveries. Must be larger than a batch of a transfer, because a batch is acknowledged only
/// when it is full.
const PREFETCH_MAX: u16 = 500;
const CONSUMER_TAG: &str = "prism-relay";

/// Maximum number of attempts to count a queue: over a slow line every reply takes so long that it may not come from
/// the queue itself. With RabbitMQ's timeout of 250 ms this many take two seconds.
const ATTEMPTS_MAX: u32 = 8;

/// The only consumer of a channel.
pub(super) struct Consumer {
    channel: Channel,
    deliveries: lapin::Consumer,
    /// The request to cancel the consumer, once it was made. It resolves to the error if the request fails.
    cancellation: Option<Pin<Box<dyn Future<Output = Option<lapin::Error>> + Send>>>,
    /// Maximum time for a reply of the broker, or for a delivery that comes before the reply.
    deadline: Duration,
    ended: bool,
}

impl Consumer {
    /// `rate`: messages per second, for the number of messages that are read ahead.
    pub(super) async fn open(
        channel: &Channel,
        queue: &ShortString,
        arguments: FieldTable,
        rate: Option<f64>,
        deadline: Duration,
    ) -> Result<Self, TransferError> {
        let opening = async {
            // A stream delivers nothing to a consumer without a prefetch.
            channel.basic_qos(pace::read_ahead(rate, PREFETCH_MAX), BasicQosOptions::default()).await?;
            let options = BasicConsumeOptions::default();
            channel.basic_consume(queue.clone(), CONSUMER_TAG.into(), options, arguments).await
        };
        let deliveries = in_time(deadline, opening).await?;
        Ok(Self { channel: channel.clone(), deliveries, cancellation: None, deadline, ended: false })
    }

    /// Returns the next message. After `quiet` without one it cancels the consumer, and returns `None` after the last
    /// delivery. This is safe on a slow line: the broker confirms the cancellation after its last delivery.
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

    /// Cancels the consumer and returns the next delivery that was already in transit; `None` after the last one.
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
                    // On success the stream of deliveries ends, too.
                    failed = &mut *cancellation => if let Some(error) = failed { return Err(error) },
                }
            }
        };
        let next = in_time(self.deadline, next).await?;
        self.ended = next.is_none();
        Ok(next)
    }
}

/// The number of ready messages in a queue. After [`ATTEMPTS_MAX`] reports that may not come from the queue itself it
/// is taken to be empty.
pub(super) async fn count(channel: &Channel, queue: &ShortString) -> Result<u32, lapin::Error> {
    Ok(counts(channel, queue, Duration::ZERO, ATTEMPTS_MAX).await?.map_or(0, |counts| counts.messages))
}
