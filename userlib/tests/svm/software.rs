//! A stand-in for the driver: a device page table kept by the driver's own logic, over a pool of ordinary memory.
//!
//! Pages are copies here. Each time that work begins they are read anew, and when it ends, the bytes that it has changed are written
//! back, and no others: what else lies on a page belongs to others.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};

use hmm_gpu::uapi::{HMM_GPU_PTE_SYSTEM, HMM_GPU_PTE_VALID, HMM_GPU_PTE_WRITABLE};
use hmm_gpu::{Access, Backend, DeviceFault, Errno, Error, Miss, PoolMemory, SvmError, TableRoot};

use crate::alloc::GFP_KERNEL;
use crate::radix::{Home, Node, Spare, Tree};

const PAGE: usize = 4096;
/// Pages for nodes, beside those for data.
const NODES: usize = 256;
/// Where the pool is in the VRAM: not at its beginning, as the driver's need not be.
const OFFSET: u64 = 0x4020_0000;

/// The memory.
pub(crate) struct Memory {
    start: NonNull<u8>,
    pages: usize,
    free: Mutex<Vec<usize>>,
}

// SAFETY: it is used through its address only.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    fn layout(pages: usize) -> std::alloc::Layout {
        std::alloc::Layout::from_size_align(pages * PAGE, PAGE).unwrap()
    }

    fn new(pages: usize) -> Self {
        // SAFETY: it is not empty.
        let start = unsafe { std::alloc::alloc_zeroed(Self::layout(pages)) };
        Self {
            start: NonNull::new(start).unwrap(),
            pages,
            free: Mutex::new((0..pages).collect()),
        }
    }

    fn page(&self, number: usize) -> *mut u8 {
        assert!(number < self.pages);
        self.start.as_ptr().wrapping_add(number * PAGE)
    }

    fn read(&self, number: usize) -> Vec<u8> {
        let mut bytes = vec![0; PAGE];
        // SAFETY: it is a page of it, and nothing runs that changes it.
        unsafe {
            self.page(number)
                .copy_to_nonoverlapping(bytes.as_mut_ptr(), PAGE)
        };
        bytes
    }

    fn write(&self, number: usize, bytes: &[u8]) {
        assert_eq!(bytes.len(), PAGE);
        // SAFETY: as above.
        unsafe {
            self.page(number)
                .copy_from_nonoverlapping(bytes.as_ptr(), PAGE)
        };
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: it was allocated with this layout.
        unsafe { std::alloc::dealloc(self.start.as_ptr(), Self::layout(self.pages)) };
    }
}

/// A node's place.
struct Place {
    memory: Arc<Memory>,
    number: usize,
}

impl Home for Place {
    type Store = Memory;

    fn offset(&self) -> u64 {
        OFFSET + (self.number * PAGE) as u64
    }

    fn write(&self, store: &Memory, slot: usize, word: u64) {
        assert!(slot < PAGE / 8);
        let words = store.page(self.number).cast::<u64>();
        // SAFETY: the word is in the page.
        let at = unsafe { words.add(slot) };
        // SAFETY: as above, and aligned, since the page is.
        unsafe { at.write_volatile(word) };
    }

    fn fence(_: &Memory) {}
}

impl Drop for Place {
    fn drop(&mut self) {
        self.memory.free.lock().unwrap().push(self.number);
    }
}

/// A page that is in the pool.
struct Resident {
    number: usize,
    write: bool,
    /// What the program has there.
    twin: Vec<u8>,
    /// When it came.
    turn: u64,
}

pub(crate) struct Software {
    memory: Arc<Memory>,
    tree: Tree<Place>,
    resident: BTreeMap<usize, Resident>,
    pages: usize,
    program: File,
    turn: u64,
    running: bool,
    /// One of so many pages is touched before each round.
    touched: Option<usize>,
    /// What does not come.
    kept_out: Range<usize>,
    still: bool,
}

