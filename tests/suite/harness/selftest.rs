//! Tests of the harness itself, so that a failure elsewhere is a failure of the relay.

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use futures_util::FutureExt;
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use lapin::BasicProperties;
use lapin::types::FieldTable;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::eventually::{eventually, eventually_within, poll};
use super::http::{sign, tls_config};
use super::leash::{self, Leash};
use super::marks::{API_KEY, HEALTH};
use super::relay::sum;
use super::scratch::Scratch;
use super::{Answer, Client, Delivery, Node, PrismApi, Raw, SECRET, Setup, Trouble, Vhost, Wire};

// -- waiting ----------------------------------------------------------------------------------------------------------

#[tokio::test]
async fn eventually_returns_the_value_or_reports_what_was_last_seen() {
    let mut probes = 0;
    let third = eventually("the third probe", async || {
        probes += 1;
        if probes == 3 { Ok(probes) } else { Err(probes) }
    });
    assert_eq!(third.await, 3);

    let never = eventually_within(Duration::from_millis(60), "a miracle", async || Err::<(), _>("none"));
    let panic = std::panic::AssertUnwindSafe(never).catch_unwind().await.unwrap_err();
    assert_eq!(panic.downcast_ref::<String>().unwrap(), "timed out waiting for: a miracle; last seen: none");

    let hangs = poll(Duration::from_millis(60), async || std::future::pending::<Result<(), &str>>().await);
    assert_eq!(hangs.await.unwrap_err(), "nothing (then a probe that did not end)");
}

// -- Prism's API ------------------------------------------------------------------------------------------------------

#[tokio::test]
async fn the_stand_in_for_prisms_api_answers_with_tls_key_and_version_and_makes_trouble() {
    let api = PrismApi::start();
    api.scan("scan-1", "READY");
    let client = Client::tls(tls_config(Some(&api.authority()), None));
    let get = async |path: &str, key: &str, accept: &str| {
        let (url, key) = (format!("{}{path}", api.url()), format!("Bearer {key}"));
        client.send(hyper::Method::GET, &url, &[("authorization", &key), ("accept", accept)], "").await.unwrap()
    };
    let version = "application/json;v=1";
    let scan = get("/scans/scan-1", API_KEY, version).await.expect(200).json();
    assert_eq!((&scan["id"], &scan["status"], &scan["weight"]), (&json!("scan-1"), &json!("READY"), &json!(HEALTH)));
    get("/scans/scan-1", "another-key", version).await.expect(401);
    get("/scans/scan-1", API_KEY, "application/json").await.expect(406);
    get("/scans/scan-2", API_KEY, version).await.expect(404);
    api.set_trouble(Trouble::TooMany(7));
    let limited = get("/scans/scan-1", API_KEY, version).await.expect(429);
    assert_eq!(limited.header("retry-after"), Some("7"));
    api.set_trouble(Trouble::Huge);
    assert!(get("/scans/scan-1", API_KEY, version).await.expect(200).body.len() > 3 * 1024 * 1024);
    api.set_trouble(Trouble::Garbage);
    assert!(serde_json::from_slice::<Value>(&get("/scans/scan-1", API_KEY, version).await.expect(200).body).is_err());
    api.set_trouble(Trouble::Silence);
    let silent = get("/scans/scan-1", API_KEY, version);
    let (answer, ()) = tokio::join!(silent, async {
        api.eventually_asked("/scans/scan-1", 7).await;
        api.set_trouble(Trouble::AnotherId);
    });
    assert_eq!(answer.expect(200).json()["id"], "another-id");
    assert_eq!((api.requests(), api.most_at_a_time()), (8, 1));
}

// -- processes --------------------------------------------------------------------------------------------------------

/// Set for the copy of this test binary that [`a_killed_test_process_leaves_nothing_behind`] kills.
const SACRIFICE: &str = "PRISM_TEST_SACRIFICE";

