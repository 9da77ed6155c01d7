// SPDX-License-Identifier: GPL-2.0

//! Pages within blocks of 2 MiB: which are in use, and in which pool. Plain logic, without locks.

#![forbid(unsafe_code)]

use kernel::prelude::*;

/// Pages of a block.
pub(crate) const BLOCK_PAGES: usize = 512;

const WORD_BITS: usize = u64::BITS as usize;
const WORDS: usize = BLOCK_PAGES / WORD_BITS;

/// Pools of a device: the shared one, and private ones.
pub(crate) const POOLS: usize = 65;

/// The shared pool.
pub(crate) const SHARED: u16 = 0;

/// One block.
#[derive(Default)]
struct Block {
    /// A bit for each page that is in use.
    in_use: [u64; WORDS],
    /// Those of them that were given back and are not to be taken yet.
    held: [u64; WORDS],
    /// Those of them that were taken for nodes of device page tables, which do not move.
    nodes: [u64; WORDS],
    /// How many are in use.
    count: usize,
    /// The block was added, and its pages can be taken.
    here: bool,
    /// The block is in the list of its pool.
    listed: bool,
    pool: u16,
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
        } else if run == 1 {
            let mut words = self.in_use.iter().enumerate();
            words
                .find(|(_, word)| **word != u64::MAX)
                // CAST: A number of bits.
                .map(|(i, word)| i * WORD_BITS + word.trailing_ones() as usize)
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
        self.set(start, run);
        Some(start)
    }

    /// Takes such runs as long as there are any and `places` has room for them: the first page of each, counted from `first`, goes
    /// there. Returns how many there were.
    fn take_each(&mut self, order: u32, first: u32, places: &mut [u32]) -> usize {
        if order == 0 {
            return self.take_pages(first, places);
        }
        let mut got = 0;
        for place in places {
            let Some(page) = self.take(order) else {
                break;
            };
            // CAST: Less than the pages of a block.
            *place = first + page as u32;
            got += 1;
        }
        got
    }

    /// The same of single pages, for which every word is looked at once.
    fn take_pages(&mut self, first: u32, places: &mut [u32]) -> usize {
        let mut got = 0;
        for (i, word) in self.in_use.iter_mut().enumerate() {
            while *word != u64::MAX {
                let Some(place) = places.get_mut(got) else {
                    self.count += got;
                    return got;
                };
                let bit = word.trailing_ones();
                *word |= 1 << bit;
                // CAST: Less than the pages of a block.
                *place = first + (i * WORD_BITS) as u32 + bit;
                got += 1;
            }
        }
        self.count += got;
        got
    }

    /// Marks pages as used, of which none is yet.
    fn set(&mut self, start: usize, run: usize) {
        for (i, mask) in masks(start, run) {
            if let Some(word) = self.in_use.get_mut(i) {
                // CAST: A number of bits.
                self.count += (!*word & mask).count_ones() as usize;
                *word |= mask;
            }
        }
    }

    /// Ends that, and that they are nodes.
    fn unset(&mut self, start: usize, run: usize) {
        for (i, mask) in masks(start, run) {
            if let Some((word, nodes)) = self.in_use.get_mut(i).zip(self.nodes.get_mut(i)) {
                // CAST: A number of bits.
                let used = (*word & mask).count_ones() as usize;
                self.count = self.count.saturating_sub(used);
                *word &= !mask;
                *nodes &= !mask;
            }
        }
    }

    /// Whether nodes are here.
    fn has_nodes(&self) -> bool {
        self.nodes.iter().any(|&word| word != 0)
    }

    /// Takes a page for a node.
    fn take_node(&mut self) -> Option<usize> {
        let page = self.take(0)?;
        for (i, mask) in masks(page, 1) {
            if let Some(word) = self.nodes.get_mut(i) {
                *word |= mask;
            }
        }
        Some(page)
    }

    /// Has pages that are in use be taken by nobody when they are not any more, nor be nodes.
    fn hold(&mut self, start: usize, run: usize) {
        for (i, mask) in masks(start, run) {
            if let Some((held, nodes)) = self.held.get_mut(i).zip(self.nodes.get_mut(i)) {
                *held |= mask;
                *nodes &= !mask;
            }
        }
    }

    /// Ends that for all. Returns how many there were.
    fn release(&mut self) -> usize {
        let mut count = 0;
        for (word, held) in self.in_use.iter_mut().zip(self.held.iter_mut()) {
            *word &= !*held;
            // CAST: A number of bits.
            count += held.count_ones() as usize;
            *held = 0;
        }
        self.count -= count.min(self.count);
        count
    }
}

