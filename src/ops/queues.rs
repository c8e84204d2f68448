//! What the watch saw of the queues, as facts for the answers, with how long each queue has had no worker. Pure; takes
//! `now`.

use std::collections::HashMap;
use std::time::Instant;

use super::answers::{Queue, QueueState, Role};
use crate::publisher::{self, WatchState};
use crate::topology::QueueRole;

/// Since when messages wait in a queue without any worker.
#[derive(Debug, Default)]
pub(super) struct Unattended(HashMap<String, Instant>);

impl Unattended {
    /// The queues of the answers. To be called every few seconds, also while nobody asks.
    pub(super) fn queues(&mut self, watch: &WatchState, now: Instant) -> Vec<Queue> {
        self.0.retain(|name, _| watch.queues.iter().any(|queue| queue.name == *name));
        watch.queues.iter().map(|queue| self.queue(queue, now)).collect()
    }

    fn queue(&mut self, queue: &publisher::QueueState, now: Instant) -> Queue {
        let role = match queue.role {
            QueueRole::Work => Role::Work,
            QueueRole::Dead => Role::Dead,
            QueueRole::Unrouted => Role::Unrouted,
            // No worker takes messages out of them, so only their troubles matter.
            QueueRole::Retry | QueueRole::Archive => Role::Inner,
        };
        let state = match (&queue.trouble, queue.messages, queue.consumers) {
            (Some(trouble), ..) => QueueState::Trouble { text: trouble.text.clone(), remedy: trouble.remedy.clone() },
            (None, Some(messages), Some(consumers)) => {
                if messages == 0 || consumers > 0 {
                    self.0.remove(&queue.name);
                }
                let since = match (messages, consumers) {
                    (1.., 0) => *self.0.entry(queue.name.clone()).or_insert(now),
                    _ => now,
                };
                let unattended = now.saturating_duration_since(since);
                QueueState::Counted { messages: messages.into(), consumers: consumers.into(), unattended }
            }
            // Not known: the time goes on, because a worker may or may not be there.
            (None, ..) => QueueState::Unknown,
        };
        Queue { name: queue.name.clone(), role, state }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_time_without_a_worker_begins_when_a_message_waits_and_ends_with_a_worker() {
        let (mut unattended, start) = (Unattended::default(), Instant::now());
        let mut look = |second: u64, counts: Option<(u32, u32)>| {
            let queue = publisher::QueueState {
                name: "prism.scan".to_owned(),
                role: QueueRole::Work,
                messages: counts.map(|(messages, _)| messages),
                consumers: counts.map(|(_, consumers)| consumers),
                trouble: None,
            };
            let watch = WatchState { queues: vec![queue], ..WatchState::default() };
            match unattended.queues(&watch, start + Duration::from_secs(second)).remove(0).state {
                QueueState::Counted { unattended, .. } => Some(unattended.as_secs()),
                QueueState::Unknown | QueueState::Trouble { .. } => None,
            }
        };
        assert_eq!(look(0, Some((0, 0))), Some(0));
        assert_eq!(look(100, Some((0, 0))), Some(0), "nothing waits");
        assert_eq!(look(115, Some((5, 0))), Some(0));
        assert_eq!(look(130, None), None);
        assert_eq!(look(145, Some((5, 0))), Some(30));
        assert_eq!(look(160, Some((5, 1))), Some(0));
        assert_eq!(look(175, Some((5, 0))), Some(0));
    }
}
