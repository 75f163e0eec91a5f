//! `cargo xtask public-api`: what each library offers is kept in its `public-api.txt`, so that a change of
//! the surface is seen in review, and no item gets public by accident.
//!
//! rustdoc tells what is public in a form that is not stable yet: a rustc other than the one the crate
//! `public-api` was made for can't be asked, and that is said.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use cargo_metadata::{Metadata, Package, TargetKind};
use thiserror::Error;

use crate::{process, workspace};

/// The snapshot of a crate, beside its `Cargo.toml`.
const SNAPSHOT: &str = "public-api.txt";

/// Why the surface is not as it is written down.
#[derive(Debug, Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Process(#[from] process::Error),
    #[error(transparent)]
    Workspace(#[from] workspace::Error),
    #[error("{what} {} failed: {source}", path.display())]
    Io { what: &'static str, path: PathBuf, source: io::Error },
    #[error(
        "the public items of {package} can't be listed (the rustdoc of this toolchain?): {source}"
    )]
    Listing { package: String, source: Box<public_api::Error> },
    #[error(
        "the public items of {package} are not those in {SNAPSHOT}:\n{changes}\nIf that is meant, run \
         `cargo xtask public-api --accept`, and say it in the CHANGELOG if it breaks users"
    )]
    Changed { package: String, changes: String },
}

/// Compares what the libraries offer with their snapshots, or makes those anew. Returns how many items
/// there are.
pub(crate) fn run(accept: bool) -> Result<usize, Error> {
    let metadata = workspace::metadata()?;
    let mut items = 0;
    for package in metadata.workspace_packages().into_iter().filter(|package| is_published(package))
    {
        let now = listing(&metadata, package)?;
        items += now.lines().count();
        let path = package.manifest_path.with_file_name(SNAPSHOT).into_std_path_buf();
        if accept {
            write(&path, &now)?;
            continue;
        }
        let before = match fs::read_to_string(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
            read => read.map_err(|source| Error::Io { what: "reading", path, source })?,
        };
        let changes = changes(&before, &now);
        if !changes.is_empty() {
            return Err(Error::Changed { package: package.name.to_string(), changes });
        }
    }
    Ok(items)
}

/// `publish = false` makes the list of registries empty.
fn is_published(package: &Package) -> bool {
    package.publish.as_ref().is_none_or(|registries| !registries.is_empty())
}

/// The public items of a library, a line each, with every feature on. What the compiler or a derive adds
/// to each type is left out.
fn listing(metadata: &Metadata, package: &Package) -> Result<String, Error> {
    let mut rustdoc = workspace::cargo();
    rustdoc.args(["rustdoc", "--quiet", "--lib", "--all-features", "--package", &package.name]);
    rustdoc.args(["--", "-Zunstable-options", "--output-format=json", "--cap-lints=allow"]);
    process::run(rustdoc.env("RUSTC_BOOTSTRAP", "1"))?;
    let library = package.targets.iter().find(|target| target.kind.contains(&TargetKind::Lib));
    let name =
        library.map_or_else(|| package.name.replace('-', "_"), |lib| lib.name.replace('-', "_"));
    let json = metadata.target_directory.join("doc").join(name).with_extension("json");
    public_api::Builder::from_rustdoc_json(json)
        .omit_blanket_impls(true)
        .omit_auto_trait_impls(true)
        .omit_auto_derived_impls(true)
        .build()
        .map(|api| api.to_string())
        .map_err(|source| Error::Listing {
            package: package.name.to_string(),
            source: source.into(),
        })
}

fn write(path: &Path, text: &str) -> Result<(), Error> {
    fs::write(path, text).map_err(|source| Error::Io { what: "writing", path: path.into(), source })
}

/// What is in one text but not in the other, a line each, as a diff shows it.
fn changes(before: &str, now: &str) -> String {
    let only_in = |text: &str, other: &str, sign: char| -> Vec<String> {
        let missing = |line: &&str| !other.lines().any(|there| there == *line);
        text.lines().filter(missing).map(|line| format!("{sign} {line}")).collect()
    };
    [only_in(before, now, '-'), only_in(now, before, '+')].concat().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_went_and_what_came_is_shown() {
        assert_eq!(changes("a\nb\nc\n", "a\nc\nd\n"), "- b\n+ d");
        assert_eq!(changes("a\nb\n", "a\nb\n"), "");
        assert_eq!(changes("", "a\n"), "+ a", "a crate without a snapshot");
    }
}
