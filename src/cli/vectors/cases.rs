//! The test messages of `deploy/workers/vectors`, as a relay would publish them.

use std::collections::BTreeMap;

use anyhow::{Context, anyhow};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use jiff::Timestamp;
use lapin::BasicProperties;
use lapin::message::Delivery;
use lapin::types::AMQPValue;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::broker::short_string;
use crate::cli::messages::{TEST, header};
use crate::event::{Envelope, Event, Fingerprint, Source};
use crate::publisher::message::Message;

/// The messages that the tests of the kits use.
const MESSAGES: &str = include_str!("../../../deploy/workers/vectors/messages.json");

/// One test message, and what a worker has to do with it.
#[derive(Deserialize)]
pub(super) struct Case {
    pub(super) name: String,
    pub(super) why: String,
    pub(super) message: Fields,
    pub(super) expect: Expectation,
}

#[derive(Deserialize)]
pub(super) struct Fields {
    message_id: Option<String>,
    pub(super) routing_key: String,
    headers: BTreeMap<String, String>,
    #[serde(default)]
    pub(super) redelivered: bool,
    body: Option<String>,
    body_base64: Option<String>,
    /// Replaces `PAD` in the body by this many letters.
    #[serde(default)]
    pad: usize,
}

#[derive(Deserialize)]
pub(super) struct Expectation {
    pub(super) settle: Settle,
}

/// What a worker has to do with a message.
#[derive(Clone, Copy, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Settle {
    Ack,
    Reject,
    /// One of both: the choice is the worker's.
    Any,
}

/// All test messages.
pub(super) fn cases() -> anyhow::Result<Vec<Case>> {
    serde_json::from_str(MESSAGES).context("cannot read the built-in vectors")
}

/// The name of the case that a message belongs to.
pub(super) fn case_of(message: &Delivery) -> String {
    header(&message.properties, TEST).unwrap_or_default()
}

/// The ids of this run for those of the vectors: a worker may remember the ids of an earlier run.
#[derive(Default)]
pub(super) struct Ids {
    new: BTreeMap<String, Uuid>,
    /// The id that was used twice.
    pub(super) duplicate: Option<String>,
}

impl Ids {
    /// What is not a UUID stays as it is.
    fn of(&mut self, id: &str) -> String {
        if Uuid::parse_str(id).is_err() {
            return id.to_owned();
        }
        if let Some(new) = self.new.get(id) {
            self.duplicate = Some(new.to_string());
        }
        self.new.entry(id.to_owned()).or_insert_with(Uuid::now_v7).to_string()
    }
}

impl Case {
    /// The message as the relay would publish it, but for what the vector says.
    pub(super) fn message(&self, ids: &mut Ids) -> anyhow::Result<(BasicProperties, Bytes)> {
        let fields = &self.message;
        let body = match (&fields.body, &fields.body_base64) {
            (Some(text), _) => Bytes::from(text.replace("PAD", &"x".repeat(fields.pad))),
            (None, Some(text)) => Bytes::from(BASE64_STANDARD.decode(text)?),
            (None, None) => return Err(anyhow!("{} has no body", self.name)),
        };
        let event = Event {
            id: Uuid::now_v7(),
            accepted_ms: Timestamp::now().as_millisecond(),
            source: Source::Webhook,
            authentic: true,
            trace: None,
            fingerprint: Fingerprint::of(&body),
            subject: None,
            body: body.clone(),
        };
        let message = Message::new(&event, Envelope::parse(&body).ok().as_ref(), None);
        let mut headers = message.properties.headers().clone().unwrap_or_default();
        let own = fields.headers.iter().filter(|(name, _)| *name != "prism-received-at");
        let own = own.map(|(name, value)| (name.as_str(), value.as_str()));
        for (name, value) in own.chain([(TEST, self.name.as_str())]) {
            headers.insert(name.into(), AMQPValue::LongString(value.into()));
        }
        let id = fields.message_id.as_deref().map(|id| ids.of(id));
        let properties = match id {
            Some(id) => message.properties.with_message_id(short_string(&id)?),
            None => without_id(&message.properties),
        };
        Ok((properties.with_headers(headers), body))
    }
}

/// lapin has no way to take a property away.
fn without_id(properties: &BasicProperties) -> BasicProperties {
    let mut new = BasicProperties::default().with_delivery_mode(2);
    if let Some(kind) = properties.kind() {
        new = new.with_type(kind.clone());
    }
    new
}

#[cfg(test)]
mod tests {
    use super::*;

    use lapin::types::ShortString;
    use serde_json::Value;

    /// The headers that a vector may add to those of the relay, for its story.
    const ADDED: [&str; 7] = [
        "x-first-death-queue",
        "x-first-death-reason",
        "x-first-death-exchange",
        "prism-original-key",
        "prism-replayed-at",
        "prism-future",
        "tracestate",
    ];

    #[test]
    fn each_vector_is_what_the_relay_would_publish_for_its_body() {
        let texts: Vec<Value> = serde_json::from_str(MESSAGES).unwrap();
        let mut names = std::collections::BTreeSet::new();
        for (case, text) in cases().unwrap().into_iter().zip(texts) {
            let name = &case.name;
            let (properties, body) = case.message(&mut Ids::default()).unwrap();
            let envelope = Envelope::parse(&body).ok();
            let key = crate::publisher::message::routing_key(envelope.as_ref());
            let came_back = case.message.headers.contains_key("x-first-death-queue");
            let was_moved = case.message.headers.contains_key("prism-original-key");
            assert_eq!(case.message.routing_key == key, !came_back && !was_moved, "{name}: {key}");
            assert_eq!(text["message"]["type"].as_str(), properties.kind().as_ref().map(ShortString::as_str), "{name}");
            assert_eq!(header(&properties, TEST).as_ref(), Some(name));

            let plain = Case { message: Fields { headers: BTreeMap::new(), ..case.message }, ..case };
            let (relayed, _) = plain.message(&mut Ids::default()).unwrap();
            let of_the_story = |name: &str| [&ADDED[..], &["prism-received-at", TEST]].concat().contains(&name);
            let relayed: BTreeMap<_, _> = relayed
                .headers()
                .iter()
                .flat_map(|headers| headers.inner().keys())
                .filter(|name| !of_the_story(name.as_str()) && name.as_str() != "prism-verified")
                .map(|name| (name.as_str(), header(&relayed, name.as_str()).unwrap()))
                .collect();
            let vector = text["message"]["headers"].as_object().unwrap().iter();
            let mut vector: BTreeMap<_, _> = vector
                .filter(|(name, _)| !of_the_story(name))
                .map(|(name, value)| (name.as_str(), value.as_str().unwrap().to_owned()))
                .collect();
            assert!(vector.remove("prism-verified").is_some_and(|word| ["true", "false"].contains(&&*word)));
            assert_eq!(vector, relayed, "{}", plain.name);
            assert!(names.insert(plain.name.clone()), "{} is there twice", plain.name);
        }
    }

    #[test]
    fn ids_are_new_in_each_run_and_the_same_within_it() {
        let (mut ids, old) = (Ids::default(), "019a0000-0000-7000-8000-000000000001");
        let first = ids.of(old);
        assert_ne!(first, old);
        assert_eq!(ids.duplicate, None);
        assert_eq!((ids.of(old), ids.duplicate.clone()), (first.clone(), Some(first)));
        assert_eq!(ids.of("../../evil"), "../../evil");
    }
}
