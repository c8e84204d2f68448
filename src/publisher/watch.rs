//! Looks at queues, exchanges and bindings while the relay delivers, and reports what is missing and what cannot take
//! messages.
//!
//! It has a channel of its own on the publisher's connection. Where the broker does not allow a second channel, it asks
//! for one over a connection of its own: RabbitMQ closes the connection that opens a channel too many. It never deletes
//! anything.

use std::convert::Infallible;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use lapin::Channel;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::status::{QueueState, QueueTrouble, Status, WatchState};
use crate::broker::{BrokerConnection, Management, ManagementError};
use crate::metrics::Metrics;
use crate::text::chain;
use crate::topology::{
    Commands, Declare, Live, LiveEntity, Looker, Plan, QueueLook, QueueRole, Trouble, missing_bindings,
};

/// The shortest time between two looks, however many are requested.
const PAUSE: Duration = Duration::from_secs(1);

/// How long after a line about a nack without a known reason the next one follows.
const UNEXPLAINED_AGAIN: Duration = Duration::from_secs(600);

/// Maximum time for a look that events wait for.
const EARLY_LOOK: Duration = Duration::from_secs(2);

/// For so many intervals a nack counts as recent, at least.
const NACK_COUNTS_FOR: u32 = 4;

/// How long the management API is left alone after it refused a login: RabbitMQ logs each one.
const API_PAUSE: Duration = Duration::from_secs(600);

/// How long after the broker did not allow a second channel a new connection of the publisher asks for one again, and
/// the longest time between two tries over a connection of its own. The channels of a dead connection may have counted,
/// until the broker noticed.
pub(super) const ASK_AGAIN: Duration = Duration::from_secs(300);

/// What the watch needs from its publisher.
#[derive(Clone, Copy)]
pub(super) struct Watched<'a> {
    pub plan: &'a Plan,
    pub declare: Declare,
    pub interval: Duration,
    /// Maximum time for a look.
    pub limit: Duration,
    /// The longest time between two nacks, or confirms that do not come, of the same trouble.
    pub nack_pause: Duration,
    pub status: &'a Status,
    pub metrics: &'a Metrics,
}

/// What a watch remembers from one connection to the next.
#[derive(Default)]
pub(super) struct Watch {
    /// Why it does not look, and since when.
    off: Option<(String, Instant)>,
    /// The latest state that was logged.
    state: WatchState,
    /// When the broker last rejected a message, as far as a look has seen it.
    nacked_at: Option<Instant>,
    /// When a nack was last logged whose reason is not known.
    unexplained_at: Option<Instant>,
    /// Until when the management API is left alone, because it gave no answer.
    api_again_at: Option<Instant>,
    /// What it said last.
    known: Known,
}

/// What the management API said last. It stays true until the API says something else, because a failed request says
/// nothing about queues and bindings.
#[derive(Default)]
struct Known {
    missing_bindings: Vec<String>,
    queues: Vec<LiveEntity>,
}

/// The watch over one connection.
pub(super) struct ConnectionWatch<'a> {
    watch: &'a mut Watch,
    watched: Watched<'a>,
    looker: Looker<'a>,
    /// The management API of the broker; `None`: it cannot be asked.
    api: Option<Management>,
    /// Whether the management API is known to belong to this broker.
    api_verified: bool,
    commands: Commands,
}

impl Watch {
    /// Whether the next connection opens a channel for looks.
    pub(super) fn is_on(&self, now: Instant) -> bool {
        self.off.as_ref().is_none_or(|(_, since)| now.saturating_duration_since(*since) >= ASK_AGAIN)
    }

    /// The broker did not allow a channel for looks: the publisher's next connections go without, for some minutes.
    pub(super) fn turn_off(&mut self, why: &str, watched: &Watched<'_>, now: Instant) {
        match &self.off {
            Some((before, _)) if before == why => debug!(why, "queues and bindings are still not watched"),
            _ => warn!(
                why,
                "queues and bindings are not watched: the broker does not allow this user another channel. Webhooks \
                 are not affected; to see missing queues and counts, allow the user two channels for each relay. \
                 The relay asks again over a second connection, after five minutes at the latest"
            ),
        }
        self.off = Some((why.to_owned(), now));
        self.state = WatchState { off: Some(why.to_owned()), ..WatchState::default() };
        watched.metrics.broker.missing.set(0.0);
        watched.metrics.broker.queues_unavailable.set(0.0);
        watched.status.on_look(self.state.clone(), watched.interval);
    }

