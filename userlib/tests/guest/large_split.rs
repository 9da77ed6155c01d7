//! Large folios for which there is none of system memory: they are split to come home, page by page, with every byte.
//!
//! Runs in the virtual GPU host, whose memory is made to look like that of two nodes (`numa=fake=2`): one is broken up into pieces of
//! less than 2 MiB, and a thread is bound to it. All else has the other one. By `bench/test guest_large_split`.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::common::child::Child;
use crate::common::driver::{on_each_kind, Driver, GPUS, IN_SLOT};
use crate::common::huge::{self, assert_large, assert_small, Parts};
use crate::common::kernel;
use crate::common::memory::{Area, HUGE};
use crate::common::mirror::{device_check, device_fill, mirrored};
use crate::common::node::{self, Bound};
use crate::common::random::Random;
use crate::common::turmoil::turmoil;
use crate::common::{assert_place, eventually, moved, patience, places, to_system};
use hmm_gpu::{Counters, Device, Place};

/// Asserts that so many large folios or more had to be split, and that none came home whole.
#[track_caller]
fn assert_split(work: &Counters, folios: u64) {
    assert_eq!(work.large_to_system, 0, "{work:#?}");
    assert!(work.large_failures >= folios, "{work:#?}");
    assert_eq!(work.system_failures, 0, "{work:#?}");
}

/// Catches a request that leaves large folios where they are because they cannot come whole, or splits them and loses a page.
#[test]
fn by_request_they_come_home_in_pages() {
    node::break_up();
    on_each_kind(|device| {
        let area = huge::resident(device, 4, 1);
        device_check(device, area.part(HUGE - 9, 18), 1);
        let before = device.counters().unwrap();
        let bound = Bound::to_node();
        assert_eq!(to_system(device, *area), moved(4 * HUGE, 0, 0, 0));
        drop(bound);
        let work = device.counters().unwrap() - before;
        assert_split(&work, 4);
        assert_eq!(work.to_system_pages, 4 * HUGE as u64);
        assert_eq!(work.cpu_faults, 0);
        assert_eq!(kernel::smaps(area.addr, "AnonHugePages"), 0);
        device_check(device, area.part(HUGE - 9, 18), 1);
        area.check(1);
    });
}

/// Catches a touch that waits for ever for 2 MiB in one piece, or brings another page than the one that was touched; and a device
/// that does not find the pages that stay.
#[test]
fn a_touch_has_them_split_and_brings_one_page() {
    node::break_up();
    on_each_kind(|device| {
        let area = huge::resident(device, 4, 11);
        let before = device.counters().unwrap();
        let touched = [0, 2 * HUGE - 1, 2 * HUGE + 77, 3 * HUGE + 300];
        let bound = Bound::to_node();
        for (i, page) in touched.into_iter().enumerate() {
            let huge = area.part(i * HUGE, HUGE);
            device_fill(device, huge.part(70, 20), 11);
            if i % 2 == 0 {
                area.page(page).check(11);
            } else {
                area.page(page).fill(12);
            }
            let work = device.counters().unwrap() - before;
            assert_split(&work, i as u64 + 1);
            assert_eq!(work.fault_back_pages, i as u64 + 1);
            assert!(work.cpu_fault_retries > i as u64, "{work:#?}");
            assert_place(device, area.page(page), Place::System);
            let first = page - i * HUGE;
            let rest = [huge.part(0, first), huge.part(first + 1, HUGE - 1 - first)];
            for rest in rest.into_iter().filter(|rest| rest.pages > 0) {
                // Who splits it may have a page in his hands still.
                eventually("all others are in VRAM", || {
                    places(device, rest).all(Place::Device)
                });
                assert_small(device, rest);
                device_check(device, rest, 11);
            }
            // All of it, and each where it is.
            assert_eq!(mirrored(device, huge), HUGE - 1);
            device_check(device, area.page(page), 11 + i as u64 % 2);
            assert_eq!(mirrored(device, huge), HUGE);
            (i + 1..4).for_each(|i| assert_large(device, area.part(i * HUGE, HUGE)));
        }
        for page in Random::new(5).order(area.pages) {
            let written = [touched[1], touched[3]].contains(&page);
            area.page(page).check(11 + u64::from(written));
        }
        let work = device.counters().unwrap() - before;
        assert_split(&work, 4);
        assert_eq!(work.fault_back_pages, 4 * HUGE as u64);

        // Several at a time, in several threads, each with pages of its own.
        drop(bound);
        let area = huge::resident(device, 4, 13);
        let bound = Bound::to_node();
        let before = device.counters().unwrap();
        std::thread::scope(|scope| {
            for thread in 0..3 {
                let area = *area;
                scope.spawn(move || {
                    for page in Random::new(thread).order(area.pages) {
                        if page % 3 == thread as usize {
                            area.page(page).check(13);
                        }
                    }
                });
            }
        });
        let work = device.counters().unwrap() - before;
        assert_split(&work, 4);
        assert_eq!(work.fault_back_pages, 4 * HUGE as u64);
        drop(bound);
        area.check(13);
    });
}

