//! Large folios: 2 MiB move to the device and back as one, and whatever is done to a part of them, every byte is as it was written.
//!
//! Runs in the virtual GPU host, with red zones around the kernel's slab objects: `bench/test guest_large`.

use std::fs;
use std::ops::Range;

use crate::common::child::Child;
use crate::common::driver::{on_each_kind, Driver, GPUS, IN_SLOT};
use crate::common::huge::{self, assert_huge, assert_large, assert_small, Parts, MADV_COLLAPSE};
use crate::common::kernel;
use crate::common::memory::{Area, Span, HUGE, PAGE};
use crate::common::mirror::{
    both_check, device_check, device_check_by, device_check_zero, device_fill, device_fill_by,
    mirrored, read, snapshot, write, MAP, MIGRATE,
};
use crate::common::turmoil::turmoil;
use crate::common::{assert_place, is_checking, moved, places, refused, to_device, to_system};
use hmm_gpu::{Counters, Device, Errno, Place, Target};

const RW: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;

/// Catches huge pages that go or come back in pieces, bytes that are in another place of the 2 MiB, and a wrong count.
#[test]
fn huge_pages_move_whole_both_ways() {
    on_each_kind(|device| {
        for collapsed in [false, true] {
            let area = if collapsed {
                let area = Area::filled(3 * HUGE, 1);
                area.advise(libc::MADV_HUGEPAGE).unwrap();
                area.advise(MADV_COLLAPSE).unwrap();
                assert_huge(&area);
                area
            } else {
                huge::filled(3, 1)
            };
            for _ in 0..2 {
                let before = device.counters().unwrap();
                huge::to_device(device, *area);
                let again = device.prefetch_range(area.addr, area.bytes(), Target::Device);
                assert_eq!(again.unwrap(), moved(0, 3 * HUGE, 0, 0));
                assert_eq!(to_system(device, *area), moved(3 * HUGE, 0, 0, 0));
                assert_huge(&area);
                let work = device.counters().unwrap() - before;
                assert_eq!((work.large_to_device, work.large_to_system), (3, 3));
                assert_eq!(work.large_failures, 0);
                assert_eq!(work.to_device_pages, 3 * HUGE as u64);
                assert_eq!(work.to_system_pages, 3 * HUGE as u64);
                assert_eq!((work.cpu_faults, work.populated_pages), (0, 0));
            }
            area.check(1);
        }
    });
}

/// Catches a touch that brings one page of 2 MiB home, or other 2 MiB, or a page that its writer finds as it was before.
#[test]
fn a_touch_brings_a_huge_page_home_whole() {
    on_each_kind(|device| {
        let area = huge::resident(device, 4, 11);
        for (i, page) in [0, HUGE - 1, 77, 300].into_iter().enumerate() {
            let touched = area.part(i * HUGE, HUGE);
            let before = device.counters().unwrap();
            if i % 2 == 0 {
                touched.page(page).check(11);
            } else {
                touched.page(page).fill(12);
            }
            let work = device.counters().unwrap() - before;
            assert_eq!((work.cpu_faults, work.cpu_fault_retries), (1, 0));
            assert_eq!(work.fault_back_pages, HUGE as u64);
            assert_eq!((work.large_to_system, work.large_failures), (1, 0));
            assert_place(device, touched, Place::System);
            (i + 1..4).for_each(|i| assert_large(device, area.part(i * HUGE, HUGE)));
            touched.part(0, page).check(11);
            touched.page(page).check(11 + i as u64 % 2);
            touched.part(page + 1, HUGE - 1 - page).check(11);
        }
        assert_huge(&area);
    });
}

