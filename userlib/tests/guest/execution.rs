//! Executions: a thread plays the shader on a mapped private pool while others do what they like to its memory; how long each of
//! them waits, and what becomes of the bytes.
//!
//! Runs in the virtual GPU host: `bench/test guest_execution`. What it prints is what `Documentation/pools.md` shows.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{scope, sleep};
use std::time::{Duration, Instant};

use crate::common::child::Child;
use crate::common::driver::{counters, device_of, Driver, GPUS};
use crate::common::memory::Area;
use crate::common::mirror::{try_fault, wants, MIGRATE, WRITE};
use crate::common::shader::{bring_in, Shader};
use crate::common::{is_checking, patience, refused, Stop};
use hmm_gpu::{Device, Ended, Errno, Target};

const MIB: usize = 1 << 20;

/// How long an execution is waited for here.
const DEADLINE: Duration = Duration::from_millis(1500);

/// The longest that one can be waited for.
const LATEST: Duration = Duration::from_secs(10);

/// When it ends before that, if it does.
const WORK: Duration = Duration::from_millis(300);

/// What is not waiting, on a machine that does other things too.
fn slack() -> Duration {
    patience(Duration::from_secs(2))
}

/// Does something, and returns how long it took.
fn timed(work: impl FnOnce()) -> Duration {
    let began = Instant::now();
    work();
    began.elapsed()
}

fn fork_and_wait(work: impl FnOnce()) {
    Child::fork(|_| work()).finish();
}

/// What others do, and whether it has to wait for the shader.
struct Event {
    name: &'static str,
    waits: bool,
    run: fn(&Area, u64),
}

/// What it is done to: 600 pages in the pool.
const EVENTS: [Event; 8] = [
    Event {
        name: "munmap",
        waits: false,
        run: |area, _| {
            area.part(300, 20).map_over(
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
            )
        },
    },
    Event {
        name: "MADV_DONTNEED",
        waits: false,
        run: |area, _| area.part(320, 20).advise(libc::MADV_DONTNEED).unwrap(),
    },
    Event {
        name: "MIGRATE to system",
        waits: false,
        // By another client of the process, that it would leave.
        run: |area, _| {
            let other = Device::open(0).unwrap();
            let part = area.part(340, 20);
            let moved = other
                .prefetch_range(part.addr, part.bytes(), Target::System)
                .unwrap();
            assert_eq!(moved.moved, 0, "pages left under a shader");
        },
    },
    Event {
        name: "mprotect elsewhere",
        waits: false,
        run: |_, _| {
            let area = Area::filled(4, 1);
            area.protect(libc::PROT_READ);
        },
    },
    Event {
        name: "mprotect",
        waits: true,
        run: |area, _| {
            area.part(360, 20).protect(libc::PROT_READ);
        },
    },
    Event {
        name: "fork with 300 mappings",
        waits: true,
        run: |area, seed| {
            let part = area.part(0, 300);
            // Each page a mapping of its own.
            (0..300)
                .step_by(2)
                .for_each(|i| area.page(i).advise(libc::MADV_DONTDUMP).unwrap());
            fork_and_wait(|| part.check(seed));
        },
    },
    Event {
        name: "touch",
        waits: true,
        run: |area, seed| area.page(400).check(seed),
    },
    Event {
        name: "write",
        waits: true,
        run: |area, seed| area.page(401).fill(seed),
    },
];

/// Catches a wait that has no end, or that is none; a shader that is taken for done; and a byte that is wrong on either side. Says how
/// long each waited.
#[test]
fn who_waits_and_for_how_long() {
    let driver = Driver::load("soft=1 soft_mib=16");
    println!(
        "deadline {DEADLINE:?}, the shader's work {WORK:?}, checking kernel: {}",
        is_checking()
    );
    for event in &EVENTS {
        who_waits(event, true);
        who_waits(event, false);
    }
    driver.finish();
}

