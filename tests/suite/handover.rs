//! A service manager holds the sockets open while one relay ends and the next one begins.

use std::collections::HashSet;
use std::net::TcpListener;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::io::{FdFlags, fcntl_setfd};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::TlsConnector;

use crate::harness::http::{now, sign, tls_config};
use crate::harness::{Authority, Node, Raw, SECRET, Setup, Vhost, Wire, eventually};

/// A listening socket, as a unit with `ListenStream=` makes one, that programs we start inherit.
fn socket() -> (TcpListener, RawFd) {
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    fcntl_setfd(&socket, FdFlags::empty()).unwrap();
    let number = socket.as_raw_fd();
    (socket, number)
}

#[tokio::test]
async fn a_restart_under_load_refuses_no_webhook_and_loses_nothing() {
    let vhost = Vhost::new(Node::shared().await).await;
    let ((http, http_number), (_ops, ops_number)) = (socket(), socket());
    let setup = Setup::new(&vhost.url()).handed_over(&[("http", http_number), ("ops", ops_number)]);
    let mut relay = setup.start().await;
    assert_eq!(relay.address(), http.local_addr().unwrap());
    let url = format!("http://{}/webhooks/prism", http.local_addr().unwrap());
    let sender = Setup::new(&vhost.url());
    let arguments = ["send", "--url", &url, "--type", "scan.a", "--rate", "125", "--count", "2500"];
    let mut sending = sender.launch(&arguments);
    for restart in 1..=4 {
        eventually("traffic", async || {
            let accepted = relay.metric("prism_relay_webhooks_total", &[("outcome", "accepted")]).await;
            if accepted > 100.0 { Ok(()) } else { Err(accepted) }
        })
        .await;
        assert!(sending.exited().is_none(), "restart {restart} comes too late");
        relay.restart().await;
    }
    let sent = sending.wait().await;
    assert_eq!(sent.code, Some(0), "{sent:?}");
    // A connection that was kept open may break just as it is used again. Prism tries again then, and so does `send`.
    // A request that stays open for long may be answered 503.
    assert!(!sent.stdout.contains("refused"), "{}", sent.stdout);
    assert!(
        sent.stdout.lines().any(|line| line.starts_with("accepted ") && line.ends_with(" 2500")),
        "{}",
        sent.stdout
    );
    relay.eventually_nothing_pending().await;
    let depth = vhost.depth("prism.scan").await as usize;
    let ids: HashSet<_> = vhost.messages("prism.scan", depth).await.iter().map(|message| message.id()).collect();
    assert_eq!(ids.len(), 2500, "of {depth}");
}

/// The next relay can deliver the backlog. Webhooks cannot wait.
#[tokio::test]
async fn a_backlog_does_not_hold_up_the_next_relay() {
    let vhost = Vhost::new(Node::shared().await).await;
    let wire = Wire::new(vhost.address());
    let (_http, number) = socket();
    // Nothing else would end the wait for the broker in time.
    let setup = Setup::new(&vhost.url_through(&wire))
        .handed_over(&[("http", number)])
        .set("shutdown.grace", "1h")
        .set("broker.heartbeat", "5m")
        .set("broker.confirm_timeout", "10m");
    let mut relay = setup.start().await;
    relay.eventually_connected().await;
    wire.stall();
    let id = relay.post(r#"{"eventType":"scan.a","payload":{}}"#).await.id();
    relay.restart().await;
    wire.flow();
    assert_eq!(vhost.messages("prism.scan", 1).await[0].id(), id);
}

#[tokio::test]
async fn a_socket_without_a_purpose_is_an_error() {
    let ((_one, one), (_two, two)) = (socket(), socket());
    let setup = Setup::new("amqp://127.0.0.1:1").handed_over(&[("prism-relay.socket", one), ("other", two)]);
    let ended = setup.run(&["serve"]).await;
    assert!(ended.code == Some(64) && ended.stderr.contains("two sockets for http"), "{ended:?}");
    // One alone is for the webhooks, whatever its name.
    let (http, number) = socket();
    let relay = Setup::new("amqp://127.0.0.1:1").handed_over(&[("prism-relay.socket", number)]).start().await;
    assert_eq!(relay.address(), http.local_addr().unwrap());
}

/// A connection that was accepted and has sent nothing yet: the handshake and the request follow the SIGTERM, and each
/// has half a second.
#[tokio::test]
async fn a_handshake_that_is_under_way_becomes_a_request() {
    let authority = Authority::new();
    eventually("a sender that is quick enough", async || late_handshake(&authority).await).await;
}

/// An error if the sender was too slow.
async fn late_handshake(authority: &Authority) -> Result<(), String> {
    let own = authority.issue_server();
    let (_http, number) = socket();
    let mut setup = Setup::new("amqp://127.0.0.1:1").handed_over(&[("http", number)]);
    let (certificate, key) = (setup.file("tls.crt", own.certificate), setup.file("tls.key", own.private_key));
    setup.change("http.tls", json!({ "certificate": certificate, "private_key": key }));
    let mut relay = setup.start().await;
    let stream = tokio::net::TcpStream::connect(relay.address()).await.unwrap();
    relay.eventually_metric("prism_relay_connections", &[("state", "half-open")], 1.0).await;
    let connector = TlsConnector::from(Arc::new(tls_config(Some(&authority.pem()), None)));
    let begun = Instant::now();
    let in_time = || match begun.elapsed() {
        elapsed if elapsed < Duration::from_millis(400) => Ok(()),
        elapsed => Err(format!("{elapsed:?}")),
    };
    relay.sigterm();
    relay.eventually_logs("stopping: finishing open requests").await;
    let shaken = connector.connect("localhost".try_into().unwrap(), stream).await;
    in_time()?;
    let mut stream = shaken.expect("a handshake");
    let (body, timestamp) = (r#"{"eventType":"scan.a","payload":{}}"#, now());
    let request = format!(
        "POST /webhooks/prism HTTP/1.1\r\nhost: localhost\r\nprism-timestamp: {timestamp}\r\nprism-signature: {}\r\n\
         content-length: {}\r\n\r\n{body}",
        sign(SECRET, &timestamp, body.as_bytes()),
        body.len()
    );
    let written = stream.write_all(request.as_bytes()).await;
    in_time()?;
    written.unwrap();
    let mut answer = String::new();
    // The relay may end without a goodbye of TLS, once it has answered.
    let _ = stream.read_to_string(&mut answer).await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer:?}");
    assert_eq!(relay.wait().await.code, Some(0));
    Ok(())
}

/// A client that never ends its request does not delay the restart.
#[tokio::test]
async fn half_a_request_does_not_hold_up_the_next_relay() {
    let (_http, number) = socket();
    let setup = Setup::new("amqp://127.0.0.1:1").handed_over(&[("http", number)]);
    let setup = setup.set("shutdown.grace", "1h").set("http.body_timeout", "30m").set("http.header_timeout", "30m");
    let mut relay = setup.start().await;
    let mut slow = Raw::connect(relay.address()).await;
    slow.write("POST /webhooks/prism HTTP/1.1\r\nhost: a\r\ncontent-length: 1000\r\n\r\n{").await.unwrap();
    relay.eventually_metric("prism_relay_connections", &[("state", "established")], 1.0).await;
    // Within the harness's deadline, where nothing but the handover ends it.
    relay.restart().await;
    relay.post(r#"{"eventType":"scan.a","payload":{}}"#).await.expect(200);
}
