//! `send --to-queue QUEUE --vectors`: plays the test messages of `deploy/workers/vectors` to a worker, and reports
//! whether it acknowledged or rejected each.
//!
//! The command makes a queue of its own for the run and deletes it at the end, so that no test message mixes with
//! events. A rejected message is dead-lettered to a reply queue, which shows exactly which one it was. AMQP does not
//! show an ack, so their number comes from the management API.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, anyhow};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use futures_util::StreamExt;
use jiff::Timestamp;
use lapin::message::Delivery;
use lapin::options::{
    BasicConsumeOptions, BasicGetOptions, BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions,
    ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions, QueueDeleteOptions,
};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{BasicProperties, Channel, Confirmation, Consumer, ExchangeKind};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep, timeout};
use uuid::Uuid;

use super::connect::connect;
use super::failure::Failure;
use super::interrupt::Interrupt;
use super::messages::{header, reason_of_death};
use super::output::say;
use super::transfer::{TransferError, in_time, while_connected};
use crate::broker::{BrokerConnection, Management, counts, encoded, reply_code, short_string};
use crate::config::Config;
use crate::event::{Envelope, Event, Fingerprint, Source};
use crate::publisher::message::Message;
use crate::topology::Plan;

/// The messages that the tests of the kits use.
const MESSAGES: &str = include_str!("../../deploy/workers/vectors/messages.json");
/// Header: marks a test message, and names its case.
const TEST: &str = "prism-test";
/// Returns to the queue after which a message is dead-lettered, as in a work queue by default.
const DELIVERY_LIMIT: i32 = 20;
/// The broker deletes the queue of a run that was killed after this time without a worker, in milliseconds.
const EXPIRES_MS: i32 = 600_000;
/// Time between two questions to the management API, whose numbers are up to 5 s old.
const ASK_INTERVAL: Duration = Duration::from_millis(500);
/// AMQP's code for a queue that does not exist.
const NOT_FOUND: u16 = 404;
/// AMQP's code for the exclusive queue of another connection.
const LOCKED: u16 = 405;
/// Above the priority of a worker, which is 0.
const PRIORITY: i32 = 10;

/// One test message, and what a worker has to do with it.
#[derive(Deserialize)]
struct Case {
    name: String,
    why: String,
    message: Fields,
    expect: Expectation,
}

#[derive(Deserialize)]
struct Fields {
    message_id: Option<String>,
    routing_key: String,
    headers: BTreeMap<String, String>,
    #[serde(default)]
    redelivered: bool,
    body: Option<String>,
    body_base64: Option<String>,
    /// Replaces `PAD` in the body by this many letters.
    #[serde(default)]
    pad: usize,
}

#[derive(Deserialize)]
struct Expectation {
    settle: Settle,
}

/// What a worker has to do with a message.
#[derive(Clone, Copy, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
enum Settle {
    Ack,
    Reject,
    /// One of both: the choice is the worker's.
    Any,
}

/// What a worker did with a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Seen {
    Ack,
    Reject,
    /// It came back to the queue until the delivery limit was reached: the worker died, or requeued it.
    ReturnedTooOften,
    /// It is in the queue at the end.
    NotTaken,
    /// Neither rejected nor in the queue, and not all such messages were acknowledged.
    NotSettled,
}

impl Seen {
    fn is(self, expected: Settle) -> bool {
        match expected {
            Settle::Ack => self == Self::Ack,
            Settle::Reject => self == Self::Reject,
            Settle::Any => matches!(self, Self::Ack | Self::Reject),
        }
    }

    /// What is wrong, for somebody who sees no more than this line.
    fn complaint(self, case: &Case) -> &str {
        match self {
            Self::Ack | Self::Reject => &case.why,
            Self::ReturnedTooOften => "the worker died on it, or put it back with requeue=true, again and again",
            Self::NotTaken => "still in the queue at the end of --wait",
            Self::NotSettled => "taken, but this one or another was not acknowledged within --wait",
        }
    }

