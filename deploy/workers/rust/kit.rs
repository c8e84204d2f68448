//! A kit for workers of prism-relay: takes messages, does each once, acknowledges or rejects, reconnects, and stops
//! cleanly.
//!
//! Copy this file and `types.rs` into your crate. [`run`] is all that a worker calls; [`settle`] is the part without
//! RabbitMQ, for your own tests.
//!
//! The order is: do the work, record it as done, acknowledge. A crash before the record repeats the work; a crash after
//! it repeats nothing. So a handler must bear being called twice, or record the id itself, in the transaction of its
//! work.
#![allow(dead_code, unreachable_pub, reason = "a worker uses what it needs")]

use std::error::Error;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use futures_util::{FutureExt, StreamExt};
use lapin::message::Delivery;
use lapin::options::{
    BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions, BasicRejectOptions,
    ConfirmSelectOptions,
};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{Confirmation, Connection, ConnectionProperties, uri::AMQPUri};
use serde_json::{Map, Value};
use tokio::signal::{ctrl_c, unix};
use tokio::time::{sleep, timeout};

use super::types::{BodyShapePredictionPayload, Envelope, Fields, ScanPayload};

/// Any error that a retry may repair.
pub type BoxError = Box<dyn Error + Send + Sync>;

/// The exchange of dead letters.
const DEAD: &str = "prism.dead";
/// The header of messages of `prism-relay send --to-queue`.
const TEST: &str = "prism-test";
/// The header of dead letters of a kit: the queue, and why.
const GAVE_UP: &str = "prism-gave-up";
const PAUSE_MIN: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_secs(30);
/// Limit for connecting, for a confirm, for an ack and for closing.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why a message is not done. `?` turns any error into [`Failure::Retry`].
pub enum Failure {
    /// The message can never succeed: it becomes a dead letter at once.
    GiveUp(String),
    /// The message is rejected and comes back after the retry delay.
    Retry(BoxError),
}

impl<E: Into<BoxError>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::Retry(error.into())
    }
}

/// What [`settle`] did.
pub enum Outcome {
    /// The work is done: acknowledge.
    Done,
    /// It was done before: acknowledge.
    Again,
    /// Reject, so that it is retried.
    Failed(BoxError),
    /// A dead letter.
    GaveUp(String),
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Done => "done",
            Self::Again => "again",
            Self::Failed(_) => "failed",
            Self::GaveUp(_) => "gave up",
        })
    }
}

/// Which messages are done: see `sqlite_store.rs`, or write one on your own database.
#[allow(async_fn_in_trait, reason = "the kit does one message after the other, on one task")]
pub trait Store {
    /// Whether [`Store::mark_done`] was called for this id.
    async fn is_done(&self, message_id: &str) -> Result<bool, BoxError>;
    /// Records that the work is done; again for the same id it changes nothing.
    async fn mark_done(&self, message_id: &str) -> Result<(), BoxError>;
}

/// One event.
pub struct Message {
    /// `message_id`; empty if there is none.
    pub id: String,
    /// The bytes that Prism sent.
    pub body: Vec<u8>,
    /// The headers that are strings, which all of the relay's are.
    pub headers: Map<String, Value>,
    /// RabbitMQ delivered it before, for example to a worker that died.
    pub redelivered: bool,
    /// The property `type`.
    pub property: Option<String>,
}

/// The payload, by the event type.
pub enum Payload {
    /// `scan.processing.*`
    Scan(ScanPayload),
    /// `body_shape_prediction.processing.*`
    Prediction(BodyShapePredictionPayload),
    /// Any other type, which is not documented.
    Other(Envelope),
}

impl Message {
    /// The parsed body. Gives up if it is not an event.
    pub fn event(&self) -> Result<Envelope, Failure> {
        let body = std::str::from_utf8(&self.body).ok().map(|body| body.strip_prefix('\u{feff}').unwrap_or(body));
        // Without serde's reason, which may quote the body: it contains a userToken.
        let fields = body.and_then(Fields::parse).ok_or("the body is not an event");
        fields.map_err(str::to_owned).and_then(Envelope::try_from).map_err(Failure::GiveUp)
    }

