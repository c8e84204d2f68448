//! Soak test of lost webhooks: the relay is away for longer than Prism tries, again and again, and asks Prism's API for
//! what it did not get. At the end every scan and prediction of which it heard has its end once, after its beginning.
//!
//! `tests/soak.sh --lost-webhooks` sets `PRISM_SOAK_MINUTES` and `PRISM_SOAK_SEED`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use fastrand::Rng;
use serde_json::json;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout_at;

use super::{length, pace, seed};
use crate::harness::eventually::poll;
use crate::harness::relay::Sender;
use crate::harness::samples::event;
use crate::harness::traffic::check_ledger;
use crate::harness::{Delivery, Node, PrismApi, Relay, SECRET, Setup, Trouble, Vhost, Wire, ports};

/// Prism's pauses between its tries (0, 5 and 30 s), ten times shorter.
const PAUSES: [Duration; 3] = [Duration::ZERO, Duration::from_millis(500), Duration::from_secs(3)];
/// Longer than all tries of an event.
const GIVES_UP_AFTER: f64 = 3.6;

/// Time between the beginnings of two subjects.
const BEGINS_EVERY: Duration = Duration::from_millis(200);
/// Maximum time between the beginning of a subject and its end, in seconds. `reconcile.after` is shorter.
const LASTS: f64 = 4.0;

/// A secret that Prism does not sign with.
const WRONG_SECRET: &str = "whsec_wrong_0123456789";

const QUEUES: [&str; 2] = ["prism.scan", "prism.future_me"];
const PROGRESS_EVERY: Duration = Duration::from_secs(10);
/// How long the relay may take for the last events once all is well.
const DRAIN: Duration = Duration::from_secs(180);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_ends_that_prism_gave_up_on_come_by_the_api_once_and_in_order() {
    let (length, seed) = (length(), seed());
    let (vhost, api) = (Vhost::new(Node::shared().await).await, PrismApi::start());
    let wire = Wire::new(vhost.address());
    let setup = api.asked_by(Setup::new(&vhost.url_through(&wire)));
    // A fixed port, because Prism has one URL.
    let setup = setup.set("http.listen", format!("127.0.0.1:{}", ports::free())).set("log.filter", "info");
    let relay = setup.set("shutdown.grace", "5s").start().await;
    relay.eventually_connected().await;

    let (sender, senders) = watch::channel(relay.sender());
    let prism = Arc::new(Prism { api, relay: senders, lives: Mutex::default() });
    let mut stage = Stage { relay, wire, sender, prism: Arc::clone(&prism), faults: BTreeMap::new(), seed };
    let end = Instant::now() + length;
    let (lives, ()) = tokio::join!(begin_lives(&prism, seed, end), stage.make_faults(end));
    let stuck = join(lives).await;
    let messages = settle(&stage, &vhost).await;

    let minutes = length.as_secs_f64() / 60.0;
    let verdict = Verdict::of(&prism.lives(), &messages);
    println!("lost webhooks: seed {seed}, {minutes:.1} minutes, {:?}; {verdict}", stage.faults);
    let spool = stage.relay.spool().await;
    check_ledger(&spool);
    assert_eq!((spool.pending, spool.parked), (0, 0), "{spool:?}");
    assert_eq!((stuck, verdict.violations), (0, Vec::new()));
}

// -- Prism ------------------------------------------------------------------------------------------------------------

/// Prism with its subjects: it posts webhooks, gives up on them, and knows the truth.
struct Prism {
    api: PrismApi,
    /// The sender of the current relay process.
    relay: watch::Receiver<Sender>,
    lives: Mutex<Vec<Life>>,
}

/// A scan or prediction: it begins and ends once.
#[derive(Default)]
struct Life {
    end: &'static str,
    /// The outcome of each webhook; none while it is tried.
    webhooks: [Option<Told>; 2],
}

/// What became of a webhook.
enum Told {
    Accepted { id: String, duplicate: bool },
    GivenUp,
}

impl Prism {
    fn lives(&self) -> MutexGuard<'_, Vec<Life>> {
        self.lives.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets a subject begin, last and end.
    async fn live(self: Arc<Self>, number: usize, end: &'static str, lasts: Duration) {
        self.know(number, "PROCESSING");
        let began = self.deliver(&body(number, "started")).await;
        self.lives()[number].webhooks[0] = Some(began);
        pace(lasts).await;
        self.know(number, if end == "failed" { "FAILED" } else { "READY" });
        let ended = self.deliver(&body(number, end)).await;
        self.lives()[number].webhooks[1] = Some(ended);
    }

    fn know(&self, number: usize, status: &str) {
        if is_prediction(number) {
            self.api.scan(&format!("scan-of-{number}"), "READY");
            self.api.prediction(&id(number), &format!("scan-of-{number}"), status);
        } else {
            self.api.scan(&id(number), status);
        }
    }

