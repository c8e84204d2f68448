//! `top`: shows the console's headline, answers and numbers in a terminal, for use over ssh.

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write as _};
use std::time::Duration;

use anyhow::Context;
use hyper::Uri;
use jiff::Timestamp;
use serde_json::Value;
use tokio::time::interval;

use super::failure::Failure;
use super::http::{OpsResource, ops_url};
use super::output::Printed;
use crate::config::Config;
use crate::text::{chain, clean, span};

const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// Moves the cursor to the upper left corner (ECMA-48). The old screen is then overwritten line by line, which does not
/// flicker.
const HOME: &str = "\x1b[H";
const CLEAR_LINE: &str = "\x1b[K";
const CLEAR_REST: &str = "\x1b[J";

const TYPES_MAX: usize = 8;
const TIMELINE_MAX: usize = 5;

#[derive(clap::Args)]
pub(super) struct Options {
    /// Address of the relay's operators' listener [default: ops.listen]
    #[arg(long, value_parser = ops_url)]
    url: Option<Uri>,
    /// Time between updates
    #[arg(long, default_value = "1s", value_parser = humantime::parse_duration)]
    interval: Duration,
    /// Print once and exit (the default unless the output is a terminal)
    #[arg(long)]
    once: bool,
}

pub(super) async fn run(config: &Config, options: Options) -> Result<(), Failure> {
    let status = OpsResource::new(config, options.url, "/api/status", ANSWER_TIMEOUT)?;
    let status = status.with_token(config.ops.token.as_ref());
    if options.once || !io::stdout().is_terminal() {
        let mut printed = Printed::default();
        printed.line(picture(&status.get().await?).trim_end().to_owned());
        return Ok(printed.out()?);
    }
    tokio::select! {
        shown = watch(&status, options.interval) => Ok(shown.context("cannot print")?),
        // Ctrl-C is the normal end.
        _ = tokio::signal::ctrl_c() => Ok(()),
    }
}

/// Runs until printing fails. If the relay does not answer, it prints the error and tries again.
async fn watch(status: &OpsResource, every: Duration) -> io::Result<()> {
    let mut ticks = interval(every.max(Duration::from_millis(100)));
    loop {
        ticks.tick().await;
        let text = match status.get().await {
            Ok(status) => picture(&status),
            Err(error) => format!("{}\n", chain(error.as_ref())),
        };
        let lines = text.replace('\n', &format!("{CLEAR_LINE}\n"));
        let mut terminal = io::stdout().lock();
        write!(terminal, "{HOME}{lines}{CLEAR_REST}")?;
        terminal.flush()?;
    }
}

