//! Pages that are given back.

use super::*;
use crate::{GuestRam, RamLayout};
use vm_memory::GuestAddress;

/// A mapping full of ones.
fn ones(backing: &Backing, pages: u64) -> Mapping {
    let mapping = backing.map(pages * page_size()).unwrap();
    let all = vec![1; mapping.bytes().len()];
    mapping.as_volatile_slice().write_slice(&all, 0).unwrap();
    mapping
}

/// What is in the first byte of each page.
fn firsts(mapping: &Mapping) -> Vec<u8> {
    let page = page_size() as usize;
    mapping.bytes().iter().step_by(page).map(|byte| byte.load(Ordering::Relaxed)).collect()
}

fn resident(mapping: &Mapping) -> u64 {
    smaps(mapping, "Rss:").trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

#[test]
fn pages_given_back_are_zeros_and_take_up_no_memory() {
    let page = page_size();
    for backing in [Backing::anonymous(), Backing::memfd()] {
        let backing = backing.huge_pages(HugePages::Never);
        let mapping = ones(&backing, 8);
        assert!(mapping.can_discard());
        assert_eq!(resident(&mapping), 8 * page);
        assert_eq!(mapping.discard(2 * page, 3 * page), Ok(3 * page));
        assert_eq!(resident(&mapping), 5 * page);
        assert_eq!(firsts(&mapping), [1, 1, 0, 0, 0, 1, 1, 1]);
        mapping.as_volatile_slice().write_obj(5u8, 3 * page as usize).unwrap();
        assert_eq!(firsts(&mapping), [1, 1, 0, 5, 0, 1, 1, 1]);
    }
}

#[test]
fn only_whole_pages_inside_are_given_back() {
    let page = page_size();
    let mapping = ones(&Backing::anonymous(), 4);
    for (offset, len) in [
        (0, 0),
        (1, page),
        (1, 2 * page - 2),
        (0, page - 1),
        (4 * page, page),
        (4 * page - 1, u64::MAX),
        (u64::MAX, u64::MAX),
        (u64::MAX - page, 2 * page),
    ] {
        assert_eq!(mapping.discard(offset, len), Ok(0), "{offset:#x}, {len:#x}");
    }
    assert_eq!(firsts(&mapping), [1; 4]);
    assert_eq!(mapping.discard(page - 1, page + 2), Ok(page));
    assert_eq!(firsts(&mapping), [1, 0, 1, 1]);
    assert_eq!(mapping.discard(3 * page, u64::MAX), Ok(page));
    assert_eq!(firsts(&mapping), [1, 0, 1, 0]);
}

#[test]
fn what_would_come_back_or_could_not_be_had_again_is_kept() {
    let page = page_size();
    // On a disk, whose room was made for it.
    let file = tempfile::NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    file.as_file().set_len(2 * page).unwrap();
    for sharing in [Sharing::Shared, Sharing::Private] {
        let backing = BackingFile::open(file.path(), sharing, KeptSize::Promised).unwrap();
        let mapping = ones(&Backing::file(backing), 2);
        assert!(!mapping.can_discard());
        assert_eq!(mapping.discard(0, 2 * page), Ok(0));
        assert_eq!(firsts(&mapping), [1, 1]);
    }
}

#[test]
fn guest_ram_is_given_back_across_its_ranges_and_nothing_else() {
    let page = page_size();
    let hole = crate::GuestRange::new(GuestAddress(2 * page), 2 * page).unwrap();
    let ram = GuestRam::new(&RamLayout::new(4 * page, &[hole], 46).unwrap()).unwrap();
    let places = [0, page, 4 * page, 5 * page].map(GuestAddress);
    for place in places {
        ram.memory().write_obj(1u8, place).unwrap();
    }
    assert_eq!(ram.discard(GuestAddress(2 * page), 2 * page).unwrap(), 0);
    assert_eq!(ram.discard(GuestAddress(u64::MAX - 5), u64::MAX).unwrap(), 0);
    assert_eq!(ram.discard(GuestAddress(page), 4 * page).unwrap(), 2 * page);
    let there = places.map(|place| ram.memory().read_obj::<u8>(place).unwrap());
    assert_eq!(there, [1, 0, 0, 1]);
    assert_eq!(ram.discard(GuestAddress(0), u64::MAX).unwrap(), 4 * page);
}
