// SPDX-License-Identifier: (GPL-2.0 WITH Linux-syscall-note) OR MIT OR Apache-2.0

//! The user interface of `/dev/hmm_gpuN`: the one definition.
//!
//! The module and the crate `hmm-gpu` both compile this file; `hmm_gpu.h` for other languages is
//! generated from it.
//!
//! Rules that hold for every call:
//!
//! - Lengths are bytes. Addresses and lengths are multiples of [`HMM_GPU_PAGE_BYTES`], or the call
//!   says `EINVAL`; those of `ACCESS` and `FAULT` may be any.
//! - Fields named `flags` and `reserved` must be zero unless a flag is listed for them; anything
//!   else is `EINVAL`.
//! - Structures grow at their end only. The size a caller knows travels in the call's number. A
//!   shorter structure than the driver's (down to the size of version 1) is taken as followed by
//!   zeroes; a longer one is taken if what the driver does not know is zero, and is `EINVAL`
//!   otherwise.
//! - A file serves the address space that opened it. From any other (a forked child, a passed file,
//!   after `execve`) every call is `EPERM`.
//! - After the device is unbound every call is `ENODEV`. A call whose number is not listed here is
//!   `ENOTTY`.
//! - A structure that cannot be read or written is `EFAULT`.

/// Version of this interface. Grows when a call or a field is added; nothing is ever taken away.
pub const HMM_GPU_VERSION: u32 = 6;

/// The page size this interface counts in, in bytes.
pub const HMM_GPU_PAGE_BYTES: u64 = 4096;

/// Devices per host: nodes are `/dev/hmm_gpu0` to `/dev/hmm_gpu31`.
pub const HMM_GPU_MAX_DEVICES: u32 = 32;

/// `QUERY`: describes the device.
pub const HMM_GPU_QUERY: u32 = 0xC060_E800;
/// `MIGRATE`: moves the pages of a range to the device or to the system.
pub const HMM_GPU_MIGRATE: u32 = 0xC050_E801;
/// `RESIDENCY`: tells where each page of a range is. Moves nothing.
pub const HMM_GPU_RESIDENCY: u32 = 0xC030_E802;
/// `COUNTERS`: what the device has done since it was bound.
pub const HMM_GPU_COUNTERS: u32 = 0xC178_E803;
/// `MIRROR`: describes the file's device page table. Since version 2.
pub const HMM_GPU_MIRROR: u32 = 0xC050_E804;
/// `ACCESS`: the device reads, writes or copies at process addresses. Since version 2.
pub const HMM_GPU_ACCESS: u32 = 0xC060_E805;
/// `FAULT`: services device faults. Since version 2.
pub const HMM_GPU_FAULT: u32 = 0xC040_E806;
/// `SNAPSHOT`: tells what is at each page of a range, and what the device page table has for it.
/// Moves nothing. Since version 2.
pub const HMM_GPU_SNAPSHOT: u32 = 0xC030_E807;
/// `ATOMIC`: the device does an atomic operation at a process address. Since version 3.
pub const HMM_GPU_ATOMIC: u32 = 0xC050_E808;

/// `ADVISE`: says what is known of a range, for where its pages are to be. Since version 4.
pub const HMM_GPU_ADVISE: u32 = 0xC030_E809;

/// `POOL`: makes a private pool, which can be mapped. Since version 5.
pub const HMM_GPU_POOL: u32 = 0xC030_E80A;
/// `EXECUTE`: begins and ends executions. Since version 5.
pub const HMM_GPU_EXECUTE: u32 = 0xC030_E80B;
/// `PREFETCH`: queues a move, of which `read(2)` says when it has ended. Since version 5.
pub const HMM_GPU_PREFETCH: u32 = 0xC030_E80C;
/// `IMPORT`: makes a device of a dma-buf, for this process alone. Since version 6.
pub const HMM_GPU_IMPORT: u32 = 0xC030_E80D;

/// `MIGRATE` is there.
pub const HMM_GPU_CAP_MIGRATE: u64 = 0x1;
/// `RESIDENCY` is there.
pub const HMM_GPU_CAP_RESIDENCY: u64 = 0x2;
/// `COUNTERS` is there.
pub const HMM_GPU_CAP_COUNTERS: u64 = 0x4;
/// Pages come back by themselves when the CPU touches them.
pub const HMM_GPU_CAP_FAULT_BACK: u64 = 0x8;
/// `MIRROR`, `ACCESS`, `FAULT` and `SNAPSHOT` are there.
pub const HMM_GPU_CAP_MIRROR: u64 = 0x10;
/// `ATOMIC` is there.
pub const HMM_GPU_CAP_ATOMIC: u64 = 0x20;
/// `ADVISE` is there.
pub const HMM_GPU_CAP_ADVICE: u64 = 0x80;
/// `PREFETCH` is there, and `poll` and `read` of the file.
pub const HMM_GPU_CAP_PREFETCH: u64 = 0x1000;
/// The CPU reaches the VRAM where it is (`MEMORY_DEVICE_COHERENT`): pages do not come back when it
/// touches them.
pub const HMM_GPU_CAP_COHERENT: u64 = 0x40;

/// `POOL` and `EXECUTE` are there, and `mmap`.
pub const HMM_GPU_CAP_POOL: u64 = 0x100;
/// `IMPORT` is there, and the module's parameter `import_mib` is not 0.
pub const HMM_GPU_CAP_IMPORT: u64 = 0x2000;

/// The VRAM is system memory that stands in for a GPU's.
pub const HMM_GPU_SOURCE_SOFT: u32 = 1;
/// The VRAM is a memory BAR of a PCI device.
pub const HMM_GPU_SOURCE_PCI: u32 = 2;
/// The VRAM is a dma-buf that a client has given: see [`hmm_gpu_import`].
pub const HMM_GPU_SOURCE_DMA_BUF: u32 = 3;

/// The device pages have free physical addresses that the kernel picked
/// (`devm_request_free_mem_region`).
pub const HMM_GPU_FORM_ADD: u32 = 1;
/// The device pages have the BAR's own physical addresses.
pub const HMM_GPU_FORM_ADD_RESOURCE: u32 = 2;

