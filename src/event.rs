//! Events: envelope, subject and routing key. Pure; knows neither HTTP, nor the disk, nor AMQP.
//!
//! The body is borrowed and never serialised again: workers receive the bytes that Prism signed.

use std::borrow::Cow;
use std::fmt;

use bytes::Bytes;
use jiff::Timestamp;
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;
use sha2::{Digest, Sha256};
use thiserror::Error;
use uuid::Uuid;

use crate::signature::Accepted;
use crate::text::hex;

/// The six event types that Prism documents for scans and Future Me. Others come too, and are relayed as well.
pub const DOCUMENTED_TYPES: [&str; 6] = [
    "scan.processing.started",
    "scan.processing.succeeded",
    "scan.processing.failed",
    "body_shape_prediction.processing.started",
    "body_shape_prediction.processing.succeeded",
    "body_shape_prediction.processing.failed",
];

/// The routing key of an event whose type is not a safe topic key.
pub const INVALID_EVENT_TYPE: &str = "invalid.event_type";
/// The routing key of a signed body that is not an envelope.
pub const INVALID_BODY: &str = "invalid.body";

/// AMQP 0-9-1 limits a routing key to 255 bytes; the rest is left to what brokers and shovels put in front.
const ROUTING_KEY_BYTES_MAX: usize = 200;

/// An accepted webhook, as it is stored on disk.
#[derive(Clone, PartialEq, Eq)]
pub struct Event {
    /// The event's id, a UUIDv7: the same for every publish of this event and for every answer about it.
    pub id: Uuid,
    /// The time of acceptance by the wall clock, in milliseconds since 1970. Workers receive it in the message.
    pub accepted_ms: i64,
    /// Who told it.
    pub source: Source,
    /// Whether the body is Prism's: a webhook with a valid signature, or an answer of Prism's API over TLS.
    pub authentic: bool,
    /// The sender's trace, if it sent one.
    pub trace: Option<TraceContext>,
    /// The fingerprint of the body as it was received. It shows a re-send, and damage on the disk.
    pub fingerprint: Fingerprint,
    /// What the event is about; `None` for an event without a subject, which no other event waits for.
    pub subject: Option<SubjectKey>,
    /// The bytes as they were received.
    pub body: Bytes,
}

/// Who told an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    /// Prism sent a webhook.
    Webhook,
    /// Prism's API answered that it happened, and no webhook had told it.
    Api,
}

impl Source {
    /// One word for workers and operators.
    pub fn text(self) -> &'static str {
        match self {
            Self::Webhook => "webhook",
            Self::Api => "api",
        }
    }
}

impl Event {
    /// Gives an accepted body its identity.
    pub fn new(
        accepted: Accepted<Bytes>,
        subject: Option<SubjectKey>,
        trace: Option<TraceContext>,
        now: Timestamp,
    ) -> Self {
        Self {
            id: Uuid::now_v7(),
            accepted_ms: now.as_millisecond(),
            source: Source::Webhook,
            authentic: accepted.authentic(),
            trace,
            fingerprint: Fingerprint::of(accepted.body()),
            subject,
            body: accepted.into_body(),
        }
    }

    /// An event that Prism's API told, with the body that its webhook would have had. `authentic`: whether the answer
    /// came over TLS.
    pub fn made(body: Bytes, subject: SubjectKey, authentic: bool, now: Timestamp) -> Self {
        Self {
            id: Uuid::now_v7(),
            accepted_ms: now.as_millisecond(),
            source: Source::Api,
            authentic,
            trace: None,
            fingerprint: Fingerprint::of(&body),
            subject: Some(subject),
            body,
        }
    }

    /// Whether the body is still the one that was accepted.
    pub fn is_intact(&self) -> bool {
        Fingerprint::of(&self.body) == self.fingerprint
    }
}

/// The body has a `userToken` in it, so only its length is shown.
impl fmt::Debug for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Event")
            .field("id", &self.id)
            .field("accepted_ms", &self.accepted_ms)
            .field("source", &self.source)
            .field("authentic", &self.authentic)
            .field("body_bytes", &self.body.len())
            .finish_non_exhaustive()
    }
}

/// SHA-256 of a body: the same bytes have the same fingerprint, on every replica.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fingerprint(pub [u8; 32]);

impl Fingerprint {
    /// Computes the fingerprint of a body.
    pub fn of(body: &[u8]) -> Self {
        Self(Sha256::digest(body).into())
    }
}

/// 64 lower-case hex digits.
impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A short name for a subject, the same in every build, by which the spool finds the events of a subject. Two subjects
/// that share one by chance only wait for each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SubjectKey(pub i64);

