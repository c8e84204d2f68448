//! Promises 4 and 7 and the message contract: each body reaches its queue byte for byte.

use crate::harness::http::{now, sign};
use crate::harness::{Node, Relay, SECRET, Setup, Vhost, samples};

#[tokio::test]
async fn each_event_type_reaches_its_queue_byte_for_byte() {
    let vhost = Vhost::new(Node::shared().await).await;
    let relay = Relay::start(&vhost).await;
    for line in samples::EVENTS.lines() {
        relay.post(line).await.expect(200);
    }
    let lines: Vec<&str> = samples::EVENTS.lines().collect();
    for (queue, expected) in
        [("prism.scan", &lines[..3]), ("prism.future_me", &lines[3..6]), ("prism.unrouted", &lines[6..])]
    {
        let deliveries = vhost.messages(queue, expected.len()).await;
        let bodies: Vec<_> = deliveries.iter().map(|delivery| delivery.text()).collect();
        assert_eq!(bodies, expected, "{queue}");
        for delivery in deliveries {
            assert_eq!(delivery.routing_key, delivery.json()["eventType"].as_str().unwrap());
        }
    }
    relay.eventually_metric("prism_relay_publish_total", &[("outcome", "confirmed")], 8.0).await;
}

#[tokio::test]
async fn odd_but_authentic_bodies_are_relayed_unchanged() {
    let vhost = Vhost::new(Node::shared().await).await;
    let relay = Relay::start(&vhost).await;
    let scan = "scan.processing.started";
    let nested = format!(r#"{{"eventType":"{scan}","payload":{}{}}}"#, "[".repeat(10_000), "]".repeat(10_000));
    let scans: [Vec<u8>; 8] = [
        format!("\n {{ \"eventType\"\t: \"{scan}\" ,\r\n\"payload\":{{ }} }} \n").into(),
        format!(r#"{{"eventType":"other","payload":1,"eventType":"{scan}"}}"#).into(),
        format!(r#"{{"eventType":"{scan}","payload":{{"n":1e99999,"m":-123456789012345678901234567890.5}}}}"#).into(),
        concat!(
            r#"{"event\u0054ype":"scan\u002eprocessing.started","#,
            r#""payload":{"userToken":"partner-user-42","scanId":"\ud83d\ude00"}}"#
        )
        .into(),
        format!(r#"{{"eventType":"{scan}","payload":{{"userToken":"Zoë ✓ 日本"}}}}"#).into(),
        format!(r#"{{"eventType":"{scan}","payload":["a new shape"],"new":true}}"#).into(),
        format!(r#"{{"eventType":"{scan}"}}"#).into(),
        nested.into(),
    ];
    for body in &scans {
        relay.post(body).await.expect(200);
    }
    let bodies: Vec<_> = vhost.messages("prism.scan", scans.len()).await.into_iter().map(|d| d.body).collect();
    assert_eq!(bodies, scans);
}

#[tokio::test]
async fn unknown_types_and_bodies_without_an_envelope_end_in_unrouted() {
    let vhost = Vhost::new(Node::shared().await).await;
    let relay = Relay::start(&vhost).await;
    let long = format!(r#"{{"eventType":"{}"}}"#, "x".repeat(300));
    let events: [(&[u8], &str); 9] = [
        (br#"{"eventType":"capture_data.validation.started","payload":{}}"#, "capture_data.validation.started"),
        (br#"{"eventType":"scanner","payload":{}}"#, "scanner"),
        (br#"{"eventType":"scan.#","payload":{}}"#, "invalid.event_type"),
        (br#"{"eventType":"","payload":{}}"#, "invalid.event_type"),
        (long.as_bytes(), "invalid.event_type"),
        (b"{\"eventType\":\"scan.processing.started\",\"payload\":\"\xff\xfe\"}", "invalid.body"),
        (b"not json", "invalid.body"),
        (b"[]", "invalid.body"),
        (b"", "invalid.body"),
    ];
    for (body, _) in events {
        relay.post(body).await.expect(200);
    }
    let deliveries = vhost.messages("prism.unrouted", events.len()).await;
    let found: Vec<_> = deliveries.iter().map(|d| (d.body.as_slice(), d.routing_key.as_str())).collect();
    assert_eq!(found, events);
    vhost.assert_empty("prism.scan").await;
}

#[tokio::test]
async fn the_message_carries_the_properties_and_headers_of_the_contract() {
    let vhost = Vhost::new(Node::shared().await).await;
    let relay = Relay::start(&vhost).await;
    let body = samples::EVENTS.lines().nth(4).unwrap();
    let timestamp = now();
    let signature = sign(SECRET, &timestamp, body.as_bytes());
    let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let headers = [
        ("prism-timestamp", timestamp.as_str()),
        ("prism-signature", signature.as_str()),
        ("traceparent", trace),
        ("tracestate", "vendor=1"),
        ("content-type", "text/plain"),
        ("x-secret-header", "is not copied"),
    ];
    let id = relay.post_with(&headers, body).await.id();
    let delivery = vhost.messages("prism.future_me", 1).await.remove(0);
    let properties = &delivery.properties;
    assert_eq!((delivery.exchange.as_str(), delivery.id()), ("prism.webhooks", id));
    assert_eq!(uuid::Uuid::parse_str(&delivery.id()).unwrap().get_version_num(), 7);
    assert_eq!(properties.delivery_mode(), &Some(2));
    assert_eq!(properties.content_type().as_ref().unwrap().as_str(), "application/json");
    assert_eq!(properties.app_id().as_ref().unwrap().as_str(), "prism-relay");
    assert_eq!(properties.kind().as_ref().unwrap().as_str(), "body_shape_prediction.processing.succeeded");
    let received: jiff::Timestamp = delivery.header("prism-received-at").parse().unwrap();
    assert_eq!(delivery.header("prism-received-at").len(), "2025-10-01T21:26:17.123Z".len());
    assert_eq!(properties.timestamp(), &Some(received.as_second() as u64));
    let names: Vec<&str> = delivery.headers.keys().map(String::as_str).collect();
    let expected = [
        "prism-fingerprint",
        "prism-prediction-id",
        "prism-received-at",
        "prism-scan-id",
        "prism-source",
        "prism-state",
        "prism-subject",
        "prism-verified",
        "traceparent",
        "tracestate",
    ];
    assert_eq!(names, expected, "exactly the headers of the contract");
    use sha2::Digest;
    let fingerprint: String = sha2::Sha256::digest(body).iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(delivery.header("prism-fingerprint"), fingerprint);
    assert_eq!(delivery.header("prism-prediction-id"), "0c9b6a52-3d0e-4f0f-9a3d-2f6f0a4f7d11");
    assert_eq!(delivery.header("prism-subject"), "prediction:0c9b6a52-3d0e-4f0f-9a3d-2f6f0a4f7d11");
    assert_eq!(delivery.header("prism-state"), "READY");
    assert_eq!(delivery.header("prism-verified"), "true");
    assert_eq!((delivery.header("traceparent"), delivery.header("tracestate")), (trace, "vendor=1"));
    let metadata = format!("{:?}", delivery.properties);
    assert!(!metadata.contains("partner-user-42") && !metadata.contains("5304329f"), "userToken or userId: {metadata}");
}

#[tokio::test]
async fn signed_and_unsigned_events_are_marked_as_such() {
    let vhost = Vhost::new(Node::shared().await).await;
    let relay = Setup::new(&vhost.url()).set("signature.required", false).start().await;
    relay.eventually_logs("signature.required is false: any client that knows the address can post events").await;
    relay.post_with(&[], r#"{"eventType":"scan.a","payload":{}}"#).await.expect(200);
    relay.post(r#"{"eventType":"scan.b","payload":{}}"#).await.expect(200);
    let deliveries = vhost.messages("prism.scan", 2).await;
    let verified: Vec<_> = deliveries.iter().map(|delivery| delivery.header("prism-verified")).collect();
    assert_eq!(verified, ["false", "true"]);
}
