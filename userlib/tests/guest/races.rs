//! What others do to the same memory at the same moment: what was found to break drivers like this one.
//!
//! Runs in the virtual GPU host, with red zones around the kernel's slab objects: `bench/test guest_races`.

use std::fs;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::common::driver::{assert_empty, counters, Driver, GPUS};
use crate::common::kernel::{self, Entry};
use crate::common::memory::{Area, Span, HUGE, PAGE};
use crate::common::random::Random;
use crate::common::{eventually, patience, places, rounds};
use hmm_gpu::{Device, Errno, Target};

/// Moves what can be moved; a range that is being unmapped may be empty by then.
fn try_move(device: &Device, span: Span, target: Target) {
    match device.prefetch_range(span.addr, span.bytes(), target) {
        Ok(_) => (),
        Err(error) => assert_eq!(error.errno(), Some(Errno::FAULT), "{error}"),
    }
}

/// `mremap` to an address, in place of what is there.
fn remap(from: Span, to: usize) -> Span {
    let (old, flags) = (
        from.addr as *mut libc::c_void,
        libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED,
    );
    // SAFETY: both ranges are the test's own.
    let new = unsafe {
        libc::mremap(
            old,
            from.bytes(),
            from.bytes(),
            flags,
            to as *mut libc::c_void,
        )
    };
    assert_eq!(new as usize, to, "{}", crate::common::memory::last_errno());
    from.at(to)
}

/// Catches a driver that gives `migrate_vma_setup` room for the range and no more: when it splits a huge page and the page
/// table is freed under it, it reports the range once more, behind what it has reported. On the driver without that room the
/// slab's red zones are overwritten.
#[test]
fn page_tables_that_are_freed_under_a_migration_overwrite_nothing() {
    let all = rounds(60);
    let (driver, device) = Driver::load_with("", GPUS[0]);
    let room = Area::new(40 * HUGE);
    let (target, round, done) = (
        AtomicUsize::new(0),
        AtomicUsize::new(0),
        AtomicUsize::new(0),
    );
    let delay = AtomicUsize::new(0);
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut last = 0;
            while !stop.load(Ordering::Acquire) {
                let now = round.load(Ordering::Acquire);
                if now == last {
                    std::hint::spin_loop();
                    continue;
                }
                last = now;
                for _ in 0..delay.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
                let span = Span::new(target.load(Ordering::Relaxed), HUGE);
                span.advise(libc::MADV_DONTNEED).unwrap();
                done.store(now, Ordering::Release);
            }
        });
        let mut random = Random::new(17);
        // The longest delay, in turns of an empty loop: kept at what makes the two meet.
        let mut longest = 400_000usize;
        for now in 1..=all {
            // Four huge pages, moved by half a huge page, so that each page table holds the halves of two.
            let huge = room.part(0, 4 * HUGE);
            huge.map_over(
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
            );
            huge.advise(libc::MADV_HUGEPAGE).unwrap();
            for i in 0..4 {
                huge.part(i * HUGE, 1).fill(1);
            }
            let moved = remap(huge, room.addr + (20 * HUGE + HUGE / 2) * PAGE);
            let aligned = Span::new(moved.addr.next_multiple_of(HUGE * PAGE), HUGE);
            target.store(aligned.addr, Ordering::Relaxed);
            delay.store(random.below(longest), Ordering::Relaxed);
            round.store(now, Ordering::Release);
            try_move(&device, aligned, Target::Device);
            let met = done.load(Ordering::Acquire) == now;
            while done.load(Ordering::Acquire) != now {
                std::hint::spin_loop();
            }
            longest = if met {
                longest + longest / 16
            } else {
                longest - longest / 16
            }
            .clamp(100, 1_000_000);
            // Free again, and a mapping for the next round.
            moved.map_over(libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1);
        }
        stop.store(true, Ordering::Release);
    });
    drop(room);
    assert_empty(&device);
    drop(device);
    driver.finish();
}

