// SPDX-License-Identifier: GPL-2.0

//! Mirrors: an address space as one device sees it.
//!
//! C header: `include/linux/hmm.h`, `include/linux/mmu_notifier.h`.
//!
//! A [`Mirror`] is an interval notifier over all of an address space, and a device page table that
//! has no entry for anything that the address space has taken back. Its lock is what
//! `mmu_interval_read_begin` calls the user's lock: an invalidation takes entries away under it,
//! entries are made under it, after it was seen that nothing has been invalidated since the pages
//! were looked at, and the device's accesses are made under it. So what an entry names is there as
//! long as the lock is held, without a reference to it.
//!
//! Under the lock nothing is allocated, nothing is copied from or to user space but with page faults
//! off, and no other lock is taken but spinlocks: invalidations come from reclaim, and from wherever an address space
//! changes.

mod access;

use crate::{
    hmm::{
        pagemap::{Ops, PageMap, MAX_ORDER},
        seen::{Seen, FLAGS, REQ_FAULT, REQ_WRITE, VALID, WRITE},
        vma::{user_end, ReadLocked},
        PAGE_BYTES,
    },
    radix::{Home, Node, Spare, Tree},
    sys::{
        bindings,
        gate::Gate,
        mapping::{Mapping, Written},
    },
    uapi::{HMM_GPU_PTE_EXCLUSIVE, HMM_GPU_PTE_SYSTEM, HMM_GPU_PTE_VALID, HMM_GPU_PTE_WRITABLE},
};
use core::ops::Range;
use kernel::{
    error::to_result,
    mm::MmWithUser,
    new_mutex,
    prelude::*,
    sync::{
        lock::{mutex::MutexBackend, Guard},
        Arc, Mutex, SetOnce,
    },
    types::Opaque,
};

/// A part of the device's memory that a mirror has to itself, and what the device may be doing there without asking anybody.
pub(crate) trait Own: Send + Sync + 'static {
    /// Which pages that is.
    fn pages(&self) -> Range<usize>;

    /// Whether the device may use entries that are gone.
    fn is_busy(&self) -> bool;

    /// Waits until it does not, for a time that is bounded. Called with the mmap lock held for writing, by who has taken it for
    /// `fork` or `mprotect`, and with no other lock.
    fn settle(&self);
}

/// What a device that has mirrors does for them.
pub(crate) trait Table: Ops {
    /// What a mirror may have to itself.
    type Own: Own;

    /// What else is kept of an address space, under the mirror's lock.
    type Notes: Default + Send + Unpin + 'static;

    /// `[start, end)` is unmapped. Called under the lock: nothing may be allocated or waited for.
    fn unmapped(notes: &mut Self::Notes, start: usize, end: usize);

    /// Where a node of a device page table is.
    type Home: Home<Store = Mapping> + Send + 'static;

    /// The device's memory, of which page `i` of the page map is page `i`.
    fn store(&self) -> &Mapping;

    /// Changes when what is in the device's memory is lost; odd as long as none can be used.
    fn epoch(&self) -> u64;

    /// A home for a node: a page of the device's memory, all zero. Of what the mirror has to itself, if it does.
    fn home(
        gate: &Arc<Gate<PageMap<Self>>>,
        map: &PageMap<Self>,
        own: Option<&Self::Own>,
    ) -> Result<Self::Home>;

    /// An entry is about to be made. What this fails with is why it is not.
    fn may_map(&self) -> Result;

    /// `entries` entries were made.
    fn mapped(&self, entries: usize);

    /// The device accesses page `index` of its memory.
    fn accessed(&self, index: usize);

    /// An invalidation found something in a device page table.
    fn invalidated(&self);
}

/// What is under a mirror's lock.
struct State<T: Table> {
    /// An entry of the driver's copy is what was [`Seen`] there: a page frame number and the flags
    /// `VALID`, and `WRITE` or `EXCLUSIVE`.
    tree: Tree<T::Home>,
    /// The epoch in which the tree was begun: in another, the device's copy is lost.
    epoch: u64,
    /// How often entries were made.
    generation: u64,
    /// How often a page was taken for the device alone, of which the notifier's number does not tell.
    taken: u64,
    invalidations: u64,
    /// Entries that were made.
    mapped: u64,
    /// Entries have gone while the device may have been using them, and nobody waited for it.
    strays: bool,
    notes: T::Notes,
}

