//! Memory is short, or in disorder: swap, reclaim, merging, compaction and the limits of a group take pages that a device has mapped, and
//! give them back with what was written last, by whomever.
//!
//! Runs in the virtual GPU host: `bench/test guest_pressure`.

use std::ffi::CString;
use std::fs;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use crate::common::child::Child;
use crate::common::driver::{assert_empty, Driver, GPUS};
use crate::common::kernel::{self, Entry, Log};
use crate::common::memory::{errno, file, Area, Span, PAGE};
use crate::common::mirror::{
    both_check, device_check, device_check_by, device_fill, device_fill_by, fault_all, mirrored,
    read, snapshot, MAP, MIGRATE, WRITE,
};
use crate::common::swap::{reclaim, Swap};
use crate::common::{assert_place, eventually, is_checking, places, rounds, to_device, to_system};
use hmm_gpu::{Device, Place, Target};

const RW: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;

/// How many pages of a span are in memory, by the kernel.
fn present(span: Span) -> usize {
    let entries = kernel::pagemap(std::process::id(), span.addr, span.pages);
    let is_there = |entry: &&Entry| matches!(entry, Entry::Present { .. });
    entries.iter().filter(is_there).count()
}

/// Catches an entry for a page that was swapped out, bytes that come back as they were before the device wrote, and a device that does
/// not get them back at all.
#[test]
fn what_is_swapped_out_comes_back_to_the_device() {
    let swap = Swap::on();
    let (driver, device) = Driver::load_with("", GPUS[0]);
    let area = Area::filled(96, 1);
    let (resident, swapped) = (area.part(0, 32), area.part(32, 64));
    to_device(&device, resident);
    for (policy, seed) in [(MAP, 2), (MIGRATE, 4), (MAP, 6)] {
        if policy == MAP {
            to_system(&device, swapped);
        }
        device_fill(&device, *area, seed);
        to_system(&device, swapped);
        device_check(&device, *area, seed);
        reclaim(*area, || present(swapped) == 0);
        assert_eq!(mirrored(&device, swapped), 0);
        assert_place(&device, resident, Place::Device);
        assert_eq!(places(&device, swapped).counts().none, 64);
        assert_eq!(mirrored(&device, resident), 32, "what is in VRAM stays");

        // By reading, by writing, and by the CPU.
        device_check_by(&device, swapped.part(0, 20), seed, policy);
        device_fill_by(&device, swapped.part(20, 20), seed + 1, policy);
        swapped.part(40, 10).check(seed);
        both_check(&device, swapped.part(0, 20), seed);
        both_check(&device, swapped.part(20, 20), seed + 1);
        both_check(&device, swapped.part(40, 24), seed);
        device_check(&device, resident, seed);
    }
    // A part of a page that is out, and one that was asked to move while it was.
    to_system(&device, *area);
    area.fill(8);
    reclaim(*area, || present(*area) == 0);
    let word = 0x1122_3344_5566_7788_u64;
    for (page, policy) in [(3, MAP), (40, MIGRATE)] {
        let addr = area.page(page).addr + 800;
        crate::common::mirror::write(&device, addr, &word.to_ne_bytes(), policy).whole(8);
        let mut words = area.page(page).pattern(8);
        words[100] = word;
        let found = crate::common::mirror::device_words(&device, area.page(page), MAP);
        assert!(found == words, "page {page}");
        area.page(page).fill(8);
    }
    let moved = device
        .prefetch_range(area.addr, area.bytes(), Target::Device)
        .unwrap();
    assert_eq!(moved.total(), area.bytes() as u64);
    both_check(&device, *area, 8);
    drop((area, device));
    driver.finish();
    drop(swap);
}

