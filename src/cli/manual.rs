//! `man` and `completions`: made from the definition of the command line itself.

use std::io::{self, Write};
use std::path::PathBuf;

use clap::{Command, CommandFactory};
use clap_complete::Shell;

use super::{Arguments, Failure};

#[derive(clap::Args)]
pub struct Options {
    /// Write the pages of all commands into this folder
    #[arg(value_name = "FOLDER")]
    folder: Option<PathBuf>,
}

/// roff(7) on standard output, or in files such as `prism-relay-send.1`.
pub fn man(options: Options) -> Result<(), Failure> {
    match options.folder {
        Some(folder) => clap_mangen::generate_to(command(), folder).map_err(Failure::new),
        None => {
            let mut page = Vec::new();
            clap_mangen::Man::new(command()).render(&mut page).map_err(Failure::new)?;
            out(&page)
        }
    }
}

pub fn completions(shell: Shell) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut command(), "prism-relay", &mut script);
    out(&script)
}

fn command() -> Command {
    Arguments::command()
}

/// Whoever has stopped reading has seen enough.
fn out(bytes: &[u8]) -> Result<(), Failure> {
    match io::stdout().lock().write_all(bytes) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(Failure::new(error)),
        Ok(()) | Err(_) => Ok(()),
    }
}
