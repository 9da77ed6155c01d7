// SPDX-License-Identifier: GPL-2.0

//! The PCI driver. It binds a device only when told to, through `driver_override`.

#![forbid(unsafe_code)]

use crate::{
    alloc::BLOCK_BYTES,
    dmirror,
    gpu::{Gpu, Step},
    hmm::pagemap::{Form, Kind},
    sleep::Sleepy,
    sys::{
        pci::{address, largest_prefetchable, Bar, Enabled},
        sleep::SleepNotifier,
    },
    units::Unit,
    vram::Vram,
};
use kernel::{
    device::{Bound, Core},
    pci,
    prelude::*,
};

/// The PCI driver.
pub(crate) struct Driver;

kernel::pci_device_table!(
    NO_DEVICE,
    <Driver as pci::Driver>::IdInfo,
    // So that no device is taken by surprise.
    []
);

/// A bound device.
pub(crate) struct PciGpu<'bound> {
    // Dropped before the memory that it lets sleep.
    _sleep: Pin<KBox<SleepNotifier<Sleepy>>>,
    _gpu: Gpu<&'bound pci::Device<Bound>>,
    // Dropped after all that uses the BAR.
    _enabled: Enabled,
}

impl pci::Driver for Driver {
    type IdInfo = ();
    type Data<'bound> = PciGpu<'bound>;

    const ID_TABLE: pci::IdTable<Self::IdInfo> = &NO_DEVICE;

    fn probe<'bound>(
        pdev: &'bound pci::Device<Core<'_>>,
        _info: Option<&'bound Self::IdInfo>,
    ) -> impl PinInit<Self::Data<'bound>, Error> + 'bound {
        PciGpu::new(pdev)
    }
}

impl<'bound> PciGpu<'bound> {
    fn new(pdev: &'bound pci::Device<Core<'_>>) -> Result<Self> {
        let enabled = Enabled::new(pdev)?;
        crate::fail_after(Step::Enable)?;
        let gpu = new_gpu(pdev)?;
        let gate = gpu.gate().clone();
        Ok(Self {
            _sleep: KBox::try_pin_init(SleepNotifier::new(Sleepy { gate }), GFP_KERNEL)?,
            _gpu: gpu,
            _enabled: enabled,
        })
    }
}

/// Whether the BAR of a device is memory like any other: those of QEMU's that are, for nothing tells it
/// of hardware.
fn is_coherent(pdev: &pci::Device) -> bool {
    const BOCHS_DISPLAY: (u16, u16) = (0x1234, 0x1111);
    const IVSHMEM: (u16, u16) = (0x1af4, 0x1110);

    [BOCHS_DISPLAY, IVSHMEM].contains(&(pdev.vendor_id().as_raw(), pdev.device_id()))
}

fn new_gpu<'bound>(pdev: &'bound pci::Device<Core<'_>>) -> Result<Gpu<&'bound pci::Device<Bound>>> {
    let Some((bar, start, len)) = largest_prefetchable(pdev) else {
        dev_err!(
            pdev,
            "no usable VRAM: the device has no prefetchable memory BAR that was given addresses\n"
        );
        return Err(ENODEV);
    };
    let bytes = len / BLOCK_BYTES * BLOCK_BYTES;
    if bytes == 0 {
        dev_err!(
            pdev,
            "no usable VRAM: BAR {} has {} KiB, less than 2 MiB\n",
            bar,
            len >> 10
        );
        return Err(ENODEV);
    }
    crate::fail_after(Step::FindBar)?;
    let dmirror = dmirror::Unit::take();
    let coherent = dmirror
        .as_ref()
        .is_some_and(|unit| unit.kind() == Kind::Coherent);
    if coherent && !is_coherent(pdev) {
        dev_err!(
            pdev,
            "dmirror=1: the third and fourth device become device-coherent memory, and device {:04x}:{:04x} is not known to be coherent with the CPU's caches\n",
            pdev.vendor_id().as_raw(),
            pdev.device_id()
        );
        return Err(EOPNOTSUPP);
    }
    let mapping = Bar::new(pdev, bar, bytes, coherent).inspect_err(|error| {
        dev_err!(
            pdev,
            "cannot have BAR {} ({} MiB at {:#x}): {:?}\n",
            bar,
            len >> 20,
            start,
            error
        );
    })?;
    crate::fail_after(Step::MapBar)?;
    let vram = Vram::Pci(mapping);
    if let Err((offset, found)) = vram.check()? {
        dev_err!(
            pdev,
            "no usable VRAM: BAR {} does not keep what is written to it ({:#x} read back at offset {:#x})\n",
            bar,
            found,
            offset
        );
        return Err(EIO);
    }
    crate::fail_after(Step::Check)?;
    let form = match coherent || *crate::module_parameters::add_resource.value_ref() {
        true => Form::AddResource { start },
        false => Form::Add,
    };
    let device: &'bound pci::Device<Bound> = pdev;
    Gpu::new(Unit::take()?, device, form, address(pdev), vram, dmirror)?.publish()
}
