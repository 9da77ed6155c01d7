// SPDX-License-Identifier: GPL-2.0

//! Device-private pages: `devm_memremap_pages` with `MEMORY_DEVICE_PRIVATE`.
//!
//! C header: `include/linux/memremap.h`.

use crate::{
    hmm::{
        folio::DeviceFolio,
        migrate::{Fault, FaultOutcome},
        PAGE_BYTES, PAGE_SHIFT,
    },
    sys::{bindings, gate::Lend},
};
use core::{marker::PhantomData, ops::Range, ptr::NonNull};
use kernel::{
    container_of,
    device::{Bound, Device},
    error::from_err_ptr,
    faux, pci,
    prelude::*,
    sync::atomic::{Acquire, Atomic, Full, Relaxed, Release},
    types::Opaque,
};

/// What `memremap_pages` wants addresses and lengths to be multiples of, in bytes
/// (`SUBSECTION_SIZE`).
pub(crate) const ALIGN: u64 = 2 << 20;

/// Marks the page maps of one module, and says what type their data has.
///
/// Declare one as a `static`: its address is the mark (`dev_pagemap::owner`).
pub(crate) struct Owner<T> {
    // Not of size zero, so that every static of this type has an address of its own.
    _mark: u8,
    _data: PhantomData<fn(T)>,
}

impl<T> Owner<T> {
    /// A new mark.
    pub(crate) const fn new() -> Self {
        Self {
            _mark: 0,
            _data: PhantomData,
        }
    }

    /// The mark as the kernel wants it.
    pub(super) fn as_raw(&'static self) -> *mut c_void {
        core::ptr::from_ref(self).cast_mut().cast()
    }
}

/// What a driver does for its device pages.
pub(crate) trait Ops: Send + Sync + Sized + 'static {
    /// The mark of all page maps whose data is a `Self`. Always the same one.
    fn owner() -> &'static Owner<Self>;

    /// The folio of `1 << order` pages that began at page `index` is gone: its VRAM can be used
    /// again.
    ///
    /// Runs under page table locks: must not sleep.
    fn folio_free(map: &PageMap<Self>, index: usize, order: u32);

    /// The CPU touched a page of `map`: bring it to system memory.
    fn migrate_to_ram(map: &PageMap<Self>, fault: Fault<'_, Self>) -> FaultOutcome;

    /// The map has been closed, and nobody is lent it any more. Called once, before anything is evicted for that.
    fn closed(map: &PageMap<Self>);

    /// Moves live pages to system memory, as the map has been closed: called again until
    /// [`PageMap::live_folios`] yields nothing.
    fn evict_all(map: &PageMap<Self>);

    /// The device has no pages any more.
    fn unregistered(map: &PageMap<Self>);
}

/// Which physical addresses the device pages get.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// Free ones that the kernel picks (`devm_request_free_mem_region`).
    Add,
    /// These, which are the device's own. The caller holds the region.
    AddResource {
        /// First byte; a multiple of [`ALIGN`].
        start: u64,
    },
}

/// What the CPU can do with the pages.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// It cannot reach them (`MEMORY_DEVICE_PRIVATE`): a touch brings one back.
    Private,
    /// It reaches them as memory (`MEMORY_DEVICE_COHERENT`).
    Coherent,
}

const FREE: i8 = 0;
const TAIL: i8 = -1;

/// The state of the head page of a folio of `1 << order` pages.
const fn head(order: u32) -> i8 {
    // CAST: Orders are at most 9, as `PageMap::init_folio` checks.
    order as i8 + 1
}

/// In the state of a head page: the content is somewhere else, and only a reference keeps the folio.
const MOVED: i8 = 1 << 4;

/// The largest order of a folio: 2 MiB.
pub(crate) const MAX_ORDER: u32 = ALIGN.ilog2() - PAGE_SHIFT;

/// The device pages of one device, and the driver's data for them.
///
/// # Invariants
///
/// - `raw.owner` is `T::owner()`, so a page map with that owner is inside a `PageMap<T>`.
/// - `state[i]` is [`FREE`] exactly when page `i` has no reference and nobody is initialising it.
/// - While a page of it has a reference this value is neither moved nor dropped.
#[pin_data]
pub(crate) struct PageMap<T: Ops> {
    #[pin]
    raw: Opaque<bindings::dev_pagemap>,
    first_pfn: usize,
    kind: Kind,
    closed: Atomic<bool>,
    paused: Atomic<bool>,
    state: KVVec<Atomic<i8>>,
    #[pin]
    data: T,
}

