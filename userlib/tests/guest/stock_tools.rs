//! The programs with which people read trace events read the driver's: on the stock kernel only, for the checking one has no BPF.
//!
//! Runs in the virtual GPU host: `bench/test guest_stock_tools`.

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use crate::common::driver::Driver;
use crate::common::kernel::{mount_tracing, number};
use crate::common::memory::Area;
use crate::common::to_device;
use hmm_gpu::Device;

/// What a program prints, that must end well.
#[track_caller]
fn output(program: &str, arguments: &[&str]) -> String {
    let done = Command::new(program).args(arguments).output().unwrap();
    let text = String::from_utf8_lossy(&done.stdout) + String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{program} {arguments:?}: {text}");
    text.into_owned()
}

/// Catches events that trace-cmd cannot read: what it records of a known amount of work, and how it shows that.
#[test]
fn trace_cmd_reads_the_events() {
    mount_tracing();
    let driver = Driver::load("soft=1 soft_mib=16");
    let device = Device::open(0).unwrap();
    let file = "/tmp/hmm_gpu.dat";
    let run = |arguments: &[&str]| output("trace-cmd", arguments);
    run(&["start", "-e", "hmm_gpu"]);
    let area = Area::filled(100, 1);
    to_device(&device, *area);
    area.check(1);
    run(&["stop"]);
    run(&["extract", "-o", file]);
    let report = run(&["report", "-i", file]);
    run(&["reset"]);
    let moved = |cause: &str| -> u64 {
        let mark = format!("hmm_gpu0 {cause}: ");
        let lines = report.lines().filter(|line| line.contains(&mark));
        lines.map(|line| number(line, "moved")).sum()
    };
    assert_eq!(moved("request to device"), 100, "{report}");
    assert_eq!(moved("cpu fault"), 100, "{report}");
    let faults = report
        .lines()
        .filter(|line| line.contains("hmm_gpu_cpu_fault:"));
    assert_eq!(faults.count() as u64, device.counters().unwrap().cpu_faults);
    fs::remove_file(file).unwrap();
    drop((area, device));
    driver.finish();
}

/// Catches events that bpftrace cannot read: sums that it makes of their fields.
#[test]
fn bpftrace_reads_the_events() {
    mount_tracing();
    let driver = Driver::load("soft=1 soft_mib=16");
    let device = Device::open(0).unwrap();
    // What comes last is there when the first has said so.
    let program = "tracepoint:hmm_gpu:hmm_gpu_migrate { @moved[args.cause] = sum(args.moved); } \
                   tracepoint:hmm_gpu:hmm_gpu_cpu_fault { @faults = count(); } \
                   interval:ms:500 { printf(\"ready\\n\"); }";
    let mut bpftrace = Command::new("bpftrace")
        .args(["-e", program])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(bpftrace.stdout.take().unwrap()).lines();
    let mut ready = lines.by_ref().map(Result::unwrap);
    // The second time: all probes are there.
    assert!(ready.any(|line| line == "ready") && ready.any(|line| line == "ready"));
    let area = Area::filled(100, 1);
    to_device(&device, *area);
    area.check(1);
    // SAFETY: our child, which nobody has waited for.
    unsafe { libc::kill(bpftrace.id() as libc::pid_t, libc::SIGINT) };
    let text: Vec<String> = lines.map(Result::unwrap).collect();
    assert!(bpftrace.wait().unwrap().success());
    let has = |line: &str| text.iter().any(|one| one.trim() == line);
    assert!(has("@moved[0]: 100") && has("@moved[3]: 100"), "{text:?}");
    let faults = device.counters().unwrap().cpu_faults;
    assert!(has(&format!("@faults: {faults}")), "{text:?}");
    drop((area, device));
    driver.finish();
}

/// Catches events that perf cannot read: of a program that moves memory, the sums that the device has.
#[test]
fn perf_reads_the_events() {
    mount_tracing();
    let driver = Driver::load("soft=1 soft_mib=16");
    let device = Device::open(0).unwrap();
    let file = "/tmp/hmm_gpu.data";
    let record = [
        "record",
        "--quiet",
        "--event",
        "hmm_gpu:*",
        "--output",
        file,
    ];
    output(
        "perf",
        &[&record[..], &["target/tree/release/mirror"]].concat(),
    );
    let script = output("perf", &["script", "--input", file]);
    let of = |event: &str| -> Vec<&str> {
        let mark = format!("hmm_gpu:{event}: ");
        script.lines().filter(|line| line.contains(&mark)).collect()
    };
    let moved = |cause: &str| -> u64 {
        let lines = of("hmm_gpu_migrate");
        let lines = lines.iter().filter(|line| line.contains(cause));
        lines.map(|line| number(line, "moved")).sum()
    };
    let work = device.counters().unwrap();
    assert!(work.to_device_pages > 0 && work.cpu_faults > 0, "{work:#?}");
    assert_eq!(moved(" to device: "), work.to_device_pages, "{script}");
    assert_eq!(moved("cpu fault: "), work.fault_back_pages, "{script}");
    assert_eq!(of("hmm_gpu_cpu_fault").len() as u64, work.cpu_faults);
    fs::remove_file(file).unwrap();
    drop(device);
    driver.finish();
}
