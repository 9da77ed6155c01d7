/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Memory that somebody has pinned does not move: whoever reads or writes it past the page table would find another page there.
 *
 * pinned [NODE]: NODE is /dev/hmm_gpu0 if not given. Here a pipe has the pages (vmsplice); a GPU driver that imports memory, RDMA,
 * O_DIRECT and io_uring's fixed buffers do the same. In C, against target/include/hmm_gpu.h.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include "hmm_gpu.h"

#define PAGES 64
#define PINNED 8
#define PAGE ((size_t)HMM_GPU_PAGE_BYTES)

static void die(const char *what)
{
	perror(what);
	exit(EXIT_FAILURE);
}

/* Asks for all of it, and returns how many pages did not move. */
static unsigned long long to_device(int fd, unsigned char *data)
{
	struct hmm_gpu_migrate call = {
		.addr = (uint64_t)data, .len = PAGES * PAGE, .target = HMM_GPU_TARGET_DEVICE,
	};

	if (ioctl(fd, HMM_GPU_MIGRATE, &call) < 0)
		die("HMM_GPU_MIGRATE");
	printf("   moved %llu pages, already there %llu, skipped %llu\n", (unsigned long long)call.moved_bytes / PAGE,
	       (unsigned long long)call.already_bytes / PAGE, (unsigned long long)call.skipped_bytes / PAGE);
	return call.skipped_bytes / PAGE;
}

static void draw(int fd, const unsigned char *data)
{
	unsigned char where[PAGES];
	struct hmm_gpu_residency call = {
		.addr = (uint64_t)data, .len = PAGES * PAGE, .bytes_ptr = (uint64_t)where,
	};

	if (ioctl(fd, HMM_GPU_RESIDENCY, &call) < 0)
		die("HMM_GPU_RESIDENCY");
	printf("   ");
	for (int i = 0; i < PAGES; i++)
		putchar((where[i] & HMM_GPU_RESIDENT_MASK) == HMM_GPU_RESIDENT_DEVICE ? 'V' : 'R');
	printf("\n\n");
}

int main(int argc, char **argv)
{
	const char *node = argc > 1 ? argv[1] : "/dev/hmm_gpu0";
	int fd = open(node, O_RDWR | O_CLOEXEC), ends[2];
	unsigned char *data = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	static unsigned char out[PINNED * HMM_GPU_PAGE_BYTES];
	struct iovec some;
	size_t got = 0;

	if (fd < 0)
		die(node);
	if (data == MAP_FAILED || madvise(data, PAGES * PAGE, MADV_NOHUGEPAGE) < 0 || pipe(ends) < 0)
		die("memory and a pipe");
	memset(data, 7, PAGES * PAGE);

	printf("1. %d of %d pages are put into a pipe, without a copy, and all are asked to VRAM (V; RAM: R):\n", PINNED, PAGES);
	some = (struct iovec){ .iov_base = data + 16 * PAGE, .iov_len = PINNED * PAGE };
	if (vmsplice(ends[1], &some, 1, 0) != (ssize_t)some.iov_len)
		die("vmsplice");
	if (to_device(fd, data) != PINNED) {
		fprintf(stderr, "other pages were skipped than those that are pinned\n");
		return EXIT_FAILURE;
	}
	draw(fd, data);

	printf("2. The pipe is read empty, which lets go of them, and they are asked for again:\n");
	while (got < sizeof(out)) {
		ssize_t bytes = read(ends[0], out + got, sizeof(out) - got);

		if (bytes <= 0)
			die("read");
		got += bytes;
	}
	if (to_device(fd, data) != 0) {
		fprintf(stderr, "pages were skipped that nobody has pinned\n");
		return EXIT_FAILURE;
	}
	draw(fd, data);

	for (size_t i = 0; i < PAGES * PAGE; i++)
		if (data[i] != 7 || out[i % sizeof(out)] != 7)
			return fprintf(stderr, "byte %zu is not what it was\n", i), EXIT_FAILURE;
	printf("The CPU reads all %zu bytes: as they were, and so is what came through the pipe.\n", PAGES * PAGE);
	return EXIT_SUCCESS;
}
