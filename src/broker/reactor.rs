//! lapin's runtime: tokio, with a stream that may be TLS. lapin's own TLS would add a second way to read certificates
//! and about ninety crates.

use std::future::Future;
use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use async_compat::Compat;
use async_rs::Tokio;
use async_rs::traits::Reactor;
use futures_util::io::{AsyncRead, AsyncWrite};
use futures_util::{Stream as Items, TryFutureExt};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;
use tokio_util::either::Either;

use crate::first_bytes::Recorded;

/// A connection to the broker, with or without TLS.
pub(super) type Stream = Compat<Either<Recorded<TcpStream>, Box<TlsStream<TcpStream>>>>;

/// tokio's reactor with another stream type.
#[derive(Clone, Debug)]
pub(super) struct TlsReactor(pub Tokio);

impl Reactor for TlsReactor {
    type TcpStream = Stream;
    type Sleep = <Tokio as Reactor>::Sleep;

    fn register<H: Read + Write + AsFd + AsRawFd + Send + 'static>(
        &self,
        socket: H,
    ) -> io::Result<impl AsyncRead + AsyncWrite + Send + Unpin + 'static> {
        self.0.register(socket)
    }

    fn sleep(&self, duration: Duration) -> Self::Sleep {
        self.0.sleep(duration)
    }

    fn interval(&self, duration: Duration) -> impl Items<Item = Instant> + Send + 'static {
        self.0.interval(duration)
    }

    fn tcp_connect_addr(
        &self,
        address: SocketAddr,
    ) -> impl Future<Output = io::Result<Self::TcpStream>> + Send + 'static {
        TcpStream::connect(address).map_ok(|stream| Compat::new(Either::Left(Recorded::new(stream))))
    }
}
