//! Who may use it, and what there is to look at it with.

use hmm_gpu::Device;

use super::{Finding, Verdict};
use crate::host::Host;

pub(super) fn examine(host: &Host) -> Vec<Finding> {
    vec![
        rule(host),
        nodes(host),
        huge_pages(host),
        pagemap(host),
        tracing(host),
    ]
}

fn rule(host: &Host) -> Finding {
    let at = [
        "/etc/udev/rules.d",
        "/usr/local/lib/udev/rules.d",
        "/usr/lib/udev/rules.d",
        "/lib/udev/rules.d",
    ]
    .iter()
    .map(|folder| format!("{folder}/90-hmm-gpu.rules"))
    .find(|path| host.has(path));
    match at {
        Some(path) => Finding::good("udev rule", path),
        None => {
            let advice = "`make install` puts 90-hmm-gpu.rules there, which opens the nodes to the group `render`";
            Finding::new(
                "udev rule",
                Verdict::Note,
                "not installed: only root can open the nodes",
                advice,
            )
        }
    }
}

fn nodes(host: &Host) -> Finding {
    let units = host.names("/dev").into_iter().filter(|name| {
        name.strip_prefix("hmm_gpu")
            .is_some_and(|unit| unit.parse::<u32>().is_ok())
    });
    let refused: Vec<String> = units
        .clone()
        .filter_map(|name| Device::open_path(host.path(&format!("/dev/{name}"))).err())
        .map(|error| error.to_string())
        .collect();
    let there: Vec<String> = units.collect();
    if there.is_empty() {
        return Finding::new(
            "device nodes",
            Verdict::Note,
            "none",
            "load the module, or bind a device (`hmmctl bind`)",
        );
    }
    match refused.first() {
        None => Finding::good(
            "device nodes",
            format!("{}: can be opened", there.join(", ")),
        ),
        Some(error) => Finding::new(
            "device nodes",
            Verdict::Bad,
            error.as_str(),
            "be in the group `render`, or be root",
        ),
    }
}

fn huge_pages(host: &Host) -> Finding {
    let what = "transparent huge pages";
    let advice = "with `madvise` or `always` in /sys/kernel/mm/transparent_hugepage/enabled, 2 MiB move whole";
    match host.text("/sys/kernel/mm/transparent_hugepage/enabled") {
        Some(text) if text.contains("[never]") => Finding::new(
            what,
            Verdict::Note,
            "never: memory moves page by page",
            advice,
        ),
        Some(text) => Finding::good(what, text),
        None => Finding::new(what, Verdict::Unknown, "the kernel does not say", advice),
    }
}

fn pagemap(host: &Host) -> Finding {
    let advice =
        "run `hmmctl map` and `hmmctl top` as root: only root is told which pages are in VRAM";
    let what = "looking at other processes";
    match host.text("/proc/iomem") {
        // To others all addresses are 0.
        Some(iomem)
            if iomem
                .lines()
                .any(|line| !line.trim_start().starts_with("00000000-00000000")) =>
        {
            Finding::good(what, "allowed")
        }
        Some(_) => Finding::new(what, Verdict::Note, "not allowed to this user", advice),
        None => Finding::new(what, Verdict::Unknown, "no /proc/iomem", advice),
    }
}

fn tracing(host: &Host) -> Finding {
    let advice =
        "`hmmctl trace` needs root and tracefs: mount -t tracefs tracefs /sys/kernel/tracing";
    match host.has("/sys/kernel/tracing/events") {
        true => Finding::good("trace events", "/sys/kernel/tracing"),
        false => Finding::new(
            "trace events",
            Verdict::Note,
            "no tracefs, or not to be seen by this user",
            advice,
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{host_of, verdict};
    use super::*;

    #[test]
    fn what_is_missing_for_users_is_told() {
        let of = |files: &[(&str, &str)], what: &str| {
            let folder = tempfile::tempdir().unwrap();
            verdict(&examine(&host_of(folder.path(), files)), what)
        };
        assert_eq!(of(&[], "udev rule"), Verdict::Note);
        assert_eq!(
            of(&[("/etc/udev/rules.d/90-hmm-gpu.rules", "")], "udev rule"),
            Verdict::Good
        );
        assert_eq!(of(&[], "device nodes"), Verdict::Note);
        // A node that is none.
        assert_eq!(of(&[("/dev/hmm_gpu0", "")], "device nodes"), Verdict::Bad);
        let enabled = "/sys/kernel/mm/transparent_hugepage/enabled";
        assert_eq!(
            of(
                &[(enabled, "always madvise [never]")],
                "transparent huge pages"
            ),
            Verdict::Note
        );
        assert_eq!(
            of(
                &[(enabled, "always [madvise] never")],
                "transparent huge pages"
            ),
            Verdict::Good
        );
        let hidden = "00000000-00000000 : System RAM";
        assert_eq!(
            of(&[("/proc/iomem", hidden)], "looking at other processes"),
            Verdict::Note
        );
        assert_eq!(
            of(
                &[("/proc/iomem", "00001000-0009fbff : System RAM")],
                "looking at other processes"
            ),
            Verdict::Good
        );
    }
}
