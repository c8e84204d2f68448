//! The commands: their output and their exit codes.

use std::process::Stdio;

use serde_json::json;

use crate::harness::http::sign;
use crate::harness::samples::of_scan;
use crate::harness::setup::NO_BROKER;
use crate::harness::{Node, Relay, SECRET, Setup, Vhost, Wire, eventually};

#[tokio::test]
async fn wrong_usage_and_configuration_end_with_64() {
    let setup = Setup::without_broker();
    for arguments in [&["bogus"][..], &["serve", "--bogus"], &["send", "--count", "0"], &["send", "--rate", "-1"]] {
        let ended = setup.run(arguments).await;
        assert_eq!(ended.code, Some(64), "{arguments:?}: {}", ended.stderr);
        assert!(ended.stderr.contains("For more information, try '--help'"), "{}", ended.stderr);
    }
    let setup =
        Setup::without_broker().set("http.listen", "here").set("spool.size", 1).set("signature.secrets", json!([]));
    for command in ["serve", "check"] {
        let ended = setup.run(&[command]).await;
        assert_eq!(ended.code, Some(64));
        for key in ["3 mistakes", "http.listen:", "spool.size: unknown key", "signature.secrets: is empty"] {
            assert!(ended.stderr.contains(key), "{key:?} is missing in {}", ended.stderr);
        }
    }
    let setup = Setup::without_broker().env("PRISM_RELAY__HTTP__LISTEN", "there");
    assert!(setup.run(&["check"]).await.stderr.contains("http.listen: \"there\""), "the environment wins");
}

#[tokio::test]
async fn an_invalid_url_of_top_or_health_is_wrong_usage() {
    let setup = Setup::without_broker();
    for command in ["top", "health"] {
        for url in ["", "127.0.0.1:9090", "/readyz", "ftp://a", "https://a", "http://", "http://a b", "http://a?b"] {
            let ended = setup.run(&[command, "--url", url]).await;
            assert_eq!(ended.code, Some(64), "{command} {url:?}: {ended:?}");
            assert!(ended.stderr.contains("invalid value") && ended.stderr.contains("--url"), "{ended:?}");
        }
    }
}

#[tokio::test]
async fn help_and_version_end_with_0_and_serve_is_the_default() {
    let setup = Setup::without_broker();
    let help = setup.run(&["--help"]).await;
    assert_eq!(help.code, Some(0));
    for command in ["serve", "check", "send", "tail", "--config"] {
        assert!(help.stdout.contains(command), "{}", help.stdout);
    }
    let short = setup.run(&["-V"]).await;
    assert_eq!((short.code, short.stdout.trim()), (Some(0), concat!("prism-relay ", env!("CARGO_PKG_VERSION"))));
    let long = setup.run(&["--version"]).await;
    let commit = long.stdout.strip_prefix(&format!("{} (", short.stdout)).and_then(|rest| rest.strip_suffix(')'));
    assert!(long.code == Some(0) && commit.is_some_and(|commit| !commit.is_empty()), "{long:?}");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let ended = Setup::without_broker().set("http.listen", address.as_str()).run(&[]).await;
    assert_eq!(ended.code, Some(1));
    assert!(ended.stderr.contains(&format!("cannot listen on {address} (http.listen)")), "{}", ended.stderr);
}

