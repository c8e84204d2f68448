//! Section 3 of the design: every status and code of the public listener, over real connections.

use hyper::Method;
use serde_json::json;

use crate::harness::http::{now, sign};
use crate::harness::{Answer, Client, Node, Raw, Relay, SECRET, Setup, Vhost, Wire, eventually, eventually_equal};

/// No process listens here: no answer to a webhook may depend on the broker.
const EVENT: &str = r#"{"eventType":"scan.processing.started","payload":{"userToken":"partner-user-42","scanId":"s"}}"#;

fn assert_problem(answer: &Answer, status: u16, code: &str) {
    assert_eq!(answer.status, status, "{answer}");
    assert_eq!(answer.header("content-type"), Some("application/problem+json"));
    let problem = answer.json();
    assert_eq!((problem["code"].as_str(), problem["status"].as_u64()), (Some(code), Some(status.into())), "{problem}");
    for member in ["type", "title", "detail"] {
        assert!(problem[member].as_str().is_some_and(|text| !text.is_empty()), "{member} in {problem}");
    }
    assert_eq!(answer.header("retry-after"), (status == 503).then_some("5"));
}

async fn post_signed_at(relay: &Relay, timestamp: &str, secret: &str) -> Answer {
    let signature = sign(secret, timestamp, EVENT.as_bytes());
    relay.post_with(&[("prism-timestamp", timestamp), ("prism-signature", &signature)], EVENT).await
}

#[tokio::test]
async fn ok_carries_the_id_and_a_re_send_carries_the_first_one() {
    let relay = Setup::without_broker().start().await;
    let first = relay.post(EVENT).await.expect(200);
    assert_eq!(first.header("content-type"), Some("application/json"));
    let id = first.json()["id"].clone();
    assert_eq!(first.json(), json!({"ok": true, "id": id}));
    let again = relay.post(EVENT).await.expect(200);
    assert_eq!(again.json(), json!({"ok": true, "id": id, "duplicate": true}));
    assert_eq!(relay.metric("prism_relay_webhooks_total", &[("outcome", "accepted")]).await, 1.0);
    assert_eq!(relay.metric("prism_relay_webhooks_total", &[("outcome", "duplicate")]).await, 1.0);
}

#[tokio::test]
async fn signatures_are_required_and_checked() {
    let relay = Setup::without_broker().set("signature.secrets", json!([SECRET, "whsec_old_0123456789"])).start().await;
    let now = now();
    assert_problem(&relay.post_with(&[], EVENT).await, 401, "missing-signature");
    assert_problem(&relay.post_with(&[("prism-timestamp", &now)], EVENT).await, 401, "missing-signature");
    assert_problem(&relay.post_with(&[("prism-signature", "00")], EVENT).await, 401, "missing-signature");
    assert_problem(&post_signed_at(&relay, &now, "whsec_wrong").await, 401, "invalid-signature");
    assert_problem(&post_signed_at(&relay, "yesterday", SECRET).await, 401, "invalid-timestamp");
    let minutes = |minutes: i64| (jiff::Timestamp::now() + jiff::SignedDuration::from_mins(minutes)).to_string();
    assert_problem(&post_signed_at(&relay, &minutes(-6), SECRET).await, 401, "stale-timestamp");
    assert_problem(&post_signed_at(&relay, &minutes(6), SECRET).await, 401, "stale-timestamp");
    post_signed_at(&relay, &minutes(-4), SECRET).await.expect(200);
    post_signed_at(&relay, &minutes(4), "whsec_old_0123456789").await.expect(200);
    let refused =
        relay.metric("prism_relay_webhooks_total", &[("outcome", "refused"), ("reason", "missing-signature")]);
    assert_eq!(refused.await, 3.0);
}

