//! The pages of situations, in the words of their statuses.

use proptest::prelude::{Just, Strategy, any, prop, prop_assert, prop_oneof, proptest};
use serde_json::{Map, json};

use super::super::text::Colours;
use super::*;

/// The answers of a relay that is well, apart from those given here: id, level, word, detail, remedy.
fn status(headline: [&str; 4], others: &[[&str; 5]]) -> Value {
    let well = [
        ("sending", "Is Prism sending?", "Yes"),
        ("accepting", "Are we accepting webhooks?", "Yes"),
        ("broker", "Is RabbitMQ accepting events?", "Yes"),
        ("lag", "How far behind are we?", "Not at all"),
        ("parked", "Is anything parked?", "No"),
        ("lost", "Did we lose anything?", "No"),
        ("workers", "Are workers taking events?", "Yes"),
    ];
    let answers = well.map(|(id, question, word)| {
        let other = others.iter().find(|other| other[0] == id);
        let [_, level, word, detail, remedy] = other.copied().unwrap_or([id, "ok", word, "Hidden.", ""]);
        json!({ "id": id, "question": question, "level": level, "word": word, "detail": detail, "remedy": remedy })
    });
    let [level, text, detail, advice] = headline;
    json!({
        "headline": { "level": level, "text": text, "detail": detail, "advice": advice }, "answers": answers,
        "version": "0.1.0", "host": "relay-1", "uptime_seconds": 7500, "now": "2026-11-24T12:00:10Z",
        "last": { "accepted_at": "2026-11-24T12:00:00Z", "confirmed_at": null },
        "webhooks": { "accepted": 7, "duplicate": 1, "refused": { "invalid-signature": 3 } },
        "spool": {
            "accepted": 7, "confirmed": 5, "pending": 2, "parked": 0, "removed": 0, "bytes": 1024, "max_bytes": 4096,
            "oldest_age_seconds": 61.5,
        },
        "broker": { "connected": true, "blocked": null, "url": "amqp://guest@127.0.0.1:5672/%2f", "in_flight": 0 },
        "watch": {
            "queues": [
                { "name": "prism.scan", "role": "work", "messages": 1990, "consumers": 0, "trouble": null },
                { "name": "prism.future_me", "role": "work", "messages": null, "consumers": null, "trouble": null },
                { "name": "prism.dead", "role": "dead", "messages": 10, "consumers": 0, "trouble": null },
                { "name": "prism.unrouted", "role": "unrouted", "messages": 0, "consumers": 0, "trouble": null },
            ],
        },
        "types": [{ "type": "scan.processing.started", "accepted": 7 }],
    })
}

fn shown(seen: &Seen, width: usize) -> Vec<String> {
    page(seen, Some(width)).iter().map(Line::plain).collect()
}

#[test]
fn a_page_has_the_words_of_the_status_wrapped_at_80_columns() {
    let headline = [
        "problem",
        "RabbitMQ has been unreachable for 12 min.",
        "1,990 events are safe on disk. Room for about 9 h. Prism is being answered.",
        "Start RabbitMQ, or correct broker.urls; deliveries then resume by themselves.",
    ];
    let broker = ["broker", "problem", "No", "Not connected for 12 min: connection refused.", "Start RabbitMQ."];
    let points: Vec<_> = (1..=180)
        .map(|number| {
            json!({
                "at": 5 * number, "accepted": if number > 178 { 12.0 } else { 0.5 }, "refused": 0.0, "confirmed": 0.0,
                "depth": number, "queued": null,
            })
        })
        .collect();
    let seen = Seen {
        status: status(headline, &[broker]),
        history: json!({ "interval_seconds": 5, "points": points }),
        parked: json!({ "parked": vec![json!({ "reason": "no queue is bound for a.b" }); 2] }),
    };
    // Wider terminals show the same.
    let expected = [
        "PROBLEM               RabbitMQ has been unreachable for 12 min.",
        "                      1,990 events are safe on disk. Room for about 9 h. Prism",
        "                      is being answered.",
        "                      Start RabbitMQ, or correct broker.urls; deliveries then",
        "                      resume by themselves.",
        "",
        "  Is Prism sending?              Yes",
        "  Are we accepting webhooks?     Yes",
        "! Is RabbitMQ accepting events?  No",
        "      Not connected for 12 min: connection refused.",
        "      Start RabbitMQ.",
        "  How far behind are we?         Not at all",
        "  Is anything parked?            No",
        "  Did we lose anything?          No",
        "  Are workers taking events?     Yes",
        "",
        "a second                  10 s   1 min  15 min  last 15 min",
        "accepted                    12     2.4     0.6  ▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▄",
        "refused                    0.0     0.0     0.0  ▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁",
        "confirmed                  0.0     0.0     0.0  ▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁",
        "waiting on disk              2                  ▁▁▁▁▂▂▂▂▂▃▃▃▃▄▄▄▄▄▅▅▅▅▆▆▆▆▆▇▇▇▇█",
        "",
        "queue                 messages  workers",
        "prism.scan               1,990        0",
        "prism.future_me              ?        ?",
        "prism.dead                  10",
        "",
        "parked                       2  no queue is bound for a.b",
        "webhooks since start  7 accepted, 1 duplicates, 3 refused",
        "                             3  invalid-signature",
        "last                  accepted 10 s ago, confirmed never",
        "spool, over its life  7 accepted = 5 confirmed + 2 pending + 0 parked + 0",
        "                      removed",
        "                      25.0 % full; the oldest has waited 1 min 1 s",
        "RabbitMQ              connected to amqp://guest@127.0.0.1:5672/%2f; 0 in flight",
        "                             7  scan.processing.started",
        "                      prism-relay 0.1.0 on relay-1, up for 2 h 5 min",
    ];
    let found = shown(&seen, 200);
    // Where a bar ends depends on rounding; its place does not.
    let without_bars = |line: &String| line.replace(|c| ('▁'..='█').contains(&c), "#");
    let expected: Vec<_> = expected.iter().map(|line| without_bars(&(*line).to_owned())).collect();
    assert_eq!(found.iter().map(without_bars).collect::<Vec<_>>(), expected, "{found:#?}");
    let depth = found.iter().find(|line| line.starts_with("waiting")).unwrap();
    assert!(depth.contains(" ▁") && depth.ends_with('█'), "{depth}");
}