/// Catches a write of the device that the kernel knows nothing of, so that it takes the page for clean and drops it: pages that are
/// still in the swap as they were, that may be discarded, or that are a file's, and each of these by way of VRAM.
#[test]
fn what_the_device_writes_to_clean_pages_survives_reclaim() {
    const PAGES: usize = 48;

    let swap = Swap::on();
    let (driver, device) = Driver::load_with("", GPUS[0]);
    // How a device comes to write there: mapped where they lie, in VRAM by its fault, or by request and back by a touch.
    for way in 0..3 {
        println!("way {way}");
        let write = |span: Span, seed: u64| match way {
            0 => device_fill_by(&device, span, seed, MAP),
            1 => device_fill_by(&device, span, seed, MIGRATE),
            _ => {
                let asked = device.prefetch_range(span.addr, span.bytes(), Target::Device);
                asked.unwrap();
                device_fill(&device, span, seed);
                // By reading only.
                span.touch();
            }
        };

        // Swapped out and back in by reading: the copy in the swap may be there still.
        let area = Area::filled(PAGES, 1);
        reclaim(*area, || present(*area) == 0);
        area.check(1);
        device_check(&device, *area, 1);
        write(area.part(0, 24), 2);
        to_system(&device, *area);
        reclaim(*area, || present(*area) == 0);
        both_check(&device, area.part(0, 24), 2);
        both_check(&device, area.part(24, 24), 1);

        // To be discarded, but written to by the device since.
        let area = Area::filled(PAGES, 3);
        device_fill(&device, *area, 3);
        area.advise(libc::MADV_FREE).unwrap();
        write(area.part(0, 24), 4);
        to_system(&device, area.part(0, 24));
        let discarded = area.part(24, 24);
        reclaim(*area, || {
            let entries = kernel::pagemap(std::process::id(), discarded.addr, 24);
            entries.iter().all(|entry| *entry == Entry::None)
        });
        device_check(&device, area.part(0, 24), 4);
        both_check(&device, area.part(0, 24), 4);
        discarded.check_zero();

        // A file's in memory, of which only zeroes were seen.
        let backing = file(1, 0);
        backing.set_len(0).unwrap();
        backing.set_len((PAGES * PAGE) as u64).unwrap();
        let area = Area::new(PAGES);
        area.map_over(RW, libc::MAP_SHARED, backing.as_raw_fd());
        area.touch();
        write(area.part(0, 24), 5);
        reclaim(*area, || present(*area) == 0);
        area.part(0, 24).check(5);
        both_check(&device, area.part(0, 24), 5);
        area.part(24, 24).check_zero();
    }
    drop(device);
    driver.finish();
    drop(swap);
}

const KSM: &str = "/sys/kernel/mm/ksm";

fn ksm(file: &str, text: &str) {
    fs::write(format!("{KSM}/{file}"), text).unwrap();
}

fn ksm_count(file: &str) -> usize {
    let text = fs::read_to_string(format!("{KSM}/{file}")).unwrap();
    text.trim().parse().unwrap()
}

/// Catches a device that writes to a page that others have too: pages that ksmd merged while the device had each of them.
#[test]
fn a_write_of_the_device_breaks_a_merge() {
    const PAGES: usize = 64;

    let (driver, device) = Driver::load_with("", GPUS[0]);
    let area = Area::new(PAGES);
    area.advise(libc::MADV_NOHUGEPAGE).unwrap();
    // Each page like every fourth other.
    let alike = |page: usize| Span::new(area.page(page).addr, 1);
    let seed = |page: usize| 100 + page as u64 % 4;
    for page in 0..PAGES {
        alike(page).fill(seed(page));
    }
    // Entries for all, writable; some by way of VRAM.
    to_device(&device, area.part(0, 16));
    fault_all(&device, *area, WRITE, MAP);
    to_system(&device, area.part(0, 8));
    area.advise(libc::MADV_MERGEABLE).unwrap();
    ksm("pages_to_scan", "20000");
    ksm("sleep_millisecs", "10");
    ksm("run", "1");
    // What is in VRAM ksmd does not see, or brings home.
    eventually("most are merged", || {
        ksm_count("pages_sharing") >= PAGES - 8 - 4
    });
    for page in 0..PAGES {
        device_check(&device, alike(page), seed(page));
    }
    for (first, policy) in [(0, MAP), (1, MIGRATE)] {
        for page in (first..PAGES).step_by(2) {
            device_fill_by(&device, alike(page), 200 + page as u64, policy);
        }
        for page in 0..PAGES {
            let written = page % 2 == first || first == 1;
            let seed = if written {
                200 + page as u64
            } else {
                seed(page)
            };
            both_check(&device, alike(page), seed);
        }
    }
    ksm("run", "2");
    for page in 0..PAGES {
        both_check(&device, alike(page), 200 + page as u64);
    }
    ksm("run", "0");
    drop((area, device));
    driver.finish();
}

