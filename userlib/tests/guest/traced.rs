//! What the kernel's tracing shows of the driver, and what the counters say of the same.
//!
//! Runs in the virtual GPU host: `bench/test guest_traced`.

use std::fs;
use std::path::PathBuf;

use crate::common::child::Child;
use crate::common::driver::{add_up, counters, Driver, GPUS};
use crate::common::kernel::{self, number, TRACING};
use crate::common::memory::{Area, PAGE};
use crate::common::mirror::{device_check_by, device_fill_by, MIGRATE};
use crate::common::{to_device, to_system};
use hmm_gpu::{Counters, Device, Target};

/// The events of the driver, recorded until it is dropped.
struct Trace(PathBuf);

impl Trace {
    #[track_caller]
    fn on() -> Self {
        kernel::mount_tracing();
        let this = Self(PathBuf::from(TRACING));
        this.write("trace", "");
        this.write("events/hmm_gpu/enable", "1");
        this
    }

    #[track_caller]
    fn write(&self, file: &str, text: &str) {
        fs::write(self.0.join(file), text).unwrap_or_else(|error| panic!("{file}: {error}"));
    }

    /// The lines of an event since it was turned on, from what follows its name on.
    #[track_caller]
    fn lines(&self, event: &str) -> Vec<String> {
        let trace = fs::read_to_string(self.0.join("trace")).unwrap();
        let mark = format!(" {event}: ");
        trace
            .lines()
            .filter_map(|line| Some(line.split_once(&mark)?.1.to_owned()))
            .collect()
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        let _ = fs::write(self.0.join("events/hmm_gpu/enable"), "0");
    }
}

/// Catches events that are missing or that say something else than what happened: every way a page can move, with as many pages as the
/// counters have, and the time each phase took.
#[test]
fn every_migration_is_traced_as_it_is_counted() {
    let driver = Driver::load("soft=1 soft_mib=16 bounce_ms=10000");
    let device = Device::open(0).unwrap();
    let trace = Trace::on();
    let before = device.counters().unwrap();
    let room = device.describe().unwrap().vram_bytes as usize / PAGE;
    let (area, other) = (Area::filled(300, 1), Area::filled(room - 100, 2));
    to_device(&device, *area);
    to_system(&device, *area);
    device_fill_by(&device, *area, 3, MIGRATE);
    area.check(3);
    device_fill_by(&device, *area, 4, MIGRATE);
    to_device(&device, *other);
    device_check_by(&device, *area, 4, MIGRATE);
    other.part(0, 40).touch();
    let work = device.counters().unwrap() - before;

    let migrations = trace.lines("hmm_gpu_migrate");
    let moved = |cause: &str| -> u64 {
        let of = format!("hmm_gpu0 {cause}: ");
        let lines = migrations.iter().filter(|line| line.starts_with(&of));
        lines.map(|line| number(line, "moved")).sum()
    };
    assert_eq!(
        moved("request to device") + moved("device fault"),
        work.to_device_pages
    );
    assert_eq!(moved("device fault"), work.device_fault_pages);
    assert_eq!(moved("request to system"), work.to_system_pages);
    assert_eq!(moved("cpu fault"), work.fault_back_pages);
    assert_eq!(moved("pressure"), work.pressure_pages);
    for pages in [
        work.device_fault_pages,
        work.to_system_pages,
        work.fault_back_pages,
        work.pressure_pages,
    ] {
        assert!(pages > 0, "{work:#?}");
    }
    for (phase, nanoseconds) in [
        ("setup", work.setup_ns),
        ("copy", work.copy_ns),
        ("finalize", work.finalize_ns),
    ] {
        let sum: u64 = migrations.iter().map(|line| number(line, phase)).sum();
        assert_eq!(sum, nanoseconds, "{phase}");
        assert!(nanoseconds > 0, "{phase}");
    }

    let faults = trace.lines("hmm_gpu_cpu_fault");
    assert_eq!(faults.len() as u64, work.cpu_faults);
    let serviced = trace.lines("hmm_gpu_device_fault");
    let sum = |name| -> u64 { serviced.iter().map(|line| number(line, name)).sum() };
    assert_eq!(
        sum("device") + sum("system") + sum("failed"),
        work.device_faults
    );
    let evictions = trace.lines("hmm_gpu_evict");
    assert_eq!(evictions.len() as u64, work.evictions);
    let bounces = trace.lines("hmm_gpu_bounce");
    assert_eq!(bounces.len() as u64, work.bounces + work.kept_pages);
    assert!(work.bounces > 0);
    drop((area, other, device));
    driver.finish();
}

/// Catches a device that comes or goes and is not seen to.
#[test]
fn bind_and_unbind_are_traced() {
    let mut driver = Driver::load("soft=0");
    let trace = Trace::on();
    drop(driver.bind(GPUS[0]));
    driver.unbind(GPUS[0]);
    let lines = trace.lines("hmm_gpu_bind");
    let ends: Vec<&str> = lines
        .iter()
        .filter_map(|line| line.rsplit(' ').next())
        .collect();
    assert_eq!(ends, ["bound", "unbound"], "{lines:?}");
    assert_eq!(number(&lines[0], "bytes"), 256 << 20);
    driver.finish();
}

