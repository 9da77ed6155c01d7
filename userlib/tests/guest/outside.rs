//! Others reach in: system calls, debuggers, other processes and the kernel itself read and write memory that a device has, and all
//! find what was written last.
//!
//! Runs in the virtual GPU host: `bench/test guest_outside`.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::common::child::Child;
use crate::common::driver::{Driver, GPUS};
use crate::common::memory::{errno, file, last_errno, Area, Span, PAGE};
use crate::common::mirror::{
    both_check, device_check, device_fill, read, read_to, write, MAP, MIGRATE,
};
use crate::common::uring::Ring;
use crate::common::userfault::Watch;
use crate::common::{assert_place, eventually, patience, places, to_device};
use hmm_gpu::{Device, Errno, Place, Target};

const PAGES: usize = 32;

/// A device, and memory half of which is in its VRAM, all of which is in its page table.
fn scene() -> (Driver, Device, Area) {
    let (driver, device) = Driver::load_with("", GPUS[0]);
    let area = Area::filled(PAGES, 1);
    mirror(&device, *area, 1);
    (driver, device, area)
}

/// Makes it so, once more.
fn mirror(device: &Device, area: Span, seed: u64) {
    to_device(device, area.part(0, area.pages / 2));
    device_fill(device, area, seed);
}

fn finish(driver: Driver, device: Device, area: Area) {
    drop((area, device));
    driver.finish();
}

fn bytes(span: Span) -> &'static [u8] {
    // SAFETY: mapped for as long as the tests use it.
    unsafe { std::slice::from_raw_parts(span.addr as *const u8, span.bytes()) }
}

fn bytes_mut(span: Span) -> &'static mut [u8] {
    // SAFETY: as above, and written by nobody else meanwhile.
    unsafe { std::slice::from_raw_parts_mut(span.addr as *mut u8, span.bytes()) }
}

/// Catches a system call that reads other bytes than the device wrote, or writes where the device does not find it.
#[test]
fn reads_and_writes_of_files_see_what_the_device_sees() {
    let (driver, device, area) = scene();
    let mut backing = file(PAGES, 0);
    for seed in [2, 4, 6] {
        mirror(&device, *area, seed);
        backing.rewind().unwrap();
        backing.write_all(bytes(*area)).unwrap();
        device_check(&device, *area, seed);
        let words = area.pattern(seed + 1);
        backing
            .write_all_at(bytemuck::cast_slice(&words), 0)
            .unwrap();
        mirror(&device, *area, 99);
        backing.seek(SeekFrom::Start(0)).unwrap();
        backing.read_exact(bytes_mut(*area)).unwrap();
        both_check(&device, *area, seed + 1);
    }
    finish(driver, device, area);
}

/// A block device in memory.
fn ram_disk() -> PathBuf {
    let path = Path::new("/dev/ram0");
    if !path.exists() {
        let loaded = Command::new("modprobe").arg("brd").status().unwrap();
        assert!(loaded.success());
    }
    eventually("there is a ram disk", || path.exists());
    path.into()
}

/// Catches a page that somebody does input or output on and that moves meanwhile, or is read where it was: past the page cache, to and
/// from a block device, a file system of the host's, and one in memory.
#[test]
fn direct_input_and_output_see_what_the_device_sees() {
    let (driver, device, area) = scene();
    let on_host = PathBuf::from(std::env::var_os("OUT").unwrap()).join("direct");
    for path in [ram_disk(), on_host.clone(), "/tmp/direct".into()] {
        println!("{}", path.display());
        let mut options = fs::OpenOptions::new();
        options.read(true).write(true).create(true);
        let direct = options.custom_flags(libc::O_DIRECT).open(&path).unwrap();
        for seed in [2, 4] {
            // What is written: from VRAM and from where the device has mapped it.
            mirror(&device, *area, seed);
            direct.write_all_at(bytes(*area), 0).unwrap();
            device_check(&device, *area, seed);
            let copy = Area::filled(PAGES, 0);
            direct.read_exact_at(bytes_mut(*copy), 0).unwrap();
            copy.check(seed);

            // What is read: to both.
            copy.fill(seed + 1);
            direct.write_all_at(bytes(*copy), 0).unwrap();
            mirror(&device, *area, 99);
            direct.read_exact_at(bytes_mut(*area), 0).unwrap();
            both_check(&device, *area, seed + 1);

            // While others move the pages and the device reads them.
            mirror(&device, *area, seed);
            std::thread::scope(|scope| {
                let end = Instant::now() + Duration::from_millis(400);
                let (device, area) = (&device, *area);
                scope.spawn(move || {
                    while Instant::now() < end {
                        for target in [Target::Device, Target::System] {
                            let addr = area.addr;
                            device.prefetch_range(addr, area.bytes(), target).unwrap();
                        }
                        device_check(device, area, seed);
                    }
                });
                let mut rounds = 0;
                while Instant::now() < end {
                    direct.write_all_at(bytes(area), 0).unwrap();
                    direct.read_exact_at(bytes_mut(area), 0).unwrap();
                    rounds += 1;
                }
                assert!(rounds > 0);
            });
            direct.read_exact_at(bytes_mut(*copy), 0).unwrap();
            copy.check(seed);
            both_check(&device, *area, seed);
        }
    }
    fs::remove_file(on_host).unwrap();
    fs::remove_file("/tmp/direct").unwrap();
    finish(driver, device, area);
}

