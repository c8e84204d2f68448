//! `topology recreate`: a queue cannot be changed, so it is replaced. At no moment is there an event that no queue takes, and no
//! message is let go of before another queue has it; an event may come twice, as always. What was interrupted goes on
//! when it is run again. A partition gets its place among the others anew, so that subjects are spread anew over all of them.

use std::time::Duration;

use lapin::options::{
    ExchangeDeclareOptions, ExchangeDeleteOptions, QueueBindOptions, QueueDeclareOptions, QueueDeleteOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, ExchangeKind};
use thiserror::Error;
use tokio::time::{Instant, sleep, timeout};

use super::intake;
use super::messages::short;
use super::redrive::move_all;
use super::transfer::{Destination, TransferError, in_time, while_connected};
use super::{Failure, say};
use crate::broker::{BrokerConnection, Management, reply_code};
use crate::config::{Config, Declare};
use crate::text::chain;
use crate::topology::{
    Comparison, Entity, Live, MOVING, Plan, Queue, TopologyError, bind_queue, compare, establish_around,
    establish_queue, unbind_queue,
};

/// After which what the management API tells of a queue is new: 6 to 9 s were seen, with RabbitMQ's collect_statistics_interval of
/// 5 s.
const STATISTICS: Duration = Duration::from_secs(15);

/// Between two looks at what the broker has.
const PAUSE: Duration = Duration::from_secs(1);

/// For the end of a consumer to be noticed.
const PATIENCE: Duration = Duration::from_secs(2);

/// Of moving what is in a queue to which nothing is routed.
const ROUNDS: usize = 10;

#[derive(Debug, Error)]
enum RecreateError {
    #[error("{queue} has {count} workers: stop them first, because what they have in hand would be lost")]
    InUse { queue: String, count: u32 },
    #[error("{0} still has messages: run this again")]
    NotEmpty(String),
    #[error(
        "{queue} still has {count} messages: on their way to the dead letters, which wait for room there, or taken by somebody \
         who has not acknowledged them (rabbitmqctl list_queues name messages_dlx messages_unacknowledged); when they are gone \
         run this again"
    )]
    OnTheirWay { queue: String, count: u64 },
    #[error(
        "{queue} has {count} messages, more than the new max_length of {limit}: let the workers do some of them first, or set a \
         higher one"
    )]
    TooMany { queue: String, count: u64, limit: u64 },
    #[error(
        "{queue} is as configured, but takes no more of what came in meanwhile ({reason}). {moving} keeps the rest: let the \
         workers do some, and run this again"
    )]
    Full { queue: String, moving: String, reason: String },
    #[error("{0} is being replaced by another run of this")]
    Busy(String),
    #[error(
        "a policy sets {keys} for {moving}, which holds the messages meanwhile and could lose some by that: see rabbitmqctl \
         list_policies and list_operator_policies, and let none match this name"
    )]
    CutByPolicy { moving: String, keys: String },
    #[error("{queue} is bound to {bindings}, too: put that into the configuration, or unbind it first")]
    BoundByOthers { queue: String, bindings: String },
    #[error(
        "only the management API tells of messages that are on their way to the dead letters, which would be lost, and of \
         other bindings; set broker.management_url ({0})"
    )]
    NoManagement(String),
    #[error("the management API does not tell what {0} has")]
    Unknown(String),
    #[error(transparent)]
    Transfer(#[from] TransferError),
    #[error(transparent)]
    Topology(#[from] TopologyError),
}

pub async fn run(config: &Config, plan: &Plan, name: &str) -> Result<(), Failure> {
    let Some(queue) = plan.queue_named(name) else {
        return Err(Failure::Usage(format!("{name} is no queue of the configuration: see topology show")));
    };
    if queue.is_stream() {
        return Err(Failure::Usage(format!("{name} is a stream, which cannot be poured into another one")));
    }
    let link = super::connect(config, "prism-relay topology").await?;
    let management = Management::new(&config.broker, &link.url)?;
    // What moves messages looks for it, too, but not all of this does that.
    let moved = tokio::select! {
        moved = while_connected(&link, recreate(config, plan, queue, &link, &management)) => moved,
        _ = tokio::signal::ctrl_c() => Err(TransferError::Interrupted.into()),
    };
    link.close().await;
    let moved = moved?;
    say(&format!("{name} is as configured; {moved} messages were moved over"));
    Ok(())
}

async fn recreate(
    config: &Config,
    plan: &Plan,
    queue: &Queue,
    link: &BrokerConnection,
    management: &Management,
) -> Result<u64, RecreateError> {
    let name = &queue.name;
    // An exchange and a queue of this name hold the messages meanwhile: the exchange, so that they keep their keys.
    let moving = format!("{name}{MOVING}");
    // For the answers to a step of many.
    let deadline = config.publisher.confirm_timeout + config.broker.connect_timeout * plan.steps();
    lock(link, deadline, name, &moving).await?;
    let channel = in_time(deadline, link.connection.create_channel()).await?;
    let run = Run { config, plan, link, management, channel, deadline, queue, moving };
    if !run.is_half_done().await? {
        run.put_aside().await?;
    }
    run.bring_back().await
}

/// As long as there is this connection, no other run of this can touch the queue. One that was killed a moment ago may
/// still count.
async fn lock(link: &BrokerConnection, deadline: Duration, queue: &str, moving: &str) -> Result<(), RecreateError> {
    let (lock, patient_until) = (format!("{moving}.lock"), Instant::now() + PATIENCE);
    loop {
        // The broker closes the channel of what it refuses.
        let locking = async {
            let channel = link.connection.create_channel().await?;
            let exclusive = QueueDeclareOptions { exclusive: true, ..Default::default() };
            channel.queue_declare(short(&lock), exclusive, FieldTable::default()).await
        };
        match timeout(deadline, locking).await.map_err(|_| TransferError::Silent(deadline))? {
            Ok(_) => return Ok(()),
            Err(error) if reply_code(&error) == Some(405) => {}
            Err(error) => return Err(TransferError::from(error).into()),
        }
        if Instant::now() > patient_until {
            return Err(RecreateError::Busy(queue.to_owned()));
        }
        sleep(PAUSE).await;
    }
}

/// What one run works with.
struct Run<'a> {
    config: &'a Config,
    plan: &'a Plan,
    link: &'a BrokerConnection,
    management: &'a Management,
    channel: Channel,
    deadline: Duration,
    queue: &'a Queue,
    /// Of the exchange and the queue that hold the messages meanwhile.
    moving: String,
}

