//! Builds the parts, owns every task, and drains them in the order of the data.

use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use thiserror::Error;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::broker::{self, BrokerAccess, BrokerUrl};
use crate::config::{self, Config, Durability};
use crate::health::Health;
use crate::ingress::{self, Ingress};
use crate::metrics::Metrics;
use crate::ops::{self, Gate, Ops};
use crate::publisher::{Publisher, PublisherError};
use crate::recent::Recent;
use crate::reload::{self, Watched};
use crate::server::{self, BindError};
use crate::service_manager;
use crate::signature::{self, Verifier};
use crate::spool::{Gauges, OpenError, Spool, WriterEnd};
use crate::text::chain;
use crate::tls::{self, TlsError};
use crate::traces::Traces;

/// How often the histograms' raw samples are folded into buckets.
const METRICS_UPKEEP: Duration = Duration::from_secs(5);

/// How long the last traces may take after the last delivery.
const TRACES_PATIENCE: Duration = Duration::from_secs(2);

/// For everything but connections to the public listener: operators, broker, spool, libraries.
const OTHER_DESCRIPTORS: u64 = 512;

/// How long before its end a certificate is warned of, and how often.
const CERTIFICATE_NOTICE: SignedDuration = SignedDuration::from_hours(14 * 24);
const CERTIFICATE_REMINDER: Duration = Duration::from_secs(24 * 3600);

/// How long deliveries may go on where the public socket is held open for the next relay, and webhooks wait in it.
const HANDOVER: Duration = Duration::from_secs(1);
/// And requests: one that takes longer is sent again.
const HANDOVER_REQUESTS: Duration = Duration::from_secs(2);

/// How long the last commit may take after the grace.
const WRITER_PATIENCE: Duration = Duration::from_secs(1);

