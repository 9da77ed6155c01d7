// SPDX-License-Identifier: GPL-2.0

//! Migrations: `migrate_vma_*` and `migrate_device_*`.
//!
//! C header: `include/linux/migrate.h`.
//!
//! The kernel's three steps are two types. [`Collected`] is what `migrate_vma_setup` (or
//! `migrate_device_pfns`) leaves: pages locked and unmapped, and whoever touches one waits. The
//! caller looks at each [`Source`], and gives a destination that it has written to those that shall
//! move. [`Collected::commit`] is `migrate_vma_pages`: it makes a [`Moved`], which says what moved.
//! Dropping either one is `migrate_vma_finalize`: so no toucher waits for ever, whatever path is
//! taken.

use crate::{
    hmm::{
        folio::{self, Filled, LockedFolio, SourceFolio},
        pagemap::{Ops, PageMap, MAX_ORDER},
        vma::LockedVma,
        PAGE_BYTES, PAGE_SHIFT,
    },
    sys::{bindings, mapping::Written},
};
use core::{
    marker::PhantomData,
    mem::ManuallyDrop,
    ops::{ControlFlow, Range},
    ptr::NonNull,
};
use kernel::{
    error::to_result,
    mm::{virt::VmaRef, Mm},
    prelude::*,
    sync::aref::ARef,
    time::{Instant, Monotonic},
};

const VALID: usize = bindings::MIGRATE_PFN_VALID as usize;
const MIGRATE: usize = bindings::MIGRATE_PFN_MIGRATE as usize;
const COMPOUND: usize = bindings::MIGRATE_PFN_COMPOUND as usize;
const WRITE: usize = bindings::MIGRATE_PFN_WRITE as usize;
const SHIFT: u32 = bindings::MIGRATE_PFN_SHIFT;

const SELECT_SYSTEM: c_ulong = bindings::migrate_vma_direction_MIGRATE_VMA_SELECT_SYSTEM as c_ulong;
const SELECT_DEVICE: c_ulong =
    bindings::migrate_vma_direction_MIGRATE_VMA_SELECT_DEVICE_PRIVATE as c_ulong;
const SELECT_COHERENT: c_ulong =
    bindings::migrate_vma_direction_MIGRATE_VMA_SELECT_DEVICE_COHERENT as c_ulong;
const SELECT_COMPOUND: c_ulong =
    bindings::migrate_vma_direction_MIGRATE_VMA_SELECT_COMPOUND as c_ulong;

/// The page frame number in an entry, if it has one.
fn pfn_of(entry: usize) -> Option<usize> {
    (entry & VALID != 0).then_some(entry >> SHIFT)
}

/// Which pages a migration of a range collects.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Select {
    /// Pages of system memory, and places where anonymous memory was never touched.
    System,
    /// Device-private pages of any page map with the given owner (and untouched places, which the
    /// kernel always reports).
    Device,
    /// The same of device-coherent pages.
    Coherent,
}

/// What a migration does about large folios (of 2 MiB).
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Grain {
    /// Those that are wholly in the range, and mapped as such, move whole; so do 2 MiB of nothing.
    /// The others are split.
    Large,
    /// All are split.
    Page,
}

/// Room for the entries of a migration: two words a page, and the same again for more than one.
///
/// Why so much: when `migrate_vma_collect_pmd` has split a large folio and finds that a racing
/// `MADV_DONTNEED` has freed the page table, it starts over and reports the whole range once more,
/// behind what it has reported, whether or not there is room (`goto again`, 7.3). What lies behind
/// the range's own entries is never used.
pub(crate) struct Entries<'a> {
    src: &'a mut [usize],
    dst: &'a mut [usize],
}

impl<'a> Entries<'a> {
    /// Words in each of the two arrays for a migration of `pages` pages.
    pub(crate) const fn words(pages: usize) -> usize {
        if pages > 1 {
            2 * pages
        } else {
            pages
        }
    }

    /// Room for as many pages as [`Entries::words`] says of the shorter of the two.
    pub(crate) fn new(src: &'a mut [usize], dst: &'a mut [usize]) -> Self {
        Self { src, dst }
    }

