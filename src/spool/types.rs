//! What goes into the spool and comes out of it.

use uuid::Uuid;

use crate::event::Event;

/// Bytes that an event counts for in `spool.max_bytes` in addition to its body: its row, its share of the dedupe
/// window, and the space that SQLite leaves between rows.
pub const EVENT_OVERHEAD_BYTES: u64 = 256;

/// Bytes that an event with this body counts for in `spool.max_bytes`.
pub(super) fn cost(body: &[u8]) -> u64 {
    body.len() as u64 + EVENT_OVERHEAD_BYTES
}

/// The answer to an accepted event: it is on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Receipt {
    /// The event's number in the order of acceptance; for a re-send, the number of the first one.
    pub seq: u64,
    /// The event's id; for a re-send, the id of the first one.
    pub id: Uuid,
    /// Whether this is a re-send, which is not stored again.
    pub duplicate: bool,
}

impl Receipt {
    /// For an event of Prism's API that tells what is known: nothing was stored, and it is not known which event told
    /// it first.
    pub(super) fn of_known(event: &Event) -> Self {
        Self { seq: 0, id: event.id, duplicate: true }
    }
}

/// The answer to an event of Prism's API.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MadeReceipt {
    /// It is on disk, and will be published.
    Stored(Receipt),
    /// A webhook, or an earlier answer of the API, told the same meanwhile: nothing was stored.
    Known,
}

/// An event as the publisher gets it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// Its number in the order of acceptance.
    pub seq: u64,
    /// The event as it was accepted.
    pub event: Event,
}

/// Some of the requested events, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// The events, in the requested order.
    pub events: Vec<Stored>,
    /// Whether the spool may hold more events behind these.
    pub more: bool,
}

/// Some of the pending events, in the order of acceptance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PendingBatch {
    /// The events that may be delivered.
    pub events: Vec<Stored>,
    /// The numbers of the events in between that wait behind a parked event of their subject.
    pub waiting: Vec<u64>,
    /// The last event read, to go on from.
    pub last: u64,
    /// Whether the spool may hold more events behind these.
    pub more: bool,
    /// How many events had been removed when these were read. After a change, events read before may be gone, or no
    /// longer wait.
    pub removed: u64,
}

/// What became of a published event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Settlement {
    /// The broker has it, in at least one queue: it leaves the spool.
    Confirmed(u64),
    /// The broker does not take it: it stays, is counted apart, and is retried slowly.
    Parked {
        /// The number of the event.
        seq: u64,
        /// Why the broker does not take it, for the operators.
        reason: String,
    },
    /// A parked event is about to be retried.
    Tried(u64),
}

/// An event that is still in the spool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Undelivered {
    /// Its number in the order of acceptance.
    pub seq: u64,
    /// Whether it is parked; else it is pending.
    pub parked: bool,
    /// The parked event of its subject that it waits behind, if there is one.
    pub waits_behind: Option<Uuid>,
}