    /// Posts a webhook on Prism's schedule.
    async fn deliver(&self, body: &str) -> Told {
        for pause in [Duration::ZERO].into_iter().chain(PAUSES) {
            pace(pause).await;
            let sender = self.relay.borrow().clone();
            if let Ok(answer) = sender.post(body).await
                && answer.status == 200
            {
                let duplicate = answer.json()["duplicate"] == true;
                return Told::Accepted { id: answer.id(), duplicate };
            }
        }
        Told::GivenUp
    }
}

/// Begins subjects until `end`. Returns those that have not ended.
async fn begin_lives(prism: &Arc<Prism>, seed: u64, end: Instant) -> JoinSet<()> {
    let (mut rng, mut lives) = (Rng::with_seed(seed.wrapping_add(1)), JoinSet::new());
    let mut ticks = tokio::time::interval(BEGINS_EVERY);
    while Instant::now() < end {
        ticks.tick().await;
        let (end, lasts) = (if rng.u8(..4) == 0 { "failed" } else { "succeeded" }, rng.f64() * LASTS);
        let number = {
            let mut known = prism.lives();
            known.push(Life { end, ..Life::default() });
            known.len() - 1
        };
        lives.spawn(Arc::clone(prism).live(number, end, Duration::from_secs_f64(lasts)));
        while lives.try_join_next().is_some() {}
    }
    lives
}

/// Waits until the last subjects have ended. Returns the number of those that have not.
async fn join(mut lives: JoinSet<()>) -> usize {
    let deadline = Instant::now() + DRAIN;
    while let Ok(Some(ended)) = timeout_at(deadline.into(), lives.join_next()).await {
        ended.expect("a life that does not panic");
    }
    lives.len()
}

/// Every third subject is a prediction.
fn is_prediction(number: usize) -> bool {
    number % 3 == 2
}

fn id(number: usize) -> String {
    format!("subject-{number}")
}

fn body(number: usize, step: &str) -> String {
    if is_prediction(number) {
        let payload = json!({ "bodyShapePredictionId": id(number), "scanId": format!("scan-of-{number}") });
        event(&format!("body_shape_prediction.processing.{step}"), payload)
    } else {
        event(&format!("scan.processing.{step}"), json!({ "scanId": id(number) }))
    }
}

// -- the faults -------------------------------------------------------------------------------------------------------

struct Stage {
    relay: Relay,
    wire: Wire,
    sender: watch::Sender<Sender>,
    prism: Arc<Prism>,
    faults: BTreeMap<&'static str, u64>,
    seed: u64,
}

impl Stage {
    async fn make_faults(&mut self, end: Instant) {
        let (mut rng, started) = (Rng::with_seed(self.seed), Instant::now());
        let mut next_progress = started + PROGRESS_EVERY;
        while Instant::now() < end {
            pace(Duration::from_secs_f64(1.0 + rng.f64() * 5.0)).await;
            self.make_fault(&mut rng).await;
            if Instant::now() >= next_progress {
                next_progress += PROGRESS_EVERY;
                let (seconds, lives) = (started.elapsed().as_secs(), self.prism.lives().len());
                println!("lost webhooks {seconds:5} s: {lives} scans and predictions; {:?}", self.faults);
            }
        }
        self.prism.api.set_trouble(Trouble::None);
    }

    async fn make_fault(&mut self, rng: &mut Rng) {
        // Two of three outages are longer than Prism tries.
        let factor = if rng.u8(..3) > 0 { 1.1 + rng.f64() } else { rng.f64() };
        let outage = Duration::from_secs_f64(GIVES_UP_AFTER * factor);
        let troubles = [Trouble::Silence, Trouble::Status(500), Trouble::TooMany(1), Trouble::Garbage, Trouble::Huge];
        let (kind, trouble) = (rng.u8(..8), troubles[rng.usize(..troubles.len())]);
        let name = match kind {
            0..3 => "relay killed",
            3..5 => "relay stopped",
            5 => "wrong secret",
            6 => "trouble of the API",
            _ => "wire cut",
        };
        *self.faults.entry(name).or_default() += 1;
        match kind {
            0..3 => {
                self.relay.kill9().await;
                pace(outage).await;
                self.start().await;
            }
            3..5 => self.restart(outage).await,
            5 => {
                self.relay.reconfigure("signature.secrets", json!([WRONG_SECRET]));
                self.restart(Duration::ZERO).await;
                pace(outage).await;
                self.relay.reconfigure("signature.secrets", json!([SECRET]));
                self.restart(Duration::ZERO).await;
            }
            6 => {
                // The trouble lasts until the next fault of this kind, or ends at once.
                self.prism.api.set_trouble(trouble);
                pace(outage).await;
                self.prism.api.set_trouble(Trouble::None);
            }
            _ => self.wire.cut(),
        }
    }

    async fn restart(&mut self, outage: Duration) {
        self.relay.sigterm();
        let ended = self.relay.wait().await;
        assert_eq!(ended.code, Some(0), "the relay failed on SIGTERM: {ended:?}");
        pace(outage).await;
        self.start().await;
    }

