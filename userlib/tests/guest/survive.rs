//! The bytes survive: whatever a process does to its address space while the device has its pages, in VRAM or mapped where they lie,
//! both find what was written last, at every moment.
//!
//! Runs in the virtual GPU host: `bench/test guest_survive`.

use std::time::Duration;

use crate::common::child::Child;
use crate::common::driver::{assert_empty, on_each_kind, Driver, GPUS};
use crate::common::memory::{last_errno, Area, Span, HUGE, PAGE};
use crate::common::mirror::{
    both_check, device_check, device_check_by, device_check_zero, device_fill, device_fill_by,
    mirrored, read, snapshot, write, MAP, MIGRATE,
};
use crate::common::random::Random;
use crate::common::{assert_place, eventually, rounds, to_device};
use hmm_gpu::{Device, Errno, Place, Target};

const RW: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;
const ANONYMOUS: libc::c_int = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;

/// Memory of which the first half is in VRAM, the second in system memory, and all in the device page table, writable.
fn mirrored_area(device: &Device, pages: usize, seed: u64) -> Area {
    let area = Area::filled(pages, seed);
    mirror(device, *area, seed);
    area
}

/// Makes it so, once more.
fn mirror(device: &Device, span: Span, seed: u64) {
    to_device(device, span.part(0, span.pages / 2));
    device_fill(device, span, seed);
    assert_eq!(mirrored(device, span), span.pages);
}

/// Asserts that nothing can be accessed on a page.
#[track_caller]
fn out_of_reach(device: &Device, page: Span, errno: Errno) {
    for policy in [MAP, MIGRATE] {
        read(device, page.addr + 8, &mut [0; 8], policy).stopped(errno, 0, page.addr);
        write(device, page.addr + 8, &[0; 8], policy).stopped(errno, 0, page.addr);
    }
}

/// `mremap` to the addresses of another span.
fn remap(from: Span, to: usize, flags: libc::c_int) -> Span {
    let flags = flags | libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    let (old, new) = (from.addr as *mut libc::c_void, to as *mut libc::c_void);
    // SAFETY: both ranges are the test's own.
    let moved = unsafe { libc::mremap(old, from.bytes(), from.bytes(), flags, new) };
    assert_eq!(moved, new, "{}", last_errno());
    from.at(to)
}

/// Catches entries that stay with the addresses and not with the pages: moved away, back, and away without leaving a hole, a few
/// pages or whole page tables.
#[test]
fn remapped_memory_takes_its_bytes_along() {
    on_each_kind(|device| {
        for pages in [40, 2 * HUGE] {
            let area = mirrored_area(device, pages, 1);
            let room = Area::new(pages);
            let there = remap(*area, room.addr, 0);
            out_of_reach(device, area.page(pages / 3), Errno::FAULT);
            out_of_reach(device, area.page(pages - 1), Errno::FAULT);
            area.map_over(RW, ANONYMOUS, -1);
            assert_eq!(mirrored(device, there), 0, "it was another mapping's");
            device_check_zero(device, area.part(0, 9));
            device_check(device, there, 1);
            assert_place(device, there.part(0, pages / 2), Place::Device);
            device_fill(device, there, 2);
            // Nothing of that was written to the old addresses.
            area.check_zero();
            there.part(0, 9).check(2);
            // And back.
            let back = remap(there, area.addr, 0);
            out_of_reach(device, there.page(5), Errno::FAULT);
            there.map_over(RW, ANONYMOUS, -1);
            both_check(device, back, 2);

            mirror(device, back, 3);
            let there = remap(back, room.addr, libc::MREMAP_DONTUNMAP);
            device_check_zero(device, back);
            device_check(device, there, 3);
            device_fill(device, back.part(0, 9), 4);
            both_check(device, there, 3);
            both_check(device, back.part(0, 9), 4);
            back.part(9, pages - 9).check_zero();
        }
    });
}

