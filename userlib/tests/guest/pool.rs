//! Private pools: whose they are, what is in them, and what becomes of them.
//!
//! Runs in the virtual GPU host: `bench/test guest_pool`.

use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use crate::common::child::Child;
use crate::common::driver::{counters, on_each_kind, Driver};
use crate::common::memory::{errno, last_errno, Area, HUGE, PAGE};
use crate::common::mirror::{
    call, device_check, device_fill_by, fault_all, read, table, MAP, MIGRATE, NONE, READ,
};
use crate::common::shader::{bring_in, Shader};
use crate::common::{
    assert_place, eventually, is_checking, moved, places, refused, to_device, to_system,
};
use hmm_gpu::uapi::{self, hmm_gpu_pool};
use hmm_gpu::{Device, Errno, Place, Pool, TableEntry, Target};

const MIB: usize = 1 << 20;
const RW: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;

/// Every word of a pool.
fn words(pool: &Pool) -> impl Iterator<Item = (u64, u64)> + '_ {
    let offsets = (pool.offset()..pool.offset() + pool.bytes() as u64).step_by(8);
    offsets.map(|offset| (offset, pool.load(offset).unwrap()))
}

fn mmap(
    device: &Device,
    bytes: usize,
    protection: i32,
    flags: i32,
    offset: u64,
) -> Result<usize, Errno> {
    let fd = device.as_fd().as_raw_fd();
    let offset = offset as libc::off_t;
    // SAFETY: a new map, where the kernel likes.
    let mapped = unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, flags, fd, offset) };
    if mapped == libc::MAP_FAILED {
        return Err(last_errno());
    }
    Ok(mapped as usize)
}

fn munmap(addr: usize, bytes: usize) {
    // SAFETY: mapped by a test for itself.
    errno(unsafe { libc::munmap(addr as *mut _, bytes) }).unwrap();
}

/// Another client of the same device.
fn another(device: &Device) -> Device {
    Device::open(device.unit()).unwrap()
}

/// Catches a pool that shows its client what was in the VRAM, be it of pages, of tables, or of a pool before; and one that is not
/// given back.
#[test]
fn a_pool_is_zero_when_it_is_made() {
    on_each_kind(|device| {
        let pages = 8 * MIB / PAGE;
        let area = Area::filled(pages, 1);
        to_device(device, *area);
        drop(area);
        for _ in 0..2 {
            let client = another(device);
            let pool = client.create_pool(8 * MIB).unwrap();
            assert_eq!(pool.offset() % (2 * MIB as u64), 0);
            assert_eq!(words(&pool).find(|(_, word)| *word != 0), None);
            assert_eq!(counters(device).private_pages, pages as u64);
            for offset in (pool.offset()..pool.offset() + pool.bytes() as u64).step_by(8) {
                pool.store(offset, u64::MAX).unwrap();
            }
            // Its own pages come zeroed all the same.
            let area = Area::new(100);
            bring_in(&client, *area);
            area.check_zero();
            drop((pool, client));
            assert_eq!(counters(device).private_pages, 0);
        }
        // So do another's, wherever they are.
        let area = Area::new(pages + pages / 2);
        device
            .prefetch_range(area.addr, area.bytes(), Target::Device)
            .unwrap();
        area.check_zero();
    });
}

/// Catches a pool that has to be made where there is no room in one piece, and loses bytes of those that are in the way.
#[test]
fn who_is_in_the_way_of_a_pool_leaves_with_every_byte() {
    let driver = Driver::load("soft=1 soft_mib=16");
    let device = Device::open(0).unwrap();
    // All but what tables need.
    let area = Area::filled(15 * MIB / PAGE, 2);
    to_device(&device, *area);
    let client = another(&device);
    let pool = client.create_pool(8 * MIB).unwrap();
    assert!(
        counters(&device).pressure_pages > 0,
        "nothing was in the way"
    );
    assert!(
        places(&device, *area).counts().device > 0,
        "more left than had to"
    );
    assert_eq!(words(&pool).find(|(_, word)| *word != 0), None);
    area.check(2);
    drop((pool, client, area, device));
    driver.finish();
}

