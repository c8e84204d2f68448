//! Makes a plan out of the configuration: exchanges, queues and bindings. Pure.
//!
//! Events are published to a fanout exchange, and everything that only watches them hangs there:
//!
//! ```text
//! prism.webhooks (fanout) --> prism.events (topic) --by key--> work queues
//!           |                         `--no queue matches----> prism.unrouted
//!           `--> archive, queues of `tail`
//! ```
//!
//! In `prism.events` an archive would be a route like any other: an event that no work queue takes would count as
//! routed, and would not reach `prism.unrouted`.
//!
//! A queue `q` with `retry_delays` has a retry ladder, made of what every RabbitMQ has:
//!
//! ```text
//! q --rejected--> q.rejected --> q.retry --first time--> q.retry.1 --after the delay, as q:1--> exchange q --> q
//!                     |             |-----as q:1-------> q.retry.2 --after the delay, as q:2--> exchange q --> q
//!                     |             `-----as q:2, the last step--> prism.dead
//!                     `--expired, or returned too often--> prism.dead
//! ```
//!
//! The routing key of a message says how often it was rejected, because a queue can change nothing else when it passes
//! a message on. No event has such a key: event types with a colon are published under another one. Messages that
//! expired or were returned too often must not climb the ladder: RabbitMQ drops a message that comes back to the same
//! queue, as a loop, unless a consumer rejected it on the way.

use std::collections::BTreeSet;
use std::fmt;
use std::time::Duration;

use lapin::ExchangeKind;
use lapin::types::{AMQPValue, FieldTable, LongString};
use serde::Serialize;

use super::spec::{ArchiveSpec, QueueSpec, Spec};

/// The topic exchange that work queues are bound to. The name is fixed, so that workers need not know the
/// configuration.
pub(crate) const EVENTS: &str = "prism.events";
/// Exchange and queue for events that match no work queue. The name is fixed, so that every tool finds it.
pub(crate) const UNROUTED: &str = "prism.unrouted";
/// Exchange and queue for dead letters: messages that workers rejected or that expired. The name is fixed.
pub(crate) const DEAD: &str = "prism.dead";

/// The exchange type of a plugin that RabbitMQ comes with, and that has to be enabled.
pub(super) const CONSISTENT_HASH: &str = "x-consistent-hash";

/// Everything that has to exist, in the order in which it can be created.
#[derive(Clone, Debug, Default)]
pub(crate) struct Plan {
    entities: Vec<Entity>,
    /// The names in the configuration. The names of partitions, retry queues and inner exchanges begin with them.
    queues: Vec<String>,
    pub bindings: Vec<Binding>,
    /// Bindings that an earlier version of the relay made, and that must not exist.
    pub retired: Vec<Binding>,
}

/// What has to be declared, apart from bindings.
#[derive(Clone, Debug)]
pub(crate) enum Entity {
    Exchange(Exchange),
    Queue(Queue),
}

#[derive(Clone, Debug)]
pub(crate) struct Exchange {
    pub name: String,
    pub kind: ExchangeKind,
    pub arguments: FieldTable,
}

#[derive(Clone, Debug)]
pub(crate) struct Queue {
    pub name: String,
    pub role: QueueRole,
    pub arguments: FieldTable,
}

/// What a queue is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum QueueRole {
    /// Workers consume it: a work queue, or a partition of one.
    Work,
    /// Rejected messages wait in it until they go back to their work queue.
    Retry,
    /// Dead letters.
    Dead,
    /// Events that match no work queue.
    Unrouted,
    /// The stream of all events.
    Archive,
}

#[derive(Clone, Debug)]
pub(crate) struct Binding {
    /// The exchange from which messages come.
    pub exchange: String,
    pub to: Target,
    pub key: String,
    pub arguments: FieldTable,
}

/// Where a binding leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    Queue(String),
    Exchange(String),
}

