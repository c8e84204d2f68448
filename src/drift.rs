//! What Prism sends and its documentation does not have: event types, fields, states, values of another JSON type. Each
//! is counted, and its name is shown once. It changes nothing for the event: a look at a copy comes after the answer.
//!
//! Names come from outside, so they are few, short and cleaned. No value of a field is kept; of a `state` and an
//! `eventType`, the word is the name.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use jiff::Timestamp;
use serde::Serialize;
use serde_json::Value;
use serde_json::value::RawValue;
use tokio::sync::mpsc;
use tokio::time::sleep;
use tracing::info;

use crate::event::{members, text_of};
use crate::metrics::Metrics;
use crate::schemas;

/// Maximum number of bodies that wait to be looked at, and of their bytes. More are not looked at: what is new comes
/// again.
const WAITING_MAX: usize = 64;
const WAITING_BYTES_MAX: usize = 256 * 1024;

/// The pause after the waiting bodies were looked at, so that a flood cannot take time from the answers: at least
/// [`PAUSE_MIN`], and [`PAUSE_FACTOR`] times as long as the look took. [`PAUSE_MAX`] keeps what is new visible within
/// a second.
const PAUSE_MIN: Duration = Duration::from_millis(10);
const PAUSE_FACTOR: u32 = 50;
const PAUSE_MAX: Duration = Duration::from_millis(500);

/// Maximum number of names that are kept. What is found after that is counted by kind only.
const NAMES_MAX: usize = 50;
/// Maximum number of findings in one event.
const FINDINGS_MAX: usize = 10;
/// Longer names are cut.
const NAME_CHARS_MAX: usize = 60;
/// The name of a word that does not look like one.
const UNPRINTABLE: &str = "(unprintable)";

/// What kind of thing is not documented.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A value of `eventType`.
    EventType,
    /// A field of the envelope or of a documented payload.
    Field,
    /// A value of `state`.
    State,
    /// The JSON type of a documented field.
    Type,
}

/// Something that is not documented, since the start of the process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Unexpected {
    /// What kind of thing it is.
    pub kind: Kind,
    /// The path of a field, the word of a type or state, the path and the new type of a value.
    pub name: String,
    /// When it came first.
    pub first_seen: Timestamp,
    /// When it came last.
    pub last_seen: Timestamp,
    /// How often it came. Under a flood, not every event is looked at.
    pub count: u64,
}

/// Looks at accepted events and keeps what is not documented.
pub struct Drift {
    waiting: mpsc::Sender<Bytes>,
    waiting_bytes: AtomicUsize,
    /// Taken by [`Self::run`].
    bodies: Mutex<Option<mpsc::Receiver<Bytes>>>,
    contract: Contract,
    found: Mutex<BTreeMap<(Kind, String), Unexpected>>,
}

impl Default for Drift {
    fn default() -> Self {
        let (waiting, bodies) = mpsc::channel(WAITING_MAX);
        Self {
            waiting,
            waiting_bytes: AtomicUsize::new(0),
            bodies: Mutex::new(Some(bodies)),
            contract: Contract::compiled_in(),
            found: Mutex::default(),
        }
    }
}

impl Drift {
    /// Offers the body of an accepted event. Costs two atomic operations, and one if many bodies wait already.
    pub fn offer(&self, body: &Bytes) {
        if self.waiting_bytes.load(Ordering::Relaxed) >= WAITING_BYTES_MAX {
            return;
        }
        if let Ok(place) = self.waiting.try_reserve() {
            self.waiting_bytes.fetch_add(body.len(), Ordering::Relaxed);
            place.send(body.clone());
        }
    }

