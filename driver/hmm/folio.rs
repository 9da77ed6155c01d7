// SPDX-License-Identifier: GPL-2.0

//! Folios that a migration reads from and moves into.
//!
//! C header: `include/linux/mm_types.h`, `include/linux/memremap.h`.

use crate::{
    hmm::{
        pagemap::{Ops, PageMap},
        vma::ReadLocked,
    },
    sys::bindings,
};
use core::{marker::PhantomData, mem::ManuallyDrop, ptr::NonNull};
use kernel::{error::to_result, prelude::*};

/// The folio that page `pfn` is in.
///
/// # Safety
///
/// The page is referenced.
unsafe fn folio_of(pfn: usize) -> *mut bindings::folio {
    // SAFETY: The page is referenced, by the safety requirements, so it has a `struct page` and its
    // folio does not change.
    unsafe { bindings::hmm_gpu_page_folio(bindings::hmm_gpu_pfn_to_page(pfn)) }
}

/// A folio that is locked and has one reference, both of which belong to this value.
///
/// # Invariants
///
/// `folio` is valid, locked by this value, and one of its references is this value's.
pub(crate) struct LockedFolio {
    folio: NonNull<bindings::folio>,
}

impl LockedFolio {
    /// # Safety
    ///
    /// The folio is locked, and the lock and one reference pass to the value returned.
    unsafe fn from_raw(folio: NonNull<bindings::folio>) -> Self {
        // INVARIANT: By the safety requirements.
        Self { folio }
    }

    /// Makes the page at `addr` of `lock`'s address space one that only devices reach
    /// (`make_device_exclusive`), and returns it, with its folio locked: until that is unlocked, no CPU
    /// gets it back by a touch. `owner` is named in the invalidation that this makes.
    ///
    /// Fails with `EFAULT` (nothing is mapped there, or nothing that can be written to), `EOPNOTSUPP`
    /// (it is not anonymous memory), `EINTR`, and what a fault fails with.
    pub(super) fn exclusive(
        lock: &ReadLocked<'_>,
        addr: usize,
        owner: *mut c_void,
    ) -> Result<(Self, usize)> {
        let (mut folio, mut pfn) = (core::ptr::null_mut(), 0);
        // SAFETY: The mmap lock is held, and there is room for both answers.
        to_result(unsafe {
            bindings::hmm_gpu_make_exclusive(
                lock.mm().as_raw(),
                addr,
                owner,
                &raw mut folio,
                &raw mut pfn,
            )
        })?;
        let folio = NonNull::new(folio).ok_or(EFAULT)?;
        // SAFETY: The kernel gave the folio locked, and a reference to it.
        Ok((unsafe { Self::from_raw(folio) }, pfn))
    }

    /// Takes back what [`LockedFolio::into_pfn`] gave away.
    ///
    /// # Safety
    ///
    /// `pfn` came from `into_pfn`, and nobody has taken it back or given it to the kernel's
    /// migration since.
    pub(super) unsafe fn from_pfn(pfn: usize) -> Self {
        // SAFETY: The folio is still locked and referenced on behalf of the value that `into_pfn`
        // consumed. `page_folio` of a valid page is not null.
        unsafe { Self::from_raw(NonNull::new_unchecked(folio_of(pfn))) }
    }

    /// The first page frame number of the folio. The lock and the reference pass to the caller.
    pub(super) fn into_pfn(self) -> usize {
        let this = ManuallyDrop::new(self);
        // SAFETY: The folio is valid by the type invariants.
        unsafe { bindings::hmm_gpu_folio_pfn(this.folio.as_ptr()) }
    }
}

impl Drop for LockedFolio {
    fn drop(&mut self) {
        // SAFETY: By the type invariants the lock and the reference are ours to give up, and this
        // is the only place that does.
        unsafe {
            bindings::hmm_gpu_folio_unlock(self.folio.as_ptr());
            bindings::hmm_gpu_folio_put(self.folio.as_ptr());
        }
    }
}

