//! `spool`: inspects the spool, also while the relay runs; retries parked events, and removes events.

use std::io::{self, BufRead, IsTerminal, Write};
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use bytesize::ByteSize;
use clap::Subcommand;
use jiff::Timestamp;
use serde::Serialize;
use serde_json::{Value, json};
use uuid::Uuid;

use super::curl::{self, hide};
use super::failure::Failure;
use super::output::{Printed, say};
use crate::config::Config;
use crate::event::{Envelope, Source};
use crate::spool::{Entry, Inspector, Ledger};
use crate::text::{clean, grouped, span};

/// Width of a terminal line.
const COLUMNS: usize = 80;
/// The width of the longest documented event type.
const TYPE_COLUMNS: usize = 42;
/// Digits at the end of an id, which are random. Those at its beginning are the time: the same for 65 s.
const SHORT_DIGITS: usize = 8;
/// Fewer digits would match several events too often.
const DIGITS_MIN: usize = 4;

#[derive(Subcommand)]
pub(super) enum Action {
    /// Print the number of events in the spool, its limit, and the lifetime totals
    Stats {
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// List events, the oldest first
    List {
        /// Only parked events, which the broker rejected or did not route
        #[arg(long)]
        parked: bool,
        /// Stop after this many events
        #[arg(long, default_value = "100")]
        limit: u64,
        /// Print one JSON object per line, with the whole ids
        #[arg(long)]
        json: bool,
    },
    /// Print one event, with its userToken hidden
    Show {
        /// The event's id, or its beginning or end if no other id has the same
        #[arg(value_parser = id_part)]
        id: IdPart,
        /// Print a shell command that posts the event with curl, signed with $PRISM_SECRET; userToken is hidden
        #[arg(long)]
        as_curl: bool,
    },
    /// Check the file, every body and the totals; exit code 1 if anything is wrong
    Verify,
    /// Make the relay try parked events again now
    Retry {
        /// Ids of parked events, or their beginnings or ends
        #[arg(required_unless_present = "all_parked", conflicts_with = "all_parked", value_parser = id_part)]
        ids: Vec<IdPart>,
        /// Retry every parked event
        #[arg(long)]
        all_parked: bool,
    },
    /// Remove events permanently: they will not be delivered
    Remove {
        /// Ids of events, or their beginnings or ends
        #[arg(required = true, value_parser = id_part)]
        ids: Vec<IdPart>,
        /// Do not ask
        #[arg(long)]
        yes: bool,
        /// Remove events that are not parked, too: the relay would deliver them
        #[arg(long)]
        pending: bool,
    },
}

/// An id, or its beginning or end: lower-case hex digits without hyphens.
#[derive(Clone)]
pub(super) struct IdPart(String);

fn id_part(text: &str) -> Result<IdPart, String> {
    let digits = text.replace('-', "").to_ascii_lowercase();
    match digits.len() {
        DIGITS_MIN..=32 if digits.bytes().all(|byte| byte.is_ascii_hexdigit()) => Ok(IdPart(digits)),
        _ => Err(format!("must be an id, or at least {DIGITS_MIN} hex digits of its beginning or end")),
    }
}

pub(super) fn run(config: &Config, action: Action) -> Result<(), Failure> {
    let path = &config.spool.path;
    if !path.exists() {
        return Err(anyhow!("there is no spool at {}", path.display()).into());
    }
    let printed = match action {
        Action::Stats { json } => stats(&Inspector::open(path)?, config.spool.max_bytes, json)?,
        Action::List { parked, limit, json } => list(&Inspector::open(path)?, parked, limit, json)?,
        Action::Show { id, as_curl: true } => as_curl(config, &Inspector::open(path)?, &id)?,
        Action::Show { id, as_curl: false } => show(find(&Inspector::open(path)?, &id)?),
        Action::Verify => return verify(&mut Inspector::open(path)?),
        Action::Retry { ids, .. } => {
            retry(&mut Inspector::open_for_change(path)?, &ids, config.publisher.parked_retry)?
        }
        Action::Remove { ids, yes, pending } => {
            let mut spool = Inspector::open_for_change(path)?;
            let events = to_be_removed(&spool, &ids, pending)?;
            if !yes && !confirmed(events.len())? {
                return Err(Failure::Reported);
            }
            return remove(&mut spool, &events);
        }
    };
    Ok(printed.out()?)
}

fn stats(spool: &Inspector, max_bytes: u64, json: bool) -> anyhow::Result<Printed> {
    let Ledger { accepted, confirmed, pending, parked, removed, duplicates, bytes } = spool.ledger()?;
    let (oldest_pending, oldest_parked) = (spool.oldest_pending_ms()?, spool.oldest_parked_ms()?);
    let percent = 100.0 * bytes as f64 / max_bytes as f64;
    let mut printed = Printed::default();
    if json {
        let seconds = |ms: Option<i64>| ms.map(|ms| age(ms).as_secs());
        let stats = json!({
            "accepted": accepted, "confirmed": confirmed, "pending": pending, "parked": parked, "removed": removed,
            "duplicates": duplicates, "bytes": bytes, "max_bytes": max_bytes, "percent": percent,
            "oldest_pending_at": oldest_pending.map(time),
            "oldest_pending_age_seconds": seconds(oldest_pending),
            "oldest_parked_at": oldest_parked.map(time),
            "oldest_parked_age_seconds": seconds(oldest_parked),
        });
        printed.line(stats.to_string());
        return Ok(printed);
    }
    let oldest =
        |ms: Option<i64>| ms.map_or("none".to_owned(), |ms| format!("{} old, accepted {}", span(age(ms)), time(ms)));
    for (name, value) in [
        ("accepted", grouped(accepted)),
        ("confirmed", grouped(confirmed)),
        ("pending", grouped(pending)),
        ("parked", grouped(parked)),
        ("removed", grouped(removed)),
        ("duplicates", grouped(duplicates)),
        ("space used", format!("{percent:.1} %, {} of {}", ByteSize::b(bytes), ByteSize::b(max_bytes))),
        ("oldest pending", oldest(oldest_pending)),
        ("oldest parked", oldest(oldest_parked)),
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
    source: &'static str,
    verified: bool,
    intact: bool,
    parked: Option<String>,
    #[serde(skip)]
    age: Duration,
    /// The parked event of the same subject that has to be delivered first.
    waits_behind: Option<Uuid>,
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
            source: event.source.text(),
            verified: event.authentic,
            intact: event.is_intact(),
            waits_behind: entry.waits_behind.filter(|_| entry.parked_reason.is_none()),
            parked: entry.parked_reason,
            age: age(event.accepted_ms),
        }
    }

