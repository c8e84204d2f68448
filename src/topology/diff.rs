//! How the broker differs from the plan, as far as its management API shows it, and what fixes each difference. Pure.

use std::fmt::Display;

use lapin::types::FieldTable;
use serde_json::{Map, Value};

use super::definitions::{KEEPERS, kind, pattern, plain, policy_key, policy_name, target_kind};
use super::live::{Live, LiveBinding, LiveEntity, LivePolicy};
use super::plan::{Binding, CONSISTENT_HASH, DEAD, EVENTS, Entity, Plan};
use super::remedy::{Commands, MESSAGE_KEYS, Remedy, quote};
use super::trouble::Trouble;
use crate::text::clean;

/// One thing that is not as configured.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Difference {
    /// The exchange, queue or binding that differs.
    pub entity: String,
    pub what: String,
    pub kind: Kind,
    pub remedy: Remedy,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Missing,
    /// It exists with other properties. A passive relay takes them as they are.
    Changed,
    /// It exists and cannot take messages.
    Unavailable,
    /// It exists and is not configured.
    Surplus,
    /// It does not contradict the configuration, but an operator should know it.
    Advice,
}

impl Kind {
    /// Whether to fix it only when everything else is as configured, because until then events may have no other route.
    pub(crate) fn is_last(self) -> bool {
        matches!(self, Self::Surplus | Self::Advice)
    }
}

impl Difference {
    /// Other people choose the names on the broker, so everything here is made safe to print.
    fn new(kind: Kind, entity: impl Display, what: impl Display, remedy: Remedy) -> Self {
        let (entity, what) = (clean(&entity.to_string()), clean(&what.to_string()));
        Self { entity, what, kind, remedy: remedy.printable() }
    }

    pub(crate) fn missing(entity: impl Display) -> Self {
        Self::new(Kind::Missing, entity, "does not exist", Remedy::Declare)
    }

    /// An entity with properties that can only be changed by replacing it.
    pub(crate) fn replace(plan: &Plan, entity: &Entity, what: impl Display, commands: &Commands) -> Self {
        Self::new(Kind::Changed, entity, what, commands.replace(plan, entity))
    }
}

/// Lists what is missing or differs in the order of the plan, and then what is not configured.
pub(crate) fn differences(plan: &Plan, live: &Live, commands: &Commands) -> Vec<Difference> {
    let comparison = Comparison { plan, live, commands };
    let mut found = Vec::new();
    for entity in plan.entities() {
        match live.entity(entity.kind(), entity.name()) {
            None => found.push(Difference::missing(entity)),
            Some(there) => found.extend(comparison.entity(entity, there)),
        }
    }
    found.extend(missing_bindings(plan, &live.bindings).into_iter().map(Difference::missing));
    found.extend(comparison.surplus_bindings());
    found.extend(comparison.surplus_queues());
    found
}

/// The bindings of the plan that do not exist.
pub(crate) fn missing_bindings(plan: &Plan, there: &[LiveBinding]) -> Vec<String> {
    let is_missing = |binding: &&Binding| !there.iter().any(|there| is_same(there, binding));
    plan.bindings.iter().filter(is_missing).map(Binding::to_string).collect()
}

/// Joins the differences of one entity that have the same remedy.
fn merged(differences: Vec<Difference>) -> Vec<Difference> {
    let mut merged: Vec<Difference> = Vec::new();
    for difference in differences {
        match merged.iter_mut().find(|earlier| earlier.remedy == difference.remedy) {
            Some(earlier) => earlier.what = format!("{}; {}", earlier.what, difference.what),
            None => merged.push(difference),
        }
    }
    merged
}

struct Comparison<'a> {
    plan: &'a Plan,
    live: &'a Live,
    commands: &'a Commands,
}

