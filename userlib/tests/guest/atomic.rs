//! Atomic operations of the device: on words in VRAM and, of pages that it takes for itself, in system memory.
//!
//! Runs in the virtual GPU host: `bench/test guest_atomic`.

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::common::child::Child;
use crate::common::driver::{assert_empty, counters, on_each_kind, Driver, GPUS};
use crate::common::kernel::{self, Entry};
use crate::common::memory::{errno, file, last_errno, Area, Span, HUGE, PAGE};
use crate::common::mirror::{
    atomic, call, device_check, device_fill, read, snapshot, write, MAP, MIGRATE, NONE,
};
use crate::common::misuse::user_end;
use crate::common::random::Random;
use crate::common::swap::{reclaim, Swap};
use crate::common::{is_checking, rounds, to_device, Stop};
use hmm_gpu::uapi::{
    self, hmm_gpu_atomic, HMM_GPU_ATOMIC_ADD as ADD, HMM_GPU_ATOMIC_AND as AND,
    HMM_GPU_ATOMIC_CMPXCHG as CMPXCHG, HMM_GPU_ATOMIC_OR as OR, HMM_GPU_ATOMIC_XCHG as XCHG,
};
use hmm_gpu::{AtomicOperation, AtomicWord, Device, Errno, Error, Policy, Target};

const RW: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;
const ANONYMOUS: libc::c_int = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;

/// How long everything is done at once.
const TURMOIL: Duration = Duration::from_secs(4);

/// The word at an address of a test's own, which is accessed atomically only, for as long as it is used.
fn wide(addr: usize) -> &'static AtomicU64 {
    // SAFETY: as said above.
    unsafe { AtomicU64::from_ptr(addr as *mut u64) }
}

/// The same of 32 bits.
fn narrow(addr: usize) -> &'static AtomicU32 {
    // SAFETY: as said above.
    unsafe { AtomicU32::from_ptr(addr as *mut u32) }
}

/// Asserts that the CPU finds these bytes.
#[track_caller]
fn cpu_check(what: &str, span: Span, model: &[u8]) {
    // SAFETY: mapped, and nobody writes to it meanwhile.
    let found = unsafe { std::slice::from_raw_parts(span.addr as *const u8, span.bytes()) };
    let wrong = (0..model.len()).find(|&i| found[i] != model[i]);
    assert_eq!(
        wrong.map(|i| (i / PAGE, i % PAGE)),
        None,
        "{what}: the first wrong byte"
    );
}

/// A device, a second file on it, and another device.
fn trio() -> (Driver, [Device; 3]) {
    let mut driver = Driver::load("soft=1 soft_mib=16");
    let one = driver.bind(GPUS[0]);
    let twin = Device::open_path(one.path()).unwrap();
    (driver, [one, twin, Device::open(0).unwrap()])
}

/// Does every operation on a word that holds a value, and asserts what the device says that it held. Returns what it holds then.
#[track_caller]
fn every_operation<W: AtomicWord>(device: &Device, word: &W, holds: u64, policy: Policy) -> u64 {
    const A: u64 = 0x9e37_79b9_ff4a_7c15;
    const B: u64 = 0xf0f0_3c3c_aaaa_ffff;
    const C: u64 = 0x0100_0000_8000_0001;

    let mask = u64::MAX >> (64 - 8 * size_of::<W>());
    let value = |number: u64| W::Value::try_from(number & mask).ok().unwrap();
    let step = |old: Result<W::Value, Error>, holds: u64, new: u64| {
        assert_eq!(old.unwrap().into(), holds);
        new & mask
    };
    let old = device.fetch_add(word, value(A), policy);
    let holds = step(old, holds, holds.wrapping_add(A));
    let holds = step(device.fetch_and(word, value(B), policy), holds, holds & B);
    let holds = step(device.fetch_or(word, value(C), policy), holds, holds | C);
    let old = device.compare_exchange(word, value(!holds), value(B), policy);
    let holds = step(old, holds, holds);
    let old = device.compare_exchange(word, value(holds), value(B ^ A), policy);
    let holds = step(old, holds, B ^ A);
    step(device.swap(word, value(A), policy), holds, A)
}

/// Pages of a kind, and the seed of what is on them, if it is not zeroes.
struct Kind<'a> {
    what: &'static str,
    make: Box<dyn Fn() -> Area + 'a>,
    seed: Option<u64>,
    /// Whether a device that maps its pages where they lie finds them in its VRAM.
    in_vram: bool,
}

fn kinds<'a>(device: &'a Device, other: &'a Device, file: &'a std::fs::File) -> Vec<Kind<'a>> {
    const PAGES: usize = 3;

    fn kind<'a>(
        what: &'static str,
        seed: Option<u64>,
        in_vram: bool,
        make: impl Fn() -> Area + 'a,
    ) -> Kind<'a> {
        let make = Box::new(make);
        Kind {
            what,
            make,
            seed,
            in_vram,
        }
    }
    let untouched = || {
        let area = Area::new(PAGES);
        area.advise(libc::MADV_NOHUGEPAGE).unwrap();
        area
    };
    let huge = || {
        let area = Area::new(HUGE);
        area.advise(libc::MADV_HUGEPAGE).unwrap();
        area.fill(1);
        area
    };
    let of_file = move |touched: bool| {
        let area = untouched();
        area.map_over(RW, libc::MAP_PRIVATE, file.as_raw_fd());
        if touched {
            area.fill(1);
        }
        area
    };
    // With the pattern, after something was done to it.
    let after = |then: Box<dyn Fn(Span) + 'a>| {
        move || {
            let area = Area::filled(PAGES, 1);
            then(*area);
            area
        }
    };
    vec![
        kind("untouched memory", None, false, untouched),
        kind("the page of zeroes", None, false, move || {
            let area = untouched();
            area.touch();
            area
        }),
        kind("system memory", Some(1), false, after(Box::new(|_| ()))),
        kind(
            "VRAM",
            Some(1),
            true,
            after(Box::new(|span| {
                to_device(device, span);
            })),
        ),
        kind(
            "another device",
            Some(1),
            false,
            after(Box::new(|span| {
                to_device(other, span);
            })),
        ),
        kind(
            "what the device has mapped already",
            Some(2),
            false,
            after(Box::new(|span| device_fill(device, span, 2))),
        ),
        kind(
            "what another device has to itself",
            Some(1),
            false,
            after(Box::new(|span| {
                for page in 0..span.pages {
                    let addr = span.page(page).addr;
                    assert!(other.fetch_add(wide(addr), 0, Policy::Map).is_ok());
                    assert!(snapshot(other, span.page(page))[0].is_exclusive());
                }
            })),
        ),
        kind(
            "what is swapped out",
            Some(1),
            false,
            after(Box::new(|span| {
                reclaim(span, || {
                    let entries = kernel::pagemap(std::process::id(), span.addr, span.pages);
                    let present = |entry: &Entry| matches!(entry, Entry::Present { .. });
                    !entries.iter().any(present)
                });
            })),
        ),
        kind("a huge page", Some(1), false, huge),
        kind("a huge page in VRAM", Some(1), true, move || {
            let area = huge();
            to_device(device, *area);
            area
        }),
        kind("a private file", Some(7), false, move || of_file(false)),
        kind(
            "a private file that was written",
            Some(1),
            false,
            move || of_file(true),
        ),
    ]
}

