// SPDX-License-Identifier: GPL-2.0

//! Private pools: blocks of VRAM in a row that belong to one client, from which all its pages and the nodes of its device page
//! table come, and which it can map.
//!
//! A pool is its client's until the file is closed, which is not before the last mapping of it is gone. Then its blocks go to the
//! shared pool one by one: those in which nothing is pinned. The others wait (they are *quarantined*) until that is so.
//!
//! Locks: `slots` is taken under folio locks, and nothing is waited for with it; `returning` is taken before it, with no other.

#![forbid(unsafe_code)]

use crate::{
    bitmap::{BLOCK_PAGES, POOLS, SHARED},
    client::MemoryGate,
    devmem::DeviceMemory,
    evict::evict_pages,
    execution::{Execution, Waited},
    hmm::{
        mirror::Own,
        pagemap::{Kind, PageMap},
        PAGE_BYTES,
    },
    sys::{user_map::Zap, wait::Until},
    usage::Account,
};
use core::ops::Range;
use kernel::{
    new_mutex,
    prelude::*,
    sync::{
        atomic::{Acquire, Atomic, Release},
        Arc, Mutex,
    },
    time::{delay::fsleep, Delta},
};

/// A pool, as its device knows it.
struct Slot {
    blocks: Range<usize>,
    execution: Arc<Execution>,
    /// Its client is there.
    owned: bool,
    /// What it takes to have nobody map it, if it was ever mapped.
    zap: Option<Arc<Zap>>,
}

/// The private pools of a device.
#[pin_data]
pub(crate) struct Pools {
    /// By number, from 1 on.
    #[pin]
    slots: Mutex<KVec<Option<Slot>>>,
    /// Held by who returns blocks.
    #[pin]
    returning: Mutex<()>,
    closed: Atomic<bool>,
}

impl Pools {
    /// None.
    pub(crate) fn new() -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            slots <- new_mutex!({
                let mut slots = KVec::with_capacity(POOLS, GFP_KERNEL)?;
                for _ in 1..POOLS {
                    slots.push(None, GFP_KERNEL)?;
                }
                slots
            }),
            returning <- new_mutex!(()),
            closed: Atomic::new(false),
        })
    }

    fn with<R>(&self, pool: u16, then: impl FnOnce(&mut Option<Slot>) -> R) -> Option<R> {
        let at = usize::from(pool).checked_sub(1)?;
        self.slots.lock().get_mut(at).map(then)
    }

    fn execution(&self, pool: u16) -> Option<Arc<Execution>> {
        self.with(pool, |slot| Some(slot.as_ref()?.execution.clone()))?
    }

    /// All that there are.
    fn executions(&self) -> impl Iterator<Item = Arc<Execution>> + '_ {
        // CAST: A small number.
        (1..POOLS as u16).filter_map(|pool| self.execution(pool))
    }

    /// Whoever has mapped the pool's memory has it no more, nor gets it again. The gate is closed.
    pub(crate) fn zap(&self) {
        // CAST: A small number.
        for pool in 1..POOLS as u16 {
            let zap = self.with(pool, |slot| slot.as_ref()?.zap.clone());
            if let Some(Some(zap)) = zap {
                zap.all();
            }
        }
    }
}

impl DeviceMemory {
    /// The execution that may use page `index`, if one runs: then it has to stay where it is.
    pub(crate) fn user_of(&self, index: usize) -> Option<Arc<Execution>> {
        let pool = self.alloc.usage().pool_of(index);
        if pool == SHARED {
            return None;
        }
        let execution = self.pools.execution(pool)?;
        execution.is_running().then_some(execution)
    }

    /// Whether what leaves `pool` makes no room there, or cannot leave: because of an execution.
    pub(crate) fn is_held(&self, pool: u16) -> bool {
        pool != SHARED && self.pools.execution(pool).is_some_and(|it| it.is_on())
    }

    /// Waits until no execution runs, or all that do are lost.
    pub(crate) fn settle(&self) {
        for execution in self.pools.executions() {
            self.tally.lost(execution.wait(Until::Over) == Waited::Lost);
        }
    }

    /// The device goes away: no more pools and executions, and those that run come to an end.
    pub(crate) fn close_pools(&self) {
        self.pools.closed.store(true, Release);
        for execution in self.pools.executions() {
            execution.close();
        }
        self.settle();
    }

