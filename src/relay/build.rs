//! Builds the parts of the relay from the configuration. Locks the spool and binds the listeners first; spawns nothing.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::error::RelayError;
use crate::broker::{BrokerAccess, BrokerUrl};
use crate::config::{self, Config, Note};
use crate::drift::Drift;
use crate::health::Health;
use crate::ingress::{self, Ingress};
use crate::logging::Filter;
use crate::metrics::Metrics;
use crate::ops::{self, Notifier, Ops, OpsAuth};
use crate::publisher::Publisher;
use crate::recent::Recent;
use crate::reconcile::{Reconcile, Reconciler};
use crate::reload::Watched;
use crate::secret::Secret;
use crate::server;
use crate::service_manager;
use crate::signature::Verifier;
use crate::spool::{Spool, WriterEnd};
use crate::text::chain;
use crate::tls;
use crate::traces::Traces;

/// File descriptors for everything but connections to the public listener: operators, broker, spool, libraries.
const OTHER_DESCRIPTORS: u64 = 512;

/// Maximum time for closing the spool when the relay cannot start.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// The parts of a relay, ready to run.
pub(super) struct Built {
    pub ingress: Ingress,
    /// Nothing without `reconcile.api_key`.
    pub reconciler: Option<Reconciler>,
    pub publisher: Publisher,
    pub ops: Ops,
    pub spool: Spool,
    pub watched: Vec<Watched>,
    /// The filter of the log that SIGHUP returns to.
    pub log_filter: Filter,
    pub tls: Option<Arc<tls::Server>>,
    pub traces: Arc<Traces>,
    pub drift: Arc<Drift>,
    pub metrics: Arc<Metrics>,
    pub stops: Stops,
    /// The service manager holds the public socket open when this relay ends, so that senders wait for the next one.
    pub is_handed_over: bool,
}

/// The tokens that stop each part when they are cancelled.
#[derive(Default)]
pub(super) struct Stops {
    pub ingress: CancellationToken,
    pub publisher: CancellationToken,
}

/// Builds the parts and reports to log and service manager that webhooks are accepted: from here on the kernel queues
/// connections, and a 200 is only a matter of time.
pub(super) async fn build(config: Config) -> Result<(Built, WriterEnd), RelayError> {
    raise_descriptor_limit(config.http.connections_max);
    let metrics = Arc::new(Metrics::new());
    let (spool, spool_writer) = open_spool(&config, Arc::clone(&metrics)).await?;
    match assemble(config, spool, metrics).await {
        Ok(built) => Ok((built, spool_writer)),
        Err(error) => {
            // The spool is not used any more, so its writer closes the file as after a stop.
            let _ = tokio::time::timeout(CLOSE_TIMEOUT, spool_writer).await;
            Err(error)
        }
    }
}

