//! Disk faults: full, read-only, deleted, failing, damaged. Every event answered 200 is kept, or the relay reports its
//! loss.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::harness::disk::SmallDisk;
use crate::harness::{Node, Relay, Setup, Vhost, Wire, eventually};

fn scan(number: usize) -> String {
    json!({"eventType": "scan.a", "payload": {"scanId": number.to_string(), "filler": "x".repeat(1000)}}).to_string()
}

/// Sends until the relay refuses. Returns the accepted ids, and the refusal.
async fn fill(relay: &Relay, from: usize) -> (Vec<String>, Value) {
    let mut ids = Vec::new();
    for number in from..from + 100_000 {
        let answer = relay.post(scan(number)).await;
        match answer.status {
            200 => ids.push(answer.id()),
            503 => return (ids, answer.json()),
            _ => panic!("{answer}"),
        }
    }
    panic!("100,000 events did not fill the disk");
}

#[tokio::test]
async fn a_full_disk_refuses_events_keeps_the_others_and_empties_by_itself() {
    let vhost = Vhost::new(Node::shared().await).await;
    let mut wire = Wire::new(vhost.address());
    wire.refuse().await;
    let setup = Setup::new(&vhost.url_through(&wire));
    let disk = SmallDisk::mount(setup.folder(), "20m");
    let relay = setup.set("spool.path", disk.spool()).start().await;
    let (ids, refusal) = fill(&relay, 0).await;
    assert_eq!(refusal["code"], "spool-unavailable");
    assert!(ids.len() > 500, "{}", ids.len());
    relay.eventually_logs("the spool cannot be written").await;
    // Deliveries go on although there is no room for another event, and make room.
    wire.accept();
    let delivered = vhost.messages("prism.scan", ids.len()).await;
    assert_eq!(delivered.iter().map(|delivery| delivery.id()).collect::<Vec<_>>(), ids, "each event once, in order");
    relay.eventually_nothing_pending().await;
    relay.eventually_accepts(scan(1_000_000)).await;
    assert_eq!(relay.run(&["spool", "verify"]).await.code, Some(0));
}

#[tokio::test]
async fn a_disk_smaller_than_the_limit_refuses_nothing_once_a_backlog_is_delivered() {
    let vhost = Vhost::new(Node::shared().await).await;
    let mut wire = Wire::new(vhost.address());
    wire.refuse().await;
    let setup = Setup::new(&vhost.url_through(&wire));
    let disk = SmallDisk::mount(setup.folder(), "24m");
    let relay = setup.set("spool.path", disk.spool()).start().await;
    fill(&relay, 0).await;
    wire.accept();
    relay.eventually_nothing_pending().await;
    relay.eventually_accepts(scan(1_000_000)).await;
    // The file consists of free pages now, and the write-ahead log has the rest of the disk.
    for number in 2_000_000..2_002_000 {
        let answer = relay.post(scan(number)).await;
        assert_eq!(answer.status, 200, "event {number}: {answer}\n{}", relay.log_text());
    }
    assert_eq!(relay.run(&["spool", "verify"]).await.code, Some(0));
}

#[tokio::test]
async fn a_relay_that_was_stopped_starts_on_a_full_disk() {
    let vhost = Vhost::new(Node::shared().await).await;
    let mut wire = Wire::new(vhost.address());
    wire.refuse().await;
    let setup = Setup::new(&vhost.url_through(&wire));
    let disk = SmallDisk::mount(setup.folder(), "30m");
    let mut relay = setup.set("spool.path", disk.spool()).start().await;
    let id = relay.post(scan(0)).await.id();
    relay.sigterm();
    assert_eq!(relay.wait().await.code, Some(0));
    disk.fill(0);
    relay.start_again().await;
    // Delivering needs no new space.
    wire.accept();
    assert_eq!(vhost.messages("prism.scan", 1).await[0].id(), id);
    disk.free();
    relay.eventually_accepts(scan(1)).await;
}

