//! A TCP wire between the relay and the broker that a test can cut, refuse and stall.

use std::net::{Ipv4Addr, SocketAddr, TcpListener as StdListener};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

use super::{background, ports};

/// What passes. Held bytes are not lost: they arrive once the wire flows again, as after a short partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flow {
    Both,
    /// What the client sends arrives; what the server answers is held.
    HoldAnswers,
    Neither,
}

/// A proxy on a port of its own, which stays the same. Works beside the test, also while that blocks its thread.
pub struct Wire {
    port: u16,
    target: SocketAddr,
    flow: watch::Sender<Flow>,
    connections: Arc<Mutex<JoinSet<()>>>,
    acceptor: Option<JoinHandle<()>>,
}

impl Wire {
    /// A wire to `target` that flows. `target` need not listen yet.
    pub fn new(target: SocketAddr) -> Self {
        let (flow, _) = watch::channel(Flow::Both);
        let mut wire = Self { port: ports::free(), target, flow, connections: Arc::default(), acceptor: None };
        wire.accept();
        wire
    }

    pub fn address(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.port).into()
    }

    /// The open connections.
    pub fn connections(&self) -> usize {
        reap(&self.connections).len()
    }

    /// Drops all connections, on both sides; new ones are served.
    pub fn cut(&self) {
        reap(&self.connections).abort_all();
    }

    /// Stops listening: who connects from now on is refused. Open connections stay.
    pub async fn refuse(&mut self) {
        if let Some(acceptor) = self.acceptor.take() {
            acceptor.abort();
            // The port is closed when the task is gone, not before.
            let _ = acceptor.await;
        }
    }

    /// Listens again.
    pub fn accept(&mut self) {
        let listener = StdListener::bind(self.address()).expect("listen on the wire's port");
        listener.set_nonblocking(true).expect("a listener that does not block");
        let (target, flow, connections) = (self.target, self.flow.subscribe(), Arc::clone(&self.connections));
        self.acceptor = Some(background::spawn(async move {
            let listener = TcpListener::from_std(listener).expect("a listener of the harness's runtime");
            while let Ok((client, _)) = listener.accept().await {
                reap(&connections).spawn(carry(client, target, flow.clone()));
            }
        }));
    }

    /// A black hole: connections are accepted and stay open, and not a byte passes.
    pub fn stall(&self) {
        self.flow.send_replace(Flow::Neither);
    }

    /// Half a black hole: the broker gets everything, and its answers (confirms!) are held.
    pub fn stall_answers(&self) {
        self.flow.send_replace(Flow::HoldAnswers);
    }

    /// Everything passes again, with what was held first.
    pub fn flow(&self) {
        self.flow.send_replace(Flow::Both);
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.cut();
        if let Some(acceptor) = &self.acceptor {
            acceptor.abort();
        }
    }
}

/// The set of connections without those that have ended.
fn reap(connections: &Mutex<JoinSet<()>>) -> MutexGuard<'_, JoinSet<()>> {
    let mut connections = connections.lock().unwrap_or_else(PoisonError::into_inner);
    while connections.try_join_next().is_some() {}
    connections
}

/// One connection, until either side closes it.
async fn carry(client: TcpStream, target: SocketAddr, flow: watch::Receiver<Flow>) {
    // Who cannot be reached closes at once, as a broker that died behind a load balancer.
    let Ok(server) = TcpStream::connect(target).await else { return };
    for stream in [&client, &server] {
        // Without it the wire itself would add 40 ms to small frames.
        let _ = stream.set_nodelay(true);
    }
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    tokio::select! {
        () = pump(from_client, to_server, flow.clone(), |flow| flow != Flow::Neither) => {}
        () = pump(from_server, to_client, flow, |flow| flow == Flow::Both) => {}
    }
}

/// Moves bytes while `passes`. An end of file is held as bytes are.
async fn pump(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut flow: watch::Receiver<Flow>,
    passes: impl Fn(Flow) -> bool,
) {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let count = from.read(&mut buffer).await.unwrap_or(0);
        if flow.wait_for(|flow| passes(*flow)).await.is_err() || count == 0 {
            return;
        }
        if to.write_all(&buffer[..count]).await.is_err() {
            return;
        }
    }
}
