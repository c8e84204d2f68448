//! Why a queue cannot take messages. Pure.

use std::fmt;

use serde::Serialize;

use super::live::LiveEntity;
use crate::broker::Counts;

/// Why a queue cannot take messages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Trouble {
    /// It holds as many messages as it may.
    Full { messages: u64, limit: u64 },
    /// No node leads it.
    Down,
    /// Too few of its nodes run.
    Minority { online: usize, members: Vec<String> },
    /// It reports nothing, while the broker rejects messages or does not confirm them.
    Silent,
}

/// [`Trouble`] without its facts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum TroubleKind {
    Full,
    Down,
    Minority,
    Silent,
}

impl Trouble {
    /// What the management API says about a queue.
    pub(crate) fn by_api(there: &LiveEntity) -> Option<Self> {
        let online = there.online.as_ref().map_or(there.members.len(), Vec::len);
        let is_down = matches!(there.state.as_deref(), Some("down" | "stopped" | "crashed" | "terminated"));
        if is_down || (online == 0 && !there.members.is_empty()) {
            return Some(Self::Down);
        }
        // Right after its declaration the API does not know the nodes of a queue.
        if !there.members.is_empty() && online * 2 <= there.members.len() && there.r#type == "quorum" {
            return Some(Self::Minority { online, members: there.members.clone() });
        }
        let policy = there.effective_policy_definition.as_ref().and_then(|policy| policy.get("max-length"));
        let limits = [there.arguments.get("x-max-length"), policy].map(|limit| limit?.as_u64());
        let limit = limits.into_iter().flatten().min()?;
        let messages = there.messages_ready? + there.messages_dlx.unwrap_or(0);
        (messages >= limit).then_some(Self::Full { messages, limit })
    }

    /// What AMQP says about a queue. `nacked`: the broker rejected a message just now, or did not confirm it.
    pub(crate) fn by_counts(counts: Option<Counts>, max_length: Option<u64>, nacked: bool) -> Option<Self> {
        let silent = nacked.then_some(Self::Silent);
        let Some(Counts { messages, consumers }) = counts else { return silent };
        match max_length {
            Some(limit) if u64::from(messages) >= limit => Some(Self::Full { messages: messages.into(), limit }),
            _ if messages == 0 && consumers == 0 => silent,
            _ => None,
        }
    }

    pub(crate) fn kind(&self) -> TroubleKind {
        match self {
            Self::Full { .. } => TroubleKind::Full,
            Self::Down => TroubleKind::Down,
            Self::Minority { .. } => TroubleKind::Minority,
            Self::Silent => TroubleKind::Silent,
        }
    }
}

/// Completes the sentence "the queue ...".
impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Full { messages, limit } => write!(f, "is full: it holds {messages} messages and may hold {limit}"),
            Self::Down => f.write_str("is down: it has no leader, so RabbitMQ accepts no message for it"),
            Self::Minority { online, members } => {
                write!(f, "has no majority: {online} of its {} nodes run", members.len())
            }
            Self::Silent => f.write_str(
                "may be down: RabbitMQ rejects messages or does not confirm them, and the queue reports 0 messages and \
                 0 consumers, as one without a leader does",
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn the_management_api_tells_a_full_queue_from_one_without_leader_or_majority() {
        let full = |messages, limit| Some(Trouble::Full { messages, limit });
        let members = || ["a", "b", "c"].map(str::to_owned).to_vec();
        let cases: [(Value, Option<Trouble>); 12] = [
            (json!({ "state": "running", "online": ["a"], "members": ["a"] }), None),
            (json!({ "state": "running", "online": ["a", "b"], "members": members() }), None),
            // Not known yet.
            (json!({}), None),
            (json!({ "members": members() }), None),
            (json!({ "state": "down" }), Some(Trouble::Down)),
            // As RabbitMQ 3.10 shows it.
            (json!({ "leader": null, "online": [], "members": ["a"] }), Some(Trouble::Down)),
            (
                json!({ "state": "minority", "online": ["a"], "members": members() }),
                Some(Trouble::Minority { online: 1, members: members() }),
            ),
            (json!({ "state": "running", "arguments": { "x-max-length": 5 }, "messages_ready": 4 }), None),
            (json!({ "state": "running", "arguments": { "x-max-length": 5 }, "messages_ready": 5 }), full(5, 5)),
            (json!({ "arguments": { "x-max-length": 5 }, "messages_ready": 3, "messages_dlx": 2 }), full(5, 5)),
            // The lower one of argument and policy counts.
            (
                json!({
                    "arguments": { "x-max-length": 9 }, "effective_policy_definition": { "max-length": 2 },
                    "messages_ready": 2,
                }),
                full(2, 2),
            ),
            // Not counted yet.
            (json!({ "arguments": { "x-max-length": 5 } }), None),
        ];
        for (mut there, expected) in cases {
            for (key, value) in [("name", json!("q")), ("type", json!("quorum")), ("durable", json!(true))] {
                there[key] = value;
            }
            let entity: LiveEntity = serde_json::from_value(there.clone()).unwrap();
            assert_eq!(Trouble::by_api(&entity), expected, "{there}");
        }
    }

    #[test]
    fn over_amqp_a_queue_without_leader_looks_empty_so_a_nack_has_to_say_more() {
        let counts = |messages, consumers| Some(Counts { messages, consumers });
        let full = Some(Trouble::Full { messages: 7, limit: 7 });
        for (counts, max_length, nacked, expected) in [
            (counts(0, 0), None, false, None),
            (counts(0, 0), None, true, Some(Trouble::Silent)),
            (None, None, true, Some(Trouble::Silent)),
            (None, None, false, None),
            (counts(0, 1), None, true, None),
            (counts(6, 0), Some(7), true, None),
            (counts(7, 0), Some(7), true, full.clone()),
            (counts(7, 3), Some(7), false, full),
        ] {
            assert_eq!(Trouble::by_counts(counts, max_length, nacked), expected, "{counts:?} {nacked}");
        }
    }
}
