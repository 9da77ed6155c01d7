//! `hmmctl`: binds GPUs to the driver `hmm_gpu`, tells what its devices do, and where the pages of a process are.

#![forbid(unsafe_code)]

mod bind;
mod cli;
mod doctor;
mod error;
mod generate;
mod host;
mod list;
mod map;
mod nodes;
mod pagemap;
mod pci;
mod stat;
mod top;
mod trace;

use std::io::{self, Write};
use std::process::ExitCode;

use clap::Parser;

use cli::{Cli, Verb};
use error::Error;
use host::Host;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let mut out = io::BufWriter::new(io::stdout().lock());
    let result = run(cli.verb, &mut out).and_then(|code| Ok(out.flush().map(|()| code)?));
    match result {
        Ok(code) => code,
        // Who reads has had enough, as `head` does.
        Err(Error::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => {
            let _ = out.flush();
            eprintln!("hmmctl: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(verb: Verb, out: &mut dyn Write) -> Result<ExitCode, Error> {
    let host = Host::this();
    match verb {
        Verb::List(args) => list::list(&host, &args, out)?,
        Verb::Info(args) => list::info(&host, &args, out)?,
        Verb::Bind(args) => bind::bind(&host, &args, out)?,
        Verb::Unbind(args) => bind::unbind(&host, &args, out)?,
        Verb::Doctor(args) => return doctor::run(&host, &args, out),
        Verb::Stat(args) => stat::run(&args, out)?,
        Verb::Map(args) => map::run(&host, &args, out)?,
        Verb::Top(args) => top::run(&host, &args, out)?,
        Verb::Trace(args) => return trace::run(&host, args, out),
        Verb::Generate(args) => generate::run(&args)?,
    }
    Ok(ExitCode::SUCCESS)
}
