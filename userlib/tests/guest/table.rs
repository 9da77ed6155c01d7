//! The device page table: how device faults fill it, what empties it, what a snapshot says of it, and what a GPU finds there.
//!
//! Runs in the virtual GPU host with `iomem=relaxed`, so that a BAR that is in use can be looked at: `bench/test guest_table`.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::common::bar::Bar;
use crate::common::driver::{assert_empty, counters, on_each_kind, Driver, GPUS};
use crate::common::kernel::{self, Entry};
use crate::common::memory::{Area, Span, HUGE, PAGE};
use crate::common::mirror::{
    both_check, device_check, device_check_by, device_check_zero, device_fill, device_fill_by,
    fault, fault_all, mirrored, read, snapshot, table, try_fault, wants, write, MAP, MIGRATE, NONE,
    READ, WRITE,
};
use crate::common::random::Random;
use crate::common::{assert_place, eventually, moved, patience, places, to_device};
use hmm_gpu::uapi::{
    HMM_GPU_MAX_FAULTS as MAX_FAULTS, HMM_GPU_PTE_OFFSET_MASK as OFFSET,
    HMM_GPU_PTE_REQUESTED as REQUESTED, HMM_GPU_PTE_SYSTEM as SYSTEM, HMM_GPU_PTE_VALID as VALID,
    HMM_GPU_PTE_WRITABLE as WRITABLE,
};
use hmm_gpu::{Device, Errno, Place};

const RW: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;
const ANONYMOUS: libc::c_int = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;

/// Catches faults that are mixed up: sorted without their answers, a page that is mapped for half of what is asked of it, one bad
/// fault that spoils the others.
#[test]
fn faults_come_in_any_order_and_are_answered_one_by_one() {
    on_each_kind(|device| {
        for policy in [MAP, MIGRATE] {
            let area = Area::offset(HUGE - 12, 30);
            area.advise(libc::MADV_NOHUGEPAGE).unwrap();
            area.fill(3);
            // Never touched: by reading alone these would be the page of zeroes, which nobody writes to.
            area.part(13, 2).advise(libc::MADV_DONTNEED).unwrap();
            area.part(15, 5).protect(libc::PROT_READ);
            area.part(20, 2).protect(libc::PROT_NONE);
            area.part(22, 2).unmap();
            let (fault_no, access_no) = (libc::EFAULT as u32, libc::EACCES as u32);
            let mut random = Random::new(u64::from(policy));
            let mut asked = vec![];
            let mut ask = |pages: std::ops::Range<usize>, access, status| {
                for page in pages {
                    let addr = area.addr + page * PAGE + random.below(PAGE);
                    asked.push((wants(addr, access), status));
                }
            };
            ask(0..10, READ, 0);
            ask(5..15, WRITE, 0);
            ask(5..7, WRITE, 0);
            ask(13..15, READ, 0);
            ask(15..18, READ, 0);
            // For reading these could be mapped, for writing not: so for neither.
            ask(18..20, READ, access_no);
            ask(18..20, WRITE, access_no);
            ask(20..22, READ, access_no);
            ask(22..24, READ, fault_no);
            ask(22..23, WRITE, fault_no);
            for addr in [0, 0xffff_8880_0000_0000, usize::MAX, 1 << 62] {
                asked.push((wants(addr, READ), fault_no));
            }
            let mut order = random.order(asked.len());
            // Of those that are named twice, some first for reading and some first for writing.
            for (page, first) in [(13, READ), (14, WRITE), (18, READ), (19, WRITE)] {
                let named = |place: &usize| {
                    let addr = asked[order[*place]].0.addr as usize;
                    addr / PAGE == area.page(page).addr / PAGE
                };
                let places: Vec<usize> = (0..order.len()).filter(named).collect();
                if asked[order[places[0]]].0.access != first {
                    order.swap(places[0], places[1]);
                }
            }
            let mut faults: Vec<_> = order.iter().map(|&i| asked[i].0).collect();
            let before = counters(device);
            let answer = fault(device, &mut faults, policy);
            for (i, fault) in order.into_iter().zip(&faults) {
                let (sent, status) = asked[i];
                assert_eq!((fault.addr, fault.access), (sent.addr, sent.access));
                assert_eq!(fault.status, status, "{fault:x?}");
            }
            assert_eq!((answer.mapped_pages, answer.failed_pages), (18, 6 + 4));
            let work = counters(device);
            assert_eq!(
                work.device_faults - before.device_faults,
                28,
                "each page once"
            );
            let seen = snapshot(device, *area);
            for (page, seen) in seen.iter().enumerate() {
                assert_eq!(seen.is_mirrored(), page < 18, "page {page}: {seen:?}");
                if (5..15).contains(&page) {
                    assert!(seen.is_mirrored_writable(), "page {page}: {seen:?}");
                }
                assert!(!(page >= 15 && seen.is_mirrored_writable()));
            }
            let moved = if policy == MIGRATE { 18 } else { 0 };
            assert_eq!(answer.device_pages, moved);
            assert_eq!(
                places(device, area.part(0, 18)).counts().device,
                moved as usize
            );
            let mut bytes = vec![0; 18 * PAGE];
            read(device, area.addr, &mut bytes, NONE).whole(bytes.len());
            area.part(15, 7).protect(RW);
            area.part(0, 13).check(3);
            area.part(13, 2).check_zero();
            area.part(15, 7).check(3);
            area.part(24, 6).check(3);
            area.part(22, 2).map_over(RW, ANONYMOUS, -1);
        }
    });
}

