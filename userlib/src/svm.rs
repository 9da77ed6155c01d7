//! Shared virtual addressing with Vulkan: compute shaders on the program's own memory, by its own pointers.
//!
//! A [`SvmContext`] is a Vulkan device with a [`Strategy`], a way to reach that memory. `Documentation/svm.md` tells what each costs, and
//! how a shader is written (`shaders/hmm_svm.glsl`). What of it cannot be checked is in `sys/svm` and `sys/vulkan`.

mod args;
mod buf;
mod choose;
pub(crate) mod context;
mod doctor;
mod error;
mod graph;
pub(crate) mod kernel;
mod link;
pub(crate) mod ranges;
pub(crate) mod reason;
pub(crate) mod replay;
pub(crate) mod spirv;
mod stats;
mod strategy;

pub use args::Args;
pub use buf::SvmBuf;
pub use context::{SvmBuilder, SvmContext};
pub use doctor::{doctor, Diagnosis, Doctor};
pub use error::SvmError;
pub use graph::Graph;
pub use kernel::{Grid, Kernel, Shipped};
pub use link::Link;
pub use replay::Miss;
pub use stats::DispatchStats;
pub use strategy::Strategy;
