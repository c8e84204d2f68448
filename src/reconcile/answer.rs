//! What Prism's API answers: statuses, and the few fields of a body that are read. Everything else in a body, such as
//! measurements, is skipped unread. Pure.

use std::time::Duration;

use bytes::Bytes;
use hyper::header::{HeaderMap, RETRY_AFTER};
use hyper::{Response, StatusCode};
use jiff::Timestamp;
use serde::Deserialize;
use serde::de::DeserializeOwned;

/// Maximum length of a field. Prism's ids have 36 characters; the partner chooses the length of a `userToken`.
const FIELD_BYTES_MAX: usize = 4096;

/// What a request brought. Not printable, because a body has a `userToken` and health data.
pub(super) enum Reply<T> {
    /// 200 with this.
    Found(T),
    /// 404: the API knows no such scan or prediction.
    Unknown,
    /// 401: the API does not accept the key.
    KeyRefused,
    /// 403: the key is not for this scan or prediction, or for nothing at all.
    Forbidden,
    /// 429 or 503: ask later, after this time if the API says so.
    Busy(Option<Duration>),
    /// Another status, or a body that cannot be read.
    Unusable(String),
    /// No answer at all.
    Silent(String),
}

impl Reply<Bytes> {
    pub(super) fn of(response: Response<Bytes>, now: Timestamp) -> Self {
        match response.status() {
            StatusCode::OK => Self::Found(response.into_body()),
            StatusCode::NOT_FOUND => Self::Unknown,
            StatusCode::UNAUTHORIZED => Self::KeyRefused,
            StatusCode::FORBIDDEN => Self::Forbidden,
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => {
                Self::Busy(retry_after(response.headers(), now))
            }
            status => Self::Unusable(format!("Prism's API answered {}", status.as_u16())),
        }
    }

    /// Reads the body. One that cannot be read makes the reply unusable.
    pub(super) fn read<T>(self, read: impl FnOnce(&[u8]) -> Result<T, String>) -> Reply<T> {
        match self {
            Self::Found(body) => read(&body).map_or_else(Reply::Unusable, Reply::Found),
            Self::Unknown => Reply::Unknown,
            Self::KeyRefused => Reply::KeyRefused,
            Self::Forbidden => Reply::Forbidden,
            Self::Busy(pause) => Reply::Busy(pause),
            Self::Unusable(why) => Reply::Unusable(why),
            Self::Silent(why) => Reply::Silent(why),
        }
    }
}

/// `Retry-After`: seconds, or a date (RFC 9110, section 10.2.3).
fn retry_after(headers: &HeaderMap, now: Timestamp) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    if let Ok(seconds) = text.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let until = jiff::fmt::rfc2822::parse(text).ok()?.timestamp();
    // A date that has passed asks for no pause.
    Some(until.duration_since(now).try_into().unwrap_or_default())
}

/// A scan, as far as it is read.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Scan {
    id: String,
    pub status: String,
    pub user_id: String,
    pub user_token: String,
    #[serde(default)]
    pub updated_at: Option<String>,
}

/// A body shape prediction, as far as it is read.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Prediction {
    id: String,
    pub status: String,
    pub scan_id: String,
    #[serde(default)]
    pub updated_at: Option<String>,
}

impl Scan {
    /// Reads the scan with this id. The error quotes nothing of the body.
    pub(super) fn read(body: &[u8], id: &str) -> Result<Self, String> {
        let scan: Self = read(body, "a scan")?;
        check(&scan.id, id, &[&scan.status, &scan.user_id, &scan.user_token])?;
        Ok(scan)
    }
}

impl Prediction {
    /// Reads the prediction with this id. The error quotes nothing of the body.
    pub(super) fn read(body: &[u8], id: &str) -> Result<Self, String> {
        let prediction: Self = read(body, "a prediction")?;
        check(&prediction.id, id, &[&prediction.status, &prediction.scan_id])?;
        Ok(prediction)
    }
}

fn read<T: DeserializeOwned>(body: &[u8], what: &str) -> Result<T, String> {
    // The library's error may quote a value.
    serde_json::from_slice(body).map_err(|error| {
        let (line, column) = (error.line(), error.column());
        format!("the answer of Prism's API is not {what} (line {line}, column {column})")
    })
}

