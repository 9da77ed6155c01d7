//! The tool that people have: what each of its verbs says, against what the driver and the kernel say.
//!
//! Runs in the virtual GPU host: `bench/test guest_hmmctl`.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

use crate::common::child::Child;
use crate::common::driver::{is_bound, Driver, GPUS};
use crate::common::memory::{Area, PAGE};
use crate::common::{is_checking, places, refused, to_device};
use hmm_gpu::{Device, Errno, Place};

const PROGRAM: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/tree/release/hmmctl");
const SAMPLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/tree/release/mirror");

/// A program's output, which must be text.
fn run(program: &str, arguments: &[&str]) -> (bool, String, String) {
    let mut command = Command::new(program);
    let output: Output = command
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}; run `make userlib`"));
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (
        output.status.success(),
        text(output.stdout),
        text(output.stderr),
    )
}

/// What the tool prints when all goes well.
#[track_caller]
fn hmmctl(arguments: &[&str]) -> String {
    let (ok, out, error) = run(PROGRAM, arguments);
    assert!(
        ok && error.is_empty(),
        "hmmctl {arguments:?}: {out}\n{error}"
    );
    out
}

/// The same, as JSON.
#[track_caller]
fn json(arguments: &[&str]) -> Value {
    let out = hmmctl(arguments);
    serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {out}"))
}

/// Why it refuses.
#[track_caller]
fn refusal(arguments: &[&str]) -> String {
    let (ok, out, error) = run(PROGRAM, arguments);
    assert!(
        !ok && out.is_empty(),
        "hmmctl {arguments:?}: {out}\n{error}"
    );
    error
}

fn driver_of(address: &str) -> Option<String> {
    let link = fs::read_link(format!("/sys/bus/pci/devices/{address}/driver")).ok()?;
    Some(link.file_name()?.to_str()?.to_owned())
}

fn told(address: &str) -> String {
    let text = fs::read_to_string(format!("/sys/bus/pci/devices/{address}/driver_override"));
    text.unwrap().trim().to_owned()
}

/// Catches a device that is bound for somebody who uses it, that is no GPU, or that does not go back to whom it was of; and
/// what is remembered of it for ever.
#[test]
fn a_gpu_is_bound_and_given_back_as_it_was() {
    let refused_without_driver = refusal(&["bind", GPUS[0]]);
    assert!(
        refused_without_driver.contains("not loaded"),
        "{refused_without_driver}"
    );
    let driver = Driver::load("soft=0");
    let listed = hmmctl(&["list"]);
    assert!(
        listed.contains("No device of hmm_gpu") && listed.contains(GPUS[0]),
        "{listed}"
    );

    // One that has no driver, and was told to have one that does not exist.
    let file = format!("/sys/bus/pci/devices/{}/driver_override", GPUS[0]);
    fs::write(&file, "nobody").unwrap();
    let said = hmmctl(&["bind", "00:10.0"]);
    assert!(said.starts_with("/dev/hmm_gpu0: 256 MiB of VRAM"), "{said}");
    assert!(is_bound(GPUS[0]));
    assert!(refusal(&["bind", GPUS[0]]).contains("already"));
    let listed = json(&["list", "--json"]);
    assert_eq!(listed["devices"][0]["pci"], GPUS[0]);
    assert!(listed["candidates"]
        .as_array()
        .unwrap()
        .iter()
        .all(|it| it["pci"] != GPUS[0]));

    // Its memory comes home when it is taken from somebody who has a file open.
    let device = Device::open(0).unwrap();
    let area = Area::filled(70, 1);
    to_device(&device, *area);
    let said = refusal(&["unbind", GPUS[0]]);
    assert!(
        said.contains(&format!("process {}", std::process::id())),
        "{said}"
    );
    area.check(1);
    to_device(&device, *area);
    hmmctl(&["unbind", GPUS[0], "--force"]);
    assert!(!is_bound(GPUS[0]));
    assert_eq!(refused(device.describe()), Errno::NODEV);
    area.check(1);
    drop(device);
    assert_eq!(
        (driver_of(GPUS[0]), told(GPUS[0]).as_str()),
        (None, "nobody")
    );
    fs::write(&file, "\n").unwrap();
    assert!(refusal(&["unbind", GPUS[0]]).contains("no driver"));

    // One that another driver has. The checking kernel has no other driver that would take any.
    if !is_checking() {
        assert!(Command::new("modprobe")
            .arg("pci-stub")
            .status()
            .unwrap()
            .success());
        fs::write(&file, "pci-stub").unwrap();
        fs::write("/sys/bus/pci/drivers_probe", GPUS[0]).unwrap();
        assert_eq!(driver_of(GPUS[0]).as_deref(), Some("pci-stub"));
        let said = hmmctl(&["bind", GPUS[0]]);
        assert!(is_bound(GPUS[0]) && said.contains("pci-stub"), "{said}");
        let said = hmmctl(&["unbind", GPUS[0]]);
        assert!(said.contains("pci-stub has it again"), "{said}");
        assert_eq!(driver_of(GPUS[0]).as_deref(), Some("pci-stub"));
        assert_eq!(told(GPUS[0]), "pci-stub");
        fs::write("/sys/bus/pci/drivers/pci-stub/unbind", GPUS[0]).unwrap();
        fs::write(&file, "\n").unwrap();
    }
    assert_eq!(
        fs::read_dir("/run/hmmctl").unwrap().count(),
        0,
        "something is remembered still"
    );

    // What is no GPU, and what is not there.
    let devices = fs::read_dir("/sys/bus/pci/devices").unwrap();
    let names = devices.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let class =
        |name: &str| fs::read_to_string(format!("/sys/bus/pci/devices/{name}/class")).unwrap();
    let bridge = names
        .into_iter()
        .find(|name| class(name).starts_with("0x0600"))
        .unwrap();
    let said = refusal(&["bind", &bridge]);
    assert!(
        said.contains("no prefetchable memory BAR") || said.contains("no GPU"),
        "{said}"
    );
    assert!(refusal(&["bind", "7f:1f.7"]).contains("there is no PCI device 0000:7f:1f.7"));
    driver.finish();
}

