//! `spool`: inspects the spool, also while the relay runs, and removes events from it.

use anyhow::{Context, anyhow};
use clap::Subcommand;
use jiff::Timestamp;
use serde::Serialize;
use serde_json::Value;
use uuid::Uuid;

use super::failure::Failure;
use super::output::{Printed, say};
use crate::config::Config;
use crate::event::Envelope;
use crate::spool::{Entry, Inspector};
use crate::text::clean;

/// Printed in place of a `userToken`.
const HIDDEN: &str = "[hidden]";

#[derive(Subcommand)]
pub(super) enum Action {
    /// Print the number of events in the spool, and the lifetime totals
    Stats,
    /// List events, the oldest first
    List {
        /// Only parked events, which the broker rejected or did not route
        #[arg(long)]
        parked: bool,
        /// Stop after this many events
        #[arg(long, default_value = "100")]
        limit: u64,
        /// Print one JSON object per line
        #[arg(long)]
        json: bool,
    },
    /// Print one event, with its userToken hidden
    Show { id: Uuid },
    /// Check the file, every body and the totals; exit code 1 if anything is wrong
    Verify,
    /// Remove events permanently: they will not be delivered
    Remove {
        #[arg(required = true)]
        ids: Vec<Uuid>,
    },
}

pub(super) fn run(config: &Config, action: Action) -> Result<(), Failure> {
    let path = &config.spool.path;
    if !path.exists() {
        return Err(anyhow!("there is no spool at {}", path.display()).into());
    }
    let printed = match action {
        Action::Stats => stats(&Inspector::open(path)?)?,
        Action::List { parked, limit, json } => list(&Inspector::open(path)?, parked, limit, json)?,
        Action::Show { id } => show(&Inspector::open(path)?, id)?,
        Action::Verify => return verify(&mut Inspector::open(path)?),
        Action::Remove { ids } => return remove(&mut Inspector::open_for_change(path)?, &ids),
    };
    Ok(printed.out()?)
}

fn stats(spool: &Inspector) -> anyhow::Result<Printed> {
    let ledger = spool.ledger()?;
    let oldest = spool.oldest_pending_ms()?.map_or("none".to_owned(), time);
    let mut printed = Printed::default();
    for (name, value) in [
        ("accepted", ledger.accepted.to_string()),
        ("confirmed", ledger.confirmed.to_string()),
        ("pending", ledger.pending.to_string()),
        ("parked", ledger.parked.to_string()),
        ("removed", ledger.removed.to_string()),
        ("duplicates", ledger.duplicates.to_string()),
        ("bytes", ledger.bytes.to_string()),
        ("oldest pending", oldest),
    ] {
        printed.line(format!("{name:<16} {value}"));
    }
    Ok(printed)
}

/// An event without its body.
#[derive(Serialize)]
struct Row {
    id: Uuid,
    time: String,
    r#type: String,
    subject: String,
    state: String,
    bytes: usize,
    verified: bool,
    intact: bool,
    parked: Option<String>,
}

impl Row {
    fn of(entry: Entry) -> Self {
        let event = entry.stored.event;
        let envelope = Envelope::parse(&event.body).unwrap_or_default();
        Self {
            id: event.id,
            time: time(event.accepted_ms),
            r#type: envelope.event_type.to_string(),
            subject: envelope.subject().unwrap_or_default(),
            state: envelope.state.as_deref().unwrap_or_default().to_owned(),
            bytes: event.body.len(),
            verified: event.authentic,
            intact: event.is_intact(),
            parked: entry.parked_reason,
        }
    }
}

fn list(spool: &Inspector, parked: bool, limit: u64, json: bool) -> anyhow::Result<Printed> {
    let mut printed = Printed::default();
    let each = |entry| {
        let row = Row::of(entry);
        printed.line(if json { serde_json::to_string(&row).unwrap_or_default() } else { line(&row) });
    };
    spool.each(parked, limit, each)?;
    Ok(printed)
}

fn line(row: &Row) -> String {
    let Row { id, time, r#type, subject, state, bytes, parked, .. } = row;
    let parked = parked.as_deref().map(|reason| format!("  {reason}")).unwrap_or_default();
    clean(&format!("{time}  {id}  {type:<42}  {subject:<47}  {state:<10}  {bytes} B{parked}"))
}

fn show(spool: &Inspector, id: Uuid) -> anyhow::Result<Printed> {
    let missing = || format!("there is no event {id}: it was delivered or removed, or never accepted");
    let entry = spool.find(id)?.with_context(missing)?;
    let body = entry.stored.event.body.clone();
    let fingerprint = entry.stored.event.fingerprint.to_string();
    let seq = entry.stored.seq;
    let row = Row::of(entry);
    let mut printed = Printed::default();
    for (name, value) in [
        ("id", row.id.to_string()),
        ("seq", seq.to_string()),
        ("time", row.time),
        ("type", row.r#type),
        ("subject", row.subject),
        ("state", row.state),
        ("verified", row.verified.to_string()),
        ("fingerprint", fingerprint),
        ("intact", row.intact.to_string()),
        ("parked", row.parked.unwrap_or("no".to_owned())),
    ] {
        printed.line(clean(&format!("{name:<12} {value}")));
    }
    match serde_json::from_slice::<Value>(&body) {
        Ok(mut json) => {
            hide(&mut json);
            printed.line(serde_json::to_string_pretty(&json).unwrap_or_default());
        }
        // The body may contain anything, so it is not printed.
        Err(_) => printed.line(format!("the body, {} bytes, is not JSON", body.len())),
    }
    Ok(printed)
}

/// Hides every `userToken` at any depth. serde_json limits the depth to 128, so the recursion is safe.
fn hide(json: &mut Value) {
    match json {
        Value::Object(members) => members.iter_mut().for_each(|(name, value)| match name.as_str() {
            "userToken" => *value = HIDDEN.into(),
            _ => hide(value),
        }),
        Value::Array(items) => items.iter_mut().for_each(hide),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

fn verify(spool: &mut Inspector) -> Result<(), Failure> {
    let verdict = spool.verify()?;
    let ledger = verdict.ledger;
    let mut printed = Printed::default();
    printed.line(format!(
        "{} accepted = {} confirmed + {} pending + {} parked + {} removed",
        ledger.accepted, ledger.confirmed, ledger.pending, ledger.parked, ledger.removed
    ));
    for problem in &verdict.problems {
        printed.line(format!("WRONG {problem}"));
    }
    if verdict.problems.is_empty() {
        printed.line("all is well".to_owned());
        return Ok(printed.out()?);
    }
    printed.out()?;
    Err(Failure::Reported)
}

fn remove(spool: &mut Inspector, ids: &[Uuid]) -> Result<(), Failure> {
    let mut missing = 0;
    for id in ids {
        let removed = spool.remove(*id)?;
        missing += usize::from(!removed);
        say(&format!("{id} {}", if removed { "removed" } else { "not found" }));
    }
    if missing == 0 { Ok(()) } else { Err(Failure::Reported) }
}

fn time(ms: i64) -> String {
    Timestamp::from_millisecond(ms).map_or_else(|_| ms.to_string(), |time| format!("{time:.3}"))
}
