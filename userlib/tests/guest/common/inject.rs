//! Failures on demand: the n-th allocation, or the n-th copy from or to user space, of this thread. The kernel needs
//! `FAULT_INJECTION`, `FAILSLAB`, `FAIL_PAGE_ALLOC`, `FAULT_INJECTION_USERCOPY` and the filter by stack.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

const DEBUG: &str = "/sys/kernel/debug";

/// What fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// Allocations, of objects and of pages, also those that could wait for memory.
    Memory,
    /// Copies from and to user space.
    Copies,
}

/// Makes calls of this thread fail.
pub struct Injection {
    nth: File,
}

impl Injection {
    #[track_caller]
    pub fn of(what: What) -> Self {
        let set = |file: &str, text: &str| {
            let path = Path::new(DEBUG).join(file);
            fs::write(&path, text).unwrap_or_else(|error| {
                panic!(
                    "{}: {error}: this is for the kernel that checks",
                    path.display()
                )
            });
        };
        for (kind, fails) in [
            ("failslab", what == What::Memory),
            ("fail_page_alloc", what == What::Memory),
            ("fail_usercopy", what == What::Copies),
        ] {
            let set = |file: &str, text: &str| set(&format!("{kind}/{file}"), text);
            set("verbose", "0");
            set("probability", "0");
            // What does not fail does not count either: no stack has a function at address 1.
            set("stacktrace-depth", "4");
            set("require-start", if fails { "0" } else { "1" });
            let end = if fails { u64::MAX } else { 2 };
            set("require-end", &format!("{end:#x}"));
        }
        set("failslab/ignore-gfp-wait", "N");
        set("fail_page_alloc/ignore-gfp-wait", "N");
        set("fail_page_alloc/ignore-gfp-highmem", "N");
        set("fail_page_alloc/min-order", "0");
        let mut options = fs::OpenOptions::new();
        let nth = options
            .read(true)
            .write(true)
            .open("/proc/thread-self/fail-nth");
        Self { nth: nth.unwrap() }
    }

    /// Makes a call whose n-th allocation (or copy) fails. Returns its answer, and whether there were so many.
    #[track_caller]
    pub fn nth<R>(&self, n: u32, call: impl FnOnce() -> R) -> (R, bool) {
        self.nth.write_all_at(n.to_string().as_bytes(), 0).unwrap();
        let answer = call();
        // Reading copies once more: if that is what fails, there were not so many.
        let mut text = [b' '; 16];
        let failed = match self.nth.read_at(&mut text, 0) {
            Ok(_) => String::from_utf8_lossy(&text).trim().starts_with('0'),
            Err(_) => false,
        };
        // It may fail too, and is then as good.
        while self.nth.write_all_at(b"0", 0).is_err() {}
        (answer, failed)
    }

    /// Makes calls whose first, second, third… allocation fails, until there are not so many. Each has a `scene` of its own, and is
    /// looked at with its answer. Returns how many have failed.
    #[track_caller]
    pub fn each<S, R>(
        &self,
        what: &str,
        scene: impl Fn() -> S,
        call: impl Fn(&S) -> R,
        look: impl Fn(S, R),
    ) -> u32 {
        for n in 1..2000 {
            let scene = scene();
            let (answer, failed) = self.nth(n, || call(&scene));
            look(scene, answer);
            if !failed {
                println!("{what}: {} places to fail", n - 1);
                assert!(n > 1, "{what}: nothing that could fail");
                return n - 1;
            }
        }
        panic!("{what}: it never came to an end");
    }
}