#[tokio::test]
async fn a_killed_test_process_leaves_nothing_behind() {
    let mut copy = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "harness::selftest::sacrifice", "--nocapture"])
        .env(SACRIFICE, "1")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(copy.stdout.take().unwrap()).lines().map(Result::unwrap);
    let line = lines.find_map(|line| line.split_once("leashed ").map(|(_, rest)| rest.to_owned())).unwrap();
    let (pid, folder) = line.split_once(' ').unwrap();
    let pid: u32 = pid.parse().unwrap();
    assert!(lives(pid) && Path::new(folder).exists());

    copy.kill().unwrap();
    copy.wait().unwrap();
    eventually("the end of the leashed process", async || if lives(pid) { Err("it still runs") } else { Ok(()) }).await;
    eventually(
        "the removal of the folder",
        async || if Path::new(folder).exists() { Err("it still exists") } else { Ok(()) },
    )
    .await;
}

/// Does something only in the copy of this program that is killed.
#[test]
fn sacrifice() {
    if std::env::var_os(SACRIFICE).is_some() {
        let folder = Scratch::new();
        let mut command = leash::command("sleep");
        command.arg("1000");
        let leash = Leash::start(command);
        println!("leashed {} {}", leash.pid(), folder.path().display());
        loop {
            std::thread::park();
        }
    }
}

#[tokio::test]
async fn a_leash_reports_the_exit_and_kills_a_running_process_when_dropped() {
    let mut command = leash::command("/bin/sh");
    command.args(["-c", "exit 7"]);
    let mut leash = Leash::start(command);
    let status = eventually("an exit", async || leash.exited().ok_or("none")).await;
    assert_eq!(status.code(), Some(7));
    leash.signal("TERM"); // Sends nothing to a process that has ended.

    let mut command = leash::command("sleep");
    command.arg("1000");
    let mut leash = Leash::start(command);
    let pid = leash.pid();
    leash.signal("STOP");
    assert!(lives(pid));
    drop(leash);
    assert!(!lives(pid));
}

// -- HTTP -------------------------------------------------------------------------------------------------------------

