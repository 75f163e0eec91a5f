//! The kernel of the guest: Debian's source with our configuration, without and with our patch.
//!
//! The patch (`syscall.patch`) is for hosts whose KVM delivers SYSCALL without leaving CPL 3; the
//! kernel without it is there to see how far an unmodified one gets.

use std::fs;
use std::num::NonZero;
use std::path::Path;
use std::process::Command;
use std::thread;

use super::Error;
use super::cache::io;
use super::packages::SOURCE;
use super::progress::Build;

/// The configuration: what differs from the defaults of the architecture.
pub(crate) const CONFIG: &str = include_str!("../../guest/linux.config");
/// The patch: SYSCALL from CPL 3.
pub(crate) const PATCH: &str = include_str!("../../guest/syscall.patch");

/// The files that a build leaves.
pub(crate) const VMLINUX: &str = "vmlinux";
pub(crate) const VMLINUX_UNPATCHED: &str = "vmlinux-unpatched";
pub(crate) const BZIMAGE: &str = "bzImage";

/// Builds the kernels in `scratch` and puts them into `out`.
pub(crate) fn make(scratch: &Path, out: &Path) -> Result<(), Error> {
    let mut build = Build::new(&scratch.join("build.log"))?;
    let tree = scratch.join(SOURCE);

    let tarball = format!("/usr/src/{SOURCE}.tar.xz");
    let mut tar = Command::new("tar");
    build.step("unpacking the source", tar.args(["-xJf", &tarball, "-C"]).arg(scratch))?;

    let config = tree.join("arch/x86/configs/hv_defconfig");
    io("writing", &config, fs::write(&config, CONFIG))?;
    build.step("configuring", make_in(&tree).arg("hv_defconfig"))?;
    let config = tree.join(".config");
    let result = io("reading", &config, fs::read_to_string(&config))?;
    let dropped = dropped(CONFIG, &result);
    if !dropped.is_empty() {
        return Err(Error::Configuration { dropped });
    }

    build.step("compiling", make_in(&tree).arg("vmlinux"))?;
    copy(&tree.join("vmlinux"), &out.join(VMLINUX_UNPATCHED))?;

    let patch = scratch.join("syscall.patch");
    io("writing", &patch, fs::write(&patch, PATCH))?;
    let mut apply = Command::new("patch");
    apply.args(["--strip=1", "--forward", "--batch", "--directory"]).arg(&tree);
    build.step("patching", apply.arg("--input").arg(&patch))?;
    build.step("compiling what the patch changed", make_in(&tree).args(["vmlinux", "bzImage"]))?;
    copy(&tree.join("vmlinux"), &out.join(VMLINUX))?;
    copy(&tree.join("arch/x86/boot/bzImage"), &out.join(BZIMAGE))
}

/// `make` for this tree, with nothing of ours in what it builds but the version.
fn make_in(tree: &Path) -> Command {
    let jobs = thread::available_parallelism().map_or(1, NonZero::get);
    let mut make = Command::new("make");
    make.arg("-C").arg(tree).arg(format!("-j{jobs}")).arg("ARCH=x86_64");
    for variable in ["MAKEFLAGS", "MFLAGS", "CROSS_COMPILE", "KBUILD_OUTPUT", "KCFLAGS", "LLVM"] {
        make.env_remove(variable);
    }
    make.env("LC_ALL", "C").envs([
        ("KBUILD_BUILD_USER", "hv"),
        ("KBUILD_BUILD_HOST", "hv"),
        ("KBUILD_BUILD_TIMESTAMP", "1970-01-01"),
    ]);
    make
}

fn copy(from: &Path, to: &Path) -> Result<(), Error> {
    io("copying", from, fs::copy(from, to))?;
    Ok(())
}

/// The lines of `wanted` that are not true of `config`: Kconfig drops silently what it does not
/// know, or what depends on something that is off.
fn dropped(wanted: &str, config: &str) -> Vec<String> {
    let is_set = |symbol: &str| {
        let mut values = config.lines().filter_map(|line| line.strip_prefix(symbol));
        values.any(|rest| rest.starts_with('='))
    };
    let holds =
        |line: &str| match line.strip_prefix("# ").and_then(|l| l.strip_suffix(" is not set")) {
            Some(symbol) => !is_set(symbol),
            None => line.starts_with('#') || line.is_empty() || config.lines().any(|l| l == line),
        };
    wanted.lines().filter(|line| !holds(line)).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_setting_that_kconfig_dropped_is_found() {
        let wanted =
            "# comment\n\nCONFIG_A=y\nCONFIG_B=8\n# CONFIG_C is not set\n# CONFIG_D is not set\n";
        assert!(dropped(wanted, "CONFIG_A=y\nCONFIG_B=8\n# CONFIG_C is not set\n").is_empty());
        let config = "# CONFIG_A is not set\nCONFIG_B=80\nCONFIG_C=m\nCONFIG_D_E=y\n";
        assert_eq!(dropped(wanted, config), ["CONFIG_A=y", "CONFIG_B=8", "# CONFIG_C is not set"]);
    }

    #[test]
    fn the_patch_is_for_the_file_it_names() {
        assert!(PATCH.starts_with("--- a/arch/x86/mm/fault.c\n+++ b/arch/x86/mm/fault.c\n"));
    }

    #[test]
    fn the_configuration_has_what_the_guest_cannot_do_without() {
        for line in ["CONFIG_SERIAL_8250_CONSOLE=y", "CONFIG_BLK_DEV_INITRD=y", "CONFIG_SMP=y"] {
            assert!(CONFIG.lines().any(|have| have == line), "{line}");
        }
    }
}
