//! One channel's life: publish a window of events, settle the delivered ones, end at the first fault.
//!
//! Three rules keep promise 3, "leaves only when delivered":
//!
//! 1. A confirmed event is settled only when no return of it can follow. The broker sends a return before the event's
//!    own confirm, but lapin attaches the return to whichever confirm completes next. So when an event's confirm
//!    completes, either its return was attached to an earlier confirm, or this confirm carries some return. Completions
//!    leave the queue of publish futures first in, first out. A marker is queued behind each batch of confirmed events:
//!    when the marker comes out, all earlier completions have been seen, and with them any return of the batch.
//! 2. After a return nothing is published or settled until every publish in flight has its outcome. By then lapin has
//!    handed out every return.
//! 3. A confirm that does not arrive in time ends the session, because some never arrive.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::future::ready;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use futures_util::stream::{FuturesUnordered, StreamExt};
use jiff::Timestamp;
use lapin::{Channel, Event as LapinEvent};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};
use uuid::Uuid;

use super::error::{Interruption, PublisherError};
use super::flight::{self, Completion, Confirmed, Flight, PublishFuture};
use super::message::{self, Message};
use super::outcome::{PublishOutcome, ReturnedMessage, classify};
use super::pacing::{Pacing, Refusal};
use super::read_ahead::ReadAhead;
use super::settings::Settings;
use super::status::Status;
use crate::broker::{BrokerConnection, concerns_a_channel};
use crate::event::Envelope;
use crate::metrics::Metrics;
use crate::spool::{Batch, ReadError, Settlement, Spool, Stored, Undelivered};
use crate::traces::Traces;

/// How often the confirm deadline and the parked events are checked.
const TICK: Duration = Duration::from_millis(250);

/// How long the outcomes may take after the connection was cut. lapin normally fails all publishes at once.
const WIND_UP_TIMEOUT: Duration = Duration::from_secs(5);

/// How many parked events are read at a time.
const PARKED_BATCH: usize = 100;

/// What every session of a publisher uses.
pub(super) struct Parts {
    pub spool: Spool,
    pub settings: Settings,
    pub status: Arc<Status>,
    pub traces: Arc<Traces>,
    pub metrics: Arc<Metrics>,
}

/// The deliveries over one connection.
pub(super) struct Session<'a> {
    parts: &'a Parts,
    broker: &'a BrokerConnection,
    channel: Channel,
    pacing: &'a mut Pacing,

    pending: ReadAhead,
    /// Parked events due for a retry, one at a time and with nothing else in flight.
    parked: VecDeque<Stored>,
    /// The parked event in flight.
    retrying: Option<u64>,
    /// The parked event tried last; failing again is logged at debug only.
    last_retried: Option<u64>,

    completions: FuturesUnordered<PublishFuture>,
    /// Publishes without an outcome, by sequence number.
    flights: BTreeMap<u64, Flight>,
    /// Events confirmed since the last marker.
    confirmed: Vec<Confirmed>,
    /// Confirmed events past their marker, held back because of a return.
    held: Vec<Confirmed>,
    /// Returned messages and the broker's reason, until the events are parked.
    returned: HashMap<Uuid, String>,
    /// The broker nacked a publish: nothing is published until the session ends.
    nacked: bool,
    /// The broker blocks publishers.
    blocked: bool,
    /// The start of the session, or the end of the last alarm. Confirm deadlines count from here at the earliest.
    unblocked_at: Instant,
    /// The broker gave an answer that clears the connection of blame, so the next try need not wait longer.
    connection_worked: bool,
}

impl<'a> Session<'a> {
    pub(super) fn new(
        parts: &'a Parts,
        broker: &'a BrokerConnection,
        channel: Channel,
        pacing: &'a mut Pacing,
    ) -> Self {
        Self {
            parts,
            broker,
            channel,
            pacing,
            pending: ReadAhead::new(parts.spool.clone(), parts.settings.window),
            parked: VecDeque::new(),
            retrying: None,
            last_retried: None,
            completions: FuturesUnordered::new(),
            flights: BTreeMap::new(),
            confirmed: Vec::new(),
            held: Vec::new(),
            returned: HashMap::new(),
            nacked: false,
            blocked: false,
            unblocked_at: Instant::now(),
            connection_worked: false,
        }
    }

    /// Runs until the first fault; `Ok` once `drain` is cancelled and nothing is left that could be delivered.
    pub(super) async fn run(mut self, drain: &CancellationToken) -> Result<(), Interruption> {
        // The settlements of the previous session must be committed before pending events are read again.
        self.parts.spool.flush().await;
        let end = self.work(drain).await;
        if end.is_err() || !self.completions.is_empty() {
            self.wind_up().await;
        }
        if let Err(PublisherError::Poison(reason)) = &end {
            self.on_refusal(reason).await;
        }
        self.parts.metrics.publish.lost.increment(self.flights.len() as u64);
        self.parts.status.set_in_flight(0);
        for flight in std::mem::take(&mut self.flights).into_values() {
            flight.span.failed("lost");
        }
        end.map_err(|error| Interruption { error, connection_worked: self.connection_worked })
    }

