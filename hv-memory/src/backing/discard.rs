//! Giving pages back to the host while a guest runs, as a balloon does.

use rustix::mm::Advice;
use vm_memory::bitmap::Bitmap;

use super::{MapError, Mapping, failed};
use crate::page_size;

impl Mapping {
    /// Whether [`Self::discard`] gives anything back. It does of private memory and of a memfd or a file
    /// on a tmpfs without a limit. It does not of
    /// - huge pages of the kernel's pool: they were set aside, and a guest frees smaller pieces;
    /// - a file elsewhere: its room was made when it was mapped, and without it a later access could kill
    ///   the process (SIGBUS);
    /// - a private mapping of a file: its pages would be what is in the file again.
    #[must_use]
    pub fn can_discard(&self) -> bool {
        self.discarding().is_some()
    }

    fn discarding(&self) -> Option<(Advice, &'static str)> {
        match (&self.file, self.shared) {
            _ if self.page != page_size() => None,
            (None, false) => Some((Advice::LinuxDontNeed, "madvise of MADV_DONTNEED")),
            (Some(file), true) if file.can_be_full() => None,
            // Of shared memory the other advice drops page table entries and keeps the pages.
            (_, true) => Some((Advice::LinuxRemove, "madvise of MADV_REMOVE")),
            (Some(_), false) => None,
        }
    }

    /// Gives the whole pages between `offset` and `offset + len` back to the host, and returns their
    /// bytes: 0 if it [can't](Self::can_discard) or there are none. They are zeros from then on, for
    /// everyone, and take up memory again when they are next touched. Whoever uses them meanwhile, be it a
    /// guest, a device or the kernel, finds the old bytes or zeros, and what it writes may be lost.
    ///
    /// Pages of a slot that logs are among its dirty pages.
    ///
    /// # Errors
    /// Those of `madvise(2)`: `EINVAL` for locked memory.
    pub fn discard(&self, offset: u64, len: u64) -> Result<u64, MapError> {
        let Some((advice, call)) = self.discarding() else { return Ok(0) };
        let all = self.pages.bytes().len() as u64;
        let end = offset.saturating_add(len).min(all);
        let end = end - end % self.page;
        let start = offset.checked_next_multiple_of(self.page).unwrap_or(end);
        let Some(bytes) = end.checked_sub(start).filter(|bytes| *bytes > 0) else { return Ok(0) };
        // Not beyond the mapping, whose length is a usize.
        let (at, count) = (start as usize, bytes as usize);
        self.pages.advise(at, count, advice).map_err(failed(bytes, call))?;
        self.region.bitmap().mark_dirty(at, count);
        Ok(bytes)
    }
}
