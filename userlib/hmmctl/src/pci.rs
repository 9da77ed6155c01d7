//! PCI devices, as sysfs shows them.

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::host::Host;

/// The driver's name.
pub const DRIVER: &str = "hmm_gpu";

/// What VRAM is aligned to and a multiple of, in bytes.
pub const BLOCK: u64 = 2 << 20;

/// The address of a PCI device, as sysfs writes it: `0000:01:00.0`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bdf(String);

impl Bdf {
    /// A file of the device in sysfs.
    pub fn file(&self, name: &str) -> String {
        format!("/sys/bus/pci/devices/{self}/{name}")
    }
}

impl fmt::Display for Bdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl FromStr for Bdf {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts: Vec<&str> = text.split([':', '.']).collect();
        let (domain, rest) = match parts.len() {
            3 => ("0", &parts[..]),
            4 => (parts[0], &parts[1..]),
            _ => return Err("want bus:device.function, such as 0000:01:00.0".to_owned()),
        };
        let number = |text: &str, limit: u32| {
            u32::from_str_radix(text, 16)
                .ok()
                .filter(|n| *n < limit && !text.starts_with('+'))
                .ok_or_else(|| format!("{text:?} is not a number below {limit:#x}"))
        };
        let domain = number(domain, u32::MAX)?;
        let (bus, device) = (number(rest[0], 256)?, number(rest[1], 32)?);
        let function = number(rest[2], 8)?;
        if text.rsplit_once('.').is_none_or(|(_, end)| end != rest[2]) {
            return Err("want a dot before the function".to_owned());
        }
        Ok(Self(format!(
            "{domain:04x}:{bus:02x}:{device:02x}.{function:x}"
        )))
    }
}

/// A memory BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bar {
    pub number: usize,
    pub start: u64,
    pub bytes: u64,
}

impl Bar {
    /// The largest prefetchable one that has addresses: what the driver takes for VRAM. From the file `resource`.
    pub fn largest_prefetchable(resource: &str) -> Option<Self> {
        const MEMORY: u64 = 0x200;
        const PREFETCH: u64 = 0x2000;
        const UNSET: u64 = 0x2000_0000;
        let bar = |(number, line): (usize, &str)| {
            let mut words = line
                .split_whitespace()
                .map(|word| u64::from_str_radix(word.trim_start_matches("0x"), 16).ok());
            let (start, last, flags) = (words.next()??, words.next()??, words.next()??);
            let wanted = flags & (MEMORY | PREFETCH | UNSET) == MEMORY | PREFETCH;
            (wanted && start != 0 && last > start).then_some(Self {
                number,
                start,
                bytes: last - start + 1,
            })
        };
        let bars = resource.lines().take(6).enumerate().filter_map(bar);
        // The first of those that are as large.
        bars.reduce(|best, bar| if bar.bytes > best.bytes { bar } else { best })
    }

    /// Bytes of it that can be VRAM.
    pub fn usable(&self) -> u64 {
        self.bytes / BLOCK * BLOCK
    }
}

/// A PCI device.
pub struct PciDevice {
    pub bdf: Bdf,
    pub class: u32,
    pub vendor: String,
    pub device: String,
    pub driver: Option<String>,
    pub bar: Option<Bar>,
}

impl PciDevice {
    /// One, if it is there.
    pub fn read(host: &Host, bdf: &Bdf) -> Option<Self> {
        let id = |name| {
            let text = host.text(&bdf.file(name))?;
            Some(text.trim_start_matches("0x").to_owned())
        };
        Some(Self {
            class: u32::from_str_radix(&id("class")?, 16).ok()?,
            vendor: id("vendor")?,
            device: id("device")?,
            driver: host.link(&bdf.file("driver")),
            bar: Bar::largest_prefetchable(&host.text(&bdf.file("resource"))?),
            bdf: bdf.clone(),
        })
    }

    /// All of them.
    pub fn all(host: &Host) -> Vec<Self> {
        let names = host.names("/sys/bus/pci/devices");
        let devices = names
            .iter()
            .filter_map(|name| Self::read(host, &name.parse().ok()?));
        devices.collect()
    }

