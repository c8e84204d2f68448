//! Access to the console and `/api`. Probes and metrics need none.
//!
//! - With `ops.token`: the token as a bearer token, or a browser session opened with it.
//! - Without `ops.token`: any client, if the listener is on loopback and the `Host` header is an IP address or
//!   localhost. Any other host name could belong to a foreign page that made its name resolve to this machine (DNS
//!   rebinding).
//! - An action from a browser also needs the action token of the console's page, and the same origin.

use std::sync::{PoisonError, RwLock, RwLockReadGuard};

use hyper::HeaderMap;
use hyper::header::{AUTHORIZATION, COOKIE, HOST, ORIGIN};
use subtle::ConstantTimeEq;

use crate::secret::Secret;
use crate::text::hex;
use crate::tls;

const COOKIE_NAME: &str = "prism-relay";
/// The header in which the console's page sends the action token.
const ACTION_HEADER: &str = "x-prism-token";

/// Decides which requests may read the console and `/api`, and which may act on parked events.
pub(crate) struct OpsAuth {
    credentials: RwLock<Credentials>,
    loopback: bool,
    action: Secret,
}

struct Credentials {
    token: Option<Secret>,
    /// The cookie value of a logged-in browser: valid until the relay exits or the token changes.
    session: Secret,
}

/// Why a request is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Denied {
    /// The request has neither the token nor a session.
    LoginNeeded,
    /// `ops.token` is not set, and the listener is not on loopback.
    NoToken,
    /// `Host` is neither an IP address nor localhost.
    UnknownHost,
    /// The action did not come from the console's own page.
    ForeignOrigin,
}

impl OpsAuth {
    pub(crate) fn new(token: Option<Secret>, loopback: bool) -> Self {
        Self { credentials: RwLock::new(Credentials { token, session: random() }), loopback, action: random() }
    }

    /// Sets a new token. Sessions opened with another token end.
    pub(crate) fn replace(&self, token: Secret) {
        let mut credentials = self.credentials.write().unwrap_or_else(PoisonError::into_inner);
        if credentials.token.as_ref().is_none_or(|old| !matches(token.expose(), old)) {
            *credentials = Credentials { token: Some(token), session: random() };
        }
    }

    fn credentials(&self) -> RwLockReadGuard<'_, Credentials> {
        self.credentials.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The token that the console's page sends with each action.
    pub(crate) fn action_token(&self) -> &Secret {
        &self.action
    }

    /// Checks a request that only reads.
    pub(crate) fn may_read(&self, headers: &HeaderMap) -> Result<(), Denied> {
        let credentials = self.credentials();
        match &credentials.token {
            Some(token) if bears(headers, token) || has_session(headers, &credentials.session) => Ok(()),
            Some(_) => Err(Denied::LoginNeeded),
            None if !self.loopback => Err(Denied::NoToken),
            None if has_local_host(headers) => Ok(()),
            None => Err(Denied::UnknownHost),
        }
    }

    /// Checks a request that changes something. The bearer token is enough: no browser sends it by itself.
    pub(crate) fn may_act(&self, headers: &HeaderMap) -> Result<(), Denied> {
        self.may_read(headers)?;
        if self.credentials().token.as_ref().is_some_and(|token| bears(headers, token)) {
            return Ok(());
        }
        let own = text(headers, ACTION_HEADER).is_some_and(|given| matches(given, &self.action));
        if own && is_same_origin(headers) { Ok(()) } else { Err(Denied::ForeignOrigin) }
    }

    /// Returns the session cookie if `given` is the token. Without a path it is for the folder of the log-in page, so
    /// that relays below different paths of one host have one each.
    pub(crate) fn log_in(&self, given: &str) -> Option<String> {
        let credentials = self.credentials();
        let known = credentials.token.as_ref().is_some_and(|token| matches(given, token));
        known.then(|| format!("{COOKIE_NAME}={}; HttpOnly; SameSite=Strict", credentials.session.expose()))
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

/// Whether `Host`, without its port, is an IP address or localhost.
fn has_local_host(headers: &HeaderMap) -> bool {
    let Some(host) = text(headers, HOST) else { return false };
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|digit| digit.is_ascii_digit()) => name,
        _ => host,
    };
    let address = name.trim_start_matches('[').trim_end_matches(']');
    name.eq_ignore_ascii_case("localhost") || address.parse::<std::net::IpAddr>().is_ok()
}

/// Whether `Origin` is this listener. Browsers send it with each POST, other programs do not.
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
    fn without_a_token_only_loopback_answers_and_only_by_address() {
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
    fn the_token_works_as_a_bearer_token_or_through_a_session() {
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
            "a session of another process"
        );
        auth.replace(Secret::new("another long enough token"));
        assert_eq!(auth.log_in("a long enough token"), None);
        assert_eq!(
            auth.may_read(&headers(&[("cookie", pair)])),
            Err(Denied::LoginNeeded),
            "the session ended with its token"
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
