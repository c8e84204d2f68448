//! What the operators' pages tell about the broker.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use jiff::Timestamp;
use serde::Serialize;

use crate::config::BrokerUrl;

/// Written by the publisher, read by anyone.
#[derive(Debug)]
pub struct Status {
    state: Mutex<BrokerState>,
    in_flight: AtomicUsize,
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
        Self { state: Mutex::new(state), in_flight: AtomicUsize::new(0) }
    }

    pub fn snapshot(&self) -> BrokerState {
        self.locked().clone()
    }

    /// Publishes without a confirm at the moment.
    pub fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// Returns whether there was a connection before.
    pub(super) fn connected(&self, url: &BrokerUrl) -> bool {
        let mut state = self.locked();
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
        connects > 1
    }

    pub(super) fn disconnected(&self, error: String) {
        let mut state = self.locked();
        if state.connected {
            state.since = Timestamp::now();
        }
        state.connected = false;
        state.blocked = None;
        state.error = Some(error);
        self.set_in_flight(0);
    }

    pub(super) fn blocked(&self, reason: Option<String>) {
        let mut state = self.locked();
        state.blocked = reason;
        state.since = Timestamp::now();
    }

    pub(super) fn set_in_flight(&self, count: usize) {
        self.in_flight.store(count, Ordering::Relaxed);
    }

    fn locked(&self) -> std::sync::MutexGuard<'_, BrokerState> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}
