/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * After fork, parent and child share pages in VRAM, copy-on-write, as they share pages in RAM.
 *
 * fork_cow [NODE]: NODE is /dev/hmm_gpu0 if not given. In C, against the header that `make userlib` makes, target/include/hmm_gpu.h.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "hmm_gpu.h"

#define PAGES 64
#define PAGE ((size_t)HMM_GPU_PAGE_BYTES)

static void die(const char *what)
{
	perror(what);
	exit(EXIT_FAILURE);
}

static void migrate(int fd, unsigned char *data)
{
	struct hmm_gpu_migrate call = {
		.addr = (uint64_t)data, .len = PAGES * PAGE, .target = HMM_GPU_TARGET_DEVICE,
	};

	if (ioctl(fd, HMM_GPU_MIGRATE, &call) < 0)
		die("HMM_GPU_MIGRATE");
	printf("%llu KiB moved to VRAM.\n", (unsigned long long)call.moved_bytes >> 10);
}

/* Draws where the pages of this process are. */
static void draw(int fd, const unsigned char *data, const char *who)
{
	unsigned char where[PAGES];
	struct hmm_gpu_residency call = {
		.addr = (uint64_t)data, .len = PAGES * PAGE, .bytes_ptr = (uint64_t)where,
	};

	if (ioctl(fd, HMM_GPU_RESIDENCY, &call) < 0)
		die("HMM_GPU_RESIDENCY");
	printf("   %-7s ", who);
	for (int i = 0; i < PAGES; i++) {
		int writable = where[i] & HMM_GPU_RESIDENT_WRITABLE;

		switch (where[i] & HMM_GPU_RESIDENT_MASK) {
		case HMM_GPU_RESIDENT_DEVICE:
			putchar(writable ? 'V' : 'v');
			break;
		case HMM_GPU_RESIDENT_SYSTEM:
			putchar(writable ? 'R' : 'r');
			break;
		default:
			putchar('.');
		}
	}
	putchar('\n');
}

/* Compares all bytes with what they should be: `value`, and `other` in the first `changed` pages. */
static void check(const unsigned char *data, int changed, unsigned char other, unsigned char value, const char *who)
{
	for (size_t i = 0; i < PAGES * PAGE; i++) {
		if (data[i] != (i < (size_t)changed * PAGE ? other : value)) {
			fprintf(stderr, "%s: byte %zu is %#x\n", who, i, data[i]);
			exit(EXIT_FAILURE);
		}
	}
	printf("   %-7s reads all %zu bytes: as they should be.\n", who, PAGES * PAGE);
}

int main(int argc, char **argv)
{
	const char *node = argc > 1 ? argv[1] : "/dev/hmm_gpu0";
	int fd = open(node, O_RDWR | O_CLOEXEC), status;
	unsigned char *data = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct hmm_gpu_query query = { 0 };
	pid_t child;

	setvbuf(stdout, NULL, _IOLBF, 0);
	if (fd < 0)
		die(node);
	if (data == MAP_FAILED || madvise(data, PAGES * PAGE, MADV_NOHUGEPAGE) < 0)
		die("memory");
	if (ioctl(fd, HMM_GPU_QUERY, &query) < 0)
		die("HMM_GPU_QUERY");
	printf("%s: %llu MiB of VRAM, interface %u\n", node, (unsigned long long)query.vram_bytes >> 20, query.version);
	printf("Marks are pages: V in VRAM, R in RAM; small: shared, so that a write copies first.\n\n");

	memset(data, 1, PAGES * PAGE);
	printf("1. The parent writes %d pages. ", PAGES);
	migrate(fd, data);
	draw(fd, data, "parent");

	fflush(stdout);
	child = fork();
	if (child < 0)
		die("fork");
	if (child == 0) {
		/* The parent's file does not serve the child's memory: it opens the device itself. */
		int own = open(node, O_RDWR | O_CLOEXEC);

		if (own < 0)
			die(node);
		printf("2. A child is forked, and sees the same pages, in VRAM:\n");
		draw(own, data, "child");
		memset(data, 2, PAGES / 4 * PAGE);
		printf("3. It writes to a quarter of them, which it has to itself then:\n");
		draw(own, data, "child");
		check(data, PAGES / 4, 2, 1, "child");
		exit(EXIT_SUCCESS);
	}
	if (waitpid(child, &status, 0) != child || status != 0) {
		fprintf(stderr, "the child failed\n");
		return EXIT_FAILURE;
	}
	printf("4. The child is gone. The parent sees nothing of what it wrote:\n");
	check(data, 0, 0, 1, "parent");
	draw(fd, data, "parent");
	return EXIT_SUCCESS;
}
