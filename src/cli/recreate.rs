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

use super::management::Management;
use super::messages::short;
use super::redrive::move_all;
use super::transfer::{Destination, TransferError, in_time, while_connected};
use super::{Failure, say};
use crate::config::Config;
use crate::publisher::Link;
use crate::telemetry::chain;
use crate::topology::{Live, MOVING, Plan, Queue, TopologyError, establish_around, establish_queue, reply_code};

/// After which what the management API tells of a queue is new: 6 to 9 s were seen.
const STATISTICS: Duration = Duration::from_secs(15);

/// Between two looks.
const LOOK: Duration = Duration::from_secs(1);

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
        "{queue} still has {count} messages on their way to the dead letters, which wait for room there \
         (rabbitmqctl list_queues name messages messages_dlx); when they are gone run this again"
    )]
    OnTheirWay { queue: String, count: u64 },
    #[error(
        "{queue} and {moving} have {count} messages, more than the new max_length of {limit}: let the workers do some of them \
         first, or set a higher one"
    )]
    TooMany { queue: String, moving: String, count: u64, limit: u64 },
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
    let management = Management::new(&config.broker, &link.url).map_err(Failure::new)?;
    // What moves messages looks for it, too, but not all of this does that.
    let moved = tokio::select! {
        moved = while_connected(&link, recreate(config, plan, queue, &link, &management)) => moved,
        _ = tokio::signal::ctrl_c() => Err(TransferError::Interrupted.into()),
    };
    link.close().await;
    let moved = moved.map_err(Failure::new)?;
    say(&format!("{name} is as configured; {moved} messages were moved over"));
    Ok(())
}

async fn recreate(
    config: &Config,
    plan: &Plan,
    queue: &Queue,
    link: &Link,
    management: &Management,
) -> Result<u64, RecreateError> {
    let name = &queue.name;
    // An exchange and a queue of this name hold the messages meanwhile: the exchange, so that they keep their keys.
    let moving = format!("{name}{MOVING}");
    let through = Destination::Exchange(moving.clone());
    // For the answers to a step of many.
    let deadline = config.broker.confirm_timeout + config.broker.connect_timeout * plan.steps();
    let channel = in_time(deadline, link.connection.create_channel()).await?;
    // Before anything is made.
    let foreign = live(management).await?.foreign_bindings(plan, name);
    if !foreign.is_empty() {
        return Err(RecreateError::BoundByOthers { queue: name.clone(), bindings: foreign.join(", ") });
    }
    has_room(link, deadline, queue, &moving).await?;
    let goes_on = look(link, deadline, &moving).await?.is_some();
    in_time(deadline, declare(&channel, &moving)).await?;
    if let Err(error) = keeps_everything(management, &moving).await {
        if !goes_on {
            in_time(deadline, remove(&channel, &moving)).await?;
        }
        return Err(error);
    }
    topology_in_time(deadline, establish_around(&link.connection, plan, name)).await?;

    // The old one, if it is there: from now on events go to the other.
    if look(link, deadline, name).await?.is_some() {
        is_unused(link, deadline, name).await?;
        let turn = async {
            // An earlier run may have left it bound, and what is moved must not come back.
            unbind(&channel, &moving, name).await?;
            bind(&channel, &moving, &moving).await?;
            bind_like(&channel, plan, name, &moving).await?;
            unbind_like(&channel, plan, name, name).await
        };
        in_time(deadline, turn).await?;
        pour_out(config, link, management, deadline, name, &through).await?;
    }
    topology_in_time(deadline, establish_queue(&link.connection, plan, queue)).await?;

    let turn = async {
        unbind_like(&channel, plan, name, &moving).await?;
        bind(&channel, &moving, name).await?;
        unbind(&channel, &moving, &moving).await
    };
    in_time(deadline, turn).await?;
    let moved = pour_out(config, link, management, deadline, &moving, &through).await?;
    in_time(deadline, remove(&channel, &moving)).await?;
    Ok(moved)
}

async fn topology_in_time(
    deadline: Duration,
    answer: impl Future<Output = Result<(), TopologyError>>,
) -> Result<(), RecreateError> {
    Ok(timeout(deadline, answer).await.map_err(|_| TransferError::Silent(deadline))??)
}

