//! ELF kernels: 32 and 64 bits, by their program headers.
//!
//! Segments go to their physical addresses; nothing is relocated. Section headers and symbols are
//! never looked at. (System V ABI, chapters 4 and 5; notes as in Linux's and Xen's `elfnote.h`.)

use std::ops::Range;

use vm_memory::GuestMemoryBackend;

use super::error::Problem;
use super::fields::Fields;
use super::image::Image;
use super::space::{Part, Space};

/// The most program headers taken. Kernels have about five.
const MAX_HEADERS: u16 = 256;
/// The largest note segment taken, in bytes. Linux's has some hundred.
const MAX_NOTES: u64 = 64 << 10;

const ET_EXEC: u16 = 2;
const ET_DYN: u16 = 3;
const EM_386: u16 = 3;
const EM_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// The note with the 32-bit physical entry point of the PVH boot protocol.
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;

/// What is wrong with an ELF file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ElfError {
    /// Neither class 1 nor 2, or not little-endian.
    #[error("its ELF class {class} and data encoding {encoding} are not those of an x86 program")]
    Identification {
        /// `EI_CLASS`.
        class: u8,
        /// `EI_DATA`.
        encoding: u8,
    },
    /// Not for x86.
    #[error("it is an ELF file for machine {machine}, not for x86 (3) or x86-64 (62)")]
    Machine {
        /// `e_machine`.
        machine: u16,
    },
    /// An object file or a core dump.
    #[error("it is an ELF file of type {kind}, not an executable (2) or shared object (3)")]
    Type {
        /// `e_type`.
        kind: u16,
    },
    /// Program headers of another size than this class has.
    #[error("its program headers have {size} bytes each instead of {expected}")]
    HeaderSize {
        /// `e_phentsize`.
        size: u16,
        /// What the class prescribes.
        expected: u16,
    },
    /// More program headers than any kernel has.
    #[error("it has {count} program headers; at most {MAX_HEADERS} are taken")]
    TooManyHeaders {
        /// `e_phnum`.
        count: u16,
    },
    /// A segment larger in the file than in memory.
    #[error("its segment {index} has {file} bytes in the file, but only {memory} in memory")]
    SegmentSize {
        /// Number of the program header.
        index: u16,
        /// `p_filesz`.
        file: u64,
        /// `p_memsz`.
        memory: u64,
    },
    /// A note segment too large to be one.
    #[error("its note segment {index} has {size} bytes; at most {MAX_NOTES} are taken")]
    NoteSize {
        /// Number of the program header.
        index: u16,
        /// `p_filesz`.
        size: u64,
    },
    /// No `PT_LOAD` segment with any contents.
    #[error("it has no loadable segment")]
    NothingToLoad,
    /// An entry point outside every segment.
    #[error("its entry point {entry:#x} is in none of its segments")]
    Entry {
        /// The entry point.
        entry: u64,
    },
    /// A 32-bit file where the Linux 64-bit protocol was asked for.
    #[error("it is a 32-bit ELF file, but Linux's 64-bit entry needs a 64-bit one")]
    NotSixtyFour,
    /// No PVH entry note.
    #[error("it has no PVH entry note (Xen note 18): for Linux, build with CONFIG_PVH")]
    NoPvhNote,
    /// Neither entry that we know.
    #[error("it is a 32-bit ELF file without a multiboot header or a PVH entry note")]
    NoEntry,
}

/// A parsed ELF file.
#[derive(Debug)]
pub(super) struct Elf {
    /// Whether its class is `ELFCLASS64`.
    pub(super) is_64: bool,
    /// Whether it carries a note by "Linux", as every Linux kernel since 4.19 does.
    pub(super) is_linux: bool,
    /// The PVH entry point, if there is a note with one.
    pub(super) pvh_entry: Option<u32>,
    entry: u64,
    segments: Vec<Segment>,
}

#[derive(Debug)]
struct Segment {
    index: u16,
    offset: u64,
    virt: u64,
    phys: u64,
    file_size: u64,
    memory_size: u64,
}

impl Elf {
    /// Whether `head`, the first bytes of an image, start an ELF file.
    pub(super) fn recognise(head: &[u8]) -> bool {
        head.starts_with(b"\x7fELF")
    }

