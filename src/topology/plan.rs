//! The plan: from the configuration to exchanges, queues and bindings. Pure.

use std::fmt;

use lapin::types::{AMQPValue, FieldTable, LongString};

use super::{DEAD, ExchangeKind, UNROUTED};
use crate::config;

/// After so many returns to the queue a message goes to the dead letters; RabbitMQ 4's own default.
const DELIVERY_LIMIT: i64 = 20;

/// Everything that has to exist, in the order in which it can be created.
#[derive(Clone, Debug)]
pub struct Plan {
    entities: Vec<Entity>,
    pub bindings: Vec<Binding>,
}

#[derive(Clone, Debug)]
pub enum Entity {
    Exchange(Exchange),
    Queue(Queue),
}

#[derive(Clone, Debug)]
pub struct Exchange {
    pub name: String,
    pub kind: ExchangeKind,
    pub arguments: FieldTable,
}

#[derive(Clone, Debug)]
pub struct Queue {
    pub name: String,
    pub arguments: FieldTable,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Binding {
    pub queue: String,
    pub exchange: String,
    pub key: String,
}

impl Plan {
    pub fn new(topology: &config::Topology, exchange: &str) -> Self {
        let mut plan = Self { entities: Vec::new(), bindings: Vec::new() };
        plan.exchange(UNROUTED, ExchangeKind::Fanout, &[]);
        plan.queue(UNROUTED, &[]);
        plan.bind(UNROUTED, UNROUTED, "");
        plan.exchange(DEAD, ExchangeKind::Topic, &[]);
        plan.queue(DEAD, &[]);
        plan.bind(DEAD, DEAD, "#");
        plan.exchange(exchange, ExchangeKind::Topic, &[("alternate-exchange", text(UNROUTED))]);
        for queue in &topology.queues {
            plan.queue(
                &queue.name,
                &[
                    ("x-dead-letter-exchange", text(DEAD)),
                    // Without these two a message could get lost on its way to the dead letters
                    // (https://www.rabbitmq.com/docs/quorum-queues#dead-lettering).
                    ("x-dead-letter-strategy", text("at-least-once")),
                    ("x-overflow", text("reject-publish")),
                    ("x-delivery-limit", AMQPValue::LongLongInt(DELIVERY_LIMIT)),
                ],
            );
            for key in &queue.bindings {
                plan.bind(&queue.name, exchange, key);
            }
        }
        plan
    }

    /// How many declarations it takes.
    pub fn steps(&self) -> u32 {
        u32::try_from(self.entities.len() + self.bindings.len()).unwrap_or(u32::MAX)
    }

    pub fn entities(&self) -> &[Entity] {
        &self.entities
    }

    fn exchange(&mut self, name: &str, kind: ExchangeKind, arguments: &[(&str, AMQPValue)]) {
        let arguments = table(arguments);
        self.entities.push(Entity::Exchange(Exchange { name: name.to_owned(), kind, arguments }));
    }

    fn queue(&mut self, name: &str, arguments: &[(&str, AMQPValue)]) {
        let mut arguments = table(arguments);
        arguments.insert("x-queue-type".into(), text("quorum"));
        self.entities.push(Entity::Queue(Queue { name: name.to_owned(), arguments }));
    }

    fn bind(&mut self, queue: &str, exchange: &str, key: &str) {
        self.bindings.push(Binding { queue: queue.to_owned(), exchange: exchange.to_owned(), key: key.to_owned() });
    }
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

impl fmt::Display for Entity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exchange(exchange) => write!(f, "exchange {}", exchange.name),
            Self::Queue(queue) => write!(f, "queue {}", queue.name),
        }
    }
}

impl fmt::Display for Binding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "binding of queue {} to exchange {} by {:?}", self.queue, self.exchange, self.key)
    }
}
