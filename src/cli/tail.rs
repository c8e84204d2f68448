//! `tail`: prints events as they pass, without taking them from anybody.

use std::io::{self, Write};
use std::num::NonZeroU64;

use futures_util::StreamExt;
use lapin::message::Delivery;
use lapin::options::{BasicAckOptions, BasicConsumeOptions, BasicQosOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{Channel, Consumer};
use serde::Serialize;
use thiserror::Error;

use super::{Failure, clean};
use crate::config::Config;
use crate::publisher::Link;
use crate::topology::{UNROUTED, reply_text};

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
    #[arg(long, value_name = "NAME")]
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

/// What is told of an event: nothing of its body.
#[derive(Serialize)]
struct Line<'a> {
    time: &'a str,
    key: &'a str,
    subject: &'a str,
    state: &'a str,
    id: &'a str,
    verified: bool,
    redelivered: bool,
}

pub async fn run(config: &Config, options: Options) -> Result<(), Failure> {
    if options.queue.as_deref().is_some_and(|queue| queue.is_empty() || queue.len() > 255) {
        return Err(Failure::Usage("--queue takes a name of 1 to 255 bytes".to_owned()));
    }
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

async fn print_events(config: &Config, options: &Options, link: &Link) -> Result<(), TailError> {
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
    let bindings = bindings.map(|key| (config.broker.exchange.as_str(), key.as_str())).chain([(UNROUTED, "")]);
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

fn print(delivery: &Delivery, json: bool) -> io::Result<()> {
    let properties = &delivery.properties;
    let header = |name: &str| match properties.headers().as_ref().and_then(|headers| headers.inner().get(name)) {
        Some(AMQPValue::LongString(text)) => text.to_string(),
        _ => String::new(),
    };
    let (time, subject, state) = (header("prism-received-at"), header("prism-subject"), header("prism-state"));
    let line = Line {
        time: &time,
        key: delivery.routing_key.as_str(),
        subject: &subject,
        state: &state,
        id: properties.message_id().as_ref().map_or("", ShortString::as_str),
        verified: header("prism-verified") == "true",
        redelivered: delivery.redelivered,
    };
    let mut out = io::stdout().lock();
    if json {
        serde_json::to_writer(&mut out, &line)?;
        writeln!(out)?;
    } else {
        let (time, key, subject) = (clean(line.time), clean(line.key), clean(line.subject));
        writeln!(out, "{time}  {key:<42}  {subject:<47}  {:<10}  {}", clean(line.state), clean(line.id))?;
    }
    out.flush()
}

/// Names are checked before; AMQP's short strings end at 255 bytes.
fn short(text: &str) -> ShortString {
    ShortString::try_new(text).unwrap_or_default()
}

/// Whether a topic exchange would route this key by this pattern.
fn matches(pattern: &str, key: &str) -> bool {
    fn words(pattern: &[&str], key: &[&str]) -> bool {
        match (pattern.split_first(), key.split_first()) {
            (None, None) => true,
            (Some((&"#", rest)), _) => words(rest, key) || (!key.is_empty() && words(pattern, &key[1..])),
            (Some((&"*", pattern)), Some((_, key))) => words(pattern, key),
            (Some((wanted, pattern)), Some((word, key))) => wanted == word && words(pattern, key),
            (None, Some(_)) | (Some(_), None) => false,
        }
    }
    words(&pattern.split('.').collect::<Vec<_>>(), &key.split('.').collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use super::matches;

    #[test]
    fn patterns_match_as_in_a_topic_exchange() {
        for (pattern, key, expected) in [
            ("#", "scan.processing.started", true),
            ("#", "", true),
            ("scan.#", "scan", true),
            ("scan.#", "scan.processing.started", true),
            ("scan.*", "scan.processing", true),
            ("scan.*", "scan.processing.started", false),
            ("*.processing.*", "scan.processing.started", true),
            ("#.started", "scan.processing.started", true),
            ("scan.#", "body_shape_prediction.processing.started", false),
            ("scan.processing", "scan.processing.started", false),
        ] {
            assert_eq!(matches(pattern, key), expected, "{pattern} {key}");
        }
    }
}
