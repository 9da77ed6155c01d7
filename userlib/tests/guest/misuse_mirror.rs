//! Misuse of the mirror's calls: whatever a program hands to the driver, the answer is the documented error, and nothing has
//! changed.
//!
//! Runs in the virtual GPU host: `bench/test guest_misuse_mirror`.

use crate::common::driver::on_each_kind;
use crate::common::memory::{Area, PAGE};
use crate::common::mirror::{
    device_check, fault, mirrored, read, read_to, try_fault, wants, write, MAP, MIGRATE, NONE,
    READ, WRITE,
};
use crate::common::misuse::{bad_ranges, call, user_end, Bystander};
use crate::common::to_device;
use hmm_gpu::uapi::{
    self, hmm_gpu_access, hmm_gpu_device_fault, hmm_gpu_fault, hmm_gpu_mirror, hmm_gpu_snapshot,
    HMM_GPU_OP_COPY as OP_COPY, HMM_GPU_OP_READ as OP_READ, HMM_GPU_OP_WRITE as OP_WRITE,
};
use hmm_gpu::{Device, Errno};

const RW: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;

/// A call with a structure of its own.
fn ask<T: bytemuck::Pod>(device: &Device, number: u32, argument: &mut T) -> Result<(), Errno> {
    call(device, number, std::ptr::from_mut(argument) as usize)
}

/// What all of these tests have: memory that is accessed, and a buffer. Nothing of it may change.
struct Scene {
    bystander: Bystander,
    area: Area,
    buffer: Area,
}

impl Scene {
    fn new(device: &Device) -> Self {
        Self {
            bystander: Bystander::new(device),
            area: Area::filled(8, 1),
            buffer: Area::filled(8, 2),
        }
    }

    /// A good access.
    fn access(&self, op: u32) -> hmm_gpu_access {
        let (buffer, to) = (self.buffer.addr as u64, self.area.page(4).addr as u64);
        hmm_gpu_access {
            op,
            policy: MAP,
            addr: self.area.addr as u64,
            len: 3 * PAGE as u64,
            buffer_ptr: if op == OP_COPY { 0 } else { buffer },
            to_addr: if op == OP_COPY { to } else { 0 },
            ..Default::default()
        }
    }

    #[track_caller]
    fn refused(&self, device: &Device, what: &str, mut access: hmm_gpu_access, errno: Errno) {
        let asked = access;
        let answer = ask(device, uapi::HMM_GPU_ACCESS, &mut access);
        assert_eq!(answer, Err(errno), "{what}: {asked:x?}");
        assert_eq!((access.done_bytes, access.entry), (0, 0), "{what}");
    }

    #[track_caller]
    fn finish(self, device: &Device) {
        self.area.check(1);
        self.buffer.check(2);
        self.bystander.finish(device);
    }
}

