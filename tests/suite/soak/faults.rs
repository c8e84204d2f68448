//! The faults, in an order that depends only on the seed, and the parts of the system that they affect.

use std::sync::Arc;
use std::time::{Duration, Instant};

use fastrand::Rng;
use hyper::Method;
use serde_json::{Value, json};
use tokio::sync::watch;

use super::book::Book;
use super::pace;
use super::spool::{SpoolLedger, StayingReader};
use crate::harness::disk::SmallDisk;
use crate::harness::management::encode;
use crate::harness::program::Ended;
use crate::harness::relay::Sender;
use crate::harness::{Node, Relay, Vhost, Wire, eventually, eventually_equal};

/// Pause between two faults, in milliseconds.
const PAUSE: std::ops::Range<u64> = 200..2000;
/// One in this many faults follows the last one closely, while the backlog of the last one is still being delivered.
const CLOSE_ONE_IN: u8 = 3;
const CLOSE_PAUSE: std::ops::Range<u64> = 0..150;
/// Duration of faults that last, in milliseconds. The upper half is longer than the relay's heartbeat and confirm
/// timeout.
const HOLD: std::ops::Range<u64> = 100..5000;
/// Maximum age of a relay that is killed while it starts, in milliseconds.
const INFANCY: u64 = 80;
/// Length limit of a full queue. Without workers it is reached at once, and RabbitMQ rejects publishes.
const QUEUE_LIMIT: u32 = 20;
/// Room that a full disk leaves for a backlog: about a second of traffic.
const BACKLOG_BYTES: u64 = 1 << 20;
/// Starts on a full disk before the disk gets room again, and the pause between two of them.
const START_TRIES: u32 = 5;
const START_PAUSE: Duration = Duration::from_millis(200);
/// The relay's exchanges, any of which may be deleted. Dead letters have their own, which nothing uses here.
const EXCHANGES: [&str; 3] = ["prism.events", "prism.webhooks", "prism.unrouted"];
/// Queues that may be deleted, and their bindings.
const BINDINGS: [(&str, &str, &str); 3] = [
    ("prism.events", "prism.scan", "scan.#"),
    ("prism.events", "prism.future_me", "body_shape_prediction.#"),
    ("prism.unrouted", "prism.unrouted", ""),
];
/// The relay's own user.
pub const USER: &str = "relay";
/// Permissions to configure and write that are not enough: to declare anything, to publish, or to bind a queue.
const PERMISSIONS: [(&str, &str); 3] = [("", ".*"), (".*", "^(?!prism[.]webhooks$)"), (".*", "^(?!prism[.]scan$)")];
/// Routing keys that the broker takes while it refuses others.
const KEYS: [&str; 3] = ["^body_shape_prediction[.]", "^scan[.]", "^measurements[.]"];
/// For this long no worker has taken anything from a queue that is deleted, and no message has come. The relay's
/// connection is stalled, so only what was on its way to the queue may still come.
const QUIET: Duration = Duration::from_secs(1);
/// A node that is killed less than a second after a queue was declared may come back without a leader for the queue
/// (RabbitMQ 3.10).
pub const DECLARED: Duration = Duration::from_secs(2);
/// Values of `broker.window`. With the smallest, a backlog still shrinks under the traffic.
const WINDOWS: [u32; 5] = [4, 20, 100, 500, 1000];

#[derive(Debug, Clone, Copy)]
enum Fault {
    RelayKilled,
    RelayKilledAtStart,
    RelayStopped,
    RelayReconfigured,
    BrokerKilled,
    BrokerFrozen,
    WireCut,
    WireStalled,
    AnswersLost,
    ConnectionsClosed,
    ExchangeDeleted,
    QueueDeleted,
    BindingRemoved,
    /// Nothing is bound to the exchange that the relay publishes to, and the relay may not repair it.
    RouteTaken,
    PermissionLost,
    KeysRefused,
    MemoryAlarm,
    QueueFull,
    /// A process reads the spool and does not stop, so that its log cannot begin again.
    ReaderStays,
    DiskFull,
    /// The broker does not answer, and the disk is too small for the backlog.
    BacklogFillsDisk,
    RelayStoppedOnFullDisk,
}

