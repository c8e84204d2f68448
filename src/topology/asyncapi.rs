//! The plan as an AsyncAPI 3.0 document (<https://www.asyncapi.com/docs/reference/specification/v3.0.0>): servers,
//! channels, operations and messages, for people who write workers. Pure.
//!
//! AsyncAPI's binding for AMQP has no place for arguments and bindings of queues. They are in the extensions
//! `x-arguments` and `x-bindings`, written as RabbitMQ's definitions write them.

use lapin::ExchangeKind;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::{Map, Value, json};

use super::definitions::{described, kind, plain_table};
use super::pattern::matches;
use super::plan::{DEAD, EVENTS, Entity, Exchange, Plan, Queue, QueueRole, Target, UNROUTED};
use crate::broker::BrokerUrl;
use crate::event::{Envelope, Fingerprint, INVALID_BODY, INVALID_EVENT_TYPE};
use crate::schemas;

/// The version of AsyncAPI's binding for AMQP 0-9-1.
const BINDING_VERSION: &str = "0.3.0";

/// Prism's own samples, one for each line.
const SAMPLES: &str = include_str!("../../tests/samples/events.jsonl");

/// The message of every event whose type Prism does not document for scans and Future Me.
const OTHER: &str = "other";
/// The message of a signed body that is not an event.
const INVALID: &str = "invalid";

/// Characters of a JSON pointer that a URI fragment may have as they are.
const FRAGMENT: AsciiSet = NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// `exchange`: where the relay publishes. The document has no user name and no password.
pub(crate) fn asyncapi(plan: &Plan, urls: &[BrokerUrl], exchange: &str) -> Value {
    let vhost = urls.first().map_or("/", BrokerUrl::vhost);
    let documented = schemas::documented();
    let types: Vec<_> = documented.iter().map(|(name, _)| name.as_str()).collect();
    let channels: Map<_, _> = plan
        .entities()
        .iter()
        .map(|entity| (channel_name(entity), channel(plan, entity, exchange, vhost, &types)))
        .collect();
    json!({
        "asyncapi": "3.0.0",
        "info": {
            "title": "Events of Prism, relayed by prism-relay",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "Messages and queues of one configured relay. A message is published at least once: do each \
                `message_id` once. Prism adds types, fields and states without notice: accept what is not described. \
                Extensions: `x-role` is what a queue is for, `x-arguments` and `x-bindings` are what it is declared \
                with.",
        },
        "defaultContentType": "application/json",
        "servers": servers(urls),
        "channels": channels,
        "operations": operations(plan, exchange),
        "components": {
            "messages": messages(&documented),
            "messageTraits": { "relayed": relayed() },
            "correlationIds": {
                "subject": {
                    "description": "The scan or the prediction: its events are published in order.",
                    "location": "$message.header#/prism-subject",
                },
            },
            "schemas": component_schemas(&documented),
            "securitySchemes": {
                "password": { "type": "userPassword", "description": "A user of RabbitMQ (SASL PLAIN)." },
                "certificate": { "type": "X509", "description": "A client certificate (SASL EXTERNAL)." },
            },
        },
    })
}

/// One server for each URL; they are nodes of one cluster.
fn servers(urls: &[BrokerUrl]) -> Value {
    let server = |(number, url): (usize, &BrokerUrl)| {
        let host = if url.host().contains(':') { format!("[{}]", url.host()) } else { url.host().to_owned() };
        let scheme = if url.logs_in_by_certificate() { "certificate" } else { "password" };
        let server = json!({
            "host": format!("{host}:{}", url.port()),
            "pathname": format!("/{}", utf8_percent_encode(url.vhost(), &FRAGMENT)),
            "protocol": if url.uses_tls() { "amqps" } else { "amqp" },
            "protocolVersion": "0-9-1",
            "description": format!("RabbitMQ, virtual host `{}`.", url.vhost()),
            "security": [{ "$ref": format!("#/components/securitySchemes/{scheme}") }],
        });
        (format!("broker{number}"), server)
    };
    (1..).zip(urls).map(server).collect::<Map<_, _>>().into()
}

/// An exchange and a queue may have the same name.
fn channel_name(entity: &Entity) -> String {
    format!("{}.{}", entity.kind(), entity.name())
}

