//! `man` and `completions`: made from the definition of the command line itself.

use std::path::PathBuf;

use anyhow::Context;
use clap::{Command, CommandFactory};
use clap_complete::Shell;

use super::{Arguments, out};

#[derive(clap::Args)]
pub struct Options {
    /// Write the pages of all commands into this folder
    #[arg(value_name = "FOLDER")]
    folder: Option<PathBuf>,
}

/// roff(7) on standard output, or in files such as `prism-relay-send.1`.
pub fn man(options: Options) -> anyhow::Result<()> {
    match options.folder {
        Some(folder) => clap_mangen::generate_to(command(), &folder)
            .with_context(|| format!("cannot write the man pages into {}", folder.display())),
        None => {
            let mut page = Vec::new();
            clap_mangen::Man::new(command()).render(&mut page)?;
            out(&page)
        }
    }
}

pub fn completions(shell: Shell) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut command(), "prism-relay", &mut script);
    out(&script)
}

fn command() -> Command {
    Arguments::command()
}
