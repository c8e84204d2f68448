//! The topology on a real broker: declared, checked, exported and imported, compared and fixed.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::harness::{Delivery, Node, Relay, Setup, Vhost, Wire, eventually};

const EVENT: &str = r#"{"eventType":"scan.a","payload":{}}"#;

/// An event for `prism.scan`.
fn event(number: u32) -> String {
    json!({ "eventType": "scan.a", "payload": { "number": number } }).to_string()
}

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
    relay.eventually_connected().await;
    let exchange = |name: &'static str| {
        let vhost = &vhost;
        async move {
            let found: Value = vhost.exchange(name).await.unwrap_or_else(|| panic!("no exchange {name}"));
            assert_eq!(found["durable"], true, "{name}");
            (found["type"].as_str().unwrap().to_owned(), found["arguments"].clone())
        }
    };
    let topic = |arguments: Value| ("topic".to_owned(), arguments);
    assert_eq!(exchange("prism.webhooks").await, ("fanout".to_owned(), json!({})));
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
        ("prism.webhooks", "prism.events", ""),
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
    let advice = ["the relay is restarted", "redrive --from OLD --to NEW"];
    for part in [["queue prism.scan", "x-delivery-limit", "'20'", "'7'"].as_slice(), &advice].concat() {
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
    // Another relay creates it. AMQP does not show whether the bindings exist yet, so the passive relay has to stay
    // away until then.
    wire.refuse().await;
    wire.cut();
    let active = Relay::start(&vhost).await;
    active.eventually_connected().await;
    wire.accept();
    vhost.messages("prism.scan", 1).await;
}

