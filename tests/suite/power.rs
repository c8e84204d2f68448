//! Promise 1 under power loss, and with a disk that refuses to write or sync.
//!
//! The real relay runs with a library between it and the disk (`faults/disk.c`), which keeps a journal of every write,
//! truncation and sync of the spool's files. For many instants the test builds files that a power loss at that instant
//! could have left: everything up to each file's last sync, and some of the sectors written after it. SQLite opens
//! them, and every event that was answered 200 before that instant has to be there.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use serde_json::json;

use crate::harness::{Node, Relay, Setup, Vhost, Wire, eventually, eventually_equal};

/// The unit that a disk writes completely or not at all.
const SECTOR: usize = 512;

fn scan(number: usize) -> String {
    json!({"eventType": "scan.a", "payload": {"scanId": number.to_string(), "filler": "x".repeat(300)}}).to_string()
}

/// Compiles the library into the relay's folder, and loads it into the relay.
fn with_library(setup: Setup) -> Setup {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/suite/faults/disk.c");
    let library = setup.folder().join("disk.so");
    let compiler = std::env::var("CC").unwrap_or("cc".to_owned());
    let output = Command::new(&compiler)
        .args(["-shared", "-fPIC", "-O1", "-o"])
        .arg(&library)
        .arg(source)
        .args(["-ldl"])
        .output();
    let output = output.unwrap_or_else(|error| panic!("{compiler}: {error}"));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let (journal, faults) = (setup.folder().join("journal"), setup.folder().join("faults"));
    setup
        .env("LD_PRELOAD", library.to_str().unwrap())
        .env("PRISM_DISK_JOURNAL", journal.to_str().unwrap())
        .env("PRISM_DISK_FAULTS", faults.to_str().unwrap())
}

/// One call in the journal.
enum Call {
    Write { file: usize, offset: usize, bytes: Vec<u8> },
    Cut { file: usize, length: usize },
    Sync { file: usize },
}

/// The calls, each with the journal's length after it. Without the last one if the process was killed while recording
/// it.
fn read_journal(path: &Path) -> Vec<(u64, Call)> {
    let journal = fs::read(path).unwrap();
    let mut calls = Vec::new();
    let mut at = 0;
    while at + 24 <= journal.len() {
        let small = |at: usize| u32::from_ne_bytes(journal[at..at + 4].try_into().unwrap()) as usize;
        let large = |at: usize| u64::from_ne_bytes(journal[at..at + 8].try_into().unwrap()) as usize;
        let (kind, file, offset, length) = (small(at), small(at + 4) - 1, large(at + 8), large(at + 16));
        at += 24;
        let Some(bytes) = journal.get(at..at + length) else { break };
        let call = match kind {
            1 => Call::Write { file, offset, bytes: bytes.to_vec() },
            2 => Call::Cut { file, length: offset },
            3 => Call::Sync { file },
            kind => panic!("unknown record {kind}"),
        };
        at += length;
        calls.push((at as u64, call));
    }
    calls
}

fn write(file: &mut Vec<u8>, offset: usize, bytes: &[u8]) {
    if file.len() < offset + bytes.len() {
        file.resize(offset + bytes.len(), 0);
    }
    file[offset..offset + bytes.len()].copy_from_slice(bytes);
}

/// The database and its log as a power loss after these calls could have left them.
fn survivors(calls: &[(u64, Call)], random: &mut fastrand::Rng) -> [Vec<u8>; 2] {
    let last_sync = |wanted: usize| {
        calls.iter().rposition(|(_, call)| matches!(call, Call::Sync { file } if *file == wanted)).unwrap_or(0)
    };
    let synced = [last_sync(0), last_sync(1)];
    let mut files = [Vec::new(), Vec::new()];
    // A disk may write later sectors first, so each survives by chance; some disks write none of them, some all.
    let chance = [0.0, 0.1, 0.5, 0.9, 1.0][random.usize(0..5)];
    for (index, (_, call)) in calls.iter().enumerate() {
        match call {
            Call::Write { file, offset, bytes } => {
                for (sector, piece) in bytes.chunks(SECTOR).enumerate() {
                    if index < synced[*file] || random.f64() < chance {
                        write(&mut files[*file], offset + sector * SECTOR, piece);
                    }
                }
            }
            Call::Cut { file, length } if index < synced[*file] || random.f64() < chance => {
                files[*file].resize(*length, 0);
            }
            Call::Cut { .. } | Call::Sync { .. } => {}
        }
    }
    files
}

