//! As much of io_uring as it takes to read and write through registered buffers, whose pages are pinned for as long.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};

use hmm_gpu::Errno;

use super::memory::{last_errno, Span, PAGE};

const OFFSET_RINGS: libc::off_t = 0;
const OFFSET_ENTRIES: libc::off_t = 0x1000_0000;
const ENTER_WAIT: u32 = 1;
const REGISTER_BUFFERS: u32 = 0;
const UNREGISTER_BUFFERS: u32 = 1;
const READ_FIXED: u8 = 4;
const WRITE_FIXED: u8 = 5;
const FEATURE_ONE_MAP: u32 = 1;

/// `struct io_sqring_offsets`, and the other one with other names.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Offsets {
    head: u32,
    tail: u32,
    mask: u32,
    entries: u32,
    flags_or_overflow: u32,
    dropped_or_completions: u32,
    array_or_flags: u32,
    reserved: u32,
    user_addr: u64,
}

/// `struct io_uring_params`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Parameters {
    submissions: u32,
    completions: u32,
    flags: u32,
    thread: [u32; 2],
    features: u32,
    workers: u32,
    reserved: [u32; 3],
    submission: Offsets,
    completion: Offsets,
}

/// `struct io_uring_sqe`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Submission {
    operation: u8,
    flags: u8,
    priority: u16,
    fd: i32,
    offset: u64,
    addr: u64,
    len: u32,
    operation_flags: u32,
    user_data: u64,
    buffer: u16,
    personality: u16,
    rest: [u32; 5],
}

/// A ring with registered buffers. What is read and written is in the first.
pub struct Ring {
    fd: OwnedFd,
    rings: Span,
    entries: Span,
    parameters: Parameters,
}

impl Ring {
    /// Makes a ring, and registers a span as its buffer.
    #[track_caller]
    pub fn with_buffer(span: Span) -> Self {
        Self::with_buffers(&[span])
    }

    /// Makes a ring, and registers spans as its buffers.
    #[track_caller]
    pub fn with_buffers(spans: &[Span]) -> Self {
        let mut parameters = Parameters::default();
        let asked = std::ptr::from_mut(&mut parameters);
        // SAFETY: the structure is as long.
        let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, 2, asked) };
        assert_ne!(fd, -1, "io_uring_setup: {}", last_errno());
        // SAFETY: just made, and nobody else's.
        let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
        assert!(parameters.features & FEATURE_ONE_MAP != 0);
        let map = |offset: libc::off_t| {
            let (protection, ring) = (libc::PROT_READ | libc::PROT_WRITE, fd.as_raw_fd());
            let addr = std::ptr::null_mut();
            // SAFETY: a new map, where the kernel likes. Two entries of either ring fit on a page.
            let mapped =
                unsafe { libc::mmap(addr, PAGE, protection, libc::MAP_SHARED, ring, offset) };
            assert_ne!(mapped, libc::MAP_FAILED, "{}", last_errno());
            Span::new(mapped as usize, 1)
        };
        let (rings, entries) = (map(OFFSET_RINGS), map(OFFSET_ENTRIES));
        let ring = Self {
            fd,
            rings,
            entries,
            parameters,
        };
        let piece = |span: &Span| libc::iovec {
            iov_base: span.addr as *mut _,
            iov_len: span.bytes(),
        };
        let pieces: Vec<_> = spans.iter().map(piece).collect();
        ring.register(REGISTER_BUFFERS, pieces.as_ptr(), pieces.len() as u32);
        ring
    }

    /// Lets the buffers go.
    #[track_caller]
    pub fn unregister(&self) {
        self.register(UNREGISTER_BUFFERS, std::ptr::null(), 0);
    }

    #[track_caller]
    fn register(&self, operation: u32, argument: *const libc::iovec, count: u32) {
        let ring = self.fd.as_raw_fd();
        // SAFETY: the argument is as the operation wants it.
        let result = unsafe {
            libc::syscall(
                libc::SYS_io_uring_register,
                ring,
                operation,
                argument,
                count,
            )
        };
        assert_eq!(result, 0, "io_uring_register: {}", last_errno());
    }

    fn word(&self, offset: u32) -> &AtomicU32 {
        let place = (self.rings.addr + offset as usize) as *const AtomicU32;
        // SAFETY: an aligned word of the rings.
        unsafe { &*place }
    }

    /// Reads a part of the buffer from the beginning of a file.
    #[track_caller]
    pub fn read(&self, file: &File, part: Span) {
        self.run(READ_FIXED, file, part);
    }

    /// Writes a part of the buffer to the beginning of a file.
    #[track_caller]
    pub fn write(&self, file: &File, part: Span) {
        self.run(WRITE_FIXED, file, part);
    }

    #[track_caller]
    fn run(&self, operation: u8, file: &File, part: Span) {
        let (submission, completion) = (&self.parameters.submission, &self.parameters.completion);
        let tail = self.word(submission.tail).load(Ordering::Acquire);
        let slot = tail & self.word(submission.mask).load(Ordering::Relaxed);
        let entry = Submission {
            operation,
            fd: file.as_raw_fd(),
            addr: part.addr as u64,
            len: part.bytes() as u32,
            ..Default::default()
        };
        let place = (self.entries.addr as *mut Submission).wrapping_add(slot as usize);
        // SAFETY: an entry of the ring.
        unsafe { place.write_volatile(entry) };
        self.word(submission.array_or_flags + slot * 4)
            .store(slot, Ordering::Relaxed);
        self.word(submission.tail)
            .store(tail.wrapping_add(1), Ordering::Release);
        let (ring, none) = (self.fd.as_raw_fd(), std::ptr::null::<u8>());
        // SAFETY: numbers only.
        let entered =
            unsafe { libc::syscall(libc::SYS_io_uring_enter, ring, 1, 1, ENTER_WAIT, none, 0) };
        assert_eq!(entered, 1, "io_uring_enter: {}", last_errno());

        let head = self.word(completion.head).load(Ordering::Acquire);
        let slot = head & self.word(completion.mask).load(Ordering::Relaxed);
        // A completion is 16 bytes: user data, result, flags.
        let result = self.word(completion.dropped_or_completions + slot * 16 + 8);
        let result = result.load(Ordering::Acquire) as i32;
        self.word(completion.head)
            .store(head.wrapping_add(1), Ordering::Release);
        if result < 0 {
            panic!("the ring: {}", Errno::from_raw_os_error(-result));
        }
        assert_eq!(result as usize, part.bytes());
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        self.rings.unmap();
        self.entries.unmap();
    }
}
