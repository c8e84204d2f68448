//! The reserve: disk space to give up when the disk is full. A copy of the log into the file and the deletion of
//! delivered events need some, and only they free space again.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::files::{RESERVE, has_reserve, sibling};
use super::space;

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
        let held = has_reserve(spool, bytes);
        Self { path, bytes, held, tried: None }
    }

    /// The bytes that are allocated.
    pub(super) fn bytes_held(&self) -> u64 {
        if self.held { self.bytes } else { 0 }
    }

    /// Frees the space, also that of a reserve of another size or of half a one. Returns whether there was any.
    pub(super) fn give_up(&mut self) -> bool {
        (self.held, self.tried) = (false, Some(Instant::now()));
        fs::remove_file(&self.path).is_ok()
    }

    /// Whether the space is allocated. Tries to allocate it again when the last try is long enough ago.
    pub(super) fn is_held(&mut self) -> bool {
        if !self.held && self.tried.is_none_or(|tried| tried.elapsed() >= EVERY) {
            self.tried = Some(Instant::now());
            self.held = self.allocate().is_ok();
        }
        self.held
    }

    /// Writes random bytes, because some file systems store zeros without using space. Writes nothing if it would not
    /// fit: it would take the space of other programs every second.
    fn allocate(&self) -> io::Result<()> {
        // What is there is written again.
        let there = fs::symlink_metadata(&self.path).map_or(0, |metadata| metadata.blocks() * 512);
        if !space::may_fit(&self.path, self.bytes.saturating_sub(there)) {
            return Err(io::ErrorKind::StorageFull.into());
        }
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

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use tempfile::TempDir;

    use super::*;

    #[test]
    fn a_reserve_of_another_size_is_given_up() {
        let folder = TempDir::new().unwrap();
        let spool = folder.path().join("spool.db");
        for length in [0, 1 << 10, 3 << 20] {
            fs::write(sibling(&spool, RESERVE), vec![1; length]).unwrap();
            let mut reserve = Reserve::of(&spool, 2 << 20);
            assert_eq!(reserve.bytes_held(), 0, "{length}");
            assert!(reserve.give_up() && !sibling(&spool, RESERVE).exists(), "{length}");
            assert!(!reserve.give_up(), "there is none");
        }
        let mut reserve = Reserve::of(&spool, 2 << 20);
        assert!(reserve.is_held() && reserve.give_up());
    }

    #[test]
    fn a_reserve_of_another_size_is_replaced() {
        let folder = TempDir::new().unwrap();
        let spool = folder.path().join("spool.db");
        fs::write(sibling(&spool, RESERVE), "half").unwrap();
        assert!(Reserve::of(&spool, 2 << 20).is_held());
        assert!(has_reserve(&spool, 2 << 20));
    }

    #[test]
    fn a_reserve_that_does_not_fit_is_not_begun() {
        let folder = TempDir::new().unwrap();
        let spool = folder.path().join("spool.db");
        // The attempt to write would fail at once, and remove the link.
        symlink("/dev/full", sibling(&spool, RESERVE)).unwrap();
        let mut reserve = Reserve::of(&spool, 1 << 60);
        assert!(!reserve.is_held() && sibling(&spool, RESERVE).is_symlink());
    }
}
