//! A thread with a private pool plays the shader, while all else goes on: also the end of the device.

use std::cell::Cell;
use std::time::{Duration, Instant};

use super::{pattern, Holds, Kind, Plot, Worker, ANONYMOUS, GPU_UNIT, RW};
use crate::common::memory::{Span, PAGE};
use crate::common::mirror::{try_fault, wants, MIGRATE, WRITE};
use crate::common::patience;
use crate::common::shader::Shader;
use hmm_gpu::{Device, Ended, Errno, Pool};

const BYTES: usize = 2 << 20;

thread_local! {
    /// What this thread has mapped that can go away, and whether it has.
    static MAPPED: Cell<(usize, usize)> = const { Cell::new((0, 0)) };
    static IS_GONE: Cell<bool> = const { Cell::new(false) };
}

/// Has a page of zeroes be where a pool was that a thread touches: so it goes on, and finds no entries.
extern "C" fn on_sigbus(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel hands over what it says.
    let info = unsafe { &*info };
    // SAFETY: of this signal it says the address.
    let addr = unsafe { info.si_addr() } as usize;
    let (start, bytes) = MAPPED.get();
    let page = (addr & !(PAGE - 1)) as *mut libc::c_void;
    let flags = ANONYMOUS | libc::MAP_FIXED;
    // SAFETY: the page is of the pool, of which nothing is there any more.
    let replace = || unsafe { libc::mmap(page, PAGE, RW, flags, -1, 0) } == page;
    if addr.wrapping_sub(start) < bytes && replace() {
        IS_GONE.set(true);
        return;
    }
    // The same touch ends the process now, as it has to.
    // SAFETY: always fine to call.
    unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
}

/// Has threads of this process survive that a pool goes away while they use it.
pub(super) fn survive_sigbus() {
    let handler: extern "C" fn(_, _, _) = on_sigbus;
    // SAFETY: zeroes are an empty set, and no flags.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as libc::sighandler_t;
    action.sa_flags = libc::SA_SIGINFO;
    // SAFETY: the handler touches what is its thread's own.
    let done = unsafe { libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut()) };
    assert_eq!(done, 0);
}

/// A device with a pool.
pub(super) struct Client {
    pool: Pool,
    device: Device,
}

impl Client {
    /// Nothing, if there is no device, or no room.
    fn new(which: usize) -> Option<Self> {
        let device = Device::open(which as u32).ok()?;
        match device.create_pool(BYTES) {
            Ok(pool) => Some(Self { pool, device }),
            Err(error) => {
                let error = error.errno().unwrap();
                let may = [Errno::NOSPC, Errno::NOMEM, Errno::BUSY, Errno::NODEV];
                assert!(may.contains(&error), "a pool on device {which}: {error}");
                None
            }
        }
    }

    /// From here on this thread survives that the pool goes.
    fn guard(&self) {
        MAPPED.set((self.pool.as_ptr() as usize, self.pool.bytes()));
        IS_GONE.set(false);
    }

    /// Asserts that nothing can be had of a pool whose device is unbound.
    fn has_gone(self) {
        self.guard();
        let begin = Instant::now();
        while !IS_GONE.get() {
            self.pool.load(self.pool.offset());
            assert!(
                begin.elapsed() < patience(Duration::from_secs(20)),
                "a pool is there after its device"
            );
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn errno(error: hmm_gpu::Error) -> Errno {
    error.errno().unwrap()
}

impl Worker<'_> {
    /// Plays the shader on some pages, in an execution.
    pub(super) fn execute(&mut self, plot: &mut Plot) -> Option<Span> {
        let which = self.random.below(2);
        let client = self.clients[which].take().or_else(|| Client::new(which))?;
        let span = plot.run(&mut self.random, |page| {
            page.is_writable() && page.kind == Kind::Private
        });
        let answer = span.map(|span| {
            let span = span.part(0, span.pages.min(48));
            (span, self.execute_by(&client, plot, span))
        });
        if let Some((_, Err(error))) = answer {
            let may = [Errno::NOMEM, Errno::NOSPC, Errno::BUSY];
            let gone = which == GPU_UNIT && error == Errno::NODEV;
            assert!(gone || may.contains(&error), "device {which}: {error}");
            if gone {
                client.has_gone();
                return None;
            }
        }
        // Others want one, too.
        if !self.random.once_in(8) {
            self.clients[which] = Some(client);
        }
        let (span, answer) = answer?;
        answer.is_ok().then_some(span)
    }

    fn execute_by(&mut self, client: &Client, plot: &mut Plot, span: Span) -> Result<(), Errno> {
        let device = &client.device;
        let wanted = (0..span.pages).map(|i| wants(span.page(i).addr, WRITE));
        try_fault(device, &mut wanted.collect::<Vec<_>>(), MIGRATE).0?;
        let (seed, first) = (self.fresh(), self.random.below(1 << 20));
        let words = pattern(span.addr, first, span.pages).pattern(seed);
        let shader = Shader::of(&device.mirror().map_err(errno)?, &client.pool);
        let deadline = Duration::from_millis(self.random.of(&[2, 10, 50]));
        client.guard();
        let execution = device.begin_execution(deadline).map_err(errno)?;
        let mut written = vec![];
        for (i, words) in words.chunks(PAGE / 8).enumerate() {
            let page = span.page(i);
            let entry = shader.walk(page.addr).filter(|entry| entry.is_writable());
            let Some(place) = entry.and_then(|entry| entry.vram_offset()) else {
                continue;
            };
            let word = |word| client.pool.load(place + 8 * word as u64);
            let found: Option<Vec<u64>> = (0..PAGE / 8).map(word).collect();
            let found = found.expect("the page is said to be outside of the pool");
            // What it found was there then, if it could still rely on it afterwards.
            if matches!(execution.is_lost(), Ok(false)) && !IS_GONE.get() {
                plot.verify("the shader", page, &found);
            }
            shader.fill_places(&[place], words);
            written.push(i);
        }
        let ended = execution.end();
        let well = matches!(ended, Ok(Ended::Well));
        assert!(!well || !IS_GONE.get(), "its pool went in an execution");
        for i in written {
            if !well {
                // It may be there, or not, or half of it.
                pattern(span.page(i).addr, first + i, 1).fill(seed);
            }
            plot.of_mut(span)[i].holds = Holds::Pattern(seed, first + i);
        }
        ended.map(drop).map_err(errno)
    }
}
