//! The device page table: what the device knows of the process's addresses.

use std::fmt;

use rustix::io::retry_on_intr;

use crate::error::Attempt;
use crate::uapi::{self, hmm_gpu_mirror};
use crate::{Bytes, Device, Error};

/// The device page table of an opened device: a radix table in its VRAM, that mirrors the process's own.
///
/// A node is a page of VRAM with 512 entries of 8 bytes ([`TableEntry`]). The walk for an address begins at the root, at level
/// `levels - 1`, and ends at level 0, whose entries are those of pages; [`index`](Self::index) gives the entry of each level.
/// Whatever changes the process's own page table (`munmap`, `mprotect`, `fork`, a move of the page) takes the entry away
/// before it happens. Shown as one line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct MirrorInfo {
    /// Levels of nodes: 4, or 5 where addresses have more than 48 bits.
    pub levels: u32,
    /// Where in the VRAM the root is, in bytes. It stays there until the device is closed.
    pub root_offset: u64,
    /// Nodes, each a page of VRAM.
    pub nodes: u64,
    /// Valid entries for pages.
    pub entries: u64,
    /// Changes of the address space that have taken entries away.
    pub invalidations: u64,
}

impl MirrorInfo {
    /// The number of the entry for `addr` in the node that the walk meets at `level`: 0 to 511.
    ///
    /// `level` counts down to 0, the level of pages.
    pub fn index(addr: usize, level: u32) -> usize {
        let bits = uapi::HMM_GPU_PTE_LEVEL_BITS;
        let page = addr / crate::range::PAGE_BYTES;
        page.checked_shr(bits.saturating_mul(level)).unwrap_or(0) & ((1 << bits) - 1)
    }

    fn from_uapi(answer: &hmm_gpu_mirror) -> Self {
        Self {
            levels: answer.levels,
            root_offset: answer.root_offset,
            nodes: answer.nodes,
            entries: answer.entries,
            invalidations: answer.invalidations,
        }
    }
}

impl fmt::Display for MirrorInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} entries in {} nodes ({}) of {} levels, root at {:#x}, {} invalidations",
            self.entries,
            self.nodes,
            Bytes(self.nodes.saturating_mul(uapi::HMM_GPU_PAGE_BYTES)),
            self.levels,
            self.root_offset,
            self.invalidations
        )
    }
}

/// An entry of a device page table, as the device sees it.
///
/// Shown as `VRAM 0x5000, writable`, `system memory`, `system memory, exclusive`, `nothing` or `nothing, requested`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct TableEntry(u64);

impl TableEntry {
    /// The entry with these bits of the interface (`HMM_GPU_PTE_*`).
    pub fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// The interface's bits (`HMM_GPU_PTE_*`).
    pub fn bits(self) -> u64 {
        self.0
    }

    /// Whether it maps a page, or leads to a node.
    pub fn is_valid(self) -> bool {
        self.0 & uapi::HMM_GPU_PTE_VALID != 0
    }

    /// Whether the device may write to the page.
    pub fn is_writable(self) -> bool {
        self.is_valid() && self.0 & uapi::HMM_GPU_PTE_WRITABLE != 0
    }

    /// Whether the page is in system memory, where the table alone does not lead to it.
    pub fn is_system(self) -> bool {
        self.is_valid() && self.0 & uapi::HMM_GPU_PTE_SYSTEM != 0
    }

    /// Whether the device has the page to itself, in system memory: it may do atomic operations on it.
    pub fn is_exclusive(self) -> bool {
        self.is_valid() && self.0 & uapi::HMM_GPU_PTE_EXCLUSIVE != 0
    }

    /// Whether the device has noted that it wants the page, in an entry that maps nothing.
    pub fn is_requested(self) -> bool {
        !self.is_valid() && self.0 & uapi::HMM_GPU_PTE_REQUESTED != 0
    }

    /// Where in the VRAM the page, or the next node, is, in bytes; `None` if it is not there.
    pub fn vram_offset(self) -> Option<u64> {
        (self.is_valid() && !self.is_system()).then_some(self.0 & uapi::HMM_GPU_PTE_OFFSET_MASK)
    }
}

impl fmt::Display for TableEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.vram_offset() {
            Some(offset) => write!(f, "VRAM {offset:#x}")?,
            None if self.is_system() => f.write_str("system memory")?,
            None if self.is_requested() => f.write_str("nothing, requested")?,
            None => f.write_str("nothing")?,
        }
        if self.is_writable() {
            f.write_str(", writable")?;
        }
        if self.is_exclusive() {
            f.write_str(", exclusive")?;
        }
        Ok(())
    }
}

