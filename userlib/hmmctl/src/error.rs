//! What can go wrong, in words.

use std::io;

/// An error of the tool's. Shown as what was tried and what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A device or the driver.
    #[error(transparent)]
    Device(#[from] hmm_gpu::Error),
    /// What is written cannot be written.
    #[error("cannot write: {0}")]
    Output(#[from] io::Error),
    /// A file of the kernel's.
    #[error("{path}: {source}{}", if source.kind() == io::ErrorKind::PermissionDenied { " (this needs root)" } else { "" })]
    File { path: String, source: io::Error },
    /// Anything else, said in full.
    #[error("{0}")]
    Said(String),
}

impl Error {
    /// An error of a file.
    pub fn of(path: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        |source| Error::File { path, source }
    }

    /// In words of its own.
    pub fn said<T>(text: impl Into<String>) -> Result<T, Self> {
        Err(Error::Said(text.into()))
    }
}
