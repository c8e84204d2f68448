//! How the broker differs from the plan, by what its management API tells, and the command that mends each difference. Pure.

use std::fmt::Display;

use serde::Deserialize;
use serde_json::{Map, Value};

use super::definitions::{KEEPERS, kind, pattern, plain, policy_key, policy_name, target_kind};
use super::mending::{COSTS_MESSAGES, Mending, TOUCHES_MESSAGES, quote};
use super::{Binding, Entity, MOVING, Plan};
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
    /// What it is about: an entity or a binding.
    pub entity: String,
    pub what: String,
    /// A shell command; `None`: it is enough to declare the topology.
    pub mend: Option<String>,
    /// Whether the topology has to be declared afterwards.
    pub declare: bool,
    /// Whether this has to wait until everything else is as it should be, or events would find no way.
    pub last: bool,
    /// Worth knowing, but as planned.
    pub advice: bool,
    /// Whether it concerns a passive relay, too, which takes the properties of what exists as they are.
    pub passive: bool,
}

impl Difference {
    /// Something that a command mends.
    fn new(entity: impl Display, what: impl Display, mend: String) -> Self {
        let (entity, what) = (entity.to_string(), what.to_string());
        Self { entity, what, mend: Some(mend), declare: false, last: false, advice: false, passive: false }
    }

    /// Something that is not there.
    pub fn missing(entity: impl Display) -> Self {
        Self { mend: None, declare: true, passive: true, ..Self::new(entity, "does not exist", String::new()) }
    }

    /// Something that is too much.
    fn surplus(entity: impl Display, what: impl Display, mend: String) -> Self {
        Self { last: true, ..Self::new(entity, what, mend) }
    }

    /// Something that has to be made anew.
    pub fn wrong(entity: &Entity, what: impl Display, mending: &Mending) -> Self {
        match entity {
            Entity::Queue(queue) if queue.is_stream() => {
                let what = format!("{what}. Give it another name: a stream cannot be poured into another one");
                Self { mend: None, ..Self::new(entity, what, String::new()) }
            }
            Entity::Queue(queue) => Self::new(entity, what, mending.recreate(&queue.name)),
            Entity::Exchange(exchange) => {
                let remove = mending.delete(&["exchanges", &mending.vhost, &exchange.name]);
                Self { declare: true, ..Self::new(entity, what, remove) }
            }
        }
    }
}

