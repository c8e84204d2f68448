//! One record of the history: sums over some time, as a point of the charts and as bytes of a file. Counts only. Pure.

use serde::{Serialize, Serializer};
use sha2::{Digest, Sha256};

/// The time of a record in the file.
pub(super) const RECORD_SECONDS: i64 = 30;
/// A day.
pub(super) const RECORDS_MAX: usize = 2880;
/// Size of a record in the file: eleven numbers and a checksum.
pub(super) const RECORD_BYTES: usize = 11 * 8 + 8;

/// Stands for a number that is not known.
const UNKNOWN: u64 = u64::MAX;

/// What happened within some time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Record {
    /// The end, in seconds since 1970.
    pub at: i64,
    /// The time that was measured.
    pub milliseconds: u64,
    pub accepted: u64,
    pub refused: u64,
    pub confirmed: u64,
    /// Pending events, at most.
    pub depth: u64,
    pub lag_p50_ms: Option<u64>,
    pub lag_p99_ms: Option<u64>,
    pub queued: Option<u64>,
    pub dead: Option<u64>,
    pub marks: Marks,
}

/// What happened to the relay. Serialised as a list of words.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Marks {
    /// The relay was started.
    pub started: bool,
    /// The connection to RabbitMQ was lost.
    pub lost: bool,
    /// RabbitMQ blocked the connection.
    pub blocked: bool,
}

impl Marks {
    fn bits(self) -> u64 {
        u64::from(self.started) | u64::from(self.lost) << 1 | u64::from(self.blocked) << 2
    }

    fn of_bits(bits: u64) -> Self {
        Self { started: bits & 1 != 0, lost: bits & 2 != 0, blocked: bits & 4 != 0 }
    }
}

impl Serialize for Marks {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let words = [(self.started, "started"), (self.lost, "lost"), (self.blocked, "blocked")];
        serializer.collect_seq(words.into_iter().filter(|(is_set, _)| *is_set).map(|(_, word)| word))
    }
}

/// One point of each chart. Rates are per second.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Point {
    /// Seconds since 1970.
    pub at: i64,
    pub accepted: f64,
    pub refused: f64,
    pub confirmed: f64,
    /// Pending events.
    pub depth: u64,
    /// Time from acceptance to confirm, for events confirmed since the previous point: the median.
    pub lag_p50_ms: Option<u64>,
    /// Time from acceptance to confirm, for events confirmed since the previous point: 99 of 100 took at most this.
    pub lag_p99_ms: Option<u64>,
    /// Messages in the queues of workers.
    pub queued: Option<u64>,
    /// Dead letters and unrouted events.
    pub dead: Option<u64>,
    pub marks: Marks,
}

impl Record {
    /// The number of the interval that the record belongs to.
    pub(super) fn slot(&self, interval_seconds: i64) -> i64 {
        // A point at a full minute belongs to the time before it.
        (self.at - 1).div_euclid(interval_seconds)
    }

    /// This record and a later one as one. Depths are the highest, so that a short backlog shows in a long range; the
    /// median is the mean of both, weighted by events, and the 99th percentile is at most the larger one.
    pub(super) fn merged(&self, later: &Self) -> Self {
        let median = match (self.lag_p50_ms, later.lag_p50_ms) {
            (Some(a), Some(b)) => {
                let (a, b) = (a as f64 * self.confirmed.max(1) as f64, b as f64 * later.confirmed.max(1) as f64);
                Some(((a + b) / (self.confirmed.max(1) + later.confirmed.max(1)) as f64).round() as u64)
            }
            (a, b) => a.or(b),
        };
        Self {
            at: later.at,
            milliseconds: self.milliseconds.saturating_add(later.milliseconds),
            accepted: self.accepted.saturating_add(later.accepted),
            refused: self.refused.saturating_add(later.refused),
            confirmed: self.confirmed.saturating_add(later.confirmed),
            depth: self.depth.max(later.depth),
            lag_p50_ms: median,
            lag_p99_ms: self.lag_p99_ms.max(later.lag_p99_ms),
            queued: self.queued.max(later.queued),
            dead: self.dead.max(later.dead),
            marks: Marks::of_bits(self.marks.bits() | later.marks.bits()),
        }
    }

