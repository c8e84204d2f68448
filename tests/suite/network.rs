//! Faults of the network between relay and broker. Prism does not notice them, and no event is lost.

use std::time::Duration;

use crate::harness::{Node, Relay, Setup, Traffic, Vhost, Wire, eventually};

/// A relay that notices a silent broker within seconds.
fn setup(vhost: &Vhost, wire: &Wire) -> Setup {
    Setup::new(&vhost.url_through(wire))
        .set("broker.heartbeat", "1s")
        .set("broker.confirm_timeout", "3s")
        .set("broker.connect_timeout", "2s")
}

async fn confirms(relay: &Relay) -> f64 {
    relay.metric("prism_relay_publish_total", &[("outcome", "confirmed")]).await
}

/// Waits until the broker has confirmed another event.
async fn deliveries_go_on(relay: &Relay) {
    let before = confirms(relay).await;
    eventually("more confirms", async || {
        let now = confirms(relay).await;
        if now > before { Ok(()) } else { Err(format!("{now}\n{}", relay.log_text())) }
    })
    .await;
}

async fn the_relay_gives_up_the_connection(relay: &Relay) {
    eventually("the relay to give up the connection", async || {
        let status = relay.status().await;
        let connects = status["broker"]["connects"].as_u64();
        if status["broker"]["connected"] == false || connects > Some(1) { Ok(()) } else { Err(status) }
    })
    .await;
}

#[tokio::test]
async fn connections_are_cut_and_refused_under_load() {
    let vhost = Vhost::new(Node::shared().await).await;
    let mut wire = Wire::new(vhost.address());
    let relay = setup(&vhost, &wire).start().await;
    let traffic = Traffic::start(&relay);
    for _ in 0..5 {
        deliveries_go_on(&relay).await;
        wire.cut();
    }
    deliveries_go_on(&relay).await;
    wire.refuse().await;
    wire.cut();
    traffic.more(50).await;
    wire.accept();
    deliveries_go_on(&relay).await;
    traffic.arrives(&relay, &vhost).await;
}

#[tokio::test]
async fn a_black_hole_without_a_reset() {
    let vhost = Vhost::new(Node::shared().await).await;
    let wire = Wire::new(vhost.address());
    let relay = setup(&vhost, &wire).start().await;
    let traffic = Traffic::start(&relay);
    deliveries_go_on(&relay).await;
    wire.stall();
    the_relay_gives_up_the_connection(&relay).await;
    // New connections get no answer either.
    relay.eventually_logs("no answer from").await;
    traffic.more(50).await;
    wire.flow();
    deliveries_go_on(&relay).await;
    traffic.arrives(&relay, &vhost).await;
}

#[tokio::test]
async fn a_connection_that_is_open_on_one_side_only() {
    let vhost = Vhost::new(Node::shared().await).await;
    let wire = Wire::new(vhost.address());
    let relay = setup(&vhost, &wire).start().await;
    let traffic = Traffic::start(&relay);
    deliveries_go_on(&relay).await;
    wire.lose_the_broker_side();
    the_relay_gives_up_the_connection(&relay).await;
    deliveries_go_on(&relay).await;
    traffic.arrives(&relay, &vhost).await;
}

/// With the default deadlines, which have to suffice for the many round trips that declare the topology.
#[tokio::test]
async fn half_a_second_of_latency_each_way() {
    let vhost = Vhost::new(Node::shared().await).await;
    let wire = Wire::new(vhost.address());
    wire.set_latency(Duration::from_millis(500));
    let relay = Setup::new(&vhost.url_through(&wire)).start().await;
    let traffic = Traffic::start(&relay);
    deliveries_go_on(&relay).await;
    traffic.more(100).await;
    wire.cut();
    deliveries_go_on(&relay).await;
    // One event of a subject for each round trip is less than the traffic: the rest waits on disk.
    wire.set_latency(Duration::ZERO);
    traffic.arrives(&relay, &vhost).await;
}

#[tokio::test]
async fn a_thousand_bytes_a_second() {
    let vhost = Vhost::new(Node::shared().await).await;
    let wire = Wire::new(vhost.address());
    wire.set_bandwidth(Some(1000));
    let relay = Setup::new(&vhost.url_through(&wire)).start().await;
    // More than the line can carry: the rest waits on disk.
    let traffic = Traffic::start(&relay);
    deliveries_go_on(&relay).await;
    traffic.more(50).await;
    deliveries_go_on(&relay).await;
    wire.set_bandwidth(None);
    traffic.arrives(&relay, &vhost).await;
}