/// Catches an operation that does something else than it says, on a word of either width wherever its page lies and whatever it is, or
/// to anything beside the word.
#[test]
fn every_operation_on_every_kind_of_page() {
    let swap = Swap::on();
    for parameters in ["soft=1 soft_mib=16", "soft=1 soft_mib=16 add_resource=1"] {
        let mut driver = Driver::load(parameters);
        let soft = Device::open(0).unwrap();
        let gpu = driver.bind(GPUS[0]);
        let file = file(3, 7);
        for (device, other) in [(&gpu, &soft), (&soft, &gpu)] {
            for kind in kinds(device, other, &file) {
                for (policy, bytes) in [
                    (Policy::Map, 4),
                    (Policy::Map, 8),
                    (Policy::Migrate, 4),
                    (Policy::Migrate, 8),
                ] {
                    let what = format!("{} (policy {policy}, {bytes} bytes)", kind.what);
                    println!("{what}");
                    let area = (kind.make)();
                    let words = match kind.seed {
                        Some(seed) => area.pattern(seed),
                        None => vec![0; area.bytes() / 8],
                    };
                    let mut model: Vec<u8> = bytemuck::cast_slice(&words).to_vec();
                    let page = area.pages / 2;
                    for offset in [0, 1000, PAGE - bytes] {
                        let (at, addr) = (page * PAGE + offset, area.page(page).addr + offset);
                        let mut holds = [0; 8];
                        holds[..bytes].copy_from_slice(&model[at..at + bytes]);
                        let holds = u64::from_ne_bytes(holds);
                        let new = match bytes {
                            4 => every_operation(device, narrow(addr), holds, policy),
                            _ => every_operation(device, wide(addr), holds, policy),
                        };
                        model[at..at + bytes].copy_from_slice(&new.to_ne_bytes()[..bytes]);
                    }
                    let seen = snapshot(device, area.page(page))[0];
                    let in_vram = kind.in_vram || policy == Policy::Migrate;
                    let expected = (in_vram, !in_vram);
                    let found = (seen.is_on_device(), seen.is_exclusive());
                    assert_eq!(found, expected, "{what}: {seen:?}");
                    // What the device has to itself it reads too.
                    let mut bytes = vec![0; PAGE];
                    read(device, area.page(page).addr, &mut bytes, NONE).whole(PAGE);
                    assert!(bytes == model[page * PAGE..][..PAGE], "{what}");
                    cpu_check(&what, *area, &model);
                }
            }
        }
        // Of the file nothing has changed.
        let shared = Area::new(3);
        shared.map_over(RW, libc::MAP_SHARED, file.as_raw_fd());
        shared.check(7);
        drop((soft, gpu));
        driver.finish();
    }
    drop(swap);
}

/// Catches a device that is refused a program's own words, or finds other ones: in a box, on the stack, in statics, by their address.
#[test]
fn a_program_s_own_words() {
    static ZERO: AtomicU64 = AtomicU64::new(0);
    static SET: AtomicU32 = AtomicU32::new(77);

    on_each_kind(|device| {
        let (boxed, stack) = (Box::new(AtomicU64::new(5)), AtomicU32::new(6));
        for policy in [Policy::Map, Policy::Migrate] {
            for word in [&ZERO, &*boxed] {
                let holds = word.load(Ordering::Relaxed);
                let new = every_operation(device, word, holds, policy);
                assert_eq!(word.load(Ordering::Relaxed), new);
            }
            for word in [&SET, &stack] {
                let holds = word.load(Ordering::Relaxed);
                let new = every_operation(device, word, holds.into(), policy);
                assert_eq!(u64::from(word.load(Ordering::Relaxed)), new);
            }
        }
        // Beyond the width it wraps around, and nothing is carried to the next word.
        let pair = [AtomicU32::new(u32::MAX), AtomicU32::new(3)];
        assert_eq!(
            device.fetch_add(&pair[0], 2, Policy::Map).unwrap(),
            u32::MAX
        );
        let found = pair.map(AtomicU32::into_inner);
        assert_eq!(found, [1, 3]);
        // By its address, also for a number that is not atomic.
        let mut number = Box::new(5_u64);
        let (addr, operation) = (&raw mut *number as usize, AtomicOperation::FetchOr(0x30));
        // SAFETY: a number of this function's own.
        let old = unsafe { device.atomic_at::<AtomicU64>(addr, operation, Policy::Map) };
        assert_eq!((old.unwrap(), *number), (5, 0x35));
    });
}

