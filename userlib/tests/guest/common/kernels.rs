//! Contexts on the driver, with lavapipe as the Vulkan device, and what runs in them.

use hmm_gpu::{Device, DispatchStats, Strategy, SvmBuilder, SvmContext};

use super::memory::Area;

const MIB: usize = 1 << 20;

/// Lavapipe's settings. The root is read-only: what it compiles is kept elsewhere, for the other tests and, by `bench/test`, for the next
/// guest. And it is not optimized: on an emulated processor that takes longer than all that runs here.
pub fn settings() -> [(&'static str, String); 3] {
    let out = std::env::var("OUT").unwrap_or_else(|_| "/tmp".into());
    [
        ("MESA_SHADER_CACHE_DIR", format!("{out}/shaders")),
        // So that those of two guests can be put together.
        ("MESA_DISK_CACHE_MULTI_FILE", "1".into()),
        ("GALLIVM_PERF", "nopt".into()),
    ]
}

/// Before Vulkan is there.
pub fn cache() {
    for (name, value) in settings() {
        std::env::set_var(name, value);
    }
}

/// A context on a device, with a pool of so many MiB.
pub fn translated(device: Device, mib: usize) -> SvmContext {
    builder(device, mib).build().unwrap()
}

/// What is to be a context on a device, with a pool of so many MiB.
pub fn builder(device: Device, mib: usize) -> SvmBuilder {
    cache();
    SvmContext::builder()
        .strategy(Strategy::Translated)
        .driver(device)
        .pool_bytes(mib * MIB)
}

/// A shader of these tests, `userlib/tests/guest/NAME.comp`. It was compiled and checked with the program: here that takes many seconds.
#[track_caller]
pub fn compiled(name: &str) -> Vec<u8> {
    let binary = format!("target/test/shaders/{name}.spv");
    std::fs::read(&binary).unwrap_or_else(|error| {
        panic!(
            "{binary}: {error}; `bench/test build-tests` makes it, and this is to run in the clone"
        )
    })
}

/// Two arrays with pages of their own.
pub struct Arrays {
    pub x: Area,
    pub y: Area,
}

impl Arrays {
    pub fn new(pages: usize) -> Self {
        let arrays = Self {
            x: Area::new(pages),
            y: Area::new(pages),
        };
        arrays
            .slice(&arrays.x)
            .iter_mut()
            .enumerate()
            .for_each(|(i, x)| *x = (i % 1000) as f32);
        arrays
            .slice(&arrays.y)
            .iter_mut()
            .enumerate()
            .for_each(|(i, y)| *y = (i % 777) as f32);
        arrays
    }

    #[allow(clippy::mut_from_ref)]
    pub fn slice(&self, area: &Area) -> &mut [f32] {
        // SAFETY: an area is this value's own, page aligned, and the tests have one such slice of each at a time.
        unsafe { std::slice::from_raw_parts_mut(area.addr as *mut f32, area.bytes() / 4) }
    }

    pub fn saxpy(&self, context: &SvmContext) -> DispatchStats {
        context
            .saxpy(3.0, self.slice(&self.x), self.slice(&self.y))
            .unwrap()
    }

    /// Asserts every element, after so many of them.
    #[track_caller]
    pub fn check(&self, times: usize) {
        for (i, y) in self.slice(&self.y).iter().enumerate() {
            assert_eq!(*y, (3 * times * (i % 1000) + i % 777) as f32, "element {i}");
        }
        for (i, x) in self.slice(&self.x).iter().enumerate() {
            assert_eq!(*x, (i % 1000) as f32, "element {i} of what is read only");
        }
    }
}
