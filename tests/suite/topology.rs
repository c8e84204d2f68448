//! What the relay declares, checks and refuses.

use std::time::Duration;

use futures_util::StreamExt;
use serde_json::{Value, json};

use crate::harness::eventually::eventually_within;
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
    for part in ["queue prism.scan", "x-delivery-limit", "'20'", "'7'", "Replace it"] {
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
    wire.cut();
    let active = Relay::start(&vhost).await;
    active.eventually_metric("prism_relay_broker_connected", &[], 1.0).await;
    wire.accept();
    vhost.messages("prism.scan", 1).await;
}

#[tokio::test]
async fn off_without_an_exchange_keeps_the_event_and_says_why() {
    let vhost = Vhost::new(Node::shared().await).await;
    // Between exchange and binding it may be parked.
    let setup = Setup::new(&vhost.url()).set("topology.declare", "off").set("broker.parked_retry", "1s");
    let relay = setup.start().await;
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

/// A setup whose commands find the node's management API.
fn watched(node: &Node, vhost: &Vhost) -> Setup {
    Setup::new(&vhost.url()).set("broker.management_url", format!("http://127.0.0.1:{}", node.management().port))
}

/// Waits for a recreate to have turned events away from the queue that it replaces.
async fn old_way_is_closed(vhost: &Vhost, queue: &str) {
    eventually("the old way to be closed", async || match vhost.bindings().await {
        bindings if bindings.iter().any(|(_, to, _)| to == queue) => Err(format!("{bindings:?}")),
        _ => Ok(()),
    })
    .await;
}

#[tokio::test]
async fn each_difference_is_told_with_the_command_that_mends_it() {
    let node = Node::shared().await;
    let vhost = Vhost::new(node).await;
    let queues = json!([{ "name": "prism.scan", "bindings": ["scan.#"], "retry_delays": ["1s"], "partitions": 2 }]);
    let setup =
        watched(node, &vhost).set("topology.queues", queues).set("topology.archive", json!({ "max_age": "1d" }));
    let missing = setup.run(&["topology", "diff"]).await;
    assert!(missing.code == Some(1) && missing.stdout.contains("and then\n    prism-relay --config "), "{missing:?}");
    assert_eq!(setup.run(&["topology", "declare"]).await.code, Some(0));
    let same = setup.run(&["topology", "diff"]).await;
    assert!(same.code == Some(0) && same.stdout.ends_with("the broker is as configured"), "{same:?}");
    let checked = setup.run(&["check"]).await;
    assert!(
        checked.code == Some(0) && checked.stdout.contains("bindings and policies              as configured"),
        "{checked:?}"
    );

    // What operators and accidents do.
    vhost.bind("prism.events", "prism.dead", "scan.#").await;
    vhost.set_policy("short", "^prism.dead$", json!({ "message-ttl": 1000 })).await;
    vhost.delete_queue("prism.scan.retry.1").await;
    vhost.create_queue("prism.scan.retry.1", json!({ "x-queue-type": "quorum", "x-message-ttl": 7000 })).await;
    vhost.delete_exchange("prism.unrouted").await;
    vhost.create_exchange("prism.unrouted", "topic", json!({})).await;
    eventually("the policy at work", async || {
        let queue = vhost.queue("prism.dead").await.unwrap();
        if queue["policy"] == "short" { Ok(()) } else { Err(queue) }
    })
    .await;
    let told = setup.run(&["topology", "diff"]).await;
    assert_eq!(told.code, Some(1), "{told:?}");
    let encoded = vhost.name().replace('-', "%2D");
    for part in [
        "binding of queue prism.dead to exchange prism.events by \"scan.#\": is not configured\n    curl -fsS -u guest -X DELETE http",
        &format!("/api/bindings/{encoded}/e/prism%2Eevents/q/prism%2Edead/scan%2E%2523"),
        "queue prism.dead: the policy short sets message-ttl to 1000, and not configured",
        &format!("rabbitmqctl clear_policy -p {} short", vhost.name()),
        "x-dead-letter-exchange is not set, where \"prism.scan\" is configured; ",
        "x-message-ttl is 7000, where 1000 is configured",
        " topology recreate prism.scan.retry.1\n",
        "exchange prism.unrouted: is of type topic, where fanout is configured",
        "binding of queue prism.unrouted to exchange prism.unrouted by \"\": does not exist",
    ] {
        assert!(told.stdout.contains(part), "{part:?} is not in {}", told.stdout);
    }
    let checked = setup.run(&["check"]).await;
    assert!(
        checked.code == Some(1) && checked.stdout.contains("the policy short sets message-ttl to 1000"),
        "{checked:?}"
    );

    mend(node, &setup, &told.stdout).await;
    // The API tells of policies a moment later.
    eventually("the broker to be mended", async || {
        let told = setup.run(&["topology", "diff"]).await;
        if told.code == Some(0) { Ok(()) } else { Err(told.stdout) }
    })
    .await;
}

/// Does what the commands say, but with our own binary and the node's rabbitmqctl, and without asking for the password.
async fn mend(node: &Node, setup: &Setup, told: &str) {
    for command in told.lines().filter_map(|line| line.strip_prefix("    ")) {
        let words: Vec<_> = command.split(' ').map(|word| word.trim_matches('\'')).collect();
        match words[0] {
            "rabbitmqctl" => drop(node.ctl(&words[1..]).await),
            "curl" => {
                let path = words.last().unwrap().split_once("/api/").unwrap().1;
                node.management().delete(path).await;
            }
            _ => {
                let own = words.iter().position(|word| *word == "topology").unwrap();
                let done = setup.run(&words[own..]).await;
                assert_eq!(done.code, Some(0), "{done:?}");
            }
        }
    }
}

/// The default exchange leads to a queue whatever it is bound to: this is how `redrive --to` publishes.
#[tokio::test]
async fn what_goes_straight_into_a_queue_that_is_replaced_is_not_lost() {
    let node = Node::shared().await;
    let vhost = Vhost::new(node).await;
    let setup = watched(node, &vhost);
    assert_eq!(setup.run(&["topology", "declare"]).await.code, Some(0));
    let mut running = setup.launch(&["topology", "recreate", "prism.scan"]);
    // From here on it waits for what the API tells.
    old_way_is_closed(&vhost, "prism.scan").await;
    for _ in 0..10 {
        vhost.publish("", "prism.scan", EVENT).await;
    }
    let second = setup.run(&["topology", "recreate", "prism.scan"]).await;
    assert!(second.code == Some(1) && second.stderr.contains("is being replaced by another run"), "{second:?}");
    // A worker that comes too early ends it.
    let ended = eventually_within(Duration::from_secs(90), "its end", async || running.exited().ok_or("it runs")).await;
    assert!(ended.success(), "{:?}", running.stderr());
    assert_eq!(vhost.messages("prism.scan", 10).await.len(), 10);
    let worker = vhost.connect().await;
    let channel = worker.create_channel().await.unwrap();
    let mut running = setup.launch(&["topology", "recreate", "prism.scan"]);
    old_way_is_closed(&vhost, "prism.scan").await;
    let early = channel.basic_consume("prism.scan".into(), "".into(), Default::default(), Default::default()).await;
    let ended = running.wait().await;
    assert!(ended.code == Some(1) && ended.stderr.contains("1 workers"), "{ended:?}");
    drop(early);
    worker.close(200, "done".into()).await.unwrap();

    // Interrupted now, it is what diff tells to go on with.
    eventually("what goes on", async || {
        let told = setup.run(&["topology", "diff"]).await.stdout;
        let goes_on = told.contains("queue prism.scan.moving: a topology recreate was interrupted")
            && told.contains("topology recreate prism.scan\n")
            && !told.contains("redrive --from");
        if goes_on { Ok(()) } else { Err(told) }
    })
    .await;
}

/// Whatever part of a queue it was: a relay that declares the topology brings back all but what is left over.
#[tokio::test]
async fn an_interrupted_recreate_is_told_until_it_has_ended() {
    let node = Node::shared().await;
    let vhost = Vhost::new(node).await;
    let queues = json!([{ "name": "prism.scan", "bindings": ["scan.#"], "partitions": 2 }]);
    let setup = watched(node, &vhost).set("topology.queues", queues.clone());
    let passive = watched(node, &vhost).set("topology.queues", queues).set("topology.declare", "passive");
    assert_eq!(setup.run(&["topology", "declare"]).await.code, Some(0));
    for (queue, signal) in [("prism.scan.1", "KILL"), ("prism.dead", "INT")] {
        let moving = format!("{queue}.moving");
        let mut interrupted = setup.launch(&["topology", "recreate", queue]);
        old_way_is_closed(&vhost, queue).await;
        interrupted.signal(signal);
        let ended = interrupted.wait().await;
        assert!(signal == "KILL" || (ended.code == Some(1) && ended.stderr.contains("interrupted")), "{ended:?}");
        assert_eq!(setup.run(&["topology", "declare"]).await.code, Some(0));
        eventually("what goes on", async || {
            let told = setup.run(&["topology", "diff"]).await;
            let goes_on = told.stdout.contains(&format!("queue {moving}: a topology recreate was interrupted"))
                && told.stdout.contains(&format!("topology recreate {queue}\n"));
            if goes_on && told.code == Some(1) { Ok(()) } else { Err(told.stdout) }
        })
        .await;
        for setup in [&setup, &passive] {
            let checked = setup.run(&["check"]).await;
            assert!(checked.code == Some(1) && checked.stdout.contains("recreate was interrupted"), "{checked:?}");
        }
        let done = setup.run(&["topology", "recreate", queue]).await;
        assert_eq!(done.code, Some(0), "{done:?}");
        assert!(vhost.queue(&moving).await.is_none());
    }
    // Right before the end only the exchange is left.
    vhost.create_exchange("prism.dead.moving", "fanout", json!({})).await;
    vhost.bind("prism.dead.moving", "prism.dead", "").await;
    let told = setup.run(&["topology", "diff"]).await;
    assert!(
        told.code == Some(1) && told.stdout.contains("exchange prism.dead.moving: a topology recreate"),
        "{told:?}"
    );
    let done = setup.run(&["topology", "recreate", "prism.dead"]).await;
    assert_eq!(done.code, Some(0), "{done:?}");
    assert_eq!(setup.run(&["topology", "diff"]).await.code, Some(0));
}

/// With a lower limit, what came in meanwhile may not fit. It is kept, and goes on where it was, with the workers at it.
#[tokio::test]
async fn what_came_in_while_a_queue_was_replaced_waits_for_room() {
    const COUNT: usize = 450;
    let node = Node::shared().await;
    let vhost = Vhost::new(node).await;
    let queues = |limit: u64| json!([{ "name": "prism.scan", "bindings": ["scan.#"], "max_length": limit }]);
    let before = watched(node, &vhost).set("topology.queues", queues(1000));
    assert_eq!(before.run(&["topology", "declare"]).await.code, Some(0));
    let setup = watched(node, &vhost).set("topology.queues", queues(5));
    for number in 0..6 {
        vhost.publish("prism.events", "scan.a", number.to_string()).await;
    }
    let too_many = setup.run(&["topology", "recreate", "prism.scan"]).await;
    assert!(too_many.code == Some(1) && too_many.stderr.contains("6 messages, more than"), "{too_many:?}");
    vhost.messages("prism.scan", 6).await;

    let mut running = setup.launch(&["topology", "recreate", "prism.scan"]);
    old_way_is_closed(&vhost, "prism.scan").await;
    let connection = vhost.connect().await;
    let channel = connection.create_channel().await.unwrap();
    channel.confirm_select(Default::default()).await.unwrap();
    for number in 0..COUNT {
        let (exchange, key, body) = ("prism.events".into(), "scan.a".into(), number.to_string());
        let sent = channel.basic_publish(exchange, key, Default::default(), body.as_bytes(), Default::default());
        drop(sent.await.unwrap());
    }
    channel.wait_for_confirms().await.unwrap();
    let full = running.wait().await;
    assert!(full.code == Some(1) && full.stderr.contains("prism.scan.moving keeps the rest"), "{full:?}");
    eventually("what is left to be back in its queue", async || match vhost.depth("prism.scan.moving").await {
        0 => Err("it is empty"),
        _ => Ok(()),
    })
    .await;

    let mut work =
        channel.basic_consume("prism.scan".into(), "".into(), Default::default(), Default::default()).await.unwrap();
    let worker = tokio::spawn(async move {
        let mut done = std::collections::BTreeSet::new();
        while done.len() < COUNT
            && let Some(Ok(delivery)) = work.next().await
        {
            done.insert(delivery.data.clone());
            delivery.acker.ack(Default::default()).await.unwrap();
        }
        done.len()
    });
    eventually_within(Duration::from_secs(240), "everything to be back", async || {
        let ended = setup.run(&["topology", "recreate", "prism.scan"]).await;
        if ended.code == Some(0) { Ok(()) } else { Err(ended.stderr) }
    })
    .await;
    assert_eq!(worker.await.unwrap(), COUNT);
    assert!(vhost.queue("prism.scan.moving").await.is_none());
    connection.close(200, "done".into()).await.unwrap();
}

/// What only waits meanwhile must not be cut off or expire there.
#[tokio::test]
async fn a_queue_is_not_replaced_where_a_policy_would_cost_messages() {
    let node = Node::shared().await;
    let vhost = Vhost::new(node).await;
    let setup = watched(node, &vhost);
    assert_eq!(setup.run(&["topology", "declare"]).await.code, Some(0));
    vhost.set_policy("theirs", r"^prism\.scan", json!({ "message-ttl": 3_600_000, "max-length": 150 })).await;
    vhost.publish("prism.events", "scan.a", EVENT).await;
    let before = vhost.bindings().await;
    let refused = setup.run(&["topology", "recreate", "prism.scan"]).await;
    assert_eq!(refused.code, Some(1), "{refused:?}");
    for part in ["prism.scan.moving", "max-length, message-ttl"] {
        assert!(refused.stderr.contains(part), "{part:?} is not in {refused:?}");
    }
    assert_eq!(vhost.bindings().await, before);
    assert!(vhost.queue("prism.scan.moving").await.is_none() && vhost.exchange("prism.scan.moving").await.is_none());
    vhost.eventually_depth("prism.scan", 1).await;
    // Nor is the old one deleted where somebody sets one meanwhile.
    vhost.delete_policy("theirs").await;
    eventually("the policy to be gone", async || match vhost.queue("prism.scan").await.unwrap_or_default() {
        queue if queue["policy"].is_null() => Ok(()),
        queue => Err(queue),
    })
    .await;
    let mut running = setup.launch(&["topology", "recreate", "prism.scan"]);
    old_way_is_closed(&vhost, "prism.scan").await;
    vhost.set_policy("theirs", r"^prism\.scan\.moving", json!({ "max-length": 150 })).await;
    let ended = running.wait().await;
    assert!(
        ended.code == Some(1) && ended.stderr.contains("a policy sets max-length for prism.scan.moving"),
        "{ended:?}"
    );
    assert!(vhost.queue("prism.scan").await.is_some());
    vhost.eventually_depth("prism.scan.moving", 1).await;
}

/// They are not counted as messages of the queue, and would be gone with it.
#[tokio::test]
async fn dead_letters_on_their_way_keep_a_queue_from_being_replaced() {
    let node = Node::shared().await;
    let vhost = Vhost::new(node).await;
    let setup = watched(node, &vhost);
    assert_eq!(setup.run(&["topology", "declare"]).await.code, Some(0));
    vhost.delete_exchange("prism.dead").await;
    vhost.publish("prism.events", "scan.a", EVENT).await;
    vhost.reject("prism.scan").await;
    vhost.assert_empty("prism.scan").await;
    let refused = setup.run(&["topology", "recreate", "prism.scan"]).await;
    assert!(refused.code == Some(1) && refused.stderr.contains("still has 1 messages: on their way"), "{refused:?}");
    assert_eq!(vhost.queue("prism.scan").await.unwrap()["messages"], 1);
    // What somebody else has bound is not dropped, either.
    vhost.create_exchange("theirs", "topic", json!({})).await;
    vhost.bind("theirs", "prism.future_me", "a.#").await;
    let bound = setup.run(&["topology", "recreate", "prism.future_me"]).await;
    assert!(bound.code == Some(1) && bound.stderr.contains("bound to theirs (a.#), too"), "{bound:?}");
    assert!(vhost.queue("prism.future_me.moving").await.is_none());
}

#[tokio::test]
async fn what_another_configuration_has_left_is_told() {
    let node = Node::shared().await;
    let vhost = Vhost::new(node).await;
    let queue = |more: Value| {
        let mut queue = json!({ "name": "prism.scan", "bindings": ["scan.#"] });
        queue.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        watched(node, &vhost).set("topology.queues", json!([queue]))
    };
    let before = queue(json!({ "partitions": 3, "retry_delays": ["1s", "2s"] }));
    assert_eq!(before.run(&["topology", "declare"]).await.code, Some(0));
    let after = queue(json!({ "partitions": 2, "retry_delays": ["1s"] }));
    assert_eq!(after.run(&["topology", "declare"]).await.code, Some(0));
    let told = after.run(&["topology", "diff"]).await;
    assert_eq!(told.code, Some(1), "{told:?}");
    for part in [
        "binding of queue prism.scan.3 to exchange prism.scan by \"1\": is not configured\n    curl",
        "queue prism.scan.3: is left over",
        "redrive --from prism.scan.3",
        "binding of queue prism.scan.retry.2 to exchange prism.scan.retry by \"prism.scan:1\": is not configured",
        "queue prism.scan.retry.2: is left over",
    ] {
        assert!(told.stdout.contains(part), "{part:?} is not in {}", told.stdout);
    }
}

#[tokio::test]
async fn without_the_management_api_amqp_tells_what_it_can() {
    let vhost = Vhost::new(Node::shared().await).await;
    // At the usual port is nobody, or another broker.
    let setup = Setup::new(&vhost.url());
    assert_eq!(setup.run(&["topology", "declare"]).await.code, Some(0));
    let same = setup.run(&["topology", "diff"]).await;
    assert!(same.code == Some(0) && same.stdout.starts_with("bindings and policies are not compared"), "{same:?}");
    vhost.delete_queue("prism.scan").await;
    vhost.create_queue("prism.scan", json!({ "x-queue-type": "quorum" })).await;
    let told = setup.run(&["topology", "diff"]).await;
    assert!(told.code == Some(1) && told.stdout.contains("queue prism.scan: "), "{told:?}");
    assert!(told.stdout.contains("topology recreate prism.scan"), "{told:?}");
    // A passive relay takes it as it is.
    let passive = Setup::new(&vhost.url()).set("topology.declare", "passive").run(&["topology", "diff"]).await;
    assert_eq!(passive.code, Some(0), "{passive:?}");
}

#[tokio::test]
async fn ladder_partitions_and_archive_can_be_imported_with_policies() {
    let node = Node::shared().await;
    let vhost = Vhost::new(node).await;
    let queues = json!([
        { "name": "prism.scan", "bindings": ["scan.#"], "retry_delays": ["100ms"], "partitions": 2, "ttl": "1h", "max_length": 1000 },
        { "name": "prism.future_me", "bindings": ["body_shape_prediction.#"], "retry_delays": ["100ms"] },
    ]);
    let setup = watched(node, &vhost)
        .set("topology.queues", queues)
        .set("topology.archive", json!({ "max_age": "1d", "max_bytes": "1GiB" }))
        .set("topology.declare", "passive");
    let exported = setup.run(&["topology", "export"]).await;
    let file = node.folder().join(format!("{}.json", vhost.name()));
    std::fs::write(&file, &exported.stdout).unwrap();
    node.ctl(&["import_definitions", &node.inside(&file)]).await;
    eventually("the broker to be as configured", async || {
        let told = setup.run(&["topology", "diff"]).await;
        if told.code == Some(0) { Ok(()) } else { Err(told.stdout) }
    })
    .await;
    // One policy is lost, and of another only one word is another one: what mends them keeps the dead letters.
    vhost.delete_policy("prism.future_me-exchange").await;
    let policies = node.management().list(&format!("policies/{}", vhost.name())).await;
    let mut own = policies.into_iter().find(|policy| policy["name"] == "prism.future_me").unwrap();
    own["definition"]["delivery-limit"] = json!(7);
    let path = format!("policies/{}/prism.future_me", vhost.name());
    node.management().put(&path, own).await;
    let told = eventually("the difference", async || {
        let told = setup.run(&["topology", "diff"]).await;
        let both =
            told.stdout.contains("sets delivery-limit to 7") && told.stdout.contains("exchange prism.future_me: ");
        if both { Ok(told.stdout) } else { Err(told.stdout) }
    })
    .await;
    mend(node, &setup, &told).await;
    eventually("the broker to be mended", async || {
        let told = setup.run(&["topology", "diff"]).await;
        if told.code == Some(0) { Ok(()) } else { Err(told.stdout) }
    })
    .await;
    let relay = setup.start().await;
    let body = r#"{"eventType":"body_shape_prediction.a","payload":{}}"#;
    relay.post(body).await.expect(200);
    for _ in 0..2 {
        vhost.reject("prism.future_me").await;
    }
    assert_eq!(vhost.messages("prism.dead", 1).await[0].text(), body);
}

/// Another property for a queue in use: events come in all the time, and none gets lost.
#[tokio::test]
async fn a_queue_is_replaced_while_events_come_in() {
    let node = Node::shared().await;
    let vhost = Vhost::new(node).await;
    let other = json!({ "name": "other", "bindings": ["scan.#"] });
    let queues = |scan: Value| json!([scan, other]);
    let before = json!({ "name": "prism.scan", "bindings": ["scan.#"], "single_active_consumer": true });
    let after = json!({ "name": "prism.scan", "bindings": ["scan.#"], "retry_delays": ["1s"], "delivery_limit": 7 });
    let relay = Setup::new(&vhost.url()).set("topology.queues", queues(before)).start().await;
    let body = |number: usize| format!(r#"{{"eventType":"scan.a","payload":{{"number":{number}}}}}"#);
    for number in 0..300 {
        relay.post(body(number)).await.expect(200);
    }
    vhost.eventually_depth("prism.scan", 300).await;

    let changed = watched(node, &vhost).set("topology.queues", queues(after));
    let blind = Setup::new(&vhost.url()).run(&["topology", "recreate", "prism.scan"]).await;
    assert!(blind.code == Some(1) && blind.stderr.contains("set broker.management_url"), "{blind:?}");
    let unknown = changed.run(&["topology", "recreate", "mine"]).await;
    assert!(unknown.code == Some(64) && unknown.stderr.contains("no queue of the configuration"), "{unknown:?}");
    let worker = vhost.connect().await;
    let consumer = worker.create_channel().await.unwrap();
    consumer.basic_qos(1, Default::default()).await.unwrap();
    let consuming =
        consumer.basic_consume("prism.scan".into(), "".into(), Default::default(), Default::default()).await;
    let in_use = changed.run(&["topology", "recreate", "prism.scan"]).await;
    assert!(in_use.code == Some(1) && in_use.stderr.contains("1 workers: stop them first"), "{in_use:?}");
    drop(consuming);
    worker.close(200, "done".into()).await.unwrap();
    vhost.eventually_depth("prism.scan", 300).await;

    // Interrupted where it may be, it goes on when it is run again.
    let mut number = 300;
    let back = ("prism.scan.moving".to_owned(), "prism.scan".to_owned(), String::new());
    for pause in [Some(150), Some(400), None] {
        let mut interrupted = changed.launch(&["topology", "recreate", "prism.scan"]);
        match pause.map(Duration::from_millis) {
            Some(pause) => drop(tokio::time::timeout(pause, interrupted.wait()).await),
            None => {
                eventually("the way back", async || match vhost.bindings().await {
                    bindings if bindings.contains(&back) => Ok(()),
                    bindings => Err(format!("{bindings:?}")),
                })
                .await;
            }
        }
        interrupted.signal("KILL");
        interrupted.wait().await;
        for _ in 0..5 {
            relay.post(body(number)).await.expect(200);
            number += 1;
        }
    }
    let mut running = changed.launch(&["topology", "recreate", "prism.scan"]);
    while running.exited().is_none() {
        relay.post(body(number)).await.expect(200);
        number += 1;
    }
    let done = running.wait().await;
    assert!(done.code == Some(0) && done.stdout.starts_with("prism.scan is as configured"), "{done:?}");
    relay.eventually_metric("prism_relay_spool_events", &[], 0.0).await;
    let arguments = &vhost.queue("prism.scan").await.unwrap()["arguments"];
    assert!(
        arguments["x-delivery-limit"] == 7 && arguments["x-dead-letter-exchange"] == "prism.scan.rejected",
        "{arguments}"
    );
    for queue in ["prism.scan", "other"] {
        let depth = vhost.depth(queue).await as usize;
        let messages = vhost.messages(queue, depth).await;
        let numbers: std::collections::BTreeSet<_> =
            messages.iter().map(|message| message.json()["payload"]["number"].as_u64().unwrap()).collect();
        assert_eq!(numbers.len(), number, "of {depth} in {queue}");
        assert!(messages.iter().all(|message| message.routing_key == "scan.a"));
    }
    assert!(vhost.queue("prism.scan.moving").await.is_none() && vhost.exchange("prism.scan.moving").await.is_none());
    vhost.assert_empty("prism.unrouted").await;
}
