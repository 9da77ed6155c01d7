//! Moves that go on by themselves: what is queued comes to an end, is told of once, and whoever waits for it wakes; and nobody waits for
//! what nobody wants any more.
//!
//! Runs in the virtual GPU host: `bench/test guest_queued`.

use std::fs;
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use crate::common::child::Child;
use crate::common::driver::{assert_empty, counters, on_each_kind, Driver, GPUS};
use crate::common::memory::{errno, last_errno, Area, Span, PAGE};
use crate::common::misuse::{bad_ranges, call, sized};
use crate::common::{assert_place, eventually, patience, places, refused, to_device};
use hmm_gpu::uapi::{
    hmm_gpu_completion, hmm_gpu_prefetch, HMM_GPU_MAX_PREFETCHES, HMM_GPU_PREFETCH,
    HMM_GPU_TARGET_DEVICE,
};
use hmm_gpu::{Device, Errno, Moved, Place, Target};

const MOST: usize = HMM_GPU_MAX_PREFETCHES as usize;

/// Queues a move, as the interface has it.
fn queue(device: &Device, span: Span, target: u32, cookie: u64) -> Result<(), Errno> {
    device.file().prefetch(&mut hmm_gpu_prefetch {
        addr: span.addr as u64,
        len: span.bytes() as u64,
        cookie,
        target,
        ..Default::default()
    })
}

/// Has `read` not wait.
fn do_not_wait(device: &Device) {
    // SAFETY: a descriptor and numbers.
    let set = unsafe { libc::fcntl(device.as_fd().as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) };
    errno(set).unwrap();
}

