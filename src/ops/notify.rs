//! Posts notices to the address of `notify.url` when the state of the relay has changed, and when all is well again.
//!
//! Never in the way of anything: the newest notice replaces one that still waits, every request has a deadline, and
//! nothing waits for a receiver. The last notice that arrived is kept next to the spool, so that after a restart the
//! end of a problem is reported, and the problem is not reported again.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HeaderValue, USER_AGENT};
use hyper::{Request, Uri};
use jiff::Timestamp;
use percent_encoding::percent_decode_str;
use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tracing::{debug, info, warn};

use super::answers::{Headline, Level};
use super::notices::{Policy, Told};
use crate::backoff::Backoff;
use crate::http_client::{HttpClient, public_client, status_of};
use crate::secret::Secret;
use crate::signature::{SIGNATURE_HEADER, TIMESTAMP_HEADER, sign};
use crate::spool::sibling;
use crate::text::hex;

/// Maximum time for one request.
const DEADLINE: Duration = Duration::from_secs(10);
/// The pause before another try, which grows from the first to the second.
const RETRY_MIN: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(300);
/// How long a notice is tried. A network that is down for a night takes the receiver with it.
const GIVE_UP_AFTER: Duration = Duration::from_secs(24 * 3600);
/// Maximum wait for the disk, which may be what the next notice is about.
const KEEP_TIMEOUT: Duration = Duration::from_secs(5);
/// Far larger than any notice.
const KEPT_BYTES_MAX: u64 = 64 * 1024;
/// The file of the last notice is filled up to a multiple of this, and written in place, so that it can be written
/// while the disk is full.
const BLOCK: usize = 4096;
/// The first bytes of a file that holds a notice. Other files are left alone.
const KEPT_START: &[u8] = b"{\"to\":\"";

/// The section `[notify]`.
#[derive(Debug, Default)]
pub struct Settings {
    /// Where notices go; `None`: nowhere.
    pub target: Option<Target>,
    /// Signs the notices.
    pub secret: Option<Secret>,
    /// The file that holds the secret; it is reloaded when it changes.
    pub secret_file: Option<PathBuf>,
}

/// The address that notices are posted to. Chat services put a key into its path, so only its origin may be shown.
#[derive(Clone, Debug)]
pub struct Target {
    url: Secret,
    origin: String,
    /// The value of the header, from the login in the URL.
    authorization: Option<Secret>,
}

/// A notice, as it is posted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Notice {
    level: Level,
    /// The `id` of an answer in `/api/status`: the one that the headline is about, or the one that is well again.
    answer: Option<String>,
    text: String,
    /// What to do, if there is something to do.
    remedy: Option<String>,
    host: String,
    /// When this state began.
    since: Timestamp,
}

/// The last notice, for `/api/status`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct LastNotice {
    #[serde(flatten)]
    notice: Notice,
    state: State,
    /// When it arrived, or was last tried.
    at: Timestamp,
    /// Why it has not arrived.
    error: Option<String>,
}

/// The last notice that arrived, as it is kept for the next start.
#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    /// The [`Target::fingerprint`] of the receiver. What another one got, this one has not heard of.
    to: String,
    #[serde(flatten)]
    last: LastNotice,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum State {
    Sent,
    /// Not sent yet; it is tried again.
    Trying,
    /// Given up.
    Failed,
}

/// The part `notify` of `/api/status`.
#[derive(Debug, Serialize)]
pub(super) struct NotifyReport {
    /// Scheme, host and port of `notify.url`.
    pub to: String,
    pub last: Option<LastNotice>,
}

/// Decides and sends.
pub(crate) struct Notifier {
    target: Option<Target>,
    secret: RwLock<Option<Secret>>,
    host: String,
    policy: Mutex<Policy>,
    /// The newest notice.
    news: watch::Sender<Option<Notice>>,
    last: Mutex<Option<LastNotice>>,
    /// Where the last notice that arrived is kept.
    file: PathBuf,
}