// SAFETY: The C structure is written before anybody else can reach it, and handled by the kernel
// under its own locks after that.
unsafe impl<T: Ops> Send for PageMap<T> {}
// SAFETY: As above; all else in it is `Sync`.
unsafe impl<T: Ops> Sync for PageMap<T> {}

impl<T: Ops> PageMap<T> {
    const OPS: &'static bindings::dev_pagemap_ops = &bindings::dev_pagemap_ops {
        folio_free: Some(Self::folio_free),
        migrate_to_ram: Some(Self::migrate_to_ram),
        memory_failure: None,
        folio_split: Some(Self::folio_split),
    };

    fn new(
        pfns: Range<usize>,
        kind: Kind,
        data: impl PinInit<T, Error>,
    ) -> Result<Pin<KBox<Self>>> {
        let pages = pfns.len();
        let mut state = KVVec::with_capacity(pages, GFP_KERNEL)?;
        for _ in 0..pages {
            state.push(Atomic::new(FREE), GFP_KERNEL)?;
        }
        KBox::try_pin_init(
            // INVARIANT: `raw` gets its owner in `Registered::new`, before any page exists; no page
            // has a reference yet.
            try_pin_init!(Self {
                raw: Opaque::zeroed(),
                first_pfn: pfns.start,
                kind,
                closed: Atomic::new(false),
                paused: Atomic::new(false),
                state,
                data <- data,
            }),
            GFP_KERNEL,
        )
    }

    /// The driver's data.
    pub(crate) fn data(&self) -> &T {
        &self.data
    }

    /// How many pages there are.
    pub(crate) fn pages(&self) -> usize {
        self.state.len()
    }

    /// What the CPU can do with them.
    pub(crate) fn kind(&self) -> Kind {
        self.kind
    }

    /// The page frame number of the first page.
    pub(crate) fn first_pfn(&self) -> usize {
        self.first_pfn
    }

    /// Which page of this map `pfn` is.
    pub(crate) fn index_of(&self, pfn: usize) -> Option<usize> {
        pfn.checked_sub(self.first_pfn)
            .filter(|&index| index < self.pages())
    }

    /// Makes a folio of the `1 << order` pages from `index` on (`zone_device_folio_init`).
    ///
    /// Fails with `EINVAL` if there are no such pages or `index` is not aligned to the folio's
    /// size, with `EBUSY` if one of them is in use or the map is paused, and with `ENODEV` once it is
    /// closed.
    pub(crate) fn init_folio(&self, index: usize, order: u32) -> Result<DeviceFolio<'_, T>> {
        if order > MAX_ORDER || index & ((1 << order) - 1) != 0 {
            return Err(EINVAL);
        }
        let states = self.state.get(index..index + (1 << order)).ok_or(EINVAL)?;
        for (i, state) in states.iter().enumerate() {
            let new = if i == 0 { head(order) } else { TAIL };
            if state.cmpxchg(FREE, new, Full).is_err() {
                states
                    .iter()
                    .take(i)
                    .for_each(|state| state.store(FREE, Release));
                return Err(EBUSY);
            }
        }
        let refusal = if self.is_closed() {
            Err(ENODEV)
        } else if self.paused.load(Relaxed) {
            Err(EBUSY)
        } else {
            Ok(())
        };
        if let Err(error) = refusal {
            self.set_free(index, order);
            return Err(error);
        }
        let (first, raw) = (self.first_pfn() + index, self.raw.get());
        // SAFETY: The pages are this map's, and it is registered: `Registered` lends it, and
        // unregisters it only after it has closed it and then found every page free. All of them were
        // free and are now ours alone, by the exchange above.
        let folio = unsafe { bindings::hmm_gpu_zone_device_folio_init(first, raw, order) };
        // SAFETY: Just initialised, and the pointer is into the memory map, so it is not null.
        Ok(unsafe { DeviceFolio::from_init(self, index, order, NonNull::new_unchecked(folio)) })
    }

    fn set_free(&self, index: usize, order: u32) {
        let states = self.state.iter().skip(index).take(1 << order);
        states.for_each(|state| state.store(FREE, Release));
    }

    /// Whether the registration is being undone: no folio is made any more.
    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Relaxed)
    }

    /// Has no folio be made until it is called again with `false`. When this returns, a folio that
    /// was made before is among [`PageMap::live_folios`].
    pub(crate) fn pause(&self, paused: bool) {
        // A full barrier: see `Registered::closing`.
        self.paused.xchg(paused, Full);
    }

    /// The folios that are live now and begin at one of these pages: index of the first page and order
    /// of each. Others may come and go meanwhile.
    pub(crate) fn live_folios(
        &self,
        pages: Range<usize>,
    ) -> impl Iterator<Item = (usize, u32)> + '_ {
        pages.filter_map(|index| Some((index, self.order(index)?)))
    }

    /// log2 of the number of pages of the live folio that begins at page `index`, if there is one.
    pub(crate) fn order(&self, index: usize) -> Option<u32> {
        let state = self.state.get(index)?.load(Acquire);
        // CAST: Positive, so it fits.
        (state > 0).then_some(((state & !MOVED) - 1) as u32)
    }

    /// Says that the content of the folio that begins at page `index` is somewhere else now. For who holds its lock.
    pub(super) fn set_moved(&self, index: usize) {
        if let (Some(order), Some(state)) = (self.order(index), self.state.get(index)) {
            // The folio's lock has others see it.
            state.store(head(order) | MOVED, Relaxed);
        }
    }

    /// Whether [`PageMap::set_moved`] was called for the folio that begins at page `index`. For who holds its lock.
    pub(super) fn is_moved(&self, index: usize) -> bool {
        let state = self.state.get(index);
        state.is_some_and(|state| state.load(Relaxed) > MOVED)
    }

    /// The offset of the folio that begins at page `index`, in whatever it is mapped in, in pages.
    /// A hint: it may be another by now.
    pub(crate) fn mapped_index(&self, index: usize) -> usize {
        // SAFETY: The page is one of the map's, which is registered: `Registered` lends it.
        unsafe {
            bindings::hmm_gpu_pfn_index(
                self.first_pfn() + index.min(self.pages().saturating_sub(1)),
            )
        }
    }

    /// # Safety
    ///
    /// `raw` is in a `PageMap<T>` that outlives `'a`.
    pub(super) unsafe fn from_raw<'a>(raw: *mut bindings::dev_pagemap) -> &'a Self {
        let raw = raw.cast::<Opaque<bindings::dev_pagemap>>();
        // SAFETY: By the safety requirements.
        unsafe { &*container_of!(raw, Self, raw) }
    }

    /// # Safety
    ///
    /// Called by the kernel as `dev_pagemap_ops::folio_free`, for a folio of a `PageMap<T>`.
    unsafe extern "C" fn folio_free(folio: *mut bindings::folio) {
        // SAFETY: The folio is a device-private one of ours; its page map waits for it before it
        // goes.
        let (map, place) = unsafe {
            let place = bindings::hmm_gpu_place(folio);
            (Self::from_raw(place.pgmap), place)
        };
        let Some(index) = map.index_of(place.pfn) else {
            return;
        };
        map.set_free(index, place.order);
        T::folio_free(map, index, place.order);
    }

    /// # Safety
    ///
    /// Called by the kernel as `dev_pagemap_ops::folio_split`, for a folio of a `PageMap<T>`: with
    /// each folio that is split off it, and last with null. Interrupts are off.
    unsafe extern "C" fn folio_split(first: *mut bindings::folio, other: *mut bindings::folio) {
        // SAFETY: The folios are locked and frozen while they are split; their page map waits for
        // them before it goes. The first has its new order already. The others need what the
        // kernel itself gives them where a driver has no such function.
        let (map, folio) = unsafe {
            let pgmap = bindings::hmm_gpu_folio_pgmap(first);
            if !other.is_null() {
                bindings::hmm_gpu_folio_inherit(other, first);
            }
            (
                Self::from_raw(pgmap),
                if other.is_null() { first } else { other },
            )
        };
        // SAFETY: As above.
        let place = unsafe { bindings::hmm_gpu_place(folio) };
        let index = map.index_of(place.pfn);
        if let Some(state) = index.and_then(|index| map.state.get(index)) {
            state.store(head(place.order), Release);
        }
    }

    /// # Safety
    ///
    /// Called by the kernel as `dev_pagemap_ops::migrate_to_ram`, for a page of a `PageMap<T>`.
    unsafe extern "C" fn migrate_to_ram(vmf: *mut bindings::vm_fault) -> bindings::vm_fault_t {
        // SAFETY: The kernel passes a fault on a locked, referenced device-private page of ours,
        // with the mmap lock held, for the duration of the call; the page map waits for the page
        // before it goes.
        let (map, fault) = unsafe {
            let folio = bindings::hmm_gpu_page_folio((*vmf).page);
            (
                Self::from_raw(bindings::hmm_gpu_folio_pgmap(folio)),
                Fault::<T>::from_raw(vmf),
            )
        };
        T::migrate_to_ram(map, fault).into_raw()
    }
}

