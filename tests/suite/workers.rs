//! The example workers of `deploy/workers/`: they do, fail, retry and skip messages, reconnect and stop. Their kits
//! pass the vectors, and their types are those of the schemas.

/// The files of the Rust worker, whose own test runs the vectors.
#[path = "../../deploy/workers/rust/kit.rs"]
mod kit;
#[path = "../../deploy/workers/rust/sqlite_store.rs"]
mod sqlite_store;
#[path = "../../deploy/workers/rust/types.rs"]
mod types;
#[path = "../../deploy/workers/rust/vectors.rs"]
mod vectors;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use futures_util::StreamExt;
use lapin::BasicProperties;
use lapin::options::BasicConsumeOptions;
use lapin::types::FieldTable;
use serde_json::{Value, json};

use crate::harness::marks::PASSWORD;
use crate::harness::program::Program;
use crate::harness::scratch::Scratch;
use crate::harness::{Node, Relay, Setup, Vhost, eventually, leash, samples};

const DONE: &str = "done";
/// A queue that only `send --to-queue` makes.
const TEST_QUEUE: &str = "prism.scan.test-1";

#[tokio::test]
async fn the_python_worker_handles_the_life_of_a_message() {
    the_life_of_a_message("/usr/bin/python3", &[&source("python/worker.py")]).await;
}

#[tokio::test]
async fn the_node_worker_handles_the_life_of_a_message() {
    the_life_of_a_message("node", &[&source("node/worker.js")]).await;
}

#[tokio::test]
async fn the_rust_worker_handles_the_life_of_a_message() {
    the_life_of_a_message(&rust_worker().await, &[]).await;
}

/// Built here, because cargo builds examples only for a run of all tests.
async fn rust_worker() -> String {
    let build = tokio::task::spawn_blocking(|| {
        Command::new(env!("CARGO")).args(["build", "--quiet", "--locked", "--example", "worker"]).status()
    });
    assert!(build.await.unwrap().expect("cargo").success());
    let tests = std::env::current_exe().unwrap();
    let worker = tests.parent().unwrap().with_file_name("examples").join("worker");
    worker.into_os_string().into_string().unwrap()
}

/// RabbitMQ reads nothing more from a connection that publishes during an alarm. A worker that gives up publishes, and
/// must be able to acknowledge and to stop nevertheless.
#[tokio::test]
async fn a_worker_that_gives_up_during_an_alarm_does_the_next_message_and_stops() {
    let (node, rust) = tokio::join!(Node::start(), rust_worker());
    let (python, js) = (source("python/worker.py"), source("node/worker.js"));
    let programs = [("/usr/bin/python3", vec![python.as_str()]), ("node", vec![js.as_str()]), (&rust, vec![])];
    let mut started = Vec::new();
    for (program, arguments) in &programs {
        let vhost = Vhost::new(&node).await;
        vhost.create_queue("prism.scan", json!({})).await;
        let evil = BasicProperties::default().with_message_id("evil".into()).with_type("scan.a".into());
        vhost.publish_with("", "prism.scan", "{}", evil).await;
        let id = "019a0000-0000-7000-8000-000000000001";
        let good = BasicProperties::default().with_message_id(id.into()).with_type("scan.processing.failed".into());
        let event = json!({
            "eventType": "scan.processing.failed",
            "payload": { "scanId": "s", "userId": "u", "userToken": "t", "state": "FAILED" },
        });
        vhost.publish_with("", "prism.scan", event.to_string(), good).await;
        started.push((vhost, Scratch::new(), *program, arguments));
    }
    node.memory_alarm(true).await;
    let mut workers = Vec::new();
    for (vhost, out, program, arguments) in &started {
        workers.push(Worker::start_on("prism.scan", program, arguments, &vhost.url(), out.path()));
    }
    for mut worker in workers {
        worker.eventually_prints("gave up evil scan.a: the message_id is not a UUID", 1).await;
        worker.eventually_prints("done 019a0000-0000-7000-8000-000000000001", 1).await;
        worker.program.signal("TERM");
        let ended = worker.program.wait().await;
        assert_eq!(ended.code, Some(0), "{ended:?}");
        assert!(ended.stderr.contains("cannot publish to prism.dead, so rejecting"), "{ended:?}");
    }
    for (vhost, ..) in &started {
        vhost.eventually_depth("prism.scan", 0).await;
    }
}