/// Catches pages or nodes that are not in the pool, entries that lead elsewhere, and bytes that differ between the two ways to a page.
#[test]
fn what_comes_in_is_seen_through_the_mapping() {
    on_each_kind(|device| {
        let client = another(device);
        let pool = client.create_pool(8 * MIB).unwrap();
        let shader = Shader::new(&client, &pool);
        let small = Area::filled(50, 3);
        let large = Area::filled(2 * HUGE, 4);
        large.advise(libc::MADV_HUGEPAGE).unwrap();
        for area in [&small, &large] {
            bring_in(&client, **area);
            assert_place(&client, **area, Place::Device);
        }
        shader.check(*small, 3);
        shader.check(*large, 4);
        assert_eq!(shader.fill(*small, 5), small.pages);
        assert_eq!(shader.fill(*large, 6), large.pages);
        device_check(&client, *small, 5);
        small.check(5);
        large.check(6);
        // They have left, and the table says so.
        assert_eq!(shader.page(small.addr), None);
        // What is in the shared pool comes into this one; mapped where it is, it is out of reach.
        to_device(device, *small);
        assert_eq!(fault_all(&client, small.part(0, 20), READ, MIGRATE), 20);
        shader.check(small.part(0, 20), 5);
        client
            .prefetch_range(small.page(20).addr, 30 * PAGE, Target::Device)
            .unwrap();
        bring_in(&client, small.part(20, 30));
        shader.check(*small, 5);
        to_system(&client, *small);
        fault_all(&client, *small, READ, MAP);
        for i in 0..small.pages {
            assert!(shader
                .walk(small.page(i).addr)
                .is_some_and(TableEntry::is_system));
        }
        small.check(5);
        drop((small, large));
    });
}

/// Catches a mapping that somebody else gets, or that is more than a mapping of the pool.
#[test]
fn only_its_client_maps_it() {
    on_each_kind(|device| {
        let client = another(device);
        let (shared, private) = (libc::MAP_SHARED, libc::MAP_PRIVATE);
        assert_eq!(mmap(&client, PAGE, RW, shared, 0), Err(Errno::NXIO));
        let pool = client.create_pool(4 * MIB).unwrap();
        let (start, end) = (pool.offset(), pool.offset() + pool.bytes() as u64);
        assert_eq!(mmap(&client, PAGE, RW, private, start), Err(Errno::INVAL));
        let exec = RW | libc::PROT_EXEC;
        assert_eq!(mmap(&client, PAGE, exec, shared, start), Err(Errno::PERM));
        assert_eq!(mmap(&client, PAGE, RW, shared, end), Err(Errno::NXIO));
        assert_eq!(
            mmap(&client, 2 * PAGE, RW, shared, end - PAGE as u64),
            Err(Errno::NXIO)
        );
        assert_eq!(mmap(&client, 5 * MIB, RW, shared, start), Err(Errno::NXIO));
        if start > 0 {
            assert_eq!(
                mmap(&client, PAGE, RW, shared, start - PAGE as u64),
                Err(Errno::NXIO)
            );
        }
        // Another file has none of it.
        assert_eq!(mmap(device, PAGE, RW, shared, start), Err(Errno::NXIO));
        // The last page alone, which is the last page of all.
        let last = mmap(&client, PAGE, RW, shared, end - PAGE as u64).unwrap();
        // SAFETY: just mapped.
        unsafe { (last as *mut u64).write_volatile(77) };
        assert_eq!(pool.load(end - PAGE as u64), Some(77));
        // SAFETY: changes no bytes.
        let forked = errno(unsafe { libc::madvise(last as *mut _, PAGE, libc::MADV_DOFORK) });
        assert_eq!(forked, Err(Errno::INVAL));
        // SAFETY: as above.
        let executed = errno(unsafe { libc::mprotect(last as *mut _, PAGE, exec) });
        assert_eq!(executed, Err(Errno::ACCESS));
        Child::fork(|_| {
            assert_eq!(mmap(&client, PAGE, RW, shared, start), Err(Errno::PERM));
            let mut vec = [0u8; 1];
            // SAFETY: there is room for one page's answer.
            let there = errno(unsafe { libc::mincore(last as *mut _, PAGE, vec.as_mut_ptr()) });
            assert_eq!(there, Err(Errno::NOMEM), "a forked child has the mapping");
        })
        .finish();
        munmap(last, PAGE);
    });
}