async fn assemble(config: Config, spool: Spool, metrics: Arc<Metrics>) -> Result<Built, RelayError> {
    let Listeners { http: listener, ops: ops_listener, ops_is_private, is_handed_over, announcement, identity } =
        listen(&config).await?;
    warn_of_weak_settings(&config, ops_is_private);

    let Config { http, signature, broker, publisher, topology, ops, notify, traces, log, reconcile, .. } = config;
    let verifier = Arc::new(Verifier::new(&signature.secrets, signature.required, signature.tolerance));
    let tls = http.tls.clone().map(tls::Server::load).transpose()?.map(Arc::new);
    let access = Arc::new(BrokerAccess::new(&broker)?);
    let auth = Arc::new(OpsAuth::new(ops.token, ops_is_private));
    let (recent, drift, stops) = (Arc::new(Recent::default()), Arc::new(Drift::default()), Stops::default());
    let (traces, notify_secret_file) = (Arc::new(Traces::new(&traces)?), notify.secret_file.clone());
    let notifier = Arc::new(Notifier::new(notify, identity.host.clone(), &spool.path()));
    let reconciler = Reconciler::new(&reconcile, spool.clone(), Arc::clone(&recent), Arc::clone(&metrics));
    let reconciling = reconciler.as_ref().map(Reconciler::shared);
    let watched = Reloadable {
        secrets: (signature.secrets_file, Arc::clone(&verifier), Arc::clone(&recent)),
        password: (broker.password_file, Arc::clone(&access)),
        token: (ops.token_file, Arc::clone(&auth)),
        notify: (notify_secret_file, Arc::clone(&notifier)),
        api_key: reconcile.api_key_file.zip(reconciling.clone()),
        http_tls: tls.clone(),
        broker_tls: broker.urls.iter().any(BrokerUrl::uses_tls).then(|| broker.tls.paths()),
    }
    .watched(&metrics);

    let ingress_parts = ingress::Parts {
        verifier: Arc::clone(&verifier),
        spool: spool.clone(),
        recent: Arc::clone(&recent),
        drift: Arc::clone(&drift),
        traces: Arc::clone(&traces),
        metrics: Arc::clone(&metrics),
    };
    let ingress = Ingress::new(http, listener, tls.clone(), ingress_parts, stops.ingress.clone());
    let publisher =
        Publisher::new(spool.clone(), publisher, access, &topology, Arc::clone(&traces), Arc::clone(&metrics));
    let sources = ops::Sources {
        spool: spool.clone(),
        health: Health::new(spool.clone(), stops.ingress.clone()),
        broker: publisher.status(),
        recent,
        drift: Arc::clone(&drift),
        verifier,
        connections: ingress.admission(),
        tls: tls.clone(),
        metrics: Arc::clone(&metrics),
        notifier,
        reconcile: reconciling,
        identity,
        broker_urls: broker.urls.iter().map(BrokerUrl::to_string).collect(),
    };
    announcement.log(spool.status().ledger().pending);
    service_manager::ready();
    Ok(Built {
        ingress,
        reconciler,
        publisher,
        ops: Ops::new(ops_listener, auth, sources),
        spool,
        watched,
        log_filter: log.filter,
        tls,
        traces,
        drift,
        metrics,
        stops,
        is_handed_over,
    })
}

struct Listeners {
    http: TcpListener,
    ops: TcpListener,
    /// Whether only this machine reaches the operators' listener.
    ops_is_private: bool,
    /// See [`Built::is_handed_over`].
    is_handed_over: bool,
    announcement: Announcement,
    identity: ops::Identity,
}

async fn listen(config: &Config) -> Result<Listeners, RelayError> {
    let sockets = service_manager::listeners()?;
    let is_handed_over = sockets.http.is_some();
    let http = server::listen(config.http.listen, "http.listen", sockets.http).await?;
    let ops = server::listen(config.ops.listen, "ops.listen", sockets.ops).await?;
    let ops_is_private = address(&ops, "ops.listen")?.ip().is_loopback();
    let (announcement, identity) = (Announcement::new(config, &http, &ops)?, identity(&http)?);
    Ok(Listeners { http, ops, ops_is_private, is_handed_over, announcement, identity })
}

/// What tells this relay from its replicas.
fn identity(listener: &TcpListener) -> Result<ops::Identity, RelayError> {
    Ok(ops::Identity {
        host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
        listen: address(listener, "http.listen")?.to_string(),
    })
}

/// Opens the spool on a thread that may block: a large file may need recovery, and the disk may not answer. A signal
/// interrupts the wait.
async fn open_spool(config: &Config, metrics: Arc<Metrics>) -> Result<(Spool, WriterEnd), RelayError> {
    info!(path = %config.spool.path.display(), "opening the spool");
    let (spool, dedupe, followed) = (config.spool.clone(), config.dedupe.clone(), config.reconcile.followed().cloned());
    let opened = tokio::task::spawn_blocking(move || Spool::open(&spool, &dedupe, followed.as_ref(), metrics)).await;
    Ok(opened.unwrap_or_else(|ended| std::panic::resume_unwind(ended.into_panic()))?)
}

/// The log line that says where the relay listens.
struct Announcement {
    url: String,
    ops: String,
    spool: String,
}

impl Announcement {
    fn new(config: &Config, http: &TcpListener, ops: &TcpListener) -> Result<Self, RelayError> {
        let scheme = if config.http.tls.is_some() { "https" } else { "http" };
        Ok(Self {
            url: format!("{scheme}://{}{}", address(http, "http.listen")?, config.http.path),
            ops: format!("http://{}", address(ops, "ops.listen")?),
            spool: config.spool.path.display().to_string(),
        })
    }

