//! How the broker differs from the plan, as far as its management API shows it, and what fixes each difference. Pure.

use std::fmt::Display;

use lapin::types::FieldTable;
use serde_json::{Map, Value};

use super::definitions::{KEEPERS, kind, pattern, plain, policy_key, policy_name, target_kind};
use super::live::{Live, LiveBinding, LiveEntity, LivePolicy};
use super::plan::{Binding, CONSISTENT_HASH, DEAD, Entity, Plan};
use super::remedy::{Commands, MESSAGE_KEYS, Remedy, quote};
use crate::text::clean;

/// One thing that is not as configured.
#[derive(Debug, PartialEq, Eq)]
pub struct Difference {
    /// The exchange, queue or binding that differs.
    pub entity: String,
    pub what: String,
    pub kind: Kind,
    pub remedy: Remedy,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Missing,
    /// It exists with other properties. A passive relay takes them as they are.
    Changed,
    /// It exists and is not configured.
    Surplus,
    /// It does not contradict the configuration, but an operator should know it.
    Advice,
}

impl Kind {
    /// Whether to fix it only when everything else is as configured, because until then events may have no other route.
    pub fn is_last(self) -> bool {
        matches!(self, Self::Surplus | Self::Advice)
    }
}

impl Difference {
    /// Other people choose the names on the broker, so everything here is made safe to print.
    fn new(kind: Kind, entity: impl Display, what: impl Display, remedy: Remedy) -> Self {
        let (entity, what) = (clean(&entity.to_string()), clean(&what.to_string()));
        Self { entity, what, kind, remedy: remedy.printable() }
    }

    pub fn missing(entity: impl Display) -> Self {
        Self::new(Kind::Missing, entity, "does not exist", Remedy::Declare)
    }

    /// An entity with properties that can only be changed by replacing it.
    pub fn replace(plan: &Plan, entity: &Entity, what: impl Display, commands: &Commands) -> Self {
        Self::new(Kind::Changed, entity, what, commands.replace(plan, entity))
    }
}

/// Lists what is missing or differs in the order of the plan, and then what is not configured.
pub fn differences(plan: &Plan, live: &Live, commands: &Commands) -> Vec<Difference> {
    let comparison = Comparison { plan, live, commands };
    let mut found = Vec::new();
    for entity in plan.entities() {
        match live.entity(entity.kind(), entity.name()) {
            None => found.push(Difference::missing(entity)),
            Some(there) => found.extend(comparison.entity(entity, there)),
        }
    }
    let is_missing = |binding: &&Binding| !live.bindings.iter().any(|there| is_same(there, binding));
    found.extend(plan.bindings.iter().filter(is_missing).map(Difference::missing));
    found.extend(comparison.surplus_bindings());
    found.extend(comparison.surplus_queues());
    found
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

    /// A key that a policy sets. The relay's own policy is set again. A policy that concerns only this entity, and sets nothing
    /// that is configured, is cleared. For any other, only its owner knows what it is for.
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

    /// Finds unknown bindings from an exchange of the plan: to its own queues, away from the inside of a queue, or to a queue that
    /// an earlier configuration may have left. All others belong to somebody else.
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
                let redrive = Remedy::Command(self.commands.redrive(&there.name));
                Difference::new(Kind::Surplus, format!("queue {}", there.name), what, redrive)
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
