//! The mirror: what the device reads and writes at a process's addresses.
//!
//! Runs in the virtual GPU host: `bench/test guest_mirrors`.

use std::os::fd::AsRawFd;

use crate::common::driver::{counters, on_each_kind, Driver, GPUS};
use crate::common::kernel::{self};
use crate::common::memory::{Area, Span, HUGE, PAGE};
use crate::common::mirror::{
    copy, device_check, device_check_by, device_check_zero, device_fill, device_fill_by, fault_all,
    mirrored, read, read_to, snapshot, table, write, write_from, MAP, MIGRATE, NONE, READ, WRITE,
};
use crate::common::random::Random;
use crate::common::{assert_place, places, to_device};
use hmm_gpu::uapi::{
    HMM_GPU_PTE_REQUESTED as REQUESTED, HMM_GPU_PTE_SYSTEM as SYSTEM, HMM_GPU_PTE_VALID as VALID,
};
use hmm_gpu::{Device, Errno, Place, Target};

const RW: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;
const ANONYMOUS: libc::c_int = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;

/// Catches a byte that is read from or written to the wrong place, or beside it, at any length and alignment: inside of a page, over
/// the ends of pages, mappings and 2 MiB, in VRAM and in system memory.
#[test]
fn the_device_accesses_any_bytes() {
    const PAGES: usize = 24;

    on_each_kind(|device| {
        // 2 MiB end after ten pages; three kinds of mapping, five mappings.
        let area = Area::offset(HUGE - 10, PAGES);
        area.advise(libc::MADV_NOHUGEPAGE).unwrap();
        area.part(6, 3)
            .map_over(RW, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1);
        area.part(14, 5).advise(libc::MADV_DONTFORK).unwrap();
        area.fill(1);
        let words = area.pattern(1);
        let mut model: Vec<u8> = bytemuck::cast_slice(&words).to_vec();
        let mut random = Random::new(11);
        let all = |model: &[u8], what: &dyn Fn() -> String| {
            let mut bytes = vec![0xee; model.len()];
            read(device, area.addr, &mut bytes, MAP).whole(model.len());
            let wrong = (0..model.len()).find(|&i| bytes[i] != model[i]);
            assert_eq!(wrong, None, "the first wrong byte after {}", what());
        };
        let lengths = [
            1, 2, 3, 7, 8, 9, 100, 4095, 4096, 4097, 8191, 8193, 20001, 40960,
        ];
        for (step, len) in lengths.into_iter().cycle().take(56).enumerate() {
            let room = area.bytes() - len;
            let from = match step % 4 {
                0 => (10 * PAGE - len / 2).min(room),
                1 => random.below(PAGES) * PAGE,
                2 => ((1 + random.below(PAGES)) * PAGE).saturating_sub(len),
                _ => random.below(room),
            }
            .min(room);
            let policy = [MAP, MIGRATE][random.below(2)];
            // What is written is not what is there.
            let bytes: Vec<u8> = (0..len).map(|_| random.next() as u8).collect();
            write(device, area.addr + from, &bytes, policy).whole(len);
            model[from..from + len].copy_from_slice(&bytes);
            all(&model, &|| format!("a write of {len} bytes at {from:#x}"));

            let mut bytes = vec![0; len];
            read(device, area.addr + from, &mut bytes, policy).whole(len);
            assert!(bytes == model[from..from + len], "{len} at {from:#x}");

            // To where it fits beside itself, if it does: up to the very next byte.
            let room = [(from + len, area.bytes()), (0, from)];
            let room = room.map(|(start, end)| (start, (end - start).saturating_sub(len)));
            let (start, room) = *room.iter().max_by_key(|room| room.1).unwrap();
            if room > 0 {
                let to = start + random.below(room + 1);
                copy(device, area.addr + from, area.addr + to, len, policy).whole(len);
                model.copy_within(from..from + len, to);
                all(&model, &|| {
                    format!("a copy of {len} from {from:#x} to {to:#x}")
                });
            }

            // Meanwhile pages go here and there, and the CPU writes.
            let first = random.below(PAGES - 4);
            let part = area.part(first, 1 + random.below(4));
            let target = [Target::Device, Target::System][random.below(2)];
            device
                .prefetch_range(part.addr, part.bytes(), target)
                .unwrap();
            let at = random.below(area.bytes());
            // SAFETY: a byte of the area.
            unsafe { ((area.addr + at) as *mut u8).write_volatile(step as u8) };
            model[at] = step as u8;
        }
        all(&model, &|| "all".into());
        snapshot(device, *area);
        // SAFETY: the area is mapped, and nobody writes to it.
        let bytes = unsafe { std::slice::from_raw_parts(area.addr as *const u8, area.bytes()) };
        assert!(bytes == model, "the CPU finds what the device found");
    });
}

