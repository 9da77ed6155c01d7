//! What a hostile or careless user cannot do: hold others up, use a device up for nothing, or have it say what is not so.
//!
//! Runs in the virtual GPU host: `bench/test guest_hostile`.

use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use crate::common::child::Child;
use crate::common::driver::{self, assert_empty, is_bound, Driver, GPUS, IN_SLOT};
use crate::common::memory::{errno, file, last_errno, Area, Span, HUGE, PAGE};
use crate::common::random::Random;
use crate::common::{eventually, mirror, patience, refused, rounds, Stop};
use hmm_gpu::{Access, Device, DeviceFault, Errno, Error, Place, Policy, Target};

/// Waits, but not for ever. Touches no memory of its own: the address space may be stuck.
fn soon(holds: impl Fn() -> bool) -> bool {
    let begin = Instant::now();
    while !holds() {
        if begin.elapsed() > patience(Duration::from_secs(20)) {
            return false;
        }
        thread::sleep(Duration::from_millis(1));
    }
    true
}

/// Whether a call did what it should: not if the memory kept changing, or the device has gone.
fn done<T>(result: Result<T, Error>) -> Result<T, Errno> {
    result.map_err(|error| match error.errno() {
        Some(errno @ (Errno::BUSY | Errno::NODEV)) => errno,
        _ => panic!("{error}"),
    })
}

/// A device fault for one page each, `stride` bytes apart.
fn faults(addr: usize, count: usize, stride: usize, access: Access) -> Vec<DeviceFault> {
    let fault = |i| DeviceFault {
        addr: addr + i * stride,
        access,
    };
    (0..count).map(fault).collect()
}

/// The bytes that the device reads in a span.
fn device_reads(device: &Device, span: Span, policy: Policy) -> Result<Vec<u8>, Error> {
    let mut bytes = vec![0x5a; span.bytes()];
    device.read_at(span.addr, &mut bytes, policy)?;
    Ok(bytes)
}

/// The pattern of a seed, as it is on the first pages.
fn pattern(pages: usize, seed: u64) -> Vec<u8> {
    let area = Area::filled(pages, seed);
    // SAFETY: the area is mapped, and nobody writes to it.
    unsafe { std::slice::from_raw_parts(area.addr as *const u8, area.bytes()) }.to_vec()
}

