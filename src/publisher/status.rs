//! The state of the connection and the latest deliveries, for the operators' pages. Bounded; lost with the process.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use serde::Serialize;
use tokio::sync::Notify;

use super::lags::Lags;
use crate::broker::BrokerUrl;
use crate::topology::{QueueRole, TroubleKind};

/// How many connection events are kept.
const TIMELINE_MAX: usize = 100;
/// How many confirmed events are kept.
const CONFIRMS_MAX: usize = 1000;
/// After so many intervals without a further look, what it found is not known any more.
const LOOKS_MISSED_MAX: u32 = 3;

/// The publisher's state: written by the publisher, read by the operators' listener.
pub struct Status {
    state: Mutex<BrokerState>,
    timeline: Mutex<VecDeque<ConnectionEvent>>,
    deliveries: Mutex<Deliveries>,
    in_flight: AtomicUsize,
    waiting: AtomicU64,
    retry_requested: AtomicBool,
    watched: Mutex<Watched>,
    nacked: AtomicBool,
    look_requested: Notify,
}

/// The last look at the broker, and how long it is valid.
struct Watched {
    state: WatchState,
    valid_until: Instant,
}

/// What the relay knows about the queues, exchanges and bindings on the broker, as `/api/status` shows it.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct WatchState {
    /// When the last look was complete.
    pub looked_at: Option<Timestamp>,
    /// Why the relay does not look.
    pub off: Option<String>,
    /// Exchanges, queues and bindings that do not exist.
    pub missing: Vec<String>,
    /// Whether missing bindings are known: only the management API shows them.
    pub bindings_checked: bool,
    /// The queues of the configuration, with those for retries, dead letters and unrouted events.
    pub queues: Vec<QueueState>,
}

/// What the relay knows about a queue.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct QueueState {
    /// Its name on the broker.
    pub name: String,
    /// What it is for.
    pub role: QueueRole,
    /// Messages that are ready for a consumer; `None`: not known.
    pub messages: Option<u32>,
    /// Connected consumers; `None`: not known.
    pub consumers: Option<u32>,
    /// Why the queue cannot take messages.
    pub trouble: Option<QueueTrouble>,
}

/// Why a queue cannot take messages, and what to do.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct QueueTrouble {
    /// The kind of trouble.
    pub kind: TroubleKind,
    /// Completes the sentence "the queue ...".
    pub text: String,
    /// Steps for an operator, one a line.
    pub remedy: String,
}

/// A snapshot, as `/api/status` shows it.
#[derive(Clone, Debug, Serialize)]
pub struct BrokerState {
    /// Whether there is a connection, blocked or not.
    pub connected: bool,
    /// The broker's reason for blocking publishers (a memory or disk alarm).
    pub blocked: Option<String>,
    /// The broker's URL without the password.
    pub url: Option<String>,
    /// Why there is no connection.
    pub error: Option<String>,
    /// Whether there is no connection because no broker answers, and not because one refuses something.
    #[serde(skip)]
    pub unreachable: bool,
    /// When the connection was opened or lost, or when the broker last blocked or unblocked publishers.
    pub since: Timestamp,
    /// Number of connections made since the relay started.
    pub connects: u64,
}

/// A change of the connection's state.
#[derive(Clone, Debug, Serialize)]
pub struct ConnectionEvent {
    /// When the state changed.
    pub at: Timestamp,
    /// How the state changed.
    pub what: ConnectionEventKind,
    /// The URL of a new connection, or the reason for a loss or a block.
    pub detail: String,
}

/// How the connection's state changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ConnectionEventKind {
    /// A connection was made.
    Connected,
    /// The connection ended.
    Lost,
    /// The broker blocks publishers.
    Blocked,
    /// The broker takes messages again.
    Unblocked,
}

/// Whether a connection is the first one of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Connect {
    First,
    Again,
}

