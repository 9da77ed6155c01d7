// SPDX-License-Identifier: GPL-2.0
/* Functions of the kernel that C has as macros or inline only, for Rust to call. */

#include "bindings.h"

#include <linux/fs.h>
#include <linux/hugetlb.h>
#include <linux/pagemap.h>
#include <linux/rmap.h>
#include <linux/sched/mm.h>
#include <linux/sched/signal.h>
#include <linux/sched/task.h>
#include <linux/sort.h>
#include <linux/uaccess.h>

void *hmm_gpu_pfn_address(unsigned long pfn)
{
	return page_address(pfn_to_page(pfn));
}

struct page *hmm_gpu_pfn_to_page(unsigned long pfn)
{
	return pfn_to_page(pfn);
}

unsigned long hmm_gpu_page_to_pfn(const struct page *page)
{
	return page_to_pfn(page);
}

unsigned long hmm_gpu_pfn_index(unsigned long pfn)
{
	/* Of a folio that may change: whoever uses this looks whether it is true. */
	return READ_ONCE(((struct folio *)pfn_to_page(pfn))->index);
}

unsigned long hmm_gpu_folio_pfn(const struct folio *folio)
{
	return folio_pfn(folio);
}

unsigned int hmm_gpu_folio_order(const struct folio *folio)
{
	return folio_order(folio);
}

struct folio *hmm_gpu_page_folio(struct page *page)
{
	return page_folio(page);
}

static gfp_t hmm_gpu_gfp(unsigned int order, enum hmm_gpu_effort effort)
{
	gfp_t page = GFP_HIGHUSER_MOVABLE | __GFP_NOWARN;
	gfp_t large = GFP_TRANSHUGE | __GFP_NOWARN;

	switch (effort) {
	case HMM_GPU_PAGE_FAULT:
		return order ? GFP_TRANSHUGE_LIGHT : page;
	case HMM_GPU_MAY_FAIL:
		return order ? large | __GFP_NORETRY : page | __GFP_RETRY_MAYFAIL;
	default:
		return (order ? large : page) | __GFP_RETRY_MAYFAIL;
	}
}

/* A folio that is locked: nobody else knows it yet. */
struct folio *hmm_gpu_folio_alloc(unsigned int order, enum hmm_gpu_effort effort)
{
	struct folio *folio = folio_alloc(hmm_gpu_gfp(order, effort), order);

	if (folio)
		__folio_set_locked(folio);
	return folio;
}

void *hmm_gpu_folio_address(const struct folio *folio)
{
	return folio_address(folio);
}

void hmm_gpu_folio_unlock(struct folio *folio)
{
	folio_unlock(folio);
}

void hmm_gpu_folio_put(struct folio *folio)
{
	folio_put(folio);
}

/* All that is asked of a page that a migration has, in one call: it is asked several times of every page. */
struct hmm_gpu_source hmm_gpu_source(unsigned long pfn)
{
	struct folio *folio = page_folio(pfn_to_page(pfn));
	bool device = folio_is_device_private(folio) || folio_is_device_coherent(folio);

	return (struct hmm_gpu_source) {
		.pgmap = device ? folio->pgmap : NULL,
		.order = folio_order(folio),
		.may_move = device || (folio_test_anon(folio) && !folio_test_ksm(folio)),
	};
}

struct dev_pagemap *hmm_gpu_folio_pgmap(const struct folio *folio)
{
	return folio->pgmap;
}

struct hmm_gpu_place hmm_gpu_place(const struct folio *folio)
{
	return (struct hmm_gpu_place) {
		.pgmap = folio->pgmap,
		.pfn = folio_pfn(folio),
		.order = folio_order(folio),
	};
}

void hmm_gpu_folio_inherit(struct folio *folio, const struct folio *from)
{
	folio->pgmap = from->pgmap;
	folio->page.mapping = from->page.mapping;
}

/* The page is the head of the folio to be made, and a head page is at its folio's address. What folio it was part of before does not matter. */
struct folio *hmm_gpu_zone_device_folio_init(unsigned long pfn, struct dev_pagemap *pgmap, unsigned int order)
{
	struct folio *folio = (struct folio *)pfn_to_page(pfn);

	zone_device_folio_init(folio, pgmap, order);
	return folio;
}

void hmm_gpu_copy_page(void *to, const void *from)
{
	copy_page(to, (void *)from);
}

void hmm_gpu_clear_page(void *to)
{
	clear_page(to);
}

