//! The events in Rust, by hand after `deploy/workers/schemas`: what is not named here stays in `extra`, and unknown
//! states and types are kept as they are. No `Debug`, because `user_token` must not reach a log.
#![allow(dead_code, unreachable_pub, reason = "a worker uses what it needs")]

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// The body of every message. Its payload depends on the type: see [`ScanPayload`] and [`BodyShapePredictionPayload`].
#[derive(Clone, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Envelope {
    /// What happened: family, step and result, separated by dots.
    pub event_type: EventType,
    /// The subject of the event.
    pub payload: Map<String, Value>,
    /// Fields that Prism has added.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
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
#[serde(rename_all = "camelCase")]
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
    pub extra: Map<String, Value>,
}

/// The payload of `body_shape_prediction.processing.*`.
#[derive(Clone, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
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
    pub extra: Map<String, Value>,
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