    /// Looks at what is offered, until the task is dropped.
    pub async fn run(&self, metrics: &Metrics) {
        let bodies = self.bodies.lock().unwrap_or_else(PoisonError::into_inner).take();
        let mut bodies = bodies.expect("one task looks at the events");
        let mut batch = Vec::with_capacity(WAITING_MAX);
        loop {
            bodies.recv_many(&mut batch, WAITING_MAX).await;
            let begun = Instant::now();
            for body in batch.drain(..) {
                self.waiting_bytes.fetch_sub(body.len(), Ordering::Relaxed);
                self.look(&body, metrics, Timestamp::now());
            }
            sleep((begun.elapsed() * PAUSE_FACTOR).clamp(PAUSE_MIN, PAUSE_MAX)).await;
        }
    }

    /// What was found, the oldest first.
    pub fn found(&self) -> Vec<Unexpected> {
        let found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        let mut found: Vec<_> = found.values().cloned().collect();
        found.sort_by_key(|unexpected| unexpected.first_seen);
        found
    }

    fn look(&self, body: &[u8], metrics: &Metrics, now: Timestamp) {
        for (kind, name) in self.contract.unexpected_in(body) {
            metrics.unexpected.of(kind as usize).increment(1);
            let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
            let room = found.len() < NAMES_MAX;
            match found.get_mut(&(kind, name.clone())) {
                Some(known) => {
                    known.count += 1;
                    known.last_seen = now;
                }
                None if room => {
                    info!(
                        kind = kind.word(),
                        name,
                        "Prism sent something that its documentation does not have. The event is relayed like any \
                         other; check that the workers accept it"
                    );
                    let unexpected = Unexpected { kind, name: name.clone(), first_seen: now, last_seen: now, count: 1 };
                    found.insert((kind, name), unexpected);
                }
                None => {}
            }
        }
    }
}

impl Kind {
    /// The kind in metrics, logs and `/api`.
    fn word(self) -> &'static str {
        ["event_type", "field", "state", "type"][self as usize]
    }
}

/// What is documented, read from the compiled-in schemas.
struct Contract {
    envelope: Shape,
    /// By event type.
    payloads: BTreeMap<String, Shape>,
}

/// What is documented of one value.
struct Shape {
    /// The JSON type.
    r#type: String,
    /// The fields of an object. An object without any may have all.
    fields: BTreeMap<String, Shape>,
    /// The words that a string may be. A string without any may be all.
    words: Vec<String>,
}

impl Contract {
    fn compiled_in() -> Self {
        let payloads = schemas::documented().into_iter();
        Self {
            envelope: Shape::of(&schemas::parsed(schemas::ENVELOPE)),
            payloads: payloads.map(|(name, schema)| (name, Shape::of(&schema))).collect(),
        }
    }

    /// Reads each byte of the body at most three times, keeps nothing of it, and never fails.
    fn unexpected_in(&self, body: &[u8]) -> Vec<(Kind, String)> {
        let mut findings = Findings::default();
        let text = std::str::from_utf8(body).unwrap_or_default();
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let Ok(event) = serde_json::from_str::<&RawValue>(text) else {
            findings.add(Kind::Type, || "the body: not JSON".to_owned());
            return findings.0;
        };
        let (mut event_type, mut payload) = (None, None);
        let _ = members(event.get(), |name, value| match name {
            "eventType" => event_type = text_of(value),
            "payload" => payload = Some(value),
            _ => {}
        });
        self.envelope.compare(event, "", Kind::EventType, &mut findings);
        let documented = event_type.and_then(|event_type| self.payloads.get(&*event_type));
        if let Some((shape, payload)) = documented.zip(payload)
            && json_type(payload) == "object"
        {
            shape.compare(payload, "payload", Kind::State, &mut findings);
        }
        findings.0
    }
}

#[derive(Default)]
struct Findings(Vec<(Kind, String)>);

impl Findings {
    fn add(&mut self, kind: Kind, name: impl FnOnce() -> String) {
        if self.0.len() < FINDINGS_MAX {
            self.0.push((kind, name()));
        }
    }
}

