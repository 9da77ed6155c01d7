//! The same work through the test interface of HMM (the kernel's `lib/test_hmm_uapi.h`), by turns on nodes of two drivers that speak
//! it: how long a page takes to the device, back, and back because the CPU touches it, all pages in order or few far from each other, and
//! what a look at it costs.
//!
//! `hmm-gpu-compare [--rounds N] [--size KIB]... [--instructions] NAME=NODE[,OWN] [NAME=NODE[,OWN]]`. In each round every size and page size is
//! done once on each node, in memory of its own, and the order of the nodes changes from round to round; only one of them is open at a
//! time. The first round does not count. Each number is the middle one of all rounds in ns per 4 KiB page, with the middle half of them behind it. A ratio, of
//! the first node to the second, which is ours, is made in each round of the two times in it; where the middle half of them has 1 in it, no more is said than that. Every byte is compared after
//! every turn. A turn in which a page would not move is made again, and told of. Two nodes are a comparison, which goes to the file that `HMM_GPU_BENCH_RECORDS` names.
//!
//! That interface has what is on the device read back to the caller with each move to it. What a move takes without that (`bare`) is, of a driver
//! that has a node of its own (`OWN`, hmm-gpu's), the same by that node's call; of another, what it took less what a call that only reads (`read`) does.
//!
//! On a machine whose clock counts instructions (`bench/vm/run --icount`), `--instructions` says so: each number is instructions then,
//! of which a copy takes few for the time it takes on hardware.

#![deny(unsafe_code)]

use std::error::Error;
use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use hmm_gpu::{Device, Target};
use hmm_gpu_bench::comparison::Comparison;
use hmm_gpu_bench::record::Records;
use hmm_gpu_bench::spread::Spread;
use rustix::io::Errno;

use crate::memory::{Memory, Pages, HUGE_PAGE, PAGE};
use crate::node::{Node, KIND, LOCAL, MAPPED_HUGE};

#[allow(unsafe_code)]
mod memory;
#[allow(unsafe_code)]
mod node;

/// Bytes of memory that are moved at once, if the command line does not say.
const SIZES: [usize; 4] = [512 << 10, 2 << 20, 16 << 20, 64 << 20];
/// More than any guest has.
const LARGEST: usize = 1 << 30;
/// Rounds that count, if the command line does not say.
const ROUNDS: usize = 9;
/// What is timed.
const OPERATIONS: [&str; 7] = [
    "to device",
    "read",
    "bare",
    "snapshot",
    "to system",
    "CPU touch",
    "lone touch",
];
/// Of so many bytes one page is touched alone, where pages are small; of huge ones, one in each.
const LONE: usize = 16 * PAGE;

/// A prime, larger than there are places: so each is come to once.
const STEP: usize = 1_299_709;
/// How often a turn is made at most.
const TRIES: usize = 5;

/// Nanoseconds per 4 KiB page, of each of [`OPERATIONS`].
type Times = [f64; OPERATIONS.len()];

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("hmm-gpu-compare: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let Arguments {
        nodes,
        rounds,
        sizes,
        instructions,
    } = arguments(std::env::args().skip(1))?;
    let unit = if instructions {
        "instr/page"
    } else {
        "ns a page"
    };
    print!(
        "{:>8}  {:<7}{unit:<11}{:>18}",
        "size", "pages", "plain copy"
    );
    for Named { name, .. } in &nodes {
        print!("{name:>24}");
    }
    if let [first, second] = nodes.as_slice() {
        print!("{:>24}", format!("{} / {}", first.name, second.name));
    }
    println!();
    let mut records = Records::from_env()?;
    for size in sizes {
        for pages in [Pages::Small, Pages::Huge] {
            if pages == Pages::Huge && size % HUGE_PAGE != 0 {
                continue;
            }
            let measured = measure(&nodes, rounds, size, pages)?;
            tell(&nodes, size, pages, &measured, &mut records)?;
        }
    }
    Ok(())
}

