//! Nothing is lost when memory cannot be had: each allocation of each call fails in its turn, and each copy from and to user space. The
//! answer is the documented error or none, every byte is where it was, and the call goes well the next time.
//!
//! Runs in the virtual GPU host with the kernel that checks, which can make them fail: `bench/test guest_debug_injection`.

use std::os::fd::{FromRawFd, OwnedFd};

use crate::common::driver::{assert_empty, counters, Driver, GPUS};
use crate::common::inject::{Injection, What};
use crate::common::memory::{errno, Area, Span, PAGE};
use crate::common::mirror::{
    both_check, call, copy, device_check, device_fill_by, read, snapshot, try_fault, try_snapshot,
    wants, write, Ended, MAP, MIGRATE, READ, WRITE,
};
use crate::common::{places, to_device, to_system};
use hmm_gpu::uapi::{
    self, hmm_gpu_migrate, hmm_gpu_mirror, HMM_GPU_TARGET_DEVICE as DEVICE,
    HMM_GPU_TARGET_SYSTEM as SYSTEM,
};
use hmm_gpu::{Device, Errno};

const PAGES: usize = 24;

/// Memory of each kind: some in VRAM, some in system memory, the last third never touched.
struct Scene {
    device: Device,
    area: Area,
}

const THIRD: usize = PAGES / 3;

impl Scene {
    /// With a new client, so that all that is made once is made again.
    fn new(path: &std::path::Path) -> Self {
        let device = Device::open_path(path).unwrap();
        let area = Area::new(PAGES);
        area.advise(libc::MADV_NOHUGEPAGE).unwrap();
        area.part(0, 2 * THIRD).fill(1);
        // Through another client, so that this one has nothing yet.
        let other = Device::open_path(path).unwrap();
        to_device(&other, area.part(0, THIRD));
        Self { device, area }
    }

    /// Asserts that the first two thirds have a pattern, and the last zeroes, as both see it.
    #[track_caller]
    fn check(&self, seed: u64) {
        both_check(&self.device, self.area.part(0, 2 * THIRD), seed);
        self.area.part(2 * THIRD, THIRD).check_zero();
        snapshot(&self.device, *self.area);
    }
}

/// What a call may answer when something of it fails.
#[track_caller]
fn may_fail(what: What, result: Result<(), Errno>) {
    let expected = match what {
        What::Memory => Errno::NOMEM,
        What::Copies => Errno::FAULT,
    };
    assert!(result.is_ok() || result == Err(expected), "{result:?}");
}

/// Has a call fail in every way: with its allocations and with its copies. `look` looks at the scene and the answer.
fn each<R>(device: &Device, name: &str, ask: impl Fn(&Scene) -> R, look: impl Fn(What, &Scene, R)) {
    for what in [What::Memory, What::Copies] {
        let injection = Injection::of(what);
        injection.each(
            &format!("{name}, {what:?}"),
            || Scene::new(device.path()),
            &ask,
            |scene, answer| {
                look(what, &scene, answer);
                drop(scene);
                let now = counters(device);
                assert_eq!(now.allocated_pages, now.freed_pages + now.live_pages);
                assert_eq!((now.live_pages, now.table_pages), (0, 0), "{now:#?}");
            },
        );
    }
}

fn on_a_gpu(test: impl Fn(&Device)) {
    let (driver, device) = Driver::load_with("", GPUS[0]);
    test(&device);
    assert_empty(&device);
    drop(device);
    driver.finish();
}

/// Catches a page that is lost or stays locked when a move cannot be finished, in either direction, and untouched memory that is not
/// zero afterwards.
#[test]
fn moves_that_fail_lose_nothing() {
    on_a_gpu(|device| {
        for (name, target) in [("to the device", DEVICE), ("to the system", SYSTEM)] {
            let ask = |scene: &Scene| {
                let mut argument = hmm_gpu_migrate {
                    addr: scene.area.addr as u64,
                    len: scene.area.bytes() as u64,
                    target,
                    ..Default::default()
                };
                (scene.device.file().migrate(&mut argument), argument)
            };
            each(device, name, ask, |what, scene, (result, answer)| {
                may_fail(what, result);
                let counts = answer.moved_bytes
                    + answer.already_bytes
                    + answer.skipped_bytes
                    + answer.unmapped_bytes;
                // An answer that could not be copied is none.
                if what == What::Memory {
                    assert_eq!(counts, answer.done_bytes, "{answer:?}");
                    assert!(result.is_err() || counts == scene.area.bytes() as u64);
                }
                device_check(&scene.device, scene.area.part(0, 2 * THIRD), 1);
                if target == DEVICE {
                    to_device(&scene.device, *scene.area);
                } else {
                    to_system(&scene.device, *scene.area);
                }
                scene.check(1);
            });
        }
    });
}

