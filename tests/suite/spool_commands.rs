//! The `spool` command while the relay runs.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::harness::{Node, Relay, Setup, Vhost};

/// An event with `userToken`s in several places.
fn with_tokens(number: u32) -> String {
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
async fn stats_list_show_and_verify_work_while_the_relay_runs() {
    let relay = Setup::without_broker().start().await;
    let mut ids = Vec::new();
    for number in 0..3 {
        ids.push(relay.post(with_tokens(number)).await.id());
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

    let missing = Setup::without_broker().run(&["spool", "stats"]).await;
    assert!(missing.code == Some(1) && missing.stderr.contains("there is no spool"), "{missing:?}");
}

#[tokio::test]
async fn parked_events_are_listed_with_their_reason() {
    let vhost = Vhost::new(Node::shared().await).await;
    vhost.create_exchange("prism.events", "topic", json!({})).await;
    let relay = Setup::new(&vhost.url()).set("topology.declare", "off").start().await;
    let id = relay.post(with_tokens(1)).await.id();
    relay.eventually_parked(1).await;
    let list = relay.run(&["spool", "list", "--parked"]).await.stdout;
    assert!(list.contains(&id) && list.contains("returned: 312 NO_ROUTE"), "{list}");
    let show = relay.run(&["spool", "show", &id]).await.stdout;
    assert!(show.contains("parked       returned: 312 NO_ROUTE"), "{show}");
}

#[tokio::test]
async fn a_removed_event_is_not_delivered_and_the_ledger_balances() {
    let vhost = Vhost::new(Node::shared().await).await;
    let mut wire = crate::harness::Wire::new(vhost.address());
    wire.refuse().await;
    let relay = Relay::start_through(&vhost, &wire).await;
    let mut ids = Vec::new();
    for number in 0..4 {
        ids.push(relay.post(with_tokens(number)).await.id());
    }
    let removed = relay.run(&["spool", "remove", &ids[1], &ids[2]]).await;
    assert_eq!(removed.code, Some(0), "{removed:?}");
    let again = relay.run(&["spool", "remove", &ids[1]]).await;
    assert!(again.code == Some(1) && again.stdout.contains("not found"), "{again:?}");
    wire.accept();
    let delivered: Vec<_> = vhost.messages("prism.scan", 2).await.iter().map(|delivery| delivery.id()).collect();
    assert_eq!(delivered, [ids[0].clone(), ids[3].clone()]);
    relay.eventually_nothing_pending().await;
    vhost.assert_empty("prism.scan").await;
    let spool = relay.spool().await;
    assert_eq!((spool.accepted, spool.confirmed, spool.removed), (4, 2, 2), "{spool:?}");
    assert_eq!(relay.run(&["spool", "verify"]).await.code, Some(0));
}

#[tokio::test]
async fn verify_reports_a_changed_body_and_a_wrong_ledger() {
    let relay = Setup::without_broker().start().await;
    let id = relay.post(with_tokens(1)).await.id();
    let file = rusqlite::Connection::open(relay.setup().spool()).unwrap();
    file.execute_batch("UPDATE event SET body = x'7b7d'; UPDATE ledger SET pending = 7").unwrap();
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