/// Catches a pool that is made where none may be, twice, or too large; and private pools that leave nothing for others.
#[test]
fn a_pool_is_made_once_and_within_its_share() {
    let driver = Driver::load("soft=1 soft_mib=16 pool_share=60");
    let shared = Device::open(0).unwrap();
    let client = Device::open(0).unwrap();
    for bytes in [0, PAGE, MIB, 3 * MIB, 2 * MIB + PAGE] {
        assert_eq!(refused(client.create_pool(bytes)), Errno::INVAL, "{bytes}");
    }
    for bytes in [
        10 * MIB,
        16 * MIB,
        18 * MIB,
        1 << 45,
        usize::MAX / (2 * MIB) * 2 * MIB,
    ] {
        assert_eq!(refused(client.create_pool(bytes)), Errno::NOSPC, "{bytes}");
    }
    let pool = client.create_pool(6 * MIB).unwrap();
    assert_eq!(refused(client.create_pool(2 * MIB)), Errno::EXIST);
    // 60 percent of 8 blocks are 4.
    let second = Device::open(0).unwrap();
    assert_eq!(refused(second.create_pool(4 * MIB)), Errno::NOSPC);
    let second_pool = second.create_pool(2 * MIB).unwrap();
    assert_eq!(counters(&shared).private_pages, (8 * MIB / PAGE) as u64);
    drop((second_pool, second));
    // Who has something in VRAM makes none: neither pages nor a table.
    for i in 0..2 {
        let third = Device::open(0).unwrap();
        let area = Area::filled(1, 1);
        if i == 0 {
            third
                .prefetch_range(area.addr, PAGE, Target::Device)
                .unwrap();
        } else {
            table(&third);
        }
        assert_eq!(refused(third.create_pool(2 * MIB)), Errno::BUSY);
    }
    // The rest is everybody's.
    let area = Area::filled(7 * MIB / PAGE, 8);
    to_device(&shared, *area);
    area.check(8);
    drop((area, pool, client, shared));
    driver.finish();
}

extern "C" fn on_alarm(_: libc::c_int) {}

/// Interrupts what this process waits in, in so long, or not at all.
fn interrupt_in(time: Duration) {
    let timer = libc::itimerval {
        it_interval: libc::timeval {
            tv_sec: 0,
            tv_usec: 0,
        },
        it_value: libc::timeval {
            tv_sec: time.as_secs() as libc::time_t,
            tv_usec: time.subsec_micros() as libc::suseconds_t,
        },
    };
    // SAFETY: it has everything that the call reads.
    let set = unsafe { libc::setitimer(libc::ITIMER_REAL, &raw const timer, std::ptr::null_mut()) };
    errno(set).unwrap();
}

/// Catches VRAM of a pool that came to nothing which is lost, or not as free VRAM is (the checking kernel tells when it is taken again).
#[test]
fn a_pool_that_is_interrupted_comes_to_nothing() {
    const PARTS: u32 = 8;

    // Where all takes several times longer, less takes long enough.
    let mib = if is_checking() { 16 } else { 64 };
    let bytes = (mib - 8) * MIB;
    let driver = Driver::load(&format!("soft=1 soft_mib={mib} pool_share=100"));
    // Which has one thread: that gets the signal.
    let child = Child::fork(|_| {
        let device = Device::open(0).unwrap();
        let area = Area::filled((mib - 4) * MIB / PAGE, 1);
        let use_all = || {
            eventually("the pool is given back", || {
                counters(&device).private_pages == 0
            });
            to_device(&device, *area);
            to_system(&device, *area);
            area.check(1);
        };
        use_all();
        let handler: extern "C" fn(libc::c_int) = on_alarm;
        // SAFETY: zeroes are an empty set, and no flags: calls are not begun again.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = handler as libc::sighandler_t;
        // SAFETY: the handler does nothing.
        let done =
            unsafe { libc::sigaction(libc::SIGALRM, &raw const action, std::ptr::null_mut()) };
        errno(done).unwrap();
        let began = Instant::now();
        drop(another(&device).create_pool(bytes).unwrap());
        let whole = began.elapsed();
        use_all();
        let mut interrupted = 0;
        for part in 1..PARTS {
            let client = another(&device);
            interrupt_in((whole * part / PARTS).max(Duration::from_micros(1)));
            let mut pool = hmm_gpu_pool {
                bytes: bytes as u64,
                ..Default::default()
            };
            // The library would make the call again.
            let made = call(&client, uapi::HMM_GPU_POOL, &mut pool);
            interrupt_in(Duration::ZERO);
            drop(client);
            if made.is_err() {
                assert_eq!(made, Err(Errno::INTR));
                interrupted += 1;
            }
            use_all();
        }
        assert!(interrupted > 0, "of {PARTS} none, in {whole:?}");
    });
    child.finish();
    driver.finish();
}

