//! `cargo xtask guest`: the Linux that hardware tests boot, built once and cached.

mod cache;
mod initramfs;
mod kernel;
mod packages;
mod progress;

use std::path::PathBuf;

use thiserror::Error;

use crate::process;

/// Changes when the way of building changes: old results are then not taken for new ones.
const BUILDER: &str = "1";

/// Why there is no guest.
#[derive(Debug, Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Cache(#[from] cache::Error),
    #[error(transparent)]
    Packages(#[from] packages::Error),
    #[error(transparent)]
    Process(#[from] process::Error),
    #[error("{step}: {source}; the log ends with\n{tail}\nthe whole log: {}", log.display())]
    Step { step: &'static str, source: process::Error, tail: String, log: PathBuf },
    #[error("the kernel's configuration does not take:\n{}", dropped.join("\n"))]
    Configuration { dropped: Vec<String> },
    #[error("{name} is too large for a cpio archive")]
    TooLarge { name: &'static str },
}

/// A file of the guest.
#[derive(Clone, Copy, Debug, PartialEq, clap::ValueEnum)]
pub(crate) enum Artefact {
    /// The kernel as an ELF file, with the patch for software KVM hosts.
    Vmlinux,
    /// The same kernel as a bzImage.
    Bzimage,
    /// The kernel as an ELF file, as Debian has it.
    VmlinuxUnpatched,
    /// The initramfs with our init.
    Initrd,
    /// The init alone, for a root file system on a disk.
    Init,
}

/// The guest, built.
#[derive(Debug)]
pub(crate) struct Guest {
    kernel: PathBuf,
    initramfs: PathBuf,
}

impl Guest {
    /// Where the file is.
    pub(crate) fn path(&self, artefact: Artefact) -> PathBuf {
        match artefact {
            Artefact::Vmlinux => self.kernel.join(kernel::VMLINUX),
            Artefact::Bzimage => self.kernel.join(kernel::BZIMAGE),
            Artefact::VmlinuxUnpatched => self.kernel.join(kernel::VMLINUX_UNPATCHED),
            Artefact::Initrd => self.initramfs.join(initramfs::ARCHIVE),
            Artefact::Init => self.initramfs.join(initramfs::BINARY),
        }
    }

    /// How tests find it.
    pub(crate) fn environment(&self) -> [(&'static str, PathBuf); 5] {
        [
            ("HV_GUEST_VMLINUX", self.path(Artefact::Vmlinux)),
            ("HV_GUEST_BZIMAGE", self.path(Artefact::Bzimage)),
            ("HV_GUEST_VMLINUX_UNPATCHED", self.path(Artefact::VmlinuxUnpatched)),
            ("HV_GUEST_INITRD", self.path(Artefact::Initrd)),
            ("HV_GUEST_INIT", self.path(Artefact::Init)),
        ]
    }
}

/// Builds what is not in the cache, installing packages for it if `install`.
pub(crate) fn build(install: bool) -> Result<Guest, Error> {
    let version = packages::ensure(install)?;
    let cache = cache::Cache::from_environment()?;

    let inputs = [BUILDER, packages::SOURCE, &version, kernel::CONFIG, kernel::PATCH];
    let name = cache::name("kernel", &inputs);
    let files = [kernel::VMLINUX, kernel::BZIMAGE, kernel::VMLINUX_UNPATCHED];
    let kernel = cache.get_or_make(&name, &files, |scratch, out| {
        anstream::eprintln!("guest: building Linux from {} {version}", packages::SOURCE);
        kernel::make(scratch, out)
    })?;

    let mut inputs = vec![BUILDER];
    inputs.extend(initramfs::INIT.iter().flat_map(|(name, text)| [name, text]));
    inputs.extend(initramfs::RUSTC);
    let name = cache::name("initramfs", &inputs);
    let files = [initramfs::ARCHIVE, initramfs::BINARY];
    let initramfs = cache.get_or_make(&name, &files, initramfs::make)?;
    Ok(Guest { kernel, initramfs })
}

/// Builds the guest and prints where it is: one file's path alone, or all with a command to try.
pub(crate) fn run(install: bool, only: Option<Artefact>) -> Result<(), Error> {
    let guest = build(install)?;
    if let Some(artefact) = only {
        anstream::println!("{}", guest.path(artefact).display());
        return Ok(());
    }
    for (variable, path) in guest.environment() {
        anstream::println!("{variable}={}", path.display());
    }
    Ok(())
}
