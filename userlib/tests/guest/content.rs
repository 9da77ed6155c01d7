//! Content: whatever moves, and however it comes back, every byte is as it was written.
//!
//! Runs in the virtual GPU host: `bench/test guest_content`.

use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd};

use crate::common::driver::{on_each_kind, Driver, GPUS};
use crate::common::kernel::{self, Entry};
use crate::common::memory::{errno, file, Area, Span, HUGE, PAGE};
use crate::common::random::Random;
use crate::common::{
    assert_place, assert_witness, eventually, moved, places, refused, rounds, to_device, to_system,
};
use hmm_gpu::{Device, Errno, Place, Target};

const RW: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;

/// Catches bytes lost, swapped or cut at any size and place: one page, around 2 MiB, across several 2 MiB blocks, in small
/// pages and in huge ones.
#[test]
fn memory_goes_there_and_back_at_any_size_and_offset() {
    on_each_kind(|device| {
        let sizes = [1, 2, HUGE - 1, HUGE, HUGE + 1, 2 * HUGE + 3];
        for (case, pages) in sizes.into_iter().enumerate() {
            for (offset, advice) in [
                (0, libc::MADV_HUGEPAGE),
                (7, libc::MADV_NOHUGEPAGE),
                (HUGE - 1, libc::MADV_HUGEPAGE),
            ] {
                let area = Area::offset(offset, pages);
                area.advise(advice).unwrap();
                let seed = (case * 1000 + offset) as u64;
                area.fill(seed);
                let before = device.counters().unwrap();
                assert_eq!(to_device(device, *area), moved(pages, 0, 0, 0));
                assert_eq!(
                    device
                        .prefetch_range(area.addr, area.bytes(), Target::Device)
                        .unwrap(),
                    moved(0, pages, 0, 0),
                    "what is there already is told as such"
                );
                assert_eq!(to_system(device, *area), moved(pages, 0, 0, 0));
                assert_eq!(to_system(device, *area), moved(0, pages, 0, 0));
                let work = device.counters().unwrap() - before;
                assert_eq!(work.cpu_faults, 0, "nobody touched it meanwhile");
                assert_eq!(
                    (work.to_device_pages, work.to_system_pages),
                    (pages as u64, pages as u64)
                );
                area.check(seed);
            }
        }
    });
}

/// Catches what goes wrong only with many pages: page tables, blocks and batches that meet.
#[test]
fn many_mebibytes_go_there_and_back() {
    let (driver, device) = Driver::load_with("", GPUS[1]);
    let area = Area::offset(3, (rounds(64) << 20) / PAGE);
    area.fill(64);
    to_device(&device, *area);
    let half = area.pages / 2;
    to_system(&device, area.part(0, half));
    assert_place(&device, area.part(half, area.pages - half), Place::Device);
    area.check(64);
    drop((area, device));
    driver.finish();
}

/// Catches a fault that brings back the wrong page, or more or fewer than the one that was touched, or counts it wrongly.
#[test]
fn pages_come_back_one_by_one_in_any_order() {
    on_each_kind(|device| {
        let mut random = Random::new(2);
        let area = Area::filled(600, 21);
        to_device(device, *area);
        let before = device.counters().unwrap();
        let mut back = vec![false; area.pages];
        for (touched, page) in random.order(area.pages).into_iter().enumerate() {
            if touched % 2 == 0 {
                area.page(page).check(21);
            } else {
                area.page(page).fill(22);
            }
            back[page] = true;
            if touched % 97 == 0 {
                let residency = places(device, *area);
                for (i, at) in residency.pages().iter().enumerate() {
                    let expected = if back[i] {
                        Place::System
                    } else {
                        Place::Device
                    };
                    assert_eq!(
                        at.place(),
                        expected,
                        "page {i} after {} touches",
                        touched + 1
                    );
                }
                assert_witness(&residency);
            }
        }
        let work = device.counters().unwrap() - before;
        assert_eq!(
            (work.fault_back_pages, work.live_pages),
            (area.pages as u64, 0)
        );
        for (touched, page) in Random::new(2).order(area.pages).into_iter().enumerate() {
            area.page(page).check(21 + touched as u64 % 2);
        }
    });
}

