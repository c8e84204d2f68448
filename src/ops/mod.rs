//! The operators' listener: `/livez`, `/readyz`, `/metrics`, the console and its `/api`. It keeps answering until the
//! process exits, so that operators can watch the drain.

mod answers;
mod auth;
mod console;
mod history;
mod history_file;
mod notices;
mod notify;
mod parked;
mod queues;
mod record;
mod refusals;
mod report;
mod response;
mod settings;
mod view;
mod words;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::stream::{self, StreamExt};
use http_body_util::{BodyExt, Either, Limited};
use hyper::body::Incoming;
use hyper::header::{ACCEPT, HeaderValue, SET_COOKIE};
use hyper::{Method, Request, Response, StatusCode};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::broadcast;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};
use uuid::Uuid;

use crate::log_limiter::LogLimiter;
use crate::logging::{self, Filter};
use crate::metrics;
use crate::reconcile::Effect;
use crate::server::{Limits, Peer, Server};
use crate::text::chain;
use auth::Denied;
pub(crate) use auth::OpsAuth;
use history::Range;
pub(crate) use notify::{Notifier, Settings as NotifySettings, Target};
use response::{Answer, event_stream, json, method_not_allowed, not_found, problem, response, see_other};
use response::{server_sent_event, text};
pub(crate) use settings::Settings;
use view::{Action, View, ViewError};
pub(crate) use view::{Identity, Sources};

/// Operators and scrapers are few, so these limits are not configurable.
const LIMITS: Limits = Limits {
    connections_max: 256,
    connections_per_source_max: 256,
    unlimited_sources: Vec::new(),
    header_timeout: Duration::from_secs(10),
    idle_timeout: Duration::from_secs(75),
    write_timeout: Duration::from_secs(120),
    headers_max: 64,
    header_bytes_max: 16 * 1024,
};

/// How often open consoles receive the status.
const STATUS_EVERY: Duration = Duration::from_secs(1);
/// How often the relay is judged for the notices.
const NOTICES_EVERY: Duration = Duration::from_secs(5);
/// Maximum number of messages kept for a console that reads slowly; older ones are skipped.
const FEED_CAPACITY: usize = 16;

/// Maximum size of a request's body: the log-in form holds one token.
const BODY_BYTES_MAX: usize = 4096;
const BODY_TIMEOUT: Duration = Duration::from_secs(10);

/// The operators' listener: bound, but not serving yet.
pub(crate) struct Ops {
    server: Server,
    handler: OpsHandler,
}

#[derive(Clone)]
struct OpsHandler {
    view: Arc<View>,
    auth: Arc<OpsAuth>,
    feed: broadcast::Sender<Bytes>,
    log_limiter: Arc<LogLimiter>,
}

impl Ops {
    /// Takes a bound listener.
    pub(crate) fn new(listener: TcpListener, auth: Arc<OpsAuth>, sources: Sources) -> Self {
        let server = Server::new(listener, "ops", LIMITS, None, &sources.metrics);
        let (feed, _) = broadcast::channel(FEED_CAPACITY);
        Self {
            server,
            handler: OpsHandler { view: Arc::new(View::new(sources)), auth, feed, log_limiter: Arc::default() },
        }
    }

    /// Serves requests and records the chart points until `shutdown`.
    pub(crate) async fn run(self, shutdown: CancellationToken) {
        let Self { server, handler } = self;
        let sampler = handler.clone();
        let handler = move |request: Request<Incoming>, peer: Peer| {
            let handler = handler.clone();
            async move { handler.answer(request, peer.address).await }
        };
        let (notifier, watcher) = (sampler.view.notifier(), sampler.clone());
        tokio::join!(
            server.run(handler, shutdown),
            sampler.sample_and_announce(),
            watcher.watch_for_notices(),
            notifier.run()
        );
    }
}

