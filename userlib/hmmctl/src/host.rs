//! The kernel's files: `/proc`, `/sys`, `/dev` and what belongs to them.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::error::Error;

/// A host, as its files show it. In tests these are in a folder.
pub struct Host {
    root: PathBuf,
}

impl Host {
    /// This one.
    pub fn this() -> Self {
        Self { root: "/".into() }
    }

    /// One whose files are below a folder.
    #[cfg(test)]
    pub fn below(root: &Path) -> Self {
        Self { root: root.into() }
    }

    /// Whether it is the one that this program runs on.
    pub fn is_this(&self) -> bool {
        self.root == Path::new("/")
    }

    /// Where a file is.
    pub fn path(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    /// The text of a file, without space around it.
    pub fn read(&self, path: &str) -> Result<String, Error> {
        let bytes = fs::read(self.path(path)).map_err(Error::of(path))?;
        Ok(String::from_utf8_lossy(&bytes).trim().to_owned())
    }

    /// The same, if there is such a file and it can be read.
    pub fn text(&self, path: &str) -> Option<String> {
        self.read(path).ok()
    }

    /// Writes to a file that is there.
    pub fn write(&self, path: &str, text: &str) -> Result<(), Error> {
        fs::OpenOptions::new()
            .write(true)
            .open(self.path(path))
            .and_then(|mut file| io::Write::write_all(&mut file, text.as_bytes()))
            .map_err(Error::of(path))
    }

    /// Whether there is such a file.
    pub fn has(&self, path: &str) -> bool {
        self.path(path).exists()
    }

    /// The names in a folder, in order.
    pub fn names(&self, folder: &str) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(self.path(folder))
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect();
        names.sort();
        names
    }

    /// The last part of what a link points to.
    pub fn link(&self, path: &str) -> Option<String> {
        let target = fs::read_link(self.path(path)).ok()?;
        Some(target.file_name()?.to_str()?.to_owned())
    }

    /// The processes, by number.
    pub fn processes(&self) -> Vec<u32> {
        let names = self.names("/proc");
        let mut pids: Vec<u32> = names.iter().filter_map(|name| name.parse().ok()).collect();
        pids.sort_unstable();
        pids
    }

    /// What a process is called.
    pub fn comm(&self, pid: u32) -> String {
        self.text(&format!("/proc/{pid}/comm")).unwrap_or_default()
    }

    /// Whether a process has one of these files open or mapped.
    pub fn holds(&self, pid: u32, files: &[PathBuf]) -> bool {
        let folder = format!("/proc/{pid}/fd");
        let open = self.names(&folder).iter().any(|fd| {
            fs::read_link(self.path(&format!("{folder}/{fd}")))
                .is_ok_and(|target| files.contains(&target))
        });
        open || self.text(&format!("/proc/{pid}/maps")).is_some_and(|maps| {
            maps.lines()
                .filter_map(|line| line.find('/').map(|at| &line[at..]))
                .any(|name| files.iter().any(|file| file == Path::new(name)))
        })
    }
}