impl Device {
    /// Describes the device page table of this opened device, and makes it if there is none yet. The driver's `MIRROR`.
    ///
    /// Errors: [`Call`](Error::Call) with the driver's `ENOSPC` (no VRAM for its root), `ENOMEM`, `ENODEV`, `EPERM`, and `ENOTTY`
    /// (a driver without [`Capabilities::MIRROR`](crate::Capabilities::MIRROR)).
    ///
    /// ```no_run
    /// use hmm_gpu::{Access, Device, DeviceFault, Policy};
    ///
    /// # fn main() -> Result<(), hmm_gpu::Error> {
    /// let device = Device::open_first()?;
    /// let data = vec![7u8; 1 << 20];
    /// let faults: Vec<_> = DeviceFault::each_page(&data, Access::Read).collect();
    /// device.fault(&faults, Policy::Map)?.complete()?;
    /// println!("{}", device.mirror()?); // 257 entries in 4 nodes (16 KiB) of 4 levels, ...
    /// # Ok(())
    /// # }
    /// ```
    pub fn mirror(&self) -> Result<MirrorInfo, Error> {
        let mut answer = hmm_gpu_mirror::default();
        retry_on_intr(|| self.file().mirror(&mut answer))
            .map_err(|errno| Error::call(self.path(), Attempt::Mirror, errno))?;
        Ok(MirrorInfo::from_uapi(&answer))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::config;

    #[test]
    fn an_entry_says_where_its_page_is() {
        use uapi::{
            HMM_GPU_PTE_EXCLUSIVE as EXCLUSIVE, HMM_GPU_PTE_REQUESTED as REQUESTED,
            HMM_GPU_PTE_SYSTEM as SYSTEM, HMM_GPU_PTE_VALID as VALID,
            HMM_GPU_PTE_WRITABLE as WRITABLE,
        };
        let shown = |bits| TableEntry::from_bits(bits).to_string();
        assert_eq!(shown(0), "nothing");
        assert_eq!(shown(REQUESTED), "nothing, requested");
        assert_eq!(shown(VALID | 0x5000), "VRAM 0x5000");
        assert_eq!(shown(VALID | WRITABLE), "VRAM 0x0, writable");
        assert_eq!(shown(VALID | SYSTEM), "system memory");
        assert_eq!(shown(VALID | SYSTEM | WRITABLE), "system memory, writable");
        assert_eq!(
            shown(VALID | SYSTEM | EXCLUSIVE),
            "system memory, exclusive"
        );
        // Without VALID nothing else of an entry means anything but that it was asked for.
        let invalid = TableEntry::from_bits(0x5000 | WRITABLE | SYSTEM | EXCLUSIVE);
        assert_eq!(invalid.vram_offset(), None);
        assert!(!invalid.is_writable() && !invalid.is_system() && !invalid.is_requested());
        assert!(!invalid.is_exclusive());
        // The offset is neither the flags below it nor what may come above it.
        let all = TableEntry::from_bits(u64::MAX & !SYSTEM);
        assert_eq!(all.vram_offset(), Some(0x000f_ffff_ffff_f000));
    }

    #[test]
    fn an_address_is_taken_apart_by_levels() {
        let addr = (1 << 48) | (2 << 39) | (3 << 30) | (4 << 21) | (5 << 12) | 0xfff;
        let indices = [4, 3, 2, 1, 0].map(|level| MirrorInfo::index(addr, level));
        assert_eq!(indices, [1, 2, 3, 4, 5]);
        assert_eq!(MirrorInfo::index(usize::MAX, 0), 511);
        assert_eq!(MirrorInfo::index(usize::MAX, 40), 0);
    }

    #[test]
    fn a_mirror_is_one_line() {
        let answer = hmm_gpu_mirror {
            levels: 4,
            root_offset: 0x20_0000,
            nodes: 5,
            entries: 257,
            invalidations: 3,
            ..Default::default()
        };
        assert_eq!(
            MirrorInfo::from_uapi(&answer).to_string(),
            "257 entries in 5 nodes (20 KiB) of 4 levels, root at 0x200000, 3 invalidations"
        );
    }

    proptest! {
        #![proptest_config(config())]

        /// Catches bits of an address that no level looks at, or that two do.
        #[test]
        fn the_levels_of_an_address_put_it_together_again(addr in 0usize..1 << 57) {
            let page = (0..5).map(|level| MirrorInfo::index(addr, level) << (9 * level)).sum::<usize>();
            prop_assert_eq!(page, addr >> 12);
        }

        /// Catches an entry that is two things at once.
        #[test]
        fn an_entry_is_one_thing(bits in any::<u64>()) {
            let entry = TableEntry::from_bits(bits);
            prop_assert_eq!(entry.bits(), bits);
            let things = [
                entry.vram_offset().is_some(),
                entry.is_system(),
                entry.is_requested(),
                !entry.is_valid() && !entry.is_requested(),
            ];
            prop_assert_eq!(things.into_iter().filter(|&it| it).count(), 1);
            if let Some(offset) = entry.vram_offset() {
                prop_assert_eq!(offset % uapi::HMM_GPU_PAGE_BYTES, 0);
            }
        }
    }
}
