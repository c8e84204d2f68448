//! Promises 1, 2, 3, 5 and 6: every event answered 200 is delivered, in order, whatever crashes, and not more often
//! than necessary.

use std::collections::{BTreeMap, HashSet};

use serde_json::json;

use crate::harness::{Node, Relay, Setup, Vhost, Wire, eventually};

fn scan(subject: u32, number: u32) -> String {
    json!({"eventType": "scan.processing.started", "payload": {"scanId": subject.to_string(), "number": number}})
        .to_string()
}

#[tokio::test]
async fn a_broker_that_is_away_at_the_start_changes_nothing_for_prism() {
    let vhost = Vhost::new(Node::shared().await).await;
    let mut wire = Wire::new(vhost.address());
    wire.refuse().await;
    let relay = Relay::start_through(&vhost, &wire).await;
    let mut ids = Vec::new();
    for number in 0..20 {
        ids.push(relay.post(scan(1, number)).await.id());
    }
    assert_eq!(relay.ops_get("/readyz").await.status, 200, "a dead broker does not make the relay unready");
    let status = relay.status().await;
    assert_eq!((status["spool"]["pending"].as_u64(), status["broker"]["connected"].as_bool()), (Some(20), Some(false)));
    wire.accept();
    let delivered: Vec<_> = vhost.messages("prism.scan", 20).await.iter().map(|delivery| delivery.id()).collect();
    assert_eq!(delivered, ids, "in the order of acceptance, under the ids that were answered");
    relay.eventually_nothing_pending().await;
}

#[tokio::test]
async fn an_event_answered_200_survives_kill_9_and_is_published_once() {
    let vhost = Vhost::new(Node::shared().await).await;
    let mut wire = Wire::new(vhost.address());
    wire.refuse().await;
    let mut relay = Relay::start_through(&vhost, &wire).await;
    let id = relay.post(scan(1, 1)).await.id();
    relay.kill9().await;
    wire.accept();
    relay.start_again().await;
    let again = relay.post(scan(1, 1)).await.expect(200).json();
    assert_eq!(again, json!({"ok": true, "id": id, "duplicate": true}), "recognised across the crash");
    assert_eq!(vhost.messages("prism.scan", 1).await[0].id(), id);
    relay.eventually_nothing_pending().await;
    // The event is delivered and deleted, and still recognised after another crash.
    relay.kill9().await;
    relay.start_again().await;
    assert_eq!(relay.post(scan(1, 1)).await.expect(200).json()["id"], json!(id));
    relay.post(scan(1, 2)).await.expect(200);
    assert_eq!(vhost.messages("prism.scan", 1).await[0].text(), scan(1, 2));
}

#[tokio::test]
async fn a_publish_without_its_confirm_is_repeated_under_the_same_id() {
    let vhost = Vhost::new(Node::shared().await).await;
    let wire = Wire::new(vhost.address());
    let mut relay = Relay::start_through(&vhost, &wire).await;
    relay.post(scan(1, 0)).await.expect(200);
    vhost.messages("prism.scan", 1).await;
    relay.eventually_nothing_pending().await;
    // The broker gets the event, but the relay crashes before the confirm arrives.
    wire.stall_answers();
    let id = relay.post(scan(1, 1)).await.id();
    let first = vhost.messages("prism.scan", 1).await.remove(0);
    relay.kill9().await;
    wire.cut();
    wire.flow();
    relay.start_again().await;
    let second = vhost.messages("prism.scan", 1).await.remove(0);
    assert_eq!((first.id(), second.id()), (id.clone(), id));
    assert_eq!(first.body, second.body);
}

#[tokio::test]
async fn a_confirm_that_does_not_come_leads_to_a_new_connection() {
    let vhost = Vhost::new(Node::shared().await).await;
    let wire = Wire::new(vhost.address());
    let setup = Setup::new(&vhost.url_through(&wire)).set("broker.heartbeat", "5s").set("broker.confirm_timeout", "5s");
    let relay = setup.start().await;
    relay.post(scan(1, 0)).await.expect(200);
    vhost.messages("prism.scan", 1).await;
    relay.eventually_nothing_pending().await;
    wire.stall();
    let id = relay.post(scan(1, 1)).await.id();
    relay.eventually_logs("not delivering").await;
    wire.flow();
    let delivered = vhost.messages("prism.scan", 1).await.remove(0);
    assert_eq!(delivered.id(), id);
    relay.eventually_nothing_pending().await;
    assert!(relay.metric("prism_relay_broker_reconnects_total", &[]).await >= 1.0);
}