/// A node, and what it is called.
#[derive(Debug, PartialEq, Eq)]
struct Named {
    name: String,
    node: PathBuf,
    /// The driver's own node of the same device, if it has one.
    own: Option<PathBuf>,
}

/// What the command line says.
struct Arguments {
    /// One or two.
    nodes: Vec<Named>,
    /// How many rounds count.
    rounds: usize,
    /// In bytes.
    sizes: Vec<usize>,
    /// A nanosecond is an instruction.
    instructions: bool,
}

fn arguments(mut arguments: impl Iterator<Item = String>) -> Result<Arguments, Box<dyn Error>> {
    let (mut nodes, mut rounds, mut sizes, mut instructions) =
        (Vec::new(), ROUNDS, Vec::new(), false);
    while let Some(argument) = arguments.next() {
        if argument == "--rounds" {
            rounds = arguments.next().ok_or("--rounds needs a number")?.parse()?;
        } else if argument == "--size" {
            let kib: usize = arguments.next().ok_or("--size needs a number")?.parse()?;
            sizes.push(kib << 10);
        } else if argument == "--instructions" {
            instructions = true;
        } else if let Some((name, path)) = argument.split_once('=') {
            let (node, own) = match path.split_once(',') {
                Some((node, own)) => (node, Some(own)),
                None => (path, None),
            };
            nodes.push(Named {
                name: name.to_owned(),
                node: node.into(),
                own: own.map(PathBuf::from),
            });
        } else {
            return Err(format!("{argument} is not NAME=NODE").into());
        }
    }
    let whole = |size: &usize| *size != 0 && size % PAGE == 0 && *size <= LARGEST;
    if rounds == 0 || !(1..=2).contains(&nodes.len()) || !sizes.iter().all(whole) {
        return Err(
            "usage: hmm-gpu-compare [--rounds N] [--size KIB]... [--instructions] NAME=NODE[,OWN] [NAME=NODE[,OWN]]"
                .into(),
        );
    }
    if sizes.is_empty() {
        sizes = SIZES.to_vec();
    }
    Ok(Arguments {
        nodes,
        rounds,
        sizes,
        instructions,
    })
}

/// All rounds with one size and page size.
struct Measured {
    /// Of each round.
    copies: Vec<f64>,
    /// Of each node, of each round.
    times: Vec<Vec<Times>>,
}

fn measure(
    nodes: &[Named],
    rounds: usize,
    size: usize,
    pages: Pages,
) -> Result<Measured, Box<dyn Error>> {
    let mut measured = Measured {
        copies: Vec::new(),
        times: vec![Vec::new(); nodes.len()],
    };
    for round in 0..=rounds {
        let copy = copy(size, pages)?;
        let mut turns: Vec<usize> = (0..nodes.len()).collect();
        turns.rotate_left(round % nodes.len());
        for turn in turns {
            let node = &nodes[turn];
            let times = turn_of(node, size, pages)
                .map_err(|error| format!("{}, {} KiB: {error}", node.name, size >> 10))?;
            if round > 0 {
                measured.times[turn].push(times);
            }
        }
        if round > 0 {
            measured.copies.push(copy);
        }
    }
    Ok(measured)
}

/// One turn of a node, made again where not all of it moved.
fn turn_of(named: &Named, size: usize, pages: Pages) -> Result<Times, Box<dyn Error>> {
    for _ in 1..TRIES {
        match turn(named, size, pages) {
            Err(error) if error.downcast_ref() == Some(&Errno::NOENT) => {
                eprintln!(
                    "{}: not all of {} KiB moved; once more",
                    named.node.display(),
                    size >> 10
                );
            }
            other => return other,
        }
    }
    turn(named, size, pages)
}

fn turn(named: &Named, size: usize, pages: Pages) -> Result<Times, Box<dyn Error>> {
    times(&Node::open(&named.node)?, named.own.as_deref(), size, pages)
}