/// What a device may not access.
struct Forbidden {
    what: &'static str,
    /// Makes two pages such.
    make: fn(Span),
    /// The errors of reading and writing.
    read: Option<Errno>,
    write: Option<Errno>,
}

fn forbidden() -> [Forbidden; 8] {
    let of = |what, make, read, write| Forbidden {
        what,
        make,
        read,
        write,
    };
    let (fault, access) = (Some(Errno::FAULT), Some(Errno::ACCESS));
    [
        of("a hole", Span::unmap, fault, fault),
        of(
            "a mapping without access",
            |span| span.protect(0),
            access,
            access,
        ),
        of(
            "a read-only mapping",
            |span| span.protect(libc::PROT_READ),
            None,
            access,
        ),
        of(
            "a mapping for execution only",
            |span| span.protect(libc::PROT_EXEC),
            access,
            access,
        ),
        // A processor lets it be read; the kernel's HMM does not.
        of(
            "a mapping for writing only",
            |span| span.protect(libc::PROT_WRITE),
            access,
            access,
        ),
        of("a guard page", guard, fault, fault),
        of("the end of a file", past_a_file, fault, fault),
        of("a device's registers", registers, fault, fault),
    ]
}

/// Two pages that are there to be run into.
fn guard(span: Span) {
    const MADV_GUARD_INSTALL: libc::c_int = 102;
    span.advise(MADV_GUARD_INSTALL).unwrap();
}

/// Two pages of a file that has none.
fn past_a_file(span: Span) {
    let file = crate::common::memory::file(1, 0);
    file.set_len(0).unwrap();
    span.map_over(RW, libc::MAP_SHARED, file.as_raw_fd());
}

/// Two pages of a BAR that nobody uses.
fn registers(span: Span) {
    let mut options = std::fs::OpenOptions::new();
    let bar = format!("/sys/bus/pci/devices/{}/resource2", GPUS[3]);
    let file = options.read(true).write(true).open(bar).unwrap();
    span.map_over(RW, libc::MAP_SHARED, file.as_raw_fd());
}