/// Catches a driver that lets pages of KSM move: ksmd compares new candidates with them, and would read device memory as if
/// it were memory (an oops).
#[test]
fn merged_pages_stay_in_system_memory() {
    const PAGES: usize = 64;
    const KSM: &str = "/sys/kernel/mm/ksm";

    let ksm = |file: &str, text: &str| fs::write(format!("{KSM}/{file}"), text).unwrap();
    let count = |file: &str| -> u64 {
        let text = fs::read_to_string(format!("{KSM}/{file}")).unwrap();
        text.trim().parse().unwrap()
    };
    let mergeable = || {
        let area = Area::new(PAGES);
        for i in 0..PAGES {
            // Each page like every fourth other.
            Span::new(area.addr + i * PAGE, 1).fill(100 + i as u64 % 4);
        }
        area.advise(libc::MADV_MERGEABLE).unwrap();
        area
    };
    let check = |area: &Area| {
        for i in 0..PAGES {
            Span::new(area.addr + i * PAGE, 1).check(100 + i as u64 % 4);
        }
    };
    let (driver, device) = Driver::load_with("", GPUS[0]);
    ksm("pages_to_scan", "20000");
    ksm("sleep_millisecs", "10");
    ksm("run", "1");
    let first = mergeable();
    eventually("all pages are merged", || {
        count("pages_sharing") >= PAGES as u64 - 4
    });
    let moved = device
        .prefetch_range(first.addr, first.bytes(), Target::Device)
        .unwrap();
    assert_eq!(moved, crate::common::moved(0, 0, PAGES, 0));
    assert_eq!(places(&device, *first).counts().system, PAGES);
    // More of the same: ksmd compares them with those that were to move.
    let second = mergeable();
    eventually("the second ones are merged too", || {
        count("pages_sharing") >= 2 * PAGES as u64 - 4
    });
    check(&first);
    check(&second);
    ksm("run", "2");
    // No longer merged, they may move.
    let moved = device
        .prefetch_range(first.addr, first.bytes(), Target::Device)
        .unwrap();
    assert_eq!(moved, crate::common::moved(PAGES, 0, 0, 0));
    check(&first);
    ksm("run", "0");
    drop((first, second));
    assert_empty(&device);
    drop(device);
    driver.finish();
}

/// Catches a driver that collects a page while ksmd merges it: ksmd tells the reverse map late where the page is, the migration entry in
/// its place is never taken away, and who touches it waits for ever.
///
/// Each round is a chance: that the two meet at the page that ksmd has in its hands. It has it for longer when that is traced, with the stack.
#[test]
fn what_ksmd_merges_meanwhile_can_be_touched() {
    const KSM: &str = "/sys/kernel/mm/ksm";
    const TRACE: &str = "/sys/kernel/tracing/events/ksm/ksm_merge_with_ksm_page/trigger";
    const PAGES: usize = 96;
    const ALIKE: usize = 8;

    let ksm = |file: &str, text: &str| fs::write(format!("{KSM}/{file}"), text).unwrap();
    let driver = Driver::load("soft=1 soft_mib=8");
    let device = Device::open(0).unwrap();
    let area = Area::new(PAGES);
    area.advise(libc::MADV_NOHUGEPAGE).unwrap();
    let alike = |i: usize| Span::new(area.page(i).addr, 1);
    let seed = |i: usize| 100 + (i % ALIKE) as u64;
    (0..PAGES).for_each(|i| alike(i).fill(seed(i)));
    area.advise(libc::MADV_MERGEABLE).unwrap();
    let entries = |pages: usize| kernel::pagemap(std::process::id(), area.addr, pages);
    kernel::mount_tracing();
    fs::write(TRACE, "stacktrace").unwrap();
    for (file, text) in [
        ("pages_to_scan", "20000"),
        ("sleep_millisecs", "0"),
        ("smart_scan", "0"),
        ("run", "1"),
    ] {
        ksm(file, text);
    }
    let (mut moved, mut skipped) = (0, 0);
    for _ in 0..rounds(30) {
        // All of them are merged or in VRAM, and written to they are neither.
        for i in 0..PAGES {
            let word = area.page(i).addr as *mut u64;
            // SAFETY: the page is the test's own.
            let same = unsafe { word.read_volatile() };
            // SAFETY: the same.
            unsafe { word.write_volatile(same) };
        }
        let begin = Instant::now();
        let is_at_work = || {
            let first = entries(2 * ALIKE);
            first[..ALIKE] == first[ALIKE..]
        };
        while !is_at_work() {
            let late = begin.elapsed() > patience(Duration::from_secs(20));
            assert!(!late, "ksmd does not merge");
        }
        let answer = device.prefetch_range(area.addr, area.bytes(), Target::Device);
        let answer = answer.unwrap();
        (moved, skipped) = (moved + answer.moved, skipped + answer.skipped);
        eventually("no page is on its way", || {
            !entries(PAGES).contains(&Entry::Migrating)
        });
    }
    println!("{moved} bytes moved, {skipped} skipped");
    assert!(moved > 0 && skipped > 0, "the two have never met");
    (0..PAGES).for_each(|i| alike(i).check(seed(i)));
    for (file, text) in [
        ("run", "2"),
        ("run", "0"),
        ("smart_scan", "1"),
        ("sleep_millisecs", "20"),
    ] {
        ksm(file, text);
    }
    fs::write(TRACE, "!stacktrace").unwrap();
    (0..PAGES).for_each(|i| alike(i).check(seed(i)));
    drop(area);
    assert_empty(&device);
    drop(device);
    driver.finish();
}

