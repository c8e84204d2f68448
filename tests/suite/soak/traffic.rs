//! Steady traffic: a patient Prism for each subject, and workers that take everything.

use std::sync::Arc;
use std::time::{Duration, Instant};

use fastrand::Rng;
use futures_util::StreamExt;
use futures_util::stream::select_all;
use lapin::options::{BasicAckOptions, BasicConsumeOptions, BasicQosOptions};
use lapin::types::FieldTable;
use lapin::{Connection, ConnectionProperties};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval_at, timeout};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::book::{Book, Key, Reply};
use super::pace;
use crate::harness::Delivery;
use crate::harness::relay::Sender;

/// Each with a sender of its own.
pub const SUBJECTS: usize = 40;

/// Between two events of a subject. With [`SUBJECTS`] of them some 300 events a second, while the relay answers.
const EVENT_EVERY: Duration = Duration::from_millis(130);

/// Prism waits longer, but gives up after four tries; these are in its stead.
const RETRY_MIN: Duration = Duration::from_millis(20);
const RETRY_MAX: Duration = Duration::from_millis(500);

/// One in so many acknowledged events is followed by a re-send of a recent one.
const RESEND_ONE_IN: u8 = 40;
/// How recent: a few seconds, so well within the dedupe window.
const RESEND_BACK: usize = 20;

const QUEUES: [&str; 4] = ["prism.scan", "prism.future_me", "prism.unrouted", "prism.dead"];
const PREFETCH: u16 = 200;
const CONSUMER_PATIENCE: Duration = Duration::from_secs(5);
const CONSUMER_PAUSE: Duration = Duration::from_millis(200);

pub fn start(
    seed: u64,
    book: &Arc<Book>,
    relay: &watch::Receiver<Sender>,
    stop: &CancellationToken,
) -> Vec<JoinHandle<()>> {
    let prism = |subject| Prism {
        subject,
        book: Arc::clone(book),
        relay: relay.clone(),
        rng: Rng::with_seed(seed.wrapping_add(subject as u64)),
    };
    (0..SUBJECTS).map(|subject| tokio::spawn(prism(subject).run(stop.clone()))).collect()
}

/// The one that tells of one subject.
struct Prism {
    subject: usize,
    book: Arc<Book>,
    /// Of the process that runs now: each has a port of its own.
    relay: watch::Receiver<Sender>,
    rng: Rng,
}

impl Prism {
    /// Event after event, each until it is acknowledged.
    async fn run(mut self, stop: CancellationToken) {
        let offset = EVENT_EVERY * self.subject as u32 / SUBJECTS as u32;
        let mut ticks = interval_at((Instant::now() + offset).into(), EVENT_EVERY);
        // What an outage has cost is not made up for in a burst.
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        for number in 0.. {
            ticks.tick().await;
            if stop.is_cancelled() {
                return;
            }
            self.deliver(number).await;
            if self.rng.u8(..RESEND_ONE_IN) == 0 {
                let back = self.rng.usize(..RESEND_BACK);
                self.post(number.saturating_sub(back)).await;
            }
        }
    }

    async fn deliver(&self, number: usize) {
        let mut pause = RETRY_MIN;
        while !self.post(number).await {
            pace(pause).await;
            pause = (pause * 2).min(RETRY_MAX);
        }
    }

    /// One request. Returns whether it was answered 200.
    async fn post(&self, number: usize) -> bool {
        let key = Key { subject: self.subject, number };
        let sender = self.relay.borrow().clone();
        self.book.sent(key);
        let sent_at = Instant::now();
        let reply = match sender.post(body(key)).await {
            Ok(answer) if answer.status == 200 => {
                let json = answer.json();
                let id = json["id"].as_str().and_then(|id| id.parse().ok()).expect("an id in a 200");
                Reply::Acknowledged { id, duplicate: json["duplicate"] == true, after: sent_at.elapsed() }
            }
            Ok(answer) => Reply::Refused(answer.status),
            Err(_) => Reply::None,
        };
        self.book.answered(key, reply)
    }
}

/// Always the same for the same event. Of every ten subjects six go to `prism.scan`, three to `prism.future_me`, and
/// one is unrouted.
fn body(key: Key) -> String {
    let Key { subject, number } = key;
    let id = format!("subject-{subject}");
    let (event_type, id_name) = match subject % 10 {
        0..6 => ("scan.processing.started", "scanId"),
        6..9 => ("body_shape_prediction.processing.started", "bodyShapePredictionId"),
        _ => ("measurements.creation.succeeded", "scanId"),
    };
    let padding = "x".repeat((subject * 7919 + number * 104_729) % 1500);
    json!({"eventType": event_type, "payload": {id_name: id, "subject": subject, "number": number, "padding": padding}})
        .to_string()
}

fn key(delivery: &Delivery) -> Option<Key> {
    let json: Value = serde_json::from_slice(&delivery.body).ok()?;
    let number = |name: &str| usize::try_from(json["payload"][name].as_u64()?).ok();
    let key = Key { subject: number("subject")?, number: number("number")? };
    (body(key).as_bytes() == delivery.body).then_some(key)
}

/// Takes everything from every queue, for as long as it is `wanted`, through all restarts of the broker. Ends with the
/// sender of `wanted`.
pub async fn consume(url: String, book: Arc<Book>, mut wanted: watch::Receiver<bool>) {
    while wanted.wait_for(|wanted| *wanted).await.is_ok() {
        let connecting = Connection::connect(&url, ConnectionProperties::default());
        if let Ok(Ok(connection)) = timeout(CONSUMER_PATIENCE, connecting).await {
            tokio::select! {
                // Its end is the broker's, and told of there.
                _ = take(&connection, &book) => {}
                _ = wanted.wait_for(|wanted| !*wanted) => {}
            }
            let _ = timeout(CONSUMER_PATIENCE, connection.close(200, "done".into())).await;
        }
        pace(CONSUMER_PAUSE).await;
    }
}

/// Records, and then acknowledges, until something is amiss, or silent for so long that it may be.
async fn take(connection: &Connection, book: &Book) -> lapin::Result<()> {
    let channel = connection.create_channel().await?;
    channel.basic_qos(PREFETCH, BasicQosOptions::default()).await?;
    let mut consumers = Vec::new();
    for queue in QUEUES {
        let consuming =
            channel.basic_consume(queue.into(), queue.into(), BasicConsumeOptions::default(), FieldTable::default());
        consumers.push(consuming.await?.map(move |delivery| (queue, delivery)));
    }
    let mut deliveries = select_all(consumers);
    while let Ok(Some((queue, delivery))) = timeout(CONSUMER_PATIENCE, deliveries.next()).await {
        let delivery = delivery?;
        let tag = delivery.delivery_tag;
        let delivery = Delivery::from(delivery);
        let id = delivery.id().parse().unwrap_or(Uuid::nil());
        match key(&delivery) {
            Some(key) => book.delivered(queue, key, id, delivery.redelivered),
            None => book.fault_found(format!("a delivery of {queue} that nobody sent: {:?}", delivery.text())),
        }
        channel.basic_ack(tag, BasicAckOptions::default()).await?;
    }
    Ok(())
}
