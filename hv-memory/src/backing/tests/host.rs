//! What depends on the host: huge pages and NUMA nodes. Each test asserts what must be in either
//! case, and says which it was.

use super::*;

const SIZES: [HugePageSize; 2] = [HugePageSize::Mib2, HugePageSize::Gib1];

#[test]
fn huge_pages_of_the_pool_are_mapped_or_the_error_says_what_to_do() {
    for (kind, backing) in [("anonymous", Backing::anonymous()), ("memfd", Backing::memfd())] {
        for size in SIZES {
            let page = size.bytes();
            match backing.clone().huge_pages(HugePages::Pool(size)).map(page) {
                Ok(mapping) => {
                    say(&format!("{kind}, {} MiB: MAPPED", page >> 20));
                    let start = mapping.bytes().as_ptr().addr() as u64;
                    assert!(start.is_multiple_of(page), "{start:#x}");
                    assert_eq!(mapping.page_size(), page);
                    assert_eq!(mapping.region().is_hugetlbfs(), Some(true));
                    assert_eq!(smaps(&mapping, "KernelPageSize:"), format!("{} kB", page >> 10));
                    // Set aside when it was mapped.
                    mapping.bytes()[page as usize - 1].store(3, Ordering::Relaxed);
                    assert_eq!(mapping.remap(page_size()), Ok(false), "inside a page");
                    if kind == "memfd" {
                        assert_eq!(mapping.remap(0), Ok(true));
                    }
                    assert_eq!(mapping.bytes()[page as usize - 1].load(Ordering::Relaxed), 3);
                }
                Err(error @ MapError::NoHugePages { .. }) => {
                    say(&format!("{kind}, {} MiB: REFUSED: {error}", page >> 20));
                    assert!(
                        matches!(error, MapError::NoHugePages { page: of, needed: 1, .. } if of == page)
                    );
                    let text = error.to_string();
                    let pool = format!("hugepages-{}kB/nr_hugepages", page >> 10);
                    assert!(text.contains("/proc/sys/vm/nr_hugepages"), "{text}");
                    assert!(text.contains(&pool), "{text}");
                }
                Err(error) => {
                    say(&format!("{kind}, {} MiB: NO SUCH SIZE: {error}", page >> 20));
                    assert!(matches!(error, MapError::HugePageSize { page: of, .. } if of == page));
                    let directory = format!("/sys/kernel/mm/hugepages/hugepages-{}kB", page >> 10);
                    assert!(!Path::new(&directory).exists(), "{error}");
                }
            }
        }
    }
}

#[test]
fn more_huge_pages_than_any_host_has() {
    let backing = Backing::memfd().huge_pages(HugePages::Pool(HugePageSize::Mib2));
    let error = backing.map(1 << 45).unwrap_err();
    if let MapError::HugePageSize { .. } = error {
        return say("this host has no huge pages of 2 MiB");
    }
    let MapError::NoHugePages { needed, .. } = error else { panic!("{error}") };
    assert_eq!(needed, 1 << 24);
}

#[test]
fn lengths_are_multiples_of_the_huge_page() {
    for size in SIZES {
        let page = size.bytes();
        for len in [page_size(), page - page_size(), page + page_size()] {
            for backing in [Backing::anonymous(), Backing::memfd()] {
                let error = backing.huge_pages(HugePages::Pool(size)).map(len).unwrap_err();
                assert_eq!(error, MapError::Unaligned { what: "length", value: len, page });
            }
        }
    }
}

#[test]
fn a_file_has_the_pages_of_its_file_system() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(2 << 20).unwrap();
    let file = BackingFile::from_fd(file.into(), "f", Sharing::Shared, KeptSize::Promised).unwrap();
    let backing = Backing::file(file).huge_pages(HugePages::Pool(HugePageSize::Mib2));
    let error = backing.map(2 << 20).unwrap_err();
    assert_eq!(error, MapError::HugePagesOfFile { page: 2 << 20 });
    assert!(error.to_string().contains("hugetlbfs"), "{error}");
}

