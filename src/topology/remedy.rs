//! What fixes a difference between the broker and the configuration: shell commands, or steps for an operator. Pure.

use serde_json::{Map, Value, json};

use super::definitions::{KEEPERS, KEEPERS_LIMIT, escaped, pattern, plain, policy_key, policy_name};
use super::live::LiveBinding;
use super::plan::{Entity, Plan, Target, UNROUTED};
use super::trouble::Trouble;
use crate::broker::encoded;

/// The keys of a policy that decide what happens to messages. All others, such as where the leader of a queue lives,
/// are the operator's choice.
pub(super) const MESSAGE_KEYS: [&str; 11] = [
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

/// How to fix a difference.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Remedy {
    /// Declare the topology.
    Declare,
    /// Run a shell command.
    Command(String),
    /// Run a shell command, and then declare the topology.
    CommandThenDeclare(String),
    /// Follow these steps, one a line; no single command can do it.
    Steps(String),
}

impl Remedy {
    /// The text to print. `declare`: the command that declares the topology.
    pub(crate) fn text<'a>(&'a self, declare: &'a str) -> &'a str {
        match self {
            Self::Declare => declare,
            Self::Command(text) | Self::CommandThenDeclare(text) | Self::Steps(text) => text,
        }
    }

    pub(crate) fn needs_declare(&self) -> bool {
        matches!(self, Self::Declare | Self::CommandThenDeclare(_))
    }

    /// Replaces a command that contains control characters, which could steer the terminal into which it is copied.
    pub(super) fn printable(self) -> Self {
        match &self {
            Self::Command(text) | Self::CommandThenDeclare(text) | Self::Steps(text)
                if text.chars().any(|c| c.is_control() && c != '\n') =>
            {
                Self::Steps("a name has control characters: fix it on RabbitMQ's management page".to_owned())
            }
            _ => self,
        }
    }
}

/// Writes the commands, with what all of them need.
#[derive(Debug)]
pub(crate) struct Commands {
    /// The relay's own command with its configuration, such as `prism-relay --config relay.toml`.
    pub relay: String,
    pub vhost: String,
    /// The URL of the management API, without `/` at the end.
    pub api: String,
    pub user: String,
    /// Whether the relay declares the arguments itself: then a policy in their place would clash with them.
    pub active: bool,
}

impl Commands {
    /// Replaces an entity. An exchange holds no messages, so it can be deleted and declared again. A queue gets a new
    /// name.
    pub(super) fn replace(&self, plan: &Plan, entity: &Entity) -> Remedy {
        match entity {
            Entity::Exchange(exchange) => {
                Remedy::CommandThenDeclare(self.delete(&["exchanges", &self.vhost, &exchange.name]))
            }
            Entity::Queue(queue) => Remedy::Steps(match plan.configured_queue(&queue.name) {
                Some(configured) => self.new_name(plan, configured),
                None if queue.is_stream() => self.new_archive(&queue.name),
                None => self.same_name(plan, &queue.name),
            }),
        }
    }

    /// `configured`: a queue of the configuration, which may be several on the broker.
    fn new_name(&self, plan: &Plan, configured: &str) -> String {
        let relay = &self.relay;
        let (old, rest) = match plan.has_queue(configured) {
            true => (configured.to_owned(), ""),
            false => (format!("{configured}.1"), ", and so on"),
        };
        let redrive = self.redrive(&old);
        format!(
            "a queue cannot be changed: give {configured} a new name in topology.queues, and then\n\
             1. create the new queue: {relay} topology declare; then restart the relay, which keeps the old \
             configuration until then\n\
             2. unbind the old one: {relay} topology diff prints the command\n\
             3. move the workers to the new queue\n\
             4. let workers finish the messages in the old queue, or move them: {redrive} --to NEW{rest}\n\
             5. delete the old queue, with its retry queues and partitions, when they hold no messages: {}",
            self.delete_queue(&old)
        )
    }

    fn new_archive(&self, stream: &str) -> String {
        let (relay, delete) = (&self.relay, self.delete_queue(stream));
        format!(
            "a stream cannot be changed: give the archive a new name in topology.archive, and then\n\
             1. create the new stream: {relay} topology declare; then restart the relay, which keeps the old \
             configuration until then\n\
             2. unbind the old one: {relay} topology diff prints the command; replay --from {stream} still reads it\n\
             3. delete the old one when you do not need it any more: {delete}"
        )
    }

