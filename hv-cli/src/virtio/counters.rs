//! What is counted of a device. The transport and the queues count; a device counts nothing itself but
//! requests that failed.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

use super::DeviceError;

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident $count:ident,)*) => {
        /// The counters of a device, shared by its thread, the transport and the report.
        #[derive(Debug, Default)]
        pub struct Counters {
            $($name: AtomicU64,)*
            failure: OnceLock<DeviceError>,
        }

        /// The counters of a device at one moment.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
        #[serde(rename_all = "kebab-case")]
        pub struct CounterValues {
            $($(#[$doc])* pub $name: u64,)*
        }

        impl Counters {
            $($(#[$doc])* pub(crate) fn $count(&self, n: u64) {
                self.$name.fetch_add(n, Ordering::Relaxed);
            })*

            /// All of them now.
            #[must_use]
            pub fn values(&self) -> CounterValues {
                CounterValues { $($name: self.$name.load(Ordering::Relaxed),)* }
            }
        }
    };
}

counters! {
    /// Descriptor chains that were completed.
    requests count_requests,
    /// Bytes the device read from buffers of completed chains.
    bytes_from_guest count_bytes_from_guest,
    /// Bytes the device says it wrote into buffers of completed chains.
    bytes_to_guest count_bytes_to_guest,
    /// Requests that failed.
    errors count_errors,
    /// Times the device asked for a reset (`DEVICE_NEEDS_RESET`).
    needs_reset count_needs_reset,
    /// Times the driver reset the device.
    resets count_resets,
    /// Interrupts sent, by message or by line.
    interrupts count_interrupts,
    /// Interrupts not sent, because the driver had said that it wants none.
    suppressed count_suppressed,
    /// Doorbells heard, by ioeventfd or by an exit.
    notifications count_notifications,
    /// Of these, those that were an exit of the guest.
    notification_exits count_notification_exits,
    /// Accesses of the driver that mean nothing, or ask for what can't be had, and were ignored.
    refused count_refused,
}

impl Counters {
    /// The device asks for a reset, for this reason.
    pub(crate) fn failed(&self, reason: DeviceError) {
        let _ = self.failure.set(reason);
        self.count_needs_reset(1);
    }

    /// Why the device first asked for a reset.
    #[must_use]
    pub fn failure(&self) -> Option<DeviceError> {
        self.failure.get().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_have_what_was_counted_and_names_for_json() {
        let counters = Counters::default();
        counters.count_requests(2);
        counters.count_bytes_to_guest(64);
        counters.count_requests(1);
        let values = counters.values();
        assert_eq!((values.requests, values.bytes_to_guest, values.errors), (3, 64, 0));
        let json = serde_json::to_value(values).unwrap();
        assert_eq!(json["bytes-to-guest"], 64);
    }
}
