//! TLS: reads PEM files into settings for the listener and for the connection to the broker. Knows neither HTTP nor
//! AMQP.
//!
//! rustls with ring as its only crypto provider: TLS 1.2 and 1.3. No error quotes the contents of a file.

use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock, PoisonError, RwLock};

use jiff::Timestamp;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use thiserror::Error;
use tokio_rustls::rustls;
use x509_cert::der::Decode;

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

/// Why certificates cannot be used. Each error names the file.
#[derive(Debug, Error)]
pub enum TlsError {
    #[error("cannot read {}: {source}", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{} contains no {what} in PEM format", path.display())]
    Empty { path: PathBuf, what: &'static str },
    #[error("{} is broken: {reason}", path.display())]
    Broken { path: PathBuf, reason: String },
    #[error("{} expired on {at:.0}", path.display())]
    Expired { path: PathBuf, at: Timestamp },
    #[error("{} is not valid before {at:.0}", path.display())]
    NotYetValid { path: PathBuf, at: Timestamp },
    #[error("certificate {} and private key {} do not match: {source}", certificate.display(), private_key.display())]
    Mismatch { certificate: PathBuf, private_key: PathBuf, source: rustls::Error },
    #[error("the system has no readable certificate authorities")]
    NoSystemAuthorities,
    #[error("TLS cannot be set up: {0}")]
    Rustls(#[from] rustls::Error),
}

/// The TLS settings of a listener, with the expiry of its certificate.
#[derive(Clone)]
pub struct Identity {
    pub config: Arc<ServerConfig>,
    pub expires_at: Timestamp,
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

    /// Reloads the files. After an error the previous identity stays in use.
    pub fn reload(&self) -> Result<(), TlsError> {
        let identity = self.files.load(Timestamp::now())?;
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
        let (valid_from, expires_at) = validity(&chain[0], &self.certificate)?;
        if expires_at <= now {
            return Err(TlsError::Expired { path: self.certificate.clone(), at: expires_at });
        }
        if valid_from > now {
            return Err(TlsError::NotYetValid { path: self.certificate.clone(), at: valid_from });
        }
        let builder =
            ServerConfig::builder_with_provider(Arc::clone(&PROVIDER)).with_safe_default_protocol_versions()?;
        let builder = match &self.client_ca {
            None => builder.with_no_client_auth(),
            Some(ca) => {
                let roots = Arc::new(authorities(ca)?);
                let verifier = WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(&PROVIDER)).build();
                builder.with_client_cert_verifier(verifier.map_err(|error| broken(ca, error))?)
            }
        };
        let mut config = builder
            .with_single_cert(chain, private_key(&self.private_key)?)
            .map_err(|source| mismatch(&self.certificate, &self.private_key, source))?;
        config.alpn_protocols = vec![SERVER_PROTOCOL.to_vec()];
        Ok(Identity { config: Arc::new(config), expires_at })
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
                .map_err(|source| mismatch(certificate, key, source))?,
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

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    std::fs::read(path).map_err(|source| TlsError::Read { path: path.to_owned(), source })
}

fn broken(path: &Path, reason: impl ToString) -> TlsError {
    TlsError::Broken { path: path.to_owned(), reason: reason.to_string() }
}

fn mismatch(certificate: &Path, private_key: &Path, source: rustls::Error) -> TlsError {
    TlsError::Mismatch { certificate: certificate.to_owned(), private_key: private_key.to_owned(), source }
}

/// Reads one or more certificates.
fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&read(path)?).collect();
    match certificates.map_err(|error| pem_error(path, &error))? {
        none if none.is_empty() => Err(TlsError::Empty { path: path.to_owned(), what: "certificate" }),
        certificates => Ok(certificates),
    }
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    PrivateKeyDer::from_pem_slice(&read(path)?).map_err(|error| match error {
        pem::Error::NoItemsFound => TlsError::Empty { path: path.to_owned(), what: "private key" },
        error => pem_error(path, &error),
    })
}

fn authorities(path: &Path) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path)? {
        roots.add(certificate).map_err(|error| broken(path, error))?;
    }
    Ok(roots)
}

fn system_authorities() -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    // Some systems have a few unreadable ones among many.
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if roots.is_empty() { Err(TlsError::NoSystemAuthorities) } else { Ok(roots) }
}

/// The first and the last instant at which a certificate is valid.
fn validity(certificate: &CertificateDer<'_>, path: &Path) -> Result<(Timestamp, Timestamp), TlsError> {
    let parsed = x509_cert::Certificate::from_der(certificate).map_err(|error| broken(path, error))?;
    let validity = parsed.tbs_certificate().validity();
    let at = |time: x509_cert::time::Time| {
        let seconds = i64::try_from(time.to_unix_duration().as_secs()).unwrap_or(i64::MAX);
        Timestamp::from_second(seconds).map_err(|error| broken(path, error))
    };
    Ok((at(validity.not_before)?, at(validity.not_after)?))
}

/// Describes a PEM error without the parser's text, which quotes the file: that may be a private key on a single line.
fn pem_error(path: &Path, error: &pem::Error) -> TlsError {
    let reason = match error {
        pem::Error::MissingSectionEnd { .. } => "a section has no end; the file may have lost its line breaks",
        pem::Error::IllegalSectionStart { .. } => "the first line of a section cannot be read",
        pem::Error::Base64Decode(_) => "a section is not base64",
        _ => "it is not a PEM file",
    };
    broken(path, reason)
}
