//! The example workers of `deploy/workers/`: they do, fail, retry and skip messages, reconnect and stop.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use lapin::BasicProperties;
use serde_json::json;

use crate::harness::program::Program;
use crate::harness::{Node, Relay, Setup, Vhost, eventually, leash, samples};

const DONE: &str = "done";

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
    // Built here, because cargo builds examples only for a run of all tests.
    let build = tokio::task::spawn_blocking(|| {
        Command::new(env!("CARGO")).args(["build", "--quiet", "--locked", "--example", "worker"]).status()
    });
    assert!(build.await.unwrap().expect("cargo").success());
    let tests = std::env::current_exe().unwrap();
    let worker = tests.parent().unwrap().with_file_name("examples").join("worker");
    the_life_of_a_message(worker.to_str().unwrap(), &[]).await;
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
    async fn start(program: &str, arguments: &[&str], vhost: &Vhost, out: &Path) -> Self {
        let mut command = leash::command(program);
        command.args(arguments).env("AMQP_URL", vhost.url()).env("QUEUE", "prism.scan").env("OUT", out);
        if let Ok(modules) = std::env::var("PRISM_TEST_NODE_MODULES") {
            command.env("NODE_PATH", modules);
        }
        let worker = Self { program: Program::start(command), out: out.to_owned() };
        worker.eventually_prints("consuming prism.scan", 1).await;
        worker
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

async fn post(relay: &Relay, number: usize) -> String {
    relay.post(samples::event("scan.processing.succeeded", json!({ "number": number }))).await.id()
}

async fn the_life_of_a_message(program: &str, arguments: &[&str]) {
    let vhost = Vhost::new(Node::shared().await).await;
    let queues = json!([{ "name": "prism.scan", "bindings": ["scan.#"], "retry_delays": ["200ms", "400ms"] }]);
    let relay = Setup::new(&vhost.url()).set("topology.queues", queues).start().await;
    relay.eventually_connected().await;
    let out = relay.folder().join("out");
    std::fs::create_dir(&out).unwrap();

    // A delivered message is done.
    let mut worker = Worker::start(program, arguments, &vhost, &out).await;
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
    // An id that is not a UUID never becomes a path.
    let evil = BasicProperties::default().with_message_id("../../evil".into()).with_type("scan.a".into());
    vhost.publish_with("prism.events", "scan.a", "{}", evil).await;
    vhost.eventually_depth("prism.dead", 1).await;

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
