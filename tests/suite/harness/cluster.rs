//! Three RabbitMQ nodes that form a cluster, for tests that break it and repair it.

use std::collections::BTreeSet;
use std::time::Duration;

use hyper::Method;
use serde_json::Value;
use tokio::sync::{Mutex, MutexGuard, OnceCell};

use super::eventually::eventually_within;
use super::node::Node;

const NAMES: [&str; 3] = ["n1@localhost", "n2@localhost", "n3@localhost"];

/// How long the nodes may take to see each other once all of them run.
const WHOLE_DEADLINE: Duration = Duration::from_secs(60);

static SHARED: OnceCell<Result<Mutex<Cluster>, String>> = OnceCell::const_new();

/// A cluster of three nodes.
pub struct Cluster {
    nodes: [Node; 3],
    /// The node that the others cannot reach.
    isolated: Option<usize>,
}

impl Cluster {
    /// The cluster that all tests share, repaired, for one test at a time. The first test waits for the boot.
    pub async fn turn() -> MutexGuard<'static, Self> {
        let shared = SHARED.get_or_init(Self::try_start).await;
        let mut cluster = shared.as_ref().unwrap_or_else(|error| panic!("{error}")).lock().await;
        cluster.repair().await;
        cluster
    }

    async fn try_start() -> Result<Mutex<Self>, String> {
        let first = Node::prepare(NAMES[0], &NAMES, None)?;
        let other = |name| Node::prepare(name, &NAMES, Some(first.epmd()));
        let (second, third) = (other(NAMES[1])?, other(NAMES[2])?);
        // All at once: RabbitMQ 4 waits for the others before it founds a cluster.
        tokio::try_join!(first.boot(), second.boot(), third.boot())?;
        Ok(Mutex::new(Self { nodes: [first, second, third], isolated: None }))
    }

    pub fn node(&self, index: usize) -> &Node {
        &self.nodes[index]
    }

    /// Sets `cluster_partition_handling` on every node: `ignore` or `pause_minority`.
    pub async fn set_partition_handling(&self, mode: &str) {
        let expression = format!("application:set_env(rabbit, cluster_partition_handling, {mode}).");
        for node in &self.nodes {
            assert_eq!(node.ctl(&["eval", &expression]).await, "ok");
        }
    }

    /// Separates one node from the two others: the node gets a cookie for them that they do not have, so each side
    /// refuses the other's connections. Clients still reach every node.
    pub async fn isolate(&mut self, index: usize) {
        self.isolated = Some(index);
        let others = self.others(index);
        let expression = format!(
            "[erlang:set_cookie(Node, parted) || Node <- {others}], [erlang:disconnect_node(Node) || Node <- {others}]."
        );
        self.nodes[index].ctl(&["eval", &expression]).await;
    }

    /// Starts dead nodes, ends a partition, and waits until every node sees all three.
    pub async fn repair(&mut self) {
        for node in self.nodes.iter().filter(|node| node.runs()) {
            node.thaw();
        }
        if let Some(index) = self.isolated {
            let expression = format!("[erlang:set_cookie(Node, prism) || Node <- {}].", self.others(index));
            self.nodes[index].ctl(&["eval", &expression]).await;
            self.isolated = None;
        }
        let start = async |node: &Node| {
            if !node.runs() {
                node.start_again().await;
            }
        };
        let [first, second, third] = &self.nodes;
        tokio::join!(start(first), start(second), start(third));
        for node in &self.nodes {
            let what = format!("{} to see all three nodes", node.name());
            eventually_within(WHOLE_DEADLINE, &what, async || sees_all(node).await).await;
        }
    }

    /// The nodes that lead the quorum queues of a vhost, according to a running node.
    pub async fn leaders(&self, vhost: &str) -> BTreeSet<String> {
        let node = self.nodes.iter().find(|node| node.runs()).expect("a node that runs");
        let queues = node.management().list(&format!("queues/{vhost}")).await;
        queues.iter().map(|queue| queue["leader"].as_str().unwrap_or_default().to_owned()).collect()
    }

    /// The names of all nodes but one, as an Erlang list.
    fn others(&self, index: usize) -> String {
        let quoted = |node: &Node| format!("'{}'", node.name());
        let others = self.nodes.iter().enumerate().filter(|(other, _)| *other != index).map(|(_, node)| quoted(node));
        format!("[{}]", others.collect::<Vec<_>>().join(", "))
    }
}

/// Checks that this node runs and is connected to both others.
async fn sees_all(node: &Node) -> Result<(), String> {
    let answer = node.management().call(Method::GET, "nodes", &Value::Null).await?;
    if answer.status != 200 {
        return Err(answer.to_string());
    }
    let nodes = answer.json();
    let well = |node: &&Value| node["running"] == true && node["partitions"].as_array().is_some_and(Vec::is_empty);
    let count = nodes.as_array().into_iter().flatten().filter(well).count();
    if count == NAMES.len() { Ok(()) } else { Err(format!("{count} nodes")) }
}