/// What an allocation may do to have memory.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Effort {
    /// As for a page fault: for a page, the kernel may kill a process; for a large folio, it takes
    /// what there is (`GFP_TRANSHUGE_LIGHT`).
    PageFault,
    /// Reclaim, and fail where that does not help (`__GFP_RETRY_MAYFAIL`); for a large folio, try
    /// once to make one (`GFP_TRANSHUGE`, `__GFP_NORETRY`).
    MayFail,
    /// The same, and for a large folio, reclaim and compact as long as that helps
    /// (`__GFP_RETRY_MAYFAIL`).
    Hard,
}

/// A new folio of system memory, for a page to move into. Its content is undefined until written.
///
/// # Invariants
///
/// The folio is of system memory with a direct mapping, and nothing maps it or knows it but this
/// value.
pub(crate) struct SystemFolio {
    folio: LockedFolio,
    order: u32,
}

impl SystemFolio {
    /// Allocates `1 << order` pages (`folio_alloc`), which may sleep and reclaim.
    ///
    /// Fails with `ENOMEM`.
    pub(crate) fn new(order: u32, effort: Effort) -> Result<Self> {
        let effort = match effort {
            Effort::PageFault => bindings::hmm_gpu_effort_HMM_GPU_PAGE_FAULT,
            Effort::MayFail => bindings::hmm_gpu_effort_HMM_GPU_MAY_FAIL,
            Effort::Hard => bindings::hmm_gpu_effort_HMM_GPU_HARD,
        };
        // SAFETY: Always fine to call where sleeping is.
        let folio = unsafe { bindings::hmm_gpu_folio_alloc(order, effort) };
        let folio = NonNull::new(folio).ok_or(ENOMEM)?;
        // SAFETY: It was made locked, and with a reference; both are ours.
        let folio = unsafe { LockedFolio::from_raw(folio) };
        // INVARIANT: x86-64 maps all system memory directly; the folio was just made.
        Ok(Self { folio, order })
    }

    /// Where the CPU reaches the folio's bytes: `4096 << order` of them, all this value's own.
    pub(crate) fn as_mut_ptr(&mut self) -> NonNull<u8> {
        // SAFETY: The folio is valid and directly mapped by the type invariants.
        let address = unsafe { bindings::hmm_gpu_folio_address(self.folio.folio.as_ptr()) };
        // SAFETY: The direct mapping of a valid page is not at address zero.
        unsafe { NonNull::new_unchecked(address.cast()) }
    }

    /// Bytes that the folio has.
    pub(crate) fn len(&self) -> usize {
        super::PAGE_BYTES << self.order
    }

    /// log2 of the number of pages.
    pub(crate) fn order(&self) -> u32 {
        self.order
    }
}

/// A device folio that is in nobody's page table yet, for a page to move into. The VRAM behind it
/// holds what was there before.
pub(crate) struct DeviceFolio<'a, T: Ops> {
    folio: LockedFolio,
    index: usize,
    order: u32,
    map: PhantomData<&'a PageMap<T>>,
}

impl<'a, T: Ops> DeviceFolio<'a, T> {
    /// # Safety
    ///
    /// `folio` was just initialised by `zone_device_folio_init` as the `1 << order` pages from `index` of
    /// `map` on, and belongs to the caller.
    pub(super) unsafe fn from_init(
        _map: &'a PageMap<T>,
        index: usize,
        order: u32,
        folio: NonNull<bindings::folio>,
    ) -> Self {
        // SAFETY: `zone_device_folio_init` leaves the folio locked, with one reference, which are
        // the caller's to pass on.
        let folio = unsafe { LockedFolio::from_raw(folio) };
        Self {
            folio,
            index,
            order,
            map: PhantomData,
        }
    }