/// What a device is. All fields but `flags` and `reserved` are written by the driver.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[cfg_attr(not(MODULE), derive(bytemuck::Pod, bytemuck::Zeroable))]
#[cfg_attr(MODULE, derive(zerocopy_derive::FromBytes, zerocopy_derive::IntoBytes))]
pub struct hmm_gpu_query {
    /// In: must be zero.
    pub flags: u32,
    /// [`HMM_GPU_VERSION`] of the driver.
    pub version: u32,
    /// `HMM_GPU_CAP_*` of this device.
    pub capabilities: u64,
    /// The N of `/dev/hmm_gpuN`.
    pub unit: u32,
    /// `HMM_GPU_SOURCE_*`.
    pub source: u32,
    /// `HMM_GPU_FORM_*`.
    pub form: u32,
    /// PCI domain; 0 for a soft device.
    pub pci_domain: u32,
    /// PCI bus << 8 | device << 3 | function; 0 for a soft device.
    pub pci_bdf: u32,
    /// Bytes that one block of VRAM has: what is taken from and given back to the device at a time.
    pub block_bytes: u32,
    /// VRAM in bytes that pages can be in.
    pub vram_bytes: u64,
    /// Bytes of it that no page is in at this moment.
    pub vram_free_bytes: u64,
    /// In: must be zero.
    pub reserved: [u64; 5],
}

/// To system memory.
pub const HMM_GPU_TARGET_SYSTEM: u32 = 0;
/// To the VRAM of the device that the file is open on.
pub const HMM_GPU_TARGET_DEVICE: u32 = 1;

/// Moves the pages of `[addr, addr + len)`, keeping their addresses.
///
/// The range may span several mappings and holes. Private anonymous memory moves, and so do the pages
/// of a private mapping of a file that have been written to. Untouched private anonymous memory becomes
/// zeroed pages at a device target and is left alone at a system target. At a device target, pages on
/// another device of this driver move too, straight from VRAM to VRAM. Everything else is skipped and
/// counted as such.
///
/// 2 MiB that are mapped as one move as one, where there is such a folio on the other side, and page by
/// page where there is not; untouched, they are made one unless the mapping says `MADV_NOHUGEPAGE`.
///
/// The four counts `moved_bytes`, `already_bytes`, `skipped_bytes` and `unmapped_bytes` add up to
/// `done_bytes`. They are written on failure too, if the structure can be: the range before `addr +
/// done_bytes` has been dealt with, and the call can be repeated from there.
///
/// Errors: `EINVAL` (unaligned, empty or wrapping range, unknown target or flag, reserved field not
/// zero), `EFAULT` (the range leaves user space, or nothing at all is mapped in it), `ENOSPC` (no
/// VRAM left), `ENOMEM` (no system memory), `EINTR` (a signal came), `ENODEV`, `EPERM`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[cfg_attr(not(MODULE), derive(bytemuck::Pod, bytemuck::Zeroable))]
#[cfg_attr(MODULE, derive(zerocopy_derive::FromBytes, zerocopy_derive::IntoBytes))]
pub struct hmm_gpu_migrate {
    /// In: first byte of the range, page aligned.
    pub addr: u64,
    /// In: bytes, page aligned, not zero.
    pub len: u64,
    /// In: `HMM_GPU_TARGET_*`.
    pub target: u32,
    /// In: must be zero.
    pub flags: u32,
    /// Out: how far the call came, in bytes from `addr`.
    pub done_bytes: u64,
    /// Out: bytes that this call moved.
    pub moved_bytes: u64,
    /// Out: bytes that were at the target already (for a system target: or not populated).
    pub already_bytes: u64,
    /// Out: bytes that stayed where they were: memory that does not migrate, mappings without any
    /// access, pages that were pinned, busy, merged by KSM, or that a device has to itself (`ATOMIC`).
    pub skipped_bytes: u64,
    /// Out: bytes of the range at which nothing is mapped.
    pub unmapped_bytes: u64,
    /// In: must be zero.
    pub reserved: [u64; 2],
}

/// Nothing is mapped, or the page was never touched, or it is swapped out, or it cannot be read, or a
/// device has it to itself (`ATOMIC`).
pub const HMM_GPU_RESIDENT_NONE: u8 = 0;
/// In system memory.
pub const HMM_GPU_RESIDENT_SYSTEM: u8 = 1;
/// In the VRAM of the device that the file is open on.
pub const HMM_GPU_RESIDENT_DEVICE: u8 = 2;
/// In the VRAM of another device of this driver.
pub const HMM_GPU_RESIDENT_OTHER_DEVICE: u8 = 3;
/// The bits of a residency byte that hold one of the values above.
pub const HMM_GPU_RESIDENT_MASK: u8 = 0x0f;
/// Set beside them where the page is mapped writable.
pub const HMM_GPU_RESIDENT_WRITABLE: u8 = 0x10;

/// Tells where each page of `[addr, addr + len)` is: one byte a page, at `bytes_ptr`. Moves and
/// populates nothing.
///
/// The answer was true for each page at one moment during the call, not for all pages at the same
/// moment.
///
/// Errors: `EINVAL` (unaligned, empty or wrapping range, flag or reserved field not zero), `EFAULT`
/// (the range leaves user space, or the bytes cannot be written), `EBUSY` (the address space kept
/// changing), `ENOMEM`, `EINTR`, `ENODEV`, `EPERM`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[cfg_attr(not(MODULE), derive(bytemuck::Pod, bytemuck::Zeroable))]
#[cfg_attr(MODULE, derive(zerocopy_derive::FromBytes, zerocopy_derive::IntoBytes))]
pub struct hmm_gpu_residency {
    /// In: first byte of the range, page aligned.
    pub addr: u64,
    /// In: bytes, page aligned, not zero.
    pub len: u64,
    /// In: where to write `len / HMM_GPU_PAGE_BYTES` bytes, each `HMM_GPU_RESIDENT_*`.
    pub bytes_ptr: u64,
    /// In: must be zero.
    pub flags: u64,
    /// In: must be zero.
    pub reserved: [u64; 2],
}