#[tokio::test]
async fn check_reports_what_is_wrong_and_changes_nothing() {
    let vhost = Vhost::new(Node::shared().await).await;
    let setup = Setup::new(&vhost.url());
    let before = setup.run(&["check"]).await;
    assert_eq!(before.code, Some(0), "{}{}", before.stdout, before.stderr);
    for part in ["bindings do not exist yet; the relay will create them", "will be created"] {
        assert_eq!(before.stdout.matches(part).count(), 1, "{part:?} in {}", before.stdout);
    }
    let sum = before.stdout.lines().last().unwrap();
    assert!(sum.starts_with("nothing is wrong; notes: ") && !before.stdout.contains("as configured"), "{sum}");
    assert!(!setup.spool().exists() && vhost.exchange("prism.events").await.is_none());

    let relay = setup.start().await;
    relay.eventually_connected().await;
    relay.post(r#"{"eventType":"scan.a"}"#).await.expect(200);
    let during = relay.run(&["check"]).await;
    assert_eq!(during.code, Some(0), "{}", during.stdout);
    for part in ["in use by a running relay", "queue prism.scan", "as configured", "logged in to amqp://guest@"] {
        assert!(during.stdout.contains(part), "{part:?} is missing in {}", during.stdout);
    }

    let clash = Vhost::new(Node::shared().await).await;
    clash.create_queue("prism.scan", json!({"x-queue-type": "classic"})).await;
    let bad = Setup::new("unused").set("broker.urls", json!([clash.url(), NO_BROKER])).run(&["check"]).await;
    assert_eq!(bad.code, Some(1));
    for part in ["WRONG queue prism.scan", "inequivalent arg", "WRONG broker 127.0.0.1:1 ", "problems: 2"] {
        assert!(bad.stdout.contains(part), "{part:?} is missing in {}", bad.stdout);
    }
    let unread = run_with_closed_stdout(&relay, "check");
    assert!(matches!(unread.status.code(), Some(0 | 1)), "no panic: {unread:?}");
    let passive = Vhost::new(Node::shared().await).await;
    let missing = Setup::new(&passive.url()).set("topology.declare", "passive").run(&["check"]).await;
    assert_eq!(missing.code, Some(1));
    assert!(missing.stdout.contains("does not exist, and topology.declare is passive"), "{}", missing.stdout);
    // With passive, the operator chooses the other properties.
    let owned = Setup::new(&clash.url()).set("topology.declare", "passive").run(&["check"]).await;
    assert!(owned.stdout.contains("ok    queue prism.scan                   exists"), "{}", owned.stdout);
}

/// Runs a command whose standard output is a pipe without a reader.
fn run_with_closed_stdout(relay: &Relay, command: &str) -> std::process::Output {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    std::process::Command::new(env!("CARGO_BIN_EXE_prism-relay"))
        .arg("--config")
        .arg(relay.folder().join("relay.toml"))
        .arg(command)
        .stdout(writer)
        .output()
        .unwrap()
}

#[tokio::test]
async fn send_sends_webhooks_as_prism_does_and_prints_a_summary() {
    let vhost = Vhost::new(Node::shared().await).await;
    let relay = Relay::start(&vhost).await;
    let six = relay.run(&["send", "--url", relay.url()]).await;
    assert_eq!(six.code, Some(0), "{}{}", six.stdout, six.stderr);
    vhost.messages("prism.scan", 3).await;
    vhost.messages("prism.future_me", 3).await;
    let first = format!("posting 6 events to {}, signed with secret 1 of 1", relay.url());
    assert_eq!(six.stdout.lines().next(), Some(first.as_str()));
    let summary: Vec<Vec<&str>> = six.stdout.lines().map(|line| line.split_whitespace().collect()).collect();
    for line in [&["events", "6"][..], &["accepted", "6"], &["given", "up", "0"], &["answered", "200", "6"]] {
        assert!(summary.iter().any(|found| found == line), "{line:?} is missing in {}", six.stdout);
    }
    assert!(six.stdout.contains("p50 (ms)") && six.stdout.contains("p99 (ms)") && six.stdout.contains("max (ms)"));

    let many =
        ["send", "--url", relay.url(), "--type", "scan.x", "--type", "other.y", "--count", "51", "--rate", "500"];
    assert_eq!(relay.run(&many).await.code, Some(0));
    let scans = vhost.messages("prism.scan", 26).await;
    assert!(
        scans.iter().all(|delivery| delivery.routing_key == "scan.x" && delivery.header("prism-verified") == "true")
    );
    vhost.messages("prism.unrouted", 25).await;

    let body = relay.setup().file("body", b"\xff as it is");
    let fixed = ["send", "--url", relay.url(), "--body", body.to_str().unwrap(), "--json"];
    let fixed = relay.run(&fixed).await;
    assert_eq!(fixed.code, Some(0), "{fixed:?}");
    let summary: serde_json::Value = serde_json::from_str(&fixed.stdout).unwrap();
    for (key, expected) in [
        ("url", json!(relay.url())),
        ("signed", json!(true)),
        ("events", json!(1)),
        ("accepted", json!(1)),
        ("given_up", json!(0)),
        ("requests", json!(1)),
        ("outcomes", json!({"answered 200": 1})),
    ] {
        assert_eq!(summary[key], expected, "{key} in {summary}");
    }
    assert!(["p50", "p99", "max"].iter().all(|name| summary["latency_ms"][name].is_f64()), "{summary}");
    assert_eq!(vhost.messages("prism.unrouted", 1).await[0].body, b"\xff as it is");
}

#[tokio::test]
async fn send_retries_as_prism_does_and_gives_up() {
    // No server listens at first: the first two tries fail immediately, the third comes after five seconds.
    let relay = Setup::without_broker().start().await;
    let mut wire = Wire::new(relay.address());
    wire.refuse().await;
    let url = format!("http://{}/webhooks/prism", wire.address());
    let mut program = relay.setup().launch(&["send", "--url", &url, "--count", "1", "--type", "scan.a"]);
    relay.eventually_metric("prism_relay_webhooks_total", &[], 0.0).await;
    wire.accept();
    let ended = program.wait().await;
    assert_eq!(ended.code, Some(0), "{}{}", ended.stdout, ended.stderr);
    assert!(ended.stdout.contains("requests"), "{}", ended.stdout);

    let refused = relay.run(&["send", "--url", relay.url(), "--unsigned", "--no-retry"]).await;
    assert_eq!(refused.code, Some(1));
    let lines: Vec<Vec<&str>> = refused.stdout.lines().map(|line| line.split_whitespace().collect()).collect();
    assert!(
        lines.contains(&vec!["given", "up", "6"]) && lines.contains(&vec!["answered", "401", "6"]),
        "{}",
        refused.stdout
    );
    let first = format!("posting 6 events to {}, unsigned", relay.url());
    assert_eq!(refused.stdout.lines().next(), Some(first.as_str()));
    assert!(!refused.stdout.contains("p50") && !refused.stdout.contains("per second"), "{}", refused.stdout);

    let no_secret = Setup::without_broker().set("signature.secrets", json!([])).run(&["send", "--url", &url]).await;
    assert_eq!(no_secret.code, Some(64));
    assert!(no_secret.stderr.contains("--unsigned"), "{}", no_secret.stderr);
    let unsigned = Setup::without_broker().set("signature.secrets", json!([])).set("signature.required", false);
    let unsigned = unsigned.start().await;
    let sent = unsigned.run(&["send", "--url", unsigned.url(), "--count", "1"]).await;
    assert_eq!(sent.code, Some(0), "{sent:?}");
    assert!(sent.stdout.starts_with(&format!("posting 1 event to {}, unsigned\n", unsigned.url())), "{sent:?}");
}

#[tokio::test]
async fn verify_explains_the_answer_to_a_captured_request() {
    let relay = Setup::without_broker().start().await;
    let (timestamp, body) = (jiff::Timestamp::now().to_string(), br#"{"eventType":"scan.a","payload":{"scanId":"1"}}"#);
    let signature = sign(SECRET, &timestamp, body);
    let headers =
        relay.setup().file("headers", format!("Prism-Timestamp: {timestamp}\r\nPrism-Signature: {signature}\r\n"));
    let verify = async |body: &[u8], more: &[&str]| {
        let body = relay.setup().file("body", body);
        let files = ["verify", "--headers", headers.to_str().unwrap(), "--body", body.to_str().unwrap()];
        relay.run(&[&files[..], more].concat()).await
    };
    let answer = async |body: &[u8]| {
        let headers = [("prism-timestamp", timestamp.as_str()), ("prism-signature", signature.as_str())];
        relay.post_with(&headers, body.to_vec()).await.status
    };
    let good = verify(body, &[]).await;
    assert_eq!((good.code, answer(body).await), (Some(0), 200), "{good:?}");
    assert!(
        good.stdout.contains("matches secret 1 of 1") && good.stdout.ends_with("the relay answers 200"),
        "{good:?}"
    );
    let changed = [&body[..], b"\n"].concat();
    let bad = verify(&changed, &[]).await;
    assert_eq!((bad.code, answer(&changed).await), (Some(1), 401), "{bad:?}");
    assert!(bad.stdout.contains("a line end was added at its end") && !bad.stdout.contains(SECRET), "{bad:?}");
    let late = verify(body, &["--at", "2100-01-01T00:00:00Z"]).await;
    assert!(late.code == Some(1) && late.stdout.ends_with("the relay answers 401 stale-timestamp"), "{late:?}");
    let missing = relay.run(&["verify", "--headers", "nothing", "--body", "nothing"]).await;
    assert!(missing.code == Some(64) && missing.stderr.contains("cannot read nothing"), "{missing:?}");
}

/// Log collectors read standard error line by line as JSON.
#[tokio::test]
async fn the_last_line_of_a_relay_that_fails_has_the_format_of_its_log() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let at = |format: &str| Setup::without_broker().set("http.listen", address.as_str()).set("log.format", format);
    let wrong = |format: &str| Setup::without_broker().set("http.listen", "here").set("log.format", format);
    for (setup, code, expected) in [
        (at("json"), 1, "cannot listen on"),
        (wrong("json"), 64, "http.listen: \"here\""),
        (wrong("auto"), 64, "http.listen"),
    ] {
        let ended = setup.run(&["serve"]).await;
        assert_eq!(ended.code, Some(code), "{ended:?}");
        let last: serde_json::Value = serde_json::from_str(ended.stderr.lines().last().unwrap()).unwrap();
        assert_eq!((&last["level"], &last["message"]), (&json!("ERROR"), &json!("the relay ends")), "{last}");
        assert!(last["error"].as_str().unwrap().contains(expected), "{last}");
        assert!(last["timestamp"].as_str().unwrap().parse::<jiff::Timestamp>().is_ok(), "{last}");
    }
    for setup in [at("pretty"), wrong("pretty")] {
        let ended = setup.run(&["serve"]).await;
        assert!(ended.stderr.contains("\nprism-relay: ") || ended.stderr.starts_with("prism-relay: "), "{ended:?}");
    }
}

#[tokio::test]
async fn tail_prints_events_and_takes_none_from_queues() {
    let vhost = Vhost::new(Node::shared().await).await;
    let relay = Relay::start(&vhost).await;
    relay.eventually_connected().await;
    let mut all = relay.setup().launch(&["tail", "--json", "--count", "3"]);
    let mut scans = relay.setup().launch(&["tail", "scan.*", "--count", "1"]);
    eventually("both tails to be bound", async || {
        let queues: Vec<_> =
            vhost.bindings().await.into_iter().filter(|(_, queue, _)| queue.starts_with("amq.gen")).collect();
        // Each tail has the two bindings of the work queues, those to the fanout and prism.unrouted, and the default.
        if queues.iter().filter(|(exchange, _, _)| !exchange.is_empty()).count() == 8 {
            Ok(())
        } else {
            Err(format!("{queues:?} {:?} {:?} {:?} {:?}", all.exited(), all.stderr(), scans.exited(), scans.stderr()))
        }
    })
    .await;
    let unknown = relay.post(r#"{"eventType":"new.kind","payload":{"userToken":"hush"}}"#).await.id();
    let deep = relay
        .post(r#"{"eventType":"scan.processing.started","payload":{"userToken":"partner-user-42","scanId":"s"}}"#)
        .await
        .id();
    let flat = relay
        .post("{\"eventType\":\"scan.flat\",\"payload\":{\"scanId\":\"\\u001b[31m\",\"state\":\"READY\"}}")
        .await
        .id();
    let printed = all.wait().await;
    assert_eq!(printed.code, Some(0), "{}", printed.stderr);
    let lines: Vec<serde_json::Value> =
        printed.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let mut ids: Vec<_> = lines.iter().map(|line| line["id"].as_str().unwrap()).collect();
    ids.sort();
    let mut expected = [unknown.as_str(), &deep, &flat];
    expected.sort();
    assert_eq!(ids, expected);
    let line = lines.iter().find(|line| line["key"] == "scan.processing.started").unwrap();
    assert_eq!((&line["subject"], &line["verified"]), (&json!("scan:s"), &json!(true)));
    assert!(!printed.stdout.contains("hush"));
    let printed = scans.wait().await;
    assert!(printed.stdout.contains("scan.flat") && printed.stdout.contains("READY") && printed.stdout.contains(&flat));
    assert!(!printed.stdout.contains('\x1b') && printed.stdout.lines().count() == 1, "{:?}", printed.stdout);
    // The event of an unknown type reached prism.unrouted: a tail must not make it count as routed.
    assert_eq!(vhost.messages("prism.unrouted", 1).await[0].id(), unknown);
    assert_eq!(vhost.messages("prism.scan", 2).await.len(), 2);
}

#[tokio::test]
async fn tail_can_consume_a_queue_and_reports_a_missing_one() {
    let vhost = Vhost::new(Node::shared().await).await;
    let relay = Relay::start(&vhost).await;
    let id = relay.post(r#"{"eventType":"scan.a","payload":{"userToken":"partner-user-42","scanId":"1"}}"#).await.id();
    vhost.eventually_depth("prism.scan", 1).await;
    let worked = relay.run(&["tail", "--queue", "prism.scan", "--count", "1"]).await;
    assert!(worked.code == Some(0) && worked.stdout.contains(&id), "{worked:?}");
    vhost.assert_empty("prism.scan").await;
    let missing = relay.run(&["tail", "--queue", "nothing"]).await;
    assert!(missing.code == Some(1) && missing.stderr.contains("no queue 'nothing'"), "{missing:?}");
    let unreachable = Setup::without_broker().run(&["tail"]).await;
    assert!(unreachable.code == Some(1) && unreachable.stderr.contains("cannot reach 127.0.0.1:1"), "{unreachable:?}");
}

#[tokio::test]
async fn health_exits_as_readyz_answers() {
    let relay = Setup::without_broker().start().await;
    // The command waits three seconds at most, which a busy machine can exceed.
    eventually("the relay's answer in time", async || {
        let ready = relay.run(&["health", "--url", relay.ops()]).await;
        if (ready.code, ready.stdout.as_str()) == (Some(0), "ready") { Ok(()) } else { Err(format!("{ready:?}")) }
    })
    .await;
    eventually("the answer of another listener in time", async || {
        let wrong = relay.run(&["health", "--url", &format!("http://{}", relay.address())]).await;
        if wrong.code == Some(1) && wrong.stderr.contains("answers 404") { Ok(()) } else { Err(format!("{wrong:?}")) }
    })
    .await;
    let closed = relay.run(&["health", "--url", "http://127.0.0.1:1"]).await;
    assert!(closed.code == Some(1) && closed.stderr.contains("no answer from http://127.0.0.1:1/readyz"), "{closed:?}");
    // The configuration has port 0.
    let unknown = relay.run(&["health"]).await;
    assert!(unknown.code == Some(64) && unknown.stderr.contains("give the address with --url"), "{unknown:?}");
}

#[tokio::test]
async fn man_pages_and_completions_name_commands_and_options() {
    let setup = Setup::without_broker();
    let page = setup.run(&["man"]).await;
    assert!(page.code == Some(0) && page.stdout.contains(".TH prism-relay 1"), "{page:?}");
    let folder = setup.folder().join("man");
    std::fs::create_dir(&folder).unwrap();
    assert_eq!(setup.run(&["man", folder.to_str().unwrap()]).await.code, Some(0));
    let send = std::fs::read_to_string(folder.join("prism-relay-send.1")).unwrap();
    assert!(send.contains("no\\-retry"), "{send}");
    for shell in ["bash", "zsh", "fish"] {
        let script = setup.run(&["completions", shell]).await;
        assert!(script.code == Some(0) && script.stdout.contains("redrive"), "{script:?}");
    }
    assert_eq!(setup.run(&["completions", "cmd"]).await.code, Some(64));
}

#[tokio::test]
async fn check_offline_needs_no_broker() {
    let setup = Setup::without_broker();
    let checked = setup.run(&["check", "--offline"]).await;
    assert!(checked.code == Some(0) && !checked.stdout.contains("broker"), "{checked:?}");
    assert_eq!(setup.run(&["check"]).await.code, Some(1));
}

/// The disk is full, or the log driver is gone: a script must not go on as if it had the answer.
#[tokio::test]
async fn output_that_cannot_be_written_is_an_error_of_every_command() {
    let vhost = Vhost::new(Node::shared().await).await;
    let relay = Setup::new(&vhost.url()).set("topology.archive", json!({ "max_age": "1d" })).start().await;
    for number in 0..3 {
        relay.post(of_scan(number, "scan.processing.started")).await.expect(200);
        vhost.reject("prism.scan").await;
    }
    relay.eventually_nothing_pending().await;
    let parked = Setup::without_broker().start().await;
    let id = parked.post(of_scan(1, "scan.processing.started")).await.id();
    let (headers, body) = (relay.setup().file("headers", ""), relay.setup().file("body", ""));
    let (url, ops) = (relay.url(), relay.ops());
    let [headers, body] = [&headers, &body].map(|path| path.to_str().unwrap());
    for (relay, arguments) in [
        (&relay, &["--help"][..]),
        (&relay, &["--version"]),
        (&relay, &["send", "--help"]),
        (&relay, &["check", "--offline"]),
        (&relay, &["check"]),
        (&relay, &["send", "--url", url, "--count", "1"]),
        (&relay, &["send", "--url", url, "--count", "1", "--json"]),
        (&relay, &["tail", "--queue", "prism.dead", "--count", "1"]),
        (&relay, &["tail", "--queue", "prism.dead", "--count", "1", "--json"]),
        (&relay, &["top", "--once", "--url", ops]),
        (&relay, &["topology", "show"]),
        (&relay, &["topology", "declare"]),
        (&relay, &["topology", "diff"]),
        (&relay, &["topology", "export"]),
        (&relay, &["redrive", "--dry-run"]),
        (&relay, &["redrive"]),
        (&relay, &["replay", "--since", "1h"]),
        (&relay, &["verify", "--headers", headers, "--body", body]),
        (&parked, &["spool", "stats"]),
        (&parked, &["spool", "list"]),
        (&parked, &["spool", "list", "--json"]),
        (&parked, &["spool", "show", &id]),
        (&parked, &["spool", "show", "--as-curl", &id]),
        (&parked, &["spool", "verify"]),
        (&parked, &["spool", "retry", "--all-parked"]),
        (&parked, &["spool", "remove", "--yes", "--pending", &id]),
        (&relay, &["health", "--url", ops]),
        (&relay, &["init"]),
        (&relay, &["config", "show"]),
        (&relay, &["config", "show", "--defaults"]),
        (&relay, &["man"]),
        (&relay, &["completions", "bash"]),
    ] {
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_prism-relay"));
        command.arg("--config").arg(relay.folder().join("relay.toml")).args(arguments).stdin(Stdio::null());
        let ended = tokio::task::spawn_blocking(move || command.stdout(full).output().unwrap()).await.unwrap();
        let error = String::from_utf8_lossy(&ended.stderr);
        assert_eq!(ended.status.code(), Some(1), "{arguments:?}: {error}");
        assert!(error.contains("cannot print") && error.contains("No space left"), "{arguments:?}: {error}");
    }
    let shown = parked.run(&["spool", "show", &id]).await;
    assert_eq!(shown.code, Some(0), "an event is removed only after it was shown: {shown:?}");
}