/// The words that `run` bits from `start` on are in, and which bits of each.
fn masks(start: usize, run: usize) -> impl Iterator<Item = (usize, u64)> {
    let mut page = start;
    core::iter::from_fn(move || {
        if page >= start + run {
            return None;
        }
        let bits = (start + run - page).min(WORD_BITS - page % WORD_BITS);
        let mask = (u64::MAX >> (WORD_BITS - bits)) << (page % WORD_BITS);
        let word = page / WORD_BITS;
        page += bits;
        Some((word, mask))
    })
}

/// The blocks of a pool.
#[derive(Default)]
struct Pool {
    /// Those that may have room, the next to be used last. Has capacity for all of them.
    available: KVVec<u32>,
    /// Where the last node was put.
    nodes_at: u32,
    /// How many there are.
    blocks: usize,
    /// Pages in use.
    used: usize,
    /// What is given back is not to be taken yet.
    holds: bool,
    /// How many pages that are.
    held: usize,
}

/// All blocks of a device.
///
/// Those that were not added yet are counted in the shared pool.
pub(crate) struct Blocks {
    blocks: KVVec<Block>,
    pools: KVec<Pool>,
    used: usize,
}

impl Blocks {
    /// `count` blocks, of which none has been added.
    pub(crate) fn new(count: usize) -> Result<Self> {
        u32::try_from(count)?;
        let mut blocks = KVVec::with_capacity(count, GFP_KERNEL)?;
        let mut pools = KVec::with_capacity(POOLS, GFP_KERNEL)?;
        for _ in 0..count {
            blocks.push(Block::default(), GFP_KERNEL)?;
        }
        for _ in 0..POOLS {
            pools.push(Pool::default(), GFP_KERNEL)?;
        }
        if let Some(shared) = pools.first_mut() {
            shared.available = KVVec::with_capacity(count, GFP_KERNEL)?;
            shared.blocks = count;
        }
        Ok(Self {
            blocks,
            pools,
            used: 0,
        })
    }

    /// Whether block `index` was added.
    pub(crate) fn is_here(&self, index: usize) -> bool {
        self.blocks.get(index).is_some_and(|block| block.here)
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
        let Some(block) = block else {
            return;
        };
        if let Some(pool) = self.pools.get_mut(usize::from(block.pool)) {
            // CAST: `new` has checked that there are not more blocks than that.
            block.listed = pool.available.push_within_capacity(index as u32).is_ok();
        }
    }

    /// Has block `index` be no more among those that may have room.
    fn unlist(&mut self, index: usize) {
        let block = self.blocks.get_mut(index).filter(|block| block.listed);
        let Some(block) = block else {
            return;
        };
        block.listed = false;
        if let Some(pool) = self.pools.get_mut(usize::from(block.pool)) {
            // CAST: As in `list`.
            let at = pool.available.iter().position(|&it| it == index as u32);
            if let Some(at) = at {
                remove(&mut pool.available, at);
            }
        }
    }

    /// Has the blocks from `first` on, `count` of them, be those of `pool`, which has none. `room` has capacity for as
    /// many, and comes back if one of them is not in the shared pool. What is in use of them stays so.
    pub(crate) fn give(
        &mut self,
        first: usize,
        count: usize,
        pool: u16,
        room: KVVec<u32>,
    ) -> Result<(), KVVec<u32>> {
        let all = self.blocks.iter().skip(first).take(count);
        let shared = all.filter(|block| block.here && block.pool == SHARED);
        if shared.count() != count || pool == SHARED {
            return Err(room);
        }
        match self.pools.get_mut(usize::from(pool)) {
            Some(pool) if pool.blocks == 0 => {
                *pool = Pool {
                    available: room,
                    ..Pool::default()
                };
            }
            _ => return Err(room),
        }
        // All at once: they are many.
        let run = first..first + count;
        if let Some(shared) = self.pools.first_mut() {
            // CAST: Widens.
            shared
                .available
                .retain(|&mut it| !run.contains(&(it as usize)));
        }
        for index in run {
            if let Some(block) = self.blocks.get_mut(index) {
                block.listed = false;
            }
            self.hand(index, pool);
        }
        Ok(())
    }

