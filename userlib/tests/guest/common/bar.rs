//! VRAM as its GPU has it: the BAR itself, read past the driver. The guest needs `iomem=relaxed`, since the BAR is in use.

use std::fs;
use std::os::fd::AsRawFd;

use hmm_gpu::uapi::{
    hmm_gpu_mirror, HMM_GPU_PTE_LEVEL_BITS as LEVEL_BITS, HMM_GPU_PTE_OFFSET_MASK as OFFSET,
    HMM_GPU_PTE_VALID as VALID,
};

use super::kernel::Resource;
use super::memory::{Area, Span, PAGE};

/// The memory BAR of a GPU.
pub struct Bar(Area);

impl Bar {
    /// Maps the biggest one of a PCI device.
    #[track_caller]
    pub fn of(gpu: &str) -> Self {
        let pages = |bar: &Resource| bar.bytes() as usize / PAGE;
        let folder = format!("/sys/bus/pci/devices/{gpu}");
        let file = |number| fs::metadata(format!("{folder}/resource{number}")).ok();
        let bytes = Resource::of_device(gpu).iter().map(pages).max().unwrap() * PAGE;
        let number = (0..6)
            .find(|number| file(*number).is_some_and(|file| file.len() == bytes as u64))
            .unwrap();
        // As the driver has it, so that both see the same.
        let path = [
            format!("{folder}/resource{number}_wc"),
            format!("{folder}/resource{number}"),
        ];
        let mut options = fs::OpenOptions::new();
        options.read(true).write(true);
        let mut files = path.iter().filter_map(|path| options.open(path).ok());
        let file = files.next().unwrap();
        let area = Area::new(bytes / PAGE);
        area.map_over(libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd());
        Self(area)
    }

    /// A page of the VRAM.
    #[track_caller]
    pub fn page(&self, number: usize) -> Span {
        Span::new(self.0.page(number).addr, 1)
    }

    #[track_caller]
    fn word(&self, offset: u64) -> u64 {
        let (page, rest) = (offset as usize / PAGE, offset as usize % PAGE);
        let place = (self.page(page).addr + rest) as *const u64;
        // SAFETY: on a page of the BAR, which is mapped.
        unsafe { place.read_volatile() }
    }

    /// Walks a device page table for an address, as the GPU would: the entry of its page, if there is a node that has one.
    #[track_caller]
    pub fn walk(&self, table: &hmm_gpu_mirror, addr: usize) -> Option<u64> {
        let mut node = table.root_offset;
        for level in (0..table.levels).rev() {
            let slot = (addr >> (12 + LEVEL_BITS * level)) & ((1 << LEVEL_BITS) - 1);
            let entry = self.word(node + slot as u64 * 8);
            if level == 0 {
                return Some(entry);
            }
            if entry & VALID == 0 {
                return None;
            }
            node = entry & OFFSET;
        }
        unreachable!("a table has levels")
    }
}