#[derive(Default)]
struct Deliveries {
    /// The last confirmed events by sequence number, with the time of the confirm; the newest last.
    confirms: VecDeque<(u64, Timestamp)>,
    last: Option<Timestamp>,
    /// The first fault since the last confirm.
    failing_since: Option<Timestamp>,
    lags: Lags,
}

impl Status {
    pub(crate) fn new() -> Self {
        let state = BrokerState {
            connected: false,
            blocked: None,
            url: None,
            error: None,
            unreachable: false,
            since: Timestamp::now(),
            connects: 0,
        };
        Self {
            state: Mutex::new(state),
            timeline: Mutex::default(),
            deliveries: Mutex::default(),
            in_flight: AtomicUsize::new(0),
            waiting: AtomicU64::new(0),
            retry_requested: AtomicBool::new(false),
            watched: Mutex::new(Watched { state: WatchState::default(), valid_until: Instant::now() }),
            nacked: AtomicBool::new(false),
            look_requested: Notify::new(),
        }
    }

    /// The last look at the broker, without what may have changed since.
    pub fn watch(&self) -> WatchState {
        let watched = locked(&self.watched);
        let mut state = watched.state.clone();
        if watched.valid_until < Instant::now() {
            for queue in &mut state.queues {
                (queue.messages, queue.consumers, queue.trouble) = (None, None, None);
            }
        }
        state
    }

    /// Stores a look. `interval`: when the next one is due.
    pub(crate) fn on_look(&self, state: WatchState, interval: Duration) {
        let valid_until = Instant::now() + interval * LOOKS_MISSED_MAX;
        *locked(&self.watched) = Watched { state, valid_until };
    }

    /// The broker rejected a publish, or did not confirm it in time: the watch looks for a queue that cannot take
    /// messages.
    pub(super) fn on_nack(&self) {
        self.nacked.store(true, Ordering::Relaxed);
        self.note_fault();
        self.request_look();
    }

    /// Whether [`Self::on_nack`] was called since the last call of this.
    pub(super) fn take_nacked(&self) -> bool {
        self.nacked.swap(false, Ordering::Relaxed)
    }

    /// Whether [`Self::on_nack`] was called since the last call of [`Self::take_nacked`].
    pub(super) fn was_nacked(&self) -> bool {
        self.nacked.load(Ordering::Relaxed)
    }

    /// Requests an early look at queues, exchanges and bindings.
    pub(super) fn request_look(&self) {
        self.look_requested.notify_one();
    }

    /// Returns when a look was requested.
    pub(super) async fn look_requested(&self) {
        self.look_requested.notified().await;
    }

    /// The state of the connection now.
    pub fn snapshot(&self) -> BrokerState {
        locked(&self.state).clone()
    }

    /// The latest connection events, the newest first.
    pub fn timeline(&self) -> Vec<ConnectionEvent> {
        locked(&self.timeline).iter().rev().cloned().collect()
    }

    /// How many publishes have no outcome yet.
    pub fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// How many pending events wait behind a parked event of their subject.
    pub fn waiting(&self) -> u64 {
        self.waiting.load(Ordering::Relaxed)
    }

    /// When the last event was confirmed.
    pub fn last_confirm(&self) -> Option<Timestamp> {
        locked(&self.deliveries).last
    }

    /// When deliveries began to fail: the first loss or block of the connection, rejected publish or missing confirm
    /// since the last confirm. A new connection alone ends nothing.
    pub fn failing_since(&self) -> Option<Timestamp> {
        locked(&self.deliveries).failing_since
    }

    /// The last confirmed events by sequence number, with the time of the confirm.
    pub fn confirms(&self) -> Vec<(u64, Timestamp)> {
        locked(&self.deliveries).confirms.iter().copied().collect()
    }

    /// The lags of the events confirmed since the last call.
    pub fn take_lags(&self) -> Lags {
        std::mem::take(&mut locked(&self.deliveries).lags)
    }

