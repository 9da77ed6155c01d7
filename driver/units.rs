// SPDX-License-Identifier: GPL-2.0

//! The numbers of the devices, the N of `/dev/hmm_gpuN`, and which of them a page belongs to.

#![forbid(unsafe_code)]

use crate::uapi::HMM_GPU_MAX_DEVICES;
use kernel::{
    prelude::*,
    sync::atomic::{Atomic, Full, Relaxed},
};

struct Slot {
    taken: Atomic<bool>,
    first_pfn: Atomic<usize>,
    end_pfn: Atomic<usize>,
}

static SLOTS: [Slot; HMM_GPU_MAX_DEVICES as usize] = [const {
    Slot {
        taken: Atomic::new(false),
        first_pfn: Atomic::new(0),
        end_pfn: Atomic::new(0),
    }
}; HMM_GPU_MAX_DEVICES as usize];

macro_rules! names {
    ($($n:literal)*) => { [$(kernel::c_str!(concat!("hmm_gpu", $n))),*] };
}

// A misc device wants a name that lives for ever.
static NAMES: [&CStr; HMM_GPU_MAX_DEVICES as usize] =
    names!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31);

/// The number of a device, taken until this is dropped.
pub(crate) struct Unit {
    number: usize,
}

impl Unit {
    /// Takes the lowest number that is free. Fails with `ENOSPC`.
    pub(crate) fn take() -> Result<Self> {
        let number = SLOTS
            .iter()
            .position(|slot| slot.taken.cmpxchg(false, true, Full).is_ok())
            .ok_or_else(|| {
                pr_err!(
                    "no device number is free: all {} are taken\n",
                    HMM_GPU_MAX_DEVICES
                );
                ENOSPC
            })?;
        Ok(Self { number })
    }

    /// The number.
    pub(crate) fn number(&self) -> u32 {
        // CAST: Less than `HMM_GPU_MAX_DEVICES`.
        self.number as u32
    }

    /// The name of the device node.
    pub(crate) fn name(&self) -> &'static CStr {
        NAMES.get(self.number).copied().unwrap_or_default()
    }

    /// Says which page frame numbers the device's pages have.
    pub(crate) fn set_pages(&self, first_pfn: usize, pages: usize) {
        if let Some(slot) = SLOTS.get(self.number) {
            slot.first_pfn.store(first_pfn, Relaxed);
            slot.end_pfn.store(first_pfn + pages, Relaxed);
        }
    }
}

impl Drop for Unit {
    fn drop(&mut self) {
        self.set_pages(0, 0);
        if let Some(slot) = SLOTS.get(self.number) {
            slot.taken.xchg(false, Full);
        }
    }
}

/// The number of the device that has page `pfn`, if any has. True at one moment.
pub(crate) fn of_pfn(pfn: usize) -> Option<usize> {
    SLOTS
        .iter()
        .position(|slot| (slot.first_pfn.load(Relaxed)..slot.end_pfn.load(Relaxed)).contains(&pfn))
}
