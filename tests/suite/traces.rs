//! Traces continue through the relay, and an OpenTelemetry collector gets the spans of the relay.

use std::convert::Infallible;
use std::sync::{Arc, Mutex};

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;

use crate::harness::http::{now, sign};
use crate::harness::{Node, Relay, SECRET, Setup, Vhost, background, eventually};

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const BODY: &str = r#"{"eventType":"scan.processing.started","payload":{"userToken":"partner-user-42","scanId":"s"}}"#;

/// Keeps the bytes of all exports. OTLP's protobuf messages hold their texts unencoded, so tests can search for them.
struct Collector {
    url: String,
    bodies: Arc<Mutex<Vec<u8>>>,
}

impl Collector {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let bodies: Arc<Mutex<Vec<u8>>> = Arc::default();
        let collected = Arc::clone(&bodies);
        let listener = listener.into_std().unwrap();
        background::spawn(async move {
            let listener = TcpListener::from_std(listener).unwrap();
            while let Ok((stream, _)) = listener.accept().await {
                let collected = Arc::clone(&collected);
                let service = service_fn(move |request: Request<Incoming>| {
                    let collected = Arc::clone(&collected);
                    async move {
                        assert_eq!(request.uri().path(), "/v1/traces");
                        let body = request.into_body().collect().await.unwrap().to_bytes();
                        collected.lock().unwrap().extend_from_slice(&body);
                        Ok::<_, Infallible>(Response::new(Full::new(Bytes::new())))
                    }
                });
                tokio::spawn(
                    hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service),
                );
            }
        });
        Self { url, bodies }
    }

    fn has(&self, text: &[u8]) -> bool {
        self.bodies.lock().unwrap().windows(text.len()).any(|window| window == text)
    }

    async fn eventually_has(&self, text: &str) {
        eventually(&format!("{text:?} at the collector"), async || {
            if self.has(text.as_bytes()) { Ok(()) } else { Err(format!("{} bytes", self.bodies.lock().unwrap().len())) }
        })
        .await;
    }
}

async fn post_traced(relay: &Relay, flags: &str) -> String {
    let timestamp = now();
    let signature = sign(SECRET, &timestamp, BODY.as_bytes());
    let parent = format!("00-{TRACE}-b7ad6b7169203331-{flags}");
    let headers = [
        ("prism-timestamp", timestamp.as_str()),
        ("prism-signature", signature.as_str()),
        ("traceparent", parent.as_str()),
        ("tracestate", "vendor=1"),
    ];
    relay.post_with(&headers, BODY).await.id()
}

#[tokio::test]
async fn both_spans_of_an_event_are_exported_and_the_message_continues_the_last_one() {
    let (vhost, collector) = (Vhost::new(Node::shared().await).await, Collector::start().await);
    let mut relay = Setup::new(&vhost.url()).set("traces.endpoint", collector.url.as_str()).start().await;
    let id = post_traced(&relay, "01").await;
    let message = vhost.messages("prism.scan", 1).await.remove(0);
    let parent = message.header("traceparent");
    assert!(parent.starts_with(&format!("00-{TRACE}-")) && parent.ends_with("-01"), "{parent}");
    assert!(!parent.contains("b7ad6b7169203331"), "the parent is not a span of the relay: {parent}");
    assert_eq!(message.header("tracestate"), "vendor=1");
    for text in [
        "prism webhook",
        "publish prism.webhooks",
        "messaging.system",
        "rabbitmq",
        "prism.webhooks:scan.processing.started",
        "http.response.status_code",
        id.as_str(),
        "service.name",
        "prism-relay",
    ] {
        collector.eventually_has(text).await;
    }
    let bytes = |hex: &str| {
        (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect::<Vec<_>>()
    };
    assert!(
        collector.has(&bytes(TRACE)) && collector.has(&bytes("b7ad6b7169203331")),
        "the sender's span is not exported as the parent"
    );
    assert!(!collector.has(b"partner-user-42"));
    // The last spans are exported before the relay exits.
    relay.post(r#"{"eventType":"scan.last","payload":{}}"#).await.expect(200);
    relay.sigterm();
    assert_eq!(relay.wait().await.code, Some(0));
    assert!(collector.has(b"prism.webhooks:scan.last"));
}

#[tokio::test]
async fn a_trace_that_its_sender_did_not_sample_is_passed_on_and_not_exported() {
    let (vhost, collector) = (Vhost::new(Node::shared().await).await, Collector::start().await);
    let setup = Setup::new(&vhost.url()).set("traces.endpoint", collector.url.as_str()).set("traces.sample_ratio", 0);
    let mut relay = setup.start().await;
    post_traced(&relay, "00").await;
    relay.post(r#"{"eventType":"scan.begun_here","payload":{}}"#).await.expect(200);
    let messages = vhost.messages("prism.scan", 2).await;
    let parent = messages[0].header("traceparent");
    assert!(parent.starts_with(&format!("00-{TRACE}-")) && parent.ends_with("-00"), "{parent}");
    relay.sigterm();
    relay.wait().await;
    assert!(collector.bodies.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_collector_that_is_down_costs_only_a_warning() {
    let vhost = Vhost::new(Node::shared().await).await;
    let relay = Setup::new(&vhost.url()).set("traces.endpoint", "http://127.0.0.1:1").start().await;
    let id = relay.post(BODY).await.id();
    assert_eq!(vhost.messages("prism.scan", 1).await[0].id(), id);
    relay.eventually_logs("cannot export spans").await;
    let wrong = Setup::new(&vhost.url()).set("traces.endpoint", "collector:4317").run(&["serve"]).await;
    assert!(wrong.code == Some(64) && wrong.stderr.contains("traces.endpoint"), "{wrong:?}");
}