/// Catches memory that a device changes although the process may not, or that the kernel would not have it change: each has its error.
#[test]
fn what_may_not_be_changed_is_refused_with_its_error() {
    std::fs::write("/proc/sys/vm/nr_hugepages", "2").unwrap();
    on_each_kind(|device| {
        let memory = file(HUGE, 1);
        // SAFETY: numbers only.
        let secret = unsafe { libc::syscall(libc::SYS_memfd_secret, libc::O_CLOEXEC) } as i32;
        assert_ne!(secret, -1, "memfd_secret: {}", last_errno());
        // SAFETY: a file of this test's own.
        errno(unsafe { libc::ftruncate(secret, (4 * PAGE) as i64) }).unwrap();
        let area = Area::new(HUGE);
        let shared_anonymous = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        let small = area.part(0, 4);
        type Make<'a> = (&'static str, Errno, Box<dyn Fn() -> Span + 'a>);
        let over = |span: Span, protection, flags, fd| -> Box<dyn Fn() -> Span> {
            Box::new(move || {
                span.map_over(protection, flags, fd);
                span
            })
        };
        let fd = memory.as_raw_fd();
        let kinds: [Make<'_>; 9] = [
            (
                "shared memory",
                Errno::OPNOTSUPP,
                over(small, RW, shared_anonymous, -1),
            ),
            (
                "a memfd",
                Errno::OPNOTSUPP,
                over(*area, RW, libc::MAP_SHARED, fd),
            ),
            (
                "shared hugetlb",
                Errno::OPNOTSUPP,
                over(*area, RW, shared_anonymous | libc::MAP_HUGETLB, -1),
            ),
            (
                "private hugetlb",
                Errno::OPNOTSUPP,
                over(*area, RW, ANONYMOUS | libc::MAP_HUGETLB, -1),
            ),
            (
                "memory to be read",
                Errno::ACCESS,
                over(small, libc::PROT_READ, ANONYMOUS, -1),
            ),
            (
                "a private file to be read",
                Errno::ACCESS,
                over(small, libc::PROT_READ, libc::MAP_PRIVATE, fd),
            ),
            (
                "memory without access",
                Errno::ACCESS,
                over(small, libc::PROT_NONE, ANONYMOUS, -1),
            ),
            (
                "secret memory",
                Errno::FAULT,
                over(small, RW, libc::MAP_SHARED, secret),
            ),
            (
                "a hole",
                Errno::FAULT,
                Box::new(|| {
                    small.map_over(RW, ANONYMOUS, -1);
                    small.unmap();
                    small
                }),
            ),
        ];
        for (what, expected, make) in kinds {
            println!("{what}");
            let span = make();
            let readable = expected == Errno::OPNOTSUPP;
            if readable {
                span.fill(3);
            }
            let addr = span.page(1).addr;
            for op in [ADD, AND, OR, XCHG] {
                for (bytes, policy) in [(4, MAP), (8, MAP), (4, MIGRATE), (8, MIGRATE)] {
                    let ended = atomic(device, addr + 16, bytes, op, 1, policy);
                    assert_eq!(ended.result, Err(expected), "{what}");
                    assert!(ended.faults > 0, "{what}");
                }
            }
            let error = device
                .compare_exchange(wide(addr), 0, 1, Policy::Map)
                .unwrap_err();
            assert_eq!(error.errno(), Some(expected), "{what}: {error}");
            if readable {
                assert!(error.to_string().contains("shared or a file's"), "{error}");
                span.check(3);
                device_check(device, span, 3);
            }
            if what == "a hole" {
                small.map_over(RW, ANONYMOUS, -1);
            }
            area.map_over(RW, ANONYMOUS, -1);
        }
        // Nothing but addresses.
        for addr in [
            0,
            user_end(),
            1 << 62,
            0xffff_8880_0000_0000,
            0xffff_ffff_ff60_0000,
        ] {
            for policy in [MAP, MIGRATE] {
                let ended = atomic(device, addr as usize, 8, ADD, 1, policy);
                assert_eq!(ended.result, Err(Errno::FAULT), "{addr:#x}");
            }
        }
        // SAFETY: open, and nobody else's.
        errno(unsafe { libc::close(secret) }).unwrap();
    });
    std::fs::write("/proc/sys/vm/nr_hugepages", "0").unwrap();
}

/// Catches an operation, width, policy, flag or field that is ignored, and a word that is not where words are.
#[test]
fn arguments_that_mean_nothing_are_refused() {
    on_each_kind(|device| {
        let area = Area::filled(2, 1);
        to_device(device, area.page(1));
        for page in [0, 1] {
            let good = |bytes: u32| hmm_gpu_atomic {
                addr: area.page(page).addr as u64 + 16,
                operand: 1,
                bytes,
                ..Default::default()
            };
            let mut cases = vec![];
            for bytes in [4, 8] {
                let good = good(bytes);
                cases.extend([5, 6, 1 << 31].map(|op| hmm_gpu_atomic { op, ..good }));
                cases.extend([2, 3, 1 << 31].map(|policy| hmm_gpu_atomic { policy, ..good }));
                cases.extend((0..32).map(|bit| hmm_gpu_atomic {
                    flags: 1 << bit,
                    ..good
                }));
                for i in 0..3 {
                    let mut reserved = good;
                    reserved.reserved[i] = 1 << (20 * i);
                    cases.push(reserved);
                }
                // Half a word on, a byte on, a byte before the next page.
                for shift in [1, 2, 3, 5, 6, 7, PAGE as u64 - 17] {
                    let addr = good.addr + shift;
                    cases.push(hmm_gpu_atomic { addr, ..good });
                }
                // What only an exchange compares.
                let compare = hmm_gpu_atomic { compare: 1, ..good };
                cases.extend([ADD, AND, OR, XCHG].map(|op| hmm_gpu_atomic { op, ..compare }));
            }
            cases.extend([0, 1, 2, 3, 5, 6, 7, 9, 16, u32::MAX].map(good));
            let addr = good(8).addr + 4;
            cases.push(hmm_gpu_atomic { addr, ..good(8) });
            for wider in [1 << 32, u64::MAX] {
                for op in [ADD, AND, OR, XCHG, CMPXCHG] {
                    cases.push(hmm_gpu_atomic {
                        op,
                        operand: wider,
                        ..good(4)
                    });
                }
                cases.push(hmm_gpu_atomic {
                    op: CMPXCHG,
                    compare: wider,
                    ..good(4)
                });
            }
            for mut argument in cases {
                let asked = argument;
                let answer = call(device, uapi::HMM_GPU_ATOMIC, &mut argument);
                assert_eq!(answer, Err(Errno::INVAL), "{asked:x?}");
                assert_eq!((argument.old, argument.faults), (0, 0), "{asked:x?}");
            }
        }
        let word = wide(area.addr);
        let error = device.fetch_add(word, 1, Policy::None).unwrap_err();
        assert_eq!(error.errno(), Some(Errno::INVAL));
        assert!(error.to_string().contains("use `Policy::Map`"), "{error}");
        area.check(1);
    });
}