/// Catches a pinned page that moves away from under who pinned it (a registered buffer of io_uring), one that the device cannot
/// reach, and one that never moves again.
#[test]
fn pinned_buffers_stay_and_the_device_reaches_them() {
    let (driver, device, area) = scene();
    let ring = Ring::with_buffer(*area);
    // Pinning brought them home.
    assert_place(&device, *area, Place::System);
    device_check(&device, *area, 1);
    let stay = || {
        let moved = device
            .prefetch_range(area.addr, area.bytes(), Target::Device)
            .unwrap();
        assert_eq!(moved, crate::common::moved(0, 0, PAGES, 0));
    };
    let backing = file(PAGES, 0);
    for seed in [2, 4] {
        stay();
        device_fill(&device, *area, seed);
        ring.write(&backing, *area);
        let copy = Area::filled(PAGES, 0);
        backing.read_exact_at(bytes_mut(*copy), 0).unwrap();
        copy.check(seed);
        copy.fill(seed + 1);
        backing.write_all_at(bytes(*copy), 0).unwrap();
        stay();
        ring.read(&backing, area.part(0, 20));
        device_check(&device, area.part(0, 20), seed + 1);
        device_check(&device, area.part(20, 12), seed);
        // The device faults, to move: what cannot move is mapped.
        area.part(0, 10).protect(libc::PROT_READ);
        area.part(0, 10).protect(libc::PROT_READ | libc::PROT_WRITE);
        crate::common::mirror::device_fill_by(&device, area.part(0, 10), seed + 7, MIGRATE);
        assert_place(&device, *area, Place::System);
        ring.write(&backing, area.part(0, 10));
        let copy = area.part(0, 10).at(copy.addr);
        backing.read_exact_at(bytes_mut(copy), 0).unwrap();
        copy.check(seed + 7);
    }
    ring.unregister();
    // Let go a moment later.
    eventually("the pages are not pinned any more", || {
        device
            .prefetch_range(area.addr, area.bytes(), Target::Device)
            .unwrap()
            .is_complete()
    });
    device_check(&device, area.part(0, 10), 11);
    both_check(&device, area.part(10, 10), 5);
    both_check(&device, area.part(20, 12), 4);
    drop(ring);
    finish(driver, device, area);
}

/// A process with memory that its device has, as `scene`. It checks, when it is told to, that both find the pattern of the seed that
/// it is told on the first half of its pages, and `1` on the rest; then all is in VRAM or mapped once more.
fn owner(path: &Path) -> (Child, Span) {
    let mut child = Child::fork(|test| {
        let device = Device::open_path(path).unwrap();
        let area = Area::filled(PAGES, 1);
        // Every fourth page in VRAM, so that either half has both.
        let mirror = |seed| {
            for page in (0..PAGES).step_by(4) {
                to_device(&device, area.page(page));
            }
            device_fill(&device, area.part(0, PAGES / 2), seed);
            device_check(&device, area.part(PAGES / 2, PAGES / 2), 1);
        };
        mirror(1);
        test.send(area.addr as u64);
        loop {
            let seed = test.receive();
            if seed == 0 {
                break;
            }
            both_check(&device, area.part(0, PAGES / 2), seed);
            both_check(&device, area.part(PAGES / 2, PAGES / 2), 1);
            mirror(seed);
            test.send(0);
        }
    });
    let addr = child.receive() as usize;
    (child, Span::new(addr, PAGES))
}