    /// Requests an early check for parked events that are due for a retry.
    pub fn retry_parked(&self) {
        self.retry_requested.store(true, Ordering::Relaxed);
    }

    /// Whether a check was requested since the last call.
    pub(super) fn take_retry_request(&self) -> bool {
        self.retry_requested.swap(false, Ordering::Relaxed)
    }

    /// Events confirmed and not returned, by sequence number and lag.
    pub(super) fn on_delivered(&self, events: impl Iterator<Item = (u64, Duration)>) {
        let now = Timestamp::now();
        let mut deliveries = locked(&self.deliveries);
        for (seq, lag) in events {
            if deliveries.confirms.len() == CONFIRMS_MAX {
                deliveries.confirms.pop_front();
            }
            deliveries.confirms.push_back((seq, now));
            deliveries.last = Some(now);
            deliveries.failing_since = None;
            deliveries.lags.add(lag);
        }
    }

    pub(super) fn on_connected(&self, url: &BrokerUrl) -> Connect {
        let mut state = locked(&self.state);
        state.connects += 1;
        let connects = state.connects;
        *state = BrokerState {
            connected: true,
            blocked: None,
            url: Some(url.to_string()),
            error: None,
            unreachable: false,
            since: Timestamp::now(),
            connects,
        };
        self.record(ConnectionEventKind::Connected, url.to_string());
        if connects == 1 { Connect::First } else { Connect::Again }
    }

    /// `unreachable`: no broker answers.
    pub(super) fn on_disconnected(&self, error: String, unreachable: bool) {
        let mut state = locked(&self.state);
        if state.connected {
            state.since = Timestamp::now();
            self.record(ConnectionEventKind::Lost, error.clone());
        }
        state.connected = false;
        state.blocked = None;
        state.error = Some(error);
        state.unreachable = unreachable;
        self.note_fault();
        self.set_in_flight(0);
    }

    /// The broker blocks publishers for this reason, or no longer blocks them.
    pub(super) fn on_blocked(&self, reason: Option<String>) {
        let mut state = locked(&self.state);
        match &reason {
            Some(reason) => {
                self.note_fault();
                self.record(ConnectionEventKind::Blocked, reason.clone());
            }
            None => self.record(ConnectionEventKind::Unblocked, String::new()),
        }
        state.blocked = reason;
        state.since = Timestamp::now();
    }

    pub(super) fn set_in_flight(&self, count: usize) {
        self.in_flight.store(count, Ordering::Relaxed);
    }

    pub(super) fn set_waiting(&self, count: u64) {
        self.waiting.store(count, Ordering::Relaxed);
    }

    fn note_fault(&self) {
        locked(&self.deliveries).failing_since.get_or_insert_with(Timestamp::now);
    }

    fn record(&self, what: ConnectionEventKind, detail: String) {
        let mut timeline = locked(&self.timeline);
        if timeline.len() == TIMELINE_MAX {
            timeline.pop_front();
        }
        timeline.push_back(ConnectionEvent { at: Timestamp::now(), what, detail });
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deliveries_fail_from_the_first_fault_until_a_confirm() {
        let url = BrokerUrl::parse("amqp://broker").unwrap();
        let faults: [fn(&Status); 3] = [
            |status| status.on_nack(),
            |status| status.on_disconnected("access refused (403)".to_owned(), false),
            |status| status.on_blocked(Some("low on memory".to_owned())),
        ];
        for first in faults {
            let status = Status::new();
            status.on_connected(&url);
            assert_eq!(status.failing_since(), None);
            first(&status);
            let since = status.failing_since();
            assert!(since.is_some());
            for again in faults {
                status.on_connected(&url);
                status.on_delivered(std::iter::empty());
                again(&status);
                assert_eq!(status.failing_since(), since, "neither a connection nor a later fault begins it again");
            }
            status.on_delivered([(1, Duration::ZERO)].into_iter());
            assert_eq!(status.failing_since(), None);
        }
    }
}
