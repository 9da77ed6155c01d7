//! The seven patches of "mm: Rework hmm to use devm_memremap_pages", each shown to hold for this driver: the first table of the
//! design. A test for each row; patches 1 and 7 make one.
//!
//! Runs in the virtual GPU host: `bench/test guest_patches`.

use std::fs;
use std::path::Path;

use crate::common::driver::{assert_empty, is_bound, on_each_kind, try_device_of, Driver, GPUS};
use crate::common::kernel::{self, Entry, Log, Resource};
use crate::common::memory::{Area, PAGE};
use crate::common::{places, to_device};
use hmm_gpu::{Device, Errno, Form, Place};

/// Patches 1 and 7: what reaches deep into mm is for GPL modules only.
///
/// Catches a module that says another licence, or that reaches device memory by a way that is not GPL-only: the same file with
/// another licence in it must lack these very symbols.
#[test]
fn patch_1_and_7_the_module_loads_because_it_is_gpl_and_not_otherwise() {
    let module = fs::read(kernel::MODULE).unwrap();
    let licence = b"license=GPL\0";
    let at: Vec<usize> = (0..module.len())
        .filter(|&at| module[at..].starts_with(licence))
        .collect();
    assert_eq!(at.len(), 1, "the module says once that its licence is GPL");

    let mut other = module.clone();
    other[at[0]..][..licence.len()].copy_from_slice(b"license=MIT\0");
    let path = Path::new("/tmp/hmm_gpu.ko");
    fs::write(path, other).unwrap();
    let iomem = kernel::iomem();
    let mut log = Log::from_now();
    assert_eq!(
        kernel::insert_module(path, ""),
        Err(Errno::NOENT),
        "it must not load"
    );
    assert!(!kernel::is_loaded());
    assert_eq!(kernel::iomem(), iomem);
    let lines = log.lines();
    for symbol in [
        "devm_memremap_pages",
        "devm_memunmap_pages",
        "devm_request_free_mem_region",
    ] {
        let line = format!("hmm_gpu: Unknown symbol {symbol} (err -2)");
        assert!(
            lines.contains(&line),
            "the log lacks {line:?}; it has {lines:#?}"
        );
    }

    // It was the licence, and nothing else about the copy.
    fs::write(path, module).unwrap();
    assert_eq!(kernel::insert_module(path, "soft=0"), Ok(()));
    assert_eq!(kernel::remove_module(), Ok(()));
    fs::remove_file(path).unwrap();
}

/// Patch 2: System RAM is never taken for device memory.
///
/// Catches a range that is checked at one end only, or after the core has warned (the run fails on a warning in the log), and
/// what a refusal leaves behind.
#[test]
fn patch_2_a_range_that_overlaps_system_ram_is_refused() {
    let before = kernel::iomem();
    let whole = kernel::some_system_ram(&before);
    // The last of low memory ends where firmware data begins: half of the 2 MiB is RAM.
    let partly = Resource::list(&before)
        .into_iter()
        .filter(|ram| ram.name == "System RAM")
        .map(|ram| ram.end & !((2 << 20) - 1))
        .find(|start| !before.contains(&format!("{start:x}-")) && *start > (1 << 20))
        .unwrap();
    for start in [whole, partly] {
        let mut log = Log::from_now();
        let loaded = Driver::try_load(&format!("soft=1 offer_ram={start:#x}"));
        assert_eq!(loaded.err(), Some(Errno::NXIO), "{start:#x}");
        log.expect(&[
            "refused: it overlaps System RAM",
            &format!("{start:#x}-{:#x}", start + (2 << 20) - 1),
        ]);
        assert!(!kernel::is_loaded());
        assert_eq!(kernel::iomem(), before);
        assert_eq!(Device::list(), [] as [u32; 0]);
    }
    // Not for another reason: what is no System RAM (a BAR that nobody uses) is taken, and taken down again.
    let bars = Resource::of_device(GPUS[2]);
    let bar = bars.iter().max_by_key(|bar| bar.bytes()).unwrap();
    let driver = Driver::load(&format!("soft=0 offer_ram={:#x}", bar.start));
    assert_eq!(kernel::iomem(), before);
    driver.finish();
}

