//! Lists of boxes, as any Rust program has them, are walked by a Vulkan compute shader: by their own pointers, in each way in which it can
//! reach them.
//!
//! `linked_list [LINKS [DEVICE]]`: 20000 links without the first, and the first Vulkan device without the second, which is a part of its name.
//! `translated` needs the driver (`modprobe hmm_gpu`).

use std::error::Error;
use std::process::ExitCode;
use std::time::Instant;

use hmm_gpu::{Link, Shipped, Strategy, SvmContext};

/// Lists. An invocation of the shader walks each.
const LISTS: u64 = 10;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("linked_list: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let links: u64 = arguments.next().map_or(Ok(20_000), |text| text.parse())?;
    let device = arguments.next();

    // List 0 has the values 0, 10, 20, and so on; list 1 has 1, 11, 21.
    let lists: Vec<Option<Box<Link>>> = (0..LISTS)
        .map(|list| Link::list((list..links).step_by(LISTS as usize)))
        .collect();
    let sum = |list| Link::links(list).map(|link| link.value).sum();
    let expected: Vec<u64> = lists.iter().map(sum).collect();
    println!("{links} links in {LISTS} lists, each link in a box of its own.\n");

    let mut ways = 0;
    for strategy in Strategy::ALL {
        let mut builder = SvmContext::builder().strategy(strategy);
        if let Some(name) = &device {
            builder = builder.device(name);
        }
        match builder.build() {
            Ok(context) => {
                println!("{context}");
                walk(&context, &lists, &expected)?;
                ways += 1;
            }
            Err(error) => println!("{error}"),
        }
    }
    if ways == 0 {
        return Err("there is no way".into());
    }
    println!("\nAll sums are right, each time.");
    Ok(())
}

fn walk(
    context: &SvmContext,
    lists: &[Option<Box<Link>>],
    expected: &[u64],
) -> Result<(), Box<dyn Error>> {
    // It is compiled here.
    context.kernel(Shipped::List)?;
    // In the second run the links are where the first has left them: with `translated`, in VRAM.
    for _ in 0..2 {
        let begin = Instant::now();
        let (sums, stats) = context.sum_lists(lists)?;
        println!("  {:8.2} ms  {stats}", begin.elapsed().as_secs_f64() * 1e3);
        if sums != expected {
            return Err(format!("{context}: the sums are {sums:?}, not {expected:?}").into());
        }
    }
    Ok(())
}
