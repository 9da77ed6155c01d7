// SPDX-License-Identifier: GPL-2.0

//! Device nodes: a misc device that stands for something, and files of a type of their own on it, or on none.

use crate::sys::{
    bindings,
    user_map::{self, Pager, What},
};
use core::ptr::NonNull;
use kernel::{
    container_of,
    error::{from_err_ptr, to_result},
    fs::{file::FileDescriptorReservation, File, Kiocb},
    iov::IovIterDest,
    miscdevice::{MiscDevice, MiscDeviceOptions, MiscDeviceRegistration},
    mm::virt::VmaNew,
    prelude::*,
    sync::{aref::ARef, poll::PollTable},
    types::{ForeignOwnable, Opaque},
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
    fn mmap(self: Pin<&Self>, _vma: &VmaNew, _file: OpenFile<'_, Self>) -> Result {
        Err(ENODEV)
    }

    /// `read(2)` of the file, which waits only if it may.
    fn read(self: Pin<&Self>, _to: &mut IovIterDest<'_>, _may_wait: bool) -> Result<usize> {
        Err(EINVAL)
    }

    /// `poll(2)` of the file: has `table` wait, and says what is there (`POLLIN` and so on).
    fn poll(self: Pin<&Self>, _file: &File, _table: &PollTable<'_>) -> u32 {
        bindings::POLLIN | bindings::POLLRDNORM
    }
}

/// The file of a client, which is open.
///
/// # Invariants
///
/// `client` is valid as long as the file is open.
pub(crate) struct OpenFile<'a, C> {
    file: &'a File,
    client: &'a C,
}

impl<'a, C: Client> OpenFile<'a, C> {
    /// The file itself.
    pub(crate) fn file(&self) -> &'a File {
        self.file
    }

    /// The page of the file at which a mapping of it begins.
    pub(crate) fn first_page(&self, vma: &VmaNew) -> usize {
        // SAFETY: The reference is to a valid mapping, which is being made.
        unsafe { (*vma.as_ptr()).vm_pgoff }
    }

    /// Has the file's client be the one that gives pages to a mapping of it: see [`user_map`].
    pub(crate) fn map(&self, vma: &VmaNew, what: What) -> Result
    where
        C: Pager,
    {
        // SAFETY: A mapping keeps its file, and the file the client, by the type invariants.
        unsafe { user_map::set_up(vma, what, self.client) }
    }
}

/// A device node. It is there until this is dropped; files that are open then stay open.
///
/// # Invariants
///
/// `misc` is registered, as [`MiscDeviceOptions::into_raw`] makes it but for its `poll`, which the
/// kernel crate has none of (7.3): so it is what a [`MiscDeviceRegistration`] is.
#[pin_data(PinnedDrop)]
pub(crate) struct Node<C: Client> {
    #[pin]
    misc: Opaque<bindings::miscdevice>,
    device: C::Device,
}

// SAFETY: It may be deregistered on any thread, and the device is `Send`.
unsafe impl<C: Client> Send for Node<C> {}
// SAFETY: Nothing but the kernel uses `misc`, under its own lock, and the device is `Sync`.
unsafe impl<C: Client> Sync for Node<C> {}

impl<C: Client> Node<C> {
    /// Makes the node `/dev/NAME` for `device`.
    pub(crate) fn new(name: &'static CStr, device: C::Device) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            // Before the registration, which is the moment from which on the node can be opened.
            device,
            // INVARIANT: Registered if this returns `Ok`.
            misc <- Opaque::try_ffi_init(move |slot: *mut bindings::miscdevice| {
                let mut misc = MiscDeviceOptions { name }.into_raw::<Handler<C>>();
                misc.fops = &Handler::<C>::OPERATIONS;
                // SAFETY: The slot is ours to initialise, and pinned until `drop` deregisters it.
                unsafe {
                    slot.write(misc);
                    to_result(bindings::misc_register(slot))
                }
            }),
        })
    }
}

#[pinned_drop]
impl<C: Client> PinnedDrop for Node<C> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: Registered, by the type invariants.
        unsafe { bindings::misc_deregister(self.misc.get()) };
    }
}

/// A client that no node leads to, and nobody has a file of yet.
pub(crate) struct Unnamed<C: Client> {
    handler: Pin<KBox<Handler<C>>>,
}

impl<C: Client> Unnamed<C> {
    /// Makes `client`.
    pub(crate) fn new(client: impl PinInit<C, Error>) -> Result<Self> {
        let handler = try_pin_init!(Handler { client <- client });
        Ok(Self {
            handler: KBox::try_pin_init(handler, GFP_KERNEL_ACCOUNT)?,
        })
    }

