//! `replay`: publishes events of the archive again, with a header that marks them. It does not change the archive.

use std::time::Duration;

use anyhow::{Context, bail};
use jiff::{SignedDuration, Timestamp};
use lapin::Channel;
use lapin::message::Delivery;
use lapin::options::BasicAckOptions;
use lapin::types::{AMQPValue, FieldTable, ShortString};
use tokio::time::Instant;

use super::connect::connect;
use super::consumer::{Consumer, count};
use super::failure::Failure;
use super::messages::{REPLAYED_AT, header, matches, number, print, queue_name, replayed, time_of};
use super::output::{progress_bar, say};
use super::transfer::{Destination, Outgoing, Transfer, TransferError, in_time, while_connected};
use crate::broker::{BrokerConnection, short_string};
use crate::config::Config;
use crate::topology::ARCHIVE;

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
    #[arg(long, value_name = "PATTERN", default_value = "#")]
    key: String,
    /// Publish to this queue only [default: to the exchange]
    #[arg(long, value_name = "QUEUE", value_parser = queue_name)]
    to: Option<ShortString>,
    /// Stream to read [default: topology.archive.name]
    #[arg(long, value_name = "STREAM", value_parser = queue_name)]
    from: Option<ShortString>,
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
    let name = config.topology.archive.as_ref().map_or(ARCHIVE, |archive| &archive.name);
    let from = options.from.clone().map_or_else(|| short_string(name), Ok)?;
    let to = Destination::new(config, options.to.clone())?;
    let broker = connect(config, "prism-relay replay").await?;
    let deadline = config.publisher.confirm_timeout;
    let transfer = Transfer::open(&broker, deadline).await?;
    let mut replay =
        Replay { options: &options, from: &from, to: &to, broker: &broker, deadline, transfer, printed: 0 };
    let outcome = while_connected(&broker, replay.run()).await;
    let published = replay.printed + replay.transfer.moved();
    broker.close().await;
    let verb = if options.dry_run { "would be published" } else { "published" };
    say(&format!("{published} events of {from} {verb} to {to}"));
    Ok(outcome?)
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
}

impl Replay<'_> {
    async fn run(&mut self) -> anyhow::Result<()> {
        let now = Timestamp::now();
        let Some(end) = self.find_end(now).await? else { return Ok(()) };
        let since = self.options.since;
        let start = since.checked_sub(CLOCKS_DIFFER).unwrap_or(Timestamp::UNIX_EPOCH).as_second();
        let start = AMQPValue::Timestamp(u64::try_from(start).unwrap_or(0));
        let channel = in_time(self.deadline, self.broker.connection.create_channel()).await?;
        let mut consumer = self.read(&channel, start).await?;
        let mut interrupt = Box::pin(tokio::signal::ctrl_c());
        let (mut progress, mut reached) = (None, None);
        let may_be_empty = end.accepted < since;
        while reached.is_none_or(|reached| reached < end.offset) {
            let patience = if reached.is_none() && may_be_empty { FIRST } else { self.deadline };
            let next = tokio::select! {
                biased;
                _ = &mut interrupt => bail!("interrupted"),
                next = consumer.next(patience) => next?,
            };
            let delivery = match (next, reached) {
                (Some(delivery), _) => delivery,
                (None, None) if may_be_empty => break,
                (None, _) => bail!("the stream stopped delivering before its end at offset {}", end.offset),
            };
            let offset = offset_of(&delivery)?;
            reached = Some(offset);
            progress.get_or_insert_with(|| progress_bar((end.offset + 1).saturating_sub(offset), "messages")).inc(1);
            self.handle(delivery, now).await?;
        }
        self.transfer.flush().await?;
        if let Some(bar) = progress {
            bar.finish_and_clear();
        }
        Ok(())
    }

    /// Publishes or prints an event that matches the options, and skips any other message.
    async fn handle(&mut self, delivery: Delivery, now: Timestamp) -> anyhow::Result<()> {
        let Options { since, until, key, dry_run, .. } = self.options;
        let wanted = (*since..until.unwrap_or(Timestamp::MAX)).contains(&accepted(&delivery))
            && matches(key, delivery.routing_key.as_str())
            && header(&delivery.properties, REPLAYED_AT).is_none();
        if wanted && !dry_run {
            let (key, properties) = (delivery.routing_key.clone(), replayed(&delivery.properties, now));
            return Ok(self.transfer.add(Outgoing { to: self.to.clone(), key, properties, delivery }).await?);
        }
        if wanted {
            print(&delivery, false).context("cannot print")?;
            self.printed += 1;
        }
        // The broker delivers more messages only after these are acknowledged.
        in_time(self.deadline, delivery.acker.ack(BasicAckOptions::default())).await?;
        Ok(())
    }

    /// Reads the stream, starting at `offset`.
    async fn read(&self, channel: &Channel, offset: AMQPValue) -> Result<Consumer, TransferError> {
        let mut arguments = FieldTable::default();
        arguments.insert("x-stream-offset".into(), offset);
        Consumer::open(channel, self.from, arguments, self.deadline).await
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