/// The ids in a spool that consists of these files.
fn reopen(folder: &Path, [database, log]: [Vec<u8>; 2]) -> HashSet<Vec<u8>> {
    let path = folder.join("after/spool.db");
    let _ = fs::remove_dir_all(path.parent().unwrap());
    fs::create_dir(path.parent().unwrap()).unwrap();
    fs::write(&path, database).unwrap();
    fs::write(folder.join("after/spool.db-wal"), log).unwrap();
    let connection = rusqlite::Connection::open(&path).unwrap();
    let verdict: String = connection.query_row("PRAGMA integrity_check", [], |row| row.get(0)).unwrap();
    assert_eq!(verdict, "ok");
    // Before the first commit there is no table, and no 200 either.
    let Ok(mut statement) = connection.prepare("SELECT entries FROM seen") else { return HashSet::new() };
    let rows = statement.query_map([], |row| row.get(0)).unwrap();
    let entries: Vec<u8> = rows.collect::<Result<Vec<Vec<u8>>, _>>().unwrap().concat();
    // Delivered events are deleted, but the dedupe window still has their ids: 56 bytes an entry, the id from the 24th
    // on.
    entries.chunks_exact(56).map(|entry| entry[24..40].to_vec()).collect()
}

fn journal(relay: &Relay) -> PathBuf {
    relay.folder().join("journal")
}

#[tokio::test]
async fn events_answered_200_survive_a_power_loss_at_any_instant() {
    const SENDERS: usize = 8;
    const EVENTS: usize = 150;
    const INSTANTS: usize = 150;
    let vhost = Vhost::new(Node::shared().await).await;
    // With a live broker, so that deletions, which need not be synced, lie between the acceptances.
    let mut relay = with_library(Setup::new(&vhost.url())).start().await;
    let senders: Vec<_> = (0..SENDERS)
        .map(|sender| {
            let (client, journal) = (relay.sender(), journal(&relay));
            tokio::spawn(async move {
                let mut acknowledged = Vec::new();
                for number in 0..EVENTS {
                    let id = client.post(scan(sender * EVENTS + number)).await.unwrap().id();
                    // Everything in the journal now was written before the 200 was sent.
                    acknowledged.push((fs::metadata(&journal).unwrap().len(), id));
                }
                acknowledged
            })
        })
        .collect();
    let mut acknowledged = Vec::new();
    for sender in senders {
        acknowledged.extend(sender.await.unwrap());
    }
    relay.kill9().await;

    let calls = read_journal(&journal(&relay));
    let is_sync = |index: &usize| matches!(calls[*index].1, Call::Sync { file: 1 });
    let syncs: Vec<usize> = (0..calls.len()).filter(is_sync).collect();
    assert!(syncs.len() > 20 && calls.len() > 1000, "{} syncs among {} calls", syncs.len(), calls.len());
    let started = syncs[0];
    let seed = std::env::var("PRISM_POWER_SEED").map_or(7, |seed| seed.parse().unwrap());
    let mut random = fastrand::Rng::with_seed(seed);
    let mut expected = 0;
    for round in 0..INSTANTS {
        let instant = match round % 3 {
            // Just before a commit is synced, when nothing of it may have been answered.
            0 => syncs[random.usize(1..syncs.len())],
            // Between the sync and the answers.
            1 => syncs[random.usize(1..syncs.len())] + 1,
            _ => random.usize(started + 1..=calls.len()),
        };
        let length = calls[instant - 1].0;
        let found = reopen(relay.folder(), survivors(&calls[..instant], &mut random));
        for (at, id) in acknowledged.iter().filter(|(at, _)| *at <= length) {
            let bytes = uuid::Uuid::parse_str(id).unwrap().into_bytes().to_vec();
            assert!(
                found.contains(&bytes),
                "seed {seed}: {id}, answered at {at}, was lost by a power loss at {length}"
            );
            expected += 1;
        }
    }
    assert!(expected > INSTANTS * EVENTS, "{expected}: the instants are spread over the whole run");
}

#[tokio::test]
async fn a_disk_that_fails_or_turns_read_only_takes_no_200_back() {
    for fault in ["fsync", "write", "read-only"] {
        let mut relay = with_library(Setup::without_broker()).start().await;
        let faults = relay.folder().join("faults");
        let before = relay.post(scan(0)).await.id();
        fs::write(&faults, fault).unwrap();
        let mut refused = Vec::new();
        for number in 1..6 {
            let answer = relay.post(scan(number)).await.expect(503);
            assert_eq!(answer.json()["code"], "spool-unavailable");
            refused.push(scan(number));
        }
        relay.eventually_logs("the spool cannot be written").await;
        // Killed while the disk fails: refused events must not come back.
        relay.kill9().await;
        fs::remove_file(&faults).unwrap();
        relay.start_again().await;
        let list = relay.run(&["spool", "list"]).await.stdout;
        assert!(list.contains(&before[28..]), "{list}");
        let again = relay.post(scan(1)).await.expect(200).json();
        assert_eq!(again["duplicate"], json!(null), "{fault}: the refused event was not kept");
        assert_eq!(relay.spool().await.accepted, 2);
        // The relay also accepts again without a restart once the disk works.
        fs::write(&faults, fault).unwrap();
        relay.post(scan(7)).await.expect(503);
        fs::remove_file(&faults).unwrap();
        relay.eventually_accepts(scan(8)).await;
        assert_eq!(relay.run(&["spool", "verify"]).await.code, Some(0));
    }
}

