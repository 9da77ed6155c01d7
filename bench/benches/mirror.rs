//! The mirror: entries for what lies in system memory, snapshots, a look at where pages are, and what an invalidation costs who unmaps.

use std::error::Error;
use std::time::Instant;

use criterion::Criterion;
use hmm_gpu::{Access, DeviceFault, Policy};
use hmm_gpu_bench::record::Measurement;

use crate::common::{check, filled, time, to_device, to_system, Bench, Pages};

pub(crate) fn run(bench: &mut Bench, criterion: &mut Criterion) -> Result<(), Box<dyn Error>> {
    let bytes = bench.plan.working_bytes();
    for pages in [Pages::Small, Pages::Huge] {
        let memory = filled(bytes, pages)?;
        let faults: Vec<_> = DeviceFault::each_page(&memory, Access::Read).collect();
        let mut group = bench.group(criterion, &format!("mirror of {}", pages.name()));
        let mut kept = Vec::new();
        let device = &bench.device;
        let mut keep = |case: &str, times: &[_]| {
            kept.push(Measurement::of_turns(
                ("mirror", case),
                pages.name(),
                bytes,
                times,
            ));
        };

        let times = bench.turns(&mut group, "range fault".to_owned(), bytes, || {
            to_device(device, &memory).expect("it moves");
            to_system(device, &memory).expect("it moves");
            time(|| {
                device
                    .fault(&faults, Policy::Map)
                    .and_then(|faulted| faulted.complete())
            })
        });
        keep("range fault", &times);
        let times = bench.turns(&mut group, "snapshot".to_owned(), bytes, || {
            time(|| memory.snapshot(device))
        });
        keep("snapshot", &times);
        let times = bench.turns(&mut group, "residency".to_owned(), bytes, || {
            time(|| memory.residency(device))
        });
        keep("residency", &times);
        check(&memory);

        // Twice the same, but for the entries that one of them has: the difference is what those cost.
        for (case, mapped) in [("unmap, no entries", false), ("unmap, with entries", true)] {
            let times = bench.turns(&mut group, case.to_owned(), bytes, || {
                let memory = filled(bytes, pages).expect("there is memory");
                if mapped {
                    let faulted = memory.map_for(device, Access::Read, Policy::Map);
                    faulted.expect("all is mapped");
                }
                let start = Instant::now();
                drop(memory);
                start.elapsed()
            });
            keep(case, &times);
        }
        group.finish();
        for measured in kept {
            bench.keep(measured)?;
        }
    }
    Ok(())
}
