//! What owners, devices and the guest do, to the router and to the model.

use std::collections::BTreeSet;

use hv_core::{EventFd, Gsi, Ioctl, MsiStatus};
use hv_irq::{LegacyPins, MsiVectors, RouterError};

use super::{Ran, World};
use crate::kvm::TestVm;
use crate::model::{
    Interrupt, Interrupts, LEVEL_LINES, Level, Model, OwnedRoute, Refusal, interrupt,
    line_interrupt, message, nth, own_vector, user_vector,
};
use crate::plan::{Op, Step, Sub, To, USER_PINS, WrittenEntry};

impl World {
    pub(super) fn carry_out(&mut self, op: &Op) -> Ran {
        match *op {
            Op::Batch(ref steps) => self.batch(steps),
            Op::SignalRoute(i) => {
                let Some(id) = nth(&self.routes, i) else { return self.quiet([].into()) };
                self.routes[&id].1.signal();
                let route = self.model.routes.get_mut(&id).unwrap();
                route.pending |= !route.bound;
                let expected = route.bound.then(|| interrupt(route.message));
                self.quiet(expected.into_iter().collect())
            }
            Op::DropRoute(i) => {
                if let Some(id) = nth(&self.routes, i) {
                    drop(self.routes.remove(&id));
                    self.model.routes.remove(&id);
                }
                self.quiet([].into())
            }
            Op::Plug(n) => {
                let id = self.model.plug(n);
                let events: Vec<EventFd> = (0..n).map(|_| self.event()).collect();
                let mut vectors = MsiVectors::new(&self.router, events);
                let model = &self.model.groups[&id];
                let done = vectors.change(|change| {
                    let mut messages =
                        model.vectors.iter().map(|vector| vector.message).enumerate();
                    messages.try_for_each(|(i, message)| change.retarget(i, message))
                });
                self.groups.insert(id, vectors);
                let after = self.model.clone();
                self.judge(done, after, Ok([].into()))
            }
            Op::Change(i, ref subs) => {
                let Some(id) = nth(&self.groups, i) else { return self.quiet([].into()) };
                let mut after = self.model.clone();
                let predicted = after.change(id, subs);
                let done = change(self.groups.get_mut(&id).unwrap(), subs);
                self.judge(done, after, predicted)
            }
            Op::SignalVector(i, vector) => {
                let Some(id) = nth(&self.groups, i) else { return self.quiet([].into()) };
                let group = &self.model.groups[&id];
                let index = vector % group.vectors.len();
                let live = self.model.is_live(group, &group.vectors[index]);
                self.groups[&id].event(index).unwrap().signal();
                let vector = &mut self.model.groups.get_mut(&id).unwrap().vectors[index];
                vector.pending |= !live;
                let expected = live.then(|| interrupt(vector.message));
                self.quiet(expected.into_iter().collect())
            }
            Op::Unplug(i) => {
                if let Some(id) = nth(&self.groups, i) {
                    drop(self.groups.remove(&id));
                    self.model.groups.remove(&id);
                }
                self.quiet([].into())
            }
            Op::Message { vcpu, which } => {
                let message = message(To { vcpu, garbage: false }, 0xf0 + which);
                let mut after = self.model.clone();
                let predicted = after.send(message);
                let sent = self.router.signal_msi(message);
                let odd = sent.as_ref().is_ok_and(|status| *status != MsiStatus::Delivered);
                // A message may have got its route and then have failed.
                let made = after.cached.clone();
                let mut ran = self.judge(sent.map(drop), after, predicted);
                if ran.injected > 0 {
                    self.model.cached.extend(made);
                }
                if odd {
                    ran.surprise = Some("the message was not delivered".into());
                }
                ran
            }
            Op::BindPin(gsi) if LEVEL_LINES.contains(&gsi) => self.quiet([].into()),
            Op::BindPin(gsi) => {
                let event = self.event();
                let (id, bound) = (self.model.id(), self.router.bind_pin(Gsi(gsi), event.clone()));
                let mut after = self.model.clone();
                let kernel = self.model.setup.pins == LegacyPins::Kernel;
                let predicted = match kernel && gsi != 2 && gsi < 24 {
                    true => Ok([].into()),
                    false => Err(Refusal::NoKernelLine),
                };
                after.pins.insert(id, gsi);
                let done = bound.map(|pin| drop(self.pins.insert(id, (pin, event))));
                self.judge(done, after, predicted)
            }
            Op::SignalPin(i) => {
                let Some(id) = nth(&self.pins, i) else { return self.quiet([].into()) };
                self.pins[&id].1.signal();
                self.quiet([line_interrupt(self.model.pins[&id])].into())
            }
            Op::DropPin(i) => {
                if let Some(id) = nth(&self.pins, i) {
                    drop(self.pins.remove(&id));
                    self.model.pins.remove(&id);
                }
                self.quiet([].into())
            }
            Op::BindLevel(pin) => self.bind_level(pin),
            Op::Raise(i) => {
                let Some(id) = nth(&self.levels, i) else { return self.quiet([].into()) };
                self.levels[&id].raise();
                let expected = self.model.raise(id);
                self.tell_of(&expected);
                self.quiet(expected)
            }
            Op::DropLevel(i) => {
                if let Some(id) = nth(&self.levels, i) {
                    drop(self.levels.remove(&id));
                    self.model.levels.remove(&id);
                }
                self.quiet([].into())
            }
            Op::WriteEntry { pin, entry, upper } => self.write_entry(pin, entry, upper),
            Op::Line(pin, asserted) => {
                let Some(ioapic) = self.ioapic.clone() else { return self.quiet([].into()) };
                let mut after = self.model.clone();
                let expected = after.set_line(pin, asserted);
                let done = ioapic.set_line(pin, asserted);
                self.judge_ioapic(done, after, expected)
            }
            Op::End => {
                let (Some(ioapic), Some(&vector)) = (self.ioapic.clone(), self.exits.front())
                else {
                    return self.quiet([].into());
                };
                self.exits.pop_front();
                let mut after = self.model.clone();
                let expected = after.end(vector);
                let done = ioapic.eoi(vector);
                self.judge_ioapic(done, after, expected)
            }
            Op::Restore | Op::Rebuild => unreachable!("they choose faults by themselves"),
        }
    }