/// Catches a large folio that can be split for the one who moved it only: a child that never opened the device touches it, while the
/// parent has its file open, or no longer.
#[test]
fn a_stranger_s_touch_has_them_split_for_both_sides() {
    node::break_up();
    on_each_kind(|device| {
        let path = device.path();
        for keeps_its_file in [true, false] {
            let before = device.counters().unwrap();
            let parent = Child::fork(|_| {
                let file = Device::open_path(path).unwrap();
                let area = huge::resident(&file, 4, 1);
                let file = keeps_its_file.then_some(file);
                let _bound = Bound::to_node();
                let mut child = Child::fork(|parent| {
                    for i in 0..4 {
                        area.page(i * HUGE + 99 * i + 3).check(1);
                    }
                    area.part(HUGE - 2, 4).fill(2);
                    parent.send(0);
                    parent.receive();
                    area.part(0, HUGE - 2).check(1);
                    area.part(HUGE - 2, 4).check(2);
                    area.part(HUGE + 2, 3 * HUGE - 2).check(1);
                });
                child.receive();
                area.part(0, 2 * HUGE).check(1);
                area.part(HUGE, 2 * HUGE).fill(3);
                child.send(0);
                child.finish();
                area.part(0, HUGE).check(1);
                area.part(HUGE, 2 * HUGE).check(3);
                area.part(3 * HUGE, HUGE).check(1);
                drop(file);
            });
            parent.finish();
            let work = device.counters().unwrap() - before;
            assert_split(&work, 4);
        }
    });
}

/// Catches a folio that is split under the feet of somebody who has only a part of it, or has it at other addresses.
#[test]
fn parts_of_them_come_home() {
    node::break_up();
    on_each_kind(|device| {
        for by_request in [false, true] {
            Parts::each(device, 1, |mut parts| {
                let bound = Bound::to_node();
                if by_request {
                    for span in parts.spans() {
                        to_system(device, span);
                    }
                }
                parts.check();
                drop(bound);
                parts.fill(2);
            });
        }
    });
}

