//! Devices that clients make of dma-bufs: what is in them, who may, and that all ends well. The exporter is the kernel's own `udmabuf`,
//! which makes a dma-buf of the pages of a memory file: through that file the tests see the VRAM as another GPU would.
//!
//! Runs in the virtual GPU host: `bench/test guest_dma_buf`.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use crate::common::child::Child;
use crate::common::driver::{assert_empty, counters, Driver, GPUS};
use crate::common::kernel;
use crate::common::kernels::{cache, Arrays};
use crate::common::memory::{last_errno, Area, PAGE};
use crate::common::mirror::{fault_all, MIGRATE, READ};
use crate::common::shader::{bring_in, Shader, Words};
use crate::common::{assert_place, eventually, refused, rounds, to_device, to_system, Stop};
use crate::power::sleep;
use hmm_gpu::{Capabilities, Device, Ended, Errno, Place, Source, Strategy, SvmContext, Target};

const MIB: usize = 1 << 20;

/// A dma-buf, and the memory that it is of, mapped.
pub struct Exported {
    pub dma_buf: OwnedFd,
    memory: File,
    start: *mut AtomicU64,
    words: usize,
}

// SAFETY: the memory is the process's, and reached atomically only.
unsafe impl Send for Exported {}
// SAFETY: as above.
unsafe impl Sync for Exported {}

impl Exported {
    pub fn new(bytes: usize) -> Self {
        #[repr(C)]
        struct Create {
            memfd: u32,
            flags: u32,
            offset: u64,
            size: u64,
        }
        /// `_IOW('u', 0x42, struct udmabuf_create)` of `<linux/udmabuf.h>`.
        const UDMABUF_CREATE: libc::c_ulong = 0x4018_7542;

        let (seals, flags) = (
            libc::F_SEAL_SHRINK,
            libc::MFD_ALLOW_SEALING | libc::MFD_CLOEXEC,
        );
        // SAFETY: a new file, with a name that is a string.
        let memory = unsafe { libc::memfd_create(c"vram".as_ptr(), flags) };
        assert!(memory >= 0, "{}", last_errno());
        // SAFETY: just opened.
        let memory = unsafe { File::from_raw_fd(memory) };
        memory.set_len(bytes as u64).unwrap();
        // SAFETY: the file is open.
        let sealed = unsafe { libc::fcntl(memory.as_raw_fd(), libc::F_ADD_SEALS, seals) };
        assert_eq!(sealed, 0, "{}", last_errno());
        let maker = File::options()
            .read(true)
            .write(true)
            .open("/dev/udmabuf")
            .unwrap();
        let create = Create {
            memfd: memory.as_raw_fd() as u32,
            flags: 1,
            offset: 0,
            size: bytes as u64,
        };
        // SAFETY: the number is that of this structure.
        let dma_buf = unsafe { libc::ioctl(maker.as_raw_fd(), UDMABUF_CREATE, &create) };
        assert!(dma_buf >= 0, "{}", last_errno());
        let rw = libc::PROT_READ | libc::PROT_WRITE;
        let (fd, none) = (memory.as_raw_fd(), std::ptr::null_mut());
        // SAFETY: a new map, where the kernel likes.
        let start = unsafe { libc::mmap(none, bytes, rw, libc::MAP_SHARED, fd, 0) };
        assert_ne!(start, libc::MAP_FAILED, "{}", last_errno());
        Self {
            // SAFETY: just opened.
            dma_buf: unsafe { OwnedFd::from_raw_fd(dma_buf) },
            memory,
            start: start.cast(),
            words: bytes / 8,
        }
    }

    fn word(&self, offset: u64) -> Option<&AtomicU64> {
        let at = (offset / 8) as usize;
        // SAFETY: inside, and mapped as long as this is there.
        (at < self.words).then(|| unsafe { &*self.start.wrapping_add(at) })
    }

    fn all(&self) -> impl Iterator<Item = &AtomicU64> {
        (0..self.words as u64).filter_map(|at| self.word(at * 8))
    }

    #[track_caller]
    fn assert_zero(&self) {
        let other = self
            .all()
            .position(|word| word.load(Ordering::Relaxed) != 0);
        assert_eq!(other, None, "a word that is not zero");
    }
}

impl Words for Exported {
    fn load(&self, offset: u64) -> Option<u64> {
        Some(self.word(offset)?.load(Ordering::Acquire))
    }

    fn store(&self, offset: u64, word: u64) -> Option<()> {
        self.word(offset)?.store(word, Ordering::Release);
        Some(())
    }
}

