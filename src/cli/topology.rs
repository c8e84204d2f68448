//! `topology`: what the relay wants on the broker: shown, declared, or exported for whoever owns the broker.

use lapin::ExchangeKind;
use lapin::types::{AMQPValue, FieldTable};
use serde_json::{Map, Value, json};
use thiserror::Error;
use tokio::time::timeout;

use super::{Failure, Printed, say};
use crate::config::{Config, Declare};
use crate::topology::{self, Entity, Plan, TopologyError};

#[derive(clap::Subcommand)]
pub enum Action {
    /// Print the exchanges, queues and bindings
    Show,
    /// Create on the broker what is missing, whatever topology.declare says
    Declare,
    /// Print RabbitMQ definitions, with policies in place of arguments, for `rabbitmqctl import_definitions`
    Export,
}

#[derive(Debug, Error)]
enum DeclareError {
    #[error(transparent)]
    Refused(#[from] TopologyError),
    #[error("the broker did not answer in time")]
    Timeout,
}

pub async fn run(config: &Config, action: Action) -> Result<(), Failure> {
    let plan = Plan::new(&config.topology, &config.broker.exchange);
    match action {
        Action::Show => show(&plan),
        Action::Declare => declare(config, &plan).await,
        Action::Export => {
            let definitions = definitions(&plan, config.broker.urls[0].vhost());
            say(&serde_json::to_string_pretty(&definitions).map_err(Failure::new)?);
            Ok(())
        }
    }
}

fn show(plan: &Plan) -> Result<(), Failure> {
    let mut printed = Printed::default();
    for entity in plan.entities() {
        let (what, arguments) = match entity {
            Entity::Exchange(exchange) => (kind(&exchange.kind), &exchange.arguments),
            Entity::Queue(queue) => ("durable".to_owned(), &queue.arguments),
        };
        printed.line(format!("{entity}  ({what})"));
        for (name, value) in arguments.inner() {
            printed.line(format!("    {name} = {}", plain(value)));
        }
    }
    for binding in &plan.bindings {
        printed.line(format!("{binding}"));
    }
    printed.out()
}

async fn declare(config: &Config, plan: &Plan) -> Result<(), Failure> {
    let link = super::connect(config, "prism-relay topology").await?;
    // Each declaration is a round trip.
    let limit = config.broker.connect_timeout * (plan.steps() + 1);
    let declared = timeout(limit, topology::establish(&link.connection, plan, Declare::Active)).await;
    link.close().await;
    declared
        .map_err(|_| Failure::new(DeclareError::Timeout))?
        .map_err(|error| Failure::new(DeclareError::from(error)))?;
    say(&format!("{} exchanges and queues and {} bindings are there", plan.entities().len(), plan.bindings.len()));
    Ok(())
}

/// RabbitMQ's definitions (<https://www.rabbitmq.com/docs/definitions>). What a policy can say is left to a policy, so that
/// it can be changed while there are messages; the type of a queue cannot.
fn definitions(plan: &Plan, vhost: &str) -> Value {
    let (mut exchanges, mut queues, mut policies) = (Vec::new(), Vec::new(), Vec::new());
    for entity in plan.entities() {
        let (name, apply_to, arguments) = match entity {
            Entity::Exchange(exchange) => (&exchange.name, "exchanges", &exchange.arguments),
            Entity::Queue(queue) => (&queue.name, "queues", &queue.arguments),
        };
        let (fixed, policy) = split(arguments);
        let common = json!({ "name": name, "vhost": vhost, "durable": true, "auto_delete": false, "arguments": fixed });
        match entity {
            Entity::Exchange(exchange) => {
                exchanges.push(with(common, json!({ "type": kind(&exchange.kind), "internal": false })));
            }
            Entity::Queue(_) => queues.push(common),
        }
        if !policy.is_empty() {
            policies.push(json!({
                "name": name, "vhost": vhost, "pattern": format!("^{}$", escaped(name)), "apply-to": apply_to,
                "definition": policy, "priority": 0,
            }));
        }
    }
    let bindings: Vec<_> = plan
        .bindings
        .iter()
        .map(|binding| {
            json!({
                "source": binding.exchange, "vhost": vhost, "destination": binding.queue, "destination_type": "queue",
                "routing_key": binding.key, "arguments": {},
            })
        })
        .collect();
    json!({ "exchanges": exchanges, "queues": queues, "bindings": bindings, "policies": policies })
}

/// What has to be an argument, and what a policy says as well; there the names have no `x-`.
fn split(arguments: &FieldTable) -> (Map<String, Value>, Map<String, Value>) {
    let (mut fixed, mut policy) = (Map::new(), Map::new());
    for (name, value) in arguments.inner() {
        match name.as_str() {
            "x-queue-type" => fixed.insert(name.to_string(), plain(value)),
            name => policy.insert(name.strip_prefix("x-").unwrap_or(name).to_owned(), plain(value)),
        };
    }
    (fixed, policy)
}

/// As RabbitMQ spells it.
fn kind(kind: &ExchangeKind) -> String {
    format!("{kind:?}").to_lowercase()
}

fn plain(value: &AMQPValue) -> Value {
    match value {
        AMQPValue::LongString(text) => Value::from(text.to_string()),
        AMQPValue::LongLongInt(number) => Value::from(*number),
        AMQPValue::LongInt(number) => Value::from(*number),
        AMQPValue::Boolean(flag) => Value::from(*flag),
        // The plan has no others.
        other => Value::from(format!("{other:?}")),
    }
}

fn with(mut object: Value, more: Value) -> Value {
    if let (Value::Object(object), Value::Object(more)) = (&mut object, more) {
        object.extend(more);
    }
    object
}

/// A name as a regular expression that matches nothing else.
fn escaped(name: &str) -> String {
    name.chars()
        .flat_map(|c| (!c.is_alphanumeric() && c != '_' && c != '-').then_some('\\').into_iter().chain([c]))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_of_policies_match_one_name() {
        assert_eq!(escaped("prism.scan_1-a"), "prism\\.scan_1-a");
        assert_eq!(escaped("a b+c"), "a\\ b\\+c");
    }
}
