//! A compute pipeline, and submissions.

use std::ffi::c_void;
use std::sync::Arc;

use ash::vk;
use bytemuck::{Pod, Zeroable};

use super::{refused, Buffer, Gpu};
use crate::Error;

/// What a shader is told with a dispatch: `SvmPush` of `hmm_svm.glsl`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub(crate) struct Push {
    pub(crate) control: u64,
    pub(crate) args: u64,
    pub(crate) first: u32,
    pub(crate) replay: u32,
    pub(crate) lane: u32,
    pub(crate) lanes: u32,
    pub(crate) loud: u32,
    pub(crate) zero: u32,
}

/// Bytes of it.
const PUSH_BYTES: u32 = 40;
const _: () = assert!(size_of::<Push>() == PUSH_BYTES as usize);

/// A copy from one buffer to another, all of it.
pub(crate) struct Copy<'a> {
    pub(crate) from: &'a Buffer,
    pub(crate) to: &'a Buffer,
}

/// A compute shader, ready to run.
pub(crate) struct Pipeline {
    pub(crate) gpu: Arc<Gpu>,
    raw: vk::Pipeline,
    layout: vk::PipelineLayout,
}

impl Pipeline {
    /// Makes one of a module with an entry point `main`, with its constant 0 set to `mode`.
    ///
    /// # Safety
    ///
    /// The module is valid, and asks for nothing that the device does not have.
    pub(crate) unsafe fn new(gpu: &Arc<Gpu>, words: &[u32], mode: u32) -> Result<Self, Error> {
        let ranges = [vk::PushConstantRange::default()
            .stage_flags(vk::ShaderStageFlags::COMPUTE)
            .size(PUSH_BYTES)];
        let info = vk::PipelineLayoutCreateInfo::default().push_constant_ranges(&ranges);
        // SAFETY: all that it points to lives.
        let layout = unsafe { gpu.raw.create_pipeline_layout(&info, None) }
            .map_err(refused("a pipeline's layout"))?;
        let mut pipeline = Self {
            gpu: Arc::clone(gpu),
            raw: vk::Pipeline::null(),
            layout,
        };
        let info = vk::ShaderModuleCreateInfo::default().code(words);
        // SAFETY: the caller's promise.
        let module = unsafe { gpu.raw.create_shader_module(&info, None) }
            .map_err(refused("a shader module"))?;
        let constant = mode.to_ne_bytes();
        let entries = [vk::SpecializationMapEntry::default()
            .constant_id(0)
            .size(constant.len())];
        let constants = vk::SpecializationInfo::default()
            .map_entries(&entries)
            .data(&constant);
        let stage = vk::PipelineShaderStageCreateInfo::default()
            .stage(vk::ShaderStageFlags::COMPUTE)
            .module(module)
            .name(c"main")
            .specialization_info(&constants);
        let info = vk::ComputePipelineCreateInfo::default()
            .stage(stage)
            .layout(layout);
        // SAFETY: as above.
        let made = unsafe {
            gpu.raw
                .create_compute_pipelines(vk::PipelineCache::null(), &[info], None)
        };
        // SAFETY: it was just made, and a pipeline does not need its module.
        unsafe { gpu.raw.destroy_shader_module(module, None) };
        match made {
            Ok(made) => pipeline.raw = made.first().copied().unwrap_or_default(),
            Err((made, answer)) => {
                pipeline.raw = made.first().copied().unwrap_or_default();
                return Err(refused("a pipeline")(answer));
            }
        }
        Ok(pipeline)
    }

    /// Runs it, `groups` times, and waits until it is done.
    ///
    /// # Safety
    ///
    /// What the shader does to memory, with what it is given, is the caller's to know.
    pub(crate) unsafe fn run(&self, push: Push, groups: u32) -> Result<(), Error> {
        self.gpu.submit(|device, commands| {
            // SAFETY: commands are being recorded, and all of these are the device's own.
            unsafe { device.cmd_bind_pipeline(commands, vk::PipelineBindPoint::COMPUTE, self.raw) };
            // SAFETY: as above; the layout has a range of this size.
            unsafe {
                device.cmd_push_constants(
                    commands,
                    self.layout,
                    vk::ShaderStageFlags::COMPUTE,
                    0,
                    bytemuck::bytes_of(&push),
                );
            }
            // SAFETY: as above, and the caller's promise.
            unsafe { device.cmd_dispatch(commands, groups, 1, 1) };
        })
    }
}

