//! Memory that a device can address.

use std::os::fd::{FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use ash::vk;
use gpu_allocator::vulkan::{Allocation, AllocationCreateDesc, AllocationScheme};
use gpu_allocator::MemoryLocation;

use super::{refused, Gpu};
use crate::{Error, SvmError};

/// What a buffer is used for: all the same, since most are used for all of it.
pub(super) const USAGE: vk::BufferUsageFlags = vk::BufferUsageFlags::from_raw(
    vk::BufferUsageFlags::STORAGE_BUFFER.as_raw()
        | vk::BufferUsageFlags::SHADER_DEVICE_ADDRESS.as_raw()
        | vk::BufferUsageFlags::TRANSFER_SRC.as_raw()
        | vk::BufferUsageFlags::TRANSFER_DST.as_raw(),
);

/// Where a buffer lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Where the device reaches it best; the host does not.
    Device,
    /// Where the host writes and the device reads.
    Host,
    /// Where the host reads what the device wrote.
    Back,
}

/// A buffer of Vulkan's own memory.
///
/// # Invariants
///
/// `raw` is bound to `memory`, which is `Some` until it is dropped, and mapped and coherent unless its place is [`Place::Device`].
pub(crate) struct Buffer {
    gpu: Arc<Gpu>,
    pub(super) raw: vk::Buffer,
    memory: Option<Allocation>,
    addr: u64,
    bytes: usize,
}

impl Buffer {
    pub(crate) fn new(
        gpu: &Arc<Gpu>,
        name: &str,
        bytes: usize,
        place: Place,
    ) -> Result<Self, Error> {
        let raw = create(gpu, bytes as u64, None)?;
        // SAFETY: the buffer was just made.
        let requirements = unsafe { gpu.raw.get_buffer_memory_requirements(raw) };
        let mut buffer = Self {
            gpu: Arc::clone(gpu),
            raw,
            memory: None,
            addr: 0,
            bytes,
        };
        let memory = gpu.allocator().as_mut().map(|allocator| {
            allocator.allocate(&AllocationCreateDesc {
                name,
                requirements,
                location: match place {
                    Place::Device => MemoryLocation::GpuOnly,
                    Place::Host => MemoryLocation::CpuToGpu,
                    Place::Back => MemoryLocation::GpuToCpu,
                },
                linear: true,
                allocation_scheme: AllocationScheme::GpuAllocatorManaged,
            })
        });
        let memory = match memory {
            Some(Ok(memory)) => memory,
            Some(Err(error)) => {
                return Err(SvmError::Vulkan {
                    attempt: "memory",
                    answer: format!("{bytes} bytes for {name}: {error}"),
                }
                .into())
            }
            None => return Err(refused("memory")(vk::Result::ERROR_DEVICE_LOST)),
        };
        // SAFETY: the memory is unbound and of a type that the buffer takes, and `buffer` keeps it for as long as the buffer.
        let handle = unsafe { memory.memory() };
        let offset = memory.offset();
        buffer.memory = Some(memory);
        // SAFETY: as above.
        unsafe { gpu.raw.bind_buffer_memory(raw, handle, offset) }
            .map_err(refused("to bind memory"))?;
        buffer.addr = address(gpu, raw);
        Ok(buffer)
    }

    /// Its first byte, for a shader.
    pub(crate) fn addr(&self) -> u64 {
        self.addr
    }

    pub(crate) fn len(&self) -> usize {
        self.bytes
    }

    /// Its bytes. None of a buffer that only the device reaches.
    pub(crate) fn bytes(&self) -> &[u8] {
        let all = self
            .memory
            .as_ref()
            .and_then(Allocation::mapped_slice)
            .unwrap_or(&[]);
        all.get(..self.bytes).unwrap_or(all)
    }

