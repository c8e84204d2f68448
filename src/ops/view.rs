//! Collects the data of `/api`, the console and `/metrics` from the relay's parts, and acts on parked events.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use thiserror::Error;
use tokio::time::timeout;
use uuid::Uuid;

use super::answers::{Broker, Facts, Queue, Refusal, TurnedAway, certificate_level, judge};
use super::history::{Counters, Held, History, Range};
use super::history_file::HistoryFile;
use super::notify::Notifier;
use super::queues::Unattended;
use super::record::{Marks, Point};
use super::refusals::UNRECOGNISABLE;
use super::report::{
    BrokerReport, CertificateReport, EventReport, EventState, HistoryReport, LastReport, ParkedEvent, ParkedReport,
    RefusalReport, Report, SecretReport, SpoolReport, SubjectReport, SubjectsReport, TypeReport, WebhookReport,
    matches,
};
use crate::drift::Drift;
use crate::health::Health;
use crate::logging;
use crate::metrics::Metrics;
use crate::publisher::{BrokerState, ConnectionEventKind, Status, WatchState};
use crate::recent::{Arrival, Counts, Losses, Recent};
use crate::reconcile::Reconcile;
use crate::server::Admission;
use crate::signature::Verifier;
use crate::spool::{ChangeError, Inspector, Ledger, OpenError, ReadError, Spool, Undelivered, sibling};
use crate::subject::{Kind, Subject};
use crate::tls;
use crate::topology::QueueRole;

const MINUTE: Duration = Duration::from_secs(60);

/// How long status and metrics wait for the age of the oldest event.
const AGE_PATIENCE: Duration = Duration::from_secs(1);

const EVENTS_MAX: usize = 200;
const PARKED_MAX: u64 = 100;

/// The relay's parts whose state is shown.
#[derive(Clone)]
pub(crate) struct Sources {
    pub spool: Spool,
    pub health: Health,
    pub broker: Arc<Status>,
    pub recent: Arc<Recent>,
    pub drift: Arc<Drift>,
    pub verifier: Arc<Verifier>,
    /// Connections to the public listener.
    pub connections: Arc<Admission>,
    /// TLS of the public listener.
    pub tls: Option<Arc<tls::Server>>,
    pub metrics: Arc<Metrics>,
    pub notifier: Arc<Notifier>,
    /// Nothing without `reconcile.api_key`.
    pub reconcile: Option<Arc<Reconcile>>,
    /// What tells this relay from its replicas.
    pub identity: Identity,
    /// The configured addresses of RabbitMQ, without passwords.
    pub broker_urls: Vec<String>,
}

/// Where this relay runs.
#[derive(Clone, Debug, Default)]
pub(crate) struct Identity {
    /// The name of this machine.
    pub host: String,
    /// The address of the public listener.
    pub listen: String,
}

/// The state of the relay, as operators see it.
pub(super) struct View {
    sources: Sources,
    started: (Instant, Timestamp),
    history: Mutex<History>,
    history_file: Arc<Mutex<HistoryFile>>,
    /// When the connection to RabbitMQ last changed before the last sample; `None`: no sample was taken yet.
    marked: Mutex<Option<Option<Timestamp>>>,
    unattended: Mutex<Unattended>,
}

/// Why a request could not be answered.
#[derive(Debug, Error)]
pub(super) enum ViewError {
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error(transparent)]
    Change(#[from] ChangeError),
    #[error("reading the spool was interrupted")]
    Interrupted,
}

/// What an operator may do with a parked event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    Retry,
    Remove,
}

impl View {
    pub(super) fn new(sources: Sources) -> Self {
        let (history_file, records) = HistoryFile::open(sibling(&sources.spool.path(), ".history"), Timestamp::now());
        let view = Self {
            sources,
            started: (Instant::now(), Timestamp::now()),
            history: Mutex::new(History::with(records)),
            history_file: Arc::new(Mutex::new(history_file)),
            marked: Mutex::default(),
            unattended: Mutex::default(),
        };
        // The first call only stores the counters.
        view.sample();
        view
    }

    pub(super) fn health(&self) -> &Health {
        &self.sources.health
    }