/// Catches a driver that waits, with the device or the address space locked, until nobody changes the memory: threads see to it
/// that somebody always does, and then unbind never ends, and the process can neither fork nor map.
#[test]
fn memory_that_changes_without_end_holds_up_nobody() {
    type Call<'a> = dyn Fn() -> Result<(), Errno> + Sync + 'a;
    const CHANGERS: usize = 8;

    let (mut driver, device) = Driver::load_with("", GPUS[0]);
    // So large that a thread is seldom between two changes.
    let changing = Area::new(128 * HUGE);
    for advice in [
        libc::MADV_NOHUGEPAGE,
        libc::MADV_DONTFORK,
        libc::MADV_POPULATE_WRITE,
    ] {
        changing.advise(advice).unwrap();
    }
    let own = [2, 3, 4, 5].map(|seed| Area::filled(64, seed));
    let wanted = faults(own[2].addr, 64, PAGE, Access::Write);
    let range = |area: &Area| (area.addr, area.bytes());
    let residency = || done(device.residency_range(changing.addr, PAGE)).map(drop);
    let migrate = || {
        let (addr, bytes) = range(&own[0]);
        done(device.prefetch_range(addr, bytes, Target::Device))?;
        done(device.prefetch_range(addr, bytes, Target::System)).map(drop)
    };
    let access = || done(device_reads(&device, *own[1], Policy::Map)).map(drop);
    let fault = || {
        let faulted = done(device.fault(&wanted, Policy::Migrate))?;
        let failed = |status: &&Result<(), Errno>| !matches!(status, Ok(()) | Err(Errno::BUSY));
        assert_eq!(faulted.statuses().iter().find(failed), None);
        Ok(())
    };
    let snapshot = || done(device.snapshot_range(own[3].addr, own[3].bytes())).map(drop);
    let clients: [(&str, &Call<'_>); 5] = [
        ("RESIDENCY", &residency),
        ("MIGRATE", &migrate),
        ("ACCESS", &access),
        ("FAULT", &fault),
        ("SNAPSHOT", &snapshot),
    ];

    let calls: [AtomicU64; 5] = Default::default();
    let forks = AtomicU64::new(0);
    let [stop, no_forks, unbind, gone] = [(); 4].map(|()| AtomicBool::new(false));
    let is = |flag: &AtomicBool| flag.load(Ordering::Relaxed);
    // To start a thread takes memory, which is what there may be none of soon.
    let ready = Barrier::new(CHANGERS + clients.len() + 3);
    let (mut forked, mut unbound, mut times) = (false, false, [Duration::ZERO; 2]);
    thread::scope(|scope| {
        let _stop = Stop(&stop);
        for _ in 0..CHANGERS {
            scope.spawn(|| {
                ready.wait();
                while !is(&stop) {
                    changing.advise(libc::MADV_FREE).unwrap();
                }
            });
        }
        for ((name, call), calls) in clients.iter().zip(&calls) {
            let (stop, unbind, ready) = (&stop, &unbind, &ready);
            scope.spawn(move || {
                ready.wait();
                while !is(stop) {
                    match call() {
                        Ok(()) => drop(calls.fetch_add(1, Ordering::Relaxed)),
                        Err(Errno::NODEV) => {
                            assert!(is(unbind), "{name} before the device went");
                            break;
                        }
                        Err(_) => (),
                    }
                }
            });
        }
        scope.spawn(|| {
            ready.wait();
            while !is(&no_forks) && !is(&stop) {
                // SAFETY: the child does nothing but end.
                match unsafe { libc::fork() } {
                    // SAFETY: it ends the child.
                    0 => unsafe { libc::_exit(0) },
                    child => {
                        assert!(child > 0, "{}", last_errno());
                        // SAFETY: it waits for the child just made.
                        let ended = unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) };
                        assert_eq!(ended, child);
                    }
                }
                Area::new(10).touch();
                forks.fetch_add(1, Ordering::Relaxed);
            }
        });
        scope.spawn(|| {
            ready.wait();
            while !is(&unbind) && !is(&stop) {
                thread::sleep(Duration::from_millis(1));
            }
            driver::write("/sys/bus/pci/drivers/hmm_gpu/unbind", GPUS[0]).unwrap();
            gone.store(true, Ordering::Relaxed);
        });

        ready.wait();
        let begin = Instant::now();
        forked = soon(|| forks.load(Ordering::Relaxed) >= 3);
        times[0] = begin.elapsed();
        // A fork keeps the others from changing anything, and lets one through who waits for that.
        no_forks.store(true, Ordering::Relaxed);
        thread::sleep(Duration::from_millis(300));
        let begin = Instant::now();
        unbind.store(true, Ordering::Relaxed);
        unbound = soon(|| is(&gone));
        times[1] = begin.elapsed();
    });
    println!(
        "3 forks and maps after {:?}, unbound after {:?}",
        times[0], times[1]
    );
    for ((name, _), calls) in clients.iter().zip(&calls) {
        println!("{name}: {} calls", calls.load(Ordering::Relaxed));
    }
    assert!(forked, "the process could neither fork nor map");
    assert!(unbound, "unbind waited for the process");
    driver.lost(GPUS[0]);
    let taken_by = format!("/sys/bus/pci/devices/{}/driver_override", GPUS[0]);
    driver::write(&taken_by, "\n").unwrap();
    assert!(!is_bound(GPUS[0]));
    // These two need nothing that does not change.
    for calls in &calls[..2] {
        assert_ne!(calls.load(Ordering::Relaxed), 0);
    }
    for (area, seed) in own.iter().zip(2..) {
        area.check(seed);
    }
    drop(device);
    driver.finish();
}