/// What is done to pages that a device has to itself.
struct Event<'a> {
    what: &'static str,
    then: Box<dyn Fn(Span) + 'a>,
    /// Whether it happens to all of an address space.
    all: bool,
}

/// Catches a page that a device keeps although somebody else has it, one that it loses for nothing, and bytes that are lost on the way.
#[test]
fn whoever_touches_a_page_takes_it_from_the_device() {
    let (driver, [device, twin, other]) = trio();
    let area = Area::filled(6, 1);
    let mut model = area.pattern(1);
    let own = std::process::id() as libc::pid_t;
    fn event<'a>(what: &'static str, then: impl Fn(Span) + 'a) -> Event<'a> {
        let then = Box::new(then);
        let all = what == "fork";
        Event { what, then, all }
    }
    let on_each = |span: Span, then: &dyn Fn(usize)| {
        (0..span.pages).for_each(|page| then(span.page(page).addr + 64));
    };
    let read_by = |device: &Device, span: Span, policy| {
        let mut bytes = vec![0; span.bytes()];
        read(device, span.addr, &mut bytes, policy).whole(span.bytes());
    };
    let events = [
        event("the CPU reads", Span::touch),
        event("the CPU writes", |span| {
            on_each(span, &|addr| {
                let word = wide(addr).load(Ordering::Relaxed);
                wide(addr).store(word, Ordering::Relaxed);
            });
        }),
        event("the CPU adds", |span| {
            on_each(span, &|addr| {
                wide(addr).fetch_add(1, Ordering::Relaxed);
                wide(addr).fetch_sub(1, Ordering::Relaxed);
            });
        }),
        event("another process reads", |span| {
            let mut bytes = vec![0_u8; span.bytes()];
            let of = |addr: usize, len| libc::iovec {
                iov_base: addr as *mut libc::c_void,
                iov_len: len,
            };
            let (to, from) = (
                of(bytes.as_mut_ptr() as usize, bytes.len()),
                of(span.addr, span.bytes()),
            );
            // SAFETY: as many bytes as there are.
            let got = unsafe { libc::process_vm_readv(own, &to, 1, &from, 1, 0) };
            assert_eq!(got, span.bytes() as isize, "{}", last_errno());
        }),
        event("another file adds", |span| {
            on_each(span, &|addr| {
                twin.fetch_add(wide(addr), 0, Policy::Map).unwrap();
            });
        }),
        event("another device adds", |span| {
            on_each(span, &|addr| {
                other.fetch_or(wide(addr), 0, Policy::Map).unwrap();
            });
        }),
        event("another file reads", |span| read_by(&twin, span, MAP)),
        event("another device takes it over", |span| {
            read_by(&other, span, MIGRATE);
        }),
        event("the device itself writes", |span| {
            on_each(span, &|addr| {
                let word = wide(addr).load(Ordering::Relaxed);
                device.fetch_add(wide(addr), 0, Policy::Map).unwrap();
                write(&device, addr, &word.to_ne_bytes(), MAP).whole(8);
            });
        }),
        event("mprotect", |span| {
            span.protect(libc::PROT_READ);
            span.protect(RW);
        }),
        event("mremap", |span| {
            let elsewhere = Area::new(span.pages);
            for (from, to) in [(span.addr, elsewhere.addr), (elsewhere.addr, span.addr)] {
                let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
                let (from, to) = (from as *mut libc::c_void, to as *mut libc::c_void);
                // SAFETY: both ranges are the test's own.
                let new = unsafe { libc::mremap(from, span.bytes(), span.bytes(), flags, to) };
                assert_eq!(new, to, "{}", last_errno());
            }
            elsewhere.map_over(RW, ANONYMOUS, -1);
        }),
        event("fork", |_| Child::fork(|_| ()).finish()),
    ];
    for event in events {
        let what = event.what;
        println!("{what}");
        for (first, pages) in [(1, 3), (0, 6), (2, 1)] {
            let touched = area.part(first, pages);
            for page in 0..area.pages {
                let word = wide(area.page(page).addr + 64);
                let index = page * 512 + 8;
                let before = device.fetch_add(word, 1, Policy::Map).unwrap();
                assert_eq!(before, model[index], "{what}");
                model[index] = before.wrapping_add(1);
                let raw = atomic(&device, area.page(page).addr + 64, 8, ADD, 0, MAP);
                assert_eq!(raw.result, Ok(model[index]), "{what}");
                assert_eq!(raw.faults, 0, "{what}: it has the page already");
            }
            let exclusive = |span| snapshot(&device, span).iter().all(|it| it.is_exclusive());
            assert!(exclusive(*area), "{what}");
            // To look is not to touch, nor is what the device itself reads.
            assert_eq!(
                crate::common::places(&device, *area).counts().none,
                area.pages
            );
            read_by(&device, *area, NONE);
            assert!(exclusive(*area), "{what}");

            (event.then)(touched);
            for (page, seen) in snapshot(&device, *area).into_iter().enumerate() {
                let taken = event.all || (first..first + pages).contains(&page);
                assert_eq!(seen.is_exclusive(), !taken, "{what}: page {page}, {seen:?}");
            }
            let again = atomic(&device, touched.addr + 64, 8, ADD, 0, MAP);
            assert_eq!(again.result, Ok(model[first * 512 + 8]), "{what}");
            assert!(again.faults > 0, "{what}: it has lost the page");
            cpu_check(what, *area, bytemuck::cast_slice(&model));
        }
    }
    // What is thrown away is zeroes, for the device too.
    for page in 0..4 {
        device
            .fetch_add(wide(area.page(page).addr), 1, Policy::Map)
            .unwrap();
    }
    area.part(0, 2).advise(libc::MADV_DONTNEED).unwrap();
    area.part(2, 2).map_over(RW, ANONYMOUS, -1);
    assert!(!snapshot(&device, *area).iter().any(|it| it.is_exclusive()));
    for page in 0..4 {
        let word = wide(area.page(page).addr);
        assert_eq!(device.fetch_add(word, 9, Policy::Map).unwrap(), 0);
        assert_eq!(word.load(Ordering::Relaxed), 9);
    }
    // Who has it to itself keeps it from moving.
    device
        .fetch_add(wide(area.page(5).addr), 1, Policy::Map)
        .unwrap();
    for device in [&device, &other] {
        let stays = device
            .prefetch_range(area.page(5).addr, PAGE, Target::Device)
            .unwrap();
        assert_eq!(stays, crate::common::moved(0, 0, 1, 0));
    }
    // Not through an address that is no more.
    device.fetch_add(wide(area.addr), 1, Policy::Map).unwrap();
    area.page(0).unmap();
    let gone = atomic(&device, area.addr, 8, ADD, 1, MAP);
    assert_eq!(gone.result, Err(Errno::FAULT));
    area.page(0).map_over(RW, ANONYMOUS, -1);
    drop((area, device, twin, other));
    driver.finish();
}

