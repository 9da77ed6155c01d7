//! Moving memory by request, both ways: the cost of a page over how many go at once, and what of it is which phase's.

use std::error::Error;
use std::time::Duration;

use criterion::Criterion;
use hmm_gpu::{Counters, Place, SharedBuf};
use hmm_gpu_bench::page::size;
use hmm_gpu_bench::record::Measurement;
use hmm_gpu_bench::PAGE;

use crate::common::{check, expect, filled, time, to_device, to_system, Bench, Pages};

const SIZES: [usize; 7] = [
    4 << 10,
    64 << 10,
    1 << 20,
    2 << 20,
    16 << 20,
    64 << 20,
    256 << 20,
];

pub(crate) fn run(bench: &mut Bench, criterion: &mut Criterion) -> Result<(), Box<dyn Error>> {
    let room = bench.device.describe()?.vram_free_bytes;
    for pages in [Pages::Small, Pages::Huge] {
        for bytes in bench.plan.sizes(&SIZES) {
            if !pages.fit(bytes) || bytes as u64 > room {
                continue;
            }
            for to in [Place::Device, Place::System] {
                one(bench, criterion, pages, bytes, to)?;
            }
        }
    }
    Ok(())
}

fn one(
    bench: &mut Bench,
    criterion: &mut Criterion,
    pages: Pages,
    bytes: usize,
    to: Place,
) -> Result<(), Box<dyn Error>> {
    let case = match to {
        Place::Device => "to device",
        _ => "to system",
    };
    let memory = filled(bytes, pages)?;
    let mut group = bench.group(criterion, &format!("migration {case}"));
    let mut phases = Phases::default();
    let name = format!("{} of {}", size(bytes as f64), pages.name());
    let times = bench.turns(&mut group, name, bytes, || {
        let (device, there, back): (_, Move, Move) = match to {
            Place::Device => (&bench.device, to_device, to_system),
            _ => (&bench.device, to_system, to_device),
        };
        // Nobody times this.
        back(device, &memory).expect("it moves back");
        let before = device.counters().expect("there are counters");
        let took = time(|| there(device, &memory));
        phases.add(
            device.counters().expect("there are counters") - before,
            took,
        );
        expect(device, &memory, to).expect("it is there");
        took
    });
    group.finish();
    check(&memory);
    let mut measured = Measurement::of_turns(("migration", case), pages.name(), bytes, &times);
    if let Some(measured) = &mut measured {
        measured.more = phases.per_page(bytes);
    }
    bench.keep(measured)
}

type Move = fn(&hmm_gpu::Device, &SharedBuf<u64>) -> Result<(), hmm_gpu::Error>;

/// What the driver's counters say of where the time went.
#[derive(Default)]
struct Phases {
    turns: f64,
    ns: [f64; 5],
}

impl Phases {
    const NAMES: [&'static str; 5] = ["setup ns", "copy ns", "pages ns", "finalize ns", "rest ns"];

    fn add(&mut self, work: Counters, took: Duration) {
        let phases = [work.setup_ns, work.copy_ns, work.pages_ns, work.finalize_ns];
        let rest = took.as_nanos() as f64 - phases.iter().sum::<u64>() as f64;
        for (sum, ns) in self.ns.iter_mut().zip(phases) {
            *sum += ns as f64;
        }
        self.ns[4] += rest.max(0.0);
        self.turns += 1.0;
    }

    /// The mean of all turns, per page.
    fn per_page(&self, bytes: usize) -> std::collections::BTreeMap<String, f64> {
        let pages = self.turns.max(1.0) * (bytes / PAGE) as f64;
        let names = Self::NAMES.iter().map(|name| (*name).to_owned());
        names.zip(self.ns.map(|ns| (ns / pages).round())).collect()
    }
}
