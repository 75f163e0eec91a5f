//! What a device is made of, and what it offers.

use super::*;

#[test]
fn errors_say_whether_a_frame_or_the_other_side_is_lost() {
    for errno in [Errno::EINVAL, Errno::EMSGSIZE, Errno::EIO, Errno::ENETDOWN, Errno::ENOBUFS] {
        assert_eq!(failed(errno), Sent::No, "{errno}");
    }
    assert_eq!(failed(Errno::EAGAIN), Sent::Later);
    assert_eq!(failed(Errno::EBADFD), Sent::Gone);
}

#[test]
fn offloads_are_offered_for_what_has_them() {
    let (port, _host) = frames();
    let net = Net::new(vec![port], 0, [2, 0, 0, 0, 0, 9], None);
    let offloads = 1 << VIRTIO_NET_F_CSUM | 1 << VIRTIO_NET_F_HOST_TSO4;
    assert_eq!(net.features() & (offloads | MQ), 0);
    let (port, _host) = frames();
    let net = Net::new(vec![port], offloads, [2, 0, 0, 0, 0, 9], None);
    assert_eq!(net.features() & (offloads | MRG), offloads | MRG);
    let mut config = [0; CONFIG_LEN];
    net.config().get(0, &mut config);
    assert_eq!(config, [2, 0, 0, 0, 0, 9, 1, 0, 1, 0]);
}

#[test]
fn descriptors_are_recognized() {
    let open = |fd| Net::open(&NetConfig::new(NetBackend::Fd(fd)));
    let (datagram, _other) = UnixDatagram::pair().unwrap();
    let net = open(datagram.as_raw_fd()).unwrap();
    assert!(matches!(net.pairs[0].port.kind, Kind::Frames));
    let mac = {
        let mut mac = [0; 6];
        net.config().get(0, &mut mac);
        mac
    };
    assert_eq!(mac[0] & 3, 2, "of one station, and nobody's");
    let (stream, _other) = UnixStream::pair().unwrap();
    let net = open(stream.as_raw_fd()).unwrap();
    assert!(matches!(net.pairs[0].port.kind, Kind::Stream(_)));
    let file = tempfile::tempfile().unwrap();
    let error = open(file.as_raw_fd()).map(drop).unwrap_err();
    assert!(matches!(error, NetError::Kind(_)), "{error}");
    let error = open(1 << 20).map(drop).unwrap_err().to_string();
    assert!(error.starts_with("--net fd=1048576: fcntl(F_DUPFD_CLOEXEC): EBADF"), "{error}");
}

#[test]
fn a_driver_may_take_a_part_of_the_offloads() {
    use libc::{TUN_F_CSUM, TUN_F_TSO_ECN, TUN_F_TSO4, TUN_F_UFO, TUN_F_USO4, TUN_F_USO6};
    for (taken, accepted) in [
        (0, 0),
        (TUN_F_TSO4 | TUN_F_UFO, 0),
        (TUN_F_CSUM | TUN_F_TSO4, TUN_F_CSUM | TUN_F_TSO4),
        // These Linux refuses with EINVAL as they are.
        (TUN_F_CSUM | TUN_F_USO4, TUN_F_CSUM),
        (TUN_F_CSUM | TUN_F_USO6 | TUN_F_UFO, TUN_F_CSUM | TUN_F_UFO),
        (TUN_F_CSUM | TUN_F_TSO_ECN, TUN_F_CSUM),
        (
            TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO_ECN | TUN_F_USO4 | TUN_F_USO6,
            TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO_ECN | TUN_F_USO4 | TUN_F_USO6,
        ),
    ] {
        assert_eq!(super::super::open::accepted(taken), accepted, "{taken:#x}");
    }
}
