//! What of a damaged spool can be read, copied into a new one. Knows nothing of files.

use rusqlite::{Connection, ErrorCode, Result, Row};

use super::ledger::Ledger;
use super::reader::{COLUMNS, stored_at_least};
use super::store::{NUMBER_MAX, Store, lost};
use super::types::{Stored, cost};

/// Looks in vain at single numbers. Each takes a microsecond or two.
const LOOKS_MAX: u64 = 3_000_000;

/// So far from the events that were found others are looked for, where nothing tells how many there were.
const AROUND: u64 = 200_000;

/// Further ahead than this of what is known to have been accepted no number of an event can be.
const AHEAD_MAX: u64 = 1_000_000;

/// Numbers that are kept in mind, because the damage may have given their events other ones.
const FREE_MAX: usize = 1000;

/// Copied between two commits, so that the log of the new file stays small beside it.
const COMMIT_BYTES: u64 = 16 * 1024 * 1024;

/// How many events there were.
pub(super) struct Saved {
    pub events: u64,
    pub unreadable: u64,
    /// Whether these are all.
    pub all_known: bool,
    /// Whether something could not be read.
    pub damage: bool,
}

/// What a damaged file gives, `None` where it is damaged. That it cannot be read at the moment is another matter.
pub(super) fn readable<T>(outcome: Result<T>) -> Result<Option<T>> {
    use ErrorCode::{DatabaseCorrupt, NotADatabase, SystemIoFailure, TooBig, Unknown};
    use rusqlite::ffi::{SQLITE_IOERR_READ, SQLITE_IOERR_SHORT_READ};
    match outcome {
        Ok(value) => Ok(Some(value)),
        Err(error) => match error.sqlite_error().map(|error| (error.code, error.extended_code)) {
            // Unknown: SQL makes no sense with this schema. None: a value is not what it should be.
            Some((DatabaseCorrupt | NotADatabase | TooBig | Unknown, _)) | None => Ok(None),
            // A sector is lost, or the file ends too early.
            Some((SystemIoFailure, SQLITE_IOERR_READ | SQLITE_IOERR_SHORT_READ)) => Ok(None),
            Some(_) => Err(error),
        },
    }
}

/// Copies the readable events.
pub(super) fn copy(old: Option<&Connection>, store: &mut Store) -> Result<Saved> {
    let known = old.map_or(Ok(None), |old| readable(Ledger::read(old)))?;
    let known = known.filter(|known| known.balances() && known.accepted <= NUMBER_MAX);
    let most = known.map_or(NUMBER_MAX, |known| known.accepted.saturating_add(AHEAD_MAX)).min(NUMBER_MAX);
    let mut found = Found { most, ..Found::default() };
    store.begin(false)?;
    if let Some(old) = old {
        copy_events(old, store, known.as_ref(), &mut found)?;
    }
    let (oldest, highest) = store.numbers()?;
    let (here, mut ledger) = (found.pending + found.parked, known.unwrap_or_default());
    if known.is_none() {
        // The numbers stand for the totals: none is given twice, and what was before the oldest pending event has probably been
        // delivered. What nobody knows of is at least told of.
        let unknown = u64::from(old.is_none() || found.damage || here == 0);
        ledger.accepted = (highest + unknown).max(here + unknown);
        ledger.confirmed = oldest.saturating_sub(1).min(ledger.accepted - here - unknown);
    }
    let removed_before = ledger.removed;
    ledger.accepted = ledger.accepted.max(highest).max(here);
    ledger.confirmed = ledger.confirmed.min(ledger.accepted - here);
    ledger.removed = ledger.accepted - here - ledger.confirmed;
    (ledger.pending, ledger.parked, ledger.bytes) = (found.pending, found.parked, found.bytes);
    store.write_ledger(&ledger)?;
    // The first format has no such number, and a damaged file may not give it.
    let lost_before = old.map_or(Ok(None), |old| readable(lost(old)))?.unwrap_or(0).min(removed_before);
    let unreadable = ledger.removed.saturating_sub(removed_before);
    store.set_lost(lost_before + unreadable)?;
    store.commit()?;
    let damage = found.damage || known.is_none();
    Ok(Saved { events: here, unreadable, all_known: known.is_some(), damage })
}

/// What has been copied.
#[derive(Default)]
struct Found {
    pending: u64,
    parked: u64,
    bytes: u64,
    /// Whether something could not be read.
    damage: bool,
    /// No number can be higher.
    most: u64,
    committed: u64,
    /// Events whose number another one has: the damage has made one of the two up.
    homeless: Vec<(Stored, Option<String>)>,
}

