//! When the write-ahead log is copied into the file, and when its space is given back. Pure: takes sizes and the time.
//!
//! The log is copied every few MiB, after the answers of a batch; the next transaction then writes from its beginning.
//! A reader holds that up, because it still needs what it has seen. Own readers are short. Others are not, so the log
//! then grows: its size beyond the bound counts against `spool.max_bytes`, and is given back when the reader has gone.

use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;

/// How much is added to the log between two copies: little enough that a copy is quick.
const COPY_EVERY: u64 = 4 * MIB;

/// Maximum bytes of bodies in one transaction, but for the last of them.
pub(super) const BATCH_BYTES_MAX: u64 = 2 * MIB;

/// Maximum bytes that the settlements of one transaction add to the log, but for the last of them.
pub(super) const SETTLE_BYTES: u64 = 2 * MIB;

/// At most how much of the log the settlement of neighbouring events takes that count for this many bytes: the page of
/// an event is written once, and holds at least half a page of events but for the first and the last one.
pub(super) fn settle_bytes(bytes: u64) -> u64 {
    2 * bytes + 8 * 1024
}

/// How often to try again to copy or truncate a log that another process reads.
const RETRY: Duration = Duration::from_secs(1);

/// A log that could not be copied for this long is reported. Own readers and most commands take less.
const HELD: Duration = Duration::from_secs(30);

/// Sizes that follow from the largest body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Bounds {
    /// Disk space to give up when the disk is full: a copy of the log fits into it.
    pub reserve: u64,
    /// Size that the log exceeds only while a reader holds it.
    pub log: u64,
    /// How much one transaction may add to the log and to the file.
    pub batch: u64,
    /// How much the settlements in one transaction may add to the log. The file does not grow by them.
    pub settle: u64,
}

impl Bounds {
    pub(super) fn of(body_bytes_max: u64) -> Self {
        let batch = BATCH_BYTES_MAX + body_bytes_max;
        // A quarter more, because a row takes more than its body.
        let reserve = ((COPY_EVERY + batch) * 5 / 4).next_multiple_of(MIB);
        let settle = SETTLE_BYTES + body_bytes_max * 5 / 4;
        Self { reserve, log: 2 * reserve, batch: batch * 5 / 4, settle }
    }
}

/// The size of the log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct LogSize {
    /// Bytes written since it began again.
    pub used: u64,
    /// Bytes of its file.
    pub file: u64,
}

/// What to do about the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LogStep {
    Nothing,
    /// Copy into the file what no reader holds back.
    Copy,
    /// Copy all of it and truncate its file.
    Truncate,
}

/// Follows the log of a spool.
pub(super) struct LogKeeper {
    bounds: Bounds,
    /// Bytes used at the last copy.
    copied_at: u64,
    /// Since when a reader has held up the log.
    held_since: Option<Instant>,
    /// When a reader last held up a copy or a truncation.
    refused_at: Option<Instant>,
}

impl LogKeeper {
    pub(super) fn new(bounds: Bounds) -> Self {
        Self { bounds, copied_at: 0, held_since: None, refused_at: None }
    }

    pub(super) fn bounds(&self) -> Bounds {
        self.bounds
    }

    /// What is due after a transaction, or after a pause.
    pub(super) fn due(&mut self, size: LogSize, now: Instant) -> LogStep {
        if size.used < self.copied_at {
            // It began again.
            self.copied_at = 0;
        }
        let may_retry = self.refused_at.is_none_or(|at| now.saturating_duration_since(at) >= RETRY);
        if size.file > self.bounds.log && may_retry {
            LogStep::Truncate
        } else if size.used - self.copied_at >= COPY_EVERY || (self.held_since.is_some() && may_retry) {
            LogStep::Copy
        } else {
            LogStep::Nothing
        }
    }

    /// The log was copied; `complete`: no reader held anything back.
    pub(super) fn on_copied(&mut self, size: LogSize, complete: bool, now: Instant) {
        self.copied_at = size.used;
        if complete { self.release() } else { self.hold(now) }
    }

    /// The log was truncated.
    pub(super) fn on_truncated(&mut self) {
        self.copied_at = 0;
        self.release();
    }