/// What device pages are registered for: a device that is bound as long as the value exists.
///
/// # Safety
///
/// `device` returns the same device at every call, and that stays bound until the value is dropped.
pub(crate) unsafe trait Parent {
    /// The device.
    fn device(&self) -> &Device<Bound>;
}

// SAFETY: The reference is to one device, which is bound while the reference lives.
unsafe impl Parent for &pci::Device<Bound> {
    fn device(&self) -> &Device<Bound> {
        (*self).as_ref()
    }
}

// SAFETY: A registration has one device, which is bound until the registration is dropped.
unsafe impl Parent for faux::Registration {
    fn device(&self) -> &Device<Bound> {
        let device: &faux::Device<Bound> = self.as_ref();
        device.as_ref()
    }
}

/// Owns the device pages of a device: a registered [`PageMap`].
///
/// Dropping it evicts, unregisters and frees, in this order, and may wait long for the first. It is
/// meant for a driver's private data, which is dropped after unbind and before the device's managed
/// resources.
///
/// # Invariants
///
/// `map` is registered with `devm_memremap_pages` for `device`, and `region` is a managed region of
/// `device`.
pub(crate) struct Registered<D: Parent, T: Ops> {
    map: Pin<KBox<PageMap<T>>>,
    region: Option<(u64, u64)>,
    device: D,
}

