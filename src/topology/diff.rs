//! How the broker differs from the plan, by what its management API tells, and the command that mends each difference. Pure.

use std::fmt::Display;

use serde::Deserialize;
use serde_json::{Map, Value};

use super::definitions::{KEEPERS, kind, pattern, plain, policy_key, policy_name, target_kind};
use super::mending::{Mending, Remedy, TOUCHES_MESSAGES, quote};
use super::{Binding, CONSISTENT_HASH, DEAD, Entity, Plan};
use crate::text::clean;

/// What the API tells of a virtual host.
#[derive(Debug, Default)]
pub struct Live {
    /// Such as `4.0.5`.
    pub version: String,
    pub exchanges: Vec<LiveEntity>,
    pub queues: Vec<LiveEntity>,
    pub bindings: Vec<LiveBinding>,
    pub policies: Vec<LivePolicy>,
}

#[derive(Debug, Deserialize)]
pub struct LiveEntity {
    name: String,
    /// Of queues: all of them, also those that are with a worker or on their way to the dead letters. `None`: not known yet.
    #[serde(default)]
    messages: Option<u64>,
    r#type: String,
    durable: bool,
    #[serde(default)]
    arguments: Map<String, Value>,
    policy: Option<String>,
    operator_policy: Option<String>,
    /// Of queues only.
    #[serde(default)]
    effective_policy_definition: Option<Map<String, Value>>,
}

#[derive(Debug, Deserialize)]
pub struct LiveBinding {
    pub(super) source: String,
    pub(super) destination: String,
    pub(super) destination_type: String,
    routing_key: String,
    #[serde(default)]
    arguments: Map<String, Value>,
    pub(super) properties_key: String,
}

#[derive(Debug, Deserialize)]
pub struct LivePolicy {
    name: String,
    pattern: String,
    definition: Map<String, Value>,
}

/// One thing that is not as planned.
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
    /// The configuration says nothing against it, but an operator should know.
    Advice,
}

impl Kind {
    /// Whether to change it only when everything else is as configured: until then events may have no other route.
    pub fn is_last(self) -> bool {
        matches!(self, Self::Surplus | Self::Advice)
    }
}

impl Difference {
    fn new(kind: Kind, entity: impl Display, what: impl Display, remedy: Remedy) -> Self {
        Self { entity: entity.to_string(), what: what.to_string(), kind, remedy }
    }

    pub fn missing(entity: impl Display) -> Self {
        Self::new(Kind::Missing, entity, "does not exist", Remedy::Declare)
    }

    /// Properties that a command can change.
    fn changed(entity: &Entity, what: impl Display, command: String) -> Self {
        Self::new(Kind::Changed, entity, what, Remedy::Command(command))
    }

    /// An entity whose properties can only be changed by replacing it.
    pub fn wrong(plan: &Plan, entity: &Entity, what: impl Display, mending: &Mending) -> Self {
        Self::new(Kind::Changed, entity, what, mending.replace(plan, entity))
    }
}

/// In the order of the plan; what is too much comes last.
pub fn differences(plan: &Plan, live: &Live, mending: &Mending) -> Vec<Difference> {
    let mut found = Vec::new();
    for entity in plan.entities() {
        match entity_of(live, entity) {
            None => found.push(Difference::missing(entity)),
            Some(there) => {
                let mut differences = merged(compare(plan, entity, there, live, mending));
                let foreign = live.bindings.iter().filter(|there| there.source == entity.name() && !there.is_in(plan));
                let foreign: Vec<_> = foreign.map(|there| there.destination.as_str()).collect();
                if let (Entity::Exchange(_), [_, ..]) = (entity, &foreign[..]) {
                    let is_deleted = |remedy: &Remedy| matches!(remedy, Remedy::CommandThenDeclare(_));
                    for difference in differences.iter_mut().filter(|difference| is_deleted(&difference.remedy)) {
                        difference.what += &format!("; bindings of others go with it: {}", foreign.join(", "));
                    }
                }
                found.extend(differences);
            }
        }
    }
    for binding in &plan.bindings {
        if !live.bindings.iter().any(|there| there.is(binding)) {
            found.push(Difference::missing(binding));
        }
    }
    found.extend(surplus(plan, live, mending));
    for difference in &mut found {
        // Other people choose the names on the broker, which could steer the terminal.
        difference.entity = clean(&difference.entity);
        difference.what = clean(&difference.what);
        difference.remedy.refuse_control_characters();
    }
    found
}

