//! Messages that RabbitMQ 4.3 holds back: with a policy for delayed retries, a message that was read and put back is
//! invisible for a while. AMQP reports such a queue as empty, so this asks the management API.

use std::time::Duration;

use serde_json::{Map, Value};
use tokio::time::timeout;

use crate::broker::{BrokerUrl, Management, encoded};
use crate::config::Config;
use crate::text::span;

/// Maximum time for the answers of the API: without them only a note is missing.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(3);

/// A note if the broker delays messages that are put back into this queue. `None` also without a management API.
pub(super) async fn note(config: &Config, url: &BrokerUrl, queue: &str) -> Option<String> {
    let asking = async {
        let api = Management::new(&config.broker, url).ok()?;
        api.version().await.ok()?;
        api.get::<Value>(&format!("queues/{}/{}", encoded(api.vhost()), encoded(queue))).await.ok()
    };
    let found = timeout(ANSWER_TIMEOUT, asking).await.ok()??;
    let object = |key: &str| found[key].as_object().cloned().unwrap_or_default();
    text(queue, &object("effective_policy_definition"), &object("arguments"))
}

/// A policy wins over an argument of the queue.
fn text(queue: &str, policy: &Map<String, Value>, arguments: &Map<String, Value>) -> Option<String> {
    let value = |key: &str| policy.get(key).or_else(|| arguments.get(&format!("x-{key}")));
    let kind = value("delayed-retry-type")?.as_str()?;
    if kind == "disabled" {
        return None;
    }
    let milliseconds = |key: &str| value(key).and_then(Value::as_u64).map(Duration::from_millis);
    let wait = match (milliseconds("delayed-retry-min"), milliseconds("delayed-retry-max")) {
        (Some(min), Some(max)) if min != max => format!("{} to {}", span(min), span(max)),
        (Some(wait), _) | (None, Some(wait)) => span(wait),
        (None, None) => "a while".to_owned(),
    };
    Some(format!(
        "note: {queue} delays retries (delayed-retry-type is {kind}): messages that were read and put back are \
         invisible for {wait}, and no command finds them until then"
    ))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_delay_is_said_with_its_length() {
        let note = |policy: Value, arguments: Value| {
            text("q", policy.as_object().unwrap(), arguments.as_object().unwrap()).unwrap_or_default()
        };
        let all = json!({ "delayed-retry-type": "all", "delayed-retry-min": 60_000 });
        assert!(
            note(all, json!({}))
                .contains("(delayed-retry-type is all): messages that were read and put back are invisible for 1 min,")
        );
        let argument =
            json!({ "x-delayed-retry-type": "returned", "x-delayed-retry-min": 5000, "x-delayed-retry-max": 90_000 });
        assert!(note(json!({}), argument.clone()).contains("invisible for 5 s to 1 min 30 s,"));
        assert_eq!(note(json!({ "delayed-retry-type": "disabled" }), argument), "");
        assert_eq!(note(json!({ "max-length": 5 }), json!({ "x-queue-type": "quorum" })), "");
    }
}
