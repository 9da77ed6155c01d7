//! Two of everything: clients of one device in one process, devices in one process, processes with the same pages. Whatever one does,
//! the other finds the bytes that are there.
//!
//! Runs in the virtual GPU host: `bench/test guest_twins`.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::common::child::Child;
use crate::common::driver::{counters, Driver, GPUS};
use crate::common::memory::{Area, HUGE, PAGE};
use crate::common::mirror::{
    both_check, copy, device_check, device_check_by, device_check_zero, device_fill,
    device_fill_by, mirrored, read, snapshot, try_snapshot, write, Ended, MAP, MIGRATE,
};
use crate::common::random::Random;
use crate::common::{assert_place, places, rounds, to_device, to_system};
use hmm_gpu::{Device, Errno, Place, Target};

const RW: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;
const ANONYMOUS: libc::c_int = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;

/// Two files on one device, and one on another.
fn trio() -> (Driver, [Device; 3]) {
    let mut driver = Driver::load("soft=1 soft_mib=16");
    let one = driver.bind(GPUS[0]);
    let twin = Device::open_path(one.path()).unwrap();
    (driver, [one, twin, Device::open(0).unwrap()])
}

/// Catches an entry that outlives its page because another client moved it, another device has it, or the CPU took it: in the table
/// of a twin, a migration is somebody else's, although the pages are this very device's.
#[test]
fn clients_of_one_process_agree_with_a_model_after_every_step() {
    const PAGES: usize = 40;

    let (driver, clients) = trio();
    let area = Area::offset(HUGE - 20, PAGES);
    area.advise(libc::MADV_NOHUGEPAGE).unwrap();
    let mut random = Random::new(77);
    // What each page holds: a seed, or zeroes.
    let mut model: [Option<u64>; PAGES] = [None; PAGES];
    let check = |client: &Device, first: usize, model: &[Option<u64>]| {
        for (i, holds) in model.iter().enumerate() {
            let page = area.page(first + i);
            match holds {
                Some(seed) => device_check(client, page, *seed),
                None => device_check_zero(client, page),
            }
        }
    };
    for step in 0..rounds(240) as u64 {
        let first = random.below(PAGES);
        let part = area.part(first, 1 + random.below((PAGES - first).min(12)));
        let range = first..first + part.pages;
        let client = &clients[random.below(3)];
        let policy = [MAP, MIGRATE][random.below(2)];
        match random.below(8) {
            0 | 1 => {
                let counts = client
                    .prefetch_range(part.addr, part.bytes(), Target::Device)
                    .unwrap();
                assert_eq!((counts.total(), counts.unmapped), (part.bytes() as u64, 0));
            }
            2 => {
                to_system(client, part);
            }
            3 | 4 => {
                device_fill_by(client, part, step, policy);
                model[range.clone()].fill(Some(step));
            }
            5 => {
                part.fill(step);
                model[range.clone()].fill(Some(step));
            }
            6 => {
                let mut bytes = vec![0; part.bytes()];
                read(client, part.addr, &mut bytes, policy).whole(part.bytes());
            }
            _ => {
                part.advise(libc::MADV_DONTNEED).unwrap();
                model[range.clone()].fill(None);
            }
        }
        // No client has an entry for anything that is not there (`snapshot` asserts it), and all agree on where it is.
        let [one, twin, other] = [0, 1, 2].map(|i| snapshot(&clients[i], *area));
        for page in 0..PAGES {
            let (one, twin, other) = (one[page], twin[page], other[page]);
            assert_eq!(one.is_on_device(), twin.is_on_device());
            assert_eq!(one.vram_page(), twin.vram_page());
            assert_eq!(one.is_on_device(), other.is_on_other_device());
            assert_eq!(one.is_on_other_device(), other.is_on_device());
        }
        let reader = &clients[random.below(3)];
        check(reader, first, &model[range]);
    }
    for client in &clients {
        check(client, 0, &model);
    }
    for (page, holds) in model.into_iter().enumerate() {
        match holds {
            Some(seed) => area.page(page).check(seed),
            None => area.page(page).check_zero(),
        }
    }
    drop((area, clients));
    driver.finish();
}

