//! Nothing is lost when a step fails: the driver's own, of which each is made to fail in its turn, on any kernel. Every byte is where it
//! was or where it was to go, and all that is left over is given back.
//!
//! Runs in the virtual GPU host: `bench/test guest_failures`.

use std::fs;

use crate::common::child::Child;
use crate::common::driver::{assert_empty, counters, on_each_kind, Driver, GPUS};
use crate::common::memory::{Area, Span, HUGE, PAGE};
use crate::common::mirror::{device_check, fault_all, MAP, MIGRATE, WRITE};
use crate::common::{eventually, places, rounds, to_device};
use hmm_gpu::{Device, Errno, Target};

/// A step that can be made to fail: its file in debugfs.
#[derive(Clone, Copy, Debug)]
enum Step {
    DeviceAllocation,
    SystemAllocation,
    Copy,
    Insertion,
}

const STEPS: [Step; 4] = [
    Step::DeviceAllocation,
    Step::SystemAllocation,
    Step::Copy,
    Step::Insertion,
];

impl Step {
    fn path(self) -> String {
        let name = match self {
            Step::DeviceAllocation => "device_allocation",
            Step::SystemAllocation => "system_allocation",
            Step::Copy => "copy",
            Step::Insertion => "insertion",
        };
        format!("/sys/kernel/debug/hmm_gpu/fail_{name}")
    }

    /// Has the n-th fail.
    #[track_caller]
    fn fail(self, n: u64) {
        fs::write(self.path(), n.to_string()).unwrap();
    }

    /// Has none fail any more. Returns whether one has.
    #[track_caller]
    fn end(self) -> bool {
        let left = fs::read_to_string(self.path()).unwrap();
        self.fail(0);
        left.trim() == "0"
    }
}

/// What is done to memory that is on the device, or in the system.
type Deed = fn(&Device, Span) -> Result<(), Errno>;

fn prefetch(device: &Device, span: Span, target: Target) -> Result<(), Errno> {
    device
        .prefetch_range(span.addr, span.bytes(), target)
        .map(drop)
        .map_err(|error| error.errno().unwrap())
}

const DEEDS: [(&str, bool, Deed); 5] = [
    ("to the device", false, |device, span| {
        prefetch(device, span, Target::Device)
    }),
    ("to the system", true, |device, span| {
        prefetch(device, span, Target::System)
    }),
    ("touched by the CPU", true, |_, span| {
        span.check(1);
        Ok(())
    }),
    ("faulted to the device", false, |device, span| {
        let faulted = device.fault(&faults(span), hmm_gpu::Policy::Migrate);
        faulted.map(drop).map_err(|error| error.errno().unwrap())
    }),
    ("mapped for the device", true, |device, span| {
        let faulted = device.fault(&faults(span), hmm_gpu::Policy::Map);
        faulted.map(drop).map_err(|error| error.errno().unwrap())
    }),
];

/// A device fault for each page.
fn faults(span: Span) -> Vec<hmm_gpu::DeviceFault> {
    (0..span.pages)
        .map(|i| hmm_gpu::DeviceFault {
            addr: span.addr + i * PAGE,
            access: hmm_gpu::Access::Write,
        })
        .collect()
}

/// Memory in pages of the base size, or in one of 2 MiB.
fn memory(huge: bool) -> Area {
    let area = Area::offset(0, if huge { HUGE } else { 12 });
    let advice = if huge {
        libc::MADV_HUGEPAGE
    } else {
        libc::MADV_NOHUGEPAGE
    };
    area.advise(advice).unwrap();
    area.fill(1);
    area
}

/// Has each step of a deed fail in its turn, until there are not so many. Returns how often one has.
#[track_caller]
fn each(device: &Device, name: &str, on_device: bool, huge: bool, deed: Deed) -> u64 {
    // More would only be more of the same: pages that are dealt with one after the other.
    let most = rounds(40) as u64;
    let mut failures = 0;
    for step in STEPS {
        for n in 1.. {
            let area = memory(huge);
            let own = Device::open_path(device.path()).unwrap();
            if on_device {
                to_device(&own, *area);
            }
            step.fail(n);
            let result = deed(&own, *area);
            let failed = step.end();
            let what = format!("{name}, huge {huge}, {step:?} {n}: {result:?}");
            let may_be = [Ok(()), Err(Errno::NOMEM), Err(Errno::NOSPC)];
            assert!(may_be.contains(&result), "{what}");
            // What the driver says of each page is so, for both.
            let counts = places(&own, *area).counts();
            assert_eq!(
                counts.system + counts.device,
                area.pages,
                "{what}: {counts}"
            );
            device_check(&own, *area, 1);
            area.check(1);
            // And the next time it is done.
            assert_eq!(deed(&own, *area), Ok(()), "{what}");
            area.check(1);
            drop((own, area));
            assert_empty(device);
            failures += u64::from(failed);
            if !failed || n == most {
                break;
            }
        }
    }
    println!("{name}, huge {huge}: {failures} failures");
    failures
}

