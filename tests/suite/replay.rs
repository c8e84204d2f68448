//! Replay attacks: a captured request is recognised until its signature expires, and then refused.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::harness::http::sign;
use crate::harness::{Answer, Node, Relay, SECRET, Setup, Vhost, eventually, samples};

const BODY: &str = r#"{"eventType":"scan.processing.started","payload":{"userToken":"partner-user-42","scanId":"s"}}"#;

/// Sends the body with a timestamp `seconds` after now. Returns the answer, the timestamp and the signature.
async fn signed(relay: &Relay, seconds: i64) -> (Answer, [String; 2]) {
    let timestamp = format!("{:.3}", jiff::Timestamp::now() + jiff::SignedDuration::from_secs(seconds));
    let signature = sign(SECRET, &timestamp, BODY.as_bytes());
    let captured = [timestamp, signature];
    (send(relay, &captured).await, captured)
}

async fn send(relay: &Relay, [timestamp, signature]: &[String; 2]) -> Answer {
    relay.post_with(&[("prism-timestamp", timestamp), ("prism-signature", signature)], BODY).await
}

const WINDOW: Duration = Duration::from_secs(5);

/// Waits until the dedupe window of all answered events has passed.
async fn window_passes() {
    let begun = Instant::now();
    eventually("the end of the dedupe window", async || {
        let left = (WINDOW + Duration::from_millis(100)).saturating_sub(begun.elapsed());
        if left.is_zero() { Ok(()) } else { Err(format!("{left:?} are left")) }
    })
    .await;
}

fn assert_recognised(answer: &Answer, id: &str) {
    assert_eq!((answer.status, answer.json()), (200, json!({"ok": true, "id": id, "duplicate": true})));
}

#[tokio::test]
async fn a_captured_request_is_never_published_again() {
    let vhost = Vhost::new(Node::shared().await).await;
    let mut relay = Setup::new(&vhost.url()).set("dedupe.window", "5s").start().await;
    let (first, captured) = signed(&relay, 0).await;
    let first = first.id();
    // Prism signs each re-send separately, here with a clock that is ahead. The re-send is captured, too.
    let (again, re_sent) = signed(&relay, 200).await;
    assert_recognised(&again, &first);

    window_passes().await;
    for captured in [&captured, &re_sent] {
        assert_recognised(&send(&relay, captured).await, &first);
    }
    // An event that is not yet deleted at the kill would be delivered again.
    relay.eventually_nothing_pending().await;
    relay.kill9().await;
    relay.start_again().await;
    for captured in [&captured, &re_sent] {
        assert_recognised(&send(&relay, captured).await, &first);
    }
    // With a new signature the body is a new event. Captured requests still get the first id.
    let (second, _) = signed(&relay, 0).await;
    let second = second.id();
    assert_ne!(first, second);
    for captured in [&captured, &re_sent] {
        assert_recognised(&send(&relay, captured).await, &first);
    }
    window_passes().await;
    for captured in [&captured, &re_sent] {
        assert_recognised(&send(&relay, captured).await, &first);
    }
    let delivered = vhost.messages("prism.scan", 2).await;
    assert_eq!(delivered.iter().map(|delivery| delivery.id()).collect::<Vec<_>>(), [first, second]);
    relay.eventually_nothing_pending().await;
    vhost.assert_empty("prism.scan").await;
}

#[tokio::test]
async fn a_captured_request_is_refused_once_its_signature_is_too_old() {
    let setup = Setup::without_broker();
    let relay = setup.set("dedupe.window", "1s").set("signature.tolerance", "10s").start().await;
    let (first, captured) = signed(&relay, 0).await;
    let first = first.id();
    // The request is recognised until its signature expires. It never becomes a new event.
    let refused = eventually("the end of the tolerance", async || {
        let answer = send(&relay, &captured).await;
        if answer.status == 200 {
            assert_recognised(&answer, &first);
            return Err(answer);
        }
        Ok(answer)
    });
    let refused = refused.await;
    assert_eq!((refused.status, &refused.json()["code"]), (401, &json!("stale-timestamp")));
    assert_eq!(relay.spool().await.accepted, 1);
}

#[tokio::test]
async fn without_a_dedupe_window_no_request_is_recognised() {
    let relay = Setup::without_broker().set("dedupe.window", "0s").start().await;
    assert_eq!(relay.eventually_logs("dedupe.window is 0s").await["key"], "dedupe.window");
    let (_, captured) = signed(&relay, 0).await;
    assert_eq!(send(&relay, &captured).await.expect(200).json()["duplicate"], Value::Null);
    assert_eq!(relay.spool().await.accepted, 2);
}

#[tokio::test]
async fn exceeding_entries_max_logs_a_warning() {
    let relay = Setup::without_broker().set("dedupe.entries_max", 2).start().await;
    let (_, captured) = signed(&relay, 0).await;
    for number in 0..4 {
        relay.post(samples::scan(number)).await.expect(200);
    }
    relay.eventually_logs("dedupe.entries_max is too small").await;
    assert_eq!(send(&relay, &captured).await.expect(200).json()["duplicate"], Value::Null);
}