/// Catches pages that are refused to the device, or lost, because they would not all fit into VRAM: the tables to map them by
/// are in VRAM too.
#[test]
fn more_than_fits_into_vram_is_mapped_all_the_same() {
    /// The middle of 2 MiB, and 2 MiB: they share the VRAM with the tables.
    fn area(seed: u64) -> Area {
        let area = Area::offset(HUGE / 2, HUGE / 2 + HUGE);
        area.advise(libc::MADV_NOHUGEPAGE).unwrap();
        area.fill(seed);
        area
    }

    let driver = Driver::load("soft=1 soft_mib=2");
    for access in [Access::Read, Access::Write] {
        let device = Device::open(0).unwrap();
        let area = area(7);
        let wanted = faults(area.addr, area.pages, PAGE, access);
        let faulted = device.fault(&wanted, Policy::Migrate).unwrap();
        assert_eq!(faulted.first_failure(), None, "{faulted}");
        assert_eq!(faulted.mapped_pages, area.pages as u64);
        assert!(faulted.device_pages > 400, "{faulted}");
        let counters = device.counters().unwrap();
        assert!(counters.live_pages > 500, "{counters:?}");
        assert!(counters.live_pages < area.pages as u64);
        // The table has all of it.
        let read = device_reads(&device, *area, Policy::None).unwrap();
        assert!(read == pattern(area.pages, 7));
        area.check(7);
        drop((area, device));
        assert_empty(&Device::open(0).unwrap());
    }
    for write in [false, true] {
        let device = Device::open(0).unwrap();
        let area = area(8);
        if write {
            let bytes = pattern(area.pages, 9);
            // SAFETY: this test's own, which nobody else accesses.
            let written = unsafe { device.write_at(area.addr, &bytes, Policy::Migrate) };
            written.unwrap();
        } else {
            let read = device_reads(&device, *area, Policy::Migrate).unwrap();
            assert!(read == pattern(area.pages, 8));
        }
        let counters = device.counters().unwrap();
        assert!(counters.live_pages > 500, "{counters:?}");
        let places = device.residency_range(area.addr, area.bytes()).unwrap();
        assert!(places.counts().device > 400, "{places}");
        assert!(places.counts().system > 200, "{places}");
        area.check(if write { 9 } else { 8 });
        drop((area, device));
        assert_empty(&Device::open(0).unwrap());
    }
    driver.finish();
}

/// Catches a snapshot that is put together from different moments: it would call an entry stale that is not, and who looks for
/// stale ones could not tell.
#[test]
fn a_snapshot_finds_no_stale_entry_whatever_changes() {
    const TIME: Duration = Duration::from_secs(3);

    let (driver, device) = Driver::load_with("", GPUS[0]);
    let area = Area::filled(HUGE, 1);
    let stop = AtomicBool::new(false);
    let (mut snapshots, mut mirrored, mut without) = (0, 0, 0);
    thread::scope(|scope| {
        let _stop = Stop(&stop);
        for (i, policy) in [Policy::Map, Policy::Migrate].into_iter().enumerate() {
            let (stop, device, area) = (&stop, &device, &area);
            scope.spawn(move || {
                let mut wanted = faults(area.addr + i * PAGE, 64, 8 * PAGE, Access::Read);
                for fault in wanted.iter_mut().step_by(2) {
                    fault.access = Access::Write;
                }
                let mut rounds = 0;
                while !stop.load(Ordering::Relaxed) {
                    let faulted = device.fault(&wanted, policy).unwrap();
                    let failed =
                        |status: &&Result<(), Errno>| !matches!(status, Ok(()) | Err(Errno::BUSY));
                    assert_eq!(faulted.statuses().iter().find(failed), None);
                    rounds += 1;
                    if rounds % 4 == 0 {
                        let part = area.part(i * HUGE / 2, HUGE / 2);
                        part.advise(libc::MADV_DONTNEED).unwrap();
                    }
                }
            });
        }
        let begin = Instant::now();
        let enough = |all: i32, mirrored: i32, without: i32| {
            (all > 20 && mirrored > 100 && without > 100) || begin.elapsed() > 20 * TIME
        };
        while begin.elapsed() < TIME || !enough(snapshots, mirrored, without) {
            let Ok(snapshot) = done(device.snapshot_range(area.addr, area.bytes())) else {
                continue;
            };
            snapshots += 1;
            for (i, page) in snapshot.pages().iter().enumerate() {
                match page.mirrored() {
                    Some(entry) => {
                        mirrored += 1;
                        assert!(entry.current, "page {i}: {:#x}", page.bits());
                        assert_ne!(page.place(), Place::None, "page {i}: {:#x}", page.bits());
                    }
                    None => without += 1,
                }
            }
        }
    });
    println!("{snapshots} snapshots: {mirrored} pages with an entry, {without} without");
    assert!(snapshots > 20 && mirrored > 100 && without > 100);
    drop((area, device));
    driver.finish();
}

/// Address space that takes no memory, and as much of it as there is.
struct Reserved(Span);