/// Catches a probe that fails and leaves the device with nobody, or whose reason is not told.
#[test]
fn a_bind_that_fails_says_why_and_gives_the_device_back() {
    let driver = Driver::load("soft=0 fail_probe=2");
    let said = refusal(&["bind", GPUS[1]]);
    assert!(
        said.contains("was not bound; it has no driver now"),
        "{said}"
    );
    assert_eq!(
        (driver_of(GPUS[1]), told(GPUS[1]).as_str()),
        (None, "(null)")
    );
    hmmctl(&["bind", GPUS[1]]);
    hmmctl(&["unbind", GPUS[1]]);
    driver.finish();
}

/// Catches counters that are not those of the driver, and a device that is described as another.
#[test]
fn a_device_is_described_and_its_counters_are_those_of_the_driver() {
    let mut driver = Driver::load("soft=1 soft_mib=16");
    let device = driver.bind(GPUS[0]);
    let area = Area::filled(50, 1);
    to_device(&device, *area);
    area.part(0, 3).touch();
    let unit = device.unit().to_string();
    let told = json(&["stat", "--json", &unit]);
    for (name, value) in device.counters().unwrap().iter() {
        assert_eq!(told[name], value, "{name}");
    }
    let description = device.describe().unwrap();
    for name in [unit.as_str(), GPUS[0], device.path().to_str().unwrap()] {
        let told = json(&["info", "--json", name]);
        assert_eq!(told["vram_bytes"], description.vram_bytes);
        assert_eq!(told["vram_free_bytes"], description.vram_free_bytes);
        assert_eq!(told["counters"]["fault_back_pages"], 3);
        let start = told["physical_start"].as_u64().unwrap();
        let iomem = fs::read_to_string("/proc/iomem").unwrap();
        assert!(iomem.contains(&format!("{start:x}-")), "{start:#x}");
    }
    assert!(hmmctl(&["info", &unit]).contains("fault_back_pages 3"));
    assert!(refusal(&["info", "31"]).contains("/dev/hmm_gpu31"));

    // As a stream: what happened in between, no more.
    let before = device.counters().unwrap();
    let stream =
        std::thread::spawn(|| hmmctl(&["stat", GPUS[0], "--json", "--every", "0.5", "-n", "3"]));
    while !stream.is_finished() {
        to_device(&device, *area);
        area.touch();
    }
    let lines: Vec<Value> = stream
        .join()
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(lines.len(), 3);
    let moved: u64 = lines
        .iter()
        .map(|line| line["to_device_pages"].as_u64().unwrap())
        .sum();
    let all = device.counters().unwrap() - before;
    assert!(
        moved > 0 && moved <= all.to_device_pages,
        "{moved} of {}",
        all.to_device_pages
    );
    drop((area, device));
    driver.finish();
}