    /// The payload, typed. Gives up if a documented field is missing or not a string.
    pub fn payload(&self) -> Result<Payload, Failure> {
        let event = self.event()?;
        // By the type, not by the routing key: a retried message comes back with another routing key.
        let kind = self.property.clone().filter(|kind| !kind.is_empty()).unwrap_or_else(|| event.event_type.text());
        if kind.starts_with("scan.processing.") {
            event.payload.try_into().map(Payload::Scan).map_err(Failure::GiveUp)
        } else if kind.starts_with("body_shape_prediction.processing.") {
            event.payload.try_into().map(Payload::Prediction).map_err(Failure::GiveUp)
        } else {
            Ok(Payload::Other(event))
        }
    }

    /// Whether the webhook was signed. If not, anybody may have sent it.
    pub fn is_verified(&self) -> bool {
        self.headers.get("prism-verified").is_some_and(|value| value == "true")
    }
}

impl From<&Delivery> for Message {
    fn from(delivery: &Delivery) -> Self {
        let properties = &delivery.properties;
        let text = |name: &Option<ShortString>| name.as_ref().map(ShortString::to_string);
        let headers = properties.headers().iter().flatten().filter_map(|(name, value)| match value {
            AMQPValue::LongString(text) => Some((name.to_string(), Value::from(text.to_string()))),
            _ => None,
        });
        Self {
            id: text(properties.message_id()).unwrap_or_default(),
            property: text(properties.kind()),
            body: delivery.data.clone(),
            headers: headers.collect(),
            redelivered: delivery.redelivered,
        }
    }
}

/// The text in one line of a log: without control characters, and cut.
fn clean(text: &str) -> String {
    text.chars().take(255).map(|c| if c.is_ascii_graphic() || c == ' ' { c } else { '?' }).collect()
}

/// The routing key of the event. A message that returned from a retry queue has the key `NAME:1` in its place; no
/// event's own key has a colon.
pub fn first_key(routing_key: &str, kind: Option<&str>) -> String {
    let is_word =
        |word: &str| !word.is_empty() && word.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-');
    let is_key = |text: &&str| text.split('.').all(is_word);
    let own = Some(routing_key).filter(|key| !key.contains(':'));
    own.or(kind.filter(is_key)).unwrap_or("invalid.event_type").to_owned()
}

fn is_uuid(text: &str) -> bool {
    text.split('-').map(str::len).eq([8, 4, 4, 4, 12]) && text.chars().all(|c| c.is_ascii_hexdigit() || c == '-')
}

/// Does the work of one message. A panic of the handler is an error like any other.
pub async fn settle(
    message: &Message,
    handler: &impl AsyncFn(&Message) -> Result<(), Failure>,
    store: &impl Store,
) -> Outcome {
    let work = async || {
        if !is_uuid(&message.id) {
            return Err(Failure::GiveUp("the message_id is not a UUID".to_owned())); // it did not come from the relay
        }
        if store.is_done(&message.id).await? {
            return Ok(Outcome::Again);
        }
        message.event()?;
        handler(message).await?;
        store.mark_done(&message.id).await?;
        Ok(Outcome::Done)
    };
    match AssertUnwindSafe(work()).catch_unwind().await {
        Ok(Ok(outcome)) => outcome,
        Ok(Err(Failure::GiveUp(reason))) => Outcome::GaveUp(reason),
        Ok(Err(Failure::Retry(error))) => Outcome::Failed(error),
        Err(_) => Outcome::Failed("the handler panicked".into()),
    }
}

/// What [`run`] needs to know. `metrics` is called after each message with the time that it took.
pub struct Options<M: Fn(&Outcome, &Message, Duration)> {
    /// `amqp://` or `amqps://`.
    pub url: String,
    /// The queue to take messages from.
    pub queue: String,
    /// Maximum messages received and not acknowledged.
    pub prefetch: u16,
    /// The hook for your metrics.
    pub metrics: M,
}