/// Catches untouched memory, and the huge page of zeroes, that are populated in another size than the process wants, with something
/// else than zeroes, or although nobody may access them.
#[test]
fn what_was_never_written_is_populated_whole() {
    on_each_kind(|device| {
        let populate = |area: &Area, large: u64| {
            let before = device.counters().unwrap();
            assert_eq!(to_device(device, **area), moved(area.pages, 0, 0, 0));
            let work = device.counters().unwrap() - before;
            assert_eq!((work.large_to_device, work.large_failures), (large, 0));
            assert_eq!(work.populated_pages, area.pages as u64);
            match large {
                0 => assert_small(device, **area),
                _ => assert_large(device, **area),
            }
        };
        for (what, advice, touch, large) in [
            ("untouched", libc::MADV_HUGEPAGE, false, 2),
            ("zeroes", libc::MADV_HUGEPAGE, true, 2),
            ("untouched, in small pages", libc::MADV_NOHUGEPAGE, false, 0),
            ("zeroes, in small pages", libc::MADV_NOHUGEPAGE, true, 0),
        ] {
            println!("{what}");
            let area = Area::new(2 * HUGE);
            area.advise(advice).unwrap();
            if touch {
                area.touch();
                let zero = snapshot(device, *area)[HUGE + 3];
                assert_eq!(zero.order() == 9, large > 0, "{zero:?}");
                assert!(!zero.is_writable());
            }
            populate(&area, large);
            for i in 0..2 {
                device_check_zero(device, area.part(i * HUGE, HUGE));
            }
            device_fill(device, area.part(HUGE - 1, 2), 1);
            area.part(HUGE - 1, 2).check(1);
            area.part(0, HUGE - 1).check_zero();
            area.part(HUGE + 1, HUGE - 1).check_zero();
        }

        // A hole between huge pages; what was there was discarded.
        let area = huge::filled(3, 2);
        let hole = area.part(HUGE, HUGE);
        hole.advise(libc::MADV_DONTNEED).unwrap();
        assert_eq!(to_device(device, *area), moved(3 * HUGE, 0, 0, 0));
        assert_large(device, *area);
        device_check_zero(device, hole);
        hole.check_zero();
        area.part(0, HUGE).check(2);
        area.part(2 * HUGE, HUGE).check(2);

        // What may only be read is populated; what nobody may access is not.
        let area = Area::new(HUGE);
        area.advise(libc::MADV_HUGEPAGE).unwrap();
        area.protect(libc::PROT_READ);
        populate(&area, 1);
        assert_eq!(places(device, *area).counts().writable, 0);
        write(device, area.addr, &[1], MAP).stopped(Errno::ACCESS, 0, area.addr);
        area.check_zero();
        area.protect(RW);
        area.fill(3);
        area.check(3);
        let closed = Area::new(HUGE);
        closed.advise(libc::MADV_HUGEPAGE).unwrap();
        closed.protect(libc::PROT_NONE);
        let asked = device.prefetch_range(closed.addr, closed.bytes(), Target::Device);
        assert_eq!(asked.unwrap(), moved(0, 0, HUGE, 0));
        assert_place(device, *closed, Place::None);

        // Not wholly in the range: in pieces.
        let area = Area::new(2 * HUGE);
        area.advise(libc::MADV_HUGEPAGE).unwrap();
        let middle = area.part(HUGE / 2, HUGE);
        to_device(device, middle);
        assert_small(device, middle);
        assert_place(device, area.part(0, HUGE / 2), Place::None);
        area.check_zero();
    });
}

