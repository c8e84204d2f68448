//! `send --serve-api`: plays Prism's API as well. It knows the scans and predictions of the events that `send` made up,
//! also of those that it gave up, so that a relay with `reconcile.api_key` can ask for what it did not get.
//!
//! It listens at `reconcile.api_url` and takes `reconcile.api_key`, so it and the relay cannot disagree.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hyper::header::{ACCEPT, AUTHORIZATION};
use hyper::{HeaderMap, Method, StatusCode};
use jiff::Timestamp;
use percent_encoding::percent_decode_str;
use serde_json::{Value, json};
use subtle::ConstantTimeEq;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::failure::Failure;
use super::interrupt::Interrupt;
use crate::config::Config;
use crate::metrics::Metrics;
use crate::problem;
use crate::secret::Secret;
use crate::server::{Limits, Server, listen};

/// Maximum number of events with `--serve-api`. Each may have a scan and a prediction to remember, about 2 kB together.
pub(super) const EVENTS_MAX: u64 = 100_000;

/// What a relay that could ask the stand-in has in its configuration.
const HINT: &str = "--serve-api needs a configuration with which the relay asks it, such as reconcile.api_key = \
                    \"some-key-for-this-test\" and reconcile.api_url = \"http://127.0.0.1:9191\"";

/// One relay asks, and a person with curl.
const LIMITS: Limits = Limits {
    connections_max: 64,
    connections_per_source_max: 64,
    unlimited_sources: Vec::new(),
    header_timeout: Duration::from_secs(10),
    idle_timeout: Duration::from_secs(75),
    write_timeout: Duration::from_secs(30),
    headers_max: 64,
    header_bytes_max: 16 * 1024,
};

/// The version of Prism's API that the relay asks for.
const VERSION: &str = "v=1";

/// Prism's API, served until it is dropped.
pub(super) struct PrismApi {
    address: SocketAddr,
    records: Arc<Mutex<Records>>,
    _serving: JoinSet<()>,
}

/// What the API knows: scans and predictions by id, as it answers them.
#[derive(Default)]
struct Records {
    scans: HashMap<String, Value>,
    predictions: HashMap<String, Value>,
}

impl PrismApi {
    /// Listens at `reconcile.api_url`.
    pub(super) async fn serve(config: &Config) -> Result<Self, Failure> {
        let Some((address, key)) = stand_in(config) else { return Err(Failure::Usage(HINT.to_owned())) };
        let listener = listen(address, "reconcile.api_url", None).await?;
        let records: Arc<Mutex<Records>> = Arc::default();
        let server = Server::new(listener, "prism-api", LIMITS, None, &Metrics::new());
        let (known, key) = (Arc::clone(&records), Arc::new(key));
        let handler = move |request: hyper::Request<_>, _| {
            let (records, key) = (Arc::clone(&known), Arc::clone(&key));
            async move {
                let answer = answer(request.method(), request.uri().path(), request.headers(), &key, &lock(&records));
                answer.unwrap_or_else(refusal)
            }
        };
        let mut serving = JoinSet::new();
        serving.spawn(server.run(handler, CancellationToken::new()));
        Ok(Self { address, records, _serving: serving })
    }

    /// Remembers what an event says, from its first try on: Prism knows it whether the event arrives or not.
    pub(super) fn note(&self, body: &[u8]) {
        lock(&self.records).note(body, Timestamp::now());
    }

    /// What it serves, in a sentence.
    pub(super) fn description(&self) -> String {
        let records = lock(&self.records);
        let (scans, predictions) = (records.scans.len(), records.predictions.len());
        format!("serving {scans} scans and {predictions} predictions at http://{} until Ctrl-C", self.address)
    }

    /// Waits for Ctrl-C or SIGTERM, serving.
    pub(super) async fn until_interrupted(self) -> Result<(), Failure> {
        // An interrupt is the way to end it, and so no error.
        let _ = Interrupt::listen()?.or(std::future::pending::<()>()).await;
        Ok(())
    }
}

/// The address and the key with which a relay of this configuration would ask the stand-in.
fn stand_in(config: &Config) -> Option<(SocketAddr, Secret)> {
    let authority = config.reconcile.api_url.as_str().strip_prefix("http://")?;
    // The configuration allows http:// for loopback only.
    let address = authority.replacen("localhost", "127.0.0.1", 1).parse().ok()?;
    Some((address, config.reconcile.api_key.clone()?))
}

fn lock(records: &Mutex<Records>) -> MutexGuard<'_, Records> {
    records.lock().unwrap_or_else(PoisonError::into_inner)
}

type Answer = hyper::Response<http_body_util::Full<bytes::Bytes>>;

/// Answers one request, or gives the status to refuse it with.
fn answer(
    method: &Method,
    path: &str,
    headers: &HeaderMap,
    key: &Secret,
    records: &Records,
) -> Result<Answer, StatusCode> {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
    let given = text(AUTHORIZATION).and_then(|value| value.strip_prefix("Bearer ")).unwrap_or_default();
    if !bool::from(given.as_bytes().ct_eq(key.expose().as_bytes())) {
        return Err(StatusCode::UNAUTHORIZED);
    }
    if !text(ACCEPT).is_some_and(|accept| accept.split(';').any(|part| part.trim() == VERSION)) {
        return Err(StatusCode::NOT_ACCEPTABLE);
    }
    if method != Method::GET {
        return Err(StatusCode::METHOD_NOT_ALLOWED);
    }
    let found = records.find(path).ok_or(StatusCode::NOT_FOUND)?;
    Ok(problem::json(StatusCode::OK, &found))
}

