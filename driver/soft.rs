// SPDX-License-Identifier: GPL-2.0

//! Soft devices: system memory that stands in for VRAM, for hosts with no GPU to spare.

#![forbid(unsafe_code)]

use crate::{
    alloc::BLOCK_BYTES, gpu::Gpu, hmm::pagemap::Form, sys::mapping::Mapping, units::Unit,
    vram::Vram,
};
use kernel::{
    device::{Bound, Device},
    faux,
    prelude::*,
};

/// The faux device that a soft device's pages are registered for.
struct Host(faux::Registration);

impl AsRef<Device<Bound>> for Host {
    fn as_ref(&self) -> &Device<Bound> {
        let device: &faux::Device<Bound> = self.0.as_ref();
        device.as_ref()
    }
}

/// A soft device.
pub(crate) struct SoftGpu(
    #[expect(dead_code, reason = "dropping it is what it is for")] Pin<KBox<Gpu<Host>>>,
);

impl SoftGpu {
    /// Makes one with `bytes` of VRAM, a multiple of [`BLOCK_BYTES`].
    fn new(bytes: u64, form: Form) -> Result<Self> {
        let unit = Unit::take()?;
        let host = Host(faux::Registration::new(unit.name(), None)?);
        let vram = Vram::Soft(Mapping::system(usize::try_from(bytes)?)?);
        let gpu = Gpu::new(unit, host, form, (0, 0), vram)?;
        Ok(Self(KBox::try_pin_init(gpu, GFP_KERNEL)?))
    }
}

/// Makes `count` of them, each with `mib` MiB of VRAM.
pub(crate) fn devices(count: u32, mib: u32) -> Result<KVec<SoftGpu>> {
    let bytes = u64::from(mib) << 20;
    if bytes == 0 || bytes % BLOCK_BYTES != 0 {
        pr_err!(
            "soft_mib={}: want a multiple of {}, not 0\n",
            mib,
            BLOCK_BYTES >> 20
        );
        return Err(EINVAL);
    }
    let mut devices = KVec::new();
    for _ in 0..count {
        devices.push(SoftGpu::new(bytes, Form::Add)?, GFP_KERNEL)?;
    }
    Ok(devices)
}

/// Makes one whose pages have the 2 MiB of physical addresses from `start` on, and takes it down
/// again: what is System RAM must be refused.
pub(crate) fn offer(start: u64) -> Result {
    SoftGpu::new(BLOCK_BYTES, Form::AddResource { start }).map(drop)
}
