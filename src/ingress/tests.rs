//! Whole connections, with arbitrary bytes, into the ingress and a real spool. A short form of the fuzz target
//! `request`, for stable Rust.

use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
use tokio::runtime::Runtime;

use super::*;
use crate::config::{Config, Purpose};
use crate::secret::Secret;
use crate::server::Protocol;
use crate::signature::sign;
use crate::spool::{Durability, dedupe, subjects};

const PEER: SocketAddr = SocketAddr::new(IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 1);
const SECRET: &str = "whsec_test";
const BODY: &str = r#"{"eventType":"scan.processing.started","payload":{"scanId":"s"}}"#;

struct TestIngress {
    runtime: Runtime,
    ingress: Arc<Ingress>,
    protocol: Protocol,
    spool: Spool,
    _folder: tempfile::TempDir,
}

impl TestIngress {
    fn new() -> Self {
        Self::with(None, 1 << 30)
    }

    fn with(subjects: Option<&subjects::Settings>, max_bytes: u64) -> Self {
        let folder = tempfile::TempDir::new().unwrap();
        let mut config = Config::load(None, [], Purpose::Client).unwrap();
        config.spool.path = folder.path().join("spool.db");
        config.spool.durability = Durability::Process;
        config.spool.max_bytes = max_bytes;
        config.http.listen = SocketAddr::new(PEER.ip(), 0);
        let runtime = Runtime::new().unwrap();
        let (ingress, protocol, spool) = runtime.block_on(async {
            let metrics = Arc::new(Metrics::new());
            let dedupe = dedupe::Settings { window: Duration::from_secs(60), entries_max: 100 };
            let (spool, _) = Spool::open(&config.spool, &dedupe, subjects, Arc::clone(&metrics)).unwrap();
            let verifier = Arc::new(Verifier::new(&[Secret::new(SECRET)], true, Duration::from_secs(300)));
            let traces = Arc::new(Traces::new(&config.traces).unwrap());
            let parts = Parts {
                verifier,
                spool: spool.clone(),
                recent: Arc::default(),
                drift: Arc::default(),
                traces,
                metrics,
            };
            let protocol = Protocol::new(&limits(&config.http));
            let listener = TcpListener::bind(config.http.listen).await.unwrap();
            (Ingress::new(config.http, listener, None, parts, CancellationToken::new()), protocol, spool)
        });
        Self { runtime, ingress: Arc::new(ingress), protocol, spool, _folder: folder }
    }

    /// Sends `input`, closes that side, and returns the statuses that came back over HTTP/1.
    fn send(&self, input: &[u8]) -> Vec<String> {
        let (near, far) = duplex(64 * 1024);
        let ingress = Arc::clone(&self.ingress);
        let handler = move |request| {
            let ingress = Arc::clone(&ingress);
            async move { ingress.answer(request, PEER).await }
        };
        let answer = self.runtime.block_on(async {
            let shutdown = CancellationToken::new();
            let (mut from, mut to) = tokio::io::split(near);
            let writing = async move {
                // The relay may have closed the connection.
                let _ = to.write_all(input).await;
                let _ = to.shutdown().await;
            };
            let mut answer = Vec::new();
            let serving = self.protocol.speak(far, handler, &shutdown);
            tokio::join!(serving, writing, from.read_to_end(&mut answer)).2.unwrap();
            answer
        });
        let answer = String::from_utf8_lossy(&answer).into_owned();
        let heads = answer.match_indices("HTTP/1.1 ");
        heads
            .map(|(at, head)| answer.get(at + head.len()..at + head.len() + 3).unwrap_or_default().to_owned())
            .collect()
    }

    fn accepted(&self) -> u64 {
        self.runtime.block_on(self.spool.flush());
        self.spool.status().ledger().accepted
    }
}