impl Run<'_> {
    /// Whether an earlier run has made the new queue, and ended before everything was back. Workers may be at it already.
    async fn is_half_done(&self) -> Result<bool, RecreateError> {
        let name = &self.queue.name;
        if !live(self.management).await?.leads(&self.moving, name) {
            return Ok(false);
        }
        let entity = Entity::Queue(self.queue.clone());
        let comparing = compare(&self.link.connection, &entity, Declare::Active);
        Ok(matches!(in_time(self.deadline, comparing).await?, Comparison::Same))
    }

    /// Events, and what is in the old queue, go to the one that stands in; the old one is deleted.
    async fn put_aside(&self) -> Result<(), RecreateError> {
        let Self { plan, channel, deadline, moving, .. } = self;
        let name = &self.queue.name;
        // Before anything is made.
        let foreign = live(self.management).await?.foreign_bindings(plan, name);
        if !foreign.is_empty() {
            return Err(RecreateError::BoundByOthers { queue: name.clone(), bindings: foreign.join(", ") });
        }
        let goes_on = self.look(moving).await?.is_some();
        if !goes_on {
            self.has_room().await?;
        }
        in_time(*deadline, declare(channel, moving)).await?;
        if let Err(error) = keeps_everything(self.management, moving).await {
            if !goes_on {
                in_time(*deadline, remove(channel, moving)).await?;
            }
            return Err(error);
        }
        self.topology_in_time(establish_around(&self.link.connection, plan, name)).await?;
        if self.look(name).await?.is_none() {
            return Ok(());
        }
        self.is_unused(name).await?;
        let turn = async {
            // An earlier run may have left it bound, and what is moved must not come back.
            unbind(channel, moving, name).await?;
            bind(channel, moving, moving).await?;
            for binding in plan.bindings_of(name) {
                bind_queue(channel, moving, binding).await?;
            }
            for binding in plan.bindings_of(name) {
                unbind_queue(channel, name, binding).await?;
            }
            Ok(())
        };
        in_time(*deadline, turn).await?;
        self.pour_out(name).await?;
        Ok(())
    }

    /// Events go to the new queue, and then what came in meanwhile. How much that was.
    async fn bring_back(&self) -> Result<u64, RecreateError> {
        let Self { plan, channel, deadline, moving, queue, .. } = self;
        let name = &queue.name;
        self.topology_in_time(establish_queue(&self.link.connection, plan, queue)).await?;
        if self.look(moving).await?.is_none() {
            // An earlier run ended right before the end.
            in_time(*deadline, remove(channel, moving)).await?;
            return Ok(0);
        }
        let turn = async {
            for binding in plan.bindings_of(name) {
                unbind_queue(channel, moving, binding).await?;
            }
            bind(channel, moving, name).await?;
            unbind(channel, moving, moving).await
        };
        in_time(*deadline, turn).await?;
        let moved = self.pour_out(moving).await.map_err(|error| match error {
            RecreateError::Transfer(TransferError::NotTaken { reason, .. }) => {
                RecreateError::Full { queue: name.clone(), moving: moving.clone(), reason }
            }
            error => error,
        })?;
        in_time(*deadline, remove(channel, moving)).await?;
        Ok(moved)
    }

    /// The new queue would not take back more than its limit.
    async fn has_room(&self) -> Result<(), RecreateError> {
        let Queue { name, .. } = self.queue;
        let Some(limit) = self.queue.max_length() else { return Ok(()) };
        let count = self.look(name).await?.map_or(0, |there| u64::from(there.message_count()));
        if count > limit {
            return Err(RecreateError::TooMany { queue: name.clone(), count, limit });
        }
        Ok(())
    }

    /// Moves everything out of a queue to which events are not routed any more, and deletes it. Meanwhile what was routed before
    /// may still come in, and what is published straight to it. How much was moved.
    async fn pour_out(&self, queue: &str) -> Result<u64, RecreateError> {
        let through = Destination::Exchange(self.moving.clone());
        let mut moved = 0;
        for _ in 0..ROUNDS {
            move_all(self.config, self.link, queue, &through, &mut moved).await?;
            self.is_unused(queue).await?;
            if self.has_let_go_of_everything(queue).await? {
                let deleting = self.channel.queue_delete(short(queue), QueueDeleteOptions::default());
                in_time(self.deadline, deleting).await?;
                return Ok(moved);
            }
        }
        Err(RecreateError::NotEmpty(queue.to_owned()))
    }

    /// Whether nothing is in the queue, and nothing on its way out of it; false if something has come in meanwhile. AMQP counts
    /// what could be delivered, at once. What is on its way to the dead letters only the API tells, some seconds later. Quorum
    /// queues cannot be asked to be deleted only if they are empty and unused, so both are asked right before.
    async fn has_let_go_of_everything(&self, queue: &str) -> Result<bool, RecreateError> {
        let begun = Instant::now();
        loop {
            sleep(PAUSE).await;
            let live = live(self.management).await?;
            let (messages, cut) = (live.messages(queue), live.cut_by_policy(&self.moving).unwrap_or_default());
            // Set since the beginning. It must not keep what is there from being poured out.
            if !cut.is_empty() && queue != self.moving {
                return Err(RecreateError::CutByPolicy { moving: self.moving.clone(), keys: cut.join(", ") });
            }
            let now = self.look(queue).await?;
            let (ready, count) = now.map_or((0, 0), |queue| (queue.message_count(), queue.consumer_count()));
            match (messages, begun.elapsed()) {
                _ if count > 0 => return Err(RecreateError::InUse { queue: queue.to_owned(), count }),
                _ if ready > 0 => return Ok(false),
                (Some(0), waited) if waited >= STATISTICS => return Ok(true),
                (Some(count), waited) if waited >= STATISTICS + STATISTICS / 2 => {
                    return Err(RecreateError::OnTheirWay { queue: queue.to_owned(), count });
                }
                (None, waited) if waited >= STATISTICS + STATISTICS / 2 => {
                    return Err(RecreateError::Unknown(queue.to_owned()));
                }
                _ => {}
            }
        }
    }

    /// What is known of consumers is a moment old: our own may still count.
    async fn is_unused(&self, queue: &str) -> Result<(), RecreateError> {
        let patient_until = Instant::now() + PATIENCE;
        loop {
            match self.look(queue).await?.map_or(0, |queue| queue.consumer_count()) {
                0 => return Ok(()),
                count if Instant::now() > patient_until => {
                    return Err(RecreateError::InUse { queue: queue.to_owned(), count });
                }
                _ => sleep(PATIENCE / 20).await,
            }
        }
    }

    /// On a channel of its own, because the broker closes it if there is no such queue.
    async fn look(&self, queue: &str) -> Result<Option<lapin::Queue>, TransferError> {
        let looking = async {
            let channel = self.link.connection.create_channel().await?;
            match intake::look(&channel, queue).await {
                Ok(queue) => {
                    channel.close(200, "done".into()).await?;
                    Ok(Some(queue))
                }
                Err(error) if reply_code(&error) == Some(404) => Ok(None),
                Err(error) => Err(error),
            }
        };
        in_time(self.deadline, looking).await
    }

    async fn topology_in_time(
        &self,
        answer: impl Future<Output = Result<(), TopologyError>>,
    ) -> Result<(), RecreateError> {
        Ok(timeout(self.deadline, answer).await.map_err(|_| TransferError::Silent(self.deadline))??)
    }
}

