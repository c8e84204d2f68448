//! The file of the spool and its folder: mounts, links and names, and what a stop or a kill leaves.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};

use hyper::Method;
use rustix::process::{Flock, FlockType, fcntl_getlk};
use serde_json::{Value, json};

use crate::harness::disk::{Mount, SmallDisk};
use crate::harness::{Client, Relay, Setup, ports};

fn scan(number: usize) -> String {
    json!({"eventType": "scan.a", "payload": {"scanId": number.to_string()}}).to_string()
}

/// The names of the files of a spool, in order.
fn files(spool: &Path) -> Vec<String> {
    let names = fs::read_dir(spool.parent().unwrap()).unwrap();
    let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<_> = names.filter(|name| name.starts_with("spool.db")).collect();
    names.sort_unstable();
    names
}

/// Whether the relay has logged since its start that something is gone.
fn reports_a_loss(relay: &Relay) -> bool {
    relay.log_text().contains(" is gone")
}

/// As `docker run -v /srv/spool.db:/data/spool.db` does. The log would be lost with the container.
#[tokio::test]
async fn a_file_that_is_mounted_without_its_folder_is_refused() {
    let mut setup = Setup::without_broker();
    let disk = SmallDisk::mount(setup.folder(), "20m");
    let path = setup.folder().join("data/spool.db");
    fs::create_dir(path.parent().unwrap()).unwrap();
    setup.change("spool.path", path.to_str().unwrap());
    // From another disk, and from the same one.
    for source in [disk.path().join("spool.db"), setup.folder().join("volume.db")] {
        fs::write(&source, "").unwrap();
        fs::write(&path, "").unwrap();
        let mount = Mount::bind(&source, &path);
        let ended = setup.run(&["serve"]).await;
        assert_eq!(ended.code, Some(64), "{ended:?}");
        assert!(ended.stderr.contains("is mounted without its folder"), "{}", ended.stderr);
        assert!(ended.stderr.contains("mount the folder, not the file"), "{}", ended.stderr);
        let checked = setup.run(&["check", "--offline"]).await;
        assert!(checked.code == Some(1) && checked.stdout.contains("mount the folder"), "{checked:?}");
        let listed = setup.run(&["spool", "list"]).await;
        assert!(listed.code == Some(1) && listed.stderr.contains("mount the folder"), "{listed:?}");
        drop(mount);
        assert_eq!(fs::metadata(&source).unwrap().len(), 0, "nothing was written");
        fs::remove_file(&path).unwrap();
    }
    // A folder of its own is what it takes.
    let _mount = Mount::bind(disk.path(), path.parent().unwrap());
    setup.start().await.post(scan(0)).await.expect(200);
}

#[tokio::test]
async fn a_spool_has_one_relay_whatever_its_name() {
    let relay = Setup::without_broker().start().await;
    let id = relay.post(scan(0)).await.id();
    let (path, folder) = (relay.setup().spool(), relay.folder());
    let (hard, soft, other) = (folder.join("hard.db"), folder.join("soft.db"), folder.join("other"));
    fs::hard_link(&path, &hard).unwrap();
    symlink(&path, &soft).unwrap();
    fs::create_dir(&other).unwrap();
    let _mount = Mount::bind(folder, &other);
    assert_eq!(
        files(&path),
        ["spool.db", "spool.db-shm", "spool.db-wal", "spool.db.history", "spool.db.reserve"],
        "no lock that can be lost"
    );
    for name in [hard.clone(), soft, other.join("spool.db")] {
        let second = Setup::without_broker().set("spool.path", name.to_str().unwrap());
        let ended = second.run(&["serve"]).await;
        assert_eq!(ended.code, Some(1), "{}: {ended:?}", name.display());
        let owner = format!("is in use by another relay (process {})", relay.pid());
        assert!(ended.stderr.contains(&owner), "{}: {}", name.display(), ended.stderr);
        let listed = second.run(&["spool", "list"]).await;
        if name == hard {
            // By this name there is no log, and the event is in the log.
            assert!(listed.code == Some(1) && listed.stderr.contains("under another name"), "{listed:?}");
        } else {
            assert!(listed.stdout.contains(&id[28..]), "{}: {listed:?}", name.display());
        }
    }
    assert!(!folder.join("hard.db-wal").exists() && !folder.join("hard.db-shm").exists());
    relay.post(scan(1)).await.expect(200);
    assert_eq!(relay.run(&["spool", "verify"]).await.code, Some(0));
}

