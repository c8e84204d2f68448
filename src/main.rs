//! Arguments in, exit code out.

use std::process::ExitCode;

fn main() -> ExitCode {
    prism_relay::cli::run()
}
