//! `/dev/hmm_dmirrorN`, the endpoint of the kernel's own suite (module parameter `dmirror`): hostile use of it, and the device-coherent
//! memory that only it makes.
//!
//! Runs in the virtual GPU host: `bench/test guest_dmirror`.

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use crate::common::child::Child;
use crate::common::driver::{assert_empty, Driver, GPUS};
use crate::common::memory::{errno, last_errno, Area, Span, PAGE};
use crate::common::mirror::{device_check, device_fill, table, try_snapshot};
use crate::common::misuse::user_end;
use crate::common::random::Random;
use crate::common::{eventually, places, rounds, to_device, to_system, Stop};
use hmm_gpu::uapi;
use hmm_gpu::{Capabilities, Device, Errno, Place, Policy, Target};

const RW: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;

/// `struct hmm_dmirror_cmd`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Command {
    addr: u64,
    ptr: u64,
    npages: u64,
    cpages: u64,
    faults: u64,
}

const READ: u32 = 0;
const WRITE: u32 = 1;
const MIGRATE_TO_DEV: u32 = 2;
const MIGRATE_TO_SYS: u32 = 3;
const SNAPSHOT: u32 = 4;
const EXCLUSIVE: u32 = 5;
const CHECK_EXCLUSIVE: u32 = 6;
const RELEASE: u32 = 7;
const FLAGS: u32 = 8;
const READ_UNLOCKED: u32 = 9;

/// All commands.
const ALL: [u32; 10] = [
    READ,
    WRITE,
    MIGRATE_TO_DEV,
    MIGRATE_TO_SYS,
    SNAPSHOT,
    EXCLUSIVE,
    CHECK_EXCLUSIVE,
    RELEASE,
    FLAGS,
    READ_UNLOCKED,
];

/// An open file on an endpoint.
struct Endpoint(File);

impl Endpoint {
    #[track_caller]
    fn open(unit: u32) -> Self {
        let mut options = fs::OpenOptions::new();
        let path = format!("/dev/hmm_dmirror{unit}");
        Self(options.read(true).write(true).open(path).unwrap())
    }

    /// Gives a command as it is, at an address of this process or none.
    fn call(&self, nr: u32, argument: usize) -> Result<(), Errno> {
        let (size, kind) = (size_of::<Command>() as u32, u32::from(b'H'));
        let number = 0xc000_0000 | (size << 16) | (kind << 8) | nr;
        // SAFETY: what the tests let it write is their own.
        errno(unsafe { libc::ioctl(self.0.as_raw_fd(), number.into(), argument) }).map(drop)
    }

    fn command(&self, nr: u32, command: &mut Command) -> Result<(), Errno> {
        self.call(nr, std::ptr::from_mut(command) as usize)
    }

    /// A command on a span, with a buffer.
    fn ask(&self, nr: u32, span: Span, buffer: usize) -> Result<Command, Errno> {
        let mut command = Command {
            addr: span.addr as u64,
            ptr: buffer as u64,
            npages: span.pages as u64,
            ..Default::default()
        };
        self.command(nr, &mut command).map(|()| command)
    }
}

fn bytes(span: Span) -> &'static [u8] {
    // SAFETY: mapped for as long as the tests use it.
    unsafe { std::slice::from_raw_parts(span.addr as *const u8, span.bytes()) }
}

/// Two private soft devices, and a coherent GPU that is the third endpoint.
fn coherent() -> (Driver, Device, [Device; 2]) {
    let mut driver = Driver::load("dmirror=1 soft=2 soft_mib=16");
    let gpu = driver.bind(GPUS[0]);
    (driver, gpu, [0, 1].map(|unit| Device::open(unit).unwrap()))
}

/// Asserts that all of a span is on a device, as the driver says.
#[track_caller]
fn is_on(device: &Device, span: Span) {
    let residency = places(device, span);
    assert!(residency.all(Place::Device), "{residency}");
}