    /// Watches over this connection, with a channel that nothing else uses.
    pub(super) fn over<'a>(
        &'a mut self,
        broker: &'a BrokerConnection,
        channel: Channel,
        api: Option<Management>,
        watched: Watched<'a>,
    ) -> ConnectionWatch<'a> {
        let commands = Commands {
            relay: "prism-relay".to_owned(),
            vhost: broker.url.vhost().to_owned(),
            api: api.as_ref().map_or_else(String::new, |api| api.base().to_owned()),
            user: broker.url.expose().authority.userinfo.username.clone(),
            active: watched.declare == Declare::Active,
        };
        if self.off.take().is_some() {
            info!("queues and bindings are watched again");
        }
        let looker = Looker::new(&broker.connection, channel);
        ConnectionWatch { watch: self, watched, looker, api, api_verified: false, commands }
    }
}

impl ConnectionWatch<'_> {
    /// Looks at every interval, and when a look is requested.
    pub(super) async fn run(mut self) -> Infallible {
        loop {
            self.look_and_wait().await;
        }
    }

    /// Looks, and waits until the next look is due.
    pub(super) async fn look_and_wait(&mut self) {
        self.look().await;
        tokio::time::sleep(PAUSE).await;
        tokio::select! {
            () = tokio::time::sleep(self.watched.interval.saturating_sub(PAUSE)) => {}
            () = self.watched.status.look_requested() => {}
        }
    }

    /// Looks for a short time, before anything is published.
    pub(super) async fn look_early(&mut self, drain: &CancellationToken) {
        let finished = tokio::select! {
            looked = timeout(EARLY_LOOK, self.look()) => looked.is_ok(),
            () = drain.cancelled() => false,
        };
        if !finished {
            // Either may have been asked without an answer.
            self.looker.give_up_channel();
            self.watch.api_again_at = Some(Instant::now() + self.watched.interval);
        }
    }

    /// Looks once. If the connection fails, the session reports it.
    async fn look(&mut self) {
        // lapin writes nothing meanwhile, so every question would wait.
        if self.watched.status.snapshot().blocked.is_some() {
            return;
        }
        match timeout(self.watched.limit, self.try_to_look()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => debug!(error = %chain(&error), "cannot look at queues and exchanges"),
            Err(_) => {
                debug!("the broker did not answer a look at queues and exchanges");
                self.looker.give_up_channel();
            }
        }
    }

    async fn try_to_look(&mut self) -> Result<(), lapin::Error> {
        let Watched { plan, declare, status, .. } = self.watched;
        let bindings = match declare {
            Declare::Off => None,
            Declare::Active | Declare::Passive => self.ask(async |api| Live::read_bindings(api).await).await,
        };
        let missing = bindings.as_ref().map(|there| missing_bindings(plan, there));
        let mut look = self.looker.look(plan, declare).await?;
        match declare {
            Declare::Active => look.created.extend(bound_again(missing.unwrap_or_default(), &look.unbound)),
            Declare::Passive => look.missing.extend(self.watch.known.missing_bindings(missing)),
            Declare::Off => {}
        }
        let queues = self.ask(async |api| Live::read_queues(api).await).await;
        self.watch.known.update(queues, &look.queues);
        let queues = &self.watch.known.queues;
        if status.take_nacked() {
            self.watch.nacked_at = Some(Instant::now());
        }
        let recently = (self.watched.interval * NACK_COUNTS_FOR).max(self.watched.nack_pause);
        let nacked = self.watch.nacked_at.is_some_and(|at| at.elapsed() < recently);
        let is_explained = |seen: &QueueLook| known_trouble(seen, queues).is_some();
        let unexplained = nacked && !look.queues.iter().any(is_explained);
        if !unexplained {
            self.watch.nacked_at = None;
        }
        let state = WatchState {
            looked_at: Some(Timestamp::now()),
            off: None,
            missing: look.missing,
            bindings_checked: declare == Declare::Active || bindings.is_some(),
            queues: look.queues.iter().map(|seen| judge(seen, queues, unexplained, &self.commands)).collect(),
        };
        self.watch.report(&look.created, state, nacked, &self.watched);
        Ok(())
    }

    /// Asks the management API, unless it gave no answer a short time ago.
    async fn ask<T>(&mut self, question: impl AsyncFnOnce(&Management) -> Result<T, ManagementError>) -> Option<T> {
        let api = self.api.as_ref().filter(|_| self.watch.api_again_at.is_none_or(|at| at <= Instant::now()))?;
        let answer = async {
            if !self.api_verified {
                api.version().await?;
            }
            question(api).await
        };
        match answer.await {
            Ok(answer) => {
                self.api_verified = true;
                Some(answer)
            }
            Err(error) => {
                debug!(error = %chain(&error), "the management API does not answer: missing bindings are not seen");
                self.watch.api_again_at = Some(Instant::now() + api_pause(&error, self.watched.interval));
                None
            }
        }
    }
}