impl Software {
    /// With room for so many pages of data.
    pub(crate) fn new(pages: usize) -> Self {
        let memory = Arc::new(Memory::new(pages + NODES));
        let mut tree = Tree::new(1 << 47);
        let root = Node::new(place(&memory), tree.levels() - 1, GFP_KERNEL).unwrap();
        tree.plant(root, &memory);
        Self {
            memory,
            tree,
            resident: BTreeMap::new(),
            pages,
            program: File::options()
                .read(true)
                .write(true)
                .open("/proc/self/mem")
                .unwrap(),
            turn: 0,
            running: false,
            touched: None,
            kept_out: 0..0,
            still: false,
        }
    }

    /// The program does not touch what is in the pool: it gets it back when this ends.
    pub(crate) fn still(mut self) -> Self {
        self.still = true;
        self
    }

    /// Somebody touches one of so many pages, and brings it home by that, each time before a kernel comes to it.
    pub(crate) fn touched(mut self, one_of: usize) -> Self {
        self.touched = Some(one_of);
        self
    }

    /// The pages of these values do not come, though they are such as could.
    pub(crate) fn keeping_out<T>(mut self, values: &[T]) -> Self {
        let Range { start, end } = values.as_ptr_range();
        self.kept_out = start.expose_provenance()..end.expose_provenance();
        self
    }

    /// What the program has at an address, if it has something.
    fn of_program(&self, addr: usize) -> Option<Vec<u8>> {
        let mut bytes = vec![0; PAGE];
        self.program
            .read_exact_at(&mut bytes, addr as u64)
            .ok()
            .map(|()| bytes)
    }

    fn leave(&mut self, addr: usize) {
        if let Some(page) = self.resident.remove(&addr) {
            self.tree.clear(addr, addr + PAGE, Some(&self.memory));
            self.memory.free.lock().unwrap().push(page.number);
        }
    }

    /// Writes to the program's memory what work has changed, and nothing else.
    fn give_back(&mut self) {
        for (&addr, page) in &mut self.resident {
            let now = self.memory.read(page.number);
            if now == page.twin {
                continue;
            }
            assert!(page.write, "a page was changed that was mapped for reading");
            let mut at = 0;
            while let Some(from) = (at..PAGE).find(|&i| now[i] != page.twin[i]) {
                let to = (from..PAGE)
                    .find(|&i| now[i] == page.twin[i])
                    .unwrap_or(PAGE);
                self.program
                    .write_all_at(&now[from..to], (addr + from) as u64)
                    .unwrap();
                at = to;
            }
            page.twin = now;
        }
    }

    fn grow(&mut self, addr: usize) {
        let memory = Arc::clone(&self.memory);
        let mut spare =
            Spare::new(self.tree.missing(addr), GFP_KERNEL, || Ok(place(&memory))).unwrap();
        self.tree.grow(addr, &mut spare, &self.memory).unwrap();
    }

    fn bring(&mut self, maps: &str, wanted: usize, write: bool) -> Result<u64, Error> {
        let access = if write { Access::Write } else { Access::Read };
        let refused = |errno| Error::Fault {
            fault: DeviceFault {
                addr: wanted,
                access,
            },
            errno,
        };
        let addr = wanted & !(PAGE - 1);
        let kind = kind(maps, addr).ok_or_else(|| refused(Errno::FAULT))?;
        if write && !kind.starts_with("rw") {
            return Err(refused(Errno::ACCESS));
        }
        if let Some(page) = self.resident.get_mut(&addr) {
            page.write |= write;
            let (number, turn) = (page.number, self.turn);
            page.turn = turn;
            self.enter(addr, number, write);
            return Ok(0);
        }
        self.grow(addr);
        let stays = self.kept_out.start < addr + PAGE && addr < self.kept_out.end;
        if stays || !kind.starts_with("rw") || kind.ends_with('s') {
            self.tree
                .set(
                    addr,
                    1,
                    HMM_GPU_PTE_VALID | HMM_GPU_PTE_SYSTEM,
                    &self.memory,
                )
                .unwrap();
            return Ok(0);
        }
        if self.resident.len() == self.pages {
            let oldest = self
                .resident
                .iter()
                .min_by_key(|(_, page)| page.turn)
                .map(|(&addr, _)| addr);
            self.leave(oldest.unwrap());
        }
        let twin = self.of_program(addr).ok_or_else(|| refused(Errno::FAULT))?;
        let number = self.memory.free.lock().unwrap().pop().unwrap();
        self.memory.write(number, &twin);
        self.enter(addr, number, write);
        self.resident.insert(
            addr,
            Resident {
                number,
                write,
                twin,
                turn: self.turn,
            },
        );
        Ok(PAGE as u64)
    }

