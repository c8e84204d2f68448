//! The shell commands that mend what differs on the broker. Pure.

use serde_json::{Map, Value};

use super::Entity;
use super::definitions::{KEEPERS, KEEPERS_LIMIT, escaped, pattern, plain, policy_key, policy_name};
use super::diff::LiveBinding;
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

/// And what of it may take messages away.
pub(super) const COSTS_MESSAGES: [&str; 5] =
    ["delivery-limit", "expires", "max-length", "max-length-bytes", "message-ttl"];

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
    /// Replaces a queue, or goes on where that was interrupted.
    pub(super) fn recreate(&self, queue: &str) -> String {
        format!("{} topology recreate {}", self.relay, quote(queue))
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
