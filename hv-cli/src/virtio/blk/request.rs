//! What a driver asks of a disk (virtio 1.2, 5.2.6), checked before anything is done.
//!
//! A request is a header of 16 bytes, data, and a byte for the status. Where one buffer ends and the
//! next begins means nothing.

use rustix::fs::FallocateFlags;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use crate::virtio::Chain;

/// Bytes of a sector, whatever the disk has.
pub(super) const SECTOR: u64 = 512;
/// Bytes of the header: type, reserved, sector.
pub(super) const HEADER: u32 = 16;
/// Bytes of a segment: sector, number of sectors, flags.
const SEGMENT: u32 = 16;
/// The most segments of a discard or a write of zeroes.
pub(super) const MOST_SEGMENTS: u32 = 32;
/// The most sectors of one: 2 GiB, so that the file system is done with it soon.
pub(super) const MOST_SECTORS: u32 = 1 << 22;

/// Why a request is not done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Failure {
    /// It is wrong, or it went wrong.
    Io,
    /// The disk can't do that.
    Unsupported,
}

impl Failure {
    /// The status the driver gets.
    pub(super) fn status(self) -> u8 {
        match self {
            Self::Io => VIRTIO_BLK_S_IOERR as u8,
            Self::Unsupported => VIRTIO_BLK_S_UNSUPP as u8,
        }
    }
}

/// What is asked for. All of it is within the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Request {
    /// Fill the writable part, but for its last byte, from this offset of the file on.
    Read { offset: u64 },
    /// Write the readable part, behind its header, from this offset on.
    Write { offset: u64 },
    /// Make everything that was written safe.
    Flush,
    /// Change what ranges of the file are made of.
    Allocate(Vec<Allocation>),
    /// Tell the serial number.
    Id,
}

/// A fallocate(2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Allocation {
    pub(super) flags: FallocateFlags,
    pub(super) offset: u64,
    pub(super) len: u64,
}

/// What a request is checked against.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Geometry {
    pub(super) sectors: u64,
    pub(super) read_only: bool,
}

impl Request {
    /// Reads a request of a chain with room for the status.
    pub(super) fn parse(chain: &Chain, geometry: Geometry) -> Result<Self, Failure> {
        let header: [u8; HEADER as usize] = read(chain, 0)?;
        let [kind @ .., _, _, _, _, _, _, _, _, _, _, _, _] = header;
        let [.., a, b, c, d, e, f, g, h] = header;
        let sector = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
        let to_read = u64::from(chain.readable_len().saturating_sub(HEADER));
        let to_write = u64::from(chain.writable_len().saturating_sub(1));
        match u32::from_le_bytes(kind) {
            VIRTIO_BLK_T_IN => {
                geometry.offset(sector, to_write).map(|offset| Self::Read { offset })
            }
            VIRTIO_BLK_T_OUT => {
                geometry.writable()?;
                geometry.offset(sector, to_read).map(|offset| Self::Write { offset })
            }
            VIRTIO_BLK_T_FLUSH => Ok(Self::Flush),
            VIRTIO_BLK_T_GET_ID => Ok(Self::Id),
            VIRTIO_BLK_T_DISCARD => {
                let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                segments(chain, geometry, |flags| (flags == 0).then_some(hole)).map(Self::Allocate)
            }
            VIRTIO_BLK_T_WRITE_ZEROES => {
                let how = |flags| match flags {
                    0 => Some(FallocateFlags::ZERO_RANGE),
                    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP => {
                        Some(FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE)
                    }
                    _ => None,
                };
                segments(chain, geometry, how).map(Self::Allocate)
            }
            _ => Err(Failure::Unsupported),
        }
    }
}

impl Geometry {
    /// Where in the file so many bytes from a sector on are, if they are whole sectors and there.
    fn offset(self, sector: u64, len: u64) -> Result<u64, Failure> {
        let end = sector.checked_add(len / SECTOR).ok_or(Failure::Io)?;
        if !len.is_multiple_of(SECTOR) || end > self.sectors {
            return Err(Failure::Io);
        }
        // The file has as many.
        sector.checked_mul(SECTOR).ok_or(Failure::Io)
    }

    fn writable(self) -> Result<(), Failure> {
        if self.read_only { Err(Failure::Io) } else { Ok(()) }
    }
}

/// The segments of a discard or a write of zeroes. `how` says what is done by one with these flags.
fn segments(
    chain: &Chain,
    geometry: Geometry,
    how: impl Fn(u32) -> Option<FallocateFlags>,
) -> Result<Vec<Allocation>, Failure> {
    geometry.writable()?;
    let len = chain.readable_len().saturating_sub(HEADER);
    let count = len / SEGMENT;
    if !len.is_multiple_of(SEGMENT) || !(1..=MOST_SEGMENTS).contains(&count) {
        return Err(Failure::Io);
    }
    let mut all = Vec::with_capacity(count as usize);
    for index in 0..count {
        let sector = u64::from_le_bytes(read(chain, HEADER + index * SEGMENT)?);
        let sectors = u32::from_le_bytes(read(chain, HEADER + index * SEGMENT + 8)?);
        let flags = u32::from_le_bytes(read(chain, HEADER + index * SEGMENT + 12)?);
        let flags = how(flags).ok_or(Failure::Unsupported)?;
        if sectors > MOST_SECTORS {
            return Err(Failure::Io);
        }
        let len = u64::from(sectors) * SECTOR;
        let offset = geometry.offset(sector, len)?;
        if len > 0 {
            all.push(Allocation { flags, offset, len });
        }
    }
    Ok(all)
}

fn read<const N: usize>(chain: &Chain, offset: u32) -> Result<[u8; N], Failure> {
    let mut data = [0; N];
    chain.read_at(offset, &mut data).map_err(|_| Failure::Io)?;
    Ok(data)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_whole_sectors_within_the_disk() {
        let disk = Geometry { sectors: 8, read_only: false };
        for (sector, len, offset) in [(0, 4096, 0), (7, 512, 3584), (8, 0, 4096), (3, 512, 1536)] {
            assert_eq!(disk.offset(sector, len), Ok(offset));
        }
        for (sector, len) in [
            (0, 4608),
            (8, 512),
            (9, 0),
            (0, 1),
            (0, 513),
            (u64::MAX, 512),
            (u64::MAX, 0),
            (1 << 55, 0),
            (u64::MAX - 7, 4096),
        ] {
            assert_eq!(disk.offset(sector, len), Err(Failure::Io), "{sector}, {len}");
        }
    }
}
