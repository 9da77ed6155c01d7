//! More wants to be in VRAM than fits: what was not used for long makes room, whoever's it is, and no byte is lost.
//!
//! Runs in the virtual GPU host: `bench/test guest_oversubscribed`.

use std::time::Duration;

use crate::common::child::Child;
use crate::common::driver::{counters, Driver};
use crate::common::memory::{Area, Span, HUGE, PAGE};
use crate::common::mirror::{device_check_by, device_fill_by, MAP, MIGRATE};
use crate::common::random::Random;
use crate::common::{
    assert_place, huge, is_checking, places, refused, rounds, to_device, to_system,
};
use hmm_gpu::{Device, Errno, Place, Target};

/// How many pages can be in the VRAM of a device.
fn room(device: &Device) -> usize {
    device.describe().unwrap().vram_bytes as usize / PAGE
}

/// A device with little VRAM: less where all takes several times longer.
fn little() -> &'static str {
    if is_checking() {
        "soft=1 soft_mib=6 fault_around=64"
    } else {
        "soft=1 soft_mib=16 fault_around=64"
    }
}

/// Pages of a span that are in VRAM.
fn resident(device: &Device, span: Span) -> usize {
    places(device, span).counts().device
}

/// Catches a device that fails when it is full, and one that loses, swaps or mixes up what it evicts: four times as much as there is
/// VRAM, written and read by the device from end to end, and in no order at all, in small pages and in huge ones.
#[test]
fn four_times_as_much_as_there_is_vram() {
    let driver = Driver::load(little());
    let device = Device::open(0).unwrap();
    for advice in [libc::MADV_NOHUGEPAGE, libc::MADV_HUGEPAGE] {
        let area = Area::new(4 * room(&device));
        area.advise(advice).unwrap();
        let before = device.counters().unwrap();
        device_fill_by(&device, *area, 1, MIGRATE);
        device_check_by(&device, *area, 1, MIGRATE);
        let work = device.counters().unwrap() - before;
        assert!(work.pressure_pages > 6 * room(&device) as u64, "{work:#?}");
        assert!(
            work.evictions >= work.pressure_pages / HUGE as u64,
            "{work:#?}"
        );
        let mut random = Random::new(5);
        let piece = area.pages / 64;
        let mut seeds = [1; 64];
        for step in 0..rounds(96) as u64 {
            let i = random.below(64);
            let part = area.part(i * piece, piece);
            match random.below(4) {
                0 => drop(to_device(&device, part)),
                1 => part.check(seeds[i]),
                2 => device_check_by(&device, part, seeds[i], MIGRATE),
                _ => {
                    seeds[i] = 10 + step;
                    device_fill_by(&device, part, seeds[i], MIGRATE);
                }
            }
        }
        for (i, seed) in seeds.into_iter().enumerate() {
            let part = area.part(i * piece, piece);
            device_check_by(&device, part, seed, MIGRATE);
            part.check(seed);
        }
    }
    drop(device);
    driver.finish();
}

/// Catches processes that get each other's pages, and one that is never done because the others are: four of them, each with as much as
/// there is VRAM, and one that is killed.
#[test]
fn four_processes_with_as_much_each() {
    let driver = Driver::load(little());
    let device = Device::open(0).unwrap();
    let pages = room(&device);
    let work = |i: u64, rounds: usize| {
        let device = Device::open(0).unwrap();
        let area = Area::new(pages);
        area.advise([libc::MADV_NOHUGEPAGE, libc::MADV_HUGEPAGE][i as usize % 2])
            .unwrap();
        for round in 0..rounds as u64 {
            let seed = 100 * (i + 1) + round;
            device_fill_by(&device, *area, seed, MIGRATE);
            device_check_by(&device, *area, seed, MIGRATE);
            area.part(i as usize * 100, 300).check(seed);
        }
    };
    let children: Vec<Child> = (0..4)
        .map(|i| Child::fork(|_| work(i, rounds(4))))
        .collect();
    let doomed = Child::fork(|_| work(4, 1000));
    std::thread::sleep(Duration::from_millis(500));
    doomed.kill();
    children.into_iter().for_each(Child::finish);
    // They take turns as the machine has it.
    assert!(counters(&device).pressure_pages > pages as u64);
    drop(device);
    driver.finish();
}

/// Catches a request that evicts what it has just brought, and says it is there.
#[test]
fn a_request_does_not_evict_what_it_needs() {
    let driver = Driver::load(little());
    let device = Device::open(0).unwrap();
    let room = room(&device);
    let some = room / 4;
    let (old, area) = (Area::filled(room, 1), Area::filled(room, 2));
    to_device(&device, *old);
    // It fits, if all else goes.
    to_device(&device, *area);
    assert_place(&device, *old, Place::System);
    // It fits, but for what is in the way of it, with a part there already, that was for longer than all else.
    for first in [0, room / 3, room - some] {
        let part = old.part(first, some);
        to_system(&device, *area);
        to_device(&device, part);
        to_device(&device, area.part(0, room - some));
        let before = counters(&device);
        to_device(&device, *old);
        let work = counters(&device).pressure_pages - before.pressure_pages;
        assert_eq!(work, (room - some) as u64);
        to_system(&device, *old);
    }
    // It does not.
    let both = Area::filled(room + 100, 3);
    to_device(&device, both.part(0, some));
    let error = device
        .prefetch_range(both.addr, both.bytes(), Target::Device)
        .unwrap_err();
    let moved = error.moved().unwrap();
    assert_eq!(
        (moved.moved, moved.already),
        (((room - some) * PAGE) as u64, (some * PAGE) as u64)
    );
    assert_eq!(refused::<()>(Err(error)), Errno::NOSPC);
    assert_place(&device, both.part(0, room), Place::Device);
    old.check(1);
    area.check(2);
    both.check(3);
    drop((old, area, both, device));
    driver.finish();
}

