//! Where a spool lies: on which kind of file system, and whether its file is mounted without its folder.

use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::error::OpenError;
use super::files;

/// Linux lists the mounts of this process here (proc_pid_mountinfo(5)). Elsewhere the file is missing.
const MOUNTS: &str = "/proc/self/mountinfo";

/// File systems in memory.
const IN_MEMORY: [&str; 2] = ["tmpfs", "ramfs"];

/// File systems of other machines. A mount through FUSE has a type such as `fuse.sshfs`.
const ON_A_NETWORK: [&str; 16] = [
    "9p",
    "afs",
    "beegfs",
    "ceph",
    "cifs",
    "fuse.ceph",
    "fuse.glusterfs",
    "fuse.s3fs",
    "fuse.sshfs",
    "glusterfs",
    "lustre",
    "ncpfs",
    "nfs",
    "nfs4",
    "smb3",
    "smbfs",
];

/// The kind of file system that a spool is on, with the name that the kernel gives it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FileSystem {
    /// A local disk, as far as is known.
    Local,
    /// Memory: everything is lost when the machine restarts or the file system is unmounted.
    Memory(String),
    /// Another machine's: file locks and syncs may not hold.
    Network(String),
}

impl FileSystem {
    /// Finds out where the spool with this `spool.path` is, or will be when it is created. Creates nothing.
    pub fn of(path: &Path) -> Self {
        let Ok(path) = files::resolve(path) else { return Self::Local };
        // The nearest folder that exists.
        let found = path.ancestors().find_map(|above| above.canonicalize().ok());
        let (Some(found), Some(mounts)) = (found, Mounts::read()) else { return Self::Local };
        Self::by_name(mounts.file_system(&found))
    }

    fn by_name(name: Option<&str>) -> Self {
        match name {
            Some(name) if IN_MEMORY.contains(&name) => Self::Memory(name.to_owned()),
            Some(name) if ON_A_NETWORK.contains(&name) => Self::Network(name.to_owned()),
            Some(_) | None => Self::Local,
        }
    }

    /// What is wrong with keeping a spool there, and what to do; `None` on a local disk.
    pub fn warning(&self) -> Option<&'static str> {
        match self {
            Self::Local => None,
            Self::Memory(_) => Some(
                "the spool is on a file system in memory: accepted events are lost when the machine restarts; \
                 set spool.path to a local disk",
            ),
            Self::Network(_) => Some(
                "the spool is on a network file system, where accepted events may be lost; \
                 set spool.path to a local disk",
            ),
        }
    }
}

/// Refuses a spool whose file is mounted without its folder, as `docker run -v spool.db:/data/spool.db` does: the log
/// next to the file would be lost with the container.
///
/// A file that does not exist is fine.
pub fn check_mount(path: &Path) -> Result<(), OpenError> {
    let Ok(file) = files::resolve(path).and_then(|path| path.canonicalize()) else { return Ok(()) };
    let Some(folder) = file.parent() else { return Ok(()) };
    let device = |path: &Path| fs::metadata(path).map(|metadata| metadata.dev()).ok();
    if !is_mounted(Mounts::read().as_ref(), &file, (device(&file), device(folder))) {
        return Ok(());
    }
    let folder = folder.to_owned();
    Err(OpenError::Mounted { path: file, folder })
}

/// Whether something is mounted on this file. Its device and that of its folder decide only where the mounts are not
/// known: on overlayfs, a file may have another device than its folder.
fn is_mounted(mounts: Option<&Mounts>, file: &Path, devices: (Option<u64>, Option<u64>)) -> bool {
    mounts.map_or(devices.0 != devices.1, |mounts| mounts.contain(file))
}

/// The mounts of this process, in the order in which they were made.
struct Mounts(Vec<Mount>);

struct Mount {
    point: PathBuf,
    file_system: String,
}

impl Mounts {
    /// `None` if they cannot be read.
    fn read() -> Option<Self> {
        Some(Self::parse(&fs::read(MOUNTS).ok()?))
    }

    fn parse(text: &[u8]) -> Self {
        Self(text.split(|byte| *byte == b'\n').filter_map(Mount::parse).collect())
    }

    /// Whether something is mounted on exactly this path.
    fn contain(&self, path: &Path) -> bool {
        self.0.iter().any(|mount| mount.point == path)
    }

