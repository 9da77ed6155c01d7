//! Memory of every kind: what is not private and anonymous is mirrored where it lies, and stays there. What a device writes to a
//! file's pages is in the file.
//!
//! Runs in the virtual GPU host: `bench/test guest_kinds`.

use std::fs::{self, File};
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::common::driver::{on_each_kind, Driver, GPUS};
use crate::common::kernel::{self, Entry};
use crate::common::memory::{errno, file, last_errno, Area, Span, HUGE, PAGE};
use crate::common::mirror::{
    both_check, device_check, device_check_by, device_check_zero, device_fill, device_fill_by,
    fault, mirrored, read, snapshot, wants, write, MAP, MIGRATE, READ, WRITE,
};
use crate::common::{moved, places, to_device};
use hmm_gpu::{Device, Errno, Target};

const RW: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;
const ANONYMOUS: libc::c_int = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
const PAGES: usize = 20;

/// Asserts that nothing of a span is in any VRAM, by the driver and by the kernel, although it is asked for.
#[track_caller]
fn stays(device: &Device, span: Span) {
    let counts = places(device, span).counts();
    assert_eq!((counts.device, counts.other_device), (0, 0));
    let asked = device
        .prefetch_range(span.addr, span.bytes(), Target::Device)
        .unwrap();
    assert_eq!(asked, moved(0, 0, span.pages, 0));
    let entries = kernel::pagemap(std::process::id(), span.addr, span.pages);
    assert!(!entries.into_iter().any(Entry::is_in_vram));
}

/// A file in a folder, gone when dropped.
struct InFolder {
    file: File,
    path: PathBuf,
}

impl InFolder {
    /// With the pattern of a seed on some pages.
    fn new(folder: &Path, pages: usize, seed: u64) -> Self {
        let path = folder.join("hmm-gpu-test-file");
        let mut options = fs::OpenOptions::new();
        let options = options.read(true).write(true).create(true).truncate(true);
        let file = options.open(&path).unwrap();
        let words = Span::new(0, pages).pattern(seed);
        file.write_all_at(bytemuck::cast_slice(&words), 0).unwrap();
        Self { file, path }
    }
}

impl Drop for InFolder {
    fn drop(&mut self) {
        fs::remove_file(&self.path).unwrap();
    }
}

/// The folder that the host serves.
fn on_virtiofs() -> PathBuf {
    std::env::var_os("OUT").unwrap().into()
}

/// Some pages of a file, mapped.
fn mapped(fd: RawFd, pages: usize, protection: libc::c_int, sharing: libc::c_int) -> Area {
    let area = Area::new(pages);
    area.map_over(protection, sharing, fd);
    area
}

/// Catches memory that a device reads wrongly, writes beside, moves, or does not reach, for what kind of mapping it is.
#[test]
fn memory_of_every_kind_is_accessed_where_it_lies() {
    fs::write("/proc/sys/vm/nr_hugepages", "2").unwrap();
    on_each_kind(|device| {
        let check = |what: &str, span: Span| {
            println!("{what}");
            for (seed, policy) in [(1, MAP), (3, MIGRATE)] {
                span.fill(seed);
                device_check_by(device, span, seed, policy);
                stays(device, span);
                device_fill_by(device, span, seed + 1, policy);
                assert_eq!(mirrored(device, span), span.pages);
                both_check(device, span, seed + 1);
                stays(device, span);
            }
        };
        check("shared anonymous memory", *Area::shared(PAGES));
        let huge = Area::offset(0, HUGE);
        for sharing in [libc::MAP_PRIVATE, libc::MAP_SHARED] {
            let flags = sharing | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB;
            huge.map_over(RW, flags, -1);
            check("hugetlb", *huge);
            assert_eq!(snapshot(device, huge.page(77))[0].order(), 9);
        }
        let memory = file(PAGES, 0);
        let in_tmpfs = InFolder::new(Path::new("/tmp"), PAGES, 0);
        let in_virtiofs = InFolder::new(&on_virtiofs(), PAGES, 0);
        for (what, file) in [
            ("a memfd", &memory),
            ("a file in tmpfs", &in_tmpfs.file),
            ("a file in virtiofs", &in_virtiofs.file),
        ] {
            let shared = mapped(file.as_raw_fd(), PAGES, RW, libc::MAP_SHARED);
            check(what, *shared);
            // A private one has the file's bytes until it is written to, and the file never has its own.
            let private = mapped(file.as_raw_fd(), PAGES, RW, libc::MAP_PRIVATE);
            device_check(device, *private, 4);
            device_fill(device, private.part(5, 5), 9);
            device_fill_by(device, private.part(10, 5), 9, MIGRATE);
            device_check(device, *shared, 4);
            both_check(device, private.part(5, 10), 9);
            both_check(device, private.part(0, 5), 4);
            // What was written is the process's own, and moves.
            let asked = device.prefetch_range(private.addr, private.bytes(), Target::Device);
            let asked = asked.unwrap();
            assert_eq!(asked.moved + asked.already, (10 * PAGE) as u64);
            assert_eq!(asked.skipped, ((PAGES - 10) * PAGE) as u64);
            both_check(device, private.part(5, 10), 9);
            both_check(device, private.part(0, 5), 4);
            both_check(device, *shared, 4);
        }
    });
    fs::write("/proc/sys/vm/nr_hugepages", "0").unwrap();
}