/// Has something be done to memory that a shader works on, which `ends`, or goes on: until the other is done, if that does not wait,
/// and until its execution is lost, if it does.
fn who_waits(event: &Event, ends: bool) {
    let client = Device::open(0).unwrap();
    let pool = client.create_pool(6 * MIB).unwrap();
    let shader = Shader::new(&client, &pool);
    let area = Area::filled(600, 1);
    bring_in(&client, *area);
    let seed = 2;
    // The 300 that are looked at, and what is touched.
    let stays = [area.part(0, 300), area.part(360, 240)];
    // Before it begins: who asks for memory in an execution waits for who waits for that.
    let (early, late) = (
        stays.map(|it| it.pattern(9)),
        stays.map(|it| it.pattern(seed)),
    );
    let (begun, worked, done) = Default::default();
    let is_set = |flag: &AtomicBool| flag.load(Ordering::Acquire);
    let set = |flag: &AtomicBool| flag.store(true, Ordering::Release);
    let lost = event.waits && !ends;
    let mut has_waited = false;
    let (took, ended) = scope(|scope| {
        let gpu = scope.spawn(|| {
            // Others have all the time they need, but where they have to wait for the deadline.
            let deadline = if lost { DEADLINE } else { LATEST };
            let execution = client.begin_execution(deadline).unwrap();
            // A shader may use what it has found once to the end.
            let places = stays.map(|part| shader.places(part));
            let write = |patterns: &[Vec<u64>]| {
                for (words, places) in patterns.iter().zip(&places) {
                    shader.fill_places(places, words);
                }
            };
            write(&early);
            let began = Instant::now();
            set(&begun);
            // Others are at it while this is written.
            sleep(WORK / 2);
            write(&late);
            while began.elapsed() < WORK {
                std::hint::spin_loop();
                shader.page(area.page(500).addr);
            }
            set(&worked);
            while !ends && !execution.is_lost().unwrap() && (lost || !is_set(&done)) {
                sleep(Duration::from_millis(1));
            }
            execution.end().unwrap()
        });
        while !is_set(&begun) {
            std::hint::spin_loop();
        }
        let took = timed(|| (event.run)(&area, seed));
        has_waited = is_set(&worked);
        set(&done);
        (took, gpu.join().unwrap())
    });
    println!(
        "{:<24} ends: {ends:<5} took {took:>12.3?}, {ended:?}",
        event.name
    );
    // What waits without a need would have this one be lost, too.
    let expected = if lost { Ended::Lost } else { Ended::Well };
    assert_eq!(ended, expected, "{}", event.name);
    assert!(has_waited || !event.waits, "{} has not waited", event.name);
    area.part(0, 300).check(seed);
    area.part(380, 220).check(seed);
}

/// Catches a process that cannot be killed, in the middle of its own execution, at once; and what it leaves behind.
#[test]
fn a_killed_process_waits_for_nothing() {
    let driver = Driver::load("soft=1 soft_mib=16");
    let device = Device::open(0).unwrap();
    let mut longest = Duration::ZERO;
    for waits in [false, true] {
        let mut child = Child::fork(|parent| {
            let client = Device::open(0).unwrap();
            let pool = client.create_pool(4 * MIB).unwrap();
            let area = Area::filled(500, 1);
            bring_in(&client, *area);
            let execution = client.begin_execution(LATEST).unwrap();
            parent.send(0);
            if waits {
                // It is killed in here.
                area.check(1);
            }
            sleep(Duration::from_secs(100));
            drop((execution, pool));
        });
        child.receive();
        sleep(Duration::from_millis(300));
        child.still_runs();
        longest = longest.max(timed(|| child.kill()));
    }
    println!("SIGKILL                  waited {longest:>12.3?}");
    assert!(longest < slack(), "a killed process took {longest:?}");
    drop(device);
    driver.finish();
}

