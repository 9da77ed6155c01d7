// SPDX-License-Identifier: GPL-2.0
/* The trace events, for Rust to call. */

#define CREATE_TRACE_POINTS
#include "trace.h"

void hmm_gpu_trace_migrate(const struct hmm_gpu_migration *migration)
{
	trace_hmm_gpu_migrate(migration);
}

void hmm_gpu_trace_cpu_fault(u32 unit, u64 addr, u32 order, enum hmm_gpu_fault_outcome outcome)
{
	trace_hmm_gpu_cpu_fault(unit, addr, order, outcome);
}

void hmm_gpu_trace_device_fault(u32 unit, u64 addr, u32 device, u32 system, u32 failed)
{
	trace_hmm_gpu_device_fault(unit, addr, device, system, failed);
}

void hmm_gpu_trace_evict(u32 unit, u64 offset, u64 moved, u64 needed)
{
	trace_hmm_gpu_evict(unit, offset, moved, needed);
}

void hmm_gpu_trace_bounce(u32 unit, u64 addr, bool stays)
{
	trace_hmm_gpu_bounce(unit, addr, stays);
}

void hmm_gpu_trace_bind(u32 unit, u64 start, u64 bytes, bool bound)
{
	trace_hmm_gpu_bind(unit, start, bytes, bound);
}
