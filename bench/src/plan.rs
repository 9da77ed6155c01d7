//! How much is measured: it depends on how long that takes.

use std::time::Duration;

/// How long a run may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plan {
    /// `BENCH_QUICK=1`: whether it works, and a first impression.
    Quick,
    /// In the virtual GPU host, on processors emulated in software.
    Emulated,
    /// On a host of its own.
    Full,
}

impl Plan {
    /// As the environment says: `BENCH_QUICK`, and `HMM_GPU_BENCH_EMULATED`, which is set in the virtual GPU host.
    pub fn from_env() -> Self {
        Self::of(|name| std::env::var(name).ok())
    }

    fn of(variable: impl Fn(&str) -> Option<String>) -> Self {
        let is_set =
            |name| variable(name).is_some_and(|value| !["", "0"].contains(&value.as_str()));
        if is_set("BENCH_QUICK") {
            Self::Quick
        } else if is_set("HMM_GPU_BENCH_EMULATED") {
            Self::Emulated
        } else {
            Self::Full
        }
    }

    /// Its name, in the summary.
    pub fn name(self) -> &'static str {
        match self {
            Self::Quick => "quick",
            Self::Emulated => "emulated",
            Self::Full => "full",
        }
    }

    /// Of several sizes in bytes, ascending, those that are measured. The first two always are.
    pub fn sizes(self, all: &[usize]) -> Vec<usize> {
        let most = match self {
            Self::Quick => 2 << 20,
            Self::Emulated => 64 << 20,
            Self::Full => usize::MAX,
        };
        let within = |(i, size): &(usize, &usize)| *i < 2 || **size <= most;
        let sizes = all.iter().enumerate().filter(within);
        sizes.map(|(_, size)| *size).collect()
    }

    /// How much memory what has no sizes works on, in bytes.
    pub fn working_bytes(self) -> usize {
        match self {
            Self::Quick => 2 << 20,
            Self::Emulated => 8 << 20,
            Self::Full => 64 << 20,
        }
    }

    /// How long each thing is timed.
    pub fn time(self) -> Duration {
        Duration::from_millis(match self {
            Self::Quick => 50,
            Self::Emulated => 1500,
            Self::Full => 5000,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_says_which() {
        let plan = |quick: &str, emulated: &str| {
            Plan::of(|name| {
                let value = if name == "BENCH_QUICK" {
                    quick
                } else {
                    emulated
                };
                (value != "-").then(|| value.to_owned())
            })
        };
        assert_eq!(plan("-", "-"), Plan::Full);
        assert_eq!(plan("0", ""), Plan::Full);
        assert_eq!(plan("", "1"), Plan::Emulated);
        assert_eq!(plan("1", "1"), Plan::Quick);
    }

    #[test]
    fn a_quick_run_leaves_out_what_is_large() {
        let all = [4 << 10, 1 << 20, 2 << 20, 64 << 20, 256 << 20];
        assert_eq!(Plan::Quick.sizes(&all), all[..3]);
        assert_eq!(Plan::Emulated.sizes(&all), all[..4]);
        assert_eq!(Plan::Full.sizes(&all), all);
        assert_eq!(Plan::Quick.sizes(&all[3..]), all[3..]);
    }
}