/// Catches what a device has added and that is lost when the page is reclaimed: to the kernel, nobody has written to it.
#[test]
fn what_the_device_adds_outlives_reclaim() {
    let swap = Swap::on();
    on_each_kind(|device| {
        let area = Area::filled(20, 1);
        let mut model = area.pattern(1);
        // Some of it the kernel might drop, since nobody would miss it: until it is written to.
        area.part(0, 10).advise(libc::MADV_FREE).unwrap();
        for page in 0..20 {
            let word = wide(area.page(page).addr + 800);
            device.swap(word, page as u64, Policy::Map).unwrap();
            model[page * 512 + 100] = page as u64;
        }
        assert!(snapshot(device, *area).iter().all(|it| it.is_exclusive()));
        // The kernel's advice leaves out what no CPU maps.
        area.touch();
        reclaim(*area, || {
            let seen = snapshot(device, *area);
            !seen.iter().any(|it| it.is_exclusive() || it.is_valid())
        });
        for page in (0..20).step_by(3) {
            let word = wide(area.page(page).addr + 800);
            assert_eq!(device.fetch_add(word, 1, Policy::Map).unwrap(), page as u64);
            model[page * 512 + 100] += 1;
        }
        cpu_check("after reclaim", *area, bytemuck::cast_slice(&model));
    });
    drop(swap);
}

/// Who does an operation.
#[derive(Clone, Copy)]
enum Actor<'a> {
    Cpu,
    Device(&'a Device),
}

#[derive(Clone, Copy)]
enum Op {
    Add,
    And,
    Or,
    Swap,
}

/// Times that a device had lost its page whenever it came to use it, and asked again.
static BUSY: AtomicU64 = AtomicU64::new(0);

/// Asks until a page stays long enough.
#[track_caller]
fn insist<T>(mut ask: impl FnMut() -> Result<T, Error>) -> T {
    loop {
        match ask() {
            Ok(done) => return done,
            Err(error) => assert_eq!(error.errno(), Some(Errno::BUSY), "{error}"),
        }
        BUSY.fetch_add(1, Ordering::Relaxed);
    }
}

impl Actor<'_> {
    #[track_caller]
    fn wide(self, word: &AtomicU64, op: Op, value: u64, policy: Policy) -> u64 {
        match self {
            Actor::Cpu => match op {
                Op::Add => word.fetch_add(value, Ordering::SeqCst),
                Op::And => word.fetch_and(value, Ordering::SeqCst),
                Op::Or => word.fetch_or(value, Ordering::SeqCst),
                Op::Swap => word.swap(value, Ordering::SeqCst),
            },
            Actor::Device(device) => insist(|| match op {
                Op::Add => device.fetch_add(word, value, policy),
                Op::And => device.fetch_and(word, value, policy),
                Op::Or => device.fetch_or(word, value, policy),
                Op::Swap => device.swap(word, value, policy),
            }),
        }
    }

    #[track_caller]
    fn narrow_add(self, word: &AtomicU32, value: u32, policy: Policy) -> u32 {
        match self {
            Actor::Cpu => word.fetch_add(value, Ordering::SeqCst),
            Actor::Device(device) => insist(|| device.fetch_add(word, value, policy)),
        }
    }
}

/// Words of a page that are used, by what for.
const WORDS: usize = 4;
const SUMS: usize = 10;
const NARROW_SUMS: usize = 100;
const FLAGS: usize = 300;
const TOKENS: usize = 500;

/// What an actor has done: added to each word, and the token that it holds at its end.
struct Done {
    sums: Vec<u64>,
    narrow_sums: Vec<u32>,
    token: u64,
    steps: u64,
}

/// Adds, sets and clears a flag of its own, and exchanges tokens, until told to stop.
fn act(actor: Actor<'_>, id: usize, area: Span, stop: &AtomicBool, steps: &AtomicU64) -> Done {
    let mut random = Random::new(1000 + id as u64);
    let words = area.pages * WORDS;
    let mut done = Done {
        sums: vec![0; words],
        narrow_sums: vec![0; words],
        token: (1 << 40) | id as u64,
        steps: 0,
    };
    let flag = 1 << id;
    while !stop.load(Ordering::Relaxed) {
        let which = random.below(words);
        let at = |base: usize| area.page(which / WORDS).addr + (base + which % WORDS) * 8;
        let policy = [Policy::Map, Policy::Map, Policy::Migrate][random.below(3)];
        match random.below(4) {
            0 => {
                let value = random.next();
                actor.wide(wide(at(SUMS)), Op::Add, value, policy);
                done.sums[which] = done.sums[which].wrapping_add(value);
            }
            1 => {
                let value = random.next() as u32;
                actor.narrow_add(narrow(at(NARROW_SUMS)), value, policy);
                done.narrow_sums[which] = done.narrow_sums[which].wrapping_add(value);
            }
            2 => {
                let word = wide(at(FLAGS));
                let before = actor.wide(word, Op::Or, flag, policy);
                assert_eq!(before & flag, 0, "flag {id} was cleared");
                let set = actor.wide(word, Op::And, !flag, policy);
                assert_eq!(set & flag, flag, "flag {id} was set");
            }
            _ => done.token = actor.wide(wide(at(TOKENS)), Op::Swap, done.token, policy),
        }
        done.steps += 1;
        steps.fetch_add(1, Ordering::Relaxed);
        if done.steps % 64 == 0 {
            std::thread::yield_now();
        }
    }
    done
}