impl Drop for Exported {
    fn drop(&mut self) {
        // SAFETY: mapped by this, and reached by nobody any more.
        unsafe { libc::munmap(self.start.cast(), self.words * 8) };
    }
}

/// The module with room for imports, its device, a dma-buf, and the device made of it.
fn load(mib: usize) -> (Driver, Device, Exported, Device) {
    let driver = Driver::load("soft=1 soft_mib=8 import_mib=64");
    let device = Device::open(0).unwrap();
    let exported = Exported::new(mib * MIB);
    exported
        .all()
        .for_each(|word| word.store(u64::MAX, Ordering::Relaxed));
    let import = device.import_dma_buf(&exported.dma_buf, mib * MIB).unwrap();
    (driver, device, exported, import)
}

/// Whether the device pages of the import, the second device there is, are registered.
fn is_in_iomem() -> bool {
    kernel::iomem().contains("hmm_gpu1")
}

/// Catches a device that says something else than it is, pages that are elsewhere than in the dma-buf, bytes that differ there, and what is left of it: in the
/// dma-buf, in the kernel, or of the process's own bytes.
#[test]
fn pages_are_where_the_exporter_has_them() {
    let (driver, device, exported, import) = load(8);
    exported.assert_zero();
    let described = import.describe().unwrap();
    assert_eq!(described.source, Source::DmaBuf, "{described}");
    assert_eq!((described.unit, described.vram_bytes), (1, 8 * MIB as u64));
    assert!(described.capabilities.contains(Capabilities::POOL));
    assert!(!described.capabilities.contains(Capabilities::IMPORT));
    assert!(device
        .describe()
        .unwrap()
        .capabilities
        .contains(Capabilities::IMPORT));
    assert_eq!(Device::list(), [0], "a node that anybody may open");

    let area = Area::filled(300, 1);
    bring_in(&import, *area);
    assert_place(&import, *area, Place::Device);
    assert_place(&device, *area, Place::OtherDevice);
    let shader = Shader::new(&import, &exported);
    shader.check(*area, 1);
    assert_eq!(shader.fill(*area, 2), 300);
    area.check(2);
    // Between two devices, either way, and by a whole block.
    to_device(&device, *area);
    bring_in(&import, *area);
    shader.check(*area, 2);
    // An execution keeps it there, and what was found in the table good.
    let places = shader.places(*area);
    let execution = import.begin_execution(Duration::from_secs(5)).unwrap();
    let moved = import
        .prefetch_range(area.addr, area.bytes(), Target::System)
        .unwrap();
    assert_eq!((moved.moved, moved.skipped), (0, area.bytes() as u64));
    shader.fill_places(&places, &area.pattern(3));
    assert_eq!(execution.end().unwrap(), Ended::Well);
    assert!(is_in_iomem());
    drop(import);
    eventually("the device goes with its file", || !is_in_iomem());
    assert_place(&device, *area, Place::System);
    area.check(3);
    exported.assert_zero();
    assert_empty(&device);
    drop((device, exported, area));
    driver.finish();
}

/// Catches a working set that does not fit and loses bytes, and VRAM of which less can be used than there is.
#[test]
fn more_than_it_has_goes_through_it() {
    let (driver, device, exported, import) = load(4);
    let area = Area::filled(16 * MIB / PAGE, 4);
    for _ in 0..2 {
        for first in (0..area.pages).step_by(256) {
            let part = area.part(first, 256);
            fault_all(&import, part, READ, MIGRATE);
            Shader::new(&import, &exported).check(part, 4);
        }
    }
    let counted = counters(&import);
    assert!(counted.pressure_pages as usize > area.pages, "{counted:?}");
    // All but what the last ones had room made for.
    let free = (4 * MIB / PAGE) as u64 - counted.live_pages;
    assert!(free < 512, "{free} pages of it are free");
    to_system(&import, *area);
    area.check(4);
    drop((import, device, exported, area));
    driver.finish();
}