/// Catches eviction that goes beyond a pool, in either direction, and bytes that it loses.
#[test]
fn pressure_stays_inside_a_pool() {
    let driver = Driver::load("soft=1 soft_mib=32");
    let shared = Device::open(0).unwrap();
    let client = Device::open(0).unwrap();
    let pool = client.create_pool(4 * MIB).unwrap();
    let bystander = Area::filled(1000, 1);
    to_device(&shared, *bystander);
    // Four times what there is room for, three times.
    let area = Area::filled(16 * MIB / PAGE, 2);
    let mut seed = 2;
    for _ in 0..3 {
        device_fill_by(&client, *area, seed + 1, MIGRATE);
        seed += 1;
        device_check(&client, *area, seed);
        assert_place(&shared, *bystander, Place::Device);
    }
    area.check(seed);
    // As many as there is room for are private; those the others do not move.
    let own = Area::filled(900, 9);
    to_device(&client, *own);
    let shader = Shader::new(&client, &pool);
    bring_in(&client, *own);
    shader.check(*own, 9);
    let much = Area::filled(64 * MIB / PAGE, 4);
    device_fill_by(&shared, *much, 5, MIGRATE);
    assert_place(&client, *own, Place::Device);
    shader.check(*own, 9);
    much.check(5);
    own.check(9);
    bystander.check(1);
    drop((much, own, area, bystander, pool, client, shared));
    driver.finish();
}

/// Catches memory that a process shares copy-on-write with another and that it could write to past the kernel, in its pool.
#[test]
fn what_is_shared_with_another_process_does_not_come_in() {
    let driver = Driver::load("soft=1 soft_mib=16");
    let area = Area::filled(40, 1);
    let mut child = Child::fork(|parent| {
        let client = Device::open(0).unwrap();
        let pool = client.create_pool(4 * MIB).unwrap();
        let shader = Shader::new(&client, &pool);
        let ask = || client.prefetch_range(area.addr, area.bytes(), Target::Device);
        assert_eq!(ask().unwrap(), moved(0, 0, 40, 0));
        fault_all(&client, *area, READ, MIGRATE);
        assert!((0..40).all(|i| shader.page(area.page(i).addr).is_none()));
        // Nor from the shared pool.
        let shared = Device::open(0).unwrap();
        to_device(&shared, *area);
        assert_eq!(ask().unwrap().moved, 0);
        assert!((0..40).all(|i| shader.page(area.page(i).addr).is_none()));
        // What it writes to is its own.
        bring_in(&client, area.part(0, 10));
        shader.check(area.part(0, 10), 1);
        assert_eq!(shader.fill(*area, 2), 10);
        area.part(0, 10).check(2);
        area.part(10, 30).check(1);
        parent.send(0);
        parent.receive();
    });
    child.receive();
    area.check(1);
    child.send(0);
    child.finish();
    area.check(1);
    drop(area);
    driver.finish();
}

/// Catches a pool that goes to others while somebody has its pages pinned; and one that never does.
#[test]
fn what_is_pinned_is_not_used_again() {
    let driver = Driver::load("soft=1 soft_mib=16");
    let device = Device::open(0).unwrap();
    let client = Device::open(0).unwrap();
    let pool = client.create_pool(8 * MIB).unwrap();
    let mut pipe = [0; 2];
    // SAFETY: there is room for two.
    errno(unsafe { libc::pipe(pipe.as_mut_ptr()) }).unwrap();
    let at = pool.offset() + (5 * MIB) as u64;
    pool.store(at, 0x5ec3e7).unwrap();
    let piece = libc::iovec {
        iov_base: pool.as_ptr().wrapping_add(5 * MIB).cast(),
        iov_len: PAGE,
    };
    // SAFETY: the page is mapped; the pipe refers to it from now on.
    let spliced = unsafe { libc::vmsplice(pipe[1], &piece, 1, 0) };
    assert_eq!(spliced, PAGE as isize);
    drop((pool, client));
    let after = counters(&device);
    assert_eq!((after.private_pages, after.quarantined_pages), (512, 512));
    let again = Device::open(0).unwrap();
    assert_eq!(refused(again.create_pool(8 * MIB)), Errno::NOSPC);
    let less = again.create_pool(6 * MIB).unwrap();
    assert!(
        less.offset() + less.bytes() as u64 <= at & !(2 * MIB as u64 - 1) || less.offset() > at
    );
    drop((less, again));
    // Nobody else's pages come there either.
    let area = Area::filled(13 * MIB / PAGE, 3);
    to_device(&device, *area);
    let mut bytes = [0u8; PAGE];
    // SAFETY: there is room for a page.
    let got = unsafe { libc::read(pipe[0], bytes.as_mut_ptr().cast(), PAGE) };
    assert_eq!(got, PAGE as isize);
    assert_eq!(bytes[..8], 0x5ec3e7u64.to_ne_bytes(), "it was used again");
    area.check(3);
    drop(area);
    eventually("nothing is quarantined", || {
        device.describe().unwrap();
        counters(&device).private_pages == 0
    });
    let again = Device::open(0).unwrap();
    again.create_pool(8 * MIB).unwrap();
    // SAFETY: ours.
    unsafe { libc::close(pipe[0]) };
    // SAFETY: as above.
    unsafe { libc::close(pipe[1]) };
    drop((again, device));
    driver.finish();
}

