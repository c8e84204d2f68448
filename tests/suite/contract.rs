//! The contract of the messages in forms that machines check: the JSON Schemas, judged by Ajv, and the AsyncAPI
//! document, judged by AsyncAPI's own parser and compared with the topology on a broker.

use std::path::Path;

use serde_json::{Value, json};

use crate::harness::marks::PASSWORD;
use crate::harness::program::Program;
use crate::harness::scratch::Scratch;
use crate::harness::{Node, SECRET, Setup, Vhost, leash, samples};

/// The fields of each payload, by the first word of the event type.
const PAYLOAD_FIELDS: [(&str, &[&str]); 2] = [
    ("scan", &["scanId", "userId", "userToken", "state"]),
    ("body_shape_prediction", &["bodyShapePredictionId", "scanId", "userId", "userToken", "state"]),
];

/// Runs a script of `tests/contract` with Node.js.
async fn node(script: &str, arguments: &[&Path]) {
    let mut command = leash::command("node");
    command.arg(root().join("tests/contract").join(script)).args(arguments);
    if let Ok(modules) = std::env::var("PRISM_TEST_CONTRACT_MODULES") {
        command.env("NODE_PATH", modules);
    }
    let ended = Program::start(command).wait().await;
    assert!(ended.code == Some(0), "{script} finds:\n{}{}", ended.stdout, ended.stderr);
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A line for `schemas.js`: whether `event` has to be valid after `change`.
fn case(name: &str, valid: bool, event: &Value, change: impl FnOnce(&mut Value)) -> Value {
    let mut value = event.clone();
    change(&mut value);
    json!({ "name": format!("{name} in {event}"), "valid": valid, "schema": "event.schema.json", "value": value })
}

/// Changes that Prism may make without notice, and changes that would break a worker.
fn cases(event: &Value) -> Vec<Value> {
    let mut cases = vec![
        case("nothing changed", true, event, |_| {}),
        case("a new field of the envelope", true, event, |event| event["eventVersion"] = json!(2)),
        case("a new field of the payload", true, event, |event| event["payload"]["quality"] = json!({ "blur": 0.1 })),
        case("a new state", true, event, |event| event["payload"]["state"] = json!("ARCHIVED")),
        case("a new type", true, event, |event| {
            event["eventType"] = json!("scan.deletion.succeeded");
            event["payload"] = json!({ "scanId": 7 });
        }),
        case("a type that is a number", false, event, |event| event["eventType"] = json!(7)),
        case("no type", false, event, |event| drop(event.as_object_mut().unwrap().remove("eventType"))),
        case("a payload that is a list", false, event, |event| event["payload"] = json!([])),
        case("no payload", false, event, |event| drop(event.as_object_mut().unwrap().remove("payload"))),
    ];
    let family = event["eventType"].as_str().unwrap().split('.').next().unwrap();
    let (_, fields) = PAYLOAD_FIELDS.iter().find(|(name, _)| *name == family).unwrap();
    for field in *fields {
        for wrong in [json!(7), json!(null), json!({}), json!(["READY"])] {
            let name = format!("{field} = {wrong}");
            cases.push(case(&name, false, event, |event| event["payload"][field] = wrong));
        }
        let name = format!("no {field}");
        cases.push(case(&name, false, event, |event| {
            event["payload"].as_object_mut().unwrap().remove(*field).expect("the sample has the field");
        }));
    }
    cases
}

#[tokio::test]
async fn the_schemas_take_what_prism_sends_and_what_it_may_add_and_no_changed_types() {
    let events: Vec<Value> = samples::EVENTS.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let documented = |event: &&Value| event["eventType"].as_str().unwrap().contains(".processing.");
    let mut lines: Vec<_> = events.iter().filter(documented).flat_map(cases).collect();
    assert!(lines.len() > 6 * 25, "{} cases", lines.len());
    lines.extend(events.iter().map(|event| case("a sample", true, event, |_| {})));
    for (value, valid) in [("true", true), ("maybe", false)] {
        let headers = json!({
            "prism-received-at": "2025-10-01T21:26:17.000Z", "prism-fingerprint": "0".repeat(64),
            "prism-verified": value, "x-death": [{ "count": 1 }],
        });
        lines.push(json!({ "name": value, "valid": valid, "schema": "headers.schema.json", "value": headers }));
    }
    let scratch = Scratch::new();
    let file = scratch.path().join("cases.jsonl");
    std::fs::write(&file, lines.iter().map(|line| format!("{line}\n")).collect::<String>()).unwrap();
    node("schemas.js", &[&root().join("deploy/workers/schemas"), &file]).await;
}

/// The document of `topology asyncapi`. It shows the vendor's sample of a `userToken`, so it is searched here for what
/// it must not show.
async fn asyncapi(setup: &Setup) -> Value {
    let ended = setup.launch(&["topology", "asyncapi"]).wait().await;
    assert!(ended.code == Some(0), "{ended:?}");
    for secret in [SECRET, PASSWORD, "guest"] {
        assert!(!ended.stdout.contains(secret), "{secret} is in the document");
    }
    serde_json::from_str(&ended.stdout).unwrap()
}

/// Exchanges, queues or bindings, each as what the other form of it must be equal to.
fn sorted(items: impl Iterator<Item = Value>) -> Vec<String> {
    let mut items: Vec<_> = items.map(|item| item.to_string()).collect();
    items.sort();
    items
}

/// The exchanges or the queues of a document: name and type.
fn entities(document: &Value, kind: &str) -> Vec<String> {
    let channels = document["channels"].as_object().unwrap().values();
    let described = channels.filter_map(|channel| channel["bindings"]["amqp"].get(kind));
    sorted(described.map(|entity| json!([entity["name"], entity.get("type").or(entity.get("x-type"))])))
}

fn bindings(document: &Value) -> impl Iterator<Item = &Value> {
    let channels = document["channels"].as_object().unwrap().values();
    channels.flat_map(|channel| channel["x-bindings"].as_array().unwrap())
}

#[tokio::test]
async fn the_asyncapi_document_is_valid_and_has_the_names_of_the_topology() {
    let url = format!("amqp://guest:{PASSWORD}@broker.example:5672/a%2Fb%20c");
    let queues = |more: Value| {
        let mut queue = json!({ "name": "prism.scan", "bindings": ["scan.#", "capture_data.*.failed"] });
        queue.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        json!([queue, { "name": "started", "bindings": ["scan.processing.started"] }])
    };
    let plain = || Setup::new(&url);
    let setups = [
        plain(),
        plain().set("topology.queues", queues(json!({ "retry_delays": ["1s", "2s"], "max_length": 5, "ttl": "1h" }))),
        plain().set("topology.queues", queues(json!({ "partitions": 3, "retry_delays": ["1s"] }))),
        plain().set("topology.queues", json!([{ "name": "q ~/%ä:{x}", "bindings": ["#"], "retry_delays": ["1s"] }])),
        plain().set("topology.archive", json!({ "name": "all.of.it", "max_age": "30d" })),
        plain().set("topology.declare", "passive"),
        plain().set("topology.declare", "off").set("broker.exchange", "of my own"),
        plain().set("broker.exchange", "prism.events").set("topology.archive", json!({ "max_age": "30d" })),
        Setup::new("amqps://[2001:db8::1]/prism?auth_mechanism=external")
            .set("broker.urls", json!([url, "amqps://[2001:db8::1]/a%2Fb%20c"])),
    ];
    let scratch = Scratch::new();
    let mut files = Vec::new();
    for (number, setup) in setups.iter().enumerate() {
        let document = asyncapi(setup).await;
        let exported = setup.run(&["topology", "export"]).await;
        let exported: Value = serde_json::from_str(&exported.stdout).unwrap();
        let declared = |kind: &str| {
            let entities = exported[kind].as_array().unwrap().iter();
            sorted(entities.map(|entity| json!([entity["name"], entity.get("type")])))
        };
        assert_eq!(entities(&document, "exchange"), declared("exchanges"));
        assert_eq!(entities(&document, "queue"), declared("queues"));
        let mut expected = exported["bindings"].clone();
        expected.as_array_mut().unwrap().iter_mut().for_each(|binding| {
            assert_eq!(binding.as_object_mut().unwrap().remove("vhost"), Some(json!("a/b c")));
        });
        assert_eq!(sorted(bindings(&document).cloned()), sorted(expected.as_array().unwrap().iter().cloned()));
        let file = scratch.path().join(format!("{number}.json"));
        std::fs::write(&file, document.to_string()).unwrap();
        files.push(file);
    }
    let files: Vec<_> = files.iter().map(|file| file.as_path()).collect();
    node("asyncapi.js", &files).await;
}

#[tokio::test]
async fn a_channel_lists_the_messages_that_can_arrive() {
    let queues = json!([
        { "name": "prism.scan", "bindings": ["scan.#"], "retry_delays": ["1s"] },
        { "name": "ready", "bindings": ["*.processing.succeeded"] },
        { "name": "one", "bindings": ["scan.processing.failed"], "partitions": 2 },
        { "name": "all", "bindings": ["#"] },
    ]);
    let setup =
        Setup::without_broker().set("topology.queues", queues).set("topology.archive", json!({ "max_age": "30d" }));
    let document = asyncapi(&setup).await;
    let messages = |channel: &str| {
        let channel = document["channels"].get(channel).unwrap_or_else(|| panic!("no channel {channel}"));
        channel["messages"].as_object().unwrap().keys().cloned().collect::<Vec<_>>()
    };
    let scans = ["other", "scan.processing.failed", "scan.processing.started", "scan.processing.succeeded"];
    assert_eq!(messages("queue.prism.scan"), scans);
    assert_eq!(messages("queue.prism.scan.retry.1"), scans);
    let ready = ["body_shape_prediction.processing.succeeded", "other", "scan.processing.succeeded"];
    assert_eq!(messages("queue.ready"), ready);
    assert_eq!(messages("queue.one.2"), ["scan.processing.failed"]);
    for everything in ["queue.all", "queue.prism.dead", "queue.prism.unrouted", "queue.prism.archive"] {
        assert_eq!(messages(everything).len(), 8, "{everything}");
    }
    assert_eq!(messages("exchange.prism.webhooks").len(), 8);
    let operations: Vec<_> = document["operations"].as_object().unwrap().keys().collect();
    let receive = ["all", "one.1", "one.2", "prism.archive", "prism.dead", "prism.scan", "prism.unrouted", "ready"];
    let receive = receive.map(|queue| format!("receive.{queue}"));
    let send = ["give-up".to_owned(), "publish".to_owned()];
    assert_eq!(operations, send.iter().chain(&receive).collect::<Vec<_>>());
    assert_eq!(document["operations"]["give-up"]["channel"]["$ref"], "#/channels/exchange.prism.dead");
    assert_eq!(messages("exchange.prism.dead").len(), 8);

    // Half of such a document would be wrong.
    let two = Setup::without_broker().set("broker.urls", json!(["amqp://a/one", "amqp://b/two"]));
    let refused = two.run(&["topology", "asyncapi"]).await;
    assert!(refused.code == Some(64) && refused.stderr.contains("virtual host"), "{refused:?}");
}

#[tokio::test]
async fn the_asyncapi_document_is_what_a_broker_has_and_a_worker_receives() {
    let vhost = Vhost::new(Node::shared().await).await;
    let queues = json!([
        { "name": "prism.scan", "bindings": ["scan.#"], "retry_delays": ["1h"] },
        { "name": "prism.future_me", "bindings": ["body_shape_prediction.#"], "single_active_consumer": true },
    ]);
    let setup =
        Setup::new(&vhost.url()).set("topology.queues", queues).set("topology.archive", json!({ "max_age": "30d" }));
    let document = asyncapi(&setup).await;
    let relay = setup.start().await;
    relay.eventually_connected().await;
    for channel in document["channels"].as_object().unwrap().values() {
        let binding = &channel["bindings"]["amqp"];
        let (described, live) = match binding["is"].as_str() {
            Some("queue") => (&binding["queue"], vhost.queue(binding["queue"]["name"].as_str().unwrap()).await),
            _ => (&binding["exchange"], vhost.exchange(binding["exchange"]["name"].as_str().unwrap()).await),
        };
        let live = live.unwrap_or_else(|| panic!("the broker does not have {described}"));
        assert_eq!(described["vhost"], vhost.name());
        for (ours, its) in
            [("x-arguments", "arguments"), ("durable", "durable"), ("autoDelete", "auto_delete"), ("type", "type")]
        {
            if its == "type" && binding["is"] == "queue" {
                continue;
            }
            assert_eq!(described[ours], live[its], "{ours} of {described}");
        }
    }
    let text = |binding: &Value, key: &str| binding[key].as_str().unwrap().to_owned();
    let triple = |binding| (text(binding, "source"), text(binding, "destination"), text(binding, "routing_key"));
    let mut described: Vec<_> = bindings(&document).map(triple).collect();
    described.sort();
    assert_eq!(described, vhost.bindings().await);

    for line in samples::EVENTS.lines().filter(|line| line.contains("scan.processing.")) {
        relay.post(line).await.expect(200);
        let message = vhost.messages("prism.scan", 1).await.remove(0);
        let described = &document["components"]["messages"][&message.routing_key]["examples"][0];
        assert_eq!(described["payload"], message.json());
        let headers = described["headers"].as_object().unwrap().iter();
        let headers: Vec<_> = headers.map(|(name, value)| (name.as_str(), value.as_str().unwrap())).collect();
        let received: Vec<_> = message.headers.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        let without_time = |pairs: &[(&str, &str)]| {
            let kept = pairs.iter().filter(|(name, _)| *name != "prism-received-at");
            kept.map(|(name, value)| format!("{name}: {value}")).collect::<Vec<_>>()
        };
        assert_eq!(without_time(&headers), without_time(&received));
        assert_eq!(headers.len(), received.len(), "both have the time");
    }
}
