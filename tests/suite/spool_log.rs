//! The write-ahead log of the spool and its disk: readers that stay, room that ends, limits. No refusal outlives its
//! cause.

use std::path::Path;
use std::process::Command;

use rusqlite::Connection;
use serde_json::json;

use crate::harness::disk::SmallDisk;
use crate::harness::leash;
use crate::harness::program::Program;
use crate::harness::{Node, Relay, Setup, Vhost, Wire, eventually, eventually_equal};

fn scan(number: usize, filler: usize) -> String {
    json!({"eventType": "scan.a", "payload": {"scanId": number.to_string(), "filler": "x".repeat(filler)}}).to_string()
}

/// A process that reads the spool and stays, as a forgotten `sqlite3` does. Ends when it is dropped.
fn reader(path: &Path) -> Connection {
    let reader = Connection::open(path).unwrap();
    reader.execute_batch("BEGIN; SELECT count(*) FROM event").unwrap();
    reader
}

/// Sends until the relay refuses. Returns how many it accepted, and the code of the refusal.
async fn fill(relay: &Relay, from: usize, filler: usize) -> (usize, String) {
    for number in from..from + 20_000 {
        let answer = relay.post(scan(number, filler)).await;
        match answer.status {
            200 => {}
            503 => return (number - from, answer.json()["code"].as_str().unwrap().to_owned()),
            _ => panic!("{answer}"),
        }
    }
    panic!("20,000 events were accepted");
}

async fn log_bytes(relay: &Relay) -> f64 {
    relay.metric("prism_relay_spool_log_bytes", &[]).await
}

#[tokio::test]
async fn a_reader_that_stayed_until_the_disk_was_full_and_went_stops_nothing() {
    let vhost = Vhost::new(Node::shared().await).await;
    let setup = Setup::new(&vhost.url());
    let disk = SmallDisk::mount(setup.folder(), "40m");
    let mut relay = setup.set("spool.path", disk.spool()).start().await;
    let path = disk.path().join("spool.db");
    let reading = reader(&path);
    let (accepted, code) = fill(&relay, 0, 3000).await;
    assert_eq!(code, "spool-unavailable", "after {accepted}");
    assert!(log_bytes(&relay).await > 20e6, "the reader holds the log");
    assert_eq!(relay.ops_get("/readyz").await.status, 503);
    drop(reading);
    relay.eventually_accepts(scan(1_000_000, 3000)).await;
    eventually_equal("/readyz", 200, async || relay.ops_get("/readyz").await.status).await;
    relay.eventually_nothing_pending().await;

    // Killed on the full disk, and started while the reader is still there and after it has gone.
    let reading = reader(&path);
    fill(&relay, 2_000_000, 3000).await;
    relay.kill9().await;
    relay.start_again().await;
    relay.post(scan(3_000_000, 3000)).await.expect(503);
    relay.kill9().await;
    drop(reading);
    relay.start_again().await;
    relay.eventually_accepts(scan(3_000_001, 3000)).await;
    assert!(log_bytes(&relay).await < 17e6);
    assert_eq!(relay.run(&["spool", "verify"]).await.code, Some(0));
}

/// Large events take as much room in the file as in the log, so the log may not take all the room of the disk.
#[tokio::test]
async fn a_reader_that_stayed_leaves_room_to_copy_the_log() {
    let setup = Setup::without_broker();
    let disk = SmallDisk::mount(setup.folder(), "60m");
    let relay = setup.set("spool.path", disk.spool()).start().await;
    let reading = reader(&disk.path().join("spool.db"));
    let (accepted, code) = fill(&relay, 0, 200_000).await;
    assert!(accepted > 50 && code == "spool-unavailable", "{accepted}, {code}");
    relay.post(scan(500_000, 10)).await.expect(503);
    drop(reading);
    relay.eventually_accepts(scan(1_000_000, 200_000)).await;
    assert_eq!(relay.spool().await.pending as usize, accepted + 1);
    assert_eq!(relay.run(&["spool", "verify"]).await.code, Some(0));
}

#[tokio::test]
async fn a_log_that_a_reader_holds_counts_against_the_limit_and_shrinks_when_it_has_gone() {
    let vhost = Vhost::new(Node::shared().await).await;
    let relay = Setup::new(&vhost.url()).set("spool.max_bytes", "8MiB").start().await;
    let reading = reader(&relay.setup().spool());
    let (_, code) = fill(&relay, 0, 3000).await;
    assert_eq!(code, "spool-full");
    let grown = log_bytes(&relay).await;
    assert!((16e6..27e6).contains(&grown), "{grown}");
    let report = relay.status().await;
    let reason = report["spool"]["reason"].as_str().unwrap();
    assert!(reason.contains("another process reads the spool file") && reason.contains("max_bytes"), "{reason}");
    assert_eq!(report["ready"], false);
    assert!(report["headline"].to_string().contains("nother process reads the spool file"), "{report}");
    relay.eventually_logs("the write-ahead log of the spool fills spool.max_bytes").await;
    drop(reading);
    relay.eventually_accepts(scan(1_000_000, 3000)).await;
    eventually("a small log", async || {
        let bytes = log_bytes(&relay).await;
        if bytes < 6e6 { Ok(()) } else { Err(bytes) }
    })
    .await;
    assert_eq!(relay.status().await["spool"]["reason"], json!(null));
}

