//! Files, and what they may do to whoever maps them.

use std::fs::File;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, mkfifoat};
use tempfile::NamedTempFile;

use super::*;

const PROMISED: KeptSize = KeptSize::Promised;

fn file(len: u64) -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(len).unwrap();
    file
}

fn open(path: &Path, sharing: Sharing) -> BackingFile {
    BackingFile::open(path, sharing, PROMISED).unwrap()
}

fn memfd(len: u64, flags: MemfdFlags) -> OwnedFd {
    let memfd = rustix::fs::memfd_create(c"test", flags).unwrap();
    rustix::fs::ftruncate(&memfd, len).unwrap();
    memfd
}

fn from_fd(fd: OwnedFd, sharing: Sharing, kept: KeptSize) -> BackingFile {
    BackingFile::from_fd(fd, "the test's file", sharing, kept).unwrap()
}

fn problem(mapped: Result<Mapping, MapError>) -> FileProblem {
    match mapped {
        Err(MapError::File(error)) => error.problem,
        other => panic!("{other:?}"),
    }
}

#[test]
fn shared_writes_reach_the_file_and_private_ones_do_not() {
    let page = page_size();
    let file = file(3 * page);
    std::os::unix::fs::FileExt::write_at(file.as_file(), b"hv", page).unwrap();
    for (sharing, written) in [(Sharing::Private, b'h'), (Sharing::Shared, b'!')] {
        let mapping = Backing::file(open(file.path(), sharing).at(page)).map(2 * page).unwrap();
        let byte = |at: usize| mapping.bytes()[at].load(Ordering::Relaxed);
        assert_eq!([byte(0), byte(1), byte(2)], [b'h', b'v', 0]);
        mapping.bytes()[0].store(b'!', Ordering::Relaxed);
        assert_eq!(fs::read(file.path()).unwrap()[page as usize], written);
        assert_eq!(mapping.remap(0), Ok(sharing == Sharing::Shared));
        assert_eq!(mapping.bytes()[0].load(Ordering::Relaxed), b'!', "kept in either case");
    }
}

#[test]
fn a_private_file_may_be_read_only() {
    let page = page_size();
    let file = file(page);
    let read_only = || OwnedFd::from(File::open(file.path()).unwrap());
    let private = from_fd(read_only(), Sharing::Private, PROMISED);
    Backing::file(private).map(page).unwrap().bytes()[0].store(1, Ordering::Relaxed);
    let shared = from_fd(read_only(), Sharing::Shared, PROMISED);
    let error = Backing::file(shared).map(page).unwrap_err();
    assert!(error.to_string().contains("the test's file: it can't be mapped: EACCES"), "{error}");
    assert_eq!(problem(Err(error)), FileProblem::Map { errno: Errno::EACCES });
}

#[test]
fn a_file_that_is_too_short_is_refused_with_both_sizes_and_left_alone() {
    let page = page_size();
    let file = file(2 * page - 1);
    let blocks = |file: &NamedTempFile| {
        let metadata = file.as_file().metadata().unwrap();
        (metadata.len(), std::os::unix::fs::MetadataExt::blocks(&metadata))
    };
    let before = blocks(&file);
    for (offset, len) in [(0, 2 * page), (page, page), (4 * page, page)] {
        let error =
            Backing::file(open(file.path(), Sharing::Shared).at(offset)).map(len).unwrap_err();
        let text = error.to_string();
        let sizes = [format!("{:#x} bytes", 2 * page - 1), format!("needs {:#x}", offset + len)];
        let name = file.path().to_str().unwrap();
        assert!(sizes.iter().all(|size| text.contains(size)) && text.contains(name), "{text}");
        assert!(text.contains(&format!("truncate -s {}", offset + len)), "{text}");
        assert_eq!(problem(Err(error)), FileProblem::TooShort { size: 2 * page - 1, offset, len });
    }
    assert_eq!(blocks(&file), before);
    assert!(!is_mapped(file.path().to_str().unwrap()));
}