/// Not all that the device has done, but what this file's client has since it was opened, and what became of its pages: those that
/// it brought there. Since version 5.
///
/// Clients' counters add up to the device's, as long as none was closed. But the pages of device page tables are in `table_pages` only,
/// `table_pages_taken` and `insertion_failures` are 0, and the time of a migration to the system, which may have pages of several, is that of the client whose page is the first.
pub const HMM_GPU_COUNTERS_CLIENT: u64 = 0x1;

/// What a device has done since it was bound, in pages unless a name says otherwise. All but
/// `flags` are written by the driver.
///
/// Whenever nothing is under way, these hold:
///
/// - `allocated_pages` = `freed_pages` + `live_pages`
/// - `allocated_pages` = `to_device_pages` + `unused_pages` + `table_pages_taken`
/// - `device_faults` = `faults_in_device` + `faults_in_system` + `fault_failures`
/// - what has left the VRAM without moving (`munmap`, `MADV_DONTNEED`, the end of a process) is `to_device_pages` less
///   what has moved away (`to_system_pages`, `fault_back_pages`, `pressure_pages`, `evicted_pages`, `to_other_pages`) and what is
///   there (`live_pages` less `table_pages`)
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[cfg_attr(not(MODULE), derive(bytemuck::Pod, bytemuck::Zeroable))]
#[cfg_attr(MODULE, derive(zerocopy_derive::FromBytes, zerocopy_derive::IntoBytes))]
pub struct hmm_gpu_counters {
    /// In: `HMM_GPU_COUNTERS_CLIENT`, or zero.
    pub flags: u64,
    /// Pages of VRAM in use now.
    pub live_pages: u64,
    /// Pages of VRAM taken into use.
    pub allocated_pages: u64,
    /// Pages of VRAM given back, for whatever reason.
    pub freed_pages: u64,
    /// Moved to the device on request.
    pub to_device_pages: u64,
    /// Those of them that were never touched before, and arrived as zeroes.
    pub populated_pages: u64,
    /// Moved to the system on request.
    pub to_system_pages: u64,
    /// Moved to the system because the CPU touched them.
    pub fault_back_pages: u64,
    /// Moved to the system because the device went away.
    pub evicted_pages: u64,
    /// CPU faults on pages of the device.
    pub cpu_faults: u64,
    /// CPU faults that found the page busy and were taken again.
    pub cpu_fault_retries: u64,
    /// Left where they were by a request: what `skipped_bytes` counts. Device faults that were to
    /// move pages are requests too.
    pub skipped_pages: u64,
    /// Moves that found no VRAM.
    pub vram_failures: u64,
    /// Moves that found no system memory.
    pub system_failures: u64,
    /// Pages for which device faults were serviced: those that misses of `ACCESS` brought up, and
    /// those named by `FAULT` (a page named more than once counts once).
    pub device_faults: u64,
    /// Entries written to device page tables.
    pub mapped_pages: u64,
    /// Invalidations that found the range in a device page table.
    pub invalidations: u64,
    /// Pages of VRAM that device page tables use now. Part of `live_pages`.
    pub table_pages: u64,
    /// Bytes that the device read at process addresses.
    pub device_read_bytes: u64,
    /// Bytes that the device wrote at process addresses.
    pub device_written_bytes: u64,
    /// Those of `to_device_pages` that were in the VRAM of another device of this driver.
    pub from_other_pages: u64,
    /// Moved to another device of this driver on request.
    pub to_other_pages: u64,
    /// Folios of 2 MiB that moved to the device whole, on request. Their pages are part of
    /// `to_device_pages`.
    pub large_to_device: u64,
    /// Folios of 2 MiB that moved to the system whole, for whatever reason.
    pub large_to_system: u64,
    /// Folios of 2 MiB for which there was none on the other side. Their pages move one by one.
    pub large_failures: u64,
    /// Moved to the system because others needed the room. Since version 4, as all that follow.
    pub pressure_pages: u64,
    /// Blocks of 2 MiB from which pages were moved for that.
    pub evictions: u64,
    /// CPU faults on pages that had gone to the device for a device fault less than `bounce_ms` before.
    pub bounces: u64,
    /// Pages that a device fault was to move and that stayed, because they bounce.
    pub kept_pages: u64,
    /// Those of `fault_back_pages` that came along with what was touched.
    pub around_pages: u64,
    /// Those of `to_device_pages` that moved for device faults.
    pub device_fault_pages: u64,
    /// Nanoseconds in which migrations were set up: pages locked and unmapped.
    pub setup_ns: u64,
    /// Nanoseconds in which their new places were allocated, and written.
    pub copy_ns: u64,
    /// Nanoseconds in which the kernel moved what it knows of a page (`migrate_vma_pages`).
    pub pages_ns: u64,
    /// Nanoseconds in which pages were mapped again, and unlocked.
    pub finalize_ns: u64,
    /// Folios that stayed because their bytes could not be copied. Since version 5, as all that follow.
    pub copy_failures: u64,
    /// Entries of device page tables that could not be made.
    pub insertion_failures: u64,
    /// Pages of VRAM that were taken for a move that did not come off: the page was pinned, or gone, or written to.
    pub unused_pages: u64,
    /// Pages of VRAM that were taken for device page tables.
    pub table_pages_taken: u64,
    /// Device faults after which the page was mapped in VRAM.
    pub faults_in_device: u64,
    /// Device faults after which the page was mapped in system memory.
    pub faults_in_system: u64,
    /// Device faults after which the page was not mapped.
    pub fault_failures: u64,
    /// CPU faults that ended with an error: no system memory, or the device is gone.
    pub cpu_fault_failures: u64,
    /// Pages in private pools, used or not.
    pub private_pages: u64,
    /// Those of them that are free and cannot be used: given back while an execution was on, or of a pool that is gone with something in it
    /// that is pinned.
    pub quarantined_pages: u64,
    /// Executions that were begun.
    pub executions: u64,
    /// Those of them that were lost.
    pub executions_lost: u64,
}

