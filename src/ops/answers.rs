//! The one judge of the relay's health: turns facts into a headline and the answers to seven questions. Console, `top`
//! and `check` show them and judge nothing themselves. Pure.
//!
//! The thresholds are those of the alert rules in deploy/prometheus, which look at longer times: what pages there is a
//! problem here, and what makes a ticket there is a warning here. No webhook for hours is only a note, because it is
//! normal at night for many, and the time can be set only in the rule. Some rules have no answer: deploy/reference.md
//! names them for those who rely on notices.

use std::collections::BTreeMap;
use std::time::Duration;

use bytesize::ByteSize;
use serde::{Deserialize, Serialize};

use super::refusals::{self, Refusing};
use super::words::{about, ago, count, events, events_are, percent, rate};
use crate::reconcile::Status;
use crate::spool::{AppendError, EVENT_OVERHEAD_BYTES, Ledger};
use crate::text::{grouped, span};

/// The used share of the spool from which on it is nearly full (PrismRelaySpoolNearlyFull).
const NEARLY_FULL: f64 = 0.8;
/// The room for events, in time, below which it is scarce (PrismRelaySpoolFullWithinTwoHours, ...TwelveHours).
const ROOM_FOR_A_PROBLEM: Duration = Duration::from_secs(2 * 3600);
const ROOM_FOR_A_WARNING: Duration = Duration::from_secs(12 * 3600);
/// The age of the oldest pending event from which on deliveries are late (PrismRelayDeliversLate).
const LATE: Duration = Duration::from_secs(30);
/// The age from which on the runbook has another entry (PrismRelayOldestEventWaits).
const VERY_LATE: Duration = Duration::from_secs(600);
/// The time without a confirm after which a connection delivers nothing (PrismRelayNothingConfirmed).
const NOTHING_CONFIRMED: Duration = Duration::from_secs(300);
/// An outage shorter than this is only a warning: a reconnect usually takes less.
const BRIEF: Duration = Duration::from_secs(5);
/// How many refusals without any acceptance mean that every webhook is refused: within 5 min, or within 30 min
/// (PrismRelayEverySignatureFails). Prism tries each event four times.
const REFUSED_IN_5_MINUTES: u64 = 20;
const REFUSED_IN_30_MINUTES: u64 = 8;
/// The share and the number of failed signatures within an hour that are worth a look (PrismRelaySomeSignaturesFail).
const UNVERIFIED_SHARE: f64 = 0.05;
const UNVERIFIED_MIN: u64 = 4;
/// Other refusals within 5 min that are worth a look.
const REFUSED_MIN: u64 = 5;
/// How many connections in another protocol within 30 min, without any acceptance, mean that no webhook arrives
/// (PrismRelayWrongProtocol).
const OTHER_PROTOCOL_IN_30_MINUTES: u64 = 8;
/// How many failed connections within 30 min, without any acceptance, may be those of Prism
/// (PrismRelayConnectionsFail).
const FAILED_IN_30_MINUTES: u64 = 8;
/// The days until the certificate expires, below which that is a problem or a warning
/// (PrismRelayCertificateExpires, ...ExpiresSoon).
const CERTIFICATE_PROBLEM_DAYS: f64 = 3.0;
const CERTIFICATE_WARNING_DAYS: f64 = 21.0;
/// No webhook for this long is worth a note (PrismRelayNoWebhooks).
const SILENT: Duration = Duration::from_secs(6 * 3600);
/// No webhook for this long is normal while no user scans.
const QUIET: Duration = Duration::from_secs(300);
/// How long a loss stays a problem (PrismRelayEventsLost). It cannot be undone, so it is only a note afterwards.
const LOSS_SHOWN: Duration = Duration::from_secs(24 * 3600);
/// How long messages may wait without any worker before that is a problem (PrismRelayNoWorkers).
const NO_WORKER: Duration = Duration::from_secs(300);

const SEE_CHECK: &str = "Look for the cause with `prism-relay check`; deliveries then resume by themselves.";
const SEE_BROKER: &str = "See why RabbitMQ accepts no events.";

/// How serious something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Level {
    Ok,
    /// Worth knowing, or not known yet.
    Note,
    /// No event is lost, but an operator should look.
    Warning,
    /// Webhooks are being lost or refused, or events do not reach the workers.
    Problem,
}

impl Level {
    /// A loss of this age.
    fn of_loss(age: Duration) -> Self {
        if age < LOSS_SHOWN { Self::Problem } else { Self::Note }
    }
}

/// The answer to one question.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Answer {
    pub id: &'static str,
    pub question: &'static str,
    pub level: Level,
    /// The answer in a few words.
    pub word: String,
    /// Full sentences.
    pub detail: String,
    /// What to do, if there is something to do. Commands are in backticks.
    pub remedy: Option<String>,
    /// The entry of the runbook: the name of an alert, or `refused-webhooks`.
    pub runbook: Option<&'static str>,
}

