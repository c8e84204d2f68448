//! Decides what to ask Prism's API next, and when: overdue subjects first, then hints of signed webhooks, then a few
//! hints of unsigned ones. One request at a time, at `reconcile.rate`, with growing pauses after failures. Pure: takes
//! the clock, the random numbers and what was found.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use jiff::Timestamp;

use super::answer::Reply;
use super::settings::Settings;
use crate::backoff::Backoff;
use crate::spool::{Hint, HintTrust, Note};
use crate::subject::{State, Step, Subject};

/// Maximum number of questions of one kind that an interval begins with. More are asked in the next intervals.
pub(super) const QUESTIONS_MAX: usize = 100;
/// Maximum number of unsigned hints that are asked about in an interval: anyone can make the relay remember one.
pub(super) const UNSIGNED_MAX: usize = 10;

/// The pause after a request without a usable answer grows from the first to the second.
const PAUSE_MIN: Duration = Duration::from_secs(5);
const PAUSE_MAX: Duration = Duration::from_secs(600);
/// Maximum pause that the API can ask for, and maximum time until a subject is asked about again.
const LONGEST: Duration = Duration::from_secs(3600);

/// One subject to ask about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Question {
    pub subject: Subject,
    pub reason: Reason,
}

/// Why a subject is asked about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Reason {
    /// It began and did not end in time.
    Overdue {
        /// Whether its beginning is certainly Prism's.
        is_trusted: bool,
        began_ms: i64,
        tries: u32,
    },
    /// A webhook about it was refused.
    Hint { trust: HintTrust, at_ms: i64, tries: u32 },
    /// An operator named it.
    Operator,
}

/// What a question has brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Conclusion {
    /// The missing event of this step was made.
    Made(Step),
    /// A webhook told it, or an earlier answer.
    Known,
    /// The status is older than the question, so no event is missing.
    Older,
    /// The subject has not ended.
    Pending,
    /// The API knows no such subject.
    Unknown,
    /// The API does not accept the key.
    KeyRefused,
    /// The key is not for this subject, or for nothing.
    Forbidden,
    /// The API has too much to do.
    Busy,
    /// The answer cannot be used.
    Unusable,
    /// There was no answer, or the spool takes no event now.
    Undecided,
}

/// What to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Look up what is overdue.
    Look,
    Ask(Question),
    WaitUntil(Instant),
}

/// The questions of this interval, and the pauses.
pub(super) struct Schedule {
    interval: Duration,
    /// Time between two requests.
    gap: Duration,
    next_look: Instant,
    next_request: Instant,
    /// The API asked for no request before this time.
    busy_until: Instant,
    /// The pause after a failure. An operator does not wait for it.
    pause_until: Instant,
    backoff: Backoff,
    /// Whether the API refused the key.
    is_refused: bool,
    /// Whether the last question was an operator's.
    is_after_order: bool,
    questions: VecDeque<Question>,
}

impl Schedule {
    pub(super) fn new(settings: &Settings, now: Instant) -> Self {
        Self {
            interval: settings.interval,
            gap: Duration::from_secs_f64(1.0 / settings.rate),
            next_look: now,
            next_request: now,
            busy_until: now,
            pause_until: now,
            backoff: Backoff::new(PAUSE_MIN, PAUSE_MAX),
            is_refused: false,
            is_after_order: false,
            questions: VecDeque::new(),
        }
    }

    pub(super) fn next(&mut self, now: Instant) -> Next {
        if now >= self.next_look {
            self.next_look = now + self.interval;
            return Next::Look;
        }
        if self.is_refused || self.questions.is_empty() {
            return Next::WaitUntil(self.next_look);
        }
        let earliest = self.next_request.max(self.busy_until).max(self.pause_until);
        if now < earliest {
            return Next::WaitUntil(earliest.min(self.next_look));
        }
        self.is_after_order = false;
        self.questions.pop_front().map_or(Next::WaitUntil(self.next_look), Next::Ask)
    }

