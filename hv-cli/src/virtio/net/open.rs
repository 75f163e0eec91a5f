//! What `--net` names: opened, recognized, and made fit for a device.

use std::os::fd::{AsFd, OwnedFd, RawFd};

use hv_core::Errno;
use libc::{c_int, c_uint};
use rustix::fs::{Mode, OFlags, fcntl_getfl, fcntl_setfl, open};
use rustix::net::{SocketType, sockopt};
use rustix::rand::{GetRandomFlags, getrandom};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_GUEST_USO4,
    VIRTIO_NET_F_GUEST_USO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_UFO, VIRTIO_NET_F_HOST_USO,
};

use super::passt::{Passt, PasstError};
use super::port::{Kind, Port, Stream};
use super::{HEADER, Net, bits, sys};
use crate::config::{MacAddress, NetBackend, NetConfig};
use crate::virtio::Session;

/// Why there is no network device.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The kernel refuses something.
    #[error("--net {backend}: {call}: {errno}{}", hint(call, *errno))]
    Call {
        /// What it was for.
        backend: NetBackend,
        /// What was refused.
        call: &'static str,
        /// How.
        errno: Errno,
    },
    /// The descriptor is something else.
    #[error(
        "--net fd={0}: that is no tap interface (IFF_TAP | IFF_NO_PI) and no datagram, packet or \
         stream socket"
    )]
    Kind(RawFd),
    /// passt does not run.
    #[error("--net user: {0}")]
    Passt(#[from] PasstError),
}

const OPEN: &str = "opening /dev/net/tun";
const SET_INTERFACE: &str = "TUNSETIFF";
const DUPLICATE: &str = "fcntl(F_DUPFD_CLOEXEC)";

/// What can be done about it.
fn hint(call: &str, errno: Errno) -> &'static str {
    match (call, errno) {
        (OPEN, Errno::ENOENT | Errno::ENODEV) => {
            "; load it (`modprobe tun`) or pass the device into this container"
        }
        (OPEN, Errno::EACCES) => "; it should be open to everybody: look at its permissions",
        (SET_INTERFACE, Errno::EPERM) => {
            "; it is not there, or belongs to somebody else: as root, `ip tuntap add NAME mode tap user USER`"
        }
        (SET_INTERFACE, Errno::EBUSY) => "; another program uses it",
        (SET_INTERFACE, Errno::EINVAL) => {
            "; it is no tap interface, or it was made with multi_queue and is to have one queue here, \
             or the reverse"
        }
        (DUPLICATE, Errno::EBADF) => "; the program that starts hv has to leave it open",
        _ => "",
    }
}

const DEVICE: &str = "/dev/net/tun";

/// The kernel's flag for each feature with which it may leave work to the guest.
const GUEST: [(u32, c_uint); 7] = [
    (VIRTIO_NET_F_GUEST_CSUM, libc::TUN_F_CSUM),
    (VIRTIO_NET_F_GUEST_TSO4, libc::TUN_F_TSO4),
    (VIRTIO_NET_F_GUEST_TSO6, libc::TUN_F_TSO6),
    (VIRTIO_NET_F_GUEST_ECN, libc::TUN_F_TSO_ECN),
    (VIRTIO_NET_F_GUEST_UFO, libc::TUN_F_UFO),
    (VIRTIO_NET_F_GUEST_USO4, libc::TUN_F_USO4),
    (VIRTIO_NET_F_GUEST_USO6, libc::TUN_F_USO6),
];

/// What the driver took of them.
pub(super) fn offload_flags(session: &Session) -> c_uint {
    let taken = GUEST.iter().filter(|(feature, _)| session.has_feature(*feature));
    accepted(taken.fold(0, |flags, (_, flag)| flags | flag))
}

/// Those of them that Linux accepts: none without checksums, UDP segmentation only of both versions of IP,
/// and ECN only with TCP segmentation. A driver may take fewer features; then nothing is left to it that
/// it does not know.
pub(super) fn accepted(flags: c_uint) -> c_uint {
    let uso = libc::TUN_F_USO4 | libc::TUN_F_USO6;
    let tso = libc::TUN_F_TSO4 | libc::TUN_F_TSO6;
    if flags & libc::TUN_F_CSUM == 0 {
        return 0;
    }
    let without_uso = if flags & uso == uso { 0 } else { uso };
    let without_ecn = if flags & tso == 0 { libc::TUN_F_TSO_ECN } else { 0 };
    flags & !(without_uso | without_ecn)
}