#[tokio::test]
async fn http_sends_requests_and_raw_bytes() {
    let address = serve_echo().await;
    let url = format!("http://{address}/path");
    let sent = Client::http1().send(hyper::Method::POST, &url, &[("x-test", "yes")], "{\"a\": 1}").await.unwrap();
    assert_eq!(sent.header("x-seen"), Some("POST /path HTTP/1.1 yes"));
    assert_eq!(sent.expect(200).json(), json!({"a": 1}));
    let text = Raw::exchange(address, "GET /path HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await;
    assert!(text.starts_with("HTTP/1.1 200 OK\r\n"), "{text}");

    let unused = SocketAddr::from(([127, 0, 0, 1], super::ports::free()));
    let refused = Client::http1().get(&format!("http://{unused}/")).await.unwrap_err();
    assert!(refused.contains("refused"), "{refused}");
}

#[test]
fn sign_agrees_with_the_vectors_of_the_vendor() {
    let vectors: Vec<Value> =
        serde_json::from_str(include_str!("../../../deploy/workers/vectors/signatures.json")).unwrap();
    for vector in vectors {
        let text = |name: &str| vector[name].as_str().unwrap();
        let signature = sign(text("secret"), text("prism-timestamp"), text("body").as_bytes());
        assert_eq!(signature == text("prism-signature"), vector["valid"] == true, "{vector}");
    }
}

#[test]
#[allow(clippy::float_cmp, reason = "small whole numbers are exact")]
fn metrics_are_summed_by_labels() {
    let text = "# TYPE m counter\nm{outcome=\"a\",reason=\"x\"} 2\nm{outcome=\"a\",reason=\"y\"} 3\n\
                m{outcome=\"b\"} 4\nm_more 9\n";
    assert_eq!(sum(text, "m", &[("outcome", "a")]), 5.0);
    assert_eq!(sum(text, "m", &[]), 9.0);
    assert_eq!(sum(text, "m_more", &[]), 9.0);
    assert_eq!(sum(text, "none", &[]), 0.0);
}

// -- configuration ----------------------------------------------------------------------------------------------------

#[test]
fn a_setup_is_valid_toml() {
    let setup = Setup::new("amqp://guest:guest@127.0.0.1:1/%2f")
        .set("topology.queues", json!([{"name": "q\"\\", "bindings": ["a.#", "b.*"]}]))
        .set("dedupe.entries_max", 7)
        .set("signature.required", false)
        .unset("log.filter");
    let parsed: Value = config::Config::builder()
        .add_source(config::File::from_str(&setup.toml(), config::FileFormat::Toml))
        .build()
        .and_then(config::Config::try_deserialize)
        .unwrap();
    assert_eq!(parsed["topology"]["queues"], json!([{"name": "q\"\\", "bindings": ["a.#", "b.*"]}]));
    assert_eq!(parsed["dedupe"]["entries_max"], 7);
    assert_eq!(parsed["signature"], json!({"required": false, "secrets": [SECRET]}));
    assert_eq!(parsed["log"], json!({"format": "json"}));
    assert_eq!(parsed["spool"]["path"], setup.spool().to_str().unwrap());
}

// -- the wire ---------------------------------------------------------------------------------------------------------

#[tokio::test]
async fn a_wire_can_be_cut_refused_and_stalled() {
    let mut wire = Wire::new(listen_and_echo().await);
    let mut raw = Raw::connect(wire.address()).await;
    raw.write("one").await.unwrap();
    assert_eq!(raw.read(3).await, b"one");
    assert_eq!(wire.connections(), 1);

    for stall in [Wire::stall, Wire::stall_answers] {
        stall(&wire);
        raw.write("two").await.unwrap();
        let silence = tokio::time::timeout(Duration::from_millis(100), raw.read(3)).await;
        assert!(silence.is_err(), "{silence:?}");
        wire.flow();
        assert_eq!(raw.read(3).await, b"two");
    }

    wire.refuse().await;
    let refused = tokio::net::TcpStream::connect(wire.address()).await.unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
    raw.write("three").await.unwrap();
    assert_eq!(raw.read(5).await, b"three");

    wire.cut();
    assert_eq!(raw.read_to_end().await, b"");
    super::eventually_equal("no connection", 0, async || wire.connections()).await;
    wire.accept();
    let mut raw = Raw::connect(wire.address()).await;
    raw.write("four").await.unwrap();
    assert_eq!(raw.read(4).await, b"four");
}

// -- nodes ------------------------------------------------------------------------------------------------------------

#[tokio::test]
async fn a_vhost_has_queues_of_its_own() {
    let node = Node::shared().await;
    let vhost = Vhost::new(node).await;
    vhost.create_exchange("events", "topic", json!({})).await;
    vhost.create_queue("all", json!({"x-queue-type": "quorum"})).await;
    vhost.bind("events", "all", "#").await;
    assert_eq!(vhost.bindings().await, [("events".into(), "all".into(), "#".into())]);
    assert_eq!(vhost.queue("all").await.unwrap()["arguments"], json!({"x-queue-type": "quorum"}));
    assert_eq!(vhost.exchange("events").await.unwrap()["type"], "topic");
    assert!(vhost.exchange("none").await.is_none());

    let mut headers = FieldTable::default();
    headers.insert("prism-state".into(), lapin::types::AMQPValue::LongString("READY".into()));
    let properties = BasicProperties::default().with_message_id("id-0".into()).with_headers(headers);
    vhost.publish_with("events", "scan.0", "0", properties).await;
    for number in 1..5 {
        vhost.publish("events", &format!("scan.{number}"), number.to_string()).await;
    }
    vhost.eventually_depth("all", 5).await;
    let first = vhost.messages("all", 2).await;
    assert_eq!(first.iter().map(Delivery::text).collect::<Vec<_>>(), ["0", "1"]);
    assert_eq!((first[0].id().as_str(), first[0].header("prism-state")), ("id-0", "READY"));
    assert_eq!((first[1].exchange.as_str(), first[1].routing_key.as_str()), ("events", "scan.1"));
    let rest = vhost.messages("all", 3).await;
    assert!(rest.iter().all(|message| !message.redelivered), "a message was delivered before and not acknowledged");
    vhost.assert_empty("all").await;

    vhost.publish("events", "more", "").await;
    vhost.purge_queue("all").await;
    vhost.assert_empty("all").await;
    assert!(vhost.delete_queue("all").await && vhost.delete_exchange("events").await);
    assert!(!vhost.delete_queue("all").await);
}

#[tokio::test]
async fn an_operator_can_close_connections_and_change_rights() {
    let node = Node::shared().await;
    let vhost = Vhost::new(node).await;
    let connection = vhost.connect().await;
    eventually("the API to show the connection", async || match vhost.close_connections().await {
        1 => Ok(()),
        other => Err(other),
    })
    .await;
    eventually(
        "the connection to be closed",
        async || if connection.status().connected() { Err("connected") } else { Ok(()) },
    )
    .await;

    vhost.set_policy("tight", ".*", json!({"max-length": 1})).await;
    assert!(vhost.delete_policy("tight").await);

    let user = format!("user{}", uuid::Uuid::now_v7().simple());
    node.create_user(&user, "secret").await;
    vhost.permit(&user, "", "", "").await;
    let url = vhost.url_for(&user, "secret", vhost.address());
    let connection = lapin::Connection::connect(&url, lapin::ConnectionProperties::default()).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    let denied =
        channel.queue_declare("q".into(), lapin::options::QueueDeclareOptions::durable(), FieldTable::default());
    assert!(denied.await.unwrap_err().to_string().contains("ACCESS_REFUSED"));

    let name = vhost.name().to_owned();
    drop(vhost);
    assert!(!node.delete_vhost(&name).await, "dropping the vhost did not delete it");
}

#[tokio::test]
async fn a_node_can_be_frozen_killed_and_started_again() {
    let node = Node::start().await;
    let folder = node.folder().to_owned();
    let vhost = Vhost::new(&node).await;
    vhost.create_queue("durable", json!({"x-queue-type": "quorum"})).await;
    vhost.publish("", "durable", "kept").await;

    node.freeze();
    let frozen = tokio::time::timeout(Duration::from_millis(300), overview(&node)).await;
    assert!(frozen.is_err(), "a frozen node answered");
    node.thaw();
    overview(&node).await.expect(200);

    let connection = vhost.connect().await;
    node.memory_alarm(true).await;
    // RabbitMQ blocks a connection at its first publish.
    let publishing = Box::pin(vhost.publish("", "durable", "held"));
    let held = tokio::time::timeout(Duration::from_millis(500), publishing).await;
    assert!(held.is_err(), "a node with a memory alarm confirmed a publish");
    node.memory_alarm(false).await;
    connection.close(200, "done".into()).await.unwrap();
    vhost.messages("durable", 1).await;
    vhost.publish("", "durable", "kept again").await;

    node.kill().await;
    assert!(node.management().call(hyper::Method::GET, "overview", &Value::Null).await.is_err());
    node.start_again().await;
    vhost.messages("durable", 1).await;

    drop(vhost);
    assert!(processes_in(&folder).len() >= 2, "the search misses processes of the node: {:?}", processes_in(&folder));
    drop(node);
    super::eventually_equal("no process of the node", Vec::<u32>::new(), async || processes_in(&folder)).await;
    assert!(!folder.exists());
}

async fn overview(node: &Node) -> Answer {
    node.management().call(hyper::Method::GET, "overview", &Value::Null).await.unwrap()
}

// -- helpers ----------------------------------------------------------------------------------------------------------

/// Whether a process runs. A zombie has ended: only its parent has not reaped it yet.
fn lives(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with(['Z', 'X']))
}