    fn has_room_for(&self, pages: usize) -> bool {
        Self::words(pages) <= self.src.len().min(self.dst.len())
    }
}

/// How the kernel is told about a migration.
enum Kind {
    /// Of a range of a mapping: `migrate_vma_*`. The arrays it names are those of the [`State`].
    Vma(bindings::migrate_vma),
    /// Of device pages, wherever they are mapped: `migrate_device_*`.
    Device,
}

/// The entries of a migration under way.
///
/// # Invariants
///
/// - The first `pages` entries of `src` and `dst` belong to a migration that was set up and not
///   finalized.
/// - Such an entry of `src` with `VALID` is a page that is locked and referenced for this
///   migration. Its folio is unmapped if it has `MIGRATE` too.
/// - An entry of `dst` that is not zero is one of the first `pages`, and a [`LockedFolio`] given to
///   this migration.
/// - Device-private pages among the sources belong to a `PageMap<T>`.
struct State<'a, T: Ops> {
    kind: Kind,
    entries: Entries<'a>,
    pages: usize,
    began: Instant<Monotonic>,
    data: PhantomData<(LockedVma<'a>, &'a PageMap<T>)>,
}

impl<T: Ops> State<'_, T> {
    /// What entry `i` names, if it may move or has moved. A large folio is found at its first page, and nothing at its others.
    fn source(&self, i: usize) -> Option<Source<'_, T>> {
        let entry = *self.entries.src.get(..self.pages)?.get(i)?;
        if entry & MIGRATE == 0 {
            return None;
        }
        let Some(pfn) = pfn_of(entry) else {
            let order = if entry & COMPOUND != 0 { MAX_ORDER } else { 0 };
            return self.may_be_at(i, order).then_some(Source::Hole { order });
        };
        // SAFETY: The page is locked and referenced by the type invariants, for as long as `self`
        // is borrowed: giving a destination, committing and finalizing all need more than `&self`.
        unsafe {
            let folio::Sort {
                order,
                map,
                may_move,
            } = folio::sort_of(pfn);
            if !may_move || !self.may_be_at(i, order) {
                return None;
            }
            match map {
                None => Some(Source::System(SourceFolio::from_pfn(pfn, order))),
                Some(raw) => {
                    let map = PageMap::<T>::from_raw(raw.as_ptr());
                    let index = map.index_of(pfn)?;
                    Some(Source::Device { map, index, order })
                }
            }
        }
    }

    /// Whether a large folio that is reported at entry `i` is what is there in the range. What the
    /// kernel reports a second time (see [`Entries`]) is at some other entry.
    fn may_be_at(&self, i: usize, order: u32) -> bool {
        let pages = 1usize << order;
        let first = match &self.kind {
            Kind::Vma(args) => args.start >> PAGE_SHIFT,
            // Those are wherever there was room.
            Kind::Device => return i + pages <= self.pages,
        };
        (first + i) % pages == 0 && i + pages <= self.pages
    }

    /// Whether device pages may be among the sources.
    fn may_be_of_device(&self) -> bool {
        match &self.kind {
            Kind::Vma(args) => args.flags & SELECT_SYSTEM == 0,
            Kind::Device => true,
        }
    }

    /// Has the kernel do a step: with its arguments for a range, or with the arrays and their
    /// length for device pages. The arrays are named anew, since this value may have moved.
    fn step(
        &mut self,
        range: impl FnOnce(&mut bindings::migrate_vma),
        device: impl FnOnce(*mut usize, *mut usize, usize),
    ) {
        let (src, dst) = (self.entries.src.as_mut_ptr(), self.entries.dst.as_mut_ptr());
        match &mut self.kind {
            Kind::Vma(args) => {
                (args.src, args.dst) = (src, dst);
                range(args);
            }
            Kind::Device => device(src, dst, self.pages),
        }
    }

    /// `migrate_vma_pages`, `migrate_device_pages`.
    fn pages(&mut self) {
        self.step(
            // SAFETY: Set up and not finalized, by the type invariants.
            |args| unsafe { bindings::migrate_vma_pages(args) },
            // SAFETY: As above. Without a mapping no source is a hole.
            |src, dst, pages| unsafe { bindings::migrate_device_pages(src, dst, pages) },
        );
    }

    /// `migrate_vma_finalize`, `migrate_device_finalize`. To be called once, last.
    fn finalize(&mut self) {
        self.step(
            // SAFETY: Set up and not finalized, by the type invariants; drops call this once.
            |args| unsafe { bindings::migrate_vma_finalize(args) },
            // SAFETY: As above.
            |src, dst, pages| unsafe { bindings::migrate_device_finalize(src, dst, pages) },
        );
    }
}