    /// Every tool finds the queue by its name, so the new one gets the same. The queue is unbound first, because a
    /// message that arrives between the move and the deletion would be lost. Without the binding nothing is lost:
    /// the broker returns unrouted events and the relay parks them, and dead letters stay in their work queue. An
    /// active relay binds it again within seconds, so there must be none.
    fn same_name(&self, plan: &Plan, queue: &str) -> String {
        let (redrive, delete, relay) = (self.redrive(queue), self.delete_queue(queue), &self.relay);
        let target = Target::Queue(queue.to_owned());
        let unbind: Vec<_> = plan
            .bindings
            .iter()
            .filter(|binding| binding.to == target)
            .map(|binding| self.unbind_queue(&binding.exchange, queue, &binding.key))
            .collect();
        let (unbind, vhost) = (unbind.join(" && "), quote(&self.vhost));
        format!(
            "a queue cannot be changed, and the name of this one is fixed: set topology.declare to \"passive\" to \
             take it as it is, or\n\
             1. stop every relay whose topology.declare is \"active\", or restart it with \"passive\": an active relay \
             binds the queue again, and you would delete what arrives then\n\
             2. unbind it, so that no message arrives any more: {unbind}\n\
             3. move its messages to a queue of your own: {redrive} --to OTHER\n\
             4. check that it holds 0 messages: rabbitmqctl list_queues -p {vhost} name messages\n\
             5. delete it: {delete}\n\
             6. create it again, with its binding: {relay} topology declare; then start the relays as before"
        )
    }

    /// Unbinds a queue from a binding without arguments.
    fn unbind_queue(&self, exchange: &str, queue: &str, key: &str) -> String {
        // The management API names a binding by its key, percent-encoded, and one with an empty key `~`.
        let properties_key = if key.is_empty() { "~".to_owned() } else { encoded(key) };
        self.delete(&["bindings", &self.vhost, "e", exchange, "q", queue, &properties_key])
    }

    /// What to do about a queue that cannot take messages. A queue that is down is never deleted by the relay, because
    /// only an operator knows whether its messages are lost.
    pub(crate) fn repair(&self, queue: &str, trouble: &Trouble) -> Remedy {
        let (vhost, relay) = (quote(&self.vhost), &self.relay);
        let list = |columns: &str| format!("rabbitmqctl list_queues -p {vhost} name {columns}");
        Remedy::Steps(match trouble {
            Trouble::Full { .. } => format!(
                "the relay keeps its events on disk until the queue has room:\n\
                 1. check that its workers run and acknowledge messages: `{}`\n\
                 2. start more workers, or move messages to a queue of your own: `{} --to OTHER`",
                list("messages consumers"),
                self.redrive(queue)
            ),
            Trouble::Down => format!(
                "the relay keeps its events on disk until the queue is back:\n\
                 1. start RabbitMQ nodes that are stopped, and look again: `{}`\n\
                 2. if it stays down, and is known to be empty or its messages are known to be lost, delete it: `{}`\n\
                 3. create it again, with its bindings: `{relay} topology declare`. An active relay does so by itself\n\
                 4. move the events that came meanwhile: `{relay} redrive --from {UNROUTED}`",
                list("state leader online"),
                self.delete_queue(queue)
            ),
            Trouble::Minority { members, .. } => format!(
                "the relay keeps its events on disk until the queue is back: start the RabbitMQ nodes that are \
                 stopped; those of the queue are {}. To see which run: `{}`",
                members.join(", "),
                list("state leader online")
            ),
            Trouble::Silent => format!(
                "see whether it has a leader: `{}`. If it has none, `{relay} topology diff` prints what to do, with a \
                 user who may read the management API",
                list("state leader online messages")
            ),
        })
    }

    fn delete_queue(&self, queue: &str) -> String {
        format!("rabbitmqctl delete_queue -p {} {}", quote(&self.vhost), quote(queue))
    }

    pub(super) fn redrive(&self, queue: &str) -> String {
        format!("{} redrive --from {}", self.relay, quote(queue))
    }

    /// Sets missing arguments by a policy, as the owner of a broker does. `None` where the relay declares the arguments
    /// itself.
    pub(super) fn set(&self, entity: &Entity) -> Option<String> {
        let definition: Map<_, _> = entity
            .arguments()
            .inner()
            .iter()
            .map(|(name, value)| (policy_key(name.as_str()).to_owned(), plain(value)))
            .filter(|(name, _)| MESSAGE_KEYS.contains(&name.as_str()))
            .collect();
        if self.active || definition.is_empty() {
            return None;
        }
        let apply_to = format!("{}s", entity.kind());
        Some(self.policy(&policy_name(entity), &pattern(entity.name()), &Value::from(definition), &apply_to))
    }

    /// Keeps RabbitMQ 4 from dropping messages of the queues without dead letters.
    pub(super) fn keep(&self) -> String {
        let names: Vec<_> = KEEPERS.iter().map(|name| escaped(name)).collect();
        let definition = json!({ "delivery-limit": KEEPERS_LIMIT });
        self.policy("prism-keep", &format!("^({})$", names.join("|")), &definition, "queues")
    }

    fn policy(&self, name: &str, pattern: &str, definition: &Value, apply_to: &str) -> String {
        let vhost = quote(&self.vhost);
        let (name, pattern, definition) = (quote(name), quote(pattern), quote(&definition.to_string()));
        format!("rabbitmqctl set_policy -p {vhost} --apply-to {apply_to} {name} {pattern} {definition}")
    }