    /// Reads the headers and notes. The image has been recognised.
    pub(super) fn parse(image: &Image) -> Result<Self, Problem> {
        let mut ident = [0; 16];
        image.read_at("the ELF identification", 0, &mut ident)?;
        let [_, _, _, _, class, encoding, ..] = ident;
        let is_64 = match (class, encoding) {
            (1, 1) => false,
            (2, 1) => true,
            _ => return Err(ElfError::Identification { class, encoding }.into()),
        };

        let mut header = [0; 64];
        let header = header.get_mut(..if is_64 { 64 } else { 52 }).unwrap_or_default();
        image.read_at("the ELF header", 0, header)?;
        let header = Fields(header);
        let (kind, machine) = (header.u16(16), header.u16(18));
        if machine != EM_386 && machine != EM_X86_64 {
            return Err(ElfError::Machine { machine }.into());
        }
        if kind != ET_EXEC && kind != ET_DYN {
            return Err(ElfError::Type { kind }.into());
        }
        let (entry, table, at, expected) = if is_64 {
            (header.u64(24), header.u64(32), 54, 56)
        } else {
            (header.u32(24).into(), header.u32(28).into(), 42, 32)
        };
        let (size, count) = (header.u16(at), header.u16(at + 2));
        if count > MAX_HEADERS {
            return Err(ElfError::TooManyHeaders { count }.into());
        }
        if size != expected && count > 0 {
            return Err(ElfError::HeaderSize { size, expected }.into());
        }

        let mut headers = vec![0; usize::from(size) * usize::from(count)];
        image.read_at("the program header table", table, &mut headers)?;
        let mut elf = Self { is_64, is_linux: false, pvh_entry: None, entry, segments: Vec::new() };
        for (index, header) in (0..).zip(headers.chunks_exact(usize::from(expected))) {
            elf.program_header(image, index, Fields(header))?;
        }
        if elf.segments.is_empty() {
            return Err(ElfError::NothingToLoad.into());
        }
        Ok(elf)
    }

