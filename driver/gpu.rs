// SPDX-License-Identifier: GPL-2.0

//! A device as a whole: its number, its memory and its node.

#![forbid(unsafe_code)]

use crate::{
    alloc::{Allocator, BLOCK_BYTES},
    client::Client,
    devmem::{DeviceMemory, Identity},
    hmm::pagemap::{Form, PageMap, Registered},
    sys::{
        gate::{Lend, Lent},
        node::Node,
    },
    units::Unit,
    vram::Vram,
};
use kernel::{
    device::{Bound, Device},
    prelude::*,
};

/// A device that is in use. `D` is, or owns, what it is bound to.
///
/// The fields are dropped in their order, which is the teardown: no new files; no new calls, and
/// wait for those that run; evict, unregister the pages and let go of the VRAM; and last the
/// number.
#[pin_data]
pub(crate) struct Gpu<D: AsRef<Device<Bound>>> {
    #[pin]
    node: Node<Client>,
    memory: Lent<Registered<D, DeviceMemory>>,
    unit: Unit,
}

/// The steps after which a probe can be told to fail: see the module parameter `fail_probe`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    Enable = 1,
    FindBar,
    MapBar,
    Check,
    Allocator,
    PageMap,
    Node,
}

impl<D: AsRef<Device<Bound>>> Gpu<D> {
    /// Puts the VRAM of a device to use, as device `unit`. `pci` is where the device is.
    pub(crate) fn new(
        unit: Unit,
        device: D,
        form: Form,
        pci: (u32, u32),
        vram: Vram,
    ) -> Result<impl PinInit<Self, Error>> {
        let identity = Identity {
            unit: unit.number(),
            pci,
            form,
        };
        // CAST: Widens.
        let bytes = vram.len() as u64 / BLOCK_BYTES * BLOCK_BYTES;
        let alloc = Allocator::new(bytes)?;
        crate::fail_after(Step::Allocator)?;
        let registered = Registered::new(
            device,
            form,
            bytes,
            DeviceMemory::new(identity, vram, alloc),
        )?;
        crate::fail_after(Step::PageMap)?;
        let memory = Lent::new(registered)?;
        let map: &PageMap<DeviceMemory> = memory.owner().lend();
        unit.set_pages(map.first_pfn(), map.pages());
        pr_info!(
            "{}: {} MiB of VRAM as device-private pages at {:#x}\n",
            unit.name(),
            bytes >> 20,
            memory.owner().start()
        );
        let (name, gate) = (unit.name(), memory.gate().clone());
        Ok(try_pin_init!(Self {
            unit,
            memory,
            node <- Node::new(name, gate),
            _: { crate::fail_after(Step::Node)? },
        }))
    }
}
