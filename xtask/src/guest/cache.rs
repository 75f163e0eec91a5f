//! Where built artefacts live, outside `target/` so that `cargo clean` spares them: a directory for
//! each hash of what they are made of, complete or absent.

use std::env;
use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use thiserror::Error;

/// Overrides the directory of the cache.
const DIRECTORY: &str = "HV_GUEST_DIR";

/// Why the cache is of no use.
#[derive(Debug, Error)]
pub(crate) enum Error {
    #[error("no directory for the guest: set {DIRECTORY} to an absolute path")]
    NoDirectory,
    #[error("{action} {} failed: {source}", path.display())]
    Io { action: &'static str, path: PathBuf, source: io::Error },
}

/// The cache of this user.
#[derive(Debug)]
pub(crate) struct Cache {
    root: PathBuf,
}

impl Cache {
    /// `$HV_GUEST_DIR`, `$XDG_CACHE_HOME/hv/guest` or `~/.cache/hv/guest`.
    pub(crate) fn from_environment() -> Result<Self, Error> {
        let variable = |name| env::var_os(name).map(PathBuf::from);
        let chosen = variable(DIRECTORY)
            .or_else(|| variable("XDG_CACHE_HOME").map(|cache| cache.join("hv/guest")))
            .or_else(|| variable("HOME").map(|home| home.join(".cache/hv/guest")));
        match chosen {
            Some(root) if root.is_absolute() => Ok(Self { root }),
            _ => Err(Error::NoDirectory),
        }
    }

    /// The directory `name`, if it holds all of `files`.
    pub(crate) fn get(&self, name: &str, files: &[&str]) -> Option<PathBuf> {
        let entry = self.root.join(name);
        files.iter().all(|file| entry.join(file).is_file()).then_some(entry)
    }

    /// The directory `name` with all of `files`, made by `make` if it is not there.
    ///
    /// `make` gets a scratch directory and, inside it, the one to fill. It runs alone even if
    /// several processes want the same; after a failure the scratch directory stays until the next
    /// build, for its logs.
    pub(crate) fn get_or_make<E: From<Error>>(
        &self,
        name: &str,
        files: &[&str],
        make: impl FnOnce(&Path, &Path) -> Result<(), E>,
    ) -> Result<PathBuf, E> {
        if let Some(entry) = self.get(name, files) {
            return Ok(entry);
        }
        let _lock = self.lock()?;
        // Another process may have made it while this one waited.
        if let Some(entry) = self.get(name, files) {
            return Ok(entry);
        }
        let scratch = self.root.join(format!("{name}.building"));
        let filled = scratch.join("out");
        remove(&scratch)?;
        create(&filled)?;
        make(&scratch, &filled)?;
        let entry = self.root.join(name);
        remove(&entry)?;
        io("renaming", &filled, fs::rename(&filled, &entry))?;
        anstream::eprintln!("guest: {} is ready; clearing up", entry.display());
        remove(&scratch)?;
        Ok(entry)
    }

    /// Keeps other builds out until it is dropped.
    fn lock(&self) -> Result<File, Error> {
        create(&self.root)?;
        let path = self.root.join("lock");
        let file = io("creating", &path, File::create(&path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                anstream::eprintln!("guest: waiting for another build ({})", path.display());
                io("locking", &path, file.lock())?;
            }
            Err(TryLockError::Error(source)) => io("locking", &path, Err(source))?,
        }
        Ok(file)
    }
}

/// The name for what is made of `parts`: `<kind>-<hash>`.
pub(crate) fn name(kind: &str, parts: &[&str]) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        // With their lengths, so that no two lists of parts look the same.
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    let hex: String = hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    format!("{kind}-{hex}")
}

pub(crate) fn io<T>(action: &'static str, path: &Path, result: io::Result<T>) -> Result<T, Error> {
    result.map_err(|source| Error::Io { action, path: path.to_owned(), source })
}

fn create(path: &Path) -> Result<(), Error> {
    io("creating", path, fs::create_dir_all(path))
}

fn remove(path: &Path) -> Result<(), Error> {
    match fs::remove_dir_all(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            io("removing", path, Err(source))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    fn fill(_: &Path, out: &Path) -> Result<(), Error> {
        let file = out.join("file");
        io("writing", &file, fs::write(&file, "made"))
    }

    #[test]
    fn makes_once() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache { root: dir.path().join("deep/cache") };
        assert_eq!(cache.get("x-1", &["file"]), None);
        let entry = cache.get_or_make("x-1", &["file"], fill).unwrap();
        assert_eq!(fs::read_to_string(entry.join("file")).unwrap(), "made");
        let again: Result<_, Error> =
            cache.get_or_make("x-1", &["file"], |_, _| panic!("it is there"));
        assert_eq!(again.unwrap(), entry);
    }

    #[test]
    fn a_failure_publishes_nothing_and_leaves_the_scratch_until_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache { root: dir.path().to_owned() };
        let failed = cache.get_or_make("x-1", &["file"], |scratch, out| {
            fs::write(scratch.join("log"), "why").unwrap();
            fill(scratch, out)?;
            Err(Error::NoDirectory)
        });
        assert!(matches!(failed, Err(Error::NoDirectory)));
        assert_eq!(cache.get("x-1", &["file"]), None);
        assert!(dir.path().join("x-1.building/log").exists());

        cache.get_or_make("x-1", &["file"], fill).unwrap();
        assert!(!dir.path().join("x-1.building").exists());
    }

    #[test]
    fn an_entry_that_lost_a_file_is_made_anew() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache { root: dir.path().to_owned() };
        let entry = cache.get_or_make("x-1", &["file"], fill).unwrap();
        fs::remove_file(entry.join("file")).unwrap();
        assert_eq!(cache.get("x-1", &["file"]), None);
        assert_eq!(cache.get_or_make("x-1", &["file"], fill).unwrap(), entry);
        assert!(entry.join("file").exists());
    }

    #[test]
    fn builds_at_the_same_time_make_it_once() {
        let dir = tempfile::tempdir().unwrap();
        let made = dir.path().join("times");
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let cache = Cache { root: dir.path().to_owned() };
                    cache
                        .get_or_make("x-1", &["file"], |scratch, out| {
                            // Fails if another build was here.
                            File::create_new(&made).map(drop).unwrap();
                            fill(scratch, out)
                        })
                        .unwrap();
                });
            }
        });
        assert!(made.exists());
    }

    #[test]
    fn names_differ_with_every_part_and_their_borders() {
        let name = |parts: &[&str]| super::name("kernel", parts);
        assert_eq!(name(&["a", "b"]), name(&["a", "b"]));
        assert_ne!(name(&["a", "b"]), name(&["ab", ""]));
        assert_ne!(name(&["a", "b"]), name(&["a", "c"]));
        assert!(name(&[]).starts_with("kernel-"));
        assert_eq!(name(&[]).len(), "kernel-".len() + 16);
    }
}
