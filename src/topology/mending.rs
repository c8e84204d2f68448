//! The shell commands that mend what differs on the broker. Pure.

use serde_json::{Map, Value};

use super::definitions::{KEEPERS, KEEPERS_LIMIT, escaped, pattern, plain, policy_key, policy_name};
use super::diff::LiveBinding;
use super::{Entity, Plan};
use crate::broker::encoded;

/// What of a policy decides about messages. Others, such as where a queue's leader lives, are the operator's business.
pub(super) const TOUCHES_MESSAGES: [&str; 11] = [
    "alternate-exchange",
    "dead-letter-exchange",
    "dead-letter-routing-key",
    "dead-letter-strategy",
    "delivery-limit",
    "expires",
    "max-age",
    "max-length",
    "max-length-bytes",
    "message-ttl",
    "overflow",
];

/// How to make the broker as configured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Remedy {
    /// Declaring the topology creates what is missing.
    Declare,
    /// A shell command.
    Command(String),
    /// A shell command; afterwards the topology has to be declared.
    CommandThenDeclare(String),
    /// What an operator has to do, where no single command can.
    Steps(String),
}

impl Remedy {
    /// `declare`: the command that declares the topology.
    pub fn text<'a>(&'a self, declare: &'a str) -> &'a str {
        match self {
            Self::Declare => declare,
            Self::Command(text) | Self::CommandThenDeclare(text) | Self::Steps(text) => text,
        }
    }

    /// A command with a name that could steer the terminal must not be copied.
    pub(super) fn refuse_control_characters(&mut self) {
        if let Self::Command(text) | Self::CommandThenDeclare(text) | Self::Steps(text) = self
            && text.chars().any(|c| c.is_control() && c != '\n')
        {
            *self = Self::Steps(
                "a name with control characters cannot be printed: use RabbitMQ's management page".to_owned(),
            );
        }
    }
}

/// What the commands need to know.
#[derive(Debug)]
pub struct Mending {
    /// The relay's own command with its configuration, such as `prism-relay --config relay.toml`.
    pub relay: String,
    pub vhost: String,
    /// Of the management API, without `/` at the end.
    pub api: String,
    pub user: String,
    /// Whether the relay itself declares the arguments, so that a policy in their place would be a clash.
    pub active: bool,
}

impl Mending {
    /// For an entity that has to be replaced. An exchange holds no messages, so it can be deleted; a queue gets a new name.
    pub(super) fn replace(&self, plan: &Plan, entity: &Entity) -> Remedy {
        match entity {
            Entity::Exchange(exchange) => {
                Remedy::CommandThenDeclare(self.delete(&["exchanges", &self.vhost, &exchange.name]))
            }
            Entity::Queue(queue) => Remedy::Steps(match plan.configured_queue(&queue.name) {
                Some(configured) => self.new_name(plan, configured),
                None if queue.is_stream() => self.new_archive(&queue.name),
                None => self.same_name(&queue.name),
            }),
        }
    }

    /// `configured`: the name in the configuration of the queue to which `queue` belongs.
    fn new_name(&self, plan: &Plan, configured: &str) -> String {
        let (relay, delete) = (&self.relay, self.delete_queue(configured));
        let is_partitioned = plan.queue_named(configured).is_none();
        let rest = match is_partitioned {
            false => format!("or move them: {} --to NEW", self.redrive(configured)),
            true => format!(
                "or publish them again, to every queue that is bound for them: {}, and so on for each partition",
                self.redrive(&format!("{configured}.1"))
            ),
        };
        format!(
            "a queue cannot be changed: give {configured} a new name in topology.queues, and then\n\
             1. create the new queue: {relay} topology declare\n\
             2. unbind the old one: {relay} topology diff prints the command\n\
             3. move the workers to the new queue\n\
             4. let workers finish the messages in the old queue, {rest}\n\
             5. delete the old queue and its retry queues when they have no messages: {delete}"
        )
    }

    fn new_archive(&self, stream: &str) -> String {
        format!(
            "a stream cannot be changed: give it a new name in topology.archive, and declare the topology. replay --from {stream} \
             still reads the old one; unbind and delete it when you do not need it any more: {}",
            self.delete_queue(stream)
        )
    }

    /// Every tool finds this queue by its name, so it has to be replaced by one with the same name.
    fn same_name(&self, queue: &str) -> String {
        format!(
            "a queue cannot be changed, and the name of this one is fixed: set topology.declare to \"passive\" to take it as it \
             is, or\n\
             1. move its messages to a queue of your own: {} --to OTHER\n\
             2. delete it: {}\n\
             3. create it: {} topology declare",
            self.redrive(queue),
            self.delete_queue(queue),
            self.relay
        )
    }

    fn delete_queue(&self, queue: &str) -> String {
        format!("rabbitmqctl delete_queue -p {} {}", quote(&self.vhost), quote(queue))
    }

    pub(super) fn redrive(&self, queue: &str) -> String {
        format!("{} redrive --from {}", self.relay, quote(queue))
    }

    /// Sets what is missing by a policy, as whoever owns the broker would; not where the relay itself declares arguments.
    pub(super) fn set(&self, entity: &Entity) -> Option<String> {
        let definition: Map<_, _> = entity
            .arguments()
            .inner()
            .iter()
            .map(|(name, value)| (policy_key(name.as_str()).to_owned(), plain(value)))
            .filter(|(name, _)| TOUCHES_MESSAGES.contains(&name.as_str()))
            .collect();
        if self.active || definition.is_empty() {
            return None;
        }
        let apply_to = format!("{}s", entity.kind());
        Some(self.policy(&policy_name(entity), &pattern(entity.name()), &Value::from(definition), &apply_to))
    }

    pub(super) fn keep(&self) -> String {
        let names: Vec<_> = KEEPERS.iter().map(|name| escaped(name)).collect();
        let definition = serde_json::json!({ "delivery-limit": KEEPERS_LIMIT });
        self.policy("prism-keep", &format!("^({})$", names.join("|")), &definition, "queues")
    }

    fn policy(&self, name: &str, pattern: &str, definition: &Value, apply_to: &str) -> String {
        let vhost = quote(&self.vhost);
        let (name, pattern, definition) = (quote(name), quote(pattern), quote(&definition.to_string()));
        format!("rabbitmqctl set_policy -p {vhost} --apply-to {apply_to} {name} {pattern} {definition}")
    }

    pub(super) fn unbind(&self, binding: &LiveBinding) -> String {
        let LiveBinding { source, destination, destination_type, properties_key, .. } = binding;
        self.delete(&["bindings", &self.vhost, "e", source, &destination_type[..1], destination, properties_key])
    }

    /// RabbitMQ has no command of its own for this; curl asks for the password.
    pub(super) fn delete(&self, path: &[&str]) -> String {
        let path: Vec<_> = path.iter().map(|segment| encoded(segment)).collect();
        let url = format!("{}/api/{}", self.api, path.join("/"));
        format!("curl -fsS -u {} -X DELETE {}", quote(&self.user), quote(&url))
    }
}

/// As one word of a shell.
pub fn quote(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=@%+,".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_a_shell_are_quoted() {
        assert_eq!(quote("prism.scan"), "prism.scan");
        assert_eq!(quote("/"), "/");
        assert_eq!(quote(""), "''");
        assert_eq!(quote("it's; rm -rf *"), r"'it'\''s; rm -rf *'");
    }
}
