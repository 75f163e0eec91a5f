//! What guest memory is made of on the host, and how it is mapped.
//!
//! A [`Backing`] says it, [`Backing::map`] makes a [`Mapping`] of it. Only `pages` has `unsafe`.
//! Nothing here knows of guests or slots.

mod discard;
mod error;
mod file;
mod huge;
mod mapping;
mod pages;
mod prefault;

use std::path::Path;
use std::sync::Arc;

use hv_core::Errno;
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{Advice, MapFlags};
use vm_memory::mmap::MmapRegionError;
use vm_memory::{FileOffset, MmapRegion};

pub use error::MapError;
pub use file::{BackingFile, FileError, FileProblem, KeptSize, Sharing};
pub use huge::{HugePageSize, HugePages};
pub use mapping::Mapping;
pub use prefault::{PrefaultError, Progress};

use crate::page_size;
pub(crate) use pages::Pages;

/// What memory is made of: private pages, a memfd or a file; which pages, and from where.
///
/// ```
/// use std::path::Path;
/// use hv_memory::{Backing, BackingFile, GuestRam, KeptSize, RamLayout, Sharing};
///
/// # let file = tempfile::NamedTempFile::new()?;
/// # file.as_file().set_len(1 << 20)?;
/// # let path = file.path();
/// let file = BackingFile::open(path, Sharing::Shared, KeptSize::Promised)?;
/// let ram = GuestRam::backed(&RamLayout::new(1 << 20, &[], 46)?, &Backing::file(file))?;
/// ram.check()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct Backing {
    kind: Kind,
    huge_pages: HugePages,
    numa_node: Option<u32>,
}

#[derive(Debug, Clone)]
enum Kind {
    Anonymous,
    Memfd,
    File(BackingFile),
}

impl Backing {
    /// Pages of this process alone, zero-filled.
    #[must_use]
    pub fn anonymous() -> Self {
        Self::of(Kind::Anonymous)
    }

    /// Zero-filled memory that a descriptor names (`memfd_create(2)`), so that it can be given to
    /// another process, or [remapped](Mapping::remap). It is sealed: nobody who gets the descriptor
    /// can change its size.
    #[must_use]
    pub fn memfd() -> Self {
        Self::of(Kind::Memfd)
    }

    /// The pages of a file.
    #[must_use]
    pub fn file(file: BackingFile) -> Self {
        Self::of(Kind::File(file))
    }

    fn of(kind: Kind) -> Self {
        Self { kind, huge_pages: HugePages::HostDefault, numa_node: None }
    }

    /// With such pages. A file has the pages of its file system: of [`HugePages::Pool`] if that is a
    /// hugetlbfs, without asking for it.
    #[must_use]
    pub fn huge_pages(self, huge_pages: HugePages) -> Self {
        Self { huge_pages, ..self }
    }

    /// From this NUMA node of the host, as long as it has memory (`MPOL_PREFERRED`): from any other
    /// when it has not, which is slower, but neither an error nor the end of the process. Pages of a
    /// file that are in memory already stay where they are.
    #[must_use]
    pub fn numa_node(self, node: u32) -> Self {
        Self { numa_node: Some(node), ..self }
    }

