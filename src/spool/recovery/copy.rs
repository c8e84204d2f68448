//! Copies the readable events of a damaged spool into a new one. Knows nothing of files.

use std::collections::{BTreeMap, HashSet};
use std::ops::RangeInclusive;

use rusqlite::{Connection, ErrorCode, Row};

use super::super::dedupe::{self, EntryBytes};
use super::super::error::{Result, StoreError};
use super::super::ledger::Ledger;
use super::super::reader::{COLUMNS, COLUMNS_BEFORE, stored_at_least};
use super::super::store::{BUSY_TIMEOUT, NUMBER_MAX, Store, lost};
use super::super::subjects;
use super::super::types::{Stored, cost};

/// Maximum number of failed look-ups of single numbers. Each takes a microsecond or two.
const LOOKUPS_MAX: u64 = 3_000_000;

/// Without totals, search this many sequence numbers on either side of the range found.
const MARGIN: u64 = 200_000;

/// Numbers further than this beyond the known total were made up by the damage.
const AHEAD_MAX: u64 = 1_000_000;

/// Maximum bytes of bodies copied between two commits, so that the log of the new file stays small.
const COMMIT_BYTES: u64 = 16 * 1024 * 1024;

/// Maximum number of entries of the dedupe window that are copied; the newest win. They take 56 MB of memory.
const ENTRIES_MAX: usize = 1_000_000;

/// Entries in a row of the new file: as many as a full commit of the relay has.
const ENTRIES_IN_A_ROW: usize = 1024;

/// Maximum number of subjects that are copied from each end of their table.
const SUBJECTS_MAX: usize = 1_000_000;

/// Subjects copied between two commits: they take about as much of the log as [`COMMIT_BYTES`].
const SUBJECTS_IN_A_COMMIT: usize = 50_000;

/// What was copied.
pub(super) struct Saved {
    pub events: u64,
    pub unreadable: u64,
    /// Whether the totals were readable, so that `unreadable` is exact.
    pub totals_known: bool,
    /// Whether all that was known of subjects was readable.
    pub subjects_known: bool,
    /// Whether anything was unreadable.
    pub damage: bool,
}

/// The value, or `None` if the file is damaged there. An error means that it cannot be read at the moment.
pub(super) fn readable<T, E: Into<StoreError>>(outcome: Result<T, E>) -> Result<Option<T>> {
    use ErrorCode::{DatabaseCorrupt, NotADatabase, SystemIoFailure, TooBig, Unknown};
    use rusqlite::ffi::{SQLITE_IOERR_READ, SQLITE_IOERR_SHORT_READ};
    match outcome {
        Ok(value) => Ok(Some(value)),
        Err(error) => match error.into() {
            StoreError::Sqlite(error) => match error.sqlite_error().map(|error| (error.code, error.extended_code)) {
                // Unknown: the schema makes the SQL invalid. None: a value has the wrong type.
                Some((DatabaseCorrupt | NotADatabase | TooBig | Unknown, _)) | None => Ok(None),
                // An unreadable sector, or a file that ends too early.
                Some((SystemIoFailure, SQLITE_IOERR_READ | SQLITE_IOERR_SHORT_READ)) => Ok(None),
                Some(_) => Err(error.into()),
            },
            StoreError::WrongTotals => Ok(None),
            error @ StoreError::LogInUse => Err(error),
        },
    }
}