    async fn work(&mut self, drain: &CancellationToken) -> Result<(), PublisherError> {
        let mut events = Box::pin(self.broker.connection.events_listener());
        let spool = self.parts.spool.clone();
        let (mut draining, mut ticked_at) = (false, Instant::now());
        loop {
            if ticked_at.elapsed() >= TICK {
                ticked_at = Instant::now();
                self.check_connection()?;
                if !draining {
                    self.read_parked().await?;
                }
            }
            if !draining && drain.is_cancelled() {
                draining = true;
                // Deliver everything accepted before the drain; parked events can wait for the next start.
                spool.flush().await;
                self.pending.on_commit();
                self.parked.clear();
            }
            self.fill().await?;
            if draining && (self.is_idle() || self.blocked) {
                return Ok(());
            }
            if self.nacked && self.flights.is_empty() && self.completions.is_empty() {
                return Err(PublisherError::Nacked);
            }
            tokio::select! {
                // Completions first: after a channel error they carry the broker's reason. The connection error that
                // often follows does not.
                biased;
                Some(completion) = self.completions.next(), if !self.completions.is_empty() => {
                    self.on_completion(completion).await?;
                    // Take all that are ready, so that the spool gets few large settlements.
                    while let Some(Some(completion)) = self.completions.next().now_or_never() {
                        self.on_completion(completion).await?;
                    }
                    self.queue_marker();
                }
                read = self.pending.finish_read(), if self.pending.is_reading() => read?,
                Some(event) = events.next() => self.on_connection_event(event)?,
                () = spool.committed().notified(), if self.pending.is_exhausted() => self.pending.on_commit(),
                () = drain.cancelled(), if !draining => {}
                () = tokio::time::sleep(TICK) => {}
            }
        }
    }

    /// Whether nothing is pending and nothing is in flight.
    fn is_idle(&self) -> bool {
        self.pending.is_empty() && self.completions.is_empty()
    }

    fn may_publish(&self) -> bool {
        !self.blocked && !self.nacked && self.returned.is_empty() && self.retrying.is_none()
    }

    /// Publishes as many events as the window allows, and reads ahead.
    async fn fill(&mut self) -> Result<(), ReadError> {
        if self.may_publish() && !self.parked.is_empty() {
            return self.retry_parked().await;
        }
        while self.may_publish()
            && let Some(seq) = self.pending.next_seq()
            && self.flights.len() < self.pacing.window(seq, self.parts.settings.window)
            && let Some(stored) = self.pending.pop()
        {
            self.publish(stored).await;
        }
        self.pending.read_on();
        self.parts.status.set_in_flight(self.flights.len());
        Ok(())
    }

    /// Publishes the next parked event once nothing is in flight, because it may close the channel. Continues with the
    /// one after it if the event was damaged or removed, which puts nothing in flight.
    async fn retry_parked(&mut self) -> Result<(), ReadError> {
        let spool = &self.parts.spool;
        while self.completions.is_empty()
            && let Some(stored) = self.parked.pop_front()
        {
            // Recorded before the publish: if the connection breaks, the next round starts with the other events.
            spool.settle(vec![Settlement::Tried(stored.seq)]).await;
            spool.flush().await;
            // An operator may have removed the event since it was read.
            if spool.undelivered(vec![stored.seq]).await? == [Undelivered { seq: stored.seq, parked: true }] {
                self.retrying = Some(stored.seq);
                self.last_retried = Some(stored.seq);
                self.publish(stored).await;
            }
        }
        Ok(())
    }

    async fn publish(&mut self, stored: Stored) {
        if !stored.event.is_intact() {
            return self.park_damaged(stored).await;
        }
        let (seq, event, exchange) = (stored.seq, &stored.event, &self.parts.settings.exchange);
        let envelope = Envelope::parse(&event.body).ok();
        let span = self.parts.traces.start_publish(event, exchange, message::routing_key(envelope.as_ref()));
        let message = Message::new(event, envelope.as_ref(), span.context(event).as_ref());
        self.flights.insert(seq, Flight::new(event, span));
        let publishing = flight::publish(self.channel.clone(), exchange, seq, message).await;
        self.completions.push(publishing);
    }