    /// Maps `len` bytes of it, between guards of at least 64 KiB that nothing can access, and left
    /// out of core dumps. What is at least 2 MiB begins at a multiple of that, so that huge pages
    /// fit.
    ///
    /// Pages take up memory of the host when they are first touched, unless they are
    /// [populated](Mapping::prefault) before. Those of the kernel's pool are set aside at once.
    ///
    /// # Errors
    /// What can't be had. Nothing is mapped then, and of a file neither contents nor size have changed;
    /// what holes it has may have been filled.
    pub fn map(&self, len: u64) -> Result<Mapping, MapError> {
        let page = self.page();
        aligned("length", len, page)?;
        if len == 0 {
            return Err(MapError::Zero);
        }
        let too_large = |_| MapError::System { len, call: "mmap", errno: Errno::ENOMEM };
        let bytes = usize::try_from(len).map_err(too_large)?;
        match (&self.kind, self.huge_pages) {
            (Kind::File(_), HugePages::Pool(size)) => {
                return Err(MapError::HugePagesOfFile { page: size.bytes() });
            }
            (Kind::Anonymous, HugePages::Transparent) => {
                huge::transparent(Path::new(huge::TRANSPARENT), false)?;
            }
            (Kind::Memfd, HugePages::Transparent) => {
                huge::transparent(Path::new(huge::TRANSPARENT), true)?;
            }
            _ => {}
        }

        let flags = self.flags();
        let file = match &self.kind {
            Kind::Anonymous => None,
            Kind::Memfd => Some(memfd(len, self.huge_pages)?),
            Kind::File(file) => {
                aligned("offset", file.offset(), page)?;
                file.has(len)?;
                Some(file.file_offset())
            }
        };
        let pages = self.pages(len, bytes, flags, file.as_ref())?;
        self.advise(len, &pages)?;
        if let Some(node) = self.numa_node {
            pages.prefer_node(node).map_err(|error| numa_error(node, error))?;
        }
        let pages = Arc::new(pages);
        let region = pages.region(flags, file, page > page_size());
        let region = region.map_err(|_| failed(len, "mmap")(rustix::io::Errno::INVAL))?;
        let file = match &self.kind {
            Kind::File(file) => {
                file.keep(len)?;
                Some(file.clone())
            }
            _ => None,
        };
        Ok(Mapping { pages, region: Arc::new(region), page, shared: self.is_shared(), file })
    }

    /// The same backing for what follows `bytes` of memory: further on in a file.
    pub(crate) fn after(&self, bytes: u64) -> Result<Self, MapError> {
        let mut after = self.clone();
        if let Kind::File(file) = &self.kind {
            after.kind = Kind::File(file.after(bytes)?);
        }
        Ok(after)
    }

    /// Bytes of the pages that memory is made of.
    fn page(&self) -> u64 {
        match (&self.kind, self.huge_pages) {
            (Kind::File(file), _) => file.page(),
            (_, HugePages::Pool(size)) => size.bytes(),
            _ => page_size(),
        }
    }

    fn is_shared(&self) -> bool {
        match &self.kind {
            Kind::Anonymous => false,
            Kind::Memfd => true,
            Kind::File(file) => file.sharing() == Sharing::Shared,
        }
    }

    fn flags(&self) -> MapFlags {
        let mut flags = if self.is_shared() { MapFlags::SHARED } else { MapFlags::PRIVATE };
        if let Kind::Anonymous = self.kind {
            // rustix adds it by itself; vm-memory does not.
            flags |= MapFlags::from_bits_retain(libc::MAP_ANONYMOUS.cast_unsigned());
        }
        if self.page() == page_size() {
            flags |= MapFlags::NORESERVE;
        }
        // Without a reserve, huge pages that are not there when they are touched are a SIGBUS.
        if let (Kind::Anonymous, HugePages::Pool(size)) = (&self.kind, self.huge_pages) {
            flags |= MapFlags::HUGETLB;
            flags |= match size {
                HugePageSize::Mib2 => MapFlags::HUGE_2MB,
                HugePageSize::Gib1 => MapFlags::HUGE_1GB,
            };
        }
        flags
    }

