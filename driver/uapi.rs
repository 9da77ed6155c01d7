// SPDX-License-Identifier: (GPL-2.0 WITH Linux-syscall-note) OR MIT OR Apache-2.0

//! The user interface of `/dev/hmm_gpuN`: the one definition.
//!
//! The module and the crate `hmm-gpu` both compile this file; `hmm_gpu.h` for other languages is
//! generated from it.
//!
//! Rules that hold for every call:
//!
//! - Lengths are bytes. Addresses and lengths are multiples of [`HMM_GPU_PAGE_BYTES`], or the call
//!   says `EINVAL`.
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
pub const HMM_GPU_VERSION: u32 = 1;

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
pub const HMM_GPU_COUNTERS: u32 = 0xC0A0_E803;

/// `MIGRATE` is there.
pub const HMM_GPU_CAP_MIGRATE: u64 = 0x1;
/// `RESIDENCY` is there.
pub const HMM_GPU_CAP_RESIDENCY: u64 = 0x2;
/// `COUNTERS` is there.
pub const HMM_GPU_CAP_COUNTERS: u64 = 0x4;
/// Pages come back by themselves when the CPU touches them.
pub const HMM_GPU_CAP_FAULT_BACK: u64 = 0x8;

/// The VRAM is system memory that stands in for a GPU's.
pub const HMM_GPU_SOURCE_SOFT: u32 = 1;
/// The VRAM is a memory BAR of a PCI device.
pub const HMM_GPU_SOURCE_PCI: u32 = 2;

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
/// The range may span several mappings and holes. Private anonymous memory moves; untouched private
/// anonymous memory becomes zeroed pages at a device target and is left alone at a system target.
/// Everything else is skipped and counted as such.
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
    /// access, pages that were pinned, busy or merged by KSM, and, at a device target, pages on
    /// another device.
    pub skipped_bytes: u64,
    /// Out: bytes of the range at which nothing is mapped.
    pub unmapped_bytes: u64,
    /// In: must be zero.
    pub reserved: [u64; 2],
}

/// Nothing is mapped, or the page was never touched, or it is swapped out, or it cannot be read.
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

/// What a device has done since it was bound, in pages unless a name says otherwise. All but
/// `flags` and `reserved` are written by the driver. `allocated_pages` = `freed_pages` +
/// `live_pages` whenever nothing is under way.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[cfg_attr(not(MODULE), derive(bytemuck::Pod, bytemuck::Zeroable))]
#[cfg_attr(MODULE, derive(zerocopy_derive::FromBytes, zerocopy_derive::IntoBytes))]
pub struct hmm_gpu_counters {
    /// In: must be zero.
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
    /// Left where they were by a request: what `skipped_bytes` counts.
    pub skipped_pages: u64,
    /// Moves that found no VRAM.
    pub vram_failures: u64,
    /// Moves that found no system memory.
    pub system_failures: u64,
    /// In: must be zero.
    pub reserved: [u64; 6],
}

/// `_IOWR(0xE8, nr, size)` of `<linux/ioctl.h>`.
const fn iowr(nr: u32, size: usize) -> u32 {
    (3 << 30) | ((size as u32) << 16) | (0xE8 << 8) | nr
}

const _: () = assert!(HMM_GPU_QUERY == iowr(0, size_of::<hmm_gpu_query>()));
const _: () = assert!(HMM_GPU_MIGRATE == iowr(1, size_of::<hmm_gpu_migrate>()));
const _: () = assert!(HMM_GPU_RESIDENCY == iowr(2, size_of::<hmm_gpu_residency>()));
const _: () = assert!(HMM_GPU_COUNTERS == iowr(3, size_of::<hmm_gpu_counters>()));
