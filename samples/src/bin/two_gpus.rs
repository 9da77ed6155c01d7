//! One buffer, two devices: pages move from the VRAM of one to that of the other, and keep their addresses.
//!
//! `two_gpus [M N]` uses `/dev/hmm_gpuM` and `/dev/hmm_gpuN`, or the first two that there are.

use std::error::Error;
use std::process::ExitCode;

use hmm_gpu::{Device, Glyphs, Policy, SharedBuf};

/// Words of the buffer: 128 pages.
const WORDS: usize = 128 * 512;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("two_gpus: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let mut units: Vec<u32> = std::env::args()
        .skip(1)
        .map(|unit| unit.parse())
        .collect::<Result<_, _>>()?;
    if units.is_empty() {
        units = Device::list();
    }
    let [first, second, ..] = units[..] else {
        return Err(
            "this wants two devices: bind a second GPU, or load the module with soft=2".into(),
        );
    };
    let (first, second) = (Device::open(first)?, Device::open(second)?);
    println!(
        "first:  {}\nsecond: {}\n",
        first.describe()?,
        second.describe()?
    );

    let mut data = SharedBuf::<u64>::zeroed(WORDS)?;
    data.iter_mut()
        .zip(0..)
        .for_each(|(word, n)| *word = pattern(n));
    let addr = data.as_ptr();

    let moved = data.to_device(&first)?;
    println!("1. All of it moves to the first: {moved}. As the first sees it:");
    draw(&first, &data)?;

    let before = (first.counters()?, second.counters()?);
    let half = data.len() / 2;
    let moved = second.prefetch(&data[half..], hmm_gpu::Target::Device)?;
    println!(
        "2. The second asks for the other half: {moved}, from VRAM to VRAM. As the first sees it:"
    );
    draw(&first, &data)?;
    println!("   and as the second does:");
    draw(&second, &data)?;
    let (gave, took) = (first.counters()? - before.0, second.counters()? - before.1);
    println!(
        "   The first counts {} pages to another device, the second {} from one; no page went through RAM: {}.\n",
        gave.to_other_pages,
        took.from_other_pages,
        gave.to_system_pages + gave.fault_back_pages
    );

    // A device has no way into the other's VRAM: what it misses there comes to it.
    let mut seen = vec![0; WORDS];
    let read = first.read(&data, &mut seen, Policy::Migrate)?;
    check(&seen)?;
    println!("3. The first reads all of it: {read}. The other half has come back to it:");
    draw(&first, &data)?;

    check(&data)?;
    println!(
        "The CPU reads it: {} bytes as they were, at {}.",
        WORDS * 8,
        if data.as_ptr() == addr {
            "the same addresses"
        } else {
            "OTHER addresses"
        }
    );
    Ok(())
}

fn draw(device: &Device, data: &SharedBuf<u64>) -> Result<(), Box<dyn Error>> {
    println!(
        "{}\n",
        data.residency(device)?
            .map(64)
            .glyphs(Glyphs::detect())
            .indent(6)
    );
    Ok(())
}

/// Compares all words with what was written.
fn check(words: &[u64]) -> Result<(), Box<dyn Error>> {
    match words
        .iter()
        .zip(0..)
        .find(|(word, n)| **word != pattern(*n))
    {
        None => Ok(()),
        Some((word, n)) => Err(format!("word {n} is {word:#x}").into()),
    }
}

/// What word `n` holds.
fn pattern(n: u64) -> u64 {
    (n + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}
