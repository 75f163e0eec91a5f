//! Asks for capabilities: each at most once, on the descriptor that answers for it.

use std::collections::BTreeMap;

use super::{InitErrorKind, Request};
use crate::{Capability, Context, Error, Hypervisor, Scope, Vm};

/// The capabilities of a hypervisor and, once there is one, its VM.
pub(super) struct Capabilities<'a, H: Hypervisor> {
    system: &'a H,
    vm: Option<&'a H::Vm>,
    values: BTreeMap<Capability, i32>,
}

impl<'a, H: Hypervisor> Capabilities<'a, H> {
    pub(super) fn new(system: &'a H) -> Self {
        Self { system, vm: None, values: BTreeMap::new() }
    }

    /// From now on asks the VM for what it may answer differently, if it takes the question.
    pub(super) fn created(&mut self, vm: &'a H::Vm) -> Result<(), Error> {
        self.vm = self.has(Capability::CheckExtensionVm)?.then_some(vm);
        Ok(())
    }

    /// The value of a capability.
    pub(super) fn value(&mut self, cap: Capability) -> Result<i32, Error> {
        if let Some(&value) = self.values.get(&cap) {
            return Ok(value);
        }
        let value = match (cap.scope(), self.vm) {
            (Scope::Vm, Some(vm)) => vm.check_extension(cap),
            (Scope::Vm, None) | (Scope::System, _) => self.system.check_extension(cap),
        }
        .map_err(|e| e.about(Context::Capability(cap)))?;
        self.values.insert(cap, value);
        Ok(value)
    }

    /// The value as a count or index, if the capability is there.
    pub(super) fn count(&mut self, cap: Capability) -> Result<Option<u32>, Error> {
        Ok(u32::try_from(self.value(cap)?).ok().filter(|&n| n > 0))
    }

    /// Whether the capability is there.
    pub(super) fn has(&mut self, cap: Capability) -> Result<bool, Error> {
        Ok(self.value(cap)? > 0)
    }

    /// Refuses a request this KVM can't meet.
    pub(super) fn require(
        &mut self,
        request: Request,
        capability: Capability,
    ) -> Result<(), InitErrorKind> {
        if self.has(capability)? {
            Ok(())
        } else {
            Err(InitErrorKind::Unsupported { request, capability })
        }
    }

    /// Every value asked for so far.
    pub(super) fn into_values(self) -> BTreeMap<Capability, i32> {
        self.values
    }
}
