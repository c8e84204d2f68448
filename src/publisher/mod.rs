//! From the spool to the broker: publish, wait for the confirm, remove. Does not know HTTP.
//!
//! One task owns one connection and one channel in confirm mode. It publishes in the order of acceptance with a window
//! of unconfirmed messages, in which each subject has at most one. On any fault it drops the connection, waits,
//! connects to the next URL, and starts again from the oldest unconfirmed event. Events that the broker already had are
//! then published twice, under the same `message_id`. A message that the broker refuses is parked and costs a channel.

mod backlog;
mod error;
mod flight;
mod lags;
pub mod message;
mod outcome;
mod pacing;
mod parking;
mod parking_log;
mod read_ahead;
mod refusals;
mod session;
mod settings;
mod stall;
mod status;
mod watch;
mod window;

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytesize::ByteSize;
use futures_util::FutureExt;
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
pub use status::{BrokerState, ConnectionEvent, ConnectionEventKind, QueueState, QueueTrouble, Status, WatchState};

use crate::backoff::Backoff;
use crate::broker::{BrokerAccess, BrokerConnection, reply_text};
use crate::metrics::Metrics;
use crate::spool::Spool;
use crate::text::{chain, rounded, span};
use crate::topology::{self, Declare, Plan};
use crate::traces::Traces;
use pacing::Pacing;
use parking_log::ParkingLog;
use session::{ConnectionEvents, Parts, Session};
use stall::{Backlog, Line, Stall};
use watch::{ASK_AGAIN, Watch, Watched};

/// Parts of the errors for a channel too many: RabbitMQ's, after which it closes the connection, and lapin's own.
const CHANNEL_LIMITS: [&str; 2] = ["number of channels opened", "the maximum number of channels"];

/// Round trips for a channel: to open it, and to select confirm mode.
const CHANNEL_STEPS: u32 = 2;

