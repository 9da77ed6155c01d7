//! What the device does: its accesses, its faults and its page table, by the driver's calls as they are.

use std::ffi::c_void;
use std::fmt;

use hmm_gpu::uapi::{
    self, hmm_gpu_access, hmm_gpu_atomic, hmm_gpu_device_fault, hmm_gpu_fault, hmm_gpu_mirror,
    hmm_gpu_snapshot,
};
use hmm_gpu::{Device, Errno};

use super::memory::{Span, PAGE};

pub const READ: u32 = uapi::HMM_GPU_ACCESS_READ;
pub const WRITE: u32 = uapi::HMM_GPU_ACCESS_WRITE;
pub const MAP: u32 = uapi::HMM_GPU_POLICY_MAP;
pub const MIGRATE: u32 = uapi::HMM_GPU_POLICY_MIGRATE;
pub const NONE: u32 = uapi::HMM_GPU_POLICY_NONE;

/// Pages that a span's bytes are read or written at a time.
const PIECE: usize = 128;

/// Makes a call with a structure.
///
/// What the structure points to must be as long as it says, and the tests' own to write.
pub fn call<T: bytemuck::Pod>(device: &Device, number: u32, argument: &mut T) -> Result<(), Errno> {
    // SAFETY: the number is that of this structure (its size is in it, and the driver looks at it); what it points to, see above.
    unsafe {
        device
            .file()
            .call(number, std::ptr::from_mut(argument).cast::<c_void>())
    }
}

/// How an access of the device ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended {
    pub result: Result<(), Errno>,
    pub done: usize,
    pub faults: u64,
    pub fault_addr: usize,
    pub entry: u64,
}

impl Ended {
    /// Asserts that it came to its end, of `len` bytes. Returns its faults.
    #[track_caller]
    pub fn whole(self, len: usize) -> u64 {
        let expected = Self {
            result: Ok(()),
            done: len,
            faults: self.faults,
            fault_addr: 0,
            entry: 0,
        };
        assert_eq!(self, expected);
        self.faults
    }

    /// Asserts that a miss on the page at `page` ended it, after `done` bytes.
    #[track_caller]
    pub fn stopped(self, errno: Errno, done: usize, page: usize) {
        assert_eq!(self.result, Err(errno), "{self:x?}");
        assert_eq!(self.done, done, "{self:x?}");
        assert_eq!(self.fault_addr & !(PAGE - 1), page, "{self:x?}");
        assert!(self.faults > 0, "{self:x?}");
    }
}

fn access(device: &Device, wanted: hmm_gpu_access) -> Ended {
    let (result, argument) = loop {
        let mut argument = wanted;
        let result = call(device, uapi::HMM_GPU_ACCESS, &mut argument);
        // What io_uring has left to do in this task is a signal too.
        if result != Err(Errno::INTR) || argument.done_bytes != 0 {
            break (result, argument);
        }
    };
    Ended {
        result,
        done: argument.done_bytes as usize,
        faults: argument.faults,
        fault_addr: argument.fault_addr as usize,
        entry: argument.entry,
    }
}

/// The device reads at `addr`, into the caller's buffer.
pub fn read(device: &Device, addr: usize, to: &mut [u8], policy: u32) -> Ended {
    read_to(device, addr, to.as_mut_ptr() as usize, to.len(), policy)
}

/// The same, with a buffer anywhere in a test's own memory.
pub fn read_to(device: &Device, addr: usize, buffer: usize, len: usize, policy: u32) -> Ended {
    access(
        device,
        hmm_gpu_access {
            op: uapi::HMM_GPU_OP_READ,
            policy,
            addr: addr as u64,
            len: len as u64,
            buffer_ptr: buffer as u64,
            ..Default::default()
        },
    )
}

/// The device writes at `addr` what is in the caller's buffer.
pub fn write(device: &Device, addr: usize, from: &[u8], policy: u32) -> Ended {
    write_from(device, addr, from.as_ptr() as usize, from.len(), policy)
}

/// The same, with a buffer anywhere in a test's own memory.
pub fn write_from(device: &Device, addr: usize, buffer: usize, len: usize, policy: u32) -> Ended {
    access(
        device,
        hmm_gpu_access {
            op: uapi::HMM_GPU_OP_WRITE,
            policy,
            addr: addr as u64,
            len: len as u64,
            buffer_ptr: buffer as u64,
            ..Default::default()
        },
    )
}

/// The device copies from one address to another.
pub fn copy(device: &Device, from: usize, to: usize, len: usize, policy: u32) -> Ended {
    access(
        device,
        hmm_gpu_access {
            op: uapi::HMM_GPU_OP_COPY,
            policy,
            addr: from as u64,
            len: len as u64,
            to_addr: to as u64,
            ..Default::default()
        },
    )
}

/// How an atomic operation of the device ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EndedAtomic {
    /// What the word was before.
    pub result: Result<u64, Errno>,
    pub faults: u64,
}

