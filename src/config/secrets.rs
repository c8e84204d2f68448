//! The one door for secrets, wherever they come from: the configuration file, the environment, or a file of their own,
//! at the start and again when that file changes. No error quotes a secret.
//!
//! - Line ends and byte order marks at the ends are dropped: editors and `echo` add them.
//! - Blanks and quotation marks at the ends, control characters and invisible characters are mistakes. With them the
//!   relay would run with another secret than Prism or the broker has, and refuse every real webhook.
//! - A signature secret, a token or a key of fewer than [`CHARS_MIN`] characters is a mistake: it can be guessed, or it
//!   is not the secret at all. The length of a password is RabbitMQ's business.
//! - In a file, lines that begin with `#` are comments, and empty lines are skipped.

use std::collections::HashMap;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::secret::Secret;
use crate::signature::SECRETS_MAX;

/// Random letters and digits of this length cannot be guessed.
const CHARS_MIN: usize = 16;

/// What a secret is for, which decides how it is checked.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Signature,
    Password,
    Token,
    ApiKey,
}

/// Reads a file with one signature secret per line.
pub fn secrets_in(text: &str) -> Result<Vec<Secret>, String> {
    signature_secrets(lines(text).map(|(number, line)| (format!("line {number}"), line)))
}

/// Reads a file that holds a password.
pub fn password_in(text: &str) -> Result<Secret, String> {
    only_line(text, Kind::Password)
}

/// Reads a file that holds the operators' token.
pub fn token_in(text: &str) -> Result<Secret, String> {
    only_line(text, Kind::Token)
}

/// Reads a file that holds the key to Prism's API.
pub fn api_key_in(text: &str) -> Result<Secret, String> {
    only_line(text, Kind::ApiKey)
}

/// Reads a file that holds the secret of the notices.
pub fn notify_secret_in(text: &str) -> Result<Secret, String> {
    only_line(text, Kind::Signature)
}

/// Checks signature secrets from the configuration, in their order.
pub(super) fn listed_secrets(texts: &[String]) -> Result<Vec<Secret>, String> {
    signature_secrets((1..).zip(texts).map(|(position, text)| (format!("secret {position}"), trimmed(text))))
}

/// Checks a password from the configuration.
pub(super) fn password(text: &str) -> Result<Secret, String> {
    secret(trimmed(text), Kind::Password)
}

/// Checks the operators' token from the configuration.
pub(super) fn token(text: &str) -> Result<Secret, String> {
    secret(trimmed(text), Kind::Token)
}

/// Checks the key to Prism's API from the configuration.
pub(super) fn api_key(text: &str) -> Result<Secret, String> {
    secret(trimmed(text), Kind::ApiKey)
}

/// Checks the secret of the notices from the configuration.
pub(super) fn notify_secret(text: &str) -> Result<Secret, String> {
    secret(trimmed(text), Kind::Signature)
}

/// Reads a file that holds a secret. The error completes the sentence "the file ...", and does not quote it.
pub fn read_secret<T>(path: &Path, parse: impl Fn(&str) -> Result<T, String>) -> Result<T, String> {
    // To read a pipe would wait for its writer.
    if std::fs::metadata(path).is_ok_and(|found| !found.is_file() && !found.is_dir()) {
        return Err("is a pipe, a socket or a device, not a file".to_owned());
    }
    let bytes = std::fs::read(path).map_err(|error| match error.kind() {
        ErrorKind::PermissionDenied => format!("cannot be read{}: {error}", by_user()),
        _ => format!("cannot be read: {error}"),
    })?;
    match std::str::from_utf8(&bytes) {
        Ok(text) => parse(text),
        Err(_) if bytes.starts_with(b"\xff\xfe") || bytes.starts_with(b"\xfe\xff") => {
            Err("is not UTF-8 but UTF-16; save it as UTF-8".to_owned())
        }
        Err(_) => Err("is not UTF-8".to_owned()),
    }
}

/// The account of this process, for an error about permissions. Linux shows it as the owner of `/proc/self`.
fn by_user() -> String {
    std::fs::metadata("/proc/self").map_or_else(|_| String::new(), |own| format!(" by user id {}", own.uid()))
}

/// The lines of a file that are neither empty nor comments, with their numbers.
fn lines(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let lines = (1..).zip(text.split('\n').map(trimmed));
    lines.filter(|(_, line)| !line.is_empty() && !line.starts_with('#'))
}

