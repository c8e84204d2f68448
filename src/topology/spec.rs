//! The section `[topology]` of the configuration: which queues there should be, and what the relay may do about them.

use std::time::Duration;

/// The name of the archive, unless the configuration has another one.
pub(crate) const ARCHIVE: &str = "prism.archive";

#[derive(Clone, Debug)]
pub struct Spec {
    pub declare: Declare,
    pub queues: Vec<QueueSpec>,
    pub archive: Option<ArchiveSpec>,
}

/// What the relay does about the topology when it connects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Declare {
    /// It creates what is missing.
    Active,
    /// It checks that everything exists.
    Passive,
    /// It neither creates nor checks anything.
    Off,
}

/// A work queue, with everything that it needs on the broker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueueSpec {
    pub name: String,
    /// Topic patterns; at least one.
    pub bindings: Vec<String>,
    /// How often a message may return to the queue before it becomes a dead letter.
    pub delivery_limit: u32,
    /// How long a rejected message waits before each further attempt; after the last one it becomes a dead letter.
    pub retry_delays: Vec<Duration>,
    /// Whether one worker at a time gets the messages. `partitions` implies it.
    pub single_active_consumer: bool,
    /// Number of partitions; at least two.
    pub partitions: Option<usize>,
    /// Maximum number of messages in the queue, or in each partition; the relay keeps the others on disk.
    pub max_length: Option<usize>,
    /// How long a message may wait for a worker before it becomes a dead letter.
    pub ttl: Option<Duration>,
}

/// A stream of all events, for `replay`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ArchiveSpec {
    pub name: String,
    pub max_age: Duration,
    pub max_bytes: Option<u64>,
}

#[cfg(test)]
impl Spec {
    /// One queue, `q`, bound by `a.#`, which `change` may change.
    pub(crate) fn of_queue(change: impl FnOnce(&mut QueueSpec)) -> Self {
        let mut queue = QueueSpec {
            name: "q".to_owned(),
            bindings: vec!["a.#".to_owned()],
            delivery_limit: 20,
            retry_delays: Vec::new(),
            single_active_consumer: false,
            partitions: None,
            max_length: None,
            ttl: None,
        };
        change(&mut queue);
        Self { declare: Declare::Active, queues: vec![queue], archive: None }
    }
}
