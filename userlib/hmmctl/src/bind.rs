//! Gives a PCI device to the driver, and back.

use std::fs;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;

use crate::cli::BindArgs;
use crate::error::Error;
use crate::host::Host;
use crate::nodes;
use crate::pci::{Bdf, PciDevice, BLOCK, DRIVER};

/// Where it is remembered, until the next boot, what a device had before.
const REMEMBERED: &str = "/run/hmmctl";

/// What a device had before: its driver, and which one it was told to have.
#[derive(Debug, Default, PartialEq, Eq)]
struct Before {
    driver: String,
    told: String,
}

impl Before {
    fn of(host: &Host, device: &PciDevice) -> Self {
        let told = host
            .text(&device.bdf.file("driver_override"))
            .unwrap_or_default();
        Self {
            driver: device.driver.clone().unwrap_or_default(),
            told: if told == "(null)" {
                String::new()
            } else {
                told
            },
        }
    }

    fn remember(&self, host: &Host, bdf: &Bdf) -> Result<(), Error> {
        let path = format!("{REMEMBERED}/{bdf}");
        fs::create_dir_all(host.path(REMEMBERED))
            .and_then(|()| {
                fs::write(
                    host.path(&path),
                    format!("driver={}\noverride={}\n", self.driver, self.told),
                )
            })
            .map_err(Error::of(path))
    }

    /// Nothing, if nothing was remembered: the device was bound by other means.
    fn recall(host: &Host, bdf: &Bdf) -> Self {
        let text = host
            .text(&format!("{REMEMBERED}/{bdf}"))
            .unwrap_or_default();
        let of = |name| {
            let line = text.lines().find_map(|line| line.strip_prefix(name));
            line.unwrap_or_default().to_owned()
        };
        Self {
            driver: of("driver="),
            told: of("override="),
        }
    }

    fn forget(host: &Host, bdf: &Bdf) {
        let _ = fs::remove_file(host.path(&format!("{REMEMBERED}/{bdf}")));
    }

    /// Lets the device have what it had. Says which driver has it then.
    fn restore(&self, host: &Host, bdf: &Bdf) -> Result<Option<String>, Error> {
        // An empty line takes it away.
        host.write(&bdf.file("driver_override"), &format!("{}\n", self.told))?;
        if !self.driver.is_empty() {
            let bind = format!("/sys/bus/pci/drivers/{}/bind", self.driver);
            if host.write(&bind, &bdf.to_string()).is_err() {
                // It is not there any more, or does not want it: whichever driver does.
                host.write("/sys/bus/pci/drivers_probe", &bdf.to_string())?;
            }
        }
        Ok(host.link(&bdf.file("driver")))
    }
}

/// The verb `bind`.
pub fn bind(host: &Host, args: &BindArgs, out: &mut dyn Write) -> Result<(), Error> {
    let bdf = &args.device;
    let device = find(host, bdf)?;
    if device.driver.as_deref() == Some(DRIVER) {
        return Error::said(format!("{bdf} has the driver {DRIVER} already"));
    }
    if !host.has("/sys/bus/pci/drivers/hmm_gpu") {
        return Error::said("the module hmm_gpu is not loaded (`modprobe hmm_gpu`)");
    }
    refuse(&device, args.force, &device.users(host))?;

    let before = Before::of(host, &device);
    before.remember(host, bdf)?;
    let mut log = Log::from_now(host);
    let given = give(host, &device);
    if let Err(error) = given {
        let why = log.of(bdf);
        Before::forget(host, bdf);
        let now = match before.restore(host, bdf) {
            Ok(Some(driver)) => format!("it has its driver {driver} again"),
            Ok(None) => "it has no driver now".to_owned(),
            Err(error) => format!("and it could not be given back: {error}"),
        };
        let why = if why.is_empty() {
            error.to_string()
        } else {
            why
        };
        return Error::said(format!("{bdf} was not bound; {now}. {why}"));
    }
    match nodes::of_pci(bdf) {
        Some((_, description)) => writeln!(out, "{description}")?,
        None => writeln!(out, "{bdf} is bound")?,
    }
    if !before.driver.is_empty() {
        writeln!(
            out,
            "`hmmctl unbind {bdf}` gives it back to {}",
            before.driver
        )?;
    }
    Ok(())
}