/// The new queue would not take back more than its limit.
async fn has_room(link: &Link, deadline: Duration, queue: &Queue, moving: &str) -> Result<(), RecreateError> {
    let Some(limit) = queue.max_length() else { return Ok(()) };
    let mut count = 0;
    for part in [queue.name.as_str(), moving] {
        count += look(link, deadline, part).await?.map_or(0, |there| u64::from(there.message_count()));
    }
    if count > limit {
        return Err(RecreateError::TooMany { queue: queue.name.clone(), moving: moving.to_owned(), count, limit });
    }
    Ok(())
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
            None if begun.elapsed() >= STATISTICS => return Err(RecreateError::Unknown(queue.to_owned())),
            None => sleep(LOOK).await,
        }
    }
}

/// Moves everything out of a queue to which events are not routed any more, and deletes it. Meanwhile what was routed before
/// may still come in, and what is published straight to it. How much was moved.
async fn pour_out(
    config: &Config,
    link: &Link,
    management: &Management,
    deadline: Duration,
    queue: &str,
    to: &Destination,
) -> Result<u64, RecreateError> {
    let mut moved = 0;
    for _ in 0..ROUNDS {
        moved += move_all(config, link, queue, to).await?;
        is_unused(link, deadline, queue).await?;
        if has_let_go_of_everything(management, link, deadline, queue).await? {
            let channel = in_time(deadline, link.connection.create_channel()).await?;
            in_time(deadline, channel.queue_delete(short(queue), QueueDeleteOptions::default())).await?;
            return Ok(moved);
        }
    }
    Err(RecreateError::NotEmpty(queue.to_owned()))
}

/// Whether nothing is in the queue, and nothing on its way out of it; false if something has come in meanwhile. AMQP counts
/// what could be delivered, at once. What is on its way to the dead letters only the API tells, some seconds later. Quorum
/// queues cannot be asked to be deleted only if they are empty and unused, so AMQP has the last word, right before.
async fn has_let_go_of_everything(
    management: &Management,
    link: &Link,
    deadline: Duration,
    queue: &str,
) -> Result<bool, RecreateError> {
    let begun = Instant::now();
    loop {
        sleep(LOOK).await;
        let messages = live(management).await?.messages(queue);
        let now = look(link, deadline, queue).await?;
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

async fn live(management: &Management) -> Result<Live, RecreateError> {
    management.look().await.map_err(|error| RecreateError::NoManagement(chain(&error)))
}

/// What is known of consumers is a moment old: our own may still count.
async fn is_unused(link: &Link, deadline: Duration, queue: &str) -> Result<(), RecreateError> {
    let patient_until = Instant::now() + PATIENCE;
    loop {
        match look(link, deadline, queue).await?.map_or(0, |queue| queue.consumer_count()) {
            0 => return Ok(()),
            count if Instant::now() > patient_until => {
                return Err(RecreateError::InUse { queue: queue.to_owned(), count });
            }
            _ => sleep(PATIENCE / 20).await,
        }
    }
}

async fn bind_like(channel: &Channel, plan: &Plan, like: &str, queue: &str) -> Result<(), lapin::Error> {
    for binding in plan.bindings_of(like) {
        let (exchange, key) = (short(&binding.exchange), short(&binding.key));
        let arguments = binding.arguments.clone();
        channel.queue_bind(short(queue), exchange, key, QueueBindOptions::default(), arguments).await?;
    }
    Ok(())
}

async fn unbind_like(channel: &Channel, plan: &Plan, like: &str, queue: &str) -> Result<(), lapin::Error> {
    for binding in plan.bindings_of(like) {
        let (exchange, key) = (short(&binding.exchange), short(&binding.key));
        channel.queue_unbind(short(queue), exchange, key, binding.arguments.clone()).await?;
    }
    Ok(())
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

/// On a channel of its own, because the broker closes it if there is no such queue.
async fn look(link: &Link, deadline: Duration, queue: &str) -> Result<Option<lapin::Queue>, TransferError> {
    let looking = async {
        let channel = link.connection.create_channel().await?;
        let passive = QueueDeclareOptions { passive: true, ..Default::default() };
        match channel.queue_declare(short(queue), passive, FieldTable::default()).await {
            Ok(queue) => {
                channel.close(200, "done".into()).await?;
                Ok(Some(queue))
            }
            Err(error) if reply_code(&error) == Some(404) => Ok(None),
            Err(error) => Err(error),
        }
    };
    in_time(deadline, looking).await
}
