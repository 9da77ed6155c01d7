//! Devices that a program makes of its own VRAM.

use std::os::fd::{AsFd, AsRawFd};

use rustix::io::retry_on_intr;

use crate::error::Attempt;
use crate::uapi::hmm_gpu_import;
use crate::{Device, Error};

impl Device {
    /// Makes a device of the first `bytes` bytes of a dma-buf, a multiple of 2 MiB: memory of another driver, which becomes VRAM of this
    /// one. The driver's `IMPORT`, which the module parameter `import_mib` allows.
    ///
    /// So memory that Vulkan has allocated and exported can be where this process's pages are, and the GPU of that other driver reaches them
    /// there. The device is for this process alone, has no node, and goes when it is dropped. All of its VRAM is its private pool from the start
    /// ([`create_pool`](Self::create_pool)), which begins at offset 0 and is mapped by whoever exports it, not by this driver.
    ///
    /// What the dma-buf holds is lost: it is zeroed. Whoever has the dma-buf can read and write what is in it, which is then the content of this
    /// process's own memory.
    ///
    /// Errors: [`Call`](Error::Call) with the driver's `EINVAL` (no dma-buf, or a shorter one, or not a multiple of 2 MiB), `EACCES` (it may not be
    /// written to), `EBUSY` (it is such a device already, or was until a moment ago), `EOPNOTSUPP` (`import_mib` is 0, the exporter has no `vmap`, or this device is one of these, or coherent), `ENOSPC` (more than
    /// `import_mib` in all, or more than 8 of them), `EMFILE`, `ENOMEM`, `EINTR`, `ENODEV`, `EPERM`.
    ///
    /// ```no_run
    /// # fn main() -> Result<(), hmm_gpu::Error> {
    /// # let dma_buf: std::os::fd::OwnedFd = unimplemented!();
    /// use hmm_gpu::{Device, Target};
    ///
    /// let vram = Device::open_first()?.import_dma_buf(&dma_buf, 16 << 20)?;
    /// let data = vec![1_u8; 1 << 20];
    /// vram.prefetch(&data, Target::Device)?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn import_dma_buf(&self, dma_buf: impl AsFd, bytes: usize) -> Result<Self, Error> {
        let fd = dma_buf.as_fd().as_raw_fd();
        let mut argument = hmm_gpu_import {
            dma_buf: fd,
            bytes: bytes as u64,
            ..Default::default()
        };
        let file = retry_on_intr(|| self.file().import(&mut argument))
            .map_err(|errno| Error::call(self.path(), Attempt::Import { bytes }, errno))?;
        let unit = argument.unit;
        tracing::debug!(unit, bytes, "a device of a dma-buf");
        Ok(Self::of_file(file, format!("[hmm_gpu{unit}]").into(), unit))
    }
}