/// The verb `unbind`.
pub fn unbind(host: &Host, args: &BindArgs, out: &mut dyn Write) -> Result<(), Error> {
    let bdf = &args.device;
    let device = find(host, bdf)?;
    if device.driver.as_deref() != Some(DRIVER) {
        let has = device.driver.map_or("no driver".to_owned(), |driver| {
            format!("the driver {driver}")
        });
        return Error::said(format!("{bdf} has {has}, not {DRIVER}"));
    }
    let users = match nodes::of_pci(bdf) {
        Some((node, _)) => {
            let files = [node.path().to_owned()];
            let own = std::process::id();
            let pids = host
                .processes()
                .into_iter()
                .filter(|pid| *pid != own && host.holds(*pid, &files));
            pids.map(|pid| format!("process {pid} ({})", host.comm(pid)))
                .collect()
        }
        None => vec![],
    };
    if !users.is_empty() && !args.force {
        return Error::said(format!(
            "{bdf} is in use by {}; with --force, their calls fail from then on (ENODEV), and their memory stays whole",
            users.join(", ")
        ));
    }
    host.write(&bdf.file("driver/unbind"), &bdf.to_string())?;
    let now = Before::recall(host, bdf).restore(host, bdf)?;
    Before::forget(host, bdf);
    match now {
        Some(driver) => writeln!(out, "{bdf} is unbound; {driver} has it again")?,
        None => writeln!(out, "{bdf} is unbound; it has no driver, as before")?,
    }
    Ok(())
}

fn find(host: &Host, bdf: &Bdf) -> Result<PciDevice, Error> {
    PciDevice::read(host, bdf)
        .ok_or_else(|| Error::Said(format!("there is no PCI device {bdf} (see `hmmctl list`)")))
}

/// What stands against it.
fn refuse(device: &PciDevice, force: bool, users: &[String]) -> Result<(), Error> {
    let bdf = &device.bdf;
    let Some(bar) = device.bar else {
        return Error::said(format!(
            "{bdf} has no prefetchable memory BAR that was given addresses: there is no VRAM that could be reached"
        ));
    };
    if bar.usable() == 0 {
        return Error::said(format!(
            "{bdf}: BAR {} has {} bytes, and VRAM is taken by {BLOCK}",
            bar.number, bar.bytes
        ));
    }
    if force {
        return Ok(());
    }
    if !device.is_candidate() {
        return Error::said(format!(
            "{bdf} is no GPU (class {:06x}); --force binds it all the same",
            device.class
        ));
    }
    if !users.is_empty() {
        return Error::said(format!(
            "{bdf} is in use through its driver {} by {}; end them first, or take it from them with --force",
            device.driver.as_deref().unwrap_or("(none)"),
            users.join(", ")
        ));
    }
    Ok(())
}

/// Takes it from the driver that has it, and has ours probe it.
fn give(host: &Host, device: &PciDevice) -> Result<(), Error> {
    let name = device.bdf.to_string();
    if device.driver.is_some() {
        host.write(&device.bdf.file("driver/unbind"), &name)?;
    }
    host.write(&device.bdf.file("driver_override"), DRIVER)?;
    host.write("/sys/bus/pci/drivers/hmm_gpu/bind", &name)
}

/// The kernel's log from now on: why a probe failed.
struct Log(Option<fs::File>);

impl Log {
    fn from_now(host: &Host) -> Self {
        const NONBLOCK: i32 = 0o4000;
        let mut options = fs::OpenOptions::new();
        let file = options
            .read(true)
            .custom_flags(NONBLOCK)
            .open(host.path("/dev/kmsg"));
        Self(file.ok().and_then(|mut file| {
            file.seek(SeekFrom::End(0)).ok()?;
            Some(file)
        }))
    }