    /// Has block `index` be one of the shared pool.
    pub(crate) fn take_back(&mut self, index: usize) {
        if let Some(block) = self.blocks.get_mut(index) {
            let released = block.release();
            if let Some(pool) = self.pools.get_mut(usize::from(block.pool)) {
                pool.used -= released.min(pool.used);
                pool.held -= released.min(pool.held);
            }
        }
        self.hand(index, SHARED);
    }

    /// Has block `index` be one of another pool, with what is in use of it.
    fn hand(&mut self, index: usize, to: u16) {
        self.unlist(index);
        let Some(block) = self.blocks.get_mut(index) else {
            return;
        };
        if let Some(from) = self.pools.get_mut(usize::from(block.pool)) {
            from.blocks -= 1.min(from.blocks);
            from.used -= block.count.min(from.used);
        }
        block.pool = to;
        if let Some(to) = self.pools.get_mut(usize::from(to)) {
            to.blocks += 1;
            to.used += block.count;
        }
        self.list(index);
    }

    /// From now on, or no more: what is given back to `pool` is not to be taken.
    pub(crate) fn set_holds(&mut self, pool: u16, holds: bool) {
        if let Some(pool) = self.pools.get_mut(usize::from(pool)) {
            pool.holds = holds;
        }
    }

    /// Lets what was given back meanwhile to block `index` be taken again.
    pub(crate) fn release(&mut self, index: usize) {
        let Some(block) = self.blocks.get_mut(index) else {
            return;
        };
        let released = block.release();
        if released == 0 {
            return;
        }
        if let Some(pool) = self.pools.get_mut(usize::from(block.pool)) {
            pool.used -= released.min(pool.used);
            pool.held -= released.min(pool.held);
        }
        self.list(index);
    }

    /// Takes all pages of block `index` that are free, and sets their bits in `taken`. [`Blocks::put_all`] gives them back.
    pub(crate) fn take_all(&mut self, index: usize) -> [u64; WORDS] {
        let mut taken = [0; WORDS];
        let Some(block) = self.blocks.get_mut(index) else {
            return taken;
        };
        let mut count = 0;
        for (word, taken) in block.in_use.iter_mut().zip(taken.iter_mut()) {
            *taken = !*word;
            // CAST: A number of bits.
            count += taken.count_ones() as usize;
            *word = u64::MAX;
        }
        block.count += count;
        self.used += count;
        if let Some(pool) = self.pools.get_mut(usize::from(block.pool)) {
            pool.used += count;
        }
        taken
    }

    /// Gives back what [`Blocks::take_all`] has taken.
    pub(crate) fn put_all(&mut self, index: usize, taken: &[u64; WORDS]) {
        let Some(block) = self.blocks.get_mut(index) else {
            return;
        };
        let mut count = 0;
        for (word, taken) in block.in_use.iter_mut().zip(taken.iter()) {
            *word &= !*taken;
            // CAST: A number of bits.
            count += taken.count_ones() as usize;
        }
        block.count -= count.min(block.count);
        self.used -= count.min(self.used);
        if let Some(pool) = self.pools.get_mut(usize::from(block.pool)) {
            pool.used -= count.min(pool.used);
        }
        self.list(index);
    }