/// The most important fact.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Headline {
    /// The worst level of the answers.
    pub level: Level,
    /// The answer that it is about; `None` if all is well.
    pub answer: Option<&'static str>,
    /// One short sentence that seldom changes: the state, and since when.
    pub text: String,
    /// What is safe, how long the room lasts, and what else is worth a look; may be empty.
    pub detail: String,
    /// The next step.
    pub advice: String,
    /// The entry of the runbook: the name of an alert, or `refused-webhooks`.
    pub runbook: Option<&'static str>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Judgement {
    pub headline: Headline,
    pub answers: Vec<Answer>,
}

/// The facts. Ages are measured now.
#[derive(Clone, Debug, Default)]
pub(super) struct Facts {
    pub uptime: Duration,
    pub draining: bool,
    /// Why a webhook would be refused now.
    pub blocker: Option<AppendError>,
    pub ledger: Ledger,
    /// Events lost because the spool file was damaged. `ledger.removed` includes them.
    pub damaged: u64,
    /// Bytes that count against the maximum: the events, and a log that has grown.
    pub used: u64,
    pub max_bytes: u64,
    /// What is wrong with the spool's file or disk, and what to do, divided by a semicolon.
    pub disk: Option<&'static str>,
    /// Age of the oldest pending event; `None` also if all of them wait behind a parked one.
    pub oldest: Option<Duration>,
    pub outlook: Outlook,
    pub broker: Broker,
    pub last_confirm: Option<Duration>,
    pub last_accepted: Option<Duration>,
    pub accepted_last_minute: u64,
    pub confirmed_last_minute: u64,
    pub last_5_minutes: Window,
    pub last_30_minutes: Window,
    pub last_hour: Window,
    /// Days until the public listener's certificate expires, if it has one; negative afterwards.
    pub certificate_days: Option<f64>,
    pub turned_away: TurnedAway,
    pub queues: Vec<Queue>,
    /// Exchanges, queues and bindings that do not exist.
    pub missing: Vec<String>,
    /// Why the relay does not look at the queues.
    pub unwatched: Option<String>,
    /// How reconciling with Prism's API goes; the default without a key.
    pub reconcile: Status,
}

/// Where the spool is going at the current rate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Outlook {
    #[default]
    Unclear,
    FullIn(Duration),
    EmptyIn(Duration),
}

/// The connection to RabbitMQ.
#[derive(Clone, Debug, Default)]
pub(super) struct Broker {
    pub connected: bool,
    /// RabbitMQ's reason for blocking the connection.
    pub blocked: Option<String>,
    /// Why the relay is not connected.
    pub error: Option<String>,
    /// Whether no broker answers at all.
    pub unreachable: bool,
    /// Time since the connection was last made, lost, blocked or unblocked.
    pub age: Duration,
    /// Time since the first fault after the last confirm. New connections that deliver nothing do not shorten it.
    pub failing: Option<Duration>,
}

impl Broker {
    /// Whether no connection was tried yet.
    fn is_new(&self) -> bool {
        !self.connected && self.error.is_none()
    }
}

/// Webhooks within some time.
#[derive(Clone, Debug, Default)]
pub(super) struct Window {
    pub accepted: u64,
    /// By `code`, without requests that cannot be webhooks.
    pub refused: BTreeMap<&'static str, u64>,
    /// Connections refused because of their protocol.
    pub other_protocol: u64,
    /// Connections that failed in the TLS handshake, or were not HTTP/1.
    pub failed: u64,
}

/// Webhooks that were refused since the start of the process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct TurnedAway {
    /// Authentic events that were refused within the last minute and not accepted since: Prism may try again.
    pub waiting: u64,
    /// Events that were refused, and that Prism has given up since.
    pub lost: u64,
    /// Requests that could not be recognised if they came again.
    pub unrecognisable: u64,
    /// The last one of those that are lost.
    pub last_lost: Option<Refusal>,
    /// The last one of those that may come again.
    pub last_waiting: Option<Refusal>,
    pub last_unrecognisable: Option<Refusal>,
}

/// A webhook that was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    /// The `code` of the answer.
    pub reason: &'static str,
    /// Time since then.
    pub age: Duration,
}

/// Why webhooks are not accepted, or soon may not be.
enum Hindrance {
    Draining,
    /// The spool is full.
    Full,
    /// The spool cannot be written: why, and what to do.
    Unwritable(&'static str, &'static str),
    Refusing(Refusing),
    Barrier(Barrier),
    /// The spool is nearly full, or soon will be.
    Scarce,
    /// Something is wrong with the spool's file or disk: what, and what to do.
    Disk(&'static str, &'static str),
}

/// What keeps webhooks from reaching the relay, or soon will.
struct Barrier {
    level: Level,
    word: &'static str,
    detail: String,
    remedy: &'static str,
    runbook: &'static str,
}

/// One way in which events are lost, or may be.
struct Loss {
    level: Level,
    word: &'static str,
    detail: String,
    remedy: &'static str,
    /// The entry of the runbook.
    runbook: &'static str,
    /// The sentence of the headline.
    note: String,
}

