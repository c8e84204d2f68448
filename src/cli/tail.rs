//! `tail`: prints events as they pass, without taking them from anybody.

use std::io;
use std::num::NonZeroU64;

use futures_util::StreamExt;
use lapin::options::{BasicAckOptions, BasicConsumeOptions, BasicQosOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, Consumer};
use thiserror::Error;

use super::Failure;
use super::messages::{matches, print, queue_name, short};
use crate::broker::{BrokerConnection, reply_text};
use crate::config::Config;
use crate::topology::UNROUTED;

/// Events that the throw-away queue keeps for a slow terminal; the oldest go first.
const BACKLOG_MAX: i32 = 10_000;
/// Deliveries on the way at a time, when taking from a work queue.
const PREFETCH: u16 = 100;

#[derive(clap::Args)]
pub struct Options {
    /// Which events to print, as a topic pattern: * stands for one word, # for any number of words
    #[arg(default_value = "#")]
    pattern: String,
    /// Print a JSON object a line
    #[arg(long)]
    json: bool,
    /// Stop after so many events
    #[arg(long)]
    count: Option<NonZeroU64>,
    /// Work like a worker instead: take events from this queue and acknowledge them, so that nobody else gets them
    #[arg(long, value_name = "NAME", value_parser = queue_name)]
    queue: Option<String>,
}

#[derive(Debug, Error)]
enum TailError {
    #[error("the broker refuses: {0}. The relay declares exchanges and queues when it first connects")]
    Refused(String),
    #[error("the connection to the broker was lost")]
    Lost,
    #[error("cannot print")]
    Print(#[from] io::Error),
}

impl From<lapin::Error> for TailError {
    fn from(error: lapin::Error) -> Self {
        Self::Refused(reply_text(&error))
    }
}

pub async fn run(config: &Config, options: Options) -> Result<(), Failure> {
    let link = super::connect(config, "prism-relay tail").await?;
    let printed = tokio::select! {
        printed = print_events(config, &options, &link) => printed,
        // A person has seen enough.
        _ = tokio::signal::ctrl_c() => Ok(()),
    };
    link.close().await;
    match printed {
        // So has the program at the other end of the pipe.
        Err(TailError::Print(error)) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        printed => printed.map_err(Failure::new),
    }
}

async fn print_events(config: &Config, options: &Options, link: &BrokerConnection) -> Result<(), TailError> {
    let channel = link.connection.create_channel().await?;
    let mut deliveries = match &options.queue {
        Some(queue) => work(&channel, queue).await?,
        None => listen(config, &channel).await?,
    };
    let mut left = options.count.map(NonZeroU64::get);
    while left != Some(0) {
        let delivery = deliveries.next().await.ok_or(TailError::Lost)??;
        if matches(&options.pattern, delivery.routing_key.as_str()) {
            print(&delivery, options.json)?;
            left = left.map(|left| left - 1);
        }
        if options.queue.is_some() {
            delivery.acker.ack(BasicAckOptions::default()).await?;
        }
    }
    Ok(())
}

/// A queue of our own, gone with the connection.
///
/// It is bound like the work queues, and to what they leave over, instead of by the pattern: an event of an unknown
/// type would count as routed if a throw-away queue took it, and would be lost to prism.unrouted.
async fn listen(config: &Config, channel: &Channel) -> Result<Consumer, lapin::Error> {
    let mut arguments = FieldTable::default();
    arguments.insert("x-max-length".into(), AMQPValue::LongInt(BACKLOG_MAX));
    let options = QueueDeclareOptions { exclusive: true, auto_delete: true, ..Default::default() };
    let queue = channel.queue_declare("".into(), options, arguments).await?;
    let bindings = config.topology.queues.iter().flat_map(|queue| &queue.bindings);
    let bindings = bindings.map(|key| (config.publisher.exchange.as_str(), key.as_str())).chain([(UNROUTED, "")]);
    for (exchange, key) in bindings {
        let (exchange, key) = (short(exchange), short(key));
        channel
            .queue_bind(queue.name().clone(), exchange, key, QueueBindOptions::default(), FieldTable::default())
            .await?;
    }
    let options = BasicConsumeOptions { no_ack: true, exclusive: true, ..Default::default() };
    channel.basic_consume(queue.name().clone(), "".into(), options, FieldTable::default()).await
}

async fn work(channel: &Channel, queue: &str) -> Result<Consumer, lapin::Error> {
    channel.basic_qos(PREFETCH, BasicQosOptions::default()).await?;
    channel.basic_consume(short(queue), "".into(), BasicConsumeOptions::default(), FieldTable::default()).await
}
