//! The files of a spool: their folder, their modes, and the lock that gives a spool to one relay.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions, Permissions, TryLockError};
use std::io;
use std::os::unix::fs::FileExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tracing::warn;

use super::error::OpenError;

/// "PRLY", by which `file` and other programs recognise a spool.
pub(super) const APPLICATION_ID: u32 = 0x5052_4c59;

/// Maximum number of symbolic links on the way to a spool, as in Linux.
const LINKS_MAX: usize = 40;

/// The path of the file that `spool.path` leads to: absolute, and not a symbolic link. SQLite puts the write-ahead log
/// next to the target of a link, so the other files belong there as well. SQLite would take a relative path such as
/// `file:spool.db` for a URI.
pub(super) fn resolve(path: &Path) -> io::Result<PathBuf> {
    let mut path = std::path::absolute(path)?;
    for _ in 0..LINKS_MAX {
        match fs::read_link(&path) {
            Ok(target) => path = path.parent().unwrap_or(Path::new("/")).join(target),
            Err(_) => return Ok(path),
        }
    }
    Err(io::Error::other("too many symbolic links"))
}

/// The path with `suffix` appended to its file name.
pub fn sibling(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path.as_os_str());
    name.push(suffix);
    PathBuf::from(name)
}

/// Whether the file has another name, a hard link.
pub(super) fn has_another_name(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|metadata| metadata.nlink() > 1)
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

/// Makes sure that the file exists and that only its owner can read and write it: it holds people's data. SQLite gives
/// the `-wal` and `-shm` files the mode of the database. Returns whether the file was created.
pub(super) fn create_private(path: &Path) -> io::Result<bool> {
    match OpenOptions::new().write(true).create_new(true).mode(0o600).open(path) {
        Ok(file) => file.sync_all().and_then(|()| sync_folder(path)).map(|()| true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            fs::set_permissions(path, Permissions::from_mode(0o600)).map(|()| false)
        }
        Err(error) => Err(error),
    }
}

/// Detects that the opened files were deleted, replaced or unmounted. Open files go on working then, but the data
/// written to them is gone with the process.
pub(super) struct FileIdentity(Vec<(PathBuf, Inode)>);

/// A file, whatever its name: its device and its number there.
type Inode = (u64, u64);

fn inode(metadata: &fs::Metadata) -> Inode {
    (metadata.dev(), metadata.ino())
}

impl FileIdentity {
    /// Identifies the open spool and its log.
    pub(super) fn of(spool: &Path) -> io::Result<Self> {
        let paths = [spool.to_owned(), sibling(spool, "-wal")];
        let numbered = paths.into_iter().map(|path| fs::metadata(&path).map(|metadata| (path, inode(&metadata))));
        Ok(Self(numbered.collect::<io::Result<_>>()?))
    }

    /// Whether the paths still lead to the same files.
    pub(super) fn is_unchanged(&self) -> bool {
        self.0.iter().all(|(path, known)| fs::metadata(path).is_ok_and(|metadata| inode(&metadata) == *known))
    }
}

/// Suffix of the file that reserves disk space.
pub(super) const RESERVE: &str = ".reserve";

/// Whether a relay has allocated the reserve of this spool.
pub(super) fn has_reserve(spool: &Path, bytes: u64) -> bool {
    fs::metadata(sibling(spool, RESERVE)).is_ok_and(|metadata| metadata.len() == bytes)
}

/// The right to use a spool: a lock of the file itself, so that a relay which reaches the file by another name (a hard
/// link, another mount) does not get it.
///
/// The descriptor stays open for as long as SQLite uses the file: when a process closes any descriptor of a file, it
/// loses SQLite's locks of that file (<https://www.sqlite.org/howtocorrupt.html>, section 2.2).
pub(super) struct Lock {
    file: File,
    /// Suffix of the locked file.
    suffix: &'static str,
    is_new: bool,
    is_old: bool,
}

/// How often to look again when the file is replaced while it is being locked.
const REPLACED_MAX: usize = 10;

