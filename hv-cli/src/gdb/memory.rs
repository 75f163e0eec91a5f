//! Guest memory by linear address, as the debugger of a vCPU sees it.
//!
//! Through the page tables of that vCPU, whoever may access the page; RAM only, because reading a
//! device changes it. Breakpoints are not seen.

use hv_core::{Error, Vcpu};
use kvm_bindings::kvm_sregs;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::breakpoints::{Breakpoints, Memory};
use crate::complete::look_up;

const PAGE: u64 = 4096;

/// Why memory was not read or written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum AccessError {
    /// Not mapped, or not RAM.
    NotThere,
    /// The registers that tell of the page tables could not be read.
    Hypervisor(Error),
}

impl From<Error> for AccessError {
    fn from(error: Error) -> Self {
        Self::Hypervisor(error)
    }
}

/// The pieces of a range that lie in one page each: offset in the range, linear address, length.
fn pages(linear: u64, len: usize) -> impl Iterator<Item = (usize, u64, usize)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let at = linear.checked_add(done as u64).filter(|_| done < len)?;
        let left_in_page = (PAGE - at % PAGE) as usize;
        let piece = (done, at, left_in_page.min(len - done));
        done += piece.2;
        Some(piece)
    })
}

/// Where `len` bytes within a page are, if they are RAM.
fn ram(sregs: &kvm_sregs, memory: &Memory, linear: u64, len: usize) -> Option<GuestAddress> {
    let address = look_up(sregs, memory, linear)?.address;
    memory.check_range(address, len).then_some(address)
}

/// Reads from `linear` on, up to the first page that is not there; says how many bytes, at least one.
pub(super) fn read<V: Vcpu>(
    vcpu: &V,
    memory: &Memory,
    breakpoints: &Breakpoints,
    linear: u64,
    data: &mut [u8],
) -> Result<usize, AccessError> {
    let sregs = vcpu.sregs()?;
    let mut done = 0;
    for (offset, at, len) in pages(linear, data.len()) {
        let Some(address) = ram(&sregs, memory, at, len) else { break };
        let Some(piece) = data.get_mut(offset..offset + len) else { break };
        if memory.read_slice(piece, address).is_err() {
            break;
        }
        breakpoints.hide(address.0, piece);
        done = offset + len;
    }
    if done == 0 && !data.is_empty() { Err(AccessError::NotThere) } else { Ok(done) }
}

