//! Linked lists, as the kernel `list` walks them.

/// A link of a list: for [`SvmContext::sum_lists`](crate::SvmContext::sum_lists). `Option<Box<Link>>` is a list, and `None` an empty one.
///
/// A `Box` is a pointer and a `None` in its place a null one, so this is what the shader takes it for: `{ next, value }`.
///
/// ```
/// use hmm_gpu::Link;
///
/// let list = Link::list([7, 8]);
/// let values = Link::links(&list).map(|link| link.value);
/// assert_eq!(values.collect::<Vec<u64>>(), [7, 8]);
/// ```
#[repr(C)]
#[derive(Debug, Default)]
pub struct Link {
    /// What follows.
    pub next: Option<Box<Link>>,
    /// Its value.
    pub value: u64,
}

// What the shader takes it for.
const _: () = assert!(size_of::<Link>() == 16 && std::mem::offset_of!(Link, value) == 8);

impl Link {
    /// A list of these values, in their order: each link in a box of its own.
    pub fn list(values: impl IntoIterator<Item = u64>) -> Option<Box<Link>> {
        let mut head = None;
        let mut end = &mut head;
        for value in values {
            end = &mut end.insert(Box::new(Link { next: None, value })).next;
        }
        head
    }

    /// The links of a list, from its head on.
    pub fn links(head: &Option<Box<Link>>) -> impl Iterator<Item = &Link> {
        std::iter::successors(head.as_deref(), |link| link.next.as_deref())
    }
}

impl Drop for Link {
    /// One by one: to drop a link would drop the next within, and a list may be longer than a stack is deep.
    fn drop(&mut self) {
        let mut next = self.next.take();
        while let Some(mut link) = next {
            next = link.next.take();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_has_its_values_in_order() {
        let list = Link::list([3, 1, 2]);
        let values: Vec<u64> = Link::links(&list).map(|link| link.value).collect();
        assert_eq!(values, [3, 1, 2]);
        assert!(Link::list([]).is_none());
    }

    /// Catches a drop that goes as deep as the list is long.
    #[test]
    fn a_long_list_is_dropped() {
        drop(Link::list(0..1_000_000));
    }
}