/// Catches a limit that is off by one, and a list that is believed.
#[test]
fn as_many_faults_as_the_interface_says() {
    const PAGES: usize = 2048;

    let (driver, device) = Driver::load_with("", GPUS[0]);
    let area = Area::new(PAGES);
    area.advise(libc::MADV_NOHUGEPAGE).unwrap();
    let mut random = Random::new(5);
    let mut faults: Vec<_> = (0..=MAX_FAULTS as usize)
        .map(|i| wants(area.page(i % PAGES).addr + random.below(PAGE), READ))
        .collect();
    for i in (1..faults.len()).rev() {
        faults.swap(i, random.below(i + 1));
    }
    let (result, _) = try_fault(&device, &mut faults, MAP);
    assert_eq!(result, Err(Errno::INVAL), "one too many");
    assert!(faults.iter().all(|fault| fault.status == 0x7777_7777));
    assert_eq!(mirrored(&device, *area), 0);
    faults.pop();
    // Of every page there are 32, less perhaps one.
    let answer = fault(&device, &mut faults, MAP);
    assert!(faults.iter().all(|fault| fault.status == 0));
    assert_eq!(
        (answer.mapped_pages, answer.failed_pages),
        (PAGES as u64, 0)
    );
    assert_eq!(mirrored(&device, *area), PAGES);
    let (result, _) = try_fault(&device, &mut [], MAP);
    assert_eq!(result, Err(Errno::INVAL));
    drop((area, device));
    driver.finish();
}

