//! What cargo says about the workspace: its crates, and which of their tests and examples need
//! hardware.
//!
//! A test that opens `/dev/kvm` is an integration test `tests/kvm_*.rs` with
//! `required-features = ["kvm-tests"]` in its `[[test]]` table, so that a plain `cargo test` never
//! builds it. An example that does is called `*_kvm`.

use std::env;
use std::process::Command;

use cargo_metadata::{CargoOpt, Metadata, MetadataCommand, TargetKind};
use thiserror::Error;

/// The feature that hardware tests require.
pub(crate) const KVM_TESTS: &str = "kvm-tests";

/// Why the workspace is not usable as it is.
#[derive(Debug, Error)]
pub(crate) enum Error {
    #[error("cargo metadata failed: {0}")]
    Metadata(#[from] cargo_metadata::Error),
    #[error(
        "{package}: the test {test} must be named kvm_* and have \
         `required-features = [\"{KVM_TESTS}\"]`, both or neither: \
         else a plain `cargo test` opens /dev/kvm"
    )]
    Unmarked { package: String, test: String },
}

/// The workspace of the current directory, every feature on.
pub(crate) fn metadata() -> Result<Metadata, Error> {
    Ok(MetadataCommand::new().features(CargoOpt::AllFeatures).exec()?)
}

/// The cargo that runs this program.
pub(crate) fn cargo() -> Command {
    Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

/// An integration test or an example of a crate.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Target {
    pub(crate) package: String,
    pub(crate) name: String,
    /// The features it is built with.
    pub(crate) features: Vec<String>,
    pub(crate) example: bool,
    pub(crate) needs_kvm: bool,
}

impl Target {
    /// `cargo <verb>` for this target alone.
    pub(crate) fn command(&self, verb: &str) -> Command {
        let mut command = cargo();
        command.args([verb, "--package", &self.package]);
        command.args([if self.example { "--example" } else { "--test" }, &self.name]);
        if !self.features.is_empty() {
            command.args(["--features", &self.features.join(",")]);
        }
        command
    }
}

/// The integration tests and examples of every crate, in the order of their names.
pub(crate) fn targets(metadata: &Metadata) -> Result<Vec<Target>, Error> {
    let mut targets = Vec::new();
    for package in metadata.workspace_packages() {
        for target in &package.targets {
            let example = target.kind.contains(&TargetKind::Example);
            if example || target.kind.contains(&TargetKind::Test) {
                targets.push(classify(
                    &package.name,
                    &target.name,
                    &target.required_features,
                    example,
                )?);
            }
        }
    }
    targets.sort_by(|a, b| (&a.package, &a.name).cmp(&(&b.package, &b.name)));
    Ok(targets)
}

fn classify(
    package: &str,
    name: &str,
    features: &[String],
    example: bool,
) -> Result<Target, Error> {
    let marked = features.iter().any(|feature| feature == KVM_TESTS);
    let needs_kvm = if example { name.ends_with("_kvm") } else { name.starts_with("kvm_") };
    if !example && marked != needs_kvm {
        return Err(Error::Unmarked { package: package.to_owned(), test: name.to_owned() });
    }
    Ok(Target {
        package: package.to_owned(),
        name: name.to_owned(),
        features: features.to_vec(),
        example,
        needs_kvm,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn features(names: &[&str]) -> Vec<String> {
        names.iter().map(|&name| name.to_owned()).collect()
    }

    #[test]
    fn hardware_tests_are_named_and_marked() {
        let target = classify("hv-kvm", "kvm_vm", &features(&[KVM_TESTS]), false).unwrap();
        assert!(target.needs_kvm);
        assert_eq!(
            crate::process::shown(&target.command("test")).split_once(" test ").unwrap().1,
            "--package hv-kvm --test kvm_vm --features kvm-tests"
        );
        assert!(!classify("hv-irq", "commit", &[], false).unwrap().needs_kvm);
    }

    #[test]
    fn a_hardware_test_that_plain_cargo_test_would_run_is_refused() {
        let error = classify("hv-kvm", "kvm_vm", &[], false).unwrap_err();
        assert!(error.to_string().contains("hv-kvm: the test kvm_vm must"), "{error}");
    }

    #[test]
    fn a_marked_test_with_another_name_is_refused() {
        assert!(classify("hv-kvm", "vm", &features(&[KVM_TESTS]), false).is_err());
    }

    #[test]
    fn examples_say_by_their_name_that_they_need_kvm() {
        assert!(classify("hv-kvm", "probe_kvm", &[], true).unwrap().needs_kvm);
        assert!(!classify("hv-irq", "routes", &features(&["x"]), true).unwrap().needs_kvm);
    }
}
