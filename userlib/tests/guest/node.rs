//! Nodes and what they say: numbers, permissions, descriptions and counters.
//!
//! Runs in the virtual GPU host, with udev and the driver's rule: `bench/test guest_node`.

use std::os::unix::fs::MetadataExt;

use crate::common::child::Child;
use crate::common::driver::{on_each_kind, Driver, GPUS};
use crate::common::kernel::{Log, Resource};
use crate::common::memory::{errno, Area};
use crate::common::{eventually, moved, refused, to_device, to_system};
use hmm_gpu::{Capabilities, Device, Errno, Form, Source, Target};

/// The number of the group `render`.
fn render() -> u32 {
    let groups = std::fs::read_to_string("/etc/group").unwrap();
    let line = groups
        .lines()
        .find(|line| line.starts_with("render:"))
        .unwrap();
    line.split(':').nth(2).unwrap().parse().unwrap()
}

/// Catches a rule that udev does not take, or that opens a device to everybody, or to nobody.
#[test]
fn a_node_is_for_the_group_render() {
    let become_nobody = |groups: &[libc::gid_t]| {
        // SAFETY: as many groups as there are.
        errno(unsafe { libc::setgroups(groups.len(), groups.as_ptr()) }).unwrap();
        // SAFETY: always fine to call.
        errno(unsafe { libc::setgid(65534) }).unwrap();
        // SAFETY: as above.
        errno(unsafe { libc::setuid(65534) }).unwrap();
    };
    on_each_kind(|device| {
        let path = device.path();
        eventually("udev has set the node's group and mode", || {
            let node = std::fs::metadata(path).unwrap();
            (node.gid(), node.mode() & 0o7777) == (render(), 0o660)
        });
        Child::fork(|_| {
            become_nobody(&[render()]);
            let device = Device::open_path(path).unwrap();
            let area = Area::filled(20, 1);
            device
                .prefetch_range(area.addr, area.bytes(), Target::Device)
                .unwrap();
            assert_eq!(device.counters().unwrap().live_pages, 20);
            area.check(1);
        })
        .finish();
        Child::fork(|_| {
            become_nobody(&[]);
            assert_eq!(refused(Device::open_path(path)), Errno::ACCESS);
        })
        .finish();
    });
}

/// Catches defaults that change: whoever only loads the module has one soft device.
#[test]
fn a_plain_insmod_makes_one_soft_device() {
    let driver = Driver::load("");
    assert_eq!(Device::list(), [0]);
    let device = Device::open_first().unwrap();
    let description = device.describe().unwrap();
    assert_eq!(description.source, Source::Soft);
    assert_eq!(description.form, Form::Add);
    assert_eq!(description.vram_bytes, 64 << 20);
    drop(device);
    driver.finish();
}

/// Catches numbers that are not the lowest free ones, are given twice, or are not given back.
#[test]
fn devices_have_the_lowest_free_numbers() {
    let mut driver = Driver::load("soft=3 soft_mib=4");
    assert_eq!(Device::list(), [0, 1, 2]);
    for unit in 0..3 {
        let description = Device::open(unit).unwrap().describe().unwrap();
        assert_eq!((description.unit, description.vram_bytes), (unit, 4 << 20));
    }
    for (gpu, unit) in GPUS.into_iter().zip(3..) {
        assert_eq!(driver.bind(gpu).unit(), unit);
    }
    driver.unbind(GPUS[1]);
    driver.unbind(GPUS[2]);
    assert_eq!(Device::list(), [0, 1, 2, 3, 6]);
    assert_eq!(driver.bind(GPUS[2]).unit(), 4);
    assert_eq!(driver.bind(GPUS[1]).unit(), 5);
    driver.finish();

    // All numbers are taken.
    let mut driver = Driver::load("soft=32 soft_mib=2");
    assert_eq!(Device::list(), (0..32).collect::<Vec<u32>>());
    let mut log = Log::from_now();
    assert_eq!(driver.try_bind(GPUS[0]), Err(Errno::NOSPC));
    log.expect(&["hmm_gpu", "no device number is free"]);
    driver.finish();
}

/// Catches a description that is wrong, of each of the devices there are.
#[test]
fn a_description_says_what_the_device_is() {
    for (parameters, form) in [("", Form::Add), ("add_resource=1", Form::AddResource)] {
        let mut driver = Driver::load(&format!("soft=1 soft_mib=6 {parameters}"));
        let soft = Device::open(0).unwrap().describe().unwrap();
        assert_eq!(
            (soft.source, soft.pci, soft.form),
            (Source::Soft, None, Form::Add)
        );
        assert_eq!((soft.vram_bytes, soft.vram_free_bytes), (6 << 20, 6 << 20));
        for (gpu, unit) in GPUS.into_iter().zip(1..) {
            let bars = Resource::of_device(gpu);
            let bar = bars.iter().max_by_key(|bar| bar.bytes()).unwrap();
            let device = driver.bind(gpu);
            let description = device.describe().unwrap();
            assert_eq!(description.path, device.path());
            assert_eq!((description.unit, description.version), (unit, 6));
            assert_eq!(description.source, Source::Pci);
            assert_eq!(description.form, form);
            assert_eq!(description.pci.unwrap().to_string(), gpu);
            assert_eq!(
                (description.vram_bytes, description.vram_free_bytes),
                (bar.bytes(), bar.bytes())
            );
            assert_eq!(description.block_bytes, 2 << 20);
            for one in [
                Capabilities::MIGRATE,
                Capabilities::RESIDENCY,
                Capabilities::COUNTERS,
                Capabilities::FAULT_BACK,
                Capabilities::MIRROR,
                Capabilities::ATOMIC,
                Capabilities::ADVICE,
                Capabilities::PREFETCH,
            ] {
                assert!(description.capabilities.contains(one));
            }
            assert!(!description.capabilities.contains(Capabilities::COHERENT));
        }
        driver.finish();
    }
}

/// Catches a counter that counts something else, or nothing, or for another device.
#[test]
fn counters_say_what_was_done() {
    on_each_kind(|device| {
        let start = device.counters().unwrap();
        assert_eq!(start.live_pages, 0);
        let since = || device.counters().unwrap() - start;

        let area = Area::new(100);
        area.advise(libc::MADV_NOHUGEPAGE).unwrap();
        area.part(0, 60).fill(1);
        to_device(device, *area);
        let work = since();
        assert_eq!(
            (work.live_pages, work.allocated_pages, work.freed_pages),
            (100, 100, 0)
        );
        assert_eq!((work.to_device_pages, work.populated_pages), (100, 40));

        to_system(device, area.part(0, 30));
        area.part(30, 20).check(1);
        let work = since();
        assert_eq!((work.to_system_pages, work.fault_back_pages), (30, 20));
        assert!(work.cpu_faults >= 20);
        assert_eq!((work.live_pages, work.freed_pages), (50, 50));

        area.part(50, 50).advise(libc::MADV_DONTNEED).unwrap();
        let shared = Area::shared(7);
        shared.fill(2);
        let counts = device
            .prefetch_range(shared.addr, shared.bytes(), Target::Device)
            .unwrap();
        assert_eq!(counts, moved(0, 0, 7, 0));
        let work = since();
        assert_eq!((work.live_pages, work.skipped_pages), (0, 7));
        assert_eq!((work.allocated_pages, work.freed_pages), (100, 100));
        assert_eq!(
            (work.evicted_pages, work.vram_failures, work.system_failures),
            (0, 0, 0)
        );
    });
}