/// Catches an entry for where a page was before the kernel moved it: one that is to be used no more, page by page, and any when the
/// kernel gathers its free memory.
#[test]
fn pages_that_the_kernel_moves_are_found_where_they_are() {
    let count = rounds(4096);

    let (driver, device) = Driver::load_with("", GPUS[0]);
    let place = |page: Span| kernel::pagemap(std::process::id(), page.addr, 1)[0];
    let area = Area::filled(8, 1);
    for page in 0..8 {
        let page = area.page(page);
        device_fill(&device, *area, 2);
        let before = place(page);
        page.advise(libc::MADV_SOFT_OFFLINE).unwrap();
        assert_ne!(place(page), before, "the kernel has moved it");
        assert_eq!(mirrored(&device, page), 0);
        assert_eq!(mirrored(&device, *area), 7);
        device_check(&device, *area, 2);
        device_fill(&device, page, 3);
        both_check(&device, page, 3);
        page.fill(2);
    }

    // Of each area every eighth page stays: holes everywhere. Whether these or others are moved is the kernel's choice.
    let mut areas = vec![];
    let mut moved = 0;
    for seed in 1..=3 {
        let area = Area::filled(count, 1);
        for page in (0..count).filter(|page| page % 8 != 0) {
            area.page(page).advise(libc::MADV_DONTNEED).unwrap();
        }
        areas.push(area);
        let pages = || {
            let pages = |area: &Area| {
                let area = **area;
                (0..count).step_by(8).map(move |page| area.page(page))
            };
            areas.iter().flat_map(pages)
        };
        pages().for_each(|page| device_fill(&device, page, seed));
        let places: Vec<Entry> = pages().map(place).collect();
        fs::write("/proc/sys/vm/compact_memory", "1").unwrap();
        for (page, before) in pages().zip(places) {
            moved += usize::from(place(page) != before);
            snapshot(&device, page);
            device_check(&device, page, seed);
        }
        pages().for_each(|page| page.check(seed));
        if moved > 50 {
            break;
        }
    }
    println!("{moved} pages were compacted");
    drop((area, areas, device));
    driver.finish();
}

/// A group of processes with a limit on their memory.
struct Group(PathBuf);

impl Group {
    fn new(name: &str, max: usize, swap: usize) -> Self {
        let root = PathBuf::from("/sys/fs/cgroup");
        if !root.join("cgroup.procs").exists() {
            let [kind, place] =
                ["cgroup2", "/sys/fs/cgroup"].map(|text| CString::new(text).unwrap());
            // SAFETY: C strings, and no data.
            let mounted = unsafe {
                let none = std::ptr::null();
                libc::mount(kind.as_ptr(), place.as_ptr(), kind.as_ptr(), 0, none)
            };
            errno(mounted).unwrap();
        }
        fs::write(root.join("cgroup.subtree_control"), "+memory").unwrap();
        let this = Self(root.join(name));
        fs::create_dir(&this.0).unwrap();
        this.write("memory.max", max);
        this.write("memory.swap.max", swap);
        this
    }

    fn write(&self, file: &str, number: usize) {
        fs::write(self.0.join(file), number.to_string()).unwrap();
    }

    /// Has this process belong to it.
    fn enter(&self) {
        fs::write(self.0.join("cgroup.procs"), std::process::id().to_string()).unwrap();
    }

    fn number(&self, file: &str) -> usize {
        let text = fs::read_to_string(self.0.join(file)).unwrap();
        text.trim().parse().unwrap()
    }

    /// A count of `memory.events`.
    fn events(&self, name: &str) -> usize {
        self.named("memory.events", name)
    }

    /// A number of `memory.stat`, in bytes.
    fn stat(&self, name: &str) -> usize {
        self.named("memory.stat", name)
    }

