//! Streams between the guest and the host, made from either side: whatever arrives is sent back.

use super::check::Found;
use super::sys::{self, EINTR, nr};

const AF_VSOCK: usize = 40;
const SOCK_STREAM: usize = 1;
const HOST_CID: u32 = 2;
const ANY_CID: u32 = u32::MAX;

/// Where the guest listens, and where the host does.
const GUEST_PORT: u32 = 1024;
const HOST_PORT: u32 = 5000;

/// `struct sockaddr_vm`.
#[repr(C)]
struct Address {
    family: u16,
    reserved: u16,
    port: u32,
    cid: u32,
    zero: [u8; 4],
}

impl Address {
    fn new(cid: u32, port: u32) -> Self {
        Self { family: AF_VSOCK as u16, reserved: 0, port, cid, zero: [0; 4] }
    }
}

/// Makes a socket, and binds or connects it.
fn socket(call: usize, address: &Address) -> Result<usize, usize> {
    let fd = sys::call(nr::SOCKET, [AF_VSOCK, SOCK_STREAM, 0, 0, 0])?;
    let at = core::ptr::from_ref(address) as usize;
    sys::call(call, [fd, at, size_of::<Address>(), 0, 0]).map(|_| fd)
}

/// Sends back what comes until it ends.
fn echo(fd: usize) -> Result<(), usize> {
    let mut buffer = [0; 8192];
    loop {
        match sys::read(fd, &mut buffer) {
            Ok(0) => break,
            Ok(n) => sys::write_all(fd, buffer.get(..n).unwrap_or_default())?,
            Err(EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    sys::close(fd);
    Ok(())
}

/// Connects to the host, which sends as much as it likes, and then is connected to.
pub fn check() -> Found {
    let failed = |what: &'static [u8]| move |errno| (what, errno);
    let listener = socket(nr::BIND, &Address::new(ANY_CID, GUEST_PORT)).map_err(failed(b"bind"))?;
    sys::call(nr::LISTEN, [listener, 1, 0, 0, 0]).map_err(failed(b"listen"))?;
    let to_host = socket(nr::CONNECT, &Address::new(HOST_CID, HOST_PORT));
    echo(to_host.map_err(failed(b"connect"))?).map_err(failed(b"echo to the host"))?;
    let from_host = sys::call(nr::ACCEPT, [listener, 0, 0, 0, 0]).map_err(failed(b"accept"))?;
    echo(from_host).map_err(failed(b"echo of the host"))?;
    sys::close(listener);
    Ok(b"connected and was connected to")
}
