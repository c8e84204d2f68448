//! Steady traffic through a relay, and the check that all of it is delivered.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::json;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval};

use super::eventually::eventually_within;
use super::http::Client;
use super::relay::{Relay, Sender, SpoolReport};
use super::samples;
use super::vhost::{Delivery, Vhost};

/// Every second subject is a scan; the others are predictions.
const SUBJECTS: usize = 8;

/// The time between two webhooks of a subject.
const PACE: Duration = Duration::from_millis(100);

/// The time between two checks of the ledger.
const LEDGER_EVERY: Duration = Duration::from_millis(100);

/// How long the relay may take to deliver pending events once the fault is over.
const DELIVERY_DEADLINE: Duration = Duration::from_secs(90);

const QUEUES: [&str; 2] = ["prism.scan", "prism.future_me"];

/// Prism, sending events of several subjects. Any answer other than 200 fails the test, and so does a ledger that does
/// not balance at some instant.
pub struct Traffic {
    stop: watch::Sender<bool>,
    accepted: Arc<AtomicUsize>,
    senders: Vec<JoinHandle<Vec<String>>>,
    auditor: JoinHandle<()>,
}

impl Traffic {
    pub fn start(relay: &Relay) -> Self {
        let (stop, stopped) = watch::channel(false);
        let accepted = Arc::new(AtomicUsize::new(0));
        let send = |subject| tokio::spawn(send(relay.sender(), subject, stopped.clone(), Arc::clone(&accepted)));
        let senders = (0..SUBJECTS).map(send).collect();
        let auditor = tokio::spawn(audit(format!("{}/api/status", relay.ops()), stopped.clone()));
        Self { stop, accepted, senders, auditor }
    }

    /// Waits until `count` more webhooks are answered 200.
    pub async fn more(&self, count: usize) {
        let before = self.accepted.load(Ordering::Relaxed);
        eventually_within(DELIVERY_DEADLINE, &format!("{count} more webhooks to be answered 200"), async || {
            assert!(
                !self.senders.iter().any(JoinHandle::is_finished),
                "a sender has failed; its panic is printed above"
            );
            let now = self.accepted.load(Ordering::Relaxed);
            if now >= before + count { Ok(()) } else { Err(now - before) }
        })
        .await;
    }

    /// Ends the traffic and checks that every event that was answered 200 is delivered: with the same body, under the
    /// id of the answer, first deliveries in order. Also checks the ledger.
    pub async fn arrives(self, relay: &Relay, vhost: &Vhost) {
        self.stop.send_replace(true);
        let mut ids = Vec::new();
        for sender in self.senders {
            ids.push(sender.await.expect("every webhook is answered 200"));
        }
        self.auditor.await.expect("the ledger always balances");
        let events = ids.iter().map(Vec::len).sum::<usize>();
        let distinct: HashSet<_> = ids.iter().flatten().collect();
        assert_eq!(distinct.len(), events, "each event has its own id");

        eventually_within(DELIVERY_DEADLINE, "no pending events", async || {
            let spool = relay.spool().await;
            check_ledger(&spool);
            if spool.pending == 0 { Ok(()) } else { Err(format!("{spool:?}\n{}", warnings(relay))) }
        })
        .await;
        let spool = relay.spool().await;
        let (sent, ends) = (events as u64, (spool.confirmed, spool.parked, spool.removed));
        assert_eq!((spool.accepted, ends), (sent, (sent, 0, 0)), "{spool:?}");

        let mut deliveries = Vec::new();
        for (index, queue) in QUEUES.iter().enumerate() {
            let expected = ids.iter().skip(index).step_by(QUEUES.len()).flatten().map(String::as_str).collect();
            deliveries.extend(take_all(vhost, queue, expected).await);
        }
        vhost.assert_empty("prism.unrouted").await;
        check_deliveries(&deliveries, &ids);
        println!("{events} events, all delivered; {} duplicates", deliveries.len() - events);
    }
}

