//! `verify`: explains how the relay answers a captured request. It uses the relay's own verifier and configuration, and
//! tries what usually happens to a body or a header on the way.

use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::Timestamp;
use serde_json::Value;

use super::failure::Failure;
use super::output::Printed;
use crate::config::Config;
use crate::event::{Envelope, NotAnEnvelope};
use crate::signature::{Rejection, SIGNATURE_HEADER, Signed, TIMESTAMP_HEADER, Verifier};
use crate::text::{chain, clean, span};

/// More digits than this are milliseconds since 1970, not seconds.
const SECONDS_DIGITS_MAX: usize = 11;

#[derive(clap::Args)]
pub(super) struct Options {
    /// Headers of the request: lines such as `prism-timestamp: 2026-11-24T12:00:00Z`, or a JSON object
    #[arg(long, value_name = "FILE")]
    headers: PathBuf,
    /// Body of the request, byte for byte
    #[arg(long, value_name = "FILE")]
    body: PathBuf,
    /// When the request arrived, such as 2026-11-24T12:00:00Z [default: now]
    #[arg(long, value_name = "TIME")]
    at: Option<Timestamp>,
}

pub(super) fn run(config: &Config, options: &Options) -> Result<(), Failure> {
    let read = |path: &Path| {
        std::fs::read(path).map_err(|error| Failure::Usage(format!("cannot read {}: {error}", path.display())))
    };
    let headers = Headers::parse(&read(&options.headers)?);
    let body = read(&options.body)?;
    let now = options.at.unwrap_or_else(Timestamp::now);
    let verdict = judge(config, &headers, &body, now);
    let mut printed = Printed::default();
    verdict.lines.iter().for_each(|line| printed.line(clean(line)));
    printed.out()?;
    if verdict.accepted { Ok(()) } else { Err(Failure::Reported) }
}

/// Whether the relay accepts the request, and why.
struct Verdict {
    accepted: bool,
    lines: Vec<String>,
}

fn judge(config: &Config, headers: &Headers, body: &[u8], now: Timestamp) -> Verdict {
    let refused = |code: &str, mut lines: Vec<String>| {
        lines.push(format!("the relay answers {code}"));
        Verdict { accepted: false, lines }
    };
    if body.len() > config.http.body_bytes_max {
        let limit = config.http.body_bytes_max;
        let line = format!("the body has {} bytes; http.body_bytes_max allows {limit}", body.len());
        return refused("413 body-too-large", vec![line]);
    }
    let signature = &config.signature;
    let verifier = Verifier::new(&signature.secrets, signature.required, signature.tolerance);
    let (timestamp, value) = (headers.get(TIMESTAMP_HEADER), headers.get(SIGNATURE_HEADER));
    match verifier.verify(timestamp.map(str::as_bytes), value.map(str::as_bytes), body, now) {
        Ok(accepted) => accept(config, accepted.signed(), body, now),
        Err(Rejection::Missing(name)) => refused("401 missing-signature", vec![headers.without(name)]),
        Err(Rejection::InvalidTimestamp) => {
            refused("401 invalid-timestamp", vec![timestamp_mistake(timestamp.unwrap_or_default())])
        }
        Err(Rejection::StaleTimestamp { age, tolerance }) => {
            let captured = Captured { secrets: Verifier::new(&signature.secrets, true, signature.tolerance), headers };
            refused("401 stale-timestamp", vec![captured.signer(body), stale(age, tolerance, now)])
        }
        Err(Rejection::InvalidSignature) => {
            let captured = Captured { secrets: Verifier::new(&signature.secrets, true, signature.tolerance), headers };
            refused("401 invalid-signature", captured.mistakes(body))
        }
    }
}

fn accept(config: &Config, signed: Option<Signed>, body: &[u8], now: Timestamp) -> Verdict {
    let count = config.signature.secrets.len();
    let mut lines = vec![match signed {
        Some(Signed { secret, valid_until }) => format!(
            "the signature matches secret {} of {count}; it is accepted for {} more",
            secret + 1,
            span(valid_until.duration_since(now).unsigned_abs())
        ),
        None if count == 0 => {
            "signatures are not checked: signature.required is false, and no secret is configured".to_owned()
        }
        None => "the request is not signed, which signature.required = false allows".to_owned(),
    }];
    let parsed = Envelope::parse(body);
    lines.push(match &parsed {
        Ok(envelope) => format!(
            "it is an event of type {}, subject {}",
            envelope.event_type,
            envelope.subject().as_deref().unwrap_or("none")
        ),
        Err(error) => format!("it is not an event: {}", chain(error)),
    });
    let code = match parsed {
        Ok(_) => None,
        // A signed body is accepted whatever it says.
        Err(_) if signed.is_some() => None,
        Err(NotAnEnvelope::Encoding) => Some("400 invalid-encoding"),
        Err(NotAnEnvelope::Json(_)) => Some("400 invalid-json"),
        Err(NotAnEnvelope::EventType) => Some("422 not-an-envelope"),
    };
    lines.push(format!("the relay answers {}", code.unwrap_or("200")));
    Verdict { accepted: code.is_none(), lines }
}