/// Catches a call that stops at a hole, counts a page twice or not at all, or moves what it says it skipped.
#[test]
fn a_range_of_many_mappings_and_holes_is_counted_to_the_page() {
    on_each_kind(|device| {
        let backing = file(8, 90);
        let area = Area::offset(500, 51);
        area.advise(libc::MADV_NOHUGEPAGE).unwrap();
        area.part(0, 8).fill(1);
        area.part(8, 4).unmap();
        // Never touched.
        let untouched = area.part(12, 5);
        area.part(17, 6).fill(2);
        area.part(17, 6).protect(libc::PROT_READ);
        area.part(23, 1).unmap();
        let shared = Span::new(area.part(24, 3).addr, 3);
        shared.map_over(RW, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1);
        shared.fill(3);
        let of_file = Span::new(area.part(27, 7).addr, 7);
        of_file.map_over(RW, libc::MAP_PRIVATE, backing.as_raw_fd());
        of_file.touch();
        area.part(34, 9).fill(4);
        to_device(device, area.part(34, 9));
        area.part(43, 8).unmap();

        let ask = |target| {
            device
                .prefetch_range(area.addr, area.bytes(), target)
                .unwrap()
        };
        assert_eq!(ask(Target::Device), moved(8 + 5 + 6, 9, 3 + 7, 4 + 1 + 8));
        let residency = places(device, *area);
        let expected = |i| match i {
            8..12 | 23 | 43.. => Place::None,
            24..34 => Place::System,
            _ => Place::Device,
        };
        for (i, page) in residency.pages().iter().enumerate() {
            assert_eq!(page.place(), expected(i), "page {i}");
        }
        assert_witness(&residency);
        assert_eq!(ask(Target::Device), moved(0, 8 + 5 + 6 + 9, 3 + 7, 13));
        let back = ask(Target::System);
        assert_eq!((back.moved, back.unmapped), (28 * 4096, 13 * 4096));
        assert_eq!(back.total(), area.bytes() as u64);

        area.part(0, 8).check(1);
        untouched.check_zero();
        area.part(17, 6).check(2);
        shared.check(3);
        of_file.check(90);
        area.part(34, 9).check(4);
    });
}

/// Catches untouched memory that a move to system memory populates: there is nothing to move.
#[test]
fn untouched_memory_is_left_alone_by_a_move_to_system_memory() {
    on_each_kind(|device| {
        let area = Area::new(700);
        assert_eq!(to_system(device, *area), moved(0, 700, 0, 0));
        assert_place(device, *area, Place::None);
        area.check_zero();
    });
}

/// Catches a huge page that is not split well: parts of it move, the rest stays, all keeps its bytes.
#[test]
fn parts_of_huge_pages_move() {
    on_each_kind(|device| {
        let area = Area::offset(0, 4 * HUGE);
        area.advise(libc::MADV_HUGEPAGE).unwrap();
        area.fill(31);
        let huge_kib = kernel::smaps(area.addr, "AnonHugePages");
        assert_eq!(
            huge_kib,
            8 << 10,
            "the kernel gave no huge pages, so there is nothing to test"
        );
        for part in [
            area.part(100, 100),
            area.part(HUGE - 1, 2),
            area.part(2 * HUGE, HUGE),
        ] {
            assert_eq!(to_device(device, part), moved(part.pages, 0, 0, 0));
        }
        assert_eq!(places(device, *area).counts().device, 100 + 2 + HUGE);
        area.part(150, 10).check(31);
        area.check(31);
    });
}

/// Catches a page that comes back with more rights than it went with, or fewer.
#[test]
fn read_only_memory_moves_and_stays_read_only() {
    on_each_kind(|device| {
        let area = Area::filled(20, 41);
        area.protect(libc::PROT_READ);
        to_device(device, *area);
        assert_eq!(places(device, *area).counts().writable, 0);
        // A write kills, in VRAM and back in system memory.
        for page in [area.page(0), area.page(0)] {
            let child = crate::common::child::Child::fork(|_| page.fill(0));
            child.finish_killed(libc::SIGSEGV);
        }
        area.page(1).check(41);
        area.protect(RW);
        area.part(10, 10).fill(42);
        area.part(0, 10).check(41);
        area.part(10, 10).check(42);
    });
}

/// Catches a protection or a place that is lost when mappings change under resident pages.
#[test]
fn resident_memory_can_be_remapped_and_reprotected() {
    on_each_kind(|device| {
        let area = Area::filled(HUGE + 40, 51);
        let target = Area::offset(13, HUGE + 40);
        to_device(device, *area);
        // No access at all, then back: the pages never leave.
        area.protect(libc::PROT_NONE);
        area.protect(RW);
        assert_place(device, *area, Place::Device);

        let new = target.addr as *mut libc::c_void;
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        // SAFETY: both are the test's own; what the old addresses lose is put back below.
        let result =
            unsafe { libc::mremap(area.addr as *mut _, area.bytes(), area.bytes(), flags, new) };
        assert_eq!(result, new);
        let there = area.at(target.addr);
        assert_place(device, there, Place::Device);
        assert_eq!(
            refused(device.prefetch_range(area.addr, area.bytes(), Target::Device)),
            Errno::FAULT
        );
        area.map_over(RW, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1);
        area.check_zero();
        there.part(0, 100).check(51);
        there.part(200, 50).fill(52);
        to_device(device, there);
        there.part(0, 200).check(51);
        there.part(200, 50).check(52);
        there.part(250, there.pages - 250).check(51);
    });
}