    /// A reader kept the log from being truncated.
    pub(super) fn hold(&mut self, now: Instant) {
        self.refused_at = Some(now);
        self.held_since.get_or_insert(now);
    }

    fn release(&mut self) {
        (self.held_since, self.refused_at) = (None, None);
    }

    /// Whether a reader holds up the log.
    pub(super) fn is_held(&self) -> bool {
        self.held_since.is_some()
    }

    /// How long a reader has held up the log, if that is long enough to be reported.
    pub(super) fn held_for_long(&self, now: Instant) -> Option<Duration> {
        self.held_since.map(|since| now.saturating_duration_since(since)).filter(|held| *held >= HELD)
    }

    /// Whether there is something to do although no transaction comes.
    pub(super) fn is_restless(&self, size: LogSize) -> bool {
        self.is_held() || size.file > self.bounds.log
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keeper() -> LogKeeper {
        LogKeeper::new(Bounds::of(256 * 1024))
    }

    fn size(used: u64, file: u64) -> LogSize {
        LogSize { used: used * MIB, file: file * MIB }
    }

    #[test]
    fn the_reserve_holds_a_copy_of_the_log_however_large_bodies_are() {
        assert_eq!(Bounds::of(256 * 1024).reserve, 8 * MIB);
        for body in [1, 256 * 1024, 16 * MIB, 64 * MIB] {
            let bounds = Bounds::of(body);
            assert!(bounds.reserve >= COPY_EVERY + BATCH_BYTES_MAX + body + body / 8, "{body}");
            assert!(bounds.log > bounds.reserve, "{body}");
        }
    }

    #[test]
    fn the_log_is_copied_every_few_mib() {
        let (mut keeper, now) = (keeper(), Instant::now());
        assert_eq!(keeper.due(size(3, 3), now), LogStep::Nothing);
        assert_eq!(keeper.due(size(4, 4), now), LogStep::Copy);
        keeper.on_copied(size(4, 4), true, now);
        assert_eq!(keeper.due(size(7, 7), now), LogStep::Nothing);
        assert_eq!(keeper.due(size(8, 8), now), LogStep::Copy);
        keeper.on_copied(size(8, 8), true, now);
        // It began again.
        assert_eq!(keeper.due(size(1, 8), now), LogStep::Nothing);
        assert_eq!(keeper.due(size(4, 8), now), LogStep::Copy);
        assert!(!keeper.is_held() && !keeper.is_restless(size(4, 8)));
    }

    #[test]
    fn a_log_beyond_its_bound_is_truncated_once_no_process_reads_it() {
        let (mut keeper, start) = (keeper(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(keeper.due(size(17, 17), start), LogStep::Truncate);
        keeper.hold(start);
        assert!(keeper.is_restless(size(17, 17)));
        assert_eq!(keeper.due(size(17, 17), start), LogStep::Copy, "what the reader does not hold back");
        keeper.on_copied(size(17, 17), false, start);
        assert_eq!(keeper.due(size(17, 17), start), LogStep::Nothing);
        assert_eq!(keeper.due(size(17, 17), at(1)), LogStep::Truncate);
        keeper.hold(at(29));
        assert_eq!(keeper.held_for_long(at(29)), None);
        assert_eq!(keeper.held_for_long(at(31)), Some(Duration::from_secs(31)));
        keeper.on_truncated();
        assert_eq!((keeper.held_for_long(at(99)), keeper.is_restless(size(0, 0))), (None, false));
        assert_eq!(keeper.due(size(1, 1), at(99)), LogStep::Nothing);
    }

    #[test]
    fn a_log_that_is_held_up_is_tried_again_every_second() {
        let (mut keeper, start) = (keeper(), Instant::now());
        keeper.on_copied(size(4, 4), false, start);
        assert!(keeper.is_held());
        assert_eq!(keeper.due(size(5, 5), start), LogStep::Nothing);
        assert_eq!(keeper.due(size(5, 5), start + RETRY), LogStep::Copy);
        keeper.on_copied(size(5, 5), true, start + RETRY);
        assert!(!keeper.is_held());
    }
}
