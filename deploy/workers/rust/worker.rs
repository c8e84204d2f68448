//! A worker for prism-relay: saves the body of each event as `OUT/<message_id>.json`. SIGTERM or Ctrl-C ends it.
//!
//! In a crate of your own its dependencies are `fastrand = "2"`, `futures-util = "0.3"`, `lapin = "4.12"` and
//! `tokio = { version = "1", features = ["macros", "rt-multi-thread", "signal", "time"] }`.
//! Adapt `save` and the `match` in `work`.

use std::path::{Path, PathBuf};
use std::{env, error::Error, fs, io, io::Write, sync::LazyLock, time::Duration};

use futures_util::{FutureExt, StreamExt};
use lapin::options::{BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicQosOptions, BasicRejectOptions};
use lapin::types::{FieldTable, ShortString};
use lapin::{Connection, ConnectionProperties, message::Delivery, uri::AMQPUri};
use tokio::signal::{ctrl_c, unix};
use tokio::time::{sleep, timeout};

type Outcome = Result<(), Box<dyn Error>>;

static OUT: LazyLock<PathBuf> = LazyLock::new(|| setting("OUT", "./out").into());
const PAUSE_MIN: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_secs(30);
const PATIENCE: Duration = Duration::from_secs(10); // limit for connecting and for closing

#[allow(clippy::disallowed_methods, reason = "the lint is for the relay")]
fn setting(name: &str, default: &str) -> String {
    env::var(name).unwrap_or_else(|_| default.to_owned())
}

/// Writes a temporary file and renames it: the result is complete or absent.
fn save(path: &Path, body: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension(format!("{:016x}.tmp", fastrand::u64(..)));
    fs::File::create(&temporary)
        .and_then(|mut file| file.write_all(body).and_then(|()| file.sync_all()))
        .and_then(|()| fs::rename(&temporary, path))
        .inspect_err(|_| drop(fs::remove_file(&temporary)))?;
    fs::File::open(&*OUT)?.sync_all() // so that the new name survives a power loss
}

/// Does the work of one message. Returns whether this was the first time.
fn work(id: &str, kind: &str, body: &[u8]) -> io::Result<bool> {
    if id.len() != 36 || !id.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-') {
        return Err(io::Error::other("the message_id is not a UUID")); // it becomes a file name
    }
    let path = OUT.join(format!("{id}.json"));
    if path.try_exists()? {
        return Ok(false); // a message may come twice: do its work once
    }
    // Match the type, not the routing key: a message that returns from a retry queue has another routing key.
    match kind.split('.').next() {
        Some("scan" | "body_shape_prediction") => save(&path, body).map(|()| true),
        _ => Err(io::Error::other("no handler for this type")),
    }
}

async fn handle(delivery: &Delivery) -> lapin::Result<bool> {
    let printable = |c: char| if c.is_ascii_graphic() { c } else { '?' }; // nothing that breaks a log line
    let [id, kind] = [delivery.properties.message_id(), delivery.properties.kind()]
        .map(|name| name.as_ref().map_or("-", ShortString::as_str).chars().map(printable).collect::<String>());
    match work(&id, &kind, &delivery.data) {
        Ok(first) => {
            println!("{} {id} {kind}", if first { "done" } else { "again" });
            delivery.acker.ack(BasicAckOptions::default()).await // after the work, so that a crash loses nothing
        }
        Err(reason) => {
            println!("failed {id} {kind}: {reason}");
            delivery.acker.reject(BasicRejectOptions { requeue: false }).await // to the retry queue; true: a hot loop
        }
    }
}

/// Works until `stop` resolves. Returns an error if the connection fails.
async fn consume(uri: AMQPUri, stop: impl Future<Output = ()> + Clone, pause: &mut Duration) -> Outcome {
    let (queue, options) = (ShortString::try_new(setting("QUEUE", "prism.scan"))?, BasicConsumeOptions::default());
    let properties = ConnectionProperties::default().with_connection_name(format!("worker {queue}").into());
    let connection = tokio::select! {
        () = stop.clone() => return Ok(()),
        connected = timeout(PATIENCE, Connection::connect_uri(uri, properties)) => connected??,
    };
    let channel = connection.create_channel().await?;
    channel.basic_qos(setting("PREFETCH", "20").parse()?, BasicQosOptions::default()).await?;
    let mut deliveries = channel.basic_consume(queue.clone(), "".into(), options, FieldTable::default()).await?;
    println!("consuming {queue}");
    *pause = PAUSE_MIN;
    loop {
        let delivery = tokio::select! {
            biased;
            () = stop.clone() => break,
            next = deliveries.next() => next.ok_or("the broker cancelled the consumer; the queue may be gone")??,
        };
        handle(&delivery).await?;
    }
    // An ack has no reply. The broker reads in order, so its reply to the close of the channel shows that it has the
    // last ack. Prefetched messages without an ack go back to the queue.
    let goodbye = async {
        channel.basic_cancel(deliveries.tag(), BasicCancelOptions::default()).await?;
        channel.close(200, "OK".into()).await?;
        connection.close(200, "OK".into()).await
    };
    timeout(PATIENCE, goodbye).await??;
    Ok(())
}

#[tokio::main]
async fn main() -> Outcome {
    let uri = setting("AMQP_URL", "amqp://guest:guest@127.0.0.1:5672/%2f").parse::<AMQPUri>();
    let mut uri = uri.map_err(|_| "AMQP_URL is not an AMQP URL")?;
    uri.query.heartbeat = Some(10);
    let mut terminate = unix::signal(unix::SignalKind::terminate())?;
    let stop = FutureExt::shared(async move {
        tokio::select! { _ = terminate.recv() => {} _ = ctrl_c() => {} }
    });
    let mut pause = PAUSE_MIN;
    while let Err(error) = consume(uri.clone(), stop.clone(), &mut pause).await {
        eprintln!("connection: {error}");
        pause = (2 * pause).min(PAUSE_MAX); // longer after each failure
        let now = PAUSE_MIN + (pause - PAUSE_MIN).mul_f64(fastrand::f64()); // random, to spread the workers
        tokio::select! { biased; () = stop.clone() => break, () = sleep(now) => {} }
    }
    Ok(())
}