    pub(super) fn notifier(&self) -> Arc<Notifier> {
        Arc::clone(&self.sources.notifier)
    }

    /// Adds a point to the charts, and returns it.
    pub(super) fn sample(&self) -> Option<Point> {
        // How long queues have had no worker is measured also while nobody asks.
        let watch = self.sources.broker.watch();
        self.queues(&watch, Instant::now());
        let ledger = self.sources.spool.status().ledger();
        let counters = self.counters(&self.sources.recent.counts(), ledger.confirmed);
        let lags = self.sources.broker.take_lags();
        let held = Held {
            depth: ledger.pending,
            bytes: self.sources.spool.status().used_bytes(),
            queued: messages(&watch, &[QueueRole::Work]),
            dead: messages(&watch, &[QueueRole::Dead, QueueRole::Unrouted]),
            marks: self.marks(),
        };
        let added = self.history().add(counters, held, &lags, Timestamp::now(), Instant::now())?;
        // While the disk does not answer, records are dropped.
        if !matches!(self.history_file.try_lock(), Err(TryLockError::WouldBlock)) {
            let file = Arc::clone(&self.history_file);
            tokio::task::spawn_blocking(move || {
                file.lock().unwrap_or_else(PoisonError::into_inner).write(&added.record);
            });
        }
        Some(added.point)
    }

    /// What happened since the last sample. The first sample is not a point, so the second one has the start.
    fn marks(&self) -> Marks {
        let timeline = self.sources.broker.timeline();
        let mut marked = self.marked.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(before) = marked.replace(timeline.first().map(|event| event.at)) else { return Marks::default() };
        let new = || timeline.iter().take_while(|event| Some(event.at) != before);
        Marks {
            started: self.history().is_empty(),
            lost: new().any(|event| event.what == ConnectionEventKind::Lost),
            blocked: new().any(|event| event.what == ConnectionEventKind::Blocked),
        }
    }

    pub(super) fn history_report(&self, range: Range) -> HistoryReport {
        HistoryReport {
            range: range.name(),
            seconds: range.seconds(),
            interval_seconds: range.interval_seconds(),
            points: self.history().points(range, Timestamp::now()),
        }
    }

    pub(super) async fn report(&self) -> Report {
        let (status, broker, counts) =
            (self.sources.spool.status(), self.sources.broker.snapshot(), self.sources.recent.counts());
        let now = Timestamp::now();
        let oldest = self.oldest_age(now).await.flatten();
        let ledger = status.ledger();
        let (waiting, max_bytes) = (self.sources.broker.waiting(), self.sources.spool.max_bytes());
        let spool = SpoolReport::new(status, waiting, max_bytes, oldest);
        // Events that wait behind a parked one are not late: the parked one is reported.
        let facts = self.facts(&ledger, oldest.filter(|_| ledger.pending > waiting), &broker, &counts, now);
        let judgement = judge(&facts);
        let (started, started_at) = self.started;
        Report {
            version: env!("CARGO_PKG_VERSION"),
            host: self.sources.identity.host.clone(),
            listen: self.sources.identity.listen.clone(),
            now,
            started_at,
            uptime_seconds: started.elapsed().as_secs(),
            ready: facts.blocker.is_none(),
            draining: facts.draining,
            headline: judgement.headline,
            answers: judgement.answers,
            refusing: facts.refusing().is_some(),
            refusals: RefusalReport::list(&counts),
            webhooks: WebhookReport::new(&counts),
            last: LastReport::new(&counts, self.sources.broker.last_confirm()),
            spool,
            broker: BrokerReport {
                state: broker,
                urls: self.sources.broker_urls.clone(),
                in_flight: self.sources.broker.in_flight(),
            },
            watch: self.sources.broker.watch(),
            timeline: self.sources.broker.timeline(),
            types: TypeReport::list(&counts),
            unexpected: self.sources.drift.found(),
            secrets: SecretReport::list(&counts, self.sources.verifier.secrets()),
            certificate: self.certificate(now),
            log_filter: logging::filter(),
            notify: self.sources.notifier.report(),
            reconcile: self.sources.reconcile.as_ref().map(|reconcile| reconcile.status()),
        }
    }