/// Catches a driver that believes what a client has written to its device page table: an access that goes where that says, or an answer
/// that tells what is there.
#[test]
fn a_table_that_was_written_to_is_not_believed() {
    on_each_kind(|device| {
        let others = Area::filled(300, 1);
        to_device(device, *others);
        let secret = table(device).root_offset;
        let client = another(device);
        let pool = client.create_pool(4 * MIB).unwrap();
        let shader = Shader::new(&client, &pool);
        let area = Area::filled(2 * HUGE, 2);
        bring_in(&client, area.part(0, 20));
        let addr = area.addr;
        let mut node = table(&client).root_offset;
        let levels = table(&client).levels;
        let mut places = vec![];
        for level in (0..levels).rev() {
            let at = node + 8 * hmm_gpu::MirrorInfo::index(addr, level) as u64;
            places.push(at);
            node = pool.load(at).unwrap() & hmm_gpu::uapi::HMM_GPU_PTE_OFFSET_MASK;
        }
        // Every level leads to another's page, to the end of the VRAM, and nowhere.
        for (i, at) in places.iter().enumerate() {
            let word = pool.load(*at).unwrap();
            for offset in [0, secret, 0x000f_ffff_ffff_f000, pool.offset()] {
                pool.store(*at, offset | 3).unwrap();
                if pool.load(*at) == Some(word) {
                    continue;
                }
                let mut bytes = [0; 64];
                let ended = read(&client, addr, &mut bytes, NONE);
                assert_eq!(ended.result, Err(Errno::IO), "level {i}: {ended:x?}");
                assert_eq!((ended.entry, bytes), (0, [0; 64]), "level {i}");
                // Where the driver has no entry, too, as far as it is the same way.
                if i + 1 < places.len() {
                    let other = area.page(HUGE - 1).addr.min(addr | 0x1f_f000);
                    let ended = read(&client, other, &mut bytes, NONE);
                    assert_eq!(
                        (ended.result, ended.entry),
                        (Err(Errno::IO), 0),
                        "level {i}"
                    );
                }
            }
            pool.store(*at, word).unwrap();
        }
        shader.check(area.part(0, 20), 2);
        device_check(&client, area.part(0, 20), 2);
        others.check(1);
        area.check(2);
    });
}

/// Catches a mapping that outlives the device, and memory of it that can be touched then.
#[test]
fn after_an_unbind_the_mapping_is_sigbus() {
    use crate::common::driver::GPUS;
    let (mut driver, device) = Driver::load_with("", GPUS[0]);
    drop(device);
    let mut child = Child::fork(|parent| {
        let client = crate::common::driver::device_of(GPUS[0]);
        let pool = client.create_pool(4 * MIB).unwrap();
        pool.store(pool.offset(), 1).unwrap();
        let area = Area::filled(100, 6);
        bring_in(&client, *area);
        parent.send(0);
        parent.receive();
        area.check(6);
        assert_eq!(
            refused(client.begin_execution(std::time::Duration::from_secs(1))),
            Errno::NODEV
        );
        parent.send(0);
        // The kernel ends it here.
        pool.load(pool.offset());
        parent.send(0);
    });
    child.receive();
    driver.unbind(GPUS[0]);
    child.step();
    child.finish_killed(libc::SIGBUS);
    driver.finish();
}

/// Catches a pool whose client closes the file while its memory is in there, and loses or leaks pages.
#[test]
fn what_is_in_a_pool_outlives_its_client() {
    let driver = Driver::load("soft=1 soft_mib=16");
    let device = Device::open(0).unwrap();
    let area = Area::filled(700, 7);
    let client = Device::open(0).unwrap();
    let pool = client.create_pool(8 * MIB).unwrap();
    bring_in(&client, *area);
    drop((pool, client));
    assert_place(&device, *area, Place::Device);
    assert_eq!(counters(&device).private_pages, 0);
    // Where they are is everybody's now: they make room.
    let much = Area::filled(32 * MIB / PAGE, 8);
    device_fill_by(&device, *much, 9, MIGRATE);
    assert!(places(&device, *area).counts().device < 700);
    area.check(7);
    much.check(9);
    drop((area, much, device));
    driver.finish();
}
