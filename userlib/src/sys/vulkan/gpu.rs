//! A device, opened.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use ash::{ext, khr, vk};
use gpu_allocator::vulkan::{Allocator, AllocatorCreateDesc};

use super::messages::{Messages, LAYER};
use super::{refused, Facts};
use crate::{Error, SvmError};

/// Vulkan's instance.
pub(super) struct Instance {
    pub(super) raw: ash::Instance,
    messages: Option<Messages>,
}

/// The loader, opened once and never closed: what it has loaded has threads, and is not made to go.
fn loader() -> Result<&'static ash::Entry, Error> {
    static LOADER: OnceLock<ash::Entry> = OnceLock::new();
    if let Some(entry) = LOADER.get() {
        return Ok(entry);
    }
    // SAFETY: the loader is a library of the system, made to be opened by any program.
    let entry = unsafe { ash::Entry::load() }.map_err(|error| SvmError::NoLoader {
        reason: error.to_string(),
    })?;
    Ok(LOADER.get_or_init(|| entry))
}

/// The instance, with validation layers or without. Each is made once and stays, since what it has loaded does not like to be unloaded
/// while other threads use it.
pub(super) fn instance(validation: bool) -> Result<&'static Instance, Error> {
    static INSTANCES: [Mutex<Option<&'static Instance>>; 2] = [Mutex::new(None), Mutex::new(None)];
    let [plain, validated] = &INSTANCES;
    let place = if validation { validated } else { plain };
    let mut place = place.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(instance) = *place {
        return Ok(instance);
    }
    let instance: &'static Instance = Box::leak(Box::new(Instance::new(validation)?));
    *place = Some(instance);
    Ok(instance)
}

impl Instance {
    fn new(validation: bool) -> Result<Self, Error> {
        let entry = loader()?;
        let application = vk::ApplicationInfo::default()
            .application_name(c"hmm-gpu")
            .api_version(vk::API_VERSION_1_2);
        let (layers, extensions) = ([LAYER.as_ptr()], [ext::debug_utils::NAME.as_ptr()]);
        // What races between submissions, or between a host and a device, is looked for too.
        let checks = [vk::ValidationFeatureEnableEXT::SYNCHRONIZATION_VALIDATION];
        let mut features =
            vk::ValidationFeaturesEXT::default().enabled_validation_features(&checks);
        let mut info = vk::InstanceCreateInfo::default().application_info(&application);
        if validation {
            info = info
                .enabled_layer_names(&layers)
                .enabled_extension_names(&extensions)
                .push_next(&mut features);
        }
        let attempt = if validation {
            "an instance with validation layers"
        } else {
            "an instance"
        };
        // SAFETY: all that it points to lives.
        let raw = unsafe { entry.create_instance(&info, None) };
        let raw = raw.map_err(refused(attempt))?;
        let mut instance = Self {
            raw,
            messages: None,
        };
        if validation {
            instance.messages = Some(Messages::new(entry, &instance.raw)?);
        }
        Ok(instance)
    }
}

/// A device, with its queue and its memory.
pub(crate) struct Gpu {
    pub(super) raw: ash::Device,
    pub(super) host: Option<ext::external_memory_host::Device>,
    pub(super) files: Option<khr::external_memory_fd::Device>,
    /// The queue, and what commands are recorded into: one submission at a time.
    pub(super) queue: Mutex<Queue>,
    /// `None` only while it is dropped.
    allocator: Mutex<Option<Allocator>>,
    pub(crate) facts: Facts,
    instance: &'static Instance,
}

/// What a submission needs.
pub(super) struct Queue {
    pub(super) raw: vk::Queue,
    pool: vk::CommandPool,
    pub(super) commands: vk::CommandBuffer,
    pub(super) done: vk::Fence,
}

impl std::fmt::Debug for Gpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gpu")
            .field("facts", &self.facts)
            .finish_non_exhaustive()
    }
}