/// The entry is there. For a device page table's inner nodes: the offset is that of the next node.
pub const HMM_GPU_PTE_VALID: u64 = 0x1;
/// The device may write to the page.
pub const HMM_GPU_PTE_WRITABLE: u64 = 0x2;
/// The page is in system memory: the entry has no offset, and who walks the table cannot reach it.
pub const HMM_GPU_PTE_SYSTEM: u64 = 0x4;
/// Set by the device in an entry that is not valid, for a page that it wants: so that it reports
/// each miss once. The driver never reads it; what the driver writes next takes its place.
pub const HMM_GPU_PTE_REQUESTED: u64 = 0x8;
/// The device has the page to itself: it may read it, and do atomic operations on it, which it may on
/// no other page in system memory. The entry goes when the CPU touches the page.
pub const HMM_GPU_PTE_EXCLUSIVE: u64 = 0x10;
/// The bits of an entry that hold an offset into the VRAM, in bytes.
pub const HMM_GPU_PTE_OFFSET_MASK: u64 = 0x000f_ffff_ffff_f000;
/// log2 of the number of entries of a node.
pub const HMM_GPU_PTE_LEVEL_BITS: u32 = 9;

/// The device page table of the file: a radix table in VRAM. All fields but `flags` and `reserved`
/// are written by the driver.
///
/// A node is a page of VRAM with 512 entries of 8 bytes, little endian (`HMM_GPU_PTE_*`). The walk
/// for an address begins at the node at `root_offset`. At level `levels - 1`, `levels - 2`, … 0 the
/// entry's number is `addr >> (12 + 9 * level) & 511`; an entry of level 0 is a page's, one of
/// another level is the next node's. A level has as many bits as [`HMM_GPU_PTE_LEVEL_BITS`] says.
///
/// A file has a mirror of its address space from its first `MIRROR`, `MIGRATE`, `RESIDENCY`,
/// `ACCESS`, `FAULT`, `SNAPSHOT` or `ATOMIC` on until it is closed, and the table from its first
/// `MIRROR`, `ACCESS`, `FAULT` or `ATOMIC`.
///
/// Errors: `EINVAL` (flag or reserved field not zero), `ENOSPC` (no VRAM for the root), `ENOMEM`,
/// `EINTR`, `ENODEV`, `EPERM`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[cfg_attr(not(MODULE), derive(bytemuck::Pod, bytemuck::Zeroable))]
#[cfg_attr(MODULE, derive(zerocopy_derive::FromBytes, zerocopy_derive::IntoBytes))]
pub struct hmm_gpu_mirror {
    /// In: must be zero.
    pub flags: u32,
    /// Levels of nodes: 4, or 5 where addresses have more than 48 bits.
    pub levels: u32,
    /// Where in the VRAM the root is, in bytes. It stays there.
    pub root_offset: u64,
    /// Nodes, each a page of VRAM.
    pub nodes: u64,
    /// Valid entries for pages.
    pub entries: u64,
    /// Changes of the address space that have taken entries away.
    pub invalidations: u64,
    /// In: must be zero.
    pub reserved: [u64; 5],
}

/// The device reads `[addr, addr + len)`, and what it has read is written to `buffer_ptr`.
pub const HMM_GPU_OP_READ: u32 = 0;
/// The device writes to `[addr, addr + len)` what is at `buffer_ptr`.
pub const HMM_GPU_OP_WRITE: u32 = 1;
/// The device reads `[addr, addr + len)` and writes that to `[to_addr, to_addr + len)`.
pub const HMM_GPU_OP_COPY: u32 = 2;

/// A device fault maps the page where it lies.
pub const HMM_GPU_POLICY_MAP: u32 = 0;
/// A device fault moves the page to the device if it can be, and maps it.
pub const HMM_GPU_POLICY_MIGRATE: u32 = 1;
/// A device fault is not serviced: the call ends with `EAGAIN`. For `ACCESS` only.
pub const HMM_GPU_POLICY_NONE: u32 = 2;

/// The device accesses the process's memory, at any address and with any length, through the file's
/// device page table, and faults as a GPU does where that has no entry.
///
/// The memory is accessed a page at a time, in the order of addresses. What others do to it
/// meanwhile happens before or after the access of each page.
///
/// The caller's buffer may be anywhere in its memory, in VRAM too.
///
/// `done_bytes`, `faults`, `fault_addr` and `entry` are written on failure too, if the structure can
/// be: what lies before `addr + done_bytes` has been dealt with.
///
/// Errors: `EINVAL` (unknown operation, policy or flag, empty or wrapping range, copy between ranges
/// that overlap, field that the operation does not use not zero, reserved field not zero), `EFAULT`
/// (nothing is mapped at `fault_addr`, or nothing that a device can reach, or it leaves user space;
/// or the buffer cannot be read or written), `EACCES` (the mapping at `fault_addr` does not allow
/// it: writing to what can only be read, anything to what cannot be read, a shadow stack), `EAGAIN` (policy
/// `NONE`: the table has no entry for `fault_addr`), `EBUSY` (the page at `fault_addr` changed place
/// too often), `ENOSPC` (no VRAM for the table), `ENOMEM`, `EHWPOISON` (the memory at `fault_addr`
/// turned out to be broken; where the kernel knew before, it is `EFAULT`), `EIO` (the device page table is not as the driver left
/// it: who has mapped the file's private pool has written to it), `EINTR` (a signal came), `ENODEV`, `EPERM`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[cfg_attr(not(MODULE), derive(bytemuck::Pod, bytemuck::Zeroable))]
#[cfg_attr(MODULE, derive(zerocopy_derive::FromBytes, zerocopy_derive::IntoBytes))]
pub struct hmm_gpu_access {
    /// In: `HMM_GPU_OP_*`.
    pub op: u32,
    /// In: `HMM_GPU_POLICY_*`.
    pub policy: u32,
    /// In: first byte that the device accesses; of a copy, the first that it reads.
    pub addr: u64,
    /// In: bytes, not zero.
    pub len: u64,
    /// In: the caller's buffer of `len` bytes; zero for a copy.
    pub buffer_ptr: u64,
    /// In: where a copy goes to; zero for a read or write.
    pub to_addr: u64,
    /// In: must be zero.
    pub flags: u64,
    /// Out: how far the call came, in bytes from `addr`.
    pub done_bytes: u64,
    /// Out: misses that were serviced, or that ended the call.
    pub faults: u64,
    /// Out: where a miss ended the call; zero otherwise.
    pub fault_addr: u64,
    /// Out: with `EAGAIN`, the entry that the device found for `fault_addr` (`HMM_GPU_PTE_*`), zero
    /// if the table has no node for it. If it is not valid, the device has set
    /// [`HMM_GPU_PTE_REQUESTED`] in it since.
    pub entry: u64,
    /// In: must be zero.
    pub reserved: [u64; 2],
}

