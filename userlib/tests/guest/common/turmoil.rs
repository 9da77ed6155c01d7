//! Everything at once, to the same 2 MiB.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use hmm_gpu::{Device, Errno, Target};

use super::child::Child;
use super::huge::{self, MADV_COLLAPSE};
use super::memory::{last_errno, Area, Span, HUGE, PAGE};
use super::mirror::{read, MAP};
use super::patience;
use super::random::Random;

const OWNERS: usize = 3;
const TIME: Duration = Duration::from_secs(5);
const TOO_LONG: Duration = Duration::from_secs(90);
const ENOUGH: usize = 20;
const RW: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;
const ANONYMOUS: libc::c_int = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;

/// Owners of 2 MiB each make them anew, discard, unmap, protect, remap, fork and check them, while a thread for each device moves the
/// same addresses both ways, and one touches them. What these others do first, each of them, is `prepare`.
pub fn turmoil<T>(devices: &[Device; 2], prepare: impl Fn() -> T + Sync) {
    let area = Area::new(OWNERS * HUGE);
    let rooms: Vec<Area> = (0..OWNERS).map(|_| Area::new(HUGE + 7)).collect();
    let counts = [const { AtomicUsize::new(0) }; 3];
    let [steps, moves, touches] = &counts;
    let begin = Instant::now();
    // For a while, and then for as long as it takes for each to have happened: the machine may be slow.
    let goes_on = || {
        let few = counts
            .iter()
            .any(|count| count.load(Ordering::Relaxed) <= ENOUGH);
        let took = begin.elapsed();
        took < TIME || (took < patience(TOO_LONG) && few)
    };
    let (span, goes_on, prepare) = (*area, &goes_on, &prepare);
    std::thread::scope(|scope| {
        for (i, device) in devices.iter().enumerate() {
            scope.spawn(move || {
                let _prepared = prepare();
                let mut random = Random::new(i as u64);
                while goes_on() {
                    let first = random.below(OWNERS) * HUGE;
                    // Mostly whole ones.
                    let part = match random.below(4) {
                        0 => span.part(first + random.below(HUGE / 2), HUGE / 2),
                        _ => span.part(first, HUGE),
                    };
                    let target = [Target::Device, Target::Device, Target::System][random.below(3)];
                    match device.prefetch_range(part.addr, part.bytes(), target) {
                        Ok(_) => moves.fetch_add(1, Ordering::Relaxed),
                        // Nothing is there just now.
                        Err(error) if error.errno() == Some(Errno::FAULT) => 0,
                        Err(error) => panic!("{error}"),
                    };
                    std::thread::sleep(Duration::from_micros(random.below(5000) as u64));
                }
            });
        }
        scope.spawn(move || {
            let _prepared = prepare();
            let mut random = Random::new(7);
            while goes_on() {
                let page = span.page(random.below(OWNERS * HUGE));
                touches.fetch_add(usize::from(touch(page)), Ordering::Relaxed);
                std::thread::sleep(Duration::from_micros(random.below(2000) as u64));
            }
        });
        for (i, room) in rooms.iter().enumerate() {
            let (device, mine) = (&devices[i % 2], span.part(i * HUGE, HUGE));
            scope.spawn(move || {
                let mut random = Random::new(10 + i as u64);
                let mut seed = 100_000 * (i as u64 + 1);
                mine.fill(seed);
                while goes_on() {
                    seed = own(device, mine, room, &mut random, seed);
                    steps.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
    let counts = counts.map(AtomicUsize::into_inner);
    println!("{counts:?} steps, moves, touches");
    assert!(counts.iter().all(|&count| count > ENOUGH), "{counts:?}");
}

/// Reads a word of a page, as a debugger would: it may not be there.
fn touch(page: Span) -> bool {
    let mut word = 0_u64;
    let piece = |addr: *mut libc::c_void| libc::iovec {
        iov_base: addr,
        iov_len: 8,
    };
    let (to, from) = (
        piece((&raw mut word).cast()),
        piece(page.addr as *mut libc::c_void),
    );
    let pid = std::process::id() as libc::pid_t;
    // SAFETY: the word is ours, and as long.
    let bytes = unsafe { libc::process_vm_readv(pid, &to, 1, &from, 1, 0) };
    assert!(bytes == 8 || last_errno() == Errno::FAULT);
    bytes == 8
}

/// An owner of 2 MiB that hold the pattern of a seed does something to them. Returns the seed of what they hold then.
#[track_caller]
fn own(device: &Device, span: Span, room: &Area, random: &mut Random, seed: u64) -> u64 {
    let first = random.below(HUGE);
    let part = span.part(first, 1 + random.below(HUGE - first));
    match random.below(11) {
        // New memory, huge again.
        0 | 1 => {
            span.map_over(RW, ANONYMOUS, -1);
            span.advise(libc::MADV_HUGEPAGE).unwrap();
            span.page(first).check_zero();
        }
        2 => {
            part.advise(libc::MADV_DONTNEED).unwrap();
            part.check_zero();
        }
        3 => {
            span.advise(libc::MADV_DONTNEED).unwrap();
            part.check_zero();
        }
        4 => {
            part.unmap();
            part.map_over(RW, ANONYMOUS, -1);
            part.check_zero();
        }
        5 => part.advise(libc::MADV_FREE).unwrap(),
        6 => {
            part.protect(libc::PROT_READ);
            part.check(seed);
            part.protect(RW);
            span.check(seed);
            return seed;
        }
        7 => {
            // Away, aligned or not, and back.
            let away = huge::remap(span, room.addr + random.below(2) * 7 * PAGE, 0);
            away.check(seed);
            huge::remap(away, span.addr, 0).check(seed);
            return seed;
        }
        8 => {
            span.advise(libc::MADV_HUGEPAGE).unwrap();
            // Not of what is in VRAM.
            let _ = span.advise(MADV_COLLAPSE);
            span.check(seed);
            return seed;
        }
        9 => {
            Child::fork(|_| {
                part.check(seed);
                part.fill(seed + 50_000);
                part.check(seed + 50_000);
            })
            .finish();
            span.check(seed);
            return seed;
        }
        _ => {
            let mut words = vec![0_u64; part.bytes() / 8];
            let bytes = bytemuck::cast_slice_mut(&mut words);
            match read(device, part.addr, bytes, MAP).result {
                Ok(()) => part.check_words("the device", &words, seed),
                Err(errno) => assert_eq!(errno, Errno::BUSY),
            }
            span.check(seed);
            return seed;
        }
    }
    span.fill(seed + 1);
    span.check(seed + 1);
    seed + 1
}