impl Target {
    /// Reads an address. The error completes the sentence "the value ...", and does not quote it.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let uri: Uri = text.parse().map_err(|_| NOT_AN_ADDRESS.to_owned())?;
        let (Some(scheme @ ("http" | "https")), Some(authority)) = (uri.scheme_str(), uri.authority()) else {
            return Err(NOT_AN_ADDRESS.to_owned());
        };
        let (login, address) =
            authority.as_str().rsplit_once('@').map_or((None, authority.as_str()), |(login, address)| {
                (Some(percent_decode_str(login).decode_utf8_lossy()), address)
            });
        if authority.host().is_empty() {
            return Err(NOT_AN_ADDRESS.to_owned());
        }
        let origin = format!("{scheme}://{address}");
        let path = uri.path_and_query().map_or("/", |path| path.as_str());
        let basic = |login| Secret::new(format!("Basic {}", BASE64_STANDARD.encode::<&str>(login)));
        Ok(Self { url: Secret::new(format!("{origin}{path}")), origin, authorization: login.as_deref().map(basic) })
    }

    /// Scheme, host and port: as much as may be shown.
    pub(crate) fn origin(&self) -> &str {
        &self.origin
    }

    /// Whether the receiver answers at all. Posts nothing.
    pub(crate) async fn probe(&self) -> Result<u16, String> {
        let request = Request::head(self.url.expose()).body(Full::default());
        let request = request.map_err(|error| error.to_string())?;
        status_of(&self.client().await?, request, DEADLINE).await.map(|status| status.as_u16())
    }

    /// Tells this address from others, also by its path, and shows nothing of it.
    fn fingerprint(&self) -> String {
        hex(&Sha256::digest(self.url.expose())[..8])
    }

    async fn client(&self) -> Result<HttpClient, String> {
        public_client(self.origin.starts_with("https")).await
    }

    /// Posts a body. The error says why it was not taken.
    async fn post(&self, client: &HttpClient, secret: Option<&Secret>, body: Vec<u8>) -> Result<(), String> {
        let mut request = Request::post(self.url.expose())
            .header(CONTENT_TYPE, "application/json")
            .header(USER_AGENT, concat!("prism-relay/", env!("CARGO_PKG_VERSION")));
        if let Some(secret) = secret {
            let timestamp = Timestamp::now().to_string();
            request =
                request.header(SIGNATURE_HEADER, sign(secret, &timestamp, &body)).header(TIMESTAMP_HEADER, timestamp);
        }
        if let Some(authorization) = &self.authorization {
            let mut value = HeaderValue::try_from(authorization.expose()).map_err(|error| error.to_string())?;
            value.set_sensitive(true);
            request = request.header(AUTHORIZATION, value);
        }
        let request = request.body(Full::new(Bytes::from(body))).map_err(|error| error.to_string())?;
        let status = status_of(client, request, DEADLINE).await?;
        match status.is_success() {
            true => Ok(()),
            // The client follows no redirect: a signed notice is for this address only.
            false if status.is_redirection() => {
                Err(format!("answers {}, a redirect, which is not followed", status.as_u16()))
            }
            false => Err(format!("answers {}", status.as_u16())),
        }
    }
}

const NOT_AN_ADDRESS: &str = "is not an address such as https://example.com/prism-relay";

impl Notifier {
    /// `host`: the name of this machine. `spool`: the file that the last notice is kept next to.
    pub(crate) fn new(settings: Settings, host: String, spool: &Path) -> Self {
        let file = sibling(spool, ".notice");
        let last = settings.target.as_ref().and_then(|target| {
            let kept = prepare(&file).unwrap_or_else(|error| {
                warn_not_kept(&file, &error);
                None
            });
            kept.filter(|kept| kept.to == target.fingerprint()).map(|kept| kept.last)
        });
        let told = last.as_ref().map_or(Told { level: Level::Ok, answer: None }, |LastNotice { notice, .. }| Told {
            level: notice.level,
            answer: notice.answer.clone(),
        });
        Self {
            target: settings.target,
            secret: RwLock::new(settings.secret),
            host,
            policy: Mutex::new(Policy::new(told, Instant::now())),
            news: watch::Sender::new(None),
            last: Mutex::new(last),
            file,
        }
    }

    pub(crate) fn set_secret(&self, secret: Secret) {
        *self.secret.write().unwrap_or_else(PoisonError::into_inner) = Some(secret);
    }

    pub(super) fn is_on(&self) -> bool {
        self.target.is_some()
    }

    pub(super) fn report(&self) -> Option<NotifyReport> {
        let to = self.target.as_ref()?.origin.clone();
        Some(NotifyReport { to, last: self.last().clone() })
    }

    /// Takes the headline as it is now, and has a notice sent if one is due.
    pub(super) fn observe(&self, headline: &Headline, now: Instant) {
        let mut policy = self.policy.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(due) = policy.see(headline.level, headline.answer, now) else { return };
        let notice = Notice {
            level: due.told.level,
            answer: due.told.answer,
            text: format!("{} {}", headline.text, headline.detail).trim_end().to_owned(),
            remedy: Some(headline.advice.clone()).filter(|advice| !advice.is_empty()),
            host: self.host.clone(),
            since: Timestamp::now() - now.saturating_duration_since(due.since),
        };
        self.news.send_replace(Some(notice));
    }