    /// At most [`COLUMNS`] wide; an event that is parked, waits behind one or was told by Prism's API has a second
    /// line.
    fn lines(&self) -> String {
        let age = span(self.age);
        let age = age.splitn(3, ' ').take(2).collect::<Vec<_>>().join(" ");
        let (kind, id) = self.subject.split_once(':').unwrap_or_default();
        let subject = format!("{kind}{}{}", if kind.is_empty() { "" } else { ":" }, end(id, SHORT_DIGITS));
        let kind = cut(&self.r#type, TYPE_COLUMNS);
        let line = clean(&format!("{}  {age:<6}  {kind:<TYPE_COLUMNS$} {subject}", short(self.id)));
        let waits = self.waits_behind.map(|id| format!("waits behind {id}"));
        let reason = self.parked.as_deref().map(|reason| format!("parked: {reason}")).or(waits);
        let told = (self.source == Source::Api.text()).then(|| "told by Prism's API".to_owned());
        let notes: Vec<_> = told.into_iter().chain(reason).collect();
        let notes = cut(&format!("{:SHORT_DIGITS$}  {}", "", notes.join("; ")), COLUMNS);
        let notes = if notes.trim().is_empty() { String::new() } else { format!("\n{}", clean(&notes)) };
        format!("{}{notes}", cut(line.trim_end(), COLUMNS))
    }
}

fn list(spool: &Inspector, parked: bool, limit: u64, json: bool) -> anyhow::Result<Printed> {
    let ledger = spool.ledger()?;
    let (mut body, mut count) = (Printed::default(), 0);
    if !json {
        body.line(format!("{:SHORT_DIGITS$}  {:<6}  {:<TYPE_COLUMNS$} SUBJECT", "ID", "AGE", "TYPE"));
    }
    spool.each(parked, limit, |entry| {
        count += 1;
        let row = Row::of(entry);
        body.line(if json { serde_json::to_string(&row).unwrap_or_default() } else { row.lines() });
    })?;
    if json {
        return Ok(body);
    }
    let (total, what) = match parked {
        true => (ledger.parked, "parked events"),
        false => (ledger.pending + ledger.parked, "events"),
    };
    if total == 0 {
        body = Printed::default();
    }
    body.line(format!("{} of {} {what}", grouped(count), grouped(total)));
    Ok(body)
}

/// The event whose id begins or ends with these digits.
fn find(spool: &Inspector, part: &IdPart) -> anyhow::Result<Entry> {
    let IdPart(digits) = part;
    let missing = |id: &str| format!("there is no event {id}: it was delivered or removed, or never accepted");
    // A UUID may be written with 32 digits.
    let ids = match digits.parse::<Uuid>() {
        Ok(id) => vec![id],
        Err(_) => spool.matching(digits, 2)?,
    };
    match ids[..] {
        [id] => spool.find(id)?.with_context(|| missing(&id.to_string())),
        [] => bail!(missing(digits)),
        [..] => bail!(
            "several events have an id that begins or ends with {digits}: give more of it; the last {SHORT_DIGITS} \
             digits, which spool list prints, differ"
        ),
    }
}

fn show(entry: Entry) -> Printed {
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
        ("source", row.source.to_owned()),
        ("verified", row.verified.to_string()),
        ("fingerprint", fingerprint),
        ("intact", row.intact.to_string()),
        ("parked", row.parked.unwrap_or("no".to_owned())),
        ("waits behind", row.waits_behind.map_or("no event".to_owned(), |id| id.to_string())),
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
    printed
}

fn as_curl(config: &Config, spool: &Inspector, id: &IdPart) -> anyhow::Result<Printed> {
    let mut printed = Printed::default();
    printed.line(curl::command(config, &find(spool, id)?.stored.event.body)?);
    Ok(printed)
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
    if !verdict.is_structure_checked {
        printed.line("a relay uses the spool, so every event was read, but not the free pages of the file".to_owned());
    }
    if verdict.problems.is_empty() {
        printed.line("all is well".to_owned());
        return Ok(printed.out()?);
    }
    printed.out()?;
    Err(Failure::Reported)
}

/// Asks for a retry of these events, or of all parked ones if there are none. The relay looks at its own interval.
fn retry(spool: &mut Inspector, ids: &[IdPart], within: Duration) -> anyhow::Result<Printed> {
    let mut printed = Printed::default();
    let when = format!("will be tried again within {}, if the relay runs", span(within));
    if ids.is_empty() {
        printed.line(format!("{} parked events {when}", grouped(spool.retry_all()? as u64)));
        return Ok(printed);
    }
    let events = ids.iter().map(|id| find(spool, id)).collect::<anyhow::Result<Vec<_>>>()?;
    for Entry { stored, .. } in events {
        let id = stored.event.id;
        if !spool.retry(stored.seq)? {
            bail!("event {id} is not parked: the relay delivers it as soon as the broker takes it");
        }
        printed.line(format!("{id} {when}"));
    }
    Ok(printed)
}

/// Prints the events that are to be removed. Nothing is removed if one of them cannot be found, or is pending without
/// the option for that.
fn to_be_removed(spool: &Inspector, ids: &[IdPart], pending: bool) -> anyhow::Result<Vec<Uuid>> {
    let (mut printed, mut events) = (Printed::default(), Vec::new());
    for id in ids {
        let row = Row::of(find(spool, id)?);
        if events.contains(&row.id) {
            continue;
        }
        if row.parked.is_none() && !pending {
            bail!(
                "nothing was removed: event {} is not parked, and the relay will deliver it. Add --pending to remove \
                 it anyway",
                row.id
            );
        }
        printed.line(row.id.to_string());
        for (name, value) in [
            ("type", row.r#type),
            ("subject", row.subject),
            ("age", format!("{}, accepted {}", span(row.age), row.time)),
            ("state", row.parked.map_or("pending".to_owned(), |reason| format!("parked: {reason}"))),
        ] {
            printed.line(clean(&format!("  {name:<8} {value}")));
        }
        events.push(row.id);
    }
    printed.out()?;
    Ok(events)
}

/// Asks on a terminal.
fn confirmed(count: usize) -> Result<bool, Failure> {
    let mut stdin = io::stdin().lock();
    if !stdin.is_terminal() {
        let hint = "nothing was removed: there is no terminal to ask on. Add --yes to remove without a question";
        return Err(Failure::Usage(hint.to_owned()));
    }
    let what = if count == 1 { "this event" } else { "these events" };
    let mut stderr = io::stderr();
    write!(stderr, "Remove {what} permanently? Nothing will deliver {what} later. [y/N] ")?;
    stderr.flush()?;
    let mut answer = String::new();
    stdin.read_line(&mut answer)?;
    let yes = matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes");
    if !yes {
        say("nothing was removed");
    }
    Ok(yes)
}

fn remove(spool: &mut Inspector, ids: &[Uuid]) -> Result<(), Failure> {
    let mut missing = 0;
    for id in ids {
        let removed = spool.remove(*id)?;
        missing += usize::from(!removed);
        say(&format!("{id} {}", if removed { "removed" } else { "not removed: it was delivered meanwhile" }));
    }
    if missing == 0 { Ok(()) } else { Err(Failure::Reported) }
}

/// The end of an id, by which people tell events apart.
fn short(id: Uuid) -> String {
    end(&id.to_string(), SHORT_DIGITS)
}

/// The last characters of a text.
fn end(text: &str, columns: usize) -> String {
    text.chars().skip(text.chars().count().saturating_sub(columns)).collect()
}

/// At most this many characters of a text. The last one shows that something is left out.
fn cut(text: &str, columns: usize) -> String {
    match text.chars().count() <= columns {
        true => text.to_owned(),
        false => text.chars().take(columns - 1).chain(['…']).collect(),
    }
}

fn time(ms: i64) -> String {
    Timestamp::from_millisecond(ms).map_or_else(|_| ms.to_string(), |time| format!("{time:.3}"))
}

/// The time since then; zero if it is in the future.
fn age(ms: i64) -> Duration {
    let elapsed = Timestamp::now().as_millisecond().saturating_sub(ms);
    Duration::from_millis(u64::try_from(elapsed).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(subject: &str, parked: Option<&str>) -> Row {
        Row {
            id: "0192f3c1-0000-7000-8000-0000deadbeef".parse().unwrap(),
            time: String::new(),
            r#type: "body_shape_prediction.processing.succeeded".to_owned(),
            subject: subject.to_owned(),
            state: String::new(),
            bytes: 2,
            source: "webhook",
            verified: true,
            intact: true,
            parked: parked.map(str::to_owned),
            waits_behind: None,
            age: Duration::from_secs(23 * 60 + 59),
        }
    }

    #[test]
    fn a_line_of_the_list_fits_a_terminal() {
        let long = row("prediction:7f2ec6e0-b06d-42b1-b2a1-fff59a458490", None);
        assert_eq!(long.lines(), "deadbeef  23 min  body_shape_prediction.processing.succeeded prediction:9a458490");
        assert!(long.lines().chars().count() <= COLUMNS);
        assert_eq!(
            row("scan:1", Some("returned: 312 NO_ROUTE")).lines(),
            "deadbeef  23 min  body_shape_prediction.processing.succeeded scan:1\n          \
             parked: returned: 312 NO_ROUTE"
        );
        let mut odd = row("", Some(&"\u{1b}[31m very long".repeat(20)));
        odd.r#type = "\n€".repeat(100);
        let lines = odd.lines();
        assert!(lines.lines().all(|line| line.chars().count() <= COLUMNS) && !lines.contains('\u{1b}'), "{lines}");
        assert_eq!(lines.lines().count(), 2);
    }

    #[test]
    fn an_id_may_be_a_part_with_or_without_hyphens() {
        let part = |text| id_part(text).map(|IdPart(digits)| digits);
        assert_eq!(part("0192F3C1-0000"), Ok("0192f3c10000".to_owned()));
        assert_eq!(part("beef"), Ok("beef".to_owned()));
        for wrong in ["", "bee", "no-id", &"a".repeat(33), "%%%%"] {
            assert!(part(wrong).is_err(), "{wrong:?}");
        }
    }
}
