// SPDX-License-Identifier: GPL-2.0

//! Pages within blocks of 2 MiB: which are in use. Plain logic, without locks.

#![forbid(unsafe_code)]

use kernel::prelude::*;

/// Pages of a block.
pub(crate) const BLOCK_PAGES: usize = 512;

const WORD_BITS: usize = u64::BITS as usize;
const WORDS: usize = BLOCK_PAGES / WORD_BITS;

/// One block.
#[derive(Default)]
struct Block {
    /// A bit for each page that is in use.
    in_use: [u64; WORDS],
    /// How many those are.
    count: usize,
    /// The block was added, and its pages can be taken.
    here: bool,
    /// The block is in [`Blocks::available`].
    listed: bool,
}

impl Block {
    /// Takes a run of `1 << order` free pages, aligned to its size.
    fn take(&mut self, order: u32) -> Option<usize> {
        let run = 1usize << order;
        let start = if run == BLOCK_PAGES {
            (self.count == 0).then_some(0)
        } else if run >= WORD_BITS {
            let words = run / WORD_BITS;
            let mut groups = self.in_use.chunks(words);
            groups
                .position(|group| group.iter().all(|&word| word == 0))
                .map(|i| i * run)
        } else {
            self.in_use.iter().enumerate().find_map(|(i, &word)| {
                let mask = (1u64 << run) - 1;
                let mut bits = (0..WORD_BITS).step_by(run);
                (word != u64::MAX)
                    .then(|| bits.find(|bit| word >> bit & mask == 0))
                    .flatten()
                    .map(|bit| i * WORD_BITS + bit)
            })
        }?;
        self.set(start, run, true);
        Some(start)
    }

    /// Marks pages, of which none is marked so yet.
    fn set(&mut self, start: usize, run: usize, used: bool) {
        let mut page = start;
        while page < start + run {
            let bits = (start + run - page).min(WORD_BITS - page % WORD_BITS);
            let mask = (u64::MAX >> (WORD_BITS - bits)) << (page % WORD_BITS);
            if let Some(word) = self.in_use.get_mut(page / WORD_BITS) {
                let before = word.count_ones();
                *word = if used { *word | mask } else { *word & !mask };
                // CAST: A number of bits.
                self.count = self.count + word.count_ones() as usize - before as usize;
            }
            page += bits;
        }
    }
}

/// All blocks of a device.
pub(crate) struct Blocks {
    blocks: KVVec<Block>,
    /// Blocks that may have room, the next to be used last. Has capacity for all of them.
    available: KVVec<u32>,
    used: usize,
}

impl Blocks {
    /// `count` blocks, of which none has been added.
    pub(crate) fn new(count: usize) -> Result<Self> {
        u32::try_from(count)?;
        let mut blocks = KVVec::with_capacity(count, GFP_KERNEL)?;
        for _ in 0..count {
            blocks.push(Block::default(), GFP_KERNEL)?;
        }
        Ok(Self {
            blocks,
            available: KVVec::with_capacity(count, GFP_KERNEL)?,
            used: 0,
        })
    }

    /// Lets the pages of block `index` be taken.
    pub(crate) fn add(&mut self, index: usize) {
        if let Some(block) = self.blocks.get_mut(index) {
            block.here = true;
        }
        self.list(index);
    }

    /// Notes that block `index` may have room.
    fn list(&mut self, index: usize) {
        let block = self
            .blocks
            .get_mut(index)
            .filter(|block| block.here && !block.listed);
        // CAST: `new` has checked that there are not more blocks than that.
        if let Some(block) = block {
            block.listed = self.available.push_within_capacity(index as u32).is_ok();
        }
    }

    /// Takes folios of `1 << order` pages until `indices` is full or there is no room, and returns
    /// how many.
    pub(crate) fn take(&mut self, order: u32, indices: &mut [u32]) -> usize {
        let mut got = 0;
        // Blocks with no room for this order but some for a smaller one are looked at once, from
        // the last to the first.
        let mut at = self.available.len();
        while got < indices.len() && at > 0 {
            let Some((&index, block)) = self
                .available
                .get(at - 1)
                .and_then(|index| Some((index, self.blocks.get_mut(*index as usize)?)))
            else {
                break;
            };
            match block.take(order) {
                Some(page) => {
                    if let Some(entry) = indices.get_mut(got) {
                        // CAST: Pages are counted in 32 bits, which is 16 TiB.
                        *entry = index * BLOCK_PAGES as u32 + page as u32;
                    }
                    got += 1;
                    self.used += 1 << order;
                }
                None => {
                    if block.count == BLOCK_PAGES {
                        block.listed = false;
                        // The order of the others does not matter.
                        let last = self.available.pop();
                        if let (Some(entry), Some(last)) = (self.available.get_mut(at - 1), last) {
                            *entry = last;
                        }
                    }
                    at -= 1;
                }
            }
        }
        got
    }

    /// Gives back the `1 << order` pages from `index` on.
    pub(crate) fn give_back(&mut self, index: usize, order: u32) {
        let block = index / BLOCK_PAGES;
        if let Some(found) = self.blocks.get_mut(block) {
            found.set(index % BLOCK_PAGES, 1 << order, false);
            self.used -= (1 << order).min(self.used);
        }
        self.list(block);
    }

    /// How many pages are in use.
    pub(crate) fn used(&self) -> usize {
        self.used
    }
}
