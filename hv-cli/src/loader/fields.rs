//! Little-endian fields of a header.

/// A header as bytes. A field that lies past the end reads as zero, which is what the boot
/// protocols give fields a header is too old to have; who needs more reads enough bytes first.
#[derive(Clone, Copy)]
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl Fields<'_> {
    pub(super) fn u8(self, at: usize) -> u8 {
        u8::from_le_bytes(self.array(at))
    }

    pub(super) fn u16(self, at: usize) -> u16 {
        u16::from_le_bytes(self.array(at))
    }

    pub(super) fn u32(self, at: usize) -> u32 {
        u32::from_le_bytes(self.array(at))
    }

    pub(super) fn u64(self, at: usize) -> u64 {
        u64::from_le_bytes(self.array(at))
    }

    fn array<const N: usize>(self, at: usize) -> [u8; N] {
        self.0.get(at..).and_then(|rest| rest.first_chunk()).copied().unwrap_or([0; N])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_little_endian_and_zero_past_the_end() {
        let fields = Fields(&[1, 2, 3, 4, 5, 6, 7, 8, 9]);
        assert_eq!((fields.u8(8), fields.u16(1), fields.u32(2)), (9, 0x0302, 0x0605_0403));
        assert_eq!(fields.u64(1), 0x0908_0706_0504_0302);
        assert_eq!((fields.u16(8), fields.u32(9), fields.u64(usize::MAX)), (0, 0, 0));
    }
}