/// Catches a device that has to ask whose memory it is: what a program has anyhow is all the same to it.
#[test]
fn a_program_s_own_memory_is_accessed_as_it_is() {
    static DATA: [u64; 1000] = [7; 1000];

    on_each_kind(|device| {
        let bytes_of = |addr: usize, len: usize| {
            let mut bytes = vec![0; len];
            read(device, addr, &mut bytes, MAP).whole(len);
            bytes
        };
        let own: &[u8] = bytemuck::cast_slice(&DATA);
        assert!(
            bytes_of(own.as_ptr() as usize, own.len()) == own,
            "constants"
        );
        // Its code and the kernel's page of code, byte by byte as the CPU has them, and not to be written.
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        for name in ["r-xp", "[vdso]"] {
            let line = maps.lines().find(|line| line.contains(name)).unwrap();
            let start = line.split_once('-').unwrap().0;
            let addr = usize::from_str_radix(start, 16).unwrap();
            let found = bytes_of(addr, PAGE);
            // SAFETY: mapped readable, and nobody writes to it.
            let code = unsafe { std::slice::from_raw_parts(addr as *const u8, PAGE) };
            assert!(found == code, "{name}");
            write(device, addr, &[0xcc], MAP).stopped(Errno::ACCESS, 0, addr);
            let entries = kernel::pagemap(std::process::id(), addr, 1);
            assert!(!entries[0].is_in_vram());
        }
        let boxed = Box::new([1_u64; 700]);
        let stack = [2_u32; 700];
        let heap = vec![3_u16; 70_001];
        for place in [
            bytemuck::cast_slice::<_, u8>(&boxed[..]),
            bytemuck::cast_slice(&stack[..]),
            bytemuck::cast_slice(&heap),
        ] {
            for policy in [MAP, MIGRATE] {
                let new: Vec<u8> = (0..place.len()).map(|i| (i * 7 + 1) as u8).collect();
                let addr = std::hint::black_box(place.as_ptr()) as usize;
                write(device, addr, &new, policy).whole(new.len());
                assert!(bytes_of(addr, new.len()) == new);
                // SAFETY: the place is there; what it holds is read anew.
                let seen = unsafe { std::slice::from_raw_parts(addr as *const u8, new.len()) };
                assert!(std::hint::black_box(seen) == new);
            }
        }
    });
}

