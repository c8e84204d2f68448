//! What the spool knows of scans and predictions: late copies, crashes, limits, hints, and files of the format before.

use std::path::PathBuf;

use rusqlite::Connection;

use super::*;
use crate::event::Source;
use crate::spool::files::sibling;
use crate::spool::hints::HINTS_MAX;
use crate::subject::{Kind, Step};

use Step::{Began, Failed, Succeeded};

const MINUTE: i64 = 60_000;
/// The time of the first event, in milliseconds since 1970.
const START: i64 = 1_800_000_000_000;

fn scan(id: &str) -> Subject {
    Subject::new(Kind::Scan, id).unwrap()
}

fn progress(id: &str, step: Step) -> Progress {
    Progress { subject: scan(id), step }
}

/// The body of an event; bodies with another `n` are other ones.
fn body(id: &str, step: Step, n: u32) -> Bytes {
    let progress = progress(id, step);
    Bytes::from(format!(r#"{{"eventType":"{}","payload":{{"scanId":"{id}","n":{n}}}}}"#, progress.event_type()))
}

fn webhook(id: &str, step: Step, n: u32, at_ms: i64) -> Event {
    Event { accepted_ms: at_ms, subject: Some(scan(id).key()), ..event(body(id, step, n)) }
}

struct Following {
    opened: Opened,
    _folder: Option<TempDir>,
    path: PathBuf,
}

impl Following {
    fn new() -> Self {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("spool.db");
        Self { _folder: Some(folder), ..Self::open(&path) }
    }

    fn open(path: &Path) -> Self {
        Self::limited(path, 1 << 30, 1000)
    }

    fn limited(path: &Path, max_bytes: u64, max: usize) -> Self {
        let subjects = subjects::Settings { max, keep: Duration::from_secs(7 * 24 * 3600) };
        let opened = Opened::with(path, max_bytes, WINDOW, Some(&subjects));
        Self { opened, _folder: None, path: path.to_owned() }
    }

    fn spool(&self) -> &Spool {
        &self.opened.spool
    }

    async fn webhook(&self, id: &str, step: Step, n: u32, at_ms: i64) -> Receipt {
        self.spool().append(webhook(id, step, n, at_ms), None).await.unwrap()
    }

    async fn api(&self, id: &str, step: Step, at_ms: i64, authentic: bool) -> MadeReceipt {
        let now = Timestamp::from_millisecond(at_ms).unwrap();
        let event = Event::made(body(id, step, 0), scan(id).key(), authentic, now);
        self.spool().append_made(event, progress(id, step)).await.unwrap()
    }

    async fn stored(&self, id: &str, step: Step, at_ms: i64) -> Receipt {
        match self.api(id, step, at_ms, true).await {
            MadeReceipt::Stored(receipt) => receipt,
            MadeReceipt::Known => panic!("the API told nothing new"),
        }
    }

    async fn state(&self, id: &str) -> Option<State> {
        self.spool().subject(scan(id)).await.unwrap()
    }

    async fn overdue(&self, before_ms: i64, now_ms: i64) -> Vec<String> {
        let overdue = self.spool().overdue(before_ms, now_ms, 10).await.unwrap();
        overdue.into_iter().map(|(subject, _)| subject.id().to_owned()).collect()
    }

    async fn hints(&self, trust: HintTrust) -> Vec<Hint> {
        self.spool().hints(trust, START, 2 * HINTS_MAX).await.unwrap()
    }

    /// Open subjects that were evicted.
    fn evicted(&self) -> u64 {
        let text = self.opened.metrics.render();
        let count = text.lines().find_map(|line| line.strip_prefix("prism_relay_subjects_evicted_total "));
        count.expect("the metric is there from the start").parse().unwrap()
    }

    fn accepted(&self) -> u64 {
        self.spool().status().ledger().accepted
    }

    async fn reopen(self) -> Self {
        let Self { opened, _folder: folder, path } = self;
        opened.close().await;
        Self { _folder: folder, ..Self::open(&path) }
    }

    /// The files as a kill leaves them at this moment.
    fn left_by_a_kill(&self) -> PathBuf {
        let left = self.path.with_file_name("left.db");
        for suffix in ["", "-wal"] {
            std::fs::copy(sibling(&self.path, suffix), sibling(&left, suffix)).unwrap();
        }
        left
    }
}

fn hint(id: &str, step: Step, at_ms: i64, trust: HintTrust) -> Hint {
    Hint { subject: scan(id), step, at_ms, trust, tries: 0 }
}

#[tokio::test]
async fn the_late_webhook_of_an_event_of_the_api_is_answered_with_its_id_also_after_a_kill() {
    let spool = Following::new();
    spool.webhook("a", Began, 0, START).await;
    let made = spool.stored("a", Succeeded, START + 15 * MINUTE).await;
    let killed = Following::open(&spool.left_by_a_kill());
    for spool in [&spool, &killed] {
        let late = spool.webhook("a", Succeeded, 1, START + 16 * MINUTE).await;
        assert_eq!(late, Receipt { duplicate: true, ..made });
        assert_eq!((spool.accepted(), spool.spool().status().ledger().duplicates), (2, 1));
    }
    // Prism sends the webhook again.
    let spool = killed.reopen().await;
    let again = spool.webhook("a", Succeeded, 1, START + 17 * MINUTE).await;
    assert_eq!(again, Receipt { duplicate: true, ..made });
    assert!(!spool.webhook("a", Succeeded, 2, START + 18 * MINUTE).await.duplicate, "one late copy only");
}

#[tokio::test]
async fn an_answer_of_the_api_that_a_webhook_told_meanwhile_is_known_also_after_a_kill() {
    let spool = Following::new();
    spool.webhook("a", Began, 0, START).await;
    spool.webhook("a", Succeeded, 0, START + 1).await;
    let killed = Following::open(&spool.left_by_a_kill());
    for spool in [&spool, &killed] {
        for step in [Began, Succeeded] {
            assert_eq!(spool.api("a", step, START + 2, true).await, MadeReceipt::Known);
        }
        assert_eq!((spool.accepted(), spool.spool().status().ledger().duplicates), (2, 0));
    }
}

/// Prism works on a scan a second time: its events have the same bodies as those of the first time.
#[tokio::test]
async fn the_events_of_a_second_run_are_all_published() {
    let spool = Following::new();
    spool.webhook("a", Began, 0, START).await;
    spool.stored("a", Succeeded, START + 15 * MINUTE).await;
    assert!(!spool.webhook("a", Began, 1, START + 16 * MINUTE).await.duplicate);
    let spool = spool.reopen().await;
    assert!(!spool.webhook("a", Succeeded, 1, START + 17 * MINUTE).await.duplicate);
    assert!(!spool.webhook("a", Began, 2, START + 18 * MINUTE).await.duplicate);
    spool.stored("a", Succeeded, START + 40 * MINUTE).await;
    assert_eq!(spool.accepted(), 6);
}

#[tokio::test]
async fn a_signed_webhook_is_published_although_an_unverified_answer_told_the_same() {
    let spool = Following::new();
    spool.webhook("a", Began, 0, START).await;
    let made = spool.api("a", Succeeded, START + 15 * MINUTE, false).await;
    assert!(matches!(made, MadeReceipt::Stored(_)));
    // Even with the same bytes.
    assert!(!spool.webhook("a", Succeeded, 0, START + 16 * MINUTE).await.duplicate);
    assert_eq!(spool.api("a", Succeeded, START + 17 * MINUTE, false).await, MadeReceipt::Known);
    let events = spool.spool().pending_after(0, 10).await.unwrap().events;
    let facts = |stored: &Stored| (stored.event.source, stored.event.authentic);
    let expected = [(Source::Webhook, true), (Source::Api, false), (Source::Webhook, true)];
    assert_eq!(events.iter().map(facts).collect::<Vec<_>>(), expected);
}

#[tokio::test]
async fn an_unsigned_end_does_not_hide_that_the_signed_one_is_missing() {
    let spool = Following::new();
    spool.webhook("a", Began, 0, START).await;
    let unsigned = Event { authentic: false, ..webhook("a", Succeeded, 0, START + 1) };
    spool.spool().append(unsigned, None).await.unwrap();
    assert_eq!(spool.overdue(START, START).await, ["a"]);
}

#[tokio::test]
async fn webhooks_are_recognised_by_their_body_alone() {
    let spool = Following::new();
    for n in 0..3 {
        assert!(!spool.webhook("a", Succeeded, n, START).await.duplicate);
        assert!(spool.webhook("a", Succeeded, n, START).await.duplicate);
    }
}

/// Makes every change of the totals fail, which is the last step of a transaction.
const NO_COMMIT: &str = "CREATE TRIGGER no BEFORE UPDATE ON ledger BEGIN SELECT RAISE(ABORT, 'no'); END";

#[tokio::test]
async fn a_failed_commit_changes_no_subject() {
    let spool = Following::new();
    spool.webhook("a", Began, 0, START).await;
    spool.stored("a", Succeeded, START + 1).await;
    spool.webhook("b", Began, 0, START).await;
    let before = [spool.state("a").await, spool.state("b").await];
    let meddler = Connection::open(&spool.path).unwrap();
    meddler.execute_batch(NO_COMMIT).unwrap();
    for (id, step) in [("a", Succeeded), ("b", Failed), ("c", Began)] {
        let refused = spool.spool().append(webhook(id, step, 1, START + 2), None).await;
        assert_eq!(refused, Err(AppendError::Unavailable));
    }
    assert_eq!([spool.state("a").await, spool.state("b").await], before);
    assert_eq!(spool.state("c").await, None);
    meddler.execute_batch("DROP TRIGGER no").unwrap();
    eventually(|| spool.spool().status().writable()).await;
    assert!(spool.webhook("a", Succeeded, 1, START + 3).await.duplicate, "it is still a late copy");
    assert!(!spool.webhook("b", Failed, 1, START + 3).await.duplicate);
    spool.opened.close().await;
}

#[tokio::test]
async fn a_full_spool_changes_no_subject_and_recognises_late_copies() {
    let folder = TempDir::new().unwrap();
    let room_for_two = 2 * (EVENT_OVERHEAD_BYTES + 100);
    let spool = Following::limited(&folder.path().join("spool.db"), room_for_two, 1000);
    spool.webhook("a", Began, 0, START).await;
    let made = spool.stored("a", Succeeded, START + 1).await;
    let before = spool.state("a").await;
    for (id, step) in [("a", Began), ("a", Failed), ("b", Began)] {
        let refused = spool.spool().append(webhook(id, step, 1, START + 2), None).await;
        assert_eq!(refused, Err(AppendError::Full));
    }
    let refused = Event::made(body("b", Failed, 0), scan("b").key(), true, Timestamp::UNIX_EPOCH);
    let refused = spool.spool().append_made(refused, progress("b", Failed)).await;
    assert_eq!(refused, Err(AppendError::Full));
    assert_eq!((spool.state("a").await, spool.state("b").await), (before, None));
    let late = spool.webhook("a", Succeeded, 1, START + 3).await;
    assert_eq!(late, Receipt { duplicate: true, ..made });
    spool.opened.close().await;
}

#[tokio::test]
async fn overdue_subjects_are_found_until_they_end_are_unknown_or_wait() {
    let spool = Following::new();
    for (id, at_ms) in [("old", 0), ("older", -1), ("new", 2), ("ended", 0), ("unknown", 0), ("waiting", 0)] {
        spool.webhook(id, Began, 0, START + at_ms).await;
    }
    spool.webhook("ended", Failed, 0, START + 3).await;
    let now = START + MINUTE;
    spool.spool().note(Note::Closed { subject: scan("unknown") }).await;
    for next_ms in [now + 1, now + 2] {
        spool.spool().note(Note::Asked { subject: scan("waiting"), at_ms: now, next_ms }).await;
        spool.spool().note(Note::Asked { subject: scan("ended"), at_ms: now, next_ms }).await;
    }
    spool.spool().flush().await;
    assert_eq!(spool.overdue(START, now).await, ["older", "old"]);
    assert_eq!(spool.overdue(START, now + 2).await, ["older", "old", "waiting"]);
    let counts = spool.spool().subject_counts(START).await.unwrap();
    assert_eq!(counts, SubjectCounts { open: 4, overdue: 3 });
    let asked = spool.state("waiting").await.unwrap().asked;
    assert_eq!((asked.last_ms, asked.tries, asked.next_ms), (Some(now), 2, now + 2));
    assert_eq!(spool.state("ended").await.unwrap().asked.tries, 0, "only open subjects are asked for");
    // The clock was set back since it was asked for.
    assert_eq!(spool.overdue(START, now - 3 * 60 * MINUTE).await, ["older", "old", "waiting"]);
    // It is asked for again if it begins again.
    spool.webhook("unknown", Began, 1, START).await;
    assert_eq!(spool.overdue(START, now).await.len(), 3);
}

#[tokio::test]
async fn subjects_are_bounded_by_number_and_by_age() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("spool.db");
    let count = async |spool: &Following| spool.spool().subject_counts(i64::MAX).await.unwrap().open;
    let now = Timestamp::now().as_millisecond();
    let spool = Following::limited(&path, 1 << 30, 50);
    for n in 0..120u32 {
        spool.webhook(&n.to_string(), Began, 0, now + i64::from(n)).await;
    }
    assert_eq!(count(&spool).await, 50);
    assert_eq!(spool.evicted(), 70);
    assert_eq!((spool.state("69").await, spool.state("70").await.is_some()), (None, true));
    spool.opened.close().await;
    // A lower limit, after a restart.
    let spool = Following::limited(&path, 1 << 30, 10);
    for _ in 0..3 {
        spool.spool().note(Note::Purge { now_ms: now }).await;
        spool.spool().flush().await;
    }
    assert_eq!(count(&spool).await, 10);
    assert_eq!(spool.evicted(), 40);
    // One that has ended, or is forgotten for its age, is not evicted.
    spool.webhook("ended", Failed, 0, now - MINUTE).await;
    spool.spool().flush().await;
    assert_eq!(spool.state("ended").await, None);
    let old = now - 8 * 24 * 60 * MINUTE;
    spool.webhook("old", Began, 0, old).await;
    spool.spool().note(Note::Purge { now_ms: now }).await;
    spool.spool().flush().await;
    assert_eq!(spool.state("old").await, None);
    spool.opened.close().await;
}

#[tokio::test]
async fn without_reconcile_nothing_is_kept_and_old_subjects_are_removed() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("spool.db");
    let rows = |sql: &str| -> u64 { Connection::open(&path).unwrap().query_row(sql, [], |row| row.get(0)).unwrap() };
    let spool = Following::open(&path);
    spool.webhook("a", Began, 0, START).await;
    spool.spool().offer_hint(hint("b", Began, START, HintTrust::Unsigned));
    spool.opened.close().await;
    assert_eq!((rows("SELECT count(*) FROM subject"), rows("SELECT count(*) FROM hint")), (1, 1));
    let opened = Opened::open(&path, 1 << 30, WINDOW);
    assert!(!opened.spool.follows_subjects());
    opened.spool.append(webhook("a", Succeeded, 0, START), None).await.unwrap();
    opened.spool.offer_hint(hint("b", Began, START, HintTrust::Signed));
    opened.close().await;
    assert_eq!((rows("SELECT count(*) FROM subject"), rows("SELECT count(*) FROM hint")), (0, 0));
    // The end is not asked for although the relay with [reconcile] has not seen it.
    let spool = Following::open(&path);
    assert_eq!(spool.overdue(i64::MAX, i64::MAX).await, [""; 0]);
    spool.opened.close().await;
}

