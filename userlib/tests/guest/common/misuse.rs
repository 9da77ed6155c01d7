//! Who is none of the driver's business, and what no call takes.

use std::ffi::c_void;

use hmm_gpu::{Device, Errno, Place};

use super::memory::{Area, PAGE};
use super::{assert_place, to_device};

const PAGE_BYTES: u64 = PAGE as u64;

/// Where user space ends: the last page below the hole in the addresses, which 5-level page tables make smaller, is not part of it.
pub fn user_end() -> u64 {
    let processors = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    let bits = if processors.contains(" la57") { 56 } else { 47 };
    (1 << bits) - PAGE_BYTES
}

/// Memory half of which is in VRAM, which no refused call may change.
pub struct Bystander {
    pub area: Area,
}

impl Bystander {
    pub fn new(device: &Device) -> Self {
        let area = Area::filled(40, 9);
        to_device(device, area.part(0, 20));
        Self { area }
    }

    #[track_caller]
    pub fn is_unchanged(&self, device: &Device) {
        assert_place(device, self.area.part(0, 20), Place::Device);
        assert_place(device, self.area.part(20, 20), Place::System);
    }

    #[track_caller]
    pub fn finish(self, device: &Device) {
        self.is_unchanged(device);
        self.area.check(9);
    }
}

/// Ranges that no call takes: what is wrong, address, length, and the error.
pub fn bad_ranges(good: &Area) -> Vec<(&'static str, u64, u64, Errno)> {
    let (addr, len, page) = (good.addr as u64, good.bytes() as u64, PAGE_BYTES);
    let (end, kernel) = (user_end(), 0xff00_0000_0000_0000);
    let last_page = 0u64.wrapping_sub(page);
    let invalid = [
        ("nothing at null", 0, 0),
        ("nothing", addr, 0),
        ("nothing in the kernel", kernel, 0),
        ("an unaligned address", addr + 1, page),
        ("a word into a page", addr + 8, len),
        ("half a page", addr, page / 2),
        ("a page and a byte", addr, page + 1),
        ("unaligned all", addr + 5, 17),
        ("a length that wraps", addr, last_page),
        ("a kernel address that wraps", kernel, 1 << 63),
        ("all of 64 bits but a byte", 0, u64::MAX),
    ];
    let fault = [
        ("all of 64 bits but a page", 0, last_page),
        ("2^63 bytes", addr, 1 << 63),
        ("2^63 bytes from null", 0, 1 << 63),
        ("2^62 bytes", addr, 1 << 62),
        ("a kernel address", kernel, page),
        ("the kernel's text", 0xffff_ffff_8100_0000, page),
        ("the vsyscall page", 0xffff_ffff_ff60_0000, page),
        ("no canonical address", end + page, page),
        ("another", 0x0800_0000_0000_0000, len),
        ("one in the middle", 1 << 63, page),
        ("the last page below the hole", end, page),
        ("a range out of user space", addr, end + page - addr),
        ("a range into the kernel", addr, kernel - addr),
    ];
    let with = |errno| move |(what, addr, len)| (what, addr, len, errno);
    let invalid = invalid.into_iter().map(with(Errno::INVAL));
    invalid
        .chain(fault.into_iter().map(with(Errno::FAULT)))
        .collect()
}

/// A call's number for another size of its structure.
pub fn sized(number: u32, bytes: usize) -> u32 {
    (number & !(0x3fff << 16)) | ((bytes as u32) << 16)
}

/// Any call with any pointer.
pub fn call(device: &Device, number: u32, argument: usize) -> Result<(), Errno> {
    // SAFETY: the tests point at pages of their own, or at what cannot be written.
    unsafe { device.file().call(number, argument as *mut c_void) }
}