/// Catches an access that goes on where it may not, stops too early or too late, says the wrong place, or the wrong reason.
#[test]
fn an_access_ends_at_the_first_byte_that_it_may_not_have() {
    on_each_kind(|device| {
        for case in forbidden() {
            println!("{}", case.what);
            let area = Area::filled(10, 1);
            let other = Area::filled(10, 2);
            to_device(device, area.part(0, 2));
            let bad = area.part(4, 2);
            (case.make)(bad);
            // From inside of the second page to inside of the eighth.
            let (start, len) = (area.page(1).addr + 123, 6 * PAGE);
            let good = bad.addr - start;
            let ends = |errno: Option<Errno>, ended: crate::common::mirror::Ended| match errno {
                Some(errno) => {
                    ended.stopped(errno, good, bad.addr);
                    good
                }
                None => {
                    ended.whole(len);
                    len
                }
            };
            let bytes = |addr: usize, len: usize| {
                // SAFETY: the tests give what is mapped.
                unsafe { std::slice::from_raw_parts(addr as *const u8, len) }.to_vec()
            };
            let before = area.part(0, 4).pattern(1);
            let before: &[u8] = &bytemuck::cast_slice(&before)[PAGE + 123..];

            let mut buffer = vec![0xee; len];
            let done = ends(case.read, read(device, start, &mut buffer, MAP));
            assert!(buffer[..good] == before[..good], "what was read");
            assert!(buffer[done..].iter().all(|&byte| byte == 0xee));

            let to = other.addr + 77;
            let done = ends(case.read, copy(device, start, to, len, MIGRATE));
            assert!(bytes(to, good) == before[..good], "what was copied");
            let rest = other.pattern(2);
            let rest: &[u8] = bytemuck::cast_slice(&rest);
            assert!(bytes(to + done, len - done) == rest[77 + done..77 + len]);

            other.fill(3);
            let new = other.pattern(3);
            let new: &[u8] = bytemuck::cast_slice(&new);
            let done = ends(case.write, write(device, start, &new[5..5 + len], MAP));
            assert!(bytes(start, good) == new[5..5 + good], "what was written");
            ends(case.write, copy(device, other.addr + 9, start, len, MAP));
            assert!(bytes(start, good) == new[9..9 + good], "what was copied");
            if done < len {
                area.part(6, 4).check(1);
            }
            area.page(0).check(1);
            other.check(3);

            // Up to the very last byte it may.
            read(device, start, &mut buffer[..good], MAP).whole(good);
            assert!(buffer[..good] == new[9..9 + good]);
            // And from the first after.
            device_fill(device, area.part(6, 4), 4);
            // Nothing has come to what it may not have.
            if case.write == Some(Errno::ACCESS) {
                bad.protect(RW);
                bad.check(1);
            }
            bad.map_over(RW, ANONYMOUS, -1);
            area.part(6, 4).check(4);
        }
    });
}

/// Catches a fault that moves what it should map, maps what it should move, or does either where it should do nothing.
#[test]
fn the_policy_says_what_a_fault_does() {
    on_each_kind(|device| {
        let area = Area::filled(40, 5);
        let (mapped, moved, left) = (area.part(0, 10), area.part(10, 10), area.part(20, 20));
        let before = counters(device);
        device_check_by(device, mapped, 5, MAP);
        assert_place(device, mapped, Place::System);
        device_check_by(device, moved, 5, MIGRATE);
        assert_place(device, moved, Place::Device);
        assert_eq!(
            (mirrored(device, mapped), mirrored(device, moved)),
            (10, 10)
        );
        let work = counters(device);
        assert_eq!(work.to_device_pages - before.to_device_pages, 10);
        let faults = work.device_faults - before.device_faults;
        assert!((2..=20).contains(&faults), "{faults} faults");
        assert_eq!(
            work.device_read_bytes - before.device_read_bytes,
            20 * PAGE as u64
        );
        assert_eq!(work.device_written_bytes, before.device_written_bytes);

        // What the table has is no fault, and so nothing moves.
        device_check_by(device, mapped, 5, MIGRATE);
        device_fill_by(device, mapped, 6, MIGRATE);
        assert_place(device, mapped, Place::System);
        device_check_by(device, moved, 5, MAP);
        assert_place(device, moved, Place::Device);
        device_check_by(device, area.part(0, 10), 6, NONE);
        assert_eq!(counters(device).device_faults, work.device_faults);

        // Nothing is serviced: the device is told what it found, and marks it.
        let mut byte = [0xee];
        let ask = |addr: usize, byte: &mut [u8]| read(device, addr, byte, NONE);
        let page = left.page(3).addr;
        for found in [0, REQUESTED] {
            let ended = ask(page + 9, &mut byte);
            ended.stopped(Errno::AGAIN, 0, page);
            assert_eq!(ended.entry, found, "{found:#x}");
        }
        assert_eq!(byte, [0xee]);
        assert_eq!(mirrored(device, left), 0);
        assert_eq!(
            counters(device).device_faults,
            work.device_faults,
            "what is not serviced does not count"
        );
        // Other pages are not marked by that, and what is then mapped is.
        assert_eq!(ask(left.page(4).addr, &mut byte).entry, 0);
        assert_eq!(fault_all(device, left.page(3), READ, MAP), 0);
        ask(page, &mut byte).whole(1);
        // Up to what is not there.
        let mut bytes = vec![0; 3 * PAGE];
        ask(page + 1, &mut bytes).stopped(Errno::AGAIN, PAGE - 1, left.page(4).addr);
        let pattern = left.page(3).pattern(5);
        assert!(bytes[..PAGE - 1] == bytemuck::cast_slice::<u64, u8>(&pattern)[1..]);
        // What was taken away is not there any more.
        left.page(3).advise(libc::MADV_DONTNEED).unwrap();
        let ended = ask(page, &mut byte);
        ended.stopped(Errno::AGAIN, 0, page);
        assert_eq!(ended.entry & VALID, 0);
        // And what may only be read is not there for a write.
        left.page(5).protect(libc::PROT_READ);
        device_check(device, left.page(5), 5);
        let ended = write(device, left.page(5).addr, &[1], NONE);
        ended.stopped(Errno::AGAIN, 0, left.page(5).addr);
        assert_eq!(ended.entry, VALID | SYSTEM);

        mapped.check(6);
        moved.check(5);
        left.part(0, 3).check(5);
        left.page(3).check_zero();
        left.part(4, 16).check(5);
    });
}