fn stale(age: i64, tolerance: u64, now: Timestamp) -> String {
    let age_words = span(Duration::from_secs(age.unsigned_abs()));
    let when = if age < 0 { format!("{age_words} in the future") } else { format!("{age_words} ago") };
    format!(
        "it was signed {when}, seen from {now:.0}; signature.tolerance allows {} either way. For a request that was \
         refused when it arrived, compare the clocks of the relay and the sender; for one captured earlier, add --at \
         with the time of its arrival",
        span(Duration::from_secs(tolerance))
    )
}

/// Why the time cannot be read, with what it probably is.
fn timestamp_mistake(text: &str) -> String {
    let needed = "the relay needs ISO 8601 with an offset, such as 2025-10-01T21:26:17Z";
    let is_number = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let guess = if is_number && text.len() <= SECONDS_DIGITS_MAX {
        "seconds since 1970"
    } else if is_number {
        "milliseconds since 1970"
    } else if jiff::fmt::rfc2822::parse(text).is_ok() {
        "a date of HTTP or mail (RFC 2822)"
    } else if text.parse::<jiff::civil::DateTime>().is_ok() {
        "a time without an offset"
    } else if text.trim().parse::<Timestamp>().is_ok() {
        "a time with blanks around it"
    } else {
        "not a time"
    };
    format!("the header {TIMESTAMP_HEADER} is {guess}: {text:?}; {needed}")
}

/// A request whose signature is to be explained.
struct Captured<'a> {
    secrets: Verifier,
    headers: &'a Headers,
}

impl Captured<'_> {
    /// The position of the secret that made this signature, from 0, whatever the time of signing.
    fn secret(&self, timestamp: &str, signature: &str, body: &[u8]) -> Option<usize> {
        let signed_at = timestamp.parse().ok()?;
        let verified = self.secrets.verify(Some(timestamp.as_bytes()), Some(signature.as_bytes()), body, signed_at);
        Some(verified.ok()?.signed()?.secret)
    }

    fn matching(&self, secret: usize) -> String {
        format!("secret {} of {}", secret + 1, self.secrets.secrets())
    }

    fn signer(&self, body: &[u8]) -> String {
        let secret = self.secret(self.header(TIMESTAMP_HEADER), self.header(SIGNATURE_HEADER), body);
        secret.map_or_else(String::new, |secret| format!("the signature matches {}", self.matching(secret)))
    }

    fn header(&self, name: &str) -> &str {
        self.headers.get(name).unwrap_or_default()
    }

    /// Looks for the change that makes a signature wrong.
    fn mistakes(&self, body: &[u8]) -> Vec<String> {
        let (timestamp, signature) = (self.header(TIMESTAMP_HEADER), self.header(SIGNATURE_HEADER));
        for (what, changed) in signatures(signature) {
            if let Some(secret) = self.secret(timestamp, &changed, body) {
                let needed = "the relay needs 64 lower-case hex digits and nothing else";
                return vec![format!("the signature matches {}, but it {what}; {needed}", self.matching(secret))];
            }
        }
        for (what, changed) in bodies(body) {
            if let Some(secret) = self.secret(timestamp, signature, &changed) {
                return vec![format!(
                    "the body was changed after it was signed: {what}. With the original body the signature matches \
                     {}. The relay needs the bytes that Prism sent: look for what changes them on the way, or in the \
                     capture",
                    self.matching(secret)
                )];
            }
        }
        let mut lines = vec![match self.secrets.secrets() {
            0 => "no secret is configured".to_owned(),
            1 => "the only configured secret did not sign this timestamp and body".to_owned(),
            count => format!("none of the {count} configured secrets signed this timestamp and body"),
        }];
        if !(signature.len() == 64 && signature.bytes().all(|byte| byte.is_ascii_hexdigit())) {
            lines.push(format!("the header {SIGNATURE_HEADER} is not 64 hex digits, so Prism did not make it"));
        }
        if body.is_empty() {
            lines.push("the body is empty".to_owned());
        }
        lines.push(
            "compare the secret with the one in Prism's settings (`prism-relay check` prints their lengths), and the \
             body with what Prism sent; a wrong clock does not lead to this answer"
                .to_owned(),
        );
        lines
    }
}