/// Whatever else is on the broker is not ours. But no unknown binding may lead from one of our exchanges to one of our queues, or
/// away from the inner exchanges of a queue; and an earlier configuration may have left queues, which still get events.
fn surplus(plan: &Plan, live: &Live, mending: &Mending) -> Vec<Difference> {
    let mut found = Vec::new();
    let ours =
        |kind: &str, name: &str| plan.entities().iter().any(|entity| entity.name() == name && kind == entity.kind());
    let left_over =
        |kind: &str, name: &str| kind == "queue" && !ours(kind, name) && plan.configured_queue(name).is_some();
    for there in live.bindings.iter().filter(|there| ours("exchange", &there.source) && !there.is_in(plan)) {
        let LiveBinding { source, destination, destination_type, routing_key, .. } = there;
        let to_ours = ours(destination_type, destination) || left_over(destination_type, destination);
        let entity = format!("binding of {destination_type} {destination} to exchange {source} by {routing_key:?}");
        let unbind = Remedy::Command(mending.unbind(there));
        if to_ours || plan.is_inner_exchange(source) {
            found.push(Difference::new(Kind::Surplus, entity, "is not configured", unbind));
        } else if live.may_be_a_former_queue(destination_type, destination) {
            let what = "is not configured. If an earlier configuration had it, unbind it: until then it gets a copy of each event";
            found.push(Difference::new(Kind::Advice, entity, what, unbind));
        }
    }
    for there in live.queues.iter().filter(|there| left_over("queue", &there.name)) {
        let count = there.messages.map_or("an unknown number of".to_owned(), |count| count.to_string());
        let what = format!("is left over, with {count} messages; delete it when it has none");
        let redrive = Remedy::Command(mending.redrive(&there.name));
        found.push(Difference::new(Kind::Surplus, format!("queue {}", there.name), what, redrive));
    }
    found
}

/// Those of one entity that the same command mends are one.
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

fn entity_of<'a>(live: &'a Live, entity: &Entity) -> Option<&'a LiveEntity> {
    let list = match entity {
        Entity::Exchange(_) => &live.exchanges,
        Entity::Queue(_) => &live.queues,
    };
    list.iter().find(|there| there.name == entity.name())
}

