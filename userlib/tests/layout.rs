//! The interface's structures, byte for byte, as the version that brought them fixed them: programs built against it must go
//! on working.
//!
//! Catches a field that moved, changed its size, or was put anywhere but at the end.

use std::mem::offset_of;

use hmm_gpu::uapi::{
    hmm_gpu_access, hmm_gpu_advise, hmm_gpu_atomic, hmm_gpu_completion, hmm_gpu_counters,
    hmm_gpu_device_fault, hmm_gpu_execute, hmm_gpu_fault, hmm_gpu_import, hmm_gpu_migrate,
    hmm_gpu_mirror, hmm_gpu_pool, hmm_gpu_prefetch, hmm_gpu_query, hmm_gpu_residency,
    hmm_gpu_snapshot,
};

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

/// Version 2 put six fields where version 1 had six reserved words; version 3 has five more, version 4 ten,
/// and version 5 twelve.
#[test]
fn counters_are_as_versions_1_to_5_fixed_them() {
    layout!(hmm_gpu_counters: 376 bytes,
        flags at 0, live_pages at 8, allocated_pages at 16, freed_pages at 24, to_device_pages at 32,
        populated_pages at 40, to_system_pages at 48, fault_back_pages at 56, evicted_pages at 64, cpu_faults at 72,
        cpu_fault_retries at 80, skipped_pages at 88, vram_failures at 96, system_failures at 104,
        device_faults at 112, mapped_pages at 120, invalidations at 128, table_pages at 136, device_read_bytes at 144,
        device_written_bytes at 152, from_other_pages at 160, to_other_pages at 168, large_to_device at 176,
        large_to_system at 184, large_failures at 192, pressure_pages at 200, evictions at 208,
        bounces at 216, kept_pages at 224, around_pages at 232, device_fault_pages at 240, setup_ns at 248,
        copy_ns at 256, pages_ns at 264, finalize_ns at 272, copy_failures at 280, insertion_failures at 288, unused_pages at 296,
        table_pages_taken at 304, faults_in_device at 312, faults_in_system at 320, fault_failures at 328,
        cpu_fault_failures at 336, private_pages at 344, quarantined_pages at 352, executions at 360,
        executions_lost at 368);
}

#[test]
fn mirror_is_as_version_2_fixed_it() {
    layout!(hmm_gpu_mirror: 80 bytes,
        flags at 0, levels at 4, root_offset at 8, nodes at 16, entries at 24, invalidations at 32, reserved at 40);
}

#[test]
fn access_is_as_version_2_fixed_it() {
    layout!(hmm_gpu_access: 96 bytes,
        op at 0, policy at 4, addr at 8, len at 16, buffer_ptr at 24, to_addr at 32, flags at 40, done_bytes at 48,
        faults at 56, fault_addr at 64, entry at 72, reserved at 80);
}

#[test]
fn fault_is_as_version_2_fixed_it() {
    layout!(hmm_gpu_fault: 64 bytes,
        faults_ptr at 0, count at 8, policy at 12, flags at 16, mapped_pages at 24, device_pages at 32, failed_pages at 40,
        reserved at 48);
    layout!(hmm_gpu_device_fault: 16 bytes, addr at 0, access at 8, status at 12);
}

#[test]
fn snapshot_is_as_version_2_fixed_it() {
    layout!(hmm_gpu_snapshot: 48 bytes,
        addr at 0, len at 8, entries_ptr at 16, flags at 24, reserved at 32);
}

#[test]
fn atomic_is_as_version_3_fixed_it() {
    layout!(hmm_gpu_atomic: 80 bytes,
        addr at 0, operand at 8, compare at 16, old at 24, op at 32, bytes at 36, policy at 40, flags at 44, faults at 48,
        reserved at 56);
}

#[test]
fn advise_is_as_version_4_fixed_it() {
    layout!(hmm_gpu_advise: 48 bytes,
        addr at 0, len at 8, advice at 16, flags at 20, value at 24, reserved at 32);
}

#[test]
fn pool_and_execute_are_as_version_5_fixed_them() {
    layout!(hmm_gpu_pool: 48 bytes, flags at 0, bytes at 8, offset at 16, reserved at 24);
    layout!(hmm_gpu_import: 48 bytes, flags at 0, dma_buf at 4, bytes at 8, fd at 16, unit at 20, reserved at 24);
    layout!(hmm_gpu_execute: 48 bytes,
        op at 0, flags at 4, deadline_ms at 8, state at 12, id at 16, reserved at 24);
}

#[test]
fn prefetch_is_as_version_5_fixed_it() {
    layout!(hmm_gpu_prefetch: 48 bytes,
        addr at 0, len at 8, cookie at 16, target at 24, flags at 28, reserved at 32);
    layout!(hmm_gpu_completion: 80 bytes,
        cookie at 0, addr at 8, len at 16, target at 24, error at 28, done_bytes at 32, moved_bytes at 40, already_bytes at 48,
        skipped_bytes at 56, unmapped_bytes at 64, reserved at 72);
}
