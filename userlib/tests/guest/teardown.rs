//! Teardown in every order: whatever ends first, a process, a file, a device or the module, the others go on with their data, and
//! nothing is left.
//!
//! Runs in the virtual GPU host: `bench/test guest_teardown`.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::common::child::{Child, Link};
use crate::common::driver::{assert_empty, device_of, on_each_kind, try_device_of, Driver, GPUS};
use crate::common::kernel;
use crate::common::memory::{Area, PAGE};
use crate::common::random::Random;
use crate::common::{assert_place, patience, places, rounds, to_device, userfault};
use hmm_gpu::{Device, Errno, Place, Target};

/// Catches VRAM that a process takes with it when it ends.
#[test]
fn a_process_that_ends_gives_its_vram_back() {
    let all = rounds(10) as u64;
    on_each_kind(|device| {
        let path = device.path();
        for round in 0..all {
            Child::fork(|_| {
                let device = Device::open_path(path).unwrap();
                let area = Area::filled(100, round);
                to_device(&device, *area);
                // Neither is dropped: the process ends with all of it.
                std::mem::forget((device, area));
            })
            .finish();
        }
        let counters = assert_empty(device);
        assert_eq!(counters.freed_pages, 100 * all);
        assert_eq!(counters.fault_back_pages, 0, "nothing had to come back");
    });
}

/// Catches a lock, a reference or a page that is left when a process is killed at any moment of a migration.
#[test]
fn a_process_that_is_killed_in_the_middle_of_migrations_leaves_nothing() {
    on_each_kind(|device| {
        let path = device.path();
        let mut random = Random::new(9);
        for _ in 0..rounds(25) {
            let mut child = Child::fork(|test| {
                let device = Device::open_path(path).unwrap();
                let area = Area::filled(700, 5);
                test.send(0);
                loop {
                    for target in [Target::Device, Target::System] {
                        device
                            .prefetch_range(area.addr, area.bytes(), target)
                            .unwrap();
                    }
                }
            });
            child.receive();
            std::thread::sleep(Duration::from_micros(random.below(30_000) as u64));
            child.kill();
        }
        assert_empty(device);
        let area = Area::filled(700, 6);
        to_device(device, *area);
        area.check(6);
    });
}

/// Catches pages that need the file by which they came.
#[test]
fn pages_outlive_the_file_that_moved_them() {
    on_each_kind(|device| {
        let area = Area::filled(200, 7);
        let file = Device::open_path(device.path()).unwrap();
        to_device(&file, *area);
        drop(file);
        assert_place(device, *area, Place::Device);
        area.part(0, 100).check(7);
        area.part(150, 50).fill(8);
        assert_place(device, area.part(100, 50), Place::Device);
        area.part(0, 150).check(7);
        area.part(150, 50).check(8);
    });
}

/// A process with pages in the VRAM of a GPU, and what it does before and after that GPU is unbound.
fn resident(gpu: &'static str, seed: u64, test: &mut Link) {
    let device = device_of(gpu);
    let area = Area::filled(150, seed);
    to_device(&device, *area);
    test.send(0);
    test.receive();
    area.part(0, 60).check(seed);
    area.part(60, 40).fill(seed + 1);
    let gone = device.prefetch_range(area.addr, area.bytes(), Target::Device);
    assert_eq!(gone.unwrap_err().errno(), Some(Errno::NODEV));
    drop(device);
    area.part(0, 60).check(seed);
    area.part(60, 40).check(seed + 1);
    area.part(100, 50).check(seed);
}