impl Plan {
    /// `exchange`: where the relay publishes. With [`EVENTS`] there is no fanout in front.
    pub(crate) fn new(spec: &Spec, exchange: &str) -> Self {
        let mut plan = Self::default();
        plan.exchange(UNROUTED, ExchangeKind::Fanout, &[]);
        plan.queue(QueueRole::Unrouted, UNROUTED, &[]);
        plan.bind(UNROUTED, Target::Queue(UNROUTED.to_owned()), "");
        plan.exchange(DEAD, ExchangeKind::Topic, &[]);
        plan.queue(QueueRole::Dead, DEAD, &[]);
        plan.bind(DEAD, Target::Queue(DEAD.to_owned()), "#");
        plan.exchange(EVENTS, ExchangeKind::Topic, &[("alternate-exchange", text(UNROUTED))]);
        for queue in &spec.queues {
            plan.work_queue(queue);
            plan.queues.push(queue.name.clone());
        }
        if exchange != EVENTS {
            plan.exchange(exchange, ExchangeKind::Fanout, &[]);
            plan.bind(exchange, Target::Exchange(EVENTS.to_owned()), "");
        }
        if let Some(archive) = &spec.archive {
            plan.archive(archive, &spec.queues, exchange);
        }
        plan
    }

    /// The number of declarations, each of which is a round trip.
    pub(crate) fn steps(&self) -> u32 {
        u32::try_from(self.entities.len() + self.bindings.len() + self.retired.len()).unwrap_or(u32::MAX)
    }

    pub(crate) fn entities(&self) -> &[Entity] {
        &self.entities
    }

    /// An entity of a kind, `exchange` or `queue`.
    pub(crate) fn entity(&self, kind: &str, name: &str) -> Option<&Entity> {
        self.entities.iter().find(|entity| entity.kind() == kind && entity.name() == name)
    }

    pub(crate) fn has_queue(&self, name: &str) -> bool {
        self.entity("queue", name).is_some()
    }

    /// Whether an exchange is a part of a queue, so that nothing but what is planned may be bound to it.
    pub(crate) fn is_inner_exchange(&self, name: &str) -> bool {
        self.queues.iter().any(|queue| {
            let rest = name.strip_prefix(queue.as_str());
            rest.is_some_and(|rest| matches!(rest, "" | ".rejected" | ".retry" | ".retry.1"))
        })
    }

    /// The configured queue to which `name` belongs: as the queue itself, or as a partition or a retry queue of this or
    /// an earlier configuration.
    pub(crate) fn configured_queue(&self, name: &str) -> Option<&str> {
        let number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        let is_part = |rest: &str| {
            rest.is_empty()
                || rest.strip_prefix('.').is_some_and(number)
                || rest.strip_prefix(".retry.").is_some_and(number)
        };
        self.queues.iter().find(|queue| name.strip_prefix(queue.as_str()).is_some_and(is_part)).map(String::as_str)
    }

    /// Entities that occur more than once.
    pub(crate) fn clashes(&self) -> Vec<String> {
        let mut seen = BTreeSet::new();
        self.entities.iter().map(Entity::to_string).filter(|entity| !seen.insert(entity.clone())).collect()
    }

    /// Plans one queue or several partitions. Their bindings to the exchange come last, so that no event is routed to a
    /// queue that is not complete.
    fn work_queue(&mut self, queue: &QueueSpec) {
        let name = &queue.name;
        let mut arguments = vec![("x-delivery-limit", AMQPValue::LongLongInt(queue.delivery_limit.into()))];
        if queue.single_active_consumer || queue.partitions.is_some() {
            arguments.push(("x-single-active-consumer", AMQPValue::Boolean(true)));
        }
        arguments.extend(queue.max_length.map(|length| ("x-max-length", AMQPValue::LongLongInt(length as i64))));
        arguments.extend(queue.ttl.map(|ttl| ("x-message-ttl", milliseconds(ttl))));
        let dead = if queue.retry_delays.is_empty() { DEAD.to_owned() } else { self.ladder(queue) };
        let arguments = [dead_lettered_to(&dead, None), arguments].concat();

        let entry = match queue.partitions {
            Some(partitions) => {
                let by = [("hash-header", text("prism-subject")), ("alternate-exchange", text(UNROUTED))];
                self.exchange(name, ExchangeKind::Custom(CONSISTENT_HASH.to_owned()), &by);
                for partition in 1..=partitions {
                    let partition = format!("{name}.{partition}");
                    self.queue(QueueRole::Work, &partition, &arguments);
                    // The key is the weight.
                    self.bind(name, Target::Queue(partition), "1");
                }
                Target::Exchange(name.clone())
            }
            None => {
                self.queue(QueueRole::Work, name, &arguments);
                if !queue.retry_delays.is_empty() {
                    self.exchange(name, ExchangeKind::Fanout, &[("alternate-exchange", text(UNROUTED))]);
                    self.bind(name, Target::Queue(name.clone()), "");
                }
                Target::Queue(name.clone())
            }
        };
        for key in &queue.bindings {
            self.bind(EVENTS, entry.clone(), key);
        }
    }

