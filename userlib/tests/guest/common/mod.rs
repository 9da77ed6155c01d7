//! What the tests in the virtual GPU host have in common. They run there only, see `bench/test`: they load the module, bind
//! devices, and read what the kernel itself says.
//!
//! A test loads the module with a [`driver::Driver`], which proves at its end that nothing is left of it.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

pub mod bar;
pub mod child;
pub mod driver;
pub mod huge;
pub mod inject;
pub mod kernel;
pub mod kernels;
pub mod memory;
pub mod mirror;
pub mod misuse;
pub mod node;
pub mod random;
pub mod shader;
pub mod swap;
pub mod turmoil;
pub mod uring;
pub mod userfault;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use hmm_gpu::{Device, Errno, Moved, Place, Target};

use memory::{Span, PAGE};

/// Moves all of a span to the device's VRAM, and proves that all of it went.
#[track_caller]
pub fn to_device(device: &Device, span: Span) -> Moved {
    let moved = move_all(device, span, Target::Device);
    assert_place(device, span, Place::Device);
    moved
}

/// Moves all of a span to system memory, and proves that none is left in VRAM.
#[track_caller]
pub fn to_system(device: &Device, span: Span) -> Moved {
    let moved = move_all(device, span, Target::System);
    let counts = places(device, span).counts();
    assert_eq!(
        (counts.device, counts.other_device),
        (0, 0),
        "left in VRAM: {counts}"
    );
    moved
}

/// Moves all of a span. The kernel itself may have a page in its hands for a moment (it compacts, or makes huge pages): what a first
/// call skips, the next ones must move.
#[track_caller]
fn move_all(device: &Device, span: Span, target: Target) -> Moved {
    let ask = || {
        device
            .prefetch_range(span.addr, span.bytes(), target)
            .unwrap()
    };
    let mut all = ask();
    for _ in 0..5 {
        if all.skipped == 0 {
            break;
        }
        println!("{all}: once more");
        std::thread::sleep(Duration::from_millis(20));
        let more = ask();
        all.moved += more.moved;
        all.skipped = more.skipped;
    }
    assert!(
        all.is_complete() && all.total() == span.bytes() as u64,
        "to {target}: {all}"
    );
    all
}

/// Where the pages of a span are, as the driver says.
#[track_caller]
pub fn places(device: &Device, span: Span) -> hmm_gpu::Residency {
    device.residency_range(span.addr, span.bytes()).unwrap()
}

/// Asserts where all pages of a span are, as the driver says and, independently, as the kernel says.
#[track_caller]
pub fn assert_place(device: &Device, span: Span, place: Place) {
    let residency = places(device, span);
    let wrong = residency
        .pages()
        .iter()
        .position(|page| page.place() != place);
    assert_eq!(wrong, None, "pages are not all in {place}: {residency}");
    assert_witness(&residency);
}

/// Asserts that the kernel's `/proc/self/pagemap` says the same of every page.
#[track_caller]
pub fn assert_witness(residency: &hmm_gpu::Residency) {
    let pages = residency.pages();
    let witness = kernel::pagemap(std::process::id(), residency.addr(), pages.len());
    for (i, (page, entry)) in pages.iter().zip(witness).enumerate() {
        let agrees = match page.place() {
            Place::None => entry == kernel::Entry::None,
            Place::System => matches!(entry, kernel::Entry::Present { .. }),
            Place::Device | Place::OtherDevice => {
                matches!(entry, kernel::Entry::DevicePrivate { .. })
            }
        };
        let addr = residency.addr() + i * PAGE;
        assert!(
            agrees,
            "page {i} at {addr:#x}: the driver says {page:?}, the kernel {entry:?}"
        );
    }
}

/// The error of a call that must fail.
#[track_caller]
pub fn refused<T: std::fmt::Debug>(result: Result<T, hmm_gpu::Error>) -> Errno {
    result.unwrap_err().errno().unwrap()
}

/// Counts as bytes, given in pages.
pub fn moved(moved: usize, already: usize, skipped: usize, unmapped: usize) -> Moved {
    let bytes = |pages: usize| (pages * PAGE) as u64;
    Moved {
        moved: bytes(moved),
        already: bytes(already),
        skipped: bytes(skipped),
        unmapped: bytes(unmapped),
    }
}

/// Whether this runs on the kernel that checks itself and the driver: all takes several times longer there.
pub fn is_checking() -> bool {
    std::env::var_os("HMM_GPU_DEBUG").is_some_and(|value| !value.is_empty())
}

/// How often a test does something: a quarter as often on the kernel that checks, which sees at once what this one shows only if it
/// goes wrong.
pub fn rounds(full: usize) -> usize {
    if is_checking() {
        full.div_ceil(4)
    } else {
        full
    }
}

/// How long a test is to go on that can go on for ever: `HMM_GPU_STRESS_SECONDS`, if it says so.
pub fn asked_seconds() -> Option<Duration> {
    let text = std::env::var("HMM_GPU_STRESS_SECONDS").unwrap_or_default();
    let seconds = || text.parse().expect("HMM_GPU_STRESS_SECONDS is a number");
    (!text.is_empty()).then(|| Duration::from_secs(seconds()))
}

/// How long something may take that takes no time on a machine that is idle.
pub fn patience(full: Duration) -> Duration {
    if is_checking() {
        full * 6
    } else {
        full
    }
}

/// Waits until `holds`, which must be soon.
#[track_caller]
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + patience(Duration::from_secs(20));
    while !holds() {
        assert!(Instant::now() < deadline, "it never came to this: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Says that it is time to stop when it is dropped: also if a test panics, since its other threads would go on for ever.
pub struct Stop<'a>(pub &'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
