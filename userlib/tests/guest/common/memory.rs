//! Memory whose every byte is known.

use std::ops::Deref;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicUsize, Ordering};

use hmm_gpu::Errno;

use super::random::mix;

/// Bytes of a page.
pub const PAGE: usize = 4096;
/// Pages of a huge page.
pub const HUGE: usize = 512;

const WORDS: usize = PAGE / 8;

/// Some pages, and which part of a pattern belongs on them.
///
/// A pattern is made from a seed: every word of every page differs, so that a page that is lost, stale, half copied, or in
/// another's place is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    pub addr: usize,
    pub pages: usize,
    /// The pattern's page that belongs on the first one.
    first: usize,
}

/// The system's answer to a call that returns -1 for an error.
pub fn errno(result: libc::c_int) -> Result<libc::c_int, Errno> {
    if result == -1 {
        return Err(last_errno());
    }
    Ok(result)
}

/// Why the system call before this one failed.
pub fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap()
}

impl Span {
    /// Pages with the beginning of a pattern.
    pub fn new(addr: usize, pages: usize) -> Self {
        Self {
            addr,
            pages,
            first: 0,
        }
    }

    pub fn bytes(self) -> usize {
        self.pages * PAGE
    }

    /// Some of the pages.
    #[track_caller]
    pub fn part(self, first: usize, pages: usize) -> Self {
        assert!(first + pages <= self.pages);
        Self {
            addr: self.addr + first * PAGE,
            pages,
            first: self.first + first,
        }
    }

    /// One of the pages.
    #[track_caller]
    pub fn page(self, i: usize) -> Self {
        self.part(i, 1)
    }

    /// The same content at another address.
    pub fn at(self, addr: usize) -> Self {
        Self { addr, ..self }
    }

    fn word(self, seed: u64, index: usize) -> u64 {
        mix((seed << 40) ^ (self.first * WORDS + index) as u64)
    }

    fn words(self) -> usize {
        self.pages * WORDS
    }

    /// The pattern of a seed that belongs on the pages.
    pub fn pattern(self, seed: u64) -> Vec<u64> {
        (0..self.words())
            .map(|index| self.word(seed, index))
            .collect()
    }

    fn read(self, index: usize) -> u64 {
        // SAFETY: inside the span, which a test maps readable before it reads it.
        unsafe {
            (self.addr as *const u64)
                .wrapping_add(index)
                .read_volatile()
        }
    }

    /// Writes the pattern of a seed to every byte.
    pub fn fill(self, seed: u64) {
        for index in 0..self.words() {
            let (place, word) = (
                (self.addr as *mut u64).wrapping_add(index),
                self.word(seed, index),
            );
            // SAFETY: inside the span, which a test maps writable before it writes it.
            unsafe { place.write_volatile(word) };
        }
    }

    /// Asserts that every byte is that of the pattern.
    #[track_caller]
    pub fn check(self, seed: u64) {
        let read = |index| self.read(index);
        self.compare("the CPU", read, |index| self.word(seed, index));
    }

    /// Asserts that every byte is zero.
    #[track_caller]
    pub fn check_zero(self) {
        self.compare("the CPU", |index| self.read(index), |_| 0);
    }

    /// Asserts that what `who` has read from the pages is the pattern of a seed.
    #[track_caller]
    pub fn check_words(self, who: &str, words: &[u64], seed: u64) {
        assert_eq!(words.len(), self.words());
        self.compare(who, |index| words[index], |index| self.word(seed, index));
    }

    #[track_caller]
    fn compare(self, who: &str, read: impl Fn(usize) -> u64, expected: impl Fn(usize) -> u64) {
        let mut wrong = (0..self.words()).filter(|&index| read(index) != expected(index));
        let Some(index) = wrong.next() else {
            return;
        };
        panic!(
            "{who} finds in {self:x?}: word {} of page {} is {:#018x} and not {:#018x}; {} words of {} are wrong",
            index % WORDS,
            index / WORDS,
            read(index),
            expected(index),
            wrong.count() + 1,
            self.words(),
        );
    }

    /// Reads one byte of every page.
    pub fn touch(self) {
        for page in 0..self.pages {
            self.read(page * WORDS + page % WORDS);
        }
    }