/// Renders `/api/status` as text. Shows a missing value as `?`, because the relay may have another version.
fn picture(status: &Value) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: String| {
        let _ = writeln!(text, "{name:<22}{value}");
    };
    let headline = &status["headline"];
    line(&level(&headline["level"]), text_of(&headline["text"]));
    line("", clean(headline["advice"].as_str().unwrap_or_default()));
    line("", String::new());
    for answer in status["answers"].as_array().into_iter().flatten() {
        let mark = if matches!(answer["level"].as_str(), Some("ok" | "note")) { " " } else { "!" };
        let (question, word) = (text_of(&answer["question"]), text_of(&answer["word"]));
        line("", format!("{mark} {question:<30}{word}"));
        if mark == "!" {
            line("", format!("      {}", text_of(&answer["detail"])));
        }
    }
    line("", String::new());
    let (webhooks, spool, broker) = (&status["webhooks"], &status["spool"], &status["broker"]);
    let refused: u64 =
        webhooks["refused"].as_object().into_iter().flatten().filter_map(|(_, count)| count.as_u64()).sum();
    line(
        "webhooks since start",
        format!("{} accepted, {} duplicates, {refused} refused", webhooks["accepted"], webhooks["duplicate"]),
    );
    for (code, count) in webhooks["refused"].as_object().into_iter().flatten() {
        line("", format!("{count:>8}  {code}"));
    }
    line("last", format!("accepted {}, confirmed {}", ago(status, "accepted_at"), ago(status, "confirmed_at")));
    line(
        "spool, over its life",
        format!(
            "{} accepted = {} confirmed + {} pending + {} parked + {} removed",
            spool["accepted"], spool["confirmed"], spool["pending"], spool["parked"], spool["removed"]
        ),
    );
    let oldest = spool["oldest_age_seconds"].as_f64().map(|age| span(Duration::from_secs_f64(age.max(0.0))));
    let share = 100.0 * spool["bytes"].as_f64().unwrap_or(0.0) / spool["max_bytes"].as_f64().unwrap_or(1.0).max(1.0);
    let oldest = oldest.map_or_else(|| "nothing is pending".to_owned(), |age| format!("the oldest has waited {age}"));
    line("", format!("{share:.1} % full; {oldest}"));
    let state = match (broker["connected"].as_bool(), broker["blocked"].as_str()) {
        (Some(true), None) => format!("connected to {}", text_of(&broker["url"])),
        (Some(true), Some(reason)) => format!("blocked: {}", clean(reason)),
        _ => format!("not connected: {}", text_of(&broker["error"])),
    };
    line("RabbitMQ", format!("{state}; {} in flight", broker["in_flight"]));
    for entry in status["timeline"].as_array().into_iter().flatten().take(TIMELINE_MAX) {
        line("", format!("{} {} {}", text_of(&entry["at"]), text_of(&entry["what"]), text_of(&entry["detail"])));
    }
    for kind in status["types"].as_array().into_iter().flatten().take(TYPES_MAX) {
        line("", format!("{:>8}  {}", kind["accepted"], text_of(&kind["type"])));
    }
    let up = Duration::from_secs(status["uptime_seconds"].as_u64().unwrap_or(0));
    line("", format!("prism-relay {}, up for {}", text_of(&status["version"]), span(up)));
    text
}

fn level(level: &Value) -> String {
    match level.as_str() {
        Some("ok" | "note") => "all is well".to_owned(),
        Some("warning") => "NEEDS ATTENTION".to_owned(),
        Some("problem") => "PROBLEM".to_owned(),
        _ => "?".to_owned(),
    }
}

fn text_of(value: &Value) -> String {
    clean(value.as_str().unwrap_or("?"))
}

/// The age of a time in `last`, at the time of the status.
fn ago(status: &Value, key: &str) -> String {
    let time = |value: &Value| value.as_str()?.parse::<Timestamp>().ok();
    match (time(&status["last"][key]), time(&status["now"])) {
        (Some(then), Some(now)) => format!("{} ago", span(now.duration_since(then).unsigned_abs())),
        _ => "never".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_status_of_any_shape_is_shown_without_control_characters() {
        assert!(picture(&Value::Null).contains('?'));
        let status = json!({
            "now": "2026-11-24T12:00:10Z", "last": { "accepted_at": "2026-11-24T12:00:00Z", "confirmed_at": null },
            "headline": { "level": "problem", "text": "RabbitMQ \u{1b}[31m is away", "advice": "Start it." },
            "answers": [
                {
                    "question": "Is RabbitMQ accepting events?", "level": "problem", "word": "No",
                    "detail": "\u{7}Gone.",
                },
                { "question": "Is anything parked?", "level": "ok", "word": "No", "detail": "No event is parked." },
            ],
            "types": [{ "type": "a\nb", "accepted": 7 }],
        });
        let text = picture(&status);
        assert!(text.starts_with("PROBLEM               RabbitMQ ?[31m is away\n"), "{text}");
        let answers = "! Is RabbitMQ accepting events? No\n                            ?Gone.\n                        \
                       Is anything parked?           No\n";
        assert!(text.contains(answers) && text.contains("Start it."), "{text}");
        assert!(text.contains("accepted 10 s ago, confirmed never") && text.contains("       7  a?b"), "{text}");
    }
}
