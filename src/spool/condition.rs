//! The condition of the spool's disk and how it changes. Pure: takes what the writer found out and the time, and
//! returns the new condition and what to do. Readiness, refusals, log lines, what can be settled and when to try the
//! disk again all derive from it.

use std::time::{Duration, Instant};

use super::error::Fault;

/// A disk that has not answered for this long counts as stalled. Longer than a commit waits for another process's lock.
pub(super) const STALL: Duration = Duration::from_secs(8);

/// The condition of the spool's disk. Only a healthy one takes events.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Condition {
    /// Events can be written.
    Healthy,
    /// A write has neither succeeded nor failed for 8 s.
    Stalled {
        /// When the write began.
        since: Instant,
    },
    /// Another process has locked the file.
    Locked,
    /// The disk has no room for an event and the reserve.
    Full,
    /// After a failure, another process reads the log that has to begin again.
    LogInUse,
    /// A write or a sync failed.
    Failing,
    /// The files were deleted or unmounted.
    Gone,
    /// The file is damaged.
    Damaged,
}

/// How a disk is tried again: what becomes of the write-ahead log before the next transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Restart {
    /// The log stays as it is, because nothing was written.
    Skip,
    /// The log begins again if it can, to make room.
    IfPossible,
    /// The log has to begin again: Linux reports a failed fsync once and then forgets it, so it is unknown which parts
    /// of the log reached the disk.
    Must,
}

impl Condition {
    /// One word for a program.
    pub fn name(self) -> &'static str {
        match self {
            Self::Healthy => "healthy",
            Self::Stalled { .. } => "stalled",
            Self::Locked => "locked",
            Self::Full => "full",
            Self::LogInUse => "log-in-use",
            Self::Failing => "failing",
            Self::Gone => "gone",
            Self::Damaged => "damaged",
        }
    }

    /// Why no event can be written, and what to do; `None` for a healthy disk.
    pub fn reason(self) -> Option<&'static str> {
        Some(match self {
            Self::Healthy => return None,
            Self::Stalled { .. } => "the spool's disk does not answer; check it",
            Self::Locked => "another process has locked the spool file; stop it",
            Self::Full => "the spool's disk is full, or a quota or file size limit is reached; make room",
            Self::LogInUse => "another process reads the spool file (a backup, sqlite3); stop it",
            Self::Failing => "a write to the spool's disk failed; check the disk",
            Self::Gone => "the spool files were deleted or unmounted; the relay ends once it has delivered what it can",
            Self::Damaged => "the spool file is damaged; the relay recovers it at its next start",
        })
    }

    /// How to try the disk again; `None` if there is no need, or no use.
    pub(super) fn restart(self) -> Option<Restart> {
        match self {
            Self::Locked => Some(Restart::Skip),
            Self::Full => Some(Restart::IfPossible),
            Self::LogInUse | Self::Failing => Some(Restart::Must),
            Self::Healthy | Self::Stalled { .. } | Self::Gone | Self::Damaged => None,
        }
    }

    fn of(fault: Fault) -> Self {
        match fault {
            Fault::Locked => Self::Locked,
            Fault::NoRoom => Self::Full,
            Fault::LogInUse => Self::LogInUse,
            Fault::Io | Fault::Other => Self::Failing,
            Fault::Damage => Self::Damaged,
        }
    }

    /// A milder failure does not replace a worse one, which needs more before events can be written again.
    fn severity(self) -> u8 {
        match self {
            Self::Healthy => 0,
            Self::Locked | Self::Stalled { .. } => 1,
            Self::Full => 2,
            // Equally bad: the reason may change.
            Self::LogInUse | Self::Failing => 3,
            Self::Gone => 4,
            Self::Damaged => 5,
        }
    }
}

/// What the writer found out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Finding {
    /// It begins work during which the disk may stall.
    Began,
    /// The work is done.
    Ended,
    /// Time has passed.
    Tick,
    /// A transaction was committed.
    Committed,
    /// A transaction, or a copy of the log into the file, failed.
    Failed(Fault),
    /// The log began again if it had to, a transaction was synced, and the reserve is allocated.
    Works,
    /// There is no room for the reserve, or for copying the log into the file.
    NoRoom,
    /// The paths lead to other files, or to none.
    FilesGone,
}

