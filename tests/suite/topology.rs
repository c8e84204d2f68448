//! What the relay declares, checks and refuses.

use serde_json::{Value, json};

use crate::harness::{Node, Relay, Setup, Vhost, Wire, eventually};

const EVENT: &str = r#"{"eventType":"scan.a","payload":{}}"#;

/// The arguments of a work queue.
fn work_queue() -> Value {
    json!({
        "x-queue-type": "quorum",
        "x-dead-letter-exchange": "prism.dead",
        "x-dead-letter-strategy": "at-least-once",
        "x-overflow": "reject-publish",
        "x-delivery-limit": 20,
    })
}

#[tokio::test]
async fn everything_is_declared_as_the_contract_says() {
    let vhost = Vhost::new(Node::shared().await).await;
    let relay = Relay::start(&vhost).await;
    relay.eventually_metric("prism_relay_broker_connected", &[], 1.0).await;
    let exchange = |name: &'static str| {
        let vhost = &vhost;
        async move {
            let found: Value = vhost.exchange(name).await.unwrap_or_else(|| panic!("no exchange {name}"));
            assert_eq!(found["durable"], true, "{name}");
            (found["type"].as_str().unwrap().to_owned(), found["arguments"].clone())
        }
    };
    let topic = |arguments: Value| ("topic".to_owned(), arguments);
    assert_eq!(exchange("prism.events").await, topic(json!({"alternate-exchange": "prism.unrouted"})));
    assert_eq!(exchange("prism.unrouted").await, ("fanout".to_owned(), json!({})));
    assert_eq!(exchange("prism.dead").await, topic(json!({})));
    let work = work_queue();
    let plain = json!({"x-queue-type": "quorum"});
    for (name, arguments) in
        [("prism.scan", &work), ("prism.future_me", &work), ("prism.unrouted", &plain), ("prism.dead", &plain)]
    {
        let queue = vhost.queue(name).await.unwrap_or_else(|| panic!("no queue {name}"));
        assert_eq!((&queue["durable"], &queue["arguments"]), (&json!(true), arguments), "{name}");
    }
    let mut bindings = vhost.bindings().await;
    bindings.retain(|(exchange, _, _)| !exchange.is_empty());
    bindings.sort();
    let bindings: Vec<_> =
        bindings.iter().map(|(exchange, queue, key)| (exchange.as_str(), queue.as_str(), key.as_str())).collect();
    let expected = [
        ("prism.dead", "prism.dead", "#"),
        ("prism.events", "prism.future_me", "body_shape_prediction.#"),
        ("prism.events", "prism.scan", "scan.#"),
        ("prism.unrouted", "prism.unrouted", ""),
    ];
    assert_eq!(bindings, expected);
}

#[tokio::test]
async fn a_rejected_message_goes_to_the_dead_letters() {
    let vhost = Vhost::new(Node::shared().await).await;
    let relay = Relay::start(&vhost).await;
    let id = relay.post(EVENT).await.id();
    vhost.reject("prism.scan").await;
    let dead = vhost.messages("prism.dead", 1).await.remove(0);
    assert_eq!((dead.id(), dead.routing_key.as_str()), (id, "scan.a"));
}

#[tokio::test]
async fn a_clash_names_the_entity_and_both_values_and_loses_nothing() {
    let vhost = Vhost::new(Node::shared().await).await;
    let mut arguments = work_queue();
    arguments["x-delivery-limit"] = json!(7);
    vhost.create_queue("prism.scan", arguments).await;
    let relay = Relay::start(&vhost).await;
    relay.post(EVENT).await.expect(200);
    let error = relay.eventually_logs("not delivering").await["error"].as_str().unwrap().to_owned();
    for part in ["queue prism.scan", "x-delivery-limit", "'20'", "'7'", "Delete it"] {
        assert!(error.contains(part), "{part:?} is missing in {error:?}");
    }
    vhost.delete_queue("prism.scan").await;
    vhost.messages("prism.scan", 1).await;
}

#[tokio::test]
async fn passive_creates_nothing_and_names_what_is_missing() {
    let vhost = Vhost::new(Node::shared().await).await;
    let mut wire = Wire::new(vhost.address());
    let relay = Setup::new(&vhost.url_through(&wire)).set("topology.declare", "passive").start().await;
    relay.post(EVENT).await.expect(200);
    let error = relay.eventually_logs("not delivering").await["error"].as_str().unwrap().to_owned();
    assert!(error.contains("exchange prism.unrouted does not exist") && error.contains("\"active\""), "{error}");
    assert!(vhost.exchange("prism.unrouted").await.is_none());
    // Another relay, or an operator, creates it. AMQP cannot tell whether the bindings are there yet, so this one waits.
    wire.refuse().await;
    let active = Relay::start(&vhost).await;
    active.eventually_metric("prism_relay_broker_connected", &[], 1.0).await;
    wire.accept();
    vhost.messages("prism.scan", 1).await;
}

