// SPDX-License-Identifier: GPL-2.0

//! Address spaces and their mappings, as far as the kernel crate lacks them.

use crate::sys::bindings;
use core::{ops::Deref, ptr::NonNull};
use kernel::{
    error::to_result,
    mm::{virt::VmaRef, Mm, MmWithUser},
    prelude::*,
    sync::aref::ARef,
    types::NotThreadSafe,
};

/// The address spaces of all processes that there are, or of most: some may come meanwhile.
///
/// Fails with `ENOMEM`.
pub(crate) fn all_address_spaces() -> Result<KVVec<ARef<Mm>>> {
    // SAFETY: There is no room, which is said.
    let count = unsafe { bindings::hmm_gpu_all_mms(core::ptr::null_mut(), 0) };
    let mut raw = KVVec::from_elem(core::ptr::null_mut(), count, GFP_KERNEL)?;
    let mut spaces = KVVec::with_capacity(count, GFP_KERNEL)?;
    // SAFETY: There is room for so many.
    unsafe { bindings::hmm_gpu_all_mms(raw.as_mut_ptr(), raw.len()) };
    for mm in raw {
        if let Some(mm) = NonNull::new(mm) {
            // SAFETY: `Mm` is a transparent wrapper, and the reference that the call has taken passes to
            // this value.
            let mm = unsafe { ARef::from_raw(mm.cast::<Mm>()) };
            // There is room, so it does not fail.
            let _ = spaces.push_within_capacity(mm);
        }
    }
    Ok(spaces)
}

/// The mmap lock, held for reading, or for writing.
///
/// # Invariants
///
/// This value owns the lock; for writing if `alone`.
pub(crate) struct ReadLocked<'a> {
    mm: &'a MmWithUser,
    alone: bool,
    _not_send: NotThreadSafe,
}

impl<'a> ReadLocked<'a> {
    /// Takes the lock (`mmap_read_lock_killable`). Fails with `EINTR` if the task is killed while
    /// it waits.
    pub(crate) fn new(mm: &'a MmWithUser) -> Result<Self> {
        // SAFETY: The address space is valid.
        to_result(unsafe { bindings::hmm_gpu_mmap_read_lock_killable(mm.as_raw()) })?;
        // INVARIANT: Just locked.
        Ok(Self {
            mm,
            alone: false,
            _not_send: NotThreadSafe,
        })
    }

    /// Takes the lock for writing (`mmap_write_lock_killable`), and that of the mapping at `address`, if
    /// there is one: nobody changes the address space meanwhile, and nobody faults or merges there. Fails with `EINTR`
    /// if the task is killed while it waits.
    pub(crate) fn alone(mm: &'a MmWithUser, address: usize) -> Result<Self> {
        // SAFETY: The address space is valid.
        to_result(unsafe { bindings::hmm_gpu_mmap_write_lock_killable(mm.as_raw()) })?;
        // INVARIANT: Just locked.
        let this = Self {
            mm,
            alone: true,
            _not_send: NotThreadSafe,
        };
        if let Some(vma) = this.find_vma(address) {
            // SAFETY: The mapping is valid, and the lock is held for writing.
            to_result(unsafe { bindings::hmm_gpu_vma_start_write(vma.as_ptr()) })?;
        }
        Ok(this)
    }

    /// Whether it is held for writing.
    pub(crate) fn is_alone(&self) -> bool {
        self.alone
    }

    /// Takes the lock if nobody else has it for writing, or waits for that. Does not wait.
    pub(crate) fn try_new(mm: &'a MmWithUser) -> Option<Self> {
        // SAFETY: The address space is valid.
        let locked = unsafe { bindings::hmm_gpu_mmap_read_trylock(mm.as_raw()) };
        // INVARIANT: Just locked.
        locked.then(|| Self {
            mm,
            alone: false,
            _not_send: NotThreadSafe,
        })
    }

    /// The address space.
    pub(crate) fn mm(&self) -> &MmWithUser {
        self.mm
    }

    /// The first mapping that ends above `address` (`find_vma`): the one that `address` is in, or
    /// the next.
    pub(crate) fn find_vma(&self, address: usize) -> Option<LockedVma<'_>> {
        // SAFETY: The lock is held, by the type invariants.
        let vma = unsafe { bindings::find_vma(self.mm.as_raw(), address) };
        // SAFETY: A mapping that was found is valid and stays while the lock is held, which is as
        // long as `self` is borrowed.
        (!vma.is_null()).then(|| LockedVma(unsafe { VmaRef::from_raw(vma) }))
    }
}

impl Drop for ReadLocked<'_> {
    fn drop(&mut self) {
        // SAFETY: The lock is ours by the type invariants, and held so.
        unsafe {
            if self.alone {
                bindings::hmm_gpu_mmap_write_unlock(self.mm.as_raw());
            } else {
                bindings::hmm_gpu_mmap_read_unlock(self.mm.as_raw());
            }
        }
    }
}

/// A mapping under the mmap lock: a [`VmaRef`] alone may be under the lock of the mapping only.
///
/// # Invariants
///
/// The mmap lock is held for `'a`.
#[derive(Clone, Copy)]
pub(crate) struct LockedVma<'a>(&'a VmaRef);

impl Deref for LockedVma<'_> {
    type Target = VmaRef;

    fn deref(&self) -> &VmaRef {
        self.0
    }
}

impl LockedVma<'_> {
    /// The offset of its first page: what an anonymous page that is mapped in it has as its own, less
    /// its distance from the start.
    pub(crate) fn first_index(&self) -> usize {
        // SAFETY: The reference is to a valid mapping that is locked.
        unsafe { (*self.as_ptr()).vm_pgoff }
    }

    /// Whether it is private anonymous memory.
    pub(crate) fn is_anonymous(&self) -> bool {
        // SAFETY: The reference is to a valid mapping that is locked.
        unsafe { bindings::hmm_gpu_vma_is_anonymous(self.as_ptr()) }
    }

    /// Whether anonymous pages of it can migrate, as far as the mapping goes: not if it is hugetlb, DAX,
    /// or mapped by a driver.
    pub(crate) fn may_migrate(&self) -> bool {
        // SAFETY: The reference is to a valid mapping that is locked.
        unsafe { bindings::hmm_gpu_vma_may_migrate(self.as_ptr()) }
    }

    /// Whether ksmd may merge pages of it, or what it has merged may come back there from the swap: not of a
    /// mapping that has never been merged, in an address space in which nothing is.
    pub(crate) fn may_merge(&self) -> bool {
        // SAFETY: The reference is to a valid mapping that is locked.
        unsafe { bindings::hmm_gpu_vma_may_merge(self.as_ptr()) }
    }

    /// Whether it is a shadow stack, which only calls and returns write to.
    pub(crate) fn is_shadow_stack(&self) -> bool {
        // SAFETY: The reference is to a valid mapping that is locked.
        unsafe { bindings::hmm_gpu_vma_is_shadow_stack(self.as_ptr()) }
    }
}

/// Whether the caller's reference is the only one that keeps an address space: its process has ended, or is another program.
pub(crate) fn is_left(mm: &MmWithUser) -> bool {
    // SAFETY: The address space is valid.
    unsafe { bindings::hmm_gpu_mm_is_left(mm.as_raw()) }
}

/// The first address that is not user space's.
pub(crate) fn user_end() -> usize {
    // SAFETY: Always fine to call.
    unsafe { bindings::hmm_gpu_task_size() }
}
