//! Each PCI device that could be bound: its BAR, and what may stand in the way of its pages.

use hmm_gpu::Bytes;

use super::{Finding, Verdict};
use crate::host::Host;
use crate::pci::{Bar, PciDevice, BLOCK, DRIVER};

pub(super) fn examine(host: &Host) -> Vec<Finding> {
    let devices: Vec<PciDevice> = PciDevice::all(host)
        .into_iter()
        .filter(PciDevice::is_candidate)
        .collect();
    if devices.is_empty() {
        let advice = "a soft device needs none: `modprobe hmm_gpu` makes one";
        return vec![Finding::new(
            "GPUs",
            Verdict::Note,
            "no PCI device that could be bound",
            advice,
        )];
    }
    devices
        .iter()
        .flat_map(|device| of_device(host, device))
        .collect()
}

fn of_device(host: &Host, device: &PciDevice) -> Vec<Finding> {
    let bdf = &device.bdf;
    let what = |thing: &str| format!("{bdf} {thing}");
    let mut findings = vec![driver(host, device)];
    let Some(bar) = device.bar else {
        let advice = "nothing to do, if it has no memory of its own; else see whether the firmware has \"Above 4G decoding\" on";
        findings.push(Finding::new(
            what("BAR"),
            Verdict::Note,
            "no prefetchable memory BAR with addresses",
            advice,
        ));
        return findings;
    };
    findings.push(size(host, device, bar));
    let advice = "the driver takes whole blocks of 2 MiB: form `add` does not mind where the BAR begins, `add_resource=1` does";
    findings.push(match bar.start % BLOCK {
        0 => Finding::good(
            what("alignment"),
            format!("BAR {} begins at {:#x}", bar.number, bar.start),
        ),
        _ => Finding::new(
            what("alignment"),
            Verdict::Note,
            format!("BAR {} begins at {:#x}", bar.number, bar.start),
            advice,
        ),
    });
    findings.push(direct_map(host, device, bar));
    findings.push(memory_type(host, device, bar));
    findings.push(iommu(host, device));
    findings
}

fn driver(host: &Host, device: &PciDevice) -> Finding {
    let what = format!("{} driver", device.bdf);
    let Some(driver) = &device.driver else {
        return Finding::good(what, "none: it can be bound");
    };
    if driver == DRIVER {
        return Finding::good(what, DRIVER);
    }
    let users = device.users(host);
    let bind = "what is in its memory is lost by `hmmctl bind`, and the driver has it again after `hmmctl unbind`";
    match users.is_empty() {
        true => Finding::new(
            what,
            Verdict::Note,
            format!("{driver}, and nobody uses it"),
            bind,
        ),
        false => {
            let advice = "bind another one, or end these first";
            Finding::new(
                what,
                Verdict::Note,
                format!("{driver}, in use by {}", users.join(", ")),
                advice,
            )
        }
    }
}

fn size(host: &Host, device: &PciDevice, bar: Bar) -> Finding {
    let what = format!("{} BAR", device.bdf);
    let seen = format!("BAR {} has {}", bar.number, Bytes(bar.bytes));
    if bar.usable() == 0 {
        return Finding::new(
            what,
            Verdict::Note,
            format!("{seen}, less than 2 MiB"),
            "this device cannot be bound",
        );
    }
    // A bit for each size that it could have: bit n is 2^n MiB.
    let sizes = host.text(&device.bdf.file(&format!("resource{}_resize", bar.number)));
    let largest = sizes
        .and_then(|text| u64::from_str_radix(text.trim_start_matches("0x"), 16).ok())
        .and_then(u64::checked_ilog2)
        .and_then(|bit| (1u64 << 20).checked_shl(bit));
    match largest {
        Some(largest) if largest > bar.bytes => Finding::new(
            what,
            Verdict::Note,
            format!("{seen}, and could have {}", Bytes(largest)),
            "VRAM behind the BAR is not used: turn on Resizable BAR in the firmware, or write its size to resourceN_resize",
        ),
        _ => Finding::good(what, seen),
    }
}

