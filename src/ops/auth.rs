//! Who may look, and who may act. Probes and metrics are open; the console and `/api` are for people.
//!
//! With `ops.token`: its bearer, or a browser that has logged in with it. Without: whoever reaches the listener, as long as
//! it listens on loopback, and asks for it by an address or as localhost (a name could be anybody's who has it point
//! here, from within the operator's own browser). Actions also need the console's own token from the same origin.

use std::sync::{PoisonError, RwLock, RwLockReadGuard};

use hyper::HeaderMap;
use hyper::header::{AUTHORIZATION, COOKIE, HOST, ORIGIN};
use subtle::ConstantTimeEq;

use crate::secret::Secret;
use crate::text::hex;
use crate::tls;

const COOKIE_NAME: &str = "prism-relay";
/// Carries the token of an action.
const ACTION_HEADER: &str = "x-prism-token";

pub struct OpsAuth {
    credentials: RwLock<Credentials>,
    loopback: bool,
    action: Secret,
}

struct Credentials {
    token: Option<Secret>,
    /// What a browser gets for the token. It is good until the relay ends, or the token is another one.
    session: Secret,
}

/// Why somebody may not look or act.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Denied {
    /// Neither the token nor a session.
    LoginNeeded,
    /// There is no token to log in with, and the listener is not on loopback.
    NoToken,
    /// Asked for by a name that is not known to be ours.
    UnknownHost,
    /// Not from the console itself.
    ForeignOrigin,
}

impl OpsAuth {
    pub fn new(token: Option<Secret>, loopback: bool) -> Self {
        Self { credentials: RwLock::new(Credentials { token, session: random() }), loopback, action: random() }
    }

    /// Whoever has logged in with another token has to log in again.
    pub fn replace(&self, token: Secret) {
        let mut credentials = self.credentials.write().unwrap_or_else(PoisonError::into_inner);
        if credentials.token.as_ref().is_none_or(|old| !matches(token.expose(), old)) {
            *credentials = Credentials { token: Some(token), session: random() };
        }
    }

    fn credentials(&self) -> RwLockReadGuard<'_, Credentials> {
        self.credentials.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Goes into the console's page, for its actions.
    pub fn action_token(&self) -> &Secret {
        &self.action
    }

    pub fn may_read(&self, headers: &HeaderMap) -> Result<(), Denied> {
        let credentials = self.credentials();
        match &credentials.token {
            Some(token) if bears(headers, token) || has_session(headers, &credentials.session) => Ok(()),
            Some(_) => Err(Denied::LoginNeeded),
            None if !self.loopback => Err(Denied::NoToken),
            None if is_asked_by_address(headers) => Ok(()),
            None => Err(Denied::UnknownHost),
        }
    }

    /// A program that bears the token needs no other one: no browser sends that header by itself.
    pub fn may_act(&self, headers: &HeaderMap) -> Result<(), Denied> {
        self.may_read(headers)?;
        if self.credentials().token.as_ref().is_some_and(|token| bears(headers, token)) {
            return Ok(());
        }
        let own = text(headers, ACTION_HEADER).is_some_and(|given| matches(given, &self.action));
        if own && is_same_origin(headers) { Ok(()) } else { Err(Denied::ForeignOrigin) }
    }

    /// The cookie for whoever knows the token.
    pub fn log_in(&self, given: &str) -> Option<String> {
        let credentials = self.credentials();
        let known = credentials.token.as_ref().is_some_and(|token| matches(given, token));
        known.then(|| format!("{COOKIE_NAME}={}; Path=/; HttpOnly; SameSite=Strict", credentials.session.expose()))
    }
}

fn random() -> Secret {
    Secret::new(hex(&tls::random_bytes()))
}

fn text(headers: &HeaderMap, name: impl hyper::header::AsHeaderName) -> Option<&str> {
    headers.get(name)?.to_str().ok()
}

fn matches(given: &str, secret: &Secret) -> bool {
    given.as_bytes().ct_eq(secret.expose().as_bytes()).into()
}

fn bears(headers: &HeaderMap, token: &Secret) -> bool {
    text(headers, AUTHORIZATION)
        .and_then(|value| value.strip_prefix("Bearer "))
        .is_some_and(|given| matches(given, token))
}

fn has_session(headers: &HeaderMap, session: &Secret) -> bool {
    let cookies = text(headers, COOKIE).unwrap_or_default().split(';');
    let mut ours = cookies.filter_map(|cookie| cookie.trim().split_once('=')).filter(|(name, _)| *name == COOKIE_NAME);
    ours.any(|(_, given)| matches(given, session))
}