/// Catches a command that is believed: no pages, no page's address, a range that wraps or leaves user space, more pages than there can
/// be, a number of no command, and buffers that are none.
#[test]
fn bad_commands_are_refused() {
    let driver = Driver::load("dmirror=1 soft=2 soft_mib=16");
    let endpoint = Endpoint::open(0);
    let (area, buffer) = (Area::filled(8, 1), Area::filled(8, 2));
    let good = Command {
        addr: area.addr as u64,
        ptr: buffer.addr as u64,
        npages: 8,
        ..Default::default()
    };
    let refused = |nr: u32, command: Command, expected: Errno| {
        let mut argument = command;
        let answer = endpoint.command(nr, &mut argument);
        assert_eq!(answer, Err(expected), "command {nr}: {command:x?}");
        assert_eq!(argument, command, "nothing is written");
    };
    for nr in ALL.into_iter().chain([10, 11, 77, 255]) {
        let addresses = [1, 8, 2048, 4095].map(|shift| Command {
            addr: good.addr + shift,
            ..good
        });
        let lengths = [0, 1 << 52, u64::MAX, u64::MAX >> 12, 1 << 63]
            .map(|npages| Command { npages, ..good });
        let wrapping = Command {
            addr: 0_u64.wrapping_sub(8 * PAGE as u64),
            npages: 8,
            ..good
        };
        for command in addresses.into_iter().chain(lengths).chain([wrapping]) {
            refused(nr, command, Errno::INVAL);
        }
        for argument in [0, 8, 0xffff_8880_0000_0000, 1 << 62, usize::MAX - 7] {
            assert_eq!(endpoint.call(nr, argument), Err(Errno::FAULT), "{nr}");
        }
        if !ALL.contains(&nr) {
            refused(nr, good, Errno::INVAL);
        }
    }
    // Beyond user space, and into it.
    let last = user_end() - 4 * PAGE as u64;
    for addr in [user_end(), last, 1 << 62, 0xffff_8880_0000_0000] {
        let beyond = Command { addr, ..good };
        for nr in ALL {
            refused(nr, beyond, Errno::FAULT);
        }
    }
    // More than there is, from what there is.
    area.page(7).unmap();
    for npages in [8, 1 << 20, 1 << 30] {
        let long = Command { npages, ..good };
        for nr in [READ, WRITE, EXCLUSIVE, READ_UNLOCKED] {
            refused(nr, long, Errno::FAULT);
        }
        let beyond = good.addr + npages * PAGE as u64 > user_end();
        for nr in [MIGRATE_TO_DEV, MIGRATE_TO_SYS] {
            refused(nr, long, [Errno::INVAL, Errno::FAULT][usize::from(beyond)]);
        }
        refused(SNAPSHOT, Command { ptr: 0, ..long }, Errno::FAULT);
    }
    area.page(7)
        .map_over(RW, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1);
    area.page(7).fill(1);
    // Buffers that are none, or may not be written.
    for ptr in [0, 1 << 62, 0xffff_8880_0000_0000, u64::MAX - 7, u64::MAX] {
        for nr in [
            READ,
            WRITE,
            SNAPSHOT,
            READ_UNLOCKED,
            EXCLUSIVE,
            MIGRATE_TO_DEV,
        ] {
            // What it has to itself does not move.
            area.touch();
            refused(nr, Command { ptr, ..good }, Errno::FAULT);
        }
    }
    buffer.part(4, 4).protect(libc::PROT_READ);
    refused(READ, good, Errno::FAULT);
    buffer.part(4, 4).check(2);
    area.check(1);
    // All that user space has, of which nothing is to be found: one can be killed meanwhile.
    let mut child = Child::fork(|parent| {
        let own = Endpoint::open(0);
        parent.send(0);
        let mut all = Command {
            addr: 0,
            npages: user_end() / PAGE as u64,
            ..good
        };
        panic!("{:?}", own.command(CHECK_EXCLUSIVE, &mut all));
    });
    child.receive();
    std::thread::sleep(Duration::from_millis(200));
    child.kill();
    // And after all of that it works.
    buffer.protect(RW);
    let read = endpoint.ask(READ, *area, buffer.addr).unwrap();
    assert_eq!(read.cpages, 8);
    area.at(buffer.addr).check(1);
    drop((area, buffer, endpoint));
    driver.finish();
}

