// SPDX-License-Identifier: GPL-2.0

//! Safe abstractions over what else the kernel crate lacks: memory that the CPU reaches VRAM
//! through, and that processes map, PCI BARs, dma-bufs, device nodes, sleep, sorting, trace events, waiting, work, and lending something
//! that will be taken away.

pub(crate) mod dma_buf;
pub(crate) mod gate;
pub(crate) mod mapping;
pub(crate) mod node;
pub(crate) mod pci;
pub(crate) mod sleep;
pub(crate) mod sort;
pub(crate) mod trace;
pub(crate) mod user_map;
pub(crate) mod wait;
pub(crate) mod work;

/// The kernel's own, as bindgen gives them: those of the kernel crate, and those that it lacks.
#[allow(
    clippy::all,
    clippy::undocumented_unsafe_blocks,
    dead_code,
    improper_ctypes,
    missing_docs,
    non_camel_case_types,
    non_snake_case,
    non_upper_case_globals,
    unreachable_pub,
    unsafe_op_in_unsafe_fn
)]
pub(crate) mod bindings {
    pub(crate) use kernel::bindings::*;
    mod generated {
        include!("sys/bindings_generated.rs");
    }
    pub(crate) use generated::*;
}
