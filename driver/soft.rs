// SPDX-License-Identifier: GPL-2.0

//! Soft devices: system memory that stands in for VRAM, for hosts with no GPU to spare.

#![forbid(unsafe_code)]

use crate::{
    alloc::BLOCK_BYTES,
    dmirror,
    gpu::Gpu,
    hmm::pagemap::{Form, Kind},
    sys::mapping::Mapping,
    units::Unit,
    vram::Vram,
};
use kernel::{faux, prelude::*};

/// A soft device. It owns the faux device that its pages are registered for.
pub(crate) type SoftGpu = Gpu<faux::Registration>;

/// Makes one with `bytes` of VRAM, a multiple of [`BLOCK_BYTES`].
fn new(bytes: u64, form: Form, dmirror: Option<dmirror::Unit>) -> Result<SoftGpu> {
    let unit = Unit::take()?;
    let host = faux::Registration::new(unit.name(), None)?;
    let vram = Vram::Soft(Mapping::system(usize::try_from(bytes)?)?);
    Gpu::new(unit, host, form, (0, 0), vram, dmirror)
}

/// Makes `count` of them, each with `mib` MiB of VRAM. They are not published.
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
    // An endpoint's tests want two.
    let dmirror = *crate::module_parameters::dmirror.value_ref();
    let count = if dmirror && count == 1 { 2 } else { count };
    for _ in 0..count {
        // Its memory is not a device's, so it cannot be coherent.
        let dmirror = dmirror::Unit::take().filter(|unit| unit.kind() == Kind::Private);
        devices.push(new(bytes, Form::Add, dmirror)?, GFP_KERNEL)?;
    }
    Ok(devices)
}

/// Makes one whose pages have the 2 MiB of physical addresses from `start` on, and takes it down
/// again: what is System RAM must be refused.
pub(crate) fn offer(start: u64) -> Result {
    new(BLOCK_BYTES, Form::AddResource { start }, None).map(drop)
}

/// Publishes what [`devices`] has made. It cannot fail, since a module must not once somebody may
/// have opened a node of it: a device that has no node is said in the log, and given up.
pub(crate) fn publish(devices: &mut KVec<SoftGpu>) {
    let mut published = KVec::new();
    for device in core::mem::take(devices) {
        let result = device
            .publish()
            .and_then(|device| Ok(published.push(device, GFP_KERNEL)?));
        if let Err(error) = result {
            pr_err!("a soft device has no node: {:?}\n", error);
        }
    }
    *devices = published;
}
