// SPDX-License-Identifier: GPL-2.0

//! Many device faults at a time: `FAULT`.

#![forbid(unsafe_code)]

use crate::{
    hmm::{mirror::Access, PAGE_BYTES},
    service::{Page, Service, WINDOW},
    sys::sort::sort_pairs,
    uapi::{self, hmm_gpu_device_fault, HMM_GPU_PAGE_BYTES},
};
use kernel::prelude::*;

/// Device faults that are serviced together.
pub(crate) struct Batch<'b> {
    faults: &'b mut [hmm_gpu_device_fault],
    /// Page number and index of each, sorted.
    order: KVVec<[u64; 2]>,
    /// Pages that were mapped.
    pub(crate) mapped: usize,
    /// Those of them that are in the device's memory.
    pub(crate) device: usize,
    /// Pages that were not.
    pub(crate) failed: usize,
}

impl<'b> Batch<'b> {
    /// Sorts the faults. Fails with `EINVAL` if one wants what there is not.
    pub(crate) fn new(faults: &'b mut [hmm_gpu_device_fault]) -> Result<Self> {
        let mut order = KVVec::with_capacity(faults.len(), GFP_KERNEL_ACCOUNT)?;
        for (i, fault) in (0u64..).zip(faults.iter_mut()) {
            access_of(fault)?;
            fault.status = kernel::bindings::ECANCELED;
            order.push([fault.addr / HMM_GPU_PAGE_BYTES, i], GFP_KERNEL_ACCOUNT)?;
        }
        sort_pairs(&mut order);
        Ok(Self {
            faults,
            order,
            mapped: 0,
            device: 0,
            failed: 0,
        })
    }

    /// Services them, a window at a time, and writes the status of each.
    pub(crate) fn run(&mut self, service: &mut Service<'_>) -> Result {
        let mut rest: &[[u64; 2]] = &self.order;
        while let Some([page, _]) = rest.first() {
            // CAST: Widens.
            let first = page / WINDOW as u64 * WINDOW as u64;
            let count = rest.partition_point(|[page, _]| page - first < WINDOW as u64);
            let (these, others) = rest.split_at_checked(count).ok_or(EINVAL)?;
            rest = others;
            // CAST: All lossless: less than `WINDOW`, and an index into a slice.
            let places = || {
                these
                    .iter()
                    .map(|[page, i]| ((page - first) as usize, *i as usize))
            };

            service
                .window
                .iter_mut()
                .for_each(|page| *page = Page::Idle);
            for (place, i) in places() {
                let access = access_of(self.faults.get(i).ok_or(EINVAL)?)?;
                let page = service.window.get_mut(place).ok_or(EINVAL)?;
                if *page != Page::Wanted(Access::Write) {
                    *page = Page::Wanted(access);
                }
            }
            // CAST: A word. The number came from an address.
            let result = service.run(first as usize * PAGE_BYTES);
            for (place, i) in places() {
                if let Some(fault) = self.faults.get_mut(i) {
                    match service.window.get(place) {
                        Some(Page::Mapped { .. }) => fault.status = 0,
                        // CAST: An error is a negative number.
                        Some(Page::Failed(error)) => fault.status = error.to_errno().unsigned_abs(),
                        _ => (),
                    }
                }
            }
            for page in service.window.iter() {
                match page {
                    Page::Mapped { device } => {
                        self.mapped += 1;
                        self.device += usize::from(*device);
                    }
                    Page::Failed(_) | Page::Wanted(_) => self.failed += 1,
                    Page::Idle => (),
                }
            }
            result?;
        }
        Ok(())
    }
}

/// What a fault wants its page for.
fn access_of(fault: &hmm_gpu_device_fault) -> Result<Access> {
    match fault.access {
        uapi::HMM_GPU_ACCESS_READ => Ok(Access::Read),
        uapi::HMM_GPU_ACCESS_WRITE => Ok(Access::Write),
        _ => Err(EINVAL),
    }
}