/// The beginning of a look: see [`Mirror::begin`].
pub(crate) struct Begun {
    seq: usize,
    generation: u64,
    taken: u64,
}

/// What it takes to look at pages such that the answer can be used: taken in this order.
pub(crate) struct Look<'a, T: Table> {
    /// [`Mirror::begin`].
    pub(crate) begun: &'a Begun,
    /// The mmap lock.
    pub(crate) lock: &'a ReadLocked<'a>,
    /// The device.
    pub(crate) map: &'a PageMap<T>,
}

/// An address space as one device sees it.
///
/// # Invariants
///
/// - `raw` is registered (`mmu_interval_notifier_insert`) for all of user space.
/// - While the lock of `state` is held, the page that an entry of the tree names is mapped at the
///   entry's address in the address space, writable if the entry has `WRITE`, and for devices only if
///   it has `EXCLUSIVE`: so it is valid. It is
///   directly mapped system memory, or a page of the page map that `gate` leads to.
#[pin_data(PinnedDrop)]
pub(crate) struct Mirror<T: Table> {
    #[pin]
    raw: Opaque<bindings::mmu_interval_notifier>,
    gate: Arc<Gate<PageMap<T>>>,
    /// What of the device's memory is its own: then it has entries for that only, and nodes in that only.
    own: SetOnce<Arc<T::Own>>,
    #[pin]
    state: Mutex<State<T>>,
}

// SAFETY: A notifier may be removed from any task, and all else in it is `Send`.
unsafe impl<T: Table> Send for Mirror<T> {}
// SAFETY: The methods may be called from several tasks at a time.
unsafe impl<T: Table> Sync for Mirror<T> {}

/// What a page is wanted for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// Reading.
    Read,
    /// Writing, and reading.
    Write,
}

/// What an entry is wanted for.
#[derive(Clone, Copy)]
pub(crate) struct Want {
    pub(crate) access: Access,
    /// It shall allow no more than that, even if the page does.
    pub(crate) no_more: bool,
}

/// Where a page is that [`Mirror::map`] was asked for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mapped {
    /// In the memory of the device, with an entry.
    Device,
    /// In system memory, with an entry.
    System,
    /// Where the device can never reach it: memory without a direct mapping (`memfd_secret`).
    Never,
}

/// A device's access that ended for want of an entry that allows it.
#[derive(Clone, Copy)]
pub(crate) struct Miss {
    /// The word that the device found for the page, if there was a place for one.
    pub(crate) word: u64,
}

/// What a device page table is, at one moment.
pub(crate) struct Shape {
    pub(crate) levels: u32,
    pub(crate) root: Option<u64>,
    pub(crate) nodes: usize,
    pub(crate) entries: usize,
    pub(crate) invalidations: u64,
    /// Entries that were ever made.
    pub(crate) mapped: u64,
}

impl<T: Table> Mirror<T> {
    const OPS: &'static bindings::mmu_interval_notifier_ops =
        &bindings::mmu_interval_notifier_ops {
            invalidate: Some(Self::invalidate),
            invalidate_start: None,
            invalidate_finish: None,
        };

