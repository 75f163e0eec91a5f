//! What the documentation says of a broken promise: an access to memory that its file no longer has is
//! the end of the process. In a process of its own, and in a test program of its own: a process that
//! is being started holds every file for a moment, and with it the locks other tests look at.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests fail by panicking")]

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering;

use hv_core::HostMemory;
use hv_memory::{Backing, BackingFile, KeptSize, Sharing, page_size};

/// Tells the child process that it is the one.
const CHILD: &str = "HV_MEMORY_TEST_ACCESS_BEYOND_THE_FILE";

#[test]
fn an_access_beyond_the_file_is_the_end_of_the_process() {
    let page = page_size();
    if std::env::var_os(CHILD).is_some() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(2 * page).unwrap();
        let backing = BackingFile::open(file.path(), Sharing::Shared, KeptSize::Promised).unwrap();
        let mapping = Backing::file(backing).map(2 * page).unwrap();
        mapping.bytes()[page as usize].store(1, Ordering::Relaxed);
        // Not left behind by a process that does not get to its destructors.
        fs::remove_file(file.path()).unwrap();
        file.as_file().set_len(page).unwrap();
        assert!(mapping.check().is_err());
        mapping.bytes()[page as usize].store(1, Ordering::Relaxed);
        return;
    }
    let child = Command::new(std::env::current_exe().unwrap())
        .env(CHILD, "1")
        .stdout(Stdio::null())
        .status()
        .unwrap();
    assert_eq!(child.signal(), Some(7), "not SIGBUS: {child}");
}
