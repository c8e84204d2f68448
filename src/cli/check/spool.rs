//! Whether the spool can be used, and whether its disk has room.

use std::fs::{self, OpenOptions};
use std::io;
use std::path::Path;

use bytesize::ByteSize;

use super::findings::{Finding, Level};
use crate::config::Config;
use crate::spool::{FileSystem, Inspector, Ledger, OpenError, Shortage, SpoolState, check_mount, sibling};
use crate::text::chain;

const AREA: &str = "spool";

/// The log is given back to this size or less, unless another process reads the spool.
const LOG_LARGE: u64 = 64 << 20;

/// What is known about the spool and its disk.
struct Facts<'a> {
    path: &'a Path,
    state: &'a SpoolState,
    /// Whether the files could be created or changed.
    access: Result<(), String>,
    /// The totals, if there is a spool.
    ledger: Option<Result<Ledger, Unread>>,
    /// Size of the write-ahead log.
    log_bytes: u64,
    /// Whether the disk has too little room for the reserve.
    shortage: Option<Shortage>,
    /// Free space on the disk; `None` if it is not known.
    free: Option<u64>,
    max_bytes: u64,
    /// Why the place is wrong: the file is mounted alone, or its file system is not a local disk.
    place: Option<String>,
}

/// Why the totals cannot be read.
enum Unread {
    /// The spool is one of an older relay, which the new one converts when it starts.
    Unconverted(String),
    /// Something is wrong with it.
    Wrong(String),
}

/// Reads the spool and looks at its disk.
pub(super) fn findings(config: &Config, state: &SpoolState) -> Vec<Finding> {
    let configured = config.spool.path.as_path();
    // The log and the reserve are next to the file that a symbolic link leads to.
    let resolved = configured.canonicalize().unwrap_or_else(|_| configured.to_owned());
    let path = resolved.as_path();
    if path.is_dir() {
        let remedy = format!("set spool.path to a file in it, such as {}", path.join("spool.db").display());
        return vec![Finding::wrong(AREA, format!("{} is a folder, not a file", path.display())).remedy(remedy)];
    }
    let folder = match state {
        SpoolState::Absent(folder) => folder.clone(),
        _ => path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new(".")).to_owned(),
    };
    let exists = matches!(state, SpoolState::Idle | SpoolState::InUse);
    let ledger = exists.then(|| {
        let spool = Inspector::open(path).map_err(|error| match error {
            OpenError::Unconverted { .. } => Unread::Unconverted(error.to_string()),
            error => Unread::Wrong(chain(&error)),
        })?;
        spool.ledger().map_err(|error| Unread::Wrong(chain(&error)))
    });
    let facts = Facts {
        path,
        state,
        access: try_access(path, &folder, exists),
        ledger,
        log_bytes: fs::metadata(sibling(path, "-wal")).map_or(0, |log| log.len()),
        shortage: Shortage::of(&config.spool).unwrap_or(None),
        free: rustix::fs::statvfs(&folder).ok().map(|disk| disk.f_bavail * disk.f_frsize),
        max_bytes: config.spool.max_bytes,
        place: match check_mount(configured) {
            Err(error) => Some(chain(&error)),
            Ok(()) => FileSystem::of(configured).warning().map(str::to_owned),
        },
    };
    [facts.spool()].into_iter().chain(facts.place()).chain(facts.room()).chain(facts.log()).collect()
}

/// Creates a file in the folder and deletes it, and opens the spool for writing, which changes nothing.
fn try_access(path: &Path, folder: &Path, exists: bool) -> Result<(), String> {
    let probe = folder.join(format!(".prism-relay-check-{}", std::process::id()));
    let created = fs::File::create_new(&probe).and_then(|_| fs::remove_file(&probe));
    created.map_err(|error| format!("cannot create a file in {}: {error}", folder.display()))?;
    let opened = if exists { OpenOptions::new().write(true).open(path).map(drop) } else { io::Result::Ok(()) };
    opened.map_err(|error| format!("cannot write {}: {error}", path.display()))
}