/// Patch 3: teardown ends the registration for good, on every path, so that the same range can be registered again.
///
/// Catches a page map whose reference is not killed or not drained: the second bind would fail, or the unbind never end. (A
/// hundred times and under load: `guest_teardown`.)
#[test]
fn patch_3_the_same_vram_is_bound_again_after_every_way_to_unbind() {
    for parameters in ["add_resource=1", "add_resource=0"] {
        let mut driver = Driver::load(&format!("soft=0 {parameters}"));
        let mut pages = vec![];
        let mut use_it = |device: &Device| {
            let area = Area::filled(64, 3);
            to_device(device, *area);
            let first = kernel::pagemap(std::process::id(), area.addr, 1)[0];
            area.check(3);
            pages.push(first);
        };
        for _ in 0..3 {
            let device = driver.bind(GPUS[1]);
            use_it(&device);
            driver.unbind(GPUS[1]);
            // The file outlives the device, and holds nothing of it.
            drop(device);
            assert_eq!(kernel::iomem(), driver.iomem_before());
        }
        // With pages in VRAM.
        let area = Area::filled(64, 4);
        let device = driver.bind(GPUS[1]);
        to_device(&device, *area);
        driver.unbind(GPUS[1]);
        area.check(4);
        // By unloading, and by another load.
        drop((driver.bind(GPUS[1]), device));
        driver.try_remove().unwrap();
        driver.finish();
        let (driver, device) = Driver::load_with(parameters, GPUS[1]);
        use_it(&device);
        drop(device);
        driver.finish();
        let Entry::DevicePrivate { pfn, .. } = pages[0] else {
            panic!("{pages:?}");
        };
        let same = |entry: &Entry| matches!(entry, Entry::DevicePrivate { pfn: other, .. } if pfn.abs_diff(*other) < 64 << 10);
        assert!(
            pages.iter().all(same),
            "it was the same range each time: {pages:x?}"
        );
    }
}

/// Patch 4: the pages are `MEMORY_DEVICE_PRIVATE`.
///
/// Catches any other type of memory: the kernel itself says so of every page (the page table has no address that a CPU could
/// use), and has them where the device is registered.
#[test]
fn patch_4_pages_in_vram_are_device_private() {
    on_each_kind(|device| {
        let pages = 200;
        let area = Area::filled(pages, 5);
        to_device(device, *area);
        let mut frames: Vec<u64> = kernel::pagemap(std::process::id(), area.addr, pages)
            .into_iter()
            .map(|entry| match entry {
                Entry::DevicePrivate { pfn, .. } => pfn,
                other => panic!("the kernel says {other:x?}"),
            })
            .collect();
        frames.sort_unstable();
        frames.dedup();
        assert_eq!(frames.len(), pages, "each has a page of its own");
        let iomem = kernel::iomem();
        let in_ram = |ram: &Resource| {
            ram.name == "System RAM" && frames.iter().any(|&frame| ram.has_page(frame))
        };
        assert!(
            !Resource::list(&iomem).iter().any(in_ram),
            "they are none of the system's"
        );
        // Resident, and yet neither mapped for the CPU nor in any swap.
        assert_eq!(
            kernel::smaps(area.addr, "Rss"),
            (pages * PAGE / 1024) as u64
        );
        assert_eq!(kernel::smaps(area.addr, "Swap"), 0);
        area.check(5);
        let back = kernel::pagemap(std::process::id(), area.addr, pages);
        assert!(
            back.iter()
                .all(|entry| matches!(entry, Entry::Present { .. })),
            "a touch brings them where a CPU can use them"
        );
    });
}

