//! The speed of the whole relay, as ratios to references measured in the same run: `cargo bench --bench relay`.
//!
//! Uses the real binary, a real disk, and its own RabbitMQ node. Senders, relay and RabbitMQ share the machine, so only
//! the ratios are comparable between machines.
//!
//! ```text
//! cargo bench --bench relay -- [--rounds N] [--backlog N] [PART...]
//!   --rounds N   how often to measure all parts except the large backlog, 5 by default; the table has the medians
//!   --backlog N  events in the large backlog, 2000000 by default
//!   PART         throughput, drain, latency, flood, worker, scaling, backlog; all by default
//! ```
#![allow(unreachable_pub, reason = "a program exports nothing")]
#![allow(clippy::disallowed_methods, reason = "benchmarks own their tasks")]

#[allow(dead_code, unused_imports, reason = "the benchmark uses only a part of the suite's harness")]
#[path = "../../tests/suite/harness/mod.rs"]
mod harness;
mod load;
mod machine;
mod references;
mod report;
mod scaling;

use std::time::{Duration, Instant, SystemTime};

use futures_util::StreamExt;
use futures_util::stream::select;
use lapin::options::BasicConsumeOptions;
use lapin::types::FieldTable;
use serde_json::json;

use harness::setup::NO_BROKER;
use harness::{Node, Relay, Setup, Vhost};
use load::{HALF_OPEN, HalfOpen, Webhooks, closed_loop, open_loop};
use references::{EXCHANGE, REFERENCE, Reference as Server, lapin_alone, lone_syncs};
use report::Report;
use report::Target::{AtLeast, AtMost, None as Reference};

/// Webhooks per measurement of throughput. Also the size of the small backlog.
const MANY: usize = 200_000;

/// Connections of the closed loop, where nothing else is said.
const CONNECTIONS: usize = 64;

const RELAY_READY: &str = "accepting webhooks";

struct Options {
    rounds: usize,
    backlog: usize,
    parts: Vec<String>,
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    if std::env::args().any(|argument| argument == REFERENCE) {
        serve_reference();
    }
    let options = options();
    let selected = |part: &str| options.parts.is_empty() || options.parts.iter().any(|wanted| wanted == part);
    let node = Node::start().await;
    let mut report = Report::default();
    for round in 1..=options.rounds {
        eprintln!("round {round} of {}", options.rounds);
        if selected("throughput") {
            throughput(&node, &mut report).await;
        }
        if selected("drain") {
            draining(&node, &mut report).await;
        }
        if selected("latency") {
            latency(&node, &mut report).await;
        }
        if selected("flood") {
            flood(&mut report).await;
        }
        if selected("worker") {
            worker(&node, &mut report).await;
        }
        if selected("scaling") {
            scaling::scaling(&node, &mut report).await;
        }
    }
    if selected("backlog") {
        eprintln!("backlog of {}", options.backlog);
        backlog(&node, options.backlog, &mut report).await;
    }
    let overview = node.management().find("overview").await.expect("an overview of the node");
    println!(
        "\n{}; RabbitMQ {} on the same machine; {} rounds\n",
        machine::describe(&std::env::temp_dir()),
        overview["rabbitmq_version"].as_str().expect("a version"),
        options.rounds
    );
    report.print();
}

fn serve_reference() -> ! {
    // A task that panics would end alone: a reference that does not do its work must not be measured.
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        report(panic);
        std::process::exit(1);
    }));
    let broker_url = std::env::args().skip_while(|argument| argument != REFERENCE).nth(1);
    // With the same number of threads as the relay.
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    std::thread::scope(|scope| scope.spawn(|| runtime.block_on(Server::serve(broker_url))).join())
        .expect("the server goes on")
}

fn options() -> Options {
    let mut options = Options { rounds: 5, backlog: 2_000_000, parts: Vec::new() };
    // cargo adds `--bench`.
    let mut arguments = std::env::args().skip(1).filter(|argument| argument != "--bench");
    while let Some(argument) = arguments.next() {
        let mut number = || arguments.next().and_then(|text| text.parse().ok()).unwrap_or_else(|| usage());
        match argument.as_str() {
            "--rounds" => options.rounds = number(),
            "--backlog" => options.backlog = number(),
            "throughput" | "drain" | "latency" | "flood" | "worker" | "scaling" | "backlog" => {
                options.parts.push(argument)
            }
            _ => usage(),
        }
    }
    options
}

fn usage() -> ! {
    eprintln!(
        "Usage: cargo bench --bench relay -- [--rounds N] [--backlog N] \
         [throughput] [drain] [latency] [flood] [worker] [scaling] [backlog]"
    );
    std::process::exit(64);
}