impl OpsHandler {
    /// Records the chart points, and sends points and status to the open consoles.
    async fn sample_and_announce(self) {
        let (mut status, mut points) = (interval(STATUS_EVERY), interval(history::INTERVAL));
        // `View::new` took the first point.
        points.tick().await;
        // No burst after a delay: a point covers the time since the previous one.
        points.set_missed_tick_behavior(MissedTickBehavior::Delay);
        status.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let message = tokio::select! {
                _ = status.tick() => {
                    if self.feed.receiver_count() == 0 {
                        continue;
                    }
                    Some(self.status_event().await)
                }
                _ = points.tick() => self.view.sample().map(|point| server_sent_event("point", &point)),
            };
            // Sending fails when no console is open.
            let _ = message.map(|message| self.feed.send(message));
        }
    }

    /// Judges the relay for the notices, also while no console is open.
    async fn watch_for_notices(self) {
        let notifier = self.view.notifier();
        let mut ticks = interval(NOTICES_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while notifier.is_on() {
            ticks.tick().await;
            notifier.observe(&self.view.report().await.headline, Instant::now());
        }
    }

    async fn status_event(&self) -> Bytes {
        server_sent_event("status", &self.view.report().await)
    }

    async fn answer(&self, request: Request<Incoming>, peer: SocketAddr) -> Response<Answer> {
        let path = request.uri().path().to_owned();
        let reading = matches!(*request.method(), Method::GET | Method::HEAD);
        match (reading, path.as_str()) {
            (true, "/livez") => text(StatusCode::OK, "alive\n"),
            (true, "/readyz") => self.view.health().answer().map(Either::Left),
            (true, "/metrics") => self.metrics(&request).await,
            (true, "/login") => console::login(),
            (true, "/runbook") => console::runbook(),
            (false, "/api/log-filter") => self.change_log_filter(request).await,
            (false, "/login") if request.method() == Method::POST => self.log_in(request, peer).await,
            (true, "/") => match self.auth.may_read(request.headers()) {
                Ok(()) => console::page(self.auth.action_token()),
                Err(Denied::LoginNeeded) => see_other("login"),
                Err(denied) => deny(denied),
            },
            (true, path) if !path.starts_with("/api/") => console::file(path).unwrap_or_else(not_found),
            (reading, path) if path.starts_with("/api/") => self.api(&request, reading).await,
            (_, _) => method_not_allowed("GET, HEAD"),
        }
    }

    async fn metrics(&self, request: &Request<Incoming>) -> Response<Answer> {
        let text = self.view.metrics().await;
        let accept = request.headers().get(ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or_default();
        if metrics::prefers_open_metrics(accept) {
            response(StatusCode::OK, metrics::OPEN_METRICS_TYPE, metrics::open_metrics(&text))
        } else {
            response(StatusCode::OK, metrics::TEXT_TYPE, text)
        }
    }

    async fn api(&self, request: &Request<Incoming>, reading: bool) -> Response<Answer> {
        let answer = if reading { self.get(request).await } else { self.post(request).await };
        answer.unwrap_or_else(|error| {
            if let Some(unreported) = self.log_limiter.due("answer", Instant::now()) {
                let path = request.uri().path();
                error!(
                    error = chain(&error),
                    path, unreported, "cannot answer an API request; webhooks are not affected"
                );
            }
            problem(StatusCode::INTERNAL_SERVER_ERROR, "the spool cannot be read or changed now; see the relay's log")
        })
    }

    /// `GET /api/...`
    async fn get(&self, request: &Request<Incoming>) -> Result<Response<Answer>, ViewError> {
        if let Err(denied) = self.auth.may_read(request.headers()) {
            return Ok(deny(denied));
        }
        Ok(match request.uri().path() {
            "/api/status" => json(StatusCode::OK, &self.view.report().await),
            "/api/history" => match Range::named(query(request, "range").as_deref().unwrap_or("15min")) {
                Some(range) => json(StatusCode::OK, &self.view.history_report(range)),
                None => problem(StatusCode::BAD_REQUEST, "the range must be 15min, 2h or 24h"),
            },
            "/api/events" => {
                let find = query(request, "find").unwrap_or_default();
                json(StatusCode::OK, &json!({ "events": self.view.events(find.trim()).await? }))
            }
            "/api/subject" => {
                let find = query(request, "find").unwrap_or_default();
                json(StatusCode::OK, &self.view.subjects(find.trim()).await?)
            }
            "/api/parked" => json(StatusCode::OK, &self.view.parked().await?),
            "/api/stream" => self.stream().await,
            "/api/log-filter" => json(StatusCode::OK, &json!({ "filter": logging::filter() })),
            // For commands on this machine. The console's page has it as well.
            "/api/action-token" => json(StatusCode::OK, &json!({ "token": self.auth.action_token().expose() })),
            _ => not_found(),
        })
    }

    /// `POST /api/parked/retry` and `POST /api/parked/remove?count=<number of parked events>`
    async fn post_to_all(&self, request: &Request<Incoming>, action: &str) -> Result<Response<Answer>, ViewError> {
        if request.method() != Method::POST {
            return Ok(method_not_allowed("POST"));
        }
        if let Err(denied) = self.auth.may_act(request.headers()) {
            return Ok(deny(denied));
        }
        let count = if action == "retry" {
            self.view.retry_all().await?
        } else {
            let Some(seen) = query(request, "count").and_then(|count| count.parse().ok()) else {
                return Ok(problem(StatusCode::BAD_REQUEST, "add ?count= with the number of parked events"));
            };
            match self.view.remove_all(seen).await? {
                Ok(count) => count,
                Err(parked) => {
                    let detail = format!("{parked} events are parked now, not {seen}; nothing was removed");
                    return Ok(problem(StatusCode::CONFLICT, &detail));
                }
            }
        };
        info!(action, count, "all parked events changed by an operator");
        Ok(json(StatusCode::OK, &json!({ "ok": true, "count": count })))
    }

    /// `POST /api/reconcile?subject=<scan:ID or prediction:ID>`, with `&dry_run=true` to change nothing
    async fn reconcile(&self, request: &Request<Incoming>) -> Response<Answer> {
        if request.method() != Method::POST {
            return method_not_allowed("POST");
        }
        if let Err(denied) = self.auth.may_act(request.headers()) {
            return deny(denied);
        }
        let effect = match query(request, "dry_run").as_deref() {
            None | Some("false") => Effect::Repair,
            Some("true") => Effect::Report,
            Some(_) => return problem(StatusCode::BAD_REQUEST, "dry_run must be true or false"),
        };
        let Some(subject) = query(request, "subject").and_then(|subject| subject.parse().ok()) else {
            return problem(StatusCode::BAD_REQUEST, "add ?subject= with scan:ID or prediction:ID");
        };
        let Some(reconcile) = self.view.reconcile() else {
            return problem(StatusCode::CONFLICT, "reconcile.api_key is not set, so Prism's API cannot be asked");
        };
        match reconcile.ask(subject, effect).await {
            Some(report) => json(StatusCode::OK, &report),
            None => problem(StatusCode::SERVICE_UNAVAILABLE, "the relay is shutting down"),
        }
    }

    /// `POST /api/parked/<id>/<action>`
    async fn post(&self, request: &Request<Incoming>) -> Result<Response<Answer>, ViewError> {
        let parts: Vec<_> = request.uri().path().split('/').skip(1).collect();
        let (id, action) = match parts[..] {
            ["api", "parked", id, "retry"] => (id, Action::Retry),
            ["api", "parked", id, "remove"] => (id, Action::Remove),
            ["api", "parked", all @ ("retry" | "remove")] => return self.post_to_all(request, all).await,
            ["api", "reconcile"] => return Ok(self.reconcile(request).await),
            _ => return Ok(method_not_allowed("GET, HEAD")),
        };
        if request.method() != Method::POST {
            return Ok(method_not_allowed("POST"));
        }
        if let Err(denied) = self.auth.may_act(request.headers()) {
            return Ok(deny(denied));
        }
        let unknown = || problem(StatusCode::NOT_FOUND, "no parked event has this id");
        let Ok(id) = id.parse::<Uuid>() else { return Ok(unknown()) };
        if !self.view.act(action, id).await? {
            return Ok(unknown());
        }
        info!(%id, ?action, "parked event changed by an operator");
        Ok(json(StatusCode::OK, &json!({ "ok": true })))
    }

    /// `GET /api/stream`: the current status, then each status and chart point as it comes.
    async fn stream(&self) -> Response<Answer> {
        let feed = self.feed.subscribe();
        let first = stream::iter([self.status_event().await]);
        let rest = stream::unfold(feed, |mut feed| async {
            loop {
                match feed.recv().await {
                    Ok(message) => return Some((message, feed)),
                    // A console that reads too slowly misses the oldest messages.
                    Err(broadcast::error::RecvError::Lagged(_)) => {}
                    Err(broadcast::error::RecvError::Closed) => return None,
                }
            }
        });
        event_stream(first.chain(rest))
    }

    /// `PUT /api/log-filter`: the body is the filter, as plain text, as a JSON string, or as `{"filter": "..."}`.
    async fn change_log_filter(&self, request: Request<Incoming>) -> Response<Answer> {
        if request.method() != Method::PUT {
            return method_not_allowed("GET, HEAD, PUT");
        }
        if let Err(denied) = self.auth.may_act(request.headers()) {
            return deny(denied);
        }
        let Some(body) = small_body(request).await else {
            return problem(StatusCode::BAD_REQUEST, "the filter could not be read");
        };
        match filter_in(&body) {
            Ok(filter) => {
                let previous = logging::set_filter(&filter);
                warn!(previous, %filter, "log filter changed by an operator, until SIGHUP or a restart");
                json(StatusCode::OK, &json!({ "filter": filter.to_string() }))
            }
            Err(what) => problem(StatusCode::BAD_REQUEST, &format!("the filter {what}")),
        }
    }

    async fn log_in(&self, request: Request<Incoming>, peer: SocketAddr) -> Response<Answer> {
        let Some(body) = small_body(request).await else {
            return problem(StatusCode::BAD_REQUEST, "the log-in form could not be read");
        };
        let token = form_urlencoded::parse(&body).find(|(name, _)| name == "token");
        let cookie = token.and_then(|(_, token)| self.auth.log_in(&token));
        match cookie.map(HeaderValue::try_from) {
            Some(Ok(cookie)) => {
                let mut response = see_other("./");
                response.headers_mut().insert(SET_COOKIE, cookie);
                response
            }
            Some(Err(_)) | None => {
                if let Some(unreported) = self.log_limiter.due("login", Instant::now()) {
                    warn!(%peer, unreported, "console log-in refused: wrong token");
                }
                see_other("login?wrong")
            }
        }
    }
}

/// A parameter of the query.
fn query(request: &Request<Incoming>, name: &str) -> Option<String> {
    let query = request.uri().query().unwrap_or_default().as_bytes();
    let found = form_urlencoded::parse(query).find(|(found, _)| found == name);
    found.map(|(_, value)| value.into_owned())
}

/// The body of a form or a command.
async fn small_body(request: Request<Incoming>) -> Option<Bytes> {
    let body = timeout(BODY_TIMEOUT, Limited::new(request.into_body(), BODY_BYTES_MAX).collect()).await;
    Some(body.ok()?.ok()?.to_bytes())
}

fn filter_in(body: &[u8]) -> Result<Filter, String> {
    let text = match serde_json::from_slice(body) {
        Ok(Value::String(text)) => Some(text),
        Ok(Value::Object(fields)) => fields.get("filter").and_then(Value::as_str).map(str::to_owned),
        // Not JSON, such as `info,lapin=debug`.
        Ok(_) | Err(_) => std::str::from_utf8(body).ok().map(str::to_owned),
    };
    text.ok_or_else(|| "is not text".to_owned())?.parse()
}

fn deny(denied: Denied) -> Response<Answer> {
    match denied {
        Denied::LoginNeeded => {
            problem(StatusCode::UNAUTHORIZED, "send ops.token as a bearer token, or log in at login")
        }
        Denied::NoToken => problem(
            StatusCode::FORBIDDEN,
            "ops.listen is not a loopback address, so the console and /api stay closed until ops.token is set",
        ),
        Denied::UnknownHost => {
            problem(StatusCode::FORBIDDEN, "without ops.token the Host header must be an IP address or localhost")
        }
        Denied::ForeignOrigin => problem(
            StatusCode::FORBIDDEN,
            "actions are accepted only from the console's own page, or with ops.token as a bearer token",
        ),
    }
}
