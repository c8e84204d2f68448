//! The reserve: disk space to give up when the disk is full. A copy of the log into the file and the deletion of
//! delivered events need some, and only they free space again.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::files::{RESERVE, sibling};

/// How often to try to get the reserve back while the disk is full.
const EVERY: Duration = Duration::from_secs(1);

/// How much is written at a time.
const PIECE: usize = 1 << 20;

/// Disk space in a file of its own.
pub(super) struct Reserve {
    path: PathBuf,
    bytes: u64,
    held: bool,
    tried: Option<Instant>,
}

impl Reserve {
    /// The reserve of a spool. An earlier relay may have left it allocated, in this size or in another.
    pub(super) fn of(spool: &Path, bytes: u64) -> Self {
        let path = sibling(spool, RESERVE);
        let held = is_held(spool, bytes);
        Self { path, bytes, held, tried: None }
    }

    /// The bytes that are allocated.
    pub(super) fn bytes_held(&self) -> u64 {
        if self.held { self.bytes } else { 0 }
    }

    /// Frees the space. Returns whether there was any.
    pub(super) fn give_up(&mut self) -> bool {
        let was_held = std::mem::replace(&mut self.held, false);
        self.tried = Some(Instant::now());
        was_held && fs::remove_file(&self.path).is_ok()
    }

    /// Whether the space is allocated. Tries to allocate it again when the last try is long enough ago.
    pub(super) fn is_held(&mut self) -> bool {
        if !self.held && self.tried.is_none_or(|tried| tried.elapsed() >= EVERY) {
            self.tried = Some(Instant::now());
            self.held = self.allocate().is_ok();
        }
        self.held
    }

    /// Writes random bytes, because some file systems store zeros without using space.
    fn allocate(&self) -> io::Result<()> {
        let write = || {
            let mut options = OpenOptions::new();
            let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&self.path)?;
            let mut left = self.bytes;
            let mut piece = vec![0; PIECE.min(usize::try_from(self.bytes).unwrap_or(PIECE))];
            while left > 0 {
                let length = (piece.len() as u64).min(left);
                fastrand::fill(&mut piece);
                file.write_all(&piece[..usize::try_from(length).unwrap_or(PIECE)])?;
                left -= length;
            }
            file.sync_all()
        };
        let written = write();
        if written.is_err() {
            // Half a reserve helps nothing and takes space from the rest.
            let _ = fs::remove_file(&self.path);
        }
        written
    }
}

/// Whether a relay has allocated the reserve of this spool.
pub(super) fn is_held(spool: &Path, bytes: u64) -> bool {
    fs::metadata(sibling(spool, RESERVE)).is_ok_and(|metadata| metadata.len() == bytes)
}
