//! A certificate authority for tests, and the certificates that it signs.

use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose,
};

/// The host name in the suite's certificates. No certificate contains the address, 127.0.0.1.
const NAME: &str = "localhost";

pub struct Authority(CertifiedIssuer<'static, KeyPair>);

/// A certificate and its private key, both PEM.
#[derive(Clone)]
pub struct Issued {
    pub certificate: String,
    pub private_key: String,
}

impl Authority {
    pub fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).expect("no names");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        // A unique name: with a shared name, clients would report a bad signature in place of an unknown issuer.
        params.distinguished_name.push(DnType::CommonName, uuid::Uuid::now_v7().to_string());
        let key = KeyPair::generate().expect("a key");
        Self(CertifiedIssuer::self_signed(params, key).expect("a certificate of an authority"))
    }

    /// The authority's own certificate, PEM.
    pub fn pem(&self) -> String {
        self.0.pem()
    }

    /// A certificate for a server at [`NAME`], or for a client with this common name. It expires in `days`; if that is
    /// negative, it has expired.
    pub fn issue(&self, common_name: &str, days: i32) -> Issued {
        self.issue_from(common_name, -1000, days)
    }

    /// As [`Self::issue`], valid from `from` days after now.
    pub fn issue_from(&self, common_name: &str, from: i32, days: i32) -> Issued {
        let mut params = CertificateParams::new(vec![NAME.to_owned()]).expect("a name");
        params.distinguished_name.push(DnType::CommonName, common_name);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let now = std::time::SystemTime::now();
        let at = |days: i32| {
            let span = Duration::from_secs(24 * 3600) * days.unsigned_abs();
            if days < 0 { now - span } else { now + span }
        };
        params.not_before = at(from).into();
        params.not_after = at(days).into();
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.0).expect("a certificate");
        Issued { certificate: certificate.pem(), private_key: key.serialize_pem() }
    }

    /// A certificate for a server, valid for a year.
    pub fn issue_server(&self) -> Issued {
        self.issue("a server of the suite", 365)
    }
}
