//! Routes for messages that have none: a cache for hosts without `KVM_CAP_SIGNAL_MSI`.
//!
//! A message that is sent for the first time gets a route, and the next one like it is an interrupt on
//! that GSI. Only a cache: nobody owns these routes, so they go when GSIs are short. It must not
//! decide when.

use hv_core::{Gsi, Msi};

const BUCKETS: usize = 256;

/// The routes made for messages, found by address and data.
#[derive(Debug)]
pub(crate) struct DynamicMsis {
    /// By the low byte of the data, which is the vector on x86. Made when the first message is sent.
    buckets: Vec<Vec<(Msi, Gsi)>>,
    len: u32,
}

impl DynamicMsis {
    pub(crate) const EMPTY: Self = Self { buckets: Vec::new(), len: 0 };

    pub(crate) fn len(&self) -> u32 {
        self.len
    }

    /// The route of messages like this one. Who sent it makes no difference on x86.
    pub(crate) fn get(&self, msi: Msi) -> Option<Gsi> {
        let same =
            |&&(cached, _): &&(Msi, Gsi)| (cached.address, cached.data) == (msi.address, msi.data);
        self.buckets.get(bucket(msi))?.iter().find(same).map(|&(_, gsi)| gsi)
    }

    pub(crate) fn insert(&mut self, msi: Msi, gsi: Gsi) {
        self.buckets.resize_with(BUCKETS, Vec::new);
        if let Some(bucket) = self.buckets.get_mut(bucket(msi)) {
            bucket.push((msi, gsi));
            self.len += 1;
        }
    }

    pub(crate) fn gsis(&self) -> impl Iterator<Item = Gsi> {
        self.buckets.iter().flatten().map(|&(_, gsi)| gsi)
    }
}

fn bucket(msi: Msi) -> usize {
    (msi.data & 0xff) as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Log, Told, event, logging_vm, msi, taken};
    use crate::{IrqRouter, LegacyPins, MsiVectors, RouteError, RouterConfig, RouterError};
    use hv_core::init::MsiMode;
    use hv_core::mock::MockVm;
    use hv_core::{Errno, LineStatus, MsiStatus};
    use std::sync::Arc;

    /// A router of a VM without `KVM_SIGNAL_MSI`, whose table has room for `room` routes.
    fn old_host(
        room: u32,
        refuse: impl Fn(Told) -> Option<Errno> + Clone + Send + 'static,
    ) -> (IrqRouter<MockVm>, Log) {
        let (mut vm, log) = logging_vm(refuse);
        let lines = log.clone();
        vm.expect_irq_line_status().returning(move |gsi, level| {
            assert!(level);
            lines.lock().unwrap().push(Told::Line(gsi));
            Ok(LineStatus::Delivered(1))
        });
        let mut config = RouterConfig::new(38 + room, LegacyPins::Kernel);
        config.msi = MsiMode::DynamicRoutes;
        let router = IrqRouter::new(Arc::new(vm), config).unwrap();
        taken(&log);
        (router, log)
    }

    fn send(router: &IrqRouter<MockVm>, data: u32) -> Result<MsiStatus, RouterError> {
        router.signal_msi(msi(data))
    }

    #[test]
    fn a_message_gets_a_route_when_it_is_sent_first() {
        let (router, log) = old_host(100, |_| None);
        assert_eq!(send(&router, 0x41), Ok(MsiStatus::Delivered));
        assert_eq!(taken(&log), [Told::Table(39), Told::Line(Gsi(24))], "routed, then raised");
        send(&router, 0x41).unwrap();
        assert_eq!(taken(&log), [Told::Line(Gsi(24))]);
        send(&router, 0x141).unwrap();
        assert_eq!(taken(&log), [Told::Table(40), Told::Line(Gsi(25))], "the same bucket");
        let elsewhere = Msi { address: 0xfee0_1000, data: 0x41, device: None };
        router.signal_msi(elsewhere).unwrap();
        assert_eq!(taken(&log), [Told::Table(41), Told::Line(Gsi(26))]);
        router.signal_msi(Msi { device: Some(3), ..elsewhere }).unwrap();
        assert_eq!(taken(&log), [Told::Line(Gsi(26))], "whoever sends it");
    }

    #[test]
    fn when_gsis_are_short_only_these_routes_go() {
        let (router, log) = old_host(4, |_| None);
        let owned = router.batch(|batch| batch.add_msi(msi(1))).unwrap();
        let mut bound = MsiVectors::new(&router, [event()]);
        bound
            .change(|change| {
                change.enable();
                change.unmask(0)
            })
            .unwrap();
        send(&router, 0x41).unwrap();
        send(&router, 0x42).unwrap();
        taken(&log);
        send(&router, 0x43).unwrap();
        assert_eq!(
            taken(&log),
            [Told::Table(40), Told::Table(41), Told::Line(Gsi(26))],
            "pins and owned routes stay"
        );
        assert_eq!(router.allocated(), [owned.gsi(), bound.gsi(0).unwrap().unwrap(), Gsi(26)]);
        send(&router, 0x41).unwrap();
        assert_eq!(taken(&log), [Told::Table(42), Told::Line(Gsi(27))], "made anew");
        // An owner needs one.
        let more = router.batch(|batch| batch.add_msi(msi(2))).unwrap();
        assert_eq!(taken(&log), [Told::Table(40), Told::Table(41)]);
        assert_eq!(more.gsi(), Gsi(26));
    }

    #[test]
    fn without_room_nothing_is_evicted_in_vain() {
        let (router, log) = old_host(2, |_| None);
        let full = RouterError::Route(RouteError::TableFull { limit: 40 });
        send(&router, 0x41).unwrap();
        let before = router.routes();
        taken(&log);
        let mut large = MsiVectors::new(&router, (0..3).map(|_| event()));
        let enabled = large.change(|change| {
            change.enable();
            (0..3).try_for_each(|index| change.unmask(index))
        });
        assert_eq!(enabled, Err(full));
        assert_eq!((taken(&log), router.routes()), (vec![], before), "3 need more than there is");
        let _owned = router.batch(|batch| Ok([batch.add_msi(msi(1))?, batch.add_msi(msi(2))?]));
        taken(&log);
        assert_eq!(send(&router, 0x43), Err(full));
        assert_eq!(taken(&log), []);
    }

    #[test]
    fn a_refused_route_leaves_nothing() {
        let (router, log) = old_host(4, |told| (told == Told::Table(39)).then_some(Errno::ENOMEM));
        assert!(matches!(send(&router, 0x41), Err(RouterError::Kvm(_))));
        assert_eq!(taken(&log), [Told::Table(39)], "not raised");
        assert!(router.allocated().is_empty());
    }

    #[test]
    fn a_guest_can_send_all_messages_there_are() {
        let (router, log) = old_host(64, |_| None);
        for data in 0..5000 {
            send(&router, data).unwrap();
            assert!(router.allocated().len() <= 64);
        }
        let flushes = taken(&log).iter().filter(|&&told| told == Told::Table(38)).count();
        assert_eq!(flushes, 5000 / 64, "each makes room for 64");
    }
}
