//! Clients that want to do harm, or are broken: what they can take is limited, and honest ones are served meanwhile.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use futures_util::future::select_all;
use hyper::Method;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::harness::http::{now, sign};
use crate::harness::{Client, Raw, Relay, SECRET, Setup, eventually};

/// Nobody listens here: no answer to a webhook may depend on the broker.
const NO_BROKER: &str = "amqp://guest:guest@127.0.0.1:1/%2f";

const REFUSED: &str = "prism_relay_connections_refused_total";
const CONNECTIONS: &str = "prism_relay_connections";

fn event(number: usize) -> String {
    format!(
        r#"{{"eventType":"scan.processing.started","payload":{{"userToken":"partner-user-42","scanId":"{number}"}}}}"#
    )
}

/// A signed webhook as text, with an event of its own.
fn webhook() -> String {
    let (body, timestamp) = (event(fresh()), now());
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

async fn census(relay: &Relay, state: &str) -> f64 {
    relay.metric(CONNECTIONS, &[("state", state)]).await
}

#[tokio::test]
async fn half_open_connections_give_way_the_newest_first_and_established_ones_stay() {
    let relay = Setup::new(NO_BROKER).set("http.connections_max", 4).set("log.filter", "info").start().await;
    let mut sender = established(&relay).await;
    let mut half_open = Vec::new();
    for _ in 0..3 {
        half_open.push(Raw::connect(relay.address()).await);
    }
    relay.eventually_metric(CONNECTIONS, &[("state", "half-open")], 3.0).await;
    // Each has a second, whoever comes.
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
    assert_eq!(refused(&relay, "evicted").await, 1.0);
    relay.eventually_logs("connection refused; further ones of this kind").await;
    assert_eq!(census(&relay, "established").await, 4.0);

    // Whoever has sent no event yet goes next, although there were answers.
    let third = established(&relay).await;
    assert_eq!(second.read_to_end().await, b"");
    let _fourth = established(&relay).await;
    assert_eq!(oldest.read_to_end().await, b"");

    // Where everybody is trusted, the next one waits until somebody leaves.
    let waiting = relay.sender();
    let waiting = tokio::spawn(async move { waiting.post(event(1)).await });
    assert!(is_served(&mut sender).await && is_served(&mut newcomer).await);
    drop(third);
    waiting.await.unwrap().unwrap().expect(200);
    assert!(is_served(&mut sender).await);
}

#[tokio::test]
async fn a_flood_of_half_open_connections_costs_honest_senders_nothing_they_need() {
    // Nobody is timed out while this runs.
    let setup = Setup::new(NO_BROKER).set("http.connections_max", 100).set("http.header_timeout", "60s");
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
            relay.post(event(number)).await.expect(200);
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
    // Counted all, told of once.
    relay.eventually_logs("connection refused; further ones of this kind").await;
    let told = relay.log_text().matches("connection refused; further ones of this kind").count();
    assert_eq!(told, 1, "{}", relay.log_text());
}

#[tokio::test]
async fn a_source_has_its_own_limit_and_trusted_proxies_have_none() {
    let setup = || Setup::new(NO_BROKER).set("http.connections_per_source_max", 3).set("log.filter", "info");
    let relay = setup().start().await;
    let (mut one, mut two) = (established(&relay).await, established(&relay).await);
    let mut idle = Raw::connect(relay.address()).await;
    relay.eventually_metric(CONNECTIONS, &[("state", "half-open")], 1.0).await;
    let mut three = established(&relay).await;
    assert_eq!(idle.read_to_end().await, b"", "the source's own half-open connection goes");
    // From now on the source is told no at once, so that it can be seen.
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
async fn slow_bodies_that_take_up_the_memory_make_room_for_honest_ones() {
    let setup = Setup::new(NO_BROKER).set("http.buffer_bytes_max", "64KiB").set("http.body_bytes_max", "32KiB");
    let relay = setup.set("http.body_timeout", "60s").set("log.filter", "info").start().await;
    let mut flood = Vec::new();
    for _ in 0..20 {
        let mut raw = Raw::connect(relay.address()).await;
        let head = "POST /webhooks/prism HTTP/1.1\r\nhost: relay\r\ncontent-length: 30000\r\n\r\n";
        raw.write(format!("{head}{}", "x".repeat(8000))).await.unwrap();
        flood.push(raw);
    }
    for number in 0..20 {
        relay.post(event(number)).await.expect(200);
    }
    let displaced = relay.metric("prism_relay_webhooks_total", &[("outcome", "refused"), ("reason", "overloaded")]);
    assert!(displaced.await >= 10.0, "the flood is 160 KB");
    // Who of them came in first, and has to go, is up to the scheduler.
    let answers = flood.iter_mut().map(|raw| raw.read_until(|bytes| bytes.ends_with(b"}")).boxed());
    let answer = String::from_utf8(select_all(answers).await.0).unwrap();
    // Prism's own, should it be slow and displaced, is told to come back.
    assert!(answer.starts_with("HTTP/1.1 503 ") && answer.contains("\"code\":\"overloaded\""), "{answer}");
    assert!(answer.contains("retry-after: 5"), "{answer}");
}

#[tokio::test]
async fn half_open_connections_do_not_hold_up_a_stop() {
    let mut relay = Setup::new(NO_BROKER).set("shutdown.grace", "60s").set("log.filter", "info").start().await;
    let mut silent = Raw::connect(relay.address()).await;
    let mut begun = Raw::connect(relay.address()).await;
    begun.write("POST /webhooks/prism HTTP/1.1\r\n").await.unwrap();
    let mut deaf = Raw::connect(relay.address()).await;
    deaf.write([preface(&[]), frame(HEADERS, END_STREAM | END_HEADERS, 1, GET_ROOT)].concat()).await.unwrap();
    deaf.read_until(|bytes| frames(bytes).iter().any(|(kind, ..)| *kind == DATA)).await;
    relay.sigterm();
    for raw in [&mut silent, &mut begun, &mut deaf] {
        raw.read_to_end().await;
    }
    assert_eq!(relay.wait().await.code, Some(0));
    assert!(!relay.log_text().contains("requests that are still under way"), "{}", relay.log_text());
}

#[tokio::test]
async fn the_limits_of_a_request_head_can_be_set() {
    let setup = Setup::new(NO_BROKER).set("http.headers_max", 5).set("http.header_bytes_max", "8KiB");
    let relay = setup.start().await;
    let ask = |lines: &str| format!("GET /healthz HTTP/1.1\r\nhost: relay\r\nconnection: close\r\n{lines}\r\n");
    assert!(Raw::exchange(relay.address(), ask("a: b\r\nc: d\r\n")).await.starts_with("HTTP/1.1 200 "));
    assert!(Raw::exchange(relay.address(), ask(&"a: b\r\n".repeat(6))).await.starts_with("HTTP/1.1 431 "));
    let large = format!("a: {}\r\n", "b".repeat(9000));
    assert!(Raw::exchange(relay.address(), ask(&large)).await.starts_with("HTTP/1.1 431 "));
    let malformed = [("listener", "http"), ("reason", "malformed")];
    relay.eventually_metric(REFUSED, &malformed, 2.0).await;
    // HTTP/2 compresses its headers: six of them are six bytes.
    let many = [GET_ROOT, b"\x90".repeat(6).as_slice()].concat();
    let mut raw = Raw::connect(relay.address()).await;
    raw.write([preface(&[]), frame(HEADERS, END_STREAM | END_HEADERS, 1, &many)].concat()).await.unwrap();
    let answered = |bytes: &[u8]| frames(bytes).iter().any(|(kind, ..)| *kind == HEADERS);
    let answer = frames(&raw.read_until(answered).await);
    let (.., head) = answer.iter().find(|(kind, ..)| *kind == HEADERS).unwrap();
    // `:status` 431, as a literal behind the index of the name (RFC 7541, section 6.2), Huffman-coded.
    assert!(!head.starts_with(b"\x88"), "not the index of `:status 200`: {head:?}");
}

// -- HTTP/2, frame by frame (RFC 9113, section 4.1) -------------------------------------------------------------------

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const CONTINUATION: u8 = 9;

const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

/// GET http://relay/ in HPACK's static table (RFC 7541, appendix A), but for the authority.
const GET_ROOT: &[u8] = b"\x82\x86\x84\x01\x05relay";
/// The same with POST.
const POST_ROOT: &[u8] = b"\x83\x86\x84\x01\x05relay";

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let mut frame = vec![length[1], length[2], length[3], kind, flags];
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// The preface with these settings, each an identifier and a value.
fn preface(settings: &[(u16, u32)]) -> Vec<u8> {
    let setting = |(id, value): &(u16, u32)| [id.to_be_bytes().to_vec(), value.to_be_bytes().to_vec()].concat();
    let settings: Vec<u8> = settings.iter().flat_map(setting).collect();
    [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(), frame(SETTINGS, 0, 0, &settings)].concat()
}

/// What has come, as the kinds of the frames, their streams and their payloads.
fn frames(mut bytes: &[u8]) -> Vec<(u8, u32, Vec<u8>)> {
    let mut frames = Vec::new();
    while let [a, b, c, kind, _, s1, s2, s3, s4, rest @ ..] = bytes {
        let length = u32::from_be_bytes([0, *a, *b, *c]) as usize;
        let Some((payload, rest)) = rest.split_at_checked(length) else { break };
        frames.push((*kind, u32::from_be_bytes([*s1, *s2, *s3, *s4]), payload.to_vec()));
        bytes = rest;
    }
    frames
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
async fn floods_of_http_2_frames_end_the_connection_or_cost_no_memory() {
    const MIB: usize = 1024 * 1024;
    let relay = Setup::new(NO_BROKER).set("log.filter", "info").start().await;
    relay.post(event(0)).await.expect(200);
    let before = rss_kib(&relay);

    // Streams that are reset at once (CVE-2023-44487).
    let resets = |number: u32| {
        let stream = number * 2 + 1;
        [frame(HEADERS, END_STREAM | END_HEADERS, stream, GET_ROOT), frame(RST_STREAM, 0, stream, &[0, 0, 0, 8])]
            .concat()
    };
    assert!(flood(&relay, preface(&[]), resets, 32 * MIB).await, "rapid resets end the connection");
    // Header blocks without an end (CVE-2024-27316).
    let endless = [preface(&[]), frame(HEADERS, END_STREAM, 1, GET_ROOT)].concat();
    let header = |number: u32| frame(CONTINUATION, 0, 1, format!("\0\x08x-{number:06}\x01y").as_bytes());
    assert!(flood(&relay, endless, header, 32 * MIB).await, "a head without an end ends the connection");
    // Frames that each want an answer, from a client that reads them, and from one that does not.
    let asking = [frame(SETTINGS, 0, 0, &[]), frame(PING, 0, 0, b"12345678")].concat().repeat(100);
    flood(&relay, preface(&[]), |_| asking.clone(), 8 * MIB).await;
    // Answers to pings that nobody has sent.
    let answers = frame(PING, 1, 0, b"12345678").repeat(100);
    flood(&relay, preface(&[]), |_| answers.clone(), MIB).await;
    let mut deaf = TcpStream::connect(relay.address()).await.unwrap();
    deaf.write_all(&preface(&[])).await.unwrap();
    let stuck = async { while deaf.write_all(&asking).await.is_ok() {} };
    // It ends when the relay has had enough, or hangs when the buffers in between are full.
    let _ = timeout(Duration::from_secs(2), stuck).await;

    relay.post(event(1)).await.expect(200);
    let grown = rss_kib(&relay).saturating_sub(before);
    assert!(grown < 32 * 1024, "{grown} KiB");
    assert!(relay.logs().len() < 20, "{}", relay.log_text());
}

#[tokio::test]
async fn streams_beyond_the_limit_are_refused_and_the_others_served() {
    let relay = Setup::new(NO_BROKER).set("http.streams_max", 2).start().await;
    let mut raw = Raw::connect(relay.address()).await;
    let open = |stream| frame(HEADERS, END_HEADERS, stream, POST_ROOT);
    raw.write([preface(&[]), open(1), open(3), open(5)].concat()).await.unwrap();
    let third = |bytes: &[u8]| frames(bytes).iter().any(|(kind, stream, _)| (*kind, *stream) == (RST_STREAM, 5));
    let mut answers = raw.read_until(third).await;
    let refused = frames(&answers);
    let reset = refused.iter().find(|(kind, ..)| *kind == RST_STREAM).unwrap();
    assert_eq!(reset.2, [0, 0, 0, 7], "REFUSED_STREAM (RFC 9113, section 7): it can be sent again");
    raw.write([frame(DATA, END_STREAM, 1, b""), frame(DATA, END_STREAM, 3, b"")].concat()).await.unwrap();
    let both = |bytes: &[u8]| frames(bytes).iter().filter(|(kind, ..)| *kind == HEADERS).count() == 2;
    answers.extend(raw.read_until(|more| both(&[&answers, more].concat())).await);
    assert!(both(&answers), "{answers:?}");
}

#[tokio::test]
async fn http_2_connections_that_ask_for_nothing_are_closed() {
    let relay = Setup::new(NO_BROKER).set("http.header_timeout", "2s").start().await;
    // This client answers every ping.
    let client = Client::http2();
    let health = relay.url().replace("/webhooks/prism", "/healthz");
    client.get(&health).await.unwrap().expect(200);
    relay.eventually_metric(CONNECTIONS, &[("state", "established")], 0.0).await;
    client.get(&health).await.unwrap().expect(200);

    // One that keeps busy without ever sending a request.
    let mut slow = TcpStream::connect(relay.address()).await.unwrap();
    slow.write_all(&preface(&[])).await.unwrap();
    eventually("the end of a connection without a request", async || {
        let _ = slow.write_all(&frame(PING, 0, 0, b"12345678")).await;
        let mut bytes = [0; 1024];
        match timeout(Duration::from_millis(10), slow.read(&mut bytes)).await {
            Ok(Ok(0) | Err(_)) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;

    // One that does not let the answer through.
    let mut closed = Raw::connect(relay.address()).await;
    let no_window = (4, 0);
    closed
        .write([preface(&[no_window]), frame(HEADERS, END_STREAM | END_HEADERS, 1, GET_ROOT)].concat())
        .await
        .unwrap();
    let end = frames(&closed.read_to_end().await);
    assert!(end.iter().any(|(kind, ..)| *kind == GOAWAY), "{end:?}");
    relay.eventually_metric(CONNECTIONS, &[], 0.0).await;
    assert_eq!(refused(&relay, "timeout").await, 1.0, "who was served and then idle is not counted");
}

#[tokio::test]
async fn what_is_refused_is_counted_and_told_of_once_a_minute() {
    let relay = Setup::new(NO_BROKER).set("log.filter", "info").start().await;
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
    let told = |text: &str| logs.iter().filter(|line| line["message"].as_str().unwrap().starts_with(text)).count();
    assert_eq!((told("webhook refused"), told("connection refused")), (2, 1), "{}", relay.log_text());
    // The secret in use is one of the few things that an attacker must not learn from a refusal.
    assert!(!relay.log_text().contains(SECRET));
}
