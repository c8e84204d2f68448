//! Events that the broker does not take: kept and counted, no obstacle to others, released when the cause is gone.

use std::collections::HashSet;

use serde_json::json;

use crate::harness::samples::of_type;
use crate::harness::{Node, Setup, Vhost, Wire, eventually};

#[tokio::test]
async fn an_event_without_a_queue_is_parked_and_released_when_there_is_one() {
    let vhost = Vhost::new(Node::shared().await).await;
    // An operator's own topology without an alternate exchange, so unroutable events are returned.
    vhost.create_exchange("prism.webhooks", "topic", json!({})).await;
    vhost.create_queue("prism.scan", json!({"x-queue-type": "quorum"})).await;
    vhost.bind("prism.webhooks", "prism.scan", "scan.#").await;
    let setup = Setup::new(&vhost.url()).set("topology.declare", "off").set("broker.parked_retry", "300ms");
    let relay = setup.start().await;
    let mut expected = Vec::new();
    for number in 0..30 {
        let known = of_type(&format!("scan.n{number}"));
        relay.post(&known).await.expect(200);
        expected.push(known);
        relay.post(of_type(&format!("other.n{number}"))).await.expect(200);
    }
    let texts: Vec<_> = vhost.messages("prism.scan", 30).await.iter().map(|delivery| delivery.text()).collect();
    assert_eq!(texts, expected, "the other events are not held up");
    relay.eventually_parked(30).await;
    relay.eventually_nothing_pending().await;
    let spool = relay.spool().await;
    assert_eq!((spool.accepted, spool.confirmed, spool.parked), (60, 30, 30), "{spool:?}");
    // Retried and still unroutable: the events stay parked, and the connection stays open.
    let returned = relay.metric("prism_relay_publish_total", &[("outcome", "returned")]).await;
    eventually("another retry of the parked events", async || {
        let now = relay.metric("prism_relay_publish_total", &[("outcome", "returned")]).await;
        if now > returned { Ok(()) } else { Err(now) }
    })
    .await;
    assert_eq!(relay.metric("prism_relay_broker_reconnects_total", &[]).await, 0.0);

    vhost.create_queue("rest", json!({})).await;
    vhost.bind("prism.webhooks", "rest", "other.#").await;
    let released = vhost.messages("rest", 30).await;
    assert!(released.iter().all(|delivery| delivery.routing_key.starts_with("other.")));
    relay.eventually_parked(0).await;
}

/// A user who may publish to `prism.events` by these keys only (a regular expression). For any other the broker closes
/// the channel with 403, as it does with 406 for a message that is too large. RabbitMQ checks the keys only where the
/// relay publishes to a topic exchange, so without the fanout in front.
async fn user_with_topic_permission(node: &Node, vhost: &Vhost, keys: &str) -> String {
    let user = format!("user{}", uuid::Uuid::now_v7().simple());
    node.create_user(&user, "password").await;
    vhost.permit(&user, ".*", ".*", ".*").await;
    permit_topics(node, vhost, &user, keys).await;
    user
}

async fn permit_topics(node: &Node, vhost: &Vhost, user: &str, keys: &str) {
    // RabbitMQ 4.3 refuses a permission for an exchange that does not exist.
    vhost.create_exchange("prism.events", "topic", json!({"alternate-exchange": "prism.unrouted"})).await;
    let permission = json!({"exchange": "prism.events", "write": keys, "read": ".*"});
    node.management().put(&format!("topic-permissions/{}/{user}", vhost.name()), permission).await;
}

#[tokio::test]
async fn a_message_that_closes_the_channel_is_found_and_parked() {
    let node = Node::shared().await;
    let vhost = Vhost::new(node).await;
    let user = user_with_topic_permission(node, &vhost, "^(?!scan\\.poison).*").await;
    let mut wire = Wire::new(vhost.address());
    wire.refuse().await;
    let url = vhost.url_for(&user, "password", wire.address());
    let relay = Setup::new(&url).set("broker.exchange", "prism.events").set("broker.parked_retry", "10m").start().await;
    let mut expected = Vec::new();
    for number in 0..40 {
        let body = of_type(&format!("scan.{}{number}", if number % 20 == 7 { "poison" } else { "good" }));
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
    let first: Vec<_> = deliveries.iter().filter(|d| seen.insert(d.id())).map(|d| d.text()).collect();
    assert_eq!(first, expected, "first deliveries in order");
    let reason = relay.eventually_logs("the broker refuses this event: parked").await;
    assert!(reason["reason"].as_str().unwrap().contains("access to topic"), "{reason}");
    assert_eq!(relay.metric("prism_relay_publish_total", &[("outcome", "refused")]).await, 2.0);
    // Later events are delivered.
    relay.post(of_type("scan.after")).await.expect(200);
    assert_eq!(vhost.messages("prism.scan", 1).await[0].routing_key, "scan.after");
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
}

#[tokio::test]
async fn parked_events_that_keep_closing_the_channel_do_not_hold_up_others() {
    let node = Node::shared().await;
    let vhost = Vhost::new(node).await;
    let user = user_with_topic_permission(node, &vhost, "^scan\\..*").await;
    let url = vhost.url_for(&user, "password", vhost.address());
    let setup = Setup::new(&url).set("broker.exchange", "prism.events").set("broker.parked_retry", "100ms");
    let relay = setup.start().await;
    for number in 0..5 {
        relay.post(of_type(&format!("body_shape_prediction.n{number}"))).await.expect(200);
    }
    relay.eventually_parked(5).await;
    let mut expected = Vec::new();
    for number in 0..300 {
        expected.push(relay.post(of_type(&format!("scan.n{number}"))).await.id());
    }
    let ids: HashSet<_> = {
        relay.eventually_nothing_pending().await;
        let depth = vhost.depth("prism.scan").await as usize;
        vhost.messages("prism.scan", depth).await.iter().map(|delivery| delivery.id()).collect()
    };
    assert_eq!(ids, expected.into_iter().collect());
    permit_topics(node, &vhost, &user, ".*").await;
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
    relay.post(of_type("scan.first")).await.expect(200);
    vhost.messages("prism.scan", 1).await;
    vhost.permit(&user, ".*", "^prism.(unrouted|dead|events|scan|future_me)$", ".*").await;
    // The broker caches the permissions of a connection. The API lists new connections some seconds late.
    eventually("the relay's connection to be closed", async || {
        vhost.close_connections().await;
        let reconnects = relay.metric("prism_relay_broker_reconnects_total", &[]).await;
        if reconnects > 0.0 { Ok(()) } else { Err(reconnects) }
    })
    .await;
    relay.post(of_type("scan.second")).await.expect(200);
    relay.eventually_logs("access to exchange 'prism.webhooks'").await;
    assert_eq!(relay.spool().await.parked, 0);
    vhost.permit(&user, ".*", ".*", ".*").await;
    assert_eq!(vhost.messages("prism.scan", 1).await[0].routing_key, "scan.second");
}
