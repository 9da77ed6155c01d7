// SPDX-License-Identifier: GPL-2.0

//! A device as a whole: its number, its memory and its node.

#![forbid(unsafe_code)]

use crate::{
    alloc::{Allocator, BLOCK_BYTES},
    client::{Client, MemoryGate},
    devmem::{DeviceMemory, Identity},
    dmirror::{self, Dmirror},
    hmm::pagemap::{Form, Kind, PageMap, Parent, Registered},
    sys::{
        gate::{Lend, Lent},
        node::Node,
        trace,
    },
    units::Unit,
    vram::Vram,
};
use kernel::{prelude::*, sync::Arc};

/// A device that is in use. `D` is, or owns, what it is bound to.
///
/// Devices that its clients have made go first, and executions come to an end. Then the fields are dropped in their order, which is the teardown: no new files; no new calls,
/// and wait for those that run; evict, unregister the pages and let go of the VRAM; and last the
/// number.
pub(crate) struct Gpu<D: Parent> {
    node: Option<Pin<KBox<Node<Client>>>>,
    dmirror_node: Option<Pin<KBox<Node<Dmirror>>>>,
    memory: Lent<Registered<D, DeviceMemory>>,
    unit: Unit,
    dmirror: Option<dmirror::Unit>,
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

impl<D: Parent> Gpu<D> {
    /// Puts the VRAM of a device to use, as device `unit`. `pci` is where the device is. With `dmirror`
    /// it gets that endpoint too.
    ///
    /// Nobody can open it before [`Gpu::publish`].
    pub(crate) fn new(
        unit: Unit,
        device: D,
        form: Form,
        pci: (u32, u32),
        vram: Vram,
        dmirror: Option<dmirror::Unit>,
    ) -> Result<Self> {
        let kind = dmirror.as_ref().map_or(Kind::Private, dmirror::Unit::kind);
        let identity = Identity {
            unit: unit.number(),
            pci,
            form,
        };
        // CAST: Widens.
        let bytes = vram.len() as u64 / BLOCK_BYTES * BLOCK_BYTES;
        let alloc = Allocator::new(bytes)?;
        crate::fail_after(Step::Allocator)?;
        let memory = DeviceMemory::new(identity, vram, alloc);
        let memory = Lent::new(Registered::new(device, form, kind, bytes, memory)?)?;
        crate::fail_after(Step::PageMap)?;
        let map: &PageMap<DeviceMemory> = memory.owner().lend();
        map.data().splitter.set_gate(memory.gate());
        unit.set_pages(map.first_pfn(), map.pages());
        // Not for what any client can have happen as often as it likes.
        let is_said = !map.data().vram.is_imported();
        if is_said {
            pr_info!(
                "{}: {} MiB of VRAM as device-{} pages at {:#x}\n",
                unit.name(),
                bytes >> 20,
                match kind {
                    Kind::Private => "private",
                    Kind::Coherent => "coherent",
                },
                memory.owner().start()
            );
        }
        trace::bind(unit.number(), memory.owner().start(), bytes, true);
        Ok(Self {
            node: None,
            dmirror_node: None,
            memory,
            unit,
            dmirror,
        })
    }

    /// The way to the device's memory.
    pub(crate) fn gate(&self) -> &Arc<MemoryGate> {
        self.memory.gate()
    }

    /// Makes the device node.
    pub(crate) fn publish(mut self) -> Result<Self> {
        let node = Node::new(self.unit.name(), self.memory.gate().clone());
        self.node = Some(KBox::try_pin_init(node, GFP_KERNEL)?);
        if let Some(unit) = &self.dmirror {
            let node = Node::new(unit.name(), self.memory.gate().clone());
            self.dmirror_node = Some(KBox::try_pin_init(node, GFP_KERNEL)?);
        }
        crate::fail_after(Step::Node)?;
        Ok(self)
    }
}

impl<D: Parent> Drop for Gpu<D> {
    fn drop(&mut self) {
        let memory = self.memory.owner().lend().data();
        memory.imports.close();
        // With calls being served still: one of them ends an execution.
        memory.close_pools();
    }
}