    /// The type of the file system that holds this absolute path.
    fn file_system(&self, path: &Path) -> Option<&str> {
        let above = self.0.iter().filter(|mount| path.starts_with(&mount.point));
        // Of several mounts on the same point the last one is visible, and `max_by_key` returns the last one.
        above.max_by_key(|mount| mount.point.as_os_str().len()).map(|mount| mount.file_system.as_str())
    }
}

impl Mount {
    /// `36 35 98:0 /root /mount/point rw,noatime shared:1 - ext4 /dev/sda1 rw`: any number of fields may come before
    /// the dash.
    fn parse(line: &[u8]) -> Option<Self> {
        let mut fields = line.split(|byte| *byte == b' ');
        let point = PathBuf::from(std::ffi::OsString::from_vec(unescape(fields.nth(4)?)));
        fields.find(|field| *field == b"-")?;
        Some(Self { point, file_system: String::from_utf8_lossy(fields.next()?).into_owned() })
    }
}

/// Linux writes blanks and backslashes as three octal digits: `\040`.
fn unescape(field: &[u8]) -> Vec<u8> {
    let (mut plain, mut rest) = (Vec::with_capacity(field.len()), field);
    while let Some((first, others)) = rest.split_first() {
        let escaped = others.first_chunk::<3>().filter(|_| *first == b'\\');
        let code = escaped.and_then(|digits| u8::from_str_radix(str::from_utf8(digits).ok()?, 8).ok());
        plain.push(code.unwrap_or(*first));
        rest = if code.is_some() { &others[3..] } else { others };
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &[u8] = br"22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard
40 27 0:38 / /data rw master:1 propagate_from:2 - nfs4 server:/export rw
41 27 0:39 / /data rw - xfs /dev/sdb rw
42 27 0:40 / /data/in\040memory rw - tmpfs tmpfs rw
43 27 0:41 / /home rw - fuse.sshfs me@there: rw
44 27 254:0 /volume/spool.db /srv/spool.db rw - ext4 /dev/vda rw
half a line";

    #[test]
    fn the_innermost_mount_and_the_latest_on_a_point_counts() {
        let mounts = Mounts::parse(TABLE);
        let kind = |path: &str| FileSystem::by_name(mounts.file_system(Path::new(path)));
        for (path, expected) in [
            ("/var/lib/prism-relay", FileSystem::Local),
            ("/data/spool.db", FileSystem::Local),
            ("/data/in memory/spool.db", FileSystem::Memory("tmpfs".to_owned())),
            ("/data/in memory of/spool.db", FileSystem::Local),
            ("/home/me", FileSystem::Network("fuse.sshfs".to_owned())),
        ] {
            assert_eq!(kind(path), expected, "{path}");
        }
        assert_eq!(FileSystem::by_name(Mounts::parse(b"").file_system(Path::new("/data"))), FileSystem::Local);
    }

    #[test]
    fn a_file_that_is_a_mount_point_is_found() {
        let mounts = Mounts::parse(TABLE);
        assert!(mounts.contain(Path::new("/srv/spool.db")));
        assert!(!mounts.contain(Path::new("/srv/spool.db2")) && !mounts.contain(Path::new("/srv")));
    }

    #[test]
    fn devices_decide_only_where_the_mounts_are_not_known() {
        let (mounts, same, other) = (Mounts::parse(TABLE), (Some(1), Some(1)), (Some(1), Some(2)));
        let (mounted, beside) = (Path::new("/srv/spool.db"), Path::new("/srv/other.db"));
        for (mounts, file, devices, expected) in [
            (Some(&mounts), mounted, same, true),
            (Some(&mounts), mounted, other, true),
            (Some(&mounts), beside, same, false),
            // Overlayfs.
            (Some(&mounts), beside, other, false),
            (None, mounted, other, true),
            (None, mounted, same, false),
        ] {
            assert_eq!(is_mounted(mounts, file, devices), expected, "{}, {devices:?}", file.display());
        }
    }

    #[test]
    fn only_a_local_disk_has_no_warning() {
        let texts = ["tmpfs", "nfs", "ext4", "overlay"].map(|name| FileSystem::by_name(Some(name)).warning());
        let [memory, network, disk, overlay] = texts.map(|text| text.unwrap_or("none"));
        assert!(memory.contains("in memory") && network.contains("network file system"));
        assert_eq!((disk, overlay), ("none", "none"));
    }

    #[test]
    fn escapes_that_are_none_stay() {
        assert_eq!(unescape(br"a\040b\134\9\04"), br"a b\\9\04");
    }
}
