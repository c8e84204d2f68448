//! The rules about late copies, each by its name, and properties of every sequence of events.

use proptest::prelude::*;

use super::*;

const SECOND: i64 = 1000;
const MINUTE: i64 = 60 * SECOND;

/// Takes in events, and numbers them.
#[derive(Default)]
struct Scan {
    state: State,
    seq: u64,
}

impl Scan {
    fn on(&mut self, step: Step, source: Source, is_trusted: bool, at_ms: i64) -> Verdict {
        self.seq += 1;
        let told = Told { at_ms, source, is_trusted };
        self.state.on(&News { seq: self.seq, id: Uuid::from_u128(u128::from(self.seq)), step, told })
    }

    fn webhook(&mut self, step: Step, at_ms: i64) -> Verdict {
        self.on(step, Source::Webhook, true, at_ms)
    }

    fn unsigned(&mut self, step: Step, at_ms: i64) -> Verdict {
        self.on(step, Source::Webhook, false, at_ms)
    }

    fn api(&mut self, step: Step, at_ms: i64) -> Verdict {
        self.on(step, Source::Api, true, at_ms)
    }
}

fn seq_of(verdict: Verdict) -> Option<u64> {
    match verdict {
        Verdict::LateCopy(made) => Some(made.seq),
        Verdict::New | Verdict::Known => None,
    }
}

use Step::{Began, Failed, Succeeded};
use Verdict::{Known, New};

#[test]
fn a_subject_is_open_from_its_beginning_to_its_end() {
    let mut scan = Scan::default();
    assert_eq!((scan.webhook(Began, 0), scan.state.is_open), (New, true));
    assert_eq!((scan.webhook(Failed, 1), scan.state.is_open), (New, false));
    assert_eq!(scan.state.order(), Order::Possible);
}

#[test]
fn the_webhook_of_an_event_that_the_api_told_is_a_late_copy_once() {
    let mut scan = Scan::default();
    scan.webhook(Began, 0);
    assert_eq!((scan.api(Succeeded, 15 * MINUTE), scan.state.is_open), (New, false));
    assert_eq!(seq_of(scan.webhook(Succeeded, 16 * MINUTE)), Some(2));
    assert_eq!(scan.webhook(Succeeded, 17 * MINUTE), New, "one webhook for each event that the API told");
}

#[test]
fn a_late_copy_comes_within_ten_minutes() {
    let late = 10 * MINUTE;
    for (at_ms, is_late_copy) in [(late, true), (late + 1, false), (-late, true), (-late - 1, false)] {
        let mut scan = Scan::default();
        scan.api(Succeeded, 0);
        assert_eq!(seq_of(scan.webhook(Succeeded, at_ms)).is_some(), is_late_copy, "{at_ms}");
    }
}

#[test]
fn another_end_than_the_api_told_is_no_late_copy() {
    let mut scan = Scan::default();
    scan.webhook(Began, 0);
    scan.api(Succeeded, 15 * MINUTE);
    assert_eq!(scan.webhook(Failed, 16 * MINUTE), New);
    assert_eq!(scan.webhook(Succeeded, 17 * MINUTE), New, "so much has happened that it may be another run");
}

/// A subject that Prism works on a second time.
#[test]
fn the_events_of_a_second_run_are_always_published() {
    let mut scan = Scan::default();
    scan.webhook(Began, 0);
    scan.api(Succeeded, 15 * MINUTE);
    assert_eq!((scan.webhook(Began, 16 * MINUTE), scan.state.is_open), (New, true));
    assert_eq!((scan.webhook(Succeeded, 17 * MINUTE), scan.state.is_open), (New, false));
    // And its end is repaired as well.
    assert_eq!((scan.webhook(Began, 20 * MINUTE), scan.state.is_open), (New, true));
    assert_eq!(scan.api(Succeeded, 40 * MINUTE), New);
}

#[test]
fn the_beginning_of_a_second_run_is_no_late_copy_of_the_first_one() {
    let mut scan = Scan::default();
    assert_eq!(scan.api(Began, 0), New);
    assert_eq!(scan.webhook(Succeeded, MINUTE), New);
    assert_eq!((scan.webhook(Began, 4 * MINUTE), scan.state.is_open), (New, true));
}