/// Catches an operation, policy, flag or field that is ignored: a later version could never give it a meaning.
#[test]
fn unknown_operations_policies_flags_and_fields_are_refused() {
    on_each_kind(|device| {
        let scene = Scene::new(device);
        for op in [OP_READ, OP_WRITE, OP_COPY] {
            let good = scene.access(op);
            for wrong in [3, 4, 1 << 31, u32::MAX] {
                let op = hmm_gpu_access { op: wrong, ..good };
                scene.refused(device, "an operation", op, Errno::INVAL);
                let policy = hmm_gpu_access {
                    policy: wrong,
                    ..good
                };
                scene.refused(device, "a policy", policy, Errno::INVAL);
            }
            for bit in 0..64 {
                let flags = hmm_gpu_access {
                    flags: 1 << bit,
                    ..good
                };
                scene.refused(device, "a flag", flags, Errno::INVAL);
            }
            for reserved in [[1, 0], [0, 1], [0, 1 << 63]] {
                let reserved = hmm_gpu_access { reserved, ..good };
                scene.refused(device, "a reserved word", reserved, Errno::INVAL);
            }
            // A field that the operation has no use for.
            let useless = if op == OP_COPY {
                hmm_gpu_access {
                    buffer_ptr: scene.buffer.addr as u64,
                    ..good
                }
            } else {
                hmm_gpu_access {
                    to_addr: scene.area.page(4).addr as u64,
                    ..good
                }
            };
            scene.refused(device, "a useless field", useless, Errno::INVAL);
        }

        let faults = [wants(scene.area.addr, READ); 2];
        let good = hmm_gpu_fault {
            faults_ptr: faults.as_ptr() as u64,
            count: 2,
            policy: MAP,
            ..Default::default()
        };
        let mut cases: Vec<hmm_gpu_fault> = [NONE, 3, 1 << 31]
            .map(|policy| hmm_gpu_fault { policy, ..good })
            .into();
        cases.extend([0, 65537, u32::MAX].map(|count| hmm_gpu_fault { count, ..good }));
        cases.extend((0..64).map(|bit| hmm_gpu_fault {
            flags: 1 << bit,
            ..good
        }));
        cases.extend([[1, 0], [0, 1]].map(|reserved| hmm_gpu_fault { reserved, ..good }));
        for mut argument in cases {
            let answer = ask(device, uapi::HMM_GPU_FAULT, &mut argument);
            assert_eq!(answer, Err(Errno::INVAL), "{argument:?}");
        }
        // One of many that wants something else: none is serviced.
        for unknown in [2, 1 << 31] {
            let mut faults = [wants(scene.area.addr, READ); 20];
            faults[13].access = unknown;
            let (answer, _) = try_fault(device, &mut faults, MAP);
            assert_eq!(answer, Err(Errno::INVAL));
            assert!(faults.iter().all(|fault| fault.status == 0x7777_7777));
        }
        assert!(faults.iter().all(|fault| fault.status == 0x7777_7777));
        assert_eq!(mirrored(device, *scene.area), 0);

        let mut entries = [7_u64; 8];
        let good = hmm_gpu_snapshot {
            addr: scene.area.addr as u64,
            len: scene.area.bytes() as u64,
            entries_ptr: entries.as_mut_ptr() as u64,
            ..Default::default()
        };
        let mut cases: Vec<hmm_gpu_snapshot> = (0..64)
            .map(|bit| hmm_gpu_snapshot {
                flags: 1 << bit,
                ..good
            })
            .collect();
        cases.extend([[1, 0], [0, 1]].map(|reserved| hmm_gpu_snapshot { reserved, ..good }));
        for mut argument in cases {
            let answer = ask(device, uapi::HMM_GPU_SNAPSHOT, &mut argument);
            assert_eq!(answer, Err(Errno::INVAL), "{argument:?}");
        }
        assert_eq!(entries, [7; 8]);

        for bit in 0..32 {
            let mut argument = hmm_gpu_mirror {
                flags: 1 << bit,
                ..Default::default()
            };
            let answer = ask(device, uapi::HMM_GPU_MIRROR, &mut argument);
            assert_eq!((answer, argument.levels), (Err(Errno::INVAL), 0));
        }
        for i in 0..5 {
            let mut argument = hmm_gpu_mirror::default();
            argument.reserved[i] = 1 << (9 * i);
            let answer = ask(device, uapi::HMM_GPU_MIRROR, &mut argument);
            assert_eq!((answer, argument.levels), (Err(Errno::INVAL), 0));
        }
        scene.finish(device);
    });
}

