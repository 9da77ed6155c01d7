// SPDX-License-Identifier: GPL-2.0

//! The numbers of the devices, the N of `/dev/hmm_gpuN`, and which of them a page belongs to.

#![forbid(unsafe_code)]

use crate::{bitmap::BLOCK_PAGES, uapi::HMM_GPU_MAX_DEVICES};
use kernel::{
    prelude::*,
    sync::atomic::{Atomic, Full, Relaxed},
};

/// A number that is taken or not, and the pages of the device that has it.
struct Slot {
    taken: Atomic<bool>,
    /// First block of 2 MiB << 32 | number of blocks: one word, so that it is read whole.
    pages: Atomic<u64>,
}

static SLOTS: [Slot; HMM_GPU_MAX_DEVICES as usize] = [const {
    Slot {
        taken: Atomic::new(false),
        pages: Atomic::new(0),
    }
}; HMM_GPU_MAX_DEVICES as usize];

/// So many slots, from the first on, may have had pages: the others are not looked at. Numbers are the lowest that are free, so these are few.
static KNOWN: Atomic<usize> = Atomic::new(0);

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

    /// Says which page frame numbers the device's pages have. They are whole blocks.
    pub(crate) fn set_pages(&self, first_pfn: usize, pages: usize) {
        if let Some(slot) = SLOTS.get(self.number) {
            // CAST: Widens. A physical address has 52 bits at most, so a block's number has 31.
            let blocks = |pages: usize| (pages / BLOCK_PAGES) as u64;
            slot.pages
                .store(blocks(first_pfn) << 32 | blocks(pages), Relaxed);
            let mut known = KNOWN.load(Relaxed);
            while known <= self.number {
                known = match KNOWN.cmpxchg(known, self.number + 1, Full) {
                    Ok(_) => break,
                    Err(now) => now,
                };
            }
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
    // CAST: Widens.
    let block = (pfn / BLOCK_PAGES) as u64;
    SLOTS.iter().take(KNOWN.load(Relaxed)).position(|slot| {
        let pages = slot.pages.load(Relaxed);
        let first = pages >> 32;
        (first..first + (pages & u64::from(u32::MAX))).contains(&block)
    })
}