/// The kernel has pages for addresses up to a limit, which form `add_resource` may exceed.
fn direct_map(host: &Host, device: &PciDevice, bar: Bar) -> Finding {
    let what = format!("{} direct map", device.bdf);
    let end = bar.start + bar.bytes;
    let cpuinfo = host.text("/proc/cpuinfo").unwrap_or_default();
    let bits = cpuinfo.lines().find_map(|line| {
        line.strip_prefix("address sizes")?
            .split_whitespace()
            .nth(1)?
            .parse::<u32>()
            .ok()
    });
    let Some(bits) = bits.filter(|bits| *bits < 64) else {
        return Finding::new(
            what,
            Verdict::Unknown,
            "/proc/cpuinfo has no address sizes",
            "the driver says at binding",
        );
    };
    if end > 1 << bits {
        let advice =
            "form `add` (the default) takes other addresses; `add_resource=1` will not work here";
        return Finding::new(
            what,
            Verdict::Note,
            format!("BAR {} ends at {end:#x}, above {bits} bits", bar.number),
            advice,
        );
    }
    // mm/kaslr.c on x86: without KASLR all that the processor can address; with it, what memory there is and some room.
    let iomem = host.text("/proc/iomem").unwrap_or_default();
    let ram = iomem
        .lines()
        .filter(|line| line.ends_with(": System RAM"))
        .filter_map(|line| u64::from_str_radix(line.split_once('-')?.1.split_once(' ')?.0, 16).ok())
        .max()
        .filter(|last| *last > 0);
    let Some(ram) = ram else {
        return Finding::new(
            what,
            Verdict::Unknown,
            "only root sees where memory is",
            "run it as root",
        );
    };
    const ROOM: u64 = 10 << 40;
    match end > ram + ROOM {
        true => Finding::new(
            what,
            Verdict::Note,
            format!("BAR {} ends at {end:#x}, far above the memory, which ends at {:#x}", bar.number, ram + 1),
            "form `add` (the default) takes other addresses; for `add_resource=1` boot with `nokaslr`",
        ),
        false => Finding::good(what, format!("{end:#x} is within its reach")),
    }
}

/// The driver maps the BAR write-combined. Who has it mapped otherwise decides for both (arch/x86/mm/pat/memtype.c).
fn memory_type(host: &Host, device: &PciDevice, bar: Bar) -> Finding {
    let what = format!("{} memory type", device.bdf);
    let Some(list) = host.text("/sys/kernel/debug/x86/pat_memtype_list") else {
        let advice =
            "as root, with debugfs mounted, it can be seen whether somebody has the BAR mapped";
        return Finding::new(
            what,
            Verdict::Unknown,
            "no /sys/kernel/debug/x86/pat_memtype_list",
            advice,
        );
    };
    let other = list
        .lines()
        .find(|line| overlaps(line, bar).unwrap_or(false) && !line.ends_with("write-combining"));
    match other {
        None => Finding::good(what, "nobody has the BAR mapped in another way than write-combined"),
        Some(line) => Finding::new(
            what,
            Verdict::Note,
            format!("mapped already: {line}"),
            "who has it mapped so (a boot frame buffer, a program with resourceN) makes writes to VRAM slow: have it let go first",
        ),
    }
}

/// Whether a line, `PAT: [mem 0x00000000d0000000-0x00000000e0000000] uncached-minus`, is of the BAR.
fn overlaps(line: &str, bar: Bar) -> Option<bool> {
    let (_, range) = line.split_once("[mem ")?;
    let (start, end) = range.split_once(']')?.0.split_once('-')?;
    let number = |text: &str| u64::from_str_radix(text.trim_start_matches("0x"), 16).ok();
    Some(number(start)? < bar.start + bar.bytes && number(end)? > bar.start)
}