#[tokio::test]
async fn no_room_and_a_read_only_disk_at_the_start_are_reported() {
    let setup = Setup::without_broker();
    let disk = SmallDisk::mount(setup.folder(), "30m");
    let mut relay = setup.set("spool.path", disk.spool()).start().await;
    let id = relay.post(scan(0)).await.id();
    // No page can be added.
    disk.fill(0);
    let (_, refusal) = fill(&relay, 1).await;
    assert_eq!(refusal["code"], "spool-unavailable");
    disk.free();
    relay.eventually_accepts(scan(1_000_000)).await;
    // At the start, a read-only disk is a clear error.
    relay.sigterm();
    assert_eq!(relay.wait().await.code, Some(0));
    disk.remount("ro");
    let ended = relay.run(&["serve"]).await;
    assert!(ended.code == Some(1) && ended.stderr.contains("cannot create or open"), "{ended:?}");
    disk.remount("rw");
    relay.start_again().await;
    assert_eq!(relay.post(scan(0)).await.expect(200).json()["id"], json!(id), "recognised as a re-send");
}

#[tokio::test]
async fn when_the_folder_is_deleted_nothing_is_accepted_and_pending_events_are_delivered() {
    let vhost = Vhost::new(Node::shared().await).await;
    let mut wire = Wire::new(vhost.address());
    wire.refuse().await;
    let setup = Setup::new(&vhost.url_through(&wire));
    let folder = setup.folder().join("data");
    let path = folder.join("spool.db");
    let mut relay = setup.set("spool.path", path.to_str().unwrap()).start().await;
    let id = relay.post(scan(0)).await.id();
    fs::remove_dir_all(&folder).unwrap();
    // The relay still has the files open, but events written to them are gone with the process.
    assert_eq!(relay.post(scan(1)).await.expect(503).json()["code"], "spool-unavailable");
    relay.eventually_logs("spool files were deleted or unmounted").await;
    wire.accept();
    assert_eq!(vhost.messages("prism.scan", 1).await[0].id(), id);
    let ended = relay.wait().await;
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);
    relay.start_again().await;
    relay.post(scan(1)).await.expect(200);
    vhost.messages("prism.scan", 1).await;
}

/// Accepts some events, kills the relay, damages its files, and starts it again.
async fn after(events: usize, damage: impl Fn(&Path)) -> (Relay, Vec<String>, Vhost, Wire) {
    let vhost = Vhost::new(Node::shared().await).await;
    let mut wire = Wire::new(vhost.address());
    wire.refuse().await;
    let mut relay = Relay::start_through(&vhost, &wire).await;
    let mut ids = Vec::new();
    for number in 0..events {
        ids.push(relay.post(scan(number)).await.id());
    }
    relay.kill9().await;
    damage(&relay.setup().spool());
    relay.start_again().await;
    (relay, ids, vhost, wire)
}

fn sibling(path: &Path, suffix: &str) -> PathBuf {
    PathBuf::from(format!("{}{suffix}", path.display()))
}

/// Copies the log into the database, so that the damage hits the database.
fn checkpoint(path: &Path) {
    let connection = rusqlite::Connection::open(path).unwrap();
    connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())).unwrap();
}

fn overwrite(path: &Path, from: u64, length: usize) {
    fs::OpenOptions::new().write(true).open(path).unwrap().write_all_at(&vec![0xa5; length], from).unwrap();
}

/// Readable events are delivered, the others are counted, the damaged file is kept, and the log says so.
async fn assert_recovered(relay: &Relay, ids: &[String], vhost: &Vhost, wire: &mut Wire) -> usize {
    let line = relay.eventually_logs("the spool was recovered").await;
    let saved = line["saved"].as_u64().unwrap() as usize;
    let unreadable = line["unreadable"].as_u64().unwrap() as usize;
    assert_eq!(saved + unreadable, ids.len(), "{line}");
    relay.eventually_metric("prism_relay_spool_lost_events", &[], unreadable as f64).await;
    assert!(Path::new(line["aside"].as_str().unwrap()).exists(), "{line}");
    wire.accept();
    if saved > 0 {
        for delivery in vhost.messages("prism.scan", saved).await {
            assert!(ids.contains(&delivery.id()));
        }
    }
    relay.eventually_nothing_pending().await;
    let verify = relay.run(&["spool", "verify"]).await;
    assert_eq!(verify.code, Some(0), "{}", verify.stdout);
    relay.post(scan(1_000_000)).await.expect(200);
    vhost.messages("prism.scan", 1).await;
    saved
}