impl Shape {
    fn of(schema: &Value) -> Self {
        let fields = schema["properties"].as_object().into_iter().flatten();
        // An open list of words: `"anyOf": [{ "enum": [...] }, { "type": "string" }]`.
        let open = schema["anyOf"].as_array();
        let words = open.and_then(|open| open[0]["enum"].as_array()).into_iter().flatten();
        Self {
            r#type: schema["type"].as_str().unwrap_or("string").to_owned(),
            fields: fields.map(|(name, schema)| (name.clone(), Self::of(schema))).collect(),
            words: words.filter_map(Value::as_str).map(str::to_owned).collect(),
        }
    }

    /// `words` is the kind of an unknown word.
    fn compare(&self, value: &RawValue, path: &str, words: Kind, findings: &mut Findings) {
        let found = json_type(value);
        if found != self.r#type {
            let path = if path.is_empty() { "the body" } else { path };
            findings.add(Kind::Type, || format!("{path}: {found}"));
        } else if !self.words.is_empty() {
            let word = text_of(value).unwrap_or_default();
            if !self.words.iter().any(|known| *known == word) {
                findings.add(words, || shown_word(&word));
            }
        } else if !self.fields.is_empty() {
            let below = |name: &str| if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") };
            let _ = members(value.get(), |name, value| match self.fields.get(name) {
                Some(shape) => shape.compare(value, &below(name), words, findings),
                None => findings.add(Kind::Field, || below(&shown_name(name))),
            });
        }
    }
}

/// RFC 8259's word for the type of a value. Its first character shows it.
fn json_type(value: &RawValue) -> &'static str {
    match value.get().as_bytes().first() {
        Some(b'{') => "object",
        Some(b'[') => "array",
        Some(b'"') => "string",
        Some(b't' | b'f') => "boolean",
        Some(b'n') => "null",
        _ => "number",
    }
}

/// A type or a state, if it looks like one. Anything else could be a value that got there by mistake.
fn shown_word(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || ['.', '_', '-'].contains(&c);
    let is_word = !word.is_empty() && word.chars().take(NAME_CHARS_MAX + 1).count() <= NAME_CHARS_MAX;
    if is_word && word.chars().all(plain) { word.to_owned() } else { UNPRINTABLE.to_owned() }
}

