//! Spool to broker: publish, wait for the confirm, remove. Knows nothing of HTTP.
//!
//! One task owns one connection and one channel in confirm mode. It publishes in the order of acceptance with a window
//! of unconfirmed messages. Whenever anything is amiss it drops the connection, waits, connects to the next url,
//! and starts again from the oldest unconfirmed event; what the broker had already taken is then published twice, under
//! the same `message_id`.

mod ahead;
mod careful;
mod flight;
mod lags;
pub mod message;
mod outcome;
mod session;
mod settings;
mod status;

use std::sync::Arc;
use std::time::{Duration, Instant};

use thiserror::Error;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

pub use lags::Lags;
pub use settings::Settings;
pub use status::{BrokerState, Status, Turn};

use crate::backoff::Backoff;
use crate::broker::{BrokerAccess, BrokerConnection, ConnectError, reply_text};
use crate::config;
use crate::metrics::Metrics;
use crate::spool::{ReadError, Spool};
use crate::text::chain;
use crate::topology::{self, Plan, TopologyError};
use crate::traces::Traces;
use careful::Careful;
use session::Session;

/// Why there is no session with a broker at the moment.
#[derive(Debug, Error)]
pub enum PublisherError {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error(transparent)]
    Topology(#[from] TopologyError),
    #[error("the broker did not open a channel and declare the topology within {0:?}")]
    SetUpTimeout(Duration),
    #[error("the connection was lost: {0}")]
    Lost(String),
    #[error("the broker did not confirm a publish within {0:?}")]
    ConfirmTimeout(Duration),
    #[error("the broker rejected a publish (nack): is a queue at its limit?")]
    Nacked,
    #[error("the broker refuses a message: {0}")]
    Poison(String),
    #[error(transparent)]
    Spool(#[from] ReadError),
}

pub struct Publisher {
    spool: Spool,
    settings: Settings,
    access: Arc<BrokerAccess>,
    plan: Plan,
    declare: config::Declare,
    status: Arc<Status>,
    traces: Arc<Traces>,
    metrics: Arc<Metrics>,
}

impl Publisher {
    pub fn new(
        spool: Spool,
        settings: Settings,
        access: Arc<BrokerAccess>,
        topology: &config::Topology,
        traces: Arc<Traces>,
        metrics: Arc<Metrics>,
    ) -> Self {
        let plan = Plan::new(topology, &settings.exchange);
        Self {
            spool,
            settings,
            access,
            plan,
            declare: topology.declare,
            status: Arc::new(Status::new()),
            traces,
            metrics,
        }
    }

    pub fn status(&self) -> Arc<Status> {
        Arc::clone(&self.status)
    }

    /// Delivers until `drain` is cancelled, and then for as long as there is something to deliver and a broker that
    /// takes it. Ends before only if the spool cannot be read.
    pub async fn run(self, drain: CancellationToken) -> Result<(), PublisherError> {
        let mut backoff = Backoff::new(self.settings.reconnect_min, self.settings.reconnect_max);
        let mut careful = Careful::default();
        // Of each url: what was last said about it.
        let mut told = vec![String::new(); self.access.count()];
        for index in (0..self.access.count()).cycle() {
            let url = self.access.url(index);
            let begun = Instant::now();
            let error = match self.deliver_to(index, &mut careful, &drain).await {
                (_, Ok(())) => return Ok(()),
                (_, Err(PublisherError::Spool(error))) => return Err(error.into()),
                (progress, Err(error)) => {
                    // Where a queue is full, a nack comes at once, however well the connection works.
                    let at_once =
                        matches!(error, PublisherError::Nacked) && begun.elapsed() < self.settings.reconnect_max;
                    if progress && !at_once {
                        backoff.reset();
                        told[index].clear();
                    }
                    error
                }
            };
            let delay = backoff.next(fastrand::f64());
            let text = chain(&error);
            // A broker that is away for hours is worth one line, not one for each try. A message that it refuses has been
            // told of already.
            if text == told[index] || matches!(error, PublisherError::Poison(_)) {
                debug!(%url, error = %text, ?delay, "still not delivering");
            } else {
                warn!(%url, error = %text, ?delay, pending = self.spool.gauges().ledger().pending, "not delivering; events are kept on disk");
                told[index].clone_from(&text);
            }
            self.status.disconnected(text);
            tokio::select! {
                () = tokio::time::sleep(delay) => {}
                () = drain.cancelled() => return Ok(()),
            }
        }
        unreachable!("the configuration has at least one url")
    }

    /// One connection, from the login to its end. The flag tells whether anything was delivered on it.
    async fn deliver_to(
        &self,
        index: usize,
        careful: &mut Careful,
        drain: &CancellationToken,
    ) -> (bool, Result<(), PublisherError>) {
        let connecting = async {
            let link = self.access.open(index, "prism-relay").await?;
            // Each declaration is a round trip, and may take as long as a login.
            let limit = self.access.connect_timeout() * (self.plan.steps() + 2);
            let setup = tokio::time::timeout(limit, self.set_up(&link)).await;
            let channel = setup.map_err(|_| PublisherError::SetUpTimeout(limit))??;
            Ok((link, channel))
        };
        let (link, channel) = tokio::select! {
            connected = connecting => match connected {
                Ok(connected) => connected,
                Err(error) => return (false, Err(error)),
            },
            () = self.drained_before_connecting(drain) => return (false, Ok(())),
        };
        let url = self.access.url(index);
        if self.status.connected(&url) {
            self.metrics.broker.reconnects.increment(1);
        }
        info!(%url, pending = self.spool.gauges().ledger().pending, "connected to the broker");
        let session = Session::new(self, &link, channel, careful);
        let (progress, end) = session.run(drain).await;
        if end.is_ok() {
            link.close().await;
        }
        (progress, end)
    }

    /// A connection that is being made is worth waiting for only if there is something to deliver.
    async fn drained_before_connecting(&self, drain: &CancellationToken) {
        drain.cancelled().await;
        self.spool.flush().await;
        if self.spool.gauges().ledger().pending > 0 {
            std::future::pending().await
        }
    }

    async fn set_up(&self, link: &BrokerConnection) -> Result<lapin::Channel, PublisherError> {
        topology::establish(&link.connection, &self.plan, self.declare).await?;
        let lost = |error: lapin::Error| PublisherError::Lost(reply_text(&error));
        let channel = link.connection.create_channel().await.map_err(lost)?;
        channel.confirm_select(lapin::options::ConfirmSelectOptions { nowait: false }).await.map_err(lost)?;
        Ok(channel)
    }
}
