//! What a device is.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::uapi::{self, hmm_gpu_query};
use crate::Bytes;

/// What a device is, and how much of its VRAM is free at this moment. Shown as one line.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Description {
    /// The device node.
    pub path: PathBuf,
    /// The N of `/dev/hmm_gpuN`.
    pub unit: u32,
    /// Version of the driver's interface.
    pub version: u32,
    /// What the driver can do with it.
    pub capabilities: Capabilities,
    /// Where its VRAM comes from.
    pub source: Source,
    /// How its pages are registered with the kernel.
    pub form: Form,
    /// Its place on the PCI bus, if it is there.
    pub pci: Option<PciAddress>,
    /// VRAM that pages can be in, in bytes.
    pub vram_bytes: u64,
    /// Of it, bytes that no page of any process is in now.
    pub vram_free_bytes: u64,
    /// Bytes that are taken from and given back to the VRAM at a time.
    pub block_bytes: u32,
}

impl Description {
    pub(crate) fn from_uapi(path: &Path, answer: &hmm_gpu_query) -> Self {
        let source = Source::from_uapi(answer.source);
        let address = PciAddress::from_uapi(answer.pci_domain, answer.pci_bdf);
        Self {
            path: path.to_owned(),
            unit: answer.unit,
            version: answer.version,
            capabilities: Capabilities(answer.capabilities),
            source,
            form: Form::from_uapi(answer.form),
            pci: (source == Source::Pci).then_some(address),
            vram_bytes: answer.vram_bytes,
            vram_free_bytes: answer.vram_free_bytes,
            block_bytes: answer.block_bytes,
        }
    }
}

impl fmt::Display for Description {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (vram, free) = (Bytes(self.vram_bytes), Bytes(self.vram_free_bytes));
        write!(
            f,
            "{}: {vram} of VRAM ({free} free), {}",
            self.path.display(),
            self.source
        )?;
        if let Some(pci) = self.pci {
            write!(f, " {pci}")?;
        }
        write!(
            f,
            ", form {}, interface {}: {}",
            self.form, self.version, self.capabilities
        )
    }
}

/// Where the VRAM comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Source {
    /// System memory that stands in for a GPU's.
    Soft,
    /// A memory BAR of a PCI device.
    Pci,
    /// A dma-buf that this process has given: [`Device::import_dma_buf`](crate::Device::import_dma_buf).
    DmaBuf,
    /// One that a newer driver knows.
    Other(u32),
}

impl Source {
    fn from_uapi(value: u32) -> Self {
        match value {
            uapi::HMM_GPU_SOURCE_SOFT => Source::Soft,
            uapi::HMM_GPU_SOURCE_PCI => Source::Pci,
            uapi::HMM_GPU_SOURCE_DMA_BUF => Source::DmaBuf,
            other => Source::Other(other),
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Soft => f.pad("system memory standing in"),
            Source::Pci => f.pad("PCI"),
            Source::DmaBuf => f.pad("a dma-buf"),
            Source::Other(value) => write!(f, "source {value}"),
        }
    }
}

/// How the device's pages are registered with the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Form {
    /// At free physical addresses that the kernel picked (`devm_request_free_mem_region`).
    Add,
    /// At the BAR's own physical addresses.
    AddResource,
    /// One that a newer driver knows.
    Other(u32),
}

impl Form {
    fn from_uapi(value: u32) -> Self {
        match value {
            uapi::HMM_GPU_FORM_ADD => Form::Add,
            uapi::HMM_GPU_FORM_ADD_RESOURCE => Form::AddResource,
            other => Form::Other(other),
        }
    }
}

impl fmt::Display for Form {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Form::Add => f.pad("add"),
            Form::AddResource => f.pad("add_resource"),
            Form::Other(value) => write!(f, "{value}"),
        }
    }
}

/// A place on the PCI bus, shown as the system's tools do: `0000:00:10.0`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PciAddress {
    /// Domain, also called segment.
    pub domain: u32,
    /// Bus, 0 to 255.
    pub bus: u8,
    /// Device, 0 to 31.
    pub device: u8,
    /// Function, 0 to 7.
    pub function: u8,
}

impl PciAddress {
    fn from_uapi(domain: u32, bdf: u32) -> Self {
        let [_, _, bus, devfn] = bdf.to_be_bytes();
        Self {
            domain,
            bus,
            device: devfn >> 3,
            function: devfn & 7,
        }
    }
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:04x}:{:02x}:{:02x}.{:x}",
            self.domain, self.bus, self.device, self.function
        )
    }
}

/// What the driver can do with a device, as a set. Shown as a list of names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Capabilities(u64);

impl Capabilities {
    /// It moves pages: [`Device::prefetch`](crate::Device::prefetch).
    pub const MIGRATE: Self = Self(uapi::HMM_GPU_CAP_MIGRATE);
    /// It tells where pages are: [`Device::residency`](crate::Device::residency).
    pub const RESIDENCY: Self = Self(uapi::HMM_GPU_CAP_RESIDENCY);
    /// It counts: [`Device::counters`](crate::Device::counters).
    pub const COUNTERS: Self = Self(uapi::HMM_GPU_CAP_COUNTERS);
    /// Pages come back by themselves when the CPU touches them.
    pub const FAULT_BACK: Self = Self(uapi::HMM_GPU_CAP_FAULT_BACK);

