//! Every kernel, under every strategy that there is.

use std::sync::{Arc, Mutex};

use hmm_gpu::{Args, Graph, Link, Strategy, SvmContext};

use crate::data::{
    alone, bfs, compiled, context, contexts, has_vulkan, saxpy, strategies, tree, words, Lists,
};

/// Asserts that Vulkan's validation layers had nothing to say.
#[track_caller]
fn clean(context: &SvmContext) {
    assert_eq!(context.validation_messages(), [""; 0], "{context}");
}

#[test]
fn each_strategy_is_the_one_that_was_asked_for() {
    let _alone = alone();
    for (context, strategy) in contexts(64).iter().zip(strategies()) {
        assert_eq!(context.strategy(), strategy);
        assert!(context.to_string().starts_with(&strategy.to_string()));
    }
}

/// Catches a translation that is wrong at the ends of pages and groups, and copies that are too short.
#[test]
fn saxpy_is_right_at_any_length() {
    let _alone = alone();
    for context in contexts(4096) {
        for n in [0, 1, 15, 16, 17, 1023, 1024, 1025, 5000, 300_000] {
            let stats = saxpy(&context, n);
            assert_eq!(stats.groups, n.div_ceil(1024) as u64, "{stats}");
            if n > 0 && context.strategy().needs_names() && context.strategy() != Strategy::Imported
            {
                assert_eq!(
                    (stats.bytes_in, stats.bytes_out),
                    (8 * n as u64, 4 * n as u64),
                    "{stats}"
                );
            }
        }
        clean(&context);
    }
}

#[test]
fn lists_are_walked() {
    let _alone = alone();
    let lists = Lists::new(100, 3000, 3);
    // More lists than links: some are empty.
    let few = Lists::new(40, 20, 4);
    let none: Vec<Option<Box<Link>>> = (0..3).map(|_| None).collect();
    for context in contexts(4096) {
        lists.walk(&context);
        few.walk(&context);
        assert_eq!(context.sum_lists(&[]).unwrap().0, [0_u64; 0]);
        assert_eq!(context.sum_lists(&none).unwrap().0, [0; 3]);
        clean(&context);
    }
}

#[test]
fn words_are_counted_added_and_gathered() {
    let _alone = alone();
    for context in contexts(4096) {
        words(&context, 50_000);
        clean(&context);
    }
}

#[test]
fn trees_are_searched_and_graphs_are_walked_through() {
    let _alone = alone();
    for context in contexts(4096) {
        tree(&context, 300);
        bfs(&context, 500);
        let mut alone = Graph::new(1, &[]).unwrap();
        assert_eq!(context.breadth_first(&mut alone, 0).unwrap().0, [Some(0)]);
        let error = context.breadth_first(&mut alone, 1).unwrap_err();
        assert!(error.to_string().contains("no node 1"), "{error}");
        clean(&context);
    }
}

/// Catches numbers of groups and invocations that are not what Vulkan's would be.
#[test]
fn a_grid_has_three_dimensions() {
    let _alone = alone();
    for context in contexts(64) {
        let kernel = compiled(&context, "grid").unwrap();
        assert_eq!(kernel.group(), 4 * 2 * 3);
        let (groups, group) = ([3_u32, 2, 2], [4, 2, 3]);
        let size: Vec<usize> = (0..3).map(|d| (groups[d] * group[d]) as usize).collect();
        let mut seen = vec![0_u32; size.iter().product()];
        let args = Args::new()
            .write(&mut seen)
            .value(size[0] as u32)
            .value(size[1] as u32);
        // SAFETY: the kernel adds its own number to the word of each place of the grid.
        unsafe { context.dispatch(&kernel, args, groups) }.unwrap();
        let expected: Vec<u32> = (1..=seen.len() as u32).collect();
        assert_eq!(seen, expected, "{context}");
        clean(&context);
    }
}

/// Catches a copy where none is needed, and a buffer that is forgotten too early or too late.
#[test]
fn what_lies_in_vulkans_memory_is_not_copied() {
    let _alone = alone();
    let context = context(Strategy::Mapped, 0);
    for _ in 0..3 {
        let n = 10_000;
        let mut x = context.buffer::<f32>(n).unwrap();
        let mut y = context.buffer::<f32>(n).unwrap();
        x.iter_mut().enumerate().for_each(|(i, x)| *x = i as f32);
        let stats = context.saxpy(2.0, &x, &mut y).unwrap();
        assert_eq!((stats.bytes_in, stats.bytes_out), (0, 0), "{stats}");
        assert!(y.iter().enumerate().all(|(i, &y)| y == 2.0 * i as f32));
        // One that is, beside one that is not.
        let mut ordinary = vec![1.0; n];
        let stats = context.saxpy(2.0, &x, &mut ordinary).unwrap();
        assert_eq!(
            (stats.bytes_in, stats.bytes_out),
            (4 * n as u64, 4 * n as u64),
            "{stats}"
        );
        assert!(ordinary
            .iter()
            .enumerate()
            .all(|(i, &y)| y == 2.0 * i as f32 + 1.0));
    }
    clean(&context);
}

#[test]
fn progress_is_told_and_all_is_counted() {
    let _alone = alone();
    let told = Arc::new(Mutex::new(Vec::new()));
    let to = Arc::clone(&told);
    let context = SvmContext::builder()
        .strategy(Strategy::Copy)
        .progress(move |stats| to.lock().unwrap().push(*stats))
        .build()
        .unwrap();
    saxpy(&context, 10_000);
    saxpy(&context, 20_000);
    let told = told.lock().unwrap();
    assert_eq!(
        told.iter().map(|stats| stats.groups).collect::<Vec<_>>(),
        [10, 20]
    );
    assert_eq!(context.stats().groups, 30);
    assert_eq!(context.stats().rounds, 2);
}

#[test]
fn threads_share_a_context() {
    let _alone = alone();
    if !has_vulkan() || !strategies().contains(&Strategy::Native) {
        return;
    }
    let context = context(Strategy::Native, 0);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| saxpy(&context, 30_000));
        }
    });
    assert_eq!(context.stats().groups, 4 * 30);
    clean(&context);
}

#[test]
fn the_doctor_says_why_not() {
    let _alone = alone();
    let text = hmm_gpu::doctor().to_string();
    println!("{text}");
    for strategy in Strategy::ALL {
        let line = text
            .lines()
            .find(|line| line.trim_start().starts_with(&strategy.to_string()))
            .unwrap();
        let available = line.ends_with(" available");
        let why = line.split_once("not available: ").map(|(_, why)| why);
        assert!(available != why.is_some_and(|why| why.len() > 20), "{line}");
    }
}

/// Catches what contexts share that is not theirs to share, each in a thread of its own.
#[test]
fn contexts_run_side_by_side() {
    let _alone = alone();
    let contexts = contexts(256);
    std::thread::scope(|scope| {
        for context in &contexts {
            scope.spawn(move || {
                for n in [20_000, 5000] {
                    saxpy(context, n);
                    words(context, n);
                }
            });
        }
    });
    contexts.iter().for_each(clean);
}