/// Whether other processes see SQLite's lock, which says that the relay has the file open. An older SQLite that does
/// not find it takes itself for the only one, and deletes the log in use.
fn is_locked_for_others(spool: &Path) -> bool {
    // SQLite's SHARED_FIRST and SHARED_SIZE, of which a reader holds all and the last process takes all.
    let mut wanted = Flock::from(FlockType::WriteLock);
    (wanted.start, wanted.length) = ((1 << 30) + 2, 510);
    let file = fs::File::options().read(true).write(true).open(spool).unwrap();
    fcntl_getlk(&file, &wanted).unwrap().is_some()
}

/// When a process closes any descriptor of the file, it loses SQLite's locks of it.
#[tokio::test]
async fn the_console_leaves_the_locks_of_the_spool() {
    let relay = Setup::without_broker().start().await;
    let (spool, log) = (relay.folder().join("spool.db"), relay.folder().join("spool.db-wal"));
    let inode = || fs::metadata(&log).map(|metadata| metadata.ino()).ok();
    let before = inode();
    assert!(before.is_some() && is_locked_for_others(&spool));
    let page = relay.ops_get("/").await.text();
    let token = page.split("name=\"prism-token\" content=\"").nth(1).and_then(|rest| rest.split('"').next()).unwrap();
    let unknown = uuid::Uuid::now_v7();
    for (number, action) in [None, Some("retry"), Some("remove")].into_iter().enumerate() {
        match action {
            None => relay.ops_get("/api/parked").await.expect(200),
            Some(action) => {
                let url = format!("{}/api/parked/{unknown}/{action}", relay.ops());
                let headers = [("x-prism-token", token), ("origin", relay.ops())];
                Client::http1().send(Method::POST, &url, &headers, "").await.unwrap().expect(404)
            }
        };
        assert!(is_locked_for_others(&spool), "after {action:?}");
        let id = relay.post(scan(number)).await.id();
        let removed = relay.run(&["spool", "remove", "--yes", "--pending", &id]).await;
        assert_eq!(removed.code, Some(0), "{removed:?}");
        assert_eq!(inode(), before, "after {action:?} and a removal");
    }
    relay.post(scan(100)).await.expect(200);
    let spool = relay.spool().await;
    assert_eq!((spool.accepted, spool.pending, spool.removed), (4, 1, 3));
}

/// SQLite would take such a name for a URI, here for a database in memory.
#[tokio::test]
async fn a_name_that_looks_like_a_uri_is_a_file_name() {
    let setup = Setup::without_broker().set("spool.path", "file:spool.db?mode=memory");
    let mut relay = setup.start().await;
    let id = relay.post(scan(0)).await.id();
    assert!(relay.folder().join("file:spool.db?mode=memory-wal").exists());
    relay.kill9().await;
    relay.start_again().await;
    assert_eq!(relay.post(scan(0)).await.expect(200).json()["id"], json!(id));
    assert!(relay.run(&["spool", "list"]).await.stdout.contains(&id[28..]));
}

#[tokio::test]
async fn a_stop_leaves_everything_in_spool_db() {
    let mut relay = Setup::without_broker().start().await;
    let path = relay.setup().spool();
    for stop in 1..=8 {
        let senders: Vec<_> = (0..4)
            .map(|sender| {
                let relay = relay.sender();
                tokio::spawn(async move {
                    let mut accepted = 0;
                    while relay
                        .post(scan(stop * 1_000_000 + sender * 100_000 + accepted))
                        .await
                        .is_ok_and(|a| a.status == 200)
                    {
                        accepted += 1;
                    }
                })
            })
            .collect();
        // The publisher and the console read meanwhile.
        for number in 0..10 {
            relay.post(scan(stop * 1000 + number)).await.expect(200);
            relay.status().await;
        }
        let accepted = relay.spool().await.accepted;
        relay.sigterm();
        assert_eq!(relay.wait().await.code, Some(0));
        for sender in senders {
            sender.await.unwrap();
        }
        assert_eq!(files(&path), ["spool.db", "spool.db.history", "spool.db.reserve"], "after stop {stop}");
        let alone = relay.folder().join("alone.db");
        fs::copy(&path, &alone).unwrap();
        let connection = rusqlite::Connection::open(&alone).unwrap();
        let events: u64 = connection.query_row("SELECT count(*) FROM event", [], |row| row.get(0)).unwrap();
        assert!(events >= accepted, "{events} of at least {accepted}");
        relay.start_again().await;
    }
    assert!(!reports_a_loss(&relay));
}