/// Catches a huge page that comes back with other rights than it went with, or goes whole where its process wants small ones.
#[test]
fn rights_and_advice_stay_with_huge_pages() {
    on_each_kind(|device| {
        let area = huge::filled(2, 21);
        area.protect(libc::PROT_READ);
        huge::to_device(device, *area);
        assert_eq!(places(device, *area).counts().writable, 0);
        for back in [false, true] {
            if back {
                to_system(device, area.part(0, HUGE));
            }
            for page in [area.page(5), area.page(HUGE + 5)] {
                let child = Child::fork(|_| page.fill(0));
                child.finish_killed(libc::SIGSEGV);
            }
        }
        area.check(21);
        area.protect(libc::PROT_NONE);
        area.protect(RW);
        area.part(100, HUGE).fill(22);
        area.part(100, HUGE).check(22);
        area.part(0, 100).check(21);

        // No access and back, and the page never leaves.
        let area = huge::resident(device, 1, 23);
        area.protect(libc::PROT_NONE);
        area.protect(RW);
        assert_large(device, *area);
        // What is large there comes back as it is; after that it goes in small pages.
        area.advise(libc::MADV_NOHUGEPAGE).unwrap();
        let before = device.counters().unwrap();
        to_system(device, *area);
        to_device(device, *area);
        let work = device.counters().unwrap() - before;
        assert_eq!((work.large_to_system, work.large_to_device), (1, 0));
        assert_small(device, *area);
        both_check(device, *area, 23);
    });
}

/// Catches bytes that are lost, or found where they must not be, when a part of a large folio in VRAM is unmapped, discarded, moved
/// to other addresses or protected; and VRAM that is never given back.
#[test]
fn what_is_done_to_a_part_leaves_the_rest() {
    on_each_kind(|device| {
        Parts::each(device, 1, |parts| {
            parts.device_check(device);
            parts.check();
        });

        // The device finds no more than the CPU.
        let area = huge::resident(device, 2, 4);
        device_check(device, *area, 4);
        let page = area.page(HUGE + 9);
        page.protect(libc::PROT_READ);
        write(device, page.addr, &[0; 9], MAP).stopped(Errno::ACCESS, 0, page.addr);
        device_check(device, *area, 4);
        page.protect(libc::PROT_NONE);
        read(device, page.addr, &mut [0; 9], MIGRATE).stopped(Errno::ACCESS, 0, page.addr);
        page.unmap();
        page.map_over(libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1);
        assert_eq!(mirrored(device, page), 0);
        device_fill(device, area.part(0, HUGE + 9), 5);
        both_check(device, area.part(0, HUGE + 9), 5);
        both_check(device, area.part(HUGE + 10, HUGE - 10), 4);
    });
}

/// Catches a request for a part of a large folio that moves more, less, or loses the rest.
#[test]
fn parts_of_large_folios_come_home() {
    on_each_kind(|device| {
        for (first, pages) in [(0, 1), (HUGE - 1, 2), (100, HUGE), (HUGE, HUGE), (7, 3)] {
            let area = huge::resident(device, 2, 31);
            device_check(device, area.part(HUGE - 50, 100), 31);
            let part = area.part(first, pages);
            assert_eq!(to_system(device, part), moved(pages, 0, 0, 0));
            let end = first + pages;
            let rest = [area.part(0, first), area.part(end, area.pages - end)];
            for rest in rest.into_iter().filter(|rest| rest.pages > 0) {
                assert_place(device, rest, Place::Device);
                device_check(device, rest, 31);
            }
            part.fill(32);
            device_check(device, part, 32);
            to_device(device, *area);
            device_check(device, part, 32);
            part.check(32);
            rest.into_iter().for_each(|rest| rest.check(31));
        }
    });
}

/// Catches large folios of which a part is left that an unbind loses or waits for.
#[test]
fn an_unbind_brings_large_folios_home_in_whatever_state() {
    for (parameters, gpu) in [("", GPUS[0]), ("add_resource=1", GPUS[2])] {
        let (mut driver, device) = Driver::load_with(parameters, gpu);
        let mut parts = Parts::all(&device, 1);
        let whole = huge::resident(&device, 4, 2);
        let mut heir = Child::fork(|test| {
            test.receive();
            whole.check(2);
            parts.check();
        });
        driver.unbind(gpu);
        assert_huge(&whole);
        parts.fill(3);
        whole.fill(4);
        whole.check(4);
        heir.send(0);
        heir.finish();
        drop((parts, whole, device));
        driver.finish();
    }
}

