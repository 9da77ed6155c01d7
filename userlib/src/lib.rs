//! Memory that lives in a GPU's VRAM and keeps its address: plain pointers, on CPU and GPU.
//!
//! The kernel driver `hmm_gpu` turns VRAM into pages that a process can own. A page of the process can then be in system
//! memory or in VRAM, at the same virtual address and with the same bytes; when the CPU touches one that is in VRAM, it comes
//! back by itself. This crate finds such devices, moves memory, and tells where it is:
//!
//! ```no_run
//! use hmm_gpu::{Device, Target};
//!
//! # fn main() -> Result<(), hmm_gpu::Error> {
//! let device = Device::open_first()?;
//! println!("{}", device.describe()?);
//!
//! let names: Vec<String> = (0..10_000).map(|n| format!("name {n}")).collect();
//! device.prefetch(&names, Target::Device)?; // ordinary memory: the pages of the Vec are in VRAM now
//! println!("{}", device.residency(&names)?.map(64));
//!
//! assert_eq!(names[5_000], "name 5000"); // the CPU touches one of them
//! println!("{}", device.residency(&names)?.map(64)); // it came back
//! # Ok(())
//! # }
//! ```
//!
//! The device has a page table of its own that mirrors the process's. So it follows plain pointers too, and faults where it
//! has none of a page yet, as the CPU does:
//!
//! ```no_run
//! # use hmm_gpu::{Device, Policy};
//! # fn main() -> Result<(), hmm_gpu::Error> {
//! # let device = Device::open_first()?;
//! let numbers: Vec<u32> = (0..1 << 20).collect();
//! let mut copy = vec![0; numbers.len()];
//! let copied = device.copy(&numbers, &mut copy, Policy::Migrate)?; // the device reads and writes, at these addresses
//! println!("{copied}, {}", device.snapshot(&numbers)?);
//! # Ok(())
//! # }
//! ```
//!
//! Device and CPU may count in the same words, by atomic operations:
//!
//! ```no_run
//! # use std::sync::atomic::{AtomicU64, Ordering};
//! # use hmm_gpu::{Device, Policy};
//! # fn main() -> Result<(), hmm_gpu::Error> {
//! # let device = Device::open_first()?;
//! let done = AtomicU64::new(0);
//! device.fetch_add(&done, 1, Policy::Map)?; // until a CPU touches it, the page is the device's alone
//! assert_eq!(done.load(Ordering::Acquire), 1);
//! # Ok(())
//! # }
//! ```
//!
//! # What holds everywhere
//!
//! - Moving is invisible: addresses and bytes stay. So it is safe for any memory at any time, and never needed for a
//!   correct result; it changes speed only. Looking ([`Device::residency`], [`Device::snapshot`]) moves nothing.
//! - What the device does to memory is bound by Rust's rules for it: it writes where the program could ([`Device::write`]), and
//!   at a mere address only in an unsafe call ([`Device::write_at`]).
//! - Lengths are bytes, pages are 4096 bytes, and whole pages move: a slice is rounded outward. What the device reads and writes
//!   may begin and end at any byte.
//! - A [`Device`] serves the process that opened it. In a forked child every call on it is an error (`EPERM`); open it anew.
//! - Nothing here panics on what a driver answers; an answer against the interface is an [`Error`].
//! - Unsafe code is in the module [`sys`] only, beside the interface's own definition, [`uapi`].
//! - What the crate does is logged through `tracing`: opening at `info`, moves and refusals at `debug`.

#![deny(unsafe_code)]
#![warn(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod access;
mod advice;
mod atomic;
mod counters;
mod describe;
mod device;
mod error;
mod fault;
mod import;
mod look;
mod map;
mod mirror;
mod moving;
mod pool;
mod prefetch;
mod range;
mod residency;
mod shared;
mod snapshot;
#[cfg(feature = "vulkan")]
mod svm;
#[allow(unsafe_code)]
pub mod sys;
#[cfg(test)]
mod testing;
// `dead_code`: what only a constant assertion uses counts as unused in Rust 1.85.
#[allow(
    dead_code,
    non_camel_case_types,
    unsafe_code,
    clippy::cast_possible_truncation,
    clippy::precedence
)]
#[path = "../../driver/uapi.rs"]
pub mod uapi;

pub use bytemuck::Pod;
pub use rustix::io::Errno;

pub use access::{Accessed, Operation, Policy};
pub use advice::Advice;
pub use atomic::{AtomicOperation, AtomicWord};
pub use counters::Counters;
pub use describe::{Capabilities, Description, Form, PciAddress, Source};
pub use device::Device;
pub use error::{Attempt, Error};
pub use fault::{Access, DeviceFault, Faulted};
pub use map::{Glyphs, Map};
pub use mirror::{MirrorInfo, TableEntry};
pub use moving::{Moved, Target};
pub use pool::{Ended, Execution, Pool};
pub use prefetch::Prefetch;
pub use range::{Bytes, PageRange};
pub use residency::{Counts, Page, Place, Residency};
pub use shared::{Alignment, SharedBuf};
#[cfg(feature = "vulkan")]
pub use svm::{
    doctor, Args, Diagnosis, DispatchStats, Doctor, Graph, Grid, Kernel, Link, Miss, Shipped,
    Strategy, SvmBuf, SvmBuilder, SvmContext, SvmError,
};
#[cfg(feature = "vulkan")]
pub use sys::svm::{Backend, PoolMemory, TableRoot};

pub use snapshot::{Mirrored, Snapshot, SnapshotPage};