#[test]
fn offsets_that_can_not_be() {
    let page = page_size();
    let file = file(page);
    let at = |offset, len| {
        Backing::file(open(file.path(), Sharing::Shared).at(offset)).map(len).unwrap_err()
    };
    assert_eq!(at(1, page), MapError::Unaligned { what: "offset", value: 1, page });
    for (offset, len) in [(u64::MAX - page + 1, page), (i64::MAX as u64 - page + 1, 2 * page)] {
        assert_eq!(problem(Err(at(offset, len))), FileProblem::Beyond { offset, len });
    }
    let backing = Backing::file(open(file.path(), Sharing::Shared).at(page));
    let error = backing.after(u64::MAX).unwrap_err();
    assert!(error.to_string().contains("beyond the end of any file"), "{error}");
}

#[test]
fn only_regular_files() {
    let dir = tempfile::tempdir().unwrap();
    let fifo = dir.path().join("fifo");
    mkfifoat(CWD, &fifo, Mode::RUSR | Mode::WUSR).unwrap();
    let socket = dir.path().join("socket");
    let _listener = UnixListener::bind(&socket).unwrap();
    for (path, kind) in [
        (dir.path().to_owned(), "a directory"),
        (PathBuf::from("/dev/zero"), "a character device"),
        (fifo, "a pipe"),
        (socket, "a socket"),
    ] {
        for sharing in [Sharing::Shared, Sharing::Private] {
            let error = BackingFile::open(&path, sharing, PROMISED).unwrap_err();
            assert_eq!(error.problem, FileProblem::NotRegular(kind));
            assert_eq!(error.to_string(), format!("{path:?}: it is {kind}, not a regular file"));
        }
    }
    let fd = OwnedFd::from(File::open("/dev/zero").unwrap());
    let error = BackingFile::from_fd(fd, "fd 7", Sharing::Private, PROMISED).unwrap_err();
    assert_eq!(error.to_string(), "fd 7: it is a character device, not a regular file");
}