    /// Its bytes, to be written.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        let bytes = self.bytes;
        let all = self
            .memory
            .as_mut()
            .and_then(Allocation::mapped_slice_mut)
            .unwrap_or(&mut []);
        let bytes = bytes.min(all.len());
        &mut all[..bytes]
    }

    /// Writes values from an offset on, as far as they fit.
    pub(crate) fn put<T: bytemuck::NoUninit>(&mut self, offset: usize, values: &[T]) {
        let from: &[u8] = bytemuck::cast_slice(values);
        if let Some(to) = self.bytes_mut().get_mut(offset..offset + from.len()) {
            to.copy_from_slice(from);
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: it is this value's own, and no submission runs that uses it: each is waited for.
        unsafe { self.gpu.raw.destroy_buffer(self.raw, None) };
        if let (Some(memory), Some(allocator)) = (self.memory.take(), self.gpu.allocator().as_mut())
        {
            if let Err(error) = allocator.free(memory) {
                tracing::error!(%error, "Vulkan memory is lost");
            }
        }
    }
}

/// Memory that others have too, as a buffer: pages of this process, which a real device pins for as long as this lives, so that they cannot move; or
/// memory of the device's own that was exported.
///
/// # Invariants
///
/// `raw` is bound to `memory`. Pages of this process stay mapped: the maker's promise.
pub(crate) struct External {
    gpu: Arc<Gpu>,
    raw: vk::Buffer,
    memory: vk::DeviceMemory,
    addr: u64,
}

impl External {
    /// Imports pages of this process.
    ///
    /// # Safety
    ///
    /// The `bytes` bytes at `start` stay mapped until this is dropped.
    pub(crate) unsafe fn import(
        gpu: &Arc<Gpu>,
        start: NonNull<u8>,
        bytes: usize,
    ) -> Result<Self, Error> {
        let lacks = || SvmError::Lacks {
            device: gpu.facts.name.clone(),
            what: String::from("VK_EXT_external_memory_host"),
        };
        let host = gpu.host.as_ref().ok_or_else(lacks)?;
        let kind = vk::ExternalMemoryHandleTypeFlags::HOST_ALLOCATION_EXT;
        let mut types = vk::MemoryHostPointerPropertiesEXT::default();
        // SAFETY: the pages are mapped.
        unsafe {
            (host.fp().get_memory_host_pointer_properties_ext)(
                gpu.raw.handle(),
                kind,
                start.as_ptr().cast(),
                &mut types,
            )
        }
        .result()
        .map_err(refused("to import memory of this process"))?;
        let raw = create(gpu, bytes as u64, Some(kind))?;
        let mut imported = Self {
            gpu: Arc::clone(gpu),
            raw,
            memory: vk::DeviceMemory::null(),
            addr: 0,
        };
        // SAFETY: the buffer was just made.
        let needs = unsafe { gpu.raw.get_buffer_memory_requirements(raw) };
        let coherent = gpu.memory_types(vk::MemoryPropertyFlags::HOST_COHERENT);
        let possible = types.memory_type_bits & needs.memory_type_bits;
        let chosen = if possible & coherent != 0 {
            possible & coherent
        } else {
            possible
        };
        if chosen == 0 || needs.size > bytes as u64 {
            return Err(refused("to import memory of this process")(
                vk::Result::ERROR_INVALID_EXTERNAL_HANDLE,
            ));
        }
        let mut import = vk::ImportMemoryHostPointerInfoEXT::default()
            .handle_type(kind)
            .host_pointer(start.as_ptr().cast());
        let mut flags =
            vk::MemoryAllocateFlagsInfo::default().flags(vk::MemoryAllocateFlags::DEVICE_ADDRESS);
        let info = vk::MemoryAllocateInfo::default()
            .allocation_size(bytes as u64)
            .memory_type_index(chosen.trailing_zeros())
            .push_next(&mut flags)
            .push_next(&mut import);
        // SAFETY: the pages are mapped for as long as the memory lives, and of a type that takes them.
        imported.memory = unsafe { gpu.raw.allocate_memory(&info, None) }
            .map_err(refused("to import memory of this process"))?;
        // SAFETY: the memory is unbound, and large enough.
        unsafe { gpu.raw.bind_buffer_memory(raw, imported.memory, 0) }
            .map_err(refused("to bind memory"))?;
        imported.addr = address(gpu, raw);
        Ok(imported)
    }

