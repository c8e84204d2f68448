//! Runs the code blocks of the pages: shell and Python as a reader would, TOML as a configuration.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use super::page::{self, Block, page};
use crate::harness::program::{Ended, Program};
use crate::harness::scratch::Scratch;
use crate::harness::{Authority, Node, Relay, SECRET, Setup, Vhost, eventually, leash, ports};

/// The pages whose shell blocks are run.
const RUN: [&str; 2] = ["README.md", "deploy/workers/README.md"];
/// RabbitMQ's URL in the pages: that of the quickstart.
const BROKER: &str = "amqp://guest:guest@127.0.0.1:5673/%2f";
const LISTENER: &str = "http://127.0.0.1:8080";

#[test]
fn every_block_says_what_it_is_and_why_it_is_not_run() {
    for name in RUN {
        for block in page(name).blocks() {
            assert!(!block.language.is_empty(), "{name}: this block has no language:\n{}", block.text);
            if let Some(reason) = &block.not_run {
                assert!(reason.len() > 15, "{name}: a block is not run because of {reason:?}");
            }
        }
    }
}

#[tokio::test]
async fn every_toml_block_is_a_configuration() {
    let files = Scratch::new();
    let authority = Authority::new();
    let server = authority.issue_server();
    let contents = [
        ("tls.crt", server.certificate),
        ("tls.key", server.private_key),
        ("rabbitmq-ca.crt", authority.pem()),
        ("secrets", "whsec_0123456789abcdef\n".to_owned()),
        ("rabbitmq-password", "0123456789abcdef\n".to_owned()),
        ("ops-token", "0123456789abcdef\n".to_owned()),
        ("prism-api-key", "0123456789abcdef\n".to_owned()),
    ];
    for (name, content) in contents {
        fs::write(files.path().join(name), content).expect("write a file of the configuration");
    }
    let (folder, mut parsed) = (files.path().display().to_string(), 0);
    for page in page::all() {
        for block in page.blocks().iter().filter(|block| block.language == "toml") {
            let toml = block.text.replace("/etc/prism-relay", &folder).replace("whsec_...", "whsec_0123456789abcdef");
            let file = files.path().join("relay.toml");
            fs::write(&file, toml).expect("write the configuration");
            let mut command = leash::command(env!("CARGO_BIN_EXE_prism-relay"));
            command.arg("--config").arg(&file).args(["topology", "show"]);
            let ended = Program::start(command).wait().await;
            assert_eq!(ended.code, Some(0), "{}: {}\n{}", page.name, ended.stderr, block.text);
            parsed += 1;
        }
    }
    assert!(parsed > 5, "{parsed} blocks");
}

/// Runs a shell block as a reader does, in this folder.
async fn run(block: &Block, folder: &Path, environment: &[(&str, &str)]) -> Ended {
    let mut command = leash::command("/bin/bash");
    command.args(["-euo", "pipefail", "-c", &block.text]).current_dir(folder);
    command.envs(environment.iter().copied());
    let ended = Program::start(command).wait().await;
    assert_eq!(ended.code, Some(0), "{ended:?}\n{}", block.text);
    ended
}

fn shell_blocks(name: &str) -> Vec<Block> {
    page(name).blocks().into_iter().filter(|block| block.language == "sh" && block.not_run.is_none()).collect()
}

