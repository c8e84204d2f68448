//! One channel's life: fill the window, settle what is confirmed, end at the first sign of trouble.
//!
//! Three rules keep promise 3, "leaves only when delivered":
//!
//! - A confirmed event is settled only once no return can be about it any more. The broker sends a return before the
//!   event's own confirm, but lapin hands it to whichever confirm completes next: so when an event's confirm completes,
//!   either its return has been handed out before, or this very confirm carries some return. Each batch of confirmed events is
//!   therefore followed through the queue of futures, which is first in, first out, by a marker: when the marker comes
//!   out, everything that had completed before it has been seen, and a return among it is known.
//! - Once a return has been seen, nothing is published or settled until every publish in flight has its outcome: by then
//!   every return has been handed out.
//! - A confirm that does not come in time ends the session: some never come.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::future::ready;
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use futures_util::stream::{FuturesUnordered, StreamExt};
use jiff::Timestamp;
use lapin::{Channel, Event as LapinEvent};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};
use uuid::Uuid;

use super::ahead::Ahead;
use super::careful::{Careful, Lesson};
use super::flight::{self, Completion, Confirmed, Flight, OnItsWay};
use super::message::{self, Message};
use super::outcome::{Outcome, Return, classify};
use super::{Publisher, PublisherError};
use crate::broker::BrokerConnection;
use crate::event::Envelope;
use crate::spool::{Batch, ReadError, Settlement, Stored};

/// How often deadlines and parked events are looked at.
const TICK: Duration = Duration::from_millis(250);

/// Once the wire is cut, lapin fails everything in flight at once; this is for the case that it does not.
const WIND_UP_TIMEOUT: Duration = Duration::from_secs(5);

/// Parked events tried in one go, one by one.
const PARKED_AT_A_TIME: usize = 100;

/// One connection's worth of deliveries.
pub(super) struct Session<'a> {
    publisher: &'a Publisher,
    link: &'a BrokerConnection,
    channel: Channel,
    careful: &'a mut Careful,

    ahead: Ahead,
    /// Parked events, to be tried one by one while nothing else is in flight.
    parked: VecDeque<Stored>,
    trying_parked: Option<u64>,
    /// What becomes of it is known already, unless it is delivered.
    last_retried: Option<u64>,

    completions: FuturesUnordered<OnItsWay>,
    flights: BTreeMap<u64, Flight>,
    /// Since the last marker.
    confirmed: Vec<Confirmed>,
    /// Past their marker, but held back because of a return.
    held: Vec<Confirmed>,
    returned: HashMap<Uuid, String>,
    nacked: bool,
    blocked: bool,
    /// Confirms are not expected to hurry before this time.
    patience_from: Instant,
    progress: bool,
}

impl<'a> Session<'a> {
    pub fn new(
        publisher: &'a Publisher,
        link: &'a BrokerConnection,
        channel: Channel,
        careful: &'a mut Careful,
    ) -> Self {
        let now = Instant::now();
        Self {
            publisher,
            link,
            channel,
            careful,
            ahead: Ahead::new(publisher.spool.clone(), publisher.settings.window),
            parked: VecDeque::new(),
            trying_parked: None,
            last_retried: None,
            completions: FuturesUnordered::new(),
            flights: BTreeMap::new(),
            confirmed: Vec::new(),
            held: Vec::new(),
            returned: HashMap::new(),
            nacked: false,
            blocked: false,
            patience_from: now,
            progress: false,
        }
    }

    /// Runs until something is amiss; `Ok` once `drain` is cancelled and there is nothing left that could be delivered.
    /// The flag tells whether anything was confirmed.
    pub async fn run(mut self, drain: &CancellationToken) -> (bool, Result<(), PublisherError>) {
        // What an earlier session has settled must be gone before the spool is read anew.
        self.publisher.spool.flush().await;
        let end = self.work(drain).await;
        if end.is_err() || !self.completions.is_empty() {
            self.wind_up().await;
        }
        let refused = match &end {
            Err(PublisherError::Poison(reason)) => self.learn_from(reason).await,
            _ => 0,
        };
        self.publisher.metrics.publish.lost.increment(self.flights.len() as u64 - refused);
        self.publisher.status.set_in_flight(0);
        for flight in std::mem::take(&mut self.flights).into_values() {
            flight.trace.failed("lost");
        }
        (self.progress, end)
    }

