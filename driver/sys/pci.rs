// SPDX-License-Identifier: GPL-2.0

//! Memory BARs of PCI devices.

use crate::sys::{bindings, mapping::Mapping};
use core::ops::Deref;
use kernel::{device::Core, error::to_result, pci::Device, prelude::*, sync::aref::ARef};

/// Where a device is: domain, and bus << 8 | device << 3 | function.
pub(crate) fn address(pdev: &Device<Core<'_>>) -> (u32, u32) {
    // SAFETY: The device is valid.
    let domain = unsafe { bindings::hmm_gpu_pci_domain_nr(as_raw(pdev)) };
    // CAST: Domain numbers are not negative.
    (domain as u32, u32::from(pdev.dev_id()))
}

fn as_raw(pdev: &Device) -> *mut bindings::pci_dev {
    // CAST: `pci::Device` is a transparent wrapper of `struct pci_dev`.
    core::ptr::from_ref(pdev).cast_mut().cast()
}

/// The largest prefetchable memory BAR of a device: number, first physical address and bytes.
pub(crate) fn largest_prefetchable(pdev: &Device) -> Option<(u32, u64, u64)> {
    const WANTED: usize = (bindings::IORESOURCE_MEM | bindings::IORESOURCE_PREFETCH) as usize;

    (0..bindings::PCI_STD_NUM_BARS)
        .filter_map(|bar| {
            // CAST: Standard BARs are numbered 0 to 5.
            // SAFETY: The device is valid and so is the number.
            let flags = unsafe { bindings::hmm_gpu_pci_resource_flags(as_raw(pdev), bar as c_int) }
                as usize;
            let (start, len) = (pdev.resource_start(bar).ok()?, pdev.resource_len(bar).ok()?);
            (flags & WANTED == WANTED && start != 0 && len != 0).then_some((bar, start, len))
        })
        .max_by_key(|&(_, _, len)| len)
}

/// A requested BAR.
///
/// # Invariants
///
/// The BAR is requested (`pci_request_region`), which is this value's to undo.
struct Region {
    pdev: ARef<Device>,
    bar: c_int,
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: The device is valid, since it is referenced, and the region requested, by the
        // type invariants.
        unsafe { bindings::pci_release_region(as_raw(&self.pdev), self.bar) };
    }
}

/// A device whose memory BARs answer, and that is not reset: a reset would lose what is in them.
///
/// # Invariants
///
/// The device is enabled (`pci_enable_device_mem`), which is this value's to undo. `resets` are the
/// ways to reset it that have been taken from it.
pub(crate) struct Enabled {
    pdev: ARef<Device>,
    resets: [u8; bindings::PCI_NUM_RESET_METHODS as usize],
}

impl Enabled {
    /// Enables the memory BARs of a device, and has `pci_reset_function` refuse (`ENOTTY`).
    pub(crate) fn new(pdev: &Device<Core<'_>>) -> Result<Self> {
        pdev.enable_device_mem()?;
        let raw = as_raw(pdev);
        // SAFETY: The device is valid and locked, as it is being probed.
        let resets = unsafe { core::mem::take(&mut (*raw).reset_methods) };
        // INVARIANT: Just enabled, and taken.
        Ok(Self {
            pdev: pdev.into(),
            resets,
        })
    }
}

impl Drop for Enabled {
    fn drop(&mut self) {
        let raw = as_raw(&self.pdev);
        // SAFETY: The device is valid, since it is referenced, and locked, as it is being unbound
        // or its probe fails. It is enabled, by the type invariants.
        unsafe {
            // Not if somebody has chosen others meanwhile.
            if (*raw).reset_methods.first() == Some(&0) {
                (*raw).reset_methods = self.resets;
            }
            bindings::pci_disable_device(raw);
        }
    }
}

/// A memory BAR, requested and mapped.
///
/// It keeps the BAR from others until it is dropped, whether or not the device is still bound.
pub(crate) struct Bar {
    // Before the region, so that it is dropped first.
    mapping: Mapping,
    region: Region,
}

impl Bar {
    /// Requests prefetchable memory BAR `bar` and maps its first `len` bytes: write-combined, or as
    /// memory if it is `coherent`.
    ///
    /// Fails with `EINVAL` if it is no such BAR or is shorter, with `EBUSY` if somebody else has
    /// it, and with `ENOMEM`.
    pub(crate) fn new(pdev: &Device<Core<'_>>, bar: u32, len: u64, coherent: bool) -> Result<Self> {
        let (start, available) = (pdev.resource_start(bar)?, pdev.resource_len(bar)?);
        // CAST: `resource_start` accepts standard BARs only, 0 to 5.
        let bar = bar as c_int;
        // SAFETY: The device is valid and so is the number.
        let flags = unsafe { bindings::hmm_gpu_pci_resource_flags(as_raw(pdev), bar) } as usize;
        if flags & bindings::IORESOURCE_PREFETCH as usize == 0 || len > available {
            return Err(EINVAL);
        }
        // SAFETY: The device is bound.
        to_result(unsafe {
            bindings::pci_request_region(as_raw(pdev), bar, c"hmm_gpu".as_char_ptr())
        })?;
        // INVARIANT: Just requested.
        let region = Region {
            pdev: pdev.into(),
            bar,
        };
        // SAFETY: The BAR is prefetchable memory, requested until `region` is dropped, which is
        // after the mapping is.
        let mapping = unsafe { Mapping::bar(start, usize::try_from(len)?, coherent)? };
        Ok(Self { mapping, region })
    }
}

impl Bar {
    /// Whether the device is still there (`pci_device_is_present`): asks it.
    pub(crate) fn is_present(&self) -> bool {
        // SAFETY: The device is valid, since it is referenced.
        unsafe { bindings::hmm_gpu_pci_device_is_present(as_raw(&self.region.pdev)) }
    }
}

impl Deref for Bar {
    type Target = Mapping;

    fn deref(&self) -> &Mapping {
        &self.mapping
    }
}