fn only_line(text: &str, kind: Kind) -> Result<Secret, String> {
    let mut lines = lines(text);
    match (lines.next(), lines.next()) {
        (None, _) if text.contains('#') => Err("has only comments (lines that begin with #)".to_owned()),
        (None, _) => Err("is empty".to_owned()),
        (Some(_), Some(_)) => Err("has more than one line".to_owned()),
        (Some((1, line)), None) => secret(line, kind),
        (Some((number, line)), None) => secret(line, kind).map_err(|fault| format!("line {number} {fault}")),
    }
}

/// Checks secrets, each with its place. The error names every place with a fault.
fn signature_secrets<'a>(found: impl Iterator<Item = (String, &'a str)>) -> Result<Vec<Secret>, String> {
    let (mut secrets, mut faults, mut places, mut count) = (Vec::new(), Vec::new(), HashMap::new(), 0);
    for (place, text) in found {
        count += 1;
        if let Some(first) = places.get(text) {
            faults.push(format!("{place} is the same as {first}"));
        }
        match secret(text, Kind::Signature) {
            Ok(secret) => secrets.push(secret),
            Err(fault) => faults.push(format!("{place} {fault}")),
        }
        places.entry(text).or_insert(place);
    }
    match (count, faults.is_empty()) {
        (0, _) => Err("holds no secret".to_owned()),
        (count, _) if count > SECRETS_MAX => Err(format!("holds {count} secrets; {SECRETS_MAX} are allowed")),
        (_, false) => Err(faults.join("; ")),
        (_, true) => Ok(secrets),
    }
}

/// Without line ends and byte order marks at the ends.
pub(super) fn trimmed(text: &str) -> &str {
    text.trim_matches(['\r', '\n', BYTE_ORDER_MARK])
}

const BYTE_ORDER_MARK: char = '\u{feff}';

/// Checks one secret. The error completes the sentence "the value ...".
fn secret(text: &str, kind: Kind) -> Result<Secret, String> {
    let fault = if text.is_empty() {
        "is empty".to_owned()
    } else if text.trim().is_empty() {
        "has only blanks".to_owned()
    } else if text.trim() != text {
        "begins or ends with a blank".to_owned()
    } else if text.starts_with(is_quotation_mark) || text.ends_with(is_quotation_mark) {
        match kind {
            Kind::Signature | Kind::Token | Kind::ApiKey => "begins or ends with a quotation mark".to_owned(),
            Kind::Password => "begins or ends with a quotation mark; a password that really has one goes \
                               percent-encoded into broker.urls"
                .to_owned(),
        }
    } else if text.contains(is_invisible) {
        "contains a control character or an invisible character".to_owned()
    } else if kind != Kind::Password && text.chars().count() < CHARS_MIN {
        match kind {
            Kind::Token => format!("is shorter than {CHARS_MIN} characters; make one with: openssl rand -hex 24"),
            Kind::Signature | Kind::Password | Kind::ApiKey => format!("is shorter than {CHARS_MIN} characters"),
        }
    } else if matches!(kind, Kind::Token | Kind::ApiKey) && !text.bytes().all(|byte| byte.is_ascii_graphic()) {
        "takes ASCII without blanks".to_owned()
    } else {
        return Ok(Secret::new(text));
    };
    Err(fault)
}

/// Whether a secret may be more than the secret: `NAME=secret`, several in one line, or JSON. Base64 may end with `=`.
pub(super) fn looks_joined(secret: &Secret) -> bool {
    secret.expose().trim_end_matches('=').contains(['=', ',', '{'])
}

fn is_quotation_mark(c: char) -> bool {
    matches!(c, '"' | '\'' | '`' | '\u{2018}'..='\u{201f}' | '\u{ab}' | '\u{bb}')
}