    fn facts(
        &self,
        ledger: &Ledger,
        oldest: Option<f64>,
        broker: &BrokerState,
        counts: &Counts,
        now: Timestamp,
    ) -> Facts {
        let age = |at: Timestamp| now.duration_since(at).unsigned_abs();
        let (max_bytes, counters) = (self.sources.spool.max_bytes(), self.counters(counts, ledger.confirmed));
        let watch = self.sources.broker.watch();
        let queues = self.queues(&watch, Instant::now());
        let history = self.history();
        let last_minute = history.recent_increase(MINUTE, &counters);
        Facts {
            uptime: self.started.0.elapsed(),
            draining: self.sources.health.is_draining(),
            blocker: self.sources.health.blocker(),
            ledger: *ledger,
            damaged: self.sources.spool.status().lost(),
            used: self.sources.spool.status().used_bytes(),
            max_bytes,
            disk: self.sources.spool.status().reason(),
            oldest: oldest.map(Duration::from_secs_f64),
            outlook: history.outlook(max_bytes),
            broker: Broker {
                connected: broker.connected,
                blocked: broker.blocked.clone(),
                error: broker.error.clone(),
                unreachable: broker.unreachable,
                age: age(broker.since),
                failing: self.sources.broker.failing_since().map(age),
            },
            last_confirm: self.sources.broker.last_confirm().map(age),
            last_accepted: counts.last_accepted.map(age),
            accepted_last_minute: last_minute.accepted,
            confirmed_last_minute: last_minute.confirmed,
            last_5_minutes: history.window(5 * MINUTE, &counters),
            last_30_minutes: history.window(30 * MINUTE, &counters),
            last_hour: history.window(60 * MINUTE, &counters),
            certificate_days: self.certificate(now).map(|certificate| days(certificate.expires_at, now)),
            turned_away: turned_away(counts, &self.sources.recent.losses(now), now),
            queues,
            missing: watch.missing,
            unwatched: watch.off,
            reconcile: self.sources.reconcile.as_ref().map(|reconcile| reconcile.status()).unwrap_or_default(),
        }
    }

    fn counters(&self, counts: &Counts, confirmed: u64) -> Counters {
        Counters {
            accepted: counts.accepted + counts.duplicates,
            refused: counts.refused.values().sum(),
            refused_by_code: counts.mistaken(),
            other_protocol: self.sources.connections.other_protocol(),
            failed: self.sources.connections.failures(),
            confirmed,
        }
    }

    fn queues(&self, watch: &WatchState, now: Instant) -> Vec<Queue> {
        self.unattended.lock().unwrap_or_else(PoisonError::into_inner).queues(watch, now)
    }

    fn certificate(&self, now: Timestamp) -> Option<CertificateReport> {
        let expires_at = self.sources.tls.as_ref()?.identity().expires_at;
        let days = days(expires_at, now);
        Some(CertificateReport { expires_at, days_left: days.floor() as i64, level: certificate_level(days) })
    }

    /// The latest events that match `find`, newest first.
    pub(super) async fn events(&self, find: &str) -> Result<Vec<EventReport>, ReadError> {
        let found = self.sources.recent.latest(EVENTS_MAX, |arrival| matches(arrival, find));
        let seqs = found.iter().map(|arrival| arrival.seq).collect();
        let undelivered = self.sources.spool.undelivered(seqs).await?;
        let undelivered: HashMap<u64, Undelivered> = undelivered.into_iter().map(|event| (event.seq, event)).collect();
        let confirms: HashMap<u64, Timestamp> = self.sources.broker.confirms().into_iter().collect();
        let report = |arrival: &Arrival| {
            let settled_at = confirms.get(&arrival.seq).copied();
            let undelivered = undelivered.get(&arrival.seq);
            let state = match (settled_at, undelivered.map(|event| event.parked)) {
                // Confirmed, though perhaps not yet deleted from the spool.
                (Some(_), _) => EventState::Confirmed,
                (None, Some(true)) => EventState::Parked,
                (None, Some(false)) => EventState::Pending,
                (None, None) if self.sources.recent.was_removed(arrival.id) => EventState::Removed,
                (None, None) => EventState::Gone,
            };
            let waits_behind = undelivered.and_then(|event| event.waits_behind);
            let waits_behind = waits_behind.filter(|_| state == EventState::Pending);
            EventReport { waits_behind, ..EventReport::new(arrival, state, settled_at) }
        };
        Ok(found.iter().map(report).collect())
    }

