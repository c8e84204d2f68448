//! The one-line status shown first: the most important fact about the relay, in words. Pure.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use serde::Serialize;

use crate::text::span;

/// The one-line status.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Summary {
    pub level: Level,
    pub text: String,
}

/// How serious the status is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Level {
    Ok,
    /// No event is lost, but an operator should look.
    Warning,
    /// Webhooks are being refused, or events do not reach the workers.
    Problem,
}

/// Webhooks refused within the last five minutes, without requests that cannot be webhooks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct RecentRefusals {
    /// The most frequent `code` of the answers.
    pub reason: &'static str,
    pub count: u64,
    /// Whether no webhook was accepted in the same time.
    pub all: bool,
}

/// The facts that the summary is made from. Ages are measured now.
#[derive(Clone, Debug, Default)]
pub(super) struct Facts {
    pub draining: bool,
    pub writable: bool,
    /// What is wrong with the spool's file or disk, and what to do.
    pub reason: Option<&'static str>,
    pub pending: u64,
    pub parked: u64,
    pub removed: u64,
    /// Events lost because the spool file was damaged. `removed` includes them.
    pub lost: u64,
    pub bytes: u64,
    pub max_bytes: u64,
    /// Age of the oldest pending event.
    pub oldest: Option<Duration>,
    pub connected: bool,
    /// RabbitMQ's reason for blocking the connection.
    pub blocked: Option<String>,
    /// Why the relay is not connected.
    pub error: Option<String>,
    /// Time since the connection was last made, lost, blocked or unblocked.
    pub broker_state_age: Duration,
    pub last_confirm: Option<Duration>,
    pub last_accepted: Option<Duration>,
    /// Webhooks accepted within the last five minutes.
    pub recent_accepted: u64,
    /// Webhooks refused within the last five minutes, by `code`.
    pub recent_refused: BTreeMap<&'static str, u64>,
}

/// The used share of the spool from which on the summary warns that it fills up.
const NEARLY_FULL: f64 = 0.8;
/// The age of the oldest pending event from which on deliveries are behind.
const LATE: Duration = Duration::from_secs(30);
/// An outage shorter than this is only a warning: a reconnect usually takes less.
const BRIEF: Duration = Duration::from_secs(5);
/// Fewer refusals are not reported, because scanners cause some on every public address. Unsigned requests are more
/// often from scanners, so their limit is higher.
const REFUSALS_MIN: u64 = 5;
const UNSIGNED_REFUSALS_MIN: u64 = 20;

impl Facts {
    pub(super) fn summarize(&self) -> Summary {
        let (level, text) = self
            .not_accepting()
            .or_else(|| self.not_delivering())
            .or_else(|| self.refusing_all())
            .or_else(|| self.behind())
            .or_else(|| self.refusing_some())
            .or_else(|| self.stuck())
            .unwrap_or_else(|| (Level::Ok, self.well()));
        let notes = self.notes(&text);
        let level = if level == Level::Ok && !notes.is_empty() { Level::Warning } else { level };
        Summary { level, text: text + &notes }
    }

    /// The recent refusals, if there are enough to report.
    pub(super) fn refusing(&self) -> Option<RecentRefusals> {
        let count = self.recent_refused.values().sum();
        let (reason, _) = self.recent_refused.iter().max_by_key(|(_, count)| **count)?;
        let enough = if *reason == "missing-signature" { UNSIGNED_REFUSALS_MIN } else { REFUSALS_MIN };
        (count >= enough).then_some(RecentRefusals { reason, count, all: self.recent_accepted == 0 })
    }

    fn not_accepting(&self) -> Option<(Level, String)> {
        if self.draining {
            let text =
                format!("The relay is shutting down. Undelivered events stay on disk: {}.", grouped(self.pending));
            return Some((Level::Warning, text));
        }
        if !self.writable {
            let text = "The spool cannot be written, so webhooks are answered 503. Prism gives up on each after 35 s.";
            return Some((Level::Problem, format!("{text} {}", self.reason_text("Check the disk."))));
        }
        if self.share() >= 1.0 {
            let mut text =
                "The spool is full, so webhooks are answered 503. Prism gives up on each after 35 s.".to_owned();
            if self.reason.is_some() {
                let _ = write!(text, " {}", self.reason_text(""));
            }
            if let Some(why) = self.why_not_delivering() {
                let _ = write!(text, " {why}.");
            }
            return Some((Level::Problem, text));
        }
        None
    }

