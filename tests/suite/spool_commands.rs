//! `spool`: what the operator sees and does, beside a running relay.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::harness::{Node, Relay, Setup, Vhost};

const NO_BROKER: &str = "amqp://guest:guest@127.0.0.1:1/%2f";

fn event(number: u32) -> String {
    let token = json!({"userToken": "hush", "deeper": [{"userToken": {"a": "hush"}}]});
    json!({"eventType": "scan.a", "payload": {"scanId": number.to_string(), "state": "READY", "x": token}}).to_string()
}

async fn stats(relay: &Relay) -> BTreeMap<String, String> {
    let printed = relay.run(&["spool", "stats"]).await;
    assert_eq!(printed.code, Some(0), "{printed:?}");
    let line = |line: &str| line.rsplit_once(' ').map(|(name, value)| (name.trim().to_owned(), value.to_owned()));
    printed.stdout.lines().filter_map(line).collect()
}

#[tokio::test]
async fn the_spool_can_be_looked_into_while_the_relay_runs() {
    let relay = Setup::new(NO_BROKER).start().await;
    let mut ids = Vec::new();
    for number in 0..3 {
        ids.push(relay.post(event(number)).await.id());
    }
    let stats = stats(&relay).await;
    assert_eq!((stats["accepted"].as_str(), stats["pending"].as_str(), stats["confirmed"].as_str()), ("3", "3", "0"));

    let list = relay.run(&["spool", "list", "--json", "--limit", "2"]).await;
    let rows: Vec<Value> = list.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(rows.iter().map(|row| row["id"].as_str().unwrap()).collect::<Vec<_>>(), ids[..2]);
    assert_eq!(
        (&rows[1]["subject"], &rows[1]["state"], &rows[1]["parked"]),
        (&json!("scan:1"), &json!("READY"), &Value::Null)
    );
    let text = relay.run(&["spool", "list"]).await.stdout;
    assert_eq!(text.lines().count(), 3);
    assert_eq!(relay.run(&["spool", "list", "--parked"]).await.stdout, "");

    let show = relay.run(&["spool", "show", &ids[2]]).await;
    assert_eq!(show.code, Some(0), "{show:?}");
    assert!(
        show.stdout.contains("intact       true") && show.stdout.contains("\"userToken\": \"[hidden]\""),
        "{}",
        show.stdout
    );
    for printed in [&list.stdout, &text, &show.stdout] {
        assert!(!printed.contains("hush"), "{printed}");
    }
    let missing = relay.run(&["spool", "show", "00000000-0000-7000-8000-000000000000"]).await;
    assert!(missing.code == Some(1) && missing.stderr.contains("there is no event"), "{missing:?}");

    let verify = relay.run(&["spool", "verify"]).await;
    assert_eq!(verify.code, Some(0), "{verify:?}");
    assert!(verify.stdout.contains("3 accepted = 0 confirmed + 3 pending + 0 parked + 0 removed"), "{}", verify.stdout);

    let nowhere = Setup::new(NO_BROKER).run(&["spool", "stats"]).await;
    assert!(nowhere.code == Some(1) && nowhere.stderr.contains("there is no spool"), "{nowhere:?}");
}

#[tokio::test]
async fn parked_events_are_listed_with_their_reason() {
    let vhost = Vhost::new(Node::shared().await).await;
    vhost.create_exchange("prism.events", "topic", json!({})).await;
    let relay = Setup::new(&vhost.url()).set("topology.declare", "off").start().await;
    let id = relay.post(event(1)).await.id();
    relay.eventually_metric("prism_relay_spool_parked_events", &[], 1.0).await;
    let list = relay.run(&["spool", "list", "--parked"]).await.stdout;
    assert!(list.contains(&id) && list.contains("returned: 312 NO_ROUTE"), "{list}");
    let show = relay.run(&["spool", "show", &id]).await.stdout;
    assert!(show.contains("parked       returned: 312 NO_ROUTE"), "{show}");
}

#[tokio::test]
async fn a_removed_event_is_not_delivered_and_the_ledger_still_balances() {
    let vhost = Vhost::new(Node::shared().await).await;
    let mut wire = crate::harness::Wire::new(vhost.address());
    wire.refuse().await;
    let relay = Relay::start_through(&vhost, &wire).await;
    let mut ids = Vec::new();
    for number in 0..4 {
        ids.push(relay.post(event(number)).await.id());
    }
    let removed = relay.run(&["spool", "remove", &ids[1], &ids[2]]).await;
    assert_eq!(removed.code, Some(0), "{removed:?}");
    let again = relay.run(&["spool", "remove", &ids[1]]).await;
    assert!(again.code == Some(1) && again.stdout.contains("is not there"), "{again:?}");
    wire.accept();
    let delivered: Vec<_> = vhost.messages("prism.scan", 2).await.iter().map(|delivery| delivery.id()).collect();
    assert_eq!(delivered, [ids[0].clone(), ids[3].clone()]);
    relay.eventually_metric("prism_relay_spool_events", &[], 0.0).await;
    vhost.assert_empty("prism.scan").await;
    let spool = relay.status().await["spool"].clone();
    assert_eq!(
        (spool["accepted"].as_u64(), spool["confirmed"].as_u64(), spool["removed"].as_u64()),
        (Some(4), Some(2), Some(2))
    );
    assert_eq!(relay.run(&["spool", "verify"]).await.code, Some(0));
}

#[tokio::test]
async fn verify_finds_what_is_wrong() {
    let relay = Setup::new(NO_BROKER).start().await;
    let id = relay.post(event(1)).await.id();
    let meddler = rusqlite::Connection::open(relay.setup().spool()).unwrap();
    meddler.execute_batch("UPDATE event SET body = x'7b7d'; UPDATE ledger SET pending = 7").unwrap();
    let verify = relay.run(&["spool", "verify"]).await;
    assert_eq!(verify.code, Some(1));
    for part in [
        format!("event {id} (seq 1): the body does not match its fingerprint"),
        "accepted is not confirmed + pending".to_owned(),
        "pending is 7, but there are 1".to_owned(),
    ] {
        assert!(verify.stdout.contains(&part), "{part:?} is missing in {}", verify.stdout);
    }
}
