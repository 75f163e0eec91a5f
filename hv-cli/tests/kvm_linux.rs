//! `hv run` boots Linux on real KVM: the kernels and the initramfs of `cargo xtask guest`.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests fail by panicking")]

mod common;

use common::{LINUX_CMDLINE, Running, artefact};

fn boot(kernel: &str, cmdline: &str, args: &[&str]) -> Running {
    let kernel = artefact(kernel);
    let initrd = artefact("HV_GUEST_INITRD");
    let cmdline = format!("{LINUX_CMDLINE} {cmdline}");
    let fixed = [
        "run",
        "--kernel",
        kernel.to_str().unwrap(),
        "--initrd",
        initrd.to_str().unwrap(),
        "--cmdline",
        &cmdline,
        "--memory",
        "128M",
    ];
    Running::start(&[&fixed[..], args].concat())
}

/// Up to the test init, which must see both processors; it reads back what is typed, and powers
/// off.
fn to_user_space_and_off(kernel: &str, args: &[&str]) {
    let mut linux = boot(kernel, "", args);
    linux.wait_for("hv-guest: init up, 2 cpus online");
    linux.wait_for("hv-guest: ready");
    linux.send("typed on the console\n");
    linux.wait_for("hv-guest: echo: typed on the console");
    linux.wait_for("hv-guest: power off");
    let ran = linux.finish();
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(ran.stderr.contains("the guest powered off"), "{}", ran.stderr);
}

#[test]
fn vmlinux_boots_to_user_space() {
    to_user_space_and_off("HV_GUEST_VMLINUX", &["--cpus", "2"]);
}

#[test]
fn vmlinux_boots_by_its_pvh_entry() {
    to_user_space_and_off("HV_GUEST_VMLINUX", &["--cpus", "2", "--format", "pvh"]);
}

#[test]
fn bzimage_boots_to_user_space() {
    to_user_space_and_off("HV_GUEST_BZIMAGE", &["--cpus", "2"]);
}

#[test]
fn vmlinux_boots_with_a_split_irqchip() {
    to_user_space_and_off("HV_GUEST_VMLINUX", &["--cpus", "2", "--irqchip", "split"]);
}

/// The guest reads the entropy device; its interrupts are those `--stats-json` has.
#[test]
fn linux_reads_random_numbers_from_the_entropy_device() {
    let stats = tempfile::NamedTempFile::new().unwrap();
    let stats_path = stats.path().to_str().unwrap();
    let args = ["--cpus", "2", "--rng", "--stats-json", stats_path];
    let mut linux = boot("HV_GUEST_VMLINUX", "hv.check=rng", &args);
    linux.wait_for("hv-guest: check rng: ok: 64 bytes of /dev/hwrng");
    linux.wait_for("hv-guest: ready");
    linux.send("\n");
    linux.wait_for("hv-guest: power off");
    let ran = linux.finish();
    assert_eq!(ran.code, Some(0), "{ran:?}");

    let stats: serde_json::Value = serde_json::from_reader(stats).unwrap();
    let rng = &stats["devices"][0];
    let count = |name: &str| rng[name].as_u64().unwrap();
    assert_eq!((&rng["name"], &rng["failure"]), (&"rng0".into(), &serde_json::Value::Null));
    assert!(count("requests") > 0 && count("bytes-to-guest") >= 64, "{stats:#}");
    assert!(count("notifications") > 0, "{stats:#}");
    for none in ["notification-exits", "errors", "needs-reset", "refused"] {
        assert_eq!(count(none), 0, "{none}: {stats:#}");
    }
    // The vector of the queue, which is called input, counted on both CPUs.
    let lines = ran.stdout.lines().filter_map(|line| line.strip_prefix("hv-guest: interrupts:"));
    let line = lines.into_iter().find(|line| line.contains("virtio0-input")).unwrap();
    assert!(line.contains("PCI-MSI"), "{line}");
    let numbers = line.split_whitespace().skip(1).map_while(|word| word.parse::<u64>().ok());
    let seen: u64 = numbers.sum();
    // The kernel may have asked for more after it was looked at.
    assert!((1..=count("interrupts")).contains(&seen), "{line}: {stats:#}");
    assert!(ran.stderr.contains("hv: rng0: "), "{}", ran.stderr);
}

/// Level-triggered interrupts of a device, through an I/O APIC in user space.
#[test]
fn linux_without_msi_gets_the_line_of_pci() {
    let args = ["--rng", "--irqchip", "split"];
    let mut linux = boot("HV_GUEST_VMLINUX", "hv.check=rng pci=nomsi", &args);
    linux.wait_for("hv-guest: check rng: ok: 64 bytes of /dev/hwrng");
    linux.wait_for("hv-guest: ready");
    linux.send("\n");
    let ran = linux.finish();
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(ran.stdout.contains("11-fasteoi   virtio0"), "{}", ran.stdout);
    assert!(!ran.stdout.contains("nobody cared"), "{}", ran.stdout);
}

#[test]
fn a_guest_that_restarts_ends_as_a_reset() {
    let mut linux = boot("HV_GUEST_VMLINUX", "hv.test=reset", &[]);
    linux.wait_for("hv-guest: reset");
    let ran = linux.finish();
    assert_eq!(ran.code, Some(6), "{ran:?}");
}

#[test]
fn a_kernel_without_the_patch_gets_as_far_as_its_init() {
    let mut linux = boot("HV_GUEST_VMLINUX_UNPATCHED", "", &["--cpus", "2"]);
    linux.wait_for("Run /init as init process");
    linux.terminate();
    linux.finish();
}
