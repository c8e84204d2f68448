//! The `spool` command while the relay runs.

use std::process::Stdio;

use serde_json::{Value, json};

use crate::harness::program::{Ended, Program};
use crate::harness::{Node, Relay, SECRET, Setup, Vhost, leash};

/// An event with `userToken`s in several places.
fn with_tokens(number: u32) -> String {
    let token = json!({"userToken": "hush", "deeper": [{"userToken": {"a": "hush"}}]});
    json!({"eventType": "scan.a", "payload": {"scanId": number.to_string(), "state": "READY", "x": token}}).to_string()
}

async fn stats(relay: &Relay) -> Value {
    let printed = relay.run(&["spool", "stats", "--json"]).await;
    assert_eq!(printed.code, Some(0), "{printed:?}");
    serde_json::from_str(&printed.stdout).unwrap()
}

/// A relay whose events are all parked, because no queue is bound.
async fn with_parked(vhost: &Vhost, count: u32) -> (Relay, Vec<String>) {
    vhost.create_exchange("prism.webhooks", "topic", json!({})).await;
    let setup = Setup::new(&vhost.url()).set("topology.declare", "off").set("broker.parked_retry", "1h");
    let relay = setup.start().await;
    let mut ids = Vec::new();
    for number in 0..count {
        ids.push(relay.post(with_tokens(number)).await.id());
    }
    relay.eventually_parked(count.into()).await;
    (relay, ids)
}

#[tokio::test]
async fn stats_list_show_and_verify_work_while_the_relay_runs() {
    let relay = Setup::without_broker().start().await;
    let mut ids = Vec::new();
    for number in 0..3 {
        ids.push(relay.post(with_tokens(number)).await.id());
    }
    let stats = stats(&relay).await;
    assert_eq!((&stats["accepted"], &stats["pending"], &stats["confirmed"]), (&json!(3), &json!(3), &json!(0)));
    let bytes = stats["bytes"].as_f64().unwrap();
    assert_eq!(
        (&stats["max_bytes"], stats["percent"].as_f64().unwrap()),
        (&json!(1 << 30), 100.0 * bytes / (1u64 << 30) as f64)
    );
    assert!(bytes > 0.0 && stats["oldest_pending_age_seconds"].as_u64().is_some_and(|age| age < 600), "{stats}");
    assert_eq!(stats["oldest_parked_at"], Value::Null);
    let text = relay.run(&["spool", "stats"]).await.stdout;
    for part in [
        "\naccepted         3\n",
        "space used       0.0 %, ",
        " of 1.0 GiB\n",
        " old, accepted 20",
        "oldest parked    none",
    ] {
        assert!(format!("\n{text}").contains(part), "{part:?} is missing in {text}");
    }

    let list = relay.run(&["spool", "list", "--json", "--limit", "2"]).await;
    let rows: Vec<Value> = list.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(rows.iter().map(|row| row["id"].as_str().unwrap()).collect::<Vec<_>>(), ids[..2]);
    assert_eq!(
        (&rows[1]["subject"], &rows[1]["state"], &rows[1]["parked"]),
        (&json!("scan:1"), &json!("READY"), &Value::Null)
    );
    let text = relay.run(&["spool", "list", "--limit", "2"]).await.stdout;
    let lines: Vec<_> = text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>()).collect();
    assert_eq!(lines[0], ["ID", "AGE", "TYPE", "SUBJECT"]);
    for (line, number) in lines[1..3].iter().zip(0..) {
        assert_eq!((line[0], line[3], line[4]), (&ids[number][28..], "scan.a", &*format!("scan:{number}")), "{text}");
    }
    assert_eq!(lines[3..], [["2", "of", "3", "events"]], "{text}");
    assert_eq!(relay.run(&["spool", "list", "--parked"]).await.stdout, "0 of 0 parked events");

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
async fn parked_events_are_listed_with_their_reason_and_retried_when_asked() {
    let vhost = Vhost::new(Node::shared().await).await;
    let (mut relay, ids) = with_parked(&vhost, 3).await;
    let list = relay.run(&["spool", "list", "--parked"]).await.stdout;
    assert!(list.contains(&ids[0][28..]) && list.contains("\n          parked: returned: 312 NO_ROUTE"), "{list}");
    assert!(list.ends_with("\n3 of 3 parked events"), "{list}");
    let show = relay.run(&["spool", "show", &ids[0]]).await.stdout;
    assert!(show.contains("parked       returned: 312 NO_ROUTE"), "{show}");
    assert!(stats(&relay).await["oldest_parked_age_seconds"].is_u64());

    // The next round comes at the start; without the request the events would wait an hour.
    vhost.create_queue("rest", json!({"x-queue-type": "quorum"})).await;
    vhost.bind("prism.webhooks", "rest", "#").await;
    let one = relay.run(&["spool", "retry", &ids[1][28..]]).await;
    assert_eq!(
        (one.code, one.stdout),
        (Some(0), format!("{} will be tried again within 1 h, if the relay runs", ids[1]))
    );
    relay.restart().await;
    assert_eq!(vhost.messages("rest", 1).await[0].id(), ids[1]);
    relay.eventually_parked(2).await;
    let all = relay.run(&["spool", "retry", "--all-parked"]).await;
    assert!(all.stdout.starts_with("2 parked events will be tried again within 1 h"), "{all:?}");
    relay.restart().await;
    vhost.messages("rest", 2).await;
    relay.eventually_parked(0).await;
    assert_eq!(relay.run(&["spool", "retry"]).await.code, Some(64));
}

