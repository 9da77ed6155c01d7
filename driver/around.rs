// SPDX-License-Identifier: GPL-2.0

//! How much comes along with a page that is touched: nothing where touches are random, and twice as much
//! each time where they follow one another.
//!
//! A stream is where touches went on in 2 MiB of an address space. What is remembered of it is a hint: others
//! may overwrite it at any time.

#![forbid(unsafe_code)]

use crate::{bitmap::BLOCK_PAGES, hmm::PAGE_BYTES};
use kernel::{
    prelude::*,
    sync::atomic::{Atomic, Relaxed},
};

/// Streams that are remembered.
const STREAMS: usize = 512;

/// Bits of a word that hold a number of pages of 2 MiB.
const PAGES_BITS: u32 = BLOCK_PAGES.ilog2() + 1;
const PAGES_MASK: u64 = (1 << PAGES_BITS) - 1;

/// The streams of a device.
pub(crate) struct Around {
    /// What is left of the hash of the address space and the 2 MiB << 20 | pages that came last << 10 | the
    /// page that follows.
    streams: KVec<Atomic<u64>>,
}

impl Around {
    /// None.
    pub(crate) fn new() -> Result<Self> {
        let mut streams = KVec::with_capacity(STREAMS, GFP_KERNEL)?;
        for _ in 0..STREAMS {
            streams.push(Atomic::new(0), GFP_KERNEL)?;
        }
        Ok(Self { streams })
    }

    /// The page at `addr` of address space `space` was touched. Returns how many pages are to come, it
    /// included: at most the module parameter `fault_around`, and none from the next 2 MiB.
    pub(crate) fn touched(&self, space: usize, addr: usize) -> usize {
        // CAST: Widens.
        let most = (crate::module_parameters::fault_around.value() as usize).min(BLOCK_PAGES);
        if most <= 1 {
            return 1;
        }
        let (block, at) = (
            addr / PAGE_BYTES / BLOCK_PAGES,
            addr / PAGE_BYTES % BLOCK_PAGES,
        );
        let Some((stream, tag)) = self.stream(space, block) else {
            return 1;
        };
        let last = if at == 0 {
            let before = block.checked_sub(1);
            let before = before.and_then(|before| self.stream(space, before));
            before.and_then(|(stream, tag)| last(stream, tag, BLOCK_PAGES))
        } else {
            last(stream, tag, at)
        };
        let pages = last.map_or(1, |last| (2 * last).min(most));
        let next = (at + pages).min(BLOCK_PAGES);
        // CAST: Widens.
        stream.store(tag | (pages as u64) << PAGES_BITS | next as u64, Relaxed);
        next - at
    }

    /// Where the stream of a block is, and how its word begins.
    fn stream(&self, space: usize, block: usize) -> Option<(&Atomic<u64>, u64)> {
        const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

        // CAST: Widens. What is cut off of a hash is not missed.
        let hash = (space as u64 ^ (block as u64).wrapping_mul(GOLDEN)).wrapping_mul(GOLDEN);
        let tag = hash >> (2 * PAGES_BITS) << (2 * PAGES_BITS);
        let stream = self.streams.get((hash >> 32) as usize % STREAMS)?;
        Some((stream, tag))
    }
}

/// How many pages came last in a stream, if it goes on at page `at`.
fn last(stream: &Atomic<u64>, tag: u64, at: usize) -> Option<usize> {
    let word = stream.load(Relaxed);
    // CAST: Widens, and ten bits.
    (word & !(PAGES_MASK << PAGES_BITS) == tag | at as u64)
        .then_some((word >> PAGES_BITS & PAGES_MASK) as usize)
}
