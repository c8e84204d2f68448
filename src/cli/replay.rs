//! `replay`: publishes events of the archive again, with a header that marks them. It does not change the archive.

use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use jiff::{SignedDuration, Timestamp};
use lapin::Channel;
use lapin::message::Delivery;
use lapin::options::BasicAckOptions;
use lapin::types::{AMQPValue, FieldTable, ShortString};
use tokio::time::Instant;

use super::connect::connect;
use super::consumer::{Consumer, count};
use super::failure::Failure;
use super::interrupt::Interrupt;
use super::messages::{Format, REPLAYED_AT, header, matches, number, print, queue_name, replayed, time_of};
use super::output::{Progress, say};
use super::pace::{Pace, rate};
use super::pattern::{note_on_pattern, topic_pattern};
use super::transfer::{Destination, Outgoing, Transfer, TransferError, in_time, while_connected};
use crate::broker::{BrokerConnection, short_string};
use crate::config::Config;

/// A stream does not report its end. After this long without a delivery its last part has been read.
const LAST_PART: Duration = Duration::from_secs(2);
/// Maximum time for the first message, if the stream may have none.
const FIRST: Duration = Duration::from_secs(5);
/// How much earlier than an event's time of acceptance its place in the stream may seem: the clocks of relay and broker
/// may differ by this much.
const CLOCKS_DIFFER: SignedDuration = SignedDuration::from_mins(10);

#[derive(clap::Args)]
pub(super) struct Options {
    /// Only events accepted since this time (2026-11-24T12:00:00Z) or age (2h)
    #[arg(long, value_name = "WHEN", value_parser = when)]
    since: Timestamp,
    /// Only events accepted before this time or age [default: now]
    #[arg(long, value_name = "WHEN", value_parser = when)]
    until: Option<Timestamp>,
    /// Only routing keys that match this topic pattern (*: one word, #: any number)
    #[arg(long, value_name = "PATTERN", default_value = "#", value_parser = topic_pattern)]
    key: String,
    /// Publish to this queue only [default: to the exchange prism.events]
    #[arg(long, value_name = "QUEUE", value_parser = queue_name)]
    to: Option<ShortString>,
    /// Stream to read [default: topology.archive.name]
    #[arg(long, value_name = "STREAM", value_parser = queue_name)]
    from: Option<ShortString>,
    /// Start at this offset of the stream, which an interrupted run prints
    #[arg(long, value_name = "NUMBER")]
    offset: Option<u64>,
    /// Events per second [default: as fast as the broker takes them]
    #[arg(long, value_parser = rate)]
    rate: Option<f64>,
    /// Only print what would be published
    #[arg(long)]
    dry_run: bool,
}

fn when(text: &str) -> Result<Timestamp, String> {
    let ago = |age: Duration| Timestamp::now().checked_sub(SignedDuration::try_from(age).ok()?).ok();
    let age = || humantime::parse_duration(text).ok().and_then(ago);
    text.parse()
        .ok()
        .or_else(age)
        .ok_or_else(|| "must be a time such as 2026-11-24T12:00:00Z, or an age such as 2h".to_owned())
}

pub(super) async fn run(config: &Config, options: Options) -> Result<(), Failure> {
    let from = match (&options.from, &config.topology.archive) {
        (Some(from), _) => from.clone(),
        (None, Some(archive)) => short_string(&archive.name)?,
        (None, None) => {
            let hint = "there is no archive to replay: the configuration has no topology.archive. With one, the relay \
                        keeps the events that it delivers from then on. --from reads a stream of an earlier \
                        configuration";
            return Err(Failure::Usage(hint.to_owned()));
        }
    };
    let to = Destination::new(config, options.to.clone());
    note_on_pattern(&options.key);
    let broker = connect(config, "prism-relay replay").await?;
    let deadline = config.publisher.confirm_timeout;
    let transfer = Transfer::open(&broker, deadline, options.rate).await?;
    let (printed, resume) = (0, None);
    let mut replay =
        Replay { options: &options, from: &from, to: &to, broker: &broker, deadline, transfer, printed, resume };
    let outcome = while_connected(&broker, replay.run()).await;
    let (published, resume) = (replay.printed + replay.transfer.moved(), replay.resume);
    broker.close().await;
    let verb = if options.dry_run { "would be published" } else { "published" };
    if outcome.is_ok() || published > 0 {
        say(&format!("{published} events of {from} {verb} to {to}"));
    }
    match (outcome, resume) {
        (Err(error), Some(offset)) => Err(anyhow!("{error:#}; with --offset {offset} it goes on from there").into()),
        (outcome, _) => Ok(outcome?),
    }
}

/// One run and its counts.
struct Replay<'a> {
    options: &'a Options,
    from: &'a ShortString,
    to: &'a Destination,
    broker: &'a BrokerConnection,
    /// Maximum time for a reply of the broker.
    deadline: Duration,
    transfer: Transfer,
    /// Events that a dry run would publish.
    printed: u64,
    /// The offset behind which nothing is published yet.
    resume: Option<u64>,
}