/// One turn: new memory goes to the device and back, twice, and once more by a call of the driver's own, if it has that.
fn times(
    node: &Node,
    own: Option<&Path>,
    size: usize,
    pages: Pages,
) -> Result<Times, Box<dyn Error>> {
    let memory = filled(size, pages)?;
    let mut seen = vec![0; size / PAGE];
    let mut copy = vec![0; size];

    node.snapshot(&memory, &mut seen)?;
    let huge = seen.iter().filter(|&page| page & MAPPED_HUGE != 0).count();
    if huge != if pages == Pages::Huge { seen.len() } else { 0 } {
        return Err(format!("{huge} of {} pages are in huge ones", seen.len()).into());
    }

    let to_device = time(size, || node.migrate_to_device(&memory, &mut copy))?;
    let snapshot = time(size, || node.snapshot(&memory, &mut seen))?;
    if let Some(page) = seen.iter().position(|page| page & KIND != LOCAL) {
        return Err(format!("page {page} is not on the device: {:#x}", seen[page]).into());
    }
    let read = time(size, || node.read(&memory, &mut copy))?;
    let to_system = time(size, || node.migrate_to_system(&memory))?;
    compare(&memory)?;

    let mut own_call = None;
    if let Some(path) = own {
        // Not longer than that: each client's mirror is told of what becomes of memory.
        let device = Device::open_path(path)?;
        let taken = time(size, || {
            match device.prefetch(memory.bytes(), Target::Device) {
                Ok(moved) if moved.moved != size as u64 => Err(Errno::NOENT),
                Ok(_) => Ok(()),
                Err(error) => Err(error.errno().unwrap_or(Errno::IO)),
            }
        })?;
        own_call = Some(taken);
        drop(device);
        node.migrate_to_system(&memory)?;
        compare(&memory)?;
    }

    // The buffer has its pages by now: what is left when the reading is taken off does not hold its faults.
    let again = time(size, || node.migrate_to_device(&memory, &mut copy))?;
    let bare = own_call.unwrap_or(again - read);
    let touch = time(size, || {
        for byte in memory.bytes().iter().step_by(PAGE) {
            black_box(*byte);
        }
        Ok(())
    })?;
    compare(&memory)?;
    if copy != memory.bytes() {
        return Err("what the driver read is not what is there".into());
    }

    node.migrate_to_device(&memory, &mut copy)?;
    let (apart, each) = match pages {
        Pages::Small => (LONE, PAGE),
        Pages::Huge => (HUGE_PAGE, HUGE_PAGE),
    };
    let places = size.div_ceil(apart);
    let lone = time(places * each, || {
        let bytes = memory.bytes();
        for n in 0..places {
            // In no order that could be followed; and not where 2 MiB begin, where what was touched in order before seems to go on.
            black_box(bytes[n * STEP % places * apart + apart / 2]);
        }
        Ok(())
    })?;
    compare(&memory)?;
    Ok([to_device, read, bare, snapshot, to_system, touch, lone])
}

/// A plain copy of as many bytes, from and to pages that are there. It goes to another place in a huge page than where it is from:
/// addresses that are the same but for their high bits take turns in one place of an emulated processor's table of pages.
fn copy(size: usize, pages: Pages) -> Result<f64, Box<dyn Error>> {
    let (from, mut to) = (filled(size, pages)?, filled(size + HUGE_PAGE, pages)?);
    let place = 100 * PAGE;
    let copy = time(size, || {
        to.bytes_mut()[place..place + size].copy_from_slice(black_box(from.bytes()));
        black_box(to.bytes());
        Ok(())
    })?;
    Ok(copy)
}

/// Nanoseconds per page of what is done for `size` bytes.
fn time(size: usize, work: impl FnOnce() -> Result<(), Errno>) -> Result<f64, Errno> {
    let start = Instant::now();
    work()?;
    Ok(start.elapsed().as_nanos() as f64 / (size / PAGE) as f64)
}

