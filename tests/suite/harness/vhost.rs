//! A new vhost on a node for each test, so that tests on a shared node do not see each other's queues.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use lapin::options::{
    BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions,
    ConfirmSelectOptions, QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Confirmation, Connection, ConnectionProperties};
use serde_json::{Value, json};
use tokio::time::error::Elapsed;
use tokio::time::timeout;

use super::background;
use super::eventually::{DEADLINE, eventually, eventually_equal};
use super::management::{Management, encode};
use super::marks::{PASSWORD, assert_discreet};
use super::node::Node;
use super::wire::Wire;

/// The most unacknowledged messages at a time. A broker may refuse a prefetch above 2000 for a quorum queue.
const BATCH: usize = 1000;

/// A new vhost. Dropping this deletes the vhost with everything in it, if the node still answers.
pub struct Vhost {
    name: String,
    address: SocketAddr,
    management: Management,
}

impl Vhost {
    pub async fn new(node: &Node) -> Self {
        let name = format!("test-{}", uuid::Uuid::now_v7());
        node.create_vhost(&name).await;
        Self { name, address: node.address(), management: node.management() }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// The address of the node's AMQP listener, for instance for a [`Wire`].
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The URL for `guest`, who has all permissions.
    pub fn url(&self) -> String {
        self.url_for("guest", PASSWORD, self.address)
    }

    /// The URL for `guest`, through a wire.
    pub fn url_through(&self, wire: &Wire) -> String {
        self.url_for("guest", PASSWORD, wire.address())
    }

    /// The URL for another user or address. User and password must be letters and digits only.
    pub fn url_for(&self, user: &str, password: &str, address: SocketAddr) -> String {
        format!("amqp://{user}:{password}@{address}/{}", encode(&self.name))
    }

    /// The URL with TLS; `login` is empty or ends with `@`.
    pub fn tls_url(&self, login: &str, address: SocketAddr) -> String {
        format!("amqps://{login}{address}/{}", encode(&self.name))
    }

    // -- over AMQP ----------------------------------------------------------------------------------------------------

    pub async fn connect(&self) -> Connection {
        let url = self.url();
        let connection = Connection::connect(&url, ConnectionProperties::default());
        let connection = timeout(DEADLINE, connection).await.expect("an AMQP connection in time");
        connection.unwrap_or_else(|error| panic!("connect to vhost {}: {error}", self.name))
    }

    /// Acts as a worker that fails: takes the first message of the queue and rejects it.
    pub async fn reject(&self, queue: &str) {
        self.eventually_depth(queue, 1).await;
        let connection = self.connect().await;
        let channel = connection.create_channel().await.expect("a channel");
        // RabbitMQ refuses basic.get for a queue with a single active consumer.
        channel.basic_qos(1, BasicQosOptions::default()).await.expect("qos");
        let (options, arguments) = (BasicConsumeOptions::default(), FieldTable::default());
        let consumer = channel.basic_consume(queue.into(), "".into(), options, arguments).await;
        let mut consumer = consumer.expect("a consumer");
        let message = timeout(DEADLINE, consumer.next()).await.expect("a message in time");
        let message = message.expect("a message").expect("a message");
        message.acker.reject(Default::default()).await.expect("reject");
        // basic.reject has no reply, and closing the connection may overtake it; channel.close has a reply.
        channel.close(200, "done".into()).await.expect("close the channel");
        close(&connection).await;
    }

    /// Acts as a worker that dies before it acknowledges a message. Does nothing if the queue is empty.
    pub async fn take_and_drop(&self, queue: &str) {
        let connection = self.connect().await;
        let channel = connection.create_channel().await.expect("a channel");
        let message = channel.basic_get(queue.into(), Default::default()).await.expect("get");
        drop(message);
        close(&connection).await;
    }

    /// Publishes one persistent message and waits for its confirm.
    pub async fn publish(&self, exchange: &str, routing_key: &str, body: impl AsRef<[u8]>) {
        self.publish_with(exchange, routing_key, body, BasicProperties::default()).await;
    }

    /// As [`Self::publish`], with these properties.
    pub async fn publish_with(
        &self,
        exchange: &str,
        routing_key: &str,
        body: impl AsRef<[u8]>,
        properties: BasicProperties,
    ) {
        let connection = self.connect().await;
        let publishing = async {
            let channel = connection.create_channel().await?;
            channel.confirm_select(ConfirmSelectOptions::default()).await?;
            let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
            let properties = properties.with_delivery_mode(2);
            channel.basic_publish(exchange.into(), routing_key.into(), options, body.as_ref(), properties).await?.await
        };
        let confirm = timeout(DEADLINE, publishing).await.expect("a confirm in time");
        let confirm = confirm.unwrap_or_else(|error| panic!("publish to {exchange:?} {routing_key:?}: {error}"));
        assert!(matches!(confirm, Confirmation::Ack(None)), "publish to {exchange:?} {routing_key:?}: {confirm:?}");
        close(&connection).await;
    }

    /// Takes and acknowledges exactly `count` messages of a queue, in the order of their delivery. Waits for the queue
    /// to exist and for the messages to come.
    ///
    /// # Panics
    /// At the deadline, with the number of messages that came and a summary of each.
    pub async fn messages(&self, queue: &str, count: usize) -> Vec<Delivery> {
        eventually(&format!("the queue {queue}"), async || self.look_at(queue).await).await;
        let connection = self.connect().await;
        let mut taken = Vec::new();
        let taking = async {
            while taken.len() < count {
                take(&connection, queue, BATCH.min(count - taken.len()), &mut taken).await?;
            }
            lapin::Result::Ok(())
        };
        let outcome = timeout(DEADLINE, taking).await;
        let came = || taken.iter().map(Delivery::summary).collect::<Vec<_>>().join("\n");
        match outcome {
            Ok(Ok(())) => {}
            Ok(Err(error)) => panic!("{count} messages of {queue}: {error}; {} came:\n{}", taken.len(), came()),
            Err(Elapsed { .. }) => {
                panic!("timed out waiting for: {count} messages of {queue}; last seen: {}:\n{}", taken.len(), came())
            }
        }
        close(&connection).await;
        taken
    }

    /// The number of ready messages in a queue, exact for this instant. Messages that a consumer has do not count.
    pub async fn depth(&self, queue: &str) -> u32 {
        self.look_at(queue).await.unwrap_or_else(|error| panic!("the depth of {queue}: {error}")).message_count()
    }

    /// The number of consumers of a queue.
    pub async fn consumers(&self, queue: &str) -> u32 {
        self.look_at(queue).await.unwrap_or_else(|error| panic!("the consumers of {queue}: {error}")).consumer_count()
    }

    /// Waits until a queue has `expected` ready messages.
    pub async fn eventually_depth(&self, queue: &str, expected: u32) {
        let what = format!("{expected} messages in {queue}");
        eventually_equal(&what, Ok(expected), async || self.look_at(queue).await.map(|queue| queue.message_count()))
            .await;
    }

    /// Checks that a queue is empty, after waiting for acknowledgements that are in flight.
    pub async fn assert_empty(&self, queue: &str) {
        self.eventually_depth(queue, 0).await;
    }

    async fn look_at(&self, queue: &str) -> Result<lapin::Queue, String> {
        let connection = self.connect().await;
        let looking = async {
            let channel = connection.create_channel().await?;
            loop {
                let (options, asked) = (QueueDeclareOptions { passive: true, ..Default::default() }, Instant::now());
                let seen = channel.queue_declare(queue.into(), options, FieldTable::default()).await?;
                // RabbitMQ reports a quorum queue as empty if its leader does not answer within 250 ms.
                if seen.message_count() > 0 || asked.elapsed() < Duration::from_millis(200) {
                    return Ok::<_, lapin::Error>(seen);
                }
            }
        };
        let queue = timeout(DEADLINE, looking).await.expect("an answer to queue.declare in time");
        close(&connection).await;
        queue.map_err(|error| error.to_string())
    }

    // -- over the management API --------------------------------------------------------------------------------------

    /// Declares a durable queue; `arguments` such as `json!({"x-queue-type": "quorum"})`.
    pub async fn create_queue(&self, name: &str, arguments: Value) {
        self.management.put(&self.path("queues", name), json!({"durable": true, "arguments": arguments})).await;
    }

    /// A queue as the API shows it (`arguments`, `type`, `policy`, ...), if it exists. Its counts are some seconds old;
    /// use [`Self::depth`].
    pub async fn queue(&self, name: &str) -> Option<Value> {
        self.management.find(&self.path("queues", name)).await
    }

    pub async fn purge_queue(&self, name: &str) {
        self.management.delete(&format!("{}/contents", self.path("queues", name))).await;
    }

    /// Deletes a queue. Returns whether it existed.
    pub async fn delete_queue(&self, name: &str) -> bool {
        self.management.delete(&self.path("queues", name)).await
    }

    /// Declares a durable exchange of a type such as `topic`.
    pub async fn create_exchange(&self, name: &str, kind: &str, arguments: Value) {
        let body = json!({"type": kind, "durable": true, "arguments": arguments});
        self.management.put(&self.path("exchanges", name), body).await;
    }

    /// An exchange as the API shows it (`type`, `durable`, `arguments`, ...), if it exists.
    pub async fn exchange(&self, name: &str) -> Option<Value> {
        self.management.find(&self.path("exchanges", name)).await
    }

    /// Deletes an exchange. Returns whether it existed.
    pub async fn delete_exchange(&self, name: &str) -> bool {
        self.management.delete(&self.path("exchanges", name)).await
    }

    pub async fn bind(&self, exchange: &str, queue: &str, routing_key: &str) {
        let path = format!("{}/e/{}/q/{}", self.path_of("bindings"), encode(exchange), encode(queue));
        self.management.post(&path, json!({"routing_key": routing_key})).await;
    }

    pub async fn unbind(&self, exchange: &str, queue: &str, routing_key: &str) {
        let of = format!("{}/e/{}/q/{}", self.path_of("bindings"), encode(exchange), encode(queue));
        // The API's name of a binding without arguments.
        let name = if routing_key.is_empty() { "~".to_owned() } else { encode(routing_key) };
        self.management.delete(&format!("{of}/{name}")).await;
    }

    /// Unbinds an exchange from the one that its messages come from.
    pub async fn unbind_exchange(&self, from: &str, to: &str) {
        let of = format!("{}/e/{}/e/{}", self.path_of("bindings"), encode(from), encode(to));
        // The API's name of a binding without a key and arguments.
        self.management.delete(&format!("{of}/~")).await;
    }

    /// All bindings as `(exchange, destination, routing key)`, sorted, without those of the default exchange.
    pub async fn bindings(&self) -> Vec<(String, String, String)> {
        let text = |binding: &Value, key: &str| binding[key].as_str().unwrap_or_default().to_owned();
        let bindings = self.management.list(&self.path_of("bindings")).await;
        let mut bindings: Vec<_> = bindings
            .iter()
            .map(|binding| (text(binding, "source"), text(binding, "destination"), text(binding, "routing_key")))
            .filter(|(source, _, _)| !source.is_empty())
            .collect();
        bindings.sort();
        bindings
    }

    /// Sets a policy for queues and exchanges, such as `json!({"max-length": 1, "overflow": "reject-publish"})`.
    pub async fn set_policy(&self, name: &str, pattern: &str, definition: Value) {
        let body = json!({"pattern": pattern, "definition": definition, "apply-to": "all"});
        self.management.put(&self.path("policies", name), body).await;
    }

    pub async fn delete_policy(&self, name: &str) -> bool {
        self.management.delete(&self.path("policies", name)).await
    }

    /// Sets the permissions of a user of the node in this vhost: regular expressions for configure, write and read.
    pub async fn permit(&self, user: &str, configure: &str, write: &str, read: &str) {
        let body = json!({"configure": configure, "write": write, "read": read});
        self.management.put(&self.path("permissions", user), body).await;
    }

    /// Restricts the routing keys with which a user may publish to a topic exchange to a regular expression.
    pub async fn permit_topics(&self, user: &str, exchange: &str, keys: &str) {
        let body = json!({"exchange": exchange, "write": keys, "read": ".*"});
        self.management.put(&self.path("topic-permissions", user), body).await;
    }

    /// Lets a user publish with all routing keys again.
    pub async fn permit_all_topics(&self, user: &str) {
        self.management.delete(&self.path("topic-permissions", user)).await;
    }

    /// The open connections, as the API shows them. A new one appears a moment after its handshake.
    pub async fn connections(&self) -> Vec<Value> {
        self.management.list(&format!("vhosts/{}/connections", encode(&self.name))).await
    }

    /// Closes every connection as an operator would (320 `CONNECTION_FORCED`). Returns their number.
    pub async fn close_connections(&self) -> usize {
        let mut closed = 0;
        for connection in self.connections().await {
            let name = connection["name"].as_str().expect("a connection has a name");
            closed += usize::from(self.management.delete(&format!("connections/{}", encode(name))).await);
        }
        closed
    }

    /// As [`Self::close_connections`], once the API shows a connection.
    pub async fn eventually_close_connections(&self) {
        eventually("a connection to close", async || match self.close_connections().await {
            0 => Err("the API shows none"),
            _ => Ok(()),
        })
        .await;
    }

    fn path_of(&self, kind: &str) -> String {
        format!("{kind}/{}", encode(&self.name))
    }

    fn path(&self, kind: &str, name: &str) -> String {
        format!("{}/{}", self.path_of(kind), encode(name))
    }
}

impl Drop for Vhost {
    fn drop(&mut self) {
        let (management, path) = (self.management, format!("vhosts/{}", encode(&self.name)));
        // A node that is dead or frozen by now needs no clean-up.
        background::wait_for(Duration::from_secs(5), async move {
            let _ = management.call(hyper::Method::DELETE, &path, &Value::Null).await;
        });
    }
}

/// A message taken from a queue.
#[derive(Debug, Clone)]
pub struct Delivery {
    pub exchange: String,
    pub routing_key: String,
    pub body: Vec<u8>,
    pub redelivered: bool,
    pub properties: BasicProperties,
    /// Strings as text, values of other types as their `Debug` text.
    pub headers: BTreeMap<String, String>,
}

impl Delivery {
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error} in {:?}", self.text()))
    }

    /// The `message_id`; empty if the message has none.
    pub fn id(&self) -> String {
        self.properties.message_id().as_ref().map(ToString::to_string).unwrap_or_default()
    }

    /// A header.
    ///
    /// # Panics
    /// If it is missing, with all headers.
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).unwrap_or_else(|| panic!("no header {name} in {:?}", self.headers))
    }

    fn summary(&self) -> String {
        format!("  {} {} {}", self.id(), self.routing_key, self.text().chars().take(80).collect::<String>())
    }
}

