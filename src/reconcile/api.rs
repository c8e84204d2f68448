//! Requests to Prism's API: the key, the address, the limits. What an answer means is not known here.

use std::sync::{PoisonError, RwLock};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::Request;
use hyper::header::{ACCEPT, AUTHORIZATION, HeaderValue, USER_AGENT};
use jiff::Timestamp;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, PercentEncode, utf8_percent_encode};

use super::answer::{Prediction, Reply, Scan};
use super::settings::ApiUrl;
use crate::http_client::{HttpClient, Limits, answer_of, public_client};
use crate::secret::Secret;
use crate::tls::Peer;

/// A scan has a few hundred bytes, and links to its files.
const LIMITS: Limits = Limits { deadline: Duration::from_secs(10), bytes_max: 1024 * 1024 };

/// The version of the API that is documented in Prism's OpenAPI document.
const VERSION: &str = "application/json;v=1";

/// A scan that does not exist: a right key is answered 404, a wrong one 401.
const NO_SCAN: &str = "00000000-0000-0000-0000-000000000000";

/// All but the unreserved characters (RFC 3986, section 2.3).
const SEGMENT: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');

/// Prism's API, and the key to it.
pub(super) struct PrismApi {
    url: ApiUrl,
    key: RwLock<Secret>,
}

impl PrismApi {
    pub(super) fn new(url: ApiUrl, key: Secret) -> Self {
        Self { url, key: RwLock::new(key) }
    }

    pub(super) fn set_key(&self, key: Secret) {
        *self.key.write().unwrap_or_else(PoisonError::into_inner) = key;
    }

    /// Whether answers come over TLS.
    pub(super) fn is_tls(&self) -> bool {
        self.url.is_tls()
    }

    /// A client for some requests. Authorities that the system gets later count for the next one.
    pub(super) async fn client(&self) -> Result<HttpClient, String> {
        public_client(self.url.is_tls()).await
    }

    /// Asks for a scan.
    pub(super) async fn scan(&self, client: &HttpClient, id: &str) -> Reply<Scan> {
        self.get(client, &format!("/scans/{}", encoded(id))).await.read(|body| Scan::read(body, id))
    }

    /// Asks for a prediction.
    pub(super) async fn prediction(&self, client: &HttpClient, id: &str) -> Reply<Prediction> {
        let reply = self.get(client, &format!("/body-shape-prediction/{}", encoded(id))).await;
        reply.read(|body| Prediction::read(body, id))
    }

    /// Whether the API takes the key: its status for a scan that does not exist.
    pub(super) async fn probe(&self) -> Result<u16, String> {
        let client = self.client().await?;
        let answer = answer_of(&client, self.request(&format!("/scans/{NO_SCAN}"))?, &LIMITS, Peer::WebServer).await;
        answer.map(|answer| answer.status().as_u16())
    }

    async fn get(&self, client: &HttpClient, path: &str) -> Reply<Bytes> {
        let request = match self.request(path) {
            Ok(request) => request,
            Err(error) => return Reply::Unusable(error),
        };
        match answer_of(client, request, &LIMITS, Peer::WebServer).await {
            Ok(response) => Reply::of(response, Timestamp::now()),
            Err(error) => Reply::Silent(format!("no answer from Prism's API: {error}")),
        }
    }

    fn request(&self, path: &str) -> Result<Request<Full<Bytes>>, String> {
        let mut authorization = {
            let key = self.key.read().unwrap_or_else(PoisonError::into_inner);
            HeaderValue::try_from(format!("Bearer {}", key.expose())).map_err(|error| error.to_string())?
        };
        authorization.set_sensitive(true);
        Request::get(format!("{}{path}", self.url.as_str()))
            .header(AUTHORIZATION, authorization)
            .header(ACCEPT, VERSION)
            .header(USER_AGENT, concat!("prism-relay/", env!("CARGO_PKG_VERSION")))
            .body(Full::default())
            .map_err(|error| error.to_string())
    }
}

/// An id as one segment of a path.
fn encoded(id: &str) -> PercentEncode<'_> {
    utf8_percent_encode(id, SEGMENT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_one_segment_of_the_path() {
        assert_eq!(encoded("7f2ec6e0-b06d_x.~").to_string(), "7f2ec6e0-b06d_x.~");
        assert_eq!(encoded("../users?x=1#y%2f").to_string(), "..%2Fusers%3Fx%3D1%23y%252f");
    }

    #[test]
    fn a_request_has_key_and_version_and_shows_no_key() {
        let url = ApiUrl::parse("https://api.hosted.prismlabs.tech/").unwrap();
        let api = PrismApi::new(url, Secret::new("old-key-0123456789"));
        api.set_key(Secret::new("new-key-0123456789"));
        let request = api.request("/scans/s1").unwrap();
        assert_eq!(request.uri(), "https://api.hosted.prismlabs.tech/scans/s1");
        assert_eq!(request.headers()[AUTHORIZATION], "Bearer new-key-0123456789");
        assert_eq!(request.headers()[ACCEPT], "application/json;v=1");
        assert!(!format!("{request:?}").contains("new-key"), "{request:?}");
    }
}