/// What `poll` says of a file, within a time.
fn poll(device: &Device, time: Duration) -> i16 {
    let mut fd = libc::pollfd {
        fd: device.as_fd().as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one structure, which is ours.
    let ready = unsafe { libc::poll(&raw mut fd, 1, time.as_millis() as i32) };
    errno(ready).unwrap();
    fd.revents
}

/// As many completions as there are, which must be at once.
fn read_all(device: &Device, count: usize) -> Vec<hmm_gpu_completion> {
    let mut all = vec![];
    while all.len() < count {
        let mut room = [hmm_gpu_completion::default(); 7];
        let read = device.file().completions(&mut room).unwrap();
        assert_ne!(read, 0, "there were {} of {count}", all.len());
        all.extend_from_slice(&room[..read]);
    }
    all
}

/// Catches a move that is queued and does not happen, happens in another order, loses a byte, or says something else than `MIGRATE` would.
#[test]
fn what_is_queued_moves_while_the_program_goes_on() {
    on_each_kind(|device| {
        let area = Area::filled(1200, 1);
        // Mapped, a hole, and what does not move.
        area.part(1000, 100).unmap();
        let there = device.prefetch_range_async(area.addr, area.bytes(), Target::Device);
        let back = device.prefetch_range_async(area.addr, 500 * PAGE, Target::System);
        let again = device.prefetch_range_async(area.addr, 100 * PAGE, Target::Device);
        let (there, back, again) = (there.unwrap(), back.unwrap(), again.unwrap());
        // Asked for in another order than they were queued.
        let pages = |pages: usize| (pages * PAGE) as u64;
        assert_eq!(again.wait().unwrap().moved, pages(100));
        assert!(there.is_done().unwrap() && back.is_done().unwrap());
        let moved = there.wait().unwrap();
        assert_eq!(moved.unmapped, pages(100));
        assert_eq!(moved.moved + moved.skipped, pages(1100));
        assert_eq!(moved.total(), area.bytes() as u64);
        assert_eq!(back.wait().unwrap().total(), pages(500));
        assert_place(device, area.part(0, 100), Place::Device);
        assert_place(device, area.part(100, 400), Place::System);
        assert!(places(device, area.part(500, 500)).counts().device > 400);
        area.part(0, 1000).check(1);
        area.part(1100, 100).check(1);
        // Errors are told when they happen.
        let hole = device.prefetch_range_async(area.addr + 1000 * PAGE, 50 * PAGE, Target::Device);
        assert_eq!(refused(hole.unwrap().wait()), Errno::FAULT);
        let empty: [u64; 0] = [];
        assert!(device.prefetch_async(&empty, Target::Device).is_err());
        // More than there may be, of which nobody asks.
        let as_soon_as_may_be = |target| loop {
            match device.prefetch_range_async(area.addr, 8 * PAGE, target) {
                Err(error) if error.errno() == Some(Errno::AGAIN) => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                result => break result.unwrap(),
            }
        };
        for _ in 0..3 * MOST {
            drop(as_soon_as_may_be(Target::Device));
        }
        let last = as_soon_as_may_be(Target::System);
        assert_eq!(last.wait().unwrap().total(), pages(8));
        area.part(0, 1000).check(1);
    });
}

/// Catches threads that get each other's answers, or wait for one that another thread has read.
#[test]
fn threads_wait_for_their_own() {
    let (driver, device) = Driver::load_with("", GPUS[0]);
    let areas: Vec<Area> = (0..4)
        .map(|seed| Area::filled(50 + 10 * seed as usize, seed))
        .collect();
    std::thread::scope(|scope| {
        for area in &areas {
            let device = &device;
            scope.spawn(move || {
                for round in 0..20 {
                    let target = [Target::Device, Target::System][round % 2];
                    let moving = device.prefetch_range_async(area.addr, area.bytes(), target);
                    let moved: Moved = moving.unwrap().wait().unwrap();
                    assert_eq!(moved.total(), area.bytes() as u64);
                }
            });
        }
    });
    for (seed, area) in (0..).zip(&areas) {
        area.check(seed);
    }
    drop((areas, device));
    driver.finish();
}

/// Catches a wait that ends before there is anything to read, or never, whether by `poll`, `epoll` or `read`; and a queue that takes more
/// than it has room for.
#[test]
fn who_waits_wakes_when_a_move_has_ended() {
    let (driver, device) = Driver::load_with("", GPUS[0]);
    let area = Area::filled(64, 1);
    let mut room = [hmm_gpu_completion::default(); 2];
    assert_eq!(poll(&device, Duration::ZERO), 0);
    assert_eq!(
        device.file().completions(&mut room),
        Ok(0),
        "nothing is queued"
    );

    queue(&device, *area, HMM_GPU_TARGET_DEVICE, 77).unwrap();
    assert_eq!(
        poll(&device, patience(Duration::from_secs(20))),
        libc::POLLIN
    );
    assert_eq!(device.file().completions(&mut room), Ok(1));
    let told = room[0];
    assert_eq!(
        (told.cookie, told.addr, told.len, told.target, told.error),
        (
            77,
            area.addr as u64,
            area.bytes() as u64,
            HMM_GPU_TARGET_DEVICE,
            0
        )
    );
    assert_eq!((told.done_bytes, told.moved_bytes), (told.len, told.len));
    assert_eq!(poll(&device, Duration::ZERO), 0, "it is told once");

    // SAFETY: a new descriptor.
    let epoll = errno(unsafe { libc::epoll_create1(0) }).unwrap();
    let mut event = libc::epoll_event {
        events: (libc::EPOLLIN | libc::EPOLLET) as u32,
        u64: 5,
    };
    let fd = device.as_fd().as_raw_fd();
    // SAFETY: descriptors, and a structure of ours.
    errno(unsafe { libc::epoll_ctl(epoll, libc::EPOLL_CTL_ADD, fd, &raw mut event) }).unwrap();
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| {
            let mut event = libc::epoll_event { events: 0, u64: 0 };
            // SAFETY: room for one.
            let woken = unsafe { libc::epoll_wait(epoll, &raw mut event, 1, 60_000) };
            (woken, event.u64)
        });
        std::thread::sleep(Duration::from_millis(100));
        assert!(!waiter.is_finished());
        queue(&device, *area, 0, 1).unwrap();
        assert_eq!(waiter.join().unwrap(), (1, 5));
    });
    // The file may go while it is watched.
    let other = Device::open_path(device.path()).unwrap();
    let fd = other.as_fd().as_raw_fd();
    // SAFETY: as above.
    errno(unsafe { libc::epoll_ctl(epoll, libc::EPOLL_CTL_ADD, fd, &raw mut event) }).unwrap();
    queue(&other, *area, HMM_GPU_TARGET_DEVICE, 1).unwrap();
    drop(other);
    // SAFETY: it is ours.
    unsafe { libc::close(epoll) };
    assert_eq!(read_all(&device, 1)[0].cookie, 1);

    // A read waits for the first, if it may.
    do_not_wait(&device);
    let whole = Area::filled(2048, 3);
    for cookie in 0..MOST as u64 {
        queue(&device, *whole, (cookie % 2) as u32, cookie).unwrap();
    }
    let busy = queue(&device, *area, HMM_GPU_TARGET_DEVICE, 99);
    assert_eq!(busy, Err(Errno::AGAIN), "what is not read counts");
    let mut all = vec![];
    while all.len() < MOST {
        match device.file().completions(&mut room) {
            Ok(read) => all.extend_from_slice(&room[..read]),
            Err(error) => {
                assert_eq!(error, Errno::AGAIN);
                assert_ne!(poll(&device, patience(Duration::from_secs(20))), 0);
            }
        }
    }
    let cookies: Vec<u64> = all.iter().map(|one| one.cookie).collect();
    assert_eq!(cookies, (0..MOST as u64).collect::<Vec<_>>(), "in order");
    assert!(all
        .iter()
        .all(|one| one.error == 0 && one.done_bytes == one.len));
    queue(&device, *area, HMM_GPU_TARGET_DEVICE, 99).unwrap();
    whole.check(3);
    area.check(1);
    drop((area, whole, device));
    driver.finish();
}

