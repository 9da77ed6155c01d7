//! Dispatches, abused: a shader that does not end, and what its own process does to it meanwhile. Whoever does that gets an error or dies;
//! another process goes on, and has every byte right.
//!
//! Runs in the virtual GPU host: `bench/test guest_abuse`. Lavapipe is the Vulkan device. This process itself never uses that, since those
//! that it forks do.

use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::{scope, sleep};
use std::time::{Duration, Instant};

use hmm_gpu::{Args, Device, DispatchStats, Errno, Error, Kernel, Place, SvmContext, SvmError};

use crate::common::child::{Child, Link};
use crate::common::driver::{device_of, Driver, GPUS};
use crate::common::kernels::{builder, compiled, translated, Arrays};
use crate::common::memory::{Area, Span};
use crate::common::{eventually, places, refused};

/// What the shader's words begin with, before and after it waits.
const EARLY: u32 = 1 << 28;
const LATE: u32 = 2 << 28;
/// Before it runs.
const OLD: u32 = 3 << 28;

/// Pages of one of its groups.
const GROUP: usize = 16;

/// A deadline that nobody waits for.
const LATEST: u32 = 10_000;
/// One that is waited for.
const SOON: u32 = 400;

/// What a process and its shader say to one another, and its parent reads.
struct Talk(Area);

impl Talk {
    fn new() -> Self {
        let talk = Self(Area::shared(1));
        talk.reset();
        talk
    }

    fn word(&self, number: usize) -> &AtomicU32 {
        &words(*self.0)[number]
    }

    fn reset(&self) {
        self.word(0).store(0, Ordering::SeqCst);
        self.word(1).store(0, Ordering::SeqCst);
    }

    /// Waits until the invocations of a group have begun.
    #[track_caller]
    fn begun(&self) {
        eventually("the shader has begun", || {
            self.word(0).load(Ordering::SeqCst) >= 4
        });
    }

    fn stop(&self) {
        self.word(1).store(1, Ordering::SeqCst);
    }

    fn has_stopped(&self) -> bool {
        self.word(1).load(Ordering::SeqCst) != 0
    }
}

/// Has the shader end when this does, also by a panic: who dispatches it would wait for ever.
struct Ends<'a>(&'a Talk);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.stop();
    }
}

/// A context in which a shader lasts for as long as it is to.
struct Lasting<'a> {
    context: SvmContext,
    kernel: Kernel,
    talk: &'a Talk,
}

impl<'a> Lasting<'a> {
    fn new(device: Device, deadline_ms: u32, spirv: &[u8], talk: &'a Talk) -> Self {
        let builder = builder(device, 4).deadline_ms(deadline_ms);
        let context = builder.build().unwrap();
        // SAFETY: `compiled` has it checked.
        let kernel = unsafe { context.kernel_from_spirv("lasting", spirv) }.unwrap();
        Self {
            context,
            kernel,
            talk,
        }
    }

    fn dispatch(&self, span: Span) -> Result<DispatchStats, Error> {
        let args = Args::new()
            .pointer(span.addr as *const u32)
            .pointer(self.talk.0.addr as *const u32)
            .value(EARLY)
            .value(LATE);
        let groups = (span.pages / GROUP) as u32;
        // SAFETY: the kernel writes to these pages, which are a test's own, and to `talk`, by atomic operations.
        unsafe { self.context.dispatch(&self.kernel, args, groups) }
    }

    /// Dispatches the shader on pages, does something when it has begun, and has it end after that.
    fn during<T>(&self, span: Span, work: impl FnOnce() -> T) -> (T, Result<DispatchStats, Error>) {
        self.talk.reset();
        scope(|scope| {
            let gpu = scope.spawn(|| self.dispatch(span));
            let ends = Ends(self.talk);
            self.talk.begun();
            let done = work();
            drop(ends);
            (done, gpu.join().unwrap())
        })
    }

    /// That it works, on pages of its own.
    #[track_caller]
    fn works(&self) {
        let area = old(GROUP);
        self.talk.stop();
        let stats = self.dispatch(*area).unwrap();
        assert!(places(self.context.driver().unwrap(), *area).all(Place::Device));
        assert_eq!(stats.pages_by_copy, 0, "{stats}");
        check(*area, LATE);
    }
}