/// Catches bytes that a device wrote and that are not the file's, or the contrary, and an entry for a page that a file does not have
/// any more.
#[test]
fn a_file_and_the_device_see_each_other_s_writes() {
    let (driver, device) = Driver::load_with("", GPUS[0]);
    for folder in [Path::new("/tmp"), &on_virtiofs()] {
        println!("{}", folder.display());
        let file = InFolder::new(folder, PAGES, 1);
        let area = mapped(file.file.as_raw_fd(), PAGES, RW, libc::MAP_SHARED);
        let in_file = |span: Span, seed: u64| {
            let mut words = vec![0_u64; span.bytes() / 8];
            let bytes = bytemuck::cast_slice_mut(&mut words);
            let offset = span.addr - area.addr;
            file.file.read_exact_at(bytes, offset as u64).unwrap();
            span.check_words("a read of the file", &words, seed);
        };
        // Into pages that were never touched, and into some that were looked at.
        device_check(&device, area.part(0, 10), 1);
        device_fill(&device, area.part(5, 10), 2);
        in_file(area.part(0, 5), 1);
        in_file(area.part(5, 10), 2);
        let words = area.part(2, 10).pattern(3);
        let at = 2 * PAGE as u64;
        file.file
            .write_all_at(bytemuck::cast_slice(&words), at)
            .unwrap();
        device_check(&device, area.part(2, 10), 3);
        both_check(&device, area.part(12, 3), 2);

        // What the file loses, the device loses.
        let bytes = |pages: usize| (pages * PAGE) as u64;
        file.file.set_len(bytes(8)).unwrap();
        assert_eq!(mirrored(&device, area.part(8, 12)), 0);
        let mut buffer = vec![0; 4 * PAGE];
        let gone = area.page(8).addr;
        read(&device, gone - PAGE, &mut buffer, MAP).stopped(Errno::FAULT, PAGE, gone);
        write(&device, gone, &[1; 10], MAP).stopped(Errno::FAULT, 0, gone);
        file.file.set_len(bytes(PAGES)).unwrap();
        device_check_zero(&device, area.part(8, 12));
        device_check(&device, area.part(2, 6), 3);
        device_fill(&device, area.part(8, 12), 4);
        in_file(area.part(8, 12), 4);
        let hole = (bytes(10) as i64, bytes(3) as i64);
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: an open file.
        let punched = unsafe { libc::fallocate(file.file.as_raw_fd(), mode, hole.0, hole.1) };
        errno(punched).unwrap();
        assert_eq!(mirrored(&device, area.part(10, 3)), 0);
        device_check_zero(&device, area.part(10, 3));
        both_check(&device, area.part(13, 7), 4);
        both_check(&device, area.part(2, 6), 3);
        area.part(10, 3).check_zero();
    }
    drop(device);
    driver.finish();
}

/// Catches a write of the device that nobody writes back: the host's copy of the file has each, also the one that comes after a
/// writeback has made the pages clean.
#[test]
fn what_the_device_writes_is_written_back_each_time() {
    let (driver, device) = Driver::load_with("", GPUS[0]);
    let file = InFolder::new(&on_virtiofs(), PAGES, 1);
    let area = mapped(file.file.as_raw_fd(), PAGES, RW, libc::MAP_SHARED);
    let mut options = fs::OpenOptions::new();
    let past_the_cache = options.read(true).custom_flags(libc::O_DIRECT);
    let direct = past_the_cache.open(&file.path).unwrap();
    let buffer = Area::filled(PAGES, 0);
    for seed in 2..6 {
        // By the same entries, if they are there still: the even ones were only read.
        device_check(&device, *area, seed - 1);
        device_fill(&device, *area, seed);
        file.file.sync_all().unwrap();
        // SAFETY: the buffer is as long.
        let bytes =
            unsafe { libc::pread(direct.as_raw_fd(), buffer.addr as *mut _, buffer.bytes(), 0) };
        assert_eq!(bytes, buffer.bytes() as isize, "{}", last_errno());
        buffer.check(seed);
    }
    area.check(5);
    drop((area, file, device));
    driver.finish();
}

/// Catches a write to what can only be read: a file opened for reading, shared or private.
#[test]
fn a_file_that_can_only_be_read_is_not_written() {
    on_each_kind(|device| {
        let file = InFolder::new(Path::new("/tmp"), PAGES, 1);
        let reading = File::open(&file.path).unwrap();
        for sharing in [libc::MAP_SHARED, libc::MAP_PRIVATE] {
            let area = mapped(reading.as_raw_fd(), PAGES, libc::PROT_READ, sharing);
            for touched in [false, true] {
                write(device, area.addr + 9, &[1; 100], MAP).stopped(Errno::ACCESS, 0, area.addr);
                write(device, area.addr, &[1; 100], MIGRATE).stopped(Errno::ACCESS, 0, area.addr);
                if !touched {
                    device_check(device, *area, 1);
                }
            }
            area.check(1);
        }
        // A private one may be made writable, and then its copy is.
        let area = mapped(
            reading.as_raw_fd(),
            PAGES,
            libc::PROT_READ,
            libc::MAP_PRIVATE,
        );
        device_check(device, *area, 1);
        area.protect(RW);
        device_fill(device, area.part(0, 10), 2);
        both_check(device, area.part(0, 10), 2);
        both_check(device, area.part(10, 10), 1);
        let other = mapped(file.file.as_raw_fd(), PAGES, RW, libc::MAP_SHARED);
        other.check(1);
    });
}

