//! Fault and replay, over a pool that is smaller than the data.

use std::sync::atomic::{AtomicBool, Ordering};

use hmm_gpu::{Args, Error, Strategy, SvmContext, SvmError};

use crate::data::{alone, bfs, compiled, context, contexts, has_vulkan, saxpy, tree, words, Lists};
use crate::software::Software;

fn translated(pages: usize) -> hmm_gpu::SvmContext {
    context(Strategy::Translated, pages)
}

/// Catches faults that are not dropped by servicing them, and stale pages.
#[test]
fn what_is_there_needs_no_fault() {
    let _alone = alone();
    let context = translated(1024);
    let x = vec![1.0_f32; 100_000];
    let mut y = vec![2.0_f32; 100_000];
    let cold = context.saxpy(3.0, &x, &mut y).unwrap();
    // 98 pages and a part of each, or two parts, as they lie.
    assert!((196..=200).contains(&cold.serviced_pages), "{cold}");
    assert_eq!(cold.rounds, 2, "{cold}");
    y.fill(7.0);
    let warm = context.saxpy(3.0, &x, &mut y).unwrap();
    assert_eq!((warm.rounds, warm.faults), (1, 0), "{warm}");
    assert!(y.iter().all(|&y| y == 10.0));
}

/// Catches elements that are lost where pages leave between rounds.
#[test]
fn data_may_be_larger_than_the_pool() {
    let _alone = alone();
    for pages in [16, 40] {
        let context = translated(pages);
        let stats = saxpy(&context, 70_000);
        assert!(
            stats.serviced_pages > 3 * pages as u64 && stats.rounds > 3,
            "{stats}"
        );
        println!("{pages} pages: {stats}");
    }
}

/// Catches a page whose number is taken for none: that of this one is zero, as far as 32 bits go.
#[test]
fn a_page_may_be_anywhere() {
    let _alone = alone();
    if !has_vulkan() {
        return;
    }
    const BYTES: usize = 8 * 4096;
    let wanted = std::ptr::with_exposed_provenance_mut(0x2000_0000_0000);
    let access = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    // SAFETY: nothing is replaced.
    let at = unsafe { libc::mmap(wanted, BYTES, access, flags, -1, 0) };
    assert_eq!(at, wanted, "{}", std::io::Error::last_os_error());
    // SAFETY: it was just mapped, and all bytes are numbers.
    let words = unsafe { std::slice::from_raw_parts_mut(at.cast::<u32>(), BYTES / 4) };
    for (word, value) in words.iter_mut().zip(3..) {
        *word = value;
    }
    let expected: u64 = words.iter().map(|&word| u64::from(word)).sum();
    for context in contexts(64) {
        assert_eq!(context.sum(words).unwrap().0, expected, "{context}");
    }
    // One page alone: there is nothing else whose miss would have it asked for again.
    assert_eq!(translated(64).sum(&words[..16]).unwrap().0, (3..19).sum());
    // SAFETY: nothing of it is used any more.
    let gone = unsafe { libc::munmap(at, BYTES) };
    assert_eq!(gone, 0);
}

/// Catches an atomic operation that is done again in a replay.
#[test]
fn atomics_happen_once_however_often_a_kernel_is_replayed() {
    let _alone = alone();
    let context = translated(16);
    for _ in 0..2 {
        words(&context, 30_000);
    }
    assert!(context.stats().rounds > 12, "{}", context.stats());
}

/// Catches a walk that begins anew at each miss, and so never gets through a list that is longer than the pool.
#[test]
fn lists_may_be_longer_than_the_pool() {
    let _alone = alone();
    Lists::new(1, 20_000, 4).walk(&translated(1024));
    let lists = Lists::new(3, 5000, 9);
    let stats = lists.walk(&translated(8));
    assert!(stats.serviced_pages > 40, "{stats}");
    println!("{stats}");
}

#[test]
fn what_does_not_fit_together_runs_one_after_the_other() {
    let _alone = alone();
    let context = translated(12);
    tree(&context, 200);
    bfs(&context, 300);
    assert!(context.stats().rounds > 10, "{}", context.stats());
}

/// Catches a replay without an end, and an error where there is room.
#[test]
fn an_invocation_that_needs_more_than_the_pool_is_an_error() {
    let _alone = alone();
    if !has_vulkan() {
        return;
    }
    let words = vec![1_u32; 40 * 1024];
    for (pages, fits) in [(41, true), (24, false)] {
        let context = translated(pages);
        let kernel = compiled(&context, "greedy").unwrap();
        let mut sums = vec![0_u32; 64];
        let args = Args::new().read(&words).write(&mut sums).value(32_u32);
        // SAFETY: it reads a word of each of the first 32 pages for each of 64 invocations, which are there.
        let result = unsafe { context.dispatch(&kernel, args, 1) };
        if fits {
            result.unwrap();
            assert_eq!(sums, [32; 64]);
        } else {
            let error = result.unwrap_err();
            assert!(
                matches!(error, Error::Svm(SvmError::Stuck { pages: 24, .. })),
                "{error}"
            );
            assert_eq!(sums, [0; 64]);
        }
    }
}