impl Found {
    /// Copies the event of a row. Returns its number, if it is one.
    fn take(&mut self, row: &Row<'_>, store: &mut Store) -> Result<Option<u64>> {
        let (Ok(stored), parked_reason) = (stored_at_least(row), row.get(8).unwrap_or(None)) else {
            self.damage = true;
            return Ok(None);
        };
        let seq = stored.seq;
        if !(1..=self.most).contains(&seq) {
            self.damage = true;
            return Ok(None);
        }
        match self.keep(&stored, parked_reason.as_deref(), store) {
            Err(error) if error.sqlite_error_code() == Some(ErrorCode::ConstraintViolation) => {
                // It may have been seen before.
                if store.id(seq)? != Some(stored.event.id) {
                    self.homeless.push((stored, parked_reason));
                }
            }
            outcome => outcome?,
        }
        Ok(Some(seq))
    }

    fn keep(&mut self, stored: &Stored, parked_reason: Option<&str>, store: &mut Store) -> Result<()> {
        let Stored { seq, event } = stored;
        store.insert(*seq, event)?;
        self.bytes += cost(&event.body);
        match parked_reason {
            Some(reason) => {
                store.park(*seq, reason, 0)?;
                self.parked += 1;
            }
            None => self.pending += 1,
        }
        if self.bytes - self.committed >= COMMIT_BYTES {
            self.committed = self.bytes;
            store.commit()?;
            store.begin(false)?;
        }
        Ok(())
    }
}

/// Copies from the front to the damage, from the back to the damage, and what can be found in between by its number.
fn copy_events(old: &Connection, store: &mut Store, known: Option<&Ledger>, found: &mut Found) -> Result<()> {
    let columns = format!("SELECT {COLUMNS}, parked_reason FROM event");
    let (front, back) = (format!("{columns} ORDER BY seq"), format!("{columns} ORDER BY seq DESC"));
    if copy_rows(old, &front, 0, store, found)? && !found.damage && found.homeless.is_empty() {
        return Ok(());
    }
    found.damage = true;
    // What the front has given comes again, unless it is the whole of it.
    let (_, reached) = store.numbers()?;
    copy_rows(old, &back, reached, store, found)?;

    // Not of a part: without the schema there is nothing.
    let Some(mut one) = readable(old.prepare(&format!("{columns} WHERE seq = ?1")))? else { return Ok(()) };
    let (first, last) = store.range()?.unwrap_or_else(|| {
        let end = known.map_or(1, |known| known.accepted.max(1));
        (end + 1, end)
    });
    let last = known.map_or(last.saturating_add(AROUND), |known| known.accepted.max(last)).min(found.most);
    let (mut free, mut in_vain) = (Vec::new(), 0);
    let mut gaps = store.gaps(first.saturating_sub(AROUND).max(1), last)?;
    // A long one is more likely none: a number that the damage has made up lies at one of its ends.
    gaps.sort_by_key(|(from, to)| to - from);
    'gaps: for (from, to) in gaps {
        for seq in from..=to {
            match one.query_one([seq], |row| Ok(found.take(row, store))) {
                Ok(taken) if taken.as_ref().is_ok_and(Option::is_some) => continue,
                Ok(taken) => _ = taken?,
                Err(error) => _ = readable(Err::<(), _>(error))?,
            }
            in_vain += 1;
            if free.len() < FREE_MAX {
                free.push(seq);
            }
            if in_vain >= LOOKS_MAX {
                break 'gaps;
            }
        }
    }
    let mut free = free.into_iter();
    for (mut stored, parked_reason) in std::mem::take(&mut found.homeless) {
        // One of the numbers that nothing was found under was its own.
        let mut own = free.next();
        while let Some(seq) = own
            && store.id(seq)?.is_some()
        {
            own = free.next();
        }
        stored.seq = own.map_or_else(|| store.numbers().map(|(_, highest)| highest + 1), Ok)?;
        found.keep(&stored, parked_reason.as_deref(), store)?;
    }
    Ok(())
}

/// Copies rows down to a number until one cannot be read. Returns whether that was all.
fn copy_rows(old: &Connection, sql: &str, down_to: u64, store: &mut Store, found: &mut Found) -> Result<bool> {
    let Some(mut statement) = readable(old.prepare(sql))? else { return Ok(false) };
    let mut rows = statement.query([])?;
    while let Some(row) = readable(rows.next())? {
        let Some(row) = row else { return Ok(true) };
        if found.take(row, store)?.is_some_and(|seq| seq <= down_to) {
            break;
        }
    }
    Ok(false)
}