/// Catches a range that is believed: empty, wrapping, in the kernel, outside of any address space, or copied over itself.
#[test]
fn ranges_that_cannot_be_are_refused() {
    on_each_kind(|device| {
        let scene = Scene::new(device);
        for (what, addr, len, errno) in bad_ranges(&scene.area) {
            let mut entries = [7_u64; 64];
            let mut argument = hmm_gpu_snapshot {
                addr,
                len,
                entries_ptr: entries.as_mut_ptr() as u64,
                ..Default::default()
            };
            let answer = ask(device, uapi::HMM_GPU_SNAPSHOT, &mut argument);
            assert_eq!(answer, Err(errno), "snapshot {what}");
            assert_eq!(entries, [7; 64], "{what}");
        }
        for op in [OP_READ, OP_WRITE, OP_COPY] {
            let good = scene.access(op);
            let access = hmm_gpu_access { len: 0, ..good };
            scene.refused(device, "nothing", access, Errno::INVAL);
            let beyond = [
                user_end(),
                user_end() + 10,
                1 << 62,
                0xffff_8880_0000_0000,
                0xffff_ffff_8100_0000,
                0xffff_ffff_ff60_0000,
                u64::MAX - 3 * PAGE as u64,
            ];
            for addr in beyond {
                for policy in [MAP, MIGRATE] {
                    let access = hmm_gpu_access {
                        addr,
                        policy,
                        ..good
                    };
                    scene.refused(device, "beyond user space", access, Errno::FAULT);
                }
                if op == OP_COPY {
                    let access = hmm_gpu_access {
                        to_addr: addr,
                        ..good
                    };
                    scene.refused(device, "to beyond user space", access, Errno::FAULT);
                }
            }
            let wraps = u64::MAX - 3 * PAGE as u64 + 2;
            let access = hmm_gpu_access {
                addr: wraps,
                ..good
            };
            scene.refused(device, "wrapping", access, Errno::INVAL);
            let access = match op {
                OP_COPY => hmm_gpu_access {
                    to_addr: wraps,
                    ..good
                },
                _ => hmm_gpu_access {
                    buffer_ptr: wraps,
                    ..good
                },
            };
            scene.refused(device, "a target that wraps", access, Errno::INVAL);
        }
        let good = scene.access(OP_COPY);
        let len = good.len as i64;
        for shift in [0, 1, -1, 8, -8, len / 2, -len / 2, len - 1, 1 - len] {
            let middle = scene.area.page(4).addr as u64 + 100;
            let access = hmm_gpu_access {
                addr: middle,
                to_addr: middle.wrapping_add_signed(shift),
                ..good
            };
            scene.refused(device, "over itself", access, Errno::INVAL);
        }
        scene.finish(device);
    });
}

/// Catches answers that are written where they must not be, and lists that are read where they cannot be.
#[test]
fn arrays_that_cannot_be_read_or_written_are_a_fault() {
    on_each_kind(|device| {
        let scene = Scene::new(device);
        let answers = Area::filled(3, 8);
        answers.page(2).protect(libc::PROT_READ);
        let bad = [
            ("null", 0),
            ("the kernel", 0xffff_8880_0000_0000_u64),
            ("wrapping", u64::MAX - 15),
            ("not canonical", 1 << 62),
            ("read-only", answers.page(2).addr as u64),
            ("half of it read-only", answers.page(2).addr as u64 - 32),
        ];
        for (what, place) in bad {
            let mut argument = hmm_gpu_snapshot {
                addr: scene.area.addr as u64,
                len: scene.area.bytes() as u64,
                entries_ptr: place,
                ..Default::default()
            };
            let answer = ask(device, uapi::HMM_GPU_SNAPSHOT, &mut argument);
            assert_eq!(answer, Err(Errno::FAULT), "snapshot: {what}");
        }
        answers.page(0).check(8);
        answers.page(2).check(8);
        // Good faults that can be read, but whose status cannot be written.
        let bytes = size_of::<hmm_gpu_device_fault>();
        answers.page(2).protect(RW);
        let at = answers.page(2).addr - 2 * bytes;
        for i in 0..4 {
            let place = (at + i * bytes) as *mut hmm_gpu_device_fault;
            // SAFETY: in the area.
            unsafe { place.write(wants(scene.area.page(i).addr, READ)) };
        }
        answers.page(2).protect(libc::PROT_READ);
        for (what, place) in bad {
            let place = if what.contains("half") {
                at as u64
            } else {
                place
            };
            let mut argument = hmm_gpu_fault {
                faults_ptr: place,
                count: 4,
                policy: MAP,
                ..Default::default()
            };
            let answer = ask(device, uapi::HMM_GPU_FAULT, &mut argument);
            let expected = match what {
                // The pattern of a seed is no list of faults.
                "read-only" => [Errno::INVAL, Errno::FAULT],
                _ => [Errno::FAULT; 2],
            };
            assert!(
                answer.is_err_and(|errno| expected.contains(&errno)),
                "faults: {what}: {answer:?}"
            );
        }
        scene.finish(device);
    });
}

