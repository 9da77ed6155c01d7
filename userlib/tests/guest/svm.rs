//! Kernels on the driver: pages in VRAM while they run, faults that the driver services, and more data than VRAM.
//!
//! Runs in the virtual GPU host: `bench/test guest_svm`. Lavapipe is the Vulkan device: what its shaders do, threads of this process do.

use std::sync::atomic::{AtomicBool, Ordering};

use hmm_gpu::{Args, Device, Error, Place, Shipped, Strategy, SvmContext, SvmError, Target};

use crate::common::child::Child;
use crate::common::driver::{counters, Driver, GPUS};
use crate::common::kernels::{builder, cache, translated, Arrays};
use crate::common::memory::{Area, PAGE};
use crate::common::{places, rounds, Stop};

/// Of the list. 160 pages of them.
const LINKS: u64 = 20_000;

/// What the kernel takes a link for.
#[repr(C)]
struct Link {
    next: Option<Box<Link>>,
    value: u64,
}

/// Catches a kernel that works on a copy, or on system memory: its pages are in VRAM when it is done, and a second run has no fault.
#[test]
fn pages_are_in_vram_where_a_kernel_used_them() {
    let driver = Driver::load("soft=1 soft_mib=64");
    let context = translated(Device::open(0).unwrap(), 16);
    let arrays = Arrays::new(200);
    let cold = arrays.saxpy(&context);
    assert_eq!(cold.bytes_in, 400 * PAGE as u64, "{cold}");
    let device = context.driver().unwrap();
    for area in [&arrays.x, &arrays.y] {
        assert!(places(device, **area).all(Place::Device));
    }
    let warm = arrays.saxpy(&context);
    assert_eq!((warm.rounds, warm.faults), (1, 0), "{warm}");
    arrays.check(2);
    // The CPU has touched all: it is home, and comes again.
    assert!(arrays.saxpy(&context).faults > 0);
    arrays.check(3);
    // Asked for ahead, it is there.
    for area in [&arrays.x, &arrays.y] {
        device
            .prefetch_range(area.addr, area.bytes(), Target::Device)
            .unwrap();
    }
    let prefetched = arrays.saxpy(&context);
    println!("{cold}\n{warm}\n{prefetched}");
    arrays.check(4);
    drop((context, arrays));
    driver.finish();
}

/// Catches bytes that are lost where pages make room for others between rounds, on a BAR too; and atomics that are done again.
#[test]
fn data_may_be_larger_than_the_pool() {
    let mut driver = Driver::load("soft=1 soft_mib=64");
    let gpu = driver.bind(GPUS[2]);
    for (device, pages) in [(Device::open(0).unwrap(), 2048), (gpu, 1024)] {
        let context = translated(device, 2);
        // Four and two times the pool; on the checking kernel as much as it, and half of that for the counts.
        let arrays = Arrays::new(rounds(pages / 2).max(256));
        let stats = arrays.saxpy(&context);
        println!("{stats}");
        let pages = (arrays.x.bytes() + arrays.y.bytes()) / PAGE;
        assert!(
            stats.serviced_pages >= pages as u64 && stats.rounds > 2,
            "{stats}"
        );
        arrays.check(1);
        drop(arrays);

        // In pages of its own, which go when it does.
        let area = Area::new(pages / 2);
        // SAFETY: the area is this test's own, begins at a page, and is that long.
        let words =
            unsafe { std::slice::from_raw_parts_mut(area.addr as *mut u32, area.bytes() / 4) };
        for (i, word) in (0..).zip(words.iter_mut()) {
            *word = u32::wrapping_mul(i, 2_654_435_761) >> 7;
        }
        let mut expected = Box::new([0_u32; 256]);
        words
            .iter()
            .for_each(|word| expected[(word & 255) as usize] += 1);
        let counts = Area::new(1);
        // SAFETY: the area is this test's own, begins at a page, and is long enough.
        let to = unsafe { &mut *(counts.addr as *mut [u32; 256]) };
        println!("{}", context.histogram(words, to).unwrap());
        assert_eq!(*to, *expected);
        assert!(counters(context.driver().unwrap()).pressure_pages > 0);
    }
    driver.finish();
}

/// Catches a pointer that is not followed: an ordinary list, of boxes, through VRAM.
#[test]
fn a_list_of_boxes_is_walked() {
    let driver = Driver::load("soft=1 soft_mib=64");
    let context = translated(Device::open(0).unwrap(), 16);
    // In a thread of its own, whose heap nobody else uses while the kernel runs.
    let head = std::thread::spawn(|| {
        let mut head = None;
        for value in 0..LINKS {
            head = Some(Box::new(Link {
                next: head,
                value: value * value,
            }));
        }
        head
    });
    let mut head = head.join().unwrap();
    let area = Area::new(2);
    // SAFETY: the area is this test's own, and long enough.
    let heads = unsafe { &mut *(area.addr as *mut *const Link) };
    // SAFETY: as above, on its second page.
    let sums = unsafe { &mut *((area.addr + PAGE) as *mut u64) };
    *heads = head.as_deref().unwrap();
    let kernel = context.kernel(Shipped::List).unwrap();
    let args = Args::new()
        .read(std::slice::from_ref(heads))
        .write(std::slice::from_mut(sums))
        .value(1_u64);
    // SAFETY: the list is what the kernel takes it for, and stays as it is.
    let stats = unsafe { context.dispatch(&kernel, args, 1) }.unwrap();
    println!("{stats}");
    assert!(stats.serviced_pages > 100, "{stats}");
    assert_eq!(*sums, (0..LINKS).map(|value| value * value).sum::<u64>());
    while let Some(mut link) = head {
        head = link.next.take();
    }
    drop((context, area));
    driver.finish();
}