#[test]
fn a_file_that_is_not_there() {
    let path = Path::new("/no/such/\nfile");
    let error = BackingFile::open(path, Sharing::Shared, PROMISED).unwrap_err();
    assert_eq!(error.problem, FileProblem::Open { errno: Errno::ENOENT });
    assert!(
        error.to_string().starts_with(r#""/no/such/\nfile": it can't be opened: ENOENT"#),
        "{error}"
    );
}

#[test]
fn one_at_a_time_writes_to_a_file() {
    let page = page_size();
    let file = file(page);
    let mapping = Backing::file(open(file.path(), Sharing::Shared)).map(page).unwrap();
    for sharing in [Sharing::Shared, Sharing::Private] {
        let error = BackingFile::open(file.path(), sharing, PROMISED).unwrap_err();
        assert_eq!(error.problem, FileProblem::InUse);
        assert!(error.to_string().contains(file.path().to_str().unwrap()), "{error}");
    }
    // The lock goes with what was mapped, not before.
    let region = mapping.region();
    drop(mapping);
    assert!(BackingFile::open(file.path(), Sharing::Shared, PROMISED).is_err());
    drop(region);
    let _reader = open(file.path(), Sharing::Private);
    let _reader = open(file.path(), Sharing::Private);
    assert!(BackingFile::open(file.path(), Sharing::Shared, PROMISED).is_err());
}

#[test]
fn what_is_sealed_can_not_become_shorter() {
    let page = page_size();
    let memfd = memfd(2 * page, MemfdFlags::ALLOW_SEALING);
    let file = File::from(memfd.try_clone().unwrap());
    let backing = Backing::file(from_fd(memfd, Sharing::Shared, KeptSize::Sealed));
    let mapping = backing.map(2 * page).unwrap();
    assert_eq!(Errno::from(&file.set_len(page).unwrap_err()), Errno::EPERM);
    file.set_len(4 * page).unwrap();
    assert_eq!(mapping.check(), Ok(()));
    // It is sealed already, and for good.
    drop(mapping);
    backing.map(4 * page).unwrap();
}

#[test]
fn what_can_not_be_sealed_is_refused_unless_it_is_promised() {
    let page = page_size();
    let regular = file(page);
    let sealed_off = || memfd(page, MemfdFlags::empty());
    let unsealed = [OwnedFd::from(regular.reopen().unwrap()), sealed_off()];
    for fd in unsealed {
        let error = Backing::file(from_fd(fd, Sharing::Shared, KeptSize::Sealed)).map(page);
        assert_eq!(problem(error), FileProblem::NotSealable);
    }
    let path = BackingFile::open(regular.path(), Sharing::Private, KeptSize::Sealed).unwrap();
    assert_eq!(problem(Backing::file(path).map(page)), FileProblem::NotSealable);
    assert!(!is_mapped(regular.path().to_str().unwrap()), "nothing is left mapped");
    Backing::file(from_fd(sealed_off(), Sharing::Shared, PROMISED)).map(page).unwrap();
}

#[test]
fn what_fails_for_another_reason_is_not_sealed() {
    let page = page_size();
    let memfd = memfd(2 * page, MemfdFlags::ALLOW_SEALING);
    let file = File::from(memfd.try_clone().unwrap());
    let backing = Backing::file(from_fd(memfd, Sharing::Shared, KeptSize::Sealed));
    assert!(backing.map(3 * page).is_err());
    assert!(backing.clone().numa_node(5000).map(2 * page).is_err());
    file.set_len(page).unwrap();
}

#[test]
fn a_file_sealed_against_writing_is_not_mapped_writable() {
    let page = page_size();
    let memfd = memfd(page, MemfdFlags::ALLOW_SEALING);
    rustix::fs::fcntl_add_seals(&memfd, SealFlags::WRITE).unwrap();
    let mapped = Backing::file(from_fd(memfd, Sharing::Shared, KeptSize::Sealed)).map(page);
    assert_eq!(problem(mapped), FileProblem::Map { errno: Errno::EPERM });
}

/// The file is found out by asking, and the kernel's own access fails with an errno. What an access
/// by the process does is in `tests/shortened_file.rs`.
#[test]
fn what_a_file_that_becomes_shorter_does() {
    let page = page_size();
    let file = file(2 * page);
    let mapping = Backing::file(open(file.path(), Sharing::Shared)).map(2 * page).unwrap();
    let all = 2 * page as usize;
    assert_eq!(mapping.pages.advise(0, all, Advice::LinuxPopulateWrite), Ok(()));
    file.as_file().set_len(page).unwrap();
    let shrunk = FileProblem::Shrunk { size: page, needed: 2 * page };
    let error = mapping.check().unwrap_err();
    assert!(error.to_string().contains("shortened to 0x1000 bytes while 0x2000"), "{error}");
    assert_eq!(error.problem, shrunk);
    let populated = mapping.pages.advise(0, all, Advice::LinuxPopulateWrite);
    assert_eq!(populated, Err(rustix::io::Errno::FAULT));
    mapping.bytes()[0].store(1, Ordering::Relaxed);
    file.as_file().set_len(2 * page).unwrap();
    assert_eq!(mapping.check(), Ok(()));
    mapping.bytes()[page as usize].store(1, Ordering::Relaxed);
}

#[test]
fn holes_are_filled_so_that_there_is_room_later() {
    let file = file(1 << 20);
    let blocks = || std::os::unix::fs::MetadataExt::blocks(&file.as_file().metadata().unwrap());
    if blocks() != 0 {
        return say("the file system of temporary files has no holes: nothing to fill");
    }
    let offset = page_size();
    let shared = open(file.path(), Sharing::Shared).at(offset);
    drop(Backing::file(shared).map((1 << 20) - offset).unwrap());
    if blocks() == 0 {
        return say("the file system of temporary files has no fallocate: holes stay holes");
    }
    assert!(blocks() * 512 >= (1 << 20) - offset, "{} blocks", blocks());
    assert_eq!(file.as_file().metadata().unwrap().len(), 1 << 20);
}

#[test]
fn a_file_system_without_room_is_an_error_now() {
    let shm = Path::new("/dev/shm");
    let limited = rustix::fs::statfs(shm)
        .is_ok_and(|stat| stat.f_type == 0x0102_1994 && (1..1 << 28).contains(&stat.f_blocks));
    if !limited {
        return say("/dev/shm is no tmpfs of limited size: running out of room is NOT TESTED");
    }
    // More than any tmpfs of a limited size has, so that it is refused before anything is filled.
    let len = 1 << 42;
    let file = NamedTempFile::new_in(shm).unwrap();
    file.as_file().set_len(len).unwrap();
    let backing = Backing::file(open(file.path(), Sharing::Shared));
    let problem = problem(backing.map(len));
    assert_eq!(problem, FileProblem::NoRoom { len, errno: Errno::ENOSPC });
    assert!(!is_mapped(file.path().to_str().unwrap()));
    assert_eq!(std::os::unix::fs::MetadataExt::blocks(&file.as_file().metadata().unwrap()), 0);
}
