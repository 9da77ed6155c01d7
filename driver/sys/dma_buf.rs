// SPDX-License-Identifier: GPL-2.0

//! Memory that another driver exports (a dma-buf), as the CPU reaches it.
//!
//! C header: `include/linux/dma-buf.h`.

use crate::{
    hmm::PAGE_BYTES,
    sys::{bindings, mapping::Mapping},
};
use core::{ops::Deref, ptr::NonNull};
use kernel::{
    error::{from_err_ptr, to_result},
    prelude::*,
};

/// A reference to a dma-buf.
///
/// # Invariants
///
/// `raw` is valid, and a reference to it is this value's.
struct DmaBuf {
    raw: NonNull<bindings::dma_buf>,
}

impl DmaBuf {
    /// The one that file descriptor `fd` of this process is. `EBADF`; `EINVAL` if it is something else.
    fn get(fd: i32) -> Result<Self> {
        // SAFETY: Always fine to call.
        let raw = from_err_ptr(unsafe { bindings::dma_buf_get(fd) })?;
        // INVARIANT: Just taken.
        Ok(Self {
            raw: NonNull::new(raw).ok_or(EBADF)?,
        })
    }

    fn bytes(&self) -> usize {
        // SAFETY: Valid, by the type invariants; the size never changes.
        unsafe { (*self.raw.as_ptr()).size }
    }

    fn is_writable(&self) -> bool {
        // SAFETY: Valid, by the type invariants, and so is its file, which it is one with; the mode never changes.
        let mode = unsafe { (*(*self.raw.as_ptr()).file).f_mode };
        mode & bindings::hmm_gpu_fmode_HMM_GPU_FMODE_WRITE != 0
    }

    fn has_vmap(&self) -> bool {
        // SAFETY: Valid, by the type invariants; its exporter keeps the operations as long as it is.
        unsafe { (*(*self.raw.as_ptr()).ops).vmap.is_some() }
    }
}

impl Drop for DmaBuf {
    fn drop(&mut self) {
        // SAFETY: The reference is this value's to give up.
        unsafe { bindings::dma_buf_put(self.raw.as_ptr()) };
    }
}

/// A dma-buf that is mapped for the kernel: its exporter keeps it where it is meanwhile.
///
/// # Invariants
///
/// `map` is what `dma_buf_vmap` has said for `buf`, and this value's to undo.
struct Mapped {
    map: bindings::iosys_map,
    buf: DmaBuf,
}

// SAFETY: A dma-buf has a lock of its own, and neither it nor the mapping is a task's.
unsafe impl Send for Mapped {}
// SAFETY: Nothing is done through a shared reference.
unsafe impl Sync for Mapped {}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: By the type invariants.
        unsafe { bindings::dma_buf_vunmap_unlocked(self.buf.raw.as_ptr(), &mut self.map) };
    }
}

/// The first bytes of a dma-buf.
pub(crate) struct Exported {
    // Before what it is in, so that it is dropped first.
    mapping: Mapping,
    mapped: Mapped,
}

impl Exported {
    /// Maps the first `len` bytes, whole pages, of the dma-buf that file descriptor `fd` of this process is.
    ///
    /// Fails with `EBADF`; with `EINVAL` if it is no dma-buf, or a shorter one; with `EACCES` if it may not be written to; with `EOPNOTSUPP` if
    /// its exporter has no `vmap`; and as that does.
    pub(crate) fn new(fd: i32, len: usize) -> Result<Self> {
        let buf = DmaBuf::get(fd)?;
        if len == 0 || len % PAGE_BYTES != 0 || len > buf.bytes() {
            return Err(EINVAL);
        }
        if !buf.is_writable() {
            return Err(EACCES);
        }
        // Asked for, since the core says `EINVAL` of that too.
        if !buf.has_vmap() {
            return Err(EOPNOTSUPP);
        }
        let mut map = bindings::iosys_map::default();
        // SAFETY: The dma-buf is valid, and the map ours.
        to_result(unsafe { bindings::dma_buf_vmap_unlocked(buf.raw.as_ptr(), &mut map) })?;
        // INVARIANT: Just mapped.
        let mapped = Mapped { map, buf };
        // SAFETY: Both are an address, and on x86 memory of a device is reached as any other is.
        let base = unsafe { mapped.map.__bindgen_anon_1.vaddr };
        let base = NonNull::new(base.cast::<u8>()).ok_or(ENOMEM)?;
        // SAFETY: As much as the dma-buf has is mapped for reading and writing, until `mapped` is dropped: after the mapping.
        let mapping = unsafe { Mapping::exported(base, len) }?;
        Ok(Self { mapping, mapped })
    }

    /// What tells the dma-buf from all others that there are, as long as this is there. Not 0.
    pub(crate) fn id(&self) -> u64 {
        // CAST: Widens.
        self.mapped.buf.raw.addr().get() as u64
    }
}

impl Deref for Exported {
    type Target = Mapping;

    fn deref(&self) -> &Mapping {
        &self.mapping
    }
}