    /// The reason as a sentence.
    fn reason_text(&self, without: &str) -> String {
        let Some(reason) = self.reason else { return without.to_owned() };
        let (first, rest) = reason.split_at(1);
        format!("{}{rest}.", first.to_uppercase())
    }

    fn not_delivering(&self) -> Option<(Level, String)> {
        let why = self.why_not_delivering()?;
        let waiting = match (self.pending, self.oldest) {
            (0, _) => "no event is waiting".to_owned(),
            (count, Some(oldest)) => format!("{} safe on disk, the oldest for {}", are(count), span(oldest)),
            (count, None) => format!("{} safe on disk", are(count)),
        };
        let webhooks = self.refusing().map_or("Webhooks are still accepted.".to_owned(), |refusing| refusing.text());
        let brief = !self.connected && self.broker_state_age < BRIEF;
        let level = if brief { Level::Warning } else { Level::Problem };
        Some((level, format!("{why}; {waiting}. {webhooks}")))
    }

    fn why_not_delivering(&self) -> Option<String> {
        let time = span(self.broker_state_age);
        if let (true, blocked) = (self.connected, &self.blocked) {
            return blocked.as_ref().map(|reason| format!("RabbitMQ has been refusing messages for {time} ({reason})"));
        }
        let away = |error: &&String| {
            ["cannot reach", "no answer", "the connection was lost"].iter().any(|start| error.starts_with(start))
        };
        match self.error.as_ref().filter(|error| !away(error)) {
            None => Some(format!("RabbitMQ has been unreachable for {time}")),
            Some(error) => Some(format!("Nothing has been delivered to RabbitMQ for {time} ({error})")),
        }
    }

    fn refusing_all(&self) -> Option<(Level, String)> {
        let refusing = self.refusing().filter(|refusing| refusing.all)?;
        Some((Level::Problem, refusing.text()))
    }

    fn refusing_some(&self) -> Option<(Level, String)> {
        self.refusing().map(|refusing| (Level::Warning, refusing.text()))
    }

    fn behind(&self) -> Option<(Level, String)> {
        let oldest = self.oldest.filter(|oldest| *oldest >= LATE)?;
        let text = format!("Deliveries are behind: {} waiting, the oldest for {}.", are(self.pending), span(oldest));
        Some((Level::Warning, text))
    }

    fn stuck(&self) -> Option<(Level, String)> {
        if self.parked == 0 || self.pending > 0 {
            return None;
        }
        let last = self.last_confirm.map(|age| format!(", the last one {} ago", span(age))).unwrap_or_default();
        Some((Level::Warning, format!("{}; all others are delivered{last}.", self.parked_text())))
    }

    fn parked_text(&self) -> String {
        let verb = if self.parked == 1 { "is" } else { "are" };
        format!(
            "{} {verb} parked because RabbitMQ does not accept {}",
            events(self.parked),
            if self.parked == 1 { "it" } else { "them" }
        )
    }

    fn well(&self) -> String {
        match (self.pending, self.last_confirm, self.last_accepted) {
            // Removed events were not delivered, so "all" would be wrong.
            (0, Some(confirm), _) if self.removed > 0 => {
                format!("Nothing is waiting; the last event was delivered {} ago.", span(confirm))
            }
            (0, None, Some(_)) if self.removed > 0 => "All is well; nothing is waiting.".to_owned(),
            (0, Some(confirm), _) => format!("All accepted events are delivered; the last one {} ago.", span(confirm)),
            (0, None, None) => "All is well; no event has come in since the relay started.".to_owned(),
            (0, None, Some(_)) => "All accepted events are delivered.".to_owned(),
            (count, ..) => format!("All is well; {} on the way to RabbitMQ.", are(count)),
        }
    }

