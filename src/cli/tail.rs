//! `tail`: prints events as they are published, without taking them from workers.

use std::io::{self, Write};
use std::num::NonZeroU64;

use anyhow::{Context, anyhow};
use futures_util::StreamExt;
use lapin::message::Delivery;
use lapin::options::{BasicAckOptions, BasicConsumeOptions, BasicQosOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{Channel, Consumer};

use super::connect::connect;
use super::curl;
use super::messages::{Format, matches, print, queue_name};
use super::output::write;
use super::pattern::{note_on_pattern, topic_pattern};
use crate::broker::{BrokerConnection, reply_text, short_string};
use crate::config::Config;
use crate::topology::UNROUTED;

/// Maximum events that the temporary queue keeps for a slow terminal. A full queue drops the oldest.
const BACKLOG_MAX: i32 = 10_000;
/// Maximum unacknowledged deliveries of a work queue.
const PREFETCH: u16 = 100;

#[derive(clap::Args)]
pub(super) struct Options {
    /// Only routing keys that match this topic pattern (*: one word, #: any number)
    #[arg(default_value = "#", value_parser = topic_pattern)]
    pattern: String,
    /// Print one JSON object per line
    #[arg(long)]
    json: bool,
    /// Print shell commands that post the events with curl, signed with $PRISM_SECRET; userToken is hidden
    #[arg(long, conflicts_with = "json")]
    as_curl: bool,
    /// Stop after this many events
    #[arg(long)]
    count: Option<NonZeroU64>,
    /// Consume this queue as a worker does: its workers do not get these events
    #[arg(long, value_name = "NAME", value_parser = queue_name)]
    queue: Option<ShortString>,
}

pub(super) async fn run(config: &Config, options: Options) -> anyhow::Result<()> {
    note_on_pattern(&options.pattern);
    let broker = connect(config, "prism-relay tail").await?;
    let printed = tokio::select! {
        printed = print_events(config, &options, &broker) => printed,
        // Ctrl-C is the normal end.
        _ = tokio::signal::ctrl_c() => Ok(()),
    };
    broker.close().await;
    printed
}

async fn print_events(config: &Config, options: &Options, broker: &BrokerConnection) -> anyhow::Result<()> {
    let channel = broker.connection.create_channel().await.map_err(refused)?;
    let mut deliveries = match &options.queue {
        Some(queue) => work(&channel, queue).await.map_err(refused)?,
        None => listen(config, &channel).await?,
    };
    // Scripts wait for this line: the queue gets only events that are published from now on.
    let _ = writeln!(io::stderr().lock(), "waiting for events; Ctrl-C ends this command");
    let mut left = options.count.map(NonZeroU64::get);
    while left != Some(0) {
        let delivery = deliveries.next().await.context("the connection to the broker was lost")?.map_err(refused)?;
        if matches(&options.pattern, delivery.routing_key.as_str()) {
            match print_one(config, options, &delivery) {
                // The reader of the pipe has exited.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
                printed => printed.context("cannot print")?,
            }
            left = left.map(|left| left - 1);
        }
        if options.queue.is_some() {
            delivery.acker.ack(BasicAckOptions::default()).await.map_err(refused)?;
        }
    }
    Ok(())
}

fn print_one(config: &Config, options: &Options, delivery: &Delivery) -> io::Result<()> {
    if options.as_curl {
        let command = curl::command(config, &delivery.data).unwrap_or_else(|error| format!("# {error}"));
        return write(format!("{command}\n\n").as_bytes());
    }
    print(delivery, if options.json { Format::Json } else { Format::Text })
}

fn refused(error: lapin::Error) -> anyhow::Error {
    let reply = reply_text(&error);
    anyhow!("the broker refused: {reply}; the relay declares exchanges and queues when it first connects")
}

/// Declares a temporary queue, which the broker deletes with the connection, and consumes it.
///
/// The queue gets every event from the fanout exchange; the pattern is applied here. If `broker.exchange` is a topic
/// exchange of the operator, the queue gets what the work queues get and what is unrouted. Bound by the pattern, it
/// would make an event of an unknown type count as routed, and prism.unrouted would lose it.
async fn listen(config: &Config, channel: &Channel) -> anyhow::Result<Consumer> {
    let mut arguments = FieldTable::default();
    arguments.insert("x-max-length".into(), AMQPValue::LongInt(BACKLOG_MAX));
    let options = QueueDeclareOptions { exclusive: true, auto_delete: true, ..Default::default() };
    let queue = channel.queue_declare("".into(), options, arguments).await.map_err(refused)?;
    let queue = queue.name();
    let bindings = config.topology.queues.iter().flat_map(|queue| &queue.bindings);
    let exchange = config.publisher.exchange.as_str();
    let bindings = bindings.map(|key| (exchange, key.as_str())).chain([(exchange, ""), (UNROUTED, "")]);
    for (exchange, key) in bindings {
        let (exchange, key, options) = (short_string(exchange)?, short_string(key)?, QueueBindOptions::default());
        channel.queue_bind(queue.clone(), exchange, key, options, FieldTable::default()).await.map_err(refused)?;
    }
    let options = BasicConsumeOptions { no_ack: true, exclusive: true, ..Default::default() };
    channel.basic_consume(queue.clone(), "".into(), options, FieldTable::default()).await.map_err(refused)
}

async fn work(channel: &Channel, queue: &ShortString) -> Result<Consumer, lapin::Error> {
    channel.basic_qos(PREFETCH, BasicQosOptions::default()).await?;
    channel.basic_consume(queue.clone(), "".into(), BasicConsumeOptions::default(), FieldTable::default()).await
}