/// Catches a client that has no table yet, or no node for an address, and is told of an entry, or stumbles.
#[test]
fn without_a_node_there_is_no_entry() {
    on_each_kind(|device| {
        let area = Area::filled(2, 5);
        let client = Device::open_path(device.path()).unwrap();
        for _ in 0..2 {
            let ended = read(&client, area.addr, &mut [0], NONE);
            ended.stopped(Errno::AGAIN, 0, area.addr);
            assert_eq!(ended.entry, 0);
        }
        let shape = table(&client);
        assert_eq!((shape.entries, shape.invalidations), (0, 0));
        device_check(&client, area.page(0), 5);
        assert_eq!(table(&client).entries, 1);
        assert_eq!(table(device).entries, 0, "each file has its own");
        area.check(5);
    });
}

/// Catches a call that cannot be a file's first, because what it needs is made while it holds a lock.
#[test]
fn any_call_may_be_a_file_s_first() {
    on_each_kind(|device| {
        let area = Area::filled(4, 5);
        to_device(device, area.part(0, 2));
        let open = || Device::open_path(device.path()).unwrap();
        assert_eq!(places(&open(), *area).counts().device, 2);
        assert_eq!(snapshot(&open(), *area).len(), 4);
        assert_eq!(table(&open()).entries, 0);
        device_check(&open(), *area, 5);
        device_fill(&open(), *area, 6);
        assert_eq!(fault_all(&open(), *area, WRITE, MAP), 2);
        to_device(&open(), *area);
        copy(&open(), area.addr, area.page(2).addr, PAGE, MAP).whole(PAGE);
        area.part(0, 2).check(6);
        area.page(0).at(area.page(2).addr).check(6);
    });
}