/// What senders and proxies do to a signature, and the value before that.
fn signatures(value: &str) -> [(&'static str, String); 3] {
    let bare = value.trim();
    let bare = bare.split_once('=').map_or(bare, |(_, digits)| digits);
    [
        ("has blanks around it", value.trim().to_owned()),
        ("is in upper case", value.to_ascii_lowercase()),
        ("has a prefix", bare.to_ascii_lowercase()),
    ]
}

/// What tools do to a body, and the bytes before that.
fn bodies(body: &[u8]) -> Vec<(&'static str, Vec<u8>)> {
    let with = |end: &[u8]| [body, end].concat();
    let without_mark = body.strip_prefix(b"\xef\xbb\xbf");
    let trimmed = body.trim_ascii_end();
    let mut before = vec![
        ("a line end was added at its end", trimmed.to_vec()),
        ("the line end at its end was removed", with(b"\n")),
        ("the line end at its end was removed", with(b"\r\n")),
        ("its line ends were changed to CR LF", replaced(body, b"\r\n", b"\n")),
        ("its line ends were changed to LF", replaced(body, b"\n", b"\r\n")),
        ("it was formatted (pretty-printed)", compact(body)),
    ];
    before.extend(without_mark.map(|body| ("a byte order mark was added", body.to_vec())));
    before.push(("its byte order mark was removed", [b"\xef\xbb\xbf", body].concat()));
    before.push(("the blanks behind its commas and colons were removed", spaced(&compact(body))));
    before
}

fn replaced(body: &[u8], old: &[u8], new: &[u8]) -> Vec<u8> {
    let mut parts = Vec::with_capacity(body.len());
    let mut rest = body;
    while let Some(at) = rest.windows(old.len()).position(|window| window == old) {
        parts.extend_from_slice(&rest[..at]);
        parts.extend_from_slice(new);
        rest = &rest[at + old.len()..];
    }
    parts.extend_from_slice(rest);
    parts
}

/// JSON without blanks between its parts. Everything else stays as it is, which a parser and a writer would not
/// guarantee.
fn compact(json: &[u8]) -> Vec<u8> {
    outside_strings(json, |byte, out| {
        if !byte.is_ascii_whitespace() {
            out.push(byte);
        }
    })
}

/// Compact JSON with a blank behind each comma and colon, as Python writes it.
fn spaced(json: &[u8]) -> Vec<u8> {
    outside_strings(json, |byte, out| {
        out.push(byte);
        if matches!(byte, b',' | b':') {
            out.push(b' ');
        }
    })
}

/// Copies JSON, with `write` for each byte that is not in a string.
fn outside_strings(json: &[u8], write: impl Fn(u8, &mut Vec<u8>)) -> Vec<u8> {
    let (mut out, mut in_string, mut escaped) = (Vec::with_capacity(json.len()), false, false);
    for &byte in json {
        if in_string {
            out.push(byte);
        } else {
            write(byte, &mut out);
        }
        in_string = if byte == b'"' && !escaped { !in_string } else { in_string };
        escaped = in_string && byte == b'\\' && !escaped;
    }
    out
}

/// Names in lower case, and values.
struct Headers(Vec<(String, String)>);

impl Headers {
    /// Reads lines as HTTP, curl and most logs write them, or a JSON object. Lines without a colon are passed over.
    fn parse(text: &[u8]) -> Self {
        let text = String::from_utf8_lossy(text);
        if let Ok(Value::Object(members)) = serde_json::from_str(&text) {
            let value = |value: Value| match value {
                Value::String(text) => text,
                Value::Array(mut values) if !values.is_empty() => {
                    values.swap_remove(0).as_str().unwrap_or_default().to_owned()
                }
                other => other.to_string(),
            };
            return Self(members.into_iter().map(|(name, json)| (name.to_ascii_lowercase(), value(json))).collect());
        }
        let line = |line: &str| {
            let line = line.strip_prefix("> ").unwrap_or(line);
            let (name, value) = line.split_once(':')?;
            // A server trims blanks and tabs, as RFC 9110 says.
            Some((name.trim().to_ascii_lowercase(), value.trim_matches([' ', '\t', '\r']).to_owned()))
        };
        Self(text.lines().filter_map(line).collect())
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(given, _)| given == name).map(|(_, value)| value.as_str())
    }

    /// Says that a header is missing, with the names of those that are there: a proxy may rename them.
    fn without(&self, missing: &str) -> String {
        let names: Vec<_> = self.0.iter().map(|(name, _)| name.as_str()).collect();
        let there = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
        format!(
            "the header {missing} is missing; the file has: {there}. Either the sender does not sign, or a proxy drops \
             the header"
        )
    }
}

