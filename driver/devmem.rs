// SPDX-License-Identifier: GPL-2.0

//! Device memory: the device-private pages that stand for a device's VRAM. Page `i` of the page map
//! is page `i` of the VRAM.

#![forbid(unsafe_code)]

use crate::{
    alloc::{Allocator, BLOCK_BYTES},
    around::Around,
    bounce::Bounces,
    counters::Ledger,
    evict::evict_once,
    execution::{Execution, Tally, Waited},
    fail::Step,
    hmm::{
        folio::{Effort, SystemFolio},
        migrate::{Entries, Fault, FaultOutcome},
        pagemap::{Form, Kind, Ops, Owner, PageMap},
        PAGE_BYTES,
    },
    import::{self, Imports},
    migration::{move_to_system, new_folio, Cause, Scratch},
    pool::Pools,
    sleep::Sleep,
    split::Splitter,
    sys::{trace, wait::Until},
    uapi,
    usage::Taker,
    vram::Vram,
};
use kernel::{
    prelude::*,
    sync::{atomic::Relaxed, Arc},
    time::{delay::fsleep, Delta, Instant, Monotonic},
};

/// One owner for all page maps of the module: so a client of one device sees pages on another
/// without moving them.
static OWNER: Owner<DeviceMemory> = Owner::new();

/// What a device is, for those who ask.
#[derive(Clone, Copy)]
pub(crate) struct Identity {
    /// The N of `/dev/hmm_gpuN`.
    pub(crate) unit: u32,
    /// Domain, and bus << 8 | device << 3 | function.
    pub(crate) pci: (u32, u32),
    /// Where its pages' addresses come from.
    pub(crate) form: Form,
}

/// The memory of one device.
#[pin_data]
pub(crate) struct DeviceMemory {
    pub(crate) identity: Identity,
    pub(crate) vram: Vram,
    #[pin]
    pub(crate) alloc: Allocator,
    pub(crate) counters: Ledger,
    pub(crate) sleep: Arc<Sleep>,
    pub(crate) splitter: Arc<Splitter>,
    around: Around,
    pub(crate) bounces: Bounces,
    #[pin]
    pub(crate) pools: Pools,
    /// Devices that its clients have made.
    #[pin]
    pub(crate) imports: Imports,
    pub(crate) tally: Tally,
    #[cfg(CONFIG_KASAN)]
    poison: crate::poison::Poison,
}

impl DeviceMemory {
    /// For the first `bytes` of `vram`, a multiple of [`BLOCK_BYTES`].
    pub(crate) fn new(
        identity: Identity,
        vram: Vram,
        alloc: impl PinInit<Allocator, Error>,
    ) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            #[cfg(CONFIG_KASAN)]
            poison: crate::poison::Poison::new(vram.len() / PAGE_BYTES)?,
            identity,
            vram,
            alloc <- alloc,
            counters: Ledger::new(crate::usage::ACCOUNTS)?,
            sleep: Arc::pin_init(Sleep::new(), GFP_KERNEL)?,
            splitter: Splitter::new()?,
            around: Around::new()?,
            bounces: Bounces::new()?,
            pools <- Pools::new(),
            imports <- Imports::new(),
            tally: Tally::new(),
        })
    }

    /// Takes VRAM for as many folios of `1 << order` pages as `indices` has room for, and returns
    /// how many there were.
    pub(crate) fn take(&self, taker: Taker, order: u32, indices: &mut [u32]) -> usize {
        let may_fail = |_: &&mut u32| Step::DeviceAllocation.pass().is_ok();
        let wanted = indices.iter_mut().take_while(may_fail).count();
        let got = self
            .alloc
            .take(taker, order, indices.get_mut(..wanted).unwrap_or_default());
        self.counters
            .add(taker.account(), |it| &it.allocated, got << order);
        for &index in indices.iter().take(got) {
            // CAST: The index of a page fits in a word.
            self.no_longer_free(index as usize, order);
        }
        got
    }

    /// The `1 << order` pages from `index` on may be written to from now on.
    pub(crate) fn no_longer_free(&self, _index: usize, _order: u32) {
        #[cfg(CONFIG_KASAN)]
        self.poison
            .check(&self.vram, self.identity.unit, _index, _order);
    }

    /// Gives VRAM back.
    pub(crate) fn give_back(&self, index: usize, order: u32) {
        let owner = self.alloc.usage().owner(index);
        self.counters.add(owner, |it| &it.freed, 1 << order);
        // Who has mapped a private pool, or what it has given, may write to what is free there.
        #[cfg(CONFIG_KASAN)]
        if self.alloc.usage().pool_of(index) == crate::bitmap::SHARED && !self.vram.is_imported() {
            self.poison.put(&self.vram, index, order);
        }
        self.alloc.give_back(index, order);
    }

    /// What free VRAM holds is not known any more.
    #[cfg(CONFIG_KASAN)]
    pub(crate) fn forget_poison(&self) {
        self.poison.forget();
    }

    /// The answer to `COUNTERS`.
    pub(crate) fn count(&self) -> uapi::hmm_gpu_counters {
        // CAST: Both widen.
        uapi::hmm_gpu_counters {
            private_pages: self.alloc.usage().private() as u64,
            quarantined_pages: self.quarantined() as u64,
            executions: self.tally.begun.load(Relaxed),
            executions_lost: self.tally.lost.load(Relaxed),
            ..self.counters.read(self.alloc.used())
        }
    }

    /// The answer to `QUERY`.
    pub(crate) fn describe(&self, kind: Kind) -> uapi::hmm_gpu_query {
        let touched = match kind {
            Kind::Private => uapi::HMM_GPU_CAP_FAULT_BACK | uapi::HMM_GPU_CAP_POOL,
            Kind::Coherent => uapi::HMM_GPU_CAP_COHERENT,
        };
        let bytes = |pages: usize| (pages * PAGE_BYTES) as u64;
        let imports = if import::may(&self.vram, kind) {
            uapi::HMM_GPU_CAP_IMPORT
        } else {
            0
        };
        uapi::hmm_gpu_query {
            flags: 0,
            version: uapi::HMM_GPU_VERSION,
            capabilities: touched
                | imports
                | uapi::HMM_GPU_CAP_MIGRATE
                | uapi::HMM_GPU_CAP_RESIDENCY
                | uapi::HMM_GPU_CAP_COUNTERS
                | uapi::HMM_GPU_CAP_MIRROR
                | uapi::HMM_GPU_CAP_ATOMIC
                | uapi::HMM_GPU_CAP_ADVICE
                | uapi::HMM_GPU_CAP_PREFETCH,
            unit: self.identity.unit,
            source: match self.vram {
                Vram::Pci(_) => uapi::HMM_GPU_SOURCE_PCI,
                Vram::Soft(_) => uapi::HMM_GPU_SOURCE_SOFT,
                Vram::DmaBuf(_) => uapi::HMM_GPU_SOURCE_DMA_BUF,
            },
            form: match self.identity.form {
                Form::Add => uapi::HMM_GPU_FORM_ADD,
                Form::AddResource { .. } => uapi::HMM_GPU_FORM_ADD_RESOURCE,
            },
            pci_domain: self.identity.pci.0,
            pci_bdf: self.identity.pci.1,
            // CAST: 2 MiB.
            block_bytes: BLOCK_BYTES as u32,
            vram_bytes: bytes(self.alloc.pages()),
            vram_free_bytes: bytes(self.alloc.free()),
            reserved: [0; 5],
        }
    }
}

