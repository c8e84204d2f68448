//! TLS: reads PEM files into settings for the listener and for the connection to the broker. Knows neither HTTP nor
//! AMQP.
//!
//! rustls with ring as its only crypto provider: TLS 1.2 and 1.3. No error quotes the contents of a file.

mod certificate;
mod error;
mod explain;
mod pem;

use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock, PoisonError, RwLock};

use jiff::Timestamp;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::server::{VerifierBuilderError, WebPkiClientVerifier};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio_rustls::rustls;

use certificate::{KEYS, Parsed};
pub(crate) use error::TlsError;
pub(crate) use explain::{Peer, explain};
use pem::{certificates, private_key};

static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| Arc::new(rustls::crypto::ring::default_provider()));

/// The only protocol offered to clients that negotiate one (ALPN, RFC 7301). The name is IANA's.
const SERVER_PROTOCOL: &[u8] = b"http/1.1";

/// The PEM files of a TLS listener.
#[derive(Clone, Debug)]
pub struct ServerFiles {
    /// The server's certificate first, then the intermediate ones.
    pub certificate: PathBuf,
    pub private_key: PathBuf,
    /// If set, clients must show a certificate of one of these authorities.
    pub client_ca: Option<PathBuf>,
}

/// The PEM files of a TLS connection that the relay opens.
#[derive(Clone, Debug, Default)]
pub struct ClientFiles {
    /// The trusted authorities; `None`: those of the system.
    pub ca: Option<PathBuf>,
    /// The relay's certificate and key, for peers that ask for one.
    pub identity: Option<(PathBuf, PathBuf)>,
}

/// The TLS settings of a listener, with the expiry of its certificate.
#[derive(Clone)]
pub struct Identity {
    pub config: Arc<ServerConfig>,
    pub expires_at: Timestamp,
    /// Number of certificates in the chain.
    length: usize,
    /// The issuer that the chain ends with, if neither the file nor the system has its certificate.
    pub unknown_issuer: Option<String>,
}

/// An [`Identity`] that can be replaced at run time. Open connections keep theirs; new ones get the new one.
pub struct Server {
    files: ServerFiles,
    identity: RwLock<Identity>,
}

impl Server {
    pub fn load(files: ServerFiles) -> Result<Self, TlsError> {
        let identity = RwLock::new(files.load(Timestamp::now())?);
        Ok(Self { files, identity })
    }

    /// Reloads the files. After an error the previous identity stays in use: also if the new chain may have lost an
    /// intermediate certificate, because clients that know only the root would then fail.
    pub fn reload(&self) -> Result<(), TlsError> {
        let identity = self.files.load(Timestamp::now())?;
        let previous = self.identity();
        if let Some(issuer) = &identity.unknown_issuer
            && identity.length < previous.length
            && previous.unknown_issuer.as_ref() != Some(issuer)
        {
            let (path, issuer) = (self.files.certificate.clone(), issuer.clone());
            return Err(TlsError::Shorter { path, count: identity.length, previous: previous.length, issuer });
        }
        *self.identity.write().unwrap_or_else(PoisonError::into_inner) = identity;
        Ok(())
    }

    pub fn identity(&self) -> Identity {
        self.identity.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn files(&self) -> &ServerFiles {
        &self.files
    }
}

impl ServerFiles {
    /// Loads the files. A certificate that has expired or is not valid yet is an error, because clients would reject
    /// it.
    pub fn load(&self, now: Timestamp) -> Result<Identity, TlsError> {
        let chain = certificates(&self.certificate)?;
        let own = Parsed::new(&chain[0], &self.certificate)?;
        let (valid_from, expires_at) = own.validity()?;
        if expires_at <= now {
            return Err(TlsError::Expired { path: self.certificate.clone(), at: expires_at });
        }
        if valid_from > now {
            return Err(TlsError::NotYetValid { path: self.certificate.clone(), at: valid_from });
        }
        own.check_kind()?;
        let (length, unknown_issuer) = (chain.len(), unknown_issuer(&chain, &self.certificate));
        let builder =
            ServerConfig::builder_with_provider(Arc::clone(&PROVIDER)).with_safe_default_protocol_versions()?;
        let builder = match &self.client_ca {
            None => builder.with_no_client_auth(),
            Some(ca) => {
                let roots = Arc::new(authorities(ca)?);
                let verifier = WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(&PROVIDER)).build();
                let unusable = |error: VerifierBuilderError| TlsError::unusable(ca, format!("is broken: {error}"));
                builder.with_client_cert_verifier(verifier.map_err(unusable)?)
            }
        };
        let mut config = builder
            .with_single_cert(chain, private_key(&self.private_key)?)
            .map_err(|error| mismatch(&self.certificate, &self.private_key, &error))?;
        config.alpn_protocols = vec![SERVER_PROTOCOL.to_vec()];
        Ok(Identity { config: Arc::new(config), expires_at, length, unknown_issuer })
    }

