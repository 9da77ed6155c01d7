//! The module: whether it is there, and whether this kernel would take it.

use super::{Finding, Verdict};
use crate::host::Host;

pub(super) fn examine(host: &Host) -> Vec<Finding> {
    vec![installed(host), signature(host)]
}

fn installed(host: &Host) -> Finding {
    let what = "module";
    if host.has("/sys/module/hmm_gpu") {
        return Finding::good(what, "loaded");
    }
    let release = host.text("/proc/sys/kernel/osrelease").unwrap_or_default();
    let at = ["updates", "extra", "kernel"]
        .iter()
        .flat_map(|folder| {
            ["", ".xz", ".zst", ".gz"]
                .map(|end| format!("/lib/modules/{release}/{folder}/hmm_gpu.ko{end}"))
        })
        .find(|path| host.has(path));
    match at {
        Some(path) => Finding::new(
            what,
            Verdict::Note,
            format!("not loaded ({path})"),
            "modprobe hmm_gpu",
        ),
        None => {
            let seen = format!("not loaded, and not installed for {release}");
            Finding::new(
                what,
                Verdict::Note,
                seen,
                "build it for this kernel and install it: `make driver KDIR=...`, `make install`",
            )
        }
    }
}

/// Whether a module that nobody signed is taken.
fn signature(host: &Host) -> Finding {
    let what = "module signature";
    let advice = "sign the module with a key that the kernel or the firmware knows: see Documentation/install.md";
    let enforced = host
        .text("/sys/module/module/parameters/sig_enforce")
        .map(|text| text == "Y");
    let lockdown = host.text("/sys/kernel/security/lockdown");
    let locked = lockdown.as_deref().and_then(|text| {
        let (_, rest) = text.split_once('[')?;
        Some(rest.split_once(']')?.0.to_owned())
    });
    let secure_boot = host
        .names("/sys/firmware/efi/efivars")
        .into_iter()
        .find(|name| name.starts_with("SecureBoot-"));
    // Four bytes of attributes, then its value. As text, since a byte below 128 is one character.
    let secure = secure_boot
        .and_then(|name| {
            std::fs::read(host.path(&format!("/sys/firmware/efi/efivars/{name}"))).ok()
        })
        .is_some_and(|bytes| bytes.get(4) == Some(&1));
    let boot = if secure { ", Secure Boot is on" } else { "" };
    match (enforced, locked.as_deref()) {
        (Some(true), _) => Finding::new(
            what,
            Verdict::Bad,
            format!("enforced (sig_enforce=Y){boot}"),
            advice,
        ),
        (_, Some(mode @ ("integrity" | "confidentiality"))) => Finding::new(
            what,
            Verdict::Bad,
            format!("enforced: the kernel is locked down ({mode}){boot}"),
            advice,
        ),
        (Some(false), Some("none")) => Finding::good(what, "not needed"),
        (Some(false), _) => Finding::good(
            what,
            "not needed (the kernel has no lockdown, or securityfs is not mounted)",
        ),
        (None, _) => Finding::new(what, Verdict::Unknown, "the kernel does not say", advice),
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{host_of, verdict};
    use super::*;

    #[test]
    fn a_kernel_that_takes_signed_modules_only_is_told() {
        let of = |files: &[(&str, &str)]| {
            let folder = tempfile::tempdir().unwrap();
            verdict(&examine(&host_of(folder.path(), files)), "module signature")
        };
        let enforce = "/sys/module/module/parameters/sig_enforce";
        let lockdown = "/sys/kernel/security/lockdown";
        assert_eq!(
            of(&[
                (enforce, "N\n"),
                (lockdown, "[none] integrity confidentiality\n")
            ]),
            Verdict::Good
        );
        assert_eq!(of(&[(enforce, "N\n")]), Verdict::Good);
        assert_eq!(of(&[(enforce, "Y\n")]), Verdict::Bad);
        assert_eq!(
            of(&[
                (enforce, "N\n"),
                (lockdown, "none [integrity] confidentiality\n")
            ]),
            Verdict::Bad
        );
        assert_eq!(of(&[]), Verdict::Unknown);
    }

    #[test]
    fn a_module_is_loaded_installed_or_missing() {
        let of = |files: &[(&str, &str)]| {
            let folder = tempfile::tempdir().unwrap();
            installed(&host_of(folder.path(), files)).seen
        };
        let release = ("/proc/sys/kernel/osrelease", "7.3.4");
        assert_eq!(
            of(&[release, ("/sys/module/hmm_gpu/refcnt", "0")]),
            "loaded"
        );
        assert!(
            of(&[release, ("/lib/modules/7.3.4/updates/hmm_gpu.ko", "")])
                .contains("updates/hmm_gpu.ko")
        );
        assert!(of(&[release]).contains("not installed"));
    }
}
