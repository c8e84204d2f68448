//! One connection to the broker, with a deadline on everything and a wire that can be cut.
//!
//! lapin runs a thread for each connection, which ends only with its socket. A broker that accepts and then says
//! nothing, or one that blocks publishers, would keep that thread until the relay ends. So the relay owns the socket,
//! and dropping a [`BrokerConnection`] shuts it down.

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

use super::reactor::{Stream, TlsReactor};
use super::reply::{is_limit, reply_code, reply_text};
use super::url::BrokerUrl;
use crate::first_bytes::{FirstBytes, Recorded, Spoken};
use crate::tls;

/// Maximum time for the reply to `connection.close`. A broker that blocks publishers does not send it.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// Why a connection to the broker could not be opened.
#[derive(Debug, Error)]
pub enum ConnectError {
    #[error("cannot reach {host}:{port}: {source}")]
    Tcp { host: String, port: u16, source: std::io::Error },
    #[error("the TLS handshake with {host}:{port} as {server_name} failed: {reason}")]
    Tls { host: String, port: u16, server_name: String, reason: String },
    #[error(
        "{url} closed the connection without an answer; the port may not be RabbitMQ's for amqp (usually 5672): \
         amqps:// is usually on 5671, the management API on 15672"
    )]
    NoAnswer { url: String },
    #[error("{url} does not speak AMQP on this port but {spoken}")]
    OtherProtocol { url: String, spoken: &'static str },
    #[error("no answer from {url} within {timeout:?}")]
    Timeout { url: String, timeout: Duration },
    #[error("{url} refused the login: check user, password and virtual host ({source})")]
    Refused { url: String, source: lapin::Error },
    #[error(
        "{url} refused the connection, because a limit of the broker is reached: {reply}. Raise it (rabbitmqctl \
         set_vhost_limits or set_user_limits), or close other connections"
    )]
    Limit { url: String, reply: String },
    #[error("the AMQP handshake with {url} failed: {source}")]
    Handshake { url: String, source: lapin::Error },
}

/// An open connection. Dropping it shuts the socket down.
pub struct BrokerConnection {
    /// The broker at the other end.
    pub url: BrokerUrl,
    /// lapin's side of the connection.
    pub connection: Connection,
    socket: Socket,
}

/// A second handle on the socket that lapin reads and writes.
struct Socket(std::net::TcpStream);

impl Drop for Socket {
    fn drop(&mut self) {
        // An error means that the socket is down already.
        let _ = self.0.shutdown(Shutdown::Both);
    }
}

