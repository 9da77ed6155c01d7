//! Any call with any argument: what the interface takes, what it refuses, and what it never heard of, by a user without rights, from two
//! threads, in memory that changes all the time.
//!
//! Runs in the virtual GPU host: `bench/test guest_fuzz`. `HMM_GPU_SEED` names another sequence of calls.

mod import;
mod pool;

use std::fs;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use crate::common::child::{say, Child};
use crate::common::driver::{assert_empty, counters, Driver};
use crate::common::memory::{errno, file, last_errno, Area, Span, HUGE, PAGE};
use crate::common::mirror::{both_check, device_fill_by, snapshot, table, wants, MIGRATE};
use crate::common::misuse::{call, sized, user_end};
use crate::common::random::{mix, seed, Random};
use crate::common::{asked_seconds, eventually, is_checking, places, to_device};
use crate::dma_buf::Exported;
use hmm_gpu::uapi::{
    self, hmm_gpu_access, hmm_gpu_advise, hmm_gpu_atomic, hmm_gpu_counters, hmm_gpu_device_fault,
    hmm_gpu_execute, hmm_gpu_fault, hmm_gpu_import, hmm_gpu_migrate, hmm_gpu_mirror, hmm_gpu_pool,
    hmm_gpu_prefetch, hmm_gpu_query, hmm_gpu_residency, hmm_gpu_snapshot,
};
use hmm_gpu::{Device, Errno, Target};

const RW: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;
const ANONYMOUS: libc::c_int = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
const THREADS: usize = 2;
/// Pages that a thread has for structures that others discard, protect and unmap.
const PAPER: usize = 16;
/// Device faults that a thread has room for in memory that nobody else changes.
const FAULTS: usize = 24;
/// More than any structure may have, by its number.
const ROOM: usize = 0x4000;

/// A call: its name, number, how long its structure is and was in its first version, and what it may fail with, as `uapi.rs` has it.
type Known = (&'static str, u32, usize, usize, &'static [Errno]);

const QUERY: usize = 0;
const MIGRATION: usize = 1;
const RESIDENCY: usize = 2;
const COUNTERS: usize = 3;
const MIRROR: usize = 4;
const ACCESS: usize = 5;
const FAULT: usize = 6;
const SNAPSHOT: usize = 7;
const ATOMIC: usize = 8;
const ADVICE: usize = 9;
const PREFETCH: usize = 10;
const POOL: usize = 11;
const EXECUTE: usize = 12;
const IMPORT: usize = 13;
/// The first number that no call has.
const UNUSED: usize = 14;

const CALLS: [Known; 14] = [
    (
        "QUERY",
        uapi::HMM_GPU_QUERY,
        size_of::<hmm_gpu_query>(),
        0x60,
        &[Errno::INVAL, Errno::FAULT],
    ),
    (
        "MIGRATE",
        uapi::HMM_GPU_MIGRATE,
        size_of::<hmm_gpu_migrate>(),
        0x50,
        &[
            Errno::INVAL,
            Errno::FAULT,
            Errno::NOSPC,
            Errno::NOMEM,
            Errno::INTR,
        ],
    ),
    (
        "RESIDENCY",
        uapi::HMM_GPU_RESIDENCY,
        size_of::<hmm_gpu_residency>(),
        0x30,
        &[
            Errno::INVAL,
            Errno::FAULT,
            Errno::BUSY,
            Errno::NOMEM,
            Errno::INTR,
        ],
    ),
    (
        "COUNTERS",
        uapi::HMM_GPU_COUNTERS,
        size_of::<hmm_gpu_counters>(),
        0xa0,
        &[Errno::INVAL, Errno::FAULT],
    ),
    (
        "MIRROR",
        uapi::HMM_GPU_MIRROR,
        size_of::<hmm_gpu_mirror>(),
        0x50,
        &[
            Errno::INVAL,
            Errno::FAULT,
            Errno::NOSPC,
            Errno::NOMEM,
            Errno::INTR,
        ],
    ),
    (
        "ACCESS",
        uapi::HMM_GPU_ACCESS,
        size_of::<hmm_gpu_access>(),
        0x60,
        &[
            Errno::INVAL,
            Errno::FAULT,
            Errno::ACCESS,
            Errno::AGAIN,
            Errno::BUSY,
            Errno::NOSPC,
            Errno::NOMEM,
            Errno::INTR,
        ],
    ),
    (
        "FAULT",
        uapi::HMM_GPU_FAULT,
        size_of::<hmm_gpu_fault>(),
        0x40,
        &[Errno::INVAL, Errno::FAULT, Errno::NOMEM, Errno::INTR],
    ),
    (
        "SNAPSHOT",
        uapi::HMM_GPU_SNAPSHOT,
        size_of::<hmm_gpu_snapshot>(),
        0x30,
        &[
            Errno::INVAL,
            Errno::FAULT,
            Errno::BUSY,
            Errno::NOMEM,
            Errno::INTR,
        ],
    ),
    (
        "ATOMIC",
        uapi::HMM_GPU_ATOMIC,
        size_of::<hmm_gpu_atomic>(),
        0x50,
        &[
            Errno::INVAL,
            Errno::FAULT,
            Errno::ACCESS,
            Errno::OPNOTSUPP,
            Errno::BUSY,
            Errno::NOSPC,
            Errno::NOMEM,
            Errno::INTR,
        ],
    ),
    (
        "ADVISE",
        uapi::HMM_GPU_ADVISE,
        size_of::<hmm_gpu_advise>(),
        0x30,
        &[
            Errno::INVAL,
            Errno::FAULT,
            Errno::TOOBIG,
            Errno::NOMEM,
            Errno::INTR,
        ],
    ),
    (
        "PREFETCH",
        uapi::HMM_GPU_PREFETCH,
        size_of::<hmm_gpu_prefetch>(),
        0x30,
        &[
            Errno::INVAL,
            Errno::FAULT,
            Errno::AGAIN,
            Errno::NOMEM,
            Errno::INTR,
        ],
    ),
    (
        "POOL",
        uapi::HMM_GPU_POOL,
        size_of::<hmm_gpu_pool>(),
        0x30,
        &[
            Errno::INVAL,
            Errno::FAULT,
            Errno::EXIST,
            Errno::BUSY,
            Errno::NOSPC,
            Errno::NOMEM,
            Errno::INTR,
        ],
    ),
    (
        "EXECUTE",
        uapi::HMM_GPU_EXECUTE,
        size_of::<hmm_gpu_execute>(),
        0x30,
        &[
            Errno::INVAL,
            Errno::FAULT,
            Errno::NXIO,
            Errno::BUSY,
            Errno::SRCH,
            Errno::INTR,
        ],
    ),
    (
        "IMPORT",
        uapi::HMM_GPU_IMPORT,
        size_of::<hmm_gpu_import>(),
        0x30,
        &[
            Errno::INVAL,
            Errno::FAULT,
            Errno::BADF,
            Errno::BUSY,
            Errno::NOSPC,
            // By a device that is one of these.
            Errno::OPNOTSUPP,
            Errno::NOMEM,
            Errno::INTR,
        ],
    ),
];