    /// Whether it is one whose memory may be meant for this: a display controller, an accelerator, or plain memory.
    pub fn is_candidate(&self) -> bool {
        matches!(self.class >> 16, 0x03 | 0x12) || self.class >> 8 == 0x0500
    }

    /// What it is, by its class.
    pub fn kind(&self) -> &'static str {
        match self.class >> 8 {
            0x0300 => "VGA controller",
            0x0302 => "3D controller",
            0x0301 | 0x0303..=0x03ff => "display controller",
            0x1200..=0x12ff => "accelerator",
            0x0500 => "memory",
            _ => "no GPU",
        }
    }

    /// Who uses it through the driver that has it, in words.
    pub fn users(&self, host: &Host) -> Vec<String> {
        let nodes = self.nodes(host);
        let mut users = vec![];
        if !nodes.is_empty() {
            let own = std::process::id();
            for pid in host.processes().into_iter().filter(|pid| *pid != own) {
                if host.holds(pid, &nodes) {
                    users.push(format!("process {pid} ({})", host.comm(pid)));
                }
            }
        }
        for card in host.names(&self.bdf.file("drm")) {
            for connector in host.names(&self.bdf.file(&format!("drm/{card}"))) {
                let enabled = format!("drm/{card}/{connector}/enabled");
                if host.text(&self.bdf.file(&enabled)).as_deref() == Some("enabled") {
                    users.push(format!("the screen on {connector}"));
                }
            }
        }
        users
    }

    /// The nodes in `/dev` that its driver has made for it.
    fn nodes(&self, host: &Host) -> Vec<PathBuf> {
        let mut nodes = BTreeSet::new();
        find_nodes(&host.path(&self.bdf.file("")), 4, &mut nodes);
        if self.driver.as_deref() == Some("vfio-pci") {
            if let Some(group) = host.link(&self.bdf.file("iommu_group")) {
                nodes.insert(PathBuf::from("/dev/vfio").join(group));
            }
        }
        nodes.into_iter().collect()
    }
}

/// Looks for `DEVNAME` in what lies below a folder of sysfs. Links are not followed.
fn find_nodes(folder: &Path, depth: u32, nodes: &mut BTreeSet<PathBuf>) {
    let uevent = std::fs::read_to_string(folder.join("uevent")).unwrap_or_default();
    if let Some(name) = uevent
        .lines()
        .find_map(|line| line.strip_prefix("DEVNAME="))
    {
        nodes.insert(Path::new("/dev").join(name));
    }
    if depth == 0 {
        return;
    }
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            find_nodes(&entry.path(), depth - 1, nodes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_written_as_sysfs_does() {
        let bdf = |text: &str| text.parse().map(|bdf: Bdf| bdf.to_string());
        assert_eq!(bdf("01:00.0").as_deref(), Ok("0000:01:00.0"));
        assert_eq!(bdf("10000:A1:1f.7").as_deref(), Ok("10000:a1:1f.7"));
        for wrong in [
            "",
            "1",
            "0000:01:00",
            "0000:01:20.0",
            "0000:01:00.8",
            "x:1.0",
            "../1:0.0",
            "1.0:0",
            "+1:0.0",
        ] {
            assert!(bdf(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_largest_prefetchable_bar_is_the_vram() {
        let resource = "0x00000000d0000000 0x00000000dfffffff 0x0000000000042208\n\
            0x0000000000000000 0x0000000000000000 0x0000000000000000\n\
            0x000000fea0000000 0x000000feffffffff 0x0000000000140204\n\
            0x000000c000000000 0x000000c03fffffff 0x000000000014220c\n";
        assert_eq!(
            Bar::largest_prefetchable(resource),
            Some(Bar {
                number: 3,
                start: 0xc0_0000_0000,
                bytes: 1 << 30
            })
        );
        // What firmware gave no room to has no addresses.
        let unset = "0x0000000000000000 0x000000000fffffff 0x0000000020042208\n";
        assert_eq!(Bar::largest_prefetchable(unset), None);
        assert_eq!(Bar::largest_prefetchable(""), None);
    }
}
