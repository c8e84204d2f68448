//! Talks to the service manager (systemd with `Type=notify`): notifies it of ready, stopping and alive (sd_notify(3)),
//! and takes the listening sockets that it holds open across restarts (sd_listen_fds(3)). Without a service manager
//! these functions do nothing.

use std::future::pending;
use std::net::TcpListener;

use sd_notify::NotifyState;
use thiserror::Error;
use tracing::debug;

/// Listening sockets from the service manager, by their name in the socket unit (`FileDescriptorName=`).
#[derive(Default)]
pub(crate) struct Listeners {
    /// The socket named `http`, or with any name but `ops`.
    pub http: Option<TcpListener>,
    /// The socket named `ops`.
    pub ops: Option<TcpListener>,
}

/// Why the sockets of the service manager cannot be used.
#[derive(Debug, Error)]
pub(crate) enum SocketActivationError {
    #[error("cannot read the sockets passed by the service manager")]
    Read(#[source] sd_listen_fds::Error),
    #[error("the service manager passed two sockets for {0}; set FileDescriptorName=http on one and =ops on the other")]
    Duplicate(&'static str),
}

/// Takes the sockets of the service manager. A second socket for the same listener is an error, because the relay would
/// never accept its connections.
pub(crate) fn listeners() -> Result<Listeners, SocketActivationError> {
    let mut listeners = Listeners::default();
    for (name, socket) in sd_listen_fds::get().map_err(SocketActivationError::Read)? {
        let (purpose, place) = match name.as_deref() {
            Some("ops") => ("ops", &mut listeners.ops),
            _ => ("http", &mut listeners.http),
        };
        if place.replace(TcpListener::from(socket)).is_some() {
            return Err(SocketActivationError::Duplicate(purpose));
        }
    }
    Ok(listeners)
}

/// Reports that the relay accepts webhooks.
pub(crate) fn ready() {
    notify(&[NotifyState::Ready]);
}

/// Reports that the relay is shutting down.
pub(crate) fn stopping() {
    notify(&[NotifyState::Stopping]);
}

/// Reports twice per `WatchdogSec=` that the process still runs its tasks. Never returns.
pub(crate) async fn watchdog() {
    let Some(limit) = sd_notify::watchdog_enabled() else { return pending().await };
    let mut ticks = tokio::time::interval(limit / 2);
    loop {
        ticks.tick().await;
        notify(&[NotifyState::Watchdog]);
    }
}

fn notify(state: &[NotifyState]) {
    if let Err(error) = sd_notify::notify(state) {
        debug!(%error, "cannot notify the service manager");
    }
}
