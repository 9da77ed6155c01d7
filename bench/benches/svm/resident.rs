//! What translation costs where nothing misses: saxpy on data that is in VRAM, beside the same with raw pointers, by turns.

use std::error::Error;
use std::time::{Duration, Instant};

use criterion::Criterion;
use hmm_gpu::{Strategy, SvmContext};
use hmm_gpu_bench::record::{Measurement, Svm};
use hmm_gpu_bench::spread::Spread;

use super::works::{Saxpy, Work};
use crate::common::{Bench, Pages};

/// Times as many floats as otherwise: so that what a submission costs is a small part.
const LARGER: usize = 8;

/// Nothing, unless both strategies are there.
pub(super) fn run(
    bench: &mut Bench,
    criterion: &mut Criterion,
    floats: usize,
    time: Duration,
) -> Result<(), Box<dyn Error>> {
    let (Ok(translated), Ok(native)) = (
        super::context(Strategy::Translated)?,
        super::context(Strategy::Native)?,
    ) else {
        return Ok(());
    };
    let (translated, native) = (&translated, &native);
    let mut in_vram = Saxpy::new(LARGER * floats, None)?;
    let mut in_system = Saxpy::new(LARGER * floats, None)?;
    // Once: what is to be in VRAM comes there, and what Vulkan allocates at first is there.
    one(translated, &mut in_vram)?;
    one(native, &mut in_system)?;
    let mut group = bench.group(criterion, "svm saxpy in VRAM");
    group.sample_size(20);
    group.warm_up_time(time);
    group.measurement_time(2 * time);
    let (mut raw, mut ratios) = (Vec::new(), Vec::new());
    let faults = translated.stats().faults;
    let times = bench.turns(
        &mut group,
        "translated, and native by turns".to_owned(),
        in_vram.bytes(),
        || {
            let took = one(translated, &mut in_vram).expect("a kernel runs");
            let beside = one(native, &mut in_system).expect("a kernel runs");
            raw.push(beside);
            ratios.push(took.as_secs_f64() / beside.as_secs_f64());
            took
        },
    );
    group.finish();
    if translated.stats().faults != faults {
        return Err("svm: what was to be in VRAM was missed there".into());
    }
    in_vram.check()?;
    in_system.check()?;
    let ratio = Spread::of(ratios.split_off(ratios.len().min(1)));
    for (strategy, times) in [
        (Strategy::Translated, &times),
        (Strategy::Native, &raw.split_off(raw.len().min(1))),
    ] {
        let ns = times.iter().map(|time| time.as_nanos() as f64);
        let Some(ns) = Spread::of(ns.collect()) else {
            continue;
        };
        let ratio = ratio.filter(|_| strategy == Strategy::Translated);
        let more = ratio.map_or(Vec::new(), |ratio| {
            vec![
                ("ratio low", ratio.low),
                ("ratio", ratio.median),
                ("ratio high", ratio.high),
            ]
        });
        bench.keep(Some(Measurement {
            workload: "svm".to_owned(),
            case: format!("saxpy in VRAM, {strategy}"),
            pages: Pages::Small.name().to_owned(),
            bytes: in_vram.bytes() as u64,
            at: Some(100.0),
            ns,
            per: "dispatch".to_owned(),
            svm: Some(Svm {
                kernel: "saxpy in VRAM".to_owned(),
                strategy: strategy.to_string(),
                uses: 1,
            }),
            more: more
                .into_iter()
                .map(|(name, value)| (name.to_owned(), (value * 1000.0).round() / 1000.0))
                .collect(),
        }))?;
    }
    Ok(())
}

fn one(context: &SvmContext, work: &mut Saxpy) -> Result<Duration, hmm_gpu::Error> {
    let start = Instant::now();
    work.dispatch(context)?;
    Ok(start.elapsed())
}