/// Catches a byte, a page of VRAM, a lock or a reference that is lost when one step of a move, a fault or a device fault fails.
#[test]
fn each_step_fails_and_nothing_is_lost() {
    on_each_kind(|device| {
        for huge in [false, true] {
            for (name, on_device, deed) in DEEDS {
                let failures = each(device, name, on_device, huge, deed);
                assert_ne!(failures, 0, "{name}: nothing can fail in it");
            }
        }
    });
}

/// Catches a large folio whose pages are lost, or are at two places, when it has to be split because there is none on the other side, and
/// that fails too.
#[test]
fn a_large_folio_that_cannot_be_had_is_moved_in_pieces() {
    on_each_kind(|device| {
        for (on_device, step, target) in [
            (false, Step::DeviceAllocation, Target::Device),
            (true, Step::SystemAllocation, Target::System),
        ] {
            let area = memory(true);
            if on_device {
                to_device(device, *area);
            }
            let before = device.counters().unwrap();
            step.fail(1);
            let moved = device.prefetch_range(area.addr, area.bytes(), target);
            assert!(step.end());
            assert!(moved.unwrap().is_complete());
            let work = device.counters().unwrap() - before;
            assert_eq!(work.large_failures, 1);
            assert_eq!((work.large_to_device, work.large_to_system), (0, 0));
            device_check(device, *area, 1);
            area.check(1);
        }
    });
}

/// Catches a CPU that waits for ever for a page whose large folio cannot be had in system memory, in the process and in its child.
#[test]
fn a_touch_brings_one_page_if_it_cannot_bring_all() {
    on_each_kind(|device| {
        for forked in [false, true] {
            let area = memory(true);
            to_device(device, *area);
            let child = forked.then(|| {
                Child::fork(|test| {
                    test.receive();
                    area.check(1);
                })
            });
            let before = device.counters().unwrap();
            Step::SystemAllocation.fail(1);
            area.page(77).check(1);
            assert!(Step::SystemAllocation.end());
            let work = device.counters().unwrap() - before;
            assert_eq!(work.large_failures, 1, "forked {forked}");
            // It had to be touched again until the folio was split, unless others had it whole meanwhile.
            assert!(work.cpu_faults > 1);
            area.check(1);
            if let Some(mut child) = child {
                child.send(0);
                child.finish();
            }
            area.check(1);
        }
    });
}

/// Catches an unbind, or a removal of the module, that gives up, or loses something, when the moves it makes fail.
#[test]
fn an_unbind_goes_on_until_all_is_out() {
    for step in [Step::SystemAllocation, Step::Copy] {
        for n in [1, 2, 5] {
            let (mut driver, device) = Driver::load_with("", GPUS[0]);
            let (large, small) = (memory(true), memory(false));
            to_device(&device, *large);
            to_device(&device, *small);
            drop(device);
            step.fail(n);
            driver.unbind(GPUS[0]);
            large.check(1);
            small.check(1);
            step.fail(0);
            driver.finish();
        }
    }
}

/// Catches entries of a device page table that are half made, or lost, when one cannot be made.
#[test]
fn entries_that_cannot_be_made_are_made_the_next_time() {
    on_each_kind(|device| {
        let area = memory(false);
        for n in 1..=area.pages as u64 {
            area.advise(libc::MADV_DONTNEED).unwrap();
            area.fill(1);
            Step::Insertion.fail(n);
            let failed = device.fault(&faults(*area), hmm_gpu::Policy::Map);
            assert_eq!(failed.unwrap_err().errno(), Some(Errno::NOMEM));
            assert!(Step::Insertion.end());
            for policy in [MAP, MIGRATE] {
                fault_all(device, *area, WRITE, policy);
                device_check(device, *area, 1);
            }
            area.check(1);
        }
        eventually("nothing is on the device", || {
            counters(device).live_pages <= 8
        });
    });
}