/// Catches pages that can be reached after they were unmapped, or cannot be although they were not, and new memory with old bytes.
#[test]
fn unmapped_memory_is_gone_and_the_rest_is_there() {
    on_each_kind(|device| {
        let area = mirrored_area(device, 60, 1);
        for (middle, seed) in [(area.part(10, 7), 1), (area.part(28, 4), 2)] {
            device_fill(device, *area, seed);
            middle.unmap();
            out_of_reach(device, middle.page(0), Errno::FAULT);
            out_of_reach(device, middle.page(middle.pages - 1), Errno::FAULT);
            let first = (middle.addr - area.addr) / PAGE;
            let rest = first + middle.pages;
            device_check(device, area.part(0, first), seed);
            device_check(device, area.part(rest, 60 - rest), seed);
            let mut bytes = vec![0; area.bytes()];
            read(device, area.addr, &mut bytes, MAP).stopped(
                Errno::FAULT,
                first * PAGE,
                middle.addr,
            );
            middle.map_over(RW, ANONYMOUS, -1);
            device_check_zero(device, middle);
            both_check(device, area.part(0, first), seed);
            both_check(device, area.part(rest, 60 - rest), seed);
            middle.check_zero();
            device_fill(device, *area, seed);
        }
        // A part of a huge page.
        let huge = Area::new(HUGE);
        huge.advise(libc::MADV_HUGEPAGE).unwrap();
        device_fill(device, *huge, 5);
        assert_eq!(snapshot(device, *huge)[9].order(), 9);
        huge.part(100, 3).advise(libc::MADV_DONTNEED).unwrap();
        device_check_zero(device, huge.part(100, 3));
        huge.part(200, 1).unmap();
        out_of_reach(device, huge.page(200), Errno::FAULT);
        huge.page(200).map_over(RW, ANONYMOUS, -1);
        for part in [huge.part(0, 100), huge.part(103, 97), huge.part(201, 311)] {
            device_fill(device, part.part(0, 50), 6);
            device_check(device, part.part(50, part.pages - 50), 5);
            both_check(device, part.part(0, 50), 6);
        }
    });
}

/// Catches an entry that allows more than the mapping does, or less for ever.
#[test]
fn protection_holds_for_the_device_too() {
    on_each_kind(|device| {
        let area = mirrored_area(device, 40, 1);
        for round in 0..3 {
            let seed = 1 + round;
            area.protect(libc::PROT_READ);
            let writable = |seen: &crate::common::mirror::Seen| seen.is_mirrored_writable();
            assert!(!snapshot(device, *area).iter().any(writable));
            for page in [0, 19, 20, 39] {
                let addr = area.page(page).addr;
                write(device, addr, &[0; 99], MAP).stopped(Errno::ACCESS, 0, addr);
                write(device, addr, &[0; 99], MIGRATE).stopped(Errno::ACCESS, 0, addr);
            }
            device_check(device, *area, seed);
            area.protect(libc::PROT_NONE);
            assert_eq!(mirrored(device, *area), 0);
            for page in [0, 19, 20, 39] {
                out_of_reach(device, area.page(page), Errno::ACCESS);
            }
            area.protect(RW);
            device_check(device, *area, seed);
            if round == 0 {
                assert_place(device, area.part(0, 19), Place::Device);
            }
            device_fill(device, *area, seed + 1);
            both_check(device, area.part(10, 20), seed + 1);
        }
        both_check(device, *area, 4);
        // One page of a huge one.
        let huge = Area::new(HUGE);
        huge.advise(libc::MADV_HUGEPAGE).unwrap();
        device_fill(device, *huge, 5);
        let page = huge.page(77);
        page.protect(libc::PROT_READ);
        write(device, page.addr, &[0], MAP).stopped(Errno::ACCESS, 0, page.addr);
        device_fill(device, huge.part(0, 77), 6);
        device_fill(device, huge.part(78, 434), 6);
        page.protect(RW);
        both_check(device, page, 5);
        both_check(device, huge.part(0, 77), 6);
        both_check(device, huge.part(78, 434), 6);
    });
}