/// What to do about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// Give the disk space of the reserve to deletions and to the copy of the log.
    FreeReserve,
    /// Log that webhooks are refused, and why.
    LogRefusing(Condition),
    /// Log that webhooks are accepted again.
    LogAccepting,
    /// Log that the disk answers again.
    LogAnswers,
}

/// The condition, with what is needed to find out about stalls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DiskState {
    condition: Condition,
    /// Whether the last transaction was committed.
    settles: bool,
    /// When the writer began what it is doing.
    busy_since: Option<Instant>,
    is_stall_logged: bool,
}

impl Default for DiskState {
    fn default() -> Self {
        Self { condition: Condition::Healthy, settles: true, busy_since: None, is_stall_logged: false }
    }
}

impl DiskState {
    pub(super) fn at(self, now: Instant) -> Condition {
        match self.busy_since {
            Some(since) if now.saturating_duration_since(since) > STALL => Condition::Stalled { since },
            _ => self.condition,
        }
    }

    /// The condition before the work that may be stalling.
    pub(super) fn last(self) -> Condition {
        self.condition
    }

    /// Whether settlements can be written. That may be possible on a disk that takes no events.
    pub(super) fn settles(self, now: Instant) -> bool {
        self.settles && !matches!(self.at(now), Condition::Stalled { .. })
    }

    pub(super) fn transition(mut self, finding: Finding, now: Instant) -> (Self, Vec<Action>) {
        let mut actions = Vec::new();
        match finding {
            Finding::Began => self.busy_since = Some(now),
            Finding::Ended => {
                self.busy_since = None;
                if std::mem::take(&mut self.is_stall_logged) {
                    actions.push(Action::LogAnswers);
                }
            }
            Finding::Tick => {
                let condition = self.at(now);
                if matches!(condition, Condition::Stalled { .. }) && !self.is_stall_logged {
                    self.is_stall_logged = true;
                    actions.push(Action::LogRefusing(condition));
                }
            }
            Finding::Committed => self.settles = true,
            Finding::Failed(fault) => {
                self.settles = false;
                if matches!(fault, Fault::NoRoom | Fault::Io) {
                    actions.push(Action::FreeReserve);
                }
                actions.extend(self.worsen(Condition::of(fault)));
            }
            Finding::NoRoom if self.condition.severity() <= Condition::Failing.severity() => {
                actions.extend(self.set(Condition::Full));
            }
            Finding::Works if self.condition.severity() <= Condition::Failing.severity() => {
                actions.extend(self.set(Condition::Healthy));
            }
            Finding::NoRoom | Finding::Works => {}
            Finding::FilesGone => actions.extend(self.worsen(Condition::Gone)),
        }
        (self, actions)
    }

    fn worsen(&mut self, condition: Condition) -> Option<Action> {
        if condition.severity() >= self.condition.severity() { self.set(condition) } else { None }
    }