    pub(super) fn clear_policy(&self, name: &str) -> String {
        format!("rabbitmqctl clear_policy -p {} {}", quote(&self.vhost), quote(name))
    }

    pub(super) fn list_policies(&self) -> String {
        format!("rabbitmqctl list_policies -p {}", quote(&self.vhost))
    }

    pub(super) fn list_operator_policies(&self) -> String {
        format!("rabbitmqctl list_operator_policies -p {}", quote(&self.vhost))
    }

    pub(super) fn unbind(&self, binding: &LiveBinding) -> String {
        let LiveBinding { source, destination, destination_type, properties_key, .. } = binding;
        self.delete(&["bindings", &self.vhost, "e", source, &destination_type[..1], destination, properties_key])
    }

    /// Deletes by the management API, because rabbitmqctl has no command for it. curl asks for the password.
    fn delete(&self, path: &[&str]) -> String {
        let path: Vec<_> = path.iter().map(|segment| encoded(segment)).collect();
        let url = format!("{}/api/{}", self.api, path.join("/"));
        format!("curl -fsS -u {} -X DELETE {}", quote(&self.user), quote(&url))
    }
}

/// Quotes a text as one word of a shell.
pub(crate) fn quote(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=@%+,".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topology::spec::Spec;

    #[test]
    fn a_queue_with_a_fixed_name_is_unbound_before_it_is_emptied() {
        let [relay, vhost, api, user] = ["prism-relay", "/", "http://broker:15672", "me"].map(str::to_owned);
        let commands = Commands { relay, vhost, api, user, active: true };
        let plan = Plan::new(&Spec::of_queue(|_| {}), "e");
        for (queue, path) in [
            ("prism.unrouted", "prism%2Eunrouted/q/prism%2Eunrouted/%7E"),
            ("prism.dead", "prism%2Edead/q/prism%2Edead/%2523"),
        ] {
            let remedy = commands.replace(&plan, plan.entity("queue", queue).expect("it is planned"));
            let steps: Vec<_> = remedy.text("").lines().skip(1).collect();
            let expected = [
                "1. stop every relay whose topology.declare is \"active\", or restart it with \"passive\": an active \
                 relay binds the queue again, and you would delete what arrives then"
                    .to_owned(),
                format!(
                    "2. unbind it, so that no message arrives any more: curl -fsS -u me -X DELETE \
                     http://broker:15672/api/bindings/%2F/e/{path}"
                ),
                format!("3. move its messages to a queue of your own: prism-relay redrive --from {queue} --to OTHER"),
                "4. check that it holds 0 messages: rabbitmqctl list_queues -p / name messages".to_owned(),
                format!("5. delete it: rabbitmqctl delete_queue -p / {queue}"),
                "6. create it again, with its binding: prism-relay topology declare; then start the relays as before"
                    .to_owned(),
            ];
            assert_eq!(steps, expected);
        }
    }

    #[test]
    fn a_queue_that_is_down_is_deleted_only_by_an_operator_who_knows_that_nothing_is_lost() {
        let [relay, vhost, api, user] = ["prism-relay", "/", "http://broker:15672", "me"].map(str::to_owned);
        let commands = Commands { relay, vhost, api, user, active: true };
        let remedy = commands.repair("prism.scan", &Trouble::Down);
        let steps: Vec<_> = remedy.text("").lines().skip(1).collect();
        let expected = [
            "1. start RabbitMQ nodes that are stopped, and look again: `rabbitmqctl list_queues -p / name state leader \
             online`",
            "2. if it stays down, and is known to be empty or its messages are known to be lost, delete it: \
             `rabbitmqctl delete_queue -p / prism.scan`",
            "3. create it again, with its bindings: `prism-relay topology declare`. An active relay does so by itself",
            "4. move the events that came meanwhile: `prism-relay redrive --from prism.unrouted`",
        ];
        assert_eq!(steps, expected);
        let members = ["a", "b", "c"].map(str::to_owned).to_vec();
        for (trouble, part) in [
            (Trouble::Full { messages: 7, limit: 7 }, "prism-relay redrive --from prism.scan --to OTHER"),
            (Trouble::Minority { online: 1, members }, "those of the queue are a, b, c"),
            (Trouble::Silent, "rabbitmqctl list_queues -p / name state leader online messages"),
        ] {
            let remedy = commands.repair("prism.scan", &trouble);
            assert!(remedy.text("").contains(part) && !remedy.text("").contains("delete"), "{remedy:?}");
        }
    }

    #[test]
    fn words_of_a_shell_are_quoted() {
        assert_eq!(quote("prism.scan"), "prism.scan");
        assert_eq!(quote("/"), "/");
        assert_eq!(quote(""), "''");
        assert_eq!(quote("it's; rm -rf *"), r"'it'\''s; rm -rf *'");
    }
}
