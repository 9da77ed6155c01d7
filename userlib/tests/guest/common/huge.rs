//! Memory in huge pages, and what is done to parts of them.

use std::ops::Range;

use hmm_gpu::{Device, Place};

use super::kernel;
use super::memory::{last_errno, Area, Span, HUGE};
use super::mirror::{device_check, device_check_zero, snapshot};
use super::{assert_place, moved};

pub const MADV_COLLAPSE: libc::c_int = 25;

const RW: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;
const ANONYMOUS: libc::c_int = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;

/// So many huge pages, written with the pattern of a seed.
#[track_caller]
pub fn filled(count: usize, seed: u64) -> Area {
    let area = Area::new(count * HUGE);
    area.advise(libc::MADV_HUGEPAGE).unwrap();
    area.fill(seed);
    assert_huge(&area);
    area
}

/// The same, in VRAM.
#[track_caller]
pub fn resident(device: &Device, count: usize, seed: u64) -> Area {
    let area = filled(count, seed);
    to_device(device, *area);
    area
}

/// Asserts that the kernel has all of an area in huge pages.
#[track_caller]
pub fn assert_huge(area: &Area) {
    let huge = kernel::smaps(area.addr, "AnonHugePages");
    assert_eq!(huge, area.bytes() as u64 >> 10, "KiB are in huge pages");
}

/// Moves memory in huge pages to VRAM, and proves that it went whole.
#[track_caller]
pub fn to_device(device: &Device, span: Span) {
    let before = device.counters().unwrap();
    assert_eq!(super::to_device(device, span), moved(span.pages, 0, 0, 0));
    let work = device.counters().unwrap() - before;
    let count = (span.pages / HUGE) as u64;
    assert_eq!((work.large_to_device, work.large_failures), (count, 0));
    assert_large(device, span);
}

/// Asserts that memory is in VRAM, in folios of 2 MiB, each mapped as one.
#[track_caller]
pub fn assert_large(device: &Device, span: Span) {
    assert_place(device, span, Place::Device);
    let seen = snapshot(device, span);
    for (i, huge) in seen.chunks(HUGE).enumerate() {
        let first = huge[0].vram_page().unwrap();
        assert_eq!(first % HUGE, 0, "of huge page {i}");
        for (page, seen) in huge.iter().enumerate() {
            let there = (seen.order(), seen.vram_page());
            assert_eq!(there, (9, Some(first + page)), "page {page} of {i}");
        }
    }
}

/// Asserts that memory is in VRAM, each page on its own.
#[track_caller]
pub fn assert_small(device: &Device, span: Span) {
    assert_place(device, span, Place::Device);
    let seen = snapshot(device, span);
    let large = seen.iter().position(|seen| seen.order() != 0);
    assert_eq!(large, None, "it is mapped together with others");
}

/// `mremap` to another address, in place of what is there. Nothing is left to be accessed at the old one, or nothing but zeroes
/// (`MREMAP_DONTUNMAP`).
#[track_caller]
pub fn remap(from: Span, to: usize, flags: libc::c_int) -> Span {
    let keep = flags & libc::MREMAP_DONTUNMAP != 0;
    let flags = flags | libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    let (old, new) = (from.addr as *mut libc::c_void, to as *mut libc::c_void);
    // SAFETY: both ranges are the test's own.
    let moved = unsafe { libc::mremap(old, from.bytes(), from.bytes(), flags, new) };
    assert_eq!(moved, new, "{}", last_errno());
    if !keep {
        from.map_over(libc::PROT_NONE, ANONYMOUS, -1);
    }
    from.at(to)
}

/// What is done to a part of two huge pages.
enum Deed {
    Unmap,
    Discard,
    Protect,
    /// `mremap`, to so many pages after a multiple of 2 MiB.
    Move(usize, libc::c_int),
}