#[tokio::test]
async fn hints_are_written_within_seconds_and_at_a_stop() {
    let spool = Following::new();
    spool.spool().offer_hint(hint("a", Began, START, HintTrust::Signed));
    spool.spool().offer_hint(hint("a", Succeeded, START + 1, HintTrust::Signed));
    for _ in 0..1000 {
        if !spool.hints(HintTrust::Signed).await.is_empty() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let first = hint("a", Succeeded, START, HintTrust::Signed);
    assert_eq!(spool.hints(HintTrust::Signed).await, [first], "one for a subject, from the first webhook on");
    spool.spool().offer_hint(hint("b", Failed, START, HintTrust::Unsigned));
    let spool = spool.reopen().await;
    assert_eq!(spool.hints(HintTrust::Unsigned).await, [hint("b", Failed, START, HintTrust::Unsigned)]);
    spool.spool().note(Note::HintAsked { subject: scan("b"), trust: HintTrust::Unsigned, next_ms: START + 1 }).await;
    spool.spool().note(Note::HintDone { subject: scan("a"), trust: HintTrust::Signed }).await;
    spool.spool().flush().await;
    assert_eq!((spool.hints(HintTrust::Unsigned).await, spool.hints(HintTrust::Signed).await), (vec![], vec![]));
    let later = spool.spool().hints(HintTrust::Unsigned, START + 1, 10).await.unwrap();
    assert_eq!(later.iter().map(|hint| hint.tries).collect::<Vec<_>>(), [1]);
    spool.opened.close().await;
}

#[tokio::test]
async fn a_flood_of_unsigned_hints_pushes_out_no_signed_one() {
    let spool = Following::new();
    spool.spool().offer_hint(hint("signed", Began, START - 20_000, HintTrust::Signed));
    for round in 0..2 {
        for n in 0..2 * HINTS_MAX as i64 {
            let id = format!("{round}-{n}");
            spool.spool().offer_hint(hint(&id, Began, START - 10_000 + n, HintTrust::Unsigned));
        }
    }
    let spool = spool.reopen().await;
    let kept = spool.hints(HintTrust::Unsigned).await;
    assert!((1..=HINTS_MAX).contains(&kept.len()), "{}", kept.len());
    assert_eq!(spool.hints(HintTrust::Signed).await.len(), 1);
    spool.opened.close().await;
}

#[tokio::test]
async fn hints_wait_in_memory_while_the_disk_takes_no_writes() {
    let spool = Following::new();
    let meddler = Connection::open(&spool.path).unwrap();
    meddler.execute_batch(NO_COMMIT).unwrap();
    let refused = spool.spool().append(webhook("a", Began, 0, START), None).await;
    assert_eq!(refused, Err(AppendError::Unavailable));
    spool.spool().offer_hint(hint("a", Began, START, HintTrust::Signed));
    spool.spool().flush().await;
    meddler.execute_batch("DROP TRIGGER no").unwrap();
    drop(meddler);
    let spool = spool.reopen().await;
    assert_eq!(spool.hints(HintTrust::Signed).await.len(), 1);
    spool.opened.close().await;
}

/// The files of a relay of format 4 that was killed, with eight pending events: most of them are in the log.
fn of_format_4() -> (TempDir, PathBuf) {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("spool.db");
    for suffix in ["", "-wal"] {
        let name = format!("{}/tests/samples/spool-format-4/spool.db{suffix}", env!("CARGO_MANIFEST_DIR"));
        std::fs::copy(name, sibling(&path, suffix)).unwrap();
    }
    (folder, path)
}

async fn assert_converted(path: &Path) {
    let spool = Following::open(path);
    assert_eq!((spool.spool().status().ledger().pending, spool.spool().status().lost()), (8, 0));
    let samples = include_str!("../../../tests/samples/events.jsonl");
    for (stored, line) in spool.spool().pending_after(0, 10).await.unwrap().events.iter().zip(samples.lines()) {
        assert_eq!((&stored.event.body[..], stored.event.source), (line.as_bytes(), Source::Webhook));
        assert!(stored.event.is_intact());
    }
    spool.webhook("a", Began, 0, START).await;
    spool.stored("a", Succeeded, START).await;
    let spool = spool.reopen().await;
    assert_eq!(spool.spool().pending_after(9, 10).await.unwrap().events[0].event.source, Source::Api);
    spool.opened.close().await;
    assert_eq!(Inspector::open(path).unwrap().verify().unwrap().problems, [""; 0]);
}

#[tokio::test]
async fn a_spool_of_format_4_is_converted_with_its_events() {
    let (_folder, path) = of_format_4();
    let unconverted = Inspector::open(&path).map(|_| ()).unwrap_err();
    assert!(matches!(unconverted, OpenError::Unconverted { found: 4, .. }), "{unconverted}");
    assert_converted(&path).await;
}

#[tokio::test]
async fn a_conversion_that_was_killed_is_done_again() {
    let (_folder, path) = of_format_4();
    let killed = path.with_file_name("killed.db");
    let converting = Connection::open(&path).unwrap();
    // With so little memory SQLite writes the transaction into the log before it is committed.
    converting
        .execute_batch(
            "PRAGMA cache_size = 1; BEGIN IMMEDIATE; ALTER TABLE event ADD COLUMN source INTEGER NOT NULL DEFAULT 0",
        )
        .unwrap();
    let sql = format!("{}; PRAGMA user_version = 5", subjects::SCHEMA);
    converting.execute_batch(&sql).unwrap();
    for suffix in ["", "-wal"] {
        std::fs::copy(sibling(&path, suffix), sibling(&killed, suffix)).unwrap();
    }
    drop(converting);
    assert_converted(&killed).await;
}

#[tokio::test]
async fn a_damaged_spool_of_format_4_is_recovered_with_its_events() {
    let (_folder, path) = of_format_4();
    crate::spool::recovery::request(&path);
    assert_converted(&path).await;
}

/// The whole schema in the first page: then no damage of another page makes every table unreadable.
#[tokio::test]
async fn the_schema_fits_into_the_first_page() {
    const LEAF: u8 = 13;
    let (folder, converted) = of_format_4();
    let new = folder.path().join("new.db");
    for path in [converted, new] {
        Following::open(&path).opened.close().await;
        // Behind the header of the file is that of its first page.
        assert_eq!(std::fs::read(&path).unwrap()[100], LEAF, "{}", path.display());
    }
}

#[tokio::test]
async fn a_recovery_keeps_the_source_of_events_and_what_is_known_of_subjects() {
    let spool = Following::new();
    spool.webhook("a", Began, 0, START).await;
    let made = spool.stored("a", Succeeded, START + 1).await;
    spool.webhook("b", Began, 0, START).await;
    let before = [spool.state("a").await, spool.state("b").await];
    spool.spool().recover_at_next_start();
    let spool = spool.reopen().await;
    assert_eq!([spool.state("a").await, spool.state("b").await], before);
    let sources = spool.spool().pending_after(0, 10).await.unwrap().events;
    let sources: Vec<_> = sources.iter().map(|stored| stored.event.source).collect();
    assert_eq!(sources, [Source::Webhook, Source::Api, Source::Webhook]);
    let late = spool.webhook("a", Succeeded, 1, START + 2).await;
    assert_eq!(late, Receipt { duplicate: true, ..made });
    spool.opened.close().await;
}

/// Fills the root page of a table with nonsense.
fn destroy(path: &Path, table: &str) {
    let connection = Connection::open(path).unwrap();
    connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())).unwrap();
    let sql = "SELECT rootpage FROM sqlite_schema WHERE name = ?1";
    let root: usize = connection.query_row(sql, [table], |row| row.get(0)).unwrap();
    drop(connection);
    let mut bytes = std::fs::read(path).unwrap();
    bytes[(root - 1) * 4096..root * 4096].fill(0xa5);
    std::fs::write(path, bytes).unwrap();
}