#[tokio::test]
async fn off_without_an_exchange_keeps_the_event_and_says_why() {
    let vhost = Vhost::new(Node::shared().await).await;
    // An attempt between the creation of exchange and binding may park the event.
    let setup = Setup::new(&vhost.url()).set("topology.declare", "off").set("broker.parked_retry", "1s");
    let relay = setup.start().await;
    relay.post(EVENT).await.expect(200);
    relay.eventually_logs("no exchange 'prism.webhooks'").await;
    assert_eq!(relay.spool().await.parked, 0);
    vhost.create_exchange("prism.webhooks", "topic", json!({})).await;
    vhost.create_queue("q", json!({})).await;
    vhost.bind("prism.webhooks", "q", "#").await;
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

/// An archive and a tail watch; a queue that is not there makes its events unrouted anyway.
#[tokio::test]
async fn a_tap_takes_nothing_away() {
    let vhost = Vhost::new(Node::shared().await).await;
    let setup = Setup::new(&vhost.url()).set("topology.archive", json!({ "max_age": "1d" }));
    // An active relay would declare the queue again.
    let relay = setup.set("broker.watch_interval", "1h").start().await;
    relay.eventually_connected().await;
    // The first look is over, and the next one comes in an hour.
    relay.eventually_watching().await;
    let mut tail = relay.setup().launch(&["tail", "--count", "5"]);
    eventually("the tail to be bound", async || {
        let bindings = vhost.bindings().await;
        let is_bound =
            bindings.iter().any(|(exchange, queue, _)| exchange == "prism.webhooks" && queue.starts_with("amq.gen"));
        if is_bound { Ok(()) } else { Err(format!("{bindings:?} {:?}", tail.stderr())) }
    })
    .await;
    vhost.delete_queue("prism.scan").await;
    let mut ids = BTreeSet::new();
    for number in 0..5 {
        ids.insert(relay.post(event(number)).await.id());
    }
    let unrouted: BTreeSet<_> = vhost.messages("prism.unrouted", 5).await.iter().map(Delivery::id).collect();
    assert_eq!(unrouted, ids);
    assert_eq!(tail.wait().await.code, Some(0));
    let archived = relay.run(&["replay", "--since", "1h", "--dry-run"]).await;
    assert!(archived.stdout.ends_with("5 events of prism.archive would be published to prism.events"), "{archived:?}");
    assert_eq!(relay.spool().await.parked, 0);
}

/// The former version published to `prism.events`, which the archive was bound to like a work queue.
#[tokio::test]
async fn an_installation_without_the_fanout_is_taken_over_and_its_archive_is_no_route_any_more() {
    let node = Node::shared().await;
    let vhost = Vhost::new(node).await;
    let setup = watched(node, &vhost).set("topology.archive", json!({ "max_age": "1d" }));
    let mut relay = setup.set("broker.exchange", "prism.events").start().await;
    relay.post(event(0)).await.expect(200);
    vhost.messages("prism.scan", 1).await;
    let archive = async || -> Vec<(String, String)> {
        let bindings = vhost.bindings().await.into_iter().filter(|(_, queue, _)| queue == "prism.archive");
        bindings.map(|(exchange, _, key)| (exchange, key)).collect()
    };
    let bound = |bindings: &[(&str, &str)]| -> Vec<(String, String)> {
        bindings.iter().map(|(exchange, key)| ((*exchange).to_owned(), (*key).to_owned())).collect()
    };
    let former = [("prism.events", "body_shape_prediction.#"), ("prism.events", "scan.#"), ("prism.unrouted", "")];
    assert_eq!(archive().await, bound(&former));
    relay.reconfigure("broker.exchange", "prism.webhooks");
    let printed = relay.run(&["topology", "diff"]).await;
    let surplus = "binding of queue prism.archive to exchange prism.events by \"scan.#\": is not configured";
    assert!(printed.code == Some(1) && printed.stdout.contains(surplus), "{printed:?}");
    relay.restart().await;
    relay.post(event(1)).await.expect(200);
    vhost.messages("prism.scan", 1).await;
    assert_eq!(archive().await, bound(&[("prism.webhooks", "")]));
    let same = relay.run(&["topology", "diff"]).await;
    assert!(same.code == Some(0) && same.stdout.ends_with("the broker is as configured"), "{same:?}");
    let archived = relay.run(&["replay", "--since", "1h", "--dry-run"]).await;
    assert!(archived.stdout.ends_with("2 events of prism.archive would be published to prism.events"), "{archived:?}");
}

#[tokio::test]
async fn the_topology_can_be_shown_declared_and_exported() {
    let node = Node::shared().await;
    let vhost = Vhost::new(node).await;
    let setup = Setup::new(&vhost.url()).set("topology.declare", "off");
    let shown = setup.run(&["topology", "show"]).await;
    assert!(shown.code == Some(0) && shown.stdout.contains("queue prism.scan  (durable)\n"), "{shown:?}");
    for _ in 0..2 {
        let declared = setup.run(&["topology", "declare"]).await;
        assert!(declared.code == Some(0) && declared.stdout.contains("5 bindings exist as configured"), "{declared:?}");
    }
    assert_eq!(vhost.queue("prism.scan").await.unwrap()["arguments"], work_queue());
    let away = Setup::without_broker().run(&["topology", "declare"]).await;
    assert!(away.code == Some(1) && away.stderr.contains("none of the brokers could be reached"), "{away:?}");

    // Export, and import into an empty virtual host.
    let other = Vhost::new(node).await;
    let exported = Setup::new(&other.url()).run(&["topology", "export"]).await;
    let file = node.folder().join(format!("{}.json", other.name()));
    std::fs::write(&file, &exported.stdout).unwrap();
    node.ctl(&["import_definitions", &node.inside(&file)]).await;
    let queue = other.queue("prism.scan").await.expect("the queue is imported");
    assert_eq!(queue["arguments"], json!({"x-queue-type": "quorum"}));
    eventually("the policy to take effect", async || {
        let queue = other.queue("prism.scan").await.unwrap();
        let strategy = &queue["effective_policy_definition"]["dead-letter-strategy"];
        if strategy == "at-least-once" { Ok(()) } else { Err(queue) }
    })
    .await;
    assert_eq!(other.bindings().await, vhost.bindings().await);
    // A passive relay accepts it, and rejected messages become dead letters.
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

#[tokio::test]
async fn each_difference_is_printed_with_what_fixes_it() {
    let node = Node::shared().await;
    let vhost = Vhost::new(node).await;
    let queues = json!([{ "name": "prism.scan", "bindings": ["scan.#"], "retry_delays": ["1s"], "partitions": 2 }]);
    let setup =
        watched(node, &vhost).set("topology.queues", queues).set("topology.archive", json!({ "max_age": "1d" }));
    let missing = setup.run(&["topology", "diff"]).await;
    assert!(
        missing.code == Some(1) && missing.stdout.contains("then create what is missing:\n    prism-relay --config "),
        "{missing:?}"
    );
    assert_eq!(setup.run(&["topology", "declare"]).await.code, Some(0));
    let same = setup.run(&["topology", "diff"]).await;
    assert!(same.code == Some(0) && same.stdout.ends_with("the broker is as configured"), "{same:?}");
    let checked = setup.run(&["check"]).await;
    let words = match node.version().await < vec![4] {
        true => "bindings and policies              as configured",
        false => {
            "note  queue prism.dead                   RabbitMQ 4 drops a message of this queue after it was returned"
        }
    };
    assert!(checked.code == Some(0) && checked.stdout.contains(words), "{checked:?}");

    // Several mistakes of operators at once.
    vhost.bind("prism.events", "prism.dead", "scan.#").await;
    vhost.set_policy("short", "^prism.dead$", json!({ "message-ttl": 1000 })).await;
    vhost.delete_queue("prism.scan.retry.1").await;
    vhost.create_queue("prism.scan.retry.1", json!({ "x-queue-type": "quorum", "x-message-ttl": 7000 })).await;
    vhost.delete_exchange("prism.unrouted").await;
    vhost.create_exchange("prism.unrouted", "topic", json!({})).await;
    eventually("the policy to take effect", async || {
        let queue = vhost.queue("prism.dead").await.unwrap();
        if queue["policy"] == "short" { Ok(()) } else { Err(queue) }
    })
    .await;
    let printed = setup.run(&["topology", "diff"]).await;
    assert_eq!(printed.code, Some(1), "{printed:?}");
    let encoded = vhost.name().replace('-', "%2D");
    for part in [
        "binding of queue prism.dead to exchange prism.events by \"scan.#\": is not configured\n    curl -fsS ",
        &format!("/api/bindings/{encoded}/e/prism%2Eevents/q/prism%2Edead/scan%2E%2523"),
        "queue prism.dead: the policy short sets message-ttl to 1000, and not configured",
        &format!("rabbitmqctl clear_policy -p {} short", vhost.name()),
        "x-dead-letter-exchange is not set, where \"prism.scan\" is configured; ",
        "x-message-ttl is 7000, where 1000 is configured",
        "    a queue cannot be changed: give prism.scan a new name in topology.queues, and then\n",
        "exchange prism.unrouted: is of type topic, where fanout is configured",
        "binding of queue prism.unrouted to exchange prism.unrouted by \"\": does not exist",
    ] {
        assert!(printed.stdout.contains(part), "{part:?} is not in {}", printed.stdout);
    }
    let checked = setup.run(&["check"]).await;
    assert!(
        checked.code == Some(1) && checked.stdout.contains("the policy short sets message-ttl to 1000"),
        "{checked:?}"
    );

    // An empty queue can be deleted in place of a new name.
    vhost.delete_queue("prism.scan.retry.1").await;
    fix(node, &setup, &printed.stdout).await;
    // The API shows changed policies some seconds later.
    eventually("the broker to be fixed", async || {
        let printed = setup.run(&["topology", "diff"]).await;
        if printed.code == Some(0) { Ok(()) } else { Err(printed.stdout) }
    })
    .await;
}

/// Runs the printed commands, with our own binary and the node's rabbitmqctl, and without asking for the password.
async fn fix(node: &Node, setup: &Setup, printed: &str) {
    for command in printed.lines().filter_map(|line| line.strip_prefix("    ")) {
        let words: Vec<_> = command.split(' ').map(|word| word.trim_matches('\'')).collect();
        match words[0] {
            "rabbitmqctl" => drop(node.ctl(&words[1..]).await),
            "curl" => {
                let path = words.last().unwrap().split_once("/api/").unwrap().1;
                node.management().delete(path).await;
            }
            "prism-relay" => {
                let own = words.iter().position(|word| matches!(*word, "topology" | "redrive")).unwrap();
                let done = setup.run(&words[own..]).await;
                assert_eq!(done.code, Some(0), "{done:?}");
            }
            // A step for the operator.
            _ => {}
        }
    }
}

#[tokio::test]
async fn without_the_management_api_existence_and_arguments_are_compared() {
    let vhost = Vhost::new(Node::shared().await).await;
    // No process, or another broker, answers at the usual port.
    let setup = Setup::new(&vhost.url());
    assert_eq!(setup.run(&["topology", "declare"]).await.code, Some(0));
    let same = setup.run(&["topology", "diff"]).await;
    assert!(same.code == Some(0) && same.stdout.starts_with("bindings and policies are not compared"), "{same:?}");
    vhost.delete_queue("prism.scan").await;
    vhost.create_queue("prism.scan", json!({ "x-queue-type": "quorum" })).await;
    let printed = setup.run(&["topology", "diff"]).await;
    assert!(printed.code == Some(1) && printed.stdout.contains("queue prism.scan: "), "{printed:?}");
    assert!(printed.stdout.contains("give prism.scan a new name"), "{printed:?}");
    // A passive relay accepts the arguments that it finds.
    let passive = Setup::new(&vhost.url()).set("topology.declare", "passive").run(&["topology", "diff"]).await;
    assert_eq!(passive.code, Some(0), "{passive:?}");
}

#[tokio::test]
async fn ladder_partitions_and_archive_can_be_imported_with_policies() {
    let node = Node::shared().await;
    let vhost = Vhost::new(node).await;
    let queues = json!([
        {
            "name": "prism.scan", "bindings": ["scan.#"], "retry_delays": ["100ms"], "partitions": 2, "ttl": "1h",
            "max_length": 1000,
        },
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
        let printed = setup.run(&["topology", "diff"]).await;
        if printed.code == Some(0) { Ok(()) } else { Err(printed.stdout) }
    })
    .await;
    // One policy is deleted, and one key of another is changed. The fix of both keeps the dead letters.
    vhost.delete_policy("prism.future_me-exchange").await;
    let policies = node.management().list(&format!("policies/{}", vhost.name())).await;
    let mut own = policies.into_iter().find(|policy| policy["name"] == "prism.future_me").unwrap();
    own["definition"]["delivery-limit"] = json!(7);
    let path = format!("policies/{}/prism.future_me", vhost.name());
    node.management().put(&path, own).await;
    let printed = eventually("the difference", async || {
        let printed = setup.run(&["topology", "diff"]).await;
        let both = printed.stdout.contains("sets delivery-limit to 7")
            && printed.stdout.contains("exchange prism.future_me: ");
        if both { Ok(printed.stdout) } else { Err(printed.stdout) }
    })
    .await;
    fix(node, &setup, &printed).await;
    eventually("the broker to be fixed", async || {
        let printed = setup.run(&["topology", "diff"]).await;
        if printed.code == Some(0) { Ok(()) } else { Err(printed.stdout) }
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

/// Walks the steps that `topology diff` prints for a queue whose properties change, while events come in.
#[tokio::test]
async fn a_queue_gets_a_new_name_and_nothing_is_lost() {
    let node = Node::shared().await;
    let vhost = Vhost::new(node).await;
    let queue = |name: &str, limit: u64| json!([{ "name": name, "bindings": ["scan.#"], "delivery_limit": limit }]);
    let mut relay = watched(node, &vhost).set("topology.queues", queue("prism.scan", 20)).start().await;
    let numbers = async |relay: &Relay, numbers: std::ops::Range<u64>| {
        for number in numbers {
            let event = json!({ "eventType": "scan.a", "payload": { "number": number } });
            relay.post(event.to_string()).await.expect(200);
        }
    };
    numbers(&relay, 0..20).await;
    vhost.eventually_depth("prism.scan", 20).await;
    let changed = watched(node, &vhost).set("topology.queues", queue("prism.scan", 7)).run(&["topology", "diff"]).await;
    assert_eq!(changed.code, Some(1), "{changed:?}");
    let move_them = "redrive --from prism.scan --to NEW";
    for part in [
        "x-delivery-limit is 20, where 7 is configured",
        "give prism.scan a new name",
        "topology declare; then restart the relay, which keeps the old configuration until then\n",
        move_them,
    ] {
        assert!(changed.stdout.contains(part), "{part:?} is not in {}", changed.stdout);
    }

    // Step 1: the new name.
    relay.reconfigure("topology.queues", queue("prism.scan.v2", 7));
    relay.restart().await;
    numbers(&relay, 20..25).await;
    vhost.eventually_depth("prism.scan.v2", 5).await;
    vhost.eventually_depth("prism.scan", 25).await;
    // Step 2: unbind the old queue.
    let bound = relay.run(&["topology", "diff"]).await;
    let advice = "advice: binding of queue prism.scan to exchange prism.events by \"scan.#\": is not configured";
    assert!(bound.code == Some(0) && bound.stdout.contains(advice), "{bound:?}");
    fix(node, relay.setup(), &bound.stdout).await;
    let unbound = relay.run(&["topology", "diff"]).await;
    assert!(unbound.code == Some(0) && !unbound.stdout.contains(advice), "{unbound:?}");
    numbers(&relay, 25..30).await;
    vhost.eventually_depth("prism.scan.v2", 10).await;
    // Step 4: move what is left.
    let moved = relay.run(&["redrive", "--from", "prism.scan", "--to", "prism.scan.v2"]).await;
    assert!(moved.code == Some(0) && moved.stdout.contains("25 moved from prism.scan to prism.scan.v2"), "{moved:?}");
    vhost.assert_empty("prism.scan").await;
    let messages = vhost.messages("prism.scan.v2", 35).await;
    let number = |message: &Delivery| message.json()["payload"]["number"].as_u64().unwrap();
    let seen: BTreeSet<_> = messages.iter().map(number).collect();
    assert_eq!(seen, (0..30).collect());
    vhost.assert_empty("prism.unrouted").await;
}

/// Walks the steps that `topology diff` prints for `prism.unrouted` and `prism.dead`, while messages come in.
#[tokio::test]
async fn a_queue_with_a_fixed_name_is_replaced_and_nothing_is_lost() {
    let node = Node::shared().await;
    let vhost = Vhost::new(node).await;
    let active = watched(node, &vhost);
    assert_eq!(active.run(&["topology", "declare"]).await.code, Some(0));
    // The first step.
    let setup = watched(node, &vhost).set("topology.declare", "passive").set("broker.parked_retry", "1s");
    let relay = setup.start().await;
    vhost.create_queue("other", json!({})).await;
    for (queue, key) in [("prism.unrouted", ""), ("prism.dead", "#")] {
        vhost.delete_queue(queue).await;
        vhost.create_queue(queue, json!({ "x-queue-type": "quorum", "x-max-length": 1000 })).await;
        vhost.bind(queue, queue, key).await;
        vhost.publish(queue, "scan.a", "earlier").await;
        let printed = active.run(&["topology", "diff"]).await;
        let is_step = |line: &&str| line.starts_with("    ") && line[4..].starts_with(|c: char| c.is_ascii_digit());
        let steps: Vec<_> = printed.stdout.lines().filter(is_step).collect();
        assert!(printed.code == Some(1) && steps.len() == 6, "{printed:?}");
        assert!(steps[0].contains("or restart it with \"passive\""), "{printed:?}");
        for (index, step) in steps.into_iter().skip(1).enumerate() {
            let command = step.split_once(": ").expect("a step has a command").1;
            let command = command.split_once("; then ").map_or(command, |(command, _)| command);
            fix(node, &active, &format!("    {}", command.replace("OTHER", "other"))).await;
            if index == 0 {
                // A message that has no other way than this queue.
                match queue {
                    "prism.unrouted" => {
                        relay.post(r#"{"eventType":"unknown","payload":{}}"#).await.expect(200);
                        relay.eventually_parked(1).await;
                    }
                    _ => {
                        relay.post(EVENT).await.expect(200);
                        vhost.reject("prism.scan").await;
                    }
                }
            }
        }
        assert_eq!(active.run(&["topology", "diff"]).await.code, Some(0));
        assert_eq!(vhost.messages("other", 1).await[0].text(), "earlier");
    }
    vhost.messages("prism.unrouted", 1).await;
    // RabbitMQ dead-letters the message again after at most three minutes. Until then the work queue holds it.
    eventually("the message to be held", async || {
        let messages = vhost.queue("prism.scan").await.unwrap()["messages"].clone();
        if messages == 1 { Ok(()) } else { Err(messages) }
    })
    .await;
}

#[tokio::test]
async fn a_refusal_is_printed_without_advice_to_rename_the_queue() {
    let node = Node::shared().await;
    let vhost = Vhost::new(node).await;
    node.ctl(&["set_vhost_limits", "-p", vhost.name(), r#"{"max-queues":0}"#]).await;
    let full = Setup::new(&vhost.url()).run(&["topology", "declare"]).await;
    assert!(full.code == Some(1) && full.stderr.contains("the broker refuses it"), "{full:?}");
    assert!(!full.stderr.contains("new name"), "{full:?}");
    node.ctl(&["clear_vhost_limits", "-p", vhost.name()]).await;
    assert_eq!(Setup::new(&vhost.url()).run(&["topology", "declare"]).await.code, Some(0));

    // Without the management API, for a user who may not declare.
    let user = format!("user{}", uuid::Uuid::now_v7().simple());
    node.create_user(&user, "password").await;
    vhost.permit(&user, "^$", ".*", ".*").await;
    let setup = Setup::new(&vhost.url_for(&user, "password", vhost.address()));
    let refused = setup.run(&["topology", "diff"]).await;
    assert!(refused.code == Some(1) && refused.stderr.contains("the broker refuses it: ACCESS_REFUSED"), "{refused:?}");
    assert!(!refused.stdout.contains("cannot be changed") && !refused.stdout.contains("differences"), "{refused:?}");
}

/// A message that was moved straight into a queue still has the routing key of its event.
#[tokio::test]
async fn a_moved_message_finds_its_way_back_from_the_dead_letters() {
    let node = Node::shared().await;
    let vhost = Vhost::new(node).await;
    let relay = Relay::start(&vhost).await;
    let id = relay.post(EVENT).await.id();
    vhost.eventually_depth("prism.scan", 1).await;
    vhost.create_queue("old", json!({})).await;
    for (from, to) in [("prism.scan", "old"), ("old", "prism.scan")] {
        let moved = relay.run(&["redrive", "--from", from, "--to", to]).await;
        assert!(moved.code == Some(0) && moved.stdout.contains("1 moved"), "{moved:?}");
    }
    vhost.reject("prism.scan").await;
    vhost.eventually_depth("prism.dead", 1).await;
    let redriven = relay.run(&["redrive"]).await;
    assert!(redriven.code == Some(0) && redriven.stdout.contains("1 moved"), "{redriven:?}");
    let message = vhost.messages("prism.scan", 1).await.remove(0);
    assert_eq!((message.id(), message.routing_key.as_str()), (id, "scan.a"));
    assert!(!message.headers.contains_key("prism-original-key"));
}

/// A setup that looks at the broker as often as it may.
fn watching(node: &Node, vhost: &Vhost) -> Setup {
    watched(node, vhost).set("broker.watch_interval", "1s")
}

#[tokio::test]
async fn what_is_deleted_under_a_running_relay_is_declared_again_and_named() {
    let node = Node::shared().await;
    let vhost = Vhost::new(node).await;
    let relay = watching(node, &vhost).start().await;
    relay.post(event(0)).await.expect(200);
    vhost.messages("prism.scan", 1).await;
    let bound = vhost.bindings().await;
    let declared = |text: &str| {
        let lines =
            relay.logs().into_iter().filter(|line| line["message"].as_str().unwrap_or("").starts_with("declared"));
        lines.filter(|line| line["declared"].as_str().unwrap().contains(text)).count()
    };
    let eventually_bound = async |what: &str| {
        eventually(&format!("{what} to be back"), async || {
            let bindings = vhost.bindings().await;
            if bindings == bound && declared(what) > 0 { Ok(()) } else { Err(format!("{bindings:?}")) }
        })
        .await;
    };
    vhost.delete_queue("prism.scan").await;
    eventually_bound("queue prism.scan").await;
    let path = format!("bindings/{}/e/prism%2Eevents/q/prism%2Escan/scan%2E%2523", vhost.name());
    assert!(node.management().delete(&path).await);
    eventually_bound("binding of queue prism.scan to exchange prism.events by \"scan.#\"").await;
    vhost.delete_exchange("prism.unrouted").await;
    eventually_bound("exchange prism.unrouted").await;
    relay.post(event(1)).await.expect(200);
    assert_eq!(vhost.messages("prism.scan", 1).await[0].text(), event(1));
    assert!(relay.metric("prism_relay_topology_declared_again_total", &[]).await >= 3.0);
    assert_eq!(relay.metric("prism_relay_topology_missing", &[]).await, 0.0);
    assert_eq!(relay.metric("prism_relay_broker_reconnects_total", &[]).await, 0.0, "deliveries are not disturbed");
}

/// Without the exchange of the work queues every event is returned. That leads to a look at once.
#[tokio::test]
async fn events_that_find_no_exchange_are_delivered_as_soon_as_it_is_declared_again() {
    let vhost = Vhost::new(Node::shared().await).await;
    let setup = Setup::new(&vhost.url()).set("broker.watch_interval", "1h").set("broker.parked_retry", "1s");
    let relay = setup.start().await;
    relay.post(event(0)).await.expect(200);
    vhost.messages("prism.scan", 1).await;
    // RabbitMQ 4.3 can close the connection with an internal error if an exchange is deleted during a look.
    relay.eventually_watching().await;
    vhost.delete_exchange("prism.events").await;
    for number in 1..5 {
        relay.post(event(number)).await.expect(200);
    }
    let mut texts: Vec<_> = vhost.messages("prism.scan", 4).await.iter().map(Delivery::text).collect();
    texts.sort();
    assert_eq!(texts, (1..5).map(event).collect::<Vec<_>>());
    relay.eventually_parked(0).await;
    let reconnects = relay.metric("prism_relay_broker_reconnects_total", &[]).await;
    assert_eq!(reconnects, 0.0, "{}", relay.log_text());
}

#[tokio::test]
async fn a_passive_relay_reports_what_is_deleted_and_creates_nothing() {
    let node = Node::shared().await;
    let vhost = Vhost::new(node).await;
    let setup = watching(node, &vhost).set("topology.declare", "passive");
    assert_eq!(setup.run(&["topology", "declare"]).await.code, Some(0));
    let relay = setup.start().await;
    let eventually_missing = async |expected: Value| {
        eventually("the report", async || {
            let watch = relay.status().await["watch"].clone();
            let metric = relay.metric("prism_relay_topology_missing", &[]).await;
            let count = expected.as_array().unwrap().len() as f64;
            let is_right = watch["looked_at"].is_string() && watch["missing"] == expected && metric == count;
            if is_right { Ok(()) } else { Err(format!("{metric} {watch}")) }
        })
        .await;
    };
    eventually_missing(json!([])).await;
    let binding = "binding of queue prism.scan to exchange prism.events by \"scan.#\"";
    let path = format!("bindings/{}/e/prism%2Eevents/q/prism%2Escan/scan%2E%2523", vhost.name());
    assert!(node.management().delete(&path).await);
    eventually_missing(json!([binding])).await;
    vhost.delete_queue("prism.scan").await;
    eventually_missing(json!(["queue prism.scan", binding])).await;
    let line = relay.eventually_logs("\"missing\":\"queue prism.scan; ").await;
    assert!(line["message"].as_str().unwrap().contains("prism-relay topology declare"), "{line}");
    relay.post(event(0)).await.expect(200);
    assert_eq!(vhost.messages("prism.unrouted", 1).await[0].text(), event(0));
    assert!(vhost.queue("prism.scan").await.is_none());
    assert_eq!(relay.run(&["topology", "declare"]).await.code, Some(0));
    eventually_missing(json!([])).await;
    relay.eventually_logs("nothing is missing on the broker any more").await;
}

#[tokio::test]
async fn messages_and_consumers_of_each_queue_are_counted_over_amqp() {
    let vhost = Vhost::new(Node::shared().await).await;
    let relay = Setup::new(&vhost.url()).set("broker.watch_interval", "1s").start().await;
    for number in 0..3 {
        relay.post(event(number)).await.expect(200);
    }
    vhost.eventually_depth("prism.scan", 3).await;
    let connection = vhost.connect().await;
    let channel = connection.create_channel().await.unwrap();
    let worker = channel.basic_consume("prism.future_me".into(), "".into(), Default::default(), Default::default());
    let _worker = worker.await.unwrap();
    let expected = [
        ("prism.unrouted", "unrouted", 0, 0),
        ("prism.dead", "dead", 0, 0),
        ("prism.scan", "work", 3, 0),
        ("prism.future_me", "work", 0, 1),
    ];
    let queues = expected.map(|(name, role, messages, consumers)| {
        json!({ "name": name, "role": role, "messages": messages, "consumers": consumers, "trouble": null })
    });
    eventually("the counts", async || {
        let found = relay.status().await["watch"]["queues"].clone();
        if found == json!(queues) { Ok(()) } else { Err(found) }
    })
    .await;
    for (queue, _, messages, consumers) in expected {
        let metric = async |name: &str| relay.metric(name, &[("queue", queue)]).await;
        assert_eq!(metric("prism_relay_queue_messages").await, f64::from(messages), "{queue}");
        assert_eq!(metric("prism_relay_queue_consumers").await, f64::from(consumers), "{queue}");
    }
}

/// RabbitMQ closes the connection over a channel too many.
#[tokio::test]
async fn a_user_who_may_open_one_channel_only_gets_deliveries_and_no_watch_until_it_may_open_two() {
    let node = Node::shared().await;
    let vhost = Vhost::new(node).await;
    let user = format!("user{}", uuid::Uuid::now_v7().simple());
    node.create_user(&user, "password").await;
    vhost.permit(&user, ".*", ".*", ".*").await;
    node.ctl(&["set_user_limits", &user, r#"{"max-channels":1}"#]).await;
    let setup = Setup::new(&vhost.url_for(&user, "password", vhost.address()));
    let relay = setup.set("broker.watch_interval", "1s").start().await;
    relay.eventually_logs("queues and bindings are not watched").await;
    for number in 0..3 {
        relay.post(event(number)).await.expect(200);
    }
    vhost.messages("prism.scan", 3).await;
    let status = relay.status().await;
    assert!(status["watch"]["off"].as_str().unwrap().contains("number of channels"), "{status}");
    node.ctl(&["clear_user_limits", &user, "max-channels"]).await;
    relay.eventually_logs("queues and bindings are watched again").await;
    vhost.delete_queue("prism.scan").await;
    relay.eventually_logs("declared again what was missing on the broker").await;
    let status = relay.status().await;
    assert!(status["watch"]["off"].is_null(), "{status}");
    assert_eq!(status["broker"]["connects"], 1, "neither the connection that was refused nor the watch's own counts");
}