    /// What it said of a device, as one line.
    fn of(&mut self, bdf: &Bdf) -> String {
        let mut said = vec![];
        let mut record = [0; 8192];
        while let Some(Ok(bytes @ 1..)) = self.0.as_mut().map(|file| file.read(&mut record)) {
            let text = String::from_utf8_lossy(&record[..bytes]);
            let message = text
                .split_once(';')
                .and_then(|(_, rest)| rest.lines().next());
            said.extend(
                message
                    .filter(|it| it.contains(&bdf.to_string()))
                    .map(str::to_owned),
            );
        }
        // The first one is the cause.
        said.into_iter()
            .find(|line| line.contains(DRIVER))
            .unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    const GPU: &str = "0000:01:00.0";

    /// A host with a GPU, as far as files can play one: nothing happens when they are written to.
    fn host(root: &Path, class: &str, bar_last: &str) -> Host {
        let host = Host::below(root);
        let device = host.path(&format!("/sys/bus/pci/devices/{GPU}"));
        fs::create_dir_all(&device).unwrap();
        for (name, text) in [
            ("class", class),
            ("vendor", "0x1234"),
            ("device", "0x1111"),
            ("driver_override", "(null)"),
            ("resource", &format!("0xd0000000 {bar_last} 0x42208")),
        ] {
            fs::write(device.join(name), text).unwrap();
        }
        let driver = host.path("/sys/bus/pci/drivers/nouveau");
        fs::create_dir_all(&driver).unwrap();
        for name in ["bind", "unbind"] {
            fs::write(driver.join(name), "").unwrap();
        }
        std::os::unix::fs::symlink(&driver, device.join("driver")).unwrap();
        fs::write(host.path("/sys/bus/pci/drivers_probe"), "").unwrap();
        host
    }

    fn device(host: &Host) -> PciDevice {
        PciDevice::read(host, &GPU.parse().unwrap()).unwrap()
    }

    fn refusal(device: &PciDevice, force: bool, users: &[&str]) -> Option<String> {
        let users: Vec<String> = users.iter().map(|user| (*user).to_owned()).collect();
        refuse(device, force, &users)
            .err()
            .map(|error| error.to_string())
    }

    #[test]
    fn what_is_in_use_or_no_gpu_is_refused_unless_forced() {
        let folder = tempfile::tempdir().unwrap();
        let gpu = device(&host(folder.path(), "0x030000", "0xdfffffff"));
        assert_eq!(refusal(&gpu, false, &[]), None);
        let said = refusal(&gpu, false, &["process 7 (Xorg)"]).unwrap();
        assert!(
            said.contains("nouveau") && said.contains("process 7 (Xorg)"),
            "{said}"
        );
        assert_eq!(refusal(&gpu, true, &["process 7 (Xorg)"]), None);

        let folder = tempfile::tempdir().unwrap();
        let disk = device(&host(folder.path(), "0x010802", "0xdfffffff"));
        assert!(refusal(&disk, false, &[]).unwrap().contains("no GPU"));
        assert_eq!(refusal(&disk, true, &[]), None);

        let folder = tempfile::tempdir().unwrap();
        let small = device(&host(folder.path(), "0x030000", "0xd00fffff"));
        assert!(refusal(&small, true, &[]).unwrap().contains("BAR 0"));
    }

    #[test]
    fn what_it_had_before_is_remembered_and_restored() {
        let folder = tempfile::tempdir().unwrap();
        let host = host(folder.path(), "0x030000", "0xdfffffff");
        let gpu = device(&host);
        let before = Before::of(&host, &gpu);
        assert_eq!(
            (before.driver.as_str(), before.told.as_str()),
            ("nouveau", "")
        );
        before.remember(&host, &gpu.bdf).unwrap();
        assert_eq!(Before::recall(&host, &gpu.bdf), before);

        before.restore(&host, &gpu.bdf).unwrap();
        assert_eq!(host.text("/sys/bus/pci/drivers/nouveau/bind").unwrap(), GPU);
        // A driver that is gone: whichever wants the device.
        fs::remove_dir_all(host.path("/sys/bus/pci/drivers/nouveau")).unwrap();
        before.restore(&host, &gpu.bdf).unwrap();
        assert_eq!(host.text("/sys/bus/pci/drivers_probe").unwrap(), GPU);

        Before::forget(&host, &gpu.bdf);
        assert_eq!(Before::recall(&host, &gpu.bdf), Before::default());
    }

    /// Catches a user that is overlooked: one that has the node open, and one that has it mapped only.
    #[test]
    fn who_has_a_node_of_the_device_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let host = host(folder.path(), "0x030000", "0xdfffffff");
        let card = host.path(&format!("/sys/bus/pci/devices/{GPU}/drm/card0"));
        fs::create_dir_all(card.join("card0-DP-1")).unwrap();
        fs::write(card.join("uevent"), "MAJOR=226\nDEVNAME=dri/card0\n").unwrap();
        fs::write(card.join("card0-DP-1/enabled"), "enabled\n").unwrap();
        for (pid, open, maps) in [
            (7, "/dev/dri/card0", ""),
            (8, "/dev/null", "1000-2000 rw-s 0 00:05 9 /dev/dri/card0"),
            (9, "/dev/dri/card01", ""),
        ] {
            let process = host.path(&format!("/proc/{pid}"));
            fs::create_dir_all(process.join("fd")).unwrap();
            std::os::unix::fs::symlink(open, process.join("fd/3")).unwrap();
            fs::write(process.join("maps"), maps).unwrap();
            fs::write(process.join("comm"), "x\n").unwrap();
        }
        let users = device(&host).users(&host);
        assert_eq!(
            users,
            ["process 7 (x)", "process 8 (x)", "the screen on card0-DP-1"]
        );
    }
}
