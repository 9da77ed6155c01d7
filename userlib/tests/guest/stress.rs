//! Everything at once, for long: processes that come and go, each of whose threads has memory of its own and knows what every page of it
//! must hold, does to it all that the kernel and two devices can, and moves that of the others; while a GPU comes and goes, the kernel
//! compacts, merges and swaps, and steps of the driver fail.
//!
//! Runs in the virtual GPU host: `bench/test guest_stress`. `HMM_GPU_SEED` names another sequence, `HMM_GPU_STRESS_SECONDS` how long.

mod pool;

use std::fs;
use std::os::fd::AsRawFd;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use crate::common::child::{say, Child};
use crate::common::driver::{self, assert_empty, is_bound, Driver, GPUS};
use crate::common::huge::MADV_COLLAPSE;
use crate::common::kernel::{self, Entry};
use crate::common::memory::{errno, file, last_errno, Area, Span, HUGE, PAGE};
use crate::common::mirror::{
    atomic, copy, read, try_fault, try_snapshot, wants, write, MAP, MIGRATE, NONE, READ, WRITE,
};
use crate::common::random::{mix, seed, Random};
use crate::common::swap::Swap;
use crate::common::{asked_seconds, is_checking, patience, Stop};
use hmm_gpu::uapi::HMM_GPU_ATOMIC_ADD;
use hmm_gpu::{Advice, Device, Errno, Place, Target};

const RW: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;
const ANONYMOUS: libc::c_int = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
const PROCESSES: usize = 4;
const THREADS: usize = 2;
/// Pieces of memory that a thread has, and their pages.
const PLOTS: usize = 2;
const PAGES: usize = 2 * HUGE;
/// The seed of what is in the files.
const IN_FILE: u64 = 0xff_ffff;
/// The seed of what heirs write.
const OF_HEIR: u64 = 0xff_fffe;
/// The GPU that comes and goes, and the number that it gets: that of the soft device is 0.
const GPU: &str = GPUS[0];
const GPU_UNIT: usize = 1;
const TOO_LONG: Duration = Duration::from_secs(60);

/// What a thread does in a step.
const DEEDS: [(&str, usize); 29] = [
    ("write", 12),
    ("check", 12),
    ("write alike", 2),
    ("map", 4),
    ("unmap", 2),
    ("protect", 4),
    ("discard", 3),
    ("free", 2),
    ("advise", 6),
    ("page out", 3),
    ("move away", 3),
    ("renew", 1),
    ("fork", 3),
    ("exec", 1),
    // From here on with a device.
    ("device write", 10),
    ("device check", 10),
    ("device copy", 4),
    ("device hole", 2),
    ("atomic", 6),
    ("fault", 6),
    ("migrate", 12),
    ("migrate others", 6),
    ("queue", 5),
    ("residency", 3),
    ("advice", 3),
    ("snapshot", 3),
    ("describe", 2),
    ("execute", 8),
    ("reopen", 1),
];
const WITHOUT_DEVICE: usize = 14;

/// What processes are told.
const GO_ON: u64 = 0;
const CLOSE: u64 = 1;
const END: u64 = 2;

/// What all processes see.
struct Board {
    orders: [AtomicU64; PROCESSES],
    alive: [AtomicBool; PROCESSES],
    threads: [[Progress; THREADS]; PROCESSES],
    /// Of the one that has the machine do this and that.
    host: Progress,
    done: [AtomicU64; DEEDS.len()],
}

/// How many steps somebody has made, and what is done in this one.
struct Progress {
    steps: AtomicU64,
    deed: AtomicU64,
}

impl Board {
    /// In memory that is shared with forked processes, and all zeroes.
    fn new() -> &'static Self {
        const { assert!(size_of::<Board>() <= PAGE) };
        let area = Box::leak(Box::new(Area::shared(1)));
        // SAFETY: the memory is as long, stays, and nothing but this is in it; any bytes are a board.
        unsafe { &*(area.addr as *const Self) }
    }
}

/// Says who makes no progress, and ends the test: whoever waits for that one could not.
fn watch(board: &Board, stop: &AtomicBool) {
    let all = || {
        let processes = board.threads.iter().enumerate();
        let threads = processes.flat_map(|(p, threads)| {
            let threads = threads.iter().enumerate();
            threads.map(move |(t, it)| (Some(p), format!("thread {t} of process {p}"), it))
        });
        threads.chain([(None, "the host".to_owned(), &board.host)])
    };
    let mut last: Vec<(u64, Instant)> = all().map(|_| (0, Instant::now())).collect();
    while !stop.load(Relaxed) {
        std::thread::sleep(Duration::from_millis(200));
        for ((process, name, progress), last) in all().zip(&mut last) {
            let steps = progress.steps.load(Relaxed);
            let alive = process.is_none_or(|p| board.alive[p].load(Relaxed));
            if steps != last.0 || !alive {
                *last = (steps, Instant::now());
            }
            if last.1.elapsed() > patience(TOO_LONG) {
                let deed = progress.deed.load(Relaxed) as usize;
                let deed = process.map_or("its own", |_| DEEDS[deed].0);
                say(&format!(
                    "{name} has made no progress since step {steps}: {deed}"
                ));
                for _ in 0..2 {
                    tell_places();
                    std::thread::sleep(Duration::from_secs(1));
                }
                // The kernel's log has where each waits, or what it does instead, and then the machine ends: who hangs cannot.
                for request in ["w", "l", "l", "l", "c"] {
                    let _ = fs::write("/proc/sysrq-trigger", request);
                    std::thread::sleep(Duration::from_secs(1));
                }
            }
        }
    }
}

