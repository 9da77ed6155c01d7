// SPDX-License-Identifier: GPL-2.0

//! What is seen of a page of a process: an entry of `hmm_range`.
//!
//! C header: `include/linux/hmm.h`.

use crate::{
    hmm::{pagemap::MAX_ORDER, PAGE_BYTES},
    sys::bindings,
};

pub(super) const VALID: usize = bindings::hmm_pfn_flags_HMM_PFN_VALID;
pub(super) const WRITE: usize = bindings::hmm_pfn_flags_HMM_PFN_WRITE;
const ERROR: usize = bindings::hmm_pfn_flags_HMM_PFN_ERROR;
/// In an entry of a tree, where there is no error: the device has the page to itself.
pub(super) const EXCLUSIVE: usize = ERROR;
pub(super) const FLAGS: usize = bindings::hmm_pfn_flags_HMM_PFN_FLAGS;
pub(super) const REQ_FAULT: usize = bindings::hmm_pfn_flags_HMM_PFN_REQ_FAULT;
pub(super) const REQ_WRITE: usize = bindings::hmm_pfn_flags_HMM_PFN_REQ_WRITE;
const ORDER_SHIFT: usize = bindings::hmm_pfn_flags_HMM_PFN_ORDER_SHIFT;

/// What is at a page of a process.
///
/// A page frame number in it is for comparing only: the page may be elsewhere by now.
#[repr(transparent)]
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Seen(pub(super) usize);

impl Seen {
    /// The page frame number, if a page is there: of system memory, or a device page of the owner
    /// asked for.
    pub(crate) fn pfn(self) -> Option<usize> {
        (self.0 & VALID != 0).then_some(self.0 & !FLAGS)
    }

    /// All that is known of it but the page frame number.
    pub(crate) fn flags(self) -> usize {
        self.0 & FLAGS
    }

    /// The same, with the page that is at `addr`: of a large folio of device-private memory, the kernel
    /// answers the pages from its first on, wherever in it the range begins
    /// (`hmm_vma_handle_absent_pmd`, 7.3). What is mapped as one is aligned to its size in both ways.
    pub(super) fn at(self, addr: usize) -> Self {
        const WITHIN: usize = (1 << MAX_ORDER) - 1;

        // CAST: Widens.
        if self.0 & VALID == 0 || self.order() < MAX_ORDER as usize {
            return self;
        }
        Self(self.0 & !WITHIN | (addr / PAGE_BYTES) & WITHIN)
    }

    /// Whether it is a device-private page, which it was a moment ago at the latest.
    pub(crate) fn is_private(self) -> bool {
        self.pfn().is_some_and(|pfn| {
            // SAFETY: Fine to call for any page frame number: it looks whether there is such a page.
            unsafe { bindings::hmm_gpu_is_private_pfn(pfn) }
        })
    }

    /// Whether it is a page that KSM has merged: then it stays so as long as the mmap lock is held, or is not
    /// there any more.
    pub(crate) fn is_merged(self) -> bool {
        // KSM merges pages that are mapped one by one.
        self.order() == 0
            && self.pfn().is_some_and(|pfn| {
                // SAFETY: Fine to call for any page frame number.
                unsafe { bindings::hmm_gpu_is_ksm_pfn(pfn) }
            })
    }

    /// Of an entry: whether the device has the page to itself.
    pub(crate) fn is_exclusive(self) -> bool {
        self.0 & (VALID | EXCLUSIVE) == VALID | EXCLUSIVE
    }

    /// Whether it could not be seen: the mapping allows no reading.
    pub(crate) fn is_hidden(self) -> bool {
        self.0 & ERROR != 0
    }

    /// Whether the process may write to it without a fault that changes the mapping.
    pub(crate) fn is_writable(self) -> bool {
        self.0 & WRITE != 0
    }

    /// log2 of the number of pages that it is mapped together with.
    pub(crate) fn order(self) -> usize {
        (self.0 >> ORDER_SHIFT) & 0x1f
    }

    /// Whether it is the kernel's page of zeroes, of the base page size.
    pub(crate) fn is_zero_page(self) -> bool {
        self.pfn()
            // SAFETY: Always fine to call.
            .is_some_and(|pfn| unsafe { bindings::hmm_gpu_is_zero_pfn(pfn) })
    }
}
