//! How throughput grows with the number of workers: competing, partitioned, or with a single active consumer. Work is
//! simulated by a pause, as for a database. Without work, the result is the cost of RabbitMQ and the acks.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use lapin::BasicProperties;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::harness::{Node, Setup, Vhost};
use crate::report::Report;
use crate::report::Target::{AtLeast, None as Reference};

/// Time that the work of one message takes.
const WORK: Duration = Duration::from_millis(5);
/// Messages with work: about ten seconds for one worker.
const WORKED: usize = 2000;
/// Messages without work, which take about as long.
const PASSED: usize = 30_000;
const SUBJECTS: usize = 500;

pub async fn scaling(node: &Node, report: &mut Report) {
    let competing = json!({});
    let partitioned = json!({ "partitions": 4 });
    let single = json!({ "single_active_consumer": true });
    let one = rate(node, &competing, 1, WORK).await;
    report.add("5 ms of work: 1 worker", "/s", Reference, one);
    for (what, queue, workers, target) in [
        ("5 ms of work: 2 competing workers : 1", &competing, 2, 1.8),
        ("5 ms of work: 4 competing workers : 1", &competing, 4, 3.5),
        ("5 ms of work: 8 competing workers : 1", &competing, 8, 7.0),
        ("5 ms of work: 4 partitions with a worker each : 1", &partitioned, 4, 3.0),
    ] {
        report.add(what, "", AtLeast(target), rate(node, queue, workers, WORK).await / one);
    }
    let waiting = rate(node, &single, 4, WORK).await;
    report.add("5 ms of work: 4 workers, a single active one : 1", "", Reference, waiting / one);
    for (what, queue, workers) in [
        ("no work: 1 worker", &competing, 1),
        ("no work: 4 competing workers", &competing, 4),
        ("no work: 4 partitions with a worker each", &partitioned, 4),
    ] {
        report.add(what, "/s", Reference, rate(node, queue, workers, Duration::ZERO).await);
    }
}

/// Messages per second, from a full queue to the last ack.
async fn rate(node: &Node, queue: &Value, workers: usize, work: Duration) -> f64 {
    let vhost = Vhost::new(node).await;
    let mut queues = json!([{ "name": "q", "bindings": ["scan.#"] }]);
    queues[0].as_object_mut().expect("a table").extend(queue.as_object().expect("a table").clone());
    let declared = Setup::new(&vhost.url()).set("topology.queues", queues).run(&["topology", "declare"]).await;
    assert_eq!(declared.code, Some(0), "{declared:?}");
    let count = if work.is_zero() { PASSED } else { WORKED };
    fill(&vhost, count).await;

    let partitions = queue["partitions"].as_u64().unwrap_or(0);
    let left = Arc::new(AtomicUsize::new(count));
    let mut at_work = JoinSet::new();
    let started = Instant::now();
    for number in 0..workers {
        let queue = if partitions == 0 { "q".to_owned() } else { format!("q.{}", number + 1) };
        at_work.spawn(worker(vhost.connect().await, queue, work, Arc::clone(&left)));
    }
    // The worker that acknowledges the last message returns. Dropping `at_work` ends the others.
    at_work.join_next().await.expect("a worker").expect("a worker that does not panic");
    count as f64 / started.elapsed().as_secs_f64()
}

/// Handles one message after the other, as the example workers do.
async fn worker(connection: lapin::Connection, queue: String, work: Duration, left: Arc<AtomicUsize>) {
    let channel = connection.create_channel().await.expect("a channel");
    channel.basic_qos(20, BasicQosOptions::default()).await.expect("qos");
    let (options, arguments) = (BasicConsumeOptions::default(), FieldTable::default());
    let mut deliveries = channel.basic_consume(queue.into(), "".into(), options, arguments).await.expect("a consumer");
    while let Some(delivery) = deliveries.next().await {
        let delivery = delivery.expect("a delivery");
        if !work.is_zero() {
            tokio::time::sleep(work).await;
        }
        delivery.acker.ack(BasicAckOptions::default()).await.expect("ack");
        if left.fetch_sub(1, Ordering::Relaxed) == 1 {
            return;
        }
    }
}

async fn fill(vhost: &Vhost, count: usize) {
    let connection = vhost.connect().await;
    let channel = connection.create_channel().await.expect("a channel");
    channel.confirm_select(ConfirmSelectOptions::default()).await.expect("confirms");
    let mut confirms = FuturesUnordered::new();
    for number in 0..count {
        let mut headers = FieldTable::default();
        let subject = format!("scan:{}", number % SUBJECTS);
        headers.insert("prism-subject".into(), AMQPValue::LongString(subject.into()));
        let properties = BasicProperties::default().with_delivery_mode(2).with_headers(headers);
        let sent = channel
            .basic_publish(
                "prism.events".into(),
                "scan.a".into(),
                BasicPublishOptions::default(),
                &[b'x'; 256],
                properties,
            )
            .await;
        confirms.push(sent.expect("a publish"));
        while confirms.len() >= 1000 {
            confirms.next().await.expect("a confirm").expect("confirmed");
        }
    }
    while let Some(confirm) = confirms.next().await {
        confirm.expect("confirmed");
    }
    connection.close(200, "done".into()).await.expect("close");
}
