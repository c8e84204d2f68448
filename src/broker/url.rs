//! One URL of the broker, with a password that cannot be printed.

use std::fmt;
use std::net::Ipv6Addr;

use lapin::uri::{AMQPScheme, AMQPUri, SASLMechanism};

use crate::secret::Secret;

/// Maximum size of a frame, in bytes: RabbitMQ's default. Without a value lapin takes the broker's, and allocates
/// buffers of 64 frames: with 0, which means "no limit", until the memory is used up.
const FRAME_MAX: u32 = 131_072;

/// An `amqp://` or `amqps://` URI whose `Display` and `Debug` leave the password out.
#[derive(Clone)]
pub struct BrokerUrl(AMQPUri);

impl BrokerUrl {
    /// Parses a URL. The error completes the sentence "the value ..." and does not quote it.
    pub fn parse(text: &str) -> Result<Self, String> {
        if let Some(fault) = raw_character(text) {
            return Err(fault);
        }
        let mut uri: AMQPUri =
            text.parse().map_err(|_| "is not a URL such as amqp://user:password@host:5672/%2f".to_owned())?;
        if uri.vhost.is_empty() {
            return Err("ends with `/`, which names the virtual host \"\"; write /%2f for the default one".to_owned());
        }
        // A slash that is percent-encoded belongs to the name of the virtual host.
        if path(text).matches('/').count() > 1 {
            return Err(
                "has more than one `/` after the host; percent-encode those in the virtual host as %2f".to_owned()
            );
        }
        // The URI parser silently turns an IPv6 literal into "localhost".
        if let Some(literal) = ipv6_literal(text) {
            let address: Ipv6Addr = literal.parse().map_err(|_| "has an invalid IPv6 address".to_owned())?;
            uri.authority.host = address.to_string();
        }
        let asked = uri.query.frame_max.filter(|asked| *asked > 0);
        uri.query.frame_max = Some(asked.map_or(FRAME_MAX, |asked| asked.min(FRAME_MAX)));
        Ok(Self(uri))
    }

    /// Replaces the password.
    pub fn set_password(&mut self, password: &Secret) {
        password.expose().clone_into(&mut self.0.authority.userinfo.password);
    }

    /// Sets the heartbeat interval that the relay asks for.
    pub fn set_heartbeat(&mut self, seconds: u16) {
        self.0.query.heartbeat = Some(seconds);
    }

    /// The whole URI, with the password: for the handshake only.
    pub fn expose(&self) -> &AMQPUri {
        &self.0
    }

    /// Host name or IP address, without brackets.
    pub fn host(&self) -> &str {
        &self.0.authority.host
    }

    /// The port, 5672 or 5671 by default.
    pub fn port(&self) -> u16 {
        self.0.authority.port
    }

    /// Whether the scheme is `amqps`.
    pub fn uses_tls(&self) -> bool {
        self.0.scheme == AMQPScheme::AMQPS
    }

    /// Whether the client certificate logs in (SASL EXTERNAL) instead of user and password.
    pub fn logs_in_by_certificate(&self) -> bool {
        self.0.query.auth_mechanism == Some(SASLMechanism::External)
    }

    /// The virtual host, percent-decoded.
    pub fn vhost(&self) -> &str {
        &self.0.vhost
    }
}

/// Finds a character in user or password that ends the part of the URL that it stands in. The URL would be read with
/// another host and without the password.
fn raw_character(url: &str) -> Option<String> {
    let advice = |character: char| {
        let escape = format!("%{:02x}", u32::from(character));
        Some(format!(
            "has a raw `{character}` in the user or the password; percent-encode it as {escape}, or set broker.password"
        ))
    };
    let Some((_, rest)) = url.split_once("://") else {
        // The second part of a list that was separated at a comma.
        return if url.contains('@') { advice(',') } else { None };
    };
    let end = rest.find(['/', '?', '#'])?;
    let (authority, rest) = rest.split_at(end);
    (!authority.contains('@') && rest.contains('@')).then(|| rest.chars().next().and_then(advice)).flatten()
}

/// The part between host and query.
fn path(url: &str) -> &str {
    let rest = url.split_once("://").map_or("", |(_, rest)| rest);
    let rest = rest.split(['?', '#']).next().unwrap_or_default();
    rest.find('/').map_or("", |start| &rest[start..])
}

fn ipv6_literal(url: &str) -> Option<&str> {
    let authority = url.split_once("://")?.1.split(['/', '?']).next()?;
    authority.rsplit('@').next()?.strip_prefix('[')?.split(']').next()
}

