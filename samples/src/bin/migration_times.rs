//! How long pages take to VRAM and back, for a few sizes: by request, and because the CPU touches them.
//!
//! `migration_times [N]` uses `/dev/hmm_gpuN`, or the first device there is. Each number is the middle one of three runs, and
//! every byte is compared after every run. For numbers that mean something see the benchmarks in `bench/`.

use std::error::Error;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use hmm_gpu::{Bytes, Device, Moved, PageRange, SharedBuf};

/// Bytes that are moved.
const SIZES: [usize; 4] = [64 << 10, 1 << 20, 16 << 20, 64 << 20];
/// Runs per size: odd, for there to be a middle one.
const RUNS: usize = 3;

/// The ways that are timed.
const WAYS: [&str; 3] = [
    "to VRAM, by request",
    "to RAM, by request",
    "to RAM, by CPU touch",
];

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("migration_times: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let device = match std::env::args().nth(1) {
        Some(unit) => Device::open(unit.parse()?)?,
        None => Device::open_first()?,
    };
    let description = device.describe()?;
    println!("{description}\n");
    println!(
        "{:>8}  {:<21}{:>12}{:>12}{:>14}",
        "size", "way", "ms", "MB/s", "us per page"
    );
    for size in SIZES {
        if size as u64 > description.vram_free_bytes {
            println!("{:>8}  not enough free VRAM", Bytes(size as u64));
            continue;
        }
        let pages = PageRange::covering(0, size).pages();
        for (way, time) in WAYS.into_iter().zip(measure(&device, size)?) {
            let seconds = time.as_secs_f64();
            let (ms, mb_per_s) = (seconds * 1e3, size as f64 / 1e6 / seconds);
            let us_per_page = seconds * 1e6 / pages as f64;
            println!(
                "{:>8}  {way:<21}{ms:>12.3}{mb_per_s:>12.0}{us_per_page:>14.2}",
                Bytes(size as u64)
            );
        }
    }
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    println!("\n{}", label(&cpuinfo));
    Ok(())
}

/// The middle times of all ways.
fn measure(device: &Device, size: usize) -> Result<[Duration; WAYS.len()], Box<dyn Error>> {
    let mut buf = SharedBuf::<u64>::zeroed(size / size_of::<u64>())?;
    buf.iter_mut()
        .zip(0..)
        .for_each(|(word, n)| *word = pattern(n));
    let words_per_page = PageRange::covering(0, 1).bytes() / size_of::<u64>();
    let mut times = [[Duration::ZERO; WAYS.len()]; RUNS];
    for run in &mut times {
        run[0] = time(|| whole(size, || buf.to_device(device)))?;
        run[1] = time(|| whole(size, || buf.to_system(device)))?;
        compare(&buf, 1)?;
        whole(size, || buf.to_device(device))?;
        // One word of each page: the rest of the time is the driver's and the kernel's.
        run[2] = time(|| compare(&buf, words_per_page))?;
        compare(&buf, 1)?;
    }
    Ok(std::array::from_fn(|way| {
        let mut runs = times.map(|run| run[way]);
        runs.sort();
        runs[RUNS / 2]
    }))
}

fn time(work: impl FnOnce() -> Result<(), Box<dyn Error>>) -> Result<Duration, Box<dyn Error>> {
    let start = Instant::now();
    work()?;
    Ok(start.elapsed())
}

/// A time counts only if all moved. A page may be busy for a moment, so what was skipped is asked for again.
fn whole(
    size: usize,
    ask: impl Fn() -> Result<Moved, hmm_gpu::Error>,
) -> Result<(), Box<dyn Error>> {
    let mut moved = Moved::default();
    for _ in 0..3 {
        moved += ask()?;
        if moved.moved == size as u64 {
            return Ok(());
        }
    }
    Err(format!(
        "{} should have moved, but after three calls: {moved}",
        Bytes(size as u64)
    )
    .into())
}

/// Compares every `step`th word with what was written.
fn compare(buf: &[u64], step: usize) -> Result<(), Box<dyn Error>> {
    match (0..buf.len()).step_by(step).find(|&n| buf[n] != pattern(n)) {
        None => Ok(()),
        Some(n) => Err(format!("word {n} is {:#x}, not {:#x}", buf[n], pattern(n)).into()),
    }
}

/// What word `n` holds.
fn pattern(n: usize) -> u64 {
    (n as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// What these numbers are of.
fn label(cpuinfo: &str) -> &'static str {
    let value = |line: &'static str| {
        let found = cpuinfo.lines().find(|text| text.starts_with(line));
        found
            .and_then(|text| text.split_once(':'))
            .map_or("", |(_, value)| value)
    };
    if value("model name").contains("TCG") || value("model name").contains("QEMU Virtual CPU") {
        "These are times of a virtual machine under software emulation. They say that it works, not how fast it is."
    } else if value("flags")
        .split_whitespace()
        .any(|flag| flag == "hypervisor")
    {
        "These are times of a virtual machine, perhaps under emulation, and not of hardware."
    } else {
        "These are times of this machine itself: no virtual machine is between."
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_a_virtual_machine_are_labelled_as_such() {
        let label_of = |model, flags| {
            label(&format!(
                "model name\t: {model}\nflags\t\t: fpu {flags} sse\n"
            ))
        };
        assert!(label_of("QEMU TCG CPU version 2.5+", "hypervisor").contains("software emulation"));
        assert!(label_of("Some CPU @ 3 GHz", "hypervisor").contains("a virtual machine, perhaps"));
        assert!(label_of("Some CPU @ 3 GHz", "vme").contains("this machine itself"));
        assert!(label("").contains("this machine itself"));
    }
}