/// Catches a driver that faults for ever, or answers wrongly, when what it is handed lies in VRAM itself, or in the very pages that it
/// services.
#[test]
fn arguments_and_answers_of_the_mirror_may_lie_in_vram() {
    on_each_kind(|device| {
        for policy in [MAP, MIGRATE] {
            let area = Area::filled(40, 7);
            // A structure on a page that is accessed, in VRAM; a buffer on another.
            let at = area.page(10).addr + 64;
            let argument = hmm_gpu_access {
                op: OP_READ,
                policy,
                addr: area.addr as u64,
                len: 10 * PAGE as u64 + 64,
                buffer_ptr: area.page(20).addr as u64,
                ..Default::default()
            };
            // SAFETY: in the area.
            unsafe { (at as *mut hmm_gpu_access).write(argument) };
            to_device(device, *area);
            assert_eq!(call(device, uapi::HMM_GPU_ACCESS, at), Ok(()));
            // SAFETY: as above.
            let answer = unsafe { (at as *const hmm_gpu_access).read() };
            assert_eq!(answer.done_bytes, argument.len);
            area.part(0, 10).check(7);
            area.part(0, 10).at(area.page(20).addr).check(7);

            // A list of faults on a page that is one of those.
            let at = area.page(3).addr + 32;
            for i in 0..20 {
                let place = (at as *mut hmm_gpu_device_fault).wrapping_add(i);
                // SAFETY: in the area.
                unsafe { place.write(wants(area.page(i).addr, WRITE)) };
            }
            let mut argument = hmm_gpu_fault {
                faults_ptr: at as u64,
                count: 20,
                policy,
                ..Default::default()
            };
            to_device(device, *area);
            assert_eq!(ask(device, uapi::HMM_GPU_FAULT, &mut argument), Ok(()));
            assert_eq!((argument.mapped_pages, argument.failed_pages), (20, 0));
            for i in 0..20 {
                let place = (at as *const hmm_gpu_device_fault).wrapping_add(i);
                // SAFETY: as above.
                let fault = unsafe { place.read() };
                assert_eq!((fault.addr, fault.status), (area.page(i).addr as u64, 0));
            }
            area.part(0, 3).check(7);
            area.part(4, 6).check(7);
            device_check(device, area.part(11, 9), 7);

            // A snapshot of the page that it is written to.
            to_device(device, *area);
            let mut argument = hmm_gpu_snapshot {
                addr: area.addr as u64,
                len: area.bytes() as u64,
                entries_ptr: area.page(30).addr as u64,
                ..Default::default()
            };
            assert_eq!(ask(device, uapi::HMM_GPU_SNAPSHOT, &mut argument), Ok(()));
            // SAFETY: in the area.
            let seen = unsafe { std::slice::from_raw_parts(area.page(30).addr as *const u64, 40) };
            let in_vram = |seen: &&u64| **seen & uapi::HMM_GPU_SNAPSHOT_DEVICE != 0;
            assert_eq!(seen.iter().filter(in_vram).count(), 40, "{seen:x?}");
            area.part(31, 9).check(7);
        }
    });
}

/// Catches an access whose own answer is written over what it accesses, twice or never: the last word is the answer's.
#[test]
fn an_answer_may_be_in_what_is_read_or_written() {
    on_each_kind(|device| {
        let area = Area::filled(2, 1);
        let at = area.addr + 512;
        let argument = hmm_gpu_access {
            op: OP_WRITE,
            policy: MAP,
            addr: area.addr as u64,
            len: PAGE as u64,
            buffer_ptr: area.page(1).addr as u64,
            ..Default::default()
        };
        // SAFETY: in the area.
        unsafe { (at as *mut hmm_gpu_access).write(argument) };
        to_device(device, *area);
        assert_eq!(call(device, uapi::HMM_GPU_ACCESS, at), Ok(()));
        // SAFETY: as above.
        let answer = unsafe { (at as *const hmm_gpu_access).read() };
        assert_eq!(
            (answer.addr, answer.done_bytes),
            (argument.addr, argument.len)
        );
        area.page(1).check(1);
        // A read that would end in its own structure, and one that misses.
        let mut bytes = [0; 8];
        read(device, at + 8, &mut bytes, MAP).whole(8);
        assert_eq!(u64::from_ne_bytes(bytes), argument.addr);
        read_to(device, area.page(1).addr, area.addr, 256, MAP).whole(256);
        write(device, area.page(1).addr, &[3; 5], MAP).whole(5);
        let mut faults = [wants(at, READ), wants(area.page(1).addr, WRITE)];
        assert_eq!(fault(device, &mut faults, MIGRATE).mapped_pages, 2);
    });
}