    fn named(&self, file: &str, name: &str) -> usize {
        let text = fs::read_to_string(self.0.join(file)).unwrap();
        let mut lines = text.lines();
        let count = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        count.unwrap().parse().unwrap()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Until the last process has left.
        eventually("the group is empty", || fs::remove_dir(&self.0).is_ok());
    }
}

/// Catches bytes that are lost when a group is at its limit: what is in VRAM counts too, and comes home although there is no room
/// for more; what there is no room for is swapped out under the device.
#[test]
fn at_a_group_s_limit_the_bytes_survive() {
    // Of which there is room for two thirds, with all that the process has besides.
    let (mib, limit_mib) = if is_checking() { (7, 10) } else { (14, 20) };
    let pages = (mib << 20) / PAGE;

    let swap = Swap::on();
    let (driver, device) = Driver::load_with("", GPUS[0]);
    let path = device.path();
    let group = Group::new("limit", limit_mib << 20, 256 << 20);
    let mut child = Child::fork(|test| {
        group.enter();
        let device = Device::open_path(path).unwrap();
        let first = Area::filled(pages, 1);
        to_device(&device, *first);
        test.send(0);
        test.receive();
        // There is no room for both.
        let second = Area::filled(pages, 2);
        device_fill_by(&device, *second, 3, MAP);
        device_check(&device, *first, 1);
        device_fill(&device, first.part(0, 1000), 4);
        let back = device.prefetch_range(first.addr, first.bytes(), Target::System);
        println!("home: {:?}", back.map(|moved| moved.to_string()));
        device_check(&device, *second, 3);
        device_check_by(&device, first.part(1000, pages - 1000), 1, MIGRATE);
        first.part(0, 1000).check(4);
        both_check(&device, second.part(0, 1000), 3);
        second.part(1000, pages - 1000).check(3);
        first.part(1000, pages - 1000).check(1);
        test.send(0);
        test.receive();
    });
    child.receive();
    let used = group.number("memory.current");
    assert!(used >= pages * PAGE, "what is in VRAM counts: {used}");
    child.send(0);
    child.receive();
    assert!(group.number("memory.swap.current") > (mib << 20) - (limit_mib << 19));
    assert_eq!(group.events("oom_kill"), 0);
    child.send(0);
    child.finish();
    drop(group);
    assert_empty(&device);
    drop(device);
    driver.finish();
    drop(swap);
}

/// Catches memory that a client has and its group does not pay for: pages in VRAM, whether they came from system memory or were never
/// anywhere else, and the kernel's copies of device page tables.
#[test]
fn what_a_client_has_is_charged_to_its_group() {
    const PAGES: usize = (8 << 20) / PAGE;
    const WINDOWS: usize = 300;

    let (driver, device) = Driver::load_with("", GPUS[0]);
    let path = device.path();
    let group = Group::new("charged", 256 << 20, 0);
    let mut child = Child::fork(|test| {
        group.enter();
        let device = Device::open_path(path).unwrap();
        test.send(0);
        test.receive();
        let filled = Area::filled(PAGES, 1);
        to_device(&device, *filled);
        test.send(0);
        test.receive();
        // Never touched: it arrives as zeroes.
        let untouched = Area::new(PAGES);
        to_device(&device, *untouched);
        test.send(0);
        test.receive();
        // By a thread of the kernel's own.
        let queued = Area::new(PAGES);
        let moving = device.prefetch_range_async(queued.addr, queued.bytes(), Target::Device);
        assert_eq!(moving.unwrap().wait().unwrap().moved, queued.bytes() as u64);
        test.send(0);
        test.receive();
        // A node for each.
        let sparse = Area::new(WINDOWS * 512);
        sparse.advise(libc::MADV_NOHUGEPAGE).unwrap();
        for window in 0..WINDOWS {
            device_fill_by(&device, sparse.page(window * 512), 2, MAP);
        }
        test.send(device.mirror().unwrap().nodes);
        test.receive();
        filled.check(1);
        untouched.check_zero();
        queued.check_zero();
    });
    // Charges are taken in batches, one a processor.
    const SLACK: usize = 2 << 20;
    child.receive();
    let mut before = (group.number("memory.current"), group.stat("anon"));
    for what in ["moved", "untouched", "queued"] {
        child.step();
        let now = (group.number("memory.current"), group.stat("anon"));
        let more = (now.0 - before.0, now.1 - before.1);
        assert!(more.0 + SLACK >= PAGES * PAGE, "{what}: {more:?}");
        assert!(more.0 <= PAGES * PAGE + SLACK, "{what}: {more:?}");
        assert!(more.1 + SLACK >= PAGES * PAGE, "{what}: {more:?}");
        before = now;
    }
    let kernel = group.stat("kernel");
    let nodes = child.step() as usize;
    assert!(nodes >= WINDOWS, "{nodes}");
    let more = group.stat("kernel") - kernel;
    assert!(more >= nodes * PAGE, "{more} for {nodes} nodes");
    child.send(0);
    child.finish();
    drop(group);
    assert_empty(&device);
    drop(device);
    driver.finish();
}

