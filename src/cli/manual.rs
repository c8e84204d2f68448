//! `man` and `completions`: both are generated from the definition of the command line.

use std::path::PathBuf;

use anyhow::Context;
use clap::Command;
use clap_complete::Shell;

use super::output::out;

#[derive(clap::Args)]
pub(super) struct Options {
    /// Write the pages of all commands into this folder
    #[arg(value_name = "FOLDER")]
    folder: Option<PathBuf>,
}

/// Writes man pages: the main one to standard output, or all of them to files such as `prism-relay-send.1`.
pub(super) fn man(command: Command, options: Options) -> anyhow::Result<()> {
    match options.folder {
        Some(folder) => clap_mangen::generate_to(command, &folder)
            .with_context(|| format!("cannot write the man pages into {}", folder.display())),
        None => {
            let mut page = Vec::new();
            clap_mangen::Man::new(command).render(&mut page)?;
            out(&page)
        }
    }
}

/// Prints the completion script of a shell.
pub(super) fn completions(mut command: Command, shell: Shell) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut command, "prism-relay", &mut script);
    out(&script)
}
