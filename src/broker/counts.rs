//! How many messages and consumers a queue has. RabbitMQ reports 0 messages and 0 consumers for a quorum queue whose
//! leader does not answer within 250 ms (`rabbit_quorum_queue:stat`), so such a report is believed only if it came
//! sooner.

use std::time::{Duration, Instant};

use lapin::Channel;
use lapin::options::QueueDeclareOptions;
use lapin::types::{FieldTable, ShortString};

/// Maximum time, apart from the way to the broker, of a report that comes from the queue itself.
const AT_ONCE: Duration = Duration::from_millis(200);

/// The counts of a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Counts {
    /// Messages that are ready for a consumer.
    pub messages: u32,
    pub consumers: u32,
}

/// Asks for the counts of a queue, at most `attempts` times. `None`: its leader does not answer. `round_trip` is how
/// long the broker takes for a reply that needs no leader.
pub(crate) async fn counts(
    channel: &Channel,
    queue: &ShortString,
    round_trip: Duration,
    attempts: u32,
) -> Result<Option<Counts>, lapin::Error> {
    for _ in 0..attempts {
        let asked = Instant::now();
        let passive = QueueDeclareOptions { passive: true, ..Default::default() };
        let seen = channel.queue_declare(queue.clone(), passive, FieldTable::default()).await?;
        let counts = Counts { messages: seen.message_count(), consumers: seen.consumer_count() };
        let is_none = counts.messages == 0 && counts.consumers == 0;
        if !is_none || asked.elapsed() < round_trip + AT_ONCE {
            return Ok(Some(counts));
        }
    }
    Ok(None)
}
