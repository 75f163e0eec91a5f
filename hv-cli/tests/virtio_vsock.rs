//! The virtio socket device with a driver over PCI, on the KVM in memory: streams both ways, and what a
//! hostile guest or host does to one connection leaves the others alone.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

mod virtio;

use std::cell::Cell;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use hv_cli::virtio::Vsock;
use hv_core::fake::Finding;
use tempfile::TempDir;
use virtio::*;
use vm_memory::{Bytes, GuestAddress};

const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const RX_BUFFERS: u64 = 0x8_0000;
const RX_LEN: u32 = 4096;
const TX_BUFFER: u64 = 0xc_0000;

const CID: u64 = 3;
const HOST: u64 = 2;
const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RST: u16 = 3;
const SHUTDOWN: u16 = 4;
const RW: u16 = 5;
const CREDIT_UPDATE: u16 = 6;
const CREDIT_REQUEST: u16 = 7;

/// The ports of most tests.
const GUEST_PORT: u32 = 1234;
const HOST_PORT: u32 = 52;

fn never(_: &Finding) -> bool {
    false
}

/// A packet: what the fields of its header are, and its data.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Packet {
    src: (u64, u32),
    dst: (u64, u32),
    len: u32,
    kind: u16,
    op: u16,
    flags: u32,
    buf_alloc: u32,
    fwd_cnt: u32,
    data: Vec<u8>,
}

impl Packet {
    /// One of the guest, which has room for 64 KiB.
    fn new(op: u16, data: &[u8]) -> Self {
        let (src, dst) = ((CID, GUEST_PORT), (HOST, HOST_PORT));
        let (len, data) = (data.len() as u32, data.to_vec());
        Self { src, dst, len, kind: 1, op, flags: 0, buf_alloc: 65536, fwd_cnt: 0, data }
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(self.src.0.to_le_bytes());
        bytes.extend(self.dst.0.to_le_bytes());
        for field in [self.src.1, self.dst.1, self.len] {
            bytes.extend(field.to_le_bytes());
        }
        bytes.extend(self.kind.to_le_bytes());
        bytes.extend(self.op.to_le_bytes());
        for field in [self.flags, self.buf_alloc, self.fwd_cnt] {
            bytes.extend(field.to_le_bytes());
        }
        bytes.extend(&self.data);
        bytes
    }

    fn parse(bytes: &[u8]) -> Self {
        let long = |at| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        let word = |at| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        let half = |at| u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap());
        Self {
            src: (long(0), word(16)),
            dst: (long(8), word(20)),
            len: word(24),
            kind: half(28),
            op: half(30),
            flags: word(32),
            buf_alloc: word(36),
            fwd_cnt: word(40),
            data: bytes[44..].to_vec(),
        }
    }
}

/// The guest's side of a device.
struct Guest<'a> {
    driver: Driver<'a>,
    receive: Ring,
    transmit: Ring,
    received: Cell<u16>,
    sent: Cell<u16>,
    path: PathBuf,
    _dir: TempDir,
}

impl<'a> Guest<'a> {
    /// One without buffers for what it receives.
    fn without_buffers(machine: &'a Machine) -> Self {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("vsock");
        let driver = machine.add(Vsock::new(CID as u32, &path).unwrap());
        let rings = [0x1_0000, 0x2_0000, 0x3_0000].map(|at| Ring::new(machine, at, 64));
        driver.start_all(VERSION_1, &[&rings[0], &rings[1], &rings[2]]);
        let [receive, transmit, _] = rings;
        let (received, sent) = (Cell::new(0), Cell::new(0));
        Self { driver, receive, transmit, received, sent, path, _dir: dir }
    }

    fn new(machine: &'a Machine) -> Self {
        let this = Self::without_buffers(machine);
        this.give_buffers();
        this
    }

    fn give_buffers(&self) {
        for head in 0..16 {
            self.give_buffer(head);
        }
    }

    fn give_buffer(&self, head: u16) {
        let at = RX_BUFFERS + u64::from(head) * 0x2000;
        self.driver.offer(RECEIVE, &self.receive, head, (at, 44 + RX_LEN, WRITE));
    }

