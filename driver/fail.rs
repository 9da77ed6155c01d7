// SPDX-License-Identifier: GPL-2.0

//! Failures on demand, for tests: a number n written to a file in `/sys/kernel/debug/hmm_gpu` (which
//! only root reaches) has the n-th such step from then on fail, once. What a file reads as is how many
//! are to come until then; 0 is never.

#![forbid(unsafe_code)]

use kernel::{
    debugfs::{Dir, File, Reader},
    fmt,
    prelude::*,
    sync::atomic::{Atomic, Relaxed},
    uaccess::UserSliceReader,
};

/// A step that can be made to fail.
#[derive(Clone, Copy)]
pub(crate) enum Step {
    /// VRAM is taken, for a folio or for a node of a device page table.
    DeviceAllocation,
    /// A folio of system memory is allocated for what leaves VRAM.
    SystemAllocation,
    /// The bytes of a folio are copied to VRAM, within it, or from it.
    Copy,
    /// An entry is made in a device page table.
    Insertion,
}

static DEVICE_ALLOCATION: Atomic<u64> = Atomic::new(0);
static SYSTEM_ALLOCATION: Atomic<u64> = Atomic::new(0);
static COPY: Atomic<u64> = Atomic::new(0);
static INSERTION: Atomic<u64> = Atomic::new(0);

impl Step {
    /// How many of these steps are to come, the last of which fails.
    fn countdown(self) -> &'static Atomic<u64> {
        match self {
            Step::DeviceAllocation => &DEVICE_ALLOCATION,
            Step::SystemAllocation => &SYSTEM_ALLOCATION,
            Step::Copy => &COPY,
            Step::Insertion => &INSERTION,
        }
    }

    /// Fails with `ENOMEM` if it is this one's turn.
    pub(crate) fn pass(self) -> Result {
        let countdown = self.countdown();
        loop {
            let left = countdown.load(Relaxed);
            if left == 0 {
                return Ok(());
            }
            if countdown.cmpxchg(left, left - 1, Relaxed).is_ok() {
                return if left == 1 { Err(ENOMEM) } else { Ok(()) };
            }
        }
    }
}

/// The file of a step.
struct Knob(Step);

impl fmt::Debug for Knob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.0.countdown().load(Relaxed))
    }
}

impl Reader for Knob {
    fn read_from_slice(&self, reader: &mut UserSliceReader) -> Result {
        self.0.countdown().read_from_slice(reader)
    }
}

/// The files.
#[pin_data]
pub(crate) struct Files {
    #[pin]
    device_allocation: File<Knob>,
    #[pin]
    system_allocation: File<Knob>,
    #[pin]
    copy: File<Knob>,
    #[pin]
    insertion: File<Knob>,
}

impl Files {
    /// Makes them, where the kernel has debugfs.
    pub(crate) fn new() -> impl PinInit<Self, Error> {
        let dir = Dir::new(c"hmm_gpu");
        try_pin_init!(Self {
            device_allocation <- dir.read_write_file(c"fail_device_allocation", Knob(Step::DeviceAllocation)),
            system_allocation <- dir.read_write_file(c"fail_system_allocation", Knob(Step::SystemAllocation)),
            copy <- dir.read_write_file(c"fail_copy", Knob(Step::Copy)),
            insertion <- dir.read_write_file(c"fail_insertion", Knob(Step::Insertion)),
        })
    }
}
