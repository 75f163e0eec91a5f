//! Kernel images made from scratch, for the tests of this module.

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::*;

pub(super) const MIB: u64 = 1 << 20;

pub(super) fn memory(mib: u64) -> GuestMemoryMmap {
    let size = usize::try_from(mib * MIB).unwrap();
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), size)]).unwrap()
}

pub(super) fn image(bytes: &[u8]) -> Image {
    Image::from_bytes("/boot/kernel", bytes.to_vec()).unwrap()
}

pub(super) fn bytes_at(memory: &GuestMemoryMmap, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
    bytes
}

/// Loads `bytes` without an initrd or a command line.
pub(super) fn load_plain(
    memory: &GuestMemoryMmap,
    format: Format,
    bytes: &[u8],
) -> Result<BootState, LoadError> {
    let map = MemoryMap::new(memory, &[]);
    let request = LoadRequest {
        format,
        cmdline: None,
        initrd: None,
        map: &map,
        linux_cmdline: LINUX_CMDLINE,
        rsdp: None,
    };
    load(memory, &image(bytes), &request)
}

/// The problem of an image that must not load into 32 MiB.
pub(super) fn problem(format: Format, bytes: &[u8]) -> Problem {
    load_plain(&memory(32), format, bytes).unwrap_err().problem
}

/// An ELF note.
pub(super) fn note(owner: &str, kind: u32, value: &[u8]) -> Vec<u8> {
    let padded = |bytes: &[u8]| {
        let mut bytes = bytes.to_vec();
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    };
    let owner = format!("{owner}\0");
    let header = [owner.len() as u32, value.len() as u32, kind];
    let header = header.iter().flat_map(|field| field.to_le_bytes());
    header.chain(padded(owner.as_bytes())).chain(padded(value)).collect()
}

pub(super) fn linux_note() -> Vec<u8> {
    note("Linux", 0x100, b"salt")
}

pub(super) fn pvh_note(entry: u32) -> Vec<u8> {
    note("Xen", 18, &u64::from(entry).to_le_bytes())
}

/// An ELF file with one loadable segment.
#[derive(Clone)]
pub(super) struct ElfImage {
    pub(super) is_64: bool,
    pub(super) machine: u16,
    pub(super) kind: u16,
    pub(super) entry: u64,
    pub(super) virt: u64,
    pub(super) phys: u64,
    pub(super) memory_size: u64,
    pub(super) code: Vec<u8>,
    pub(super) notes: Vec<u8>,
}

impl ElfImage {
    /// A 64-bit kernel at 16 MiB, linked high, entered at the start.
    pub(super) fn new(notes: Vec<u8>) -> Self {
        let code: Vec<u8> = (0..4096u32).map(|at| (at % 251) as u8).collect();
        Self {
            is_64: true,
            machine: 62,
            kind: 2,
            entry: 16 * MIB,
            virt: 0xffff_ffff_8100_0000,
            phys: 16 * MIB,
            memory_size: 3 * 4096,
            code,
            notes,
        }
    }

    /// A 32-bit one at 1 MiB.
    pub(super) fn new_32(notes: Vec<u8>) -> Self {
        let (virt, entry) = (0xc010_0000, MIB);
        Self { is_64: false, machine: 3, entry, virt, phys: MIB, ..Self::new(notes) }
    }

