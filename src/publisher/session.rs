//! One channel's life: publishes events, waits for their outcomes, and ends at the first fault. What the outcomes mean
//! is decided in [`super::window`], which event may go next in [`super::backlog`].

use std::future::ready;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use futures_util::stream::{FuturesUnordered, Stream, StreamExt};
use jiff::Timestamp;
use lapin::{Channel, Event as LapinEvent};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};
use uuid::Uuid;

use super::error::{Interruption, PublisherError};
use super::flight::{self, Completion, PublishFuture};
use super::message::{self, Message};
use super::outcome::{PublishOutcome, ReturnedMessage, classify};
use super::pacing::{Accused, Pacing};
use super::parking_log::{Cause, ParkingLog};
use super::read_ahead::ReadAhead;
use super::settings::Settings;
use super::status::Status;
use super::window::{Ended, Flight, Lane, Settled, Verdict, Window};
use crate::broker::{BrokerConnection, concerns_a_channel};
use crate::event::Envelope;
use crate::metrics::Metrics;
use crate::spool::{Batch, ReadError, Settlement, Spool, Stored};
use crate::traces::{PublishSpan, Traces};

/// How often the confirm deadline, the parked events and removed events are checked.
const TICK: Duration = Duration::from_millis(250);

/// How long the outcomes may take after the connection was cut, or the channel closed. lapin normally fails all
/// publishes at once.
const WIND_UP_TIMEOUT: Duration = Duration::from_secs(5);

/// Maximum number of parked events that are retried at a time.
const PARKED_BATCH: usize = 1000;

/// What every session of a publisher uses.
pub(super) struct Parts {
    pub spool: Spool,
    pub settings: Settings,
    pub status: Arc<Status>,
    pub traces: Arc<Traces>,
    pub metrics: Arc<Metrics>,
    pub parking_log: ParkingLog,
}

/// The events of the connection. A connection has one listener, which outlives its channels.
pub(super) type ConnectionEvents = Pin<Box<dyn Stream<Item = LapinEvent> + Send>>;