impl Ops for DeviceMemory {
    fn owner() -> &'static Owner<Self> {
        &OWNER
    }

    fn folio_free(map: &PageMap<Self>, index: usize, order: u32) {
        // Not zeroed here, under page table locks: what goes into the page next either overwrites
        // all of it or zeroes it.
        map.data().give_back(index, order);
    }

    fn migrate_to_ram(map: &PageMap<Self>, fault: Fault<'_, Self>) -> FaultOutcome {
        let unit = map.data().identity.unit;
        let ((addr, _), order) = (fault.place(), fault.order());
        let index = fault.index(map);
        let owner = index.map_or(0, |index| map.data().alloc.usage().owner(index));
        let counters = &map.data().counters;
        counters.add(owner, |it| &it.cpu_faults, 1);
        let outcome = bring_back(map, fault, index, owner);
        if matches!(outcome, FaultOutcome::NoMemory | FaultOutcome::Lost) {
            counters.add(owner, |it| &it.cpu_fault_failures, 1);
        }
        let traced = match outcome {
            FaultOutcome::Retry => trace::Outcome::Retry,
            FaultOutcome::NoMemory => trace::Outcome::NoMemory,
            FaultOutcome::Lost => trace::Outcome::Lost,
            FaultOutcome::Later(_) => trace::Outcome::Later,
        };
        trace::cpu_fault(unit, addr, order, traced);
        outcome
    }

    fn closed(map: &PageMap<Self>) {
        map.data().pools.zap();
    }

    fn evict_all(map: &PageMap<Self>) {
        const PAUSE_MS: i64 = 10;
        const REPORT_MS: i64 = 10_000;

        let began = Instant::<Monotonic>::now();
        let mut report_at = REPORT_MS;
        while map.live_folios(0..map.pages()).next().is_some() {
            if evict_once(map) == 0 {
                // Somebody holds the pages for a moment (a fault, a fork, another migration), or
                // there is no memory.
                fsleep(Delta::from_millis(PAUSE_MS));
            }
            let waited = began.elapsed().as_millis();
            if waited >= report_at && map.live_folios(0..map.pages()).next().is_some() {
                pr_warn!(
                    "hmm_gpu{}: {} pages still in VRAM after {} s of trying to move them out\n",
                    map.data().identity.unit,
                    map.live_folios(0..map.pages())
                        .map(|(_, order)| 1usize << order)
                        .sum::<usize>(),
                    waited / 1000
                );
                report_at = waited + REPORT_MS;
            }
        }
    }

    fn unregistered(map: &PageMap<Self>) {
        let memory = map.data();
        // CAST: Both widen.
        let bytes = |pages: usize| (pages * PAGE_BYTES) as u64;
        trace::bind(
            memory.identity.unit,
            bytes(map.first_pfn()),
            bytes(map.pages()),
            false,
        );
        memory.splitter.finish();
        #[cfg(CONFIG_KASAN)]
        memory.poison.check_all(&memory.vram, memory.identity.unit);
        // The next driver of the BAR may hand out what is in it, and so may the exporter of a dma-buf.
        if !matches!(memory.vram, Vram::Soft(_)) {
            memory.alloc.for_each_block(|offset| {
                // CAST: An offset in bytes fits in a word. It is inside, so this cannot fail.
                let _ = memory.vram.zero(offset as usize, BLOCK_BYTES as usize);
            });
        }
    }
}

