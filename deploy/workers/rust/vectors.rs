//! Runs `../vectors` through [`settle`], with a handler as in `worker.rs`. Copy it to test your own handler.

use std::cell::Cell;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use hmac::{Hmac, KeyInit, Mac};
use serde::Serialize;
use serde_json::Value;
use sha2::Sha256;

use super::kit::{Failure, Message, Payload, first_key, settle};
use super::sqlite_store::SqliteStore;
use super::types::{Fields, text};

fn vectors(text: &str) -> Vec<Value> {
    serde_json::from_str(text).expect("the vectors are JSON")
}

fn messages() -> Vec<Value> {
    vectors(include_str!("../vectors/messages.json"))
}

fn message(fields: &Value) -> Message {
    let own = |name: &str| fields[name].as_str().map(str::to_owned);
    let pad = "x".repeat(usize::try_from(fields["pad"].as_u64().unwrap_or(0)).expect("a short text"));
    let body = match own("body") {
        Some(body) => body.replace("PAD", &pad).into_bytes(),
        None => BASE64_STANDARD.decode(own("body_base64").expect("a body")).expect("base64"),
    };
    Message {
        id: own("message_id").unwrap_or_default(),
        property: own("type"),
        body,
        headers: fields["headers"].as_object().cloned().unwrap_or_default(),
        redelivered: fields["redelivered"] == true,
    }
}

/// No field, state or type is lost on a round trip, and no value is changed that is not typed.
fn assert_same(typed: &impl Serialize, sent: &Fields) {
    let written = serde_json::to_string(typed).expect("the types are JSON");
    let Fields(written) = Fields::parse(&written).expect("the types are objects");
    assert!(written.keys().eq(sent.0.keys()));
    for (name, value) in sent.0.iter().filter(|(name, _)| *name != "payload") {
        match text(value) {
            Some(sent) => assert_eq!(text(&written[name]), Some(sent)),
            None => assert_eq!(written[name].get(), value.get()),
        }
    }
}

async fn check(message: &Message) -> Result<(), Failure> {
    let body = String::from_utf8(message.body.clone()).expect("the body is text");
    let sent = Fields::parse(body.trim_start_matches('\u{feff}')).expect("the body is an object");
    let payload = Fields::parse(sent.0["payload"].get()).expect("the payload is an object");
    match message.payload()? {
        Payload::Scan(scan) => assert_same(&scan, &payload),
        Payload::Prediction(prediction) => assert_same(&prediction, &payload),
        Payload::Other(_) => return Err(Failure::GiveUp("no handler for this type".to_owned())),
    }
    assert_same(&message.event()?, &sent);
    Ok(())
}

#[tokio::test]
async fn every_message_has_its_outcome() {
    let store = SqliteStore::open(":memory:").expect("a database in memory");
    for case in messages() {
        let message = message(&case["message"]);
        let outcome = settle(&message, &check, &store).await;
        assert_eq!(outcome.to_string(), case["expect"]["outcome"], "{}", case["name"]);
        assert_eq!(message.is_verified(), case["message"]["headers"]["prism-verified"] == "true", "{}", case["name"]);
    }
}

#[tokio::test]
async fn a_handler_that_fails_is_called_again() {
    let (store, calls) = (SqliteStore::open(":memory:").expect("a database in memory"), Cell::new(0));
    let fails_once = async |_: &Message| {
        calls.set(calls.get() + 1);
        if calls.get() == 1 { Err("the disk is full".into()) } else { Ok(()) }
    };
    let first = message(&messages()[0]["message"]);
    for expected in ["failed", "done", "again"] {
        assert_eq!(settle(&first, &fails_once, &store).await.to_string(), expected);
    }
    assert_eq!(calls.get(), 2);
}

#[tokio::test]
async fn a_handler_that_panics_fails_only_its_message() {
    let store = SqliteStore::open(":memory:").expect("a database in memory");
    let panics = async |_: &Message| -> Result<(), Failure> { panic!("on purpose") };
    let first = message(&messages()[0]["message"]);
    for expected in ["failed", "failed"] {
        assert_eq!(settle(&first, &panics, &store).await.to_string(), expected);
    }
}

#[test]
fn a_retried_message_has_the_key_of_its_event() {
    for vector in vectors(include_str!("../vectors/first_keys.json")) {
        let key = vector["routing_key"].as_str().expect("a text");
        assert_eq!(first_key(key, vector["type"].as_str()), vector["first_key"], "{}", vector["why"]);
    }
}

#[test]
fn signatures_are_hmacs_of_timestamp_and_body() {
    for vector in vectors(include_str!("../vectors/signatures.json")) {
        let text = |name: &str| vector[name].as_str().expect("a text");
        let mut mac = Hmac::<Sha256>::new_from_slice(text("secret").as_bytes()).expect("a key of any length");
        mac.update(format!("{}.{}", text("prism-timestamp"), text("body")).as_bytes());
        let signature: String = mac.finalize().into_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(signature == text("prism-signature"), vector["valid"] == true, "{vector}");
    }
}
