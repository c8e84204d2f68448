//! What an answer of Prism's API means for a scan or a prediction: which event is missing, and the body of that event.
//! Pure.

use bytes::Bytes;
use jiff::{SignedDuration, Timestamp};
use serde::Serialize;

use super::answer::Scan;
use crate::subject::{Kind, Progress, State, Step};

/// How much older than the first sign of a subject the last change of its status may be: clocks differ, and a webhook
/// comes after the change that it reports.
const OLDER_AT_MOST: SignedDuration = SignedDuration::from_mins(5);

/// What the status of a subject means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Meaning {
    /// No webhook told this step.
    Missing(Step),
    /// A webhook, or an earlier answer, told this step.
    Known,
    /// The subject has not ended.
    Pending,
    /// The status is one that is not documented. The subject has not ended, as far as it is known.
    UnknownStatus,
    /// The status is older than what the question is about, so it says nothing about it.
    Older,
    /// The answer does not say how old the status is, and the question needs to know.
    Undated,
}

/// `state`: what the relay knows of the subject. `not_before`: the time of an unsigned sign of the subject, if that is
/// all there is. Then the status must have changed since: a stranger who names an old scan must not get its end
/// published again.
pub(super) fn meaning(
    status: &str,
    updated_at: Option<&str>,
    state: Option<&State>,
    not_before: Option<Timestamp>,
) -> Meaning {
    let step = match status {
        "READY" => Step::Succeeded,
        "FAILED" => Step::Failed,
        "PROCESSING" => Step::Began,
        "CREATED" => return Meaning::Pending,
        _ => return Meaning::UnknownStatus,
    };
    if state.is_some_and(|state| state.knows(step)) {
        return if step.is_end() { Meaning::Known } else { Meaning::Pending };
    }
    let updated_at = updated_at.and_then(|text| text.parse::<Timestamp>().ok());
    // The webhook of the beginning may come after that of the end, which then is no news.
    let told_end = state.and_then(|state| state.ended).filter(|ended| ended.step == step);
    let told_at = told_end.and_then(|ended| Timestamp::from_millisecond(ended.told.at_ms).ok());
    if told_end.is_some_and(|ended| ended.told.is_trusted)
        && updated_at.zip(told_at).is_some_and(|(updated_at, told_at)| updated_at <= told_at)
    {
        return Meaning::Older;
    }
    let Some(not_before) = not_before else { return Meaning::Missing(step) };
    match updated_at {
        None => Meaning::Undated,
        Some(at) if at < not_before.saturating_sub(OLDER_AT_MOST).unwrap_or(not_before) => Meaning::Older,
        Some(_) => Meaning::Missing(step),
    }
}

/// The documented body of an event. The order of the fields is that of Prism.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Body<'a> {
    event_type: &'a str,
    payload: Payload<'a>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Payload<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    body_shape_prediction_id: Option<&'a str>,
    scan_id: &'a str,
    user_id: &'a str,
    user_token: &'a str,
    state: &'a str,
}

