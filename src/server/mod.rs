//! An HTTP/1.1 server with limits: bind, accept, serve, drain. It knows nothing of what it serves.

mod admission;
mod connection;
mod refusals;

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use hyper::body::{Body, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response};
use ipnet::IpNet;
use thiserror::Error;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::warn;

pub use admission::{Admission, Census};
use admission::{Admitted, Place, Standing};
pub use connection::{Activity, End, Protocol};
use refusals::Refusals;

use crate::metrics::Metrics;
use crate::tls;

/// What an answer that goes on may break off with.
type BodyError = Box<dyn std::error::Error + Send + Sync>;

/// When the process has no file descriptor left, one may be free after this time.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The address could not be taken.
#[derive(Debug, Error)]
#[error("cannot listen on {address} ({key}): {source}")]
pub struct BindError {
    address: SocketAddr,
    key: &'static str,
    source: io::Error,
}

/// An answer with this extension tells that its sender is who it should be: the connection is trusted from then on.
#[derive(Clone, Copy)]
pub struct Vouched;

/// What clients may take.
#[derive(Clone, Debug)]
pub struct Limits {
    pub connections_max: usize,
    /// Of one IPv4 address or IPv6 /64.
    pub connections_per_source_max: usize,
    /// Peers that the limit for a source does not concern: proxies.
    pub unlimited_sources: Vec<IpNet>,
    /// For a TLS handshake, for a request head, and for a connection without a request.
    pub header_timeout: Duration,
    /// For a client that reads none of its answer.
    pub write_timeout: Duration,
    pub headers_max: usize,
    /// Of a request head.
    pub header_bytes_max: usize,
}

/// A bound listener.
pub struct Server {
    listener: TcpListener,
    context: Context,
}

/// What every connection needs.
#[derive(Clone)]
struct Context {
    admission: Arc<Admission>,
    protocol: Arc<Protocol>,
    tls: Option<Arc<tls::Server>>,
    refusals: Arc<Refusals>,
}

/// Binds an address, unless there is a socket already. `key` is the configuration's name of the address, for the error.
pub async fn listen(
    address: SocketAddr,
    key: &'static str,
    handed_over: Option<std::net::TcpListener>,
) -> Result<TcpListener, BindError> {
    let listener = match handed_over {
        Some(socket) => socket.set_nonblocking(true).and_then(|()| TcpListener::from_std(socket)),
        None => TcpListener::bind(address).await,
    };
    listener.map_err(|source| BindError { address, key, source })
}

impl Server {
    /// `name` is that of the configuration's section, for metrics and logs.
    pub fn new(
        listener: TcpListener,
        name: &'static str,
        limits: Limits,
        tls: Option<Arc<tls::Server>>,
        metrics: &Metrics,
    ) -> Self {
        let protocol = Arc::new(Protocol::new(&limits));
        let Limits { connections_max, connections_per_source_max, unlimited_sources, .. } = limits;
        let admission = Admission::new(connections_max, connections_per_source_max, unlimited_sources);
        let refusals = Arc::new(Refusals::new(name, metrics));
        Self { listener, context: Context { admission, protocol, tls, refusals } }
    }

    /// Where it listens: the port that was given if 0 was asked for.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// The table of connections, to be looked at.
    pub fn admission(&self) -> Arc<Admission> {
        Arc::clone(&self.context.admission)
    }

    /// Serves until `shutdown`, then takes no new connection, finishes the requests under way, and returns. Dropping the
    /// future cuts the connections.
    pub async fn run<H, F, B>(self, handler: H, shutdown: CancellationToken)
    where
        H: Fn(Request<Incoming>, SocketAddr) -> F + Clone + Send + 'static,
        F: Future<Output = Response<B>> + Send + 'static,
        B: Body<Data = Bytes, Error: Into<BodyError>> + Send + 'static,
    {
        let Self { listener, context } = self;
        let mut connections = JoinSet::new();
        loop {
            // Where everybody is established nobody is accepted: the kernel keeps the next ones waiting.
            let accepted = async {
                context.admission.room().await;
                accept(&listener, &context).await
            };
            let (stream, peer) = tokio::select! {
                accepted = accepted => accepted,
                // Reaps the connections that have ended.
                Some(_) = connections.join_next() => continue,
                () = shutdown.cancelled() => break,
            };
            match context.admission.admit(peer.ip(), Instant::now()) {
                Admitted::Yes { place, evicted } => {
                    if evicted {
                        context.refusals.on_end(&End::Evicted, peer);
                    }
                    connections.spawn(context.clone().serve(stream, peer, place, handler.clone(), shutdown.clone()));
                }
                Admitted::SourceFull => context.refusals.on_end(&End::SourceFull, peer),
            }
        }
        drop(listener);
        while connections.join_next().await.is_some() {}
    }
}

impl Context {
    async fn serve<H, F, B>(
        self,
        stream: TcpStream,
        peer: SocketAddr,
        place: Place,
        handler: H,
        shutdown: CancellationToken,
    ) where
        H: Fn(Request<Incoming>, SocketAddr) -> F + Send + 'static,
        F: Future<Output = Response<B>> + Send + 'static,
        B: Body<Data = Bytes, Error: Into<BodyError>> + Send + 'static,
    {
        let place = Arc::new(place);
        let activity = Arc::new(Activity::new());
        let service = service_fn({
            let (place, activity) = (Arc::clone(&place), Arc::clone(&activity));
            move |request: Request<Incoming>| {
                let (under_way, first) = activity.begin();
                if first {
                    place.rise_to(Standing::Known);
                }
                let response = handler(request, peer);
                let (place, activity) = (Arc::clone(&place), Arc::clone(&activity));
                async move {
                    let response = response.await;
                    drop(under_way);
                    if response.extensions().get::<Vouched>().is_some() && activity.trust() {
                        place.rise_to(Standing::Trusted);
                    }
                    Ok::<_, Infallible>(response)
                }
            }
        });
        let identity = self.tls.as_ref().map(|tls| tls.identity().config);
        let end = tokio::select! {
            end = self.protocol.serve(stream, identity, service, &activity, &shutdown) => end,
            // Whoever took the place has been told of.
            () = place.evicted() => return,
        };
        self.refusals.on_end(&end, peer);
    }
}

/// Never fails: what goes wrong with one connection is no reason to stop taking others.
async fn accept(listener: &TcpListener, context: &Context) -> (TcpStream, SocketAddr) {
    loop {
        match listener.accept().await {
            Ok(accepted) => return accepted,
            // The peer was gone before it was accepted.
            Err(error) if matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset) => {
            }
            Err(error) => {
                if let Some(unreported) = context.refusals.accept_error_due() {
                    warn!(%error, unreported, "cannot accept connections");
                }
                // Most likely the process is out of file descriptors, which is as good as out of places.
                if context.admission.evict_one(Instant::now()) {
                    context.refusals.on_eviction();
                }
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}