#[tokio::test]
async fn a_truncated_file_gives_back_what_is_left_of_it() {
    let (relay, ids, vhost, mut wire) = after(200, |path| {
        checkpoint(path);
        let file = fs::OpenOptions::new().write(true).open(path).unwrap();
        // Half a page would be half an event, which is saved and parked.
        file.set_len(file.metadata().unwrap().len() / 2 / 4096 * 4096).unwrap();
    })
    .await;
    assert_recovered(&relay, &ids, &vhost, &mut wire).await;
}

#[tokio::test]
async fn a_file_with_a_destroyed_head_is_set_aside() {
    let (relay, ids, vhost, mut wire) = after(20, |path| {
        checkpoint(path);
        overwrite(path, 0, 100);
    })
    .await;
    let line = relay.eventually_logs("the spool was recovered").await;
    assert_eq!(line["saved"], 0, "{line}");
    let aside = line["aside"].as_str().unwrap();
    assert!(fs::metadata(aside).unwrap().len() > 0);
    // The number of lost events is unknown; that some were lost is reported.
    relay.eventually_logs("it may have held more events").await;
    relay.eventually_metric("prism_relay_spool_lost_events", &[], 1.0).await;
    wire.accept();
    relay.post(scan(1_000_000)).await.expect(200);
    assert!(!ids.contains(&vhost.messages("prism.scan", 1).await[0].id()));
}

#[tokio::test]
async fn damage_in_the_middle_is_found_by_the_publisher_and_recovered_at_the_next_start() {
    let (mut relay, ids, vhost, mut wire) = after(400, |path| {
        // Only pages of events are left, which are not read at the start.
        rusqlite::Connection::open(path).unwrap().execute_batch("DELETE FROM seen; VACUUM").unwrap();
        checkpoint(path);
        let length = fs::metadata(path).unwrap().len();
        overwrite(path, length / 2, 20_000);
    })
    .await;
    // The publisher finds the damage and marks the file, and the process exits for a service manager to restart it.
    wire.accept();
    let ended = relay.wait().await;
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);
    assert!(ended.stderr.contains("the next start recovers it"), "{}", ended.stderr);
    wire.refuse().await;
    relay.start_again().await;
    let line = relay.eventually_logs("the spool was recovered").await;
    assert!(line["saved"].as_u64().unwrap() > 0, "{line}");
    wire.accept();
    relay.eventually_nothing_pending().await;
    let depth = vhost.depth("prism.scan").await as usize;
    let delivered: std::collections::HashSet<_> =
        vhost.messages("prism.scan", depth).await.iter().map(|delivery| delivery.id()).collect();
    let unreadable = line["unreadable"].as_u64().unwrap() as usize;
    let missing = ids.iter().filter(|id| !delivered.contains(*id)).count();
    // Events with a damaged body are parked.
    let parked = relay.metric("prism_relay_spool_parked_events", &[]).await as usize;
    assert_eq!(missing, unreadable + parked, "{unreadable} unreadable, {parked} parked");
    assert!(missing < 100, "{missing}");
    let wrong = relay.run(&["spool", "verify"]).await.stdout.matches("WRONG").count();
    assert_eq!(wrong, parked);
}

/// Inserts events directly, because sending as many would take too long.
fn insert_events(path: &Path, count: u64) {
    let connection = rusqlite::Connection::open(path).unwrap();
    connection
        .execute_batch(&format!(
            "BEGIN;
             WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {count})
             INSERT INTO event (seq, id, accepted_ms, authentic, fingerprint, body)
                 SELECT (SELECT accepted FROM ledger) + i, randomblob(16), 0, 1, randomblob(32), randomblob(300) FROM n;
             UPDATE ledger SET accepted = accepted + {count}, pending = pending + {count},
                               bytes = bytes + {count} * 556;
             COMMIT"
        ))
        .unwrap();
}