/// Why the relay could not start, or had to stop.
#[derive(Debug, Error)]
pub enum RelayError {
    #[error(transparent)]
    Spool(#[from] OpenError),
    #[error(transparent)]
    Bind(#[from] BindError),
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error("traces.endpoint {0}")]
    Traces(String),
    #[error("cannot listen for signals, or tell the own address")]
    System(#[from] std::io::Error),
    #[error("the publisher has died")]
    Publisher(#[source] PublisherError),
    #[error("the {0} has died")]
    Died(&'static str),
}

/// The running tasks, in the order of the data.
struct Tasks {
    ingress: JoinHandle<()>,
    spool: Spool,
    spool_writer: WriterEnd,
    publisher: JoinHandle<Result<(), PublisherError>>,
    ops: JoinHandle<()>,
    reload: JoinHandle<()>,
    upkeep: JoinHandle<()>,
    traces: Arc<Traces>,
    /// The public socket stays open when this relay ends.
    is_handed_over: bool,
}

/// Tells each part when to stop.
#[derive(Default)]
struct Stops {
    ingress: CancellationToken,
    publisher: CancellationToken,
}

/// Runs the relay until SIGTERM or SIGINT, or until a part of it dies.
pub async fn serve(config: Config) -> Result<(), RelayError> {
    let mut signals = Signals::new()?;
    let grace = config.shutdown.grace;
    let stops = Stops::default();
    // From now on SIGHUP asks for new secrets; until now it would have ended the process.
    let hangup = signal(SignalKind::hangup())?;
    let mut tasks = tokio::select! {
        started = start(config, hangup, &stops) => started?,
        () = signals.any() => {
            info!("stopped before it had started");
            return Ok(());
        }
    };
    tokio::select! {
        () = signals.any() => {}
        died = tasks.death() => return Err(died),
    }
    service_manager::stopping();
    let deadline = Instant::now() + grace;
    info!(?grace, "stopping: finishing requests, then deliveries; a second signal stops at once");
    tokio::select! {
        drained = tasks.drain(&stops, deadline) => drained,
        () = signals.any() => {
            warn!("stopped at once; what is not delivered stays on disk");
            Ok(())
        }
    }
}

/// Beside the signals: a large file may have to be mended, or the disk may not answer. Whatever is under way can be interrupted.
async fn open_spool(config: &Config, metrics: Arc<Metrics>) -> Result<(Spool, WriterEnd), RelayError> {
    info!(path = %config.spool.path.display(), "opening the spool");
    let (spool, dedupe) = (config.spool.clone(), config.dedupe.clone());
    let opened = tokio::task::spawn_blocking(move || Spool::open(&spool, &dedupe, metrics)).await;
    Ok(opened.unwrap_or_else(|ended| std::panic::resume_unwind(ended.into_panic()))?)
}

/// Locks and binds first, then announces, then runs.
async fn start(config: Config, hangup: Signal, stops: &Stops) -> Result<Tasks, RelayError> {
    raise_descriptor_limit(config.http.connections_max);
    let metrics = Arc::new(Metrics::new());
    let (spool, spool_writer) = open_spool(&config, Arc::clone(&metrics)).await?;
    let handed_over = service_manager::listeners()?;
    let is_handed_over = handed_over.http.is_some();
    let listener = server::listen(config.http.listen, "http.listen", handed_over.http).await?;
    let ops_listener = server::listen(config.ops.listen, "ops.listen", handed_over.ops).await?;
    let private = ops_listener.local_addr()?.ip().is_loopback();
    warn_of_weak_settings(&config, private);
    let Config { http, signature, broker, .. } = config;
    let verifier = Arc::new(Verifier::new(&signature.secrets, signature.required, signature.tolerance));
    let tls = http.tls.clone().map(tls::Server::load).transpose()?.map(Arc::new);
    let access = Arc::new(BrokerAccess::new(&broker)?);
    let gate = Arc::new(Gate::new(config.ops.token.clone(), private));
    let recent = Arc::new(Recent::default());
    let traces = Arc::new(Traces::new(&config.traces).map_err(RelayError::Traces)?);
    let watched = Replaceable {
        verifier: Arc::clone(&verifier),
        recent: Arc::clone(&recent),
        access: Arc::clone(&access),
        tls: tls.clone(),
        gate: Arc::clone(&gate),
        metrics: Arc::clone(&metrics),
    }
    .watched(&signature, &broker, &config.ops);

    let scheme = if tls.is_some() { "https" } else { "http" };
    let path = http.path.clone();
    let draining = stops.ingress.clone();
    let health = Health::new(spool.clone(), draining.clone());
    let parts = ingress::Parts {
        verifier: Arc::clone(&verifier),
        spool: spool.clone(),
        recent: Arc::clone(&recent),
        traces: Arc::clone(&traces),
        metrics: Arc::clone(&metrics),
    };
    let ingress = Ingress::new(http, listener, tls.clone(), parts, draining);
    let publisher = Publisher::new(
        spool.clone(),
        config.publisher,
        access,
        &config.topology,
        Arc::clone(&traces),
        Arc::clone(&metrics),
    );
    let parts = ops::Parts {
        spool: spool.clone(),
        health,
        broker: publisher.status(),
        recent,
        verifier,
        connections: ingress.admission(),
        tls: tls.clone(),
        metrics: Arc::clone(&metrics),
    };
    let ops = Ops::new(ops_listener, gate, parts);

    info!(
        url = format!("{scheme}://{}{path}", ingress.address()?),
        ops = format!("http://{}", ops.address()?),
        spool = %config.spool.path.display(),
        pending = spool.gauges().ledger().pending,
        version = env!("CARGO_PKG_VERSION"),
        "accepting webhooks"
    );
    service_manager::ready();
    let (exported, gauges) = (Arc::clone(&traces), Arc::clone(spool.gauges()));
    Ok(Tasks {
        ingress: tokio::spawn(ingress.run()),
        publisher: tokio::spawn(publisher.run(stops.publisher.clone())),
        ops: tokio::spawn(ops.run(CancellationToken::new())),
        reload: tokio::spawn(reload::run(watched, hangup, Arc::clone(&metrics))),
        upkeep: tokio::spawn(async move {
            tokio::join!(upkeep(metrics, tls, gauges), service_manager::watchdog(), exported.export());
        }),
        traces,
        spool,
        spool_writer,
        is_handed_over,
    })
}

/// The parts that take up new secrets and certificates while the relay runs.
struct Replaceable {
    verifier: Arc<Verifier>,
    recent: Arc<Recent>,
    access: Arc<BrokerAccess>,
    tls: Option<Arc<tls::Server>>,
    gate: Arc<Gate>,
    metrics: Arc<Metrics>,
}

impl Replaceable {
    /// The files that they come from.
    fn watched(self, signature: &signature::Settings, broker: &broker::Settings, ops: &ops::Settings) -> Vec<Watched> {
        let Self { verifier, recent, access, tls, gate, metrics } = self;
        let mut watched = Vec::new();
        if let Some(file) = signature.secrets_file.clone() {
            watched.push(Watched::new("signature.secrets_file", vec![file.clone()], move || {
                let secrets = config::read_secret(&file, config::secrets_in)?;
                verifier.replace(&secrets);
                metrics.expect_secrets(secrets.len());
                recent.secrets_replaced();
                Ok(())
            }));
        }
        if let Some(file) = broker.password_file.clone() {
            let access = Arc::clone(&access);
            watched.push(Watched::new("broker.password_file", vec![file.clone()], move || {
                config::read_secret(&file, config::password_in).map(|password| access.set_password(&password))
            }));
        }
        if let Some(file) = ops.token_file.clone() {
            watched.push(Watched::new("ops.token_file", vec![file.clone()], move || {
                config::read_secret(&file, config::token_in).map(|token| gate.replace(token))
            }));
        }
        if let Some(tls) = tls {
            let files = tls.files().paths();
            watched.push(Watched::new("http.tls", files, move || tls.reload().map_err(|error| chain(&error))));
        }
        if broker.urls.iter().any(BrokerUrl::uses_tls) {
            let reload = move || access.reload_tls().map_err(|error| chain(&error));
            watched.push(Watched::new("broker.tls", broker.tls.paths(), reload));
        }
        watched
    }
}

/// Many systems let a process have 1024 descriptors unless it asks for more.
fn raise_descriptor_limit(connections_max: usize) {
    let wanted = (connections_max as u64).saturating_add(OTHER_DESCRIPTORS);
    match rlimit::increase_nofile_limit(wanted) {
        Ok(limit) if limit < wanted => {
            warn!(limit, wanted, "the system allows fewer file descriptors than http.connections_max needs");
        }
        Ok(_) => {}
        Err(error) => warn!(%error, "cannot ask for more file descriptors"),
    }
}

/// `private`: the operators' listener is on loopback.
fn warn_of_weak_settings(config: &Config, private: bool) {
    if !config.signature.required {
        warn!("signature.required is false: whoever knows the address can post events");
        if config.signature.secrets.is_empty() {
            warn!("there is no secret, so signatures are not checked even where they are present");
        }
    }
    if !private && config.ops.token.is_none() {
        warn!("the operators' listener is not on loopback and there is no ops.token: the console and /api are closed");
    }
    if config.dedupe.window.is_zero() {
        warn!("dedupe.window is 0s: re-sends are published again, and so is a request that somebody has captured");
    }
    if config.spool.durability == Durability::Process {
        warn!("spool.durability is \"process\": a power loss takes back events that were answered 200");
    }
}

impl Tasks {
    /// Resolves when a task ends that must not.
    async fn death(&mut self) -> RelayError {
        tokio::select! {
            _ = &mut self.ingress => RelayError::Died("public listener"),
            _ = &mut self.spool_writer => RelayError::Died("spool writer"),
            ended = &mut self.publisher => match ended {
                Ok(Err(error)) => self.publisher_death(error),
                Ok(Ok(())) | Err(_) => RelayError::Died("publisher"),
            },
            _ = &mut self.ops => RelayError::Died("operators' listener"),
            _ = &mut self.reload => RelayError::Died("look at changed secrets"),
            _ = &mut self.upkeep => RelayError::Died("metrics upkeep"),
        }
    }

    /// A damaged file is mended when it is opened, so the relay asks for that and ends.
    fn publisher_death(&self, error: PublisherError) -> RelayError {
        if let PublisherError::Spool(cause) = &error
            && cause.is_damage()
        {
            self.spool.mend_at_next_start();
        }
        RelayError::Publisher(error)
    }

    /// In the order of the data: requests, spool, deliveries; the operators' listener last. What is not delivered by the
    /// deadline stays on disk.
    async fn drain(self, stops: &Stops, deadline: Instant) -> Result<(), RelayError> {
        let Self { mut ingress, spool, spool_writer, mut publisher, ops, reload, upkeep, traces, is_handed_over } =
            self;
        let begun = Instant::now();
        // Requests get half of the grace, so that slow senders do not take the deliveries' share. Whoever comes later on
        // an open connection is told to come back.
        stops.ingress.cancel();
        let patience = (deadline - begun) / 2;
        let patience = if is_handed_over { patience.min(HANDOVER_REQUESTS) } else { patience };
        let served = timeout_at(begun + patience, &mut ingress).await;
        spool.close();
        if served.is_err() {
            warn!(?patience, "requests that are still under way are answered 503, or cut");
        }
        stops.publisher.cancel();
        // Webhooks that wait for the next relay are worth more than deliveries that the next one can make.
        let until = if is_handed_over { deadline.min(Instant::now() + HANDOVER) } else { deadline };
        let published = timeout_at(until, &mut publisher).await;
        if published.is_err() && is_handed_over {
            info!("what is not delivered is left to the next relay");
        } else if published.is_err() {
            warn!("the grace is over: what is not delivered stays on disk");
        }
        // They hold the spool open.
        for task in [ingress.abort_handle(), publisher.abort_handle(), ops.abort_handle()] {
            task.abort();
        }
        reload.abort();
        let pending = spool.gauges().ledger().pending;
        drop(spool);
        // The writer ends once nobody can send to it any more, and leaves a closed file. A sick disk is not waited for.
        let written = timeout_at(deadline + WRITER_PATIENCE, spool_writer).await;
        if written.is_err() {
            warn!("the spool could not be closed in time: is its disk well?");
        }
        let left = (deadline + WRITER_PATIENCE).saturating_duration_since(Instant::now());
        traces.flush(left.min(if is_handed_over { HANDOVER } else { TRACES_PATIENCE })).await;
        upkeep.abort();
        info!(pending, "stopped");
        match (served, published, written) {
            (_, Ok(Ok(Err(error))), _) => Err(RelayError::Publisher(error)),
            (_, Ok(Err(_)), _) => Err(RelayError::Died("publisher")),
            (Ok(Err(_)), _, _) => Err(RelayError::Died("public listener")),
            (_, _, Ok(Err(_))) => Err(RelayError::Died("spool writer")),
            (Ok(Ok(())) | Err(_), Ok(Ok(Ok(()))) | Err(_), Ok(Ok(())) | Err(_)) => Ok(()),
        }
    }
}

async fn upkeep(metrics: Arc<Metrics>, tls: Option<Arc<tls::Server>>, spool: Arc<Gauges>) {
    let mut ticks = tokio::time::interval(METRICS_UPKEEP);
    let (mut warned, mut stalled) = (None, false);
    loop {
        ticks.tick().await;
        metrics.upkeep();
        match (std::mem::replace(&mut stalled, spool.is_stalled()), stalled) {
            (false, true) => error!("the disk of the spool does not answer: webhooks are answered 503 until it does"),
            (true, false) => info!("the disk of the spool answers again"),
            _ => {}
        }
        let expires_at = tls.as_ref().map(|tls| tls.identity().expires_at);
        if let Some(expires_at) = expires_at
            && Timestamp::now() + CERTIFICATE_NOTICE > expires_at
            && warned.is_none_or(|at: Instant| at.elapsed() >= CERTIFICATE_REMINDER)
        {
            warned = Some(Instant::now());
            warn!(%expires_at, "the certificate of the public listener is about to expire, or has expired");
        }
    }
}

/// SIGTERM and SIGINT, caught from the first moment on.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn any(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Dedupe, Spool as SpoolConfig};

    /// Tasks that all wait for ever, on a spool of their own.
    fn idle_tasks(folder: &tempfile::TempDir) -> Tasks {
        let spool =
            SpoolConfig { path: folder.path().join("spool.db"), max_bytes: 1 << 20, durability: Durability::Disk };
        let dedupe = Dedupe { window: Duration::ZERO, entries_max: 1 };
        let (spool, spool_writer) = Spool::open(&spool, &dedupe, Arc::new(Metrics::new())).unwrap();
        let idle = || tokio::spawn(std::future::pending());
        Tasks {
            ingress: idle(),
            ops: idle(),
            reload: idle(),
            upkeep: idle(),
            traces: Arc::new(Traces::new(&crate::traces::Settings { endpoint: None, sample_ratio: 1.0 }).unwrap()),
            publisher: tokio::spawn(std::future::pending()),
            spool,
            spool_writer,
            is_handed_over: false,
        }
    }

    #[tokio::test]
    async fn a_task_that_panics_or_ends_is_a_death() {
        let folder = tempfile::TempDir::new().unwrap();
        let mut tasks = idle_tasks(&folder);
        tasks.publisher = tokio::spawn(async { panic!("on purpose") });
        assert!(matches!(tasks.death().await, RelayError::Died("publisher")));

        let folder = tempfile::TempDir::new().unwrap();
        let mut tasks = idle_tasks(&folder);
        tasks.ingress = tokio::spawn(async {});
        assert!(matches!(tasks.death().await, RelayError::Died("public listener")));
    }

    #[tokio::test]
    async fn a_task_that_panics_while_draining_is_an_error() {
        let folder = tempfile::TempDir::new().unwrap();
        let mut tasks = idle_tasks(&folder);
        tasks.ingress = tokio::spawn(async {});
        tasks.publisher = tokio::spawn(async { panic!("on purpose") });
        let drained = tasks.drain(&Stops::default(), Instant::now() + Duration::from_secs(30)).await;
        assert!(matches!(drained, Err(RelayError::Died("publisher"))));
    }
}
