//! Steady traffic: one sender per subject that retries until it gets a 200, and a worker for each queue.

use std::sync::Arc;
use std::time::{Duration, Instant};

use fastrand::Rng;
use futures_util::StreamExt;
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

/// Each subject has its own sender.
pub const SUBJECTS: usize = 40;

/// Time between two events of a subject. All [`SUBJECTS`] together send about 300 events per second.
const EVENT_EVERY: Duration = Duration::from_millis(130);

/// Pauses between retries. Prism's are longer, but Prism gives up after four tries, and these senders do not.
const RETRY_MIN: Duration = Duration::from_millis(20);
const RETRY_MAX: Duration = Duration::from_millis(500);

/// After one in this many acknowledged events, a recent event is sent again.
const RESEND_ONE_IN: u8 = 40;
/// The re-sent event is one of this many, so a few seconds old: well within the dedupe window.
const RESEND_BACK: usize = 20;

/// Workers take dead letters and events without a work queue as well.
pub const QUEUES: [&str; 4] = ["prism.scan", "prism.future_me", "prism.unrouted", "prism.dead"];
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

/// Sends the events of one subject.
struct Prism {
    subject: usize,
    book: Arc<Book>,
    /// The sender of the current relay process.
    relay: watch::Receiver<Sender>,
    rng: Rng,
}

impl Prism {
    /// Sends event after event, each until it is acknowledged.
    async fn run(mut self, stop: CancellationToken) {
        let offset = EVENT_EVERY * self.subject as u32 / SUBJECTS as u32;
        let mut ticks = interval_at((Instant::now() + offset).into(), EVENT_EVERY);
        // Events that were missed during an outage are not sent in a burst afterwards.
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

    /// Sends one request. Returns whether the answer was 200.
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
            Ok(answer) => {
                let code = answer.json()["code"].as_str().unwrap_or_default().to_owned();
                Reply::Refused { status: answer.status, code, sent_at }
            }
            Err(_) => Reply::None,
        };
        self.book.answered(key, reply)
    }
}

/// The body of an event, always the same for the same key. Of ten subjects, six go to `prism.scan`, three to
/// `prism.future_me`, and one is unrouted.
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

/// Consumes a queue while `wanted` is true, and reconnects when the broker restarts or the queue is deleted. Ends when
/// the sender of `wanted` is dropped.
pub async fn consume(url: String, queue: &'static str, book: Arc<Book>, mut wanted: watch::Receiver<bool>) {
    while wanted.wait_for(|wanted| *wanted).await.is_ok() {
        let connecting = Connection::connect(&url, ConnectionProperties::default());
        if let Ok(Ok(connection)) = timeout(CONSUMER_PATIENCE, connecting).await {
            tokio::select! {
                // The connection fails with the broker, which is a fault of its own.
                _ = take(&connection, queue, &book) => {}
                _ = wanted.wait_for(|wanted| !*wanted) => {}
            }
            let _ = timeout(CONSUMER_PATIENCE, connection.close(200, "done".into())).await;
        }
        pace(CONSUMER_PAUSE).await;
    }
}

/// Records and acknowledges deliveries, until the connection fails, the queue is deleted, or there was no delivery for
/// [`CONSUMER_PATIENCE`].
async fn take(connection: &Connection, queue: &'static str, book: &Book) -> lapin::Result<()> {
    let channel = connection.create_channel().await?;
    channel.basic_qos(PREFETCH, BasicQosOptions::default()).await?;
    let (options, arguments) = (BasicConsumeOptions::default(), FieldTable::default());
    let mut deliveries = channel.basic_consume(queue.into(), queue.into(), options, arguments).await?;
    while let Ok(Some(delivery)) = timeout(CONSUMER_PATIENCE, deliveries.next()).await {
        let delivery = delivery?;
        let tag = delivery.delivery_tag;
        let delivery = Delivery::from(delivery);
        let id = delivery.id().parse().unwrap_or(Uuid::nil());
        match key(&delivery) {
            Some(key) => book.delivered(queue, key, id, delivery.redelivered),
            None => book.violation(format!("{queue} delivered a message that was never sent: {:?}", delivery.text())),
        }
        channel.basic_ack(tag, BasicAckOptions::default()).await?;
    }
    Ok(())
}