/// Catches discarded bytes that a device still reads, and advice that loses any.
#[test]
fn advice_is_followed_and_loses_nothing_else() {
    on_each_kind(|device| {
        let area = mirrored_area(device, 40, 1);
        let middle = area.part(15, 10);
        middle.advise(libc::MADV_DONTNEED).unwrap();
        assert_eq!(mirrored(device, middle), 0);
        device_check_zero(device, middle);
        device_check(device, area.part(0, 15), 1);
        device_check(device, area.part(25, 15), 1);
        device_fill_by(device, middle, 2, MIGRATE);
        both_check(device, middle, 2);
        middle.fill(1);

        for (what, advice) in [
            ("cold", libc::MADV_COLD),
            ("will need", libc::MADV_WILLNEED),
            ("sequential", libc::MADV_SEQUENTIAL),
            ("populate for reading", libc::MADV_POPULATE_READ),
            ("populate for writing", libc::MADV_POPULATE_WRITE),
        ] {
            println!("{what}");
            mirror(device, *area, 3);
            area.advise(advice).unwrap();
            device_check(device, *area, 3);
            device_fill(device, area.part(10, 20), 4);
            both_check(device, area.part(10, 20), 4);
            both_check(device, area.part(0, 10), 3);
            both_check(device, area.part(30, 10), 3);
        }

        // What may be discarded is there or is not, until it is written: then it is there.
        mirror(device, *area, 5);
        area.advise(libc::MADV_FREE).unwrap();
        device_fill(device, area.part(10, 20), 6);
        for page in 0..40 {
            let words = crate::common::mirror::device_words(device, area.page(page), MAP);
            let written = (10..30).contains(&page);
            if written || words.iter().any(|&word| word != 0) {
                let seed = if written { 6 } else { 5 };
                area.page(page).check_words("the device", &words, seed);
            }
        }
        both_check(device, area.part(10, 20), 6);
    });
}

/// Catches an entry for a small page that is part of a huge one by now, somewhere else.
#[test]
fn collapsed_memory_is_found_where_it_is() {
    on_each_kind(|device| {
        const MADV_COLLAPSE: libc::c_int = 25;

        for resident in [0, 100] {
            let area = Area::filled(HUGE, 1);
            device_fill(device, *area, 2);
            if resident > 0 {
                to_device(device, area.part(0, resident));
            }
            device_check(device, *area, 2);
            area.advise(libc::MADV_HUGEPAGE).unwrap();
            let collapsed = area.advise(MADV_COLLAPSE);
            println!("with {resident} pages in VRAM: {collapsed:?}");
            let huge = snapshot(device, area.part(resident, HUGE - resident));
            if resident == 0 {
                collapsed.unwrap();
                assert!(huge.iter().all(|seen| seen.order() == 9));
                assert!(!huge.iter().any(|seen| seen.is_mirrored()));
            }
            device_check(device, *area, 2);
            device_fill(device, area.part(50, 300), 3);
            both_check(device, area.part(50, 300), 3);
            both_check(device, area.part(0, 50), 2);
            both_check(device, area.part(350, HUGE - 350), 2);
            // And in small pages again, to the device.
            to_device(device, area.part(7, 400));
            both_check(device, area.part(50, 300), 3);
        }
    });
}

