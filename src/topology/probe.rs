//! Finds out over AMQP whether the broker would let the relay declare, bind and publish, without changing anything:
//! each request has a fault that the broker refuses only after it has checked permissions and limits.

use lapin::options::{
    BasicPublishOptions, ConfirmSelectOptions, ExchangeDeclareOptions, ExchangeUnbindOptions, QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Connection};

use super::declare::{TopologyError, explain};
use super::plan::{Binding, Entity, Target};
use crate::broker::short_string;

/// No binding has this key.
const UNUSED_KEY: &str = "prism-relay.check.no-such-binding";

/// Whether the broker would create this entity, which must not exist: permission, limits, and the plugin that the
/// exchange needs.
pub(crate) async fn would_create(connection: &Connection, entity: &Entity) -> Result<(), TopologyError> {
    let channel = connection.create_channel().await?;
    let name = short_string(entity.name())?;
    let mut arguments = entity.arguments().clone();
    let declared = match entity {
        Entity::Exchange(exchange) => {
            // Only the name of an exchange can be its alternate exchange.
            arguments.insert("alternate-exchange".into(), AMQPValue::LongInt(-1));
            let options = ExchangeDeclareOptions { durable: true, ..Default::default() };
            channel.exchange_declare(name, exchange.kind.clone(), options, arguments).await
        }
        Entity::Queue(_) => {
            // No queue has a negative length.
            arguments.insert("x-max-length".into(), AMQPValue::LongInt(-1));
            let options = QueueDeclareOptions { durable: true, ..Default::default() };
            channel.queue_declare(name, options, arguments).await.map(|_| ())
        }
    };
    judge(entity, declared, &["invalid arg", "invalid type"])
}

/// Whether the user may make this binding. Asks to remove one that does not exist, which needs the same permissions.
pub(crate) async fn may_bind(connection: &Connection, binding: &Binding) -> Result<(), TopologyError> {
    let channel = connection.create_channel().await?;
    let (from, to) = (short_string(&binding.exchange)?, short_string(binding.to.name())?);
    let (key, arguments) = (short_string(UNUSED_KEY)?, FieldTable::default());
    let unbound = match binding.to {
        Target::Queue(_) => channel.queue_unbind(to, from, key, arguments).await,
        Target::Exchange(_) => {
            channel.exchange_unbind(to, from, key, ExchangeUnbindOptions::default(), arguments).await
        }
    };
    judge(binding, unbound, &[])
}

/// Whether the user may publish to this exchange. A broker with a memory or disk alarm does not answer.
pub(crate) async fn may_publish(connection: &Connection, exchange: &str, key: &str) -> Result<(), TopologyError> {
    let channel = connection.create_channel().await?;
    let published = async {
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        let (exchange, key) = (exchange.into(), key.into());
        // An expiration is a number of milliseconds.
        let properties = BasicProperties::default().with_expiration("no number".into());
        channel.basic_publish(exchange, key, BasicPublishOptions::default(), b"", properties).await?.await.map(|_| ())
    };
    judge(&format!("exchange {exchange}"), published.await, &["invalid expiration"])
}

/// A refusal of the fault itself (`expected`) and of a missing entity comes after the check of the permissions.
fn judge(
    what: &impl std::fmt::Display,
    outcome: Result<(), lapin::Error>,
    expected: &[&str],
) -> Result<(), TopologyError> {
    let Err(error) = outcome else { return Ok(()) };
    match explain(what, error) {
        TopologyError::Missing { .. } => Ok(()),
        TopologyError::Refused { reply, .. } if expected.iter().any(|text| reply.contains(text)) => Ok(()),
        error => Err(error),
    }
}