/// Catches a mapping of any other kind that moves, loses bytes, or fails the call.
#[test]
fn what_is_not_a_process_s_own_is_skipped_and_unchanged() {
    std::fs::write("/proc/sys/vm/nr_hugepages", "2").unwrap();
    on_each_kind(|device| {
        let skipped = |what: &str, span: Span| {
            let result = device
                .prefetch_range(span.addr, span.bytes(), Target::Device)
                .unwrap();
            assert_eq!(result, moved(0, 0, span.pages, 0), "{what}");
            let in_vram = |entry: &Entry| entry.is_in_vram();
            assert!(
                !kernel::pagemap(std::process::id(), span.addr, span.pages)
                    .iter()
                    .any(in_vram),
                "{what}"
            );
        };
        let shared = Area::shared(10);
        shared.fill(71);
        skipped("shared anonymous memory", *shared);
        shared.check(71);

        let backing = file(10, 72);
        for (what, sharing) in [
            ("a file, shared", libc::MAP_SHARED),
            ("a file, private", libc::MAP_PRIVATE),
        ] {
            let area = Area::new(10);
            area.map_over(RW, sharing, backing.as_raw_fd());
            area.check(72);
            skipped(what, *area);
            area.check(72);
            // Of a private mapping that is the process's own copy, which moves; of a shared one it is the file's.
            area.page(3).fill(73);
            if sharing == libc::MAP_PRIVATE {
                let ask = || device.prefetch_range(area.addr, area.bytes(), Target::Device);
                assert_eq!(ask().unwrap(), moved(1, 0, 9, 0), "{what}");
                assert_place(device, area.page(3), Place::Device);
                assert_eq!(ask().unwrap(), moved(0, 1, 9, 0), "{what}");
            } else {
                skipped(what, *area);
            }
            area.page(3).check(73);
            area.page(3).fill(72);
        }

        // Memory that nobody may touch: whether it was touched before or not.
        let closed = Area::new(20);
        closed.part(0, 10).fill(75);
        closed.protect(libc::PROT_NONE);
        skipped("no access", *closed);
        let live = device.counters().unwrap().live_pages;
        assert_eq!(live, 0, "nothing was populated");
        closed.protect(RW);
        closed.part(0, 10).check(75);
        closed.part(10, 10).check_zero();

        let huge = Area::offset(0, HUGE);
        huge.map_over(
            RW,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB,
            -1,
        );
        huge.fill(74);
        skipped("hugetlb", *huge);
        huge.check(74);

        // Code, and what the kernel maps for the system calls that need none.
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        for name in ["[vdso]", "[vvar]", "r-xp"] {
            let line = maps.lines().find(|line| line.contains(name)).unwrap();
            let (range, _) = line.split_once(' ').unwrap();
            let (start, end) = range.split_once('-').unwrap();
            let number = |text| usize::from_str_radix(text, 16).unwrap();
            let pages = (number(end) - number(start)) / PAGE;
            skipped(name, Span::new(number(start), pages));
        }
    });
    std::fs::write("/proc/sys/vm/nr_hugepages", "0").unwrap();
}

/// Catches a page that is moved away from under somebody who holds it: a pipe has it by reference.
#[test]
fn pinned_pages_stay_until_they_are_let_go() {
    on_each_kind(|device| {
        let area = Area::filled(40, 81);
        let (mut reader, writer) = pipe();
        let held = area.part(11, 3);
        let piece = libc::iovec {
            iov_base: held.addr as *mut _,
            iov_len: held.bytes(),
        };
        // SAFETY: the pages are mapped, and one piece is given.
        let spliced = unsafe { libc::vmsplice(writer.as_raw_fd(), &piece, 1, 0) };
        assert_eq!(spliced, held.bytes() as isize);
        let before = device.counters().unwrap();
        assert_eq!(
            device
                .prefetch_range(area.addr, area.bytes(), Target::Device)
                .unwrap(),
            moved(37, 0, 3, 0)
        );
        assert_eq!(
            (device.counters().unwrap() - before).skipped_pages,
            3,
            "what is skipped is counted"
        );
        assert_place(device, held, Place::System);
        let mut bytes = vec![0_u64; held.bytes() / 8];
        reader
            .read_exact(bytemuck::cast_slice_mut(&mut bytes))
            .unwrap();
        held.check(81);
        // SAFETY: the span is mapped readable.
        let original = unsafe { std::slice::from_raw_parts(held.addr as *const u64, bytes.len()) };
        assert!(bytes == original, "the pipe had other bytes");
        drop((reader, writer));
        eventually("the pages are not held any more", || {
            device
                .prefetch_range(area.addr, area.bytes(), Target::Device)
                .unwrap()
                .is_complete()
        });
        area.check(81);
    });
}