/// A queue on the broker.
#[derive(Clone, Debug)]
pub(super) struct Queue {
    pub name: String,
    pub role: Role,
    pub state: QueueState,
}

/// What a queue is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// Workers take its messages.
    Work,
    /// It keeps dead letters.
    Dead,
    /// It keeps events that match no queue.
    Unrouted,
    /// The relay or RabbitMQ moves its messages on, or keeps them.
    Inner,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum QueueState {
    /// Not looked at yet, or the leader does not answer.
    Unknown,
    /// It cannot take messages: what completes the sentence "the queue ...", and what to do.
    Trouble { text: String, remedy: String },
    /// `unattended`: how long there has been no worker.
    Counted { messages: u64, consumers: u64, unattended: Duration },
}

/// How serious it is that the certificate expires in so many days.
pub(super) fn certificate_level(days: f64) -> Level {
    match days {
        _ if days < CERTIFICATE_PROBLEM_DAYS => Level::Problem,
        _ if days < CERTIFICATE_WARNING_DAYS => Level::Warning,
        _ => Level::Ok,
    }
}

/// Judges the facts.
pub(super) fn judge(facts: &Facts) -> Judgement {
    let answers = vec![
        facts.sending(),
        facts.accepting(),
        facts.broker(),
        facts.lag(),
        facts.parked(),
        facts.lost(),
        facts.workers(),
    ];
    Judgement { headline: facts.headline(&answers), answers }
}

/// Makes an answer.
fn answer(id: &'static str, level: Level, word: impl Into<String>, detail: impl Into<String>) -> Answer {
    let question = match id {
        "sending" => "Is Prism sending?",
        "accepting" => "Are we accepting webhooks?",
        "broker" => "Is RabbitMQ accepting events?",
        "lag" => "How far behind are we?",
        "parked" => "Is anything parked?",
        "lost" => "Did we lose anything?",
        _ => "Are workers taking events?",
    };
    Answer { id, question, level, word: word.into(), detail: detail.into(), remedy: None, runbook: None }
}

/// `why it fails` as `Why it fails.`
fn sentence(text: &str) -> String {
    let mut chars = text.chars();
    let first = chars.next().map(|first| first.to_uppercase().to_string()).unwrap_or_default();
    format!("{first}{}.", chars.as_str())
}

impl Answer {
    fn remedy(self, remedy: impl Into<String>) -> Self {
        Self { remedy: Some(remedy.into()), ..self }
    }

    /// `entry`: a heading of deploy/runbook.md.
    fn runbook(self, entry: &'static str) -> Self {
        Self { runbook: Some(entry), ..self }
    }
}

impl Facts {
    fn sending(&self) -> Answer {
        let answer = |level, word: &str, detail: String| answer("sending", level, word, detail);
        if let Some(refusing) = self.refusing().filter(|refusing| refusing.all) {
            let webhooks = count(refusing.count, "webhook", "webhooks");
            let detail = format!("{webhooks} in the last {} minutes, all of them refused.", refusing.minutes);
            return answer(Level::Note, "Yes", detail);
        }
        let Some(age) = self.last_accepted else {
            let detail = format!("No webhook was accepted since the start, {}.", ago(self.uptime));
            return answer(Level::Ok, "Not yet", detail);
        };
        let latest = format!("the last one {}", ago(age));
        if age >= SILENT {
            let detail = format!("No webhook was accepted for {}.", span(age));
            let remedy = "If users scan, check the URL in your Prism account; `prism-relay send --url URL` tests the \
                          way to the relay.";
            return answer(Level::Note, "Not now", detail).remedy(remedy).runbook("PrismRelayNoWebhooks");
        }
        if age > QUIET {
            let detail = format!("No webhook was accepted recently, {latest}. That is normal while no user scans.");
            return answer(Level::Ok, "Not now", detail);
        }
        let pace = match self.accepted_last_minute {
            minute @ 60.. => format!("{} webhooks per second", rate(minute as f64 / 60.0)),
            minute => format!("{} in the last minute", count(minute, "webhook", "webhooks")),
        };
        answer(Level::Ok, "Yes", format!("{pace}, {latest}."))
    }

    /// Why webhooks are not accepted, or soon may not be: the first that applies.
    fn hindrance(&self) -> Option<Hindrance> {
        let (refusing, barrier) = (self.refusing(), self.barrier());
        let all = refusing.clone().filter(|refusing| refusing.all).map(Hindrance::Refusing);
        let is_barred = barrier.as_ref().is_some_and(|barrier| barrier.level == Level::Problem);
        let barrier = barrier.map(Hindrance::Barrier);
        let disk = || self.disk_trouble().map(|(why, what)| Hindrance::Disk(why, what));
        match self.blocker {
            _ if self.draining => Some(Hindrance::Draining),
            Some(AppendError::Full) => Some(Hindrance::Full),
            Some(AppendError::Unavailable | AppendError::Closed) => {
                let (why, what) = self.disk_trouble().unwrap_or(("the spool cannot be written", "check its disk"));
                Some(Hindrance::Unwritable(why, what))
            }
            None if all.is_some() => all,
            None if is_barred => barrier,
            None if self.room().0 > Level::Ok => Some(Hindrance::Scarce),
            None => disk().or(barrier).or_else(|| refusing.map(Hindrance::Refusing)),
        }
    }

