//! Decompression of kernel payloads, never into more memory than the guest could use.

use std::fmt;
use std::io::{self, Read};

/// The dictionary memory an xz payload may ask for, in KiB. Linux is packed with 128 MiB at most.
const XZ_MEMORY_KIB: u32 = 256 << 10;
/// Uncompressed size of a full block in the legacy LZ4 format.
const LZ4_BLOCK: usize = 8 << 20;
const LZ4_MAGIC: u32 = 0x184c_2102;

/// A compression format that is unpacked on the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// gzip.
    Gzip,
    /// The legacy frame format of LZ4 (`lz4 -l`).
    Lz4,
    /// xz, with or without the x86 filter.
    Xz,
    /// Zstandard.
    Zstd,
}

impl Compression {
    /// The format of `payload`; `None` if it is one that only the guest can unpack.
    pub(super) fn detect(payload: &[u8]) -> Option<Self> {
        let formats: [(&[u8], Self); 4] = [
            (b"\x1f\x8b\x08", Self::Gzip),
            (b"\x02\x21\x4c\x18", Self::Lz4),
            (b"\xfd7zXZ\0", Self::Xz),
            (b"\x28\xb5\x2f\xfd", Self::Zstd),
        ];
        formats.iter().find(|(magic, _)| payload.starts_with(magic)).map(|&(_, format)| format)
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Gzip => "gzip",
            Self::Lz4 => "lz4",
            Self::Xz => "xz",
            Self::Zstd => "zstd",
        })
    }
}

/// Why a payload can't be decompressed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecompressError {
    /// The compressed data is broken.
    #[error("its {format} payload is corrupt: {kind}")]
    Corrupt {
        /// The format.
        format: Compression,
        /// What the decoder said.
        kind: io::ErrorKind,
    },
    /// More than the guest could hold.
    #[error("its {format} payload unpacks to more than the {limit} bytes of RAM the guest has")]
    TooLarge {
        /// The format.
        format: Compression,
        /// The most that was taken, in bytes.
        limit: usize,
    },
    /// The host has no memory for it.
    #[error("the host has no memory to unpack its {format} payload")]
    OutOfMemory {
        /// The format.
        format: Compression,
    },
}

/// Unpacks `payload` into at most `limit` bytes.
pub(super) fn decompress(
    format: Compression,
    payload: &[u8],
    limit: usize,
) -> Result<Vec<u8>, DecompressError> {
    let mut output = Output { bytes: Vec::new(), format, limit };
    let corrupt = DecompressError::Corrupt { format, kind: io::ErrorKind::InvalidData };
    match format {
        Compression::Gzip => output.fill(flate2::read::GzDecoder::new(payload))?,
        Compression::Xz => {
            let reader = lzma_rust2::XzReader::new_mem_limit(payload, false, XZ_MEMORY_KIB);
            output.fill(reader)?;
        }
        Compression::Zstd => {
            let mut decoder =
                ruzstd::decoding::StreamingDecoder::new(payload).map_err(|_| corrupt.clone())?;
            output.fill(&mut decoder)?;
            let stored = decoder.decoder.get_checksum_from_data();
            if stored.is_some() && stored != decoder.decoder.get_calculated_checksum() {
                return Err(corrupt);
            }
        }
        Compression::Lz4 => lz4_legacy(payload, &mut output)?,
    }
    Ok(output.bytes)
}

/// The legacy format is a magic number and blocks, each after its compressed size, to the end of
/// the file. Linux appends the uncompressed size, which looks like the size of a block that is
/// not there.
fn lz4_legacy(payload: &[u8], output: &mut Output) -> Result<(), DecompressError> {
    let corrupt = |kind| DecompressError::Corrupt { format: Compression::Lz4, kind };
    let mut block = vec![0; LZ4_BLOCK];
    let mut rest = payload;
    while let Some((size, after)) = rest.split_first_chunk::<4>() {
        let size = u32::from_le_bytes(*size);
        rest = after;
        if size == LZ4_MAGIC {
            continue;
        }
        if rest.is_empty() {
            break;
        }
        let (packed, after) = usize::try_from(size)
            .ok()
            .and_then(|size| rest.split_at_checked(size))
            .ok_or(corrupt(io::ErrorKind::UnexpectedEof))?;
        rest = after;
        let len = lz4_flex::block::decompress_into(packed, &mut block)
            .map_err(|_| corrupt(io::ErrorKind::InvalidData))?;
        output.push(block.get(..len).unwrap_or_default())?;
    }
    Ok(())
}

/// Output that stops growing at a limit.
struct Output {
    bytes: Vec<u8>,
    format: Compression,
    limit: usize,
}

impl Output {
    fn fill(&mut self, mut reader: impl Read) -> Result<(), DecompressError> {
        let mut piece = [0; 64 << 10];
        loop {
            match reader.read(&mut piece) {
                Ok(0) => return Ok(()),
                Ok(len) => self.push(piece.get(..len).unwrap_or_default())?,
                Err(error) => {
                    let kind = match error.kind() {
                        // The zstd decoder calls all of its errors that.
                        io::ErrorKind::Other => io::ErrorKind::InvalidData,
                        kind => kind,
                    };
                    return Err(DecompressError::Corrupt { format: self.format, kind });
                }
            }
        }
    }