/// Tries the addresses in turn. Each but the last gets an equal share of the time, because an unreachable address may
/// never answer.
async fn connect_tcp(addresses: Vec<SocketAddr>, deadline: Duration) -> io::Result<TcpStream> {
    let count = u32::try_from(addresses.len()).unwrap_or(u32::MAX);
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the host name has no address");
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

/// TLS towards the broker.
#[derive(Clone)]
pub(super) struct Tls {
    pub config: Arc<ClientConfig>,
    /// The name that the broker's certificate must show.
    pub server_name: String,
}

impl BrokerConnection {
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
        let stream = connect_tcp(addresses, deadline).await.map_err(tcp)?;
        stream.set_nodelay(true).map_err(tcp)?;
        // Heartbeats find a dead peer sooner, but only after the login and not while the broker blocks.
        SockRef::from(&stream)
            .set_tcp_keepalive(&TcpKeepalive::new().with_time(Duration::from_secs(30)))
            .map_err(tcp)?;
        let socket = Socket(stream.as_fd().try_clone_to_owned().map_err(tcp)?.into());

        let stream = Recorded::new(stream);
        let first = stream.first();
        let stream = match (url.uses_tls(), tls) {
            (false, _) => Either::Left(stream),
            (true, Some(tls)) => Either::Right(Box::new(handshake(stream.into_inner(), tls, url).await?)),
            (true, None) => return Err(tcp(std::io::Error::other("no TLS settings for an amqps URL"))),
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
        let runtime = async_rs::Runtime::new(RuntimeParts::new(tokio.clone(), TlsReactor(tokio)));
        let properties = ConnectionProperties::default()
            .with_connection_name(name.into())
            .with_client_property("product".into(), "prism-relay".into())
            .with_client_property("version".into(), env!("CARGO_PKG_VERSION").into());
        let connection = Connection::connector(url.expose().clone(), runtime, connect, properties)
            .await
            .map_err(|source| explain(url, &first, source))?;
        Ok(Self { url: url.clone(), connection, socket })
    }

    /// Sends `connection.close`, waits briefly for the reply, and shuts the socket down.
    pub async fn close(self) {
        let closing = self.connection.close(200, "OK".into());
        if !matches!(timeout(CLOSE_TIMEOUT, closing).await, Ok(Ok(()))) {
            tracing::debug!("the broker did not answer the close");
        }
    }

    /// Shuts the socket down, so that everything that waits for the broker fails at once.
    pub fn cut(&self) {
        let _ = self.socket.0.shutdown(Shutdown::Both);
    }
}

async fn handshake(
    stream: TcpStream,
    Tls { config, server_name }: Tls,
    url: &BrokerUrl,
) -> Result<tokio_rustls::client::TlsStream<TcpStream>, ConnectError> {
    let failed = |reason| {
        let (host, port, server_name) = (url.host().to_owned(), url.port(), server_name.clone());
        ConnectError::Tls { host, port, server_name, reason }
    };
    let name = tls::server_name(&server_name).ok_or_else(|| failed("not a host name".to_owned()))?;
    let connected = TlsConnector::from(config).connect(name, stream).await;
    connected.map_err(|error| failed(tls::explain(&error, tls::Peer::Server)))
}

/// Distinguishes a port with another protocol, a refused login and a broken handshake.
///
/// RabbitMQ replies 403 or 530 to a login that it refuses, or just closes.
fn explain(url: &BrokerUrl, first: &FirstBytes, source: lapin::Error) -> ConnectError {
    let spoken = match first.spoken() {
        Some(Spoken::Tls) if !url.uses_tls() => Some("TLS: use amqps://, usually on port 5671"),
        Some(Spoken::Http) => Some("HTTP: RabbitMQ's port for amqp is usually 5672, for amqps 5671"),
        Some(Spoken::Tls | Spoken::Proxy) | None => None,
    };
    let (url, url_uses_tls) = (url.to_string(), url.uses_tls());
    if let Some(spoken) = spoken {
        return ConnectError::OtherProtocol { url, spoken };
    }
    if first.is_empty() && !url_uses_tls && matches!(source.kind(), ErrorKind::IOError(_)) {
        return ConnectError::NoAnswer { url };
    }
    match reply_code(&source) {
        Some(530) if is_limit(&reply_text(&source)) => ConnectError::Limit { url, reply: reply_text(&source) },
        Some(403 | 530) => ConnectError::Refused { url, source },
        _ => ConnectError::Handshake { url, source },
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    #[tokio::test]
    async fn an_address_that_does_not_answer_leaves_time_for_the_next_one() {
        // Linux drops connection attempts to a listener whose queue is full.
        let silent = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        silent.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into()).unwrap();
        silent.listen(0).unwrap();
        let hole = silent.local_addr().unwrap().as_socket().unwrap();
        let _queued = TcpStream::connect(hole).await.unwrap();
        let broker = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let healthy = broker.local_addr().unwrap();
        let stream = connect_tcp(vec![hole, healthy], Duration::from_secs(1)).await.unwrap();
        assert_eq!(stream.peer_addr().unwrap(), healthy);
        let stream = connect_tcp(vec![healthy, hole], Duration::from_secs(1)).await.unwrap();
        assert_eq!(stream.peer_addr().unwrap(), healthy);
        let error = connect_tcp(Vec::new(), Duration::from_secs(1)).await.unwrap_err();
        assert!(error.to_string().contains("no address"), "{error}");
    }
}