/// How often the backlog is looked at.
const STALL_CHECK: Duration = Duration::from_secs(1);

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
        let (status, parking_log) = (Arc::new(Status::new()), ParkingLog::default());
        let parts = Parts { spool, settings, status, traces, metrics, parking_log };
        Self { parts, access, plan, declare: topology.declare }
    }

    /// Where the publisher reports its state.
    pub fn status(&self) -> Arc<Status> {
        Arc::clone(&self.parts.status)
    }

    /// Delivers until `drain` is cancelled, and then while events are pending and the broker takes them. Returns an
    /// error only if the spool cannot be read.
    pub async fn run(self, drain: CancellationToken) -> Result<(), PublisherError> {
        tokio::select! {
            ended = self.deliver(&drain) => ended,
            never = self.log_stalls() => match never {},
        }
    }

    async fn deliver(&self, drain: &CancellationToken) -> Result<(), PublisherError> {
        let mut backoff = Backoff::new(self.parts.settings.reconnect_min, self.parts.settings.reconnect_max);
        let (mut pacing, mut watch) = (Pacing::default(), Watch::default());
        // The last warning about each URL.
        let mut warned = vec![String::new(); self.access.count()];
        // The broker rejected an event right after the last connections were opened.
        let mut nacks_again = false;
        for index in (0..self.access.count()).cycle() {
            let url = self.access.url(index);
            let started_at = Instant::now();
            let ended = self.deliver_to(index, nacks_again, &mut pacing, &mut watch, drain).await;
            let Err(interruption) = ended else { return Ok(()) };
            let Interruption { error, connection_worked } = interruption;
            match error {
                PublisherError::Spool(_) => return Err(error),
                // The message was to blame. It is parked, or the next session knows more about which one it is.
                PublisherError::Refused(reason) => {
                    debug!(%url, reason, "the connection ended with its channel");
                    self.parts.status.on_disconnected(reason, false);
                    continue;
                }
                _ => {}
            }
            if matches!(error, PublisherError::ConfirmTimeout(_)) {
                self.parts.status.on_nack();
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
            if CHANNEL_LIMITS.iter().any(|limit| text.contains(limit)) && watch.is_on(started_at) {
                watch.turn_off(&text, &self.watched(), Instant::now());
            }
            // The same error is logged once, not at each try.
            nacks_again = nacked_at_once && text == warned[index];
            if text == warned[index] {
                debug!(%url, error = %text, delay = wait, "still not delivering");
            } else {
                let pending = self.parts.spool.status().ledger().pending;
                warn!(%url, error = %text, delay = wait, pending, "not delivering; events are kept on disk");
                warned[index].clone_from(&text);
            }
            self.parts.status.on_disconnected(text, error.is_unreachable());
            tokio::select! {
                () = tokio::time::sleep(delay) => {}
                () = drain.cancelled() => return Ok(()),
            }
        }
        unreachable!("the configuration has at least one URL")
    }

    /// Connects, logs in and delivers until the first fault of the connection; `Ok` once drained. `nacks_again`: the
    /// last ones ended with the same nack, so this one is no news.
    async fn deliver_to(
        &self,
        index: usize,
        nacks_again: bool,
        pacing: &mut Pacing,
        watch: &mut Watch,
        drain: &CancellationToken,
    ) -> Result<(), Interruption> {
        let Connected { broker, channel, looks } = tokio::select! {
            connected = self.connect(index, watch.is_on(Instant::now())) => connected?,
            () = self.drained_before_connecting(drain) => return Ok(()),
        };
        let url = self.access.url(index);
        if self.parts.status.on_connected(&url) == Connect::Again {
            self.parts.metrics.broker.reconnects.increment(1);
        }
        let pending = self.parts.spool.status().ledger().pending;
        match nacks_again {
            true => debug!(%url, pending, "connected to the broker, which rejected an event the last times"),
            false => info!(%url, pending, "connected to the broker"),
        }
        let api = self.access.management(&broker.url).ok();
        let watching = match looks {
            Some(channel) => {
                let mut watch = watch.over(&broker, channel, api, self.watched());
                // Another nack may end this session before it has seen which queue is to blame.
                if self.parts.status.was_nacked() {
                    watch.look_early(drain).await;
                }
                watch.run().left_future()
            }
            None => self.watch_apart(index, watch).right_future(),
        };
        tokio::select! {
            ended = self.deliver_over(&broker, channel, pacing, drain) => ended?,
            never = watching => match never {},
        }
        broker.close().await;
        Ok(())
    }

    /// Delivers over one connection. A refused message costs a channel, and the connection if the broker closes it too:
    /// lapin may have written more messages to the closed channel.
    async fn deliver_over(
        &self,
        broker: &BrokerConnection,
        mut channel: Channel,
        pacing: &mut Pacing,
        drain: &CancellationToken,
    ) -> Result<(), Interruption> {
        let mut events: ConnectionEvents = Box::pin(broker.connection.events_listener());
        let mut refused = None;
        loop {
            let end = Session::new(&self.parts, broker, channel, pacing).run(&mut events, drain).await;
            let Err(interruption) = end else { return Ok(()) };
            match (interruption.error, refused.take()) {
                (PublisherError::Refused(reason), _) => {
                    let limit = self.access.connect_timeout() * CHANNEL_STEPS;
                    let Ok(Ok(next)) = timeout(limit, confirm_channel(broker)).await else {
                        return Err(PublisherError::Refused(reason).into());
                    };
                    channel = next;
                    refused = Some(reason);
                }
                // The end of the connection followed the end of the channel.
                (PublisherError::Lost(_), Some(reason)) if !interruption.connection_worked => {
                    return Err(PublisherError::Refused(reason).into());
                }
                (error, _) => return Err(Interruption { error, ..interruption }),
            }
        }
    }

    /// Watches over a connection of its own, once the broker allows the user another channel.
    async fn watch_apart(&self, index: usize, watch: &mut Watch) -> Infallible {
        let watched = self.watched();
        let mut backoff = Backoff::new(watched.interval, ASK_AGAIN);
        loop {
            tokio::time::sleep(backoff.next(fastrand::f64())).await;
            let Ok(broker) = self.access.open(index, "prism-relay watch").await else { continue };
            let opened = timeout(watched.limit, broker.connection.create_channel()).await;
            let Ok(Ok(channel)) = opened else { continue };
            backoff.reset();
            let mut watch = watch.over(&broker, channel, self.access.management(&broker.url).ok(), watched);
            while broker.connection.status().connected() {
                watch.look_and_wait().await;
            }
        }
    }

    fn watched(&self) -> Watched<'_> {
        let Parts { status, metrics, settings, .. } = &self.parts;
        Watched {
            plan: &self.plan,
            declare: self.declare,
            interval: settings.watch_interval,
            limit: self.set_up_limit(),
            nack_pause: settings.confirm_timeout.saturating_add(settings.reconnect_max),
            status,
            metrics,
        }
    }

    /// Maximum time for the set-up of a connection, or for a look: each step is a round trip, and may take as long as a
    /// login.
    fn set_up_limit(&self) -> Duration {
        self.access.connect_timeout() * (self.plan.steps() + CHANNEL_STEPS + 1)
    }

    /// Logs a backlog that does not move, and its end.
    async fn log_stalls(&self) -> Infallible {
        let (mut stall, spool) = (Stall::default(), &self.parts.spool);
        loop {
            tokio::time::sleep(STALL_CHECK).await;
            let ledger = spool.status().ledger();
            // Events behind a parked one wait for a reason that is logged.
            let waiting = self.parts.status.waiting();
            let is_idle = ledger.pending <= waiting;
            let oldest_ms = if is_idle { Ok(None) } else { spool.oldest_pending_ms().await };
            // A spool that cannot be read is reported by the session.
            let Ok(oldest_ms) = oldest_ms else { continue };
            let now_ms = jiff::Timestamp::now().as_millisecond();
            let backlog = Backlog { oldest_ms, some_wait: waiting > 0, confirmed: ledger.confirmed, now_ms };
            match stall.look(backlog, Instant::now()) {
                Some(Line::Still(waited)) => warn!(
                    stalled = span(waited),
                    pending = ledger.pending,
                    oldest = span(age(oldest_ms, now_ms)),
                    size = %ByteSize(ledger.bytes),
                    of_max_bytes = format!("{:.1} %", ledger.bytes as f64 / spool.max_bytes() as f64 * 100.0),
                    reason = stall::reason(&self.parts.status.snapshot(), &self.parts.status.watch()),
                    "still not delivering; events are kept on disk"
                ),
                Some(Line::Over { lasted, events, took }) => info!(
                    lasted = span(lasted),
                    events,
                    took = span(took),
                    per_second = format!("{:.0}", events as f64 / took.as_secs_f64().max(1.0)),
                    "the backlog is delivered"
                ),
                None => {}
            }
        }
    }

    /// Returns once `drain` is cancelled and nothing is pending: then no connection is needed.
    async fn drained_before_connecting(&self, drain: &CancellationToken) {
        drain.cancelled().await;
        self.parts.spool.flush().await;
        if self.parts.spool.status().ledger().pending > 0 {
            std::future::pending().await
        }
    }

    /// Opens a connection and a channel in confirm mode, and declares the topology. `watch`: with a second channel,
    /// before anything is published, because the broker closes the connection if it does not allow one.
    async fn connect(&self, index: usize, watch: bool) -> Result<Connected, PublisherError> {
        let broker = self.access.open(index, "prism-relay").await?;
        let limit = self.set_up_limit();
        let set_up = async {
            topology::establish(&broker.connection, &self.plan, self.declare).await?;
            let lost = |error: lapin::Error| PublisherError::Lost(reply_text(&error));
            let channel = confirm_channel(&broker).await?;
            let looks = if watch { Some(broker.connection.create_channel().await.map_err(lost)?) } else { None };
            Ok::<_, PublisherError>((channel, looks))
        };
        let (channel, looks) = timeout(limit, set_up).await.map_err(|_| PublisherError::SetUpTimeout(limit))??;
        Ok(Connected { broker, channel, looks })
    }
}

/// A connection on which everything is set up.
struct Connected {
    broker: BrokerConnection,
    /// In confirm mode.
    channel: Channel,
    /// The channel of the watch.
    looks: Option<Channel>,
}

async fn confirm_channel(broker: &BrokerConnection) -> Result<Channel, PublisherError> {
    let lost = |error: lapin::Error| PublisherError::Lost(reply_text(&error));
    let channel = broker.connection.create_channel().await.map_err(lost)?;
    channel.confirm_select(ConfirmSelectOptions { nowait: false }).await.map_err(lost)?;
    Ok(channel)
}

fn age(oldest_ms: Option<i64>, now_ms: i64) -> Duration {
    Duration::from_millis(u64::try_from(now_ms - oldest_ms.unwrap_or(now_ms)).unwrap_or(0))
}

#[cfg(test)]
mod tests;
