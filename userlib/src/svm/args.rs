//! What a kernel is given.

use std::marker::PhantomData;

use bytemuck::NoUninit;

use crate::sys::reach::Reach;

/// The arguments of a dispatch: `SVM_ARGS` of the shader, field by field in its order. Pointers are the program's own.
///
/// Each value is placed at a multiple of its size, as the shader's layout (`std430`) does. What [`read`](Self::read) and [`write`](Self::write)
/// take stays borrowed until the dispatch is done. Strategies that do not follow pointers ([`Strategy::needs_names`](crate::Strategy::needs_names))
/// reach what is named here, and nothing else: of a linked structure, [`reach`](Self::reach) names the parts.
///
/// ```
/// use hmm_gpu::Args;
///
/// let x = vec![1.0_f32; 100];
/// let mut y = vec![2.0_f32; 100];
/// let args = Args::new().read(&x).write(&mut y).value(100_u64).value(3.0_f32);
/// assert_eq!(args.bytes(), 28);
/// ```
#[derive(Debug, Default)]
pub struct Args<'a> {
    pub(crate) packed: Vec<u8>,
    pub(crate) reaches: Vec<Reach>,
    borrows: PhantomData<&'a mut ()>,
}

impl<'a> Args<'a> {
    /// None.
    pub fn new() -> Self {
        Self::default()
    }

    /// A pointer to values that the kernel reads: 64 bits.
    pub fn read<T>(self, values: &'a [T]) -> Self {
        self.reach(values).pointer(values.as_ptr())
    }

    /// A pointer to values that the kernel changes: 64 bits.
    pub fn write<T>(self, values: &'a mut [T]) -> Self {
        let pointer = values.as_ptr();
        self.reach_mut(values).pointer(pointer)
    }

    /// A value, at a multiple of its size: an integer or a float of 4 or 8 bytes, or another plain structure.
    pub fn value<T: NoUninit>(mut self, value: T) -> Self {
        let at = self.packed.len().next_multiple_of(align_of::<T>().max(4));
        self.packed.resize(at, 0);
        self.packed.extend_from_slice(bytemuck::bytes_of(&value));
        self
    }

    /// A pointer as it is: 64 bits. It may be null, if the kernel knows what to do with it.
    pub fn pointer<T>(self, pointer: *const T) -> Self {
        self.value(pointer.expose_provenance() as u64)
    }

    /// Names memory that the kernel reads when it follows a pointer. No argument.
    pub fn reach<T: ?Sized>(mut self, value: &'a T) -> Self {
        // Where nothing is, there is no page: an empty slice may be said to lie anywhere.
        if size_of_val(value) > 0 {
            self.reaches.push(Reach::of(value));
        }
        self
    }

    /// Names memory that the kernel changes when it follows a pointer. No argument.
    pub fn reach_mut<T: ?Sized>(mut self, value: &'a mut T) -> Self {
        if size_of_val(value) > 0 {
            self.reaches.push(Reach::of_mut(value));
        }
        self
    }

    /// How many bytes the arguments have.
    pub fn bytes(&self) -> usize {
        self.packed.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_where_a_shader_has_them() {
        let (x, mut y) = ([1_u8; 3], [2_u32; 2]);
        let (from, to) = (x.as_ptr() as u64, y.as_ptr() as u64);
        let args = Args::new()
            .value(7_u32)
            .read(&x)
            .value(8_u32)
            .value(9_u32)
            .write(&mut y);
        let words: Vec<u64> = args
            .packed
            .chunks(8)
            .map(|word| u64::from_ne_bytes(word.try_into().unwrap()))
            .collect();
        assert_eq!(words, [7, from, 8 | (9 << 32), to]);
        assert_eq!(args.reaches.len(), 2);
    }

    /// Catches an import of the page that an empty slice is said to lie on.
    #[test]
    fn what_has_no_bytes_is_not_named() {
        let args = Args::new()
            .read::<u32>(&[])
            .write::<u64>(&mut [])
            .reach(&());
        assert_eq!((args.bytes(), args.reaches.len()), (16, 0));
    }
}