    fn enter(&mut self, addr: usize, number: usize, write: bool) {
        let word = (OFFSET + (number * PAGE) as u64)
            | HMM_GPU_PTE_VALID
            | if write { HMM_GPU_PTE_WRITABLE } else { 0 };
        self.tree.set(addr, word, word, &self.memory).unwrap();
    }
}

impl Drop for Software {
    fn drop(&mut self) {
        if self.still {
            self.give_back();
        }
    }
}

fn place(memory: &Arc<Memory>) -> Place {
    let number = memory.free.lock().unwrap().pop().unwrap();
    memory.write(number, &[0; PAGE]);
    Place {
        memory: Arc::clone(memory),
        number,
    }
}

/// How the page at an address is mapped, as `/proc/self/maps` says it: `rw-p`.
fn kind(maps: &str, addr: usize) -> Option<String> {
    maps.lines().find_map(|line| {
        let (range, rest) = line.split_once(' ')?;
        let (begin, end) = range.split_once('-')?;
        let hex = |text| usize::from_str_radix(text, 16).ok();
        (hex(begin)? <= addr && addr < hex(end)?).then(|| rest[..4].to_owned())
    })
}

// SAFETY: the memory is freed with the last who has it, and this is one of them. What is in the table is in it, and stays there
// while work runs: pages leave in `service` only, which is not called then.
unsafe impl Backend for Software {
    fn memory(&self) -> PoolMemory {
        PoolMemory {
            start: self.memory.start,
            bytes: self.memory.pages * PAGE,
            offset: OFFSET,
        }
    }

    fn room(&self) -> usize {
        self.pages
    }

    fn table(&mut self) -> Result<TableRoot, Error> {
        assert!(self.running);
        Ok(TableRoot {
            offset: self.tree.root().unwrap(),
            levels: self.tree.levels(),
        })
    }

    fn begin(&mut self) -> Result<(), Error> {
        assert!(!std::mem::replace(&mut self.running, true));
        if self.still {
            return Ok(());
        }
        let all: Vec<usize> = self.resident.keys().copied().collect();
        for addr in all {
            let touched = |one_of| addr / PAGE % one_of == 0;
            match self.of_program(addr) {
                Some(_) if self.touched.is_some_and(touched) => self.leave(addr),
                Some(bytes) => {
                    let page = self.resident.get_mut(&addr).unwrap();
                    self.memory.write(page.number, &bytes);
                    page.twin = bytes;
                }
                None => self.leave(addr),
            }
        }
        Ok(())
    }

    fn end(&mut self) -> Result<bool, Error> {
        assert!(std::mem::replace(&mut self.running, false));
        if !self.still {
            self.give_back();
        }
        Ok(true)
    }

    fn service(&mut self, misses: &[Miss]) -> Result<u64, Error> {
        assert!(!self.running && misses.len() <= self.pages);
        self.turn += 1;
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let mut bytes = 0;
        for miss in misses {
            if miss.system {
                return Err(SvmError::not_in_vram(miss.addr).into());
            }
            bytes += self.bring(&maps, miss.addr, miss.write)?;
        }
        Ok(bytes)
    }
}