/// A relay with the default settings, except for the folder, the ports, the secret and the size of the spool.
fn setup(broker_url: &str) -> Setup {
    Setup::new(broker_url).unset("log.filter").set("spool.max_bytes", "20GiB")
}

// -- throughput -------------------------------------------------------------------------------------------------------

async fn throughput(node: &Node, report: &mut Report) {
    for (connections, count, target) in [
        (1, MANY / 20, Reference),
        (16, MANY, AtLeast(0.4)),
        (256, MANY, AtLeast(0.65)),
        (CONNECTIONS, MANY, AtLeast(0.6)),
    ] {
        let hyper = Server::bare_hyper().await;
        let bare = send(hyper.address, Webhooks::new(count), connections).await;
        let cpu_of_hyper = per_event(machine::cpu(hyper.pid()), count);
        drop(hyper);
        let relay = setup(NO_BROKER).start().await;
        let idle = machine::memory(relay.pid(), "VmRSS");
        let kept = send(relay.address(), Webhooks::new(count), connections).await;
        let of = |what: &str| format!("{what}, {connections} connections");
        report.add(of("bare hyper"), "requests/s", Reference, bare.per_second);
        report.add(of("durable 200s, broker unreachable"), "/s", Reference, kept.per_second);
        let ratio = kept.per_second / bare.per_second;
        report.add(of("durable 200s, broker unreachable : bare hyper"), "", target, ratio);
        if connections == 1 {
            let sync = lone_sync();
            report.add("a lone write and fsync at that time, p50", "ms", Reference, sync);
            let p50 = kept.p50.as_secs_f64() * 1000.0;
            report.add("time to the 200, 1 connection, p50 : a lone write and fsync", "", AtMost(1.8), p50 / sync);
        }
        if connections == CONNECTIONS {
            report.add("CPU per request, bare hyper", "us", Reference, cpu_of_hyper);
            report.add("the senders' share of a processor meanwhile", "", Reference, bare.busy);
            report.add("RSS, idle", "MiB", AtMost(12.5), idle);
            let cpu = per_event(machine::cpu(relay.pid()), count);
            report.add("CPU per event, broker unreachable", "us", AtMost(17.0), cpu);
        }
    }

    // The virtual host is deleted when it goes out of scope.
    let vhost = declared(node).await;
    let non_durable = Server::non_durable(&vhost).await;
    let passed = send(non_durable.address, Webhooks::new(MANY), CONNECTIONS).await;
    report.add("200s of a relay that stores nothing, broker up", "/s", Reference, passed.per_second);
    drop((non_durable, vhost));

    let vhost = Vhost::new(node).await;
    let relay = setup(&vhost.url()).start().await;
    relay.eventually_connected().await;
    let cpu = machine::cpu(relay.pid());
    let relayed = send(relay.address(), Webhooks::new(MANY), CONNECTIONS).await;
    report.add("durable 200s, broker up and draining", "/s", Reference, relayed.per_second);
    let ratio = relayed.per_second / passed.per_second;
    report.add("durable 200s, broker up and draining : the relay that stores nothing", "", AtLeast(0.75), ratio);
    confirmed(&relay, MANY).await;
    let cpu = machine::cpu(relay.pid()) - cpu;
    report.add("CPU per event, from accept to deletion", "us", AtMost(32.0), per_event(cpu, MANY));
    report.add("RSS, highest under this load", "MiB", AtMost(50.0), machine::memory(relay.pid(), "VmHWM"));
}

/// Microseconds for each event.
fn per_event(cpu: Duration, count: usize) -> f64 {
    cpu.as_secs_f64() * 1e6 / count as f64
}

/// Sends on another thread, so that this one can continue to collect output.
async fn send(address: std::net::SocketAddr, webhooks: Webhooks, connections: usize) -> load::Sent {
    tokio::task::spawn_blocking(move || closed_loop(address, &webhooks, connections)).await.expect("the senders")
}

async fn draining(node: &Node, report: &mut Report) {
    let straight = lapin_alone(&declared(node).await, MANY, "prism.events").await;
    report.add("lapin alone, straight to prism.events", "/s", Reference, straight);
    let alone = lapin_alone(&declared(node).await, MANY, EXCHANGE).await;
    report.add("lapin alone, to prism.webhooks as the relay", "/s", Reference, alone);

    let mut relay = setup(NO_BROKER).start().await;
    send(relay.address(), Webhooks::new(MANY), CONNECTIONS).await;
    let drained = drain(&mut relay, &Vhost::new(node).await, MANY).await;
    report.add("draining a backlog of 200,000", "/s", Reference, drained.per_second);
    report.add("draining a backlog of 200,000 : lapin alone", "", AtLeast(0.9), drained.per_second / alone);
    report.add("CPU per event drained, relay only", "us", Reference, drained.cpu_per_event * 1e6);
}

