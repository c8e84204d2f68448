//! Passing messages on: a batch at a time, of which nothing is let go before the broker has confirmed all of it.

use std::time::Duration;

use lapin::message::Delivery;
use lapin::options::{BasicAckOptions, BasicPublishOptions};
use lapin::types::ShortString;
use lapin::{BasicProperties, Channel, Confirmation};
use thiserror::Error;
use tokio::time::{sleep, timeout};

use super::messages::{short, with_original_key};
use crate::broker::{BrokerConnection, reply_code, reply_text};
use crate::config::Config;

/// Messages between two waits for the broker.
const BATCH_MAX: usize = 200;
/// And their bodies.
const BATCH_BYTES_MAX: usize = 16 * 1024 * 1024;

/// Between two looks at the connection.
const LOOK: Duration = Duration::from_millis(500);

#[derive(Debug, Error)]
pub enum TransferError {
    #[error("the broker refuses: {0}")]
    Refused(String),
    #[error("{to} did not take a message ({reason}); it stays where it is")]
    NotTaken { to: String, reason: String },
    #[error("no answer from the broker within {0:?}; what it has not confirmed stays where it is")]
    Silent(Duration),
    #[error("the connection to the broker was lost; what it has not confirmed stays where it is")]
    Lost,
    #[error("{left} messages of {from} were not delivered to us: is there another consumer, a single active one?")]
    NotDelivered { from: String, left: u32 },
    #[error("interrupted; the rest is where it was")]
    Interrupted,
}

impl From<lapin::Error> for TransferError {
    fn from(error: lapin::Error) -> Self {
        match reply_code(&error) {
            Some(_) => Self::Refused(reply_text(&error)),
            None => Self::Lost,
        }
    }
}

/// An answer of the broker, in time: one that blocks publishers answers nothing at all.
pub async fn in_time<T>(
    deadline: Duration,
    answer: impl Future<Output = Result<T, lapin::Error>>,
) -> Result<T, TransferError> {
    Ok(timeout(deadline, answer).await.map_err(|_| TransferError::Silent(deadline))??)
}

/// Does something for as long as there is a connection: lapin may leave somebody waiting who asks just when it ends.
pub async fn while_connected<T, E: From<TransferError>>(
    link: &BrokerConnection,
    doing: impl Future<Output = Result<T, E>>,
) -> Result<T, E> {
    let lost = async {
        while link.connection.status().connected() {
            sleep(LOOK).await;
        }
        // Whoever waits learns the reason, if there is one.
        sleep(LOOK).await;
    };
    tokio::select! {
        done = doing => done,
        () = lost => Err(TransferError::Lost.into()),
    }
}

/// Where messages go.
#[derive(Clone, Debug)]
pub enum Destination {
    /// Under the key of the message.
    Exchange(String),
    Queue(String),
}

impl Destination {
    /// The exchange of the configuration, or a queue if one was asked for.
    pub fn new(config: &Config, queue: Option<&str>) -> Self {
        queue.map_or_else(|| Self::Exchange(config.publisher.exchange.clone()), |queue| Self::Queue(queue.to_owned()))
    }

    /// Exchange, routing key and properties of a publish.
    fn address(&self, parcel: &Parcel) -> (ShortString, ShortString, BasicProperties) {
        let Parcel { key, properties, .. } = parcel;
        match self {
            Self::Exchange(exchange) => (short(exchange), key.clone(), properties.clone()),
            // The default exchange is bound to every queue by its name. A header keeps the key for a later redrive.
            Self::Queue(queue) => (ShortString::default(), short(queue), with_original_key(properties, key)),
        }
    }
}

impl std::fmt::Display for Destination {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (Self::Exchange(name) | Self::Queue(name)) = self;
        f.write_str(name)
    }
}

/// A message on its way to somewhere else.
pub struct Parcel {
    pub to: Destination,
    pub key: ShortString,
    pub properties: BasicProperties,
    pub delivery: Delivery,
}

impl Parcel {
    fn not_taken(&self, reason: &str) -> TransferError {
        TransferError::NotTaken { to: self.to.to_string(), reason: reason.to_owned() }
    }
}

/// A channel in confirm mode and what is to be published on it next.
pub struct Transfer {
    channel: Channel,
    deadline: Duration,
    batch: Vec<Parcel>,
    bytes: usize,
}

impl Transfer {
    pub fn new(channel: Channel, config: &Config) -> Self {
        Self { channel, deadline: config.publisher.confirm_timeout, batch: Vec::new(), bytes: 0 }
    }

    /// Passes a message on with the next batch, which is this one if it is full. `moved` grows by what has been moved, also
    /// where there is an error.
    pub async fn add(&mut self, parcel: Parcel, moved: &mut u64) -> Result<(), TransferError> {
        self.bytes += parcel.delivery.data.len();
        self.batch.push(parcel);
        if self.batch.len() < BATCH_MAX && self.bytes < BATCH_BYTES_MAX {
            return Ok(());
        }
        self.flush(moved).await
    }

    /// Publishes the batch in its order, waits until all of it is confirmed or rejected, and only then acknowledges what the
    /// confirmed ones came from. Where anything else goes wrong nothing of the batch is acknowledged: it may be there twice, but
    /// it is not lost.
    pub async fn flush(&mut self, moved: &mut u64) -> Result<(), TransferError> {
        let batch = std::mem::take(&mut self.batch);
        self.bytes = 0;
        let confirmed = self.publish(&batch).await?;
        let acks = async {
            for (parcel, _) in batch.iter().zip(&confirmed).filter(|(_, confirmed)| **confirmed) {
                parcel.delivery.acker.ack(BasicAckOptions::default()).await?;
                *moved += 1;
            }
            Ok(())
        };
        in_time(self.deadline, acks).await?;
        match batch.iter().zip(&confirmed).find(|(_, confirmed)| !**confirmed) {
            Some((parcel, _)) => Err(parcel.not_taken("a queue is full, or could not store it")),
            None => Ok(()),
        }
    }

    /// Of each whether it is confirmed, or rejected.
    async fn publish(&self, batch: &[Parcel]) -> Result<Vec<bool>, TransferError> {
        let mut confirms = Vec::with_capacity(batch.len());
        for parcel in batch {
            let (exchange, key, properties) = parcel.to.address(parcel);
            let options = BasicPublishOptions { mandatory: true, immediate: false };
            let sending = self.channel.basic_publish(exchange, key, options, &parcel.delivery.data, properties);
            confirms.push(in_time(self.deadline, sending).await?);
        }
        let mut confirmed = Vec::with_capacity(batch.len());
        for (confirm, parcel) in confirms.into_iter().zip(batch) {
            // Each has its time: a slow line takes long for all of them.
            confirmed.push(match in_time(self.deadline, confirm).await? {
                Confirmation::Ack(None) => true,
                Confirmation::Nack(None) => false,
                // A return comes before its own confirm, but lapin may hand it to another one: it counts for the whole batch.
                Confirmation::Ack(Some(returned)) | Confirmation::Nack(Some(returned)) => {
                    return Err(parcel.not_taken(returned.reply_text.as_str()));
                }
                Confirmation::NotRequested => return Err(parcel.not_taken("it confirms nothing")),
            });
        }
        Ok(confirmed)
    }
}