#[test]
fn a_file_of_huge_pages_is_known_as_one() {
    let flags = MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB | MemfdFlags::ALLOW_SEALING;
    let Ok(memfd) = rustix::fs::memfd_create(c"huge", flags) else {
        return say("this host has no huge pages of 2 MiB");
    };
    let page = HugePageSize::Mib2.bytes();
    rustix::fs::ftruncate(&memfd, 2 * page).unwrap();
    let file = BackingFile::from_fd(memfd, "huge", Sharing::Shared, KeptSize::Sealed).unwrap();
    let backing = Backing::file(file.clone());
    let unaligned = MapError::Unaligned { what: "length", value: 4096, page };
    assert_eq!(backing.map(4096).unwrap_err(), unaligned);
    let unaligned = MapError::Unaligned { what: "offset", value: 4096, page };
    assert_eq!(Backing::file(file.at(4096)).map(page).unwrap_err(), unaligned);
    match backing.map(2 * page) {
        Ok(mapping) => {
            say("a file of huge pages: MAPPED");
            assert_eq!(mapping.page_size(), page);
            mapping.bytes()[2 * page as usize - 1].store(1, Ordering::Relaxed);
        }
        Err(error) => {
            say(&format!("a file of huge pages: REFUSED: {error}"));
            assert!(matches!(error, MapError::NoHugePages { needed: 2, .. }), "{error}");
        }
    }
}

#[test]
fn transparent_huge_pages_are_asked_for_or_the_error_says_what_is_off() {
    for (kind, backing) in [("anonymous", Backing::anonymous()), ("memfd", Backing::memfd())] {
        let can = huge::transparent(Path::new(huge::TRANSPARENT), kind == "memfd");
        match backing.huge_pages(HugePages::Transparent).map(4 << 20) {
            Ok(mapping) => {
                say(&format!("{kind}: transparent huge pages ASKED FOR"));
                assert_eq!(can, Ok(()));
                let flags = flags(&mapping);
                assert!(flags.iter().any(|flag| flag == "hg"), "{flags:?}");
            }
            Err(error) => {
                say(&format!("{kind}: transparent huge pages REFUSED: {error}"));
                assert!(error.to_string().contains(huge::TRANSPARENT), "{error}");
                assert_eq!(can, Err(error));
            }
        }
    }
}

#[test]
fn no_huge_pages_is_always_possible() {
    for backing in [Backing::anonymous(), Backing::memfd()] {
        let mapping = backing.huge_pages(HugePages::Never).map(4 << 20).unwrap();
        if Path::new(huge::TRANSPARENT).exists() {
            let flags = flags(&mapping);
            assert!(flags.iter().any(|flag| flag == "nh"), "{flags:?}");
        }
    }
}

#[test]
fn memory_of_a_node_or_an_error_that_names_it() {
    let page = page_size();
    for backing in [Backing::anonymous(), Backing::memfd()] {
        match backing.numa_node(0).map(page) {
            Ok(mapping) => {
                say("memory of NUMA node 0: MAPPED");
                let start = format!("{:x} ", mapping.bytes().as_ptr().addr());
                let policies = fs::read_to_string("/proc/self/numa_maps").unwrap();
                let policy = policies.lines().find(|line| line.starts_with(&start)).unwrap();
                assert!(policy.contains("prefer") && policy.contains(":0"), "{policy}");
            }
            Err(error) => {
                say(&format!("memory of NUMA node 0: REFUSED: {error}"));
                let MapError::Numa { node: 0, errno, .. } = error else { panic!("{error}") };
                assert!([Errno::ENOSYS, Errno::EPERM, Errno::EINVAL].contains(&errno), "{errno}");
            }
        }
    }
    for node in [1023, 1024, u32::MAX] {
        let error = Backing::anonymous().numa_node(node).map(page).unwrap_err();
        let MapError::Numa { node: named, errno, .. } = error else { panic!("{error}") };
        assert_eq!(named, node);
        assert!([Errno::ENOSYS, Errno::EPERM, Errno::EINVAL].contains(&errno), "{errno}");
        assert!(error.to_string().contains(&format!("NUMA node {node}")), "{error}");
    }
}
