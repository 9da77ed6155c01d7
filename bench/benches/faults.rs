//! Faults: the CPU touches what is on the device, in order, with strides and at random; the device touches what it has no entry for, one
//! page at a time and many. Each touch is timed by itself.
//!
//! `HMM_GPU_BENCH_AROUND=none` says that the driver was loaded with `fault_around=1`: a part of the name, nothing else.

use std::error::Error;
use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::Criterion;
use hmm_gpu::{Access, DeviceFault, PageRange, Policy};
use hmm_gpu_bench::record::Measurement;
use hmm_gpu_bench::spread::Spread;
use hmm_gpu_bench::PAGE;

use crate::common::{check, filled, to_device, to_system, Bench, Pages, Random, WORDS};

/// Pages from one touch to the next that does not follow on it.
const STRIDE: usize = 16;

pub(crate) fn run(bench: &mut Bench, criterion: &mut Criterion) -> Result<(), Box<dyn Error>> {
    let bytes = bench.plan.working_bytes();
    let pages = bytes / PAGE;
    let alone = std::env::var("HMM_GPU_BENCH_AROUND").is_ok_and(|value| value == "none");
    let around = if alone { ", each page alone" } else { "" };
    let strided = (0..STRIDE).flat_map(|first| (first..pages).step_by(STRIDE));
    for (name, order) in [
        ("in order", (0..pages).collect::<Vec<_>>()),
        ("strided", strided.collect()),
        ("random", Random(7).order(pages)),
    ] {
        cpu(
            bench,
            criterion,
            &format!("CPU touch, {name}{around}"),
            bytes,
            &order,
        )?;
    }
    if !alone {
        for (name, policy) in [("map", Policy::Map), ("migrate", Policy::Migrate)] {
            for batch in [1, 512] {
                let case = format!("device, {name}, {batch} at a time");
                device(bench, criterion, &case, bytes, policy, batch)?;
            }
        }
    }
    Ok(())
}

/// Pages that are on the device are touched in some order.
fn cpu(
    bench: &mut Bench,
    criterion: &mut Criterion,
    case: &str,
    bytes: usize,
    order: &[usize],
) -> Result<(), Box<dyn Error>> {
    let memory = filled(bytes, Pages::Small)?;
    let mut group = bench.group(criterion, "faults");
    let mut touches = Vec::new();
    bench.turns(&mut group, case.to_owned(), bytes, || {
        to_device(&bench.device, &memory).expect("it moves");
        let first = touches.len();
        for page in order {
            let start = Instant::now();
            black_box(memory[page * WORDS]);
            touches.push(start.elapsed());
        }
        touches[first..].iter().sum()
    });
    group.finish();
    check(&memory);
    keep(bench, case, PAGE, "touch", &touches, 1)
}

/// The device faults on pages in system memory that it has no entries for.
fn device(
    bench: &mut Bench,
    criterion: &mut Criterion,
    case: &str,
    bytes: usize,
    policy: Policy,
    batch: usize,
) -> Result<(), Box<dyn Error>> {
    let memory = filled(bytes, Pages::Small)?;
    let faults: Vec<_> = DeviceFault::each_page(&memory, Access::Read).collect();
    let mut group = bench.group(criterion, "faults");
    let mut calls = Vec::new();
    bench.turns(&mut group, case.to_owned(), bytes, || {
        // There and back: no entry is left.
        to_device(&bench.device, &memory).expect("it moves");
        to_system(&bench.device, &memory).expect("it moves");
        let first = calls.len();
        for faults in faults.chunks(batch) {
            let start = Instant::now();
            let faulted = bench
                .device
                .fault(faults, policy)
                .expect("faults are serviced");
            calls.push(start.elapsed());
            faulted.complete().expect("all are mapped");
        }
        calls[first..].iter().sum()
    });
    group.finish();
    check(&memory);
    let pages = PageRange::of(&memory).pages().min(batch);
    keep(bench, case, pages * PAGE, "fault", &calls, pages)
}

/// Keeps what each call took, of which the first of all does not count.
fn keep(
    bench: &mut Bench,
    case: &str,
    bytes: usize,
    per: &str,
    calls: &[Duration],
    pages: usize,
) -> Result<(), Box<dyn Error>> {
    let calls = calls.iter().skip(1);
    let ns: Vec<f64> = calls
        .map(|call| call.as_nanos() as f64 / pages as f64)
        .collect();
    bench.keep(Spread::of(ns).map(|ns| Measurement {
        workload: "faults".to_owned(),
        case: case.to_owned(),
        pages: Pages::Small.name().to_owned(),
        bytes: bytes as u64,
        at: None,
        ns,
        per: per.to_owned(),
        svm: None,
        more: Default::default(),
    }))
}
