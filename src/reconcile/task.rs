//! The task that reconciles: looks up what is overdue, asks for it, takes in what is missing. Any of it may be cut off
//! at any moment, by a stop or a crash: an event that was made is on disk together with the fact that it was made.

use std::collections::HashSet;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};
use tokio::sync::{Notify, mpsc};
use tokio::time::sleep_until;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use super::answer::{Prediction, Reply, Scan};
use super::api::PrismApi;
use super::handle::{Effect, ORDERS_MAX, Order, Reconcile};
use super::meaning::{Meaning, body, meaning};
use super::schedule::{Conclusion, Next, QUESTIONS_MAX, Question, Reason, Schedule, UNSIGNED_MAX};
use super::settings::Settings;
use super::status::{Failing, Outcome, Report, Shared};
use crate::event::{Envelope, Event};
use crate::http_client::HttpClient;
use crate::log_limiter::LogLimiter;
use crate::metrics::Metrics;
use crate::recent::Recent;
use crate::spool::{HintTrust, MadeReceipt, Note, ReadError, Spool};
use crate::subject::{Kind, Progress, Subject};
use crate::text::{chain, clean, span};

/// How long after `reconcile.after` a subject may be open before operators are warned: by then the API was asked for
/// it.
const STUCK_AFTER: Duration = Duration::from_secs(600);
/// Stuck subjects that are named.
const STUCK_NAMED_MAX: usize = 3;
/// The time of which operators see how many events came by the API.
const DAY: SignedDuration = SignedDuration::from_hours(24);
/// Statuses that are not documented and are named in the log, once each.
const STATUSES_MAX: usize = 20;
/// Longer words are cut in the log.
const STATUS_CHARS_MAX: usize = 40;

/// Asks Prism's API, and takes in what webhooks did not bring.
pub(crate) struct Reconciler {
    settings: Settings,
    spool: Spool,
    recent: Arc<Recent>,
    metrics: Arc<Metrics>,
    shared: Arc<Reconcile>,
    orders: mpsc::Receiver<Order>,
    schedule: Schedule,
    /// Made again for each look.
    client: Option<HttpClient>,
    /// Statuses that are not documented, and that the log has named.
    named: HashSet<String>,
    log_limiter: LogLimiter,
}

/// What came of a question.
struct Finding {
    conclusion: Conclusion,
    /// The type of the missing event.
    event: Option<&'static str>,
    /// The status in the API.
    state: Option<String>,
    /// Why there is no usable answer.
    why: String,
}

impl Finding {
    fn new(conclusion: Conclusion) -> Self {
        Self { conclusion, event: None, state: None, why: String::new() }
    }

    fn because(conclusion: Conclusion, why: impl Into<String>) -> Self {
        Self { why: why.into(), ..Self::new(conclusion) }
    }
}

/// A subject as the API shows it.
struct Shown {
    status: String,
    updated_at: Option<String>,
    scan_id: String,
    /// Nothing for a prediction, whose scan is another question.
    scan: Option<Scan>,
}

impl Reconciler {
    /// `None` without a key.
    pub(crate) fn new(settings: &Settings, spool: Spool, recent: Arc<Recent>, metrics: Arc<Metrics>) -> Option<Self> {
        let key = settings.api_key.clone()?;
        let (sender, orders) = mpsc::channel(ORDERS_MAX);
        let shared = Arc::new(Reconcile {
            api: PrismApi::new(settings.api_url.clone(), key),
            orders: sender,
            new_key: Notify::new(),
            status: Shared::default(),
        });
        Some(Self {
            settings: settings.clone(),
            spool,
            recent,
            metrics,
            shared,
            orders,
            schedule: Schedule::new(settings, Instant::now()),
            client: None,
            named: HashSet::new(),
            log_limiter: LogLimiter::default(),
        })
    }

    /// What other parts see of it.
    pub(crate) fn shared(&self) -> Arc<Reconcile> {
        Arc::clone(&self.shared)
    }