/// Copies the readable events and works out the totals.
pub(super) fn copy(old: Option<&Connection>, store: &mut Store) -> Result<Saved> {
    let known = old.map_or(Ok(None), |old| readable(Ledger::read(old)))?;
    let known = known.filter(|known| known.balances() && known.accepted <= NUMBER_MAX);
    let highest = known.map_or(NUMBER_MAX, |known| known.accepted.saturating_add(AHEAD_MAX)).min(NUMBER_MAX);
    store.begin(false)?;
    let mut copier =
        Copier { store, highest, ledger: Ledger::default(), committed: 0, damage: false, displaced: vec![] };
    if let Some(old) = old {
        copier.copy_from(old, known.map(|known| known.accepted))?;
    }
    let Copier { store, ledger: copied, damage, .. } = copier;
    let (oldest, highest) = (store.oldest_pending()?, store.highest()?);
    let (events, mut ledger) = (copied.pending + copied.parked, known.unwrap_or_default());
    if known.is_none() {
        // The numbers stand in for the totals: no number is given twice, and events before the oldest pending one were
        // probably delivered. If events may be missing, one is counted as lost, so that metrics and alerts show it.
        let missing = u64::from(old.is_none() || damage || events == 0);
        ledger.accepted = (highest + missing).max(events + missing);
        ledger.confirmed = oldest.saturating_sub(1).min(ledger.accepted - events - missing);
    }
    let removed_before = ledger.removed;
    ledger.accepted = ledger.accepted.max(highest).max(events);
    ledger.confirmed = ledger.confirmed.min(ledger.accepted - events);
    ledger.removed = ledger.accepted - events - ledger.confirmed;
    (ledger.pending, ledger.parked, ledger.bytes) = (copied.pending, copied.parked, copied.bytes);
    store.write_ledger(&ledger)?;
    let lost_before = old.map_or(Ok(None), |old| readable(lost(old)))?.unwrap_or(0).min(removed_before);
    let unreadable = ledger.removed.saturating_sub(removed_before);
    store.set_lost(lost_before + unreadable)?;
    let lost = highest_missing(store, ledger.accepted, unreadable)?;
    let window_complete = copy_window(old, store, &lost)?;
    // Hints are not copied.
    let subjects_known = match old {
        Some(old) => copy_subjects(old, store, unreadable > 0 || known.is_none())?,
        None => false,
    };
    store.commit()?;
    Ok(Saved {
        events,
        unreadable,
        totals_known: known.is_some(),
        subjects_known,
        damage: damage || known.is_none() || !window_complete || !subjects_known,
    })
}

/// The ranges of the `count` highest numbers up to `accepted` that no event has, in ascending order. Events leave the
/// spool in about the order of their numbers, so these are the unreadable ones, and lower ones were delivered.
fn highest_missing(store: &Store, accepted: u64, count: u64) -> Result<Vec<RangeInclusive<u64>>> {
    let (mut missing, mut left) = (Vec::new(), count);
    for gap in store.gaps(1..=accepted)?.into_iter().rev() {
        if left == 0 {
            break;
        }
        let (first, last) = gap.into_inner();
        let first = first.max(last.saturating_sub(left - 1));
        left -= last - first + 1;
        missing.push(first..=last);
    }
    missing.reverse();
    Ok(missing)
}

/// Copies the readable entries of the dedupe window, so that re-sends are still recognised. A saved event whose entry
/// is lost gets a new one, without the time of its signature. The entries of `lost` events are left out, so that a
/// re-send brings the event back. Returns whether all entries were readable.
fn copy_window(old: Option<&Connection>, store: &Store, lost: &[RangeInclusive<u64>]) -> Result<bool> {
    let is_lost =
        |seq: u64| lost.get(lost.partition_point(|range| *range.end() < seq)).is_some_and(|range| range.contains(&seq));
    let mut rows = BTreeMap::new();
    let mut complete = true;
    if let Some(old) = old {
        complete = copy_entries(old, "SELECT last, entries FROM seen ORDER BY last", &mut rows)?;
        if !complete {
            copy_entries(old, "SELECT last, entries FROM seen ORDER BY last DESC", &mut rows)?;
        }
    }
    let mut entries: Vec<EntryBytes> = rows.into_values().flatten().collect();
    let known: HashSet<u64> = entries.iter().map(dedupe::seq_of).collect();
    let of_events = store.entries_of_events(ENTRIES_MAX)?;
    entries.extend(of_events.into_iter().filter(|entry| !known.contains(&dedupe::seq_of(entry))));
    entries.retain(|entry| !is_lost(dedupe::seq_of(entry)));
    // Of two entries with the same body the window takes the later one.
    entries.sort_by_key(dedupe::accepted_ms_of);
    let (newest, mut last) = (&entries[entries.len().saturating_sub(ENTRIES_MAX)..], 0);
    for row in newest.chunks(ENTRIES_IN_A_ROW) {
        last += row.len() as u64;
        store.remember(last, row)?;
    }
    Ok(complete)
}

/// Copies rows of the dedupe window until one is unreadable. Returns whether all were readable.
fn copy_entries(old: &Connection, sql: &str, rows: &mut BTreeMap<u64, Vec<EntryBytes>>) -> Result<bool> {
    let Some(mut statement) = readable(old.prepare(sql))? else { return Ok(false) };
    let (mut found, mut complete) = (statement.query([])?, true);
    while let Some(row) = readable(found.next())? {
        let Some(row) = row else { return Ok(complete) };
        match (row.get(0), row.get_ref(1)?.as_blob().map(<[u8]>::as_chunks)) {
            // Copied on the way from the other end.
            (Ok(last), _) if rows.contains_key(&last) => break,
            (Ok(last), Ok((entries, []))) => _ = rows.insert(last, entries.to_vec()),
            _ => complete = false,
        }
    }
    Ok(false)
}

