//! Anonymous memory whose pages are of a known size. Unsafe code is here and in `node.rs` only.

use std::ffi::c_void;
use std::ptr;

use rustix::io::Errno;
use rustix::mm::{madvise, mmap_anonymous, munmap, Advice, MapFlags, ProtFlags};

/// Bytes of a page.
pub(crate) const PAGE: usize = 4096;
/// Bytes of a huge page, to which all memory is aligned.
pub(crate) const HUGE_PAGE: usize = 2 << 20;

/// Which pages the kernel is asked for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pages {
    /// 4 KiB.
    Small,
    /// 2 MiB.
    Huge,
}

/// A mapping of its own, zero at first and unmapped when dropped.
///
/// # Invariants
///
/// `whole` bytes at `base` are mapped, readable and writable, and nobody else's; `len` bytes at `start` are among them.
pub(crate) struct Memory {
    base: *mut c_void,
    whole: usize,
    start: *mut u8,
    len: usize,
}

impl Memory {
    /// Maps `len` bytes, for pages of that size.
    pub(crate) fn new(len: usize, pages: Pages) -> Result<Self, Errno> {
        let whole = len + HUGE_PAGE;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that is there.
        let base = unsafe {
            mmap_anonymous(
                ptr::null_mut(),
                whole,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )?
        };
        let start = base
            .cast::<u8>()
            .wrapping_add(base.cast::<u8>().align_offset(HUGE_PAGE));
        // INVARIANT: the aligned start is less than a huge page behind the base.
        let memory = Self {
            base,
            whole,
            start,
            len,
        };
        let advice = match pages {
            Pages::Small => Advice::LinuxNoHugepage,
            Pages::Huge => Advice::LinuxHugepage,
        };
        // SAFETY: both kinds of advice leave the content as it is.
        unsafe { madvise(base, whole, advice)? };
        Ok(memory)
    }

    /// The bytes.
    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: these bytes are mapped and ours (invariant), and changed only through `bytes_mut`.
        unsafe { std::slice::from_raw_parts(self.start, self.len) }
    }

    /// The bytes, to be changed.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`, and nobody else has them while `self` is borrowed.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.len) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours (invariant), and no slice of it outlives `self`.
        let _ = unsafe { munmap(self.base, self.whole) };
    }
}