/// A migration that is set up: its pages are locked and unmapped, and nothing has moved.
///
/// Dropped as it is, it puts everything back where it was.
pub(crate) struct Collected<'a, T: Ops> {
    state: State<'a, T>,
}

/// Where a page that may move is now.
pub(crate) enum Source<'a, T: Ops> {
    /// Nowhere: anonymous memory that was never touched. Its content is zeroes.
    Hole {
        /// log2 of the number of pages.
        order: u32,
    },
    /// In system memory.
    System(SourceFolio<'a>),
    /// In device memory: page `index` of `map`, the first of a folio of `1 << order` pages.
    Device {
        /// The page map it is in.
        map: &'a PageMap<T>,
        /// Counted in pages from the start of that device's memory.
        index: usize,
        /// log2 of the number of pages.
        order: u32,
    },
}

impl<T: Ops> Source<'_, T> {
    /// log2 of the number of pages that it is.
    pub(crate) fn order(&self) -> u32 {
        match self {
            Source::System(folio) => folio.order(),
            Source::Hole { order } | Source::Device { order, .. } => *order,
        }
    }
}

impl<'a, T: Ops> Collected<'a, T> {
    /// Sets up a migration of `[start, end)`, which must be inside `vma` and fit in `entries`
    /// (`migrate_vma_setup`).
    ///
    /// Fails with `EINVAL` for a range that is empty, too long or not
    /// inside the mapping, and for mappings that do not migrate (hugetlb, DAX, I/O and PFN
    /// mappings).
    pub(crate) fn range(
        vma: LockedVma<'a>,
        start: usize,
        end: usize,
        select: Select,
        grain: Grain,
        entries: Entries<'a>,
    ) -> Result<Self> {
        let mut flags = match select {
            Select::System => SELECT_SYSTEM,
            Select::Device => SELECT_DEVICE,
            Select::Coherent => SELECT_COHERENT,
        };
        if grain == Grain::Large {
            flags |= SELECT_COMPOUND;
        }
        let no_fault = core::ptr::null_mut();
        // SAFETY: The mapping is under the mmap lock for `'a`, and nothing faults here.
        unsafe { Self::setup(vma.as_ptr(), start, end, flags, no_fault, entries) }
    }

    /// Sets up a migration of those live folios among `pages` of `map` that are `wanted` (it is given
    /// the index of the first page and the order), wherever they are mapped
    /// (`migrate_device_pfns`): as many as `entries` has room for. Returns the page after the last
    /// that was looked at, too.
    ///
    /// Folios that are busy or gone by now have no source.
    pub(crate) fn live(
        map: &'a PageMap<T>,
        pages: Range<usize>,
        wanted: impl Fn(usize, u32) -> bool,
        entries: Entries<'a>,
    ) -> (Self, usize) {
        let began = Instant::now();
        let room = entries.src.len().min(entries.dst.len());
        let (mut used, mut next) = (0, pages.start);
        for (index, order) in map.live_folios(pages) {
            let pages = 1usize << order;
            if !wanted(index, order) {
                next = index + pages;
                continue;
            }
            if used + pages > room {
                break;
            }
            for (i, entry) in entries.src.iter_mut().skip(used).take(pages).enumerate() {
                *entry = map.first_pfn() + index + i;
            }
            used += pages;
            next = index + pages;
        }
        entries.dst.fill(0);
        // SAFETY: `src` has `used` page frame numbers of the map's pages, which have a `struct
        // page` since the map is registered. It cannot fail: it returns 0 always.
        unsafe { bindings::migrate_device_pfns(entries.src.as_mut_ptr(), used) };
        // A migration unlocks what it has moved before it gives up its reference (`__migrate_device_finalize`): who was waiting
        // for that lock with a reference of its own would move the folio, which is nobody's any more, a second time.
        for entry in entries.src.iter_mut().take(used) {
            let index = pfn_of(*entry).and_then(|pfn| map.index_of(pfn));
            if index.is_some_and(|index| map.is_moved(index)) {
                *entry &= !MIGRATE;
            }
        }
        // INVARIANT: Just set up; no destination has been given; the pages are all of `map`, a
        // `PageMap<T>`.
        let state = State {
            kind: Kind::Device,
            entries,
            pages: used,
            began,
            data: PhantomData,
        };
        (Self { state }, next)
    }