/// The device does an atomic operation with one operand on the `bytes` bytes at `addr`.
pub fn atomic(
    device: &Device,
    addr: usize,
    bytes: u32,
    op: u32,
    operand: u64,
    policy: u32,
) -> EndedAtomic {
    let mut argument = hmm_gpu_atomic {
        addr: addr as u64,
        operand,
        op,
        bytes,
        policy,
        ..Default::default()
    };
    let result = call(device, uapi::HMM_GPU_ATOMIC, &mut argument);
    EndedAtomic {
        result: result.map(|()| argument.old),
        faults: argument.faults,
    }
}

/// What the device reads in a span, where it lies.
#[track_caller]
pub fn device_words(device: &Device, span: Span, policy: u32) -> Vec<u64> {
    let mut words = vec![0x5a5a_5a5a_5a5a_5a5a; span.bytes() / 8];
    let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut words);
    read(device, span.addr, bytes, policy).whole(span.bytes());
    words
}

/// Asserts that the device reads the pattern of a seed, every byte, with faults serviced by `policy`.
#[track_caller]
pub fn device_check_by(device: &Device, span: Span, seed: u64, policy: u32) {
    for first in (0..span.pages).step_by(PIECE) {
        let part = span.part(first, PIECE.min(span.pages - first));
        part.check_words("the device", &device_words(device, part, policy), seed);
    }
}

/// Asserts that the device reads the pattern of a seed, every byte, wherever it lies.
#[track_caller]
pub fn device_check(device: &Device, span: Span, seed: u64) {
    device_check_by(device, span, seed, MAP);
}

/// Asserts that the device reads nothing but zeroes.
#[track_caller]
pub fn device_check_zero(device: &Device, span: Span) {
    let words = device_words(device, span, MAP);
    let wrong = words.iter().position(|&word| word != 0);
    assert_eq!(wrong, None, "the device finds a word that is not zero");
}

/// The device writes the pattern of a seed to every byte.
#[track_caller]
pub fn device_fill_by(device: &Device, span: Span, seed: u64, policy: u32) {
    for first in (0..span.pages).step_by(PIECE) {
        let part = span.part(first, PIECE.min(span.pages - first));
        let words = part.pattern(seed);
        write(device, part.addr, bytemuck::cast_slice(&words), policy).whole(part.bytes());
    }
}

/// The device writes the pattern of a seed to every byte, wherever it lies.
#[track_caller]
pub fn device_fill(device: &Device, span: Span, seed: u64) {
    device_fill_by(device, span, seed, MAP);
}

/// Asserts that both find the pattern of a seed, every byte: first the device, since a look of the CPU brings pages home.
#[track_caller]
pub fn both_check(device: &Device, span: Span, seed: u64) {
    device_check(device, span, seed);
    snapshot(device, span);
    span.check(seed);
    device_check(device, span, seed);
}

/// What `MIRROR` says.
#[track_caller]
pub fn table(device: &Device) -> hmm_gpu_mirror {
    let mut answer = hmm_gpu_mirror::default();
    assert_eq!(call(device, uapi::HMM_GPU_MIRROR, &mut answer), Ok(()));
    answer
}

/// A device fault for [`fault`].
pub fn wants(addr: usize, access: u32) -> hmm_gpu_device_fault {
    hmm_gpu_device_fault {
        addr: addr as u64,
        access,
        // Whatever the driver finds there.
        status: 0x7777_7777,
    }
}

/// Services device faults, whose status is written.
pub fn try_fault(
    device: &Device,
    faults: &mut [hmm_gpu_device_fault],
    policy: u32,
) -> (Result<(), Errno>, hmm_gpu_fault) {
    let mut argument = hmm_gpu_fault {
        faults_ptr: faults.as_mut_ptr() as u64,
        count: faults.len() as u32,
        policy,
        ..Default::default()
    };
    let result = call(device, uapi::HMM_GPU_FAULT, &mut argument);
    (result, argument)
}

/// Services device faults, and asserts that the call itself went well.
#[track_caller]
pub fn fault(device: &Device, faults: &mut [hmm_gpu_device_fault], policy: u32) -> hmm_gpu_fault {
    let (result, answer) = try_fault(device, faults, policy);
    assert_eq!(result, Ok(()), "{answer:?}");
    answer
}

/// Services a fault for each page of a span, which must all go well. Returns how many pages were mapped in VRAM.
#[track_caller]
pub fn fault_all(device: &Device, span: Span, access: u32, policy: u32) -> usize {
    let mut faults: Vec<_> = (0..span.pages)
        .map(|page| wants(span.page(page).addr, access))
        .collect();
    let answer = fault(device, &mut faults, policy);
    let failed = faults.iter().find(|fault| fault.status != 0);
    assert_eq!(failed.map(|fault| (fault.addr, fault.status)), None);
    assert_eq!(
        (answer.mapped_pages, answer.failed_pages),
        (span.pages as u64, 0),
        "{answer:?}"
    );
    answer.device_pages as usize
}

/// What `SNAPSHOT` says of a page.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Seen(pub u64);

impl Seen {
    pub fn has(self, bit: u64) -> bool {
        self.0 & bit != 0
    }

