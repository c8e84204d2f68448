//! One plain sentence for each common fault of a TLS handshake, in place of the library's words. Pure.

use std::error::Error;
use std::io;

use rustls::{AlertDescription, CertificateError, InvalidMessage};
use tokio_rustls::rustls;

/// The other side of a handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Peer {
    /// A server of the broker. The relay is the client.
    Server,
    /// A web server that no key of the configuration is for, such as the receiver of notices. The relay is the client.
    WebServer,
    /// The relay is the server.
    Client,
}

impl Peer {
    fn name(self) -> &'static str {
        match self {
            Self::Server | Self::WebServer => "the server",
            Self::Client => "the client",
        }
    }
}

/// Says why a handshake failed. `error` may be of rustls, or wrap such an error.
pub(crate) fn explain(error: &(dyn Error + 'static), peer: Peer) -> String {
    match in_rustls(error).and_then(|error| sentence(error, peer)) {
        Some(sentence) => sentence,
        None => crate::text::chain(error),
    }
}

/// Finds the error of rustls in a chain of causes.
fn in_rustls<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a rustls::Error> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref() {
            return Some(found);
        }
        // The source of an `io::Error` is the source of what it wraps.
        let wrapped = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        next = wrapped.map(|wrapped| wrapped as &(dyn Error + 'static)).or_else(|| error.source());
    }
    None
}

fn sentence(error: &rustls::Error, peer: Peer) -> Option<String> {
    let name = peer.name();
    Some(match error {
        rustls::Error::InvalidCertificate(error) => format!("{name}'s certificate {}", certificate(error, peer)?),
        rustls::Error::InvalidMessage(InvalidMessage::InvalidContentType) => match peer {
            Peer::Server => {
                "the server does not speak TLS on this port; RabbitMQ's port for amqps is usually 5671, the \
                             one without TLS (amqp) 5672"
                    .to_owned()
            }
            Peer::WebServer => {
                "the server does not speak TLS on this port; use http://, or its port for https".to_owned()
            }
            Peer::Client => "the client does not speak TLS".to_owned(),
        },
        rustls::Error::NoCertificatesPresented => format!("{name} showed no certificate, and one is required"),
        rustls::Error::PeerIncompatible(_) | rustls::Error::AlertReceived(AlertDescription::ProtocolVersion) => {
            format!("{name} and the relay have no version or cipher of TLS in common; the relay speaks TLS 1.2 and 1.3")
        }
        rustls::Error::AlertReceived(alert) => alert_sentence(*alert, peer)?,
        _ => return None,
    })
}

/// Completes the sentence "the certificate ...".
fn certificate(error: &CertificateError, peer: Peer) -> Option<String> {
    let text = match (error, peer) {
        (CertificateError::UnknownIssuer, Peer::Server) => {
            "was not issued by a trusted authority: trust its authority (broker.tls.ca, or --ca), or let the server \
             send its intermediate certificates"
        }
        (CertificateError::UnknownIssuer, Peer::WebServer) => {
            "was not issued by an authority that this system trusts: add its authority to the system's store \
             (update-ca-certificates), or let the server send its intermediate certificates"
        }
        (CertificateError::UnknownIssuer, Peer::Client) => "was not issued by an authority in http.tls.client_ca",
        (CertificateError::Expired | CertificateError::ExpiredContext { .. }, _) => {
            "has expired, or this machine's clock is wrong"
        }
        (CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. }, _) => {
            "is not valid yet, or this machine's clock is wrong"
        }
        (CertificateError::NotValidForName, peer) => {
            return Some(format!("is for another name; {}", by_another_name(peer)));
        }
        (CertificateError::NotValidForNameContext { presented, .. }, peer) => {
            let names = if presented.is_empty() { "no name (subjectAltName)".to_owned() } else { presented.join(", ") };
            return Some(format!("is for another name: it has {names}; {}", by_another_name(peer)));
        }
        (CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. }, _) => {
            "is not for this use; its extension extendedKeyUsage must allow serverAuth for a server, clientAuth for a \
             client"
        }
        (CertificateError::BadEncoding, _) => "cannot be read",
        (CertificateError::Revoked, _) => "was revoked",
        (CertificateError::BadSignature, _) => "has a signature that does not match its issuer's key",
        (
            CertificateError::UnsupportedSignatureAlgorithmContext { .. }
            | CertificateError::UnsupportedSignatureAlgorithmForPublicKeyContext { .. },
            _,
        ) => "was signed with an algorithm that is not supported, such as SHA-1, P-521 or RSA below 2048 bits",
        (CertificateError::Other(other), _) => match format!("{other:?}") {
            text if text.contains("CaUsedAsEndEntity") => {
                "is one of an authority (CA:TRUE), such as openssl req -x509 makes; issue one with \
                 basicConstraints=CA:FALSE"
            }
            text if text.contains("UnsupportedCertVersion") => {
                "is of X.509 version 1; issue one with the extension subjectAltName, which makes it version 3"
            }
            text if text.contains("InsufficientRsaKey") || text.contains("UnsupportedSignatureAlgorithm") => {
                "has a key that is not supported, such as P-521 or RSA below 2048 bits"
            }
            _ => return None,
        },
        _ => return None,
    };
    Some(text.to_owned())
}

