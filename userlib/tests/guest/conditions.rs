//! Every kernel that is shipped, with every strategy, wherever its data lies and whatever goes on meanwhile.
//!
//! Runs in the virtual GPU host: `bench/test guest_conditions`. Lavapipe is the Vulkan device.

use std::sync::atomic::{AtomicBool, Ordering};

use hmm_gpu::{Args, Device, Errno, Shipped, Strategy, SvmContext, Target};

use crate::common::child::Child;
use crate::common::driver::Driver;
use crate::common::kernels::{cache, translated};
use crate::common::memory::{Area, Span, PAGE};
use crate::common::random::mix;
use crate::common::{is_checking, places, refused, to_device, to_system, Stop};

const MIB: usize = 1 << 20;
/// Lists that are walked, and keys that are looked for.
const MANY: usize = 64;

/// Where the data is, or what goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Condition {
    /// In system memory.
    Cold,
    /// In VRAM.
    Prefetched,
    /// Of four times the VRAM.
    FourTimes,
    /// The CPU writes to other pages.
    Busy,
    /// A forked child has the same pages, and keeps what is in them.
    Forked,
}

use Condition::{Busy, Cold, Forked, FourTimes, Prefetched};

const CONDITIONS: [Condition; 5] = [Cold, Prefetched, FourTimes, Busy, Forked];
/// Those that run under every condition.
const FIRST: [Shipped; 2] = [Shipped::Saxpy, Shipped::List];
/// Those that run under each once, each time with another strategy. The order says which: all words of four times the VRAM take long where
/// each is translated, which `Saxpy` does already.
const REST: [Shipped; 5] = [
    Shipped::Histogram,
    Shipped::Reduce,
    Shipped::Tree,
    Shipped::Gather,
    Shipped::Bfs,
];

/// A kernel, and its data: a part of it on each page.
struct Work {
    kernel: Shipped,
    data: Area,
    asked: Area,
    answers: Area,
    times: usize,
}

/// The values that are in a span.
#[allow(clippy::mut_from_ref)]
fn values<T: bytemuck::Pod>(span: &Area) -> &mut [T] {
    // SAFETY: the area is page aligned and a test's own, which has one such slice of it at a time.
    unsafe { std::slice::from_raw_parts_mut(span.addr as *mut T, span.bytes() / size_of::<T>()) }
}

/// A number for each place, and nothing else.
fn number(place: usize) -> u64 {
    mix(place as u64 + 1)
}

impl Work {
    fn new(kernel: Shipped, pages: usize) -> Self {
        let work = Self {
            kernel,
            data: Area::new(pages),
            asked: Area::new(pages.div_ceil(PAGE / 8).max(2)),
            answers: Area::new(2),
            times: 0,
        };
        match kernel {
            Shipped::Saxpy => {
                let (x, y) = work.arrays();
                x.iter_mut()
                    .enumerate()
                    .for_each(|(i, x)| *x = (i % 1000) as f32);
                y.iter_mut()
                    .enumerate()
                    .for_each(|(i, y)| *y = (i % 777) as f32);
            }
            Shipped::List => work.link(),
            Shipped::Tree => work.grow(),
            Shipped::Bfs => work.connect(),
            _ => {
                let words = values::<u32>(&work.data).iter_mut().enumerate();
                words.for_each(|(i, word)| *word = number(i) as u32);
                let index = values::<u32>(&work.asked).iter_mut().enumerate();
                let count = work.data.bytes() / 4;
                index.for_each(|(i, at)| *at = (number(i) % (count as u64 + 2)) as u32);
            }
        }
        work
    }

    fn spans(&self) -> [Span; 3] {
        [*self.data, *self.asked, *self.answers]
    }

    #[allow(clippy::mut_from_ref)]
    fn arrays(&self) -> (&mut [f32], &mut [f32]) {
        let all = values::<f32>(&self.data);
        let half = all.len() / 2;
        all.split_at_mut(half)
    }

