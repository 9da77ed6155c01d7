// SPDX-License-Identifier: GPL-2.0

//! What is at a range of addresses: `hmm_range_fault`, asked for nothing, so that it only looks.
//!
//! C header: `include/linux/hmm.h`, `include/linux/mmu_notifier.h`.

use crate::{
    hmm::{
        pagemap::Ops,
        vma::{user_end, ReadLocked},
        PAGE_BYTES,
    },
    sys::bindings,
};
use kernel::{error::to_result, mm::MmWithUser, prelude::*, types::Opaque};

const VALID: usize = bindings::hmm_pfn_flags_HMM_PFN_VALID;
const WRITE: usize = bindings::hmm_pfn_flags_HMM_PFN_WRITE;
const ERROR: usize = bindings::hmm_pfn_flags_HMM_PFN_ERROR;
const FLAGS: usize = bindings::hmm_pfn_flags_HMM_PFN_FLAGS;

/// Tells whether an address space changed while it was looked at: an interval notifier over all of
/// it.
///
/// # Invariants
///
/// `raw` is registered (`mmu_interval_notifier_insert`).
#[pin_data(PinnedDrop)]
pub(crate) struct Watch {
    #[pin]
    raw: Opaque<bindings::mmu_interval_notifier>,
}

// SAFETY: A notifier may be removed from any task.
unsafe impl Send for Watch {}
// SAFETY: The methods may be called from several tasks at a time.
unsafe impl Sync for Watch {}

impl Watch {
    const OPS: &'static bindings::mmu_interval_notifier_ops =
        &bindings::mmu_interval_notifier_ops {
            invalidate: Some(Self::invalidate),
            invalidate_start: None,
            invalidate_finish: None,
        };

    /// Watches `mm`, for which its lock is taken for writing.
    ///
    /// Fails with `EINTR` if a signal comes, and with `ENOMEM`.
    pub(crate) fn new(mm: &MmWithUser) -> impl PinInit<Self, Error> + '_ {
        try_pin_init!(Self {
            // INVARIANT: Registered if this returns `Ok`.
            raw <- Opaque::try_ffi_init(|raw| {
                // SAFETY: `raw` is pinned until `drop` has removed it; the address space has users.
                to_result(unsafe { bindings::hmm_gpu_mmu_interval_insert(raw, mm.as_raw(), 0, user_end(), Self::OPS) })
            }),
        })
    }

    /// # Safety
    ///
    /// Called by the kernel as `mmu_interval_notifier_ops::invalidate`.
    unsafe extern "C" fn invalidate(
        raw: *mut bindings::mmu_interval_notifier,
        _range: *const bindings::mmu_notifier_range,
        seq: c_ulong,
    ) -> bool {
        // Nothing is kept of what was seen, so there is nothing to take back, and no lock of ours
        // that readers hold: the kernel itself makes them see the new number.
        // SAFETY: The kernel calls this for a registered notifier, between its own start and end.
        unsafe { bindings::hmm_gpu_mmu_interval_set_seq(raw, seq) };
        true
    }

    /// Looks at `pfns.len()` pages from `start` on, with the mmap lock held. Nothing is faulted in.
    ///
    /// The answer was true at one moment for each page. Fails with `EBUSY` if the address space
    /// kept changing.
    pub(crate) fn look<T: Ops>(
        &self,
        lock: &ReadLocked<'_>,
        start: usize,
        pfns: &mut [Seen],
    ) -> Result {
        const ATTEMPTS: usize = 64;

        // SAFETY: Registered, so its address space is valid to compare.
        if unsafe { (*self.raw.get()).mm } != lock.mm().as_raw() {
            return Err(EINVAL);
        }
        for _ in 0..ATTEMPTS {
            pfns.fill(Seen(0));
            let mut range = bindings::hmm_range {
                notifier: self.raw.get(),
                // SAFETY: The notifier is registered.
                notifier_seq: unsafe { bindings::mmu_interval_read_begin(self.raw.get()) },
                start,
                end: start + pfns.len() * PAGE_BYTES,
                hmm_pfns: pfns.as_mut_ptr().cast(),
                default_flags: 0,
                pfn_flags_mask: 0,
                dev_private_owner: T::owner().as_raw(),
            };
            // SAFETY: The lock is held and the array has a word for each page of the range.
            match to_result(unsafe { bindings::hmm_range_fault(&mut range) }) {
                Err(error) if error == EBUSY => continue,
                result => return result,
            }
        }
        Err(EBUSY)
    }
}

#[pinned_drop]
impl PinnedDrop for Watch {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: Registered, by the type invariants. Waits for callbacks that run.
        unsafe { bindings::mmu_interval_notifier_remove(self.raw.get()) };
    }
}

/// What is at a page of a process.
///
/// A page frame number in it is for comparing only: the page may be elsewhere by now.
#[repr(transparent)]
#[derive(Clone, Copy, Default)]
pub(crate) struct Seen(usize);

impl Seen {
    /// The page frame number, if a page is there: of system memory, or a device page of the owner
    /// asked for.
    pub(crate) fn pfn(self) -> Option<usize> {
        (self.0 & VALID != 0).then_some(self.0 & !FLAGS)
    }

    /// Whether it could not be seen: the mapping allows no reading.
    pub(crate) fn is_hidden(self) -> bool {
        self.0 & ERROR != 0
    }

    /// Whether the process may write to it without a fault that changes the mapping.
    pub(crate) fn is_writable(self) -> bool {
        self.0 & WRITE != 0
    }
}
