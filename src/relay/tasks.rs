//! The running tasks and their owner. A task that must not end is a reason to stop the relay.

use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use tokio::signal::unix::Signal;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::build::{Built, Stops};
use super::error::{RelayError, Task};
use crate::logging;
use crate::metrics::Metrics;
use crate::publisher::PublisherError;
use crate::reconcile::Reconciler;
use crate::reload;
use crate::service_manager;
use crate::spool::{Spool, SpoolStatus, WriterEnd};
use crate::tls;
use crate::traces::Traces;

/// How often raw samples of histograms are folded into buckets.
const UPKEEP_EVERY: Duration = Duration::from_secs(5);

/// How long before the expiry of a certificate the log warns, and how often.
const EXPIRY_NOTICE: SignedDuration = SignedDuration::from_hours(14 * 24);
const EXPIRY_REMINDER: Duration = Duration::from_secs(24 * 3600);

/// The running tasks, in the order of the data.
pub(super) struct Tasks {
    pub ingress: JoinHandle<()>,
    pub reconciler: JoinHandle<()>,
    pub spool: Spool,
    pub spool_writer: WriterEnd,
    pub publisher: JoinHandle<Result<(), PublisherError>>,
    pub ops: JoinHandle<()>,
    pub reload: JoinHandle<()>,
    pub upkeep: JoinHandle<()>,
    pub traces: Arc<Traces>,
    pub stops: Stops,
    /// See [`Built::is_handed_over`].
    pub is_handed_over: bool,
}

impl Built {
    /// Spawns the tasks. `hangup` asks for a reload of secrets and certificates.
    #[expect(clippy::disallowed_methods, reason = "this is the owner of the tasks")]
    pub(super) fn run(self, hangup: Signal, spool_writer: WriterEnd) -> Tasks {
        let Self { ingress, reconciler, publisher, ops, spool, watched, tls, traces, drift, metrics, stops, .. } = self;
        let (exported, status) = (Arc::clone(&traces), Arc::clone(spool.status()));
        let counters = Arc::clone(&metrics);
        let log_filter = self.log_filter;
        let reset_log_filter = move || {
            if let Some(previous) = logging::set_filter(&log_filter) {
                info!(previous, filter = %log_filter, "SIGHUP: log filter reset to log.filter");
            }
        };
        Tasks {
            ingress: tokio::spawn(ingress.run()),
            reconciler: tokio::spawn(reconcile(reconciler, stops.ingress.clone())),
            publisher: tokio::spawn(publisher.run(stops.publisher.clone())),
            ops: tokio::spawn(ops.run(CancellationToken::new())),
            reload: tokio::spawn(reload::run(watched, hangup, Arc::clone(&metrics), reset_log_filter)),
            upkeep: tokio::spawn(async move {
                let unexpected = drift.run(&counters);
                tokio::join!(upkeep(metrics, tls, status), service_manager::watchdog(), exported.export(), unexpected);
            }),
            traces,
            spool,
            spool_writer,
            stops,
            is_handed_over: self.is_handed_over,
        }
    }
}

impl Tasks {
    /// Resolves when a task ends that must not.
    pub(super) async fn failure(&mut self) -> RelayError {
        tokio::select! {
            _ = &mut self.ingress => RelayError::Task(Task::Ingress),
            _ = &mut self.reconciler => RelayError::Task(Task::Reconciler),
            _ = &mut self.spool_writer => RelayError::Task(Task::SpoolWriter),
            ended = &mut self.publisher => match ended {
                Ok(Err(error)) => self.publisher_failure(error),
                Ok(Ok(())) | Err(_) => RelayError::Task(Task::Publisher),
            },
            _ = &mut self.ops => RelayError::Task(Task::Ops),
            _ = &mut self.reload => RelayError::Task(Task::Reload),
            _ = &mut self.upkeep => RelayError::Task(Task::Upkeep),
        }
    }