/// Catches an endpoint that works for an address space that did not open it.
#[test]
fn an_endpoint_serves_only_who_opened_it() {
    let driver = Driver::load("dmirror=1 soft=2 soft_mib=16");
    let endpoint = Endpoint::open(1);
    let area = Area::filled(8, 1);
    let buffer = Area::filled(8, 2);
    assert!(endpoint.ask(MIGRATE_TO_DEV, *area, buffer.addr).is_ok());
    Child::fork(|_| {
        for nr in ALL.into_iter().chain([10, 255]) {
            let answer = endpoint.ask(nr, *area, buffer.addr);
            assert_eq!(answer, Err(Errno::PERM), "command {nr}");
            assert_eq!(endpoint.call(nr, 0), Err(Errno::PERM), "command {nr}");
        }
        let own = Endpoint::open(1);
        assert_eq!(own.ask(READ, *area, buffer.addr).map(|it| it.cpages), Ok(8));
        area.at(buffer.addr).check(1);
    })
    .finish();
    area.check(1);
    drop((area, buffer, endpoint));
    driver.finish();
}

/// Memory that nobody has, in bytes.
fn free_bytes() -> usize {
    let text = fs::read_to_string("/proc/meminfo").unwrap();
    let line = text.lines().find(|line| line.starts_with("MemFree:"));
    let number = line.unwrap().split_whitespace().nth(1).unwrap();
    number.parse::<usize>().unwrap() << 10
}

/// Catches pages of an endpoint's mapping that stay when it is unmapped, whole or in parts, or that are not zeroes.
#[test]
fn a_mapping_of_an_endpoint_leaves_nothing() {
    const PAGES: usize = 16384;

    let driver = Driver::load("dmirror=1 soft=2 soft_mib=16");
    let endpoint = Endpoint::open(0);
    let device = Device::open(0).unwrap();
    let fd = endpoint.0.as_raw_fd();
    let before = free_bytes();
    for round in 0..rounds(12) {
        let area = Area::new(PAGES);
        let sharing = [libc::MAP_SHARED, libc::MAP_PRIVATE][round % 2];
        area.map_over(RW, sharing, fd);
        area.part(7, 3).check_zero();
        area.part(PAGES - 5, 5).fill(1);
        device_check(&device, area.part(PAGES - 5, 5), 1);
        area.part(100, 1000).unmap();
        area.part(100, 1000)
            .map_over(RW, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1);
        area.part(1100, 20).check_zero();
    }
    // A leak of all of it would be ten times as much.
    eventually("the memory is free again", || {
        free_bytes() + PAGES * PAGE > before
    });
    drop((device, endpoint));
    driver.finish();
}

/// Catches bytes that are lost when all that is on a device is told to leave it while others put it there, change it and read it; and a
/// release that never ends.
#[test]
fn release_while_others_use_the_device() {
    let (driver, gpu, [soft, _]) = coherent();
    for (unit, device) in [(0, &soft), (2, &gpu)] {
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for seed in [1, 2] {
                let stop = &stop;
                scope.spawn(move || {
                    let own = Endpoint::open(unit);
                    let (area, buffer) = (Area::filled(64, seed), Area::filled(64, 9));
                    let (mut random, mut model) = (Random::new(seed), [seed; 64]);
                    while !stop.load(Ordering::Relaxed) {
                        let first = random.below(64);
                        let part = area.part(first, 1 + random.below(64 - first));
                        device
                            .prefetch_range(part.addr, part.bytes(), Target::Device)
                            .unwrap();
                        match own.ask(READ, part, buffer.addr) {
                            Ok(read) => assert_eq!(read.cpages, part.pages as u64),
                            Err(error) => assert_eq!(error, Errno::BUSY),
                        }
                        let page = random.below(64);
                        model[page] = random.next() >> 40;
                        area.page(page).fill(model[page]);
                        (0..64).for_each(|page| area.page(page).check(model[page]));
                    }
                });
            }
            let (endpoint, area) = (Endpoint::open(unit), Area::filled(8, 3));
            let mut released = 0;
            let stop = Stop(&stop);
            for _ in 0..rounds(40) {
                to_device_of(unit, device, *area);
                match endpoint.ask(RELEASE, *area, 0) {
                    Ok(_) => released += 1,
                    Err(error) => assert_eq!(error, Errno::BUSY),
                }
                area.check(3);
            }
            drop(stop);
            assert!(released > 0);
        });
        assert_empty(device);
    }
    drop((gpu, soft));
    driver.finish();
}

