//! Content shared between processes: fork, copy-on-write on each side, and who sees whose bytes.
//!
//! Runs in the virtual GPU host: `bench/test guest_fork`.

use crate::common::child::Child;
use crate::common::driver::{assert_empty, on_each_kind, Driver};
use crate::common::kernel;
use crate::common::memory::{last_errno, Area, Span, PAGE};
use crate::common::random::Random;
use crate::common::{assert_place, eventually, places, to_device, to_system};
use hmm_gpu::{Device, Place, Target};

/// Catches a copy-on-write that is seen on the other side, in either direction, or that loses a page nobody wrote.
#[test]
fn after_a_fork_each_side_has_its_own_writes() {
    on_each_kind(|device| {
        let area = Area::filled(90, 1);
        to_device(device, *area);
        let (childs, parents, both, nobodys) = (
            area.part(0, 20),
            area.part(20, 20),
            area.part(40, 20),
            area.part(60, 30),
        );
        let mut child = Child::fork(|parent| {
            childs.fill(2);
            both.fill(3);
            parent.send(0);
            parent.receive();
            childs.check(2);
            parents.check(1);
            both.check(3);
            nobodys.check(1);
        });
        child.receive();
        childs.check(1);
        parents.fill(4);
        both.check(1);
        both.fill(5);
        child.send(0);
        child.finish();
        childs.check(1);
        parents.check(4);
        both.check(5);
        nobodys.check(1);
    });
}

/// Catches a page that is writable after a fork without being copied: the device's answer, and the kernel's, must be read-only.
#[test]
fn a_fork_leaves_pages_in_vram_and_takes_the_right_to_write() {
    on_each_kind(|device| {
        let area = Area::filled(30, 11);
        to_device(device, *area);
        assert_eq!(places(device, *area).counts().writable, 30);
        let mut child = Child::fork(|parent| {
            parent.receive();
            area.check(11);
        });
        let residency = places(device, *area);
        assert!(residency.all(Place::Device));
        assert_eq!(residency.counts().writable, 0);
        let in_child = kernel::pagemap(child.pid as u32, area.addr, area.pages);
        assert_eq!(
            in_child,
            kernel::pagemap(std::process::id(), area.addr, area.pages),
            "the very same pages of VRAM on both sides"
        );
        assert_eq!(device.counters().unwrap().live_pages, 30);
        child.send(0);
        child.finish();
        area.fill(12);
        area.check(12);
    });
}

/// Catches VRAM that dies with the process that put it there: a child outlives its parent, never opened the device itself, and
/// reads everything.
#[test]
fn a_child_that_outlives_its_parent_has_all_its_bytes() {
    on_each_kind(|device| {
        let path = device.path();
        let mut parent = Child::fork(|test| {
            let device = Device::open_path(path).unwrap();
            let area = Area::filled(120, 21);
            to_device(&device, *area);
            // The grandchild reports through the same line, and is waited for by the line's end.
            // SAFETY: as in `Child::fork`; it ends with `_exit`.
            let pid = unsafe { libc::fork() };
            assert_ne!(pid, -1, "{}", last_errno());
            if pid != 0 {
                // Without a word to anybody: the pages stay to the child.
                // SAFETY: always fine to call.
                unsafe { libc::_exit(0) };
            }
            eventually("the parent is gone", || {
                std::os::unix::process::parent_id() == 1
            });
            drop(device);
            test.send(1);
            test.receive();
            for page in Random::new(3).order(area.pages) {
                area.page(page).check(21);
            }
            area.fill(22);
            area.check(22);
            test.send(2);
        });
        assert_eq!(parent.receive(), 1);
        assert_eq!(
            device.counters().unwrap().live_pages,
            120,
            "the pages are in VRAM still"
        );
        parent.send(0);
        assert_eq!(parent.receive(), 2);
        parent.finish();
    });
}