/// The processes whose environment contains the name of `folder`, which is the same inside a root tree.
fn processes_in(folder: &Path) -> Vec<u32> {
    let name = folder.file_name().unwrap().as_encoded_bytes();
    let pids = fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    pids.filter(|pid| {
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        lives(*pid) && environment.windows(name.len()).any(|window| window == name)
    })
    .collect()
}

/// A TCP server that echoes every byte.
async fn listen_and_echo() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut buffer = [0; 1024];
                while let Ok(count @ 1..) = stream.read(&mut buffer).await {
                    stream.write_all(&buffer[..count]).await.unwrap();
                }
            });
        }
    });
    address
}

/// An HTTP server that echoes the body, and describes the request in the header `x-seen`.
async fn serve_echo() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let service = service_fn(async |request: Request<Incoming>| {
                let (method, path, version) = (request.method(), request.uri().path(), request.version());
                let header = request.headers().get("x-test").and_then(|value| value.to_str().ok()).unwrap_or("-");
                let seen = format!("{method} {path} {version:?} {header}");
                let body = http_body_util::BodyExt::collect(request.into_body()).await?.to_bytes();
                Ok::<_, hyper::Error>(
                    Response::builder().header("x-seen", seen).body(Full::<Bytes>::new(body)).unwrap(),
                )
            });
            let server = hyper::server::conn::http1::Builder::new();
            tokio::spawn(async move { server.serve_connection(TokioIo::new(stream), service).await.unwrap() });
        }
    });
    address
}
