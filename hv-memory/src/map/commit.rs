//! Plans: what an edit of a VM's map has KVM told, and who may let it.

use std::fmt;

use hv_core::MemoryBackend;

use super::edit::Changes;
use super::{CommitError, LiveMap, SlotOperation};
use crate::{GuestRange, VcpusPaused};

/// What an edit takes; see [`LiveMap::edit`]. Dropped without a commit, the edit has not happened.
///
/// It borrows the map until it is committed or dropped: `match map.edit(…)? { … }` ends that with the
/// statement.
#[must_use = "nothing changes before it is committed"]
pub enum Plan<'a, M: MemoryBackend, R> {
    /// No vCPU can notice it in between.
    Running(RunningPlan<'a, M, R>),
    /// Memory that stays is away for a moment.
    Paused(PausedPlan<'a, M, R>),
}

/// A plan that vCPUs may run during: memory only comes, goes, or begins to log.
#[must_use = "nothing changes before it is committed"]
pub struct RunningPlan<'a, M: MemoryBackend, R> {
    staged: Staged<'a, M>,
    made: R,
}

/// A plan during which no vCPU may run.
#[must_use = "nothing changes before it is committed"]
pub struct PausedPlan<'a, M: MemoryBackend, R> {
    staged: Staged<'a, M>,
    made: R,
    holes: Vec<GuestRange>,
}

impl<M: MemoryBackend, R> Plan<'_, M, R> {
    /// What KVM will be told, in order.
    #[must_use]
    pub fn operations(&self) -> &[SlotOperation] {
        match self {
            Self::Running(plan) => plan.operations(),
            Self::Paused(plan) => plan.operations(),
        }
    }

    /// Memory that stays but is away for a moment.
    #[must_use]
    pub fn holes(&self) -> &[GuestRange] {
        match self {
            Self::Running(_) => &[],
            Self::Paused(plan) => plan.holes(),
        }
    }

    /// Tells KVM; `pause` stops the vCPUs, which is asked for only if it takes that. It is given the
    /// memory that is away for a moment.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn commit<P: VcpusPaused>(
        self,
        pause: impl FnOnce(&[GuestRange]) -> P,
    ) -> Result<R, CommitError> {
        match self {
            Self::Running(plan) => plan.commit(),
            Self::Paused(plan) => {
                let paused = pause(plan.holes());
                plan.commit(&paused)
            }
        }
    }
}

impl<'a, M: MemoryBackend, R> RunningPlan<'a, M, R> {
    pub(super) fn new(staged: Staged<'a, M>, made: R) -> Self {
        Self { staged, made }
    }

    /// What KVM will be told, in order.
    #[must_use]
    pub fn operations(&self) -> &[SlotOperation] {
        &self.staged.operations
    }

    /// Tells KVM, and returns what the edit did.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn commit(self) -> Result<R, CommitError> {
        self.staged.commit()?;
        Ok(self.made)
    }
}

impl<'a, M: MemoryBackend, R> PausedPlan<'a, M, R> {
    pub(super) fn new(staged: Staged<'a, M>, made: R, holes: Vec<GuestRange>) -> Self {
        Self { staged, made, holes }
    }

    /// What KVM will be told, in order.
    #[must_use]
    pub fn operations(&self) -> &[SlotOperation] {
        &self.staged.operations
    }

    /// Memory that stays but is away for a moment.
    #[must_use]
    pub fn holes(&self) -> &[GuestRange] {
        &self.holes
    }

    /// Tells KVM, and returns what the edit did.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn commit(self, _paused: &impl VcpusPaused) -> Result<R, CommitError> {
        self.staged.commit()?;
        Ok(self.made)
    }
}

/// An edit that the map has and KVM has not. Dropped, the map has it no more either.
pub(super) struct Staged<'a, M: MemoryBackend> {
    map: &'a mut LiveMap<M>,
    operations: Vec<SlotOperation>,
    /// None once they are there to stay.
    changes: Option<Changes>,
}

impl<'a, M: MemoryBackend> Staged<'a, M> {
    pub(super) fn new(
        map: &'a mut LiveMap<M>,
        changes: Changes,
        operations: Vec<SlotOperation>,
    ) -> Self {
        Self { map, operations, changes: Some(changes) }
    }

    fn commit(mut self) -> Result<(), CommitError> {
        self.map.execute(&self.operations)?;
        self.changes = None;
        Ok(())
    }
}

impl<M: MemoryBackend> Drop for Staged<'_, M> {
    fn drop(&mut self) {
        if let Some(changes) = self.changes.take() {
            self.map.map_mut().undo(changes);
        }
    }
}

impl<M: MemoryBackend, R> fmt::Debug for Plan<'_, M, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Plan")
            .field("operations", &self.operations())
            .field("holes", &self.holes())
            .finish()
    }
}

impl<M: MemoryBackend, R> fmt::Debug for RunningPlan<'_, M, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RunningPlan").field("operations", &self.operations()).finish()
    }
}

impl<M: MemoryBackend, R> fmt::Debug for PausedPlan<'_, M, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PausedPlan")
            .field("operations", &self.operations())
            .field("holes", &self.holes())
            .finish()
    }
}