/// Catches an unbind that loses a page, waits for a process (one of these is stopped), or leaves one that cannot go on.
#[test]
fn after_unbind_processes_go_on_with_what_was_in_vram() {
    for parameters in ["", "add_resource=1"] {
        let (mut driver, device) = Driver::load_with(parameters, GPUS[0]);
        let other = driver.bind(GPUS[1]);
        let fork = |(i, gpu)| Child::fork(move |test| resident(gpu, 100 * i as u64, test));
        let owners = [GPUS[0], GPUS[0], GPUS[0], GPUS[1]];
        let mut processes: Vec<Child> = owners.into_iter().enumerate().map(fork).collect();
        processes.iter_mut().for_each(|process| {
            process.receive();
        });
        processes[2].signal(libc::SIGSTOP);
        // One that never opened the device: its pages came with a fork.
        let area = Area::filled(80, 77);
        to_device(&device, *area);
        let heir = Child::fork(|test| {
            test.receive();
            area.check(77);
        });
        assert_eq!(device.counters().unwrap().live_pages, 3 * 150 + 80);

        let start = Instant::now();
        driver.unbind(GPUS[0]);
        assert!(
            start.elapsed() < patience(Duration::from_secs(10)),
            "{:?}",
            start.elapsed()
        );
        assert!(try_device_of(GPUS[0]).is_none());
        let entries = kernel::pagemap(std::process::id(), area.addr, area.pages);
        assert!(!entries.iter().any(|entry| entry.is_in_vram()));
        assert_eq!(
            other.counters().unwrap().live_pages,
            150,
            "the other device keeps its pages"
        );
        driver.unbind(GPUS[1]);
        area.check(77);
        processes[2].signal(libc::SIGCONT);
        processes.push(heir);
        for mut process in processes {
            process.send(0);
            process.finish();
        }
        drop((device, other));
        driver.finish();
    }
}

/// Catches a module that goes while somebody has a file open, or that does not go because pages are in VRAM, and data that goes
/// with it.
#[test]
fn the_module_can_be_removed_with_pages_in_vram() {
    for parameters in ["", "add_resource=1"] {
        let mut driver = Driver::load(&format!("soft=1 {parameters}"));
        drop(driver.bind(GPUS[0]));
        // Two with pages on the soft device, two on the GPU. None has a file open when the module goes.
        let fork = |i: u32| {
            Child::fork(move |test| {
                let device = Device::open(i % 2).unwrap();
                let area = Area::filled(150, u64::from(i));
                to_device(&device, *area);
                drop(device);
                test.send(0);
                test.receive();
                area.check(u64::from(i));
            })
        };
        let mut processes: Vec<Child> = (0..4).map(fork).collect();
        processes.iter_mut().for_each(|process| {
            process.receive();
        });
        let devices = [0, 1].map(|unit| Device::open(unit).unwrap());
        let area = Area::filled(240, 11);
        to_device(&devices[0], area.part(0, 120));
        to_device(&devices[1], area.part(120, 120));
        assert_eq!(driver.try_remove(), Err(Errno::AGAIN), "files are open");
        for device in devices {
            assert_eq!(device.counters().unwrap().live_pages, 120 + 2 * 150);
        }
        driver.try_remove().unwrap();
        driver.finish();
        area.check(11);
        for mut process in processes {
            process.send(0);
            process.finish();
        }
    }
}

/// What the processes of the next test are to do: a word in memory that they share with it.
const PAUSE: u64 = 0;
const WORK: u64 = 1;
const STOP: u64 = 2;

/// Moves pages to whatever GPU is bound, touches and writes them, and checks them, until told to stop. Counts the moves.
fn worker(orders: &AtomicU64, moves: &AtomicU64, seed: u64) {
    let mut random = Random::new(seed);
    let area = Area::filled(256, seed);
    let mut model = vec![seed; area.pages];
    while orders.load(Ordering::Relaxed) != STOP {
        let device = match Device::open(0) {
            Ok(device) => device,
            Err(error) => {
                let gone = [Errno::NOENT, Errno::NODEV, Errno::NXIO].map(Some);
                let errno = error.errno();
                assert!(
                    gone.contains(&errno) || matches!(error, hmm_gpu::Error::NotADevice { .. }),
                    "{error}"
                );
                std::thread::sleep(Duration::from_millis(1));
                continue;
            }
        };
        while orders.load(Ordering::Relaxed) != STOP {
            if orders.load(Ordering::Relaxed) == PAUSE {
                std::thread::sleep(Duration::from_millis(1));
                continue;
            }
            let first = random.below(area.pages);
            let part = area.part(first, 1 + random.below(area.pages - first));
            let target = [Target::Device, Target::Device, Target::System][random.below(3)];
            match device.prefetch_range(part.addr, part.bytes(), target) {
                Ok(moved) => moves.fetch_add(u64::from(moved.moved != 0), Ordering::Relaxed),
                Err(error) if error.errno() == Some(Errno::NODEV) => break,
                Err(error) => panic!("{error}"),
            };
            for _ in 0..20 {
                let page = random.below(area.pages);
                area.page(page).check(model[page]);
                if random.below(2) == 0 {
                    model[page] = random.next() >> 40;
                    area.page(page).fill(model[page]);
                }
            }
        }
    }
    (0..area.pages).for_each(|page| area.page(page).check(model[page]));
}