/// Another process, with a context of its own.
struct Bystander(Child);

impl Bystander {
    fn new(unit: u32) -> Self {
        let mut bystander = Self(Child::fork(|parent| {
            let context = translated(Device::open(unit).unwrap(), 4);
            let arrays = Arrays::new(20);
            for times in 1.. {
                if parent.receive() == 0 {
                    return;
                }
                arrays.saxpy(&context);
                // In every other round what is in VRAM stays there.
                if times % 2 == 0 {
                    arrays.check(times);
                }
                parent.send(0);
            }
        }));
        bystander.goes_on();
        bystander
    }

    /// Has it use what it has in VRAM, twice, and look at every byte.
    #[track_caller]
    fn goes_on(&mut self) {
        for _ in 0..2 {
            self.0.send(1);
            self.0.receive();
        }
    }

    #[track_caller]
    fn finish(mut self) {
        self.goes_on();
        self.0.send(0);
        self.0.finish();
    }
}

/// Pages as they are before the shader runs.
fn old(pages: usize) -> Area {
    let area = Area::filled(pages, 1);
    fill(*area, OLD);
    area
}

fn words(span: Span) -> &'static [AtomicU32] {
    // SAFETY: the span is a test's own, is there while it looks at this, and is used by atomic operations only.
    unsafe { std::slice::from_raw_parts(span.addr as *const AtomicU32, span.bytes() / 4) }
}

fn fill(span: Span, value: u32) {
    for (n, word) in (0..).zip(words(span)) {
        word.store(value + n, Ordering::Relaxed);
    }
}

/// Asserts every word. `from` is the number of the first one.
#[track_caller]
fn check_from(span: Span, from: usize, values: &[u32]) {
    for (n, word) in (from as u32..).zip(words(span)) {
        let word = word.load(Ordering::Relaxed);
        let is_right = values.iter().any(|value| word == value + n);
        assert!(is_right, "word {n} is {word:#x}, and not of {values:x?}");
    }
}

#[track_caller]
fn check(span: Span, value: u32) {
    check_from(span, 0, &[value]);
}

/// Asserts that a dispatch was lost, and says so.
#[track_caller]
fn lost(result: Result<DispatchStats, Error>) {
    let error = result.unwrap_err();
    let is_lost = matches!(
        &error,
        Error::Svm(SvmError::Lost { kernel, deadline_ms: SOON }) if kernel == "lasting"
    );
    assert!(is_lost, "{error}");
}

/// What a process does to what its own shader uses: each as seen by whoever does it, with what is to be found there.
struct Event {
    name: &'static str,
    run: fn(Span, u32),
}

const EVENTS: [Event; 3] = [
    Event {
        name: "touch",
        run: |span, value| check_from(span.page(5), 5 * 1024, &[value]),
    },
    Event {
        name: "write",
        run: |span, value| {
            let word = &words(span.page(7))[3];
            let n = 7 * 1024 + 3;
            // What was there is looked at in the same moment.
            assert_eq!(word.swap(value + n, Ordering::SeqCst), value + n);
        },
    },
    Event {
        name: "fork",
        run: |span, value| Child::fork(|_| check(span, value)).finish(),
    },
];

/// Catches a shader that others take for ended, or never take for lost; a second process that waits for it, or whose bytes are wrong; and
/// a context that is of no use after that.
#[test]
fn who_reaches_into_a_dispatch_waits_and_others_do_not() {
    let driver = Driver::load("soft=1 soft_mib=64");
    let (spirv, talk) = (compiled("lasting"), Talk::new());
    let mut other = Bystander::new(0);
    let mut child = Child::fork(|parent| {
        let device = || Device::open(0).unwrap();
        let lasting = Lasting::new(device(), LATEST, &spirv, &talk);
        for event in &EVENTS {
            waits(&lasting, event, parent);
        }
        drop(lasting);
        let lasting = Lasting::new(device(), SOON, &spirv, &talk);
        nobody_waits(&lasting, parent);
        for event in &EVENTS {
            loses(&lasting, event, parent);
            lasting.works();
        }
        is_unmapped(&lasting, parent);
        lasting.works();
        parent.send(0);
    });
    while child.receive() != 0 {
        other.goes_on();
        child.send(0);
    }
    child.finish();
    other.finish();
    driver.finish();
}