void hmm_gpu_copy(void *to, const void *from, size_t len)
{
	memcpy(to, from, len);
}

int hmm_gpu_copy_mc(void *to, const void *from, size_t len)
{
	return copy_mc_to_kernel(to, from, len) ? -EHWPOISON : 0;
}

bool hmm_gpu_fault_in_user(unsigned long addr, size_t len)
{
	/* Not fault_in_writeable, which writes: a process may have its memory be read to itself. */
	return !fault_in_safe_writeable((char __user *)addr, len);
}

bool hmm_gpu_copy_to_user_nofault(unsigned long to, const void *from, size_t len)
{
	return !copy_to_user_nofault((void __user *)to, from, len);
}

void hmm_gpu_mark_dirty(unsigned long pfn)
{
	folio_mark_dirty(page_folio(pfn_to_page(pfn)));
}

enum hmm_gpu_reach hmm_gpu_reach(unsigned long pfn)
{
	struct page *page = pfn_to_page(pfn);
	char byte;

	if (is_device_private_page(page))
		return HMM_GPU_DEVICE;
	/*
	 * The memory of a secret file has no direct mapping. What need not be read to know is not: a machine check here would
	 * not be survived.
	 */
	if (folio_test_anon(page_folio(page)) || is_zero_pfn(pfn))
		return HMM_GPU_READABLE;
	if (copy_from_kernel_nofault(&byte, page_address(page), sizeof(byte)))
		return HMM_GPU_SECRET;
	return HMM_GPU_READABLE;
}

static u64 atomic_wide(atomic64_t *word, enum hmm_gpu_atomic op, u64 operand, u64 compare)
{
	switch (op) {
	case HMM_GPU_ADD:
		return atomic64_fetch_add(operand, word);
	case HMM_GPU_AND:
		return atomic64_fetch_and(operand, word);
	case HMM_GPU_OR:
		return atomic64_fetch_or(operand, word);
	case HMM_GPU_XCHG:
		return atomic64_xchg(word, operand);
	default:
		return atomic64_cmpxchg(word, compare, operand);
	}
}

static u32 atomic_narrow(atomic_t *word, enum hmm_gpu_atomic op, u32 operand, u32 compare)
{
	switch (op) {
	case HMM_GPU_ADD:
		return atomic_fetch_add(operand, word);
	case HMM_GPU_AND:
		return atomic_fetch_and(operand, word);
	case HMM_GPU_OR:
		return atomic_fetch_or(operand, word);
	case HMM_GPU_XCHG:
		return atomic_xchg(word, operand);
	default:
		return atomic_cmpxchg(word, compare, operand);
	}
}

u64 hmm_gpu_atomic(void *word, enum hmm_gpu_atomic op, bool wide, u64 operand, u64 compare)
{
	return wide ? atomic_wide(word, op, operand, compare) : atomic_narrow(word, op, operand, compare);
}

int hmm_gpu_memory_failure(unsigned long pfn)
{
#ifdef CONFIG_MEMORY_FAILURE
	/* The memory itself is good: an administrator may have it back (hwpoison_inject's unpoison-pfn). */
	return memory_failure(pfn, MF_SW_SIMULATED);
#else
	return -ENXIO;
#endif
}

bool hmm_gpu_is_zero_pfn(unsigned long pfn)
{
	return is_zero_pfn(pfn);
}

/* Of a page that was mapped a moment ago: a hint, unless that is so still. */
bool hmm_gpu_is_ksm_pfn(unsigned long pfn)
{
	/* KSM merges single pages. What is the mapping of those is something else in the tail of a folio. */
	return pfn_valid(pfn) && !PageCompound(pfn_to_page(pfn)) && folio_test_ksm((struct folio *)pfn_to_page(pfn));
}

bool hmm_gpu_is_private_pfn(unsigned long pfn)
{
	struct dev_pagemap *pgmap = get_dev_pagemap(pfn);
	bool private = pgmap && pgmap->type == MEMORY_DEVICE_PRIVATE;

	put_dev_pagemap(pgmap);
	return private;
}

static int compare_pairs(const void *first, const void *second)
{
	const u64 *a = first, *b = second;

	return a[0] == b[0] ? cmp_int(a[1], b[1]) : cmp_int(a[0], b[0]);
}

void hmm_gpu_sort_pairs(u64 (*pairs)[2], size_t count)
{
	sort(pairs, count, sizeof(*pairs), compare_pairs, NULL);
}

int hmm_gpu_notifier_from_errno(int error)
{
	return notifier_from_errno(error);
}

