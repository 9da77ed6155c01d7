// SPDX-License-Identifier: GPL-2.0

//! A file's memory mapped by its process: pages come by faults, as long as the file lets them, and all of them go at once.
//!
//! C header: `include/linux/mm.h`.

use crate::sys::bindings;
use core::{marker::PhantomData, ptr::NonNull};
use kernel::{
    fs::File,
    mm::{
        virt::{flags, VmaNew},
        Mm,
    },
    prelude::*,
};

/// What is mapped.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum What {
    /// Memory, whose pages can be pinned as those of any file can.
    Pages,
    /// Memory of a device, write-combined, that is known by its addresses alone.
    Registers,
}

/// Where the pages of a mapping come from.
pub(crate) trait Pager: Sync + 'static {
    /// Address space `mm` touches page `page` of the file. Fails if it cannot have it: that is `SIGBUS`.
    fn page(&self, mm: &Mm, page: usize, place: Place<'_>) -> Result<Placed>;
}

/// Where a page is to be mapped.
///
/// # Invariants
///
/// `vmf` is a fault that the kernel is handling now, in a mapping that [`set_up`] has set up for `what`.
pub(crate) struct Place<'a> {
    vmf: NonNull<bindings::vm_fault>,
    what: What,
    life: PhantomData<&'a ()>,
}

/// What the kernel is told about a page.
pub(crate) struct Placed(bindings::vm_fault_t);

impl Place<'_> {
    /// Puts page frame `pfn` there.
    ///
    /// # Safety
    ///
    /// With [`What::Pages`], `pfn` is a page of system memory that has a reference; with [`What::Registers`], it is one of
    /// a BAR. It stays so until [`Zap::all`] is called for the file.
    pub(super) unsafe fn put(self, pfn: usize) -> Placed {
        let registers = self.what == What::Registers;
        // SAFETY: By the type invariants, and by the safety requirements.
        Placed(unsafe { bindings::hmm_gpu_insert(self.vmf.as_ptr(), pfn, registers) })
    }

    /// What kind of mapping it is.
    pub(super) fn what(&self) -> What {
        self.what
    }
}

struct Ops<P: Pager>(PhantomData<P>);

impl<P: Pager> Ops<P> {
    const PAGES: &'static bindings::vm_operations_struct = &Self::ops(Self::fault_pages);
    const REGISTERS: &'static bindings::vm_operations_struct = &Self::ops(Self::fault_registers);

    const fn ops(
        fault: unsafe extern "C" fn(*mut bindings::vm_fault) -> bindings::vm_fault_t,
    ) -> bindings::vm_operations_struct {
        // SAFETY: The structure consists of optional functions and a name, for all of which zero is none.
        let mut ops: bindings::vm_operations_struct = unsafe { core::mem::zeroed() };
        ops.fault = Some(fault);
        ops
    }

    /// # Safety
    ///
    /// Called by the kernel as `vm_operations_struct::fault`, in a mapping that [`set_up`] has set up for [`What::Pages`].
    unsafe extern "C" fn fault_pages(vmf: *mut bindings::vm_fault) -> bindings::vm_fault_t {
        // SAFETY: By the safety requirements.
        unsafe { Self::fault(vmf, What::Pages) }
    }

    /// # Safety
    ///
    /// As above, for [`What::Registers`].
    unsafe extern "C" fn fault_registers(vmf: *mut bindings::vm_fault) -> bindings::vm_fault_t {
        // SAFETY: By the safety requirements.
        unsafe { Self::fault(vmf, What::Registers) }
    }

    /// # Safety
    ///
    /// As above, for `what`.
    unsafe fn fault(vmf: *mut bindings::vm_fault, what: What) -> bindings::vm_fault_t {
        // SAFETY: The kernel passes a valid fault. The mapping has a reference to its file, and with it to the pager, as
        // `set_up` asks for; its address space is there while a fault in it is handled.
        let (pager, mm, page) = unsafe {
            let vma = (*vmf).__bindgen_anon_1.vma;
            (
                &*(*vma).vm_private_data.cast::<P>(),
                Mm::from_raw((*vma).vm_mm),
                (*vmf).__bindgen_anon_1.pgoff,
            )
        };
        let Some(vmf) = NonNull::new(vmf) else {
            return bindings::vm_fault_reason_VM_FAULT_SIGBUS;
        };
        let life = PhantomData;
        // INVARIANT: By the safety requirements.
        match pager.page(mm, page, Place { vmf, what, life }) {
            Ok(Placed(outcome)) => outcome,
            Err(error) if error == ENOMEM => bindings::vm_fault_reason_VM_FAULT_OOM,
            Err(_) => bindings::vm_fault_reason_VM_FAULT_SIGBUS,
        }
    }
}

/// Sets up a mapping of a file whose pages `pager` gives: shared, not to be executed, not inherited by `fork`, not to grow.
///
/// Fails with `EINVAL` if it is private, or the file not open for writing, and with `EPERM` if it is to be executed.
///
/// # Safety
///
/// `vma` is mapped with a file that keeps `pager` as long as it is open.
pub(super) unsafe fn set_up<P: Pager>(vma: &VmaNew, what: What, pager: &P) -> Result {
    if vma.flags() & flags::SHARED == 0 {
        return Err(EINVAL);
    }
    vma.try_clear_mayexec().map_err(|_| EPERM)?;
    let ops = match what {
        What::Pages => Ops::<P>::PAGES,
        What::Registers => Ops::<P>::REGISTERS,
    };
    // SAFETY: The mapping is being made, and is nobody else's yet. It keeps the file.
    unsafe {
        let raw = vma.as_ptr();
        bindings::hmm_gpu_vma_set_up(raw, what == What::Registers);
        (*raw).vm_ops = ops;
        (*raw).vm_private_data = core::ptr::from_ref(pager).cast_mut().cast();
    }
    Ok(())
}

/// The way to all mappings of a file.
///
/// # Invariants
///
/// `mapping` is the file's, and this has a reference to the inode that it is of.
pub(crate) struct Zap {
    mapping: NonNull<bindings::address_space>,
}

// SAFETY: What the reference is to is not a task's.
unsafe impl Send for Zap {}
// SAFETY: It has locks of its own.
unsafe impl Sync for Zap {}

impl Zap {
    /// For the mappings of `file`.
    pub(crate) fn new(file: &File) -> Result<Self> {
        // SAFETY: The file is valid, and so is what it maps. The reference passes to the value returned.
        let mapping = unsafe { bindings::hmm_gpu_mapping_get(file.as_ptr()) };
        // INVARIANT: Just taken.
        Ok(Self {
            mapping: NonNull::new(mapping).ok_or(ENODEV)?,
        })
    }

    /// Takes all pages away from whoever maps them (`unmap_mapping_range`). Those that may be had come back by faults: also to
    /// mappings of other files on the same inode.
    pub(crate) fn all(&self) {
        // SAFETY: By the type invariants.
        unsafe { bindings::unmap_mapping_range(self.mapping.as_ptr(), 0, 0, 1) };
    }
}

impl Drop for Zap {
    fn drop(&mut self) {
        // SAFETY: The reference is ours to give up, by the type invariants.
        unsafe { bindings::hmm_gpu_mapping_put(self.mapping.as_ptr()) };
    }
}