/// Catches a page that is asked for for ever, a copy that is older than what it is of, changes in it that are lost, or made twice, and
/// bytes that nobody has changed and that are written back.
#[test]
fn pages_that_somebody_keeps_touching_are_used_by_a_copy() {
    let _alone = alone();
    if !has_vulkan() {
        return;
    }
    for one_of in [1, 3] {
        let software = Software::new(256).touched(one_of);
        let context = SvmContext::builder()
            .strategy(Strategy::Translated)
            .backend(Box::new(software))
            .build()
            .unwrap();
        let stats = saxpy(&context, 20_000);
        println!("{stats}");
        // 38 pages and parts of others.
        assert!(stats.pages_by_copy >= 38 / one_of as u64, "{stats}");
        words(&context, 3000);
        tree(&context, 20);
        bfs(&context, 30);
        Lists::new(3, 100, 9).walk(&context);

        // The CPU changes the other half meanwhile: on the page in the middle are both.
        let mut y = vec![1.0_f32; 20_000];
        let (ours, theirs) = y.split_at_mut(10_000);
        let stop = AtomicBool::new(false);
        let x = vec![1.0_f32; 10_000];
        let times = std::thread::scope(|scope| {
            let counts = scope.spawn(|| {
                let mut times = 0;
                while times < 1000 || !stop.load(Ordering::Relaxed) {
                    theirs.iter_mut().for_each(|one| *one += 1.0);
                    times += 1;
                }
                times
            });
            context.saxpy(3.0, &x, ours).unwrap();
            stop.store(true, Ordering::Relaxed);
            counts.join().unwrap()
        });
        assert!(theirs.iter().all(|&one| one == (1 + times) as f32));
        assert!(ours.iter().all(|&one| one == 4.0));
    }
}

/// Catches a dispatch that does not end, or does not get on, where there are not copies for all pages that somebody keeps touching.
#[test]
fn more_pages_may_be_touched_than_have_copies() {
    let _alone = alone();
    if !has_vulkan() {
        return;
    }
    let software = Software::new(1024).touched(1);
    let builder = SvmContext::builder().strategy(Strategy::Translated);
    let context = builder.backend(Box::new(software)).build().unwrap();
    // 586 pages, and parts of others: three times as many as there are copies.
    let stats = saxpy(&context, 300_000);
    println!("{stats}");
    assert!((586..1200).contains(&stats.pages_by_copy), "{stats}");
    words(&context, 100_000);
}

/// Catches an invocation that is given up because its pages, which do not come, have copies one after the other; and what a processor's driver
/// reads for the first invocation of eight when that does not run and the others leave a loop.
#[test]
fn pages_that_do_not_come_are_used_by_copies() {
    let _alone = alone();
    if !has_vulkan() {
        return;
    }
    let words = vec![1_u32; 110 * 1024];
    let software = Software::new(64).keeping_out(&words);
    let builder = SvmContext::builder().strategy(Strategy::Translated);
    let context = builder.backend(Box::new(software)).build().unwrap();
    let kernel = compiled(&context, "greedy").unwrap();
    let mut sums = vec![0_u32; 64];
    let args = Args::new().read(&words).write(&mut sums).value(100_u32);
    // SAFETY: it reads a word of each of the first 100 pages for each of 64 invocations, which are there.
    let stats = unsafe { context.dispatch(&kernel, args, 1) }.unwrap();
    println!("{stats}");
    // They do not all begin on the same page.
    assert!((100..=102).contains(&stats.pages_by_copy), "{stats}");
    assert_eq!(sums, [100; 64]);
}

/// Catches memory that can never be in VRAM and is taken for something else.
#[test]
fn memory_that_cannot_be_in_vram_is_named() {
    let _alone = alone();
    static FILE: [f32; 5000] = [1.0; 5000];
    let context = translated(64);
    let mut y = vec![0.0_f32; 5000];
    let error = context.saxpy(1.0, &FILE, &mut y).unwrap_err();
    let Error::Svm(SvmError::NotInVram { kernel, addr, why }) = error else {
        panic!("{error}")
    };
    assert_eq!(kernel, "saxpy");
    assert!(
        FILE.as_ptr_range()
            .contains(&std::ptr::with_exposed_provenance(addr)),
        "{addr:#x}"
    );
    assert!(why.contains("private mapping of /"), "{why}");
    assert_eq!(y, vec![0.0; 5000]);
}