fn channel(plan: &Plan, entity: &Entity, published: &str, vhost: &str, types: &[&str]) -> Value {
    let (address, description, bindings) = match entity {
        Entity::Exchange(exchange) if [published, DEAD].contains(&&*exchange.name) => {
            (json!("{eventType}"), exchange_description(exchange, published), exchange_bindings(exchange, vhost))
        }
        Entity::Exchange(exchange) => {
            (Value::Null, exchange_description(exchange, published), exchange_bindings(exchange, vhost))
        }
        Entity::Queue(queue) => (json!(queue.name), queue_description(plan, queue), queue_bindings(queue, vhost)),
    };
    let target = match entity {
        Entity::Exchange(exchange) => Target::Exchange(exchange.name.clone()),
        Entity::Queue(queue) => Target::Queue(queue.name.clone()),
    };
    let bound: Vec<_> = plan.bindings.iter().filter(|binding| binding.to == target).map(described).collect();
    let messages = arriving(plan, entity, published, types).into_iter();
    let messages: Map<_, _> = messages
        .map(|name| (name.to_owned(), json!({ "$ref": reference(&["components", "messages", name]) })))
        .collect();
    let mut channel = json!({
        "address": address, "title": entity.to_string(), "description": description, "messages": messages,
        "bindings": { "amqp": bindings }, "x-bindings": bound,
    });
    if let Entity::Queue(queue) = entity {
        channel["x-role"] = json!(queue.role);
    }
    if !address.is_null() && matches!(entity, Entity::Exchange(_)) {
        channel["parameters"] = json!({
            "eventType": {
                "description": format!(
                    "The routing key: the `eventType`, or `{INVALID_EVENT_TYPE}` if that is not a safe topic key, or \
                     `{INVALID_BODY}` for a signed body that is not an event."
                ),
                "examples": types,
                "location": "$message.payload#/eventType",
            },
        });
    }
    channel
}

fn exchange_bindings(exchange: &Exchange, vhost: &str) -> Value {
    let mut described = json!({
        "name": exchange.name, "durable": true, "autoDelete": false, "vhost": vhost,
        "x-arguments": plain_table(&exchange.arguments),
    });
    // The binding knows no exchange type of a plugin.
    let name = if matches!(exchange.kind, ExchangeKind::Custom(_)) { "x-type" } else { "type" };
    described[name] = kind(&exchange.kind).into();
    json!({ "is": "routingKey", "exchange": described, "bindingVersion": BINDING_VERSION })
}

fn queue_bindings(queue: &Queue, vhost: &str) -> Value {
    let described = json!({
        "name": queue.name, "durable": true, "exclusive": false, "autoDelete": false, "vhost": vhost,
        "x-arguments": plain_table(&queue.arguments),
    });
    json!({ "is": "queue", "queue": described, "bindingVersion": BINDING_VERSION })
}

fn exchange_description(exchange: &Exchange, published: &str) -> String {
    match exchange.name.as_str() {
        name if name == published => "The relay publishes every event here. Bind a queue that watches all events.",
        EVENTS => "Bind work queues of your own here, by topic patterns of event types.",
        UNROUTED => "Takes events that match no work queue.",
        DEAD => "Takes dead letters.",
        _ => "A part of a work queue. Bind nothing here, and publish nothing.",
    }
    .to_owned()
}

fn queue_description(plan: &Plan, queue: &Queue) -> String {
    match queue.role {
        QueueRole::Work => {
            let retried = plan.configured_queue(&queue.name).is_some_and(|name| plan.has_queue(&retry(name, 1)));
            let after = if retried { "waits in the retry queues and comes back" } else { "goes to `prism.dead`" };
            return format!("Workers consume this queue. A message that is rejected (requeue=false) {after}.");
        }
        QueueRole::Retry => {
            "Rejected messages wait here, and RabbitMQ returns them to their work queue. Do not consume."
        }
        QueueRole::Dead => {
            "Messages that workers rejected for good, that expired, or that were returned too often. \
             `prism-relay redrive` publishes them again."
        }
        QueueRole::Unrouted => {
            "Events that match no work queue. `prism-relay redrive --from prism.unrouted` publishes \
             them again."
        }
        QueueRole::Archive => {
            "A stream of all events, which keeps messages after they were read. Consume it with the \
             argument `x-stream-offset` and a prefetch. `prism-relay replay` publishes from it again."
        }
    }
    .to_owned()
}

