//! Whole connections into the ingress and its spool: no panic, every status is in the contract, and only
//! a webhook that is answered 200 is stored.
//!
//! Input: what a client sends before it closes its side.
#![no_main]

use std::cell::RefCell;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use prism_relay::config::{Config, Purpose};
use prism_relay::ingress::{Ingress, Parts};
use prism_relay::metrics::Metrics;
use prism_relay::server::{Limits, Protocol};
use prism_relay::signature::Verifier;
use prism_relay::traces::Traces;
use prism_relay::spool::{Durability, Settlement, Spool, WriterEnd, dedupe, subjects};
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
use tokio::runtime::{Builder, Runtime};
use tokio_util::sync::CancellationToken;

const PEER: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 1);

/// The statuses of the contract, and those of hyper for heads that it cannot read.
const STATUSES: [&str; 13] =
    ["100", "200", "400", "401", "403", "404", "405", "408", "413", "414", "422", "431", "503"];

struct Relay {
    runtime: Runtime,
    ingress: Arc<Ingress>,
    protocol: Protocol,
    spool: Spool,
    _end: WriterEnd,
    _folder: tempfile::TempDir,
}

thread_local! {
    static RELAY: RefCell<Relay> = RefCell::new(Relay::start());
}

impl Relay {
    fn start() -> Self {
        let folder = tempfile::TempDir::new().unwrap();
        let mut config = Config::load(None, [], Purpose::Client).unwrap();
        config.spool.path = folder.path().join("spool.db");
        config.spool.durability = Durability::Process;
        config.http.listen = SocketAddr::new(PEER.ip(), 0);
        config.http.body_bytes_max = 4096;
        config.http.trusted_proxies = vec!["127.0.0.1/32".parse().unwrap()];
        let limits = Limits {
            connections_max: 1,
            connections_per_source_max: 1,
            unlimited_sources: Vec::new(),
            header_timeout: Duration::from_secs(1),
            idle_timeout: Duration::from_secs(1),
            write_timeout: Duration::from_secs(1),
            headers_max: 16,
            header_bytes_max: 8192,
        };
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        let guard = runtime.enter();
        let metrics = Arc::new(Metrics::new());
        let dedupe = dedupe::Settings { window: Duration::from_secs(60), entries_max: 100 };
        let subjects = subjects::Settings { max: 100, keep: Duration::from_secs(60) };
        let (spool, end) = Spool::open(&config.spool, &dedupe, Some(&subjects), Arc::clone(&metrics)).unwrap();
        // Without a secret, so that bodies get through to the spool.
        let verifier = Arc::new(Verifier::new(&[], false, Duration::from_secs(300)));
        let traces = Arc::new(Traces::new(&config.traces).unwrap());
        let (recent, drift) = (Arc::default(), Arc::default());
        let parts = Parts { verifier, spool: spool.clone(), recent, drift, traces, metrics };
        let listener = runtime.block_on(tokio::net::TcpListener::bind(config.http.listen)).unwrap();
        let ingress = Arc::new(Ingress::new(config.http, listener, None, parts, CancellationToken::new()));
        drop(guard);
        Self { runtime, ingress, protocol: Protocol::new(&limits), spool, _end: end, _folder: folder }
    }

    /// Sends the input and returns the answers.
    fn converse(&self, input: &[u8]) -> Vec<u8> {
        let (near, far) = duplex(64 * 1024);
        let ingress = Arc::clone(&self.ingress);
        let handler = move |request| {
            let ingress = Arc::clone(&ingress);
            async move { ingress.answer(request, PEER).await }
        };
        self.runtime.block_on(async {
            let shutdown = CancellationToken::new();
            let serving = self.protocol.speak(far, handler, &shutdown);
            let (mut from, mut to) = tokio::io::split(near);
            let writing = async move {
                let _ = to.write_all(input).await;
                let _ = to.shutdown().await;
            };
            let mut answer = Vec::new();
            tokio::join!(serving, writing, from.read_to_end(&mut answer)).2.unwrap();
            answer
        })
    }

    /// Settles all accepted events as delivered, to make room for more. Returns their number.
    fn deliver(&self) -> usize {
        self.runtime.block_on(async {
            // Events of this input must not be counted for the next one.
            self.spool.flush().await;
            let pending = self.spool.pending_after(0, 1000).await.unwrap().events;
            self.spool.settle(pending.iter().map(|stored| Settlement::Confirmed(stored.seq)).collect()).await;
            self.spool.flush().await;
            pending.len()
        })
    }
}

fuzz_target!(|input: &[u8]| {
    RELAY.with_borrow(|relay| {
        let answer = String::from_utf8_lossy(&relay.converse(input)).into_owned();
        for (at, head) in answer.match_indices("HTTP/1.") {
            // Not in a body that quotes it.
            if at == 0 || answer[..at].ends_with("\r\n\r\n") || answer[..at].ends_with('}') {
                let status = answer.get(at + head.len() + 2..at + head.len() + 5).unwrap_or_default();
                assert!(STATUSES.contains(&status), "{status:?} in {answer}");
            }
        }
        let (delivered, acknowledged) = (relay.deliver(), answer.matches("{\"ok\":true").count());
        assert!(delivered <= acknowledged, "{delivered} of {acknowledged}: {answer}");
    });
});