#[test]
fn each_situation_is_shown_by_its_words_and_its_level() {
    for (headline, answer) in [
        (["ok", "All accepted events are in RabbitMQ.", "", "Nothing to do."], ["lag", "ok", "Not at all", "", ""]),
        (
            ["problem", "RabbitMQ has been unreachable for 12 min.", "", "Start RabbitMQ."],
            ["broker", "problem", "No", "Not connected for 12 min: refused.", "Start RabbitMQ."],
        ),
        (
            ["problem", "RabbitMQ has been refusing messages for 3 min.", "", "Free memory."],
            ["broker", "problem", "No, it is blocked", "Blocked for 3 min: low on memory.", "Free memory."],
        ),
        (
            ["problem", "The spool is 91 % full.", "Room for about 9 min.", "Restore RabbitMQ."],
            ["accepting", "problem", "Yes, for about 9 min", "The spool is 91 % full.", "Restore RabbitMQ."],
        ),
        (
            ["problem", "Webhooks are being refused now: the spool is full.", "", "Restore RabbitMQ."],
            ["accepting", "problem", "No", "The spool is full: webhooks are answered 503.", "Restore RabbitMQ."],
        ),
        (
            ["problem", "Every webhook is refused: the signature is wrong.", "", "Compare the secret."],
            ["accepting", "problem", "No", "Every webhook is refused.", "Compare the secret with Prism's."],
        ),
        (
            ["warning", "3 events are parked because RabbitMQ does not accept them.", "", "Read the reason."],
            ["parked", "warning", "3 events", "RabbitMQ does not accept them.", "Read the reason."],
        ),
        (
            ["problem", "prism.scan: 1,990 wait, no worker connected.", "", "Start the workers."],
            ["workers", "problem", "No", "prism.scan: 1,990 wait, no worker connected.", "Start the workers."],
        ),
        (
            ["warning", "10 dead letters in prism.dead.", "", "`prism-relay redrive --dry-run`"],
            ["workers", "warning", "10 dead letters", "10 dead letters in prism.dead.", "Look at them."],
        ),
        (
            ["problem", "prism.scan has no leader.", "", "Start the node."],
            ["workers", "problem", "No", "prism.scan has no leader.", "Start the node."],
        ),
    ] {
        let seen = Seen { status: status(headline, &[answer]), ..Seen::default() };
        let [level, text, detail, advice] = headline;
        let [_, _, word, answer_detail, remedy] = answer;
        let lines = page(&seen, None);
        let plain = lines.iter().map(Line::plain).collect::<Vec<_>>().join("\n");
        for words in [text, detail, advice, word] {
            assert!(plain.contains(words), "{words:?} is not in {plain}");
        }
        let is_bad = level != "ok";
        assert_eq!(plain.contains("\n! "), is_bad, "{plain}");
        assert!(!is_bad || plain.contains(answer_detail) && plain.contains(remedy), "{plain}");
        assert!(!plain.contains("Hidden."), "an answer that is well has no detail: {plain}");
        let (name, code) = match level {
            "ok" => ("all is well", "\x1b[32m"),
            "warning" => ("NEEDS ATTENTION", "\x1b[1;33m"),
            _ => ("PROBLEM", "\x1b[1;31m"),
        };
        let first = lines[0].shown(80, Colours::Shown);
        assert!(first.starts_with(&format!("{code}{name}\x1b[0m")), "{first:?}");
        assert!(!lines[0].shown(80, Colours::None).contains('\x1b'));
    }
}