/// The device wants to read.
pub const HMM_GPU_ACCESS_READ: u32 = 0;
/// The device wants to write.
pub const HMM_GPU_ACCESS_WRITE: u32 = 1;

/// The most faults that one `FAULT` takes.
pub const HMM_GPU_MAX_FAULTS: u32 = 65536;

/// A device fault.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[cfg_attr(not(MODULE), derive(bytemuck::Pod, bytemuck::Zeroable))]
#[cfg_attr(MODULE, derive(zerocopy_derive::FromBytes, zerocopy_derive::IntoBytes))]
pub struct hmm_gpu_device_fault {
    /// In: an address in the page.
    pub addr: u64,
    /// In: `HMM_GPU_ACCESS_READ` or `HMM_GPU_ACCESS_WRITE`.
    pub access: u32,
    /// Out: zero if the page was mapped for this access, or an errno, positive: `EFAULT`, `EACCES`,
    /// `EBUSY`, `ENOSPC`, `ENOMEM` as for `ACCESS`; `ECANCELED` if the call ended before it came to
    /// this one.
    pub status: u32,
}

/// Services device faults: sorts them, takes those in the same 2 MiB together, and maps their pages
/// where they lie, or moves them to the device first.
///
/// The faults may come in any order and name a page more than once: then it is mapped for all that
/// is asked of it, or for none. That a page was mapped says that the table had the entry at one
/// moment during the call.
///
/// Errors: `EINVAL` (unknown policy, access or flag, more than [`HMM_GPU_MAX_FAULTS`] or no fault,
/// reserved field not zero), `EFAULT` (the faults cannot be read or written), `ENOMEM`, `EINTR`,
/// `ENODEV`, `EPERM`. What goes wrong with one fault is told in its `status`, and the call goes on.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[cfg_attr(not(MODULE), derive(bytemuck::Pod, bytemuck::Zeroable))]
#[cfg_attr(MODULE, derive(zerocopy_derive::FromBytes, zerocopy_derive::IntoBytes))]
pub struct hmm_gpu_fault {
    /// In: where the `count` faults are, each a `hmm_gpu_device_fault`.
    pub faults_ptr: u64,
    /// In: how many there are.
    pub count: u32,
    /// In: `HMM_GPU_POLICY_MAP` or `HMM_GPU_POLICY_MIGRATE`.
    pub policy: u32,
    /// In: must be zero.
    pub flags: u64,
    /// Out: pages that were mapped.
    pub mapped_pages: u64,
    /// Out: those of them that were mapped in the device's VRAM.
    pub device_pages: u64,
    /// Out: pages that were not mapped.
    pub failed_pages: u64,
    /// In: must be zero.
    pub reserved: [u64; 2],
}

/// Something is there that can be read: without this, nothing is mapped, or it was never touched,
/// or is swapped out, or cannot be read, or a device has it to itself.
pub const HMM_GPU_SNAPSHOT_VALID: u64 = 0x1;
/// It is mapped writable.
pub const HMM_GPU_SNAPSHOT_WRITABLE: u64 = 0x2;
/// It is in the VRAM of the device that the file is open on.
pub const HMM_GPU_SNAPSHOT_DEVICE: u64 = 0x4;
/// It is in the VRAM of another device of this driver.
pub const HMM_GPU_SNAPSHOT_OTHER_DEVICE: u64 = 0x8;
/// It is the kernel's page of zeroes, the one of 4 KiB: the huge one is not told from other memory.
pub const HMM_GPU_SNAPSHOT_ZERO: u64 = 0x10;
/// The file's device page table has a valid entry for the page.
pub const HMM_GPU_SNAPSHOT_MIRRORED: u64 = 0x20;
/// That entry is writable.
pub const HMM_GPU_SNAPSHOT_MIRROR_WRITABLE: u64 = 0x40;
/// That entry is for the very page that is there. Always set beside `MIRRORED`: an entry without it
/// would be stale.
pub const HMM_GPU_SNAPSHOT_MIRROR_CURRENT: u64 = 0x80;
/// That entry is exclusive: the page is in system memory and the device has it to itself. Then what
/// the CPU would find is not told (`VALID` is not set).
pub const HMM_GPU_SNAPSHOT_MIRROR_EXCLUSIVE: u64 = 0x2000;
/// Where in an entry the map order is: the page is mapped together with `1 << order` pages.
pub const HMM_GPU_SNAPSHOT_ORDER_SHIFT: u32 = 8;
/// The bits of the map order, after the shift.
pub const HMM_GPU_SNAPSHOT_ORDER_MASK: u64 = 0x1f;
/// Where in an entry with `DEVICE` the number of the page in the VRAM is.
pub const HMM_GPU_SNAPSHOT_PAGE_SHIFT: u32 = 20;

/// Tells what is at each page of `[addr, addr + len)` and what the file's device page table has for
/// it: one `u64` a page (`HMM_GPU_SNAPSHOT_*`), at `entries_ptr`. Moves and populates nothing.
///
/// Of each 512 pages (2 MiB, from `addr` on) what the answer says is there was there for all at the
/// same moment. Where it says that nothing is there, or that it is not writable, that may have
/// changed by then.
///
/// Errors: as `RESIDENCY`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[cfg_attr(not(MODULE), derive(bytemuck::Pod, bytemuck::Zeroable))]
#[cfg_attr(MODULE, derive(zerocopy_derive::FromBytes, zerocopy_derive::IntoBytes))]
pub struct hmm_gpu_snapshot {
    /// In: first byte of the range, page aligned.
    pub addr: u64,
    /// In: bytes, page aligned, not zero.
    pub len: u64,
    /// In: where to write `len / HMM_GPU_PAGE_BYTES` words of 8 bytes.
    pub entries_ptr: u64,
    /// In: must be zero.
    pub flags: u64,
    /// In: must be zero.
    pub reserved: [u64; 2],
}

