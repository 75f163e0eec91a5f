//! What the host says about huge pages, for checks and messages. It must not map anything.

use std::fs;
use std::path::Path;

use super::error::{MapError, pool_directory};

/// How much memory one page maps. Larger pages cost the processor fewer table walks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum HugePages {
    /// Whatever the host is set to.
    #[default]
    HostDefault,
    /// Transparent huge pages (`MADV_HUGEPAGE`), when the kernel has them: it uses small ones
    /// otherwise, and splits them as it likes.
    Transparent,
    /// None (`MADV_NOHUGEPAGE`).
    Never,
    /// Pages of the kernel's pool (`MAP_HUGETLB`), which are set aside for this memory when it is mapped.
    Pool(HugePageSize),
}

/// Sizes of huge pages on x86-64.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum HugePageSize {
    /// 2 MiB.
    Mib2,
    /// 1 GiB.
    Gib1,
}

impl HugePageSize {
    /// Bytes of a page.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        match self {
            Self::Mib2 => 2 << 20,
            Self::Gib1 => 1 << 30,
        }
    }
}

/// Huge pages of `page` bytes in the kernel's pool that nobody has or was promised.
pub(super) fn free(page: u64) -> Option<u64> {
    let directory = pool_directory(page);
    let number = |file| {
        fs::read_to_string(Path::new(&directory).join(file)).ok()?.trim().parse::<u64>().ok()
    };
    Some(number("free_hugepages")?.saturating_sub(number("resv_hugepages")?))
}

/// Where the kernel says which memory gets transparent huge pages.
pub(super) const TRANSPARENT: &str = "/sys/kernel/mm/transparent_hugepage";

/// Whether memory that asks for transparent huge pages may get them: `shared` memory (a memfd), or
/// private.
pub(super) fn transparent(directory: &Path, shared: bool) -> Result<(), MapError> {
    let (file, advise) = if shared { ("shmem_enabled", "advise") } else { ("enabled", "madvise") };
    let general = directory.join(file);
    // Newer kernels have a setting for each size, too.
    let (setting, value) = match chosen(&directory.join("hugepages-2048kB").join(file)) {
        Some(value) if value != "inherit" => {
            (directory.join("hugepages-2048kB").join(file), Some(value))
        }
        _ => (general.clone(), chosen(&general)),
    };
    match value.as_deref() {
        None | Some("never" | "deny") => {
            let setting = setting.to_string_lossy().into_owned();
            Err(MapError::TransparentOff { setting, value, advise })
        }
        Some(_) => Ok(()),
    }
}

/// The word in brackets, as in `always [madvise] never`.
fn chosen(file: &Path) -> Option<String> {
    let text = fs::read_to_string(file).ok()?;
    let (_, rest) = text.split_once('[')?;
    Some(rest.split_once(']')?.0.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_for_a_size_come_first() {
        let off = |files: &[(&str, &str)], shared| {
            let root = tempfile::tempdir().unwrap();
            fs::create_dir(root.path().join("hugepages-2048kB")).unwrap();
            for (file, text) in files {
                fs::write(root.path().join(file), text).unwrap();
            }
            match transparent(root.path(), shared) {
                Ok(()) => None,
                Err(MapError::TransparentOff { setting, value, .. }) => {
                    let setting = Path::new(&setting).strip_prefix(root.path()).unwrap().to_owned();
                    Some((setting.to_str().unwrap().to_owned(), value))
                }
                Err(error) => panic!("{error}"),
            }
        };
        let said = |setting: &str, value: Option<&str>| {
            Some((setting.to_owned(), value.map(str::to_owned)))
        };
        let (enabled, size) = ("enabled", "hugepages-2048kB/enabled");
        assert_eq!(off(&[], false), said(enabled, None));
        assert_eq!(off(&[(enabled, "always [madvise] never")], false), None);
        assert_eq!(
            off(&[(enabled, "always madvise [never]")], false),
            said(enabled, Some("never"))
        );
        let inherit = "always [inherit] madvise never";
        let never = [(enabled, "always madvise [never]"), (size, inherit)];
        assert_eq!(off(&never, false), said(enabled, Some("never")));
        let yet = [(enabled, "always madvise [never]"), (size, "always inherit [madvise] never")];
        assert_eq!(off(&yet, false), None);
        let not = [(enabled, "[always] madvise never"), (size, "always inherit madvise [never]")];
        assert_eq!(off(&not, false), said(size, Some("never")));
        // Of shared memory it is another file.
        assert_eq!(off(&[(enabled, "[always]")], true), said("shmem_enabled", None));
        let denied = [("shmem_enabled", "always within_size advise never [deny] force")];
        assert_eq!(off(&denied, true), said("shmem_enabled", Some("deny")));
        assert_eq!(off(&[("shmem_enabled", "always within_size [advise] never")], true), None);
    }
}