/// The body and the subject of an event.
fn event(subject: usize, number: usize) -> (String, String) {
    if subject.is_multiple_of(2) {
        (samples::nth_of_scan(subject, number), format!("scan:scan-{subject}"))
    } else {
        let id = format!("prediction-{subject}");
        let payload = json!({"bodyShapePredictionId": id, "number": number});
        (samples::event("body_shape_prediction.processing.started", payload), format!("prediction:{id}"))
    }
}

async fn send(sender: Sender, subject: usize, stop: watch::Receiver<bool>, accepted: Arc<AtomicUsize>) -> Vec<String> {
    let mut ids = Vec::new();
    let mut pace = interval(PACE);
    pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while !*stop.borrow() {
        pace.tick().await;
        let answer = sender.post(event(subject, ids.len()).0).await;
        ids.push(answer.unwrap_or_else(|error| panic!("no answer to a webhook: {error}")).id());
        accepted.fetch_add(1, Ordering::Relaxed);
    }
    ids
}

async fn audit(url: String, stop: watch::Receiver<bool>) {
    let client = Client::http1();
    let mut pace = interval(LEDGER_EVERY);
    while !*stop.borrow() {
        pace.tick().await;
        let answer = client.get(&url).await.unwrap_or_else(|error| panic!("no status: {error}"));
        check_ledger(&SpoolReport::of(&answer.expect(200).json()));
    }
}

/// `accepted = confirmed + pending + parked + removed`, and no event has a negative age.
pub fn check_ledger(spool: &SpoolReport) {
    assert_eq!(spool.accepted, spool.confirmed + spool.pending + spool.parked + spool.removed, "{spool:?}");
    assert!(spool.oldest_age_seconds.is_none_or(|age| age >= 0.0), "{spool:?}");
}

/// Takes messages from a queue until every expected id has come and the queue is empty.
async fn take_all(vhost: &Vhost, queue: &str, expected: HashSet<&str>) -> Vec<Delivery> {
    let mut taken: Vec<Delivery> = Vec::new();
    eventually_within(DELIVERY_DEADLINE, &format!("all events in {queue}"), async || {
        let depth = vhost.depth(queue).await as usize;
        taken.extend(vhost.messages(queue, depth).await);
        let came: HashSet<_> = taken.iter().map(Delivery::id).collect();
        let missing = expected.iter().filter(|id| !came.contains(**id)).count();
        if missing == 0 && depth == 0 { Ok(()) } else { Err(format!("{missing} of {} missing", expected.len())) }
    })
    .await;
    taken
}

fn check_deliveries(deliveries: &[Delivery], ids: &[Vec<String>]) {
    let numbered = |subject, ids: &Vec<String>| -> Vec<(String, (usize, usize))> {
        ids.iter().enumerate().map(|(number, id)| (id.clone(), (subject, number))).collect()
    };
    let sent: HashMap<String, (usize, usize)> =
        ids.iter().enumerate().flat_map(|(subject, ids)| numbered(subject, ids)).collect();
    let (mut seen, mut next) = (HashSet::new(), BTreeMap::<usize, usize>::new());
    for delivery in deliveries {
        let id = delivery.id();
        let (subject, number) = *sent.get(&id).unwrap_or_else(|| panic!("{id} was delivered, but is in no answer"));
        let (body, name) = event(subject, number);
        assert_eq!((delivery.text(), delivery.header("prism-subject")), (body, name.as_str()));
        if seen.insert(id) {
            let expected = next.entry(subject).or_default();
            assert_eq!(number, *expected, "first deliveries of {name} in order");
            *expected += 1;
        }
    }
    assert_eq!(seen.len(), sent.len(), "every event that was answered 200 is delivered");
}

/// The relay's warnings and errors, for a test that fails.
fn warnings(relay: &Relay) -> String {
    let lines = relay.logs().into_iter().filter(|line| line["level"] == "WARN" || line["level"] == "ERROR");
    lines.map(|line| line.to_string()).collect::<Vec<_>>().join("\n")
}
