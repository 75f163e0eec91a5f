//! Kinds of memory, its guards and how long it lives. Files, what depends on the host, and populating
//! are beside this.

mod discard;
mod files;
mod host;
mod prefault;

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;

use hv_core::{HostMemory, HostRange};
use vm_memory::{Bytes, VolatileMemory};

use super::pages::GUARD;
use super::*;

/// A line of `/proc/self/maps` or the head of an entry of `smaps`: addresses and permissions.
fn area(line: &str) -> Option<(std::ops::Range<u64>, &str)> {
    let mut words = line.split(' ');
    let (start, end) = words.next()?.split_once('-')?;
    let hex = |text| u64::from_str_radix(text, 16).ok();
    Some((hex(start)?..hex(end)?, words.next()?))
}

/// The line of `/proc/self/smaps` about `mapping` that begins with `field`, without that.
fn smaps(mapping: &Mapping, field: &str) -> String {
    let address = mapping.bytes().as_ptr().addr() as u64;
    let text = fs::read_to_string("/proc/self/smaps").unwrap();
    let mut lines = text.lines();
    lines.find(|line| area(line).is_some_and(|(range, _)| range.contains(&address))).unwrap();
    let line = lines.find(|line| line.starts_with(field)).unwrap();
    line[field.len()..].trim().to_owned()
}

fn flags(mapping: &Mapping) -> Vec<String> {
    smaps(mapping, "VmFlags:").split(' ').map(str::to_owned).collect()
}

/// Not captured by the test harness: what depends on the host must be seen to.
fn say(text: &str) {
    use std::io::Write;
    let _ = writeln!(std::io::stderr(), "hv-memory: {text}");
}

#[test]
fn slice_and_volatile_access_see_the_same_bytes() {
    let mapping = Mapping::anonymous(0x2000).unwrap();
    assert_eq!(mapping.bytes().len(), 0x2000);
    assert!(mapping.bytes().iter().all(|b| b.load(Ordering::Relaxed) == 0));
    mapping.as_volatile_slice().write_slice(b"hv", 0x1fff - 1).unwrap();
    let last: Vec<u8> =
        mapping.bytes()[0x1ffe..].iter().map(|b| b.load(Ordering::Relaxed)).collect();
    assert_eq!(last, b"hv");
    mapping.bytes()[0].store(7, Ordering::Relaxed);
    assert_eq!(mapping.as_volatile_slice().read_obj::<u8>(0).unwrap(), 7);
}

#[test]
fn a_shared_page_is_remapped_with_its_bytes() {
    let page = crate::page_size();
    let mapping = Mapping::shared(3 * page).unwrap();
    let address = mapping.bytes().as_ptr();
    for (n, at) in [(1u8, 0), (2, page), (3, 2 * page)] {
        mapping.bytes()[at as usize].store(n, Ordering::Relaxed);
    }
    assert_eq!(mapping.remap(page), Ok(true));
    assert_eq!(mapping.remap(page), Ok(true));
    assert_eq!(mapping.bytes().as_ptr(), address);
    let first = |at: u64| mapping.bytes()[at as usize].load(Ordering::Relaxed);
    assert_eq!([first(0), first(page), first(2 * page)], [1, 2, 3]);
    mapping.bytes()[page as usize + 1].store(9, Ordering::Relaxed);
    assert_eq!(mapping.as_volatile_slice().read_obj::<u8>(page as usize + 1).unwrap(), 9);
}

#[test]
fn a_remapped_page_is_really_mapped_anew() {
    let page = crate::page_size() as usize;
    let mapping = Mapping::shared(16 * page as u64).unwrap();
    for at in (0..16).map(|n| n * page) {
        mapping.bytes()[at].store(1, Ordering::Relaxed);
    }
    let faults = || {
        let stat = std::fs::read_to_string("/proc/thread-self/stat").unwrap();
        let fields = stat.rsplit(") ").next().unwrap();
        fields.split(' ').nth(7).unwrap().parse::<u64>().unwrap() // minflt
    };
    let before = faults();
    for _ in 0..1000 {
        mapping.remap(page as u64).unwrap();
        mapping.bytes()[page].store(2, Ordering::Relaxed);
    }
    assert!(faults() - before >= 1000, "each access after a remap faults once");
}

#[test]
fn shared_memory_keeps_its_size() {
    let mapping = Mapping::shared(crate::page_size()).unwrap();
    let region = mapping.region();
    let file = region.file_offset().unwrap().file();
    let error = file.set_len(0).unwrap_err();
    assert_eq!(Errno::from(&error), Errno::EPERM);
}

#[test]
fn what_is_no_page_of_shared_memory_is_not_remapped() {
    let page = crate::page_size();
    let shared = Mapping::shared(page).unwrap();
    assert_eq!(shared.remap(1), Ok(false));
    assert_eq!(shared.remap(page), Ok(false));
    assert_eq!(shared.remap(u64::MAX - page + 1), Ok(false));
    assert_eq!(Mapping::anonymous(page).unwrap().remap(0), Ok(false));
}

