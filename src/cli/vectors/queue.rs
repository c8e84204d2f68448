//! The queue of a run: made at its beginning, deleted at its end. Rejected messages are dead-lettered to a reply queue.

use std::time::Duration;

use anyhow::anyhow;
use lapin::message::Delivery;
use lapin::options::{
    BasicConsumeOptions, BasicGetOptions, ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions,
    QueueDeleteOptions,
};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{Channel, Consumer, ExchangeKind};
use serde_json::Value;
use tokio::time::timeout;
use uuid::Uuid;

use super::judge::Counted;
use crate::broker::{BrokerConnection, Management, encoded, reply_code, short_string};
use crate::cli::transfer::{TransferError, in_time};

/// Returns to the queue after which a message is dead-lettered, as in a work queue by default.
const DELIVERY_LIMIT: i32 = 20;
/// The broker deletes the queue of a run that was killed after this time without a worker, in milliseconds.
const EXPIRES_MS: i32 = 600_000;
/// AMQP's code for a queue that does not exist.
const NOT_FOUND: u16 = 404;
/// AMQP's code for the exclusive queue of another connection.
const LOCKED: u16 = 405;

/// The queue that the worker consumes.
pub(super) struct TestQueue<'a> {
    pub(super) name: &'a ShortString,
    pub(super) broker: &'a BrokerConnection,
    pub(super) management: Management,
    /// Maximum time for a reply of the broker.
    pub(super) deadline: Duration,
}

/// Where the messages of a run come from, and where the rejected ones go.
pub(super) struct Ends {
    /// Publishes to the queue under any routing key.
    pub(super) exchange: ShortString,
    /// Gets each rejected message.
    pub(super) replies: Consumer,
}

impl TestQueue<'_> {
    /// An existing queue may have messages and consumers that are not meant, and other properties. One that an earlier
    /// run left, because it was killed or lost its connection, is deleted.
    pub(super) async fn refuse_existing(&self) -> anyhow::Result<()> {
        if !self.exists(self.name).await? {
            return Ok(());
        }
        let queue: Value = self.management.get(&self.path()).await?;
        match queue["arguments"]["x-dead-letter-routing-key"].as_str() {
            Some(replies) if replies.starts_with(&self.reply_prefix()) => {
                if self.exists(&short_string(replies)?).await? {
                    return Err(anyhow!("another run plays to {}: wait for its end, or name another", self.name));
                }
                Ok(self.delete().await?)
            }
            _ => Err(anyhow!(
                "{queue} exists already: this command makes the queue, so that no other message is in it. Name one \
                 that does not exist, or delete this one if it is a test queue: rabbitmqctl delete_queue {queue}",
                queue = self.name
            )),
        }
    }

    async fn exists(&self, queue: &ShortString) -> Result<bool, TransferError> {
        let probe = in_time(self.deadline, self.broker.connection.create_channel()).await?;
        let passive = QueueDeclareOptions { passive: true, ..Default::default() };
        match timeout(self.deadline, probe.queue_declare(queue.clone(), passive, FieldTable::default())).await {
            Ok(Ok(_)) => Ok(true),
            Ok(Err(error)) if reply_code(&error) == Some(NOT_FOUND) => Ok(false),
            Ok(Err(error)) if reply_code(&error) == Some(LOCKED) => Ok(true),
            Ok(Err(error)) => Err(error.into()),
            Err(_) => Err(TransferError::Silent(self.deadline)),
        }
    }

    /// The reply queue of a run is named after the queue, and goes with the connection of the run.
    fn reply_prefix(&self) -> String {
        format!("{}.replies.", self.name)
    }

    /// Declares the queue, the reply queue, and an exchange with the name of that, which goes with its last binding.
    pub(super) async fn declare(&self, channel: &Channel) -> anyhow::Result<Ends> {
        let exchange = short_string(&format!("{}{}", self.reply_prefix(), Uuid::now_v7().simple()))?;
        let declaring = async {
            let (replies, none) = (exchange.clone(), FieldTable::default);
            let own = QueueDeclareOptions { exclusive: true, auto_delete: true, ..Default::default() };
            channel.queue_declare(replies.clone(), own, none()).await?;
            let durable = QueueDeclareOptions { durable: true, ..Default::default() };
            channel.queue_declare(self.name.clone(), durable, arguments(&replies)).await?;
            let options = ExchangeDeclareOptions { auto_delete: true, ..Default::default() };
            channel.exchange_declare(exchange.clone(), ExchangeKind::Fanout, options, none()).await?;
            let binding = QueueBindOptions::default();
            channel.queue_bind(self.name.clone(), exchange.clone(), "".into(), binding, none()).await?;
            let options = BasicConsumeOptions { no_ack: true, ..Default::default() };
            channel.basic_consume(replies, "".into(), options, none()).await
        };
        let replies = in_time(self.deadline, declaring).await?;
        Ok(Ends { exchange, replies })
    }

    /// On a channel of its own, because an error may have closed the others.
    pub(super) async fn delete(&self) -> Result<(), TransferError> {
        let deleting = async {
            let channel = self.broker.connection.create_channel().await?;
            channel.queue_delete(self.name.clone(), QueueDeleteOptions::default()).await
        };
        in_time(self.deadline, deleting).await.map(drop)
    }

    /// Takes a message out of the queue.
    pub(super) async fn get(&self, channel: &Channel) -> Result<Option<Delivery>, TransferError> {
        let options = BasicGetOptions { no_ack: true };
        Ok(in_time(self.deadline, channel.basic_get(self.name.clone(), options)).await?.map(|got| got.delivery))
    }

    /// What the management API has counted. It may not know the new queue yet.
    pub(super) async fn counted(&self) -> Counted {
        self.management.get::<Value>(&self.path()).await.map(|queue| Counted::of(&queue)).unwrap_or_default()
    }

    fn path(&self) -> String {
        format!("queues/{}/{}", encoded(self.management.vhost()), encoded(self.name.as_str()))
    }
}

fn arguments(replies: &ShortString) -> FieldTable {
    let mut arguments = FieldTable::default();
    for (name, value) in
        [("x-queue-type", "quorum"), ("x-dead-letter-exchange", ""), ("x-dead-letter-routing-key", replies.as_str())]
    {
        arguments.insert(name.into(), AMQPValue::LongString(value.into()));
    }
    arguments.insert("x-delivery-limit".into(), AMQPValue::LongInt(DELIVERY_LIMIT));
    arguments.insert("x-expires".into(), AMQPValue::LongInt(EXPIRES_MS));
    arguments
}