/// Which pages of a huge page are written after a fork, by the child and by the parent, and whether by their devices.
const WRITES: [(Range<usize>, [bool; 2], bool); 7] = [
    (9..209, [true, false], false),
    (30..70, [true, false], true),
    (100..110, [true, true], false),
    (0..50, [true, true], true),
    (9..209, [false, true], false),
    (30..70, [false, true], true),
    (0..0, [false, false], false),
];

/// One side's writes to huge pages that are shared.
fn write_own(device: &Device, area: Span, side: usize, seed: u64) {
    for (i, (pages, sides, by_device)) in WRITES.into_iter().enumerate() {
        let part = area.part(i * HUGE + pages.start, pages.len());
        if sides[side] && by_device {
            device_fill_by(device, part, seed, [MIGRATE, MAP][side]);
        } else if sides[side] {
            part.fill(seed);
        }
    }
}

/// Asserts that one side finds what was there before, and its own writes.
#[track_caller]
fn check_own(device: &Device, area: Span, side: usize, before: u64, seed: u64) {
    for (i, (pages, sides, _)) in WRITES.into_iter().enumerate() {
        let huge = area.part(i * HUGE, HUGE);
        let written = if sides[side] { pages } else { 0..0 };
        for (pages, seed) in [
            (0..written.start, before),
            (written.clone(), seed),
            (written.end..HUGE, before),
        ] {
            if !pages.is_empty() {
                both_check(device, huge.part(pages.start, pages.len()), seed);
            }
        }
    }
}

/// Catches a write that is seen on the other side of a fork, or lost on its own, when the sides share large folios in VRAM.
#[test]
fn after_a_fork_each_side_has_its_own_writes() {
    on_each_kind(|device| {
        let path = device.path();
        for child_first in [true, false] {
            let area = huge::resident(device, WRITES.len(), 1);
            let mut child = Child::fork(|parent| {
                let own = Device::open_path(path).unwrap();
                device_check_by(&own, area.part(3 * HUGE, HUGE), 1, MAP);
                parent.send(0);
                parent.receive();
                device_check(&own, *area, 1);
                write_own(&own, *area, 0, 2);
                parent.send(0);
                parent.receive();
                check_own(&own, *area, 0, 1, 2);
            });
            child.receive();
            // The very same folios, which nobody may write.
            assert_large(device, *area);
            assert_eq!(places(device, *area).counts().writable, 0);
            if child_first {
                child.step();
            }
            device_check(device, *area, 1);
            write_own(device, *area, 1, 3);
            if !child_first {
                child.step();
            }
            check_own(device, *area, 1, 1, 3);
            child.send(0);
            child.finish();
            check_own(device, *area, 1, 1, 3);
            // Alone again, and writable.
            area.fill(4);
            area.check(4);
        }
    });
}

/// Catches large folios that come home for one side of a fork only, or that die with one side.
#[test]
fn shared_large_folios_come_home_for_both_sides() {
    on_each_kind(|device| {
        let path = device.path();
        let area = huge::resident(device, 3, 1);
        // By request, whole; the child has its bytes, and then its own.
        let mut child = Child::fork(|parent| {
            parent.receive();
            area.check(1);
            area.part(0, 10).fill(2);
            parent.send(0);
            parent.receive();
            area.part(0, 10).check(2);
            area.part(10, 3 * HUGE - 10).check(1);
        });
        let before = device.counters().unwrap();
        assert_eq!(to_system(device, *area), moved(3 * HUGE, 0, 0, 0));
        let work = device.counters().unwrap() - before;
        assert_eq!((work.large_to_system, work.cpu_faults), (3, 0));
        child.step();
        area.check(1);
        area.fill(3);
        child.send(0);
        child.finish();
        area.check(3);

        // By a touch of the child, while the parent has them too.
        let area = huge::resident(device, 2, 5);
        Child::fork(|_| {
            area.page(HUGE + 44).check(5);
            area.page(33).fill(6);
            area.part(34, 2 * HUGE - 34).check(5);
        })
        .finish();
        area.check(5);

        // A child that ends, and one that is killed, with large folios of their own and of the parent's.
        let area = huge::resident(device, 2, 7);
        for killed in [false, true] {
            let mut child = Child::fork(|test| {
                let own = Device::open_path(path).unwrap();
                let theirs = huge::resident(&own, 3, 8);
                theirs.part(HUGE - 100, 200).unmap();
                test.send(0);
                test.receive();
                std::mem::forget((own, theirs));
            });
            child.receive();
            if killed {
                child.kill();
            } else {
                child.send(0);
                child.finish();
            }
        }
        assert_large(device, *area);
        area.fill(9);
        area.check(9);
    });
}