    fn accepting(&self) -> Answer {
        let answer = |level, word: &str, detail: String| answer("accepting", level, word, detail);
        let (share, (scarcity, room)) = (percent(self.share()), self.room());
        match self.hindrance() {
            Some(Hindrance::Draining) => {
                let detail = "The relay is shutting down. Prism retries, but only for about 35 s.".to_owned();
                let remedy = "Start the relay again, or let the service manager do it. It then delivers the events \
                              that wait on disk.";
                answer(Level::Warning, "Not any more", detail).remedy(remedy).runbook("PrismRelayDown")
            }
            Some(Hindrance::Full) => {
                let detail = format!("The spool is full ({}): webhooks are answered 503.", ByteSize(self.max_bytes));
                // The events may take little, and a log that cannot shrink the rest.
                let full = match self.disk_trouble() {
                    Some((why, what)) => {
                        answer(Level::Problem, "No", format!("{detail} {}", sentence(why))).remedy(sentence(what))
                    }
                    None => answer(Level::Problem, "No", detail).remedy(self.make_room()),
                };
                full.runbook("PrismRelayNotReady")
            }
            Some(Hindrance::Unwritable(why, what)) => {
                let detail = format!("Webhooks are answered 503: {why}.");
                answer(Level::Problem, "No", detail).remedy(sentence(what)).runbook("PrismRelayNotReady")
            }
            Some(Hindrance::Refusing(refusing)) => {
                let answer = match refusing.all {
                    true => answer(Level::Problem, "No", refusing.state()),
                    false => answer(Level::Warning, "Yes, but not all", refusing.text()),
                };
                let entry = refusals::runbook(refusing.reason, refusing.all);
                answer.remedy(refusals::step(refusing.reason)).runbook(entry)
            }
            Some(Hindrance::Barrier(Barrier { level, word, detail, remedy, runbook })) => {
                answer(level, word, detail).remedy(remedy).runbook(runbook)
            }
            Some(Hindrance::Scarce) => {
                let (word, entry) = self.scarce();
                let scarce = answer(scarcity, &word, format!("The spool is {share} full.{room}"));
                scarce.remedy(self.make_room()).runbook(entry)
            }
            Some(Hindrance::Disk(why, what)) => {
                let trouble = answer(Level::Warning, "Yes, for now", sentence(why)).remedy(sentence(what));
                trouble.runbook("PrismRelaySpoolLogGrows")
            }
            None => {
                let accepted = count(self.ledger.accepted, "event", "events");
                answer(Level::Ok, "Yes", format!("{accepted} so far. The spool is {share} full.{room}"))
            }
        }
    }

    /// How long webhooks are accepted while there is little room, and the entry of the runbook.
    fn scarce(&self) -> (String, &'static str) {
        let Outlook::FullIn(time) = self.outlook else {
            return ("Yes, for now".to_owned(), "PrismRelaySpoolNearlyFull");
        };
        let entry = match time {
            _ if time < ROOM_FOR_A_PROBLEM => "PrismRelaySpoolFullWithinTwoHours",
            _ if self.share() >= NEARLY_FULL => "PrismRelaySpoolNearlyFull",
            _ => "PrismRelaySpoolFullWithinTwelveHours",
        };
        (format!("Yes, for about {}", about(time)), entry)
    }

    /// What keeps webhooks from reaching the relay, or soon will: the worst.
    fn barrier(&self) -> Option<Barrier> {
        let barriers = [self.other_protocol(), self.certificate(), self.failed_connections()];
        barriers.into_iter().flatten().min_by_key(|barrier| std::cmp::Reverse(barrier.level))
    }

    fn other_protocol(&self) -> Option<Barrier> {
        let Window { accepted, other_protocol, .. } = &self.last_30_minutes;
        let detail = format!(
            "No webhook arrives: {} in the last 30 min came in the wrong protocol, the PROXY protocol or TLS.",
            count(*other_protocol, "connection", "connections")
        );
        (*accepted == 0 && *other_protocol >= OTHER_PROTOCOL_IN_30_MINUTES).then_some(Barrier {
            level: Level::Problem,
            word: "No",
            detail,
            remedy: "Switch off the PROXY protocol in the proxy in front, or let it terminate TLS, or set http.tls; \
                     the log says which.",
            runbook: "PrismRelayWrongProtocol",
        })
    }

