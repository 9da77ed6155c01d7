//! The ways by which a kernel reaches the program's memory.

use std::fmt;

/// How a kernel reaches the program's memory. Kernels are the same for all, and so are the pointers in them; what differs is
/// who moves the bytes, and what a pointer may lead to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Strategy {
    /// The kernel walks the driver's device page table, and uses the pages where they are in VRAM. What is not there is a device
    /// fault: it is brought in, and what did not finish runs again. Any pointer to memory that can be in VRAM; data may be
    /// larger than the VRAM.
    Translated,
    /// The device shares the processes' page tables: a pointer is used as it is. Any pointer.
    Native,
    /// The pages of the arguments are given to Vulkan as they are (`VK_EXT_external_memory_host`), for the time of the dispatch.
    /// A real device pins them: they cannot move to VRAM or back meanwhile. What the arguments name only.
    Imported,
    /// The bytes of the arguments are written where the device reads them, and read back. None are where they lie in a
    /// [`SvmBuf`](crate::SvmBuf), which is such memory. What the arguments name only.
    Mapped,
    /// The bytes of the arguments are copied to the device's memory by way of another buffer, and back. What the arguments name only.
    Copy,
}

impl Strategy {
    /// All of them, the most wanted first.
    pub const ALL: [Strategy; 5] = [
        Strategy::Translated,
        Strategy::Native,
        Strategy::Imported,
        Strategy::Mapped,
        Strategy::Copy,
    ];

    /// Whether a kernel reaches only what the arguments of its dispatch name.
    pub fn needs_names(self) -> bool {
        matches!(self, Strategy::Imported | Strategy::Mapped | Strategy::Copy)
    }

    /// `SVM_MODE` of `hmm_svm.glsl`.
    pub(crate) fn mode(self) -> u32 {
        match self {
            Strategy::Native => 0,
            Strategy::Imported | Strategy::Mapped | Strategy::Copy => 1,
            Strategy::Translated => 2,
        }
    }
}

impl fmt::Display for Strategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Strategy::Translated => "translated",
            Strategy::Native => "native",
            Strategy::Imported => "imported",
            Strategy::Mapped => "mapped",
            Strategy::Copy => "copy",
        })
    }
}