/// Catches a shared large folio that an unbind loses for one side.
#[test]
fn an_unbind_after_a_fork_brings_large_folios_home_for_both_sides() {
    let (mut driver, device) = Driver::load_with("", GPUS[0]);
    let area = huge::resident(&device, 4, 1);
    let mut child = Child::fork(|test| {
        // It writes to its own of the first, and of a part of the second by way of a hole.
        area.part(5, 6).fill(2);
        area.part(HUGE + 100, 50).unmap();
        test.send(0);
        test.receive();
        area.part(0, 5).check(1);
        area.part(5, 6).check(2);
        area.part(11, HUGE + 100 - 11).check(1);
        area.part(HUGE + 150, 3 * HUGE - 150).check(1);
        area.part(2 * HUGE, 2 * HUGE).fill(3);
    });
    child.receive();
    area.part(3 * HUGE, 20).fill(4);
    driver.unbind(GPUS[0]);
    area.part(0, 3 * HUGE).check(1);
    child.send(0);
    child.finish();
    area.part(0, 3 * HUGE).check(1);
    area.part(3 * HUGE, 20).check(4);
    area.part(3 * HUGE + 20, HUGE - 20).check(1);
    drop((area, device));
    driver.finish();
}

/// A device with little VRAM: a soft one with so many MiB, or a PCI one that has 64.
fn small_device(soft_mib: Option<u32>) -> (Driver, Device) {
    match soft_mib {
        Some(mib) => {
            let driver = Driver::load(&format!("soft=1 soft_mib={mib}"));
            (driver, Device::open(0).unwrap())
        }
        None => Driver::load_with("", IN_SLOT),
    }
}

/// Catches a huge page that does not go because there are no 2 MiB of VRAM in one piece, or goes with other bytes.
#[test]
fn without_large_folios_in_vram_pages_go_one_by_one() {
    // To fill 64 MiB page by page takes long where all is checked.
    let kinds = if is_checking() { 1 } else { 2 };
    for soft_mib in [Some(8), None].into_iter().take(kinds) {
        let (driver, device) = small_device(soft_mib);
        let room = device.describe().unwrap().vram_free_bytes as usize / PAGE;
        let all = Area::filled(room, 1);
        to_device(&device, *all);
        // Of each 2 MiB one page stays.
        let mut kept = vec![];
        for (i, seen) in snapshot(&device, *all).into_iter().enumerate() {
            if seen.vram_page().unwrap() % HUGE == 100 {
                kept.push(all.page(i));
            } else {
                all.page(i).advise(libc::MADV_DONTNEED).unwrap();
            }
        }
        assert_eq!(kept.len(), room / HUGE);
        let before = device.counters().unwrap();
        let area = huge::filled(2, 2);
        let untouched = Area::new(HUGE);
        untouched.advise(libc::MADV_HUGEPAGE).unwrap();
        assert_eq!(to_device(&device, *area), moved(2 * HUGE, 0, 0, 0));
        assert_eq!(to_device(&device, *untouched), moved(HUGE, 0, 0, 0));
        let work = device.counters().unwrap() - before;
        assert_eq!((work.large_to_device, work.large_failures), (0, 3));
        assert_eq!((work.vram_failures, work.skipped_pages), (0, 0));
        assert_small(&device, *area);
        assert_small(&device, *untouched);
        device_check(&device, *area, 2);
        device_check_zero(&device, *untouched);
        to_system(&device, area.part(9, 600));
        area.check(2);
        untouched.check_zero();
        for page in &kept {
            device_check(&device, *page, 1);
            page.check(1);
        }
        // With 2 MiB in one piece again, they go whole.
        drop((all, untouched));
        huge::to_device(&device, *huge::filled(2, 3));
        drop((area, device));
        driver.finish();
    }
}

