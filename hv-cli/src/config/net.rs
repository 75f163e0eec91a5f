//! A network device of `--net`.

use std::fmt;
use std::os::fd::RawFd;
use std::str::FromStr;

/// A network device of the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetConfig {
    /// What it is connected to.
    pub backend: NetBackend,
    /// Its address; a random one without.
    pub mac: Option<MacAddress>,
    /// How many pairs of queues it has.
    pub queues: u16,
}

/// What a network device is connected to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NetBackend {
    /// The tap interface with this name.
    Tap(String),
    /// What this descriptor, which `hv` was given, refers to: a tap interface or a socket.
    Fd(RawFd),
    /// passt, started for it, which needs no privileges.
    User,
}

/// An Ethernet address of one station.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MacAddress(pub [u8; 6]);

/// A text that is no network device.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseNetError {
    /// Nothing to connect it to.
    #[error(
        "{0:?}: say first what the network device is connected to: tap=NAME, fd=N (from 3 on) or user"
    )]
    Backend(String),
    /// A name no interface has.
    #[error("tap {0:?}: an interface has a name of 1 to 15 characters without spaces, '/' and '%'")]
    Name(String),
    /// No Ethernet address of a station.
    #[error("mac {0:?}: six bytes such as 02:00:00:00:00:01, not all zero, the first of them even")]
    Mac(String),
    /// Not so many queues.
    #[error("queues {0:?}: a number from 1 to {MOST_QUEUES}")]
    Queues(String),
    /// More queues than it can have.
    #[error("queues: only a tap=NAME can have more than one")]
    ManyQueues,
    /// No such property.
    #[error("a network device has no property {0:?}; there are mac=ADDRESS and queues=N")]
    Unknown(String),
}

/// More than processors of a guest that could use them at once.
const MOST_QUEUES: u16 = 16;

impl NetConfig {
    /// A device with this backend and the defaults.
    #[must_use]
    pub fn new(backend: NetBackend) -> Self {
        Self { backend, mac: None, queues: 1 }
    }

    fn set(&mut self, property: &str) -> Result<(), ParseNetError> {
        match property.split_once('=') {
            Some(("mac", mac)) => self.mac = Some(mac.parse()?),
            Some(("queues", queues)) => {
                let number = queues.parse().ok().filter(|n| (1..=MOST_QUEUES).contains(n));
                self.queues = number.ok_or_else(|| ParseNetError::Queues(queues.to_owned()))?;
                if self.queues > 1 && !matches!(self.backend, NetBackend::Tap(_)) {
                    return Err(ParseNetError::ManyQueues);
                }
            }
            _ => return Err(ParseNetError::Unknown(property.to_owned())),
        }
        Ok(())
    }
}

impl FromStr for NetConfig {
    type Err = ParseNetError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut words = text.split(',');
        let first = words.next().unwrap_or_default();
        let mut net = Self::new(first.parse()?);
        words.try_for_each(|property| net.set(property))?;
        Ok(net)
    }
}

impl FromStr for NetBackend {
    type Err = ParseNetError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let unknown = || ParseNetError::Backend(text.to_owned());
        match text.split_once('=') {
            None if text == "user" => Ok(Self::User),
            Some(("tap", name)) => {
                // What the kernel takes, but for '%', of which it makes a number.
                let odd =
                    |c: char| c.is_whitespace() || c.is_control() || matches!(c, '/' | ':' | '%');
                if !(1..16).contains(&name.len())
                    || name.contains(odd)
                    || [".", ".."].contains(&name)
                {
                    return Err(ParseNetError::Name(name.to_owned()));
                }
                Ok(Self::Tap(name.to_owned()))
            }
            Some(("fd", number)) => {
                let digits = number.bytes().all(|byte| byte.is_ascii_digit());
                let fd = number.parse().ok().filter(|fd| digits && *fd > 2);
                fd.map(Self::Fd).ok_or_else(unknown)
            }
            _ => Err(unknown()),
        }
    }
}

impl fmt::Display for NetBackend {
    /// As it is written on the command line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tap(name) => write!(f, "tap={name}"),
            Self::Fd(fd) => write!(f, "fd={fd}"),
            Self::User => f.write_str("user"),
        }
    }
}

impl FromStr for MacAddress {
    type Err = ParseNetError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut bytes = [0; 6];
        let mut words = text.split(':');
        let hex = |word: &str| {
            let digits = word.len() == 2 && word.bytes().all(|byte| byte.is_ascii_hexdigit());
            u8::from_str_radix(word, 16).ok().filter(|_| digits)
        };
        let whole = bytes.iter_mut().all(|byte| match words.next().and_then(hex) {
            Some(value) => {
                *byte = value;
                true
            }
            None => false,
        });
        let [first, ..] = bytes;
        if !whole || words.next().is_some() || bytes == [0; 6] || first & 1 != 0 {
            return Err(ParseNetError::Mac(text.to_owned()));
        }
        Ok(Self(bytes))
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> Result<NetConfig, ParseNetError> {
        text.parse()
    }

    #[test]
    fn a_network_device_is_a_backend_and_its_properties() {
        let tap = NetBackend::Tap("tap0".to_owned());
        assert_eq!(net("tap=tap0"), Ok(NetConfig::new(tap.clone())));
        let mac = MacAddress([2, 0, 0xab, 0, 0, 0xff]);
        let all = NetConfig { backend: tap, mac: Some(mac), queues: 4 };
        assert_eq!(net("tap=tap0,mac=02:00:ab:00:00:FF,queues=4"), Ok(all));
        assert_eq!(net("fd=3"), Ok(NetConfig::new(NetBackend::Fd(3))));
        assert_eq!(net("user,queues=1").unwrap().backend, NetBackend::User);
        for text in ["tap=br-lan.5", "fd=17", "user"] {
            assert_eq!(net(text).unwrap().backend.to_string(), text);
        }
        assert_eq!(mac.to_string(), "02:00:ab:00:00:ff");
    }

    #[test]
    fn what_can_not_be_meant_is_refused() {
        for bad in [
            "",
            "tap",
            "tap=",
            "tap=0123456789abcdef",
            "tap=a/b",
            "tap=tap%d",
            "tap=..",
            "tap=a b",
            "fd",
            "fd=",
            "fd=2",
            "fd=-1",
            "fd=+3",
            "fd=99999999999",
            "user=1",
            "vde",
            "user,",
            "user,x",
            "user,mac",
            "user,mac=",
            "user,mac=1:2:3:4:5:6",
            "user,mac=02:00:00:00:00",
            "user,mac=02:00:00:00:00:00:00",
            "user,mac=00:00:00:00:00:00",
            "user,mac=01:00:00:00:00:01",
            "user,mac=+2:00:00:00:00:01",
            "tap=a,queues=0",
            "tap=a,queues=17",
            "tap=a,queues=",
            "fd=3,queues=2",
            "user,queues=2",
        ] {
            assert!(net(bad).is_err(), "{bad:?}");
        }
    }
}
