//! Routers that go on in another VM.

use std::collections::BTreeMap;

use hv_core::{EventFd, Gsi};
use hv_irq::{
    GsiRoute, Ioapic, IrqRouter, LevelPin, MsiVectors, PinIrqfd, RestoreError, RouterError,
};

use super::{Bound, Ran, World, machine};
use crate::kvm::TestVm;
use crate::plan::Fault;

impl World {
    /// Everything goes on in another VM.
    pub(super) fn rebuild(&mut self, fault: Option<Fault>) -> Ran {
        let (vm, view) = machine(&self.kvm, &self.model.setup);
        self.fail(fault);
        let done = self.router.rebuild(vm);
        if done.is_ok() {
            self.view = view;
        }
        let after = self.model.clone();
        self.judge(done, after, Ok([].into()))
    }

    /// Everything is made again on another VM, with new eventfds.
    pub(super) fn restore(&mut self, fault: Option<Fault>) -> Ran {
        let state = self.router.save();
        let groups: BTreeMap<u32, _> =
            self.groups.iter().map(|(id, group)| (*id, group.save().unwrap())).collect();
        let chip = self.ioapic.as_ref().map(Ioapic::save);
        let (vm, view) = machine(&self.kvm, &self.model.setup);
        let tables = self.tables();
        self.fail(fault);
        let mut next = Parts::default();
        let done = (|| {
            let mut restored = IrqRouter::restore(vm, self.config, &state)?;
            next.router = Some(restored.router().clone());
            for (id, saved) in &groups {
                let events: Vec<EventFd> = saved.vectors.iter().map(|_| self.event()).collect();
                next.groups.insert(*id, restored.vectors(saved, events)?);
            }
            for (id, (route, _)) in &self.routes {
                next.routes.insert(*id, (restored.route(route.gsi())?, self.event()));
            }
            restored.router().batch(|batch| {
                for (id, (route, event)) in &next.routes {
                    if self.model.routes[id].bound {
                        batch.bind(route, event.clone())?;
                    }
                }
                Ok(())
            })?;
            for (id, &gsi) in &self.model.pins {
                let event = self.event();
                let pin = restored.router().bind_pin(Gsi(gsi), event.clone())?;
                next.pins.insert(*id, (pin, event));
            }
            if let Some(chip) = &chip {
                next.ioapic = Some(Ioapic::restore(restored.router().clone(), chip)?);
            }
            for (id, level) in &self.model.levels {
                let (trigger, resample) = (self.event(), self.event());
                let level = match &next.ioapic {
                    Some(ioapic) => ioapic.bind_level(level.gsi as u8, trigger, resample)?,
                    None => restored.router().bind_level(Gsi(level.gsi), trigger, resample)?,
                };
                next.levels.insert(*id, level);
            }
            restored.finish()
        })();
        // Without those that are written when the owners on the old VM go.
        let tables = self.tables() - tables;
        let mut after = self.model.clone();
        after.cached.clear();
        let done = match done {
            Ok(router) => {
                self.chosen.heal();
                let Parts { routes, groups, pins, levels, ioapic, .. } = next;
                (self.routes, self.groups) = (routes, groups);
                (self.pins, self.levels) = (pins, levels);
                (self.ioapic, self.router, self.view) = (ioapic, router, view);
                for (id, (_, event)) in &self.routes {
                    if self.model.routes[id].pending {
                        event.signal();
                    }
                }
                for (id, level) in &self.levels {
                    if self.model.levels[id].pending {
                        level.raise();
                    }
                }
                Ok(())
            }
            Err(RestoreError::Router(error)) => {
                drop(next);
                if view.irqfds().is_empty() { Err(error) } else { Err(RouterError::RouterGone) }
            }
            Err(error) => {
                drop(next);
                let mut ran = self.quiet([].into());
                ran.surprise = Some(error.to_string());
                return ran;
            }
        };
        Ran { tables, ..self.judge(done, after, Ok([].into())) }
    }
}

/// What is restored.
#[derive(Default)]
struct Parts {
    ioapic: Option<Ioapic<TestVm>>,
    routes: BTreeMap<u32, Bound<GsiRoute<TestVm>>>,
    groups: BTreeMap<u32, MsiVectors<TestVm>>,
    pins: BTreeMap<u32, Bound<PinIrqfd<TestVm>>>,
    levels: BTreeMap<u32, LevelPin<TestVm>>,
    /// Outlives those who bound something, so that they unbind it.
    router: Option<IrqRouter<TestVm>>,
}