/// Catches a device fault that fails, or loses a page, for lack of VRAM: what cannot move is mapped where it is. A table is
/// what cannot be had then.
#[test]
fn with_vram_full_faults_map_in_place() {
    let driver = Driver::load("soft=1 soft_mib=2");
    let device = Device::open(0).unwrap();
    let area = Area::filled(64, 7);
    // Nodes for all of it.
    device_check(&device, area.page(0), 7);
    // Tables are not evicted: one that has a leaf for every page of VRAM leaves no room.
    let (filler, sparse) = (Device::open(0).unwrap(), Area::new(HUGE * HUGE));
    sparse.advise(libc::MADV_NOHUGEPAGE).unwrap();
    let full = (0..HUGE).map(|i| read(&filler, sparse.page(i * HUGE).addr, &mut [0], MAP).result);
    assert_eq!(full.last(), Some(Err(Errno::NOSPC)));
    assert_eq!(device.describe().unwrap().vram_free_bytes, 0);
    let before = counters(&device);
    assert_eq!(fault_all(&device, *area, WRITE, MIGRATE), 0);
    assert!(counters(&device).vram_failures > before.vram_failures);
    assert_place(&device, *area, Place::System);
    device_fill_by(&device, *area, 8, MIGRATE);
    device_check(&device, *area, 8);

    // One who comes now has no table, and is told so.
    let late = Device::open(0).unwrap();
    let mut answer = hmm_gpu::uapi::hmm_gpu_mirror::default();
    let number = hmm_gpu::uapi::HMM_GPU_MIRROR;
    assert_eq!(
        crate::common::mirror::call(&late, number, &mut answer),
        Err(Errno::NOSPC)
    );
    for policy in [MAP, MIGRATE] {
        let ended = read(&late, area.addr, &mut [0; 100], policy);
        assert_eq!((ended.result, ended.done), (Err(Errno::NOSPC), 0));
        let mut faults = [wants(area.addr, READ), wants(area.page(2).addr, WRITE)];
        match try_fault(&late, &mut faults, policy) {
            (Ok(()), answer) => {
                assert_eq!((answer.mapped_pages, answer.failed_pages), (0, 2));
                let no = libc::ENOSPC as u32;
                assert!(faults.iter().all(|fault| fault.status == no), "{faults:?}");
            }
            (error, answer) => panic!("{error:?} {answer:?}"),
        }
    }
    assert_eq!(snapshot(&late, *area).len(), 64, "looking needs no VRAM");
    drop(filler);
    device_check_by(&late, *area, 8, MAP);
    assert_eq!(
        fault_all(&device, *area, READ, MIGRATE),
        64,
        "now there is room"
    );
    assert_place(&device, *area, Place::Device);
    device_check(&late, *area, 8);
    area.check(8);
    drop((area, device, late));
    driver.finish();
}

/// Catches a look that faults, moves, populates or counts anything, and one that says what is not so.
#[test]
fn looking_moves_nothing_and_says_what_is_there() {
    let mut driver = Driver::load("soft=1 soft_mib=16");
    let other = Device::open(0).unwrap();
    let device = driver.bind(GPUS[0]);
    let area = Area::filled(60, 1);
    let part = |i: usize| area.part(i * 6, 6);
    to_device(&device, part(1));
    to_device(&other, part(2));
    part(3).protect(libc::PROT_READ);
    part(4).advise(libc::MADV_DONTNEED).unwrap();
    part(5).advise(libc::MADV_DONTNEED).unwrap();
    part(5).touch();
    part(6).map_over(RW, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1);
    part(6).fill(1);
    part(7).protect(libc::PROT_NONE);
    part(8).unmap();
    to_device(&device, part(9));
    part(9).protect(libc::PROT_READ);
    let huge = Area::new(HUGE);
    huge.advise(libc::MADV_HUGEPAGE).unwrap();
    huge.fill(2);
    assert_eq!(kernel::smaps(huge.addr, "AnonHugePages"), 2048);
    // The half of each part that the device has.
    for i in [0, 1, 3, 5, 6, 9] {
        fault_all(&device, part(i).part(0, 3), READ, MAP);
    }
    fault_all(&device, huge.part(7, 9), WRITE, MAP);

    let maps =
        || [*area, *huge].map(|span| kernel::pagemap(std::process::id(), span.addr, span.pages));
    let counts = || [&device, &other].map(counters);
    let (before, counted) = (maps(), counts());
    let (seen, huge_seen) = (snapshot(&device, *area), snapshot(&device, *huge));
    let seen_by_other = snapshot(&other, *area);
    let residency = places(&device, *area);
    places(&other, *area);
    assert_eq!(maps(), before);
    assert_eq!(format!("{:?}", counts()), format!("{counted:?}"));

    for (page, seen) in seen.iter().enumerate() {
        let (part, has) = (page / 6, page % 6 < 3);
        let what = || format!("page {page}: {seen:?}");
        let is_there = !matches!(part, 4 | 7 | 8);
        assert_eq!(seen.is_valid(), is_there, "{}", what());
        assert_eq!(seen.is_on_device(), matches!(part, 1 | 9), "{}", what());
        assert_eq!(seen.is_on_other_device(), part == 2, "{}", what());
        assert_eq!(
            seen.is_writable(),
            matches!(part, 0 | 1 | 2 | 6),
            "{}",
            what()
        );
        assert_eq!(seen.is_zero(), part == 5, "{}", what());
        assert_eq!(
            seen.is_mirrored(),
            has && is_there && part != 2,
            "{}",
            what()
        );
        if seen.is_mirrored() {
            assert_eq!(
                seen.is_mirrored_writable(),
                seen.is_writable(),
                "{}",
                what()
            );
        }
        assert_eq!(seen.order(), 0, "{}", what());
        assert_eq!(
            residency.pages()[page].is_writable(),
            seen.is_writable(),
            "{}",
            what()
        );
        let by_other = seen_by_other[page];
        assert_eq!(by_other.is_on_device(), seen.is_on_other_device());
        assert_eq!(by_other.is_on_other_device(), seen.is_on_device());
        assert!(!by_other.is_mirrored());
    }
    for (page, seen) in huge_seen.iter().enumerate() {
        assert_eq!(seen.order(), 9, "page {page}: {seen:?}");
        assert_eq!(seen.is_mirrored(), (7..16).contains(&page), "page {page}");
    }
    // Each page of VRAM is one page, and the kernel's own numbers say the same.
    let frame = |page: usize| match before[0][page] {
        Entry::DevicePrivate { pfn, .. } => pfn as usize,
        other => panic!("{other:?}"),
    };
    let numbers: Vec<(usize, usize)> = (0..60)
        .filter_map(|page| seen[page].vram_page().map(|number| (frame(page), number)))
        .collect();
    assert_eq!(numbers.len(), 12);
    let base = numbers[0].0 - numbers[0].1;
    assert!(numbers
        .iter()
        .all(|&(frame, number)| frame == base + number));

    part(3).protect(RW);
    part(7).protect(RW);
    part(9).protect(RW);
    for i in [0, 1, 2, 3, 6, 7, 9] {
        both_check(&device, part(i), 1);
    }
    both_check(&device, *huge, 2);
    part(8).map_over(RW, ANONYMOUS, -1);
    drop((area, huge, device, other));
    driver.finish();
}

