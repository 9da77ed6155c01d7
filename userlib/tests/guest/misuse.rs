//! Misuse: whatever a program hands to the driver, the answer is the documented error, and nothing has changed.
//!
//! Runs in the virtual GPU host: `bench/test guest_misuse`.

use std::ffi::c_void;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::common::driver::on_each_kind;
use crate::common::memory::{Area, PAGE};
use crate::common::misuse::{bad_ranges, call, sized, user_end, Bystander};
use crate::common::{assert_place, refused, to_device};
use hmm_gpu::uapi::{
    self, hmm_gpu_access, hmm_gpu_atomic, hmm_gpu_counters, hmm_gpu_fault, hmm_gpu_migrate,
    hmm_gpu_mirror, hmm_gpu_query, hmm_gpu_residency, hmm_gpu_snapshot,
    HMM_GPU_TARGET_DEVICE as DEVICE, HMM_GPU_TARGET_SYSTEM as SYSTEM,
};
use hmm_gpu::{Errno, Place};

const RW: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;
const PAGE_BYTES: u64 = PAGE as u64;

/// Catches a range that is believed: unaligned, empty, wrapping, in the kernel or outside of any address space.
#[test]
fn a_bad_range_is_refused_by_every_call_that_takes_one() {
    on_each_kind(|device| {
        let bystander = Bystander::new(device);
        let file = device.file();
        for (what, addr, len, expected) in bad_ranges(&bystander.area) {
            for target in [DEVICE, SYSTEM] {
                let mut argument = hmm_gpu_migrate {
                    addr,
                    len,
                    target,
                    ..Default::default()
                };
                let answer = file.migrate(&mut argument);
                assert_eq!(answer, Err(expected), "migrate {what}: {addr:#x}+{len:#x}");
                assert_eq!(
                    (argument.done_bytes, argument.moved_bytes),
                    (0, 0),
                    "{what}"
                );
                bystander.is_unchanged(device);
            }
            let mut bytes = [0xaa_u8; 64];
            let mut argument = hmm_gpu_residency {
                addr,
                len,
                bytes_ptr: bytes.as_mut_ptr() as u64,
                ..Default::default()
            };
            // SAFETY: what these ranges would need of `bytes`, if one was taken, is what the test is about.
            let answer = unsafe {
                file.call(
                    uapi::HMM_GPU_RESIDENCY,
                    (&raw mut argument).cast::<c_void>(),
                )
            };
            assert_eq!(answer, Err(expected), "residency {what}");
            assert_eq!(bytes, [0xaa; 64], "{what}");
        }
        bystander.finish(device);
    });
}

/// Catches a hole that is taken for an error where there is something to move, or for success where there is nothing.
#[test]
fn a_range_with_nothing_in_it_is_refused_by_migrate_and_seen_as_empty_by_residency() {
    on_each_kind(|device| {
        let bystander = Bystander::new(device);
        let hole = Area::new(30);
        hole.unmap();
        for (addr, pages) in [(0, 1), (0, 16), (hole.addr, 30), (hole.addr + PAGE, 7)] {
            for target in [hmm_gpu::Target::Device, hmm_gpu::Target::System] {
                assert_eq!(
                    refused(device.prefetch_range(addr, pages * PAGE, target)),
                    Errno::FAULT,
                    "{addr:#x}"
                );
            }
            assert!(device
                .residency_range(addr, pages * PAGE)
                .unwrap()
                .all(Place::None));
        }
        hole.map_over(RW, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1);
        bystander.finish(device);
    });
}

/// Catches a walk over all of an address space page by page, or one that stumbles over what is in it.
#[test]
fn all_of_user_space_is_one_range() {
    on_each_kind(|device| {
        let bystander = Bystander::new(device);
        let mut argument = hmm_gpu_migrate {
            addr: 0,
            len: user_end(),
            target: SYSTEM,
            ..Default::default()
        };
        let start = std::time::Instant::now();
        assert_eq!(device.file().migrate(&mut argument), Ok(()));
        assert!(start.elapsed().as_secs() < 20, "{:?}", start.elapsed());
        assert_eq!(
            (argument.done_bytes, argument.moved_bytes),
            (user_end(), 20 * PAGE_BYTES)
        );
        assert!(argument.unmapped_bytes > 1 << 46);
        assert_place(device, *bystander.area, Place::System);
        bystander.area.check(9);
    });
}

