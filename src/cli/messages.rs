//! Messages of the broker: how commands print, select and republish them. Bodies are never printed.

use std::io;

use anyhow::Context;
use jiff::Timestamp;
use lapin::BasicProperties;
use lapin::message::Delivery;
use lapin::types::{AMQPValue, FieldTable, ShortString};
use serde::Serialize;

use super::output::write;
use crate::broker::{SHORT_STRING_BYTES_MAX, short_string};
use crate::text::clean;
pub(super) use crate::topology::matches;

/// Header: when `replay` published the message. Such messages are not replayed again.
pub(super) const REPLAYED_AT: &str = "prism-replayed-at";

/// Header: the original routing key of a message that was published directly to a queue, under the queue's name.
const ORIGINAL_KEY: &str = "prism-original-key";

/// Header of a dead letter that a worker published: the worker's queue and why it gave up.
const GAVE_UP: &str = "prism-gave-up";

/// Header of a message of `send --to-queue`: the name of the test case.
pub(super) const TEST: &str = "prism-test";

/// Headers that a broker writes about the history of a message, in any version up to RabbitMQ 4.3, and those of its
/// plugins for federation and shovels, and those of commands and workers. A new publish has none of them.
const PAST: [&str; 9] = [
    "x-death",
    "x-delivery-count",
    "x-acquired-count",
    "x-stream-offset",
    "x-received-from",
    "x-shovelled",
    "x-shovelled-timestamp",
    ORIGINAL_KEY,
    GAVE_UP,
];
const PAST_PREFIXES: [&str; 3] = ["x-first-death-", "x-last-death-", "x-opt-"];

/// Headers with which a quorum queue counts how often it delivered a message. A copy in the same queue starts at 0.
const COUNTS: [&str; 2] = ["x-delivery-count", "x-acquired-count"];

/// How a message is printed.
#[derive(Clone, Copy)]
pub(super) enum Format {
    /// A line of text.
    Text,
    /// A JSON object in one line.
    Json,
}

/// The printed fields of an event.
#[derive(Serialize)]
struct Line<'a> {
    time: &'a str,
    key: &'a str,
    subject: &'a str,
    state: &'a str,
    id: &'a str,
    verified: bool,
    redelivered: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    death: Option<String>,
}

/// Prints a message.
pub(super) fn print(delivery: &Delivery, format: Format) -> io::Result<()> {
    let properties = &delivery.properties;
    let header = |name: &str| header(properties, name).unwrap_or_default();
    let (time, subject, state) = (header("prism-received-at"), header("prism-subject"), header("prism-state"));
    let key = first_key(delivery);
    let line = Line {
        time: &time,
        key: &key,
        subject: &subject,
        state: &state,
        id: properties.message_id().as_ref().map_or("", ShortString::as_str),
        verified: header("prism-verified") == "true",
        redelivered: delivery.redelivered,
        death: death(properties),
    };
    let text = match format {
        Format::Json => serde_json::to_string(&line)?,
        Format::Text => {
            let (time, key, subject) = (clean(line.time), clean(line.key), clean(line.subject));
            let death = line.death.map(|death| format!("  {}", clean(&death))).unwrap_or_default();
            format!("{time}  {key:<42}  {subject:<47}  {:<10}  {}{death}", clean(line.state), clean(line.id))
        }
    };
    write(format!("{text}\n").as_bytes())
}

/// The value of a text header.
pub(super) fn header(properties: &BasicProperties, name: &str) -> Option<String> {
    match properties.headers().as_ref()?.inner().get(name)? {
        AMQPValue::LongString(text) => Some(text.to_string()),
        AMQPValue::ShortString(text) => Some(text.to_string()),
        _ => None,
    }
}

/// The value of a header that is a number, and not negative.
pub(super) fn number(properties: &BasicProperties, name: &str) -> Option<u64> {
    whole_number(properties.headers().as_ref()?.inner().get(name)?)
}

fn whole_number(value: &AMQPValue) -> Option<u64> {
    match value {
        AMQPValue::LongLongInt(number) => u64::try_from(*number).ok(),
        AMQPValue::LongInt(number) => u64::try_from(*number).ok(),
        AMQPValue::LongUInt(number) => Some((*number).into()),
        AMQPValue::ShortInt(number) => u64::try_from(*number).ok(),
        AMQPValue::ShortShortInt(number) => u64::try_from(*number).ok(),
        _ => None,
    }
}

/// When the relay accepted the event; the property `timestamp` if another publisher sent the message.
pub(super) fn time_of(properties: &BasicProperties) -> Option<Timestamp> {
    let accepted = header(properties, "prism-received-at").and_then(|text| text.parse().ok());
    accepted.or_else(|| Timestamp::from_second(i64::try_from((*properties.timestamp())?).ok()?).ok())
}

/// The routing key with which a message was first published. Retry queues and `--to` replace the key.
pub(super) fn first_key(delivery: &Delivery) -> String {
    let first_death = || {
        let queue = header(&delivery.properties, "x-first-death-queue")?;
        let reason = header(&delivery.properties, "x-first-death-reason")?;
        let death = deaths(&delivery.properties).find(|death| {
            text_in(death, "queue") == Some(queue.clone()) && text_in(death, "reason") == Some(reason.clone())
        })?;
        match death.inner().get("routing-keys")? {
            AMQPValue::FieldArray(keys) => keys.as_slice().first().and_then(text),
            _ => None,
        }
    };
    let key = header(&delivery.properties, ORIGINAL_KEY).or_else(first_death);
    key.unwrap_or_else(|| delivery.routing_key.to_string())
}