/// Catches who may import although nobody may, something that is taken for a dma-buf, and a limit that is none.
#[test]
fn what_is_refused() {
    let driver = Driver::load("soft=1 soft_mib=8");
    let (device, exported) = (Device::open(0).unwrap(), Exported::new(4 * MIB));
    assert!(!device
        .describe()
        .unwrap()
        .capabilities
        .contains(Capabilities::IMPORT));
    let refusal =
        |device: &Device, fd: BorrowedFd<'_>, bytes| refused(device.import_dma_buf(fd, bytes));
    assert_eq!(
        refusal(&device, exported.dma_buf.as_fd(), 2 * MIB),
        Errno::OPNOTSUPP
    );
    drop(device);
    driver.finish();

    let mut driver = Driver::load("soft=1 soft_mib=8 import_mib=20");
    let device = Device::open(0).unwrap();
    let dma_buf = exported.dma_buf.as_fd();
    for bytes in [0, 1, PAGE, MIB, 3 * MIB, 2 * MIB + 1, 6 * MIB] {
        assert_eq!(refusal(&device, dma_buf, bytes), Errno::INVAL, "{bytes}");
    }
    assert_eq!(refusal(&device, dma_buf, 22 * MIB), Errno::NOSPC);
    assert_eq!(
        refusal(&device, dma_buf, usize::MAX & !(2 * MIB - 1)),
        Errno::NOSPC
    );
    for other in [exported.memory.as_fd(), device.as_fd()] {
        assert_eq!(refusal(&device, other, 2 * MIB), Errno::INVAL);
    }
    let import = device.import_dma_buf(dma_buf, 4 * MIB).unwrap();
    // At its end it is zeroed, so it is one device at a time.
    assert_eq!(refusal(&device, dma_buf, 2 * MIB), Errno::BUSY);
    // The limits are of all together.
    let others: Vec<Exported> = (0..8).map(|_| Exported::new(4 * MIB)).collect();
    let import_all = |bytes| {
        let each = others
            .iter()
            .map(|it| device.import_dma_buf(&it.dma_buf, bytes));
        each.filter_map(Result::ok).collect::<Vec<_>>()
    };
    assert_eq!(import_all(4 * MIB).len(), 4);
    drop(import);
    eventually("it is given back", || {
        device.import_dma_buf(dma_buf, 4 * MIB).is_ok()
    });
    let mut all = vec![];
    eventually("there are as many as there may be", || {
        all.extend(import_all(2 * MIB));
        all.len() == 8
    });
    assert_eq!(refusal(&device, dma_buf, 2 * MIB), Errno::NOSPC);
    let import = all.pop().unwrap();
    assert_eq!(refusal(&import, dma_buf, 2 * MIB), Errno::OPNOTSUPP);
    assert_eq!(refused(import.create_pool(2 * MIB)), Errno::EXIST);
    let (fd, none) = (import.as_fd().as_raw_fd(), std::ptr::null_mut());
    // SAFETY: a new map, where the kernel likes; it is refused.
    let mapped = unsafe { libc::mmap(none, PAGE, libc::PROT_READ, libc::MAP_SHARED, fd, 0) };
    assert_eq!((mapped, last_errno()), (libc::MAP_FAILED, Errno::OPNOTSUPP));
    // Another process's file is no more use than that of a node.
    let child = Child::fork(|_| assert_eq!(refused(import.describe()), Errno::PERM));
    child.finish();
    assert_eq!(driver.try_remove(), Err(Errno::AGAIN));
    drop((import, all, device));
    driver.finish();
}

/// Catches an import that outlives the device it was made through, or keeps it from going.
#[test]
fn it_goes_with_the_device_it_was_made_through() {
    let mut driver = Driver::load("soft=0 import_mib=64");
    let device = driver.bind(GPUS[0]);
    let exported = Exported::new(8 * MIB);
    for round in 0..3 {
        let device = match round {
            0 => device.import_dma_buf(&exported.dma_buf, 8 * MIB).unwrap(),
            _ => driver
                .bind(GPUS[0])
                .import_dma_buf(&exported.dma_buf, 8 * MIB)
                .unwrap(),
        };
        let area = Area::filled(1000, round);
        to_device(&device, *area);
        // An execution that nobody ends is in nobody's way for ever.
        let execution = device.begin_execution(Duration::from_millis(300)).unwrap();
        driver.unbind(GPUS[0]);
        assert!(!is_in_iomem());
        assert_eq!(refused(device.describe()), Errno::NODEV);
        area.check(round);
        drop(execution);
        exported.assert_zero();
    }
    drop((device, exported));
    driver.finish();
}