    /// Keeps a damaged event for an operator. Workers must not get a body that Prism did not sign.
    async fn park_damaged(&mut self, Stored { seq, event }: Stored) {
        if self.retrying.take().is_none() {
            error!(id = %event.id, seq, "parked an event whose body changed on the disk; the disk may be failing");
            self.pending.release(event.body.len());
        }
        let reason = "damaged: the body does not match its fingerprint".to_owned();
        self.parts.spool.settle(vec![Settlement::Parked { seq, reason }]).await;
    }

    async fn on_completion(&mut self, completion: Completion) -> Result<(), PublisherError> {
        match completion {
            Completion::Published { seq, outcome } => self.on_outcome(seq, outcome)?,
            Completion::Marker(confirmed) if self.returned.is_empty() => self.settle(confirmed).await,
            Completion::Marker(confirmed) => self.held.extend(confirmed),
        }
        if !self.returned.is_empty() && self.completions.is_empty() && self.confirmed.is_empty() {
            self.settle_held().await;
        }
        Ok(())
    }

    fn on_outcome(&mut self, seq: u64, outcome: PublishOutcome) -> Result<(), PublisherError> {
        let metrics = &self.parts.metrics.publish;
        let returned = match outcome {
            PublishOutcome::Acked(returned) => {
                if let Some(flight) = self.take_in_flight(seq) {
                    self.confirmed.push(flight.confirmed(seq));
                }
                self.connection_worked = true;
                if !self.nacked {
                    self.pacing.on_confirm();
                }
                returned
            }
            PublishOutcome::Nacked(returned) => {
                metrics.nacked.increment(1);
                self.parts.status.on_nack();
                if let Some(flight) = self.take_in_flight(seq) {
                    flight.span.failed("nacked");
                }
                // The next session starts again from the oldest pending event. A parked event just stays parked.
                if self.retrying != Some(seq) {
                    self.nacked = true;
                    self.pacing.on_nack();
                }
                returned
            }
            PublishOutcome::Failed(error) => return Err(classify(&error)),
            PublishOutcome::NotConfirmed => {
                return Err(PublisherError::Lost("the channel is not in confirm mode".to_owned()));
            }
        };
        if self.retrying == Some(seq) {
            self.retrying = None;
        }
        if let Some(ReturnedMessage { id, reason }) = returned {
            metrics.returned.increment(1);
            self.parts.status.request_look();
            match id {
                Some(id) => {
                    self.returned.insert(id, reason);
                }
                None => error!(%reason, "the broker returned a message that the relay did not publish"),
            }
        }
        Ok(())
    }

    /// Removes a publish whose outcome is known.
    fn take_in_flight(&mut self, seq: u64) -> Option<Flight> {
        let flight = self.flights.remove(&seq)?;
        // The body of a parked event was not read ahead.
        if self.retrying != Some(seq) {
            self.pending.release(flight.body_bytes);
        }
        Some(flight)
    }

    /// Queues a marker behind the events confirmed since the last one (rule 1).
    fn queue_marker(&mut self) {
        if !self.confirmed.is_empty() {
            let confirmed = std::mem::take(&mut self.confirmed);
            self.completions.push(Box::pin(ready(Completion::Marker(confirmed))));
        }
    }

    async fn settle(&mut self, confirmed: Vec<Confirmed>) {
        let settlements = confirmed.iter().map(|confirmed| Settlement::Confirmed(confirmed.seq)).collect();
        self.count_delivered(confirmed);
        self.parts.spool.settle(settlements).await;
    }