    /// Takes a page of `pool` for a node of a device page table: where there are others, if it can be, since a block with
    /// nodes cannot become a private pool.
    pub(crate) fn take_node(&mut self, pool: u16) -> Option<u32> {
        let of = pool;
        let pool = self.pools.get_mut(usize::from(of))?;
        // CAST: Widens.
        let at = |index: u32| self.blocks.get(index as usize);
        let has_room =
            |block: &Block| block.listed && block.pool == of && block.count < BLOCK_PAGES;
        let beside_others =
            |index: &u32| at(*index).is_some_and(|it| has_room(it) && it.has_nodes());
        let index = Some(pool.nodes_at)
            .filter(beside_others)
            .or_else(|| pool.available.iter().copied().find(beside_others))
            // Not the last, which is where other pages are taken.
            .or_else(|| {
                pool.available
                    .iter()
                    .copied()
                    .find(|&it| at(it).is_some_and(has_room))
            })?;
        // CAST: Widens.
        let page = self.blocks.get_mut(index as usize)?.take_node()?;
        pool.nodes_at = index;
        pool.used += 1;
        self.used += 1;
        // CAST: As in `take`.
        Some(index * BLOCK_PAGES as u32 + page as u32)
    }

    /// Takes folios of `1 << order` pages of `pool` until `indices` is full or there is no room, and returns
    /// how many. Blocks with nodes are used only if `beside_nodes` says so.
    pub(crate) fn take(
        &mut self,
        pool: u16,
        order: u32,
        beside_nodes: bool,
        indices: &mut [u32],
    ) -> usize {
        let mut got = 0;
        let Some(pool) = self.pools.get_mut(usize::from(pool)) else {
            return 0;
        };
        // Blocks with no room for this order but some for a smaller one are looked at once, from
        // the last to the first.
        let mut at = pool.available.len();
        while got < indices.len() && at > 0 {
            let Some((&index, block)) = pool
                .available
                .get(at - 1)
                .and_then(|index| Some((index, self.blocks.get_mut(*index as usize)?)))
            else {
                break;
            };
            if !beside_nodes && block.has_nodes() {
                at -= 1;
                continue;
            }
            let places = indices.get_mut(got..).unwrap_or_default();
            // CAST: Pages are counted in 32 bits, which is 16 TiB.
            let taken = block.take_each(order, index * BLOCK_PAGES as u32, places);
            got += taken;
            self.used += taken << order;
            pool.used += taken << order;
            // It has no more.
            if got < indices.len() {
                if block.count == BLOCK_PAGES {
                    block.listed = false;
                    remove(&mut pool.available, at - 1);
                }
                at -= 1;
            }
        }
        got
    }

    /// Gives back the `1 << order` pages from `index` on.
    pub(crate) fn give_back(&mut self, index: usize, order: u32) {
        let (block, pages) = (index / BLOCK_PAGES, 1 << order);
        let Some(found) = self.blocks.get_mut(block) else {
            return;
        };
        let Some(pool) = self.pools.get_mut(usize::from(found.pool)) else {
            return;
        };
        if pool.holds {
            found.hold(index % BLOCK_PAGES, pages);
            pool.held += pages;
            self.used -= pages.min(self.used);
            return;
        }
        found.unset(index % BLOCK_PAGES, pages);
        pool.used -= pages.min(pool.used);
        self.used -= pages.min(self.used);
        self.list(block);
    }

    /// How many pages are in use.
    pub(crate) fn used(&self) -> usize {
        self.used
    }

    /// How many of block `index` are in use, or held back.
    pub(crate) fn used_of_block(&self, index: usize) -> usize {
        self.blocks.get(index).map_or(0, |block| block.count)
    }

    /// The same of `pool`.
    pub(crate) fn used_in(&self, pool: u16) -> usize {
        self.pools
            .get(usize::from(pool))
            .map_or(0, |pool| pool.used)
    }

    /// How many pages of `pool` are held back.
    pub(crate) fn held_in(&self, pool: u16) -> usize {
        self.pools
            .get(usize::from(pool))
            .map_or(0, |pool| pool.held)
    }

    /// How many pages of `pool` can be taken.
    pub(crate) fn free_in(&self, pool: u16) -> usize {
        let pool = self.pools.get(usize::from(pool));
        pool.map_or(0, |pool| {
            (pool.blocks * BLOCK_PAGES).saturating_sub(pool.used)
        })
    }
}

/// Removes entry `at`. The order of the others does not matter.
fn remove(list: &mut KVVec<u32>, at: usize) {
    let last = list.pop();
    if let (Some(entry), Some(last)) = (list.get_mut(at), last) {
        *entry = last;
    }
}
