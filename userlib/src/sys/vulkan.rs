//! Vulkan, as far as shared virtual addressing needs it: a device, buffers with addresses, the program's own pages as a
//! buffer, a compute pipeline, and a submission that is waited for.
//!
//! What a shader does to memory is not known here. All else is safe to call: what is given out is freed before its device is, and nothing is freed
//! while a submission runs, since every submission is waited for.

mod buffer;
mod facts;
mod gpu;
mod messages;
mod run;

pub(crate) use buffer::{Buffer, External, Place};
pub(crate) use facts::{facts, Facts, Vendor};
pub(crate) use gpu::Gpu;
pub(crate) use run::{Copy, Pipeline, Push};

use ash::vk;

use crate::{Error, SvmError};

/// The error of a call that Vulkan refused.
fn refused(attempt: &'static str) -> impl Fn(vk::Result) -> Error {
    move |answer| {
        SvmError::Vulkan {
            attempt,
            answer: format!("{answer} ({answer:?})"),
        }
        .into()
    }
}
