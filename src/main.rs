//! Arguments in, exit code out.

use std::process::ExitCode;

/// Events are allocated on one thread and freed on another, which is slow with the system's allocator: see
/// benches/relay.
#[cfg(feature = "jemalloc")]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    prism_relay::cli::run()
}