/// A sync that neither succeeds nor fails holds up nothing for long, and is reported.
#[tokio::test]
async fn a_stalled_disk_is_reported_and_not_waited_for() {
    let mut relay = with_library(Setup::without_broker().set("shutdown.grace", "2s")).start().await;
    let faults = relay.folder().join("faults");
    relay.post(scan(0)).await.expect(200);
    fs::write(&faults, "hang").unwrap();
    assert_eq!(relay.post(scan(1)).await.expect(503).json()["code"], "spool-unavailable");
    assert_eq!(relay.ops_get("/readyz").await.status, 503);
    assert!(!relay.spool().await.writable);
    relay.eventually_logs("disk does not answer; answering webhooks 503").await;
    // Further webhooks are refused at once: waiting ones would take memory.
    for number in 2..200 {
        relay.post(scan(number)).await.expect(503);
    }
    fs::remove_file(&faults).unwrap();
    eventually_equal("/readyz", 200, async || relay.ops_get("/readyz").await.status).await;
    relay.eventually_logs("disk answers again").await;
    // The event whose sync hung was written in the end, and is recognised.
    assert_eq!(relay.post(scan(1)).await.expect(200).json()["duplicate"], true);
    assert_eq!(relay.spool().await.accepted, 2);

    fs::write(&faults, "hang").unwrap();
    relay.post(scan(2)).await.expect(503);
    relay.sigterm();
    let ended = relay.wait().await;
    assert!(ended.code == Some(0) && ended.stderr.contains("timed out closing the spool"), "{ended:?}");

    // A start does not delay a signal either.
    fs::write(relay.setup().spool().with_extension("db.recover"), "").unwrap();
    let mut starting = relay.setup().launch(&["serve"]);
    eventually("the log line about the recovery", async || {
        let lines = starting.stderr();
        if lines.iter().any(|line| line.contains("copying all readable events")) {
            Ok(())
        } else {
            Err(lines.join("\n"))
        }
    })
    .await;
    starting.signal("TERM");
    assert_eq!(starting.wait().await.code, Some(0));
}

/// A relay that has accepted 20 events and does not reach the broker, whose wire refuses.
async fn with_a_backlog(vhost: &Vhost) -> (Relay, Wire) {
    let mut wire = Wire::new(vhost.address());
    wire.refuse().await;
    let relay = with_library(Setup::new(&vhost.url_through(&wire))).start().await;
    for number in 0..20 {
        relay.post(scan(number)).await.expect(200);
    }
    (relay, wire)
}

/// SQLite reports an exhausted quota as a disk error.
#[tokio::test]
async fn deliveries_go_on_when_a_quota_is_exhausted() {
    let vhost = Vhost::new(Node::shared().await).await;
    let (relay, mut wire) = with_a_backlog(&vhost).await;
    fs::write(relay.folder().join("faults"), "quota").unwrap();
    relay.post(scan(20)).await.expect(503);
    relay.eventually_logs("the reserve of the spool was freed").await;
    wire.accept();
    relay.eventually_nothing_pending().await;
    vhost.messages("prism.scan", 20).await;
    vhost.assert_empty("prism.scan").await;
}

/// SQLite reports a disk error as damage. Events that cannot be read at the moment are not given up.
#[tokio::test]
async fn a_disk_that_is_away_does_not_count_as_a_damaged_spool() {
    let mut relay = with_library(Setup::without_broker()).start().await;
    for number in 0..50 {
        relay.post(scan(number)).await.expect(200);
    }
    relay.kill9().await;
    let (faults, spool) = (relay.folder().join("faults"), relay.setup().spool());
    let connection = rusqlite::Connection::open(&spool).unwrap();
    connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())).unwrap();
    drop(connection);
    fs::write(spool.with_extension("db.recover"), "").unwrap();
    fs::write(&faults, "read").unwrap();
    for _ in 0..2 {
        let ended = relay.run(&["serve"]).await;
        assert!(ended.code == Some(1) && ended.stderr.contains("os error 5"), "{ended:?}");
    }
    fs::remove_file(&faults).unwrap();
    relay.start_again().await;
    assert_eq!(relay.spool().await.pending, 50);
}