impl Comparison<'_> {
    fn entity(&self, entity: &Entity, there: &LiveEntity) -> Vec<Difference> {
        let mut found = Vec::new();
        if let Entity::Exchange(exchange) = entity
            && there.r#type != kind(&exchange.kind)
        {
            let what = format!("is of type {}, where {} is configured", there.r#type, kind(&exchange.kind));
            found.push(self.replace(entity, what));
        }
        if !there.durable {
            found.push(self.replace(entity, "is not durable"));
        }
        let policy = self.live.policy_of(there);
        found.extend(self.planned_arguments(entity, there, &policy));
        found.extend(self.other_arguments(entity, there, &policy));
        let is_keeper = entity.kind() == "queue" && KEEPERS.contains(&entity.name());
        if is_keeper && self.live.major_version() >= 4 && !policy.contains_key("delivery-limit") {
            let what = "RabbitMQ 4 drops a message of this queue after it was returned 20 times";
            found.push(Difference::new(Kind::Advice, entity, what, Remedy::Command(self.commands.keep())));
        }
        let mut found = merged(found);
        if let (Entity::Queue(queue), Some(trouble)) = (entity, Trouble::by_api(there)) {
            let repair = self.commands.repair(&queue.name, &trouble);
            found.push(Difference::new(Kind::Unavailable, entity, trouble, repair));
        }
        let foreign = |there: &&LiveBinding| there.source == entity.name() && !self.is_planned(there);
        let foreign: Vec<_> =
            self.live.bindings.iter().filter(foreign).map(|there| there.destination.as_str()).collect();
        if entity.kind() == "exchange" && !foreign.is_empty() {
            let deletes_it = |found: &&mut Difference| matches!(found.remedy, Remedy::CommandThenDeclare(_));
            for difference in found.iter_mut().filter(deletes_it) {
                let bindings = clean(&foreign.join(", "));
                difference.what += &format!("; bindings that are not configured are deleted with it: {bindings}");
            }
        }
        found
    }

    /// Arguments that are missing or have another value, also by a policy.
    fn planned_arguments(&self, entity: &Entity, there: &LiveEntity, policy: &Map<String, Value>) -> Vec<Difference> {
        let mut found = Vec::new();
        for (name, planned) in entity.arguments().inner() {
            let (name, planned) = (name.as_str(), plain(planned));
            let than = format!("where {planned} is configured");
            match (there.arguments.get(name), policy.get(policy_key(name))) {
                (Some(value), _) if *value != planned => {
                    found.push(self.replace(entity, format!("{name} is {value}, {than}")));
                }
                (None, None) => {
                    let what = format!("{name} is not set, {than}");
                    found.push(match self.commands.set(entity) {
                        Some(command) => Difference::new(Kind::Changed, entity, what, Remedy::Command(command)),
                        None => self.replace(entity, what),
                    });
                }
                // RabbitMQ takes the lower one of two numbers, and the argument of two other values.
                (argument, Some(value))
                    if *value != planned && (argument.is_none() || value.as_i64() < planned.as_i64()) =>
                {
                    found.push(self.by_policy(entity, there, policy_key(name), value, &than));
                }
                _ => {}
            }
        }
        found
    }

    /// Arguments and keys of policies that are set and not configured.
    fn other_arguments(&self, entity: &Entity, there: &LiveEntity, policy: &Map<String, Value>) -> Vec<Difference> {
        let planned = entity.arguments();
        let other = there.arguments.iter().filter(|(name, _)| !planned.contains_key(name.as_str()));
        let mut found: Vec<_> =
            other.map(|(name, value)| self.replace(entity, format!("{name} is {value}, and not configured"))).collect();
        let matters = |key: &str| match entity {
            Entity::Exchange(_) => key == "alternate-exchange",
            Entity::Queue(queue) => {
                let is_kept = key == "delivery-limit" && KEEPERS.contains(&queue.name.as_str());
                MESSAGE_KEYS.contains(&key) && !is_kept
            }
        };
        let is_planned = |key: &str| planned.inner().keys().any(|name| policy_key(name.as_str()) == key);
        for (key, value) in policy.iter().filter(|(key, _)| matters(key) && !is_planned(key)) {
            found.push(self.by_policy(entity, there, key, value, "and not configured"));
        }
        found
    }

    fn replace(&self, entity: &Entity, what: impl Display) -> Difference {
        Difference::replace(self.plan, entity, what, self.commands)
    }

    /// A key that a policy sets. The relay's own policy is set again. A policy that concerns only this entity, and sets
    /// nothing that is configured, is cleared. For any other, only its owner knows what it is for.
    fn by_policy(&self, entity: &Entity, there: &LiveEntity, key: &str, value: &Value, than: &str) -> Difference {
        let (live, commands) = (self.live, self.commands);
        let policy = live.policies.iter().find(|policy| Some(&policy.name) == there.policy.as_ref());
        let (by, command) = match (policy, &there.operator_policy) {
            (Some(policy), _) if policy.definition.get(key) == Some(value) => {
                let only = policy.pattern == pattern(&there.name) || policy.pattern == format!("^{}$", there.name);
                let command = match commands.set(entity) {
                    Some(command) if only && policy.name == policy_name(entity) => command,
                    _ if only && !sets_something_planned(policy, entity, there) => commands.clear_policy(&policy.name),
                    _ => commands.list_policies(),
                };
                (format!("the policy {}", quote(&policy.name)), command)
            }
            (_, Some(policy)) => (format!("the operator policy {}", quote(policy)), commands.list_operator_policies()),
            _ => ("a policy".to_owned(), commands.list_policies()),
        };
        let what = format!("{by} sets {key} to {value}, {than}");
        Difference::new(Kind::Changed, entity, what, Remedy::Command(command))
    }

    /// Finds unknown bindings from an exchange of the plan: to its own queues, away from the inside of a queue, or to a
    /// queue that an earlier configuration may have left. Other bindings belong to other programs.
    fn surplus_bindings(&self) -> Vec<Difference> {
        let mut found = Vec::new();
        for there in &self.live.bindings {
            let LiveBinding { source, destination, destination_type, routing_key, .. } = there;
            if self.plan.entity("exchange", source).is_none() || self.is_planned(there) {
                continue;
            }
            let ours = self.plan.entity(destination_type, destination).is_some()
                || self.is_left_over(destination_type, destination)
                || self.plan.is_inner_exchange(source);
            let (kind, what) = if ours {
                (Kind::Surplus, "is not configured")
            } else if self.may_be_a_former_queue(destination_type, destination) {
                let what = "is not configured. If it was earlier, unbind it: until then it gets a copy of each event";
                (Kind::Advice, what)
            } else if source == EVENTS && routing_key.split('.').all(|word| word == "#") {
                let what = "takes every event, so an event that no work queue takes does not reach prism.unrouted. To \
                            watch events, bind to the exchange of broker.exchange in place of this one";
                (Kind::Advice, what)
            } else {
                continue;
            };
            let entity = format!("binding of {destination_type} {destination} to exchange {source} by {routing_key:?}");
            found.push(Difference::new(kind, entity, what, Remedy::Command(self.commands.unbind(there))));
        }
        found
    }

    fn surplus_queues(&self) -> Vec<Difference> {
        let left_over = self.live.queues.iter().filter(|there| self.is_left_over("queue", &there.name));
        left_over
            .map(|there| {
                let count = there.messages.map_or("an unknown number of".to_owned(), |count| count.to_string());
                let what = format!("is left over, with {count} messages; delete it when it has none");
                // Through the exchange, every other queue that is bound for these events would get them again.
                let owner = self.plan.configured_queue(&there.name).unwrap_or(&there.name);
                let redrive = format!("{} --to {}", self.commands.redrive(&there.name), quote(owner));
                Difference::new(Kind::Surplus, format!("queue {}", there.name), what, Remedy::Command(redrive))
            })
            .collect()
    }

    /// Whether a queue has the name of a partition or a retry queue that is not configured any more.
    fn is_left_over(&self, kind: &str, name: &str) -> bool {
        kind == "queue" && self.plan.entity(kind, name).is_none() && self.plan.configured_queue(name).is_some()
    }

    /// Whether a relay may have made it for a queue or an archive that is not configured any more.
    fn may_be_a_former_queue(&self, kind: &str, name: &str) -> bool {
        let Some(there) = self.live.entity(kind, name) else { return false };
        let policy = self.live.policy_of(there);
        let dead_letters = there.arguments.get("x-dead-letter-exchange").or_else(|| policy.get("dead-letter-exchange"));
        let has_dead_letters =
            dead_letters.is_some_and(|exchange| *exchange == DEAD || *exchange == format!("{name}.rejected"));
        has_dead_letters || ["stream", CONSISTENT_HASH].contains(&there.r#type.as_str())
    }

    fn is_planned(&self, there: &LiveBinding) -> bool {
        self.plan.bindings.iter().any(|binding| is_same(there, binding))
    }
}

/// Whether clearing the policy would take away what is configured and not set by an argument.
fn sets_something_planned(policy: &LivePolicy, entity: &Entity, there: &LiveEntity) -> bool {
    let planned = entity.arguments().inner().keys().map(|name| name.as_str());
    planned
        .filter(|name| !there.arguments.contains_key(*name))
        .any(|name| policy.definition.contains_key(policy_key(name)))
}

fn is_same(there: &LiveBinding, binding: &Binding) -> bool {
    there.source == binding.exchange
        && there.destination == binding.to.name()
        && there.destination_type == target_kind(&binding.to)
        && there.routing_key == binding.key
        && are_same(&there.arguments, &binding.arguments)
}

fn are_same(there: &Map<String, Value>, planned: &FieldTable) -> bool {
    let is_there = |(name, value): (&lapin::types::ShortString, &lapin::types::AMQPValue)| {
        there.get(name.as_str()) == Some(&plain(value))
    };
    there.len() == planned.inner().len() && planned.inner().iter().all(is_there)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::json;

    use super::*;
    use crate::topology::spec::{ArchiveSpec, QueueSpec, Spec};

    fn commands(active: bool) -> Commands {
        let [relay, vhost, api, user] = ["prism-relay", "/", "http://broker:15672", "me"].map(str::to_owned);
        Commands { relay, vhost, api, user, active }
    }

    /// What the management API shows after the plan was declared.
    fn declared(plan: &Plan) -> Value {
        let arguments = |table: &FieldTable| -> Map<String, Value> {
            table.inner().iter().map(|(name, value)| (name.to_string(), plain(value))).collect()
        };
        let entities = |of_kind: &str| -> Vec<Value> {
            let entities = plan.entities().iter().filter(|entity| entity.kind() == of_kind);
            let described = entities.map(|entity| {
                let r#type = match entity {
                    Entity::Exchange(exchange) => kind(&exchange.kind),
                    Entity::Queue(_) => "quorum".to_owned(),
                };
                let arguments = arguments(entity.arguments());
                json!({ "name": entity.name(), "type": r#type, "durable": true, "arguments": arguments, "messages": 0 })
            });
            described.collect()
        };
        let bindings: Vec<_> = plan
            .bindings
            .iter()
            .map(|binding| {
                let mut there =
                    binding_json(&binding.exchange, target_kind(&binding.to), binding.to.name(), &binding.key);
                there["arguments"] = arguments(&binding.arguments).into();
                there
            })
            .collect();
        json!({
            "version": "3.10.8", "exchanges": entities("exchange"), "queues": entities("queue"), "bindings": bindings,
            "policies": [],
        })
    }

    fn binding_json(source: &str, kind: &str, destination: &str, key: &str) -> Value {
        json!({
            "source": source, "destination": destination, "destination_type": kind, "routing_key": key,
            "properties_key": key,
        })
    }

    fn queue_json(name: &str, arguments: Value) -> Value {
        json!({ "name": name, "type": "quorum", "durable": true, "arguments": arguments, "messages": 5 })
    }

    fn named<'a>(live: &'a mut Value, list: &str, name: &str) -> &'a mut Value {
        live[list].as_array_mut().unwrap().iter_mut().find(|entity| entity["name"] == name).unwrap()
    }

    fn add(live: &mut Value, list: &str, value: Value) {
        live[list].as_array_mut().unwrap().push(value);
    }

    /// Each difference as `entity: what | remedy`, with the first line of the remedy.
    fn found(plan: &Plan, live: Value, active: bool) -> Vec<String> {
        let live: Live = serde_json::from_value(live).unwrap();
        let line = |found: Difference| {
            format!("{}: {} | {}", found.entity, found.what, found.remedy.text("declare").lines().next().unwrap())
        };
        differences(plan, &live, &commands(active)).into_iter().map(line).collect()
    }

    fn ladder(queue: &mut QueueSpec) {
        queue.retry_delays = vec![Duration::from_secs(1)];
    }

    fn partitioned(queue: &mut QueueSpec) {
        queue.partitions = Some(2);
    }

    fn unchanged(_: &mut QueueSpec) {}

    const NEW_NAME: &str = "a queue cannot be changed: give q a new name in topology.queues, and then";
    const DELETE: &str = "curl -fsS -u me -X DELETE http://broker:15672/api";

    struct Case {
        queue: fn(&mut QueueSpec),
        active: bool,
        /// A change made on the broker by hand.
        change: fn(&mut Value),
        expected: Vec<String>,
    }

    fn case(queue: fn(&mut QueueSpec), change: fn(&mut Value), expected: &str) -> Case {
        Case { queue, active: true, change, expected: vec![expected.to_owned()] }
    }

    fn passive(queue: fn(&mut QueueSpec), change: fn(&mut Value), expected: &str) -> Case {
        Case { active: false, ..case(queue, change, expected) }
    }

    fn check(cases: Vec<Case>) {
        for Case { queue, active, change, expected } in cases {
            let plan = Plan::new(&Spec::of_queue(queue), "e");
            let mut live = declared(&plan);
            assert_eq!(found(&plan, live.clone(), active), Vec::<String>::new());
            change(&mut live);
            assert_eq!(found(&plan, live, active), expected);
        }
    }

    #[test]
    fn what_is_missing_is_declared() {
        check(vec![
            case(
                unchanged,
                |live| live["queues"].as_array_mut().unwrap().retain(|queue| queue["name"] != "q"),
                "queue q: does not exist | declare",
            ),
            case(
                unchanged,
                |live| live["bindings"].as_array_mut().unwrap().retain(|binding| binding["source"] != "prism.events"),
                "binding of queue q to exchange prism.events by \"a.#\": does not exist | declare",
            ),
        ]);
    }

    #[test]
    fn properties_that_differ_need_a_new_name_or_a_new_exchange() {
        check(vec![
            case(
                unchanged,
                |live| {
                    let queue = named(live, "queues", "q");
                    queue["durable"] = false.into();
                    queue["arguments"]["x-delivery-limit"] = 7.into();
                    queue["arguments"]["x-max-length"] = 9.into();
                },
                &format!(
                    "queue q: is not durable; x-delivery-limit is 7, where 20 is configured; x-max-length is 9, and \
                     not configured | {NEW_NAME}"
                ),
            ),
            case(
                ladder,
                |live| named(live, "queues", "q.retry.1")["arguments"]["x-message-ttl"] = 7000.into(),
                &format!("queue q.retry.1: x-message-ttl is 7000, where 1000 is configured | {NEW_NAME}"),
            ),
            case(
                unchanged,
                |live| named(live, "queues", "prism.dead")["arguments"] = json!({}),
                "queue prism.dead: x-queue-type is not set, where \"quorum\" is configured | a queue cannot be \
                 changed, and the name of this one is fixed: set topology.declare to \"passive\" to take it as it \
                 is, or",
            ),
            case(
                unchanged,
                |live| {
                    named(live, "exchanges", "prism.events")["type"] = "direct".into();
                    add(live, "bindings", binding_json("prism.events", "queue", "theirs", "b.#"));
                },
                &format!(
                    "exchange prism.events: is of type direct, where topic is configured; bindings that are not \
                     configured are deleted with it: theirs | {DELETE}/exchanges/%2F/prism%2Eevents"
                ),
            ),
        ]);
    }

    #[test]
    fn policies_are_set_cleared_or_left_to_their_owner() {
        const SET: &str = "rabbitmqctl set_policy -p / --apply-to queues q '^q$'";
        fn policy(live: &mut Value, name: &str, pattern: &str, definition: &Value) {
            add(live, "policies", json!({ "name": name, "pattern": pattern, "definition": definition }));
            let queue = named(live, "queues", "q");
            queue["policy"] = name.into();
            queue["effective_policy_definition"] = definition.clone();
        }
        check(vec![
            case(
                unchanged,
                |live| policy(live, "short", "^q$", &json!({ "message-ttl": 1 })),
                "queue q: the policy short sets message-ttl to 1, and not configured | rabbitmqctl clear_policy -p / \
                 short",
            ),
            case(
                unchanged,
                |live| policy(live, "all", ".*", &json!({ "message-ttl": 1 })),
                "queue q: the policy all sets message-ttl to 1, and not configured | rabbitmqctl list_policies -p /",
            ),
            case(
                unchanged,
                |live| {
                    let queue = named(live, "queues", "q");
                    queue["operator_policy"] = "limits".into();
                    queue["effective_policy_definition"] = json!({ "delivery-limit": 3 });
                },
                "queue q: the operator policy limits sets delivery-limit to 3, where 20 is configured | rabbitmqctl \
                 list_operator_policies -p /",
            ),
            passive(
                unchanged,
                |live| {
                    named(live, "queues", "q")["arguments"].as_object_mut().unwrap().remove("x-overflow");
                },
                &format!(
                    "queue q: x-overflow is not set, where \"reject-publish\" is configured | {SET} \
                     '{{\"dead-letter-exchange\":\"prism.dead\",\"dead-letter-strategy\":\"at-least-once\",\
                     \"delivery-limit\":20,\"overflow\":\"reject-publish\"}}'"
                ),
            ),
        ]);
    }

    #[test]
    fn a_policy_that_concerns_no_messages_or_a_higher_limit_is_no_difference() {
        let plan = Plan::new(&Spec::of_queue(unchanged), "e");
        let mut live = declared(&plan);
        let definition = json!({ "queue-leader-locator": "balanced", "delivery-limit": 50 });
        named(&mut live, "queues", "q")["effective_policy_definition"] = definition;
        assert_eq!(found(&plan, live, true), Vec::<String>::new());
    }

    #[test]
    fn what_is_not_configured_is_unbound_or_redriven() {
        check(vec![
            case(
                unchanged,
                |live| add(live, "bindings", binding_json("prism.events", "queue", "prism.dead", "b.#")),
                &format!(
                    "binding of queue prism.dead to exchange prism.events by \"b.#\": is not configured | \
                     {DELETE}/bindings/%2F/e/prism%2Eevents/q/prism%2Edead/b%2E%23"
                ),
            ),
            case(
                partitioned,
                |live| add(live, "bindings", binding_json("q", "queue", "theirs", "1")),
                &format!(
                    "binding of queue theirs to exchange q by \"1\": is not configured | \
                     {DELETE}/bindings/%2F/e/q/q/theirs/1"
                ),
            ),
            case(
                partitioned,
                |live| add(live, "queues", queue_json("q.3", json!({}))),
                "queue q.3: is left over, with 5 messages; delete it when it has none | prism-relay redrive \
                 --from q.3 --to q",
            ),
            case(
                ladder,
                |live| add(live, "queues", queue_json("q.retry.2", json!({}))),
                "queue q.retry.2: is left over, with 5 messages; delete it when it has none | prism-relay redrive \
                 --from q.retry.2 --to q",
            ),
        ]);
    }

    #[test]
    fn a_queue_that_cannot_take_messages_is_named() {
        const LOOK: &str = "the relay keeps its events on disk until the queue is back:";
        check(vec![
            case(
                unchanged,
                |live| named(live, "queues", "q")["state"] = "down".into(),
                &format!("queue q: is down: it has no leader, so RabbitMQ accepts no message for it | {LOOK}"),
            ),
            passive(
                |queue| queue.max_length = Some(5),
                |live| named(live, "queues", "q")["messages_ready"] = 5.into(),
                "queue q: is full: it holds 5 messages and may hold 5 | the relay keeps its events on disk until the \
                 queue has room:",
            ),
        ]);
    }

    #[test]
    fn bindings_that_keep_events_from_the_unrouted_ones_are_named() {
        let mut spec = Spec::of_queue(unchanged);
        let (max_age, max_bytes) = (Duration::from_secs(3600), None);
        spec.archive = Some(ArchiveSpec { name: "all".to_owned(), max_age, max_bytes });
        let plan = Plan::new(&spec, "e");
        let mut live = declared(&plan);
        // As an earlier version bound the archive.
        add(&mut live, "bindings", binding_json("prism.events", "queue", "all", "a.#"));
        add(&mut live, "bindings", binding_json("prism.unrouted", "queue", "all", ""));
        // Other programs.
        add(&mut live, "bindings", binding_json("prism.events", "queue", "tap", "#"));
        add(&mut live, "bindings", binding_json("prism.events", "queue", "theirs", "b.#"));
        add(&mut live, "bindings", binding_json("e", "queue", "watcher", ""));
        let expected = [
            format!(
                "binding of queue all to exchange prism.events by \"a.#\": is not configured | \
                 {DELETE}/bindings/%2F/e/prism%2Eevents/q/all/a%2E%23"
            ),
            format!(
                "binding of queue all to exchange prism.unrouted by \"\": is not configured | \
                 {DELETE}/bindings/%2F/e/prism%2Eunrouted/q/all/"
            ),
            format!(
                "binding of queue tap to exchange prism.events by \"#\": takes every event, so an event that no work \
                 queue takes does not reach prism.unrouted. To watch events, bind to the exchange of broker.exchange \
                 in place of this one | {DELETE}/bindings/%2F/e/prism%2Eevents/q/tap/%23"
            ),
        ];
        assert_eq!(found(&plan, live, true), expected);
    }

    #[test]
    fn a_queue_that_was_renamed_is_to_be_unbound_and_other_peoples_queues_are_not() {
        let bound =
            |live: &mut Value, name: &str| add(live, "bindings", binding_json("prism.events", "queue", name, "a.#"));
        let plan = Plan::new(&Spec::of_queue(unchanged), "e");
        let mut live = declared(&plan);
        add(&mut live, "queues", queue_json("old", json!({ "x-dead-letter-exchange": "prism.dead" })));
        add(&mut live, "queues", queue_json("climbs", json!({ "x-dead-letter-exchange": "climbs.rejected" })));
        add(&mut live, "queues", queue_json("theirs", json!({ "x-dead-letter-exchange": "their.dead" })));
        for name in ["old", "climbs", "theirs"] {
            bound(&mut live, name);
        }
        let advice = |name: &str| {
            format!(
                "binding of queue {name} to exchange prism.events by \"a.#\": is not configured. If it was earlier, \
                 unbind it: until then it gets a copy of each event | \
                 {DELETE}/bindings/%2F/e/prism%2Eevents/q/{name}/a%2E%23"
            )
        };
        assert_eq!(found(&plan, live, true), [advice("old"), advice("climbs")]);
    }

    #[test]
    fn rabbitmq_4_needs_a_policy_for_the_queues_without_dead_letters() {
        let plan = Plan::new(&Spec::of_queue(unchanged), "e");
        let mut live = declared(&plan);
        live["version"] = "4.0.5".into();
        let advice = "RabbitMQ 4 drops a message of this queue after it was returned 20 times | \
                      rabbitmqctl set_policy -p / --apply-to queues prism-keep '^(prism\\.unrouted|prism\\.dead)$' \
                      '{\"delivery-limit\":1000000}'";
        let expected = ["queue prism.unrouted", "queue prism.dead"].map(|queue| format!("{queue}: {advice}"));
        assert_eq!(found(&plan, live, true), expected);
    }

    #[test]
    fn a_name_that_could_steer_the_terminal_is_not_in_a_command() {
        let plan = Plan::new(&Spec::of_queue(partitioned), "e");
        let mut live = declared(&plan);
        add(&mut live, "bindings", binding_json("q", "queue", "a\u{1b}[2J", "1"));
        // In a URL it is encoded, so the command is safe.
        let lines = found(&plan, live, true);
        assert!(lines[0].ends_with("/bindings/%2F/e/q/q/a%1B%5B2J/1"), "{lines:?}");
        assert!(!lines[0].contains('\u{1b}'), "{lines:?}");
        let steps = Remedy::Command("rabbitmqctl clear_policy 'a\u{1b}'".to_owned()).printable();
        assert!(matches!(&steps, Remedy::Steps(text) if !text.contains('\u{1b}')), "{steps:?}");
    }
}
