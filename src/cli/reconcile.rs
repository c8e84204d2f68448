//! `reconcile`: has the running relay ask Prism's API for named scans and predictions, one at a time, and take in the
//! events that no webhook brought. The command itself asks nothing, so the relay's rate holds.

use std::io::{self, IsTerminal, Read};
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use hyper::Uri;
use serde::Deserialize;

use super::failure::Failure;
use super::http::{OpsResource, ops_url};
use super::interrupt::Interrupt;
use super::output::{Progress, say};
use crate::config::Config;
use crate::subject::{Kind, Subject};
use crate::text::{clean, span};

/// Maximum time for one answer: a prediction takes two requests at `reconcile.rate`, and another question may come
/// first.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(600);
/// Maximum time of pauses for Prism's API without an answer in between: twice the longest one that the relay keeps.
const PAUSES_MAX: Duration = Duration::from_secs(2 * 3600);
/// Maximum size of standard input: more than 300,000 ids.
const INPUT_BYTES_MAX: u64 = 16 * 1024 * 1024;
/// Mistakes in standard input that are shown.
const MISTAKES_SHOWN: usize = 10;

#[derive(clap::Args)]
pub(super) struct Options {
    /// Scan to ask for; may be repeated [default, with --prediction: read from standard input, one a line: scan:ID,
    /// prediction:ID, or the ID of a scan alone]
    #[arg(long = "scan", value_name = "ID", value_parser = |id: &str| named(Kind::Scan, id))]
    scans: Vec<Subject>,
    /// Prediction (Future Me) to ask for; may be repeated
    #[arg(long = "prediction", value_name = "ID", value_parser = |id: &str| named(Kind::Prediction, id))]
    predictions: Vec<Subject>,
    /// Only print which events are missing
    #[arg(long)]
    dry_run: bool,
    /// Address of the relay's operators' listener [default: ops.listen]
    #[arg(long, value_parser = ops_url)]
    url: Option<Uri>,
}

fn named(kind: Kind, id: &str) -> Result<Subject, String> {
    Subject::new(kind, id).ok_or_else(|| "must be 1 to 128 printable ASCII characters without blanks".to_owned())
}

pub(super) async fn run(config: &Config, options: Options) -> Result<(), Failure> {
    let mut subjects = [options.scans, options.predictions].concat();
    if subjects.is_empty() {
        subjects = subjects_in(&input()?).map_err(Failure::Usage)?;
    }
    let relay = OpsResource::new(config, options.url.clone(), "/api/reconcile", ANSWER_TIMEOUT)?;
    let relay = relay.for_action(config, options.url).await?;
    let (mut interrupt, mut counts) = (Interrupt::listen()?, Counts::default());
    let mut progress = Progress::new(subjects.len() as u64, "scans and predictions");
    let mut outcome = Ok(());
    for subject in &subjects {
        let answer = match interrupt.or(answer(&relay, subject, options.dry_run, &progress)).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(error)) => {
                outcome = Err(error.into());
                break;
            }
            Err(_) => {
                outcome = Err(anyhow!("interrupted; run this again for the rest").into());
                break;
            }
        };
        if let Some(line) = answer.line() {
            progress.aside(|| say(&line));
        }
        counts.add(&answer);
        progress.set(counts.asked);
    }
    progress.finish();
    say(&counts.summary(options.dry_run, subjects.len() as u64));
    outcome.and(if counts.failed == 0 { Ok(()) } else { Err(Failure::Reported) })
}

/// The text on standard input.
fn input() -> Result<String, Failure> {
    let stdin = io::stdin().lock();
    if stdin.is_terminal() {
        return Err(Failure::Usage("name scans with --scan ID, or pass their IDs on standard input".to_owned()));
    }
    let mut text = String::new();
    stdin.take(INPUT_BYTES_MAX + 1).read_to_string(&mut text).context("cannot read standard input")?;
    if text.len() as u64 > INPUT_BYTES_MAX {
        return Err(Failure::Usage(format!("standard input is larger than {} MiB", INPUT_BYTES_MAX >> 20)));
    }
    Ok(text)
}

/// The subjects in a text, one a line. Empty lines and lines that begin with `#` are skipped.
fn subjects_in(text: &str) -> Result<Vec<Subject>, String> {
    let lines = (1..).zip(text.lines().map(str::trim)).filter(|(_, line)| !line.is_empty() && !line.starts_with('#'));
    let (mut subjects, mut mistakes) = (Vec::new(), Vec::new());
    for (number, line) in lines {
        match line.parse().ok().or_else(|| Subject::new(Kind::Scan, line).filter(|_| !line.contains(':'))) {
            Some(subject) => subjects.push(subject),
            None => mistakes.push(number.to_string()),
        }
    }
    match (mistakes.len(), subjects.is_empty()) {
        (0, false) => Ok(subjects),
        (0, true) => Err("standard input has no IDs".to_owned()),
        (count, _) => {
            let more = if count > MISTAKES_SHOWN { ", ..." } else { "" };
            let shown = mistakes[..count.min(MISTAKES_SHOWN)].join(", ");
            Err(format!("standard input: not scan:ID, prediction:ID or an ID of a scan in line {shown}{more}"))
        }
    }
}