    async fn work(&mut self, drain: &CancellationToken) -> Result<(), PublisherError> {
        let mut events = Box::pin(self.link.connection.events_listener());
        let spool = self.publisher.spool.clone();
        let (mut draining, mut ticked_at) = (false, Instant::now());
        loop {
            if ticked_at.elapsed() >= TICK {
                ticked_at = Instant::now();
                self.tick(draining).await?;
            }
            if !draining && drain.is_cancelled() {
                draining = true;
                // A last look at everything that came in before; parked events can wait for the next start.
                spool.flush().await;
                self.ahead.look_again();
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
                // Completions first: when the broker closes the channel, they know why; the error of the connection,
                // which often follows, does not.
                biased;
                Some(completion) = self.completions.next(), if !self.completions.is_empty() => {
                    self.complete(completion).await?;
                    // Take what else is ready, so that the spool gets few large settlements.
                    while let Some(Some(completion)) = self.completions.next().now_or_never() {
                        self.complete(completion).await?;
                    }
                    self.mark();
                }
                read = self.ahead.take_in(), if self.ahead.is_reading() => read?,
                Some(event) = events.next() => self.heed(event)?,
                () = spool.committed().notified(), if self.ahead.is_exhausted() => self.ahead.look_again(),
                () = drain.cancelled(), if !draining => {}
                () = tokio::time::sleep(TICK) => {}
            }
        }
    }

    /// Nothing to do, nothing under way.
    fn is_idle(&self) -> bool {
        self.ahead.is_over() && self.completions.is_empty()
    }

    fn may_publish(&self) -> bool {
        !self.blocked && !self.nacked && self.returned.is_empty() && self.trying_parked.is_none()
    }

    /// Publishes what may be published now, and reads ahead.
    async fn fill(&mut self) -> Result<(), ReadError> {
        if self.may_publish() && !self.parked.is_empty() {
            // Alone, because such an event may take the channel down with it: what is in flight is awaited first. One that is
            // damaged, or was removed, puts nothing in flight.
            while self.completions.is_empty()
                && let Some(stored) = self.parked.pop_front()
            {
                // Noted before the try: should the connection break, the others are not held up by it again at once.
                self.publisher.spool.settle(vec![Settlement::Tried(stored.seq)]).await;
                self.publisher.spool.flush().await;
                // An operator may have removed it since it was read.
                if self.publisher.spool.states(vec![stored.seq]).await? == [(stored.seq, true)] {
                    self.trying_parked = Some(stored.seq);
                    self.last_retried = Some(stored.seq);
                    self.publish(stored).await;
                }
            }
            return Ok(());
        }
        while self.may_publish()
            && let Some(seq) = self.ahead.next_seq()
            && self.flights.len() < self.careful.window(seq, self.publisher.settings.window)
            && let Some(stored) = self.ahead.pop()
        {
            self.publish(stored).await;
        }
        self.ahead.read_on();
        self.publisher.status.set_in_flight(self.flights.len());
        Ok(())
    }

    async fn publish(&mut self, stored: Stored) {
        if !stored.event.is_intact() {
            return self.park_damaged(stored).await;
        }
        let (seq, event, exchange) = (stored.seq, &stored.event, &self.publisher.settings.exchange);
        let envelope = Envelope::parse(&event.body).ok();
        let span = self.publisher.traces.publishing(event, exchange, message::routing_key(envelope.as_ref()));
        let message = Message::new(event, envelope.as_ref(), span.context(event).as_ref());
        self.flights.insert(seq, Flight::of(event, span));
        let publishing = flight::publish(self.channel.clone(), exchange, seq, message).await;
        self.completions.push(publishing);
    }

    /// The signed bytes are gone. What is left is kept for people to look at; workers must not get it.
    async fn park_damaged(&mut self, Stored { seq, event }: Stored) {
        if self.trying_parked.take().is_none() {
            error!(id = %event.id, seq, "the body has changed on the disk: parked");
            self.ahead.done_with(event.body.len());
        }
        let reason = "damaged: the body does not match its fingerprint".to_owned();
        self.publisher.spool.settle(vec![Settlement::Parked { seq, reason }]).await;
    }

    async fn complete(&mut self, completion: Completion) -> Result<(), PublisherError> {
        match completion {
            Completion::Published(seq, outcome) => self.note(seq, outcome)?,
            Completion::Marker(confirmed) if self.returned.is_empty() => self.settle(confirmed).await,
            Completion::Marker(confirmed) => self.held.extend(confirmed),
        }
        if !self.returned.is_empty() && self.completions.is_empty() && self.confirmed.is_empty() {
            self.settle_held().await;
        }
        Ok(())
    }

