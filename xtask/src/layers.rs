//! `cargo xtask layers`: the crates depend on each other as drawn, and on one version of each
//! rust-vmm crate.
//!
//! ```text
//!             hv-cli
//!           /    |   \
//!      hv-irq hv-memory hv-kvm
//!           \    |   /
//!            hv-core
//! ```
//!
//! The layers are what makes the library crates usable on their own; a dependency that is only
//! convenient is how they are lost. The checks are pure functions over plain data.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::PathBuf;

use cargo_metadata::{DependencyKind, Metadata};
use thiserror::Error;
use toml::{Table, Value};

use crate::workspace;

/// Which crates of the workspace each one may depend on.
const LAYERS: &[(&str, &[&str])] = &[
    ("hv-core", &[]),
    ("hv-kvm", &["hv-core"]),
    ("hv-irq", &["hv-core"]),
    ("hv-memory", &["hv-core"]),
    ("hv-cli", &["hv-core", "hv-kvm", "hv-irq", "hv-memory"]),
    ("xtask", &[]),
];

/// The crate that any other may use in its tests, for its mocks.
const FOR_TESTS: &str = "hv-core";

/// Crates whose types cross our interfaces: two versions of one do not fit together.
const RUST_VMM: &[&str] = &[
    "acpi_tables",
    "event-manager",
    "kvm-bindings",
    "kvm-ioctls",
    "linux-loader",
    "seccompiler",
    "vfio-bindings",
    "vfio-ioctls",
    "vm-allocator",
    "vm-device",
    "vm-memory",
    "vm-superio",
    "vmm-sys-util",
];

/// The rest of them: virtio-queue, virtio-bindings, vhost-user-backend, ...
const RUST_VMM_PREFIXES: &[&str] = &["virtio-", "vhost"];

/// Why the layers could not be checked, or what is wrong with them.
#[derive(Debug, Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Workspace(#[from] workspace::Error),
    #[error("reading {} failed: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{} is not valid TOML: {source}", path.display())]
    Parse { path: PathBuf, source: Box<toml::de::Error> },
    #[error("the layers are broken:\n{}", list(.0))]
    Broken(Vec<Violation>),
}

/// One thing that is not as it must be.
#[derive(Debug, Error, PartialEq)]
pub(crate) enum Violation {
    #[error("{from} depends on {to}: it may depend on {}", allowed(from))]
    Edge { from: String, to: String },
    #[error("{from} depends on {to} in its tests: only {FOR_TESTS} and itself are for that")]
    TestEdge { from: String, to: String },
    #[error("{0} is not in the picture: say in xtask/src/layers.rs what it may depend on")]
    Unknown(String),
    #[error("{name} resolves to {}: align the requirements in Cargo.toml", versions.join(" and "))]
    Versions { name: String, versions: Vec<String> },
    #[error(
        "{member}: `{dependency}` in [{table}] is not taken from the workspace: \
         declare it in the root's [workspace.dependencies] and write `workspace = true`"
    )]
    NotInherited { member: String, table: String, dependency: String },
}

fn list(violations: &[Violation]) -> String {
    let lines: Vec<_> = violations.iter().map(|violation| format!("  {violation}")).collect();
    lines.join("\n")
}

fn allowed(member: &str) -> String {
    match LAYERS.iter().find(|(name, _)| *name == member) {
        Some((_, [])) | None => "no crate of the workspace".to_owned(),
        Some((_, below)) => below.join(", "),
    }
}

/// Checks the workspace in the current directory.
pub(crate) fn run() -> Result<(), Error> {
    let metadata = workspace::metadata()?;
    let mut violations = edges(&internal_edges(&metadata));
    violations.extend(versions(
        metadata.packages.iter().map(|p| (p.name.to_string(), p.version.to_string())),
    ));
    for member in metadata.workspace_packages() {
        let path = member.manifest_path.as_std_path();
        let text = fs::read_to_string(path)
            .map_err(|source| Error::Read { path: path.to_owned(), source })?;
        let manifest: Table = text
            .parse()
            .map_err(|source| Error::Parse { path: path.to_owned(), source: Box::new(source) })?;
        violations.extend(inherited(&member.name, &manifest));
    }
    if violations.is_empty() {
        anstream::eprintln!("layers: {} crates as drawn", metadata.workspace_packages().len());
        Ok(())
    } else {
        Err(Error::Broken(violations))
    }
}

/// A member of the workspace, and the members it depends on.
#[derive(Debug, Default)]
struct Member {
    name: String,
    /// In what it ships, with build dependencies.
    uses: BTreeSet<String>,
    /// In its tests, examples and benchmarks.
    tests_use: BTreeSet<String>,
}

