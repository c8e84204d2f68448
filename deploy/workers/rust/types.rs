//! The events in Rust, by hand after `deploy/workers/schemas`: what is not named here stays in `extra`, and unknown
//! states and types are kept as they are. No `Debug`, because `user_token` must not reach a log.
#![allow(dead_code, unreachable_pub, reason = "a worker uses what it needs")]

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{Deserializer, Error, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;

/// The body of every message. Its payload depends on the type: see [`ScanPayload`] and [`BodyShapePredictionPayload`].
#[derive(Clone, Deserialize, Serialize)]
#[serde(try_from = "Fields", rename_all = "camelCase")]
pub struct Envelope {
    /// What happened: family, step and result, separated by dots.
    pub event_type: EventType,
    /// The subject of the event.
    pub payload: Fields,
    /// Fields that Prism has added.
    #[serde(flatten)]
    pub extra: Fields,
}

/// The documented event types. Prism adds others without notice.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub enum EventType {
    /// Prism processes a scan.
    #[serde(rename = "scan.processing.started")]
    ScanStarted,
    /// The assets of a scan are ready.
    #[serde(rename = "scan.processing.succeeded")]
    ScanSucceeded,
    /// A scan could not be used.
    #[serde(rename = "scan.processing.failed")]
    ScanFailed,
    /// Prism processes a Future Me avatar.
    #[serde(rename = "body_shape_prediction.processing.started")]
    PredictionStarted,
    /// The assets of a Future Me avatar are ready.
    #[serde(rename = "body_shape_prediction.processing.succeeded")]
    PredictionSucceeded,
    /// A Future Me avatar could not be made.
    #[serde(rename = "body_shape_prediction.processing.failed")]
    PredictionFailed,
    /// Any other type, as it is.
    #[serde(untagged)]
    Unknown(String),
}

impl EventType {
    /// The type as a string.
    pub fn text(&self) -> String {
        match serde_json::to_value(self) {
            Ok(Value::String(text)) => text,
            _ => String::new(),
        }
    }
}

/// The payload of `scan.processing.*`.
#[derive(Clone, Deserialize, Serialize)]
#[serde(try_from = "Fields", rename_all = "camelCase")]
pub struct ScanPayload {
    /// Identifies the scan, in Prism's API as well.
    pub scan_id: String,
    /// Identifies the user inside Prism: a debugging aid.
    pub user_id: String,
    /// Identifies your user. Treat it as a secret.
    pub user_token: String,
    /// The state when Prism sent the event.
    pub state: State,
    /// Fields that Prism has added.
    #[serde(flatten)]
    pub extra: Fields,
}

/// The payload of `body_shape_prediction.processing.*`.
#[derive(Clone, Deserialize, Serialize)]
#[serde(try_from = "Fields", rename_all = "camelCase")]
pub struct BodyShapePredictionPayload {
    /// Identifies the prediction, in Prism's API as well.
    pub body_shape_prediction_id: String,
    /// Identifies the scan that the prediction is made from.
    pub scan_id: String,
    /// Identifies the user inside Prism: a debugging aid.
    pub user_id: String,
    /// Identifies your user. Treat it as a secret.
    pub user_token: String,
    /// The state when Prism sent the event.
    pub state: State,
    /// Fields that Prism has added.
    #[serde(flatten)]
    pub extra: Fields,
}

/// The documented states of scans and predictions. Prism adds others without notice.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum State {
    /// A scan is known, and nothing is processed yet.
    Created,
    /// The pipeline is busy.
    Processing,
    /// The assets can be fetched.
    Ready,
    /// It could not be made.
    Failed,
    /// Any other state, as it is.
    #[serde(untagged)]
    Unknown(String),
}

/// The fields of an object. Each value is the JSON that Prism sent, so that no number is too large and no nesting too
/// deep: `serde_json::from_str(value.get())` reads one. Of two fields with one name the last counts.
#[derive(Clone, Default, Deserialize, Serialize)]
#[serde(from = "BTreeMap<Text, Box<RawValue>>")]
pub struct Fields(pub BTreeMap<String, Box<RawValue>>);

impl Fields {
    /// `None` if the text is not an object.
    pub fn parse(json: &str) -> Option<Self> {
        serde_json::from_str(json).ok()
    }

    fn take_text(&mut self, name: &str) -> Result<String, String> {
        let value = self.0.remove(name);
        value.and_then(|value| text(&value)).ok_or_else(|| format!("the payload's {name} is missing or not a string"))
    }

    fn take_state(&mut self) -> Result<State, String> {
        open(self.take_text("state")?)
    }
}

/// A string without its escapes; `None` for a value of another type. Half of a surrogate pair, which a Rust string
/// cannot have, becomes U+FFFD.
pub fn text(value: &RawValue) -> Option<String> {
    serde_json::from_str(value.get()).ok().map(|Text(text)| text)
}

/// A string as an enum that takes any.
fn open<T: for<'a> Deserialize<'a>>(word: String) -> Result<T, String> {
    serde_json::from_value(Value::String(word)).map_err(|error| error.to_string())
}

impl TryFrom<Fields> for Envelope {
    type Error = String;

    fn try_from(mut fields: Fields) -> Result<Self, String> {
        let event_type = fields.0.remove("eventType").and_then(|value| text(&value));
        let payload = fields.0.remove("payload").and_then(|value| Fields::parse(value.get()));
        Ok(Self {
            event_type: open(event_type.ok_or("the body is not an event")?)?,
            payload: payload.ok_or("the event has no payload")?,
            extra: fields,
        })
    }
}

impl TryFrom<Fields> for ScanPayload {
    type Error = String;

    fn try_from(mut fields: Fields) -> Result<Self, String> {
        Ok(Self {
            scan_id: fields.take_text("scanId")?,
            user_id: fields.take_text("userId")?,
            user_token: fields.take_text("userToken")?,
            state: fields.take_state()?,
            extra: fields,
        })
    }
}

impl TryFrom<Fields> for BodyShapePredictionPayload {
    type Error = String;

    fn try_from(mut fields: Fields) -> Result<Self, String> {
        Ok(Self {
            body_shape_prediction_id: fields.take_text("bodyShapePredictionId")?,
            scan_id: fields.take_text("scanId")?,
            user_id: fields.take_text("userId")?,
            user_token: fields.take_text("userToken")?,
            state: fields.take_state()?,
            extra: fields,
        })
    }
}

impl From<BTreeMap<Text, Box<RawValue>>> for Fields {
    fn from(fields: BTreeMap<Text, Box<RawValue>>) -> Self {
        Self(fields.into_iter().map(|(Text(name), value)| (name, value)).collect())
    }
}

/// See [`text`].
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Text(String);

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Bytes;

        impl Visitor<'_> for Bytes {
            type Value = Text;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Text, E> {
                Ok(Text(text.to_owned()))
            }

            fn visit_bytes<E: Error>(self, bytes: &[u8]) -> Result<Text, E> {
                Ok(Text(String::from_utf8_lossy(bytes).into_owned()))
            }
        }

        deserializer.deserialize_bytes(Bytes) // as a string, serde_json refuses half of a surrogate pair
    }
}