    /// Parks the returned events and settles the others (rule 2). Call it once every publish has its outcome.
    async fn settle_held(&mut self) {
        let (returned, delivered): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.held).into_iter().partition(|held| self.returned.contains_key(&held.id));
        let mut settlements: Vec<_> = delivered.iter().map(|delivered| Settlement::Confirmed(delivered.seq)).collect();
        self.count_delivered(delivered);
        for Confirmed { seq, id, span, .. } in returned {
            let reason = self.returned.remove(&id).unwrap_or_default();
            if self.last_retried == Some(seq) {
                debug!(%id, seq, reason, "no queue takes this event: still parked");
            } else {
                warn!(%id, seq, reason, "no queue takes this event: parked");
            }
            span.failed("returned");
            settlements.push(Settlement::Parked { seq, reason });
        }
        for (id, reason) in self.returned.drain() {
            warn!(%id, reason, "the broker returned an event without confirming it; the event is published again");
        }
        self.parts.spool.settle(settlements).await;
    }

    fn count_delivered(&self, delivered: Vec<Confirmed>) {
        let metrics = &self.parts.metrics.publish;
        metrics.confirmed.increment(delivered.len() as u64);
        self.parts.status.on_delivered(delivered.iter().map(|delivered| (delivered.seq, delivered.lag)));
        for Confirmed { lag, span, .. } in delivered {
            metrics.delivery_lag.record(lag);
            span.confirmed();
        }
    }

    fn on_connection_event(&mut self, event: LapinEvent) -> Result<(), PublisherError> {
        match event {
            LapinEvent::ConnectionBlocked(reason) => {
                warn!(reason, "the broker blocks publishers; events are kept on disk");
                self.blocked = true;
                // The alarm may last, so these are read again after it.
                self.parked.clear();
                self.parts.status.on_blocked(Some(reason));
            }
            LapinEvent::ConnectionUnblocked => {
                info!("the broker accepts publishes again");
                self.blocked = false;
                self.unblocked_at = Instant::now();
                self.parts.status.on_blocked(None);
            }
            // A publish on the channel fails with it. The watch expects it on its own channel.
            LapinEvent::Error(error) if concerns_a_channel(&error) => debug!(%error, "a channel was closed"),
            LapinEvent::Error(error) => return Err(classify(&error)),
            event => debug!(?event, "connection event"),
        }
        Ok(())
    }

    fn check_connection(&self) -> Result<(), PublisherError> {
        if !self.broker.connection.status().connected() {
            return Err(PublisherError::Lost("the connection is closed".to_owned()));
        }
        // A blocked broker keeps what it has and confirms it after the alarm. Publishing it again over another
        // connection would deliver it twice.
        if let Some((_, oldest)) = self.flights.first_key_value()
            && !self.blocked
        {
            let limit = self.parts.settings.confirm_timeout;
            if oldest.published_at.max(self.unblocked_at).elapsed() > limit {
                return Err(PublisherError::ConfirmTimeout(limit));
            }
        }
        Ok(())
    }

    /// Reads parked events that are due for a retry.
    async fn read_parked(&mut self) -> Result<(), ReadError> {
        let retry = self.parts.settings.parked_retry;
        let status = self.parts.spool.status();
        // While the spool cannot record a retry or a delivery, the same events would be tried without end.
        if !self.parked.is_empty() || status.ledger().parked == 0 || !status.takes_settlements() {
            return Ok(());
        }
        if !self.parts.status.take_retry_request() && !self.pacing.is_parked_retry_due(retry, Instant::now()) {
            return Ok(());
        }
        // The retries of the last round must be committed, or the same events would be read once more.
        self.parts.spool.flush().await;
        let (now_ms, retry_ms) =
            (Timestamp::now().as_millisecond(), i64::try_from(retry.as_millis()).unwrap_or(i64::MAX));
        let Batch { events, more } = self.parts.spool.parked_due(now_ms, retry_ms, PARKED_BATCH).await?;
        if !more {
            self.pacing.on_parked_tried(Instant::now());
        }
        self.parked.extend(events);
        Ok(())
    }

    /// Cuts the connection and settles what has an outcome by then. The next session publishes the rest again.
    async fn wind_up(&mut self) {
        self.broker.cut();
        let rest = async {
            while let Some(completion) = self.completions.next().await {
                match completion {
                    Completion::Published { seq, outcome } => {
                        // Most fail with the connection, whose error is known already.
                        let _ = self.on_outcome(seq, outcome);
                    }
                    Completion::Marker(confirmed) => self.held.extend(confirmed),
                }
            }
        };
        let complete = timeout(WIND_UP_TIMEOUT, rest).await.is_ok();
        // While a publish has no outcome, lapin may still hold a return. Twice is better than never.
        if complete && (self.returned.is_empty() || self.flights.is_empty()) {
            self.held.append(&mut self.confirmed);
            self.settle_held().await;
        }
    }

    /// The broker closed the channel over a message: finds out which one, over as many sessions as it takes.
    async fn on_refusal(&mut self, reason: &str) {
        if let Some(seq) = self.retrying {
            debug!(id = self.id_of(seq), seq, reason, "the broker still refuses this event");
            // The connection is not to blame, so the next one need not wait. The other parked events do.
            self.pacing.on_parked_tried(Instant::now());
            self.connection_worked = true;
            return;
        }
        let in_flight: Vec<_> = self.flights.keys().copied().collect();
        match self.pacing.on_refusal(&in_flight) {
            Refusal::OneOfMany => {
                info!(reason, "the broker refuses a message: publishing one event at a time to find it");
            }
            Refusal::Suspect => {}
            Refusal::Culprit(seq) => {
                warn!(id = self.id_of(seq), seq, reason, "the broker refuses this event: parked");
                if let Some(flight) = self.flights.remove(&seq) {
                    flight.span.failed("refused");
                }
                self.parts.metrics.publish.refused.increment(1);
                let parked = Settlement::Parked { seq, reason: format!("refused: {reason}") };
                self.parts.spool.settle(vec![parked]).await;
            }
        }
    }

    /// The id of an event in flight, for the log.
    fn id_of(&self, seq: u64) -> String {
        self.flights.get(&seq).map(|flight| flight.id.to_string()).unwrap_or_default()
    }
}
