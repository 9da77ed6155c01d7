// SPDX-License-Identifier: GPL-2.0

//! Free VRAM is filled with a pattern, in kernels that have KASAN, which does not watch VRAM: who
//! reads it shows in what is read, and who writes to it when it is taken into use again.

#![forbid(unsafe_code)]

use crate::{hmm::PAGE_BYTES, sys::mapping::Mapping, vram::Vram};
use kernel::{
    prelude::*,
    sync::atomic::{Atomic, Relaxed},
};

const WORD: u64 = u64::from_ne_bytes([0xa5; 8]);

/// Which pages have been filled.
pub(crate) struct Poison {
    filled: KVVec<Atomic<bool>>,
}

impl Poison {
    /// For VRAM of so many pages, of which none has been.
    pub(crate) fn new(pages: usize) -> Result<Self> {
        let mut filled = KVVec::with_capacity(pages, GFP_KERNEL)?;
        for _ in 0..pages {
            filled.push(Atomic::new(false), GFP_KERNEL)?;
        }
        Ok(Self { filled })
    }

    /// None has been, as far as is known.
    pub(crate) fn forget(&self) {
        self.filled
            .iter()
            .for_each(|filled| filled.store(false, Relaxed));
    }

    /// Everything that is free must be as it was left, on device `unit`.
    pub(crate) fn check_all(&self, vram: &Vram, unit: u32) {
        for page in 0..self.filled.len() {
            self.check(vram, unit, page, 0);
        }
    }

    fn pages(&self, index: usize, order: u32) -> impl Iterator<Item = (usize, &Atomic<bool>)> {
        self.filled.iter().enumerate().skip(index).take(1 << order)
    }

    /// The `1 << order` pages from `index` on are free from now on.
    pub(crate) fn put(&self, vram: &Mapping, index: usize, order: u32) {
        for (page, filled) in self.pages(index, order) {
            for offset in (0..PAGE_BYTES).step_by(size_of::<u64>()) {
                // Inside, so it cannot fail.
                let _ = vram.write_u64(page * PAGE_BYTES + offset, WORD);
            }
            filled.store(true, Relaxed);
        }
    }

    /// The `1 << order` pages from `index` on, of device `unit`, are no longer free: they must be as
    /// they were left. A device that is gone has none.
    pub(crate) fn check(&self, vram: &Vram, unit: u32, index: usize, order: u32) {
        for (page, filled) in self.pages(index, order) {
            if !filled.load(Relaxed) {
                continue;
            }
            filled.store(false, Relaxed);
            for offset in (0..PAGE_BYTES).step_by(size_of::<u64>()) {
                let place = page * PAGE_BYTES + offset;
                if let Ok(found) = vram.read_u64(place) {
                    if found != WORD {
                        if vram.is_gone() {
                            return;
                        }
                        pr_err!(
                            "BUG: hmm_gpu{}: VRAM at {:#x} was written to while it was free: {:#x}\n",
                            unit,
                            place,
                            found
                        );
                        break;
                    }
                }
            }
        }
    }
}