    /// Sends the notices, one at a time. Never returns.
    pub(crate) async fn run(&self) {
        let Some(target) = &self.target else { return std::future::pending().await };
        let mut news = self.news.subscribe();
        news.mark_changed();
        // Ends never, because the sender lives as long as this.
        while news.changed().await.is_ok() {
            let notice = news.borrow_and_update().clone();
            if let Some(notice) = notice {
                self.deliver(target, notice, &mut news).await;
            }
        }
    }

    /// Tries until the notice has arrived, a newer one replaces it, or it is too old.
    async fn deliver(&self, target: &Target, notice: Notice, news: &mut watch::Receiver<Option<Notice>>) {
        let (begun, mut backoff) = (Instant::now(), Backoff::new(RETRY_MIN, RETRY_MAX));
        let Target { origin, .. } = target;
        let mut is_first = true;
        loop {
            let error = match self.post(target, &notice).await {
                Ok(()) => break,
                Err(error) => error,
            };
            let state = if begun.elapsed() < GIVE_UP_AFTER { State::Trying } else { State::Failed };
            if state == State::Failed {
                warn!(to = origin, error, "notice given up: the receiver did not take it for a day");
            } else if is_first {
                warn!(
                    to = origin,
                    error, "cannot send a notice to notify.url; trying again. Webhooks are not affected"
                );
            } else {
                debug!(to = origin, error, "cannot send a notice to notify.url; trying again");
            }
            is_first = false;
            self.remember(LastNotice { notice: notice.clone(), state, at: Timestamp::now(), error: Some(error) });
            if state == State::Failed {
                return;
            }
            tokio::select! {
                () = sleep(backoff.next(fastrand::f64())) => {}
                _ = news.changed() => {
                    news.mark_changed();
                    return;
                }
            }
        }
        info!(to = origin, level = ?notice.level, answer = notice.answer, "notice sent");
        let last = LastNotice { notice, state: State::Sent, at: Timestamp::now(), error: None };
        self.remember(last.clone());
        let (file, kept) = (self.file.clone(), Kept { to: target.fingerprint(), last });
        let kept = timeout(KEEP_TIMEOUT, tokio::task::spawn_blocking(move || keep(&file, &kept))).await;
        if let Ok(Ok(Err(error))) = kept {
            warn_not_kept(&self.file, &error);
        }
    }

    async fn post(&self, target: &Target, notice: &Notice) -> Result<(), String> {
        let body = serde_json::to_vec(notice).map_err(|error| error.to_string())?;
        let secret = self.secret.read().unwrap_or_else(PoisonError::into_inner).clone();
        // Made for each try, so that authorities which the system gets later count.
        target.post(&target.client().await?, secret.as_ref(), body).await
    }

    fn remember(&self, last: LastNotice) {
        *self.last() = Some(last);
    }

    fn last(&self) -> MutexGuard<'_, Option<LastNotice>> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn warn_not_kept(file: &Path, error: &io::Error) {
    warn!(
        path = %file.display(), %error,
        "cannot keep the last notice; after a restart it may be sent again, and the end of a problem not reported"
    );
}

/// Makes sure that a notice can be kept in this file. Returns the one that is, if it can be read.
fn prepare(file: &Path) -> io::Result<Option<Kept>> {
    let (file, kept) = open(file)?;
    if kept.is_empty() {
        write(&file, Vec::new())?;
    }
    Ok(serde_json::from_slice(&kept).ok())
}

fn keep(file: &Path, kept: &Kept) -> io::Result<()> {
    write(&open(file)?.0, serde_json::to_vec(kept)?)
}

/// Fills up with spaces, which JSON may end with.
fn write(file: &File, mut text: Vec<u8>) -> io::Result<()> {
    text.resize(text.len().max(1).next_multiple_of(BLOCK), b' ');
    file.write_all_at(&text, 0)?;
    file.set_len(text.len() as u64)
}

/// Opens or creates a file, and reads it. Follows no link, and does not wait for the other end of a pipe.
fn open(path: &Path) -> io::Result<(File, Vec<u8>)> {
    let mut options = OpenOptions::new();
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    options.read(true).write(true).create(true).truncate(false).mode(0o600).custom_flags(flags.bits().cast_signed());
    let file = options.open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    let mut text = Vec::new();
    file.try_clone()?.take(KEPT_BYTES_MAX).read_to_end(&mut text)?;
    if !text.trim_ascii().is_empty() && !text.starts_with(KEPT_START) {
        return Err(io::Error::other("it is not a notice of prism-relay; move it away"));
    }
    Ok((file, text))
}

#[cfg(test)]
mod tests;