#[tokio::test]
async fn order_per_subject_holds_while_connections_are_cut() {
    const SUBJECTS: u32 = 200;
    const EVENTS: u32 = 10;
    let vhost = Vhost::new(Node::shared().await).await;
    let wire = Wire::new(vhost.address());
    let relay = Setup::new(&vhost.url_through(&wire)).set("broker.window", 50).start().await;
    let senders: Vec<_> = (0..SUBJECTS)
        .map(|subject| {
            let sender = relay.sender();
            tokio::spawn(async move {
                for number in 0..EVENTS {
                    sender.post(scan(subject, number)).await.unwrap().expect(200);
                }
            })
        })
        .collect();
    for _ in 0..5 {
        let before = relay.metric("prism_relay_publish_total", &[("outcome", "confirmed")]).await;
        eventually("some more confirms", async || {
            let now = relay.metric("prism_relay_publish_total", &[("outcome", "confirmed")]).await;
            if now > before || now >= f64::from(SUBJECTS * EVENTS) { Ok(()) } else { Err(now) }
        })
        .await;
        wire.cut();
    }
    for sender in senders {
        sender.await.unwrap();
    }
    relay.eventually_nothing_pending().await;
    let total = vhost.depth("prism.scan").await as usize;
    assert!(total >= (SUBJECTS * EVENTS) as usize, "{total}");
    let mut seen = HashSet::new();
    let mut next: BTreeMap<String, u64> = BTreeMap::new();
    for delivery in vhost.messages("prism.scan", total).await {
        if seen.insert(delivery.id()) {
            let number = delivery.json()["payload"]["number"].as_u64().unwrap();
            let expected = next.entry(delivery.header("prism-subject").to_owned()).or_default();
            assert_eq!(number, *expected, "first deliveries of {} in order", delivery.header("prism-subject"));
            *expected += 1;
        }
    }
    assert!(next.len() == SUBJECTS as usize && next.values().all(|count| *count == u64::from(EVENTS)), "{next:?}");
}

#[tokio::test]
async fn sigterm_drains_requests_and_publishes_and_ends_with_0() {
    let vhost = Vhost::new(Node::shared().await).await;
    let mut relay = Relay::start(&vhost).await;
    relay.post(scan(0, 0)).await.expect(200);
    let senders: Vec<_> = (1..=8)
        .map(|subject| {
            let sender = relay.sender();
            tokio::spawn(async move {
                let mut answered = 0;
                // Until the relay refuses.
                while let Ok(answer) = sender.post(scan(subject, answered)).await {
                    if answer.status != 200 {
                        break;
                    }
                    answered += 1;
                }
                answered
            })
        })
        .collect();
    eventually("traffic", async || {
        let accepted = relay.metric("prism_relay_webhooks_total", &[("outcome", "accepted")]).await;
        if accepted > 100.0 { Ok(()) } else { Err(accepted) }
    })
    .await;
    relay.sigterm();
    let ended = relay.wait().await;
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    let mut answered = 1;
    for sender in senders {
        answered += sender.await.unwrap() as usize;
    }
    let delivered = vhost.messages("prism.scan", answered).await;
    let ids: HashSet<_> = delivered.iter().map(|delivery| delivery.id()).collect();
    assert_eq!(ids.len(), answered, "each event once");
    let Ok(check) = rusqlite::Connection::open(relay.setup().spool()) else { panic!("the spool is a file") };
    let left: i64 = check.query_row("SELECT count(*) FROM event", [], |row| row.get(0)).unwrap();
    assert_eq!(left, 0);
}

#[tokio::test]
async fn the_grace_ends_a_drain_and_the_rest_stays_on_disk() {
    let vhost = Vhost::new(Node::shared().await).await;
    let wire = Wire::new(vhost.address());
    let mut relay = Setup::new(&vhost.url_through(&wire)).set("shutdown.grace", "500ms").start().await;
    relay.post(scan(1, 0)).await.expect(200);
    vhost.messages("prism.scan", 1).await;
    relay.eventually_nothing_pending().await;
    wire.stall();
    let id = relay.post(scan(1, 1)).await.id();
    relay.sigterm();
    assert_eq!(relay.wait().await.code, Some(0));
    wire.cut();
    wire.flow();
    relay.start_again().await;
    assert_eq!(vhost.messages("prism.scan", 1).await[0].id(), id);
}

#[tokio::test]
async fn a_second_signal_stops_at_once() {
    let vhost = Vhost::new(Node::shared().await).await;
    let wire = Wire::new(vhost.address());
    let mut relay = Setup::new(&vhost.url_through(&wire)).set("shutdown.grace", "10m").start().await;
    relay.post(scan(1, 0)).await.expect(200);
    vhost.messages("prism.scan", 1).await;
    wire.stall();
    relay.post(scan(1, 1)).await.expect(200);
    relay.signal("INT");
    relay.eventually_logs("stopping").await;
    relay.signal("INT");
    let ended = relay.wait().await;
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
}

#[tokio::test]
async fn a_spool_has_one_relay() {
    let relay = Setup::without_broker().start().await;
    let second = relay.run(&["serve"]).await;
    assert_eq!(second.code, Some(1));
    assert!(second.stderr.contains("in use by another relay"), "{}", second.stderr);
    assert!(second.stderr.contains(&relay.pid().to_string()), "{}", second.stderr);
    relay.post(scan(1, 1)).await.expect(200);
}