/// Says what the processes' page tables have for what the threads own, and how often the devices had a CPU come again.
fn tell_places() {
    for unit in Device::list() {
        let counters = Device::open(unit).map(|device| driver::counters(&device));
        say(&format!("device {unit}: {counters:?}"));
    }
    let pids = fs::read_dir("/proc").unwrap().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    for pid in pids {
        // It may end meanwhile.
        if fs::File::open(format!("/proc/{pid}/pagemap")).is_err() {
            continue;
        }
        let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
        let mut kinds = std::collections::BTreeMap::new();
        for line in maps.lines() {
            let (start, end) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
            let number = |text| usize::from_str_radix(text, 16).unwrap();
            let (start, end) = (number(start), number(end));
            // Where areas are.
            if start >> 44 != 2 {
                continue;
            }
            let entries = kernel::pagemap(pid, start, (end - start) / PAGE);
            for (i, entry) in entries.into_iter().enumerate() {
                let kind = match entry {
                    Entry::None => "none",
                    Entry::Present { .. } => "present",
                    Entry::DevicePrivate { .. } => "device",
                    Entry::Migrating => "migrating",
                    Entry::Other { .. } => "other",
                };
                let (count, first) = kinds.entry(kind).or_insert((0, vec![]));
                *count += 1;
                if ["migrating", "other"].contains(&kind) && first.len() < 6 {
                    first.push((start + i * PAGE, entry));
                }
            }
        }
        if !kinds.is_empty() {
            say(&format!("process {pid}: {kinds:x?}"));
        }
    }
}

/// Where a page comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Hole,
    Private,
    Shared,
    /// A private mapping of that page of a file.
    File(usize),
}

/// What is on a page: a pattern is named by its seed, and which of its pages it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Holds {
    Zero,
    Pattern(u64, usize),
    /// That, or zeroes, as soon as the kernel likes.
    Freed(u64, usize),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Page {
    kind: Kind,
    access: libc::c_int,
    holds: Holds,
}

impl Page {
    const NEW: Self = Self {
        kind: Kind::Private,
        access: RW,
        holds: Holds::Zero,
    };
    const HOLE: Self = Self {
        kind: Kind::Hole,
        ..Self::NEW
    };

    fn is_mapped(self) -> bool {
        self.kind != Kind::Hole
    }

    fn is_readable(self) -> bool {
        self.is_mapped() && self.access != libc::PROT_NONE
    }

    fn is_writable(self) -> bool {
        self.is_mapped() && self.access == RW
    }
}

/// The pages of a pattern, from one on, at an address.
fn pattern(addr: usize, first: usize, pages: usize) -> Span {
    Span::new(0, 1 << 21).part(first, pages).at(addr)
}

/// What is known of a piece of memory that a thread has.
struct Plot {
    area: Area,
    pages: Vec<Page>,
    /// What was done to it last.
    story: Vec<String>,
}

impl Plot {
    fn new() -> Self {
        Self {
            area: Area::new(PAGES),
            pages: vec![Page::NEW; PAGES],
            story: vec![],
        }
    }

    /// Some pages that are all so, from a page on that is one of these.
    fn run(&self, random: &mut Random, is: impl Fn(Page) -> bool) -> Option<Span> {
        let first = random.below(PAGES);
        let most = random.of(&[1, 1, 4, 4, 16, 16, 16, 64, 64, HUGE / 2, PAGES]);
        let count = self.pages[first..].iter().take(most);
        let count = count.take_while(|page| is(**page)).count();
        (count > 0).then(|| self.area.part(first, count))
    }

    /// Any pages.
    fn any(&self, random: &mut Random) -> Span {
        let Some(span) = self.run(random, |_| true) else {
            unreachable!("every page is one");
        };
        span
    }

    /// Which of the pages is the first of a span.
    fn first(&self, span: Span) -> usize {
        (span.addr - self.area.addr) / PAGE
    }

    fn of(&self, span: Span) -> &[Page] {
        &self.pages[self.first(span)..][..span.pages]
    }

    fn of_mut(&mut self, span: Span) -> &mut [Page] {
        let first = self.first(span);
        &mut self.pages[first..][..span.pages]
    }

    fn tell(&mut self, what: &str, span: Span) {
        if self.story.len() == 40 {
            self.story.remove(0);
        }
        let text = format!("{what} {} of {}", self.first(span), span.pages);
        self.story.push(text);
    }

