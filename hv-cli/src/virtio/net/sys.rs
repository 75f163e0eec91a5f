//! What needs `unsafe`: the ioctls of tap interfaces, a descriptor by its number, and reading and writing
//! guest memory by readv(2) and writev(2). Nothing is decided here.

#![allow(
    unsafe_code,
    reason = "no crate has tap ioctls, or I/O on memory no reference can be made to"
)]

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

use hv_core::Errno;
use hv_memory::WriteLog;
use libc::{c_int, c_short, c_uint, c_ulong, iovec};
use vm_memory::bitmap::{Bitmap, RefSlice};
use vm_memory::volatile_memory::VolatileSlice;
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};

/// Guest memory, as a request has it.
pub(super) type Part<'m> = VolatileSlice<'m, RefSlice<'m, WriteLog>>;

/// The most parts of memory a system call takes (`UIO_MAXIOV`).
pub(super) const MOST_PARTS: usize = 1024;

fn errno() -> Errno {
    Errno::from(&std::io::Error::last_os_error())
}

fn checked(result: c_int) -> Result<c_int, Errno> {
    if result < 0 { Err(errno()) } else { Ok(result) }
}

/// A new descriptor, close-on-exec, for what the number refers to.
pub(super) fn duplicate(fd: RawFd) -> Result<OwnedFd, Errno> {
    // SAFETY: F_DUPFD_CLOEXEC takes numbers and changes nothing about the descriptor `fd`.
    let new = checked(unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) })?;
    // SAFETY: the kernel has just made it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(new) })
}

/// `struct ifreq` with the flags of its union.
#[repr(C)]
#[derive(Default)]
struct InterfaceRequest {
    name: [u8; libc::IFNAMSIZ],
    flags: c_short,
    rest: [u8; 22],
}

const _: () = assert!(size_of::<InterfaceRequest>() == size_of::<libc::ifreq>());

/// Makes `/dev/net/tun`, just opened, a queue of the interface with this name (`TUNSETIFF`).
pub(super) fn set_interface(tun: &OwnedFd, name: &str, flags: c_int) -> Result<(), Errno> {
    let mut request = InterfaceRequest { flags: flags as c_short, ..Default::default() };
    // The last byte stays 0.
    for (to, from) in request.name.iter_mut().take(libc::IFNAMSIZ - 1).zip(name.bytes()) {
        *to = from;
    }
    // SAFETY: the kernel reads and writes a struct ifreq, which this is as large as.
    checked(unsafe { ioctl_with_mut_ref(tun, libc::TUNSETIFF as c_ulong, &mut request) }).map(drop)
}

/// The flags of the interface this is a queue of (`TUNGETIFF`).
pub(super) fn interface_flags(fd: &OwnedFd) -> Result<c_int, Errno> {
    let mut request = InterfaceRequest::default();
    // SAFETY: the kernel writes a struct ifreq, which this is as large as. A descriptor that is no tun
    // does not know the ioctl, whose number is no other's.
    checked(unsafe { ioctl_with_mut_ref(fd, libc::TUNGETIFF as c_ulong, &mut request) })?;
    Ok(c_int::from(request.flags as u16))
}

/// Says how long the header before each frame is (`TUNSETVNETHDRSZ`).
pub(super) fn set_header_size(tap: &OwnedFd, size: c_int) -> Result<(), Errno> {
    // SAFETY: the kernel reads an int.
    checked(unsafe { ioctl_with_ref(tap, libc::TUNSETVNETHDRSZ as c_ulong, &size) }).map(drop)
}

/// Says what the kernel may leave to who reads (`TUNSETOFFLOAD`, `TUN_F_…`).
pub(super) fn set_offload(tap: &OwnedFd, flags: c_uint) -> Result<(), Errno> {
    // SAFETY: the argument is a number.
    let result = unsafe { ioctl_with_val(tap, libc::TUNSETOFFLOAD as c_ulong, flags.into()) };
    checked(result).map(drop)
}

/// Has the interface use this queue or not (`TUNSETQUEUE`).
pub(super) fn set_queue(tap: &OwnedFd, used: bool) -> Result<(), Errno> {
    let flags = if used { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
    let request = InterfaceRequest { flags: flags as c_short, ..Default::default() };
    // SAFETY: the kernel reads a struct ifreq, which this is as large as.
    checked(unsafe { ioctl_with_ref(tap, libc::TUNSETQUEUE as c_ulong, &request) }).map(drop)
}

/// The list of memory for one system call. Kept between calls for its allocation alone.
#[derive(Default)]
pub(super) struct Iovecs(Vec<iovec>);

// SAFETY: between calls the list is empty, so that no pointer goes anywhere.
unsafe impl Send for Iovecs {}

impl Iovecs {
    /// Reads what there is at once into guest memory and then into `rest`. Returns how many bytes; what is
    /// in guest memory is among the dirty pages.
    ///
    /// # Errors
    /// Those of readv(2). `EINVAL` also for too many parts, of which nothing is read.
    pub(super) fn read<'m, I: Iterator<Item = Part<'m>>>(
        &mut self,
        fd: impl AsFd,
        parts: impl Fn() -> I,
        rest: &mut [u8],
    ) -> Result<usize, Errno> {
        self.0.clear();
        let part = |part: Part<'m>| {
            let base = part.ptr_guard_mut().as_ptr().cast();
            iovec { iov_base: base, iov_len: part.len() }
        };
        self.0.extend(parts().take(MOST_PARTS).map(part));
        self.0.push(iovec { iov_base: rest.as_mut_ptr().cast(), iov_len: rest.len() });
        let count = c_int::try_from(self.0.len()).unwrap_or(c_int::MAX);
        let fd = fd.as_fd().as_raw_fd();
        // SAFETY: the parts are guest memory, which is mapped for 'm, longer than this call; there are no
        // references to it, and the guest may change it at any time as well. The last is `rest`.
        let read = unsafe { libc::readv(fd, self.0.as_ptr(), count) };
        let read = usize::try_from(read).map_err(|_| errno());
        self.0.clear();
        let mut left = read?;
        let all = left;
        for part in parts() {
            if left == 0 {
                break;
            }
            let written = part.len().min(left);
            part.bitmap().mark_dirty(0, written);
            left -= written;
        }
        Ok(all)
    }

    /// Writes `head` and then guest memory. Returns how many bytes.
    ///
    /// # Errors
    /// Those of writev(2). `EINVAL` also for too many parts, of which nothing is written.
    pub(super) fn write<'m>(
        &mut self,
        fd: impl AsFd,
        head: &[u8],
        parts: impl Iterator<Item = Part<'m>>,
    ) -> Result<usize, Errno> {
        self.0.clear();
        if !head.is_empty() {
            let base = head.as_ptr().cast_mut().cast();
            self.0.push(iovec { iov_base: base, iov_len: head.len() });
        }
        let part = |part: Part<'m>| {
            let base = part.ptr_guard().as_ptr().cast_mut().cast();
            iovec { iov_base: base, iov_len: part.len() }
        };
        self.0.extend(parts.take(MOST_PARTS + 1).map(part));
        let count = c_int::try_from(self.0.len()).unwrap_or(c_int::MAX);
        let fd = fd.as_fd().as_raw_fd();
        // SAFETY: as for reading; the kernel only reads what they point to.
        let written = unsafe { libc::writev(fd, self.0.as_ptr(), count) };
        let written = usize::try_from(written).map_err(|_| errno());
        self.0.clear();
        written
    }
}
