//! `send --to-queue QUEUE --vectors`: plays the test messages of `deploy/workers/vectors` to a worker, and reports
//! whether it acknowledged or rejected each.
//!
//! The command makes a queue of its own for the run and deletes it at the end, so that no test message mixes with
//! events. A rejected message is dead-lettered to a reply queue, which shows exactly which one it was. AMQP does not
//! show an ack, so their number comes from the management API.

mod cases;
mod judge;
mod player;
mod queue;
mod report;

use std::time::Duration;

use anyhow::{Context, anyhow};
use lapin::types::ShortString;

use self::player::Player;
use self::queue::TestQueue;
use self::report::report;
use super::connect::connect;
use super::failure::Failure;
use super::messages::is_test_queue;
use super::transfer::while_connected;
use crate::broker::Management;
use crate::config::Config;
use crate::topology::Plan;

/// Plays the vectors to the worker of `queue`. `wait` limits the wait for the worker, and then for its answers.
pub(super) async fn run(config: &Config, queue: &ShortString, wait: Duration, json: bool) -> Result<(), Failure> {
    check_usage(config, queue)?;
    let cases = cases::cases()?;
    let broker = connect(config, "prism-relay send").await?;
    let management = Management::new(&config.broker, &broker.url)?;
    management.version().await.context(
        "cannot count acks without RabbitMQ's management API: enable the plugin rabbitmq_management, or set \
         broker.management_url",
    )?;
    let deadline = config.publisher.confirm_timeout;
    let player = Player { queue: TestQueue { name: queue, broker: &broker, management, deadline }, wait, says: !json };
    let outcome = while_connected(&broker, player.play(&cases)).await;
    broker.close().await;
    let played = outcome?;
    report(queue, &cases, &played, json)?;
    played.deleted.map_err(|error| anyhow!("{error}; {queue} is not deleted: the next run does it").into())
}

fn check_usage(config: &Config, queue: &ShortString) -> Result<(), Failure> {
    let plan = Plan::new(&config.topology, &config.publisher.exchange);
    // A relay with another configuration may declare a queue of this name tomorrow, with other properties.
    if !is_test_queue(queue) {
        return Err(Failure::Usage(format!(
            "{queue} could be the name of a real queue: take one with `test` in it, such as {queue}.test, and start \
             your worker with it"
        )));
    }
    if plan.configured_queue(queue.as_str()).is_some() || plan.has_queue(queue.as_str()) {
        return Err(Failure::Usage(format!(
            "{queue} is a queue of the relay, where test messages would mix with events: name a queue that does not \
             exist, such as {queue}.test, and start your worker with it"
        )));
    }
    Ok(())
}
