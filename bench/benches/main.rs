//! Criterion benchmarks of a device of the driver, `/dev/hmm_gpuN`: the first there is, or the one that `HMM_GPU_BENCH_UNIT` names.
//!
//! `make bench` runs them in the virtual GPU host, `make bench-host` here. Each turn is timed by itself, so that what has to be done
//! between two (moving things back) is not. Memory is compared with what was written to it when it was last moved.

mod common;
mod faults;
mod migration;
mod mirror;
mod pressure;
mod scaling;
mod svm;

use std::error::Error;
use std::process::ExitCode;

use common::Bench;
use criterion::Criterion;
use hmm_gpu_bench::plan::Plan;

/// What `HMM_GPU_BENCH_ONLY` may name, in the order in which they run.
type Workload = fn(&mut Bench, &mut Criterion) -> Result<(), Box<dyn Error>>;
const WORKLOADS: [(&str, Workload); 6] = [
    ("migration", migration::run),
    ("faults", faults::run),
    ("mirror", mirror::run),
    ("pressure", pressure::run),
    ("scaling", scaling::run),
    ("svm", svm::run),
];

fn main() -> ExitCode {
    let mut arguments = std::env::args();
    if arguments.nth(1).as_deref() == Some(scaling::WORKER) {
        return scaling::worker();
    }
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("hmm-gpu-bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let only = std::env::var("HMM_GPU_BENCH_ONLY").unwrap_or_default();
    let wanted: Vec<&str> = only.split_whitespace().collect();
    if let Some(unknown) = wanted
        .iter()
        .find(|name| WORKLOADS.iter().all(|(known, _)| known != *name))
    {
        return Err(format!("no benchmark is called {unknown}").into());
    }
    let mut bench = Bench::new()?;
    for (name, workload) in WORKLOADS {
        if wanted.is_empty() || wanted.contains(&name) {
            let mut criterion = criterion(name, bench.plan);
            workload(&mut bench, &mut criterion)?;
        }
    }
    criterion("", bench.plan).final_summary();
    Ok(())
}

/// Of criterion's analysis, no more than an emulated processor has time for: of `svm`'s many cases no plots.
fn criterion(workload: &str, plan: Plan) -> Criterion {
    let (resamples, plots) = match plan {
        Plan::Quick => (1_000, false),
        Plan::Emulated if workload == "svm" => (1_000, false),
        Plan::Emulated => (5_000, true),
        Plan::Full => (100_000, true),
    };
    let mut criterion = Criterion::default().nresamples(resamples);
    if !plots {
        criterion = criterion.without_plots();
    }
    criterion.configure_from_args()
}