    fn set(&mut self, condition: Condition) -> Option<Action> {
        let before = std::mem::replace(&mut self.condition, condition);
        match condition {
            _ if before == condition => None,
            Condition::Healthy => Some(Action::LogAccepting),
            condition => Some(Action::LogRefusing(condition)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Action::{FreeReserve, LogAccepting, LogAnswers, LogRefusing};
    use super::Condition::{Damaged, Failing, Full, Gone, Healthy, Locked, LogInUse, Stalled};
    use super::Finding::{Began, Committed, Ended, Failed, FilesGone, NoRoom, Tick, Works};
    use super::*;

    fn state(condition: Condition) -> DiskState {
        DiskState { condition, ..DiskState::default() }
    }

    #[test]
    fn each_finding_leads_to_a_condition_and_to_actions() {
        let refusing = |condition| vec![LogRefusing(condition)];
        let failed = |condition| vec![FreeReserve, LogRefusing(condition)];
        let io = Failed(Fault::Io);
        let full = Failed(Fault::NoRoom);
        let (locked, in_use, damage) = (Failed(Fault::Locked), Failed(Fault::LogInUse), Failed(Fault::Damage));
        for (before, finding, after, actions) in [
            (Healthy, Committed, Healthy, vec![]),
            (Healthy, Works, Healthy, vec![]),
            (Healthy, locked, Locked, refusing(Locked)),
            (Healthy, full, Full, failed(Full)),
            (Healthy, io, Failing, failed(Failing)),
            (Healthy, Failed(Fault::Other), Failing, refusing(Failing)),
            (Healthy, in_use, LogInUse, refusing(LogInUse)),
            (Healthy, damage, Damaged, refusing(Damaged)),
            (Healthy, NoRoom, Full, refusing(Full)),
            (Healthy, FilesGone, Gone, refusing(Gone)),
            (Locked, locked, Locked, vec![]),
            (Locked, Works, Healthy, vec![LogAccepting]),
            (Locked, full, Full, failed(Full)),
            (Locked, NoRoom, Full, refusing(Full)),
            // The disk is still full when a process locks the file meanwhile.
            (Full, locked, Full, vec![]),
            (Full, full, Full, vec![FreeReserve]),
            (Full, NoRoom, Full, vec![]),
            (Full, Committed, Full, vec![]),
            (Full, io, Failing, failed(Failing)),
            (Full, Works, Healthy, vec![LogAccepting]),
            // A commit alone does not show that the log is whole.
            (Failing, Committed, Failing, vec![]),
            (Failing, full, Failing, vec![FreeReserve]),
            (Failing, locked, Failing, vec![]),
            (Failing, in_use, LogInUse, refusing(LogInUse)),
            (Failing, NoRoom, Full, refusing(Full)),
            (Failing, Works, Healthy, vec![LogAccepting]),
            (LogInUse, in_use, LogInUse, vec![]),
            (LogInUse, io, Failing, failed(Failing)),
            (LogInUse, locked, LogInUse, vec![]),
            (LogInUse, Works, Healthy, vec![LogAccepting]),
            // Events written to deleted files are gone with the process, whatever the disk says.
            (Gone, Works, Gone, vec![]),
            (Gone, NoRoom, Gone, vec![]),
            (Gone, io, Gone, vec![FreeReserve]),
            (Gone, damage, Damaged, refusing(Damaged)),
            (Damaged, Works, Damaged, vec![]),
            (Damaged, FilesGone, Damaged, vec![]),
        ] {
            let (state, found) = state(before).transition(finding, Instant::now());
            assert_eq!((state.last(), found), (after, actions), "{before:?}, {finding:?}");
        }
    }

    #[test]
    fn a_stall_is_logged_once_and_so_is_its_end() {
        let since = Instant::now();
        let after = |seconds| since + Duration::from_secs(seconds);
        let (busy, _) = state(Healthy).transition(Began, since);
        assert_eq!((busy.at(after(8)), busy.settles(after(8))), (Healthy, true));
        assert_eq!((busy.at(after(9)), busy.settles(after(9))), (Stalled { since }, false));
        let (busy, actions) = busy.transition(Tick, after(5));
        assert_eq!(actions, []);
        let (busy, actions) = busy.transition(Tick, after(10));
        assert_eq!(actions, [LogRefusing(Stalled { since })]);
        let (busy, actions) = busy.transition(Tick, after(15));
        assert_eq!(actions, []);
        let (idle, actions) = busy.transition(Ended, after(20));
        assert_eq!((idle.at(after(99)), actions), (Healthy, vec![LogAnswers]));
        assert_eq!(idle.transition(Ended, after(20)).1, []);
    }

    #[test]
    fn settlements_can_be_written_from_one_commit_to_the_next_failure() {
        let now = Instant::now();
        let (failed, _) = state(Healthy).transition(Failed(Fault::NoRoom), now);
        assert!(!failed.settles(now));
        let (full, _) = failed.transition(Committed, now);
        assert!(full.settles(now) && full.at(now) == Full);
    }

    #[test]
    fn every_condition_but_a_healthy_one_has_a_reason() {
        let since = Instant::now();
        for condition in [Stalled { since }, Locked, Full, LogInUse, Failing, Gone, Damaged] {
            assert!(condition.reason().is_some(), "{condition:?}");
        }
        assert_eq!((Healthy.reason(), Healthy.restart()), (None, None));
    }
}
