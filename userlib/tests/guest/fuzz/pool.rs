//! Private pools, what is mapped of them, and executions: also such as nobody ends, with deadlines that are short.
//!
//! Anything is written into a mapped pool, into the pages in it and into the device page table. So nothing comes there that must
//! keep its bytes: see `Ground::narrow`.

use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::{Caller, Who, ANONYMOUS, POOL, RW};
use crate::common::memory::{last_errno, Span, PAGE};
use hmm_gpu::uapi::{
    self, hmm_gpu_execute, hmm_gpu_pool, HMM_GPU_EXECUTE_BEGIN, HMM_GPU_EXECUTION_ENDED,
    HMM_GPU_EXECUTION_LOST, HMM_GPU_EXECUTION_RUNNING,
};
use hmm_gpu::{Device, Errno};

const MIB: u64 = 1 << 20;
/// All of the VRAM.
const VRAM: u64 = 20 * MIB;
const LATEST: u32 = uapi::HMM_GPU_MAX_DEADLINE_MS;

/// A file that is to have a pool, as far as its answers have told.
pub(super) struct Private {
    pub(super) device: Device,
    /// The next call is to make the pool.
    pub(super) wants_pool: bool,
    pub(super) has_pool: bool,
    /// Where it is, and its bytes.
    place: Option<(u64, u64)>,
    /// The number of its last execution.
    execution: u64,
    mapped: Option<Mapped>,
    /// Where else it is mapped, if nothing else has come there.
    in_arena: Vec<Span>,
    /// The next call begins what others may wait for so long that it has to be known, and ended.
    pub(super) is_long: bool,
}

impl Private {
    pub(super) fn new(device: Device) -> Self {
        Self {
            device,
            wants_pool: true,
            has_pool: false,
            place: None,
            execution: 0,
            mapped: None,
            in_arena: vec![],
            is_long: false,
        }
    }

    /// A call was made that may have been the one: also if its answer could not be written.
    pub(super) fn asked(&mut self, known: usize, answer: Result<(), Errno>) {
        self.has_pool |= known == POOL && matches!(answer, Ok(()) | Err(Errno::FAULT));
    }
}

/// A mapping of a pool.
struct Mapped {
    addr: usize,
    bytes: usize,
    protection: libc::c_int,
}

impl Mapped {
    fn word(&self, at: usize) -> &AtomicU64 {
        assert!(at < self.bytes / 8);
        // SAFETY: it is mapped as long as this is there, and changed by anybody at any time.
        unsafe { &*(self.addr as *const AtomicU64).wrapping_add(at) }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: nobody else knows of it.
        unsafe { libc::munmap(self.addr as *mut _, self.bytes) };
    }
}