    fn text(self) -> &'static str {
        match self {
            Self::Ack => "ack",
            Self::Reject => "reject",
            Self::ReturnedTooOften => "returned too often",
            Self::NotTaken => "not taken",
            Self::NotSettled => "not settled",
        }
    }
}

/// Decides what became of each case. `rejected` and `left` are by the name of the case.
fn judge(cases: &[Case], rejected: &BTreeMap<String, Seen>, left: &BTreeMap<String, Seen>, acks: usize) -> Vec<Seen> {
    let gone = cases.iter().filter(|case| !rejected.contains_key(&case.name) && !left.contains_key(&case.name));
    let rest = if gone.count() <= acks { Seen::Ack } else { Seen::NotSettled };
    let seen = |case: &Case| rejected.get(&case.name).or_else(|| left.get(&case.name)).copied().unwrap_or(rest);
    cases.iter().map(seen).collect()
}

/// What the management API has counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Counted {
    acks: usize,
    /// Deliveries to a consumer that does not acknowledge.
    without_ack: usize,
    /// Whether the broker counts at all: statistics can be switched off.
    counts: bool,
}

impl Counted {
    fn of(queue: &Value) -> Self {
        let count = |name: &str| queue["message_stats"][name].as_u64().and_then(|count| usize::try_from(count).ok());
        let without_ack = count("deliver_no_ack").unwrap_or(0) + count("get_no_ack").unwrap_or(0);
        Self { acks: count("ack").unwrap_or(0), without_ack, counts: queue["message_stats"].is_object() }
    }
}

/// Plays the vectors to the worker of `queue`. `wait` limits the wait for the worker, and then for its answers.
pub(super) async fn run(config: &Config, queue: &ShortString, wait: Duration, json: bool) -> Result<(), Failure> {
    check_usage(config, queue)?;
    let cases: Vec<Case> = serde_json::from_str(MESSAGES).context("cannot read the built-in vectors")?;
    let broker = connect(config, "prism-relay send").await?;
    let management = Management::new(&config.broker, &broker.url)?;
    management.version().await.context(
        "cannot count acks without RabbitMQ's management API: enable the plugin rabbitmq_management, or set \
         broker.management_url",
    )?;
    let deadline = config.publisher.confirm_timeout;
    let player = Player { broker: &broker, management, queue, deadline, wait, says: !json };
    let outcome = while_connected(&broker, player.play(&cases)).await;
    broker.close().await;
    let played = outcome?;
    report(queue, &cases, &played, json)?;
    played.deleted.map_err(|error| anyhow!("{error}; {queue} is not deleted: the next run does it").into())
}

fn check_usage(config: &Config, queue: &ShortString) -> Result<(), Failure> {
    let plan = Plan::new(&config.topology, &config.publisher.exchange);
    // A relay with another configuration may declare a queue of this name tomorrow, with other properties.
    if !queue.as_str().contains("test") {
        return Err(Failure::Usage(format!(
            "{queue} could be the name of a real queue: take one with `test` in it, such as {queue}.test, and start \
             your worker with it"
        )));
    }
    if plan.configured_queue(queue.as_str()).is_some() || plan.has_queue(queue.as_str()) {
        return Err(Failure::Usage(format!(
            "{queue} is a queue of the relay, where test messages would mix with events: name a queue that does not \
             exist, such as {queue}.test, and start your worker with it"
        )));
    }
    Ok(())
}

/// What a run found.
struct Played {
    seen: Vec<Seen>,
    counted: Counted,
    /// The id of the message that was sent twice.
    duplicate: Option<String>,
    /// Whether the queue is deleted.
    deleted: Result<(), TransferError>,
}

struct Player<'a> {
    broker: &'a BrokerConnection,
    management: Management,
    queue: &'a ShortString,
    /// Maximum time for a reply of the broker.
    deadline: Duration,
    wait: Duration,
    says: bool,
}