/// Catches a look that leaves something behind, or answers half of the truth as all of it.
#[test]
fn looks_that_fail_change_nothing() {
    on_a_gpu(|device| {
        let residency = |scene: &Scene| {
            let area = &scene.area;
            let mut bytes = [0xff; PAGES];
            let mut argument = uapi::hmm_gpu_residency {
                addr: area.addr as u64,
                len: area.bytes() as u64,
                ..Default::default()
            };
            scene.device.file().residency(&mut argument, &mut bytes)
        };
        each(device, "RESIDENCY", residency, |what, scene, result| {
            may_fail(what, result);
            let counts = places(&scene.device, *scene.area).counts();
            assert_eq!((counts.device, counts.system, counts.none), (8, 8, 8));
            scene.check(1);
        });
        let look = |scene: &Scene| try_snapshot(&scene.device, *scene.area);
        each(device, "SNAPSHOT", look, |what, scene, result| {
            may_fail(what, result.map(drop));
            let seen = snapshot(&scene.device, *scene.area);
            assert_eq!(seen.iter().filter(|seen| seen.is_on_device()).count(), 8);
            scene.check(1);
        });
        let table = |scene: &Scene| {
            let mut argument = hmm_gpu_mirror::default();
            call(&scene.device, uapi::HMM_GPU_MIRROR, &mut argument)
        };
        each(device, "MIRROR", table, |what, scene, result| {
            may_fail(what, result);
            assert_eq!(table(scene), Ok(()));
            scene.check(1);
        });
    });
}

/// Asserts that an access ended well, or as it may; and that it had not come to its end otherwise.
#[track_caller]
fn ended(what: What, ended: Ended, len: usize) {
    may_fail(what, ended.result);
    match ended.result {
        Ok(()) => assert_eq!(ended.done, len, "{ended:?}"),
        // What is done cannot be told of when that is what fails.
        Err(_) => assert!(ended.done <= len, "{ended:?}"),
    }
}

/// Catches a device access that is told to have been done and was not, one that was done and is told not to have been, and bytes that
/// are lost in between.
#[test]
fn accesses_that_fail_have_done_what_they_say() {
    on_a_gpu(|device| {
        for policy in [MAP, MIGRATE] {
            let len = 2 * THIRD * PAGE;
            let ask = |scene: &Scene| {
                let mut words = scene.area.part(0, 2 * THIRD).pattern(99);
                let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut words);
                let ended = read(&scene.device, scene.area.addr, bytes, policy);
                (ended, words)
            };
            let name = format!("a read, policy {policy}");
            each(device, &name, ask, |what, scene, (answer, words)| {
                ended(what, answer, len);
                let done = answer.done / PAGE;
                let part = scene.area.part(0, done);
                part.check_words("the device", &words[..part.bytes() / 8], 1);
                scene.check(1);
            });

            let ask = |scene: &Scene| {
                let words = scene.area.part(0, 2 * THIRD).pattern(2);
                let bytes: &[u8] = bytemuck::cast_slice(&words);
                write(&scene.device, scene.area.addr, bytes, policy)
            };
            let name = format!("a write, policy {policy}");
            each(device, &name, ask, |what, scene, answer| {
                ended(what, answer, len);
                let done = answer.done / PAGE;
                if what == What::Memory {
                    scene.area.part(0, done).check(2);
                    scene.area.part(done, 2 * THIRD - done).check(1);
                }
                device_fill_by(&scene.device, scene.area.part(0, 2 * THIRD), 3, policy);
                scene.check(3);
            });

            let len = THIRD * PAGE;
            let ask = |scene: &Scene| {
                let [from, to] = [0, 2 * THIRD].map(|page| scene.area.page(page).addr);
                copy(&scene.device, from, to, len, policy)
            };
            let name = format!("a copy, policy {policy}");
            each(device, &name, ask, |what, scene, answer| {
                ended(what, answer, len);
                let target = scene.area.part(2 * THIRD, THIRD);
                let done = answer.done / PAGE;
                let copied = |pages: usize| scene.area.part(0, pages).at(target.addr);
                if what == What::Memory {
                    copied(done).check(1);
                    target.part(done, THIRD - done).check_zero();
                }
                let [from, to] = [0, 2 * THIRD].map(|page| scene.area.page(page).addr);
                copy(&scene.device, from, to, len, policy).whole(len);
                both_check(&scene.device, copied(THIRD), 1);
                both_check(&scene.device, scene.area.part(0, 2 * THIRD), 1);
            });
        }
    });
}