/// Whenever recovery is interrupted, the next start continues it.
#[tokio::test]
async fn a_relay_killed_during_recovery_loses_nothing() {
    const COUNT: u64 = 100_000;
    let mut relay = Setup::without_broker().start().await;
    relay.post(scan(0)).await.expect(200);
    relay.kill9().await;
    let path = relay.setup().spool();
    insert_events(&path, COUNT);
    fs::write(sibling(&path, ".recover"), "").unwrap();
    for _ in 0..3 {
        // The file of an earlier recovery would hide that this one has not begun.
        let _ = fs::remove_file(sibling(&path, ".recovering"));
        let mut starting = relay.setup().launch(&["serve"]);
        eventually("the recovery to begin", async || {
            let saved = fs::metadata(sibling(&path, ".recovering")).map_or(0, |file| file.len());
            // It may be over already.
            let is_over = starting.stderr().iter().any(|line| line.contains("the spool was recovered"));
            if saved > 1 << 20 || is_over { Ok(()) } else { Err(saved) }
        })
        .await;
        starting.signal("KILL");
        starting.wait().await;
    }
    relay.start_again().await;
    assert_eq!(relay.spool().await.pending, COUNT + 1);
    let mut names = fs::read_dir(path.parent().unwrap()).unwrap().map(|entry| entry.unwrap().file_name());
    assert!(names.any(|name| name.to_string_lossy().contains(".damaged-")), "the damaged file is kept");
}

/// The damaged file is not renamed before all its events are copied.
#[tokio::test]
async fn a_disk_without_room_for_recovery_loses_nothing() {
    let setup = Setup::without_broker();
    let disk = SmallDisk::mount(setup.folder(), "40m");
    let mut relay = setup.set("spool.path", disk.spool()).start().await;
    relay.post(scan(0)).await.expect(200);
    relay.kill9().await;
    let path = disk.path().join("spool.db");
    insert_events(&path, 50_000);
    fs::write(sibling(&path, ".recover"), "").unwrap();
    for _ in 0..2 {
        let ended = relay.run(&["serve"]).await;
        assert!(ended.code == Some(1) && ended.stderr.contains("disk is full"), "{ended:?}");
    }
    disk.remount("size=100m");
    relay.start_again().await;
    assert_eq!(relay.spool().await.pending, 50_001);
}

/// With the broker away, only the writer can find the damage.
#[tokio::test]
async fn damage_that_only_a_webhook_finds_is_recovered_as_well() {
    let mut relay = Setup::without_broker().start().await;
    for number in 0..30 {
        relay.post(scan(number)).await.expect(200);
    }
    // The totals are behind the events, as after a lost write: an event has the next number already.
    let meddler = rusqlite::Connection::open(relay.setup().spool()).unwrap();
    meddler.execute_batch("UPDATE ledger SET accepted = 29, pending = 29").unwrap();
    drop(meddler);
    // 503, or no answer if the relay exits first: Prism retries in both cases.
    let refused = relay.try_post(scan(1_000_000)).await;
    assert!(!refused.is_ok_and(|answer| answer.status == 200));
    let ended = relay.wait().await;
    assert!(ended.code == Some(1) && ended.stderr.contains("the next start recovers it"), "{}", ended.stderr);
    relay.start_again().await;
    relay.post(scan(1_000_000)).await.expect(200);
    assert_eq!(relay.spool().await.pending, 31);
}

/// The next event would go to the last page.
#[tokio::test]
async fn a_damaged_end_is_found_at_the_start() {
    let (relay, ids, vhost, mut wire) = after(30, |path| {
        checkpoint(path);
        let connection = rusqlite::Connection::open(path).unwrap();
        connection.execute_batch("DELETE FROM seen").unwrap();
        drop(connection);
        checkpoint(path);
        overwrite(path, fs::metadata(path).unwrap().len() - 4096, 4096);
    })
    .await;
    assert!(assert_recovered(&relay, &ids, &vhost, &mut wire).await > 20);
}