    /// Mirrors `mm`, for which its lock is taken for writing, for the device behind `gate`.
    ///
    /// Fails with `EINTR` if a signal comes, and with `ENOMEM`.
    pub(crate) fn new(
        mm: &MmWithUser,
        gate: Arc<Gate<PageMap<T>>>,
    ) -> impl PinInit<Self, Error> + '_ {
        try_pin_init!(Self {
            gate,
            own: SetOnce::new(),
            state <- new_mutex!(State {
                tree: Tree::new(user_end()),
                epoch: 0,
                generation: 0,
                taken: 0,
                invalidations: 0,
                mapped: 0,
                strays: false,
                notes: T::Notes::default(),
            }),
            // Last, since from here on the kernel calls. There are no entries yet.
            // INVARIANT: Registered if this returns `Ok`.
            raw <- Opaque::try_ffi_init(|raw| {
                // SAFETY: `raw` is pinned until `drop` has removed it; the address space has users.
                to_result(unsafe { bindings::hmm_gpu_mmu_interval_insert(raw, mm.as_raw(), 0, user_end(), Self::OPS) })
            }),
        })
    }

    /// # Safety
    ///
    /// Called by the kernel as `mmu_interval_notifier_ops::invalidate`, for the notifier of a
    /// `Mirror<T>`.
    unsafe extern "C" fn invalidate(
        raw: *mut bindings::mmu_interval_notifier,
        range: *const bindings::mmu_notifier_range,
        seq: c_ulong,
    ) -> bool {
        // SAFETY: The notifier is in a `Mirror<T>`, which removes it before it goes. The range is
        // valid for the call.
        let (this, start, end, blockable, unmap) = unsafe {
            (
                &*kernel::container_of!(
                    raw.cast::<Opaque<bindings::mmu_interval_notifier>>(),
                    Self,
                    raw
                ),
                (*range).start,
                (*range).end,
                (*range).flags & bindings::MMU_NOTIFIER_RANGE_BLOCKABLE != 0,
                matches!(
                    (*range).event,
                    bindings::mmu_notifier_event_MMU_NOTIFY_UNMAP
                        | bindings::mmu_notifier_event_MMU_NOTIFY_RELEASE
                ),
            )
        };
        // SAFETY: The range is valid for the call.
        let event = unsafe { (*range).event };
        // SAFETY: The same goes for its address space.
        let writer = || blockable && unsafe { bindings::hmm_gpu_holds_mmap_lock((*range).mm) };
        if let Some(own) = this.own.as_ref().filter(|own| own.is_busy() && writer()) {
            if this.has_to_settle(event, start, end) {
                own.settle();
            }
        }
        // From `exclusive` of this mirror, which has to know of everything else that changes meanwhile.
        // SAFETY: The range is valid for the call.
        let own = unsafe {
            (*range).event == bindings::mmu_notifier_event_MMU_NOTIFY_EXCLUSIVE
                && (*range).owner == raw.cast()
        };
        // Once the device is gone nobody reads its copy.
        let map = this.gate.enter().ok();
        let state = if blockable {
            Some(this.state.lock())
        } else {
            this.state.try_lock()
        };
        let Some(mut state) = state else {
            return false;
        };
        if own {
            state.taken += 1;
        } else {
            // SAFETY: The kernel calls this for a registered notifier, between its own start and
            // end, and the lock is held that those who read the number hold.
            unsafe { bindings::hmm_gpu_mmu_interval_set_seq(raw, seq) };
        }
        let current = map.as_ref().filter(|map| map.data().epoch() == state.epoch);
        let store = current.map(|map| map.data().store());
        // What is unmapped may be so for good; what only changes comes back.
        let (cleared, retired) = if unmap {
            T::unmapped(&mut state.notes, start, end);
            let (cleared, retired) = state.tree.prune(start, end, store);
            (cleared, Some(retired))
        } else {
            (state.tree.clear(start, end, store), None)
        };
        if cleared > 0 {
            let busy = this.own.as_ref().is_some_and(|own| own.is_busy());
            state.strays |= busy && !unmap;
            state.invalidations += 1;
            if let Some(map) = &map {
                map.data().invalidated();
            }
        }
        drop(state);
        if cleared > 0 || retired.as_ref().is_some_and(|retired| retired.count() > 0) {
            // The device sees that they are gone before it sees anything that is written to the
            // pages they named, or were in: those writes go the same way, after this.
            Written::wait();
        }
        // Not under the lock. This frees memory and takes spinlocks, as may be done anywhere.
        drop(retired);
        true
    }

    /// Whether the device has to come to rest before an event, of who holds the mmap lock for writing: because it may write to what
    /// is to be shared (`fork`), or to be read only.
    fn has_to_settle(&self, event: bindings::mmu_notifier_event, start: usize, end: usize) -> bool {
        match event {
            // Only `fork` does this with the lock. It waits before it has shared anything: later, who is to bring the device to
            // rest might touch what is shared by then, and would have to wait for it in turn.
            bindings::mmu_notifier_event_MMU_NOTIFY_PROTECTION_PAGE => true,
            bindings::mmu_notifier_event_MMU_NOTIFY_PROTECTION_VMA => {
                let state = self.state.lock();
                state.strays || state.tree.has_any(start, end)
            }
            _ => false,
        }
    }

    /// Has the mirror have a part of the device's memory to itself. Fails with `EBUSY` if it has nodes elsewhere.
    pub(crate) fn set_own(&self, own: Arc<T::Own>) -> Result {
        let state = self.state.lock();
        if state.tree.nodes() > 0 || !self.own.populate(own) {
            return Err(EBUSY);
        }
        Ok(())
    }

    /// The device begins to use what the table says, without asking: `then` says so, under the lock.
    pub(crate) fn begin_use<R>(&self, then: impl FnOnce() -> R) -> R {
        let mut state = self.state.lock();
        state.strays = false;
        then()
    }

    /// What the device's entry says for an entry of the tree.
    fn word(&self, map: &PageMap<T>, entry: Seen) -> u64 {
        word(map, self.own.as_ref().map(|own| own.pages()), entry)
    }

    /// Takes the lock, to use the tree.
    ///
    /// Fails with `ENODEV` if `map` is not what the gate leads to, which it does no longer once the
    /// device goes: from then on invalidations do not reach the device's copy.
    fn lock(&self, map: &PageMap<T>) -> Result<Guard<'_, State<T>, MutexBackend>> {
        loop {
            let mut state = self.state.lock();
            if !self.gate.leads_to(map) {
                return Err(ENODEV);
            }
            let epoch = map.data().epoch();
            if state.epoch == epoch {
                return Ok(state);
            }
            // The tree is of the past.
            state.epoch = epoch;
            let tree = core::mem::replace(&mut state.tree, Tree::new(user_end()));
            drop(state);
            drop(tree);
        }
    }

    /// Reads or changes what else is kept of the address space. Nothing may be allocated or waited for.
    pub(crate) fn notes<R>(&self, then: impl FnOnce(&mut T::Notes) -> R) -> R {
        then(&mut self.state.lock().notes)
    }

    /// Whether this is a mirror of `mm`.
    fn is_of(&self, mm: &MmWithUser) -> bool {
        // SAFETY: Registered, so its address space is valid to compare.
        unsafe { (*self.raw.get()).mm == mm.as_raw() }
    }

    /// Looks at `seen.len()` pages from `start` on, with the mmap lock held. Nothing is faulted in.
    ///
    /// The answer was true at one moment for each page. Fails with `EBUSY` if the address space
    /// kept changing.
    pub(crate) fn look(&self, lock: &ReadLocked<'_>, start: usize, seen: &mut [Seen]) -> Result {
        const ATTEMPTS: usize = 64;

        for _ in 0..ATTEMPTS {
            // Not `mmu_interval_read_begin`, which waits until nobody changes the address space:
            // for ever, if others see to that.
            // SAFETY: The notifier is registered.
            let seq = unsafe { bindings::hmm_gpu_mmu_interval_seq(self.raw.get()) };
            match self.look_since(seq, lock, start, seen) {
                Err(error) if error == EBUSY => continue,
                result => return result,
            }
        }
        Err(EBUSY)
    }

    /// Looks, as [`Mirror::look`] does. Fails with `EBUSY` if `seq` is not the number any more.
    fn look_since(
        &self,
        seq: usize,
        lock: &ReadLocked<'_>,
        start: usize,
        seen: &mut [Seen],
    ) -> Result {
        if !self.is_of(lock.mm()) {
            return Err(EINVAL);
        }
        seen.fill(Seen(0));
        let mut range = bindings::hmm_range {
            notifier: self.raw.get(),
            notifier_seq: seq,
            start,
            end: start + seen.len() * PAGE_BYTES,
            hmm_pfns: seen.as_mut_ptr().cast(),
            default_flags: 0,
            pfn_flags_mask: 0,
            dev_private_owner: T::owner().as_raw(),
        };
        // SAFETY: The lock is held and the array has a word for each page of the range.
        to_result(unsafe { bindings::hmm_range_fault(&mut range) })?;
        // Where a range begins with a folio, the kernel is right.
        if start % (PAGE_BYTES << MAX_ORDER) != 0 {
            for (i, seen) in seen.iter_mut().enumerate() {
                *seen = seen.at(start + i * PAGE_BYTES);
            }
        }
        Ok(())
    }

    /// Begins a look whose answer must be true when it is used.
    ///
    /// Waits until nobody changes the address space (`mmu_interval_read_begin`), which may be long:
    /// no lock may be held, and nothing be lent.
    pub(crate) fn begin(&self) -> Begun {
        // Before the number: an entry that was made before is for what was there at the look.
        let (generation, taken) = {
            let state = self.state.lock();
            (state.generation, state.taken)
        };
        Begun {
            // SAFETY: The notifier is registered.
            seq: unsafe { bindings::mmu_interval_read_begin(self.raw.get()) },
            generation,
            taken,
        }
    }

    /// Looks at pages, and has `visit` see what was there at the same moment: in the address space,
    /// and in the device page table.
    ///
    /// What was seen was there at one moment for all pages. Something may have come since to where
    /// nothing was, or more may be allowed since, for that is told to nobody.
    ///
    /// Fails with `EBUSY` if the address space or the table has changed since it was begun.
    pub(crate) fn snapshot(
        &self,
        look: Look<'_, T>,
        start: usize,
        seen: &mut [Seen],
        mut visit: impl FnMut(usize, Seen, Option<Seen>),
    ) -> Result {
        self.when_stable(&look, start, seen, |state, seen| {
            if state.generation != look.begun.generation {
                return Err(EBUSY);
            }
            for (i, seen) in seen.iter().enumerate() {
                let entry = state.tree.get(start + i * PAGE_BYTES);
                // CAST: An entry is a word.
                visit(i, *seen, (entry != 0).then_some(Seen(entry as usize)));
            }
            Ok(())
        })
    }

    /// Looks at pages, and calls `then` under the lock while what was seen is true.
    ///
    /// Fails with `EBUSY` if the address space has changed since it was begun.
    fn when_stable<R>(
        &self,
        look: &Look<'_, T>,
        start: usize,
        seen: &mut [Seen],
        then: impl FnOnce(&mut State<T>, &[Seen]) -> Result<R>,
    ) -> Result<R> {
        self.look_since(look.begun.seq, look.lock, start, seen)?;
        let mut state = self.lock(look.map)?;
        // SAFETY: The notifier is registered and the lock is held.
        let retry =
            unsafe { bindings::hmm_gpu_mmu_interval_read_retry(self.raw.get(), look.begun.seq) };
        if retry || state.taken != look.begun.taken {
            return Err(EBUSY);
        }
        then(&mut state, seen)
    }

    /// Faults in the pages of `[start, end)`, which are page aligned, as the CPU would: they come to
    /// system memory (`hmm_range_fault_unlocked_timeout`). `scratch` has a place for each.
    ///
    /// May wait for user space without limit, until the task is killed: no lock may be held, and
    /// nothing be lent.
    ///
    /// Fails with `EFAULT` if nothing is mapped or it cannot be read, with `EPERM` if it cannot be
    /// written to, with `EBUSY` if the address space kept changing for a second, with `ENOMEM` and
    /// `EINTR`. Then some of the pages may have been faulted in.
    pub(crate) fn fault_in(
        &self,
        mm: &MmWithUser,
        start: usize,
        end: usize,
        access: Access,
        scratch: &mut [Seen],
    ) -> Result {
        let pages = end.checked_sub(start).ok_or(EINVAL)? / PAGE_BYTES;
        let scratch = scratch.get_mut(..pages).ok_or(EINVAL)?;
        if !self.is_of(mm) {
            return Err(EINVAL);
        }
        if end > user_end() {
            return Err(EFAULT);
        }
        scratch.fill(Seen(0));
        let mut range = bindings::hmm_range {
            notifier: self.raw.get(),
            notifier_seq: 0,
            start,
            end,
            hmm_pfns: scratch.as_mut_ptr().cast(),
            default_flags: match access {
                Access::Read => REQ_FAULT,
                Access::Write => REQ_FAULT | REQ_WRITE,
            },
            pfn_flags_mask: 0,
            // Nobody's: a page on a device that is asked for here is one that cannot be used there.
            dev_private_owner: core::ptr::null_mut(),
        };
        // SAFETY: The notifier is registered, its address space has users, and the array has a word
        // for each page of the range.
        to_result(unsafe { bindings::hmm_gpu_range_fault(&mut range) })
    }

    /// Has the device page table have a root.
    ///
    /// Fails with `EAGAIN` as long as the device's memory cannot be used, with `ENOMEM`, and as
    /// [`Table::home`].
    pub(crate) fn root(&self, map: &PageMap<T>) -> Result {
        let (root, epoch, levels, own) = {
            let state = self.lock(map)?;
            let own = self.own.as_ref();
            (state.tree.root(), state.epoch, state.tree.levels(), own)
        };
        if root.is_some() {
            return Ok(());
        }
        if epoch % 2 != 0 {
            return Err(EAGAIN);
        }
        let home = T::home(&self.gate, map, own.map(|own| &**own))?;
        let node = Node::new(home, levels - 1, GFP_KERNEL_ACCOUNT)?;
        let mut state = self.lock(map)?;
        if state.epoch != epoch || self.own.as_ref().is_some() != own.is_some() {
            return Err(EAGAIN);
        }
        state.tree.plant(node, map.data().store());
        Ok(())
    }

    /// Has the device page table have nodes for the 2 MiB that `addr` is in. Fails as
    /// [`Mirror::root`].
    ///
    /// They may be gone again when something was unmapped there since.
    pub(crate) fn prepare(&self, map: &PageMap<T>, addr: usize) -> Result {
        // What was cleared leaves empty nodes, for what comes back. So many of them.
        const EMPTY_NODES: usize = 64;

        let (missing, epoch, own, retired) = {
            let mut state = self.lock(map)?;
            let retired = state.tree.compact(EMPTY_NODES, map.data().store());
            let own = self.own.as_ref();
            (state.tree.missing(addr), state.epoch, own, retired)
        };
        Written::wait();
        drop(retired);
        if missing == 0 {
            return Ok(());
        }
        if epoch % 2 != 0 {
            return Err(EAGAIN);
        }
        let mut spare = Spare::new(missing, GFP_KERNEL_ACCOUNT, || {
            T::home(&self.gate, map, own.map(|own| &**own))
        })?;
        let mut state = self.lock(map)?;
        let same = state.epoch == epoch && self.own.as_ref().is_some() == own.is_some();
        // What was made may have been lost, or be too little by now: then the caller comes again.
        if same && state.tree.missing(addr) <= missing {
            state.tree.grow(addr, &mut spare, map.data().store())?;
        }
        // Before what was not needed is given back.
        drop(state);
        Ok(())
    }

    /// Gives back the nodes for the 2 MiB that `addr` is in, if there are no entries in them.
    pub(crate) fn trim(&self, map: &PageMap<T>, addr: usize) {
        let retired = self
            .lock(map)
            .map(|mut state| state.tree.trim(addr, map.data().store()));
        Written::wait();
        drop(retired);
    }

    /// Looks at pages, with the mmap lock held, and makes entries for those that are there for what
    /// is wanted of them: in system memory, or in the memory of the device. `done` is called with
    /// the number of each, and of those that the device can never have. Nothing is faulted in.
    ///
    /// All of them are in the same 2 MiB. Without nodes for those (see [`Mirror::prepare`]) nothing
    /// is done. Fails with `EBUSY` if the address space has changed since it was begun.
    pub(crate) fn map(
        &self,
        look: Look<'_, T>,
        start: usize,
        seen: &mut [Seen],
        wanted: impl Fn(usize, Seen) -> Option<Want>,
        mut done: impl FnMut(usize, Mapped),
    ) -> Result {
        let map = look.map;
        let store = map.data().store();
        let mut mapped = 0;
        let result = self.when_stable(&look, start, seen, |state, seen| {
            let Some(mut window) = state.tree.window(start) else {
                return Ok(());
            };
            let mut result = Ok(());
            for (i, seen) in seen.iter().enumerate() {
                let Some((want, pfn)) = wanted(i, *seen).zip(seen.pfn()) else {
                    continue;
                };
                if want.access == Access::Write && !seen.is_writable() {
                    continue;
                }
                let read_only = want.access == Access::Read && want.no_more;
                let allowed = if read_only { VALID } else { VALID | WRITE };
                // INVARIANT: As just seen, or less; `prepare_page` checks the rest.
                let entry = Seen(seen.0 & allowed | pfn);
                let word = self.word(map, entry);
                // SAFETY: What was seen is true, so the page is mapped and cannot go while the lock
                // is held.
                match unsafe { prepare_page(word, pfn) } {
                    Prepared::Ready => (),
                    Prepared::Elsewhere => continue,
                    Prepared::Never => {
                        done(i, Mapped::Never);
                        continue;
                    }
                }
                // CAST: A word.
                let entry = entry.0 as u64;
                let addr = start + i * PAGE_BYTES;
                if window.get(addr) != entry {
                    result = map
                        .data()
                        .may_map()
                        .and_then(|()| window.set(addr, entry, word, store));
                    if result.is_err() {
                        break;
                    }
                    mapped += 1;
                }
                let system = word & HMM_GPU_PTE_SYSTEM != 0;
                done(
                    i,
                    if system {
                        Mapped::System
                    } else {
                        Mapped::Device
                    },
                );
            }
            if mapped > 0 {
                state.generation += 1;
                // CAST: Widens.
                state.mapped += mapped as u64;
            }
            Written::wait();
            result
        });
        map.data().mapped(mapped);
        result
    }

    /// What the device page table is now.
    pub(crate) fn shape(&self, map: &PageMap<T>) -> Result<Shape> {
        let state = self.lock(map)?;
        Ok(Shape {
            levels: state.tree.levels(),
            root: state.tree.root(),
            nodes: state.tree.nodes(),
            entries: state.tree.entries(),
            invalidations: state.invalidations,
            mapped: state.mapped,
        })
    }
}

