//! Looks at the exchanges and queues of the plan over AMQP, while the relay runs. Declares what is missing if the relay
//! may do so.

use std::fmt::Display;
use std::time::{Duration, Instant};

use lapin::{Channel, Connection};

use super::declare::{Mode, TopologyError, bind, declare_entity, explain};
use super::plan::{Entity, Plan, Queue, QueueRole};
use super::spec::Declare;
use crate::broker::{Counts, counts, short_string};
use crate::text::chain;

/// How often a queue is asked for its counts if its leader does not answer.
const ATTEMPTS: u32 = 3;

/// What a look at the broker found.
#[derive(Debug, Default)]
pub(crate) struct Look {
    /// The queues of the plan, apart from the archive.
    pub queues: Vec<QueueLook>,
    /// Exchanges and queues that do not exist, or that could not be created.
    pub missing: Vec<String>,
    /// Exchanges and queues that did not exist and were created.
    pub created: Vec<String>,
    /// Bindings that could not be made.
    pub unbound: Vec<String>,
}

/// What a look at the broker found out about a queue.
#[derive(Clone, Debug)]
pub(crate) struct QueueLook {
    pub name: String,
    pub role: QueueRole,
    /// `None`: it does not exist, or its leader does not answer.
    pub counts: Option<Counts>,
    /// The configured maximum number of ready messages.
    pub max_length: Option<u64>,
}

/// A channel for looks.
pub(crate) struct Looker<'a> {
    connection: &'a Connection,
    /// The broker closes it when it refuses something, for instance because a queue does not exist.
    channel: Option<Channel>,
}

/// The reply of the broker about an entity.
enum Found {
    Exists,
    Counted(Option<Counts>),
    Missing,
    /// The broker does not say, for instance because the queue is another connection's own.
    Unknown,
}

impl<'a> Looker<'a> {
    /// `channel`: one that nothing else uses.
    pub(crate) fn new(connection: &'a Connection, channel: Channel) -> Self {
        Self { connection, channel: Some(channel) }
    }

    /// Looks at everything in the plan. With `active` it declares what is missing, and all bindings, because AMQP does
    /// not show which of them exist.
    pub(crate) async fn look(&mut self, plan: &Plan, declare: Declare) -> Result<Look, lapin::Error> {
        let (mut look, mut round_trip) = (Look::default(), Duration::ZERO);
        for entity in plan.entities() {
            let asked = Instant::now();
            let found = self.find(entity, round_trip).await?;
            let is_missing = matches!(found, Found::Missing);
            if is_missing && declare == Declare::Off {
                continue;
            }
            match (entity, found) {
                // The plan begins with an exchange.
                (Entity::Exchange(_), Found::Exists) => round_trip = asked.elapsed(),
                (Entity::Queue(queue), found) => look.queues.extend(seen(queue, found)),
                (Entity::Exchange(_), _) => {}
            }
            match declare {
                Declare::Active if is_missing => match self.create(entity).await? {
                    Ok(()) => look.created.push(entity.to_string()),
                    Err(error) => look.missing.push(described(entity, &error)),
                },
                Declare::Passive if is_missing => look.missing.push(entity.to_string()),
                Declare::Active | Declare::Passive | Declare::Off => {}
            }
        }
        if declare == Declare::Active {
            for binding in &plan.bindings {
                let channel = self.channel().await?;
                match self.settled(bind(&channel, binding).await)? {
                    Ok(()) => {}
                    Err(error) => {
                        look.missing.push(described(binding, &error));
                        look.unbound.push(binding.to_string());
                    }
                }
            }
        }
        Ok(look)
    }

    /// Opens another channel for the next look.
    pub(crate) fn give_up_channel(&mut self) {
        self.channel = None;
    }

    async fn find(&mut self, entity: &Entity, round_trip: Duration) -> Result<Found, lapin::Error> {
        let channel = self.channel().await?;
        let found = match entity {
            Entity::Exchange(_) => declare_entity(&channel, entity, Mode::Check).await.map(|()| Found::Exists),
            Entity::Queue(queue) => counted(&channel, queue, entity, round_trip).await.map(Found::Counted),
        };
        Ok(match self.settled(found)? {
            Ok(found) => found,
            Err(TopologyError::Missing { .. }) => Found::Missing,
            Err(_) => Found::Unknown,
        })
    }

    async fn create(&mut self, entity: &Entity) -> Result<Result<(), TopologyError>, lapin::Error> {
        let channel = self.channel().await?;
        self.settled(declare_entity(&channel, entity, Mode::Create).await)
    }

    /// The channel, opened again if the broker has closed it.
    async fn channel(&mut self) -> Result<Channel, lapin::Error> {
        match &self.channel {
            Some(channel) => Ok(channel.clone()),
            None => Ok(self.channel.insert(self.connection.create_channel().await?).clone()),
        }
    }

    /// Separates a refusal, which closes the channel, from the end of the connection.
    fn settled<T>(&mut self, reply: Result<T, TopologyError>) -> Result<Result<T, TopologyError>, lapin::Error> {
        match reply {
            Err(TopologyError::Connection(error)) => {
                self.channel = None;
                Err(error)
            }
            Err(refusal) => {
                self.channel = None;
                Ok(Err(refusal))
            }
            Ok(done) => Ok(Ok(done)),
        }
    }
}

async fn counted(
    channel: &Channel,
    queue: &Queue,
    entity: &Entity,
    round_trip: Duration,
) -> Result<Option<Counts>, TopologyError> {
    let name = short_string(&queue.name)?;
    counts(channel, &name, round_trip, ATTEMPTS).await.map_err(|error| explain(entity, error))
}

/// What is missing, and why it cannot be created.
fn described(what: &impl Display, error: &TopologyError) -> String {
    match error {
        // Something else that it needs is missing.
        TopologyError::Missing { .. } => what.to_string(),
        error => chain(error),
    }
}

fn seen(queue: &Queue, found: Found) -> Option<QueueLook> {
    let counts = match found {
        Found::Counted(counts) => counts,
        Found::Exists | Found::Missing | Found::Unknown => None,
    };
    let look = QueueLook { name: queue.name.clone(), role: queue.role, counts, max_length: queue.max_length() };
    (queue.role != QueueRole::Archive).then_some(look)
}