/// Adds the operand.
pub const HMM_GPU_ATOMIC_ADD: u32 = 0;
/// Bitwise and with the operand.
pub const HMM_GPU_ATOMIC_AND: u32 = 1;
/// Bitwise or with the operand.
pub const HMM_GPU_ATOMIC_OR: u32 = 2;
/// Stores the operand.
pub const HMM_GPU_ATOMIC_XCHG: u32 = 3;
/// Stores the operand if the word is what `compare` says.
pub const HMM_GPU_ATOMIC_CMPXCHG: u32 = 4;

/// The device does an atomic operation on a word of the process's memory.
///
/// In the device's VRAM it does so there. A page in system memory it takes for itself first
/// (`make_device_exclusive`): no CPU maps it until one touches it, and then the device's entry has
/// gone. So no CPU sees the word half changed, and none changes it in between.
///
/// `faults` is written on failure too.
///
/// Errors: `EINVAL` (unknown operation, policy or flag, a size other than 4 and 8, an address that is
/// not a multiple of it, operand or compare wider than that, compare without `CMPXCHG`, reserved field
/// not zero), `EFAULT` (nothing is mapped there, or it leaves user space), `EACCES` (the mapping does
/// not allow writing), `EOPNOTSUPP` (the page is in shared or hugetlb memory: the kernel gives no
/// other to a device), `EBUSY` (the page changed place too often), `ENOSPC` (no VRAM for the table),
/// `ENOMEM`, `EINTR`, `ENODEV`, `EPERM`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[cfg_attr(not(MODULE), derive(bytemuck::Pod, bytemuck::Zeroable))]
#[cfg_attr(MODULE, derive(zerocopy_derive::FromBytes, zerocopy_derive::IntoBytes))]
pub struct hmm_gpu_atomic {
    /// In: where the word is; a multiple of `bytes`.
    pub addr: u64,
    /// In: what the operation takes.
    pub operand: u64,
    /// In: with `CMPXCHG`, what the word must be; zero otherwise.
    pub compare: u64,
    /// Out: what the word was before.
    pub old: u64,
    /// In: `HMM_GPU_ATOMIC_*`.
    pub op: u32,
    /// In: 4 or 8.
    pub bytes: u32,
    /// In: `HMM_GPU_POLICY_MAP` (where the page lies) or `HMM_GPU_POLICY_MIGRATE` (move it to the device
    /// if it can be).
    pub policy: u32,
    /// In: must be zero.
    pub flags: u32,
    /// Out: how many times the device had no entry that allowed it.
    pub faults: u64,
    /// In: must be zero.
    pub reserved: [u64; 3],
}

/// `_IOWR(0xE8, nr, size)` of `<linux/ioctl.h>`.
const fn iowr(nr: u32, size: usize) -> u32 {
    (3 << 30) | ((size as u32) << 16) | (0xE8 << 8) | nr
}

const _: () = assert!(HMM_GPU_QUERY == iowr(0, size_of::<hmm_gpu_query>()));
const _: () = assert!(HMM_GPU_MIGRATE == iowr(1, size_of::<hmm_gpu_migrate>()));
const _: () = assert!(HMM_GPU_RESIDENCY == iowr(2, size_of::<hmm_gpu_residency>()));
const _: () = assert!(HMM_GPU_COUNTERS == iowr(3, size_of::<hmm_gpu_counters>()));
const _: () = assert!(HMM_GPU_MIRROR == iowr(4, size_of::<hmm_gpu_mirror>()));
const _: () = assert!(HMM_GPU_ACCESS == iowr(5, size_of::<hmm_gpu_access>()));
const _: () = assert!(HMM_GPU_FAULT == iowr(6, size_of::<hmm_gpu_fault>()));
const _: () = assert!(HMM_GPU_SNAPSHOT == iowr(7, size_of::<hmm_gpu_snapshot>()));
const _: () = assert!(HMM_GPU_ATOMIC == iowr(8, size_of::<hmm_gpu_atomic>()));

/// No advice is left. The value is 0.
pub const HMM_GPU_ADVICE_RESET: u32 = 0;
/// Where the range is best: the value is `HMM_GPU_LOCATION_*`. Device faults move it to the device or leave it in
/// system memory, whatever their policy says, and whether it bounces or not.
pub const HMM_GPU_ADVICE_LOCATION: u32 = 1;
/// With value 1, the range is read much more than written: it stays in system memory, and the entries that devices get
/// for reading allow no writing. With value 0, not so.
pub const HMM_GPU_ADVICE_READ_MOSTLY: u32 = 2;
/// With value 1, the range does not go to the device, by `MIGRATE` neither, which counts it as skipped. What is there
/// stays. With value 0, not so.
pub const HMM_GPU_ADVICE_NO_MIGRATE: u32 = 3;
/// How much device faults move together: the value is a number of bytes, a power of two from 4096 to 2 MiB; what is moved
/// is aligned to it. With value 0, just what is named.
pub const HMM_GPU_ADVICE_GRANULARITY: u32 = 4;

/// Wherever it is used.
pub const HMM_GPU_LOCATION_NONE: u64 = 0;
/// System memory.
pub const HMM_GPU_LOCATION_SYSTEM: u64 = 1;
/// The device's VRAM.
pub const HMM_GPU_LOCATION_DEVICE: u64 = 2;

