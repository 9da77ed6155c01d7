//! What the kernel itself says and does: the witness that is not the driver.

use std::ffi::CString;
use std::fs;
use std::io::Read;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use hmm_gpu::Errno;

use super::memory::{last_errno, PAGE};

/// The module's file.
pub const MODULE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../driver/hmm_gpu.ko");

/// `/proc/iomem`: who has which physical addresses.
pub fn iomem() -> String {
    fs::read_to_string("/proc/iomem").unwrap()
}

/// A line of `/proc/iomem`, `c000000000-c03fffffff : 0000:00:12.0`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resource {
    pub start: u64,
    pub end: u64,
    pub name: String,
}

impl Resource {
    fn parse(line: &str) -> Self {
        let (range, name) = line.trim().split_once(" : ").unwrap();
        let (start, last) = range.split_once('-').unwrap();
        let number = |text| u64::from_str_radix(text, 16).unwrap();
        Self {
            start: number(start),
            end: number(last) + 1,
            name: name.to_owned(),
        }
    }

    /// The resources of a text of `/proc/iomem`.
    pub fn list(iomem: &str) -> Vec<Self> {
        iomem.lines().map(Self::parse).collect()
    }

    /// The BARs of a PCI device, by its address.
    pub fn of_device(address: &str) -> Vec<Self> {
        let mut list = Self::list(&iomem());
        list.retain(|resource| resource.name == address);
        list
    }

    pub fn bytes(&self) -> u64 {
        self.end - self.start
    }

    /// Whether the physical page `pfn` is in it.
    pub fn has_page(&self, pfn: u64) -> bool {
        (self.start..self.end).contains(&(pfn * PAGE as u64))
    }
}

/// The kernel's log from now on.
pub struct Log {
    records: fs::File,
}

impl Log {
    pub fn from_now() -> Self {
        use std::io::{Seek, SeekFrom};

        let mut options = fs::OpenOptions::new();
        options.read(true).custom_flags(libc::O_NONBLOCK);
        let mut records = options.open("/dev/kmsg").unwrap();
        records.seek(SeekFrom::End(0)).unwrap();
        Self { records }
    }

    /// The messages that came since the last call.
    pub fn lines(&mut self) -> Vec<String> {
        let mut lines = vec![];
        let mut record = [0; 8192];
        // One record a read; EPIPE says that some were lost, which no test makes so many of.
        while let Ok(bytes) = self.records.read(&mut record) {
            let text = String::from_utf8_lossy(&record[..bytes]);
            let message = text.split_once(';').unwrap().1;
            lines.push(message.lines().next().unwrap_or_default().to_owned());
        }
        lines
    }

    /// The messages, one of which must have all of `words`.
    #[track_caller]
    pub fn expect(&mut self, words: &[&str]) {
        let lines = self.lines();
        let found = lines
            .iter()
            .any(|line| words.iter().all(|word| line.contains(word)));
        assert!(
            found,
            "no line of the kernel's log has {words:?}; there are {lines:#?}"
        );
    }
}

/// `finit_module`.
pub fn insert_module(path: &Path, parameters: &str) -> Result<(), Errno> {
    use std::os::fd::AsRawFd;

    let machine = fs::read_to_string("/proc/cmdline").unwrap();
    assert!(
        machine.contains("init=/usr/sbin/hmm-gpu-init"),
        "this is not the virtual GPU host: these tests are for `bench/test`"
    );
    let file = fs::File::open(path)
        .unwrap_or_else(|error| panic!("{}: {error}; run `make driver`", path.display()));
    let parameters = CString::new(parameters).unwrap();
    // SAFETY: the parameters are a C string; what the module does is what is tested.
    let result = unsafe {
        libc::syscall(
            libc::SYS_finit_module,
            file.as_raw_fd(),
            parameters.as_ptr(),
            0,
        )
    };
    if result == -1 {
        return Err(last_errno());
    }
    Ok(())
}

/// `delete_module`: of the module `hmm_gpu`.
pub fn remove_module() -> Result<(), Errno> {
    // SAFETY: the name is a C string.
    let result = unsafe {
        libc::syscall(
            libc::SYS_delete_module,
            c"hmm_gpu".as_ptr(),
            libc::O_NONBLOCK,
        )
    };
    if result == -1 {
        return Err(last_errno());
    }
    Ok(())
}