fn request(lines: &str, body: &[u8], secret: &str) -> Vec<u8> {
    let timestamp = Timestamp::now().to_string();
    let signature = sign(&Secret::new(secret), &timestamp, body);
    let head = format!(
        "POST /webhooks/prism HTTP/1.1\r\nhost: r\r\n\
         {TIMESTAMP_HEADER}: {timestamp}\r\n{SIGNATURE_HEADER}: {signature}\r\n\
         {lines}content-length: {}\r\n\r\n",
        body.len()
    );
    [head.as_bytes(), body].concat()
}

#[test]
fn signed_webhooks_are_accepted_and_others_refused() {
    let ingress = TestIngress::new();
    assert_eq!(ingress.send(&request("", BODY.as_bytes(), SECRET)), ["200"]);
    assert_eq!(ingress.send(&request("", BODY.as_bytes(), "whsec_other")), ["401"]);
    assert_eq!(ingress.accepted(), 1);
}

#[test]
fn the_subjects_of_refused_webhooks_are_hints() {
    let settings = subjects::Settings { max: 10, keep: Duration::from_secs(60) };
    for (settings, max_bytes, secret, status, expected) in [
        (Some(&settings), 1 << 20, SECRET, "200", [0, 0]),
        (Some(&settings), 1 << 20, "whsec_other", "401", [0, 1]),
        (Some(&settings), 1, SECRET, "503", [1, 0]),
        (None, 1 << 20, "whsec_other", "401", [0, 0]),
    ] {
        let ingress = TestIngress::with(settings, max_bytes);
        assert_eq!(ingress.send(&request("", BODY.as_bytes(), secret)), [status]);
        // Sent again, and bodies that name no subject.
        for body in [BODY, "{}", r#"{"eventType":"scan.processing.started","payload":{}}"#] {
            ingress.send(&request("", body.as_bytes(), secret));
        }
        let hints = ingress.runtime.block_on(async {
            ingress.spool.flush().await;
            let mut counts = [0; 2];
            for (count, trust) in counts.iter_mut().zip([HintTrust::Signed, HintTrust::Unsigned]) {
                *count = ingress.spool.hints(trust, i64::MAX, 10).await.unwrap().len();
            }
            counts
        });
        assert_eq!(hints, expected, "{status}");
    }
}

#[test]
fn nothing_is_accepted_without_the_secret_and_nothing_panics() {
    let ingress = TestIngress::new();
    let pieces = prop_oneof![
        proptest::collection::vec(any::<u8>(), 0..200),
        Just(request("", BODY.as_bytes(), "whsec_other")),
        Just(request("transfer-encoding: chunked\r\n", BODY.as_bytes(), "whsec_other")),
        Just(request("expect: 100-continue\r\n", BODY.as_bytes(), "whsec_other")),
        Just(b"GET /healthz HTTP/1.1\r\nhost: r\r\n\r\n".to_vec()),
        Just(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0".to_vec()),
        "[ -~\r\n]{0,100}".prop_map(String::into_bytes),
    ];
    let connections = (proptest::collection::vec(pieces, 1..4), any::<prop::sample::Index>(), any::<u8>());
    proptest!(ProptestConfig::with_cases(300), |((pieces, place, flip) in connections)| {
        let mut input = pieces.concat();
        if !input.is_empty() {
            let place = place.index(input.len());
            input[place] ^= flip;
        }
        let known = ["100", "200", "400", "401", "404", "405", "408", "413", "414", "431", "505"];
        for status in ingress.send(&input) {
            prop_assert!(known.contains(&status.as_str()), "{}", status);
        }
        prop_assert_eq!(ingress.accepted(), 0);
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]
    #[test]
    fn every_signed_body_is_accepted_and_stored_unchanged(body in proptest::collection::vec(any::<u8>(), 0..500)) {
        let ingress = TestIngress::new();
        prop_assert_eq!(ingress.send(&request("", &body, SECRET)), ["200"]);
        let pending = ingress.runtime.block_on(ingress.spool.pending_after(0, 10)).unwrap();
        prop_assert_eq!(&*pending.events[0].event.body, body.as_slice());
    }
}
