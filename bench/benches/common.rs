//! What the benchmarks share: a device, memory whose pages are of a known size, and turns.

use std::error::Error;
use std::time::{Duration, Instant};

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, SamplingMode, Throughput};
use hmm_gpu::{Alignment, Device, Place, SharedBuf};
use hmm_gpu_bench::plan::Plan;
use hmm_gpu_bench::record::{Measurement, Records};
use hmm_gpu_bench::{HUGE_PAGE, PAGE};

/// Words of a page.
pub(crate) const WORDS: usize = PAGE / 8;

/// Which pages the kernel is asked for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pages {
    /// 4 KiB.
    Small,
    /// 2 MiB.
    Huge,
}

impl Pages {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Small => "4 KiB",
            Self::Huge => "2 MiB",
        }
    }

    /// Whether so many bytes can be had in such pages.
    pub(crate) fn fit(self, bytes: usize) -> bool {
        self == Self::Small || bytes % HUGE_PAGE == 0
    }
}

/// What a run has.
pub(crate) struct Bench {
    pub(crate) device: Device,
    pub(crate) plan: Plan,
    pub(crate) records: Records,
}

impl Bench {
    pub(crate) fn new() -> Result<Self, Box<dyn Error>> {
        Ok(Self {
            device: open()?,
            plan: Plan::from_env(),
            records: Records::from_env()?,
        })
    }

    /// A group of measurements.
    pub(crate) fn group<'a>(
        &self,
        criterion: &'a mut Criterion,
        name: &str,
    ) -> BenchmarkGroup<'a, WallTime> {
        let mut group = criterion.benchmark_group(name);
        group.sample_size(10);
        group.sampling_mode(SamplingMode::Flat);
        group.warm_up_time(self.plan.time() / 4);
        group.measurement_time(self.plan.time());
        group
    }

    /// Has criterion time `turn`, which works on `bytes` once and says how long what counts took. Returns all times but the
    /// first; none if the command line leaves it out.
    pub(crate) fn turns(
        &self,
        group: &mut BenchmarkGroup<'_, WallTime>,
        name: String,
        bytes: usize,
        mut turn: impl FnMut() -> Duration,
    ) -> Vec<Duration> {
        let mut times = Vec::new();
        group.throughput(Throughput::Bytes(bytes as u64));
        group.bench_function(name, |bencher| {
            bencher.iter_custom(|count| {
                let mut turn = || {
                    let time = turn();
                    times.push(time);
                    time
                };
                (0..count).map(|_| turn()).sum()
            });
        });
        if times.len() > 1 {
            times.remove(0);
        }
        times
    }

    /// Keeps a measurement, if there is one.
    pub(crate) fn keep(&mut self, measurement: Option<Measurement>) -> Result<(), Box<dyn Error>> {
        if let Some(measurement) = measurement {
            self.records.add(&measurement)?;
        }
        Ok(())
    }
}

/// Opens the device.
pub(crate) fn open() -> Result<Device, Box<dyn Error>> {
    Ok(match std::env::var("HMM_GPU_BENCH_UNIT") {
        Ok(unit) => Device::open(unit.parse()?)?,
        Err(_) => Device::open_first()?,
    })
}

/// How long something takes, which must not fail.
pub(crate) fn time<T, E: std::fmt::Display>(work: impl FnOnce() -> Result<T, E>) -> Duration {
    let start = Instant::now();
    let result = work();
    let time = start.elapsed();
    if let Err(error) = result {
        panic!("what is timed has failed: {error}");
    }
    time
}

/// What word `n` of memory holds.
fn pattern(n: usize) -> u64 {
    (n as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// Memory in which each word says where it is, in pages of that size.
pub(crate) fn filled(bytes: usize, pages: Pages) -> Result<SharedBuf<u64>, Box<dyn Error>> {
    // What is populated in small pages stays in them, wherever it moves.
    rustix::thread::disable_transparent_huge_pages(pages == Pages::Small)?;
    let mut memory = SharedBuf::zeroed_at(bytes / 8, Alignment::HugePage)?;
    for (n, word) in memory.iter_mut().enumerate() {
        *word = pattern(n);
    }
    Ok(memory)
}

/// Compares memory with what was written to it.
pub(crate) fn check(memory: &[u64]) {
    if let Some(n) = (0..memory.len()).find(|&n| memory[n] != pattern(n)) {
        panic!("word {n} is not what was written");
    }
}

/// Moves all of it to the device. What the kernel has in its hands for a moment is asked for again.
pub(crate) fn to_device(device: &Device, memory: &SharedBuf<u64>) -> Result<(), hmm_gpu::Error> {
    const ATTEMPTS: usize = 16;

    for _ in 1..ATTEMPTS {
        if memory.to_device(device)?.is_complete() {
            return Ok(());
        }
    }
    let moved = memory.to_device(device)?;
    assert!(
        moved.is_complete(),
        "not all of it went to the device: {moved}"
    );
    Ok(())
}

/// Moves all of it to system memory.
pub(crate) fn to_system(device: &Device, memory: &SharedBuf<u64>) -> Result<(), hmm_gpu::Error> {
    memory.to_system(device).map(drop)
}

/// That all of it is there.
pub(crate) fn expect(
    device: &Device,
    memory: &SharedBuf<u64>,
    place: Place,
) -> Result<(), hmm_gpu::Error> {
    let residency = memory.residency(device)?;
    assert!(
        residency.all(place),
        "not all of it is where it was moved to: {residency}"
    );
    Ok(())
}

/// Numbers that look random, the same in every run.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    /// The next one, less than `end`.
    pub(crate) fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % end as u64) as usize
    }

    /// All numbers below `count`, in some order.
    pub(crate) fn order(&mut self, count: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..count).collect();
        for i in (1..count).rev() {
            order.swap(i, self.below(i + 1));
        }
        order
    }
}
