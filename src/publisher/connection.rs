//! One connection to the broker, with a deadline on everything and a wire that can be cut.
//!
//! lapin runs a thread for each connection, which ends only with its socket: a broker that accepts and says nothing,
//! or one that blocks publishers, would keep it for ever. So the socket is ours, and letting go of a [`Link`] shuts it
//! down.

use std::io;
use std::net::{Shutdown, SocketAddr};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_compat::Compat;
use async_rs::util::RuntimeParts;
use lapin::{AsyncTcpStream, Connection, ConnectionProperties, ErrorKind};
use socket2::{SockRef, TcpKeepalive};
use thiserror::Error;
use tokio::net::{TcpStream, lookup_host};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::ClientConfig;
use tokio_util::either::Either;

use super::reactor::{OwnReactor, Stream};
use crate::config::BrokerUrl;
use crate::tls;

/// How long a polite goodbye may take. A broker that blocks publishers does not answer it at all.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// The broker could not be reached, or did not let us in.
#[derive(Debug, Error)]
pub enum ConnectError {
    #[error("cannot reach {host}:{port}: {source}")]
    Tcp { host: String, port: u16, source: std::io::Error },
    #[error("no TLS with {host}:{port} as {server_name}: {source}")]
    Tls { host: String, port: u16, server_name: String, source: std::io::Error },
    #[error("no answer from {url} within {timeout:?}")]
    Timeout { url: String, timeout: Duration },
    #[error("{url} closed the connection during the login: wrong user, password or virtual host? ({source})")]
    Refused { url: String, source: lapin::Error },
    #[error("the AMQP handshake with {url} failed: {source}")]
    Handshake { url: String, source: lapin::Error },
}

/// An open connection; dropping it cuts the wire.
pub struct Link {
    /// Where it leads.
    pub url: BrokerUrl,
    pub connection: Connection,
    socket: Wire,
}

/// A second handle on the socket that lapin reads and writes.
struct Wire(std::net::TcpStream);

impl Drop for Wire {
    fn drop(&mut self) {
        // An error means that it is down already.
        let _ = self.0.shutdown(Shutdown::Both);
    }
}

/// Tries one address after the other. Each but the last has its share of the time, because one that is cut off may never answer.
async fn reach(addresses: Vec<SocketAddr>, deadline: Duration) -> io::Result<TcpStream> {
    let count = u32::try_from(addresses.len()).unwrap_or(u32::MAX);
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for (index, address) in (1..).zip(addresses) {
        let share = if index < count { deadline / count } else { deadline };
        match timeout(share, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(error)) => last = error,
            Err(_) => last = io::ErrorKind::TimedOut.into(),
        }
    }
    Err(last)
}

/// How to speak TLS with the broker.
#[derive(Clone)]
pub(super) struct Tls {
    pub config: Arc<ClientConfig>,
    /// What has to stand in the broker's certificate.
    pub server_name: String,
}

impl Link {
    /// Connects and logs in within `deadline`.
    pub(super) async fn open(
        url: &BrokerUrl,
        tls: Option<Tls>,
        name: &str,
        deadline: Duration,
    ) -> Result<Self, ConnectError> {
        timeout(deadline, Self::connect(url, tls, name, deadline))
            .await
            .unwrap_or_else(|_| Err(ConnectError::Timeout { url: url.to_string(), timeout: deadline }))
    }

