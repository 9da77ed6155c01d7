//! Access: who may use a device through which file, which devices there are to use, and how the module may be loaded.
//!
//! Runs in the virtual GPU host: `bench/test guest_access`.

use std::ffi::c_void;
use std::os::fd::{AsFd, AsRawFd};

use crate::common::child::Child;
use crate::common::driver::{is_bound, on_each_kind, try_device_of, Driver, GPUS};
use crate::common::kernel::{self, Log};
use crate::common::memory::{errno, Area, Span};
use crate::common::{assert_place, mirror, places, refused, to_device};
use hmm_gpu::uapi::{
    self, hmm_gpu_counters, hmm_gpu_migrate, hmm_gpu_mirror, hmm_gpu_query, hmm_gpu_residency,
    HMM_GPU_TARGET_DEVICE as DEVICE, HMM_GPU_TARGET_SYSTEM as SYSTEM,
};
use hmm_gpu::{Device, Errno, Place};

/// Asserts that each call through a file is refused.
#[track_caller]
fn every_call_is(device: &Device, expected: Errno, moving: Span) {
    let file = device.file();
    assert_eq!(file.query(&mut hmm_gpu_query::default()), Err(expected));
    assert_eq!(
        file.counters(&mut hmm_gpu_counters::default()),
        Err(expected)
    );
    let (addr, len) = (moving.addr as u64, moving.bytes() as u64);
    for target in [DEVICE, SYSTEM] {
        let mut argument = hmm_gpu_migrate {
            addr,
            len,
            target,
            ..Default::default()
        };
        assert_eq!(file.migrate(&mut argument), Err(expected));
    }
    let mut argument = hmm_gpu_residency {
        addr,
        len,
        ..Default::default()
    };
    assert_eq!(
        file.residency(&mut argument, &mut vec![0; moving.pages]),
        Err(expected)
    );
    for policy in [mirror::MAP, mirror::MIGRATE, mirror::NONE] {
        let mut bytes = [0xee; 100];
        for ended in [
            mirror::read(device, moving.addr, &mut bytes, policy),
            mirror::write(device, moving.addr, &[0; 100], policy),
            mirror::copy(device, moving.addr, moving.addr + 500, 100, policy),
        ] {
            assert_eq!((ended.result, ended.done), (Err(expected), 0));
        }
        assert_eq!(bytes, [0xee; 100]);
        let mut faults = [mirror::wants(moving.addr, mirror::WRITE)];
        let (result, _) = mirror::try_fault(device, &mut faults, policy);
        assert_eq!(result, Err(expected));
    }
    for policy in [mirror::MAP, mirror::MIGRATE, mirror::NONE] {
        let ended = mirror::atomic(device, moving.addr, 8, uapi::HMM_GPU_ATOMIC_ADD, 1, policy);
        assert_eq!(ended.result, Err(expected));
    }
    assert_eq!(mirror::try_snapshot(device, moving), Err(expected));
    let mut argument = hmm_gpu_mirror::default();
    let table = mirror::call(device, uapi::HMM_GPU_MIRROR, &mut argument);
    assert_eq!(table, Err(expected));
    // Whatever the arguments are.
    for number in [uapi::HMM_GPU_MIGRATE, 0xc008_e8ff] {
        // SAFETY: null cannot be written.
        let answer = unsafe { file.call(number, std::ptr::null_mut::<c_void>()) };
        assert_eq!(answer, Err(expected));
    }
}

