//! `replay`: publishes events of the archive once more, marked as such. The archive itself stays as it is.

use std::time::Duration;

use futures_util::StreamExt;
use jiff::{SignedDuration, Timestamp};
use lapin::options::{BasicAckOptions, BasicConsumeOptions, BasicQosOptions, ConfirmSelectOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, Consumer};
use thiserror::Error;
use tokio::time::{Instant, timeout, timeout_at};

use super::messages::{REPLAYED_AT, header, matches, number, print, queue_name, replayed, short, time_of};
use super::transfer::{Destination, Parcel, Transfer, TransferError, in_time, while_connected};
use super::{Failure, progress_bar, say};
use crate::config::Config;
use crate::publisher::Link;
use crate::topology::ARCHIVE;

/// Deliveries on the way at a time. Streams give more as these are acknowledged.
const PREFETCH: u16 = 500;
/// A stream says nothing at its end. Its last part has been read in this time, and what comes after it is later than now.
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

#[derive(Debug, Error)]
enum ReplayError {
    #[error(transparent)]
    Transfer(#[from] TransferError),
    #[error("the stream says no more, {0} messages before its end")]
    Stalled(u64),
    #[error("that is no stream: its messages have no offset")]
    NoStream,
    #[error("interrupted")]
    Interrupted,
}

impl From<lapin::Error> for ReplayError {
    fn from(error: lapin::Error) -> Self {
        Self::Transfer(error.into())
    }
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
    outcome.map_err(Failure::new)
}

async fn replay(
    config: &Config,
    options: &Options,
    from: &str,
    to: &Destination,
    link: &Link,
    published: &mut u64,
) -> Result<(), ReplayError> {
    let (now, until) = (Timestamp::now(), options.until.unwrap_or(Timestamp::MAX));
    let deadline = config.broker.confirm_timeout;
    let Some(last) = last_offset(link, deadline, from).await? else { return Ok(()) };
    let start = options.since.checked_sub(CLOCKS_DIFFER).unwrap_or(Timestamp::UNIX_EPOCH).as_second();
    let start = AMQPValue::Timestamp(u64::try_from(start).unwrap_or(0));
    let (channel, mut deliveries) = in_time(deadline, consume(link, from, start)).await?;
    in_time(deadline, channel.confirm_select(ConfirmSelectOptions::default())).await?;
    let mut transfer = Transfer::new(channel.clone(), config);
    let mut interrupt = Box::pin(tokio::signal::ctrl_c());
    let (mut progress, mut reached) = (None, None);
    while reached.is_none_or(|reached| reached < last) {
        let patience = if reached.is_none() { FIRST } else { deadline };
        let next = tokio::select! {
            biased;
            _ = &mut interrupt => return Err(ReplayError::Interrupted),
            next = timeout(patience, deliveries.next()) => next,
        };
        let delivery = match (next, reached) {
            (Ok(delivery), _) => delivery.ok_or(TransferError::Lost)??,
            // Where nothing was written since then, there is nothing to come.
            (Err(_), None) => break,
            (Err(_), Some(reached)) => return Err(ReplayError::Stalled(last - reached)),
        };
        let offset = number(&delivery.properties, "x-stream-offset").ok_or(ReplayError::NoStream)?;
        reached = Some(offset);
        progress.get_or_insert_with(|| progress_bar((last + 1).saturating_sub(offset), "messages")).inc(1);
        let accepted = time_of(&delivery.properties).unwrap_or(Timestamp::UNIX_EPOCH);
        let wanted = (options.since..until).contains(&accepted)
            && matches(&options.key, delivery.routing_key.as_str())
            && header(&delivery.properties, REPLAYED_AT).is_none();
        if wanted && !options.dry_run {
            let (key, properties) = (delivery.routing_key.clone(), replayed(&delivery.properties, now));
            transfer.add(Parcel { to: to.clone(), key, properties, delivery });
        } else {
            if wanted {
                print(&delivery, false).map_err(TransferError::Print)?;
                *published += 1;
            }
            // Makes room for more.
            in_time(deadline, delivery.acker.ack(BasicAckOptions::default())).await?;
        }
        if transfer.is_full() {
            *published += transfer.flush().await?;
        }
    }
    *published += transfer.flush().await?;
    if let Some(bar) = progress {
        bar.finish_and_clear();
    }
    Ok(())
}

async fn consume(link: &Link, stream: &str, offset: AMQPValue) -> Result<(Channel, Consumer), lapin::Error> {
    let channel = link.connection.create_channel().await?;
    // A stream gives nothing to a consumer without a prefetch.
    channel.basic_qos(PREFETCH, BasicQosOptions::default()).await?;
    let mut arguments = FieldTable::default();
    arguments.insert("x-stream-offset".into(), offset);
    let consumer = channel.basic_consume(short(stream), "".into(), BasicConsumeOptions::default(), arguments).await?;
    Ok((channel, consumer))
}

/// Where the stream ends now; `None` if it is empty. What AMQP tells of its length is seconds old, so its last part is read.
async fn last_offset(link: &Link, deadline: Duration, stream: &str) -> Result<Option<u64>, ReplayError> {
    let offset = AMQPValue::LongString("last".into());
    let (channel, mut deliveries) = in_time(deadline, consume(link, stream, offset)).await?;
    let (mut last, until) = (None, Instant::now() + LAST_PART);
    while let Ok(delivery) = timeout_at(until, deliveries.next()).await {
        let delivery = delivery.ok_or(TransferError::Lost)??;
        last = Some(number(&delivery.properties, "x-stream-offset").ok_or(ReplayError::NoStream)?);
        in_time(deadline, delivery.acker.ack(BasicAckOptions::default())).await?;
    }
    in_time(deadline, channel.close(200, "done".into())).await?;
    Ok(last)
}
