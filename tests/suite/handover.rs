//! A service manager holds the sockets open while one relay ends and the next one begins.

use std::collections::HashSet;
use std::net::TcpListener;
use std::os::fd::{AsRawFd, RawFd};

use rustix::io::{FdFlags, fcntl_setfd};

use crate::harness::{Node, Setup, Vhost, Wire, eventually};

/// A listening socket, as a unit with `ListenStream=` makes one, that programs we start inherit.
fn socket() -> (TcpListener, RawFd) {
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    fcntl_setfd(&socket, FdFlags::empty()).unwrap();
    let number = socket.as_raw_fd();
    (socket, number)
}

#[tokio::test]
async fn a_restart_under_load_refuses_nobody_and_loses_nothing() {
    let vhost = Vhost::new(Node::shared().await).await;
    let ((http, http_number), (_ops, ops_number)) = (socket(), socket());
    let setup = Setup::new(&vhost.url()).handed_over(&[("http", http_number), ("ops", ops_number)]);
    let mut relay = setup.start().await;
    assert_eq!(relay.address(), http.local_addr().unwrap());
    let url = format!("http://{}/webhooks/prism", http.local_addr().unwrap());
    let sender = Setup::new(&vhost.url());
    let arguments = ["send", "--url", &url, "--type", "scan.a", "--rate", "250", "--count", "1500"];
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
    // A connection that was kept open for long may break off just as it is used again; Prism tries again then, and so does this.
    assert!(!sent.stdout.contains("answered 5") && !sent.stdout.contains("refused"), "{}", sent.stdout);
    assert!(
        sent.stdout.lines().any(|line| line.starts_with("accepted ") && line.ends_with(" 1500")),
        "{}",
        sent.stdout
    );
    relay.eventually_metric("prism_relay_spool_events", &[], 0.0).await;
    let depth = vhost.depth("prism.scan").await as usize;
    let ids: HashSet<_> = vhost.messages("prism.scan", depth).await.iter().map(|message| message.id()).collect();
    assert_eq!(ids.len(), 1500, "of {depth}");
}

/// The next relay can deliver as well; webhooks cannot wait.
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
    relay.eventually_metric("prism_relay_broker_connected", &[], 1.0).await;
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
    assert!(ended.code == Some(1) && ended.stderr.contains("two sockets for http"), "{ended:?}");
    // One alone is for the webhooks, whatever its name.
    let (http, number) = socket();
    let relay = Setup::new("amqp://127.0.0.1:1").handed_over(&[("prism-relay.socket", number)]).start().await;
    assert_eq!(relay.address(), http.local_addr().unwrap());
}