    pub fn paths(&self) -> Vec<PathBuf> {
        [Some(&self.certificate), Some(&self.private_key), self.client_ca.as_ref()]
            .into_iter()
            .flatten()
            .cloned()
            .collect()
    }
}

impl ClientFiles {
    pub fn load(&self) -> Result<Arc<ClientConfig>, TlsError> {
        let roots = match &self.ca {
            Some(ca) => authorities(ca)?,
            None => system_authorities()?,
        };
        let builder = ClientConfig::builder_with_provider(Arc::clone(&PROVIDER))
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots);
        let config = match &self.identity {
            None => builder.with_no_client_auth(),
            Some((certificate, key)) => builder
                .with_client_auth_cert(certificates(certificate)?, private_key(key)?)
                .map_err(|error| mismatch(certificate, key, &error))?,
        };
        Ok(Arc::new(config))
    }

    pub fn paths(&self) -> Vec<PathBuf> {
        let identity = self.identity.iter().flat_map(|(certificate, key)| [certificate, key]);
        self.ca.iter().chain(identity).cloned().collect()
    }
}

/// TLS settings without any trusted authority, for connectors that only use `http://`.
pub(crate) fn client_without_authorities() -> Result<Arc<ClientConfig>, TlsError> {
    let builder = ClientConfig::builder_with_provider(Arc::clone(&PROVIDER)).with_safe_default_protocol_versions()?;
    Ok(Arc::new(builder.with_root_certificates(RootCertStore::empty()).with_no_client_auth()))
}

/// Random bytes that cannot be guessed.
pub(crate) fn random_bytes() -> [u8; 32] {
    let mut bytes = [0; 32];
    // getrandom(2) fails only on kernels that are older than those that Rust supports.
    PROVIDER.secure_random.fill(&mut bytes).expect("the system has random numbers");
    bytes
}

/// Reads a host name or an IP address that a certificate can be checked against.
pub(crate) fn server_name(host: &str) -> Option<ServerName<'static>> {
    ServerName::try_from(host.to_owned()).ok()
}

fn mismatch(certificate: &Path, private_key: &Path, error: &rustls::Error) -> TlsError {
    let reason = match error {
        rustls::Error::InconsistentKeys(_) => "the key belongs to another certificate".to_owned(),
        // ring cannot load the key. Its words name every kind that it tried.
        rustls::Error::General(_) => {
            return TlsError::unusable(private_key, format!("is of a kind that is not supported; use {KEYS}"));
        }
        error => explain(error, Peer::Client),
    };
    let (certificate, private_key) = (certificate.to_owned(), private_key.to_owned());
    TlsError::Mismatch { certificate, private_key, reason }
}

fn authorities(path: &Path) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path)? {
        let unusable = |error| TlsError::unusable(path, format!("is broken: {}", explain(&error, Peer::Server)));
        roots.add(certificate).map_err(unusable)?;
    }
    Ok(roots)
}

fn system_authorities() -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    // Some systems have a few unreadable ones among many.
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if roots.is_empty() { Err(TlsError::NoSystemAuthorities) } else { Ok(roots) }
}

/// The issuer that a chain ends with, if clients may not know it: neither the last certificate itself, nor one of the
/// system's authorities.
fn unknown_issuer(chain: &[CertificateDer<'_>], path: &Path) -> Option<String> {
    let last = Parsed::new(chain.last()?, path).ok()?;
    let is_issuer =
        |known: &CertificateDer<'_>| Parsed::new(known, path).is_ok_and(|known| known.subject() == last.issuer());
    let is_known =
        last.subject() == last.issuer() || rustls_native_certs::load_native_certs().certs.iter().any(is_issuer);
    (!is_known).then(|| last.issuer().to_string())
}

#[cfg(test)]
mod tests;