fn retry(queue: &str, step: usize) -> String {
    format!("{queue}.retry.{step}")
}

/// The names of the messages that can arrive at an entity. The inner exchanges of a queue list none.
fn arriving<'a>(plan: &Plan, entity: &Entity, published: &str, types: &[&'a str]) -> Vec<&'a str> {
    let every = || types.iter().copied().chain([OTHER, INVALID]).collect();
    match entity {
        Entity::Exchange(exchange) if [published, EVENTS, DEAD, UNROUTED].contains(&&*exchange.name) => every(),
        Entity::Exchange(_) => Vec::new(),
        Entity::Queue(Queue { role: QueueRole::Dead | QueueRole::Unrouted | QueueRole::Archive, .. }) => every(),
        Entity::Queue(Queue { role: QueueRole::Work | QueueRole::Retry, name, .. }) => {
            let entry = plan.configured_queue(name);
            let bound = plan.bindings.iter().filter(|bound| bound.exchange == EVENTS && Some(bound.to.name()) == entry);
            let patterns: Vec<_> = bound.map(|binding| binding.key.as_str()).collect();
            let any = |key: &str| patterns.iter().any(|pattern| matches(pattern, key));
            let mut names: Vec<_> = types.iter().copied().filter(|name| any(name)).collect();
            // A pattern that is one documented type lets no other through.
            names.extend(patterns.iter().any(|pattern| !types.contains(pattern)).then_some(OTHER));
            names.extend(any(INVALID_BODY).then_some(INVALID));
            names
        }
    }
}

/// The relay sends; workers receive from the queues that are theirs to consume, and send what they give up.
fn operations(plan: &Plan, published: &str) -> Value {
    let channel = |kind: &str, name: &str| json!({ "$ref": reference(&["channels", &format!("{kind}.{name}")]) });
    let mut operations = Map::new();
    operations.insert(
        "publish".to_owned(),
        json!({
            "action": "send",
            "channel": channel("exchange", published),
            "summary": "The relay publishes each accepted event, with publisher confirms.",
            "bindings": { "amqp": {
                "deliveryMode": 2, "mandatory": true, "timestamp": true, "bindingVersion": BINDING_VERSION,
            } },
        }),
    );
    operations.insert(
        "give-up".to_owned(),
        json!({
            "action": "send",
            "channel": channel("exchange", DEAD),
            "summary": "A worker publishes a copy of an event that it can never do, then acknowledges it.",
            "bindings": { "amqp": { "deliveryMode": 2, "bindingVersion": BINDING_VERSION } },
        }),
    );
    for entity in plan.entities() {
        let Entity::Queue(queue) = entity else { continue };
        let summary = match queue.role {
            QueueRole::Work => "A worker does the event, then acknowledges it.",
            QueueRole::Dead | QueueRole::Unrouted => "A person, or a tool, looks at what no worker did.",
            QueueRole::Archive => "A reader goes through past events.",
            QueueRole::Retry => continue,
        };
        operations.insert(
            format!("receive.{}", queue.name),
            json!({
                "action": "receive",
                "channel": channel("queue", &queue.name),
                "summary": summary,
                "bindings": { "amqp": { "ack": true, "bindingVersion": BINDING_VERSION } },
            }),
        );
    }
    operations.into()
}