/// Catches a device page table that is not what the driver says it is: what the GPU would find there, walking it in the BAR itself,
/// for every page, at low addresses and at the highest, before and after everything changes.
#[test]
fn a_walk_of_the_table_in_vram_finds_what_the_driver_says() {
    let gpu = GPUS[0];
    let (driver, device) = Driver::load_with("", gpu);
    let bar = Bar::of(gpu);
    // Over the ends of a leaf, and far away, where all levels differ: as far up as this processor has addresses.
    let near = Area::offset(HUGE - 20, 40);
    let places = [0x7_0000_0000, 0x6800_0000_0000, 0x00f0_0000_0000_0000];
    let far = places.map(|place: usize| {
        let addr = place as *mut libc::c_void;
        // SAFETY: a new mapping, where the kernel likes.
        let mapped = unsafe { libc::mmap(addr, 40 * PAGE, RW, ANONYMOUS, -1, 0) };
        assert_ne!(mapped, libc::MAP_FAILED);
        Span::new(mapped as usize, 40)
    });
    let spans = [*near, far[0], far[1], far[2]];
    let shape = table(&device);
    let la57 = spans[3].addr >> 47 != 0;
    assert_eq!(shape.levels, if la57 { 5 } else { 4 });
    let agree = |what: &str| {
        let shape = table(&device);
        let mut entries = 0;
        for span in spans {
            for (page, seen) in snapshot(&device, span).into_iter().enumerate() {
                let found = bar.walk(&shape, span.page(page).addr).unwrap_or(0);
                let of = || format!("{what}: page {page} of {span:x?}: {found:#x}, {seen:?}");
                if !seen.is_mirrored() {
                    assert_eq!(found & !REQUESTED, 0, "{}", of());
                    continue;
                }
                entries += 1;
                let mut expected = VALID;
                expected |= if seen.is_mirrored_writable() {
                    WRITABLE
                } else {
                    0
                };
                match seen.vram_page() {
                    Some(number) => expected |= (number * PAGE) as u64 & OFFSET,
                    None => expected |= SYSTEM,
                }
                assert_eq!(found, expected, "{}", of());
            }
        }
        assert_eq!(shape.entries, entries, "{what}");
    };
    agree("nothing yet");
    for (i, span) in spans.into_iter().enumerate() {
        let seed = 10 + i as u64;
        span.advise(libc::MADV_NOHUGEPAGE).unwrap();
        span.fill(seed);
        agree("filled");
        device_check_by(&device, span.part(0, 30), seed, MAP);
        agree("mapped");
        to_device(&device, span.part(10, 15));
        agree("half of it moved");
        device_check_by(&device, span.part(5, 30), seed, MIGRATE);
        agree("read again");
        // The bytes are where the entries say.
        for seen in snapshot(&device, span).into_iter().enumerate() {
            if let (page, Some(number)) = (seen.0, seen.1.vram_page()) {
                let there = bar.page(number).addr as *const u64;
                // SAFETY: a page of the BAR.
                let words = unsafe { std::slice::from_raw_parts(there, PAGE / 8) };
                span.page(page).check_words("the GPU", words, seed);
            }
        }
        span.part(12, 3).check(seed);
        agree("some came back");
        span.part(8, 6).protect(libc::PROT_READ);
        device_check(&device, span.part(0, 30), seed);
        agree("some read-only");
        read(&device, span.page(39).addr, &mut [0], NONE).stopped(
            Errno::AGAIN,
            0,
            span.page(39).addr,
        );
        let asked = bar.walk(&table(&device), span.page(39).addr);
        assert_eq!(asked, Some(REQUESTED), "the device has marked it");
        agree("marked");
        span.part(8, 6).protect(RW);
        span.part(20, 4).advise(libc::MADV_DONTNEED).unwrap();
        agree("some gone");
        device_fill(&device, span, seed + 20);
        agree("written");
        span.check(seed + 20);
        agree("all back");
        device_fill(&device, span, seed);
        agree("once more");
    }
    for span in far {
        span.check(10 + spans.iter().position(|other| *other == span).unwrap() as u64);
        span.unmap();
    }
    let shape = table(&device);
    for span in far {
        for page in 0..40 {
            let found = bar.walk(&shape, span.page(page).addr).unwrap_or(0);
            assert_eq!(found & VALID, 0, "unmapped");
        }
    }
    drop((near, bar, device));
    driver.finish();
}

