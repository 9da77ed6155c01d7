//! Which device and which strategy a context gets.

use std::sync::Arc;

use super::context::{is_named, SvmBuilder, Translated};
use super::doctor::available;
use super::{Strategy, SvmContext, SvmError};
use crate::sys::svm::driver::{self, Driver};
use crate::sys::vulkan::{facts, Facts, Gpu, Vendor};
use crate::{Device, Error};

/// How much memory Vulkan is asked for to be VRAM, if it is not said.
const EXPORTED_BYTES: usize = 16 << 20;

/// Builds a context: the first device with the first strategy that is available, of those that were asked for.
pub(crate) fn build(mut builder: SvmBuilder) -> Result<SvmContext, Error> {
    let all = facts()?;
    let names = || {
        all.iter()
            .map(|facts| facts.name.as_str())
            .collect::<Vec<_>>()
            .join(", ")
    };
    let wanted = builder.device.clone();
    let candidates: Vec<(usize, &Facts)> = all
        .iter()
        .enumerate()
        .filter(|(_, facts)| {
            wanted
                .as_deref()
                .is_none_or(|wanted| is_named(facts, wanted))
        })
        .collect();
    if candidates.is_empty() {
        return Err(SvmError::NoSuchDevice {
            wanted: wanted.map_or_else(
                || String::from("at all"),
                |wanted| format!("named `{wanted}`"),
            ),
            found: if all.is_empty() {
                String::from("none")
            } else {
                names()
            },
        }
        .into());
    }

    let strategies = builder
        .strategy
        .map_or(Strategy::ALL.to_vec(), |strategy| vec![strategy]);
    let mut backend = builder.backend.take();
    let mut device = builder.driver.take();
    let is_wanted = strategies.contains(&Strategy::Translated);
    let pools = if backend.is_some() || !is_wanted {
        Ok(())
    } else {
        driver::usable(device.as_ref())
    };
    let exported = builder.exported && backend.is_none();
    let mut first_reason = None;
    for strategy in strategies {
        for &(number, facts) in &candidates {
            let says = (builder.shares_page_tables, exported);
            if let Err(why) = available(facts, strategy, says, &pools) {
                first_reason.get_or_insert((strategy, facts.name.clone(), why));
                continue;
            }
            let gpu = Gpu::open(number, builder.validation)?;
            let (mut translated, mut driver) = (None, None);
            if strategy == Strategy::Translated && exported {
                let through = device.take().map_or_else(Device::open_first, Ok)?;
                let bytes = builder.pool_bytes.unwrap_or(EXPORTED_BYTES);
                let deadline = builder.deadline();
                let made = Translated::exported(&gpu, &through, bytes, deadline)?;
                (translated, driver) = (Some(made.0), Some(made.1));
            } else if strategy == Strategy::Translated {
                let backend = match backend.take() {
                    Some(backend) => backend,
                    None => {
                        let device = Arc::new(device.take().map_or_else(Device::open_first, Ok)?);
                        let pool = builder.pool_bytes;
                        let backend = Driver::new(&device, pool, builder.deadline())?;
                        driver = Some(device);
                        Box::new(backend)
                    }
                };
                translated = Some(Translated::new(&gpu, backend)?);
            }
            let context = SvmContext::assemble(gpu, strategy, translated, driver, builder)?;
            if strategy == Strategy::Native && facts.vendor != Vendor::Lavapipe {
                probe(&context)?;
            }
            return Ok(context);
        }
    }
    let (strategy, device, why) = first_reason.unwrap_or((
        Strategy::Copy,
        names(),
        String::from("no strategy was tried"),
    ));
    Err(SvmError::Unavailable {
        strategy,
        device,
        why,
    }
    .into())
}

/// Has a device that is said to share page tables show it: it reads one word of this process and writes another.
fn probe(context: &SvmContext) -> Result<(), Error> {
    let (from, index, mut to) = ([0x0018_2018_u32], [0_u32], [0_u32]);
    context.gather(&from, &index, &mut to)?;
    if to == from {
        return Ok(());
    }
    Err(SvmError::Unavailable {
        strategy: Strategy::Native,
        device: context.device_name().to_owned(),
        why: String::from("what it wrote at an address of this process did not arrive there"),
    }
    .into())
}