#[cfg(test)]
mod tests {
    use jiff::SignedDuration;

    use super::*;
    use crate::config::Purpose;
    use crate::secret::Secret;
    use crate::signature::sign;

    const SECRETS: [&str; 2] = ["the-first-secret-of-two", "the-second-secret-of-two"];
    const SIGNED_AT: &str = "2026-11-24T12:00:00Z";
    const BODY: &str = r#"{"eventType":"scan.a","payload":{"scanId":"1, 2: \" {","n":[1,2]}}"#;

    fn config(variables: &[(&str, &str)]) -> Config {
        let both = SECRETS.join(",");
        let secrets = [("PRISM_RELAY__SIGNATURE__SECRETS", both.as_str())];
        let all = secrets.iter().chain(variables).map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        Config::load(None, all, Purpose::Client).unwrap()
    }

    fn headers(timestamp: &str, signature: &str) -> Headers {
        Headers::parse(
            format!(
                "POST /webhooks/prism HTTP/1.1\r\nPrism-Timestamp: {timestamp}\r\n\
                                prism-signature: {signature}\r\n"
            )
            .as_bytes(),
        )
    }

    fn at(seconds: i64) -> Timestamp {
        SIGNED_AT.parse::<Timestamp>().unwrap() + SignedDuration::from_secs(seconds)
    }

    /// The last line of the verdict, and all of them.
    fn verdict(
        headers: &Headers,
        body: impl AsRef<[u8]>,
        seconds: i64,
        variables: &[(&str, &str)],
    ) -> (String, String) {
        let verdict = judge(&config(variables), headers, body.as_ref(), at(seconds));
        let last = verdict.lines.last().unwrap().clone();
        assert_eq!(verdict.accepted, last == "the relay answers 200", "{:?}", verdict.lines);
        (last, verdict.lines.join("\n"))
    }

    fn signature(secret: &str, body: &str) -> String {
        sign(&Secret::new(secret), SIGNED_AT, body.as_bytes())
    }

    #[test]
    fn a_good_request_names_its_secret() {
        for (number, secret) in (1..).zip(SECRETS) {
            let (last, all) = verdict(&headers(SIGNED_AT, &signature(secret, BODY)), BODY, 60, &[]);
            assert_eq!(last, "the relay answers 200");
            assert!(
                all.starts_with(&format!("the signature matches secret {number} of 2; it is accepted for 4 min more"))
            );
            assert!(all.contains("it is an event of type scan.a, subject scan:1, 2"), "{all}");
        }
        let (last, all) = verdict(&headers(SIGNED_AT, &signature(SECRETS[0], "no event")), "no event", 0, &[]);
        assert!(last == "the relay answers 200" && all.contains("it is not an event: the body is not JSON"), "{all}");
    }

    #[test]
    fn a_stale_request_says_by_how_much_and_that_the_secret_is_right() {
        let signed = headers(SIGNED_AT, &signature(SECRETS[1], BODY));
        for (seconds, expected) in [(3 * 3600, "signed 3 h ago"), (-400, "signed 6 min 40 s in the future")] {
            let (last, all) = verdict(&signed, BODY, seconds, &[]);
            assert_eq!(last, "the relay answers 401 stale-timestamp");
            assert!(all.starts_with("the signature matches secret 2 of 2\n") && all.contains(expected), "{all}");
            assert!(all.contains("allows 5 min either way"), "{all}");
        }
    }

    #[test]
    fn a_missing_header_is_named() {
        let only = |text: &str| Headers::parse(text.as_bytes());
        for (given, missing) in [
            ("prism-timestamp: 2026-11-24T12:00:00Z", "prism-signature"),
            ("prism-signature: 00", "prism-timestamp"),
            ("x-prism-signature: 00", "prism-signature"),
        ] {
            let (last, all) = verdict(&only(given), BODY, 0, &[]);
            assert_eq!(last, "the relay answers 401 missing-signature");
            let name = given.split(':').next().unwrap();
            assert!(all.contains(&format!("the header {missing} is missing; the file has: {name}")), "{all}");
        }
        let unsigned = [("PRISM_RELAY__SIGNATURE__REQUIRED", "false")];
        let (last, all) = verdict(&only(""), BODY, 0, &unsigned);
        assert!(last == "the relay answers 200" && all.starts_with("the request is not signed, which"), "{all}");
        assert_eq!(verdict(&only(""), "{}", 0, &unsigned).0, "the relay answers 422 not-an-envelope");
        assert_eq!(verdict(&only(""), "{", 0, &unsigned).0, "the relay answers 400 invalid-json");
        assert_eq!(verdict(&only(""), b"\xff", 0, &unsigned).0, "the relay answers 400 invalid-encoding");
        let (last, _) = verdict(&only(""), "x".repeat(2000), 0, &[("PRISM_RELAY__HTTP__BODY_BYTES_MAX", "1KiB")]);
        assert_eq!(last, "the relay answers 413 body-too-large");
    }