    /// # Safety
    ///
    /// `vma` is under the mmap lock for `'a`. `fault_page` is null, or the locked and referenced
    /// device-private page of a fault in the range.
    unsafe fn setup(
        vma: *mut bindings::vm_area_struct,
        start: usize,
        end: usize,
        flags: c_ulong,
        fault_page: *mut bindings::page,
        entries: Entries<'a>,
    ) -> Result<Self> {
        let began = Instant::now();
        let pages = end.checked_sub(start).ok_or(EINVAL)? / PAGE_BYTES;
        if pages == 0 || !entries.has_room_for(pages) {
            return Err(EINVAL);
        }
        entries.dst.fill(0);
        let mut args = bindings::migrate_vma {
            vma,
            dst: entries.dst.as_mut_ptr(),
            src: entries.src.as_mut_ptr(),
            cpages: 0,
            npages: 0,
            start,
            end,
            pgmap_owner: T::owner().as_raw(),
            flags,
            fault_page,
        };
        // SAFETY: The mapping is locked, and the arrays have all the room that the kernel may use:
        // see `Entries`.
        to_result(unsafe { bindings::migrate_vma_setup(&mut args) })?;
        // INVARIANT: Set up; no destination has been given. The kernel collects device-private
        // pages of the owner `T::owner()` only, which are those of a `PageMap<T>`. It may have
        // stopped early: then what follows is zero, as it cleared `src`.
        Ok(Self {
            state: State {
                kind: Kind::Vma(args),
                entries,
                pages,
                began,
                data: PhantomData,
            },
        })
    }

    /// How many pages the migration spans.
    pub(crate) fn pages(&self) -> usize {
        self.state.pages
    }

    /// Where they begin; 0 if they are not of one range.
    pub(crate) fn addr(&self) -> usize {
        match &self.state.kind {
            Kind::Vma(args) => args.start,
            Kind::Device => 0,
        }
    }

    /// When it was about to be set up.
    pub(crate) fn began(&self) -> Instant<Monotonic> {
        self.state.began
    }

    /// How many pages may move that are not of a large folio, at most.
    pub(crate) fn singles(&self) -> usize {
        let entries = self.state.entries.src.iter().take(self.state.pages);
        let single = |entry: &&usize| **entry & (MIGRATE | COMPOUND) == MIGRATE;
        entries.filter(single).count()
    }

