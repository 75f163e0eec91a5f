//! What there is to know about the host, gathered without judging it.
//!
//! Every fact may be unknown: a container may lack any of these files. Nothing here fails, and
//! what the facts mean is said in [`super::diagnose`].

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use hv_core::{DeviceChoice, Errno};
use rustix::process::{Resource, getegid, geteuid, getgroups, getrlimit};

use super::parse::{self, Cpu};
use super::trial::TrialError;

/// The host as far as VMs are concerned.
#[derive(Debug, Clone)]
pub(super) struct HostFacts {
    /// The device that was asked for.
    pub device: DeviceChoice,
    /// What came of opening it and running a VM: the evidence; everything else explains it.
    pub trial: Result<(), TrialError>,
    /// The device node; `None` for an inherited descriptor.
    pub node: Option<Result<Node, Errno>>,
    /// The CPU, if `/proc/cpuinfo` can be read.
    pub cpu: Option<Cpu>,
    /// The kernel's KVM modules.
    pub modules: Modules,
    /// Who runs this.
    pub user: User,
    /// There are signs of a container.
    pub container: bool,
    /// Bytes of memory that can be had without swapping.
    pub memory_available: Option<u64>,
    /// Bytes of address space this process may have; `None` if unlimited.
    pub address_space: Option<u64>,
    /// Descriptors this process may have; `None` if unlimited.
    pub open_files: Option<u64>,
    /// Opening `/dev/net/tun` for reading and writing.
    pub tun: Result<(), Errno>,
}

/// What is at the path of the device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Node {
    pub is_char_device: bool,
    /// The permission bits.
    pub mode: u32,
    pub uid: u32,
    pub owner: Option<String>,
    pub gid: u32,
    pub group: Option<String>,
    /// The user database has the user in that group, whatever this process has.
    pub user_is_listed: bool,
}

/// Which modules the kernel has, loaded or built in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Modules {
    /// Whether that can be seen at all.
    pub visible: bool,
    pub kvm: bool,
    pub kvm_intel: bool,
    pub kvm_amd: bool,
    /// Virtualization in software, for hosts without the extensions.
    pub kvm_pvm: bool,
    /// The parameter `nested` of the vendor's module.
    pub nested: Option<bool>,
}

impl Modules {
    /// The module that drives the CPU.
    pub(super) fn driver(&self) -> Option<&'static str> {
        match self {
            Self { kvm_intel: true, .. } => Some("kvm_intel"),
            Self { kvm_amd: true, .. } => Some("kvm_amd"),
            Self { kvm_pvm: true, .. } => Some("kvm_pvm"),
            _ => None,
        }
    }
}

/// The effective user of this process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct User {
    pub uid: u32,
    pub name: Option<String>,
    pub groups: Vec<u32>,
}

/// The host whose files are below `root`; the trial is made by the caller.
pub(super) fn gather(
    root: &Path,
    device: &DeviceChoice,
    trial: Result<(), TrialError>,
) -> HostFacts {
    let read = |path: &str| read_text(&root.join(path));
    let (passwd, groups) = (read("etc/passwd"), read("etc/group"));
    let uid = geteuid().as_raw();
    let known = passwd.as_deref().and_then(|text| parse::user(text, uid));
    let mut user = User { uid, name: None, groups: vec![getegid().as_raw()] };
    user.groups.extend(getgroups().unwrap_or_default().iter().map(|gid| gid.as_raw()));
    user.name = known.as_ref().map(|(name, _)| name.clone());

    let node = match device {
        DeviceChoice::Fd(_) => None,
        DeviceChoice::Path(path) => Some(match std::fs::metadata(path) {
            Err(error) => Err(Errno::from(&error)),
            Ok(meta) => {
                let group = groups
                    .as_deref()
                    .and_then(|text| parse::group(text, meta.gid(), user.name.as_deref()));
                let is_own_group = known.is_some_and(|(_, gid)| gid == meta.gid());
                Ok(Node {
                    is_char_device: meta.file_type().is_char_device(),
                    mode: meta.mode() & 0o7777,
                    uid: meta.uid(),
                    owner: passwd
                        .as_deref()
                        .and_then(|text| parse::user(text, meta.uid()))
                        .map(|(name, _)| name),
                    gid: meta.gid(),
                    user_is_listed: is_own_group || group.as_ref().is_some_and(|(_, is)| *is),
                    group: group.map(|(name, _)| name),
                })
            }
        }),
    };
    let tun = File::options().read(true).write(true).open(root.join("dev/net/tun"));
    HostFacts {
        device: device.clone(),
        trial,
        node,
        cpu: read("proc/cpuinfo").map(|text| parse::cpuinfo(&text)),
        modules: modules(&root.join("sys/module")),
        user,
        container: [".dockerenv", "run/.containerenv", "run/systemd/container"]
            .iter()
            .any(|file| root.join(file).exists())
            || std::env::var_os("container").is_some()
            || std::env::var_os("KUBERNETES_SERVICE_HOST").is_some(),
        memory_available: read("proc/meminfo").and_then(|t| parse::meminfo(&t, "MemAvailable")),
        address_space: getrlimit(Resource::As).current,
        open_files: getrlimit(Resource::Nofile).current,
        tun: tun.map(drop).map_err(|error| Errno::from(&error)),
    }
}

