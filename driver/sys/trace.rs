// SPDX-License-Identifier: GPL-2.0

//! Trace events: `trace.h` says what each has. They cost next to nothing while nobody listens.

use crate::sys::bindings;

pub(crate) use bindings::hmm_gpu_migration as Migration;

/// Why pages move, in a [`Migration`].
#[derive(Clone, Copy)]
pub(crate) enum Cause {
    /// `MIGRATE` asked for it.
    RequestToDevice,
    /// The device touched them.
    DeviceFault,
    /// `MIGRATE` asked for it.
    RequestToSystem,
    /// The CPU touched one.
    CpuFault,
    /// Others need the room.
    Pressure,
    /// The device goes away, or sleeps.
    Evict,
}

impl Cause {
    /// As a [`Migration`] has it.
    pub(crate) fn into_raw(self) -> bindings::hmm_gpu_cause {
        match self {
            Self::RequestToDevice => bindings::hmm_gpu_cause_HMM_GPU_REQUEST_TO_DEVICE,
            Self::DeviceFault => bindings::hmm_gpu_cause_HMM_GPU_DEVICE_FAULT,
            Self::RequestToSystem => bindings::hmm_gpu_cause_HMM_GPU_REQUEST_TO_SYSTEM,
            Self::CpuFault => bindings::hmm_gpu_cause_HMM_GPU_CPU_FAULT,
            Self::Pressure => bindings::hmm_gpu_cause_HMM_GPU_PRESSURE,
            Self::Evict => bindings::hmm_gpu_cause_HMM_GPU_EVICT,
        }
    }
}

/// How a CPU fault ended.
#[derive(Clone, Copy)]
pub(crate) enum Outcome {
    /// The CPU tries again: the page is there, or was busy.
    Retry,
    /// There was no system memory.
    NoMemory,
    /// What the page held cannot be had.
    Lost,
    /// The CPU tries again when others are done.
    Later,
}

/// A batch of pages has moved, or not.
pub(crate) fn migrate(migration: &Migration) {
    // SAFETY: Always fine to call with a valid structure.
    unsafe { bindings::hmm_gpu_trace_migrate(migration) };
}

/// The CPU touched what was on a device: `1 << order` pages.
pub(crate) fn cpu_fault(unit: u32, addr: usize, order: u32, outcome: Outcome) {
    let outcome = match outcome {
        Outcome::Retry => bindings::hmm_gpu_fault_outcome_HMM_GPU_FAULT_RETRY,
        Outcome::NoMemory => bindings::hmm_gpu_fault_outcome_HMM_GPU_FAULT_OOM,
        Outcome::Lost => bindings::hmm_gpu_fault_outcome_HMM_GPU_FAULT_SIGBUS,
        Outcome::Later => bindings::hmm_gpu_fault_outcome_HMM_GPU_FAULT_LATER,
    };
    // CAST: Widens.
    // SAFETY: Always fine to call.
    unsafe { bindings::hmm_gpu_trace_cpu_fault(unit, addr as u64, order, outcome) };
}

/// Faults of a device in the 2 MiB at `addr` were serviced. In pages: mapped in its memory, mapped in system
/// memory, and failed.
pub(crate) fn device_fault(unit: u32, addr: usize, pages: [usize; 3]) {
    // CAST: The address widens, and there are at most 512 pages.
    let [device, system, failed] = pages.map(|pages| pages as u32);
    // SAFETY: Always fine to call.
    unsafe { bindings::hmm_gpu_trace_device_fault(unit, addr as u64, device, system, failed) };
}

/// A block of VRAM was emptied, because so many pages were needed.
pub(crate) fn evict(unit: u32, offset: usize, moved: usize, needed: usize) {
    // CAST: All widen.
    // SAFETY: Always fine to call.
    unsafe { bindings::hmm_gpu_trace_evict(unit, offset as u64, moved as u64, needed as u64) };
}

/// A page came back soon after it had gone to the device, or stays because it did too often.
pub(crate) fn bounce(unit: u32, addr: usize, stays: bool) {
    // CAST: Widens.
    // SAFETY: Always fine to call.
    unsafe { bindings::hmm_gpu_trace_bounce(unit, addr as u64, stays) };
}

/// A device is put to use, or not in use any more.
pub(crate) fn bind(unit: u32, start: u64, bytes: u64, bound: bool) {
    // SAFETY: Always fine to call.
    unsafe { bindings::hmm_gpu_trace_bind(unit, start, bytes, bound) };
}