#[test]
fn a_beginning_that_the_api_told_is_recognised_before_and_shortly_after_the_end() {
    let mut scan = Scan::default();
    scan.api(Began, 0);
    assert_eq!(seq_of(scan.webhook(Began, MINUTE)), Some(1));
    let mut scan = Scan::default();
    scan.api(Began, 0);
    scan.webhook(Succeeded, MINUTE);
    assert_eq!(seq_of(scan.webhook(Began, 2 * MINUTE)), Some(1));
    assert!(!scan.state.is_open);
}

/// Both webhooks were refused, and the API told the end. Prism sends both again.
#[test]
fn a_late_first_beginning_keeps_the_end_and_its_late_copy() {
    let mut scan = Scan::default();
    scan.api(Succeeded, 0);
    assert_eq!(scan.state.order(), Order::EndWithoutBeginning);
    assert_eq!((scan.webhook(Began, MINUTE), scan.state.is_open), (New, false));
    assert_eq!(scan.state.order(), Order::BeginningAfterEnd);
    assert_eq!(seq_of(scan.webhook(Succeeded, 2 * MINUTE)), Some(1));
}

/// The beginning of the second run was refused and comes after its end. An open subject would get a second end by the
/// API.
#[test]
fn a_late_beginning_of_a_second_run_does_not_open_the_subject() {
    let mut scan = Scan::default();
    scan.webhook(Began, 0);
    scan.webhook(Succeeded, MINUTE);
    assert_eq!(scan.webhook(Succeeded, 20 * MINUTE), New);
    assert_eq!(scan.state.order(), Order::EndWithoutBeginning);
    assert_eq!((scan.webhook(Began, 20 * MINUTE + 30 * SECOND), scan.state.is_open), (New, false));
    assert_eq!(scan.state.order(), Order::BeginningAfterEnd);
    assert_eq!(scan.api(Succeeded, 40 * MINUTE), Known);
    // The next one is a third run.
    assert_eq!((scan.webhook(Began, 21 * MINUTE), scan.state.is_open), (New, true));
}

/// Such as a failed scan that Prism tries again.
#[test]
fn a_run_that_begins_at_once_after_the_end_of_another_one_is_followed() {
    for source in [Source::Webhook, Source::Api] {
        let mut scan = Scan::default();
        scan.webhook(Began, 0);
        scan.on(Failed, source, true, MINUTE);
        assert_eq!((scan.webhook(Began, MINUTE + SECOND), scan.state.is_open), (New, true));
        assert_eq!(scan.api(Failed, 20 * MINUTE), New, "its end is repaired");
    }
}

/// Whatever a stranger sends first, unsigned: the signed webhook is recognised, or else published.
#[test]
fn unsigned_webhooks_do_not_decide_about_a_signed_one() {
    for strangers in [&[Succeeded][..], &[Succeeded, Succeeded], &[Began], &[Failed, Succeeded, Began]] {
        let mut scan = Scan::default();
        scan.webhook(Began, 0);
        scan.api(Succeeded, 15 * MINUTE);
        for step in strangers {
            scan.unsigned(*step, 15 * MINUTE + SECOND);
        }
        assert_eq!(seq_of(scan.webhook(Succeeded, 16 * MINUTE)), Some(2), "{strangers:?}");
        assert_eq!(scan.webhook(Succeeded, 17 * MINUTE), New, "{strangers:?}");
    }
}

#[test]
fn of_unsigned_webhooks_only_the_first_one_is_a_late_copy() {
    for is_tls in [true, false] {
        let mut scan = Scan::default();
        scan.on(Succeeded, Source::Api, is_tls, 0);
        assert_eq!(seq_of(scan.unsigned(Succeeded, SECOND)), Some(1), "{is_tls}");
        assert_eq!(scan.unsigned(Succeeded, 2 * SECOND), New, "{is_tls}");
    }
}

#[test]
fn no_signed_webhook_is_a_late_copy_of_an_answer_that_proves_nothing() {
    let mut scan = Scan::default();
    scan.webhook(Began, 0);
    assert_eq!(scan.on(Succeeded, Source::Api, false, 15 * MINUTE), New);
    assert!(!scan.state.is_open, "the API is not asked for the same again");
    assert_eq!(scan.webhook(Succeeded, 16 * MINUTE), New);
    let mut scan = Scan::default();
    scan.on(Succeeded, Source::Api, false, 0);
    assert_eq!(seq_of(scan.unsigned(Succeeded, MINUTE)), Some(1));
}

