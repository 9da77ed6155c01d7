/* SPDX-License-Identifier: GPL-2.0 */
#undef TRACE_SYSTEM
#define TRACE_SYSTEM hmm_gpu

#if !defined(_HMM_GPU_TRACE_H) || defined(TRACE_HEADER_MULTI_READ)
#define _HMM_GPU_TRACE_H

#include <linux/tracepoint.h>

#include "bindings.h"

#ifndef HMM_GPU_CAUSES
#define HMM_GPU_CAUSES \
	{ HMM_GPU_REQUEST_TO_DEVICE, "request to device" }, \
	{ HMM_GPU_DEVICE_FAULT, "device fault" }, \
	{ HMM_GPU_REQUEST_TO_SYSTEM, "request to system" }, \
	{ HMM_GPU_CPU_FAULT, "cpu fault" }, \
	{ HMM_GPU_PRESSURE, "pressure" }, \
	{ HMM_GPU_EVICT, "unbind or sleep" }
#define HMM_GPU_OUTCOMES \
	{ HMM_GPU_FAULT_RETRY, "retry" }, \
	{ HMM_GPU_FAULT_OOM, "oom" }, \
	{ HMM_GPU_FAULT_SIGBUS, "sigbus" }, \
	{ HMM_GPU_FAULT_LATER, "later" }
#endif

/* So that programs that read the formats (trace-cmd, perf) know the numbers. */
TRACE_DEFINE_ENUM(HMM_GPU_REQUEST_TO_DEVICE);
TRACE_DEFINE_ENUM(HMM_GPU_DEVICE_FAULT);
TRACE_DEFINE_ENUM(HMM_GPU_REQUEST_TO_SYSTEM);
TRACE_DEFINE_ENUM(HMM_GPU_CPU_FAULT);
TRACE_DEFINE_ENUM(HMM_GPU_PRESSURE);
TRACE_DEFINE_ENUM(HMM_GPU_EVICT);
TRACE_DEFINE_ENUM(HMM_GPU_FAULT_RETRY);
TRACE_DEFINE_ENUM(HMM_GPU_FAULT_OOM);
TRACE_DEFINE_ENUM(HMM_GPU_FAULT_SIGBUS);
TRACE_DEFINE_ENUM(HMM_GPU_FAULT_LATER);

/* One batch of pages, through all steps. addr is 0 where pages move wherever they are mapped. */
TRACE_EVENT(hmm_gpu_migrate,
	TP_PROTO(const struct hmm_gpu_migration *migration),
	TP_ARGS(migration),
	TP_STRUCT__entry(
		__field(u32, unit)
		__field(u32, cause)
		__field(u64, addr)
		__field(u64, pages)
		__field(u64, moved)
		__field(u64, stuck)
		__field(bool, no_memory)
		__field(u64, setup_ns)
		__field(u64, copy_ns)
		__field(u64, pages_ns)
		__field(u64, finalize_ns)
	),
	TP_fast_assign(
		__entry->unit = migration->unit;
		__entry->cause = migration->cause;
		__entry->addr = migration->addr;
		__entry->pages = migration->pages;
		__entry->moved = migration->moved;
		__entry->stuck = migration->stuck;
		__entry->no_memory = migration->no_memory;
		__entry->setup_ns = migration->setup_ns;
		__entry->copy_ns = migration->copy_ns;
		__entry->pages_ns = migration->pages_ns;
		__entry->finalize_ns = migration->finalize_ns;
	),
	TP_printk("hmm_gpu%u %s: addr=%#llx pages=%llu moved=%llu stuck=%llu no_memory=%d setup=%llu copy=%llu pages=%llu finalize=%llu ns",
		  __entry->unit, __print_symbolic(__entry->cause, HMM_GPU_CAUSES), __entry->addr, __entry->pages,
		  __entry->moved, __entry->stuck, __entry->no_memory, __entry->setup_ns, __entry->copy_ns,
		  __entry->pages_ns, __entry->finalize_ns)
);

