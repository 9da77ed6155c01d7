//! Shared virtual addressing with Vulkan, without the driver: every strategy that a Vulkan device has, and the translated one with a page
//! table that is kept here by the driver's own logic (`driver/radix.rs`).
//!
//! Where there is no Vulkan device these tests fail, unless `HMM_GPU_WITHOUT_VULKAN` is set: then they say that they were left out.

#![cfg(feature = "vulkan")]
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

// What the driver's files call `kernel` is this program.
extern crate self as kernel;

#[allow(dead_code, unused_imports)]
#[path = "../driver_logic/stand_in.rs"]
mod stand_in;
pub(crate) use stand_in::{alloc, prelude};

#[allow(dead_code, clippy::all)]
#[path = "../../../driver/radix.rs"]
mod radix;
use hmm_gpu::uapi;

mod data;
mod every;
mod misuse;
mod shaders;
mod software;
mod stays;
mod translated;
