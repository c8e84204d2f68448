//! One channel's life: publishes events, waits for their outcomes, and ends at the first fault. Only the select loop
//! and I/O. Decided elsewhere: what is next, and what outcomes mean, in [`super::window`]; which event may go in
//! [`super::backlog`]; how many events in [`super::pacing`]; what is parked in [`super::parking`].

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

use super::error::{Interruption, PublisherError};
use super::flight::{self, Completion, PublishFuture};
use super::message::{self, Message};
use super::outcome::{Answer, ReturnedMessage, classify};
use super::pacing::{Accused, Pacing};
use super::parking::{Group, Parking, Reason};
use super::parking_log::{Cause, ParkingLog};
use super::read_ahead::ReadAhead;
use super::settings::Settings;
use super::status::Status;
use super::window::{Flight, Lane, Next, Settled, Window};
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
        let mut window = Window::default();
        window.set_blocked(broker.connection.status().blocked(), Instant::now());
        Self {
            parts,
            broker,
            channel,
            pacing,
            pending: ReadAhead::new(parts.spool.clone(), parts.settings.window),
            window,
            completions: FuturesUnordered::new(),
            retry_due: false,
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
        let flights = self.window.take_flights();
        self.parts.metrics.publish.lost.increment(flights.len() as u64);
        match &end {
            Err(PublisherError::Refused(reply)) => end = Err(self.on_refusal(reply, &flights).await),
            Err(PublisherError::ConfirmTimeout(_)) => self.record(Parking::unconfirmed(&flights)).await,
            _ => {}
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
            if let Some(end) = self.window.end(draining, self.pending.is_empty()) {
                return end;
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

    /// Publishes as many events as the window allows, and reads ahead.
    async fn fill(&mut self) -> Result<(), ReadError> {
        match self.next() {
            Next::ReadAgain => self.pending.read_again().await,
            Next::RetryParked => self.retry_parked().await?,
            Next::Publish | Next::Wait => {}
        }
        if self.next() == Next::Publish {
            self.publish_pending().await;
        }
        self.pending.read_on();
        self.parts.status.set_in_flight(self.window.in_flight());
        self.parts.status.set_waiting(self.pending.left_out());
        Ok(())
    }

    fn next(&self) -> Next {
        self.window.next(self.pending.is_stale(), self.retry_due)
    }

    async fn publish_pending(&mut self) {
        let limit = self.pacing.window(self.parts.settings.window);
        let mut parking = Parking::default();
        while self.window.in_flight() < limit
            && let Some(stored) = self.pending.backlog().pop()
        {
            self.publish(stored, Lane::Pending, &mut parking).await;
        }
        self.record(parking).await;
    }

    /// Retries the parked events that are due. Nothing is in flight.
    async fn retry_parked(&mut self) -> Result<(), ReadError> {
        self.retry_due = false;
        self.pacing.on_retry();
        // The outcomes of the last round must be committed, or the same events would be read once more.
        self.parts.spool.flush().await;
        let retry_ms = i64::try_from(self.parts.settings.parked_retry.as_millis()).unwrap_or(i64::MAX);
        let count = self.parts.settings.window.min(PARKED_BATCH);
        let now_ms = Timestamp::now().as_millisecond();
        let Batch { events, more } = self.parts.spool.parked_due(now_ms, retry_ms, count).await?;
        let (limit, mut events) = (self.pacing.window(count), events.into_iter());
        let mut parking = Parking::default();
        while self.window.in_flight() < limit
            && let Some(stored) = events.next()
        {
            self.publish(stored, Lane::Parked, &mut parking).await;
        }
        if !more && events.len() == 0 {
            self.pacing.on_parked_tried(Instant::now());
        }
        self.record(parking).await;
        Ok(())
    }

    fn is_retry_due(&mut self) -> bool {
        let (spool, status) = (self.parts.spool.status(), &self.parts.status);
        let (parked, settles) = (spool.ledger().parked, spool.takes_settlements());
        let (interval, now) = (self.parts.settings.parked_retry, Instant::now());
        self.pacing.is_retry_due(parked, settles, || status.take_retry_request(), interval, now)
    }

    /// Publishes an event, or parks it if it is damaged or the broker would refuse it.
    async fn publish(&mut self, stored: Stored, lane: Lane, parking: &mut Parking) {
        let (seq, event, exchange) = (stored.seq, &stored.event, &self.parts.settings.exchange);
        let envelope = Envelope::parse(&event.body).ok();
        let key = message::routing_key(envelope.as_ref());
        if let Some(reason) = Reason::against(event, key, &self.pacing.refusals, Instant::now()) {
            self.pending.backlog().untried(&stored, lane);
            return parking.untried(&stored, lane, reason);
        }
        let span = self.parts.traces.start_publish(event, exchange, key);
        let message = Message::new(event, envelope.as_ref(), span.context(event).as_ref());
        self.window.published(Flight { stored, lane, published_at: Instant::now(), span });
        let publishing = flight::publish(self.channel.clone(), exchange, seq, message).await;
        self.completions.push(publishing);
    }

    /// Logs and records what was parked.
    async fn record(&mut self, Parking { settlements, groups }: Parking) {
        for Group { cause, count, example, reason } in groups {
            if cause == Cause::Refused {
                self.parts.metrics.publish.refused.increment(count);
            }
            self.parts.parking_log.parked(cause, count, example, &reason);
        }
        if !settlements.is_empty() {
            self.parts.spool.settle(settlements).await;
        }
    }

    async fn on_completion(&mut self, completion: Completion) -> Result<(), PublisherError> {
        match completion {
            Completion::Published { seq, answer } => self.on_answer(seq, answer?).await,
            Completion::Marker(batch) => self.window.marker(batch),
        }
        let settled = self.window.settle();
        self.on_settled(settled).await;
        Ok(())
    }

    async fn on_answer(&mut self, seq: u64, Answer { verdict, returned }: Answer) {
        if let Some(ReturnedMessage { id, reason }) = returned {
            self.parts.metrics.publish.returned.increment(1);
            self.parts.status.request_look();
            match id {
                Some(id) => self.window.returned(id, reason),
                None => error!(%reason, "the broker returned a message that the relay did not publish"),
            }
        }
        let now_ms = Timestamp::now().as_millisecond();
        let Some(ended) = self.window.outcome(seq, verdict, now_ms) else { return };
        self.pending.backlog().release(ended.released);
        self.pacing.on_outcome(&ended);
        let Some(span) = ended.nacked else {
            self.connection_worked = true;
            return;
        };
        span.failed("nacked");
        self.parts.metrics.publish.nacked.increment(1);
        self.parts.status.on_nack();
        if ended.lane == Lane::Parked {
            self.parts.spool.settle(vec![Settlement::Tried(seq)]).await;
        }
    }

    /// Records events that were delivered or returned, and lets the next ones of their subjects go.
    async fn on_settled(&mut self, settled: Settled<PublishSpan>) {
        if settled.is_empty() {
            return;
        }
        let parking = Parking::settled(&settled);
        let Settled { delivered, returned, unconfirmed_returns } = settled;
        let metrics = &self.parts.metrics.publish;
        metrics.confirmed.increment(delivered.len() as u64);
        self.parts.status.on_delivered(delivered.iter().map(|event| (event.seq, event.lag)));
        for event in delivered {
            self.pending.on_delivered(event.lane, event.subject);
            metrics.delivery_lag.record(event.lag);
            event.span.confirmed();
        }
        for (event, reason) in returned {
            match event.lane {
                Lane::Pending => self.pending.backlog().parked(event.subject),
                Lane::Parked => {
                    debug!(id = %event.id, seq = event.seq, reason, "no queue takes this event: still parked")
                }
            }
            event.span.failed("returned");
        }
        for id in unconfirmed_returns {
            warn!(%id, "the broker returned an event without confirming it; the event is published again");
        }
        self.record(parking).await;
    }

    fn on_connection_event(&mut self, event: LapinEvent) -> Result<(), PublisherError> {
        match event {
            LapinEvent::ConnectionBlocked(reason) => {
                warn!(reason, "the broker blocks publishers; events are kept on disk");
                self.window.set_blocked(true, Instant::now());
                self.parts.status.on_blocked(Some(reason));
            }
            LapinEvent::ConnectionUnblocked => {
                info!("the broker accepts publishes again");
                self.window.set_blocked(false, Instant::now());
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
        self.window.check_deadline(self.parts.settings.confirm_timeout, Instant::now())
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
                Completion::Published { seq, answer: Ok(answer) } => self.on_answer(seq, answer).await,
                // It failed with the connection, whose error is known already.
                Completion::Published { answer: Err(_), .. } => {}
                Completion::Marker(batch) => self.window.marker(batch),
            }
        }
    }

    /// The broker closed the channel over a message: parks the culprits, if they are known by now. Returns why the
    /// session ended.
    async fn on_refusal(&mut self, reply: &str, flights: &[Flight<PublishSpan>]) -> PublisherError {
        let accused: Vec<_> = flights.iter().map(Accused::from).collect();
        let keep = self.parts.settings.parked_retry;
        let culprits = self.pacing.on_refusal(reply, &accused, keep, Instant::now());
        debug!(?culprits, reply, "the broker refuses events");
        self.record(Parking::refused(flights, &culprits, reply)).await;
        PublisherError::after_refusal(reply, flights.len(), self.parts.spool.status().takes_settlements())
    }
}
