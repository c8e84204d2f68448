//! One relay, from its start to its end: [`build`] makes the parts, [`tasks`] runs them, [`drain`] stops them in the
//! order of the data.

mod build;
mod drain;
mod error;
mod tasks;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::Instant;
use tracing::{info, warn};

use crate::config::Config;
use crate::service_manager;
use crate::text::span;
pub(crate) use error::RelayError;

/// Runs the relay until SIGTERM or SIGINT, or until one of its tasks stops unexpectedly.
pub(crate) async fn serve(config: Config) -> Result<(), RelayError> {
    let mut signals = StopSignals::install()?;
    // Without a handler SIGHUP would end the process; with one it asks for a reload of the secrets.
    let hangup = signal(SignalKind::hangup()).map_err(RelayError::Signals)?;
    // Without a handler a file size limit (`ulimit -f`) would end the process; with one it is a disk without room. The
    // handler stays when its `Signal` is dropped.
    let _ = signal(SignalKind::from_raw(rustix::process::Signal::XFSZ.as_raw())).map_err(RelayError::Signals)?;
    let grace = config.shutdown.grace;
    let (built, spool_writer) = tokio::select! {
        built = build::build(config) => built?,
        () = signals.received() => {
            info!("stopped before the start was complete");
            return Ok(());
        }
    };
    let mut tasks = built.run(hangup, spool_writer);
    tokio::select! {
        () = signals.received() => {}
        error = tasks.failure() => return Err(error),
    }
    service_manager::stopping();
    let deadline = Instant::now() + grace;
    info!(
        grace = span(grace),
        "stopping: finishing open requests, then delivering pending events; a second signal stops at once"
    );
    tokio::select! {
        drained = tasks.drain(deadline) => drained,
        () = signals.received() => {
            warn!("stopped at once; undelivered events stay on disk");
            Ok(())
        }
    }
}

/// SIGTERM and SIGINT.
struct StopSignals {
    terminate: Signal,
    interrupt: Signal,
}

impl StopSignals {
    fn install() -> Result<Self, RelayError> {
        let install = |kind| signal(kind).map_err(RelayError::Signals);
        Ok(Self { terminate: install(SignalKind::terminate())?, interrupt: install(SignalKind::interrupt())? })
    }

    async fn received(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