    /// Plans the retry ladder (see the module's documentation) and returns the exchange that takes rejected messages.
    fn ladder(&mut self, queue: &QueueSpec) -> String {
        let name = &queue.name;
        let (rejected, retry) = (format!("{name}.rejected"), format!("{name}.retry"));
        let wait = |step: usize| format!("{retry}.{step}");
        self.exchange(&wait(1), ExchangeKind::Fanout, &[]);
        self.exchange(&retry, ExchangeKind::Direct, &[("alternate-exchange", text(&wait(1)))]);
        self.exchange(&rejected, ExchangeKind::Headers, &[("alternate-exchange", text(&retry))]);
        // RabbitMQ has a header for the last death from 3.13 on; before that, only for the first one.
        for which in ["x-first-death-reason", "x-last-death-reason"] {
            for reason in ["delivery_limit", "expired"] {
                let matches = [("x-match", text("all-with-x")), (which, text(reason))];
                self.bind_by(&rejected, Target::Exchange(DEAD.to_owned()), "", &matches);
            }
        }
        let steps = queue.retry_delays.len();
        for (step, delay) in (1..=steps).zip(&queue.retry_delays) {
            let back = dead_lettered_to(name, Some(&step_key(name, step)));
            let arguments = [back, vec![("x-message-ttl", milliseconds(*delay))]].concat();
            self.queue(QueueRole::Retry, &wait(step), &arguments);
            match step {
                1 => self.bind(&wait(1), Target::Queue(wait(1)), ""),
                _ => self.bind(&retry, Target::Queue(wait(step)), &step_key(name, step - 1)),
            }
        }
        self.bind(&retry, Target::Exchange(DEAD.to_owned()), &step_key(name, steps));
        rejected
    }

    /// Plans the archive, bound to the fanout. Without the fanout it is bound like the work queues and to the unrouted
    /// events, as earlier versions did: with `#` none would ever reach the unrouted ones.
    fn archive(&mut self, archive: &ArchiveSpec, queues: &[QueueSpec], exchange: &str) {
        let mut arguments = table(&[("x-queue-type", text("stream"))]);
        arguments.insert("x-max-age".into(), text(&format!("{}s", archive.max_age.as_secs())));
        if let Some(bytes) = archive.max_bytes {
            arguments.insert("x-max-length-bytes".into(), AMQPValue::LongLongInt(bytes as i64));
        }
        let (name, role) = (archive.name.clone(), QueueRole::Archive);
        self.entities.push(Entity::Queue(Queue { name, role, arguments }));
        let to = Target::Queue(archive.name.clone());
        let keys: BTreeSet<_> = queues.iter().flat_map(|queue| &queue.bindings).collect();
        let by_key = keys.into_iter().map(|key| binding(EVENTS, to.clone(), key, &[]));
        let without_fanout = [binding(UNROUTED, to.clone(), "", &[])].into_iter().chain(by_key);
        if exchange == EVENTS {
            self.bindings.extend(without_fanout);
        } else {
            self.retired.extend(without_fanout);
            self.bind(exchange, to, "");
        }
    }

