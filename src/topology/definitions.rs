//! The plan in RabbitMQ's own terms: as definitions for import, and with the names of the management API. Pure.

use lapin::ExchangeKind;
use lapin::types::{AMQPValue, FieldTable};
use serde_json::{Map, Value, json};

use super::plan::{Binding, DEAD, Entity, Plan, Target, UNROUTED};

/// Arguments that no policy can set. Policies can set all others, and change them while the queue has messages.
const ARGUMENTS_ONLY: [&str; 3] = ["x-queue-type", "x-single-active-consumer", "hash-header"];

/// The two queues without dead letters. By default RabbitMQ 4 drops a message of theirs after it was returned 20 times.
pub(super) const KEEPERS: [&str; 2] = [UNROUTED, DEAD];
/// So many returns never happen. RabbitMQ 3 takes this, but not -1.
pub(super) const KEEPERS_LIMIT: i64 = 1_000_000;

/// Writes definitions for `rabbitmqctl import_definitions` (<https://www.rabbitmq.com/docs/definitions>), with policies
/// in place of arguments where that is possible.
pub(crate) fn definitions(plan: &Plan, vhost: &str) -> Value {
    let (mut exchanges, mut queues, mut policies) = (Vec::new(), Vec::new(), Vec::new());
    for entity in plan.entities() {
        let name = entity.name();
        let (fixed, mut policy) = split(entity.arguments());
        let common = json!({ "name": name, "vhost": vhost, "durable": true, "auto_delete": false, "arguments": fixed });
        let apply_to = match entity {
            Entity::Exchange(exchange) => {
                exchanges.push(with(common, json!({ "type": kind(&exchange.kind), "internal": false })));
                "exchanges"
            }
            Entity::Queue(_) => {
                queues.push(common);
                if KEEPERS.contains(&name) {
                    policy.insert("delivery-limit".to_owned(), KEEPERS_LIMIT.into());
                }
                "queues"
            }
        };
        if !policy.is_empty() {
            policies.push(json!({
                "name": policy_name(entity), "vhost": vhost, "pattern": pattern(name), "apply-to": apply_to,
                "definition": policy, "priority": 0,
            }));
        }
    }
    let bindings: Vec<_> =
        plan.bindings.iter().map(|binding| with(json!({ "vhost": vhost }), described(binding))).collect();
    json!({ "exchanges": exchanges, "queues": queues, "bindings": bindings, "policies": policies })
}

/// The name of an entity's policy. An exchange and a queue may have the same name, but two policies may not.
pub(super) fn policy_name(entity: &Entity) -> String {
    match entity {
        Entity::Exchange(exchange) => format!("{}-exchange", exchange.name),
        Entity::Queue(queue) => queue.name.clone(),
    }
}

/// A regular expression that matches this name only.
pub(super) fn pattern(name: &str) -> String {
    format!("^{}$", escaped(name))
}

/// Writes a binding as definitions and the management API do.
pub(super) fn described(binding: &Binding) -> Value {
    json!({
        "source": binding.exchange, "destination": binding.to.name(), "destination_type": target_kind(&binding.to),
        "routing_key": binding.key, "arguments": plain_table(&binding.arguments),
    })
}

/// Arguments as definitions and the management API write them.
pub(super) fn plain_table(arguments: &FieldTable) -> Map<String, Value> {
    arguments.inner().iter().map(|(name, value)| (name.to_string(), plain(value))).collect()
}

/// Separates the arguments that no policy can set from those for a policy.
fn split(arguments: &FieldTable) -> (Map<String, Value>, Map<String, Value>) {
    let (mut fixed, mut policy) = (Map::new(), Map::new());
    for (name, value) in arguments.inner() {
        match name.as_str() {
            name if ARGUMENTS_ONLY.contains(&name) => fixed.insert(name.to_owned(), plain(value)),
            name => policy.insert(policy_key(name).to_owned(), plain(value)),
        };
    }
    (fixed, policy)
}

/// The name of an argument in a policy.
pub(super) fn policy_key(argument: &str) -> &str {
    argument.strip_prefix("x-").unwrap_or(argument)
}

/// RabbitMQ's name for a type of exchange.
pub(super) fn kind(kind: &ExchangeKind) -> String {
    match kind {
        ExchangeKind::Custom(name) => name.clone(),
        kind => format!("{kind:?}").to_lowercase(),
    }
}

pub(super) fn target_kind(target: &Target) -> &'static str {
    match target {
        Target::Queue(_) => "queue",
        Target::Exchange(_) => "exchange",
    }
}

/// The JSON value of an argument.
pub(super) fn plain(value: &AMQPValue) -> Value {
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

pub(super) fn escaped(name: &str) -> String {
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
