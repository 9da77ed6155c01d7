// SPDX-License-Identifier: GPL-2.0

//! Who has how much of the VRAM, and when each 2 MiB of it was used last: so that it is known whose pages
//! go first when room is needed.
//!
//! Nothing here is locked: pages are given back under page table locks, and what is read to choose a
//! victim is a hint.

#![forbid(unsafe_code)]

use crate::bitmap::{BLOCK_PAGES, SHARED};
use kernel::{
    prelude::*,
    sync::atomic::{Acquire, Atomic, Full, Relaxed, Release},
};

/// Accounts of a device: a client has one each.
pub(crate) const ACCOUNTS: usize = 1024;

/// Whose pages do not move: those of device page tables.
const TABLES: i16 = 0;

/// The account of those that come when all others are taken.
const CROWD: i16 = ACCOUNTS as i16 - 1;

/// Somebody who takes VRAM, and for what: blocks that were taken or used in one turn are not evicted for
/// the same turn.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Taker {
    account: i16,
    pool: u16,
    turn: u32,
}

impl Taker {
    /// For a device page table, from a pool.
    pub(crate) const fn table(pool: u16) -> Self {
        Self {
            account: TABLES,
            pool,
            turn: 0,
        }
    }

    /// The pool from which it is.
    pub(crate) fn pool(self) -> u16 {
        self.pool
    }

    /// Whether it is for a device page table.
    pub(crate) fn is_table(self) -> bool {
        self.account == TABLES
    }

    /// Whether what is on page `index` need not move to be where the taker wants it.
    pub(crate) fn has_here(self, usage: &Usage, index: usize) -> bool {
        self.pool == SHARED || usage.pool_of(index) == self.pool
    }
}

/// What a client has of a device's VRAM. It is closed, not dropped: its pages outlive it.
pub(crate) struct Account {
    number: i16,
    /// The pool that it takes from.
    pool: Atomic<u32>,
}

impl Account {
    fn new(number: i16) -> Self {
        Self {
            number,
            pool: Atomic::new(SHARED.into()),
        }
    }

    /// Whether it is not shared with others.
    fn is_own(&self) -> bool {
        self.number != CROWD
    }
}

/// One account.
struct Entry {
    open: Atomic<bool>,
    /// It takes from a pool of its own.
    private: Atomic<bool>,
    /// In pages.
    used: Atomic<usize>,
}

/// 2 MiB of VRAM.
struct Block {
    /// The turn of who took a page of it or used one last.
    turn: Atomic<u32>,
    /// Who took a page of it last.
    account: Atomic<i16>,
    /// Pages that are in use and can move.
    movable: Atomic<u32>,
    /// The pool that it belongs to.
    pool: Atomic<u32>,
}

/// A page of VRAM.
struct Page {
    /// The account that has it, or that of the tables if none has.
    account: Atomic<i16>,
    /// The turn in which it was taken, or needed last.
    turn: Atomic<u32>,
}

fn is_table(page: &Page) -> bool {
    page.account.load(Relaxed) == TABLES
}

/// What is to go to make room.
pub(crate) struct Victim {
    /// Pages of this block.
    pub(crate) block: usize,
    /// Of those only the taker's own, and those of who has more than this.
    over: Option<usize>,
}

/// The use that is made of a device's VRAM.
pub(crate) struct Usage {
    /// The last turn. Turns are even: an odd number is a time at which nobody had a turn.
    clock: Atomic<u32>,
    entries: KVec<Entry>,
    blocks: KVVec<Block>,
    pages: KVVec<Page>,
    /// Blocks in private pools.
    private: Atomic<usize>,
}

impl Taker {
    /// Whose turn it is.
    pub(crate) fn account(self) -> i16 {
        self.account
    }
}

impl Account {
    /// The number of the account, and whether it is this one's alone.
    pub(crate) fn number(&self) -> (i16, bool) {
        (self.number, self.number != CROWD)
    }
}

impl Usage {
    /// How many pages an account has.
    pub(crate) fn used_by(&self, account: i16) -> usize {
        self.entry(account)
            .map_or(0, |entry| entry.used.load(Relaxed))
    }

    /// The account that has page `index`.
    pub(crate) fn owner(&self, index: usize) -> i16 {
        self.pages
            .get(index)
            .map_or(TABLES, |page| page.account.load(Relaxed))
    }