/// Control characters, and characters that an editor does not show.
pub(super) fn is_invisible(c: char) -> bool {
    let zero_width = ['\u{ad}', '\u{2060}', BYTE_ORDER_MARK].contains(&c);
    c.is_control() || zero_width || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}')
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "whsec_0123456789";

    fn exposed(secrets: Result<Vec<Secret>, String>) -> Result<Vec<String>, String> {
        secrets.map(|secrets| secrets.iter().map(|secret| secret.expose().to_owned()).collect())
    }

    #[test]
    fn a_file_may_have_comments_empty_lines_and_line_ends_of_any_system() {
        let text = "\u{feff}# new, since November\r\nwhsec_0123456789\r\n\r\n\u{feff}whsec_9876543210\n#";
        assert_eq!(exposed(secrets_in(text)).unwrap(), [GOOD, "whsec_9876543210"]);
        for text in
            ["whsec_0123456789", "whsec_0123456789\n", "\u{feff}whsec_0123456789\r\n\n", "# old\n\nwhsec_0123456789"]
        {
            assert_eq!(password_in(text).unwrap().expose(), GOOD, "{text:?}");
            assert_eq!(token_in(text).unwrap().expose(), GOOD, "{text:?}");
            assert_eq!(exposed(secrets_in(text)).unwrap(), [GOOD], "{text:?}");
        }
        assert_eq!(exposed(listed_secrets(&["whsec_0123456789\n".to_owned()])).unwrap(), [GOOD]);
        assert_eq!(password("#not a comment\n").unwrap().expose(), "#not a comment");
    }

    #[test]
    fn each_fault_names_its_line_and_never_the_secret() {
        for (line, expected) in [
            (" ", "line 2 has only blanks"),
            (" whsec_0123456789", "line 2 begins or ends with a blank"),
            ("whsec_0123456789 ", "line 2 begins or ends with a blank"),
            ("whsec_0123456789\u{a0}", "line 2 begins or ends with a blank"),
            ("\twhsec_0123456789", "line 2 begins or ends with a blank"),
            ("\"whsec_0123456789\"", "line 2 begins or ends with a quotation mark"),
            ("whsec_0123456789'", "line 2 begins or ends with a quotation mark"),
            ("\u{201c}whsec_0123456789\u{201d}", "line 2 begins or ends with a quotation mark"),
            ("whsec_01234\u{0}56789", "line 2 contains a control character or an invisible character"),
            ("whsec_01234\r56789", "line 2 contains a control character or an invisible character"),
            ("whsec_01234\u{200b}56789", "line 2 contains a control character or an invisible character"),
            ("whsec_012345678", "line 2 is shorter than 16 characters"),
            ("1", "line 2 is shorter than 16 characters"),
            ("whsec_aaaaaaaaaa", "line 2 is the same as line 1"),
        ] {
            let fault = exposed(secrets_in(&format!("whsec_aaaaaaaaaa\n{line}\n"))).unwrap_err();
            assert_eq!(fault, expected);
        }
        let fault = exposed(secrets_in("a\n#\nb\na")).unwrap_err();
        assert_eq!(
            fault,
            "line 1 is shorter than 16 characters; line 3 is shorter than 16 characters; line 4 is the same as line 1; \
             line 4 is shorter than 16 characters"
        );
        let many: String = (0..9).map(|n| format!("{GOOD}{n}\n")).collect();
        assert_eq!(exposed(secrets_in(&many)).unwrap_err(), "holds 9 secrets; 8 are allowed");
        assert_eq!(exposed(secrets_in("\n# only this\n")).unwrap_err(), "holds no secret");
    }

    #[test]
    fn a_password_may_be_short_and_a_token_may_not() {
        assert_eq!(password("guest").unwrap().expose(), "guest");
        assert_eq!(password_in("pass word\n").unwrap().expose(), "pass word");
        assert!(token("0123456789abcde").unwrap_err().starts_with("is shorter than 16 characters; make one with"));
        assert_eq!(token("0123456789 abcdef").unwrap_err(), "takes ASCII without blanks");
        for (file, expected) in [
            ("", "is empty"),
            ("\n\r\n", "is empty"),
            ("# the password of the relay\n", "has only comments (lines that begin with #)"),
            ("one\ntwo\n", "has more than one line"),
            ("# from the vault\nhunter2 \n", "line 2 begins or ends with a blank"),
            ("hunter2 \n", "begins or ends with a blank"),
        ] {
            assert_eq!(password_in(file).unwrap_err(), expected, "{file:?}");
        }
        assert!(password("'hunter2'").unwrap_err().contains("goes percent-encoded into broker.urls"));
        assert_eq!(password("").unwrap_err(), "is empty");
    }
}