/// Catches memory that is populated by a look, or not as the CPU would populate it: what was never touched reads as zeroes, in the
/// kernel's zero page, and gets a page of its own when it is written.
#[test]
fn untouched_memory_reads_as_zeroes_and_is_populated_by_writing() {
    on_each_kind(|device| {
        let area = Area::new(30);
        area.advise(libc::MADV_NOHUGEPAGE).unwrap();
        let before = counters(device);
        let (mapped, moved, rest) = (area.part(0, 10), area.part(10, 10), area.part(20, 10));
        device_check_zero(device, mapped);
        for seen in snapshot(device, mapped) {
            assert!(seen.is_zero() && seen.is_mirrored(), "{seen:?}");
            assert!(!seen.is_mirrored_writable(), "{seen:?}");
        }
        assert_eq!(kernel::smaps(area.addr, "Rss"), 0);
        assert_place(device, mapped, Place::System);

        // A word of one of them.
        let word = 0x0123_4567_89ab_cdef_u64;
        write(device, mapped.page(3).addr + 80, &word.to_ne_bytes(), MAP).whole(8);
        assert_eq!(kernel::smaps(area.addr, "Rss"), 4, "one page, and no more");
        let zero = |page| snapshot(device, mapped.page(page))[0].is_zero();
        assert!(zero(2) && !zero(3) && zero(4));
        // The same where nobody has read before.
        write(device, rest.page(7).addr, &[7], MAP).whole(1);
        assert_eq!(kernel::smaps(area.addr, "Rss"), 8);
        assert_place(device, rest.part(0, 7), Place::None);
        let live = counters(device);
        assert_eq!(
            live.live_pages - live.table_pages,
            before.live_pages - before.table_pages
        );

        // To the device: zeroes there.
        let mut bytes = vec![1; moved.bytes()];
        read(device, moved.addr, &mut bytes, MIGRATE).whole(moved.bytes());
        assert!(bytes.iter().all(|&byte| byte == 0));
        assert_place(device, moved, Place::Device);
        let work = counters(device);
        assert_eq!(work.populated_pages - before.populated_pages, 10);
        moved.check_zero();

        let mut expected = vec![0_u64; PAGE / 8];
        expected[10] = word;
        // SAFETY: a page of the area.
        let page = unsafe { std::slice::from_raw_parts(mapped.page(3).addr as *const u64, 512) };
        assert!(page == expected);
        mapped.part(0, 3).check_zero();
        mapped.part(4, 6).check_zero();

        // A huge page of zeroes, and one of its own, all but a byte of which is zero.
        let huge = Area::new(HUGE);
        huge.advise(libc::MADV_HUGEPAGE).unwrap();
        device_check_zero(device, *huge);
        assert_eq!(mirrored(device, *huge), HUGE);
        assert_eq!(kernel::smaps(huge.addr, "Rss"), 0);
        write(device, huge.page(100).addr, &[1], MAP).whole(1);
        // SAFETY: a byte of the area.
        unsafe { (huge.page(100).addr as *mut u8).write_volatile(0) };
        huge.check_zero();
    });
}

/// Catches a driver that faults for ever, or copies the wrong bytes, when the caller's buffer is itself in VRAM, in the very page that
/// is accessed, or nowhere yet.
#[test]
fn the_callers_buffer_may_be_anywhere() {
    let mut driver = Driver::load("soft=1 soft_mib=16");
    let other = Device::open(0).unwrap();
    let gpu = driver.bind(GPUS[1]);
    for (device, elsewhere) in [(&gpu, &other), (&other, &gpu)] {
        for policy in [MAP, MIGRATE] {
            let area = Area::filled(8, 1);
            let buffer = Area::filled(10, 2);
            let (addr, to, len) = (area.addr + 100, buffer.addr + 60, 6 * PAGE + 500);
            let words = area.pattern(1);
            let pattern: &[u8] = &bytemuck::cast_slice(&words)[100..100 + len];
            let found = |addr: usize| {
                // SAFETY: inside of the buffer or the area.
                unsafe { std::slice::from_raw_parts(addr as *const u8, len) }
            };
            // Where the buffer is; the range is in VRAM, and written back from there.
            for place in [Some(device), Some(elsewhere), None] {
                buffer.fill(2);
                to_device(device, area.part(0, 5));
                match place {
                    Some(place) => {
                        to_device(place, *buffer);
                    }
                    None => buffer.advise(libc::MADV_DONTNEED).unwrap(),
                }
                read_to(device, addr, to, len, policy).whole(len);
                assert!(found(to) == pattern);

                area.fill(3);
                if let Some(place) = place {
                    to_device(place, *buffer);
                }
                to_device(device, area.part(2, 5));
                write_from(device, addr, to, len, policy).whole(len);
                assert!(found(addr) == pattern);
                area.fill(1);
            }
            // The same page, or all of the same bytes: resident and not.
            for resident in [true, false] {
                area.fill(1);
                let move_it = || {
                    if resident {
                        to_device(device, *area);
                    }
                };
                move_it();
                read_to(device, area.addr, area.addr, area.bytes(), policy).whole(area.bytes());
                device_check(device, *area, 1);
                area.check(1);
                move_it();
                write_from(device, area.addr, area.addr, area.bytes(), policy).whole(area.bytes());
                area.check(1);
                move_it();
                let page = area.page(2).addr;
                read_to(device, page, page + 2048, 2048, policy).whole(2048);
                move_it();
                write_from(device, page + 1024, page, 1024, policy).whole(1024);
                let words = area.page(2).pattern(1);
                let bytes: &[u8] = bytemuck::cast_slice(&words);
                let expected = [&bytes[..1024], &bytes[..1024], &bytes[..2048]].concat();
                // SAFETY: a page of the area.
                let page = unsafe { std::slice::from_raw_parts(page as *const u8, PAGE) };
                assert!(page == expected);
                area.part(0, 2).check(1);
                area.part(3, 5).check(1);
            }
        }
    }
    drop((gpu, other));
    driver.finish();
}

