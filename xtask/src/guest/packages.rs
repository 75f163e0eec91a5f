//! The Debian packages that the guest is built with.

use thiserror::Error;

use crate::debian;

/// The kernel's source. The configuration and the patch are made for this version: another one
/// needs its own.
pub(crate) const SOURCE: &str = "linux-source-6.1";

/// What is needed, from a Debian that has nothing.
const PACKAGES: &[&str] =
    &[SOURCE, "bc", "bison", "flex", "gcc", "libc6-dev", "libelf-dev", "make", "patch", "xz-utils"];

/// Why the packages are not there.
#[derive(Debug, Error)]
#[error(
    "{0}\n{SOURCE} is in Debian 12 (bookworm); the guest's kernel is not built from any other source"
)]
pub(crate) struct Error(#[from] debian::Error);

/// Installs what is missing, if it may, and returns the version of the source.
pub(crate) fn ensure(install: bool) -> Result<String, Error> {
    let versions = debian::ensure("guest", PACKAGES, install)?;
    Ok(versions.get(SOURCE).cloned().unwrap_or_default())
}