    /// Asserts that what `who` finds on the first pages of a span is what belongs there.
    #[track_caller]
    fn verify(&self, who: &str, span: Span, words: &[u64]) {
        for (i, (words, page)) in words.chunks(PAGE / 8).zip(self.of(span)).enumerate() {
            let zero = || words.iter().all(|&word| word == 0);
            let as_was = |seed, first| *words == pattern(0, first, 1).pattern(seed);
            let good = match page.holds {
                Holds::Zero => zero(),
                Holds::Pattern(seed, first) => as_was(seed, first),
                Holds::Freed(seed, first) => zero() || as_was(seed, first),
            };
            if good {
                continue;
            }
            let (mut wrong, mut which) = (0, None);
            if let Holds::Pattern(seed, first) | Holds::Freed(seed, first) = page.holds {
                let expected = pattern(0, first, 1).pattern(seed);
                let differ = (0..words.len()).filter(|&word| words[word] != expected[word]);
                wrong = differ.clone().count();
                which = differ.clone().next();
            }
            let page_number = self.first(span) + i;
            panic!(
                "{who} does not find on page {page_number} of {:#x} what {page:x?} says: {wrong} words are wrong from {which:?} on, \
                 and it begins with {:#x?}; what was done last: {:#?}",
                self.area.addr,
                &words[..4],
                self.story
            );
        }
    }

    /// Asserts that the CPU finds what belongs on the pages of a span.
    #[track_caller]
    fn check(&self, span: Span) {
        for i in 0..span.pages {
            let page = span.page(i);
            let mut words = [0_u64; PAGE / 8];
            // SAFETY: the page is this thread's, and can be read.
            unsafe {
                std::ptr::copy_nonoverlapping(page.addr as *const _, words.as_mut_ptr(), 512)
            };
            self.verify("the CPU", page, &words);
        }
    }

    /// The same of all that can be read, but for what is shared if not `all`.
    #[track_caller]
    fn check_all(&self, all: bool) {
        for (i, page) in self.pages.iter().enumerate() {
            if page.is_readable() && (all || page.kind != Kind::Shared) {
                self.check(self.area.page(i));
            }
        }
    }

    /// The part around its first page of a mapping that a span begins in: pages that can be moved away together.
    fn mapping(&self, span: Span) -> Span {
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        let number = |text| usize::from_str_radix(text, 16).unwrap();
        let ends = maps.lines().map(|line| {
            let (start, end) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
            (number(start), number(end))
        });
        let mut around = ends.filter(|(start, end)| (*start..*end).contains(&span.addr));
        let (_, end) = around.next().expect("it is mapped");
        span.part(0, span.pages.min((end - span.addr) / PAGE))
    }
}

/// One thread of a process.
struct Worker<'a> {
    board: &'static Board,
    process: usize,
    thread: usize,
    random: Random,
    /// The soft device, and the GPU while it is there.
    devices: [Option<Device>; 2],
    /// A pool of its own on each of them.
    clients: [Option<pool::Client>; 2],
    /// The pieces of all threads, which any of them may move.
    everyone: &'a [Span],
    plots: Vec<Option<Plot>>,
    written: u64,
    backing: fs::File,
    /// A child that has what was here when it was born.
    heir: Option<Child>,
}