    fn push(&mut self, bytes: &[u8]) -> Result<(), DecompressError> {
        let format = self.format;
        let len = self.bytes.len().saturating_add(bytes.len());
        if len > self.limit {
            return Err(DecompressError::TooLarge { format, limit: self.limit });
        }
        if len > self.bytes.capacity() {
            // Doubling, but never beyond the limit.
            let capacity = self.bytes.capacity().saturating_mul(2).clamp(len, self.limit);
            self.bytes
                .try_reserve_exact(capacity - self.bytes.len())
                .map_err(|_| DecompressError::OutOfMemory { format })?;
        }
        self.bytes.extend_from_slice(bytes);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::super::testing::{SAMPLE_GZIP, SAMPLE_LZ4, SAMPLE_XZ, SAMPLE_ZSTD, sample_kernel};
    use super::*;

    const SAMPLES: [(Compression, &[u8]); 4] = [
        (Compression::Gzip, SAMPLE_GZIP),
        (Compression::Lz4, SAMPLE_LZ4),
        (Compression::Xz, SAMPLE_XZ),
        (Compression::Zstd, SAMPLE_ZSTD),
    ];

    #[test]
    fn unpacks_what_the_systems_tools_packed() {
        for (format, sample) in SAMPLES {
            assert_eq!(Compression::detect(sample), Some(format));
            let kernel = decompress(format, sample, 1 << 20).unwrap();
            assert!(kernel == sample_kernel().build(), "{format}");
        }
    }

    #[test]
    fn leaves_other_formats_to_the_guest() {
        for magic in [&b"BZh91AY"[..], b"\x89LZO\0\r", b"\x5d\0\0\0\x10", b"\x7fELF", b""] {
            assert_eq!(Compression::detect(magic), None);
        }
    }

    #[test]
    fn stops_at_the_limit_without_taking_more() {
        for (format, sample) in SAMPLES {
            let size = sample_kernel().build().len();
            assert!(decompress(format, sample, size).is_ok());
            let error = decompress(format, sample, size - 1).unwrap_err();
            assert_eq!(error, DecompressError::TooLarge { format, limit: size - 1 });
        }
    }

    #[test]
    fn a_bomb_costs_no_more_than_the_limit() {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
        for _ in 0..64 {
            encoder.write_all(&[0; 1 << 20]).unwrap();
        }
        let bomb = encoder.finish().unwrap();
        assert!(bomb.len() < 100 << 10);
        let mut output = Output { bytes: Vec::new(), format: Compression::Gzip, limit: 1_000_000 };
        let error = output.fill(flate2::read::GzDecoder::new(&bomb[..])).unwrap_err();
        assert!(matches!(error, DecompressError::TooLarge { limit: 1_000_000, .. }));
        assert!(output.bytes.capacity() <= 1_000_000, "{}", output.bytes.capacity());
    }

    #[test]
    fn refuses_an_xz_dictionary_beyond_the_bound() {
        // The size of the dictionary is one byte of the block header, here of 4 GiB - 1.
        let mut payload = SAMPLE_XZ.to_vec();
        let header_size = (usize::from(payload[12]) + 1) * 4;
        let property = payload[12..].windows(2).position(|filter| filter == [0x21, 1]).unwrap();
        payload[12 + property + 2] = 40;
        let crc_at = 12 + header_size - 4;
        let crc = flate2_crc(&payload[12..crc_at]);
        payload[crc_at..crc_at + 4].copy_from_slice(&crc.to_le_bytes());
        let error = decompress(Compression::Xz, &payload, 1 << 20).unwrap_err();
        assert_eq!(
            error,
            DecompressError::Corrupt { format: Compression::Xz, kind: io::ErrorKind::OutOfMemory }
        );
    }

    fn flate2_crc(bytes: &[u8]) -> u32 {
        let mut crc = flate2::Crc::new();
        crc.update(bytes);
        crc.sum()
    }

    #[test]
    fn a_truncated_payload_is_corrupt() {
        for (format, sample) in SAMPLES {
            let error = decompress(format, &sample[..sample.len() / 2], 1 << 20).unwrap_err();
            assert!(matches!(error, DecompressError::Corrupt { .. }), "{format}: {error}");
            assert!(error.to_string().contains("corrupt"));
        }
    }

    #[test]
    fn a_zstd_checksum_that_is_wrong_is_noticed() {
        let mut payload = SAMPLE_ZSTD.to_vec();
        let checksum = payload.len() - 5;
        payload[checksum] ^= 1;
        assert!(decompress(Compression::Zstd, &payload, 1 << 20).is_err());
    }

    proptest! {
        #[test]
        fn damaged_payloads_never_panic_and_never_exceed_the_limit(
            which in 0usize..4,
            damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
            cut in any::<prop::sample::Index>(),
            limit in 0usize..16_384,
        ) {
            let (format, sample) = SAMPLES[which];
            let mut payload = sample.to_vec();
            for (at, value) in damage {
                let at = at.index(payload.len());
                payload[at] = value;
            }
            payload.truncate(cut.index(payload.len() * 2).max(1));
            if let Ok(kernel) = decompress(format, &payload, limit) {
                prop_assert!(kernel.len() <= limit);
            }
        }

        #[test]
        fn random_payloads_never_panic(
            which in 0usize..4, tail in prop::collection::vec(any::<u8>(), 0..2048),
        ) {
            let (format, sample) = SAMPLES[which];
            let payload: Vec<u8> = sample.iter().take(6).copied().chain(tail).collect();
            let _ = decompress(format, &payload, 1 << 20);
        }
    }
}