fn messages(documented: &[(String, Value)]) -> Value {
    let message = |name: &str, title: &str, summary: &str, payload: Value| {
        let examples: Vec<_> = SAMPLES.lines().filter_map(|line| example(line, name, documented)).collect();
        let mut message = json!({
            "name": name, "title": title, "summary": summary, "payload": payload,
            "traits": [{ "$ref": "#/components/messageTraits/relayed" }],
        });
        if !examples.is_empty() {
            message["examples"] = json!(examples);
        }
        (name.to_owned(), message)
    };
    let mut messages: Map<_, _> = documented
        .iter()
        .map(|(name, schema)| {
            let refined = json!({ "properties": {
                "eventType": { "const": name },
                "payload": { "$ref": reference(&["components", "schemas", title(schema)]) },
            } });
            let summary = format!("`{name}`, with a {}", title(schema));
            let (name, mut message) = message(name, name, &summary, envelope_and(refined));
            message["bindings"] = json!({ "amqp": { "messageType": name, "bindingVersion": BINDING_VERSION } });
            (name, message)
        })
        .collect();
    let types: Vec<_> = documented.iter().map(|(name, _)| name).collect();
    let others = json!({ "properties": { "eventType": { "not": { "enum": types } } } });
    messages.extend([
        message(
            OTHER,
            "Any other event",
            "A type that is not described here. Do not fail on it.",
            envelope_and(others),
        ),
        message(
            INVALID,
            "Not an event",
            "A signed body without a string `eventType`. It may be anything, also bytes that are not JSON.",
            json!({ "not": {
                "type": "object", "required": ["eventType"], "properties": { "eventType": { "type": "string" } },
            } }),
        ),
    ]);
    messages.into()
}

fn envelope_and(refined: Value) -> Value {
    json!({ "allOf": [{ "$ref": "#/components/schemas/Envelope" }, refined] })
}

/// A sample as an example of the message `name`, with the headers that the relay would give it.
fn example(line: &str, name: &str, documented: &[(String, Value)]) -> Option<Value> {
    let envelope = Envelope::parse(line.as_bytes()).ok()?;
    let is_documented = documented.iter().any(|(documented, _)| *documented == envelope.event_type);
    let is_example = if name == OTHER { !is_documented } else { envelope.event_type == name };
    let headers: Map<_, _> = [
        ("prism-received-at", Some("2025-10-01T21:26:17.000Z".to_owned())),
        ("prism-fingerprint", Some(Fingerprint::of(line.as_bytes()).to_string())),
        ("prism-verified", Some("true".to_owned())),
        ("prism-source", Some("webhook".to_owned())),
        ("prism-subject", envelope.subject()),
        ("prism-scan-id", envelope.scan_id.as_deref().map(str::to_owned)),
        ("prism-prediction-id", envelope.prediction_id.as_deref().map(str::to_owned)),
        ("prism-state", envelope.state.as_deref().map(str::to_owned)),
    ]
    .into_iter()
    .filter_map(|(name, value)| Some((name.to_owned(), value?.into())))
    .collect();
    let payload: Value = serde_json::from_str(line).ok()?;
    is_example.then(|| json!({ "name": envelope.event_type, "headers": headers, "payload": payload }))
}

/// What all messages have in common.
fn relayed() -> Value {
    json!({
        "contentType": "application/json",
        "headers": { "$ref": "#/components/schemas/Headers" },
        "correlationId": { "$ref": "#/components/correlationIds/subject" },
        "x-properties": {
            "message_id": "UUIDv7, the same on every publish of this event. Do each id once.",
            "type": "The `eventType`, also after a retry has changed the routing key.",
            "timestamp": "When the relay accepted the event, in seconds since 1970.",
            "delivery_mode": "2 (persistent)",
            "content_type": "application/json",
            "app_id": "prism-relay",
        },
    })
}

fn component_schemas(documented: &[(String, Value)]) -> Value {
    let mut found = Map::new();
    let payloads = documented.iter().map(|(_, schema)| schema.clone());
    for mut schema in payloads.chain([schemas::ENVELOPE, schemas::HEADERS].map(schemas::parsed)) {
        // Inside this document a schema has neither a dialect nor a place of its own.
        if let Some(schema) = schema.as_object_mut() {
            schema.retain(|key, _| !["$schema", "$id"].contains(&key.as_str()));
        }
        found.insert(title(&schema).to_owned(), schema);
    }
    found.into()
}

fn title(schema: &Value) -> &str {
    schema["title"].as_str().expect("a test finds the title of every schema")
}

/// A reference within the document. Names may have any character.
fn reference(path: &[&str]) -> String {
    let escaped = path.iter().map(|part| part.replace('~', "~0").replace('/', "~1"));
    let encoded = escaped.map(|part| format!("/{}", utf8_percent_encode(&part, &FRAGMENT)));
    format!("#{}", encoded.collect::<String>())
}
