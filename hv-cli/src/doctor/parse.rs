//! Readers of the system's small text files.
//!
//! Their content is not ours: in a container or a chroot anyone may have written it. Nothing in it
//! may cause a panic, and no text of it reaches a terminal or a command line but a plain name.

/// Who made the CPU, as far as it matters here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Vendor {
    Intel,
    Amd,
    Other,
}

/// What `/proc/cpuinfo` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Cpu {
    /// `None` if there is no `vendor_id`: not an x86 CPU.
    pub vendor: Option<Vendor>,
    /// Intel's virtualization extension.
    pub vmx: bool,
    /// AMD's virtualization extension.
    pub svm: bool,
    /// This machine is itself a virtual one.
    pub hypervisor: bool,
}

impl Cpu {
    /// The flag of its virtualization extension, if it has one.
    pub(super) fn extension(&self) -> Option<&'static str> {
        match (self.vmx, self.svm) {
            (true, _) => Some("vmx"),
            (_, true) => Some("svm"),
            _ => None,
        }
    }
}

/// The first CPU of `/proc/cpuinfo`.
pub(super) fn cpuinfo(text: &str) -> Cpu {
    let field = |name: &str| {
        text.lines().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            (key.trim() == name).then_some(value.trim())
        })
    };
    let has = |flag: &str| {
        field("flags").is_some_and(|flags| flags.split_ascii_whitespace().any(|f| f == flag))
    };
    let vendor = field("vendor_id").map(|id| match id {
        "GenuineIntel" | "CentaurHauls" | "Shanghai" => Vendor::Intel,
        "AuthenticAMD" | "HygonGenuine" => Vendor::Amd,
        _ => Vendor::Other,
    });
    Cpu { vendor, vmx: has("vmx"), svm: has("svm"), hypervisor: has("hypervisor") }
}

/// Bytes of a field of `/proc/meminfo`, such as `"MemAvailable"`.
pub(super) fn meminfo(text: &str, field: &str) -> Option<u64> {
    let value = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
    let kib: u64 = value.trim().strip_suffix("kB")?.trim_end().parse().ok()?;
    kib.checked_mul(1024)
}

/// A user by its number in `/etc/passwd`: its name and its own group.
pub(super) fn user(passwd: &str, uid: u32) -> Option<(String, u32)> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = plain_name(fields.next()?)?;
        let (_password, id, group) = (fields.next()?, fields.next()?, fields.next()?);
        (id.parse() == Ok(uid)).then_some((name, group.parse().ok()?))
    })
}

/// A group by its number in `/etc/group`: its name, and whether it lists `member`.
pub(super) fn group(text: &str, gid: u32, member: Option<&str>) -> Option<(String, bool)> {
    text.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = plain_name(fields.next()?)?;
        let (_password, id, members) = (fields.next()?, fields.next()?, fields.next()?);
        let listed = member.is_some_and(|member| members.split(',').any(|m| m.trim() == member));
        (id.parse() == Ok(gid)).then_some((name, listed))
    })
}

/// A user or group name that can be printed and typed into a shell as it is.
fn plain_name(name: &str) -> Option<String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
    let fits = (1..=64).contains(&name.len()) && !name.starts_with('-') && name.chars().all(plain);
    fits.then(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn vendor_and_flags_of_the_first_cpu() {
        let intel = "processor\t: 0\nvendor_id\t: GenuineIntel\nflags\t\t: fpu vmx sse\n\n\
                     processor\t: 1\nvendor_id\t: AuthenticAMD\nflags\t\t: svm hypervisor\n";
        let cpu = cpuinfo(intel);
        assert_eq!(cpu.vendor, Some(Vendor::Intel));
        assert_eq!((cpu.extension(), cpu.hypervisor), (Some("vmx"), false));

        let amd = cpuinfo("vendor_id : AuthenticAMD\nflags : fpu svm hypervisor\nvmx flags : x\n");
        assert_eq!(amd.vendor, Some(Vendor::Amd));
        assert_eq!((amd.extension(), amd.hypervisor), (Some("svm"), true));
    }

    #[test]
    fn a_flag_is_a_whole_word() {
        assert_eq!(cpuinfo("vendor_id: X\nflags: xvmx svmx svm_lock\n").extension(), None);
    }

    #[test]
    fn not_an_x86_cpu() {
        let arm = cpuinfo("processor\t: 0\nCPU implementer\t: 0x41\nFeatures\t: fp asimd\n");
        assert_eq!((arm.vendor, arm.extension()), (None, None));
        assert_eq!(cpuinfo("").vendor, None);
    }

    #[test]
    fn memory_in_bytes() {
        let text = "MemTotal:  100 kB\nMemAvailable:    24 kB\nMemFree: x kB\nHuge:\n";
        assert_eq!(meminfo(text, "MemAvailable"), Some(24 * 1024));
        assert_eq!(meminfo(text, "Mem"), None);
        assert_eq!(meminfo(text, "MemFree"), None);
        assert_eq!(meminfo("A: 18446744073709551615 kB", "A"), None, "overflow");
    }

    #[test]
    fn users_and_groups_by_number() {
        let passwd = "root:x:0:0:root:/root:/bin/bash\nalice:x:1000:1001::/home/alice:/bin/sh\n";
        assert_eq!(user(passwd, 1000), Some(("alice".into(), 1001)));
        assert_eq!(user(passwd, 1001), None);
        let groups = "root:x:0:\nkvm:x:106:bob,alice\n";
        assert_eq!(group(groups, 106, Some("alice")), Some(("kvm".into(), true)));
        assert_eq!(group(groups, 106, Some("ali")), Some(("kvm".into(), false)));
        assert_eq!(group(groups, 106, None), Some(("kvm".into(), false)));
        assert_eq!(group(groups, 7, Some("alice")), None);
    }

    #[test]
    fn a_name_with_anything_odd_in_it_is_no_name() {
        for name in ["\x1b[2J", "a b", "a;reboot", "-rf", "$(id)", "", "ä"] {
            assert_eq!(user(&format!("{name}:x:5:5::/:"), 5), None, "{name:?}");
            assert_eq!(group(&format!("{name}:x:5:"), 5, None), None, "{name:?}");
        }
        assert_eq!(group(&format!("{}:x:5:", "k".repeat(65)), 5, None), None);
    }

    proptest! {
        #[test]
        fn no_text_makes_a_reader_panic(text in "(?s).{0,300}", lines in "[:, \n0-9a-z]{0,300}") {
            for text in [text, lines] {
                let _ = (cpuinfo(&text), meminfo(&text, "a"));
                let _ = (user(&text, 0), group(&text, 0, Some("a")));
            }
        }
    }
}