/// The bindings that a look has made, out of those that were missing before.
fn bound_again(missing: Vec<String>, unbound: &[String]) -> Vec<String> {
    missing.into_iter().filter(|binding| !unbound.contains(binding)).collect()
}

impl Known {
    /// The missing bindings, after this answer.
    fn missing_bindings(&mut self, answer: Option<Vec<String>>) -> Vec<String> {
        if let Some(missing) = answer {
            self.missing_bindings = missing;
        }
        self.missing_bindings.clone()
    }

    /// Takes in an answer about queues. Without one, drops what the queues' own counts contradict by now.
    fn update(&mut self, answer: Option<Vec<LiveEntity>>, looks: &[QueueLook]) {
        match answer {
            Some(queues) => self.queues = queues,
            None => self.queues.retain(|there| {
                let counts = looks.iter().find(|seen| seen.name == there.name).and_then(|seen| seen.counts);
                match (Trouble::by_api(there), counts) {
                    (Some(Trouble::Full { limit, .. }), Some(counts)) => u64::from(counts.messages) >= limit,
                    // A queue without a leader reports zeros.
                    (Some(_), Some(counts)) => counts.messages == 0 && counts.consumers == 0,
                    (trouble, _) => trouble.is_some(),
                }
            }),
        }
    }
}

/// How long the management API is left alone after this error.
fn api_pause(error: &ManagementError, interval: Duration) -> Duration {
    match error {
        ManagementError::Refused { status: 401, .. } => API_PAUSE.max(interval),
        _ => interval,
    }
}

impl Watch {
    fn report(&mut self, created: &[String], state: WatchState, nacked: bool, watched: &Watched<'_>) {
        if !created.is_empty() {
            warn!(
                declared = created.join("; "),
                "declared again what was missing on the broker; events published meanwhile are in prism.unrouted or \
                 parked"
            );
            watched.metrics.broker.declared_again.increment(created.len() as u64);
        }
        if state.missing != self.state.missing {
            match state.missing.is_empty() {
                false => warn!(
                    missing = state.missing.join("; "),
                    "exchanges, queues or bindings are missing on the broker: events that need them go to \
                     prism.unrouted or are parked; create them with prism-relay topology declare"
                ),
                true => info!("nothing is missing on the broker any more"),
            }
        }
        for queue in &state.queues {
            let before = self.state.queues.iter().find(|before| before.name == queue.name);
            let kind = |queue: &QueueState| queue.trouble.as_ref().map(|trouble| trouble.kind);
            match (before.and_then(kind), &queue.trouble) {
                (before, Some(trouble)) if before != Some(trouble.kind) => warn!(
                    queue = queue.name,
                    reason = format!("the queue {}", trouble.text),
                    remedy = trouble.remedy.replace('\n', "; "),
                    "a queue cannot take messages; its events are kept on disk"
                ),
                (Some(_), None) => info!(queue = queue.name, "the queue takes messages again"),
                _ => {}
            }
        }
        let troubles = state.queues.iter().filter(|queue| queue.trouble.is_some()).count();
        if nacked && troubles == 0 && self.unexplained_at.is_none_or(|at| at.elapsed() >= UNEXPLAINED_AGAIN) {
            self.unexplained_at = Some(Instant::now());
            warn!(
                "the broker rejects messages or does not confirm them, and no queue is known to be full or down; \
                 events are kept on disk. \
                 prism-relay topology diff names the queue, with a user who may read the management API"
            );
        }
        watched.metrics.broker.missing.set(state.missing.len() as f64);
        watched.metrics.broker.queues_unavailable.set(troubles as f64);
        watched.status.on_look(state.clone(), watched.interval);
        self.state = state;
    }
}

/// What is known about a queue. `there`: what the management API said last. `unexplained`: messages are
/// rejected, and no queue is known to be full.
fn judge(seen: &QueueLook, there: &[LiveEntity], unexplained: bool, commands: &Commands) -> QueueState {
    let trouble = match known_trouble(seen, there) {
        // Only work queues: the others are empty most of the time.
        None if unexplained && seen.role == QueueRole::Work => {
            Trouble::by_counts(seen.counts, seen.max_length, unexplained)
        }
        known => known,
    };
    // Without a leader the counts are zero, which means that they are not known.
    let counts = match trouble {
        None | Some(Trouble::Full { .. }) => seen.counts,
        Some(Trouble::Down | Trouble::Minority { .. } | Trouble::Silent) => None,
    };
    let trouble = trouble.map(|trouble| QueueTrouble {
        kind: trouble.kind(),
        text: trouble.to_string(),
        remedy: commands.repair(&seen.name, &trouble).text("").to_owned(),
    });
    QueueState {
        name: seen.name.clone(),
        role: seen.role,
        messages: counts.map(|counts| counts.messages),
        consumers: counts.map(|counts| counts.consumers),
        trouble,
    }
}

