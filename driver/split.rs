// SPDX-License-Identifier: GPL-2.0

//! Large folios of VRAM are split when there is no large folio of system memory for them, so that
//! their pages can move one by one.
//!
//! The kernel splits a folio that is mapped on behalf of one who migrates a part of it, and exports no
//! other way. So it takes an address space in which the folio is mapped. For a CPU fault that is its own;
//! but the fault has a reference to the folio, with which it cannot be split. So that is left to a thread
//! of the kernel's, and the CPU touches the page again until then. An eviction has none, and looks at all
//! there are: this is seldom, and the pages may be those of a child that knows nothing of the device.

#![forbid(unsafe_code)]

use crate::{
    client::MemoryGate,
    devmem::DeviceMemory,
    hmm::{
        migrate::{Collected, Entries, Grain, Select},
        pagemap::PageMap,
        vma::{all_address_spaces, ReadLocked},
        PAGE_BYTES,
    },
    sys::work,
};
use core::ops::Range;
use kernel::{
    mm::{virt::flags, Mm, MmWithUser},
    new_mutex, new_work,
    prelude::*,
    sync::{
        aref::ARef,
        atomic::{Acquire, Atomic, Full, Release},
        Arc, Mutex, SetOnce,
    },
    time::{delay::fsleep, Delta},
    workqueue::{impl_has_work, system_long, Work, WorkItem},
};

/// Splits the large folios of a device that CPU faults find.
#[pin_data]
pub(crate) struct Splitter {
    gate: SetOnce<Arc<MemoryGate>>,
    /// The first page of the folio that a fault wants to be split, and where it is mapped.
    #[pin]
    wanted: Mutex<Option<(ARef<Mm>, usize)>>,
    /// That is not done yet.
    busy: Atomic<bool>,
    #[pin]
    work: Work<Self>,
}

impl_has_work! {
    impl HasWork<Self> for Splitter { self.work }
}

impl Splitter {
    /// For a device that nobody uses yet.
    pub(crate) fn new() -> Result<Arc<Self>> {
        Arc::pin_init(
            pin_init!(Self {
                gate: SetOnce::new(),
                wanted <- new_mutex!(None),
                busy: Atomic::new(false),
                work <- new_work!(),
            }),
            GFP_KERNEL,
        )
    }

    /// Says how the device is reached.
    pub(crate) fn set_gate(&self, gate: &Arc<MemoryGate>) {
        self.gate.populate(gate.clone());
    }

    /// Whether a folio is about to be split: until that is done, no other will be.
    pub(crate) fn is_busy(&self) -> bool {
        self.busy.load(Acquire)
    }

    /// Has the folio that begins at page `index`, and is mapped in `mm`, be split soon.
    pub(crate) fn split_later(self: &Arc<Self>, mm: ARef<Mm>, index: usize) {
        if self.busy.cmpxchg(false, true, Full).is_err() {
            return;
        }
        *self.wanted.lock() = Some((mm, index));
        if system_long().enqueue(self.clone()).is_err() {
            self.busy.store(false, Release);
        }
    }

    /// Waits until nothing is under way. Nobody may touch the device's pages any more.
    pub(crate) fn finish(self: &Arc<Self>) {
        work::flush(self);
    }
}

impl WorkItem for Splitter {
    type Pointer = Arc<Self>;

    fn run(this: Arc<Self>) {
        // The fault that asks for it is in the way for a moment each time it comes again.
        const ATTEMPTS: usize = 100;
        const PAUSE_US: i64 = 200;

        let wanted = this.wanted.lock().take();
        let gate = this.gate.as_ref();
        // Once the device goes, all its folios leave: who moves them splits them too.
        if let (Some((mm, index)), Some(Ok(map))) = (wanted, gate.map(|gate| gate.enter())) {
            for _ in 0..ATTEMPTS {
                if split(&map, &mm, index) {
                    break;
                }
                fsleep(Delta::from_micros(PAUSE_US));
            }
        }
        this.busy.store(false, Release);
    }
}

/// Tries to split all large folios among some pages of a device, and returns how many it has. Waits for
/// nobody's address space.
pub(crate) fn split_all(
    map: &PageMap<DeviceMemory>,
    pages: Range<usize>,
    may_go: impl Fn(usize, u32) -> bool,
) -> usize {
    let Ok(spaces) = all_address_spaces() else {
        return 0;
    };
    map.live_folios(pages)
        .filter(|(index, order)| *order > 0 && may_go(*index, *order))
        .filter(|(index, _)| spaces.iter().any(|mm| split(map, mm, *index)))
        .count()
}

/// Tries to split the folio that begins at page `index`, if it is mapped in `mm`. Returns whether it is
/// not large any more.
fn split(map: &PageMap<DeviceMemory>, mm: &Mm, index: usize) -> bool {
    split_in(map, mm, index);
    map.order(index).is_none_or(|order| order == 0)
}

/// Splits the folio that begins at page `index` if it is mapped in `mm`.
fn split_in(map: &PageMap<DeviceMemory>, mm: &Mm, index: usize) {
    let Some(mm) = mm.mmget_not_zero() else {
        return;
    };
    // Should this be the last user, it is not here that all of it is taken down.
    let mm = MmWithUser::into_mmput_async(mm);
    let Some(lock) = ReadLocked::try_new(&mm) else {
        return;
    };
    let Some(order) = map.order(index) else {
        return;
    };
    let first = map.mapped_index(index);
    let mut at = 0;
    while let Some(vma) = lock.find_vma(at) {
        at = vma.end();
        if vma.flags() & flags::SHARED != 0 {
            continue;
        }
        // All in pages, from the same zero as the folio's.
        let from = vma.first_index();
        let to = from.saturating_add((vma.end() - vma.start()) / PAGE_BYTES);
        // Some of its pages may be mapped no more.
        for page in first.max(from)..to.min(first.saturating_add(1 << order)) {
            let start = vma.start() + (page - from) * PAGE_BYTES;
            let (mut src, mut dst) = ([0], [0]);
            // To have a part of it collected is to have it split. Then all goes back to where it was.
            drop(Collected::<DeviceMemory>::range(
                vma,
                start,
                start + PAGE_BYTES,
                Select::Device,
                Grain::Page,
                Entries::new(&mut src, &mut dst),
            ));
            if map.order(index) != Some(order) {
                return;
            }
        }
    }
}
