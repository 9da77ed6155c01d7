//! The tests that run in the virtual GPU host: `bench/test guest_NAME` runs those of module NAME.
//!
//! One program, because each would have all of `common` compiled anew.

mod common;

mod abuse;
mod access;
mod advised;
mod around;
mod atomic;
mod conditions;
mod content;
mod debug_injection;
mod dma_buf;
mod dmirror;
mod execution;
mod failures;
mod fork;
mod fuzz;
mod hmmctl;
mod hostile;
mod kinds;
mod large;
mod large_split;
mod memory;
mod mirrors;
mod misuse;
mod misuse_mirror;
mod node;
mod outside;
mod oversubscribed;
mod patches;
mod pool;
mod power;
mod pressure;
mod queued;
mod races;
mod samples;
mod stock_tools;
mod stress;
mod survive;
mod svm;
mod table;
mod teardown;
mod traced;
mod twins;
mod unplug;
mod vram;