fn internal_edges(metadata: &Metadata) -> Vec<Member> {
    let members = metadata.workspace_packages();
    let names: BTreeSet<&str> = members.iter().map(|package| package.name.as_str()).collect();
    let mut edges = Vec::new();
    for package in &members {
        let mut member = Member { name: package.name.to_string(), ..Member::default() };
        for dependency in &package.dependencies {
            if names.contains(dependency.name.as_str()) {
                let to = dependency.name.clone();
                match dependency.kind {
                    DependencyKind::Development => member.tests_use.insert(to),
                    _ => member.uses.insert(to),
                };
            }
        }
        edges.push(member);
    }
    edges
}

/// Dependencies between members that go up or sideways.
fn edges(members: &[Member]) -> Vec<Violation> {
    let mut violations = Vec::new();
    for Member { name, uses, tests_use } in members {
        let Some((_, below)) = LAYERS.iter().find(|(known, _)| known == name) else {
            violations.push(Violation::Unknown(name.clone()));
            continue;
        };
        for to in uses.iter().filter(|to| !below.contains(&to.as_str())) {
            violations.push(Violation::Edge { from: name.clone(), to: to.clone() });
        }
        // What it ships with, it may use in tests as well.
        let fits =
            |to: &str| to == FOR_TESTS && name != "xtask" || to == name || below.contains(&to);
        for to in tests_use.iter().filter(|to| !fits(to)) {
            violations.push(Violation::TestEdge { from: name.clone(), to: to.clone() });
        }
    }
    violations
}

/// rust-vmm crates of which the whole graph, with every feature, has more than one version.
fn versions(packages: impl IntoIterator<Item = (String, String)>) -> Vec<Violation> {
    let mut found: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (name, version) in packages {
        let known = RUST_VMM.contains(&name.as_str())
            || RUST_VMM_PREFIXES.iter().any(|prefix| name.starts_with(prefix));
        if known {
            found.entry(name).or_default().insert(version);
        }
    }
    let several = found.into_iter().filter(|(_, versions)| versions.len() > 1);
    several
        .map(|(name, versions)| Violation::Versions {
            name,
            versions: versions.into_iter().collect(),
        })
        .collect()
}

/// Dependencies of a member that name a version or source of their own.
fn inherited(member: &str, manifest: &Table) -> Vec<Violation> {
    let mut violations = Vec::new();
    for (table, dependencies) in dependency_tables(manifest) {
        for (dependency, value) in dependencies {
            if !is_inherited(value) && !is_itself(member, dependency, value) {
                violations.push(Violation::NotInherited {
                    member: member.to_owned(),
                    table: table.clone(),
                    dependency: dependency.clone(),
                });
            }
        }
    }
    violations
}

/// Every dependency table of a manifest with its name, those of `[target.*]` too.
fn dependency_tables(manifest: &Table) -> Vec<(String, &Table)> {
    const KINDS: [&str; 3] = ["dependencies", "dev-dependencies", "build-dependencies"];
    let mut parents = vec![(String::new(), manifest)];
    if let Some(targets) = manifest.get("target").and_then(Value::as_table) {
        for (name, target) in targets {
            parents.extend(target.as_table().map(|table| (format!("target.{name}."), table)));
        }
    }
    let mut tables = Vec::new();
    for (prefix, parent) in parents {
        for kind in KINDS {
            let table = parent.get(kind).and_then(Value::as_table);
            tables.extend(table.map(|table| (format!("{prefix}{kind}"), table)));
        }
    }
    tables
}

fn is_inherited(dependency: &Value) -> bool {
    dependency.get("workspace").and_then(Value::as_bool) == Some(true)
}

