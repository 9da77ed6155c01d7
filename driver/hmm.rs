// SPDX-License-Identifier: GPL-2.0

//! Safe abstractions over the kernel's HMM interfaces: device-private pages, their migration, and
//! mirrors of address spaces.
//!
//! No policy: what is moved, when and why is the business of the modules above. Written to be sent
//! to `rust/kernel/` with mechanical changes only.
//!
//! How the pieces hold each other:
//!
//! - A [`pagemap::PageMap`] stands for the device pages of one device. [`pagemap::Registered`] owns
//!   it; dropping that evicts ([`pagemap::Ops::evict_all`]), then unregisters, then frees, so a
//!   page map outlives every page of it.
//! - A [`migrate::Collected`] is a migration between `migrate_vma_setup` and `migrate_vma_pages`;
//!   [`migrate::Moved`] one between `migrate_vma_pages` and `migrate_vma_finalize`. Dropping either
//!   finalizes.
//! - Folios that a migration may put pages into ([`folio::SystemFolio`], [`folio::DeviceFolio`])
//!   are owned values: locked, and given back when dropped.
//! - A [`mirror::Mirror`] owns the interval notifier and the device page table of one address space
//!   on one device. It may outlive the device, which it reaches through a gate.

pub(crate) mod folio;
pub(crate) mod migrate;
pub(crate) mod mirror;
pub(crate) mod pagemap;
pub(crate) mod seen;
pub(crate) mod vma;

/// log2 of the base page size in bytes.
pub(crate) const PAGE_SHIFT: u32 = 12;
/// The base page size in bytes.
pub(crate) const PAGE_BYTES: usize = 1 << PAGE_SHIFT;

const _: () = assert!(PAGE_BYTES == kernel::page::PAGE_SIZE);
