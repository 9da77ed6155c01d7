//! In which ways the library can have a Vulkan shader work on a program's memory here.

use hmm_gpu::Doctor;

use super::{Finding, Verdict};
use crate::host::Host;

/// Of each Vulkan device each strategy.
pub(super) fn examine(host: &Host) -> Vec<Finding> {
    // Vulkan's loader looks at this host, whatever folder stands for one in a test.
    if host.is_this() {
        told(&hmm_gpu::doctor())
    } else {
        vec![]
    }
}

fn told(doctor: &Doctor) -> Vec<Finding> {
    let none = |why: &str| {
        let advice =
            "the driver works without; for shaders install libvulkan1 and the Vulkan driver of a GPU, or Mesa's of processors";
        vec![Finding::new("Vulkan", Verdict::Note, why, advice)]
    };
    let devices = match &doctor.devices {
        Err(why) => return none(why),
        Ok(devices) if devices.is_empty() => return none("the loader knows of no device"),
        Ok(devices) => devices,
    };
    let each = devices.iter().flat_map(|device| {
        let strategies = device.strategies.iter();
        let each = strategies.map(|(strategy, usable)| (strategy.to_string(), usable));
        let exported = (String::from("its memory as VRAM"), &device.exported);
        each.chain([exported]).map(move |it| (device, it))
    });
    each.map(|(device, (way, usable))| {
        let what = format!("Vulkan, {}, {way}", device.device);
        match usable {
            Ok(()) => Finding::good(what, "available"),
            Err(why) => Finding::new(
                what,
                Verdict::Note,
                format!("not available: {why}"),
                "shaders can use the others that are available",
            ),
        }
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use hmm_gpu::{Diagnosis, Strategy};

    use super::super::tests::verdict;
    use super::*;

    #[test]
    fn what_is_not_available_is_told_with_its_reason_and_stops_nothing() {
        let lacks = Err(String::from("it lacks a thing"));
        let device = Diagnosis {
            device: "one".into(),
            driver: "two".into(),
            strategies: vec![(Strategy::Copy, Ok(())), (Strategy::Native, lacks.clone())],
            exported: lacks,
        };
        let found = told(&Doctor {
            devices: Ok(vec![device]),
            drivers: vec![],
        });
        assert_eq!(verdict(&found, "Vulkan, one, copy"), Verdict::Good);
        assert_eq!(verdict(&found, "Vulkan, one, native"), Verdict::Note);
        assert!(found[1].seen.ends_with("it lacks a thing"), "{found:?}");
        for devices in [Ok(vec![]), Err(String::from("no loader"))] {
            let none = told(&Doctor {
                devices,
                drivers: vec![],
            });
            assert_eq!(verdict(&none, "Vulkan"), Verdict::Note);
        }
    }
}
