//! Data for kernels, what they must make of it, and contexts to run them in.

use std::sync::{Mutex, MutexGuard, PoisonError};

use hmm_gpu::{Args, DispatchStats, Error, Graph, Kernel, Link, Shipped, Strategy, SvmContext};

use crate::software::Software;

/// Whether there is a Vulkan device. If there is none, that is a failure, unless it was said that there is none.
pub(crate) fn has_vulkan() -> bool {
    let doctor = hmm_gpu::doctor();
    let found = doctor
        .devices
        .as_ref()
        .is_ok_and(|devices| !devices.is_empty());
    if !found && std::env::var_os("HMM_GPU_WITHOUT_VULKAN").is_some() {
        println!("left out: {doctor}");
        return false;
    }
    assert!(found, "{doctor}");
    true
}

/// One test at a time: a device of threads shows more of itself to tests that have it to themselves.
pub(crate) fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A context for each strategy, the translated one with a pool of so many pages.
pub(crate) fn contexts(pages: usize) -> Vec<SvmContext> {
    if !has_vulkan() {
        return Vec::new();
    }
    strategies()
        .into_iter()
        .map(|strategy| context(strategy, pages))
        .collect()
}

/// The strategies that the device has: of one that was asked for, all but what is lavapipe's. Says so, if one is left out.
pub(crate) fn strategies() -> Vec<Strategy> {
    let Some(device) = wanted() else {
        return Strategy::ALL.to_vec();
    };
    println!("left out: `native`, since HMM_GPU_VULKAN_DEVICE asks for {device}");
    let is_there = |strategy: &Strategy| *strategy != Strategy::Native;
    Strategy::ALL.into_iter().filter(is_there).collect()
}

/// The device that was asked for, by a part of its name: a real one, on a system that has no validation layers. Otherwise lavapipe.
fn wanted() -> Option<String> {
    std::env::var("HMM_GPU_VULKAN_DEVICE").ok()
}

pub(crate) fn context(strategy: Strategy, pages: usize) -> SvmContext {
    let builder = SvmContext::builder().strategy(strategy);
    let builder = match wanted() {
        Some(name) => builder.device(name),
        None => builder.validation(true),
    };
    let builder = match strategy {
        Strategy::Translated => builder.backend(Box::new(Software::new(pages))),
        _ => builder,
    };
    builder.build().unwrap()
}

/// Numbers from a seed.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(0x5851_f42d_4c95_7f2d)
            .wrapping_add(0x1405_7b7e_f767_814f);
        let mixed = self.0 ^ (self.0 >> 33);
        mixed.wrapping_mul(0xff51_afd7_ed55_8ccd) ^ (mixed >> 29)
    }

    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    pub(crate) fn words(&mut self, n: usize) -> Vec<u32> {
        (0..n).map(|_| self.next() as u32).collect()
    }
}

/// `saxpy`, every element checked. Whole numbers, so that there is one right answer.
pub(crate) fn saxpy(context: &SvmContext, n: usize) -> DispatchStats {
    let x: Vec<f32> = (0..n).map(|i| (i % 1000) as f32).collect();
    let mut y: Vec<f32> = (0..n).map(|i| (i % 777) as f32).collect();
    let stats = context.saxpy(3.0, &x, &mut y).unwrap();
    for (i, y) in y.into_iter().enumerate() {
        assert_eq!(
            y,
            3.0 * (i % 1000) as f32 + (i % 777) as f32,
            "{context}: element {i} of {n}"
        );
    }
    stats
}

/// Lists of links, each in a box of its own, and the sums of their values.
pub(crate) struct Lists {
    heads: Vec<Option<Box<Link>>>,
    expected: Vec<u64>,
}

impl Lists {
    pub(crate) fn new(lists: usize, links: usize, seed: u64) -> Self {
        let mut random = Random(seed);
        let mut heads: Vec<Option<Box<Link>>> = (0..lists).map(|_| None).collect();
        let mut expected = vec![0_u64; lists];
        for _ in 0..links {
            let at = random.below(lists);
            let value = random.next();
            expected[at] = expected[at].wrapping_add(value);
            let next = heads[at].take();
            heads[at] = Some(Box::new(Link { next, value }));
        }
        Self { heads, expected }
    }

    /// Walks them, and checks the sums.
    pub(crate) fn walk(&self, context: &SvmContext) -> DispatchStats {
        let (sums, stats) = context.sum_lists(&self.heads).unwrap();
        assert_eq!(sums, self.expected, "{context}");
        stats
    }
}