/// The deliveries over one channel.
pub(super) struct Session<'a> {
    parts: &'a Parts,
    broker: &'a BrokerConnection,
    channel: Channel,
    pacing: &'a mut Pacing,
    pending: ReadAhead,
    window: Window<PublishSpan>,
    completions: FuturesUnordered<PublishFuture>,
    /// Parked events are due for a retry.
    retry_due: bool,
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
            window: Window::default(),
            completions: FuturesUnordered::new(),
            retry_due: false,
            blocked: broker.connection.status().blocked(),
            unblocked_at: Instant::now(),
            connection_worked: false,
        }
    }

    /// Runs until the first fault; `Ok` once `drain` is cancelled and nothing is left that could be delivered.
    pub(super) async fn run(
        mut self,
        events: &mut ConnectionEvents,
        drain: &CancellationToken,
    ) -> Result<(), Interruption> {
        // The settlements of the previous session must be committed before pending events are read again.
        self.parts.spool.flush().await;
        let mut end = self.work(events, drain).await;
        self.wind_up(&end).await;
        let flights: Vec<_> = std::mem::take(&mut self.window).into_flights().collect();
        self.parts.metrics.publish.lost.increment(flights.len() as u64);
        if let Err(PublisherError::Refused(reason)) = &end
            && !self.on_refusal(reason, &flights).await
        {
            end = Err(PublisherError::Rejected(reason.clone()));
        }
        // Nothing else is published during a retry, so the next one must not follow at once.
        if matches!(end, Err(PublisherError::ConfirmTimeout(_))) {
            let retried = flights.iter().filter(|flight| flight.lane == Lane::Parked);
            let tried: Vec<_> = retried.map(|flight| Settlement::Tried(flight.stored.seq)).collect();
            if !tried.is_empty() {
                self.parts.spool.settle(tried).await;
            }
        }
        self.parts.status.set_in_flight(0);
        for flight in flights {
            flight.span.failed("lost");
        }
        end.map_err(|error| Interruption { error, connection_worked: self.connection_worked })
    }

    async fn work(&mut self, events: &mut ConnectionEvents, drain: &CancellationToken) -> Result<(), PublisherError> {
        let spool = self.parts.spool.clone();
        let (mut draining, mut ticked_at) = (false, Instant::now());
        loop {
            if ticked_at.elapsed() >= TICK {
                ticked_at = Instant::now();
                self.check_connection()?;
                self.pending.check_spool().await?;
                self.retry_due |= !draining && self.is_retry_due();
                self.parts.parking_log.report_rest();
            }
            if !draining && drain.is_cancelled() {
                draining = true;
                // Deliver everything accepted before the drain; parked events can wait for the next start.
                spool.flush().await;
                self.pending.on_commit();
                self.retry_due = false;
            }
            self.fill().await?;
            if draining && (self.is_idle() || self.blocked) {
                return Ok(());
            }
            if self.window.is_nacked() && self.completions.is_empty() {
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
                    if let Some(batch) = self.window.take_batch() {
                        self.completions.push(Box::pin(ready(Completion::Marker(batch))));
                    }
                }
                read = self.pending.finish_read(), if self.pending.is_reading() => read?,
                Some(event) = events.next() => self.on_connection_event(event)?,
                () = spool.committed().notified(), if self.pending.is_exhausted() => self.pending.on_commit(),
                () = drain.cancelled(), if !draining => {}
                () = tokio::time::sleep(TICK) => {}
            }
        }
    }

    /// Whether nothing is pending that could be delivered and nothing is in flight.
    fn is_idle(&self) -> bool {
        self.pending.is_empty() && self.completions.is_empty()
    }

    /// Publishes as many events as the window allows, and reads ahead.
    async fn fill(&mut self) -> Result<(), ReadError> {
        if !self.blocked && self.window.is_open() {
            // Nothing more is published until the events in flight are settled.
            if (self.pending.is_stale() || self.retry_due) && self.window.is_empty() {
                self.start_over().await?;
            }
            if !self.pending.is_stale() && !self.retry_due && self.window.is_open() {
                self.publish_pending().await;
            }
        }
        self.pending.read_on();
        self.parts.status.set_in_flight(self.window.in_flight());
        self.parts.status.set_waiting(self.pending.left_out());
        Ok(())
    }

    async fn publish_pending(&mut self) {
        let window = self.pacing.window(self.parts.settings.window);
        let mut parked = Parked::default();
        while self.window.in_flight() < window
            && let Some(stored) = self.pending.backlog().pop()
        {
            self.publish(stored, Lane::Pending, &mut parked).await;
        }
        self.settle_parked(parked).await;
    }

    /// Reads pending events again, or retries parked ones. Nothing is in flight.
    async fn start_over(&mut self) -> Result<(), ReadError> {
        if self.pending.is_stale() {
            self.pending.read_again().await;
            return Ok(());
        }
        self.retry_due = false;
        self.pacing.on_retry();
        // The outcomes of the last round must be committed, or the same events would be read once more.
        self.parts.spool.flush().await;
        let retry_ms = i64::try_from(self.parts.settings.parked_retry.as_millis()).unwrap_or(i64::MAX);
        let count = self.parts.settings.window.min(PARKED_BATCH);
        let now_ms = Timestamp::now().as_millisecond();
        let Batch { events, mut more } = self.parts.spool.parked_due(now_ms, retry_ms, count).await?;
        let window = self.pacing.window(count);
        let mut parked = Parked::default();
        for stored in events {
            // Events that are not published, because the broker would refuse them, do not count.
            if self.window.in_flight() >= window {
                more = true;
                break;
            }
            self.publish(stored, Lane::Parked, &mut parked).await;
        }
        if !more {
            self.pacing.on_parked_tried(Instant::now());
        }
        self.settle_parked(parked).await;
        Ok(())
    }

    /// Whether to look for parked events that are due for a retry.
    fn is_retry_due(&mut self) -> bool {
        let status = self.parts.spool.status();
        // While the spool cannot record a delivery, the same events would be tried without end.
        if status.ledger().parked == 0 || !status.takes_settlements() {
            return false;
        }
        if self.parts.status.take_retry_request() {
            self.pacing.on_retry_request();
            return true;
        }
        self.pacing.is_parked_retry_due(self.parts.settings.parked_retry, Instant::now())
    }

    /// Publishes an event, or parks it if it is damaged or the broker would refuse it.
    async fn publish(&mut self, stored: Stored, lane: Lane, parked: &mut Parked) {
        if !stored.event.is_intact() {
            // Workers must not get a body that Prism did not sign.
            let reason = "damaged: the body does not match its fingerprint".to_owned();
            return self.park_untried(&stored, lane, Cause::Damaged, reason, parked);
        }
        let (seq, event, exchange) = (stored.seq, &stored.event, &self.parts.settings.exchange);
        let envelope = Envelope::parse(&event.body).ok();
        let key = message::routing_key(envelope.as_ref());
        if let Some(reason) = self.pacing.refusals.reason(key, event.body.len(), Instant::now()) {
            let reason = format!("refused: {reason}");
            return self.park_untried(&stored, lane, Cause::Refused, reason, parked);
        }
        let span = self.parts.traces.start_publish(event, exchange, key);
        let message = Message::new(event, envelope.as_ref(), span.context(event).as_ref());
        self.window.published(Flight { stored, lane, published_at: Instant::now(), span });
        let publishing = flight::publish(self.channel.clone(), exchange, seq, message).await;
        self.completions.push(publishing);
    }

    fn park_untried(&mut self, stored: &Stored, lane: Lane, cause: Cause, reason: String, parked: &mut Parked) {
        let seq = stored.seq;
        match lane {
            Lane::Pending => {
                self.pending.backlog().release(stored.event.body.len());
                self.pending.backlog().parked(stored.event.subject);
                parked.add(cause, stored.event.id, &reason);
                parked.settlements.push(Settlement::Parked { seq, reason });
            }
            Lane::Parked => parked.settlements.push(Settlement::Tried(seq)),
        }
    }

    /// Records the events that [`Self::publish`] parked.
    async fn settle_parked(&mut self, parked: Parked) {
        if !parked.settlements.is_empty() {
            self.log_parked(&parked);
            self.parts.spool.settle(parked.settlements).await;
        }
    }

    fn log_parked(&self, parked: &Parked) {
        for ParkedEvents { cause, count, example, reason } in &parked.events {
            if *cause == Cause::Refused {
                self.parts.metrics.publish.refused.increment(*count);
            }
            self.parts.parking_log.parked(*cause, *count, *example, reason);
        }
    }

    async fn on_completion(&mut self, completion: Completion) -> Result<(), PublisherError> {
        match completion {
            Completion::Published { seq, outcome } => self.on_outcome(seq, outcome).await?,
            Completion::Marker(batch) => self.window.marker(batch),
        }
        let settled = self.window.settle();
        self.on_settled(settled).await;
        Ok(())
    }

    async fn on_outcome(&mut self, seq: u64, outcome: PublishOutcome) -> Result<(), PublisherError> {
        let (verdict, returned) = match outcome {
            PublishOutcome::Acked(returned) => (Verdict::Acked, returned),
            PublishOutcome::Nacked(returned) => (Verdict::Nacked, returned),
            PublishOutcome::Failed(error) => return Err(classify(&error)),
            PublishOutcome::NotConfirmed => {
                return Err(PublisherError::Lost("the channel is not in confirm mode".to_owned()));
            }
        };
        if let Some(ReturnedMessage { id, reason }) = returned {
            self.parts.metrics.publish.returned.increment(1);
            self.parts.status.request_look();
            match id {
                Some(id) => self.window.returned(id, reason),
                None => error!(%reason, "the broker returned a message that the relay did not publish"),
            }
        }
        let Some(Ended { lane, body_bytes, nacked }) =
            self.window.outcome(seq, verdict, Timestamp::now().as_millisecond())
        else {
            return Ok(());
        };
        if lane == Lane::Pending {
            self.pending.backlog().release(body_bytes);
        }
        match nacked {
            None => {
                self.connection_worked = true;
                if !self.window.is_nacked() {
                    self.pacing.on_confirm();
                }
            }
            Some(span) => {
                span.failed("nacked");
                self.parts.metrics.publish.nacked.increment(1);
                self.parts.status.on_nack();
                match lane {
                    Lane::Pending => self.pacing.on_nack(),
                    Lane::Parked => self.parts.spool.settle(vec![Settlement::Tried(seq)]).await,
                }
            }
        }
        Ok(())
    }

    /// Records events that were delivered or returned, and lets the next ones of their subjects go.
    async fn on_settled(&mut self, settled: Settled<PublishSpan>) {
        if settled.is_empty() {
            return;
        }
        let settlements = settled.settlements();
        let Settled { delivered, returned, unconfirmed_returns } = settled;
        let metrics = &self.parts.metrics.publish;
        metrics.confirmed.increment(delivered.len() as u64);
        self.parts.status.on_delivered(delivered.iter().map(|event| (event.seq, event.lag)));
        for event in delivered {
            match event.lane {
                Lane::Pending => self.pending.backlog().delivered(event.subject),
                Lane::Parked if event.subject.is_some() => self.pending.on_parked_delivered(),
                Lane::Parked => {}
            }
            metrics.delivery_lag.record(event.lag);
            event.span.confirmed();
        }
        let mut parked = Parked::default();
        for (event, reason) in returned {
            match event.lane {
                Lane::Pending => {
                    self.pending.backlog().parked(event.subject);
                    parked.add(Cause::Returned, event.id, &reason);
                }
                Lane::Parked => {
                    debug!(id = %event.id, seq = event.seq, reason, "no queue takes this event: still parked")
                }
            }
            event.span.failed("returned");
        }
        for id in unconfirmed_returns {
            warn!(%id, "the broker returned an event without confirming it; the event is published again");
        }
        self.log_parked(&parked);
        self.parts.spool.settle(settlements).await;
    }

    fn on_connection_event(&mut self, event: LapinEvent) -> Result<(), PublisherError> {
        match event {
            LapinEvent::ConnectionBlocked(reason) => {
                warn!(reason, "the broker blocks publishers; events are kept on disk");
                self.blocked = true;
                self.parts.status.on_blocked(Some(reason));
            }
            LapinEvent::ConnectionUnblocked => {
                info!("the broker accepts publishes again");
                self.blocked = false;
                self.unblocked_at = Instant::now();
                // An operator may have removed events meanwhile.
                self.pending.on_removal();
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
        if let Some(oldest) = self.window.oldest()
            && !self.blocked
        {
            let limit = self.parts.settings.confirm_timeout;
            if oldest.max(self.unblocked_at).elapsed() > limit {
                return Err(PublisherError::ConfirmTimeout(limit));
            }
        }
        Ok(())
    }

    /// Ends the publishes in flight and settles what has an outcome by then. The next session publishes the rest again.
    async fn wind_up(&mut self, end: &Result<(), PublisherError>) {
        // After a refusal lapin fails the publishes on the channel, and the connection may go on.
        let refused = matches!(end, Err(PublisherError::Refused(_)));
        if !refused && !self.completions.is_empty() {
            self.broker.cut();
        }
        let mut complete = timeout(WIND_UP_TIMEOUT, self.rest()).await.is_ok();
        if refused && !complete {
            self.broker.cut();
            complete = timeout(WIND_UP_TIMEOUT, self.rest()).await.is_ok();
        }
        let settled = self.window.wind_up(complete);
        self.on_settled(settled).await;
    }

    /// Takes the outcomes of all publishes in flight.
    async fn rest(&mut self) {
        while let Some(completion) = self.completions.next().await {
            match completion {
                Completion::Published { seq, outcome } => {
                    // Most fail with the connection, whose error is known already.
                    let _ = self.on_outcome(seq, outcome).await;
                }
                Completion::Marker(batch) => self.window.marker(batch),
            }
        }
    }

    /// The broker closed the channel over a message: parks the culprits, if they are known by now. Returns whether the
    /// next session may try at once, because this one found something out.
    async fn on_refusal(&mut self, reason: &str, flights: &[Flight<PublishSpan>]) -> bool {
        let envelopes: Vec<_> = flights.iter().map(|flight| Envelope::parse(&flight.stored.event.body).ok()).collect();
        let accused: Vec<_> = flights.iter().zip(&envelopes).map(accused).collect();
        let keep = self.parts.settings.parked_retry;
        let culprits = self.pacing.on_refusal(reason, &accused, keep, Instant::now());
        let mut parked = Parked::default();
        for flight in flights.iter().filter(|flight| culprits.contains(&flight.stored.seq)) {
            let (seq, id) = (flight.stored.seq, flight.stored.event.id);
            let reason = format!("refused: {reason}");
            match flight.lane {
                Lane::Pending => parked.add(Cause::Refused, id, &reason),
                Lane::Parked => debug!(%id, seq, reason, "the broker still refuses this event"),
            }
            parked.settlements.push(Settlement::Parked { seq, reason });
        }
        self.settle_parked(parked).await;
        // What the spool cannot record is published again, and refused again.
        !flights.is_empty() && self.parts.spool.status().takes_settlements()
    }
}

/// What the pacing has to know of an event in flight.
fn accused<'a>((flight, envelope): (&Flight<PublishSpan>, &'a Option<Envelope<'a>>)) -> Accused<'a> {
    Accused {
        seq: flight.stored.seq,
        key: message::routing_key(envelope.as_ref()),
        bytes: flight.stored.event.body.len(),
        parked: flight.lane == Lane::Parked,
    }
}

/// Events that were parked together.
#[derive(Default)]
struct Parked {
    settlements: Vec<Settlement>,
    /// Newly parked events, for the log.
    events: Vec<ParkedEvents>,
}

/// Events parked for one cause.
struct ParkedEvents {
    cause: Cause,
    count: u64,
    example: Uuid,
    reason: String,
}

impl Parked {
    fn add(&mut self, cause: Cause, example: Uuid, reason: &str) {
        match self.events.iter_mut().find(|events| events.cause == cause) {
            Some(events) => events.count += 1,
            None => self.events.push(ParkedEvents { cause, count: 1, example, reason: reason.to_owned() }),
        }
    }
}