    /// For `count` blocks, of which none is in use.
    pub(crate) fn new(count: usize) -> Result<Self> {
        let mut entries = KVec::with_capacity(ACCOUNTS, GFP_KERNEL)?;
        for _ in 0..ACCOUNTS {
            let entry = Entry {
                open: Atomic::new(false),
                private: Atomic::new(false),
                used: Atomic::new(0),
            };
            entries.push(entry, GFP_KERNEL)?;
        }
        let mut blocks = KVVec::with_capacity(count, GFP_KERNEL)?;
        for _ in 0..count {
            let block = Block {
                turn: Atomic::new(0),
                account: Atomic::new(TABLES),
                movable: Atomic::new(0),
                pool: Atomic::new(SHARED.into()),
            };
            blocks.push(block, GFP_KERNEL)?;
        }
        let mut pages = KVVec::with_capacity(count * BLOCK_PAGES, GFP_KERNEL)?;
        for _ in 0..count * BLOCK_PAGES {
            let page = Page {
                account: Atomic::new(TABLES),
                turn: Atomic::new(0),
            };
            pages.push(page, GFP_KERNEL)?;
        }
        Ok(Self {
            clock: Atomic::new(0),
            entries,
            blocks,
            pages,
            private: Atomic::new(0),
        })
    }

    /// Opens an account. When all are taken, those that come share one.
    pub(crate) fn open(&self) -> Account {
        let own = TABLES as usize + 1..CROWD as usize;
        for (i, entry) in self
            .entries
            .iter()
            .enumerate()
            .take(own.end)
            .skip(own.start)
        {
            if entry.open.cmpxchg(false, true, Full).is_err() {
                continue;
            }
            if entry.used.load(Relaxed) == 0 {
                entry.private.store(false, Relaxed);
                // CAST: Less than `ACCOUNTS`.
                return Account::new(i as i16);
            }
            // Somebody is gone whose pages are not.
            entry.open.store(false, Release);
        }
        Account::new(CROWD)
    }

    /// Has an account that has nothing take from `pool` from now on. Fails with `EBUSY` if it has something.
    pub(crate) fn set_pool(&self, account: &Account, pool: u16) -> Result {
        if let Some(entry) = self.entry(account.number).filter(|_| account.is_own()) {
            if entry.used.load(Relaxed) > 0 {
                return Err(EBUSY);
            }
            entry.private.store(pool != SHARED, Relaxed);
        }
        account.pool.store(pool.into(), Release);
        Ok(())
    }

    /// Has an account take from the shared pool from now on.
    pub(crate) fn leave_pool(&self, account: &Account) {
        if let Some(entry) = self.entry(account.number).filter(|_| account.is_own()) {
            entry.private.store(false, Relaxed);
        }
        account.pool.store(SHARED.into(), Release);
    }

    /// Block `block` is one of `pool` now.
    pub(crate) fn move_block(&self, block: usize, pool: u16) {
        let Some(block) = self.blocks.get(block) else {
            return;
        };
        let was_shared = block.pool.xchg(pool.into(), Full) == u32::from(SHARED);
        if was_shared && pool != SHARED {
            self.private.add(1, Relaxed);
        }
        if !was_shared && pool == SHARED {
            self.private.fetch_sub(1, Relaxed);
        }
    }

    /// The pool that page `index` is of.
    pub(crate) fn pool_of(&self, index: usize) -> u16 {
        let block = self.blocks.get(index / BLOCK_PAGES);
        // CAST: It was one.
        block.map_or(SHARED, |block| block.pool.load(Acquire) as u16)
    }

    /// How many pages are in private pools.
    pub(crate) fn private(&self) -> usize {
        self.private.load(Relaxed) * BLOCK_PAGES
    }

    /// How many pages of block `block` are in use and can move.
    pub(crate) fn movable(&self, block: usize) -> usize {
        let block = self.blocks.get(block);
        // CAST: Widens.
        block.map_or(0, |block| block.movable.load(Acquire) as usize)
    }

    /// Closes an account.
    pub(crate) fn close(&self, account: &Account) {
        if let Some(entry) = self.entry(account.number) {
            entry.open.store(false, Release);
        }
    }

    /// A new turn of the owner of an account.
    pub(crate) fn turn(&self, account: &Account) -> Taker {
        Taker {
            account: account.number,
            // CAST: It was one.
            pool: account.pool.load(Acquire) as u16,
            turn: self.clock.fetch_add(2, Relaxed).wrapping_add(2),
        }
    }