/// In the order of the plan; what is too much comes last.
pub fn differences(plan: &Plan, live: &Live, mending: &Mending) -> Vec<Difference> {
    let mut found = Vec::new();
    for entity in plan.entities() {
        match entity_of(live, entity) {
            None => found.push(Difference::missing(entity)),
            Some(there) => {
                let mut differences = merged(compare(entity, there, live, mending));
                let foreign = live.bindings.iter().filter(|there| there.source == entity.name() && !there.is_in(plan));
                let foreign: Vec<_> = foreign.map(|there| there.destination.as_str()).collect();
                if let (Entity::Exchange(_), [_, ..]) = (entity, &foreign[..]) {
                    for difference in differences.iter_mut().filter(|difference| difference.declare) {
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
        // Names on the broker are other people's.
        difference.entity = clean(&difference.entity);
        difference.what = clean(&difference.what);
        // What steers a terminal is no command to copy.
        difference.mend = difference.mend.take().filter(|mend| !mend.chars().any(char::is_control));
    }
    found
}

/// Whatever else is on the broker is not ours; but between two of ours nothing unknown may lead, nothing out of the inside of a
/// queue of several parts, and no queue of another configuration may be left.
fn surplus(plan: &Plan, live: &Live, mending: &Mending) -> Vec<Difference> {
    let mut found = Vec::new();
    let ours =
        |kind: &str, name: &str| plan.entities().iter().any(|entity| entity.name() == name && kind == entity.kind());
    let left_over = |kind: &str, name: &str| kind == "queue" && !ours(kind, name) && plan.may_have_made(name);
    // It knows best how to go on.
    let interrupted = |name: &str| {
        plan.queue_named(name).is_none()
            && name.strip_suffix(MOVING).is_some_and(|queue| plan.queue_named(queue).is_some())
    };
    for there in live.bindings.iter().filter(|there| !there.is_in(plan)) {
        let LiveBinding { source, destination, destination_type, routing_key, .. } = there;
        let inside = ours("exchange", source) && plan.is_inner_exchange(source);
        let to_ours = ours(destination_type, destination) || left_over(destination_type, destination);
        if (inside || (ours("exchange", source) && to_ours)) && !interrupted(destination) {
            let entity = format!("binding of {destination_type} {destination} to exchange {source} by {routing_key:?}");
            found.push(Difference::surplus(entity, "is not configured", mending.unbind(there)));
        }
    }
    for there in live.queues.iter().filter(|there| left_over("queue", &there.name) || interrupted(&there.name)) {
        let (entity, name) = (format!("queue {}", there.name), &there.name);
        let count = there.messages.map_or("an unknown number of".to_owned(), |count| count.to_string());
        found.push(match name.strip_suffix(MOVING) {
            Some(queue) if interrupted(name) => {
                let what = format!("a topology recreate was interrupted, which has {count} messages here");
                Difference { passive: true, ..Difference::new(entity, what, mending.recreate(queue)) }
            }
            _ => {
                let what = format!("is left over, with {count} messages; once they are gone it can be deleted");
                Difference::surplus(entity, what, mending.redrive(name))
            }
        });
    }
    let alone = |there: &&LiveEntity| !live.queues.iter().any(|queue| queue.name == there.name);
    for there in live.exchanges.iter().filter(|there| interrupted(&there.name)).filter(alone) {
        let what = "a topology recreate was interrupted right before its end";
        let mend = mending.recreate(there.name.strip_suffix(MOVING).unwrap_or_default());
        found.push(Difference { passive: true, ..Difference::new(format!("exchange {}", there.name), what, mend) });
    }
    found
}

/// Those of one entity that the same command mends are one.
fn merged(differences: Vec<Difference>) -> Vec<Difference> {
    let mut merged: Vec<Difference> = Vec::new();
    for difference in differences {
        match merged.iter_mut().find(|earlier| earlier.mend == difference.mend) {
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

fn compare(entity: &Entity, there: &LiveEntity, live: &Live, mending: &Mending) -> Vec<Difference> {
    let mut found = Vec::new();
    if let Entity::Exchange(exchange) = entity
        && there.r#type != kind(&exchange.kind)
    {
        let what = format!("is of type {}, where {} is configured", there.r#type, kind(&exchange.kind));
        found.push(Difference::wrong(entity, what, mending));
    }
    if !there.durable {
        found.push(Difference::wrong(entity, "is not durable", mending));
    }
    let policy = there.policy_in(live);
    for (name, planned) in entity.arguments().inner() {
        let (name, planned) = (name.as_str(), plain(planned));
        match (there.arguments.get(name), policy.get(policy_key(name))) {
            (Some(value), _) if *value != planned => {
                let what = format!("{name} is {value}, where {planned} is configured");
                found.push(Difference::wrong(entity, what, mending));
            }
            (None, None) => {
                let what = format!("{name} is not set, where {planned} is configured");
                found.push(match mending.set(entity) {
                    Some(mend) => Difference::new(entity, what, mend),
                    None => Difference::wrong(entity, what, mending),
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
        found.push(Difference::wrong(entity, what, mending));
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
        found.push(Difference {
            advice: true,
            ..Difference::new(
                entity,
                "RabbitMQ 4 drops a message of this queue when it was looked at and put back 20 times",
                mending.keep(),
            )
        });
    }
    found
}

impl Live {
    /// Messages of a queue, wherever they are; `None` if that is not known yet.
    pub fn messages(&self, queue: &str) -> Option<u64> {
        self.queues.iter().find(|there| there.name == queue)?.messages
    }

    /// What policies set that may cost messages which only wait in a queue; `None` if that is not known yet.
    pub fn cut_by_policy(&self, queue: &str) -> Option<Vec<&str>> {
        let there = self.queues.iter().find(|there| there.name == queue)?;
        let set = there.effective_policy_definition.as_ref()?.keys().map(String::as_str);
        Some(set.filter(|key| COSTS_MESSAGES.contains(key)).collect())
    }

    /// What leads to a queue and is not in the plan, as `exchange (key)`. The default exchange leads to every queue, and an
    /// interrupted `topology recreate` has left a way from its own.
    pub fn foreign_bindings(&self, plan: &Plan, queue: &str) -> Vec<String> {
        let there =
            self.bindings.iter().filter(|there| there.destination == queue && there.destination_type == "queue");
        let moving = format!("{queue}{MOVING}");
        let foreign = there.filter(|there| !["", &moving].contains(&there.source.as_str()) && !there.is_in(plan));
        foreign.map(|there| clean(&format!("{} ({})", there.source, there.routing_key))).collect()
    }

    /// Whether an exchange leads to a queue, by whatever key.
    pub fn leads(&self, exchange: &str, queue: &str) -> bool {
        let is = |there: &LiveBinding| there.destination == queue && there.destination_type == "queue";
        self.bindings.iter().any(|there| there.source == exchange && is(there))
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
                    Some(mend) if own && policy.name == policy_name(entity) => Difference::new(entity, what, mend),
                    _ if own && !policy.definition.keys().any(wanted) => {
                        let mend = format!("rabbitmqctl clear_policy -p {vhost} {}", quote(&policy.name));
                        Difference::new(entity, what, mend)
                    }
                    _ => Difference::new(entity, what, format!("rabbitmqctl list_policies -p {vhost}")),
                }
            }
            (_, Some(policy)) => {
                let mend = format!("rabbitmqctl list_operator_policies -p {vhost}");
                Difference::new(entity, what(&format!("the operator policy {}", quote(policy))), mend)
            }
            _ => Difference::new(entity, what("a policy"), format!("rabbitmqctl list_policies -p {vhost}")),
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