    /// Has `fill` look at what is at each page that may move, in turn, until it breaks: and it moves, with the rest of its folio, into
    /// what that gives. `fill` is told the page's number, and whether what is there is the address space's own: nothing is there yet,
    /// or it was mapped writable, which a page that others share copy-on-write never is.
    ///
    /// A folio of another size is given back. To be called once.
    pub(crate) fn fill(
        &mut self,
        mut fill: impl FnMut(usize, Source<'_, T>, bool) -> ControlFlow<(), Option<Filled>>,
    ) {
        for i in 0..self.state.pages {
            let Some(source) = self.state.source(i) else {
                continue;
            };
            let order = source.order();
            let entry = self.state.entries.src.get(i).copied().unwrap_or(VALID);
            let is_own = pfn_of(entry).is_none() || entry & WRITE != 0;
            let folio = match fill(i, source, is_own) {
                ControlFlow::Continue(Some(folio)) if folio.order() == order => folio,
                ControlFlow::Continue(_) => continue,
                ControlFlow::Break(()) => return,
            };
            let place = self.state.entries.dst.get_mut(i);
            if let Some(place) = place.filter(|place| **place == 0) {
                let compound = if order > 0 { COMPOUND } else { 0 };
                // INVARIANT: The folio is given to the migration with its lock and its reference. Since
                // there is a source at `i`, it is one of the migration's entries.
                *place = folio.into_locked().into_pfn() << SHIFT | VALID | compound;
            }
        }
    }

    /// Moves what has a destination (`migrate_vma_pages`, `migrate_device_pages`).
    ///
    /// `written`: what was stored to the destinations is there for everybody.
    pub(crate) fn commit(self, _written: Written) -> Moved<'a, T> {
        let this = ManuallyDrop::new(self);
        // SAFETY: `this` is not used or dropped after this: its state moves to the value returned.
        let mut state = unsafe { core::ptr::read(&this.state) };
        state.pages();
        let mut moved = Moved { state, last: None };
        let last = moved.each_of_device(|map, index, _| map.set_moved(index));
        // INVARIANT: It is that of one of the pages.
        moved.last = last.map(NonNull::from);
        moved
    }
}

impl<T: Ops> Drop for Collected<'_, T> {
    fn drop(&mut self) {
        // Nothing has moved: the destinations must not be taken for the pages' new places.
        for entry in self.state.entries.dst.iter_mut() {
            if let Some(pfn) = pfn_of(core::mem::take(entry)) {
                // SAFETY: The entry was made by `set` from a folio that was given to this
                // migration, and is forgotten here.
                drop(unsafe { LockedFolio::from_pfn(pfn) });
            }
        }
        self.state.finalize();
    }
}

/// A migration whose pages are at their new places, and still locked.
///
/// Dropping it maps them there and unlocks them.
///
/// # Invariants
///
/// `last` is the page map of a page among the sources: it waits for that page before it goes.
pub(crate) struct Moved<'a, T: Ops> {
    state: State<'a, T>,
    last: Option<NonNull<PageMap<T>>>,
}

impl<T: Ops> Moved<'_, T> {
    /// Where what is at its destination now was before, at page `i`.
    ///
    /// What was in system memory can still be read there, and a device page is still in use there.
    pub(crate) fn moved(&self, i: usize) -> Option<Source<'_, T>> {
        let destination = self.state.entries.dst.get(i)?;
        if destination & VALID == 0 {
            return None;
        }
        self.state.source(i)
    }

    /// How much has moved, whatever it was.
    pub(crate) fn count(&self) -> Count {
        let mut count = Count::default();
        let entries = &self.state.entries;
        let each = entries.src.iter().zip(entries.dst.iter());
        for (source, destination) in each.take(self.state.pages) {
            if source & MIGRATE == 0 || destination & VALID == 0 {
                continue;
            }
            // It is of the same size as its destination.
            let is_large = destination & COMPOUND != 0;
            let pages = 1 << if is_large { MAX_ORDER } else { 0 };
            count.pages += pages;
            count.large += usize::from(is_large);
            if source & VALID == 0 {
                count.populated += pages;
            }
        }
        count
    }

    /// Has `visit` see what has moved from a device: its page map, the index of the first page, and the order. Returns the last page map.
    pub(crate) fn each_of_device<'s>(
        &'s self,
        mut visit: impl FnMut(&'s PageMap<T>, usize, u32),
    ) -> Option<&'s PageMap<T>> {
        if !self.state.may_be_of_device() {
            return None;
        }
        // SAFETY: By the type invariants, as long as `self`, which holds the pages.
        let mut last: Option<&'s PageMap<T>> = self.last.map(|map| unsafe { map.as_ref() });
        let entries = &self.state.entries;
        let each = entries.src.iter().zip(entries.dst.iter());
        for (i, (source, destination)) in each.enumerate().take(self.state.pages) {
            if source & MIGRATE == 0 || destination & VALID == 0 {
                continue;
            }
            let order = match destination & COMPOUND {
                0 => 0,
                _ => MAX_ORDER,
            };
            // Most are of one device, and what is known of that need not be asked again.
            let known = last.zip(pfn_of(*source));
            match known.and_then(|(map, pfn)| Some((map, map.index_of(pfn)?))) {
                Some((map, index)) => visit(map, index, order),
                None => {
                    if let Some(Source::Device { map, index, .. }) = self.state.source(i) {
                        visit(map, index, order);
                        last = Some(map);
                    }
                }
            }
        }
        last
    }
}

