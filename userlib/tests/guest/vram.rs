//! VRAM: taken, given back, full, of several devices, and never handed out with what was in it.
//!
//! Runs in the virtual GPU host: `bench/test guest_vram`.

use std::fs;
use std::os::fd::AsRawFd;

use crate::common::child::Child;
use crate::common::driver::{assert_empty, on_each_kind, Driver, GPUS};
use crate::common::kernel::Resource;
use crate::common::memory::{Area, HUGE, PAGE};
use crate::common::mirror::{device_check_zero, device_fill_by, device_words, MAP, MIGRATE};
use crate::common::{assert_place, assert_witness, moved, places, to_device, to_system};
use hmm_gpu::{Device, Errno, Place, Target};

const RW: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;

/// Catches VRAM that is handed out with what was in it: untouched memory arrives as zeroes, although all of the VRAM held
/// something else just before.
#[test]
fn untouched_memory_arrives_as_zeroes() {
    let driver = Driver::load("soft=1 soft_mib=8");
    let device = Device::open(0).unwrap();
    let pages = (8 << 20) / PAGE;
    let old = Area::filled(pages, 5);
    to_device(&device, *old);
    drop(old);
    let before = device.counters().unwrap();
    let area = Area::new(pages);
    // Of some, the kernel's zero page is mapped already.
    area.part(100, 100).advise(libc::MADV_NOHUGEPAGE).unwrap();
    area.part(100, 50).touch();
    assert_eq!(to_device(&device, *area), moved(pages, 0, 0, 0));
    let work = device.counters().unwrap() - before;
    assert_eq!(
        (work.to_device_pages, work.populated_pages),
        (pages as u64, pages as u64)
    );
    area.part(0, pages / 2).check_zero();
    to_system(&device, area.part(pages / 2, pages / 2));
    area.check_zero();
    drop((area, device));
    driver.finish();
}

/// Catches VRAM, be it of pages or of tables, that another process gets with what was in it: all of it is written by one, which ends in
/// whatever way, and scanned by another's device.
#[test]
fn another_process_finds_nothing_in_all_of_the_vram() {
    let driver = Driver::load("soft=1 soft_mib=16");
    let pages = (16 << 20) / PAGE;
    for ends in 0..3 {
        let secret = Child::fork(|link| {
            let device = Device::open(0).unwrap();
            // In many places, for the sake of its tables, and huge, and as much as there is room for.
            let sparse = Area::new(64 * HUGE);
            sparse.advise(libc::MADV_NOHUGEPAGE).unwrap();
            (0..64).for_each(|i| device_fill_by(&device, sparse.page(i * HUGE), 1, MIGRATE));
            let area = Area::new(pages);
            let advice = [libc::MADV_NOHUGEPAGE, libc::MADV_HUGEPAGE][ends % 2];
            area.advise(advice).unwrap();
            device_fill_by(&device, *area, 1, MIGRATE);
            link.send(0);
            link.receive();
            if ends == 0 {
                area.advise(libc::MADV_DONTNEED).unwrap();
            }
        });
        let mut secret = secret;
        secret.receive();
        if ends == 2 {
            secret.kill();
        } else {
            secret.send(0);
            secret.finish();
        }
        Child::fork(|_| {
            let device = Device::open(0).unwrap();
            let area = Area::new(pages);
            // All but the tables that it takes to look.
            for i in 0..pages / HUGE {
                device_check_zero(&device, area.part(i * HUGE, HUGE));
            }
            let part = area.part(0, pages - 64);
            part.advise(libc::MADV_DONTNEED).unwrap();
            to_device(&device, part);
            for i in 0..part.pages / HUGE {
                let words = device_words(&device, part.part(i * HUGE, HUGE), MAP);
                assert_eq!(words.iter().find(|word| **word != 0), None);
            }
            part.check_zero();
        })
        .finish();
    }
    driver.finish();
}

/// Catches VRAM that is not given back, at each of the ways that memory goes.
#[test]
fn vram_is_free_again_as_soon_as_its_memory_is_gone() {
    on_each_kind(|device| {
        let live = || device.counters().unwrap().live_pages;
        let area = Area::filled(300, 61);
        to_device(device, *area);
        assert_eq!(live(), 300);
        let free = device.describe().unwrap().vram_free_bytes;
        assert_eq!(
            device.describe().unwrap().vram_bytes - free,
            300 * PAGE as u64
        );
        area.part(0, 50).advise(libc::MADV_DONTNEED).unwrap();
        assert_eq!(live(), 250);
        area.part(0, 50).check_zero();
        area.part(50, 50).unmap();
        assert_eq!(live(), 200);
        area.part(100, 50)
            .map_over(RW, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1);
        assert_eq!(live(), 150);
        let shrunk = area.part(150, 150);
        // SAFETY: the pages are the test's own.
        let kept = unsafe { libc::mremap(shrunk.addr as *mut _, shrunk.bytes(), 100 * PAGE, 0) };
        assert_eq!(kept as usize, shrunk.addr);
        assert_eq!(live(), 100);
        // Backwards, so that nothing comes along.
        (150..200).rev().for_each(|page| area.page(page).check(61));
        assert_eq!(live(), 50);
        area.part(200, 50).check(61);
        assert_eq!(live(), 0);
    });
}

