//! The module, loaded for one test, and the proof that nothing is left of it.

use std::fs;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use hmm_gpu::uapi::hmm_gpu_counters;
use hmm_gpu::{Counters, Device, Errno, PciAddress};

use super::memory::PAGE;
use super::{eventually, is_checking, kernel};

/// The virtual GPU host's devices: two display adapters with 256 MiB, and two that have 1 GiB in a 64-bit BAR (with the
/// checking kernel 128 MiB).
pub const GPUS: [&str; 4] = [
    "0000:00:10.0",
    "0000:00:11.0",
    "0000:00:12.0",
    "0000:00:13.0",
];

/// One in a slot of its own, with 64 MiB: it can be reset, and switched off.
pub const IN_SLOT: &str = "0000:01:00.0";

/// There is one module, and one machine.
static MACHINE: Mutex<()> = Mutex::new(());

/// The loaded module, and the devices bound to it.
///
/// Its end (`finish`, or a drop) unbinds, unloads, and asserts that the machine is as it was before.
pub struct Driver {
    iomem: String,
    bound: Vec<&'static str>,
    removed: bool,
    _machine: MutexGuard<'static, ()>,
}

impl Driver {
    /// Loads the module.
    #[track_caller]
    pub fn load(parameters: &str) -> Self {
        Self::try_load(parameters)
            .unwrap_or_else(|errno| panic!("loading the module with {parameters:?}: {errno}"))
    }

    /// Loads the module, which may fail.
    pub fn try_load(parameters: &str) -> Result<Self, Errno> {
        let machine = MACHINE.lock().unwrap_or_else(PoisonError::into_inner);
        assert!(
            !kernel::is_loaded(),
            "the module is still loaded from the test before"
        );
        let iomem = kernel::iomem();
        // Where a page is should not depend on how fast the machine is.
        // And not on who touched its neighbours, but where that is what a test is about.
        let mut all = parameters.to_owned();
        for (name, quiet) in [("bounce_ms", 0), ("fault_around", 1)] {
            if !parameters.contains(name) {
                all += &format!(" {name}={quiet}");
            }
        }
        let parameters = &all;
        kernel::insert_module(Path::new(kernel::MODULE), parameters)?;
        Ok(Self {
            iomem,
            bound: vec![],
            removed: false,
            _machine: machine,
        })
    }

    /// Loads the module without soft devices, and binds one of the GPUs.
    #[track_caller]
    pub fn load_with(parameters: &str, gpu: &'static str) -> (Self, Device) {
        let mut driver = Self::load(&format!("soft=0 {parameters}"));
        let device = driver.bind(gpu);
        (driver, device)
    }

    /// Binds one of the GPUs, and opens its node.
    #[track_caller]
    pub fn bind(&mut self, gpu: &'static str) -> Device {
        self.try_bind(gpu)
            .unwrap_or_else(|errno| panic!("binding {gpu}: {errno}"));
        device_of(gpu)
    }

    /// Binds a PCI device. The error is that of the driver's probe.
    pub fn try_bind(&mut self, address: &'static str) -> Result<(), Errno> {
        allow(address, true);
        match write("/sys/bus/pci/drivers/hmm_gpu/bind", address) {
            Ok(()) => {
                self.bound.push(address);
                Ok(())
            }
            Err(errno) => {
                allow(address, false);
                Err(errno)
            }
        }
    }

    /// Unbinds one of the GPUs.
    #[track_caller]
    pub fn unbind(&mut self, gpu: &str) {
        self.bound.retain(|bound| *bound != gpu);
        write("/sys/bus/pci/drivers/hmm_gpu/unbind", gpu).unwrap();
        allow(gpu, false);
        assert!(!is_bound(gpu));
    }

    /// One of the GPUs is no longer there.
    pub fn lost(&mut self, gpu: &str) {
        self.bound.retain(|bound| *bound != gpu);
    }

    /// One of the GPUs is no longer there, and will not be again.
    pub fn lost_for_good(&mut self, gpu: &str) {
        self.lost(gpu);
        let others = self.iomem.lines().filter(|line| !line.ends_with(gpu));
        self.iomem = others.flat_map(|line| [line, "\n"]).collect();
    }

    /// `/proc/iomem` before the module was loaded.
    pub fn iomem_before(&self) -> &str {
        &self.iomem
    }

    /// Unloads the module, with its devices bound: their removal is its business.
    ///
    /// Fails with `EAGAIN` (and undoes nothing) while files are open.
    pub fn try_remove(&mut self) -> Result<(), Errno> {
        kernel::remove_module()?;
        self.removed = true;
        Ok(())
    }

    /// Ends it, and proves that nothing is left.
    #[track_caller]
    pub fn finish(mut self) {
        self.end();
    }