    fn send_bytes(&self, bytes: &[u8]) {
        let memory = &self.driver.machine.memory;
        memory.write_slice(bytes, GuestAddress(TX_BUFFER)).unwrap();
        self.driver.offer(TRANSMIT, &self.transmit, 0, (TX_BUFFER, bytes.len() as u32, 0));
        self.sent.set(self.sent.get() + 1);
        self.transmit.wait_for_used(self.sent.get());
    }

    fn send(&self, packet: &Packet) {
        self.send_bytes(&packet.bytes());
    }

    /// The next packet, whose buffer can be used again.
    fn receive(&self) -> Packet {
        let n = self.received.get();
        wait_for("a packet", || self.receive.used_index() != n);
        let (head, len) = self.receive.used_element(n);
        let mut bytes = vec![0; len as usize];
        let at = RX_BUFFERS + u64::from(head) * 0x2000;
        self.driver.machine.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        self.received.set(n.wrapping_add(1));
        self.give_buffer(head as u16);
        Packet::parse(&bytes)
    }

    fn expect(&self, op: u16) -> Packet {
        let packet = self.receive();
        assert_eq!((packet.op, packet.kind), (op, 1), "{packet:?}");
        assert_eq!((packet.src.0, packet.dst.0), (HOST, CID));
        packet
    }

    /// Data until there are `len` bytes; what else comes is passed over.
    fn receive_data(&self, len: usize) -> Vec<u8> {
        let mut data = Vec::new();
        while data.len() < len {
            let packet = self.receive();
            assert!([RW, CREDIT_UPDATE, CREDIT_REQUEST].contains(&packet.op), "{packet:?}");
            data.extend(packet.data);
            self.send(&Packet { fwd_cnt: data.len() as u32, ..Packet::new(CREDIT_UPDATE, &[]) });
        }
        data
    }

    fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(format!("{}_{port}", self.path.display())).unwrap()
    }

    /// A connection the guest makes.
    fn connect(&self) -> UnixStream {
        let listener = self.listen(HOST_PORT);
        self.send(&Packet::new(REQUEST, &[]));
        self.expect(RESPONSE);
        std::fs::remove_file(format!("{}_{HOST_PORT}", self.path.display())).unwrap();
        listener.accept().unwrap().0
    }

    /// A further connection works: nothing that was done to others matters.
    fn is_well(&self) {
        let listener = self.listen(99);
        let to = |packet: Packet| Packet { src: (CID, 7), dst: (HOST, 99), ..packet };
        self.send(&to(Packet::new(REQUEST, &[])));
        let mut packet = self.receive();
        while packet.dst.1 != 7 {
            packet = self.receive();
        }
        assert_eq!(packet.op, RESPONSE);
        let mut stream = listener.accept().unwrap().0;
        self.send(&to(Packet::new(RW, b"well")));
        assert_eq!(read(&mut stream, 4), b"well");
        assert_eq!(self.driver.counters().needs_reset, 0);
    }
}