/// Catches an update that is lost, or done twice: CPUs, two files on one device and another device change the same words, while the
/// pages are moved to either device and back, reclaimed, protected and shared with forked children.
#[test]
fn no_update_is_lost_whatever_goes_on() {
    const PAGES: usize = 8;

    let swap = Swap::on();
    let (driver, devices) = trio();
    let area = Area::offset(HUGE - PAGES / 2, PAGES);
    area.advise(libc::MADV_NOHUGEPAGE).unwrap();
    area.fill(1);
    let mut model = area.pattern(1);
    let mut tokens = vec![];
    for which in 0..PAGES * WORDS {
        let at = |base: usize| which / WORDS * 512 + base + which % WORDS;
        for (base, value) in [(FLAGS, 0), (TOKENS, which as u64)] {
            model[at(base)] = value;
            wide(area.addr + at(base) * 8).store(value, Ordering::Relaxed);
        }
        tokens.push(which as u64);
    }
    let [one, twin, other] = &devices;
    let actors = [
        Actor::Cpu,
        Actor::Cpu,
        Actor::Device(one),
        Actor::Device(twin),
        Actor::Device(other),
    ];
    let steps: [AtomicU64; 5] = Default::default();
    // On the checking kernel a step takes a second where all are at it.
    let least = if is_checking() { 25 } else { 300 };
    let stop = AtomicBool::new(false);
    let running = || !stop.load(Ordering::Relaxed);
    let pause = || std::thread::sleep(Duration::from_millis(3));
    let part = |random: &mut Random| {
        let first = random.below(PAGES);
        area.part(first, 1 + random.below(PAGES - first))
    };
    let done: Vec<Done> = std::thread::scope(|scope| {
        let (stop, span) = (&stop, *area);
        let (running, pause, part, area) = (&running, &pause, &part, &area);
        for (seed, device) in [(1, one), (2, other)] {
            scope.spawn(move || {
                let mut random = Random::new(seed);
                while running() {
                    let part = part(&mut random);
                    let target = [Target::Device, Target::System][random.below(2)];
                    device
                        .prefetch_range(part.addr, part.bytes(), target)
                        .unwrap();
                    pause();
                }
            });
        }
        scope.spawn(move || {
            let mut random = Random::new(3);
            while running() {
                let part = part(&mut random);
                match random.below(3) {
                    0 => part.advise(libc::MADV_PAGEOUT).unwrap(),
                    1 => part.protect(RW | libc::PROT_EXEC),
                    _ => area.protect(RW),
                }
                pause();
            }
        });
        scope.spawn(move || {
            while running() {
                // What a child writes is its own.
                // SAFETY: the child does nothing but write to the area and end.
                match unsafe { libc::fork() } {
                    0 => {
                        for word in (0..PAGES * 512).step_by(7) {
                            wide(area.addr + word * 8).fetch_add(1 << 50, Ordering::Relaxed);
                        }
                        // SAFETY: it ends the child.
                        unsafe { libc::_exit(0) }
                    }
                    child => {
                        assert!(child > 0, "{}", last_errno());
                        // SAFETY: it waits for the child just made.
                        let ended = unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) };
                        assert_eq!(ended, child);
                    }
                }
                pause();
            }
        });
        let threads: Vec<_> = actors
            .iter()
            .zip(&steps)
            .enumerate()
            .map(|(id, (actor, steps))| scope.spawn(move || act(*actor, id, span, stop, steps)))
            .collect();
        let stop = Stop(stop);
        // As long as it takes, on a machine that is slow.
        let begun = Instant::now();
        let enough = || {
            steps
                .iter()
                .all(|steps| steps.load(Ordering::Relaxed) >= least)
        };
        while begun.elapsed() < TURMOIL || (!enough() && begun.elapsed() < 60 * TURMOIL) {
            if threads.iter().any(|thread| thread.is_finished()) {
                break;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        drop(stop);
        let done = threads.into_iter().map(|thread| thread.join().unwrap());
        done.collect()
    });
    let counts: Vec<u64> = done.iter().map(|done| done.steps).collect();
    println!(
        "steps {counts:?}, {} times busy",
        BUSY.load(Ordering::Relaxed)
    );
    assert!(counts.iter().all(|&steps| steps >= least), "{counts:?}");

    let mut found = vec![];
    for which in 0..PAGES * WORDS {
        let at = |base: usize| which / WORDS * 512 + base + which % WORDS;
        for done in &done {
            let sum = &mut model[at(SUMS)];
            *sum = sum.wrapping_add(done.sums[which]);
            let word = &mut model[at(NARROW_SUMS)];
            let sum = (*word as u32).wrapping_add(done.narrow_sums[which]);
            *word = (*word & !0xffff_ffff) | u64::from(sum);
        }
        let token = wide(area.addr + at(TOKENS) * 8).load(Ordering::Relaxed);
        found.push(token);
        model[at(TOKENS)] = token;
    }
    found.extend(done.iter().map(|done| done.token));
    tokens.extend((0..actors.len()).map(|id| (1 << 40) | id as u64));
    found.sort_unstable();
    assert_eq!(found, tokens, "each token is at one place");
    cpu_check("after all", *area, bytemuck::cast_slice(&model));
    drop((area, devices));
    driver.finish();
    drop(swap);
}

