//! No system memory to move to: pages stay where they are, who asked is told, and nothing is lost.
//!
//! Runs in the virtual GPU host, whose memory is made to look like that of two nodes (`numa=fake=2`): one is used up, and a thread is
//! bound to it. All else has the other one. By `bench/test guest_memory`.

use std::time::{Duration, Instant};

use crate::common::driver::{Driver, GPUS};
use crate::common::kernel::Log;
use crate::common::memory::{Area, PAGE};
use crate::common::node::{self, Bound};
use crate::common::{assert_place, to_device, to_system};
use hmm_gpu::{Errno, Place, Target};

const PAGES: usize = (160 << 20) / PAGE;

/// A node with little free memory.
struct Shortage;

impl Shortage {
    /// Leaves as many MiB free, or fewer. The kernel keeps about 34 of them for itself.
    fn leave(mib: usize) -> Self {
        let shortage = Self;
        // Huge pages, which nothing else can have: as many as there are.
        let all = node::reserve(100_000);
        let free = node::free_mib();
        assert!(free < (PAGES * PAGE) >> 20, "{free} MiB are still free");
        node::reserve(all - mib.saturating_sub(free) / 2);
        shortage
    }
}

impl Drop for Shortage {
    fn drop(&mut self) {
        node::reserve(0);
    }
}

/// Catches a page that is lost, or a machine that starts to kill processes, when a move has no memory to move to.
#[test]
fn without_system_memory_pages_stay_in_vram_and_the_call_says_so() {
    let (driver, device) = Driver::load_with("", GPUS[0]);
    let area = Area::filled(PAGES, 33);
    to_device(&device, *area);
    let shortage = Shortage::leave(90);
    let bound = Bound::to_node();
    let result = device.prefetch_range(area.addr, area.bytes(), Target::System);
    drop(bound);
    let error = result.unwrap_err();
    assert_eq!(error.errno(), Some(Errno::NOMEM), "{error}");
    let moved = error.moved().unwrap();
    assert_eq!(moved.total(), moved.moved, "{moved}");
    let back = moved.moved as usize / PAGE;
    assert!(back > 1000, "there was room for some: {moved}");
    assert_place(&device, area.part(0, back), Place::System);
    assert_place(&device, area.part(back, PAGES - back), Place::Device);
    let counters = device.counters().unwrap();
    assert_eq!(counters.live_pages, (PAGES - back) as u64);
    assert_eq!(counters.system_failures, 1);
    area.part(0, back).check(33);
    drop(shortage);
    to_system(&device, *area);
    area.check(33);
    drop((area, device));
    driver.finish();
}

/// Catches an unbind that gives pages up, or waits in silence, when there is no memory to bring them to: it goes on trying, says so,
/// and ends as soon as there is.
#[test]
fn an_unbind_without_system_memory_waits_aloud_and_loses_nothing() {
    let (mut driver, device) = Driver::load_with("", GPUS[0]);
    let area = Area::filled(PAGES, 34);
    to_device(&device, *area);
    let shortage = Shortage::leave(0);
    let mut log = Log::from_now();
    let start = Instant::now();
    let helper = std::thread::spawn(move || {
        let told = |line: &String| line.contains("hmm_gpu0") && line.contains("still in VRAM");
        let mut found = None;
        while found.is_none() && start.elapsed() < Duration::from_secs(40) {
            std::thread::sleep(Duration::from_millis(100));
            found = log.lines().into_iter().find(told);
        }
        println!("after {:?}: {found:?}", start.elapsed());
        drop(shortage);
        found.is_some()
    });
    let bound = Bound::to_node();
    driver.unbind(GPUS[0]);
    drop(bound);
    assert!(helper.join().unwrap(), "the kernel's log said nothing");
    assert!(start.elapsed() > Duration::from_secs(5), "it had to wait");
    area.check(34);
    drop((area, device));
    driver.finish();
}