/// Work that takes longer than two heartbeats and than the patience of a worker that stops.
#[tokio::test]
async fn long_work_is_finished_and_acknowledged_also_during_a_stop() {
    let python = "import sys, time\nsys.path.insert(0, sys.argv[1] + '/python')\nimport kit, os\n\
        def work(_message):\n    print('working', flush=True)\n    time.sleep(35)\n\
        kit.run({'scan': work}, kit.SqliteStore(':memory:'), os.environ['AMQP_URL'], 'prism.scan')\n";
    let node = "const { run } = require(process.argv[2] + '/node/kit');\n\
        const work = async () => { console.log('working'); await new Promise((end) => setTimeout(end, 12_000)); };\n\
        run({ handlers: new Map([['scan', work]]), url: process.env.AMQP_URL, queue: 'prism.scan',\n\
          store: { isDone: () => false, markDone: () => {} } });\n";
    let scratch = Scratch::new();
    let long_work = async |program: &str, file: &str, text: &str| {
        let vhost = Vhost::new(Node::shared().await).await;
        vhost.create_queue("prism.scan", json!({ "x-queue-type": "quorum" })).await;
        let script = scratch.path().join(file);
        std::fs::write(&script, text).unwrap();
        let mut worker =
            Worker::start(program, &[script.to_str().unwrap(), &source("")], &vhost.url(), scratch.path()).await;
        let id = "019a0000-0000-7000-8000-000000000001";
        let properties = BasicProperties::default().with_message_id(id.into()).with_type("scan.a".into());
        vhost.publish_with("", "prism.scan", r#"{"eventType":"scan.a","payload":{}}"#, properties).await;
        worker.eventually_prints("working", 1).await;
        worker.program.signal("TERM");
        let ended = worker.program.wait().await;
        assert_eq!(ended.code, Some(0), "{ended:?}");
        assert!(ended.stdout.contains(&format!("done {id}")), "{ended:?}");
        vhost.assert_empty("prism.scan").await;
    };
    tokio::join!(long_work("/usr/bin/python3", "work.py", python), long_work("node", "work.js", node));
}

/// The copy of a given-up message has the event's own key. A retry has replaced it by one that is made from the name of
/// the queue without the number of the partition.
#[tokio::test]
async fn a_message_of_a_partition_that_is_given_up_after_a_retry_is_redriven_to_its_queue() {
    let script = "import os, sys\nsys.path.insert(0, sys.argv[1] + '/python')\nimport kit\ntries = []\n\
        def work(_message):\n    tries.append(1)\n\
        \x20   raise OSError('later') if len(tries) == 1 else kit.GiveUp('gone')\n\
        kit.run({'scan': work}, kit.SqliteStore(':memory:'), os.environ['AMQP_URL'], os.environ['QUEUE'])\n";
    let vhost = Vhost::new(Node::shared().await).await;
    let queues = json!([{ "name": "prism.scan", "bindings": ["scan.#"], "retry_delays": ["100ms"], "partitions": 2 }]);
    let relay = setup(&vhost).await.set("topology.queues", queues).start().await;
    relay.eventually_connected().await;
    let id = post(&relay, 0).await;
    let queue = eventually("the message in a partition", async || {
        let depths = [vhost.depth("prism.scan.1").await, vhost.depth("prism.scan.2").await];
        let found = depths.iter().position(|depth| *depth == 1).map(|index| format!("prism.scan.{}", index + 1));
        found.ok_or(format!("{depths:?}"))
    })
    .await;
    let file = relay.folder().join("work.py");
    std::fs::write(&file, script).unwrap();
    let arguments = [file.to_str().unwrap(), &source("")];
    let mut worker = Worker::start_on(&queue, "/usr/bin/python3", &arguments, &vhost.url(), relay.folder());
    worker.eventually_prints(&format!("failed {id} scan.processing.succeeded: later"), 1).await;
    worker.eventually_prints(&format!("gave up {id} scan.processing.succeeded: gone"), 1).await;
    worker.program.signal("TERM");
    worker.program.wait().await;

    let dry = relay.run(&["redrive", "--dry-run"]).await;
    assert!(dry.stdout.contains(&format!("given up by {queue}: gone")), "{dry:?}");
    vhost.eventually_depth("prism.dead", 1).await;
    let redriven = relay.run(&["redrive"]).await;
    assert!(redriven.stdout.starts_with("1 moved"), "{redriven:?}");
    vhost.eventually_depth(&queue, 1).await;
    vhost.assert_empty("prism.unrouted").await;
}

/// Messages that a worker received before its connection was lost are with other workers by then.
#[tokio::test]
async fn the_rust_kit_starts_no_message_of_a_lost_connection() {
    let vhost = Vhost::new(Node::shared().await).await;
    vhost.create_queue("prism.scan", json!({ "x-queue-type": "quorum" })).await;
    for number in 1..=5 {
        let id = format!("019a0000-0000-7000-8000-00000000000{number}");
        let properties = BasicProperties::default().with_message_id(id.into()).with_type("scan.a".into());
        vhost.publish_with("", "prism.scan", r#"{"eventType":"scan.a","payload":{}}"#, properties).await;
    }
    let seen = std::sync::Mutex::new(Vec::new());
    let handler = async |message: &kit::Message| {
        let first = {
            let mut seen = seen.lock().unwrap();
            seen.push(message.redelivered);
            seen.len() == 1
        };
        if first {
            // The API shows a new connection a moment later. All messages are in the queue again when it is closed.
            eventually("five messages in the queue", async || {
                vhost.close_connections().await;
                let depth = vhost.depth("prism.scan").await;
                if depth == 5 { Ok(()) } else { Err(depth) }
            })
            .await;
        }
        Ok(())
    };
    let options =
        kit::Options { url: vhost.url(), queue: "prism.scan".to_owned(), prefetch: 20, metrics: |_: &_, _: &_, _| {} };
    let all = eventually("five messages", async || {
        let count = seen.lock().unwrap().len();
        if count == 5 { Ok(()) } else { Err(count) }
    });
    let store = sqlite_store::SqliteStore::open(":memory:").unwrap();
    kit::run_until(all, &handler, store, options).await.unwrap();
    assert_eq!(*seen.lock().unwrap(), [false, true, true, true, true]);
}

async fn setup(vhost: &Vhost) -> Setup {
    let api = format!("http://127.0.0.1:{}", Node::shared().await.management().port);
    Setup::new(&vhost.url()).set("broker.management_url", api)
}

fn source(file: &str) -> String {
    format!("{}/deploy/workers/{file}", env!("CARGO_MANIFEST_DIR"))
}

/// A running worker, and the folder to which it writes.
struct Worker {
    program: Program,
    out: PathBuf,
}

impl Worker {
    async fn start(program: &str, arguments: &[&str], url: &str, out: &Path) -> Self {
        let worker = Self::start_on("prism.scan", program, arguments, url, out);
        worker.eventually_prints("consuming prism.scan", 1).await;
        worker
    }

    fn start_on(queue: &str, program: &str, arguments: &[&str], url: &str, out: &Path) -> Self {
        let mut command = leash::command(program);
        command.args(arguments).env("AMQP_URL", url).env("QUEUE", queue).env("OUT", out);
        with_node_modules(&mut command);
        Self { program: Program::start(command), out: out.to_owned() }
    }

    /// Waits until `count` lines of its output begin with `start`.
    async fn eventually_prints(&self, start: &str, count: usize) {
        eventually(&format!("{count} lines of a worker that begin with {start:?}"), async || {
            let lines = self.program.stdout();
            let found = lines.iter().filter(|line| line.starts_with(start)).count();
            if found == count { Ok(()) } else { Err(format!("{lines:?} {:?}", self.program.stderr())) }
        })
        .await;
    }

    /// The ids in the names of the files that it has written.
    fn files(&self) -> BTreeSet<String> {
        let files = std::fs::read_dir(&self.out).unwrap().map(|file| file.unwrap().file_name().into_string().unwrap());
        files.map(|name| name.strip_suffix(".json").expect("only complete files").to_owned()).collect()
    }
}

/// The URL of a new user with the rights that `security.md` names for a worker.
async fn url_of_a_worker(vhost: &Vhost, queue: &str) -> String {
    new_user(vhost, "", ("^$", "^prism\\.dead$", &format!("^{}$", queue.replace('.', "\\.")))).await
}

/// The URL of a new user with a tag, and with permissions to configure, write and read.
async fn new_user(vhost: &Vhost, tag: &str, (configure, write, read): (&str, &str, &str)) -> String {
    let user = format!("user{}", uuid::Uuid::now_v7().simple());
    Node::shared().await.create_user_with_tag(&user, PASSWORD, tag).await;
    vhost.permit(&user, configure, write, read).await;
    vhost.url_for(&user, PASSWORD, vhost.address())
}

fn with_node_modules(command: &mut Command) {
    if let Ok(modules) = std::env::var("PRISM_TEST_NODE_MODULES") {
        command.env("NODE_PATH", modules);
    }
}

async fn post(relay: &Relay, number: usize) -> String {
    let payload = json!({ "scanId": format!("scan-{number}"), "userId": "user", "state": "READY", "number": number });
    relay.post(samples::event("scan.processing.succeeded", payload)).await.id()
}

async fn the_life_of_a_message(program: &str, arguments: &[&str]) {
    let vhost = Vhost::new(Node::shared().await).await;
    let queues = json!([{ "name": "prism.scan", "bindings": ["scan.#"], "retry_delays": ["200ms", "400ms"] }]);
    let relay = setup(&vhost).await.set("topology.queues", queues).start().await;
    relay.eventually_connected().await;
    let out = relay.folder().join("out");
    std::fs::create_dir(&out).unwrap();

    // A delivered message is done.
    let url = url_of_a_worker(&vhost, "prism.scan").await;
    let mut worker = Worker::start(program, arguments, &url, &out).await;
    let first = post(&relay, 0).await;
    worker.eventually_prints(&format!("done {first} scan.processing.succeeded"), 1).await;
    assert_eq!(worker.files(), [first.clone()].into());

    // The worker cannot write its files: the message fails, is retried twice, and becomes a dead letter.
    std::fs::rename(&out, relay.folder().join("away")).unwrap();
    let second = post(&relay, 1).await;
    worker.eventually_prints(&format!("failed {second} scan.processing.succeeded"), 3).await;
    vhost.eventually_depth("prism.dead", 1).await;

    // The worker can write again: a redriven message is done.
    std::fs::rename(relay.folder().join("away"), &out).unwrap();
    let redriven = relay.run(&["redrive"]).await;
    assert!(redriven.stdout.starts_with("1 moved"), "{redriven:?}");
    worker.eventually_prints(&format!("done {second} scan.processing.succeeded"), 1).await;
    assert_eq!(worker.files(), [first.clone(), second].into());

    // A message that comes twice is done once.
    let again = BasicProperties::default().with_message_id(first.as_str().into()).with_type("scan.a".into());
    vhost.publish_with("prism.events", "scan.a", "{}", again).await;
    worker.eventually_prints(&format!("again {first} scan.a"), 1).await;
    // An id that is not a UUID never becomes a path. The message is a dead letter at once, without retries.
    let evil = BasicProperties::default().with_message_id("../../evil".into()).with_type("scan.a".into());
    vhost.publish_with("prism.events", "scan.a", "{}", evil).await;
    worker.eventually_prints("gave up ../../evil scan.a: the message_id is not a UUID", 1).await;
    vhost.eventually_depth("prism.dead", 1).await;
    let dry = relay.run(&["redrive", "--dry-run"]).await;
    assert!(dry.stdout.contains("given up by prism.scan: the message_id is not a UUID"), "{dry:?}");
    vhost.eventually_depth("prism.dead", 1).await;
    let dead = vhost.messages("prism.dead", 1).await.remove(0);
    assert_eq!((dead.routing_key.as_str(), dead.id().as_str()), ("scan.a", "../../evil"));
    assert!(dead.properties.headers().as_ref().is_none_or(|headers| !headers.inner().contains_key("x-death")));

    // A worker whose connection is closed reconnects.
    eventually("the worker to reconnect", async || {
        // The API shows a new connection a moment later.
        vhost.close_connections().await;
        let lines = worker.program.stdout();
        let began = lines.iter().filter(|line| *line == "consuming prism.scan").count();
        if began > 1 { Ok(()) } else { Err(format!("{lines:?} {:?}", worker.program.stderr())) }
    })
    .await;

    stop_in_the_middle_of_the_work(&mut worker, &relay, &vhost).await;
    play_the_vectors(program, arguments, &relay, &vhost).await;
    let words = [worker.program.stdout(), worker.program.stderr()].concat().join("\n");
    assert!(!words.contains("partner-user-42"), "the worker prints a user token: {words}");
}

/// A worker that stops finishes and acknowledges its current message. Every other message stays in the queue.
async fn stop_in_the_middle_of_the_work(worker: &mut Worker, relay: &Relay, vhost: &Vhost) {
    let before = worker.files();
    let mut ids = BTreeSet::new();
    for number in 2..202 {
        ids.insert(post(relay, number).await);
        if number == 100 {
            eventually("the worker to do some of them", async || {
                let done = worker.program.stdout().iter().filter(|line| line.starts_with(DONE)).count();
                if done > 2 { Ok(()) } else { Err(done) }
            })
            .await;
            worker.program.signal("TERM");
        }
    }
    let ended = worker.program.wait().await;
    assert_eq!(ended.code, Some(0), "{ended:?}");
    relay.eventually_nothing_pending().await;
    let done: BTreeSet<_> = worker.files().difference(&before).cloned().collect();
    assert_eq!(ended.stdout.lines().filter(|line| line.starts_with(DONE)).count(), done.len() + 2);
    let left = ids.len() - done.len();
    vhost.eventually_depth("prism.scan", u32::try_from(left).unwrap()).await;
    let left: BTreeSet<_> = vhost.messages("prism.scan", left).await.iter().map(|message| message.id()).collect();
    assert!(!done.is_empty() && done.is_disjoint(&left), "{} done, {} left", done.len(), left.len());
    assert_eq!(done.union(&left).cloned().collect::<BTreeSet<_>>(), ids);
}

/// `send --to-queue` sees what a worker does: all right with a good one, all rejected with one that cannot work.
async fn play_the_vectors(program: &str, arguments: &[&str], relay: &Relay, vhost: &Vhost) {
    let out = relay.folder().join("vectors");
    std::fs::create_dir(&out).unwrap();
    let url = url_of_a_worker(vhost, TEST_QUEUE).await;
    let mut worker = Worker::start_on(TEST_QUEUE, program, arguments, &url, &out);
    let dead = vhost.depth("prism.dead").await;
    let own = "^(prism\\.scan\\.test-1|amq\\.default$)";
    let url = new_user(vhost, "management", (own, own, own)).await;
    let tester = setup(vhost).await.set("broker.urls", json!([url]));
    let played = tester.run(&["send", "--to-queue", TEST_QUEUE, "--vectors", "--json"]).await;
    let report: Value = serde_json::from_str(&played.stdout).unwrap_or_else(|error| panic!("{error}: {played:?}"));
    assert_eq!((played.code, &report["wrong"]), (Some(0), &json!(0)), "{report:#}");
    let cases = report["cases"].as_array().unwrap();
    let rejected = cases.iter().filter(|case| case["seen"] == "reject").count();
    assert_eq!(report["acks"], json!(cases.len() - rejected), "{report:#}");
    assert!(cases.iter().any(|case| case["name"] == "body-is-cut" && case["seen"] == "reject"), "{report:#}");
    // One file less than acks, because one message came twice.
    assert_eq!(std::fs::read_dir(&out).unwrap().count(), cases.len() - rejected - 1);
    worker.eventually_prints(&format!("again {}", report["duplicate"].as_str().unwrap()), 1).await;
    assert_eq!(vhost.depth("prism.dead").await, dead, "a test message is among the dead letters");
    assert!(vhost.queue(TEST_QUEUE).await.is_none(), "the queue is still there");
    worker.program.signal("TERM");
    worker.program.wait().await;
}

#[tokio::test]
async fn a_worker_that_settles_nothing_or_everything_wrongly_is_found() {
    let vhost = Vhost::new(Node::shared().await).await;
    let relay = setup(&vhost).await.start().await;
    relay.eventually_connected().await;
    let play = async |wait: &str| {
        let arguments = ["send", "--to-queue", TEST_QUEUE, "--vectors", "--json", "--wait", wait];
        let played = relay.run(&arguments).await;
        assert_eq!(played.code, Some(1), "{played:?}");
        (serde_json::from_str::<Value>(&played.stdout).unwrap_or_default(), played.stderr)
    };
    let seen = |report: &Value, name: &str| {
        let cases = report["cases"].as_array().cloned().unwrap_or_default();
        cases.into_iter().find(|case| case["name"] == name).map(|case| case["seen"].clone())
    };

    // No worker.
    assert!(play("2s").await.1.contains("no worker consumed"));
    // A worker whose work fails rejects everything.
    let nowhere = relay.folder().join("nowhere");
    let script = source("python/worker.py");
    let worker = Worker::start_on(TEST_QUEUE, "/usr/bin/python3", &[&script], &vhost.url(), &nowhere);
    let (report, _) = play("1m").await;
    assert_eq!(seen(&report, "scan-succeeded"), Some(json!("reject")), "{report:#}");
    drop(worker);
    // A worker that takes messages and never answers.
    let ((report, _), ()) = tokio::join!(play("5s"), silent_consumer(&vhost, false));
    assert_eq!(seen(&report, "scan-succeeded"), Some(json!("not-settled")), "{report:#}");
    assert_eq!(report["automatic_acks"], false);
    // A worker with automatic acks.
    let ((report, _), ()) = tokio::join!(play("1m"), silent_consumer(&vhost, true));
    assert_eq!(report["automatic_acks"], true, "{report:#}");

    // Queues that are not for tests.
    let refused = relay.run(&["send", "--to-queue", "orders", "--vectors"]).await;
    assert!(refused.code == Some(64) && refused.stderr.contains("`test`"), "{refused:?}");
    let refused = relay.run(&["send", "--to-queue", "prism.scan", "--vectors"]).await;
    assert_eq!(refused.code, Some(64), "{refused:?}");
    vhost.create_queue(TEST_QUEUE, json!({})).await;
    assert!(play("1s").await.1.contains("exists already"));
    assert!(vhost.queue(TEST_QUEUE).await.is_some(), "a queue of somebody else was deleted");
}

/// A CI job that is cancelled leaves no queue in the way of the next one, even while its worker goes on to consume it.
#[tokio::test]
async fn a_run_of_the_vectors_that_is_interrupted_or_killed_is_not_in_the_way_of_the_next_one() {
    let vhost = Vhost::new(Node::shared().await).await;
    let setup = setup(&vhost).await;
    let arguments = ["send", "--to-queue", TEST_QUEUE, "--vectors", "--wait", "1m"];
    let started = async || {
        let run = setup.launch(&arguments);
        // It settles nothing, so the run is in the middle of its work until the end.
        let worker = silent_worker(&vhost, false).await;
        eventually("the worker to have messages", async || {
            let queue = vhost.queue(TEST_QUEUE).await.unwrap_or_default();
            if queue["messages_unacknowledged"].as_u64() > Some(1) { Ok(()) } else { Err(queue) }
        })
        .await;
        (run, worker)
    };
    for signal in ["INT", "TERM"] {
        let (mut run, _worker) = started().await;
        run.signal(signal);
        let ended = run.wait().await;
        assert!(ended.code == Some(1) && ended.stderr.contains("is deleted"), "{ended:?}");
        assert!(vhost.queue(TEST_QUEUE).await.is_none(), "{signal}: the queue is still there");
    }
    let (mut run, _worker) = started().await;
    let second = setup.run(&arguments).await;
    assert!(second.code == Some(1) && second.stderr.contains("another run"), "{second:?}");
    run.signal("KILL");
    run.wait().await;
    assert!(vhost.queue(TEST_QUEUE).await.is_some(), "a killed run deletes nothing");
    // RabbitMQ notices a moment later that the killed run is gone.
    eventually("the next run to begin", async || {
        let again = setup.run(&["send", "--to-queue", TEST_QUEUE, "--vectors", "--wait", "2s"]).await;
        if again.stderr.contains("no worker consumed") { Ok(()) } else { Err(again.stderr) }
    })
    .await;
    assert!(vhost.queue(TEST_QUEUE).await.is_none(), "the queue is still there");
}

/// Consumes the queue once it exists, and acknowledges nothing.
async fn silent_worker(vhost: &Vhost, no_ack: bool) -> (lapin::Channel, lapin::Consumer) {
    eventually("the queue of the vectors", async || vhost.queue(TEST_QUEUE).await.map(drop).ok_or("no queue")).await;
    let channel = vhost.connect().await.create_channel().await.unwrap();
    let options = BasicConsumeOptions { no_ack, ..Default::default() };
    let consuming = channel.basic_consume(TEST_QUEUE.into(), "".into(), options, FieldTable::default());
    let deliveries = consuming.await.unwrap();
    (channel, deliveries)
}

/// A [`silent_worker`] until the queue is deleted.
async fn silent_consumer(vhost: &Vhost, no_ack: bool) {
    let (_channel, mut deliveries) = silent_worker(vhost, no_ack).await;
    while deliveries.next().await.is_some_and(|delivery| delivery.is_ok()) {}
}

/// Runs a program to its end, and returns its output.
async fn output(mut command: Command) -> String {
    let ended = tokio::task::spawn_blocking(move || command.output().expect("start a program")).await.unwrap();
    let text = String::from_utf8_lossy(&ended.stdout).into_owned();
    assert!(ended.status.success(), "{text}{}", String::from_utf8_lossy(&ended.stderr));
    text
}

/// The third runner, of the Rust worker, is compiled into this binary.
#[tokio::test]
async fn the_kits_of_python_and_node_pass_the_vectors() {
    for (program, file) in [("/usr/bin/python3", "python/vectors.py"), ("node", "node/vectors.js")] {
        let mut command = Command::new(program);
        command.arg(source(file)).env("PYTHONDONTWRITEBYTECODE", "1");
        with_node_modules(&mut command);
        let text = output(command).await;
        assert!(text.contains(" messages and 9 signatures as expected"), "{text}");
    }
}

/// With `PRISM_TEST_REWRITE` set, the types are written in place of compared.
#[tokio::test]
async fn the_types_of_python_and_node_are_generated_from_the_schemas() {
    let scratch = Scratch::new();
    let mut command = Command::new(format!("{}/tests/types.sh", env!("CARGO_MANIFEST_DIR")));
    command.arg(scratch.path());
    output(command).await;
    for (generated, file) in [("prism_types.py", "python/prism_types.py"), ("types.d.ts", "node/types.d.ts")] {
        let generated = std::fs::read_to_string(scratch.path().join(generated)).unwrap();
        if std::env::var_os("PRISM_TEST_REWRITE").is_some() {
            std::fs::write(source(file), generated).unwrap();
        } else {
            let message = "is not what tests/types.sh makes of the schemas; PRISM_TEST_REWRITE=1 writes it";
            assert!(generated == std::fs::read_to_string(source(file)).unwrap(), "deploy/workers/{file} {message}");
        }
    }
}

/// A copy of the files of a worker, without anything of the repository around it.
fn alone(folder: &str) -> Scratch {
    let scratch = Scratch::new();
    for file in std::fs::read_dir(source(folder)).unwrap().map(Result::unwrap).filter(|file| file.path().is_file()) {
        std::fs::copy(file.path(), scratch.path().join(file.file_name())).unwrap();
    }
    scratch
}

#[tokio::test]
async fn the_folders_of_python_and_node_start_alone_and_agree_with_their_types() {
    let (python, node) = (alone("python"), alone("node"));
    let modules = std::env::var("PRISM_TEST_NODE_MODULES").expect("tests/run.sh sets it");
    std::os::unix::fs::symlink(&modules, node.path().join("node_modules")).unwrap();
    for (program, folder, file) in [("/usr/bin/python3", &python, "worker.py"), ("node", &node, "worker.js")] {
        let file = folder.path().join(file);
        let nowhere = "amqp://127.0.0.1:1/";
        let mut worker = Worker::start_on("prism.scan", program, &[file.to_str().unwrap()], nowhere, folder.path());
        eventually("the worker to try to connect", async || {
            let words = worker.program.stderr();
            if words.iter().any(|line| line.starts_with("connection: ")) { Ok(()) } else { Err(words.join("\n")) }
        })
        .await;
        worker.program.signal("TERM");
        assert_eq!(worker.program.wait().await.code, Some(0));
    }
    let mut tsc = Command::new(format!("{modules}/.bin/tsc"));
    tsc.arg("--project").arg(node.path());
    output(tsc).await;

    let tools = std::env::var("PRISM_TEST_PYTHON_TOOLS").expect("tests/run.sh sets it");
    let mypy = || {
        let mut mypy = Command::new(format!("{tools}/mypy"));
        mypy.current_dir(python.path()).args(["--no-incremental", "."]);
        mypy
    };
    output(mypy()).await;
    let misspelt = "import kit\ndef work(message: kit.Message) -> None:\n    print(message.scan()['scanID'])\n";
    std::fs::write(python.path().join("misspelt.py"), misspelt).unwrap();
    let found = mypy().output().unwrap();
    assert!(!found.status.success() && String::from_utf8_lossy(&found.stdout).contains("scanID"), "{found:?}");
}

/// With the relay's versions, and without the TLS of lapin's default features, so that nothing is downloaded. The other
/// features are those of the folder's own `Cargo.toml`.
#[tokio::test]
async fn the_folder_of_rust_compiles_alone() {
    let (folder, root) = (alone("rust"), Path::new(env!("CARGO_MANIFEST_DIR")));
    std::fs::copy(root.join("Cargo.lock"), folder.path().join("Cargo.lock")).unwrap();
    let manifest = folder.path().join("Cargo.toml");
    let text = std::fs::read_to_string(&manifest).unwrap();
    let without_tls = r#"lapin = { version = "4.12", default-features = false, features = ["default-runtime"] }"#;
    let changed = text.replace(r#"lapin = "4.12""#, without_tls);
    assert_ne!(text, changed);
    std::fs::write(manifest, changed).unwrap();
    let mut cargo = Command::new(env!("CARGO"));
    // Kept, so that only the first run compiles the dependencies.
    cargo.current_dir(folder.path()).env("CARGO_TARGET_DIR", root.join("target/worker-alone"));
    cargo.args(["check", "--quiet", "--offline"]);
    output(cargo).await;
}

#[test]
fn the_types_of_rust_have_each_field_and_word_of_the_schemas() {
    fn check<T: serde::Serialize + serde::de::DeserializeOwned>(schema: &str, open: &str) {
        let schema: Value = serde_json::from_str(schema).unwrap();
        let example = &schema["examples"][0];
        let known: BTreeSet<_> = schema["properties"].as_object().unwrap().keys().cloned().collect();
        let required: BTreeSet<_> =
            schema["required"].as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect();
        assert_eq!(
            known.iter().map(String::as_str).collect::<BTreeSet<_>>(),
            required,
            "Option is for optional fields"
        );
        for name in &known {
            let mut without = example.clone();
            without.as_object_mut().unwrap().remove(name);
            assert!(serde_json::from_value::<T>(without).is_err(), "{name} is not a field of the type");
        }
        // Each word has a variant of its own, and any other word stays.
        let words = schema["properties"][open]["anyOf"][0]["enum"].as_array().unwrap();
        for word in words.iter().chain([&json!("SOMETHING NEW")]) {
            let mut event = example.clone();
            event[open] = word.clone();
            event["added"] = json!([1, { "a": null }]);
            let typed: T = serde_json::from_value(event.clone()).unwrap_or_else(|error| panic!("{word}: {error}"));
            assert_eq!(json!(typed), event);
        }
    }
    fn is_known<T: serde::de::DeserializeOwned>(word: &Value, is_unknown: impl Fn(&T) -> bool) {
        assert!(!is_unknown(&serde_json::from_value(word.clone()).unwrap()), "{word} has no variant");
    }
    let words = |schema: &str, field: &str| {
        let schema: Value = serde_json::from_str(schema).unwrap();
        schema["properties"][field]["anyOf"][0]["enum"].as_array().unwrap().clone()
    };
    const ENVELOPE: &str = include_str!("../../deploy/workers/schemas/envelope.schema.json");
    const SCAN: &str = include_str!("../../deploy/workers/schemas/scan.schema.json");
    const PREDICTION: &str = include_str!("../../deploy/workers/schemas/body_shape_prediction.schema.json");
    check::<types::Envelope>(ENVELOPE, "eventType");
    check::<types::ScanPayload>(SCAN, "state");
    check::<types::BodyShapePredictionPayload>(PREDICTION, "state");
    for word in words(ENVELOPE, "eventType") {
        is_known(&word, |kind: &types::EventType| matches!(kind, types::EventType::Unknown(_)));
    }
    for word in [words(SCAN, "state"), words(PREDICTION, "state")].concat() {
        is_known(&word, |state: &types::State| matches!(state, types::State::Unknown(_)));
    }
}

/// The suite builds the Rust worker with the relay's dependencies, so those that its own Cargo.toml names are the same.
#[test]
fn the_crate_of_the_rust_worker_has_the_versions_that_are_tested() {
    let table = |file: &str| {
        let text = std::fs::read_to_string(file).unwrap();
        let versions = text.lines().filter_map(|line| {
            let (name, rest) = line.split_once(" = ")?;
            let version = rest.split('"').nth(1)?;
            version.starts_with(|first: char| first.is_ascii_digit()).then(|| (name.to_owned(), version.to_owned()))
        });
        versions.collect::<Vec<_>>()
    };
    let (ours, theirs) =
        (table(&format!("{}/Cargo.toml", env!("CARGO_MANIFEST_DIR"))), table(&source("rust/Cargo.toml")));
    let wrong: Vec<_> = theirs.iter().filter(|dependency| !ours.contains(dependency)).collect();
    assert!(theirs.len() > 8 && wrong.is_empty(), "{wrong:?} of {theirs:?}");
}

#[tokio::test]
async fn something_new_from_prism_shows_up_and_breaks_no_worker() {
    let vhost = Vhost::new(Node::shared().await).await;
    let relay = Setup::new(&vhost.url()).start().await;
    relay.eventually_connected().await;
    let out = relay.folder().join("out");
    std::fs::create_dir(&out).unwrap();
    let worker = Worker::start("/usr/bin/python3", &[&source("python/worker.py")], &vhost.url(), &out).await;
    let body = json!({
        "eventType": "scan.processing.paused", "eventVersion": 2,
        "payload": { "scanId": "s", "userId": "u", "userToken": "t", "state": "PAUSED" },
    });
    let known = body.to_string().replace("paused", "started").replace("scanId", "quality\":0.5,\"scanId");
    let ids = [relay.post(body.to_string()).await.id(), relay.post(known.as_str()).await.id()];
    // No queue of a worker gets this one.
    relay.post(r#"{"eventType":7,"payload":{}}"#).await.expect(200);
    worker.eventually_prints(DONE, 2).await;
    assert_eq!(std::fs::read_to_string(out.join(format!("{}.json", ids[1]))).unwrap(), known);

    let expected: [(&str, &str, u64); 5] = [
        ("event_type", "scan.processing.paused", 1),
        ("field", "eventVersion", 2),
        ("field", "payload.quality", 1),
        ("state", "PAUSED", 1),
        ("type", "eventType: number", 1),
    ];
    eventually("what is new in the status", async || {
        let status = relay.status().await;
        let found = status["unexpected"].as_array().unwrap().iter();
        let mut found: Vec<_> = found.map(|new| json!([new["kind"], new["name"], new["count"]])).collect();
        found.sort_by_key(ToString::to_string);
        if found == expected.map(|(kind, name, count)| json!([kind, name, count])) { Ok(()) } else { Err(json!(found)) }
    })
    .await;
    // The log is written by a thread of its own.
    eventually("a log line for each of them", async || {
        let logs = relay.logs();
        let lines = |(kind, name, _): &(&str, &str, u64)| {
            logs.iter().filter(|line| line["kind"] == *kind && line["name"] == *name).count()
        };
        let lines: Vec<_> = expected.iter().map(lines).collect();
        if lines == [1; 5] { Ok(()) } else { Err(json!(lines)) }
    })
    .await;
    assert_eq!(relay.metric("prism_relay_unexpected_total", &[("kind", "field")]).await, 3.0);
    eventually("nothing to be wrong", async || {
        let status = relay.status().await;
        if status["headline"]["level"] == "ok" { Ok(()) } else { Err(status["headline"].clone()) }
    })
    .await;
}