impl From<lapin::message::Delivery> for Delivery {
    fn from(delivery: lapin::message::Delivery) -> Self {
        let text = |value: &AMQPValue| match value {
            AMQPValue::LongString(text) => String::from_utf8_lossy(text.as_bytes()).into_owned(),
            AMQPValue::ShortString(text) => text.to_string(),
            other => format!("{other:?}"),
        };
        let headers = delivery.properties.headers().iter().flatten();
        assert_discreet("the metadata of a message", &format!("{:?}", delivery.properties));
        Self {
            headers: headers.map(|(name, value)| (name.to_string(), text(value))).collect(),
            exchange: delivery.exchange.to_string(),
            routing_key: delivery.routing_key.to_string(),
            body: delivery.data,
            redelivered: delivery.redelivered,
            properties: delivery.properties,
        }
    }
}

/// Takes `count` messages into `taken` and acknowledges them. No further message leaves the queue: the prefetch is
/// `count`, and the consumer is cancelled before the acknowledgement makes room for more.
async fn take(connection: &Connection, queue: &str, count: usize, taken: &mut Vec<Delivery>) -> lapin::Result<()> {
    let prefetch = u16::try_from(count).expect("a batch fits the prefetch");
    let channel = connection.create_channel().await?;
    channel.basic_qos(prefetch, BasicQosOptions::default()).await?;
    let (tag, arguments) = ("harness", FieldTable::default());
    let mut consumer =
        channel.basic_consume(queue.into(), tag.into(), BasicConsumeOptions::default(), arguments).await?;
    let mut last = 0;
    for _ in 0..count {
        let delivery = consumer.next().await.expect("the broker does not cancel the consumer")?;
        last = delivery.delivery_tag;
        taken.push(delivery.into());
    }
    channel.basic_cancel(tag.into(), BasicCancelOptions::default()).await?;
    channel.basic_ack(last, BasicAckOptions { multiple: true }).await?;
    // basic.ack has no reply; channel.close has one, and RabbitMQ sends it after it has processed the ack.
    channel.close(200, "done".into()).await
}

async fn close(connection: &Connection) {
    // The broker may have closed the connection already.
    let _ = timeout(DEADLINE, connection.close(200, "done".into())).await;
}
