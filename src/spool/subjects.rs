//! What is known of each scan and prediction, and hints from refused webhooks: their tables, and what the writer does
//! with them. Nothing of it runs without the section `[reconcile]`.
//!
//! A subject changes in the transaction of the event that tells it, so neither a crash nor a failed commit separates
//! the two. Hints and notes are written with the next transaction, which is not synced for them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rusqlite::{Connection, OptionalExtension, Row};
use uuid::Uuid;

use super::error::Result;
use super::hints::{self, Hint, HintBox, HintTrust};
use crate::event::{Event, Source};
use crate::subject::{Asked, Copies, Ended, Kind, Made, News, Progress, State, Step, Subject, Told, Verdict};

/// The settings of what is kept about subjects.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Maximum number of subjects; those of which something was told last stay.
    pub max: usize,
    /// How long after the last news of a subject it is forgotten.
    pub keep: Duration,
}

/// The schema of the subjects. A scan or prediction `began` and `ended`: when (in milliseconds since 1970), who told it
/// (0: a webhook, 1: the API), and whether that is `trusted`. `open`: it began, and its end is still to come.
/// `last_ms`: when something was last told. `asked_ms`, `tries` and `next_ms`: when the API was last asked, how often,
/// and when to ask again. `made`: the last event that the API told, whose webhook may come late, and which webhooks can
/// be copies of it (`made_trusted`; 0: unsigned ones, 1: any, 2: signed ones).
///
/// There are no comments in it, because all schemas together should fit into the first page of the file: damage of
/// another page then leaves every table readable.
pub(super) const SCHEMA: &str = "
    CREATE TABLE subject (
        key INTEGER PRIMARY KEY, kind TEXT NOT NULL, id TEXT NOT NULL,
        began_ms INTEGER, began_source INTEGER, began_trusted INTEGER,
        ended_ms INTEGER, ended_source INTEGER, ended_trusted INTEGER, ended_step TEXT,
        open INTEGER NOT NULL, last_ms INTEGER NOT NULL,
        asked_ms INTEGER, tries INTEGER NOT NULL, next_ms INTEGER NOT NULL,
        made_seq INTEGER, made_id BLOB, made_step TEXT, made_ms INTEGER, made_trusted INTEGER
    ) STRICT;
    CREATE INDEX subject_open ON subject (began_ms, next_ms) WHERE open = 1;
    CREATE INDEX subject_last ON subject (last_ms);
";

/// The columns that [`named`] and [`state`] read, and [`save`] writes, in their order.
pub(super) const COLUMNS: &str = concat!(
    "key, kind, id, began_ms, began_source, began_trusted, ended_ms, ended_source, ended_trusted, ended_step, open, ",
    "last_ms, asked_ms, tries, next_ms, made_seq, made_id, made_step, made_ms, made_trusted",
);

/// At most how much of the log one change takes, with the subject that it displaces: a page of the table and two of
/// the indexes for the one, a page of the table and one of an index for the other.
pub(super) const LOG_BYTES: u64 = 20 * 1024;

/// Notes that one transaction writes at most: they share its room in the log with settlements.
const NOTES_AT_ONCE: usize = 64;

/// Maximum number of notes that wait for a disk; later ones are dropped, and the API is asked once more than needed.
const NOTES_MAX: usize = 1024;

/// Subjects that one transaction forgets in addition to as many as it changed.
const FORGOTTEN_AT_ONCE: u64 = 16;

/// How often hints are written.
const HINTS_EVERY: Duration = Duration::from_secs(1);

/// What was found out about a subject or a hint, to be written with the next transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Note {
    /// The API was asked about an open subject.
    Asked {
        /// Which one.
        subject: Subject,
        /// When, in milliseconds since 1970.
        at_ms: i64,
        /// When to ask again.
        next_ms: i64,
    },
    /// The API does not know the subject: it is not asked for again.
    Closed {
        /// Which one.
        subject: Subject,
    },
    /// The API was asked because of a hint, and could not answer.
    HintAsked {
        /// The subject of the hint.
        subject: Subject,
        /// Which hint of it.
        trust: HintTrust,
        /// When to ask again, in milliseconds since 1970.
        next_ms: i64,
    },
    /// A hint is of no more use.
    HintDone {
        /// The subject of the hint.
        subject: Subject,
        /// Which hint of it.
        trust: HintTrust,
    },
    /// Time has passed: subjects and hints that are too old are forgotten.
    Purge {
        /// The time, in milliseconds since 1970.
        now_ms: i64,
    },
}