/// Catches an unknown target, flag or reserved word that is ignored: a later version could never give it a meaning.
#[test]
fn unknown_targets_flags_and_reserved_fields_are_refused() {
    on_each_kind(|device| {
        let bystander = Bystander::new(device);
        let file = device.file();
        let (addr, len) = (bystander.area.addr as u64, bystander.area.bytes() as u64);

        let migrate = hmm_gpu_migrate {
            addr,
            len,
            target: DEVICE,
            ..Default::default()
        };
        let mut cases: Vec<hmm_gpu_migrate> = [2, 3, 1 << 31, u32::MAX]
            .map(|target| hmm_gpu_migrate { target, ..migrate })
            .into();
        cases.extend((0..32).map(|bit| hmm_gpu_migrate {
            flags: 1 << bit,
            ..migrate
        }));
        cases.extend(
            [[1, 0], [0, 1], [u64::MAX, 0], [0, 1 << 63]].map(|reserved| hmm_gpu_migrate {
                reserved,
                ..migrate
            }),
        );
        for mut argument in cases {
            assert_eq!(
                file.migrate(&mut argument),
                Err(Errno::INVAL),
                "{argument:?}"
            );
        }

        let residency = hmm_gpu_residency {
            addr,
            len,
            ..Default::default()
        };
        let mut cases: Vec<hmm_gpu_residency> = (0..64)
            .map(|bit| hmm_gpu_residency {
                flags: 1 << bit,
                ..residency
            })
            .collect();
        cases.extend([[1, 0], [0, 1]].map(|reserved| hmm_gpu_residency {
            reserved,
            ..residency
        }));
        let mut bytes = vec![0xaa; bystander.area.pages];
        for mut argument in cases {
            let answer = file.residency(&mut argument, &mut bytes);
            assert_eq!(answer, Err(Errno::INVAL), "{argument:?}");
        }
        assert!(bytes.iter().all(|&byte| byte == 0xaa));

        for bit in 0..32 {
            let mut argument = hmm_gpu_query {
                flags: 1 << bit,
                ..Default::default()
            };
            assert_eq!(file.query(&mut argument), Err(Errno::INVAL));
            assert_eq!(argument.version, 0, "nothing is written on failure");
        }
        for i in 0..5 {
            let mut argument = hmm_gpu_query::default();
            argument.reserved[i] = 1 << (i * 9);
            assert_eq!(file.query(&mut argument), Err(Errno::INVAL));
        }
        // The first bit asks for the client's own.
        for bit in 1..64 {
            let mut argument = hmm_gpu_counters {
                flags: 1 << bit,
                ..Default::default()
            };
            assert_eq!(file.counters(&mut argument), Err(Errno::INVAL));
        }
        bystander.finish(device);
    });
}

/// The calls: number, and bytes of the structure.
const CALLS: [(u32, usize); 9] = [
    (uapi::HMM_GPU_QUERY, size_of::<hmm_gpu_query>()),
    (uapi::HMM_GPU_MIGRATE, size_of::<hmm_gpu_migrate>()),
    (uapi::HMM_GPU_RESIDENCY, size_of::<hmm_gpu_residency>()),
    (uapi::HMM_GPU_COUNTERS, size_of::<hmm_gpu_counters>()),
    (uapi::HMM_GPU_MIRROR, size_of::<hmm_gpu_mirror>()),
    (uapi::HMM_GPU_ACCESS, size_of::<hmm_gpu_access>()),
    (uapi::HMM_GPU_FAULT, size_of::<hmm_gpu_fault>()),
    (uapi::HMM_GPU_SNAPSHOT, size_of::<hmm_gpu_snapshot>()),
    (uapi::HMM_GPU_ATOMIC, size_of::<hmm_gpu_atomic>()),
];