    async fn connect(url: &BrokerUrl, tls: Option<Tls>, name: &str, deadline: Duration) -> Result<Self, ConnectError> {
        let tcp = |source| ConnectError::Tcp { host: url.host().to_owned(), port: url.port(), source };
        let addresses = lookup_host((url.host(), url.port())).await.map_err(tcp)?.collect();
        let stream = reach(addresses, deadline).await.map_err(tcp)?;
        stream.set_nodelay(true).map_err(tcp)?;
        // The heartbeat finds a dead peer sooner; this is for the time before the login and while blocked.
        SockRef::from(&stream)
            .set_tcp_keepalive(&TcpKeepalive::new().with_time(Duration::from_secs(30)))
            .map_err(tcp)?;
        let socket = Wire(stream.as_fd().try_clone_to_owned().map_err(tcp)?.into());

        let stream = match (url.wants_tls(), tls) {
            (false, _) => Either::Left(stream),
            (true, Some(tls)) => Either::Right(Box::new(handshake(stream, tls, url).await?)),
            (true, None) => return Err(tcp(std::io::Error::other("there is no TLS configuration"))),
        };
        let stream: Mutex<Option<Stream>> = Mutex::new(Some(Compat::new(stream)));
        let connect = async move |_uri, _runtime| {
            let stream = stream.lock().ok().and_then(|mut stream| stream.take());
            // Without recovery lapin connects once.
            let stream = stream
                .ok_or_else(|| lapin::Error::from(ErrorKind::InvalidConnectionState(lapin::ConnectionState::Closed)))?;
            Ok(AsyncTcpStream::Plain(stream))
        };
        let tokio = async_rs::Tokio::current();
        let runtime = async_rs::Runtime::new(RuntimeParts::new(tokio.clone(), OwnReactor(tokio)));
        let properties = ConnectionProperties::default()
            .with_connection_name(name.into())
            .with_client_property("product".into(), "prism-relay".into())
            .with_client_property("version".into(), env!("CARGO_PKG_VERSION").into());
        let connection = Connection::connector(url.expose().clone(), runtime, connect, properties)
            .await
            .map_err(|source| explain(url, source))?;
        Ok(Self { url: url.clone(), connection, socket })
    }

    /// Says goodbye if the broker listens, and cuts the wire.
    pub async fn close(self) {
        let goodbye = self.connection.close(200, "OK".into());
        if !matches!(timeout(CLOSE_TIMEOUT, goodbye).await, Ok(Ok(()))) {
            tracing::debug!("the broker did not answer the close");
        }
    }

    /// Cuts the wire: whatever waits for the broker fails at once.
    pub fn cut(&self) {
        let _ = self.socket.0.shutdown(Shutdown::Both);
    }
}

async fn handshake(
    stream: TcpStream,
    Tls { config, server_name }: Tls,
    url: &BrokerUrl,
) -> Result<tokio_rustls::client::TlsStream<TcpStream>, ConnectError> {
    let failed = |source| {
        let (host, port, server_name) = (url.host().to_owned(), url.port(), server_name.clone());
        ConnectError::Tls { host, port, server_name, source }
    };
    let name = tls::server_name(&server_name)
        .ok_or_else(|| failed(std::io::Error::new(std::io::ErrorKind::InvalidInput, "that is no host name")))?;
    TlsConnector::from(config).connect(name, stream).await.map_err(failed)
}

/// A broker that does not know the user or the virtual host says so, or just hangs up.
fn explain(url: &BrokerUrl, source: lapin::Error) -> ConnectError {
    let url = url.to_string();
    let refused = matches!(crate::topology::reply_code(&source), Some(403 | 530));
    if refused { ConnectError::Refused { url, source } } else { ConnectError::Handshake { url, source } }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    #[tokio::test]
    async fn an_address_that_does_not_answer_keeps_nobody_from_the_next_one() {
        // Linux drops what comes to a listener whose queue is full.
        let silent = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        silent.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into()).unwrap();
        silent.listen(0).unwrap();
        let hole = silent.local_addr().unwrap().as_socket().unwrap();
        let _queued = TcpStream::connect(hole).await.unwrap();
        let broker = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let healthy = broker.local_addr().unwrap();
        let stream = reach(vec![hole, healthy], Duration::from_secs(1)).await.unwrap();
        assert_eq!(stream.peer_addr().unwrap(), healthy);
        let stream = reach(vec![healthy, hole], Duration::from_secs(1)).await.unwrap();
        assert_eq!(stream.peer_addr().unwrap(), healthy);
        let error = reach(Vec::new(), Duration::from_secs(1)).await.unwrap_err();
        assert!(error.to_string().contains("no address"), "{error}");
    }
}