/// A crate names itself by path, to have its own features in its tests.
fn is_itself(member: &str, dependency: &str, value: &Value) -> bool {
    dependency == member && value.get("path").and_then(Value::as_str) == Some(".")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(name: &str, uses: &[&str], tests_use: &[&str]) -> Member {
        let set = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
        Member { name: name.to_owned(), uses: set(uses), tests_use: set(tests_use) }
    }

    fn edge(from: &str, to: &str) -> Violation {
        Violation::Edge { from: from.to_owned(), to: to.to_owned() }
    }

    fn test_edge(from: &str, to: &str) -> Violation {
        Violation::TestEdge { from: from.to_owned(), to: to.to_owned() }
    }

    #[test]
    fn the_picture_holds() {
        let members = [
            member("hv-core", &[], &["hv-core"]),
            member("hv-kvm", &["hv-core"], &["hv-core"]),
            member("hv-irq", &["hv-core"], &["hv-core"]),
            member("hv-memory", &["hv-core"], &["hv-core", "hv-memory"]),
            member("hv-cli", &["hv-core", "hv-irq", "hv-kvm", "hv-memory"], &["hv-core", "hv-kvm"]),
            member("xtask", &[], &[]),
        ];
        assert_eq!(edges(&members), []);
    }

    #[test]
    fn upward_is_refused() {
        assert_eq!(edges(&[member("hv-core", &["hv-kvm"], &[])]), [edge("hv-core", "hv-kvm")]);
        assert_eq!(
            edges(&[member("hv-irq", &["hv-core", "hv-cli"], &[])]),
            [edge("hv-irq", "hv-cli")]
        );
    }

    #[test]
    fn sideways_is_refused() {
        for (from, to) in [("hv-irq", "hv-memory"), ("hv-memory", "hv-irq"), ("hv-irq", "hv-kvm")] {
            assert_eq!(edges(&[member(from, &["hv-core", to], &[])]), [edge(from, to)]);
        }
    }

    #[test]
    fn tests_do_not_excuse_it() {
        assert_eq!(
            edges(&[member("hv-irq", &["hv-core"], &["hv-kvm"])]),
            [test_edge("hv-irq", "hv-kvm")]
        );
        assert_eq!(
            edges(&[member("hv-core", &[], &["hv-memory"])]),
            [test_edge("hv-core", "hv-memory")]
        );
    }

    #[test]
    fn xtask_stands_alone() {
        assert_eq!(edges(&[member("xtask", &["hv-core"], &[])]), [edge("xtask", "hv-core")]);
        assert_eq!(edges(&[member("xtask", &[], &["hv-core"])]), [test_edge("xtask", "hv-core")]);
        assert_eq!(edges(&[member("hv-cli", &["xtask"], &[])]), [edge("hv-cli", "xtask")]);
    }

    #[test]
    fn a_new_crate_must_be_drawn() {
        assert_eq!(
            edges(&[member("hv-utils", &[], &[])]),
            [Violation::Unknown("hv-utils".to_owned())]
        );
    }

    #[test]
    fn two_versions_of_a_rust_vmm_crate_are_refused() {
        let packages = [
            ("vm-memory", "0.17.1"),
            ("vm-memory", "0.18.0"),
            ("virtio-queue", "0.17.0"),
            ("virtio-queue", "0.18.0"),
            ("kvm-ioctls", "0.25.1"),
            ("syn", "1.0.0"),
            ("syn", "2.0.0"),
        ];
        let found = versions(packages.map(|(n, v)| (n.to_owned(), v.to_owned())));
        let several = |name: &str, versions: [&str; 2]| Violation::Versions {
            name: name.to_owned(),
            versions: versions.map(str::to_owned).to_vec(),
        };
        assert_eq!(
            found,
            [
                several("virtio-queue", ["0.17.0", "0.18.0"]),
                several("vm-memory", ["0.17.1", "0.18.0"])
            ]
        );
        assert_eq!(
            found[1].to_string(),
            "vm-memory resolves to 0.17.1 and 0.18.0: align the requirements in Cargo.toml"
        );
    }

    #[test]
    fn every_form_of_an_inherited_dependency_is_accepted() {
        let manifest = "
            [dependencies]
            a.workspace = true
            b = { workspace = true, features = [
                'x',
            ] }
            [dependencies.c]
            workspace = true
            [dev-dependencies]
            hv-core = { path = '.', features = ['mock'] }
            [target.'cfg(unix)'.dependencies]
            d.workspace = true
        ";
        assert_eq!(inherited("hv-core", &manifest.parse().unwrap()), []);
    }

    #[test]
    fn every_form_of_an_own_version_is_refused() {
        let manifest = "
            [dependencies]
            a = '1'
            b = { version = '1', features = ['x'] }
            [dependencies.c]
            git = 'https://example.org/c'
            [build-dependencies]
            d = { path = '../d' }
            [dev-dependencies]
            hv-core = { path = '../hv-core' }
            [target.'cfg(unix)'.dependencies]
            e = '1'
        ";
        let found = inherited("hv-irq", &manifest.parse().unwrap());
        let names: BTreeSet<String> = found
            .into_iter()
            .map(|violation| match violation {
                Violation::NotInherited { table, dependency, .. } => {
                    format!("{table} {dependency}")
                }
                other => panic!("{other}"),
            })
            .collect();
        let expected = [
            "build-dependencies d",
            "dependencies a",
            "dependencies b",
            "dependencies c",
            "dev-dependencies hv-core",
            "target.cfg(unix).dependencies e",
        ];
        assert_eq!(names, expected.map(str::to_owned).into());
    }
}
