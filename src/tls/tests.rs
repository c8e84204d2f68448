//! Faults of real certificates, each with its sentence: when files are read, and in handshakes. The certificates are of
//! rcgen, or of `tests/samples/tls`.

use std::io::Write;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair};
use rustls::pki_types::PrivateKeyDer;
use rustls::pki_types::pem::PemObject;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::*;

/// Certificate and key, PEM.
struct Pair {
    certificate: String,
    key: String,
}

/// A file of `tests/samples/tls`.
fn sample(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/samples/tls").join(name);
    String::from_utf8_lossy(&std::fs::read(path).unwrap()).into_owned()
}

fn sample_pair(name: &str) -> Pair {
    Pair { certificate: sample(&format!("{name}.crt")), key: sample(&format!("{name}.key")) }
}

fn authority(name: &str) -> CertifiedIssuer<'static, KeyPair> {
    CertifiedIssuer::self_signed(authority_params(name), KeyPair::generate().unwrap()).unwrap()
}

fn authority_params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(rcgen::DnType::CommonName, name);
    params
}

fn issue(issuer: &CertifiedIssuer<'_, KeyPair>, change: impl FnOnce(&mut CertificateParams)) -> Pair {
    let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    change(&mut params);
    let key = KeyPair::generate().unwrap();
    Pair { certificate: params.signed_by(&key, issuer).unwrap().pem(), key: key.serialize_pem() }
}

/// A folder with the files of a server.
struct Folder(tempfile::TempDir);

impl Folder {
    fn new(certificate: impl AsRef<[u8]>, key: impl AsRef<[u8]>) -> Self {
        let folder = Self(tempfile::TempDir::new().unwrap());
        folder.write("tls.crt", certificate);
        folder.write("tls.key", key);
        folder
    }

    fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.0.path().join(name);
        std::fs::File::create(&path).unwrap().write_all(content.as_ref()).unwrap();
        path
    }

    fn files(&self) -> ServerFiles {
        let path = |name| self.0.path().join(name);
        ServerFiles { certificate: path("tls.crt"), private_key: path("tls.key"), client_ca: None }
    }

    /// Why the files cannot be used.
    fn fault(&self) -> String {
        let error = self.files().load(Timestamp::now()).err().expect("a fault").to_string();
        error.replace(&format!("{}/", self.0.path().display()), "")
    }
}

#[test]
fn files_that_cannot_be_used_are_described_in_one_sentence() {
    let (pair, other) = (issue(&authority("root"), |_| {}), issue(&authority("root"), |_| {}));
    let (good, key) = (pair.certificate.as_str(), pair.key.as_str());
    let samples = |name| (sample_pair(name).certificate, sample_pair(name).key);
    let binary = std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/samples/tls/rsa2048.der")).unwrap();
    let texts = |certificate: &str, key: &str| (certificate.to_owned(), key.to_owned());
    let joined = format!("{}{}", good.trim_end(), other.certificate);
    let indented = good.replace("-----BEGIN", "  -----BEGIN");
    for ((certificate, key), expected) in [
        (
            samples("v1"),
            "tls.crt is an X.509 certificate of version 1, which clients reject; issue one with the extension",
        ),
        (
            samples("p521"),
            "tls.crt has a key on the curve P-521, which is not supported; use P-256, P-384, Ed25519, or",
        ),
        (samples("secp256k1"), "tls.crt has a key on an unusual curve, which is not supported; use P-256"),
        (samples("rsa1024"), "tls.crt has an RSA key of 1024 bits, which is not supported"),
        (texts(&sample("request.csr"), key), "tls.crt contains a certificate request; use the certificate that"),
        (texts(&sample("trusted.crt"), key), "tls.crt is in OpenSSL's own format; convert it: openssl x509"),
        (texts(key, good), "tls.crt contains a private key, but no certificate; the files may be swapped"),
        (texts(good, good), "tls.key contains a certificate, but no private key; the files may be swapped"),
        (texts(good, &sample("public.key")), "tls.key contains a public key, but no private key"),
        (texts(good, &sample("encrypted.key")), "tls.key is encrypted with a passphrase; decrypt it: openssl pkey"),
        (texts(good, &sample("encrypted-traditional.key")), "tls.key is encrypted with a passphrase; decrypt it"),
        (
            texts(good, &other.key),
            "certificate tls.crt and private key tls.key do not match: the key belongs to another certificate",
        ),
        (texts(good, &sample("p521.key")), "tls.key is of a kind that is not supported; use P-256, P-384, Ed25519, or"),
        (texts(good, &sample("rsa1024.key")), "tls.key is of a kind that is not supported; use P-256"),
        (texts("", key), "tls.crt contains no certificate in PEM format"),
        (texts(&joined, key), "tls.crt has 2 certificates, but only 1 can be read: each -----BEGIN must be at the"),
        (texts(&indented, key), "tls.crt has 1 certificates, but only 0 can be read: each -----BEGIN must be at the"),
    ] {
        let fault = Folder::new(certificate, key).fault();
        assert!(fault.starts_with(expected), "{expected:?} is not the beginning of {fault:?}");
    }
    let fault = Folder::new(binary, key).fault();
    assert!(fault.starts_with("tls.crt is a binary file (DER or PKCS #12); convert it to PEM"), "{fault}");
    let rsa = sample_pair("rsa2048");
    assert!(Folder::new(rsa.certificate, rsa.key).files().load(Timestamp::now()).is_ok());
    let marked = Folder::new(format!("\u{feff}{good}").replace('\n', "\r\n"), format!("\u{feff}{key}"));
    assert!(marked.files().load(Timestamp::now()).is_ok(), "an editor of another system");
}