    /// Where the node of a page is: not at the same place of each.
    fn node(&self, page: usize) -> usize {
        self.data.page(page).addr + page * 48 % 2048
    }

    /// The words of the node of a page.
    #[allow(clippy::mut_from_ref)]
    fn words(&self, page: usize) -> &mut [u64] {
        let at = (self.node(page) - self.data.addr) / 8;
        &mut values::<u64>(&self.data)[at..at + 8]
    }

    /// Lists that go through all pages, a link on each: `{ next, value }`.
    fn link(&self) {
        for page in 0..self.data.pages {
            let next = page + MANY;
            let next = if next < self.data.pages {
                self.node(next)
            } else {
                0
            };
            self.words(page)[..2].copy_from_slice(&[next as u64, number(page)]);
        }
        for list in 0..MANY {
            values::<u64>(&self.asked)[list] = self.node(list) as u64;
        }
    }

    /// A tree with a leaf on each page: `{ left, right, key, value }`. Every other key that is looked for is in it.
    fn grow(&self) {
        for page in 0..self.data.pages {
            let key = number(page) | 1;
            self.words(page)[..4].copy_from_slice(&[0, 0, key, page as u64]);
            if page > 0 {
                self.hang(page, key);
            }
        }
        for i in 0..MANY {
            let key = number(i * 13 % self.data.pages) | 1;
            values::<u64>(&self.asked)[i] = key & !u64::from(i % 2 == 1);
        }
    }

    /// Hangs the leaf of a page to the tree.
    fn hang(&self, page: usize, key: u64) {
        let mut at = 0;
        loop {
            let side = usize::from(key >= self.words(at)[2]);
            let next = self.words(at)[side] as usize;
            if next == 0 {
                self.words(at)[side] = self.node(page) as u64;
                return;
            }
            at = (next - self.data.addr) / PAGE;
        }
    }

    /// A graph with a node on each page, `{ neighbours, degree, level }`, and its neighbours beside it: those of a heap.
    fn connect(&self) {
        for page in 0..self.data.pages {
            let up = (page > 0).then(|| (page - 1) / 2);
            let down = [2 * page + 1, 2 * page + 2];
            let of = up
                .into_iter()
                .chain(down)
                .filter(|of| *of < self.data.pages);
            let of: Vec<u64> = of.map(|of| self.node(of) as u64).collect();
            let words = self.words(page);
            words[..2].copy_from_slice(&[self.node(page) as u64 + 32, of.len() as u64]);
            words[4..4 + of.len()].copy_from_slice(&of);
            values::<u64>(&self.asked)[page] = self.node(page) as u64;
        }
    }