/// How many subjects are open.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SubjectCounts {
    /// Those that began and did not end.
    pub open: u64,
    /// Open ones that began before the given time.
    pub overdue: u64,
}

/// Follows the subjects in the transactions of the writer.
pub(super) enum Follower {
    /// No section `[reconcile]`.
    Off,
    /// As `Off`, but the file has subjects of an earlier process. They are removed with the first transaction, because
    /// they would miss its events.
    Stale,
    On(Following),
}

pub(super) struct Following {
    settings: Settings,
    /// Subjects in the file.
    stored: u64,
    /// Subjects in the file if the transaction in progress is committed.
    uncommitted: u64,
    /// Subjects that the transaction in progress changed.
    changed: u64,
    /// Open subjects that the transaction in progress forgets because there are too many.
    evicted: u64,
    notes: Vec<Note>,
    /// Notes written in the transaction in progress.
    noted: usize,
    offered: Arc<HintBox>,
    /// Hints to write.
    hints: Vec<Hint>,
    hints_written: Option<Instant>,
}

/// What a transaction is about to do with an event.
pub(super) struct Judged<'a> {
    subject: &'a Subject,
    state: State,
    is_new: bool,
    pub verdict: Verdict,
}

impl Follower {
    pub(super) fn new(connection: &Connection, settings: Option<&Settings>, offered: Arc<HintBox>) -> Result<Self> {
        let Some(settings) = settings else {
            let sql = "SELECT EXISTS (SELECT 1 FROM subject) OR EXISTS (SELECT 1 FROM hint)";
            let is_stale = connection.query_row(sql, [], |row| row.get(0))?;
            return Ok(if is_stale { Self::Stale } else { Self::Off });
        };
        let stored = connection.query_row("SELECT count(*) FROM subject", [], |row| row.get(0))?;
        Ok(Self::On(Following {
            settings: settings.clone(),
            stored,
            uncommitted: stored,
            changed: 0,
            evicted: 0,
            notes: Vec::new(),
            noted: 0,
            offered,
            hints: Vec::new(),
            hints_written: None,
        }))
    }