impl SubjectKey {
    /// The key of the subject `kind:id`.
    pub(crate) fn of(kind: &str, id: &str) -> Self {
        let digest: [u8; 32] = Sha256::new().chain_update(kind).chain_update(":").chain_update(id).finalize().into();
        let (first, _) = digest.split_first_chunk().expect("32 bytes are more than 8");
        Self(i64::from_be_bytes(*first))
    }
}

/// The sender's trace, to be continued by the workers (<https://www.w3.org/TR/trace-context/>).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceContext {
    /// Version, trace id, parent id and flags.
    pub traceparent: String,
    /// Vendor-specific data, as received.
    pub tracestate: Option<String>,
}

impl TraceContext {
    /// Takes the two headers as they came; what is malformed is left out, as the specification asks.
    pub fn from_headers(traceparent: Option<&[u8]>, tracestate: Option<&[u8]>) -> Option<Self> {
        let traceparent = std::str::from_utf8(traceparent?).ok().filter(|text| is_traceparent(text))?;
        // 512 characters are what every participant has to pass on.
        let tracestate = tracestate
            .and_then(|bytes| std::str::from_utf8(bytes).ok())
            .filter(|text| !text.is_empty() && text.len() <= 512 && text.bytes().all(|b| (0x20..0x7f).contains(&b)));
        Some(Self { traceparent: traceparent.to_owned(), tracestate: tracestate.map(str::to_owned) })
    }
}

/// `version-traceid-parentid-flags`, in lower-case hex; later versions may append more.
fn is_traceparent(text: &str) -> bool {
    let mut parts = text.split('-');
    let mut hex = |digits: usize| {
        parts.next().is_some_and(|part| {
            part.len() == digits && part.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
        })
    };
    text.len() <= 128 && !text.starts_with("ff") && hex(2) && hex(32) && hex(16) && hex(2)
}

/// Why a body is not an envelope.
#[derive(Debug, Error)]
pub enum NotAnEnvelope {
    /// The body is not UTF-8.
    #[error("the body is not UTF-8, as JSON has to be (RFC 8259, section 8.1)")]
    Encoding,
    /// The body is not JSON.
    #[error("the body is not JSON: {0}")]
    Json(serde_json::Error),
    /// The body has no string `eventType`.
    #[error("the body is JSON, but not an object with a string `eventType`")]
    EventType,
}

/// What the relay reads from a body, all of it borrowed where the JSON has no escapes.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Envelope<'a> {
    /// The `eventType`.
    pub event_type: Cow<'a, str>,
    /// `payload.scanId`.
    pub scan_id: Option<Cow<'a, str>>,
    /// `payload.bodyShapePredictionId`.
    pub prediction_id: Option<Cow<'a, str>>,
    /// `payload.state`.
    pub state: Option<Cow<'a, str>>,
}

impl<'a> Envelope<'a> {
    /// Reads the envelope. Nothing but a string `eventType` is required; a name that occurs twice counts with its
    /// last value, as in JavaScript; a payload of another shape, or a field that is not a string, is passed over.
    pub fn parse(body: &'a [u8]) -> Result<Self, NotAnEnvelope> {
        let text = std::str::from_utf8(body).map_err(|_| NotAnEnvelope::Encoding)?;
        // RFC 8259, section 8.1: a reader may ignore a byte order mark. It stays in the body.
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let (mut event_type, mut payload) = (None, None);
        let outcome = members(text, |name, value| match name {
            "eventType" => event_type = Some(value),
            "payload" => payload = Some(value),
            _ => {}
        });
        if let Err(error) = outcome {
            // An array or a number stops the reader at once, so the rest is checked for being JSON.
            return Err(match serde_json::from_str::<&RawValue>(text) {
                Ok(_) if error.is_data() => NotAnEnvelope::EventType,
                Ok(_) => NotAnEnvelope::Json(error),
                Err(syntax) => NotAnEnvelope::Json(syntax),
            });
        }
        let mut envelope =
            Self { event_type: event_type.and_then(text_of).ok_or(NotAnEnvelope::EventType)?, ..Self::default() };
        if let Some(payload) = payload {
            // A payload that is not an object has no fields, which is not an error.
            let _ = members(payload.get(), |name, value| match name {
                "scanId" => envelope.scan_id = text_of(value),
                "bodyShapePredictionId" => envelope.prediction_id = text_of(value),
                "state" => envelope.state = text_of(value),
                _ => {}
            });
        }
        Ok(envelope)
    }

    /// The topic key: the event type if it is safe as one, else [`INVALID_EVENT_TYPE`].
    pub fn routing_key(&self) -> &str {
        if is_topic_key(&self.event_type) { &self.event_type } else { INVALID_EVENT_TYPE }
    }

    /// The subject, whose events are published in order: the prediction if there is one, else the scan.
    pub fn subject(&self) -> Option<String> {
        subject(self.prediction_id.as_deref(), self.scan_id.as_deref())
    }