#[test]
fn an_unsigned_end_does_not_close_a_subject_with_a_signed_beginning() {
    let mut scan = Scan::default();
    scan.webhook(Began, 0);
    assert_eq!((scan.unsigned(Succeeded, MINUTE), scan.state.is_open), (New, true));
    assert_eq!((scan.api(Succeeded, 15 * MINUTE), scan.state.is_open), (New, false));
}

#[test]
fn an_unsigned_end_changes_nothing_about_a_signed_one() {
    let mut scan = Scan::default();
    scan.webhook(Began, 0);
    scan.webhook(Succeeded, MINUTE);
    let ended = scan.state.ended;
    assert_eq!(scan.unsigned(Failed, 2 * MINUTE), New);
    assert_eq!(scan.state.ended, ended);
}

#[test]
fn an_unsigned_beginning_does_not_weaken_a_signed_one() {
    let mut scan = Scan::default();
    scan.webhook(Began, 0);
    let began = scan.state.began;
    scan.unsigned(Began, MINUTE);
    assert_eq!(scan.state.began, began);
    scan.unsigned(Succeeded, 2 * MINUTE);
    assert!(scan.state.is_open);
}

#[test]
fn repeated_beginnings_do_not_put_off_the_question_for_the_end() {
    let mut scan = Scan::default();
    scan.unsigned(Began, 0);
    scan.state.asked = Asked { last_ms: Some(1), tries: 3, next_ms: 9 };
    scan.unsigned(Began, MINUTE);
    assert_eq!(scan.state.began.map(|told| told.at_ms), Some(0));
    assert_eq!(scan.state.asked.tries, 3);
    scan.webhook(Began, 2 * MINUTE);
    assert!(scan.state.began.is_some_and(|told| told.is_trusted));
    assert_eq!(scan.state.asked, Asked::default());
}

#[test]
fn the_api_tells_nothing_that_is_known() {
    let mut scan = Scan::default();
    scan.webhook(Began, 0);
    assert_eq!(scan.api(Began, 1), Known);
    scan.webhook(Succeeded, 2);
    let before = scan.state;
    assert_eq!((scan.api(Succeeded, 3), scan.api(Began, 4)), (Known, Known));
    assert_eq!(scan.state, before);
    assert_eq!(scan.api(Failed, 5), New, "the API knows better");
}

#[test]
fn two_webhooks_are_never_copies_of_each_other() {
    let mut scan = Scan::default();
    for step in [Began, Succeeded, Succeeded, Began, Began, Failed, Succeeded] {
        assert_eq!(scan.webhook(step, 0), New);
    }
}

#[test]
fn ids_that_could_be_misread_are_no_subjects() {
    for id in ["", " ", "a b", "a\n", "ä", ".", "..", &"x".repeat(129)] {
        assert_eq!(Subject::new(Kind::Scan, id), None, "{id:?}");
    }
    for id in ["a", "...", "a/b?c#d%", &"x".repeat(128)] {
        let subject = Subject::new(Kind::Prediction, id).unwrap();
        assert_eq!(subject.to_string().parse(), Ok(subject));
    }
    for text in ["", "scan", "scan:", "user:1", "Scan:1"] {
        assert_eq!(text.parse::<Subject>(), Err(NotASubject), "{text:?}");
    }
}

#[test]
fn the_documented_events_tell_a_step_and_others_tell_none() {
    let progress = |body: &str| Progress::of(&Envelope::parse(body.as_bytes()).unwrap());
    for line in include_str!("../../tests/samples/events.jsonl").lines() {
        let envelope = Envelope::parse(line.as_bytes()).unwrap();
        let is_documented = crate::event::DOCUMENTED_TYPES.contains(&&*envelope.event_type);
        let progress = Progress::of(&envelope);
        assert_eq!(progress.is_some(), is_documented, "{line}");
        if let Some(progress) = progress {
            assert_eq!(progress.event_type(), envelope.event_type);
            assert_eq!(Some(progress.subject.to_string()), envelope.subject());
            assert_eq!(Some(progress.subject.key()), envelope.subject_key());
        }
    }
    for body in [
        r#"{"eventType":"scan.processing.started","payload":{}}"#,
        r#"{"eventType":"scan.processing.started","payload":{"scanId":7}}"#,
        r#"{"eventType":"scan.processing.started","payload":{"scanId":"a b"}}"#,
        r#"{"eventType":"scan.processing.done","payload":{"scanId":"1"}}"#,
        r#"{"eventType":"body_shape_prediction.processing.failed","payload":{"scanId":"1"}}"#,
    ] {
        assert_eq!(progress(body), None, "{body}");
    }
}