/// Catches an unbind that waits without a bound for an execution that nobody ends, or not at all, and a mapping that is there after.
#[test]
fn an_unbind_waits_for_the_deadline_at_most() {
    for ends in [true, false] {
        let (mut driver, device) = Driver::load_with("", GPUS[0]);
        drop(device);
        let mut child = Child::fork(|parent| {
            let client = device_of(GPUS[0]);
            let pool = client.create_pool(4 * MIB).unwrap();
            let shader = Shader::new(&client, &pool);
            let area = Area::filled(300, 1);
            bring_in(&client, *area);
            let execution = client
                .begin_execution(if ends { LATEST } else { DEADLINE })
                .unwrap();
            parent.send(0);
            // It is written to while the unbind goes on.
            let began = Instant::now();
            while began.elapsed() < WORK {
                assert_eq!(shader.fill(*area, 2), 300);
            }
            if ends {
                assert_eq!(execution.end().unwrap(), Ended::Well);
                parent.receive();
                area.check(2);
                // The kernel ends it here.
                shader.fill(*area, 3);
                return;
            }
            parent.receive();
            area.check(2);
            assert_eq!(refused(execution.end()), Errno::NODEV);
        });
        child.receive();
        let took = timed(|| driver.unbind(GPUS[0]));
        println!("unbind                   ends: {ends:<5} waited {took:>12.3?}");
        let bound = if ends { WORK } else { DEADLINE };
        assert!(took < bound + slack() * 2, "unbind took {took:?}");
        assert!(took > WORK / 2, "unbind has not waited: {took:?}");
        child.send(0);
        if ends {
            child.finish_killed(libc::SIGBUS);
        } else {
            child.finish();
        }
        driver.finish();
    }
}

/// Catches a page that is used again while a shader may still write to it: it would write into what is there now.
#[test]
fn what_is_freed_in_an_execution_is_not_used_before_its_end() {
    let driver = Driver::load("soft=1 soft_mib=16");
    let client = Device::open(0).unwrap();
    let pool = client.create_pool(2 * MIB).unwrap();
    let shader = Shader::new(&client, &pool);
    let area = Area::filled(200, 1);
    bring_in(&client, *area);
    let stale: Vec<u64> = (0..100)
        .map(|i| shader.page(area.page(i).addr).unwrap())
        .collect();
    for round in 0..2 {
        let execution = client.begin_execution(LATEST).unwrap();
        if round == 0 {
            area.part(0, 100).advise(libc::MADV_DONTNEED).unwrap();
            assert!(counters(&client).quarantined_pages >= 100);
        }
        // All there is room for, and a little more.
        let more = Area::filled(512, 3);
        let mut faults: Vec<_> = (0..512).map(|i| wants(more.page(i).addr, WRITE)).collect();
        let (_, answer) = try_fault(&client, &mut faults, MIGRATE);
        let (got, used) = (answer.device_pages as usize, 200 - 100 * round);
        assert!(got > 100 && got <= 512 - used, "{got} pages came in");
        let places: Vec<u64> = (0..512)
            .filter_map(|i| shader.page(more.page(i).addr))
            .collect();
        // What was brought in before it is where there was room, too.
        let others = (100..200).filter_map(|i| shader.page(area.page(i).addr));
        let again = places
            .iter()
            .copied()
            .chain(others)
            .filter(|place| stale.contains(place))
            .count();
        assert_eq!(
            again > 0,
            round == 1,
            "{again} pages of {got} were used again"
        );
        if round == 0 {
            for place in &stale {
                pool.store(*place, 0xbad).unwrap();
            }
        }
        assert_eq!(execution.end().unwrap(), Ended::Well);
        more.check(3);
        area.part(100, 100).check(1);
        if round == 0 {
            area.part(0, 100).check_zero();
            area.part(0, 100).advise(libc::MADV_DONTNEED).unwrap();
        }
        bring_in(&client, area.part(100, 100));
    }
    drop((area, pool, client));
    driver.finish();
}