/// What the kernel says of a process that it kills is no trouble of this test's: it does not go to the console.
struct Quiet {
    before: String,
    log: Log,
}

const CONSOLE: &str = "/proc/sys/kernel/printk";

impl Quiet {
    fn new() -> Self {
        let before = fs::read_to_string(CONSOLE).unwrap();
        let log = Log::from_now();
        fs::write(CONSOLE, "4").unwrap();
        Self { before, log }
    }

    /// The console as before. All that it did not get was about the killing.
    #[track_caller]
    fn finish(mut self) {
        fs::write(CONSOLE, &self.before).unwrap();
        let bad = |line: &String| {
            let words = ["BUG", "WARNING", "KASAN", "Oops", "blocked", "hmm_gpu:"];
            words.iter().any(|word| line.contains(word))
        };
        let lines = self.log.lines();
        assert_eq!(lines.iter().find(|line| bad(line)), None);
        assert!(lines.iter().any(|line| line.contains("out of memory")));
    }
}

/// Catches a killing that goes beyond the group, a killed process's pages that stay, and a reaper that waits for a mirror's lock.
#[test]
fn a_group_without_room_loses_its_process_and_nobody_else_anything() {
    let (driver, device) = Driver::load_with("", GPUS[0]);
    let path = device.path();
    let area = Area::filled(200, 1);
    to_device(&device, area.part(0, 100));
    device_check(&device, *area, 1);
    let group = Group::new("killed", 24 << 20, 0);
    let quiet = Quiet::new();
    for by_device in [false, true] {
        let mut child = Child::fork(|test| {
            group.enter();
            let device = Device::open_path(path).unwrap();
            let resident = Area::filled((12 << 20) / PAGE, 5);
            to_device(&device, *resident);
            device_check(&device, *resident, 5);
            test.send(0);
            // Twice as much as there is room for, by the CPU or by the device's faults.
            std::thread::scope(|scope| {
                scope.spawn(|| loop {
                    // Who is being killed is told that there is no memory.
                    read(&device, resident.addr, &mut [0; 4 * PAGE], MAP);
                });
                let more = Area::new((24 << 20) / PAGE);
                more.advise(libc::MADV_NOHUGEPAGE).unwrap();
                if by_device {
                    for first in (0..more.pages).step_by(64) {
                        let part = more.part(first, 64);
                        let words = part.pattern(6);
                        let bytes: &[u8] = bytemuck::cast_slice(&words);
                        let ended = crate::common::mirror::write(&device, part.addr, bytes, MAP);
                        if ended.result.is_err() {
                            // Killed, or told that there is no memory: who insists is killed.
                            more.fill(7);
                        }
                    }
                } else {
                    more.fill(6);
                }
                test.send(1);
                test.receive();
            });
        });
        child.receive();
        child.finish_killed(libc::SIGKILL);
    }
    quiet.finish();
    assert_eq!(group.events("oom_kill"), 2);
    drop(group);
    eventually("only our own pages are in VRAM", || {
        let now = crate::common::driver::counters(&device);
        now.live_pages == 100 + now.table_pages
    });
    both_check(&device, *area, 1);
    drop((area, device));
    driver.finish();
}
