//! Hostile and broken clients: their use of resources is limited, and honest clients are served meanwhile.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use futures_util::future::select_all;
use hyper::Method;
use serde_json::json;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::harness::http::{now, sign};
use crate::harness::samples::scan;
use crate::harness::{Client, Raw, Relay, SECRET, Setup, eventually};

/// No process listens here: no answer to a webhook may depend on the broker.
const REFUSED: &str = "prism_relay_connections_refused_total";
const CONNECTIONS: &str = "prism_relay_connections";

/// A signed webhook as text, with an event of its own.
fn webhook() -> String {
    let (body, timestamp) = (scan(fresh()), now());
    let signature = sign(SECRET, &timestamp, body.as_bytes());
    format!(
        "POST /webhooks/prism HTTP/1.1\r\nhost: relay\r\nprism-timestamp: {timestamp}\r\n\
         prism-signature: {signature}\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}

/// A number that was not there before.
fn fresh() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(1_000_000);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// A connection that has sent an event and got its 200.
async fn established(relay: &Relay) -> Raw {
    let mut raw = Raw::connect(relay.address()).await;
    raw.write(webhook()).await.unwrap();
    assert!(raw.read_until(|bytes| bytes.ends_with(b"}")).await.starts_with(b"HTTP/1.1 200 "));
    raw
}

/// Whether a request on this connection is answered.
async fn is_served(raw: &mut Raw) -> bool {
    if raw.write("GET /healthz HTTP/1.1\r\nhost: relay\r\n\r\n").await.is_err() {
        return false;
    }
    raw.read_until(|bytes| bytes.ends_with(b"}")).await.starts_with(b"HTTP/1.1 200 ")
}

async fn refused(relay: &Relay, reason: &str) -> f64 {
    relay.metric(REFUSED, &[("listener", "http"), ("reason", reason)]).await
}

async fn connections(relay: &Relay, state: &str) -> f64 {
    relay.metric(CONNECTIONS, &[("state", state)]).await
}

#[tokio::test]
async fn half_open_connections_are_evicted_the_newest_first_and_established_ones_stay() {
    let relay = Setup::without_broker().set("http.connections_max", 4).set("log.filter", "info").start().await;
    let mut sender = established(&relay).await;
    let mut half_open = Vec::new();
    for _ in 0..3 {
        half_open.push(Raw::connect(relay.address()).await);
    }
    relay.eventually_metric(CONNECTIONS, &[("state", "half-open")], 3.0).await;
    // Each connection has a second before it can be evicted.
    let opened = Instant::now();
    eventually("the second to pass", async || {
        let elapsed = opened.elapsed();
        if elapsed > Duration::from_millis(1100) { Ok(()) } else { Err(format!("{elapsed:?}")) }
    })
    .await;
    let mut newcomer = established(&relay).await;
    // The newest one is gone, the older ones are not.
    assert_eq!(half_open.pop().unwrap().read_to_end().await, b"");
    let [mut oldest, mut second]: [Raw; 2] = half_open.try_into().ok().unwrap();
    assert!(is_served(&mut second).await && is_served(&mut oldest).await);
    assert!(is_served(&mut sender).await && is_served(&mut newcomer).await);
    relay.eventually_metric(REFUSED, &[("listener", "http"), ("reason", "evicted")], 1.0).await;
    relay.eventually_logs("connection refused; more for this reason").await;
    assert_eq!(connections(&relay, "established").await, 4.0);

    // Known connections without an accepted event are evicted next.
    let third = established(&relay).await;
    assert_eq!(second.read_to_end().await, b"");
    let _fourth = established(&relay).await;
    assert_eq!(oldest.read_to_end().await, b"");

    // While all senders are trusted, the next connection waits until one leaves.
    let waiting = relay.sender();
    let waiting = tokio::spawn(async move { waiting.post(scan(1)).await });
    assert!(is_served(&mut sender).await && is_served(&mut newcomer).await);
    drop(third);
    waiting.await.unwrap().unwrap().expect(200);
    assert!(is_served(&mut sender).await);
}

#[tokio::test]
async fn a_flood_of_half_open_connections_costs_honest_senders_nothing_they_need() {
    // No connection times out while this runs.
    let setup = Setup::without_broker().set("http.connections_max", 100).set("http.header_timeout", "60s");
    let relay = setup.set("log.filter", "info").start().await;
    let mut sender = established(&relay).await;
    let mut flood = Vec::new();
    for number in 0..500 {
        let mut raw = Raw::connect(relay.address()).await;
        // Some say nothing, some begin.
        if number % 2 == 0 {
            let _ = raw.write("POST /webhooks/prism HTTP/1.1\r\nhost: ").await;
        }
        flood.push(raw);
        if number % 50 == 0 {
            relay.post(scan(number)).await.expect(200);
            let newcomer = Client::http1();
            let health = relay.url().replace("/webhooks/prism", "/healthz");
            newcomer.get(&health).await.unwrap().expect(200);
        }
    }
    assert!(is_served(&mut sender).await);
    eventually("the flood to be evicted", async || match refused(&relay, "evicted").await {
        enough if enough >= 390.0 => Ok(()),
        evicted => Err(evicted),
    })
    .await;
    // All are counted, one is logged.
    relay.eventually_logs("connection refused; more for this reason").await;
    let logged = relay.log_text().matches("connection refused; more for this reason").count();
    assert_eq!(logged, 1, "{}", relay.log_text());
}

#[tokio::test]
async fn a_source_has_its_own_limit_and_trusted_proxies_have_none() {
    let setup = || Setup::without_broker().set("http.connections_per_source_max", 3).set("log.filter", "info");
    let relay = setup().start().await;
    let (mut one, mut two) = (established(&relay).await, established(&relay).await);
    let mut idle = Raw::connect(relay.address()).await;
    relay.eventually_metric(CONNECTIONS, &[("state", "half-open")], 1.0).await;
    let mut three = established(&relay).await;
    assert_eq!(idle.read_to_end().await, b"", "the source's own half-open connection goes");
    // Now the source is refused at once, where the client can see it.
    let mut four = Raw::connect(relay.address()).await;
    assert_eq!(four.read_to_end().await, b"");
    assert_eq!(refused(&relay, "source-limit").await, 1.0);
    for raw in [&mut one, &mut two, &mut three] {
        assert!(is_served(raw).await);
    }
    drop(one);
    eventually("a place for this source", async || {
        let mut raw = Raw::connect(relay.address()).await;
        if is_served(&mut raw).await { Ok(()) } else { Err("refused") }
    })
    .await;

    let relay = setup().set("http.trusted_proxies", json!(["127.0.0.1"])).start().await;
    let mut crowd = Vec::new();
    for _ in 0..10 {
        crowd.push(established(&relay).await);
    }
    assert_eq!(refused(&relay, "source-limit").await, 0.0);
}

#[tokio::test]
async fn slow_bodies_that_use_up_the_memory_make_room_for_honest_ones() {
    let setup = Setup::without_broker().set("http.buffer_bytes_max", "64KiB").set("http.body_bytes_max", "32KiB");
    let relay = setup.set("http.body_timeout", "60s").set("log.filter", "info").start().await;
    let mut flood = Vec::new();
    for _ in 0..20 {
        let mut raw = Raw::connect(relay.address()).await;
        let head = "POST /webhooks/prism HTTP/1.1\r\nhost: relay\r\ncontent-length: 30000\r\n\r\n";
        raw.write(format!("{head}{}", "x".repeat(8000))).await.unwrap();
        flood.push(raw);
    }
    for number in 0..20 {
        relay.post(scan(number)).await.expect(200);
    }
    let displaced = relay.metric("prism_relay_webhooks_total", &[("outcome", "refused"), ("reason", "overloaded")]);
    assert!(displaced.await >= 10.0, "the flood is 160 KB");
    // The scheduler decides which of them came first and is evicted.
    let answers = flood.iter_mut().map(|raw| raw.read_until(|bytes| bytes.ends_with(b"}")).boxed());
    let answer = String::from_utf8(select_all(answers).await.0).unwrap();
    // A slow sender that is evicted can be Prism: its answer asks to try again.
    assert!(answer.starts_with("HTTP/1.1 503 ") && answer.contains("\"code\":\"overloaded\""), "{answer}");
    assert!(answer.contains("retry-after: 5"), "{answer}");
}

#[tokio::test]
async fn half_open_connections_do_not_hold_up_a_stop() {
    let mut relay = Setup::without_broker().set("shutdown.grace", "60s").set("log.filter", "info").start().await;
    let mut silent = Raw::connect(relay.address()).await;
    let mut begun = Raw::connect(relay.address()).await;
    begun.write("POST /webhooks/prism HTTP/1.1\r\n").await.unwrap();
    let mut idle = Raw::connect(relay.address()).await;
    assert!(is_served(&mut idle).await);
    relay.sigterm();
    for raw in [&mut silent, &mut begun, &mut idle] {
        raw.read_to_end().await;
    }
    assert_eq!(relay.wait().await.code, Some(0));
    assert!(!relay.log_text().contains("requests are still open"), "{}", relay.log_text());
}

#[tokio::test]
async fn the_limits_of_a_request_head_can_be_set() {
    let setup = Setup::without_broker().set("http.headers_max", 5).set("http.header_bytes_max", "8KiB");
    let relay = setup.start().await;
    let ask = |lines: &str| format!("GET /healthz HTTP/1.1\r\nhost: relay\r\nconnection: close\r\n{lines}\r\n");
    assert!(Raw::exchange(relay.address(), ask("a: b\r\nc: d\r\n")).await.starts_with("HTTP/1.1 200 "));
    assert!(Raw::exchange(relay.address(), ask(&"a: b\r\n".repeat(6))).await.starts_with("HTTP/1.1 431 "));
    let large = format!("a: {}\r\n", "b".repeat(9000));
    assert!(Raw::exchange(relay.address(), ask(&large)).await.starts_with("HTTP/1.1 431 "));
    let malformed = [("listener", "http"), ("reason", "malformed")];
    relay.eventually_metric(REFUSED, &malformed, 2.0).await;
}

/// Writes `chunk` again and again while it reads, until the relay closes the connection or `limit` bytes are written.
/// Returns whether it was closed.
async fn flood(relay: &Relay, start: Vec<u8>, mut chunk: impl FnMut(u32) -> Vec<u8>, limit: usize) -> bool {
    let (mut from, mut to) = TcpStream::connect(relay.address()).await.unwrap().into_split();
    let reading = tokio::spawn(async move { tokio::io::copy(&mut from, &mut tokio::io::sink()).await });
    let mut written = start.len();
    let mut closed = to.write_all(&start).await.is_err();
    for number in 0.. {
        if closed || written > limit {
            break;
        }
        let chunk = chunk(number);
        written += chunk.len();
        closed = to.write_all(&chunk).await.is_err();
    }
    closed = closed || reading.is_finished();
    drop(to);
    closed
}

fn rss_kib(relay: &Relay) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", relay.pid())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[tokio::test]
async fn floods_end_the_connection_and_take_no_memory() {
    const MIB: usize = 1024 * 1024;
    let relay = Setup::without_broker().set("log.filter", "info").start().await;
    relay.post(scan(0)).await.expect(200);
    let before = rss_kib(&relay);

    let head = "POST /webhooks/prism HTTP/1.1\r\nhost: relay\r\n";
    let header = |number: u32| format!("x-{number:06}: y\r\n").into_bytes();
    assert!(flood(&relay, head.into(), header, 32 * MIB).await, "a head without an end");
    let chunked = format!("{head}transfer-encoding: chunked\r\n\r\n");
    let extension = |_| "x".repeat(1000).into_bytes();
    assert!(flood(&relay, format!("{chunked}1;").into(), extension, 32 * MIB).await, "an extension without an end");
    assert!(flood(&relay, format!("{chunked}0\r\n").into(), header, 32 * MIB).await, "trailers without an end");
    let chunk = |_| format!("3e8\r\n{}\r\n", "x".repeat(1000)).into_bytes();
    assert!(flood(&relay, chunked.into(), chunk, 32 * MIB).await, "a body without an end");

    // A client that sends requests and reads no answer.
    let mut deaf = TcpStream::connect(relay.address()).await.unwrap();
    let requests = "GET /healthz HTTP/1.1\r\nhost: relay\r\n\r\n".repeat(100);
    let stuck = async { while deaf.write_all(requests.as_bytes()).await.is_ok() {} };
    // Writing blocks once the buffers between client and relay are full.
    let _ = timeout(Duration::from_secs(2), stuck).await;

    relay.post(scan(1)).await.expect(200);
    let grown = rss_kib(&relay).saturating_sub(before);
    assert!(grown < 32 * 1024, "{grown} KiB");
    assert!(relay.logs().len() < 20, "{}", relay.log_text());
}

#[tokio::test]
async fn a_client_that_reads_no_answer_is_closed() {
    let relay = Setup::without_broker().set("http.header_timeout", "1s").start().await;
    let mut deaf = TcpStream::connect(relay.address()).await.unwrap();
    let requests = "GET /healthz HTTP/1.1\r\nhost: relay\r\n\r\n".repeat(100);
    eventually("the end of the connection", async || {
        match timeout(Duration::from_millis(100), deaf.write_all(requests.as_bytes())).await {
            Ok(Err(_)) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    relay.eventually_metric(CONNECTIONS, &[], 0.0).await;
}

#[tokio::test]
async fn refusals_are_counted_and_logged_once_a_minute() {
    let relay = Setup::without_broker().set("log.filter", "info").start().await;
    let client = Client::http1();
    for number in 0..200 {
        let timestamp = now();
        let signature = sign("whsec_wrong", &timestamp, b"{}");
        let headers = [("prism-timestamp", timestamp.as_str()), ("prism-signature", signature.as_str())];
        client.send(Method::POST, relay.url(), &headers, "{}").await.unwrap().expect(401);
        client.send(Method::POST, relay.url(), &[], format!("{number}")).await.unwrap().expect(401);
        Raw::exchange(relay.address(), "neither HTTP nor anything\r\n\r\n").await;
    }
    let count = async |reason: &str| {
        relay.metric("prism_relay_webhooks_total", &[("outcome", "refused"), ("reason", reason)]).await
    };
    assert_eq!((count("invalid-signature").await, count("missing-signature").await), (200.0, 200.0));
    relay.eventually_metric(REFUSED, &[("listener", "http"), ("reason", "malformed")], 200.0).await;
    let logs = relay.logs();
    let logged = |text: &str| logs.iter().filter(|line| line["message"].as_str().unwrap().starts_with(text)).count();
    assert_eq!((logged("webhook refused"), logged("connection refused")), (2, 1), "{}", relay.log_text());
    assert!(!relay.log_text().contains("\"unreported\":0"), "a count of nothing is left out: {}", relay.log_text());
    // The secret in use is one of the few things that an attacker must not learn from a refusal.
    assert!(!relay.log_text().contains(SECRET));
}
