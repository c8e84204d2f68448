//! Plays the test messages to the worker of a queue, and collects what the worker did with them.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::anyhow;
use futures_util::StreamExt;
use lapin::options::{BasicConsumeOptions, BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{Channel, Confirmation, Consumer};
use tokio::time::{Instant, sleep, timeout};

use super::cases::{Case, Ids, case_of};
use super::judge::{Counted, Seen, judge};
use super::queue::{Ends, TestQueue};
use crate::broker::{counts, short_string};
use crate::cli::interrupt::Interrupt;
use crate::cli::messages::reason_of_death;
use crate::cli::output::say;
use crate::cli::transfer::{TransferError, in_time};

/// Time between two questions to the management API, whose numbers are up to 5 s old.
const ASK_INTERVAL: Duration = Duration::from_millis(500);
/// Above the priority of a worker, which is 0.
const PRIORITY: i32 = 10;

/// What a run found.
pub(super) struct Played {
    pub(super) seen: Vec<Seen>,
    pub(super) counted: Counted,
    /// The id of the message that was sent twice.
    pub(super) duplicate: Option<String>,
    /// Whether the queue is deleted.
    pub(super) deleted: Result<(), TransferError>,
}

/// One run.
pub(super) struct Player<'a> {
    pub(super) queue: TestQueue<'a>,
    /// Limits the wait for the worker, and then for its answers.
    pub(super) wait: Duration,
    /// Whether progress is printed.
    pub(super) says: bool,
}

