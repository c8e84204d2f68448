//! The files of a spool: their folder, their modes, and the lock that gives a spool to one relay.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions, Permissions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::OpenError;

/// The file beside the spool with this ending.
pub(super) fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut name = OsString::from(path.as_os_str());
    name.push(ending);
    PathBuf::from(name)
}

/// Creates the folder of `path` if need be.
fn create_folder(path: &Path) -> io::Result<()> {
    let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) else { return Ok(()) };
    let new: Vec<&Path> = folder.ancestors().take_while(|folder| !folder.exists()).collect();
    fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    // The entries of the new folders have to survive a power loss, too.
    new.into_iter().try_for_each(sync_folder)
}

/// Syncs the folder that holds `path`.
pub(super) fn sync_folder(path: &Path) -> io::Result<()> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(parent)?.sync_all()
}

/// The file holds people's data and the relay's only copy of it: it is the owner's alone. SQLite gives its
/// companions (-wal, -shm) the mode of the file.
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

/// Tells whether the files that were opened are still the ones that the names lead to. If a folder is deleted or
/// unmounted, open files go on working, and what is written to them is gone with the process.
pub(super) struct Presence(Vec<(PathBuf, u64)>);

impl Presence {
    /// Of the open spool and its log.
    pub fn of(spool: &Path) -> io::Result<Self> {
        let paths = [spool.to_owned(), beside(spool, "-wal")];
        let numbered = paths.into_iter().map(|path| fs::metadata(&path).map(|metadata| (path, metadata.ino())));
        Ok(Self(numbered.collect::<io::Result<_>>()?))
    }

    pub fn holds(&self) -> bool {
        self.0.iter().all(|(path, number)| fs::metadata(path).is_ok_and(|metadata| metadata.ino() == *number))
    }
}

/// Disk space that is given up when there is no other left: carrying the log over, and noting what has been delivered,
/// takes some, and only that makes room again.
pub(super) struct Reserve {
    path: PathBuf,
    held: bool,
    tried: Instant,
}

/// The file of the reserve ends with this.
pub(super) const RESERVE: &str = ".reserve";

/// More than the log grows to before it is carried over (4 MiB and a batch).
const RESERVE_BYTES: usize = 8 * 1024 * 1024;

/// While the disk is full, how often the reserve is tried to be got back.
const RESERVE_EVERY: Duration = Duration::from_secs(1);

impl Reserve {
    /// Takes the space, or finds it taken by an earlier relay.
    pub fn of(spool: &Path) -> Self {
        let path = beside(spool, RESERVE);
        let held = fs::metadata(&path).is_ok_and(|metadata| metadata.len() == RESERVE_BYTES as u64);
        let mut reserve = Self { path, held, tried: Instant::now() };
        if !held {
            reserve.held = reserve.take().is_ok();
        }
        reserve
    }

    /// Gives the space up. Returns whether there was any.
    pub fn give_up(&mut self) -> bool {
        let was_held = std::mem::replace(&mut self.held, false);
        self.tried = Instant::now();
        was_held && fs::remove_file(&self.path).is_ok()
    }

    /// Whether the space is held, after another try to get it back if it is time for one.
    pub fn is_held(&mut self) -> bool {
        if !self.held && self.tried.elapsed() >= RESERVE_EVERY {
            self.tried = Instant::now();
            self.held = self.take().is_ok();
        }
        self.held
    }

    /// Random bytes, because some file systems store zeros in no space at all.
    fn take(&self) -> io::Result<()> {
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
            // Half a reserve is none, and the half is missed elsewhere.
            let _ = fs::remove_file(&self.path);
        }
        written
    }
}

/// The right to a spool. It is a file of its own, because SQLite loses its locks when a process opens and closes the
/// database a second time (<https://www.sqlite.org/howtocorrupt.html>, section 2.2). In it stands the pid of the relay,
/// for people, and to tell a spool that was closed from one whose relay has died.
pub(super) struct Lock {
    file: File,
    is_old: bool,
    crashed: bool,
}

impl Lock {
    /// Takes the lock, or says who has it.
    pub fn take(path: &Path) -> Result<Self, OpenError> {
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

    pub fn path(spool: &Path) -> PathBuf {
        beside(spool, ".lock")
    }

    /// Whether there has been a relay on this spool before.
    pub fn is_old(&self) -> bool {
        self.is_old
    }

    /// Whether the last relay on this spool has died without closing it.
    pub fn crashed(&self) -> bool {
        self.crashed
    }

    /// Gives the lock back, for a spool that has been closed.
    pub fn release(self) {
        // Should it fail, the next relay looks more closely, and that is all.
        let _ = self.file.set_len(0);
    }
}

/// Tries for a moment: `check` holds the lock for an instant when it asks whether somebody has it.
fn try_lock(file: &File) -> Result<(), TryLockError> {
    for _ in 0..10 {
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => std::thread::sleep(Duration::from_millis(20)),
            outcome => return outcome,
        }
    }
    file.try_lock()
}
