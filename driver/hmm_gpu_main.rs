// SPDX-License-Identifier: GPL-2.0

//! `hmm_gpu`: GPU memory as device-private pages.
//!
//! `Documentation/internals.md` is the way in. All unsafe code is in `hmm` and `sys`.

#![deny(unsafe_op_in_unsafe_fn)]

mod advice;
mod alloc;
mod around;
mod bitmap;
mod bounce;
mod client;
mod counters;
mod devmem;
mod dmirror;
mod engine;
mod evict;
mod execution;
mod fail;
mod faults;
mod gpu;
mod hmm;
mod import;
mod migration;
mod pci;
mod phases;
#[cfg(CONFIG_KASAN)]
mod poison;
mod pool;
mod prefetch;
mod radix;
mod service;
mod sleep;
mod soft;
mod split;
mod structure;
mod sys;
mod table;
// The user side uses what is not used here.
#[allow(dead_code, non_camel_case_types, unreachable_pub)]
mod uapi;
mod units;
mod usage;
mod vram;

use kernel::{
    driver,
    prelude::*,
    sync::atomic::{Atomic, Full},
};

module! {
    type: HmmGpu,
    name: "hmm_gpu",
    authors: ["The hmm-gpu authors"],
    description: "GPU memory as device-private pages",
    license: "GPL",
    imports_ns: ["DMA_BUF"],
    params: {
        soft: u32 {
            default: 1,
            description: "How many soft devices to make (VRAM in system memory)",
        },
        soft_mib: u32 {
            default: 64,
            description: "VRAM of a soft device in MiB, a multiple of 2",
        },
        fair_share: u32 {
            default: 100,
            description: "Percent of an equal share of the VRAM that others do not take from a client before their own (0 to 100)",
        },
        pool_share: u32 {
            default: 50,
            description: "Percent of the VRAM that private pools may have together (0 to 100)",
        },
        import_mib: u32 {
            default: 0,
            description: "MiB of dma-bufs that clients may give to the driver together, as VRAM of their own (0: none)",
        },
        fault_around: u32 {
            default: 64,
            description: "The most pages that come along when touches follow one another, in pages of 4 KiB (1: none, at most 512)",
        },
        bounce_ms: u32 {
            default: 20,
            description: "How soon a page has to come back from the device for it to be a bounce, in milliseconds (0: never)",
        },
        add_resource: bool {
            default: false,
            description: "Register the BAR's own physical addresses instead of free ones",
        },
        dmirror: bool {
            default: false,
            description: "For tests: make /dev/hmm_dmirror0 to 3, as lib/test_hmm.c does; units 2 and 3 are device-coherent",
        },
        offer_ram: u64 {
            default: 0,
            description: "For tests: offer the 2 MiB at this physical address as a device's own, to be refused if System RAM",
        },
        fail_probe: u32 {
            default: 0,
            description: "For tests: the next probe of a PCI device fails after this step of it (1 to 7)",
        },
    },
}

/// The module. Dropped in this order: PCI devices are unbound, then soft devices go.
#[pin_data]
struct HmmGpu {
    #[pin]
    pci: driver::Registration<kernel::pci::Adapter<pci::Driver>>,
    soft: KVec<soft::SoftGpu>,
    #[pin]
    fail: fail::Files,
}

impl kernel::InPlaceModule for HmmGpu {
    fn init(module: &'static ThisModule) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            _: {
                let start = module_parameters::offer_ram.value();
                if start != 0 {
                    soft::offer(start)?;
                }
            },
            soft: soft::devices(
                module_parameters::soft.value(),
                module_parameters::soft_mib.value(),
            )?,
            fail <- fail::Files::new(),
            pci <- driver::Registration::new(c"hmm_gpu", module),
            // Last: from here on the module must not fail to load, for somebody may open a node.
            _: { soft::publish(soft) },
        })
    }
}

/// Fails once, if this is the step that the module parameter `fail_probe` names.
fn fail_after(step: gpu::Step) -> Result {
    static DONE: Atomic<bool> = Atomic::new(false);

    // CAST: Steps are numbered from 1.
    if module_parameters::fail_probe.value() != step as u32 || DONE.xchg(true, Full) {
        return Ok(());
    }
    pr_info!("fail_probe: failing after step {}\n", step as u32);
    Err(ENOMEM)
}