impl fmt::Display for BrokerUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let host = if self.host().contains(':') { format!("[{}]", self.host()) } else { self.host().to_owned() };
        let vhost = self.vhost().replace('%', "%25").replace('/', "%2f");
        let scheme = if self.uses_tls() { "amqps" } else { "amqp" };
        write!(f, "{scheme}://")?;
        // With EXTERNAL the user name is in the certificate.
        if !self.logs_in_by_certificate() {
            write!(f, "{}@", self.0.authority.userinfo.username)?;
        }
        write!(f, "{host}:{}/{vhost}", self.port())
    }
}

impl fmt::Debug for BrokerUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_password_is_not_shown() {
        let mut url = BrokerUrl::parse("amqp://me:hunter2@broker:5673/%2f").unwrap();
        url.set_password(&Secret::new("hunter3"));
        assert_eq!(format!("{url} {url:?}"), "amqp://me@broker:5673/%2f amqp://me@broker:5673/%2f");
        assert_eq!(url.expose().authority.userinfo.password, "hunter3");
    }

    #[test]
    fn frames_are_bounded_whatever_is_asked_for() {
        for (asked, expected) in
            [("", FRAME_MAX), ("?frame_max=0", FRAME_MAX), ("?frame_max=1048576", FRAME_MAX), ("?frame_max=8192", 8192)]
        {
            let url = BrokerUrl::parse(&format!("amqp://broker/v{asked}")).unwrap();
            assert_eq!(url.expose().query.frame_max, Some(expected), "{asked}");
        }
    }

    #[test]
    fn tls_and_a_login_by_certificate_are_read() {
        let url = BrokerUrl::parse("amqps://broker/v?auth_mechanism=external").unwrap();
        assert!(url.uses_tls());
        assert_eq!(url.to_string(), "amqps://broker:5671/v");
    }

    #[test]
    fn an_ipv6_address_stays_one() {
        let url = BrokerUrl::parse("amqp://a:b@[::1]:5673/v").unwrap();
        assert_eq!((url.host(), url.port(), url.vhost()), ("::1", 5673, "v"));
        assert_eq!(url.to_string(), "amqp://a@[::1]:5673/v");
    }

    #[test]
    fn a_virtual_host_may_have_encoded_slashes() {
        for (url, vhost) in [
            ("amqp://broker/%2Fprod", "/prod"),
            ("amqp://broker/%2f%2fa%2fb", "//a/b"),
            ("amqp://broker/prod%2feu?heartbeat=5", "prod/eu"),
            ("amqp://broker/%2f", "/"),
        ] {
            let parsed = BrokerUrl::parse(url).unwrap();
            assert_eq!(parsed.vhost(), vhost, "{url}");
            assert_eq!(BrokerUrl::parse(&parsed.to_string()).unwrap().vhost(), vhost, "{parsed}");
        }
        for url in ["amqp://broker/a/b", "amqp://broker//prod", "amqp://broker/%2f/prod"] {
            assert!(BrokerUrl::parse(url).unwrap_err().contains("more than one `/`"), "{url}");
        }
    }

    #[test]
    fn a_raw_character_in_a_password_is_named_with_its_escape() {
        for (url, escape) in [
            ("amqp://me:hunter#2@broker/v", "`#` in the user or the password; percent-encode it as %23"),
            ("amqp://me:hunter/2@broker/v", "`/` in the user or the password; percent-encode it as %2f"),
            ("amqp://me:hunter?2@broker/v", "`?` in the user or the password; percent-encode it as %3f"),
            ("amqp://m/e:hunter2@broker", "`/` in the user or the password; percent-encode it as %2f"),
            ("amqp://me:12/34@broker:5672/%2f", "`/` in the user or the password; percent-encode it as %2f"),
            ("2@broker/v", "`,` in the user or the password; percent-encode it as %2c"),
        ] {
            let fault = BrokerUrl::parse(url).unwrap_err();
            assert!(fault.contains(escape) && fault.contains("or set broker.password"), "{url}: {fault}");
            assert!(!fault.contains("hunter") && !fault.contains("34"), "{fault}");
        }
        let url = BrokerUrl::parse("amqp://me:a%23%2f%3f%2cb@broker/v").unwrap();
        assert_eq!((url.expose().authority.userinfo.password.as_str(), url.host()), ("a#/?,b", "broker"));
        let url = BrokerUrl::parse("amqp://me:p@ss@broker/v").unwrap();
        assert_eq!((url.expose().authority.userinfo.password.as_str(), url.host()), ("p@ss", "broker"));
    }

    #[test]
    fn no_path_is_the_default_virtual_host_and_an_empty_one_is_a_mistake() {
        assert_eq!(BrokerUrl::parse("amqp://localhost").unwrap().vhost(), "/");
        for bad in ["amqp://localhost/", "amqps://localhost/a/b", "http://localhost", "localhost", ""] {
            let error = BrokerUrl::parse(bad).unwrap_err();
            assert!(bad.is_empty() || !error.contains(bad), "{error}");
        }
    }
}