impl<D: Parent, T: Ops> Registered<D, T> {
    /// Registers `bytes` of device memory in either form.
    ///
    /// Refuses, with the reason in the kernel's log and before the core of the kernel would warn:
    /// lengths and addresses that are not multiples of [`ALIGN`] (`EINVAL`); addresses that are
    /// System RAM (`ENXIO`), that have device pages already (`EBUSY`) or that the kernel cannot
    /// have pages for (`E2BIG`). `ERANGE`: no free addresses. `ENOMEM`.
    pub(crate) fn new(
        device: D,
        form: Form,
        kind: Kind,
        bytes: u64,
        data: impl PinInit<T, Error>,
    ) -> Result<Self> {
        let dev = device.device();
        if bytes == 0 || bytes % ALIGN != 0 {
            dev_err!(
                dev,
                "device memory of {} bytes: want a multiple of {} MiB\n",
                bytes,
                ALIGN >> 20
            );
            return Err(EINVAL);
        }
        let pages = usize::try_from(bytes >> PAGE_SHIFT)?;
        let (start, region) = match form {
            Form::Add => {
                let region = request_free_region(dev, bytes)?;
                (region.0, Some(region))
            }
            Form::AddResource { start } => {
                check_range(dev, start, bytes, kind)?;
                (start, None)
            }
        };
        // CAST: A page frame number fits in a word.
        let first = (start >> PAGE_SHIFT) as usize;
        let map = PageMap::new(first..first + pages, kind, data)
            .inspect_err(|_| release_region(dev, region))?;
        let raw = map.raw.get();
        // SAFETY: Nobody else knows `raw` yet.
        unsafe {
            (*raw).type_ = match kind {
                Kind::Private => bindings::memory_type_MEMORY_DEVICE_PRIVATE,
                Kind::Coherent => bindings::memory_type_MEMORY_DEVICE_COHERENT,
            };
            (*raw).owner = T::owner().as_raw();
            (*raw).ops = PageMap::<T>::OPS;
            (*raw).nr_range = 1;
            *(*raw).__bindgen_anon_1.range.as_mut() = bindings::range {
                start,
                end: start + bytes - 1,
            };
        }
        // SAFETY: `dev` is bound, `raw` is filled in and pinned. It stays until `Drop` has
        // unregistered it, which the type that holds `D` makes happen before `device` is unbound.
        let result = from_err_ptr(unsafe { bindings::devm_memremap_pages(as_raw(dev), raw) });
        if let Err(error) = result {
            dev_err!(
                dev,
                "cannot register device pages at {:#x}-{:#x}: {:?}\n",
                start,
                start + bytes - 1,
                error
            );
            release_region(dev, region);
            return Err(error);
        }
        // INVARIANT: Just registered; the region was requested for the same device.
        Ok(Self {
            map,
            region,
            device,
        })
    }

    /// The first physical address of the pages.
    pub(crate) fn start(&self) -> u64 {
        // CAST: Widens.
        (self.map.first_pfn() as u64) << PAGE_SHIFT
    }
}