/// Says what is known of `[addr, addr + len)`, of which all must be mapped. Moves nothing: it changes what later calls and
/// faults do.
///
/// Advice is a hint: it is never needed for what a program reads. It is the file's own, as its mirror is: it ends when the
/// file is closed or the range unmapped (`munmap`, `mremap`, `mmap` over it), and a forked child, which has to open the device
/// anew, has none. One advice does not replace another, but for its own kind.
///
/// Errors: `EINVAL` (unaligned, empty or wrapping range, unknown advice, value or flag, reserved field not zero), `EFAULT` (the
/// range leaves user space, or not all of it is mapped), `E2BIG` (more than 1024 ranges of the file would have advice of their
/// own), `ENOMEM`, `EINTR`, `ENODEV`, `EPERM`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[cfg_attr(not(MODULE), derive(bytemuck::Pod, bytemuck::Zeroable))]
#[cfg_attr(MODULE, derive(zerocopy_derive::FromBytes, zerocopy_derive::IntoBytes))]
pub struct hmm_gpu_advise {
    /// In: first byte of the range, page aligned.
    pub addr: u64,
    /// In: bytes, page aligned, not zero.
    pub len: u64,
    /// In: `HMM_GPU_ADVICE_*`.
    pub advice: u32,
    /// In: must be zero.
    pub flags: u32,
    /// In: what goes with the advice.
    pub value: u64,
    /// In: must be zero.
    pub reserved: [u64; 2],
}

/// Makes the file's private pool: blocks of VRAM in a row. From then on all pages that the file's calls bring to the device, and all nodes of
/// its device page table, are in there, and nothing else is; its entries name places in there only.
///
/// What was there before leaves it, and it is zeroed. It stays the file's until that is closed, which is not before its last mapping is gone;
/// then it is zeroed, where nothing is any more, and goes to others when nothing of it is pinned.
///
/// `mmap(2)` with MAP_SHARED and an offset of `offset` or more maps the pool, or a part of it, in the address space that opened the file:
/// byte `n` of the VRAM is byte `n` of the file. It is not inherited by `fork`. Memory of a soft device can be pinned, that of a PCI device
/// cannot. After the device is unbound, touching it is `SIGBUS`. Errors of `mmap`: `ENXIO` (no private pool, or not inside it), `EINVAL`
/// (MAP_PRIVATE, or the file is not open for writing), `EPERM` (another address space, PROT_EXEC), `ENODEV`.
///
/// Only pages of the address space alone come into a private pool: those that are mapped writable there. What it shares copy-on-write with
/// others, and what it may only read, stays where it is, and `MIGRATE` counts it as skipped.
///
/// Errors: `EINVAL` (zero bytes or not a multiple of 2 MiB, flag or reserved field not zero), `EEXIST` (the file has a pool), `EBUSY` (the file
/// has taken VRAM already, or its pool is being made), `ENOSPC` (more than the module parameter `pool_share` lets private pools have together, more than 64
/// pools, or no blocks in a row could be emptied), `EOPNOTSUPP` (device-coherent memory), `ENOMEM`, `EINTR`, `ENODEV`, `EPERM`; and `EFAULT` where the
/// answer cannot be written: then the file has its pool all the same.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[cfg_attr(not(MODULE), derive(bytemuck::Pod, bytemuck::Zeroable))]
#[cfg_attr(MODULE, derive(zerocopy_derive::FromBytes, zerocopy_derive::IntoBytes))]
pub struct hmm_gpu_pool {
    /// In: must be zero.
    pub flags: u64,
    /// In: its size in bytes, a multiple of 2 MiB, not zero.
    pub bytes: u64,
    /// Out: where in the VRAM it begins, in bytes; a multiple of 2 MiB.
    pub offset: u64,
    /// In: must be zero.
    pub reserved: [u64; 3],
}

/// Begins an execution.
pub const HMM_GPU_EXECUTE_BEGIN: u32 = 0;
/// Ends it.
pub const HMM_GPU_EXECUTE_END: u32 = 1;
/// Tells what has become of it.
pub const HMM_GPU_EXECUTE_QUERY: u32 = 2;

/// The latest deadline of an execution, in milliseconds from its beginning.
pub const HMM_GPU_MAX_DEADLINE_MS: u32 = 10000;

/// It has ended, and everybody has waited for it who had to.
pub const HMM_GPU_EXECUTION_ENDED: u32 = 0;
/// It runs.
pub const HMM_GPU_EXECUTION_RUNNING: u32 = 1;
/// Its deadline has passed while somebody waited for it, or who waited was killed: what it wrote since may be lost, or seen by a forked child.
pub const HMM_GPU_EXECUTION_LOST: u32 = 2;

/// Begins or ends an execution: a stretch of time in which GPU work may use the file's private pool, and any entry that its device page table
/// has had in it. One at a time.
///
/// Meanwhile no page leaves the pool, and what is freed there is not used again. What unmaps memory does not wait. `fork`, `mprotect` of what
/// is mapped for the device, a touch of a page in the pool by the CPU (at its address, not in the mapping), unbind and sleep wait for the end, at
/// most until the deadline: then the execution is lost, and they go on. Nobody who only can make room waits: a full pool is `ENOSPC`.
///
/// `BEGIN` waits until nobody changes the address space. `END` does not; but what it is called with must not be in VRAM. Closing
/// the file ends an execution too.
///
/// Errors: `EINVAL` (unknown operation or flag, a deadline that is not from 1 to [`HMM_GPU_MAX_DEADLINE_MS`] with `BEGIN`, or not 0 without,
/// reserved field not zero), `ENXIO` (the file has no private pool), `EBUSY` (one runs), `ESRCH` (no such execution, or it has ended), `EINTR`, `ENODEV`,
/// `EPERM`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[cfg_attr(not(MODULE), derive(bytemuck::Pod, bytemuck::Zeroable))]
#[cfg_attr(MODULE, derive(zerocopy_derive::FromBytes, zerocopy_derive::IntoBytes))]
pub struct hmm_gpu_execute {
    /// In: `HMM_GPU_EXECUTE_*`.
    pub op: u32,
    /// In: must be zero.
    pub flags: u32,
    /// In: with `BEGIN`, how long others wait for it at most, in milliseconds from now; zero otherwise.
    pub deadline_ms: u32,
    /// Out: `HMM_GPU_EXECUTION_*`.
    pub state: u32,
    /// Its number. Out of `BEGIN`, in of the others.
    pub id: u64,
    /// In: must be zero.
    pub reserved: [u64; 3],
}

const _: () = assert!(HMM_GPU_POOL == iowr(10, size_of::<hmm_gpu_pool>()));
const _: () = assert!(HMM_GPU_EXECUTE == iowr(11, size_of::<hmm_gpu_execute>()));

