//! Memory whose first touch, or next write, waits: userfaultfd.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use super::memory::{errno, last_errno, Span, PAGE};

const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
const UFFDIO_COPY: libc::c_ulong = 0xc028_aa03;
const UFFDIO_WRITEPROTECT: libc::c_ulong = 0xc018_aa06;
const UFFD_API: u64 = 0xaa;
const FEATURE_WRITE_PROTECT: u64 = 1;
const MODE_MISSING: u64 = 1;
const MODE_WRITE_PROTECT: u64 = 2;
const EVENT_FAULT: u64 = 0x12;
const FAULT_WRITE_PROTECTED: u64 = 2;

/// Whoever touches a page of a span that was never touched before, or writes to a protected one, waits until he is let go. At its
/// end all go, and what was not given is zeroes.
pub struct Watch(OwnedFd);

impl Watch {
    /// Of pages that were never touched.
    pub fn new(span: Span) -> Self {
        Self::with(span, MODE_MISSING)
    }

    /// Of writes to pages that [`protect`](Self::protect) names.
    pub fn of_writes(span: Span) -> Self {
        Self::with(span, MODE_WRITE_PROTECT)
    }

    fn with(span: Span, mode: u64) -> Self {
        // SAFETY: the flags are known.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) };
        assert_ne!(fd, -1, "userfaultfd: {}", last_errno());
        // SAFETY: just made, and nobody else's.
        let this = Self(unsafe { OwnedFd::from_raw_fd(fd as i32) });
        this.call(UFFDIO_API, &mut [UFFD_API, FEATURE_WRITE_PROTECT, 0]);
        let (addr, bytes) = (span.addr as u64, span.bytes() as u64);
        this.call(UFFDIO_REGISTER, &mut [addr, bytes, mode, 0]);
        this
    }

    /// Makes a call whose structure is so many words.
    fn call(&self, number: libc::c_ulong, argument: &mut [u64]) {
        // SAFETY: the callers give the structure of the number.
        let answer = unsafe { libc::ioctl(self.0.as_raw_fd(), number, argument.as_mut_ptr()) };
        errno(answer).unwrap();
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

    /// Waits until somebody waits for a page: which, and whether for writing to a protected one.
    pub fn next(&self) -> (usize, bool) {
        self.wait_for_a_toucher();
        let mut message = [0_u64; 4];
        // SAFETY: a message is as long.
        let bytes = unsafe {
            let room = size_of_val(&message);
            libc::read(self.0.as_raw_fd(), message.as_mut_ptr().cast(), room)
        };
        assert_eq!(bytes, 32, "{}", last_errno());
        assert_eq!(message[0] & 0xff, EVENT_FAULT);
        let protected = message[1] & FAULT_WRITE_PROTECTED != 0;
        (message[2] as usize & !(PAGE - 1), protected)
    }

    /// Gives a page that somebody waits for, with the pattern of a seed.
    pub fn give(&self, page: Span, seed: u64) {
        let words = page.pattern(seed);
        let (to, from) = (page.addr as u64, words.as_ptr() as u64);
        self.call(UFFDIO_COPY, &mut [to, from, page.bytes() as u64, 0, 0]);
    }

    /// Protects pages from writing, or lets who waits go on.
    pub fn protect(&self, span: Span, protected: bool) {
        let mode = u64::from(protected);
        let (addr, bytes) = (span.addr as u64, span.bytes() as u64);
        self.call(UFFDIO_WRITEPROTECT, &mut [addr, bytes, mode]);
    }
}
