//! Events that the broker does not take: kept, counted, in nobody's way, and released when the cause is gone.

use serde_json::json;

use crate::harness::{Node, Setup, Vhost, eventually};

fn event(event_type: &str, filler: usize) -> String {
    json!({"eventType": event_type, "payload": {"scanId": "s", "filler": "x".repeat(filler)}}).to_string()
}

#[tokio::test]
async fn an_event_without_a_queue_is_parked_and_released_when_there_is_one() {
    let vhost = Vhost::new(Node::shared().await).await;
    // An operator's own topology: no alternate exchange, so what is unknown is returned.
    vhost.create_exchange("prism.events", "topic", json!({})).await;
    vhost.create_queue("prism.scan", json!({"x-queue-type": "quorum"})).await;
    vhost.bind("prism.events", "prism.scan", "scan.#").await;
    let setup = Setup::new(&vhost.url()).set("topology.declare", "off").set("broker.parked_retry", "300ms");
    let relay = setup.start().await;
    let mut expected = Vec::new();
    for number in 0..30 {
        let known = event(&format!("scan.n{number}"), 0);
        relay.post(&known).await.expect(200);
        expected.push(known);
        relay.post(event(&format!("other.n{number}"), 0)).await.expect(200);
    }
    let texts: Vec<_> = vhost.messages("prism.scan", 30).await.iter().map(|delivery| delivery.text()).collect();
    assert_eq!(texts, expected, "the others are not held up");
    relay.eventually_metric("prism_relay_spool_parked_events", &[], 30.0).await;
    relay.eventually_metric("prism_relay_spool_events", &[], 0.0).await;
    let spool = relay.status().await["spool"].clone();
    assert_eq!(
        (spool["accepted"].as_u64(), spool["confirmed"].as_u64(), spool["parked"].as_u64()),
        (Some(60), Some(30), Some(30))
    );
    // Tried again, and still unroutable: they stay parked, and nothing else is disturbed.
    let returned = relay.metric("prism_relay_publish_total", &[("outcome", "returned")]).await;
    eventually("another try", async || {
        let now = relay.metric("prism_relay_publish_total", &[("outcome", "returned")]).await;
        if now > returned { Ok(()) } else { Err(now) }
    })
    .await;
    assert_eq!(relay.metric("prism_relay_broker_reconnects_total", &[]).await, 0.0);

    vhost.create_queue("rest", json!({})).await;
    vhost.bind("prism.events", "rest", "other.#").await;
    let released = vhost.messages("rest", 30).await;
    assert!(released.iter().all(|delivery| delivery.routing_key.starts_with("other.")));
    relay.eventually_metric("prism_relay_spool_parked_events", &[], 0.0).await;
}

#[tokio::test]
async fn a_message_that_closes_the_channel_is_found_and_parked() {
    let node = Node::shared().await;
    let vhost = Vhost::new(node).await;
    // A topic permission: this user may publish everything but one key. The broker closes the channel for it (403).
    let user = format!("user{}", uuid::Uuid::now_v7().simple());
    node.create_user(&user, "password").await;
    vhost.permit(&user, ".*", ".*", ".*").await;
    let permission = json!({"exchange": "prism.events", "write": "^(?!scan\\.poison).*", "read": ".*"});
    let path = format!("topic-permissions/{}/{user}", vhost.name());
    node.management().put(&path, permission).await;
    let mut wire = crate::harness::Wire::new(vhost.address());
    wire.refuse().await;
    let url = vhost.url_for(&user, "password", wire.address());
    let relay = Setup::new(&url).set("broker.parked_retry", "10m").start().await;
    let mut expected = Vec::new();
    for number in 0..40 {
        let body = event(&format!("scan.{}{number}", if number % 20 == 7 { "poison" } else { "good" }), 0);
        relay.post(&body).await.expect(200);
        if number % 20 != 7 {
            expected.push(body);
        }
    }
    // The whole backlog at once, the culprits in the middle of the window.
    wire.accept();
    relay.eventually_metric("prism_relay_spool_parked_events", &[], 2.0).await;
    relay.eventually_metric("prism_relay_spool_events", &[], 0.0).await;
    let depth = vhost.depth("prism.scan").await as usize;
    let mut seen = std::collections::HashSet::new();
    let deliveries = vhost.messages("prism.scan", depth).await;
    let first: Vec<_> = deliveries.iter().filter(|d| seen.insert(d.id())).map(|d| d.text()).collect();
    assert_eq!(first, expected, "first deliveries in order");
    let reason = relay.eventually_logs("the broker refuses this event: parked").await;
    assert!(reason["reason"].as_str().unwrap().contains("access to topic"), "{reason}");
    // And life goes on.
    relay.post(event("scan.after", 0)).await.expect(200);
    assert_eq!(vhost.messages("prism.scan", 1).await[0].routing_key, "scan.after");
}

#[tokio::test]
async fn missing_permissions_hold_up_everything_and_park_nothing() {
    let node = Node::shared().await;
    let vhost = Vhost::new(node).await;
    let user = format!("user{}", uuid::Uuid::now_v7().simple());
    node.create_user(&user, "password").await;
    vhost.permit(&user, ".*", ".*", ".*").await;
    let relay = Setup::new(&vhost.url_for(&user, "password", vhost.address())).start().await;
    relay.post(event("scan.first", 0)).await.expect(200);
    vhost.messages("prism.scan", 1).await;
    vhost.permit(&user, ".*", "^prism.(unrouted|dead|scan|future_me)$", ".*").await;
    // The broker remembers for a while what a connection may do.
    eventually("the connection to be listed and closed", async || match vhost.close_connections().await {
        0 => Err("none listed yet"),
        _ => Ok(()),
    })
    .await;
    relay.post(event("scan.second", 0)).await.expect(200);
    relay.eventually_logs("access to exchange 'prism.events'").await;
    assert_eq!(relay.status().await["spool"]["parked"], 0);
    vhost.permit(&user, ".*", ".*", ".*").await;
    assert_eq!(vhost.messages("prism.scan", 1).await[0].routing_key, "scan.second");
}