    /// Decides about an event that tells a step; `None` without `[reconcile]`. Changes nothing: see [`Self::save`].
    pub(super) fn judge<'a>(
        &self,
        connection: &Connection,
        progress: &'a Progress,
        event: &Event,
        seq: u64,
    ) -> Result<Option<Judged<'a>>> {
        let Self::On(_) = self else { return Ok(None) };
        let known = load(connection, &progress.subject)?;
        let mut state = known.unwrap_or_default();
        let told = Told { at_ms: event.accepted_ms, source: event.source, is_trusted: event.authentic };
        let verdict = state.on(&News { seq, id: event.id, step: progress.step, told });
        Ok(Some(Judged { subject: &progress.subject, state, is_new: known.is_none(), verdict }))
    }

    /// Writes what follows from a judgement.
    pub(super) fn save(&mut self, connection: &Connection, judged: &Judged<'_>) -> Result<()> {
        let Self::On(following) = self else { return Ok(()) };
        following.changed += 1;
        following.uncommitted += u64::from(judged.is_new);
        save(connection, judged.subject, &judged.state)
    }

    pub(super) fn note(&mut self, note: Note) {
        if let Self::On(following) = self
            && following.notes.len() < NOTES_MAX
        {
            following.notes.push(note);
        }
    }

    /// Whether something waits to be written. Hints wait for a second.
    pub(super) fn is_due(&self) -> bool {
        match self {
            Self::Off | Self::Stale => false,
            Self::On(following) => !following.notes.is_empty() || following.hints_are_due(Instant::now()),
        }
    }

    /// Whether hints wait.
    pub(super) fn has_hints(&self) -> bool {
        matches!(self, Self::On(following) if following.has_hints())
    }

    /// Writes hints although others were written a moment ago.
    pub(super) fn hurry(&mut self) {
        if let Self::On(following) = self {
            following.hints_written = None;
        }
    }

    /// The part of a transaction after its events.
    pub(super) fn write(&mut self, connection: &Connection, wall_ms: i64, now: Instant) -> Result<()> {
        match self {
            Self::Off => Ok(()),
            Self::Stale => Ok(connection.execute_batch("DELETE FROM subject; DELETE FROM hint")?),
            Self::On(following) => following.write(connection, wall_ms, now),
        }
    }

    /// Returns how many open subjects were evicted.
    pub(super) fn commit(&mut self) -> u64 {
        match self {
            Self::Off => 0,
            Self::Stale => {
                *self = Self::Off;
                0
            }
            Self::On(following) => {
                following.stored = following.uncommitted;
                following.changed = 0;
                following.notes.drain(..std::mem::take(&mut following.noted));
                following.hints.clear();
                std::mem::take(&mut following.evicted)
            }
        }
    }

    pub(super) fn roll_back(&mut self) {
        if let Self::On(following) = self {
            following.uncommitted = following.stored;
            (following.changed, following.evicted, following.noted) = (0, 0, 0);
        }
    }
}

impl Following {
    fn has_hints(&self) -> bool {
        !self.hints.is_empty() || !self.offered.is_empty()
    }

    fn hints_are_due(&self, now: Instant) -> bool {
        let is_time = |at: Instant| now.saturating_duration_since(at) >= HINTS_EVERY;
        self.has_hints() && self.hints_written.is_none_or(is_time)
    }

    fn write(&mut self, connection: &Connection, wall_ms: i64, now: Instant) -> Result<()> {
        self.noted = self.notes.len().min(NOTES_AT_ONCE);
        for note in &self.notes[..self.noted] {
            write_note(connection, note, self.settings.keep)?;
        }
        if self.hints_are_due(now) {
            // Those of a failed transaction come first.
            if self.hints.is_empty() {
                self.hints = self.offered.take();
            }
            self.hints_written = Some(now);
            hints::insert(connection, &self.hints)?;
        }
        if self.changed > 0 || self.noted > 0 {
            self.forget(connection, wall_ms)?;
        }
        Ok(())
    }

    /// Forgets the subjects that are too old or too many, a few at a time.
    fn forget(&mut self, connection: &Connection, wall_ms: i64) -> Result<()> {
        let room = self.changed + FORGOTTEN_AT_ONCE;
        let excess = self.uncommitted.saturating_sub(self.settings.max as u64).min(room);
        if excess > 0 {
            let sql = "SELECT count(*) FROM (SELECT open FROM subject ORDER BY last_ms, key LIMIT ?1) WHERE open = 1";
            self.evicted = connection.prepare_cached(sql)?.query_row([excess], |row| row.get(0))?;
        }
        let mut statement = connection.prepare_cached(
            "DELETE FROM subject WHERE key IN
                 (SELECT key FROM subject WHERE last_ms < ?1 ORDER BY last_ms, key LIMIT ?2)",
        )?;
        let mut forgotten = statement.execute((i64::MAX, excess))? as u64;
        forgotten += statement.execute((before(wall_ms, self.settings.keep), room - excess))? as u64;
        self.uncommitted = self.uncommitted.saturating_sub(forgotten);
        Ok(())
    }
}

fn before(now_ms: i64, keep: Duration) -> i64 {
    now_ms.saturating_sub(i64::try_from(keep.as_millis()).unwrap_or(i64::MAX))
}