/// Has the other process go on.
fn others_go_on(parent: &mut Link) {
    parent.send(1);
    parent.receive();
}

/// The shader ends when it is told to, and whoever needs that waits until then.
fn waits(lasting: &Lasting<'_>, event: &Event, parent: &mut Link) {
    let area = old(GROUP);
    let (took, result) = lasting.during(*area, || {
        let began = Instant::now();
        scope(|scope| {
            let _ends = Ends(lasting.talk);
            let who = scope.spawn(|| {
                (event.run)(*area, LATE);
                assert!(lasting.talk.has_stopped(), "{} has not waited", event.name);
            });
            others_go_on(parent);
            assert!(!who.is_finished());
            lasting.talk.stop();
            who.join().unwrap();
        });
        began.elapsed()
    });
    say(event.name, took, &result);
    result.unwrap();
    check(*area, LATE);
}

/// The shader does not end, and whoever needs that goes on when the deadline has passed.
fn loses(lasting: &Lasting<'_>, event: &Event, parent: &mut Link) {
    let area = old(GROUP);
    let (took, result) = lasting.during(*area, || {
        let began = Instant::now();
        scope(|scope| {
            let _ends = Ends(lasting.talk);
            let who = scope.spawn(|| {
                (event.run)(*area, EARLY);
                assert!(!lasting.talk.has_stopped(), "{} has waited", event.name);
            });
            others_go_on(parent);
            who.join().unwrap();
        });
        began.elapsed()
    });
    say(event.name, took, &result);
    lost(result);
    // Where a page had gone when the shader went on, that is lost.
    check_from(*area, 0, &[EARLY, LATE]);
}

/// The deadline passes, and nobody needs the shader to have ended.
fn nobody_waits(lasting: &Lasting<'_>, parent: &mut Link) {
    let area = old(GROUP);
    let (took, result) = lasting.during(*area, || {
        let began = Instant::now();
        others_go_on(parent);
        sleep(Duration::from_millis(2 * u64::from(SOON)).saturating_sub(began.elapsed()));
        began.elapsed()
    });
    say("nothing", took, &result);
    result.unwrap();
    check(*area, LATE);
}

/// The shader's pages are unmapped, and so are those that it has still to come to.
fn is_unmapped(lasting: &Lasting<'_>, parent: &mut Link) {
    let area = old(2 * GROUP);
    // Of the first group, there are the pages.
    lasting.talk.stop();
    lasting.dispatch(area.part(0, GROUP)).unwrap();
    let gone = area.part(GROUP - 4, 8);
    let (took, result) = lasting.during(*area, || {
        let began = Instant::now();
        gone.unmap();
        let took = began.elapsed();
        others_go_on(parent);
        took
    });
    say("munmap", took, &result);
    let Err(Error::Fault { fault, errno }) = result else {
        panic!("{result:?}");
    };
    assert_eq!(errno, Errno::FAULT);
    let of_the_second = area.addr + GROUP * 4096..gone.addr + gone.bytes();
    assert!(of_the_second.contains(&fault.addr), "{fault:?}");
    check(area.part(0, GROUP - 4), LATE);
    check_from(area.part(GROUP + 4, GROUP - 4), (GROUP + 4) * 1024, &[OLD]);
    // What comes there is new.
    let anonymous = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    gone.map_over(libc::PROT_READ | libc::PROT_WRITE, anonymous, -1);
    gone.check_zero();
    lasting.dispatch(*area).unwrap();
    check(*area, LATE);
}

fn say(what: &str, took: Duration, result: &Result<DispatchStats, Error>) {
    let ended = match result {
        Ok(_) => String::from("well"),
        Err(error) => error.to_string(),
    };
    crate::common::child::say(&format!("{what:<8} took {took:>12.3?}: {ended}"));
}