    #[track_caller]
    fn end(&mut self) {
        if !self.removed {
            for unit in Device::list() {
                let device = Device::open(unit).unwrap();
                assert_empty(&device);
                // Files are closed by now, or soon.
                eventually("no device page table is left", || {
                    counters(&device).table_pages == 0
                });
            }
        }
        for gpu in std::mem::take(&mut self.bound) {
            if self.removed {
                allow(gpu, false);
            } else {
                self.unbind(gpu);
            }
        }
        if !self.removed {
            // A process that is gone may still hold its file for a moment.
            eventually("the module can be unloaded", || {
                !matches!(kernel::remove_module(), Err(Errno::AGAIN | Errno::BUSY))
            });
            self.removed = true;
        }
        assert!(!kernel::is_loaded(), "the module is still there");
        assert_eq!(
            Device::list(),
            [] as [u32; 0],
            "device nodes are still there"
        );
        assert_eq!(
            kernel::iomem(),
            self.iomem,
            "/proc/iomem is not as it was before"
        );
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            if !self.removed {
                self.end();
            }
            return;
        }
        // The test has failed already. Clean up for the next one, as far as it goes.
        for gpu in std::mem::take(&mut self.bound) {
            let _ = write("/sys/bus/pci/drivers/hmm_gpu/unbind", gpu);
            allow(gpu, false);
        }
        for _ in 0..100 {
            if kernel::remove_module().is_ok() || !kernel::is_loaded() {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }
}

/// Asserts that a device has no page in VRAM but those of device page tables, now or soon (a process may be dying), and that what
/// it took it gave back.
#[track_caller]
pub fn assert_empty(device: &Device) -> Counters {
    let empty = |raw: &hmm_gpu_counters| raw.live_pages == raw.table_pages && add_up(raw);
    let mut raw = counters(device);
    for _ in 0..10_000 {
        if empty(&raw) {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(2));
        raw = counters(device);
    }
    assert!(
        empty(&raw),
        "{} has pages left in VRAM: {raw:#?}",
        device.path().display()
    );
    let description = device.describe().unwrap();
    assert_eq!(
        description.vram_free_bytes + raw.table_pages * PAGE as u64,
        description.vram_bytes,
        "VRAM is not all free"
    );
    device.counters().unwrap()
}

/// Whether the counters add up, as they do whenever nothing is under way: what was taken, what it was taken for, and what has become of
/// that; and what has become of device faults.
pub fn add_up(raw: &hmm_gpu_counters) -> bool {
    let there = raw.live_pages - raw.table_pages.min(raw.live_pages);
    let moved_away = raw.to_system_pages
        + raw.fault_back_pages
        + raw.pressure_pages
        + raw.evicted_pages
        + raw.to_other_pages;
    let serviced = raw.faults_in_device + raw.faults_in_system + raw.fault_failures;
    raw.allocated_pages == raw.freed_pages + raw.live_pages
        && raw.allocated_pages == raw.to_device_pages + raw.unused_pages + raw.table_pages_taken
        && moved_away + there <= raw.to_device_pages
        && raw.device_faults == serviced
        && raw.populated_pages + raw.from_other_pages <= raw.to_device_pages
        && raw.device_fault_pages <= raw.to_device_pages
        && raw.around_pages <= raw.fault_back_pages
        && 512 * raw.large_to_device <= raw.to_device_pages
}

/// What a device has done, as the driver's structure.
#[track_caller]
pub fn counters(device: &Device) -> hmm_gpu_counters {
    let mut answer = hmm_gpu_counters::default();
    device.file().counters(&mut answer).unwrap();
    answer
}

/// Opens the node of a GPU.
#[track_caller]
pub fn device_of(gpu: &str) -> Device {
    try_device_of(gpu).unwrap_or_else(|| panic!("no device node is that of {gpu}"))
}

/// Opens the node of a GPU, if it has one.
pub fn try_device_of(gpu: &str) -> Option<Device> {
    Device::list()
        .into_iter()
        .filter_map(|unit| Device::open(unit).ok())
        .find(|device| {
            let pci = device.describe().ok().and_then(|it| it.pci);
            pci.as_ref().map(PciAddress::to_string).as_deref() == Some(gpu)
        })
}

/// Whether a PCI device has our driver.
pub fn is_bound(address: &str) -> bool {
    fs::read_link(format!("/sys/bus/pci/devices/{address}/driver"))
        .is_ok_and(|driver| driver.ends_with("hmm_gpu"))
}

/// Runs a test on a device of each kind: soft, PCI with addresses that the kernel picked, and PCI with the BAR's own. On the checking
/// kernel on the first only, whose VRAM is memory that it watches: the kinds differ in where their bytes and their page map are, and
/// that is all. Tests that are not for each kind (`large`, `patches`, `table`, `teardown` and others) have the others there too.
///
/// Afterwards nothing is left in their VRAM.
pub fn on_each_kind(test: impl Fn(&Device)) {
    let run = |device: &Device| {
        println!("on {}", device.describe().unwrap());
        test(device);
        assert_empty(device);
    };
    let mut driver = Driver::load("soft=1 soft_mib=16");
    run(&Device::open(0).unwrap());
    if is_checking() {
        return driver.finish();
    }
    run(&driver.bind(GPUS[0]));
    driver.finish();
    let (driver, device) = Driver::load_with("add_resource=1", GPUS[2]);
    run(&device);
    drop(device);
    driver.finish();
}

/// Says whether a PCI device may be bound by our driver, which takes none by itself.
fn allow(address: &str, allowed: bool) {
    let name = if allowed { "hmm_gpu" } else { "\n" };
    write(
        &format!("/sys/bus/pci/devices/{address}/driver_override"),
        name,
    )
    .unwrap();
}

/// Writes to a file of `/sys`.
pub fn write(path: &str, text: &str) -> Result<(), Errno> {
    fs::write(path, text).map_err(|error| Errno::from_io_error(&error).unwrap())
}