/// Catches a move of pages that two processes share which tears them apart, or loses one side's mapping.
#[test]
fn shared_pages_move_for_both_sides_at_once() {
    on_each_kind(|device| {
        let path = device.path();
        let area = Area::filled(64, 31);
        let mut child = Child::fork(|parent| {
            let device = Device::open_path(path).unwrap();
            let counts = device
                .prefetch_range(area.addr, area.bytes(), Target::Device)
                .unwrap();
            parent.send(counts.moved / PAGE as u64);
            parent.receive();
            area.part(0, 32).check(31);
            area.part(32, 32).fill(32);
            parent.send(0);
            parent.receive();
            area.part(0, 32).check(31);
            area.part(32, 32).check(32);
        });
        let moved = child.receive() as usize;
        assert_eq!(moved, 64, "nothing held them");
        assert_place(device, *area, Place::Device);
        assert_eq!(
            device.counters().unwrap().live_pages,
            64,
            "they are the same pages"
        );
        child.step();
        area.check(31);
        to_device(device, *area);
        child.send(0);
        child.finish();
        to_system(device, *area);
        area.check(31);
    });
}

/// Catches chains of forks that lose count of who has a page.
#[test]
fn a_family_of_processes_keeps_its_generations_apart() {
    on_each_kind(|device| {
        let path = device.path();
        let area = Area::filled(40, 40);
        to_device(device, *area);
        // Each generation writes a page of its own, moves all back to VRAM, and forks the next.
        fn generation(number: usize, path: &std::path::Path, area: Span) {
            let check = |area: Span| {
                (0..10).for_each(|page| {
                    let holds = if page < number { 50 + page } else { 40 };
                    area.page(page).check(holds as u64);
                });
                area.part(10, 30).check(40);
            };
            check(area);
            if number == 4 {
                return;
            }
            area.page(number).fill(50 + number as u64);
            let device = Device::open_path(path).unwrap();
            let counts = device
                .prefetch_range(area.addr, area.bytes(), Target::Device)
                .unwrap();
            assert_eq!(counts.total(), area.bytes() as u64);
            Child::fork(|_| generation(number + 1, path, area)).finish();
            area.page(number).check(50 + number as u64);
            area.part(10, 30).check(40);
        }
        Child::fork(|_| generation(0, path, *area)).finish();
        area.check(40);
    });
}

/// Catches the worst: one process's bytes in another's memory. A secret fills all of the VRAM, its process goes (by exit and by
/// `kill -9`), and whoever gets the VRAM next sees zeroes.
#[test]
fn no_process_sees_what_another_left_in_vram() {
    let driver = Driver::load("soft=1 soft_mib=8");
    let device = Device::open(0).unwrap();
    let room = device.describe().unwrap().vram_bytes as usize / PAGE;
    for killed in [false, true] {
        let mut other = Child::fork(|test| {
            let device = Device::open(0).unwrap();
            let secret = Area::filled(room, 66);
            to_device(&device, *secret);
            test.send(0);
            test.receive();
            std::mem::forget(secret);
        });
        other.receive();
        assert_eq!(device.describe().unwrap().vram_free_bytes, 0);
        if killed {
            other.kill();
        } else {
            other.send(0);
            other.finish();
        }
        assert_empty(&device);
        let area = Area::new(room);
        to_device(&device, *area);
        area.check_zero();
    }
    drop(device);
    driver.finish();
}

/// Catches a debugger or a tracer, another process, that reads something else than what the owner wrote.
#[test]
fn another_process_reads_resident_memory_through_the_kernel() {
    on_each_kind(|device| {
        let path = device.path();
        let mut other = Child::fork(|test| {
            let device = Device::open_path(path).unwrap();
            let area = Area::filled(24, 71);
            to_device(&device, *area);
            test.send(area.addr as u64);
            test.receive();
            area.part(0, 12).check(71);
            area.part(12, 12).check(72);
        });
        let theirs = Span::new(other.receive() as usize, 24);
        let copy = Area::filled(24, 0);
        let piece = |span: Span| libc::iovec {
            iov_base: span.addr as *mut _,
            iov_len: span.bytes(),
        };
        // SAFETY: the copy is ours and as long.
        let bytes =
            unsafe { libc::process_vm_readv(other.pid, &piece(*copy), 1, &piece(theirs), 1, 0) };
        assert_eq!(bytes, copy.bytes() as isize, "{}", last_errno());
        copy.check(71);
        // And writes to half of it.
        copy.fill(72);
        // SAFETY: the other process is a test's own, and expects it.
        let bytes = unsafe {
            libc::process_vm_writev(
                other.pid,
                &piece(copy.part(12, 12)),
                1,
                &piece(theirs.part(12, 12)),
                1,
                0,
            )
        };
        assert_eq!(bytes, 12 * PAGE as isize, "{}", last_errno());
        other.send(0);
        other.finish();
    });
}
