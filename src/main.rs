//! Arguments in, exit code out.

use std::process::ExitCode;

/// Events are made on one thread and freed on another, over which the system's allocator stumbles: see benches/relay.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    prism_relay::cli::run()
}