impl Facts<'_> {
    fn spool(&self) -> Finding {
        let path = self.path.display();
        let user = if *self.state == SpoolState::InUse { ", in use by a running relay" } else { "" };
        if *self.state == SpoolState::Damaged {
            return Finding::wrong(AREA, format!("{path} is damaged"))
                .remedy("start the relay: it recovers the spool, keeps the damaged file, and logs what is lost");
        }
        if let Err(error) = &self.access {
            return Finding::wrong(AREA, format!("{error}{user}"))
                .remedy("run check as the relay's user, and make that user the owner of the spool and its folder");
        }
        match &self.ledger {
            None => Finding::ok(AREA, format!("{path} will be created")),
            Some(Err(Unread::Unconverted(text))) => Finding::ok(AREA, text.clone()),
            Some(Err(Unread::Wrong(error))) => Finding::wrong(AREA, format!("{error}{user}")),
            Some(Ok(ledger)) if !ledger.balances() => {
                Finding::wrong(AREA, format!("{path}: its totals do not add up: {ledger:?}{user}"))
                    .remedy("run prism-relay spool verify, and keep its output")
            }
            Some(Ok(ledger)) if ledger.bytes >= self.max_bytes => {
                let text = format!("{path} is full ({}): webhooks are answered 503{user}", ByteSize(self.max_bytes));
                Finding::wrong(AREA, text).remedy("restore the deliveries to RabbitMQ, or raise spool.max_bytes")
            }
            Some(Ok(ledger)) => {
                Finding::ok(AREA, format!("{path}: {} pending, {} parked{user}", ledger.pending, ledger.parked))
            }
        }
    }

    fn place(&self) -> Option<Finding> {
        Some(Finding::wrong("place of the spool", self.place.clone()?))
    }

    fn room(&self) -> Option<Finding> {
        let area = "disk of the spool";
        if let Some(Shortage { needed, free }) = self.shortage {
            let what = match self.state {
                SpoolState::InUse => "the relay answers webhooks 503 until there is room for its reserve",
                SpoolState::Absent(_) | SpoolState::Damaged | SpoolState::Idle => "the relay would answer webhooks 503",
            };
            let text = format!("{} are free, and {} are needed: {what}", ByteSize(free), ByteSize(needed));
            return Some(
                Finding::wrong(area, text).remedy("free space on the disk, or move spool.path to another one"),
            );
        }
        let free = self.free?;
        let used = self.ledger.as_ref().and_then(|ledger| ledger.as_ref().ok()).map_or(0, |ledger| ledger.bytes);
        let wanted = self.max_bytes.saturating_sub(used);
        if free < wanted {
            let text = format!(
                "{} are free, and spool.max_bytes allows the spool {} more: the disk will be full first",
                ByteSize(free),
                ByteSize(wanted)
            );
            return Some(Finding::note(area, text).remedy("lower spool.max_bytes, or use a larger disk"));
        }
        Some(Finding::ok(area, format!("{} are free", ByteSize(free))))
    }

    fn log(&self) -> Option<Finding> {
        if self.log_bytes <= LOG_LARGE {
            return None;
        }
        let level = if *self.state == SpoolState::InUse { Level::Wrong } else { Level::Note };
        let text = format!("the write-ahead log has grown to {}", ByteSize(self.log_bytes));
        let remedy = "another process keeps the spool open for reading (a backup, sqlite3, spool verify): stop it";
        Some(Finding::new(level, "log of the spool", text).remedy(remedy))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// The findings about a spool in use with 10 of 100 MiB, after `change`.
    fn judged(change: impl FnOnce(&mut Facts<'_>)) -> Vec<(Level, String)> {
        let ledger = Ledger { accepted: 3, pending: 3, bytes: 10 * MIB, ..Ledger::default() };
        let mut facts = Facts {
            path: Path::new("/data/spool.db"),
            state: &SpoolState::InUse,
            access: Ok(()),
            ledger: Some(Ok(ledger)),
            log_bytes: 4 * MIB,
            shortage: None,
            free: Some(1024 * MIB),
            max_bytes: 100 * MIB,
            place: None,
        };
        change(&mut facts);
        let all = [facts.spool()].into_iter().chain(facts.place()).chain(facts.room()).chain(facts.log());
        all.map(|finding| (finding.level, finding.text)).collect()
    }

    fn first_that_is_not_ok(change: impl FnOnce(&mut Facts<'_>)) -> (Level, String) {
        let found = judged(change).into_iter().find(|(level, _)| *level != Level::Ok);
        found.unwrap_or_else(|| (Level::Ok, String::new()))
    }

    #[test]
    fn a_spool_on_a_disk_with_room_is_ok() {
        let found = judged(|_| {});
        let texts = ["/data/spool.db: 3 pending, 0 parked, in use by a running relay", "1.0 GiB are free"];
        assert_eq!(found, texts.map(|text| (Level::Ok, text.to_owned())));
        assert_eq!(judged(|facts| facts.ledger = None)[0].1, "/data/spool.db will be created");
    }

    #[test]
    fn a_folder_in_place_of_the_spool_is_wrong() {
        let folder = tempfile::TempDir::new().unwrap();
        let path = folder.path().canonicalize().unwrap().display().to_string();
        let variable = ("PRISM_RELAY__SPOOL__PATH".to_owned(), path.clone());
        let config = Config::load(None, [variable], crate::config::Purpose::Client).unwrap();
        let found = super::findings(&config, &SpoolState::of(&config.spool.path));
        let expected = Finding::wrong(AREA, format!("{path} is a folder, not a file"))
            .remedy(format!("set spool.path to a file in it, such as {path}/spool.db"));
        assert_eq!(found, [expected]);
    }

    #[test]
    fn what_keeps_a_spool_from_taking_events_is_wrong() {
        let damaged = first_that_is_not_ok(|facts| facts.state = &SpoolState::Damaged);
        assert_eq!(damaged, (Level::Wrong, "/data/spool.db is damaged".to_owned()));
        let denied = first_that_is_not_ok(|facts| facts.access = Err("cannot write /data/spool.db: denied".to_owned()));
        assert_eq!(denied.0, Level::Wrong);
        let memory = first_that_is_not_ok(|facts| facts.place = Some("the spool is in memory".to_owned()));
        assert_eq!(memory, (Level::Wrong, "the spool is in memory".to_owned()));
        let (level, text) = first_that_is_not_ok(|facts| facts.max_bytes = 10 * MIB);
        assert!(level == Level::Wrong && text.contains("is full (10.0 MiB): webhooks are answered 503"), "{text}");
        let shortage = Some(Shortage { needed: 9 * MIB, free: 3 * MIB });
        let (level, text) = first_that_is_not_ok(|facts| facts.shortage = shortage);
        let expected = "3.0 MiB are free, and 9.0 MiB are needed: the relay answers webhooks 503 until there is room \
                        for its reserve";
        assert_eq!((level, text.as_str()), (Level::Wrong, expected));
        let (level, text) = first_that_is_not_ok(|facts| facts.log_bytes = 300 * MIB);
        assert_eq!((level, text.as_str()), (Level::Wrong, "the write-ahead log has grown to 300.0 MiB"));
        let wrong = Ledger { accepted: 3, pending: 2, ..Ledger::default() };
        assert_eq!(first_that_is_not_ok(|facts| facts.ledger = Some(Ok(wrong))).0, Level::Wrong);
    }

    #[test]
    fn a_disk_smaller_than_the_limit_is_a_note() {
        let (level, text) = first_that_is_not_ok(|facts| facts.free = Some(60 * MIB));
        let expected =
            "60.0 MiB are free, and spool.max_bytes allows the spool 90.0 MiB more: the disk will be full first";
        assert_eq!((level, text.as_str()), (Level::Note, expected));
    }
}