/// Catches a file that works for an address space that did not open it: inherited through fork, passed over a socket, kept through
/// `execve`. And the contrary: threads, and a new open, work.
#[test]
fn a_file_serves_only_the_address_space_that_opened_it() {
    on_each_kind(|device| {
        let area = Area::filled(40, 9);
        to_device(device, area.part(0, 20));
        let (area, path) = (&area, device.path());
        Child::fork(|_| {
            every_call_is(device, Errno::PERM, **area);
            let own = Device::open_path(path).unwrap();
            assert!(places(&own, area.part(0, 20)).all(Place::Device));
        })
        .finish();

        // A file that somebody else opened and passed, while he lives and after.
        let mut other = Child::fork(|test| {
            let own = Device::open_path(path).unwrap();
            test.send(own.as_fd().as_raw_fd() as u64);
            test.receive();
        });
        let fd = other.receive();
        let mine = Device::open_path(path).unwrap();
        let passed = other.take_file(fd);
        // SAFETY: both are open.
        errno(unsafe { libc::dup2(passed.as_raw_fd(), mine.as_fd().as_raw_fd()) }).unwrap();
        every_call_is(&mine, Errno::PERM, **area);
        other.send(0);
        other.finish();
        every_call_is(&mine, Errno::PERM, **area);
        drop((mine, passed));

        // After execve: a program that has the descriptor, and makes the call.
        Child::fork(|_| {
            let own = Device::open_path(path).unwrap();
            own.describe().unwrap();
            // SAFETY: open; the copy is inherited by execve.
            let fd = errno(unsafe { libc::dup(own.as_fd().as_raw_fd()) }).unwrap();
            let program = format!(
                "import fcntl, sys\n\
                 try: fcntl.ioctl({fd}, {:#x}, bytearray({}))\n\
                 except PermissionError: sys.exit(0)\n\
                 sys.exit('the call went through')",
                uapi::HMM_GPU_QUERY,
                size_of::<hmm_gpu_query>()
            );
            let mut command = std::process::Command::new("python3");
            let error = std::os::unix::process::CommandExt::exec(command.args(["-c", &program]));
            panic!("python3: {error}");
        })
        .finish();

        std::thread::scope(|scope| {
            scope.spawn(|| device.describe().unwrap());
        });
        assert_place(device, area.part(0, 20), Place::Device);
        assert_place(device, area.part(20, 20), Place::System);
        area.check(9);
    });
}

/// Catches a node that anybody may open before a rule says who may.
#[test]
fn without_a_rule_the_node_is_for_root_only() {
    on_each_kind(|device| {
        let path = device.path();
        Child::fork(|_| {
            // SAFETY: always fine to call.
            errno(unsafe { libc::setgroups(0, std::ptr::null()) }).unwrap();
            // SAFETY: as above.
            errno(unsafe { libc::setgid(65534) }).unwrap();
            // SAFETY: as above.
            errno(unsafe { libc::setuid(65534) }).unwrap();
            assert_eq!(refused(Device::open_path(path)), Errno::ACCESS);
        })
        .finish();
    });
}

/// Catches a file that does something after its device is gone, even when the same GPU, or another with the same number, is there
/// again.
#[test]
fn after_unbind_every_call_is_enodev_for_ever() {
    let mut driver = Driver::load("soft=0");
    let device = driver.bind(GPUS[0]);
    let area = Area::filled(50, 3);
    to_device(&device, *area);
    driver.unbind(GPUS[0]);
    every_call_is(&device, Errno::NODEV, *area);
    area.check(3);
    let new = driver.bind(GPUS[0]);
    assert_eq!(new.unit(), device.unit(), "the lowest number that is free");
    every_call_is(&device, Errno::NODEV, *area);
    to_device(&new, *area);
    every_call_is(&device, Errno::NODEV, *area);
    assert_place(&new, *area, Place::Device);
    area.check(3);
    drop((device, new));
    driver.finish();
}

/// Catches a probe that takes what is no GPU, or that says no without saying why.
#[test]
fn a_device_without_usable_vram_is_refused_with_the_reason() {
    let mut driver = Driver::load("soft=0");
    // The host bridge, the ISA bridge, and the disk controller, whose BAR is not prefetchable.
    for address in ["0000:00:00.0", "0000:00:1f.0", "0000:00:1f.2"] {
        let before = kernel::iomem();
        let mut log = Log::from_now();
        assert!(driver.try_bind(address).is_err(), "{address}");
        log.expect(&["hmm_gpu", address, "no usable VRAM"]);
        assert!(!is_bound(address));
        assert!(try_device_of(address).is_none());
        assert_eq!(kernel::iomem(), before);
    }
    // A device that somebody else has: its own driver keeps it.
    let taken = "0000:00:01.0";
    assert!(driver.try_bind(taken).is_err());
    assert!(!is_bound(taken));
    // Nor is anything taken that was not named.
    assert_eq!(Device::list(), [] as [u32; 0]);
    drop(driver.bind(GPUS[3]));
    assert_eq!(Device::list(), [0]);
    driver.finish();
}

/// Catches parameters that are taken although they make no sense.
#[test]
fn bad_module_parameters_are_refused() {
    for parameters in [
        "soft_mib=0",
        "soft_mib=3",
        "soft=33 soft_mib=2",
        "soft=many",
        "add_resource=perhaps",
        "fail_probe=-1",
        "offer_ram=0x1000",
    ] {
        let before = kernel::iomem();
        let refused = Driver::try_load(parameters).map(drop).unwrap_err();
        assert!(
            matches!(refused, Errno::INVAL | Errno::NOSPC),
            "{parameters}: {refused}"
        );
        assert!(!kernel::is_loaded());
        assert_eq!(kernel::iomem(), before, "{parameters}");
    }
}