/// The place of each page of a span, as `hmmctl map` says of a process.
#[track_caller]
fn mapped(pid: u32, addr: usize, pages: usize) -> Vec<(String, Option<u64>)> {
    let told = json(&["map", "--json", &pid.to_string()]);
    let mut at = std::collections::BTreeMap::new();
    for mapping in told["mappings"].as_array().unwrap() {
        let mut page = mapping["start"].as_u64().unwrap();
        for run in mapping["runs"].as_array().unwrap() {
            for _ in 0..run["pages"].as_u64().unwrap() {
                if (addr as u64..(addr + pages * PAGE) as u64).contains(&page) {
                    at.insert(
                        page,
                        (
                            run["place"].as_str().unwrap().to_owned(),
                            run["unit"].as_u64(),
                        ),
                    );
                }
                page += PAGE as u64;
            }
        }
        assert_eq!(page, mapping["end"].as_u64().unwrap());
    }
    assert_eq!(at.len(), pages);
    at.into_values().collect()
}

/// Catches a page that is shown where it is not: on another device, in a child that never opened one, or when nobody may look.
#[test]
fn a_map_shows_every_page_where_the_driver_says_it_is() {
    let mut driver = Driver::load("soft=1 soft_mib=16");
    let (first, second) = (Device::open(0).unwrap(), driver.bind(GPUS[2]));
    let area = Area::new(64);
    area.part(0, 40).fill(1);
    to_device(&first, area.part(4, 9));
    to_device(&second, area.part(20, 11));
    let expected: Vec<(String, Option<u64>)> = places(&first, *area)
        .pages()
        .iter()
        .map(|page| match page.place() {
            Place::None => ("nowhere".to_owned(), None),
            Place::System => ("ram".to_owned(), None),
            Place::Device => ("vram".to_owned(), Some(first.unit().into())),
            Place::OtherDevice => ("vram".to_owned(), Some(second.unit().into())),
        })
        .collect();
    let count = |unit: &Device| {
        expected
            .iter()
            .filter(|it| it.1 == Some(unit.unit().into()))
            .count()
    };
    assert_eq!((count(&first), count(&second)), (9, 11));
    let own = std::process::id();
    assert_eq!(mapped(own, area.addr, 64), expected);
    // Looking has moved nothing.
    assert_eq!(mapped(own, area.addr, 64), expected);

    // A child has the same pages, and no file of the device's that serves it.
    // It waits until it is killed.
    let child = Child::fork(|link| {
        link.receive();
    });
    assert_eq!(mapped(child.pid as u32, area.addr, 64), expected);
    drop(child);

    let picture = hmmctl(&["map", "--width", "16", &own.to_string()]);
    println!("{picture}");
    assert!(
        picture.contains("VRAM of hmm_gpu0 36 KiB, VRAM of hmm_gpu1 44 KiB"),
        "{picture}"
    );
    let colors = hmmctl(&["map", "--color", "always", &own.to_string()]);
    assert!(
        colors.contains("\x1b[32m") && colors.contains("\x1b[35m"),
        "{colors}"
    );
    assert!(refusal(&["map", "4194304"]).contains("there is no process"));
    let (ok, _, error) = run(
        "setpriv",
        &[
            "--reuid=65534",
            "--clear-groups",
            PROGRAM,
            "map",
            &own.to_string(),
        ],
    );
    assert!(!ok && error.contains("needs root"), "{error}");
    drop((area, first, second));
    driver.finish();
}

/// Catches a process whose VRAM is not told, or told of another.
#[test]
fn top_shows_who_has_the_vram() {
    let mut driver = Driver::load("soft=0");
    let device = driver.bind(GPUS[0]);
    let area = Area::filled(3 * 256, 1);
    to_device(&device, *area);
    let picture = hmmctl(&["top", "--once", "--every", "0.2"]);
    println!("{picture}");
    let pid = std::process::id().to_string();
    let row = picture
        .lines()
        .find(|line| line.split_whitespace().any(|word| word == pid));
    assert!(
        row.is_some_and(|row| row.contains("3 MiB  open")),
        "{picture}"
    );
    assert!(
        picture.contains("VRAM 3 MiB of 256 MiB") || picture.contains("VRAM 3.0 MiB of 256 MiB"),
        "{picture}"
    );
    assert!(!picture.contains("others"), "{picture}");
    drop((area, device));
    driver.finish();
}

