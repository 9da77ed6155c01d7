//! The kernel: its series, its configuration, and the compilers for modules of it.

use std::collections::HashMap;
use std::process::Command;

use super::{Finding, Verdict};
use crate::host::Host;

/// The series that the driver is built for.
const SERIES: &str = "7.3.";

/// What the driver cannot be without.
const NEEDED: [(&str, &str); 5] = [
    ("CONFIG_RUST", "modules in Rust"),
    ("CONFIG_DEVICE_PRIVATE", "device-private pages"),
    ("CONFIG_HMM_MIRROR", "mirrors of address spaces"),
    ("CONFIG_GPU_BUDDY", "the allocator for VRAM"),
    ("CONFIG_MODULES", "modules"),
];

/// What makes it more useful.
const USEFUL: [(&str, &str); 3] = [
    ("CONFIG_TRANSPARENT_HUGEPAGE", "2 MiB move whole"),
    (
        "CONFIG_PROC_PAGE_MONITOR",
        "`hmmctl map` and `top` see where pages are",
    ),
    ("CONFIG_EVENT_TRACING", "`hmmctl trace`"),
];

pub(super) fn examine(host: &Host) -> Vec<Finding> {
    let Some(release) = host.text("/proc/sys/kernel/osrelease") else {
        return vec![Finding::new(
            "kernel",
            Verdict::Unknown,
            "no /proc/sys/kernel/osrelease",
            "mount /proc",
        )];
    };
    let series = if release.starts_with(SERIES) {
        Finding::good("kernel", release.as_str())
    } else {
        let advice = "the driver is built for the 7.3 series: interfaces in the kernel differ from one series to the next";
        Finding::new("kernel", Verdict::Bad, release.as_str(), advice)
    };
    let mut findings = vec![series];
    match configuration(host, &release) {
        Some(config) => {
            findings.extend(options(&config));
            findings.extend(compilers(&config, host.has("/sys/module/hmm_gpu")));
        }
        None => findings.push(Finding::new(
            "kernel configuration",
            Verdict::Unknown,
            "not found in /boot, /proc/config.gz or the kernel's headers",
            "install the headers of the running kernel",
        )),
    }
    findings
}

/// The options that are set, and to what.
fn configuration(host: &Host, release: &str) -> Option<HashMap<String, String>> {
    let text = [
        format!("/boot/config-{release}"),
        format!("/lib/modules/{release}/config"),
        format!("/lib/modules/{release}/build/.config"),
        format!("/usr/src/linux-headers-{release}/.config"),
        format!("/usr/src/linux-{release}/.config"),
    ]
    .iter()
    .find_map(|path| host.text(path))
    .or_else(|| unpacked(host))?;
    Some(parse(&text))
}