    pub(super) fn point(&self) -> Point {
        let seconds = self.milliseconds.max(1) as f64 / 1000.0;
        let rate = |count: u64| count as f64 / seconds;
        Point {
            at: self.at,
            accepted: rate(self.accepted),
            refused: rate(self.refused),
            confirmed: rate(self.confirmed),
            depth: self.depth,
            lag_p50_ms: self.lag_p50_ms,
            lag_p99_ms: self.lag_p99_ms,
            queued: self.queued,
            dead: self.dead,
            marks: self.marks,
        }
    }

    pub(super) fn to_bytes(&self) -> [u8; RECORD_BYTES] {
        let known = |number: Option<u64>| number.unwrap_or(UNKNOWN);
        let numbers = [
            self.at.cast_unsigned(),
            self.milliseconds,
            self.accepted,
            self.refused,
            self.confirmed,
            self.depth,
            known(self.lag_p50_ms),
            known(self.lag_p99_ms),
            known(self.queued),
            known(self.dead),
            self.marks.bits(),
        ];
        let mut bytes = [0; RECORD_BYTES];
        for (place, number) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(numbers) {
            *place = number.to_le_bytes();
        }
        let (content, sum) = bytes.split_at_mut(RECORD_BYTES - 8);
        sum.copy_from_slice(&checksum(content));
        bytes
    }

    /// `None` if the bytes are not a record, or only a part of one.
    pub(super) fn of_bytes(bytes: &[u8; RECORD_BYTES]) -> Option<Self> {
        let (content, sum) = bytes.split_at(RECORD_BYTES - 8);
        if sum != checksum(content) {
            return None;
        }
        let number = |place: usize| u64::from_le_bytes(bytes.as_chunks::<8>().0[place]);
        let known = |place: usize| Some(number(place)).filter(|number| *number != UNKNOWN);
        Some(Self {
            at: number(0).cast_signed(),
            milliseconds: number(1),
            accepted: number(2),
            refused: number(3),
            confirmed: number(4),
            depth: number(5),
            lag_p50_ms: known(6),
            lag_p99_ms: known(7),
            queued: known(8),
            dead: known(9),
            marks: Marks::of_bits(number(10)),
        })
    }
}

/// The first eight bytes of the SHA-256.
fn checksum(content: &[u8]) -> [u8; 8] {
    Sha256::digest(content).first_chunk().copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Record {
        Record {
            at: 1_764_376_200,
            milliseconds: 5000,
            accepted: 10,
            confirmed: 5,
            depth: 7,
            lag_p50_ms: Some(4),
            lag_p99_ms: Some(90),
            queued: Some(3),
            marks: Marks { lost: true, ..Marks::default() },
            ..Record::default()
        }
    }

    #[test]
    fn a_record_is_read_as_it_was_written_and_a_damaged_one_not_at_all() {
        let bytes = record().to_bytes();
        assert_eq!(Record::of_bytes(&bytes), Some(record()));
        for place in 0..RECORD_BYTES {
            let mut damaged = bytes;
            damaged[place] ^= 1;
            assert_eq!(Record::of_bytes(&damaged), None, "{place}");
        }
        assert_eq!(Record::of_bytes(&[0; RECORD_BYTES]), None, "never written");
    }

    #[test]
    fn merged_records_keep_sums_peaks_and_marks() {
        let later = Record {
            at: record().at + 5,
            milliseconds: 15_000,
            confirmed: 15,
            depth: 2,
            lag_p50_ms: Some(8),
            dead: Some(1),
            marks: Marks { started: true, ..Marks::default() },
            ..Record::default()
        };
        let merged = record().merged(&later);
        let Point { accepted, confirmed, depth, lag_p50_ms, lag_p99_ms, queued, dead, .. } = merged.point();
        assert_eq!((merged.at, accepted, confirmed, depth), (record().at + 5, 0.5, 1.0, 7));
        assert_eq!((lag_p50_ms, lag_p99_ms, queued, dead), (Some(7), Some(90), Some(3), Some(1)));
        assert_eq!(serde_json::to_value(merged.marks).unwrap(), serde_json::json!(["started", "lost"]));
    }
}