impl Worker<'_> {
    /// A seed that no other thread writes with.
    fn fresh(&mut self) -> u64 {
        self.written = (self.written + 1) % (1 << 20);
        let who = self.process * THREADS + self.thread;
        ((who as u64) << 20) | self.written
    }

    /// One of the devices, if it is there. What is done with it fails as `allowed` says, or goes away.
    fn device(&mut self, which: usize) -> Option<&Device> {
        if self.devices[which].is_none() {
            // A node may be gone again when it is looked at.
            self.devices[which] = Device::open(which as u32).ok();
        }
        let device = self.devices[which].as_ref();
        assert!(device.is_some() || which == GPU_UNIT, "the soft device");
        device
    }

    /// Whether a call went well. There are reasons for which it may not.
    #[track_caller]
    fn went(&mut self, which: usize, answer: Result<(), Errno>, allowed: Option<Errno>) -> bool {
        match answer {
            Ok(()) => true,
            Err(Errno::NODEV) if which == GPU_UNIT => {
                self.devices[which] = None;
                false
            }
            Err(error) => {
                let common = [Errno::NOMEM, Errno::NOSPC, Errno::BUSY];
                let allowed = allowed == Some(error) || common.contains(&error);
                assert!(allowed, "device {which}: {error}");
                false
            }
        }
    }

    fn run(&mut self, abrupt: bool) {
        let mine = &self.board.threads[self.process][self.thread];
        let mut closed = false;
        loop {
            let order = self.board.orders[self.process].load(Relaxed);
            if order == END {
                break;
            }
            if order == CLOSE && !closed {
                self.end_heir();
                self.devices = [None, None];
                self.clients = [None, None];
                closed = true;
            }
            let deeds = if closed {
                &DEEDS[..WITHOUT_DEVICE]
            } else {
                &DEEDS
            };
            let mut number = self.random.below(deeds.iter().map(|deed| deed.1).sum());
            let deed = deeds.iter().position(|deed| {
                let found = number < deed.1;
                number = number.wrapping_sub(deed.1);
                found
            });
            let deed = deed.unwrap();
            mine.deed.store(deed as u64, Relaxed);
            if self.step(DEEDS[deed].0) {
                self.board.done[deed].fetch_add(1, Relaxed);
            }
            mine.steps.fetch_add(1, Relaxed);
        }
        if abrupt {
            // With all that it has, in the middle of what the other thread does.
            // SAFETY: always fine to call.
            unsafe { libc::_exit(0) };
        }
        self.end_heir();
        for plot in self.plots.iter().flatten() {
            plot.check_all(true);
            mine.steps.fetch_add(1, Relaxed);
        }
    }

    /// Makes a step. Returns whether there was anything to do.
    fn step(&mut self, deed: &str) -> bool {
        let i = self.random.below(PLOTS);
        // Out of the way, so that all else can be used.
        let mut plot = self.plots[i].take().unwrap();
        let did = self.step_in(deed, &mut plot);
        self.plots[i] = Some(plot);
        did
    }

    fn step_in(&mut self, deed: &str, plot: &mut Plot) -> bool {
        let did = match deed {
            "write" | "write alike" => self.write(plot, deed != "write"),
            "check" => {
                let span = plot.run(&mut self.random, Page::is_readable);
                span.inspect(|span| plot.check(*span))
            }
            "map" => Some(self.map(plot)),
            "unmap" => {
                let span = plot.any(&mut self.random);
                span.unmap();
                plot.of_mut(span).fill(Page::HOLE);
                Some(span)
            }
            "protect" => {
                let access = self.random.of(&[RW, RW, libc::PROT_READ, libc::PROT_NONE]);
                let span = plot.run(&mut self.random, Page::is_mapped);
                span.inspect(|span| {
                    span.protect(access);
                    plot.of_mut(*span)
                        .iter_mut()
                        .for_each(|page| page.access = access);
                })
            }
            "discard" => self.discard(plot),
            "free" => self.free(plot),
            "advise" | "page out" => {
                let advice = match deed {
                    "advise" => self.random.of(&[
                        libc::MADV_HUGEPAGE,
                        libc::MADV_NOHUGEPAGE,
                        MADV_COLLAPSE,
                        libc::MADV_MERGEABLE,
                        libc::MADV_UNMERGEABLE,
                        libc::MADV_COLD,
                        libc::MADV_POPULATE_READ,
                    ]),
                    _ => libc::MADV_PAGEOUT,
                };
                let span = plot.any(&mut self.random);
                // Not in holes, and not of what is in VRAM: the kernel says so.
                let _ = span.advise(advice);
                Some(span)
            }
            "move away" => self.move_away(plot),
            "renew" => {
                let advice = self
                    .random
                    .of(&[libc::MADV_HUGEPAGE, libc::MADV_NOHUGEPAGE]);
                plot.area.map_over(RW, ANONYMOUS, -1);
                plot.area.advise(advice).unwrap();
                plot.pages.fill(Page::NEW);
                Some(*plot.area)
            }
            "fork" => self.fork(plot),
            "exec" => {
                exec();
                Some(plot.area.page(0))
            }
            "execute" => self.execute(plot),
            _ => self.device_step(deed, plot),
        };
        did.inspect(|span| plot.tell(deed, *span)).is_some()
    }

    fn write(&mut self, plot: &mut Plot, alike: bool) -> Option<Span> {
        let span = plot.run(&mut self.random, Page::is_writable)?;
        let (seed, first) = (self.fresh(), self.random.below(1 << 20));
        for i in 0..span.pages {
            let index = if alike { first } else { first + i };
            pattern(span.page(i).addr, index, 1).fill(seed);
            plot.of_mut(span)[i].holds = Holds::Pattern(seed, index);
        }
        if alike {
            let _ = span.advise(libc::MADV_MERGEABLE);
        }
        Some(span)
    }

    fn map(&mut self, plot: &mut Plot) -> Span {
        let span = plot.any(&mut self.random);
        let mut page = Page::NEW;
        match self.random.below(4) {
            0 => {
                span.map_over(RW, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1);
                page.kind = Kind::Shared;
            }
            1 => {
                span.map_over(RW, libc::MAP_PRIVATE, self.backing.as_raw_fd());
                page.kind = Kind::File(0);
            }
            _ => span.map_over(RW, ANONYMOUS, -1),
        }
        for (i, place) in plot.of_mut(span).iter_mut().enumerate() {
            if let Kind::File(index) = &mut page.kind {
                *index = i;
                page.holds = Holds::Pattern(IN_FILE, i);
            }
            *place = page;
        }
        span
    }

    fn discard(&mut self, plot: &mut Plot) -> Option<Span> {
        let span = plot.run(&mut self.random, Page::is_mapped)?;
        span.advise(libc::MADV_DONTNEED).unwrap();
        for page in plot.of_mut(span) {
            match page.kind {
                Kind::Private => page.holds = Holds::Zero,
                Kind::File(index) => page.holds = Holds::Pattern(IN_FILE, index),
                _ => (),
            }
        }
        Some(span)
    }

    fn free(&mut self, plot: &mut Plot) -> Option<Span> {
        let span = plot.run(&mut self.random, |page| page.kind == Kind::Private)?;
        span.advise(libc::MADV_FREE).unwrap();
        for page in plot.of_mut(span) {
            if let Holds::Pattern(seed, index) = page.holds {
                page.holds = Holds::Freed(seed, index);
            }
        }
        Some(span)
    }

    fn move_away(&mut self, plot: &mut Plot) -> Option<Span> {
        let span = plot.run(&mut self.random, Page::is_mapped)?;
        let span = plot.mapping(span);
        let (first, to) = (plot.first(span), self.random.below(PAGES - span.pages + 1));
        if first.abs_diff(to) < span.pages {
            return None;
        }
        let private = plot.of(span).iter().all(|page| page.kind == Kind::Private);
        let stays = private && self.random.once_in(3);
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        let flags = flags | if stays { libc::MREMAP_DONTUNMAP } else { 0 };
        let (from, bytes) = (span.addr as *mut libc::c_void, span.bytes());
        let place = plot.area.part(to, span.pages);
        let new = place.addr as *mut libc::c_void;
        // SAFETY: both are this thread's own.
        let moved = unsafe { libc::mremap(from, bytes, bytes, flags, new) };
        assert_eq!(moved, new, "{}", last_errno());
        let pages = plot.of(span).to_vec();
        for page in plot.of_mut(span) {
            match stays {
                true => page.holds = Holds::Zero,
                false => *page = Page::HOLE,
            }
        }
        plot.of_mut(place).copy_from_slice(&pages);
        plot.tell("to", place);
        Some(span)
    }

    fn end_heir(&mut self) {
        if let Some(mut heir) = self.heir.take() {
            heir.send(0);
            heir.finish();
        }
    }

    /// A child is born, or the one that there is goes on to its end: it has what was here at its birth, whatever became of it since.
    fn fork(&mut self, plot: &mut Plot) -> Option<Span> {
        if self.heir.is_some() {
            self.end_heir();
            return Some(plot.area.page(0));
        }
        let mut written = plot.run(&mut self.random, |page| {
            page.is_writable() && page.kind != Kind::Shared
        })?;
        written = written.part(0, written.pages.min(32));
        let device = self.devices[0].as_ref();
        self.heir = Some(Child::fork(|link| {
            // It goes with this one if that ends in no good order.
            // SAFETY: always fine to call.
            errno(unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) }).unwrap();
            link.receive();
            plot.check_all(false);
            pattern(written.addr, 0, written.pages).fill(OF_HEIR);
            for (i, page) in plot.of_mut(written).iter_mut().enumerate() {
                page.holds = Holds::Pattern(OF_HEIR, i);
            }
            plot.check_all(false);
            if let Some(device) = device {
                let refused = device.describe().unwrap_err();
                assert_eq!(refused.errno(), Some(Errno::PERM));
            }
        }));
        Some(written)
    }

    fn device_step(&mut self, deed: &str, plot: &mut Plot) -> Option<Span> {
        let which = self.random.below(2);
        let policy = self.random.of(&[MAP, MIGRATE, MIGRATE]);
        self.device(which)?;
        let device = self.devices[which].take()?;
        let done = self.with_device(deed, plot, &device, policy);
        if deed != "reopen" {
            self.devices[which] = Some(device);
        }
        let (span, answer, allowed) = done?;
        self.went(which, answer, allowed).then_some(span)
    }

    /// Has a device do something. Returns where, how that ended, and what it may have failed with besides what any may.
    fn with_device(
        &mut self,
        deed: &str,
        plot: &mut Plot,
        device: &Device,
        policy: u32,
    ) -> Option<(Span, Result<(), Errno>, Option<Errno>)> {
        Some(match deed {
            "device write" => {
                let span = plot.run(&mut self.random, Page::is_writable)?;
                let (seed, first) = (self.fresh(), self.random.below(1 << 20));
                let words = pattern(span.addr, first, span.pages).pattern(seed);
                let ended = write(device, span.addr, bytemuck::cast_slice(&words), policy);
                assert_eq!(ended.done % PAGE, 0, "{ended:x?}");
                for (i, page) in plot.of_mut(span)[..ended.done / PAGE]
                    .iter_mut()
                    .enumerate()
                {
                    page.holds = Holds::Pattern(seed, first + i);
                }
                (span, ended.result, None)
            }
            "device check" => {
                let policy = self.random.of(&[policy, policy, policy, NONE]);
                let span = plot.run(&mut self.random, Page::is_readable)?;
                let mut words = vec![0x5a5a_5a5a_5a5a_5a5a_u64; span.bytes() / 8];
                let ended = read(
                    device,
                    span.addr,
                    bytemuck::cast_slice_mut(&mut words),
                    policy,
                );
                plot.verify("the device", span, &words[..ended.done / 8]);
                (span, ended.result, (policy == NONE).then_some(Errno::AGAIN))
            }
            "device copy" => {
                let from = plot.run(&mut self.random, Page::is_readable)?;
                let to = plot.run(&mut self.random, Page::is_writable)?;
                let pages = from.pages.min(to.pages);
                let (from, to) = (from.part(0, pages), to.part(0, pages));
                if from.addr.abs_diff(to.addr) < from.bytes() {
                    return None;
                }
                let ended = copy(device, from.addr, to.addr, from.bytes(), policy);
                assert_eq!(ended.done % PAGE, 0, "{ended:x?}");
                let holds: Vec<Holds> = plot.of(from).iter().map(|page| page.holds).collect();
                for (page, holds) in plot.of_mut(to).iter_mut().zip(&holds[..ended.done / PAGE]) {
                    page.holds = *holds;
                }
                (to, ended.result, None)
            }
            "device hole" => {
                let span = plot.run(&mut self.random, |page| !page.is_readable())?;
                let ended = read(device, span.addr, &mut [0; 64], policy);
                let expected = match plot.of(span)[0].kind {
                    Kind::Hole => Errno::FAULT,
                    _ => Errno::ACCESS,
                };
                let answer = match ended.result {
                    Err(error) if error == expected => Ok(()),
                    Ok(()) => panic!("the device reads there: {:#?}", plot.story),
                    other => other,
                };
                (span, answer, None)
            }
            "atomic" => {
                let span = plot.run(&mut self.random, |page| {
                    page.is_writable() && !matches!(page.holds, Holds::Freed(..))
                })?;
                (
                    span.page(0),
                    self.atomic(device, plot, span.page(0), policy),
                    None,
                )
            }
            "fault" => {
                let span = plot.any(&mut self.random);
                (span, self.fault(device, plot, span, policy), None)
            }
            "advice" => {
                let span = plot.run(&mut self.random, Page::is_mapped)?;
                let advice = self.random.of(&[
                    Advice::Reset,
                    Advice::Reset,
                    Advice::Location(Some(Target::System)),
                    Advice::Location(Some(Target::Device)),
                    Advice::ReadMostly(true),
                    Advice::NoMigrate(true),
                    Advice::Granularity(Some(16 * PAGE)),
                ]);
                let answer = device.advise_range(span.addr, span.bytes(), advice);
                let answer = answer.map_err(|error| error.errno().unwrap());
                (span, answer, Some(Errno::TOOBIG))
            }
            "migrate" | "migrate others" => {
                let target = self
                    .random
                    .of(&[Target::Device, Target::Device, Target::System]);
                let span = if deed == "migrate" {
                    plot.any(&mut self.random)
                } else {
                    let whole = self.random.of(self.everyone);
                    let first = self.random.below(PAGES);
                    let most = self.random.of(&[16, HUGE, PAGES]).min(PAGES - first);
                    whole.part(first, 1 + self.random.below(most))
                };
                let moved = device.prefetch_range(span.addr, span.bytes(), target);
                let answer = moved.map(drop).map_err(|error| error.errno().unwrap());
                // If nothing is mapped there.
                let is_there =
                    deed == "migrate" && plot.of(span).iter().any(|page| page.is_mapped());
                let told = if deed == "migrate" {
                    span
                } else {
                    plot.area.page(0)
                };
                (told, answer, (!is_there).then_some(Errno::FAULT))
            }
            // It goes on by itself, whatever becomes of the memory, the file and the process.
            "queue" => {
                let span = plot.any(&mut self.random);
                let target = self.random.of(&[Target::Device, Target::System]);
                let queued = device.prefetch_range_async(span.addr, span.bytes(), target);
                let answer = queued.map(drop).map_err(|error| error.errno().unwrap());
                (span, answer, Some(Errno::AGAIN))
            }
            "residency" => {
                let span = plot.any(&mut self.random);
                let answer = device.residency_range(span.addr, span.bytes());
                let answer = answer.map_err(|error| error.errno().unwrap());
                let answer = answer.map(|residency| {
                    for (seen, page) in residency.pages().iter().zip(plot.of(span)) {
                        let nothing = !page.is_readable();
                        assert!(
                            !nothing || seen.place() == Place::None,
                            "{seen:?}, {page:?}"
                        );
                    }
                });
                (span, answer, None)
            }
            "snapshot" => {
                let span = plot.any(&mut self.random);
                let answer = try_snapshot(device, span).map(|all| {
                    for (i, (seen, page)) in all.iter().zip(plot.of(span)).enumerate() {
                        let fits = page.is_readable() || !seen.is_valid();
                        assert!(
                            seen.is_possible() && fits,
                            "page {i} of {span:x?}: {seen:?}, {page:?}"
                        );
                    }
                });
                (span, answer, None)
            }
            "describe" => {
                let describe = || {
                    device.describe()?;
                    device.counters()?;
                    device.mirror()
                };
                let answer = describe().map(drop).map_err(|error| error.errno().unwrap());
                (plot.area.page(0), answer, None)
            }
            // It is closed.
            _ => (plot.area.page(0), Ok(()), None),
        })
    }

    /// The device adds to a word, and the CPU takes that away again.
    fn atomic(
        &mut self,
        device: &Device,
        plot: &Plot,
        page: Span,
        policy: u32,
    ) -> Result<(), Errno> {
        let known = plot.of(page)[0];
        let index = self.random.below(PAGE / 8);
        let was = match known.holds {
            Holds::Pattern(seed, first) => pattern(0, first, 1).pattern(seed)[index],
            _ => 0,
        };
        let addend = self.random.next();
        let addr = page.addr + 8 * index;
        let ended = atomic(device, addr, 8, HMM_GPU_ATOMIC_ADD, addend, policy);
        if known.kind == Kind::Shared {
            let refused = ended.result.unwrap_err();
            return match refused {
                Errno::OPNOTSUPP => Ok(()),
                error => Err(error),
            };
        }
        let old = ended.result?;
        assert_eq!(old, was, "{addr:#x}, {known:x?}, {:#?}", plot.story);
        let word = addr as *mut u64;
        // SAFETY: the page is this thread's, and can be read.
        let found = unsafe { word.read_volatile() };
        assert_eq!(found, was.wrapping_add(addend), "{addr:#x}, {known:x?}");
        // SAFETY: the same, and it can be written.
        unsafe { word.write_volatile(was) };
        Ok(())
    }

    fn fault(
        &mut self,
        device: &Device,
        plot: &Plot,
        span: Span,
        policy: u32,
    ) -> Result<(), Errno> {
        let access = |random: &mut Random| random.of(&[READ, READ, WRITE]);
        let pages = span.pages.min(64);
        let order = self.random.order(pages);
        let mut faults: Vec<_> = order
            .iter()
            .map(|&page| wants(span.page(page).addr + 8, access(&mut self.random)))
            .collect();
        let (answer, _) = try_fault(device, &mut faults, policy);
        answer?;
        for (fault, page) in faults.iter().zip(&order) {
            let page = plot.of(span)[*page];
            let expected = if !page.is_mapped() {
                Errno::FAULT
            } else if !page.is_readable() || (fault.access == WRITE && !page.is_writable()) {
                Errno::ACCESS
            } else {
                // It is mapped, if nothing is in the way.
                let may = [Errno::BUSY, Errno::NOMEM, Errno::NOSPC].map(Errno::raw_os_error);
                let good = fault.status == 0 || may.contains(&(fault.status as i32));
                assert!(good, "{fault:x?}, {page:?}, {:#?}", plot.story);
                continue;
            };
            // What changes around it may keep the driver from looking.
            let may = [expected, Errno::BUSY, Errno::NOMEM, Errno::NOSPC];
            let may = may.map(Errno::raw_os_error);
            let good = may.contains(&(fault.status as i32));
            assert!(good, "{fault:x?}, {page:?}, {:#?}", plot.story);
        }
        Ok(())
    }
}