fn by_another_name(peer: Peer) -> &'static str {
    match peer {
        Peer::WebServer => "use a name in it in the URL",
        Peer::Server | Peer::Client => "connect by a name in it, or set broker.tls.server_name to one",
    }
}

fn alert_sentence(alert: AlertDescription, peer: Peer) -> Option<String> {
    let text = match (alert, peer) {
        (AlertDescription::CertificateRequired, Peer::Server) => {
            "the server requires a certificate of the client: set broker.tls.certificate and broker.tls.private_key"
        }
        (AlertDescription::CertificateRequired, Peer::WebServer) => {
            "the server requires a certificate of the client, and the relay has none for it"
        }
        (AlertDescription::HandshakeFailure, Peer::WebServer) => {
            "the server refused the handshake: it may require a certificate of the client, which the relay does not \
             have, or have no cipher in common"
        }
        (AlertDescription::HandshakeFailure, Peer::Server) => {
            "the server refused the handshake: it may require a certificate of the client (broker.tls.certificate), or \
             have no cipher in common"
        }
        (
            AlertDescription::UnknownCA
            | AlertDescription::BadCertificate
            | AlertDescription::CertificateUnknown
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::CertificateExpired,
            peer,
        ) => match peer {
            Peer::Server => "the server rejected the relay's certificate (broker.tls.certificate)",
            Peer::WebServer => return None,
            Peer::Client => {
                "the client does not trust the relay's certificate: http.tls.certificate may lack its intermediate \
                 certificates"
            }
        },
        _ => return None,
    };
    Some(text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_faults_of_a_web_server_name_no_key_of_the_broker() {
        use rustls::Error::{AlertReceived, InvalidCertificate};
        let name = || rustls::pki_types::ServerName::try_from("localhost").unwrap();
        let other_name = CertificateError::NotValidForNameContext { expected: name(), presented: Vec::new() };
        for (error, expected) in [
            (
                rustls::Error::InvalidMessage(InvalidMessage::InvalidContentType),
                "the server does not speak TLS on this port; use http://, or its port for https",
            ),
            (
                InvalidCertificate(CertificateError::UnknownIssuer),
                "the server's certificate was not issued by an authority that this system trusts: add its authority to \
                 the system's store (update-ca-certificates), or let the server send its intermediate certificates",
            ),
            (
                InvalidCertificate(other_name),
                "the server's certificate is for another name: it has no name (subjectAltName); use a name in it in \
                 the URL",
            ),
            (
                InvalidCertificate(CertificateError::NotValidForName),
                "the server's certificate is for another name; use a name in it in the URL",
            ),
            (
                AlertReceived(AlertDescription::CertificateRequired),
                "the server requires a certificate of the client, and the relay has none for it",
            ),
            (
                AlertReceived(AlertDescription::HandshakeFailure),
                "the server refused the handshake: it may require a certificate of the client, which the relay does \
                 not have, or have no cipher in common",
            ),
        ] {
            // As the client of hyper wraps it.
            let error = io::Error::other(error);
            assert_eq!(explain(&error, Peer::WebServer), expected);
            assert_ne!(explain(&error, Peer::Server), expected);
        }
        for alert in (0..=255).map(AlertDescription::from) {
            let said = explain(&AlertReceived(alert), Peer::WebServer);
            assert!(!said.contains("broker.") && !said.contains("RabbitMQ"), "{said}");
        }
    }
}