/// A name, what is done, from which page on, and to how many.
const DEEDS: [(&str, Deed, usize, usize); 13] = [
    ("a hole", Deed::Unmap, 100, 9),
    ("a hole at the border", Deed::Unmap, HUGE - 5, 10),
    ("no first half", Deed::Unmap, 0, HUGE / 2),
    ("no last page", Deed::Unmap, 2 * HUGE - 1, 1),
    ("discarded", Deed::Discard, 200, 40),
    ("discarded at the border", Deed::Discard, HUGE - 1, 2),
    ("one discarded", Deed::Discard, HUGE, HUGE),
    ("read-only", Deed::Protect, 77, HUGE),
    ("moved", Deed::Move(0, 0), 0, 2 * HUGE),
    ("moved by some pages", Deed::Move(7, 0), 0, 2 * HUGE),
    ("halves moved", Deed::Move(0, 0), HUGE / 2, HUGE),
    (
        "taken",
        Deed::Move(500, libc::MREMAP_DONTUNMAP),
        0,
        2 * HUGE,
    ),
    (
        "halves taken",
        Deed::Move(0, libc::MREMAP_DONTUNMAP),
        HUGE / 2,
        HUGE,
    ),
];

/// Huge pages in VRAM, to parts of which something was done, and what the parts hold since.
pub struct Parts {
    areas: Vec<Area>,
    holds: Vec<(&'static str, Span, u64)>,
    zeroes: Vec<(&'static str, Span)>,
}

impl Parts {
    /// All there are.
    #[track_caller]
    pub fn all(device: &Device, seed: u64) -> Self {
        Self::some(device, seed, 0..DEEDS.len())
    }

    /// A few at a time, for a device with little VRAM.
    #[track_caller]
    pub fn each(device: &Device, seed: u64, test: impl Fn(Self)) {
        const FEW: usize = 3;

        for first in (0..DEEDS.len()).step_by(FEW) {
            let end = DEEDS.len().min(first + FEW);
            test(Self::some(device, seed, first..end));
        }
    }

    #[track_caller]
    fn some(device: &Device, seed: u64, which: Range<usize>) -> Self {
        let mut this = Self {
            areas: vec![],
            holds: vec![],
            zeroes: vec![],
        };
        for (what, deed, first, pages) in &DEEDS[which] {
            let area = this.area(device, seed);
            let part = area.part(*first, *pages);
            match deed {
                Deed::Unmap => {
                    part.unmap();
                    // So that nothing else comes to be there.
                    part.map_over(libc::PROT_NONE, ANONYMOUS, -1);
                }
                Deed::Discard => {
                    part.advise(libc::MADV_DONTNEED).unwrap();
                    this.zeroes.push((what, part));
                }
                Deed::Protect => {
                    part.protect(libc::PROT_READ);
                    this.holds.push((what, part, seed));
                }
                Deed::Move(offset, flags) => {
                    let room = Area::offset(*offset, *pages);
                    this.holds
                        .push((what, remap(part, room.addr, *flags), seed));
                    this.areas.push(room);
                    if *flags != 0 {
                        this.zeroes.push((what, part));
                    }
                }
            }
            this.rest(what, area, *first, *pages, seed);
        }
        this
    }

    #[track_caller]
    fn area(&mut self, device: &Device, seed: u64) -> Span {
        let area = resident(device, 2, seed);
        let span = *area;
        self.areas.push(area);
        span
    }

    /// All but some pages hold what they held.
    fn rest(&mut self, what: &'static str, area: Span, first: usize, pages: usize, seed: u64) {
        let end = first + pages;
        for (first, pages) in [(0, first), (end, area.pages - end)] {
            if pages > 0 {
                self.holds.push((what, area.part(first, pages), seed));
            }
        }
    }

    /// Asserts what the device finds, every byte, wherever it lies.
    #[track_caller]
    pub fn device_check(&self, device: &Device) {
        for (what, span, seed) in &self.holds {
            println!("{what}");
            device_check(device, *span, *seed);
        }
        for (what, span) in &self.zeroes {
            println!("{what}: zeroes");
            device_check_zero(device, *span);
        }
    }

    /// Asserts what the CPU finds, every byte.
    #[track_caller]
    pub fn check(&self) {
        for (what, span, seed) in &self.holds {
            println!("{what}");
            span.check(*seed);
        }
        for (what, span) in &self.zeroes {
            println!("{what}: zeroes");
            span.check_zero();
        }
    }

    /// Writes to all of it that can be written, and asserts that it is there.
    #[track_caller]
    pub fn fill(&mut self, seed: u64) {
        for area in &self.areas {
            // Whatever is mapped there.
            area.protect(RW);
        }
        for (_, span, holds) in &mut self.holds {
            span.fill(seed);
            *holds = seed;
        }
        self.check();
    }

    /// The pages that have bytes which must survive.
    pub fn spans(&self) -> impl Iterator<Item = Span> + '_ {
        self.holds.iter().map(|(_, span, _)| *span)
    }
}