impl Replay<'_> {
    async fn run(&mut self) -> anyhow::Result<()> {
        let now = Timestamp::now();
        let Some(end) = self.find_end(now).await? else { return Ok(()) };
        let Options { since, offset, rate, .. } = *self.options;
        let channel = in_time(self.deadline, self.broker.connection.create_channel()).await?;
        let mut consumer = self.read(&channel, self.start()).await?;
        let (mut interrupt, mut pace) = (Interrupt::listen()?, Pace::new(rate));
        let (mut progress, mut reached) = (None, None);
        let may_be_empty = end.accepted < since || offset.is_some_and(|offset| offset > end.offset);
        while reached.is_none_or(|reached| reached < end.offset) {
            let patience = if reached.is_none() && may_be_empty { FIRST } else { self.deadline };
            let delivery = match (interrupt.or(consumer.next(patience)).await??, reached) {
                (Some(delivery), _) => delivery,
                (None, None) if may_be_empty => break,
                (None, _) => bail!("the stream stopped delivering before its end at offset {}", end.offset),
            };
            let offset = offset_of(&delivery)?;
            let (first, progress) = progress
                .get_or_insert_with(|| (offset, Progress::new((end.offset + 1).saturating_sub(offset), "messages")));
            if self.is_wanted(&delivery) {
                interrupt.or(pace.tick()).await?;
                self.publish(delivery, now, progress).await?;
            } else {
                // The broker delivers more messages only after these are acknowledged.
                in_time(self.deadline, delivery.acker.ack(BasicAckOptions::default())).await?;
            }
            if self.transfer.is_flushed() {
                self.resume = Some(offset + 1);
            }
            reached = Some(offset);
            progress.set(offset + 1 - *first);
        }
        self.transfer.flush().await?;
        if let Some((_, progress)) = progress {
            progress.finish();
        }
        Ok(())
    }

    /// Where to start reading: at the offset of the options, or somewhat before their time.
    fn start(&self) -> AMQPValue {
        let Options { since, offset, .. } = self.options;
        match offset.map(i64::try_from) {
            Some(Ok(offset)) => AMQPValue::LongLongInt(offset),
            Some(Err(_)) => AMQPValue::LongLongInt(i64::MAX),
            None => {
                let start = since.checked_sub(CLOCKS_DIFFER).unwrap_or(Timestamp::UNIX_EPOCH).as_second();
                AMQPValue::Timestamp(u64::try_from(start).unwrap_or(0))
            }
        }
    }

    fn is_wanted(&self, delivery: &Delivery) -> bool {
        let Options { since, until, key, .. } = self.options;
        (*since..until.unwrap_or(Timestamp::MAX)).contains(&accepted(delivery))
            && matches(key, delivery.routing_key.as_str())
            && header(&delivery.properties, REPLAYED_AT).is_none()
    }

    /// Publishes an event, or prints it if this is a dry run.
    async fn publish(&mut self, delivery: Delivery, now: Timestamp, progress: &Progress) -> anyhow::Result<()> {
        if !self.options.dry_run {
            let (key, properties) = (delivery.routing_key.clone(), replayed(&delivery.properties, now));
            return Ok(self.transfer.add(Outgoing { to: self.to.clone(), key, properties, delivery }).await?);
        }
        progress.aside(|| print(&delivery, Format::Text)).context("cannot print")?;
        self.printed += 1;
        in_time(self.deadline, delivery.acker.ack(BasicAckOptions::default())).await?;
        Ok(())
    }

    /// Reads the stream, starting at `offset`.
    async fn read(&self, channel: &Channel, offset: AMQPValue) -> Result<Consumer, TransferError> {
        let mut arguments = FieldTable::default();
        arguments.insert("x-stream-offset".into(), offset);
        Consumer::open(channel, self.from, arguments, self.options.rate, self.deadline).await
    }

    /// Finds the current end of the stream; `None` if it is empty. The length that AMQP reports is seconds old, so this
    /// reads the last part of the stream.
    async fn find_end(&self, now: Timestamp) -> anyhow::Result<Option<End>> {
        let opening = async {
            let channel = self.broker.connection.create_channel().await?;
            let count = count(&channel, self.from).await?;
            Ok((channel, count))
        };
        let (channel, count) = in_time(self.deadline, opening).await?;
        let mut consumer = self.read(&channel, AMQPValue::LongString("last".into())).await?;
        // A stream that is not empty always delivers its last part, but a slow line may delay it.
        let patience = if count > 0 { self.deadline } else { LAST_PART };
        let (mut end, mut first_at) = (None, None);
        while let Some(delivery) = consumer.next(if end.is_none() { patience } else { LAST_PART }).await? {
            let (offset, accepted) = (offset_of(&delivery)?, accepted(&delivery));
            end = Some(End { offset, accepted });
            in_time(self.deadline, delivery.acker.ack(BasicAckOptions::default())).await?;
            // A stream that gets new events all the time never falls silent. Events accepted after `now` are not
            // replayed.
            let read_for = first_at.get_or_insert_with(Instant::now).elapsed();
            if read_for > self.deadline || (read_for > LAST_PART && accepted >= now) {
                break;
            }
        }
        consumer.end().await?;
        in_time(self.deadline, channel.close(200, "done".into())).await?;
        match end {
            None if count > 0 => Err(TransferError::Silent(self.deadline).into()),
            end => Ok(end),
        }
    }
}

/// The last message of a stream.
struct End {
    offset: u64,
    accepted: Timestamp,
}

fn offset_of(delivery: &Delivery) -> anyhow::Result<u64> {
    number(&delivery.properties, "x-stream-offset").context("this is not a stream: its messages have no offset")
}

fn accepted(delivery: &Delivery) -> Timestamp {
    time_of(&delivery.properties).unwrap_or(Timestamp::UNIX_EPOCH)
}