    fn note(&mut self, seq: u64, outcome: Outcome) -> Result<(), PublisherError> {
        let metrics = &self.publisher.metrics;
        let returned = match outcome {
            Outcome::Acked(returned) => {
                if let Some(flight) = self.land(seq) {
                    self.confirmed.push(Confirmed { seq, id: flight.id, lag: flight.age(), trace: flight.trace });
                }
                self.progress = true;
                if !self.nacked {
                    self.careful.confirmed();
                }
                returned
            }
            Outcome::Nacked(returned) => {
                // It stays in the spool; the order is kept by starting again from the oldest. A parked one has time.
                metrics.publish.nacked.increment(1);
                if let Some(flight) = self.land(seq) {
                    flight.trace.failed("nacked");
                }
                if self.trying_parked != Some(seq) {
                    self.nacked = true;
                    self.careful.nacked();
                }
                returned
            }
            Outcome::Failed(error) => return Err(classify(&error)),
            Outcome::NotConfirmed => return Err(PublisherError::Lost("the channel is not in confirm mode".to_owned())),
        };
        if self.trying_parked == Some(seq) {
            self.trying_parked = None;
        }
        if let Some(Return { id, reason }) = returned {
            metrics.publish.returned.increment(1);
            match id {
                Some(id) => {
                    self.returned.insert(id, reason);
                }
                None => error!(%reason, "the broker returned a message that is not ours"),
            }
        }
        Ok(())
    }

    /// Its outcome is known.
    fn land(&mut self, seq: u64) -> Option<Flight> {
        let flight = self.flights.remove(&seq)?;
        // A parked event was not read ahead, and not counted.
        if self.trying_parked != Some(seq) {
            self.ahead.done_with(flight.bytes);
        }
        Some(flight)
    }

    /// Sends the newly confirmed events through the queue of completions. See the module's first rule.
    fn mark(&mut self) {
        if !self.confirmed.is_empty() {
            let confirmed = std::mem::take(&mut self.confirmed);
            self.completions.push(Box::pin(ready(Completion::Marker(confirmed))));
        }
    }

    async fn settle(&mut self, confirmed: Vec<Confirmed>) {
        let settlements = confirmed.iter().map(|confirmed| Settlement::Confirmed(confirmed.seq)).collect();
        self.delivered(confirmed);
        self.publisher.spool.settle(settlements).await;
    }