    /// Takes what a look has found, in place of what is left of the interval before: what is overdue comes first.
    pub(super) fn found(&mut self, overdue: Vec<(Subject, State)>, signed: Vec<Hint>, unsigned: Vec<Hint>) {
        let of_hint = |Hint { subject, trust, at_ms, tries, .. }| Question {
            subject,
            reason: Reason::Hint { trust, at_ms, tries },
        };
        let overdue = overdue.into_iter().filter_map(|(subject, state)| {
            let (began, tries) = (state.began?, state.asked.tries);
            let reason = Reason::Overdue { is_trusted: began.is_trusted, began_ms: began.at_ms, tries };
            Some(Question { subject, reason })
        });
        let unsigned = unsigned.into_iter().take(UNSIGNED_MAX);
        self.questions = overdue.chain(signed.into_iter().chain(unsigned).map(of_hint)).collect();
    }

    /// Whether an operator's question may come next. A long list of an operator's takes turns with what is overdue.
    pub(super) fn may_take_order(&self, now: Instant) -> bool {
        let waits = self.is_refused || self.questions.is_empty() || now < self.busy_until.max(self.pause_until);
        !self.is_after_order || waits
    }

    /// An operator's question is asked now.
    pub(super) fn on_order(&mut self) {
        self.is_after_order = true;
    }

    /// When an operator's request may be made. The error is the end of a pause that the API asked for.
    pub(super) fn operator_may_ask(&self, now: Instant) -> Result<Instant, Duration> {
        match self.busy_until.saturating_duration_since(now) {
            left if left.is_zero() => Ok(self.next_request),
            left => Err(left),
        }
    }

    /// When the second request for one question may be made.
    pub(super) fn next_request(&self) -> Instant {
        self.next_request
    }

    /// Takes the outcome of a request.
    pub(super) fn on_reply<T>(&mut self, reply: &Reply<T>, question: &Question, now: Instant, random: f64) {
        self.next_request = now + self.gap;
        match reply {
            Reply::Found(_) | Reply::Unknown => {
                self.backoff.reset();
                self.pause_until = now;
                self.is_refused = false;
            }
            Reply::KeyRefused => self.is_refused = true,
            Reply::Forbidden if question.is_certain() => self.is_refused = true,
            // Anyone can name a subject that the API does not answer for. The others do not wait for it.
            Reply::Forbidden => {}
            Reply::Unusable(_) if question.is_unsigned_hint() => {}
            Reply::Busy(asked_for) => {
                let own = self.backoff.next(random);
                self.busy_until = now + asked_for.unwrap_or_default().clamp(own, LONGEST);
            }
            Reply::Unusable(_) | Reply::Silent(_) => self.pause_until = now + self.backoff.next(random),
        }
    }

    /// A new key is in use.
    pub(super) fn on_new_key(&mut self, now: Instant) {
        self.is_refused = false;
        (self.busy_until, self.pause_until) = (now, now);
        self.backoff.reset();
        self.next_look = now;
    }

    /// Whether the API refused the key, so that nothing is asked.
    pub(super) fn is_refused(&self) -> bool {
        self.is_refused
    }
}

impl Question {
    /// Whether the subject is certainly one of this account: Prism named it in a signed webhook that was accepted.
    pub(super) fn is_certain(&self) -> bool {
        matches!(self.reason, Reason::Overdue { is_trusted: true, .. })
    }

    /// Whether an unsigned webhook that was refused is all that there is of the subject.
    pub(super) fn is_unsigned_hint(&self) -> bool {
        matches!(self.reason, Reason::Hint { trust: HintTrust::Unsigned, .. })
    }

    /// The time of the sign of the subject, if it may not be Prism's.
    pub(super) fn not_before(&self) -> Option<Timestamp> {
        let at_ms = match self.reason {
            Reason::Overdue { is_trusted: false, began_ms, .. } => began_ms,
            Reason::Hint { at_ms, .. } => at_ms,
            Reason::Overdue { is_trusted: true, .. } | Reason::Operator => return None,
        };
        // A time that no clock shows makes every status too old.
        Some(Timestamp::from_millisecond(at_ms).unwrap_or(Timestamp::MAX))
    }

