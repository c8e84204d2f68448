//! Verifies a spool, also while a relay uses it: every body against its fingerprint, and the ledger against the events.

use rusqlite::Connection;

use super::error::{Result, StoreError};
use super::ledger::Ledger;
use super::reader::{self, Collected};
use super::subjects;
use super::types::EVENT_OVERHEAD_BYTES;

/// How many events to read at a time.
const SLICE: usize = 500;

/// Maximum number of problems to list of one kind.
const PROBLEMS_MAX: u32 = 20;

/// What [`super::Inspector::verify`] found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// The totals in the file.
    pub ledger: Ledger,
    /// What is wrong; empty if nothing is.
    pub problems: Vec<String>,
    /// Whether the structure of the file was checked. It is not while a relay uses the file.
    pub is_structure_checked: bool,
}

pub(super) fn verify(connection: &mut Connection, is_in_use: bool) -> Result<Verdict> {
    let mut problems = Vec::new();
    if !is_in_use {
        check_structure(connection, &mut problems)?;
    }
    check_bodies(connection, &mut problems)?;
    check_subjects(connection, &mut problems)?;
    let ledger = check_totals(connection, &mut problems)?;
    Ok(Verdict { ledger, problems, is_structure_checked: !is_in_use })
}

fn check_structure(connection: &Connection, problems: &mut Vec<String>) -> Result<()> {
    let mut statement = connection.prepare(&format!("PRAGMA integrity_check({PROBLEMS_MAX})"))?;
    let mut rows = statement.query([])?;
    while let Some(row) = rows.next()? {
        let line: String = row.get(0)?;
        if line != "ok" {
            problems.push(format!("file: {line}"));
        }
    }
    Ok(())
}

/// In slices, each a short read. Events that come or go meanwhile do not matter.
fn check_bodies(connection: &Connection, problems: &mut Vec<String>) -> Result<()> {
    let mut after = 0;
    loop {
        let slice = reader::all_after(connection, after, SLICE).map(Collected::finish);
        let slice = match slice {
            Ok(slice) => slice,
            Err(cause) if cause.is_damage() => {
                problems.push(format!("file: the events after seq {after} cannot be read: {cause}"));
                return Ok(());
            }
            Err(cause) => return Err(cause),
        };
        for stored in &slice.events {
            if !stored.event.is_intact() {
                let (id, seq) = (stored.event.id, stored.seq);
                problems.push(format!("event {id} (seq {seq}): the body does not match its fingerprint"));
            }
        }
        match slice.events.last() {
            Some(last) if slice.more => after = last.seq,
            Some(_) | None => return Ok(()),
        }
    }
}

/// In slices, each a short read. A subject that cannot be understood counts as unknown.
fn check_subjects(connection: &Connection, problems: &mut Vec<String>) -> Result<()> {
    let (mut unclear, mut after) = (0, i64::MIN);
    loop {
        match subjects::slice(connection, after, SLICE) {
            Ok(Some(slice)) => (unclear, after) = (unclear + slice.unclear, slice.last),
            Ok(None) => break,
            Err(cause) if cause.is_damage() => {
                problems.push(format!("file: what is known of scans and predictions cannot be read: {cause}"));
                break;
            }
            Err(cause) => return Err(cause),
        }
    }
    if unclear > 0 {
        problems.push(format!("subjects: {unclear} rows cannot be understood, and count as unknown"));
    }
    Ok(())
}

/// Counts the events and reads the totals in one transaction, so that a running relay does not change them meanwhile.
/// Reads no body: the length of one is in the row's head.
fn check_totals(connection: &mut Connection, problems: &mut Vec<String>) -> Result<Ledger> {
    let transaction = connection.transaction()?;
    let ledger = Ledger::read(&transaction)?;
    if !ledger.balances() {
        problems.push("ledger: accepted is not confirmed + pending + parked + removed".to_owned());
    }
    let sql = "SELECT count(*), coalesce(sum(length(body)), 0) FROM event";
    let counted = transaction.query_row(sql, [], |row| Ok((row.get::<_, u64>(0)?, row.get::<_, u64>(1)?)));
    let sql = "SELECT count(*) FROM event INDEXED BY parked WHERE parked_reason IS NOT NULL";
    let parked = transaction.query_row(sql, [], |row| row.get::<_, u64>(0));
    let (events, bodies, parked) = match (counted, parked) {
        (Ok((events, bodies)), Ok(parked)) => (events, bodies, parked),
        (Err(cause), _) | (_, Err(cause)) => {
            let cause = StoreError::from(cause);
            if !cause.is_damage() {
                return Err(cause);
            }
            problems.push(format!("file: the events cannot be counted: {cause}"));
            return Ok(ledger);
        }
    };
    for (name, counted, noted) in [
        ("pending", events.saturating_sub(parked), ledger.pending),
        ("parked", parked, ledger.parked),
        ("bytes", bodies + events * EVENT_OVERHEAD_BYTES, ledger.bytes),
    ] {
        if counted != noted {
            problems.push(format!("ledger: {name} is {noted}, but there are {counted}"));
        }
    }
    let mut statement = transaction.prepare("SELECT seq FROM event WHERE seq > ?1 ORDER BY seq LIMIT ?2")?;
    for seq in statement.query_map((ledger.accepted, PROBLEMS_MAX), |row| row.get::<_, u64>(0))? {
        problems.push(format!("event with seq {}: beyond the last accepted, {}", seq?, ledger.accepted));
    }
    Ok(ledger)
}