    /// The key of [`Self::subject`].
    pub fn subject_key(&self) -> Option<SubjectKey> {
        let prediction = self.prediction_id.as_deref().map(|id| SubjectKey::of("prediction", id));
        prediction.or_else(|| self.scan_id.as_deref().map(|id| SubjectKey::of("scan", id)))
    }
}

/// The subject for these ids, as in [`Envelope::subject`].
pub fn subject(prediction_id: Option<&str>, scan_id: Option<&str>) -> Option<String> {
    let prediction = prediction_id.map(|id| format!("prediction:{id}"));
    prediction.or_else(|| scan_id.map(|id| format!("scan:{id}")))
}

/// Words of `[A-Za-z0-9_-]`, separated by single dots: nothing that a topic exchange could read as a wildcard.
fn is_topic_key(text: &str) -> bool {
    text.len() <= ROUTING_KEY_BYTES_MAX
        && text
            .split('.')
            .all(|word| !word.is_empty() && word.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-'))
}

#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

/// A string without its escapes; `None` for a value of another type.
pub(crate) fn text_of(value: &RawValue) -> Option<Cow<'_, str>> {
    serde_json::from_str(value.get()).ok().map(|Text(text)| text)
}

/// Calls `take` with each member of a JSON object. The values stay raw, so that no number is too large and no
/// nesting too deep.
pub(crate) fn members<'a>(json: &'a str, take: impl FnMut(&str, &'a RawValue)) -> Result<(), serde_json::Error> {
    struct Members<F>(F);

    impl<'de, F: FnMut(&str, &'de RawValue)> Visitor<'de> for Members<F> {
        type Value = ();

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a JSON object")
        }

        fn visit_map<M: MapAccess<'de>>(mut self, mut map: M) -> Result<(), M::Error> {
            while let Some(Text(name)) = map.next_key::<Text<'de>>()? {
                (self.0)(&name, map.next_value()?);
            }
            Ok(())
        }
    }

    let mut json = serde_json::Deserializer::from_str(json);
    json.deserialize_map(Members(take))?;
    json.end()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn event_type(body: &str) -> String {
        Envelope::parse(body.as_bytes()).unwrap().event_type.into_owned()
    }

    #[test]
    fn every_sample_of_the_vendor_is_an_envelope_with_a_subject() {
        for line in include_str!("../tests/samples/events.jsonl").lines() {
            let envelope = Envelope::parse(line.as_bytes()).unwrap();
            assert_eq!(envelope.routing_key(), envelope.event_type);
            let kind = if envelope.event_type.starts_with("body_shape_prediction.") { "prediction:" } else { "scan:" };
            assert!(envelope.subject().unwrap().starts_with(kind), "{line}");
            assert!(envelope.state.is_some());
        }
    }

    #[test]
    fn the_key_of_a_subject_never_changes_because_it_is_on_disk() {
        let key = |payload: &str| {
            let body = format!(r#"{{"eventType":"a","payload":{payload}}}"#);
            Envelope::parse(body.as_bytes()).unwrap().subject_key()
        };
        // The first eight bytes of `printf scan:1 | sha256sum`, and of prediction:1.
        assert_eq!(key(r#"{"scanId":"1"}"#), Some(SubjectKey(829_941_731_157_439_919)));
        let prediction = Some(SubjectKey(-6_346_480_251_207_212_161));
        assert_eq!(key(r#"{"scanId":"1","bodyShapePredictionId":"1"}"#), prediction);
        assert_eq!(key(r#"{"bodyShapePredictionId":"1"}"#), prediction);
        assert_eq!(key("{}"), None);
    }

    #[test]
    fn plain_strings_are_borrowed() {
        let envelope = Envelope::parse(br#"{"eventType":"a.b","payload":{"scanId":"1"}}"#).unwrap();
        assert!(matches!(envelope.event_type, Cow::Borrowed("a.b")));
        assert!(matches!(envelope.scan_id, Some(Cow::Borrowed("1"))));
    }

    #[test]
    fn unusual_but_valid_json_is_read() {
        assert_eq!(event_type(" {\n\"eventType\" :\t\"a\" } "), "a");
        assert_eq!(event_type("\u{feff}{\"eventType\":\"a\"}"), "a");
        assert_eq!(event_type(r#"{"eventType":"a","eventType":"b"}"#), "b");
        assert_eq!(event_type(r#"{"event\u0054ype":"scan\u002estarted"}"#), "scan.started");
        assert_eq!(event_type(r#"{"eventType":"a","payload":{"n":1e999999,"m":123456789012345678901234567890}}"#), "a");
        assert_eq!(event_type(r#"{"eventType":"a","payload":[1,2]}"#), "a");
        assert_eq!(event_type(r#"{"eventType":"a","payload":null}"#), "a");
        let deep = format!(r#"{{"eventType":"a","payload":{}{}}}"#, "[".repeat(100_000), "]".repeat(100_000));
        assert_eq!(event_type(&deep), "a");
    }

    #[test]
    fn fields_of_another_type_are_passed_over() {
        let body = br#"{"eventType":"a","payload":{"scanId":7,"state":null,"bodyShapePredictionId":{"x":1}}}"#;
        let envelope = Envelope::parse(body).unwrap();
        assert_eq!((envelope.subject(), envelope.state), (None, None));
    }

    #[test]
    fn bodies_that_are_not_envelopes_are_told_apart_by_reason() {
        for (body, expected) in [
            (&b"\xff"[..], "Encoding"),
            (b"{\"eventType\":\"a\",\"payload\":\"\xff\"}", "Encoding"),
            (b"", "Json"),
            (b"{", "Json"),
            (b"[1,", "Json"),
            (b"\xef\xbb\xbf", "Json"),
            (b"\xef\xbb\xbf\xef\xbb\xbf{}", "Json"),
            (b"{\"eventType\":\"a\"}\xef\xbb\xbf", "Json"),
            (b"\xef\xbb\xbf[]", "EventType"),
            (b"{\"eventType\":\"a\"} x", "Json"),
            (b"{\"eventType\":\"a\",}", "Json"),
            (b"{\"eventType\":\"\\ud800\"}", "EventType"),
            (b"[]", "EventType"),
            (b"7", "EventType"),
            (b"{}", "EventType"),
            (b"{\"eventType\":7}", "EventType"),
            (b"{\"eventType\":null}", "EventType"),
        ] {
            let error = format!("{:?}", Envelope::parse(body).unwrap_err());
            assert!(error.starts_with(expected), "{:?}: {error}", String::from_utf8_lossy(body));
        }
    }

    #[test]
    fn only_safe_topic_keys_become_routing_keys() {
        let key = |event_type: &str| {
            Envelope { event_type: event_type.into(), ..Envelope::default() }.routing_key().to_owned()
        };
        for safe in ["a", "scan.processing.started", "A-1_z.b", &"a".repeat(200)] {
            assert_eq!(key(safe), safe);
        }
        for unsafe_key in ["", ".", "a.", ".a", "a..b", "a.*", "#", "a b", "ä", "a\n", "a\0", &"a".repeat(201)] {
            assert_eq!(key(unsafe_key), INVALID_EVENT_TYPE, "{unsafe_key:?}");
        }
    }

    #[test]
    fn a_prediction_is_its_own_subject() {
        let body = br#"{"eventType":"a","payload":{"bodyShapePredictionId":"p","scanId":"s"}}"#;
        assert_eq!(Envelope::parse(body).unwrap().subject().unwrap(), "prediction:p");
    }

    #[test]
    fn malformed_traces_are_left_out() {
        let good = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".as_slice();
        let trace = TraceContext::from_headers(Some(good), Some(b"a=b")).unwrap();
        assert_eq!(trace.traceparent.as_bytes(), good);
        assert_eq!(trace.tracestate.as_deref(), Some("a=b"));
        assert_eq!(TraceContext::from_headers(Some(good), Some(b"\xff")).unwrap().tracestate, None);
        assert_eq!(TraceContext::from_headers(None, Some(b"a=b")), None);
        for bad in [&b""[..], b"00", &good[..54], b"ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"] {
            assert_eq!(TraceContext::from_headers(Some(bad), None), None);
        }
    }

    #[test]
    fn debug_shows_no_body() {
        let body = Bytes::from_static(br#"{"eventType":"a","payload":{"userToken":"hunter2"}}"#);
        let accepted = crate::signature::Verifier::new(&[], false, std::time::Duration::ZERO)
            .verify(None, None, body, Timestamp::UNIX_EPOCH)
            .unwrap();
        let shown = format!("{accepted:?}");
        let event = Event::new(accepted, None, None, Timestamp::UNIX_EPOCH);
        for shown in [shown, format!("{event:?}")] {
            let bytes = format!("{:?}", b"hunter2");
            assert!(!shown.contains("hunter2") && !shown.contains(bytes.trim_matches(['[', ']'])), "{shown}");
        }
    }

    #[test]
    fn the_fingerprint_is_sha256_in_hex() {
        let expected = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(Fingerprint::of(b"").to_string(), expected);
    }

    proptest! {
        #[test]
        fn parsing_never_panics(body in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Envelope::parse(&body);
        }

        #[test]
        fn what_serde_json_reads_is_read_the_same(event_type in ".*", scan_id in ".*") {
            let body = serde_json::json!({"eventType": event_type, "payload": {"scanId": scan_id}}).to_string();
            let envelope = Envelope::parse(body.as_bytes()).unwrap();
            prop_assert_eq!(&envelope.event_type, &event_type);
            prop_assert_eq!(envelope.scan_id.as_deref(), Some(scan_id.as_str()));
        }
    }
}