/// Catches what a file takes that it should not, or what it hands to somebody else, or loses because a buffer was bad.
#[test]
fn what_no_file_takes() {
    let (driver, device) = Driver::load_with("", GPUS[0]);
    let area = Area::filled(40, 1);
    let good = hmm_gpu_prefetch {
        addr: area.addr as u64,
        len: area.bytes() as u64,
        target: HMM_GPU_TARGET_DEVICE,
        ..Default::default()
    };
    let ask = |change: &dyn Fn(&mut hmm_gpu_prefetch)| {
        let mut argument = good;
        change(&mut argument);
        device.file().prefetch(&mut argument)
    };
    assert_eq!(ask(&|it| it.target = 2), Err(Errno::INVAL));
    assert_eq!(ask(&|it| it.flags = 1), Err(Errno::INVAL));
    assert_eq!(ask(&|it| it.reserved[1] = 1), Err(Errno::INVAL));
    for (what, addr, len, error) in bad_ranges(&area) {
        let asked = ask(&|it| (it.addr, it.len) = (addr, len));
        assert_eq!(asked, Err(error), "{what}");
    }
    let null = call(&device, HMM_GPU_PREFETCH, 0);
    assert_eq!(null, Err(Errno::FAULT));
    let short = call(&device, sized(HMM_GPU_PREFETCH, 40), area.addr);
    assert_eq!(short, Err(Errno::INVAL));
    assert_eq!(poll(&device, Duration::ZERO), 0, "none of these is queued");

    // A buffer that is too short, and one that cannot be written, lose nothing.
    queue(&device, area.part(0, 20), HMM_GPU_TARGET_DEVICE, 7).unwrap();
    assert_ne!(poll(&device, patience(Duration::from_secs(20))), 0);
    let fd = device.as_fd().as_raw_fd();
    let read = |at: usize, bytes: usize| {
        // SAFETY: what is written is an area of this test, or cannot be.
        let read = unsafe { libc::read(fd, at as *mut libc::c_void, bytes) };
        if read < 0 {
            Err(last_errno())
        } else {
            Ok(read)
        }
    };
    let gap = Area::new(2);
    gap.page(1).protect(libc::PROT_NONE);
    assert_eq!(read(gap.addr, 79), Err(Errno::INVAL));
    assert_eq!(read(0, 80), Err(Errno::FAULT));
    assert_eq!(read(gap.page(1).addr - 40, 80), Err(Errno::FAULT));
    // Neither does one that is in the VRAM itself.
    to_device(&device, area.part(30, 10));
    assert_eq!(read(area.page(30).addr, 800), Ok(80));
    // SAFETY: it was just written, and any bytes are one.
    let told: hmm_gpu_completion =
        unsafe { (area.page(30).addr as *const hmm_gpu_completion).read() };
    assert_eq!((told.cookie, told.moved_bytes), (7, 20 * PAGE as u64));
    area.part(0, 20).check(1);

    // Nobody else is told.
    let child = Child::fork(|_| {
        let mut room = [hmm_gpu_completion::default()];
        assert_eq!(device.file().completions(&mut room), Err(Errno::PERM));
        assert_eq!(queue(&device, *area, 0, 1), Err(Errno::PERM));
        let own = Device::open_path(device.path()).unwrap();
        assert_eq!(own.file().completions(&mut room), Ok(0));
    });
    child.finish();
    drop((area, gap, device));
    driver.finish();
}