/// Catches a registration that is not undone wholly (the same VRAM could not be bound again), an unbind that does not end under
/// load, and bytes lost on the way: a hundred times, every other time with processes that move and touch pages at that moment.
#[test]
fn a_gpu_is_bound_and_unbound_a_hundred_times() {
    for parameters in ["soft=0", "soft=0 add_resource=1"] {
        let mut driver = Driver::load(parameters);
        let shared = Area::shared(1);
        // SAFETY: the first two words of memory that lives as long as the processes do.
        let [orders, moves] = unsafe { &*(shared.addr as *const [AtomicU64; 2]) };
        let workers: Vec<Child> = (1..=2)
            .map(|seed| Child::fork(|_| worker(orders, moves, seed)))
            .collect();
        for round in 0..rounds(50) {
            driver.try_bind(GPUS[1]).unwrap();
            if round % 2 == 0 {
                orders.store(WORK, Ordering::Relaxed);
                let before = moves.load(Ordering::Relaxed);
                crate::common::eventually("the processes have moved pages", || {
                    moves.load(Ordering::Relaxed) > before + 4
                });
            }
            // With whatever is under way.
            driver.unbind(GPUS[1]);
            orders.store(PAUSE, Ordering::Relaxed);
            assert_eq!(
                kernel::iomem(),
                driver.iomem_before(),
                "after round {round}"
            );
        }
        orders.store(STOP, Ordering::Relaxed);
        workers.into_iter().for_each(Child::finish);
        // The last one starts with nothing, and works.
        let device = driver.bind(GPUS[1]);
        let fresh = device.counters().unwrap();
        assert!(
            fresh.iter().all(|(_, value)| value == 0),
            "counters start anew: {fresh:?}"
        );
        let area = Area::filled(64, 4);
        to_device(&device, *area);
        area.check(4);
        drop((area, device));
        driver.finish();
    }
}

/// Catches a lost update: threads move the same pages both ways, on two devices, while others count in every word of them.
#[test]
fn threads_write_while_others_move_the_same_pages_both_ways() {
    const WRITERS: usize = 2;

    let mut driver = Driver::load("soft=1 soft_mib=16");
    let devices = [Device::open(0).unwrap(), driver.bind(GPUS[0])];
    let area = Area::offset(500, 48);
    let word = |page: usize, word: usize| {
        // SAFETY: inside the area; all access is atomic.
        unsafe { &*((area.page(page).addr + word * 8) as *const AtomicU64) }
    };
    let stop = AtomicBool::new(false);
    let counts: Vec<Vec<u64>> = std::thread::scope(|scope| {
        for (i, device) in devices.iter().enumerate() {
            let (stop, area) = (&stop, &area);
            scope.spawn(move || {
                let mut random = Random::new(i as u64);
                while !stop.load(Ordering::Relaxed) {
                    let first = random.below(area.pages);
                    let part = area.part(first, 1 + random.below(area.pages - first));
                    let target = [Target::Device, Target::System][random.below(2)];
                    device
                        .prefetch_range(part.addr, part.bytes(), target)
                        .unwrap();
                    places(device, part);
                }
            });
        }
        let writer = |which: usize| {
            let (stop, word, pages) = (&stop, &word, area.pages);
            move || {
                let mut random = Random::new(100 + which as u64);
                let mut counts = vec![0_u64; pages * 512];
                while !stop.load(Ordering::Relaxed) {
                    let (page, nth) = (random.below(pages), random.below(512 / WRITERS));
                    let index = nth * WRITERS + which;
                    // Read and written apart: a page that moves between the two must take the write along.
                    let place = word(page, index);
                    let value = place.load(Ordering::Relaxed);
                    assert_eq!(value, counts[page * 512 + index], "page {page}");
                    place.store(value + 1, Ordering::Relaxed);
                    counts[page * 512 + index] = value + 1;
                }
                counts
            }
        };
        let writers: Vec<_> = (0..WRITERS)
            .map(|which| scope.spawn(writer(which)))
            .collect();
        std::thread::sleep(Duration::from_secs(6));
        stop.store(true, Ordering::Relaxed);
        writers
            .into_iter()
            .map(|writer| writer.join().unwrap())
            .collect()
    });
    for page in 0..area.pages {
        for index in 0..512 {
            let expected = counts[index % WRITERS][page * 512 + index];
            let found = word(page, index).load(Ordering::Relaxed);
            assert_eq!(found, expected, "word {index} of page {page}");
        }
    }
    for device in &devices {
        let work = device.counters().unwrap();
        assert!(
            work.fault_back_pages > 10 && work.to_device_pages > 10,
            "too little happened: {work:?}"
        );
    }
    drop((area, devices));
    driver.finish();
}