    /// What is known of the scan and the prediction that `find` names by its id or as `scan:ID`.
    pub(super) async fn subjects(&self, find: &str) -> Result<SubjectsReport, ReadError> {
        let both = [Kind::Scan, Kind::Prediction].map(|kind| Subject::new(kind, find));
        let named = find.parse().map_or_else(|_| Vec::from_iter(both.into_iter().flatten()), |subject| vec![subject]);
        let on = self.sources.reconcile.is_some();
        let mut subjects = Vec::new();
        for subject in named.into_iter().filter(|_| on) {
            let state = self.sources.spool.subject(subject.clone()).await?;
            subjects.extend(state.map(|state| SubjectReport::new(&subject, &state)));
        }
        Ok(SubjectsReport { on, subjects })
    }

    /// What reconciles with Prism's API, if anything does.
    pub(super) fn reconcile(&self) -> Option<&Reconcile> {
        self.sources.reconcile.as_deref()
    }

    pub(super) async fn parked(&self) -> Result<ParkedReport, ViewError> {
        let path = self.sources.spool.path();
        let listing = move || {
            let mut parked = Vec::new();
            Inspector::of_running(&path)?.each(true, PARKED_MAX, |entry| parked.push(ParkedEvent::new(entry)))?;
            Ok(parked)
        };
        let parked = blocking(listing).await?;
        Ok(ParkedReport { total: self.sources.spool.status().ledger().parked, parked })
    }

    /// Retries or removes a parked event. Returns whether the event was parked.
    pub(super) async fn act(&self, action: Action, id: Uuid) -> Result<bool, ViewError> {
        let path = self.sources.spool.path();
        let done = blocking(move || {
            let mut inspector = Inspector::of_running_for_change(&path)?;
            let Some(seq) = inspector.parked(id)? else { return Ok(false) };
            Ok(match action {
                Action::Retry => inspector.retry(seq)?,
                Action::Remove => inspector.remove_seq(seq)?,
            })
        })
        .await?;
        match action {
            Action::Retry if done => self.sources.broker.retry_parked(),
            Action::Remove if done => self.sources.recent.removed(id),
            Action::Retry | Action::Remove => {}
        }
        // The next request must see the change.
        self.sources.spool.flush().await;
        Ok(done)
    }

    /// Retries all parked events. Returns their number.
    pub(super) async fn retry_all(&self) -> Result<usize, ViewError> {
        let path = self.sources.spool.path();
        let retried = blocking(move || Ok(Inspector::of_running_for_change(&path)?.retry_all()?)).await?;
        self.sources.broker.retry_parked();
        self.sources.spool.flush().await;
        Ok(retried)
    }

    /// Removes all parked events if there are as many as the operator has seen. Returns their number, or what it is
    /// instead.
    pub(super) async fn remove_all(&self, seen: u64) -> Result<Result<usize, u64>, ViewError> {
        let path = self.sources.spool.path();
        let remove = move || Ok(Inspector::of_running_for_change(&path)?.remove_parked(seen)?);
        let removed = blocking(remove).await?;
        self.sources.spool.flush().await;
        Ok(removed.map(|ids| {
            ids.iter().for_each(|id| self.sources.recent.removed(*id));
            ids.len()
        }))
    }