/// Moves a span to the device of an endpoint, where `to_device` asks a witness that does not know of coherent memory.
#[track_caller]
fn to_device_of(unit: u32, device: &Device, span: Span) {
    if unit < 2 {
        to_device(device, span);
        return;
    }
    eventually("all pages are on the device", || {
        let (addr, len) = (span.addr, span.bytes());
        device.prefetch_range(addr, len, Target::Device).unwrap();
        places(device, span).all(Place::Device)
    });
}

/// Catches an unbind that open endpoints hold up, a command that does something after it, and a mapping that dies with the device.
#[test]
fn after_unbind_every_command_is_enodev() {
    let mut driver = Driver::load("dmirror=1 soft=0");
    for _ in 0..3 {
        drop(driver.bind(GPUS[1]));
        let endpoint = Endpoint::open(0);
        let (area, buffer) = (Area::filled(32, 1), Area::filled(32, 2));
        let pages = Area::new(4);
        pages.map_over(RW, libc::MAP_SHARED, endpoint.0.as_raw_fd());
        pages.fill(5);
        assert!(endpoint
            .ask(MIGRATE_TO_DEV, area.part(0, 20), buffer.addr)
            .is_ok());
        assert!(endpoint
            .ask(EXCLUSIVE, area.part(20, 6), buffer.addr)
            .is_ok());
        driver.unbind(GPUS[1]);
        for nr in ALL.into_iter().chain([10, 255]) {
            assert_eq!(endpoint.ask(nr, *area, buffer.addr), Err(Errno::NODEV));
            assert_eq!(endpoint.call(nr, 0), Err(Errno::NODEV));
        }
        area.check(1);
        pages.check(5);
        // Its name is free again, and it is another's.
        drop(driver.bind(GPUS[1]));
        let new = Endpoint::open(0);
        assert!(new.ask(READ, *area, buffer.addr).is_ok());
        assert_eq!(endpoint.ask(READ, *area, buffer.addr), Err(Errno::NODEV));
        area.at(buffer.addr).check(1);
        drop((endpoint, new, area, buffer, pages));
        driver.unbind(GPUS[1]);
    }
    driver.finish();
}

