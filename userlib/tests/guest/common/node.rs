//! A node of memory that can be used up, or broken up, without harm to the rest: the guest's memory is made to look like that of two
//! (`numa=fake=2`).

use std::collections::HashSet;
use std::fs;
use std::sync::{Mutex, Once, PoisonError};

use super::kernel::{self, Entry};
use super::memory::{last_errno, Area, HUGE};
use super::uring::Ring;

const NODE: &str = "/sys/devices/system/node/node1";
static NODE_MASK: u64 = 1 << 1;

/// Keeps so many huge pages of the node from everybody, or as many as there are. Returns how many that is.
pub fn reserve(pages: usize) -> usize {
    let file = format!("{NODE}/hugepages/hugepages-2048kB/nr_hugepages");
    fs::write(file, pages.to_string()).expect("the guest needs numa=fake=2");
    number("hugepages/hugepages-2048kB/nr_hugepages", "")
}

/// MiB of the node that are free.
pub fn free_mib() -> usize {
    number("meminfo", "Node 1 MemFree:") / 1024
}

fn number(file: &str, name: &str) -> usize {
    let text = fs::read_to_string(format!("{NODE}/{file}")).unwrap();
    let mut lines = text.lines();
    let number = lines.find_map(|line| line.strip_prefix(name)).unwrap();
    let number = number.split_whitespace().next().unwrap();
    number.parse().unwrap()
}

/// Pieces of 2 MiB and more of the node that are free.
fn large_pieces() -> usize {
    let text = fs::read_to_string("/proc/buddyinfo").unwrap();
    let zones = text.lines().filter(|line| line.starts_with("Node 1,"));
    let pieces = |line: &str| -> usize {
        // Behind the zone's name: how many there are of 4 KiB, 8 KiB, 16 KiB…
        let sizes = line.split_whitespace().skip(4 + 9);
        sizes.map(|count| count.parse::<usize>().unwrap()).sum()
    };
    zones.map(pieces).sum()
}

/// Has the program, and what it is linked with, be in memory to stay: what comes next in it may be on a page that is not there, and for which
/// there is no memory then.
fn keep_program() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        let number = |text| usize::from_str_radix(text, 16).unwrap();
        for line in maps.lines() {
            let mut fields = line.split_whitespace();
            let (start, end) = fields.next().unwrap().split_once('-').unwrap();
            let (start, end) = (number(start), number(end));
            let is_text = fields.next().is_some_and(|access| access.starts_with("r-"));
            if is_text && line.contains(" /") {
                // SAFETY: it changes nothing of what is mapped.
                let kept = unsafe { libc::mlock(start as *const _, end - start) };
                assert_eq!(kept, 0, "{line}: {}", last_errno());
            }
        }
    });
}

/// This thread, and those that it makes, get memory from the node, and from no other, until it is dropped.
pub struct Bound;

impl Bound {
    pub fn to_node() -> Self {
        keep_program();
        Self::policy(libc::MPOL_BIND, &raw const NODE_MASK, 64);
        Self
    }

    fn policy(mode: libc::c_int, nodes: *const u64, bits: usize) {
        // SAFETY: the mask has as many bits, or is null.
        let result = unsafe { libc::syscall(libc::SYS_set_mempolicy, mode, nodes, bits) };
        assert_eq!(result, 0, "{}", last_errno());
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        Self::policy(libc::MPOL_DEFAULT, std::ptr::null(), 0);
    }
}

/// What has the node's memory in pieces.
struct Fragments {
    pins: Ring,
    _area: Area,
}

/// To make it takes long: tests that come after one another share it.
static FRAGMENTS: Mutex<Option<Fragments>> = Mutex::new(None);

/// Has the node's memory be in pieces: more than 150 MiB are free, and nowhere 2 MiB in one. Until [`mend`], or the end of the program.
#[track_caller]
pub fn break_up() {
    extern "C" fn at_exit() {
        mend();
    }
    static ONCE: Once = Once::new();

    // With what has become whole again in nobody's hands.
    let in_pieces = || {
        reserve(100_000);
        (large_pieces(), free_mib())
    };
    let fragments = || FRAGMENTS.lock().unwrap_or_else(PoisonError::into_inner);
    let is_broken = |(large, free_mib): (usize, usize)| large == 0 && free_mib > 150;
    if fragments().is_some() && is_broken(in_pieces()) {
        return;
    }
    mend();
    // SAFETY: the function is there until the end.
    ONCE.call_once(|| assert_eq!(unsafe { libc::atexit(at_exit) }, 0));
    *fragments() = Some(Fragments::new());
    let found = in_pieces();
    assert!(
        is_broken(found),
        "pieces of 2 MiB, and MiB that are free: {found:?}"
    );
}

/// Gives the node's memory back, in the pieces that it is in by itself.
pub fn mend() {
    drop(
        FRAGMENTS
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take(),
    );
}

impl Fragments {
    #[track_caller]
    fn new() -> Self {
        const BLOCKS: usize = 150;
        // The kernel keeps less than that for itself, and would rather kill. But it keeps more for a while when it had to break up
        // what is large, unless it is told not to.
        const LEFT_MIB: usize = 120;

        fs::write("/proc/sys/vm/watermark_boost_factor", "0").unwrap();
        // What a processor has freed it keeps for itself, which may be a hundred MiB, and is not free then for who looks.
        fs::write("/proc/sys/vm/percpu_pagelist_high_fraction", "100000").unwrap();
        let all = reserve(100_000);
        reserve(all - BLOCKS);
        let area = Area::new(BLOCKS * HUGE);
        area.advise(libc::MADV_NOHUGEPAGE).unwrap();
        let bound = Bound::to_node();
        let mut populated = 0;
        while populated < area.pages && free_mib() > LEFT_MIB {
            let part = area.part(populated, HUGE);
            part.advise(libc::MADV_POPULATE_WRITE).unwrap();
            populated += HUGE;
        }
        drop(bound);
        // One page of each 2 MiB that it has any of cannot be moved or freed. All others are given back.
        let mut blocks = HashSet::new();
        let mut kept = vec![];
        let mut given_back = 0;
        let entries = kernel::pagemap(std::process::id(), area.addr, populated);
        for (i, entry) in entries.into_iter().enumerate() {
            let Entry::Present { pfn } = entry else {
                panic!("page {i} is {entry:?}");
            };
            if blocks.insert(pfn / HUGE as u64) {
                kept.push((i, area.page(i)));
            }
        }
        let spans: Vec<_> = kept.iter().map(|(_, page)| *page).collect();
        let pins = Ring::with_buffers(&spans);
        for (i, _) in kept.into_iter().chain([(populated, *area)]) {
            if i > given_back {
                let rest = area.part(given_back, i - given_back);
                rest.advise(libc::MADV_DONTNEED).unwrap();
            }
            given_back = i + 1;
        }
        Self { pins, _area: area }
    }
}

impl Drop for Fragments {
    fn drop(&mut self) {
        self.pins.unregister();
        reserve(0);
    }
}
