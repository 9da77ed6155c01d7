//! The device works on data that is larger than its VRAM, as a CPU does with swap: nobody counts what fits.
//!
//! `oversubscribe [N]` uses `/dev/hmm_gpuN`, or the first device there is. The data is half as large again as the VRAM. The device
//! writes all of it, then reads all of it; each page that it misses moves to VRAM first, and what it used longest ago makes room.

use std::error::Error;
use std::process::ExitCode;

use hmm_gpu::{Bytes, Counters, Device, Glyphs, Policy, SharedBuf};

/// Words that the device is given at a time.
const WINDOW: usize = 256 << 10;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("oversubscribe: {error}");
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
    let vram = device.describe()?.vram_bytes;
    let words = usize::try_from(vram / 8 * 3 / 2)?.next_multiple_of(WINDOW);
    let mut data = SharedBuf::<u64>::zeroed(words)?;
    println!(
        "The data has {}, the VRAM {}.\n",
        Bytes(words as u64 * 8),
        Bytes(vram)
    );
    println!(
        "{:<28}{:>14}{:>14}{:>16}",
        "", "device faults", "MiB to VRAM", "MiB for room"
    );

    let mut look = Look {
        before: device.counters()?,
        device: &device,
    };
    let mut window = vec![0u64; WINDOW];
    for at in (0..words).step_by(WINDOW) {
        window
            .iter_mut()
            .zip(at as u64..)
            .for_each(|(word, n)| *word = pattern(n));
        device.write(&mut data[at..at + WINDOW], &window, Policy::Migrate)?;
    }
    look.row("the device writes it all")?;
    for at in (0..words).step_by(WINDOW) {
        device.read(&data[at..at + WINDOW], &mut window, Policy::Migrate)?;
        compare(&window, at)?;
    }
    look.row("the device reads it all")?;

    println!("\nWhat is in VRAM then is what was used last:");
    let residency = data.residency(&device)?;
    println!("{}\n", residency.map(64).glyphs(Glyphs::detect()).indent(3));
    compare(&data, 0)?;
    println!(
        "The CPU reads it all: {} bytes as the device wrote them.",
        words * 8
    );
    Ok(())
}

/// What the device has done since the last look.
struct Look<'a> {
    device: &'a Device,
    before: Counters,
}

impl Look<'_> {
    fn row(&mut self, what: &str) -> Result<(), Box<dyn Error>> {
        let now = self.device.counters()?;
        let work = now - self.before;
        self.before = now;
        let mib = |pages: u64| (pages * 4096) >> 20;
        println!(
            "{what:<28}{:>14}{:>14}{:>16}",
            work.device_faults,
            mib(work.to_device_pages),
            mib(work.pressure_pages)
        );
        Ok(())
    }
}

/// Compares words with what was written, the first of which is word `at`.
fn compare(words: &[u64], at: usize) -> Result<(), Box<dyn Error>> {
    match words
        .iter()
        .zip(at as u64..)
        .find(|(word, n)| **word != pattern(*n))
    {
        None => Ok(()),
        Some((word, n)) => Err(format!("word {n} is {word:#x}, not {:#x}", pattern(n)).into()),
    }
}

/// What word `n` holds.
fn pattern(n: u64) -> u64 {
    (n + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}