/// The most moves that a file may have queued, under way, or ended and not read.
pub const HMM_GPU_MAX_PREFETCHES: u32 = 64;

/// Queues what `MIGRATE` would do, and returns at once. A file's moves are made one after the other, in the order of these calls.
///
/// When one has ended the file is readable (`poll`, `epoll`, `select`), and `read(2)` takes a [`hmm_gpu_completion`] for each, as many
/// as fit into its buffer (less than one is `EINVAL`). It waits for the first one unless the file is `O_NONBLOCK` (then `EAGAIN`); with
/// nothing queued or under way it returns 0. It is `EPERM` as calls are. After the device is unbound, what was queued ends with `ENODEV`,
/// which can be read as ever; `poll` says `POLLHUP`, and a read of nothing is `ENODEV`.
///
/// Closing the file drops what is queued, and waits for what is under way, which ends within 2 MiB of its range. So does what is under
/// way when the process ends or becomes another program: nobody waits for the rest of it.
///
/// Errors: `EINVAL` (unaligned, empty or wrapping range, unknown target or flag, reserved field not zero), `EFAULT` (the range leaves
/// user space), `EAGAIN` (there are [`HMM_GPU_MAX_PREFETCHES`]: read some), `ENOMEM`, `EINTR`, `ENODEV`, `EPERM`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[cfg_attr(not(MODULE), derive(bytemuck::Pod, bytemuck::Zeroable))]
#[cfg_attr(MODULE, derive(zerocopy_derive::FromBytes, zerocopy_derive::IntoBytes))]
pub struct hmm_gpu_prefetch {
    /// In: first byte of the range, page aligned.
    pub addr: u64,
    /// In: bytes, page aligned, not zero.
    pub len: u64,
    /// In: what the completion is to be known by. Any value.
    pub cookie: u64,
    /// In: `HMM_GPU_TARGET_*`.
    pub target: u32,
    /// In: must be zero.
    pub flags: u32,
    /// In: must be zero.
    pub reserved: [u64; 2],
}

/// What became of a `PREFETCH`: what `read(2)` takes from the file. It does not grow.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[cfg_attr(not(MODULE), derive(bytemuck::Pod, bytemuck::Zeroable))]
#[cfg_attr(MODULE, derive(zerocopy_derive::FromBytes, zerocopy_derive::IntoBytes))]
pub struct hmm_gpu_completion {
    /// As it was given.
    pub cookie: u64,
    /// As it was given.
    pub addr: u64,
    /// As it was given.
    pub len: u64,
    /// As it was given.
    pub target: u32,
    /// Zero, or an errno, positive: as of `MIGRATE`, and `ECANCELED` if the process was ending.
    pub error: u32,
    /// How far it came, in bytes from `addr`.
    pub done_bytes: u64,
    /// As of `MIGRATE`; the four add up to `done_bytes`.
    pub moved_bytes: u64,
    /// As of `MIGRATE`.
    pub already_bytes: u64,
    /// As of `MIGRATE`.
    pub skipped_bytes: u64,
    /// As of `MIGRATE`.
    pub unmapped_bytes: u64,
    /// Zero.
    pub reserved: u64,
}

const _: () = assert!(HMM_GPU_PREFETCH == iowr(12, size_of::<hmm_gpu_prefetch>()));
const _: () = assert!(size_of::<hmm_gpu_completion>() == 80);

/// Devices that clients have made of dma-bufs, on a host.
pub const HMM_GPU_MAX_IMPORTS: u32 = 8;

/// Makes a device of the first `bytes` bytes of a dma-buf: what another driver exports, which is VRAM for this one from then on, with device-private
/// pages as that of any other. So memory that Vulkan has allocated and exported can be what a process's pages are in, and the GPU of another driver reaches
/// them there.
///
/// The answer is a file (close-on-exec) on the new device: the only one, for it has no node. It is a client as any other, of this address space, and all of the
/// VRAM is its private pool already, from offset 0 on; `mmap` of it is `EOPNOTSUPP`, since the dma-buf's own exporter maps it. What the dma-buf held before
/// is lost: it is zeroed. Whoever else has the dma-buf reads and writes what is in it, as with a pool that is mapped, and the driver believes none of it.
///
/// The device goes when the file is closed, a moment later; when the device that this was called on is unbound; and before the host sleeps what is in it
/// goes to system memory. The dma-buf is held, and mapped by its exporter (`dma_buf_vmap`), which keeps it where it is, until then; then it is zeroed. The driver
/// reaches it as memory: an exporter that needs `begin_cpu_access` for each access is not served well.
///
/// Errors: `EINVAL` (zero bytes or not a multiple of 2 MiB, more than the dma-buf has, no dma-buf, flag or reserved field not zero), `EBADF` (no such file
/// descriptor), `EACCES` (the dma-buf may not be written to), `EOPNOTSUPP` (its exporter has no `vmap`; the module parameter `import_mib` is 0; the
/// device is such a device itself, or device-coherent), `EBUSY` (the dma-buf is such a device already, or was until a moment ago), `ENOSPC` (more than `import_mib` MiB in all, more than [`HMM_GPU_MAX_IMPORTS`], or no number is free), `EMFILE`, `ENOMEM`,
/// `EINTR`, `ENODEV`, `EPERM`; and those of the exporter.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[cfg_attr(not(MODULE), derive(bytemuck::Pod, bytemuck::Zeroable))]
#[cfg_attr(MODULE, derive(zerocopy_derive::FromBytes, zerocopy_derive::IntoBytes))]
pub struct hmm_gpu_import {
    /// In: must be zero.
    pub flags: u32,
    /// In: the file descriptor of the dma-buf. It may be closed afterwards.
    pub dma_buf: i32,
    /// In: how much of it, in bytes from its start: a multiple of 2 MiB, not zero.
    pub bytes: u64,
    /// Out: the file descriptor of the new device.
    pub fd: u32,
    /// Out: the number of the new device.
    pub unit: u32,
    /// In: must be zero.
    pub reserved: [u64; 3],
}

const _: () = assert!(HMM_GPU_IMPORT == iowr(13, size_of::<hmm_gpu_import>()));