#[tokio::test]
async fn off_without_an_exchange_keeps_the_event_and_says_why() {
    let vhost = Vhost::new(Node::shared().await).await;
    let relay = Setup::new(&vhost.url()).set("topology.declare", "off").start().await;
    relay.post(EVENT).await.expect(200);
    relay.eventually_logs("no exchange 'prism.events'").await;
    assert_eq!(relay.status().await["spool"]["parked"], 0);
    vhost.create_exchange("prism.events", "topic", json!({})).await;
    vhost.create_queue("q", json!({})).await;
    vhost.bind("prism.events", "q", "#").await;
    vhost.messages("q", 1).await;
}

#[tokio::test]
async fn names_and_queues_come_from_the_configuration() {
    let vhost = Vhost::new(Node::shared().await).await;
    let queues = json!([{"name": "mine", "bindings": ["scan.#", "capture_data.#"]}]);
    let relay =
        Setup::new(&vhost.url()).set("broker.exchange", "my.events").set("topology.queues", queues).start().await;
    relay.post(EVENT).await.expect(200);
    relay.post(r#"{"eventType":"capture_data.x","payload":{}}"#).await.expect(200);
    relay.post(r#"{"eventType":"body_shape_prediction.x","payload":{}}"#).await.expect(200);
    let keys: Vec<_> = vhost.messages("mine", 2).await.into_iter().map(|delivery| delivery.routing_key).collect();
    assert_eq!(keys, ["scan.a", "capture_data.x"]);
    assert_eq!(vhost.messages("prism.unrouted", 1).await[0].exchange, "my.events");
}

#[tokio::test]
async fn the_topology_can_be_shown_declared_and_exported() {
    let node = Node::shared().await;
    let vhost = Vhost::new(node).await;
    let setup = Setup::new(&vhost.url()).set("topology.declare", "off");
    let shown = setup.run(&["topology", "show"]).await;
    assert_eq!(shown.code, Some(0), "{shown:?}");
    for line in [
        "exchange prism.events  (topic)",
        "    alternate-exchange = \"prism.unrouted\"",
        "queue prism.scan  (durable)",
        "    x-delivery-limit = 20",
        "binding of queue prism.scan to exchange prism.events by \"scan.#\"",
    ] {
        assert!(shown.stdout.lines().any(|shown| shown == line), "{line:?} is not in {}", shown.stdout);
    }
    for _ in 0..2 {
        let declared = setup.run(&["topology", "declare"]).await;
        assert!(declared.code == Some(0) && declared.stdout.contains("4 bindings are there"), "{declared:?}");
    }
    assert_eq!(vhost.queue("prism.scan").await.unwrap()["arguments"], work_queue());
    let away = Setup::new("amqp://guest:guest@127.0.0.1:1/%2f").run(&["topology", "declare"]).await;
    assert!(away.code == Some(1) && away.stderr.contains("none of the brokers could be reached"), "{away:?}");

    // Exported, and imported into a vhost that knows nothing of it.
    let other = Vhost::new(node).await;
    let exported = Setup::new(&other.url()).run(&["topology", "export"]).await;
    let file = node.folder().join(format!("{}.json", other.name()));
    std::fs::write(&file, &exported.stdout).unwrap();
    node.ctl(&["import_definitions", &node.inside(&file)]).await;
    let queue = other.queue("prism.scan").await.expect("the queue is imported");
    assert_eq!(queue["arguments"], json!({"x-queue-type": "quorum"}));
    eventually("the policy at work", async || {
        let queue = other.queue("prism.scan").await.unwrap();
        let strategy = &queue["effective_policy_definition"]["dead-letter-strategy"];
        if strategy == "at-least-once" { Ok(()) } else { Err(queue) }
    })
    .await;
    assert_eq!(other.bindings().await, vhost.bindings().await);
    // A relay that finds this takes it as it is, and a message that is rejected goes where it should.
    let relay = Setup::new(&other.url()).set("topology.declare", "passive").start().await;
    relay.post(EVENT).await.expect(200);
    other.reject("prism.scan").await;
    assert_eq!(other.messages("prism.dead", 1).await[0].text(), EVENT);
    relay.post(r#"{"eventType":"unknown","payload":{}}"#).await.expect(200);
    other.messages("prism.unrouted", 1).await;
}