fn check(answered: &str, asked: &str, fields: &[&String]) -> Result<(), String> {
    if answered != asked {
        return Err("Prism's API answered with another id than the one that was asked for".to_owned());
    }
    match fields.iter().any(|field| field.is_empty() || field.len() > FIELD_BYTES_MAX) {
        true => Err("the answer of Prism's API has an empty or a very long field".to_owned()),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SCAN: &str = r#"{"id":"s1","status":"READY","userId":"u1","userToken":"token-1","weight":{"value":81.5},
        "measurements":{"waistFit":84.2},"bodyfat":null,"updatedAt":"2026-11-29T06:00:00.000Z"}"#;

    #[test]
    fn a_scan_is_read_without_the_health_data() {
        let scan = Scan::read(SCAN.as_bytes(), "s1").unwrap();
        assert_eq!((&*scan.status, &*scan.user_id, &*scan.user_token), ("READY", "u1", "token-1"));
        assert_eq!(scan.updated_at.as_deref(), Some("2026-11-29T06:00:00.000Z"));
        let body = r#"{"id":"p1","status":"FAILED","scanId":"s1","targetWeight":70,"updatedAt":null}"#;
        let prediction = Prediction::read(body.as_bytes(), "p1").unwrap();
        assert_eq!((&*prediction.status, &*prediction.scan_id, prediction.updated_at), ("FAILED", "s1", None));
    }

    #[test]
    fn garbage_is_an_error_that_quotes_nothing() {
        let long = "x".repeat(FIELD_BYTES_MAX + 1);
        for (body, asked) in [
            (SCAN.to_owned(), "s2"),
            (SCAN.replace("\"token-1\"", "7"), "s1"),
            (SCAN.replace("\"token-1\"", "null"), "s1"),
            (SCAN.replace("\"token-1\"", "\"\""), "s1"),
            (SCAN.replace("token-1", &long), "s1"),
            (SCAN.replace("\"userToken\"", "\"token\""), "s1"),
            (SCAN.replace("\"status\":\"READY\"", "\"status\":[\"READY\"]"), "s1"),
            (SCAN[..SCAN.len() - 1].to_owned(), "s1"),
            ("[]".to_owned(), "s1"),
            ("<html>token-1 81.5</html>".to_owned(), "s1"),
            (String::new(), "s1"),
        ] {
            let error = Scan::read(body.as_bytes(), asked).err().unwrap_or_else(|| panic!("read: {body}"));
            assert!(!["token", "81.5", "READY", "xxx"].iter().any(|value| error.contains(value)), "{error}");
        }
        assert!(Scan::read(&[0xff, 0xfe], "s1").is_err());
        assert!(Prediction::read(SCAN.as_bytes(), "s1").is_err());
    }

    #[test]
    fn each_status_has_its_meaning() {
        let now: Timestamp = "2026-11-29T06:00:00Z".parse().unwrap();
        let reply = |status: u16, retry_after: Option<&str>| {
            let mut response = Response::builder().status(status);
            if let Some(value) = retry_after {
                response = response.header(RETRY_AFTER, value);
            }
            Reply::of(response.body(Bytes::from_static(b"{}")).unwrap(), now)
        };
        assert!(matches!(reply(200, None), Reply::Found(_)));
        assert!(matches!(reply(404, None).read(|body| Scan::read(body, "s1")), Reply::Unknown));
        assert!(matches!(reply(404, None), Reply::Unknown));
        assert!(matches!(reply(401, None), Reply::KeyRefused));
        assert!(matches!(reply(403, None), Reply::Forbidden));
        for (value, seconds) in [
            (None, None),
            (Some("120"), Some(120)),
            (Some("Sun, 29 Nov 2026 06:02:00 GMT"), Some(120)),
            (Some("Sun, 29 Nov 2026 05:00:00 GMT"), Some(0)),
            (Some("soon"), None),
            (Some("-1"), None),
        ] {
            for status in [429, 503] {
                match reply(status, value) {
                    Reply::Busy(pause) => assert_eq!(pause.map(|pause| pause.as_secs()), seconds, "{value:?}"),
                    _ => panic!("{status} is busy"),
                }
            }
        }
        for status in [201, 204, 301, 400, 406, 500, 502] {
            assert!(matches!(reply(status, None), Reply::Unusable(_)), "{status}");
        }
    }
}