/// A tree as anyone would write it.
#[repr(C)]
pub(crate) struct Leaf {
    children: [Option<Box<Leaf>>; 2],
    key: u64,
    value: u64,
}

/// Looks up keys in a tree, half of which are in it.
pub(crate) fn tree(context: &SvmContext, n: usize) -> DispatchStats {
    let mut random = Random(5);
    let mut root: Option<Box<Leaf>> = None;
    let mut keys = Vec::new();
    let mut expected = Vec::new();
    for i in 0..n {
        let key = random.next() | 1;
        keys.extend([key, key & !1]);
        expected.extend([i as u64, u64::MAX]);
        let mut place = &mut root;
        while let Some(leaf) = place {
            place = &mut leaf.children[usize::from(key >= leaf.key)];
        }
        *place = Some(Box::new(Leaf {
            children: [None, None],
            key,
            value: i as u64,
        }));
    }
    let mut values = vec![7_u64; keys.len()];
    let kernel = context.kernel(Shipped::Tree).unwrap();
    let pointer: *const Leaf = root.as_deref().unwrap();
    let mut args = Args::new()
        .pointer(pointer)
        .read(&keys)
        .write(&mut values)
        .value(keys.len() as u64);
    let mut left = vec![root.as_deref().unwrap()];
    while let Some(leaf) = left.pop() {
        args = args.reach(leaf);
        left.extend(leaf.children.iter().filter_map(Option::as_deref));
    }
    let groups = kernel.groups(keys.len(), 1).unwrap();
    // SAFETY: a leaf is what the kernel takes it for, { left, right, key, value }, and all are borrowed.
    let stats = unsafe { context.dispatch(&kernel, args, groups) }.unwrap();
    assert_eq!(values, expected, "{context}");
    stats
}

/// A breadth-first search, compared with one of the CPU's: of a graph of which some nodes are not reached, from two of them.
pub(crate) fn bfs(context: &SvmContext, n: usize) {
    let mut random = Random(11);
    let edges: Vec<(usize, usize)> = (0..n).map(|_| (random.below(n), random.below(n))).collect();
    let mut graph = Graph::new(n, &edges).unwrap();
    for from in [0, n - 1] {
        let mut expected = vec![None; n];
        expected[from] = Some(0);
        for level in 1.. {
            let before = expected.clone();
            for &(a, b) in &edges {
                for (one, other) in [(a, b), (b, a)] {
                    if before[one] == Some(level - 1) && expected[other].is_none() {
                        expected[other] = Some(level);
                    }
                }
            }
            if before == expected {
                break;
            }
        }
        let (levels, stats) = context.breadth_first(&mut graph, from).unwrap();
        assert_eq!(levels, expected, "{context}");
        let deepest = expected.iter().flatten().max().unwrap();
        let dispatches = u64::from(deepest + 1);
        assert_eq!(stats.groups, dispatches * n.div_ceil(64) as u64, "{stats}");
    }
}

/// Counts, sums and gathers, each compared with the CPU's.
pub(crate) fn words(context: &SvmContext, n: usize) {
    let mut random = Random(7);
    let words = random.words(n);
    let mut counts = Box::new([1_u32; 256]);
    let mut expected = [1_u32; 256];
    for word in &words {
        expected[(word & 255) as usize] += 1;
    }
    context.histogram(&words, &mut counts).unwrap();
    assert_eq!(*counts, expected, "{context}");

    let sum: u64 = words.iter().map(|&word| u64::from(word)).sum();
    assert_eq!(context.sum(&words).unwrap().0, sum, "{context}");

    let index: Vec<u32> = (0..n / 3).map(|_| random.below(n + 2) as u32).collect();
    let mut to = vec![9; index.len()];
    context.gather(&words, &index, &mut to).unwrap();
    let expected: Vec<u32> = index
        .iter()
        .map(|&i| words.get(i as usize).copied().unwrap_or(0))
        .collect();
    assert_eq!(to, expected, "{context}");
}

/// A kernel made for a test, from `userlib/tests/svm/NAME.comp`.
pub(crate) fn compiled(context: &SvmContext, name: &str) -> Result<Kernel, Error> {
    let spirv = crate::shaders::compile(&format!("userlib/tests/svm/{name}.comp"));
    // SAFETY: `compile` has it checked.
    unsafe { context.kernel_from_spirv(name, &spirv) }
}