    #[test]
    fn a_timestamp_of_another_format_is_recognised() {
        for (timestamp, expected) in [
            ("1764000000", "seconds since 1970"),
            ("1764000000123", "milliseconds since 1970"),
            ("Tue, 24 Nov 2026 12:00:00 GMT", "a date of HTTP"),
            ("2026-11-24T12:00:00", "a time without an offset"),
            ("2026-11-24 12:00:00", "a time without an offset"),
            ("yesterday", "not a time"),
        ] {
            let (last, all) = verdict(&headers(timestamp, "00"), BODY, 0, &[]);
            assert_eq!(last, "the relay answers 401 invalid-timestamp");
            assert!(all.contains(&format!("the header prism-timestamp is {expected}")), "{timestamp}: {all}");
        }
    }

    #[test]
    fn a_changed_body_is_recognised() {
        let pretty = "{\n  \"eventType\": \"scan.a\",\n  \"payload\": {\n    \"scanId\": \"1, 2: \\\" {\",\n    \
                      \"n\": [1, 2]\n  }\n}";
        let spaced = r#"{"eventType": "scan.a", "payload": {"scanId": "1, 2: \" {", "n": [1, 2]}}"#;
        let lines = "{\"a\":1,\n\"b\":2}";
        for (original, captured, expected) in [
            (BODY, format!("{BODY}\n"), "a line end was added at its end"),
            (BODY, format!("{BODY}\r\n"), "a line end was added at its end"),
            (BODY, pretty.to_owned(), "it was formatted (pretty-printed)"),
            (BODY, format!("{pretty}\n"), "it was formatted (pretty-printed)"),
            (BODY, format!("\u{feff}{BODY}"), "a byte order mark was added"),
            (&format!("{BODY}\n"), BODY.to_owned(), "the line end at its end was removed"),
            (lines, lines.replace('\n', "\r\n"), "its line ends were changed to CR LF"),
            (&lines.replace('\n', "\r\n"), lines.to_owned(), "its line ends were changed to LF"),
            (spaced, BODY.to_owned(), "the blanks behind its commas and colons were removed"),
        ] {
            let (last, all) = verdict(&headers(SIGNED_AT, &signature(SECRETS[1], original)), &captured, 3600, &[]);
            assert_eq!(last, "the relay answers 401 invalid-signature");
            assert!(all.contains(&format!("changed after it was signed: {expected}")), "{captured:?}: {all}");
            assert!(all.contains("matches secret 2 of 2"), "{all}");
        }
    }

    #[test]
    fn a_changed_signature_is_recognised_and_a_wrong_secret_is_said() {
        let good = signature(SECRETS[0], BODY);
        for (changed, expected) in
            [(good.to_uppercase(), "it is in upper case"), (format!("sha256={good}"), "it has a prefix")]
        {
            let (last, all) = verdict(&headers(SIGNED_AT, &changed), BODY, 0, &[]);
            assert_eq!(last, "the relay answers 401 invalid-signature");
            assert!(all.contains(&format!("the signature matches secret 1 of 2, but {expected}")), "{all}");
        }
        let wrong = signature("another-secret-of-nobody", BODY);
        let (_, all) = verdict(&headers(SIGNED_AT, &wrong), BODY, 0, &[]);
        assert!(all.contains("none of the 2 configured secrets signed") && !all.contains("64 hex digits"), "{all}");
        let (_, all) = verdict(&headers(SIGNED_AT, "v1,abc"), "", 0, &[]);
        assert!(all.contains("is not 64 hex digits") && all.contains("the body is empty"), "{all}");
        assert!(SECRETS.iter().all(|secret| !all.contains(secret)));
    }

    #[test]
    fn headers_are_read_from_lines_of_curl_and_from_json() {
        for text in [
            "> Prism-Signature: 00\n> other: a:b\n",
            r#"{"Prism-Signature": "00", "other": ["a:b", "c"]}"#,
            "prism-signature:00\nother:\ta:b \n",
        ] {
            let headers = Headers::parse(text.as_bytes());
            assert_eq!((headers.get("prism-signature"), headers.get("other")), (Some("00"), Some("a:b")), "{text}");
        }
    }
}
