//! The Debian packages that the guest is built with.

use std::collections::BTreeMap;
use std::io;
use std::process::Command;

use thiserror::Error;

use crate::process;

/// The kernel's source. The configuration and the patch are made for this version: another one
/// needs its own.
pub(crate) const SOURCE: &str = "linux-source-6.1";

/// What it is built with, from a Debian that has nothing.
const TOOLS: &[&str] =
    &["bc", "bison", "flex", "gcc", "libc6-dev", "libelf-dev", "make", "patch", "xz-utils"];

/// Why the packages are not there.
#[derive(Debug, Error)]
pub(crate) enum Error {
    #[error(
        "the guest's kernel is built from Debian's package {SOURCE}, \
         and dpkg-query does not run here: {0}"
    )]
    NotDebian(io::Error),
    #[error("packages are missing; install them:\n  {0}")]
    Missing(String),
    #[error(
        "installing packages failed: {source}\n{SOURCE} is in Debian 12 (bookworm); \
         the guest is not built from any other"
    )]
    Install { source: process::Error },
}

/// Installs what is missing, if it may, and returns the version of the source.
pub(crate) fn ensure(install: bool) -> Result<String, Error> {
    let mut installed = installed()?;
    let missing = missing(&installed);
    if !missing.is_empty() {
        let command = apt_get_install(&missing);
        if !install || !rustix::process::geteuid().is_root() {
            return Err(Error::Missing(format!("sudo {}", process::shown(&command))));
        }
        anstream::eprintln!("guest: installing the packages {}", missing.join(" "));
        apt_get(command).map_err(|source| Error::Install { source })?;
        installed = self::installed()?;
    }
    let still_missing = self::missing(&installed);
    match installed.remove(SOURCE) {
        Some(version) if still_missing.is_empty() => Ok(version),
        _ => Err(Error::Missing(process::shown(&apt_get_install(&still_missing)))),
    }
}

/// The packages we want that are installed, with their versions.
fn installed() -> Result<BTreeMap<String, String>, Error> {
    let mut query = Command::new("dpkg-query");
    query.args(["--show", "--showformat=${Package} ${db:Status-Status} ${Version}\\n"]);
    // Its exit status says no more than that one of them is unknown.
    let output = query.arg(SOURCE).args(TOOLS).output().map_err(Error::NotDebian)?;
    Ok(parse(&String::from_utf8_lossy(&output.stdout)))
}

/// Reads lines of `package state version`.
fn parse(text: &str) -> BTreeMap<String, String> {
    let mut installed = BTreeMap::new();
    for line in text.lines() {
        let mut words = line.split(' ');
        if let (Some(package), Some("installed"), Some(version)) =
            (words.next(), words.next(), words.next())
        {
            installed.insert(package.to_owned(), version.to_owned());
        }
    }
    installed
}

fn missing(installed: &BTreeMap<String, String>) -> Vec<&'static str> {
    let wanted = [SOURCE].into_iter().chain(TOOLS.iter().copied());
    wanted.filter(|package| !installed.contains_key(*package)).collect()
}

fn apt_get_install(packages: &[&str]) -> Command {
    let mut command = Command::new("apt-get");
    command.args(["install", "--yes", "--no-install-recommends"]).args(packages);
    command
}

/// Installs with fresh lists: old ones name versions that the mirrors no longer have.
fn apt_get(mut install: Command) -> Result<(), process::Error> {
    process::run(Command::new("apt-get").arg("update"))?;
    process::run(install.env("DEBIAN_FRONTEND", "noninteractive"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_installed_packages_count() {
        let text = "bc installed 1.07.1-3+b1\nbison config-files 2:3.8.2\nflex not-installed \n";
        let installed = parse(text);
        assert_eq!(installed.get("bc").map(String::as_str), Some("1.07.1-3+b1"));
        assert_eq!(installed.len(), 1);
        let missing = missing(&installed);
        assert_eq!(missing.first(), Some(&SOURCE));
        assert!(missing.contains(&"bison") && missing.contains(&"flex"));
        assert!(!missing.contains(&"bc"));
    }

    #[test]
    fn the_command_to_type_is_complete() {
        let command = apt_get_install(&[SOURCE, "bc"]);
        assert_eq!(
            process::shown(&command),
            "apt-get install --yes --no-install-recommends linux-source-6.1 bc"
        );
    }
}