impl Reserved {
    /// The windows of a device page table's leaf, so many.
    fn new(windows: usize, protection: libc::c_int) -> Self {
        let bytes = windows * WINDOW;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let anywhere = std::ptr::null_mut();
        // SAFETY: a new map at an address that the kernel picks touches no memory there is.
        let addr = unsafe { libc::mmap(anywhere, bytes, protection, flags, -1, 0) };
        assert_ne!(addr, libc::MAP_FAILED, "{}", last_errno());
        let span = Span::new(addr as usize, bytes / PAGE);
        span.advise(libc::MADV_NOHUGEPAGE).unwrap();
        Self(span)
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        self.0.unmap();
    }
}

/// What a leaf of a device page table stands for.
const WINDOW: usize = HUGE * PAGE;

/// Pages of VRAM that device page tables take, as another file says: to ask changes nothing.
#[track_caller]
fn tables(other: &Device) -> u64 {
    other.counters().unwrap().table_pages
}

/// The most pages of VRAM that device page tables take while something is done.
fn most_tables(other: &Device, something: impl FnOnce()) -> u64 {
    let (stop, most) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                most.fetch_max(tables(other), Ordering::Relaxed);
                thread::sleep(Duration::from_micros(100));
            }
        });
        let _stop = Stop(&stop);
        something();
        most.fetch_max(tables(other), Ordering::Relaxed);
    });
    most.into_inner()
}

/// Catches VRAM that is taken for tables where nothing can be mapped: a process without memory could take all of it from the others,
/// and nobody could take it back.
#[test]
fn what_cannot_be_mapped_takes_no_vram() {
    /// For the root, and what is under way.
    const FEW: u64 = 12;
    /// Far from all that is mapped.
    const NOWHERE: usize = 0x1000_0000_0000;
    const R: libc::c_int = libc::PROT_READ;

    let (driver, device) = Driver::load_with("", GPUS[0]);
    let other = Device::open_path(device.path()).unwrap();
    let closed = Reserved::new(16384, libc::PROT_NONE);
    let read_only = Reserved::new(2048, R);
    let beyond = Reserved::new(2048, R);
    let one_page = file(1, 3);
    beyond.0.map_over(R, libc::MAP_SHARED, one_page.as_raw_fd());
    let cases = [
        (
            "unmapped",
            NOWHERE,
            rounds(16384),
            Access::Read,
            Errno::FAULT,
        ),
        (
            "closed",
            closed.0.addr,
            rounds(16384),
            Access::Write,
            Errno::ACCESS,
        ),
        (
            "read-only",
            read_only.0.addr,
            rounds(2048),
            Access::Write,
            Errno::ACCESS,
        ),
        (
            "beyond a file",
            beyond.0.addr + PAGE,
            rounds(2048),
            Access::Read,
            Errno::FAULT,
        ),
    ];
    for (i, (what, addr, count, access, expected)) in cases.into_iter().enumerate() {
        let policy = [Policy::Map, Policy::Migrate][i % 2];
        let begin = Instant::now();
        let most = most_tables(&other, || {
            let faulted = device.fault(&faults(addr, count, WINDOW, access), policy);
            let faulted = faulted.unwrap();
            let wrong = |status: &&Result<(), Errno>| **status != Err(expected);
            assert_eq!(faulted.statuses().iter().find(wrong), None, "{what}");
            assert_eq!(
                (faulted.mapped_pages, faulted.failed_pages),
                (0, count as u64)
            );
        });
        println!(
            "{what}: at most {most} pages of tables, {:?}",
            begin.elapsed()
        );
        assert!(most <= FEW, "{what}: {most}");
        assert!(tables(&other) <= 1, "{what}: more than the root is left");
    }
    let most = most_tables(&other, || {
        for i in 0..rounds(500) {
            let mut byte = [0];
            let read = device.read_at(NOWHERE + i * WINDOW, &mut byte, Policy::Migrate);
            assert_eq!(refused(read), Errno::FAULT);
            let read = device.read_at(read_only.0.addr + i * WINDOW, &mut byte, Policy::None);
            assert_eq!(refused(read), Errno::AGAIN);
        }
    });
    assert!(most <= FEW, "ACCESS: {most}");
    let counters = other.counters().unwrap();
    assert_eq!(counters.vram_failures, 0);
    assert_eq!(counters.mapped_pages, 0);
    drop((device, other));
    driver.finish();
}