/// Relative frequencies. With these, half an hour has about 100 kills of the relay, 25 of the broker, 60 faults of the
/// disk, and 100 of exchanges, queues, bindings and permissions.
const WEIGHTS: [(Fault, u32); 22] = [
    (Fault::RelayKilled, 24),
    (Fault::RelayKilledAtStart, 6),
    (Fault::RelayStopped, 8),
    (Fault::RelayReconfigured, 5),
    (Fault::BrokerKilled, 6),
    (Fault::BrokerFrozen, 7),
    (Fault::WireCut, 12),
    (Fault::WireStalled, 7),
    (Fault::AnswersLost, 8),
    (Fault::ConnectionsClosed, 5),
    (Fault::ExchangeDeleted, 8),
    (Fault::QueueDeleted, 5),
    (Fault::BindingRemoved, 6),
    (Fault::RouteTaken, 5),
    (Fault::PermissionLost, 5),
    (Fault::KeysRefused, 4),
    (Fault::MemoryAlarm, 3),
    (Fault::QueueFull, 4),
    (Fault::ReaderStays, 6),
    (Fault::DiskFull, 4),
    (Fault::BacklogFillsDisk, 5),
    (Fault::RelayStoppedOnFullDisk, 5),
];

impl Fault {
    fn name(self) -> &'static str {
        match self {
            Self::RelayKilled => "relay killed",
            Self::RelayKilledAtStart => "relay killed, and again at its start",
            Self::RelayStopped => "relay stopped (SIGTERM)",
            Self::RelayReconfigured => "relay restarted with another window",
            Self::BrokerKilled => "broker killed",
            Self::BrokerFrozen => "broker frozen",
            Self::WireCut => "wire cut",
            Self::WireStalled => "wire stalled",
            Self::AnswersLost => "published, confirms lost",
            Self::ConnectionsClosed => "connections closed by an operator",
            Self::ExchangeDeleted => "exchange deleted",
            Self::QueueDeleted => "queue deleted",
            Self::BindingRemoved => "binding removed",
            Self::RouteTaken => "no route, and no permission to repair it",
            Self::PermissionLost => "permission lost",
            Self::KeysRefused => "routing keys refused",
            Self::MemoryAlarm => "memory alarm",
            Self::QueueFull => "queues full (nacks)",
            Self::ReaderStays => "a process reads the spool and stays",
            Self::DiskFull => "disk full",
            Self::BacklogFillsDisk => "a backlog fills the disk",
            Self::RelayStoppedOnFullDisk => "relay stopped on a full disk",
        }
    }
}

/// One fault of the schedule. Every field is drawn for every fault, so that the order depends on the seed alone.
struct Step {
    pause: Duration,
    fault: Fault,
    hold: Duration,
    /// Kill the relay in the middle of a fault that lasts.
    kill_meanwhile: bool,
    infancy: Duration,
    window: u32,
    /// Chooses the exchange, queue, binding or permission.
    which: u32,
}

impl Step {
    fn draw(rng: &mut Rng) -> Self {
        let pause = if rng.u8(..CLOSE_ONE_IN) == 0 { CLOSE_PAUSE } else { PAUSE };
        Self {
            pause: Duration::from_millis(rng.u64(pause)),
            fault: draw_fault(rng),
            hold: Duration::from_millis(rng.u64(HOLD)),
            kill_meanwhile: rng.u8(..4) == 0,
            infancy: Duration::from_millis(rng.u64(..INFANCY)),
            window: WINDOWS[rng.usize(..WINDOWS.len())],
            which: rng.u32(..),
        }
    }

    fn choose<T: Copy, const N: usize>(&self, from: [T; N]) -> T {
        from[self.which as usize % N]
    }
}

fn draw_fault(rng: &mut Rng) -> Fault {
    let tickets: u32 = WEIGHTS.iter().map(|(_, weight)| weight).sum();
    let mut ticket = rng.u32(..tickets);
    for (fault, weight) in WEIGHTS {
        match ticket.checked_sub(weight) {
            Some(rest) => ticket = rest,
            None => return fault,
        }
    }
    unreachable!("a ticket is less than the sum of the weights")
}

/// Everything that a fault can affect.
pub struct Stage {
    // Dropped in this order: the relay before the wire and the broker.
    pub relay: Relay,
    /// The disk of the spool. It is smaller than `spool.max_bytes`.
    pub disk: SmallDisk,
    pub wire: Wire,
    pub vhost: Vhost,
    pub node: Node,
    pub book: Arc<Book>,
    /// Publishes the address of the current relay to the senders.
    pub sender: watch::Sender<Sender>,
    /// Whether workers consume.
    pub consuming: watch::Sender<bool>,
}

impl Stage {
    /// Makes one fault after the other. Each is over, and everything works again, before the next.
    pub async fn make_faults(&mut self, seed: u64, length: Duration) {
        let mut rng = Rng::with_seed(seed);
        let end = Instant::now() + length;
        loop {
            let step = Step::draw(&mut rng);
            pace(step.pause).await;
            if Instant::now() >= end {
                return;
            }
            self.book.begins(step.fault.name());
            self.make(&step).await;
            let ledger = self.spool_ledger();
            if !ledger.balances() {
                self.book.violation(format!("the spool's ledger does not balance: {ledger}"));
            }
        }
    }

