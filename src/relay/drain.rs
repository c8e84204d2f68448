//! Stops the tasks in the order of the data: requests, then the spool, then deliveries; the operators' listener last.

use std::time::Duration;

use tokio::time::{Instant, timeout_at};
use tracing::{info, warn};

use super::error::{RelayError, Task};
use super::tasks::Tasks;
use crate::text::span;

/// Maximum time for the last commit, after the grace.
const WRITER_TIMEOUT: Duration = Duration::from_secs(1);

/// Maximum time for the last traces, after the last delivery.
const TRACES_TIMEOUT: Duration = Duration::from_secs(2);

/// Maximum time for deliveries and traces if the service manager holds the public socket: webhooks wait in that socket
/// for the next relay, which can make the same deliveries.
const HANDOVER: Duration = Duration::from_secs(1);

/// Maximum time for open requests if the service manager holds the public socket. Prism sends a slower one again.
const HANDOVER_REQUESTS: Duration = Duration::from_secs(2);

impl Tasks {
    /// Stops everything by `deadline`. Undelivered events stay on disk.
    pub(super) async fn drain(self, deadline: Instant) -> Result<(), RelayError> {
        let Self {
            mut ingress,
            reconciler,
            spool,
            spool_writer,
            mut publisher,
            ops,
            reload,
            upkeep,
            traces,
            stops,
            ..
        } = self;
        let is_handed_over = self.is_handed_over;
        let begun = Instant::now();
        // Half of the grace at most, so that slow senders leave time for the deliveries. Later requests on an open
        // connection are answered 503.
        stops.ingress.cancel();
        let patience = (deadline - begun) / 2;
        let patience = if is_handed_over { patience.min(HANDOVER_REQUESTS) } else { patience };
        let served = timeout_at(begun + patience, &mut ingress).await;
        // It has ended as soon as it was told to, and an event that it may have made is in the spool or not at all.
        reconciler.abort();
        spool.close();
        if served.is_err() {
            warn!(waited = span(patience), "requests are still open: answering 503, or closing their connections");
        }
        stops.publisher.cancel();
        let until = if is_handed_over { deadline.min(Instant::now() + HANDOVER) } else { deadline };
        let published = timeout_at(until, &mut publisher).await;
        if published.is_err() && is_handed_over {
            info!("the next relay makes the remaining deliveries");
        } else if published.is_err() {
            warn!("shutdown.grace is over: undelivered events stay on disk");
        }
        // They hold the spool open.
        for task in [ingress.abort_handle(), publisher.abort_handle(), ops.abort_handle()] {
            task.abort();
        }
        reload.abort();
        let pending = spool.status().ledger().pending;
        drop(spool);
        // The writer ends when no sender is left, and closes the file. A failing disk gets a limited time.
        let written = timeout_at(deadline + WRITER_TIMEOUT, spool_writer).await;
        if written.is_err() {
            warn!("timed out closing the spool; the disk may be failing. Accepted events are safe");
        }
        let left = (deadline + WRITER_TIMEOUT).saturating_duration_since(Instant::now());
        traces.flush(left.min(if is_handed_over { HANDOVER } else { TRACES_TIMEOUT })).await;
        upkeep.abort();
        info!(pending, "stopped");
        match (served, published, written) {
            (_, Ok(Ok(Err(error))), _) => Err(RelayError::Publisher(error)),
            (_, Ok(Err(_)), _) => Err(RelayError::Task(Task::Publisher)),
            (Ok(Err(_)), _, _) => Err(RelayError::Task(Task::Ingress)),
            (_, _, Ok(Err(_))) => Err(RelayError::Task(Task::SpoolWriter)),
            (Ok(Ok(())) | Err(_), Ok(Ok(Ok(()))) | Err(_), Ok(Ok(())) | Err(_)) => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tasks::tests::idle_tasks;
    use super::*;

    #[tokio::test]
    async fn a_task_that_panics_during_the_drain_is_an_error() {
        let folder = tempfile::TempDir::new().unwrap();
        let mut tasks = idle_tasks(&folder);
        tasks.ingress = tokio::spawn(async {});
        tasks.publisher = tokio::spawn(async { panic!("on purpose") });
        let drained = tasks.drain(Instant::now() + Duration::from_secs(30)).await;
        assert!(matches!(drained, Err(RelayError::Task(Task::Publisher))));
    }
}