/// Catches an unbind that never ends, or loses a byte, when VRAM is full of large folios and none of them can come home whole: a
/// process's own, some that it shares with a child, another's that is stopped, and parts.
#[test]
fn an_unbind_with_vram_full_of_them_ends() {
    node::break_up();
    let (mut driver, device) = Driver::load_with("", IN_SLOT);
    let path = device.path();
    let own = huge::resident(&device, 8, 1);
    let mut other = Child::fork(|test| {
        let device = Device::open_path(path).unwrap();
        let area = huge::resident(&device, 8, 2);
        test.send(0);
        test.receive();
        area.check(2);
        drop(device);
    });
    other.receive();
    other.signal(libc::SIGSTOP);
    let shared = huge::resident(&device, 8, 3);
    let mut child = Child::fork(|test| {
        shared.part(HUGE + 5, 3).unmap();
        test.send(0);
        test.receive();
        shared.part(0, HUGE + 5).check(3);
        shared.part(HUGE + 8, 7 * HUGE - 8).check(3);
    });
    child.receive();
    // Half of one is still at its place, half is somewhere else.
    let rest = huge::resident(&device, 8, 4);
    let room = Area::offset(9, HUGE);
    let away = huge::remap(rest.part(HUGE / 2, HUGE), room.addr, 0);
    let description = device.describe().unwrap();
    assert_eq!(description.vram_free_bytes, 0, "{description}");

    soon(|| driver.unbind(IN_SLOT));
    let huge = kernel::smaps(own.addr, "AnonHugePages");
    assert!(
        huge < own.bytes() as u64 >> 10,
        "{huge} KiB came home whole"
    );
    own.check(1);
    shared.check(3);
    rest.part(0, HUGE / 2).check(4);
    away.check(4);
    rest.part(3 * HUGE / 2, rest.pages - 3 * HUGE / 2).check(4);
    other.signal(libc::SIGCONT);
    for mut process in [other, child] {
        process.send(0);
        process.finish();
    }
    drop((own, shared, rest, room, device));
    driver.finish();

    node::break_up();
    let (mut driver, device) = Driver::load_with("add_resource=1", GPUS[0]);
    let mut parts = Parts::all(&device, 5);
    soon(|| driver.unbind(GPUS[0]));
    parts.check();
    parts.fill(6);
    drop((parts, device));
    driver.finish();
}

/// Does something with the node's memory only, which must be done soon. It is given more after a while, so that it ends.
#[track_caller]
fn soon(work: impl FnOnce()) {
    let limit = patience(Duration::from_secs(15));
    let start = Instant::now();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) && start.elapsed() < limit {
                std::thread::sleep(Duration::from_millis(20));
            }
            if !done.load(Ordering::Relaxed) {
                node::mend();
            }
        });
        let bound = Bound::to_node();
        work();
        drop(bound);
        done.store(true, Ordering::Relaxed);
    });
    let took = start.elapsed();
    println!("it took {took:?}");
    assert!(took < limit, "{took:?}");
}

/// Catches a removal of the module that waits for pages of a process that has no file open any more (it must not have), or never had
/// one.
#[test]
fn the_module_goes_although_nobody_has_a_file_open() {
    node::break_up();
    let mut driver = Driver::load("soft=1 soft_mib=16");
    drop(driver.bind(GPUS[0]));
    let owner = |unit: u32| {
        Child::fork(move |test| {
            let device = Device::open(unit).unwrap();
            let area = huge::resident(&device, 2, 1);
            drop(device);
            let child = Child::fork(|_| {
                test.send(0);
                test.receive();
                area.check(1);
            });
            // Only the child has them from now on.
            area.unmap();
            child.finish();
            std::mem::forget(area);
        })
    };
    let mut owners = [owner(0), owner(1)];
    owners.iter_mut().for_each(|owner| {
        owner.receive();
    });
    let devices = [0, 1].map(|unit| Device::open(unit).unwrap());
    let areas = devices
        .each_ref()
        .map(|device| huge::resident(device, 2, 2));
    drop(devices);
    soon(|| driver.try_remove().unwrap());
    areas.iter().for_each(|area| area.check(2));
    for mut owner in owners {
        owner.send(0);
        owner.finish();
    }
    driver.finish();
}

/// Catches anything that is lost when large folios are split, by requests and by touches, while their owners make them anew, discard,
/// unmap, protect, remap, fork and check them.
#[test]
fn everything_at_once_loses_nothing_while_they_are_split() {
    node::break_up();
    let (mut driver, device) = Driver::load_with("", GPUS[0]);
    let devices = [device, driver.bind(GPUS[1])];
    turmoil(&devices, Bound::to_node);
    let work = devices.each_ref().map(|device| device.counters().unwrap());
    let large = |work: &Counters| [work.large_to_device, work.large_failures];
    let [one, other] = work.each_ref().map(large);
    assert!(one[0] + other[0] > 2 && one[1] + other[1] > 0, "{work:#?}");
    drop(devices);
    driver.finish();
}