    pub fn spool_ledger(&self) -> SpoolLedger {
        SpoolLedger::read(self.disk.spool().as_ref()).expect("a spool that can be read")
    }

    async fn make(&mut self, step: &Step) {
        match step.fault {
            Fault::RelayKilled => self.kill_relay().await,
            Fault::RelayKilledAtStart => self.kill_relay_at_start(step.infancy).await,
            Fault::RelayStopped => self.restart_relay().await,
            Fault::RelayReconfigured => {
                self.relay.reconfigure("broker.window", step.window);
                self.restart_relay().await;
            }
            Fault::BrokerKilled => {
                self.node.kill().await;
                self.hold(step).await;
                self.node.start_again().await;
            }
            Fault::BrokerFrozen => {
                self.node.freeze();
                self.hold(step).await;
                self.node.thaw();
            }
            Fault::WireCut => self.wire.cut(),
            Fault::WireStalled => {
                self.wire.stall();
                self.hold(step).await;
                self.wire.flow();
            }
            Fault::AnswersLost => {
                self.wire.stall_answers();
                self.hold(step).await;
                self.wire.cut();
                self.wire.flow();
            }
            Fault::ConnectionsClosed => self.close_connections().await,
            Fault::ExchangeDeleted
            | Fault::QueueDeleted
            | Fault::BindingRemoved
            | Fault::RouteTaken
            | Fault::PermissionLost
            | Fault::KeysRefused => self.change_broker(step).await,
            Fault::MemoryAlarm => {
                self.node.memory_alarm(true).await;
                self.hold(step).await;
                self.node.memory_alarm(false).await;
            }
            Fault::QueueFull => self.fill_queues(step).await,
            Fault::ReaderStays | Fault::DiskFull | Fault::BacklogFillsDisk | Fault::RelayStoppedOnFullDisk => {
                self.disturb_disk(step).await;
            }
        }
    }

    /// What an operator may do to the broker: delete, unbind, and take permissions.
    async fn change_broker(&mut self, step: &Step) {
        match step.fault {
            Fault::ExchangeDeleted => _ = self.vhost.delete_exchange(step.choose(EXCHANGES)).await,
            Fault::QueueDeleted => self.delete_queue(step).await,
            Fault::BindingRemoved => {
                let (exchange, queue, key) = step.choose(BINDINGS);
                self.vhost.unbind(exchange, queue, key).await;
                self.hold(step).await;
                self.vhost.bind(exchange, queue, key).await;
            }
            Fault::RouteTaken => {
                self.vhost.permit(USER, ".*", "^(?!prism[.]events$)", ".*").await;
                self.vhost.unbind_exchange("prism.webhooks", "prism.events").await;
                self.hold(step).await;
                self.vhost.permit(USER, ".*", ".*", ".*").await;
            }
            Fault::PermissionLost => {
                let (configure, write) = step.choose(PERMISSIONS);
                self.vhost.permit(USER, configure, write, ".*").await;
                // An open connection may keep its permissions for a minute.
                self.wire.cut();
                self.hold(step).await;
                self.vhost.permit(USER, ".*", ".*", ".*").await;
            }
            Fault::KeysRefused => self.refuse_keys(step).await,
            other => unreachable!("{other:?} is made elsewhere"),
        }
    }

    async fn disturb_disk(&mut self, step: &Step) {
        match step.fault {
            Fault::ReaderStays => {
                self.book.disk_fails();
                let reader = StayingReader::start(self.disk.spool().as_ref()).expect("a spool that can be read");
                self.hold(step).await;
                drop(reader);
                self.book.disk_works();
            }
            Fault::DiskFull => {
                self.book.disk_fails();
                self.disk.fill(0);
                self.hold(step).await;
                self.free_disk();
            }
            Fault::BacklogFillsDisk => self.fill_disk_with_backlog(step).await,
            Fault::RelayStoppedOnFullDisk => {
                self.book.disk_fails();
                self.disk.fill(0);
                pace(step.hold / 2).await;
                self.restart_relay().await;
                pace(step.hold / 2).await;
                self.free_disk();
            }
            other => unreachable!("{other:?} is made elsewhere"),
        }
    }

    /// When the broker answers again, the relay delivers, although there is still no room but what that frees.
    async fn fill_disk_with_backlog(&mut self, step: &Step) {
        self.book.disk_fails();
        self.wire.stall();
        self.disk.fill(BACKLOG_BYTES);
        self.hold(step).await;
        self.wire.flow();
        pace(step.hold / 2).await;
        self.free_disk();
    }

    fn free_disk(&self) {
        self.disk.free();
        self.book.disk_works();
    }

