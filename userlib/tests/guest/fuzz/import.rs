//! Devices made of dma-bufs: most of the time they end at once, and at times one is what the next calls are made by.

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use super::Caller;
use hmm_gpu::uapi::hmm_gpu_import;

const MIB: u64 = 1 << 20;
/// What the dma-buf has.
pub(super) const DMA_BUF: usize = 4 << 20;

impl Caller<'_> {
    pub(super) fn import(&mut self) -> (Vec<u8>, bool) {
        let bytes = match self.random.below(12) {
            0..=7 => 2 * MIB,
            8 => 4 * MIB,
            // More than there is, or than there may be.
            9 => self
                .random
                .of(&[6 * MIB, 64 * MIB, 1 << 45, u64::MAX - 2 * MIB + 1]),
            _ => self.random.of(&[0, 1, 4096, MIB, 3 * MIB, u64::MAX]),
        };
        let (right, device) = (self.dma_buf.as_raw_fd(), self.own.as_fd().as_raw_fd());
        let dma_buf = match self.random.below(8) {
            0 => self
                .random
                .of(&[-1, i32::MIN, i32::MAX, device, self.backing.as_raw_fd()]),
            _ => right,
        };
        let (flags, (reserved, broken)) = (self.flags(32), self.reserved());
        let it = hmm_gpu_import {
            flags: flags as u32,
            dma_buf,
            bytes,
            // What the driver writes may be anything.
            fd: self.random.next() as u32,
            unit: self.random.next() as u32,
            reserved,
        };
        let refused = bytes == 0 || bytes % (2 * MIB) != 0;
        let broken = broken || flags != 0 || refused;
        (bytemuck::bytes_of(&it).to_vec(), broken)
    }

    /// It is made, and this is what was answered.
    pub(super) fn has_import(&mut self, it: &hmm_gpu_import) {
        assert!(it.unit > 0 && it.bytes <= DMA_BUF as u64, "{it:x?}");
        // SAFETY: the driver has just opened it, for a call of this.
        drop(unsafe { OwnedFd::from_raw_fd(it.fd as i32) });
        if self.random.once_in(2) {
            // If there is one more.
            if let Ok(own) = self.shared.import_dma_buf(&self.exported.dma_buf, DMA_BUF) {
                self.own = own;
            }
        }
    }
}
