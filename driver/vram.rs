// SPDX-License-Identifier: GPL-2.0

//! VRAM: the bytes, wherever they come from.

#![forbid(unsafe_code)]

use crate::{
    hmm::PAGE_BYTES,
    sys::{dma_buf::Exported, mapping::Mapping, pci::Bar},
};
use core::ops::Deref;
use kernel::prelude::*;

/// The VRAM of a device. Offsets into it are in bytes.
pub(crate) enum Vram {
    /// A memory BAR of a PCI device.
    Pci(Bar),
    /// System memory that stands in for it.
    Soft(Mapping),
    /// What another driver exports, and a client has given to this one.
    DmaBuf(Exported),
}

impl Deref for Vram {
    type Target = Mapping;

    fn deref(&self) -> &Mapping {
        match self {
            Vram::Pci(bar) => bar,
            Vram::Soft(mapping) => mapping,
            Vram::DmaBuf(exported) => exported,
        }
    }
}

impl Vram {
    /// Whether the device has been taken out, and what was in its VRAM with it. Asks the device.
    pub(crate) fn is_gone(&self) -> bool {
        match self {
            Vram::Pci(bar) => !bar.is_present(),
            Vram::Soft(_) | Vram::DmaBuf(_) => false,
        }
    }

    /// Whether it is a client's own, who may write to it as it likes.
    pub(crate) fn is_imported(&self) -> bool {
        matches!(self, Vram::DmaBuf(_))
    }

    /// Whether the device was there while the page at `offset` was read just now. Asks it only if
    /// what was read may be what a bus answers for nobody.
    pub(crate) fn was_there(&self, offset: usize) -> bool {
        let last = self.read_u64(offset + PAGE_BYTES - size_of::<u64>());
        !matches!(last, Ok(0 | u64::MAX)) || !self.is_gone()
    }

    /// Whether the memory keeps what is written to it: writes to places that differ in one address
    /// bit each, and to the last word, and reads all back. `Err` has the offset that read wrong and
    /// what it read.
    ///
    /// Destroys what was there.
    pub(crate) fn check(&self) -> Result<core::result::Result<(), (usize, u64)>> {
        const WORD: usize = size_of::<u64>();

        let last = self.len() - WORD;
        let places = || {
            let powers = (WORD.ilog2()..usize::BITS)
                .map(|bit| 1usize << bit)
                .take_while(move |&place| place < last);
            Iterator::chain([0, last].into_iter(), powers)
        };
        // Every place has a value of its own, and then the opposite of it: an address line that is
        // missing, and a bit that is stuck, show.
        for flip in [0, u64::MAX] {
            // CAST: Widens.
            let value = |place: usize| {
                (place as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x6873_6d2d_6770_7531 ^ flip
            };
            for place in places() {
                self.write_u64(place, value(place))?;
            }
            for place in places() {
                let found = self.read_u64(place)?;
                if found != value(place) {
                    return Ok(Err((place, found)));
                }
            }
        }
        Ok(Ok(()))
    }
}