/// How long the structure was in the version that brought the call.
fn smallest(number: u32, size: usize) -> usize {
    match number {
        uapi::HMM_GPU_COUNTERS => 160,
        _ => size,
    }
}

/// Catches a number that is taken for another's.
#[test]
fn unknown_calls_are_refused() {
    on_each_kind(|device| {
        let bystander = Bystander::new(device);
        // Zeroes, which QUERY and COUNTERS would take.
        let argument = Area::new(4);
        argument.page(0).fill(1);
        argument.page(0).advise(libc::MADV_DONTNEED).unwrap();
        let (query, size) = CALLS[0];
        let number = |direction: u32, size: usize, kind: u32, nr: u32| {
            (direction << 30) | ((size as u32) << 16) | (kind << 8) | nr
        };
        let mut unknown = vec![
            0,
            u32::MAX,
            libc::TCGETS as u32,
            libc::FIONBIO as u32,
            // Another type, and other directions.
            number(3, size, 0xe7, 0),
            number(3, size, 0xe9, 0),
            number(0, 0, 0xe8, 0),
            number(1, size, 0xe8, 0),
            number(2, size, 0xe8, 0),
        ];
        unknown.extend((14..256).map(|nr| (query & !0xff) | nr));
        for number in unknown {
            // The file system's own answer for FIONBIO.
            if number == libc::FIONBIO as u32 {
                assert_eq!(call(device, number, argument.addr), Ok(()));
                continue;
            }
            assert_eq!(
                call(device, number, argument.addr),
                Err(Errno::NOTTY),
                "{number:#x}"
            );
        }
        argument.check_zero();
        bystander.finish(device);
    });
}

/// Catches a structure whose size is not believed as the interface says: what comes after the driver's own must be zero, and less
/// than its first version is nothing.
#[test]
fn a_longer_structure_is_taken_if_its_tail_is_zero_and_a_shorter_one_never() {
    on_each_kind(|device| {
        let bystander = Bystander::new(device);
        let area = Area::new(5);
        let moving = Area::filled(3, 5);
        for (number, size) in CALLS {
            for longer in [size + 1, size + 8, size + 64, PAGE, 2 * PAGE, 0x3fff] {
                area.part(0, 4).advise(libc::MADV_DONTNEED).unwrap();
                // At the end of a mapping, so that a byte read too many is a fault.
                let last = area.part(4, 1);
                let start = last.addr - longer.next_multiple_of(8);
                last.protect(libc::PROT_NONE);
                let bytes = |from: usize| (start + from) as *mut u8;
                for tail in [longer - 1, size, size + (longer - size) / 2] {
                    write_argument(number, start, &moving);
                    // SAFETY: inside of the mapping.
                    unsafe { bytes(tail).write_volatile(1) };
                    assert_eq!(
                        call(device, sized(number, longer), start),
                        Err(Errno::INVAL),
                        "{number:#x} with {longer} bytes, byte {tail} set"
                    );
                    // SAFETY: as above.
                    unsafe { bytes(tail).write_volatile(0) };
                }
                write_argument(number, start, &moving);
                assert_eq!(
                    call(device, sized(number, longer), start),
                    Ok(()),
                    "{number:#x} with {longer} bytes"
                );
                for tail in size..longer {
                    // SAFETY: as above.
                    assert_eq!(unsafe { bytes(tail).read_volatile() }, 0);
                }
                last.protect(RW);
            }
            let size = smallest(number, size);
            for shorter in [0, 1, 8, size / 2, size - 8, size - 1] {
                write_argument(number, area.addr, &moving);
                let answer = call(device, sized(number, shorter), area.addr);
                assert!(
                    matches!(answer, Err(Errno::INVAL | Errno::NOTTY)),
                    "{number:#x} with {shorter} bytes: {answer:?}"
                );
            }
        }
        moving.check(5);
        bystander.finish(device);
    });
}

