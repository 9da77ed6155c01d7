//! Shared virtual addressing: every strategy that there is, on saxpy, a sparse gather, lists and a breadth-first search; over the share of the
//! data that is touched, and how often it is used before the CPU has it again.
//!
//! A turn begins with all data in system memory, where the CPU has touched it last, and ends when the CPU has looked at the result.
//! `HMM_GPU_VULKAN_DEVICE` is a part of the name of the Vulkan device, otherwise it is the first.

mod resident;
mod works;

use std::error::Error;
use std::time::{Duration, Instant};

use criterion::Criterion;
use hmm_gpu::{Shipped, Strategy, SvmContext, SvmError};
use hmm_gpu_bench::plan::Plan;
use hmm_gpu_bench::record::{LeftOut, Measurement, Svm, KEPT};
use hmm_gpu_bench::spread::Spread;

use crate::common::{open, Bench, Pages};
use works::{Boxes, Gather, Saxpy, Work};

/// Of the VRAM: several times what the kernels work on, all of which stays.
const POOL_BYTES: usize = 256 << 20;
/// Of the pages, in percent.
const SHARES: [f64; 4] = [0.1, 1.0, 10.0, 100.0];

/// How much is done, by plan: emulated processors take a hundred times as long.
struct Sizes {
    floats: usize,
    pages: usize,
    lists: usize,
    links: usize,
    nodes: usize,
    uses: &'static [u32],
    gathers: &'static [u32],
    searches: &'static [u32],
    time: Duration,
}

impl Sizes {
    fn of(plan: Plan) -> Self {
        let ms = Duration::from_millis;
        match plan {
            Plan::Quick => Self {
                floats: 8 << 10,
                pages: 1024,
                lists: 16,
                links: 32,
                nodes: 60,
                uses: &[1, 4],
                gathers: &[1],
                searches: &[1],
                time: ms(20),
            },
            Plan::Emulated => Self {
                floats: 32 << 10,
                pages: 3072,
                lists: 32,
                links: 64,
                nodes: 200,
                uses: &[1, 4, 16],
                gathers: &[1, 4, 16],
                searches: &[1],
                time: ms(150),
            },
            Plan::Full => Self {
                floats: 1 << 20,
                pages: 16 << 10,
                lists: 1024,
                links: 256,
                nodes: 20_000,
                uses: &[1, 4, 16],
                gathers: &[1, 4, 16],
                searches: &[1, 4, 16],
                time: ms(1000),
            },
        }
    }
}

pub(crate) fn run(bench: &mut Bench, criterion: &mut Criterion) -> Result<(), Box<dyn Error>> {
    // A fault brings a page, not 2 MiB: it is the share of the pages that is looked at.
    rustix::thread::disable_transparent_huge_pages(true)?;
    let sizes = Sizes::of(bench.plan);
    let mut boxes = Boxes::new(&sizes)?;
    for strategy in Strategy::ALL {
        let context = match context(strategy)? {
            Ok(context) => context,
            Err(why) => {
                leave_out(bench, &strategy.to_string(), why)?;
                continue;
            }
        };
        compile(&context)?;
        let mut cases = Cases {
            bench,
            criterion,
            context: &context,
            strategy: strategy.to_string(),
            sizes: &sizes,
        };
        cases.arrays(None)?;
        cases.all("lists", 100.0, sizes.uses, &mut boxes.lists)?;
        cases.all("search", 100.0, sizes.searches, &mut boxes.search)?;
        if strategy == Strategy::Mapped {
            cases.strategy = KEPT.to_owned();
            cases.arrays(Some(&context))?;
        }
    }
    drop(boxes);
    resident::run(bench, criterion, sizes.floats, sizes.time)
}

/// A context, or why there is none of that strategy.
fn context(strategy: Strategy) -> Result<Result<SvmContext, String>, Box<dyn Error>> {
    let mut builder = SvmContext::builder().strategy(strategy);
    if let Ok(name) = std::env::var("HMM_GPU_VULKAN_DEVICE") {
        builder = builder.device(name);
    }
    if strategy == Strategy::Translated {
        builder = builder.driver(open()?).pool_bytes(POOL_BYTES);
    }
    match builder.build() {
        Ok(context) => Ok(Ok(context)),
        Err(hmm_gpu::Error::Svm(
            error @ (SvmError::NoLoader { .. }
            | SvmError::NoSuchDevice { .. }
            | SvmError::Lacks { .. }
            | SvmError::Unavailable { .. }),
        )) => Ok(Err(error.to_string())),
        // A loader that finds no driver refuses an instance.
        Err(error) => match hmm_gpu::doctor().devices {
            Err(why) => Ok(Err(why)),
            Ok(_) => Err(error.into()),
        },
    }
}

