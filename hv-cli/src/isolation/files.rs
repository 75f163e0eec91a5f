//! Landlock: which files a thread can reach.

use std::path::PathBuf;

use landlock::{
    ABI, Access, AccessFs, AccessNet, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetError,
};

use super::IsolationError;

/// The newest set of rights that is taken away; of an older kernel, those it knows.
const RIGHTS: ABI = ABI::V6;

/// The directories in which a thread keeps rights. Descriptors that are open stay of use anyway.
#[derive(Debug, Default)]
pub(super) struct Files {
    /// Where files may be read.
    pub(super) readable: Vec<PathBuf>,
    /// Where files may be removed.
    pub(super) removable: Vec<PathBuf>,
}

impl Files {
    /// Takes all other files, and TCP ports, from the calling thread. On a kernel without Landlock nothing
    /// happens.
    pub(super) fn restrict(&self) -> Result<(), IsolationError> {
        self.restricted().map_err(|error| {
            IsolationError::Landlock(match error {
                RulesetError::HandleAccesses(_) => "the rights are not accepted",
                RulesetError::CreateRuleset(_) => "landlock_create_ruleset failed",
                RulesetError::AddRules(_) => "landlock_add_rule failed",
                RulesetError::RestrictSelf(_) => "landlock_restrict_self failed",
                _ => "it failed",
            })
        })
    }

    fn restricted(&self) -> Result<(), RulesetError> {
        let mut ruleset = Ruleset::default()
            .handle_access(AccessFs::from_all(RIGHTS))?
            .handle_access(AccessNet::from_all(RIGHTS))?
            .create()?;
        let readable = self.readable.iter().map(|path| (path, AccessFs::ReadFile));
        let removable = self.removable.iter().map(|path| (path, AccessFs::RemoveFile));
        for (directory, right) in readable.chain(removable) {
            // One that is gone has nothing to read or remove.
            if let Ok(directory) = PathFd::new(directory) {
                ruleset = ruleset.add_rule(PathBeneath::new(directory, right))?;
            }
        }
        ruleset.restrict_self().map(drop)
    }
}
