//! The operators' listener, the alerts and dashboards, `top`, the logs, and the service manager.

use std::collections::BTreeSet;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use hyper::Method;
use serde_json::{Value, json};

use crate::harness::http::Raw;
use crate::harness::samples::{event, scan};
use crate::harness::{Answer, Client, Node, Relay, Setup, Vhost, eventually};

const TOKEN: &str = "a-token-that-is-long-enough";

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Runs promtool, which is in Debian's package `prometheus`.
fn promtool(arguments: &[&str], input: &str) -> (bool, String) {
    let program = std::env::var("PRISM_TEST_PROMTOOL").unwrap_or_else(|_| "promtool".to_owned());
    let mut tool = Command::new(&program)
        .args(arguments)
        .current_dir(root().join("deploy/prometheus"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{program} (tests/run.sh installs it): {error}"));
    std::io::Write::write_all(&mut tool.stdin.take().unwrap(), input.as_bytes()).unwrap();
    let output = tool.wait_with_output().unwrap();
    let text = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    (output.status.success(), text)
}

/// A relay that has set every metric.
async fn eventful(vhost: &Vhost) -> Relay {
    let relay = Relay::start(vhost).await;
    relay.post(scan(1)).await.expect(200);
    relay.post(scan(1)).await.expect(200);
    relay.post_with(&[], scan(2)).await.expect(401);
    Raw::exchange(relay.address(), "no HTTP\r\n\r\n").await;
    relay.eventually_nothing_pending().await;
    eventually("the counts of queues", async || match relay.metrics().await.contains("prism_relay_queue_messages{") {
        true => Ok(()),
        false => Err("none"),
    })
    .await;
    relay
}

/// The names of all metrics in the text format.
fn families(text: &str) -> BTreeSet<&str> {
    text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()).collect()
}

#[tokio::test]
async fn metrics_are_well_formed_and_documented() {
    let vhost = Vhost::new(Node::shared().await).await;
    let relay = eventful(&vhost).await;
    let text = relay.metrics().await;
    let (good, complaints) = promtool(&["check", "metrics"], &text);
    assert!(good && complaints.is_empty(), "{complaints}");
    let page = std::fs::read_to_string(root().join("deploy/reference.md")).unwrap();
    for name in families(&text) {
        let short = name.strip_prefix("prism_relay_").unwrap_or_else(|| panic!("{name} has another prefix"));
        let rows = [format!("| `{short}`"), format!("| `{short}{{")];
        assert!(rows.iter().any(|row| page.contains(row)), "{name} is not in the table of deploy/reference.md");
        assert!(text.contains(&format!("# HELP {name} ")), "{name} has no help text");
    }
    let open = [("accept", "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5")];
    let url = format!("{}/metrics", relay.ops());
    let answer = Client::http1().send(Method::GET, &url, &open, "").await.unwrap().expect(200);
    assert!(answer.header("content-type").unwrap().starts_with("application/openmetrics-text"));
    assert!(answer.text().ends_with("# EOF\n") && answer.text().contains("# TYPE prism_relay_webhooks counter\n"));
}

#[tokio::test]
async fn dashboards_and_alerts_name_only_existing_metrics() {
    let vhost = Vhost::new(Node::shared().await).await;
    let relay = eventful(&vhost).await;
    let text = relay.metrics().await;
    // This metric exists only with TLS.
    let families: BTreeSet<_> = families(&text).into_iter().chain(["prism_relay_tls_certificate_days_left"]).collect();
    let mut named = 0;
    for file in ["deploy/prometheus/prism-relay.rules.yml", "deploy/grafana/prism-relay.json"] {
        let content = std::fs::read_to_string(root().join(file)).unwrap();
        let words = content.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        for word in words.filter(|word| word.starts_with("prism_relay_")) {
            let family =
                ["_bucket", "_sum", "_count"].into_iter().find_map(|end| word.strip_suffix(end)).unwrap_or(word);
            assert!(families.contains(word) || families.contains(family), "{file} names {word}, which is not a metric");
            named += 1;
        }
    }
    assert!(named > 50, "{named}");
}

#[test]
fn alerts_pass_their_own_tests() {
    let (good, text) = promtool(&["check", "config", "prometheus.example.yml"], "");
    assert!(good, "{text}");
    let (good, text) = promtool(&["test", "rules", "prism-relay.tests.yml", "prism-relay.days.tests.yml"], "");
    assert!(good, "{text}");
}

async fn get(relay: &Relay, path: &str, headers: &[(&str, &str)]) -> Answer {
    Client::http1().send(Method::GET, &format!("{}{path}", relay.ops()), headers, "").await.unwrap()
}

async fn post(relay: &Relay, path: &str, headers: &[(&str, &str)]) -> Answer {
    Client::http1().send(Method::POST, &format!("{}{path}", relay.ops()), headers, "").await.unwrap()
}

#[tokio::test]
async fn the_latest_events_can_be_found_and_are_counted_by_type() {
    let vhost = Vhost::new(Node::shared().await).await;
    let relay = Relay::start(&vhost).await;
    let id = relay.post(scan(7)).await.id();
    relay.post(scan(8)).await.expect(200);
    relay.post("signed, and no event").await.expect(200);
    relay.eventually_nothing_pending().await;
    let found = get(&relay, "/api/events?find=scan-7", &[]).await.expect(200).json();
    let events = found["events"].as_array().unwrap();
    assert_eq!(events.len(), 1, "{found}");
    let event = &events[0];
    assert_eq!((&event["id"], &event["subject"]), (&json!(id), &json!("scan:scan-7")));
    assert_eq!((&event["status"], &event["type"]), (&json!("confirmed"), &json!("scan.processing.started")));
    assert!(event["settled_at"].is_string() && event.get("userToken").is_none(), "{event}");
    let all = get(&relay, "/api/events", &[]).await.json();
    assert_eq!((all["events"].as_array().unwrap().len(), &all["events"][0]["type"]), (3, &Value::Null), "{all}");
    let status = relay.status().await;
    assert_eq!(
        status["types"][0],
        json!({
            "type": "scan.processing.started", "accepted": 2, "last_seen": status["types"][0]["last_seen"],
        })
    );
    assert_eq!(status["secrets"][0]["verified"], 3);
    assert_eq!(status["timeline"][0]["what"], "connected");
    assert_eq!(relay.metric("prism_relay_events_total", &[("type", "other")]).await, 1.0);
    let point = eventually("a chart point with a webhook", async || {
        let history = get(&relay, "/api/history", &[]).await.json();
        let points = history["points"].as_array().unwrap().clone();
        points.into_iter().find(|point| point["accepted"].as_f64() > Some(0.0)).ok_or(history)
    });
    let point = point.await;
    assert!(point["lag_p50_ms"].as_u64() <= point["lag_p99_ms"].as_u64(), "{point}");
}

#[tokio::test]
async fn the_stream_sends_status_and_points() {
    let relay = Setup::without_broker().start().await;
    let address = relay.ops().strip_prefix("http://").unwrap().parse().unwrap();
    let mut raw = Raw::connect(address).await;
    raw.write("GET /api/stream HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n").await.unwrap();
    let first = raw.read_until(|bytes| String::from_utf8_lossy(bytes).contains("event: status\ndata: {")).await;
    // The last one keeps nginx from holding the events back.
    for header in ["content-type: text/event-stream", "x-accel-buffering: no"] {
        assert!(String::from_utf8_lossy(&first).contains(header), "{header}");
    }
    relay.post(scan(1)).await.expect(200);
    raw.read_until(|bytes| String::from_utf8_lossy(bytes).contains("\"accepted\":1,")).await;
    raw.read_until(|bytes| String::from_utf8_lossy(bytes).contains("event: point\ndata: {\"at\":")).await;
}

#[tokio::test]
async fn the_console_and_api_are_only_open_to_operators() {
    // On loopback: open with an IP address in Host, closed with an unknown name.
    let relay = Setup::without_broker().start().await;
    let foreign = [("host", "evil.example")];
    for path in ["/", "/api/status", "/api/events", "/api/parked", "/api/history", "/api/stream"] {
        assert_eq!(get(&relay, path, &foreign).await.status, 403, "{path}");
    }
    for path in ["/livez", "/readyz", "/metrics", "/console.js"] {
        get(&relay, path, &foreign).await.expect(200);
    }
    let page = get(&relay, "/", &[]).await.expect(200);
    assert!(page.header("content-security-policy").unwrap().contains("frame-ancestors 'none'"));
    assert!(page.text().contains("name=\"prism-token\" content=\"") && !page.text().contains("__ACTION_TOKEN__"));

    // On any other address: closed without a token.
    let exposed = Setup::without_broker().set("ops.listen", "0.0.0.0:0").start().await;
    exposed.eventually_logs("ops.token is not set").await;
    for path in ["/", "/api/status"] {
        let url = format!("{}{path}", exposed.ops().replace("0.0.0.0", "127.0.0.1"));
        let answer = Client::http1().get(&url).await.unwrap().expect(403);
        assert!(answer.text().contains("ops.token"), "{answer}");
    }
    let relay = Setup::without_broker().set("ops.listen", "0.0.0.0:0").set("ops.token", TOKEN).start().await;
    let url = |path: &str| format!("{}{path}", relay.ops().replace("0.0.0.0", "127.0.0.1"));
    let client = Client::http1();
    let bearer = format!("Bearer {TOKEN}");
    client.get(&url("/api/status")).await.unwrap().expect(401);
    for all in ["/api/parked/retry", "/api/parked/remove?count=0"] {
        client.send(Method::POST, &url(all), &[], "").await.unwrap().expect(401);
    }
    client.get(&url("/metrics")).await.unwrap().expect(200);
    assert_eq!(client.get(&url("/")).await.unwrap().expect(303).header("location"), Some("login"));
    client.send(Method::GET, &url("/api/status"), &[("authorization", &bearer)], "").await.unwrap().expect(200);
    let wrong = client.send(Method::POST, &url("/login"), &[], "token=wrong").await.unwrap().expect(303);
    assert_eq!((wrong.header("location"), wrong.header("set-cookie")), (Some("login?wrong"), None));
    let right = client.send(Method::POST, &url("/login"), &[], format!("token={TOKEN}")).await.unwrap().expect(303);
    let cookie = right.header("set-cookie").unwrap().to_owned();
    assert!(cookie.contains("HttpOnly") && cookie.contains("SameSite=Strict") && !cookie.contains(TOKEN), "{cookie}");
    let session = cookie.split(';').next().unwrap();
    client.send(Method::GET, &url("/"), &[("cookie", session)], "").await.unwrap().expect(200);
    client.send(Method::POST, &url("/login"), &[], "x".repeat(5000)).await.unwrap().expect(400);
    assert!(!relay.log_text().contains(TOKEN));
    let short = Setup::without_broker().set("ops.token", "short").run(&["serve"]).await;
    assert!(short.code == Some(64) && short.stderr.contains("ops.token: the value is shorter than 16"), "{short:?}");
}

#[tokio::test]
async fn only_the_consoles_own_page_acts_on_parked_events() {
    let vhost = Vhost::new(Node::shared().await).await;
    vhost.create_exchange("prism.webhooks", "topic", json!({})).await;
    let setup = Setup::new(&vhost.url()).set("topology.declare", "off").set("broker.parked_retry", "1h");
    let relay = setup.start().await;
    let id = relay.post(scan(1)).await.id();
    relay.eventually_parked(1).await;
    assert_eq!(
        relay.metric("prism_relay_publish_total", &[("outcome", "confirmed")]).await,
        0.0,
        "returned, not confirmed"
    );
    let parked = get(&relay, "/api/parked", &[]).await.expect(200).json();
    let entry = &parked["parked"][0];
    assert_eq!((&parked["total"], &entry["id"], &entry["subject"]), (&json!(1), &json!(id), &json!("scan:scan-1")));
    assert_eq!(entry["reason"], "no queue is bound for scan.processing.started");
    assert!(entry["tried_at"].is_string(), "{entry}");

    let page = get(&relay, "/", &[]).await.text();
    let token = page.split("name=\"prism-token\" content=\"").nth(1).and_then(|rest| rest.split('"').next()).unwrap();
    let own = [("x-prism-token", token), ("origin", relay.ops())];
    let path = |id: &str, action: &str| format!("/api/parked/{id}/{action}");
    post(&relay, &path(&id, "remove"), &[]).await.expect(403);
    post(&relay, &path(&id, "remove"), &[("x-prism-token", "guessed")]).await.expect(403);
    let elsewhere = [("x-prism-token", token), ("origin", "http://evil.example")];
    post(&relay, &path(&id, "remove"), &elsewhere).await.expect(403);
    for all in ["/api/parked/retry", "/api/parked/remove?count=1"] {
        post(&relay, all, &[]).await.expect(403);
        post(&relay, all, &[("x-prism-token", "guessed")]).await.expect(403);
        post(&relay, all, &elsewhere).await.expect(403);
    }
    post(&relay, "/api/parked/remove", &own).await.expect(400);
    post(&relay, "/api/parked/remove?count=2", &own).await.expect(409);
    post(&relay, &path("no-id", "remove"), &own).await.expect(404);
    post(&relay, &path(&uuid::Uuid::now_v7().to_string(), "retry"), &own).await.expect(404);
    post(&relay, &path(&id, "explode"), &own).await.expect(405);
    assert_eq!(relay.spool().await.parked, 1);

    // A retry is sent at once; RabbitMQ returns the event again, because no queue is bound.
    let returned = relay.metric("prism_relay_publish_total", &[("outcome", "returned")]).await;
    post(&relay, &path(&id, "retry"), &own).await.expect(200);
    relay.eventually_metric("prism_relay_publish_total", &[("outcome", "returned")], returned + 1.0).await;
    post(&relay, &path(&id, "remove"), &own).await.expect(200);
    let spool = relay.spool().await;
    assert_eq!((spool.parked, spool.removed, spool.lost), (0, 1, 0), "{spool:?}");
    post(&relay, &path(&id, "remove"), &own).await.expect(404);
    let events = get(&relay, "/api/events", &[]).await.json();
    assert_eq!(events["events"][0]["status"], "removed", "removed, not delivered: {events}");
    // A pending event cannot be removed.
    let waiting = Setup::without_broker().set("ops.token", TOKEN).start().await;
    let id = waiting.post(scan(2)).await.id();
    let bearer = format!("Bearer {TOKEN}");
    post(&waiting, &path(&id, "remove"), &[("authorization", &bearer)]).await.expect(404);
}

#[tokio::test]
async fn the_service_manager_is_notified() {
    let folder = crate::harness::scratch::Scratch::new();
    let path: PathBuf = folder.path().join("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let hear = || {
        let mut bytes = [0; 256];
        let count = socket.recv(&mut bytes).expect("a notification from the relay");
        String::from_utf8_lossy(&bytes[..count]).trim().to_owned()
    };
    let setup = Setup::without_broker().env("NOTIFY_SOCKET", path.to_str().unwrap()).env("WATCHDOG_USEC", "200000");
    let mut relay = setup.start().await;
    let first = [hear(), hear(), hear(), hear()];
    assert!(first.contains(&"READY=1".to_owned()), "{first:?}");
    assert!(first.iter().filter(|word| *word == "WATCHDOG=1").count() >= 2, "{first:?}");
    relay.sigterm();
    // Read everything: a full socket would block the relay.
    while hear() != "STOPPING=1" {}
    assert_eq!(relay.wait().await.code, Some(0));
}

#[tokio::test]
async fn top_shows_the_consoles_numbers() {
    let port = crate::harness::ports::free();
    let setup = Setup::without_broker().set("ops.listen", format!("127.0.0.1:{port}")).set("ops.token", TOKEN);
    let mut relay = setup.start().await;
    relay.post(scan(1)).await.expect(200);
    let top = relay.run(&["top", "--once"]).await;
    assert_eq!(top.code, Some(0), "{top:?}");
    for expected in ["RabbitMQ has been unreachable", "1 accepted = 0 confirmed + 1 pending", "scan.processing.started"]
    {
        assert!(top.stdout.contains(expected), "{expected:?} is not in {}", top.stdout);
    }
    let wrong = relay.run(&["top", "--url", relay.url()]).await;
    assert!(wrong.code == Some(1) && wrong.stderr.contains("answers 404"), "{wrong:?}");
    relay.kill9().await;
    let gone = relay.run(&["top", "--once"]).await;
    assert!(gone.code == Some(1) && gone.stderr.contains("no answer from"), "{gone:?}");
}

#[tokio::test]
async fn log_lines_are_json_with_stable_names_and_a_request_logs_none_at_info() {
    let vhost = Vhost::new(Node::shared().await).await;
    let relay = Setup::new(&vhost.url()).set("log.filter", "info").start().await;
    relay.eventually_logs("connected to the broker").await;
    let before = relay.logs().len();
    for number in 0..50 {
        // With every documented field: a missing one is logged, once.
        let payload = json!({ "scanId": format!("scan-{number}"), "userId": "u", "state": "PROCESSING" });
        relay.post(event("scan.processing.started", payload)).await.expect(200);
    }
    relay.eventually_metric("prism_relay_publish_total", &[("outcome", "confirmed")], 50.0).await;
    assert_eq!(relay.logs().len(), before, "{}", relay.log_text());
    let verbose = Setup::without_broker().set("log.filter", "prism_relay=debug").start().await;
    let id = verbose.post(scan(1)).await.id();
    verbose.post_with(&[], scan(2)).await.expect(401);
    let accepted = verbose.eventually_logs("\"message\":\"accepted\"").await;
    verbose.eventually_logs("more with this code").await;
    assert_eq!(accepted["id"], json!(id));
    for line in relay.logs().iter().chain(&verbose.logs()) {
        for name in ["timestamp", "level", "message", "target"] {
            assert!(line[name].is_string(), "{name} in {line}");
        }
    }
    let about_requests = verbose.logs().into_iter().filter(|line| line["target"] == "prism_relay::ingress");
    let messages: Vec<_> = about_requests.map(|line| line["message"].as_str().unwrap_or_default().to_owned()).collect();
    assert_eq!(messages[..2], ["accepted", "webhook refused"], "{messages:?}");
}
