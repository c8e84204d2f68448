//! The settings of the spool.

use std::path::PathBuf;

/// Where the spool is, how large it may become, and what its events survive.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The SQLite file; its companions lie next to it.
    pub path: PathBuf,
    /// Limit for the pending and parked events, counted with `EVENT_OVERHEAD_BYTES` for each.
    pub max_bytes: u64,
    /// What an accepted event survives.
    pub durability: Durability,
    /// Size of the largest body: the disk space that is kept in reserve follows it.
    pub body_bytes_max: u64,
}

/// What an event survives once it has been answered 200.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// A power loss: every commit is synced to the disk.
    Disk,
    /// A crash of the relay, but not one of the machine.
    Process,
}
