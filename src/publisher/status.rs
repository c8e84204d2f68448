//! What the operators' pages tell about the broker and the deliveries. Bounded; gone with the process.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use serde::Serialize;

use super::lags::Lags;
use crate::broker::BrokerUrl;

/// Turns of the connection that are remembered.
const TIMELINE_MAX: usize = 100;
/// Confirmed events that are remembered.
const CONFIRMS_MAX: usize = 1000;

/// Written by the publisher, read by anyone.
pub struct Status {
    state: Mutex<BrokerState>,
    timeline: Mutex<VecDeque<Turn>>,
    deliveries: Mutex<Deliveries>,
    in_flight: AtomicUsize,
    retry_parked: AtomicBool,
}

/// A snapshot, as `/api/status` shows it.
#[derive(Clone, Debug, Serialize)]
pub struct BrokerState {
    pub connected: bool,
    /// The broker's reason for taking no publishes at the moment (memory or disk alarm).
    pub blocked: Option<String>,
    /// Without the password.
    pub url: Option<String>,
    /// Why there is no connection.
    pub error: Option<String>,
    /// Since when it has been like this.
    pub since: Timestamp,
    /// Connections so far.
    pub connects: u64,
}

/// A turn of the connection.
#[derive(Clone, Debug, Serialize)]
pub struct Turn {
    pub at: Timestamp,
    pub what: TurnKind,
    pub detail: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum TurnKind {
    Connected,
    Lost,
    Blocked,
    Unblocked,
}

#[derive(Default)]
struct Deliveries {
    /// The last events that were confirmed, with the time, the newest last.
    confirms: VecDeque<(u64, Timestamp)>,
    last: Option<Timestamp>,
    lags: Lags,
}

impl Status {
    pub(super) fn new() -> Self {
        let state = BrokerState {
            connected: false,
            blocked: None,
            url: None,
            error: None,
            since: Timestamp::now(),
            connects: 0,
        };
        Self {
            state: Mutex::new(state),
            timeline: Mutex::default(),
            deliveries: Mutex::default(),
            in_flight: AtomicUsize::new(0),
            retry_parked: AtomicBool::new(false),
        }
    }

    pub fn snapshot(&self) -> BrokerState {
        locked(&self.state).clone()
    }

    /// The newest first.
    pub fn timeline(&self) -> Vec<Turn> {
        locked(&self.timeline).iter().rev().cloned().collect()
    }

    /// Publishes without a confirm at the moment.
    pub fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// When the last event was confirmed.
    pub fn last_confirm(&self) -> Option<Timestamp> {
        locked(&self.deliveries).last
    }

    /// The last confirmed events by their `seq`, with the time of the confirm.
    pub fn confirms(&self) -> Vec<(u64, Timestamp)> {
        locked(&self.deliveries).confirms.iter().copied().collect()
    }

    /// How long the events that were confirmed since the last call had been under way.
    pub fn take_lags(&self) -> Lags {
        std::mem::take(&mut locked(&self.deliveries).lags)
    }

    /// Has the parked events that are due looked at within moments, and not only at the next round.
    pub fn retry_parked(&self) {
        self.retry_parked.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_retry_asked(&self) -> bool {
        self.retry_parked.swap(false, Ordering::Relaxed)
    }

    /// Confirmed, and not returned: the `seq` of each, and how long it was under way.
    pub(super) fn delivered(&self, events: impl Iterator<Item = (u64, Duration)>) {
        let now = Timestamp::now();
        let mut deliveries = locked(&self.deliveries);
        for (seq, lag) in events {
            if deliveries.confirms.len() == CONFIRMS_MAX {
                deliveries.confirms.pop_front();
            }
            deliveries.confirms.push_back((seq, now));
            deliveries.last = Some(now);
            deliveries.lags.add(lag);
        }
    }

    /// Returns whether there was a connection before.
    pub(super) fn connected(&self, url: &BrokerUrl) -> bool {
        let mut state = locked(&self.state);
        state.connects += 1;
        let connects = state.connects;
        *state = BrokerState {
            connected: true,
            blocked: None,
            url: Some(url.to_string()),
            error: None,
            since: Timestamp::now(),
            connects,
        };
        self.turn(TurnKind::Connected, url.to_string());
        connects > 1
    }

    pub(super) fn disconnected(&self, error: String) {
        let mut state = locked(&self.state);
        if state.connected {
            state.since = Timestamp::now();
            self.turn(TurnKind::Lost, error.clone());
        }
        state.connected = false;
        state.blocked = None;
        state.error = Some(error);
        self.set_in_flight(0);
    }

    pub(super) fn blocked(&self, reason: Option<String>) {
        let mut state = locked(&self.state);
        match &reason {
            Some(reason) => self.turn(TurnKind::Blocked, reason.clone()),
            None => self.turn(TurnKind::Unblocked, String::new()),
        }
        state.blocked = reason;
        state.since = Timestamp::now();
    }

    pub(super) fn set_in_flight(&self, count: usize) {
        self.in_flight.store(count, Ordering::Relaxed);
    }

    fn turn(&self, what: TurnKind, detail: String) {
        let mut timeline = locked(&self.timeline);
        if timeline.len() == TIMELINE_MAX {
            timeline.pop_front();
        }
        timeline.push_back(Turn { at: Timestamp::now(), what, detail });
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