/// The body of the missing event. `scan`: the scan itself, or that of the prediction. `status`: the subject's own.
pub(super) fn body(progress: &Progress, status: &str, scan: &Scan, scan_id: &str) -> Bytes {
    let subject = &progress.subject;
    let body_shape_prediction_id = match subject.kind() {
        Kind::Prediction => Some(subject.id()),
        Kind::Scan => None,
    };
    let (user_id, user_token) = (&*scan.user_id, &*scan.user_token);
    let payload = Payload { body_shape_prediction_id, scan_id, user_id, user_token, state: status };
    let body = serde_json::to_vec(&Body { event_type: progress.event_type(), payload });
    Bytes::from(body.expect("strings in a struct are always JSON"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{Envelope, Source};
    use crate::subject::{Ended, Subject, Told};

    const TOLD: Told = Told { at_ms: 0, source: Source::Webhook, is_trusted: true };

    fn began() -> State {
        State { began: Some(TOLD), is_open: true, ..State::default() }
    }

    fn ended(step: Step) -> State {
        State { began: Some(TOLD), ended: Some(Ended { step, told: TOLD }), ..State::default() }
    }

    #[test]
    fn a_status_that_says_more_than_the_webhooks_did_is_a_missing_event() {
        let (open, succeeded, failed) = (began(), ended(Step::Succeeded), ended(Step::Failed));
        for (status, state, expected) in [
            ("READY", None, Meaning::Missing(Step::Succeeded)),
            ("READY", Some(&open), Meaning::Missing(Step::Succeeded)),
            ("READY", Some(&succeeded), Meaning::Known),
            ("READY", Some(&failed), Meaning::Missing(Step::Succeeded)),
            ("FAILED", Some(&open), Meaning::Missing(Step::Failed)),
            ("FAILED", Some(&failed), Meaning::Known),
            ("PROCESSING", None, Meaning::Missing(Step::Began)),
            ("PROCESSING", Some(&open), Meaning::Pending),
            ("CREATED", None, Meaning::Pending),
            ("CREATED", Some(&open), Meaning::Pending),
            ("ARCHIVED", Some(&open), Meaning::UnknownStatus),
            ("ready", None, Meaning::UnknownStatus),
        ] {
            assert_eq!(meaning(status, None, state, None), expected, "{status} {state:?}");
        }
    }

    #[test]
    fn an_old_end_is_not_published_because_anyone_named_the_scan() {
        let named_at: Timestamp = "2026-11-29T06:00:00Z".parse().unwrap();
        for (updated_at, expected) in [
            (Some("2026-11-29T06:00:01Z"), Meaning::Missing(Step::Succeeded)),
            (Some("2026-11-29T05:55:00.000Z"), Meaning::Missing(Step::Succeeded)),
            (Some("2026-11-29T05:54:59.999Z"), Meaning::Older),
            (Some("2020-01-01T00:00:00+02:00"), Meaning::Older),
            (Some("yesterday"), Meaning::Undated),
            (Some(""), Meaning::Undated),
            (None, Meaning::Undated),
        ] {
            assert_eq!(meaning("READY", updated_at, None, Some(named_at)), expected, "{updated_at:?}");
            assert_eq!(meaning("READY", updated_at, None, None), Meaning::Missing(Step::Succeeded), "a signed sign");
        }
    }

    #[test]
    fn an_end_that_a_webhook_told_is_not_missing_because_the_beginning_came_after_it() {
        let reopened = State { is_open: true, ..ended(Step::Succeeded) };
        for (status, updated_at, expected) in [
            ("READY", Some("1970-01-01T00:00:00Z"), Meaning::Older),
            ("READY", Some("1970-01-01T00:00:01Z"), Meaning::Missing(Step::Succeeded)),
            ("READY", None, Meaning::Missing(Step::Succeeded)),
            ("FAILED", Some("1970-01-01T00:00:00Z"), Meaning::Missing(Step::Failed)),
        ] {
            assert_eq!(meaning(status, updated_at, Some(&reopened), None), expected, "{status} {updated_at:?}");
        }
    }

    #[test]
    fn the_body_is_the_documented_one() {
        let scan = r#"{"id":"s1","status":"READY","userId":"u1","userToken":"a \"quoted\" token","weight":81.5}"#;
        let scan = Scan::read(scan.as_bytes(), "s1").unwrap();
        let made = |kind, id: &str, step, status: &str| {
            let progress = Progress { subject: Subject::new(kind, id).unwrap(), step };
            let body = body(&progress, status, &scan, "s1");
            let envelope = Envelope::parse(&body).unwrap();
            assert_eq!(Progress::of(&envelope), Some(progress), "it tells what it was made for");
            String::from_utf8(body.to_vec()).unwrap()
        };
        let rest = r#""scanId":"s1","userId":"u1","userToken":"a \"quoted\" token","state""#;
        let scan = format!(r#"{{"eventType":"scan.processing.succeeded","payload":{{{rest}:"READY"}}}}"#);
        assert_eq!(made(Kind::Scan, "s1", Step::Succeeded, "READY"), scan);
        let event = r#"{"eventType":"body_shape_prediction.processing.failed","#;
        let prediction = format!(r#"{event}"payload":{{"bodyShapePredictionId":"p1",{rest}:"FAILED"}}}}"#);
        assert_eq!(made(Kind::Prediction, "p1", Step::Failed, "FAILED"), prediction);
    }
}