/// What the device's entry says for an entry of the tree: a page of system memory, or of `map`. For who reaches `own` of it only, all
/// else is as system memory is.
fn word<T: Ops>(map: &PageMap<T>, own: Option<Range<usize>>, entry: Seen) -> u64 {
    let access = if entry.is_writable() {
        HMM_GPU_PTE_VALID | HMM_GPU_PTE_WRITABLE
    } else if entry.is_exclusive() {
        HMM_GPU_PTE_VALID | HMM_GPU_PTE_EXCLUSIVE
    } else {
        HMM_GPU_PTE_VALID
    };
    let index = map.index_of(entry.0 & !FLAGS);
    match index.filter(|index| own.is_none_or(|own| own.contains(index))) {
        // CAST: Widens.
        Some(index) => access | (index * PAGE_BYTES) as u64,
        None => access | HMM_GPU_PTE_SYSTEM,
    }
}

/// Whether the device may have an entry for a page.
enum Prepared {
    /// It may.
    Ready,
    /// The page is on another device.
    Elsewhere,
    /// Nobody but the process may have the page.
    Never,
}

/// Prepares page `pfn` for an entry that says `word`.
///
/// # Safety
///
/// The page is mapped in an address space, and stays so during the call.
unsafe fn prepare_page(word: u64, pfn: usize) -> Prepared {
    if word & HMM_GPU_PTE_SYSTEM != 0 {
        // SAFETY: The page is mapped, so it is valid.
        return match unsafe { bindings::hmm_gpu_reach(pfn) } {
            bindings::hmm_gpu_reach_HMM_GPU_READABLE => Prepared::Ready,
            bindings::hmm_gpu_reach_HMM_GPU_DEVICE => Prepared::Elsewhere,
            _ => Prepared::Never,
        };
    }
    if word & HMM_GPU_PTE_WRITABLE != 0 {
        // The device writes to its memory when it likes: so the content is not to be dropped as one
        // that `MADV_FREE` has given up.
        // SAFETY: As above.
        unsafe { bindings::hmm_gpu_mark_dirty(pfn) };
    }
    Prepared::Ready
}

#[pinned_drop]
impl<T: Table> PinnedDrop for Mirror<T> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: Registered, by the type invariants. Waits for callbacks that run.
        unsafe { bindings::mmu_interval_notifier_remove(self.raw.get()) };
    }
}