/// Memory in which each word says where it is.
fn filled(size: usize, pages: Pages) -> Result<Memory, Box<dyn Error>> {
    let mut memory = Memory::new(size, pages)?;
    for (word, n) in memory.bytes_mut().chunks_exact_mut(8).zip(0u64..) {
        word.copy_from_slice(&pattern(n));
    }
    Ok(memory)
}

fn compare(memory: &Memory) -> Result<(), Box<dyn Error>> {
    let mut words = memory.bytes().chunks_exact(8).zip(0u64..);
    match words.find(|&(word, n)| word != pattern(n)) {
        None => Ok(()),
        Some((_, n)) => Err(format!("word {n} is not what was written").into()),
    }
}

/// What word `n` holds.
fn pattern(n: u64) -> [u8; 8] {
    (n + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_ne_bytes()
}

/// Prints a row for each operation, and records it.
fn tell(
    nodes: &[Named],
    size: usize,
    pages: Pages,
    measured: &Measured,
    records: &mut Records,
) -> Result<(), Box<dyn Error>> {
    let pages = match pages {
        Pages::Small => "4 KiB",
        Pages::Huge => "2 MiB",
    };
    for (n, operation) in OPERATIONS.into_iter().enumerate() {
        let copy = match n {
            0 => text(measured.copies.clone()),
            _ => String::new(),
        };
        let said = hmm_gpu_bench::page::size(size as f64);
        print!("{said:>8}  {pages:<7}{operation:<11}{copy:>18}");
        let of = |node: usize| -> Vec<f64> {
            let times = measured.times[node].iter();
            times.map(move |times| times[n]).collect()
        };
        for node in 0..nodes.len() {
            print!("{:>24}", text(of(node)));
        }
        let compared = (nodes.len() == 2)
            .then(|| {
                let what = (operation, pages, size);
                Comparison::of(what, of(1), of(0), measured.copies.clone())
            })
            .flatten();
        if let Some(compared) = compared {
            let Spread {
                low, median, high, ..
            } = compared.ratio;
            print!("{:>24}", format!("{median:.2} ({low:.2}-{high:.2})"));
            if !compared.decides() {
                print!("  too wide to conclude");
            }
            records.compare(&compared)?;
        }
        println!();
    }
    Ok(())
}

/// The middle one, and between which two the middle half is.
fn text(numbers: Vec<f64>) -> String {
    Spread::of(numbers).map_or(String::new(), |it| {
        format!("{:.0} ({:.0}-{:.0})", it.median, it.low, it.high)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Option<Arguments> {
        arguments(line.split_whitespace().map(str::to_owned)).ok()
    }

    #[test]
    fn one_or_two_nodes_are_named() {
        let two = parsed("a=/dev/x --rounds 3 b=/dev/y,/dev/z").unwrap();
        assert_eq!((&*two.nodes[1].name, &two.nodes[0].own), ("b", &None));
        assert_eq!(two.nodes[1].node, PathBuf::from("/dev/y"));
        assert_eq!(two.nodes[1].own, Some(PathBuf::from("/dev/z")));
        assert_eq!((two.nodes.len(), two.rounds), (2, 3));
        assert_eq!((two.sizes, two.instructions), (SIZES.to_vec(), false));
        let one = parsed("a=/dev/x --size 4 --size 2048 --instructions").unwrap();
        assert_eq!((one.sizes, one.instructions), (vec![4096, HUGE_PAGE], true));
        for line in [
            "",
            "a",
            "--rounds",
            "a=/dev/x --rounds 0",
            "a=1 b=2 c=3",
            "a=/dev/x --size 0",
            "a=/dev/x --size 3",
        ] {
            assert!(parsed(line).is_none(), "{line}");
        }
    }

    #[test]
    fn memory_holds_what_is_written_and_a_change_is_found() {
        let mut memory = filled(2 * PAGE, Pages::Small).unwrap();
        compare(&memory).unwrap();
        memory.bytes_mut()[PAGE + 9] ^= 1;
        let error = compare(&memory).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("word {} is not what was written", PAGE / 8 + 1)
        );
    }
}
