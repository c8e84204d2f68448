//! Events that the broker does not take: kept and counted, no obstacle to others, released when the cause is gone.

use std::collections::HashSet;

use serde_json::json;

use crate::harness::samples::{nth, nth_of_scan, of_scan, of_type};
use crate::harness::{Delivery, Node, Relay, Setup, Vhost, Wire, eventually, eventually_equal};

/// An operator's own topology: `prism.events` without an alternate exchange, so that unroutable events are returned,
/// and the two queues. Publishes go to a topic exchange, whose topic permissions RabbitMQ checks. RabbitMQ 4.3 refuses
/// a permission for an exchange that does not exist.
async fn own_topology(vhost: &Vhost) {
    vhost.create_exchange("prism.events", "topic", json!({})).await;
    for (queue, key) in QUEUES {
        vhost.create_queue(queue, json!({"x-queue-type": "quorum"})).await;
        vhost.bind("prism.events", queue, key).await;
    }
}

const QUEUES: [(&str, &str); 2] = [("prism.scan", "scan.#"), ("prism.future_me", "body_shape_prediction.#")];

fn own_setup(url: &str) -> Setup {
    Setup::new(url).set("topology.declare", "off").set("broker.exchange", "prism.events")
}

async fn texts(vhost: &Vhost, queue: &str, count: usize) -> Vec<String> {
    vhost.messages(queue, count).await.iter().map(Delivery::text).collect()
}

#[tokio::test]
async fn an_event_without_a_queue_is_parked_and_released_when_there_is_one() {
    let vhost = Vhost::new(Node::shared().await).await;
    own_topology(&vhost).await;
    let relay = own_setup(&vhost.url()).set("broker.parked_retry", "300ms").start().await;
    let mut expected = Vec::new();
    for number in 0..30 {
        let known = of_scan(number, &format!("scan.n{number}"));
        relay.post(&known).await.expect(200);
        expected.push(known);
        relay.post(of_scan(100 + number, &format!("other.n{number}"))).await.expect(200);
    }
    assert_eq!(texts(&vhost, "prism.scan", 30).await, expected, "the other events are not held up");
    relay.eventually_parked(30).await;
    relay.eventually_nothing_pending().await;
    let spool = relay.spool().await;
    assert_eq!((spool.accepted, spool.confirmed, spool.parked), (60, 30, 30), "{spool:?}");
    let warnings = relay.log_text().matches("parked events that no queue takes").count();
    assert_eq!(warnings, 1, "one line in a minute");
    // Retried and still unroutable: the events stay parked, and the connection stays open.
    let returned = relay.metric("prism_relay_publish_total", &[("outcome", "returned")]).await;
    eventually("another retry of the parked events", async || {
        let now = relay.metric("prism_relay_publish_total", &[("outcome", "returned")]).await;
        if now > returned { Ok(()) } else { Err(now) }
    })
    .await;
    assert_eq!(relay.metric("prism_relay_broker_reconnects_total", &[]).await, 0.0);

    vhost.create_queue("rest", json!({})).await;
    vhost.bind("prism.events", "rest", "other.#").await;
    let released = vhost.messages("rest", 30).await;
    assert!(released.iter().all(|delivery| delivery.routing_key.starts_with("other.")));
    relay.eventually_parked(0).await;
}