/// Tells an owner what its pages should hold, and waits until it has looked.
#[track_caller]
fn look(owner: &mut Child, seed: u64) {
    owner.send(seed);
    owner.receive();
}

/// Catches a debugger that reads other bytes than the device wrote, or whose writes the device does not find: by
/// `process_vm_readv`, `/proc/PID/mem`, and `ptrace` a word at a time.
#[test]
fn another_process_reads_and_writes_what_the_device_has() {
    let (driver, device) = Driver::load_with("", GPUS[0]);
    let (mut owner, theirs) = owner(device.path());
    let half = theirs.part(0, PAGES / 2);
    let copy = Area::filled(PAGES, 0);
    let copied = copy.part(0, PAGES / 2);
    let piece = |span: Span| libc::iovec {
        iov_base: span.addr as *mut _,
        iov_len: span.bytes(),
    };
    let (pid, all) = (owner.pid, theirs.bytes() as isize);
    // SAFETY: the copy is ours and as long.
    let done = unsafe { libc::process_vm_readv(pid, &piece(*copy), 1, &piece(theirs), 1, 0) };
    assert_eq!(done, all, "{}", last_errno());
    copy.check(1);
    copied.fill(2);
    // SAFETY: the other process is a test's own, and expects it.
    let done = unsafe { libc::process_vm_writev(pid, &piece(copied), 1, &piece(half), 1, 0) };
    assert_eq!(done, all / 2, "{}", last_errno());
    look(&mut owner, 2);

    let mut options = fs::OpenOptions::new();
    let options = options.read(true).write(true);
    let memory = options.open(format!("/proc/{pid}/mem")).unwrap();
    memory
        .read_exact_at(bytes_mut(*copy), theirs.addr as u64)
        .unwrap();
    copied.check(2);
    copy.part(PAGES / 2, PAGES / 2).check(1);
    copied.fill(3);
    memory
        .write_all_at(bytes(copied), theirs.addr as u64)
        .unwrap();
    look(&mut owner, 3);

    let ask = |request: libc::c_uint, addr: usize, word: u64| {
        let addr = addr as *mut libc::c_void;
        // SAFETY: the other process is a test's own, and its memory is what is asked for.
        let answer = unsafe { libc::ptrace(request, pid, addr, word) };
        assert!(answer != -1 || last_errno() == Errno::from_raw_os_error(0));
        answer
    };
    ask(libc::PTRACE_ATTACH, 0, 0);
    let mut status = 0;
    // SAFETY: our child; the status is ours.
    errno(unsafe { libc::waitpid(pid, &mut status, 0) }).unwrap();
    assert!(libc::WIFSTOPPED(status), "{status:#x}");
    // A word at a time: all are read, all of the first half written.
    let (old, new) = (theirs.pattern(3), theirs.pattern(4));
    for (i, new) in new.iter().enumerate().take(half.bytes() / 8) {
        let addr = theirs.addr + i * 8;
        // Not through libc: its answer cannot be told from an error.
        let mut word = 0_u64;
        // SAFETY: as above; the kernel writes the word.
        let answer = unsafe {
            libc::syscall(
                libc::SYS_ptrace,
                libc::PTRACE_PEEKDATA,
                pid,
                addr,
                &mut word,
            )
        };
        assert_eq!((answer, word), (0, old[i]), "{}", last_errno());
        ask(libc::PTRACE_POKEDATA, addr, *new);
    }
    ask(libc::PTRACE_DETACH, 0, 0);
    look(&mut owner, 4);
    owner.send(0);
    owner.finish();
    drop(device);
    driver.finish();
}

