// SPDX-License-Identifier: GPL-2.0

//! Memory that the CPU reaches VRAM through.

use crate::{
    hmm::{
        folio::{DeviceFolio, Filled, SourceFolio, SystemFolio},
        pagemap::Ops,
        PAGE_BYTES,
    },
    sys::{
        bindings,
        user_map::{Place, Placed, What},
    },
};
use core::ptr::NonNull;
use kernel::prelude::*;

/// Says that what this task stored to any [`Mapping`] before is there for everybody: write-combined
/// stores too.
///
/// What publishes a page asks for one, so that the barrier cannot be forgotten.
pub(crate) struct Written(());

impl Written {
    /// Waits for the stores (`wmb`).
    pub(crate) fn wait() -> Self {
        // SAFETY: Always fine to call.
        unsafe { bindings::hmm_gpu_wmb() };
        Self(())
    }
}

/// Has the user's memory at `addr` be there to be written to, as it was a moment ago at the latest.
///
/// Waits for user space, in a fault: nothing may be locked or lent.
pub(crate) fn fault_in_user(addr: usize, len: usize) -> bool {
    // SAFETY: Fine to call for any address, where sleeping is.
    unsafe { bindings::hmm_gpu_fault_in_user(addr, len) }
}

/// An atomic operation on a word.
pub(crate) struct Atomic {
    pub(crate) op: AtomicOp,
    /// 64 bits, not 32.
    pub(crate) wide: bool,
    pub(crate) operand: u64,
    /// For [`AtomicOp::CompareExchange`].
    pub(crate) compare: u64,
}

/// What an atomic operation does.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum AtomicOp {
    Add,
    And,
    Or,
    Exchange,
    CompareExchange,
}

impl Atomic {
    /// Bytes of the word.
    pub(crate) fn bytes(&self) -> usize {
        if self.wide {
            size_of::<u64>()
        } else {
            size_of::<u32>()
        }
    }

    /// Does it, and returns what the word was before.
    ///
    /// # Safety
    ///
    /// `word` is valid for reading and writing, and aligned.
    pub(crate) unsafe fn run(&self, word: *mut u8) -> u64 {
        let op = match self.op {
            AtomicOp::Add => bindings::hmm_gpu_atomic_HMM_GPU_ADD,
            AtomicOp::And => bindings::hmm_gpu_atomic_HMM_GPU_AND,
            AtomicOp::Or => bindings::hmm_gpu_atomic_HMM_GPU_OR,
            AtomicOp::Exchange => bindings::hmm_gpu_atomic_HMM_GPU_XCHG,
            AtomicOp::CompareExchange => bindings::hmm_gpu_atomic_HMM_GPU_CMPXCHG,
        };
        // SAFETY: By the safety requirements.
        unsafe { bindings::hmm_gpu_atomic(word.cast(), op, self.wide, self.operand, self.compare) }
    }
}

enum Kind {
    /// Of a BAR, by `memremap`.
    Bar {
        /// Its first physical address.
        start: u64,
    },
    /// Of system memory, by `vzalloc`.
    System,
    /// Of a dma-buf: its maker's to undo.
    Exported,
}

/// Bytes that the CPU can reach as memory, and that more than one may access at a time.
///
/// Offsets and lengths are in bytes. What does not lie inside is `EINVAL`.
///
/// # Invariants
///
/// The `len` bytes from `base` on are mapped for reading and writing until this is dropped; `base`
/// and `len` are multiples of the page size.
pub(crate) struct Mapping {
    base: NonNull<u8>,
    len: usize,
    kind: Kind,
}

