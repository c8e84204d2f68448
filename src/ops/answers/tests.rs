//! Tables of facts and what they must say, and properties over all facts.

use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;

use super::super::words::coarse;
use super::*;

const MINUTE: Duration = Duration::from_secs(60);
const SECOND: Duration = Duration::from_secs(1);

fn well() -> Facts {
    Facts {
        uptime: 600 * MINUTE,
        ledger: Ledger { accepted: 100, confirmed: 100, ..Ledger::default() },
        max_bytes: 1 << 30,
        broker: Broker { connected: true, age: 60 * MINUTE, ..Broker::default() },
        last_confirm: Some(3 * SECOND),
        last_accepted: Some(3 * SECOND),
        last_30_minutes: Window { accepted: 9, ..Window::default() },
        queues: vec![queue("prism.scan", Role::Work, 0, 2), queue("prism.dead", Role::Dead, 0, 0)],
        ..Facts::default()
    }
}

fn queue(name: &str, role: Role, messages: u64, consumers: u64) -> Queue {
    let state = QueueState::Counted { messages, consumers, unattended: Duration::ZERO };
    Queue { name: name.to_owned(), role, state }
}

fn down(age: Duration) -> Broker {
    let error = Some("cannot reach 127.0.0.1:5672: connection refused".to_owned());
    Broker { connected: false, blocked: None, error, unreachable: true, age, failing: None }
}

fn pending(count: u64) -> Ledger {
    Ledger { accepted: 100 + count, confirmed: 100, pending: count, bytes: 1000 * count, ..Ledger::default() }
}

