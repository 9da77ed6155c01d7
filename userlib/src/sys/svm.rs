//! What of shared virtual addressing cannot be checked: what a shader does to memory, and that a pool stays mapped.

mod dispatch;
pub(crate) mod driver;
mod place;
mod shipped;
mod twins;

use std::ptr::NonNull;

use crate::svm::Miss;
use crate::Error;

pub(crate) use place::{MappedRange, Placed};
pub(crate) use twins::{Added, Twins};

/// Memory that a device page table and its pages are in, as this process has it mapped.
#[derive(Clone, Copy, Debug)]
pub struct PoolMemory {
    /// Its first byte: at a page. Dangling, if it is memory of the Vulkan device's own, which needs no import.
    pub start: NonNull<u8>,
    /// Its length: whole pages.
    pub bytes: usize,
    /// What the table calls its first byte: offset in the VRAM.
    pub offset: u64,
}

/// Where a device page table begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableRoot {
    /// Offset of its root in the VRAM.
    pub offset: u64,
    /// Levels that it has.
    pub levels: u32,
}

/// Who keeps the device page table that translated kernels walk: the driver, or something that stands in for it.
///
/// A dispatch calls `begin`, runs, calls `end`, then `service` for what was missed, and so on, from one thread at a time.
///
/// # Safety
///
/// The memory stays mapped, and is not moved, for as long as the backend is there. Between `begin` and `end`, the table leads only to
/// pages in it; a page that it has led to since `begin` is used for nothing else before `end`, also if it does not lead there any more.
pub unsafe trait Backend: Send {
    /// The memory.
    fn memory(&self) -> PoolMemory;

    /// Pages that there is room for in a round. At least one.
    fn room(&self) -> usize;

    /// Where the table begins now. Called after each `begin`.
    fn table(&mut self) -> Result<TableRoot, Error>;

    /// Work of the device begins.
    fn begin(&mut self) -> Result<(), Error>;

    /// Work of the device has ended. False: it was to have ended before, and what it did is void.
    fn end(&mut self) -> Result<bool, Error>;

    /// Brings in what was missed. Returns how many bytes moved.
    fn service(&mut self, misses: &[Miss]) -> Result<u64, Error>;

    /// A dispatch is done: what was counted for it only may be forgotten.
    fn done(&mut self) {}
}