fn write_note(connection: &Connection, note: &Note, keep: Duration) -> Result<()> {
    match note {
        Note::Asked { subject, at_ms, next_ms } => {
            let sql = "UPDATE subject SET asked_ms = ?4, tries = tries + 1, next_ms = ?5
                       WHERE key = ?1 AND kind = ?2 AND id = ?3 AND open = 1";
            let values = (subject.key().0, subject.kind().text(), subject.id(), at_ms, next_ms);
            connection.prepare_cached(sql)?.execute(values)?;
        }
        Note::Closed { subject } => {
            let sql = "UPDATE subject SET open = 0 WHERE key = ?1 AND kind = ?2 AND id = ?3";
            let values = (subject.key().0, subject.kind().text(), subject.id());
            connection.prepare_cached(sql)?.execute(values)?;
        }
        Note::HintAsked { subject, trust, next_ms } => hints::put_off(connection, subject, *trust, *next_ms)?,
        Note::HintDone { subject, trust } => hints::remove(connection, subject, *trust)?,
        Note::Purge { now_ms } => hints::forget(connection, before(*now_ms, keep))?,
    }
    Ok(())
}

/// Open subjects that began at `began_before_ms` or earlier and are due to be asked for, the longest open first.
pub(super) fn overdue(
    connection: &Connection,
    began_before_ms: i64,
    now_ms: i64,
    limit: usize,
) -> Result<Vec<(Subject, State)>> {
    let sql = format!(
        "SELECT {COLUMNS} FROM subject INDEXED BY subject_open
         WHERE open = 1 AND began_ms <= ?1 AND next_ms NOT BETWEEN ?2 AND ?3 ORDER BY began_ms, next_ms LIMIT ?4"
    );
    let mut statement = connection.prepare_cached(&sql)?;
    let (soonest, latest) = hints::put_off_until(now_ms);
    let found =
        statement.query_map((began_before_ms, soonest, latest, limit as i64), |row| Ok(named(row).zip(state(row))))?;
    Ok(found.filter_map(rusqlite::Result::transpose).collect::<rusqlite::Result<_>>()?)
}

/// How many subjects are open, and how many of them began at `began_before_ms` or earlier.
pub(super) fn counts(connection: &Connection, began_before_ms: i64) -> Result<SubjectCounts> {
    let sql = "SELECT count(*), count(*) FILTER (WHERE began_ms <= ?1)
               FROM subject INDEXED BY subject_open WHERE open = 1";
    let mut statement = connection.prepare_cached(sql)?;
    Ok(statement.query_row([began_before_ms], |row| Ok(SubjectCounts { open: row.get(0)?, overdue: row.get(1)? }))?)
}

/// How many steps the API has told since then. An event whose subject was forgotten, or that another one replaced, is
/// not counted.
pub(super) fn told_by_api(connection: &Connection, since_ms: i64) -> Result<u64> {
    let sql = "SELECT count(*) FILTER (WHERE began_source = 1 AND began_ms >= ?1)
                    + count(*) FILTER (WHERE ended_source = 1 AND ended_ms >= ?1)
               FROM subject INDEXED BY subject_last WHERE last_ms >= ?1";
    Ok(connection.prepare_cached(sql)?.query_row([since_ms], |row| row.get(0))?)
}

/// What is known of a subject. A row that cannot be understood counts as none.
pub(super) fn load(connection: &Connection, subject: &Subject) -> Result<Option<State>> {
    let sql = format!("SELECT {COLUMNS} FROM subject WHERE key = ?1 AND kind = ?2 AND id = ?3");
    let mut statement = connection.prepare_cached(&sql)?;
    let values = (subject.key().0, subject.kind().text(), subject.id());
    Ok(statement.query_row(values, |row| Ok(state(row))).optional()?.flatten())
}

/// Some rows of the subjects, for `spool verify`.
pub(super) struct Slice {
    /// The key of the last one.
    pub last: i64,
    /// How many of them cannot be understood.
    pub unclear: u64,
}

