//! Memory straight from the kernel, owned as a slice.

use std::marker::PhantomData;
use std::ptr::{self, NonNull};

use bytemuck::Pod;
use rustix::io::Errno;
use rustix::mm::{self, Advice, MapFlags, ProtFlags};

use crate::range::PAGE_BYTES;

/// Private anonymous memory that holds `len` values and begins as zeroes.
///
/// # Invariants
///
/// - `start` is aligned for `T`, and `len * size_of::<T>()` bytes from it are readable, writable and this value's alone.
/// - `map_bytes` is what was mapped at `start` and is not unmapped yet: 0 if nothing was.
pub(crate) struct Mapping<T> {
    start: NonNull<T>,
    len: usize,
    map_bytes: usize,
    owns: PhantomData<T>,
}

// SAFETY: it owns its memory, as a `Vec<T>` does.
unsafe impl<T: Send> Send for Mapping<T> {}
// SAFETY: as above; a shared reference gives out shared references only.
unsafe impl<T: Sync> Sync for Mapping<T> {}

impl<T: Pod> Mapping<T> {
    /// Maps memory for `len` values, at a multiple of `align` bytes (a power of two) or of a page if that is more.
    ///
    /// `EOVERFLOW` if so many bytes cannot be counted; otherwise the error of `mmap`.
    pub(crate) fn new(len: usize, align: usize) -> Result<Self, Errno> {
        let align = align.max(align_of::<T>()).max(PAGE_BYTES);
        let bytes = len.checked_mul(size_of::<T>()).ok_or(Errno::OVERFLOW)?;
        if bytes == 0 {
            return Ok(Self {
                start: NonNull::dangling(),
                len,
                map_bytes: 0,
                owns: PhantomData,
            });
        }
        let map_bytes = bytes
            .checked_next_multiple_of(PAGE_BYTES)
            .ok_or(Errno::OVERFLOW)?;
        // The kernel aligns to pages. For more than that, map too much and give back what lies outside.
        let spare = align - PAGE_BYTES;
        let whole = map_bytes
            .checked_add(spare)
            .filter(|&n| isize::try_from(n).is_ok())
            .ok_or(Errno::OVERFLOW)?;
        let (read_write, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
        // SAFETY: a new map at an address that the kernel picks touches no memory there is.
        let mapped = unsafe { mm::mmap_anonymous(ptr::null_mut(), whole, read_write, flags) }?;
        let before = mapped.cast::<u8>().align_offset(align);
        let mapped = mapped.cast::<u8>();
        let start = mapped.wrapping_add(before);
        // SAFETY: `before` is at most `spare`, so both pieces are in the new map and outside of what is kept.
        unsafe { unmap(mapped, before) };
        // SAFETY: as above.
        unsafe { unmap(start.wrapping_add(map_bytes), spare - before) };
        let start = NonNull::new(start.cast()).ok_or(Errno::NOMEM)?;
        Ok(Self {
            start,
            len,
            map_bytes,
            owns: PhantomData,
        })
    }

    /// Asks the kernel for huge pages. It may have none, and then nothing changes.
    pub(crate) fn prefer_huge_pages(&mut self) {
        if self.map_bytes == 0 {
            return;
        }
        // SAFETY: the range is this value's own map, and the advice changes no byte of it.
        let advised = unsafe {
            mm::madvise(
                self.start.as_ptr().cast(),
                self.map_bytes,
                Advice::LinuxHugepage,
            )
        };
        if let Err(errno) = advised {
            tracing::debug!(%errno, "no huge pages here");
        }
    }

    pub(crate) fn as_slice(&self) -> &[T] {
        // SAFETY: by the invariant, and the kernel's zeroes as well as anything written later are valid (`Pod`).
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [T] {
        // SAFETY: as in `as_slice`, and `self` is borrowed alone.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl<T> Drop for Mapping<T> {
    fn drop(&mut self) {
        // SAFETY: it is this value's own map, and no reference into it outlives the value.
        unsafe { unmap(self.start.as_ptr().cast(), self.map_bytes) };
    }
}

/// Unmaps whole pages, if there are any. What cannot be unmapped (the process has as many maps as it may have) stays.
///
/// # Safety
///
/// Nothing may use these bytes any more.
unsafe fn unmap(start: *mut u8, bytes: usize) {
    if bytes == 0 {
        return;
    }
    // SAFETY: the caller's promise.
    if let Err(errno) = unsafe { mm::munmap(start.cast(), bytes) } {
        tracing::error!(%errno, ?start, bytes, "cannot unmap: this memory is lost until the process ends");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_begins_as_zeroes_and_keeps_what_is_written() {
        let mut map = Mapping::<u64>::new(1025, 1).unwrap();
        assert_eq!(map.as_slice(), [0; 1025]);
        map.as_mut_slice()[1024] = 7;
        assert_eq!(map.as_slice()[1024], 7);
        assert_eq!(map.as_slice().as_ptr() as usize % PAGE_BYTES, 0);
    }

    #[test]
    fn any_alignment_is_met() {
        for align in [1, 64, PAGE_BYTES, 1 << 16, 1 << 21, 1 << 30] {
            let map = Mapping::<u8>::new(5000, align).unwrap();
            assert_eq!(map.as_slice().as_ptr() as usize % align, 0, "{align}");
            assert!(map.as_slice().iter().all(|&byte| byte == 0));
        }
    }

    #[test]
    fn no_bytes_need_no_map() {
        assert_eq!(Mapping::<u32>::new(0, 1).unwrap().as_slice(), []);
        assert_eq!(Mapping::<[u8; 0]>::new(9, 1).unwrap().as_slice().len(), 9);
    }

    #[test]
    fn too_much_is_an_error() {
        assert_eq!(
            Mapping::<u64>::new(usize::MAX / 4, 1).err(),
            Some(Errno::OVERFLOW)
        );
        assert_eq!(
            Mapping::<u8>::new(usize::MAX, 1).err(),
            Some(Errno::OVERFLOW)
        );
        assert_eq!(
            Mapping::<u8>::new(usize::MAX / 2, 1 << 30).err(),
            Some(Errno::OVERFLOW)
        );
        assert_eq!(Mapping::<u8>::new(1 << 62, 1).err(), Some(Errno::NOMEM));
    }
}
