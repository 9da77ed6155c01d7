//! Somewhere to swap to: compressed memory (zram).

use std::ffi::CString;
use std::fs;
use std::path::Path;
use std::process::Command;

use super::eventually;
use super::memory::{errno, Span};

const DEVICE: &str = "/dev/zram0";
const CONTROL: &str = "/sys/block/zram0";

/// Swap space, for as long as it lives.
pub struct Swap;

impl Swap {
    #[track_caller]
    pub fn on() -> Self {
        if !Path::new(CONTROL).exists() {
            run("modprobe", &["zram"]);
        }
        eventually("there is a zram device", || Path::new(DEVICE).exists());
        fs::write(format!("{CONTROL}/disksize"), "512M").unwrap();
        run("mkswap", &["--quiet", DEVICE]);
        let path = CString::new(DEVICE).unwrap();
        // SAFETY: a C string.
        errno(unsafe { libc::swapon(path.as_ptr(), 0) }).unwrap();
        Self
    }
}

impl Drop for Swap {
    fn drop(&mut self) {
        let path = CString::new(DEVICE).unwrap();
        // SAFETY: a C string.
        let off = errno(unsafe { libc::swapoff(path.as_ptr()) });
        if !std::thread::panicking() {
            off.unwrap();
            fs::write(format!("{CONTROL}/reset"), "1").unwrap();
        }
    }
}

#[track_caller]
fn run(program: &str, arguments: &[&str]) {
    let status = Command::new(program).args(arguments).status().unwrap();
    assert!(status.success(), "{program} {arguments:?}: {status}");
}

/// Has the kernel take pages away (`MADV_PAGEOUT`), until `gone`.
#[track_caller]
pub fn reclaim(span: Span, mut gone: impl FnMut() -> bool) {
    eventually("the pages are reclaimed", || {
        span.advise(libc::MADV_PAGEOUT).unwrap();
        gone()
    });
}