    /// Something is there.
    pub fn is_valid(self) -> bool {
        self.has(uapi::HMM_GPU_SNAPSHOT_VALID)
    }

    /// It is mapped writable.
    pub fn is_writable(self) -> bool {
        self.has(uapi::HMM_GPU_SNAPSHOT_WRITABLE)
    }

    /// It is in the VRAM of the device that was asked.
    pub fn is_on_device(self) -> bool {
        self.has(uapi::HMM_GPU_SNAPSHOT_DEVICE)
    }

    /// It is in the VRAM of another device.
    pub fn is_on_other_device(self) -> bool {
        self.has(uapi::HMM_GPU_SNAPSHOT_OTHER_DEVICE)
    }

    /// It is the page of zeroes.
    pub fn is_zero(self) -> bool {
        self.has(uapi::HMM_GPU_SNAPSHOT_ZERO)
    }

    /// The device page table has it.
    pub fn is_mirrored(self) -> bool {
        self.has(uapi::HMM_GPU_SNAPSHOT_MIRRORED)
    }

    /// The device may write to it.
    pub fn is_mirrored_writable(self) -> bool {
        self.has(uapi::HMM_GPU_SNAPSHOT_MIRROR_WRITABLE)
    }

    /// The device has it to itself.
    pub fn is_exclusive(self) -> bool {
        self.has(uapi::HMM_GPU_SNAPSHOT_MIRROR_EXCLUSIVE)
    }

    /// The map order.
    pub fn order(self) -> u64 {
        (self.0 >> uapi::HMM_GPU_SNAPSHOT_ORDER_SHIFT) & uapi::HMM_GPU_SNAPSHOT_ORDER_MASK
    }

    /// The number of the page in the VRAM.
    pub fn vram_page(self) -> Option<usize> {
        self.is_on_device()
            .then_some((self.0 >> uapi::HMM_GPU_SNAPSHOT_PAGE_SHIFT) as usize)
    }

    /// What must be true of any page at any time.
    pub fn is_possible(self) -> bool {
        let known = 0xff
            | uapi::HMM_GPU_SNAPSHOT_MIRROR_EXCLUSIVE
            | (uapi::HMM_GPU_SNAPSHOT_ORDER_MASK << uapi::HMM_GPU_SNAPSHOT_ORDER_SHIFT)
            | (u64::MAX << uapi::HMM_GPU_SNAPSHOT_PAGE_SHIFT);
        let implies = |this: bool, that: bool| !this || that;
        self.0 & !known == 0
            && implies(self.0 != 0, self.is_valid() || self.is_exclusive())
            // No CPU has what a device has to itself.
            && implies(self.is_exclusive(), self.is_mirrored() && !self.is_valid())
            && !(self.is_on_device() && self.is_on_other_device())
            // An entry is for the very page that is there. What is on another device cannot be reached.
            && self.is_mirrored() == self.has(uapi::HMM_GPU_SNAPSHOT_MIRROR_CURRENT)
            && implies(self.is_mirrored(), !self.is_on_other_device())
            && implies(self.is_mirrored_writable(), self.is_mirrored() && self.is_writable())
            && implies(self.is_zero(), !self.is_writable() && !self.is_on_device())
            && implies(!self.is_on_device(), self.0 >> uapi::HMM_GPU_SNAPSHOT_PAGE_SHIFT == 0)
    }
}

impl fmt::Debug for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = [
            "valid",
            "writable",
            "device",
            "other-device",
            "zero",
            "mirrored",
            "mirror-writable",
            "mirror-current",
        ];
        write!(f, "Seen({:#x}", self.0)?;
        for (bit, name) in names.iter().enumerate() {
            if self.has(1 << bit) {
                write!(f, " {name}")?;
            }
        }
        if self.is_exclusive() {
            write!(f, " mirror-exclusive")?;
        }
        write!(f, ")")
    }
}

/// What `SNAPSHOT` answers.
pub fn try_snapshot(device: &Device, span: Span) -> Result<Vec<Seen>, Errno> {
    let mut entries = vec![u64::MAX; span.pages];
    let mut argument = hmm_gpu_snapshot {
        addr: span.addr as u64,
        len: span.bytes() as u64,
        entries_ptr: entries.as_mut_ptr() as u64,
        ..Default::default()
    };
    call(device, uapi::HMM_GPU_SNAPSHOT, &mut argument)?;
    Ok(entries.into_iter().map(Seen).collect())
}

/// What is at each page, and what the device page table has for it: never anything else than what is there.
#[track_caller]
pub fn snapshot(device: &Device, span: Span) -> Vec<Seen> {
    let seen = try_snapshot(device, span).unwrap();
    for (i, seen) in seen.iter().enumerate() {
        assert!(
            seen.is_possible(),
            "page {i} of {span:x?} cannot be {seen:?}"
        );
    }
    seen
}

/// How many pages of a span the device page table has.
#[track_caller]
pub fn mirrored(device: &Device, span: Span) -> usize {
    let seen = snapshot(device, span);
    seen.iter().filter(|seen| seen.is_mirrored()).count()
}
