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
use kernel::{
    prelude::*,
    time::{delay::fsleep, Delta},
};

/// Makes room for `needed` pages, in the pool of somebody whose turn it is, by evicting blocks that were not
/// used for long: see [`Usage::victim`]. Returns whether there was so much at the end. Others may be faster
/// to take it.
///
/// Nothing of what is in the way may be locked by the caller, nor the mmap lock be held.
///
/// [`Usage::victim`]: crate::usage::Usage::victim
pub(crate) fn make_room(map: &PageMap<DeviceMemory>, taker: Taker, needed: usize) -> bool {
    // Blocks in a row of which nothing could be moved, because there is no system memory for it.
    const FAILURES: usize = 16;

    // The same, because what is in them is locked, or referenced by somebody: most likely others move it just now, a batch at a
    // time. After the first few, with a pause in between.
    const BUSY: usize = 300;
    const PAUSE_MS: i64 = 1;

    // Each makes room for a page at least. That many, so that who makes room for others, who are always
    // faster, has an end.
    const ATTEMPTS: usize = 2 * BLOCK_PAGES;

    let alloc = &map.data().alloc;
    let (mut failures, mut busy) = (0, 0);
    for _ in 0..ATTEMPTS {
        if alloc.free_in(taker.pool()) >= needed {
            return true;
        }
        // Up front: those who take the pages' locks to move them must not wait.
        if map.data().is_held(taker.pool()) {
            return false;
        }
        let fair = failures.max(busy) < FAILURES / 2;
        let Some(victim) = alloc.usage().victim(taker, fair) else {
            break;
        };
        let first = victim.block * BLOCK_PAGES;
        let pages = first..first + BLOCK_PAGES;
        let may_go = |index, order| alloc.usage().is_victim(index, order, &victim, taker);
        let done = evict(map, pages, Cause::Pressure, may_go);
        if done.moved > 0 {
            trace::evict(
                map.data().identity.unit,
                first * PAGE_BYTES,
                done.moved,
                needed,
            );
            map.data()
                .counters
                .add(taker.account(), |it| &it.evictions, 1);
            (failures, busy) = (0, 0);
            continue;
        }
        alloc.usage().put_off(victim.block);
        if done.is_busy {
            busy += 1;
        } else {
            failures += 1;
        }
        if failures == FAILURES || busy == BUSY {
            return false;
        }
        if busy > FAILURES {
            fsleep(Delta::from_millis(PAUSE_MS));
        }
    }
    alloc.free_in(taker.pool()) >= needed
}

/// What has come of an eviction.
struct Evicted {
    /// How many pages have moved, or can move page by page now.
    moved: usize,
    /// What has not moved is in use, and may move later: it was neither for lack of system memory nor because the device is gone.
    is_busy: bool,
}

/// Tries once to move each live page of some to system memory, for others need the room. Returns as [`evict_once`] does.
pub(crate) fn evict_pages(map: &PageMap<DeviceMemory>, pages: Range<usize>) -> usize {
    evict(map, pages, Cause::Pressure, |_, _| true).moved
}

/// Tries once to move each live page to system memory, until there is no memory for one. Returns
/// how many have moved, or can move page by page now.
pub(crate) fn evict_once(map: &PageMap<DeviceMemory>) -> usize {
    evict(map, 0..map.pages(), Cause::Evict, |_, _| true).moved
}

/// The same of some pages, and of those only the folios that may go, by the index of the first page and the
/// order.
fn evict(
    map: &PageMap<DeviceMemory>,
    pages: Range<usize>,
    cause: Cause,
    may_go: impl Fn(usize, u32) -> bool,
) -> Evicted {
    let (mut moved, mut stuck, mut from) = (0, 0, pages.start);
    let mut is_busy = true;
    let (Ok(mut scratch), Ok(mut lost)) = (
        Scratch::new(),
        KVec::from_elem(0, Entries::words(BATCH), GFP_KERNEL),
    ) else {
        return Evicted {
            moved,
            is_busy: false,
        };
    };
    while map.live_folios(from..pages.end).next().is_some() {
        let (collected, next) = Collected::live(map, from..pages.end, &may_go, scratch.entries());
        let outcome = move_to_system(map.data(), collected, cause, &mut lost, None);
        moved += outcome.moved;
        stuck += outcome.stuck;
        is_busy &= outcome.without_memory.is_none() && !outcome.lost;
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
    Evicted { moved, is_busy }
}
