//! What stays in VRAM from dispatch to dispatch, and what translation costs then. How long it takes is printed, and not looked at.

use std::time::Instant;

use hmm_gpu::{DispatchStats, Strategy, SvmContext};

use crate::data::{alone, has_vulkan};
use crate::software::Software;

const FLOATS: usize = 1 << 20;
const TURNS: usize = 31;

/// Numbers that stay whole, and a `y` for each context.
struct Stream {
    context: SvmContext,
    y: Vec<f32>,
    seconds: Vec<f64>,
}

impl Stream {
    fn new(context: SvmContext) -> Self {
        Self {
            context,
            y: (0..FLOATS).map(|i| (i % 7) as f32).collect(),
            seconds: Vec::new(),
        }
    }

    fn turn(&mut self, x: &[f32]) -> DispatchStats {
        let begin = Instant::now();
        let stats = self.context.saxpy(2.0, x, &mut self.y).unwrap();
        self.seconds.push(begin.elapsed().as_secs_f64());
        stats
    }

    /// Every element, after the context has ended.
    fn check(self) {
        drop(self.context);
        for (i, y) in self.y.into_iter().enumerate() {
            assert_eq!(y, (i % 7 + 2 * TURNS * (i % 13)) as f32, "element {i}");
        }
    }
}

/// Catches a kernel that misses what is there, and bytes that do not come back after many dispatches. Prints how much longer a stream takes than
/// with raw pointers, by turns.
#[test]
fn a_stream_in_vram_is_translated_without_a_fault() {
    if !has_vulkan() || std::env::var_os("HMM_GPU_VULKAN_DEVICE").is_some() {
        return;
    }
    let _alone = alone();
    let x: Vec<f32> = (0..FLOATS).map(|i| (i % 13) as f32).collect();
    let pages = 2 * (4 * FLOATS / 4096 + 2);
    let builder = || SvmContext::builder().device("llvmpipe");
    let software = Software::new(2 * pages).still();
    let translated = builder().strategy(Strategy::Translated);
    let mut translated = Stream::new(translated.backend(Box::new(software)).build().unwrap());
    let mut native = Stream::new(builder().strategy(Strategy::Native).build().unwrap());
    for turn in 0..TURNS {
        let stats = translated.turn(&x);
        assert_eq!(
            (stats.faults == 0, stats.rounds == 1),
            (turn > 0, turn > 0),
            "{stats}"
        );
        native.turn(&x);
    }
    // The first has found nothing prepared.
    let pairs = translated.seconds.iter().zip(&native.seconds).skip(1);
    let mut ratios: Vec<f64> = pairs.map(|(one, other)| one / other).collect();
    ratios.sort_by(f64::total_cmp);
    let at = |share: usize| ratios[(ratios.len() - 1) * share / 4];
    println!(
        "translated over native: {:.2}, the middle half {:.2} to {:.2}",
        at(2),
        at(1),
        at(3)
    );
    translated.check();
    native.check();
}