    /// The first page of the folio, counted in pages from the start of the device's memory.
    pub(crate) fn index(&self) -> usize {
        self.index
    }

    /// Bytes that the folio has.
    pub(crate) fn len(&self) -> usize {
        super::PAGE_BYTES << self.order
    }
}

/// A folio all of whose bytes have been written: what a page can move into.
///
/// What an unwritten folio holds is somebody else's, and would reach the process.
pub(crate) struct Filled {
    folio: LockedFolio,
    order: u32,
}

impl Filled {
    /// # Safety
    ///
    /// All bytes of the folio have been written.
    pub(crate) unsafe fn system(folio: SystemFolio) -> Self {
        let SystemFolio { folio, order } = folio;
        Self { folio, order }
    }

    /// # Safety
    ///
    /// All bytes of the VRAM behind the folio have been written.
    pub(crate) unsafe fn device<T: Ops>(folio: DeviceFolio<'_, T>) -> Self {
        let DeviceFolio { folio, order, .. } = folio;
        Self { folio, order }
    }

    /// log2 of the number of pages.
    pub(super) fn order(&self) -> u32 {
        self.order
    }

    pub(super) fn into_locked(self) -> LockedFolio {
        self.folio
    }
}

/// A folio of system memory that a migration has locked and unmapped: its bytes do not change.
///
/// # Invariants
///
/// `pfn` is the first page of a locked, unmapped folio of directly mapped system memory for the
/// life of `'a`.
pub(crate) struct SourceFolio<'a> {
    pfn: usize,
    order: u32,
    life: PhantomData<&'a ()>,
}

impl SourceFolio<'_> {
    /// # Safety
    ///
    /// As the type invariants say, for the lifetime that the caller picks.
    pub(super) unsafe fn from_pfn(pfn: usize, order: u32) -> Self {
        // INVARIANT: By the safety requirements.
        Self {
            pfn,
            order,
            life: PhantomData,
        }
    }

    /// Where the CPU reads the folio's bytes: `4096 << order` of them.
    pub(crate) fn as_ptr(&self) -> NonNull<u8> {
        // SAFETY: The page is valid and directly mapped by the type invariants, and no such mapping
        // is at address zero.
        unsafe { NonNull::new_unchecked(bindings::hmm_gpu_pfn_address(self.pfn).cast()) }
    }

    /// Bytes that the folio has.
    pub(crate) fn len(&self) -> usize {
        super::PAGE_BYTES << self.order
    }

    /// log2 of the number of pages.
    pub(crate) fn order(&self) -> u32 {
        self.order
    }
}

/// What a page of a migration is.
pub(super) struct Sort {
    /// log2 of the number of pages of its folio.
    pub(super) order: u32,
    /// The page map it belongs to, if it is device-private or device-coherent.
    pub(super) map: Option<NonNull<bindings::dev_pagemap>>,
    /// Whether it may move. System memory may if it is anonymous memory which KSM does not know (the
    /// kernel would let it move, and KSM would then read device memory, in 7.3).
    pub(super) may_move: bool,
}

/// What page `pfn` is.
///
/// # Safety
///
/// The page is locked and referenced for as long as the answer is used.
pub(super) unsafe fn sort_of(pfn: usize) -> Sort {
    // SAFETY: The page is referenced, by the safety requirements, so its folio is valid. Being
    // locked, it stays what it is.
    let source = unsafe { bindings::hmm_gpu_source(pfn) };
    Sort {
        order: source.order,
        map: NonNull::new(source.pgmap),
        may_move: source.may_move,
    }
}

/// log2 of the number of pages of the folio that page `pfn` is in.
///
/// # Safety
///
/// The page is referenced.
pub(super) unsafe fn order_of(pfn: usize) -> u32 {
    // SAFETY: The page is referenced, by the safety requirements, so its folio is valid.
    unsafe { bindings::hmm_gpu_folio_order(folio_of(pfn)) }
}
