//! Debian packages: which are installed, and installing others.

use std::collections::BTreeMap;
use std::io;
use std::process::Command;

use thiserror::Error;

use crate::process;

/// Why packages are not there.
#[derive(Debug, Error)]
pub(crate) enum Error {
    #[error("dpkg-query does not run here: {0}")]
    NotDebian(io::Error),
    #[error("packages are missing; install them:\n  {0}")]
    Missing(String),
    #[error(transparent)]
    Install(process::Error),
}

/// Installs those of `packages` that are missing, if it may, and returns the versions of all.
/// `purpose` is what the user is told they are for.
pub(crate) fn ensure(
    purpose: &str,
    packages: &[&str],
    install: bool,
) -> Result<BTreeMap<String, String>, Error> {
    let found = installed(packages)?;
    let lacking = missing(&found, packages);
    if lacking.is_empty() {
        return Ok(found);
    }
    let command = apt_get_install(&lacking);
    if !install || !rustix::process::geteuid().is_root() {
        return Err(Error::Missing(format!("sudo {}", process::shown(&command))));
    }
    anstream::eprintln!("{purpose}: installing the packages {}", lacking.join(" "));
    apt_get(command).map_err(Error::Install)?;
    let found = installed(packages)?;
    let lacking = missing(&found, packages);
    if lacking.is_empty() {
        Ok(found)
    } else {
        Err(Error::Missing(process::shown(&apt_get_install(&lacking))))
    }
}

/// Those of `packages` that are installed, with their versions.
fn installed(packages: &[&str]) -> Result<BTreeMap<String, String>, Error> {
    let mut query = Command::new("dpkg-query");
    query.args(["--show", "--showformat=${Package} ${db:Status-Status} ${Version}\\n"]);
    // Its exit status says no more than that one of them is unknown.
    let output = query.args(packages).output().map_err(Error::NotDebian)?;
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

fn missing<'a>(installed: &BTreeMap<String, String>, wanted: &[&'a str]) -> Vec<&'a str> {
    wanted.iter().copied().filter(|package| !installed.contains_key(*package)).collect()
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
        assert_eq!(
            missing(&installed, &["make", "bc", "bison", "flex"]),
            ["make", "bison", "flex"]
        );
    }

    #[test]
    fn the_command_to_type_is_complete() {
        let command = apt_get_install(&["linux-source-6.1", "bc"]);
        assert_eq!(
            process::shown(&command),
            "apt-get install --yes --no-install-recommends linux-source-6.1 bc"
        );
    }
}
