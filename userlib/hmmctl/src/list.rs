//! Which devices there are, and what one is.

use std::io::Write;

use hmm_gpu::{Bytes, Device};
use serde_json::json;

use crate::cli::{InfoArgs, ListArgs};
use crate::error::Error;
use crate::host::Host;
use crate::nodes;
use crate::pagemap::ranges;
use crate::pci::{PciDevice, DRIVER};

/// The verb `list`.
pub fn list(host: &Host, args: &ListArgs, out: &mut dyn Write) -> Result<(), Error> {
    let units = Device::list();
    let candidates: Vec<PciDevice> = PciDevice::all(host)
        .into_iter()
        .filter(|device| device.is_candidate() && device.driver.as_deref() != Some(DRIVER))
        .collect();
    if args.json {
        let devices: Vec<_> = nodes::all()
            .iter()
            .map(|(_, it)| {
                json!({
                    "unit": it.unit, "path": it.path, "pci": it.pci.map(|pci| pci.to_string()),
                    "vram_bytes": it.vram_bytes, "vram_free_bytes": it.vram_free_bytes,
                })
            })
            .collect();
        let others: Vec<_> = candidates
            .iter()
            .map(|it| {
                json!({
                    "pci": it.bdf.to_string(), "vendor": it.vendor, "device": it.device, "driver": it.driver,
                    "bar_bytes": it.bar.map(|bar| bar.bytes),
                })
            })
            .collect();
        writeln!(
            out,
            "{}",
            json!({ "devices": devices, "candidates": others })
        )?;
        return Ok(());
    }

    if units.is_empty() {
        let why = match host.has("/sys/module/hmm_gpu") {
            true => {
                "the module is loaded, and has no device: bind one of these (`hmmctl bind BDF`)"
            }
            false => "the module is not loaded (`modprobe hmm_gpu`)",
        };
        writeln!(out, "No device of hmm_gpu: {why}.")?;
    }
    for unit in units {
        match Device::open(unit).and_then(|device| device.describe()) {
            Ok(description) => writeln!(out, "{description}")?,
            Err(error) => writeln!(out, "/dev/hmm_gpu{unit}: {error}")?,
        }
    }
    if !candidates.is_empty() {
        writeln!(out, "\nPCI devices that the driver does not have:")?;
    }
    for device in candidates {
        let memory = match device.bar {
            Some(bar) => format!("BAR {} of {}", bar.number, Bytes(bar.bytes)),
            None => "no memory BAR that could be VRAM".to_owned(),
        };
        writeln!(
            out,
            "{}  {}:{}  {}, {memory}, {}",
            device.bdf,
            device.vendor,
            device.device,
            device.kind(),
            device
                .driver
                .map_or("without a driver".to_owned(), |driver| format!(
                    "driver {driver}"
                )),
        )?;
    }
    Ok(())
}

/// The verb `info`.
pub fn info(host: &Host, args: &InfoArgs, out: &mut dyn Write) -> Result<(), Error> {
    let device = nodes::open(args.device.as_deref())?;
    let it = device.describe()?;
    let counters = device.counters()?;
    let place = ranges(host).into_iter().find(|range| range.unit == it.unit);
    if args.json {
        let counts: serde_json::Map<String, _> = counters
            .iter()
            .map(|(name, value)| (name.to_owned(), value.into()))
            .collect();
        let answer = json!({
            "unit": it.unit, "path": it.path, "source": it.source.to_string(), "form": it.form.to_string(),
            "pci": it.pci.map(|pci| pci.to_string()), "version": it.version,
            "capabilities": it.capabilities.to_string().split(", ").collect::<Vec<_>>(),
            "vram_bytes": it.vram_bytes, "vram_free_bytes": it.vram_free_bytes, "block_bytes": it.block_bytes,
            "physical_start": place.map(|range| range.start), "counters": counts,
        });
        writeln!(out, "{answer}")?;
        return Ok(());
    }
    let mut row = |name: &str, text: String| writeln!(out, "{name:<14} {text}");
    row("device", it.path.display().to_string())?;
    let pci = it.pci.map_or(String::new(), |pci| format!(" {pci}"));
    row("source", format!("{}{pci}", it.source))?;
    row(
        "VRAM",
        format!(
            "{}, {} free",
            Bytes(it.vram_bytes),
            Bytes(it.vram_free_bytes)
        ),
    )?;
    let pages = match place {
        Some(range) => format!(
            "form {}, physical {:#x}-{:#x}",
            it.form,
            range.start,
            range.end - 1
        ),
        None => format!("form {} (root sees where)", it.form),
    };
    row("pages", pages)?;
    row("interface", format!("{}: {}", it.version, it.capabilities))?;
    let used = counters.iter().filter(|(_, value)| *value != 0);
    let used: Vec<String> = used
        .map(|(name, value)| format!("{name} {value}"))
        .collect();
    let used = if used.is_empty() {
        "nothing yet".to_owned()
    } else {
        used.join("\n               ")
    };
    row("counters", used)?;
    Ok(())
}