/// Reads rows behind the one with the key `after`; `None` if there are none.
pub(super) fn slice(connection: &Connection, after: i64, limit: usize) -> Result<Option<Slice>> {
    let sql = format!("SELECT {COLUMNS} FROM subject WHERE key > ?1 ORDER BY key LIMIT ?2");
    let mut statement = connection.prepare_cached(&sql)?;
    let (mut rows, mut slice) = (statement.query((after, limit as i64))?, None);
    while let Some(row) = rows.next()? {
        let unclear = slice.map_or(0, |slice: Slice| slice.unclear);
        let is_clear = named(row).is_some() && state(row).is_some_and(|state| !state.is_open || state.began.is_some());
        slice = Some(Slice { last: row.get(0)?, unclear: unclear + u64::from(!is_clear) });
    }
    Ok(slice)
}

/// Writes what is known of a subject.
pub(super) fn save(connection: &Connection, subject: &Subject, known: &State) -> Result<()> {
    let mut statement = connection.prepare_cached(&format!(
        "INSERT OR REPLACE INTO subject ({COLUMNS}) VALUES
         (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16, ?17, ?18, ?19, ?20)"
    ))?;
    let State { began, ended, is_open, last_ms, asked, made } = known;
    let told = ended.map(|ended| ended.told);
    statement.execute(rusqlite::params![
        subject.key().0,
        subject.kind().text(),
        subject.id(),
        began.map(|told| told.at_ms),
        began.map(|told| number(told.source)),
        began.map(|told| told.is_trusted),
        told.map(|told| told.at_ms),
        told.map(|told| number(told.source)),
        told.map(|told| told.is_trusted),
        ended.map(|ended| ended.step.text()),
        is_open,
        last_ms,
        asked.last_ms,
        asked.tries,
        asked.next_ms,
        made.map(|made| made.seq),
        made.map(|made| *made.id.as_bytes()),
        made.map(|made| made.step.text()),
        made.map(|made| made.at_ms),
        made.map(|made| made.copies as i64),
    ])?;
    Ok(())
}

/// The subject of a row; `None` if its key is another one's.
pub(super) fn named(row: &Row<'_>) -> Option<Subject> {
    let (kind, id) = (row.get_ref(1).ok()?.as_str().ok()?, row.get_ref(2).ok()?.as_str().ok()?);
    let subject = Subject::new(Kind::of(kind)?, id)?;
    (subject.key().0 == row.get::<_, i64>(0).ok()?).then_some(subject)
}

/// The state in a row; `None` if it cannot be understood.
pub(super) fn state(row: &Row<'_>) -> Option<State> {
    let step = |column| Step::of(row.get_ref(column).ok()?.as_str().ok()?);
    let ended = match told(row, 6)? {
        Some(told) => Some(Ended { step: step(9)?, told }),
        None => None,
    };
    let made = match row.get(15).ok()? {
        Some(seq) => Some(Made {
            seq,
            id: Uuid::from_bytes(row.get(16).ok()?),
            step: step(17)?,
            at_ms: row.get(18).ok()?,
            copies: copies(row.get(19).ok()?)?,
        }),
        None => None,
    };
    Some(State {
        began: told(row, 3)?,
        ended,
        is_open: row.get(10).ok()?,
        last_ms: row.get(11).ok()?,
        asked: Asked { last_ms: row.get(12).ok()?, tries: row.get(13).ok()?, next_ms: row.get(14).ok()? },
        made,
    })
}

/// The three columns from this one on.
fn told(row: &Row<'_>, first: usize) -> Option<Option<Told>> {
    let Some(at_ms) = row.get(first).ok()? else { return Some(None) };
    let (source, is_trusted) = (source(row.get(first + 1).ok()?), row.get(first + 2).ok()?);
    Some(Some(Told { at_ms, source, is_trusted }))
}

fn copies(number: i64) -> Option<Copies> {
    [Copies::Unsigned, Copies::Any, Copies::Signed].into_iter().find(|copies| *copies as i64 == number)
}

/// The number of a source in the file.
pub(super) fn number(source: Source) -> i64 {
    match source {
        Source::Webhook => 0,
        Source::Api => 1,
    }
}

/// The source with this number.
pub(super) fn source(number: i64) -> Source {
    if number == self::number(Source::Api) { Source::Api } else { Source::Webhook }
}