/// Writes a good argument for a call at an address, which may be any in a test's own mapping.
fn write_argument(number: u32, addr: usize, moving: &Area) {
    let (range, len) = (moving.addr as u64, moving.bytes() as u64);
    let put = |bytes: &[u8]| {
        // SAFETY: the tests give room for the structure, in a mapping of theirs.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), addr as *mut u8, bytes.len()) };
    };
    match number {
        uapi::HMM_GPU_MIGRATE => put(bytemuck::bytes_of(&hmm_gpu_migrate {
            addr: range,
            len,
            target: DEVICE,
            ..Default::default()
        })),
        uapi::HMM_GPU_RESIDENCY => put(bytemuck::bytes_of(&hmm_gpu_residency {
            addr: range,
            len,
            bytes_ptr: scratch(),
            ..Default::default()
        })),
        uapi::HMM_GPU_ACCESS => put(bytemuck::bytes_of(&hmm_gpu_access {
            op: uapi::HMM_GPU_OP_READ,
            addr: range + 5,
            len: 40,
            buffer_ptr: scratch(),
            ..Default::default()
        })),
        uapi::HMM_GPU_FAULT => put(bytemuck::bytes_of(&hmm_gpu_fault {
            // Of all zeroes: address 0, wanted for reading.
            faults_ptr: scratch(),
            count: 1,
            ..Default::default()
        })),
        uapi::HMM_GPU_SNAPSHOT => put(bytemuck::bytes_of(&hmm_gpu_snapshot {
            addr: range,
            len,
            entries_ptr: scratch(),
            ..Default::default()
        })),
        uapi::HMM_GPU_ATOMIC => put(bytemuck::bytes_of(&hmm_gpu_atomic {
            addr: range,
            op: uapi::HMM_GPU_ATOMIC_OR,
            bytes: 8,
            ..Default::default()
        })),
        uapi::HMM_GPU_QUERY => put(&[0; size_of::<hmm_gpu_query>()]),
        uapi::HMM_GPU_MIRROR => put(&[0; size_of::<hmm_gpu_mirror>()]),
        _ => put(&[0; size_of::<hmm_gpu_counters>()]),
    }
}

/// A place of zeroes for answers that no test looks at.
fn scratch() -> u64 {
    static WORDS: [AtomicU64; 64] = [const { AtomicU64::new(0) }; 64];
    for word in &WORDS {
        word.store(0, Ordering::Relaxed);
    }
    WORDS.as_ptr() as u64
}

/// Catches a pointer that the kernel follows by itself, or a page that it writes although the process may not.
#[test]
fn a_structure_that_cannot_be_read_or_written_is_a_fault() {
    on_each_kind(|device| {
        let bystander = Bystander::new(device);
        let area = Area::new(3);
        let moving = Area::filled(3, 6);
        area.page(2).protect(libc::PROT_NONE);
        for (number, size) in CALLS {
            for (what, addr) in [
                ("null", 0),
                ("nearly null", 8),
                ("the kernel", 0xffff_8880_0000_0000),
                ("the end of 64 bits", usize::MAX - 7),
                ("no canonical address", 1 << 47),
                ("the last bytes of user space", user_end() as usize - 8),
                ("memory without access", area.page(2).addr),
                (
                    "a structure that runs into such",
                    area.page(2).addr - size + 8,
                ),
            ] {
                assert_eq!(
                    call(device, number, addr),
                    Err(Errno::FAULT),
                    "{number:#x}: {what}"
                );
            }
            // It can be read but not written: a result that nobody can be told of is a fault too.
            write_argument(number, area.addr, &moving);
            area.page(0).protect(libc::PROT_READ);
            let answer = call(device, number, area.addr);
            if matches!(number, uapi::HMM_GPU_RESIDENCY | uapi::HMM_GPU_SNAPSHOT) {
                assert_eq!(
                    answer,
                    Ok(()),
                    "nothing in this one is the driver's to write"
                );
            } else {
                assert_eq!(answer, Err(Errno::FAULT), "{number:#x}: a read-only page");
            }
            area.page(0).protect(RW);
        }
        moving.check(6);
        area.page(2).protect(RW);
        bystander.finish(device);
    });
}