/// What the relay answers.
#[derive(Deserialize)]
struct Answer {
    subject: String,
    outcome: String,
    text: String,
    /// How long Prism's API is not to be asked, if that is why there is no answer.
    pause_seconds: Option<u64>,
}

impl Answer {
    /// What to print; nothing if no event is missing.
    fn line(&self) -> Option<String> {
        let Self { subject, outcome, text, .. } = self;
        (outcome != "in_step").then(|| clean(&format!("{outcome:<9} {subject}: {text}")))
    }
}

/// Asks until there is an answer. Keeps the pauses that Prism's API asks for, within [`PAUSES_MAX`].
async fn answer(
    relay: &OpsResource,
    subject: &Subject,
    is_dry_run: bool,
    progress: &Progress,
) -> anyhow::Result<Answer> {
    let mut paused = Duration::ZERO;
    loop {
        let answer = ask(relay, subject, is_dry_run).await?;
        let Some(pause) = answer.pause_seconds.map(Duration::from_secs) else { return Ok(answer) };
        paused = match longer(paused, pause) {
            Some(paused) => paused,
            None => bail!("Prism's API asks for pauses of more than {}; run this again later", span(PAUSES_MAX)),
        };
        progress.pause("Prism's API asks for a pause", pause).await;
    }
}

/// The time of all pauses with this one; `None` if that is too long.
fn longer(paused: Duration, pause: Duration) -> Option<Duration> {
    paused.checked_add(pause).filter(|all| *all <= PAUSES_MAX)
}

async fn ask(relay: &OpsResource, subject: &Subject, is_dry_run: bool) -> anyhow::Result<Answer> {
    let mut query = form_urlencoded::Serializer::new(String::new());
    query.append_pair("subject", &subject.to_string());
    if is_dry_run {
        query.append_pair("dry_run", "true");
    }
    let answer = relay.post(&query.finish()).await?;
    serde_json::from_value(answer).context("the answer is not that of a relay")
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Counts {
    asked: u64,
    in_step: u64,
    repaired: u64,
    unknown: u64,
    failed: u64,
}

impl Counts {
    fn add(&mut self, answer: &Answer) {
        self.asked += 1;
        *match answer.outcome.as_str() {
            "in_step" | "late" | "pending" => &mut self.in_step,
            "repaired" => &mut self.repaired,
            "unknown" => &mut self.unknown,
            _ => &mut self.failed,
        } += 1;
    }

    fn summary(&self, is_dry_run: bool, total: u64) -> String {
        let Self { asked, in_step, repaired, unknown, failed } = self;
        let would = if is_dry_run { "would be repaired" } else { "repaired" };
        let text = format!("{asked} asked: {in_step} in step, {repaired} {would}, {unknown} unknown, {failed} failed");
        match total - asked {
            0 => text,
            left => format!("{text}; {left} not asked"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_come_one_a_line_and_a_bare_one_is_a_scan() {
        let text = "# from the data base\nscan:a\r\n\n  prediction:b  \n7f2ec6e0-b06d\n";
        let subjects = subjects_in(text).unwrap();
        let names: Vec<_> = subjects.iter().map(ToString::to_string).collect();
        assert_eq!(names, ["scan:a", "prediction:b", "scan:7f2ec6e0-b06d"]);
        for (text, lines) in [("a b\nscan:c\nuser:d\nscan:", "line 1, 3, 4"), ("\n#\n", "no IDs"), ("", "no IDs")] {
            let error = subjects_in(text).unwrap_err();
            assert!(error.contains(lines), "{text:?}: {error}");
        }
        let many = "a b\n".repeat(1000);
        assert!(subjects_in(&many).unwrap_err().ends_with("8, 9, 10, ..."));
    }

    #[test]
    fn pauses_without_an_answer_in_between_are_limited() {
        assert_eq!(longer(PAUSES_MAX / 2, PAUSES_MAX / 2), Some(PAUSES_MAX));
        assert_eq!(longer(PAUSES_MAX / 2, PAUSES_MAX / 2 + Duration::from_secs(1)), None);
        assert_eq!(longer(Duration::ZERO, Duration::MAX), None);
    }

    #[test]
    fn the_summary_counts_each_answer_once() {
        let mut counts = Counts::default();
        let answer = |outcome: &str| Answer {
            subject: "scan:a".to_owned(),
            outcome: outcome.to_owned(),
            text: "why\u{1b}".to_owned(),
            pause_seconds: None,
        };
        for outcome in ["in_step", "pending", "late", "repaired", "unknown", "failed", "refused", "new"] {
            counts.add(&answer(outcome));
        }
        let text = "8 asked: 3 in step, 1 repaired, 1 unknown, 3 failed";
        assert_eq!(counts.summary(false, 8), text);
        assert_eq!(counts.summary(false, 10), format!("{text}; 2 not asked"));
        assert!(counts.summary(true, 8).contains("1 would be repaired"));
        assert_eq!(answer("in_step").line(), None);
        assert_eq!(answer("failed").line().as_deref(), Some("failed    scan:a: why?"));
    }
}
