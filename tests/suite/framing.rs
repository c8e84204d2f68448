//! HTTP as hostile, broken and old clients write it (RFC 9112), byte by byte over real connections. hyper decides much
//! of it. It is tested anyway: a relay that reads a request differently than the proxy in front can be tricked.

use crate::harness::http::{now, sign};
use crate::harness::samples::scan;
use crate::harness::{Raw, Relay, SECRET, Setup};

/// A signed request as text: its first line, these header lines, and then `sent` in place of the body.
fn request(first_line: &str, lines: &str, body: &str, sent: &str) -> String {
    let timestamp = now();
    let signature = sign(SECRET, &timestamp, body.as_bytes());
    format!(
        "{first_line}\r\nHost: relay.example\r\nPrism-Timestamp: {timestamp}\r\n\
         Prism-Signature: {signature}\r\n{lines}\r\n{sent}"
    )
}

const POST: &str = "POST /webhooks/prism HTTP/1.1";

/// Header lines that close the connection after the answer and give the length of this body.
fn lengthy(body: &str) -> String {
    format!("Connection: close\r\nContent-Length: {}\r\n", body.len())
}

/// The body in chunks of at most `size` bytes, without the last chunk.
fn chunks(body: &str, size: usize) -> String {
    let chunk = |piece: &[u8]| format!("{:x}\r\n{}\r\n", piece.len(), String::from_utf8_lossy(piece));
    body.as_bytes().chunks(size).map(chunk).collect()
}

const CHUNKED: &str = "Connection: close\r\nTransfer-Encoding: chunked\r\n";

async fn status(relay: &Relay, request: impl AsRef<[u8]>) -> String {
    let answer = Raw::exchange(relay.address(), request).await;
    answer.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3)).unwrap_or("none").to_owned()
}

async fn accepted(relay: &Relay) -> u64 {
    relay.spool().await.accepted
}

#[tokio::test]
async fn lengths_that_contradict_each_other_are_refused() {
    let relay = Setup::without_broker().start().await;
    let (body, shorter) = (scan(1), scan(1).len() - 1);
    let close = "Connection: close\r\n";
    for lines in [
        format!("{}Content-Length: {shorter}\r\n", lengthy(&body)),
        format!("{close}Content-Length: {}, {shorter}\r\n", body.len()),
        format!("{close}Content-Length: +{}\r\n", body.len()),
        format!("{close}Content-Length: -1\r\n"),
        format!("{close}Content-Length: 0x10\r\n"),
        format!("{close}Content-Length: 99999999999999999999\r\n"),
        format!("{close}Content-Length: \r\n"),
        format!("{close}Transfer-Encoding: gzip\r\n"),
        format!("{close}Transfer-Encoding: chunked, gzip\r\n"),
        format!("{close}Content-Length : {}\r\n", body.len()),
    ] {
        assert_eq!(status(&relay, request(POST, &lines, &body, &body)).await, "400", "{lines}");
    }
    assert_eq!(accepted(&relay).await, 0);
}

/// RFC 9112, section 6.1: the length is void, and the connection ends, so that no later bytes are read as a request.
#[tokio::test]
async fn bytes_after_a_body_with_both_lengths_are_not_a_request() {
    let relay = Setup::without_broker().start().await;
    let (body, smuggled) = (scan(1), scan(2));
    let both = format!("Transfer-Encoding: chunked\r\nContent-Length: {}\r\n", body.len());
    let first = request(POST, &both, &body, &format!("{}0\r\n\r\n", chunks(&body, 1000)));
    let second = request(POST, &lengthy(&smuggled), &smuggled, &smuggled);
    let answers = Raw::exchange(relay.address(), first + &second).await;
    assert_eq!(answers.matches("HTTP/1.1 ").count(), 1, "{answers}");
    assert!(accepted(&relay).await <= 1);
}