/// Bindings that are away for a moment park the first event of a scan. The later ones must not overtake it.
#[tokio::test]
async fn events_of_a_scan_wait_behind_a_parked_one_and_follow_in_order() {
    let vhost = Vhost::new(Node::shared().await).await;
    own_topology(&vhost).await;
    let mut relay = own_setup(&vhost.url()).set("broker.parked_retry", "1h").start().await;
    let mut ids = Vec::new();
    for number in 0..3 {
        ids.push(relay.post(nth(number)).await.id());
    }
    vhost.eventually_depth("prism.scan", 3).await;
    vhost.unbind("prism.events", "prism.scan", "scan.#").await;
    for number in 3..6 {
        ids.push(relay.post(nth(number)).await.id());
    }
    relay.eventually_parked(1).await;
    vhost.bind("prism.events", "prism.scan", "scan.#").await;
    for number in 6..9 {
        ids.push(relay.post(nth(number)).await.id());
    }
    let waiting = async |relay: &Relay| {
        eventually_equal("events that wait", json!(5), async || relay.status().await["spool"]["waiting"].clone()).await;
    };
    waiting(&relay).await;
    // Another scan does not wait.
    relay.post(nth_of_scan(1, 0)).await.expect(200);
    vhost.eventually_depth("prism.scan", 4).await;
    let events = relay.ops_get("/api/events").await.expect(200).json();
    let shown = events["events"].as_array().unwrap().iter().find(|event| event["id"] == json!(ids[8])).unwrap();
    assert_eq!((&shown["status"], &shown["waits_behind"]), (&json!("pending"), &json!(ids[3])), "{shown}");
    let behind = format!("waits behind {}", ids[3]);
    for arguments in [["spool", "list"].as_slice(), &["spool", "show", &ids[4]]] {
        let shown = relay.run(arguments).await.stdout;
        assert!(shown.contains(&behind), "{arguments:?}: {shown}");
    }

    // The order holds across a restart, with a further event of the scan.
    relay.restart().await;
    waiting(&relay).await;
    relay.post(nth(9)).await.expect(200);
    relay.run(&["spool", "retry", &ids[3]]).await;
    // The relay looks for it when it starts, and every broker.parked_retry.
    relay.restart().await;
    relay.eventually_parked(0).await;
    relay.eventually_nothing_pending().await;
    let mut delivered = texts(&vhost, "prism.scan", 11).await;
    delivered.retain(|text| *text != nth_of_scan(1, 0));
    assert_eq!(delivered, (0..10).map(nth).collect::<Vec<_>>());
    assert_eq!(relay.status().await["spool"]["waiting"], 0);
}

#[tokio::test]
async fn the_events_behind_a_parked_one_follow_when_it_is_removed() {
    let vhost = Vhost::new(Node::shared().await).await;
    own_topology(&vhost).await;
    let relay = own_setup(&vhost.url()).set("broker.parked_retry", "1h").start().await;
    let parked = relay.post(of_type("other")).await.id();
    relay.eventually_parked(1).await;
    for number in 1..5 {
        relay.post(nth(number)).await.expect(200);
    }
    eventually_equal("events that wait", json!(4), async || relay.status().await["spool"]["waiting"].clone()).await;
    // Another process removes it, so the relay has to look.
    relay.run(&["spool", "remove", "--yes", &parked]).await;
    assert_eq!(texts(&vhost, "prism.scan", 4).await, (1..5).map(nth).collect::<Vec<_>>());
    relay.post(nth(5)).await.expect(200);
    assert_eq!(texts(&vhost, "prism.scan", 1).await, [nth(5)]);
    relay.eventually_nothing_pending().await;
}

/// A user who may publish to `prism.events` by these keys only (a regular expression). For any other the broker closes
/// the channel with 403, as it does with 406 for a message that is too large. RabbitMQ checks the keys only where the
/// relay publishes to a topic exchange, so without the fanout in front.
async fn user_with_topic_permission(node: &Node, vhost: &Vhost, keys: &str) -> String {
    let user = format!("user{}", uuid::Uuid::now_v7().simple());
    node.create_user(&user, "password").await;
    vhost.permit(&user, ".*", ".*", ".*").await;
    vhost.permit_topics(&user, "prism.events", keys).await;
    user
}

