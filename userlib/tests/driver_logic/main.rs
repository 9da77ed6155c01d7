//! The driver's plain logic, tried without a kernel: its files are compiled as they are, against a stand-in for the kernel crate
//! that knows just what they use, and compared with models too simple to be wrong.
//!
//! `driver/bitmap.rs` is where VRAM comes from, `driver/radix.rs` is the device page table.

// What the driver's files call `kernel` is this program.
extern crate self as kernel;

mod stand_in;
pub(crate) use stand_in::{alloc, prelude};

// They are the driver's, and the driver's lints look at them.
#[allow(dead_code, clippy::all)]
#[path = "../../../driver/bitmap.rs"]
mod bitmap;
#[allow(dead_code, clippy::all)]
#[path = "../../../driver/radix.rs"]
mod radix;
use hmm_gpu::uapi;

mod blocks;
mod tree;

use proptest::test_runner::{Config, RngSeed};

/// The same cases in every run, unless `PROPTEST_RNG_SEED` says otherwise; `PROPTEST_CASES` says how many. Keeps no files.
fn config() -> Config {
    let mut config = Config {
        failure_persistence: None,
        ..Config::default()
    };
    if matches!(config.rng_seed, RngSeed::Random) {
        config.rng_seed = RngSeed::Fixed(2018);
    }
    config
}