impl Player<'_> {
    async fn play(&self, cases: &[Case]) -> anyhow::Result<Played> {
        let channel = in_time(self.deadline, self.broker.connection.create_channel()).await?;
        in_time(self.deadline, channel.confirm_select(ConfirmSelectOptions::default())).await?;
        let mut interrupt = Interrupt::listen()?;
        self.refuse_existing().await?;
        let replies = short_string(&format!("{}{}", self.reply_prefix(), Uuid::now_v7().simple()))?;
        let playing = async {
            let mut rejected = in_time(self.deadline, self.declare(&channel, &replies)).await?;
            self.play_to(&channel, &replies, &mut rejected, cases).await
        };
        let played = interrupt.or(playing).await;
        // On a channel of its own, because an error has closed the other one. The exchange goes with its last binding,
        // the reply queue with the connection.
        let deleting = async {
            let channel = self.broker.connection.create_channel().await?;
            channel.queue_delete(self.queue.clone(), QueueDeleteOptions::default()).await
        };
        let deleted = in_time(self.deadline, deleting).await.map(drop);
        match (played, &deleted) {
            (Ok(played), _) => Ok(Played { deleted, ..played? }),
            (Err(_), Ok(())) => Err(anyhow!("interrupted; {} is deleted", self.queue)),
            (Err(_), Err(error)) => {
                Err(anyhow!("interrupted; {} is not deleted ({error}): the next run does it", self.queue))
            }
        }
    }

    /// An existing queue may have messages and consumers that are not meant, and other properties. One that an earlier
    /// run left, because it was killed or lost its connection, is deleted.
    async fn refuse_existing(&self) -> anyhow::Result<()> {
        if !self.exists(self.queue).await? {
            return Ok(());
        }
        let queue: Value = self.management.get(&self.path()).await?;
        match queue["arguments"]["x-dead-letter-routing-key"].as_str() {
            Some(replies) if replies.starts_with(&self.reply_prefix()) => {
                if self.exists(&short_string(replies)?).await? {
                    return Err(anyhow!("another run plays to {}: wait for its end, or name another", self.queue));
                }
                let channel = in_time(self.deadline, self.broker.connection.create_channel()).await?;
                in_time(self.deadline, channel.queue_delete(self.queue.clone(), QueueDeleteOptions::default())).await?;
                Ok(())
            }
            _ => Err(anyhow!(
                "{queue} exists already: this command makes the queue, so that no other message is in it. Name one \
                 that does not exist, or delete this one if it is a test queue: rabbitmqctl delete_queue {queue}",
                queue = self.queue
            )),
        }
    }

    /// The queue of the rejected messages of a run is named after the queue, and goes with the connection of the run.
    fn reply_prefix(&self) -> String {
        format!("{}.replies.", self.queue)
    }

    async fn exists(&self, queue: &ShortString) -> Result<bool, TransferError> {
        let probe = in_time(self.deadline, self.broker.connection.create_channel()).await?;
        let passive = QueueDeclareOptions { passive: true, ..Default::default() };
        match timeout(self.deadline, probe.queue_declare(queue.clone(), passive, FieldTable::default())).await {
            Ok(Ok(_)) => Ok(true),
            Ok(Err(error)) if reply_code(&error) == Some(NOT_FOUND) => Ok(false),
            Ok(Err(error)) if reply_code(&error) == Some(LOCKED) => Ok(true),
            Ok(Err(error)) => Err(error.into()),
            Err(_) => Err(TransferError::Silent(self.deadline)),
        }
    }

    /// Declares the queue, the queue of its rejected messages, and an exchange with the name of that, to publish to the
    /// queue under any routing key.
    async fn declare(&self, channel: &Channel, replies: &ShortString) -> Result<Consumer, lapin::Error> {
        let own = QueueDeclareOptions { exclusive: true, auto_delete: true, ..Default::default() };
        channel.queue_declare(replies.clone(), own, FieldTable::default()).await?;
        let mut arguments = FieldTable::default();
        for (name, value) in [("x-queue-type", "quorum"), ("x-dead-letter-exchange", "")] {
            arguments.insert(name.into(), AMQPValue::LongString(value.into()));
        }
        arguments.insert("x-dead-letter-routing-key".into(), AMQPValue::LongString(replies.as_str().into()));
        arguments.insert("x-delivery-limit".into(), AMQPValue::LongInt(DELIVERY_LIMIT));
        arguments.insert("x-expires".into(), AMQPValue::LongInt(EXPIRES_MS));
        let durable = QueueDeclareOptions { durable: true, ..Default::default() };
        channel.queue_declare(self.queue.clone(), durable, arguments).await?;
        let options = ExchangeDeclareOptions { auto_delete: true, ..Default::default() };
        let kind = ExchangeKind::Fanout;
        channel.exchange_declare(replies.clone(), kind, options, FieldTable::default()).await?;
        let (binding, none) = (QueueBindOptions::default(), FieldTable::default());
        channel.queue_bind(self.queue.clone(), replies.clone(), "".into(), binding, none).await?;
        let options = BasicConsumeOptions { no_ack: true, ..Default::default() };
        channel.basic_consume(replies.clone(), "".into(), options, FieldTable::default()).await
    }

    async fn play_to(
        &self,
        channel: &Channel,
        exchange: &ShortString,
        replies: &mut Consumer,
        cases: &[Case],
    ) -> anyhow::Result<Played> {
        let mut ids = Ids::default();
        // First, while the queue is empty: they are taken and put back, so that RabbitMQ marks them as redelivered.
        let (redelivered, others): (Vec<_>, Vec<_>) = cases.iter().partition(|case| case.message.redelivered);
        let put_back = self.take_first(redelivered.len()).await?;
        for case in redelivered {
            self.publish(channel, exchange, case, &mut ids).await?;
        }
        put_back.all(self.deadline).await?;
        self.await_worker(channel).await?;
        for case in others {
            self.publish(channel, exchange, case, &mut ids).await?;
        }
        let mut rejected = BTreeMap::new();
        let counted = self.await_answers(cases.len(), replies, &mut rejected).await?;
        let mut left = BTreeMap::new();
        while let Some(message) = self.get(channel).await? {
            left.insert(case_of(&message), Seen::NotTaken);
        }
        let gone = cases.len() - rejected.len() - left.len();
        if gone > 0 && !counted.counts {
            return Err(anyhow!(
                "RabbitMQ's management API has counted nothing for {}, so nobody knows whether {gone} messages were \
                 acknowledged: raise --wait, or switch its statistics on (management_agent.disable_metrics_collector, \
                 management.rates_mode)",
                self.queue
            ));
        }
        let seen = judge(cases, &rejected, &left, counted.acks);
        Ok(Played { seen, counted, duplicate: ids.duplicate, deleted: Ok(()) })
    }

    /// A consumer that gets the next `count` messages in place of the worker.
    async fn take_first(&self, count: usize) -> Result<Interception, TransferError> {
        let channel = in_time(self.deadline, self.broker.connection.create_channel()).await?;
        let consuming = async {
            channel.basic_qos(u16::try_from(count).unwrap_or(u16::MAX), BasicQosOptions::default()).await?;
            let mut arguments = FieldTable::default();
            arguments.insert("x-priority".into(), AMQPValue::LongInt(PRIORITY));
            channel.basic_consume(self.queue.clone(), "".into(), BasicConsumeOptions::default(), arguments).await
        };
        let deliveries = in_time(self.deadline, consuming).await?;
        Ok(Interception { channel, deliveries, count })
    }

    async fn await_worker(&self, channel: &Channel) -> anyhow::Result<()> {
        if self.says {
            say(&format!("made the queue {}; waiting for your worker to consume it", self.queue));
        }
        // RabbitMQ may count our own consumer for a moment after its channel is closed.
        let (mut seen, end) = (0, Instant::now() + self.wait);
        while Instant::now() < end {
            let found = in_time(self.deadline, counts(channel, self.queue, Duration::ZERO, 1)).await?;
            seen = if found.is_some_and(|counts| counts.consumers > 0) { seen + 1 } else { 0 };
            if seen > 1 {
                return Ok(());
            }
            sleep(ASK_INTERVAL).await;
        }
        Err(anyhow!(
            "no worker consumed {} within {:?}: start yours with this queue, or raise --wait",
            self.queue,
            self.wait
        ))
    }

    async fn publish(
        &self,
        channel: &Channel,
        exchange: &ShortString,
        case: &Case,
        ids: &mut Ids,
    ) -> anyhow::Result<()> {
        let (properties, body) = case.message(ids)?;
        let (key, options) = (short_string(&case.message.routing_key)?, BasicPublishOptions::default());
        let sending = channel.basic_publish(exchange.clone(), key, options, &body, properties);
        let confirm = in_time(self.deadline, sending).await?;
        match in_time(self.deadline, confirm).await? {
            Confirmation::Ack(None) => Ok(()),
            other => Err(anyhow!("the broker did not take the message {}: {other:?}", case.name)),
        }
    }

    /// Collects rejected messages until every message is acknowledged or rejected, or the time is over.
    async fn await_answers(
        &self,
        count: usize,
        replies: &mut Consumer,
        rejected: &mut BTreeMap<String, Seen>,
    ) -> anyhow::Result<Counted> {
        let (path, end) = (self.path(), Instant::now() + self.wait);
        loop {
            while let Ok(reply) = timeout(ASK_INTERVAL, replies.next()).await {
                let reply = reply.ok_or(TransferError::Lost)?.map_err(TransferError::from)?;
                // A vector may have died before, in a queue of its story.
                let is_reject = reason_of_death(&reply.properties, self.queue.as_str()).as_deref() == Some("rejected");
                rejected.insert(case_of(&reply), if is_reject { Seen::Reject } else { Seen::ReturnedTooOften });
            }
            // The API may not know the new queue yet.
            let counted =
                self.management.get::<Value>(&path).await.map(|queue| Counted::of(&queue)).unwrap_or_default();
            if counted.acks + rejected.len() >= count || counted.without_ack > 0 || Instant::now() >= end {
                return Ok(counted);
            }
        }
    }

    fn path(&self) -> String {
        format!("queues/{}/{}", encoded(self.management.vhost()), encoded(self.queue.as_str()))
    }

    async fn get(&self, channel: &Channel) -> Result<Option<Delivery>, TransferError> {
        let options = BasicGetOptions { no_ack: true };
        Ok(in_time(self.deadline, channel.basic_get(self.queue.clone(), options)).await?.map(|got| got.delivery))
    }
}