/// A child that becomes another program.
fn exec() {
    // SAFETY: the child makes two system calls at most.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let arguments = [c"true".as_ptr(), std::ptr::null()];
        // SAFETY: C strings, and the end of the list.
        unsafe { libc::execv(c"/bin/true".as_ptr(), arguments.as_ptr()) };
        // SAFETY: it ends the child.
        unsafe { libc::_exit(1) };
    }
    let mut status = 0;
    // SAFETY: it waits for the child just made.
    errno(unsafe { libc::waitpid(child, &raw mut status, 0) }).unwrap();
    assert_eq!(status, 0);
}

/// One of the processes: until it is told to end, and then at once, or in good order.
fn process(board: &'static Board, process: usize, seed: u64, abrupt: bool) {
    let plots: Vec<Vec<Plot>> = (0..THREADS)
        .map(|_| (0..PLOTS).map(|_| Plot::new()).collect())
        .collect();
    pool::survive_sigbus();
    let everyone: Vec<Span> = plots.iter().flatten().map(|plot| *plot.area).collect();
    std::thread::scope(|scope| {
        for (thread, plots) in plots.into_iter().enumerate() {
            let everyone = &everyone;
            scope.spawn(move || {
                let mut worker = Worker {
                    board,
                    process,
                    thread,
                    random: Random::new(mix(seed ^ thread as u64)),
                    devices: [None, None],
                    clients: [None, None],
                    everyone,
                    plots: plots.into_iter().map(Some).collect(),
                    written: 0,
                    backing: file(PAGES, IN_FILE),
                    heir: None,
                };
                if catch_unwind(AssertUnwindSafe(|| worker.run(abrupt))).is_err() {
                    // At once: who is killed meanwhile would not tell.
                    // SAFETY: always fine to call.
                    unsafe { libc::_exit(101) };
                }
            });
        }
    });
}