#[tokio::test]
async fn a_body_with_a_flipped_bit_is_not_published() {
    let (relay, ids, vhost, mut wire) = after(3, |path| {
        let meddler = rusqlite::Connection::open(path).unwrap();
        let body = meddler.query_row("SELECT body FROM event WHERE seq = 2", [], |row| row.get::<_, Vec<u8>>(0));
        let mut body = body.unwrap();
        *body.last_mut().unwrap() ^= 1;
        meddler.execute("UPDATE event SET body = ?1 WHERE seq = 2", [body]).unwrap();
    })
    .await;
    wire.accept();
    let delivered: Vec<_> = vhost.messages("prism.scan", 2).await.iter().map(|delivery| delivery.id()).collect();
    assert_eq!(delivered, [ids[0].clone(), ids[2].clone()]);
    relay.eventually_parked(1).await;
    let list = relay.run(&["spool", "list", "--parked"]).await.stdout;
    assert!(list.contains(&ids[1][28..]) && list.contains("damaged"), "{list}");
}

#[tokio::test]
async fn a_lost_log_is_reported() {
    let (relay, ..) = after(5, |path| {
        fs::remove_file(sibling(path, "-wal")).unwrap();
        let _ = fs::remove_file(sibling(path, "-shm"));
    })
    .await;
    let line = relay.eventually_logs("the write-ahead log of the spool is gone").await;
    assert_eq!(line["last"], 0, "{line}");
    relay.eventually_metric("prism_relay_spool_lost_events", &[], 1.0).await;
    assert_eq!(relay.run(&["spool", "verify"]).await.code, Some(0));
    relay.post(scan(1_000_000)).await.expect(200);
}

/// After a stop the file has everything. What was accepted after the next start was only in the log.
#[tokio::test]
async fn a_lost_log_costs_what_came_after_the_start() {
    let mut relay = Setup::without_broker().start().await;
    for number in 0..5 {
        relay.post(scan(number)).await.expect(200);
    }
    relay.sigterm();
    relay.wait().await;
    relay.start_again().await;
    relay.post(scan(5)).await.expect(200);
    relay.kill9().await;
    fs::remove_file(sibling(&relay.setup().spool(), "-wal")).unwrap();
    relay.start_again().await;
    assert_eq!(relay.eventually_logs("the write-ahead log of the spool is gone").await["last"], 5);
    let spool = relay.spool().await;
    assert_eq!((spool.pending, spool.lost), (5, 1));
}

#[tokio::test]
async fn a_spool_that_is_gone_is_reported() {
    let (relay, ..) = after(5, |path| {
        for ending in ["", "-wal", "-shm"] {
            fs::remove_file(sibling(path, ending)).unwrap();
        }
    })
    .await;
    relay.eventually_logs("the spool is gone: events that were pending").await;
    relay.post(scan(1_000_000)).await.expect(200);
}

#[tokio::test]
async fn an_emptied_file_does_not_take_the_log_with_it() {
    let (relay, ..) = after(5, |path| {
        fs::OpenOptions::new().write(true).open(path).unwrap().set_len(0).unwrap();
    })
    .await;
    let line = relay.eventually_logs("the spool was recovered").await;
    let aside = line["aside"].as_str().unwrap();
    assert!(fs::metadata(format!("{aside}-wal")).unwrap().len() > 0, "the log is kept");
    relay.post(scan(1_000_000)).await.expect(200);
}

#[tokio::test]
async fn a_spool_of_another_format_is_left_alone() {
    let mut relay = Setup::without_broker().start().await;
    relay.post(scan(0)).await.expect(200);
    relay.sigterm();
    assert_eq!(relay.wait().await.code, Some(0));
    let other = rusqlite::Connection::open(relay.setup().spool()).unwrap();
    for (format, expected) in [(99, "newer prism-relay (format 99"), (3, "older prism-relay (format 3")] {
        other.execute_batch(&format!("PRAGMA user_version = {format}")).unwrap();
        let ended = relay.run(&["serve"]).await;
        assert!(ended.code == Some(1) && ended.stderr.contains(expected), "{ended:?}");
    }
    let rows: i64 = other.query_row("SELECT count(*) FROM event", [], |row| row.get(0)).unwrap();
    assert_eq!(rows, 1);
}