    fn pages(
        &self,
        len: u64,
        bytes: usize,
        flags: MapFlags,
        file: Option<&FileOffset>,
    ) -> Result<Pages, MapError> {
        let page = self.page();
        let refused = |errno: Errno| match (&self.kind, errno) {
            (_, Errno::ENOMEM) if page > page_size() => {
                MapError::NoHugePages { page, needed: len / page, free: huge::free(page) }
            }
            (Kind::Anonymous, Errno::EINVAL) if page > page_size() => {
                MapError::HugePageSize { page, errno }
            }
            (Kind::File(file), errno) => file.error(FileProblem::Map { errno }).into(),
            _ => MapError::System { len, call: "mmap", errno },
        };
        // Anywhere first. If it can't be mapped, that is the place to fail at: where addresses were
        // reserved for it, the kernel may have given them up before it fails.
        let (prot, map) = (libc::PROT_READ | libc::PROT_WRITE, flags.bits().cast_signed());
        let tried = MmapRegion::<()>::build(file.cloned(), bytes, prot, map);
        drop(tried.map_err(|error| {
            refused(match error {
                MmapRegionError::Mmap(error) => Errno::from(&error),
                _ => Errno::EINVAL,
            })
        })?);
        const MIB2: u64 = HugePageSize::Mib2.bytes();
        let align = if len >= MIB2 { page.max(MIB2) } else { page };
        let file = file.map(|file| (file.file(), file.start()));
        Pages::map(bytes, align as usize, flags, file)
            .map_err(|error| refused(Errno(error.raw_os_error())))
    }

    fn advise(&self, len: u64, pages: &Pages) -> Result<(), MapError> {
        let all = pages.bytes().len();
        pages
            .advise(0, all, Advice::LinuxDontDump)
            .map_err(failed(len, "madvise of MADV_DONTDUMP"))?;
        match self.huge_pages {
            HugePages::Transparent => pages
                .advise(0, all, Advice::LinuxHugepage)
                .map_err(failed(len, "madvise of MADV_HUGEPAGE")),
            HugePages::Never => match pages.advise(0, all, Advice::LinuxNoHugepage) {
                // A kernel without transparent huge pages.
                Err(rustix::io::Errno::INVAL) => Ok(()),
                advised => advised.map_err(failed(len, "madvise of MADV_NOHUGEPAGE")),
            },
            HugePages::HostDefault | HugePages::Pool(_) => Ok(()),
        }
    }
}

fn aligned(what: &'static str, value: u64, page: u64) -> Result<(), MapError> {
    match value.is_multiple_of(page) {
        true => Ok(()),
        false => Err(MapError::Unaligned { what, value, page }),
    }
}

fn failed(len: u64, call: &'static str) -> impl Fn(rustix::io::Errno) -> MapError {
    move |errno| MapError::System { len, call, errno: Errno(errno.raw_os_error()) }
}

/// A memfd of `len` bytes that keeps its size.
fn memfd(len: u64, huge_pages: HugePages) -> Result<FileOffset, MapError> {
    let mut flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    if let HugePages::Pool(size) = huge_pages {
        flags |= MemfdFlags::HUGETLB;
        flags |= match size {
            HugePageSize::Mib2 => MemfdFlags::HUGE_2MB,
            HugePageSize::Gib1 => MemfdFlags::HUGE_1GB,
        };
    }
    let memfd = rustix::fs::memfd_create(c"guest memory", flags).map_err(|error| {
        let errno = Errno(error.raw_os_error());
        match (huge_pages, errno) {
            // EINVAL from kernels that know no huge pages, or none in a memfd.
            (HugePages::Pool(size), Errno::ENODEV | Errno::EINVAL | Errno::ENOENT) => {
                MapError::HugePageSize { page: size.bytes(), errno }
            }
            _ => MapError::System { len, call: "memfd_create", errno },
        }
    })?;
    rustix::fs::ftruncate(&memfd, len).map_err(failed(len, "ftruncate"))?;
    // An access beyond the end of the file would kill the process, so it keeps its size, whoever
    // gets hold of the descriptor.
    let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&memfd, seals).map_err(failed(len, "fcntl of F_ADD_SEALS"))?;
    Ok(FileOffset::new(memfd.into(), 0))
}

fn numa_error(node: u32, error: rustix::io::Errno) -> MapError {
    let nodes = std::fs::read_to_string("/sys/devices/system/node/has_memory").ok();
    let nodes = nodes.map(|nodes| nodes.trim().to_owned()).filter(|nodes| !nodes.is_empty());
    MapError::Numa { node, nodes, errno: Errno(error.raw_os_error()) }
}

#[cfg(test)]
mod tests;