    /// Takes memory of the device, best such as the host reaches too, and exports it as a dma-buf.
    pub(crate) fn export(gpu: &Arc<Gpu>, bytes: usize) -> Result<(Self, OwnedFd), Error> {
        let lacks = |why: &String| SvmError::Lacks {
            device: gpu.facts.name.clone(),
            what: format!("memory that is exported as a dma-buf: {why}"),
        };
        gpu.facts.exports.as_ref().map_err(lacks)?;
        let kind = vk::ExternalMemoryHandleTypeFlags::DMA_BUF_EXT;
        let raw = create(gpu, bytes as u64, Some(kind))?;
        let mut exported = Self {
            gpu: Arc::clone(gpu),
            raw,
            memory: vk::DeviceMemory::null(),
            addr: 0,
        };
        // SAFETY: the buffer was just made.
        let needs = unsafe { gpu.raw.get_buffer_memory_requirements(raw) };
        let own = vk::MemoryPropertyFlags::DEVICE_LOCAL;
        let both = own | vk::MemoryPropertyFlags::HOST_VISIBLE;
        let chosen = [both, own, vk::MemoryPropertyFlags::empty()]
            .map(|wanted| gpu.memory_types(wanted) & needs.memory_type_bits)
            .into_iter()
            .find(|types| *types != 0)
            .unwrap_or(needs.memory_type_bits);
        let mut export = vk::ExportMemoryAllocateInfo::default().handle_types(kind);
        let mut dedicated = vk::MemoryDedicatedAllocateInfo::default().buffer(raw);
        let mut flags =
            vk::MemoryAllocateFlagsInfo::default().flags(vk::MemoryAllocateFlags::DEVICE_ADDRESS);
        let info = vk::MemoryAllocateInfo::default()
            .allocation_size(needs.size.max(bytes as u64))
            .memory_type_index(chosen.trailing_zeros())
            .push_next(&mut flags)
            .push_next(&mut dedicated)
            .push_next(&mut export);
        // SAFETY: all that it points to lives, and the device exports such memory (`Facts`).
        exported.memory = unsafe { gpu.raw.allocate_memory(&info, None) }
            .map_err(refused("memory that is exported"))?;
        // SAFETY: the memory is unbound, and large enough.
        unsafe { gpu.raw.bind_buffer_memory(raw, exported.memory, 0) }
            .map_err(refused("to bind memory"))?;
        exported.addr = address(gpu, raw);
        let files = gpu
            .files
            .as_ref()
            .ok_or_else(|| lacks(&String::from("it cannot")))?;
        let info = vk::MemoryGetFdInfoKHR::default()
            .memory(exported.memory)
            .handle_type(kind);
        // SAFETY: the memory was made to be exported so.
        let fd = unsafe { files.get_memory_fd(&info) }
            .map_err(refused("to export memory as a dma-buf"))?;
        // SAFETY: just opened, for this.
        let dma_buf = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok((exported, dma_buf))
    }

    /// Its first byte, for a shader.
    pub(crate) fn addr(&self) -> u64 {
        self.addr
    }
}

impl Drop for External {
    fn drop(&mut self) {
        // SAFETY: as for a buffer.
        unsafe { self.gpu.raw.destroy_buffer(self.raw, None) };
        // SAFETY: as above; nothing else is bound to it. Null is nothing to free.
        unsafe { self.gpu.raw.free_memory(self.memory, None) };
    }
}

fn create(
    gpu: &Gpu,
    bytes: u64,
    kind: Option<vk::ExternalMemoryHandleTypeFlags>,
) -> Result<vk::Buffer, Error> {
    let mut external =
        vk::ExternalMemoryBufferCreateInfo::default().handle_types(kind.unwrap_or_default());
    let mut info = vk::BufferCreateInfo::default()
        .size(bytes.max(16))
        .usage(USAGE)
        .sharing_mode(vk::SharingMode::EXCLUSIVE);
    if kind.is_some() {
        info = info.push_next(&mut external);
    }
    // SAFETY: all that it points to lives.
    unsafe { gpu.raw.create_buffer(&info, None) }.map_err(refused("a buffer"))
}

fn address(gpu: &Gpu, buffer: vk::Buffer) -> u64 {
    let info = vk::BufferDeviceAddressInfo::default().buffer(buffer);
    // SAFETY: the buffer is bound, and was made to have an address.
    unsafe { gpu.raw.get_buffer_device_address(&info) }
}
