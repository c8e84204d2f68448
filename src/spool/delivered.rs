//! Confirmed events whose deletion is not committed yet. They are left out of every read, so that no session of the
//! publisher publishes them again, however long the disk takes no writes.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

/// The numbers of the events, shared between the publisher, which adds them, and the writer, which deletes the events.
#[derive(Debug, Default)]
pub(super) struct Delivered(Mutex<Runs>);

impl Delivered {
    /// Adds events. Adding one again changes nothing.
    pub(super) fn add(&self, mut seqs: Vec<u64>) {
        seqs.sort_unstable();
        let mut runs = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for run in seqs.chunk_by(|before, after| after - before <= 1) {
            runs.insert(run[0], run[run.len() - 1]);
        }
    }

    /// Takes out events whose deletion was committed.
    pub(super) fn remove(&self, deleted: &Runs) {
        let mut runs = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for (first, last) in deleted.iter() {
            runs.remove(first, last);
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }

    /// The first runs of them.
    pub(super) fn first(&self, runs: usize) -> Runs {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Runs(all.0.iter().take(runs).map(|(first, last)| (*first, *last)).collect())
    }

    /// The events now. To leave them out of a read, take them before it begins: a later read may still see an event
    /// that has left this set.
    pub(super) fn runs(&self) -> Runs {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Numbers as runs without gaps, the first of each with its last: events are confirmed in long runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Runs(BTreeMap<u64, u64>);

impl Runs {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, u64)> {
        self.0.iter().map(|(first, last)| (*first, *last))
    }

    /// The last number of the run that contains this one.
    pub(super) fn end_of(&self, seq: u64) -> Option<u64> {
        let (_, last) = self.0.range(..=seq).next_back()?;
        (*last >= seq).then_some(*last)
    }

    pub(super) fn insert(&mut self, mut first: u64, mut last: u64) {
        // Runs that overlap or touch this one become part of it.
        while let Some((&begin, &end)) = self.0.range(..=last.saturating_add(1)).next_back()
            && end.saturating_add(1) >= first
        {
            self.0.remove(&begin);
            (first, last) = (first.min(begin), last.max(end));
        }
        self.0.insert(first, last);
    }

    fn remove(&mut self, first: u64, last: u64) {
        while let Some((&begin, &end)) = self.0.range(..=last).next_back()
            && end >= first
        {
            self.0.remove(&begin);
            if end > last {
                self.0.insert(last + 1, end);
            }
            if begin < first {
                self.0.insert(begin, first - 1);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn runs_hold_the_same_numbers_as_a_set(
            steps in proptest::collection::vec((any::<bool>(), 0..60u64, 0..9u64), 0..60),
        ) {
            let (mut runs, mut set) = (Runs::default(), BTreeSet::new());
            for (is_added, first, length) in steps {
                let range = first..=first + length;
                if is_added {
                    runs.insert(first, first + length);
                    set.extend(range);
                } else {
                    runs.remove(first, first + length);
                    set.retain(|number| !range.contains(number));
                }
            }
            let listed: Vec<u64> = runs.iter().flat_map(|(first, last)| first..=last).collect();
            prop_assert_eq!(&listed, &set.iter().copied().collect::<Vec<_>>());
            for number in 0..80 {
                let end = runs.end_of(number);
                prop_assert_eq!(end.is_some(), set.contains(&number));
                prop_assert!(end.is_none_or(|end| (number..=end).all(|number| set.contains(&number))));
                prop_assert!(end.is_none_or(|end| !set.contains(&(end + 1))), "runs are as long as possible");
            }
        }
    }

    #[test]
    fn confirmed_again_and_again_takes_no_more_room() {
        let delivered = Delivered::default();
        for _ in 0..5 {
            delivered.add((1..=500).rev().collect());
        }
        assert_eq!(delivered.runs().iter().collect::<Vec<_>>(), [(1, 500)]);
        // More was confirmed while the first of them were deleted.
        let deleted = delivered.runs();
        delivered.add(vec![501, 502, 700]);
        delivered.remove(&deleted);
        assert_eq!(delivered.runs().iter().collect::<Vec<_>>(), [(501, 502), (700, 700)]);
    }
}