#[tokio::test]
async fn unsigned_bodies_have_to_be_events() {
    let relay = Setup::without_broker().set("signature.required", false).start().await;
    relay.post_with(&[], EVENT).await.expect(200);
    assert_problem(&relay.post_with(&[], "{").await, 400, "invalid-json");
    assert_problem(&relay.post_with(&[], "").await, 400, "invalid-json");
    assert_problem(&relay.post_with(&[], b"{\"eventType\":\"\xff\"}").await, 400, "invalid-encoding");
    for body in ["[]", "7", "{}", r#"{"eventType":7}"#] {
        assert_problem(&relay.post_with(&[], body).await, 422, "not-an-envelope");
    }
    let forged = [("prism-timestamp", now()), ("prism-signature", "0".repeat(64))];
    let forged: Vec<_> = forged.iter().map(|(name, value)| (*name, value.as_str())).collect();
    assert_problem(&relay.post_with(&forged, EVENT).await, 401, "invalid-signature");
    relay.post("[]").await.expect(200);
}

#[tokio::test]
async fn paths_and_methods() {
    let relay = Setup::without_broker().set("http.path", "/hook").start().await;
    let client = Client::http1();
    let base = relay.url().strip_suffix("/hook").unwrap().to_owned();
    for path in ["/", "/hook/", "/webhooks/prism", "/hook%2f"] {
        let answer = client.send(Method::POST, &format!("{base}{path}"), &[], EVENT).await.unwrap();
        assert_problem(&answer, 404, "not-found");
    }
    for method in [Method::GET, Method::PUT, Method::DELETE, Method::OPTIONS] {
        let answer = client.send(method, relay.url(), &[], "").await.unwrap();
        assert_problem(&answer, 405, "method-not-allowed");
        assert_eq!(answer.header("allow"), Some("POST"));
    }
    let health = format!("{base}/healthz");
    assert_eq!(client.get(&health).await.unwrap().expect(200).json(), json!({"ready": true}));
    let head = client.send(Method::HEAD, &health, &[], "").await.unwrap().expect(200);
    assert_eq!((head.header("content-length"), head.body.len()), (Some("14"), 0));
    let answer = client.send(Method::POST, &health, &[], "").await.unwrap();
    assert_problem(&answer, 405, "method-not-allowed");
    assert_eq!(answer.header("allow"), Some("GET, HEAD"));
    let query = client.send(Method::POST, &format!("{}?a=b", relay.url()), &[], EVENT).await.unwrap();
    assert_problem(&query, 401, "missing-signature");
}

#[tokio::test]
async fn sources_are_checked_behind_trusted_proxies() {
    let setup = || Setup::without_broker().set("http.allowed_sources", json!(["203.0.113.0/24"]));
    let relay = setup().start().await;
    assert_problem(&relay.post(EVENT).await, 403, "source-not-allowed");
    assert_problem(&relay.post_with(&[("x-forwarded-for", "203.0.113.7")], EVENT).await, 403, "source-not-allowed");
    let relay = setup().set("http.trusted_proxies", json!(["127.0.0.0/8"])).start().await;
    assert_problem(&relay.post_with(&[("x-forwarded-for", "203.0.113.7")], EVENT).await, 401, "missing-signature");
    let forged = [("x-forwarded-for", "203.0.113.7, 198.51.100.1")];
    assert_problem(&relay.post_with(&forged, EVENT).await, 403, "source-not-allowed");
    let mut unreadable = b"POST /webhooks/prism HTTP/1.1\r\nhost: relay\r\nconnection: close\r\n".to_vec();
    unreadable
        .extend(b"x-forwarded-for: 203.0.113.7\r\nx-forwarded-for: \xe9, 198.51.100.1\r\ncontent-length: 0\r\n\r\n");
    let answer = Raw::exchange(relay.address(), unreadable).await;
    assert!(answer.starts_with("HTTP/1.1 403 "), "a line that cannot be read is not passed over: {answer}");
}