/// Catches counters that do not add up, whatever was done.
#[test]
fn the_counters_add_up() {
    let (driver, device) = Driver::load_with("", GPUS[0]);
    let area = Area::filled(700, 1);
    for seed in 2..5 {
        to_device(&device, area.part(0, 400));
        device_fill_by(&device, *area, seed, MIGRATE);
        area.part(100, 50).check(seed);
        area.part(200, 20).advise(libc::MADV_DONTNEED).unwrap();
        to_system(&device, area.part(500, 200));
    }
    let now: Counters = device.counters().unwrap();
    assert!(add_up(&counters(&device)), "{now:#?}");
    let gone = now.to_system_pages + now.fault_back_pages + now.pressure_pages + now.evicted_pages;
    let left = now.live_pages - now.table_pages;
    assert!(gone + left <= now.to_device_pages, "{now:#?}");
    // What is missing was discarded there.
    assert_eq!(now.to_device_pages - gone - left, 60);
    drop((area, device));
    driver.finish();
}

/// Catches what is counted for a client that another has done, or for none, and what is not counted for either: three processes, each with
/// work of its own kind, while all the others' goes on.
#[test]
fn what_clients_have_done_is_what_the_device_has() {
    let driver = Driver::load("soft=1 soft_mib=16 fault_around=64 bounce_ms=10000");
    let device = Device::open(0).unwrap();
    let room = device.describe().unwrap().vram_bytes as usize / PAGE;
    let mut children: Vec<Child> = (0..3)
        .map(|i| {
            Child::fork(|test| {
                let device = Device::open(0).unwrap();
                let area = Area::filled(room / 2, i);
                for round in 0..4 {
                    let seed = 10 * (i + 1) + round;
                    match i {
                        0 => drop(device.prefetch_range(area.addr, area.bytes(), Target::Device)),
                        1 => device_fill_by(&device, area.part(0, 900), seed, MIGRATE),
                        _ => drop(
                            device
                                .prefetch_range_async(area.addr, 700 * PAGE, Target::Device)
                                .unwrap()
                                .wait(),
                        ),
                    }
                    area.part(100, 50 * (i as usize + 1)).touch();
                    area.part(950, 20).advise(libc::MADV_DONTNEED).unwrap();
                }
                test.send(0);
                test.receive();
                let mut sums = vec![];
                for (_, value) in device.own_counters().unwrap().iter() {
                    sums.push(value);
                }
                sums.into_iter().for_each(|value| test.send(value));
                test.receive();
                if i == 1 {
                    area.part(0, 900).check(23);
                }
            })
        })
        .collect();
    for child in &mut children {
        child.receive();
    }
    assert!(add_up(&counters(&device)), "{:#?}", counters(&device));
    children.iter_mut().for_each(|child| child.send(0));
    let all = device.counters().unwrap();
    let mut of_clients: Vec<Vec<u64>> = vec![];
    for child in &mut children {
        of_clients.push(all.iter().map(|_| child.receive()).collect());
    }
    for (i, (name, whole)) in all.iter().enumerate() {
        let each: Vec<u64> = of_clients.iter().map(|values| values[i]).collect();
        let sum: u64 = each.iter().sum();
        match name {
            // With those of device page tables, which belong to nobody.
            "live_pages" => assert_eq!(sum + all.table_pages, whole, "{name}"),
            "allocated_pages" => assert_eq!(sum + all.table_pages_taken, whole, "{name}"),
            "freed_pages" => {
                let freed = all.table_pages_taken - all.table_pages;
                assert_eq!(sum + freed, whole, "{name}");
            }
            "table_pages_taken" | "insertion_failures" => assert_eq!(sum, 0, "{name}"),
            _ if name.ends_with("_ns") => {
                assert!(sum <= whole && sum > 0, "{name}: {each:?} of {whole}")
            }
            _ => assert_eq!(sum, whole, "{name}: {each:?}"),
        }
    }
    let of = |i: usize, name: &str| {
        let at = all.iter().position(|(one, _)| one == name).unwrap();
        of_clients[i][at]
    };
    assert_eq!((of(0, "device_faults"), of(2, "device_faults")), (0, 0));
    assert!(of(1, "device_faults") >= 900);
    assert!(of(0, "to_device_pages") >= room as u64 / 2 - 20);
    assert!((0..3).all(|i| of(i, "fault_back_pages") > 0));
    children.iter_mut().for_each(|child| child.send(0));
    children.into_iter().for_each(Child::finish);
    // A client that comes begins with nothing.
    let fresh = Device::open(0).unwrap().own_counters().unwrap();
    assert!(fresh.iter().all(|(_, value)| value == 0), "{fresh:#?}");
    drop(device);
    driver.finish();
}