/// Catches a full device that loses what did not fit, hides how far it came, or stays full.
#[test]
fn a_full_device_says_so_and_loses_nothing() {
    let driver = Driver::load("soft=1 soft_mib=8");
    let device = Device::open(0).unwrap();
    let room = device.describe().unwrap().vram_bytes as usize / PAGE;
    let area = Area::offset(77, room + 900);
    let ask = || {
        let error = device
            .prefetch_range(area.addr, area.bytes(), Target::Device)
            .unwrap_err();
        assert_eq!(error.errno(), Some(Errno::NOSPC));
        error.moved().unwrap()
    };
    for (populate, seed) in [(false, 111), (true, 112)] {
        if populate {
            area.advise(libc::MADV_DONTNEED).unwrap();
        } else {
            area.fill(seed);
        }
        assert_eq!(ask(), moved(room, 0, 0, 0), "as much as there is room for");
        assert_eq!(device.describe().unwrap().vram_free_bytes, 0);
        assert_eq!(ask(), moved(0, room, 0, 0));
        assert_place(&device, area.part(0, room), Place::Device);
        if populate {
            area.check_zero();
        } else {
            area.check(seed);
        }
        assert_empty(&device);
    }
    assert_eq!(device.counters().unwrap().vram_failures, 4);
    let all = area.part(500, room);
    all.fill(113);
    to_device(&device, all);
    all.check(113);
    drop((area, device));
    driver.finish();
}

/// Catches a device that takes another's pages for its own, or for system memory.
#[test]
fn two_devices_tell_their_pages_apart() {
    let mut driver = Driver::load("soft=1 soft_mib=16");
    let soft = Device::open(0).unwrap();
    let gpu = driver.bind(GPUS[0]);
    let area = Area::filled(60, 101);
    to_device(&soft, area.part(0, 30));
    to_device(&gpu, area.part(30, 20));
    let seen = |device: &Device| {
        let residency = places(device, *area);
        assert_witness(&residency);
        residency.counts()
    };
    let (by_soft, by_gpu) = (seen(&soft), seen(&gpu));
    assert_eq!(
        (by_soft.device, by_soft.other_device, by_soft.system),
        (30, 20, 10)
    );
    assert_eq!(
        (by_gpu.device, by_gpu.other_device, by_gpu.system),
        (20, 30, 10)
    );

    // Through any device's file, all of it goes back to system memory, and each device counts what it lost.
    assert_eq!(to_system(&gpu, *area), moved(50, 10, 0, 0));
    assert_eq!(soft.counters().unwrap().to_system_pages, 30);
    assert_eq!(gpu.counters().unwrap().to_system_pages, 20);
    area.check(101);

    // And they go from one device to the other when they are asked to.
    to_device(&soft, *area);
    to_system(&soft, area.part(20, 20));
    let across = gpu.prefetch_range(area.addr, area.bytes(), Target::Device);
    assert_eq!(across.unwrap(), moved(60, 0, 0, 0));
    assert_eq!((seen(&gpu).device, seen(&soft).other_device), (60, 60));
    area.check(101);
    drop((area, soft, gpu));
    driver.finish();
}

/// Catches VRAM that keeps what was in it when its device is given to another driver: after unbind, the BAR has none of it.
#[test]
fn after_unbind_nothing_is_left_in_the_bar() {
    let gpu = GPUS[0];
    let (mut driver, device) = Driver::load_with("", gpu);
    let secret = Area::filled(700, 99);
    to_device(&device, *secret);
    // One page went before, the others come back by the unbind.
    secret.part(0, 100).check(99);
    drop(device);
    driver.unbind(gpu);
    secret.check(99);

    let bars = Resource::of_device(gpu);
    let pages = bars.iter().map(Resource::bytes).max().unwrap() as usize / PAGE;
    let file = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(format!("/sys/bus/pci/devices/{gpu}/resource0"))
        .unwrap();
    let bar = Area::new(pages);
    bar.map_over(RW, libc::MAP_SHARED, file.as_raw_fd());
    // SAFETY: mapped, and nobody writes to it.
    let word = |place: usize| unsafe { (place as *const u64).read_volatile() };
    let secrets: Vec<u64> = (0..700).map(|page| word(secret.page(page).addr)).collect();
    let found = (0..pages).find(|&page| secrets.contains(&word(bar.page(page).addr)));
    assert_eq!(found, None, "a page of the BAR has the process's bytes");
    drop(bar);
    driver.finish();
}