/// What the status of a device fault may be.
const STATUSES: [Errno; 6] = [
    Errno::FAULT,
    Errno::ACCESS,
    Errno::BUSY,
    Errno::NOSPC,
    Errno::NOMEM,
    Errno::CANCELED,
];

/// What others' calls are numbered, for terminals, disks, graphics, machines, and the driver of the kernel's own HMM suite.
const OTHERS: [u32; 12] = [
    0x5401,
    0x5413,
    0x541b,
    0x1272,
    0x8008_1272,
    0xc040_6400,
    0xc010_640c,
    0xae01,
    0xae80,
    0x2285,
    0xc028_4800,
    0xc028_4802,
];

/// Memory that calls are aimed at. What may be written to is in the middle, with nothing mapped around it: no answer that is too
/// long gets from there to what must not change.
struct Ground {
    area: Span,
    /// Anything may happen to it.
    arena: Span,
    /// Structures are here, those of each thread on its own pages.
    paper: Span,
    /// With the pattern of a seed: calls read from these, move them and map them, and never write.
    guards: [(Span, u64); 4],
    /// The one of them that cannot be written to.
    read_only: Span,
    /// Nothing is here.
    gaps: Vec<Span>,
    /// Where user space ends.
    end: usize,
    /// All that the process has mapped, with its stacks and its text, from where to where.
    program: Vec<(usize, usize)>,
    /// Calls are made by a file with a mapped pool, into which anything is written.
    is_narrow: bool,
}

impl Ground {
    /// In memory of so many pages.
    const PAGES: usize = 3712;

    fn new(area: Span) -> Self {
        let arena = area.part(512, 4 * HUGE);
        let paper = area.part(3008, THREADS * PAPER);
        let read_only = area.part(2624, 320);
        let guards = [
            (area.part(0, 448), 1),
            (read_only, 2),
            (area.part(3072, HUGE), 3),
            (area.part(3600, 100), 4),
        ];
        let gaps = [(448, 64), (2560, 64), (2944, 64), (3040, 32), (3584, 16)];
        let gaps: Vec<Span> = gaps.map(|(first, pages)| area.part(first, pages)).into();
        guards[2].0.advise(libc::MADV_HUGEPAGE).unwrap();
        guards[3]
            .0
            .map_over(RW, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1);
        guards.iter().for_each(|(span, seed)| span.fill(*seed));
        read_only.protect(libc::PROT_READ);
        gaps.iter().for_each(|gap| gap.protect(libc::PROT_NONE));
        arena.fill(5);
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        let number = |text| usize::from_str_radix(text, 16).unwrap();
        let program = maps.lines().map(|line| {
            let (start, rest) = line.split_once('-').unwrap();
            (number(start), number(rest.split_once(' ').unwrap().0))
        });
        let ours = area.addr..area.addr + area.bytes();
        Self {
            arena,
            paper,
            guards,
            read_only,
            gaps,
            end: user_end() as usize,
            program: program.filter(|(start, _)| !ours.contains(start)).collect(),
            is_narrow: false,
            area,
        }
    }

    /// The same, for calls by which nothing may come to a device but what is in the arena.
    fn narrow(&self) -> Self {
        let gap = self.gaps[0];
        let (start, end) = (self.arena.addr, self.arena.addr + self.arena.bytes());
        Self {
            area: Span::new(gap.addr, gap.pages + self.arena.pages),
            guards: [(self.arena, 0); 4],
            read_only: gap,
            paper: self.arena,
            gaps: vec![gap],
            program: vec![(start, end)],
            is_narrow: true,
            ..*self
        }
    }

    #[track_caller]
    fn check(&self) {
        self.guards
            .iter()
            .for_each(|(span, seed)| span.check(*seed));
    }

    /// Whether no call takes a range.
    fn refuses(&self, addr: u64, len: u64) -> bool {
        let (page, last) = (PAGE as u64, self.end as u64);
        let end = addr.checked_add(len);
        len == 0 || addr % page != 0 || len % page != 0 || end.is_none_or(|end| end > last)
    }

    /// An address at which nothing can be.
    fn nowhere(&self, random: &mut Random) -> usize {
        let end = self.end;
        let anywhere = random.next() as usize;
        random.of(&[
            0,
            PAGE,
            end,
            end - 8,
            end + PAGE,
            1 << 62,
            1 << 63,
            anywhere | (1 << 63),
            0xffff_8880_0000_0000,
            0xffff_ffff_8100_0000,
            0xffff_ffff_ff60_0000,
            usize::MAX,
            usize::MAX - PAGE + 1,
            usize::MAX - 3 * PAGE,
        ])
    }