    fn batch(&mut self, steps: &[Step]) -> Ran {
        let mut after = self.model.clone();
        let mut removed = Vec::new();
        let predicted = after.batch(steps, &mut removed);
        // As the batch has them; names are given as the model gives them.
        let mut names = self.model.clone();
        let mut held = std::mem::take(&mut self.routes);
        let old: BTreeSet<u32> = held.keys().copied().collect();
        let is_bound = |(id, route): (&u32, &OwnedRoute)| route.bound.then_some(*id);
        let mut bound: BTreeSet<u32> = self.model.routes.iter().filter_map(is_bound).collect();
        let (held_now, event) = (&mut held, || self.event());
        let done = self.router.batch(|batch| {
            for step in steps {
                match *step {
                    Step::Add { count, bound: with } => {
                        for _ in 0..count {
                            let (id, to) = (names.id(), To { vcpu: 0, garbage: false });
                            let route = batch.add_msi(message(to, own_vector(id)))?;
                            let event = event();
                            if with {
                                batch.bind(&route, event.clone())?;
                                bound.insert(id);
                            }
                            held_now.insert(id, (route, event));
                        }
                    }
                    Step::Retarget(i, to) => {
                        let Some(id) = nth(held_now, i) else { continue };
                        batch.set_msi(&held_now[&id].0, message(to, own_vector(id)))?;
                    }
                    Step::Bind(i) => {
                        let Some(id) = nth(held_now, i) else { continue };
                        let (route, event) = &held_now[&id];
                        batch.bind(route, event.clone())?;
                        bound.insert(id);
                    }
                    Step::BindTaken(i, of) => {
                        let Some(of) = nth(held_now, of).filter(|of| bound.contains(of)) else {
                            continue;
                        };
                        let Some(id) = nth(held_now, i) else { continue };
                        batch.bind(&held_now[&id].0, held_now[&of].1.clone())?;
                    }
                    Step::BindSecond(i) => {
                        let Some(id) = nth(held_now, i).filter(|id| bound.contains(id)) else {
                            continue;
                        };
                        batch.bind(&held_now[&id].0, event())?;
                    }
                    Step::Unbind(i) => {
                        let Some(id) = nth(held_now, i) else { continue };
                        batch.unbind(&held_now[&id].0)?;
                        bound.remove(&id);
                    }
                    Step::Remove(i) => {
                        let Some(id) = nth(held_now, i) else { continue };
                        if let Some((route, _)) = held_now.remove(&id) {
                            batch.remove(route)?;
                        }
                        bound.remove(&id);
                    }
                }
            }
            Ok(())
        });
        // A handle that was given to a batch is gone, whatever becomes of the batch.
        let mut given = 0;
        if done.is_err() {
            held.retain(|id, _| old.contains(id));
            given = old.len() - held.len();
            self.model.routes.retain(|id, _| held.contains_key(id));
        }
        self.routes = held;
        let mut ran = self.judge(done, after, predicted);
        ran.batches += given as u64;
        ran
    }