    /// Returns to the shared pool what can be of pools whose clients are gone.
    pub(crate) fn return_blocks(&self) {
        // CAST: A small number.
        let orphan = |pool: &u16| {
            let blocks = self.pools.with(*pool, |slot| {
                let slot = slot.as_ref().filter(|slot| !slot.owned)?;
                Some(slot.blocks.clone())
            });
            blocks.flatten()
        };
        if self.alloc.usage().private() == 0
            || !(1..POOLS as u16).any(|pool| orphan(&pool).is_some())
        {
            return;
        }
        let _returning = self.pools.returning.lock();
        for pool in 1..POOLS as u16 {
            let Some(blocks) = orphan(&pool) else {
                continue;
            };
            let mut left = 0;
            for block in blocks {
                if self.alloc.usage().pool_of(block * BLOCK_PAGES) != pool {
                    continue;
                }
                let mut pages = block * BLOCK_PAGES..(block + 1) * BLOCK_PAGES;
                if pages.any(|page| self.vram.is_pinned(page * PAGE_BYTES)) {
                    left += 1;
                    continue;
                }
                self.alloc.take_back(block, |page| {
                    // Of a pool that came to nothing, some pages were not written to yet.
                    self.no_longer_free(page, 0);
                    // Inside, so it cannot fail.
                    let _ = self.vram.zero(page * PAGE_BYTES, PAGE_BYTES);
                });
            }
            if left == 0 {
                self.pools.with(pool, |slot| *slot = None);
            }
        }
    }

    /// How many pages of private pools cannot be used now that nobody has: given back while an execution was on, or in the hands of
    /// others although their client is gone.
    pub(crate) fn quarantined(&self) -> usize {
        // CAST: A small number.
        (1..POOLS as u16)
            .map(|pool| {
                let gone = self
                    .pools
                    .with(pool, |slot| slot.as_ref().is_some_and(|slot| !slot.owned));
                let free = if gone == Some(true) {
                    self.alloc.free_in(pool)
                } else {
                    0
                };
                free + self.alloc.held_in(pool)
            })
            .sum()
    }
}

/// A client's own pool: its blocks are given back when it is dropped.
pub(crate) struct Private {
    gate: Arc<MemoryGate>,
    pool: u16,
    blocks: Range<usize>,
    execution: Arc<Execution>,
}

impl Own for Private {
    fn pages(&self) -> Range<usize> {
        self.blocks.start * BLOCK_PAGES..self.blocks.end * BLOCK_PAGES
    }

    fn is_busy(&self) -> bool {
        self.execution.is_running()
    }

    fn settle(&self) {
        let lost = match self.execution.wait(Until::Killed) {
            Waited::Over => false,
            Waited::Lost => true,
            // Who is killed goes on: it cannot be told to stop.
            Waited::Killed => self.execution.lose(),
        };
        if let Ok(map) = self.gate.enter() {
            map.data().tally.lost(lost);
        }
    }
}

impl Private {
    /// Has `bytes` of VRAM be the pool of a client: what is there leaves it, and it is zeroed.
    ///
    /// Fails as `HMM_GPU_POOL` says.
    pub(crate) fn new(gate: &Arc<MemoryGate>, account: &Account, bytes: u64) -> Result<Self> {
        let map = gate.enter()?;
        let memory = map.data();
        if map.kind() != Kind::Private {
            return Err(EOPNOTSUPP);
        }
        memory.return_blocks();
        let count = usize::try_from(bytes)? / PAGE_BYTES / BLOCK_PAGES;
        let execution = Arc::pin_init(Execution::new(), GFP_KERNEL_ACCOUNT)?;
        let pool = memory.reserve(count, &execution)?;
        let blocks = match memory.alloc.give(pool, count) {
            Ok(first) => first..first + count,
            Err(error) => {
                memory.pools.with(pool, |slot| *slot = None);
                return Err(error);
            }
        };
        memory.pools.with(pool, |slot| {
            if let Some(slot) = slot {
                slot.blocks = blocks.clone();
            }
        });
        // From here on, dropping it undoes it all.
        let this = Self {
            gate: gate.clone(),
            pool,
            blocks,
            execution,
        };
        this.empty(&map)?;
        this.clear(memory)?;
        memory.alloc.usage().set_pool(account, pool)?;
        Ok(this)
    }