/// Catches a lock that two have at a time, CPUs and devices, or whose holder does not see what the one before has written.
#[test]
fn a_lock_between_cpus_and_devices() {
    let (driver, devices) = trio();
    let [one, _, other] = &devices;
    let area = Area::filled(2, 1);
    let mut model = area.pattern(1);
    let lock = narrow(area.addr);
    lock.store(0, Ordering::Relaxed);
    // On the lock's page and on another.
    let data = [area.addr + 640, area.page(1).addr + 640];
    for addr in data {
        wide(addr).store(0, Ordering::Relaxed);
    }
    let deadline = Instant::now() + TURMOIL / 2;
    let by_cpu = |id: u32| {
        let mut times = 0_u64;
        while Instant::now() < deadline || times < 20 {
            let taken = lock.compare_exchange(0, id, Ordering::Acquire, Ordering::Relaxed);
            if taken.is_err() {
                std::thread::yield_now();
                continue;
            }
            let [first, second] = data.map(|addr| {
                // SAFETY: in the area, and who has the lock has it alone.
                unsafe { (addr as *const u64).read_volatile() }
            });
            assert_eq!(first, second);
            for addr in data {
                // SAFETY: as above.
                unsafe { (addr as *mut u64).write_volatile(first + 1) };
            }
            times += 1;
            assert_eq!(lock.swap(0, Ordering::Release), id);
            std::thread::yield_now();
        }
        times
    };
    let by_device = |device: &Device, id: u32| {
        let mut times = 0_u64;
        while Instant::now() < deadline || times < 20 {
            let policy = [Policy::Map, Policy::Migrate][times as usize % 2];
            if insist(|| device.compare_exchange(lock, 0, id, policy)) != 0 {
                std::thread::yield_now();
                continue;
            }
            let number = policy.to_string();
            let raw = if number == "map" { MAP } else { MIGRATE };
            let read_word = |addr: usize| {
                let mut bytes = [0; 8];
                while read(device, addr, &mut bytes, raw).result == Err(Errno::BUSY) {}
                u64::from_ne_bytes(bytes)
            };
            let [first, second] = data.map(read_word);
            assert_eq!(first, second);
            for addr in data {
                let bytes = (first + 1).to_ne_bytes();
                while write(device, addr, &bytes, raw).result == Err(Errno::BUSY) {}
            }
            times += 1;
            assert_eq!(insist(|| device.swap(lock, 0, policy)), id);
        }
        times
    };
    let times: Vec<u64> = std::thread::scope(|scope| {
        let (by_cpu, by_device) = (&by_cpu, &by_device);
        let threads = [
            scope.spawn(move || by_cpu(1)),
            scope.spawn(move || by_cpu(2)),
            scope.spawn(move || by_device(one, 3)),
            scope.spawn(move || by_device(other, 4)),
        ];
        threads.map(|thread| thread.join().unwrap()).into()
    });
    println!("{times:?}");
    model[0] &= !0xffff_ffff;
    model[80] = times.iter().sum();
    model[512 + 80] = model[80];
    cpu_check("after all", *area, bytemuck::cast_slice(&model));
    drop((area, devices));
    driver.finish();
}

/// Catches an operation on a page that was freed meanwhile, and is somebody else's by then: pages are thrown away, replaced and made
/// inaccessible while devices have them to themselves, and others take what was freed.
#[test]
fn pages_that_go_while_a_device_has_them_are_changed_no_more() {
    const PAGES: usize = 16;

    let (driver, devices) = trio();
    let area = Area::new(PAGES);
    area.advise(libc::MADV_NOHUGEPAGE).unwrap();
    let (stop, begun) = (AtomicBool::new(false), AtomicU64::new(0));
    let running = || !stop.load(Ordering::Relaxed);
    let done: Vec<u64> = std::thread::scope(|scope| {
        let (running, begun, area) = (&running, &begun, &area);
        let adders: Vec<_> = devices
            .iter()
            .enumerate()
            .map(|(seed, device)| {
                scope.spawn(move || {
                    let (mut random, mut done) = (Random::new(seed as u64), 0);
                    while running() {
                        let addr = area.page(random.below(PAGES)).addr + 40;
                        begun.fetch_add(1, Ordering::SeqCst);
                        match device.fetch_add(wide(addr), 1, Policy::Map) {
                            Ok(old) => {
                                let most = begun.load(Ordering::SeqCst);
                                assert!(old < most, "{old:#x} is nobody's sum");
                            }
                            Err(error) => {
                                let errno = error.errno().unwrap();
                                let known = [Errno::ACCESS, Errno::FAULT, Errno::BUSY];
                                assert!(known.contains(&errno), "{error}");
                                continue;
                            }
                        }
                        done += 1;
                    }
                    done
                })
            })
            .collect();
        scope.spawn(move || {
            let mut random = Random::new(9);
            while running() {
                let first = random.below(PAGES);
                let part = area.part(first, 1 + random.below(PAGES - first));
                match random.below(3) {
                    0 => part.advise(libc::MADV_DONTNEED).unwrap(),
                    1 => part.map_over(RW, ANONYMOUS, -1),
                    _ => {
                        part.map_over(libc::PROT_NONE, ANONYMOUS, -1);
                        part.map_over(RW, ANONYMOUS, -1);
                    }
                }
                std::thread::sleep(Duration::from_micros(500));
            }
        });
        scope.spawn(move || {
            // Who gets what was freed: nobody else may write to it.
            let mut seed = 100;
            while running() {
                let taken = Area::filled(48, seed);
                std::thread::yield_now();
                taken.check(seed);
                seed += 1;
            }
        });
        let stop = Stop(&stop);
        std::thread::sleep(TURMOIL);
        drop(stop);
        let done = adders.into_iter().map(|adder| adder.join().unwrap());
        done.collect()
    });
    println!("{done:?}");
    let least = rounds(20) as u64;
    assert!(done.iter().all(|&done| done > least), "{done:?}");
    // What is left on each page is one word.
    for page in 0..PAGES {
        let page = area.page(page);
        wide(page.addr + 40).store(0, Ordering::Relaxed);
        page.check_zero();
    }
    drop((area, devices));
    driver.finish();
}

