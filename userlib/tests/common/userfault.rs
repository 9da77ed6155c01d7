//! Memory whose first touch waits: userfaultfd.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use super::memory::{errno, last_errno, Span};

const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
const UFFD_API: u64 = 0xaa;
const MODE_MISSING: u64 = 1;

/// Whoever touches a page of a span that was never touched before waits for as long as this lives. Then it gets zeroes.
pub struct Watch(OwnedFd);

impl Watch {
    pub fn new(span: Span) -> Self {
        // SAFETY: the flags are known.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) };
        assert_ne!(fd, -1, "userfaultfd: {}", last_errno());
        // SAFETY: just made, and nobody else's.
        let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
        let mut api = [UFFD_API, 0, 0];
        // SAFETY: struct uffdio_api.
        errno(unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, api.as_mut_ptr()) }).unwrap();
        let mut register = [span.addr as u64, span.bytes() as u64, MODE_MISSING, 0];
        // SAFETY: struct uffdio_register.
        errno(unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_REGISTER, register.as_mut_ptr()) })
            .unwrap();
        Self(fd)
    }

    /// Waits until somebody waits for a page.
    pub fn wait_for_a_toucher(&self) {
        let mut poll = libc::pollfd {
            fd: self.0.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one entry.
        let ready = errno(unsafe { libc::poll(&mut poll, 1, 20_000) }).unwrap();
        assert_eq!(ready, 1, "nobody touched the memory");
    }
}
