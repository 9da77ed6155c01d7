// SPDX-License-Identifier: GPL-2.0

//! Large folios of VRAM are split when there is no large folio of system memory for them, so that
//! their pages can move one by one.
//!
//! The kernel splits a folio that is mapped on behalf of one who migrates a part of it, and exports no
//! other way. So it takes an address space in which the folio is mapped: the clients' own are known,
//! and that of a CPU fault. In the fault itself it cannot be done, for the fault has a reference to the
//! folio; so it is left to a thread of the kernel's, and the CPU touches the page again until then.

#![forbid(unsafe_code)]

use crate::{
    client::MemoryGate,
    devmem::DeviceMemory,
    hmm::{
        migrate::{Collected, Entries, Grain, Select},
        pagemap::PageMap,
        vma::ReadLocked,
        PAGE_BYTES,
    },
    sys::work,
};
use kernel::{
    mm::{Mm, MmWithUser},
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

/// An address space that may have pages of the device.
struct Space {
    mm: ARef<Mm>,
    /// Files of the device that it has open: none, if it is here because of a fault.
    files: usize,
}

/// Splits the large folios of a device.
#[pin_data]
pub(crate) struct Splitter {
    gate: SetOnce<Arc<MemoryGate>>,
    #[pin]
    spaces: Mutex<KVec<Space>>,
    /// The first page of the folio that a fault wants to be split.
    wanted: Atomic<usize>,
    /// It has not been dealt with yet.
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
                spaces <- new_mutex!(KVec::new()),
                wanted: Atomic::new(0),
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

    /// An address space may get pages of the device, until what is returned is dropped.
    pub(crate) fn opened(self: &Arc<Self>, mm: &ARef<Mm>) -> Result<Opened> {
        let mut spaces = self.spaces.lock();
        match find(&mut spaces, mm) {
            Some(space) => space.files += 1,
            None => spaces.push(
                Space {
                    mm: mm.clone(),
                    files: 1,
                },
                GFP_KERNEL_ACCOUNT,
            )?,
        }
        Ok(Opened {
            splitter: self.clone(),
            mm: mm.clone(),
        })
    }

    /// Whether a folio is about to be split: until that is done, no other will be.
    pub(crate) fn is_busy(&self) -> bool {
        self.busy.load(Acquire)
    }

    /// Has the folio that begins at page `index`, and is mapped in `mm`, be split soon. Does not
    /// sleep for long.
    pub(crate) fn split_later(self: &Arc<Self>, mm: ARef<Mm>, index: usize) {
        // So many strangers are known at a time.
        const MOST: usize = 64;

        if self.busy.cmpxchg(false, true, Full).is_err() {
            return;
        }
        {
            let mut spaces = self.spaces.lock();
            if find(&mut spaces, &mm).is_none() && spaces.len() < MOST {
                // Without memory for it, the fault comes again.
                let _ = spaces.push(Space { mm, files: 0 }, GFP_KERNEL);
            }
        }
        self.wanted.store(index, Release);
        if system_long().enqueue(self.clone()).is_err() {
            self.busy.store(false, Release);
        }
    }

    /// Tries to split the folio that begins at page `index`. Returns whether it is not large any more.
    ///
    /// Waits for nobody's address space.
    pub(crate) fn split(&self, map: &PageMap<DeviceMemory>, index: usize) -> bool {
        let mut next = 0;
        loop {
            if map.order(index).is_none_or(|order| order == 0) {
                return true;
            }
            // Not under the lock: the last user of an address space may go meanwhile.
            let Some(mm) = self.spaces.lock().get(next).map(|space| space.mm.clone()) else {
                return false;
            };
            split_in(map, &mm, index);
            next += 1;
        }
    }

    /// Waits until nothing is under way. Nobody may touch the device's pages any more.
    pub(crate) fn finish(self: &Arc<Self>) {
        work::flush(self);
        self.spaces.lock().clear();
    }
}

/// An open file of an address space.
pub(crate) struct Opened {
    splitter: Arc<Splitter>,
    mm: ARef<Mm>,
}

impl Drop for Opened {
    fn drop(&mut self) {
        let mut spaces = self.splitter.spaces.lock();
        if let Some(space) = find(&mut spaces, &self.mm) {
            space.files = space.files.saturating_sub(1);
        }
        spaces.retain(|space| space.files > 0);
    }
}

fn find<'a>(spaces: &'a mut KVec<Space>, mm: &ARef<Mm>) -> Option<&'a mut Space> {
    spaces
        .iter_mut()
        .find(|space| space.mm.as_raw() == mm.as_raw())
}

impl WorkItem for Splitter {
    type Pointer = Arc<Self>;

    fn run(this: Arc<Self>) {
        // The fault that asks for it is in the way for a moment each time it comes again.
        const ATTEMPTS: usize = 100;
        const PAUSE_US: i64 = 200;

        let gate = this.gate.as_ref();
        // Once the device goes, all its folios leave: who moves them splits them too.
        if let Some(Ok(map)) = gate.map(|gate| gate.enter()) {
            let index = this.wanted.load(Acquire);
            for _ in 0..ATTEMPTS {
                if this.split(&map, index) {
                    break;
                }
                fsleep(Delta::from_micros(PAUSE_US));
            }
            this.spaces.lock().retain(|space| space.files > 0);
        }
        this.busy.store(false, Release);
    }
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
        // All in pages, from the same zero as the folio's.
        let from = vma.first_index();
        let to = from.saturating_add((vma.end() - vma.start()) / PAGE_BYTES);
        let there = first.max(from);
        if !vma.is_anonymous() || there >= to.min(first.saturating_add(1 << order)) {
            continue;
        }
        let start = vma.start() + (there - from) * PAGE_BYTES;
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