    /// Reconciles until `stop`.
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        info!(api = self.settings.api_url.as_str(), "reconciling with Prism's API");
        let Some(never) = stop.run_until_cancelled(self.work()).await else { return };
        match never {}
    }

    async fn work(&mut self) -> Infallible {
        loop {
            match self.schedule.next(Instant::now()) {
                Next::Look => {
                    if let Err(error) = self.look().await {
                        self.on_unreadable(&error);
                    }
                }
                Next::Ask(question) => {
                    let finding = self.answer(&question, Effect::Repair).await;
                    self.conclude(&question, &finding).await;
                }
                Next::WaitUntil(at) => self.wait(at).await,
            }
        }
    }

    /// Waits, and carries out what an operator orders meanwhile.
    async fn wait(&mut self, until: Instant) {
        let may_order = self.schedule.may_take_order(Instant::now());
        tokio::select! {
            Some(order) = self.orders.recv(), if may_order => self.obey(order).await,
            () = self.shared.new_key.notified() => {
                info!("reconcile.api_key was replaced");
                self.schedule.on_new_key(Instant::now());
                self.shared.status.change(|status| status.refused_since = None);
                self.metrics.reconcile.stopped.set(0.0);
            }
            () = sleep_until(until.into()) => {}
        }
    }

    /// The spool cannot say what is overdue, so nothing is asked. Damage is repaired by the next start.
    fn on_unreadable(&mut self, error: &ReadError) {
        let reason = chain(error);
        let finding = Finding::because(Conclusion::Undecided, format!("the spool cannot be read: {reason}"));
        self.show_failure(&finding, Timestamp::now());
        if error.is_damage() {
            self.spool.recover_at_next_start();
            if let Some(unreported) = self.log_limiter.due("damage", Instant::now()) {
                error!(
                    reason,
                    unreported,
                    "the spool's table of scans and predictions is damaged: events that webhooks lose do not come \
                     back. Webhooks are accepted and delivered. Restart the relay: the next start repairs the file"
                );
            }
        }
    }

    /// Finds the questions of the next interval, and counts.
    async fn look(&mut self) -> Result<(), ReadError> {
        self.client = None;
        let (spool, now) = (&self.spool, Timestamp::now());
        let now_ms = now.as_millisecond();
        let before = |age: Duration| now_ms.saturating_sub(i64::try_from(age.as_millis()).unwrap_or(i64::MAX));
        let (overdue_ms, stuck_after) = (before(self.settings.after), self.settings.after + STUCK_AFTER);
        spool.note(Note::Purge { now_ms }).await;
        // The notes of the last interval count.
        spool.flush().await;
        let counts = spool.subject_counts(overdue_ms).await?;
        let stuck = spool.subject_counts(before(stuck_after)).await?.overdue;
        let named = spool.overdue(before(stuck_after), i64::MAX, STUCK_NAMED_MAX).await?;
        let by_api = spool.told_by_api(before(DAY.unsigned_abs())).await?;
        let refused = self.schedule.is_refused();
        self.metrics.reconcile.open.set(counts.open as f64);
        self.metrics.reconcile.overdue.set(counts.overdue as f64);
        self.shared.status.change(|status| {
            (status.open, status.overdue, status.stuck) = (counts.open, counts.overdue, stuck);
            status.stuck_subjects = named.iter().map(|(subject, _)| subject.to_string()).collect();
            status.stuck_after_seconds = stuck_after.as_secs();
            status.by_api_last_day = by_api;
        });
        if refused {
            return Ok(());
        }
        let overdue = spool.overdue(overdue_ms, now_ms, QUESTIONS_MAX).await?;
        let signed = spool.hints(HintTrust::Signed, now_ms, QUESTIONS_MAX).await?;
        let unsigned = spool.hints(HintTrust::Unsigned, now_ms, UNSIGNED_MAX).await?;
        self.schedule.found(overdue, signed, unsigned);
        Ok(())
    }

    /// Answers an operator's question.
    async fn obey(&mut self, order: Order) {
        self.schedule.on_order();
        let question = Question { subject: order.subject, reason: Reason::Operator };
        let finding = match self.schedule.operator_may_ask(Instant::now()) {
            Ok(at) => {
                sleep_until(at.into()).await;
                self.answer(&question, order.effect).await
            }
            Err(left) => {
                let why = format!("Prism's API asks for a pause; try again in {}", span(whole_seconds(left)));
                Finding::because(Conclusion::Busy, why)
            }
        };
        match order.effect {
            Effect::Repair => self.conclude(&question, &finding).await,
            Effect::Report => self.show(&finding),
        }
        let is_busy = finding.conclusion == Conclusion::Busy;
        let pause = self.schedule.operator_may_ask(Instant::now()).err().filter(|_| is_busy);
        // The operator may be gone.
        let _ = order.answer.send(report(&question, &finding, order.effect, pause));
    }

    /// Asks the API, and takes in the missing event.
    async fn answer(&mut self, question: &Question, effect: Effect) -> Finding {
        let subject = &question.subject;
        let state = match self.spool.subject(subject.clone()).await {
            Ok(state) => state,
            Err(error) => return Finding::because(Conclusion::Undecided, chain(&error)),
        };
        if matches!(question.reason, Reason::Overdue { .. }) && state.is_none_or(|state| !state.is_open) {
            return Finding::new(Conclusion::Known);
        }
        let shown = match self.shown(question).await {
            Ok(shown) => shown,
            Err(finding) => return finding,
        };
        let status = clean(&shown.status).chars().take(STATUS_CHARS_MAX).collect::<String>();
        let updated_at = shown.updated_at.as_deref();
        let finding = match meaning(&shown.status, updated_at, state.as_ref(), question.not_before()) {
            Meaning::Missing(step) => {
                let progress = Progress { subject: subject.clone(), step };
                match effect {
                    Effect::Report => {
                        let event = Some(progress.event_type());
                        Finding { event, ..Finding::new(Conclusion::Made(step)) }
                    }
                    Effect::Repair => self.repair(question, progress, shown).await,
                }
            }
            Meaning::Known => Finding::new(Conclusion::Known),
            Meaning::Pending => Finding::new(Conclusion::Pending),
            Meaning::Older => Finding::new(Conclusion::Older),
            Meaning::Undated => {
                Finding::because(Conclusion::Unusable, "the answer of Prism's API has no readable updatedAt")
            }
            Meaning::UnknownStatus => {
                self.name_status(&status);
                Finding::new(Conclusion::Pending)
            }
        };
        Finding { state: Some(status), ..finding }
    }

    /// The subject as the API shows it. The error is the end of the question.
    async fn shown(&mut self, question: &Question) -> Result<Shown, Finding> {
        let subject = &question.subject;
        Ok(match subject.kind() {
            Kind::Scan => {
                let scan = found(self.scan(question, subject.id()).await)?;
                Shown {
                    status: scan.status.clone(),
                    updated_at: scan.updated_at.clone(),
                    scan_id: subject.id().to_owned(),
                    scan: Some(scan),
                }
            }
            Kind::Prediction => {
                let Prediction { status, updated_at, scan_id, .. } = found(self.prediction(question).await)?;
                Shown { status, updated_at, scan_id, scan: None }
            }
        })
    }

    /// Makes the missing event, and hands it to the spool.
    async fn repair(&mut self, question: &Question, progress: Progress, shown: Shown) -> Finding {
        let scan = match shown.scan {
            Some(scan) => scan,
            None => match self.scan_of_prediction(question, &shown.scan_id).await {
                Ok(scan) => scan,
                Err(finding) => return finding,
            },
        };
        let (event_type, step, now) = (progress.event_type(), progress.step, Timestamp::now());
        let body = body(&progress, &shown.status, &scan, &shown.scan_id);
        let event = Event::made(body.clone(), progress.subject.key(), self.shared.api.is_tls(), now);
        match self.spool.append_made(event, progress).await {
            Ok(MadeReceipt::Stored(receipt)) => {
                self.metrics.event(Some(event_type));
                if let Ok(envelope) = Envelope::parse(&body) {
                    self.recent.made(receipt.seq, receipt.id, &envelope, now);
                }
                if let Some(unreported) = self.log_limiter.due("made", Instant::now()) {
                    let (subject, id) = (&question.subject, receipt.id);
                    info!(%subject, event_type, %id, unreported, "an event that no webhook brought came by the API");
                }
                Finding { event: Some(event_type), ..Finding::new(Conclusion::Made(step)) }
            }
            Ok(MadeReceipt::Known) => Finding::new(Conclusion::Known),
            Err(error) => {
                let why = format!("the spool takes no event now: {}", chain(&error));
                Finding::because(Conclusion::Undecided, why)
            }
        }
    }

    /// The scan of a prediction, which has the ids of the user.
    async fn scan_of_prediction(&mut self, question: &Question, scan_id: &str) -> Result<Scan, Finding> {
        let unusable = |why: String| Finding::because(Conclusion::Unusable, why);
        sleep_until(self.schedule.next_request().into()).await;
        match Subject::new(Kind::Scan, scan_id) {
            None => Err(unusable("the answer of Prism's API has a scanId that cannot be asked for".to_owned())),
            Some(scan) => match self.scan(question, scan.id()).await {
                Reply::Unknown => Err(unusable("Prism's API does not know the scan of the prediction".to_owned())),
                reply => found(reply),
            },
        }
    }

    /// Asks for the scan of a question, or for that of its prediction.
    async fn scan(&mut self, question: &Question, id: &str) -> Reply<Scan> {
        let reply = match self.client().await {
            Ok(client) => self.shared.api.scan(&client, id).await,
            Err(error) => Reply::Silent(error),
        };
        self.schedule.on_reply(&reply, question, Instant::now(), fastrand::f64());
        reply
    }

    /// Asks for the prediction of a question.
    async fn prediction(&mut self, question: &Question) -> Reply<Prediction> {
        let reply = match self.client().await {
            Ok(client) => self.shared.api.prediction(&client, question.subject.id()).await,
            Err(error) => Reply::Silent(error),
        };
        self.schedule.on_reply(&reply, question, Instant::now(), fastrand::f64());
        reply
    }

    async fn client(&mut self) -> Result<HttpClient, String> {
        if let Some(client) = &self.client {
            return Ok(client.clone());
        }
        let client = self.shared.api.client().await?;
        Ok(self.client.insert(client).clone())
    }

    /// Counts, notes and shows what came of a question.
    async fn conclude(&mut self, question: &Question, finding: &Finding) {
        let conclusion = finding.conclusion;
        let outcome = Outcome::of(conclusion, &question.reason);
        let metrics = &self.metrics.reconcile;
        metrics.outcome(outcome.position()).increment(1);
        if question.reason == Reason::Operator && matches!(conclusion, Conclusion::Made(_)) {
            metrics.by_operator.increment(1);
        }
        debug!(subject = %question.subject, outcome = outcome.text(), why = finding.why, "compared with Prism's API");
        if let Some(note) = question.note(conclusion, Timestamp::now(), self.settings.interval, fastrand::f64()) {
            self.spool.note(note).await;
        }
        if conclusion == Conclusion::Unknown && question.is_certain() {
            self.warn(
                "unknown",
                &question.subject.to_string(),
                "Prism's API does not know a scan or prediction that a signed webhook named; it is not asked for \
                 again. Check that reconcile.api_url and reconcile.api_key belong to the account of the webhooks",
            );
        }
        if !question.is_unsigned_hint() {
            self.show(finding);
        }
    }

    fn show(&self, finding: &Finding) {
        let now = Timestamp::now();
        self.show_key(finding.conclusion, now);
        self.show_failure(finding, now);
    }

    /// Says once that the key is refused, and once that it works again.
    fn show_key(&self, conclusion: Conclusion, now: Timestamp) {
        let is_refused = self.schedule.is_refused();
        let was_refused = self.shared.status.change(|status| {
            let before = status.refused_since;
            status.refused_since = is_refused.then(|| before.unwrap_or(now));
            before.is_some()
        });
        self.metrics.reconcile.stopped.set(f64::from(u8::from(is_refused)));
        match (was_refused, is_refused) {
            (false, true) => error!(
                status = if conclusion == Conclusion::Forbidden { 403 } else { 401 },
                "Prism's API refuses reconcile.api_key: events that webhooks lose do not come back. Set a valid key; \
                 nothing is asked until it changes"
            ),
            (true, false) => info!("Prism's API takes reconcile.api_key again"),
            (true, true) | (false, false) => {}
        }
    }

    /// Says once that the API gives no usable answer, and once that it does again.
    fn show_failure(&self, Finding { conclusion, why, .. }: &Finding, now: Timestamp) {
        let is_failing = match conclusion {
            Conclusion::Busy | Conclusion::Unusable | Conclusion::Undecided => true,
            Conclusion::Made(_)
            | Conclusion::Known
            | Conclusion::Older
            | Conclusion::Pending
            | Conclusion::Unknown
            | Conclusion::Forbidden
            | Conclusion::KeyRefused => false,
        };
        let was_failing = self.shared.status.change(|status| {
            let before = status.failing.take();
            let since = before.as_ref().map_or(now, |failing| failing.since);
            status.failing = is_failing.then(|| Failing { since, reason: why.clone() });
            before.is_some()
        });
        if is_failing && !was_failing {
            self.warn("failing", why, "cannot reconcile; trying again. Webhooks are not affected");
        }
    }

    fn warn(&self, kind: &'static str, reason: &str, what: &'static str) {
        if let Some(unreported) = self.log_limiter.due(kind, Instant::now()) {
            warn!(reason, unreported, "{what}");
        }
    }

    /// Names a status in the log that is not documented.
    fn name_status(&mut self, status: &str) {
        if self.named.len() < STATUSES_MAX && self.named.insert(status.to_owned()) {
            warn!(status, "Prism's API has a status that is not documented; it counts as not ended");
        }
    }
}

