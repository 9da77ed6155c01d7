// SPDX-License-Identifier: GPL-2.0

//! Soft devices: system memory that stands in for VRAM, for hosts with no GPU to spare.

#![forbid(unsafe_code)]

use crate::{alloc::BLOCK_BYTES, gpu::Gpu, hmm::pagemap::Form, sys::mapping::Mapping, vram::Vram};
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
    /// Makes one with `mib` MiB of VRAM, a multiple of 2.
    pub(crate) fn new(mib: u32) -> Result<Self> {
        let bytes = u64::from(mib) << 20;
        if bytes == 0 || bytes % BLOCK_BYTES != 0 {
            pr_err!(
                "soft_mib={}: want a multiple of {}, not 0\n",
                mib,
                BLOCK_BYTES >> 20
            );
            return Err(EINVAL);
        }
        let host = Host(faux::Registration::new(c"hmm_gpu_soft", None)?);
        let vram = Vram::Soft(Mapping::system(usize::try_from(bytes)?)?);
        let gpu = Gpu::new(host, Form::Add, (0, 0), vram)?;
        Ok(Self(KBox::try_pin_init(gpu, GFP_KERNEL)?))
    }
}

/// Makes `count` of them.
pub(crate) fn devices(count: u32, mib: u32) -> Result<KVec<SoftGpu>> {
    let mut devices = KVec::new();
    for _ in 0..count {
        devices.push(SoftGpu::new(mib)?, GFP_KERNEL)?;
    }
    Ok(devices)
}

/// Offers the 2 MiB at physical address `start` as a device's own memory, without making anything
/// of it: what is System RAM must be refused.
pub(crate) fn offer(start: u64) -> Result {
    let host = Host(faux::Registration::new(c"hmm_gpu_offer", None)?);
    crate::hmm::pagemap::check_range(host.as_ref(), start, BLOCK_BYTES)
}
