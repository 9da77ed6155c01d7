//! What takes the bytes of VRAM away: sleep, reset, removal. Pages leave before, or it does not happen.
//!
//! Runs in the virtual GPU host: `bench/test guest_power`.

use std::fs;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::common::driver::{self, is_bound, Driver, GPUS, IN_SLOT};
use crate::common::memory::Area;
use crate::common::{assert_place, eventually, refused, to_device, Stop};
use hmm_gpu::{Device, Errno, Place, Policy};

/// Puts the machine to sleep, as far as its processes: what the kernel itself offers as a test. Its file servers would not let it go
/// further.
pub fn sleep(state: &str) {
    driver::write("/sys/module/suspend/parameters/pm_test_delay", "0").unwrap();
    driver::write("/sys/power/pm_test", "freezer").unwrap();
    driver::write("/sys/power/state", state).unwrap();
    driver::write("/sys/power/pm_test", "none").unwrap();
}

/// The device reads all of it, and finds what `seed` put there.
fn device_check(device: &Device, area: &Area, seed: u64, policy: Policy) {
    let expected = Area::filled(area.pages, seed);
    let mut found = vec![0u8; area.bytes()];
    device.read_at(area.addr, &mut found, policy).unwrap();
    // SAFETY: the area is mapped, and nobody writes to it.
    let expected = unsafe { std::slice::from_raw_parts(expected.addr as *const u8, area.bytes()) };
    assert!(found == expected, "the device reads other bytes");
}

/// Catches bytes that are left in VRAM over a sleep, a device page table that is believed after it, and VRAM that cannot be used any
/// more.
#[test]
fn sleep_finds_vram_empty_and_all_goes_on_after_it() {
    for state in ["mem", "disk"] {
        let (driver, device) = Driver::load_with("", GPUS[0]);
        let resident = Area::filled(700, 1);
        let mapped = Area::filled(700, 2);
        to_device(&device, *resident);
        device_check(&device, &resident, 1, Policy::Map);
        device_check(&device, &mapped, 2, Policy::Map);
        let before = device.counters().unwrap();
        assert!(device.mirror().unwrap().entries >= 1400);

        sleep(state);

        let after = device.counters().unwrap() - before;
        assert_eq!(after.evicted_pages, 700, "for {state}");
        assert_eq!(device.mirror().unwrap().entries, 0, "for {state}");
        assert_place(&device, *resident, Place::System);
        device_check(&device, &resident, 1, Policy::Map);
        device_check(&device, &mapped, 2, Policy::Migrate);
        assert_place(&device, *mapped, Place::Device);
        to_device(&device, *resident);
        resident.check(1);
        mapped.check(2);
        drop((device, resident, mapped));
        driver.finish();
    }
}

/// Catches a device access that is lost, refused or done wrong because the host falls asleep under it.
#[test]
fn what_runs_while_the_host_falls_asleep_goes_on_when_it_wakes() {
    let (driver, device) = Driver::load_with("", GPUS[0]);
    let stop = AtomicBool::new(false);
    let rounds: [AtomicU64; 3] = Default::default();
    std::thread::scope(|scope| {
        for (i, rounds) in rounds.iter().enumerate() {
            let (device, stop) = (&device, &stop);
            scope.spawn(move || {
                let mut area = Area::filled(64, i as u64);
                let mut round = i as u64;
                while !stop.load(Ordering::Relaxed) {
                    let policy = if round % 2 == 0 {
                        Policy::Migrate
                    } else {
                        Policy::Map
                    };
                    device_check(device, &area, round, policy);
                    round += 1;
                    let next = Area::filled(64, round);
                    // SAFETY: both areas are mapped, and this thread's own.
                    unsafe { device.copy_at(next.addr, area.addr, area.bytes(), policy) }.unwrap();
                    if round % 3 == 0 {
                        to_device(device, *area);
                    }
                    rounds.fetch_add(1, Ordering::Relaxed);
                    if round % 50 == 0 {
                        area = next;
                    }
                }
                area.check(round);
            });
        }
        let _stop = Stop(&stop);
        for _ in 0..8 {
            let before = rounds
                .each_ref()
                .map(|rounds| rounds.load(Ordering::Relaxed));
            sleep("mem");
            eventually("every thread goes on", || {
                rounds
                    .iter()
                    .zip(before)
                    .all(|(now, before)| now.load(Ordering::Relaxed) > before)
            });
        }
    });
    drop(device);
    driver.finish();
}

/// Catches a reset of a device that has pages, and a device that cannot be reset when it is free again.
#[test]
fn a_reset_is_refused_while_a_device_is_bound() {
    let reset = format!("/sys/bus/pci/devices/{IN_SLOT}/reset");
    let methods = || fs::read_to_string(format!("/sys/bus/pci/devices/{IN_SLOT}/reset_method"));
    let (before, mut driver) = (methods().unwrap(), Driver::load("soft=0"));
    assert_ne!(before.trim(), "", "the device in the slot can be reset");
    let device = driver.bind(IN_SLOT);
    let area = Area::filled(300, 3);
    to_device(&device, *area);
    assert_eq!(driver::write(&reset, "1"), Err(Errno::NOTTY));
    device_check(&device, &area, 3, Policy::Map);
    area.check(3);
    drop((device, area));
    driver.unbind(IN_SLOT);
    assert_eq!(methods().unwrap(), before);
    driver::write(&reset, "1").unwrap();
    // And it works afterwards.
    let device = driver.bind(IN_SLOT);
    let area = Area::filled(300, 4);
    to_device(&device, *area);
    area.check(4);
    drop((device, area));
    driver.finish();
}

/// Catches bytes that go with a device that is taken out, and a device that cannot come back.
#[test]
fn a_removed_device_leaves_the_bytes_behind() {
    let mut driver = Driver::load("soft=0");
    for round in 0..3 {
        let device = driver.bind(IN_SLOT);
        let area = Area::filled(2000, round);
        to_device(&device, *area);
        device_check(&device, &area, round, Policy::Map);
        driver::write(&format!("/sys/bus/pci/devices/{IN_SLOT}/remove"), "1").unwrap();
        assert!(!is_bound(IN_SLOT));
        driver.lost(IN_SLOT);
        assert_eq!(refused(device.counters()), Errno::NODEV);
        let mut byte = [0];
        let read = device.read_at(area.addr, &mut byte, Policy::Map);
        assert_eq!(refused(read), Errno::NODEV);
        area.check(round);
        drop((device, area));
        driver::write("/sys/bus/pci/rescan", "1").unwrap();
    }
    driver.finish();
}
