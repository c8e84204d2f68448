//! The options of a queue on a real broker: retry ladder, limits, single active consumer, partitions.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use futures_util::StreamExt;
use lapin::options::{BasicAckOptions, BasicConsumeOptions, BasicQosOptions};
use lapin::types::FieldTable;
use serde_json::{Value, json};

use crate::harness::{Delivery, Node, Relay, Setup, Vhost, eventually, eventually_equal};

const EVENT: &str = r#"{"eventType":"scan.a","payload":{}}"#;

/// A relay whose queue `prism.scan` has `more`.
async fn relay_with(vhost: &Vhost, more: Value) -> Relay {
    let mut queue = json!({ "name": "prism.scan", "bindings": ["scan.#"] });
    queue.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    Setup::new(&vhost.url()).set("topology.queues", json!([queue])).start().await
}

/// The event numbered `number` of a scan.
fn event(scan: u128, number: u64) -> String {
    let scan = uuid::Uuid::from_u128(scan);
    json!({ "eventType": "scan.a", "payload": { "scanId": scan, "number": number } }).to_string()
}

#[tokio::test]
async fn a_rejected_message_climbs_the_ladder_and_then_dies() {
    let vhost = Vhost::new(Node::shared().await).await;
    let relay = relay_with(&vhost, json!({ "retry_delays": ["5s", "500ms"] })).await;
    let id = relay.post(EVENT).await.id();
    vhost.reject("prism.scan").await;
    vhost.eventually_depth("prism.scan.retry.1", 1).await;
    // Other queues do not get it again.
    for _ in 0..2 {
        vhost.reject("prism.scan").await;
    }
    let dead = vhost.messages("prism.dead", 1).await.remove(0);
    assert_eq!((dead.id(), dead.text().as_str()), (id, EVENT));
    assert_eq!(dead.properties.kind().as_ref().unwrap().as_str(), "scan.a");
    for queue in ["prism.scan", "prism.scan.retry.1", "prism.scan.retry.2", "prism.unrouted"] {
        vhost.assert_empty(queue).await;
    }
}

#[tokio::test]
async fn each_step_waits_in_a_queue_of_its_own() {
    let vhost = Vhost::new(Node::shared().await).await;
    let relay = relay_with(&vhost, json!({ "retry_delays": ["100ms", "1h"] })).await;
    relay.post(EVENT).await.expect(200);
    vhost.reject("prism.scan").await;
    vhost.reject("prism.scan").await;
    vhost.eventually_depth("prism.scan.retry.2", 1).await;
    for queue in ["prism.scan", "prism.scan.retry.1", "prism.dead"] {
        vhost.assert_empty(queue).await;
    }
}

/// RabbitMQ drops a message that comes back to a queue without a rejection on the way, as a loop, so it must not climb.
#[tokio::test]
async fn a_message_that_was_returned_too_often_dies_on_any_step() {
    let vhost = Vhost::new(Node::shared().await).await;
    let relay = relay_with(&vhost, json!({ "retry_delays": ["100ms", "100ms"], "delivery_limit": 2 })).await;
    relay.eventually_connected().await;
    for rejections in [0, 1] {
        let id = relay.post(event(1, rejections)).await.id();
        for _ in 0..rejections {
            vhost.reject("prism.scan").await;
        }
        // RabbitMQ before 3.13 has no header for the reason of a later death, so there it climbs the rest of the
        // ladder.
        eventually("the message in prism.dead", async || {
            vhost.take_and_drop("prism.scan").await;
            if vhost.depth("prism.dead").await == 1 { Ok(()) } else { Err("not there") }
        })
        .await;
        assert_eq!(vhost.messages("prism.dead", 1).await[0].id(), id);
    }
}

#[tokio::test]
async fn a_message_that_no_worker_took_in_time_dies_on_any_step() {
    let vhost = Vhost::new(Node::shared().await).await;
    for (rejections, more) in [
        (0, json!({ "ttl": "1s" })),
        (0, json!({ "ttl": "1s", "retry_delays": ["100ms"] })),
        // Long enough to reject the message first.
        (1, json!({ "ttl": "10s", "retry_delays": ["100ms"] })),
    ] {
        let relay = relay_with(&vhost, more).await;
        let id = relay.post(EVENT).await.id();
        for _ in 0..rejections {
            vhost.reject("prism.scan").await;
        }
        assert_eq!(vhost.messages("prism.dead", 1).await[0].id(), id);
        vhost.assert_empty("prism.scan").await;
        drop(relay);
        vhost.delete_queue("prism.scan").await;
    }
}