impl Gpu {
    /// Opens the device whose place in the list of [`facts`](super::facts) this is.
    pub(crate) fn open(number: usize, validation: bool) -> Result<Arc<Self>, Error> {
        let instance = instance(validation)?;
        let all = instance.facts()?;
        let names = || {
            all.iter()
                .map(|facts| facts.name.as_str())
                .collect::<Vec<_>>()
                .join(", ")
        };
        let Some(facts) = all.get(number).cloned() else {
            return Err(SvmError::NoSuchDevice {
                wanted: number.to_string(),
                found: names(),
            }
            .into());
        };
        let lacks = facts.lacks();
        let (Some(family), true) = (facts.family, lacks.is_empty()) else {
            return Err(SvmError::Lacks {
                device: facts.name,
                what: lacks.join(" and "),
            }
            .into());
        };

        let priorities = [1.0];
        let queues = [vk::DeviceQueueCreateInfo::default()
            .queue_family_index(family)
            .queue_priorities(&priorities)];
        let core = vk::PhysicalDeviceFeatures::default()
            .shader_int64(true)
            .shader_float64(facts.float64);
        let mut in12 = vk::PhysicalDeviceVulkan12Features::default()
            .buffer_device_address(true)
            .shader_buffer_int64_atomics(facts.atomic64);
        let mut extensions = Vec::new();
        if facts.import.is_some() {
            extensions.push(ext::external_memory_host::NAME.as_ptr());
        }
        if facts.exports.is_ok() {
            extensions.push(khr::external_memory_fd::NAME.as_ptr());
            extensions.push(ext::external_memory_dma_buf::NAME.as_ptr());
        }
        let info = vk::DeviceCreateInfo::default()
            .queue_create_infos(&queues)
            .enabled_features(&core)
            .enabled_extension_names(&extensions)
            .push_next(&mut in12);
        // SAFETY: all that it points to lives; the device has what is enabled (`Facts`).
        let raw = unsafe { instance.raw.create_device(facts.physical, &info, None) }
            .map_err(refused("to open the device"))?;
        let host = facts
            .import
            .map(|_| ext::external_memory_host::Device::new(&instance.raw, &raw));
        let exports = facts.exports.is_ok();
        let files = exports.then(|| khr::external_memory_fd::Device::new(&instance.raw, &raw));
        let queue = match Queue::new(&raw, family) {
            Ok(queue) => queue,
            Err(error) => {
                // SAFETY: nothing was made with it that is not ended.
                unsafe { raw.destroy_device(None) };
                return Err(error);
            }
        };
        let gpu = Self {
            raw,
            host,
            files,
            queue: Mutex::new(queue),
            allocator: Mutex::new(None),
            facts,
            instance,
        };
        let allocator = Allocator::new(&AllocatorCreateDesc {
            instance: gpu.instance.raw.clone(),
            device: gpu.raw.clone(),
            physical_device: gpu.facts.physical,
            debug_settings: Default::default(),
            buffer_device_address: true,
            allocation_sizes: Default::default(),
        })
        .map_err(|error| SvmError::Vulkan {
            attempt: "an allocator",
            answer: error.to_string(),
        })?;
        *gpu.allocator() = Some(allocator);
        tracing::info!(
            name = gpu.facts.name,
            driver = gpu.facts.driver,
            "opened a Vulkan device"
        );
        Ok(Arc::new(gpu))
    }

    pub(super) fn allocator(&self) -> MutexGuard<'_, Option<Allocator>> {
        self.allocator
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the validation layers have said, if they were asked for.
    pub(crate) fn messages(&self) -> Vec<String> {
        self.instance
            .messages
            .as_ref()
            .map(Messages::said)
            .unwrap_or_default()
    }

    /// The memory types of a kind, as a mask.
    pub(super) fn memory_types(&self, wanted: vk::MemoryPropertyFlags) -> u32 {
        // SAFETY: the physical device is the instance's own.
        let memory = unsafe {
            self.instance
                .raw
                .get_physical_device_memory_properties(self.facts.physical)
        };
        memory
            .memory_types_as_slice()
            .iter()
            .enumerate()
            .filter(|(_, kind)| kind.property_flags.contains(wanted))
            .fold(0, |mask, (number, _)| mask | (1 << number))
    }
}

impl Queue {
    fn new(device: &ash::Device, family: u32) -> Result<Self, Error> {
        let info = vk::CommandPoolCreateInfo::default()
            .flags(vk::CommandPoolCreateFlags::RESET_COMMAND_BUFFER)
            .queue_family_index(family);
        // SAFETY: the device was made with one queue of this family.
        let raw = unsafe { device.get_device_queue(family, 0) };
        // SAFETY: as above.
        let pool = unsafe { device.create_command_pool(&info, None) }
            .map_err(refused("a command pool"))?;
        // SAFETY: the device lives.
        let done = unsafe { device.create_fence(&vk::FenceCreateInfo::default(), None) };
        let info = vk::CommandBufferAllocateInfo::default()
            .command_pool(pool)
            .level(vk::CommandBufferLevel::PRIMARY)
            .command_buffer_count(1);
        // SAFETY: the pool was just made.
        let commands = unsafe { device.allocate_command_buffers(&info) };
        match (done, commands.as_deref()) {
            (Ok(done), Ok(&[commands])) => Ok(Self {
                raw,
                pool,
                commands,
                done,
            }),
            (done, _) => {
                if let Ok(done) = done {
                    // SAFETY: it was just made, and nothing uses it.
                    unsafe { device.destroy_fence(done, None) };
                }
                // SAFETY: as above; its buffers go with it.
                unsafe { device.destroy_command_pool(pool, None) };
                Err(refused("what a submission needs")(
                    commands
                        .err()
                        .or(done.err())
                        .unwrap_or(vk::Result::ERROR_UNKNOWN),
                ))
            }
        }
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        // Its memory is the device's.
        drop(self.allocator().take());
        let queue = self.queue.get_mut().unwrap_or_else(PoisonError::into_inner);
        let (pool, done) = (queue.pool, queue.done);
        // SAFETY: every submission was waited for, and who has made something of this device held it until that was gone.
        unsafe { self.raw.destroy_fence(done, None) };
        // SAFETY: as above.
        unsafe { self.raw.destroy_command_pool(pool, None) };
        // SAFETY: as above.
        unsafe { self.raw.destroy_device(None) };
    }
}