fn news() -> impl Strategy<Value = (Step, Source, bool, i64)> {
    let step = prop_oneof![Just(Began), Just(Succeeded), Just(Failed)];
    let source = prop_oneof![2 => Just(Source::Webhook), 1 => Just(Source::Api)];
    (step, source, any::<bool>(), 0..40 * MINUTE)
}

proptest! {
    /// What the API tells twice is published once, whatever came before.
    #[test]
    fn the_same_answer_again_is_known(events in proptest::collection::vec(news(), 0..12), answer in news()) {
        let (mut scan, mut at_ms) = (Scan::default(), 0);
        for (step, source, is_trusted, later) in events {
            at_ms += later;
            scan.on(step, source, is_trusted, at_ms);
        }
        let (step, _, is_trusted, _) = answer;
        scan.on(step, Source::Api, is_trusted, at_ms);
        let before = scan.state;
        prop_assert_eq!(scan.on(step, Source::Api, is_trusted, at_ms + 1), Known);
        prop_assert_eq!(scan.state, before);
    }

    /// No webhook is dropped without an event of the API, of the same step, as trusted, recent, and used once.
    #[test]
    fn each_late_copy_has_an_event_of_its_own(events in proptest::collection::vec(news(), 0..24)) {
        let (mut scan, mut at_ms, mut made) = (Scan::default(), 0, Vec::new());
        for (step, source, is_trusted, later) in events {
            at_ms += later;
            match scan.on(step, source, is_trusted, at_ms) {
                New if source == Source::Api => made.push((scan.seq, step, is_trusted, at_ms)),
                New => {}
                Known => prop_assert_eq!(source, Source::Api),
                Verdict::LateCopy(copied) => {
                    prop_assert_eq!(source, Source::Webhook);
                    let place = made.iter().position(|(seq, ..)| *seq == copied.seq);
                    let (_, made_step, made_trusted, made_ms) = made.remove(place.expect("used once"));
                    prop_assert_eq!(made_step, step);
                    prop_assert!(made_trusted || !is_trusted);
                    prop_assert!(at_ms - made_ms <= 10 * MINUTE);
                }
            }
        }
    }

    /// After a beginning that is published, everything up to the next answer of the API is published.
    #[test]
    fn nothing_is_dropped_after_a_new_beginning(
        before in proptest::collection::vec(news(), 0..12),
        run in proptest::collection::vec(news(), 1..6),
    ) {
        let (mut scan, mut at_ms) = (Scan::default(), 0);
        for (step, source, is_trusted, later) in before {
            at_ms += later;
            scan.on(step, source, is_trusted, at_ms);
        }
        at_ms += 3 * MINUTE;
        prop_assume!(scan.webhook(Began, at_ms) == New);
        prop_assert!(scan.state.is_open);
        for (step, _, is_trusted, later) in run {
            at_ms += later;
            prop_assert_eq!(scan.on(step, Source::Webhook, is_trusted, at_ms), New);
        }
    }

    /// A subject is closed only by an end that is as trusted as its beginning, or by the API.
    #[test]
    fn a_signed_beginning_waits_for_a_signed_end(events in proptest::collection::vec(news(), 0..24)) {
        let (mut scan, mut at_ms) = (Scan::default(), 0);
        for (step, source, is_trusted, later) in events {
            at_ms += later;
            let before = scan.state;
            scan.on(step, source, is_trusted, at_ms);
            let waits = before.is_open && before.began.is_some_and(|began| began.is_trusted);
            if waits && source == Source::Webhook && !is_trusted {
                prop_assert!(scan.state.is_open);
                prop_assert_eq!(scan.state.began, before.began);
            }
        }
    }
}