#[tokio::test]
async fn a_message_that_closes_the_channel_is_found_and_parked() {
    let node = Node::shared().await;
    let vhost = Vhost::new(node).await;
    own_topology(&vhost).await;
    let user = user_with_topic_permission(node, &vhost, "^(?!scan\\.poison).*").await;
    let mut wire = Wire::new(vhost.address());
    wire.refuse().await;
    let url = vhost.url_for(&user, "password", wire.address());
    let relay = own_setup(&url).set("broker.parked_retry", "10m").start().await;
    let mut expected = Vec::new();
    for number in 0..40 {
        let body = of_scan(number, &format!("scan.{}{number}", if number % 20 == 7 { "poison" } else { "good" }));
        relay.post(&body).await.expect(200);
        if number % 20 != 7 {
            expected.push(body);
        }
    }
    // The whole backlog at once, with the culprits in the middle of the window.
    wire.accept();
    relay.eventually_parked(2).await;
    relay.eventually_nothing_pending().await;
    let depth = vhost.depth("prism.scan").await as usize;
    let mut seen = HashSet::new();
    let deliveries = vhost.messages("prism.scan", depth).await;
    let first: Vec<_> = deliveries.iter().filter(|d| seen.insert(d.id())).map(Delivery::text).collect();
    assert_eq!(first, expected, "first deliveries in order");
    let reason = relay.eventually_logs("parked events that the broker refuses").await;
    assert!(reason["reason"].as_str().unwrap().contains("access to topic"), "{reason}");
    assert_eq!(relay.metric("prism_relay_publish_total", &[("outcome", "refused")]).await, 2.0);
    // Later events are delivered.
    relay.post(of_scan(50, "scan.after")).await.expect(200);
    assert_eq!(vhost.messages("prism.scan", 1).await[0].routing_key, "scan.after");
}

/// Each refused key costs a channel, once; the connection stays, and what may be published goes.
#[tokio::test]
async fn refused_keys_do_not_hold_up_other_events() {
    let node = Node::shared().await;
    let vhost = Vhost::new(node).await;
    own_topology(&vhost).await;
    let user = user_with_topic_permission(node, &vhost, "^body_shape_prediction\\..*").await;
    let url = vhost.url_for(&user, "password", vhost.address());
    let relay = own_setup(&url).set("broker.parked_retry", "1h").start().await;
    relay.eventually_connected().await;
    for number in 0..40 {
        // Half of them share a key.
        let key = if number % 2 == 0 { "scan.processing.started".to_owned() } else { format!("scan.n{number}") };
        relay.post(of_scan(number, &key)).await.expect(200);
    }
    let prediction = relay.post(of_scan(100, "body_shape_prediction.a")).await.id();
    assert_eq!(vhost.messages("prism.future_me", 1).await[0].id(), prediction);
    relay.eventually_parked(40).await;
    assert_eq!(relay.metric("prism_relay_publish_total", &[("outcome", "refused")]).await, 40.0);
    let reconnects = relay.metric("prism_relay_broker_reconnects_total", &[]).await;
    assert!(reconnects <= 2.0, "{reconnects} connections for 40 refused events");
    let log = relay.log_text();
    assert_eq!(log.matches("parked events that the broker refuses").count(), 1, "one line in a minute: {log}");
    assert!(!log.contains("not delivering"), "a refused message is no failure of the connection: {log}");
    // A later event of a refused key is parked without a try, which would cost its channel.
    relay.post(of_scan(101, "scan.processing.started")).await.expect(200);
    relay.eventually_parked(41).await;
    let entry = relay.run(&["spool", "list", "--parked", "--json"]).await.stdout;
    assert_eq!(entry.matches("access to topic").count(), 41, "{entry}");
}