    /// An address in a span: of a page, near the end of one, or any.
    fn inside(&self, random: &mut Random, span: Span) -> usize {
        let page = span.page(random.below(span.pages)).addr;
        match random.below(8) {
            0 => page + random.below(PAGE),
            1 => page + PAGE - 1 - random.below(16),
            2 => page + 8 * random.below(PAGE / 8),
            _ => page,
        }
    }

    /// Where something may be read, moved, or looked at: anywhere.
    fn source(&self, random: &mut Random) -> usize {
        match random.below(20) {
            0..=10 => self.inside(random, self.arena),
            11..=14 => {
                let (guard, _) = random.of(&self.guards);
                self.inside(random, guard)
            }
            15 => self.inside(random, self.paper),
            16 | 17 => {
                let (start, end) = random.of(&self.program);
                self.inside(random, Span::new(start, (end - start) / PAGE))
            }
            18 => {
                let gap = random.of(&self.gaps);
                self.inside(random, gap)
            }
            _ => self.nowhere(random),
        }
    }

    /// Where something may be written: where nothing is lost, or where it cannot be.
    fn target(&self, random: &mut Random) -> usize {
        match random.below(20) {
            0..=15 => self.inside(random, self.arena),
            16 => self.inside(random, self.read_only),
            17 => {
                let gap = random.of(&self.gaps);
                self.inside(random, gap)
            }
            _ => self.nowhere(random),
        }
    }

    /// Bytes: mostly few.
    fn length(&self, random: &mut Random) -> usize {
        match random.below(200) {
            0..=59 => 1 + random.below(200),
            60..=179 => PAGE * (1 + random.below(12)),
            180..=195 => 1 + random.below(64 * PAGE),
            196 => self.arena.bytes() / 2,
            197 => PAGE * (1 + random.below(self.area.pages)),
            198 => random.of(&[0, 1 << 62, usize::MAX, usize::MAX - PAGE + 1, 1 << 33]),
            _ => PAGE,
        }
    }

    /// The same in whole pages, mostly: for calls that take no others.
    fn range(&self, random: &mut Random) -> (u64, u64) {
        let (mut addr, mut len) = (self.source(random), self.length(random));
        if !random.once_in(12) {
            addr &= !(PAGE - 1);
            len = len.checked_next_multiple_of(PAGE).unwrap_or(len);
        }
        (addr as u64, self.reach(addr as u64, len as u64))
    }

    /// How much of a range may be named: none of what is behind the arena, if nothing else is to come to a device.
    fn reach(&self, addr: u64, len: u64) -> u64 {
        let (start, end) = (
            self.area.addr as u64,
            self.area.addr as u64 + self.area.bytes() as u64,
        );
        let is_good = addr
            .checked_add(len)
            .is_some_and(|end| end <= self.end as u64);
        if self.is_narrow && is_good && (start..end).contains(&addr) {
            return len.min(end - addr);
        }
        len
    }
}

/// A call that is to be made.
struct Made {
    known: usize,
    number: u32,
    bytes: Vec<u8>,
    /// It is broken: nothing may come of it.
    refused: bool,
}

/// The file by which a call is made.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Who {
    Shared,
    Own,
    Private,
}

/// One of the two who make calls.
struct Caller<'a> {
    /// All of it, and what a file with a mapped pool may be told of.
    grounds: [&'a Ground; 2],
    /// The one of them that the next call is about.
    ground: &'a Ground,
    random: Random,
    thread: usize,
    /// Both have this one.
    shared: &'a Device,
    own: Device,
    /// One with a pool that is mapped.
    private: pool::Private,
    /// Who makes the next call.
    who: Who,
    /// The structures: nobody else changes these, nor the device faults.
    room: Vec<u64>,
    faults: Vec<hmm_gpu_device_fault>,
    backing: fs::File,
    /// For `IMPORT`, with nothing in it; and for a device that calls are made by.
    dma_buf: &'a OwnedFd,
    exported: Exported,
    /// How often each call went well, and how often it failed.
    counts: [[usize; 2]; CALLS.len()],
    /// How long each took, all together and at most.
    times: [(Duration, Duration); CALLS.len()],
}