/// Catches residency bytes that are written where they must not be.
#[test]
fn residency_bytes_that_cannot_be_written_are_a_fault() {
    on_each_kind(|device| {
        let bystander = Bystander::new(device);
        let answers = Area::filled(3, 8);
        answers.page(2).protect(libc::PROT_READ);
        // The bytes of 40 pages, the last 20 of which would be on a page that is read-only.
        for (what, bytes_ptr) in [
            ("null", 0),
            ("the kernel", 0xffff_8880_0000_0000_u64),
            ("wrapping", u64::MAX - 10),
            ("not canonical", 1 << 47),
            ("read-only", answers.page(2).addr as u64),
            ("half of it read-only", answers.page(2).addr as u64 - 20),
        ] {
            let mut argument = hmm_gpu_residency {
                addr: bystander.area.addr as u64,
                len: bystander.area.bytes() as u64,
                bytes_ptr,
                ..Default::default()
            };
            let addr = (&raw mut argument) as usize;
            assert_eq!(
                call(device, uapi::HMM_GPU_RESIDENCY, addr),
                Err(Errno::FAULT),
                "{what}"
            );
        }
        answers.page(2).check(8);
        answers.page(0).check(8);
        bystander.finish(device);
    });
}

/// Catches a driver that faults for ever, or answers wrongly, when what it is handed lies in VRAM itself: the structure inside the
/// range that it moves, the residency bytes on a page that is resident.
#[test]
fn arguments_and_answers_may_lie_in_vram() {
    on_each_kind(|device| {
        let area = Area::filled(64, 7);
        let at = area.page(10).addr;
        let ask = |target| {
            let argument = hmm_gpu_migrate {
                addr: area.addr as u64,
                len: area.bytes() as u64,
                target,
                ..Default::default()
            };
            // SAFETY: in the area, which is as long.
            unsafe { (at as *mut hmm_gpu_migrate).write(argument) };
            assert_eq!(call(device, uapi::HMM_GPU_MIGRATE, at), Ok(()));
            // SAFETY: as above.
            unsafe { (at as *const hmm_gpu_migrate).read() }
        };
        let answer = ask(DEVICE);
        assert_eq!(
            (answer.done_bytes, answer.moved_bytes),
            (64 * PAGE_BYTES, 64 * PAGE_BYTES)
        );
        let answer = ask(SYSTEM);
        assert_eq!(answer.done_bytes, 64 * PAGE_BYTES);

        to_device(device, *area);
        let argument = hmm_gpu_residency {
            addr: area.addr as u64,
            len: area.bytes() as u64,
            bytes_ptr: area.page(20).addr as u64 + 100,
            ..Default::default()
        };
        // SAFETY: in the area.
        unsafe { (area.page(30).addr as *mut hmm_gpu_residency).write(argument) };
        to_device(device, *area);
        assert_eq!(
            call(device, uapi::HMM_GPU_RESIDENCY, area.page(30).addr),
            Ok(())
        );
        // SAFETY: in the area.
        let bytes =
            unsafe { std::slice::from_raw_parts((area.page(20).addr + 100) as *const u8, 64) };
        let seen = bytes
            .iter()
            .filter(|&&byte| {
                byte == uapi::HMM_GPU_RESIDENT_DEVICE | uapi::HMM_GPU_RESIDENT_WRITABLE
            })
            .count();
        assert!(
            seen >= 62,
            "all but the two pages of the call itself were in VRAM: {bytes:?}"
        );
        for page in (0..64).filter(|page| ![10, 20, 30].contains(page)) {
            area.page(page).check(7);
        }
    });
}

/// Catches memory in a userfaultfd's care that is populated behind its back.
#[test]
fn memory_that_a_userfaultfd_watches_is_left_to_it() {
    on_each_kind(|device| {
        let area = Area::new(20);
        area.advise(libc::MADV_NOHUGEPAGE).unwrap();
        area.part(0, 5).fill(1);
        let watch = crate::common::userfault::Watch::new(*area);
        let counts = device
            .prefetch_range(area.addr, area.bytes(), hmm_gpu::Target::Device)
            .unwrap();
        assert_eq!(counts, crate::common::moved(5, 0, 15, 0));
        drop(watch);
        area.part(0, 5).check(1);
        area.part(5, 15).check_zero();
    });
}