/// [`first_key`] as an AMQP short string.
pub(super) fn original_key(delivery: &Delivery) -> anyhow::Result<ShortString> {
    short_string(&first_key(delivery)).with_context(|| {
        let id = delivery.properties.message_id().as_ref().map_or("without an id", ShortString::as_str);
        format!("cannot publish message {} under its original routing key", clean(id))
    })
}

/// Why and where a message was dead-lettered last, such as `rejected by prism.scan (3 times)`, or
/// `given up by prism.scan: no handler for this type`.
fn death(properties: &BasicProperties) -> Option<String> {
    if let Some(reason) = header(properties, GAVE_UP) {
        return Some(format!("given up by {reason}"));
    }
    let last = deaths(properties).next()?;
    let count = last.inner().get("count").and_then(whole_number).unwrap_or(1);
    let (reason, queue) = (text_in(last, "reason")?, text_in(last, "queue")?);
    Some(format!("{reason} by {queue} ({count} times)"))
}

/// Why a message was dead-lettered by this queue.
pub(super) fn reason_of_death(properties: &BasicProperties, queue: &str) -> Option<String> {
    let mut deaths = deaths(properties).filter(|death| text_in(death, "queue").as_deref() == Some(queue));
    text_in(deaths.next()?, "reason")
}

fn deaths(properties: &BasicProperties) -> impl Iterator<Item = &FieldTable> {
    let deaths = match properties.headers().as_ref().and_then(|headers| headers.inner().get("x-death")) {
        Some(AMQPValue::FieldArray(deaths)) => deaths.as_slice(),
        _ => &[],
    };
    deaths.iter().filter_map(|death| match death {
        AMQPValue::FieldTable(death) => Some(death),
        _ => None,
    })
}

fn text_in(table: &FieldTable, name: &str) -> Option<String> {
    table.inner().get(name).and_then(text)
}

fn text(value: &AMQPValue) -> Option<String> {
    match value {
        AMQPValue::LongString(text) => Some(text.to_string()),
        AMQPValue::ShortString(text) => Some(text.to_string()),
        _ => None,
    }
}

/// Properties to publish a message again, without its history on the broker.
pub(super) fn fresh(old: &BasicProperties) -> BasicProperties {
    published_again(old, |name| PAST.contains(&name) || PAST_PREFIXES.iter().any(|prefix| name.starts_with(prefix)))
}

/// Properties for a message published once more on purpose: those of [`fresh`], with the header [`REPLAYED_AT`].
pub(super) fn replayed(old: &BasicProperties, now: Timestamp) -> BasicProperties {
    let new = fresh(old);
    let mut headers = new.headers().clone().unwrap_or_default();
    headers.insert(REPLAYED_AT.into(), AMQPValue::LongString(format!("{now:.3}").into()));
    new.with_headers(headers)
}

/// Properties for a copy of a message in the same queue. The delivery count of the copy starts at 0.
pub(super) fn put_back(old: &BasicProperties) -> BasicProperties {
    published_again(old, |name| COUNTS.contains(&name))
}

/// Properties for a message that is published directly to a queue.
pub(super) fn with_original_key(old: &BasicProperties, key: &ShortString) -> BasicProperties {
    let mut headers = old.headers().clone().unwrap_or_default();
    headers.insert(ORIGINAL_KEY.into(), AMQPValue::LongString(key.as_str().into()));
    old.clone().with_headers(headers)
}

/// Leaves out two properties: `user_id`, because the broker accepts only our own, and `expiration`, because an expired
/// message would be lost.
fn published_again(old: &BasicProperties, without: impl Fn(&str) -> bool) -> BasicProperties {
    let mut headers = FieldTable::default();
    for (name, value) in old.headers().iter().flatten() {
        if !without(name.as_str()) {
            headers.insert(name.clone(), value.clone());
        }
    }
    let mut new = BasicProperties::default().with_headers(headers).with_delivery_mode(2);
    macro_rules! copy {
        ($($get:ident $with:ident),* $(,)?) => {
            $(if let Some(value) = old.$get() { new = new.$with(value.clone()); })*
        };
    }
    copy!(
        content_type with_content_type, content_encoding with_content_encoding, priority with_priority,
        correlation_id with_correlation_id, reply_to with_reply_to, message_id with_message_id,
        timestamp with_timestamp, kind with_type, app_id with_app_id,
    );
    new
}

/// Whether test messages may get into a queue of this name.
pub(super) fn is_test_queue(name: &ShortString) -> bool {
    name.as_str().contains("test")
}

/// Parses an option that names a queue.
pub(super) fn queue_name(text: &str) -> Result<ShortString, String> {
    match short_string(text) {
        Ok(name) if !text.is_empty() => Ok(name),
        _ => Err(format!("must be a name of 1 to {SHORT_STRING_BYTES_MAX} bytes")),
    }
}