impl Caller<'_> {
    pub(super) fn pool(&mut self) -> (Vec<u8>, bool) {
        let bytes = match self.random.below(20) {
            0..=12 => 2 * MIB,
            13 | 14 => 4 * MIB,
            // More than there may be.
            15 => self
                .random
                .of(&[VRAM, VRAM + 2 * MIB, 1 << 45, u64::MAX - 2 * MIB + 1]),
            _ => self
                .random
                .of(&[0, 1, 4096, MIB, 3 * MIB, 2 * MIB + 4096, u64::MAX]),
        };
        let (flags, (reserved, broken)) = (self.flags(64), self.reserved());
        let it = hmm_gpu_pool {
            flags,
            bytes,
            offset: self.random.next(),
            reserved,
        };
        let broken = broken || flags != 0 || bytes == 0 || bytes % (2 * MIB) != 0;
        (bytemuck::bytes_of(&it).to_vec(), broken)
    }

    /// It is made, and this is where.
    pub(super) fn has_pool(&mut self, it: &hmm_gpu_pool) {
        let end = it.offset.checked_add(it.bytes);
        let good = it.offset % (2 * MIB) == 0 && end.is_some_and(|end| end <= VRAM);
        assert!(good, "{it:x?}");
        if self.who == Who::Private {
            self.private.place = Some((it.offset, it.bytes));
        }
    }

    pub(super) fn execute(&mut self) -> (Vec<u8>, bool) {
        let (op, good) = self.choice(3);
        let begins = op == HMM_GPU_EXECUTE_BEGIN;
        let deadline_ms = match self.random.below(30) {
            0 => self.random.of(&[0, LATEST + 1, 1 << 31, u32::MAX]),
            1 if begins && self.who == Who::Private => LATEST,
            _ if begins => self.random.of(&[1, 1, 2, 5, 10, 20]),
            2 => 1,
            _ => 0,
        };
        let last = self.private.execution;
        let any = self.random.next();
        let id = self.random.of(&[
            last,
            last,
            last,
            last,
            last,
            last,
            last - last.min(1),
            last + 1,
            0,
            1,
            any,
            u64::MAX,
        ]);
        let (flags, (reserved, broken)) = (self.flags(32), self.reserved());
        let it = hmm_gpu_execute {
            op,
            flags: flags as u32,
            deadline_ms,
            state: self.random.next() as u32,
            id,
            reserved,
        };
        let fits = if begins {
            (1..=LATEST).contains(&deadline_ms)
        } else {
            deadline_ms == 0
        };
        let broken = broken || flags != 0 || !good || !fits;
        self.private.is_long = begins && deadline_ms == LATEST;
        (bytemuck::bytes_of(&it).to_vec(), broken)
    }

    /// A call for an execution went well, with this answer.
    pub(super) fn has_executed(&mut self, it: &hmm_gpu_execute) {
        let may: &[u32] = match it.op {
            HMM_GPU_EXECUTE_BEGIN => &[HMM_GPU_EXECUTION_RUNNING],
            uapi::HMM_GPU_EXECUTE_END => &[HMM_GPU_EXECUTION_ENDED, HMM_GPU_EXECUTION_LOST],
            _ => &[HMM_GPU_EXECUTION_RUNNING, HMM_GPU_EXECUTION_LOST],
        };
        assert!(may.contains(&it.state), "{it:x?}");
        if self.who != Who::Private {
            return;
        }
        if it.op == HMM_GPU_EXECUTE_BEGIN {
            assert!(it.id > self.private.execution, "{it:x?}");
            self.private.execution = it.id;
        }
        let mut again = hmm_gpu_execute {
            op: uapi::HMM_GPU_EXECUTE_END,
            id: it.id,
            ..Default::default()
        };
        if it.op == HMM_GPU_EXECUTE_BEGIN && it.deadline_ms == LATEST {
            // Nobody is to wait for so long.
            assert_eq!(self.private.device.file().execute(&mut again), Ok(()));
        }
        if it.op == uapi::HMM_GPU_EXECUTE_END {
            let answer = self.private.device.file().execute(&mut again);
            assert_eq!(answer, Err(Errno::SRCH), "{it:x?}");
        }
    }

    /// Another file takes the place of the one with the pool, in the middle of whatever it does; or of that which is mapped still.
    pub(super) fn renew_private(&mut self) {
        if !self.random.once_in(4) {
            let mapped = std::mem::take(&mut self.private.in_arena);
            mapped.iter().for_each(|it| it.map_over(RW, ANONYMOUS, -1));
        }
        let device = Device::open_path(self.private.device.path()).unwrap();
        self.private = Private::new(device);
    }

    pub(super) fn map_or_touch(&mut self) {
        match self.random.below(4) {
            0 => self.map(),
            1 => self.unmap(),
            _ => self.touch(),
        }
    }

    /// Maps a part of a pool: in the arena, where calls and others find it, or where this one alone reads and writes it.
    fn map(&mut self) {
        let arena = self.grounds[0].arena;
        let who = self.random.of(&[
            Who::Private,
            Who::Private,
            Who::Private,
            Who::Own,
            Who::Shared,
        ]);
        let guess = 2 * MIB * self.random.below(10) as u64;
        let (start, size) = self.private.place.unwrap_or((guess, 2 * MIB));
        let pages = (size / PAGE as u64) as usize;
        let first = self.random.below(pages);
        let in_arena = self.random.once_in(2);
        let mut count = 1 + self.random.below((pages - first).min(64));
        let mut offset = start + (first * PAGE) as u64;
        if !in_arena && self.random.once_in(2) {
            (offset, count) = (start, pages);
        }
        let mut bytes = count * PAGE;
        let mut protection = self
            .random
            .of(&[RW, RW, RW, libc::PROT_READ, libc::PROT_NONE]);
        let mut sharing = self.random.of(&[
            libc::MAP_SHARED,
            libc::MAP_SHARED,
            libc::MAP_SHARED | libc::MAP_POPULATE,
        ]);
        let mut refused = who != Who::Private || !self.private.has_pool;
        // Another file's pool is left alone: anything may be in there.
        let which = if who == Who::Own {
            3 + self.random.below(2)
        } else {
            self.random.below(12)
        };
        match which {
            0 => offset = start + size,
            1 => {
                // The last page, and one more.
                (offset, bytes) = (start + size - PAGE as u64, 2 * PAGE);
            }
            2 => {
                offset = self.random.of(&[
                    offset + 1,
                    VRAM,
                    1 << 40,
                    i64::MAX as u64 & !0xfff,
                    u64::MAX & !0xfff,
                ]);
            }
            3 => sharing = libc::MAP_PRIVATE,
            4 => protection |= libc::PROT_EXEC,
            5 if !in_arena => {
                bytes = self
                    .random
                    .of(&[0, 1 << 40, usize::MAX, usize::MAX - PAGE + 1])
            }
            6 if start > 0 => offset = start - PAGE as u64,
            _ => (),
        }
        refused |= (0..5).contains(&which) || which == 5 && !in_arena || which == 6 && start > 0;
        let file = match who {
            Who::Private => &self.private.device,
            Who::Own => &self.own,
            Who::Shared => self.shared,
        };
        let fd = file.as_fd().as_raw_fd();
        let (addr, fixed) = if in_arena {
            let at = self.random.below(arena.pages - 64);
            (arena.page(at).addr, libc::MAP_FIXED)
        } else {
            (0, 0)
        };
        let (flags, at) = (sharing | fixed, addr as *mut libc::c_void);
        // SAFETY: where the kernel likes, or where nobody has anything to lose.
        let mapped = unsafe { libc::mmap(at, bytes, protection, flags, fd, offset as libc::off_t) };
        let what = || format!("{bytes:#x} bytes at {offset:#x}, {protection:#x}, {flags:#x}");
        if mapped == libc::MAP_FAILED {
            let error = last_errno();
            let may = [
                Errno::INVAL,
                Errno::NXIO,
                Errno::PERM,
                Errno::NOMEM,
                Errno::OVERFLOW,
                // Of a dma-buf.
                Errno::OPNOTSUPP,
            ];
            assert!(may.contains(&error), "mapping {}: {error}", what());
            let known = self.private.place.is_some();
            assert!(refused || !known, "mapping {}: {error}", what());
            return;
        }
        assert!(!refused, "mapped: {}", what());
        if in_arena {
            let pages = bytes.div_ceil(PAGE);
            self.private.in_arena.push(Span::new(addr, pages));
        } else {
            self.private.mapped = Some(Mapped {
                addr: mapped as usize,
                bytes,
                protection,
            });
        }
    }

    /// Takes a mapping away, or what may be done with it, or a part of it: what nobody may have is not given.
    fn unmap(&mut self) {
        let Some(mut mapped) = self.private.mapped.take() else {
            return;
        };
        let addr = mapped.addr as *mut libc::c_void;
        match self.random.below(6) {
            0 => {
                // SAFETY: it changes no bytes.
                let done = unsafe { libc::mprotect(addr, PAGE, RW | libc::PROT_EXEC) };
                assert_eq!((done, last_errno()), (-1, Errno::ACCESS));
            }
            1 => {
                // SAFETY: it changes no bytes.
                let done = unsafe { libc::madvise(addr, PAGE, libc::MADV_DOFORK) };
                assert_eq!((done, last_errno()), (-1, Errno::INVAL));
            }
            2 => {
                mapped.protection = self.random.of(&[RW, libc::PROT_READ, libc::PROT_NONE]);
                // SAFETY: nobody else touches it.
                let done = unsafe { libc::mprotect(addr, mapped.bytes, mapped.protection) };
                assert_eq!(done, 0, "{}", last_errno());
            }
            3 => {
                let advice = self.random.of(&[
                    libc::MADV_DONTNEED,
                    libc::MADV_PAGEOUT,
                    libc::MADV_COLD,
                    libc::MADV_POPULATE_WRITE,
                ]);
                // Whether the kernel does it is no matter.
                // SAFETY: the bytes are the pool's, and stay.
                unsafe { libc::madvise(addr, mapped.bytes, advice) };
            }
            4 if mapped.bytes > PAGE => {
                let rest = PAGE * (1 + self.random.below(mapped.bytes / PAGE - 1));
                let end = (mapped.addr + rest) as *mut libc::c_void;
                // SAFETY: nobody else touches it.
                let done = unsafe { libc::munmap(end, mapped.bytes - rest) };
                assert_eq!(done, 0, "{}", last_errno());
                mapped.bytes = rest;
            }
            _ => return,
        }
        self.private.mapped = Some(mapped);
    }

    /// Plays a shader that has lost its mind.
    fn touch(&mut self) {
        let Some(mapped) = &self.private.mapped else {
            return;
        };
        if mapped.protection == libc::PROT_NONE {
            return;
        }
        let words = mapped.bytes / 8;
        let mut copied = 0;
        for _ in 0..self.random.below(64) {
            let (from, to) = (self.random.below(words), self.random.below(words));
            copied = match self.random.below(3) {
                0 => mapped.word(from).load(Relaxed),
                1 => self.random.of(&[0, u64::MAX, copied]),
                _ => self.random.next(),
            };
            if mapped.protection == RW {
                mapped.word(to).store(copied, Relaxed);
            }
        }
    }
}