void hmm_gpu_wmb(void)
{
	wmb();
}

void hmm_gpu_release_mem_region(struct device *dev, resource_size_t start, resource_size_t size)
{
	devm_release_mem_region(dev, start, size);
}

bool hmm_gpu_is_pagemap(unsigned long pfn)
{
	struct dev_pagemap *pgmap = get_dev_pagemap(pfn);

	put_dev_pagemap(pgmap);
	return pgmap;
}

bool hmm_gpu_overlaps_system_ram(resource_size_t start, size_t size)
{
	return region_intersects(start, size, IORESOURCE_SYSTEM_RAM, IORES_DESC_NONE) != REGION_DISJOINT;
}

void hmm_gpu_vma_set_up(struct vm_area_struct *vma, bool registers)
{
	/* With VM_MIXEDMAP and VM_PFNMAP, MADV_DOFORK does not take VM_DONTCOPY away. */
	vm_flags_set(vma, VM_DONTCOPY | VM_DONTEXPAND | VM_DONTDUMP | (registers ? VM_IO | VM_PFNMAP : VM_MIXEDMAP));
	if (registers)
		vma->vm_page_prot = pgprot_writecombine(vma->vm_page_prot);
}

vm_fault_t hmm_gpu_insert(struct vm_fault *vmf, unsigned long pfn, bool registers)
{
	if (registers)
		return vmf_insert_pfn(vmf->vma, vmf->address, pfn);
	return vmf_insert_page_mkwrite(vmf, pfn_to_page(pfn), vmf->flags & FAULT_FLAG_WRITE);
}

struct address_space *hmm_gpu_mapping_get(struct file *file)
{
	ihold(file->f_mapping->host);
	return file->f_mapping;
}

void hmm_gpu_mapping_put(struct address_space *mapping)
{
	iput(mapping->host);
}

unsigned long hmm_gpu_vmalloc_pfn(const void *address)
{
	return vmalloc_to_pfn(address);
}

/* One is vmalloc's own. */
int hmm_gpu_vmalloc_refs(const void *address)
{
	return page_count(vmalloc_to_page(address)) - 1;
}

void hmm_gpu_init_waitqueue(struct wait_queue_head *queue)
{
	init_waitqueue_head(queue);
}

void hmm_gpu_wake_all(struct wait_queue_head *queue)
{
	wake_up_all(queue);
}

/* Whether the task was killed. */
bool hmm_gpu_wait_while(struct wait_queue_head *queue, const u32 *word, u32 value, u64 ns, bool killable)
{
	unsigned long timeout = nsecs_to_jiffies(ns) + 1;

	if (killable)
		return wait_event_killable_timeout(*queue, READ_ONCE(*word) != value, timeout) < 0;
	wait_event_timeout(*queue, READ_ONCE(*word) != value, timeout);
	return false;
}

/* Whether this very task has the lock for writing. */
bool hmm_gpu_holds_mmap_lock(struct mm_struct *mm)
{
#ifdef CONFIG_PREEMPT_RT
	/* Who has it is not to be seen from here. */
	return false;
#else
	/* Of a reader this has a bit set that a task's address has not. */
	return atomic_long_read(&mm->mmap_lock.owner) == (long)current;
#endif
}

/* Whether VM_FAULT_RETRY may be answered. The mmap lock is let go of, as is due then. */
bool hmm_gpu_fault_retry(struct vm_fault *vmf)
{
	if (!(vmf->flags & FAULT_FLAG_ALLOW_RETRY))
		return false;
	if (!(vmf->flags & FAULT_FLAG_RETRY_NOWAIT))
		mmap_read_unlock(vmf->vma->vm_mm);
	return true;
}

/*
 * Let go of the page that a fault has locked, and take it again. The fault has a reference to it still, so it is neither split
 * nor freed meanwhile.
 */
void hmm_gpu_fault_unlock(struct vm_fault *vmf)
{
	unlock_page(vmf->page);
}

void hmm_gpu_fault_lock(struct vm_fault *vmf)
{
	lock_page(vmf->page);
}

/* Whether a fault must not wait for anything. */
bool hmm_gpu_fault_nowait(const struct vm_fault *vmf)
{
	return vmf->flags & FAULT_FLAG_RETRY_NOWAIT;
}