    fn failed_connections(&self) -> Option<Barrier> {
        let Window { accepted, failed, .. } = &self.last_30_minutes;
        let detail = format!(
            "No webhook was accepted in the last 30 min, and {} in the TLS handshake or as no HTTP/1; Prism's may be \
             among them.",
            count(*failed, "connection failed", "connections failed")
        );
        (*accepted == 0 && *failed >= FAILED_IN_30_MINUTES).then_some(Barrier {
            level: Level::Warning,
            word: "Perhaps not",
            detail,
            remedy: "Look who they are: `connection refused` in the log; test the way from outside with \
                     `prism-relay send --url URL`.",
            runbook: "PrismRelayConnectionsFail",
        })
    }

    fn certificate(&self) -> Option<Barrier> {
        let days = self.certificate_days?;
        let level = certificate_level(days);
        let remedy = "Renew the certificate, then reload.";
        let (word, detail) = if days < 0.0 {
            ("No", "The TLS certificate has expired, so Prism cannot connect.".to_owned())
        } else {
            let left = span(Duration::try_from_secs_f64(days * 86_400.0).unwrap_or(Duration::MAX));
            ("Yes, for now", format!("The TLS certificate expires in {left}; then Prism cannot connect."))
        };
        let runbook =
            if level == Level::Problem { "PrismRelayCertificateExpires" } else { "PrismRelayCertificateExpiresSoon" };
        (level > Level::Ok).then_some(Barrier { level, word, detail, remedy, runbook })
    }

    /// What is wrong with the spool's file or disk, and what to do.
    fn disk_trouble(&self) -> Option<(&'static str, &'static str)> {
        let reason = self.disk?;
        Some(reason.split_once("; ").unwrap_or((reason, "see the log")))
    }

    /// How scarce the room for events is, and a sentence about it.
    fn room(&self) -> (Level, String) {
        let nearly_full = if self.share() >= NEARLY_FULL { Level::Problem } else { Level::Ok };
        let Outlook::FullIn(time) = self.outlook else { return (nearly_full, String::new()) };
        let by_time = match time {
            _ if time < ROOM_FOR_A_PROBLEM => Level::Problem,
            _ if time < ROOM_FOR_A_WARNING => Level::Warning,
            _ => Level::Ok,
        };
        (nearly_full.max(by_time), format!(" Room for about {}.", about(time)))
    }

