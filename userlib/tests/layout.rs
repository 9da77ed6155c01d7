//! The interface's structures, byte for byte, as version 1 fixed them: programs built against it must go on working.
//!
//! Catches a field that moved, changed its size, or was put anywhere but at the end.

use std::mem::offset_of;

use hmm_gpu::uapi::{hmm_gpu_counters, hmm_gpu_migrate, hmm_gpu_query, hmm_gpu_residency};

/// Asserts where each field begins. Fields follow each other without gaps, so this fixes their sizes too.
macro_rules! layout {
    ($name:ident: $size:literal bytes, $($field:ident at $offset:literal),* $(,)?) => {
        assert_eq!(size_of::<$name>(), $size, concat!("size of ", stringify!($name)));
        assert_eq!(align_of::<$name>(), 8, concat!("alignment of ", stringify!($name)));
        $(assert_eq!(
            offset_of!($name, $field),
            $offset,
            concat!(stringify!($name), ".", stringify!($field))
        );)*
    };
}

#[test]
fn query_is_as_version_1_fixed_it() {
    layout!(hmm_gpu_query: 96 bytes,
        flags at 0, version at 4, capabilities at 8, unit at 16, source at 20, form at 24, pci_domain at 28,
        pci_bdf at 32, block_bytes at 36, vram_bytes at 40, vram_free_bytes at 48, reserved at 56);
}

#[test]
fn migrate_is_as_version_1_fixed_it() {
    layout!(hmm_gpu_migrate: 80 bytes,
        addr at 0, len at 8, target at 16, flags at 20, done_bytes at 24, moved_bytes at 32, already_bytes at 40,
        skipped_bytes at 48, unmapped_bytes at 56, reserved at 64);
}

#[test]
fn residency_is_as_version_1_fixed_it() {
    layout!(hmm_gpu_residency: 48 bytes,
        addr at 0, len at 8, bytes_ptr at 16, flags at 24, reserved at 32);
}

#[test]
fn counters_are_as_version_1_fixed_them() {
    layout!(hmm_gpu_counters: 160 bytes,
        flags at 0, live_pages at 8, allocated_pages at 16, freed_pages at 24, to_device_pages at 32,
        populated_pages at 40, to_system_pages at 48, fault_back_pages at 56, evicted_pages at 64, cpu_faults at 72,
        cpu_fault_retries at 80, skipped_pages at 88, vram_failures at 96, system_failures at 104, reserved at 112);
}
