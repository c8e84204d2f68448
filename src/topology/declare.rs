//! Creates or checks the topology over AMQP, and explains what the broker refuses.

use std::fmt::Display;

use lapin::options::{ExchangeBindOptions, ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::{Channel, Connection};
use thiserror::Error;

use super::plan::{Binding, CONSISTENT_HASH, Entity, Exchange, Plan, Queue, Target};
use super::spec::Declare;
use crate::broker::{NameTooLong, is_limit, reply_code, reply_text, short_string};

/// Why the broker does not have what the configuration asks for, and what to do.
#[derive(Debug, Error)]
pub enum TopologyError {
    #[error(
        "{entity} exists with other properties: {reply}. prism-relay topology diff prints how to replace it: a queue \
         gets a new name in the configuration, the relay is restarted, its workers move, and what is left in the old \
         one goes over with redrive --from OLD --to NEW, or its own workers finish it. Or set topology.declare to \
         \"passive\" to take it as it is"
    )]
    Clash { entity: String, reply: String },
    #[error("{entity} does not exist. Create it, or set topology.declare to \"active\"")]
    Missing { entity: String },
    #[error(
        "{entity}: the broker has no exchanges of this type ({reply}). Partitions need a plugin that RabbitMQ comes \
         with; on each node run: rabbitmq-plugins enable rabbitmq_consistent_hash_exchange"
    )]
    NoPlugin { entity: String, reply: String },
    #[error("{entity}: the broker refuses it: {reply}")]
    Refused { entity: String, reply: String },
    #[error(
        "{entity}: the broker refuses it, because a limit is reached: {reply}. Raise it (rabbitmqctl set_vhost_limits \
         or set_user_limits), or delete what is not needed"
    )]
    Limit { entity: String, reply: String },
    #[error("cannot declare the topology")]
    Name(#[from] NameTooLong),
    #[error("the connection failed while the topology was declared")]
    Connection(#[from] lapin::Error),
}

/// Creates what is missing or checks what exists, as `declare` says. The first problem ends it.
pub(crate) async fn establish(connection: &Connection, plan: &Plan, declare: Declare) -> Result<(), TopologyError> {
    match declare {
        Declare::Active => {
            let channel = connection.create_channel().await?;
            for entity in plan.entities() {
                declare_entity(&channel, entity, Mode::Create).await?;
            }
            for binding in &plan.bindings {
                bind(&channel, binding).await?;
            }
            // Only now, when the archive gets every event by its new binding.
            for binding in &plan.retired {
                unbind(&channel, binding).await?;
            }
            close(channel).await;
        }
        Declare::Passive => {
            for entity in plan.entities() {
                if !exists(connection, entity).await? {
                    return Err(TopologyError::Missing { entity: entity.to_string() });
                }
            }
        }
        Declare::Off => {}
    }
    Ok(())
}

/// How an entity on the broker compares with the plan.
#[derive(Debug)]
pub(crate) enum Comparison {
    Same,
    /// It exists. Its properties were not compared, because a passive relay takes them as they are.
    Present,
    Absent,
    Differs(TopologyError),
}

/// Compares without creating anything, as far as it matters to a relay with this `declare`. AMQP does not show
/// bindings.
pub(crate) async fn compare(
    connection: &Connection,
    entity: &Entity,
    declare: Declare,
) -> Result<Comparison, lapin::Error> {
    let compared = async {
        if !exists(connection, entity).await? {
            return Ok(Comparison::Absent);
        }
        if declare != Declare::Active {
            return Ok(Comparison::Present);
        }
        // A full declaration changes nothing where the entity exists, and compares the properties; a passive one does
        // not.
        let channel = connection.create_channel().await?;
        declare_entity(&channel, entity, Mode::Create).await?;
        close(channel).await;
        Ok(Comparison::Same)
    };
    match compared.await {
        Ok(comparison) => Ok(comparison),
        Err(TopologyError::Connection(error)) => Err(error),
        Err(error) => Ok(Comparison::Differs(error)),
    }
}

/// Uses a channel of its own, because the broker closes the channel if the entity is missing.
async fn exists(connection: &Connection, entity: &Entity) -> Result<bool, TopologyError> {
    let channel = connection.create_channel().await?;
    match declare_entity(&channel, entity, Mode::Check).await {
        Ok(()) => {
            close(channel).await;
            Ok(true)
        }
        Err(TopologyError::Missing { .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    Create,
    /// What AMQP calls a passive declaration: it fails if the entity does not exist, and ignores the properties.
    Check,
}

pub(super) async fn declare_entity(channel: &Channel, entity: &Entity, mode: Mode) -> Result<(), TopologyError> {
    let (name, passive) = (short_string(entity.name())?, mode == Mode::Check);
    let declared = match entity {
        Entity::Exchange(Exchange { kind, arguments, .. }) => {
            let options = ExchangeDeclareOptions { passive, durable: true, ..Default::default() };
            channel.exchange_declare(name, kind.clone(), options, arguments.clone()).await
        }
        Entity::Queue(Queue { arguments, .. }) => {
            let options = QueueDeclareOptions { passive, durable: true, ..Default::default() };
            channel.queue_declare(name, options, arguments.clone()).await.map(|_| ())
        }
    };
    declared.map_err(|error| explain(entity, error))
}

pub(super) async fn bind(channel: &Channel, binding: &Binding) -> Result<(), TopologyError> {
    let (from, key) = (short_string(&binding.exchange)?, short_string(&binding.key)?);
    let (to, arguments) = (short_string(binding.to.name())?, binding.arguments.clone());
    let bound = match binding.to {
        Target::Queue(_) => channel.queue_bind(to, from, key, QueueBindOptions::default(), arguments).await,
        Target::Exchange(_) => channel.exchange_bind(to, from, key, ExchangeBindOptions::default(), arguments).await,
    };
    bound.map_err(|error| explain(binding, error))
}

/// Removes the binding of a queue. Nothing happens if it does not exist.
async fn unbind(channel: &Channel, binding: &Binding) -> Result<(), TopologyError> {
    let (queue, from) = (short_string(binding.to.name())?, short_string(&binding.exchange)?);
    let (key, arguments) = (short_string(&binding.key)?, binding.arguments.clone());
    channel.queue_unbind(queue, from, key, arguments).await.map_err(|error| explain(binding, error))
}

/// An error here does not matter: the channel ends with its connection at the latest.
pub(super) async fn close(channel: Channel) {
    let _ = channel.close(200, "OK".into()).await;
}

/// Separates what the broker refuses from a connection that failed.
pub(super) fn explain(what: &impl Display, error: lapin::Error) -> TopologyError {
    let (entity, reply) = (what.to_string(), reply_text(&error));
    match reply_code(&error) {
        Some(406 | 530) if is_limit(&reply) => TopologyError::Limit { entity, reply },
        Some(406) if reply.contains("inequivalent arg") => TopologyError::Clash { entity, reply },
        Some(404) => TopologyError::Missing { entity },
        // 503 up to RabbitMQ 3, 406 from 4.
        Some(406 | 503) if reply.contains("exchange type") && reply.contains(CONSISTENT_HASH) => {
            TopologyError::NoPlugin { entity, reply }
        }
        Some(402 | 403 | 405 | 406 | 530 | 540) => TopologyError::Refused { entity, reply },
        _ => TopologyError::Connection(error),
    }
}

#[cfg(test)]
mod tests {
    use lapin::ErrorKind;
    use lapin::protocol::{AMQPError, AMQPSoftError};

    use super::*;

    #[test]
    fn only_an_argument_that_differs_is_a_clash() {
        let explained = |reply: &str| {
            let error = AMQPError::new(AMQPSoftError::PRECONDITIONFAILED.into(), reply.into());
            explain(&"queue q", ErrorKind::ProtocolError(error).into())
        };
        let clash = "PRECONDITION_FAILED - inequivalent arg 'x-delivery-limit' for queue 'q' in vhost '/': received \
                     '20' but current is '7'";
        assert!(matches!(explained(clash), TopologyError::Clash { reply, .. } if reply == clash));
        let limit = "PRECONDITION_FAILED - cannot declare queue 'q': queue limit in vhost '/' (10) is reached";
        assert!(matches!(explained(limit), TopologyError::Limit { reply, .. } if reply == limit));
        let no_plugin = "PRECONDITION_FAILED - invalid exchange type 'x-consistent-hash'";
        assert!(matches!(explained(no_plugin), TopologyError::NoPlugin { reply, .. } if reply == no_plugin));
        let refusal = "PRECONDITION_FAILED - invalid binding key: more than two wildcards '#'";
        assert!(matches!(explained(refusal), TopologyError::Refused { reply, .. } if reply == refusal));
    }
}