    fn entry(&self, account: i16) -> Option<&Entry> {
        self.entries.get(usize::try_from(account).ok()?)
    }

    /// The pages from `index` on, all in one block, were taken.
    pub(crate) fn took(&self, taker: Taker, index: usize, pages: usize) {
        for page in self.pages.iter().skip(index).take(pages) {
            page.turn.store(taker.turn, Relaxed);
            page.account.store(taker.account, Relaxed);
        }
        if let Some(entry) = self.entry(taker.account) {
            entry.used.add(pages, Relaxed);
        }
        if taker.account == TABLES {
            return;
        }
        if let Some(block) = self.blocks.get(index / BLOCK_PAGES) {
            block.turn.store(taker.turn, Relaxed);
            block.account.store(taker.account, Relaxed);
            // CAST: At most as many as a block has.
            block.movable.add(pages as u32, Relaxed);
        }
    }

    /// The `1 << order` pages from `index` on are not in use any more. Does not sleep.
    pub(crate) fn gave_back(&self, index: usize, order: u32) {
        let (mut run, mut owner) = (0, TABLES);
        for page in self.pages.iter().skip(index).take(1 << order) {
            let account = page.account.xchg(TABLES, Relaxed);
            if account != owner {
                self.less(index, owner, run);
                (run, owner) = (0, account);
            }
            run += 1;
        }
        self.less(index, owner, run);
    }

    /// An account has so many pages less, of the block that `index` is in.
    fn less(&self, index: usize, account: i16, pages: usize) {
        if let Some(entry) = self.entry(account) {
            entry.used.fetch_sub(pages, Relaxed);
        }
        if account == TABLES {
            return;
        }
        if let Some(block) = self.blocks.get(index / BLOCK_PAGES) {
            // CAST: At most as many as a block has.
            block.movable.fetch_sub(pages as u32, Relaxed);
        }
    }

    /// Page `index` is needed in `taker`'s turn.
    pub(crate) fn need(&self, index: usize, taker: Taker) {
        if let Some(page) = self.pages.get(index) {
            page.turn.store(taker.turn, Relaxed);
        }
        self.used_in(index, taker.turn);
    }

    /// Whether one of the `1 << order` pages from `index` on is needed in `taker`'s turn.
    fn is_needed(&self, index: usize, order: u32, taker: Taker) -> bool {
        let mut pages = self.pages.iter().skip(index).take(1 << order);
        pages.any(|page| page.turn.load(Relaxed) == taker.turn)
    }

    /// A device has used page `index`.
    pub(crate) fn touch(&self, index: usize) {
        self.used_in(index, self.just_now());
    }

    /// The time just before the last turn: later than all before it, and nobody's turn.
    fn just_now(&self) -> u32 {
        self.clock.load(Relaxed).wrapping_sub(1)
    }

    fn used_in(&self, index: usize, turn: u32) {
        if let Some(block) = self.blocks.get(index / BLOCK_PAGES) {
            if block.turn.load(Relaxed) != turn {
                block.turn.store(turn, Relaxed);
            }
        }
    }

    /// The block whose pages are to go when `taker` needs room: the one that was not used for the longest
    /// time, of those with pages of the taker itself or of who has more than a fair share, and only those pages of it. If there
    /// is none, of all. It is one of the taker's pool.
    ///
    /// Nothing that is needed in this turn is to go: so at last it is a block of which only some pages are.
    /// `None` if there is nothing else. Where those of who has too much do not move, `fair` is no more asked for.
    pub(crate) fn victim(&self, taker: Taker, fair: bool) -> Option<Victim> {
        let of_all = |block| Victim { block, over: None };
        let of_some = || {
            let share = self.share(taker);
            let block = self
                .oldest_over(taker, share)
                .or_else(|| self.find(taker, |page| self.may_go(page, taker, share)))?;
            Some(Victim {
                block,
                over: Some(share),
            })
        };
        fair.then(of_some)
            .flatten()
            .or_else(|| self.oldest(taker, |_| true).map(of_all))
            .or_else(|| self.find(taker, |_| true).map(of_all))
    }

