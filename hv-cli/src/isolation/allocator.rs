//! The C library's allocator: it must not open files.
//!
//! When many threads allocate, glibc looks in /sys for how many processors there are, to know how many arenas
//! to have. In a thread that opens no files that would be the end; told a number, it does not look.

#![allow(unsafe_code, reason = "mallopt(3) has no safe wrapper")]

/// Arenas: as many as glibc has for one processor. Threads of a machine allocate little while it runs.
#[cfg(target_env = "gnu")]
const ARENAS: libc::c_int = 8;

/// Sets the number of arenas.
pub(super) fn keep_from_files() {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt takes two integers and no pointer, and locks the allocator against other threads. If it
    // refuses, nothing has changed.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, ARENAS);
    }
}
