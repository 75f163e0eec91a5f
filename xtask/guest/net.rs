//! What the test guest does over its network interface: 16 MiB over TCP, each way, with a checksum.
//!
//! The kernel has got an address by then (`ip=dhcp`). The other end is the first address of its network, port
//! 7777, where a test listens: it sends its bytes and gets their sum, then gets as many others and their sum.

use super::check::Found;
use super::sys::{self, EINTR, call, nr};

/// Bytes each way.
const TOTAL: usize = 16 << 20;
/// What the guest's bytes are made of; the host's are whatever it sends.
const SEED: u64 = 0x6775_6573_7400_0001;

const AF_INET: u16 = 2;
const SOCK_STREAM: usize = 1;
const SIOCGIFADDR: usize = 0x8915;
const PORT: u16 = 7777;

/// A chunk of what goes over the connection.
const CHUNK: usize = 32 << 10;

pub fn net() -> Found {
    let socket = call(nr::SOCKET, [AF_INET.into(), SOCK_STREAM, 0, 0, 0]);
    let socket = socket.map_err(|errno| (&b"socket"[..], errno))?;
    // struct ifreq, and in it struct sockaddr_in: family, port, address.
    let mut request = [0_u8; 40];
    for (to, from) in request.iter_mut().zip(b"eth0") {
        *to = *from;
    }
    call(nr::IOCTL, [socket, SIOCGIFADDR, request.as_mut_ptr() as usize, 0, 0])
        .map_err(|errno| (&b"eth0 has no address"[..], errno))?;
    let mut address = [0_u8; 16];
    for (to, from) in address.iter_mut().zip(request.iter().skip(16)) {
        *to = *from;
    }
    let [_, _, high, low, _, _, _, last, ..] = &mut address;
    [*high, *low] = PORT.to_be_bytes();
    *last = 1;
    call(nr::CONNECT, [socket, address.as_ptr() as usize, address.len(), 0, 0])
        .map_err(|errno| (&b"connecting"[..], errno))?;

    let mut buffer = [0; CHUNK];
    let (mut left, mut sum) = (TOTAL, Sum::new());
    while left > 0 {
        let len = left.min(CHUNK);
        let room = buffer.get_mut(..len).unwrap_or_default();
        let got = match sys::read(socket, room) {
            Ok(0) => return Err((b"the other end closed", 0)),
            Ok(got) => got,
            Err(EINTR) => 0,
            Err(errno) => return Err((b"receiving", errno)),
        };
        sum.add(buffer.get(..got).unwrap_or_default());
        left -= got;
    }
    send(socket, &sum.0.to_le_bytes())?;

    let (mut left, mut sum, mut state) = (TOTAL, Sum::new(), SEED);
    while left > 0 {
        for bytes in buffer.chunks_exact_mut(8) {
            // xorshift64.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            for (to, from) in bytes.iter_mut().zip(state.to_le_bytes()) {
                *to = from;
            }
        }
        sum.add(&buffer);
        send(socket, &buffer)?;
        left -= CHUNK;
    }
    send(socket, &sum.0.to_le_bytes())?;
    // The other end closes when it has all.
    match sys::read(socket, &mut buffer) {
        Ok(0) => Ok(b"16 MiB each way"),
        Ok(_) => Err((b"more than was to come", 0)),
        Err(errno) => Err((b"waiting for the end", errno)),
    }
}

fn send(socket: usize, mut bytes: &[u8]) -> Result<(), (&'static [u8], usize)> {
    while !bytes.is_empty() {
        match call(nr::WRITE, [socket, bytes.as_ptr() as usize, bytes.len(), 0, 0]) {
            Ok(sent) => bytes = bytes.get(sent..).unwrap_or_default(),
            Err(EINTR) => {}
            Err(errno) => return Err((b"sending", errno)),
        }
    }
    Ok(())
}

/// FNV-1a, 64 bits.
struct Sum(u64);

impl Sum {
    fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    fn add(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
        }
    }
}