    /// The device has a page table of its own and faults: [`Device::mirror`](crate::Device::mirror),
    /// [`read`](crate::Device::read), [`write`](crate::Device::write), [`copy`](crate::Device::copy),
    /// [`fault`](crate::Device::fault) and [`snapshot`](crate::Device::snapshot).
    pub const MIRROR: Self = Self(uapi::HMM_GPU_CAP_MIRROR);

    /// It does atomic operations: [`Device::fetch_add`](crate::Device::fetch_add),
    /// [`fetch_and`](crate::Device::fetch_and), [`fetch_or`](crate::Device::fetch_or), [`swap`](crate::Device::swap) and
    /// [`compare_exchange`](crate::Device::compare_exchange).
    pub const ATOMIC: Self = Self(uapi::HMM_GPU_CAP_ATOMIC);

    /// It takes advice: [`Device::advise`](crate::Device::advise).
    pub const ADVICE: Self = Self(uapi::HMM_GPU_CAP_ADVICE);

    /// It moves pages while the program goes on: [`Device::prefetch_async`](crate::Device::prefetch_async).
    pub const PREFETCH: Self = Self(uapi::HMM_GPU_CAP_PREFETCH);

    /// The CPU reaches its VRAM where it is: pages do not come back when the CPU touches them.
    pub const COHERENT: Self = Self(uapi::HMM_GPU_CAP_COHERENT);

    /// It has private pools: [`Device::create_pool`](crate::Device::create_pool) and
    /// [`begin_execution`](crate::Device::begin_execution).
    pub const POOL: Self = Self(uapi::HMM_GPU_CAP_POOL);

    /// It makes devices of dma-bufs: [`Device::import_dma_buf`](crate::Device::import_dma_buf).
    pub const IMPORT: Self = Self(uapi::HMM_GPU_CAP_IMPORT);

    const NAMES: [(Self, &'static str); 11] = [
        (Self::MIGRATE, "migrate"),
        (Self::RESIDENCY, "residency"),
        (Self::COUNTERS, "counters"),
        (Self::FAULT_BACK, "fault-back"),
        (Self::MIRROR, "mirror"),
        (Self::ATOMIC, "atomic"),
        (Self::ADVICE, "advice"),
        (Self::POOL, "pool"),
        (Self::IMPORT, "import"),
        (Self::PREFETCH, "prefetch"),
        (Self::COHERENT, "coherent"),
    ];

    /// Whether all of `others` are in this set.
    pub fn contains(self, others: Self) -> bool {
        self.0 & others.0 == others.0
    }

    /// The interface's `HMM_GPU_CAP_*` bits.
    pub fn bits(self) -> u64 {
        self.0
    }
}

impl fmt::Display for Capabilities {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let known = Self::NAMES
            .into_iter()
            .filter(|&(one, _)| self.contains(one));
        let unknown = self.0 & !Self::NAMES.iter().fold(0, |bits, (one, _)| bits | one.0);
        let mut names: Vec<String> = known.map(|(_, name)| name.to_owned()).collect();
        if unknown != 0 {
            names.push(format!("{unknown:#x}"));
        }
        f.pad(&if names.is_empty() {
            "nothing".to_owned()
        } else {
            names.join(", ")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pci_device_is_described_with_its_address() {
        let answer = hmm_gpu_query {
            version: 3,
            capabilities: 0x3f,
            unit: 2,
            source: uapi::HMM_GPU_SOURCE_PCI,
            form: uapi::HMM_GPU_FORM_ADD_RESOURCE,
            pci_bdf: 0x10 << 3,
            vram_bytes: 1 << 30,
            vram_free_bytes: 512 << 20,
            block_bytes: 2 << 20,
            ..Default::default()
        };
        let description = Description::from_uapi(Path::new("/dev/hmm_gpu2"), &answer);
        assert_eq!(
            description.to_string(),
            "/dev/hmm_gpu2: 1 GiB of VRAM (512 MiB free), PCI 0000:00:10.0, form add_resource, interface 3: \
             migrate, residency, counters, fault-back, mirror, atomic"
        );
        assert!(description.capabilities.contains(Capabilities::FAULT_BACK));
    }

    #[test]
    fn a_soft_device_has_no_pci_address() {
        let answer = hmm_gpu_query {
            source: uapi::HMM_GPU_SOURCE_SOFT,
            form: 1,
            ..Default::default()
        };
        let description = Description::from_uapi(Path::new("/dev/hmm_gpu0"), &answer);
        assert_eq!(
            (description.pci, description.source, description.form),
            (None, Source::Soft, Form::Add)
        );
    }

    #[test]
    fn a_pci_address_is_split_and_shown_as_tools_do() {
        let address = PciAddress::from_uapi(0x1_0000, 0xfe_ff);
        assert_eq!(
            address,
            PciAddress {
                domain: 0x1_0000,
                bus: 0xfe,
                device: 31,
                function: 7
            }
        );
        assert_eq!(address.to_string(), "10000:fe:1f.7");
        assert_eq!(PciAddress::from_uapi(0, 0x0380).to_string(), "0000:03:10.0");
    }

    #[test]
    fn what_a_newer_driver_says_is_kept() {
        assert_eq!(Source::from_uapi(9).to_string(), "source 9");
        assert_eq!(Form::from_uapi(9), Form::Other(9));
        assert_eq!(
            Capabilities(1 | (1 << 40)).to_string(),
            "migrate, 0x10000000000"
        );
        assert_eq!(Capabilities(0).to_string(), "nothing");
        let coherent = Capabilities::ATOMIC.bits() | Capabilities::COHERENT.bits();
        assert_eq!(Capabilities(coherent).to_string(), "atomic, coherent");
    }
}