/// What the API found. The error is the end of the question.
fn found<T>(reply: Reply<T>) -> Result<T, Finding> {
    Err(match reply {
        Reply::Found(found) => return Ok(found),
        Reply::Unknown => Finding::new(Conclusion::Unknown),
        Reply::KeyRefused => Finding::because(Conclusion::KeyRefused, "Prism's API refuses reconcile.api_key (401)"),
        Reply::Forbidden => {
            Finding::because(Conclusion::Forbidden, "Prism's API does not allow this with reconcile.api_key (403)")
        }
        Reply::Busy(_) => Finding::because(Conclusion::Busy, "Prism's API has too much to do"),
        Reply::Unusable(why) => Finding::because(Conclusion::Unusable, why),
        Reply::Silent(why) => Finding::because(Conclusion::Undecided, why),
    })
}

/// The answer to an operator.
fn report(question: &Question, finding: &Finding, effect: Effect, pause: Option<Duration>) -> Report {
    let Finding { conclusion, event, state, why } = finding;
    let text = match (conclusion, event) {
        (Conclusion::Made(_), Some(event)) if effect == Effect::Report => format!("{event} is missing"),
        (Conclusion::Made(_), Some(event)) => format!("{event} was missing, and is published"),
        (Conclusion::Made(_), None) => "an event is missing".to_owned(),
        (Conclusion::Known | Conclusion::Older, _) => "no event is missing".to_owned(),
        (Conclusion::Pending, _) => "it has not ended".to_owned(),
        (Conclusion::Unknown, _) => "Prism's API does not know it".to_owned(),
        (
            Conclusion::KeyRefused
            | Conclusion::Forbidden
            | Conclusion::Busy
            | Conclusion::Unusable
            | Conclusion::Undecided,
            _,
        ) => why.clone(),
    };
    Report {
        subject: question.subject.to_string(),
        outcome: Outcome::of(*conclusion, &question.reason),
        event: *event,
        state: state.clone(),
        pause_seconds: pause.map(|left| whole_seconds(left).as_secs()),
        text,
    }
}

/// Rounds up, so that a wait of that length is long enough.
fn whole_seconds(left: Duration) -> Duration {
    Duration::from_secs(left.as_secs() + 1)
}
