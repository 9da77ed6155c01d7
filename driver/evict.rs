// SPDX-License-Identifier: GPL-2.0

//! Eviction: pages leave the VRAM because others need the room, or because the device goes away.

#![forbid(unsafe_code)]

use crate::{
    bitmap::BLOCK_PAGES,
    devmem::DeviceMemory,
    hmm::{
        migrate::{Collected, Entries},
        pagemap::PageMap,
        PAGE_BYTES,
    },
    migration::{move_to_system, Cause, Scratch, BATCH},
    split::split_all,
    sys::trace,
    usage::Taker,
};
use core::ops::Range;
use kernel::prelude::*;

/// Makes room for `needed` pages, in the pool of somebody whose turn it is, by evicting blocks that were not
/// used for long: see [`Usage::victim`]. Returns whether there was so much at the end. Others may be faster
/// to take it.
///
/// Nothing of what is in the way may be locked by the caller, nor the mmap lock be held.
///
/// [`Usage::victim`]: crate::usage::Usage::victim
pub(crate) fn make_room(map: &PageMap<DeviceMemory>, taker: Taker, needed: usize) -> bool {
    // Blocks in a row of which nothing could be moved: what is in them is pinned, or there is no system
    // memory.
    const FAILURES: usize = 16;

    // Each makes room for a page at least. That many, so that who makes room for others, who are always
    // faster, has an end.
    const ATTEMPTS: usize = 2 * BLOCK_PAGES;

    let alloc = &map.data().alloc;
    let mut failures = 0;
    for _ in 0..ATTEMPTS {
        if alloc.free_in(taker.pool()) >= needed {
            return true;
        }
        // Up front: those who take the pages' locks to move them must not wait.
        if map.data().is_held(taker.pool()) {
            return false;
        }
        let Some(victim) = alloc.usage().victim(taker, failures < FAILURES / 2) else {
            return false;
        };
        let first = victim.block * BLOCK_PAGES;
        let pages = first..first + BLOCK_PAGES;
        let may_go = |index, order| alloc.usage().is_victim(index, order, &victim, taker);
        let moved = evict(map, pages, Cause::Pressure, may_go);
        if moved > 0 {
            trace::evict(map.data().identity.unit, first * PAGE_BYTES, moved, needed);
            map.data()
                .counters
                .add(taker.account(), |it| &it.evictions, 1);
            failures = 0;
            continue;
        }
        alloc.usage().put_off(victim.block);
        failures += 1;
        if failures == FAILURES {
            return false;
        }
    }
    alloc.free_in(taker.pool()) >= needed
}

/// Tries once to move each live page of some to system memory, for others need the room. Returns as [`evict_once`] does.
pub(crate) fn evict_pages(map: &PageMap<DeviceMemory>, pages: Range<usize>) -> usize {
    evict(map, pages, Cause::Pressure, |_, _| true)
}

/// Tries once to move each live page to system memory, until there is no memory for one. Returns
/// how many have moved, or can move page by page now.
pub(crate) fn evict_once(map: &PageMap<DeviceMemory>) -> usize {
    evict(map, 0..map.pages(), Cause::Evict, |_, _| true)
}

/// The same of some pages, and of those only the folios that may go, by the index of the first page and the
/// order.
fn evict(
    map: &PageMap<DeviceMemory>,
    pages: Range<usize>,
    cause: Cause,
    may_go: impl Fn(usize, u32) -> bool,
) -> usize {
    let Ok(mut scratch) = Scratch::new() else {
        return 0;
    };
    let Ok(mut lost) = KVec::from_elem(0, Entries::words(BATCH), GFP_KERNEL) else {
        return 0;
    };
    let (mut moved, mut stuck, mut from) = (0, 0, pages.start);
    while map.live_folios(from..pages.end).next().is_some() {
        let (collected, next) = Collected::live(map, from..pages.end, &may_go, scratch.entries());
        let outcome = move_to_system(map.data(), collected, cause, &mut lost, None);
        moved += outcome.moved;
        stuck += outcome.stuck;
        if outcome.lost && cause == Cause::Evict {
            pr_err!(
                "hmm_gpu{}: the device is gone, and with it {} pages: who touches them gets SIGBUS\n",
                map.data().identity.unit,
                outcome.moved
            );
        }
        if outcome.without_memory.is_some() {
            break;
        }
        from = next;
    }
    if stuck > 0 {
        moved += split_all(map, pages, may_go);
    }
    moved
}
