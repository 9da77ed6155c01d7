//! Pages that do not stay in VRAM, since something keeps touching them: kernels use copies of these.
//!
//! A copy is made anew before each round, and what the round has changed in it, byte by byte, is written back after it: the rest of the
//! page is not the kernel's, and may have changed meanwhile. While a page has a copy, kernels use nothing else of it.

use std::collections::HashSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use crate::range::PAGE_BYTES;
use crate::svm::ranges::{self, Named};
use crate::sys::vulkan::{Buffer, Gpu, Place};
use crate::{Access, DeviceFault, Errno, Error};

/// Pages that there are copies of at a time.
const MOST: usize = 256;
/// Where the copies begin: behind the list that kernels look them up in.
const PAGES_AT: usize = (32 * (MOST + 1)).next_multiple_of(PAGE_BYTES);

/// The copies of a dispatch.
pub(crate) struct Twins {
    buffer: Buffer,
    /// This process's memory. Not by pointers: what else lies on these pages may be anybody's, and change at any time.
    memory: File,
    /// Sorted.
    pages: Vec<Page>,
    /// All that it has had.
    ever: HashSet<usize>,
    all: u64,
}

struct Page {
    addr: usize,
    before: Box<[u8]>,
    /// No round has used it yet.
    is_new: bool,
}

/// What becomes of a page that is to have a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Added {
    /// It has one from the next round on.
    Now,
    /// It had one.
    Before,
    /// There is no room beside the others that are for the next round.
    NotYet,
}

impl Twins {
    pub(crate) fn new(gpu: &Arc<Gpu>) -> Result<Self, Error> {
        let memory = File::options()
            .read(true)
            .write(true)
            .open("/proc/self/mem")
            .map_err(|error| crate::SvmError::Vulkan {
                attempt: "copies of pages",
                answer: format!("/proc/self/mem cannot be opened: {error}"),
            })?;
        let bytes = PAGES_AT + MOST * PAGE_BYTES;
        Ok(Self {
            buffer: Buffer::new(gpu, "copies of pages", bytes, Place::Back)?,
            memory,
            pages: Vec::new(),
            ever: HashSet::new(),
            all: 0,
        })
    }

    /// The list that kernels look them up in.
    pub(crate) fn list(&self) -> u64 {
        self.buffer.addr()
    }

    /// How long it is.
    pub(crate) fn ranges(&self) -> u32 {
        u32::try_from(self.pages.len() + 1).unwrap_or(0)
    }

    /// How many pages it has had, each counted as often as it came anew.
    pub(crate) fn all(&self) -> u64 {
        self.all
    }

    /// How many pages it has ever had.
    pub(crate) fn pages(&self) -> usize {
        self.ever.len()
    }

    /// Has the page of an address. Where there is no room, all go that a round has used: what an invocation still needs of them comes again.
    pub(crate) fn add(&mut self, addr: usize) -> Added {
        let addr = addr & !(PAGE_BYTES - 1);
        let place = |pages: &[Page]| pages.binary_search_by_key(&addr, |page| page.addr);
        if place(&self.pages).is_ok() {
            return Added::Before;
        }
        if self.pages.len() == MOST {
            self.pages.retain(|page| page.is_new);
        }
        if self.pages.len() == MOST {
            return Added::NotYet;
        }
        let (Ok(at) | Err(at)) = place(&self.pages);
        self.all += 1;
        self.ever.insert(addr);
        let before = vec![0; PAGE_BYTES].into();
        let page = Page {
            addr,
            before,
            is_new: true,
        };
        self.pages.insert(at, page);
        let first = self.buffer.addr() + PAGES_AT as u64;
        let (named, deltas): (Vec<Named>, Vec<u64>) = (0_u64..)
            .zip(&self.pages)
            .map(|(number, &Page { addr: begin, .. })| {
                let (end, write) = (begin + PAGE_BYTES, true);
                let place = first + number * PAGE_BYTES as u64;
                (
                    Named { begin, end, write },
                    place.wrapping_sub(begin as u64),
                )
            })
            .unzip();
        self.buffer.put(0, &ranges::table(&named, &deltas));
        Added::Now
    }

    /// Copies the pages, as they are now.
    pub(crate) fn read(&mut self) -> Result<(), Error> {
        let copies = self.buffer.bytes_mut().get_mut(PAGES_AT..);
        let copies = copies.unwrap_or_default().chunks_exact_mut(PAGE_BYTES);
        for (page, to) in self.pages.iter_mut().zip(copies) {
            let from = page.addr as u64;
            let read = self.memory.read_exact_at(&mut page.before, from);
            read.map_err(|_| gone(page.addr, Access::Read))?;
            to.copy_from_slice(&page.before);
            page.is_new = false;
        }
        Ok(())
    }

    /// Writes back what has changed in the copies.
    pub(crate) fn write_back(&self) -> Result<(), Error> {
        let copies = self.buffer.bytes().get(PAGES_AT..).unwrap_or_default();
        let copies = copies.chunks_exact(PAGE_BYTES);
        for (Page { addr, before, .. }, now) in self.pages.iter().zip(copies) {
            // Most are only read.
            if **before == *now {
                continue;
            }
            for (from, changed) in changes(before, now) {
                let at = (addr + from) as u64;
                let written = self.memory.write_all_at(changed, at);
                written.map_err(|_| gone(*addr, Access::Write))?;
            }
        }
        Ok(())
    }
}

fn gone(addr: usize, access: Access) -> Error {
    Error::Fault {
        fault: DeviceFault { addr, access },
        errno: Errno::FAULT,
    }
}

/// Where two slices of one length differ: each run of bytes that do, as it is now, and where it begins.
fn changes<'a>(before: &'a [u8], now: &'a [u8]) -> impl Iterator<Item = (usize, &'a [u8])> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let differ = |i: &usize| before.get(*i) != now.get(*i);
        let end = before.len().min(now.len());
        let from = (at..end).find(differ)?;
        at = (from..end).find(|i| !differ(i)).unwrap_or(end);
        Some((from, &now[from..at]))
    })
}

#[cfg(test)]
mod tests {
    use super::changes;

    /// Catches bytes that are written back though nobody has changed them, and those that are not.
    #[test]
    fn only_what_has_changed_is_written_back() {
        let runs = |before: &[u8], now: &[u8]| -> Vec<(usize, Vec<u8>)> {
            changes(before, now)
                .map(|(at, run)| (at, run.to_vec()))
                .collect()
        };
        assert_eq!(runs(&[1, 2, 3, 4], &[1, 2, 3, 4]), []);
        assert_eq!(
            runs(&[1, 2, 3, 4, 5], &[9, 2, 8, 7, 5]),
            [(0, vec![9]), (2, vec![8, 7])]
        );
        assert_eq!(runs(&[1, 2, 3], &[1, 2, 9]), [(2, vec![9])]);
    }
}
