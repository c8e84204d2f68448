//! What a service manager that listens (systemd, `Type=notify`) is told: ready, stopping, alive (sd_notify(3)); and what it
//! hands over: sockets that it holds open while one relay ends and the next one begins (sd_listen_fds(3)). Without one
//! nothing happens.

use std::future::pending;
use std::io;
use std::net::TcpListener;

use sd_notify::NotifyState;
use tracing::debug;

/// Listening sockets that were handed over, by the name that they have in their unit (`FileDescriptorName=`).
#[derive(Default)]
pub struct Listeners {
    /// `http`, or any other name if it is the only one.
    pub http: Option<TcpListener>,
    /// `ops`.
    pub ops: Option<TcpListener>,
}

/// Takes what was handed over. Each socket has one purpose: a second one for the same is an error, because nobody would
/// accept its connections.
pub fn listeners() -> io::Result<Listeners> {
    let mut listeners = Listeners::default();
    for (name, socket) in sd_listen_fds::get().map_err(io::Error::other)? {
        let (purpose, place) = match name.as_deref() {
            Some("ops") => ("ops", &mut listeners.ops),
            _ => ("http", &mut listeners.http),
        };
        if place.replace(TcpListener::from(socket)).is_some() {
            let what = format!("the service manager hands over two sockets for {purpose}; name them http and ops");
            return Err(io::Error::other(what));
        }
    }
    Ok(listeners)
}

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