/// Catches nodes of tables that are never given back: when what they were for is unmapped, when their file is closed, and when
/// their process is killed.
#[test]
fn a_table_is_as_big_as_what_it_maps_and_goes_with_its_file() {
    const BLOCKS: usize = 40;

    on_each_kind(|device| {
        let area = Area::new(BLOCKS * HUGE);
        area.advise(libc::MADV_NOHUGEPAGE).unwrap();
        let client = Device::open_path(device.path()).unwrap();
        let read_all = |client: &Device| {
            for block in 0..BLOCKS {
                let page = area.page(block * HUGE + block);
                device_check_zero(client, page);
            }
        };
        read_all(&client);
        let shape = table(&client);
        assert_eq!(shape.entries, BLOCKS as u64);
        assert!(shape.nodes >= BLOCKS as u64 + 3, "{shape:?}");
        let now = counters(device);
        assert_eq!(
            (now.table_pages, now.live_pages),
            (shape.nodes, shape.nodes)
        );
        // What is unmapped needs no nodes, at the next access at the latest.
        let before = shape.invalidations;
        area.part(0, BLOCKS * HUGE).unmap();
        area.map_over(RW, ANONYMOUS, -1);
        device_check_zero(&client, area.page(0));
        let shape = table(&client);
        assert!(shape.nodes < BLOCKS as u64 / 2, "{shape:?}");
        assert_eq!(shape.entries, 1);
        assert!(shape.invalidations > before);
        // With its file.
        read_all(&client);
        drop(client);
        eventually("the nodes are given back", || {
            counters(device).table_pages == 0
        });
        // With its process.
        let path = device.path();
        let mut child = crate::common::child::Child::fork(|test| {
            let client = Device::open_path(path).unwrap();
            read_all(&client);
            test.send(table(&client).nodes);
            test.receive();
        });
        let nodes = child.receive();
        assert_eq!(counters(device).table_pages, nodes);
        child.kill();
        eventually("the nodes are given back", || {
            counters(device).table_pages == 0
        });
    });
}