#[tokio::test]
async fn unreadable_subjects_and_hints_cost_no_event_and_no_start() {
    for table in ["subject", "subject_open", "subject_last", "hint"] {
        let spool = Following::new();
        spool.webhook("a", Began, 0, START).await;
        spool.stored("a", Succeeded, START + 1).await;
        spool.spool().offer_hint(hint("b", Began, START, HintTrust::Signed));
        let Following { opened, _folder: folder, path } = spool;
        opened.close().await;
        destroy(&path, table);
        // Found at the start, or by the first webhook, which is refused; the next start recovers the file then.
        for _ in 0..2 {
            let spool = Following::open(&path);
            let _ = spool.spool().append(webhook("c", Began, 0, START), None).await;
            spool.spool().offer_hint(hint("d", Began, START, HintTrust::Signed));
            let Following { opened, .. } = spool;
            drop(opened.spool);
            let _ = opened.end.await;
        }
        let spool = Following::open(&path);
        assert!(!spool.webhook("d", Began, 0, START).await.duplicate, "{table}");
        assert_eq!((spool.accepted(), spool.spool().status().lost()), (4, 0), "{table}");
        spool.opened.close().await;
        assert_eq!(Inspector::open(&path).unwrap().verify().unwrap().problems, [""; 0], "{table}");
        drop(folder);
    }
}

/// An end that is lost must not count as known.
#[tokio::test]
async fn after_a_loss_only_open_subjects_are_kept() {
    let spool = Following::new();
    spool.webhook("a", Began, 0, START).await;
    spool.webhook("b", Began, 0, START).await;
    spool.webhook("b", Succeeded, 0, START + 1).await;
    Connection::open(&spool.path).unwrap().execute_batch("DELETE FROM event WHERE seq = 3").unwrap();
    spool.spool().recover_at_next_start();
    let spool = spool.reopen().await;
    assert_eq!(spool.spool().status().lost(), 1);
    assert_eq!((spool.state("a").await.is_some(), spool.state("b").await), (true, None));
    spool.stored("b", Succeeded, START + 2).await;
    spool.opened.close().await;
}
