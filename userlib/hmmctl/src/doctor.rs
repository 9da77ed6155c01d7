//! What can stop the driver on this host, in words.

mod access;
mod gpus;
mod kernel;
mod module;
mod vulkan;

use std::io::Write;
use std::process::ExitCode;

use serde_json::json;

use crate::cli::DoctorArgs;
use crate::error::Error;
use crate::host::Host;

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Good,
    /// It works, with less.
    Note,
    /// It does not work.
    Bad,
    /// It cannot be seen.
    Unknown,
}

/// One thing that was looked at.
#[derive(Debug)]
struct Finding {
    what: String,
    verdict: Verdict,
    /// What was seen.
    seen: String,
    /// What to do, if anything.
    advice: String,
}

impl Finding {
    fn new(
        what: impl Into<String>,
        verdict: Verdict,
        seen: impl Into<String>,
        advice: &str,
    ) -> Self {
        Self {
            what: what.into(),
            verdict,
            seen: seen.into(),
            advice: advice.to_owned(),
        }
    }

    fn good(what: impl Into<String>, seen: impl Into<String>) -> Self {
        Self::new(what, Verdict::Good, seen, "")
    }
}

/// Everything.
fn examine(host: &Host) -> Vec<Finding> {
    let mut findings = kernel::examine(host);
    findings.extend(module::examine(host));
    findings.extend(gpus::examine(host));
    findings.extend(access::examine(host));
    findings.extend(vulkan::examine(host));
    findings
}

/// The verb `doctor`.
pub fn run(host: &Host, args: &DoctorArgs, out: &mut dyn Write) -> Result<ExitCode, Error> {
    let findings = examine(host);
    let bad = findings
        .iter()
        .filter(|it| it.verdict == Verdict::Bad)
        .count();
    if args.json {
        let all: Vec<_> = findings
            .iter()
            .map(|it| {
                let verdict = match it.verdict {
                    Verdict::Good => "good",
                    Verdict::Note => "note",
                    Verdict::Bad => "bad",
                    Verdict::Unknown => "unknown",
                };
                json!({ "what": it.what, "verdict": verdict, "seen": it.seen, "advice": it.advice })
            })
            .collect();
        writeln!(out, "{}", json!({ "findings": all, "bad": bad }))?;
    } else {
        for finding in &findings {
            write(finding, out)?;
        }
        match bad {
            0 => writeln!(out, "\nNothing was found that stops the driver.")?,
            1 => writeln!(out, "\nOne thing stops the driver.")?,
            n => writeln!(out, "\n{n} things stop the driver.")?,
        }
    }
    Ok(if bad == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn write(finding: &Finding, out: &mut dyn Write) -> Result<(), Error> {
    let mark = match finding.verdict {
        Verdict::Good => "ok",
        Verdict::Note => "note",
        Verdict::Bad => "STOP",
        Verdict::Unknown => "?",
    };
    writeln!(out, "{mark:<5}{}: {}", finding.what, finding.seen)?;
    if !finding.advice.is_empty() {
        writeln!(out, "     -> {}", finding.advice)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;

    /// A host whose files are these.
    pub(super) fn host_of(root: &Path, files: &[(&str, &str)]) -> Host {
        let host = Host::below(root);
        for (path, text) in files {
            let path = host.path(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        host
    }

    /// The verdict of the one finding that is called so.
    #[track_caller]
    pub(super) fn verdict(findings: &[Finding], what: &str) -> Verdict {
        let mut found = findings.iter().filter(|it| it.what == what);
        let it = found
            .next()
            .unwrap_or_else(|| panic!("{what} in {findings:#?}"));
        assert!(found.next().is_none(), "{what} twice");
        assert_eq!(it.advice.is_empty(), it.verdict == Verdict::Good, "{it:?}");
        it.verdict
    }

    #[test]
    fn a_host_of_which_nothing_is_known_is_not_called_good() {
        let folder = tempfile::tempdir().unwrap();
        let mut out = vec![];
        let args = DoctorArgs { json: true };
        run(&host_of(folder.path(), &[]), &args, &mut out).unwrap();
        let answer: serde_json::Value = serde_json::from_slice(&out).unwrap();
        for finding in answer["findings"].as_array().unwrap() {
            assert_ne!(finding["verdict"], "good", "{finding}");
        }
    }
}