    fn make_room(&self) -> &'static str {
        if self.is_delivering() {
            "More events come in than RabbitMQ accepts: find out why, or raise spool.max_bytes if the disk has room."
        } else {
            "Restore RabbitMQ so that the spool drains, or raise spool.max_bytes if the disk has room."
        }
    }

    fn broker(&self) -> Answer {
        let answer = |level, word: &str, detail: String| answer("broker", level, word, detail);
        let Broker { connected, blocked, error, unreachable, age, .. } = &self.broker;
        let time = span(*age);
        if let (true, Some(reason)) = (connected, blocked) {
            return answer(Level::Problem, "No, it is blocked", format!("Blocked for {time}: {reason}."))
                .remedy("Free memory or disk on the RabbitMQ node; deliveries then resume by themselves.")
                .runbook("PrismRelayBrokerBlocks");
        }
        if !connected {
            let failing = self.failing();
            let level = if failing < BRIEF { Level::Warning } else { Level::Problem };
            let answer = match error {
                None => answer(Level::Note, "Connecting", "There is no connection yet.".to_owned()),
                Some(error) if *unreachable => answer(level, "No", format!("Not connected for {time}: {error}."))
                    .remedy("Start RabbitMQ, or correct broker.urls; deliveries then resume by themselves."),
                Some(error) => {
                    answer(level, "No", format!("Nothing delivered for {}: {error}.", span(failing))).remedy(SEE_CHECK)
                }
            };
            return answer.runbook("PrismRelayBrokerAway");
        }
        if let Some(time) = self.nothing_confirmed() {
            let detail = format!("Connected, but nothing was confirmed for {}.", span(time));
            if self.broker.failing.is_some() {
                // Between two tries of an outage, so the step is that of the outage.
                return answer(Level::Problem, "No", detail).remedy(SEE_CHECK).runbook("PrismRelayBrokerAway");
            }
            return answer(Level::Problem, "No", detail)
                .remedy("Look with `rabbitmqctl list_queues name state leader` for a queue that is down or full.")
                .runbook("PrismRelayNothingConfirmed");
        }
        let detail = match (self.confirmed_last_minute, self.last_confirm) {
            (minute @ 60.., _) => format!("{} events confirmed per second.", rate(minute as f64 / 60.0)),
            (_, Some(age)) => format!("Connected; the last event was confirmed {}.", ago(age)),
            (_, None) => "Connected; there was nothing to deliver yet.".to_owned(),
        };
        answer(Level::Ok, "Yes", detail)
    }

    /// How long deliveries may have failed. While no event waits none fails, so that an old fault counts only as long
    /// as the oldest event waits.
    fn failing(&self) -> Duration {
        let failed = self.broker.failing.unwrap_or_default().min(self.oldest.unwrap_or_default());
        failed.max(self.broker.age)
    }

    /// How long a connection that works has confirmed nothing, although events wait. After a fault that is soon an
    /// outage, so that the answer does not change with each new connection.
    fn nothing_confirmed(&self) -> Option<Duration> {
        let waited = self.oldest?;
        let time = self.last_confirm.map_or(waited, |age| age.min(waited)).min(self.failing());
        let enough = if self.broker.failing.is_some() { BRIEF } else { NOTHING_CONFIRMED };
        (self.broker.connected && time >= enough).then_some(time)
    }

    fn is_delivering(&self) -> bool {
        self.broker.connected && self.broker.blocked.is_none() && self.nothing_confirmed().is_none()
    }

    fn lag(&self) -> Answer {
        let answer = |level, word: String, detail: String| answer("lag", level, word, detail);
        let pending = self.ledger.pending;
        if pending == 0 {
            return answer(Level::Ok, "Not at all".to_owned(), "No event is waiting for delivery.".to_owned());
        }
        let waiting = events_are(pending);
        if self.oldest.is_none() && self.ledger.parked > 0 && self.is_delivering() {
            let detail = "They wait behind a parked event of the same scan or prediction, so that the order is kept.";
            return answer(Level::Note, events(pending), detail.to_owned());
        }
        let Some(age) = self.oldest else {
            let detail = "Waiting, safe on disk. Their age is not known yet.".to_owned();
            return if self.is_delivering() || self.broker.is_new() {
                answer(Level::Note, events(pending), detail)
            } else {
                let answer = answer(Level::Warning, events(pending), detail).remedy(SEE_BROKER);
                answer.runbook("PrismRelayDeliversLate")
            };
        };
        if age < LATE {
            let word = if age < Duration::from_secs(1) { "Less than 1 s".to_owned() } else { span(age) };
            let now = if self.is_delivering() { "being delivered" } else { "waiting, safe on disk" };
            return answer(Level::Ok, word, format!("{waiting} {now}."));
        }
        let outlook = match self.outlook {
            Outlook::EmptyIn(time) => format!(" Caught up in about {}.", about(time)),
            Outlook::FullIn(time) => format!(" Room for about {}.", about(time)),
            Outlook::Unclear => String::new(),
        };
        let late = answer(Level::Warning, span(age), format!("{waiting} waiting, safe on disk.{outlook}"));
        late.runbook(if age < VERY_LATE { "PrismRelayDeliversLate" } else { "PrismRelayOldestEventWaits" }).remedy(
            match (self.is_delivering(), self.outlook) {
                (true, Outlook::EmptyIn(_)) => "Nothing: the relay catches up.",
                (true, _) => "More events come in than RabbitMQ accepts: check its load and its disks.",
                (false, _) => SEE_BROKER,
            },
        )
    }

    fn parked(&self) -> Answer {
        if self.ledger.parked == 0 {
            return answer("parked", Level::Ok, "No", "No event is parked.");
        }
        let detail =
            "RabbitMQ does not accept them. They stay on disk and are tried again; other events are delivered.";
        answer("parked", Level::Warning, events(self.ledger.parked), detail)
            .remedy("Read why with `prism-relay spool list --parked`; fix it, then retry them.")
            .runbook("PrismRelayEventsParked")
    }

    fn lost(&self) -> Answer {
        let losses = self.losses();
        let ledger = self.ledger_text();
        let Some(worst) = losses.first() else { return answer("lost", Level::Ok, "No", ledger) };
        // What is certain stays so beside a newer doubt.
        let is_certain = losses.iter().any(|loss| loss.word == "Yes");
        let word = if is_certain { "Yes" } else { worst.word };
        let said: Vec<_> = losses.iter().map(|loss| loss.detail.as_str()).collect();
        let answer = answer("lost", worst.level, word, format!("{} {ledger}", said.join(" ")));
        answer.remedy(worst.remedy).runbook(worst.runbook)
    }

    /// Everything that is or may be lost, the worst first.
    fn losses(&self) -> Vec<Loss> {
        let mut losses = Vec::new();
        if self.damaged > 0 {
            losses.push(Loss {
                level: Level::of_loss(self.uptime),
                word: "Yes",
                detail: format!(
                    "{} lost because the spool file was damaged.",
                    count(self.damaged, "accepted event was", "accepted events were")
                ),
                remedy: "The relay's log says what was damaged, and where the damaged file is kept. Check the disk.",
                runbook: "PrismRelayEventsLost",
                note: format!(
                    "{} lost because the spool file was damaged.",
                    count(self.damaged, "event was", "events were")
                ),
            });
        }
        if let Some(gap) = self.gap() {
            losses.push(Loss {
                level: Level::Problem,
                word: "Perhaps",
                detail: format!("The totals differ by {}.", events(gap)),
                remedy: "Run `prism-relay spool verify` on this machine, and keep its output.",
                runbook: "PrismRelayEventsLost",
                note: "The totals of the spool do not add up.".to_owned(),
            });
        }
        losses.extend(self.turned_away.losses());
        losses.extend(self.unreconciled());
        // Stable: among equals the first one counts.
        losses.sort_by_key(|loss| std::cmp::Reverse(loss.level));
        losses
    }

    /// By how many events the totals differ, if they do.
    fn gap(&self) -> Option<u64> {
        let Ledger { accepted, confirmed, pending, parked, removed, .. } = self.ledger;
        let parts = [confirmed, pending, parked, removed].iter().fold(0u64, |sum, part| sum.saturating_add(*part));
        (accepted != parts).then(|| accepted.abs_diff(parts))
    }

    fn ledger_text(&self) -> String {
        let Ledger { accepted, confirmed, pending, parked, removed, .. } = self.ledger;
        let [accepted, confirmed, pending, parked, all_removed] =
            [accepted, confirmed, pending, parked, removed].map(grouped);
        let removed = match self.damaged {
            0 => format!("{all_removed} removed."),
            lost => format!(
                "{all_removed} removed ({} lost, {} by an operator).",
                grouped(lost),
                grouped(removed.saturating_sub(lost))
            ),
        };
        let by_api = self.by_api();
        format!(
            "{accepted} accepted = {confirmed} in RabbitMQ + {pending} waiting + {parked} parked + {removed}{by_api}"
        )
    }

    fn workers(&self) -> Answer {
        if let Some(missing) = self.missing.first() {
            let more = match self.missing.len() - 1 {
                0 => String::new(),
                more => format!(" and {more} more"),
            };
            return answer("workers", Level::Problem, "No", format!("Missing in RabbitMQ: {missing}{more}."))
                .remedy("Create it with the commands that `prism-relay topology diff` prints.")
                .runbook("PrismRelayTopologyMissing");
        }
        if let Some(why) = &self.unwatched {
            let detail = format!("The relay does not look at the queues: {why}.");
            return answer("workers", Level::Note, "Not known", detail);
        }
        let complaints = || self.queues.iter().filter_map(Queue::complaint);
        // The first of equals.
        if let Some(worst) = complaints().rev().max_by_key(|complaint| complaint.level) {
            let detail = match complaints().count() - 1 {
                0 => worst.detail.clone(),
                others => {
                    let others = count(others as u64, "more queue needs", "more queues need");
                    format!("{} {others} a look.", worst.detail)
                }
            };
            return Answer { detail, ..worst };
        }
        let work = || self.queues.iter().filter(|queue| queue.role == Role::Work);
        let (mut waiting, mut consuming) = (0, 0);
        for queue in work() {
            if let QueueState::Counted { messages, consumers, .. } = queue.state {
                waiting += messages;
                consuming += consumers;
            }
        }
        if work().next().is_none() || work().any(|queue| queue.state == QueueState::Unknown) {
            let detail = "The queues have not answered yet.";
            return answer("workers", Level::Note, "Not known yet", detail);
        }
        let is_unknown = |queue: &&Queue| queue.role != Role::Inner && queue.state == QueueState::Unknown;
        if let Some(Queue { name, .. }) = self.queues.iter().find(is_unknown) {
            let detail = format!("{name} has not answered, so the number of its messages is not known.");
            return answer("workers", Level::Note, "Not known", detail);
        }
        let messages = count(waiting, "message waits", "messages wait");
        match consuming {
            0 => answer("workers", Level::Ok, "Nothing waits", "No worker is connected, and no message waits for one."),
            workers => answer(
                "workers",
                Level::Ok,
                "Yes",
                format!("{}; {messages} for them.", count(workers, "worker is connected", "workers are connected")),
            ),
        }
    }
}

