//! Secrets and certificates that change while the relay runs: their files are looked at every few seconds, and read
//! anew when they have changed or SIGHUP asks for it. A bad new value changes nothing, and the log says so.
//!
//! A file that is being written is not taken half-finished: a change counts once two looks have seen the same.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use sha2::{Digest, Sha256};
use tokio::signal::unix::Signal;
use tracing::{debug, info, warn};

use crate::metrics::Metrics;

const LOOK_EVERY: Duration = Duration::from_secs(2);

/// Files, and what to do when they have changed.
pub struct Watched {
    /// The key of the configuration.
    key: &'static str,
    files: Vec<PathBuf>,
    /// What was last read, good or bad.
    taken: Digests,
    /// What the last look saw.
    seen: Digests,
    take: Box<dyn FnMut() -> Result<(), String> + Send>,
}

/// Of each file; `None` if it cannot be read. Their contents are secrets, which need not be kept once more.
type Digests = Vec<Option<[u8; 32]>>;

impl Watched {
    /// `take` reads the files and puts what they hold in force, or says why it cannot. What they hold now is in force.
    pub fn new(
        key: &'static str,
        files: Vec<PathBuf>,
        take: impl FnMut() -> Result<(), String> + Send + 'static,
    ) -> Self {
        let now = digests(&files);
        Self { key, files, taken: now.clone(), seen: now, take: Box::new(take) }
    }

    /// Without a word: nearly always they hold what is in force.
    fn catch_up(&mut self) {
        if let Err(reason) = (self.take)() {
            debug!(key = self.key, reason, "has changed during the start, and cannot be used");
        }
    }

    /// Whether the files have changed, and are not being written any more.
    fn has_changed(&mut self) -> bool {
        let now = digests(&self.files);
        let settled = now == self.seen;
        self.seen = now;
        settled && self.seen != self.taken
    }

    fn take(&mut self, metrics: &Metrics) {
        self.taken = digests(&self.files);
        self.seen.clone_from(&self.taken);
        match (self.take)() {
            Ok(()) => {
                metrics.reloads.done.increment(1);
                info!(key = self.key, "read anew, and in force");
            }
            Err(reason) => {
                metrics.reloads.failed.increment(1);
                warn!(key = self.key, reason, "cannot be used: what was in force before stays");
            }
        }
    }
}

/// Looks after the files for ever.
pub async fn run(mut watched: Vec<Watched>, mut hangup: Signal, metrics: Arc<Metrics>) {
    // Whatever has changed between the reading of the configuration and now.
    watched.iter_mut().for_each(Watched::catch_up);
    let mut looks = tokio::time::interval(LOOK_EVERY);
    loop {
        let asked = tokio::select! {
            _ = looks.tick() => false,
            _ = hangup.recv() => true,
        };
        if asked && watched.is_empty() {
            info!("SIGHUP: there are no files to read anew");
        }
        let metrics = Arc::clone(&metrics);
        // A file system that hangs must not hang the rest.
        let look = tokio::task::spawn_blocking(move || {
            for watched in &mut watched {
                if asked || watched.has_changed() {
                    watched.take(&metrics);
                }
            }
            watched
        });
        match look.await {
            Ok(back) => watched = back,
            Err(error) => {
                debug!(%error, "the look at the files has ended");
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
        watched.take(&metrics);
        assert!(!watched.has_changed() && !watched.has_changed());
        assert_eq!(tries.load(Ordering::Relaxed), 1);
        std::fs::remove_file(file.path()).unwrap();
        assert!(!watched.has_changed() && watched.has_changed());
    }
}