    /// The client.
    pub(crate) fn client(&self) -> Pin<&C> {
        self.handler.as_ref().client()
    }

    /// Gives the calling process a file on it, which is shown as `name`. `tell` is given the file's descriptor before there is one: if
    /// it fails, there will be none.
    pub(crate) fn open(self, name: &CStr, tell: impl FnOnce(u32) -> Result) -> Result {
        let reserved = FileDescriptorReservation::get_unused_fd_flags(bindings::O_CLOEXEC)?;
        let private = self.handler.into_foreign();
        // SAFETY: The name is copied. The operations are a constant's, and `private` is what they expect.
        let file = from_err_ptr(unsafe {
            bindings::anon_inode_getfile(
                name.as_char_ptr(),
                &Handler::<C>::OPERATIONS,
                private,
                // CAST: The bits are the same.
                (bindings::O_RDWR | bindings::O_CLOEXEC) as c_int,
            )
        });
        let file = match file {
            // SAFETY: A new file, which nobody uses and whose reference passes to this.
            Ok(file) => unsafe { ARef::from_raw(NonNull::from(File::from_raw_file(file))) },
            Err(error) => {
                // SAFETY: Just made by `into_foreign`, and the kernel has not taken it.
                drop(unsafe { <Pin<KBox<Handler<C>>> as ForeignOwnable>::from_foreign(private) });
                return Err(error);
            }
        };
        tell(reserved.reserved_fd())?;
        reserved.fd_install(file);
        Ok(())
    }
}

/// What the kernel crate's misc devices ask for. Private, so that every one of its type is in a
/// [`Node`].
#[pin_data]
struct Handler<C: Client> {
    #[pin]
    client: C,
}

impl<C: Client> Handler<C> {
    /// Those of the kernel crate, and `poll`.
    const OPERATIONS: bindings::file_operations = {
        let misc = MiscDeviceOptions { name: c"" }.into_raw::<Self>();
        bindings::file_operations {
            poll: Some(Self::poll),
            // SAFETY: `into_raw` leaves a reference to a constant there.
            ..unsafe { *misc.fops }
        }
    };

    /// # Safety
    ///
    /// Called by the kernel as `file_operations::poll`, for a file on a [`Node`].
    unsafe extern "C" fn poll(
        file: *mut bindings::file,
        table: *mut bindings::poll_table_struct,
    ) -> bindings::__poll_t {
        // SAFETY: The file is open and stays so meanwhile, so its private data is what `open` has
        // made. The table is null or valid for the call.
        let (this, file, table) = unsafe {
            let private = (*file).private_data;
            (
                <Pin<KBox<Self>> as ForeignOwnable>::borrow(private),
                File::from_raw_file(file),
                PollTable::from_raw(table),
            )
        };
        this.client().poll(file, &table)
    }

    fn client(self: Pin<&Self>) -> Pin<&C> {
        // SAFETY: A projection to a structurally pinned field.
        unsafe { self.map_unchecked(|this| &this.client) }
    }
}

#[vtable]
impl<C: Client> MiscDevice for Handler<C> {
    type Ptr = Pin<KBox<Self>>;

    fn open(_file: &File, misc: &MiscDeviceRegistration<Self>) -> Result<Self::Ptr> {
        let misc = core::ptr::from_ref(misc).cast::<Opaque<bindings::miscdevice>>();
        // SAFETY: Every registration of this type is the field of a `Node<C>`, whose other fields were
        // initialised before it. The node stays while the kernel opens a file on it.
        let node = unsafe { &*container_of!(misc, Node<C>, misc) };
        KBox::try_pin_init(
            try_pin_init!(Self {
                client <- C::open(&node.device)?,
            }),
            GFP_KERNEL_ACCOUNT,
        )
    }

    fn ioctl(this: Pin<&Self>, _file: &File, number: u32, argument: usize) -> Result<isize> {
        this.client().ioctl(number, argument).map(|()| 0)
    }

    fn read_iter(kiocb: Kiocb<'_, Self::Ptr>, to: &mut IovIterDest<'_>) -> Result<usize> {
        // SAFETY: The request and its file are valid for the call.
        let may_wait = unsafe {
            let raw = kiocb.as_raw();
            (*(*raw).ki_filp).f_flags & bindings::O_NONBLOCK == 0
                && !bindings::hmm_gpu_is_nowait(raw)
        };
        kiocb.file().client().read(to, may_wait)
    }

    fn mmap(this: Pin<&Self>, file: &File, vma: &VmaNew) -> Result {
        let client = this.client();
        // INVARIANT: The client is dropped when the file is released, which has its last reference gone.
        let open = OpenFile {
            file,
            client: client.get_ref(),
        };
        client.mmap(vma, open)
    }
}
