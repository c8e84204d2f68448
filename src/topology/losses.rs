//! How queues as they are on the broker would lose messages without a trace. Pure.
//!
//! A relay with `topology.declare = "passive"` takes the properties of the queues as they are, so
//! [`super::differences`] has nothing to fix there. What drops messages is worth saying anyway.

use std::fmt::Display;

use serde_json::Value;

use super::definitions::{plain, policy_key};
use super::live::{Live, LiveEntity};
use super::plan::{Entity, Plan};
use crate::text::{clean, span};

/// A way in which an entity loses messages.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Loss {
    /// The queue, such as `queue prism.scan`.
    pub entity: String,
    /// What happens to which messages, and the setting that makes it happen.
    pub what: String,
    /// Whether the messages are kept as dead letters.
    pub keeps_messages: bool,
}

/// Lists the queues of the plan that drop messages that the plan would keep.
pub(crate) fn losses(plan: &Plan, live: &Live) -> Vec<Loss> {
    let queues = plan.entities().iter().filter(|entity| matches!(entity, Entity::Queue(_)));
    let found = queues.filter_map(|entity| Some((entity, live.entity("queue", entity.name())?)));
    found.flat_map(|(entity, there)| of_queue(entity, &Effective { live, there })).collect()
}

/// The settings of an entity that are in force.
struct Effective<'a> {
    live: &'a Live,
    there: &'a LiveEntity,
}

impl Effective<'_> {
    /// The value of an argument such as `x-message-ttl`, or of the policy's key in its place. RabbitMQ takes the lower
    /// one of two numbers, and the argument of two other values.
    fn value(&self, argument: &str) -> Option<Value> {
        let policy = self.live.policy_of(self.there);
        match (self.there.arguments.get(argument), policy.get(policy_key(argument))) {
            (Some(argument), Some(policy)) => match (argument.as_u64(), policy.as_u64()) {
                (Some(a), Some(b)) => Some(a.min(b).into()),
                _ => Some(argument.clone()),
            },
            (argument, policy) => argument.or(policy).cloned(),
        }
    }

    fn number(&self, argument: &str) -> Option<u64> {
        self.value(argument)?.as_u64()
    }
}

fn of_queue(entity: &Entity, effective: &Effective<'_>) -> Vec<Loss> {
    let planned = |name: &str| entity.arguments().inner().get(name).map(plain).and_then(|value| value.as_u64());
    let has = |name: &str| entity.arguments().contains_key(name);
    let mut found = Vec::new();
    let mut loss = |what: &dyn Display, keeps_messages| {
        found.push(Loss { entity: entity.to_string(), what: clean(&what.to_string()), keeps_messages });
    };

    let is_dead_lettered = effective.value("x-dead-letter-exchange").is_some();
    if has("x-dead-letter-exchange") && !is_dead_lettered {
        let what =
            "drops the messages that workers reject, because no dead-letter exchange is set (dead-letter-exchange)";
        loss(&what, false);
    }
    if let Some(ttl) = effective.number("x-message-ttl")
        && planned("x-message-ttl").is_none_or(|planned| ttl < planned)
    {
        let ttl_text = span(std::time::Duration::from_millis(ttl));
        let fate = if is_dead_lettered { "dead-letters" } else { "drops" };
        loss(
            &format!("{fate} the messages that no worker takes within {ttl_text} (message-ttl {ttl})"),
            is_dead_lettered,
        );
    }
    for name in ["x-max-length", "x-max-length-bytes"] {
        let rejects = effective.value("x-overflow").is_some_and(|value| value == "reject-publish");
        if let Some(max) = effective.number(name)
            && !rejects
            && !is_stream(entity)
        {
            let key = policy_key(name);
            loss(&format!("drops its oldest messages when it is full ({key} {max}, overflow drop-head)"), false);
        }
    }
    if let Some(expires) = effective.number("x-expires") {
        let time = span(std::time::Duration::from_millis(expires));
        loss(&format!("is deleted with its messages when no worker uses it for {time} (expires {expires})"), false);
    }
    found
}

/// An archive is meant to forget its oldest events.
fn is_stream(entity: &Entity) -> bool {
    matches!(entity, Entity::Queue(queue) if queue.is_stream())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::topology::spec::Spec;

    /// The losses of the queue `q` with these arguments and this policy.
    fn of(arguments: &Value, policy: &Value) -> Vec<String> {
        let plan = Plan::new(&Spec::of_queue(|_| {}), "e");
        let queue = json!({
            "name": "q", "type": "quorum", "durable": true, "arguments": arguments, "messages": 0,
            "effective_policy_definition": policy,
        });
        let live = json!({
            "version": "3.10.8", "exchanges": [], "queues": [queue], "bindings": [], "policies": [],
        });
        let found = losses(&plan, &serde_json::from_value(live).unwrap());
        assert!(found.iter().all(|loss| loss.entity == "queue q"), "{found:?}");
        found.into_iter().map(|loss| loss.what).collect()
    }

    #[test]
    fn each_setting_that_drops_messages_is_found_in_arguments_and_policies() {
        let safe = json!({ "x-dead-letter-exchange": "prism.dead", "x-overflow": "reject-publish" });
        assert_eq!(of(&safe, &json!({})), [""; 0]);
        assert_eq!(of(&json!({}), &json!({ "dead-letter-exchange": "prism.dead" })), [""; 0]);
        assert_eq!(of(&safe, &json!({ "max-length": 10 })), [""; 0], "the broker refuses what does not fit");

        let rejected =
            "drops the messages that workers reject, because no dead-letter exchange is set (dead-letter-exchange)";
        assert_eq!(of(&json!({}), &json!({})), [rejected]);
        let gone = "drops the messages that no worker takes within 5 s (message-ttl 5000)";
        assert_eq!(of(&json!({}), &json!({ "message-ttl": 5000 })), [rejected, gone]);
        let moved = "dead-letters the messages that no worker takes within 1 min (message-ttl 60000)";
        assert_eq!(of(&safe, &json!({ "message-ttl": 60_000 })), [moved]);
        let full = "drops its oldest messages when it is full (max-length 10, overflow drop-head)";
        assert_eq!(of(&json!({ "x-dead-letter-exchange": "d" }), &json!({ "max-length": 10 })), [full]);
        let unused = "is deleted with its messages when no worker uses it for 2 min (expires 120000)";
        assert_eq!(of(&safe, &json!({ "expires": 120_000 })), [unused]);
    }
}