/// Catches a huge page for which there is not enough VRAM that is lost halfway, or an answer that does not say how far it came.
#[test]
fn with_less_vram_than_a_huge_page_some_of_its_pages_go() {
    let (driver, device) = small_device(Some(4));
    let area = huge::filled(3, 2);
    // The last pages of one, and two more: of the last there is no room for as many.
    let part = area.part(HUGE - 200, 2 * HUGE + 200);
    let result = device.prefetch_range(part.addr, part.bytes(), Target::Device);
    let error = result.unwrap_err();
    let there = 2 * HUGE;
    assert_eq!(error.moved(), Some(moved(there, 0, 0, 0)), "{error}");
    assert_eq!(refused::<()>(Err(error)), Errno::NOSPC);
    assert_small(&device, part.part(0, 200));
    assert_large(&device, part.part(200, HUGE));
    assert_small(&device, part.part(200 + HUGE, HUGE - 200));
    assert_place(&device, part.part(there, 200), Place::System);
    let counters = device.counters().unwrap();
    assert_eq!((counters.large_to_device, counters.large_failures), (1, 1));
    assert_eq!(counters.vram_failures, 1);
    assert_eq!(device.describe().unwrap().vram_free_bytes, 0);
    area.check(2);
    drop((area, device));
    driver.finish();
}

/// Catches entries of the device page table that are for another place than a page of a large folio has now, and accesses that end
/// or go astray where 2 MiB do.
#[test]
fn the_device_finds_large_folios_as_they_come_and_go() {
    on_each_kind(|device| {
        let area = huge::filled(3, 1);
        let border = |i: usize| area.part(i * HUGE - 3, 6);
        // From where they were before, whole, to VRAM and back.
        device_check(device, *area, 1);
        assert_eq!(mirrored(device, *area), area.pages);
        huge::to_device(device, *area);
        device_fill(device, border(1), 2);
        device_check(device, area.part(0, HUGE - 3), 1);
        device_check(device, border(1), 2);
        device_check(device, area.part(HUGE + 3, 2 * HUGE - 3), 1);
        assert_eq!(mirrored(device, *area), area.pages);
        assert_large(device, *area);
        // The middle one comes home by a touch, the others are as they were.
        area.part(HUGE + 9, 2).fill(1);
        snapshot(device, *area);
        device_fill(device, border(2), 3);
        both_check(device, border(2), 3);
        device_fill(device, *area, 4);
        // Split, by a page that leaves.
        to_system(device, *area);
        huge::to_device(device, *area);
        device_check(device, *area, 4);
        for page in [0, HUGE - 1, HUGE, 2 * HUGE + 5] {
            to_system(device, area.page(page));
            snapshot(device, *area);
            device_check(device, *area, 4);
            device_fill(device, area.page(page), 5);
            both_check(device, area.page(page), 5);
            device_fill_by(device, area.page(page), 4, MIGRATE);
        }
        // By the device's faults: what was never touched, and what is in system memory.
        let untouched = Area::new(2 * HUGE);
        untouched.advise(libc::MADV_HUGEPAGE).unwrap();
        device_fill_by(device, untouched.part(HUGE - 30, 60), 6, MIGRATE);
        both_check(device, untouched.part(HUGE - 30, 60), 6);
        untouched.part(0, HUGE - 30).check_zero();
        untouched.part(HUGE + 30, HUGE - 30).check_zero();
        device_fill_by(device, *untouched, 7, MIGRATE);
        both_check(device, *area, 4);
        both_check(device, *untouched, 7);
    });
}

