//! `redrive`: publishes dead letters or other messages again. A message is acknowledged only after the broker has
//! confirmed its copy, so an interrupted run loses nothing.

use std::io::{self, Write};
use std::num::NonZeroU64;
use std::time::Duration;

use anyhow::Context;
use jiff::Timestamp;
use lapin::Channel;
use lapin::message::{BasicGetMessage, Delivery};
use lapin::options::BasicGetOptions;
use lapin::types::{FieldTable, ShortString};

use super::connect::connect;
use super::consumer::{Consumer, count};
use super::delayed;
use super::failure::Failure;
use super::interrupt::Interrupt;
use super::messages::{
    Format, TEST, first_key, fresh, header, is_test_queue, matches, number, original_key, print, put_back, queue_name,
    time_of,
};
use super::output::{Progress, say};
use super::pace::{Pace, rate};
use super::pattern::{note_on_pattern, topic_pattern};
use super::transfer::{Destination, Outgoing, Transfer, TransferError, in_time, while_connected};
use crate::broker::BrokerConnection;
use crate::config::Config;
use crate::topology::{DEAD, Plan};

/// RabbitMQ 4 drops a message that was returned 20 times if its queue has no other limit and no dead-letter exchange.
/// After this many returns a copy replaces the message, and the count of the copy starts at 0.
const RETURNS_MAX: u64 = 10;
/// Maximum time without a delivery, after which the queue is taken to be empty.
const QUIET: Duration = Duration::from_secs(5);

#[derive(clap::Args)]
pub(super) struct Options {
    /// Queue to take messages from (with a single active consumer: without filters)
    #[arg(long, value_name = "QUEUE", default_value = DEAD, value_parser = queue_name)]
    from: ShortString,
    /// Publish to this queue only [default: to the exchange prism.events]
    #[arg(long, value_name = "QUEUE", value_parser = queue_name)]
    to: Option<ShortString>,
    /// Only event types that match this topic pattern (*: one word, #: any number)
    #[arg(long = "type", value_name = "PATTERN", value_parser = topic_pattern)]
    pattern: Option<String>,
    /// Only events of this subject, such as scan:7f2ec6e0-b06d-42b1-b2a1-fff59a458490
    #[arg(long)]
    subject: Option<String>,
    /// Only events accepted longer ago than this, such as 10m or 2h
    #[arg(long, value_name = "AGE", value_parser = humantime::parse_duration)]
    older_than: Option<Duration>,
    /// Only events accepted within this time, such as 10m or 2h
    #[arg(long, value_name = "AGE", value_parser = humantime::parse_duration)]
    newer_than: Option<Duration>,
    /// Only test messages of send --to-queue, which are left otherwise (to a queue with `test` in its name)
    #[arg(long, requires = "to")]
    tests: bool,
    /// Stop after this many events
    #[arg(long)]
    count: Option<NonZeroU64>,
    /// Events per second [default: as fast as the broker takes them]
    #[arg(long, value_parser = rate)]
    rate: Option<f64>,
    /// Only print what would be moved (often returned messages are replaced with copies)
    #[arg(long)]
    dry_run: bool,
}

pub(super) async fn run(config: &Config, options: Options) -> Result<(), Failure> {
    let to = Destination::new(config, options.to.clone());
    check_usage(config, &options, &to)?;
    if let Some(pattern) = &options.pattern {
        note_on_pattern(pattern);
    }
    let broker = connect(config, "prism-relay redrive").await?;
    let deadline = config.publisher.confirm_timeout;
    let transfer = Transfer::open(&broker, deadline, options.rate).await?;
    let mut redrive = Redrive {
        options: &options,
        to: &to,
        broker: &broker,
        deadline,
        transfer,
        copies: None,
        total: None,
        printed: 0,
        left: 0,
        tests_left: 0,
    };
    let outcome = while_connected(&broker, redrive.run()).await;
    let (total, left) = (redrive.total, redrive.left + redrive.tests_left);
    let summary = total.map(|total| redrive.summary(total));
    let url = broker.url.clone();
    broker.close().await;
    // These runs put messages back, or met a queue whose messages may have been put back.
    if (options.dry_run || left > 0 || total == Some(0))
        && let Some(note) = delayed::note(config, &url, options.from.as_str()).await
    {
        let _ = writeln!(io::stderr().lock(), "{note}");
    }
    // Without a total the queue was not opened, which the error explains.
    if let Some(summary) = summary {
        say(&summary);
    }
    Ok(outcome?)
}