#[tokio::test]
async fn deliveries_are_not_repeated_on_a_failing_disk() {
    let vhost = Vhost::new(Node::shared().await).await;
    let (relay, mut wire) = with_a_backlog(&vhost).await;
    fs::write(relay.folder().join("faults"), "write").unwrap();
    wire.accept();
    vhost.messages("prism.scan", 20).await;
    fs::remove_file(relay.folder().join("faults")).unwrap();
    relay.eventually_nothing_pending().await;
    vhost.assert_empty("prism.scan").await;
}

/// What the broker has is remembered, not only on disk.
#[tokio::test]
async fn a_reconnect_repeats_no_delivery_on_a_failing_disk() {
    let vhost = Vhost::new(Node::shared().await).await;
    let (relay, mut wire) = with_a_backlog(&vhost).await;
    fs::write(relay.folder().join("faults"), "write").unwrap();
    wire.accept();
    vhost.messages("prism.scan", 20).await;
    for reconnects in 1..=3 {
        wire.cut();
        relay.eventually_metric("prism_relay_broker_reconnects_total", &[], f64::from(reconnects)).await;
    }
    vhost.assert_empty("prism.scan").await;
    fs::remove_file(relay.folder().join("faults")).unwrap();
    relay.eventually_nothing_pending().await;
    vhost.assert_empty("prism.scan").await;
    assert_eq!(relay.spool().await.confirmed, 20);
}

/// SQLite itself would swallow this error, and go on as if the file had everything.
#[tokio::test]
async fn a_failed_copy_of_the_log_is_a_failed_commit() {
    let relay = with_library(Setup::without_broker()).start().await;
    let faults = relay.folder().join("faults");
    fs::write(&faults, "checkpoint").unwrap();
    let mut refused = None;
    // Each takes several pages of the log, which is copied every 4 MiB.
    for number in 0..1000 {
        let answer = relay.post(scan(number)).await;
        if answer.status == 503 {
            refused = Some((number, answer.json()));
            break;
        }
    }
    let (accepted, refusal) = refused.expect("the error is seen");
    assert_eq!(refusal["code"], "spool-unavailable", "after {accepted}");
    relay.ops_get("/readyz").await.expect(503);
    assert_eq!(relay.status().await["spool"]["condition"], "failing");
    fs::remove_file(&faults).unwrap();
    relay.eventually_accepts(scan(1_000_000)).await;
    assert_eq!(relay.spool().await.pending as usize, accepted + 1);
}

/// A retry that cannot be recorded is not repeated again and again.
#[tokio::test]
async fn parked_events_are_not_repeated_on_a_failing_disk() {
    let vhost = Vhost::new(Node::shared().await).await;
    vhost.create_exchange("prism.webhooks", "topic", json!({})).await;
    let setup = Setup::new(&vhost.url()).set("topology.declare", "off").set("broker.parked_retry", "100ms");
    let relay = with_library(setup).start().await;
    for number in 0..5 {
        relay.post(scan(number)).await.expect(200);
    }
    relay.eventually_parked(5).await;
    let faults = relay.folder().join("faults");
    fs::write(&faults, "write").unwrap();
    relay.post(scan(5)).await.expect(503);
    vhost.create_queue("rest", json!({})).await;
    vhost.bind("prism.webhooks", "rest", "#").await;
    let begun = Instant::now();
    eventually("2 s, enough for many retries", async || {
        let elapsed = begun.elapsed();
        if elapsed.as_secs() >= 2 { Ok(()) } else { Err(format!("{elapsed:?}")) }
    })
    .await;
    fs::remove_file(&faults).unwrap();
    relay.eventually_parked(0).await;
    vhost.messages("rest", 5).await;
    vhost.assert_empty("rest").await;
}

#[tokio::test]
async fn each_200_has_its_sync_unless_the_configuration_says_otherwise() {
    for (durability, expected) in [("disk", 50..usize::MAX), ("process", 0..20)] {
        let relay = with_library(Setup::without_broker().set("spool.durability", durability)).start().await;
        for number in 0..50 {
            relay.post(scan(number)).await.expect(200);
        }
        let calls = read_journal(&journal(&relay));
        let syncs = calls.iter().filter(|(_, call)| matches!(call, Call::Sync { file: 1 })).count();
        assert!(expected.contains(&syncs), "{durability}: {syncs} syncs of the log for 50 answers");
    }
}