TRACE_EVENT(hmm_gpu_cpu_fault,
	TP_PROTO(u32 unit, u64 addr, u32 order, enum hmm_gpu_fault_outcome outcome),
	TP_ARGS(unit, addr, order, outcome),
	TP_STRUCT__entry(
		__field(u32, unit)
		__field(u64, addr)
		__field(u32, order)
		__field(u32, outcome)
	),
	TP_fast_assign(
		__entry->unit = unit;
		__entry->addr = addr;
		__entry->order = order;
		__entry->outcome = outcome;
	),
	TP_printk("hmm_gpu%u addr=%#llx order=%u: %s", __entry->unit, __entry->addr, __entry->order,
		  __print_symbolic(__entry->outcome, HMM_GPU_OUTCOMES))
);

/* The faults in one window of 2 MiB that were serviced together. In pages. */
TRACE_EVENT(hmm_gpu_device_fault,
	TP_PROTO(u32 unit, u64 addr, u32 device, u32 system, u32 failed),
	TP_ARGS(unit, addr, device, system, failed),
	TP_STRUCT__entry(
		__field(u32, unit)
		__field(u64, addr)
		__field(u32, device)
		__field(u32, system)
		__field(u32, failed)
	),
	TP_fast_assign(
		__entry->unit = unit;
		__entry->addr = addr;
		__entry->device = device;
		__entry->system = system;
		__entry->failed = failed;
	),
	TP_printk("hmm_gpu%u window=%#llx device=%u system=%u failed=%u", __entry->unit, __entry->addr,
		  __entry->device, __entry->system, __entry->failed)
);

/* A block of VRAM is emptied for others. */
TRACE_EVENT(hmm_gpu_evict,
	TP_PROTO(u32 unit, u64 offset, u64 moved, u64 needed),
	TP_ARGS(unit, offset, moved, needed),
	TP_STRUCT__entry(
		__field(u32, unit)
		__field(u64, offset)
		__field(u64, moved)
		__field(u64, needed)
	),
	TP_fast_assign(
		__entry->unit = unit;
		__entry->offset = offset;
		__entry->moved = moved;
		__entry->needed = needed;
	),
	TP_printk("hmm_gpu%u offset=%#llx moved=%llu needed=%llu pages", __entry->unit, __entry->offset,
		  __entry->moved, __entry->needed)
);

/* A page came back soon, or stays because it did too often. */
TRACE_EVENT(hmm_gpu_bounce,
	TP_PROTO(u32 unit, u64 addr, bool stays),
	TP_ARGS(unit, addr, stays),
	TP_STRUCT__entry(
		__field(u32, unit)
		__field(u64, addr)
		__field(bool, stays)
	),
	TP_fast_assign(
		__entry->unit = unit;
		__entry->addr = addr;
		__entry->stays = stays;
	),
	TP_printk("hmm_gpu%u addr=%#llx %s", __entry->unit, __entry->addr, __entry->stays ? "stays" : "came back")
);

TRACE_EVENT(hmm_gpu_bind,
	TP_PROTO(u32 unit, u64 start, u64 bytes, bool bound),
	TP_ARGS(unit, start, bytes, bound),
	TP_STRUCT__entry(
		__field(u32, unit)
		__field(u64, start)
		__field(u64, bytes)
		__field(bool, bound)
	),
	TP_fast_assign(
		__entry->unit = unit;
		__entry->start = start;
		__entry->bytes = bytes;
		__entry->bound = bound;
	),
	TP_printk("hmm_gpu%u start=%#llx bytes=%llu %s", __entry->unit, __entry->start, __entry->bytes,
		  __entry->bound ? "bound" : "unbound")
);

#endif

#undef TRACE_INCLUDE_PATH
#define TRACE_INCLUDE_PATH .
#undef TRACE_INCLUDE_FILE
#define TRACE_INCLUDE_FILE trace
#include <trace/define_trace.h>