#[tokio::test]
async fn chunks_are_put_together_and_bad_ones_refused() {
    let relay = Setup::without_broker().start().await;
    let body = scan(1);
    let extended = chunks(&body, 1000).replacen("\r\n", ";name=value\r\n", 1);
    for (number, sent) in [
        format!("{}0\r\n\r\n", chunks(&body, 1)),
        format!("{}0\r\nTrailer: value\r\nPrism-Signature: 00\r\n\r\n", chunks(&body, 7)),
        format!("{extended}0\r\n\r\n"),
    ]
    .iter()
    .enumerate()
    {
        assert_eq!(status(&relay, request(POST, CHUNKED, &body, sent)).await, "200", "{number}");
    }
    assert_eq!(accepted(&relay).await, 1, "the same body three times");
    let other = scan(2);
    let whole = chunks(&other, 1000);
    for sent in [
        "zz\r\n".to_owned(),
        format!("-{whole}0\r\n\r\n"),
        format!("ffffffffffffffffff\r\n{other}\r\n0\r\n\r\n"),
        format!("{:x}\r\n{other}0\r\n\r\n", other.len()),
        whole.replace("\r\n", "\n") + "0\n\n",
    ] {
        assert_eq!(status(&relay, request(POST, CHUNKED, &other, &sent)).await, "400", "{sent:?}");
    }
    assert_eq!(accepted(&relay).await, 1);
}

