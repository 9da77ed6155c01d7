//! What can be asked for. The manual page and the completions of shells are made from this.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::pci::Bdf;

/// Sees to devices of the driver hmm_gpu: binds them, tells what they do, and where the pages of a process are.
#[derive(Parser)]
#[command(name = "hmmctl", version, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    pub verb: Verb,
}

#[derive(Subcommand)]
pub enum Verb {
    /// List the driver's devices, and the PCI devices that could become some
    List(ListArgs),
    /// Describe a device and what it has done
    Info(InfoArgs),
    /// Give a PCI device to the driver
    ///
    /// What its memory held is lost. Refused while somebody uses the device through the driver that has it. That driver is
    /// remembered until the next boot, and has the device again after `unbind`.
    Bind(BindArgs),
    /// Take a PCI device from the driver, and give it back to the one that had it before
    ///
    /// Everything in its VRAM moves to system memory. Refused while a program has its node open.
    Unbind(BindArgs),
    /// Check what can stop the driver on this host, and say what to do
    ///
    /// Exits with 1 if something does.
    Doctor(DoctorArgs),
    /// Print counters, once or again and again
    Stat(StatArgs),
    /// Draw where every page of a process is
    ///
    /// Read from the kernel's /proc/PID/pagemap, which needs root: the driver itself tells a process of its own memory only.
    /// Looking moves nothing. Every page was there at one moment, not all of them at the same moment.
    Map(MapArgs),
    /// Show live who has the VRAM and what moves
    Top(TopArgs),
    /// Record the driver's trace events, until Ctrl-C, for a time, or while a command runs
    ///
    /// Exits as the command does.
    Trace(TraceArgs),
    /// Write the manual pages or what a shell completes to a folder
    #[command(hide = true)]
    Generate(GenerateArgs),
}

#[derive(Args)]
pub struct ListArgs {
    /// As JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
pub struct InfoArgs {
    /// N of /dev/hmm_gpuN, a path, or a PCI address [default: the first one]
    pub device: Option<String>,
    /// As JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
pub struct BindArgs {
    /// PCI address, 0000:01:00.0 or 01:00.0
    #[arg(value_name = "BDF")]
    pub device: Bdf,
    /// Even if it is in use or is no GPU
    #[arg(long)]
    pub force: bool,
}

#[derive(Args)]
pub struct DoctorArgs {
    /// As JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
pub struct StatArgs {
    /// N of /dev/hmm_gpuN, a path, or a PCI address [default: the first one]
    pub device: Option<String>,
    /// Go on, and print what happened in each so many seconds
    #[arg(long, short, value_name = "SECONDS", value_parser = seconds)]
    pub every: Option<Duration>,
    /// Stop after so many lines
    #[arg(long, short = 'n', value_name = "N", requires = "every")]
    pub count: Option<u64>,
    /// As JSON, one object a line
    #[arg(long)]
    pub json: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum When {
    /// On a terminal
    Auto,
    Always,
    Never,
}

#[derive(Args)]
pub struct MapArgs {
    /// Of which process
    #[arg(value_name = "PID")]
    pub pid: u32,
    /// Mappings without a page in VRAM too
    #[arg(long, short)]
    pub all: bool,
    /// Marks in a row [default: what fits]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(8..=1000))]
    pub width: Option<u16>,
    /// Rows of a mapping, at most
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..))]
    pub rows: u16,
    /// Colours
    #[arg(long, value_enum, default_value_t = When::Auto)]
    pub color: When,
    /// As JSON, with runs of pages that are at the same place
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
pub struct TopArgs {
    /// Between two looks
    #[arg(long, short, value_name = "SECONDS", value_parser = seconds, default_value = "1")]
    pub every: Duration,
    /// Print one picture, of one such time, and end
    #[arg(long)]
    pub once: bool,
}

#[derive(Args)]
pub struct TraceArgs {
    /// End after so many seconds
    #[arg(long, short, value_name = "SECONDS", value_parser = seconds, conflicts_with = "command")]
    pub seconds: Option<Duration>,
    /// As a trace file of Chrome's, for Perfetto (ui.perfetto.dev) and chrome://tracing
    #[arg(long)]
    pub chrome: bool,
    /// Write to a file instead of the standard output
    #[arg(long, short, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Record while this command runs
    #[arg(last = true, value_name = "COMMAND")]
    pub command: Vec<String>,
}

#[derive(Clone, Copy, ValueEnum)]
pub enum What {
    Man,
    Bash,
    Zsh,
    Fish,
}

#[derive(Args)]
pub struct GenerateArgs {
    /// What
    #[arg(value_enum)]
    pub what: What,
    /// Where to
    pub folder: PathBuf,
}

fn seconds(text: &str) -> Result<Duration, String> {
    let number: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    if !(0.01..=86400.0).contains(&number) {
        return Err("not between 0.01 and 86400".to_owned());
    }
    Ok(Duration::from_secs_f64(number))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn times_that_are_none_are_refused() {
        assert_eq!(seconds("0.5"), Ok(Duration::from_millis(500)));
        for wrong in ["", "x", "0", "-1", "nan", "inf", "1e9"] {
            assert!(seconds(wrong).is_err(), "{wrong}");
        }
    }
}
