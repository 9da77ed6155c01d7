//! What is available here, and why something is not.

use std::fmt;

use super::Strategy;
use crate::sys::vulkan::{facts, Facts, Vendor};
use crate::{Capabilities, Device};

/// What strategies there are on a Vulkan device.
#[derive(Clone, Debug)]
pub struct Diagnosis {
    /// The name of the device.
    pub device: String,
    /// Its driver, and that driver's version.
    pub driver: String,
    /// Each strategy: available, or why not.
    pub strategies: Vec<(Strategy, Result<(), String>)>,
    /// Whether [`SvmBuilder::exported`](super::SvmBuilder::exported) is available, or why not.
    pub exported: Result<(), String>,
}

/// What there is on this system: [`doctor`]. Shown as a text of some lines.
#[derive(Clone, Debug)]
pub struct Doctor {
    /// Each Vulkan device, or why there are none.
    pub devices: Result<Vec<Diagnosis>, String>,
    /// Each device of the driver hmm_gpu, in words: what it is, or why it cannot be used.
    pub drivers: Vec<(String, Result<(), String>)>,
}

/// Looks at all Vulkan devices and all devices of the driver, and says which strategies are available, and why others are not.
/// It opens the driver's devices for a moment, and makes nothing on any.
pub fn doctor() -> Doctor {
    let drivers: Vec<(String, Result<(), String>)> = Device::list().into_iter().map(look).collect();
    let pools = pools(&drivers);
    let imports = imports();
    let devices = facts().map_err(|error| error.to_string()).map(|all| {
        let diagnose = |facts: &Facts| Diagnosis {
            device: facts.name.clone(),
            driver: facts.driver.clone(),
            strategies: Strategy::ALL
                .into_iter()
                .map(|strategy| (strategy, available(facts, strategy, (false, false), &pools)))
                .collect(),
            exported: facts.exports.clone().and_then(|()| imports.clone()),
        };
        all.iter().map(diagnose).collect()
    });
    Doctor { devices, drivers }
}

/// What a device of the driver is, and whether it has pools.
fn look(unit: u32) -> (String, Result<(), String>) {
    let described = Device::open(unit).and_then(|device| device.describe());
    match described {
        Ok(description) => {
            let has = description.capabilities.contains(Capabilities::POOL);
            let lacks =
                || String::from("it has no pools: its driver is older, or its memory is coherent");
            (description.to_string(), has.then_some(()).ok_or_else(lacks))
        }
        Err(error) => (format!("/dev/hmm_gpu{unit}"), Err(error.to_string())),
    }
}

/// Whether any of them can be used for the strategy `translated`.
fn pools(drivers: &[(String, Result<(), String>)]) -> Result<(), String> {
    if drivers.iter().any(|(_, usable)| usable.is_ok()) {
        return Ok(());
    }
    Err(drivers
        .iter()
        .find_map(|(_, usable)| usable.clone().err())
        .unwrap_or_else(|| {
            String::from("there is no device of the driver hmm_gpu (is the module loaded?)")
        }))
}

/// Whether any device of the driver takes dma-bufs.
fn imports() -> Result<(), String> {
    let takes = |unit| {
        let described = Device::open(unit).and_then(|device| device.describe());
        described.is_ok_and(|it| it.capabilities.contains(Capabilities::IMPORT))
    };
    Device::list().into_iter().any(takes).then_some(()).ok_or_else(|| {
        String::from("no device of the driver hmm_gpu takes dma-bufs (the module parameter `import_mib` says how much, and is 0 if nothing is said)")
    })
}

/// Whether a strategy is available on a device, or why not. `shares` and `exported`: what [`SvmBuilder::shares_page_tables`](super::SvmBuilder::shares_page_tables)
/// says; `pools`: whether there is a backend for translation, or why not.
pub(crate) fn available(
    facts: &Facts,
    strategy: Strategy,
    (shares, exported): (bool, bool),
    pools: &Result<(), String>,
) -> Result<(), String> {
    let lacks = facts.lacks();
    if !lacks.is_empty() {
        return Err(format!("the device lacks {}", lacks.join(" and ")));
    }
    let import = || match facts.import {
        Some(4096) => Ok(()),
        Some(bytes) => Err(format!(
            "it imports multiples of {bytes} bytes only, and pages have 4096"
        )),
        None => Err(String::from(
            "it cannot import memory of a process (VK_EXT_external_memory_host)",
        )),
    };
    match strategy {
        Strategy::Copy => Ok(()),
        Strategy::Mapped if facts.mapped => Ok(()),
        Strategy::Mapped => Err(String::from("it has no memory that is both its own and the host's to write")),
        Strategy::Imported => import(),
        Strategy::Native if shares || facts.vendor == Vendor::Lavapipe => Ok(()),
        Strategy::Native => Err(String::from(
            "it is not known to share the processes' page tables (lavapipe does; say so, with `shares_page_tables`, of ATS and CXL hardware)",
        )),
        Strategy::Translated if exported => facts.exports.clone().and_then(|()| pools.clone()),
        Strategy::Translated => import().and_then(|()| pools.clone()),
    }
}

impl fmt::Display for Doctor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = |usable: &Result<(), String>| match usable {
            Ok(()) => String::from("available"),
            Err(why) => format!("not available: {why}"),
        };
        match &self.devices {
            Err(why) => writeln!(f, "No Vulkan device: {why}")?,
            Ok(devices) if devices.is_empty() => {
                writeln!(f, "No Vulkan device: the loader knows of none")?
            }
            Ok(devices) => {
                for device in devices {
                    writeln!(f, "{} ({})", device.device, device.driver)?;
                    for (strategy, usable) in &device.strategies {
                        writeln!(f, "  {strategy:<10} {}", verdict(usable))?;
                    }
                    writeln!(f, "  exported   {}", verdict(&device.exported))?;
                }
            }
        }
        if self.drivers.is_empty() {
            write!(f, "No device of the driver hmm_gpu")?;
        }
        for (at, (name, usable)) in self.drivers.iter().enumerate() {
            let line = if at == 0 { "" } else { "\n" };
            write!(f, "{line}{name}\n  pools      {}", verdict(usable))?;
        }
        Ok(())
    }
}