    /// Every publish has its outcome: now it is known which events came back.
    async fn settle_held(&mut self) {
        let (returned, delivered): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.held).into_iter().partition(|held| self.returned.contains_key(&held.id));
        let mut settlements: Vec<_> = delivered.iter().map(|delivered| Settlement::Confirmed(delivered.seq)).collect();
        self.delivered(delivered);
        for Confirmed { seq, id, trace, .. } in returned {
            let reason = self.returned.remove(&id).unwrap_or_default();
            if self.last_retried == Some(seq) {
                debug!(%id, seq, reason, "still no queue takes this event");
            } else {
                warn!(%id, seq, reason, "no queue takes this event: parked");
            }
            trace.failed("returned");
            settlements.push(Settlement::Parked { seq, reason });
        }
        for (id, reason) in self.returned.drain() {
            warn!(%id, reason, "the broker returned an event that it did not confirm; it is published again");
        }
        self.publisher.spool.settle(settlements).await;
    }

    /// Confirmed, and not returned.
    fn delivered(&self, confirmed: Vec<Confirmed>) {
        let metrics = &self.publisher.metrics.publish;
        metrics.confirmed.increment(confirmed.len() as u64);
        self.publisher.status.delivered(confirmed.iter().map(|confirmed| (confirmed.seq, confirmed.lag)));
        for Confirmed { lag, trace, .. } in confirmed {
            metrics.delivery_lag.record(lag);
            trace.confirmed();
        }
    }

    fn heed(&mut self, event: LapinEvent) -> Result<(), PublisherError> {
        match event {
            LapinEvent::ConnectionBlocked(reason) => {
                warn!(reason, "the broker blocks publishers; events are kept on disk");
                self.blocked = true;
                // They are read anew after the alarm, which may last.
                self.parked.clear();
                self.publisher.status.blocked(Some(reason));
            }
            LapinEvent::ConnectionUnblocked => {
                info!("the broker takes publishes again");
                self.blocked = false;
                self.patience_from = Instant::now();
                self.publisher.status.blocked(None);
            }
            LapinEvent::Error(error) => return Err(classify(&error)),
            event => debug!(?event, "connection"),
        }
        Ok(())
    }

    async fn tick(&mut self, draining: bool) -> Result<(), PublisherError> {
        if !self.link.connection.status().connected() {
            return Err(PublisherError::Lost("the connection is closed".to_owned()));
        }
        // While blocked the broker holds what it has; it confirms after the alarm. Published again elsewhere, it would
        // be there twice.
        if let Some((_, oldest)) = self.flights.first_key_value()
            && !self.blocked
        {
            let limit = self.publisher.settings.confirm_timeout;
            if oldest.published_at.max(self.patience_from).elapsed() > limit {
                return Err(PublisherError::ConfirmTimeout(limit));
            }
        }
        if !draining {
            self.look_at_parked().await?;
        }
        Ok(())
    }

    async fn look_at_parked(&mut self) -> Result<(), ReadError> {
        let retry = self.publisher.settings.parked_retry;
        let gauges = self.publisher.spool.gauges();
        // What cannot be noted as tried, or as delivered, would be tried without end.
        if !self.parked.is_empty() || gauges.ledger().parked == 0 || !gauges.takes_settlements() {
            return Ok(());
        }
        if !self.publisher.status.is_retry_asked() && !self.careful.parked_are_due(retry) {
            return Ok(());
        }
        // The last round's tries have to be on record, or they would be read once more.
        self.publisher.spool.flush().await;
        let (now_ms, retry_ms) =
            (Timestamp::now().as_millisecond(), i64::try_from(retry.as_millis()).unwrap_or(i64::MAX));
        let Batch { events, more } = self.publisher.spool.parked_due(now_ms, retry_ms, PARKED_AT_A_TIME).await?;
        if !more {
            self.careful.parked_were_tried(Instant::now());
        }
        self.parked.extend(events);
        Ok(())
    }

    /// The session is over: what has come in by now still counts, the rest is published again.
    async fn wind_up(&mut self) {
        self.link.cut();
        let rest = async {
            while let Some(completion) = self.completions.next().await {
                match completion {
                    Completion::Published(seq, outcome) => {
                        // Most have failed with the connection, and that is known.
                        let _ = self.note(seq, outcome);
                    }
                    Completion::Marker(confirmed) => self.held.extend(confirmed),
                }
            }
        };
        let complete = timeout(WIND_UP_TIMEOUT, rest).await.is_ok();
        // With a publish that has no outcome, a return may still be in lapin's hands: better twice than never.
        if complete && (self.returned.is_empty() || self.flights.is_empty()) {
            self.held.append(&mut self.confirmed);
            self.settle_held().await;
        }
    }

    /// The broker has closed the channel over a message: finds out which one, over as many sessions as it takes. Returns
    /// how many events it has parked.
    async fn learn_from(&mut self, reason: &str) -> u64 {
        if let Some(seq) = self.trying_parked {
            // As before. The connection is not to blame, so the next one need not wait; the other parked events do.
            debug!(id = self.id_of(seq), seq, reason, "the broker still refuses this event");
            self.careful.parked_were_tried(Instant::now());
            self.progress = true;
            return 0;
        }
        let (alone, last) = match (self.flights.first_key_value(), self.flights.last_key_value()) {
            (Some((first, _)), Some((last, _))) => ((first == last).then_some(*first), Some(*last)),
            _ => (None, None),
        };
        match self.careful.refused(alone, last) {
            Lesson::OneOfMany => {
                info!(reason, "the broker refuses a message: publishing one by one until it is known which");
                0
            }
            Lesson::Suspect => 0,
            Lesson::Culprit(seq) => {
                warn!(id = self.id_of(seq), seq, reason, "the broker refuses this event: parked");
                self.publisher.metrics.publish.refused.increment(1);
                let parked = Settlement::Parked { seq, reason: format!("refused: {reason}") };
                self.publisher.spool.settle(vec![parked]).await;
                1
            }
        }
    }

    /// Of an event in flight, for the log.
    fn id_of(&self, seq: u64) -> String {
        self.flights.get(&seq).map(|flight| flight.id.to_string()).unwrap_or_default()
    }
}
