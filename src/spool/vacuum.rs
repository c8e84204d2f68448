//! When free pages of the file are given back to the disk. Pure: takes the sizes.
//!
//! Deleted events leave free pages, which later events use. After a backlog there are more than will be needed.

use super::store::Pages;

/// Free pages that stay in the file for the next events (8 MiB): growing it again costs time.
const KEEP: u64 = 2048;

/// Pages to give back in one transaction: it takes about a millisecond, for which a webhook may have to wait.
const SLICE: u64 = 128;

/// The free pages are counted when the events have become smaller by this many bytes.
const DROP_BYTES: u64 = 16 * 1024 * 1024;

/// What to do in a pause.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum VacuumStep {
    Nothing,
    /// Give back this many pages.
    Free(u64),
    /// Copy the log into the file, which makes the file shorter.
    Finish,
}

/// Follows the size of the events.
pub(super) struct Vacuum {
    /// The largest size since free pages were last counted.
    peak: u64,
    bytes: u64,
    /// Whether pages were given back since.
    is_under_way: bool,
}

impl Default for Vacuum {
    /// An earlier process may have left free pages.
    fn default() -> Self {
        Self { peak: u64::MAX, bytes: 0, is_under_way: false }
    }
}

impl Vacuum {
    /// The events take this many bytes now.
    pub(super) fn on_bytes(&mut self, bytes: u64) {
        self.bytes = bytes;
        self.peak = self.peak.max(bytes);
    }

    /// Whether the free pages are worth a look.
    pub(super) fn is_due(&self) -> bool {
        self.peak - self.bytes >= DROP_BYTES
    }

    /// What to do with these pages. Contents are moved only if at least as much of the file is free: so each is moved
    /// once on average, however often the spool fills.
    pub(super) fn next(&mut self, pages: &Pages) -> VacuumStep {
        if pages.free > KEEP && pages.free * 2 >= pages.total {
            self.is_under_way = true;
            return VacuumStep::Free(SLICE.min(pages.free - KEEP));
        }
        self.peak = self.bytes;
        if std::mem::take(&mut self.is_under_way) { VacuumStep::Finish } else { VacuumStep::Nothing }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn free_pages_are_given_back_after_a_backlog() {
        let mut vacuum = Vacuum::default();
        vacuum.on_bytes(0);
        assert!(vacuum.is_due(), "an earlier process may have left some");
        assert_eq!(vacuum.next(&Pages { total: 100, free: 90 }), VacuumStep::Nothing);
        vacuum.on_bytes(40 * MIB);
        assert!(!vacuum.is_due());
        vacuum.on_bytes(25 * MIB);
        assert!(!vacuum.is_due());
        vacuum.on_bytes(20 * MIB);
        assert!(vacuum.is_due());
        assert_eq!(vacuum.next(&Pages { total: 10_000, free: 4_999 }), VacuumStep::Nothing, "most of it is in use");
        vacuum.on_bytes(4 * MIB);
        assert!(vacuum.is_due());
        assert_eq!(vacuum.next(&Pages { total: 10_000, free: 9_000 }), VacuumStep::Free(SLICE));
        assert!(vacuum.is_due());
        assert_eq!(vacuum.next(&Pages { total: 2_100, free: 2_058 }), VacuumStep::Free(10));
        assert_eq!(vacuum.next(&Pages { total: 2_090, free: 2_048 }), VacuumStep::Finish);
        assert!(!vacuum.is_due());
    }
}
