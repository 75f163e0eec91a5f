//! Why host memory could not be had.

use hv_core::Errno;
use thiserror::Error;

use super::file::FileError;

/// Why host memory could not be mapped. Nothing is mapped then, and no file has changed.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum MapError {
    /// No bytes were asked for.
    #[error("no bytes of host memory were asked for")]
    Zero,
    /// The length, or the offset in a file, is no whole number of the pages it is made of.
    #[error(
        "the {what} {value:#x} is not a multiple of {page:#x}, the size of the pages behind it"
    )]
    Unaligned {
        /// `"length"` or `"offset"`.
        what: &'static str,
        /// Bytes.
        value: u64,
        /// Bytes of a page: of the host's, or of the huge pages asked for.
        page: u64,
    },
    /// A system call failed.
    #[error("mapping {len:#x} bytes of host memory failed in {call}: {errno}{}", remedy(*.errno))]
    System {
        /// Bytes asked for.
        len: u64,
        /// The system call, such as `"mmap"`.
        call: &'static str,
        /// Its errno.
        errno: Errno,
    },
    /// The kernel's pool has not as many huge pages as are needed.
    #[error(
        "{} of {} needed, {}; give the pool more (write their number to {}; \
         /proc/sys/vm/nr_hugepages is the pool of the default size), best right after the host has \
         started, or use transparent huge pages",
        pages(*.needed), size(*.page), available(*.free), pool(*.page)
    )]
    NoHugePages {
        /// Bytes of a huge page.
        page: u64,
        /// Huge pages that are needed.
        needed: u64,
        /// Huge pages that nobody has, if the kernel says so.
        free: Option<u64>,
    },
    /// The kernel or the processor has no huge pages of this size.
    #[error(
        "the host has no huge pages of {}: {errno}; /sys/kernel/mm/hugepages lists what it has",
        size(*.page)
    )]
    HugePageSize {
        /// Bytes of a huge page.
        page: u64,
        /// What the kernel said.
        errno: Errno,
    },
    /// Huge pages of the kernel's pool were asked for, and a file.
    #[error(
        "a file has the pages of its file system: for huge pages put it on a hugetlbfs, instead of \
         asking for huge pages of {} beside it", size(*.page)
    )]
    HugePagesOfFile {
        /// Bytes of a huge page.
        page: u64,
    },
    /// Transparent huge pages were asked for, which are turned off.
    #[error(
        "the host has no transparent huge pages for this memory: {setting} is {:?}; write {advise:?} \
         there, or do without", .value.as_deref().unwrap_or("missing")
    )]
    TransparentOff {
        /// The file that says so.
        setting: String,
        /// What is chosen there, or `None` without that file: a kernel without them.
        value: Option<String>,
        /// What would have to be chosen.
        advise: &'static str,
    },
    /// The memory can't be put on this NUMA node.
    #[error("the memory can't be put on NUMA node {node}: {errno}{}", numa(*.errno, .nodes.as_deref()))]
    Numa {
        /// The node asked for.
        node: u32,
        /// The nodes that have memory, as the kernel lists them (`"0-1"`).
        nodes: Option<String>,
        /// What `mbind(2)` left.
        errno: Errno,
    },
    /// The file can't be used.
    #[error(transparent)]
    File(#[from] FileError),
}

fn remedy(errno: Errno) -> &'static str {
    match errno {
        Errno::ENOMEM => {
            "; ask for less, or raise the limit on address space (ulimit -v) or vm.overcommit_memory"
        }
        Errno::EMFILE => "; raise the limit of open files (ulimit -n)",
        _ => "",
    }
}

/// Directory of the pool of huge pages of this size.
pub(super) fn pool_directory(page: u64) -> String {
    format!("/sys/kernel/mm/hugepages/hugepages-{}kB", page >> 10)
}

fn pool(page: u64) -> String {
    format!("{}/nr_hugepages", pool_directory(page))
}

fn pages(needed: u64) -> String {
    match needed {
        1 => "1 huge page".to_owned(),
        n => format!("{n} huge pages"),
    }
}

fn available(free: Option<u64>) -> String {
    match free {
        Some(n) => format!("{n} free"),
        None => "fewer free".to_owned(),
    }
}

fn size(page: u64) -> String {
    match page >> 20 {
        mib if mib >= 1 << 10 => format!("{} GiB", mib >> 10),
        0 => format!("{} KiB", page >> 10),
        mib => format!("{mib} MiB"),
    }
}

fn numa(errno: Errno, nodes: Option<&str>) -> String {
    match (errno, nodes) {
        (Errno::EINVAL, Some(nodes)) => {
            format!("; the host has memory on node {nodes}, and this process may use some of it")
        }
        (Errno::ENOSYS, _) => "; this kernel knows no NUMA: do without a node".to_owned(),
        (Errno::EPERM, _) => {
            "; a seccomp filter forbids mbind: allow it (CAP_SYS_NICE in many containers)"
                .to_owned()
        }
        _ => String::new(),
    }
}