impl TurnedAway {
    /// What is lost, or may be, because it was refused.
    fn losses(&self) -> Vec<Loss> {
        let mut losses = Vec::new();
        let reason = |last: &Option<Refusal>| last.as_ref().map_or("", |last| last.reason);
        let level = |last: &Option<Refusal>| last.as_ref().map_or(Level::Note, |last| Level::of_loss(last.age));
        if self.lost > 0 {
            let were = count(self.lost, "webhook was", "webhooks were");
            let last = self.last_lost.map(|last| format!(", the last one {}", ago(last.age))).unwrap_or_default();
            losses.push(Loss {
                level: level(&self.last_lost),
                word: "Yes",
                detail: format!(
                    "{were} refused since the start and not accepted later{last}: Prism has given up on them."
                ),
                remedy: refusals::step(reason(&self.last_lost)),
                runbook: refusals::runbook(reason(&self.last_lost), false),
                note: format!(
                    "{} lost: refused, and not accepted later.",
                    count(self.lost, "webhook is", "webhooks are")
                ),
            });
        }
        if self.waiting > 0 {
            let note = format!("{} refused just now.", count(self.waiting, "webhook was", "webhooks were"));
            losses.push(Loss {
                level: Level::Warning,
                word: "Not yet",
                detail: format!("{note} Prism gives up on each after about 35 s."),
                remedy: refusals::step(reason(&self.last_waiting)),
                runbook: refusals::runbook(reason(&self.last_waiting), false),
                note,
            });
        }
        if self.unrecognisable > 0 {
            let were = count(self.unrecognisable, "request was", "requests were");
            let note = format!("{were} refused since the start before the body was read; Prism's may be among them.");
            losses.push(Loss {
                level: level(&self.last_unrecognisable).min(Level::Warning),
                word: "Perhaps",
                detail: note.clone(),
                remedy: refusals::step(reason(&self.last_unrecognisable)),
                runbook: refusals::runbook(reason(&self.last_unrecognisable), false),
                note,
            });
        }
        losses
    }
}