/// Catches coherent pages that move when the CPU touches them, that CPU and device do not find the same bytes in, or that a release or an
/// unbind loses.
#[test]
fn coherent_pages_stay_where_the_cpu_touches_them() {
    const PAGES: usize = 48;

    let (mut driver, gpu, [soft, other]) = coherent();
    let has = |device: &Device| {
        let description = device.describe().unwrap();
        println!("{description}");
        let has = |one| description.capabilities.contains(one);
        assert_ne!(has(Capabilities::COHERENT), has(Capabilities::FAULT_BACK));
        has(Capabilities::COHERENT)
    };
    assert_eq!([has(&gpu), has(&soft), has(&other)], [true, false, false]);

    let area = Area::filled(PAGES, 1);
    let endpoint = Endpoint::open(2);
    to_device_of(2, &gpu, *area);
    area.check(1);
    is_on(&gpu, *area);
    area.fill(2);
    is_on(&gpu, *area);
    device_check(&gpu, *area, 2);
    device_fill(&gpu, *area, 3);
    area.check(3);
    is_on(&gpu, *area);
    assert_eq!(gpu.counters().unwrap().fault_back_pages, 0);
    assert_eq!(table(&gpu).entries, PAGES as u64);

    // CPU and device count in the same word, where it is.
    let word = |page: usize| {
        // SAFETY: in the area; all access is atomic.
        unsafe { AtomicU64::from_ptr(area.page(page).addr as *mut u64) }
    };
    let start: Vec<u64> = (0..4)
        .map(|page| word(page).load(Ordering::Relaxed))
        .collect();
    let before = gpu.counters().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for i in 0..20_000 {
                word(i % 4).fetch_add(1, Ordering::Relaxed);
            }
        });
        for i in 0..2000 {
            gpu.fetch_add(word(i % 4), 1000, Policy::Map).unwrap();
        }
    });
    for (page, start) in start.iter().enumerate() {
        let sum = start.wrapping_add(5000 + 500 * 1000);
        assert_eq!(word(page).load(Ordering::Relaxed), sum, "page {page}");
    }
    is_on(&gpu, *area);
    let work = gpu.counters().unwrap() - before;
    assert_eq!(work.device_faults, 0, "the entries were there already");
    area.fill(3);

    // Shared with a child, and copied where one writes.
    let mut child = Child::fork(|parent| {
        area.check(3);
        area.part(0, 10).fill(4);
        parent.send(0);
        parent.receive();
        area.part(0, 10).check(4);
        area.part(10, PAGES - 10).check(3);
    });
    child.receive();
    area.check(3);
    area.part(5, 10).fill(5);
    child.send(0);
    child.finish();
    area.part(5, 10).check(5);
    area.part(0, 5).check(3);
    area.part(15, PAGES - 15).check(3);

    // Home, each way.
    for way in ["release", "request", "unbind"] {
        area.fill(6);
        to_device_of(2, &gpu, *area);
        device_fill(&gpu, area.part(0, PAGES / 2), 7);
        match way {
            "release" => assert!(endpoint.ask(RELEASE, *area, 0).is_ok()),
            "request" => {
                to_system(&gpu, *area);
            }
            _ => driver.unbind(GPUS[0]),
        }
        let counts = places(&soft, *area).counts();
        assert_eq!((counts.system, counts.other_device), (PAGES, 0), "{way}");
        area.part(0, PAGES / 2).check(7);
        area.part(PAGES / 2, PAGES / 2).check(6);
    }
    drop((area, endpoint, gpu, soft, other));
    driver.finish();
}

/// Catches a device that reaches into another's coherent memory, or has it to itself, when that is gone.
#[test]
fn another_device_uses_coherent_pages_until_they_go() {
    const PAGES: usize = 24;

    let (mut driver, mut gpu, [soft, other]) = coherent();
    for _ in 0..3 {
        let area = Area::filled(PAGES, 1);
        to_device_of(2, &gpu, *area);
        device_check(&soft, *area, 1);
        device_fill(&soft, area.part(0, 8), 2);
        let word = |page: usize| {
            // SAFETY: in the area; all access is atomic.
            unsafe { AtomicU64::from_ptr(area.page(page).addr as *mut u64) }
        };
        for page in 8..16 {
            soft.fetch_add(word(page), 1, Policy::Map).unwrap();
        }
        // In its table they are memory like any other.
        for seen in try_snapshot(&soft, *area).unwrap() {
            let current = seen.has(uapi::HMM_GPU_SNAPSHOT_MIRROR_CURRENT);
            assert_eq!(seen.is_mirrored(), current, "{seen:?}");
        }
        drop(gpu);
        driver.unbind(GPUS[0]);
        for page in 8..16 {
            let old = soft.fetch_add(word(page), 1, Policy::Map).unwrap();
            let first = area.page(page).pattern(1)[0];
            assert_eq!(old, first.wrapping_add(1));
            word(page).store(first, Ordering::Relaxed);
        }
        assert_eq!(places(&soft, *area).counts().system, PAGES);
        area.part(0, 8).check(2);
        area.part(8, PAGES - 8).check(1);
        device_check(&soft, area.part(8, PAGES - 8), 1);
        drop(area);
        gpu = driver.bind(GPUS[0]);
    }
    drop((gpu, soft, other));
    driver.finish();
}