/// Catches a page that is shared with a forked child, and is changed for it too, or does not come at all.
#[test]
fn what_a_fork_shares_becomes_ones_own() {
    let driver = Driver::load("soft=1 soft_mib=64");
    let context = translated(Device::open(0).unwrap(), 16);
    let arrays = Arrays::new(20);
    arrays.saxpy(&context);
    let mut child = Child::fork(|link| {
        link.receive();
        arrays.check(1);
    });
    arrays.saxpy(&context);
    child.send(0);
    child.finish();
    arrays.check(2);
    drop((context, arrays));
    driver.finish();
}

/// Catches work that is spoilt, or does not end, while the CPU uses other memory, and now and then the same.
#[test]
fn the_cpu_goes_on_meanwhile() {
    let driver = Driver::load("soft=1 soft_mib=64");
    let context = translated(Device::open(0).unwrap(), 8);
    let (arrays, others) = (Arrays::new(100), Area::new(100));
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let touches = scope.spawn(|| {
            let mut rounds = 0_u64;
            while !stop.load(Ordering::Relaxed) {
                others.fill(rounds);
                let word = (arrays.x.addr + 4 * (rounds as usize % 1000)) as *const u32;
                // SAFETY: the word is in the area; what is read is not looked at.
                unsafe { word.read_volatile() };
                rounds += 1;
            }
            rounds
        });
        {
            let _stop = Stop(&stop);
            for _ in 0..5 {
                println!("{}", arrays.saxpy(&context));
            }
        }
        assert!(touches.join().unwrap() > 0);
    });
    arrays.check(5);
    drop((context, arrays, others));
    driver.finish();
}

/// Catches a dispatch that does not end, or loses bytes, where more pages than there are copies come home in each round, since the thread
/// that dispatches touches them.
#[test]
fn more_pages_may_come_home_each_time_than_have_copies() {
    let driver = Driver::load("soft=1 soft_mib=64");
    let arrays = Arrays::new(160);
    let touched = [*arrays.x, *arrays.y];
    let context = builder(Device::open(0).unwrap(), 8)
        .progress(move |_| touched.iter().for_each(|span| span.touch()))
        .build()
        .unwrap();
    let stats = arrays.saxpy(&context);
    println!("{stats}");
    assert!((320..640).contains(&stats.pages_by_copy), "{stats}");
    assert!(counters(context.driver().unwrap()).fault_back_pages > 320);
    arrays.check(1);
    drop((context, arrays));
    driver.finish();
}

/// Catches memory that can never be in VRAM and is taken for something else; and a context that is of no use after it.
#[test]
fn memory_that_cannot_be_in_vram_is_named() {
    let driver = Driver::load("soft=1 soft_mib=64");
    let context = translated(Device::open(0).unwrap(), 8);
    let shared = Area::shared(4);
    // SAFETY: the area is this test's own, and begins at a page.
    let x = unsafe { std::slice::from_raw_parts(shared.addr as *const f32, shared.bytes() / 4) };
    let arrays = Arrays::new(4);
    let error = context.saxpy(1.0, x, arrays.slice(&arrays.y)).unwrap_err();
    let Error::Svm(SvmError::NotInVram { addr, why, .. }) = error else {
        panic!("{error}")
    };
    assert!(
        (shared.addr..shared.addr + shared.bytes()).contains(&addr) && why.contains("shared"),
        "{addr:#x}: {why}"
    );
    arrays.saxpy(&context);
    arrays.check(1);
    drop((context, arrays, shared));
    driver.finish();
}

/// Catches a native device that does not bring pages home, or that sees something else than they hold: what shares the CPU's page tables
/// makes the CPU's faults.
#[test]
fn a_native_kernel_brings_pages_home() {
    cache();
    let driver = Driver::load("soft=1 soft_mib=64");
    let device = Device::open(0).unwrap();
    let context = SvmContext::builder()
        .strategy(Strategy::Native)
        .build()
        .unwrap();
    let arrays = Arrays::new(100);
    arrays.saxpy(&context);
    for area in [&arrays.x, &arrays.y] {
        device
            .prefetch_range(area.addr, area.bytes(), Target::Device)
            .unwrap();
        assert!(places(&device, **area).all(Place::Device));
    }
    let before = counters(&device).fault_back_pages;
    arrays.saxpy(&context);
    assert_eq!(counters(&device).fault_back_pages - before, 200);
    arrays.check(2);
    let doctor = hmm_gpu::doctor().to_string();
    println!("{doctor}");
    assert!(doctor.contains("translated available"), "{doctor}");
    drop((context, arrays, device));
    driver.finish();
}
