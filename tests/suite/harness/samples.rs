//! Bodies of webhooks. Each carries the suite's `userToken`, so every test also checks that no relay shows the token.

use std::fmt::Display;

use serde_json::{Value, json};

use super::marks::USER_TOKEN;

/// Real events of every kind that Prism documents, one per line.
pub const EVENTS: &str = include_str!("../../samples/events.jsonl");

/// `scan.processing.started` of the scan `scan-<scan>`.
pub fn scan(scan: impl Display) -> String {
    event("scan.processing.started", json!({"scanId": format!("scan-{scan}"), "state": "PROCESSING"}))
}

/// The event with this number of the scan `scan-0`.
pub fn nth(number: usize) -> String {
    nth_of_scan(0, number)
}

/// The event with this number of the scan `scan-<scan>`.
pub fn nth_of_scan(scan: impl Display, number: usize) -> String {
    event("scan.processing.started", json!({"scanId": format!("scan-{scan}"), "number": number}))
}

/// `scan.processing.started` of the scan `scan-<scan>`, longer by `padding` bytes.
pub fn long_scan(scan: impl Display, padding: usize) -> String {
    event("scan.processing.started", json!({"scanId": format!("scan-{scan}"), "padding": "x".repeat(padding)}))
}

/// An event of this type, of the scan `scan-<scan>`.
pub fn of_scan(scan: impl Display, event_type: &str) -> String {
    event(event_type, json!({"scanId": format!("scan-{scan}")}))
}

/// An event of this type, of the scan `scan-0`.
pub fn of_type(event_type: &str) -> String {
    of_scan(0, event_type)
}

/// An event with this payload; the `userToken` is added.
pub fn event(event_type: &str, mut payload: Value) -> String {
    payload["userToken"] = json!(USER_TOKEN);
    json!({"eventType": event_type, "payload": payload}).to_string()
}