#[tokio::test]
async fn a_disk_without_room_for_the_reserve_is_not_ready_from_the_first_instant() {
    let setup = Setup::without_broker();
    let disk = SmallDisk::mount(setup.folder(), "6m");
    let relay = setup.set("spool.path", disk.spool()).start().await;
    let ready = relay.ops_get("/readyz").await.expect(503).json();
    assert!(ready["detail"].as_str().unwrap().contains("disk is full"), "{ready}");
    assert_eq!(relay.post(scan(0, 10)).await.expect(503).json()["code"], "spool-unavailable");
    assert_eq!(relay.status().await["spool"]["condition"], "full");
    let checked = relay.run(&["check", "--offline"]).await;
    assert!(checked.code == Some(1) && checked.stdout.contains("the relay answers webhooks 503"), "{checked:?}");
    disk.remount("size=40m");
    relay.eventually_accepts(scan(1, 10)).await;
    relay.ops_get("/readyz").await.expect(200);
}

#[tokio::test]
async fn large_bodies_on_a_full_disk_are_delivered_and_noted() {
    let vhost = Vhost::new(Node::shared().await).await;
    let mut wire = Wire::new(vhost.address());
    wire.refuse().await;
    let setup = Setup::new(&vhost.url_through(&wire)).set("http.body_bytes_max", "16MiB");
    let disk = SmallDisk::mount(setup.folder(), "100m");
    let relay = setup.set("spool.path", disk.spool()).start().await;
    let (accepted, code) = fill(&relay, 0, 12_000_000).await;
    assert!(accepted >= 2 && code == "spool-unavailable", "{accepted}, {code}");
    wire.accept();
    vhost.messages("prism.scan", accepted).await;
    relay.eventually_nothing_pending().await;
    relay.eventually_accepts(scan(1_000_000, 12_000_000)).await;
    vhost.messages("prism.scan", 1).await;
    vhost.assert_empty("prism.scan").await;
}

fn limit_file_size(relay: &Relay, bytes: &str) {
    let pid = relay.pid().to_string();
    let status = Command::new("prlimit").args(["--pid", &pid, &format!("--fsize={bytes}:")]).status();
    assert!(status.unwrap().success());
}

#[tokio::test]
async fn a_file_size_limit_is_a_disk_without_room() {
    let vhost = Vhost::new(Node::shared().await).await;
    let mut wire = Wire::new(vhost.address());
    wire.refuse().await;
    let mut relay = Relay::start_through(&vhost, &wire).await;
    limit_file_size(&relay, "12582912");
    let (accepted, code) = fill(&relay, 0, 100_000).await;
    assert_eq!(code, "spool-unavailable", "after {accepted}");
    assert_eq!(relay.status().await["spool"]["condition"], "full", "{}", relay.log_text());
    wire.accept();
    relay.eventually_nothing_pending().await;
    relay.eventually_accepts(scan(1_000_000, 100_000)).await;

    // Started below the size of the reserve: it runs, and is not ready.
    relay.kill9().await;
    let reserve = relay.folder().join("spool.db.reserve");
    if reserve.exists() {
        std::fs::remove_file(reserve).unwrap();
    }
    let inner = relay.setup().command(&["serve"]);
    let mut command = leash::command("/bin/bash");
    // Without the gate of the inner command, which is the shell, its script and its name.
    let relay_and_arguments = inner.get_args().skip(3);
    command
        .args(["-c", "ulimit -f 4096; exec \"$@\"", "limited"])
        .args(relay_and_arguments)
        .current_dir(relay.folder());
    for (name, value) in inner.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    let mut limited = Program::start(command);
    eventually("the refusal in the log", async || {
        let lines = limited.stderr();
        if lines.iter().any(|line| line.contains("the spool cannot be written")) {
            Ok(())
        } else {
            Err(lines.join("\n"))
        }
    })
    .await;
    limited.signal("TERM");
    assert_eq!(limited.wait().await.code, Some(0));
    relay.start_again().await;
    relay.eventually_accepts(scan(1_000_001, 10)).await;
}
