//! What a run was counted to have done: the file of `--stats-json`, the API's answer while it runs, and
//! lines for people.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

use crate::machine::Outcome;
use crate::virtio::CounterValues;

/// What a virtio device did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct DeviceStats {
    /// Its name, such as `rng0`.
    pub name: String,
    /// Its slot on the PCI bus.
    pub slot: u8,
    /// Why it first asked its driver for a reset.
    pub failure: Option<String>,
    /// What was counted.
    #[serde(flatten)]
    pub counters: CounterValues,
}

impl fmt::Display for DeviceStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counters = &self.counters;
        write!(f, "{}: {} requests", self.name, counters.requests)?;
        let others = [
            (counters.bytes_from_guest, "bytes from the guest"),
            (counters.bytes_to_guest, "bytes to the guest"),
            (counters.errors, "errors"),
            (counters.notifications, "doorbells"),
            (counters.notification_exits, "of them exits"),
            (counters.interrupts, "interrupts"),
            (counters.suppressed, "not wanted"),
            (counters.resets, "resets"),
            (counters.refused, "accesses refused"),
        ];
        for (n, what) in others.into_iter().filter(|(n, _)| *n > 0) {
            write!(f, ", {n} {what}")?;
        }
        match &self.failure {
            Some(failure) => {
                write!(f, "; asked for a reset {} times, first: {failure}", counters.needs_reset)
            }
            None => Ok(()),
        }
    }
}

/// What a run was counted to have done.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Stats<'a> {
    /// How it ended; nothing while it runs.
    pub(crate) reason: Option<String>,
    /// Exits by kind.
    pub(crate) exits: BTreeMap<&'static str, u64>,
    /// Accesses to ports and addresses where there is nothing.
    pub(crate) unclaimed: u64,
    /// Instructions that were completed for the guest.
    pub(crate) completed: u64,
    /// Bytes the guest sent to the serial port that could not be written.
    pub(crate) lost_output: u64,
    /// How often the guest put a PCI BAR where none can be.
    pub(crate) refused_bars: u64,
    /// The virtio devices.
    pub(crate) devices: Cow<'a, [DeviceStats]>,
}

impl<'a> From<&'a Outcome> for Stats<'a> {
    fn from(outcome: &'a Outcome) -> Self {
        Self {
            reason: Some(outcome.reason.to_string()),
            exits: outcome.exits.iter().collect(),
            unclaimed: outcome.unclaimed,
            completed: outcome.completed.total(),
            lost_output: outcome.lost_output,
            refused_bars: outcome.refused_bars,
            devices: Cow::Borrowed(&outcome.devices),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_one_line_with_what_happened() {
        let counters =
            CounterValues { requests: 3, bytes_to_guest: 192, interrupts: 2, ..Default::default() };
        let mut stats = DeviceStats { name: "rng0".to_owned(), slot: 1, failure: None, counters };
        assert_eq!(stats.to_string(), "rng0: 3 requests, 192 bytes to the guest, 2 interrupts");
        stats.counters.needs_reset = 1;
        stats.failure = Some("queue 0: the rings can't be accessed".to_owned());
        assert!(
            stats.to_string().ends_with(
                "; asked for a reset 1 times, first: queue 0: the rings can't be accessed"
            )
        );
        let json = serde_json::to_value(&stats).unwrap();
        assert_eq!((&json["name"], &json["bytes-to-guest"]), (&"rng0".into(), &192.into()));
    }
}
