//! Reloads secrets and certificates while the relay runs: when their files change, and on SIGHUP. An unusable new value
//! changes nothing, and the log says so.
//!
//! A file may be half-written when it is read, so a change counts only after two polls have seen the same contents.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use sha2::{Digest, Sha256};
use tokio::signal::unix::Signal;
use tracing::{debug, info, warn};

use crate::metrics::Metrics;

/// How often the files are polled.
const POLL_EVERY: Duration = Duration::from_secs(2);

/// Files and the action that reloads them.
pub(crate) struct Watched {
    /// The configuration key that names the files.
    key: &'static str,
    files: Vec<PathBuf>,
    /// Contents of the files at the last reload, successful or not.
    reloaded: Digests,
    /// Contents of the files at the last poll.
    polled: Digests,
    reload: Box<dyn FnMut() -> Result<(), String> + Send>,
}

/// A digest for each file; `None` if it cannot be read. The contents themselves are secrets, so they are not kept.
type Digests = Vec<Option<[u8; 32]>>;

impl Watched {
    /// `reload` reads the files and replaces the values in use, or says why it cannot. The current contents count as
    /// already in use.
    pub(crate) fn new(
        key: &'static str,
        files: Vec<PathBuf>,
        reload: impl FnMut() -> Result<(), String> + Send + 'static,
    ) -> Self {
        let now = digests(&files);
        Self { key, files, reloaded: now.clone(), polled: now, reload: Box::new(reload) }
    }

    /// Reloads silently: the files have hardly ever changed between reading the configuration and now.
    fn catch_up(&mut self) {
        if let Err(reason) = (self.reload)() {
            debug!(key = self.key, reason, "reload failed during the start");
        }
    }

    /// Polls the files. Returns whether they have changed since the last reload and stayed the same since the last
    /// poll.
    fn has_changed(&mut self) -> bool {
        let now = digests(&self.files);
        let settled = now == self.polled;
        self.polled = now;
        settled && self.polled != self.reloaded
    }

    fn reload(&mut self, metrics: &Metrics) {
        self.reloaded = digests(&self.files);
        self.polled.clone_from(&self.reloaded);
        match (self.reload)() {
            Ok(()) => {
                metrics.reloads.done.increment(1);
                info!(key = self.key, "reloaded");
            }
            Err(reason) => {
                metrics.reloads.failed.increment(1);
                warn!(key = self.key, reason, "reload failed; keeping the previous value");
            }
        }
    }
}

/// Polls the files, and reloads them on SIGHUP, after `on_hangup`. Never returns, unless a poll panics.
pub(crate) async fn run(
    mut watched: Vec<Watched>,
    mut hangup: Signal,
    metrics: Arc<Metrics>,
    on_hangup: impl Fn() + Send,
) {
    watched.iter_mut().for_each(Watched::catch_up);
    let mut polls = tokio::time::interval(POLL_EVERY);
    loop {
        let asked = tokio::select! {
            _ = polls.tick() => false,
            _ = hangup.recv() => true,
        };
        if asked {
            on_hangup();
        }
        if asked && watched.is_empty() {
            info!("SIGHUP: no secret or certificate comes from a file, so there is nothing to reload");
        }
        let metrics = Arc::clone(&metrics);
        // A file system may hang; the runtime must not.
        let poll = tokio::task::spawn_blocking(move || {
            for watched in &mut watched {
                if asked || watched.has_changed() {
                    watched.reload(&metrics);
                }
            }
            watched
        });
        match poll.await {
            Ok(back) => watched = back,
            Err(error) => {
                debug!(%error, "polling secret files ended unexpectedly");
                return;
            }
        }
    }
}

fn digests(files: &[PathBuf]) -> Digests {
    files.iter().map(|file| std::fs::read(file).ok().map(|text| Sha256::digest(text).into())).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn a_change_counts_once_it_has_settled_and_a_bad_value_is_tried_once() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let write = |text: &str| std::fs::write(file.path(), text).unwrap();
        write("a");
        let tries = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&tries);
        let mut watched = Watched::new("key", vec![file.path().to_owned()], move || {
            counted.fetch_add(1, Ordering::Relaxed);
            Err("never good".to_owned())
        });
        assert!(!watched.has_changed() && !watched.has_changed());
        write("b");
        assert!(!watched.has_changed(), "it may still be being written");
        write("bc");
        assert!(!watched.has_changed());
        assert!(watched.has_changed());
        let metrics = Metrics::new();
        watched.reload(&metrics);
        assert!(!watched.has_changed() && !watched.has_changed());
        assert_eq!(tries.load(Ordering::Relaxed), 1);
        std::fs::remove_file(file.path()).unwrap();
        assert!(!watched.has_changed() && watched.has_changed());
    }
}
