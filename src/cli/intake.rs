//! Consuming what is there, and knowing when that was all: AMQP has no word for the end of a queue.

use std::time::Duration;

use futures_util::StreamExt;
use lapin::message::Delivery;
use lapin::options::{BasicCancelOptions, BasicConsumeOptions, BasicQosOptions, QueueDeclareOptions};
use lapin::types::FieldTable;
use lapin::{Channel, Consumer};
use tokio::time::timeout;

use super::messages::short;
use super::transfer::{TransferError, in_time};

/// Deliveries on the way at a time; the broker gives more as these are acknowledged. More than a batch of them.
const PREFETCH: u16 = 500;
const CONSUMER: &str = "prism-relay";

/// The only consumer of a channel.
pub struct Intake {
    channel: Channel,
    deliveries: Consumer,
    cancelled: bool,
    /// For an answer.
    deadline: Duration,
}

impl Intake {
    pub async fn open(
        channel: &Channel,
        queue: &str,
        arguments: FieldTable,
        deadline: Duration,
    ) -> Result<Self, TransferError> {
        let opening = async {
            // A stream gives nothing to a consumer without a prefetch.
            channel.basic_qos(PREFETCH, BasicQosOptions::default()).await?;
            channel.basic_consume(short(queue), CONSUMER.into(), BasicConsumeOptions::default(), arguments).await
        };
        let deliveries = in_time(deadline, opening).await?;
        Ok(Self { channel: channel.clone(), deliveries, cancelled: false, deadline })
    }

    /// The next message; `None` ends it: none has come for so long, and none is on its way, however slow that may be, because the
    /// broker confirms the end of a consumer after all that it has sent to it.
    pub async fn next(&mut self, quiet: Duration) -> Result<Option<Delivery>, TransferError> {
        if !self.cancelled {
            match timeout(quiet, self.deliveries.next()).await {
                Ok(delivery) => return Ok(Some(delivery.ok_or(TransferError::Lost)??)),
                Err(_) => self.cancel().await?,
            }
        }
        in_time(self.deadline, async { self.deliveries.next().await.transpose() }).await
    }

    /// What is not acknowledged by now stays with this channel until it is closed.
    pub async fn cancel(&mut self) -> Result<(), TransferError> {
        if self.cancelled {
            return Ok(());
        }
        let cancelling = self.channel.basic_cancel(CONSUMER.into(), BasicCancelOptions::default());
        in_time(self.deadline, cancelling).await?;
        self.cancelled = true;
        Ok(())
    }
}

/// How many messages of a queue could be delivered.
pub async fn count(channel: &Channel, queue: &str) -> Result<u32, lapin::Error> {
    let passive = QueueDeclareOptions { passive: true, ..Default::default() };
    Ok(channel.queue_declare(short(queue), passive, FieldTable::default()).await?.message_count())
}
