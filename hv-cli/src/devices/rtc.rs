//! The CMOS clock (MC146818), read-only: the host's time, in UTC, and the size of memory.
//!
//! No alarm and no periodic interrupt; what the guest writes to the clock is dropped.

use std::time::{SystemTime, UNIX_EPOCH};

use crate::machine::bus::Device;

/// The clock on ports 0x70 (index) and 0x71 (data).
pub struct Rtc {
    index: u8,
    now: fn() -> u64,
    memory_below_4g: u64,
    memory_above_4g: u64,
}

const INDEX: u64 = 0;
const DATA: u64 = 1;

impl Rtc {
    /// A clock of a machine with this much memory, in bytes.
    #[must_use]
    pub fn new(memory_below_4g: u64, memory_above_4g: u64) -> Self {
        Self { index: 0, now: seconds_since_1970, memory_below_4g, memory_above_4g }
    }

    fn register(&self) -> u8 {
        let now = (self.now)();
        let seconds = now % 86_400;
        let (year, month, day) = date(now / 86_400);
        let above_1m = self.memory_below_4g.saturating_sub(1 << 20) >> 10; // KiB
        let above_16m = self.memory_below_4g.saturating_sub(16 << 20) >> 16; // 64 KiB
        let above_4g = self.memory_above_4g >> 16; // 64 KiB
        let [ext_low, ext_high] = u16::try_from(above_1m).unwrap_or(u16::MAX).to_le_bytes();
        let [mid_low, mid_high] = u16::try_from(above_16m).unwrap_or(u16::MAX).to_le_bytes();
        let [big0, big1, big2, ..] = above_4g.to_le_bytes();
        match self.index {
            0x00 => bcd(seconds % 60),
            0x02 => bcd(seconds / 60 % 60),
            0x04 => bcd(seconds / 3600),
            // 1970-01-01 was a Thursday; Sunday is 1.
            0x06 => bcd((now / 86_400 + 4) % 7 + 1),
            0x07 => bcd(day),
            0x08 => bcd(month),
            0x09 => bcd(year % 100),
            0x32 => bcd(year / 100),
            0x0a => 0x26, // 32768 Hz time base; never updating while it is read
            0x0b => 0x02, // 24 hours, BCD
            0x0d => 0x80, // valid RAM and time
            0x15 => 0x80, // 640 KiB of base memory
            0x16 => 0x02,
            0x17 | 0x30 => ext_low,
            0x18 | 0x31 => ext_high,
            0x34 => mid_low,
            0x35 => mid_high,
            0x5b => big0,
            0x5c => big1,
            0x5d => big2,
            _ => 0,
        }
    }
}

fn seconds_since_1970() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

fn bcd(value: u64) -> u8 {
    ((value / 10 % 10) * 16 + value % 10) as u8
}

/// Year, month and day of the Gregorian calendar, from days since 1970-01-01.
fn date(days: u64) -> (u64, u64, u64) {
    // Count from 0000-03-01, so that the leap day is the last of its year.
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    (year, month, day)
}

impl Device for Rtc {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let (DATA, [byte, ..]) = (offset, data) {
            *byte = self.register();
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (INDEX, [index, ..]) = (offset, data) {
            self.index = index & 0x7f; // bit 7 masks the NMI
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(rtc: &mut Rtc, index: u8) -> u8 {
        rtc.write(INDEX, &[index]);
        let mut data = [0];
        rtc.read(DATA, &mut data);
        data[0]
    }

    #[test]
    fn the_time_is_the_hosts_in_bcd() {
        let mut rtc = Rtc::new(0, 0);
        rtc.now = || 1_709_210_096; // Thursday 2024-02-29 12:34:56 UTC
        let registers = [0x00, 0x02, 0x04, 0x06, 0x07, 0x08, 0x09, 0x32];
        let values = registers.map(|r| read(&mut rtc, r));
        assert_eq!(values, [0x56, 0x34, 0x12, 0x05, 0x29, 0x02, 0x24, 0x20]);
        assert_eq!(read(&mut rtc, 0x8a) & 0x80, 0, "no update in progress; NMI bit ignored");
    }

    #[test]
    fn dates_around_leap_days_and_centuries() {
        let cases = [
            (0, (1970, 1, 1)),
            (789, (1972, 2, 29)),
            (790, (1972, 3, 1)),
            (10_956, (1999, 12, 31)),
            (11_016, (2000, 2, 29)),
            (47_540, (2100, 2, 28)),
            (47_541, (2100, 3, 1)),
        ];
        for (days, expected) in cases {
            assert_eq!(date(days), expected, "day {days}");
        }
    }

    #[test]
    fn memory_sizes_saturate() {
        let mut rtc = Rtc::new(128 << 20, 5 << 30);
        let word = |rtc: &mut Rtc, i| u16::from_le_bytes([read(rtc, i), read(rtc, i + 1)]);
        assert_eq!(word(&mut rtc, 0x30), u16::MAX);
        assert_eq!(u32::from(word(&mut rtc, 0x34)) << 16, 112 << 20);
        assert_eq!((u64::from(word(&mut rtc, 0x5b)) << 16) + (4 << 30), 5 << 30);
    }
}
