//! Ctrl-C and SIGTERM for the commands that move messages. Such a command ends between two batches, so that no message
//! is moved twice.

use std::pin::Pin;

use tokio::signal::unix::{SignalKind, signal};

use super::transfer::TransferError;

/// Resolves with the first signal.
pub(super) struct Interrupt(Pin<Box<dyn Future<Output = ()> + Send>>);

impl Interrupt {
    pub(super) fn listen() -> Result<Self, TransferError> {
        let listen = |kind| signal(kind).map_err(TransferError::Signal);
        let (mut interrupt, mut terminate) = (listen(SignalKind::interrupt())?, listen(SignalKind::terminate())?);
        Ok(Self(Box::pin(async move {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
        })))
    }

    /// Does `work`, which must be safe to drop, unless the command is interrupted.
    pub(super) async fn or<T>(&mut self, work: impl Future<Output = T>) -> Result<T, TransferError> {
        tokio::select! {
            biased;
            () = &mut self.0 => Err(TransferError::Interrupted),
            done = work => Ok(done),
        }
    }
}