/// Catches a prefetch that takes from the device page table what is in VRAM already: the device would miss all of it.
#[test]
fn what_is_there_already_is_not_invalidated_by_a_prefetch() {
    on_each_kind(|device| {
        let area = Area::new(100);
        area.advise(libc::MADV_NOHUGEPAGE).unwrap();
        device_fill_by(device, *area, 1, MIGRATE);
        let before = table(device);
        assert_eq!(before.entries, 100);
        assert_eq!(to_device(device, *area), moved(0, 100, 0, 0));
        let after = table(device);
        assert_eq!(
            (after.entries, after.invalidations),
            (100, before.invalidations)
        );
        area.part(0, 10).touch();
        area.part(95, 5).check(1);
        let some = table(device);
        assert_eq!(some.entries, 85);
        assert_eq!(to_device(device, area.part(0, 95)), moved(10, 85, 0, 0));
        assert_eq!(table(device).entries, 85);
        device_check(device, *area, 1);
        area.check(1);
    });
}

/// Catches an unbind that waits for a device that faults and accesses all the time, or an access that goes on afterwards, and bytes
/// that are lost then.
#[test]
fn an_unbind_under_accesses_ends_and_loses_nothing() {
    for parameters in ["", "add_resource=1"] {
        let (mut driver, device) = Driver::load_with(parameters, GPUS[0]);
        let area = Area::filled(300, 1);
        let (path, stop) = (device.path().to_owned(), AtomicBool::new(false));
        // Each has its own pages, and says which pattern they hold when it ends.
        let work = |span: Span| {
            let client = Device::open_path(&path).unwrap();
            let mut seed = 1;
            loop {
                let words = span.pattern(seed + 1);
                let ended = write(&client, span.addr, bytemuck::cast_slice(&words), MIGRATE);
                if ended.result == Err(Errno::NODEV) {
                    let whole = ended.done / PAGE;
                    span.part(0, whole).check(seed + 1);
                    // The page that it was at is written or not.
                    span.part(whole + 1, span.pages - whole - 1).check(seed);
                    break;
                }
                ended.whole(span.bytes());
                seed += 1;
                let mut words = vec![0_u64; span.bytes() / 8];
                let bytes = bytemuck::cast_slice_mut(&mut words);
                let ended = read(&client, span.addr, bytes, MAP);
                if ended.result == Err(Errno::NODEV) {
                    span.check(seed);
                    break;
                }
                ended.whole(span.bytes());
                span.check_words("the device", &words, seed);
                if seed % 3 == 0 {
                    span.part(0, 10).check(seed);
                }
                assert!(!stop.load(Ordering::Relaxed), "it goes on without a device");
            }
            assert_eq!(
                read(&client, span.addr, &mut [0], MAP).result,
                Err(Errno::NODEV)
            );
        };
        std::thread::scope(|scope| {
            let spans = [0, 100, 200].map(|first| area.part(first, 99));
            let threads = spans.map(|span| scope.spawn(move || work(span)));
            std::thread::sleep(Duration::from_millis(300));
            let start = Instant::now();
            driver.unbind(GPUS[0]);
            println!("unbound in {:?}", start.elapsed());
            assert!(start.elapsed() < patience(Duration::from_secs(10)));
            eventually("all are told", || {
                threads
                    .iter()
                    .all(std::thread::ScopedJoinHandle::is_finished)
            });
            stop.store(true, Ordering::Relaxed);
        });
        drop((area, device));
        driver.finish();
    }
    // Nor is anything of theirs left to find by who comes next.
    let (driver, device) = Driver::load_with("", GPUS[0]);
    assert_empty(&device);
    drop(device);
    driver.finish();
}
