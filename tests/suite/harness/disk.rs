//! Small disks and mounts, which need root, or root of a user namespace.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A small file system in a folder, unmounted on drop.
pub struct SmallDisk {
    mount: Mount,
}

impl SmallDisk {
    /// Mounts a file system of this size, such as `20m`, in a new folder below `folder`.
    pub fn mount(folder: &Path, size: &str) -> Self {
        let path = folder.join("disk");
        fs::create_dir(&path).unwrap();
        Self { mount: Mount::new(&["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"], &path) }
    }

    pub fn path(&self) -> &Path {
        &self.mount.0
    }

    pub fn remount(&self, options: &str) {
        mount(&["-o", &format!("remount,{options}")], self.path());
    }

    /// A path on this disk, for `spool.path`.
    pub fn spool(&self) -> String {
        self.path().join("spool.db").to_str().unwrap().to_owned()
    }

    /// Writes a file that takes all the room but `left` bytes.
    pub fn fill(&self, left: u64) {
        let mut file = File::options().append(true).create(true).open(self.filler()).unwrap();
        for size in [1 << 20, 4096] {
            while file.write_all(&vec![1; size]).is_ok() {}
        }
        file.set_len(file.metadata().unwrap().len().saturating_sub(left)).unwrap();
    }

    /// Removes the file of [`Self::fill`], if there is one.
    pub fn free(&self) {
        let _ = fs::remove_file(self.filler());
    }

    /// Whether the file of [`Self::fill`] is there.
    pub fn is_filled(&self) -> bool {
        self.filler().exists()
    }

    fn filler(&self) -> PathBuf {
        self.path().join("filler")
    }
}

/// A mount, unmounted on drop.
pub struct Mount(PathBuf);

impl Mount {
    /// Makes a file or folder visible at a second path, which exists.
    pub fn bind(source: &Path, target: &Path) -> Self {
        Self::new(&["--bind", source.to_str().unwrap()], target)
    }

    fn new(options: &[&str], target: &Path) -> Self {
        mount(options, target);
        Self(target.to_owned())
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

fn mount(options: &[&str], target: &Path) {
    let output = Command::new("mount").args(options).arg(target).output();
    let output = output.unwrap_or_else(|error| panic!("mount: {error}"));
    assert!(output.status.success(), "mount {options:?}: {}", String::from_utf8_lossy(&output.stderr));
}