/// Messages on the way to be put back.
struct Interception {
    channel: Channel,
    deliveries: Consumer,
    count: usize,
}

impl Interception {
    /// Takes the messages, and puts them back by closing the channel.
    async fn all(mut self, deadline: Duration) -> anyhow::Result<()> {
        for _ in 0..self.count {
            let next = timeout(deadline, self.deliveries.next()).await;
            next.map_err(|_| TransferError::Silent(deadline))?
                .ok_or(TransferError::Lost)?
                .map_err(TransferError::from)?;
        }
        Ok(in_time(deadline, self.channel.close(200, "OK".into())).await?)
    }
}

/// The ids of this run for those of the vectors: a worker may remember the ids of an earlier run.
#[derive(Default)]
struct Ids {
    new: BTreeMap<String, Uuid>,
    /// The id that was used twice.
    duplicate: Option<String>,
}

impl Ids {
    /// What is not a UUID stays as it is.
    fn of(&mut self, id: &str) -> String {
        if Uuid::parse_str(id).is_err() {
            return id.to_owned();
        }
        if let Some(new) = self.new.get(id) {
            self.duplicate = Some(new.to_string());
        }
        self.new.entry(id.to_owned()).or_insert_with(Uuid::now_v7).to_string()
    }
}

impl Case {
    /// The message as the relay would publish it, but for what the vector says.
    fn message(&self, ids: &mut Ids) -> anyhow::Result<(BasicProperties, Bytes)> {
        let fields = &self.message;
        let body = match (&fields.body, &fields.body_base64) {
            (Some(text), _) => Bytes::from(text.replace("PAD", &"x".repeat(fields.pad))),
            (None, Some(text)) => Bytes::from(BASE64_STANDARD.decode(text)?),
            (None, None) => return Err(anyhow!("{} has no body", self.name)),
        };
        let event = Event {
            id: Uuid::now_v7(),
            accepted_ms: Timestamp::now().as_millisecond(),
            source: Source::Webhook,
            authentic: true,
            trace: None,
            fingerprint: Fingerprint::of(&body),
            subject: None,
            body: body.clone(),
        };
        let message = Message::new(&event, Envelope::parse(&body).ok().as_ref(), None);
        let mut headers = message.properties.headers().clone().unwrap_or_default();
        let own = fields.headers.iter().filter(|(name, _)| *name != "prism-received-at");
        let own = own.map(|(name, value)| (name.as_str(), value.as_str()));
        for (name, value) in own.chain([(TEST, self.name.as_str())]) {
            headers.insert(name.into(), AMQPValue::LongString(value.into()));
        }
        let id = fields.message_id.as_deref().map(|id| ids.of(id));
        let properties = match id {
            Some(id) => message.properties.with_message_id(short_string(&id)?),
            None => without_id(&message.properties),
        };
        Ok((properties.with_headers(headers), body))
    }
}