/// Writes all of `data` from `linear` on, or nothing.
pub(super) fn write<V: Vcpu>(
    vcpu: &V,
    memory: &Memory,
    breakpoints: &mut Breakpoints,
    linear: u64,
    data: &[u8],
) -> Result<(), AccessError> {
    let sregs = vcpu.sregs()?;
    let mut pieces = Vec::new();
    let mut there = 0;
    for (offset, at, len) in pages(linear, data.len()) {
        let address = ram(&sregs, memory, at, len).ok_or(AccessError::NotThere)?;
        let piece = data.get(offset..offset + len).ok_or(AccessError::NotThere)?;
        pieces.push((address, piece));
        there += len;
    }
    if there < data.len() {
        return Err(AccessError::NotThere);
    }
    for (address, piece) in pieces {
        if !breakpoints.write(memory, address.0, piece) {
            return Err(AccessError::NotThere);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use hv_core::mock::MockVcpu;
    use hv_core::{Errno, Ioctl};

    const PML4: u64 = 0x1000;
    const PT: u64 = 0x4000;
    /// Linear addresses start here; its pages are mapped in the order of `FRAMES`.
    const LINEAR: u64 = 0xffff_8000_0000_0000;
    /// Not contiguous; the last is a device.
    const FRAMES: [u64; 3] = [0x9000, 0x7000, 0xfee0_0000];

    fn memory() -> Memory {
        let memory = Memory::from_ranges(&[(GuestAddress(0), 0xa000)]).unwrap();
        let entry = |at: u64, value: u64| memory.write_obj(value, GuestAddress(at)).unwrap();
        entry(PML4 + 8 * 256, 0x2003);
        entry(0x2000, 0x3003);
        entry(0x3000, PT | 3);
        for (n, frame) in FRAMES.into_iter().enumerate() {
            // Read-only and not executable, which is nothing to a debugger.
            entry(PT + 8 * n as u64, frame | 1 | 1 << 63);
        }
        for frame in [0x7000u64, 0x9000] {
            let bytes: Vec<u8> = (0..PAGE).map(|n| (n / 16) as u8 ^ (frame >> 12) as u8).collect();
            memory.write_slice(&bytes, GuestAddress(frame)).unwrap();
        }
        memory
    }

    fn vcpu() -> MockVcpu {
        let mut vcpu = MockVcpu::new();
        vcpu.expect_sregs().returning(|| {
            Ok(kvm_sregs {
                cr0: 0x8000_0001,
                cr3: PML4,
                cr4: 0x20,
                efer: 0xd00,
                ..Default::default()
            })
        });
        vcpu
    }

    #[test]
    fn reads_cross_pages_that_are_apart() {
        let memory = memory();
        let mut data = [0; 6];
        let got = read(&vcpu(), &memory, &Breakpoints::default(), LINEAR + 0xffd, &mut data);
        assert_eq!(got, Ok(6));
        assert_eq!(data, [0xff ^ 9, 0xff ^ 9, 0xff ^ 9, 7, 7, 7]);
    }

    #[test]
    fn reads_end_at_what_is_not_ram() {
        let (memory, none) = (memory(), Breakpoints::default());
        let mut data = [0; 64];
        assert_eq!(read(&vcpu(), &memory, &none, LINEAR + 0x1ff0, &mut data), Ok(16));
        for linear in [LINEAR + 0x2000, LINEAR + 0x3000, 0, 0x1234_0000_0000_0000, u64::MAX - 3] {
            let got = read(&vcpu(), &memory, &none, linear, &mut data);
            assert_eq!(got, Err(AccessError::NotThere), "{linear:#x}");
        }
        assert_eq!(read(&vcpu(), &memory, &none, 0, &mut []), Ok(0));
    }

    #[test]
    fn writes_are_all_or_nothing_and_keep_breakpoints() {
        let (memory, mut breakpoints) = (memory(), Breakpoints::default());
        assert!(breakpoints.insert(&memory, LINEAR + 0x1000, 0x7000));
        let mut it = |linear, data: &[u8]| write(&vcpu(), &memory, &mut breakpoints, linear, data);
        assert_eq!(it(LINEAR + 0xfff, &[1, 2, 3]), Ok(()));
        assert_eq!(it(LINEAR + 0x1ffe, &[4, 5, 6]), Err(AccessError::NotThere));
        assert_eq!(it(u64::MAX, &[1, 2]), Err(AccessError::NotThere));
        assert_eq!(memory.read_obj::<[u8; 2]>(GuestAddress(0x7ffe)).unwrap(), [0xff ^ 7; 2]);
        assert_eq!(memory.read_obj::<[u8; 2]>(GuestAddress(0x7000)).unwrap(), [0xcc, 3]);
        let mut data = [0; 3];
        assert_eq!(read(&vcpu(), &memory, &breakpoints, LINEAR + 0xfff, &mut data), Ok(3));
        assert_eq!(data, [1, 2, 3]);
    }

    #[test]
    fn a_vcpu_that_does_not_tell_its_registers_is_an_error() {
        let error = Error::new(Ioctl::GetSregs, Errno::EIO);
        let mut vcpu = MockVcpu::new();
        vcpu.expect_sregs().returning(move || Err(error));
        let got = read(&vcpu, &memory(), &Breakpoints::default(), LINEAR, &mut [0]);
        assert_eq!(got, Err(AccessError::Hypervisor(error)));
    }
}