fn iommu(host: &Host, device: &PciDevice) -> Finding {
    let what = format!("{} IOMMU", device.bdf);
    let kind = host.text(&device.bdf.file("iommu_group/type"));
    match kind {
        Some(kind) => Finding::good(
            what,
            format!("on ({kind}); the driver has the device do no DMA, so it is not in the way"),
        ),
        None if host.has(&device.bdf.file("class")) => {
            Finding::good(what, "off, or not for this device; not needed")
        }
        None => Finding::new(what, Verdict::Unknown, "no sysfs", "mount /sys"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{host_of, verdict};
    use super::*;

    const DIR: &str = "/sys/bus/pci/devices/0000:01:00.0";

    /// A GPU with a BAR, and what else there is.
    fn findings(bar: &str, more: &[(&str, &str)]) -> Vec<Finding> {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str| format!("{DIR}/{name}");
        let (class, vendor, device, resource) = (
            file("class"),
            file("vendor"),
            file("device"),
            file("resource"),
        );
        let mut files = vec![
            (class.as_str(), "0x030000"),
            (&vendor, "0x1234"),
            (&device, "0x1111"),
            (&resource, bar),
            (
                "/proc/cpuinfo",
                "address sizes\t: 40 bits physical, 48 bits virtual\n",
            ),
            (
                "/proc/iomem",
                "00001000-0009fbff : System RAM\n100000000-13fffffff : System RAM\n",
            ),
            (
                "/sys/kernel/debug/x86/pat_memtype_list",
                "PAT memtype list:\n",
            ),
        ];
        files.extend(more);
        examine(&host_of(folder.path(), &files))
    }

    const BAR: &str = "0xd0000000 0xdfffffff 0x42208";

    #[test]
    fn an_ordinary_gpu_has_nothing_in_its_way() {
        let found = findings(BAR, &[]);
        for what in [
            "driver",
            "BAR",
            "alignment",
            "direct map",
            "memory type",
            "IOMMU",
        ] {
            assert_eq!(
                verdict(&found, &format!("0000:01:00.0 {what}")),
                Verdict::Good,
                "{what}"
            );
        }
    }

    #[test]
    fn a_bar_that_could_be_larger_is_told() {
        let resize = format!("{DIR}/resource0_resize");
        let of = |sizes| verdict(&findings(BAR, &[(&resize, sizes)]), "0000:01:00.0 BAR");
        assert_eq!(of("0000000000000f00"), Verdict::Note);
        assert_eq!(of("0000000000000100"), Verdict::Good);
    }

    #[test]
    fn a_mapping_of_another_kind_over_the_bar_is_told() {
        let of = |line| {
            let list = ("/sys/kernel/debug/x86/pat_memtype_list", line);
            verdict(&findings(BAR, &[list]), "0000:01:00.0 memory type")
        };
        assert_eq!(
            of("PAT: [mem 0x00000000d0000000-0x00000000d0300000] uncached-minus"),
            Verdict::Note
        );
        assert_eq!(
            of("PAT: [mem 0x00000000d0000000-0x00000000e0000000] write-combining"),
            Verdict::Good
        );
        assert_eq!(
            of("PAT: [mem 0x00000000e0000000-0x00000000e0001000] uncached-minus"),
            Verdict::Good
        );
    }

    #[test]
    fn addresses_that_are_out_of_reach_or_crooked_are_told() {
        let far = "0x0000038000000000 0x000003800fffffff 0x14220c";
        assert_eq!(
            verdict(&findings(far, &[]), "0000:01:00.0 direct map"),
            Verdict::Note
        );
        let outside = "0x0000038000000000 0x000103800fffffff 0x14220c";
        assert_eq!(
            verdict(&findings(outside, &[]), "0000:01:00.0 direct map"),
            Verdict::Note
        );
        let crooked = "0xd0100000 0xd04fffff 0x42208";
        assert_eq!(
            verdict(&findings(crooked, &[]), "0000:01:00.0 alignment"),
            Verdict::Note
        );
    }
}
