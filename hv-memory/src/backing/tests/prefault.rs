//! Populating memory.

use std::ops::ControlFlow;

use super::super::prefault::Means;
use super::*;

const LEN: u64 = 4 << 20;

fn go_on(_: Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// What `/proc/self/smaps` says of `mapping` in kB, in bytes.
fn bytes(mapping: &Mapping, field: &str) -> u64 {
    smaps(mapping, field).strip_suffix(" kB").unwrap().trim().parse::<u64>().unwrap() << 10
}

/// Bytes of `mapping` that have a page.
fn populated(mapping: &Mapping) -> u64 {
    bytes(mapping, "Rss:") + bytes(mapping, "Swap:")
}

#[test]
fn every_page_is_there_and_nothing_in_it_has_changed() {
    for means in [Means::Madvise, Means::Touch] {
        for mapping in [Mapping::anonymous(LEN).unwrap(), Mapping::shared(LEN).unwrap()] {
            let at = LEN as usize / 2;
            mapping.bytes()[at].store(0x5a, Ordering::Relaxed);
            assert!(populated(&mapping) < LEN);
            mapping.prefault_by(means, go_on).unwrap();
            assert_eq!(populated(&mapping), LEN, "{means:?} {mapping:?}");
            let bytes = mapping.bytes().iter().map(|byte| byte.load(Ordering::Relaxed));
            let written: Vec<_> = bytes.enumerate().filter(|(_, byte)| *byte != 0).collect();
            assert_eq!(written, [(at, 0x5a)]);
        }
    }
}

#[test]
fn a_private_file_gets_pages_of_its_own() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(LEN).unwrap();
    for means in [Means::Madvise, Means::Touch] {
        let backing = BackingFile::open(file.path(), Sharing::Private, KeptSize::Promised).unwrap();
        let mapping = Backing::file(backing).map(LEN).unwrap();
        mapping.prefault_by(means, go_on).unwrap();
        assert_eq!(bytes(&mapping, "Anonymous:") + bytes(&mapping, "Swap:"), LEN);
    }
    assert!(fs::read(file.path()).unwrap().iter().all(|byte| *byte == 0));
}

#[test]
fn progress_is_told_and_can_stop_it() {
    let total = (64 << 20) + LEN;
    let mapping = Mapping::anonymous(total).unwrap();
    let mut told = Vec::new();
    let stopped = mapping.prefault(|progress| {
        told.push(progress);
        ControlFlow::Break(())
    });
    let first = Progress { done: 64 << 20, total };
    assert_eq!(told, [first]);
    assert_eq!(stopped, Err(PrefaultError::Stopped(first)));
    let text = stopped.unwrap_err().to_string();
    assert!(text.contains("0x4000000 of 0x4400000 bytes"), "{text}");
    assert!(populated(&mapping) < total, "the rest was left alone");
    mapping.bytes()[0].store(1, Ordering::Relaxed);

    let mut told = Vec::new();
    let all = mapping.prefault(|progress| {
        told.push(progress);
        ControlFlow::Continue(())
    });
    assert_eq!(all, Ok(()));
    assert_eq!(told, [first, Progress { done: total, total }]);
}

#[test]
fn a_page_that_can_not_be_had_is_an_error() {
    let progress = Progress { done: 0x1000, total: 0x3000 };
    let error = PrefaultError::Page { progress, errno: Errno::ENOMEM };
    let text = error.to_string();
    assert!(text.contains("after 0x1000 of 0x3000") && text.contains("cgroup"), "{text}");
}