/// The name of a field, cut, and without characters that could steer a terminal or the direction of a text.
fn shown_name(name: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || ['_', '-', '.', '$', '@', ' '].contains(&c);
    name.chars().take(NAME_CHARS_MAX).map(|c| if plain(c) { c } else { '?' }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unexpected(body: &str) -> Vec<(Kind, String)> {
        Contract::compiled_in().unexpected_in(body.as_bytes())
    }

    fn scan(more: &str) -> String {
        format!(r#"{{"eventType":"scan.processing.started","payload":{{"scanId":"s","state":"READY"{more}}}}}"#)
    }

    #[test]
    fn of_the_vendors_samples_only_types_outside_scans_and_future_me_are_unexpected() {
        let found: Vec<_> = include_str!("../tests/samples/events.jsonl").lines().flat_map(unexpected).collect();
        let expected = ["capture_data.validation.failed", "measurements.creation.succeeded"];
        assert_eq!(found, expected.map(|name| (Kind::EventType, name.to_owned())));
    }

    #[test]
    fn each_kind_is_found_and_named_without_a_value() {
        use Kind::{EventType, Field, State, Type};
        let long = "x".repeat(300);
        for (body, expected) in [
            (scan(r#","quality":{"blur":"partner-user-42"}"#), vec![(Field, "payload.quality")]),
            (scan(r#","state":"ARCHIVED""#), vec![(State, "ARCHIVED")]),
            (scan(r#","state":"partner user 42""#), vec![(State, UNPRINTABLE)]),
            (scan(&format!(r#","state":"{long}""#)), vec![(State, UNPRINTABLE)]),
            (scan(r#","state":"""#), vec![(State, UNPRINTABLE)]),
            (scan(r#","userToken":42"#), vec![(Type, "payload.userToken: number")]),
            (
                scan(r#","userToken":null,"userId":["u"]"#),
                vec![(Type, "payload.userToken: null"), (Type, "payload.userId: array")],
            ),
            (scan(r#","state":true"#), vec![(Type, "payload.state: boolean")]),
            (scan(r#","a\u001b[31m\u202e<b>":1"#), vec![(Field, "payload.a??31m??b?")]),
            (scan(&format!(r#","{long}":1"#)), vec![(Field, &format!("payload.{}", &long[..60]))]),
            (scan("").replacen('{', r#"{"eventVersion":2,"#, 1), vec![(Field, "eventVersion")]),
            (scan("").replace("started", "paused"), vec![(EventType, "scan.processing.paused")]),
            (r#"{"eventType":"a b","payload":{"anything":1}}"#.to_owned(), vec![(EventType, UNPRINTABLE)]),
            (r#"{"eventType":7}"#.to_owned(), vec![(Type, "eventType: number")]),
            (r#"{"eventType":"scan.processing.started","payload":"x"}"#.to_owned(), vec![(Type, "payload: string")]),
            (format!("\u{feff}{}", scan("")), vec![]),
            ("[]".to_owned(), vec![(Type, "the body: array")]),
            ("no".to_owned(), vec![(Type, "the body: not JSON")]),
        ] {
            let found = unexpected(&body);
            let found: Vec<_> = found.iter().map(|(kind, name)| (*kind, name.as_str())).collect();
            assert_eq!(found, expected, "{body}");
        }
        assert_eq!(Contract::compiled_in().unexpected_in(b"\xff"), [(Type, "the body: not JSON".to_owned())]);
    }

    #[test]
    fn names_are_few_and_counts_go_on() {
        let (drift, metrics, now) = (Drift::default(), Metrics::new(), Timestamp::UNIX_EPOCH);
        for number in 0..2 * NAMES_MAX {
            let event = scan(&format!(r#","field{number}":1"#));
            drift.look(event.as_bytes(), &metrics, now + Duration::from_secs(number as u64));
        }
        let many: String = (0..2 * FINDINGS_MAX).map(|number| format!(r#","field{number}":1"#)).collect();
        drift.look(scan(&many).as_bytes(), &metrics, now);
        let found = drift.found();
        assert_eq!((found.len(), found[0].name.as_str(), found[0].count), (NAMES_MAX, "payload.field0", 2));
        let counted = format!("prism_relay_unexpected_total{{kind=\"field\"}} {}\n", 2 * NAMES_MAX + FINDINGS_MAX);
        assert!(metrics.render().contains(&counted), "{}", metrics.render());
    }

    #[test]
    fn every_kind_has_its_word_in_metrics_and_api() {
        for kind in [Kind::EventType, Kind::Field, Kind::State, Kind::Type] {
            assert_eq!(serde_json::json!(kind), kind.word());
            let metrics = Metrics::new();
            metrics.unexpected.of(kind as usize).increment(1);
            let counted = format!("prism_relay_unexpected_total{{kind=\"{}\"}} 1\n", kind.word());
            assert!(metrics.render().contains(&counted), "{}", metrics.render());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_flood_and_large_bodies_are_sampled_and_what_is_new_is_found() {
        let (drift, metrics) = (Drift::default(), Metrics::new());
        let event = Bytes::from(scan(r#","quality":1"#));
        (0..10 * WAITING_MAX).for_each(|_| drift.offer(&event));
        assert_eq!(drift.waiting.capacity(), 0);
        let look = async |expected: u64| {
            tokio::select! {
                () = drift.run(&metrics) => {}
                () = sleep(PAUSE_MIN / 2) => {}
            }
            assert_eq!(drift.found()[0].count, expected);
            assert_eq!(drift.waiting_bytes.load(Ordering::Relaxed), 0);
        };
        look(WAITING_MAX as u64).await;

        let drift = Drift::default();
        let large = Bytes::from(scan(&format!(r#","quality":"{}""#, "x".repeat(WAITING_BYTES_MAX))));
        (0..3).for_each(|_| drift.offer(&large));
        assert_eq!(drift.waiting.capacity(), WAITING_MAX - 1, "one large body waits");
    }
}
