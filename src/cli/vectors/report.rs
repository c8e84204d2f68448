//! Prints what a worker did with each message, as text or JSON.

use lapin::types::ShortString;
use serde_json::json;

use super::cases::{Case, Settle};
use super::player::Played;
use crate::cli::failure::Failure;
use crate::cli::output::say;

/// An error if the worker did something wrong.
pub(super) fn report(queue: &ShortString, cases: &[Case], played: &Played, json: bool) -> Result<(), Failure> {
    let rows = cases.iter().zip(&played.seen);
    let wrong = rows.clone().filter(|(case, seen)| !seen.is(case.expect.settle)).count();
    let is_auto = played.counted.without_ack > 0;
    if json {
        let cases: Vec<_> = rows
            .map(|(case, seen)| {
                let expected = case.expect.settle;
                json!({ "name": case.name, "expected": expected, "seen": seen, "ok": seen.is(expected) })
            })
            .collect();
        let report = json!({
            "queue": queue.as_str(), "cases": cases, "wrong": wrong, "acks": played.counted.acks,
            "automatic_acks": is_auto, "duplicate": played.duplicate,
        });
        say(&report.to_string());
    } else {
        say(&format!("{:<40} {:<8} {}", "message", "expected", "seen"));
        for (case, seen) in rows {
            let expected = match case.expect.settle {
                Settle::Ack => "ack",
                Settle::Reject => "reject",
                Settle::Any => "any",
            };
            let is_right = seen.is(case.expect.settle);
            let note = if is_right { String::new() } else { format!("   WRONG: {}", seen.complaint(case)) };
            say(&format!("{:<40} {expected:<8} {}{note}", case.name, seen.text()));
        }
        if is_auto {
            say("the worker consumes with automatic acks: what it holds is lost when it dies; switch them off");
        }
        if let Some(id) = &played.duplicate {
            say(&format!("message_id {id} was sent twice: check that your worker did its work once"));
        }
        say(&format!("{} messages, {wrong} wrong", cases.len()));
    }
    if wrong > 0 || is_auto { Err(Failure::Reported) } else { Ok(()) }
}