/// Catches memory that the kernel itself cannot read (`memfd_secret` has no direct mapping) and that is read anyhow, which is an oops;
/// and secrets that get out.
#[test]
fn secret_memory_is_out_of_reach() {
    on_each_kind(|device| {
        // SAFETY: numbers only.
        let fd = unsafe { libc::syscall(libc::SYS_memfd_secret, libc::O_CLOEXEC) };
        assert_ne!(fd, -1, "memfd_secret: {}", last_errno());
        // SAFETY: just made, and nobody else's.
        let file = unsafe { File::from_raw_fd(fd as RawFd) };
        file.set_len((PAGES * PAGE) as u64).unwrap();
        let area = mapped(file.as_raw_fd(), PAGES, RW, libc::MAP_SHARED);
        for touched in [0, PAGES / 2, PAGES] {
            area.part(0, touched).fill(1);
            for policy in [MAP, MIGRATE] {
                for page in [0, PAGES - 1] {
                    let addr = area.page(page).addr;
                    let mut bytes = [0xee; 64];
                    read(device, addr, &mut bytes, policy).stopped(Errno::FAULT, 0, addr);
                    assert_eq!(bytes, [0xee; 64]);
                    write(device, addr, &bytes, policy).stopped(Errno::FAULT, 0, addr);
                }
                let mut faults = [READ, WRITE].map(|access| wants(area.page(3).addr, access));
                let answer = fault(device, &mut faults, policy);
                assert_eq!((answer.mapped_pages, answer.failed_pages), (0, 1));
                let no = libc::EFAULT as u32;
                assert!(faults.iter().all(|fault| fault.status == no), "{faults:?}");
            }
            assert_eq!(mirrored(device, *area), 0);
            stays(device, *area);
            area.part(0, touched).check(1);
        }
        // Nor is it a good buffer for what goes past the page tables, but it is one for what does not.
        let plain = Area::filled(4, 2);
        to_device(device, *plain);
        read(device, plain.addr, &mut [0; 16], MAP).whole(16);
        crate::common::mirror::read_to(device, plain.addr, area.addr + 5, 2 * PAGE, MAP)
            .whole(2 * PAGE);
        let words = plain.part(0, 2).pattern(2);
        let words: &[u8] = bytemuck::cast_slice(&words);
        // SAFETY: in the area.
        let found = unsafe { std::slice::from_raw_parts((area.addr + 5) as *const u8, 2 * PAGE) };
        assert!(found == words);
    });
}

/// Catches broken memory that is read. The kernel knows of it, and has nothing there any more that a device could reach.
#[test]
fn broken_memory_is_out_of_reach() {
    // Who breaks his memory is told by a signal.
    extern "C" fn told(_: libc::c_int) {}
    let told: extern "C" fn(libc::c_int) = told;
    // SAFETY: what handles it does nothing.
    unsafe { libc::signal(libc::SIGBUS, told as libc::sighandler_t) };
    let (driver, device) = Driver::load_with("", GPUS[0]);
    for resident in [false, true] {
        let area = Area::filled(8, 1);
        if resident {
            to_device(&device, *area);
        }
        device_check(&device, *area, 1);
        area.page(3).advise(libc::MADV_HWPOISON).unwrap();
        assert_eq!(mirrored(&device, area.page(3)), 0);
        let bad = area.page(3).addr;
        let mut bytes = vec![0; 6 * PAGE];
        read(&device, area.addr, &mut bytes, MAP).stopped(Errno::FAULT, 3 * PAGE, bad);
        let words = area.part(0, 3).pattern(1);
        assert!(bytes[..3 * PAGE] == *bytemuck::cast_slice::<u64, u8>(&words));
        write(&device, bad + 8, &[0; 8], MIGRATE).stopped(Errno::FAULT, 0, bad);
        let mut faults = [wants(bad, READ), wants(bad + PAGE, WRITE)];
        let answer = fault(&device, &mut faults, MAP);
        assert_eq!((answer.mapped_pages, answer.failed_pages), (1, 1));
        let status = faults.map(|fault| fault.status);
        assert_eq!(status, [libc::EFAULT as u32, 0]);
        both_check(&device, area.part(0, 3), 1);
        both_check(&device, area.part(4, 4), 1);
        // A new page in its place.
        area.page(3).map_over(RW, ANONYMOUS, -1);
        device_check_zero(&device, area.page(3));
    }
    drop(device);
    driver.finish();
}
