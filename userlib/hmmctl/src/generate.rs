//! The manual pages, and what shells complete: made when they are installed, from what the command line is.

use clap::CommandFactory;
use clap_complete::Shell;

use crate::cli::{Cli, GenerateArgs, What};
use crate::error::Error;

/// The verb `generate`.
pub fn run(args: &GenerateArgs) -> Result<(), Error> {
    let mut command = Cli::command();
    let shell = match args.what {
        What::Man => {
            clap_mangen::generate_to(command, &args.folder)?;
            return Ok(());
        }
        What::Bash => Shell::Bash,
        What::Zsh => Shell::Zsh,
        What::Fish => Shell::Fish,
    };
    clap_complete::generate_to(shell, &mut command, "hmmctl", &args.folder)?;
    Ok(())
}
