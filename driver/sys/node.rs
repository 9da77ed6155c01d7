// SPDX-License-Identifier: GPL-2.0

//! Device nodes: a misc device that stands for something, and files of a type of their own on it.

use kernel::{
    container_of,
    fs::File,
    miscdevice::{MiscDevice, MiscDeviceOptions, MiscDeviceRegistration},
    mm::virt::VmaNew,
    prelude::*,
};

/// An open file on a [`Node`].
pub(crate) trait Client: Sized + Send + Sync + 'static {
    /// What the node stands for.
    type Device: Send + Sync + 'static;

    /// A file is opened.
    fn open(device: &Self::Device) -> Result<impl PinInit<Self, Error>>;

    /// `ioctl(2)` on the file, with the number and the argument as user space gave them.
    fn ioctl(self: Pin<&Self>, number: u32, argument: usize) -> Result;

    /// `mmap(2)` of the file.
    fn mmap(self: Pin<&Self>, _vma: &VmaNew) -> Result {
        Err(ENODEV)
    }
}

/// A device node. It is there until this is dropped; files that are open then stay open.
#[pin_data]
pub(crate) struct Node<C: Client> {
    #[pin]
    misc: MiscDeviceRegistration<Handler<C>>,
    device: C::Device,
}

impl<C: Client> Node<C> {
    /// Makes the node `/dev/NAME` for `device`.
    pub(crate) fn new(name: &'static CStr, device: C::Device) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            // Before the registration, which is the moment from which on the node can be opened.
            device,
            misc <- MiscDeviceRegistration::register(MiscDeviceOptions { name }),
        })
    }
}

/// What the kernel crate's misc devices ask for. Private, so that every one of its type is in a
/// [`Node`].
#[pin_data]
struct Handler<C: Client> {
    #[pin]
    client: C,
}

#[vtable]
impl<C: Client> MiscDevice for Handler<C> {
    type Ptr = Pin<KBox<Self>>;

    fn open(_file: &File, misc: &MiscDeviceRegistration<Self>) -> Result<Self::Ptr> {
        // SAFETY: Every registration of this type is in a `Node<C>`, whose other fields were
        // initialised before it. The node stays while the kernel opens a file on it.
        let node = unsafe { &*container_of!(core::ptr::from_ref(misc), Node<C>, misc) };
        KBox::try_pin_init(
            try_pin_init!(Self {
                client <- C::open(&node.device)?,
            }),
            GFP_KERNEL_ACCOUNT,
        )
    }

    fn ioctl(this: Pin<&Self>, _file: &File, number: u32, argument: usize) -> Result<isize> {
        // SAFETY: A projection to a structurally pinned field.
        let client = unsafe { this.map_unchecked(|this| &this.client) };
        client.ioctl(number, argument).map(|()| 0)
    }

    fn mmap(this: Pin<&Self>, _file: &File, vma: &VmaNew) -> Result {
        // SAFETY: A projection to a structurally pinned field.
        let client = unsafe { this.map_unchecked(|this| &this.client) };
        client.mmap(vma)
    }
}