    /// Lets a fault last.
    async fn hold(&mut self, step: &Step) {
        pace(step.hold / 2).await;
        if step.kill_meanwhile {
            self.kill_relay().await;
        }
        pace(step.hold / 2).await;
    }

    async fn kill_relay(&mut self) {
        let ended = self.relay.kill9().await;
        self.record_kill(&ended);
        self.start_relay().await;
    }

    /// Starts the relay after its end. On a full disk it may need several tries, as a service manager makes them, and
    /// the disk gets room if they do not help.
    async fn start_relay(&mut self) {
        for tries in 1.. {
            let Err(ended) = self.relay.try_start_again().await else { break };
            assert!(self.disk.is_filled(), "the relay does not start: {ended:?}");
            self.book.start_failed();
            if tries == START_TRIES {
                self.disk.free();
            }
            pace(START_PAUSE).await;
        }
        self.announce();
    }

    /// Kills the relay again while it recovers from the first kill.
    async fn kill_relay_at_start(&mut self, age: Duration) {
        let ended = self.relay.kill9().await;
        self.record_kill(&ended);
        let mut starting = self.relay.setup().launch(&["serve"]);
        pace(age).await;
        starting.signal("KILL");
        self.record_kill(&starting.wait().await);
        self.start_relay().await;
    }

    fn record_kill(&self, ended: &Ended) {
        assert!(ended.code.is_none(), "the relay exited before the kill: {ended:?}");
        self.book.killed_relay();
    }

    async fn restart_relay(&mut self) {
        self.relay.sigterm();
        let ended = self.relay.wait().await;
        assert_eq!(ended.code, Some(0), "the relay failed on SIGTERM: {ended:?}");
        self.start_relay().await;
    }

    fn announce(&self) {
        self.sender.send_replace(self.relay.sender());
    }

    /// Deletes a queue once it is empty, because the relay cannot know of messages that an operator deletes with their
    /// queue. The relay declares the queue again.
    async fn delete_queue(&mut self, step: &Step) {
        let (_, queue, _) = step.choose(BINDINGS);
        loop {
            self.wire.stall();
            self.vhost.eventually_depth(queue, 0).await;
            // Deliveries without an acknowledgement are not counted, but they come back when the worker is gone.
            self.consuming.send_replace(false);
            eventually_equal("consumers", 0, async || self.vhost.consumers(queue).await).await;
            pace(QUIET).await;
            let is_empty = self.vhost.depth(queue).await == 0;
            if is_empty {
                self.vhost.delete_queue(queue).await;
            }
            self.consuming.send_replace(true);
            if is_empty {
                break;
            }
            self.wire.flow();
        }
        self.hold(step).await;
        self.wire.flow();
        eventually("the queue to be declared again", async || match self.vhost.queue(queue).await {
            Some(_) => Ok(()),
            None => Err("it does not exist"),
        })
        .await;
        pace(DECLARED).await;
    }

    /// Lets the relay publish to a topic exchange, where RabbitMQ checks routing keys, and refuses some of them.
    async fn refuse_keys(&mut self, step: &Step) {
        self.vhost.permit_topics(USER, "prism.events", step.choose(KEYS)).await;
        self.relay.reconfigure("broker.exchange", "prism.events");
        self.restart_relay().await;
        self.hold(step).await;
        self.vhost.permit_all_topics(USER).await;
        self.relay.reconfigure("broker.exchange", "prism.webhooks");
        self.restart_relay().await;
    }

    /// Stops the workers and limits the queues, so that RabbitMQ rejects publishes.
    async fn fill_queues(&mut self, step: &Step) {
        self.consuming.send_replace(false);
        let policy = json!({"max-length": QUEUE_LIMIT, "overflow": "reject-publish"});
        self.vhost.set_policy("limit", "^prism[.](scan|future_me)$", policy).await;
        self.hold(step).await;
        let nacked = self.relay.metric("prism_relay_publish_total", &[("outcome", "nacked")]).await;
        self.vhost.delete_policy("limit").await;
        self.consuming.send_replace(true);
        self.book.nacks_seen(nacked > 0.0);
    }

    /// Closes all connections through the management API, including those of workers. Errors of the API are ignored,
    /// because a connection may end meanwhile.
    async fn close_connections(&self) {
        let management = self.node.management();
        let path = format!("vhosts/{}/connections", encode(self.vhost.name()));
        let Ok(answer) = management.call(Method::GET, &path, &Value::Null).await else { return };
        let connections: Vec<Value> = serde_json::from_slice(&answer.body).unwrap_or_default();
        for name in connections.iter().filter_map(|connection| connection["name"].as_str()) {
            let _ = management.call(Method::DELETE, &format!("connections/{}", encode(name)), &Value::Null).await;
        }
    }
}
