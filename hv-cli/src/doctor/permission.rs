//! Why a device node that is there may not be opened, and whom to ask.

use super::facts::{HostFacts, Node};
use super::finding::Finding;
use super::shown;

/// Read and write, as the group bits of a mode.
const GROUP_READ_WRITE: u32 = 0o060;

/// The finding for a node that gave `EACCES` or `EPERM`, here as `why`.
pub(super) fn denied(facts: &HostFacts, why: &str) -> Finding {
    let path = shown(&facts.device);
    let fail = |summary: String, remedy: String| Finding::fail("device", summary, remedy);
    let node = match &facts.node {
        Some(Ok(node)) => node,
        Some(Err(errno)) => {
            return fail(
                format!("{path} can't be opened: {why}; it can't even be looked at: {errno}"),
                "let this user search the directories of that path".into(),
            );
        }
        None => {
            return fail(
                format!("{path} can't be used: {why}"),
                "open the descriptor for reading and writing".into(),
            );
        }
    };
    let owner = node.owner.as_deref().map_or_else(|| format!("user {}", node.uid), str::to_owned);
    let group = node.group.as_deref().map_or_else(|| format!("group {}", node.gid), str::to_owned);
    let user =
        facts.user.name.as_deref().map_or_else(|| format!("uid {}", facts.user.uid), str::to_owned);
    let summary = |because: &str| {
        format!(
            "{path} can't be opened: {why} (owner {owner}, group {group}, mode {:04o}; you are {user}{because})",
            node.mode
        )
    };

    if facts.user.uid == 0 || mode_allows(facts, node) {
        return fail(
            summary(", whom the mode would let in"),
            "it is not the mode: in a container allow the device (docker run --device \
             /dev/kvm; in a systemd service DeviceAllow=/dev/kvm rw), else look for a denial of \
             SELinux or AppArmor in the kernel log, or a nodev mount"
                .into(),
        );
    }
    if facts.user.uid == node.uid {
        return fail(summary(", the owner, who has no right to it"), format!("chmod u+rw {path}"));
    }
    let group_may = node.mode & GROUP_READ_WRITE == GROUP_READ_WRITE && node.gid != 0;
    let in_group = facts.user.groups.contains(&node.gid);
    match (group_may, &node.group, &facts.user.name) {
        (true, Some(group), Some(_)) if node.user_is_listed && !in_group => fail(
            summary(&format!(", listed in group {group} but not yet a member in this session")),
            format!(
                "log out and in again for the membership to take effect, or in this shell: newgrp {group}"
            ),
        ),
        (true, Some(group), Some(user)) if !in_group => fail(
            summary(&format!(", not in group {group}")),
            format!("sudo usermod -aG {group} {user}, then log out and in again"),
        ),
        (true, _, _) if !in_group => fail(
            summary(&format!(", not in group {}", node.gid)),
            format!(
                "run with group {0}: in a container, docker run --group-add {0}; else have an administrator add this user to it",
                node.gid
            ),
        ),
        _ => fail(
            summary(", and no group may use it that you can join"),
            give_to_group(facts, &path),
        ),
    }
}

/// Whether the permission bits let this process read and write.
fn mode_allows(facts: &HostFacts, node: &Node) -> bool {
    let shift = if facts.user.uid == node.uid {
        6
    } else if facts.user.groups.contains(&node.gid) {
        3
    } else {
        0
    };
    node.mode >> shift & 0o6 == 0o6
}

/// For a node that no group may use, or only group root.
fn give_to_group(facts: &HostFacts, path: &str) -> String {
    let join = match &facts.user.name {
        Some(user) => {
            format!(" && sudo usermod -aG kvm {user}, then log out and in again")
        }
        None => ", then run with that group".into(),
    };
    format!(
        "sudo groupadd -f -r kvm && sudo chgrp kvm {path} && sudo chmod 660 {path}{join}; to keep it \
         after a restart, put KERNEL==\"kvm\", GROUP=\"kvm\", MODE=\"0660\" into \
         /etc/udev/rules.d/65-kvm.rules"
    )
}