impl Caller<'_> {
    /// The fields of a structure that must be zero: in `bits`, how many there are. One of them is not.
    fn breaks(&mut self, one_in: usize, bits: usize) -> Option<u32> {
        self.random
            .once_in(one_in)
            .then(|| self.random.below(bits) as u32)
    }

    /// A number that must be less than `end`, and whether it is.
    fn choice(&mut self, end: u32) -> (u32, bool) {
        if self.random.once_in(40) {
            let beyond = end + self.random.below(3) as u32;
            return (self.random.of(&[beyond, 1 << 31, u32::MAX]), false);
        }
        (self.random.below(end as usize) as u32, true)
    }

    fn reserved<const N: usize>(&mut self) -> ([u64; N], bool) {
        let mut words = [0; N];
        if let Some(bit) = self.breaks(60, 64 * N) {
            words[bit as usize / 64] = 1 << (bit % 64);
        }
        (words, words != [0; N])
    }

    fn flags(&mut self, bits: usize) -> u64 {
        self.breaks(60, bits).map_or(0, |bit| 1 << bit)
    }

    /// Makes up a structure for a call.
    fn structure(&mut self, known: usize) -> (Vec<u8>, bool) {
        let flags = self.flags(32);
        let ground = self.ground;
        let bytes = |structure: &[u8]| structure.to_vec();
        match known {
            QUERY => {
                let (reserved, broken) = self.reserved();
                let it = hmm_gpu_query {
                    flags: flags as u32,
                    // What the driver writes may be anything.
                    version: self.random.next() as u32,
                    reserved,
                    ..Default::default()
                };
                (bytes(bytemuck::bytes_of(&it)), broken || flags != 0)
            }
            COUNTERS => {
                let flags = self.flags(64);
                let it = hmm_gpu_counters {
                    flags,
                    live_pages: self.random.next(),
                    ..Default::default()
                };
                let broken = flags & !uapi::HMM_GPU_COUNTERS_CLIENT != 0;
                (bytes(bytemuck::bytes_of(&it)), broken)
            }
            MIRROR => {
                let (reserved, broken) = self.reserved();
                let it = hmm_gpu_mirror {
                    flags: flags as u32,
                    reserved,
                    ..Default::default()
                };
                (bytes(bytemuck::bytes_of(&it)), broken || flags != 0)
            }
            MIGRATION => {
                let (addr, len) = ground.range(&mut self.random);
                let ((target, good), (reserved, broken)) = (self.choice(2), self.reserved());
                let it = hmm_gpu_migrate {
                    addr,
                    len,
                    target,
                    flags: flags as u32,
                    done_bytes: self.random.next(),
                    reserved,
                    ..Default::default()
                };
                let broken = broken || flags != 0 || !good || ground.refuses(addr, len);
                (bytes(bytemuck::bytes_of(&it)), broken)
            }
            RESIDENCY => {
                let (addr, len) = ground.range(&mut self.random);
                let (flags, (reserved, broken)) = (self.flags(64), self.reserved());
                let it = hmm_gpu_residency {
                    addr,
                    len,
                    bytes_ptr: self.answer(addr),
                    flags,
                    reserved,
                };
                let broken = broken || flags != 0 || ground.refuses(addr, len);
                (bytes(bytemuck::bytes_of(&it)), broken)
            }
            SNAPSHOT => {
                let (addr, len) = ground.range(&mut self.random);
                let (flags, (reserved, broken)) = (self.flags(64), self.reserved());
                let it = hmm_gpu_snapshot {
                    addr,
                    len,
                    entries_ptr: self.answer(addr),
                    flags,
                    reserved,
                };
                let broken = broken || flags != 0 || ground.refuses(addr, len);
                (bytes(bytemuck::bytes_of(&it)), broken)
            }
            ACCESS => self.access(),
            FAULT => self.fault(),
            ADVICE => self.advice(),
            PREFETCH => self.prefetch(),
            POOL => self.pool(),
            EXECUTE => self.execute(),
            IMPORT => self.import(),
            _ => self.atomic(),
        }
    }

    /// Where an answer goes: at times into the range that it is about.
    fn answer(&mut self, addr: u64) -> u64 {
        let arena = self.ground.arena;
        let inside = (arena.addr as u64..(arena.addr + arena.bytes()) as u64).contains(&addr);
        if inside && self.random.once_in(3) {
            return addr + self.random.below(PAGE) as u64;
        }
        self.ground.target(&mut self.random) as u64
    }

    fn access(&mut self) -> (Vec<u8>, bool) {
        let (source, len) = (
            self.ground.source(&mut self.random) as u64,
            self.ground.length(&mut self.random) as u64,
        );
        let target = self.answer(source);
        let len = self.ground.reach(source, len);
        let len = self.ground.reach(target, len);
        let (op, good) = self.choice(3);
        let (policy, known) = self.choice(3);
        let (flags, (reserved, broken)) = (self.flags(64), self.reserved());
        let mut it = hmm_gpu_access {
            op,
            policy,
            addr: source,
            len,
            flags,
            reserved,
            fault_addr: self.random.next(),
            ..Default::default()
        };
        match op {
            uapi::HMM_GPU_OP_READ => it.buffer_ptr = target,
            uapi::HMM_GPU_OP_WRITE => (it.addr, it.buffer_ptr) = (target, source),
            _ => it.to_addr = target,
        }
        // A field that the operation has no use for.
        let useless = self.random.once_in(60);
        if useless && op == uapi::HMM_GPU_OP_COPY {
            it.buffer_ptr = target;
        } else if useless {
            it.to_addr = target;
        }
        let useless = useless && target != 0;
        let over = op == uapi::HMM_GPU_OP_COPY && source.abs_diff(target) < len;
        let broken = broken || flags != 0 || !good || !known || useless || over || len == 0;
        let wraps = |addr: u64| addr.checked_add(len).is_none();
        let broken = broken || wraps(source) || wraps(target);
        (bytemuck::bytes_of(&it).to_vec(), broken)
    }

    fn fault(&mut self) -> (Vec<u8>, bool) {
        let near = self.ground.source(&mut self.random);
        let mut wanted = || hmm_gpu_device_fault {
            addr: match self.random.below(4) {
                0 => self.ground.source(&mut self.random) as u64,
                // Beside each other, in any order, and some more than once.
                _ => near.wrapping_add(PAGE * self.random.below(40)) as u64,
            },
            access: if self.random.once_in(2000) {
                self.random.next() as u32 | 2
            } else {
                self.random.below(2) as u32
            },
            status: self.random.next() as u32,
        };
        let faults: Vec<_> = (0..FAULTS).map(|_| wanted()).collect();
        self.faults.copy_from_slice(&faults);
        // Each may have others leave the VRAM: most of the time went here.
        let most = self.random.of(&[4, 4, 4, FAULTS]);
        let few = 1 + self.random.below(most) as u32;
        let (faults_ptr, count) = match self.random.below(8) {
            // The list is on pages that it names, as likely as not.
            0 | 1 => {
                let place = self.ground.inside(&mut self.random, self.ground.arena);
                poke(place, bytemuck::cast_slice(&faults));
                (place, few)
            }
            2 => {
                let place = self.ground.target(&mut self.random);
                // Many cost what hundreds of other calls do.
                let many = if self.random.once_in(20) { 65536 } else { 1000 };
                (place, self.random.of(&[few, few, few, many]))
            }
            _ => (self.faults.as_mut_ptr() as usize, few),
        };
        let count = match self.random.below(60) {
            0 => self.random.of(&[0, 65537, u32::MAX]),
            _ => count,
        };
        let (flags, (reserved, broken)) = (self.flags(64), self.reserved());
        let (policy, good) = self.choice(2);
        let it = hmm_gpu_fault {
            faults_ptr: faults_ptr as u64,
            count,
            policy,
            flags,
            reserved,
            ..Default::default()
        };
        let broken = broken || flags != 0 || !good || count == 0 || count > 65536;
        (bytemuck::bytes_of(&it).to_vec(), broken)
    }

    fn advice(&mut self) -> (Vec<u8>, bool) {
        let (addr, len) = self.ground.range(&mut self.random);
        let (advice, good) = self.choice(5);
        let value = match advice {
            uapi::HMM_GPU_ADVICE_GRANULARITY => {
                self.random
                    .of(&[0, 4096, 65536, 2 << 20, 1, 12288, 4 << 20, u64::MAX])
            }
            _ => self.random.of(&[0, 0, 1, 1, 1, 2, 3, u64::MAX]),
        };
        let fits = match advice {
            uapi::HMM_GPU_ADVICE_RESET => value == 0,
            uapi::HMM_GPU_ADVICE_LOCATION => value <= 2,
            uapi::HMM_GPU_ADVICE_GRANULARITY => [0, 4096, 65536, 2 << 20].contains(&value),
            _ => value <= 1,
        };
        let (flags, (reserved, broken)) = (self.flags(32), self.reserved());
        let it = hmm_gpu_advise {
            addr,
            len,
            advice,
            flags: flags as u32,
            value,
            reserved,
        };
        let broken = broken || flags != 0 || !good || !fits || self.ground.refuses(addr, len);
        (bytemuck::bytes_of(&it).to_vec(), broken)
    }

    fn prefetch(&mut self) -> (Vec<u8>, bool) {
        let (addr, len) = self.ground.range(&mut self.random);
        let (target, good) = self.choice(2);
        let (flags, (reserved, broken)) = (self.flags(32), self.reserved());
        let it = hmm_gpu_prefetch {
            addr,
            len,
            cookie: self.random.next(),
            target,
            flags: flags as u32,
            reserved,
        };
        let broken = broken || flags != 0 || !good || self.ground.refuses(addr, len);
        (bytemuck::bytes_of(&it).to_vec(), broken)
    }

    /// Reads what has become of moves, to anywhere.
    fn read(&mut self) {
        let place = self.ground.target(&mut self.random);
        let bytes = self.random.of(&[0, 79, 80, 80, 800, 6000]);
        let fd = self.file().as_fd().as_raw_fd();
        // SAFETY: what can be written there may be.
        let read = unsafe { libc::read(fd, place as *mut libc::c_void, bytes) };
        if read >= 0 {
            assert!(
                read as usize <= bytes && read % 80 == 0,
                "{read} of {bytes}"
            );
            return;
        }
        let error = last_errno();
        let may = [Errno::INVAL, Errno::FAULT, Errno::INTR];
        assert!(
            may.contains(&error),
            "reading {bytes} to {place:#x}: {error}"
        );
    }

    fn atomic(&mut self) -> (Vec<u8>, bool) {
        let bytes = self.random.of(&[4, 8]);
        let most = if bytes == 8 {
            u64::MAX
        } else {
            u32::MAX.into()
        };
        let (mut op, mut good) = self.choice(5);
        let (mut addr, mut operand) = (
            self.ground.target(&mut self.random) as u64,
            self.random.next() & most,
        );
        let mut compare = 0;
        if op == uapi::HMM_GPU_ATOMIC_CMPXCHG {
            compare = self.random.of(&[0, operand]);
        }
        if self.random.once_in(6) {
            // What leaves the word as it is may be done anywhere.
            addr = self.ground.source(&mut self.random) as u64;
            (op, operand) = self.random.of(&[
                (uapi::HMM_GPU_ATOMIC_ADD, 0),
                (uapi::HMM_GPU_ATOMIC_OR, 0),
                (uapi::HMM_GPU_ATOMIC_AND, most),
            ]);
            (compare, good) = (0, true);
        }
        if !self.random.once_in(20) {
            addr &= !(bytes - 1);
        }
        let wide = bytes == 4 && self.random.once_in(40);
        if wide {
            operand |= 1 << 40;
        }
        let (flags, (reserved, broken)) = (self.flags(32), self.reserved());
        let ((policy, known), size) = (self.choice(2), self.random.below(40));
        let bytes = match size {
            0 => self.random.of(&[0, 1, 2, 16, 1 << 31]),
            _ => bytes,
        };
        let broken = broken
            || flags != 0
            || !good
            || !known
            || wide
            || ![4, 8].contains(&bytes)
            || addr % bytes != 0;
        let it = hmm_gpu_atomic {
            addr,
            operand,
            compare,
            op,
            bytes: bytes as u32,
            policy,
            flags: flags as u32,
            reserved,
            ..Default::default()
        };
        (bytemuck::bytes_of(&it).to_vec(), broken)
    }

    /// Makes up a call.
    fn make(&mut self) -> Made {
        let mut known = self.random.of(&[
            QUERY, COUNTERS, MIRROR, MIGRATION, MIGRATION, RESIDENCY, SNAPSHOT, ACCESS, ACCESS,
            ACCESS, FAULT, FAULT, ATOMIC, ATOMIC, ADVICE, ADVICE, PREFETCH, POOL, EXECUTE, EXECUTE,
        ]);
        // To make pages of memory takes as long as hundreds of calls.
        if self.random.once_in(200) {
            known = IMPORT;
        }
        if std::mem::take(&mut self.private.wants_pool) {
            known = POOL;
            self.who = Who::Private;
        } else {
            self.who = self.random.of(match known {
                POOL | EXECUTE => &[
                    Who::Private,
                    Who::Private,
                    Who::Private,
                    Who::Own,
                    Who::Shared,
                ],
                _ => &[Who::Private, Who::Own, Who::Shared],
            });
        }
        self.ground = self.grounds[usize::from(self.who == Who::Private)];
        let (_, number, size, smallest, _) = CALLS[known];
        let (bytes, broken) = self.structure(known);
        let (number, short) = match self.random.below(30) {
            _ if self.private.is_long => (number, false),
            0 => {
                let size = self.random.of(&[0, 1, 8, smallest / 2, smallest - 1]);
                (sized(number, size), true)
            }
            1 => {
                let longer = self.random.of(&[size + 1, size + 8, PAGE, ROOM - 1]);
                (sized(number, longer), false)
            }
            _ => (number, false),
        };
        Made {
            known,
            number,
            bytes,
            refused: broken || short,
        }
    }

    /// Puts a structure where its call finds it. Returns the address, and whether it is there.
    fn place(&mut self, bytes: &[u8]) -> (usize, bool) {
        let is_long = std::mem::take(&mut self.private.is_long);
        let (ground, random) = (self.grounds[0], &mut self.random);
        match random.below(20) {
            0..=4 if is_long => self.place_in_room(bytes),
            0 => {
                let gap = random.of(&ground.gaps);
                let nowhere = ground.nowhere(random);
                // A pattern is no structure: nothing of it that must be zero is.
                let pattern = ground.inside(random, ground.read_only);
                let place = random.of(&[0, gap.addr, nowhere, pattern, gap.addr - 8]);
                (place, false)
            }
            1..=4 => {
                let page = ground.paper.page(self.thread * PAPER + random.below(PAPER));
                let last = PAGE - bytes.len();
                let offset = random.of(&[0, last, last, 4, 1021]);
                let place = page.addr + offset;
                // Not if it cannot be written there: then it would be what another call has left.
                if poke(place, bytes) {
                    (place, true)
                } else {
                    (0, false)
                }
            }
            _ => self.place_in_room(bytes),
        }
    }

    fn place_in_room(&mut self, bytes: &[u8]) -> (usize, bool) {
        self.room.fill(0);
        let offset = self.random.of(&[0, 0, 0, 8, 1, 7]);
        let room: &mut [u8] = bytemuck::cast_slice_mut(&mut self.room);
        room[offset..offset + bytes.len()].copy_from_slice(bytes);
        (room.as_ptr() as usize + offset, true)
    }

    fn file(&self) -> &Device {
        match self.who {
            Who::Shared => self.shared,
            Who::Own => &self.own,
            Who::Private => &self.private.device,
        }
    }

    /// Makes a call that is in no list, which nobody knows.
    fn unknown(&mut self) {
        let random = &mut self.random;
        let number = match random.below(4) {
            0 => random.of(&OTHERS),
            // Another's type, another direction, or a number to come.
            1 => {
                let kind = random.of(&[0xe7, 0xe9, 0x00, 0xff]) << 8;
                uapi::HMM_GPU_QUERY & !0xff00 | kind | random.below(CALLS.len()) as u32
            }
            2 => CALLS[random.below(CALLS.len())].1 & !(3 << 30) | ((random.below(3) as u32) << 30),
            _ => uapi::HMM_GPU_QUERY & !0xff | (UNUSED + random.below(256 - UNUSED)) as u32,
        };
        let (place, _) = self.place(&[0x5a; 64]);
        let answer = call(self.file(), number, place);
        assert_eq!(answer, Err(Errno::NOTTY), "{number:#x}");
    }

    fn step(&mut self) {
        if self.random.once_in(40) {
            return self.unknown();
        }
        if self.random.once_in(20) {
            return self.read();
        }
        if self.random.once_in(30) {
            return self.map_or_touch();
        }
        let made = self.make();
        let (name, _, size, _, errors) = CALLS[made.known];
        let (place, there) = match made.known {
            // The file that is answered must not be lost.
            IMPORT => self.place_in_room(&made.bytes),
            _ => self.place(&made.bytes),
        };
        let begin = Instant::now();
        let answer = call(self.file(), made.number, place);
        let (all, most) = &mut self.times[made.known];
        (*all, *most) = (*all + begin.elapsed(), begin.elapsed().max(*most));
        let what = || {
            let bytes = &made.bytes;
            format!(
                "{name} {:#x} at {place:#x}, {bytes:x?}: {answer:?}",
                made.number
            )
        };
        if let Err(error) = answer {
            // Only where the device page table can be written to.
            let is_broken = self.who == Who::Private && error == Errno::IO;
            assert!(errors.contains(&error) || is_broken, "{}", what());
        }
        if made.refused || !there {
            let refused = matches!(answer, Err(Errno::INVAL | Errno::FAULT));
            assert!(refused, "{}", what());
        }
        self.counts[made.known][usize::from(answer.is_err())] += 1;
        if self.who == Who::Private {
            self.private.asked(made.known, answer);
        }
        // What the answer says is looked at where nobody else has written.
        let room: &[u8] = bytemuck::cast_slice(&self.room);
        let whole = made.number == CALLS[made.known].1;
        let Some(offset) = place.checked_sub(room.as_ptr() as usize) else {
            return;
        };
        let is_import = made.known == IMPORT && answer.is_ok();
        if made.refused || !(whole || is_import) || offset + size > room.len() {
            return;
        }
        let answered = &room[offset..offset + size];
        match made.known {
            MIGRATION => {
                let it: hmm_gpu_migrate = bytemuck::pod_read_unaligned(answered);
                // Beyond user space nothing is begun.
                if answer == Err(Errno::FAULT) {
                    return;
                }
                let sum = [it.moved_bytes, it.already_bytes, it.skipped_bytes];
                let sum = sum.into_iter().sum::<u64>() + it.unmapped_bytes;
                assert!(sum == it.done_bytes && sum <= it.len, "{it:?}, {}", what());
                assert!(answer.is_err() || sum == it.len, "{it:?}, {}", what());
            }
            ACCESS => {
                let it: hmm_gpu_access = bytemuck::pod_read_unaligned(answered);
                assert!(it.done_bytes <= it.len, "{it:x?}, {}", what());
                let whole = it.done_bytes == it.len;
                assert_eq!(answer.is_ok(), whole, "{it:x?}, {}", what());
            }
            FAULT => {
                let it: hmm_gpu_fault = bytemuck::pod_read_unaligned(answered);
                let ours = it.faults_ptr == self.faults.as_ptr() as u64;
                if answer.is_ok() && ours {
                    for fault in &self.faults[..it.count as usize] {
                        let known = |errno: &Errno| errno.raw_os_error() as u32 == fault.status;
                        let good = fault.status == 0 || STATUSES.iter().any(known);
                        assert!(good, "{fault:x?}, {}", what());
                    }
                }
            }
            POOL if answer.is_ok() => {
                let it: hmm_gpu_pool = bytemuck::pod_read_unaligned(answered);
                self.has_pool(&it);
            }
            IMPORT if is_import => {
                let it: hmm_gpu_import = bytemuck::pod_read_unaligned(answered);
                self.has_import(&it);
            }
            EXECUTE if answer.is_ok() => {
                let it: hmm_gpu_execute = bytemuck::pod_read_unaligned(answered);
                self.has_executed(&it);
            }
            _ => (),
        }
    }

    /// The memory changes under the other one's calls.
    fn disturb(&mut self) {
        let (ground, random) = (self.grounds[0], &mut self.random);
        if random.once_in(60) {
            // Else all of it is holes and fragments after a while, where most calls have nothing to do.
            return ground.arena.map_over(RW, ANONYMOUS, -1);
        }
        let whole = if random.once_in(10) {
            ground.paper
        } else {
            ground.arena
        };
        let first = random.below(whole.pages);
        let most = random.of(&[1, 8, 64, whole.pages]).min(whole.pages - first);
        let span = whole.part(first, 1 + random.below(most));
        let is_paper = whole == ground.paper;
        // Whether the kernel does it is no matter, so nothing of these is looked at.
        match random.below(16) {
            0 => span.unmap(),
            1..=3 => {
                let protection = random.of(&[RW, RW, libc::PROT_READ, libc::PROT_NONE]);
                // SAFETY: nobody has anything to lose there.
                unsafe { libc::mprotect(span.addr as *mut _, span.bytes(), protection) };
            }
            4..=6 => {
                let _ = span.advise(random.of(&[
                    libc::MADV_DONTNEED,
                    libc::MADV_DONTNEED,
                    libc::MADV_FREE,
                    libc::MADV_HUGEPAGE,
                    libc::MADV_NOHUGEPAGE,
                    libc::MADV_PAGEOUT,
                    libc::MADV_POPULATE_WRITE,
                    crate::common::huge::MADV_COLLAPSE,
                ]));
            }
            // Never to the paper: what is there is taken for structures.
            7 | 8 if !is_paper => {
                let to = whole.page(random.below(whole.pages - span.pages + 1)).addr;
                let flags = random.of(&[0, 0, libc::MREMAP_DONTUNMAP]);
                let flags = flags | libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
                let (from, bytes) = (span.addr as *mut libc::c_void, span.bytes());
                // SAFETY: as above.
                unsafe { libc::mremap(from, bytes, bytes, flags, to as *mut libc::c_void) };
            }
            9 if !is_paper => {
                let fd = self.backing.as_raw_fd();
                let (protection, flags, fd) = random.of(&[
                    (RW, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1),
                    (RW, libc::MAP_PRIVATE, fd),
                    (libc::PROT_READ, libc::MAP_PRIVATE, fd),
                    (libc::PROT_READ, libc::MAP_SHARED, fd),
                ]);
                span.map_over(protection, flags, fd);
            }
            10 => self.fork(),
            11 | 12 if !is_paper => {
                let bytes = vec![random.next() as u8; 1 + random.below(3 * PAGE)];
                poke(ground.inside(random, span), &bytes);
            }
            _ => span.map_over(RW, ANONYMOUS, -1),
        }
    }

    /// A child shares the memory for a moment. Its calls are nobody's.
    fn fork(&mut self) {
        let (_, number, ..) = self.random.of(&CALLS);
        let fd = self.own.as_fd().as_raw_fd();
        // SAFETY: the child makes one system call and ends.
        let child = unsafe { libc::fork() };
        if child == 0 {
            // SAFETY: nothing is at that address.
            let answer = unsafe { libc::ioctl(fd, libc::Ioctl::from(number), 0) };
            let refused = answer == -1 && last_errno() == Errno::PERM;
            // SAFETY: it ends the child.
            unsafe { libc::_exit(i32::from(!refused)) };
        }
        let mut status = 0;
        // SAFETY: it waits for the child just made.
        errno(unsafe { libc::waitpid(child, &raw mut status, 0) }).unwrap();
        assert_eq!(status, 0, "the child's call {number:#x}");
    }

    fn tell(&self, step: usize, begin: Instant) {
        let elapsed = begin.elapsed();
        say(&format!(
            "thread {}: {step} calls in {elapsed:.1?}",
            self.thread
        ));
    }

    fn run(&mut self, calls: usize, time: Duration) {
        let begin = Instant::now();
        let mut step = 0;
        while step < calls || begin.elapsed() < time {
            self.step();
            if self.random.once_in(16) {
                self.disturb();
            }
            if self.random.once_in(500) {
                let (guard, seed) = self.random.of(&self.grounds[0].guards);
                guard.page(self.random.below(guard.pages)).check(seed);
            }
            if self.random.once_in(1000) {
                self.own = Device::open_path(self.shared.path()).unwrap();
            }
            // Blocks with nodes of others' tables become no pools, and after a while most have some: a pool is kept.
            let often = if self.private.has_pool { 3000 } else { 300 };
            if self.random.once_in(often) {
                self.renew_private();
            }
            step += 1;
            if step % 5_000 == 0 {
                self.tell(step, begin);
            }
        }
        self.tell(step, begin);
    }
}

