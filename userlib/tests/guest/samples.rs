//! The samples: each runs to its end, and shows what it is there to show.
//!
//! Runs in the virtual GPU host: `bench/test guest_samples`.

use std::process::Command;

use crate::common::driver::Driver;
use crate::common::is_checking;
use crate::common::kernels::settings;

const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/tree/release");

/// What a sample prints. It compares every byte itself, and fails if one is wrong.
#[track_caller]
fn sample(name: &str, arguments: &[&str]) -> String {
    let output = Command::new(format!("{FOLDER}/{name}"))
        .args(arguments)
        .envs(settings())
        .output()
        .unwrap_or_else(|error| panic!("{name}: {error}; run `make userlib`"));
    let text = String::from_utf8(output.stdout).unwrap();
    println!("## `{name}`\n\n{text}");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{name}: {error}");
    text
}

/// The numbers of the line that begins so.
#[track_caller]
fn numbers(text: &str, name: &str) -> Vec<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let line = line.unwrap_or_else(|| panic!("{name} in {text}"));
    line.split_whitespace()
        .filter_map(|word| word.parse().ok())
        .collect()
}

/// Catches data that fits after all, or that is moved aside without need.
#[test]
fn oversubscribe_works_on_more_than_there_is_vram() {
    let driver = Driver::load("soft=1 soft_mib=16");
    let text = sample("oversubscribe", &[]);
    let [write, read] =
        ["the device writes it all", "the device reads it all"].map(|name| numbers(&text, name));
    // 24 MiB through 16.
    assert!(write[1] >= 24 && write[2] >= 8, "{write:?}");
    assert!(read[1] > 0 && read[2] > 0, "{read:?}");
    driver.finish();
}

/// Catches hints that change nothing.
#[test]
fn prefetch_advise_shows_that_hints_change_what_moves() {
    let driver = Driver::load("soft=1 soft_mib=16 bounce_ms=20");
    let text = sample("prefetch_advise", &[]);
    let row = |name| numbers(&text, name);
    // Asked for, by device faults, touched back, CPU faults.
    assert!(row("no hint")[0] == 0 && row("no hint")[1] > 0);
    assert!(row("prefetch before each round")[0] > 0);
    assert_eq!(row("prefetch before each round")[1], 0);
    assert_eq!(row("advice: best in RAM"), [0, 0, 0, 0]);
    assert_eq!(row("advice: read mostly"), [0, 0, 0, 0]);
    driver.finish();
}

/// Catches pages that go through system memory on their way from VRAM to VRAM.
#[test]
fn two_gpus_share_a_buffer() {
    let driver = Driver::load("soft=2 soft_mib=16");
    let text = sample("two_gpus", &[]);
    assert!(text.contains("The first counts 64 pages to another device, the second 64 from one; no page went through RAM: 0."));
    assert!(text.contains("at the same addresses"));
    driver.finish();
}

/// Catches a way to memory that gives wrong elements, or is not there.
#[test]
fn saxpy_is_right_in_every_way() {
    let driver = Driver::load("soft=1 soft_mib=16");
    let text = sample("saxpy", &["50000"]);
    for strategy in hmm_gpu::Strategy::ALL {
        let runs = |line: &&str| line.contains(&format!(" ms  {strategy}: "));
        assert_eq!(text.lines().filter(runs).count(), 4, "{strategy}");
    }
    driver.finish();
}

/// Catches pointers that are not followed, and links beside which the dispatching thread has something of its own, whose page does not
/// stay in VRAM for that.
#[test]
fn linked_list_is_walked_in_every_way() {
    let driver = Driver::load("soft=1 soft_mib=16");
    let text = sample("linked_list", &["3000"]);
    for strategy in hmm_gpu::Strategy::ALL {
        let runs = |line: &&str| line.contains(&format!(" ms  {strategy}: "));
        assert_eq!(text.lines().filter(runs).count(), 2, "{strategy}");
    }
    assert!(text.contains("All sums are right, each time."));
    driver.finish();
}

/// Catches what a kernel writes to a page that does not stay in VRAM, and is lost; and levels that are not those of the CPU.
#[test]
fn graph_bfs_finds_what_the_cpu_finds() {
    let driver = Driver::load("soft=1 soft_mib=16");
    // On the checking kernel a dispatch of each strategy for each level takes a minute.
    let nodes = if is_checking() { "60" } else { "500" };
    let text = sample("graph_bfs", &[nodes]);
    for strategy in hmm_gpu::Strategy::ALL {
        let runs = |line: &&str| line.contains(&format!(" ms  {strategy}: "));
        assert_eq!(text.lines().filter(runs).count(), 1, "{strategy}");
    }
    // On the way, and in the end.
    let levels = " 1 2 5 8 24 47 62 61 68 62 35 8 6 5 1; not reached: 105.";
    assert!(is_checking() || text.contains(levels));
    assert!(text.contains("All distances are right, each time."));
    driver.finish();
}

/// Catches a header that no C compiler takes, and pages that a child sees otherwise than its parent.
#[test]
fn fork_cow_shows_pages_that_are_shared_in_vram() {
    let driver = Driver::load("soft=1 soft_mib=16");
    let text = sample("fork_cow", &[]);
    let rows: Vec<&str> = text
        .lines()
        .filter_map(|line| line.split_whitespace().nth(1))
        .filter(|row| row.len() == 64)
        .collect();
    assert_eq!(rows[..2], ["V".repeat(64), "v".repeat(64)]);
    assert_eq!(rows[2], "R".repeat(16) + &"v".repeat(48));
    driver.finish();
}

/// Catches pinned pages that move.
#[test]
fn pinned_memory_stays_until_it_is_let_go_of() {
    let driver = Driver::load("soft=1 soft_mib=16");
    let text = sample("pinned", &[]);
    let rows: Vec<&str> = text
        .lines()
        .map(str::trim)
        .filter(|line| line.len() == 64 && !line.contains(' '))
        .collect();
    assert_eq!(
        rows,
        [
            "V".repeat(16) + &"R".repeat(8) + &"V".repeat(40),
            "V".repeat(64)
        ]
    );
    driver.finish();
}
