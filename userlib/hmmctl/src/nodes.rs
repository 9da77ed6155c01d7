//! Devices of the driver, by what people call them.

use hmm_gpu::{Description, Device};

use crate::error::Error;
use crate::pci::Bdf;

/// The device that somebody means: N, a path, a PCI address, or, if nothing is said, the first one.
pub fn open(name: Option<&str>) -> Result<Device, Error> {
    let Some(name) = name else {
        return Ok(Device::open_first()?);
    };
    if let Ok(unit) = name.parse() {
        return Ok(Device::open(unit)?);
    }
    if name.contains('/') {
        return Ok(Device::open_path(name)?);
    }
    let bdf: Bdf = name.parse().map_err(|_| {
        Error::Said(format!(
            "{name:?} is neither a number, nor a path, nor a PCI address"
        ))
    })?;
    match of_pci(&bdf) {
        Some((device, _)) => Ok(device),
        None => Error::said(format!(
            "{bdf} is not a device of hmm_gpu, or its node cannot be opened (see `hmmctl list`)"
        )),
    }
}

/// All devices that can be opened, with what they are.
pub fn all() -> Vec<(Device, Description)> {
    let units = Device::list().into_iter();
    units
        .filter_map(|unit| {
            let device = Device::open(unit).ok()?;
            let description = device.describe().ok()?;
            Some((device, description))
        })
        .collect()
}

/// The one of a PCI device.
pub fn of_pci(bdf: &Bdf) -> Option<(Device, Description)> {
    let name = bdf.to_string();
    all()
        .into_iter()
        .find(|(_, it)| it.pci.is_some_and(|pci| pci.to_string() == name))
}