/// Catches tables that stay where something was once mapped: who reads everywhere in a large mapping that takes no memory, and
/// gives up what he has read, would take all of the VRAM.
#[test]
fn what_is_no_longer_mapped_takes_no_vram() {
    const WINDOWS: usize = 256;

    // In turns of three.
    let turns = rounds(20).max(6);
    let (driver, device) = Driver::load_with("", GPUS[0]);
    let other = Device::open_path(device.path()).unwrap();
    let all = Reserved::new(turns * WINDOWS, libc::PROT_READ | libc::PROT_WRITE);
    let begin = Instant::now();
    let most = most_tables(&other, || {
        for round in 0..turns {
            let policy = [Policy::Map, Policy::Map, Policy::Migrate][round % 3];
            let part = all.0.part(round * WINDOWS * HUGE, WINDOWS * HUGE);
            for window in 0..WINDOWS {
                let mut word = [0x5a; 8];
                let addr = part.addr + window * WINDOW;
                device.read_at(addr, &mut word, policy).unwrap();
                assert_eq!(word, [0; 8]);
            }
            assert!(tables(&other) > WINDOWS as u64);
            // No more than it was: all that a leaf stands for would be another case.
            for window in 0..WINDOWS {
                let page = part.page(window * HUGE);
                page.advise(libc::MADV_DONTNEED).unwrap();
            }
        }
    });
    println!("at most {most} pages of tables, {:?}", begin.elapsed());
    assert!(most <= 2 * WINDOWS as u64, "{most}");
    assert_eq!(device.mirror().unwrap().entries, 0);
    drop(all);
    assert_eq!(tables(&other), 1, "more than the root is left");
    drop((device, other));
    driver.finish();
}

/// Has the device map a page in each of so many windows.
#[track_caller]
fn map_windows(device: &Device, addr: usize, windows: usize) {
    let wanted = faults(addr, windows, WINDOW + PAGE, Access::Write);
    let faulted = device.fault(&wanted, Policy::Map).unwrap();
    assert_eq!(faulted.first_failure(), None);
}

/// Asserts that each call that has to do with device page tables is refused.
#[track_caller]
fn every_call_is(device: &Device, expected: Errno, span: Span) {
    let (addr, mut bytes) = (span.addr, [0xaa; 64]);
    for ended in [
        mirror::read(device, addr, &mut bytes, mirror::MAP),
        mirror::write(device, addr, &[0xbb; 64], mirror::MAP),
        mirror::copy(device, addr, addr + PAGE, 64, mirror::MAP),
    ] {
        assert_eq!((ended.result, ended.done), (Err(expected), 0));
    }
    assert_eq!(bytes, [0xaa; 64]);
    let mut wanted = [mirror::wants(addr, mirror::READ)];
    let (faulted, _) = mirror::try_fault(device, &mut wanted, mirror::MAP);
    assert_eq!(faulted, Err(expected));
    assert_eq!(mirror::try_snapshot(device, span), Err(expected));
    assert_eq!(refused(device.mirror()), expected);
}