/// Who starts and ends the processes, and has the machine do this and that.
struct Host {
    board: &'static Board,
    random: Random,
    processes: Vec<Option<Child>>,
    seed: u64,
    started: u64,
}

impl Host {
    fn start(&mut self, number: usize) {
        self.started += 1;
        let (board, seed) = (self.board, mix(self.seed ^ (self.started << 8)));
        board.orders[number].store(GO_ON, Relaxed);
        let abrupt = self.random.once_in(3);
        let child = Child::fork(|_| process(board, number, seed, abrupt));
        self.processes[number] = Some(child);
        board.alive[number].store(true, Relaxed);
    }

    /// Ends a process, in one way or another.
    fn end(&mut self, number: usize) {
        let Some(child) = self.processes[number].take() else {
            return;
        };
        if self.random.once_in(4) {
            child.kill();
        } else {
            self.board.orders[number].store(END, Relaxed);
            child.finish();
        }
        self.board.alive[number].store(false, Relaxed);
    }

    /// Asserts that no process has ended by itself.
    fn look(&mut self) {
        for child in self.processes.iter_mut().flatten() {
            child.still_runs();
        }
    }

    fn step(&mut self, driver: &mut Driver) {
        let random = &mut self.random;
        match random.below(40) {
            0 => fs::write("/proc/sys/vm/compact_memory", "1").unwrap(),
            1 | 2 => ksm("run", random.of(&["1", "1", "1", "2", "0"])),
            3..=9 => {
                let step = random.of(&FAILURES);
                fail(step, 1 + random.below(300));
            }
            10 | 11 => {
                let number = random.below(PROCESSES);
                self.end(number);
                self.start(number);
            }
            12 | 13 if is_bound(GPU) => driver.unbind(GPU),
            12..=14 if !is_bound(GPU) => drop(driver.bind(GPU)),
            _ => (),
        }
    }

