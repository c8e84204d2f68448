//! `redrive`: publishes dead letters, or other messages, once more. Each is acknowledged only when the exchange has taken it, so
//! that a run which ends half-way, however it ends, loses nothing.

use std::num::NonZeroU64;
use std::time::Duration;

use futures_util::StreamExt;
use jiff::Timestamp;
use lapin::message::{BasicGetMessage, Delivery};
use lapin::options::{
    BasicCancelOptions, BasicConsumeOptions, BasicGetOptions, BasicQosOptions, ConfirmSelectOptions,
    QueueDeclareOptions,
};
use lapin::types::FieldTable;
use lapin::{Channel, Consumer};
use tokio::time::timeout;

use super::messages::{
    fresh, header, matches, number, original_key, print, put_back, queue_name, short, time_of, uncounted,
};
use super::transfer::{Destination, Parcel, Transfer, TransferError, in_time, while_connected};
use super::{Failure, progress_bar, say};
use crate::config::Config;
use crate::publisher::Link;
use crate::topology::DEAD;

/// RabbitMQ 4 drops a message when it has been taken and put back 20 times, if its queue has no other limit and no dead letters.
/// Long before that a copy is put in its place, whose count begins anew.
const RETURNS_MAX: u64 = 10;
/// More than are under way at a time.
const PREFETCH: u16 = 500;
/// Whoever consumes and gets nothing for so long has got all that there was for it.
const QUIET: Duration = Duration::from_secs(5);
const CONSUMER: &str = "prism-relay";

#[derive(clap::Args)]
pub struct Options {
    /// The queue to take from; with a single active consumer only as a whole, without any of the options below
    #[arg(long, value_name = "QUEUE", default_value = DEAD, value_parser = queue_name)]
    from: String,
    /// Straight into this queue, instead of to the exchange, from which every queue that is bound for it gets it
    #[arg(long, value_name = "QUEUE", value_parser = queue_name)]
    to: Option<String>,
    /// Only events of these types, as a topic pattern: * stands for one word, # for any number of words
    #[arg(long = "type", value_name = "PATTERN")]
    pattern: Option<String>,
    /// Only events of this subject, such as scan:7f2ec6e0-b06d-42b1-b2a1-fff59a458490
    #[arg(long)]
    subject: Option<String>,
    /// Only events that were accepted longer ago, such as 10m or 2h
    #[arg(long, value_name = "AGE", value_parser = humantime::parse_duration)]
    older_than: Option<Duration>,
    /// Only events that were accepted since
    #[arg(long, value_name = "AGE", value_parser = humantime::parse_duration)]
    newer_than: Option<Duration>,
    /// At most so many
    #[arg(long)]
    count: Option<NonZeroU64>,
    /// Print what would be moved, and move nothing; what was returned often is put back as a copy, so that it may be returned again
    #[arg(long)]
    dry_run: bool,
    /// Not as a new publish.
    #[arg(skip)]
    as_it_is: bool,
}

/// How it went.
#[derive(Default)]
struct Tally {
    moved: u64,
    left: u64,
}

pub async fn run(config: &Config, options: Options) -> Result<(), Failure> {
    let to = Destination::new(config, options.to.as_deref());
    if options.to.as_ref() == Some(&options.from) {
        return Err(Failure::Usage("--from and --to are the same queue".to_owned()));
    }
    if config.topology.archive.as_ref().is_some_and(|archive| archive.name == options.from) {
        return Err(Failure::Usage(format!("{} is a stream: use replay", options.from)));
    }
    let link = super::connect(config, "prism-relay redrive").await?;
    let mut tally = Tally::default();
    let outcome = while_connected(&link, redrive(config, &options, &to, &link, &mut tally)).await;
    link.close().await;
    let Tally { moved, left } = tally;
    let from = &options.from;
    if options.dry_run {
        say(&format!("{moved} of {} in {from} would be moved to {to}", moved + left));
    } else {
        say(&format!("{moved} moved from {from} to {to}, {left} looked at and left"));
    }
    outcome.map_err(Failure::new)
}

/// Moves everything that is in a queue now, with its keys and its past as they are; how much it was.
pub async fn move_all(config: &Config, link: &Link, from: &str, to: &Destination) -> Result<u64, TransferError> {
    let mut tally = Tally::default();
    redrive(config, &Options::all_of(from), to, link, &mut tally).await?;
    Ok(tally.moved)
}