/// Catches an access through one client that another's move turns into one of a page that is somebody else's: each step by hand, so
/// that it fails where it happens.
#[test]
fn what_one_client_moves_the_other_finds() {
    let (driver, [one, twin, _]) = trio();
    let area = Area::filled(32, 1);
    device_check_by(&twin, *area, 1, MAP);
    to_device(&one, *area);
    assert_eq!(mirrored(&twin, *area), 0, "they were in system memory");
    // What is in VRAM now must not be found where it was: other bytes are there.
    let taken = Area::filled(64, 2);
    device_check_by(&twin, *area, 1, MAP);
    assert_place(&twin, *area, Place::Device);
    device_fill(&twin, *area, 3);
    device_check(&one, *area, 3);
    to_system(&one, *area);
    assert_eq!(mirrored(&twin, *area), 0, "they were in VRAM");
    let taken_too = Area::filled(64, 4);
    to_device(&one, *taken_too);
    device_check(&twin, *area, 3);
    device_fill(&one, *area, 5);
    device_check(&twin, *area, 5);
    // By a fault of the one, and by a touch of the CPU.
    area.advise(libc::MADV_DONTNEED).unwrap();
    area.fill(6);
    device_check_by(&one, *area, 6, MAP);
    area.advise(libc::MADV_DONTNEED).unwrap();
    area.fill(7);
    device_check_by(&twin, *area, 7, MIGRATE);
    device_check_by(&one, *area, 7, MAP);
    area.check(7);
    device_fill(&one, *area, 8);
    device_fill(&twin, area.part(0, 16), 9);
    device_check(&one, area.part(0, 16), 9);
    device_check(&twin, area.part(16, 16), 8);
    // One goes; the other has all it had.
    drop(one);
    device_check(&twin, area.part(16, 16), 8);
    both_check(&twin, area.part(0, 16), 9);
    taken.check(2);
    taken_too.check(4);
    drop((area, taken, taken_too, twin));
    driver.finish();
}

/// Catches a page that takes the way over system memory, or is lost on the way, when it moves from the VRAM of one device to that of
/// another, in small pages and whole.
#[test]
fn pages_move_straight_from_device_to_device() {
    let mut driver = Driver::load("soft=1 soft_mib=16");
    let devices = [
        driver.bind(GPUS[0]),
        driver.bind(GPUS[2]),
        Device::open(0).unwrap(),
    ];
    for huge in [false, true] {
        let pages = if huge { HUGE } else { 300 };
        let area = Area::offset(0, pages);
        let advice = [libc::MADV_NOHUGEPAGE, libc::MADV_HUGEPAGE][usize::from(huge)];
        area.advise(advice).unwrap();
        area.fill(6);
        for (from, to) in [(0, 1), (1, 2), (2, 0), (0, 2), (2, 1)] {
            let (from, to) = (&devices[from], &devices[to]);
            to_device(from, *area);
            // So that the old place is in a table.
            device_check(from, *area, 6);
            let before = [from, to].map(|device| device.counters().unwrap());
            assert!(to_device(to, *area).moved > 0);
            let now = [from, to].map(|device| device.counters().unwrap());
            let work = [now[0] - before[0], now[1] - before[1]];
            assert_eq!(work[0].to_other_pages, pages as u64);
            assert_eq!(work[1].from_other_pages, pages as u64);
            assert_eq!(work[1].to_device_pages, pages as u64);
            assert_eq!(work[1].large_to_device, u64::from(huge));
            for work in work {
                let home = work.to_system_pages + work.fault_back_pages + work.evicted_pages;
                assert_eq!((home, work.cpu_faults), (0, 0));
            }
            // Nothing of it is left there but what its table takes.
            assert_eq!(counters(from).live_pages, counters(from).table_pages);
            device_check_by(to, *area, 6, MAP);
        }
        area.check(6);
        // A device fault that is to migrate does the same.
        to_device(&devices[0], *area);
        device_fill_by(&devices[1], area.part(0, 100), 7, MIGRATE);
        assert_place(&devices[1], area.part(0, 100), Place::Device);
        both_check(&devices[0], area.part(0, 100), 7);
    }
    drop(devices);
    driver.finish();
}

/// Catches a move between devices that fails, or loses what does not fit, when the other has no room.
#[test]
fn what_does_not_fit_on_the_other_device_stays() {
    let mut driver = Driver::load("soft=1 soft_mib=2");
    let (large, small) = (driver.bind(GPUS[0]), Device::open(0).unwrap());
    let area = Area::offset(0, 2 * HUGE);
    area.fill(8);
    to_device(&large, *area);
    let refused = small.prefetch_range(area.addr, area.bytes(), Target::Device);
    assert_eq!(refused.unwrap_err().errno(), Some(Errno::NOSPC));
    let counts = places(&small, *area).counts();
    assert!(
        counts.device > 500 && counts.device + counts.other_device == area.pages,
        "{counts}"
    );
    area.check(8);
    drop((area, large, small));
    driver.finish();
}

