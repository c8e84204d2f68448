//! How the publisher is configured.

use std::time::Duration;

/// The keys of the section `[broker]` that concern publishing.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The exchange to publish to.
    pub exchange: String,
    /// Maximum number of unconfirmed publishes; at least 1.
    pub window: usize,
    /// Maximum time for a confirm; at least the heartbeat interval, which is in the URLs.
    pub confirm_timeout: Duration,
    /// The shortest delay before the next connection.
    pub reconnect_min: Duration,
    /// The longest delay before the next connection.
    pub reconnect_max: Duration,
    /// How often queues, exchanges and bindings are looked at.
    pub watch_interval: Duration,
    /// How long a parked event waits before the next try.
    pub parked_retry: Duration,
}