async fn redrive(
    config: &Config,
    options: &Options,
    to: &Destination,
    link: &Link,
    tally: &mut Tally,
) -> Result<(), TransferError> {
    let deadline = config.broker.confirm_timeout;
    let opening = async {
        let channel = link.connection.create_channel().await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        let passive = QueueDeclareOptions { passive: true, ..Default::default() };
        let queue = channel.queue_declare(short(&options.from), passive, FieldTable::default()).await?;
        Ok((channel, queue))
    };
    let (channel, queue) = in_time(deadline, opening).await?;
    // Not more than there are now: what comes back to the queue meanwhile must not be moved round in circles.
    let (mut left_to_see, now) = (u64::from(queue.message_count()), Timestamp::now());
    if left_to_see == 0 {
        return Ok(());
    }
    let mut source = in_time(deadline, Source::open(&channel, options)).await?;
    let progress = progress_bar(options.count.map_or(left_to_see, |count| count.get().min(left_to_see)), "messages");
    let (mut transfer, mut back) = (Transfer::new(channel.clone(), config), Transfer::new(channel.clone(), config));
    let mut interrupt = Box::pin(tokio::signal::ctrl_c());
    let mut chosen = 0;
    while left_to_see > 0 && options.count.is_none_or(|count| chosen < count.get()) {
        let next = tokio::select! {
            biased;
            _ = &mut interrupt => return Err(TransferError::Interrupted),
            next = timeout(source.patience(deadline), source.next()) => next,
        };
        let delivery = match next {
            Ok(next) => next?,
            // Somebody else has taken what was there.
            Err(_) if source.patience(deadline) < deadline => None,
            Err(_) => return Err(TransferError::Silent(deadline)),
        };
        let Some(delivery) = delivery else { break };
        if !options.as_it_is && is_worn(&delivery) {
            // Comes again at the end of the queue, with a new count.
            back.add(Parcel {
                to: Destination::Queue(options.from.clone()),
                key: delivery.routing_key.clone(),
                properties: put_back(&delivery),
                delivery,
            });
            back.flush().await?;
            continue;
        }
        left_to_see -= 1;
        let wanted = wanted(options, &delivery, now);
        chosen += u64::from(wanted);
        tally.left += u64::from(!wanted);
        if wanted && options.dry_run {
            print(&delivery, false)?;
            tally.moved += 1;
        } else if wanted {
            let (key, properties) = match options.as_it_is {
                true => (delivery.routing_key.clone(), uncounted(&delivery.properties)),
                false => (original_key(&delivery), fresh(&delivery.properties)),
            };
            transfer.add(Parcel { to: to.clone(), key, properties, delivery });
        }
        if transfer.is_full() {
            tally.moved += transfer.flush().await?;
            progress.set_position(tally.moved);
        }
    }
    tally.moved += transfer.flush().await?;
    progress.finish_and_clear();
    let closing = async {
        if matches!(source, Source::Consume(_)) {
            channel.basic_cancel(CONSUMER.into(), BasicCancelOptions::default()).await?;
        }
        let passive = QueueDeclareOptions { passive: true, ..Default::default() };
        let queue = channel.queue_declare(short(&options.from), passive, FieldTable::default()).await?;
        // Gives back what was looked at and left, before what nobody has looked at yet. And it is answered, which an ack is not.
        channel.close(200, "done".into()).await?;
        Ok(queue.message_count())
    };
    let still_there = in_time(deadline, closing).await?;
    if options.takes_all() && left_to_see > 0 && still_there > 0 {
        return Err(TransferError::NotDelivered { from: options.from.clone(), left: still_there });
    }
    Ok(())
}

/// How messages are taken.
enum Source<'a> {
    /// One by one. What is left over is held until the end, however much that is.
    Get(&'a Channel, &'a str),
    /// As a worker does; the only way where a queue has a single active consumer.
    Consume(Box<Consumer>),
}

impl<'a> Source<'a> {
    async fn open(channel: &'a Channel, options: &'a Options) -> Result<Self, lapin::Error> {
        if !options.takes_all() {
            return Ok(Self::Get(channel, &options.from));
        }
        channel.basic_qos(PREFETCH, BasicQosOptions::default()).await?;
        let (options, queue) = (BasicConsumeOptions::default(), short(&options.from));
        let consumer = channel.basic_consume(queue, CONSUMER.into(), options, FieldTable::default()).await?;
        Ok(Self::Consume(Box::new(consumer)))
    }

    /// A broker that delivers goes on at once; one that is asked has to answer.
    fn patience(&self, deadline: Duration) -> Duration {
        match self {
            Self::Get(..) => deadline,
            Self::Consume(_) => deadline.min(QUIET),
        }
    }

    async fn next(&mut self) -> Result<Option<Delivery>, TransferError> {
        match self {
            Self::Get(channel, queue) => {
                let got = channel.basic_get(short(queue), BasicGetOptions::default()).await?;
                Ok(got.map(|BasicGetMessage { delivery, .. }| delivery))
            }
            Self::Consume(deliveries) => Ok(Some(deliveries.next().await.ok_or(TransferError::Lost)??)),
        }
    }
}

impl Options {
    fn all_of(from: &str) -> Self {
        let (to, pattern, subject, older_than, newer_than, count) = (None, None, None, None, None, None);
        let from = from.to_owned();
        Self { from, to, pattern, subject, older_than, newer_than, count, dry_run: false, as_it_is: true }
    }

    fn takes_all(&self) -> bool {
        let Self { pattern, subject, older_than, newer_than, count, dry_run, .. } = self;
        let filtered = pattern.is_some() || subject.is_some() || older_than.is_some() || newer_than.is_some();
        !filtered && count.is_none() && !dry_run
    }
}

/// Whether the broker might soon drop it for having been looked at too often.
fn is_worn(delivery: &Delivery) -> bool {
    number(&delivery.properties, "x-delivery-count").unwrap_or(0) >= RETURNS_MAX
}

fn wanted(options: &Options, delivery: &Delivery, now: Timestamp) -> bool {
    let properties = &delivery.properties;
    let kind = || properties.kind().clone().unwrap_or_else(|| original_key(delivery));
    let age = || time_of(properties).map(|time| now.duration_since(time));
    let age_is = |test: fn(Duration, Duration) -> bool, limit: Option<Duration>| {
        limit.is_none_or(|limit| age().is_some_and(|age| test(age.try_into().unwrap_or_default(), limit)))
    };
    options.pattern.as_ref().is_none_or(|pattern| matches(pattern, kind().as_str()))
        && options.subject.as_ref().is_none_or(|subject| header(properties, "prism-subject").as_ref() == Some(subject))
        && age_is(|age, limit| age > limit, options.older_than)
        && age_is(|age, limit| age < limit, options.newer_than)
}