/// How much a migration has moved.
#[derive(Default)]
pub(crate) struct Count {
    /// Pages.
    pub(crate) pages: usize,
    /// Those of them that were nowhere before.
    pub(crate) populated: usize,
    /// Large folios.
    pub(crate) large: usize,
}

impl<T: Ops> Moved<'_, T> {
    /// Ends the migration, and declares what has moved broken (`memory_failure`): it could not be
    /// read where it was. Who touches it gets `SIGBUS`.
    ///
    /// `scratch` has room for a word for each page. Returns how many pages that were.
    pub(crate) fn fail(self, scratch: &mut [usize]) -> usize {
        let mut count = 0;
        scratch.fill(0);
        for i in 0..self.state.pages {
            let destination = self.state.entries.dst.get(i).copied().unwrap_or(0);
            let Some((source, pfn)) = self.moved(i).zip(pfn_of(destination)) else {
                continue;
            };
            let places = scratch.iter_mut().skip(i).take(1 << source.order());
            places
                .enumerate()
                .for_each(|(page, place)| *place = pfn + page);
        }
        let pages = self.state.pages;
        drop(self);
        for pfn in scratch.iter().take(pages).filter(|pfn| **pfn != 0) {
            // SAFETY: Fine to call for any page frame number, where sleeping is.
            unsafe { bindings::hmm_gpu_memory_failure(*pfn) };
            count += 1;
        }
        count
    }
}

impl<T: Ops> Drop for Moved<'_, T> {
    fn drop(&mut self) {
        self.state.finalize();
    }
}

/// A CPU fault on a device-private page of a `PageMap<T>`.
///
/// # Invariants
///
/// `vmf` is the fault that the kernel is handling now, on this task, with the mmap lock held. Its
/// page is locked and referenced.
pub(crate) struct Fault<'a, T: Ops> {
    vmf: *mut bindings::vm_fault,
    data: PhantomData<&'a PageMap<T>>,
}

impl<'a, T: Ops> Fault<'a, T> {
    /// # Safety
    ///
    /// As the type invariants say, for `'a`.
    pub(super) unsafe fn from_raw(vmf: *mut bindings::vm_fault) -> Self {
        // INVARIANT: By the safety requirements.
        Self {
            vmf,
            data: PhantomData,
        }
    }

    /// log2 of the number of pages that were mapped as one where the CPU touched them.
    ///
    /// A page that is mapped on its own may still be of a large folio.
    pub(crate) fn order(&self) -> u32 {
        // SAFETY: By the type invariants.
        unsafe {
            if (*self.vmf).pte.is_null() {
                folio::order_of(bindings::hmm_gpu_page_to_pfn((*self.vmf).page))
            } else {
                0
            }
        }
    }

    /// The page that was touched, counted in pages from the start of the device's memory; of pages
    /// that are mapped as one, the first.
    pub(crate) fn index(&self, map: &PageMap<T>) -> Option<usize> {
        // SAFETY: By the type invariants.
        map.index_of(unsafe { bindings::hmm_gpu_page_to_pfn((*self.vmf).page) })
    }

    /// The address space in which it was touched.
    pub(crate) fn mm(&self) -> ARef<Mm> {
        // SAFETY: By the type invariants, so the mapping and its address space are valid.
        unsafe { Mm::from_raw((*(*self.vmf).__bindgen_anon_1.vma).vm_mm) }.into()
    }