/// Works until SIGTERM or Ctrl-C, which finish the current message.
pub async fn run<M: Fn(&Outcome, &Message, Duration)>(
    handler: impl AsyncFn(&Message) -> Result<(), Failure>,
    store: impl Store,
    options: Options<M>,
) -> Result<(), BoxError> {
    let mut terminate = unix::signal(unix::SignalKind::terminate())?;
    let stop = async move {
        tokio::select! { _ = terminate.recv() => {} _ = ctrl_c() => {} }
    };
    run_until(stop, handler, store, options).await
}

/// As [`run`], until `stop` resolves in place of the signals.
pub async fn run_until<M: Fn(&Outcome, &Message, Duration)>(
    stop: impl Future<Output = ()>,
    handler: impl AsyncFn(&Message) -> Result<(), Failure>,
    store: impl Store,
    options: Options<M>,
) -> Result<(), BoxError> {
    let stop = stop.shared();
    let mut uri = options.url.parse::<AMQPUri>().map_err(|_| "AMQP_URL is not an AMQP URL")?;
    uri.query.heartbeat = Some(10);
    let queue = ShortString::try_new(options.queue.clone())?;
    let worker = Worker { handler, store, options, queue, uri, dead_letters: Mutex::new(None) };
    let mut pause = PAUSE_MIN;
    while let Err(error) = worker.consume(stop.clone(), &mut pause).await {
        eprintln!("connection: {error}");
        pause = (2 * pause).min(PAUSE_MAX); // longer after each failure
        let now = PAUSE_MIN + (pause - PAUSE_MIN).mul_f64(fastrand::f64()); // random, to spread the workers
        tokio::select! { biased; () = stop.clone() => break, () = sleep(now) => {} }
    }
    Ok(())
}

struct Worker<H, S, M: Fn(&Outcome, &Message, Duration)> {
    handler: H,
    store: S,
    options: Options<M>,
    queue: ShortString,
    uri: AMQPUri,
    /// The connection of [`Worker::bury`], once there was one.
    dead_letters: Mutex<Option<Connection>>,
}