    /// `mprotect`.
    pub fn protect(self, protection: libc::c_int) {
        // SAFETY: the pages are a test's own.
        errno(unsafe { libc::mprotect(self.addr as *mut _, self.bytes(), protection) }).unwrap();
    }

    /// `madvise`.
    pub fn advise(self, advice: libc::c_int) -> Result<(), Errno> {
        // SAFETY: the pages are a test's own.
        errno(unsafe { libc::madvise(self.addr as *mut _, self.bytes(), advice) }).map(drop)
    }

    /// `munmap`.
    pub fn unmap(self) {
        // SAFETY: the pages are a test's own.
        errno(unsafe { libc::munmap(self.addr as *mut _, self.bytes()) }).unwrap();
    }

    /// `mmap` at these addresses, in place of what is there.
    pub fn map_over(self, protection: libc::c_int, flags: libc::c_int, fd: RawFd) {
        let addr = self.addr as *mut _;
        let flags = flags | libc::MAP_FIXED;
        // SAFETY: the pages are a test's own.
        let mapped = unsafe { libc::mmap(addr, self.bytes(), protection, flags, fd, 0) };
        assert_eq!(mapped, addr, "{}", last_errno());
    }
}

/// Private anonymous memory of its own: the span it derefs to, unmapped when dropped.
pub struct Area {
    span: Span,
    whole: Span,
}

impl Area {
    /// Memory that was never touched.
    pub fn new(pages: usize) -> Self {
        Self::offset(0, pages)
    }

    /// The same, `offset` pages after a multiple of 2 MiB.
    pub fn offset(offset: usize, pages: usize) -> Self {
        let whole = Self::map(pages + offset + HUGE, libc::MAP_PRIVATE);
        let start = whole.addr.next_multiple_of(HUGE * PAGE) + offset * PAGE;
        Self {
            span: Span::new(start, pages),
            whole,
        }
    }

    /// Memory that is shared with forked children.
    pub fn shared(pages: usize) -> Self {
        let whole = Self::map(pages, libc::MAP_SHARED);
        Self { span: whole, whole }
    }

    /// Memory in small pages that was written with the pattern of a seed.
    pub fn filled(pages: usize, seed: u64) -> Self {
        let area = Self::new(pages);
        area.advise(libc::MADV_NOHUGEPAGE).unwrap();
        area.fill(seed);
        area
    }

    fn map(pages: usize, sharing: libc::c_int) -> Span {
        let (read_write, flags) = (
            libc::PROT_READ | libc::PROT_WRITE,
            sharing | libc::MAP_ANONYMOUS,
        );
        // Far below what the kernel picks, which is the highest gap that fits: so no other thread's memory comes to be in a hole that
        // a test makes.
        static NEXT: AtomicUsize = AtomicUsize::new(1 << 45);
        let addr = NEXT.fetch_add((pages + 1) * PAGE, Ordering::Relaxed) as *mut _;
        let flags = flags | libc::MAP_FIXED_NOREPLACE;
        // SAFETY: a new map in the place of no other touches no memory there is.
        let mapped = unsafe { libc::mmap(addr, pages * PAGE, read_write, flags, -1, 0) };
        assert_eq!(mapped, addr, "{}", last_errno());
        Span::new(addr as usize, pages)
    }
}

impl Deref for Area {
    type Target = Span;

    fn deref(&self) -> &Span {
        &self.span
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        self.whole.unmap();
    }
}

/// A file in memory with the pattern of a seed.
pub fn file(pages: usize, seed: u64) -> std::fs::File {
    use std::os::fd::FromRawFd;

    // SAFETY: the name is a C string.
    let fd = errno(unsafe { libc::memfd_create(c"hmm-gpu-test".as_ptr(), libc::MFD_CLOEXEC) });
    // SAFETY: just made, and nobody else's.
    let file = unsafe { std::fs::File::from_raw_fd(fd.unwrap()) };
    file.set_len((pages * PAGE) as u64).unwrap();
    let area = Area::shared(pages);
    area.map_over(
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_SHARED,
        std::os::fd::AsRawFd::as_raw_fd(&file),
    );
    area.fill(seed);
    file
}