/// Catches a folio that is moved a second time: a migration unlocks what it has moved before it gives up its reference, and an eviction
/// may be there just then. Each of several threads makes room for its memory by evicting that of the others, and touches some.
///
/// Nothing is freed but what has moved, so what arrived in VRAM is there or has left it, once.
#[test]
fn what_has_been_moved_is_not_moved_again() {
    const THREADS: usize = 3;
    const PAGES: usize = HUGE / 2 + HUGE / 4;

    let driver = Driver::load("soft=1 soft_mib=4");
    let device = Device::open(0).unwrap();
    let areas: Vec<Area> = (0..THREADS)
        .map(|i| {
            let area = Area::new(PAGES);
            area.advise(libc::MADV_NOHUGEPAGE).unwrap();
            area.fill(i as u64);
            area
        })
        .collect();
    thread::scope(|scope| {
        for (i, area) in areas.iter().enumerate() {
            let device = &device;
            scope.spawn(move || {
                let mut random = Random::new(i as u64);
                for _ in 0..rounds(1000) {
                    let first = random.below(PAGES - 1);
                    let span = area.part(first, 1 + random.below(PAGES - first));
                    try_move(device, span, Target::Device);
                    area.page(random.below(PAGES)).touch();
                }
                area.check(i as u64);
            });
        }
    });
    let now = counters(&device);
    let left = now.to_system_pages + now.fault_back_pages + now.pressure_pages + now.evicted_pages;
    assert!(now.pressure_pages > 0, "{now:#?}");
    let there = now.live_pages - now.table_pages;
    assert_eq!(now.to_device_pages, left + there, "{now:#?}");
    areas
        .iter()
        .enumerate()
        .for_each(|(i, area)| area.check(i as u64));
    drop(areas);
    assert_empty(&device);
    drop(device);
    driver.finish();
}

/// Catches a page that is lost, or given to two, when everything is done to it at once: two threads that move it there and back
/// through two files, one that writes and reads it, one that discards a part, and one that forks.
#[test]
fn everything_at_once_loses_nothing() {
    const PAGES: usize = 3 * HUGE / 2;

    let all = rounds(12) as u64;
    let (mut driver, device) = Driver::load_with("", GPUS[0]);
    let other = driver.bind(GPUS[1]);
    let area = Area::filled(PAGES, 0);
    // The last pages are discarded and read as zeroes or as what was written last; all others must keep their pattern.
    let (kept, discarded) = (area.part(0, PAGES - 64), area.part(PAGES - 64, 64));
    let stop = AtomicBool::new(false);
    let running = || !stop.load(Ordering::Relaxed);
    let mover = |device: &Device, seed| {
        let mut random = Random::new(seed);
        while running() {
            let first = random.below(PAGES - 1);
            let span = area.part(first, 1 + random.below(PAGES - first));
            let target = [Target::Device, Target::System][random.below(2)];
            try_move(device, span, target);
        }
    };
    thread::scope(|scope| {
        scope.spawn(|| mover(&device, 1));
        scope.spawn(|| mover(&other, 2));
        scope.spawn(|| {
            while running() {
                discarded.advise(libc::MADV_DONTNEED).unwrap();
                discarded.touch();
            }
        });
        scope.spawn(|| {
            while running() {
                // A child that only copies the page tables, so that pages are shared and copied on write.
                // SAFETY: the child does nothing but end.
                match unsafe { libc::fork() } {
                    // SAFETY: it ends the child.
                    0 => unsafe { libc::_exit(0) },
                    child => {
                        assert!(child > 0, "{}", crate::common::memory::last_errno());
                        // SAFETY: it waits for the child just made.
                        let ended = unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) };
                        assert_eq!(ended, child);
                    }
                }
            }
        });
        for round in 0..all {
            kept.check(round);
            kept.fill(round + 1);
        }
        kept.check(all);
        stop.store(true, Ordering::Relaxed);
    });
    kept.check(all);
    drop(area);
    assert_empty(&device);
    assert_empty(&other);
    drop((device, other));
    driver.finish();
}