fn check_usage(config: &Config, options: &Options, to: &Destination) -> Result<(), Failure> {
    let from = options.from.as_str();
    if options.tests && !options.to.as_ref().is_some_and(is_test_queue) {
        return Err(Failure::Usage("--tests moves only to a queue with `test` in its name".to_owned()));
    }
    if matches!(to, Destination::Queue(to) if *to == options.from) {
        return Err(Failure::Usage("--from and --to are the same queue".to_owned()));
    }
    if config.topology.archive.as_ref().is_some_and(|archive| archive.name == from) {
        return Err(Failure::Usage(format!("{from} is a stream: use replay")));
    }
    let plan = Plan::new(&config.topology, &config.publisher.exchange);
    match plan.configured_queue(from) {
        Some(queue) if queue != from && options.to.is_none() => Err(Failure::Usage(format!(
            "{from} holds messages of {queue} alone: add --to {queue}; without it, every queue that is bound for them \
             would get them again"
        ))),
        _ => Ok(()),
    }
}

/// One run and its counts.
struct Redrive<'a> {
    options: &'a Options,
    to: &'a Destination,
    broker: &'a BrokerConnection,
    /// Maximum time for a reply of the broker.
    deadline: Duration,
    transfer: Transfer,
    /// Publishes the copies that replace messages in their own queue, which do not count as moved. Opened for the first
    /// copy, because a user may be allowed few channels.
    copies: Option<Transfer>,
    /// Messages in the queue at the start; `None` before the queue was opened.
    total: Option<u64>,
    /// Messages that a dry run would move.
    printed: u64,
    /// Messages that do not match the options.
    left: u64,
    /// Test messages that the options do not ask for. Workers must not get them from a queue of events.
    tests_left: u64,
}

impl Redrive<'_> {
    fn moved(&self) -> u64 {
        self.printed + self.transfer.moved()
    }

    async fn run(&mut self) -> anyhow::Result<()> {
        let options = self.options;
        let mut reader = QueueReader::open(self.broker, options, self.deadline).await?;
        self.total = Some(reader.left);
        let most = options.count.map_or(reader.left, |count| count.get().min(reader.left));
        let (mut progress, now) = (Progress::new(most, "messages"), Timestamp::now());
        let (mut pace, mut chosen) = (Pace::new(options.rate), 0);
        while options.count.is_none_or(|count| chosen < count.get())
            && let Some(delivery) = reader.next().await?
        {
            if was_returned_often(&delivery) {
                self.put_back(reader.queue, delivery).await?;
                reader.left += 1; // the copy comes later
                continue;
            }
            if is_test(&delivery) && !options.tests {
                self.tests_left += 1;
                // A consumer with many unacknowledged messages gets no more.
                if matches!(reader.source, Source::Consume(_)) {
                    self.put_back(reader.queue, delivery).await?;
                }
                continue;
            }
            let wanted = wanted(options, &delivery, now);
            chosen += u64::from(wanted);
            if !wanted {
                self.left += 1;
            } else if options.dry_run {
                progress.aside(|| print(&delivery, Format::Text)).context("cannot print")?;
                self.printed += 1;
            } else {
                reader.interrupt.or(pace.tick()).await?;
                let (key, properties) = (original_key(&delivery)?, fresh(&delivery.properties));
                self.transfer.add(Outgoing { to: self.to.clone(), key, properties, delivery }).await?;
            }
            progress.set(self.moved());
        }
        self.transfer.flush().await?;
        progress.finish();
        Ok(reader.close().await?)
    }

    /// Replaces a message with a copy at the end of its queue. The delivery count of the copy starts at 0.
    async fn put_back(&mut self, queue: &ShortString, delivery: Delivery) -> anyhow::Result<()> {
        let to = Destination::Queue(queue.clone());
        let (key, properties) = (original_key(&delivery)?, put_back(&delivery.properties));
        let copies = match &mut self.copies {
            Some(copies) => copies,
            none => none.insert(Transfer::open(self.broker, self.deadline, None).await?),
        };
        copies.add(Outgoing { to, key, properties, delivery }).await?;
        Ok(copies.flush().await?)
    }

    fn summary(&self, total: u64) -> String {
        let (Options { from, dry_run, .. }, to, moved) = (self.options, self.to, self.moved());
        let tests = match self.tests_left {
            0 => String::new(),
            tests => format!(", {tests} test messages left (--tests --to QUEUE moves them)"),
        };
        if *dry_run {
            return format!("{moved} of {total} in {from} would be moved to {to}{tests}");
        }
        let text = format!("{moved} moved from {from} to {to}, {} did not match{tests}", self.left);
        match total.saturating_sub(moved + self.left + self.tests_left) {
            0 => text,
            rest => format!("{text}, {rest} not looked at"),
        }
    }
}