/// Catches a look at an address space, or advice, that stumbles over a large folio in VRAM, moves it, or loses a byte of it.
#[test]
fn looks_and_advice_meet_large_folios() {
    on_each_kind(|device| {
        let area = huge::resident(device, 2, 1);
        for file in ["smaps", "smaps_rollup", "numa_maps", "pagemap", "statm"] {
            match file {
                "pagemap" => drop(kernel::pagemap(std::process::id(), area.addr, area.pages)),
                _ => drop(fs::read_to_string(format!("/proc/self/{file}")).unwrap()),
            }
        }
        let mut present = vec![0_u8; area.pages];
        // SAFETY: there is a byte for each page.
        let result =
            unsafe { libc::mincore(area.addr as *mut _, area.bytes(), present.as_mut_ptr()) };
        assert_eq!(result, 0);
        for what in ["1", "4"] {
            fs::write("/proc/self/clear_refs", what).unwrap();
        }
        assert_large(device, *area);
        for (what, advice) in [
            ("cold", libc::MADV_COLD),
            ("page out", libc::MADV_PAGEOUT),
            ("will need", libc::MADV_WILLNEED),
            ("no huge pages", libc::MADV_NOHUGEPAGE),
            ("huge pages", libc::MADV_HUGEPAGE),
            ("not to be merged", libc::MADV_UNMERGEABLE),
            ("populate for reading", libc::MADV_POPULATE_READ),
            ("populate for writing", libc::MADV_POPULATE_WRITE),
        ] {
            println!("{what}");
            let area = huge::resident(device, 2, 2);
            area.advise(advice).unwrap();
            area.part(HUGE / 2, HUGE).advise(advice).unwrap();
            device_check(device, *area, 2);
            area.check(2);
        }
        // Advice that is not always followed.
        for advice in [MADV_COLLAPSE, libc::MADV_PAGEOUT] {
            let area = huge::resident(device, 2, 3);
            to_system(device, area.part(100, 3));
            println!("{advice}: {:?}", area.advise(advice));
            both_check(device, *area, 3);
        }
        // What may be discarded is there or is not, until it is written.
        let area = huge::resident(device, 1, 4);
        area.advise(libc::MADV_FREE).unwrap();
        area.part(50, 50).fill(5);
        both_check(device, area.part(50, 50), 5);
        // Read and written by another process, through the kernel.
        let area = huge::resident(device, 1, 6);
        let copy = Area::filled(HUGE, 0);
        let piece = |span: Span| libc::iovec {
            iov_base: span.addr as *mut _,
            iov_len: span.bytes(),
        };
        let owner = std::process::id() as libc::pid_t;
        Child::fork(|_| {
            // SAFETY: the copy is as long.
            let bytes =
                unsafe { libc::process_vm_readv(owner, &piece(*copy), 1, &piece(*area), 1, 0) };
            assert_eq!(bytes, area.bytes() as isize);
            copy.check(6);
        })
        .finish();
        area.check(6);
    });
}

/// Catches anything that is lost, or given to two: owners of 2 MiB each make them anew, discard, unmap, protect, remap, fork and
/// check them, while others move and touch the same addresses, through two devices.
#[test]
fn everything_at_once_loses_nothing_of_large_folios() {
    let (mut driver, device) = Driver::load_with("fault_around=64", GPUS[0]);
    let devices = [device, driver.bind(GPUS[1])];
    turmoil(&devices, || ());
    let work = devices.each_ref().map(|device| device.counters().unwrap());
    let large = |work: &Counters| [work.large_to_device, work.large_to_system];
    let [one, other] = work.each_ref().map(large);
    assert!(one[0] + other[0] > 0, "{work:#?}");
    drop(devices);
    driver.finish();
}
