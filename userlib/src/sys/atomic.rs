//! The device does atomic operations at mere addresses.

use crate::{AtomicOperation, AtomicWord, Device, Error, Policy};

impl Device {
    /// An atomic operation on the word at any address, which reaches the driver as it is: of memory that is not this program's
    /// own Rust, say. As [`fetch_add`](Self::fetch_add) and the others otherwise.
    ///
    /// Errors: as those, and `EINVAL` (the address is not a multiple of the word's size, or what the operation takes is wider
    /// than the word).
    ///
    /// # Safety
    ///
    /// If the word can be written, it must be this program's to change, and any bits a value of what lies there. Others may
    /// access it meanwhile if they do so atomically, and in the same size.
    ///
    /// ```no_run
    /// use std::sync::atomic::AtomicU32;
    ///
    /// use hmm_gpu::{AtomicOperation, Device, Policy};
    ///
    /// # fn main() -> Result<(), hmm_gpu::Error> {
    /// let device = Device::open_first()?;
    /// let mut number = Box::new(5u32);
    /// let (addr, double) = (&raw mut *number as usize, AtomicOperation::FetchAdd(5));
    /// // SAFETY: the box is this function's alone, and any bits are a number.
    /// let old = unsafe { device.atomic_at::<AtomicU32>(addr, double, Policy::Map)? };
    /// assert_eq!((old, *number), (5, 10));
    /// # Ok(())
    /// # }
    /// ```
    pub unsafe fn atomic_at<W: AtomicWord>(
        &self,
        addr: usize,
        operation: AtomicOperation,
        policy: Policy,
    ) -> Result<W::Value, Error> {
        self.ask_atomic::<W>(addr, operation, policy, |argument| {
            argument.addr = addr as u64;
            // SAFETY: the word is at `addr`, and the rest is the caller's promise.
            unsafe { self.file().atomic(argument) }
        })
    }
}
