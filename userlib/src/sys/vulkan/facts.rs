//! What there is to know of a Vulkan device before it is used.

use std::ffi::CStr;

use ash::{ext, khr, vk};

use super::buffer::USAGE;
use super::gpu::{instance, Instance};
use super::refused;
use crate::Error;

/// Who made a device's driver, as far as it makes a difference here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Vendor {
    /// Mesa's implementation on the processor: what a shader touches is touched by a thread of this process.
    Lavapipe,
    /// Anyone else.
    Other,
}

/// A Vulkan device, looked at.
#[derive(Clone, Debug)]
pub(crate) struct Facts {
    pub(super) physical: vk::PhysicalDevice,
    pub(crate) name: String,
    pub(crate) driver: String,
    pub(crate) vendor: Vendor,
    pub(crate) api: (u32, u32),
    /// The family of the queue that computes.
    pub(super) family: Option<u32>,
    pub(crate) int64: bool,
    pub(crate) addresses: bool,
    pub(crate) atomic64: bool,
    pub(crate) float64: bool,
    /// `VK_EXT_external_memory_host`, and what an import must be a multiple of, in bytes.
    pub(crate) import: Option<u64>,
    /// Whether it can export memory of its own as a dma-buf, with buffers in it, or why not.
    pub(crate) exports: Result<(), String>,
    pub(crate) max_groups: u32,
    /// Whether some memory is both the device's own and the host's to write.
    pub(crate) mapped: bool,
}

impl Facts {
    /// What a kernel cannot do without and the device does not have.
    pub(crate) fn lacks(&self) -> Vec<&'static str> {
        [
            (self.api >= (1, 2), "Vulkan 1.2"),
            (self.family.is_some(), "a queue that computes"),
            (self.int64, "64-bit integers in shaders (shaderInt64)"),
            (
                self.addresses,
                "addresses of buffers in shaders (bufferDeviceAddress)",
            ),
        ]
        .into_iter()
        .filter_map(|(has, what)| (!has).then_some(what))
        .collect()
    }
}

/// All Vulkan devices, in the loader's order.
pub(crate) fn facts() -> Result<Vec<Facts>, Error> {
    instance(false)?.facts()
}

impl Instance {
    pub(super) fn facts(&self) -> Result<Vec<Facts>, Error> {
        // SAFETY: the instance lives.
        let all = unsafe { self.raw.enumerate_physical_devices() };
        all.map_err(refused("its devices"))?
            .into_iter()
            .map(|physical| self.look(physical))
            .collect()
    }

    fn look(&self, physical: vk::PhysicalDevice) -> Result<Facts, Error> {
        // SAFETY: the physical device is the instance's own, here and below.
        let extensions = unsafe { self.raw.enumerate_device_extension_properties(physical) }
            .map_err(refused("a device's extensions"))?;
        let has = |name: &CStr| {
            extensions
                .iter()
                .any(|extension| extension.extension_name_as_c_str() == Ok(name))
        };
        let import = has(ext::external_memory_host::NAME);

        let mut driver = vk::PhysicalDeviceDriverProperties::default();
        let mut host = vk::PhysicalDeviceExternalMemoryHostPropertiesEXT::default();
        let mut properties = vk::PhysicalDeviceProperties2::default().push_next(&mut driver);
        if import {
            properties = properties.push_next(&mut host);
        }
        // SAFETY: as above; what is chained is what the device knows (Vulkan 1.1 and 1.2, and the extension it has).
        unsafe {
            self.raw
                .get_physical_device_properties2(physical, &mut properties)
        };
        let plain = properties.properties;

        let mut in12 = vk::PhysicalDeviceVulkan12Features::default();
        let mut features = vk::PhysicalDeviceFeatures2::default().push_next(&mut in12);
        // SAFETY: as above.
        unsafe {
            self.raw
                .get_physical_device_features2(physical, &mut features)
        };
        let core = features.features;

        // SAFETY: as above.
        let families = unsafe {
            self.raw
                .get_physical_device_queue_family_properties(physical)
        };
        let family = families
            .iter()
            .position(|family| family.queue_flags.contains(vk::QueueFlags::COMPUTE))
            .and_then(|family| u32::try_from(family).ok());
        // SAFETY: as above.
        let memory = unsafe { self.raw.get_physical_device_memory_properties(physical) };
        let both = vk::MemoryPropertyFlags::DEVICE_LOCAL | vk::MemoryPropertyFlags::HOST_VISIBLE;
        let mapped = memory
            .memory_types_as_slice()
            .iter()
            .any(|kind| kind.property_flags.contains(both));

        let text = |text: Result<&CStr, _>| match text {
            Ok(text) => text.to_string_lossy().into_owned(),
            Err(_) => String::from("(no name)"),
        };
        Ok(Facts {
            physical,
            name: text(plain.device_name_as_c_str()),
            driver: format!(
                "{} {}",
                text(driver.driver_name_as_c_str()),
                text(driver.driver_info_as_c_str())
            ),
            vendor: match driver.driver_id {
                vk::DriverId::MESA_LLVMPIPE => Vendor::Lavapipe,
                _ => Vendor::Other,
            },
            api: (
                vk::api_version_major(plain.api_version),
                vk::api_version_minor(plain.api_version),
            ),
            family,
            int64: core.shader_int64 == vk::TRUE,
            addresses: in12.buffer_device_address == vk::TRUE,
            atomic64: in12.shader_buffer_int64_atomics == vk::TRUE,
            float64: core.shader_float64 == vk::TRUE,
            import: import.then_some(host.min_imported_host_pointer_alignment),
            exports: self.exports(physical, has),
            max_groups: plain.limits.max_compute_work_group_count[0],
            mapped,
        })
    }

    fn exports(
        &self,
        physical: vk::PhysicalDevice,
        has: impl Fn(&CStr) -> bool,
    ) -> Result<(), String> {
        for name in [
            khr::external_memory_fd::NAME,
            ext::external_memory_dma_buf::NAME,
        ] {
            if !has(name) {
                return Err(format!("it has no {}", name.to_string_lossy()));
            }
        }
        let info = vk::PhysicalDeviceExternalBufferInfo::default()
            .usage(USAGE)
            .handle_type(vk::ExternalMemoryHandleTypeFlags::DMA_BUF_EXT);
        let mut answer = vk::ExternalBufferProperties::default();
        // SAFETY: the physical device is the instance's own.
        unsafe {
            self.raw
                .get_physical_device_external_buffer_properties(physical, &info, &mut answer)
        };
        let can = answer.external_memory_properties.external_memory_features;
        if can.contains(vk::ExternalMemoryFeatureFlags::EXPORTABLE) {
            return Ok(());
        }
        Err(String::from("it exports no memory with buffers in it as a dma-buf (lavapipe does where it may open /dev/udmabuf)"))
    }
}
