//! Records what was sent, answered and delivered, and every violation of a promise.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::spool::SpoolLedger;
use super::traffic::SUBJECTS;

/// For this long after the end of a fault of the disk, webhooks may still be refused: promise 11 says seconds.
const REFUSALS_LINGER: Duration = Duration::from_secs(5);

/// Maximum violations that are printed at once. More would hide the first ones.
const SHOWN_MAX: u64 = 50;

/// One event: the `number`th of its subject.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Key {
    pub subject: usize,
    pub number: usize,
}

/// The outcome of one request.
pub enum Reply {
    Acknowledged {
        id: Uuid,
        duplicate: bool,
        after: Duration,
    },
    Refused {
        status: u16,
        /// The `code` of the answer.
        code: String,
        sent_at: Instant,
    },
    /// The connection was refused or broken, so it is unknown whether the relay took the event.
    None,
}

pub struct Book {
    started: Instant,
    pages: Mutex<Pages>,
}

#[derive(Default)]
struct Pages {
    /// All events, by subject and number.
    events: Vec<Vec<Entry>>,
    /// The highest number among first deliveries, by queue and subject.
    heads: HashMap<(&'static str, usize), usize>,
    faults: BTreeMap<&'static str, u64>,
    /// When each fault began, for the report of a failure.
    history: Vec<(Duration, &'static str)>,
    /// Whether the relay may refuse webhooks because of its disk.
    refusals: Phase,
    totals: Totals,
}

/// When something may happen.
#[derive(Default)]
enum Phase {
    #[default]
    Never,
    Now,
    Until(Instant),
}

#[derive(Default)]
struct Totals {
    requests: u64,
    acknowledged: u64,
    resends: u64,
    refused: BTreeMap<(u16, String), u64>,
    /// Refused although the cause had been gone for [`REFUSALS_LINGER`].
    refused_without_cause: u64,
    failed_starts: u64,
    unanswered: u64,
    slowest: Duration,
    deliveries: u64,
    delivered: u64,
    redelivered: u64,
    misrouted: u64,
    relay_kills: u64,
    phases_with_nacks: u64,
    late_redeliveries: u64,
    disorders: u64,
    different_ids: u64,
    wrong_resends: u64,
    accepted_refusals: u64,
    /// All violations, including those above.
    found: u64,
}

struct Entry {
    /// Requests without an answer. It is unknown whether the relay took them.
    unanswered: u32,
    acknowledged: bool,
    /// The id in the first answer or delivery.
    id: Option<Uuid>,
    deliveries: u32,
}

impl Book {
    pub fn new() -> Self {
        let events = (0..SUBJECTS).map(|_| Vec::new()).collect();
        Self { started: Instant::now(), pages: Mutex::new(Pages { events, ..Pages::default() }) }
    }

    // -- called by the senders ----------------------------------------------------------------------------------------

    pub fn sent(&self, key: Key) {
        let mut pages = self.pages();
        pages.totals.requests += 1;
        let events = &mut pages.events[key.subject];
        if events.len() == key.number {
            events.push(Entry { unanswered: 0, acknowledged: false, id: None, deliveries: 0 });
        }
    }

    /// Returns whether the event is now acknowledged.
    pub fn answered(&self, key: Key, reply: Reply) -> bool {
        let mut pages = self.pages();
        let Pages { events, totals, refusals, .. } = &mut *pages;
        let entry = &mut events[key.subject][key.number];
        let mut complaints = Vec::new();
        let acknowledged = match reply {
            Reply::Acknowledged { id, duplicate, after } => {
                totals.slowest = totals.slowest.max(after);
                if entry.acknowledged {
                    totals.resends += 1;
                    if !duplicate {
                        totals.wrong_resends += 1;
                        complaints.push(format!("{key:?}: a re-send was answered as a new event"));
                    }
                } else {
                    totals.acknowledged += 1;
                    if duplicate && entry.unanswered == 0 {
                        totals.accepted_refusals += 1;
                        complaints.push(format!("{key:?}: refused, but accepted anyway"));
                    }
                }
                entry.acknowledged = true;
                complaints.extend(entry.check_id(key, id, totals));
                true
            }
            Reply::Refused { status, code, sent_at } => {
                if code.starts_with("spool-") && !refusals.may_have_hit(sent_at) {
                    totals.refused_without_cause += 1;
                    complaints.push(format!("{key:?}: refused without a cause: {code}"));
                }
                *totals.refused.entry((status, code)).or_default() += 1;
                false
            }
            Reply::None => {
                totals.unanswered += 1;
                entry.unanswered += 1;
                false
            }
        };
        drop(pages);
        complaints.into_iter().for_each(|complaint| self.violation(complaint));
        acknowledged
    }

    // -- called by the workers ----------------------------------------------------------------------------------------

    pub fn delivered(&self, queue: &'static str, key: Key, id: Uuid, redelivered: bool) {
        let mut pages = self.pages();
        let Pages { events, heads, totals, .. } = &mut *pages;
        totals.deliveries += 1;
        totals.redelivered += u64::from(redelivered);
        let Some(entry) = events[key.subject].get_mut(key.number) else {
            drop(pages);
            return self.violation(format!("{key:?} was delivered but never sent"));
        };
        entry.deliveries += 1;
        let mut complaints: Vec<_> = entry.check_id(key, id, totals).into_iter().collect();
        if entry.deliveries == 1 {
            totals.delivered += 1;
            totals.misrouted += u64::from((queue == "prism.unrouted") != (key.subject % 10 == 9));
            let head = heads.entry((queue, key.subject)).or_insert(key.number);
            if key.number >= *head {
                *head = key.number;
            } else if redelivered {
                // The broker redelivers what a worker had not acknowledged, in an order that the relay cannot control.
                totals.late_redeliveries += 1;
            } else {
                totals.disorders += 1;
                complaints.push(format!("{key:?} came to {queue} after number {head}"));
            }
        }
        drop(pages);
        complaints.into_iter().for_each(|complaint| self.violation(complaint));
    }

    // -- called by the stage ------------------------------------------------------------------------------------------

    pub fn begins(&self, fault: &'static str) {
        let at = self.started.elapsed();
        let mut pages = self.pages();
        *pages.faults.entry(fault).or_default() += 1;
        pages.history.push((at, fault));
    }

    pub fn killed_relay(&self) {
        self.pages().totals.relay_kills += 1;
    }

    /// Whether RabbitMQ rejected publishes while queues were limited.
    pub fn nacks_seen(&self, some: bool) {
        self.pages().totals.phases_with_nacks += u64::from(some);
    }

    /// The disk has a fault, because of which the relay may refuse webhooks.
    pub fn disk_fails(&self) {
        self.pages().refusals = Phase::Now;
    }

    /// The cause is gone.
    pub fn disk_works(&self) {
        self.pages().refusals = Phase::Until(Instant::now() + REFUSALS_LINGER);
    }

    /// The relay could not start on a full disk.
    pub fn start_failed(&self) {
        self.pages().totals.failed_starts += 1;
    }

    /// Records the violation of a promise, and prints it with the latest faults.
    pub fn violation(&self, what: String) {
        let mut pages = self.pages();
        pages.totals.found += 1;
        if pages.totals.found <= SHOWN_MAX {
            let recent: Vec<_> =
                pages.history.iter().rev().take(4).map(|(at, fault)| format!("{at:.1?} {fault}")).collect();
            println!(
                "soak {:6.1} s: FOUND: {what}; latest faults: {}",
                self.started.elapsed().as_secs_f64(),
                recent.join(", ")
            );
        }
    }

    // -- results ------------------------------------------------------------------------------------------------------

    /// The number of events that are acknowledged but not yet delivered.
    pub fn missing(&self) -> usize {
        let pages = self.pages();
        pages.events.iter().flatten().filter(|entry| entry.acknowledged && entry.deliveries == 0).count()
    }

    /// The number of events that were delivered but never acknowledged. `explained`: those with an unanswered request.
    fn unknown(&self, explained: bool) -> usize {
        let pages = self.pages();
        let unknown = pages.events.iter().flatten().filter(|entry| entry.deliveries > 0 && !entry.acknowledged);
        unknown.filter(|entry| (entry.unanswered > 0) == explained).count()
    }

    pub fn progress(&self) -> String {
        let missing = self.missing();
        let pages = self.pages();
        let totals = &pages.totals;
        format!(
            "soak {:6.1} s: {} faults ({} kills of the relay, {} of the broker); {} acknowledged, {} delivered, \
             {} in flight, {} duplicates; {} found",
            self.started.elapsed().as_secs_f64(),
            pages.history.len(),
            totals.relay_kills,
            pages.faults.get("broker killed").unwrap_or(&0),
            totals.acknowledged,
            totals.delivered,
            missing,
            totals.deliveries - totals.delivered,
            totals.found,
        )
    }

    pub fn table(&self, spool: &SpoolLedger) -> String {
        let (lost, explained, unexplained) = (self.missing(), self.unknown(true), self.unknown(false));
        let pages = self.pages();
        let totals = &pages.totals;
        let mut rows: Vec<(String, String)> = Vec::new();
        let mut row = |name: &str, value: &dyn std::fmt::Display| rows.push((name.to_owned(), value.to_string()));
        row("faults", &pages.history.len());
        for (fault, count) in &pages.faults {
            row(&format!("  {fault}"), count);
        }
        row("kills of the relay, including those during other faults", &totals.relay_kills);
        row("phases in which publishes were rejected (nack seen)", &totals.phases_with_nacks);
        row("requests sent", &totals.requests);
        row("  without an answer", &totals.unanswered);
        for ((status, code), count) in &totals.refused {
            row(&format!("  answered {status} {code}"), count);
        }
        row("starts that failed on a full disk", &totals.failed_starts);
        row("  slowest 200 (ms)", &totals.slowest.as_millis());
        row("events acknowledged", &totals.acknowledged);
        row("re-sends of acknowledged events, recognised", &(totals.resends - totals.wrong_resends));
        row("events delivered", &totals.delivered);
        let duplicates = totals.deliveries - totals.delivered;
        let share = 100.0 * duplicates as f64 / (totals.delivered as f64).max(1.0);
        row("duplicate deliveries", &format!("{duplicates} ({share:.2} %)"));
        row("  marked by the broker as redelivered", &totals.redelivered);
        row("delivered to an unexpected queue", &totals.misrouted);
        row("overtaken when a worker's messages were requeued", &totals.late_redeliveries);
        row("delivered, but the 200 was lost", &explained);
        row("LOST", &lost);
        row("UNKNOWN", &unexplained);
        row("OUT OF ORDER", &totals.disorders);
        row("DIFFERENT IDS FOR ONE EVENT", &totals.different_ids);
        row("RE-SENDS ACCEPTED AS NEW", &totals.wrong_resends);
        row("REFUSED BUT ACCEPTED", &totals.accepted_refusals);
        row("REFUSED 5 S AFTER THE CAUSE WAS GONE", &totals.refused_without_cause);
        rows.iter().fold(String::new(), |mut table, (name, value)| {
            let _ = writeln!(table, "  {name:<58} {value:>16}");
            table
        }) + &format!("  spool: {spool}\n")
    }

    /// # Panics
    /// If anything is lost, unknown, out of order or wrong, with the whole history of faults.
    pub fn verdict(&self, spool: &SpoolLedger, stuck: usize, drained: Result<(), String>) {
        let mut failures = Vec::new();
        let (lost, unknown) = (self.missing(), self.unknown(false));
        let pages = self.pages();
        if lost + unknown > 0 {
            failures.push(format!("{lost} lost, {unknown} unknown"));
        }
        if pages.totals.found > 0 {
            failures.push(format!("{} violations found", pages.totals.found));
        }
        if stuck > 0 {
            failures.push(format!("{stuck} senders got no 200"));
        }
        if let Err(left) = drained {
            failures.push(left);
        }
        // In the end the senders got a 200 for every accepted event, and the relay counted none twice.
        if !spool.balances() || spool.accepted != pages.totals.acknowledged {
            failures.push(format!("{} acknowledged, but the spool says {spool}", pages.totals.acknowledged));
        }
        if !failures.is_empty() {
            let history = pages.history.iter().map(|(at, fault)| format!("{:8.1} {fault}", at.as_secs_f64()));
            println!("{}", history.collect::<Vec<_>>().join("\n"));
            drop(pages);
            panic!("{}", failures.join("; "));
        }
    }

    fn pages(&self) -> MutexGuard<'_, Pages> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Entry {
    /// Checks that the event has the same id in every answer and delivery.
    fn check_id(&mut self, key: Key, id: Uuid, totals: &mut Totals) -> Option<String> {
        let known = *self.id.get_or_insert(id);
        (known != id).then(|| {
            totals.different_ids += 1;
            format!("{key:?} has two ids: {known} and {id}")
        })
    }
}

impl Phase {
    /// Whether it may have hit what was sent at this time.
    fn may_have_hit(&self, sent_at: Instant) -> bool {
        match self {
            Self::Never => false,
            Self::Now => true,
            Self::Until(end) => sent_at <= *end,
        }
    }
}
