//! A temporary folder that is removed when the test process ends, however it ends.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Child;

use super::leash::sentinel;

/// Removes the folder when its standard input ends. Retries for ten seconds, because dying processes may still write
/// to it.
const GUARD: &str = r#"
read -r never
tries=0
until rm -rf -- "$1" || [ "$tries" -ge 100 ]; do tries=$((tries + 1)); sleep 0.1; done
"#;

/// A temporary folder. It is removed when this is dropped, and also when the test process is killed.
pub struct Scratch {
    path: PathBuf,
    guard: Child,
}

impl Scratch {
    /// A new folder in the system's folder for temporary files.
    pub fn new() -> Self {
        Self::below(&std::env::temp_dir())
    }

    /// A new folder below `parent`.
    pub fn below(parent: &Path) -> Self {
        let path = tempfile::Builder::new()
            .prefix("prism-test-")
            // A node in a root tree may run as another user. The secrets in here are worthless.
            .permissions(Permissions::from_mode(0o755))
            .tempdir_in(parent)
            .unwrap_or_else(|error| panic!("cannot make a folder below {}: {error}", parent.display()))
            .keep();
        let guard = sentinel(GUARD, &path);
        Self { path, guard }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        drop(self.guard.stdin.take());
        let _ = self.guard.wait();
    }
}