#[test]
fn a_shorter_chain_with_another_issuer_does_not_replace_a_longer_one() {
    let root = authority("a root");
    let key = KeyPair::generate().unwrap();
    let intermediate = CertifiedIssuer::signed_by(authority_params("an intermediate"), key, &root).unwrap();
    let issue = || issue(&intermediate, |_| {});
    let full = |pair: &Pair| format!("{}{}", pair.certificate, intermediate.pem());
    let first = issue();
    let folder = Folder::new(full(&first), &first.key);
    let server = Server::load(folder.files()).unwrap();
    assert_eq!(server.identity().unknown_issuer.as_deref(), Some("CN=a root"));

    // Renewed without the intermediate certificate.
    let second = issue();
    folder.write("tls.crt", &second.certificate);
    folder.write("tls.key", &second.key);
    let error = server.reload().unwrap_err().to_string();
    assert!(
        error.contains("has 1 certificates where the one in use has 2, and ends with an unknown issuer"),
        "{error}"
    );
    assert!(error.contains("CN=an intermediate") && error.contains("restart the relay"), "{error}");
    assert_eq!(server.identity().length, 2, "the old one stays");
    folder.write("tls.crt", full(&second));
    server.reload().unwrap();
    // Shorter, and issued by the same authority as the last certificate before.
    let direct = self::issue(&root, |_| {});
    folder.write("tls.crt", &direct.certificate);
    folder.write("tls.key", &direct.key);
    server.reload().unwrap();
    assert_eq!(server.identity().length, 1);
    // The issuer of a self-signed certificate is in the file.
    let own = authority("its own");
    assert_eq!(unknown_issuer(&[own.der().clone()], Path::new("x")), None);
}

/// A server that shows any certificate, also one that rustls would not load.
fn server(certificate: &str, key: &str, clients: Option<&str>) -> ServerConfig {
    let chain: Vec<_> = CertificateDer::pem_slice_iter(certificate.as_bytes()).collect::<Result<_, _>>().unwrap();
    let key = PROVIDER.key_provider.load_private_key(PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap()).unwrap();
    let builder = ServerConfig::builder_with_provider(Arc::clone(&PROVIDER)).with_safe_default_protocol_versions();
    let builder = match clients {
        None => builder.unwrap().with_no_client_auth(),
        Some(clients) => {
            let roots = Arc::new(roots(clients));
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(&PROVIDER)).build().unwrap();
            builder.unwrap().with_client_cert_verifier(verifier)
        }
    };
    let certified = CertifiedKey::new(chain, key);
    builder.with_cert_resolver(Arc::new(SingleCertAndKey::from(certified)))
}

fn roots(pem: &str) -> RootCertStore {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(pem.as_bytes()) {
        roots.add(certificate.unwrap()).unwrap();
    }
    roots
}

fn client(trusted: &str) -> ClientConfig {
    let builder = ClientConfig::builder_with_provider(Arc::clone(&PROVIDER)).with_safe_default_protocol_versions();
    builder.unwrap().with_root_certificates(roots(trusted)).with_no_client_auth()
}

