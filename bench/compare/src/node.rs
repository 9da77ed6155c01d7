//! A device node that speaks the kernel's `lib/test_hmm_uapi.h`. Unsafe code is here and in `memory.rs` only.

use std::fs::File;
use std::io;
use std::path::Path;

use rustix::io::Errno;
use rustix::ioctl::{ioctl, opcode, Opcode, Updater};

use crate::memory::{Memory, PAGE};

/// The argument of every call.
#[repr(C)]
#[derive(Default)]
struct Command {
    /// Address of the memory that the device works on.
    addr: u64,
    /// Address of a buffer for what the call answers with.
    ptr: u64,
    /// Pages at `addr`.
    npages: u64,
    /// Answer: how many pages it was done for.
    cpages: u64,
    /// Answer: how often the device faulted.
    faults: u64,
}

const READ: Opcode = opcode::read_write::<Command>(b'H', 0);
const MIGRATE_TO_DEV: Opcode = opcode::read_write::<Command>(b'H', 2);
const MIGRATE_TO_SYS: Opcode = opcode::read_write::<Command>(b'H', 3);
const SNAPSHOT: Opcode = opcode::read_write::<Command>(b'H', 4);

/// In a snapshot: the page is mapped by a huge entry.
pub(crate) const MAPPED_HUGE: u8 = 0x04;
/// In a snapshot: what the page is. [`LOCAL`] is this device's private memory.
pub(crate) const KIND: u8 = 0xf0;
/// See [`KIND`].
pub(crate) const LOCAL: u8 = 0x20;

/// An open node.
pub(crate) struct Node(File);

impl Node {
    /// Opens a node, which from now on mirrors this process.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        Ok(Self(File::options().read(true).write(true).open(path)?))
    }

    /// Moves all of `memory` to the device. The driver copies what is there then to `copy`, which is as long.
    pub(crate) fn migrate_to_device(&self, memory: &Memory, copy: &mut [u8]) -> Result<(), Errno> {
        assert_eq!(copy.len(), memory.bytes().len());
        all(memory, self.call::<MIGRATE_TO_DEV>(memory, copy)?)
    }

    /// Has the device read all of `memory` to `copy`, which is as long.
    pub(crate) fn read(&self, memory: &Memory, copy: &mut [u8]) -> Result<(), Errno> {
        assert_eq!(copy.len(), memory.bytes().len());
        all(memory, self.call::<READ>(memory, copy)?)
    }

    /// Moves all of `memory` to system memory.
    pub(crate) fn migrate_to_system(&self, memory: &Memory) -> Result<(), Errno> {
        // The kernel's driver counts a large page as one, so that its count tells nothing.
        self.call::<MIGRATE_TO_SYS>(memory, &mut []).map(drop)
    }

    /// What the device would see of each page of `memory`, in a byte each.
    pub(crate) fn snapshot(&self, memory: &Memory, seen: &mut [u8]) -> Result<(), Errno> {
        assert_eq!(seen.len(), memory.bytes().len() / PAGE);
        all(memory, self.call::<SNAPSHOT>(memory, seen)?)
    }

    /// A call for all of `memory`: for how many pages it was done. Callers see to it that `answer` is as long as the call makes
    /// its answer.
    fn call<const OPCODE: Opcode>(&self, memory: &Memory, answer: &mut [u8]) -> Result<u64, Errno> {
        let bytes = memory.bytes();
        let mut command = Command {
            addr: bytes.as_ptr() as u64,
            ptr: answer.as_mut_ptr() as u64,
            npages: (bytes.len() / PAGE) as u64,
            ..Command::default()
        };
        // SAFETY: the number is that of a call with this argument.
        let call = unsafe { Updater::<OPCODE, Command>::new(&mut command) };
        // SAFETY: the driver writes to the argument and to `answer`, which is long enough; the content of `memory` it leaves as it is.
        unsafe { ioctl(&self.0, call)? };
        Ok(command.cpages)
    }
}

/// `EIO` if what was done was not done for all pages.
fn all(memory: &Memory, pages: u64) -> Result<(), Errno> {
    if pages == (memory.bytes().len() / PAGE) as u64 {
        Ok(())
    } else {
        Err(Errno::IO)
    }
}