/// Whether the module is there.
pub fn is_loaded() -> bool {
    let modules = fs::read_to_string("/proc/modules").unwrap();
    modules.lines().any(|line| line.starts_with("hmm_gpu "))
}

/// What a process's page table says of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    None,
    Present { pfn: u64 },
    DevicePrivate { pfn: u64, writable: bool },
    Migrating,
    Other { entry: u64 },
}

impl Entry {
    fn decode(entry: u64) -> Self {
        // Documentation/admin-guide/mm/pagemap.rst; the types of swap entries are those of include/linux/swap.h, on x86-64 with
        // memory failure handling or without.
        const PRESENT: u64 = 1 << 63;
        const SWAPPED: u64 = 1 << 62;
        const DEVICE_WRITE: u64 = 28;
        const DEVICE_READ: u64 = 29;
        let frame = entry & ((1 << 55) - 1);
        let (kind, pfn) = (frame & 0x1f, frame >> 5);
        match entry & (PRESENT | SWAPPED) {
            0 => Entry::None,
            PRESENT => Entry::Present { pfn: frame },
            SWAPPED if kind == DEVICE_WRITE || kind == DEVICE_READ => Entry::DevicePrivate {
                pfn,
                writable: kind == DEVICE_WRITE,
            },
            SWAPPED if (25..28).contains(&kind) => Entry::Migrating,
            _ => Entry::Other { entry },
        }
    }

    pub fn is_in_vram(self) -> bool {
        matches!(self, Entry::DevicePrivate { .. })
    }
}

/// `/proc/PID/pagemap` for some pages. Looking moves nothing.
pub fn pagemap(pid: u32, addr: usize, pages: usize) -> Vec<Entry> {
    let file = fs::File::open(format!("/proc/{pid}/pagemap")).unwrap();
    let mut bytes = vec![0; pages * 8];
    file.read_exact_at(&mut bytes, (addr / PAGE * 8) as u64)
        .unwrap();
    let entry = |bytes: &[u8]| Entry::decode(u64::from_ne_bytes(bytes.try_into().unwrap()));
    bytes.chunks_exact(8).map(entry).collect()
}

/// A field of `/proc/self/smaps`, in KiB, of the mapping that begins at `addr`.
#[track_caller]
pub fn smaps(addr: usize, field: &str) -> u64 {
    let text = fs::read_to_string("/proc/self/smaps").unwrap();
    let start = format!("{addr:x}-");
    let mut lines = text
        .lines()
        .skip_while(|line| !line.starts_with(&start))
        .skip(1);
    let line = lines.find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    let line = line.unwrap_or_else(|| panic!("{addr:#x} is not the start of a mapping"));
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// A page of system memory in use by the kernel: the first 2 MiB that are all System RAM, by their physical address.
pub fn some_system_ram(iomem: &str) -> u64 {
    const ALIGN: u64 = 2 << 20;
    let mut ram = Resource::list(iomem)
        .into_iter()
        .filter(|resource| resource.name == "System RAM");
    ram.find_map(|resource| {
        let start = resource.start.next_multiple_of(ALIGN);
        (start + ALIGN <= resource.end).then_some(start)
    })
    .unwrap()
}

/// Where the kernel's tracing is.
pub const TRACING: &str = "/sys/kernel/tracing";

/// Has it be there.
#[track_caller]
pub fn mount_tracing() {
    if !Path::new(TRACING).join("trace").exists() {
        let status = std::process::Command::new("mount")
            .args(["-t", "tracefs", "tracefs", TRACING])
            .status();
        assert!(status.unwrap().success());
    }
}

/// The number that follows `name=` in a line of a trace.
#[track_caller]
pub fn number(line: &str, name: &str) -> u64 {
    let mark = format!(" {name}=");
    let rest = line
        .split_once(&mark)
        .unwrap_or_else(|| panic!("{name} in {line}"))
        .1;
    let end = rest
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(rest.len());
    rest[..end].parse().unwrap()
}