    /// Further facts worth a warning, unless `first` contains them.
    fn notes(&self, first: &str) -> String {
        let mut text = String::new();
        if self.lost > 0 {
            let _ = write!(
                text,
                " {} {} lost because the spool file was damaged; see the log.",
                events(self.lost),
                if self.lost == 1 { "was" } else { "were" }
            );
        }
        let full = self.share();
        if (NEARLY_FULL..1.0).contains(&full) {
            let _ = write!(text, " The spool is {:.0} % full.", full * 100.0);
        }
        if self.reason.is_some() && !first.contains(&self.reason_text("")) {
            let _ = write!(text, " {}", self.reason_text(""));
        }
        if self.parked > 0 && !first.contains(&self.parked_text()) {
            let _ = write!(text, " {}.", self.parked_text());
        }
        text
    }

    /// The used share of the spool; 1 if the next event would not fit.
    fn share(&self) -> f64 {
        let used = self.bytes + crate::spool::EVENT_OVERHEAD_BYTES;
        if used > self.max_bytes { 1.0 } else { self.bytes as f64 / self.max_bytes.max(1) as f64 }
    }
}

impl RecentRefusals {
    fn text(&self) -> String {
        let cause = match self.reason {
            "invalid-signature" => "they are signed with another secret, or a proxy changes them",
            "missing-signature" => "they are not signed",
            "stale-timestamp" => "their timestamp is too far from this machine's clock",
            "invalid-timestamp" => "their timestamp cannot be read",
            "body-too-large" => "they are larger than http.body_bytes_max",
            "request-timeout" => "they arrive too slowly",
            "spool-full" => "the spool was full",
            "spool-unavailable" => "the spool could not be written",
            other => other,
        };
        let count = grouped(self.count);
        if self.all {
            format!(
                "Every webhook is being refused ({count} in the last 5 min): {cause}. \
                 Prism gives up on each after 35 s."
            )
        } else {
            format!(
                "{count} webhooks were refused in the last 5 min, most of them because {cause}. Others are accepted."
            )
        }
    }
}

fn events(count: u64) -> String {
    if count == 1 { "1 event".to_owned() } else { format!("{} events", grouped(count)) }
}

fn are(count: u64) -> String {
    format!("{} {}", events(count), if count == 1 { "is" } else { "are" })
}