impl<H, S, M> Worker<H, S, M>
where
    H: AsyncFn(&Message) -> Result<(), Failure>,
    S: Store,
    M: Fn(&Outcome, &Message, Duration),
{
    async fn connect(&self, name: &str) -> lapin::Result<Connection> {
        let properties = ConnectionProperties::default().with_connection_name(format!("{name} {}", self.queue).into());
        Connection::connect_uri(self.uri.clone(), properties).await
    }

    /// Works until `stop` resolves. Returns an error if the connection fails.
    async fn consume(&self, stop: impl Future<Output = ()> + Clone, pause: &mut Duration) -> Result<(), BoxError> {
        let connection = tokio::select! {
            () = stop.clone() => return Ok(()),
            connected = timeout(PATIENCE, self.connect("worker")) => connected??,
        };
        let channel = connection.create_channel().await?;
        channel.basic_qos(self.options.prefetch, BasicQosOptions::default()).await?;
        let consuming = BasicConsumeOptions::default();
        let mut deliveries =
            channel.basic_consume(self.queue.clone(), "".into(), consuming, FieldTable::default()).await?;
        println!("consuming {}", self.queue);
        *pause = PAUSE_MIN;
        loop {
            let delivery = tokio::select! {
                biased;
                () = stop.clone() => break,
                next = deliveries.next() => next.ok_or("the broker cancelled the consumer; the queue may be gone")??,
            };
            self.handle(&delivery).await?;
        }
        // An ack has no reply. The broker reads in order, so its reply to the close of the channel shows that it has
        // the last ack. Prefetched messages without an ack go back to the queue.
        let goodbye = async {
            channel.basic_cancel(deliveries.tag(), BasicCancelOptions::default()).await?;
            channel.close(200, "OK".into()).await?;
            connection.close(200, "OK".into()).await
        };
        timeout(PATIENCE, goodbye).await??;
        Ok(())
    }

    async fn handle(&self, delivery: &Delivery) -> Result<(), BoxError> {
        // Deliveries that came before the connection was lost are still here. Other workers have them by now.
        if !delivery.acker.usable() {
            return Err("the channel is closed".into());
        }
        let (message, began) = (Message::from(delivery), Instant::now());
        let mut outcome = settle(&message, &self.handler, &self.store).await;
        let word = |text: &str| if text.is_empty() { "-".to_owned() } else { clean(text).replace(' ', "?") };
        let (id, kind) = (word(&message.id), word(message.property.as_deref().unwrap_or_default()));
        let reason = match &outcome {
            Outcome::Done | Outcome::Again => String::new(),
            Outcome::Failed(reason) => format!(": {}", clean(&reason.to_string())),
            Outcome::GaveUp(reason) => format!(": {}", clean(reason)),
        };
        println!("{outcome} {id} {kind}{reason}");
        if let Outcome::GaveUp(reason) = &outcome
            && let Err(error) = self.bury(delivery, reason).await
        {
            if !message.headers.contains_key(TEST) {
                eprintln!("cannot publish to {DEAD}, so rejecting: {error}");
            }
            outcome = Outcome::Failed(reason.clone().into());
        }
        let settled = async {
            if matches!(outcome, Outcome::Failed(_)) {
                // To the retry queue, or to prism.dead without one. true would requeue it at once, in a hot loop.
                delivery.acker.reject(BasicRejectOptions { requeue: false }).await
            } else {
                delivery.acker.ack(BasicAckOptions::default()).await // after the work, so that a crash loses nothing
            }
        };
        if !timeout(PATIENCE, settled).await?? {
            return Err("the channel is closed".into());
        }
        let metrics = AssertUnwindSafe(|| (self.options.metrics)(&outcome, &message, began.elapsed()));
        if catch_unwind(metrics).is_err() {
            eprintln!("metrics: the hook panicked");
        }
        Ok(())
    }

    /// Publishes a copy to prism.dead, because a reject would go through all retries. An error if RabbitMQ did not
    /// confirm the copy; then the message is rejected.
    async fn bury(&self, delivery: &Delivery, reason: &str) -> Result<(), BoxError> {
        let mut headers = FieldTable::default();
        for (name, value) in delivery.properties.headers().iter().flatten() {
            if name.as_str() == TEST {
                return Err("the tester counts rejects, and prism.dead is no place for tests".into());
            }
            if !name.as_str().starts_with("x-") {
                headers.insert(name.clone(), value.clone());
            }
        }
        let reason = format!("{}: {}", self.queue, clean(reason));
        headers.insert(GAVE_UP.into(), AMQPValue::LongString(reason.into()));
        let kind = delivery.properties.kind().as_ref().map(ShortString::as_str);
        let key = ShortString::try_new(first_key(delivery.routing_key.as_str(), kind))?;
        let properties = delivery.properties.clone().with_headers(headers);
        // On a connection of its own: when RabbitMQ is short of memory or disk, it reads nothing more from a connection
        // that publishes, not even acks.
        let kept = self.dead_letters.lock().map_err(|_| "a panic")?.take();
        let connection = match kept.filter(|connection| connection.status().connected()) {
            Some(connection) => connection,
            None => timeout(PATIENCE, self.connect("give-up")).await??,
        };
        let publish = async {
            let channel = connection.create_channel().await?;
            channel.confirm_select(ConfirmSelectOptions::default()).await?;
            let options = BasicPublishOptions { mandatory: true, ..Default::default() };
            let sent = channel.basic_publish(DEAD.into(), key, options, &delivery.data, properties).await?;
            let confirmed = sent.await?;
            channel.close(200, "OK".into()).await?;
            lapin::Result::Ok(confirmed)
        };
        let confirmed = timeout(PATIENCE, publish).await;
        *self.dead_letters.lock().map_err(|_| "a panic")? = Some(connection);
        match confirmed?? {
            Confirmation::Ack(None) => Ok(()),
            _ => Err("no queue takes it".into()),
        }
    }
}