    /// A damaged file is repaired when it is opened, so the relay marks it for that and ends.
    fn publisher_failure(&self, error: PublisherError) -> RelayError {
        if let PublisherError::Spool(cause) = &error
            && cause.is_damage()
        {
            self.spool.recover_at_next_start();
        }
        RelayError::Publisher(error)
    }
}

/// Reconciles until `stop`, if there is a key for it.
async fn reconcile(reconciler: Option<Reconciler>, stop: CancellationToken) {
    match reconciler {
        Some(reconciler) => reconciler.run(stop).await,
        None => stop.cancelled().await,
    }
}

/// Folds histograms, counts dropped log lines, and logs when the spool's disk stops answering and when the certificate
/// expires soon.
async fn upkeep(metrics: Arc<Metrics>, tls: Option<Arc<tls::Server>>, spool: Arc<SpoolStatus>) {
    let mut ticks = tokio::time::interval(UPKEEP_EVERY);
    let (mut warned_at, mut reported) = (None, 0);
    loop {
        ticks.tick().await;
        metrics.upkeep();
        reported = report_dropped_lines(&metrics, reported);
        spool.tick();
        let expires_at = tls.as_ref().map(|tls| tls.identity().expires_at);
        if let Some(expires_at) = expires_at
            && Timestamp::now() + EXPIRY_NOTICE > expires_at
            && warned_at.is_none_or(|at: Instant| at.elapsed() >= EXPIRY_REMINDER)
        {
            warned_at = Some(Instant::now());
            warn!(%expires_at, "the certificate of the public listener expires soon or has expired; renew it");
        }
    }
}

/// Counts log lines that were dropped, and logs how many since the last report. Returns the total that was reported.
fn report_dropped_lines(metrics: &Metrics, reported: u64) -> u64 {
    let dropped = logging::dropped_lines();
    metrics.log_lines_dropped.absolute(dropped);
    if dropped == reported {
        return reported;
    }
    let lines = dropped - reported;
    warn!(lines, "dropped log lines because standard error was not read in time; webhooks were not affected");
    // If this line was dropped as well, it is due again.
    if logging::dropped_lines() == dropped { dropped } else { reported }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::spool;

    /// Tasks that never end, on a spool of their own.
    pub(in crate::relay) fn idle_tasks(folder: &tempfile::TempDir) -> Tasks {
        let settings = spool::Settings {
            path: folder.path().join("spool.db"),
            max_bytes: 1 << 20,
            durability: spool::Durability::Disk,
            body_bytes_max: 1 << 18,
        };
        let dedupe = spool::dedupe::Settings { window: Duration::ZERO, entries_max: 1 };
        let (spool, spool_writer) = Spool::open(&settings, &dedupe, None, Arc::new(Metrics::new())).unwrap();
        let idle = || tokio::spawn(std::future::pending());
        Tasks {
            ingress: idle(),
            reconciler: idle(),
            ops: idle(),
            reload: idle(),
            upkeep: idle(),
            traces: Arc::new(Traces::new(&crate::traces::Settings { endpoint: None, sample_ratio: 1.0 }).unwrap()),
            publisher: tokio::spawn(std::future::pending()),
            spool,
            spool_writer,
            stops: Stops::default(),
            is_handed_over: false,
        }
    }

    #[tokio::test]
    async fn a_task_that_panics_or_ends_is_a_failure() {
        let folder = tempfile::TempDir::new().unwrap();
        let mut tasks = idle_tasks(&folder);
        tasks.publisher = tokio::spawn(async { panic!("on purpose") });
        assert!(matches!(tasks.failure().await, RelayError::Task(Task::Publisher)));

        let folder = tempfile::TempDir::new().unwrap();
        let mut tasks = idle_tasks(&folder);
        tasks.ingress = tokio::spawn(async {});
        let error = tasks.failure().await;
        assert_eq!(error.to_string(), "the task that accepts webhooks stopped unexpectedly");
    }
}
