/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What the kernel crate's own bindings lack: read by bindgen with the kernel's flags (see Kbuild).
 *
 * The declarations are functions that C has as macros or inline only; helpers.c defines them.
 */
#ifndef HMM_GPU_BINDINGS_H
#define HMM_GPU_BINDINGS_H

#include <linux/anon_inodes.h>
#include <linux/device.h>
#include <linux/dma-buf.h>
#include <linux/fs.h>
#include <linux/hmm.h>
#include <linux/io.h>
#include <linux/ioport.h>
#include <linux/memory_hotplug.h>
#include <linux/memremap.h>
#include <linux/migrate.h>
#include <linux/mm.h>
#include <linux/mmu_notifier.h>
#include <linux/notifier.h>
#include <linux/pci.h>
#include <linux/suspend.h>
#include <linux/vmalloc.h>
#include <linux/wait.h>

/* pages and folios */
void *hmm_gpu_pfn_address(unsigned long pfn);
struct page *hmm_gpu_pfn_to_page(unsigned long pfn);
unsigned long hmm_gpu_page_to_pfn(const struct page *page);
unsigned long hmm_gpu_pfn_index(unsigned long pfn);
unsigned long hmm_gpu_folio_pfn(const struct folio *folio);
unsigned int hmm_gpu_folio_order(const struct folio *folio);
struct folio *hmm_gpu_page_folio(struct page *page);
enum hmm_gpu_effort { HMM_GPU_PAGE_FAULT, HMM_GPU_MAY_FAIL, HMM_GPU_HARD };
struct folio *hmm_gpu_folio_alloc(unsigned int order, enum hmm_gpu_effort effort);
void *hmm_gpu_folio_address(const struct folio *folio);
void hmm_gpu_folio_unlock(struct folio *folio);
void hmm_gpu_folio_put(struct folio *folio);
struct hmm_gpu_source {
	struct dev_pagemap *pgmap; /* NULL: system memory */
	u32 order;
	bool may_move;
};
struct hmm_gpu_source hmm_gpu_source(unsigned long pfn);
struct dev_pagemap *hmm_gpu_folio_pgmap(const struct folio *folio);
struct hmm_gpu_place {
	struct dev_pagemap *pgmap;
	unsigned long pfn; /* of the first page */
	u32 order;
};
struct hmm_gpu_place hmm_gpu_place(const struct folio *folio);
void hmm_gpu_folio_inherit(struct folio *folio, const struct folio *from);
struct folio *hmm_gpu_zone_device_folio_init(unsigned long pfn, struct dev_pagemap *pgmap, unsigned int order);
void hmm_gpu_copy_page(void *to, const void *from);
void hmm_gpu_clear_page(void *to);
void hmm_gpu_wmb(void);
void hmm_gpu_copy(void *to, const void *from, size_t len);
int hmm_gpu_copy_mc(void *to, const void *from, size_t len);
bool hmm_gpu_fault_in_user(unsigned long addr, size_t len);
bool hmm_gpu_copy_to_user_nofault(unsigned long to, const void *from, size_t len);
void hmm_gpu_mark_dirty(unsigned long pfn);
enum hmm_gpu_reach { HMM_GPU_SECRET, HMM_GPU_READABLE, HMM_GPU_DEVICE };
enum hmm_gpu_reach hmm_gpu_reach(unsigned long pfn);
enum hmm_gpu_atomic { HMM_GPU_ADD, HMM_GPU_AND, HMM_GPU_OR, HMM_GPU_XCHG, HMM_GPU_CMPXCHG };
u64 hmm_gpu_atomic(void *word, enum hmm_gpu_atomic op, bool wide, u64 operand, u64 compare);
int hmm_gpu_memory_failure(unsigned long pfn);
bool hmm_gpu_is_zero_pfn(unsigned long pfn);
bool hmm_gpu_is_ksm_pfn(unsigned long pfn);
bool hmm_gpu_is_private_pfn(unsigned long pfn);

/* page maps */
void hmm_gpu_release_mem_region(struct device *dev, resource_size_t start, resource_size_t size);
bool hmm_gpu_is_pagemap(unsigned long pfn);
bool hmm_gpu_overlaps_system_ram(resource_size_t start, size_t size);

/* memory that processes map */
void hmm_gpu_vma_set_up(struct vm_area_struct *vma, bool registers);
vm_fault_t hmm_gpu_insert(struct vm_fault *vmf, unsigned long pfn, bool registers);
struct address_space *hmm_gpu_mapping_get(struct file *file);
void hmm_gpu_mapping_put(struct address_space *mapping);
unsigned long hmm_gpu_vmalloc_pfn(const void *address);
int hmm_gpu_vmalloc_refs(const void *address);