/// What a tap interface can do, as feature bits.
fn offloads(tap: &OwnedFd) -> u64 {
    let host = [
        VIRTIO_NET_F_CSUM,
        VIRTIO_NET_F_HOST_TSO4,
        VIRTIO_NET_F_HOST_TSO6,
        VIRTIO_NET_F_HOST_ECN,
        VIRTIO_NET_F_HOST_UFO,
    ];
    let uso = libc::TUN_F_USO4 | libc::TUN_F_USO6;
    let all = GUEST.iter().fold(0, |flags, (_, flag)| flags | flag);
    let guest = |flags| GUEST.iter().filter(move |(_, flag)| flag & flags != 0);
    let guest = |flags| guest(flags).fold(0, |features, (feature, _)| features | 1 << feature);
    // Linux has USO since 6.2.
    let features = if sys::set_offload(tap, all).is_ok() {
        bits(&host) | bits(&[VIRTIO_NET_F_HOST_USO]) | guest(all)
    } else if sys::set_offload(tap, all & !uso).is_ok() {
        bits(&host) | guest(all & !uso)
    } else {
        0
    };
    // None of it before a driver has said so.
    let _ = sys::set_offload(tap, 0);
    features
}

impl Net {
    /// A device as it was asked for.
    ///
    /// # Errors
    /// What it is to be connected to can't be used.
    pub fn open(config: &NetConfig) -> Result<Self, NetError> {
        let failed = |call| {
            let backend = config.backend.clone();
            move |errno| NetError::Call { backend, call, errno }
        };
        let (ports, offloads, passt) = match &config.backend {
            NetBackend::Tap(name) => {
                let many = config.queues > 1;
                let taps = (0..config.queues.max(1)).map(|_| tap(name, many, failed));
                let taps = taps.collect::<Result<Vec<_>, _>>()?;
                let offloads = taps.first().map_or(0, offloads);
                let port = |fd| Port { fd, kind: Kind::Tap };
                (taps.into_iter().map(port).collect(), offloads, None)
            }
            NetBackend::Fd(fd) => {
                let (port, offloads) = inherited(*fd, failed)?;
                (vec![port], offloads, None)
            }
            NetBackend::User => {
                let (passt, fd) = Passt::start()?;
                set_nonblocking(&fd).map_err(failed("fcntl(F_SETFL)"))?;
                let kind = Kind::Stream(Stream::default());
                (vec![Port { fd, kind }], 0, Some(passt))
            }
        };
        let mac = match config.mac {
            Some(MacAddress(mac)) => mac,
            None => random_mac().map_err(failed("getrandom"))?,
        };
        Ok(Self::new(ports, offloads, mac, passt))
    }
}

/// A queue of a tap interface, which is made if it is not there and we may.
fn tap<F: FnOnce(Errno) -> NetError>(
    name: &str,
    many: bool,
    failed: impl Fn(&'static str) -> F,
) -> Result<OwnedFd, NetError> {
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let tap = open(DEVICE, flags, Mode::empty()).map_err(|errno| failed(OPEN)(own(errno)))?;
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    let many = if many { libc::IFF_MULTI_QUEUE } else { 0 };
    sys::set_interface(&tap, name, flags | many).map_err(failed(SET_INTERFACE))?;
    sys::set_header_size(&tap, HEADER as c_int).map_err(failed("TUNSETVNETHDRSZ"))?;
    Ok(tap)
}

/// What a number refers to that `hv` was started with.
fn inherited<F: FnOnce(Errno) -> NetError>(
    number: RawFd,
    failed: impl Fn(&'static str) -> F,
) -> Result<(Port, u64), NetError> {
    let fd = sys::duplicate(number).map_err(failed(DUPLICATE))?;
    let (kind, offloads) = match sys::interface_flags(&fd) {
        Ok(flags) if flags & libc::IFF_TAP == 0 || flags & libc::IFF_NO_PI == 0 => {
            return Err(NetError::Kind(number));
        }
        Ok(flags) if flags & libc::IFF_VNET_HDR == 0 => (Kind::Frames, 0),
        Ok(_) => {
            sys::set_header_size(&fd, HEADER as c_int).map_err(failed("TUNSETVNETHDRSZ"))?;
            (Kind::Tap, offloads(&fd))
        }
        // It is a tun without an interface.
        Err(errno @ Errno::EBADFD) => return Err(failed("TUNGETIFF")(errno)),
        Err(_) => match sockopt::socket_type(&fd) {
            Ok(SocketType::DGRAM | SocketType::RAW) => (Kind::Frames, 0),
            Ok(SocketType::STREAM) => (Kind::Stream(Stream::default()), 0),
            _ => return Err(NetError::Kind(number)),
        },
    };
    set_nonblocking(&fd).map_err(failed("fcntl(F_SETFL)"))?;
    Ok((Port { fd, kind }, offloads))
}

fn set_nonblocking(fd: impl AsFd) -> Result<(), Errno> {
    let flags = fcntl_getfl(&fd).map_err(own)?;
    fcntl_setfl(&fd, flags | OFlags::NONBLOCK).map_err(own)
}

/// An address of those that belong to nobody.
fn random_mac() -> Result<[u8; 6], Errno> {
    let mut mac = [0; 6];
    getrandom(&mut mac, GetRandomFlags::empty()).map_err(own)?;
    let [first, ..] = &mut mac;
    // Locally administered, of one station.
    *first = *first & !1 | 2;
    Ok(mac)
}

fn own(errno: rustix::io::Errno) -> Errno {
    Errno(errno.raw_os_error())
}