/// Catches system calls that read or write resident memory and get other bytes, or fail.
#[test]
fn system_calls_work_on_resident_memory() {
    on_each_kind(|device| {
        let (from, to) = (Area::filled(16, 91), Area::filled(16, 92));
        let mut backing = file(16, 93);
        to_device(device, *from);
        to_device(device, *to);
        // SAFETY: mapped, and nobody else writes to it meanwhile.
        let source = unsafe { std::slice::from_raw_parts(from.addr as *const u8, from.bytes()) };
        // SAFETY: as above.
        let target = unsafe { std::slice::from_raw_parts_mut(to.addr as *mut u8, to.bytes()) };
        backing.write_all(source).unwrap();
        std::io::Seek::rewind(&mut backing).unwrap();
        backing.read_exact(target).unwrap();
        to.check(91);
        from.check(91);
    });
}

/// Catches what no single case shows: hundreds of random moves, touches and writes on two devices, each page's place and bytes
/// compared with a model, and with the kernel's own page table.
#[test]
fn random_moves_agree_with_a_model_and_with_pagemap() {
    const PAGES: usize = 96;

    let mut driver = Driver::load("soft=1 soft_mib=4 add_resource=1");
    let devices = [Device::open(0).unwrap(), driver.bind(GPUS[1])];
    let area = Area::offset(HUGE - 40, PAGES);
    area.advise(libc::MADV_NOHUGEPAGE).unwrap();
    let mut random = Random::new(2018);
    // What each page holds: a seed, or zeroes.
    let mut model = [None; PAGES];
    let check = |page: usize, holds: Option<u64>| match holds {
        Some(seed) => area.page(page).check(seed),
        None => area.page(page).check_zero(),
    };
    for step in 0..rounds(600) as u64 {
        let first = random.below(PAGES);
        let part = area.part(first, 1 + random.below((PAGES - first).min(24)));
        let range = first..first + part.pages;
        let device = &devices[random.below(2)];
        match random.below(6) {
            0 | 1 => {
                let counts = device
                    .prefetch_range(part.addr, part.bytes(), Target::Device)
                    .unwrap();
                assert_eq!((counts.total(), counts.unmapped), (part.bytes() as u64, 0));
            }
            2 => {
                to_system(device, part);
            }
            3 => range.for_each(|page| check(page, model[page])),
            4 => {
                part.fill(step);
                model[range].fill(Some(step));
            }
            _ => {
                part.advise(libc::MADV_DONTNEED).unwrap();
                model[range].fill(None);
            }
        }
        let [one, other] = [&devices[0], &devices[1]].map(|device| places(device, *area));
        assert_witness(&one);
        for (i, (one, other)) in one.pages().iter().zip(other.pages()).enumerate() {
            let expected = match one.place() {
                Place::Device => Place::OtherDevice,
                Place::OtherDevice => Place::Device,
                place => place,
            };
            assert_eq!(other.place(), expected, "page {i} after step {step}");
        }
        let live: u64 = devices
            .iter()
            .map(|device| device.counters().unwrap().live_pages)
            .sum();
        let counts = one.counts();
        assert_eq!(
            live,
            (counts.device + counts.other_device) as u64,
            "after step {step}"
        );
    }
    (0..PAGES).for_each(|page| check(page, model[page]));
    drop((area, devices));
    driver.finish();
}

/// A pipe: what is read from the first was written to the second.
fn pipe() -> (std::fs::File, std::fs::File) {
    let mut fds = [-1; 2];
    // SAFETY: there is room for two descriptors.
    errno(unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC) }).unwrap();
    // SAFETY: just made, and nobody else's.
    let owned = fds.map(|fd| unsafe { std::fs::File::from_raw_fd(fd) });
    owned.into()
}