/// Catches a process that waits at its end for what it has made, a fork that shares with it what it must not, and bytes of a child that go with its parent.
#[test]
fn processes_fork_and_die_with_it() {
    let (driver, device, exported, import) = load(8);
    drop(import);
    eventually("the first goes", || !is_in_iomem());
    for killed in [false, true] {
        let mut child = Child::fork(|link| {
            let device = Device::open(0).unwrap();
            let import = device.import_dma_buf(&exported.dma_buf, 8 * MIB);
            let import = import.unwrap();
            let area = Area::filled(500, 7);
            bring_in(&import, *area);
            let grandchild = Child::fork(|_| area.check(7));
            grandchild.finish();
            area.fill(8);
            bring_in(&import, *area);
            Shader::new(&import, &exported).check(*area, 8);
            link.send(1);
            link.receive();
            area.check(8);
        });
        assert_eq!(child.receive(), 1);
        if killed {
            child.kill();
        } else {
            child.send(1);
            child.finish();
        }
        eventually("it goes", || !is_in_iomem());
        exported.assert_zero();
    }
    drop((device, exported));
    driver.finish();
}

/// Catches what is lost when the host falls asleep, whatever the exporter makes of that.
#[test]
fn sleep_finds_it_empty() {
    let (driver, device, exported, import) = load(8);
    let area = Area::filled(700, 9);
    to_device(&import, *area);
    sleep("mem");
    assert_place(&import, *area, Place::System);
    area.check(9);
    bring_in(&import, *area);
    Shader::new(&import, &exported).check(*area, 9);
    area.check(9);
    drop((import, device, exported, area));
    driver.finish();
}

/// Catches a kernel whose pages are not in the memory that Vulkan has, bytes that are lost where they are more than that, and a device that stays when the context goes.
#[test]
fn kernels_use_pages_in_memory_of_vulkans_own() {
    cache();
    let driver = Driver::load("soft=1 soft_mib=8 import_mib=64");
    let device = Device::open(0).unwrap();
    let told = hmm_gpu::doctor();
    let devices = told.devices.as_ref().unwrap();
    assert!(devices.iter().any(|it| it.exported == Ok(())), "{told}");
    let context = SvmContext::builder()
        .strategy(Strategy::Translated)
        .driver(Device::open(0).unwrap())
        .exported(true)
        .pool_bytes(4 * MIB)
        .build()
        .unwrap();
    let import = context.driver().unwrap();
    assert_eq!(import.describe().unwrap().source, Source::DmaBuf);
    let arrays = Arrays::new(200);
    let cold = arrays.saxpy(&context);
    assert_eq!(cold.bytes_in, 400 * PAGE as u64, "{cold}");
    for area in [&arrays.x, &arrays.y] {
        assert_place(import, **area, Place::Device);
        assert_place(&device, **area, Place::OtherDevice);
    }
    let warm = arrays.saxpy(&context);
    assert_eq!((warm.rounds, warm.faults), (1, 0), "{warm}");
    arrays.check(2);
    // More than it has.
    let arrays = Arrays::new(rounds(2048).max(600));
    let stats = arrays.saxpy(&context);
    println!("{cold}\n{warm}\n{stats}");
    arrays.check(1);
    assert!(counters(import).pressure_pages > 0, "{stats}");
    drop((context, arrays));
    eventually("the device goes with the context", || !is_in_iomem());

    // And said why, where the driver takes none.
    drop(device);
    driver.finish();
    let driver = Driver::load("soft=1 soft_mib=8");
    let built = SvmContext::builder()
        .strategy(Strategy::Translated)
        .exported(true)
        .build();
    let error = built.unwrap_err().to_string();
    assert!(error.contains("import_mib"), "{error}");
    driver.finish();
}

/// Catches a driver that believes what is in the dma-buf: somebody who has it writes anything there, to pages, page tables and what is free.
#[test]
fn an_exporter_gone_mad_hurts_nobody_but_its_client() {
    let (driver, device, exported, import) = load(4);
    let other = Area::filled(400, 10);
    to_device(&device, *other);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut value = 1_u64;
            while !stop.load(Ordering::Relaxed) {
                for word in exported.all().step_by(7) {
                    value = value.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(9);
                    word.store(value, Ordering::Relaxed);
                }
            }
        });
        let _stop = Stop(&stop);
        for round in 0..rounds(10) as u64 {
            let area = Area::filled(600, round);
            fault_all(&import, *area, READ, MIGRATE);
            let _ = import.snapshot_range(area.addr, area.bytes()).unwrap();
            let mut bytes = vec![0; 100 * PAGE];
            let _ = import.read_at(area.addr, &mut bytes, hmm_gpu::Policy::Migrate);
            to_system(&import, *area);
        }
    });
    other.check(10);
    drop((import, device, exported, other));
    driver.finish();
}