/// Catches a child that gets half of a moving page, or a parent that loses one by forking.
#[test]
fn forks_in_the_middle_of_migrations_have_all_bytes() {
    on_each_kind(|device| {
        let area = Area::filled(160, 15);
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    for target in [Target::Device, Target::System] {
                        device
                            .prefetch_range(area.addr, area.bytes(), target)
                            .unwrap();
                    }
                }
            });
            for page in 0..rounds(12) {
                Child::fork(|_| {
                    area.check(15);
                    area.page(page).fill(16);
                    area.page(page).check(16);
                })
                .finish();
                area.page(page).check(15);
            }
            stop.store(true, Ordering::Relaxed);
        });
        area.check(15);
    });
}

/// Catches an unbind that waits for user space: a call whose argument cannot be read, or whose answer cannot be written, for as
/// long as another program (a userfaultfd) likes.
#[test]
fn unbind_does_not_wait_for_a_call_that_waits_for_user_space() {
    let mut driver = Driver::load("soft=0");
    let device = driver.bind(GPUS[0]);
    let data = Area::filled(16, 1);
    to_device(&device, *data);
    let waiting = Area::new(2);
    waiting.advise(libc::MADV_NOHUGEPAGE).unwrap();
    let (argument, answer) = (waiting.page(0), waiting.page(1));
    let query = || {
        // SAFETY: a page for the structure.
        unsafe {
            device
                .file()
                .call(hmm_gpu::uapi::HMM_GPU_QUERY, argument.addr as *mut _)
        }
    };
    let residency = || {
        // SAFETY: the page is the test's own.
        let bytes = unsafe { std::slice::from_raw_parts_mut(answer.addr as *mut u8, data.pages) };
        let mut request = hmm_gpu::uapi::hmm_gpu_residency {
            addr: data.addr as u64,
            len: data.bytes() as u64,
            ..Default::default()
        };
        device.file().residency(&mut request, bytes)
    };
    let long = patience(Duration::from_secs(10));
    std::thread::scope(|scope| {
        let watch = userfault::Watch::new(*waiting);
        let (one, two) = (scope.spawn(query), scope.spawn(residency));
        watch.wait_for_a_toucher();
        // Long enough for the other one too.
        std::thread::sleep(Duration::from_millis(300));
        let (unbound, is_unbound) = std::sync::mpsc::channel();
        // If unbind waits for them, they are let go some time, and the test fails.
        let keeper = scope.spawn(move || {
            let quick = is_unbound.recv_timeout(long);
            drop(watch);
            quick
        });
        driver.unbind(GPUS[0]);
        data.check(1);
        let _ = unbound.send(());
        assert_eq!(keeper.join().unwrap(), Ok(()), "unbind waited");
        assert_eq!(one.join().unwrap(), Err(Errno::NODEV));
        // It had its answer before the device went.
        assert_eq!(two.join().unwrap(), Ok(()));
    });
    drop(device);
    driver.finish();
}

/// Catches bytes that an unbind under memory pressure, with swap unavailable, gives up: here only that all of a full VRAM comes back.
#[test]
fn a_full_vram_is_evicted_with_every_byte() {
    let (mut driver, device) = Driver::load_with("", GPUS[1]);
    let room = device.describe().unwrap().vram_bytes as usize / PAGE;
    let area = Area::offset(1, rounds(room / 2));
    area.fill(19);
    let rest = Area::new(room - area.pages);
    to_device(&device, *area);
    to_device(&device, *rest);
    assert_eq!(device.describe().unwrap().vram_free_bytes, 0);
    driver.unbind(GPUS[1]);
    assert!(device.counters().is_err());
    area.check(19);
    rest.check_zero();
    drop((area, rest, device));
    driver.finish();
}
