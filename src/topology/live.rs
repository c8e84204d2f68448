//! What is on the broker, as RabbitMQ's management API shows it.

use serde::Deserialize;
use serde_json::{Map, Value};

use super::plan::Plan;
use crate::broker::{Management, ManagementError, encoded};
use crate::text::clean;

/// Everything in a virtual host that can be compared with a plan.
#[derive(Debug, Deserialize)]
pub(crate) struct Live {
    /// RabbitMQ's version, such as `4.0.5`.
    pub(super) version: String,
    pub(super) exchanges: Vec<LiveEntity>,
    pub(super) queues: Vec<LiveEntity>,
    pub(super) bindings: Vec<LiveBinding>,
    pub(super) policies: Vec<LivePolicy>,
    /// The most queues that the virtual host may have; `None`: any number, or the user may not see the limit.
    #[serde(default)]
    pub(crate) queues_max: Option<usize>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct LiveEntity {
    pub name: String,
    /// All messages of a queue, also those that a worker has not acknowledged and those that wait for room among the
    /// dead letters. `None`: not counted yet.
    #[serde(default)]
    pub messages: Option<u64>,
    /// Messages of a queue that are ready for a consumer.
    #[serde(default)]
    pub messages_ready: Option<u64>,
    /// Messages of a queue that wait for room among the dead letters. They count for its maximum length.
    #[serde(default)]
    pub messages_dlx: Option<u64>,
    /// The state of a queue, such as `running` or `stopped`. RabbitMQ 3.10 does not show that of a quorum queue that is
    /// down.
    #[serde(default)]
    pub state: Option<String>,
    /// The nodes of a replicated queue.
    #[serde(default)]
    pub members: Vec<String>,
    /// Those of the `members` that run; `None`: not known yet.
    #[serde(default)]
    pub online: Option<Vec<String>>,
    pub r#type: String,
    pub durable: bool,
    #[serde(default)]
    pub arguments: Map<String, Value>,
    pub policy: Option<String>,
    pub operator_policy: Option<String>,
    /// Only queues have it.
    #[serde(default)]
    pub effective_policy_definition: Option<Map<String, Value>>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct LiveBinding {
    pub source: String,
    pub destination: String,
    pub destination_type: String,
    pub routing_key: String,
    #[serde(default)]
    pub arguments: Map<String, Value>,
    pub properties_key: String,
}

#[derive(Debug, Deserialize)]
pub(super) struct LivePolicy {
    pub name: String,
    pub pattern: String,
    pub definition: Map<String, Value>,
}

/// Marks the queues that a health check lists. Without a majority a queue has no leader either, and the reason counts.
fn mark_down(queues: &mut [LiveEntity], checked: &Value) {
    let listed: Vec<_> = checked["queues"].as_array().into_iter().flatten().map(|queue| &queue["name"]).collect();
    for queue in queues.iter_mut().filter(|queue| queue.state.as_deref() != Some("minority")) {
        if listed.iter().any(|name| **name == *queue.name) {
            queue.state = Some("down".to_owned());
        }
    }
}

impl Live {
    /// Reads the queues of the virtual host only, without most of their statistics.
    pub(crate) async fn read_queues(api: &Management) -> Result<Vec<LiveEntity>, ManagementError> {
        const COLUMNS: &str = "name,type,durable,arguments,effective_policy_definition,policy,operator_policy,messages,\
                               messages_ready,messages_dlx,state,members,online";
        let vhost = encoded(api.vhost());
        let mut queues: Vec<LiveEntity> = api.get(&format!("queues/{vhost}?columns={COLUMNS}")).await?;
        // RabbitMQ 4.3 shows a queue that lost its leader as it was before. This check, which 4.1 and later have, asks
        // the queues themselves.
        let check = format!("quorum-queues-without-elected-leaders/vhost/{vhost}/pattern/{}", encoded(".*"));
        if let Ok(checked) = api.health_check(&check).await {
            mark_down(&mut queues, &checked);
        }
        Ok(queues)
    }

    /// Reads the bindings of the virtual host only.
    pub(crate) async fn read_bindings(api: &Management) -> Result<Vec<LiveBinding>, ManagementError> {
        api.get(&format!("bindings/{}", encoded(api.vhost()))).await
    }

    /// Reads exchanges, queues, bindings and policies of the virtual host.
    pub(crate) async fn read(api: &Management) -> Result<Self, ManagementError> {
        let vhost = encoded(api.vhost());
        Ok(Self {
            version: api.version().await?,
            exchanges: api.get(&format!("exchanges/{vhost}")).await?,
            queues: Self::read_queues(api).await?,
            bindings: Self::read_bindings(api).await?,
            policies: api.get(&format!("policies/{vhost}")).await?,
            queues_max: queues_max(api, &vhost).await,
        })
    }

    /// How many queues the virtual host has.
    pub(crate) fn queue_count(&self) -> usize {
        self.queues.len()
    }

    /// The queues of the plan about which the API does not know the policies yet, which takes some seconds after their
    /// declaration. Their message counts come at the same time.
    pub(crate) fn unsettled(&self, plan: &Plan) -> Vec<String> {
        let queues = self.queues.iter().filter(|there| there.messages.is_none() && plan.has_queue(&there.name));
        queues.map(|there| format!("queue {}", clean(&there.name))).collect()
    }

    /// An entity of a kind, `exchange` or `queue`.
    pub(super) fn entity(&self, kind: &str, name: &str) -> Option<&LiveEntity> {
        let list = if kind == "queue" { &self.queues } else { &self.exchanges };
        list.iter().find(|there| there.name == name)
    }

    pub(super) fn major_version(&self) -> u32 {
        self.version.split('.').next().and_then(|major| major.parse().ok()).unwrap_or(0)
    }

    /// What policies set for an entity. The API names the policy of an exchange, but does not show its definition
    /// there.
    pub(super) fn policy_of(&self, there: &LiveEntity) -> Map<String, Value> {
        let named = || self.policies.iter().find(|policy| Some(&policy.name) == there.policy.as_ref());
        there
            .effective_policy_definition
            .clone()
            .or_else(|| named().map(|policy| policy.definition.clone()))
            .unwrap_or_default()
    }
}

/// The limit `max-queues` of a virtual host. A user that may not see it gets an answer that is not a list.
async fn queues_max(api: &Management, vhost: &str) -> Option<usize> {
    let limits: Value = api.get(&format!("vhost-limits/{vhost}")).await.ok()?;
    let max = limits.as_array()?.iter().find_map(|limit| limit["value"]["max-queues"].as_u64())?;
    usize::try_from(max).ok()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_health_check_tells_which_queues_have_no_leader() {
        let queue =
            |name: &str, state: &str| json!({ "name": name, "state": state, "type": "quorum", "durable": true });
        let queues = json!([queue("a", "running"), queue("b", "minority"), queue("c", "running")]);
        let mut queues: Vec<LiveEntity> = serde_json::from_value(queues).unwrap();
        let states = |queues: &[LiveEntity]| -> Vec<_> { queues.iter().filter_map(|q| q.state.clone()).collect() };
        mark_down(&mut queues, &json!({ "status": "ok" }));
        assert_eq!(states(&queues), ["running", "minority", "running"]);
        mark_down(&mut queues, &json!({ "status": "failed", "queues": [{ "name": "a" }, { "name": "b" }] }));
        assert_eq!(states(&queues), ["down", "minority", "running"]);
    }
}