    fn exchange(&mut self, name: &str, kind: ExchangeKind, arguments: &[(&str, AMQPValue)]) {
        let arguments = table(arguments);
        self.entities.push(Entity::Exchange(Exchange { name: name.to_owned(), kind, arguments }));
    }

    fn queue(&mut self, role: QueueRole, name: &str, arguments: &[(&str, AMQPValue)]) {
        let mut arguments = table(arguments);
        arguments.insert("x-queue-type".into(), text("quorum"));
        self.entities.push(Entity::Queue(Queue { name: name.to_owned(), role, arguments }));
    }

    fn bind(&mut self, exchange: &str, to: Target, key: &str) {
        self.bind_by(exchange, to, key, &[]);
    }

    fn bind_by(&mut self, exchange: &str, to: Target, key: &str, arguments: &[(&str, AMQPValue)]) {
        self.bindings.push(binding(exchange, to, key, arguments));
    }
}

fn binding(exchange: &str, to: Target, key: &str, arguments: &[(&str, AMQPValue)]) -> Binding {
    Binding { exchange: exchange.to_owned(), to, key: key.to_owned(), arguments: table(arguments) }
}

/// The routing key of a message that comes back after `step` rejections.
fn step_key(queue: &str, step: usize) -> String {
    format!("{queue}:{step}")
}

/// Arguments that dead-letter to an exchange. Without strategy and overflow a message could get lost on the way
/// (<https://www.rabbitmq.com/docs/quorum-queues#dead-lettering>).
fn dead_lettered_to(exchange: &str, key: Option<&str>) -> Vec<(&'static str, AMQPValue)> {
    let mut arguments = vec![
        ("x-dead-letter-exchange", text(exchange)),
        ("x-dead-letter-strategy", text("at-least-once")),
        ("x-overflow", text("reject-publish")),
    ];
    arguments.extend(key.map(|key| ("x-dead-letter-routing-key", text(key))));
    arguments
}

fn milliseconds(duration: Duration) -> AMQPValue {
    AMQPValue::LongLongInt(i64::try_from(duration.as_millis()).unwrap_or(i64::MAX))
}

fn text(text: &str) -> AMQPValue {
    AMQPValue::LongString(LongString::from(text))
}

fn table(arguments: &[(&str, AMQPValue)]) -> FieldTable {
    let mut table = FieldTable::default();
    for (name, value) in arguments {
        table.insert((*name).into(), value.clone());
    }
    table
}

impl Queue {
    pub(crate) fn is_stream(&self) -> bool {
        self.role == QueueRole::Archive
    }

    /// The configured maximum number of ready messages.
    pub(super) fn max_length(&self) -> Option<u64> {
        match self.arguments.inner().get("x-max-length") {
            Some(AMQPValue::LongLongInt(length)) => u64::try_from(*length).ok(),
            _ => None,
        }
    }
}

impl Entity {
    pub(crate) fn name(&self) -> &str {
        match self {
            Self::Exchange(exchange) => &exchange.name,
            Self::Queue(queue) => &queue.name,
        }
    }

    /// RabbitMQ's word for the kind of entity: `exchange` or `queue`.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Exchange(_) => "exchange",
            Self::Queue(_) => "queue",
        }
    }

    pub(crate) fn arguments(&self) -> &FieldTable {
        match self {
            Self::Exchange(exchange) => &exchange.arguments,
            Self::Queue(queue) => &queue.arguments,
        }
    }
}

impl fmt::Display for Entity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exchange(exchange) => write!(f, "exchange {}", exchange.name),
            Self::Queue(queue) => write!(f, "queue {}", queue.name),
        }
    }
}

impl Target {
    pub(crate) fn name(&self) -> &str {
        match self {
            Self::Queue(name) | Self::Exchange(name) => name,
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Queue(name) => write!(f, "queue {name}"),
            Self::Exchange(name) => write!(f, "exchange {name}"),
        }
    }
}

impl fmt::Display for Binding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "binding of {} to exchange {} by {:?}", self.to, self.exchange, self.key)
    }
}