/// lapin has no way to take a property away.
fn without_id(properties: &BasicProperties) -> BasicProperties {
    let mut new = BasicProperties::default().with_delivery_mode(2);
    if let Some(kind) = properties.kind() {
        new = new.with_type(kind.clone());
    }
    new
}

fn case_of(message: &Delivery) -> String {
    header(&message.properties, TEST).unwrap_or_default()
}

fn report(queue: &ShortString, cases: &[Case], played: &Played, json: bool) -> Result<(), Failure> {
    let rows = cases.iter().zip(&played.seen);
    let wrong = rows.clone().filter(|(case, seen)| !seen.is(case.expect.settle)).count();
    let is_auto = played.counted.without_ack > 0;
    if json {
        let cases: Vec<_> = rows
            .map(|(case, seen)| {
                let expected = case.expect.settle;
                json!({ "name": case.name, "expected": expected, "seen": seen, "ok": seen.is(expected) })
            })
            .collect();
        let report = json!({
            "queue": queue.as_str(), "cases": cases, "wrong": wrong, "acks": played.counted.acks,
            "automatic_acks": is_auto, "duplicate": played.duplicate,
        });
        say(&report.to_string());
    } else {
        say(&format!("{:<40} {:<8} {}", "message", "expected", "seen"));
        for (case, seen) in rows {
            let expected = match case.expect.settle {
                Settle::Ack => "ack",
                Settle::Reject => "reject",
                Settle::Any => "any",
            };
            let is_right = seen.is(case.expect.settle);
            let note = if is_right { String::new() } else { format!("   WRONG: {}", seen.complaint(case)) };
            say(&format!("{:<40} {expected:<8} {}{note}", case.name, seen.text()));
        }
        if is_auto {
            say("the worker consumes with automatic acks: what it holds is lost when it dies; switch them off");
        }
        if let Some(id) = &played.duplicate {
            say(&format!("message_id {id} was sent twice: check that your worker did its work once"));
        }
        say(&format!("{} messages, {wrong} wrong", cases.len()));
    }
    if wrong > 0 || is_auto { Err(Failure::Reported) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cases() -> Vec<Case> {
        serde_json::from_str(MESSAGES).unwrap()
    }

    /// The headers that a vector may add to those of the relay, for its story.
    const ADDED: [&str; 7] = [
        "x-first-death-queue",
        "x-first-death-reason",
        "x-first-death-exchange",
        "prism-original-key",
        "prism-replayed-at",
        "prism-future",
        "tracestate",
    ];

    #[test]
    fn each_vector_is_what_the_relay_would_publish_for_its_body() {
        let texts: Vec<Value> = serde_json::from_str(MESSAGES).unwrap();
        let mut names = std::collections::BTreeSet::new();
        for (case, text) in cases().into_iter().zip(texts) {
            let name = &case.name;
            let (properties, body) = case.message(&mut Ids::default()).unwrap();
            let envelope = Envelope::parse(&body).ok();
            let key = crate::publisher::message::routing_key(envelope.as_ref());
            let came_back = case.message.headers.contains_key("x-first-death-queue");
            let was_moved = case.message.headers.contains_key("prism-original-key");
            assert_eq!(case.message.routing_key == key, !came_back && !was_moved, "{name}: {key}");
            assert_eq!(text["message"]["type"].as_str(), properties.kind().as_ref().map(ShortString::as_str), "{name}");
            assert_eq!(header(&properties, TEST).as_ref(), Some(name));

            let plain = Case { message: Fields { headers: BTreeMap::new(), ..case.message }, ..case };
            let (relayed, _) = plain.message(&mut Ids::default()).unwrap();
            let of_the_story = |name: &str| [&ADDED[..], &["prism-received-at", TEST]].concat().contains(&name);
            let relayed: BTreeMap<_, _> = relayed
                .headers()
                .iter()
                .flat_map(|headers| headers.inner().keys())
                .filter(|name| !of_the_story(name.as_str()) && name.as_str() != "prism-verified")
                .map(|name| (name.as_str(), header(&relayed, name.as_str()).unwrap()))
                .collect();
            let vector = text["message"]["headers"].as_object().unwrap().iter();
            let mut vector: BTreeMap<_, _> = vector
                .filter(|(name, _)| !of_the_story(name))
                .map(|(name, value)| (name.as_str(), value.as_str().unwrap().to_owned()))
                .collect();
            assert!(vector.remove("prism-verified").is_some_and(|word| ["true", "false"].contains(&&*word)));
            assert_eq!(vector, relayed, "{}", plain.name);
            assert!(names.insert(plain.name.clone()), "{} is there twice", plain.name);
        }
    }

    #[test]
    fn ids_are_new_in_each_run_and_the_same_within_it() {
        let (mut ids, old) = (Ids::default(), "019a0000-0000-7000-8000-000000000001");
        let first = ids.of(old);
        assert_ne!(first, old);
        assert_eq!(ids.duplicate, None);
        assert_eq!((ids.of(old), ids.duplicate.clone()), (first.clone(), Some(first)));
        assert_eq!(ids.of("../../evil"), "../../evil");
    }

    #[test]
    fn a_message_is_acknowledged_only_if_all_that_are_gone_are() {
        let cases: Vec<Case> = cases().into_iter().take(4).collect();
        let of = |index: usize, seen| BTreeMap::from([(cases[index].name.clone(), seen)]);
        let (rejected, left) = (of(1, Seen::Reject), of(2, Seen::NotTaken));
        let all = [Seen::Ack, Seen::Reject, Seen::NotTaken, Seen::Ack];
        assert_eq!(judge(&cases, &rejected, &left, 2), all);
        let some = [Seen::NotSettled, Seen::Reject, Seen::NotTaken, Seen::NotSettled];
        assert_eq!(judge(&cases, &rejected, &left, 1), some);
        for (expected, right) in [
            (Settle::Ack, vec![Seen::Ack]),
            (Settle::Reject, vec![Seen::Reject]),
            (Settle::Any, vec![Seen::Ack, Seen::Reject]),
        ] {
            let every = [Seen::Ack, Seen::Reject, Seen::ReturnedTooOften, Seen::NotTaken, Seen::NotSettled];
            assert_eq!(every.into_iter().filter(|seen| seen.is(expected)).collect::<Vec<_>>(), right);
        }
    }

    #[test]
    fn acks_are_counted_by_the_management_api() {
        let queue = json!({ "messages": 3, "message_stats": { "ack": 5, "deliver": 9, "deliver_no_ack": 1 } });
        assert_eq!(Counted::of(&queue), Counted { acks: 5, without_ack: 1, counts: true });
        assert_eq!(Counted::of(&json!({ "name": "q" })), Counted::default());
    }
}