/// Reads as many messages as the queue has at the start. Without this limit, messages that return to the queue would be
/// moved endlessly.
struct QueueReader<'a> {
    broker: &'a BrokerConnection,
    channel: Channel,
    queue: &'a ShortString,
    source: Source,
    /// Messages still to be read.
    left: u64,
    /// Maximum time for a reply of the broker.
    deadline: Duration,
    interrupt: Interrupt,
}

/// How messages are read.
enum Source {
    /// One by one. Any number of messages that do not match can stay unacknowledged until the end.
    Get,
    /// By consuming, the only way to read a queue with a single active consumer.
    Consume(Box<Consumer>),
}

impl<'a> QueueReader<'a> {
    /// Opens the queue of the options for reading.
    async fn open(
        broker: &'a BrokerConnection,
        options: &'a Options,
        deadline: Duration,
    ) -> Result<Self, TransferError> {
        let (queue, rate) = (&options.from, options.rate);
        let opening = async {
            let channel = broker.connection.create_channel().await?;
            let left = count(&channel, queue).await?;
            Ok((channel, u64::from(left)))
        };
        let (channel, left) = in_time(deadline, opening).await?;
        let source = match options.takes_all() && left > 0 {
            true => {
                let arguments = FieldTable::default();
                Source::Consume(Box::new(Consumer::open(&channel, queue, arguments, rate, deadline).await?))
            }
            false => Source::Get,
        };
        Ok(Self { broker, channel, queue, source, left, deadline, interrupt: Interrupt::listen()? })
    }

    /// Returns the next message; `None` at the end, or if another process took the rest.
    async fn next(&mut self) -> Result<Option<Delivery>, TransferError> {
        if self.left == 0 {
            return Ok(None);
        }
        let reading = async {
            match &mut self.source {
                Source::Get => {
                    let got = self.channel.basic_get(self.queue.clone(), BasicGetOptions::default());
                    Ok(in_time(self.deadline, got).await?.map(|BasicGetMessage { delivery, .. }| delivery))
                }
                Source::Consume(consumer) => consumer.next(QUIET).await,
            }
        };
        let read = self.interrupt.or(reading).await??;
        self.left -= u64::from(read.is_some());
        Ok(read)
    }

    /// Returns unacknowledged messages to the queue. An error if the broker delivered fewer messages than the queue
    /// has.
    async fn close(mut self) -> Result<(), TransferError> {
        if let Source::Consume(consumer) = &mut self.source {
            consumer.end().await?;
        }
        let closing = async {
            // channel.close has a reply and basic.ack has none, so this also waits until the acks were processed.
            self.channel.close(200, "done".into()).await?;
            match self.source {
                Source::Consume(_) if self.left > 0 => {
                    count(&self.broker.connection.create_channel().await?, self.queue).await
                }
                _ => Ok(0),
            }
        };
        match in_time(self.deadline, closing).await? {
            0 => Ok(()),
            left => Err(TransferError::NotDelivered { from: self.queue.clone(), left }),
        }
    }
}

impl Options {
    fn takes_all(&self) -> bool {
        let Self { pattern, subject, older_than, newer_than, tests, count, dry_run, .. } = self;
        let filtered = pattern.is_some() || subject.is_some() || older_than.is_some() || newer_than.is_some();
        !filtered && !tests && count.is_none() && !dry_run
    }
}

/// Whether the broker may soon drop the message because it was returned too often.
fn was_returned_often(delivery: &Delivery) -> bool {
    number(&delivery.properties, "x-delivery-count").unwrap_or(0) >= RETURNS_MAX
}

/// Whether `send --to-queue` made the message.
fn is_test(delivery: &Delivery) -> bool {
    delivery.properties.headers().as_ref().is_some_and(|headers| headers.inner().contains_key(TEST))
}

fn wanted(options: &Options, delivery: &Delivery, now: Timestamp) -> bool {
    let properties = &delivery.properties;
    let kind = || properties.kind().as_ref().map_or_else(|| first_key(delivery), ToString::to_string);
    let age = || time_of(properties).map(|time| now.duration_since(time));
    let age_is = |test: fn(Duration, Duration) -> bool, limit: Option<Duration>| {
        limit.is_none_or(|limit| age().is_some_and(|age| test(age.try_into().unwrap_or_default(), limit)))
    };
    options.tests == is_test(delivery)
        && options.pattern.as_ref().is_none_or(|pattern| matches(pattern, &kind()))
        && options.subject.as_ref().is_none_or(|subject| header(properties, "prism-subject").as_ref() == Some(subject))
        && age_is(|age, limit| age > limit, options.older_than)
        && age_is(|age, limit| age < limit, options.newer_than)
}