/// Writes somewhere, as a debugger would: it may not be possible. Returns whether all of it is written.
fn poke(addr: usize, bytes: &[u8]) -> bool {
    let piece = |addr: *mut libc::c_void| libc::iovec {
        iov_base: addr,
        iov_len: bytes.len(),
    };
    let (from, to) = (
        piece(bytes.as_ptr() as *mut _),
        piece(addr as *mut libc::c_void),
    );
    let pid = std::process::id() as libc::pid_t;
    // SAFETY: the bytes are that long; where they go is nobody's.
    let written = unsafe { libc::process_vm_writev(pid, &from, 1, &to, 1, 0) };
    written == bytes.len() as isize
}

/// What is left of a process's rights.
fn become_nobody() {
    // SAFETY: no groups.
    errno(unsafe { libc::setgroups(0, std::ptr::null()) }).unwrap();
    // SAFETY: always fine to call.
    errno(unsafe { libc::setgid(65534) }).unwrap();
    // SAFETY: as above.
    errno(unsafe { libc::setuid(65534) }).unwrap();
    // What is in /proc of it is its own still.
    // SAFETY: as above.
    errno(unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 1) }).unwrap();
}

/// Moves memory. That it went the driver alone can say: to those without rights the kernel does not tell where pages are.
#[track_caller]
fn move_to(device: &Device, span: Span, target: Target) {
    eventually("all of it is there", || {
        let moved = device.prefetch_range(span.addr, span.bytes(), target);
        let counts = places(device, span).counts();
        moved.unwrap().is_complete()
            && match target {
                Target::Device => counts.device == span.pages,
                Target::System => counts.system == span.pages,
            }
    });
}