impl Queue {
    /// What is wrong with a queue, as the answer about workers.
    fn complaint(&self) -> Option<Answer> {
        let name = &self.name;
        let answer = |level, word: &str, detail: String| Some(answer("workers", level, word, detail));
        match (self.role, &self.state) {
            (_, QueueState::Trouble { text, remedy }) => {
                let answer = answer(Level::Problem, "No", format!("{name} {text}."))?;
                Some(answer.remedy(sentence(remedy)).runbook("PrismRelayQueueUnavailable"))
            }
            (Role::Work, QueueState::Counted { messages: 1.., consumers: 0, unattended }) => {
                let level = if *unattended >= NO_WORKER { Level::Problem } else { Level::Warning };
                let answer = answer(level, "No", format!("{name}: {}, no worker connected.", self.waiting()))?;
                Some(answer.remedy("Start the workers of this queue.").runbook("PrismRelayNoWorkers"))
            }
            (Role::Dead, QueueState::Counted { messages: messages @ 1.., .. }) => {
                let letters = count(*messages, "dead letter", "dead letters");
                let (them, they) = if *messages == 1 { ("it", "it") } else { ("them", "they") };
                let detail = format!("{letters} in {name}: workers rejected {them}, or {they} waited too long.");
                let remedy = format!(
                    "Look at {them} with `prism-relay redrive --dry-run`; fix the worker, then redrive {them}."
                );
                Some(answer(Level::Warning, &letters, detail)?.remedy(remedy).runbook("PrismRelayDeadLetters"))
            }
            (Role::Unrouted, QueueState::Counted { messages: messages @ 1.., .. }) => {
                let unrouted = count(*messages, "unrouted event", "unrouted events");
                let detail = format!("{unrouted} in {name}: no queue is bound for their type.");
                let remedy = format!(
                    "Look at them with `prism-relay redrive --from {name} --dry-run`; bind a queue in \
                     topology.queues, then redrive them."
                );
                Some(answer(Level::Warning, &unrouted, detail)?.remedy(remedy).runbook("PrismRelayUnrouted"))
            }
            (_, QueueState::Unknown | QueueState::Counted { .. }) => None,
        }
    }

    fn waiting(&self) -> String {
        match self.state {
            QueueState::Counted { messages, .. } => count(messages, "waits", "wait"),
            QueueState::Unknown | QueueState::Trouble { .. } => String::new(),
        }
    }
}

impl Facts {
    /// Recent refusals, if there are enough to report.
    pub(super) fn refusing(&self) -> Option<Refusing> {
        let all = |window: &Window, minutes, min| {
            let refusing = window.refusing(minutes, |_| true)?;
            (window.accepted == 0 && refusing.count >= min).then_some(Refusing { all: true, ..refusing })
        };
        all(&self.last_5_minutes, 5, REFUSED_IN_5_MINUTES)
            .or_else(|| all(&self.last_30_minutes, 30, REFUSED_IN_30_MINUTES))
            .or_else(|| {
                let others = self.last_5_minutes.refusing(5, |code| !refusals::is_unverified(code))?;
                (others.count >= REFUSED_MIN).then_some(others)
            })
            .or_else(|| {
                let unverified = self.last_hour.refusing(60, refusals::is_unverified)?;
                let webhooks = self.last_hour.accepted + self.last_hour.refused.values().sum::<u64>();
                let share = unverified.count as f64 / webhooks as f64;
                (unverified.count >= UNVERIFIED_MIN && share > UNVERIFIED_SHARE).then_some(unverified)
            })
    }

    /// The used share of the spool; 1 if the next event would not fit.
    fn share(&self) -> f64 {
        let next = self.used.saturating_add(EVENT_OVERHEAD_BYTES);
        if next > self.max_bytes { 1.0 } else { self.used as f64 / self.max_bytes.max(1) as f64 }
    }
}

impl Window {
    /// The refusals whose code is selected.
    fn refusing(&self, minutes: u64, select: impl Fn(&str) -> bool) -> Option<Refusing> {
        let selected = || self.refused.iter().filter(|(code, _)| select(code));
        let (reason, _) = selected().max_by_key(|(_, count)| **count)?;
        let count = selected().map(|(_, count)| count).sum();
        Some(Refusing { reason, count, minutes, all: false })
    }
}

mod headline;
mod reconciling;
#[cfg(test)]
mod tests;