/// Copies what is known of subjects. If events are lost, only the open ones: an end that is lost must not count as
/// known when an operator asks Prism's API for it. Returns whether all of it was readable.
fn copy_subjects(old: &Connection, store: &mut Store, events_are_lost: bool) -> Result<bool> {
    let found =
        readable(old.query_row("SELECT count(*) FROM sqlite_schema WHERE name = 'subject'", [], |row| row.get(0)))?;
    // A spool of the format before has none.
    if found == Some(0) {
        return Ok(true);
    }
    Ok(copy_subjects_by(old, store, "key", events_are_lost)?
        || copy_subjects_by(old, store, "key DESC", events_are_lost)?)
}

/// Copies subjects in this order until one is unreadable. Returns whether all were readable.
fn copy_subjects_by(old: &Connection, store: &mut Store, order: &str, open_only: bool) -> Result<bool> {
    let sql = format!("SELECT {} FROM subject ORDER BY {order} LIMIT {SUBJECTS_MAX}", subjects::COLUMNS);
    let Some(mut statement) = readable(old.prepare(&sql))? else { return Ok(false) };
    let (mut rows, mut complete, mut copied) = (statement.query([])?, true, 0);
    while let Some(row) = readable(rows.next())? {
        let Some(row) = row else { return Ok(complete) };
        match subjects::named(row).zip(subjects::state(row)) {
            Some((subject, state)) if state.is_open || !open_only => {
                subjects::save(store.connection(), &subject, &state)?;
                copied += 1;
                if copied % SUBJECTS_IN_A_COMMIT == 0 {
                    start_again(store)?;
                }
            }
            Some(_) => {}
            None => complete = false,
        }
    }
    Ok(false)
}

struct Copier<'a> {
    store: &'a mut Store,
    /// The highest number that an event can have.
    highest: u64,
    /// Counts the copied events: pending, parked and bytes.
    ledger: Ledger,
    /// Bytes at the last commit.
    committed: u64,
    /// Whether anything was unreadable.
    damage: bool,
    /// Events whose number another event has: the damage made up one of the two numbers.
    displaced: Vec<RecoveredEvent>,
}

struct RecoveredEvent {
    stored: Stored,
    parked_reason: Option<String>,
}