/// Patch 5: what probe took is owned, and goes by itself, wherever probe ends.
///
/// Catches a step of probe that leaves something behind when a later one fails: a node, a region, a mapping, memory, a number, the
/// device's being enabled.
#[test]
fn patch_5_a_probe_that_fails_at_any_step_leaves_nothing() {
    let gpu = GPUS[0];
    let enabled = || fs::read_to_string(format!("/sys/bus/pci/devices/{gpu}/enable")).unwrap();
    let bars = Resource::of_device(gpu);
    let bar = bars.iter().max_by_key(|bar| bar.bytes()).unwrap();
    let of_bar = format!("phys={:#018x}", bar.start);
    let mappings = || {
        let text = fs::read_to_string("/proc/vmallocinfo").unwrap();
        text.lines()
            .filter(|line| line.contains("[hmm_gpu]") || line.contains(&of_bar))
            .count()
    };
    for parameters in ["", "add_resource=1"] {
        for step in 1..=7 {
            let mut log = Log::from_now();
            let mut driver = Driver::load(&format!("soft=0 {parameters} fail_probe={step}"));
            let (was_enabled, had_mappings) = (enabled(), mappings());
            assert_eq!(
                driver.try_bind(gpu),
                Err(Errno::NOMEM),
                "step {step} must fail"
            );
            log.expect(&[&format!("fail_probe: failing after step {step}")]);
            assert!(!is_bound(gpu));
            assert_eq!(
                Device::list(),
                [] as [u32; 0],
                "a device node after step {step}"
            );
            assert_eq!(
                kernel::iomem(),
                driver.iomem_before(),
                "a region after step {step}"
            );
            assert_eq!(enabled(), was_enabled, "enabled after step {step}");
            assert_eq!(mappings(), had_mappings, "a mapping after step {step}");

            // All of it can be had again: the number, the BAR, the region, the node.
            let device = driver.bind(gpu);
            assert_eq!(device.unit(), 0);
            assert!(mappings() > had_mappings, "what was looked for is there");
            let area = Area::filled(10, step);
            to_device(&device, *area);
            area.check(step);
            assert_empty(&device);
            drop(device);
            driver.unbind(gpu);
            assert_eq!(
                (enabled(), mappings()),
                (was_enabled.clone(), had_mappings),
                "after unbind"
            );
            driver.finish();
        }
    }
}

/// Patch 6: there is one way to device pages, in two forms: `add` has addresses that the kernel picked, `add_resource` the BAR's
/// own.
///
/// Catches a form that registers the wrong addresses, or says the wrong form, or leaves a region behind.
#[test]
fn patch_6_both_forms_register_where_they_say() {
    for gpu in [GPUS[0], GPUS[2]] {
        let bars = Resource::of_device(gpu);
        let bar = bars.iter().max_by_key(|bar| bar.bytes()).unwrap();
        for (form, parameters) in [(Form::Add, ""), (Form::AddResource, "add_resource=1")] {
            let (driver, device) = Driver::load_with(parameters, gpu);
            let description = device.describe().unwrap();
            assert_eq!(
                (description.form, description.vram_bytes),
                (form, bar.bytes())
            );

            let now = kernel::iomem();
            let mut new = Resource::list(&now);
            let old = Resource::list(driver.iomem_before());
            new.retain(|resource| !old.contains(resource));
            // Whichever form: the BAR is ours now.
            let ours = new
                .iter()
                .position(|resource| resource.name == "hmm_gpu")
                .unwrap();
            let ours = new.remove(ours);
            assert_eq!((ours.start, ours.end), (bar.start, bar.end));
            let home = match form {
                Form::Add => {
                    assert_eq!(new.len(), 1, "one region of the kernel's choice: {new:x?}");
                    let region = new.remove(0);
                    assert!(region.bytes() >= bar.bytes(), "{region:x?}");
                    let clash = |other: &Resource| {
                        other.start < region.end
                            && region.start < other.end
                            && other.bytes() < 1 << 40
                    };
                    assert!(!old.iter().any(clash), "{region:x?} was free before");
                    region
                }
                _ => {
                    assert_eq!(new, [], "no region but the BAR's own");
                    bar.clone()
                }
            };
            let area = Area::filled(300, 7);
            to_device(&device, *area);
            for entry in kernel::pagemap(std::process::id(), area.addr, area.pages) {
                let at_home =
                    matches!(entry, Entry::DevicePrivate { pfn, .. } if home.has_page(pfn));
                assert!(at_home, "{entry:x?} is not in {home:x?}");
            }
            assert!(places(&device, *area).all(Place::Device));
            area.check(7);
            drop((area, device));
            driver.finish();
            assert!(try_device_of(gpu).is_none());
        }
    }
}
