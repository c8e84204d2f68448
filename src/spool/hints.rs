//! Hints: the subjects of webhooks that were refused. Prism gives such a webhook up, so its subject is asked for. A
//! hint proves nothing and is never published: anyone can send a webhook that is refused.
//!
//! Bounded: the newest of each trust stay, so that no flood of unsigned webhooks pushes out a signed one.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rusqlite::{Connection, Row};

use super::error::Result;
use crate::subject::{Kind, Step, Subject};

/// Maximum number of hints of each trust, in memory and in the file.
pub(super) const HINTS_MAX: usize = 1000;

/// Maximum time for which a question to the API is put off; the pauses between two questions are shorter.
const PUT_OFF_MS_MAX: i64 = 2 * 3_600_000;

/// The schema of the hints. `signed`: the signature was right, and the spool took no event. `step`: of the last
/// webhook. `at_ms`: when the first one was refused. Without comments, as that of the subjects.
pub(super) const SCHEMA: &str = "
    CREATE TABLE hint (
        signed INTEGER NOT NULL, kind TEXT NOT NULL, id TEXT NOT NULL, step TEXT NOT NULL, at_ms INTEGER NOT NULL,
        tries INTEGER NOT NULL, next_ms INTEGER NOT NULL, PRIMARY KEY (signed, kind, id)
    ) STRICT, WITHOUT ROWID;
";

/// Why a webhook was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HintTrust {
    /// Its signature was right, and the spool took no event.
    Signed,
    /// It may come from anyone.
    Unsigned,
}

/// The subject of a refused webhook.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hint {
    /// What the webhook was about.
    pub subject: Subject,
    /// What it told.
    pub step: Step,
    /// When the first webhook of the subject was refused, in milliseconds since 1970.
    pub at_ms: i64,
    /// Why it was refused.
    pub trust: HintTrust,
    /// How often the API was asked.
    pub tries: u32,
}

/// Hints that are not written yet.
#[derive(Default)]
pub(super) struct HintBox(Mutex<Offered>);

#[derive(Default)]
struct Offered {
    signed: VecDeque<Hint>,
    unsigned: VecDeque<Hint>,
}

impl Offered {
    fn of(&mut self, trust: HintTrust) -> &mut VecDeque<Hint> {
        match trust {
            HintTrust::Signed => &mut self.signed,
            HintTrust::Unsigned => &mut self.unsigned,
        }
    }
}

impl HintBox {
    /// Keeps a hint. Returns whether there was none before.
    pub(super) fn offer(&self, hint: Hint) -> bool {
        let mut offered = self.lock();
        let was_empty = offered.signed.is_empty() && offered.unsigned.is_empty();
        let hints = offered.of(hint.trust);
        match hints.iter_mut().find(|known| known.subject == hint.subject) {
            Some(known) => known.step = hint.step,
            None => {
                if hints.len() == HINTS_MAX {
                    hints.pop_front();
                }
                hints.push_back(hint);
            }
        }
        was_empty
    }

    pub(super) fn is_empty(&self) -> bool {
        let offered = self.lock();
        offered.signed.is_empty() && offered.unsigned.is_empty()
    }

    pub(super) fn take(&self) -> Vec<Hint> {
        let Offered { signed, unsigned } = std::mem::take(&mut *self.lock());
        signed.into_iter().chain(unsigned).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Offered> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Writes hints, and drops the oldest if there are too many.
pub(super) fn insert(connection: &Connection, hints: &[Hint]) -> Result<()> {
    let mut statement = connection.prepare_cached(
        "INSERT INTO hint (signed, kind, id, step, at_ms, tries, next_ms) VALUES (?1, ?2, ?3, ?4, ?5, 0, 0)
         ON CONFLICT DO UPDATE SET step = excluded.step",
    )?;
    for Hint { subject, step, at_ms, trust, .. } in hints {
        statement.execute((is_signed(*trust), subject.kind().text(), subject.id(), step.text(), at_ms))?;
    }
    let mut statement = connection.prepare_cached(
        "DELETE FROM hint WHERE (signed, kind, id) IN
             (SELECT signed, kind, id FROM hint WHERE signed = ?1 ORDER BY at_ms DESC, kind, id LIMIT -1 OFFSET ?2)",
    )?;
    for trust in [HintTrust::Signed, HintTrust::Unsigned] {
        statement.execute((is_signed(trust), HINTS_MAX as i64))?;
    }
    Ok(())
}

/// Hints of this trust that are due, the oldest first.
pub(super) fn due(connection: &Connection, trust: HintTrust, now_ms: i64, limit: usize) -> Result<Vec<Hint>> {
    let mut statement = connection.prepare_cached(
        "SELECT kind, id, step, at_ms, tries FROM hint WHERE signed = ?1 AND next_ms NOT BETWEEN ?2 AND ?3
         ORDER BY at_ms, kind, id LIMIT ?4",
    )?;
    let (soonest, latest) = put_off_until(now_ms);
    let hints = statement.query_map((is_signed(trust), soonest, latest, limit as i64), |row| Ok(hint(row, trust)))?;
    Ok(hints.filter_map(rusqlite::Result::transpose).collect::<rusqlite::Result<_>>()?)
}

/// The first and the last time until which a question can have been put off: a later one was written before the clock
/// was set back, and does not count.
pub(super) fn put_off_until(now_ms: i64) -> (i64, i64) {
    (now_ms.saturating_add(1), now_ms.saturating_add(PUT_OFF_MS_MAX))
}

pub(super) fn put_off(connection: &Connection, subject: &Subject, trust: HintTrust, next_ms: i64) -> Result<()> {
    let sql = "UPDATE hint SET tries = tries + 1, next_ms = ?4 WHERE signed = ?1 AND kind = ?2 AND id = ?3";
    connection.prepare_cached(sql)?.execute((is_signed(trust), subject.kind().text(), subject.id(), next_ms))?;
    Ok(())
}

pub(super) fn remove(connection: &Connection, subject: &Subject, trust: HintTrust) -> Result<()> {
    let sql = "DELETE FROM hint WHERE signed = ?1 AND kind = ?2 AND id = ?3";
    connection.prepare_cached(sql)?.execute((is_signed(trust), subject.kind().text(), subject.id()))?;
    Ok(())
}

/// Drops the hints from before this time.
pub(super) fn forget(connection: &Connection, before_ms: i64) -> Result<()> {
    connection.prepare_cached("DELETE FROM hint WHERE at_ms < ?1")?.execute([before_ms])?;
    Ok(())
}

/// The hint in a row; `None` if it cannot be understood.
fn hint(row: &Row<'_>, trust: HintTrust) -> Option<Hint> {
    let text = |column| row.get_ref(column).ok()?.as_str().ok();
    Some(Hint {
        subject: Subject::new(Kind::of(text(0)?)?, text(1)?)?,
        step: Step::of(text(2)?)?,
        at_ms: row.get(3).ok()?,
        trust,
        tries: row.get(4).ok()?,
    })
}

fn is_signed(trust: HintTrust) -> bool {
    trust == HintTrust::Signed
}