#[tokio::test]
async fn bodies_are_limited_declared_or_streamed() {
    let relay = Setup::without_broker().set("http.body_bytes_max", "1000").start().await;
    let fits = format!(r#"{{"eventType":"scan.a","x":"{}"}}"#, "x".repeat(971));
    assert_eq!(fits.len(), 1000);
    relay.post(&fits).await.expect(200);
    assert_problem(&relay.post(format!("{fits} ")).await, 413, "body-too-large");
    assert_problem(&relay.post(vec![b' '; 900_000]).await, 413, "body-too-large");

    let chunk = format!("3e8\r\n{fits}\r\n");
    let head =
        "POST /webhooks/prism HTTP/1.1\r\nhost: relay\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n";
    let streamed = Raw::exchange(relay.address(), format!("{head}{chunk}1\r\nx\r\n0\r\n\r\n")).await;
    assert!(streamed.starts_with("HTTP/1.1 413 ") && streamed.contains("body-too-large"), "{streamed}");
    let exact = Raw::exchange(relay.address(), format!("{head}{chunk}0\r\n\r\n")).await;
    assert!(exact.starts_with("HTTP/1.1 401 "), "{exact}");

    // A client that expects 100-continue is refused before it sends the body.
    let head = "POST /webhooks/prism HTTP/1.1\r\nhost: relay\r\ncontent-length: 1001\r\nexpect: 100-continue\r\n\r\n";
    let asked = Raw::exchange(relay.address(), head).await;
    assert!(asked.starts_with("HTTP/1.1 413 "), "{asked}");
}

#[tokio::test]
async fn slow_senders_are_cut_off() {
    let relay = Setup::without_broker().set("http.body_timeout", "300ms").start().await;
    let head = "POST /webhooks/prism HTTP/1.1\r\nhost: relay\r\ncontent-length: 10\r\n\r\n12345";
    let mut slow_body = Raw::connect(relay.address()).await;
    slow_body.write(head).await.unwrap();
    let answer = String::from_utf8(slow_body.read_until(|bytes| bytes.ends_with(b"}")).await).unwrap();
    assert!(answer.starts_with("HTTP/1.1 408 ") && answer.contains("request-timeout"), "{answer}");
    let relay =
        Setup::without_broker().set("http.header_timeout", "300ms").set("http.idle_timeout", "300ms").start().await;
    // Neither half a head nor silence keeps a connection open.
    for start in ["POST /webhooks", ""] {
        let mut raw = Raw::connect(relay.address()).await;
        raw.write(start).await.unwrap();
        raw.read_to_end().await;
    }
    // One that was served is closed for idleness. A test that is slower than that is as well.
    eventually("an answer, and then the end", async || {
        let answer = Raw::exchange(relay.address(), "GET /healthz HTTP/1.1\r\nhost: relay\r\n\r\n").await;
        if answer.starts_with("HTTP/1.1 200 ") { Ok(()) } else { Err(answer) }
    })
    .await;
}

#[tokio::test]
async fn a_full_spool_answers_503_and_resumes_by_itself() {
    let vhost = Vhost::new(Node::shared().await).await;
    let mut wire = Wire::new(vhost.address());
    wire.refuse().await;
    let relay = Setup::new(&vhost.url_through(&wire)).set("spool.max_bytes", "3KiB").start().await;
    let event =
        |n: u32| format!(r#"{{"eventType":"scan.a","payload":{{"userToken":"partner-user-42","scanId":"{n}"}}}}"#);
    let mut accepted = 0;
    let full = loop {
        let answer = relay.post(event(accepted)).await;
        match answer.status {
            200 => accepted += 1,
            _ => break answer,
        }
    };
    assert_problem(&full, 503, "spool-full");
    assert!((5..12).contains(&accepted), "{accepted} of about 310 bytes each in 3 KiB");
    let ready = relay.ops_get("/readyz").await;
    assert_problem(&ready, 503, "spool-full");
    let health = relay.url().replace("/webhooks/prism", "/healthz");
    assert_eq!(Client::http1().get(&health).await.expect("an answer").json(), ready.json(), "both answer the same");
    assert_eq!(relay.post(event(0)).await.expect(200).json()["duplicate"], true, "what is safe stays safe");
    wire.accept();
    let resumed = eventually("accepting to resume", async || {
        let answer = relay.post(event(accepted)).await;
        if answer.status == 200 { Ok(answer) } else { Err(answer) }
    });
    resumed.await;
    // That event may have taken the only place that was free by then.
    eventually("readiness", async || {
        let answer = relay.ops_get("/readyz").await;
        if answer.status == 200 { Ok(()) } else { Err(answer) }
    })
    .await;
    let delivered = vhost.messages("prism.scan", accepted as usize + 1).await;
    assert_eq!(delivered.last().unwrap().text(), event(accepted));
}

#[tokio::test]
async fn a_spool_that_cannot_be_written_answers_503_until_it_can() {
    let relay = Setup::without_broker().start().await;
    relay.post(EVENT).await.expect(200);
    let meddler = rusqlite::Connection::open(relay.setup().spool()).unwrap();
    meddler.execute_batch("CREATE TRIGGER no BEFORE INSERT ON event BEGIN SELECT RAISE(ABORT, 'no'); END").unwrap();
    let body = r#"{"eventType":"scan.b","payload":{}}"#;
    assert_problem(&relay.post(body).await, 503, "spool-unavailable");
    relay.eventually_logs("the spool cannot be written").await;
    meddler.execute_batch("DROP TRIGGER no").unwrap();
    assert_eq!(relay.post(body).await.expect(200).json()["duplicate"], serde_json::Value::Null);
    assert_eq!(relay.spool().await.accepted, 2);
}

/// The drain gives requests half of the grace. A body that arrives later is answered 503, because the spool is closed.
#[tokio::test]
async fn open_requests_are_finished_and_late_ones_are_asked_to_try_again() {
    let vhost = Vhost::new(Node::shared().await).await;
    let wire = Wire::new(vhost.address());
    let setup = Setup::new(&vhost.url_through(&wire)).set("shutdown.grace", "10s");
    let mut relay = setup.set("broker.confirm_timeout", "60s").set("broker.heartbeat", "60s").start().await;
    // A publish that stays unconfirmed keeps the drain going until the end of the grace.
    relay.post(EVENT).await.expect(200);
    vhost.messages("prism.scan", 1).await;
    wire.stall_answers();
    relay.post(r#"{"eventType":"scan.held","payload":{}}"#).await.expect(200);

    let request = |body: &str| {
        let timestamp = now();
        let signature = sign(SECRET, &timestamp, body.as_bytes());
        let length = body.len();
        format!(
            "POST /webhooks/prism HTTP/1.1\r\nhost: relay\r\nexpect: 100-continue\r\ncontent-length: {length}\r\n\
             prism-timestamp: {timestamp}\r\nprism-signature: {signature}\r\n\r\n"
        )
    };
    let (in_time, late) = (r#"{"eventType":"scan.in_time"}"#, r#"{"eventType":"scan.late"}"#);
    let (mut first, mut second) = (Raw::connect(relay.address()).await, Raw::connect(relay.address()).await);
    for (raw, body) in [(&mut first, in_time), (&mut second, late)] {
        raw.write(request(body)).await.unwrap();
        let go_on = raw.read_until(|bytes| bytes.ends_with(b"\r\n\r\n")).await;
        assert!(go_on.starts_with(b"HTTP/1.1 100 "), "the relay waits for the body");
    }
    relay.sigterm();
    relay.eventually_logs("stopping").await;
    eventually_equal("/readyz", 503, async || relay.ops_get("/readyz").await.status).await;
    assert_problem(&relay.ops_get("/readyz").await, 503, "shutting-down");
    first.write(in_time).await.unwrap();
    let answer = String::from_utf8(first.read_to_end().await).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    relay.eventually_logs("requests are still open").await;
    second.write(late).await.unwrap();
    let answer = String::from_utf8(second.read_to_end().await).unwrap();
    assert!(answer.starts_with("HTTP/1.1 503 ") && answer.contains("shutting-down"), "{answer}");
    relay.sigterm();
    assert_eq!(relay.wait().await.code, Some(0));
}