/// Catches a close that waits for all that is queued, or leaves it running; and pages that are lost between.
#[test]
fn closing_the_file_ends_what_is_queued() {
    let (driver, device) = Driver::load_with("", GPUS[2]);
    let area = Area::filled(8192, 1);
    let begin = Instant::now();
    to_device(&device, *area);
    let once = begin.elapsed();
    for round in 0..4 {
        let other = Device::open_path(device.path()).unwrap();
        for cookie in 0..MOST as u64 {
            queue(&other, *area, (cookie % 2) as u32, cookie).unwrap();
        }
        std::thread::sleep(once * round / 4);
        let begin = Instant::now();
        drop(other);
        let took = begin.elapsed();
        // All of it takes as long as that so often.
        assert!(
            took < once * (MOST as u32 / 2) || took < Duration::from_secs(1),
            "{took:?}, {once:?}"
        );
        let before = counters(&device);
        std::thread::sleep(Duration::from_millis(50));
        let after = counters(&device);
        assert_eq!(
            before.to_device_pages, after.to_device_pages,
            "nothing goes on"
        );
        assert_eq!(
            before.to_system_pages, after.to_system_pages,
            "nothing goes on"
        );
    }
    area.check(1);
    drop((area, device));
    driver.finish();
}

/// Catches a process that cannot end because a move is under way for it, one whose memory stays because of that, and a move that goes on
/// for a file that others still have.
#[test]
fn a_process_ends_in_the_middle_of_its_moves() {
    let (driver, device) = Driver::load_with("", GPUS[2]);
    for kept in [false, true] {
        let path = device.path();
        let mut child = Child::fork(|test| {
            let device = Device::open_path(path).unwrap();
            let area = Area::filled(8192, 1);
            for cookie in 0..MOST as u64 {
                queue(&device, *area, (cookie + 1) as u32 % 2, cookie).unwrap();
            }
            test.send(device.as_fd().as_raw_fd() as u64);
            test.receive();
        });
        let fd = child.receive();
        let file = kept.then(|| child.take_file(fd));
        let begin = Instant::now();
        child.kill();
        let took = begin.elapsed();
        assert!(took < patience(Duration::from_secs(10)), "{took:?}");
        eventually("all of it is gone", || {
            let now = counters(&device);
            now.live_pages == now.table_pages
        });
        drop(file);
        assert_empty(&device);
    }
    drop(device);
    driver.finish();
}

/// Catches an unbind that waits for all that is queued, a waiter that is forgotten, and an answer that is lost: the device goes in the
/// middle of a queue.
#[test]
fn a_device_goes_in_the_middle_of_moves() {
    let mut driver = Driver::load("soft=0");
    let device = driver.bind(GPUS[2]);
    let area = Area::filled(4096, 1);
    for cookie in 0..MOST as u64 {
        queue(&device, *area, (cookie + 1) as u32 % 2, cookie).unwrap();
    }
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| read_all(&device, MOST));
        std::thread::sleep(Duration::from_millis(30));
        driver.unbind(GPUS[2]);
        let all = reader.join().unwrap();
        let gone = Errno::NODEV.raw_os_error() as u32;
        assert!(all.iter().all(|one| one.error == 0 || one.error == gone));
        assert_eq!(all[MOST - 1].error, gone);
        let order: Vec<u64> = all.iter().map(|one| one.cookie).collect();
        assert_eq!(order, (0..MOST as u64).collect::<Vec<_>>());
    });
    let mut room = [hmm_gpu_completion::default()];
    assert_eq!(device.file().completions(&mut room), Err(Errno::NODEV));
    assert_eq!(queue(&device, *area, 0, 1), Err(Errno::NODEV));
    assert_ne!(poll(&device, Duration::ZERO) & libc::POLLHUP, 0);
    area.check(1);
    drop((area, device));
    driver.finish();
    // Its file was the last thing that held the module.
    let loaded = fs::read_to_string("/proc/modules").unwrap();
    assert!(!loaded.contains("hmm_gpu"));
}