    /// Has everything leave that is there.
    fn empty(&self, map: &PageMap<DeviceMemory>) -> Result {
        // What others hold for a moment is tried again.
        const ATTEMPTS: usize = 200;
        const PAUSE_MS: i64 = 10;

        for _ in 0..ATTEMPTS {
            if current!().signal_pending() {
                return Err(EINTR);
            }
            if map.is_closed() {
                return Err(ENODEV);
            }
            if map.data().alloc.used_in(self.pool) == 0 {
                return Ok(());
            }
            if evict_pages(map, self.pages()) == 0 {
                fsleep(Delta::from_millis(PAUSE_MS));
            }
        }
        Err(ENOSPC)
    }

    fn clear(&self, memory: &DeviceMemory) -> Result {
        for page in self.pages() {
            if page % BLOCK_PAGES == 0 && current!().signal_pending() {
                return Err(EINTR);
            }
            memory.no_longer_free(page, 0);
            memory.vram.zero(page * PAGE_BYTES, PAGE_BYTES)?;
        }
        Ok(())
    }

    /// Its number.
    pub(crate) fn pool(&self) -> u16 {
        self.pool
    }

    /// Where in the VRAM it begins, in bytes.
    pub(crate) fn offset(&self) -> usize {
        self.pages().start * PAGE_BYTES
    }

    /// What its client's GPU work does.
    pub(crate) fn execution(&self) -> &Execution {
        &self.execution
    }

    /// From now on, or no more: what is given back to it is not taken again.
    pub(crate) fn hold(&self, memory: &DeviceMemory, holds: bool) {
        memory.alloc.hold(self.pool, self.blocks.clone(), holds);
    }

    /// Its memory is mapped: `zap` takes that away.
    pub(crate) fn mapped(
        &self,
        memory: &DeviceMemory,
        zap: impl FnOnce() -> Result<Arc<Zap>>,
    ) -> Result {
        let known = memory.pools.with(self.pool, |slot| {
            slot.as_ref().is_some_and(|slot| slot.zap.is_some())
        });
        if known == Some(true) {
            return Ok(());
        }
        let zap = zap()?;
        let before = memory.pools.with(self.pool, |slot| {
            let slot = slot.as_mut()?;
            slot.zap.replace(zap)
        });
        // Not under the lock: it may be the last that knows the inode.
        drop(before);
        Ok(())
    }
}

impl Drop for Private {
    fn drop(&mut self) {
        self.execution.abandon();
        let Ok(map) = self.gate.enter() else {
            return;
        };
        let memory = map.data();
        self.hold(memory, false);
        let zap = memory.pools.with(self.pool, |slot| {
            let slot = slot.as_mut()?;
            slot.owned = false;
            slot.zap.take()
        });
        drop(zap);
        memory.return_blocks();
    }
}

impl DeviceMemory {
    /// Takes the number of a pool of `count` blocks, if the device has pools, and there may be so many blocks in them.
    fn reserve(&self, count: usize, execution: &Arc<Execution>) -> Result<u16> {
        let share = match self.vram.is_imported() {
            // All of it is its client's.
            true => 100,
            false => crate::module_parameters::pool_share.value().min(100),
        };
        let mut slots = self.pools.slots.lock();
        if self.pools.closed.load(Acquire) {
            return Err(ENODEV);
        }
        // Of a pool whose client is gone, what is left of it.
        let usage = self.alloc.usage();
        let taken: usize = (1u16..)
            .zip(slots.iter())
            .filter_map(|(pool, slot)| Some((pool, slot.as_ref()?)))
            .map(|(pool, slot)| {
                let left = |block: &usize| slot.owned || usage.pool_of(block * BLOCK_PAGES) == pool;
                slot.blocks.clone().filter(left).count()
            })
            .sum();
        let blocks = self.alloc.pages() / BLOCK_PAGES;
        // CAST: Widens.
        if taken.saturating_add(count) > blocks * share as usize / 100 {
            return Err(ENOSPC);
        }
        let (at, slot) = slots
            .iter_mut()
            .enumerate()
            .find(|(_, slot)| slot.is_none())
            .ok_or(ENOSPC)?;
        *slot = Some(Slot {
            // Where they are is not known yet.
            blocks: 0..count,
            execution: execution.clone(),
            owned: true,
            zap: None,
        });
        Ok(u16::try_from(at + 1)?)
    }
}
