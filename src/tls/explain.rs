//! One plain sentence for each common fault of a TLS handshake, in place of the library's words. Pure.

use std::error::Error;
use std::io;

use rustls::{AlertDescription, CertificateError, InvalidMessage};
use tokio_rustls::rustls;

/// The other side of a handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Peer {
    /// The relay is the client.
    Server,
    /// The relay is the server.
    Client,
}

impl Peer {
    fn name(self) -> &'static str {
        match self {
            Self::Server => "the server",
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
        (CertificateError::UnknownIssuer, Peer::Client) => "was not issued by an authority in http.tls.client_ca",
        (CertificateError::Expired | CertificateError::ExpiredContext { .. }, _) => {
            "has expired, or this machine's clock is wrong"
        }
        (CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. }, _) => {
            "is not valid yet, or this machine's clock is wrong"
        }
        (CertificateError::NotValidForName, _) => {
            "is for another name; connect by a name in it, or set broker.tls.server_name to one"
        }
        (CertificateError::NotValidForNameContext { presented, .. }, _) => {
            let names = if presented.is_empty() { "no name (subjectAltName)".to_owned() } else { presented.join(", ") };
            return Some(format!(
                "is for another name: it has {names}; connect by a name in it, or set broker.tls.server_name to one"
            ));
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

fn alert_sentence(alert: AlertDescription, peer: Peer) -> Option<String> {
    let text = match (alert, peer) {
        (AlertDescription::CertificateRequired, Peer::Server) => {
            "the server requires a certificate of the client: set broker.tls.certificate and broker.tls.private_key"
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
            Peer::Client => {
                "the client does not trust the relay's certificate: http.tls.certificate may lack its intermediate \
                 certificates"
            }
        },
        _ => return None,
    };
    Some(text.to_owned())
}
