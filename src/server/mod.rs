//! An HTTP/1.1 server with limits: bind, accept, serve, drain. Knows nothing about the requests that it serves.

mod admission;
mod connection;
mod limits;
mod refusals;

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use hyper::body::{Body, Incoming};
use hyper::{Request, Response};
use thiserror::Error;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::warn;

pub use admission::{Admission, ConnectionCounts};
use admission::{Place, Trust};
pub use connection::{End, Protocol};
use limits::BodyError;
pub use limits::Limits;
use refusals::Refusals;

use crate::metrics::Metrics;
use crate::tls;

/// How long to wait for a free file descriptor after an error of `accept`.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A listener could not be bound.
#[derive(Debug, Error)]
#[error("cannot listen on {address} ({key}): {source}")]
pub struct BindError {
    address: SocketAddr,
    key: &'static str,
    source: io::Error,
}

/// The other end of a connection, as handlers see it.
#[derive(Clone)]
pub struct Peer {
    /// The peer's address.
    pub address: SocketAddr,
    /// The connection's place in the table; `None` if the connection is not one of a [`Server`].
    place: Option<Arc<Place>>,
}

impl Peer {
    /// Reports that the peer is a sender to trust: its connection is never evicted from now on.
    pub fn trust(&self) {
        if let Some(place) = &self.place {
            place.raise_to(Trust::TrustedSender);
        }
    }
}

impl From<SocketAddr> for Peer {
    fn from(address: SocketAddr) -> Self {
        Self { address, place: None }
    }
}

/// A bound listener.
pub struct Server {
    listener: TcpListener,
    context: Context,
}

/// What every connection uses.
#[derive(Clone)]
struct Context {
    admission: Arc<Admission>,
    protocol: Arc<Protocol>,
    tls: Option<Arc<tls::Server>>,
    refusals: Arc<Refusals>,
}

/// Binds an address, unless a bound socket was handed over. `key` is the configuration key, for the error.
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
    /// `name` is the name of the configuration section, for metrics and logs.
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

    /// The bound address, with the actual port if 0 was configured.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// The table of connections, for their counts.
    pub fn admission(&self) -> Arc<Admission> {
        Arc::clone(&self.context.admission)
    }

    /// Serves until `shutdown`, then accepts no new connection, finishes the requests in progress, and returns.
    /// Dropping the future cuts the connections.
    pub async fn run<H, F, B>(self, handler: H, shutdown: CancellationToken)
    where
        H: Fn(Request<Incoming>, Peer) -> F + Clone + Send + 'static,
        F: Future<Output = Response<B>> + Send + 'static,
        B: Body<Data = Bytes, Error: Into<BodyError>> + Send + 'static,
    {
        let Self { listener, context } = self;
        let mut connections = JoinSet::new();
        loop {
            // While all places belong to trusted senders, the kernel keeps new connections waiting.
            let accepted = async {
                context.admission.room().await;
                accept(&listener, &context).await
            };
            let (stream, address) = tokio::select! {
                accepted = accepted => accepted,
                // Removes the connections that have ended.
                Some(_) = connections.join_next() => continue,
                () = shutdown.cancelled() => break,
            };
            match context.admission.admit(address.ip(), Instant::now()) {
                Some(place) => {
                    let serving = context.clone().serve(stream, address, place, handler.clone(), shutdown.clone());
                    connections.spawn(serving);
                }
                None => context.refusals.on_end(&End::SourceFull, address),
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
        address: SocketAddr,
        place: Place,
        handler: H,
        shutdown: CancellationToken,
    ) where
        H: Fn(Request<Incoming>, Peer) -> F + Send + 'static,
        F: Future<Output = Response<B>> + Send + 'static,
        B: Body<Data = Bytes, Error: Into<BodyError>> + Send + 'static,
    {
        let place = Arc::new(place);
        let handler = {
            let place = Arc::clone(&place);
            move |request| {
                place.raise_to(Trust::Known);
                handler(request, Peer { address, place: Some(Arc::clone(&place)) })
            }
        };
        let identity = self.tls.as_ref().map(|tls| tls.identity().config);
        let end = tokio::select! {
            end = self.protocol.serve(stream, identity, handler, &shutdown) => end,
            () = connection::when_woken(place.evicted()) => End::Evicted,
        };
        match end {
            End::ProxyProtocol | End::TlsOnPlainPort => self.admission.refused_other_protocol(),
            End::TlsHandshake(_) | End::Malformed(_) => self.admission.failed(),
            _ => {}
        }
        self.refusals.on_end(&end, address);
    }
}

/// Accepts the next connection. Never fails: an error with one connection must not stop the listener.
async fn accept(listener: &TcpListener, context: &Context) -> (TcpStream, SocketAddr) {
    loop {
        match listener.accept().await {
            Ok(accepted) => return accepted,
            // The peer was gone before it was accepted.
            Err(error) if matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset) => {
            }
            Err(error) => {
                if let Some(unreported) = context.refusals.accept_error_due() {
                    warn!(
                        %error, unreported,
                        "cannot accept connections: closing one to free a file descriptor, then trying again"
                    );
                }
                // The process is most likely out of file descriptors.
                context.admission.evict_one(Instant::now());
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}