impl Copier<'_> {
    /// Copies from the front up to the damage, from the back down to the damage, and looks up each number in between.
    fn copy_from(&mut self, old: &Connection, accepted: Option<u64>) -> Result<()> {
        // A spool of the format before has webhooks alone.
        let has_sources = readable(old.prepare("SELECT source FROM event LIMIT 0"))?.is_some();
        let columns = if has_sources { COLUMNS } else { COLUMNS_BEFORE };
        let columns = format!("SELECT {columns}, parked_reason FROM event");
        let complete = self.copy_rows(old, &format!("{columns} ORDER BY seq"), 0)?;
        if complete && !self.damage && self.displaced.is_empty() {
            return Ok(());
        }
        self.damage = true;
        let reached = self.store.highest()?;
        self.copy_rows(old, &format!("{columns} ORDER BY seq DESC"), reached)?;
        // Without a schema there is nothing to look up.
        if let Some(mut one) = readable(old.prepare(&format!("{columns} WHERE seq = ?1")))? {
            let mut failed = 0;
            let gaps = self.gaps(accepted)?;
            for seq in gaps.into_iter().flatten() {
                let found = readable(one.query_one([seq], |row| Ok(self.take(row))))?.transpose()?;
                failed += u64::from(found.flatten().is_none());
                if failed >= LOOKUPS_MAX {
                    break;
                }
            }
        }
        // The real number of a displaced event is among those without an event.
        let gaps = self.gaps(accepted)?;
        let mut free = gaps.into_iter().flatten();
        for mut event in std::mem::take(&mut self.displaced) {
            event.stored.seq = free.next().map_or_else(|| self.store.highest().map(|last| last + 1), Ok)?;
            self.keep(&event)?;
        }
        Ok(())
    }

    /// Copies rows until one is unreadable, or down to number `down_to`. Returns whether that was all.
    fn copy_rows(&mut self, old: &Connection, sql: &str, down_to: u64) -> Result<bool> {
        let Some(mut statement) = readable(old.prepare(sql))? else { return Ok(false) };
        let mut rows = statement.query([])?;
        while let Some(row) = readable(rows.next())? {
            let Some(row) = row else { return Ok(true) };
            if self.take(row)?.is_some_and(|seq| seq <= down_to) {
                break;
            }
        }
        Ok(false)
    }

    /// The ranges of numbers that were not copied and may have an event, the shortest first: a long one is more likely
    /// to come from a number that the damage made up.
    fn gaps(&self, accepted: Option<u64>) -> Result<Vec<RangeInclusive<u64>>> {
        let (first, last) = match self.store.range()? {
            Some(range) => range.into_inner(),
            None => (accepted.unwrap_or(1).max(1) + 1, accepted.unwrap_or(1).max(1)),
        };
        let last = accepted.map_or(last.saturating_add(MARGIN), |accepted| accepted.max(last)).min(self.highest);
        let mut gaps = self.store.gaps(first.saturating_sub(MARGIN).max(1)..=last)?;
        gaps.sort_by_key(|gap| gap.end() - gap.start());
        Ok(gaps)
    }

    /// Copies the event of a row. Returns its number, or `None` if the row is damaged.
    fn take(&mut self, row: &Row<'_>) -> Result<Option<u64>> {
        let stored = stored_at_least(row).ok().filter(|stored| (1..=self.highest).contains(&stored.seq));
        let (Some(stored), parked_reason) = (stored, row.get(10).unwrap_or(None)) else {
            self.damage = true;
            return Ok(None);
        };
        let (seq, event) = (stored.seq, RecoveredEvent { stored, parked_reason });
        match self.store.id(seq)? {
            None => self.keep(&event)?,
            // Copied before.
            Some(id) if id == event.stored.event.id => {}
            Some(_) => self.displaced.push(event),
        }
        Ok(Some(seq))
    }

    fn keep(&mut self, RecoveredEvent { stored: Stored { seq, event }, parked_reason }: &RecoveredEvent) -> Result<()> {
        self.store.insertion()?.insert(*seq, event)?;
        self.ledger.pending += 1;
        self.ledger.bytes += cost(&event.body);
        if let Some(reason) = parked_reason {
            self.store.park(*seq, reason, 0)?;
            self.ledger.park()?;
        }
        if self.ledger.bytes - self.committed >= COMMIT_BYTES {
            self.committed = self.ledger.bytes;
            start_again(self.store)?;
        }
        Ok(())
    }
}

/// Commits, so that the log can begin again: nothing else copies it, and all of the file in it would take as much disk
/// space again.
fn start_again(store: &mut Store) -> Result<()> {
    store.commit()?;
    store.truncate_log(BUSY_TIMEOUT)?;
    store.begin(false)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use tempfile::TempDir;
    use uuid::Uuid;

    use super::*;
    use crate::event::{Event, Fingerprint, Source};
    use crate::spool::Durability;
    use crate::spool::files::sibling;
    use crate::spool::reader::open_read_only;

    #[test]
    fn the_log_of_the_new_file_stays_small() {
        const EVENTS: u64 = 60;
        let folder = TempDir::new().unwrap();
        let [old, new] = ["old.db", "new.db"].map(|name| folder.path().join(name));
        let mut store = Store::open(&old, Durability::Disk).unwrap();
        store.begin(false).unwrap();
        let mut ledger = Ledger::default();
        for seq in 1..=EVENTS {
            let body = Bytes::from(vec![seq as u8; 1 << 20]);
            let (id, fingerprint) = (Uuid::now_v7(), Fingerprint::of(&body));
            ledger.accepted += 1;
            ledger.pending += 1;
            ledger.bytes += cost(&body);
            let event = Event {
                id,
                accepted_ms: 1,
                source: Source::Webhook,
                authentic: true,
                trace: None,
                fingerprint,
                subject: None,
                body,
            };
            store.insertion().unwrap().insert(seq, &event).unwrap();
        }
        store.write_ledger(&ledger).unwrap();
        store.commit().unwrap();
        drop(store);

        let mut store = Store::open(&new, Durability::Disk).unwrap();
        let saved = copy(Some(&open_read_only(&old).unwrap()), &mut store).unwrap();
        assert_eq!((saved.events, saved.unreadable), (EVENTS, 0));
        let log = std::fs::metadata(sibling(&new, "-wal")).unwrap().len();
        assert!(log < 2 * COMMIT_BYTES, "{log} bytes, which never shrank");
    }
}