/// Catches a process that cannot be killed while its shader runs, or takes others with it, and VRAM that does not come back.
#[test]
fn who_dies_in_a_dispatch_dies_alone() {
    let driver = Driver::load("soft=1 soft_mib=64");
    let (spirv, talk) = (compiled("lasting"), Talk::new());
    let mut other = Bystander::new(0);
    let lasting = || Lasting::new(Device::open(0).unwrap(), LATEST, &spirv, &talk);

    let mut child = Child::fork(|parent| {
        let (lasting, area) = (lasting(), old(GROUP));
        let (_, result) = lasting.during(*area, || {
            parent.send(0);
            // It is killed in here.
            check(*area, LATE);
        });
        panic!("{result:?}");
    });
    child.receive();
    other.goes_on();
    child.still_runs();
    let began = Instant::now();
    child.kill();
    let took = began.elapsed();
    println!("killed: {took:?}");
    assert!(took < Duration::from_secs(8), "it has waited: {took:?}");
    other.goes_on();

    let mut child = Child::fork(|parent| {
        let (lasting, area) = (lasting(), old(GROUP));
        let (_, result) = lasting.during(*area, || {
            pool().unmap();
            parent.send(0);
            parent.receive();
        });
        panic!("{result:?}");
    });
    child.receive();
    other.goes_on();
    child.still_runs();
    child.send(0);
    child.finish_killed(libc::SIGSEGV);
    // There is room for others, and pages.
    Bystander::new(0).finish();
    other.finish();
    driver.finish();
}

/// Where the pool of this process's context is mapped.
fn pool() -> Span {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let mut mapped = maps.lines().filter(|line| line.ends_with("/dev/hmm_gpu0"));
    let (line, none) = (mapped.next().unwrap(), mapped.next());
    assert_eq!(none, None, "{line}");
    let (begin, end) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
    let [begin, end] = [begin, end].map(|hex| usize::from_str_radix(hex, 16).unwrap());
    Span::new(begin, (end - begin) / 4096)
}

/// Catches an unbind that takes the pool from a shader which has time left, or never does, and a process that has no way to go on with the
/// device when it is there again.
#[test]
fn an_unbind_waits_for_a_dispatch_until_its_deadline() {
    let mut driver = Driver::load("soft=1 soft_mib=64");
    drop(driver.bind(GPUS[2]));
    let (spirv, talk) = (compiled("lasting"), Talk::new());
    let mut other = Bystander::new(0);
    let lasting = |deadline| Lasting::new(device_of(GPUS[2]), deadline, &spirv, &talk);

    let mut ends = Child::fork(|parent| {
        let (old_one, area) = (lasting(LATEST), old(GROUP));
        let (_, result) = old_one.during(*area, || parent.step());
        result.unwrap();
        check(*area, LATE);
        parent.step();
        assert_eq!(refused(old_one.dispatch(*area)), Errno::NODEV);
        parent.step();
        // The device is there again, but it is another one.
        assert_eq!(refused(old_one.dispatch(*area)), Errno::NODEV);
        lasting(LATEST).works();
    });
    ends.receive();
    scope(|scope| {
        scope.spawn(|| {
            sleep(Duration::from_millis(200));
            other.goes_on();
            assert!(!talk.has_stopped());
            ends.send(0);
        });
        driver.unbind(GPUS[2]);
        assert!(talk.has_stopped(), "the unbind has not waited");
    });
    ends.receive();
    ends.step();
    other.goes_on();

    drop(driver.bind(GPUS[2]));
    let mut goes_on = Child::fork(|parent| {
        let (lasting, area) = (lasting(SOON), old(GROUP));
        let (_, result) = lasting.during(*area, || parent.step());
        panic!("{result:?}");
    });
    goes_on.receive();
    let began = Instant::now();
    driver.unbind(GPUS[2]);
    println!("unbind: {:?}", began.elapsed());
    assert!(!talk.has_stopped());
    other.goes_on();
    // Not before it touches what it had.
    goes_on.still_runs();
    goes_on.send(0);
    goes_on.finish_killed(libc::SIGBUS);

    drop(driver.bind(GPUS[2]));
    ends.send(0);
    ends.finish();
    other.finish();
    driver.finish();
}