/// Catches a page on another device that is read as if it was memory, or moved by a look, or lost on its way over.
#[test]
fn a_page_on_another_device_is_seen_there_and_comes_over_when_it_is_accessed() {
    let (driver, [one, _, other]) = trio();
    for (policy, place) in [(MAP, Place::System), (MIGRATE, Place::Device)] {
        for writes in [false, true] {
            let area = Area::filled(48, 1);
            to_device(&other, *area);
            device_check(&other, *area, 1);
            let before = [&one, &other].map(counters);
            for _ in 0..2 {
                assert!(places(&one, *area).all(Place::OtherDevice));
                let seen = snapshot(&one, *area);
                assert!(seen.iter().all(|seen| seen.is_on_other_device()));
            }
            let after = [&one, &other].map(counters);
            assert_eq!(format!("{before:?}"), format!("{after:?}"));
            assert_eq!(mirrored(&other, *area), 48, "and it has them still");

            // The half of it.
            let half = area.part(0, 24);
            let seed = if writes {
                device_fill_by(&one, half, 2, policy);
                2
            } else {
                device_check_by(&one, half, 1, policy);
                1
            };
            assert_place(&one, half, place);
            assert_place(&other, area.part(24, 24), Place::Device);
            assert_eq!(mirrored(&other, half), 0);
            let lost = counters(&other);
            assert_eq!(before[1].live_pages - lost.live_pages, 24);
            // And back, by the other's access.
            device_check_by(&other, half, seed, policy);
            device_fill_by(&other, half.part(0, 12), 3, policy);
            device_check_by(&one, half.part(0, 12), 3, policy);
            area.part(0, 12).check(3);
            area.part(12, 12).check(seed);
            area.part(24, 24).check(1);
        }
    }
    // A copy from one device to the other, by either.
    for device in [&one, &other] {
        for policy in [MAP, MIGRATE] {
            let (from, to) = (Area::filled(20, 5), Area::filled(20, 6));
            to_device(&one, *from);
            to_device(&other, *to);
            let len = 18 * PAGE + 99;
            copy(device, from.addr + 1000, to.addr + 33, len, policy).whole(len);
            let source = from.pattern(5);
            let target = to.pattern(6);
            let (source, target): (&[u8], &[u8]) =
                (bytemuck::cast_slice(&source), bytemuck::cast_slice(&target));
            let mut expected = target.to_vec();
            expected[33..33 + len].copy_from_slice(&source[1000..1000 + len]);
            let mut bytes = vec![0; to.bytes()];
            read(device, to.addr, &mut bytes, MAP).whole(to.bytes());
            assert!(bytes == expected, "what the device finds");
            // SAFETY: the area is mapped.
            let bytes = unsafe { std::slice::from_raw_parts(to.addr as *const u8, to.bytes()) };
            assert!(bytes == expected, "what the CPU finds");
            from.check(5);
        }
    }
    drop((one, other));
    driver.finish();
}

/// Catches a device's write that is seen in another process (after a fork each has its own), or that is not (shared memory is
/// shared), and a page that one side's move takes from the other.
#[test]
fn processes_with_the_same_pages_see_what_they_should() {
    let (driver, [device, _, other]) = trio();
    // The child's client: on the same device, or on another.
    for path in [device.path(), other.path()] {
        for resident in [true, false] {
            let area = Area::filled(50, 1);
            let shared = Area::shared(10);
            shared.fill(10);
            let part = |i: usize| area.part(i * 10, 10);
            if resident {
                to_device(&device, *area);
            }
            device_fill(&device, *area, 1);
            device_check(&device, *shared, 10);
            let mut child = Child::fork(|parent| {
                let client = Device::open_path(path).unwrap();
                device_check(&client, *area, 1);
                device_check(&client, *shared, 10);
                parent.send(0);
                parent.receive();
                // The parent's device has written to the first ten.
                device_check(&client, part(0), 1);
                device_check(&client, *shared, 11);
                device_fill(&client, part(1), 3);
                part(2).fill(4);
                device_check(&client, part(2), 4);
                device_fill(&client, *shared, 12);
                parent.send(0);
                parent.receive();
                both_check(&client, part(0), 1);
                both_check(&client, part(1), 3);
                both_check(&client, part(2), 4);
                // What they still share moves for both; the parent has looked at it by then.
                let moved = client
                    .prefetch_range(area.addr, area.bytes(), Target::Device)
                    .unwrap();
                assert_eq!(moved.total(), area.bytes() as u64);
                device_check(&client, part(4), 1);
                parent.send(0);
                parent.receive();
                device_check(&client, part(4), 1);
                device_fill(&client, part(4), 6);
                both_check(&client, part(4), 6);
                shared.check(13);
            });
            child.receive();
            let entries = mirrored(&device, *area);
            assert_eq!(entries, 0, "what was writable is not any more");
            device_check(&device, *area, 1);
            device_fill(&device, part(0), 2);
            device_fill(&device, *shared, 11);
            child.step();
            device_check(&device, part(0), 2);
            device_check(&device, part(1), 1);
            device_check(&device, part(2), 1);
            device_check(&device, *shared, 12);
            child.step();
            for i in [1, 2, 3, 4] {
                device_check(&device, part(i), 1);
            }
            device_fill(&device, part(3), 5);
            shared.fill(13);
            child.send(0);
            child.finish();
            both_check(&device, part(0), 2);
            both_check(&device, part(1), 1);
            both_check(&device, part(2), 1);
            both_check(&device, part(3), 5);
            both_check(&device, part(4), 1);
            both_check(&device, *shared, 13);
        }
    }
    drop((device, other));
    driver.finish();
}

