//! Moves messages in batches: a message is acknowledged only after the broker has confirmed its copy.

use std::time::Duration;

use lapin::message::Delivery;
use lapin::options::{BasicAckOptions, BasicPublishOptions, ConfirmSelectOptions};
use lapin::types::ShortString;
use lapin::{BasicProperties, Channel, Confirmation};
use thiserror::Error;
use tokio::time::{sleep, timeout};

use super::messages::with_original_key;
use super::pace;
use crate::broker::{BrokerConnection, reply_code, reply_text};
use crate::config::Config;
use crate::topology::EVENTS;

/// Maximum messages and bytes of a batch. They limit the memory, and what a failure delivers twice.
const BATCH_MAX: usize = 200;
const BATCH_BYTES_MAX: usize = 16 * 1024 * 1024;

/// How often the state of the connection is checked.
const CHECK_INTERVAL: Duration = Duration::from_millis(500);

#[derive(Debug, Error)]
pub(super) enum TransferError {
    #[error("the broker refused: {0}")]
    Refused(String),
    #[error("{to} did not accept a message ({reason}); the message stays where it is")]
    NotTaken { to: ShortString, reason: String },
    #[error("no answer from the broker within {0:?}; unconfirmed messages stay where they are")]
    Silent(Duration),
    #[error("lost the connection to the broker; unconfirmed messages stay where they are")]
    Lost,
    #[error(
        "the broker did not deliver {left} messages of {from}: another process holds them, or is the single active \
         consumer; stop it and run this again"
    )]
    NotDelivered { from: ShortString, left: u32 },
    #[error("interrupted; unconfirmed messages stay where they are: run this again")]
    Interrupted,
    #[error("cannot listen for Ctrl-C: {0}")]
    Signal(std::io::Error),
}

impl From<lapin::Error> for TransferError {
    fn from(error: lapin::Error) -> Self {
        match reply_code(&error) {
            Some(_) => Self::Refused(reply_text(&error)),
            None => Self::Lost,
        }
    }
}

/// Waits for a reply of the broker, with a deadline: a broker that blocks publishers does not reply to them at all.
pub(super) async fn in_time<T>(
    deadline: Duration,
    answer: impl Future<Output = Result<T, lapin::Error>>,
) -> Result<T, TransferError> {
    Ok(timeout(deadline, answer).await.map_err(|_| TransferError::Silent(deadline))??)
}

/// Runs `work` until it is done or the connection is lost. A call of lapin that starts just as the connection ends may
/// never return.
pub(super) async fn while_connected<T>(
    broker: &BrokerConnection,
    work: impl Future<Output = anyhow::Result<T>>,
) -> anyhow::Result<T> {
    let lost = async {
        while broker.connection.status().connected() {
            sleep(CHECK_INTERVAL).await;
        }
        // Time for `work` to fail with a more precise error.
        sleep(CHECK_INTERVAL).await;
    };
    tokio::select! {
        done = work => done,
        () = lost => Err(TransferError::Lost.into()),
    }
}

/// Where messages go.
#[derive(Clone, Debug)]
pub(super) enum Destination {
    /// An exchange; the message keeps its routing key.
    Exchange(ShortString),
    Queue(ShortString),
}

impl Destination {
    /// Chooses `queue` if given, otherwise the exchange of the work queues: published to the one in front of it,
    /// messages would be archived a second time. A queue with partitions is an exchange, which chooses the partition by
    /// the subject.
    pub(super) fn new(config: &Config, queue: Option<ShortString>) -> Self {
        let is_partitioned =
            |name: &str| config.topology.queues.iter().any(|queue| queue.name == name && queue.partitions.is_some());
        match queue {
            Some(queue) if is_partitioned(queue.as_str()) => Self::Exchange(queue),
            Some(queue) => Self::Queue(queue),
            None => Self::Exchange(EVENTS.into()),
        }
    }

    fn name(&self) -> &ShortString {
        let (Self::Exchange(name) | Self::Queue(name)) = self;
        name
    }

    /// Exchange, routing key and properties of a publish.
    fn address(&self, message: &Outgoing) -> (ShortString, ShortString, BasicProperties) {
        let Outgoing { key, properties, .. } = message;
        match self {
            Self::Exchange(exchange) => (exchange.clone(), key.clone(), properties.clone()),
            // The default exchange is bound to every queue by its name. A header keeps the key for a later redrive.
            Self::Queue(queue) => (ShortString::default(), queue.clone(), with_original_key(properties, key)),
        }
    }
}