    /// Has everybody go on for a while.
    fn run(&mut self, driver: &mut Driver, time: Duration) {
        let begin = Instant::now();
        for number in 0..PROCESSES {
            self.start(number);
        }
        while begin.elapsed() < time {
            self.look();
            self.step(driver);
            self.board.host.steps.fetch_add(1, Relaxed);
            std::thread::sleep(Duration::from_millis(25));
        }
        FAILURES.iter().for_each(|step| fail(step, 0));
        ksm("run", "2");
        ksm("run", "0");
    }
}

const FAILURES: [&str; 4] = [
    "device_allocation",
    "system_allocation",
    "copy",
    "insertion",
];

/// Has the n-th step of a kind fail.
fn fail(step: &str, n: usize) {
    let path = format!("/sys/kernel/debug/hmm_gpu/fail_{step}");
    fs::write(path, n.to_string()).unwrap();
}

fn ksm(file: &str, text: &str) {
    fs::write(format!("/sys/kernel/mm/ksm/{file}"), text).unwrap();
}

/// Catches what no test was written for: a byte that is lost, stale or another's, a wait for ever, a page that is left, in any order of
/// whatever the kernel and the driver can do to memory.
#[test]
fn whatever_happens_every_byte_is_where_it_belongs() {
    let time = asked_seconds().unwrap_or(Duration::from_secs(120));
    let swap = Swap::on();
    let mut driver = Driver::load("soft=1 soft_mib=12 fault_around=64 bounce_ms=20");
    let soft = Device::open(0).unwrap();
    drop(driver.bind(GPU));
    ksm("pages_to_scan", "2000");
    ksm("sleep_millisecs", "20");
    let seed = seed(0x57e55);
    let mut host = Host {
        board: Board::new(),
        random: Random::new(seed),
        processes: (0..PROCESSES).map(|_| None).collect(),
        seed,
        started: 0,
    };
    let board = host.board;
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| watch(board, &stop));
        let _stop = Stop(&stop);
        host.run(&mut driver, time * 4 / 5);
        (0..PROCESSES).for_each(|number| host.end(number));
        if !is_bound(GPU) {
            drop(driver.bind(GPU));
        }
        let work = assert_empty(&soft);
        assert!(work.pressure_pages > 1000, "{work:#?}");
        assert_empty(&Device::open(GPU_UNIT as u32).unwrap());
        drop(soft);

        // The module goes while they run, as soon as they have let go of its nodes.
        host.run(&mut driver, time / 5);
        for order in &board.orders {
            order.store(CLOSE, Relaxed);
        }
        let begin = Instant::now();
        while let Err(error) = driver.try_remove() {
            assert_eq!(error, Errno::AGAIN);
            assert!(begin.elapsed() < patience(TOO_LONG), "it stays in use");
            host.look();
            board.host.steps.fetch_add(1, Relaxed);
            std::thread::sleep(Duration::from_millis(5));
        }
        std::thread::sleep(Duration::from_secs(2));
        for (number, child) in host.processes.iter_mut().enumerate() {
            board.orders[number].store(END, Relaxed);
            child.take().unwrap().finish();
            board.alive[number].store(false, Relaxed);
        }
    });
    let mut report = format!("{} processes", host.started);
    for ((deed, _), done) in DEEDS.iter().zip(&board.done) {
        report += &format!(", {deed}: {}", done.load(Relaxed));
    }
    say(&report);
    // The checking kernel does a fraction of it in the time, and who asks for little gets little.
    let enough = if is_checking() || asked_seconds().is_some() {
        0
    } else {
        1
    };
    for ((deed, _), done) in DEEDS.iter().zip(&board.done) {
        assert!(done.load(Relaxed) >= enough, "{deed} was hardly ever done");
    }
    driver.finish();
    drop(swap);
}
