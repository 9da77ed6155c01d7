// SPDX-License-Identifier: GPL-2.0

//! Which pages of VRAM are in use, and in which pool.
//!
//! The kernel's `GpuBuddy` hands out blocks of 2 MiB, and within them a bitmap hands out pages.
//! Blocks that were taken stay with the bitmap, whose empty ones are used first. They are of the shared pool,
//! until they are given to a private one. The buddy has a
//! mutex; the bitmap has a spinlock that is taken with interrupts off, since pages are given back
//! under page table locks. Lock order: none of the two is taken with the other held.

#![forbid(unsafe_code)]

use crate::{
    bitmap::{Blocks, BLOCK_PAGES, SHARED},
    usage::{Taker, Usage},
};
use core::ops::Range;
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

        let (mut got, mut beside_nodes) = (0, false);
        while let Some(piece) = indices.get_mut(got..).filter(|rest| !rest.is_empty()) {
            let want = piece.len().min(PIECE);
            let piece = piece.get_mut(..want).unwrap_or_default();
            let taken = if taker.is_table() {
                self.take_node(taker.pool(), piece)
            } else {
                self.blocks
                    .lock()
                    .take(taker.pool(), order, beside_nodes, piece)
            };
            got += taken;
            if taken < want && (taker.pool() != SHARED || self.grow().is_err()) {
                if beside_nodes || taker.is_table() {
                    break;
                }
                beside_nodes = true;
            }
        }
        // What follows on one another in a block, as most do, is counted together.
        let follows =
            |&a: &u32, &b: &u32| b.wrapping_sub(a) == 1 << order && b % BLOCK_PAGES as u32 != 0;
        for run in indices.get(..got).unwrap_or_default().chunk_by(follows) {
            if let Some(&first) = run.first() {
                // CAST: The index of a page fits in a word.
                self.usage.took(taker, first as usize, run.len() << order);
            }
        }
        got
    }

    fn take_node(&self, pool: u16, indices: &mut [u32]) -> usize {
        let mut blocks = self.blocks.lock();
        let mut nodes = indices.iter_mut().map_while(|index| {
            *index = blocks.take_node(pool)?;
            Some(())
        });
        nodes.by_ref().count()
    }

    /// Takes one more block from the buddy.
    fn grow(&self) -> Result {
        self.take_block(GpuBuddyAllocMode::Simple)
    }

    fn take_block(&self, mode: GpuBuddyAllocMode) -> Result {
        let block = KBox::pin_init(
            self.buddy.alloc_blocks(
                mode,
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

    /// Has `count` blocks in a row be those of private pool `pool`, which has none, and returns the first. Pages may be in
    /// use there still, which can move; from now on no more come.
    ///
    /// Fails with `ENOSPC` if there are no such blocks, and with `ENOMEM`.
    pub(crate) fn give(&self, pool: u16, count: usize) -> Result<usize> {
        // Others may be faster to take a block, or to put a device page table where there was none.
        const ATTEMPTS: usize = 8;

        let mut room = KVVec::with_capacity(count, GFP_KERNEL)?;
        for _ in 0..ATTEMPTS {
            let first = self.emptiest_run(count)?.ok_or(ENOSPC)?;
            for block in first..first + count {
                if self.blocks.lock().is_here(block) {
                    continue;
                }
                // CAST: Widens.
                let start = block as u64 * BLOCK_BYTES;
                // If it is not to be had, it has just been taken, and will be here.
                let _ = self.take_block(GpuBuddyAllocMode::Range(start..start + BLOCK_BYTES));
            }
            let given = self.blocks.lock().give(first, count, pool, room);
            match given {
                Ok(()) => {
                    (first..first + count).for_each(|block| self.usage.move_block(block, pool));
                    return Ok(first);
                }
                Err(back) => room = back,
            }
        }
        Err(ENOSPC)
    }

    /// Where `count` blocks in a row begin that are of the shared pool, have no device page tables, and have as few pages as
    /// any such in use.
    fn emptiest_run(&self, count: usize) -> Result<Option<usize>> {
        let blocks = self.pages / BLOCK_PAGES;
        let mut costs = KVVec::with_capacity(blocks, GFP_KERNEL)?;
        for block in 0..blocks {
            let used = self.blocks.lock().used_of_block(block);
            // What moves is counted a moment later.
            let fits = self.usage.pool_of(block * BLOCK_PAGES) == SHARED
                && used <= self.usage.movable(block);
            costs.push(fits.then_some(used), GFP_KERNEL)?;
        }
        let runs = costs.windows(count).enumerate();
        let runs = runs
            .filter_map(|(first, run)| Some((run.iter().copied().sum::<Option<usize>>()?, first)));
        Ok(runs.min().map(|(_, first)| first))
    }

    /// Has block `block` of a private pool be one of the shared pool, with what is in use of it. `zero` is given the pages that
    /// are not, by their index, before they can be taken.
    pub(crate) fn take_back(&self, block: usize, mut zero: impl FnMut(usize)) {
        self.release_block(block);
        let free = self.blocks.lock().take_all(block);
        for (i, word) in free.iter().enumerate() {
            // CAST: Widens.
            let bits = u64::BITS as usize;
            (0..bits)
                .filter(|bit| word >> bit & 1 != 0)
                .for_each(|bit| zero(block * BLOCK_PAGES + i * bits + bit));
        }
        // Before they can be taken.
        self.usage.move_block(block, SHARED);
        let mut blocks = self.blocks.lock();
        blocks.take_back(block);
        blocks.put_all(block, &free);
    }

    /// From now on, or no more: pages that are given back to `pool`, whose blocks these are, are not taken again.
    pub(crate) fn hold(&self, pool: u16, blocks: Range<usize>, holds: bool) {
        self.blocks.lock().set_holds(pool, holds);
        if !holds {
            blocks.for_each(|block| self.release_block(block));
        }
    }

    fn release_block(&self, block: usize) {
        self.blocks.lock().release(block);
    }

    /// How many pages of `pool` are in use, or held back.
    pub(crate) fn used_in(&self, pool: u16) -> usize {
        self.blocks.lock().used_in(pool)
    }

    /// How many are held back.
    pub(crate) fn held_in(&self, pool: u16) -> usize {
        self.blocks.lock().held_in(pool)
    }

    /// How many pages of `pool` can be taken.
    pub(crate) fn free_in(&self, pool: u16) -> usize {
        self.blocks.lock().free_in(pool)
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