/* Of all processes there are, or as many as there is room for; each with a reference (mmgrab). Returns how many there are. */
size_t hmm_gpu_all_mms(struct mm_struct **mms, size_t room)
{
	struct task_struct *task;
	size_t count = 0;

	rcu_read_lock();
	for_each_process(task) {
		task_lock(task);
		if (task->mm && !(task->flags & PF_KTHREAD)) {
			if (count < room) {
				mmgrab(task->mm);
				mms[count] = task->mm;
			}
			count++;
		}
		task_unlock(task);
	}
	rcu_read_unlock();
	return count;
}

bool hmm_gpu_vma_is_anonymous(const struct vm_area_struct *vma)
{
	return vma_is_anonymous((struct vm_area_struct *)vma);
}

bool hmm_gpu_vma_may_migrate(const struct vm_area_struct *vma)
{
	return !is_vm_hugetlb_page((struct vm_area_struct *)vma) && !(vma->vm_flags & VM_SPECIAL) && !vma_is_dax(vma);
}

bool hmm_gpu_vma_is_shadow_stack(const struct vm_area_struct *vma)
{
	return vma->vm_flags & VM_SHADOW_STACK;
}

int hmm_gpu_mmap_read_lock_killable(struct mm_struct *mm)
{
	return mmap_read_lock_killable(mm);
}

bool hmm_gpu_mmap_read_trylock(struct mm_struct *mm)
{
	return mmap_read_trylock(mm);
}

int hmm_gpu_mmap_write_lock_killable(struct mm_struct *mm)
{
	return mmap_write_lock_killable(mm);
}

void hmm_gpu_mmap_write_unlock(struct mm_struct *mm)
{
	mmap_write_unlock(mm);
}

/* Whether ksmd may be at work in a mapping, or has been in another of its address space. */
bool hmm_gpu_vma_may_merge(const struct vm_area_struct *vma)
{
	return vma->vm_flags & VM_MERGEABLE || mm_flags_test(MMF_VM_MERGEABLE, vma->vm_mm);
}

int hmm_gpu_vma_start_write(struct vm_area_struct *vma)
{
	return vma_start_write_killable(vma);
}

/* Whether who asks is the only one who still has a reference to it as a user: its process has ended, or is another program. */
bool hmm_gpu_mm_is_left(struct mm_struct *mm)
{
	return atomic_read(&mm->mm_users) == 1;
}

bool hmm_gpu_is_nowait(const struct kiocb *kiocb)
{
	return kiocb->ki_flags & IOCB_NOWAIT;
}

void hmm_gpu_mmap_read_unlock(struct mm_struct *mm)
{
	mmap_read_unlock(mm);
}

unsigned long hmm_gpu_task_size(void)
{
	return TASK_SIZE;
}

int hmm_gpu_mmu_interval_insert(struct mmu_interval_notifier *notifier, struct mm_struct *mm, unsigned long start,
				unsigned long length, const struct mmu_interval_notifier_ops *ops)
{
	int ret = mmap_write_lock_killable(mm);

	if (ret)
		return ret;
	ret = mmu_interval_notifier_insert_locked(notifier, mm, start, length, ops);
	mmap_write_unlock(mm);
	return ret;
}

void hmm_gpu_mmu_interval_set_seq(struct mmu_interval_notifier *notifier, unsigned long seq)
{
	mmu_interval_set_seq(notifier, seq);
}

unsigned long hmm_gpu_mmu_interval_seq(const struct mmu_interval_notifier *notifier)
{
	return READ_ONCE(notifier->invalidate_seq);
}

bool hmm_gpu_mmu_interval_read_retry(struct mmu_interval_notifier *notifier, unsigned long seq)
{
	return mmu_interval_read_retry(notifier, seq);
}

int hmm_gpu_range_fault(struct hmm_range *range)
{
	return hmm_range_fault_unlocked_timeout(range, msecs_to_jiffies(HMM_RANGE_DEFAULT_TIMEOUT));
}

int hmm_gpu_make_exclusive(struct mm_struct *mm, unsigned long addr, void *owner, struct folio **folio, unsigned long *pfn)
{
	struct page *page = make_device_exclusive(mm, addr, owner, folio);

	if (IS_ERR(page))
		return PTR_ERR(page);
	*pfn = page_to_pfn(page);
	return 0;
}

unsigned long hmm_gpu_pci_resource_flags(struct pci_dev *pdev, int bar)
{
	return pci_resource_flags(pdev, bar);
}

bool hmm_gpu_pci_device_is_present(struct pci_dev *pdev)
{
	return pci_device_is_present(pdev);
}

int hmm_gpu_pci_domain_nr(struct pci_dev *pdev)
{
	return pci_domain_nr(pdev->bus);
}