/// A pipe: the end to read from, and the end to write to.
fn pipe() -> [OwnedFd; 2] {
    let mut ends: [RawFd; 2] = [0; 2];
    // SAFETY: room for both.
    errno(unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) }).unwrap();
    // SAFETY: just made, and nobody else's.
    ends.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Catches coherent pages that go with their device although somebody reads or writes them past the page tables, or holds them in a
/// pipe: unbind waits for who has them, and the bytes arrive.
#[test]
fn coherent_pages_that_others_hold_survive_unbind() {
    const PAGES: usize = 8;

    let (mut driver, mut gpu, [soft, other]) = coherent();
    let own = std::process::id() as libc::pid_t;
    let mut options = fs::OpenOptions::new();
    options.read(true).write(true).create(true);
    let direct = options
        .custom_flags(libc::O_DIRECT)
        .open("/tmp/direct")
        .unwrap();
    for round in 0..4 {
        let area = Area::filled(PAGES, round);
        to_device_of(2, &gpu, *area);
        is_on(&gpu, *area);
        let [from, to] = pipe();
        let pages = libc::iovec {
            iov_base: area.addr as *mut libc::c_void,
            iov_len: area.bytes(),
        };
        // SAFETY: the pages stay as they are until they are read.
        let given = unsafe { libc::vmsplice(to.as_raw_fd(), &pages, 1, 0) };
        assert_eq!(given, area.bytes() as isize, "{}", last_errno());

        let second = Area::filled(PAGES, 100 + round);
        to_device_of(2, &gpu, *second);
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let (stop, second, direct) = (&stop, *second, &direct);
            scope.spawn(move || {
                // Long enough for unbind to meet the pages again and again, and too short to be reported.
                std::thread::sleep(Duration::from_millis(700));
                let mut read = vec![0; PAGES * PAGE];
                File::from(from).read_exact(&mut read).unwrap();
                let words: &[u64] = bytemuck::cast_slice(&read);
                Span::new(0, PAGES).check_words("the pipe", words, round);
            });
            let reader = scope.spawn(move || {
                let mut rounds = 0;
                while !stop.load(Ordering::Relaxed) {
                    direct.write_all_at(bytes(second), 0).unwrap();
                    let copy = Area::filled(PAGES, 0);
                    // SAFETY: the copy is this thread's alone.
                    let into = unsafe {
                        std::slice::from_raw_parts_mut(copy.addr as *mut u8, copy.bytes())
                    };
                    direct.read_exact_at(into, 0).unwrap();
                    copy.check(100 + round);
                    let of = |span: Span| libc::iovec {
                        iov_base: span.addr as *mut libc::c_void,
                        iov_len: span.bytes(),
                    };
                    let (to, from) = (of(*copy), of(second));
                    copy.fill(0);
                    // SAFETY: as many bytes as there are.
                    let got = unsafe { libc::process_vm_readv(own, &to, 1, &from, 1, 0) };
                    assert_eq!(got, second.bytes() as isize, "{}", last_errno());
                    copy.check(100 + round);
                    rounds += 1;
                }
                rounds
            });
            let stop = Stop(stop);
            std::thread::sleep(Duration::from_millis(50));
            driver.unbind(GPUS[0]);
            drop(stop);
            assert!(reader.join().unwrap() > 0);
        });
        area.check(round);
        second.check(100 + round);
        assert_eq!(places(&soft, *area).counts().system, PAGES);
        drop((area, second, to));
        drop(gpu);
        gpu = driver.bind(GPUS[0]);
    }
    drop((gpu, soft, other));
    driver.finish();
}