/// Brings what the CPU touched to system memory.
fn bring_back(
    map: &PageMap<DeviceMemory>,
    fault: Fault<'_, DeviceMemory>,
    index: Option<usize>,
    owner: i16,
) -> FaultOutcome {
    let memory = map.data();
    // First: what cannot move had better not be collected, which unmaps it everywhere.
    let user = || memory.user_of(index?);
    if let Some(execution) = user() {
        return wait_for(map, fault, &execution, owner);
    }
    if fault.order() == 0 {
        let outcome = fault_back_small(map, &fault, owner);
        // One that has begun meanwhile.
        return match user() {
            Some(execution) if outcome == FaultOutcome::Retry => {
                wait_for(map, fault, &execution, owner)
            }
            _ => outcome,
        };
    }
    if !memory.splitter.is_busy() {
        let Ok(mut scratch) = Scratch::new() else {
            return FaultOutcome::NoMemory;
        };
        // First: what cannot move had better not be collected, which unmaps it everywhere.
        match new_folio(fault.order(), Effort::PageFault) {
            Ok(spare) => {
                let outcome = fault_back(map, &fault, owner, 1, scratch.entries(), Some(spare));
                if let Some(outcome) = outcome {
                    return outcome;
                }
            }
            Err(_) => memory.counters.add(owner, |it| &it.large_failures, 1),
        }
        if let Some(index) = index {
            memory.splitter.split_later(fault.mm(), index);
        }
    }
    memory.counters.add(owner, |it| &it.cpu_fault_retries, 1);
    fault.come_again()
}

/// Has the CPU touch the page again when an execution is over that may use it.
fn wait_for(
    map: &PageMap<DeviceMemory>,
    fault: Fault<'_, DeviceMemory>,
    execution: &Execution,
    owner: i16,
) -> FaultOutcome {
    let memory = map.data();
    memory.counters.add(owner, |it| &it.cpu_fault_retries, 1);
    // Should the task be killed, it will not touch the page again.
    fault.wait(|| {
        memory
            .tally
            .lost(execution.wait(Until::Killed) == Waited::Lost);
    })
}

/// Brings a page that the CPU touched to system memory, and with it what it will touch next.
fn fault_back_small(
    map: &PageMap<DeviceMemory>,
    fault: &Fault<'_, DeviceMemory>,
    owner: i16,
) -> FaultOutcome {
    let memory = map.data();
    let (addr, space) = fault.place();
    if memory.bounces.came_back(space, addr) {
        memory.counters.add(owner, |it| &it.bounces, 1);
        trace::bounce(memory.identity.unit, addr, false);
    }
    let pages = memory.around.touched(space, addr);
    let words = Entries::words(pages);
    let arrays = (pages > 1)
        .then(|| {
            let array = || KVec::from_elem(0, words, GFP_KERNEL).ok();
            array().zip(array())
        })
        .flatten();
    let outcome = match arrays {
        Some((mut src, mut dst)) => {
            let entries = Entries::new(&mut src, &mut dst);
            fault_back(map, fault, owner, pages, entries, None)
        }
        None => fault_back(map, fault, owner, 1, Entries::new(&mut [0], &mut [0]), None),
    };
    outcome.unwrap_or(FaultOutcome::Retry)
}

/// Brings what the CPU touched to system memory, and up to `pages` in all. Returns nothing if it is a large
/// folio that has to be split first.
fn fault_back<'a>(
    map: &PageMap<DeviceMemory>,
    fault: &Fault<'a, DeviceMemory>,
    owner: i16,
    pages: usize,
    entries: Entries<'a>,
    spare: Option<SystemFolio>,
) -> Option<FaultOutcome> {
    let memory = map.data();
    let Ok(collected) = fault.collect(pages, entries) else {
        // The kernel says this of a mapping that could not have had the page in the first place.
        return Some(FaultOutcome::Lost);
    };
    let outcome = move_to_system(memory, collected, Cause::Fault, &mut [], spare);
    // That there is none for what comes along is no failure.
    if outcome.without_memory == Some(0) {
        return Some(FaultOutcome::NoMemory);
    }
    if outcome.lost {
        return Some(FaultOutcome::Lost);
    }
    if outcome.stuck > 0 {
        return None;
    }
    match outcome.moved {
        0 => memory.counters.add(owner, |it| &it.cpu_fault_retries, 1),
        moved => memory
            .counters
            .add(owner, |it| &it.around, moved - (1 << fault.order())),
    }
    Some(FaultOutcome::Retry)
}