/// Catches a request for nothing that evicts: of what is there already, or of what can never be.
#[test]
fn a_request_that_needs_no_room_evicts_nothing() {
    let driver = Driver::load("soft=1 soft_mib=8");
    let device = Device::open(0).unwrap();
    let area = Area::filled(room(&device), 1);
    to_device(&device, *area);
    let before = counters(&device);
    to_device(&device, *area);
    let shared = Area::shared(1000);
    shared.fill(2);
    let closed = Area::new(1000);
    closed.protect(libc::PROT_NONE);
    for span in [*shared, *closed] {
        let moved = device
            .prefetch_range(span.addr, span.bytes(), Target::Device)
            .unwrap();
        assert_eq!(moved.skipped, span.bytes() as u64);
    }
    assert_eq!(counters(&device).pressure_pages, before.pressure_pages);
    assert_place(&device, *area, Place::Device);
    area.check(1);
    drop((area, shared, closed, device));
    driver.finish();
}

/// Catches victims that were just used, and neighbours that are torn apart: what the device used least recently goes, 2 MiB at a time.
#[test]
fn what_was_not_used_for_longest_goes_first() {
    let driver = Driver::load("soft=1 soft_mib=16");
    let device = Device::open(0).unwrap();
    let huge_page = |seed| {
        let area = huge::filled(1, seed);
        to_device(&device, *area);
        area
    };
    let areas: Vec<Area> = (0..6).map(huge_page).collect();
    // All but two have been used since. The table is in a block of its own, which leaves one.
    for i in [5, 0, 4, 2] {
        device_check_by(&device, areas[i].part(100, 10), i as u64, MAP);
    }
    let mut others = vec![huge_page(10)];
    let mut gone = vec![];
    for goes in [1, 3, 5, 0] {
        let before = device.counters().unwrap();
        others.push(huge_page(11));
        let work = device.counters().unwrap() - before;
        assert_eq!((work.pressure_pages, work.evictions), (HUGE as u64, 1));
        gone.push(goes);
        for (i, area) in areas.iter().enumerate() {
            let expected = [Place::Device, Place::System][usize::from(gone.contains(&i))];
            println!("{i} after {gone:?}");
            assert_place(&device, **area, expected);
        }
    }
    for (i, area) in areas.iter().enumerate() {
        area.check(i as u64);
    }
    drop((areas, others, device));
    driver.finish();
}

/// Catches one client that can push out all others, and a share that is one although it is said to be none.
#[test]
fn a_greedy_client_leaves_the_others_their_share() {
    for share in [100, 0] {
        // So little that they share blocks.
        let driver = Driver::load(&format!("soft=1 soft_mib=6 fair_share={share}"));
        let device = Device::open(0).unwrap();
        let pages = room(&device);
        let modest = Area::filled(pages / 4, 1);
        to_device(&device, *modest);
        Child::fork(|_| {
            let device = Device::open(0).unwrap();
            let greedy = Area::filled(3 * pages, 2);
            for step in 0..24 {
                to_device(&device, greedy.part(step * pages / 8, pages / 8));
            }
            greedy.check(2);
        })
        .finish();
        let left = resident(&device, *modest);
        if share == 100 {
            assert_eq!(left, modest.pages, "it had no more than its share");
        } else {
            assert_eq!(left, 0, "the least recently used goes");
        }
        modest.check(1);
        // Who asks for more than a share gets that, if the others can make room.
        let all = Area::filled(pages - 20, 3);
        to_device(&device, *all);
        all.check(3);
        drop((modest, all, device));
        driver.finish();
    }
}

/// Catches an eviction that cannot do with what else a page may be: of both sides of a fork, discarded, protected.
#[test]
fn whatever_became_of_it_it_can_be_evicted() {
    let driver = Driver::load("soft=1 soft_mib=16");
    let device = Device::open(0).unwrap();
    let (area, large) = (Area::filled(4 * HUGE, 1), huge::filled(2, 2));
    to_device(&device, *area);
    to_device(&device, *large);
    let mut child = Child::fork(|link| {
        link.receive();
        area.check(1);
        large.part(7, 600).check(2);
        link.send(0);
    });
    area.part(10, 20).advise(libc::MADV_DONTNEED).unwrap();
    area.part(100, 50).protect(libc::PROT_READ);
    large.part(30, 5).advise(libc::MADV_DONTNEED).unwrap();
    large.part(HUGE, 100).fill(3);
    for seed in [4, 5] {
        let all = Area::filled(room(&device), seed);
        to_device(&device, *all);
        assert_eq!(resident(&device, *area) + resident(&device, *large), 0);
        all.check(seed);
    }
    child.step();
    child.finish();
    area.part(0, 10).check(1);
    area.part(10, 20).check_zero();
    area.part(30, area.pages - 30).check(1);
    large.part(0, 30).check(2);
    large.part(30, 5).check_zero();
    large.part(HUGE, 100).check(3);
    large.part(HUGE + 100, HUGE - 100).check(2);
    drop((area, large, device));
    driver.finish();
}
