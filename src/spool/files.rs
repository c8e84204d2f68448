//! The files of a spool: their folder, their modes, and the lock that gives a spool to one relay.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions, Permissions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tracing::warn;

use super::error::OpenError;

/// The path with `suffix` appended to its file name.
pub(super) fn sibling(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path.as_os_str());
    name.push(suffix);
    PathBuf::from(name)
}

/// Creates the missing folders above `path`.
fn create_folder(path: &Path) -> io::Result<()> {
    let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) else { return Ok(()) };
    let new: Vec<&Path> = folder.ancestors().take_while(|folder| !folder.exists()).collect();
    fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    // The entries of the new folders have to survive a power loss as well.
    new.into_iter().try_for_each(sync_folder)
}

/// Syncs the folder that holds `path`.
pub(super) fn sync_folder(path: &Path) -> io::Result<()> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(parent)?.sync_all()
}

/// Creates the file, readable and writable for its owner only: it holds people's data. SQLite gives the `-wal` and
/// `-shm` files the mode of the database.
pub(super) fn create_private(path: &Path) -> io::Result<()> {
    match OpenOptions::new().write(true).create_new(true).mode(0o600).open(path) {
        Ok(file) => {
            file.sync_all()?;
            sync_folder(path)
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            fs::set_permissions(path, Permissions::from_mode(0o600))
        }
        Err(error) => Err(error),
    }
}

/// Detects that the opened files were deleted, replaced or unmounted. Open files go on working then, but the data
/// written to them is gone with the process.
pub(super) struct FileIdentity(Vec<(PathBuf, u64)>);

impl FileIdentity {
    /// Identifies the open spool and its log.
    pub(super) fn of(spool: &Path) -> io::Result<Self> {
        let paths = [spool.to_owned(), sibling(spool, "-wal")];
        let numbered = paths.into_iter().map(|path| fs::metadata(&path).map(|metadata| (path, metadata.ino())));
        Ok(Self(numbered.collect::<io::Result<_>>()?))
    }

    /// Whether the paths still lead to the same files.
    pub(super) fn is_unchanged(&self) -> bool {
        self.0.iter().all(|(path, number)| fs::metadata(path).is_ok_and(|metadata| metadata.ino() == *number))
    }
}

/// Disk space to give up when the disk is full: a checkpoint and the deletion of delivered events need some, and only
/// they free space again.
pub(super) struct Reserve {
    path: PathBuf,
    held: bool,
    tried: Instant,
}

/// Suffix of the reserve's file.
pub(super) const RESERVE: &str = ".reserve";

/// Size of the reserve: more than the log grows to before a checkpoint (4 MiB and one batch).
const RESERVE_BYTES: usize = 8 * 1024 * 1024;

/// How often to try to get the reserve back while the disk is full.
const RESERVE_EVERY: Duration = Duration::from_secs(1);

impl Reserve {
    /// Allocates the space, unless an earlier relay left it allocated.
    pub(super) fn of(spool: &Path) -> Self {
        let path = sibling(spool, RESERVE);
        let held = fs::metadata(&path).is_ok_and(|metadata| metadata.len() == RESERVE_BYTES as u64);
        let mut reserve = Self { path, held, tried: Instant::now() };
        if !held {
            reserve.held = reserve.allocate().is_ok();
        }
        reserve
    }

    /// Frees the space. Returns whether there was any.
    pub(super) fn give_up(&mut self) -> bool {
        let was_held = std::mem::replace(&mut self.held, false);
        self.tried = Instant::now();
        was_held && fs::remove_file(&self.path).is_ok()
    }

    /// Whether [`Self::is_held`] would try to allocate the space again.
    pub(super) fn is_due(&self) -> bool {
        !self.held && self.tried.elapsed() >= RESERVE_EVERY
    }

    /// Whether the space is allocated. Tries to allocate it again when the last try is long enough ago.
    pub(super) fn is_held(&mut self) -> bool {
        if self.is_due() {
            self.tried = Instant::now();
            self.held = self.allocate().is_ok();
        }
        self.held
    }

    /// Writes random bytes, because some file systems store zeros without using space.
    fn allocate(&self) -> io::Result<()> {
        let mut bytes = vec![0; RESERVE_BYTES];
        fastrand::fill(&mut bytes);
        let written = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&self.path)
            .and_then(|mut file| file.write_all(&bytes).and_then(|()| file.sync_all()));
        if written.is_err() {
            // Half a reserve helps nothing and takes space from the rest.
            let _ = fs::remove_file(&self.path);
        }
        written
    }
}

/// The right to use a spool. The lock is a file of its own, because SQLite loses its locks when a process opens and
/// closes the database a second time (<https://www.sqlite.org/howtocorrupt.html>, section 2.2). The file holds the pid
/// of the relay, for operators, and is emptied when the spool is closed, so that the next relay can detect a crash.
pub(super) struct Lock {
    file: File,
    is_old: bool,
    crashed: bool,
}

impl Lock {
    /// Takes the lock, or fails with the pid of the relay that has it. On a full disk the reserve makes room for it: a
    /// relay that starts can deliver, and that makes room for the rest.
    pub(super) fn take(path: &Path) -> Result<Self, OpenError> {
        match Self::try_to_take(path) {
            Err(OpenError::Io { source, .. })
                if lacks_space(&source) && fs::remove_file(sibling(path, RESERVE)).is_ok() =>
            {
                warn!("the disk is full: freed the reserve of the spool to start");
                Self::try_to_take(path)
            }
            outcome => outcome,
        }
    }

    fn try_to_take(path: &Path) -> Result<Self, OpenError> {
        create_folder(path).map_err(|source| OpenError::Io { path: path.to_owned(), source })?;
        let lock_path = Self::path(path);
        let io = |source| OpenError::Io { path: lock_path.clone(), source };
        let is_old = lock_path.exists();
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let mut file = options.open(&lock_path).map_err(io)?;
        let taken = try_lock(&file);
        let mut pid = String::new();
        file.read_to_string(&mut pid).map_err(io)?;
        match taken {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(OpenError::Locked { path: path.to_owned(), pid }),
            Err(TryLockError::Error(source)) => return Err(io(source)),
        }
        let written =
            file.set_len(0).and_then(|()| file.rewind()).and_then(|()| write!(file, "{}", std::process::id()));
        written.map_err(io)?;
        Ok(Self { file, is_old, crashed: !pid.is_empty() })
    }

    pub(super) fn path(spool: &Path) -> PathBuf {
        sibling(spool, ".lock")
    }

    /// Whether a relay used this spool before.
    pub(super) fn is_old(&self) -> bool {
        self.is_old
    }

    /// Whether the last relay on this spool ended without closing it.
    pub(super) fn crashed(&self) -> bool {
        self.crashed
    }

    /// Releases the lock after the spool was closed.
    pub(super) fn release(self) {
        // If this fails, the next relay assumes a crash, which is harmless.
        let _ = self.file.set_len(0);
    }
}

fn lacks_space(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge)
}

/// Retries for 200 ms: `check` holds the lock for an instant to find out whether a relay has it.
fn try_lock(file: &File) -> Result<(), TryLockError> {
    for _ in 0..10 {
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => std::thread::sleep(Duration::from_millis(20)),
            outcome => return outcome,
        }
    }
    file.try_lock()
}