fn read(stream: &mut UnixStream, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

fn is_closed(stream: &mut UnixStream) -> bool {
    let mut rest = Vec::new();
    match stream.read_to_end(&mut rest) {
        Ok(_) => rest.is_empty(),
        Err(error) => error.kind() == ErrorKind::ConnectionReset,
    }
}

fn with_guest(test: impl FnOnce(&Guest<'_>)) {
    let machine = Machine::new();
    let guest = Guest::new(&machine);
    let path = guest.path.clone();
    test(&guest);
    let Guest { driver, _dir, .. } = guest;
    drop(driver);
    machine.end(never);
    assert!(!path.exists(), "the socket file goes with the device");
}

/// The guest sends what breaks a rule on a connection: it is reset, and another works.
fn breaks(packet: impl FnOnce(&Guest<'_>) -> Packet) {
    with_guest(|guest| {
        let mut stream = guest.connect();
        let errors = guest.driver.counters().errors;
        let bad = packet(guest);
        guest.send(&bad);
        let reset = guest.expect(RST);
        assert_eq!((reset.src.1, reset.dst.1), (HOST_PORT, GUEST_PORT));
        assert!(is_closed(&mut stream));
        assert!(guest.driver.counters().errors > errors);
        guest.is_well();
    });
}

#[test]
fn the_driver_knows_its_cid() {
    with_guest(|guest| {
        assert_eq!(guest.driver.device_config(0), CID.to_le_bytes());
        assert_eq!(guest.driver.features() & 3, 1, "streams");
    });
}

#[test]
fn the_guest_reaches_a_socket_of_the_host_and_both_send() {
    with_guest(|guest| {
        let mut stream = guest.connect();
        guest.send(&Packet::new(RW, b"from the guest"));
        assert_eq!(read(&mut stream, 14), b"from the guest");
        stream.write_all(b"from the host").unwrap();
        let packet = guest.expect(RW);
        assert_eq!(packet.data, b"from the host");
        assert_eq!((packet.fwd_cnt, packet.buf_alloc), (14, 65536));
    });
}

#[test]
fn the_host_reaches_a_port_of_the_guest() {
    with_guest(|guest| {
        let mut stream = UnixStream::connect(&guest.path).unwrap();
        // What follows the line at once is for the guest.
        stream.write_all(b"CONNECT 77\nearly").unwrap();
        let request = guest.expect(REQUEST);
        assert_eq!(request.dst, (CID, 77));
        let reply = |op, data| Packet {
            src: (CID, 77),
            dst: (HOST, request.src.1),
            ..Packet::new(op, data)
        };
        guest.send(&reply(RESPONSE, &[]));
        let line = format!("OK {}\n", request.src.1);
        assert_eq!(read(&mut stream, line.len()), line.as_bytes());
        assert_eq!(guest.expect(RW).data, b"early");
        guest.send(&reply(RW, b"back"));
        assert_eq!(read(&mut stream, 4), b"back");
    });
}

#[test]
fn a_mebibyte_each_way_with_little_credit() {
    with_guest(|guest| {
        let mut stream = guest.connect();
        let data: Vec<u8> = (0..1 << 20).map(|n: u32| (n / 7) as u8).collect();
        let expected = data.clone();
        let mut writer = stream.try_clone().unwrap();
        let writing = std::thread::spawn(move || writer.write_all(&data));
        assert!(guest.receive_data(1 << 20) == expected);
        writing.join().unwrap().unwrap();
        let reading = std::thread::spawn(move || read(&mut stream, 1 << 20));
        let (mut sent, mut forwarded) = (0, 0);
        while sent < expected.len() {
            while sent - forwarded > 65536 - 4096 {
                forwarded = guest.receive().fwd_cnt as usize;
            }
            let data = &expected[sent..sent + 4096];
            guest.send(&Packet { fwd_cnt: 1 << 20, ..Packet::new(RW, data) });
            sent += 4096;
        }
        assert!(reading.join().unwrap() == expected);
    });
}

#[test]
fn the_host_ends_its_half_and_the_guest_goes_on() {
    with_guest(|guest| {
        let mut stream = guest.connect();
        stream.write_all(b"last").unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        assert_eq!(guest.expect(RW).data, b"last");
        assert_eq!(guest.expect(SHUTDOWN).flags, 2, "it will send no more");
        guest.send(&Packet::new(RW, b"answer"));
        assert_eq!(read(&mut stream, 6), b"answer");
        guest.send(&Packet { flags: 3, ..Packet::new(SHUTDOWN, &[]) });
        guest.expect(RST);
        assert!(is_closed(&mut stream));
    });
}

#[test]
fn the_guest_ends_its_half_and_the_host_goes_on() {
    with_guest(|guest| {
        let mut stream = guest.connect();
        guest.send(&Packet::new(RW, b"last"));
        guest.send(&Packet { flags: 2, ..Packet::new(SHUTDOWN, &[]) });
        assert_eq!(read(&mut stream, 4), b"last");
        assert!(is_closed(&mut stream));
        stream.write_all(b"answer").unwrap();
        assert_eq!(guest.expect(RW).data, b"answer");
        drop(stream);
        assert_eq!(guest.expect(SHUTDOWN).flags, 3);
        guest.send(&Packet::new(RST, &[]));
        guest.is_well();
    });
}

#[test]
fn a_host_that_goes_is_told_as_a_shutdown_of_both_halves() {
    with_guest(|guest| {
        let mut stream = guest.connect();
        stream.write_all(b"last").unwrap();
        drop(stream);
        assert_eq!(guest.receive_data(4), b"last");
        let mut flags = 0;
        while flags != 3 {
            flags = guest.expect(SHUTDOWN).flags;
        }
        // What is still sent to it goes nowhere.
        guest.send(&Packet::new(RW, b"lost"));
        guest.send(&Packet { flags: 3, ..Packet::new(SHUTDOWN, &[]) });
        guest.expect(RST);
        guest.is_well();
    });
}

#[test]
fn ports_where_nobody_listens_are_reset() {
    with_guest(|guest| {
        guest.send(&Packet::new(REQUEST, &[]));
        guest.expect(RST);
        // A file that is no socket, and a link to nowhere.
        std::fs::write(format!("{}_{HOST_PORT}", guest.path.display()), "").unwrap();
        guest.send(&Packet::new(REQUEST, &[]));
        guest.expect(RST);
        guest.is_well();
    });
}

#[test]
fn a_guest_that_refuses_closes_the_hosts_socket() {
    with_guest(|guest| {
        let mut stream = UnixStream::connect(&guest.path).unwrap();
        stream.write_all(b"CONNECT 5\n").unwrap();
        let port = guest.expect(REQUEST).src.1;
        guest.send(&Packet { src: (CID, 5), dst: (HOST, port), ..Packet::new(RST, &[]) });
        assert!(is_closed(&mut stream));
        guest.is_well();
    });
}

#[test]
fn a_host_that_talks_nonsense_is_closed() {
    with_guest(|guest| {
        for text in ["GET / HTTP/1.0\r\n", "CONNECT x\n", &"C".repeat(1000)] {
            let mut stream = UnixStream::connect(&guest.path).unwrap();
            stream.write_all(text.as_bytes()).unwrap();
            let mut rest = Vec::new();
            let closed = stream.read_to_end(&mut rest);
            assert!(closed.is_err() || rest.is_empty());
        }
        guest.is_well();
    });
}

#[test]
fn hosts_that_say_nothing_do_not_keep_others_out() {
    with_guest(|guest| {
        let silent: Vec<_> = (0..40).map(|_| UnixStream::connect(&guest.path).unwrap()).collect();
        let mut stream = UnixStream::connect(&guest.path).unwrap();
        stream.write_all(b"CONNECT 5\n").unwrap();
        guest.expect(REQUEST);
        drop(silent);
        guest.is_well();
    });
}

#[test]
fn a_host_that_does_not_read_stops_its_own_connection_only() {
    with_guest(|guest| {
        let mut slow = guest.connect();
        // As much as the device and the socket keep: then it gives no more credit.
        let mut sent = 0u32;
        let mut forwarded = 0u32;
        loop {
            if sent.wrapping_sub(forwarded) == 65536 {
                guest.send(&Packet::new(CREDIT_REQUEST, &[]));
                let told = guest.expect(CREDIT_UPDATE).fwd_cnt;
                if told == forwarded {
                    break;
                }
                forwarded = told;
            }
            let room = 65536 - sent.wrapping_sub(forwarded);
            let data = vec![1; room.min(4096) as usize];
            if data.is_empty() {
                continue;
            }
            guest.send(&Packet::new(RW, &data));
            sent += data.len() as u32;
        }
        assert!(sent > 65536);
        guest.is_well();
        assert_eq!(read(&mut slow, sent as usize).len(), sent as usize);
    });
}

#[test]
fn a_guest_without_buffers_keeps_its_packets_and_gets_them_later() {
    let machine = Machine::new();
    let guest = Guest::without_buffers(&machine);
    let listener = guest.listen(HOST_PORT);
    guest.send(&Packet::new(REQUEST, &[]));
    let mut stream = listener.accept().unwrap().0;
    stream.write_all(b"waits").unwrap();
    guest.send(&Packet::new(CREDIT_REQUEST, &[]));
    assert_eq!(guest.receive.used_index(), 0);
    guest.give_buffers();
    guest.expect(RESPONSE);
    assert_eq!(guest.receive_data(5), b"waits");
    drop(guest.driver);
    machine.end(never);
}

#[test]
fn packets_for_nobody_without_buffers_for_answers_are_left_in_the_queue() {
    let machine = Machine::new();
    let guest = Guest::without_buffers(&machine);
    let bytes = Packet::new(RW, b"").bytes();
    machine.memory.write_slice(&bytes, GuestAddress(TX_BUFFER)).unwrap();
    guest.transmit.descriptor(0, TX_BUFFER, 44, 0, 0);
    // Far more than are answered: the device stops taking them, and the ring is full.
    let mut offered = 0u16;
    wait_for("a device that takes no more", || {
        if offered.wrapping_sub(guest.transmit.used_index()) < 64 {
            guest.transmit.offer(0);
            guest.driver.ring(TRANSMIT);
            offered += 1;
        }
        assert!(offered < 1000, "{offered} were taken");
        offered > 100 && guest.transmit.used_index() + 64 == offered
    });
    guest.give_buffers();
    for _ in 0..offered {
        assert_eq!(guest.receive().op, RST);
    }
    guest.transmit.wait_for_used(offered);
    drop(guest.driver);
    machine.end(never);
}

#[test]
fn a_length_beyond_the_packet() {
    breaks(|_| Packet { len: 5, ..Packet::new(RW, b"four") });
}

#[test]
fn a_length_of_4_gib() {
    breaks(|_| Packet { len: u32::MAX, ..Packet::new(RW, b"four") });
}

#[test]
fn an_unknown_operation() {
    for op in [0, 8, u16::MAX] {
        breaks(|_| Packet::new(op, &[]));
    }
}

#[test]
fn a_second_request_for_a_connection() {
    breaks(|_| Packet::new(REQUEST, &[]));
}

#[test]
fn a_response_nobody_asked_for() {
    breaks(|_| Packet::new(RESPONSE, &[]));
}

#[test]
fn data_after_its_shutdown() {
    breaks(|guest| {
        guest.send(&Packet { flags: 2, ..Packet::new(SHUTDOWN, &[]) });
        Packet::new(RW, b"late")
    });
}

#[test]
fn more_taken_than_was_sent() {
    breaks(|_| Packet { fwd_cnt: 1, ..Packet::new(CREDIT_UPDATE, &[]) });
}

#[test]
fn more_sent_than_there_was_credit_for() {
    with_guest(|guest| {
        let mut stream = guest.connect();
        // The host takes nothing, so that at some time it is too much.
        let data = vec![0; 60_000];
        let bytes = Packet::new(RW, &data).bytes();
        for _ in 0..100 {
            guest.send_bytes(&bytes);
            let seen = guest.received.get();
            if guest.receive.used_index() != seen && guest.receive().op == RST {
                break;
            }
        }
        assert!(guest.driver.counters().errors > 0);
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest);
        assert!(rest.len() < 100 * 60_000);
        guest.is_well();
    });
}

#[test]
fn credit_that_is_none_or_endless_changes_nothing_but_the_own_connection() {
    with_guest(|guest| {
        let mut stream = guest.connect();
        guest.send(&Packet { buf_alloc: 0, ..Packet::new(CREDIT_UPDATE, &[]) });
        stream.write_all(b"waits").unwrap();
        guest.expect(CREDIT_REQUEST);
        guest.send(&Packet { buf_alloc: u32::MAX, ..Packet::new(CREDIT_UPDATE, &[]) });
        assert_eq!(guest.expect(RW).data, b"waits");
        guest.is_well();
    });
}

#[test]
fn operations_on_connections_that_do_not_exist() {
    with_guest(|guest| {
        for op in [RESPONSE, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST, 77] {
            guest.send(&Packet::new(op, b""));
            let reset = guest.expect(RST);
            assert_eq!((reset.src.1, reset.dst.1), (HOST_PORT, GUEST_PORT), "{op}");
        }
        // A reset is not answered.
        guest.send(&Packet::new(RST, &[]));
        assert_eq!(guest.receive.used_index(), guest.received.get());
        guest.is_well();
    });
}

#[test]
fn a_wrong_cid() {
    with_guest(|guest| {
        let mut stream = guest.connect();
        for cid in [0, 1, HOST, CID + 1, CID | 1 << 32, u64::MAX] {
            guest.send(&Packet { src: (cid, GUEST_PORT), ..Packet::new(RW, b"spoofed") });
        }
        for cid in [0, 1, CID, 4, HOST | 1 << 32, u64::MAX] {
            guest.send(&Packet { dst: (cid, HOST_PORT), ..Packet::new(REQUEST, &[]) });
            let reset = guest.receive();
            assert_eq!((reset.op, reset.src), (RST, (cid, HOST_PORT)));
        }
        assert_eq!(guest.driver.counters().errors, 12);
        guest.send(&Packet::new(RW, b"real"));
        assert_eq!(read(&mut stream, 4), b"real");
        guest.is_well();
    });
}

#[test]
fn an_unknown_type() {
    with_guest(|guest| {
        for kind in [0, 2, u16::MAX] {
            guest.send(&Packet { kind, ..Packet::new(REQUEST, &[]) });
            let reset = guest.receive();
            assert_eq!((reset.op, reset.kind), (RST, kind));
        }
        guest.is_well();
    });
}

#[test]
fn packets_that_are_too_short() {
    with_guest(|guest| {
        guest.send_bytes(&Packet::new(REQUEST, &[]).bytes()[..43]);
        guest.send_bytes(&[0]);
        guest.driver.offer(TRANSMIT, &guest.transmit, 0, (TX_BUFFER, 64, WRITE));
        guest.sent.set(guest.sent.get() + 1);
        guest.transmit.wait_for_used(guest.sent.get());
        assert_eq!(guest.driver.counters().errors, 3);
        guest.is_well();
    });
}

#[test]
fn buffers_with_no_room_for_a_packet() {
    let machine = Machine::new();
    let guest = Guest::without_buffers(&machine);
    for (head, len) in [(20, 0), (21, 43), (22, 44)] {
        guest.driver.offer(RECEIVE, &guest.receive, head, (RX_BUFFERS, len, WRITE));
    }
    guest.send(&Packet::new(RW, &[]));
    guest.receive.wait_for_used(3);
    assert!((0..3).all(|n| guest.receive.used_element(n).1 == 0));
    guest.received.set(3);
    guest.give_buffers();
    guest.expect(RST);
    guest.is_well();
    drop(guest.driver);
    machine.end(never);
}

#[test]
fn more_connections_than_there_can_be() {
    with_guest(|guest| {
        let listener = guest.listen(HOST_PORT);
        let mut streams = Vec::new();
        let mut refused = 0;
        for port in 0..300 {
            guest.send(&Packet { src: (CID, port), ..Packet::new(REQUEST, &[]) });
            match guest.receive().op {
                RESPONSE => streams.push(listener.accept().unwrap().0),
                RST => refused += 1,
                op => panic!("{op}"),
            }
        }
        assert_eq!((streams.len(), refused), (256, 44));
        // The host is kept out as well, until one goes.
        let mut late = UnixStream::connect(&guest.path).unwrap();
        late.write_all(b"CONNECT 5\n").unwrap();
        assert!(is_closed(&mut late));
        guest.send(&Packet { src: (CID, 0), ..Packet::new(RST, &[]) });
        drop(listener);
        guest.is_well();
    });
}

#[test]
fn a_reset_closes_all_connections_and_new_ones_are_possible() {
    with_guest(|guest| {
        let mut stream = guest.connect();
        let mut greeting = UnixStream::connect(&guest.path).unwrap();
        greeting.write_all(b"CONN").unwrap();
        guest.driver.start_all(VERSION_1, &[&guest.receive, &guest.transmit]);
        assert!(is_closed(&mut stream));
        guest.received.set(0);
        guest.sent.set(0);
        guest.give_buffers();
        guest.is_well();
    });
}

#[test]
fn a_path_with_something_else_is_an_error_that_says_so() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("vsock");
    std::fs::write(&path, "precious").unwrap();
    let link = dir.path().join("link");
    std::os::unix::fs::symlink("nowhere", &link).unwrap();
    let error = |path: &PathBuf| Vsock::new(3, path).err().unwrap().to_string();
    assert!(error(&path).ends_with("exists and is no socket; choose another path"));
    assert!(error(&link).contains("link' exists and is no socket"));
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
    let used = dir.path().join("used");
    let _device = Vsock::new(3, &used).unwrap();
    assert!(error(&used).contains("another process listens on"));
    let long = dir.path().join("x".repeat(96));
    assert!(error(&long).contains("96 bytes at most"));
}