#[tokio::test]
async fn an_event_is_found_by_a_part_of_its_id_that_no_other_has() {
    let relay = Setup::without_broker().start().await;
    let (one, two) = (relay.post(with_tokens(1)).await.id(), relay.post(with_tokens(2)).await.id());
    for part in [&one[..], &one[28..], &one.to_uppercase()[24..], &one.replace('-', "")] {
        let shown = relay.run(&["spool", "show", part]).await;
        assert!(shown.stdout.starts_with(&format!("id           {one}\n")), "{part}: {shown:?}");
    }
    assert_eq!(one[..8], two[..8], "both are of the same minute");
    let both = relay.run(&["spool", "show", &one[..8]]).await;
    assert!(both.code == Some(1) && both.stderr.contains("several events have an id that begins or ends"), "{both:?}");
    assert_eq!(relay.run(&["spool", "show", "nothing"]).await.code, Some(64));
    let pending = relay.run(&["spool", "retry", &one]).await;
    assert!(pending.code == Some(1) && pending.stderr.contains("is not parked"), "{pending:?}");
}

#[tokio::test]
async fn remove_shows_what_it_removes_and_asks_on_a_terminal() {
    let vhost = Vhost::new(Node::shared().await).await;
    let (relay, ids) = with_parked(&vhost, 2).await;
    let silent = relay.run(&["spool", "remove", &ids[0]]).await;
    assert!(silent.code == Some(64) && silent.stderr.contains("Add --yes"), "{silent:?}");
    for part in [&*ids[0], "type     scan.a", "subject  scan:0", "age      ", "state    parked: returned: 312 NO_ROUTE"]
    {
        assert!(silent.stdout.contains(part), "{part:?} is missing in {}", silent.stdout);
    }
    let no = on_terminal(&relay, &ids[0], "").await;
    assert!(no.code == Some(1) && no.stdout.contains("Remove this event permanently?"), "{no:?}");
    assert!(no.stdout.contains("nothing was removed") && stats(&relay).await["parked"] == 2, "{no:?}");
    let yes = on_terminal(&relay, &ids[0], "y").await;
    assert!(yes.code == Some(0) && yes.stdout.contains(&format!("{} removed", ids[0])), "{yes:?}");
    let without_asking = relay.run(&["spool", "remove", "--yes", &ids[1]]).await;
    assert!(without_asking.code == Some(0) && without_asking.stdout.ends_with("removed"), "{without_asking:?}");
    let left = stats(&relay).await;
    assert_eq!((&left["parked"], &left["removed"]), (&json!(0), &json!(2)));
}

/// Runs `spool remove` on a pseudo-terminal, with this answer.
async fn on_terminal(relay: &Relay, id: &str, answer: &str) -> Ended {
    let file = relay.folder().join("relay.toml");
    let line = format!("{} --config {} spool remove {id}", env!("CARGO_BIN_EXE_prism-relay"), file.display());
    let mut command = leash::command("/bin/sh");
    command.args(["-c", r#"echo "$1" | script -qec "$2" /dev/null"#, "terminal", answer, &line]);
    Program::start(command).wait().await
}

#[tokio::test]
async fn as_curl_prints_a_command_without_a_secret_that_posts_the_event() {
    let vhost = Vhost::new(Node::shared().await).await;
    let relay = Relay::start(&vhost).await;
    let offline = Setup::without_broker().start().await;
    let id =
        offline.post(r#"{"eventType":"scan.a","payload":{"scanId":"it's $(1)","userToken":"partner-user-42"}}"#).await;
    let shown = offline.run(&["spool", "show", "--as-curl", &id.id()]).await;
    assert!(shown.code == Some(0) && !shown.stdout.contains(SECRET), "{shown:?}");

    let mut tail = relay.setup().launch(&["tail", "--as-curl", "--queue", "prism.scan", "--count", "1"]);
    let posted = |script: &str| {
        let mut bash = std::process::Command::new("bash");
        bash.args(["-euc", script]).env("PRISM_SECRET", SECRET).env("PRISM_URL", relay.url());
        let done = bash.stdin(Stdio::null()).output().unwrap();
        serde_json::from_slice::<Value>(&done.stdout).unwrap_or_else(|_| panic!("{done:?}"))
    };
    let first = posted(&shown.stdout);
    assert_eq!((&first["ok"], &first["duplicate"]), (&json!(true), &Value::Null));
    let tailed = tail.wait().await;
    assert!(
        tailed.code == Some(0) && tailed.stdout.contains("[hidden]") && !tailed.stdout.contains(SECRET),
        "{tailed:?}"
    );
    let second = posted(&tailed.stdout);
    assert_eq!((&second["id"], &second["duplicate"]), (&first["id"], &json!(true)), "the bytes are the same");
    let unsigned = std::process::Command::new("bash").args(["-uc", &shown.stdout]).env_remove("PRISM_SECRET").output();
    assert!(String::from_utf8_lossy(&unsigned.unwrap().stderr).contains("set PRISM_"));
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
    let careless = relay.run(&["spool", "remove", "--yes", &ids[1]]).await;
    assert!(careless.code == Some(1) && careless.stderr.contains("Add --pending"), "{careless:?}");
    let unknown = ["spool", "remove", "--yes", "--pending", &ids[1], "00000000-0000-7000-8000-000000000000"];
    let unknown = relay.run(&unknown).await;
    assert!(unknown.code == Some(1) && unknown.stderr.contains("there is no event 00000000-0000-"), "{unknown:?}");
    assert_eq!(stats(&relay).await["removed"], 0, "nothing is removed unless all of it can be");
    let removed = relay.run(&["spool", "remove", "--yes", "--pending", &ids[1], &ids[2][28..]]).await;
    assert_eq!(removed.code, Some(0), "{removed:?}");
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