/// Catches a copy-on-write that pages of the device alone are left out of: a forked child has the values of its birth, and neither side
/// has what the other adds, by CPU or by device.
#[test]
fn after_a_fork_each_side_counts_for_itself() {
    on_each_kind(|device| {
        let area = Area::filled(12, 1);
        let mut model = area.pattern(1);
        let add_all = |device: &Device, pages: std::ops::Range<usize>, value: u64| {
            for page in pages {
                let word = wide(area.page(page).addr + 24);
                device.fetch_add(word, value, Policy::Map).unwrap();
            }
        };
        let count = |model: &mut [u64], pages: std::ops::Range<usize>, value: u64| {
            for page in pages {
                model[page * 512 + 3] = model[page * 512 + 3].wrapping_add(value);
            }
        };
        add_all(device, 0..12, 1);
        count(&mut model, 0..12, 1);
        assert!(snapshot(device, *area).iter().all(|it| it.is_exclusive()));
        let path = device.path();
        let mut child = Child::fork(|parent| {
            let mut model = model.clone();
            cpu_check(
                "the child's",
                area.part(0, 6),
                bytemuck::cast_slice(&model[..6 * 512]),
            );
            let own = Device::open_path(path).unwrap();
            add_all(&own, 0..9, 1000);
            count(&mut model, 0..9, 1000);
            for page in 3..12 {
                wide(area.page(page).addr + 24).fetch_add(50_000, Ordering::Relaxed);
            }
            count(&mut model, 3..12, 50_000);
            parent.send(0);
            parent.receive();
            add_all(&own, 6..12, 1);
            count(&mut model, 6..12, 1);
            cpu_check("the child's", *area, bytemuck::cast_slice(&model));
        });
        child.receive();
        assert!(!snapshot(device, *area).iter().any(|it| it.is_exclusive()));
        add_all(device, 0..12, 7);
        count(&mut model, 0..12, 7);
        cpu_check(
            "the parent's",
            area.part(0, 6),
            bytemuck::cast_slice(&model[..6 * 512]),
        );
        child.send(0);
        child.finish();
        add_all(device, 4..12, 7);
        count(&mut model, 4..12, 7);
        cpu_check("the parent's", *area, bytemuck::cast_slice(&model));
    });
}

/// Catches an unbind under way that an operation gets any other answer from than that it was done, or that the device is gone; and one
/// that was done and is lost, or is not and counts.
#[test]
fn unbind_under_operations_loses_none() {
    let mut driver = Driver::load("soft=0");
    let area = Area::filled(8, 1);
    let mut model = area.pattern(1);
    for _ in 0..rounds(6) {
        let device = driver.bind(GPUS[1]);
        let twin = Device::open_path(device.path()).unwrap();
        to_device(&device, area.part(0, 4));
        let done: Vec<Vec<u64>> = std::thread::scope(|scope| {
            let area = &area;
            let adders: Vec<_> = [(&device, 1), (&twin, 2), (&device, 3)]
                .into_iter()
                .map(|(device, seed)| {
                    scope.spawn(move || {
                        let (mut random, mut done) = (Random::new(seed), vec![0; area.pages]);
                        loop {
                            let page = random.below(area.pages);
                            let policy = [Policy::Map, Policy::Migrate][random.below(2)];
                            let word = wide(area.page(page).addr + 8 * 60);
                            match device.fetch_add(word, 1, policy) {
                                Ok(_) => done[page] += 1,
                                Err(error) => {
                                    assert_eq!(error.errno(), Some(Errno::NODEV), "{error}");
                                    return done;
                                }
                            }
                        }
                    })
                })
                .collect();
            std::thread::sleep(Duration::from_millis(150));
            driver.unbind(GPUS[1]);
            let done = adders.into_iter().map(|adder| adder.join().unwrap());
            done.collect()
        });
        for page in 0..area.pages {
            let sum: u64 = done.iter().map(|done| done[page]).sum();
            let word = &mut model[page * 512 + 60];
            *word = word.wrapping_add(sum);
        }
        cpu_check("after unbind", *area, bytemuck::cast_slice(&model));
    }
    drop(area);
    driver.finish();
}

/// Catches what is left of a process that is killed while its device has pages to itself, or takes them.
#[test]
fn a_killed_process_leaves_nothing() {
    on_each_kind(|device| {
        let path = device.path();
        for _ in 0..rounds(5) {
            let mut child = Child::fork(|parent| {
                let own = Device::open_path(path).unwrap();
                let area = Area::filled(32, 1);
                let add = |seed: u64| {
                    let mut random = Random::new(seed);
                    loop {
                        let policy = [Policy::Map, Policy::Migrate][random.below(2)];
                        let word = wide(area.page(random.below(32)).addr);
                        insist(|| own.fetch_add(word, 1, policy));
                    }
                };
                std::thread::scope(|scope| {
                    scope.spawn(|| add(1));
                    scope.spawn(|| add(2));
                    parent.send(0);
                    add(3)
                })
            });
            child.receive();
            std::thread::sleep(Duration::from_millis(60));
            child.kill();
        }
        assert_empty(device);
    });
}

/// Catches counters that leave out what operations cost: device faults, entries, and the bytes of no access.
#[test]
fn operations_are_counted_as_faults_and_entries() {
    on_each_kind(|device| {
        let area = Area::filled(10, 1);
        let before = counters(device);
        for page in 0..10 {
            let word = wide(area.page(page).addr);
            for _ in 0..3 {
                device.fetch_add(word, 1, Policy::Map).unwrap();
            }
        }
        let work = counters(device);
        assert!(work.device_faults - before.device_faults >= 10);
        assert!(work.mapped_pages - before.mapped_pages >= 10);
        assert_eq!(work.device_read_bytes, before.device_read_bytes);
        assert_eq!(work.device_written_bytes, before.device_written_bytes);
        assert_eq!(work.to_device_pages, before.to_device_pages);
        let first = wide(area.addr).load(Ordering::Relaxed);
        assert_eq!(first, area.pattern(1)[0].wrapping_add(3));
    });
}