/// For how long everything happens at once.
const TURMOIL: Duration = Duration::from_secs(4);

/// Goes on where a page changed its place too often: `access` accesses what is left from a byte on. All else is an error.
#[track_caller]
fn insist(len: usize, mut access: impl FnMut(usize) -> Ended) {
    let mut done = 0;
    for _ in 0..200 {
        let ended = access(done);
        done += ended.done;
        match ended.result {
            Ok(()) => {
                assert_eq!(done, len);
                return;
            }
            Err(Errno::BUSY) => BUSY.fetch_add(1, Ordering::Relaxed),
            Err(_) => panic!("{ended:x?}"),
        };
    }
    panic!("a page that is always busy");
}

/// How often that was.
static BUSY: AtomicU64 = AtomicU64::new(0);

/// Catches the oops of `lib/test_hmm.c`: a device's read that faults while somebody moves the range to the very device gets a
/// device page, which has nothing that the CPU could read. Here it finds the bytes, and what it writes is not lost.
#[test]
fn reads_that_fault_while_the_range_moves_to_the_device_find_the_bytes() {
    const PAGES: usize = 64;

    let (driver, clients) = trio();
    let memory = Area::filled(PAGES, 1);
    let area = *memory;
    let pattern = area.pattern(1);
    let pattern: &[u8] = bytemuck::cast_slice(&pattern);
    let end = Instant::now() + TURMOIL;
    let counts = [const { AtomicU64::new(0) }; 3];
    let [moves, reads, writes] = &counts;
    // For a while, and then for as long as it takes for each to have happened: the machine may be slow.
    let goes_on = || {
        let few = || {
            counts
                .iter()
                .any(|count| count.load(Ordering::Relaxed) <= 20)
        };
        let now = Instant::now();
        now < end || (now < end + Duration::from_secs(90) && few())
    };
    let goes_on = &goes_on;
    std::thread::scope(|scope| {
        for (i, client) in clients.iter().enumerate() {
            // To the device, and home by a touch or a request.
            scope.spawn(move || {
                let mut random = Random::new(i as u64);
                while goes_on() {
                    let first = random.below(PAGES);
                    let part = area.part(first, 1 + random.below(PAGES - first));
                    let target = [Target::Device, Target::Device, Target::System][random.below(3)];
                    let counts = client
                        .prefetch_range(part.addr, part.bytes(), target)
                        .unwrap();
                    moves.fetch_add(counts.moved / PAGE as u64, Ordering::Relaxed);
                    if random.below(4) == 0 {
                        part.touch();
                    }
                }
            });
        }
        for (i, client) in clients.iter().enumerate() {
            scope.spawn(move || {
                let mut random = Random::new(10 + i as u64);
                let mut bytes = vec![0; PAGES * PAGE];
                while goes_on() {
                    let from = random.below(PAGES * PAGE);
                    let len = 1 + random.below((PAGES * PAGE - from).min(9 * PAGE));
                    let policy = [MAP, MAP, MIGRATE][random.below(3)];
                    let addr = area.addr + from;
                    let expected = &pattern[from..from + len];
                    if random.below(4) == 0 {
                        // What is there already.
                        insist(len, |done| {
                            write(client, addr + done, &expected[done..], policy)
                        });
                        writes.fetch_add(1, Ordering::Relaxed);
                    } else {
                        bytes[..len].fill(0xee);
                        insist(len, |done| {
                            read(client, addr + done, &mut bytes[done..len], policy)
                        });
                        let wrong = (0..len).find(|&i| bytes[i] != expected[i]);
                        assert_eq!(wrong, None, "of {len} bytes at {from:#x}");
                        reads.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    let counts = counts.map(AtomicU64::into_inner);
    println!("{counts:?} pages moved, reads, writes; busy: {BUSY:?}");
    assert!(counts.iter().all(|&count| count > 20), "{counts:?}");
    for client in &clients {
        device_check(client, area, 1);
    }
    area.check(1);
    drop((memory, clients));
    driver.finish();
}

/// A page of memory that many threads work on, one at a time: what it holds is known to who has it.
struct Owned {
    generation: Mutex<Holds>,
}

/// What a page holds.
#[derive(Clone, Copy)]
struct Holds {
    /// How often it was written.
    generation: u64,
    zeroes: bool,
}

/// What is written to a page before it is given back to the kernel: never to be found afterwards.
const POISON: u64 = (1 << 32) - 1;

/// Every word of every page and generation is another.
fn word(page: usize, generation: u64, index: usize) -> u64 {
    ((page as u64 + 1) << 48) | (generation << 16) | index as u64
}

fn words(page: usize, generation: u64) -> Vec<u64> {
    (0..PAGE / 8)
        .map(|index| word(page, generation, index))
        .collect()
}

#[track_caller]
fn check_words(who: &str, page: usize, found: &[u64], holds: Holds) {
    let expected = |index| match holds.zeroes {
        true => 0,
        false => word(page, holds.generation, index),
    };
    let wrong = (0..found.len()).find(|&index| found[index] != expected(index));
    if let Some(index) = wrong {
        panic!(
            "{who} finds on page {page}, word {index}: {:#x} and not {:#x} (page + 1, generation, word)",
            found[index],
            expected(index)
        );
    }
}

/// Catches anything stale or foreign, ever: eight threads on three clients move, read, write, discard, unmap and fork the same pages.
/// Who has a page knows its bytes; who has not finds words of that page or zeroes, and nothing else.
#[test]
fn everything_at_once_and_nobody_finds_a_strangers_bytes() {
    const PAGES: usize = 96;

    let (driver, clients) = trio();
    let memory = Area::offset(HUGE - PAGES / 2, PAGES);
    memory.advise(libc::MADV_NOHUGEPAGE).unwrap();
    let zeroes = Holds {
        generation: 0,
        zeroes: true,
    };
    let pages: Vec<Owned> = (0..PAGES)
        .map(|_| Owned {
            generation: Mutex::new(zeroes),
        })
        .collect();
    let end = Instant::now() + 2 * TURMOIL;
    let (area, pages, clients_of_all) = (*memory, &pages, &clients);
    let steps = AtomicU64::new(0);
    // For a while, and then for as long as it takes.
    let goes_on = || {
        let now = Instant::now();
        now < end || (now < end + Duration::from_secs(90) && steps.load(Ordering::Relaxed) <= 200)
    };
    // A client, a page of this thread's own for now, and what it holds.
    let take = |random: &mut Random| -> (usize, MutexGuard<'_, Holds>) {
        loop {
            let page = random.below(PAGES);
            if let Ok(guard) = pages[page].generation.try_lock() {
                return (page, guard);
            }
        }
    };
    let worker = |seed: u64| {
        let mut random = Random::new(seed);
        let mut found = vec![0_u64; PAGE / 8];
        while goes_on() {
            let client = &clients_of_all[random.below(3)];
            let policy = [MAP, MAP, MIGRATE][random.below(3)];
            let (page, mut holds) = take(&mut random);
            let span = area.page(page);
            let next = Holds {
                generation: holds.generation + 1,
                zeroes: false,
            };
            let by_cpu = |generation: u64| {
                for (index, word) in words(page, generation).into_iter().enumerate() {
                    // SAFETY: a word of the page, which is mapped writable whenever nobody has it.
                    unsafe {
                        (span.addr as *mut u64)
                            .wrapping_add(index)
                            .write_volatile(word)
                    };
                }
            };
            let by_device = |generation: u64| {
                let words = words(page, generation);
                let bytes: &[u8] = bytemuck::cast_slice(&words);
                insist(PAGE, |done| {
                    write(client, span.addr + done, &bytes[done..], policy)
                });
            };
            match random.below(10) {
                0 | 1 => {
                    by_device(next.generation);
                    *holds = next;
                }
                2 => {
                    by_cpu(next.generation);
                    *holds = next;
                }
                3 => {
                    for (index, word) in found.iter_mut().enumerate() {
                        // SAFETY: as above.
                        *word = unsafe {
                            (span.addr as *const u64)
                                .wrapping_add(index)
                                .read_volatile()
                        };
                    }
                    check_words("the CPU", page, &found, *holds);
                }
                what @ (4 | 5) => {
                    if random.below(2) == 0 {
                        by_cpu(POISON);
                    } else {
                        by_device(POISON);
                    }
                    if what == 4 {
                        span.advise(libc::MADV_DONTNEED).unwrap();
                    } else {
                        span.map_over(libc::PROT_NONE, ANONYMOUS, -1);
                        let ended = write(client, span.addr, &[1; 100], policy);
                        assert_eq!((ended.result, ended.done), (Err(Errno::ACCESS), 0));
                        span.map_over(RW, ANONYMOUS, -1);
                        span.advise(libc::MADV_NOHUGEPAGE).unwrap();
                    }
                    *holds = zeroes;
                    holds.generation = next.generation;
                }
                _ => {
                    let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut found);
                    bytes.fill(0xee);
                    insist(PAGE, |done| {
                        read(client, span.addr + done, &mut bytes[done..], policy)
                    });
                    check_words("the device", page, &found, *holds);
                }
            }
            steps.fetch_add(1, Ordering::Relaxed);
        }
    };
    // One who has no page: moves, reads and looks.
    let disturber = |seed: u64| {
        let mut random = Random::new(seed);
        let mut found = vec![0_u64; 16 * PAGE / 8];
        while goes_on() {
            let client = &clients_of_all[random.below(3)];
            let first = random.below(PAGES);
            let part = area.part(first, 1 + random.below((PAGES - first).min(16)));
            match random.below(6) {
                0 => {
                    let found = &mut found[..part.bytes() / 8];
                    let bytes: &mut [u8] = bytemuck::cast_slice_mut(found);
                    let ended = read(client, part.addr, bytes, MAP);
                    let known = [Err(Errno::ACCESS), Err(Errno::BUSY), Ok(())];
                    assert!(known.contains(&ended.result), "{ended:x?}");
                    for (i, &found) in found[..ended.done / 8].iter().enumerate() {
                        let (page, index) = (first + i / 512, i % 512);
                        let mine = word(page, (found >> 16) & 0xffff_ffff, index);
                        assert!(found == 0 || found == mine, "page {page}: {found:#x}");
                    }
                }
                1 => match try_snapshot(client, part) {
                    Ok(_) => {
                        snapshot(client, part);
                    }
                    Err(error) => assert_eq!(error, Errno::BUSY),
                },
                _ => {
                    let target = [Target::Device, Target::Device, Target::System][random.below(3)];
                    client
                        .prefetch_range(part.addr, part.bytes(), target)
                        .unwrap();
                }
            }
        }
    };
    std::thread::scope(|scope| {
        for seed in 0..4 {
            scope.spawn(move || worker(seed));
        }
        for seed in 4..7 {
            scope.spawn(move || disturber(seed));
        }
        scope.spawn(|| {
            while goes_on() {
                // Everything is shared, and copied on write, for as long as the child lives.
                // SAFETY: the child does nothing but sleep and end.
                match unsafe { libc::fork() } {
                    0 => {
                        // SAFETY: always fine to call.
                        unsafe { libc::usleep(3000) };
                        // SAFETY: as above.
                        unsafe { libc::_exit(0) }
                    }
                    child => {
                        assert!(child > 0, "{}", crate::common::memory::last_errno());
                        // SAFETY: it waits for the child just made.
                        let ended = unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) };
                        assert_eq!(ended, child);
                    }
                }
            }
        });
    });
    let steps = steps.into_inner();
    println!("{steps} steps; busy: {BUSY:?}");
    assert!(steps > 20, "{steps}");
    for (page, owned) in pages.iter().enumerate() {
        let holds = *owned.generation.lock().unwrap();
        let found = crate::common::mirror::device_words(&clients[page % 3], area.page(page), MAP);
        check_words("the device", page, &found, holds);
    }
    drop((memory, clients));
    driver.finish();
}
