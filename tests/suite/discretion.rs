//! Promise 10: `userToken`s, secrets and passwords never appear in any output.
//!
//! The harness searches for them in all output of each test's relay, at trace level: logs, answers, metrics, status,
//! output of commands, metadata of messages. The tests here reach the places that the other tests do not.

use serde_json::json;

use crate::harness::http::{now, sign};
use crate::harness::marks::{API_KEY, HEALTH, PASSWORD, USER_TOKEN, indiscretion};
use crate::harness::samples::of_type;
use crate::harness::{Client, Node, Raw, SECRET, Setup, Vhost, eventually};

#[test]
fn the_search_finds_each_mark() {
    let health = json!(HEALTH).to_string();
    for mark in [SECRET, PASSWORD, USER_TOKEN, API_KEY, &health] {
        assert!(indiscretion(&format!("a line\nwith {mark}\n")).is_some_and(|(found, _)| found == mark));
        assert!(indiscretion(&format!("{:?}", format!("as bytes {mark}").as_bytes())).is_some());
    }
    assert_eq!(indiscretion("nothing at all, guest and userToken among it"), None);
}

#[tokio::test]
async fn no_output_quotes_what_a_sender_sent() {
    let vhost = Vhost::new(Node::shared().await).await;
    // lapin's trace would show the login and the bodies if the relay did not silence it.
    let setup = Setup::new(&vhost.url()).set("log.filter", "trace,lapin=trace").set("http.body_bytes_max", "1KiB");
    let relay = setup.set("signature.required", false).start().await;
    let timestamp = now();
    let signature = sign(SECRET, &timestamp, of_type("scan.a").as_bytes());
    relay.post(of_type("scan.processing.started")).await.expect(200);
    relay.post(of_type("unknown")).await.expect(200);
    let signed = [("prism-timestamp", timestamp.as_str()), ("prism-signature", signature.as_str())];
    relay.post_with(&signed, of_type("scan.b")).await.expect(401);
    let [not_json, no_envelope] = [of_type("a") + "}", format!("[{}]", of_type("a"))];
    relay.post_with(&[], not_json).await.expect(400);
    relay.post_with(&[], no_envelope).await.expect(422);
    relay.post_with(&[], [of_type("a").as_bytes(), b"\xff"].concat()).await.expect(400);
    relay.post_with(&[], of_type("a").repeat(20)).await.expect(413);
    // The marks in headers, path and query.
    let headers = [("x-user", USER_TOKEN), ("prism-timestamp", USER_TOKEN), ("prism-signature", USER_TOKEN)];
    relay.post_with(&headers, of_type("scan.c")).await.expect(401);
    let url = relay.url().to_owned();
    let elsewhere = format!("{url}/{USER_TOKEN}?secret={SECRET}");
    Client::http1().send(hyper::Method::POST, &elsewhere, &[], of_type("scan.d")).await.unwrap().expect(404);
    Client::http1().send(hyper::Method::POST, &url, &headers[..1], of_type("scan.e")).await.unwrap().expect(200);
    for broken in [format!("POST /{USER_TOKEN} HTTP/9.9\r\n\r\n"), format!("{USER_TOKEN}: {SECRET}\r\n\r\n")] {
        let answer = Raw::exchange(relay.address(), broken).await;
        assert_eq!(indiscretion(&answer), None);
    }
    let broken_off = format!("POST /webhooks/prism HTTP/1.1\r\nhost: r\r\ncontent-length: 999\r\n\r\n{}", of_type("a"));
    let mut raw = Raw::connect(relay.address()).await;
    raw.write(broken_off).await.unwrap();
    raw.end().await;
    raw.read_to_end().await;
    // The marks where the documentation has something else.
    let body = json!({ "eventType": "scan.processing.failed", "payload": {
        "userToken": [USER_TOKEN], "partner": { USER_TOKEN: USER_TOKEN }, "state": { "user": USER_TOKEN },
        USER_TOKEN: "a payload by token",
    } });
    Client::http1().send(hyper::Method::POST, &url, &[], body.to_string()).await.unwrap().expect(200);
    relay.eventually_nothing_pending().await;
    eventually("the unexpected field to be counted", async || {
        let fields = relay.metric("prism_relay_unexpected_total", &[("kind", "field")]).await;
        if fields > 0.0 { Ok(()) } else { Err(fields) }
    })
    .await;
    relay.metrics().await;
    let status = relay.status().await;
    let names: Vec<_> = status["unexpected"].as_array().unwrap().iter().map(|found| &found["name"]).collect();
    for name in ["payload.userToken: array", "payload.partner", "payload.state: object", "payload.(unprintable)"] {
        assert!(names.contains(&&json!(name)), "{name} is not in {names:?}");
    }
    assert_eq!(vhost.messages("prism.scan", 3).await.len(), 3);
}

#[tokio::test]
async fn commands_and_errors_of_the_broker_quote_no_secret() {
    let vhost = Vhost::new(Node::shared().await).await;
    // No queue is bound: the broker returns the event, and the relay parks it.
    vhost.create_exchange("prism.webhooks", "topic", json!({})).await;
    let setup = Setup::new(&vhost.url()).set("topology.declare", "off").set("log.filter", "trace,lapin=trace");
    let relay = setup.start().await;
    let id = relay.post(of_type("scan.processing.started")).await.id();
    relay.eventually_parked(1).await;
    for command in [
        &["spool", "stats"][..],
        &["spool", "list"],
        &["spool", "list", "--json"],
        &["spool", "show", &id],
        &["spool", "show", "--as-curl", &id],
        &["spool", "verify"],
        &["check"],
        &["send", "--url", relay.url(), "--count", "3"],
        &["send", "--url", "http://127.0.0.1:1/", "--count", "3", "--no-retry"],
    ] {
        let ended = relay.run(command).await;
        assert!(!ended.stdout.is_empty(), "{command:?} prints nothing: {ended:?}");
    }
    // A broker that refuses the login, one that does not exist, and one that is not a broker.
    let wrong = vhost.url_for("guest", SECRET, vhost.address());
    let http = format!("amqp://guest:{PASSWORD}@{}/v", relay.address());
    for url in [wrong, format!("amqp://guest:{PASSWORD}@127.0.0.1:1/v"), http] {
        let other = Setup::new(&url).set("log.filter", "trace,lapin=trace").set("broker.connect_timeout", "1s");
        let other = other.start().await;
        other.eventually_logs("not delivering").await;
        other.run(&["check"]).await;
        other.run(&["tail", "--count", "1"]).await;
    }
    for mistake in [format!("broker.password = [\"{PASSWORD}\"]"), format!("signature.secret = \"{SECRET}\"")] {
        let setup = Setup::new("amqp://127.0.0.1:1");
        let file = setup.file("mistake.toml", mistake);
        setup.run(&["--config", file.to_str().unwrap(), "serve"]).await;
    }
    eventually("the parked event to be listed", async || {
        let listed = relay.run(&["spool", "list"]).await;
        if listed.stdout.contains(&id[28..]) { Ok(()) } else { Err(listed.stdout) }
    })
    .await;
}
