//! What the benchmarks in `benches/` have in common, and the report that is made of what they leave.
//!
//! A benchmark times one thing again and again. Criterion makes its own report of that; beside it each [`record::Measurement`] is written
//! to a file as it ends, and `hmm-gpu-report` makes `summary.json` and a page with plots of them (`Documentation/benchmarks.md`).

#![deny(unsafe_code)]

pub mod comparison;
pub mod crossover;
pub mod page;
pub mod plan;
pub mod plot;
pub mod record;
pub mod spread;
pub mod summary;

/// Bytes of a page, for which costs are given.
pub const PAGE: usize = 4096;
/// Bytes of a huge page.
pub const HUGE_PAGE: usize = 2 << 20;