/// What is certain about a queue: by the management API, whose statistics may be old, or by its own counts.
fn known_trouble(seen: &QueueLook, there: &[LiveEntity]) -> Option<Trouble> {
    let there = there.iter().find(|there| there.name == seen.name);
    there.and_then(Trouble::by_api).or_else(|| Trouble::by_counts(seen.counts, seen.max_length, false))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::broker::Counts;
    use crate::topology::Spec;

    fn look(counts: Option<(u32, u32)>) -> QueueLook {
        let counts = counts.map(|(messages, consumers)| Counts { messages, consumers });
        QueueLook { name: "q".to_owned(), role: QueueRole::Work, counts, max_length: None }
    }

    fn there(what: serde_json::Value) -> Vec<LiveEntity> {
        let mut queue = json!({ "name": "q", "type": "quorum", "durable": true });
        queue.as_object_mut().unwrap().extend(what.as_object().unwrap().clone());
        vec![serde_json::from_value(queue).unwrap()]
    }

    #[test]
    fn a_failed_request_does_not_mean_that_nothing_is_missing() {
        let mut known = Known::default();
        assert_eq!(known.missing_bindings(None), [""; 0]);
        for (answer, expected) in [(Some(vec!["a"]), vec!["a"]), (None, vec!["a"]), (Some(vec![]), vec![])] {
            let answer = answer.map(|names: Vec<&str>| names.into_iter().map(str::to_owned).collect());
            assert_eq!(known.missing_bindings(answer), expected);
        }
    }

    #[test]
    fn a_failed_request_does_not_mean_that_a_queue_takes_messages_again() {
        let down = json!({ "state": "down" });
        let minority = json!({ "online": ["a"], "members": ["a", "b", "c"] });
        let full = json!({ "arguments": { "x-max-length": 5 }, "messages_ready": 6 });
        for (before, counts, stays) in [
            (&down, None, true),
            (&down, Some((0, 0)), true),
            (&down, Some((1, 0)), false),
            (&minority, Some((0, 0)), true),
            (&minority, Some((0, 1)), false),
            (&full, None, true),
            (&full, Some((5, 1)), true),
            (&full, Some((4, 1)), false),
        ] {
            let (mut known, seen) = (Known::default(), [look(counts)]);
            known.update(Some(there(before.clone())), &seen);
            let trouble = known_trouble(&seen[0], &known.queues).expect("the API says so");
            known.update(None, &seen);
            assert_eq!(known_trouble(&seen[0], &known.queues), stays.then_some(trouble), "{before} {counts:?}");
            known.update(Some(there(json!({ "state": "running" }))), &seen);
            assert_eq!(known_trouble(&seen[0], &known.queues), None);
        }
    }

    #[test]
    fn without_a_second_channel_the_watch_is_off_and_says_nothing_until_a_later_connection() {
        let (metrics, status) = (Metrics::new(), Status::new());
        let plan = Plan::new(&Spec::of_queue(|_| {}), "e");
        let interval = Duration::from_secs(15);
        let watched = Watched {
            plan: &plan,
            declare: Declare::Passive,
            interval,
            limit: interval,
            nack_pause: interval,
            status: &status,
            metrics: &metrics,
        };
        let (mut watch, now) = (Watch::default(), Instant::now());
        let state = WatchState { missing: vec!["queue q".to_owned()], ..WatchState::default() };
        watch.report(&[], state, false, &watched);
        let gauge = |value: u32| metrics.render().contains(&format!("prism_relay_topology_missing {value}\n"));
        assert!(watch.is_on(now) && gauge(1));
        watch.turn_off("the maximum number of channels", &watched, now);
        assert!(gauge(0) && status.watch().off.is_some() && status.watch().missing.is_empty());
        let later = [Duration::ZERO, ASK_AGAIN / 2, ASK_AGAIN].map(|after| watch.is_on(now + after));
        assert_eq!(later, [false, false, true]);
    }

    #[test]
    fn a_binding_that_cannot_be_made_does_not_count_as_declared_again() {
        let bindings = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        assert_eq!(bound_again(bindings(&["a", "b"]), &bindings(&["b", "c"])), ["a"]);
    }

    #[test]
    fn only_after_a_refused_login_the_management_api_is_left_alone_for_long() {
        let interval = Duration::from_secs(15);
        for (status, expected) in [(401, API_PAUSE), (404, interval), (500, interval), (503, interval)] {
            let error = ManagementError::Refused { url: String::new(), status };
            assert_eq!(api_pause(&error, interval), expected);
        }
    }
}
