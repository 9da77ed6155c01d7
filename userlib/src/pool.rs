//! Private pools, and the executions that use them.

use std::time::Duration;

use rustix::io::retry_on_intr;

use crate::sys::pool::PoolMapping;
use crate::uapi::{self, hmm_gpu_execute, hmm_gpu_pool};
use crate::{Attempt, Device, Error};

/// A device's private pool, mapped: VRAM of this process's own, for GPU work that does not ask the driver at every step.
///
/// Made by [`Device::create_pool`]. The driver puts all pages that this device is to have in there, and the nodes of the
/// device page table; its entries name places in it. Dropping this unmaps the pool; it stays the device's until that is
/// dropped.
///
/// # Bytes
///
/// What is in there is written by the driver, by GPU work and by whoever has the pointer, at any time: so it is handed out as
/// a pointer, and as words that are read and written atomically. Nothing of the driver can be broken by what is written;
/// the content of this process's own memory, as far as it is in the pool, can. After the device is unbound every access is
/// `SIGBUS`.
#[derive(Debug)]
pub struct Pool {
    offset: u64,
    mapping: PoolMapping,
}

impl Pool {
    /// Where in the VRAM it begins, in bytes. Offsets in the device page table are from the start of the VRAM: less this, they
    /// are from [`as_ptr`](Self::as_ptr).
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Its size in bytes.
    pub fn bytes(&self) -> usize {
        self.mapping.bytes()
    }

    /// Where it is mapped, at a multiple of 4096. Valid until this is dropped.
    pub fn as_ptr(&self) -> *mut u8 {
        self.mapping.as_ptr()
    }

    /// Where in the mapping the `bytes` bytes at an offset in the VRAM are, if they are in the pool.
    pub fn place(&self, vram_offset: u64, bytes: usize) -> Option<usize> {
        let start = usize::try_from(vram_offset.checked_sub(self.offset)?).ok()?;
        let end = start.checked_add(bytes)?;
        (end <= self.bytes()).then_some(start)
    }

    /// Reads the word at an offset in the VRAM, a multiple of 8. `None` if it is not in the pool.
    pub fn load(&self, vram_offset: u64) -> Option<u64> {
        self.mapping
            .load(self.place(vram_offset, size_of::<u64>())?)
    }

    /// Writes the word at an offset in the VRAM, a multiple of 8. `None`, and nothing is written, if it is not in the pool.
    pub fn store(&self, vram_offset: u64, word: u64) -> Option<()> {
        let place = self.place(vram_offset, size_of::<u64>())?;
        self.mapping.store(place, word)
    }
}

/// How an execution ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Ended {
    /// Whoever had to wait for it has.
    Well,
    /// Its deadline passed while somebody waited for it, who went on: what it wrote since then may be lost, or be seen by a
    /// forked child.
    Lost,
}

/// A stretch of time in which GPU work may use the pool, and any entry that the device page table has in it.
///
/// Begun by [`Device::begin_execution`]. Dropping it ends it; [`end`](Self::end) says how it went.
#[derive(Debug)]
#[must_use = "it ends when it is dropped"]
pub struct Execution<'a> {
    device: &'a Device,
    id: u64,
    ended: bool,
}

impl Execution<'_> {
    /// Its number.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Whether it is lost already.
    ///
    /// Errors: [`Call`](Error::Call) with the driver's `ENODEV`, `EPERM`.
    pub fn is_lost(&self) -> Result<bool, Error> {
        let state = self.call(uapi::HMM_GPU_EXECUTE_QUERY)?;
        Ok(state == uapi::HMM_GPU_EXECUTION_LOST)
    }

    /// Ends it: no GPU work uses the pool any more that was begun in it.
    ///
    /// Errors: [`Call`](Error::Call) with the driver's `ENODEV`, `EPERM`.
    pub fn end(mut self) -> Result<Ended, Error> {
        self.ended = true;
        match self.call(uapi::HMM_GPU_EXECUTE_END)? {
            uapi::HMM_GPU_EXECUTION_LOST => Ok(Ended::Lost),
            _ => Ok(Ended::Well),
        }
    }

    fn call(&self, op: u32) -> Result<u32, Error> {
        let mut argument = hmm_gpu_execute {
            op,
            id: self.id,
            ..Default::default()
        };
        let file = self.device.file();
        retry_on_intr(|| file.execute(&mut argument))
            .map_err(|errno| Error::call(self.device.path(), Attempt::EndExecution, errno))?;
        Ok(argument.state)
    }
}

