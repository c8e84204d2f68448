//! What Prism sends and the schemas do not describe: event types, fields, states, values of another JSON type, fields
//! that are missing. Each is counted, and its name is shown once. It changes nothing for the event: a look at a copy
//! comes after the answer.
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
use crate::log_limiter::LogLimiter;
use crate::metrics::Metrics;
use crate::schemas;

/// Maximum number of bodies that wait to be looked at or are looked at, and of their bytes. More, and larger ones, are
/// not looked at: what is new comes again.
const WAITING_MAX: usize = 64;
const WAITING_BYTES_MAX: usize = 256 * 1024;

/// The pause after the waiting bodies were looked at, so that a flood cannot take time from the answers: at least
/// [`PAUSE_MIN`], and [`PAUSE_FACTOR`] times as long as the look took. [`PAUSE_MAX`] keeps what is new visible within
/// a second.
const PAUSE_MIN: Duration = Duration::from_millis(10);
const PAUSE_FACTOR: u32 = 50;
const PAUSE_MAX: Duration = Duration::from_millis(500);

/// Maximum number of names that are kept. Another one takes the place of the name that was not seen for the longest
/// time; one of an unsigned event, which anybody may send, never the place of a name that Prism signed.
const NAMES_MAX: usize = 50;
/// Maximum number of findings in one event.
const FINDINGS_MAX: usize = 10;
/// Longer names are not shown.
const NAME_CHARS_MAX: usize = 40;
/// What is shown of a name that could be a value, or a text for a person.
const UNPRINTABLE: &str = "(unprintable)";

/// What kind of thing is not described.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A value of `eventType`.
    EventType,
    /// A field of the envelope or of a documented payload.
    Field,
    /// A value of `state`.
    State,
    /// The JSON type of a documented field, or its absence.
    Type,
}

/// Something that the schemas do not describe, since the start of the process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Unexpected {
    /// What kind of thing it is.
    pub kind: Kind,
    /// The path of a field, the word of a type or state, the path and the new type of a value, or `missing`.
    pub name: String,
    /// Whether a signed event had it.
    pub signed: bool,
    /// When it came first.
    pub first_seen: Timestamp,
    /// When it came last.
    pub last_seen: Timestamp,
    /// How often it came. Under a flood, not every event is looked at.
    pub count: u64,
}

/// The body of an accepted event.
struct Offered {
    body: Bytes,
    signed: bool,
}

/// Looks at accepted events and keeps what the schemas do not describe.
pub struct Drift {
    waiting: mpsc::Sender<Offered>,
    waiting_bytes: AtomicUsize,
    /// Taken by [`Self::run`].
    bodies: Mutex<Option<mpsc::Receiver<Offered>>>,
    contract: Contract,
    found: Mutex<BTreeMap<(Kind, String), Unexpected>>,
    log_limiter: LogLimiter,
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
            log_limiter: LogLimiter::default(),
        }
    }
}