/// Catches a lock on memory that keeps the device from it, or that loses bytes on the way.
#[test]
fn locked_memory_is_accessed_and_moves_when_asked() {
    on_each_kind(|device| {
        let area = mirrored_area(device, 40, 1);
        let lock = |locks: bool| {
            let addr = area.addr as *const libc::c_void;
            let call = if locks { libc::mlock } else { libc::munlock };
            // SAFETY: the pages are the test's own.
            let result = unsafe { call(addr, area.bytes()) };
            assert_eq!(result, 0, "{}", last_errno());
        };
        for seed in [2, 4] {
            lock(true);
            device_check(device, *area, seed - 1);
            device_fill(device, *area, seed);
            both_check(device, area.part(10, 20), seed);
            to_device(device, area.part(5, 20));
            device_check(device, *area, seed);
            device_fill(device, *area, seed + 1);
            lock(false);
            both_check(device, area.part(20, 20), seed + 1);
            to_device(device, area.part(0, 20));
            both_check(device, *area, seed + 1);
            device_fill(device, *area, seed + 1);
        }
    });
}

/// Catches a write, by the CPU or the device, that is seen on the other side of a fork, or lost on its own: also when the pages are
/// shared for so long that both sides have them in VRAM.
#[test]
fn copies_on_write_are_made_for_the_device_too() {
    on_each_kind(|device| {
        let path = device.path();
        // By whom each part is written: nobody, or the parent or the child, by their CPUs or their devices, before or after.
        let area = mirrored_area(device, 80, 1);
        let part = |i: usize| area.part(i * 10, 10);
        let mut child = Child::fork(|parent| {
            let own = Device::open_path(path).unwrap();
            device_check_by(&own, part(0), 1, MIGRATE);
            parent.send(0);
            parent.receive();
            (0..8).for_each(|i| device_check(&own, part(i), 1));
            device_fill(&own, part(1), 3);
            part(2).fill(3);
            device_fill_by(&own, part(5), 3, MIGRATE);
            parent.send(0);
            parent.receive();
            both_check(&own, part(1), 3);
            both_check(&own, part(2), 3);
            both_check(&own, part(5), 3);
            for i in [0, 3, 4, 6, 7] {
                both_check(&own, part(i), 1);
            }
        });
        child.receive();
        // Parts 3 and 4 before the child writes, 6 and 7 after.
        device_check(device, *area, 1);
        device_fill(device, part(3), 2);
        part(4).fill(2);
        child.step();
        for i in [0, 1, 2, 5, 6, 7] {
            device_check(device, part(i), 1);
        }
        device_fill_by(device, part(6), 2, MIGRATE);
        part(7).fill(2);
        child.send(0);
        child.finish();
        for i in [0, 1, 2, 5] {
            both_check(device, part(i), 1);
        }
        for i in [3, 4, 6, 7] {
            both_check(device, part(i), 2);
        }
        // Alone again, and writable.
        device_fill(device, *area, 9);
        both_check(device, *area, 9);
    });
}

/// Catches a lock, a reference, a page or a node that is left when a process is killed at any moment of its device's accesses.
#[test]
fn a_process_that_is_killed_in_the_middle_of_accesses_leaves_nothing() {
    let (driver, device) = Driver::load_with("", GPUS[0]);
    let path = device.path();
    let mut random = Random::new(9);
    for round in 0..rounds(20) {
        let mut child = Child::fork(|test| {
            let device = Device::open_path(path).unwrap();
            let area = Area::filled(500, 5);
            let policy = [MAP, MIGRATE][round % 2];
            test.send(0);
            std::thread::scope(|scope| {
                scope.spawn(|| loop {
                    device_fill_by(&device, area.part(0, 250), 5, policy);
                    device_check_by(&device, area.part(0, 250), 5, policy);
                });
                scope.spawn(|| loop {
                    for target in [Target::Device, Target::System] {
                        device
                            .prefetch_range(area.addr, area.bytes(), target)
                            .unwrap();
                    }
                });
            });
        });
        child.receive();
        std::thread::sleep(Duration::from_micros(random.below(40_000) as u64));
        child.kill();
    }
    assert_empty(&device);
    eventually("no table is left", || {
        crate::common::driver::counters(&device).table_pages == 0
    });
    let area = mirrored_area(&device, 500, 6);
    both_check(&device, *area, 6);
    drop((area, device));
    driver.finish();
}