    fn bind_level(&mut self, pin: u8) -> Ran {
        let (trigger, resample) = (self.event(), self.event());
        let id = self.model.id();
        let mut after = self.model.clone();
        let (bound, gsi, predicted) = match &self.ioapic {
            Some(ioapic) => {
                let pin = USER_PINS[usize::from(pin) % USER_PINS.len()];
                (ioapic.bind_level(pin, trigger, resample), u32::from(pin), Ok([].into()))
            }
            None => {
                let gsi = u32::from(pin);
                let predicted = match LEVEL_LINES.contains(&gsi) {
                    true => Ok([].into()),
                    false => Err(Refusal::NoKernelLine),
                };
                (self.router.bind_level(Gsi(gsi), trigger, resample), gsi, predicted)
            }
        };
        after.levels.insert(id, Level { gsi, pending: false, ended: false });
        let done = bound.map(|level| drop(self.levels.insert(id, level)));
        self.judge(done, after, predicted)
    }

    /// Of level-triggered messages of the I/O APIC in user space, an exit tells the end.
    fn tell_of(&mut self, received: &Interrupts) {
        let level = |&(vcpu, vector): &Interrupt| {
            let mut pins = self.model.user_pins.values();
            let pin = pins.find(|pin| (pin.vcpu, pin.vector) == (vcpu, vector))?;
            pin.level.then_some(vector)
        };
        let exits: Vec<u8> = received.iter().filter_map(level).collect();
        self.exits.extend(exits);
    }

    fn write_entry(&mut self, pin: u8, entry: WrittenEntry, upper: bool) -> Ran {
        let Some(ioapic) = self.ioapic.clone() else { return self.quiet([].into()) };
        let mut after = self.model.clone();
        let expected = after.write_entry(pin, entry, upper);
        let value = if upper {
            u32::from(entry.vcpu) << 24
        } else {
            u32::from(user_vector(pin, entry.vector))
                | u32::from(entry.level) << 15
                | u32::from(entry.masked) << 16
        };
        let register = 0x10 + 2 * pin + u8::from(upper);
        ioapic.write(0, &[register]).unwrap();
        let done = ioapic.write(0x10, &value.to_le_bytes());
        self.judge_ioapic(done, after, expected)
    }

    /// A failed message leaves the registers as they are after the operation, but for the remote IRR.
    fn judge_ioapic(
        &mut self,
        done: Result<(), RouterError>,
        after: Model,
        expected: Interrupts,
    ) -> Ran {
        let message_failed = match done {
            Err(RouterError::Kvm(error)) => error.call == Ioctl::SignalMsi.into(),
            _ => false,
        };
        let wanted = after.clone();
        let mut ran = self.judge(done, after, Ok(expected));
        if message_failed && ran.injected > 0 {
            self.model = wanted;
            let saved = self.ioapic.as_ref().unwrap().save();
            for (&number, pin) in &mut self.model.user_pins {
                pin.remote_irr &= saved.entries[usize::from(number)] >> 14 & 1 != 0;
            }
        }
        let received = ran.taken.clone();
        self.tell_of(&received);
        if ran.lost {
            ran.expected = received;
        }
        ran
    }
}

fn change(vectors: &mut MsiVectors<TestVm>, subs: &[Sub]) -> Result<(), RouterError> {
    let n = vectors.len();
    let own: Vec<u8> = (0..n).map(|i| vectors.message(i).unwrap().data as u8).collect();
    vectors.change(|change| {
        for sub in subs {
            match *sub {
                Sub::Enable => change.enable(),
                Sub::Disable => change.disable(),
                Sub::MaskAll => change.mask_all(),
                Sub::UnmaskAll => change.unmask_all(),
                Sub::Mask(i) => change.mask(i % n)?,
                Sub::Unmask(i) => change.unmask(i % n)?,
                Sub::Retarget(i, to) => change.retarget(i % n, message(to, own[i % n]))?,
                Sub::OutOfRange => change.mask(n)?,
            }
        }
        Ok(())
    })
}
