//! Threads of one process, and processes, that move memory of their own there and back at the same time. What is given is the time of all
//! over the pages of all: half of it with two is twice as fast.

use std::error::Error;
use std::io::{Read, Write};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Barrier;
use std::time::{Duration, Instant};

use criterion::Criterion;
use hmm_gpu_bench::record::Measurement;

use crate::common::{check, filled, open, time, to_device, to_system, Bench, Pages};

/// The argument that makes the program one of the processes.
pub(crate) const WORKER: &str = "--worker";

pub(crate) fn run(bench: &mut Bench, criterion: &mut Criterion) -> Result<(), Box<dyn Error>> {
    let most = std::thread::available_parallelism()
        .map_or(1, usize::from)
        .max(2);
    let bytes = bench.plan.working_bytes();
    let counts: Vec<usize> = std::iter::successors(Some(1), |n| Some(n * 2))
        .take_while(|n| *n <= most)
        .collect();
    for &count in &counts {
        let mut group = bench.group(criterion, "scaling");
        let times = bench.turns(
            &mut group,
            format!("{count} threads"),
            bytes * count,
            || threads(bench, count, bytes),
        );
        let threads = (times, "threads");
        let mut workers = Workers::new(count, bytes)?;
        let times = bench.turns(
            &mut group,
            format!("{count} processes"),
            bytes * count,
            || workers.turn().expect("they move memory"),
        );
        drop(workers);
        group.finish();
        for (times, case) in [threads, (times, "processes")] {
            let all = bytes * count;
            let mut measured =
                Measurement::of_turns(("scaling", case), Pages::Small.name(), all, &times);
            if let Some(measured) = &mut measured {
                measured.at = Some(count as f64);
            }
            bench.keep(measured)?;
        }
    }
    Ok(())
}

/// Threads move memory of their own there and back, all at once. The time until the last has.
fn threads(bench: &Bench, count: usize, bytes: usize) -> Duration {
    let memories: Vec<_> = (0..count)
        .map(|_| filled(bytes, Pages::Small).expect("there is memory"))
        .collect();
    let ready = Barrier::new(count + 1);
    let start = std::thread::scope(|scope| {
        for memory in &memories {
            let ready = &ready;
            scope.spawn(move || {
                ready.wait();
                to_device(&bench.device, memory).expect("it moves");
                to_system(&bench.device, memory).expect("it moves");
            });
        }
        ready.wait();
        Instant::now()
    });
    let took = start.elapsed();
    memories.iter().for_each(|memory| check(memory));
    took
}

/// Processes that do the same, each time they are given a byte.
struct Workers(Vec<Child>);

impl Workers {
    fn new(count: usize, bytes: usize) -> Result<Self, Box<dyn Error>> {
        let mut workers = Self(Vec::new());
        for _ in 0..count {
            let mut command = Command::new(std::env::current_exe()?);
            command.args([WORKER, &bytes.to_string()]);
            workers.0.push(
                command
                    .stdin(Stdio::piped())
                    .stdout(Stdio::piped())
                    .spawn()?,
            );
        }
        // They are ready when they have said so.
        workers.answers()?;
        Ok(workers)
    }

    fn answers(&mut self) -> Result<(), Box<dyn Error>> {
        for worker in &mut self.0 {
            let answer = worker.stdout.as_mut().ok_or("a worker has no output")?;
            answer.read_exact(&mut [0])?;
        }
        Ok(())
    }

    fn turn(&mut self) -> Result<Duration, Box<dyn Error>> {
        let start = Instant::now();
        for worker in &mut self.0 {
            worker
                .stdin
                .as_mut()
                .ok_or("a worker has no input")?
                .write_all(b"\n")?;
        }
        self.answers()?;
        Ok(start.elapsed())
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        for worker in &mut self.0 {
            // It ends with its input.
            drop(worker.stdin.take());
            let _ = worker.wait();
        }
    }
}

/// The program as one of the processes.
pub(crate) fn worker() -> ExitCode {
    let work = || -> Result<(), Box<dyn Error>> {
        let bytes = std::env::args().nth(2).ok_or("how many bytes?")?.parse()?;
        let device = open()?;
        let memory = filled(bytes, Pages::Small)?;
        let (mut input, mut output) = (std::io::stdin(), std::io::stdout());
        let mut byte = [0];
        loop {
            output.write_all(b"\n")?;
            output.flush()?;
            if input.read(&mut byte)? == 0 {
                check(&memory);
                return Ok(());
            }
            time(|| to_device(&device, &memory));
            time(|| to_system(&device, &memory));
        }
    };
    match work() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("hmm-gpu-bench: a worker: {error}");
            ExitCode::FAILURE
        }
    }
}
