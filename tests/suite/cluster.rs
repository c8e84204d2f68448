//! A cluster of three nodes: leaders die, nodes are restarted in turn, the majority is lost and regained, the network
//! splits. Prism is answered 200 throughout, and nothing is lost, renamed or reordered.

use serde_json::{Value, json};

use crate::harness::marks::PASSWORD;
use crate::harness::{Cluster, Node, Relay, Setup, Traffic, Vhost, eventually};

/// The URLs of a vhost on these nodes, in this order.
fn urls(vhost: &Vhost, nodes: &[&Node]) -> Value {
    json!(nodes.iter().map(|node| vhost.url_for("guest", PASSWORD, node.address())).collect::<Vec<_>>())
}

fn setup(vhost: &Vhost, nodes: &[&Node]) -> Setup {
    Setup::new("unused")
        .set("broker.urls", urls(vhost, nodes))
        .set("broker.heartbeat", "1s")
        .set("broker.confirm_timeout", "5s")
        .set("broker.connect_timeout", "5s")
}

/// Waits until the broker has confirmed `count` more events.
async fn deliveries_go_on(relay: &Relay, count: u32) {
    let confirms = async || relay.metric("prism_relay_publish_total", &[("outcome", "confirmed")]).await;
    let before = confirms().await;
    eventually(&format!("{count} more confirms"), async || {
        let now = confirms().await;
        if now >= before + f64::from(count) { Ok(()) } else { Err(format!("{now}\n{}", relay.status().await)) }
    })
    .await;
}

/// Waits until the relay is connected to another node than this one.
async fn the_relay_leaves(relay: &Relay, node: &Node) {
    eventually(&format!("the relay to connect to another node than {}", node.name()), async || {
        let broker = relay.status().await["broker"].clone();
        let there = broker["url"].as_str().is_some_and(|url| url.contains(&node.address().to_string()));
        if broker["connected"] == true && !there { Ok(()) } else { Err(broker) }
    })
    .await;
}

#[tokio::test]
async fn the_node_that_leads_the_queues_is_killed() {
    let mut cluster = Cluster::turn().await;
    // The node on which a queue is declared leads it. One relay is connected to that node, the other to another node.
    let (near, far) = (Vhost::new(cluster.node(0)).await, Vhost::new(cluster.node(0)).await);
    let [first, second, third] = [0, 1, 2].map(|index| cluster.node(index));
    let near_relay = setup(&near, &[first, second, third]).start().await;
    let mut far_relay = setup(&far, &[first]).start().await;
    for (relay, vhost) in [(&near_relay, &near), (&far_relay, &far)] {
        relay.eventually_connected().await;
        let leaders = cluster.leaders(vhost.name()).await;
        assert_eq!(leaders.iter().collect::<Vec<_>>(), [first.name()]);
    }
    far_relay.reconfigure("broker.urls", urls(&far, &[second, third]));
    far_relay.restart().await;

    let (near_traffic, far_traffic) = (Traffic::start(&near_relay), Traffic::start(&far_relay));
    deliveries_go_on(&near_relay, 50).await;
    deliveries_go_on(&far_relay, 50).await;
    first.kill().await;
    the_relay_leaves(&near_relay, first).await;
    deliveries_go_on(&near_relay, 50).await;
    deliveries_go_on(&far_relay, 50).await;
    cluster.repair().await;
    deliveries_go_on(&near_relay, 50).await;
    near_traffic.arrives(&near_relay, &near).await;
    far_traffic.arrives(&far_relay, &far).await;
}

#[tokio::test]
async fn all_nodes_are_restarted_one_after_the_other() {
    let mut cluster = Cluster::turn().await;
    let vhost = Vhost::new(cluster.node(0)).await;
    let relay = setup(&vhost, &[0, 1, 2].map(|index| cluster.node(index))).start().await;
    let traffic = Traffic::start(&relay);
    deliveries_go_on(&relay, 50).await;
    for index in 0..3 {
        cluster.node(index).stop().await;
        the_relay_leaves(&relay, cluster.node(index)).await;
        deliveries_go_on(&relay, 20).await;
        cluster.repair().await;
        deliveries_go_on(&relay, 20).await;
    }
    traffic.arrives(&relay, &vhost).await;
}

/// A quorum queue that lost and regained its majority may send neither ack nor nack to channels that had published to
/// it. One relay gives up its channel while there is no majority. The channel of the other relay survives, and its
/// queues lose their leader as well.
#[tokio::test]
async fn the_majority_is_lost_and_regained() {
    let mut cluster = Cluster::turn().await;
    cluster.set_partition_handling("ignore").await;
    let (quick, patient) = (Vhost::new(cluster.node(0)).await, Vhost::new(cluster.node(0)).await);
    let [first, second, third] = [0, 1, 2].map(|index| cluster.node(index));
    let quick_relay = setup(&quick, &[first]).set("broker.confirm_timeout", "2s").start().await;
    let mut patient_relay = setup(&patient, &[second]).set("broker.confirm_timeout", "25s").start().await;
    patient_relay.eventually_connected().await;
    assert_eq!(cluster.leaders(patient.name()).await.iter().collect::<Vec<_>>(), [second.name()]);
    patient_relay.reconfigure("broker.urls", urls(&patient, &[first]));
    patient_relay.restart().await;
    let (quick_traffic, patient_traffic) = (Traffic::start(&quick_relay), Traffic::start(&patient_relay));
    deliveries_go_on(&quick_relay, 50).await;
    deliveries_go_on(&patient_relay, 50).await;
    tokio::join!(second.kill(), third.kill());
    quick_relay.eventually_logs("did not confirm a publish within").await;
    quick_traffic.more(20).await;
    patient_traffic.more(20).await;
    assert!(quick_relay.spool().await.pending > 0);
    cluster.repair().await;
    deliveries_go_on(&quick_relay, 20).await;
    quick_traffic.arrives(&quick_relay, &quick).await;
    patient_traffic.arrives(&patient_relay, &patient).await;
    let silent = patient_relay.log_text().contains("did not confirm a publish within");
    println!("the surviving channel was {}", if silent { "silent" } else { "confirmed" });
}

/// A real partition of Erlang's network: see [`Cluster::isolate`].
#[tokio::test]
async fn the_minority_side_of_a_partition_pauses() {
    let mut cluster = Cluster::turn().await;
    cluster.set_partition_handling("pause_minority").await;
    let (roaming, bound) = (Vhost::new(cluster.node(0)).await, Vhost::new(cluster.node(0)).await);
    let roaming_relay = setup(&roaming, &[0, 1, 2].map(|index| cluster.node(index))).start().await;
    let bound_relay = setup(&bound, &[cluster.node(0)]).start().await;
    let (roaming_traffic, bound_traffic) = (Traffic::start(&roaming_relay), Traffic::start(&bound_relay));
    deliveries_go_on(&roaming_relay, 50).await;
    deliveries_go_on(&bound_relay, 50).await;

    cluster.isolate(0).await;
    // One relay moves to the majority. The other knows only the isolated node and keeps its events.
    the_relay_leaves(&roaming_relay, cluster.node(0)).await;
    deliveries_go_on(&roaming_relay, 50).await;
    bound_relay.eventually_metric("prism_relay_broker_connected", &[], 0.0).await;
    bound_traffic.more(50).await;
    cluster.repair().await;
    deliveries_go_on(&bound_relay, 50).await;
    roaming_traffic.arrives(&roaming_relay, &roaming).await;
    bound_traffic.arrives(&bound_relay, &bound).await;
    cluster.set_partition_handling("ignore").await;
}
