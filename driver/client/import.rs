// SPDX-License-Identifier: GPL-2.0

//! A client brings VRAM of its own: a dma-buf.

#![forbid(unsafe_code)]

use super::Client;
use crate::{
    alloc::BLOCK_BYTES,
    import::Held,
    structure::{require, UserStructure},
    sys::node::Unnamed,
    uapi::hmm_gpu_import,
};
use kernel::{mm::MmWithUser, prelude::*};

// The size of version 6, in bytes. It never changes.
const SMALLEST_IMPORT: usize = 0x30;

impl Client {
    /// `IMPORT`.
    pub(super) fn import(&self, mm: &MmWithUser, number: u32, argument: usize) -> Result {
        let (mut import, user) =
            UserStructure::read::<hmm_gpu_import>(number, argument, SMALLEST_IMPORT)?;
        require(import.flags == 0 && import.reserved == [0; 3])?;
        require(import.bytes != 0 && import.bytes % BLOCK_BYTES == 0)?;
        let device = Held::new(&self.gate, import.dma_buf, import.bytes)?;
        import.unit = device.unit();
        let gate = device.gate().clone();
        let file = Unnamed::new(Client::new(&gate, Some(device))?)?;
        file.client().own_pool(mm, import.bytes)?;
        file.open(c"[hmm_gpu]", |fd| {
            import.fd = fd;
            user.write(import)
        })
    }
}