    fn program_header(
        &mut self,
        image: &Image,
        index: u16,
        header: Fields<'_>,
    ) -> Result<(), Problem> {
        // Offset, virtual and physical address, sizes in file and memory, alignment.
        let [offset, virt, phys, file_size, memory_size, align] = if self.is_64 {
            [8, 16, 24, 32, 40, 48].map(|at| header.u64(at))
        } else {
            [4, 8, 12, 16, 20, 28].map(|at| header.u32(at).into())
        };
        match header.u32(0) {
            PT_LOAD if memory_size < file_size => {
                let (file, memory) = (file_size, memory_size);
                Err(ElfError::SegmentSize { index, file, memory }.into())
            }
            PT_LOAD if memory_size > 0 => {
                image.check("an ELF segment", offset, file_size)?;
                let segment = Segment { index, offset, virt, phys, file_size, memory_size };
                self.segments.push(segment);
                Ok(())
            }
            PT_NOTE if file_size > MAX_NOTES => {
                Err(ElfError::NoteSize { index, size: file_size }.into())
            }
            PT_NOTE => {
                let mut notes = vec![0; usize::try_from(file_size).unwrap_or_default()];
                image.read_at("a note segment", offset, &mut notes)?;
                self.notes(&notes, if align == 8 { 8 } else { 4 });
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Looks for the notes that matter here. A broken note ends the search.
    fn notes(&mut self, mut notes: &[u8], align: usize) {
        while notes.len() >= 12 {
            let header = Fields(notes);
            let (name_size, size, kind) = (header.u32(0), header.u32(4), header.u32(8));
            let field = |at: usize, size: u32| {
                let end = at.checked_add(usize::try_from(size).ok()?)?;
                Some((notes.get(at..end)?, end.checked_next_multiple_of(align)?))
            };
            let Some((name, at)) = field(12, name_size) else { return };
            let Some((value, next)) = field(at, size) else { return };
            match name {
                b"Linux\0" => self.is_linux = true,
                b"Xen\0" if kind == XEN_ELFNOTE_PHYS32_ENTRY && value.len() >= 4 => {
                    self.pvh_entry = Some(Fields(value).u32(0));
                }
                _ => {}
            }
            notes = notes.get(next..).unwrap_or_default();
        }
    }

    /// The physical address of `e_entry`. Linux gives a physical address; others give a virtual
    /// one, which is translated.
    pub(super) fn entry(&self) -> Result<u64, ElfError> {
        let entry = self.entry;
        self.check_entry(entry).or_else(|error| {
            let segment = self.segments.iter().find(|segment| {
                entry.checked_sub(segment.virt).is_some_and(|at| at < segment.memory_size)
            });
            let physical = segment.and_then(|s| s.phys.checked_add(entry - s.virt));
            physical.ok_or(error)
        })
    }

    /// The PVH entry point.
    pub(super) fn pvh_entry(&self) -> Result<u64, ElfError> {
        self.pvh_entry.ok_or(ElfError::NoPvhNote).and_then(|entry| self.check_entry(entry.into()))
    }

    /// Returns the physical address `entry` if it lies in a segment.
    fn check_entry(&self, entry: u64) -> Result<u64, ElfError> {
        let inside = self.segments.iter().any(|segment| {
            entry.checked_sub(segment.phys).is_some_and(|at| at < segment.memory_size)
        });
        if inside { Ok(entry) } else { Err(ElfError::Entry { entry }) }
    }

    /// Copies the segments to guest memory, which is zero so far, and returns what they span.
    pub(super) fn load<M: GuestMemoryBackend>(
        &self,
        image: &Image,
        space: &mut Space<'_, M>,
    ) -> Result<Range<u64>, Problem> {
        let (mut start, mut end) = (u64::MAX, 0);
        for segment in &self.segments {
            let part = Part::Segment(segment.index);
            let range = space.claim(part, segment.phys, segment.memory_size)?;
            let bytes = (segment.offset, segment.file_size);
            image.copy_to("an ELF segment", bytes, space, part, range.start)?;
            (start, end) = (start.min(range.start), end.max(range.end));
        }
        Ok(start..end)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{
        ElfImage, MIB, bytes_at, image, linux_note, load_plain, memory, note, problem, pvh_note,
    };
    use super::super::{FileError, Format, PlaceError, Protocol};
    use super::*;

    fn parse(elf: &ElfImage) -> Result<Elf, Problem> {
        Elf::parse(&image(&elf.build()))
    }

    fn elf_error(elf: &ElfImage) -> ElfError {
        match problem(Format::Elf, &elf.build()) {
            Problem::Elf(error) => error,
            other => panic!("{other}"),
        }
    }

    #[test]
    fn finds_the_notes_of_linux_and_xen() {
        let both =
            ElfImage::new([note("GNU", 3, b"id1"), linux_note(), pvh_note(0x100_0600)].concat());
        let elf = parse(&both).unwrap();
        assert!(elf.is_64 && elf.is_linux);
        assert_eq!(elf.pvh_entry, Some(0x100_0600));
        let elf = parse(&ElfImage::new_32(note("Xen", 18, &0x10_0010u32.to_le_bytes()))).unwrap();
        assert!(!elf.is_64 && !elf.is_linux);
        assert_eq!(elf.pvh_entry(), Ok(0x10_0010));
        // Another number, another owner, a value too short.
        for other in
            [note("Xen", 17, &[0; 8]), note("Xenon", 18, &[0; 8]), note("Xen", 18, &[1; 2])]
        {
            assert_eq!(parse(&ElfImage::new(other)).unwrap().pvh_entry, None);
        }
    }

    #[test]
    fn a_note_that_lies_about_its_size_ends_the_search() {
        for size in [1000, u32::MAX - 3, u32::MAX] {
            let mut notes = linux_note();
            notes[4..8].copy_from_slice(&size.to_le_bytes());
            notes.extend(pvh_note(1));
            let elf = parse(&ElfImage::new(notes)).unwrap();
            assert_eq!((elf.is_linux, elf.pvh_entry), (false, None));
        }
    }

    #[test]
    fn the_segment_goes_to_its_physical_address_and_no_further() {
        let memory = memory(32);
        let elf = ElfImage::new(linux_note());
        let boot = load_plain(&memory, Format::Auto, &elf.build()).unwrap();
        assert_eq!((boot.protocol, boot.entry), (Protocol::Linux64, 16 * MIB));
        assert_eq!(boot.kernel, 16 * MIB..16 * MIB + 3 * 4096);
        assert_eq!(bytes_at(&memory, 16 * MIB, elf.code.len()), elf.code);
        assert_eq!(bytes_at(&memory, 16 * MIB + elf.code.len() as u64, 8192), [0; 8192]);
    }

    #[test]
    fn a_virtual_entry_point_is_translated_and_an_outside_one_refused() {
        let mut elf = ElfImage::new(linux_note());
        elf.entry = elf.virt + 0x40;
        assert_eq!(parse(&elf).unwrap().entry(), Ok(elf.phys + 0x40));
        elf.entry = elf.phys + elf.memory_size;
        assert_eq!(elf_error(&elf), ElfError::Entry { entry: elf.entry });
        let pvh = ElfImage::new(pvh_note(0x1234));
        assert_eq!(elf_error(&pvh), ElfError::Entry { entry: 0x1234 });
    }

    #[test]
    fn refuses_other_machines_types_and_encodings_by_number() {
        let elf = ElfImage::new(linux_note());
        assert_eq!(
            elf_error(&ElfImage { machine: 183, ..elf.clone() }),
            ElfError::Machine { machine: 183 }
        );
        assert_eq!(elf_error(&ElfImage { kind: 1, ..elf.clone() }), ElfError::Type { kind: 1 });
        let mut big_endian = elf.build();
        big_endian[5] = 2;
        assert_eq!(
            problem(Format::Auto, &big_endian),
            Problem::Elf(ElfError::Identification { class: 2, encoding: 2 })
        );
    }

    #[test]
    fn refuses_headers_that_lie() {
        let elf = ElfImage::new(linux_note());
        assert!(matches!(
            elf_error(&ElfImage { memory_size: 10, ..elf.clone() }),
            ElfError::SegmentSize { index: 0, file: 4096, memory: 10 }
        ));
        let with = |at: usize, bytes: &[u8]| {
            let mut image = elf.build();
            image[at..at + bytes.len()].copy_from_slice(bytes);
            problem(Format::Auto, &image)
        };
        // e_phnum, e_phentsize, p_filesz of the note segment, e_phoff.
        assert_eq!(with(56, &[0xff, 0xff]), ElfError::TooManyHeaders { count: 0xffff }.into());
        assert_eq!(with(56, &[0, 0]), ElfError::NothingToLoad.into());
        assert_eq!(with(54, &[0, 0]), ElfError::HeaderSize { size: 0, expected: 56 }.into());
        assert_eq!(with(154, &[1]), ElfError::NoteSize { index: 1, size: 0x1_0018 }.into());
        assert!(matches!(with(32, &[0xff; 8]), Problem::File(FileError::Truncated { .. })));
    }

    #[test]
    fn refuses_every_truncation() {
        let whole = ElfImage::new(linux_note()).build();
        for len in (1..whole.len()).step_by(7).chain([whole.len() - 1]) {
            let error = problem(Format::Elf, &whole[..len]);
            assert!(
                matches!(error, Problem::File(_) | Problem::WrongFormat { .. }),
                "{len}: {error}"
            );
        }
    }

    #[test]
    fn refuses_segments_outside_ram_and_says_how_much_there_is() {
        let elf = ElfImage::new(linux_note());
        for (phys, memory_size) in [(40 * MIB, 4096), (16 * MIB, 1 << 40), (0x9_f000, 0x2000)] {
            let elf = ElfImage { phys, memory_size, entry: phys, ..elf.clone() };
            let problem = problem(Format::Elf, &ElfImage { code: vec![1; 16], ..elf }.build());
            assert!(matches!(problem, Problem::Place(PlaceError::NotRam { .. })), "{problem}");
            assert!(
                problem.to_string().ends_with("0x0..0x9fc00, 0x100000..0x2000000"),
                "{problem}"
            );
        }
        let wrapping =
            ElfImage { phys: u64::MAX - 4095, entry: u64::MAX - 4095, memory_size: 1 << 20, ..elf };
        assert!(matches!(
            problem(Format::Elf, &wrapping.build()),
            Problem::Place(PlaceError::Wraps { .. })
        ));
    }
}