    pub(super) async fn metrics(&self) -> String {
        let (ledger, broker) = (self.sources.spool.status().ledger(), self.sources.broker.snapshot());
        let (metrics, now) = (&self.sources.metrics, Timestamp::now());
        let flag = |flag: bool| f64::from(u8::from(flag));
        metrics.ready.set(flag(self.sources.health.blocker().is_none()));
        metrics.spool.events.set(ledger.pending as f64);
        metrics.spool.bytes.set(self.sources.spool.status().used_bytes() as f64);
        metrics.spool.log_bytes.set(self.sources.spool.status().log_bytes() as f64);
        metrics.spool.max_bytes.set(self.sources.spool.max_bytes() as f64);
        metrics.spool.parked_events.set(ledger.parked as f64);
        metrics.spool.lost_events.set(self.sources.spool.status().lost() as f64);
        // The age keeps its last value while it cannot be read.
        if let Some(age) = self.oldest_age(now).await {
            metrics.spool.oldest_age.set(age.unwrap_or(0.0));
        }
        let counts = self.sources.connections.counts();
        metrics.connections.half_open.set(counts.half_open as f64);
        metrics.connections.established.set(counts.established as f64);
        if let Some(certificate) = self.certificate(now) {
            metrics.certificate_days_left(days(certificate.expires_at, now));
        }
        for queue in self.sources.broker.watch().queues {
            metrics.queue(&queue.name, queue.messages, queue.consumers);
        }
        metrics.broker.connected.set(flag(broker.connected));
        metrics.broker.blocked.set(flag(broker.blocked.is_some()));
        metrics.render()
    }

    /// The age of the oldest pending event in seconds; no answer if it cannot be read now. Status and metrics matter
    /// most while the disk hangs, and then each read would hold a thread.
    async fn oldest_age(&self, now: Timestamp) -> Option<Option<f64>> {
        if self.sources.spool.status().is_stalled() {
            return None;
        }
        let accepted_ms = timeout(AGE_PATIENCE, self.sources.spool.oldest_pending_ms()).await.ok()?.ok()?;
        Some(accepted_ms.map(|accepted_ms| (now.as_millisecond() - accepted_ms).max(0) as f64 / 1000.0))
    }