#[tokio::test]
async fn heads_that_are_malformed_are_refused() {
    let relay = Setup::without_broker().start().await;
    let body = scan(1);
    let lines = lengthy(&body);
    for lines in [
        format!("Folded: one\r\n two\r\n{lines}"),
        format!("No colon\r\n{lines}"),
        format!("Nul: \0\r\n{lines}"),
        format!("Bare: \r carriage return\r\n{lines}"),
        format!("N\u{e4}me: value\r\n{lines}"),
    ] {
        assert_eq!(status(&relay, request(POST, &lines, &body, &body)).await, "400", "{lines:?}");
    }
    for first_line in ["POST /webhooks/prism", "POST  /webhooks/prism HTTP/1.1", "POST /webhooks/prism HTTP/9.9", "\0"]
    {
        assert_eq!(status(&relay, request(first_line, &lines, &body, &body)).await, "400", "{first_line:?}");
    }
    // A client that speaks TLS to a port without it.
    assert_eq!(status(&relay, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03garbage\r\n\r\n").await, "400");
    assert_eq!(accepted(&relay).await, 0);
}

#[tokio::test]
async fn http_2_is_closed_and_named_in_the_log() {
    let relay = Setup::without_broker().set("log.filter", "info").start().await;
    let settings = b"\0\0\0\x04\0\0\0\0\0";
    let preface = [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".as_slice(), settings].concat();
    assert_eq!(Raw::exchange(relay.address(), preface).await, "");
    relay.eventually_logs("the client speaks HTTP/2").await;
    let malformed = [("listener", "http"), ("reason", "malformed")];
    relay.eventually_metric("prism_relay_connections_refused_total", &malformed, 1.0).await;
}

#[tokio::test]
async fn heads_that_are_too_large_are_refused() {
    let relay = Setup::without_broker().start().await;
    let body = scan(1);
    let many = "Name: value\r\n".repeat(100) + &lengthy(&body);
    let large = format!("Name: {}\r\n{}", "x".repeat(40_000), lengthy(&body));
    for lines in [many, large] {
        assert_eq!(status(&relay, request(POST, &lines, &body, &body)).await, "431");
    }
    let path = format!("POST /{} HTTP/1.1", "x".repeat(40_000));
    assert!(["414", "431"].contains(&status(&relay, request(&path, "", "", "")).await.as_str()));
}

#[tokio::test]
async fn paths_are_compared_as_they_are_sent() {
    let relay = Setup::without_broker().start().await;
    let body = scan(1);
    for (target, expected) in [
        ("/webhooks/prism", "200"),
        ("/webhooks/prism?a=b", "200"),
        ("http://other.example/webhooks/prism", "200"),
        ("/webhooks/%70rism", "404"),
        ("/webhooks//prism", "404"),
        ("/webhooks/./prism", "404"),
        ("/webhooks/prism/", "404"),
        ("/WEBHOOKS/PRISM", "404"),
        ("/healthz/../webhooks/prism", "404"),
    ] {
        let line = format!("POST {target} HTTP/1.1");
        assert_eq!(status(&relay, request(&line, &lengthy(&body), &body, &body)).await, expected, "{target}");
    }
}

#[tokio::test]
async fn old_and_hasty_clients_are_served() {
    let relay = Setup::without_broker().start().await;
    let [one, two, three] = [1, 2, 3].map(scan);
    // HTTP/1.0 closes after each answer.
    let old = request("POST /webhooks/prism HTTP/1.0", &format!("Content-Length: {}\r\n", one.len()), &one, &one);
    assert!(Raw::exchange(relay.address(), old).await.starts_with("HTTP/1.0 200"));
    // Line ends without a carriage return, which a recipient may take (RFC 9112, section 2.2).
    let bare = request(POST, &lengthy(&two), &two, "").replace("\r\n", "\n") + &two;
    assert_eq!(status(&relay, bare).await, "200");
    // Several requests in one packet are answered in their order.
    let hasty = |body: &str| request(POST, &format!("Content-Length: {}\r\n", body.len()), body, body);
    let pipelined = hasty(&three) + &hasty(&one) + &request("GET /nowhere HTTP/1.1", "Connection: close\r\n", "", "");
    let answers = Raw::exchange(relay.address(), pipelined).await;
    let order: Vec<_> = answers.match_indices("HTTP/1.1 ").map(|(at, _)| &answers[at + 9..at + 12]).collect();
    assert_eq!(order, ["200", "200", "404"], "{answers}");
    assert_eq!(accepted(&relay).await, 3);
}

#[tokio::test]
async fn a_client_that_expects_100_continue_gets_an_answer_before_it_sends() {
    let relay = Setup::without_broker().start().await;
    let body = scan(1);
    let asking =
        |line: &str, body: &str| request(line, &format!("Expect: 100-continue\r\n{}", lengthy(body)), body, "");
    let mut raw = Raw::connect(relay.address()).await;
    raw.write(asking(POST, &body)).await.unwrap();
    let interim = raw.read_until(|bytes| bytes.ends_with(b"\r\n\r\n")).await;
    assert_eq!(interim, b"HTTP/1.1 100 Continue\r\n\r\n");
    raw.write(&body).await.unwrap();
    assert!(raw.read_to_end().await.starts_with(b"HTTP/1.1 200"));
    // A request that is refused for its head is refused before the body is sent.
    assert_eq!(status(&relay, asking("POST /nowhere HTTP/1.1", &body)).await, "404");
}

#[tokio::test]
async fn no_connection_is_upgraded_and_no_body_is_unpacked() {
    let relay = Setup::without_broker().start().await;
    let body = scan(1);
    for (number, upgrade) in ["h2c", "websocket", "TLS/1.2"].into_iter().enumerate() {
        let lines = format!("Upgrade: {upgrade}\r\nContent-Length: {}\r\nConnection: close, upgrade\r\n", body.len());
        assert_eq!(status(&relay, request(POST, &lines, &body, &body)).await, "200", "{number}");
    }
    let tunnel = request("CONNECT 127.0.0.1:22 HTTP/1.1", "Connection: close\r\n", "", "");
    assert_eq!(status(&relay, tunnel).await, "404");
    // What Prism has signed is kept as it is, also if it is packed; unpacking it could take any amount of memory.
    let lines = format!("Content-Encoding: gzip\r\n{}", lengthy("not really gzip"));
    assert_eq!(status(&relay, request(POST, &lines, "not really gzip", "not really gzip")).await, "200");
    assert_eq!(accepted(&relay).await, 2);
}
