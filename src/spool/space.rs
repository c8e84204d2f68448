//! Room on the file system of a spool.

use std::io;
use std::path::{Path, PathBuf};

use super::files;
use super::log_keeper::Bounds;
use super::settings::Settings;

/// Room for the schema and the first events of a new spool.
const FIRST_BYTES: u64 = 1024 * 1024;

/// A disk that has too little room for the relay to accept webhooks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shortage {
    /// Bytes that have to be free.
    pub needed: u64,
    /// Bytes that are free.
    pub free: u64,
}

impl Shortage {
    /// Looks whether a relay with these settings would have the room to accept webhooks. Changes nothing. The spool's
    /// folder need not exist.
    pub fn of(settings: &Settings) -> io::Result<Option<Self>> {
        let (bounds, path) = (Bounds::of(settings.body_bytes_max), files::resolve(&settings.path)?);
        if files::has_reserve(&path, bounds.reserve) {
            return Ok(None);
        }
        let (needed, free) = (bounds.reserve + FIRST_BYTES, try_free(&existing(&path))?);
        Ok((free < needed).then_some(Self { needed, free }))
    }
}

/// The path, or the nearest folder above it that exists.
fn existing(path: &Path) -> PathBuf {
    let found = path.ancestors().find(|path| path.exists() && !path.as_os_str().is_empty());
    found.unwrap_or(Path::new(".")).to_owned()
}

/// Whether there is no room to open or convert a spool. A disk that does not say counts as one with room.
pub(super) fn is_full(path: &Path) -> bool {
    !may_fit(path, FIRST_BYTES)
}

/// Bytes that this user can still write; nothing if the disk does not say.
pub(super) fn free(path: &Path) -> u64 {
    try_free(path).unwrap_or(0)
}

/// Whether this many bytes may fit next to this file. A disk that does not say is worth a try.
pub(super) fn may_fit(file: &Path, bytes: u64) -> bool {
    try_free(file.parent().unwrap_or(Path::new("/"))).map_or(true, |free| bytes <= free)
}

fn try_free(path: &Path) -> io::Result<u64> {
    let stat = rustix::fs::statvfs(path)?;
    if stat.f_blocks == 0 {
        return Err(io::Error::other("the file system does not say how large it is"));
    }
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use tempfile::TempDir;

    use super::*;
    use crate::spool::Durability;

    #[test]
    fn a_disk_with_room_for_the_reserve_is_large_enough() {
        let folder = TempDir::new().unwrap();
        let mut settings = Settings {
            path: folder.path().join("new/folder/spool.db"),
            max_bytes: 1,
            durability: Durability::Disk,
            body_bytes_max: 1,
        };
        assert_eq!(Shortage::of(&settings).unwrap(), None);
        settings.body_bytes_max = 1 << 60;
        let shortage = Shortage::of(&settings).unwrap().unwrap();
        assert!(shortage.needed > 1 << 60 && shortage.free > 0);
    }

    /// The reserve lies next to the file that a link leads to.
    #[test]
    fn a_link_is_followed() {
        let folder = TempDir::new().unwrap();
        let [link, file] = ["link.db", "data/spool.db"].map(|name| folder.path().join(name));
        fs::create_dir(folder.path().join("data")).unwrap();
        symlink(&file, &link).unwrap();
        let settings = Settings { path: link, max_bytes: 1, durability: Durability::Disk, body_bytes_max: 1 << 40 };
        assert!(Shortage::of(&settings).unwrap().is_some());
        let reserve = fs::File::create(files::sibling(&file, files::RESERVE)).unwrap();
        // Takes no space: it has no contents.
        reserve.set_len(Bounds::of(settings.body_bytes_max).reserve).unwrap();
        assert_eq!(Shortage::of(&settings).unwrap(), None);
    }
}
