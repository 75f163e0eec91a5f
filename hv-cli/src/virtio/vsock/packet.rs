//! Packets (virtio 1.2, 5.10.6): a header, and for some of them data.
//!
//! The packets of the crate virtio-vsock are made of a chain of virtio-queue, which a
//! [`Chain`](crate::virtio::Chain) is not any more, and its header has no accessors.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use crate::virtio::{Chain, QueueError};

/// Bytes of a header.
pub(super) const HEADER: u32 = size_of::<Header>() as u32;

/// The CID of the host.
pub(super) const HOST_CID: u64 = 2;

/// `VIRTIO_VSOCK_TYPE_STREAM`.
pub(super) const STREAM: u16 = 1;

/// What a packet is for (`VIRTIO_VSOCK_OP_*`).
pub(super) mod op {
    pub(crate) const REQUEST: u16 = 1;
    pub(crate) const RESPONSE: u16 = 2;
    pub(crate) const RST: u16 = 3;
    pub(crate) const SHUTDOWN: u16 = 4;
    pub(crate) const RW: u16 = 5;
    pub(crate) const CREDIT_UPDATE: u16 = 6;
    pub(crate) const CREDIT_REQUEST: u16 = 7;
}

/// Flags of a shutdown: its sender will receive no more, or send no more.
pub(super) const NO_RECEIVE: u32 = 1;
pub(super) const NO_SEND: u32 = 2;

/// The header of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Header {
    pub(super) src_cid: U64,
    pub(super) dst_cid: U64,
    pub(super) src_port: U32,
    pub(super) dst_port: U32,
    pub(super) len: U32,
    pub(super) kind: U16,
    pub(super) op: U16,
    pub(super) flags: U32,
    pub(super) buf_alloc: U32,
    pub(super) fwd_cnt: U32,
}

impl Header {
    /// The header at the start of a request.
    ///
    /// # Errors
    /// It is too short.
    pub(super) fn read(request: &Chain) -> Result<Self, QueueError> {
        let mut header = Self::new_zeroed();
        request.read_at(0, header.as_mut_bytes())?;
        Ok(header)
    }

    /// The packet that resets what this one is about.
    pub(super) fn reset(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: op::RST.into(),
            ..Self::new_zeroed()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_little_endian_and_without_padding() {
        assert_eq!(HEADER, 44);
        let mut bytes = [0; 44];
        for (index, byte) in bytes.iter_mut().enumerate() {
            *byte = index as u8;
        }
        let header = Header::read_from_bytes(&bytes).unwrap();
        assert_eq!(header.src_cid.get(), 0x0706_0504_0302_0100);
        assert_eq!((header.len.get(), header.kind.get()), (0x1b1a_1918, 0x1d1c));
        assert_eq!((header.op.get(), header.fwd_cnt.get()), (0x1f1e, 0x2b2a_2928));
        let reset = header.reset();
        assert_eq!((reset.src_cid, reset.dst_port), (header.dst_cid, header.src_port));
        assert_eq!((reset.op.get(), reset.len.get()), (op::RST, 0));
    }
}