/// Catches a core dump with other bytes than the process had: it is read from the file, segment by segment.
#[test]
fn a_core_dump_has_what_the_device_wrote() {
    const PATTERN: &str = "/proc/sys/kernel/core_pattern";

    let (driver, device) = Driver::load_with("", GPUS[0]);
    let before = fs::read_to_string(PATTERN).unwrap();
    fs::write(PATTERN, "/tmp/core").unwrap();
    let path = device.path();
    let mut child = Child::fork(|test| {
        let device = Device::open_path(path).unwrap();
        let area = Area::filled(PAGES, 1);
        to_device(&device, area.part(0, PAGES / 2));
        device_fill(&device, area.part(4, PAGES - 8), 2);
        let limit = libc::rlimit {
            rlim_cur: libc::RLIM_INFINITY,
            rlim_max: libc::RLIM_INFINITY,
        };
        // SAFETY: the limits are a structure of ours.
        errno(unsafe { libc::setrlimit(libc::RLIMIT_CORE, &limit) }).unwrap();
        test.send(area.addr as u64);
        test.receive();
        // SAFETY: always fine to call.
        unsafe { libc::abort() };
    });
    let area = Span::new(child.receive() as usize, PAGES);
    child.send(0);
    child.finish_killed(libc::SIGABRT);
    fs::write(PATTERN, before).unwrap();

    // An ELF file with 64-bit program headers: type, flags, offset in the file, address, -, bytes in the file.
    let mut core = File::open("/tmp/core").unwrap();
    let mut header = [0_u8; 64];
    core.read_exact(&mut header).unwrap();
    assert_eq!(&header[..4], b"\x7fELF");
    let word = |bytes: &[u8], at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
    let count = u16::from_le_bytes([header[56], header[57]]);
    let mut programs = vec![0; usize::from(count) * 56];
    let at = word(&header, 32);
    core.read_exact_at(&mut programs, at).unwrap();
    let offset = programs
        .chunks_exact(56)
        .filter(|program| program[0] == 1)
        .find_map(|program| {
            let (addr, bytes) = (word(program, 16), word(program, 32));
            let inside = (area.addr as u64).checked_sub(addr)?;
            (inside + area.bytes() as u64 <= bytes).then_some(word(program, 8) + inside)
        })
        .unwrap();
    let mut words = vec![0_u64; area.bytes() / 8];
    core.read_exact_at(bytemuck::cast_slice_mut(&mut words), offset)
        .unwrap();
    for (first, pages, seed) in [(0, 4, 1), (4, PAGES - 8, 2), (PAGES - 4, 4, 1)] {
        let words = &words[first * PAGE / 8..(first + pages) * PAGE / 8];
        area.part(first, pages)
            .check_words("the core dump", words, seed);
    }
    fs::remove_file("/tmp/core").unwrap();
    drop(device);
    driver.finish();
}

/// Catches a device fault that does not wait for who has the page (a userfaultfd), or that keeps others waiting meanwhile: memory is
/// mapped, unmapped and accessed by others, and the device is unbound under it.
#[test]
fn a_device_fault_waits_for_a_userfaultfd_and_nobody_for_it() {
    let (driver, device, area) = scene();
    let twin = Device::open_path(device.path()).unwrap();
    let lazy = Area::new(4);
    lazy.advise(libc::MADV_NOHUGEPAGE).unwrap();
    let watch = Watch::new(*lazy);
    for (policy, page) in [(MAP, 0), (MIGRATE, 1)] {
        std::thread::scope(|scope| {
            let (device, page) = (&device, lazy.page(page));
            let reader = scope.spawn(move || {
                let mut words = vec![0_u64; PAGE / 8];
                let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut words);
                let ended = read(device, page.addr, bytes, policy);
                (ended, words)
            });
            assert_eq!(watch.next(), (page.addr, false));
            // Meanwhile: the address space changes, by its lock for writing, and other clients and this one go on.
            drop(Area::filled(10, 3));
            both_check(&twin, *area, 1);
            device_check(device, *area, 1);
            device_fill(device, area.part(0, 8), 1);
            mirror(&twin, *area, 1);
            assert!(!reader.is_finished());
            watch.give(page, 7);
            let (ended, words) = reader.join().unwrap();
            ended.whole(PAGE);
            page.check_words("the device", &words, 7);
        });
    }
    // A buffer that waits in the same way: what is read is not held up, and neither is who takes it away.
    std::thread::scope(|scope| {
        let (device, area, page) = (&device, *area, lazy.page(2));
        let reader = scope.spawn(move || read_to(device, area.addr, page.addr, PAGE, MAP));
        assert_eq!(watch.next(), (page.addr, false));
        area.page(0).advise(libc::MADV_DONTNEED).unwrap();
        area.page(0).fill(1);
        both_check(&twin, area, 1);
        assert!(!reader.is_finished());
        watch.give(page, 9);
        reader.join().unwrap().whole(PAGE);
        area.page(0).at(page.addr).check(1);
    });
    drop(watch);
    lazy.page(0).check(7);
    both_check(&device, lazy.page(1), 7);
    drop((lazy, twin));
    finish(driver, device, area);
}