/// Catches misuse that is taken, and a file that is closed in an execution and leaves its pool unusable.
#[test]
fn executions_are_one_at_a_time_and_end_with_the_file() {
    let driver = Driver::load("soft=1 soft_mib=16");
    let second = Duration::from_secs(1);
    let client = Device::open(0).unwrap();
    assert_eq!(refused(client.begin_execution(second)), Errno::NXIO);
    let pool = client.create_pool(8 * MIB).unwrap();
    for bad in [
        Duration::ZERO,
        Duration::from_micros(999),
        Duration::from_millis(10_001),
        Duration::MAX,
    ] {
        assert_eq!(refused(client.begin_execution(bad)), Errno::INVAL);
    }
    let first = client.begin_execution(second).unwrap();
    assert_eq!(refused(client.begin_execution(second)), Errno::BUSY);
    assert!(!first.is_lost().unwrap());
    let id = first.id();
    assert_eq!(first.end().unwrap(), Ended::Well);
    let next = client.begin_execution(second).unwrap();
    assert_ne!(next.id(), id);
    for (op, id, expected) in [
        (1, id, Errno::SRCH),
        (2, id, Errno::SRCH),
        (1, 0, Errno::SRCH),
        (3, next.id(), Errno::INVAL),
    ] {
        let mut argument = hmm_gpu::uapi::hmm_gpu_execute {
            op,
            id,
            ..Default::default()
        };
        assert_eq!(
            client.file().execute(&mut argument),
            Err(expected),
            "{op} {id}"
        );
    }
    Child::fork(|_| {
        // Its parent's execution is not its own.
        assert_eq!(refused(next.is_lost()), Errno::PERM);
    })
    .finish();
    assert_eq!(counters(&client).executions, 2);
    // The pool is unmapped, and the file closed, in the middle of it.
    let area = Area::filled(100, 1);
    bring_in(&client, *area);
    std::mem::forget(next);
    drop((pool, client));
    area.check(1);
    let client = Device::open(0).unwrap();
    client.create_pool(8 * MIB).unwrap();
    assert_eq!(counters(&client).quarantined_pages, 0);
    drop((client, area));
    driver.finish();
}

/// Catches a wait that never ends, and a byte that is wrong, when all of it goes on at once: executions one after the other, with faults
/// in them, while others fork, unmap, touch, migrate and protect.
#[test]
fn all_of_it_at_once() {
    let driver = Driver::load("soft=1 soft_mib=16");
    let client = Device::open(0).unwrap();
    let pool = client.create_pool(4 * MIB).unwrap();
    let shader = Shader::new(&client, &pool);
    let seconds = Duration::from_secs(8);
    let (stop, rounds, lost) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    let area = Area::filled(400, 1);
    let longest = std::sync::Mutex::new(Duration::ZERO);
    let note = |work: &dyn Fn()| {
        let took = timed(work);
        let mut longest = longest.lock().unwrap();
        *longest = took.max(*longest);
    };
    let deadline = Duration::from_millis(400);
    let on = || !stop.load(Ordering::Relaxed);
    scope(|scope| {
        let _stop = Stop(&stop);
        scope.spawn(|| {
            while on() {
                let mut faults: Vec<_> =
                    (0..400).map(|i| wants(area.page(i).addr, WRITE)).collect();
                let _ = try_fault(&client, &mut faults, MIGRATE);
                let execution = client.begin_execution(deadline).unwrap();
                // What it writes is what is there: so whoever looks sees that, lost or not.
                shader.fill(*area, 1);
                if execution.end().unwrap() == Ended::Lost {
                    lost.fetch_add(1, Ordering::Relaxed);
                }
                rounds.fetch_add(1, Ordering::Relaxed);
            }
        });
        scope.spawn(|| {
            while on() {
                note(&|| fork_and_wait(|| area.check(1)));
            }
        });
        scope.spawn(|| {
            while on() {
                note(&|| area.part(0, 100).check(1));
                sleep(Duration::from_millis(5));
            }
        });
        scope.spawn(|| {
            let other = Device::open(0).unwrap();
            let part = area.part(100, 100);
            while on() {
                note(&|| {
                    let _ = other.prefetch_range(part.addr, part.bytes(), Target::System);
                });
                sleep(Duration::from_millis(3));
            }
        });
        scope.spawn(|| {
            let part = area.part(200, 50);
            while on() {
                note(&|| {
                    part.protect(libc::PROT_READ);
                    part.protect(libc::PROT_READ | libc::PROT_WRITE);
                });
                sleep(Duration::from_millis(7));
            }
        });
        let began = Instant::now();
        let mut seen = 0;
        while began.elapsed() < seconds {
            sleep(Duration::from_secs(2));
            let now = rounds.load(Ordering::Relaxed);
            assert!(
                now > seen || began.elapsed() < patience(Duration::from_secs(30)),
                "no execution has ended"
            );
            seen = now;
        }
    });
    let longest = *longest.lock().unwrap();
    println!(
        "all at once              waited {longest:>12.3?}, {} executions, {} lost",
        rounds.into_inner(),
        lost.into_inner()
    );
    assert!(
        longest < deadline + patience(Duration::from_secs(20)),
        "{longest:?}"
    );
    area.check(1);
    drop((area, pool, client));
    driver.finish();
}
