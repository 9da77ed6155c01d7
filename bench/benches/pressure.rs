//! Working sets of a half to four times the VRAM, which the device goes through 2 MiB at a time: in order, and at random.

use std::error::Error;
use std::time::Duration;

use criterion::Criterion;
use hmm_gpu::{Access, DeviceFault, Policy, SharedBuf};
use hmm_gpu_bench::record::Measurement;
use hmm_gpu_bench::HUGE_PAGE;

use crate::common::{check, filled, time, Bench, Pages, Random};

/// Working set over VRAM.
const FACTORS: [f64; 4] = [0.5, 1.0, 2.0, 4.0];

pub(crate) fn run(bench: &mut Bench, criterion: &mut Criterion) -> Result<(), Box<dyn Error>> {
    let vram = bench.device.describe()?.vram_bytes as usize;
    if vram > bench.plan.working_bytes() * 8 {
        println!(
            "pressure: left out, {} MiB of VRAM take too long to fill; load the driver with a small soft device",
            vram >> 20
        );
        return Ok(());
    }
    for random in [false, true] {
        for factor in FACTORS {
            one(bench, criterion, vram, factor, random)?;
        }
    }
    Ok(())
}

fn one(
    bench: &mut Bench,
    criterion: &mut Criterion,
    vram: usize,
    factor: f64,
    random: bool,
) -> Result<(), Box<dyn Error>> {
    let chunks = ((vram as f64 * factor) as usize / HUGE_PAGE).max(1);
    let bytes = chunks * HUGE_PAGE;
    let memory = filled(bytes, Pages::Huge)?;
    let case = if random { "at random" } else { "in order" };
    let mut group = bench.group(criterion, &format!("pressure {case}"));
    let mut numbers = Random(11);
    let before = bench.device.counters()?;
    let mut turns = 0.0;
    let times = bench.turns(&mut group, format!("{factor} of VRAM"), bytes, || {
        turns += 1.0;
        (0..chunks)
            .map(|n| {
                let chunk = if random { numbers.below(chunks) } else { n };
                used(bench, &memory, chunk)
            })
            .sum()
    });
    group.finish();
    let work = bench.device.counters()? - before;
    check(&memory);
    let mut measured = Measurement::of_turns(("pressure", case), Pages::Huge.name(), bytes, &times);
    if let Some(measured) = &mut measured {
        measured.at = Some(factor);
        let evicted = work.pressure_pages as f64 / turns;
        measured
            .more
            .insert("evicted pages".to_owned(), evicted.round());
    }
    bench.keep(measured)
}

/// The device uses a chunk: it comes to the VRAM, if it can, and is mapped.
fn used(bench: &Bench, memory: &SharedBuf<u64>, chunk: usize) -> Duration {
    let words = HUGE_PAGE / 8;
    let chunk = &memory[chunk * words..(chunk + 1) * words];
    let faults: Vec<_> = DeviceFault::each_page(chunk, Access::Read).collect();
    time(|| {
        bench
            .device
            .fault(&faults, Policy::Migrate)
            .and_then(|faulted| faulted.complete())
    })
}