#[tokio::test]
async fn the_events_of_the_readme_are_accepted_and_its_worker_gets_them() {
    let vhost = Vhost::new(Node::shared().await).await;
    let signed = Relay::start(&vhost).await;
    let unsigned = Setup::new(&vhost.url()).set("signature.required", false).start().await;
    signed.eventually_connected().await;
    // What the quickstart writes, as far as the page reads it.
    let quickstart = signed.folder().join(".quickstart");
    fs::create_dir(&quickstart).expect("create a folder");
    fs::write(quickstart.join("relay.toml"), format!("secrets = [\"{SECRET}\"]\n")).expect("write a file");

    let mut ids = Vec::new();
    for mut block in shell_blocks("README.md") {
        let relay = if block.text.contains("prism-signature") { &signed } else { &unsigned };
        assert!(block.text.contains(LISTENER), "{}", block.text);
        block.text = block.text.replace(LISTENER, &format!("http://{}", relay.address()));
        let answer = run(&block, signed.folder(), &[]).await.stdout;
        assert!(answer.contains(" 200 ") && answer.contains("\"ok\":true"), "{answer}");
        let (_, id) = answer.split_once("\"id\":\"").expect("an id");
        ids.push(id[..36].to_owned());
    }
    assert_eq!(ids.len(), 2, "the README posts a signed and an unsigned event");

    let worker = page("README.md").blocks().into_iter().find(|block| block.language == "python").expect("a worker");
    assert!(worker.text.contains(BROKER) && worker.text.lines().count() <= 9, "{}", worker.text);
    let mut command = leash::command("/usr/bin/python3");
    command.args(["-u", "-c", &worker.text.replace(BROKER, &vhost.url())]);
    let worker = Program::start(command);
    eventually("the worker to print both events", async || {
        let printed = worker.stdout().join("\n");
        let all = ids.iter().all(|id| printed.contains(id));
        if all { Ok(()) } else { Err(format!("{printed} {:?}", worker.stderr())) }
    })
    .await;
}

/// A folder with `prism-relay` in front of the search path, which runs with the configuration of this relay.
fn with_commands(relay: &Relay) -> String {
    let folder = relay.folder().join("bin");
    fs::create_dir(&folder).expect("create a folder");
    let config = relay.folder().join("relay.toml");
    let script =
        format!("#!/bin/bash\nexec {} --config {} \"$@\"\n", env!("CARGO_BIN_EXE_prism-relay"), config.display());
    let file = folder.join("prism-relay");
    fs::write(&file, script).expect("write a script");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).expect("make it executable");
    format!("{}:{}", folder.display(), std::env::var("PATH").unwrap_or_default())
}

#[tokio::test]
async fn the_life_of_a_message_is_as_the_page_tells_it() {
    let vhost = Vhost::new(Node::shared().await).await;
    let queues =
        serde_json::json!([{ "name": "prism.scan", "bindings": ["scan.#"], "retry_delays": ["200ms", "400ms"] }]);
    let listener = format!("127.0.0.1:{}", ports::free());
    let relay = Setup::new(&vhost.url()).set("topology.queues", queues).set("http.listen", listener).start().await;
    relay.eventually_connected().await;
    let path = with_commands(&relay);
    let mut worker = leash::command("/usr/bin/python3");
    worker.arg(page::root().join("deploy/workers/python/worker.py")).current_dir(relay.folder());
    let worker = Program::start({
        worker.env("AMQP_URL", vhost.url());
        worker
    });

    let blocks = shell_blocks("deploy/workers/README.md");
    assert!(blocks.len() >= 4, "{} blocks", blocks.len());
    for block in blocks {
        if block.text.contains("mv out out.away") {
            // Not by the files: a worker that is between the rename and the sync of the folder would fail.
            eventually("5 lines of the worker that begin with done", async || {
                let lines = worker.stdout();
                if lines.iter().filter(|line| line.starts_with("done")).count() == 5 {
                    Ok(())
                } else {
                    Err(lines.join("\n"))
                }
            })
            .await;
        }
        if block.text.contains("redrive") {
            vhost.eventually_depth("prism.dead", 5).await;
        }
        run(&block, relay.folder(), &[("PATH", &path)]).await;
        let repaired = !relay.folder().join("out.away").exists();
        if repaired {
            vhost.eventually_depth("prism.dead", 0).await;
        }
    }
    files(&relay, 10).await;
}

/// Waits until the worker has written this many files.
async fn files(relay: &Relay, count: usize) {
    eventually(&format!("{count} files of the worker"), async || {
        let files = fs::read_dir(relay.folder().join("out")).map_or(0, Iterator::count);
        if files == count { Ok(()) } else { Err(files) }
    })
    .await;
}
