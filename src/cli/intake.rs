//! Consuming what is there, and knowing when that was all: AMQP has no word for the end of a queue.

use std::pin::Pin;
use std::time::Duration;

use futures_util::{FutureExt, StreamExt};
use lapin::message::Delivery;
use lapin::options::{BasicCancelOptions, BasicConsumeOptions, BasicQosOptions, QueueDeclareOptions};
use lapin::types::FieldTable;
use lapin::{Channel, Consumer};
use tokio::time::{Instant, timeout};

use super::messages::short;
use super::transfer::{TransferError, in_time};

/// Deliveries on the way at a time; the broker gives more as these are acknowledged. More than a batch of them.
const PREFETCH: u16 = 500;
const CONSUMER: &str = "prism-relay";

/// An answer that comes within this is the queue's own.
const AT_ONCE: Duration = Duration::from_millis(200);
/// No answer comes at once where the line is slow. Where it is not, so many take two seconds.
const LOOKS_MAX: u32 = 8;

/// The only consumer of a channel.
pub struct Intake {
    channel: Channel,
    deliveries: Consumer,
    /// The broker's answer to the end of this: an error, if it fails.
    ending: Option<Pin<Box<dyn Future<Output = Option<lapin::Error>> + Send>>>,
    /// For an answer, or the next delivery before it.
    deadline: Duration,
    /// Whether the last one has been handed out.
    ended: bool,
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
        Ok(Self { channel: channel.clone(), deliveries, ending: None, deadline, ended: false })
    }

    /// The next message; `None` ends it: none has come for so long, and none is on its way, however slow that may be, because the
    /// broker confirms the end of a consumer after all that it has sent to it.
    pub async fn next(&mut self, quiet: Duration) -> Result<Option<Delivery>, TransferError> {
        if self.ending.is_none()
            && let Ok(delivery) = timeout(quiet, self.deliveries.next()).await
        {
            return Ok(Some(delivery.ok_or(TransferError::Lost)??));
        }
        self.rest().await
    }

    /// Takes no more. What is not acknowledged by now stays with the channel until it is closed.
    pub async fn end(&mut self) -> Result<(), TransferError> {
        while self.rest().await?.is_some() {}
        Ok(())
    }

    /// What was under way when this was ended; `None` after the last one.
    async fn rest(&mut self) -> Result<Option<Delivery>, TransferError> {
        if self.ended {
            return Ok(None);
        }
        let channel = &self.channel;
        let ending = self.ending.get_or_insert_with(|| {
            let channel = channel.clone();
            let ending =
                async move { channel.basic_cancel(CONSUMER.into(), BasicCancelOptions::default()).await.err() };
            Box::pin(ending.fuse())
        });
        let next = async {
            loop {
                tokio::select! {
                    biased;
                    delivery = self.deliveries.next() => return delivery.transpose(),
                    // With the answer the deliveries end as well.
                    failed = &mut *ending => if let Some(error) = failed { return Err(error) },
                }
            }
        };
        let next = in_time(self.deadline, next).await?;
        self.ended = next.is_none();
        Ok(next)
    }
}

/// How many messages of a queue could be delivered. RabbitMQ reports no messages and no consumers where a quorum queue's leader
/// does not answer it within 250 ms (`rabbit_quorum_queue:stat`), so that is believed if it came quicker, or again and again.
pub async fn count(channel: &Channel, queue: &str) -> Result<u32, lapin::Error> {
    let mut looks = 0;
    loop {
        let asked = Instant::now();
        let passive = QueueDeclareOptions { passive: true, ..Default::default() };
        let seen = channel.queue_declare(short(queue), passive, FieldTable::default()).await?;
        looks += 1;
        let is_none = seen.message_count() == 0 && seen.consumer_count() == 0;
        if !is_none || asked.elapsed() < AT_ONCE || looks == LOOKS_MAX {
            return Ok(seen.message_count());
        }
    }
}