fn modules(directory: &Path) -> Modules {
    let has = |name: &str| directory.join(name).is_dir();
    let nested = |name: &str| {
        let text = read_text(&directory.join(name).join("parameters/nested"))?;
        Some(matches!(text.trim(), "Y" | "1"))
    };
    Modules {
        visible: directory.is_dir(),
        kvm: has("kvm"),
        kvm_intel: has("kvm_intel"),
        kvm_amd: has("kvm_amd"),
        kvm_pvm: has("kvm_pvm"),
        nested: nested("kvm_intel").or_else(|| nested("kvm_amd")),
    }
}

/// The text of a small file; of a large one, its beginning.
fn read_text(path: &Path) -> Option<String> {
    const MOST: u64 = 4 << 20;
    let mut bytes = Vec::new();
    File::open(path).ok()?.take(MOST).read_to_end(&mut bytes).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::super::parse::Vendor;
    use super::*;
    use std::fs;

    fn write(root: &Path, file: &str, text: &str) {
        let path = root.join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn facts(root: &Path, device: &str) -> HostFacts {
        gather(root, &device.parse().unwrap(), Ok(()))
    }

    #[test]
    fn a_host_without_any_of_the_files_is_unknown_not_an_error() {
        let root = tempfile::tempdir().unwrap();
        let facts = facts(root.path(), root.path().join("kvm").to_str().unwrap());
        assert_eq!(facts.node, Some(Err(Errno::ENOENT)));
        assert_eq!((facts.cpu, facts.memory_available), (None, None));
        assert_eq!(facts.modules, Modules::default());
        assert_eq!(facts.user.name, None);
        assert_eq!(facts.tun, Err(Errno::ENOENT));
    }

    #[test]
    fn modules_and_the_nested_parameter() {
        let root = tempfile::tempdir().unwrap();
        write(root.path(), "sys/module/kvm_amd/parameters/nested", "1\n");
        write(root.path(), "sys/module/kvm/version", "");
        let modules = facts(root.path(), "fd:0").modules;
        assert_eq!((modules.driver(), modules.nested), (Some("kvm_amd"), Some(true)));
        assert!(modules.visible && modules.kvm && !modules.kvm_intel);
        write(root.path(), "sys/module/kvm_amd/parameters/nested", "N\n");
        assert_eq!(facts(root.path(), "fd:0").modules.nested, Some(false));
    }

    #[test]
    fn the_node_with_the_names_of_its_owners() {
        let root = tempfile::tempdir().unwrap();
        let (uid, gid) = (geteuid().as_raw(), getegid().as_raw());
        write(root.path(), "etc/passwd", &format!("me:x:{uid}:{}::/:\n", gid.wrapping_add(1)));
        write(root.path(), "etc/group", &format!("ours:x:{gid}:me\n"));
        write(root.path(), "node", "");
        let facts = facts(root.path(), root.path().join("node").to_str().unwrap());
        let node = facts.node.unwrap().unwrap();
        assert!(!node.is_char_device && node.user_is_listed);
        assert_eq!((node.uid, node.owner.as_deref()), (uid, Some("me")));
        assert_eq!((node.gid, node.group.as_deref()), (gid, Some("ours")));
        assert_eq!(facts.user.name.as_deref(), Some("me"));
    }

    #[test]
    fn a_descriptor_has_no_node() {
        assert_eq!(facts(Path::new("/"), "fd:0").node, None);
    }

    #[test]
    fn cpu_and_memory_from_proc() {
        let root = tempfile::tempdir().unwrap();
        write(root.path(), "proc/cpuinfo", "vendor_id : GenuineIntel\nflags : vmx\n\u{fffd}\n");
        write(root.path(), "proc/meminfo", "MemAvailable: 8 kB\n");
        write(root.path(), ".dockerenv", "");
        let facts = facts(root.path(), "fd:0");
        let cpu = facts.cpu.unwrap();
        assert_eq!((cpu.vendor, cpu.extension()), (Some(Vendor::Intel), Some("vmx")));
        assert_eq!(facts.memory_available, Some(8192));
        assert!(facts.container);
    }
}