/// A vhost in which a relay has declared its topology.
async fn declared(node: &Node) -> Vhost {
    let vhost = Vhost::new(node).await;
    let relay = setup(&vhost.url()).start().await;
    relay.eventually_connected().await;
    vhost
}

struct Drained {
    per_second: f64,
    cpu_per_event: f64,
}

/// Restarts the relay with a broker, and measures after the first twentieth of its backlog.
async fn drain(relay: &mut Relay, vhost: &Vhost, backlog: usize) -> Drained {
    relay.reconfigure("broker.urls", json!([vhost.url()]));
    relay.restart().await;
    let before = confirmed(relay, backlog / 20).await;
    let (warm, cpu) = (Instant::now(), machine::cpu(relay.pid()));
    let count = confirmed(relay, backlog).await - before;
    let (took, cpu) = (warm.elapsed(), machine::cpu(relay.pid()) - cpu);
    Drained { per_second: count / took.as_secs_f64(), cpu_per_event: cpu.as_secs_f64() / count }
}

/// Waits until at least `count` events are confirmed and deleted. Returns their number.
async fn confirmed(relay: &Relay, count: usize) -> f64 {
    let deadline = Instant::now() + Duration::from_secs(600);
    loop {
        let confirmed = relay.spool().await.confirmed as f64;
        if confirmed >= count as f64 {
            return confirmed;
        }
        assert!(Instant::now() < deadline, "{confirmed} of {count} are confirmed\n{}", relay.log_text());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

// -- latency ----------------------------------------------------------------------------------------------------------

const STEADY: u32 = 1000;

async fn latency(node: &Node, report: &mut Report) {
    let sync = lone_sync();
    report.add("a lone write and fsync, p50", "ms", Reference, sync);
    let vhost = Vhost::new(node).await;
    let relay = setup(&vhost.url()).start().await;
    relay.eventually_connected().await;
    let up = wait_for_200(&relay, "broker up").await;
    report.add("time to the 200 at 1,000/s, p50 : a lone write and fsync", "", AtMost(2.0), up.0 / sync);
    report.add("time to the 200 at 1,000/s, p99", "ms", AtMost(3.0), up.1);

    node.freeze();
    let frozen = wait_for_200(&relay, "broker frozen").await;
    node.thaw();
    confirmed(&relay, 2 * TEN_SECONDS).await;
    node.memory_alarm(true).await;
    let blocked = wait_for_200(&relay, "broker blocked").await;
    node.memory_alarm(false).await;
    drop(relay);
    let relay = setup(NO_BROKER).start().await;
    let down = wait_for_200(&relay, "broker down").await;
    report.add("p50 with the broker down : up", "", AtMost(1.1), down.0 / up.0);
    report.add("p50 with the broker frozen : up", "", AtMost(1.1), frozen.0 / up.0);
    report.add("p50 with the broker blocked : up", "", AtMost(1.1), blocked.0 / up.0);
}

/// The median time of a lone write and fsync, in milliseconds.
fn lone_sync() -> f64 {
    let folder = harness::scratch::Scratch::new();
    quantile(&lone_syncs(folder.path(), 2000), 0.5)
}

const TEN_SECONDS: usize = 10 * STEADY as usize;

/// Measures the time to the 200. Returns p50 and p99 in milliseconds.
async fn wait_for_200(relay: &Relay, what: &'static str) -> (f64, f64) {
    let (address, webhooks) = (relay.address(), Webhooks::new(TEN_SECONDS));
    let sendings =
        tokio::task::spawn_blocking(move || open_loop(address, &webhooks, STEADY)).await.expect("the senders");
    let mut waits: Vec<_> = sendings.into_iter().map(|sending| sending.took).collect();
    waits.sort_unstable();
    let (p50, p99) = (quantile(&waits, 0.5), quantile(&waits, 0.99));
    eprintln!("  {what}: p50 {p50:.3} ms, p99 {p99:.3} ms");
    (p50, p99)
}

fn quantile(sorted: &[Duration], share: f64) -> f64 {
    sorted[((sorted.len() - 1) as f64 * share) as usize].as_secs_f64() * 1000.0
}

/// Measures the time to the 200 while other clients keep 2,000 connections half-open.
async fn flood(report: &mut Report) {
    let relay = setup(NO_BROKER).start().await;
    let calm = wait_for_200(&relay, "calm").await;
    let half_open = HalfOpen::start(relay.address());
    while relay.metric("prism_relay_connections", &[("state", "half-open")]).await < HALF_OPEN as f64 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let flooded = wait_for_200(&relay, "2,000 half-open").await;
    report.add("p50 with 2,000 half-open connections", "ms", Reference, flooded.0);
    report.add("p99 with 2,000 half-open connections", "ms", Reference, flooded.1);
    report.add("p50 with 2,000 half-open connections : calm", "", Reference, flooded.0 / calm.0);
    report.add("p99 with 2,000 half-open connections : calm", "", AtMost(2.0), flooded.1 / calm.1);
    report.add("half-open connections that the relay had cut meanwhile", "", Reference, half_open.end() as f64);
}

/// Measures the time from sending a webhook until a worker gets the event, at 100 per second.
async fn worker(node: &Node, report: &mut Report) {
    const COUNT: usize = 1000;
    let vhost = Vhost::new(node).await;
    let relay = setup(&vhost.url()).start().await;
    relay.eventually_connected().await;
    let connection = vhost.connect().await;
    let channel = connection.create_channel().await.expect("a channel");
    let consume = async |queue: &str| {
        let options = BasicConsumeOptions { no_ack: true, ..Default::default() };
        channel.basic_consume(queue.into(), "".into(), options, FieldTable::default()).await.expect("consume")
    };
    let mut deliveries = select(consume("prism.scan").await, consume("prism.future_me").await);
    let (address, webhooks) = (relay.address(), Webhooks::new(COUNT));
    let sending = tokio::task::spawn_blocking(move || open_loop(address, &webhooks, 100));
    let mut came = vec![None; COUNT];
    for _ in 0..COUNT {
        let delivery = deliveries.next().await.expect("a delivery").expect("a delivery");
        came[load::number(&delivery.data)] = Some(Instant::now());
    }
    let sendings = sending.await.expect("the senders");
    let took = sendings.iter().zip(came).map(|(sending, came)| came.expect("all came") - sending.began);
    let mut took: Vec<_> = took.collect();
    took.sort_unstable();
    report.add("webhook to worker at 100/s, p50", "ms", AtMost(3.0), quantile(&took, 0.5));
    report.add("webhook to worker at 100/s, p99", "ms", AtMost(15.0), quantile(&took, 0.99));
}

// -- a large backlog --------------------------------------------------------------------------------------------------

async fn backlog(node: &Node, events: usize, report: &mut Report) {
    let mut relay = setup(NO_BROKER).start().await;
    for _ in 0..events / MANY {
        send(relay.address(), Webhooks::new(MANY), CONNECTIONS).await;
    }
    let events = events / MANY * MANY;
    report.add("RSS, highest while the backlog grew", "MiB", AtMost(64.0), machine::memory(relay.pid(), "VmHWM"));
    for _ in 0..5 {
        relay.sigterm();
        relay.wait().await;
        let began = SystemTime::now();
        relay.start_again().await;
        report.add(
            "start-up with the backlog, from process start to ready",
            "ms",
            AtMost(300.0),
            ready_after(&relay, began),
        );
    }
    let large = drain(&mut relay, &slim_vhost(node).await, events).await;
    report.add(
        "RSS, highest while the backlog was drained",
        "MiB",
        AtMost(64.0),
        machine::memory(relay.pid(), "VmHWM"),
    );
    drop(relay);

    let mut relay = setup(NO_BROKER).start().await;
    send(relay.address(), Webhooks::new(MANY), CONNECTIONS).await;
    let small = drain(&mut relay, &slim_vhost(node).await, MANY).await;
    let (time, cpu) = (small.per_second / large.per_second, large.cpu_per_event / small.cpu_per_event);
    report.add("time per event, large backlog : 200,000", "", AtMost(1.1), time);
    report.add("CPU per event, large backlog : 200,000", "", AtMost(1.1), cpu);
}

/// A vhost whose queues keep only the last messages, so that RabbitMQ does not slow down as they pile up.
async fn slim_vhost(node: &Node) -> Vhost {
    let vhost = Vhost::new(node).await;
    vhost.set_policy("slim", ".*", json!({"max-length": 10_000, "overflow": "drop-head"})).await;
    vhost
}

/// Milliseconds from `began` until the relay logged that it accepts webhooks, by the time stamp of that line.
fn ready_after(relay: &Relay, began: SystemTime) -> f64 {
    let logs = relay.logs();
    let line = logs.iter().find(|line| line["message"] == RELAY_READY).expect("it is ready");
    let at: jiff::Timestamp = line["timestamp"].as_str().expect("a time").parse().expect("a time");
    let began = jiff::Timestamp::try_from(began).expect("a time");
    at.duration_since(began).as_secs_f64() * 1000.0
}
