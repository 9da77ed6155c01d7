//! Private pools: the driver's calls, and the mapping of one.

use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::io::Errno;
use rustix::mm::{self, MapFlags, ProtFlags};

use super::File;
use crate::uapi;

impl File {
    /// `POOL`.
    pub fn pool(&self, argument: &mut uapi::hmm_gpu_pool) -> Result<(), Errno> {
        // SAFETY: as in `query`.
        unsafe {
            self.call(
                uapi::HMM_GPU_POOL,
                (argument as *mut uapi::hmm_gpu_pool).cast(),
            )
        }
    }

    /// `IMPORT`: the file of the device that it makes.
    pub fn import(&self, argument: &mut uapi::hmm_gpu_import) -> Result<Self, Errno> {
        // SAFETY: as in `query`. What becomes VRAM is what whoever has the dma-buf shares with its exporter, and no Rust object.
        unsafe {
            self.call(
                uapi::HMM_GPU_IMPORT,
                (argument as *mut uapi::hmm_gpu_import).cast(),
            )
        }?;
        let fd = RawFd::try_from(argument.fd).map_err(|_| Errno::BADF)?;
        // SAFETY: the driver has just opened it, for this call.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self { fd })
    }

    /// `EXECUTE`.
    pub fn execute(&self, argument: &mut uapi::hmm_gpu_execute) -> Result<(), Errno> {
        // SAFETY: as in `query`. What waits for an execution waits for a bounded time.
        unsafe {
            self.call(
                uapi::HMM_GPU_EXECUTE,
                (argument as *mut uapi::hmm_gpu_execute).cast(),
            )
        }
    }
}

/// A pool that is mapped.
///
/// # Invariants
///
/// `start` is a page boundary, from which on `bytes` bytes are mapped for reading and writing until this is dropped.
#[derive(Debug)]
pub(crate) struct PoolMapping {
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the mapping is the process's, not a thread's.
unsafe impl Send for PoolMapping {}
// SAFETY: through a shared reference it is accessed atomically only.
unsafe impl Sync for PoolMapping {}

impl PoolMapping {
    /// Maps the `bytes` bytes at `offset` of the VRAM, which are the file's pool or in it.
    pub(crate) fn new(file: &File, offset: u64, bytes: usize) -> Result<Self, Errno> {
        let read_write = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new map at an address that the kernel picks touches no memory there is.
        let start = unsafe {
            mm::mmap(
                ptr::null_mut(),
                bytes,
                read_write,
                MapFlags::SHARED,
                file,
                offset,
            )
        }?;
        let start = NonNull::new(start.cast()).ok_or(Errno::NOMEM)?;
        Ok(Self { start, bytes })
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// The word at `place`, if there is one.
    fn word(&self, place: usize) -> Option<&AtomicU64> {
        let end = place.checked_add(size_of::<AtomicU64>())?;
        if end > self.bytes || place % align_of::<AtomicU64>() != 0 {
            return None;
        }
        // SAFETY: inside the mapping, by the check above.
        let word = unsafe { self.start.as_ptr().add(place) };
        // SAFETY: aligned, since the mapping is; it lives as long as `self`. Whoever else writes to it is no Rust code that this one
        // shares memory with, or does so through the raw pointer on its own account.
        Some(unsafe { AtomicU64::from_ptr(word.cast()) })
    }

    pub(crate) fn load(&self, place: usize) -> Option<u64> {
        Some(self.word(place)?.load(Ordering::Acquire))
    }

    pub(crate) fn store(&self, place: usize, word: u64) -> Option<()> {
        self.word(place)?.store(word, Ordering::Release);
        Some(())
    }
}

impl Drop for PoolMapping {
    fn drop(&mut self) {
        // SAFETY: mapped by this value, and not used any more.
        let unmapped = unsafe { mm::munmap(self.start.as_ptr().cast(), self.bytes) };
        if let Err(errno) = unmapped {
            tracing::warn!(%errno, "a pool cannot be unmapped");
        }
    }
}