/// Catches tables that outlive what they were for, the mapping, the file or the process, until somebody makes a call or for ever,
/// and a file that lets somebody else at them.
#[test]
fn tables_go_with_the_memory_the_file_and_the_process() {
    const WINDOWS: usize = 64;

    let (driver, device) = Driver::load_with("", GPUS[0]);
    let other = Device::open_path(device.path()).unwrap();
    // In one piece, and so that none is as large as what a leaf stands for.
    for piece in [WINDOWS * HUGE, HUGE / 2, 100] {
        let area = Area::new(WINDOWS * HUGE);
        area.advise(libc::MADV_NOHUGEPAGE).unwrap();
        map_windows(&device, area.addr, WINDOWS - 1);
        // Some have nothing in them any more.
        let part = area.part(WINDOWS / 4 * HUGE, WINDOWS / 4 * HUGE);
        part.advise(libc::MADV_DONTNEED).unwrap();
        assert!(tables(&other) >= WINDOWS as u64);
        for first in (0..area.pages).step_by(piece) {
            area.part(first, piece.min(area.pages - first)).unmap();
        }
        assert_eq!(tables(&other), 1, "unmapped {piece} pages at a time");
        // It is unmapped, but for what is around it.
        std::mem::forget(area);
    }

    let area = Area::new(WINDOWS * HUGE);
    area.advise(libc::MADV_NOHUGEPAGE).unwrap();
    map_windows(&device, area.addr, WINDOWS - 1);
    assert!(tables(&other) >= WINDOWS as u64);
    Child::fork(|_| every_call_is(&device, Errno::PERM, area.part(0, 2))).finish();
    drop(device);
    assert_eq!(tables(&other), 0, "the file is closed");

    // A process ends, and its file does not.
    let mut owner = Child::fork(|test| {
        let own = Device::open_path(other.path()).unwrap();
        map_windows(&own, area.addr, WINDOWS - 1);
        test.send(own.as_fd().as_raw_fd() as u64);
        test.receive();
        std::mem::forget(own);
    });
    let fd = owner.receive();
    let passed = owner.take_file(fd);
    assert!(tables(&other) >= WINDOWS as u64);
    let mine = Device::open_path(other.path()).unwrap();
    // SAFETY: both are open.
    errno(unsafe { libc::dup2(passed.as_raw_fd(), mine.as_fd().as_raw_fd()) }).unwrap();
    every_call_is(&mine, Errno::PERM, area.part(0, 2));
    owner.send(0);
    owner.finish();
    eventually("the tables of a process have gone with it", || {
        tables(&other) <= 1
    });
    every_call_is(&mine, Errno::PERM, area.part(0, 2));
    drop((mine, passed));
    assert_eq!(tables(&other), 0);
    drop((other, area));
    driver.finish();
}

/// Catches an access that ends in any other way than being done or refused because the device goes, and a word that is neither what
/// was there before nor what was written.
#[test]
fn an_access_under_an_unbind_is_done_or_refused() {
    const TIME: Duration = Duration::from_secs(8);
    /// So many that some have got to the device and wait for the table when the device goes.
    const READERS: usize = 6;

    let mut driver = Driver::load("soft=0");
    let mut random = Random::new(5);
    let begin = Instant::now();
    let (mut unbinds, accesses) = (0, AtomicU64::new(0));
    while begin.elapsed() < TIME || (unbinds <= 5 && begin.elapsed() < 10 * TIME) {
        let device = &driver.bind(IN_SLOT);
        // This is dropped again and again, which takes its entry away, and is zero whoever reads it.
        let dropped = &Area::new(1);
        let written = &Area::new(2);
        let stop = &AtomicBool::new(false);
        thread::scope(|scope| {
            let _stop = Stop(stop);
            for _ in 0..READERS {
                scope.spawn(|| loop {
                    let mut bytes = [0x5a; 64];
                    match done(device.read_at(dropped.addr, &mut bytes, Policy::Map)) {
                        Ok(_) => assert_eq!(bytes, [0; 64]),
                        Err(Errno::NODEV) => break,
                        // It was dropped every time.
                        Err(_) => continue,
                    }
                    accesses.fetch_add(1, Ordering::Relaxed);
                });
            }
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    dropped.advise(libc::MADV_DONTNEED).unwrap();
                }
            });
            let writers = [(0, Policy::Map), (1, Policy::Migrate)].map(|(page, policy)| {
                let accesses = &accesses;
                scope.spawn(move || {
                    let (page, mut last) = (written.page(page), 0_u64);
                    loop {
                        let bytes = (last + 1).to_ne_bytes();
                        // SAFETY: the page is this thread's own.
                        match done(unsafe { device.write_at(page.addr + 8, &bytes, policy) }) {
                            Ok(_) => last += 1,
                            Err(Errno::NODEV) => return (page, last),
                            Err(_) => continue,
                        }
                        accesses.fetch_add(1, Ordering::Relaxed);
                    }
                })
            });
            thread::sleep(Duration::from_micros(random.below(20_000) as u64));
            driver.unbind(IN_SLOT);
            for writer in writers {
                let (page, last) = writer.join().unwrap();
                let word = (page.addr + 8) as *mut u64;
                // SAFETY: mapped, and its writer has ended.
                assert_eq!(unsafe { word.read_volatile() }, last);
                // SAFETY: as above.
                unsafe { word.write_volatile(0) };
                page.check_zero();
            }
        });
        dropped.check_zero();
        unbinds += 1;
    }
    println!("{unbinds} unbinds under {} accesses", accesses.into_inner());
    assert!(unbinds > 5);
    driver.finish();
}