#[tokio::test]
async fn a_full_queue_leaves_the_rest_to_the_relay() {
    let vhost = Vhost::new(Node::shared().await).await;
    let queues = json!([
        { "name": "prism.scan", "bindings": ["scan.#"], "max_length": 2 },
        { "name": "other", "bindings": ["scan.#"] },
    ]);
    let relay = Setup::new(&vhost.url()).set("topology.queues", queues).start().await;
    let (mut ids, mut number) = (BTreeSet::new(), 0);
    // The queue refuses messages only a moment after it has reached its limit, and takes some more until then.
    eventually("a message to be refused", async || {
        ids.insert(relay.post(event(1, number)).await.id());
        number += 1;
        let nacked = relay.metric("prism_relay_publish_total", &[("outcome", "nacked")]).await;
        if nacked > 0.0 { Ok(()) } else { Err(number) }
    })
    .await;
    for number in 1000..1100 {
        ids.insert(relay.post(event(1, number)).await.id());
    }
    // Each attempt puts one more copy into the other queue, of one event, not of all.
    let tries = async || relay.metric("prism_relay_broker_reconnects_total", &[]).await;
    eventually("some tries", async || {
        let tries = tries().await;
        if tries >= 6.0 { Ok(()) } else { Err(tries) }
    })
    .await;
    let depth = vhost.depth("other").await as usize;
    let most = ids.len() + tries().await as usize + 1;
    assert!(depth <= most, "{depth} messages in the other queue, {most} are allowed");
    let mut seen = BTreeSet::new();
    while seen.len() < ids.len() {
        seen.extend(vhost.messages("prism.scan", 1).await.iter().map(Delivery::id));
    }
    assert_eq!(seen, ids);
}

#[tokio::test]
async fn with_a_single_active_consumer_one_works_and_the_next_takes_over() {
    let vhost = Vhost::new(Node::shared().await).await;
    let relay = relay_with(&vhost, json!({ "single_active_consumer": true })).await;
    relay.eventually_connected().await;
    let book = Book::default();
    let first = Worker::start(&vhost, "prism.scan", "first", &book).await;
    let _second = Worker::start(&vhost, "prism.scan", "second", &book).await;
    for number in 0..20 {
        relay.post(event(1, number)).await.expect(200);
    }
    book.eventually_has(20).await;
    assert!(book.workers().iter().all(|worker| worker == "first"), "{:?}", book.workers());
    first.kill();
    // Messages that RabbitMQ delivers to a stopping worker may be redelivered after later ones, so wait until it is
    // gone.
    eventually_equal("one worker to be left", 1, async || vhost.consumers("prism.scan").await).await;
    for number in 20..40 {
        relay.post(event(1, number)).await.expect(200);
    }
    book.eventually_has(40).await;
    book.assert_in_order();
    assert_eq!(book.workers(), ["first".to_owned(), "second".to_owned()].into());
}

#[tokio::test]
async fn partitions_keep_a_subject_together_and_lose_nothing() {
    let vhost = Vhost::new(Node::shared().await).await;
    let relay = relay_with(&vhost, json!({ "partitions": 3, "retry_delays": ["100ms"] })).await;
    for scan in 0..30 {
        for number in 0..2 {
            relay.post(event(scan, number)).await.expect(200);
        }
    }
    // An event without a subject.
    relay.post(EVENT).await.expect(200);
    relay.eventually_nothing_pending().await;
    let mut home: BTreeMap<String, String> = BTreeMap::new();
    let mut sizes = Vec::new();
    for partition in ["prism.scan.1", "prism.scan.2", "prism.scan.3"] {
        let depth = vhost.depth(partition).await as usize;
        sizes.push(depth);
        for message in vhost.messages(partition, depth).await {
            let subject = message.headers.get("prism-subject").cloned().unwrap_or_default();
            assert_eq!(home.entry(subject).or_insert(partition.to_owned()), partition);
        }
    }
    assert_eq!(sizes.iter().sum::<usize>(), 61);
    assert!(sizes.iter().all(|size| *size > 2), "{sizes:?}");
    // A rejected message comes back to its own partition.
    relay.post(event(7, 9)).await.expect(200);
    let subject = format!("scan:{}", uuid::Uuid::from_u128(7));
    let partition = &home[&subject];
    vhost.reject(partition).await;
    assert_eq!(vhost.messages(partition, 1).await[0].header("prism-subject"), subject);
    vhost.assert_empty("prism.unrouted").await;
}

/// Workers come and go while events arrive: nothing is lost, and the events of one scan stay in order.
#[tokio::test]
async fn workers_are_added_and_killed_while_events_arrive() {
    const SCANS: u128 = 20;
    const EACH: u64 = 40;
    let vhost = Vhost::new(Node::shared().await).await;
    let relay = relay_with(&vhost, json!({ "partitions": 4 })).await;
    relay.eventually_connected().await;
    let book = Book::default();
    let hire = async |name: &str| {
        let mut workers = Vec::new();
        for partition in 1..=4 {
            workers.push(Worker::start(&vhost, &format!("prism.scan.{partition}"), name, &book).await);
        }
        workers
    };
    let first = hire("first").await;
    let total = SCANS as usize * EACH as usize;
    let mut second = Vec::new();
    for number in 0..EACH {
        for scan in 0..SCANS {
            relay.post(event(scan, number)).await.expect(200);
        }
        match number {
            10 => second = hire("second").await,
            // Their unacknowledged messages go to the others.
            20 => first.iter().for_each(Worker::kill),
            30 => drop(hire("third").await),
            _ => {}
        }
    }
    book.eventually_has(total).await;
    book.assert_in_order();
    assert!(book.workers().contains("second"));
    drop(second);
    for queue in ["prism.unrouted", "prism.dead"] {
        vhost.assert_empty(queue).await;
    }
}