    /// Whether the `1 << order` pages from `index` on are of those that are to go.
    pub(crate) fn is_victim(
        &self,
        index: usize,
        order: u32,
        victim: &Victim,
        taker: Taker,
    ) -> bool {
        let may_go = |share| {
            let page = self.pages.get(index);
            page.is_some_and(|page| self.may_go(page, taker, share))
        };
        !self.is_needed(index, order, taker) && victim.over.is_none_or(may_go)
    }

    /// Whether a page is of the taker itself, of who has more than `share`, or of who is gone.
    fn may_go(&self, page: &Page, taker: Taker, share: usize) -> bool {
        self.is_over(page.account.load(Relaxed), taker, share)
    }

    fn is_over(&self, account: i16, taker: Taker, share: usize) -> bool {
        let used = || self.entry(account).map(|entry| entry.used.load(Relaxed));
        account == taker.account
            || !self.is_open(account)
            || used().is_some_and(|used| used > share)
    }

    /// Whether there is a client whose account it is. Who is gone has no share.
    fn is_open(&self, account: i16) -> bool {
        let entry = self.entry(account);
        account == CROWD || entry.is_some_and(|entry| entry.open.load(Relaxed))
    }

    /// The block that was not used for the longest time, of those with pages that may go before others do.
    fn oldest_over(&self, taker: Taker, share: usize) -> Option<usize> {
        // So many are put right at once, since each costs a look at all blocks.
        const TRIES: usize = 64;

        for _ in 0..TRIES {
            let found = self.oldest(taker, |account| self.is_over(account, taker, share))?;
            let pages = || self.pages_of(found).filter(|page| !is_table(page));
            let may_go = |page: &Page| self.may_go(page, taker, share);
            if pages().any(|page| may_go(page) && page.turn.load(Relaxed) != taker.turn) {
                return Some(found);
            }
            // Who took a page of it last has none there any more, or needs what there is.
            let block = self.blocks.get(found)?;
            match pages().find(|page| !may_go(page)) {
                Some(page) => block.account.store(page.account.load(Relaxed), Relaxed),
                None => block.turn.store(taker.turn, Relaxed),
            }
        }
        None
    }

    /// A block of the taker's pool with a page that is not needed in this turn, and may go.
    fn find(&self, taker: Taker, may_go: impl Fn(&Page) -> bool) -> Option<usize> {
        let fits =
            |page: &Page| !is_table(page) && page.turn.load(Relaxed) != taker.turn && may_go(page);
        (0..self.blocks.len())
            .filter(|&block| self.pool_of(block * BLOCK_PAGES) == taker.pool)
            .find(|&block| self.pages_of(block).any(fits))
    }

    fn pages_of(&self, block: usize) -> impl Iterator<Item = &Page> {
        self.pages
            .iter()
            .skip(block * BLOCK_PAGES)
            .take(BLOCK_PAGES)
    }

    fn oldest(&self, taker: Taker, may_go: impl Fn(i16) -> bool) -> Option<usize> {
        let now = self.clock.load(Relaxed);
        self.blocks
            .iter()
            .enumerate()
            .filter(|(_, block)| block.pool.load(Relaxed) == taker.pool.into())
            .filter(|(_, block)| block.movable.load(Acquire) > 0)
            .filter(|(_, block)| block.turn.load(Relaxed) != taker.turn)
            .filter(|(_, block)| may_go(block.account.load(Relaxed)))
            .max_by_key(|(_, block)| now.wrapping_sub(block.turn.load(Relaxed)))
            .map(|(i, _)| i)
    }

    /// The fair share of the shared pool of each who has some, or wants some, in pages.
    fn share(&self, taker: Taker) -> usize {
        // CAST: Widens.
        let percent = crate::module_parameters::fair_share.value() as usize;
        let entries = (0i16..).zip(self.entries.iter()).skip(1);
        let active = entries
            .filter(|(_, entry)| !entry.private.load(Relaxed))
            .filter(|(i, entry)| {
                *i == taker.account || (entry.used.load(Relaxed) > 0 && self.is_open(*i))
            })
            .count();
        self.pages.len().saturating_sub(self.private()) / active.max(1) * percent.min(100) / 100
    }

    /// A block could not be emptied: others are tried before it is again.
    pub(crate) fn put_off(&self, block: usize) {
        if let Some(block) = self.blocks.get(block) {
            block.turn.store(self.just_now(), Relaxed);
        }
    }
}