#[test]
fn steps_have_a_line_each() {
    let steps =
        "the relay keeps its events on disk until the queue has room:\n1. check its \u{1b}workers\n2. start more";
    let headline = ["problem", "prism.scan is full.", "", steps];
    let seen =
        Seen { status: status(headline, &[["workers", "problem", "No", "It is full.", steps]]), ..Seen::default() };
    let lines = shown(&seen, 50);
    let expected = [
        "                      the relay keeps its events",
        "                      on disk until the queue has",
        "                      room:",
        "                      1. check its ?workers",
        "                      2. start more",
    ];
    assert_eq!(lines[1..6], expected);
    let answer = lines.iter().position(|line| line.starts_with("! ")).unwrap();
    let expected = ["      It is full.", "      the relay keeps its events on disk until the", "      queue has room:"];
    assert_eq!(lines[answer + 1..answer + 4], expected);
    assert_eq!(lines[answer + 4..answer + 6], ["      1. check its ?workers", "      2. start more"]);
}

#[test]
fn reasons_of_the_first_parked_events_are_not_shown_as_those_of_all() {
    let status = status(["note", "No webhook was accepted for 8 h.", "", ""], &[]);
    let events = vec![json!({ "reason": "no queue is bound for a.b" }); 100];
    let seen = Seen { status, parked: json!({ "parked": events, "total": 5000 }), ..Seen::default() };
    let lines = shown(&seen, 80);
    assert_eq!(lines[0], "note                  No webhook was accepted for 8 h.");
    let parked = lines.iter().position(|line| line.starts_with("parked")).unwrap();
    let expected =
        ["parked                the first 100 of 5,000:", "                           100  no queue is bound for a.b"];
    assert_eq!(lines[parked..parked + 2], expected);
}

#[test]
fn a_relay_that_does_not_answer_or_needs_a_token_is_told_in_words() {
    let plain = |lines: Vec<Line>| lines.iter().map(Line::plain).collect::<Vec<_>>();
    assert_eq!(
        plain(failure("no answer from http://127.0.0.1:9090/api/status: connection refused", Some(80))),
        [
            "NO ANSWER             no answer from http://127.0.0.1:9090/api/status:",
            "                      connection refused",
            "                      Trying again.",
        ]
    );
    let denied = "http://127.0.0.1:9090/api/status answers 401: send ops.token as a bearer token, or log in at /login";
    let lines = plain(failure(denied, Some(80))).join("\n");
    assert!(
        lines.contains("or ops.token_file: name\n                      the relay's file with --config."),
        "{lines}"
    );
}

#[test]
fn a_narrow_terminal_gets_narrow_lines() {
    let headline = ["problem", "RabbitMQ has been unreachable for 12 min.", "", "Start RabbitMQ."];
    let seen = Seen { status: status(headline, &[]), ..Seen::default() };
    let lines = shown(&seen, 40);
    let expected = [
        "PROBLEM",
        "  RabbitMQ has been unreachable for 12",
        "  min.",
        "  Start RabbitMQ.",
        "",
        "  Is Prism sending? Yes",
    ];
    assert_eq!(lines[..6], expected);
}

/// Any JSON, with the keys of the relay at their places or elsewhere.
fn any_json() -> impl Strategy<Value = Value> {
    const KEYS: [&str; 18] = [
        "headline",
        "text",
        "answers",
        "level",
        "word",
        "question",
        "points",
        "at",
        "accepted",
        "interval_seconds",
        "spool",
        "bytes",
        "watch",
        "queues",
        "name",
        "messages",
        "parked",
        "reason",
    ];
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        ".{0,60}".prop_map(Value::from),
    ];
    leaf.prop_recursive(5, 64, 6, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            prop::collection::vec((prop::sample::select(&KEYS[..]), inner), 0..8).prop_map(|fields| Value::from(
                fields.into_iter().map(|(key, value)| (key.to_owned(), value)).collect::<Map<_, _>>()
            )),
        ]
    })
}

proptest! {
    #[test]
    fn no_status_and_no_size_breaks_the_page(
        status in any_json(), history in any_json(), parked in any_json(), width in 1usize..100,
    ) {
        let seen = Seen { status, history, parked };
        for line in page(&seen, Some(width)).iter().chain(&failure("why", Some(width))) {
            let shown = line.shown(width, Colours::None);
            prop_assert!(shown.chars().count() <= width && !shown.contains(|c: char| c.is_control()), "{shown:?}");
        }
    }
}
