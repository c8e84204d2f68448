//! What must exist on the broker: exchanges, queues, bindings. Created, checked or left alone as
//! `topology.declare` says.

mod definitions;
mod diff;
mod live;
mod mending;
mod plan;
mod spec;

use lapin::options::{ExchangeBindOptions, ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::{FieldTable, ShortString};
use lapin::{Channel, Connection, ExchangeKind};
use thiserror::Error;

pub use definitions::{definitions, kind, plain};
pub use diff::{Difference, Kind, Live, differences};
pub use mending::{Mending, Remedy, quote};
pub use plan::{Binding, CONSISTENT_HASH, Entity, Exchange, Plan, Queue, Target};
pub use spec::{ArchiveSpec, Declare, QueueSpec, Spec};

use crate::broker::{reply_code, reply_text};

/// Fanout exchange and queue for what no work queue is bound to. Fixed, so that every tool finds it.
pub const UNROUTED: &str = "prism.unrouted";
/// Topic exchange and queue for what the workers have given up.
pub const DEAD: &str = "prism.dead";
/// Unless the configuration gives the archive another name.
pub const ARCHIVE: &str = "prism.archive";

/// What keeps the broker from being as planned; each says what to do.
#[derive(Debug, Error)]
pub enum TopologyError {
    #[error(
        "{entity} exists with other properties: {reply}. prism-relay topology diff prints how to replace it: a queue gets a new \
         name in the configuration, its workers move, and what is left in the old one goes over with redrive --from OLD --to NEW, \
         or its own workers finish it. Or set topology.declare to \"passive\" to take it as it is"
    )]
    Clash { entity: String, reply: String },
    #[error("{entity} does not exist. Create it, or set topology.declare to \"active\"")]
    Missing { entity: String },
    #[error(
        "{entity}: the broker has no exchanges of that type ({reply}). Partitions need a plugin that comes with RabbitMQ; on \
         each node: rabbitmq-plugins enable rabbitmq_consistent_hash_exchange"
    )]
    NoPlugin { entity: String, reply: String },
    #[error("{entity}: the broker refuses: {reply}")]
    Refused { entity: String, reply: String },
    #[error("the connection failed while the topology was declared")]
    Connection(#[from] lapin::Error),
}

/// Brings the broker to the plan, or says what differs.
pub async fn establish(connection: &Connection, plan: &Plan, declare: Declare) -> Result<(), TopologyError> {
    match declare {
        Declare::Active => {
            // The first failure ends the attempt, so one channel serves for all.
            let channel = connection.create_channel().await?;
            for entity in plan.entities() {
                declare_entity(&channel, entity).await.map_err(|error| explain(entity, error))?;
            }
            for binding in &plan.bindings {
                bind(&channel, binding).await.map_err(|error| explain(binding, error))?;
            }
            close(channel).await;
            Ok(())
        }
        Declare::Passive => {
            for entity in plan.entities() {
                match look(connection, entity).await? {
                    Found::Yes => {}
                    Found::No => return Err(TopologyError::Missing { entity: entity.to_string() }),
                    Found::Refused(error) => return Err(error),
                }
            }
            Ok(())
        }
        Declare::Off => Ok(()),
    }
}

/// How an entity on the broker compares with the plan.
#[derive(Debug)]
pub enum Comparison {
    Same,
    /// It exists, and that is all that a passive relay asks for.
    Present,
    Absent,
    Differs(TopologyError),
}

