//! `y = a * x + y` on two ordinary `Vec`s, by a Vulkan compute shader, in each way in which it can reach them.
//!
//! `saxpy [ELEMENTS [DEVICE]]`: a million elements without the first, and the first Vulkan device without the second, which is a part of its
//! name. Each way computes four times, and every element is compared each time. `translated` needs the driver (`modprobe hmm_gpu`).

use std::error::Error;
use std::process::ExitCode;
use std::time::Instant;

use hmm_gpu::{Bytes, Shipped, Strategy, SvmContext};

/// Runs: the first, which finds nothing prepared, and those after it.
const RUNS: usize = 4;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("saxpy: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let elements = arguments.next().map_or(Ok(1 << 20), |text| text.parse())?;
    let device = arguments.next();
    println!("x and y have {} each.\n", Bytes(4 * elements as u64));
    let mut ways = 0;
    for strategy in Strategy::ALL {
        let mut builder = SvmContext::builder().strategy(strategy);
        if let Some(name) = &device {
            builder = builder.device(name);
        }
        match builder.build() {
            Ok(context) => {
                println!("{context}");
                compute(&context, elements)?;
                ways += 1;
            }
            Err(error) => println!("{error}"),
        }
    }
    if ways == 0 {
        return Err("there is no way".into());
    }
    println!("\nAll of y is right, each time.");
    Ok(())
}

fn compute(context: &SvmContext, elements: usize) -> Result<(), Box<dyn Error>> {
    // Whole numbers that a float holds, so that there is one right answer.
    let x: Vec<f32> = (0..1000).map(|i| i as f32).cycle().take(elements).collect();
    let mut y = vec![1.0_f32; elements];
    // It is compiled here.
    context.kernel(Shipped::Saxpy)?;
    for run in 1..=RUNS {
        let begin = Instant::now();
        let stats = context.saxpy(3.0, &x, &mut y)?;
        println!("  {:8.2} ms  {stats}", begin.elapsed().as_secs_f64() * 1e3);
        // The CPU touches both: what is in VRAM comes home.
        let right = |(x, y): (&f32, &f32)| *y == 1.0 + 3.0 * run as f32 * x;
        if !x.iter().zip(&y).all(right) {
            return Err(format!("{context}: an element is wrong in run {run}").into());
        }
    }
    Ok(())
}
