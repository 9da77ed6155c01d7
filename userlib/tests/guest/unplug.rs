//! A GPU that is pulled out: what was in its VRAM is lost, and nobody takes anything else for it.
//!
//! Runs in the virtual GPU host: `bench/test guest_unplug`. One test, since the GPU does not come back.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;

use crate::common::child::Child;
use crate::common::driver::{self, is_bound, Driver, IN_SLOT};
use crate::common::kernel::Log;
use crate::common::memory::Area;
use crate::common::{assert_place, eventually, is_checking, refused, to_device, to_system};
use hmm_gpu::{Device, Errno, Place, Policy};

/// The port that the slot belongs to.
const PORT: &str = "/sys/bus/pci/devices/0000:00:14.0/config";

/// Has the GPU go, without a word to the kernel, which sees an empty slot: what pulling it out does.
fn pull_out() {
    const SLOT_CONTROL: u64 = 0x18;
    const POWER_INDICATOR_OFF: u16 = 0x0300;
    const POWER_OFF: u16 = 0x0400;
    /// What the port tells the kernel of.
    const INTERRUPTS: u16 = 0x103f;

    let config = OpenOptions::new()
        .read(true)
        .write(true)
        .open(PORT)
        .unwrap();
    let byte = |at: u64| {
        let mut byte = [0];
        config.read_exact_at(&mut byte, at).unwrap();
        byte[0]
    };
    let mut capability = u64::from(byte(0x34));
    while byte(capability) != 0x10 {
        capability = u64::from(byte(capability + 1));
        assert_ne!(capability, 0, "the port has no PCI Express capability");
    }
    let at = capability + SLOT_CONTROL;
    let before = u16::from_le_bytes([byte(at), byte(at + 1)]);
    let write = |value: u16| config.write_all_at(&value.to_le_bytes(), at).unwrap();
    // QEMU takes the device out as the power goes off. A slot that the kernel found without power it would take for one that it
    // has switched off itself.
    write(before & !INTERRUPTS | POWER_INDICATOR_OFF | POWER_OFF);
    write(before);
}

/// Catches what a bus answers for nobody, taken for the bytes of a process; an unbind that waits for ever for pages that cannot
/// be read; and a process that keeps running on memory that it has lost.
#[test]
fn what_is_lost_with_a_gpu_is_not_replaced_by_something_else() {
    let mut log = Log::from_now();
    let mut driver = Driver::load("soft=0");
    let device = driver.bind(IN_SLOT);
    let lost = Area::filled(40, 1);
    let brought_back = Area::filled(40, 2);
    let never_there = Area::filled(40, 3);
    to_device(&device, *lost);
    to_device(&device, *brought_back);
    to_system(&device, *brought_back);
    let mut found = vec![0; never_there.bytes()];
    device
        .read_at(never_there.addr, &mut found, Policy::Map)
        .unwrap();
    // A child that has nothing to do with the device but pages of it.
    let toucher = |page: usize| {
        let lost = *lost;
        Child::fork(move |test| {
            test.receive();
            lost.page(page).touch();
        })
    };
    let mut children: Vec<Child> = (0..3).map(toucher).collect();

    pull_out();
    if is_checking() {
        // No pciehp there (see debug.config), so it is done by hand.
        driver::write(&format!("/sys/bus/pci/devices/{IN_SLOT}/remove"), "1").unwrap();
    }
    eventually("the driver sees that the device is gone", || {
        let said = "the device is gone, and with it 40 pages";
        log.lines().iter().any(|line| line.contains(said))
    });
    eventually("the device is unbound", || !is_bound(IN_SLOT));
    driver.lost_for_good(IN_SLOT);
    assert_eq!(refused(device.counters()), Errno::NODEV);

    for child in &mut children {
        child.send(0);
    }
    for child in children {
        child.finish_killed(libc::SIGBUS);
    }
    brought_back.check(2);
    never_there.check(3);
    // Memory that is unmapped and mapped anew is as good as any.
    lost.map_over(
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        -1,
    );
    lost.fill(4);
    lost.check(4);
    drop((device, lost, brought_back, never_there));

    // And the driver serves others.
    let device: Device = driver.bind(crate::common::driver::GPUS[0]);
    let area = Area::filled(100, 5);
    to_device(&device, *area);
    assert_place(&device, *area, Place::Device);
    area.check(5);
    drop((device, area));
    driver.finish();
}