impl std::fmt::Display for Destination {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name().as_str())
    }
}

/// A message to publish, and the delivery to acknowledge when the broker has confirmed it.
pub(super) struct Outgoing {
    pub to: Destination,
    pub key: ShortString,
    pub properties: BasicProperties,
    pub delivery: Delivery,
}

impl Outgoing {
    fn not_taken(&self, reason: &str) -> TransferError {
        TransferError::NotTaken { to: self.to.name().clone(), reason: reason.to_owned() }
    }
}

/// The broker's reply to a publish.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Confirmed,
    Rejected,
}

/// A channel in confirm mode, the next batch, and the number of moved messages.
pub(super) struct Transfer {
    channel: Channel,
    deadline: Duration,
    batch: Vec<Outgoing>,
    batch_max: usize,
    bytes: usize,
    moved: u64,
}

impl Transfer {
    /// Opens a channel in confirm mode. `rate`: messages per second, for the size of the batches.
    pub(super) async fn open(
        broker: &BrokerConnection,
        deadline: Duration,
        rate: Option<f64>,
    ) -> Result<Self, TransferError> {
        let opening = async {
            let channel = broker.connection.create_channel().await?;
            channel.confirm_select(ConfirmSelectOptions::default()).await?;
            Ok(channel)
        };
        let channel = in_time(deadline, opening).await?;
        let batch_max = pace::batch(rate, BATCH_MAX);
        Ok(Self { channel, deadline, batch: Vec::new(), batch_max, bytes: 0, moved: 0 })
    }

    /// The number of messages that were confirmed and acknowledged. It is right after an error, too.
    pub(super) fn moved(&self) -> u64 {
        self.moved
    }

    /// Whether every message that was added is confirmed.
    pub(super) fn is_flushed(&self) -> bool {
        self.batch.is_empty()
    }

    /// Adds a message to the batch, and moves the batch if it is full.
    pub(super) async fn add(&mut self, message: Outgoing) -> Result<(), TransferError> {
        self.bytes += message.delivery.data.len();
        self.batch.push(message);
        if self.batch.len() < self.batch_max && self.bytes < BATCH_BYTES_MAX {
            return Ok(());
        }
        self.flush().await
    }

    /// Publishes the batch in its order, waits until every message is confirmed or rejected, and only then
    /// acknowledges the confirmed ones. After any other failure it acknowledges no message of the batch: some may be
    /// delivered twice, none is lost.
    pub(super) async fn flush(&mut self) -> Result<(), TransferError> {
        let batch = std::mem::take(&mut self.batch);
        self.bytes = 0;
        let verdicts = self.publish(&batch).await?;
        let moved = &mut self.moved;
        let acks = async {
            for (message, _) in batch.iter().zip(&verdicts).filter(|(_, verdict)| **verdict == Verdict::Confirmed) {
                message.delivery.acker.ack(BasicAckOptions::default()).await?;
                *moved += 1;
            }
            Ok(())
        };
        in_time(self.deadline, acks).await?;
        match batch.iter().zip(&verdicts).find(|(_, verdict)| **verdict == Verdict::Rejected) {
            Some((message, _)) => Err(message.not_taken("a queue is full, or could not store it")),
            None => Ok(()),
        }
    }

    /// One verdict for each message of the batch, in its order.
    async fn publish(&self, batch: &[Outgoing]) -> Result<Vec<Verdict>, TransferError> {
        let mut confirms = Vec::with_capacity(batch.len());
        for message in batch {
            let (exchange, key, properties) = message.to.address(message);
            let options = BasicPublishOptions { mandatory: true, immediate: false };
            let sending = self.channel.basic_publish(exchange, key, options, &message.delivery.data, properties);
            confirms.push(in_time(self.deadline, sending).await?);
        }
        let mut verdicts = Vec::with_capacity(batch.len());
        for (confirm, message) in confirms.into_iter().zip(batch) {
            // Each confirm gets the whole deadline, because a slow line needs long for all of them.
            verdicts.push(match in_time(self.deadline, confirm).await? {
                Confirmation::Ack(None) => Verdict::Confirmed,
                Confirmation::Nack(None) => Verdict::Rejected,
                // lapin may attach a return to the confirm of another message, so it counts for the whole batch.
                Confirmation::Ack(Some(returned)) | Confirmation::Nack(Some(returned)) => {
                    return Err(message.not_taken(returned.reply_text.as_str()));
                }
                Confirmation::NotRequested => return Err(message.not_taken("the channel is not in confirm mode")),
            });
        }
        Ok(verdicts)
    }
}
