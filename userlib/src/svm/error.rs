//! What can go wrong between a program and a Vulkan device.

/// What can go wrong with shared virtual addressing. Comes as [`Error::Svm`](crate::Error::Svm).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SvmError {
    /// There is no Vulkan on this system.
    #[error("no Vulkan: its loader cannot be opened ({reason}); install `libvulkan1` and the driver of a device")]
    NoLoader {
        /// What the system says.
        reason: String,
    },

    /// There is no Vulkan device that was asked for.
    #[error("no Vulkan device {wanted}: there are {found}")]
    NoSuchDevice {
        /// What was asked for.
        wanted: String,
        /// The names of those there are.
        found: String,
    },

    /// A device lacks what this library cannot do without.
    #[error("the Vulkan device {device} lacks {what}")]
    Lacks {
        /// The name of the device.
        device: String,
        /// What is missing.
        what: String,
    },

    /// A strategy that was asked for is not to be had.
    #[error("the strategy `{strategy}` is not available on {device}: {why}")]
    Unavailable {
        /// The strategy.
        strategy: super::Strategy,
        /// The name of the Vulkan device.
        device: String,
        /// Why not.
        why: String,
    },

    /// Vulkan refused a call.
    #[error("Vulkan refused {attempt}: {answer}")]
    Vulkan {
        /// What was asked.
        attempt: &'static str,
        /// Its answer.
        answer: String,
    },

    /// What was given is no kernel that can be run.
    #[error("not a kernel: {problem}")]
    NotAKernel {
        /// What is wrong with it.
        problem: String,
    },

    /// A kernel was given to another context than the one that made it.
    #[error("the kernel `{kernel}` was made by another context")]
    Foreign {
        /// Its name.
        kernel: String,
    },

    /// More invocations than can be counted.
    #[error("{groups} groups of {group} invocations are more than a dispatch can have")]
    TooMany {
        /// Groups.
        groups: u64,
        /// Invocations of each.
        group: u32,
    },

    /// An edge of a graph, or a search in it, names a node that it does not have.
    #[error("there is no node {node} in the graph: it has {nodes}, counted from 0")]
    NoSuchNode {
        /// The node.
        node: usize,
        /// Nodes that there are.
        nodes: usize,
    },

    /// The kernel touched memory that the dispatch was not told of.
    #[error(
        "the kernel `{kernel}` touched {addr:#x}, which no argument covers: with the strategy `{strategy}` all that a kernel reaches \
         must be named (`Args::read`, `write`, `reach`), and to be written to, as such"
    )]
    OutOfReach {
        /// The kernel.
        kernel: String,
        /// The address.
        addr: usize,
        /// The strategy.
        strategy: super::Strategy,
    },

    /// The kernel touched what can never be in VRAM, or is kept out of it.
    #[error("the kernel `{kernel}` touched {addr:#x}, which cannot be in VRAM: {why}")]
    NotInVram {
        /// The kernel.
        kernel: String,
        /// The address.
        addr: usize,
        /// Why not.
        why: String,
    },

    /// A shader did what it must not.
    #[error("the kernel `{kernel}` {what}")]
    Misuse {
        /// The kernel.
        kernel: String,
        /// What it did.
        what: String,
    },

    /// What one invocation touches at once does not fit.
    #[error(
        "the kernel `{kernel}` does not get on at {addr:#x}: what one invocation needs at once is more than the {pages} pages of the \
         pool (have it need less, or make the pool larger), or something keeps touching more pages than can be used by copies (give what \
         kernels use pages of its own: `SharedBuf`)"
    )]
    Stuck {
        /// The kernel.
        kernel: String,
        /// What was missed last.
        addr: usize,
        /// Pages that there is room for.
        pages: usize,
    },

    /// An execution was taken away before the work was done: others waited until the deadline for a page that it might use. The context works
    /// on; the data has to be made anew. The driver does not say which page that was, but in its trace: `Documentation/svm.md`.
    #[error(
        "the execution of `{kernel}` was lost: it took longer than its deadline of {deadline_ms} ms while something waited for its \
         pages; what it has written is not known (touch nothing that a kernel uses before its dispatch is done, nor fork, and give it pages of \
         its own, `SharedBuf`; the trace event hmm_gpu_cpu_fault with outcome `later` names what waited)"
    )]
    Lost {
        /// The kernel.
        kernel: String,
        /// The deadline.
        deadline_ms: u32,
    },
}

impl SvmError {
    /// That a page does not go to VRAM, and why, as far as the system tells: for a [`Backend`](crate::Backend).
    pub fn not_in_vram(addr: usize) -> Self {
        SvmError::NotInVram {
            kernel: String::new(),
            addr,
            why: super::reason::why(addr),
        }
    }
}
