//! A guest that writes blocks to a disk and says which of them are safe, and what then has to be there.

#![allow(unsafe_code, reason = "the guest is assembled by global_asm! and named by extern statics")]

use crate::common::Image;

/// Bytes of a block, and how many the disk has.
pub(crate) const BLOCK: usize = 4096;
pub(crate) const BLOCKS: u32 = 64;
/// How many of them are written in each generation, in turn.
pub(crate) const BATCH: u32 = 8;

const MAGIC: u32 = 0x6b6c_6221;
/// Where the guest puts the registers: in the window of the BARs below 4 GiB.
const REGISTERS: u32 = 0xc800_0000;

core::arch::global_asm!(
    include_str!("writer.S"),
    registers = const REGISTERS,
    magic = const MAGIC,
    blocks = const BLOCKS,
);

unsafe extern "C" {
    static hv_test_disk_writer: u8;
    static hv_test_disk_writer_end: u8;
}

/// The guest, which powers off after so many generations.
pub(crate) fn writer(generations: u32) -> Image {
    let (start, end) = (&raw const hv_test_disk_writer, &raw const hv_test_disk_writer_end);
    let len = end as usize - start as usize;
    // SAFETY: the bytes between the two symbols are the guest, in one read-only section.
    let mut code = unsafe { std::slice::from_raw_parts(start, len) }.to_vec();
    // mov ebp, imm32
    assert_eq!(code[..5], [0xbd, 0xff, 0xff, 0xff, 0xff]);
    code[1..5].copy_from_slice(&generations.to_le_bytes());
    Image::multiboot(&code)
}

/// The last generation that the guest has said to be flushed; 0 if none was.
pub(crate) fn flushed(output: &str) -> u32 {
    let lines = output.split_inclusive('\n').filter(|line| line.ends_with('\n'));
    let mut last = 0;
    for line in lines {
        let number = line.trim_end().strip_prefix("wsF");
        let number = number.unwrap_or_else(|| panic!("the guest says {line:?}"));
        let number = u32::from_str_radix(number, 16).unwrap();
        assert_eq!(number, last + 1);
        last = number;
    }
    last
}

/// What a block of the disk holds: nothing, or its generation.
///
/// # Panics
/// It is torn, or is another block.
fn generation(disk: &[u8], block: u32) -> Option<u32> {
    let bytes = &disk[block as usize * BLOCK..][..BLOCK];
    if bytes.iter().all(|byte| *byte == 0) {
        return None;
    }
    let words: Vec<u32> =
        bytes.chunks_exact(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect();
    let &[magic, number, generation, sum, ref contents @ ..] = &words[..] else { unreachable!() };
    assert_eq!((magic, number), (MAGIC, block), "block {block} is another, or torn");
    let total = contents.iter().chain([&magic, &number, &generation]);
    let total = total.fold(0u32, |sum, word| sum.wrapping_add(*word));
    assert_eq!(total, sum, "block {block} of generation {generation} is torn");
    let in_batch = block % BATCH;
    let mut next = generation * BATCH + in_batch;
    for (index, word) in contents.iter().enumerate() {
        next = next.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        assert_eq!(*word, next, "word {index} of block {block} of generation {generation}");
    }
    Some(generation)
}

/// Checks that the disk has all that was flushed, that no block is torn, and that none is of a time
/// before or after that is possible.
pub(crate) fn check(disk: &[u8], flushed: u32) {
    assert_eq!(disk.len(), BLOCKS as usize * BLOCK);
    let turns = BLOCKS / BATCH;
    for block in 0..BLOCKS {
        let found = generation(disk, block).unwrap_or(0);
        // The generations that wrote this block are those with this remainder.
        let turn = block / BATCH;
        let last = (1..=flushed).rev().find(|generation| generation % turns == turn).unwrap_or(0);
        assert!(found == 0 || found % turns == turn, "block {block} has generation {found}");
        assert!(found >= last, "block {block} has generation {found}, {last} was flushed");
    }
}
