//! What operators see of reconciling: the outcome of one question, and how it goes altogether.

use std::sync::{Mutex, PoisonError};

use jiff::Timestamp;
use serde::Serialize;

use super::schedule::{Conclusion, Reason};
use crate::metrics::RECONCILED;

/// What came of comparing a subject with the API.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Outcome {
    /// No event is missing.
    InStep,
    /// The missing event was made, or would be.
    Repaired,
    /// The webhook came first.
    Late,
    /// The API knows no such subject.
    Unknown,
    /// The subject has not ended.
    Pending,
    /// There was no usable answer.
    Failed,
    /// The API refused the key.
    Refused,
}

impl Outcome {
    pub(super) fn of(conclusion: Conclusion, reason: &Reason) -> Self {
        match conclusion {
            Conclusion::Made(_) => Self::Repaired,
            Conclusion::Known => match reason {
                Reason::Overdue { .. } => Self::Late,
                Reason::Hint { .. } | Reason::Operator => Self::InStep,
            },
            Conclusion::Older => Self::InStep,
            Conclusion::Pending => Self::Pending,
            Conclusion::Unknown => Self::Unknown,
            Conclusion::KeyRefused | Conclusion::Forbidden => Self::Refused,
            Conclusion::Busy | Conclusion::Unusable | Conclusion::Undecided => Self::Failed,
        }
    }

    /// The position in [`RECONCILED`].
    pub(super) fn position(self) -> usize {
        self as usize
    }

    /// The word in metrics and for operators.
    pub(crate) fn text(self) -> &'static str {
        RECONCILED[self.position()]
    }
}

/// The outcome of an operator's question.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Report {
    pub subject: String,
    pub outcome: Outcome,
    /// The type of the missing event, if one is missing.
    pub event: Option<&'static str>,
    /// The status of the subject in the API, if it answered.
    pub state: Option<String>,
    /// The rest of the pause that the API asks for, if that is why there is no answer, in seconds.
    pub pause_seconds: Option<u64>,
    /// One sentence.
    pub text: String,
}

/// How reconciling goes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Status {
    /// Subjects that began and did not end.
    pub open: u64,
    /// Open subjects that began longer ago than `reconcile.after`.
    pub overdue: u64,
    /// Overdue subjects that the API was asked about, and that have not ended.
    pub stuck: u64,
    /// A few of those, the longest open first.
    pub stuck_subjects: Vec<String>,
    /// How long those are open at least, in seconds.
    pub stuck_after_seconds: u64,
    /// Events of the last day that the API told.
    pub by_api_last_day: u64,
    /// Since when the API has refused the key.
    pub refused_since: Option<Timestamp>,
    /// Why the API gave no usable answer, since the last usable one.
    pub failing: Option<Failing>,
}

/// A time without usable answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Failing {
    pub since: Timestamp,
    /// Why the last request had no usable answer.
    pub reason: String,
}

/// The status, which the reconciler writes and operators read.
#[derive(Default)]
pub(super) struct Shared(Mutex<Status>);

impl Shared {
    pub(super) fn get(&self) -> Status {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn change<T>(&self, change: impl FnOnce(&mut Status) -> T) -> T {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operators_and_metrics_have_the_same_words() {
        use Outcome::{Failed, InStep, Late, Pending, Refused, Repaired, Unknown};
        for (outcome, word) in [InStep, Repaired, Late, Unknown, Pending, Failed, Refused].into_iter().zip(RECONCILED) {
            assert_eq!(serde_json::to_value(outcome).unwrap(), word);
            assert_eq!(outcome.text(), word);
        }
    }
}