/// Catches faults whose answers are not theirs, and pages that are said to be mapped and are not.
#[test]
fn faults_that_fail_say_which() {
    on_a_gpu(|device| {
        for policy in [MAP, MIGRATE] {
            let ask = |scene: &Scene| {
                let mut faults: Vec<_> = (0..PAGES)
                    .map(|page| wants(scene.area.page(page).addr, [READ, WRITE][page % 2]))
                    .collect();
                let (result, answer) = try_fault(&scene.device, &mut faults, policy);
                (result, answer, faults)
            };
            let name = format!("FAULT, policy {policy}");
            each(device, &name, ask, |what, scene, answer| {
                let (result, answer, faults) = answer;
                may_fail(what, result);
                let seen = snapshot(&scene.device, *scene.area);
                for (seen, fault) in seen.iter().zip(&faults) {
                    // Of the two that nobody else could take it away from.
                    if result.is_ok() && fault.status == 0 {
                        assert!(seen.is_mirrored(), "{seen:?} {fault:?}");
                    }
                    let known = [0, libc::ENOMEM as u32, libc::ECANCELED as u32, 0x7777_7777];
                    assert!(known.contains(&fault.status), "{fault:?}");
                }
                if result.is_ok() {
                    let mapped = faults.iter().filter(|fault| fault.status == 0).count() as u64;
                    assert_eq!(answer.mapped_pages, mapped);
                    assert_eq!(answer.failed_pages, PAGES as u64 - mapped);
                }
                let (result, answer, _) = ask(scene);
                assert_eq!((result, answer.mapped_pages), (Ok(()), PAGES as u64));
                scene.check(1);
            });
        }
    });
}

/// Catches an open that leaves something of itself.
#[test]
fn opens_that_fail_leave_nothing() {
    on_a_gpu(|device| {
        let path = std::ffi::CString::new(device.path().to_str().unwrap()).unwrap();
        let open = || {
            // SAFETY: a C string.
            let fd = unsafe { libc::open(path.as_ptr(), libc::O_RDWR | libc::O_CLOEXEC) };
            // SAFETY: just made, and nobody else's.
            errno(fd).map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
        };
        let injection = Injection::of(What::Memory);
        let look = |(), answer: Result<OwnedFd, Errno>| {
            assert!(matches!(answer, Ok(_) | Err(Errno::NOMEM)), "{answer:?}");
            open().unwrap();
        };
        injection.each("open", || (), |()| open(), look);
    });
}

/// Catches a touch of the CPU that loses its page, or kills, when there is no memory at that moment: it is tried again.
#[test]
fn touches_that_fail_are_tried_again() {
    on_a_gpu(|device| {
        let injection = Injection::of(What::Memory);
        let touch = |scene: &Scene| {
            let place = scene.area.page(3).addr as *mut u64;
            // SAFETY: a word of the area.
            unsafe { place.write_volatile(5) };
        };
        let look = |scene: Scene, ()| {
            let mut words = scene.area.page(3).pattern(1);
            words[0] = 5;
            let found = crate::common::mirror::device_words(&scene.device, scene.area.page(3), MAP);
            assert!(found == words);
            let rest = |span: Span| both_check(&scene.device, span, 1);
            rest(scene.area.part(0, 3));
            rest(scene.area.part(4, 2 * THIRD - 4));
        };
        injection.each("a touch", || Scene::new(device.path()), touch, look);
    });
}