fn unpacked(host: &Host) -> Option<String> {
    let path = host.path("/proc/config.gz");
    if !path.exists() {
        return None;
    }
    let output = Command::new("gzip").arg("-dc").arg(path).output().ok()?;
    output
        .status
        .success()
        .then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

fn parse(text: &str) -> HashMap<String, String> {
    let lines = text.lines().filter(|line| line.starts_with("CONFIG_"));
    lines
        .filter_map(|line| line.split_once('='))
        .map(|(name, value)| (name.to_owned(), value.trim_matches('"').to_owned()))
        .collect()
}

fn options(config: &HashMap<String, String>) -> Vec<Finding> {
    let set = |name: &str| {
        config
            .get(name)
            .is_some_and(|value| value == "y" || value == "m")
    };
    let needed = NEEDED.into_iter().map(|(name, what)| match set(name) {
        true => Finding::good(name, what),
        false => {
            let advice =
                "take a kernel that has it: Debian's linux-image-amd64 of trixie-backports does";
            Finding::new(name, Verdict::Bad, format!("off: {what}"), advice)
        }
    });
    let useful = USEFUL.into_iter().map(|(name, what)| match set(name) {
        true => Finding::good(name, what),
        false => Finding::new(
            name,
            Verdict::Note,
            format!("off: {what}"),
            "the driver works without",
        ),
    });
    needed.chain(useful).collect()
}

/// Modules need the compiler that the kernel was built with: symbols of Rust code have a hash that depends on it.
fn compilers(config: &HashMap<String, String>, built: bool) -> Vec<Finding> {
    let version = |program: &str| {
        let output = Command::new(program).arg("--version").output().ok()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        text.lines().next().map(str::to_owned)
    };
    let rustc = config.get("CONFIG_RUSTC_VERSION_TEXT").map(String::as_str);
    let gcc = config.get("CONFIG_CC_VERSION_TEXT").map(String::as_str);
    vec![
        compared("rustc", rustc, version("rustc").as_deref(), !built),
        // Its text begins with the name that it was called by.
        compared(
            "C compiler",
            gcc.map(without_name),
            version("gcc").as_deref().map(without_name),
            false,
        ),
    ]
}

fn without_name(text: &str) -> &str {
    text.split_once(' ').map_or(text, |(_, rest)| rest)
}

fn compared(what: &str, kernel: Option<&str>, host: Option<&str>, stops: bool) -> Finding {
    let advice = "only to build the module here: take the distribution's own packages of the kernel's release";
    match (kernel, host) {
        (Some(kernel), Some(host)) if kernel == host => Finding::good(what, host),
        (Some(kernel), Some(host)) => {
            let verdict = if stops { Verdict::Bad } else { Verdict::Note };
            Finding::new(
                what,
                verdict,
                format!("{host}, but the kernel was built with {kernel}"),
                advice,
            )
        }
        (Some(kernel), None) => Finding::new(
            what,
            Verdict::Note,
            format!("not here; the kernel was built with {kernel}"),
            advice,
        ),
        (None, _) => Finding::new(
            what,
            Verdict::Unknown,
            "the configuration does not say which one the kernel had",
            advice,
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{host_of, verdict};
    use super::*;

    const RELEASE: (&str, &str) = ("/proc/sys/kernel/osrelease", "7.3.4+deb13-amd64\n");

    #[test]
    fn an_option_that_is_off_or_missing_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let config = "CONFIG_RUST=y\nCONFIG_DEVICE_PRIVATE=y\n# CONFIG_GPU_BUDDY is not set\nCONFIG_MODULES=y\nCONFIG_HMM_MIRROR=y\n";
        let host = host_of(
            folder.path(),
            &[RELEASE, ("/boot/config-7.3.4+deb13-amd64", config)],
        );
        let findings = examine(&host);
        assert_eq!(verdict(&findings, "kernel"), Verdict::Good);
        assert_eq!(verdict(&findings, "CONFIG_RUST"), Verdict::Good);
        assert_eq!(verdict(&findings, "CONFIG_GPU_BUDDY"), Verdict::Bad);
        assert_eq!(
            verdict(&findings, "CONFIG_TRANSPARENT_HUGEPAGE"),
            Verdict::Note
        );
        assert_eq!(verdict(&findings, "rustc"), Verdict::Unknown);
    }

    #[test]
    fn another_series_or_no_configuration_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let findings = examine(&host_of(folder.path(), &[(RELEASE.0, "6.12.9-amd64")]));
        assert_eq!(verdict(&findings, "kernel"), Verdict::Bad);
        assert_eq!(verdict(&findings, "kernel configuration"), Verdict::Unknown);
    }

    #[test]
    fn another_compiler_of_rust_stops_and_another_gcc_does_not() {
        let same = compared("rustc", Some("rustc 1.85.0"), Some("rustc 1.85.0"), true);
        assert_eq!(same.verdict, Verdict::Good);
        let other = compared("rustc", Some("rustc 1.85.0"), Some("rustc 1.90.0"), true);
        assert_eq!(other.verdict, Verdict::Bad);
        let gcc = compared("C compiler", Some("14"), Some("13"), false);
        assert_eq!(gcc.verdict, Verdict::Note);
        assert_eq!(
            compared("rustc", Some("rustc 1.85.0"), None, true).verdict,
            Verdict::Note
        );
    }
}