/* waiting */
void hmm_gpu_init_waitqueue(struct wait_queue_head *queue);
void hmm_gpu_wake_all(struct wait_queue_head *queue);
bool hmm_gpu_wait_while(struct wait_queue_head *queue, const u32 *word, u32 value, u64 ns, bool killable);

/* address spaces */
bool hmm_gpu_holds_mmap_lock(struct mm_struct *mm);
bool hmm_gpu_fault_retry(struct vm_fault *vmf);
bool hmm_gpu_fault_nowait(const struct vm_fault *vmf);
void hmm_gpu_fault_unlock(struct vm_fault *vmf);
void hmm_gpu_fault_lock(struct vm_fault *vmf);
size_t hmm_gpu_all_mms(struct mm_struct **mms, size_t room);
bool hmm_gpu_vma_is_anonymous(const struct vm_area_struct *vma);
bool hmm_gpu_vma_may_migrate(const struct vm_area_struct *vma);
bool hmm_gpu_vma_is_shadow_stack(const struct vm_area_struct *vma);
int hmm_gpu_mmap_read_lock_killable(struct mm_struct *mm);
bool hmm_gpu_mmap_read_trylock(struct mm_struct *mm);
int hmm_gpu_mmap_write_lock_killable(struct mm_struct *mm);
void hmm_gpu_mmap_write_unlock(struct mm_struct *mm);
bool hmm_gpu_vma_may_merge(const struct vm_area_struct *vma);
int hmm_gpu_vma_start_write(struct vm_area_struct *vma);
bool hmm_gpu_mm_is_left(struct mm_struct *mm);
void hmm_gpu_mmap_read_unlock(struct mm_struct *mm);
unsigned long hmm_gpu_task_size(void);
int hmm_gpu_mmu_interval_insert(struct mmu_interval_notifier *notifier, struct mm_struct *mm, unsigned long start,
				unsigned long length, const struct mmu_interval_notifier_ops *ops);
void hmm_gpu_mmu_interval_set_seq(struct mmu_interval_notifier *notifier, unsigned long seq);
unsigned long hmm_gpu_mmu_interval_seq(const struct mmu_interval_notifier *notifier);
bool hmm_gpu_mmu_interval_read_retry(struct mmu_interval_notifier *notifier, unsigned long seq);
int hmm_gpu_range_fault(struct hmm_range *range);
int hmm_gpu_make_exclusive(struct mm_struct *mm, unsigned long addr, void *owner, struct folio **folio, unsigned long *pfn);

/* trace events: see trace.h */
enum hmm_gpu_cause {
	HMM_GPU_REQUEST_TO_DEVICE,
	HMM_GPU_DEVICE_FAULT,
	HMM_GPU_REQUEST_TO_SYSTEM,
	HMM_GPU_CPU_FAULT,
	HMM_GPU_PRESSURE,
	HMM_GPU_EVICT,
};
enum hmm_gpu_fault_outcome { HMM_GPU_FAULT_RETRY, HMM_GPU_FAULT_OOM, HMM_GPU_FAULT_SIGBUS, HMM_GPU_FAULT_LATER };
struct hmm_gpu_migration {
	u64 addr;
	u64 pages;
	u64 moved;
	u64 stuck;
	u64 setup_ns;
	u64 copy_ns;
	u64 pages_ns;
	u64 finalize_ns;
	u32 unit;
	enum hmm_gpu_cause cause;
	bool no_memory;
};
void hmm_gpu_trace_migrate(const struct hmm_gpu_migration *migration);
void hmm_gpu_trace_cpu_fault(u32 unit, u64 addr, u32 order, enum hmm_gpu_fault_outcome outcome);
void hmm_gpu_trace_device_fault(u32 unit, u64 addr, u32 device, u32 system, u32 failed);
void hmm_gpu_trace_evict(u32 unit, u64 offset, u64 moved, u64 needed);
void hmm_gpu_trace_bounce(u32 unit, u64 addr, bool stays);
void hmm_gpu_trace_bind(u32 unit, u64 start, u64 bytes, bool bound);

/* files */
enum hmm_gpu_fmode { HMM_GPU_FMODE_WRITE = (__force u32)FMODE_WRITE };
bool hmm_gpu_is_nowait(const struct kiocb *kiocb);

/* other */
void hmm_gpu_sort_pairs(u64 (*pairs)[2], size_t count);
int hmm_gpu_notifier_from_errno(int error);

/* PCI */
unsigned long hmm_gpu_pci_resource_flags(struct pci_dev *pdev, int bar);
bool hmm_gpu_pci_device_is_present(struct pci_dev *pdev);
int hmm_gpu_pci_domain_nr(struct pci_dev *pdev);

#endif