impl Lock {
    /// Locks the file, and creates it if it is missing. On a full disk the reserve makes room for that: a relay that
    /// starts can deliver, and that makes room for the rest.
    ///
    /// `complete`: suffix of a recovered file that is about to take the place of the spool. If there is one, it is
    /// locked instead.
    pub(super) fn take(path: &Path, complete: &'static str) -> Result<Self, OpenError> {
        match Self::try_to_take(path, complete) {
            Err(OpenError::Io { source, .. })
                if lacks_space(&source) && fs::remove_file(sibling(path, RESERVE)).is_ok() =>
            {
                warn!("the disk is full: freed the reserve of the spool to start");
                Self::try_to_take(path, complete)
            }
            outcome => outcome,
        }
    }

    fn try_to_take(path: &Path, complete: &'static str) -> Result<Self, OpenError> {
        let io = |source| OpenError::Io { path: path.to_owned(), source };
        create_folder(path).map_err(io)?;
        let chosen = || if sibling(path, complete).exists() { complete } else { "" };
        for _ in 0..REPLACED_MAX {
            let suffix = chosen();
            let is_new = suffix.is_empty() && create_private(path).map_err(io)?;
            let target = sibling(path, suffix);
            let Some(file) = unless_missing(OpenOptions::new().read(true).write(true).open(&target)).map_err(io)?
            else {
                continue;
            };
            lock(&file, path)?;
            // Another relay may have put a recovered file in place before this one got the lock.
            if chosen() == suffix && is_at(&file, &target) {
                let is_old = is_spool(&file) || sibling(path, RESERVE).exists();
                return Ok(Self { file, suffix, is_new, is_old });
            }
        }
        Err(OpenError::Locked { path: path.to_owned(), pid: None })
    }

    /// Locks the file with this suffix in place of the other one, which no connection may have open. After that it can
    /// be renamed to the path of the spool.
    pub(super) fn move_to(&mut self, path: &Path, suffix: &'static str) -> Result<(), OpenError> {
        if self.suffix != suffix {
            let opened = OpenOptions::new().read(true).write(true).open(sibling(path, suffix));
            let file = opened.map_err(|source| OpenError::Io { path: path.to_owned(), source })?;
            lock(&file, path)?;
            (self.file, self.suffix) = (file, suffix);
        }
        Ok(())
    }

    /// Whether taking the lock created the file.
    pub(super) fn is_new(&self) -> bool {
        self.is_new
    }

    /// Whether a relay used this path before.
    pub(super) fn is_old(&self) -> bool {
        self.is_old
    }

    /// Whether a relay has locked this file. Looks for an instant, and changes nothing. Not while this process has the
    /// file open through SQLite: see [`Lock`].
    pub(super) fn is_held(path: &Path) -> bool {
        File::open(path).is_ok_and(|file| file.try_lock_shared().is_err())
    }
}

/// Retries for 200 ms: `check` holds the lock for an instant to find out whether a relay has it.
fn lock(file: &File, path: &Path) -> Result<(), OpenError> {
    let mut tries = 10;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(()),
            Err(TryLockError::WouldBlock) if tries > 0 => std::thread::sleep(Duration::from_millis(20)),
            Err(TryLockError::WouldBlock) => return Err(OpenError::Locked { path: path.to_owned(), pid: None }),
            Err(TryLockError::Error(source)) => return Err(OpenError::Io { path: path.to_owned(), source }),
        }
        tries -= 1;
    }
}

/// Whether the path leads to this open file.
fn is_at(file: &File, path: &Path) -> bool {
    let inodes = (file.metadata(), fs::metadata(path));
    matches!(inodes, (Ok(open), Ok(found)) if inode(&open) == inode(&found))
}

/// Whether the head of the file says that it is a spool. Reads without SQLite, because the file may be damaged.
fn is_spool(file: &File) -> bool {
    let mut id = [0; 4];
    // Where SQLite has the application id: https://www.sqlite.org/fileformat2.html, 1.3.
    file.read_exact_at(&mut id, 68).is_ok() && id == APPLICATION_ID.to_be_bytes()
}

fn lacks_space(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge)
}

/// `None` if the file is missing.
pub(super) fn unless_missing<T>(outcome: io::Result<T>) -> io::Result<Option<T>> {
    match outcome {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        outcome => outcome.map(Some),
    }
}