fn leave_out(bench: &mut Bench, what: &str, why: String) -> Result<(), Box<dyn Error>> {
    println!("svm: {what} is left out: {why}");
    bench.records.leave_out(&LeftOut {
        workload: "svm".to_owned(),
        what: what.to_owned(),
        why,
    })?;
    Ok(())
}

/// Has all kernels compiled, which takes seconds each on an emulated processor. Strategies that translate in the same way have the same.
fn compile(context: &SvmContext) -> Result<(), hmm_gpu::Error> {
    println!("svm: {context}; the Vulkan driver compiles the kernels");
    let start = Instant::now();
    for shipped in [Shipped::Saxpy, Shipped::Gather, Shipped::List, Shipped::Bfs] {
        context.kernel(shipped)?;
    }
    println!("svm: compiled in {:.1} s", start.elapsed().as_secs_f64());
    Ok(())
}

/// The cases of a strategy.
struct Cases<'a> {
    bench: &'a mut Bench,
    criterion: &'a mut Criterion,
    context: &'a SvmContext,
    strategy: String,
    sizes: &'a Sizes,
}

impl Cases<'_> {
    /// Those on arrays: in memory of the program, or, with a context, in such as it has.
    fn arrays(&mut self, keep: Option<&SvmContext>) -> Result<(), Box<dyn Error>> {
        let sizes = self.sizes;
        let mut saxpy = Saxpy::new(sizes.floats, keep)?;
        self.all("saxpy", 100.0, sizes.uses, &mut saxpy)?;
        let mut before = 0;
        for share in SHARES {
            let touched = ((sizes.pages as f64 * share / 100.0).round() as usize).max(1);
            if touched == before {
                continue;
            }
            before = touched;
            let share = 100.0 * touched as f64 / sizes.pages as f64;
            let mut gather = Gather::new(sizes.pages, touched, keep)?;
            self.all("gather", share, sizes.gathers, &mut gather)?;
        }
        Ok(())
    }

    /// For each number of uses: compares what comes out with the CPU's, times it, and compares again.
    fn all(
        &mut self,
        kernel: &str,
        share: f64,
        uses: &[u32],
        work: &mut dyn Work,
    ) -> Result<(), Box<dyn Error>> {
        for &uses in uses {
            self.one(kernel, share, uses, work)?;
        }
        Ok(())
    }

    fn one(
        &mut self,
        kernel: &str,
        share: f64,
        uses: u32,
        work: &mut dyn Work,
    ) -> Result<(), Box<dyn Error>> {
        let wrong = |what| format!("svm: {kernel}, {}: {what}", self.strategy);
        used(self.context, uses, work)?;
        work.check().map_err(wrong)?;

        let mut group = self.bench.group(self.criterion, &format!("svm {kernel}"));
        group.warm_up_time(self.sizes.time / 4);
        group.measurement_time(self.sizes.time);
        let name = format!("{}, {share:.3} %, {uses} uses", self.strategy);
        let before = self.context.stats();
        let mut turns = 0_u32;
        let times = self.bench.turns(&mut group, name, work.bytes(), || {
            turns += 1;
            work.home();
            used(self.context, uses, work).expect("a kernel runs")
        });
        group.finish();
        work.check().map_err(wrong)?;

        let all = self.context.stats();
        let per = |now: u64, then: u64| {
            let uses = f64::from(turns.max(1) * uses);
            ((now - then) as f64 / uses * 10.0).round() / 10.0
        };
        let ns = times
            .iter()
            .map(|time| time.as_nanos() as f64 / f64::from(uses));
        let measured = Spread::of(ns.collect()).map(|ns| Measurement {
            workload: "svm".to_owned(),
            case: format!("{kernel}, {}, {uses} uses", self.strategy),
            pages: Pages::Small.name().to_owned(),
            bytes: work.bytes() as u64,
            at: Some(share),
            ns,
            per: work.per().to_owned(),
            svm: Some(Svm {
                kernel: kernel.to_owned(),
                strategy: self.strategy.clone(),
                uses,
            }),
            more: [
                ("rounds", per(all.rounds, before.rounds)),
                ("faults", per(all.faults, before.faults)),
                ("bytes in", per(all.bytes_in, before.bytes_in)),
                ("bytes out", per(all.bytes_out, before.bytes_out)),
            ]
            .map(|(name, value)| (name.to_owned(), value))
            .into(),
        });
        self.bench.keep(measured)
    }
}

/// Uses the data so often, and looks at what comes out.
fn used(context: &SvmContext, uses: u32, work: &mut dyn Work) -> Result<Duration, hmm_gpu::Error> {
    let start = Instant::now();
    work.begin();
    for _ in 0..uses {
        work.dispatch(context)?;
    }
    work.end();
    Ok(start.elapsed())
}
