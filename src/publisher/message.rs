//! Makes the message for the workers from a stored event: routing key, AMQP properties, headers. Pure.

use bytes::Bytes;
use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable, ShortString};

use crate::broker::short_string;
use crate::event::{Envelope, Event, INVALID_BODY, TraceContext};

/// The publisher's name, for workers and for RabbitMQ's management pages.
const APP_ID: &str = "prism-relay";
const CONTENT_TYPE: &str = "application/json";
/// The delivery mode of AMQP 0-9-1 in which a message survives a restart of the broker.
const PERSISTENT: u8 = 2;

/// Maximum length of a value in a header. Longer values are left out, because the body has them as well. All headers
/// travel in one frame, which lapin does not split and for which RabbitMQ 4.1 guarantees only 8192 bytes. There are at
/// most ten headers.
const HEADER_BYTES_MAX: usize = 512;

/// The arguments of one `basic.publish`, apart from the exchange.
pub struct Message {
    /// The event type, or a key for bodies without a usable one.
    pub routing_key: ShortString,
    /// Properties and headers of the message contract.
    pub properties: BasicProperties,
    /// The bytes that Prism sent.
    pub body: Bytes,
}

impl Message {
    /// `envelope` is the event's own, if the body has one; `trace` is what the workers continue.
    pub fn new(event: &Event, envelope: Option<&Envelope<'_>>, trace: Option<&TraceContext>) -> Self {
        let mut properties = BasicProperties::default()
            .with_delivery_mode(PERSISTENT)
            .with_content_type(CONTENT_TYPE.into())
            .with_app_id(APP_ID.into())
            .with_message_id(short_string(&event.id.to_string()).expect("a UUID has 36 bytes"))
            .with_timestamp(u64::try_from(event.accepted_ms / 1000).unwrap_or(0))
            .with_headers(headers(event, envelope, trace));
        // A type that is too long is only in the body.
        if let Some(event_type) = envelope.and_then(|envelope| short_string(&envelope.event_type).ok()) {
            properties = properties.with_type(event_type);
        }
        let routing_key = short_string(routing_key(envelope))
            .expect("is_topic_key limits event types to 200 bytes, and the other keys are shorter constants");
        Self { routing_key, properties, body: event.body.clone() }
    }
}

/// The routing key of an event with this envelope.
pub fn routing_key<'a>(envelope: Option<&'a Envelope<'_>>) -> &'a str {
    envelope.map_or(INVALID_BODY, Envelope::routing_key)
}

fn headers(event: &Event, envelope: Option<&Envelope<'_>>, trace: Option<&TraceContext>) -> FieldTable {
    let mut headers = FieldTable::default();
    let mut insert = |name: &'static str, value: Option<&str>| {
        if let Some(value) = value.filter(|value| value.len() <= HEADER_BYTES_MAX) {
            headers.insert(name.into(), AMQPValue::LongString(value.into()));
        }
    };
    insert("prism-received-at", received_at(event.accepted_ms).as_deref());
    insert("prism-fingerprint", Some(&event.fingerprint.to_string()));
    insert("prism-verified", Some(if event.authentic { "true" } else { "false" }));
    insert("prism-source", Some(event.source.text()));
    if let Some(envelope) = envelope {
        insert("prism-subject", envelope.subject().as_deref());
        insert("prism-scan-id", envelope.scan_id.as_deref());
        insert("prism-prediction-id", envelope.prediction_id.as_deref());
        insert("prism-state", envelope.state.as_deref());
    }
    if let Some(trace) = trace {
        insert("traceparent", Some(&trace.traceparent));
        insert("tracestate", trace.tracestate.as_deref());
    }
    headers
}

/// RFC 3339 in UTC, always with milliseconds.
fn received_at(ms: i64) -> Option<String> {
    jiff::Timestamp::from_millisecond(ms).ok().map(|time| format!("{time:.3}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{Fingerprint, Source};
    use bytes::Bytes;
    use uuid::Uuid;

    fn event(body: &[u8]) -> Event {
        Event {
            id: Uuid::now_v7(),
            accepted_ms: 1_759_353_977_000,
            source: Source::Webhook,
            authentic: true,
            trace: None,
            fingerprint: Fingerprint::of(body),
            subject: None,
            body: Bytes::copy_from_slice(body),
        }
    }

    fn message(event: &Event) -> Message {
        Message::new(event, Envelope::parse(&event.body).ok().as_ref(), event.trace.as_ref())
    }

    fn header(message: &Message, name: &str) -> Option<String> {
        match message.properties.headers().as_ref()?.inner().get(name)? {
            AMQPValue::LongString(text) => Some(text.to_string()),
            other => panic!("header {name} is not a long string: {other:?}"),
        }
    }

    #[test]
    fn a_prediction_carries_every_property_and_header_of_the_contract() {
        let line = include_str!("../../tests/samples/events.jsonl").lines().nth(4).unwrap();
        let event = event(line.as_bytes());
        let message = message(&event);
        assert_eq!(message.routing_key.as_str(), "body_shape_prediction.processing.succeeded");
        let properties = &message.properties;
        assert_eq!(properties.delivery_mode(), &Some(2));
        assert_eq!(properties.timestamp(), &Some(1_759_353_977));
        assert_eq!(properties.message_id().as_ref().unwrap().as_str(), event.id.to_string());
        assert_eq!(properties.kind().as_ref().unwrap(), &message.routing_key);
        assert_eq!(header(&message, "prism-received-at").unwrap(), "2025-10-01T21:26:17.000Z");
        assert_eq!(header(&message, "prism-fingerprint").unwrap().len(), 64);
        assert_eq!(header(&message, "prism-subject").unwrap(), "prediction:0c9b6a52-3d0e-4f0f-9a3d-2f6f0a4f7d11");
        assert_eq!(header(&message, "prism-scan-id").unwrap(), "7f2ec6e0-b06d-42b1-b2a1-fff59a458490");
        assert_eq!(header(&message, "prism-state").unwrap(), "READY");
        assert_eq!(header(&message, "prism-verified").unwrap(), "true");
        assert_eq!(header(&message, "prism-source").unwrap(), "webhook");
        assert!(!format!("{properties:?}").contains("partner-user-42"), "userToken is a secret");
        assert!(!format!("{properties:?}").contains("5304329f"), "userId is not copied");
    }

    #[test]
    fn values_that_are_too_long_are_left_out_and_nothing_panics() {
        let long = "x".repeat(100_000);
        let body = format!(r#"{{"eventType":"{long}","payload":{{"scanId":"{long}","state":"{long}"}}}}"#);
        let message = message(&event(body.as_bytes()));
        assert_eq!(message.routing_key.as_str(), "invalid.event_type");
        assert_eq!(message.properties.kind(), &None);
        assert_eq!(header(&message, "prism-subject"), None);
    }

    #[test]
    fn a_body_without_an_envelope_gets_the_key_for_invalid_bodies() {
        let message = message(&event(b"\xff"));
        assert_eq!(message.routing_key.as_str(), "invalid.body");
        assert_eq!(message.properties.kind(), &None);
    }
}