impl Player<'_> {
    /// Makes the queue, plays the messages, and deletes the queue, also after an interrupt.
    pub(super) async fn play(&self, cases: &[Case]) -> anyhow::Result<Played> {
        let channel = self.in_time(self.queue.broker.connection.create_channel()).await?;
        self.in_time(channel.confirm_select(ConfirmSelectOptions::default())).await?;
        let mut interrupt = Interrupt::listen()?;
        self.queue.refuse_existing().await?;
        let playing = async { self.play_to(&channel, self.queue.declare(&channel).await?, cases).await };
        let played = interrupt.or(playing).await;
        let (deleted, name) = (self.queue.delete().await, self.queue.name);
        match (played, &deleted) {
            (Ok(played), _) => Ok(Played { deleted, ..played? }),
            (Err(_), Ok(())) => Err(anyhow!("interrupted; {name} is deleted")),
            (Err(_), Err(error)) => Err(anyhow!("interrupted; {name} is not deleted ({error}): the next run does it")),
        }
    }

    async fn play_to(&self, channel: &Channel, mut ends: Ends, cases: &[Case]) -> anyhow::Result<Played> {
        let mut ids = Ids::default();
        // First, while the queue is empty: they are taken and put back, so that RabbitMQ marks them as redelivered.
        let (redelivered, others): (Vec<_>, Vec<_>) = cases.iter().partition(|case| case.message.redelivered);
        let put_back = self.take_first(redelivered.len()).await?;
        for case in redelivered {
            self.publish(channel, &ends.exchange, case, &mut ids).await?;
        }
        put_back.all(self.queue.deadline).await?;
        self.await_worker(channel).await?;
        for case in others {
            self.publish(channel, &ends.exchange, case, &mut ids).await?;
        }
        let (rejected, counted) = self.await_answers(cases.len(), &mut ends.replies).await?;
        let mut left = BTreeMap::new();
        while let Some(message) = self.queue.get(channel).await? {
            left.insert(case_of(&message), Seen::NotTaken);
        }
        let gone = cases.len() - rejected.len() - left.len();
        if gone > 0 && !counted.counts {
            return Err(anyhow!(
                "RabbitMQ's management API has counted nothing for {}, so nobody knows whether {gone} messages were \
                 acknowledged: raise --wait, or switch its statistics on (management_agent.disable_metrics_collector, \
                 management.rates_mode)",
                self.queue.name
            ));
        }
        let seen = judge(cases, &rejected, &left, counted.acks);
        Ok(Played { seen, counted, duplicate: ids.duplicate, deleted: Ok(()) })
    }

    /// A consumer that gets the next `count` messages in place of the worker.
    async fn take_first(&self, count: usize) -> Result<Interception, TransferError> {
        let channel = self.in_time(self.queue.broker.connection.create_channel()).await?;
        let consuming = async {
            channel.basic_qos(u16::try_from(count).unwrap_or(u16::MAX), BasicQosOptions::default()).await?;
            let mut arguments = FieldTable::default();
            arguments.insert("x-priority".into(), AMQPValue::LongInt(PRIORITY));
            channel.basic_consume(self.queue.name.clone(), "".into(), BasicConsumeOptions::default(), arguments).await
        };
        let deliveries = self.in_time(consuming).await?;
        Ok(Interception { channel, deliveries, count })
    }

    async fn await_worker(&self, channel: &Channel) -> anyhow::Result<()> {
        let name = self.queue.name;
        if self.says {
            say(&format!("made the queue {name}; waiting for your worker to consume it"));
        }
        // RabbitMQ may count our own consumer for a moment after its channel is closed.
        let (mut seen, end) = (0, Instant::now() + self.wait);
        while Instant::now() < end {
            let found = self.in_time(counts(channel, name, Duration::ZERO, 1)).await?;
            seen = if found.is_some_and(|counts| counts.consumers > 0) { seen + 1 } else { 0 };
            if seen > 1 {
                return Ok(());
            }
            sleep(ASK_INTERVAL).await;
        }
        let wait = self.wait;
        Err(anyhow!("no worker consumed {name} within {wait:?}: start yours with this queue, or raise --wait"))
    }

    async fn publish(
        &self,
        channel: &Channel,
        exchange: &ShortString,
        case: &Case,
        ids: &mut Ids,
    ) -> anyhow::Result<()> {
        let (properties, body) = case.message(ids)?;
        let (key, options) = (short_string(&case.message.routing_key)?, BasicPublishOptions::default());
        let sending = channel.basic_publish(exchange.clone(), key, options, &body, properties);
        let confirm = self.in_time(sending).await?;
        match self.in_time(confirm).await? {
            Confirmation::Ack(None) => Ok(()),
            other => Err(anyhow!("the broker did not take the message {}: {other:?}", case.name)),
        }
    }

    /// Collects rejected messages until every message is acknowledged or rejected, or the time is over.
    async fn await_answers(
        &self,
        count: usize,
        replies: &mut Consumer,
    ) -> anyhow::Result<(BTreeMap<String, Seen>, Counted)> {
        let (mut rejected, end) = (BTreeMap::new(), Instant::now() + self.wait);
        loop {
            while let Ok(reply) = timeout(ASK_INTERVAL, replies.next()).await {
                let reply = reply.ok_or(TransferError::Lost)?.map_err(TransferError::from)?;
                // A vector may have died before, in a queue of its story.
                let reason = reason_of_death(&reply.properties, self.queue.name.as_str());
                let is_reject = reason.as_deref() == Some("rejected");
                rejected.insert(case_of(&reply), if is_reject { Seen::Reject } else { Seen::ReturnedTooOften });
            }
            let counted = self.queue.counted().await;
            if counted.acks + rejected.len() >= count || counted.without_ack > 0 || Instant::now() >= end {
                return Ok((rejected, counted));
            }
        }
    }

    async fn in_time<T>(&self, reply: impl Future<Output = Result<T, lapin::Error>>) -> Result<T, TransferError> {
        in_time(self.queue.deadline, reply).await
    }
}

/// Messages on the way to be put back.
struct Interception {
    channel: Channel,
    deliveries: Consumer,
    count: usize,
}

impl Interception {
    /// Takes the messages, and puts them back by closing the channel.
    async fn all(mut self, deadline: Duration) -> anyhow::Result<()> {
        for _ in 0..self.count {
            let next = timeout(deadline, self.deliveries.next()).await;
            next.map_err(|_| TransferError::Silent(deadline))?
                .ok_or(TransferError::Lost)?
                .map_err(TransferError::from)?;
        }
        Ok(in_time(deadline, self.channel.close(200, "OK".into())).await?)
    }
}
