// SPDX-License-Identifier: GPL-2.0

//! Pages that go to the device because it touched them, come back because the CPU did, and so on: they cost
//! more than it would to reach them where they are. So they stay in system memory for a while.
//!
//! What is remembered of a page is a hint: others may overwrite it at any time.

#![forbid(unsafe_code)]

use crate::hmm::PAGE_BYTES;
use kernel::{
    prelude::*,
    sync::atomic::{Atomic, Relaxed},
    time::{Instant, Monotonic},
};

/// Pages that are remembered.
const PAGES: usize = 4096;

/// So often in a row has a page come back soon when it is said to bounce.
const BOUNCES: u64 = 3;

/// So many times as long as a bounce may take does a page stay that does.
const STAYS: u64 = 10;

const COUNT_BITS: u32 = 2;
const TIME_BITS: u32 = 32;
const TIME_MASK: u64 = (1 << TIME_BITS) - 1;
const COUNT_MASK: u64 = (1 << COUNT_BITS) - 1;

const _: () = assert!(BOUNCES <= COUNT_MASK);

/// The pages of a device that went to it because it touched them.
pub(crate) struct Bounces {
    /// What is left of the hash of the address space and the page << 34 | bounces in a row << 32 | when it
    /// went there or came back last, in milliseconds since `began`.
    pages: KVVec<Atomic<u64>>,
    began: Instant<Monotonic>,
}

impl Bounces {
    /// None.
    pub(crate) fn new() -> Result<Self> {
        let mut pages = KVVec::with_capacity(PAGES, GFP_KERNEL)?;
        for _ in 0..PAGES {
            pages.push(Atomic::new(0), GFP_KERNEL)?;
        }
        Ok(Self {
            pages,
            began: Instant::now(),
        })
    }

    /// The device touched the page at `addr` of address space `space`, which is in system memory. Returns
    /// whether it is to go there; if so, it is taken as gone.
    pub(crate) fn may_go(&self, space: usize, addr: usize) -> bool {
        let window = self.window();
        let Some((page, tag)) = self.page(space, addr).filter(|_| window > 0) else {
            return true;
        };
        let (count, since) = self.read(page, tag);
        if count >= BOUNCES && since < window * STAYS {
            return false;
        }
        self.write(page, tag, if count >= BOUNCES { 0 } else { count });
        true
    }

    /// The CPU touched the page at `addr` of address space `space`, which is on the device. Returns whether
    /// that was soon.
    pub(crate) fn came_back(&self, space: usize, addr: usize) -> bool {
        let window = self.window();
        let Some((page, tag)) = self.page(space, addr).filter(|_| window > 0) else {
            return false;
        };
        if page.load(Relaxed) & !(COUNT_MASK << TIME_BITS | TIME_MASK) != tag {
            return false;
        }
        let (count, since) = self.read(page, tag);
        if since < window {
            self.write(page, tag, (count + 1).min(BOUNCES));
        } else {
            self.write(page, tag, 0);
        }
        since < window
    }

    /// How soon a page has to come back for it to be a bounce, in milliseconds.
    fn window(&self) -> u64 {
        crate::module_parameters::bounce_ms.value().into()
    }

    fn now(&self) -> u64 {
        // CAST: Not negative.
        self.began.elapsed().as_millis() as u64 & TIME_MASK
    }

    /// How often the page has bounced in a row, and how long ago it was that it went or came back.
    fn read(&self, page: &Atomic<u64>, tag: u64) -> (u64, u64) {
        let word = page.load(Relaxed);
        if word & !(COUNT_MASK << TIME_BITS | TIME_MASK) != tag {
            return (0, TIME_MASK);
        }
        let since = self.now().wrapping_sub(word) & TIME_MASK;
        (word >> TIME_BITS & COUNT_MASK, since)
    }

    fn write(&self, page: &Atomic<u64>, tag: u64, count: u64) {
        page.store(tag | count << TIME_BITS | self.now(), Relaxed);
    }

    /// Where a page is remembered, and how its word begins.
    fn page(&self, space: usize, addr: usize) -> Option<(&Atomic<u64>, u64)> {
        const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
        const TAG_SHIFT: u32 = COUNT_BITS + TIME_BITS;

        // CAST: Widens. What is cut off of a hash is not missed.
        let hash =
            (space as u64 ^ ((addr / PAGE_BYTES) as u64).wrapping_mul(GOLDEN)).wrapping_mul(GOLDEN);
        let tag = hash >> TAG_SHIFT << TAG_SHIFT;
        let page = self.pages.get((hash >> 12) as usize % PAGES)?;
        Some((page, tag))
    }
}