impl Drop for Execution<'_> {
    fn drop(&mut self) {
        if !self.ended {
            // What this fails with (the device is gone, the process is another) has ended it.
            let ended = self.call(uapi::HMM_GPU_EXECUTE_END);
            if !matches!(ended, Ok(uapi::HMM_GPU_EXECUTION_ENDED)) {
                tracing::warn!(?ended, "an execution did not end well");
            }
        }
    }
}

impl Device {
    /// Makes the private pool of this device, as opened here, and maps it: `bytes` of VRAM, a multiple of 2 MiB, all zero. The
    /// driver's `POOL`, and `mmap`.
    ///
    /// To be called before anything else has taken VRAM: right after opening. From then on what this device is to have is in
    /// the pool, and nowhere else; memory that is shared with a forked process does not come in, until it is written to.
    ///
    /// Errors: [`Call`](Error::Call) with the driver's `EINVAL` (not a multiple of 2 MiB, or none), `EEXIST` (there is one),
    /// `EBUSY` (it has VRAM already), `ENOSPC` (more than private pools may have, or no room could be made),
    /// `EOPNOTSUPP` (device-coherent memory), `ENOMEM`, `EINTR`, `ENODEV`, `EPERM`.
    ///
    /// ```no_run
    /// use std::time::Duration;
    /// use hmm_gpu::{Device, Ended};
    ///
    /// # fn main() -> Result<(), hmm_gpu::Error> {
    /// let device = Device::open_first()?;
    /// let pool = device.create_pool(16 << 20)?;
    /// // ... have memory come in by `device.fault` ...
    /// let execution = device.begin_execution(Duration::from_secs(2))?;
    /// // ... GPU work walks the page table in `pool` ...
    /// assert_eq!(execution.end()?, Ended::Well);
    /// # Ok(())
    /// # }
    /// ```
    pub fn create_pool(&self, bytes: usize) -> Result<Pool, Error> {
        let attempt = Attempt::CreatePool { bytes };
        let mut argument = hmm_gpu_pool {
            bytes: bytes as u64,
            ..Default::default()
        };
        let failed = |errno| Error::call(self.path(), attempt, errno);
        retry_on_intr(|| self.file().pool(&mut argument)).map_err(failed)?;
        let offset = argument.offset;
        let mapping = PoolMapping::new(self.file(), offset, bytes).map_err(failed)?;
        tracing::debug!(path = %self.path().display(), offset, bytes, "has a pool");
        Ok(Pool { offset, mapping })
    }

    /// Begins an execution, for which others wait until `deadline` from now, at least a millisecond and at most 10 seconds.
    /// The driver's `EXECUTE`.
    ///
    /// Until it ends nothing leaves the pool, and nothing of it is used twice. Meanwhile this process must not touch, through
    /// its own addresses, what is in the pool: that waits for the end. `fork` waits too.
    ///
    /// Errors: [`Call`](Error::Call) with the driver's `EINVAL` (a deadline out of bounds), `ENXIO` (there is no pool), `EBUSY`
    /// (one runs), `ENODEV`, `EPERM`.
    pub fn begin_execution(&self, deadline: Duration) -> Result<Execution<'_>, Error> {
        let mut argument = hmm_gpu_execute {
            op: uapi::HMM_GPU_EXECUTE_BEGIN,
            deadline_ms: u32::try_from(deadline.as_millis()).unwrap_or(u32::MAX),
            ..Default::default()
        };
        let attempt = Attempt::BeginExecution { deadline };
        retry_on_intr(|| self.file().execute(&mut argument))
            .map_err(|errno| Error::call(self.path(), attempt, errno))?;
        Ok(Execution {
            device: self,
            id: argument.id,
            ended: false,
        })
    }
}
