//! What a service manager that listens (systemd, `Type=notify`) is told: ready, stopping, alive. Without one nothing
//! happens. See sd_notify(3).

use std::future::pending;

use sd_notify::NotifyState;
use tracing::debug;

/// Webhooks are accepted.
pub fn ready() {
    tell(&[NotifyState::Ready]);
}

pub fn stopping() {
    tell(&[NotifyState::Stopping]);
}

/// Tells for ever that this process gets to run its tasks, twice as often as it is asked to (`WatchdogSec=`).
pub async fn watchdog() {
    let Some(limit) = sd_notify::watchdog_enabled() else { return pending().await };
    let mut beats = tokio::time::interval(limit / 2);
    loop {
        beats.tick().await;
        tell(&[NotifyState::Watchdog]);
    }
}

fn tell(state: &[NotifyState]) {
    if let Err(error) = sd_notify::notify(state) {
        debug!(%error, "the service manager cannot be told");
    }
}