/// Catches an unbind that waits for a device fault, or for a caller's buffer, that waits for user space: and a process that cannot be
/// killed while it waits so.
#[test]
fn what_waits_for_a_userfaultfd_holds_up_neither_unbind_nor_death() {
    let (mut driver, device, area) = scene();
    let lazy = Area::new(2);
    lazy.advise(libc::MADV_NOHUGEPAGE).unwrap();
    let watch = Watch::new(*lazy);
    std::thread::scope(|scope| {
        let (device, from) = (&device, *area);
        let [faults, copies] = [lazy.page(0).addr, lazy.page(1).addr];
        let faulting = scope.spawn(move || read(device, faults, &mut [0; 8], MAP));
        watch.next();
        let copying = scope.spawn(move || read_to(device, from.addr, copies, 8, MAP));
        watch.next();
        let start = Instant::now();
        driver.unbind(GPUS[0]);
        assert!(
            start.elapsed() < patience(Duration::from_secs(10)),
            "{:?}",
            start.elapsed()
        );
        assert!(!faulting.is_finished() && !copying.is_finished());
        watch.give(lazy.page(0), 5);
        watch.give(lazy.page(1), 6);
        assert_eq!(faulting.join().unwrap().result, Err(Errno::NODEV));
        // It had its bytes already.
        let ended = copying.join().unwrap();
        assert!(
            matches!(ended.result, Ok(()) | Err(Errno::NODEV)),
            "{ended:?}"
        );
    });
    drop(watch);
    area.check(1);
    drop(device);

    let device = driver.bind(GPUS[0]);
    let path = device.path();
    for copies in [false, true] {
        let mut child = Child::fork(|test| {
            let device = Device::open_path(path).unwrap();
            let (area, lazy) = (Area::filled(8, 1), Area::new(1));
            to_device(&device, area.part(0, 4));
            let watch = Watch::new(*lazy);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    if copies {
                        read_to(&device, area.addr, lazy.addr, PAGE, MAP);
                    } else {
                        read(&device, lazy.addr, &mut [0; 8], MIGRATE);
                    }
                });
                watch.wait_for_a_toucher();
                test.send(0);
                test.receive();
            });
        });
        child.receive();
        let start = Instant::now();
        child.kill();
        assert!(start.elapsed() < patience(Duration::from_secs(5)));
    }
    finish(driver, device, area);
}

/// Catches a write of the device to a page that is protected by a userfaultfd, in VRAM or not, that does not wait for its leave.
#[test]
fn a_write_waits_for_the_leave_of_a_userfaultfd() {
    let (driver, device, area) = scene();
    // Two in VRAM, two in system memory; all are in the device page table, writable.
    let part = area.part(PAGES / 2 - 2, 4);
    let watch = Watch::of_writes(part);
    for (seed, policy) in [(2, MAP), (3, MIGRATE)] {
        mirror(&device, *area, 1);
        watch.protect(part, true);
        // Reading needs no leave.
        device_check(&device, part, 1);
        for i in 0..4 {
            let page = part.page(i);
            std::thread::scope(|scope| {
                let (device, words) = (&device, page.pattern(seed));
                let writer = scope
                    .spawn(move || write(device, page.addr, bytemuck::cast_slice(&words), policy));
                assert_eq!(watch.next(), (page.addr, true));
                std::thread::sleep(Duration::from_millis(5));
                device_check(device, page, 1);
                assert!(!writer.is_finished());
                watch.protect(page, false);
                writer.join().unwrap().whole(PAGE);
            });
            device_check(&device, page, seed);
        }
        both_check(&device, part, seed);
    }
    drop(watch);
    both_check(&device, area.part(0, PAGES / 2 - 2), 1);
    both_check(&device, area.part(PAGES / 2 + 2, PAGES / 2 - 2), 1);
    assert!(places(&device, *area).all(Place::System));
    finish(driver, device, area);
}
