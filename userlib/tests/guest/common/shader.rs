//! A thread that plays the shader: it walks the device page table in a pool that it has mapped, and reads and writes what it finds there.

use hmm_gpu::{Device, MirrorInfo, Pool, TableEntry};

use super::memory::{Span, PAGE};
use super::mirror::{fault_all, MIGRATE, WRITE};

/// VRAM as a shader reaches it, by offsets in it.
pub trait Words {
    fn load(&self, offset: u64) -> Option<u64>;
    fn store(&self, offset: u64, word: u64) -> Option<()>;
}

impl Words for Pool {
    fn load(&self, offset: u64) -> Option<u64> {
        Pool::load(self, offset)
    }

    fn store(&self, offset: u64, word: u64) -> Option<()> {
        Pool::store(self, offset, word)
    }
}

/// A device with a pool, and all that a shader is told.
pub struct Shader<'a, W = Pool> {
    pub pool: &'a W,
    root: u64,
    levels: u32,
}

impl<'a, W: Words> Shader<'a, W> {
    pub fn new(device: &Device, pool: &'a W) -> Self {
        Self::of(&device.mirror().unwrap(), pool)
    }

    /// The same, of a device that has said what it has to say.
    pub fn of(table: &MirrorInfo, pool: &'a W) -> Self {
        Self {
            pool,
            root: table.root_offset,
            levels: table.levels,
        }
    }

    /// Walks the table. Nothing, if a node is missing or the entry is not valid; of nodes it must not lead out of the pool.
    pub fn walk(&self, addr: usize) -> Option<TableEntry> {
        let mut node = self.root;
        for level in (0..self.levels).rev() {
            let at = node + 8 * MirrorInfo::index(addr, level) as u64;
            let word = self.pool.load(at).expect("the table leads out of the pool");
            let entry = TableEntry::from_bits(word);
            if !entry.is_valid() || level == 0 {
                return Some(entry).filter(|entry| entry.is_valid());
            }
            node = entry.vram_offset().expect("a node is in VRAM");
        }
        None
    }

    /// Where in the VRAM the page at `addr` is, if it is in the pool.
    pub fn page(&self, addr: usize) -> Option<u64> {
        let offset = self.walk(addr)?.vram_offset()?;
        let ends = [offset, offset + (PAGE - 8) as u64];
        let inside = ends.into_iter().all(|end| self.pool.load(end).is_some());
        assert!(inside, "the page at {addr:#x} is said to be at {offset:#x}");
        Some(offset)
    }

    /// Asserts that the pages of a span are all in the pool, and that what is there is the pattern of a seed.
    #[track_caller]
    pub fn check(&self, span: Span, seed: u64) {
        let mut words = Vec::with_capacity(span.bytes() / 8);
        for i in 0..span.pages {
            let page = self.page(span.page(i).addr).expect("a page is missing");
            words.extend((0..PAGE as u64 / 8).map(|word| self.pool.load(page + word * 8).unwrap()));
        }
        span.check_words("the shader", &words, seed);
    }

    /// Where in the VRAM the pages of a span are, all of which are in the pool and may be written to.
    #[track_caller]
    pub fn places(&self, span: Span) -> Vec<u64> {
        let place = |i| {
            let addr = span.page(i).addr;
            let entry = self.walk(addr).filter(|entry| entry.is_writable());
            entry.and_then(TableEntry::vram_offset)
        };
        let places: Vec<_> = (0..span.pages).filter_map(place).collect();
        assert_eq!(places.len(), span.pages, "a page is missing");
        places
    }

    /// Writes words to pages where they were found, whatever the table says now.
    pub fn fill_places(&self, places: &[u64], words: &[u64]) {
        for (words, page) in words.chunks(PAGE / 8).zip(places) {
            for (word, value) in words.iter().enumerate() {
                self.pool.store(page + word as u64 * 8, *value).unwrap();
            }
        }
    }

    /// Writes the pattern of a seed to the pages of a span, as far as they are in the pool and may be written to. Returns how many.
    pub fn fill(&self, span: Span, seed: u64) -> usize {
        let pattern = span.pattern(seed);
        let mut filled = 0;
        for (i, words) in pattern.chunks(PAGE / 8).enumerate() {
            let addr = span.page(i).addr;
            if !self.walk(addr).is_some_and(TableEntry::is_writable) {
                continue;
            }
            if let Some(page) = self.page(addr) {
                for (word, value) in words.iter().enumerate() {
                    self.pool.store(page + word as u64 * 8, *value).unwrap();
                }
                filled += 1;
            }
        }
        filled
    }
}

/// Has all pages of a span be in the pool of a device, with entries for writing.
#[track_caller]
pub fn bring_in(device: &Device, span: Span) {
    let device_pages = fault_all(device, span, WRITE, MIGRATE);
    assert_eq!(device_pages, span.pages, "not all pages came in");
}