/// The finished work: worker, scan and number of each event.
#[derive(Clone, Default)]
struct Book(Arc<Mutex<Vec<(String, String, u64)>>>);

impl Book {
    fn entries(&self) -> Vec<(String, String, u64)> {
        self.0.lock().unwrap().clone()
    }

    async fn eventually_has(&self, count: usize) {
        eventually(&format!("{count} events to be done"), async || {
            let done: BTreeSet<_> = self.entries().into_iter().map(|(_, scan, number)| (scan, number)).collect();
            if done.len() == count { Ok(()) } else { Err(done.len()) }
        })
        .await;
    }

    fn workers(&self) -> BTreeSet<String> {
        self.entries().into_iter().map(|(worker, _, _)| worker).collect()
    }

    /// An event that was done twice counts when it was done first.
    fn assert_in_order(&self) {
        let mut last: BTreeMap<String, u64> = BTreeMap::new();
        let mut seen = BTreeSet::new();
        for (worker, scan, number) in self.entries() {
            if seen.insert((scan.clone(), number)) {
                let before = last.insert(scan.clone(), number);
                assert!(
                    before.is_none_or(|before| before < number),
                    "{worker} does {number} of {scan} after {before:?}"
                );
            }
        }
    }
}

/// Consumes a queue, writes each event into the book, and acknowledges it.
struct Worker(tokio::task::AbortHandle);

impl Worker {
    async fn start(vhost: &Vhost, queue: &str, name: &str, book: &Book) -> Self {
        let connection = vhost.connect().await;
        let channel = connection.create_channel().await.unwrap();
        channel.basic_qos(5, BasicQosOptions::default()).await.unwrap();
        let (options, arguments) = (BasicConsumeOptions::default(), FieldTable::default());
        let mut deliveries = channel.basic_consume(queue.into(), "".into(), options, arguments).await.unwrap();
        let (book, name) = (book.clone(), name.to_owned());
        let work = tokio::spawn(async move {
            // Keeps the connection open until this task ends.
            let _connection = connection;
            while let Some(Ok(delivery)) = deliveries.next().await {
                let json: Value = serde_json::from_slice(&delivery.data).unwrap();
                let payload = &json["payload"];
                let scan = payload["scanId"].as_str().unwrap().to_owned();
                book.0.lock().unwrap().push((name.clone(), scan, payload["number"].as_u64().unwrap()));
                let _ = delivery.acker.ack(BasicAckOptions::default()).await;
            }
        });
        Self(work.abort_handle())
    }

    /// Ends the worker at once, and its connection with it.
    fn kill(&self) {
        self.0.abort();
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Without the management API: the counts over AMQP say which queue is full.
#[tokio::test]
async fn a_full_queue_is_named_until_it_has_room() {
    let node = Node::shared().await;
    let vhost = Vhost::new(node).await;
    let queues = json!([{ "name": "prism.scan", "bindings": ["scan.#"], "max_length": 2 }]);
    let setup = || Setup::new(&vhost.url()).set("topology.queues", queues.clone()).set("broker.watch_interval", "1s");
    let relay = setup().start().await;
    let mut number = 0;
    let line = eventually("the queue to be named", async || {
        relay.post(event(1, number)).await.expect(200);
        number += 1;
        let lines = relay.logs();
        let named = |line: &&Value| line["message"].as_str().unwrap_or("").starts_with("a queue cannot take messages");
        lines.iter().find(named).cloned().ok_or(number)
    })
    .await;
    assert_eq!(line["queue"], "prism.scan", "{line}");
    let reason = line["reason"].as_str().unwrap();
    assert!(reason.starts_with("the queue is full: it holds ") && reason.ends_with("may hold 2"), "{line}");
    let queues = relay.status().await["watch"]["queues"].clone();
    let queue = queues.as_array().unwrap().iter().find(|queue| queue["name"] == "prism.scan").unwrap();
    assert_eq!(queue["trouble"]["kind"], "full", "{queue}");
    assert!(queue["messages"].as_u64().unwrap() >= 2, "{queue}");
    // The API counts a moment later.
    let url = format!("http://127.0.0.1:{}", node.management().port);
    let with_api = setup().set("broker.management_url", url);
    eventually("the commands to name it", async || {
        let diff = with_api.run(&["topology", "diff"]).await;
        if diff.code == Some(1) && diff.stdout.contains("queue prism.scan: is full: it holds ") {
            Ok(())
        } else {
            Err(format!("{diff:?}"))
        }
    })
    .await;
    let mut seen = BTreeSet::new();
    while seen.len() < number as usize {
        seen.extend(vhost.messages("prism.scan", 1).await.iter().map(Delivery::id));
    }
    relay.eventually_logs("the queue takes messages again").await;
}