fn compare(plan: &Plan, entity: &Entity, there: &LiveEntity, live: &Live, mending: &Mending) -> Vec<Difference> {
    let mut found = Vec::new();
    if let Entity::Exchange(exchange) = entity
        && there.r#type != kind(&exchange.kind)
    {
        let what = format!("is of type {}, where {} is configured", there.r#type, kind(&exchange.kind));
        found.push(Difference::wrong(plan, entity, what, mending));
    }
    if !there.durable {
        found.push(Difference::wrong(plan, entity, "is not durable", mending));
    }
    let policy = there.policy_in(live);
    for (name, planned) in entity.arguments().inner() {
        let (name, planned) = (name.as_str(), plain(planned));
        match (there.arguments.get(name), policy.get(policy_key(name))) {
            (Some(value), _) if *value != planned => {
                let what = format!("{name} is {value}, where {planned} is configured");
                found.push(Difference::wrong(plan, entity, what, mending));
            }
            (None, None) => {
                let what = format!("{name} is not set, where {planned} is configured");
                found.push(match mending.set(entity) {
                    Some(command) => Difference::changed(entity, what, command),
                    None => Difference::wrong(plan, entity, what, mending),
                });
            }
            // Of two numbers the lower one counts, and of two others the argument.
            (argument, Some(value))
                if *value != planned && (argument.is_none() || value.as_i64() < planned.as_i64()) =>
            {
                let than = format!("where {planned} is configured");
                found.push(there.differs_by_policy(entity, name, value, &than, live, mending));
            }
            _ => {}
        }
    }
    for (name, value) in there.arguments.iter().filter(|(name, _)| !entity.arguments().contains_key(name.as_str())) {
        let what = format!("{name} is {value}, and not configured");
        found.push(Difference::wrong(plan, entity, what, mending));
    }
    let planned: Vec<_> = entity.arguments().inner().keys().map(|name| policy_key(name.as_str())).collect();
    let keeper = KEEPERS.contains(&entity.name());
    let matters = |name: &str| match entity {
        Entity::Exchange(_) => name == "alternate-exchange",
        Entity::Queue(_) => TOUCHES_MESSAGES.contains(&name) && !(keeper && name == "delivery-limit"),
    };
    for (name, value) in policy.iter().filter(|(name, _)| matters(name) && !planned.contains(&name.as_str())) {
        found.push(there.differs_by_policy(entity, name, value, "and not configured", live, mending));
    }
    if keeper && entity.kind() == "queue" && live.major() >= 4 && !policy.contains_key("delivery-limit") {
        let what = "RabbitMQ 4 drops a message of this queue after it was returned 20 times";
        found.push(Difference::new(Kind::Advice, entity, what, Remedy::Command(mending.keep())));
    }
    found
}

impl Live {
    /// Whether a relay may have made it for a queue that is not configured any more: it has the arguments of one.
    fn may_be_a_former_queue(&self, kind: &str, name: &str) -> bool {
        let list = if kind == "queue" { &self.queues } else { &self.exchanges };
        let Some(there) = list.iter().find(|there| there.name == name) else { return false };
        let policy = there.policy_in(self);
        let dead_letters = there.arguments.get("x-dead-letter-exchange").or_else(|| policy.get("dead-letter-exchange"));
        let dead_letters = dead_letters.and_then(Value::as_str).unwrap_or_default();
        dead_letters == DEAD || dead_letters == format!("{name}.rejected") || there.r#type == CONSISTENT_HASH
    }

    fn major(&self) -> u32 {
        self.version.split('.').next().and_then(|major| major.parse().ok()).unwrap_or(0)
    }
}

impl LiveEntity {
    /// What policies have set. For exchanges the API names the policy, but not what it says.
    fn policy_in(&self, live: &Live) -> Map<String, Value> {
        let named = || live.policies.iter().find(|policy| Some(&policy.name) == self.policy.as_ref());
        self.effective_policy_definition
            .clone()
            .or_else(|| named().map(|policy| policy.definition.clone()))
            .unwrap_or_default()
    }

    /// Our own policy is set anew. One that concerns nothing else, and says nothing that is wanted, can go. Of any other only
    /// its owner knows what it is for.
    fn differs_by_policy(
        &self,
        entity: &Entity,
        key: &str,
        value: &Value,
        than: &str,
        live: &Live,
        mending: &Mending,
    ) -> Difference {
        let what = |by: &str| format!("{by} sets {} to {value}, {than}", policy_key(key));
        let vhost = quote(&mending.vhost);
        let mine = |policy: &&LivePolicy| Some(&policy.name) == self.policy.as_ref();
        match (live.policies.iter().find(mine), &self.operator_policy) {
            (Some(policy), _) if policy.definition.get(policy_key(key)) == Some(value) => {
                let own = policy.pattern == pattern(&self.name) || policy.pattern == format!("^{}$", self.name);
                let wanted = |name: &String| {
                    let argument =
                        |argument: &&str| policy_key(argument) == name && !self.arguments.contains_key(*argument);
                    entity.arguments().inner().keys().any(|name| argument(&name.as_str()))
                };
                let what = what(&format!("the policy {}", quote(&policy.name)));
                match mending.set(entity) {
                    Some(command) if own && policy.name == policy_name(entity) => {
                        Difference::changed(entity, what, command)
                    }
                    _ if own && !policy.definition.keys().any(wanted) => {
                        let command = format!("rabbitmqctl clear_policy -p {vhost} {}", quote(&policy.name));
                        Difference::changed(entity, what, command)
                    }
                    _ => Difference::changed(entity, what, format!("rabbitmqctl list_policies -p {vhost}")),
                }
            }
            (_, Some(policy)) => {
                let command = format!("rabbitmqctl list_operator_policies -p {vhost}");
                Difference::changed(entity, what(&format!("the operator policy {}", quote(policy))), command)
            }
            _ => Difference::changed(entity, what("a policy"), format!("rabbitmqctl list_policies -p {vhost}")),
        }
    }
}

impl LiveBinding {
    fn is_in(&self, plan: &Plan) -> bool {
        plan.bindings.iter().any(|binding| self.is(binding))
    }

    fn is(&self, binding: &Binding) -> bool {
        self.source == binding.exchange
            && self.destination == binding.to.name()
            && self.destination_type == target_kind(&binding.to)
            && self.routing_key == binding.key
            && self.arguments.len() == binding.arguments.inner().len()
            && binding
                .arguments
                .inner()
                .iter()
                .all(|(name, value)| self.arguments.get(name.as_str()) == Some(&plain(value)))
    }
}