    fn log(&self, pending: u64) {
        let Self { url, ops, spool } = self;
        info!(url, ops, spool, pending, version = env!("CARGO_PKG_VERSION"), "accepting webhooks");
    }
}

fn address(listener: &TcpListener, key: &'static str) -> Result<std::net::SocketAddr, RelayError> {
    listener.local_addr().map_err(|source| RelayError::Address { key, source })
}

/// Secrets and certificates that can be replaced while the relay runs, each with its files.
struct Reloadable {
    secrets: (Option<PathBuf>, Arc<Verifier>, Arc<Recent>),
    password: (Option<PathBuf>, Arc<BrokerAccess>),
    token: (Option<PathBuf>, Arc<OpsAuth>),
    notify: (Option<PathBuf>, Arc<Notifier>),
    /// The file of the key to Prism's API.
    api_key: Option<(PathBuf, Arc<Reconcile>)>,
    http_tls: Option<Arc<tls::Server>>,
    /// The broker's certificate files, if a URL uses TLS.
    broker_tls: Option<Vec<PathBuf>>,
}

impl Reloadable {
    fn watched(self, metrics: &Arc<Metrics>) -> Vec<Watched> {
        let Self { secrets: (secrets_file, verifier, recent), password: (password_file, access), token, .. } = self;
        let mut watched = Vec::new();
        if let Some(file) = secrets_file {
            let metrics = Arc::clone(metrics);
            let replace = move |secrets: Vec<Secret>| {
                // Before the first webhook that a new secret verifies.
                metrics.expect_secrets(secrets.len());
                verifier.replace(&secrets);
                recent.secrets_replaced();
            };
            watched.push(secret("signature.secrets_file", file, config::secrets_in, replace));
        }
        if let Some(file) = password_file {
            let access = Arc::clone(&access);
            let replace = move |password| access.set_password(&password);
            watched.push(secret("broker.password_file", file, config::password_in, replace));
        }
        if let (Some(file), auth) = token {
            watched.push(secret("ops.token_file", file, config::token_in, move |token| auth.replace(token)));
        }
        if let (Some(file), notifier) = self.notify {
            let replace = move |secret| notifier.set_secret(secret);
            watched.push(secret("notify.secret_file", file, config::notify_secret_in, replace));
        }
        if let Some((file, reconcile)) = self.api_key {
            let replace = move |key| reconcile.set_key(key);
            watched.push(secret("reconcile.api_key_file", file, config::api_key_in, replace));
        }
        if let Some(tls) = self.http_tls {
            let files = tls.files().paths();
            watched.push(Watched::new("http.tls", files, move || tls.reload().map_err(|error| chain(&error))));
        }
        if let Some(files) = self.broker_tls {
            watched.push(Watched::new("broker.tls", files, move || access.reload_tls().map_err(|error| chain(&error))));
        }
        watched
    }
}

/// A file with a secret, read by `parse` and put to use by `replace`.
fn secret<T: 'static>(
    key: &'static str,
    file: PathBuf,
    parse: impl Fn(&str) -> Result<T, String> + Send + 'static,
    replace: impl Fn(T) + Send + 'static,
) -> Watched {
    Watched::new(key, vec![file.clone()], move || config::read_secret(&file, &parse).map(&replace))
}

/// Many systems allow a process 1024 file descriptors unless it asks for more.
fn raise_descriptor_limit(connections_max: usize) {
    let needed = (connections_max as u64).saturating_add(OTHER_DESCRIPTORS);
    match rlimit::increase_nofile_limit(needed) {
        Ok(limit) if limit < needed => {
            warn!(limit, needed, "the system allows fewer file descriptors than http.connections_max needs");
        }
        Ok(_) => {}
        Err(error) => warn!(%error, needed, "cannot raise the limit of file descriptors"),
    }
}

/// Logs what `check` shows as notes.
fn warn_of_weak_settings(config: &Config, ops_is_private: bool) {
    for Note { key, text } in &config.notes {
        warn!(key, "{key} {text}");
    }
    if !ops_is_private && config.ops.token.is_none() {
        warn!("ops.listen is not on loopback and ops.token is not set: the console and /api are closed");
    }
}