/// Makes calls until there were so many, and until so much time has gone. Nothing has changed that was not to, and the device does
/// what it is asked.
fn fuzz(seed: u64, calls: usize, time: Duration) {
    // Who may make one is not the driver's business.
    let exported = Exported::new(import::DMA_BUF);
    let mut each = [(); THREADS].map(|()| Some(Exported::new(import::DMA_BUF)));
    become_nobody();
    let device = Device::open(0).unwrap();
    // So it has something in VRAM for good, and no pool.
    table(&device);
    let area = Area::new(Ground::PAGES);
    let ground = Ground::new(*area);
    let narrow = ground.narrow();
    for (guard, _) in &ground.guards[..3] {
        move_to(&device, *guard, Target::Device);
    }
    let mut callers: Vec<Caller<'_>> = (0..THREADS)
        .map(|thread| Caller {
            grounds: [&ground, &narrow],
            ground: &ground,
            random: Random::new(mix(seed ^ ((thread as u64) << 60))),
            thread,
            shared: &device,
            own: Device::open(0).unwrap(),
            private: pool::Private::new(Device::open(0).unwrap()),
            who: Who::Shared,
            room: vec![0; ROOM / 8 + 1],
            faults: vec![wants(0, 0); FAULTS],
            backing: file(200, 6),
            dma_buf: &exported.dma_buf,
            exported: each[thread].take().unwrap(),
            counts: Default::default(),
            times: Default::default(),
        })
        .collect();
    std::thread::scope(|scope| {
        for caller in &mut callers {
            scope.spawn(|| caller.run(calls / THREADS, time));
        }
    });
    for (known, (name, ..)) in CALLS.iter().enumerate() {
        let sum = |which: usize| -> usize {
            let counts = callers.iter().map(|caller| caller.counts[known][which]);
            counts.sum()
        };
        let (good, failed) = (sum(0), sum(1));
        let times = callers.iter().map(|caller| caller.times[known]);
        let (all, most) = times.fold(
            Default::default(),
            |(all, most): (Duration, Duration), it| (all + it.0, most.max(it.1)),
        );
        say(&format!(
            "{name}: {good} went well, {failed} failed, in {all:.1?}, the slowest {most:.1?}"
        ));
        // A fuzzer that is always refused finds nothing.
        // A pool is a file's only one, and what it takes to be executed: one of them is certain, and no more.
        let few = if [POOL, EXECUTE, IMPORT].contains(&known) {
            200_000
        } else {
            200
        };
        assert!(good > calls / few && failed > calls / 1000, "{name}");
    }
    drop(callers);
    // And with them, what is mapped of pools.
    ground.arena.map_over(RW, ANONYMOUS, -1);
    eventually("pools are given back", || {
        device.describe().unwrap();
        let now = counters(&device);
        now.private_pages == 0 && now.quarantined_pages == 0
    });
    ground.check();

    // And now for something that is right.
    let area = Area::new(700);
    device_fill_by(&device, *area, 7, MIGRATE);
    move_to(&device, *area, Target::System);
    move_to(&device, *area, Target::Device);
    both_check(&device, *area, 7);
    ground.check();
    for (guard, seed) in &ground.guards {
        both_check(&device, *guard, *seed);
        snapshot(&device, *guard);
    }
}

/// Catches an argument that nobody thought of: one that the driver takes and should not, that has it write where it was not told to, that
/// stops it, or that it answers with an error which is not that call's.
#[test]
fn whatever_is_asked_nothing_else_is_changed() {
    let driver = Driver::load("soft=1 soft_mib=20 import_mib=10 fault_around=64 bounce_ms=20");
    let device = Device::open(0).unwrap();
    fs::set_permissions(device.path(), fs::Permissions::from_mode(0o666)).unwrap();
    // Another process's, which is in the way in so little VRAM.
    let bystander = Area::filled(600, 8);
    to_device(&device, *bystander);
    let seed = seed(0x5eed);
    let calls = if is_checking() { 12_500 } else { 100_000 };
    Child::fork(|_| fuzz(seed, calls, asked_seconds().unwrap_or_default())).finish();
    println!("{}", places(&device, *bystander));
    bystander.check(8);
    to_device(&device, *bystander);
    bystander.check(8);
    drop(bystander);
    // What the child had from this process, and moved, both had.
    let all = user_end() as usize - PAGE;
    let home = device.prefetch_range(PAGE, all, Target::System).unwrap();
    println!("{home}");
    assert_empty(&device);
    drop(device);
    driver.finish();
}