impl Drift {
    /// Offers the body of an accepted event. Costs two atomic operations, and one more if many bodies wait already.
    pub fn offer(&self, body: &Bytes, signed: bool) {
        let waiting = self.waiting_bytes.fetch_add(body.len(), Ordering::Relaxed);
        let fits = waiting.saturating_add(body.len()) <= WAITING_BYTES_MAX;
        if !fits || self.waiting.try_send(Offered { body: body.clone(), signed }).is_err() {
            self.waiting_bytes.fetch_sub(body.len(), Ordering::Relaxed);
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
            for Offered { body, signed } in batch.drain(..) {
                self.look(&body, signed, metrics, Timestamp::now());
                self.waiting_bytes.fetch_sub(body.len(), Ordering::Relaxed);
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

    fn look(&self, body: &[u8], signed: bool, metrics: &Metrics, now: Timestamp) {
        for (kind, name) in self.contract.unexpected_in(body) {
            metrics.unexpected.of(kind as usize).increment(1);
            let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(known) = found.get_mut(&(kind, name.clone())) {
                known.count += 1;
                known.last_seen = now;
                known.signed |= signed;
                continue;
            }
            let due = if found.len() < NAMES_MAX {
                Some(None)
            } else {
                let may_go = found.iter().filter(|(_, known)| signed || !known.signed);
                let oldest = may_go.min_by_key(|(_, known)| (known.signed, known.last_seen));
                let Some(oldest) = oldest.map(|(key, _)| key.clone()) else { continue };
                found.remove(&oldest);
                // A new name for each event must not fill the log.
                self.log_limiter.due(kind.word(), Instant::now())
            };
            if let Some(unreported) = due {
                info!(
                    kind = kind.word(),
                    name,
                    signed,
                    unreported,
                    "an event has something that the schemas do not describe. It is relayed like any other; check that \
                     the workers accept it"
                );
            }
            let new = Unexpected { kind, name: name.clone(), signed, first_seen: now, last_seen: now, count: 1 };
            found.insert((kind, name), new);
        }
    }
}

impl Kind {
    /// The kind in metrics, logs and `/api`.
    fn word(self) -> &'static str {
        ["event_type", "field", "state", "type"][self as usize]
    }
}

/// What is described, read from the compiled-in schemas.
struct Contract {
    envelope: Shape,
    /// By event type.
    payloads: BTreeMap<String, Shape>,
}

/// What is described of one value.
struct Shape {
    /// The JSON type.
    r#type: String,
    /// The fields of an object. An object without any may have all.
    fields: BTreeMap<String, Shape>,
    /// The fields that an object always has.
    required: Vec<String>,
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
        let texts = |list: &Value| {
            let texts = list.as_array().into_iter().flatten();
            texts.filter_map(Value::as_str).map(str::to_owned).collect()
        };
        Self {
            r#type: schema["type"].as_str().unwrap_or("string").to_owned(),
            fields: fields.map(|(name, schema)| (name.clone(), Self::of(schema))).collect(),
            required: texts(&schema["required"]),
            // An open list of words: `"anyOf": [{ "enum": [...] }, { "type": "string" }]`.
            words: texts(&schema["anyOf"][0]["enum"]),
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
                let shown = if words == Kind::EventType { shown_type(&word) } else { shown_name(&word) };
                findings.add(words, || shown.to_owned());
            }
        } else if !self.fields.is_empty() {
            let below = |name: &str| if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") };
            let mut missing: Vec<_> = self.required.iter().collect();
            let _ = members(value.get(), |name, value| {
                missing.retain(|required| *required != name);
                match self.fields.get(name) {
                    Some(shape) => shape.compare(value, &below(name), words, findings),
                    None => findings.add(Kind::Field, || below(shown_name(name))),
                }
            });
            for name in missing {
                findings.add(Kind::Type, || format!("{}: missing", below(name)));
            }
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

/// An event type, if it looks like one.
fn shown_type(word: &str) -> &str {
    let plain = |c: char| c.is_ascii_alphanumeric() || ['.', '_', '-'].contains(&c);
    let is_type = !word.is_empty() && word.len() <= 2 * NAME_CHARS_MAX && word.chars().all(plain);
    if is_type { word } else { UNPRINTABLE }
}

/// The name of a field or a state, if it looks like a name in a program. Anything else could be a value that got there
/// by mistake, such as a token as a key, or a sentence that somebody wants an operator to read.
fn shown_name(name: &str) -> &str {
    let begins = |c: char| c.is_ascii_alphabetic() || ['_', '$'].contains(&c);
    let is_name = name.len() <= NAME_CHARS_MAX
        && name.starts_with(begins)
        && name.chars().all(|c| begins(c) || c.is_ascii_digit());
    if is_name { name } else { UNPRINTABLE }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unexpected(body: &str) -> Vec<(Kind, String)> {
        Contract::compiled_in().unexpected_in(body.as_bytes())
    }

    fn scan(more: &str) -> String {
        let mut payload = r#""scanId":"s","userId":"u","userToken":"t","state":"READY""#.to_owned();
        // A field that comes twice would hide what the schemas say of the first.
        for field in ["userId", "userToken", "state"].into_iter().filter(|field| more.contains(field)) {
            payload = payload.split(',').filter(|part| !part.contains(field)).collect::<Vec<_>>().join(",");
        }
        format!(r#"{{"eventType":"scan.processing.started","payload":{{{payload}{more}}}}}"#)
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
            (scan(r#","a\u001b[31m\u202e<b>":1"#), vec![(Field, "payload.(unprintable)")]),
            (scan(r#","The relay is down, call 555":1"#), vec![(Field, "payload.(unprintable)")]),
            (scan(r#","partner-user-42":1"#), vec![(Field, "payload.(unprintable)")]),
            (scan(r#","":1,"9":1"#), vec![(Field, "payload.(unprintable)"); 2]),
            (scan(&format!(r#","{long}":1"#)), vec![(Field, "payload.(unprintable)")]),
            (scan(r#","_new$Field2":1"#), vec![(Field, "payload._new$Field2")]),
            (scan(r#","state":"partner-user-42""#), vec![(State, UNPRINTABLE)]),
            (scan("").replace(r#""userId":"u","#, ""), vec![(Type, "payload.userId: missing")]),
            (scan("").replace(r#""eventType""#, r#""kind""#), vec![(Field, "kind"), (Type, "eventType: missing")]),
            (scan("").replacen('{', r#"{"eventVersion":2,"#, 1), vec![(Field, "eventVersion")]),
            (scan("").replace("started", "paused"), vec![(EventType, "scan.processing.paused")]),
            (r#"{"eventType":"a b","payload":{"anything":1}}"#.to_owned(), vec![(EventType, UNPRINTABLE)]),
            (r#"{"eventType":7}"#.to_owned(), vec![(Type, "eventType: number"), (Type, "payload: missing")]),
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
    fn names_are_few_and_a_new_one_takes_the_place_of_the_oldest() {
        let (drift, metrics, now) = (Drift::default(), Metrics::new(), Timestamp::UNIX_EPOCH);
        let look = |name: &str, second: usize, signed: bool| {
            let event = scan(&format!(r#","{name}":1"#));
            drift.look(event.as_bytes(), signed, &metrics, now + Duration::from_secs(second as u64));
        };
        let has = |name: &str| drift.found().iter().any(|found| found.name == format!("payload.{name}"));
        (0..NAMES_MAX).for_each(|number| look(&format!("field{number}"), number, false));
        look("field0", NAMES_MAX, false);
        look("another", NAMES_MAX + 1, false);
        assert_eq!(drift.found().len(), NAMES_MAX);
        assert!(has("another") && has("field0") && !has("field1") && has("field2"));

        // What Prism signed takes the place of what anybody can send, however new that is, and never the other way.
        look("signed", 0, true);
        (0..2 * NAMES_MAX).for_each(|number| look(&format!("flood{number}"), 2 * NAMES_MAX + number, false));
        assert!(has("signed") && has(&format!("flood{}", 2 * NAMES_MAX - 1)));
        (0..NAMES_MAX).for_each(|number| look(&format!("real{number}"), number, true));
        look("unsigned", 9 * NAMES_MAX, false);
        assert!(!has("unsigned") && drift.found().iter().all(|found| found.signed));
        look("late", NAMES_MAX, true);
        assert!(has("late"));

        let many: String = (0..2 * FINDINGS_MAX).map(|number| format!(r#","field{number}":1"#)).collect();
        let before = 2 + 1 + 4 * NAMES_MAX + 2;
        drift.look(scan(&many).as_bytes(), true, &metrics, now);
        let counted = format!("prism_relay_unexpected_total{{kind=\"field\"}} {}\n", before + FINDINGS_MAX);
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
        (0..10 * WAITING_MAX).for_each(|_| drift.offer(&event, true));
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

        // Bodies that wait never hold more memory than the limit, and one that is larger is not looked at.
        let drift = Drift::default();
        let of = |bytes: usize| {
            let event = scan(r#","quality":"""#);
            let padding = "x".repeat(bytes - event.len());
            Bytes::from(scan(&format!(r#","quality":"{padding}""#)))
        };
        drift.offer(&of(WAITING_BYTES_MAX + 1), true);
        assert_eq!((drift.waiting.capacity(), drift.waiting_bytes.load(Ordering::Relaxed)), (WAITING_MAX, 0));
        (0..3).for_each(|_| drift.offer(&of(WAITING_BYTES_MAX / 2), true));
        let waiting = drift.waiting_bytes.load(Ordering::Relaxed);
        assert_eq!((drift.waiting.capacity(), waiting), (WAITING_MAX - 2, WAITING_BYTES_MAX));
    }
}