    pub(super) fn build(&self) -> Vec<u8> {
        let (header_size, entry_size) = if self.is_64 { (64, 56) } else { (52, 32) };
        let notes_at = header_size + 2 * entry_size;
        let code_at = notes_at + self.notes.len() as u64;
        let mut out = Vec::new();
        let word = |out: &mut Vec<u8>, value: u64| {
            let size = if self.is_64 { 8 } else { 4 };
            out.extend(&value.to_le_bytes()[..size]);
        };
        out.extend(b"\x7fELF");
        out.extend([1 + u8::from(self.is_64), 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        out.extend(self.kind.to_le_bytes());
        out.extend(self.machine.to_le_bytes());
        out.extend(1u32.to_le_bytes());
        word(&mut out, self.entry);
        word(&mut out, header_size);
        word(&mut out, 0);
        out.extend(0u32.to_le_bytes());
        for field in [header_size as u16, entry_size as u16, 2, 0, 0, 0] {
            out.extend(field.to_le_bytes());
        }
        let code = (1u32, code_at, self.virt, self.phys, self.code.len() as u64, self.memory_size);
        let notes = (4u32, notes_at, 0, 0, self.notes.len() as u64, self.notes.len() as u64);
        for (kind, offset, virt, phys, file, memory) in [code, notes] {
            out.extend(kind.to_le_bytes());
            if self.is_64 {
                out.extend(5u32.to_le_bytes());
            }
            for value in [offset, virt, phys, file, memory] {
                word(&mut out, value);
            }
            if !self.is_64 {
                out.extend(5u32.to_le_bytes());
            }
            word(&mut out, 4);
        }
        out.extend(&self.notes);
        out.extend(&self.code);
        out
    }
}

/// A bzImage with a payload.
#[derive(Clone)]
pub(super) struct BzImageFile {
    pub(super) version: u16,
    pub(super) xloadflags: u16,
    pub(super) cmdline_size: u32,
    pub(super) initrd_addr_max: u32,
    pub(super) pref_address: u64,
    pub(super) init_size: u32,
    pub(super) payload: Vec<u8>,
}

impl BzImageFile {
    pub(super) fn new(payload: &[u8]) -> Self {
        Self {
            version: 0x020f,
            xloadflags: 1,
            cmdline_size: 2047,
            initrd_addr_max: 0x7fff_ffff,
            pref_address: 16 * MIB,
            init_size: MIB as u32,
            payload: payload.to_vec(),
        }
    }

    /// Offset of the payload in the protected-mode part.
    const PAYLOAD: usize = 0x400;

    pub(super) fn build(&self) -> Vec<u8> {
        let mut code = vec![0x90; Self::PAYLOAD];
        code.extend(&self.payload);
        code.resize(code.len().next_multiple_of(16), 0);
        let mut out = vec![0; 1024];
        let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
        put(0x1f1, &[1]);
        put(0x1f4, &(code.len() as u32 / 16).to_le_bytes());
        put(0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]);
        put(0x202, b"HdrS");
        put(0x206, &self.version.to_le_bytes());
        put(0x211, &[1]);
        put(0x214, &0x10_0000u32.to_le_bytes());
        put(0x22c, &self.initrd_addr_max.to_le_bytes());
        put(0x230, &0x20_0000u32.to_le_bytes());
        put(0x236, &self.xloadflags.to_le_bytes());
        put(0x238, &self.cmdline_size.to_le_bytes());
        put(0x248, &(Self::PAYLOAD as u32).to_le_bytes());
        put(0x24c, &(self.payload.len() as u32).to_le_bytes());
        put(0x258, &self.pref_address.to_le_bytes());
        put(0x260, &self.init_size.to_le_bytes());
        out.extend(code);
        out
    }
}

/// A multiboot header with these flags and address fields.
pub(super) fn multiboot_header(flags: u32, addresses: [u32; 5]) -> Vec<u8> {
    let magic = 0x1bad_b002u32;
    let checksum = 0u32.wrapping_sub(magic).wrapping_sub(flags);
    [magic, flags, checksum].into_iter().chain(addresses).flat_map(u32::to_le_bytes).collect()
}

/// The kernel in `testdata/`, as packed by the system's tools: [`ElfImage::new`] with the Linux
/// note and code full of calls to one address, which the x86 filter of xz rewrites.
///
/// Made as the kernel's build does: `gzip -n9`, `lz4 -l -9`, `xz --check=crc32 --x86
/// --lzma2=dict=1MiB` and `zstd -19`, all but the first followed by the unpacked size in 4 bytes.
pub(super) fn sample_kernel() -> ElfImage {
    let mut elf = ElfImage::new(linux_note());
    elf.code = (0..800u32)
        .flat_map(|index| {
            let [a, b, c, d] = (0x2000u32.wrapping_sub(index * 5)).to_le_bytes();
            [0xe8, a, b, c, d]
        })
        .collect();
    elf
}

pub(super) const SAMPLE_GZIP: &[u8] = include_bytes!("testdata/kernel.gz");
pub(super) const SAMPLE_LZ4: &[u8] = include_bytes!("testdata/kernel.lz4");
pub(super) const SAMPLE_XZ: &[u8] = include_bytes!("testdata/kernel.xz");
pub(super) const SAMPLE_ZSTD: &[u8] = include_bytes!("testdata/kernel.zst");