    /// Has the fault be taken again, for what it waits for may need the mmap lock: so that is let go of
    /// meanwhile (`VM_FAULT_RETRY`). There is no memory for who does not allow that.
    pub(crate) fn come_again(self) -> FaultOutcome {
        // SAFETY: By the type invariants. The caller touches nothing but the folio after
        // `VM_FAULT_RETRY`, and this value is gone.
        if unsafe { bindings::hmm_gpu_fault_retry(self.vmf) } {
            FaultOutcome::Later(Later(()))
        } else {
            FaultOutcome::NoMemory
        }
    }

    /// Has the fault be taken again after `wait`, during which the page is not locked, and the mmap lock not held, if the fault
    /// may let go of it. One that must not wait does not.
    pub(crate) fn wait(self, wait: impl FnOnce()) -> FaultOutcome {
        // SAFETY: By the type invariants.
        if unsafe { bindings::hmm_gpu_fault_nowait(self.vmf) } {
            return self.come_again();
        }
        // SAFETY: As in `come_again`: of what the fault names, only its page is used from here on. That is unlocked for others
        // and locked again, while the fault has a reference to it.
        let unlocked = unsafe {
            let unlocked = bindings::hmm_gpu_fault_retry(self.vmf);
            bindings::hmm_gpu_fault_unlock(self.vmf);
            wait();
            bindings::hmm_gpu_fault_lock(self.vmf);
            unlocked
        };
        if unlocked {
            FaultOutcome::Later(Later(()))
        } else {
            FaultOutcome::Retry
        }
    }

    /// The address that was touched, and the address space as a number.
    pub(crate) fn place(&self) -> (usize, usize) {
        // SAFETY: By the type invariants.
        unsafe {
            let vma = (*self.vmf).__bindgen_anon_1.vma;
            ((*self.vmf).__bindgen_anon_1.address, (*vma).vm_mm.addr())
        }
    }

    /// Sets up a migration of what was touched: `1 << order()` pages, or `pages` from what was touched on,
    /// if that is a page, as far as its mapping goes.
    pub(crate) fn collect(&self, pages: usize, entries: Entries<'a>) -> Result<Collected<'a, T>> {
        // SAFETY: By the type invariants.
        let (vma, address, page) = unsafe {
            (
                (*self.vmf).__bindgen_anon_1.vma,
                (*self.vmf).__bindgen_anon_1.address,
                (*self.vmf).page,
            )
        };
        let order = self.order();
        let len = PAGE_BYTES << order;
        let start = address & !(len - 1);
        let end = if order > 0 {
            start + len
        } else {
            // SAFETY: As above.
            let end = unsafe { VmaRef::from_raw(vma) }.end();
            start.saturating_add(pages.max(1) * PAGE_BYTES).min(end)
        };
        let flags = if order > 0 {
            SELECT_DEVICE | SELECT_COMPOUND
        } else {
            SELECT_DEVICE
        };
        // SAFETY: The fault holds the mmap lock, and its page is locked and referenced, by the type
        // invariants.
        unsafe { Collected::setup(vma, start, end, flags, page, entries) }
    }
}

/// How a CPU fault on a device page ended.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum FaultOutcome {
    /// The page is in system memory, or was busy: the CPU tries again.
    Retry,
    /// There was no system memory (`VM_FAULT_OOM`).
    NoMemory,
    /// The page's content cannot be had (`VM_FAULT_SIGBUS`).
    Lost,
    /// See [`Fault::come_again`].
    Later(Later),
}

/// The mmap lock has been let go of as it has to be, or need not be.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Later(());

impl FaultOutcome {
    pub(super) fn into_raw(self) -> bindings::vm_fault_t {
        match self {
            FaultOutcome::Retry => 0,
            FaultOutcome::NoMemory => bindings::vm_fault_reason_VM_FAULT_OOM,
            FaultOutcome::Lost => bindings::vm_fault_reason_VM_FAULT_SIGBUS,
            FaultOutcome::Later(_) => bindings::vm_fault_reason_VM_FAULT_RETRY,
        }
    }
}