// SAFETY: The mapping is the kernel's, not a task's.
unsafe impl Send for Mapping {}
// SAFETY: All accesses are through raw pointers, and nothing assumes that others do not write.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps physical addresses of a device: write-combined, or as memory if it is coherent.
    ///
    /// To be done before the same addresses become device pages: afterwards the mapping would
    /// silently be uncached.
    ///
    /// # Safety
    ///
    /// The `len` bytes from `start` on are a prefetchable memory BAR (or part of one) that the
    /// caller has requested, and that stays requested and enabled until the mapping is dropped.
    pub(super) unsafe fn bar(start: u64, len: usize, coherent: bool) -> Result<Self> {
        if start % PAGE_BYTES as u64 != 0 || len % PAGE_BYTES != 0 {
            return Err(EINVAL);
        }
        let flags = if coherent {
            bindings::MEMREMAP_WB
        } else {
            bindings::MEMREMAP_WC
        };
        // CAST: Widens.
        // SAFETY: The addresses are the caller's, by the safety requirements.
        let base = unsafe { bindings::memremap(start, len, flags as usize) };
        // INVARIANT: Just mapped, at a page boundary.
        Ok(Self {
            base: NonNull::new(base.cast()).ok_or(ENOMEM)?,
            len,
            kind: Kind::Bar { start },
        })
    }

    /// Allocates zeroed system memory.
    pub(crate) fn system(len: usize) -> Result<Self> {
        if len % PAGE_BYTES != 0 {
            return Err(EINVAL);
        }
        // SAFETY: Always fine to call where sleeping is.
        let base = unsafe { bindings::vzalloc_noprof(len) };
        // INVARIANT: `vzalloc` gives whole pages.
        Ok(Self {
            base: NonNull::new(base.cast()).ok_or(ENOMEM)?,
            len,
            kind: Kind::System,
        })
    }

    /// What somebody else has mapped.
    ///
    /// # Safety
    ///
    /// The `len` bytes from `base` on are mapped for reading and writing until this is dropped.
    pub(super) unsafe fn exported(base: NonNull<u8>, len: usize) -> Result<Self> {
        if base.addr().get() % PAGE_BYTES != 0 || len % PAGE_BYTES != 0 {
            return Err(EINVAL);
        }
        // INVARIANT: By the safety requirements, and the check.
        Ok(Self {
            base,
            len,
            kind: Kind::Exported,
        })
    }

    /// Bytes that there are.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// What a process maps that maps it. `EOPNOTSUPP` for what somebody else lets processes map, or not.
    pub(crate) fn what(&self) -> Result<What> {
        match self.kind {
            Kind::Bar { .. } => Ok(What::Registers),
            Kind::System => Ok(What::Pages),
            Kind::Exported => Err(EOPNOTSUPP),
        }
    }

    /// Maps the page at `offset` for a process.
    ///
    /// All that was mapped must be taken away again, by [`Zap::all`] or with the mappings, before this is dropped: the pages of
    /// system memory only do not go before that.
    ///
    /// [`Zap::all`]: crate::sys::user_map::Zap::all
    pub(crate) fn map(&self, offset: usize, place: Place<'_>) -> Result<Placed> {
        let address = self.at(offset, PAGE_BYTES)?;
        if place.what() != self.what()? || offset % PAGE_BYTES != 0 {
            return Err(EINVAL);
        }
        let pfn = match self.kind {
            // CAST: Widens; a page frame number fits in a word.
            Kind::Bar { start } => (start as usize + offset) / PAGE_BYTES,
            // SAFETY: Inside what `vzalloc` gave.
            Kind::System => unsafe { bindings::hmm_gpu_vmalloc_pfn(address.cast()) },
            Kind::Exported => return Err(EOPNOTSUPP),
        };
        // SAFETY: A page of the BAR, or one of system memory that is this mapping's, and has its reference.
        Ok(unsafe { place.put(pfn) })
    }

    /// Whether somebody else has a reference to the page at `offset`: has mapped or pinned it.
    pub(crate) fn is_pinned(&self, offset: usize) -> bool {
        match (&self.kind, self.at(offset, PAGE_BYTES)) {
            // SAFETY: Inside what `vzalloc` gave.
            (Kind::System, Ok(address)) => unsafe {
                bindings::hmm_gpu_vmalloc_refs(address.cast()) > 0
            },
            _ => false,
        }
    }

    /// The `len` bytes at `offset`.
    fn at(&self, offset: usize, len: usize) -> Result<*mut u8> {
        if offset.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(EINVAL);
        }
        // SAFETY: Inside the mapping, as just checked.
        Ok(unsafe { self.base.as_ptr().add(offset) })
    }

    /// The pages of `len` bytes at `offset`, which is a page boundary.
    fn pages(&self, offset: usize, len: usize) -> Result<impl Iterator<Item = (usize, *mut u8)>> {
        if offset % PAGE_BYTES != 0 {
            return Err(EINVAL);
        }
        let base = self.at(offset, len)?;
        let pages = (0..len).step_by(PAGE_BYTES).map(move |done| {
            // SAFETY: Inside the mapping, as just checked.
            (done, unsafe { base.add(done) })
        });
        Ok(pages)
    }

    /// Copies a folio of system memory into a device folio of the same size, whose page `i` is at
    /// `i * PAGE_BYTES` of this mapping.
    ///
    /// Fails with `EINVAL` if the sizes differ or the folio lies outside.
    pub(crate) fn write_folio<T: Ops>(
        &self,
        to: DeviceFolio<'_, T>,
        from: &SourceFolio<'_>,
    ) -> Result<Filled> {
        if to.len() != from.len() {
            return Err(EINVAL);
        }
        let source = from.as_ptr().as_ptr();
        for (done, page) in self.pages(to.index() * PAGE_BYTES, to.len())? {
            // SAFETY: A page of the mapping, and a page of the folio.
            unsafe { bindings::hmm_gpu_copy_page(page.cast(), source.add(done).cast()) };
        }
        // SAFETY: Just written, all of it.
        Ok(unsafe { Filled::device(to) })
    }

    /// Copies the pages at `offset` of another device's memory, or elsewhere in this, into a device folio,
    /// whose page `i` is at `i * PAGE_BYTES` of this mapping.
    pub(crate) fn copy_folio<T: Ops>(
        &self,
        to: DeviceFolio<'_, T>,
        from: &Mapping,
        offset: usize,
    ) -> Result<Filled> {
        let sources = from.pages(offset, to.len())?;
        let targets = self.pages(to.index() * PAGE_BYTES, to.len())?;
        for ((_, target), (_, source)) in targets.zip(sources) {
            // SAFETY: A page of each mapping.
            unsafe { bindings::hmm_gpu_copy_page(target.cast(), source.cast()) };
        }
        // SAFETY: Just written, all of it.
        Ok(unsafe { Filled::device(to) })
    }

    /// Fills a device folio, whose page `i` is at `i * PAGE_BYTES` of this mapping, with zeroes.
    pub(crate) fn zero_folio<T: Ops>(&self, to: DeviceFolio<'_, T>) -> Result<Filled> {
        self.zero(to.index() * PAGE_BYTES, to.len())?;
        // SAFETY: Just written, all of it.
        Ok(unsafe { Filled::device(to) })
    }

    /// Copies the pages at `offset` into a folio of system memory.
    pub(crate) fn read_folio(&self, offset: usize, mut to: SystemFolio) -> Result<Filled> {
        let len = to.len();
        let target = to.as_mut_ptr().as_ptr();
        for (done, page) in self.pages(offset, len)? {
            // SAFETY: A page of the folio, which is ours alone, and a page of the mapping.
            unsafe { bindings::hmm_gpu_copy_page(target.add(done).cast(), page.cast()) };
        }
        // SAFETY: Just written, all of it.
        Ok(unsafe { Filled::system(to) })
    }

    /// Fills `len` bytes (whole pages) at `offset` with zeroes.
    pub(crate) fn zero(&self, offset: usize, len: usize) -> Result {
        for (_, page) in self.pages(offset, len)? {
            // SAFETY: A page of the mapping.
            unsafe { bindings::hmm_gpu_clear_page(page.cast()) };
        }
        Ok(())
    }

    /// Reads `to.len()` bytes at `offset`.
    pub(crate) fn read_bytes(&self, offset: usize, to: &mut [u8]) -> Result {
        let from = self.at(offset, to.len())?;
        // SAFETY: Inside the mapping, which is no Rust object.
        unsafe { bindings::hmm_gpu_copy(to.as_mut_ptr().cast(), from.cast(), to.len()) };
        Ok(())
    }

    /// Reads `len` bytes at `offset` into the user's memory at `to`. Nothing is faulted in there: returns
    /// whether all of it was there; if not, some may have been written.
    pub(crate) fn read_to_user(&self, offset: usize, to: usize, len: usize) -> Result<bool> {
        let from = self.at(offset, len)?;
        // SAFETY: Inside the mapping. Where the user's memory is, is checked.
        Ok(unsafe { bindings::hmm_gpu_copy_to_user_nofault(to, from.cast(), len) })
    }

    /// Writes `from` at `offset`.
    pub(crate) fn write_bytes(&self, offset: usize, from: &[u8]) -> Result {
        let to = self.at(offset, from.len())?;
        // SAFETY: As for reading.
        unsafe { bindings::hmm_gpu_copy(to.cast(), from.as_ptr().cast(), from.len()) };
        Ok(())
    }

    /// Does an atomic operation on the word at `offset`, and returns what it was before.
    pub(crate) fn atomic(&self, offset: usize, operation: &Atomic) -> Result<u64> {
        if offset % operation.bytes() != 0 {
            return Err(EINVAL);
        }
        let word = self.at(offset, operation.bytes())?;
        // SAFETY: Inside the mapping, and aligned since the mapping begins at a page boundary.
        Ok(unsafe { operation.run(word) })
    }

    /// Reads a word.
    pub(crate) fn read_u64(&self, offset: usize) -> Result<u64> {
        if offset % size_of::<u64>() != 0 {
            return Err(EINVAL);
        }
        // SAFETY: Inside the mapping, and aligned since the mapping begins at a page boundary.
        Ok(unsafe {
            self.at(offset, size_of::<u64>())?
                .cast::<u64>()
                .read_volatile()
        })
    }

    /// Writes a word.
    pub(crate) fn write_u64(&self, offset: usize, value: u64) -> Result {
        if offset % size_of::<u64>() != 0 {
            return Err(EINVAL);
        }
        // SAFETY: As for reading.
        unsafe {
            self.at(offset, size_of::<u64>())?
                .cast::<u64>()
                .write_volatile(value)
        };
        Ok(())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        let base = self.base.as_ptr().cast();
        match self.kind {
            // SAFETY: Made by `memremap`, and not used any more.
            Kind::Bar { .. } => unsafe { bindings::memunmap(base) },
            // SAFETY: Made by `vzalloc`, and not used any more.
            Kind::System => unsafe { bindings::vfree(base) },
            Kind::Exported => {}
        }
    }
}