/// Compares without creating anything, as far as `declare` makes it matter. AMQP cannot tell about bindings.
pub async fn compare(connection: &Connection, entity: &Entity, declare: Declare) -> Result<Comparison, lapin::Error> {
    match look(connection, entity).await {
        Ok(Found::No) => return Ok(Comparison::Absent),
        Ok(Found::Refused(error)) => return Ok(Comparison::Differs(error)),
        Ok(Found::Yes) if declare != Declare::Active => return Ok(Comparison::Present),
        Ok(Found::Yes) => {}
        Err(TopologyError::Connection(error)) => return Err(error),
        Err(error) => return Ok(Comparison::Differs(error)),
    }
    // A passive declaration ignores arguments. A full one changes nothing where the entity exists, and compares them.
    let channel = connection.create_channel().await?;
    match declare_entity(&channel, entity).await {
        Ok(()) => {
            close(channel).await;
            Ok(Comparison::Same)
        }
        Err(error) => match explain(entity, error) {
            TopologyError::Connection(error) => Err(error),
            error => Ok(Comparison::Differs(error)),
        },
    }
}

enum Found {
    Yes,
    No,
    Refused(TopologyError),
}

/// On a channel of its own, because the broker closes it if the entity is missing.
async fn look(connection: &Connection, entity: &Entity) -> Result<Found, TopologyError> {
    let channel = connection.create_channel().await?;
    let passive = match entity {
        Entity::Exchange(exchange) => {
            let options = ExchangeDeclareOptions { passive: true, durable: true, ..Default::default() };
            channel.exchange_declare(name(&exchange.name), exchange.kind.clone(), options, FieldTable::default()).await
        }
        Entity::Queue(queue) => {
            let options = QueueDeclareOptions { passive: true, durable: true, ..Default::default() };
            channel.queue_declare(name(&queue.name), options, FieldTable::default()).await.map(|_| ())
        }
    };
    match passive {
        Ok(()) => {
            close(channel).await;
            Ok(Found::Yes)
        }
        Err(error) if reply_code(&error) == Some(404) => Ok(Found::No),
        Err(error) => match explain(entity, error) {
            error @ TopologyError::Connection(_) => Err(error),
            error => Ok(Found::Refused(error)),
        },
    }
}

async fn declare_entity(channel: &Channel, entity: &Entity) -> Result<(), lapin::Error> {
    match entity {
        Entity::Exchange(Exchange { name: exchange, kind, arguments }) => {
            let options = ExchangeDeclareOptions { durable: true, ..Default::default() };
            channel.exchange_declare(name(exchange), kind.clone(), options, arguments.clone()).await
        }
        Entity::Queue(Queue { name: queue, arguments }) => {
            let options = QueueDeclareOptions { durable: true, ..Default::default() };
            channel.queue_declare(name(queue), options, arguments.clone()).await.map(|_| ())
        }
    }
}

async fn bind(channel: &Channel, binding: &Binding) -> Result<(), lapin::Error> {
    let Binding { exchange, to, key, arguments } = binding;
    let arguments = arguments.clone();
    match to {
        Target::Queue(to) => {
            channel.queue_bind(name(to), name(exchange), name(key), QueueBindOptions::default(), arguments).await
        }
        Target::Exchange(to) => {
            channel.exchange_bind(name(to), name(exchange), name(key), ExchangeBindOptions::default(), arguments).await
        }
    }
}

/// A channel that is left behind is closed with its connection at the latest.
async fn close(channel: Channel) {
    let _ = channel.close(200, "OK".into()).await;
}

/// Tells the broker's own "no" from a connection that broke.
fn explain(entity: &impl std::fmt::Display, error: lapin::Error) -> TopologyError {
    let (entity, reply) = (entity.to_string(), reply_text(&error));
    match reply_code(&error) {
        Some(406) => TopologyError::Clash { entity, reply },
        Some(404) => TopologyError::Missing { entity },
        Some(503) if reply.contains(CONSISTENT_HASH) => TopologyError::NoPlugin { entity, reply },
        Some(403 | 402 | 405 | 530 | 540) => TopologyError::Refused { entity, reply },
        _ => TopologyError::Connection(error),
    }
}

/// Names are checked when the configuration is read; AMQP's short strings end at 255 bytes.
fn name(text: &str) -> ShortString {
    ShortString::try_new(text).unwrap_or_default()
}