    /// Runs it once more, and compares all that it answers with what the CPU makes of the data.
    fn run(&mut self, context: &SvmContext, what: &str) {
        self.times += 1;
        let pages = self.data.pages;
        match self.kernel {
            Shipped::Saxpy => {
                let (x, y) = self.arrays();
                context.saxpy(3.0, x, y).unwrap();
                for (i, y) in y.iter().enumerate() {
                    let expected = (3 * self.times * (i % 1000) + i % 777) as f32;
                    assert_eq!(*y, expected, "{what}: element {i}");
                }
            }
            Shipped::List => {
                let args = Args::new()
                    .read(&values::<u64>(&self.asked)[..MANY])
                    .write(&mut values::<u64>(&self.answers)[..MANY])
                    .value(MANY as u64);
                self.dispatch(context, args.reach(&*values::<u8>(&self.data)), MANY);
                for list in 0..MANY {
                    let sum = (list..pages).step_by(MANY).map(number);
                    let sum = sum.fold(0, u64::wrapping_add);
                    assert_eq!(
                        values::<u64>(&self.answers)[list],
                        sum,
                        "{what}: list {list}"
                    );
                }
            }
            Shipped::Reduce => {
                let words = values::<u32>(&self.data);
                let sum: u64 = words.iter().map(|word| u64::from(*word)).sum();
                assert_eq!(context.sum(words).unwrap().0, sum, "{what}");
            }
            Shipped::Histogram => {
                let words = values::<u32>(&self.data);
                let counts = values::<[u32; 256]>(&self.answers);
                counts[0].fill(self.times as u32);
                let mut expected = counts[0];
                words
                    .iter()
                    .for_each(|word| expected[(word & 255) as usize] += 1);
                context.histogram(words, &mut counts[0]).unwrap();
                assert_eq!(counts[0], expected, "{what}");
            }
            Shipped::Gather => {
                let (words, index) = (values::<u32>(&self.data), values::<u32>(&self.asked));
                let to = &mut values::<u32>(&self.answers)[..PAGE / 4];
                context.gather(words, &index[..to.len()], to).unwrap();
                for (i, to) in to.iter().enumerate() {
                    let expected = words.get(index[i] as usize).copied().unwrap_or(0);
                    assert_eq!(*to, expected, "{what}: element {i}");
                }
            }
            Shipped::Tree => {
                let (keys, found) = (values::<u64>(&self.asked), values::<u64>(&self.answers));
                let args = Args::new()
                    .pointer(self.node(0) as *const u64)
                    .read(&keys[..MANY])
                    .write(&mut found[..MANY])
                    .value(MANY as u64);
                self.dispatch(context, args.reach(&*values::<u8>(&self.data)), MANY);
                for (i, found) in found.iter().enumerate().take(MANY) {
                    let there = (i * 13 % pages) as u64;
                    let expected = if i % 2 == 1 { u64::MAX } else { there };
                    assert_eq!(*found, expected, "{what}: key {i}");
                }
            }
            _ => self.search(context, what),
        }
    }

    /// From the first node, a dispatch for each level.
    fn search(&self, context: &SvmContext, what: &str) {
        let pages = self.data.pages;
        // The upper half of a word.
        let level = |page: usize| self.words(page)[1] >> 32;
        for page in 0..pages {
            let to = if page == 0 { 0 } else { u64::from(u32::MAX) };
            let word = &mut self.words(page)[1];
            *word = (*word & u64::from(u32::MAX)) | (to << 32);
        }
        for step in 1_u32.. {
            let reached = &mut values::<u32>(&self.answers)[..1];
            reached[0] = 0;
            let args = Args::new()
                .read(&values::<u64>(&self.asked)[..pages])
                .write(reached)
                .value(pages as u64)
                .value(step);
            self.dispatch(context, args.reach_mut(values::<u8>(&self.data)), pages);
            if values::<u32>(&self.answers)[0] == 0 {
                break;
            }
        }
        for page in 0..pages {
            assert_eq!(
                level(page),
                u64::from((page + 1).ilog2()),
                "{what}: node {page}"
            );
        }
    }

    fn dispatch(&self, context: &SvmContext, args: Args<'_>, items: usize) {
        let kernel = context.kernel(self.kernel).unwrap();
        let groups = kernel.groups(items, 1).unwrap();
        // SAFETY: the data is what the kernel takes it for, named, and this test's own.
        unsafe { context.dispatch(&kernel, args, groups) }.unwrap();
    }

    /// What all of it comes to.
    fn digest(&self) -> u64 {
        let all = [&self.data, &self.asked, &self.answers];
        let words = all.into_iter().flat_map(|area| values::<u64>(area).iter());
        words.fold(7, |digest, word| mix(digest ^ word))
    }
}

/// A strategy, with a device of which the VRAM has room for the data, and one that has room for a quarter of it.
struct Way {
    strategy: Strategy,
    roomy: (SvmContext, Option<Device>),
    tight: Option<(SvmContext, Option<Device>)>,
}