/// The exchange and the queue that hold the messages meanwhile.
async fn declare(channel: &Channel, moving: &str) -> Result<(), lapin::Error> {
    let durable = ExchangeDeclareOptions { durable: true, ..Default::default() };
    channel.exchange_declare(short(moving), ExchangeKind::Fanout, durable, FieldTable::default()).await?;
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
    // Runs that fail must not use up RabbitMQ 4's default.
    arguments.insert("x-delivery-limit".into(), AMQPValue::LongLongInt(1_000_000));
    // A limit that somebody sets meanwhile must not push messages out.
    arguments.insert("x-overflow".into(), AMQPValue::LongString("reject-publish".into()));
    let durable = QueueDeclareOptions { durable: true, ..Default::default() };
    channel.queue_declare(short(moving), durable, arguments).await?;
    Ok(())
}

/// Takes the exchange and the queue away. Of what does not exist RabbitMQ says that it has been deleted.
async fn remove(channel: &Channel, moving: &str) -> Result<(), lapin::Error> {
    channel.queue_delete(short(moving), QueueDeleteOptions::default()).await?;
    channel.exchange_delete(short(moving), ExchangeDeleteOptions::default()).await
}

/// Whether no policy could cost what waits in a queue. Of a new one the API tells some seconds late.
async fn keeps_everything(management: &Management, queue: &str) -> Result<(), RecreateError> {
    let begun = Instant::now();
    loop {
        let live = live(management).await?;
        match live.cut_by_policy(queue) {
            Some(keys) if keys.is_empty() => return Ok(()),
            Some(keys) => {
                return Err(RecreateError::CutByPolicy { moving: queue.to_owned(), keys: keys.join(", ") });
            }
            None if begun.elapsed() >= 2 * STATISTICS => return Err(RecreateError::Unknown(queue.to_owned())),
            None => sleep(PAUSE).await,
        }
    }
}

async fn live(management: &Management) -> Result<Live, RecreateError> {
    Live::read(management).await.map_err(|error| RecreateError::NoManagement(chain(&error)))
}

/// To a fanout exchange, where keys mean nothing.
async fn bind(channel: &Channel, exchange: &str, queue: &str) -> Result<(), lapin::Error> {
    let (options, arguments) = (QueueBindOptions::default(), FieldTable::default());
    channel.queue_bind(short(queue), short(exchange), short(""), options, arguments).await
}

/// Nothing happens if it was not bound.
async fn unbind(channel: &Channel, exchange: &str, queue: &str) -> Result<(), lapin::Error> {
    channel.queue_unbind(short(queue), short(exchange), short(""), FieldTable::default()).await
}