/// The files of an older relay that was killed with pending events.
#[tokio::test]
async fn a_spool_of_the_format_before_is_converted() {
    let mut relay = Setup::without_broker().start().await;
    relay.sigterm();
    relay.wait().await;
    put_format_4(&relay.setup().spool());
    let checked = relay.run(&["check", "--offline"]).await;
    assert!(checked.code == Some(0) && checked.stdout.contains("converts it when it starts"), "{}", checked.stdout);
    let listed = relay.run(&["spool", "list"]).await;
    assert!(listed.code == Some(1) && listed.stderr.contains("converts it when it starts"), "{}", listed.stderr);
    relay.start_again().await;
    relay.eventually_logs("converted the spool of an older prism-relay").await;
    relay.post(scan(0)).await.expect(200);
    assert_eq!(relay.spool().await.pending, 9);
    let listed = relay.run(&["spool", "list", "--json"]).await;
    assert_eq!(listed.stdout.matches(r#""source":"webhook""#).count(), 9, "{}", listed.stdout);
}

/// Puts the files of a relay of format 4, which was killed with eight pending events, in the place of the spool.
fn put_format_4(spool: &Path) {
    let older = Path::new("tests/samples/spool-format-4/spool.db");
    for suffix in ["", "-wal"] {
        fs::copy(sibling(older, suffix), sibling(spool, suffix)).unwrap();
    }
}

#[tokio::test]
async fn a_spool_of_the_format_before_is_converted_on_a_full_disk_with_the_reserve_and_kept_without() {
    let setup = Setup::without_broker();
    let disk = SmallDisk::mount(setup.folder(), "30m");
    let mut relay = setup.set("spool.path", disk.spool()).start().await;
    relay.sigterm();
    relay.wait().await;
    let spool = PathBuf::from(disk.spool());
    put_format_4(&spool);
    fs::remove_file(sibling(&spool, ".reserve")).unwrap();
    disk.fill(0);
    for _ in 0..2 {
        let ended = relay.run(&["serve"]).await;
        assert_eq!(ended.code, Some(1), "{ended:?}");
        let says = "cannot be opened, because its disk is full; its events are kept: free space there and start again";
        assert!(ended.stderr.contains(says), "{ended:?}");
    }
    disk.free();
    relay.start_again().await;
    relay.eventually_logs("converted the spool of an older prism-relay").await;
    assert_eq!(relay.spool().await.pending, 8);

    relay.sigterm();
    relay.wait().await;
    put_format_4(&spool);
    disk.fill(0);
    relay.start_again().await;
    relay.eventually_logs("freed the reserve of the spool to start").await;
    assert_eq!(relay.spool().await.pending, 8);
}

#[tokio::test]
async fn a_file_locked_by_another_process_is_not_waited_for_forever() {
    let relay = Setup::without_broker().start().await;
    let id = relay.post(scan(0)).await.id();
    // A process that reads blocks nothing, however long it takes.
    let reader = rusqlite::Connection::open(relay.setup().spool()).unwrap();
    reader.execute_batch("BEGIN; SELECT count(*) FROM event").unwrap();
    // A process that locks the file does: commits wait for SQLite's busy timeout, then fail.
    let holder = rusqlite::Connection::open(relay.setup().spool()).unwrap();
    holder.execute_batch("BEGIN IMMEDIATE").unwrap();
    assert_eq!(relay.post(scan(1)).await.expect(503).json()["code"], "spool-unavailable");
    holder.execute_batch("ROLLBACK").unwrap();
    relay.eventually_accepts(scan(1)).await;
    reader.execute_batch("ROLLBACK").unwrap();
    assert_eq!(relay.post(scan(0)).await.expect(200).json()["id"], json!(id));
    assert_eq!(relay.spool().await.accepted, 2);
}
