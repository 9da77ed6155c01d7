// SPDX-License-Identifier: GPL-2.0

//! The structures of calls: copied from and to user space, whatever version the caller knows.

#![forbid(unsafe_code)]

use kernel::{ioctl::_IOC_SIZE, prelude::*, uaccess::UserSlice};

/// The bits of a call's number that say how long the caller's structure is.
pub(crate) const SIZE_BITS: u32 = 0x3fff << 16;

/// Where a caller's structure is, to write the answer to.
///
/// It may be shorter or longer than the driver's: see the rules in `uapi.rs`.
pub(crate) struct UserStructure {
    address: UserPtr,
    size: usize,
}

impl UserStructure {
    /// Reads the structure that call `number` has at `argument`.
    pub(crate) fn read<T: FromBytes + IntoBytes>(
        number: u32,
        argument: usize,
        smallest: usize,
    ) -> Result<(T, Self)> {
        let this = Self {
            address: UserPtr::from_addr(argument),
            size: _IOC_SIZE(number),
        };
        require(this.size >= smallest)?;
        let mut reader = UserSlice::new(this.address, this.size).reader();
        let mut value = T::new_zeroed();
        let known = this.size.min(size_of::<T>());
        reader.read_slice(value.as_mut_bytes().get_mut(..known).unwrap_or_default())?;
        while !reader.is_empty() {
            require(reader.read::<u8>()? == 0)?;
        }
        Ok((value, this))
    }

    /// Writes as much of `value` as the caller has room for.
    pub(crate) fn write<T: FromBytes + IntoBytes>(&self, mut value: T) -> Result {
        let known = self.size.min(size_of::<T>());
        let bytes = value.as_mut_bytes();
        UserSlice::new(self.address, known)
            .writer()
            .write_slice(bytes.get(..known).unwrap_or_default())
    }
}

/// Fails with `EINVAL` if not.
pub(crate) fn require(condition: bool) -> Result {
    condition.then_some(()).ok_or(EINVAL)
}