/// The last process that closes the file copies the log into it and deletes the log.
#[tokio::test]
async fn a_kill_and_a_removal_are_no_loss() {
    let mut relay = Setup::without_broker().start().await;
    let ids = [relay.post(scan(0)).await.id(), relay.post(scan(1)).await.id()];
    relay.kill9().await;
    let removed = relay.run(&["spool", "remove", "--yes", "--pending", &ids[0]]).await;
    assert!(removed.stdout.contains("removed"), "{removed:?}");
    assert_eq!(files(&relay.setup().spool()), ["spool.db", "spool.db.history", "spool.db.reserve"]);
    relay.start_again().await;
    let spool = relay.spool().await;
    assert_eq!((spool.pending, spool.removed, spool.lost), (1, 1, 0));
    assert!(!reports_a_loss(&relay), "{}", relay.log_text());
}

#[tokio::test]
async fn a_start_that_fails_is_no_loss() {
    let other = Setup::without_broker().start().await;
    let mut relay = Setup::without_broker().start().await;
    relay.post(scan(0)).await.expect(200);
    relay.kill9().await;
    for _ in 0..8 {
        relay.reconfigure("http.listen", other.address().to_string());
        let ended = relay.run(&["serve"]).await;
        assert!(ended.code == Some(1) && ended.stderr.contains("in use"), "{ended:?}");
        assert_eq!(
            files(&relay.setup().spool()),
            ["spool.db", "spool.db.history", "spool.db.reserve"],
            "closed as after a stop"
        );
        relay.reconfigure("http.listen", format!("127.0.0.1:{}", ports::free()));
        relay.start_again().await;
        assert!(!reports_a_loss(&relay), "{}", relay.log_text());
        relay.kill9().await;
    }
    relay.start_again().await;
    assert_eq!((relay.spool().await.pending, relay.spool().await.lost), (1, 0));
}

#[tokio::test]
async fn a_spool_in_memory_is_warned_of() {
    let setup = Setup::without_broker();
    let disk = SmallDisk::mount(setup.folder(), "20m");
    let relay = setup.set("spool.path", disk.spool()).start().await;
    let line = relay.eventually_logs("the spool is on a file system in memory").await;
    assert_eq!((&line["level"], &line["path"]), (&json!("WARN"), &json!(disk.spool())));
    let checked = relay.run(&["check", "--offline"]).await;
    assert!(checked.stdout.contains("on a file system in memory"), "{}", checked.stdout);
    let local = Setup::without_broker().start().await;
    assert!(!local.log_text().contains("file system"), "{}", local.log_text());
}

/// The path of a log line.
fn path_of(line: &Value) -> PathBuf {
    PathBuf::from(line["path"].as_str().unwrap_or_default())
}

/// A folder that takes no files, and a disk that is read-only.
#[tokio::test]
async fn a_folder_that_cannot_be_written_is_named() {
    let setup = Setup::without_broker();
    let disk = SmallDisk::mount(setup.folder(), "20m");
    let mut relay = setup.set("spool.path", disk.spool()).start().await;
    assert_eq!(path_of(&relay.eventually_logs("opening the spool").await), PathBuf::from(disk.spool()));
    relay.sigterm();
    relay.wait().await;
    disk.remount("ro");
    let ended = relay.run(&["serve"]).await;
    let expected = format!("cannot create or open {}", disk.spool());
    assert!(ended.code == Some(1) && ended.stderr.contains(&expected), "{ended:?}");
    assert!(ended.stderr.contains("Read-only file system"), "{}", ended.stderr);
    disk.remount("rw");
    // SQLite cannot create its log.
    fs::create_dir(disk.path().join("spool.db-wal")).unwrap();
    let ended = relay.run(&["serve"]).await;
    let expected = format!("cannot create or open the files next to {}", disk.spool());
    assert!(ended.code == Some(1) && ended.stderr.contains(&expected), "{ended:?}");
    assert!(ended.stderr.contains("its folder has to be writable for the relay"), "{}", ended.stderr);
}
