//! `replay`: publishes events of the archive once more, marked as such. The archive itself stays as it is.

use std::time::Duration;

use anyhow::{Context, bail};
use jiff::{SignedDuration, Timestamp};
use lapin::Channel;
use lapin::message::Delivery;
use lapin::options::{BasicAckOptions, ConfirmSelectOptions};
use lapin::types::{AMQPValue, FieldTable};
use tokio::time::Instant;

use super::intake::{Intake, count};
use super::messages::{REPLAYED_AT, header, matches, number, print, queue_name, replayed, time_of};
use super::transfer::{Destination, Parcel, Transfer, TransferError, in_time, while_connected};
use super::{Failure, progress_bar, say};
use crate::broker::BrokerConnection;
use crate::config::Config;
use crate::topology::ARCHIVE;

/// A stream says nothing at its end. Whoever has read so much of it and hears nothing for so long has read its last part.
const LAST_PART: Duration = Duration::from_secs(2);
/// The first message comes at once, if there is one.
const FIRST: Duration = Duration::from_secs(5);
/// Events lie in the order in which the broker took them, which may be long after they were accepted, but not before: this is
/// for clocks that differ.
const CLOCKS_DIFFER: SignedDuration = SignedDuration::from_mins(10);

#[derive(clap::Args)]
pub struct Options {
    /// Events that were accepted since then: a time such as 2026-11-24T12:00:00Z, or an age such as 2h
    #[arg(long, value_name = "WHEN", value_parser = when)]
    since: Timestamp,
    /// Events that were accepted before [default: all that are there now]
    #[arg(long, value_name = "WHEN", value_parser = when)]
    until: Option<Timestamp>,
    /// Only events whose routing key matches, as a topic pattern: * stands for one word, # for any number of words
    #[arg(long, value_name = "PATTERN", default_value = "#")]
    key: String,
    /// Straight into this queue, instead of to the exchange, from which every queue that is bound for it gets it
    #[arg(long, value_name = "QUEUE", value_parser = queue_name)]
    to: Option<String>,
    /// The stream to read [default: topology.archive.name of the configuration]
    #[arg(long, value_name = "STREAM", value_parser = queue_name)]
    from: Option<String>,
    /// Print what would be replayed, and publish nothing
    #[arg(long)]
    dry_run: bool,
}

fn when(text: &str) -> Result<Timestamp, String> {
    let ago = |age: Duration| Timestamp::now().checked_sub(SignedDuration::try_from(age).ok()?).ok();
    let age = || humantime::parse_duration(text).ok().and_then(ago);
    text.parse()
        .ok()
        .or_else(age)
        .ok_or_else(|| "give a time such as 2026-11-24T12:00:00Z, or an age such as 2h".to_owned())
}

pub async fn run(config: &Config, options: Options) -> Result<(), Failure> {
    let name = config.topology.archive.as_ref().map_or(ARCHIVE, |archive| &archive.name);
    let from = options.from.clone().unwrap_or_else(|| name.to_owned());
    let to = Destination::new(config, options.to.as_deref());
    let link = super::connect(config, "prism-relay replay").await?;
    let mut published = 0;
    let outcome = while_connected(&link, replay(config, &options, &from, &to, &link, &mut published)).await;
    link.close().await;
    let verb = if options.dry_run { "would be published" } else { "published" };
    say(&format!("{published} events of {from} {verb} to {to}"));
    Ok(outcome?)
}