    /// What the spool notes after the question. A made end closes its subject by itself.
    pub(super) fn note(&self, conclusion: Conclusion, now: Timestamp, interval: Duration, random: f64) -> Option<Note> {
        let subject = self.subject.clone();
        let (at_ms, later) = (now.as_millisecond(), |tries| later(now, interval, tries, random));
        match self.reason {
            Reason::Overdue { is_trusted, tries, .. } => match conclusion {
                Conclusion::Forbidden if !is_trusted => Some(Note::Closed { subject }),
                // After a 403 as well, so that the same subject does not come first again.
                Conclusion::Made(Step::Began)
                | Conclusion::Pending
                | Conclusion::Unusable
                | Conclusion::Undecided
                | Conclusion::Forbidden => Some(Note::Asked { subject, at_ms, next_ms: later(tries) }),
                Conclusion::Unknown | Conclusion::Older => Some(Note::Closed { subject }),
                Conclusion::Made(Step::Succeeded | Step::Failed)
                | Conclusion::Known
                | Conclusion::KeyRefused
                | Conclusion::Busy => None,
            },
            Reason::Hint { trust, tries, .. } => match (conclusion, trust) {
                (Conclusion::Undecided, _) | (Conclusion::Pending | Conclusion::Unusable, HintTrust::Signed) => {
                    Some(Note::HintAsked { subject, trust, next_ms: later(tries) })
                }
                (Conclusion::KeyRefused | Conclusion::Busy, _) => None,
                (Conclusion::Pending | Conclusion::Unusable, HintTrust::Unsigned)
                | (
                    Conclusion::Made(_)
                    | Conclusion::Known
                    | Conclusion::Older
                    | Conclusion::Unknown
                    | Conclusion::Forbidden,
                    _,
                ) => Some(Note::HintDone { subject, trust }),
            },
            Reason::Operator => (conclusion == Conclusion::Unknown).then_some(Note::Closed { subject }),
        }
    }
}

