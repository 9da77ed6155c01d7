// SPDX-License-Identifier: MIT OR Apache-2.0

// The suite gives a case 30 seconds, one 120, by waiting for it in poll(). Those are times of hardware: under emulation, beside other
// guests, on a kernel that checks itself, they are too short for any driver. The linker puts this in the place of poll().

#include <poll.h>

int __real_poll(struct pollfd *files, nfds_t count, int milliseconds);

int __wrap_poll(struct pollfd *files, nfds_t count, int milliseconds)
{
	return __real_poll(files, count, milliseconds > 0 ? 8 * milliseconds : milliseconds);
}