/// `Host` without its port. HTTP/2 has it in the URI, and no browser speaks that without TLS.
fn is_asked_by_address(headers: &HeaderMap) -> bool {
    let Some(host) = text(headers, HOST) else { return false };
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|digit| digit.is_ascii_digit()) => name,
        _ => host,
    };
    let address = name.trim_start_matches('[').trim_end_matches(']');
    name.eq_ignore_ascii_case("localhost") || address.parse::<std::net::IpAddr>().is_ok()
}

/// Programs send no `Origin`; browsers do with each POST.
fn is_same_origin(headers: &HeaderMap) -> bool {
    let Some(origin) = text(headers, ORIGIN) else { return true };
    origin.split_once("://").is_some_and(|(_, authority)| Some(authority) == text(headers, HOST))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(lines: &[(&'static str, &str)]) -> HeaderMap {
        lines.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect::<HeaderMap>()
    }

    fn with_token() -> OpsAuth {
        OpsAuth::new(Some(Secret::new("a long enough token")), false)
    }

    #[test]
    fn without_a_token_only_loopback_is_open_and_only_by_address() {
        let auth = OpsAuth::new(None, true);
        for host in ["127.0.0.1:9090", "127.0.0.1", "[::1]:9090", "localhost:9090", "LOCALHOST"] {
            assert_eq!(auth.may_read(&headers(&[("host", host)])), Ok(()), "{host}");
        }
        for host in ["evil.example:9090", "127.0.0.1.evil.example", "localhost.evil.example", ""] {
            assert_eq!(auth.may_read(&headers(&[("host", host)])), Err(Denied::UnknownHost), "{host}");
        }
        assert_eq!(auth.may_read(&headers(&[])), Err(Denied::UnknownHost));
        let exposed = OpsAuth::new(None, false);
        assert_eq!(exposed.may_read(&headers(&[("host", "127.0.0.1")])), Err(Denied::NoToken));
    }

    #[test]
    fn the_token_opens_as_a_bearer_or_through_a_session() {
        let auth = with_token();
        assert_eq!(auth.may_read(&headers(&[("host", "127.0.0.1")])), Err(Denied::LoginNeeded));
        assert_eq!(auth.may_read(&headers(&[("authorization", "Bearer a long enough token")])), Ok(()));
        assert_eq!(auth.may_read(&headers(&[("authorization", "Bearer a wrong token")])), Err(Denied::LoginNeeded));
        assert_eq!(auth.log_in("a wrong token"), None);
        let cookie = auth.log_in("a long enough token").unwrap();
        let pair = cookie.split(';').next().unwrap();
        assert_eq!(auth.may_read(&headers(&[("cookie", &format!("other=1; {pair}"))])), Ok(()));
        assert_eq!(
            with_token().may_read(&headers(&[("cookie", pair)])),
            Err(Denied::LoginNeeded),
            "of another process"
        );
        auth.replace(Secret::new("another long enough token"));
        assert_eq!(auth.log_in("a long enough token"), None);
        assert_eq!(
            auth.may_read(&headers(&[("cookie", pair)])),
            Err(Denied::LoginNeeded),
            "the session has ended, too"
        );
        let cookie = auth.log_in("another long enough token").unwrap();
        auth.replace(Secret::new("another long enough token"));
        assert_eq!(auth.may_read(&headers(&[("cookie", cookie.split(';').next().unwrap())])), Ok(()), "the same token");
    }

    #[test]
    fn actions_need_the_consoles_own_token_from_its_own_origin() {
        let auth = OpsAuth::new(None, true);
        let own = auth.action_token().expose().to_owned();
        let act = |token: &str, origin: &str| {
            let host = ("host", "127.0.0.1:9090");
            auth.may_act(&headers(&[host, ("x-prism-token", token), ("origin", origin)]))
        };
        assert_eq!(act(&own, "http://127.0.0.1:9090"), Ok(()));
        assert_eq!(act(&own, "http://evil.example"), Err(Denied::ForeignOrigin));
        assert_eq!(act("guessed", "http://127.0.0.1:9090"), Err(Denied::ForeignOrigin));
        assert_eq!(auth.may_act(&headers(&[("host", "127.0.0.1:9090")])), Err(Denied::ForeignOrigin));
        let bearer = [("authorization", "Bearer a long enough token")];
        assert_eq!(with_token().may_act(&headers(&bearer)), Ok(()));
        let session = with_token();
        let cookie = session.log_in("a long enough token").unwrap();
        let cookie = cookie.split(';').next().unwrap().to_owned();
        assert_eq!(session.may_act(&headers(&[("cookie", &cookie)])), Err(Denied::ForeignOrigin));
    }
}