fn refused(counts: &[(&'static str, u64)], accepted: u64) -> Facts {
    let window = Window { accepted, refused: counts.iter().copied().collect(), ..Window::default() };
    let (last_30_minutes, last_hour) = (window.clone(), window.clone());
    Facts { last_5_minutes: window, last_30_minutes, last_hour, ..well() }
}

#[track_caller]
fn headline(facts: &Facts, level: Level, text: &str, detail: &str) {
    let headline = judge(facts).headline;
    assert_eq!((headline.level, headline.text.as_str(), headline.detail.as_str()), (level, text, detail));
}

const ANSWERED: &str = "Prism is being answered.";

#[track_caller]
fn says(facts: &Facts, id: &str, level: Level, word: &str) -> String {
    let answers = judge(facts).answers;
    let answer = answers.iter().find(|answer| answer.id == id).expect("every question has an answer");
    assert_eq!((answer.level, answer.word.as_str()), (level, word), "{answer:?}");
    answer.detail.clone()
}

#[test]
fn there_are_seven_answers_and_all_are_well() {
    let Judgement { headline: first, answers } = judge(&well());
    let ids: Vec<_> = answers.iter().map(|answer| (answer.id, answer.level)).collect();
    let expected = ["sending", "accepting", "broker", "lag", "parked", "lost", "workers"].map(|id| (id, Level::Ok));
    assert_eq!(ids, expected);
    assert_eq!((first.level, first.advice.as_str()), (Level::Ok, "Nothing to do."));
    let confirmed = "The last one was confirmed just now.";
    headline(&well(), Level::Ok, "All accepted events are in RabbitMQ.", confirmed);
    let one = Facts { ledger: pending(1), oldest: Some(SECOND), ..well() };
    headline(&one, Level::Ok, "All accepted events are in RabbitMQ or on the way.", confirmed);
    let fresh = Facts { last_confirm: None, last_accepted: None, uptime: 5 * SECOND, ..well() };
    let nothing = "No event has come in since the relay started.";
    headline(&fresh, Level::Ok, "All accepted events are in RabbitMQ.", nothing);
    let new = Facts { ledger: Ledger::default(), ..fresh.clone() };
    headline(&new, Level::Ok, "All is well.", nothing);
    assert_eq!(says(&fresh, "sending", Level::Ok, "Not yet"), "No webhook was accepted since the start, 5 s ago.");
}

#[test]
fn rabbitmq_is_down_or_blocked() {
    let kept = Facts { ledger: pending(1204), oldest: Some(230 * SECOND), ..well() };
    let detail = format!("1,204 events are safe on disk. {ANSWERED}");
    let away = Facts { broker: down(4 * MINUTE), ..kept.clone() };
    headline(&away, Level::Problem, "RabbitMQ has been unreachable for 4 min.", &detail);
    let blocked = Broker { blocked: Some("low on memory".to_owned()), age: 4 * MINUTE, ..well().broker };
    let blocked = Facts { broker: blocked, ..kept.clone() };
    headline(&blocked, Level::Problem, "RabbitMQ has been refusing messages for 4 min (low on memory).", &detail);
    let error = Some("the broker rejected a publish (nack): a queue is full, or has no leader".to_owned());
    let nacked = Facts { broker: Broker { error, unreachable: false, ..down(4 * MINUTE) }, ..kept.clone() };
    let why = format!("The broker rejected a publish (nack): a queue is full, or has no leader. {detail}");
    headline(&nacked, Level::Problem, "Nothing has been delivered to RabbitMQ for 4 min.", &why);
    let brief = Facts { broker: down(2 * SECOND), ..well() };
    says(&brief, "broker", Level::Warning, "No");
    let silent = Facts { oldest: Some(6 * MINUTE), last_confirm: Some(7 * MINUTE), ..kept };
    says(&silent, "broker", Level::Problem, "No");
    headline(&silent, Level::Problem, "RabbitMQ has confirmed nothing for 6 min.", &detail);
    let late = Facts { last_confirm: Some(SECOND), ..silent };
    says(&late, "broker", Level::Ok, "Yes");
}

/// Confirm timeouts, nacks and refusals of RabbitMQ come in loops: each new connection is seconds old.
#[test]
fn a_new_connection_does_not_end_an_outage() {
    let hours = |hours: u32| hours * 60 * MINUTE;
    let error = Some("the broker rejected a publish (nack): a queue is full, or has no leader".to_owned());
    let (connected, lost) = (well().broker, Broker { error, unreachable: false, ..down(Duration::ZERO) });
    for (broker, age, failing, oldest, level, said) in [
        (&connected, 9, Some(hours(2)), Some(hours(2)), Level::Problem, "nothing was confirmed for 2 h."),
        (&connected, 9, Some(hours(2)), Some(6 * MINUTE), Level::Problem, "nothing was confirmed for 6 min."),
        (&connected, 9, Some(4 * MINUTE), Some(4 * MINUTE), Level::Problem, "nothing was confirmed for 4 min."),
        (&connected, 1, Some(4 * SECOND), Some(4 * SECOND), Level::Ok, "Connected; the last event was confirmed"),
        // An old fault, and no event to deliver since.
        (&connected, 9, Some(hours(2)), None, Level::Ok, "Connected; the last event was confirmed"),
        // The events of an earlier process.
        (&connected, 1, None, Some(hours(2)), Level::Ok, "Connected; the last event was confirmed"),
        (&lost, 3, Some(hours(2)), Some(hours(2)), Level::Problem, "Nothing delivered for 2 h: the broker rejected"),
        (&lost, 3, Some(hours(2)), Some(SECOND), Level::Warning, "Nothing delivered for 3 s: the broker rejected"),
    ] {
        let broker = Broker { age: age * SECOND, failing, ..broker.clone() };
        let facts = Facts { broker, oldest, last_confirm: Some(hours(2)), ledger: pending(5), ..well() };
        let Judgement { headline, answers } = judge(&facts);
        assert_eq!(answers[2].level, level, "{facts:?}");
        assert!(answers[2].detail.contains(said), "{said:?} {:?}", answers[2]);
        if level == Level::Problem {
            let time = coarse(oldest.unwrap_or_default());
            let text = format!("Nothing has been delivered to RabbitMQ for {time}.");
            assert_eq!((headline.level, &headline.text), (level, &text), "the same for each connection");
        }
    }
}

#[test]
fn the_room_is_in_the_headline_at_any_rate() {
    let outage = Facts {
        broker: down(4 * MINUTE),
        ledger: pending(5),
        oldest: Some(4 * MINUTE),
        outlook: Outlook::FullIn(560 * SECOND),
        ..well()
    };
    let detail = "5 events are safe on disk. Room for about 9 min. Prism is being answered.";
    headline(&outage, Level::Problem, "RabbitMQ has been unreachable for 4 min.", detail);
    says(&outage, "accepting", Level::Problem, "Yes, for about 9 min");
    let hours = Facts { outlook: Outlook::FullIn(300 * MINUTE), ..outage.clone() };
    says(&hours, "accepting", Level::Warning, "Yes, for about 5 h");
    let days = Facts { outlook: Outlook::FullIn(3 * 24 * 60 * MINUTE), ..outage };
    says(&days, "accepting", Level::Ok, "Yes");
    assert!(judge(&days).headline.detail.contains("Room for about 3 d."));
}

#[test]
fn full_is_not_nearly_full() {
    let nearly = Facts { ledger: pending(5), used: 966 << 20, oldest: Some(SECOND), ..well() };
    headline(&nearly, Level::Problem, "The spool is 94 % full.", &format!("5 events are safe on disk. {ANSWERED}"));
    says(&nearly, "accepting", Level::Problem, "Yes, for now");
    let full = Facts {
        ledger: pending(5),
        used: 1 << 30,
        blocker: Some(AppendError::Full),
        broker: down(100 * MINUTE),
        oldest: Some(100 * MINUTE),
        ..well()
    };
    let given_up = "Prism gives up on each after 35 s.";
    let detail = format!("{given_up} RabbitMQ has been unreachable for 1 h 40 min.");
    headline(&full, Level::Problem, "Webhooks are being refused now: the spool is full.", &detail);
    says(&full, "accepting", Level::Problem, "No");
    let unwritable = Facts { blocker: Some(AppendError::Unavailable), ..well() };
    assert!(
        judge(&unwritable).headline.text.starts_with("Webhooks are being refused now: the spool cannot be written")
    );
    let locked = Facts { disk: Some("another process has locked the spool file; stop it"), ..unwritable };
    let text = "Webhooks are being refused now: another process has locked the spool file.";
    headline(&locked, Level::Problem, text, given_up);
    let growing = Facts { disk: Some("another process reads the spool; stop that process"), ..well() };
    headline(&growing, Level::Warning, "Another process reads the spool.", ANSWERED);
    assert_eq!(judge(&growing).headline.advice, "Stop that process.");
    let draining = Facts { draining: true, blocker: Some(AppendError::Closed), ledger: pending(1), ..well() };
    let draining = Facts { oldest: Some(SECOND), ..draining };
    headline(&draining, Level::Warning, "The relay is shutting down.", "Undelivered events stay on disk: 1.");
}

#[test]
fn refusals_count_as_in_the_alert_rules() {
    // One other refusal must not hide the main cause.
    let facts = refused(&[("invalid-signature", 86), ("unreadable-body", 1)], 0);
    let text = "Every webhook is being refused: they are signed with another secret, or a proxy changes them.";
    headline(&facts, Level::Problem, text, "87 in the last 5 min. Prism gives up on each after 35 s.");
    let mut both = facts.clone();
    both.broker = down(MINUTE);
    let Headline { text, detail, .. } = judge(&both).headline;
    assert!(text.starts_with("Every webhook") && detail.contains("unreachable"), "{text} {detail}");
    assert!(!detail.contains(ANSWERED), "{detail}");

    for (counts, accepted, level, word) in [
        (("invalid-signature", 7), 0, Level::Warning, "Yes, but not all"),
        (("invalid-signature", 8), 0, Level::Problem, "No"),
        (("invalid-signature", 4), 76, Level::Ok, "Yes"),
        (("invalid-signature", 4), 75, Level::Warning, "Yes, but not all"),
        (("invalid-signature", 3), 5, Level::Ok, "Yes"),
        (("body-too-large", 4), 5, Level::Ok, "Yes"),
        (("body-too-large", 5), 5000, Level::Warning, "Yes, but not all"),
    ] {
        let facts = refused(&[counts], accepted);
        let answers = judge(&facts).answers;
        assert_eq!((answers[1].level, answers[1].word.as_str()), (level, word), "{counts:?} {accepted}");
    }
}

/// Sentence, advice and entry of the runbook come from one reason.
#[test]
fn scarce_room_comes_before_some_refusals() {
    let facts =
        Facts { ledger: pending(5), oldest: Some(SECOND), used: 966 << 20, ..refused(&[("body-too-large", 5)], 100) };
    headline(&facts, Level::Problem, "The spool is 94 % full.", "5 events are safe on disk.");
    let both = judge(&Facts { broker: down(MINUTE), ..facts.clone() }).headline;
    assert!(both.detail.contains("The spool is 94 % full."), "{both:?}");
    for facts in [&facts, &Facts { used: 0, ..facts.clone() }] {
        let Judgement { headline, answers } = judge(facts);
        let accepting = &answers[1];
        let same = (accepting.remedy.as_deref(), accepting.runbook) == (Some(&headline.advice), headline.runbook);
        assert!(same, "{headline:?} {accepting:?}");
    }
    assert_eq!(judge(&Facts { used: 0, ..facts }).headline.runbook, Some("refused-webhooks"));
}

/// Without any webhook nobody knows whether Prism is answered.
#[test]
fn prism_is_answered_only_if_webhooks_come() {
    let away = Facts { broker: down(MINUTE), ..well() };
    assert!(judge(&away).headline.detail.contains(ANSWERED));
    let silent = Facts { last_30_minutes: Window::default(), ..away };
    assert!(!judge(&silent).headline.detail.contains(ANSWERED));
}

#[test]
fn webhooks_that_cannot_reach_the_relay_are_not_accepted() {
    let protocol = |other_protocol, accepted| Facts {
        last_30_minutes: Window { accepted, other_protocol, ..Window::default() },
        ..well()
    };
    let text = "No webhook arrives: 8 connections in the last 30 min came in the wrong protocol, the PROXY protocol or \
                TLS.";
    headline(&protocol(8, 0), Level::Problem, text, "");
    says(&protocol(8, 0), "accepting", Level::Problem, "No");
    says(&protocol(7, 0), "accepting", Level::Ok, "Yes");
    says(&protocol(800, 1), "accepting", Level::Ok, "Yes");
    let failed = |failed, accepted, certificate_days| Facts {
        last_30_minutes: Window { accepted, failed, ..Window::default() },
        certificate_days: Some(certificate_days),
        ..well()
    };
    let text = "No webhook was accepted in the last 30 min, and 8 connections failed in the TLS handshake or as no \
                HTTP/1; Prism's may be among them.";
    headline(&failed(8, 0, 90.0), Level::Warning, text, "");
    says(&failed(8, 0, 90.0), "accepting", Level::Warning, "Perhaps not");
    says(&failed(7, 0, 90.0), "accepting", Level::Ok, "Yes");
    says(&failed(800, 1, 90.0), "accepting", Level::Ok, "Yes");
    says(&failed(8, 0, -1.0), "accepting", Level::Problem, "No");

    let until = |days| Facts { certificate_days: Some(days), ..well() };
    let away = |days| Facts { broker: down(MINUTE), ..until(days) };
    let expired = "The TLS certificate has expired, so Prism cannot connect.";
    headline(&until(-0.5), Level::Problem, expired, "");
    headline(&away(-0.5), Level::Problem, expired, "RabbitMQ has been unreachable for 1 min.");
    let soon = "The TLS certificate expires in 2 d 12 h; then Prism cannot connect.";
    headline(&until(2.5), Level::Problem, soon, ANSWERED);
    assert!(judge(&away(2.5)).headline.detail.ends_with(&format!("{soon} {ANSWERED}")));
    let scarce = Facts { last_hour: refused(&[("invalid-signature", 4)], 9).last_hour, ..until(2.5) };
    headline(&scarce, Level::Problem, soon, "");
    for (days, level, word) in
        [(-0.5, Level::Problem, "No"), (2.5, Level::Problem, "Yes, for now"), (20.9, Level::Warning, "Yes, for now")]
    {
        says(&until(days), "accepting", level, word);
    }
    says(&until(21.0), "accepting", Level::Ok, "Yes");
}

/// What pages is a problem, and what makes a ticket is a warning.
#[test]
fn the_answers_are_as_serious_as_the_alert_rules() {
    let rules = include_str!("../../../deploy/prometheus/prism-relay.rules.yml");
    let reference = include_str!("../../../deploy/reference.md");
    let (_, reference) = reference.split_once("These alerts need Prometheus:").expect("notices are described");
    let (reference, _) = reference.split_once(".\n").expect("a sentence");
    let severity = |alert: &str| {
        let (_, rule) = rules.split_once(&format!("- alert: PrismRelay{alert}\n")).expect("the rule exists");
        let (_, rest) = rule.split_once("severity: ").expect("it has a severity");
        rest.split_whitespace().next().expect("a word").to_owned()
    };
    let signatures = |count, accepted| refused(&[("invalid-signature", count)], accepted);
    let silent = Facts { ledger: pending(5), oldest: Some(6 * MINUTE), last_confirm: Some(7 * MINUTE), ..well() };
    let blocked = Broker { blocked: Some("low on memory".to_owned()), ..well().broker };
    let other = Window { other_protocol: 8, ..Window::default() };
    let failed = Window { failed: 8, ..Window::default() };
    let damaged = Facts { damaged: 2, ledger: Ledger { accepted: 102, removed: 2, ..well().ledger }, ..well() };
    let parked = Ledger { accepted: 103, parked: 3, ..well().ledger };
    let trouble = QueueState::Trouble { text: "is full".to_owned(), remedy: "wait".to_owned() };
    let state = QueueState::Counted { messages: 5, consumers: 0, unattended: 5 * MINUTE };
    let work = |state| vec![Queue { state, ..queue("prism.scan", Role::Work, 0, 0) }];
    let room = |hours: u32| Facts { outlook: Outlook::FullIn(hours * 60 * MINUTE), ..well() };
    let refused_key = Status { refused_since: Some(jiff::Timestamp::UNIX_EPOCH), ..Status::default() };
    let judged = [
        ("NotReady", Facts { blocker: Some(AppendError::Full), ..well() }),
        ("CertificateExpires", Facts { certificate_days: Some(2.0), ..well() }),
        ("CertificateExpiresSoon", Facts { certificate_days: Some(20.0), ..well() }),
        ("WrongProtocol", Facts { last_30_minutes: other, ..well() }),
        ("ConnectionsFail", Facts { last_30_minutes: failed, ..well() }),
        ("EverySignatureFails", signatures(20, 0)),
        ("SomeSignaturesFail", signatures(4, 9)),
        ("BrokerAway", Facts { broker: down(5 * MINUTE), ..silent.clone() }),
        ("BrokerBlocks", Facts { broker: blocked, ..silent.clone() }),
        ("NothingConfirmed", silent.clone()),
        ("OldestEventWaits", Facts { oldest: Some(11 * MINUTE), last_confirm: Some(SECOND), ..silent.clone() }),
        ("DeliversLate", Facts { oldest: Some(31 * SECOND), ..silent }),
        ("EventsParked", Facts { ledger: parked, ..well() }),
        ("TopologyMissing", Facts { missing: vec!["queue prism.scan".to_owned()], ..well() }),
        ("QueueUnavailable", Facts { queues: work(trouble), ..well() }),
        ("EventsLost", damaged),
        ("SpoolFullWithinTwoHours", room(1)),
        ("SpoolFullWithinTwelveHours", room(11)),
        ("SpoolNearlyFull", Facts { used: 900 << 20, ..well() }),
        ("SpoolLogGrows", Facts { disk: Some("another process reads the spool; stop it"), ..well() }),
        ("NoWorkers", Facts { queues: work(state), ..well() }),
        ("DeadLetters", Facts { queues: vec![queue("prism.dead", Role::Dead, 1, 0)], ..well() }),
        ("Unrouted", Facts { queues: vec![queue("prism.unrouted", Role::Unrouted, 1, 0)], ..well() }),
        ("ReconcileRefused", Facts { reconcile: refused_key, ..well() }),
        ("SubjectsOverdue", Facts { reconcile: Status { stuck: 1, ..Status::default() }, ..well() }),
    ];
    let names = rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: PrismRelay"));
    let is_judged = |name: &str| judged.iter().any(|(alert, _)| *alert == name);
    for name in names.filter(|name| severity(name) != "info" && !is_judged(name)) {
        // A relay that is not there judges nothing.
        let is_named = reference.contains(&format!("`PrismRelay{name}`")) || ["Down", "Missing"].contains(&name);
        assert!(is_named, "{name} has no answer, and deploy/reference.md does not say so");
    }
    for (alert, facts) in judged {
        let expected = if severity(alert) == "page" { Level::Problem } else { Level::Warning };
        let judged = judge(&facts).headline;
        assert_eq!(judged.level, expected, "{alert}: {judged:?}");
        assert_eq!(judged.runbook, Some(format!("PrismRelay{alert}").as_str()), "{judged:?}");
    }
}

#[test]
fn a_refused_webhook_that_is_not_accepted_later_is_lost() {
    let last = Refusal { reason: "spool-full", age: 3 * MINUTE };
    let lost = TurnedAway { lost: 12, last_lost: Some(last), ..TurnedAway::default() };
    let facts = Facts { turned_away: lost.clone(), ..well() };
    let detail = says(&facts, "lost", Level::Problem, "Yes");
    assert!(detail.starts_with("12 webhooks were refused since the start and not accepted later"), "{detail}");
    let in_rabbitmq = format!("All accepted events are in RabbitMQ. {ANSWERED}");
    headline(&facts, Level::Problem, "12 webhooks are lost: refused, and not accepted later.", &in_rabbitmq);
    let old = Facts {
        turned_away: TurnedAway { last_lost: Some(Refusal { age: 25 * 60 * MINUTE, ..last }), ..lost.clone() },
        ..well()
    };
    says(&old, "lost", Level::Note, "Yes");
    let waiting = Facts { turned_away: TurnedAway { lost: 0, waiting: 2, ..lost }, ..well() };
    says(&waiting, "lost", Level::Warning, "Not yet");
    let damaged = Facts { damaged: 2, ledger: Ledger { accepted: 102, removed: 2, ..well().ledger }, ..well() };
    says(&Facts { uptime: MINUTE, ..damaged.clone() }, "lost", Level::Problem, "Yes");
    says(&Facts { uptime: 25 * 60 * MINUTE, ..damaged }, "lost", Level::Note, "Yes");
    let gap = Facts { ledger: Ledger { accepted: 101, ..well().ledger }, ..well() };
    says(&gap, "lost", Level::Problem, "Perhaps");
    let detail = format!("Nothing is waiting. {ANSWERED}");
    headline(&gap, Level::Problem, "The totals of the spool do not add up.", &detail);
}

#[test]
fn an_old_loss_does_not_hide_a_new_one() {
    let (old, fresh) = (25 * 60 * MINUTE, 3 * MINUTE);
    let refusal = |reason, age| Some(Refusal { reason, age });
    let ledger = Ledger { accepted: 102, removed: 2, ..well().ledger };
    let damaged = Facts { uptime: old, damaged: 2, ledger, ..well() };
    let long_ago = TurnedAway { lost: 12, last_lost: refusal("spool-full", old), ..TurnedAway::default() };
    let lost = TurnedAway { last_lost: refusal("spool-full", fresh), ..long_ago.clone() };
    let detail = says(&Facts { turned_away: lost, ..damaged.clone() }, "lost", Level::Problem, "Yes");
    let both = "12 webhooks were refused since the start and not accepted later, the last one 3 min ago: Prism has \
                given up on them. 2 accepted events were lost because the spool file was damaged. 102 accepted = ";
    assert!(detail.starts_with(both), "{detail}");
    let waiting = TurnedAway { waiting: 1, last_waiting: refusal("shutting-down", SECOND), ..long_ago.clone() };
    let facts = Facts { turned_away: waiting, ..well() };
    says(&facts, "lost", Level::Warning, "Yes");
    let in_rabbitmq = format!("All accepted events are in RabbitMQ. {ANSWERED}");
    headline(&facts, Level::Warning, "1 webhook was refused just now.", &in_rabbitmq);
    assert!(judge(&facts).headline.advice.starts_with("Restart quickly"));
    let unknown = TurnedAway { unrecognisable: 1, last_unrecognisable: refusal("overloaded", fresh), ..long_ago };
    says(&Facts { turned_away: unknown, ..well() }, "lost", Level::Warning, "Yes");
}

#[test]
fn events_are_parked_or_late() {
    let parked = Facts { ledger: Ledger { accepted: 103, parked: 3, ..well().ledger }, ..well() };
    let text = "3 events are parked: RabbitMQ does not accept them.";
    headline(&parked, Level::Warning, text, &format!("All others are in RabbitMQ. {ANSWERED}"));
    let ledger = Ledger { accepted: 104, parked: 1, removed: 3, ..well().ledger };
    headline(&Facts { ledger, ..well() }, Level::Warning, "1 event is parked: RabbitMQ does not accept it.", ANSWERED);
    let late = Facts { ledger: pending(70), oldest: Some(2 * MINUTE), ..well() };
    headline(&late, Level::Warning, "Deliveries are 2 min behind.", &format!("70 events are safe on disk. {ANSWERED}"));
    for (age, level) in [(15, Level::Ok), (29, Level::Ok), (30, Level::Warning), (700, Level::Warning)] {
        let facts = Facts { oldest: Some(age * SECOND), ..late.clone() };
        let Judgement { headline, answers } = judge(&facts);
        assert_eq!((answers[3].level, headline.level), (level, level), "{age} s");
    }
}

#[test]
fn the_seventh_answer_sees_through_to_the_workers() {
    let with = |queues: Vec<Queue>| Facts { queues, ..well() };
    let waiting = queue("prism.scan", Role::Work, 1990, 0);
    let detail = says(&with(vec![waiting.clone()]), "workers", Level::Warning, "No");
    assert_eq!(detail, "prism.scan: 1,990 wait, no worker connected.");
    let state = QueueState::Counted { messages: 1990, consumers: 0, unattended: 5 * MINUTE };
    let facts = with(vec![Queue { state, ..waiting.clone() }, queue("prism.dead", Role::Dead, 10, 0)]);
    let detail = says(&facts, "workers", Level::Problem, "No");
    assert_eq!(detail, "prism.scan: 1,990 wait, no worker connected. 1 more queue needs a look.");
    headline(&facts, Level::Problem, &detail, &format!("All accepted events are in RabbitMQ. {ANSWERED}"));
    let dead = with(vec![queue("prism.scan", Role::Work, 0, 1), queue("prism.dead", Role::Dead, 10, 0)]);
    says(&dead, "workers", Level::Warning, "10 dead letters");
    let unrouted = with(vec![queue("prism.unrouted", Role::Unrouted, 1, 0)]);
    says(&unrouted, "workers", Level::Warning, "1 unrouted event");
    for (state, level, word) in [
        (QueueState::Unknown, Level::Note, "Not known yet"),
        (QueueState::Trouble { text: "is full".to_owned(), remedy: "wait".to_owned() }, Level::Problem, "No"),
    ] {
        says(&with(vec![Queue { state, ..waiting.clone() }]), "workers", level, word);
    }
    says(&with(Vec::new()), "workers", Level::Note, "Not known yet");
    let fine = queue("prism.scan", Role::Work, 7, 2);
    for (name, role, level, word) in [
        ("prism.dead", Role::Dead, Level::Note, "Not known"),
        ("prism.unrouted", Role::Unrouted, Level::Note, "Not known"),
        ("prism.scan.retry.1", Role::Inner, Level::Ok, "Yes"),
    ] {
        let unknown = Queue { name: name.to_owned(), role, state: QueueState::Unknown };
        let detail = says(&with(vec![fine.clone(), unknown]), "workers", level, word);
        assert!(level == Level::Ok || detail.starts_with(name), "{detail}");
    }
    let missing = vec!["queue prism.scan".to_owned(), "exchange prism.dead".to_owned()];
    let detail = says(&Facts { missing, ..well() }, "workers", Level::Problem, "No");
    assert_eq!(detail, "Missing in RabbitMQ: queue prism.scan and 1 more.");
    says(&Facts { unwatched: Some("one channel only".to_owned()), ..well() }, "workers", Level::Note, "Not known");
    says(&with(vec![queue("prism.scan", Role::Work, 0, 0)]), "workers", Level::Ok, "Nothing waits");
    let detail = says(&with(vec![queue("prism.scan", Role::Work, 7, 2)]), "workers", Level::Ok, "Yes");
    assert_eq!(detail, "2 workers are connected; 7 messages wait for them.");
}

fn any_age() -> impl Strategy<Value = Duration> {
    prop_oneof![0..120u64, 0..100_000u64].prop_map(Duration::from_secs)
}

fn any_window() -> impl Strategy<Value = Window> {
    let code = prop_oneof![Just("invalid-signature"), Just("missing-signature"), Just("spool-full"), Just("odd")];
    (0..50u64, proptest::collection::btree_map(code, 1..60u64, 0..3), 0..12u64, 0..12u64)
        .prop_map(|(accepted, refused, other_protocol, failed)| Window { accepted, refused, other_protocol, failed })
}

fn any_queue() -> impl Strategy<Value = Queue> {
    let role = prop_oneof![Just(Role::Work), Just(Role::Dead), Just(Role::Unrouted)];
    let counted = (0..3u64, 0..2u64, any_age()).prop_map(|(messages, consumers, unattended)| QueueState::Counted {
        messages,
        consumers,
        unattended,
    });
    let trouble = QueueState::Trouble { text: "is down".to_owned(), remedy: "start it".to_owned() };
    let state = prop_oneof![Just(QueueState::Unknown), Just(trouble), counted];
    (role, state).prop_map(|(role, state)| Queue { name: "prism.scan".to_owned(), role, state })
}

prop_compose! {
    fn any_broker()(
        connected in any::<bool>(),
        blocked in option::of(Just("low on memory".to_owned())),
        error in option::of(Just("no".to_owned())),
        unreachable in any::<bool>(),
        age in any_age(),
        failing in option::of(any_age()),
    ) -> Broker {
        Broker { connected, blocked: blocked.filter(|_| connected), error, unreachable, age, failing }
    }
}

fn any_refusal() -> impl Strategy<Value = Option<Refusal>> {
    option::of(any_age().prop_map(|age| Refusal { reason: "spool-full", age }))
}

prop_compose! {
    fn any_turned_away()(
        (waiting, lost, unrecognisable) in (0..3u64, 0..3u64, 0..3u64),
        (last_lost, last_waiting, last_unrecognisable) in (any_refusal(), any_refusal(), any_refusal()),
    ) -> TurnedAway {
        TurnedAway { waiting, lost, unrecognisable, last_lost, last_waiting, last_unrecognisable }
    }
}

prop_compose! {
    fn any_facts()(
        (uptime, oldest, last_confirm, last_accepted) in
            (any_age(), option::of(any_age()), option::of(any_age()), option::of(any_age())),
        (draining, damaged, used) in (any::<bool>(), 0..2u64, 0..2000u64),
        disk in option::of(Just("the disk is full; make room")),
        blocker in option::of(prop_oneof![
            Just(AppendError::Full), Just(AppendError::Unavailable), Just(AppendError::Closed),
        ]),
        (confirmed, pending, parked, removed, gap) in (0..3u64, 0..3u64, 0..3u64, 0..3u64, 0..2u64),
        outlook in prop_oneof![
            Just(Outlook::Unclear), any_age().prop_map(Outlook::FullIn), any_age().prop_map(Outlook::EmptyIn),
        ],
        (broker, turned_away) in (any_broker(), any_turned_away()),
        (queues, missing, certificate_days) in
            (vec(any_queue(), 0..3), vec(Just("queue q".to_owned()), 0..2), option::of(-9.0..40.0)),
        (last_5_minutes, last_30_minutes, last_hour) in (any_window(), any_window(), any_window()),
        (stuck, is_refused) in (0..3u64, any::<bool>()),
    ) -> Facts {
        let accepted = confirmed + pending + parked + removed + gap;
        let ledger = Ledger { accepted, confirmed, pending, parked, removed, duplicates: 0, bytes: used };
        Facts {
            uptime, draining, blocker, ledger, damaged, used, max_bytes: 2000, disk, oldest, outlook, broker,
            last_confirm,
            last_accepted, accepted_last_minute: 0, confirmed_last_minute: 0, last_5_minutes, last_30_minutes,
            last_hour, certificate_days, turned_away, queues, missing, unwatched: None,
            reconcile: Status {
                stuck, refused_since: is_refused.then_some(jiff::Timestamp::UNIX_EPOCH), ..Status::default()
            },
        }
    }
}

#[test]
fn an_end_that_nothing_tells_and_a_refused_key_are_warnings_with_a_step() {
    let stuck = Status {
        open: 9,
        overdue: 3,
        stuck: 2,
        stuck_subjects: vec!["scan:a".to_owned(), "prediction:b".to_owned()],
        stuck_after_seconds: 1500,
        by_api_last_day: 3,
        ..Status::default()
    };
    let lost = |reconcile: &Status| {
        let judgement = judge(&Facts { reconcile: reconcile.clone(), ..well() });
        let answer = judgement.answers.iter().find(|answer| answer.id == "lost").expect("an answer").clone();
        (judgement.headline, answer)
    };
    let (headline, answer) = lost(&stuck);
    assert_eq!((headline.level, answer.level, answer.word.as_str()), (Level::Warning, Level::Warning, "Perhaps"));
    assert_eq!(headline.text, "2 scans or predictions have not ended for more than 25 min.");
    assert!(answer.detail.contains("for more than 25 min (scan:a, prediction:b). Prism's API"), "{}", answer.detail);
    assert!(answer.detail.ends_with(" 3 events in the last day came by Prism's API."), "{}", answer.detail);
    assert_eq!(answer.runbook, Some("PrismRelaySubjectsOverdue"));

    let since = jiff::Timestamp::UNIX_EPOCH;
    let failing = Some(crate::reconcile::Failing { since, reason: "timed out after 10s".to_owned() });
    let (_, answer) = lost(&Status { failing: failing.clone(), ..stuck.clone() });
    assert!(answer.detail.contains("The API gives no answer: timed out after 10s."), "{}", answer.detail);
    let (headline, _) = lost(&Status { failing, ..Status::default() });
    assert_eq!(headline.level, Level::Ok, "as long as no end is missing");

    let (headline, answer) = lost(&Status { refused_since: Some(since), ..stuck });
    assert_eq!((headline.text.as_str(), headline.level), ("Prism's API refuses the key.", Level::Warning));
    assert!(answer.remedy.is_some_and(|remedy| remedy.contains("reconcile.api_key")));
    assert_eq!(lost(&Status { overdue: 3, open: 9, ..Status::default() }).0.level, Level::Ok, "they are asked for");
}

#[test]
fn every_entry_of_the_runbook_exists() {
    let runbook = include_str!("../../../deploy/runbook.md");
    let code = [include_str!("../answers.rs"), include_str!("reconciling.rs"), include_str!("../refusals.rs")].concat();
    let entries: Vec<_> = code.split("\"PrismRelay").skip(1).filter_map(|rest| rest.split('"').next()).collect();
    assert!(entries.len() > 20, "{entries:?}");
    for entry in entries {
        assert!(runbook.contains(&format!("### PrismRelay{entry}\n")), "{entry}");
    }
}

/// An operator who follows the link of a refusal finds what is refused and what to do.
#[test]
fn every_refusal_is_in_its_entry_of_the_runbook() {
    let runbook = include_str!("../../../deploy/runbook.md");
    let (_, table) = runbook.split_once("\n## Refused webhooks\n").expect("a section");
    let (table, _) = table.split_once("\n## ").expect("another section");
    for code in crate::problem::Code::ALL.map(crate::problem::Code::text) {
        let last = Some(Refusal { reason: code, age: SECOND });
        let turned_away = TurnedAway { lost: 1, last_lost: last, ..TurnedAway::default() };
        let headline = judge(&Facts { turned_away, ..well() }).headline;
        let entry = headline.runbook.expect("an entry");
        let expected = match code {
            "spool-full" | "spool-unavailable" => "PrismRelayNotReady",
            code if refusals::is_unverified(code) => "PrismRelaySomeSignaturesFail",
            _ => "refused-webhooks",
        };
        assert_eq!(entry, expected, "{code}");
        assert!(table.contains(&format!("`{code}`")), "{code} is not in the table");
        assert_eq!(headline.advice, refusals::step(code));
    }
}

proptest! {
    #[test]
    fn no_answer_is_worse_than_the_headline(facts in any_facts()) {
        let Judgement { headline, answers } = judge(&facts);
        let worst = answers.iter().map(|answer| answer.level).max();
        prop_assert_eq!(Some(headline.level), worst);
        // What the headline says is never better than its level.
        let is_green = headline.text.starts_with("All ");
        prop_assert!(!(headline.level >= Level::Warning && is_green), "{:?} {:?}", headline, answers);
        let all_are_there = facts.ledger.removed == 0 && facts.gap().is_none();
        let says_so = [&headline.text, &headline.detail].into_iter().any(|text| text.contains("All "));
        prop_assert!(all_are_there || !says_so || headline.text == "All is well.", "{:?}", headline);
        prop_assert!(headline.level < Level::Warning || !headline.advice.is_empty(), "{:?}", headline);
        for answer in &answers {
            prop_assert!(answer.level < Level::Warning || answer.remedy.is_some(), "{:?}", answer);
            prop_assert!(answer.level < Level::Warning || answer.runbook.is_some(), "{:?}", answer);
            prop_assert!(!answer.word.is_empty() && answer.detail.ends_with('.'), "{:?}", answer);
        }
    }

    /// A relay that refuses every webhook, or delivers nothing, is never well.
    #[test]
    fn what_loses_events_is_a_problem(facts in any_facts()) {
        let level = judge(&facts).headline.level;
        let refuses = facts.blocker.is_some() && !facts.draining;
        let loses = facts.damaged > 0 && facts.uptime < LOSS_SHOWN;
        if refuses || loses {
            prop_assert_eq!(level, Level::Problem);
        }
        prop_assert!(!facts.draining || level > Level::Ok);
    }

    /// No fact about losses hides a worse one.
    #[test]
    fn the_worst_loss_decides(facts in any_facts()) {
        let TurnedAway { waiting, lost, unrecognisable, last_lost, last_unrecognisable, .. } = facts.turned_away;
        let aged = |last: Option<Refusal>, fresh| match last {
            Some(last) if last.age < LOSS_SHOWN => fresh,
            Some(_) | None => Level::Note,
        };
        let since_start = if facts.uptime < LOSS_SHOWN { Level::Problem } else { Level::Note };
        let expected = [
            (facts.damaged > 0, since_start),
            (facts.gap().is_some(), Level::Problem),
            (lost > 0, aged(last_lost, Level::Problem)),
            (waiting > 0, Level::Warning),
            (unrecognisable > 0, aged(last_unrecognisable, Level::Warning)),
            (facts.reconcile.refused_since.is_some(), Level::Warning),
            (facts.reconcile.stuck > 0, Level::Warning),
        ];
        let expected = expected.iter().filter(|(is_so, _)| *is_so).map(|(_, level)| *level).max();
        prop_assert_eq!(facts.lost().level, expected.unwrap_or(Level::Ok));
    }
}

#[test]
fn the_alert_rules_have_the_same_thresholds() {
    let rules = include_str!("../../../deploy/prometheus/prism-relay.rules.yml");
    let rules = rules.split_whitespace().collect::<Vec<_>>().join(" ");
    let hours = |time: Duration| time.as_secs() / 3600;
    let minutes = |time: Duration| time.as_secs() / 60;
    for threshold in [
        format!("last_over_time(prism_relay_spool_max_bytes[5m]) > {NEARLY_FULL} "),
        format!("spool_seconds_left:deriv15m < {} * 3600 ", hours(ROOM_FOR_A_PROBLEM)),
        format!("spool_seconds_left:deriv1h < {} * 3600 ", hours(ROOM_FOR_A_WARNING)),
        format!("delivery_lag_seconds_bucket[15m])) > {} ", LATE.as_secs()),
        format!("min_over_time(prism_relay_spool_events[{}m]) > 0 ", minutes(NOTHING_CONFIRMED)),
        format!("-timestamp\"}}[5m]) ) >= {REFUSED_IN_5_MINUTES} "),
        format!("-timestamp\"}}[30m]) ) >= {REFUSED_IN_30_MINUTES} "),
        format!(" > {UNVERIFIED_SHARE} "),
        format!("}}[30m] ) ) >= {OTHER_PROTOCOL_IN_30_MINUTES} "),
        format!("malformed\"}}[30m]) ) >= {FAILED_IN_30_MINUTES} "),
        format!("days_left[15m]) < {CERTIFICATE_PROBLEM_DAYS} for"),
        format!("days_left[15m]) < {CERTIFICATE_WARNING_DAYS} and"),
        format!("-timestamp\"}}[1h]) ) >= {UNVERIFIED_MIN} "),
        format!("\"accepted|duplicate\"}}[{}h]) ) > 0 for: 15m", hours(SILENT)),
        format!("max_over_time(prism_relay_queue_consumers[{}m])) == 0 ", minutes(NO_WORKER)),
    ] {
        assert!(rules.contains(&threshold), "{threshold:?} is not in the alert rules");
    }
}