/// Catches a buffer that cannot be read or written and is: the call says so, and no more is done than it says.
#[test]
fn a_buffer_that_is_not_the_callers_is_a_fault() {
    on_each_kind(|device| {
        let area = Area::filled(8, 1);
        let buffer = Area::filled(8, 2);
        to_device(device, area.part(0, 4));
        buffer.part(3, 5).protect(libc::PROT_READ);
        let ended = read_to(device, area.addr, buffer.addr, area.bytes(), MAP);
        assert_eq!(ended.result, Err(Errno::FAULT));
        assert_eq!(
            (ended.fault_addr, ended.entry),
            (0, 0),
            "no miss was the reason"
        );
        assert!(ended.done <= 3 * PAGE, "{ended:?}");
        let pattern = area.pattern(1);
        // SAFETY: in the buffer.
        let got = unsafe { std::slice::from_raw_parts(buffer.addr as *const u8, ended.done) };
        assert!(got == &bytemuck::cast_slice::<u64, u8>(&pattern)[..ended.done]);
        buffer.part(3, 5).check(2);

        // The same, if the range has an end too: that comes later, and is not the reason.
        let end = area.page(6);
        end.unmap();
        let ended = read_to(device, area.addr, buffer.addr, area.bytes(), MAP);
        assert_eq!(ended.result, Err(Errno::FAULT));
        assert!(ended.done <= 3 * PAGE, "{ended:?}");
        assert_eq!(ended.fault_addr, 0, "no miss was the reason");
        end.map_over(RW, ANONYMOUS, -1);
        end.fill(1);

        buffer.part(0, 3).fill(2);
        buffer.part(3, 5).protect(libc::PROT_NONE);
        let ended = write_from(device, area.addr, buffer.addr, area.bytes(), MAP);
        assert_eq!((ended.result, ended.fault_addr), (Err(Errno::FAULT), 0));
        assert!(ended.done <= 3 * PAGE, "{ended:?}");
        let pattern = buffer.pattern(2);
        // SAFETY: in the area.
        let got = unsafe { std::slice::from_raw_parts(area.addr as *const u8, ended.done) };
        assert!(got == &bytemuck::cast_slice::<u64, u8>(&pattern)[..ended.done]);
        area.part(3, 5).check(1);
        buffer.protect(RW);
        buffer.check(2);

        for bad in [0, 16, 0xffff_8880_0000_0000, usize::MAX - 100, 1 << 63] {
            let ended = read_to(device, area.addr, bad, 10, MAP);
            assert_eq!(
                (ended.result, ended.done),
                (Err(Errno::FAULT), 0),
                "{bad:#x}"
            );
            let ended = write_from(device, area.addr, bad, 10, MAP);
            assert_eq!(
                (ended.result, ended.done),
                (Err(Errno::FAULT), 0),
                "{bad:#x}"
            );
        }
    });
}
