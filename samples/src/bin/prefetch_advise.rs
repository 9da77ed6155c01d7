//! What a program knows of its memory it can say: prefetch and advice change what happens, and never what is computed.
//!
//! `prefetch_advise [N]` uses `/dev/hmm_gpuN`, or the first device there is. The same work is done with each hint: the device adds
//! up a table, and the CPU writes one number into each of its pages; four times.

use std::error::Error;
use std::process::ExitCode;

use hmm_gpu::{Advice, Device, Policy, SharedBuf, Target};

/// Words of the table: 4 MiB.
const WORDS: usize = 512 << 10;
/// Words of a page.
const PAGE: usize = 512;
/// How often the work is done.
const ROUNDS: u64 = 4;

/// A hint, in words, and how it is given.
type Hint = (
    &'static str,
    fn(&Device, &[u64]) -> Result<(), hmm_gpu::Error>,
);

const HINTS: [Hint; 5] = [
    ("no hint", |_, _| Ok(())),
    ("prefetch before each round", |device, table| {
        device.prefetch(table, Target::Device).map(drop)
    }),
    ("advice: moves 64 KiB at a time", |device, table| {
        device.advise(table, Advice::Granularity(Some(64 << 10)))
    }),
    ("advice: best in RAM", |device, table| {
        device.advise(table, Advice::Location(Some(Target::System)))
    }),
    ("advice: read mostly", |device, table| {
        device.advise(table, Advice::ReadMostly(true))
    }),
];

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("prefetch_advise: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let device = match std::env::args().nth(1) {
        Some(unit) => Device::open(unit.parse()?)?,
        None => Device::open_first()?,
    };
    println!("{}\n", device.describe()?);
    println!(
        "In pages, of a table of {} pages, in {ROUNDS} rounds:\n",
        WORDS / PAGE
    );
    println!(
        "{:<32}{:>10}{:>10}{:>10}{:>10}{:>8}",
        "", "requested", "by fault", "touched", "CPU", "sum"
    );
    println!(
        "{:<32}{:>10}{:>10}{:>10}{:>10}{:>8}",
        "", "to VRAM", "to VRAM", "back", "faults", ""
    );
    for (name, hint) in HINTS {
        // Memory of its own, so that no round begins where another hint has left it.
        let mut table = SharedBuf::<u64>::zeroed(WORDS)?;
        table.iter_mut().zip(0..).for_each(|(word, n)| *word = n);
        let before = device.counters()?;
        let mut right = true;
        for round in 0..ROUNDS {
            hint(&device, &table)?;
            right &= sum_by_device(&device, &table)? == expected(round);
            table.iter_mut().step_by(PAGE).for_each(|word| *word += 1);
        }
        let work = device.counters()? - before;
        println!(
            "{name:<32}{:>10}{:>10}{:>10}{:>10}{:>8}",
            work.to_device_pages - work.device_fault_pages,
            work.device_fault_pages,
            work.fault_back_pages,
            work.cpu_faults,
            if right { "right" } else { "WRONG" }
        );
        if !right {
            return Err("a hint has changed the result".into());
        }
    }
    Ok(())
}

/// The device reads the table 64 KiB at a time, so that it faults often; what it read is added up.
fn sum_by_device(device: &Device, table: &[u64]) -> Result<u64, hmm_gpu::Error> {
    let mut sum = 0u64;
    let mut window = vec![0; 16 * PAGE];
    for part in table.chunks(window.len()) {
        device.read(part, &mut window, Policy::Migrate)?;
        sum = window.iter().fold(sum, |sum, word| sum.wrapping_add(*word));
    }
    Ok(sum)
}

/// The sum in a round: each one before has added 1 to a word of each page.
fn expected(round: u64) -> u64 {
    let words = WORDS as u64;
    words * (words - 1) / 2 + round * (WORDS / PAGE) as u64
}
