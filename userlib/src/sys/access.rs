//! The device writes at mere addresses.

use crate::access::{Ask, Operation, Policy};
use crate::uapi::{HMM_GPU_OP_COPY, HMM_GPU_OP_WRITE};
use crate::{Accessed, Device, Error};

impl Device {
    /// As [`write`](Self::write), to any address, which reaches the driver as it is. Without bytes it is `EINVAL`.
    ///
    /// What cannot be written is an error: `EFAULT` where nothing is mapped, `EACCES` where the mapping may not be written.
    ///
    /// # Safety
    ///
    /// As for a write through a raw pointer: whatever of the range the process may write must be this program's to change now.
    /// No reference may forbid it, no other thread may access it without synchronization, and what is written must be valid
    /// for what lies there.
    ///
    /// ```no_run
    /// use hmm_gpu::{Device, Policy};
    ///
    /// # fn main() -> Result<(), hmm_gpu::Error> {
    /// let device = Device::open_first()?;
    /// let mut number = Box::new(0u32);
    /// let addr = &raw mut *number as usize;
    /// // SAFETY: the box is this function's alone, and any bytes are a number.
    /// unsafe { device.write_at(addr, &7u32.to_ne_bytes(), Policy::Migrate)? };
    /// assert_eq!(*number, 7);
    /// # Ok(())
    /// # }
    /// ```
    pub unsafe fn write_at(
        &self,
        addr: usize,
        from: &[u8],
        policy: Policy,
    ) -> Result<Accessed, Error> {
        let ask = Ask {
            operation: Operation::Write,
            addr,
            bytes: from.len(),
            policy,
        };
        self.access(ask, |argument, done| {
            argument.op = HMM_GPU_OP_WRITE;
            argument.buffer_ptr = from[done..].as_ptr() as u64;
            // SAFETY: a write writes at `addr` only, which is the caller's promise.
            unsafe { self.file().access(argument) }
        })
    }

    /// As [`copy`](Self::copy), of `bytes` bytes from any address to any address, which reach the driver as they are. Without
    /// bytes, and where the two ranges overlap, it is `EINVAL`.
    ///
    /// What cannot be read or written is an error: `EFAULT` where nothing is mapped, `EACCES` where the mapping does not allow
    /// it.
    ///
    /// # Safety
    ///
    /// That of [`write_at`](Self::write_at), for the `bytes` bytes at `to_addr`. For those at `addr` there is no condition, as
    /// for [`read_at`](Self::read_at).
    pub unsafe fn copy_at(
        &self,
        addr: usize,
        to_addr: usize,
        bytes: usize,
        policy: Policy,
    ) -> Result<Accessed, Error> {
        let ask = Ask {
            operation: Operation::Copy { to_addr },
            addr,
            bytes,
            policy,
        };
        self.access(ask, |argument, done| {
            argument.op = HMM_GPU_OP_COPY;
            argument.to_addr = (to_addr as u64).wrapping_add(done as u64);
            // SAFETY: a copy writes at `to_addr` only, which is the caller's promise.
            unsafe { self.file().access(argument) }
        })
    }
}
