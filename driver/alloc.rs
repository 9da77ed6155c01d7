// SPDX-License-Identifier: GPL-2.0

//! Which pages of VRAM are in use.
//!
//! The kernel's `GpuBuddy` hands out blocks of 2 MiB, and within them a bitmap hands out pages.
//! Blocks that were taken stay with the bitmap, whose empty ones are used first. The buddy has a
//! mutex; the bitmap has a spinlock that is taken with interrupts off, since pages are given back
//! under page table locks. Lock order: none of the two is taken with the other held.

#![forbid(unsafe_code)]

use crate::{
    bitmap::{Blocks, BLOCK_PAGES},
    usage::{Taker, Usage},
};
use kernel::{
    gpu::buddy::{
        AllocatedBlocks, GpuBuddy, GpuBuddyAllocFlags, GpuBuddyAllocMode, GpuBuddyParams,
    },
    new_mutex, new_spinlock_irq,
    prelude::*,
    ptr::Alignment,
    sizes::SZ_2M,
    sync::{Mutex, SpinLockIrq},
};

/// Bytes of a block.
pub(crate) const BLOCK_BYTES: u64 = SZ_2M as u64;

const _: () = assert!(BLOCK_PAGES * crate::hmm::PAGE_BYTES == SZ_2M);

/// Hands out pages of VRAM, each to one at a time.
#[pin_data]
pub(crate) struct Allocator {
    #[pin]
    blocks: SpinLockIrq<Blocks>,
    // Dropped before the buddy they are from.
    #[pin]
    taken: Mutex<KVVec<Pin<KBox<AllocatedBlocks>>>>,
    buddy: GpuBuddy,
    usage: Usage,
    pages: usize,
}

impl Allocator {
    /// For VRAM of `bytes`, a multiple of [`BLOCK_BYTES`], of which all is free.
    pub(crate) fn new(bytes: u64) -> Result<impl PinInit<Self, Error>> {
        let count = usize::try_from(bytes / BLOCK_BYTES)?;
        let buddy = GpuBuddy::new(GpuBuddyParams {
            base_offset: 0,
            size: bytes,
            chunk_size: Alignment::new::<SZ_2M>(),
        })?;
        let taken = KVVec::with_capacity(count, GFP_KERNEL)?;
        let blocks = Blocks::new(count)?;
        let usage = Usage::new(count)?;
        Ok(try_pin_init!(Self {
            blocks <- new_spinlock_irq!(blocks),
            taken <- new_mutex!(taken),
            buddy,
            usage,
            pages: count * BLOCK_PAGES,
        }))
    }

    /// Takes folios of `1 << order` pages: writes the index of the first page of each to `indices`,
    /// and returns how many there were. Fewer than asked for means that there is no more room.
    pub(crate) fn take(&self, taker: Taker, order: u32, indices: &mut [u32]) -> usize {
        // In pieces, so that interrupts are not off for long.
        const PIECE: usize = 64;

        let mut got = 0;
        while let Some(piece) = indices.get_mut(got..).filter(|rest| !rest.is_empty()) {
            let want = piece.len().min(PIECE);
            let piece = piece.get_mut(..want).unwrap_or_default();
            let taken = self.blocks.lock().take(order, piece);
            got += taken;
            if taken < want && self.grow().is_err() {
                break;
            }
        }
        for &index in indices.iter().take(got) {
            // CAST: The index of a page fits in a word.
            self.usage.took(taker, index as usize, order);
        }
        got
    }

    /// Takes one more block from the buddy.
    fn grow(&self) -> Result {
        let block = KBox::pin_init(
            self.buddy.alloc_blocks(
                GpuBuddyAllocMode::Simple,
                BLOCK_BYTES,
                Alignment::new::<SZ_2M>(),
                GpuBuddyAllocFlags::default(),
            ),
            GFP_KERNEL,
        )?;
        let index = block
            .iter()
            .next()
            .map(|block| block.offset() / BLOCK_BYTES)
            .ok_or(ENOSPC)?;
        self.taken.lock().push(block, GFP_KERNEL)?;
        self.blocks.lock().add(usize::try_from(index)?);
        Ok(())
    }

    /// Gives back the `1 << order` pages from `index` on. Does not sleep.
    pub(crate) fn give_back(&self, index: usize, order: u32) {
        // Before they can be taken again.
        self.usage.gave_back(index, order);
        self.blocks.lock().give_back(index, order);
    }

    /// The blocks that were ever in use, by their offset in bytes.
    pub(crate) fn for_each_block(&self, mut visit: impl FnMut(u64)) {
        for blocks in self.taken.lock().iter() {
            blocks.iter().for_each(|block| visit(block.offset()));
        }
    }

    /// Who has how much, and when it was used last.
    pub(crate) fn usage(&self) -> &Usage {
        &self.usage
    }

    /// How many pages there are.
    pub(crate) fn pages(&self) -> usize {
        self.pages
    }

    /// How many of them are in use.
    pub(crate) fn used(&self) -> usize {
        self.blocks.lock().used()
    }

    /// How many are not.
    pub(crate) fn free(&self) -> usize {
        self.pages - self.used()
    }
}
