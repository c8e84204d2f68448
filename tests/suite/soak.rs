//! Soak test: random faults, drawn from a seed, under steady traffic. At the end every event is accounted for.
//!
//! `tests/soak.sh` sets `PRISM_SOAK_MINUTES` and `PRISM_SOAK_SEED`. Without them it is a short run with a fixed seed.

mod book;
mod faults;
mod lost;
mod spool;
mod traffic;

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::harness::disk::SmallDisk;
use crate::harness::eventually::poll;
use crate::harness::{Node, Setup, Vhost, Wire, ports};
use book::Book;
use faults::{DECLARED, Stage, USER};

/// Within this time the seed draws kills of the relay, a stop, a kill of the broker, lost confirms, full queues, a
/// memory alarm, a full disk, a process that reads the spool, an exchange and a queue that are deleted, a route that is
/// taken away, and lost permissions.
const SHORT: Duration = Duration::from_secs(40);
const SHORT_SEED: u64 = 34_615_456;

/// Size of the spool's disk, far less than `spool.max_bytes`. A process that reads the spool for some seconds makes the
/// log as large.
const DISK: &str = "48m";

const PASSWORD: &str = "password";

const PROGRESS_EVERY: Duration = Duration::from_secs(10);

/// How long the delivery of all events may take after the last fault.
const DRAIN: Duration = Duration::from_secs(120);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_acknowledged_is_lost() {
    let (length, seed) = (length(), seed());
    let node = Node::start().await;
    let vhost = Vhost::new(&node).await;
    let wire = Wire::new(vhost.address());
    node.create_user(USER, PASSWORD).await;
    vhost.permit(USER, ".*", ".*", ".*").await;
    let setup = setup(&vhost, &wire);
    let disk = SmallDisk::mount(setup.folder(), DISK);
    let relay = setup.set("spool.path", disk.spool()).start().await;
    relay.eventually_connected().await;
    pace(DECLARED).await;

    let book = Arc::new(Book::new());
    let (sender, senders) = watch::channel(relay.sender());
    let (consuming, consumed) = watch::channel(true);
    let consume = |queue| tokio::spawn(traffic::consume(vhost.url(), queue, Arc::clone(&book), consumed.clone()));
    let consumers = traffic::QUEUES.map(consume);
    let stop = CancellationToken::new();
    let traffic = traffic::start(seed, &book, &senders, &stop);
    let progress = tokio::spawn(print_progress(Arc::clone(&book)));

    let mut stage = Stage { node, vhost, wire, relay, disk, book: Arc::clone(&book), sender, consuming };
    stage.make_faults(seed, length).await;
    stop.cancel();
    let stuck = join(traffic).await;
    let drained = drain(&stage, &book).await;
    progress.abort();
    consumers.iter().for_each(JoinHandle::abort);

    let ledger = stage.spool_ledger();
    let minutes = length.as_secs_f64() / 60.0;
    println!("\nsoak: seed {seed}, {minutes:.1} minutes of faults\n{}", book.table(&ledger));
    book.verdict(&ledger, stuck, drained);
}

/// Paces the load and the faults. Not for waiting until a condition holds.
async fn pace(time: Duration) {
    tokio::time::sleep(time).await;
}

fn setup(vhost: &Vhost, wire: &Wire) -> Setup {
    // A fixed port: senders must not reach another test's relay while this one is down.
    Setup::new(&vhost.url_for(USER, PASSWORD, wire.address()))
        .set("http.listen", format!("127.0.0.1:{}", ports::free()))
        .set("broker.heartbeat", "1s")
        .set("broker.confirm_timeout", "3s")
        .set("broker.connect_timeout", "3s")
        .set("broker.parked_retry", "1s")
        .set("broker.watch_interval", "2s")
        .set("shutdown.grace", "5s")
        .set("log.filter", "info")
}

fn length() -> Duration {
    let minutes = std::env::var("PRISM_SOAK_MINUTES").ok();
    let parsed = minutes.map(|minutes| minutes.parse::<f64>().expect("PRISM_SOAK_MINUTES is a number"));
    parsed.map_or(SHORT, |minutes| Duration::from_secs_f64(minutes * 60.0))
}

fn seed() -> u64 {
    let seed = std::env::var("PRISM_SOAK_SEED").ok();
    seed.map_or(SHORT_SEED, |seed| seed.parse().expect("PRISM_SOAK_SEED is a whole number"))
}

async fn print_progress(book: Arc<Book>) {
    let mut ticks = tokio::time::interval(PROGRESS_EVERY);
    ticks.tick().await;
    loop {
        ticks.tick().await;
        println!("{}", book.progress());
    }
}

/// Waits until every sender has finished its current event. Returns the number of senders that got no 200 in time.
async fn join(senders: Vec<JoinHandle<()>>) -> usize {
    let deadline = Instant::now() + DRAIN;
    let mut stuck = 0;
    for mut sender in senders {
        match tokio::time::timeout_at(deadline.into(), &mut sender).await {
            Ok(ended) => ended.expect("a sender that does not panic"),
            Err(_) => {
                sender.abort();
                stuck += 1;
            }
        }
    }
    stuck
}

/// Waits until the spool is empty and the workers have every event. The error says what is missing.
async fn drain(stage: &Stage, book: &Book) -> Result<(), String> {
    poll(DRAIN, async || {
        let ledger = stage.spool_ledger();
        if ledger.pending + ledger.parked > 0 {
            return Err(format!("the spool is not empty: {ledger}"));
        }
        match book.missing() {
            0 => Ok(()),
            missing => Err(format!("{missing} acknowledged events are not delivered")),
        }
    })
    .await
}