    fn history(&self) -> std::sync::MutexGuard<'_, History> {
        self.history.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The messages in all queues of these roles together, also in full ones; `None` if those of one are not known.
fn messages(watch: &WatchState, roles: &[QueueRole]) -> Option<u64> {
    let queues = watch.queues.iter().filter(|queue| roles.contains(&queue.role));
    let counts: Option<Vec<u64>> = queues.map(|queue| queue.messages.map(u64::from)).collect();
    counts.filter(|counts| !counts.is_empty()).map(|counts| counts.iter().sum())
}

fn turned_away(counts: &Counts, losses: &Losses, now: Timestamp) -> TurnedAway {
    let refusal =
        |(at, reason): (Timestamp, &'static str)| Refusal { reason, age: now.duration_since(at).unsigned_abs() };
    let last = UNRECOGNISABLE.iter().filter_map(|code| Some((*counts.refused_at.get(code)?, *code))).max();
    TurnedAway {
        waiting: losses.waiting,
        lost: losses.lost,
        unrecognisable: UNRECOGNISABLE.iter().filter_map(|code| counts.refused.get(code)).sum(),
        last_lost: losses.last.map(refusal),
        last_waiting: losses.last_waiting.map(refusal),
        last_unrecognisable: last.map(refusal),
    }
}

fn days(until: Timestamp, now: Timestamp) -> f64 {
    until.duration_since(now).as_secs_f64() / 86_400.0
}

/// Runs `work` on a thread that may wait for the disk.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ViewError> + Send + 'static,
) -> Result<T, ViewError> {
    tokio::task::spawn_blocking(work).await.map_err(|_| ViewError::Interrupted)?
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use tokio_util::sync::CancellationToken;

    use super::super::answers;
    use super::super::notify::Settings as NotifySettings;
    use super::super::record::Record;
    use super::*;
    use crate::publisher::QueueState;
    use crate::spool::{self, Durability, dedupe};

    /// A view of a relay without events in this folder.
    fn view(folder: &Path) -> View {
        let (metrics, path) = (Arc::new(Metrics::new()), folder.join("spool.db"));
        let notifier = Notifier::new(NotifySettings::default(), String::new(), &path);
        let settings =
            spool::Settings { path, max_bytes: 1 << 20, durability: Durability::Process, body_bytes_max: 1024 };
        let dedupe = dedupe::Settings { window: Duration::ZERO, entries_max: 0 };
        let (spool, _) = Spool::open(&settings, &dedupe, None, Arc::clone(&metrics)).unwrap();
        View::new(Sources {
            health: Health::new(spool.clone(), CancellationToken::new()),
            spool,
            broker: Arc::new(Status::new()),
            recent: Arc::default(),
            drift: Arc::default(),
            verifier: Arc::new(Verifier::new(&[], false, MINUTE)),
            connections: Admission::new(1, 1, Vec::new()),
            tls: None,
            metrics,
            notifier: Arc::new(notifier),
            reconcile: None,
            identity: Identity::default(),
            broker_urls: Vec::new(),
        })
    }

    #[tokio::test]
    async fn the_time_without_a_worker_is_measured_while_nobody_asks() {
        let folder = tempfile::tempdir().unwrap();
        let view = view(folder.path());
        let (messages, consumers) = (Some(5), Some(0));
        let queue =
            QueueState { name: "prism.scan".to_owned(), role: QueueRole::Work, messages, consumers, trouble: None };
        let watch = WatchState { queues: vec![queue], ..WatchState::default() };
        view.sources.broker.on_look(watch.clone(), MINUTE);
        assert_eq!(super::messages(&watch, &[QueueRole::Work]), Some(5));
        assert_eq!(super::messages(&watch, &[QueueRole::Dead]), None);
        view.sample();
        match view.queues(&watch, Instant::now() + 5 * MINUTE)[0].state {
            answers::QueueState::Counted { unattended, .. } => assert!(unattended >= 5 * MINUTE, "{unattended:?}"),
            ref other => panic!("{other:?}"),
        }
    }

    /// The writer keeps reads away while it copies the log, which lasts as long as the disk does not answer.
    #[tokio::test]
    async fn a_disk_that_hangs_does_not_hold_up_the_status() {
        let folder = tempfile::tempdir().unwrap();
        let view = view(folder.path());
        let held = view.sources.spool.hold_reads();
        let shown = timeout(10 * AGE_PATIENCE, async { (view.report().await, view.metrics().await) }).await;
        drop(held);
        let (report, metrics) = shown.expect("the status and the metrics come without the age");
        assert_eq!(report.headline.text, "There is no connection to RabbitMQ yet.");
        assert!(metrics.contains("prism_relay_spool_events 0"), "{metrics}");
    }

    /// A write that panicked must not end the history.
    #[tokio::test]
    async fn the_history_goes_on_after_a_panic() {
        let folder = tempfile::tempdir().unwrap();
        let view = view(folder.path());
        let file = Arc::clone(&view.history_file);
        let write = std::thread::spawn(move || {
            let _file = file.lock().unwrap();
            panic!("in a write");
        });
        assert!(write.join().is_err());
        let path = folder.path().join("spool.db.history");
        let before = std::fs::read(&path).unwrap();
        view.sample();
        for _ in 0..500 {
            if std::fs::read(&path).unwrap() != before {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("nothing was written in 5 s");
    }

    #[tokio::test]
    async fn the_charts_go_on_after_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let at = Timestamp::now().as_second() - 120;
        let path = folder.path().join("spool.db.history");
        let (mut file, _) = HistoryFile::open(path, Timestamp::now());
        file.write(&Record { at, depth: 7, ..Record::default() });
        let view = view(folder.path());
        for range in [Range::Minutes15, Range::Hours2, Range::Hours24] {
            let points = view.history_report(range).points;
            assert_eq!((points.len(), points[0].at, points[0].depth), (1, at, 7), "{range:?}");
        }
        let next = view.sample().unwrap();
        assert!(next.marks.started && !view.sample().unwrap().marks.started, "the start is marked once");
    }

    #[test]
    fn another_refusal_does_not_hide_when_one_could_not_be_recognised() {
        let (recent, start) = (Recent::default(), Timestamp::UNIX_EPOCH);
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        for (second, code) in [(10, "overloaded"), (20, "request-timeout"), (30, "not-found"), (40, "spool-full")] {
            recent.refused(code, at(second));
        }
        let found = turned_away(&recent.counts(), &recent.losses(at(50)), at(50));
        let last = Refusal { reason: "request-timeout", age: Duration::from_secs(30) };
        assert_eq!(found, TurnedAway { unrecognisable: 2, last_unrecognisable: Some(last), ..TurnedAway::default() });
    }
}