async fn replay(
    config: &Config,
    options: &Options,
    from: &str,
    to: &Destination,
    link: &BrokerConnection,
    published: &mut u64,
) -> anyhow::Result<()> {
    let (now, until) = (Timestamp::now(), options.until.unwrap_or(Timestamp::MAX));
    let deadline = config.publisher.confirm_timeout;
    let Some(end) = find_end(link, deadline, from, now).await? else { return Ok(()) };
    let start = options.since.checked_sub(CLOCKS_DIFFER).unwrap_or(Timestamp::UNIX_EPOCH).as_second();
    let start = AMQPValue::Timestamp(u64::try_from(start).unwrap_or(0));
    let opening = async {
        let channel = link.connection.create_channel().await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        Ok(channel)
    };
    let channel = in_time(deadline, opening).await?;
    let mut intake = read(&channel, deadline, from, start).await?;
    let mut transfer = Transfer::new(channel, config);
    let mut interrupt = Box::pin(tokio::signal::ctrl_c());
    let (mut progress, mut reached) = (None, None);
    let maybe_nothing = end.accepted < options.since;
    while reached.is_none_or(|reached| reached < end.offset) {
        let next = tokio::select! {
            biased;
            _ = &mut interrupt => bail!("interrupted"),
            next = intake.next(if reached.is_none() && maybe_nothing { FIRST } else { deadline }) => next?,
        };
        let delivery = match (next, reached) {
            (Some(delivery), _) => delivery,
            (None, None) if maybe_nothing => break,
            (None, _) => bail!("the stream says no more before its end at offset {}", end.offset),
        };
        let offset = offset_of(&delivery)?;
        reached = Some(offset);
        progress.get_or_insert_with(|| progress_bar((end.offset + 1).saturating_sub(offset), "messages")).inc(1);
        let accepted = accepted(&delivery);
        let wanted = (options.since..until).contains(&accepted)
            && matches(&options.key, delivery.routing_key.as_str())
            && header(&delivery.properties, REPLAYED_AT).is_none();
        if wanted && !options.dry_run {
            let (key, properties) = (delivery.routing_key.clone(), replayed(&delivery.properties, now));
            transfer.add(Parcel { to: to.clone(), key, properties, delivery }, published).await?;
        } else {
            if wanted {
                print(&delivery, false).context("cannot print")?;
                *published += 1;
            }
            // Makes room for more.
            in_time(deadline, delivery.acker.ack(BasicAckOptions::default())).await?;
        }
    }
    transfer.flush(published).await?;
    if let Some(bar) = progress {
        bar.finish_and_clear();
    }
    Ok(())
}

/// From an offset on. What else the channel is asked is answered after what comes, so it is asked before.
async fn read(channel: &Channel, deadline: Duration, stream: &str, offset: AMQPValue) -> Result<Intake, TransferError> {
    let mut arguments = FieldTable::default();
    arguments.insert("x-stream-offset".into(), offset);
    Intake::open(channel, stream, arguments, deadline).await
}

/// The last message of a stream.
struct End {
    offset: u64,
    accepted: Timestamp,
}

/// Where the stream ends now; `None` if it is empty. What AMQP tells of its length is seconds old, so its last part is read.
async fn find_end(
    link: &BrokerConnection,
    deadline: Duration,
    stream: &str,
    now: Timestamp,
) -> anyhow::Result<Option<End>> {
    let opening = async {
        let channel = link.connection.create_channel().await?;
        let count = count(&channel, stream).await?;
        Ok((channel, count))
    };
    let (channel, count) = in_time(deadline, opening).await?;
    let mut intake = read(&channel, deadline, stream, AMQPValue::LongString("last".into())).await?;
    // Where there is something, it comes, sooner or later.
    let patience = if count > 0 { deadline } else { LAST_PART };
    let (mut end, mut first_at) = (None, None);
    while let Some(delivery) = intake.next(if end.is_none() { patience } else { LAST_PART }).await? {
        let (offset, accepted) = (offset_of(&delivery)?, accepted(&delivery));
        end = Some(End { offset, accepted });
        in_time(deadline, delivery.acker.ack(BasicAckOptions::default())).await?;
        // Where events come in all the time it is never silent: what comes from now on is later than this run.
        let read_for = first_at.get_or_insert_with(Instant::now).elapsed();
        if read_for > deadline || (read_for > LAST_PART && accepted >= now) {
            break;
        }
    }
    intake.end().await?;
    in_time(deadline, channel.close(200, "done".into())).await?;
    match end {
        None if count > 0 => Err(TransferError::Silent(deadline).into()),
        end => Ok(end),
    }
}

fn offset_of(delivery: &Delivery) -> anyhow::Result<u64> {
    number(&delivery.properties, "x-stream-offset").context("that is no stream: its messages have no offset")
}

fn accepted(delivery: &Delivery) -> Timestamp {
    time_of(&delivery.properties).unwrap_or(Timestamp::UNIX_EPOCH)
}