impl Way {
    fn new(strategy: Strategy) -> Self {
        let [roomy, tight] = [0, 1].map(|unit| Device::open(unit).unwrap());
        if strategy == Strategy::Translated {
            return Self {
                strategy,
                roomy: (translated(roomy, 16), None),
                tight: Some((translated(tight, 2), None)),
            };
        }
        let context = SvmContext::builder().strategy(strategy).build().unwrap();
        Self {
            strategy,
            roomy: (context, Some(roomy)),
            tight: None,
        }
    }

    fn run(&self, kernel: Shipped, condition: Condition, other: &Device) {
        let what = format!("{kernel:?}, {}, {condition:?}", self.strategy);
        let began = std::time::Instant::now();
        let is_large = condition == FourTimes;
        let pages = if is_large { 4 * 2 * MIB / PAGE } else { 96 };
        let (context, own) = match &self.tight {
            Some(tight) if is_large => tight,
            _ => &self.roomy,
        };
        let device = match (own, context.driver()) {
            _ if is_large && own.is_some() => other,
            (Some(own), _) => own,
            (None, of_context) => of_context.unwrap(),
        };
        let mut work = Work::new(kernel, pages);
        match condition {
            Prefetched => work.spans().iter().for_each(|span| {
                to_device(device, *span);
            }),
            FourTimes => {
                let span = *work.data;
                let all = device.prefetch_range(span.addr, span.bytes(), Target::Device);
                // It brings as much as there is room for.
                assert_eq!(refused(all), Errno::NOSPC, "{what}");
                let there = places(device, span).counts().device;
                assert!(
                    (1..=span.pages / 4).contains(&there),
                    "{what}: {there} pages"
                );
            }
            _ => work.spans().iter().for_each(|span| {
                to_system(device, *span);
            }),
        }
        match condition {
            Busy => busy(|| work.run(context, &what)),
            Forked => {
                let digest = work.digest();
                let mut child = Child::fork(|link| {
                    link.receive();
                    assert_eq!(work.digest(), digest);
                });
                work.run(context, &what);
                child.send(0);
                child.finish();
            }
            _ => work.run(context, &what),
        }
        // Once more, on what it has left.
        work.run(context, &what);
        println!("{what}: {:?}", began.elapsed());
    }
}

/// Does something while the CPU writes to pages of its own, each of which is as it was left.
fn busy(work: impl FnOnce()) {
    let (others, stop) = (Area::new(100), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for round in 0.. {
                others.fill(round);
                others.check(round);
                if stop.load(Ordering::Relaxed) {
                    return;
                }
            }
        });
        let _stop = Stop(&stop);
        work();
    });
}

/// Catches a strategy that is right only where data lies in system memory, or fits, or is nobody else's; and kernels that are.
#[test]
fn every_kernel_is_right_with_every_strategy_under_every_condition() {
    cache();
    let driver = Driver::load("soft=2 soft_mib=32");
    let other = Device::open(1).unwrap();
    other.create_pool(2 * MIB).unwrap();
    for (number, strategy) in Strategy::ALL.into_iter().enumerate() {
        // Of the others the driver sees no more than the CPU's touches.
        if is_checking() && ![Strategy::Translated, Strategy::Native].contains(&strategy) {
            continue;
        }
        let way = Way::new(strategy);
        for (place, condition) in CONDITIONS.into_iter().enumerate() {
            for (at, kernel) in FIRST.into_iter().enumerate() {
                // On the checking kernel each with a strategy once.
                if !is_checking() || (at + number) % CONDITIONS.len() == place {
                    way.run(kernel, condition, &other);
                }
            }
            for (at, kernel) in REST.into_iter().enumerate() {
                if (at + number) % CONDITIONS.len() == place {
                    way.run(kernel, condition, &other);
                }
            }
        }
        if strategy == Strategy::Translated {
            let device = way.roomy.0.driver().unwrap();
            assert!(device.own_counters().unwrap().faults_in_device > 0);
        }
    }
    drop(other);
    driver.finish();
}