fn refusal(status: StatusCode) -> Answer {
    problem::json(status, &json!({ "statusCode": status.as_u16(), "message": status.canonical_reason() }))
}

impl Records {
    /// Takes a body without a scan for no event of Prism.
    fn note(&mut self, body: &[u8], now: Timestamp) {
        let event: Value = serde_json::from_slice(body).unwrap_or_default();
        let payload = &event["payload"];
        let Some(scan) = payload["scanId"].as_str() else { return };
        let status = match payload["bodyShapePredictionId"].as_str() {
            Some(id) => {
                let prediction = json!({ "id": id, "status": payload["state"], "scanId": scan });
                record(&mut self.predictions, id, prediction, now);
                // A prediction is made from a scan that is ready.
                json!("READY")
            }
            None => payload["state"].clone(),
        };
        let (user, token) = (&payload["userId"], &payload["userToken"]);
        let dto = json!({ "id": scan, "status": status, "userId": user, "userToken": token });
        record(&mut self.scans, scan, dto, now);
    }

    /// What stands at a path of the API.
    fn find(&self, path: &str) -> Option<Value> {
        let parts: Vec<_> =
            path.strip_prefix('/')?.split('/').map(|part| percent_decode_str(part).decode_utf8()).collect();
        match parts.iter().map(|part| part.as_deref()).collect::<Result<Vec<_>, _>>().ok()?[..] {
            ["scans", id] => self.scans.get(id).cloned(),
            ["body-shape-prediction", id] => self.predictions.get(id).cloned(),
            ["scans", id, "body-shape-predictions"] => {
                self.scans.get(id)?;
                let of_scan = self.predictions.values().filter(|prediction| prediction["scanId"] == id);
                Some(of_scan.cloned().collect())
            }
            _ => None,
        }
    }
}

/// Inserts what the API answers for an id, with its times.
fn record(records: &mut HashMap<String, Value>, id: &str, mut dto: Value, now: Timestamp) {
    let now = json!(format!("{now:.3}"));
    dto["createdAt"] = records.get(id).map_or_else(|| now.clone(), |old| old["createdAt"].clone());
    dto["updatedAt"] = now;
    records.insert(id.to_owned(), dto);
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "a-key-of-the-tests";

    fn noted(bodies: &[Value]) -> Records {
        let mut records = Records::default();
        for (seconds, body) in (0..).zip(bodies) {
            records.note(body.to_string().as_bytes(), Timestamp::from_second(seconds).unwrap());
        }
        records
    }

    fn event(kind: &str, payload: Value) -> Value {
        json!({ "eventType": kind, "payload": payload })
    }

    #[test]
    fn a_scan_has_the_state_of_its_last_event_and_keeps_its_creation() {
        let payload = |state| json!({ "scanId": "a b/c", "userId": "u", "userToken": "t", "state": state });
        let records = noted(&[event("scan.processing.started", payload("PROCESSING")), event("x", payload("READY"))]);
        let expected = json!({ "id": "a b/c", "status": "READY", "userId": "u", "userToken": "t",
                               "createdAt": "1970-01-01T00:00:00.000Z", "updatedAt": "1970-01-01T00:00:01.000Z" });
        assert_eq!(records.find("/scans/a%20b%2Fc"), Some(expected));
        assert_eq!(records.find("/scans/a%20b%2Fc/body-shape-predictions"), Some(json!([])));
        for unknown in ["/scans/other", "/scans", "/", "", "scans/a%20b%2Fc", "/scans/other/body-shape-predictions"] {
            assert_eq!(records.find(unknown), None, "{unknown:?}");
        }
    }

    #[test]
    fn a_prediction_has_a_state_of_its_own_and_the_user_of_its_scan() {
        let payload = json!({ "bodyShapePredictionId": "p", "scanId": "s", "userId": "u", "userToken": "t",
                              "state": "FAILED" });
        let records = noted(&[event("body_shape_prediction.processing.failed", payload), json!([]), json!("text")]);
        let prediction = records.find("/body-shape-prediction/p").unwrap();
        assert_eq!((&prediction["status"], &prediction["scanId"]), (&json!("FAILED"), &json!("s")));
        assert_eq!(records.find("/scans/s/body-shape-predictions"), Some(json!([prediction])));
        let scan = records.find("/scans/s").unwrap();
        assert_eq!((&scan["status"], &scan["userToken"]), (&json!("READY"), &json!("t")));
    }

    #[test]
    fn a_request_needs_the_key_and_the_version() {
        let records = noted(&[event("scan.processing.started", json!({ "scanId": "s", "state": "PROCESSING" }))]);
        let status = |method: Method, key: &str, accept: &str| {
            let headers = [(AUTHORIZATION, format!("Bearer {key}")), (ACCEPT, accept.to_owned())];
            let headers = headers.map(|(name, value)| (name, value.parse().unwrap())).into_iter().collect();
            let answer = answer(&method, "/scans/s", &headers, &Secret::new(KEY), &records);
            answer.map_or_else(|status| status.as_u16(), |answer| answer.status().as_u16())
        };
        let json = "application/json;v=1";
        assert_eq!(status(Method::GET, KEY, json), 200);
        assert_eq!(status(Method::GET, "another-key", json), 401);
        assert_eq!(status(Method::GET, KEY, "application/json"), 406);
        assert_eq!(status(Method::POST, KEY, json), 405);
    }
}