#[test]
fn what_can_not_be_mapped_says_so() {
    assert_eq!(Mapping::anonymous(0).unwrap_err(), MapError::Zero);
    assert_eq!(Mapping::shared(0).unwrap_err(), MapError::Zero);
    let page = page_size();
    let error = Mapping::anonymous(page + 1).unwrap_err();
    assert_eq!(error, MapError::Unaligned { what: "length", value: page + 1, page });
    assert!(error.to_string().contains("0x1001 is not a multiple of 0x1000"), "{error}");
    for len in [1 << 60, u64::MAX - (page - 1)] {
        let error = Mapping::anonymous(len).unwrap_err();
        assert_eq!(error, MapError::System { len, call: "mmap", errno: Errno::ENOMEM });
        assert!(error.to_string().contains("ulimit -v"), "{error}");
        assert!(error.to_string().contains(&format!("{len:#x} bytes")), "{error}");
    }
    assert!(Mapping::shared(1 << 63).is_err(), "no file is so long");
}

#[test]
fn left_out_of_core_dumps() {
    for mapping in [Mapping::anonymous(0x10_0000), Mapping::shared(0x10_0000)] {
        let flags = flags(&mapping.unwrap());
        assert!(flags.iter().any(|flag| flag == "dd"), "{flags:?}");
    }
}

#[test]
fn between_guards_and_aligned_for_huge_pages() {
    let page = page_size();
    for len in [page, 2 << 20, (2 << 20) + page, 64 << 20] {
        for mapping in [Mapping::anonymous(len).unwrap(), Mapping::shared(len).unwrap()] {
            let start = mapping.bytes().as_ptr().addr() as u64;
            let align = if len < 2 << 20 { page } else { 2 << 20 };
            assert!(start.is_multiple_of(align), "{start:#x}");
            let maps = fs::read_to_string("/proc/self/maps").unwrap();
            let areas: Vec<_> = maps.lines().filter_map(area).collect();
            let at = areas.iter().position(|(area, _)| area.start == start).unwrap();
            assert_eq!(areas[at].0, start..start + len);
            assert!(areas[at].1.starts_with("rw-"));
            for (guard, edge) in
                [(&areas[at - 1], areas[at - 1].0.end), (&areas[at + 1], areas[at + 1].0.start)]
            {
                assert!(guard.1.starts_with("---"), "{maps}");
                assert!(guard.0.end - guard.0.start >= GUARD as u64, "{maps}");
                assert!(edge == start || edge == start + len, "{maps}");
            }
        }
    }
}

/// Whether a file called `name` is mapped.
fn is_mapped(name: &str) -> bool {
    fs::read_to_string("/proc/self/maps").unwrap().lines().any(|line| line.contains(name))
}

#[test]
fn mapped_until_the_last_owner_goes() {
    let page = page_size();
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(page).unwrap();
    let name = file.path().to_str().unwrap();
    let map = || {
        let file = BackingFile::open(file.path(), Sharing::Shared, KeptSize::Promised).unwrap();
        Arc::new(Backing::file(file).map(page).unwrap())
    };

    let mapping = map();
    assert!(is_mapped(name));
    let slot = HostRange::new(mapping.clone(), 0, page as usize).unwrap();
    drop(mapping);
    slot.bytes()[1].store(7, Ordering::Relaxed);
    drop(slot);
    assert!(!is_mapped(name));

    let mapping = map();
    let region = mapping.region();
    drop(mapping);
    assert_eq!(region.as_volatile_slice().read_obj::<u8>(1).unwrap(), 7);
    drop(region);
    assert!(!is_mapped(name));
}

#[test]
fn vm_memory_owns_what_it_maps_itself() {
    let memory: crate::RamMemory =
        vm_memory::GuestMemoryMmap::from_ranges(&[(vm_memory::GuestAddress(0), 0x1000)]).unwrap();
    memory.write_obj(5u8, vm_memory::GuestAddress(0xfff)).unwrap();
    assert_eq!(memory.read_obj::<u8>(vm_memory::GuestAddress(0xfff)).unwrap(), 5);
}

#[test]
fn a_memfd_can_be_given_away() {
    let mapping = Mapping::shared(page_size()).unwrap();
    let region = mapping.region();
    let other: OwnedFd = region.file_offset().unwrap().file().as_fd().try_clone_to_owned().unwrap();
    let other = BackingFile::from_fd(other, "RAM", Sharing::Shared, KeptSize::Sealed).unwrap();
    let other = Backing::file(other).map(page_size()).unwrap();
    other.bytes()[3].store(9, Ordering::Relaxed);
    assert_eq!(mapping.bytes()[3].load(Ordering::Relaxed), 9);
}
