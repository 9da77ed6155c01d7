//! Which device and which strategy a context gets.

use super::context::{is_named, SvmBuilder, Translated};
use super::doctor::available;
use super::{Strategy, SvmContext, SvmError};
use crate::sys::vulkan::{facts, Facts, Gpu, Vendor};
use crate::Error;

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
    let backend = builder.backend.take();
    let pools = if backend.is_some() {
        Ok(())
    } else {
        Err(String::from("it was given no backend"))
    };
    let mut first_reason = None;
    for strategy in strategies {
        for &(number, facts) in &candidates {
            if let Err(why) = available(facts, strategy, builder.shares_page_tables, &pools) {
                first_reason.get_or_insert((strategy, facts.name.clone(), why));
                continue;
            }
            let gpu = Gpu::open(number, builder.validation)?;
            let translated = match backend {
                Some(backend) if strategy == Strategy::Translated => {
                    Some(Translated::new(&gpu, backend)?)
                }
                _ => None,
            };
            let context = SvmContext::assemble(gpu, strategy, translated, builder)?;
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