    async fn start(&mut self) {
        self.relay.start_again().await;
        self.sender.send_replace(self.relay.sender());
    }
}

// -- the verdict ------------------------------------------------------------------------------------------------------

/// Takes the messages until every subject of which the relay heard has its end, and the queues are empty.
async fn settle(stage: &Stage, vhost: &Vhost) -> Vec<Delivery> {
    let mut messages = Vec::new();
    // The verdict tells what is missing after that time.
    let _ = poll(DRAIN, async || {
        let mut more = 0;
        for queue in QUEUES {
            let depth = vhost.depth(queue).await as usize;
            messages.extend(vhost.messages(queue, depth).await);
            more += depth;
        }
        let pending = stage.relay.spool().await.pending;
        let missing = Verdict::of(&stage.prism.lives(), &messages).lost;
        if more == 0 && pending == 0 && missing == 0 { Ok(()) } else { Err(format!("{missing} missing")) }
    })
    .await;
    messages
}

/// The counts of the closing line.
#[derive(Default)]
struct Verdict {
    lives: usize,
    /// Webhooks that Prism gave up on.
    given_up: usize,
    /// Webhooks that came after the API had told, answered as duplicates.
    late: usize,
    ends_by_webhook: usize,
    ends_by_api: usize,
    /// No webhook of them was accepted, and they cannot be found.
    never_heard_of: usize,
    copies: usize,
    lost: usize,
    twice: usize,
    out_of_order: usize,
    violations: Vec<String>,
}

/// The messages of one subject, without further copies of a message, in the order of their first deliveries.
#[derive(Default)]
struct Came<'a>(Vec<(&'a str, &'a Delivery)>);

impl Verdict {
    fn of(lives: &[Life], messages: &[Delivery]) -> Self {
        let mut verdict = Self { lives: lives.len(), ..Self::default() };
        let (mut came, mut seen) = (BTreeMap::<String, Came<'_>>::new(), BTreeSet::new());
        for message in messages {
            if !seen.insert(message.id()) {
                verdict.copies += 1;
                continue;
            }
            let step = message.routing_key.rsplit('.').next().unwrap_or_default();
            let (_, subject) = message.header("prism-subject").split_once(':').expect("a subject");
            came.entry(subject.to_owned()).or_default().0.push((step, message));
        }
        for (number, life) in lives.iter().enumerate() {
            verdict.judge(number, life, came.get(&id(number)).unwrap_or(&Came::default()), &seen);
        }
        verdict
    }

    fn judge(&mut self, number: usize, life: &Life, came: &Came<'_>, seen: &BTreeSet<String>) {
        let mut wrong = Vec::new();
        for told in life.webhooks.iter().flatten() {
            match told {
                Told::Accepted { id, duplicate } => {
                    self.late += usize::from(*duplicate);
                    if !seen.contains(id) {
                        wrong.push(format!("{id} was acknowledged and is not delivered"));
                    }
                }
                Told::GivenUp => self.given_up += 1,
            }
        }
        let steps: Vec<_> = came.0.iter().map(|(step, _)| *step).collect();
        let ends: Vec<_> = came.0.iter().filter(|(step, _)| *step != "started").collect();
        let was_heard =
            !steps.is_empty() || life.webhooks.iter().any(|told| matches!(told, Some(Told::Accepted { .. })));
        match ends[..] {
            [] if was_heard => {
                self.lost += 1;
                wrong.push("its end is lost".to_owned());
            }
            [] => self.never_heard_of += 1,
            [(step, message)] => {
                let by_api = message.header("prism-source") == "api";
                self.ends_by_api += usize::from(by_api);
                self.ends_by_webhook += usize::from(!by_api);
                if *step != life.end {
                    wrong.push(format!("it ended with {}, not with {step}", life.end));
                }
            }
            [..] => {}
        }
        if ends.len() > 1 || steps.iter().filter(|step| **step == "started").count() > 1 {
            self.twice += 1;
            wrong.push("it began or ended twice".to_owned());
        }
        if steps.iter().skip_while(|step| **step == "started").any(|step| *step == "started") {
            self.out_of_order += 1;
            wrong.push("it began after its end".to_owned());
        }
        self.violations.extend(wrong.into_iter().map(|what| format!("{}: {what}: {steps:?}", id(number))));
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { lives, given_up, late, ends_by_webhook, ends_by_api, never_heard_of, copies, .. } = self;
        let Self { lost, twice, out_of_order, .. } = self;
        write!(
            f,
            "{lives} scans and predictions, {given_up} webhooks given up, ends by webhook {ends_by_webhook}, by the \
             API {ends_by_api}, late webhooks recognised {late}, never heard of {never_heard_of}, further copies of a \
             message {copies}; LOST {lost}, TWICE {twice}, OUT OF ORDER {out_of_order}"
        )
    }
}