/// `1204` as `1,204`.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let groups = digits.as_bytes().rchunks(3).rev().map(String::from_utf8_lossy);
    groups.collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    fn well() -> Facts {
        Facts {
            writable: true,
            connected: true,
            max_bytes: 1 << 30,
            broker_state_age: 60 * MINUTE,
            last_confirm: Some(Duration::from_secs(3)),
            last_accepted: Some(Duration::from_secs(3)),
            ..Facts::default()
        }
    }

    fn says(facts: &Facts, level: Level, text: &str) {
        assert_eq!(facts.summarize(), Summary { level, text: text.to_owned() });
    }

    #[test]
    fn all_is_well() {
        says(&well(), Level::Ok, "All accepted events are delivered; the last one 3 s ago.");
        let fresh = Facts { last_confirm: None, last_accepted: None, ..well() };
        says(&fresh, Level::Ok, "All is well; no event has come in since the relay started.");
        says(&Facts { pending: 1, ..well() }, Level::Ok, "All is well; 1 event is on the way to RabbitMQ.");
    }

    #[test]
    fn rabbitmq_is_down_or_blocked() {
        let kept =
            Facts { pending: 1204, oldest: Some(Duration::from_secs(230)), broker_state_age: 4 * MINUTE, ..well() };
        let text = "1,204 events are safe on disk, the oldest for 3 min 50 s. Webhooks are still accepted.";
        let down = Facts { connected: false, ..kept.clone() };
        says(&down, Level::Problem, &format!("RabbitMQ has been unreachable for 4 min; {text}"));
        let blocked = Facts { blocked: Some("low on memory".to_owned()), ..kept };
        says(
            &blocked,
            Level::Problem,
            &format!("RabbitMQ has been refusing messages for 4 min (low on memory); {text}"),
        );
        let brief = Facts { connected: false, broker_state_age: Duration::from_secs(2), ..well() };
        assert_eq!(brief.summarize().level, Level::Warning);
    }

    #[test]
    fn the_spool_fills_up_or_cannot_be_written() {
        let nearly = Facts { bytes: 900 << 20, pending: 5, ..well() };
        says(&nearly, Level::Warning, "All is well; 5 events are on the way to RabbitMQ. The spool is 88 % full.");
        let full = Facts { bytes: 1 << 30, connected: false, broker_state_age: 100 * MINUTE, ..well() };
        let text = full.summarize().text;
        assert!(text.starts_with("The spool is full, so webhooks are answered 503"), "{text}");
        assert!(text.ends_with("RabbitMQ has been unreachable for 1 h 40 min."), "{text}");
        assert_eq!(Facts { writable: false, ..well() }.summarize().level, Level::Problem);
    }

    #[test]
    fn prism_signs_with_another_secret() {
        let refused = |counts: &[(&'static str, u64)]| counts.iter().copied().collect::<BTreeMap<_, _>>();
        // One other refusal must not hide the main cause.
        let counts = refused(&[("invalid-signature", 86), ("unreadable-body", 1)]);
        let refusing = Facts { recent_refused: counts, ..well() };
        let Summary { level, text } = refusing.summarize();
        assert!(level == Level::Problem && text.starts_with("Every webhook is being refused (87 in"), "{text}");
        assert!(text.contains("another secret"), "{text}");
        let some = Facts { recent_accepted: 500, ..refusing.clone() };
        let Summary { level, text } = some.summarize();
        assert!(level == Level::Warning && text.starts_with("87 webhooks were refused"), "{text}");
        let both = Facts { connected: false, ..refusing }.summarize().text;
        assert!(
            both.contains("unreachable") && both.contains("Every webhook") && !both.contains("still accepted"),
            "{both}"
        );
        let scanner = Facts { recent_refused: refused(&[("missing-signature", 10)]), ..well() };
        assert_eq!((scanner.summarize().level, scanner.refusing()), (Level::Ok, None));
    }

    #[test]
    fn the_error_of_the_broker_is_shown() {
        let error = Some("the broker rejected a publish (nack): a queue is full, or has no leader".to_owned());
        let nacked = Facts { connected: false, error, ..well() };
        let text = nacked.summarize().text;
        assert!(text.starts_with("Nothing has been delivered to RabbitMQ for 1 h (the broker rejected"), "{text}");
        let parked = Facts { connected: false, parked: 2, ..well() }.summarize().text;
        assert!(parked.ends_with("2 events are parked because RabbitMQ does not accept them."), "{parked}");
    }

    #[test]
    fn events_are_parked_or_late() {
        let parked = Facts { parked: 3, ..well() };
        let text = "3 events are parked because RabbitMQ does not accept them; all others are delivered, \
                    the last one 3 s ago.";
        says(&parked, Level::Warning, text);
        let both = Facts { parked: 1, pending: 2, ..well() };
        let text =
            "All is well; 2 events are on the way to RabbitMQ. 1 event is parked because RabbitMQ does not accept it.";
        says(&both, Level::Warning, text);
        let late = Facts { pending: 70, oldest: Some(2 * MINUTE), ..well() };
        says(&late, Level::Warning, "Deliveries are behind: 70 events are waiting, the oldest for 2 min.");
        let damaged = Facts { lost: 2, removed: 2, ..well() };
        let text = "Nothing is waiting; the last event was delivered 3 s ago. 2 events were lost because the spool \
                    file \
                    was damaged; see the log.";
        says(&damaged, Level::Warning, text);
        let draining = Facts { draining: true, pending: 1, ..well() };
        says(&draining, Level::Warning, "The relay is shutting down. Undelivered events stay on disk: 1.");
    }
}