/// Catches a trace without some of what happened, a file that no viewer would read, and what is left on in the kernel.
#[test]
fn a_trace_holds_what_the_counters_count() {
    let driver = Driver::load("soft=1 soft_mib=16");
    let device = Device::open(0).unwrap();
    let before = device.counters().unwrap();
    let file = "/tmp/trace.json";
    let (ok, out, error) = run(
        PROGRAM,
        &["trace", "--chrome", "-o", file, "--", SAMPLE, "0"],
    );
    assert!(ok && error.is_empty(), "{out}\n{error}");
    let work = device.counters().unwrap() - before;
    let trace: Value = serde_json::from_str(&fs::read_to_string(file).unwrap()).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    let moved = |cause: &str| -> u64 {
        let of = events
            .iter()
            .filter(|event| event["name"] == cause && event["ph"] == "X");
        of.map(|event| event["args"]["moved"].as_u64().unwrap())
            .sum()
    };
    assert_eq!(moved("request to device"), work.to_device_pages);
    assert_eq!(moved("request to system"), work.to_system_pages);
    assert_eq!(moved("cpu fault"), work.fault_back_pages);
    assert!(work.fault_back_pages > 0);
    assert!(events.iter().any(|event| event["args"]["name"] == "mirror"));

    let (ok, out, _) = run(PROGRAM, &["trace", "--", SAMPLE, "0"]);
    let lines = out
        .lines()
        .filter(|line| line.contains(" hmm_gpu_migrate: hmm_gpu0 "))
        .count();
    assert!(ok && lines > 0, "{out}");
    // The status is the command's.
    assert!(!run(PROGRAM, &["trace", "--", "false"]).0);
    hmmctl(&["trace", "--seconds", "0.1"]);
    let left = fs::read_dir("/sys/kernel/tracing/instances")
        .unwrap()
        .count();
    assert_eq!(left, 0, "a buffer of the kernel's is left");
    let enabled = fs::read_to_string("/sys/kernel/tracing/events/hmm_gpu/enable").unwrap();
    assert_eq!(enabled.trim(), "0");
    drop(device);
    driver.finish();
}

/// Catches a host that works and is called unfit, a GPU that is overlooked, and a fault that is not told.
#[test]
fn the_doctor_finds_nothing_wrong_where_all_works() {
    let mut driver = Driver::load("soft=0");
    drop(driver.bind(GPUS[0]));
    let told = json(&["doctor", "--json"]);
    let findings = told["findings"].as_array().unwrap();
    assert_eq!(told["bad"], 0, "{told:#}");
    let of = |what: &str| {
        let it = findings.iter().find(|it| it["what"] == what);
        it.unwrap_or_else(|| panic!("{what}: {told:#}"))["verdict"]
            .as_str()
            .unwrap()
    };
    for gpu in GPUS {
        for what in ["driver", "BAR", "alignment", "direct map", "IOMMU"] {
            assert_eq!(of(&format!("{gpu} {what}")), "good", "{gpu} {what}");
        }
    }
    for what in ["kernel", "module", "device nodes", "trace events"] {
        assert_eq!(of(what), "good", "{what}");
    }
    let translated = findings.iter().find(|it| {
        let what = it["what"].as_str().unwrap();
        what.starts_with("Vulkan, llvmpipe") && what.ends_with(", translated")
    });
    assert_eq!(
        translated.map(|it| it["verdict"].as_str().unwrap()),
        Some("good"),
        "{told:#}"
    );
    // The checking kernel knows of no signatures, and has no file that says so.
    let signature = if is_checking() { "unknown" } else { "good" };
    assert_eq!(of("module signature"), signature);
    // Only the stock kernel's configuration is where it can be found here.
    if !is_checking() {
        assert_eq!(
            (of("CONFIG_RUST"), of("CONFIG_DEVICE_PRIVATE"), of("rustc")),
            ("good", "good", "good")
        );
    }
    assert!(hmmctl(&["doctor"]).ends_with("Nothing was found that stops the driver.\n"));

    // Somebody who may not open the node.
    let (ok, out, _) = run(
        "setpriv",
        &["--reuid=65534", "--clear-groups", PROGRAM, "doctor"],
    );
    assert!(!ok && out.contains("STOP device nodes: "), "{out}");
    driver.finish();
}

/// Catches a manual or completions that cannot be made, or that leave out a verb.
#[test]
fn the_manual_and_the_completions_have_every_verb() {
    let folder = Path::new("/tmp/generated");
    fs::create_dir_all(folder).unwrap();
    for what in ["man", "bash", "zsh", "fish"] {
        hmmctl(&["generate", what, folder.to_str().unwrap()]);
    }
    for verb in [
        "list", "info", "bind", "unbind", "doctor", "stat", "map", "top", "trace",
    ] {
        let page = fs::read_to_string(folder.join(format!("hmmctl-{verb}.1"))).unwrap();
        assert!(page.contains(verb), "{verb}");
        for file in ["hmmctl.1", "hmmctl.bash", "_hmmctl", "hmmctl.fish"] {
            assert!(
                fs::read_to_string(folder.join(file))
                    .unwrap()
                    .contains(verb),
                "{file}: {verb}"
            );
        }
    }
    assert!(!folder.join("hmmctl-generate.1").exists());
}
