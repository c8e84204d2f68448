//! Logs parked events: one line for each cause in a minute, with their number, because there may be 100,000 of them.

use std::time::Instant;

use tracing::{error, warn};
use uuid::Uuid;

use crate::log_limiter::LogLimiter;

/// Why an event is parked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cause {
    /// No queue is bound for it.
    Returned,
    /// The broker does not take the message.
    Refused,
    /// The body changed on the disk.
    Damaged,
}

impl Cause {
    const ALL: [Self; 3] = [Self::Returned, Self::Refused, Self::Damaged];

    /// The cause in one word.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Returned => "returned",
            Self::Refused => "refused",
            Self::Damaged => "damaged",
        }
    }

    fn log(self, count: u64, example: &str, reason: &str) {
        match self {
            Self::Returned => warn!(
                count,
                example,
                reason,
                "parked events that no queue takes: they stay on disk and are retried; bind a queue for them"
            ),
            Self::Refused => warn!(
                count,
                example,
                reason,
                "parked events that the broker refuses: they stay on disk and are retried; fix what the reason names"
            ),
            Self::Damaged => error!(
                count,
                example,
                reason,
                "parked events whose body changed on the disk: they are not delivered; the disk may be failing"
            ),
        }
    }
}

/// What was logged when.
#[derive(Debug, Default)]
pub(super) struct ParkingLog(LogLimiter);

impl ParkingLog {
    /// `count` events were parked, one of which is `example`.
    pub(super) fn parked(&self, cause: Cause, count: u64, example: Uuid, reason: &str) {
        if let Some(count) = self.0.add(cause.name(), count, Instant::now()) {
            cause.log(count, &example.to_string(), reason);
        }
    }

    /// Logs what was parked within the minute after the last line.
    pub(super) fn report_rest(&self) {
        for cause in Cause::ALL {
            if let Some(count) = self.0.add(cause.name(), 0, Instant::now()) {
                cause.log(count, "see prism-relay spool list --parked", "as before, or see the list");
            }
        }
    }
}