// SAFETY: The page map is in a box of its own and pinned, and nothing replaces it.
unsafe impl<D: Parent, T: Ops> Lend for Registered<D, T> {
    type Target = PageMap<T>;

    fn lend(&self) -> &PageMap<T> {
        &self.map
    }

    fn closing(&self) {
        // A full barrier: whoever makes a folio either sees this, or `drop` sees its page in use.
        self.map.closed.xchg(true, Full);
    }
}

impl<D: Parent, T: Ops> Drop for Registered<D, T> {
    fn drop(&mut self) {
        self.closing();
        T::closed(&self.map);
        while self.map.live_folios(0..self.map.pages()).next().is_some() {
            T::evict_all(&self.map);
        }
        let dev = self.device.device();
        // SAFETY: Registered for this device, by the type invariants, which is still bound since
        // `D` says so. Waits until the last reference is gone.
        unsafe { bindings::devm_memunmap_pages(as_raw(dev), self.map.raw.get()) };
        release_region(dev, self.region);
        T::unregistered(&self.map);
    }
}

fn as_raw(dev: &Device<Bound>) -> *mut bindings::device {
    // CAST: `Device` is a transparent wrapper of `struct device`.
    core::ptr::from_ref(dev).cast_mut().cast()
}

/// Requests free physical addresses for `bytes`: start and length of what was taken, which may be
/// more.
fn request_free_region(dev: &Device<Bound>, bytes: u64) -> Result<(u64, u64)> {
    // SAFETY: `dev` is bound; `iomem_resource` is the kernel's own.
    let resource = from_err_ptr(unsafe {
        bindings::devm_request_free_mem_region(
            as_raw(dev),
            &raw mut bindings::iomem_resource,
            usize::try_from(bytes)?,
        )
    })
    .inspect_err(|error| {
        dev_err!(
            dev,
            "no free physical addresses for {} MiB of device pages: {:?}\n",
            bytes >> 20,
            error
        );
    })?;
    // SAFETY: A valid resource was returned, which stays until it is released.
    unsafe { Ok(((*resource).start, (*resource).end - (*resource).start + 1)) }
}

fn release_region(dev: &Device<Bound>, region: Option<(u64, u64)>) {
    if let Some((start, bytes)) = region {
        // SAFETY: `dev` is bound, and the region is one that `request_free_region` took for it.
        unsafe { bindings::hmm_gpu_release_mem_region(as_raw(dev), start, bytes) };
    }
}

/// Whether `[start, start + bytes)` can become device pages: says why not, before `memremap_pages`
/// would warn.
fn check_range(dev: &Device<Bound>, start: u64, bytes: u64, kind: Kind) -> Result {
    let end = start.checked_add(bytes).ok_or(EINVAL)?;
    if start % ALIGN != 0 || bytes % ALIGN != 0 || bytes == 0 {
        dev_err!(
            dev,
            "range {:#x}-{:#x} refused: start and length must be multiples of {} MiB\n",
            start,
            end - 1,
            ALIGN >> 20
        );
        return Err(EINVAL);
    }
    // SAFETY: Always fine to call. Device-private pages need no mapping.
    let limit = unsafe { bindings::mhp_get_pluggable_range(kind == Kind::Coherent) };
    if start < limit.start || end - 1 > limit.end {
        dev_err!(
            dev,
            "range {:#x}-{:#x} refused: this kernel has pages for {:#x}-{:#x} only\n",
            start,
            end - 1,
            limit.start,
            limit.end
        );
        return Err(E2BIG);
    }
    // CAST: A length in bytes fits in a word.
    // SAFETY: Always fine to call where sleeping is.
    if unsafe { bindings::hmm_gpu_overlaps_system_ram(start, bytes as usize) } {
        dev_err!(
            dev,
            "range {:#x}-{:#x} refused: it overlaps System RAM\n",
            start,
            end - 1
        );
        return Err(ENXIO);
    }
    for address in [start, end - 1] {
        // CAST: A page frame number fits in a word.
        // SAFETY: Always fine to call.
        if unsafe { bindings::hmm_gpu_is_pagemap((address >> PAGE_SHIFT) as usize) } {
            dev_err!(
                dev,
                "range {:#x}-{:#x} refused: it has device pages already\n",
                start,
                end - 1
            );
            return Err(EBUSY);
        }
    }
    Ok(())
}

const _: () = assert!(PAGE_BYTES << MAX_ORDER == ALIGN as usize);