/// When to ask about a subject again: after the interval, then after twice as long each time, with jitter.
fn later(now: Timestamp, interval: Duration, tries: u32, random: f64) -> i64 {
    let ceiling = interval.saturating_mul(1 << tries.min(20)).min(LONGEST);
    let pause = ceiling.mul_f64(0.75 + random.clamp(0.0, 1.0) / 4.0);
    now.as_millisecond().saturating_add(pause.as_millis() as i64)
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::{Just, Strategy, any, prop_assert, prop_assert_eq, prop_oneof, proptest};

    use super::super::answer::Scan;
    use super::super::settings::ApiUrl;
    use super::*;
    use crate::event::Source;
    use crate::spool::subjects;
    use crate::subject::{Asked, Kind, Told};

    const INTERVAL: Duration = Duration::from_secs(60);
    const RATE: f64 = 2.0;

    fn schedule(start: Instant) -> Schedule {
        let settings = Settings {
            api_key: None,
            api_key_file: None,
            api_url: ApiUrl::default(),
            after: Duration::from_secs(900),
            interval: INTERVAL,
            rate: RATE,
            subjects: subjects::Settings { max: 1000, keep: Duration::from_secs(3600) },
        };
        Schedule::new(&settings, start)
    }

    fn subject(id: &str) -> Subject {
        Subject::new(Kind::Scan, id).unwrap()
    }

    fn overdue(id: &str, is_trusted: bool) -> (Subject, State) {
        let began = Some(Told { at_ms: 0, source: Source::Webhook, is_trusted });
        (subject(id), State { began, is_open: true, asked: Asked::default(), ..State::default() })
    }

    fn hint(id: &str, trust: HintTrust) -> Hint {
        Hint { subject: subject(id), step: Step::Began, at_ms: 0, trust, tries: 0 }
    }

    /// A schedule that has looked, and found one trusted subject of each kind.
    fn with_questions(start: Instant) -> Schedule {
        let mut schedule = schedule(start);
        assert_eq!(schedule.next(start), Next::Look);
        let (signed, unsigned) = (hint("signed", HintTrust::Signed), hint("unsigned", HintTrust::Unsigned));
        schedule.found(vec![overdue("overdue", true)], vec![signed], vec![unsigned]);
        schedule
    }

    fn ask(schedule: &mut Schedule, now: Instant) -> Question {
        match schedule.next(now) {
            Next::Ask(question) => question,
            other => panic!("{other:?}"),
        }
    }

    fn body() -> Reply<()> {
        Reply::Found(())
    }

    #[test]
    fn what_is_overdue_comes_before_hints_and_signed_ones_before_others() {
        let start = Instant::now();
        let mut schedule = with_questions(start);
        let mut now = start;
        for id in ["overdue", "signed", "unsigned"] {
            let question = ask(&mut schedule, now);
            assert_eq!(question.subject.id(), id);
            schedule.on_reply(&body(), &question, now, 0.5);
            let next = now + Duration::from_secs_f64(1.0 / RATE);
            let waits = if id == "unsigned" { start + INTERVAL } else { next };
            assert_eq!(schedule.next(now), Next::WaitUntil(waits), "never faster than the rate");
            now = next;
        }
        assert_eq!(schedule.next(start + INTERVAL), Next::Look);
        let many: Vec<_> = (0..50).map(|number| hint(&number.to_string(), HintTrust::Unsigned)).collect();
        schedule.found(Vec::new(), Vec::new(), many);
        assert_eq!(schedule.questions.len(), UNSIGNED_MAX, "strangers' hints are few in an interval");
    }

    #[test]
    fn a_refused_key_stops_every_question_until_it_changes() {
        let start = Instant::now();
        let mut schedule = with_questions(start);
        let question = ask(&mut schedule, start);
        schedule.on_reply(&Reply::<()>::KeyRefused, &question, start, 0.5);
        for minute in 1..1000 {
            let now = start + minute * INTERVAL;
            assert_eq!(schedule.next(now), Next::Look, "counting goes on");
            schedule.found(vec![overdue("overdue", true)], Vec::new(), Vec::new());
            assert_eq!(schedule.next(now), Next::WaitUntil(now + INTERVAL));
        }
        let now = start + 1000 * INTERVAL;
        schedule.on_new_key(now);
        assert_eq!(schedule.next(now), Next::Look);
        assert_eq!(ask(&mut schedule, now).subject.id(), "overdue");
    }

    #[test]
    fn an_operators_success_ends_the_stop() {
        let start = Instant::now();
        let mut schedule = with_questions(start);
        let question = ask(&mut schedule, start);
        schedule.on_reply(&Reply::<()>::KeyRefused, &question, start, 0.5);
        let operator = Question { subject: subject("named"), reason: Reason::Operator };
        let at = schedule.operator_may_ask(start).unwrap();
        assert_eq!(at, start + Duration::from_secs_f64(1.0 / RATE), "at the rate");
        schedule.on_reply(&Reply::<()>::Forbidden, &operator, at, 0.5);
        assert!(schedule.is_refused(), "not by another refusal");
        schedule.on_reply(&Reply::<()>::Unknown, &operator, at, 0.5);
        assert!(!schedule.is_refused());
    }

    #[test]
    fn a_403_refuses_the_key_only_for_a_signed_subject_and_that_one_does_not_come_first_again() {
        let start = Instant::now();
        for (reason, is_refused) in [
            (Reason::Overdue { is_trusted: true, began_ms: 0, tries: 0 }, true),
            (Reason::Overdue { is_trusted: false, began_ms: 0, tries: 0 }, false),
            (Reason::Hint { trust: HintTrust::Signed, at_ms: 0, tries: 0 }, false),
            (Reason::Hint { trust: HintTrust::Unsigned, at_ms: 0, tries: 0 }, false),
            (Reason::Operator, false),
        ] {
            let mut schedule = with_questions(start);
            let question = Question { subject: subject("other"), reason };
            schedule.on_reply(&Reply::<()>::Forbidden, &question, start, 0.5);
            assert_eq!(schedule.is_refused(), is_refused, "{question:?}");
            let note = question.note(Conclusion::Forbidden, Timestamp::UNIX_EPOCH, INTERVAL, 0.5);
            assert_eq!(matches!(note, Some(Note::Asked { .. })), is_refused, "{question:?}");
            let is_dropped = matches!(note, Some(Note::HintDone { .. } | Note::Closed { .. }));
            assert_eq!(is_dropped, !is_refused && question.reason != Reason::Operator, "{question:?}");
            schedule.on_new_key(start);
            assert!(!schedule.is_refused());
        }
    }

    #[test]
    fn what_a_stranger_names_holds_up_no_other_question() {
        let start = Instant::now();
        let mut schedule = with_questions(start);
        let reason = Reason::Hint { trust: HintTrust::Unsigned, at_ms: 0, tries: 0 };
        let question = Question { subject: subject("forged"), reason };
        schedule.on_reply(&Reply::<()>::Unusable("400".to_owned()), &question, start, 0.5);
        assert!(matches!(schedule.next(start + Duration::from_secs(1)), Next::Ask(_)));
    }

    #[test]
    fn a_pause_that_the_api_asks_for_is_kept_up_to_an_hour_and_an_operator_keeps_it_too() {
        let start = Instant::now();
        for (asked_for, pause) in [
            (Some(30), Duration::from_secs(30)),
            (Some(3600), LONGEST),
            (Some(u64::MAX), LONGEST),
            (Some(0), PAUSE_MIN),
            (None, PAUSE_MIN),
        ] {
            let mut schedule = with_questions(start);
            let question = ask(&mut schedule, start);
            schedule.on_reply(&Reply::<()>::Busy(asked_for.map(Duration::from_secs)), &question, start, 0.0);
            let mut now = start;
            while now < start + pause {
                match schedule.next(now) {
                    Next::Look => schedule.found(vec![overdue("overdue", true)], Vec::new(), Vec::new()),
                    Next::WaitUntil(until) => {
                        let left = schedule.operator_may_ask(now).unwrap_err();
                        assert_eq!(now + left, start + pause);
                        now = until;
                    }
                    Next::Ask(_) => panic!("asked after {:?} of {pause:?}", now - start),
                }
            }
            assert!(schedule.operator_may_ask(now).is_ok());
        }
    }

    #[test]
    fn failures_in_a_row_make_longer_pauses_which_an_operator_need_not_keep() {
        let start = Instant::now();
        let (mut schedule, mut now, mut pauses) = (schedule(start), start, Vec::new());
        let question = Question { subject: subject("s"), reason: Reason::Operator };
        for _ in 0..10 {
            schedule.on_reply(&Reply::<()>::Silent(String::new()), &question, now, 1.0);
            pauses.push(schedule.pause_until - now);
            now = schedule.pause_until;
        }
        assert_eq!((pauses[0], pauses[9]), (PAUSE_MIN, PAUSE_MAX));
        assert!(pauses.windows(2).all(|pair| pair[0] <= pair[1]), "{pauses:?}");
        assert!(schedule.operator_may_ask(now).is_ok());
        schedule.on_reply(&body(), &question, now, 1.0);
        schedule.on_reply(&Reply::<()>::Unusable(String::new()), &question, now, 1.0);
        assert_eq!(schedule.pause_until - now, PAUSE_MIN, "a success ends the row");
    }

    #[test]
    fn garbage_with_status_200_is_a_failure_in_the_row() {
        let start = Instant::now();
        let (mut schedule, question) = (schedule(start), Question { subject: subject("s"), reason: Reason::Operator });
        let pauses = [1, 2, 3].map(|_| {
            let garbage = Reply::Found(bytes::Bytes::from_static(b"<html>")).read(|body| Scan::read(body, "s"));
            schedule.on_reply(&garbage, &question, start, 1.0);
            schedule.pause_until - start
        });
        assert!(pauses[0] < pauses[1] && pauses[1] < pauses[2], "{pauses:?}");
    }

    #[test]
    fn a_long_list_of_an_operator_takes_turns_with_what_is_overdue() {
        let start = Instant::now();
        let mut schedule = with_questions(start);
        assert!(schedule.may_take_order(start));
        schedule.on_order();
        assert!(!schedule.may_take_order(start));
        ask(&mut schedule, start);
        assert!(schedule.may_take_order(start));
        schedule.on_order();
        schedule.questions.clear();
        assert!(schedule.may_take_order(start), "nothing else waits");
    }

    fn conclusions() -> impl Strategy<Value = Conclusion> {
        prop_oneof![
            prop_oneof![
                Just(Conclusion::Made(Step::Began)),
                Just(Conclusion::Made(Step::Failed)),
                Just(Conclusion::Known),
                Just(Conclusion::Older),
                Just(Conclusion::Pending),
                Just(Conclusion::Unknown),
            ],
            prop_oneof![
                Just(Conclusion::KeyRefused),
                Just(Conclusion::Forbidden),
                Just(Conclusion::Busy),
                Just(Conclusion::Unusable),
                Just(Conclusion::Undecided),
            ],
        ]
    }

    fn replies() -> impl Strategy<Value = u8> {
        0..7_u8
    }

    fn reply(number: u8) -> Reply<()> {
        match number {
            0 => body(),
            1 => Reply::Unknown,
            2 => Reply::Forbidden,
            3 => Reply::Busy(Some(Duration::from_secs(7200))),
            4 => Reply::Busy(None),
            5 => Reply::Unusable(String::new()),
            _ => Reply::Silent(String::new()),
        }
    }

    proptest! {
        #[test]
        fn an_answered_unsigned_hint_is_never_asked_again(conclusion in conclusions(), tries in 0..40_u32) {
            let reason = Reason::Hint { trust: HintTrust::Unsigned, at_ms: 0, tries };
            let question = Question { subject: subject("s"), reason };
            let note = question.note(conclusion, Timestamp::UNIX_EPOCH, INTERVAL, 0.5);
            let is_answered = !matches!(
                conclusion, Conclusion::KeyRefused | Conclusion::Busy | Conclusion::Undecided
            );
            prop_assert_eq!(matches!(note, Some(Note::HintDone { .. })), is_answered);
        }

        #[test]
        fn a_subject_is_asked_about_again_after_longer_and_longer(tries in 0..60_u32, random in 0.0..1.0_f64) {
            let at = |tries| later(Timestamp::UNIX_EPOCH, INTERVAL, tries, random);
            prop_assert!(at(tries) <= at(tries + 1));
            prop_assert!((INTERVAL.as_millis() as i64 * 3 / 4..=LONGEST.as_millis() as i64).contains(&at(tries)));
        }

        /// Whatever the API answers: between two requests the time of the rate passes, a pause is kept, the pauses end,
        /// and what is overdue is asked about before any hint.
        #[test]
        fn requests_are_never_too_close_and_never_end(
            answers in vec((replies(), 0.0..1.0_f64, any::<bool>()), 1..60),
        ) {
            let start = Instant::now();
            let (mut schedule, mut now, mut last) = (schedule(start), start, None::<Instant>);
            let mut waiting = 0;
            for (number, random, is_trusted) in answers {
                let question = loop {
                    match schedule.next(now) {
                        Next::Look => {
                            schedule.found(
                                vec![overdue("overdue", is_trusted)],
                                vec![hint("signed", HintTrust::Signed)],
                                vec![hint("unsigned", HintTrust::Unsigned)],
                            );
                            waiting = 3;
                        }
                        Next::WaitUntil(until) => {
                            prop_assert!(until > now, "time passes");
                            prop_assert!(until <= now + INTERVAL);
                            now = until;
                        }
                        Next::Ask(question) => break question,
                    }
                    if schedule.is_refused() {
                        schedule.on_new_key(now);
                    }
                    prop_assert!(now < start + 100 * LONGEST, "it goes on");
                };
                let expected = ["unsigned", "signed", "overdue"][waiting - 1];
                waiting -= 1;
                prop_assert_eq!(question.subject.id(), expected);
                if let Some(last) = last {
                    prop_assert!(now >= last + Duration::from_secs_f64(1.0 / RATE));
                }
                last = Some(now);
                schedule.on_reply(&reply(number), &question, now, random);
            }
        }
    }
}
