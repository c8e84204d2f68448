//! Decides from what is seen on the broker what a worker did with each message. Pure.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::Value;

use super::cases::{Case, Settle};

/// What a worker did with a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Seen {
    Ack,
    Reject,
    /// It came back to the queue until the delivery limit was reached: the worker died, or requeued it.
    ReturnedTooOften,
    /// It is in the queue at the end.
    NotTaken,
    /// Neither rejected nor in the queue, and not all such messages were acknowledged.
    NotSettled,
}

impl Seen {
    pub(super) fn is(self, expected: Settle) -> bool {
        match expected {
            Settle::Ack => self == Self::Ack,
            Settle::Reject => self == Self::Reject,
            Settle::Any => matches!(self, Self::Ack | Self::Reject),
        }
    }

    /// What is wrong, for somebody who sees no more than this line.
    pub(super) fn complaint(self, case: &Case) -> &str {
        match self {
            Self::Ack | Self::Reject => &case.why,
            Self::ReturnedTooOften => "the worker died on it, or put it back with requeue=true, again and again",
            Self::NotTaken => "still in the queue at the end of --wait",
            Self::NotSettled => "taken, but this one or another was not acknowledged within --wait",
        }
    }

    pub(super) fn text(self) -> &'static str {
        match self {
            Self::Ack => "ack",
            Self::Reject => "reject",
            Self::ReturnedTooOften => "returned too often",
            Self::NotTaken => "not taken",
            Self::NotSettled => "not settled",
        }
    }
}

/// Decides what became of each case. `rejected` and `left` are by the name of the case.
pub(super) fn judge(
    cases: &[Case],
    rejected: &BTreeMap<String, Seen>,
    left: &BTreeMap<String, Seen>,
    acks: usize,
) -> Vec<Seen> {
    let gone = cases.iter().filter(|case| !rejected.contains_key(&case.name) && !left.contains_key(&case.name));
    let rest = if gone.count() <= acks { Seen::Ack } else { Seen::NotSettled };
    let seen = |case: &Case| rejected.get(&case.name).or_else(|| left.get(&case.name)).copied().unwrap_or(rest);
    cases.iter().map(seen).collect()
}

/// What the management API has counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counted {
    pub(super) acks: usize,
    /// Deliveries to a consumer that does not acknowledge.
    pub(super) without_ack: usize,
    /// Whether the broker counts at all: statistics can be switched off.
    pub(super) counts: bool,
}

impl Counted {
    pub(super) fn of(queue: &Value) -> Self {
        let count = |name: &str| queue["message_stats"][name].as_u64().and_then(|count| usize::try_from(count).ok());
        let without_ack = count("deliver_no_ack").unwrap_or(0) + count("get_no_ack").unwrap_or(0);
        Self { acks: count("ack").unwrap_or(0), without_ack, counts: queue["message_stats"].is_object() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use super::super::cases::cases;
    use serde_json::json;

    #[test]
    fn a_message_is_acknowledged_only_if_all_that_are_gone_are() {
        let cases: Vec<Case> = cases().unwrap().into_iter().take(4).collect();
        let of = |index: usize, seen| BTreeMap::from([(cases[index].name.clone(), seen)]);
        let (rejected, left) = (of(1, Seen::Reject), of(2, Seen::NotTaken));
        let all = [Seen::Ack, Seen::Reject, Seen::NotTaken, Seen::Ack];
        assert_eq!(judge(&cases, &rejected, &left, 2), all);
        let some = [Seen::NotSettled, Seen::Reject, Seen::NotTaken, Seen::NotSettled];
        assert_eq!(judge(&cases, &rejected, &left, 1), some);
        for (expected, right) in [
            (Settle::Ack, vec![Seen::Ack]),
            (Settle::Reject, vec![Seen::Reject]),
            (Settle::Any, vec![Seen::Ack, Seen::Reject]),
        ] {
            let every = [Seen::Ack, Seen::Reject, Seen::ReturnedTooOften, Seen::NotTaken, Seen::NotSettled];
            assert_eq!(every.into_iter().filter(|seen| seen.is(expected)).collect::<Vec<_>>(), right);
        }
    }

    #[test]
    fn acks_are_counted_by_the_management_api() {
        let queue = json!({ "messages": 3, "message_stats": { "ack": 5, "deliver": 9, "deliver_no_ack": 1 } });
        assert_eq!(Counted::of(&queue), Counted { acks: 5, without_ack: 1, counts: true });
        assert_eq!(Counted::of(&json!({ "name": "q" })), Counted::default());
    }
}