/// What client and server say about a handshake that fails.
async fn faults(server: ServerConfig, client: ClientConfig) -> (String, String) {
    let (near, far) = duplex(64 * 1024);
    let connecting = async {
        let connector = TlsConnector::from(Arc::new(client));
        let mut stream = match connector.connect("localhost".try_into().unwrap(), near).await {
            Ok(stream) => stream,
            Err(error) => return explain(&error, Peer::Server),
        };
        // In TLS 1.3 the server may refuse a client that has completed its handshake.
        stream.read_u8().await.err().map(|error| explain(&error, Peer::Server)).unwrap_or_default()
    };
    let accepting = async {
        let accepted = TlsAcceptor::from(Arc::new(server)).accept(far).await;
        accepted.err().map(|error| explain(&error, Peer::Client)).unwrap_or_default()
    };
    tokio::join!(connecting, accepting)
}

#[tokio::test]
async fn faults_of_a_handshake_are_described_in_one_sentence() {
    let root = authority("the root");
    let good = issue(&root, |_| {});
    let changed = |change: fn(&mut CertificateParams)| issue(&root, change).certificate;
    let far_future = |params: &mut CertificateParams| params.not_before = rcgen::date_time_ymd(2900, 1, 1);
    let past = |params: &mut CertificateParams| params.not_after = rcgen::date_time_ymd(2000, 1, 1);
    let elsewhere = |params: &mut CertificateParams| {
        params.subject_alt_names = vec![rcgen::SanType::DnsName("rabbit.internal".try_into().unwrap())];
    };
    let nameless = |params: &mut CertificateParams| params.subject_alt_names.clear();
    let for_clients =
        |params: &mut CertificateParams| params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    let as_authority = |params: &mut CertificateParams| params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let (root, sample_root) = (root.pem(), sample("root.crt"));
    for (certificate, trusted, expected) in [
        (good.certificate.clone(), authority("another").pem(), "was not issued by a trusted authority: trust its"),
        (changed(past), root.clone(), "has expired, or this machine's clock is wrong"),
        (changed(far_future), root.clone(), "is not valid yet, or this machine's clock is wrong"),
        (changed(elsewhere), root.clone(), "is for another name: it has"),
        (changed(nameless), root.clone(), "is for another name: it has no name (subjectAltName); connect by"),
        (changed(for_clients), root.clone(), "is not for this use; its extension extendedKeyUsage must allow"),
        (changed(as_authority), root.clone(), "is one of an authority (CA:TRUE), such as openssl req -x509 makes"),
        (sample("v1.crt"), sample_root, "is of X.509 version 1; issue one with the extension subjectAltName"),
        (sample("by-p521.crt"), sample("p521-root.crt"), "was signed with an algorithm that is not supported, such as"),
        (sample("by-rsa1024.crt"), sample("rsa1024-root.crt"), "has a signature that does not match"),
    ] {
        let (fault, _) = faults(server(&certificate, &good.key, None), client(&trusted)).await;
        let expected = format!("the server's certificate {expected}");
        assert!(fault.starts_with(&expected), "{expected:?} is not the beginning of {fault:?}");
    }
    // Where the server requires a certificate, or refuses the one it gets.
    let asking = || server(&good.certificate, &good.key, Some(&root));
    let (by_client, by_server) = faults(asking(), client(&root)).await;
    assert_eq!(by_server, "the client showed no certificate, and one is required");
    assert!(by_client.starts_with("the server requires a certificate of the client: set broker.tls"), "{by_client}");
    let (_, by_server) = faults(server(&good.certificate, &good.key, None), client(&authority("x").pem())).await;
    assert!(by_server.starts_with("the client does not trust the relay's certificate: http.tls"), "{by_server}");
}

#[tokio::test]
async fn a_peer_without_tls_is_described() {
    let (near, mut far) = duplex(4096);
    far.write_all(b"AMQP\0\0\x09\x01").await.unwrap();
    let connector = TlsConnector::from(Arc::new(client(&authority("a root").pem())));
    let error = connector.connect("localhost".try_into().unwrap(), near).await.unwrap_err();
    let fault = explain(&error, Peer::Server);
    assert!(
        fault.starts_with("the server does not speak TLS on this port; RabbitMQ's port for amqps is usually"),
        "{fault}"
    );
}