#[tokio::test]
async fn a_message_that_is_too_large_for_the_broker_is_parked_and_released_when_it_is_not() {
    let node = Node::start().await;
    let vhost = Vhost::new(&node).await;
    // In bytes. The default is 128 MiB in RabbitMQ 3 and 16 MiB in RabbitMQ 4.
    let limit = async |bytes: u32| {
        // RabbitMQ 3 reads the environment, RabbitMQ 4 the persistent term.
        let expression = "application:set_env(rabbit, max_message_size, N), persistent_term:put(max_message_size, N).";
        node.ctl(&["eval", &format!("N = {bytes}, {expression}")]).await;
    };
    limit(2000).await;
    let relay = Setup::new(&vhost.url()).set("broker.parked_retry", "300ms").start().await;
    let large = json!({"eventType": "scan.large", "payload": {"filler": "x".repeat(3000)}}).to_string();
    let id = relay.post(&large).await.id();
    relay.post(of_type("scan.small")).await.expect(200);
    assert_eq!(vhost.messages("prism.scan", 1).await[0].routing_key, "scan.small");
    relay.eventually_parked(1).await;
    let list = relay.run(&["spool", "list", "--parked", "--json"]).await.stdout;
    assert!(list.contains(&id) && list.contains("larger than configured max size"), "{list}");
    limit(16 * 1024 * 1024).await;
    let released = vhost.messages("prism.scan", 1).await.remove(0);
    assert_eq!((released.id(), released.text()), (id, large));
    relay.eventually_parked(0).await;
    assert_eq!(relay.metric("prism_relay_broker_reconnects_total", &[]).await, 0.0);
}

#[tokio::test]
async fn parked_events_that_keep_closing_the_channel_do_not_hold_up_others() {
    let node = Node::shared().await;
    let vhost = Vhost::new(node).await;
    own_topology(&vhost).await;
    let user = user_with_topic_permission(node, &vhost, "^scan\\..*").await;
    let url = vhost.url_for(&user, "password", vhost.address());
    let relay = own_setup(&url).set("broker.parked_retry", "100ms").start().await;
    for number in 0..5 {
        relay.post(of_scan(number, &format!("body_shape_prediction.n{number}"))).await.expect(200);
    }
    relay.eventually_parked(5).await;
    let mut expected = Vec::new();
    for number in 0..300 {
        expected.push(relay.post(of_scan(100 + number, &format!("scan.n{number}"))).await.id());
    }
    let ids: HashSet<_> = {
        relay.eventually_nothing_pending().await;
        let depth = vhost.depth("prism.scan").await as usize;
        vhost.messages("prism.scan", depth).await.iter().map(Delivery::id).collect()
    };
    assert_eq!(ids, expected.into_iter().collect());
    vhost.permit_topics(&user, "prism.events", ".*").await;
    vhost.messages("prism.future_me", 5).await;
    relay.eventually_parked(0).await;
}

#[tokio::test]
async fn missing_permissions_hold_up_everything_and_park_nothing() {
    let node = Node::shared().await;
    let vhost = Vhost::new(node).await;
    let user = format!("user{}", uuid::Uuid::now_v7().simple());
    node.create_user(&user, "password").await;
    vhost.permit(&user, ".*", ".*", ".*").await;
    let relay = Setup::new(&vhost.url_for(&user, "password", vhost.address())).start().await;
    relay.post(of_scan(1, "scan.first")).await.expect(200);
    vhost.messages("prism.scan", 1).await;
    vhost.permit(&user, ".*", "^prism.(unrouted|dead|events|scan|future_me)$", ".*").await;
    // The broker caches the permissions of a connection. The API lists new connections some seconds late.
    eventually("the relay's connection to be closed", async || {
        vhost.close_connections().await;
        let reconnects = relay.metric("prism_relay_broker_reconnects_total", &[]).await;
        if reconnects > 0.0 { Ok(()) } else { Err(reconnects) }
    })
    .await;
    relay.post(of_scan(2, "scan.second")).await.expect(200);
    relay.eventually_logs("access to exchange 'prism.webhooks'").await;
    assert_eq!(relay.spool().await.parked, 0);
    vhost.permit(&user, ".*", ".*", ".*").await;
    assert_eq!(vhost.messages("prism.scan", 1).await[0].routing_key, "scan.second");
}
