//! `redrive`: publishes dead letters, or other messages, once more. Each is acknowledged only when the exchange has taken it, so
//! that a run which ends half-way, however it ends, loses nothing.

use std::io;
use std::num::NonZeroU64;
use std::pin::Pin;
use std::time::Duration;

use anyhow::Context;
use jiff::Timestamp;
use lapin::Channel;
use lapin::message::{BasicGetMessage, Delivery};
use lapin::options::{BasicGetOptions, ConfirmSelectOptions};
use lapin::types::FieldTable;

use super::intake::{Intake, count};
use super::messages::{fresh, header, matches, number, original_key, print, put_back, queue_name, short, time_of};
use super::transfer::{Destination, Parcel, Transfer, TransferError, in_time, while_connected};
use super::{Failure, progress_bar, say};
use crate::broker::BrokerConnection;
use crate::config::Config;
use crate::topology::DEAD;

/// RabbitMQ 4 drops a message when it has been taken and put back 20 times, if its queue has no other limit and no dead letters.
/// Long before that a copy is put in its place, whose count begins anew.
const RETURNS_MAX: u64 = 10;
/// A broker that delivers goes on at once.
const QUIET: Duration = Duration::from_secs(5);

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
    Ok(outcome?)
}

async fn redrive(
    config: &Config,
    options: &Options,
    to: &Destination,
    link: &BrokerConnection,
    tally: &mut Tally,
) -> anyhow::Result<()> {
    let mut taking = Taking::open(config, link, &options.from, options.takes_all()).await?;
    let mut transfer = Transfer::new(taking.channel.clone(), config);
    let most = options.count.map_or(taking.left, |count| count.get().min(taking.left));
    let (progress, now) = (progress_bar(most, "messages"), Timestamp::now());
    let mut chosen = 0;
    while options.count.is_none_or(|count| chosen < count.get())
        && let Some(delivery) = taking.next().await?
    {
        if is_worn(&delivery) {
            taking.put_back(config, delivery).await?;
            continue;
        }
        let wanted = wanted(options, &delivery, now);
        chosen += u64::from(wanted);
        if !wanted {
            tally.left += 1;
        } else if options.dry_run {
            print(&delivery, false).context("cannot print")?;
            tally.moved += 1;
        } else {
            let (key, properties) = (original_key(&delivery), fresh(&delivery.properties));
            transfer.add(Parcel { to: to.clone(), key, properties, delivery }, &mut tally.moved).await?;
        }
        progress.set_position(tally.moved);
    }
    transfer.flush(&mut tally.moved).await?;
    progress.finish_and_clear();
    Ok(taking.close().await?)
}

/// Takes what is in a queue now, and no more: what comes back to it meanwhile must not be moved round in circles.
struct Taking<'a> {
    link: &'a BrokerConnection,
    channel: Channel,
    queue: &'a str,
    source: Source,
    /// How many are to come.
    left: u64,
    /// For an answer.
    deadline: Duration,
    interrupt: Pin<Box<dyn Future<Output = io::Result<()>> + Send>>,
}

/// How messages are taken.
enum Source {
    /// One by one. What is left over is held until the end, however much that is.
    Get,
    /// As a worker does; the only way where a queue has a single active consumer.
    Consume(Box<Intake>),
}

impl<'a> Taking<'a> {
    /// `whole`: everything is to be moved.
    async fn open(
        config: &Config,
        link: &'a BrokerConnection,
        queue: &'a str,
        whole: bool,
    ) -> Result<Self, TransferError> {
        let deadline = config.publisher.confirm_timeout;
        let opening = async {
            let channel = link.connection.create_channel().await?;
            channel.confirm_select(ConfirmSelectOptions::default()).await?;
            let left = count(&channel, queue).await?;
            Ok((channel, u64::from(left)))
        };
        let (channel, left) = in_time(deadline, opening).await?;
        let source = match whole && left > 0 {
            true => Source::Consume(Box::new(Intake::open(&channel, queue, FieldTable::default(), deadline).await?)),
            false => Source::Get,
        };
        Ok(Self { link, channel, queue, source, left, deadline, interrupt: Box::pin(tokio::signal::ctrl_c()) })
    }

    /// `None` at the end, or where somebody else has taken what was there.
    async fn next(&mut self) -> Result<Option<Delivery>, TransferError> {
        if self.left == 0 {
            return Ok(None);
        }
        let taking = async {
            match &mut self.source {
                Source::Get => {
                    let got = self.channel.basic_get(short(self.queue), BasicGetOptions::default());
                    Ok(in_time(self.deadline, got).await?.map(|BasicGetMessage { delivery, .. }| delivery))
                }
                Source::Consume(intake) => intake.next(QUIET).await,
            }
        };
        let taken = tokio::select! {
            biased;
            _ = &mut self.interrupt => return Err(TransferError::Interrupted),
            taken = taking => taken?,
        };
        self.left -= u64::from(taken.is_some());
        Ok(taken)
    }

    /// A copy at the end of the queue takes its place, with a new count of returns, and will be looked at instead.
    async fn put_back(&mut self, config: &Config, delivery: Delivery) -> Result<(), TransferError> {
        let mut transfer = Transfer::new(self.channel.clone(), config);
        let (key, properties) = (original_key(&delivery), put_back(&delivery.properties));
        let copy = Parcel { to: Destination::Queue(self.queue.to_owned()), key, properties, delivery };
        transfer.add(copy, &mut 0).await?;
        transfer.flush(&mut 0).await?;
        self.left += 1;
        Ok(())
    }

    /// Gives back what was taken and not let go of, and sees whether everything came that should have.
    async fn close(mut self) -> Result<(), TransferError> {
        if let Source::Consume(intake) = &mut self.source {
            intake.end().await?;
        }
        let closing = async {
            // Gives back what was looked at and left, before what nobody has looked at yet. And it is answered, which an ack is not.
            self.channel.close(200, "done".into()).await?;
            match self.source {
                Source::Consume(_) if self.left > 0 => {
                    count(&self.link.connection.create_channel().await?, self.queue).await
                }
                _ => Ok(0),
            }
        };
        match in_time(self.deadline, closing).await? {
            0 => Ok(()),
            left => Err(TransferError::NotDelivered { from: self.queue.to_owned(), left }),
        }
    }
}

impl Options {
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