impl Drop for Pipeline {
    fn drop(&mut self) {
        // SAFETY: it is this value's own, and what ran it was waited for. Null is nothing to destroy.
        unsafe { self.gpu.raw.destroy_pipeline(self.raw, None) };
        // SAFETY: as above.
        unsafe { self.gpu.raw.destroy_pipeline_layout(self.layout, None) };
    }
}

impl Gpu {
    /// Copies buffers, and waits until that is done.
    pub(crate) fn copy(&self, copies: &[Copy<'_>]) -> Result<(), Error> {
        self.submit(|device, commands| {
            for copy in copies {
                let bytes = copy.from.len().min(copy.to.len()) as u64;
                let region = [vk::BufferCopy::default().size(bytes)];
                // SAFETY: commands are being recorded; the buffers are the device's own, and at least as long.
                unsafe { device.cmd_copy_buffer(commands, copy.from.raw, copy.to.raw, &region) };
            }
        })
    }

    /// Records commands, submits them, and waits. What the host wrote before is seen by them, and what they wrote by the host.
    fn submit(&self, record: impl FnOnce(&ash::Device, vk::CommandBuffer)) -> Result<(), Error> {
        let queue = self.queue();
        let (device, commands) = (&self.raw, queue.commands);
        let once = vk::CommandBufferBeginInfo::default()
            .flags(vk::CommandBufferUsageFlags::ONE_TIME_SUBMIT);
        // SAFETY: the queue is held, so nothing else records or has what was recorded before under way.
        unsafe { device.begin_command_buffer(commands, &once) }.map_err(refused("to record"))?;
        let both = vk::AccessFlags::SHADER_READ
            | vk::AccessFlags::SHADER_WRITE
            | vk::AccessFlags::TRANSFER_READ
            | vk::AccessFlags::TRANSFER_WRITE;
        let before = [vk::MemoryBarrier::default()
            .src_access_mask(vk::AccessFlags::HOST_WRITE | both)
            .dst_access_mask(both)];
        let after = [vk::MemoryBarrier::default()
            .src_access_mask(both)
            .dst_access_mask(vk::AccessFlags::HOST_READ | vk::AccessFlags::HOST_WRITE)];
        let work = vk::PipelineStageFlags::COMPUTE_SHADER | vk::PipelineStageFlags::TRANSFER;
        let host = vk::PipelineStageFlags::HOST;
        // SAFETY: commands are being recorded.
        unsafe {
            device.cmd_pipeline_barrier(
                commands,
                host | work,
                work,
                Default::default(),
                &before,
                &[],
                &[],
            );
        }
        record(device, commands);
        // SAFETY: as above.
        unsafe {
            device.cmd_pipeline_barrier(commands, work, host, Default::default(), &after, &[], &[]);
        }
        // SAFETY: as above.
        unsafe { device.end_command_buffer(commands) }.map_err(refused("to record"))?;
        let all = [commands];
        let submits = [vk::SubmitInfo::default().command_buffers(&all)];
        // SAFETY: the fence is not signalled, and nothing else uses it.
        unsafe { device.queue_submit(queue.raw, &submits, queue.done) }
            .map_err(refused("a submission"))?;
        // SAFETY: as above. Whatever it answers, nothing is used any more: the work is done, or the device is lost.
        let waited = unsafe { device.wait_for_fences(&[queue.done], true, u64::MAX) };
        waited.map_err(refused("to wait for the work"))?;
        // SAFETY: it is signalled, and nothing waits for it.
        unsafe { device.reset_fences(&[queue.done]) }.map_err(refused("to reset a fence"))
    }
}

// What Vulkan is given as a pointer is as long as one of this process.
const _: () = assert!(size_of::<*const c_void>() == 8);
