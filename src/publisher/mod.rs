//! From the spool to the broker: publish, wait for the confirm, remove. Does not know HTTP.
//!
//! One task owns one connection and one channel in confirm mode. It publishes in the order of acceptance with a window
//! of unconfirmed messages. On any fault it drops the connection, waits, connects to the next URL, and starts again
//! from the oldest unconfirmed event. Events that the broker already had are then published twice, under the same
//! `message_id`.

mod error;
mod flight;
mod lags;
pub mod message;
mod outcome;
mod pacing;
mod read_ahead;
mod session;
mod settings;
mod status;

use std::sync::Arc;
use std::time::Instant;

use lapin::Channel;
use lapin::options::ConfirmSelectOptions;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use error::Interruption;
pub use error::PublisherError;
pub use lags::Lags;
pub use settings::Settings;
use status::Connect;
pub use status::{BrokerState, ConnectionEvent, Status};

use crate::backoff::Backoff;
use crate::broker::{BrokerAccess, BrokerConnection, reply_text};
use crate::metrics::Metrics;
use crate::spool::Spool;
use crate::text::{chain, rounded};
use crate::topology::{self, Declare, Plan};
use crate::traces::Traces;
use pacing::Pacing;
use session::{Parts, Session};

/// The task that delivers events.
pub struct Publisher {
    parts: Parts,
    access: Arc<BrokerAccess>,
    plan: Plan,
    declare: Declare,
}

impl Publisher {
    /// Prepares the task; [`Self::run`] connects.
    pub fn new(
        spool: Spool,
        settings: Settings,
        access: Arc<BrokerAccess>,
        topology: &topology::Spec,
        traces: Arc<Traces>,
        metrics: Arc<Metrics>,
    ) -> Self {
        let plan = Plan::new(topology, &settings.exchange);
        let parts = Parts { spool, settings, status: Arc::new(Status::new()), traces, metrics };
        Self { parts, access, plan, declare: topology.declare }
    }

    /// Where the publisher reports its state.
    pub fn status(&self) -> Arc<Status> {
        Arc::clone(&self.parts.status)
    }

    /// Delivers until `drain` is cancelled, and then while events are pending and the broker takes them. Returns an
    /// error only if the spool cannot be read.
    pub async fn run(self, drain: CancellationToken) -> Result<(), PublisherError> {
        let mut backoff = Backoff::new(self.parts.settings.reconnect_min, self.parts.settings.reconnect_max);
        let mut pacing = Pacing::default();
        // The last warning about each URL.
        let mut warned = vec![String::new(); self.access.count()];
        for index in (0..self.access.count()).cycle() {
            let url = self.access.url(index);
            let started_at = Instant::now();
            let Err(interruption) = self.deliver_to(index, &mut pacing, &drain).await else { return Ok(()) };
            let Interruption { error, connection_worked } = interruption;
            if matches!(error, PublisherError::Spool(_)) {
                return Err(error);
            }
            // A full queue nacks at once, over a connection that works.
            let nacked_at_once =
                matches!(error, PublisherError::Nacked) && started_at.elapsed() < self.parts.settings.reconnect_max;
            if connection_worked && !nacked_at_once {
                backoff.reset();
                warned[index].clear();
            }
            let delay = backoff.next(fastrand::f64());
            let (text, wait) = (chain(&error), rounded(delay));
            // The same error is logged once, not at each try. The session has logged a refused message already.
            if text == warned[index] || matches!(error, PublisherError::Poison(_)) {
                debug!(%url, error = %text, delay = wait, "still not delivering");
            } else {
                let pending = self.parts.spool.status().ledger().pending;
                warn!(%url, error = %text, delay = wait, pending, "not delivering; events are kept on disk");
                warned[index].clone_from(&text);
            }
            self.parts.status.on_disconnected(text);
            tokio::select! {
                () = tokio::time::sleep(delay) => {}
                () = drain.cancelled() => return Ok(()),
            }
        }
        unreachable!("the configuration has at least one URL")
    }

    /// Connects, logs in and delivers until the first fault; `Ok` once drained.
    async fn deliver_to(
        &self,
        index: usize,
        pacing: &mut Pacing,
        drain: &CancellationToken,
    ) -> Result<(), Interruption> {
        let (broker, channel) = tokio::select! {
            connected = self.connect(index) => connected?,
            () = self.drained_before_connecting(drain) => return Ok(()),
        };
        let url = self.access.url(index);
        if self.parts.status.on_connected(&url) == Connect::Again {
            self.parts.metrics.broker.reconnects.increment(1);
        }
        info!(%url, pending = self.parts.spool.status().ledger().pending, "connected to the broker");
        Session::new(&self.parts, &broker, channel, pacing).run(drain).await?;
        broker.close().await;
        Ok(())
    }

    /// Returns once `drain` is cancelled and nothing is pending: then no connection is needed.
    async fn drained_before_connecting(&self, drain: &CancellationToken) {
        drain.cancelled().await;
        self.parts.spool.flush().await;
        if self.parts.spool.status().ledger().pending > 0 {
            std::future::pending().await
        }
    }

    /// Opens a connection and a channel in confirm mode, and declares the topology.
    async fn connect(&self, index: usize) -> Result<(BrokerConnection, Channel), PublisherError> {
        let broker = self.access.open(index, "prism-relay").await?;
        // Each declaration is a round trip and may take as long as a login; so do the channel and confirm mode.
        let limit = self.access.connect_timeout() * (self.plan.steps() + 2);
        let set_up = async {
            topology::establish(&broker.connection, &self.plan, self.declare).await?;
            let lost = |error: lapin::Error| PublisherError::Lost(reply_text(&error));
            let channel = broker.connection.create_channel().await.map_err(lost)?;
            channel.confirm_select(ConfirmSelectOptions { nowait: false }).await.map_err(lost)?;
            Ok::<_, PublisherError>(channel)
        };
        let channel = timeout(limit, set_up).await.map_err(|_| PublisherError::SetUpTimeout(limit))??;
        Ok((broker, channel))
    }
}
